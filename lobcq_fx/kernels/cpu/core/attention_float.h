// Attention's products in fp32. Included as loops.h is.
#pragma once

#include "attention_states.h"
#include "attention_vectors.h"
#include "loops.h"

namespace lobcq {
namespace {

constexpr int kFloatTokens = 32;  // of a tile

// Keys of a tile, transposed, [width][tokens], what is behind the last token zero; and where its values are.
struct FloatTile {
    alignas(64) float keys[kMaxWidth][kFloatTokens];
    const float* values;  // of each token `value_stride` after the one before it
    int64_t value_stride;
};

// Encoded keys and values of a block's head, decoded.
class EncodedStates {
  public:
    explicit EncodedStates(const QueryBlock& block)
        : block_(block), keys_(block.work.states(block.work.a.keys, block.batch)),
          values_(block.work.states(block.work.a.values, block.batch)) {}

    int64_t value_width() const { return values_.padded; }

    void load(int64_t token, int64_t n, FloatTile* tile) {
        load_keys(token, n, tile);
        decoded_.load(block_.work.tables, values_, block_.head, token, n);
        for (int64_t j = 0; j < n; ++j)
            for (int64_t g = 0; g < values_.arrays(); ++g) {
                const uint8_t* from = decoded_.entries + j * values_.padded + g * values_.array_size;
                float* to = decoded_values_ + j * values_.padded + g * values_.array_size;
                const float scale = decoded_.scales[g][j], tensor_scale = decoded_.tensor_scales[j];
                for (int i = 0; i < values_.array_size; ++i)
                    to[i] = static_cast<float>(from[i] - kBias) * scale * tensor_scale;
            }
        tile->values = decoded_values_;
        tile->value_stride = values_.padded;
    }

  private:
    // By quads of columns, of which each lane holds those of one token.
    void load_keys(int64_t token, int64_t n, FloatTile* tile) {
        decoded_.load(block_.work.tables, keys_, block_.head, token, n);
        quads_of(decoded_.entries, keys_.padded, kFloatTokens, quads_);
        for (int64_t quad = 0; quad < keys_.padded / 4; ++quad)
            for (int j = 0; j < kFloatTokens; j += kLanes) {
                const Ints four = load_vector<Ints>(quads_ + (quad * kFloatTokens + j) * 4);
                const Floats scales = load_floats(decoded_.scales[quad * 4 / keys_.array_size] + j);
                const Floats tensor_scales = load_floats(decoded_.tensor_scales + j);
                for (int k = 0; k < 4; ++k) {
                    const Ints entries = (four >> (8 * k) & 255) - kBias;
                    const Floats scaled = __builtin_convertvector(entries, Floats) * scales;
                    store_floats(scaled * tensor_scales, tile->keys[quad * 4 + k] + j);
                }
            }
    }

    const QueryBlock& block_;
    StateRows keys_, values_;
    alignas(64) float decoded_values_[kFloatTokens * kMaxWidth];
    alignas(64) uint8_t quads_[kFloatTokens * kMaxWidth];
    DecodedStates<kFloatTokens> decoded_;
};

// Keys and values that are floats.
class PlainStates {
  public:
    explicit PlainStates(const QueryBlock& block)
        : keys_(block.work.float_states(block.work.a.keys, block.batch, block.head)),
          values_(block.work.float_states(block.work.a.values, block.batch, block.head)) {}

    int64_t value_width() const { return values_.padded; }

    void load(int64_t token, int64_t n, FloatTile* tile) {
        int64_t stride = 0;
        const float* keys = rows(keys_, token, n, n < kFloatTokens, &stride);
        for (int64_t d = 0; d < keys_.padded; d += kLanes)
            for (int j = 0; j < kFloatTokens; j += kLanes)
                transpose_floats(keys + j * stride + d, stride, tile->keys[d] + j, kFloatTokens);
        tile->values = rows(values_, token, n, false, &tile->value_stride);
    }

  private:
    // n tokens as fp32: where they lie, if vectors can be read there, else copied. What a copy is padded with is zero.
    const float* rows(const FloatStates& s, int64_t token, int64_t n, bool copied, int64_t* stride) {
        const bool readable = s.dtype == LOBCQ_FP32 && s.width == s.padded;
        if (readable && !copied) {
            *stride = s.stride;
            return reinterpret_cast<const float*>(s.token(token));
        }
        *stride = s.padded;
        std::memset(copies_, 0, sizeof(float) * static_cast<size_t>(kFloatTokens * s.padded));
        for (int64_t j = 0; j < n; ++j) load_row(s.token(token + j), s.dtype, s.width, copies_ + j * s.padded);
        return copies_;
    }

    FloatStates keys_, values_;
    alignas(64) float copies_[kFloatTokens * kMaxWidth];  // of keys, which are transposed at once; then of values
};

template <class States>
class FloatProducts {
  public:
    static constexpr int kTokens = kFloatTokens;

    explicit FloatProducts(const QueryBlock& block)
        : states_(block), scale_(block.work.a.scale), width_(block.work.a.keys.width) {
        for (int64_t row = 0; row < block.rows; ++row) block.load_query(row, queries_ + row * width_);
    }

    int64_t value_width() const { return states_.value_width(); }

    // n tokens.
    void load(int64_t token, int64_t n) {
        states_.load(token, n, &tile_);
        tokens_ = n;
    }

    // scores[r][j] = scale * (query r . key j), of kRows rows from `row` on.
    template <int kRows>
    void score(int64_t row, float (*scores)[kTokens]) const {
        const float* queries[kRows];
        for (int r = 0; r < kRows; ++r) queries[r] = queries_ + (row + r) * width_;
        for (int j = 0; j < kTokens; j += kVectors * kLanes) {
            Floats sums[kRows][kVectors] = {};
            for (int64_t d = 0; d < width_; ++d)
                for (int i = 0; i < kVectors; ++i) {
                    const Floats keys = load_floats(tile_.keys[d] + j + i * kLanes);
                    for (int r = 0; r < kRows; ++r) sums[r][i] = multiply_add(all(queries[r][d]), keys, sums[r][i]);
                }
            for (int r = 0; r < kRows; ++r)
                for (int i = 0; i < kVectors; ++i) store_floats(sums[r][i] * scale_, scores[r] + j + i * kLanes);
        }
    }

    // sums[r] = sums[r] * rescale[r] + weights of row r times the values.
    template <int kRows>
    void add(const float (*weights)[kTokens], const float* rescale, float* sums) {
        const int64_t width = value_width();
        int64_t d = 0;
        for (; d + kVectors * kLanes <= width; d += kVectors * kLanes)
            add_columns<kRows, kVectors>(weights, rescale, sums, d);
        for (; d < width; d += kLanes) add_columns<kRows, 1>(weights, rescale, sums, d);
    }

  private:
    static constexpr int kVectors = kTokens / kLanes < kTileVectors ? kTokens / kLanes : kTileVectors;

    template <int kRows, int kColumns>
    void add_columns(const float (*weights)[kTokens], const float* rescale, float* sums, int64_t d) const {
        const int64_t width = value_width();
        Floats sum[kRows][kColumns];
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kColumns; ++i) sum[r][i] = load_floats(sums + r * width + d + i * kLanes) * rescale[r];
        for (int64_t j = 0; j < tokens_; ++j)
            for (int i = 0; i < kColumns; ++i) {
                const Floats values = load_floats(tile_.values + j * tile_.value_stride + d + i * kLanes);
                for (int r = 0; r < kRows; ++r) sum[r][i] = multiply_add(all(weights[r][j]), values, sum[r][i]);
            }
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kColumns; ++i) store_floats(sum[r][i], sums + r * width + d + i * kLanes);
    }

    States states_;
    float scale_;
    int64_t width_, tokens_ = 0;
    FloatTile tile_;
    alignas(64) float queries_[kRowScalars];
};

}  // namespace
}  // namespace lobcq
