// Attention's products in integers: docs/format.md, "Attention in integers". Included as loops.h is.
#pragma once

#include "attention_states.h"
#include "attention_vectors.h"
#include "encode.h"

namespace lobcq {
namespace {

constexpr int kWeightMax = 127;
constexpr float kLeastWeight = 0x1p-119f;

class Int8Products {
  public:
    static constexpr int kTokens = 64;

    explicit Int8Products(const QueryBlock& block)
        : block_(block), key_rows_(block.work.states(block.work.a.keys, block.batch)),
          value_rows_(block.work.states(block.work.a.values, block.batch)) {
        for (int64_t row = 0; row < block.rows; ++row) encode_query(row);
    }

    int64_t value_width() const { return value_rows_.padded; }

    // Decodes n tokens.
    void load(int64_t token, int64_t n) {
        load_keys(token, n);
        load_values(token, n);
    }

    // scores[r][j] = scale * (query r . key j), of kRows rows from `row` on.
    template <int kRows>
    void score(int64_t row, float (*scores)[kTokens]) const {
        const int64_t quads = key_rows_.array_size / 4, arrays = key_rows_.arrays();
        for (int j = 0; j < kTokens; j += kVectors * kLanes) {
            Floats sums[kRows][kVectors] = {};
            for (int64_t g = 0; g < arrays; ++g) {
                Ints dots[kRows][kVectors];
                for (int r = 0; r < kRows; ++r)
                    for (int i = 0; i < kVectors; ++i) dots[r][i] = Ints{} + corrections_[(row + r) * arrays + g];
                const uint8_t* keys = keys_ + (g * quads * kTokens + j) * 4;
                const int8_t* queries = queries_ + row * key_rows_.padded + g * key_rows_.array_size;
                for (int64_t quad = 0; quad < quads; ++quad, keys += kTokens * 4, queries += 4)
                    for (int i = 0; i < kVectors; ++i) {
                        const Bytes key = load_vector<Bytes>(keys + i * kLanes * 4);
                        for (int r = 0; r < kRows; ++r)
                            dots[r][i] = dot_bytes(dots[r][i], key, four_bytes(queries + r * key_rows_.padded));
                    }
                for (int r = 0; r < kRows; ++r)
                    for (int i = 0; i < kVectors; ++i) {
                        const Floats scales = load_floats(key_scales_[g] + j + i * kLanes);
                        sums[r][i] += __builtin_convertvector(dots[r][i], Floats) *
                                      (scales * query_scales_[(row + r) * arrays + g]);
                    }
            }
            for (int r = 0; r < kRows; ++r)
                for (int i = 0; i < kVectors; ++i) {
                    const Floats scaled = sums[r][i] * load_floats(key_tensor_scales_ + j + i * kLanes);
                    store_floats(scaled * row_scales_[row + r], scores[r] + j + i * kLanes);
                }
        }
    }

    // sums[r] = sums[r] * rescale[r] + weights of row r times the values.
    template <int kRows>
    void add(const float (*weights)[kTokens], const float* rescale, float* sums) const {
        for (int64_t g = 0; g < value_rows_.arrays(); ++g) {
            alignas(64) uint8_t rounded[kRows][kTokens];
            float steps[kRows];
            for (int r = 0; r < kRows; ++r) steps[r] = round_weights(weights[r], g, rounded[r]);
            const int64_t first = g * value_rows_.array_size;
            int64_t d = first;
            for (; d + kTileVectors * kLanes <= first + value_rows_.array_size; d += kTileVectors * kLanes)
                add_columns<kRows, kTileVectors>(rounded, steps, rescale, sums, d);
            for (; d < first + value_rows_.array_size; d += kLanes)
                add_columns<kRows, 1>(rounded, steps, rescale, sums, d);
        }
    }

  private:
    static constexpr int kVectors = kTokens / kLanes < kTileVectors ? kTokens / kLanes : kTileVectors;

    void encode_query(int64_t row) {
        alignas(64) float x[kMaxWidth];
        uint32_t absmax[kMaxWidth / 16], most = 0;
        uint8_t scales[kMaxWidth / 16];
        float divisors[kMaxWidth / 16];
        const int64_t arrays = key_rows_.arrays();
        const int size = key_rows_.array_size;
        block_.load_query(row, x);
        for (int64_t d = key_rows_.width; d < key_rows_.padded; ++d) x[d] = 0.0f;
        isa().absmax(x, arrays, size, absmax);
        for (int64_t g = 0; g < arrays; ++g) most = absmax[g] > most ? absmax[g] : most;
        const float row_scale = tensor_scale_of(most, kInt8Max);
        isa().int8_scales(absmax, arrays, row_scale, scales, divisors);
        for (int64_t g = 0; g < arrays; ++g)
            if (scales[g] == kScaleNaN) std::memset(x + g * size, 0, static_cast<size_t>(size) * sizeof(float));
        int8_t* entries = queries_ + row * key_rows_.padded;
        isa().int8_entries(x, divisors, arrays, size, entries);
        row_scales_[row] = row_scale * block_.work.a.scale;
        for (int64_t g = 0; g < arrays; ++g) {
            query_scales_[row * arrays + g] = e4m3_value(scales[g]);
            int32_t sum = 0;
            for (int i = 0; i < size; ++i) sum += entries[g * size + i];
            corrections_[row * arrays + g] = -kBias * sum;
        }
    }

    // Biased, four columns of a token side by side, and tokens side by side.
    void load_keys(int64_t token, int64_t n) {
        decoded_.load(block_.work.tables, key_rows_, block_.head, token, n);
        // Where the width is filled up entries may be any, but those of queries are 0.
        quads_of(decoded_.entries, key_rows_.padded, kTokens, keys_);
        std::memcpy(key_scales_, decoded_.scales, static_cast<size_t>(key_rows_.arrays()) * sizeof key_scales_[0]);
        std::memcpy(key_tensor_scales_, decoded_.tensor_scales, sizeof key_tensor_scales_);
    }

    // Four tokens of a column side by side, and columns side by side.
    void load_values(int64_t token, int64_t n) {
        decoded_.load(block_.work.tables, value_rows_, block_.head, token, n);
        columns_of(decoded_.entries, value_rows_.padded, kTokens, values_);
        for (int64_t g = 0; g < value_rows_.arrays(); ++g) {
            spoiled_[g] = false;
            for (int64_t j = 0; j < kTokens; ++j) {
                const float scale = decoded_.scales[g][j] * decoded_.tensor_scales[j];
                const bool finite = std::isfinite(scale);
                spoiled_[g] |= !finite;
                value_scales_[g][j] = finite ? scale : 0.0f;
                not_finite_[g][j] = !finite;
            }
        }
    }

    // The weights of one row with the scales of block array g, in 7 bits; returns what one step of them is worth.
    float round_weights(const float* weights, int64_t g, uint8_t* rounded) const {
        Floats folded[kTokens / kLanes], most{};
        for (int i = 0; i < kTokens / kLanes; ++i) {
            folded[i] = load_floats(weights + i * kLanes) * load_floats(value_scales_[g] + i * kLanes);
            most = larger(folded[i], most);
        }
        const float top = largest_lane(most);
        const bool usable = top >= kLeastWeight;
        const float steps = usable ? kWeightMax / top : 0.0f;
        for (int i = 0; i < kTokens / kLanes; ++i) {
            const Ints nearest = (Ints)(folded[i] * steps + 0x1.8p23f);  // in the lowest bits
            const auto bytes = __builtin_convertvector(nearest, Quarter);
            std::memcpy(rounded + i * kLanes, &bytes, sizeof bytes);
        }
        if (spoiled_[g])
            for (int j = 0; j < kTokens; ++j)
                if (not_finite_[g][j] && weights[j] > 0.0f) return as_float(0x7fc00000);
        return usable ? top / kWeightMax : 0.0f;
    }

    template <int kRows, int kColumns>
    void add_columns(const uint8_t (*rounded)[kTokens], const float* steps, const float* rescale, float* sums,
                     int64_t d) const {
        const int64_t width = value_rows_.padded;
        Ints dots[kRows][kColumns] = {};
        const int8_t* values = values_ + d * 4;
        for (int j = 0; j < kTokens; j += 4, values += width * 4)
            for (int i = 0; i < kColumns; ++i) {
                const Bytes value = load_vector<Bytes>(values + i * kLanes * 4);
                for (int r = 0; r < kRows; ++r) dots[r][i] = dot_bytes(dots[r][i], four_bytes(rounded[r] + j), value);
            }
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kColumns; ++i) {
                float* to = sums + r * width + d + i * kLanes;
                store_floats(load_floats(to) * rescale[r] + __builtin_convertvector(dots[r][i], Floats) * steps[r], to);
            }
    }

    const QueryBlock& block_;
    StateRows key_rows_, value_rows_;
    alignas(64) int8_t queries_[kRowScalars];
    float query_scales_[kRowScalars / 16], row_scales_[kMaxQueryRows];
    int32_t corrections_[kRowScalars / 16];
    alignas(64) uint8_t keys_[kTokens * kMaxWidth];
    alignas(64) int8_t values_[kTokens * kMaxWidth];
    alignas(64) float key_scales_[kMaxWidth / 16][kTokens];
    alignas(64) float key_tensor_scales_[kTokens];
    alignas(64) float value_scales_[kMaxWidth / 16][kTokens];
    bool not_finite_[kMaxWidth / 16][kTokens], spoiled_[kMaxWidth / 16];
    DecodedStates<kTokens> decoded_;
};

}  // namespace
}  // namespace lobcq
