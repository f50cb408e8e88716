// Keys and values of one head, decoded to entries and scales. Included as loops.h is.
#pragma once

#include "attention.h"

namespace lobcq {
namespace {

// Tokens of one head: biased entries [tokens][padded], the scales of their block arrays [arrays][kTokens], and their
// tensor scales. Of tokens behind the last one scales are 0, entries any.
template <int kTokens>
struct alignas(64) DecodedStates {
    uint8_t entries[kTokens * kMaxWidth];
    float scales[kMaxWidth / 16][kTokens];
    float tensor_scales[kTokens];

    void load(const Tables& t, const StateRows& s, int64_t head, int64_t token, int64_t n) {
        load_entries(t, s, head, token, n, entries);
        const uint8_t* row = s.rows + token * s.row_bytes;
        const uint8_t* bytes = row + kStateScaleBytes + head * s.head_bytes + s.code_bytes + s.selector_bytes;
        for (int64_t j = 0; j < n; ++j) std::memcpy(tensor_scales + j, row + j * s.row_bytes, sizeof(float));
        for (int64_t j = n; j < kTokens; ++j) tensor_scales[j] = 0.0f;
        for (int64_t g = 0; g < s.arrays(); ++g) {
            for (int64_t j = 0; j < n; ++j) scales[g][j] = e4m3_value(bytes[j * s.row_bytes + g]);
            for (int64_t j = n; j < kTokens; ++j) scales[g][j] = 0.0f;
        }
    }
};

}  // namespace
}  // namespace lobcq
