// Attention of one block of queries, tile by tile of tokens, with weights relative to the largest score so far. Included
// by each instruction set's file after it has set the target and defined its vectors (attention_vectors.h).
#pragma once

#include "attention_float.h"
#include "attention_int8.h"
#include "loops.h"

namespace lobcq {
namespace {

constexpr int kSumLanes = 16;     // sums of weights, by the token's number modulo this

// What rows have looked at so far.
struct alignas(64) RowSums {
    float most[kMaxQueryRows];
    float weights[kMaxQueryRows][kSumLanes];
    float values[kRowScalars];
};

// What is added to the scores of rows: false where none of them looks at any of the n tokens.
template <int kTokens>
bool load_mask(const QueryBlock& block, int64_t row, int rows, int64_t token, int64_t n, float (*to)[kTokens]) {
    const lobcq_attention& a = block.work.a;
    const int64_t* strides = a.mask_strides;
    Floats most = all(-HUGE_VALF);
    for (int r = 0; r < rows; ++r) {
        if (a.mask_kind == LOBCQ_NO_MASK) {
            for (int64_t j = 0; j < kTokens; ++j) to[r][j] = j < n ? 0.0f : -HUGE_VALF;
            most = all(0.0f);
            continue;
        }
        const int64_t start = block.batch * strides[0] + block.query_head(row + r) * strides[1] +
                              block.query(row + r) * strides[2] + token * strides[3];
        if (a.mask_kind == LOBCQ_ADDED_MASK) {
            const int64_t bytes = scalar_bytes(a.mask_dtype);
            const uint8_t* from = static_cast<const uint8_t*>(a.mask) + start * bytes;
            if (strides[3] == 1) load_row(from, a.mask_dtype, n, to[r]);
            else
                for (int64_t j = 0; j < n; ++j) load_row(from + j * strides[3] * bytes, a.mask_dtype, 1, to[r] + j);
        } else {
            const uint8_t* from = static_cast<const uint8_t*>(a.mask) + start;
            if (strides[3] == 1)
                for (int64_t j = 0; j < n; ++j) to[r][j] = from[j] ? 0.0f : -HUGE_VALF;
            else
                for (int64_t j = 0; j < n; ++j) to[r][j] = from[j * strides[3]] ? 0.0f : -HUGE_VALF;
        }
        for (int64_t j = n; j < kTokens; ++j) to[r][j] = -HUGE_VALF;
        for (int j = 0; j < kTokens; j += kLanes) {
            const Floats added = load_floats(to[r] + j);
            most = added == -HUGE_VALF ? most : all(0.0f);
        }
    }
    return largest_lane(most) == 0.0f;
}

// The weights of a row's scores, in their place, relative to the largest so far; returns what the sums before are worth
// then. A row that has looked at nothing yet has weights of 0, or NaN where a score is.
template <int kTokens>
float weigh_row(float* scores, const float* added, float* most, float* sums) {
    const float before = *most;
    Floats highest = all(before);
    for (int j = 0; j < kTokens; j += kLanes) {
        const Floats mask = load_floats(added + j);
        const Floats score = mask == -HUGE_VALF ? mask : load_floats(scores + j) + mask;
        store_floats(score, scores + j);
        highest = larger(score, highest);
    }
    *most = largest_lane(highest);
    const float base = *most == -HUGE_VALF ? 0.0f : *most;
    const float kept = before == base ? 1.0f : exp_of(all(before - base))[0];
    Floats weights[kTokens / kLanes];
    for (int i = 0; i < kTokens / kLanes; ++i) {
        weights[i] = exp_of(load_floats(scores + i * kLanes) - base);
        store_floats(weights[i], scores + i * kLanes);
    }
    for (int i = 0; i < kSumLanes; i += kLanes) {
        Floats sum = weights[i / kLanes];
        for (int j = i + kSumLanes; j < kTokens; j += kSumLanes) sum += weights[j / kLanes];
        store_floats(load_floats(sums + i) * kept + sum, sums + i);
    }
    return kept;
}

// One tile of tokens, and the rows that look at it; decoded for the first of them.
template <class Products>
struct Tile {
    int64_t token, tokens;
    bool loaded = false;

    template <int kRows>
    void attend(const QueryBlock& block, int64_t row, Products& products, RowSums& sums) {
        alignas(64) float added[kRows][Products::kTokens], scores[kRows][Products::kTokens];
        if (!load_mask(block, row, kRows, token, tokens, added)) return;
        if (!loaded) products.load(token, tokens);
        loaded = true;
        products.template score<kRows>(row, scores);
        float kept[kRows];
        for (int r = 0; r < kRows; ++r)
            kept[r] = weigh_row<Products::kTokens>(scores[r], added[r], sums.most + row + r, sums.weights[row + r]);
        products.template add<kRows>(scores, kept, sums.values + row * products.value_width());
    }
};

// The sums of a row, divided by that of its weights.
void finish_attention(const QueryBlock& block, int64_t row, const float* weights, const float* values) {
    float sums[kSumLanes];
    std::memcpy(sums, weights, sizeof sums);
    for (int half = kSumLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    const float sum = sums[0] == 0.0f ? 1.0f : sums[0];
    const lobcq_attention& a = block.work.a;
    void* to = block.result(row);
    auto* half = static_cast<uint16_t*>(to);
    if (a.dtype == LOBCQ_FP32)
        for (int64_t d = 0; d < a.values.width; ++d) static_cast<float*>(to)[d] = values[d] / sum;
    else if (a.dtype == LOBCQ_BF16)
        for (int64_t d = 0; d < a.values.width; ++d) half[d] = float_to_bf16(values[d] / sum);
    else
        for (int64_t d = 0; d < a.values.width; ++d) half[d] = float_to_fp16(values[d] / sum);
}

template <class Products>
void attend_block(const QueryBlock& block) {
    Products products(block);
    RowSums sums;
    for (int64_t row = 0; row < block.rows; ++row) sums.most[row] = -HUGE_VALF;
    std::memset(sums.weights, 0, static_cast<size_t>(block.rows) * sizeof sums.weights[0]);
    std::memset(sums.values, 0, static_cast<size_t>(block.rows * products.value_width()) * sizeof(float));
    for (int64_t token = 0; token < block.work.a.tokens; token += Products::kTokens) {
        const int64_t behind = block.work.a.tokens - token;
        Tile<Products> tile{token, behind < Products::kTokens ? behind : Products::kTokens};
        int64_t row = 0;
        for (; row + 4 <= block.rows; row += 4) tile.template attend<4>(block, row, products, sums);
        switch (block.rows - row) {
            case 3: tile.template attend<3>(block, row, products, sums); break;
            case 2: tile.template attend<2>(block, row, products, sums); break;
            case 1: tile.template attend<1>(block, row, products, sums); break;
        }
    }
    for (int64_t row = 0; row < block.rows; ++row)
        finish_attention(block, row, sums.weights[row], sums.values + row * products.value_width());
}

}  // namespace
}  // namespace lobcq
