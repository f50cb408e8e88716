// The vector loops of attention. Included by each instruction set's file after it has set the target, as loops.h is.
#pragma once

#include <cmath>

#include "attention.h"

namespace lobcq {
namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats load_floats(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store_floats(const Floats& x, float* to) { std::memcpy(to, &x, sizeof x); }

// e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2. Below -87 it is 0; NaN stays NaN.
inline Floats exp_of(const Floats& x) {
    const Floats shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // the nearest integer is left in the lowest bits
    const Floats n = shifted - 0x1.8p23f;
    const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    Floats p = r * 0x1.6850e4p-10f + 0x1.123bccp-7f;
    p = p * r + 0x1.555b98p-5f;
    p = p * r + 0x1.55548ep-3f;
    p = p * r + 0x1.fffff8p-2f;
    p = (p * r) * r + r + 1.0f;
    const Ints exponent = ((Ints)shifted - 0x4b400000 + 127) << 23;
    const Floats result = p * (Floats)exponent;
    const Ints none = x < -87.0f;  // all bits where it holds
    return (Floats)((Ints)result & ~none);
}

// scores[r][j] = scale * (query r . key j) + what stands there, for kRows queries.
template <int kRows>
void score_rows(AttentionTile& tile, int64_t first, int64_t width, float scale) {
    Floats sums[kRows][kTileTokens / kLanes] = {};
    for (int64_t d = 0; d < width; ++d)
        for (int i = 0; i < kTileTokens / kLanes; ++i) {
            const Floats keys = load_floats(tile.keys[d] + i * kLanes);
            for (int r = 0; r < kRows; ++r) sums[r][i] += tile.queries[first + r][d] * keys;
        }
    for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kTileTokens / kLanes; ++i) {
            float* to = tile.scores[first + r] + i * kLanes;
            store_floats(sums[r][i] * scale + load_floats(to), to);
        }
}

// The weights of a row's scores relative to the largest so far, and what the sums before them are worth then. False
// where it has looked at nothing yet.
bool weigh_row(AttentionTile& tile, int64_t row, float* rescale) {
    float most = tile.most[row];
    for (const float score : tile.scores[row]) most = score > most ? score : most;
    if (most == -HUGE_VALF) {
        for (const float score : tile.scores[row])
            if (score != score) most = 0.0f;  // NaN: all that follows is
        if (most != 0.0f) return false;
    }
    Floats sums = {};
    for (int j = 0; j < kTileTokens; j += kLanes) {
        const Floats weights = exp_of(load_floats(tile.scores[row] + j) - most);
        store_floats(weights, tile.scores[row] + j);
        sums += weights;
    }
    *rescale = std::exp(tile.most[row] - most);
    tile.most[row] = most;
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    tile.weights[row] = tile.weights[row] * *rescale + sum;
    return true;
}

// sums[r] = sums[r] * rescale[r] + weights of row r times the values of n tokens, for kRows rows.
template <int kRows>
void add_values(AttentionTile& tile, int64_t first, int64_t width, int64_t n, const float* rescale) {
    for (int64_t d = 0; d < width; d += kLanes) {
        Floats sums[kRows];
        for (int r = 0; r < kRows; ++r) sums[r] = load_floats(tile.sums[first + r] + d) * rescale[r];
        for (int64_t j = 0; j < n; ++j) {
            const Floats values = load_floats(tile.values[j] + d);
            for (int r = 0; r < kRows; ++r) sums[r] += tile.scores[first + r][j] * values;
        }
        for (int r = 0; r < kRows; ++r) store_floats(sums[r], tile.sums[first + r] + d);
    }
}

constexpr int kRowsTogether = 4;  // share what is loaded of keys and values

void attend_tile(AttentionTile& tile, int64_t rows, int64_t n, int64_t key_width, int64_t value_width, float scale) {
    int64_t row = 0;
    for (; row + kRowsTogether <= rows; row += kRowsTogether) score_rows<kRowsTogether>(tile, row, key_width, scale);
    for (; row < rows; ++row) score_rows<1>(tile, row, key_width, scale);
    float rescale[kQueryRows];
    for (row = 0; row < rows; ++row)
        if (!weigh_row(tile, row, rescale + row)) {
            rescale[row] = 1.0f;
            std::memset(tile.scores[row], 0, sizeof tile.scores[row]);
        }
    for (row = 0; row + kRowsTogether <= rows; row += kRowsTogether)
        add_values<kRowsTogether>(tile, row, value_width, n, rescale + row);
    for (; row < rows; ++row) add_values<1>(tile, row, value_width, n, rescale + row);
}

}  // namespace
}  // namespace lobcq
