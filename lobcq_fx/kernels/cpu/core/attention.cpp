#include "attention.h"

#include <cmath>

#include "packed_row.h"

namespace lobcq {
namespace {

constexpr int64_t kGrainProducts = 1 << 18;  // below this a thread costs more than it saves
constexpr int64_t kDecodeProducts = 8;       // that take as long as decoding one scalar
constexpr int64_t kScaleBytes = 4;  // of a token's tensor scale, which its row starts with

StateRows rows_of(const lobcq_states& s, int64_t heads, int32_t num_codebooks, int64_t batch, int64_t tokens) {
    const PackedRow bytes(s.width, num_codebooks, s.array_size);
    const int64_t head_bytes = bytes.codes + bytes.selectors + bytes.scales;
    const int64_t row_bytes = kScaleBytes + heads * head_bytes;
    return {.rows = s.rows + batch * tokens * row_bytes, .row_bytes = row_bytes, .head_bytes = head_bytes,
            .code_bytes = bytes.codes, .selector_bytes = bytes.selectors, .width = s.width,
            .padded = round_up(s.width, s.array_size), .array_size = s.array_size,
            .bits = selector_bits(num_codebooks)};
}

// One head of n tokens: entries [n][padded], the scales of its block arrays, and the tokens' tensor scales.
struct alignas(64) Decoded {
    int8_t entries[kTileTokens * kMaxWidth];
    float scales[kTileTokens][kMaxWidth / 16];
    float tensor_scales[kTileTokens];
};

void decode_entries(const Tables& t, const StateRows& s, int64_t head, int64_t token, int64_t n, Decoded* out) {
    alignas(64) uint8_t codes[kTileTokens * kMaxWidth], selectors[kTileTokens * kMaxWidth / kBlock];
    for (int64_t j = 0; j < n; ++j) {
        const uint8_t* row = s.rows + (token + j) * s.row_bytes;
        const uint8_t* from = row + kScaleBytes + head * s.head_bytes;
        std::memcpy(out->tensor_scales + j, row, sizeof(float));
        unpack_codes(from, s.padded, codes + j * s.padded);
        unpack_selectors(from + s.code_bytes, s.padded / kBlock, s.bits, selectors + j * s.padded / kBlock);
        const uint8_t* scales = from + s.code_bytes + s.selector_bytes;
        for (int64_t g = 0; g < s.padded / s.array_size; ++g) out->scales[j][g] = e4m3_value(scales[g]);
    }
    // Codes are decoded in groups: those behind the last token are of any entry, which nobody reads.
    const int64_t used = n * s.padded, groups = ceil_div(used, kGroup);
    std::memset(codes + used, 0, static_cast<size_t>(groups * kGroup - used));
    std::memset(selectors + used / kBlock, 0, static_cast<size_t>((groups * kGroup - used) / kBlock));
    isa().entries(t, codes, selectors, groups, out->entries);
}

void decode_keys(const Tables& t, const StateRows& s, int64_t head, int64_t token, int64_t n, AttentionTile* tile) {
    Decoded decoded;
    decode_entries(t, s, head, token, n, &decoded);
    for (int64_t d = 0; d < s.width; ++d) {
        float* to = tile->keys[d];
        for (int64_t j = 0; j < n; ++j)
            to[j] = static_cast<float>(decoded.entries[j * s.padded + d]) * decoded.scales[j][d / s.array_size] *
                    decoded.tensor_scales[j];
        for (int64_t j = n; j < kTileTokens; ++j) to[j] = 0.0f;
    }
}

void decode_values(const Tables& t, const StateRows& s, int64_t head, int64_t token, int64_t n, AttentionTile* tile) {
    Decoded decoded;
    decode_entries(t, s, head, token, n, &decoded);
    for (int64_t j = 0; j < n; ++j)
        for (int64_t g = 0; g < s.padded / s.array_size; ++g) {
            const int8_t* entries = decoded.entries + j * s.padded + g * s.array_size;
            float* to = tile->values[j] + g * s.array_size;
            const float scale = decoded.scales[j][g], tensor_scale = decoded.tensor_scales[j];
            for (int i = 0; i < s.array_size; ++i) to[i] = static_cast<float>(entries[i]) * scale * tensor_scale;
        }
}

}  // namespace

int64_t state_row_bytes(const lobcq_states& s, int64_t heads, int32_t num_codebooks) {
    return rows_of(s, heads, num_codebooks, 0, 0).row_bytes;
}

Attention::Attention(const Tables& t, const lobcq_attention& attention)
    : tables(t), a(attention), rows(a.queries * (a.query_heads / a.heads)), blocks(ceil_div(rows, kQueryRows)) {}

int64_t Attention::grain() const {
    const int64_t together = rows < kQueryRows ? rows : kQueryRows;
    const double scalars = static_cast<double>(a.tokens) * static_cast<double>(a.keys.width + a.values.width);
    const double each = scalars * static_cast<double>(together + kDecodeProducts) + 1;
    return each < kGrainProducts ? ceil_div(kGrainProducts, static_cast<int64_t>(each)) : 1;
}

void Attention::run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / blocks;
        run_block(head / a.heads, head % a.heads, task % blocks * kQueryRows);
    }
}

void Attention::run_block(int64_t batch, int64_t head, int64_t first) const {
    const int64_t left = rows - first, n = left < kQueryRows ? left : kQueryRows;
    const StateRows keys = rows_of(a.keys, a.heads, tables.num_codebooks, batch, a.tokens);
    const StateRows values = rows_of(a.values, a.heads, tables.num_codebooks, batch, a.tokens);
    AttentionTile tile;
    const auto offset = [&](int64_t row, int64_t width) {
        return ((batch * a.query_heads + query_head(head, first + row)) * a.queries + (first + row) % a.queries) * width;
    };
    for (int64_t row = 0; row < n; ++row) {
        tile.queries[row] = a.query + offset(row, keys.width);
        tile.most[row] = -HUGE_VALF;
        tile.weights[row] = 0.0f;
        std::memset(tile.sums[row], 0, static_cast<size_t>(values.padded) * sizeof(float));
    }
    for (int64_t token = 0; token < a.tokens; token += kTileTokens) {
        const int64_t behind = a.tokens - token, tokens = behind < kTileTokens ? behind : kTileTokens;
        if (!load_mask(batch, head, first, n, token, tokens, &tile)) continue;
        decode_keys(tables, keys, head, token, tokens, &tile);
        decode_values(tables, values, head, token, tokens, &tile);
        isa().attend(tile, n, tokens, keys.width, values.padded, a.scale);
    }
    for (int64_t row = 0; row < n; ++row) {
        float* to = a.out + offset(row, values.width);
        const float weights = tile.weights[row] == 0.0f ? 1.0f : tile.weights[row];
        for (int64_t d = 0; d < values.width; ++d) to[d] = tile.sums[row][d] / weights;
    }
}

// What is added to the scores; false where no row looks at any of the tokens.
bool Attention::load_mask(int64_t batch, int64_t head, int64_t first, int64_t n, int64_t token, int64_t tokens,
                          AttentionTile* tile) const {
    bool any = false;
    for (int64_t row = 0; row < n; ++row) {
        float* to = tile->scores[row];
        for (int64_t j = tokens; j < kTileTokens; ++j) to[j] = -HUGE_VALF;
        if (a.mask_kind == LOBCQ_NO_MASK) {
            for (int64_t j = 0; j < tokens; ++j) to[j] = 0.0f;
            any = true;
            continue;
        }
        const int64_t* strides = a.mask_strides;
        const int64_t start = batch * strides[0] + query_head(head, first + row) * strides[1] +
                              (first + row) % a.queries * strides[2] + token * strides[3];
        for (int64_t j = 0; j < tokens; ++j) {
            const int64_t at = start + j * strides[3];
            to[j] = a.mask_kind == LOBCQ_ADDED_MASK ? static_cast<const float*>(a.mask)[at]
                    : static_cast<const uint8_t*>(a.mask)[at] ? 0.0f : -HUGE_VALF;
            any |= to[j] != -HUGE_VALF;
        }
    }
    return any;
}

}  // namespace lobcq
