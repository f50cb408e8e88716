#include "attention.h"

#include <algorithm>

#include "packed_row.h"

namespace lobcq {
namespace {

constexpr int64_t kGrainProducts = 1 << 18;  // below this a thread costs more than it saves
constexpr int64_t kDecodeProducts = 8;       // that take as long as decoding one scalar
constexpr int64_t kFloatColumns = 16;        // floats of a token are padded to a multiple: the longest vector

StateRows rows_of(const lobcq_states& s, int64_t heads, int32_t num_codebooks, int64_t first_token) {
    const PackedRow bytes(s.width, num_codebooks, s.array_size);
    const int64_t head_bytes = bytes.codes + bytes.selectors + bytes.scales;
    const int64_t row_bytes = kStateScaleBytes + heads * head_bytes;
    return {.rows = s.rows + first_token * row_bytes, .row_bytes = row_bytes, .head_bytes = head_bytes,
            .code_bytes = bytes.codes, .selector_bytes = bytes.selectors, .width = s.width,
            .padded = round_up(s.width, s.array_size), .array_size = s.array_size,
            .bits = selector_bits(num_codebooks)};
}

}  // namespace

int64_t state_row_bytes(const lobcq_states& s, int64_t heads, int32_t num_codebooks) {
    return rows_of(s, heads, num_codebooks, 0).row_bytes;
}

StateRows Attention::states(const lobcq_states& s, int64_t batch) const {
    return rows_of(s, a.heads, tables.num_codebooks, batch * a.tokens);
}

FloatStates Attention::float_states(const lobcq_states& s, int64_t batch, int64_t head) const {
    const int64_t first = batch * s.strides[0] + head * s.strides[1];
    return {.data = s.rows + first * scalar_bytes(s.dtype), .stride = s.strides[2], .width = s.width,
            .padded = padded(s), .dtype = s.dtype};
}

int64_t Attention::padded(const lobcq_states& s) const {
    return round_up(s.width, a.products == LOBCQ_FLOAT_STATES ? kFloatColumns : s.array_size);
}

Attention::Attention(const Tables& t, const lobcq_attention& attention)
    : tables(t), a(attention), group(a.query_heads / a.heads), rows(a.queries * group) {
    const int64_t widest = std::max(padded(a.keys), padded(a.values));
    const int64_t most = std::min(kMaxQueryRows, kRowScalars / widest);
    blocks = ceil_div(rows, most);
    block_rows = blocks ? ceil_div(rows, blocks) : 1;
}

int64_t Attention::grain() const {
    const double scalars = static_cast<double>(a.tokens) * static_cast<double>(a.keys.width + a.values.width);
    const double each = scalars * static_cast<double>(block_rows + kDecodeProducts) + 1;
    return each < kGrainProducts ? ceil_div(kGrainProducts, static_cast<int64_t>(each)) : 1;
}

void Attention::run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / blocks, place = task % blocks;
        // A block late in a prompt has more to look at: late ones and early ones alternate.
        const int64_t first = (place % 2 ? blocks - 1 - place / 2 : place / 2) * block_rows;
        const int64_t n = std::min(block_rows, rows - first);
        if (n <= 0) continue;
        const QueryBlock block{*this, head / a.heads, head % a.heads, first, n};
        if (a.products == LOBCQ_INT8_PRODUCTS) isa().attend_int8(block);
        else if (a.products == LOBCQ_FLOAT_STATES) isa().attend_floats(block);
        else isa().attend(block);
    }
}

}  // namespace lobcq
