// How keys and values get from rows of bytes into the order that attention multiplies them in, for instruction sets
// without a faster way. Included as loops.h is.
#pragma once

#include "attention.h"
#include "packed_row.h"

namespace lobcq {
namespace {

// Biased entries of n tokens of a head, [n][padded].
inline void load_entries_by_codes(const Tables& t, const StateRows& s, int64_t head, int64_t token, int64_t n,
                                  uint8_t* to) {
    constexpr int64_t kTogether = 8;  // tokens
    alignas(64) uint8_t codes[kTogether * kMaxWidth], selectors[kTogether * kMaxWidth / kBlock];
    alignas(64) int8_t entries[kTogether * kMaxWidth];
    for (int64_t first = 0; first < n; first += kTogether, to += kTogether * s.padded) {
        const int64_t tokens = n - first < kTogether ? n - first : kTogether, used = tokens * s.padded;
        for (int64_t j = 0; j < tokens; ++j) {
            const uint8_t* from = s.rows + (token + first + j) * s.row_bytes + kStateScaleBytes + head * s.head_bytes;
            unpack_codes(from, s.padded, codes + j * s.padded);
            unpack_selectors(from + s.code_bytes, s.padded / kBlock, s.bits, selectors + j * s.padded / kBlock);
        }
        const int64_t groups = ceil_div(used, kGroup);  // the last one filled up with what nobody reads
        std::memset(codes + used, 0, static_cast<size_t>(groups * kGroup - used));
        std::memset(selectors + used / kBlock, 0, static_cast<size_t>((groups * kGroup - used) / kBlock));
        isa().entries(t, codes, selectors, groups, entries);
        for (int64_t i = 0; i < used; ++i) to[i] = static_cast<uint8_t>(entries[i] + kBias);
    }
}

// Four columns of a token side by side: [tokens][padded] to [padded / 4][tokens][4].
inline void copy_quads(const uint8_t* entries, int64_t padded, int64_t tokens, uint8_t* to) {
    for (int64_t j = 0; j < tokens; ++j)
        for (int64_t quad = 0; quad < padded / 4; ++quad)
            std::memcpy(to + (quad * tokens + j) * 4, entries + j * padded + quad * 4, 4);
}

// Four tokens of a column side by side, without the bias: [tokens][padded] to [tokens / 4][padded][4].
inline void copy_columns(const uint8_t* entries, int64_t padded, int64_t tokens, int8_t* to) {
    for (int64_t j = 0; j < tokens; j += 4, entries += 4 * padded, to += 4 * padded)
        for (int64_t d = 0; d < padded; ++d)
            for (int k = 0; k < 4; ++k) to[d * 4 + k] = static_cast<int8_t>(entries[k * padded + d] - kBias);
}

// A square of a side, its rows `stride` apart, to rows `apart`.
template <int kSide>
void transpose_square(const float* from, int64_t stride, float* to, int64_t apart) {
    for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) to[j * apart + i] = from[i * stride + j];
}

}  // namespace
}  // namespace lobcq
