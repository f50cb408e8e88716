// Attention's products in fp32, of decoded keys and values. Included as loops.h is.
#pragma once

#include "attention_states.h"
#include "attention_vectors.h"

namespace lobcq {
namespace {

class FloatProducts {
  public:
    static constexpr int kTokens = 32;

    explicit FloatProducts(const QueryBlock& block)
        : block_(block), key_rows_(block.work.states(block.work.a.keys, block.batch)),
          value_rows_(block.work.states(block.work.a.values, block.batch)) {
        for (int64_t row = 0; row < block.rows; ++row) block.load_query(row, queries_ + row * key_rows_.width);
    }

    int64_t value_width() const { return value_rows_.padded; }

    // Decodes n tokens.
    void load(int64_t token, int64_t n) {
        load_keys(token, n);
        decoded_.load(block_.work.tables, value_rows_, block_.head, token, n);
        tokens_ = n;
        for (int64_t j = 0; j < n; ++j)
            for (int64_t g = 0; g < value_rows_.arrays(); ++g) {
                const uint8_t* from = decoded_.entries + j * value_rows_.padded + g * value_rows_.array_size;
                float* to = values_ + j * value_rows_.padded + g * value_rows_.array_size;
                const float scale = decoded_.scales[g][j], tensor_scale = decoded_.tensor_scales[j];
                for (int i = 0; i < value_rows_.array_size; ++i)
                    to[i] = static_cast<float>(from[i] - kBias) * scale * tensor_scale;
            }
    }

    // scores[r][j] = scale * (query r . key j), of kRows rows from `row` on.
    template <int kRows>
    void score(int64_t row, float (*scores)[kTokens]) const {
        const float scale = block_.work.a.scale;
        const float* queries[kRows];
        for (int r = 0; r < kRows; ++r) queries[r] = queries_ + (row + r) * key_rows_.width;
        for (int j = 0; j < kTokens; j += kVectors * kLanes) {
            Floats sums[kRows][kVectors] = {};
            for (int64_t d = 0; d < key_rows_.width; ++d)
                for (int i = 0; i < kVectors; ++i) {
                    const Floats keys = load_floats(keys_[d] + j + i * kLanes);
                    for (int r = 0; r < kRows; ++r) sums[r][i] = multiply_add(all(queries[r][d]), keys, sums[r][i]);
                }
            for (int r = 0; r < kRows; ++r)
                for (int i = 0; i < kVectors; ++i) store_floats(sums[r][i] * scale, scores[r] + j + i * kLanes);
        }
    }

    // sums[r] = sums[r] * rescale[r] + weights of row r times the values.
    template <int kRows>
    void add(const float (*weights)[kTokens], const float* rescale, float* sums) {
        const int64_t width = value_rows_.padded;
        int64_t d = 0;
        for (; d + kVectors * kLanes <= width; d += kVectors * kLanes)
            add_columns<kRows, kVectors>(weights, rescale, sums, d);
        for (; d < width; d += kLanes) add_columns<kRows, 1>(weights, rescale, sums, d);
    }

  private:
    // By quads of columns, of which each lane holds those of one token.
    void load_keys(int64_t token, int64_t n) {
        decoded_.load(block_.work.tables, key_rows_, block_.head, token, n);
        quads_of(decoded_.entries, key_rows_.padded, kTokens, quads_);
        for (int64_t quad = 0; quad < key_rows_.padded / 4; ++quad)
            for (int j = 0; j < kTokens; j += kLanes) {
                const Ints four = load_vector<Ints>(quads_ + (quad * kTokens + j) * 4);
                const Floats scales = load_floats(decoded_.scales[quad * 4 / key_rows_.array_size] + j);
                const Floats tensor_scales = load_floats(decoded_.tensor_scales + j);
                for (int k = 0; k < 4; ++k) {
                    const Ints entries = (four >> (8 * k) & 255) - kBias;
                    const Floats scaled = __builtin_convertvector(entries, Floats) * scales;
                    store_floats(scaled * tensor_scales, keys_[quad * 4 + k] + j);
                }
            }
    }

    static constexpr int kVectors = kTokens / kLanes < kTileVectors ? kTokens / kLanes : kTileVectors;

    template <int kRows, int kColumns>
    void add_columns(const float (*weights)[kTokens], const float* rescale, float* sums, int64_t d) const {
        const int64_t width = value_rows_.padded;
        Floats sum[kRows][kColumns];
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kColumns; ++i) sum[r][i] = load_floats(sums + r * width + d + i * kLanes) * rescale[r];
        for (int64_t j = 0; j < tokens_; ++j)
            for (int i = 0; i < kColumns; ++i) {
                const Floats values = load_floats(values_ + j * width + d + i * kLanes);
                for (int r = 0; r < kRows; ++r) sum[r][i] = multiply_add(all(weights[r][j]), values, sum[r][i]);
            }
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kColumns; ++i) store_floats(sum[r][i], sums + r * width + d + i * kLanes);
    }

    const QueryBlock& block_;
    StateRows key_rows_, value_rows_;
    int64_t tokens_ = 0;
    alignas(64) float queries_[kRowScalars];
    alignas(64) float keys_[kMaxWidth][kTokens];  // transposed; what is behind the last token is zero
    alignas(64) float values_[kTokens * kMaxWidth];
    alignas(64) uint8_t quads_[kTokens * kMaxWidth];
    DecodedStates<kTokens> decoded_;
};

}  // namespace
}  // namespace lobcq
