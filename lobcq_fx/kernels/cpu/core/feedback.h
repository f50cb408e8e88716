// Rounding with feedback (lobcq_compensate). Plain loops, as in loops.h and after it: every instruction set's file gets
// a copy of its own. No operation is fused and each sum has one order, so that all copies give the same bits.
#pragma once

#include "loops.h"

namespace lobcq {
namespace {

constexpr int kPanelColumns = 16;   // of couplings that lie together
constexpr int kChunkColumns = 128;  // columns whose feedback from all columns before them is computed at once
constexpr int kTogether = 4;        // rows that share what is loaded for that

int bucket_of_steps(float steps) {
    const float bound = static_cast<float>(kGridMax);
    const float clamped = steps > bound ? bound : steps < -bound ? -bound : steps;
    // 1.5 * 2^23 added: the nearest integer is left in the lowest bits.
    const auto q = static_cast<int32_t>(as_bits(clamped + 0x1.8p23f) - as_bits(0x1.8p23f) - 1u);
    const int bucket = (q >> 3) - kFirstBucket;
    return bucket < 0 ? 0 : bucket < kBuckets ? bucket : kBuckets - 1;
}

typedef float Eight __attribute__((vector_size(32)));  // loops over 8 floats are not always made into vectors

// sums[r][j]: errors of row r times the first n rows of a panel of couplings [n][kPanelColumns].
template <int kRows>
void accumulate(const float* errors, int64_t stride, const float* panel, int64_t n, float* sums) {
    Eight low[kRows] = {}, high[kRows] = {};
    for (int64_t i = 0; i < n; ++i, panel += kPanelColumns) {
        Eight left, right;
        std::memcpy(&left, panel, sizeof left);
        std::memcpy(&right, panel + 8, sizeof right);
        for (int r = 0; r < kRows; ++r) {
            low[r] += errors[r * stride + i] * left;
            high[r] += errors[r * stride + i] * right;
        }
    }
    for (int r = 0; r < kRows; ++r) {
        std::memcpy(sums + r * kPanelColumns, &low[r], sizeof low[r]);
        std::memcpy(sums + r * kPanelColumns + 8, &high[r], sizeof high[r]);
    }
}

struct ArrayScale {
    float scale, tensor_scale, divisor;

    ArrayScale(uint8_t byte, float tensor) : scale(e4m3_value(byte)), tensor_scale(tensor) {
        const float d = scale * tensor;
        divisor = d > 0.0f ? d : HUGE_VALF;  // all is 0 then
    }
    int bucket(float x) const { return bucket_of_steps(x / divisor * static_cast<float>(kGrid)); }
    // Of an entry in grid steps, as it decodes: the first product is exact.
    float value(float steps) const { return steps * (scale * (1.0f / kGrid)) * tensor_scale; }
};

// kCodebooks: at least as many as there are. The others' entries are so far away that they never win.
template <int kCodebooks>
class FeedbackRounding {
  public:
    FeedbackRounding(const Tables& tables, const lobcq_feedback& f) : t_(tables), f_(f) {}

    // Rounds columns [begin, begin + n) of a row, whose targets hold the feedback of all columns before `begin`.
    void round(int64_t row, int64_t begin, int64_t n, float* targets) {
        double cost = 0.0;
        for (int64_t first = 0; first < n; first += kBlock) {
            const int64_t column = begin + first;
            if (column % f_.array_size == 0) scale_ = cheapest_scale(row, column, targets + first);
            float errors[kBlock];
            cost += round_block(row, column, targets + first, errors);
            for (int64_t j = first + kBlock; j < n; j += kBlock) feed(errors, column, begin + j, targets + j);
            std::memcpy(f_.errors + row * f_.columns + column, errors, sizeof errors);
        }
        f_.costs[2 * row] += cost;
    }

  private:
    // Couplings of column i with columns j to the end of j's block.
    const float* couplings(int64_t i, int64_t j) const {
        return f_.coupling + (j / kPanelColumns * f_.columns + i) * kPanelColumns + j % kPanelColumns;
    }

    // Errors of the block at `column` into the targets of the block at j.
    void feed(const float* errors, int64_t column, int64_t j, float* targets) const {
        for (int i = 0; i < kBlock; ++i) {
            const float* factors = couplings(column + i, j);
            for (int l = 0; l < kBlock; ++l) targets[l] += errors[i] * factors[l];
        }
    }

    ArrayScale cheapest_scale(int64_t row, int64_t column, const float* targets) {
        uint32_t absmax;
        uint8_t first;
        float divisor;
        absmax_rows(targets, 1, f_.array_size, &absmax);
        array_scales<kEntryMax>(&absmax, 1, f_.tensor_scale, &first, &divisor);
        uint8_t best = first;
        float least = price_of(ArrayScale(first, f_.tensor_scale), column, targets);
        for (const int step : kScaleSteps) {
            const uint8_t tried = neighbour(first, step);
            const float price = price_of(ArrayScale(tried, f_.tensor_scale), column, targets);
            if (price < least) least = price, best = tried;
        }
        f_.scales[(row * f_.columns + column) / f_.array_size] = best;
        return ArrayScale(best, f_.tensor_scale);
    }

    // What the array costs if every column is rounded by itself.
    float price_of(const ArrayScale& scale, int64_t column, const float* targets) const {
        float total = 0.0f;
        for (int first = 0; first < f_.array_size; first += kBlock) {
            int buckets[kBlock];
            float prices[kCodebooks] = {};
            for (int i = 0; i < kBlock; ++i) buckets[i] = scale.bucket(targets[first + i]);
            for (int i = 0; i < kBlock; ++i)
                for (int k = 0; k < kCodebooks; ++k) {
                    const float d = targets[first + i] - scale.value(t_.nearest_steps[buckets[i]][k]);
                    prices[k] += d * d * f_.power[column + first + i];
                }
            float least = prices[0];
            for (int k = 1; k < kCodebooks; ++k) least = prices[k] < least ? prices[k] : least;
            total += least;
        }
        return total;
    }

    // With every codebook; writes what the cheapest gives, and returns its cost.
    double round_block(int64_t row, int64_t column, const float* targets, float* errors) {
        const float* weight = f_.weight + row * f_.columns + column;
        float tried[kBlock][kCodebooks], off[kBlock][kCodebooks], cost[kCodebooks] = {};
        int buckets[kBlock][kCodebooks];
        for (int i = 0; i < kBlock; ++i)
            for (int k = 0; k < kCodebooks; ++k) tried[i][k] = targets[i];
        for (int i = 0; i < kBlock; ++i) {
            for (int k = 0; k < kCodebooks; ++k) buckets[i][k] = scale_.bucket(tried[i][k]);
            for (int k = 0; k < kCodebooks; ++k) {
                const float value = scale_.value(t_.nearest_steps[buckets[i][k]][k]), d = tried[i][k] - value;
                cost[k] += d * d * f_.power[column + i];
                off[i][k] = weight[i] - value;
            }
            const float* factors = couplings(column + i, column);
            for (int j = i + 1; j < kBlock; ++j)
                for (int k = 0; k < kCodebooks; ++k) tried[j][k] += off[i][k] * factors[j];
        }
        int best = 0;
        for (int k = 1; k < kCodebooks; ++k) best = cost[k] < cost[best] ? k : best;
        f_.selectors[(row * f_.columns + column) / kBlock] = static_cast<uint8_t>(best);
        for (int i = 0; i < kBlock; ++i) {
            f_.codes[row * f_.columns + column + i] = t_.nearest[best][buckets[i][best]];
            errors[i] = off[i][best];
        }
        return static_cast<double>(cost[best]);
    }

    const Tables& t_;
    const lobcq_feedback& f_;
    ArrayScale scale_{0, 1.0f};  // of the array in work
};

// Rows [row, row + kRows), columns [begin, begin + n): the targets by what came before, then the rounding; and the cost
// of the other errors.
template <int kCodebooks, int kRows>
void compensate_chunk(const Tables& t, const lobcq_feedback& f, int64_t row, int64_t begin, int64_t n) {
    float targets[kRows][kChunkColumns], sums[kRows][kPanelColumns];
    for (int64_t j = 0; j < n; j += kPanelColumns) {
        const float* panel = f.coupling + (begin + j) * f.columns;
        const int64_t at = row * f.columns + begin + j;
        accumulate<kRows>(f.errors + row * f.columns, f.columns, panel, begin, sums[0]);
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kPanelColumns; ++i) targets[r][j + i] = f.weight[at + r * f.columns + i] + sums[r][i];
        accumulate<kRows>(f.other_errors + row * f.columns, f.columns, panel, begin + j + kPanelColumns, sums[0]);
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kPanelColumns; ++i) {
                const double sum = static_cast<double>(sums[r][i]);
                f.costs[2 * (row + r) + 1] += sum * sum * static_cast<double>(f.power[begin + j + i]);
            }
    }
    FeedbackRounding<kCodebooks> rounding(t, f);
    for (int r = 0; r < kRows; ++r) rounding.round(row + r, begin, n, targets[r]);
}

template <int kCodebooks>
void compensate_rows(const Tables& t, const lobcq_feedback& f, int64_t first, int64_t last) {
    for (int64_t i = 2 * first; i < 2 * last; ++i) f.costs[i] = 0.0;
    for (int64_t begin = 0; begin < f.columns; begin += kChunkColumns) {
        const int64_t left = f.columns - begin, n = left < kChunkColumns ? left : kChunkColumns;
        int64_t row = first;
        for (; row + kTogether <= last; row += kTogether)
            compensate_chunk<kCodebooks, kTogether>(t, f, row, begin, n);
        for (; row < last; ++row) compensate_chunk<kCodebooks, 1>(t, f, row, begin, n);
    }
}

void compensate(const Tables& t, const lobcq_feedback& f, int64_t first, int64_t last) {
    if (t.num_codebooks <= 8) compensate_rows<8>(t, f, first, last);
    else compensate_rows<16>(t, f, first, last);
}

}  // namespace
}  // namespace lobcq
