// Plain C++ for any CPU: the fallback, and the plainest statement of what the other instruction sets do.
#include "feedback.h"
#include "isa.h"
#include "loops.h"
#include "rotate.h"

#include "attention_portable.h"
#include "attention_loops.h"

namespace lobcq {
namespace {

int bucket_of(int q) {
    const int bucket = ((q - 1) >> 3) - kFirstBucket;
    return bucket < 0 ? 0 : bucket < kBuckets ? bucket : kBuckets - 1;
}

int to_grid(float x, float divisor) {
    const float steps = x / divisor * static_cast<float>(kGrid);
    const float bound = static_cast<float>(kGridMax);
    return static_cast<int>(std::rint(steps > bound ? bound : steps < -bound ? -bound : steps));
}

// Steps 4 and 5 for one block: the selector; writes the codes.
uint8_t encode_block(const Tables& t, const int* q, uint8_t* codes) {
    int best = 0;
    int32_t least = INT32_MAX;
    for (int k = 0; k < t.num_codebooks; ++k) {
        int32_t error = 0;
        for (int i = 0; i < kBlock; ++i) {
            const int e = q[i] - static_cast<int>(t.nearest_steps[bucket_of(q[i])][k]);
            error += e * e;
        }
        if (error < least) least = error, best = k;
    }
    for (int i = 0; i < kBlock; ++i) codes[i] = t.nearest[best][bucket_of(q[i])];
    return static_cast<uint8_t>(best);
}

void encode(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
            uint8_t* selectors) {
    for (int64_t b = 0; b < groups * kGroupBlocks; ++b, x += kBlock, codes += kBlock) {
        int q[kBlock];
        for (int i = 0; i < kBlock; ++i) q[i] = to_grid(x[i], divisors[b / 2]);
        selectors[b] = encode_block(t, q, codes);
    }
}

void entries(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int64_t groups, int8_t* out) {
    for (int64_t i = 0; i < groups * kGroup; ++i)
        out[i] = static_cast<int8_t>(t.biased[selectors[i / kBlock] << 4 | codes[i]] - kBias);
}

// One half of a block pair: 8 rows of 16 columns into the tile, whose order is [columns/4][16 rows][4].
void decode_half(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int bits, int half, int pair,
                 uint8_t* to) {
    const uint64_t mask = (1u << bits) - 1;
    for (int place = 0; place < 8; ++place, codes += kBlock) {
        const uint64_t group = load_bytes(selectors + selector_group(half, place) * 2 * bits, 2 * bits);
        for (int j = 0; j < kPairColumns; ++j) {
            const int block = 2 * pair + j / kBlock;
            const uint64_t selector = (group >> (bits * (2 * block + selector_second(place)))) & mask;
            const int code = j < kBlock ? codes[j] & 15 : codes[j - kBlock] >> 4;
            to[j / 4 * kPanel * 4 + row_at(half, place) * 4 + j % 4] = t.biased[selector << 4 | static_cast<uint64_t>(code)];
        }
    }
}

void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile) {
    for (int64_t c = 0; c < chunks; ++c)
        for (int i = 0; i < 8; ++i)
            decode_half(t, w.codes_at(panel, chunk + c) + i * kChunk, w.selectors_at(panel, chunk + c), w.bits, i % 2,
                        i / 2, tile->entries[slot] + c * kChunk * kPanel + i / 2 * kPairColumns * kPanel);
    const uint8_t* scales = w.scales_at(panel, chunk * kChunk / w.array_size);
    for (int64_t g = 0; g < chunks * kChunk / w.array_size; ++g)
        for (int n = 0; n < kPanel; ++n) tile->scales[g][slot * kPanel + n] = e4m3_value(scales[g * kPanel + n]);
}

void multiply_row(const WeightTile& tile, const int8_t* a, const float* a_scales, int64_t arrays, int array_size,
                  float* sums) {
    for (int64_t g = 0; g < arrays; ++g)
        for (int slot = 0; slot < kTilePanels; ++slot) {
            const uint8_t* w = tile.entries[slot] + g * array_size * kPanel;
            int32_t dot[kPanel] = {};
            for (int k = 0; k < array_size; ++k)
                for (int n = 0; n < kPanel; ++n)
                    dot[n] += (w[k / 4 * kPanel * 4 + n * 4 + k % 4] - kBias) * a[g * array_size + k];
            for (int n = 0; n < kPanel; ++n) {
                const float scale = tile.scales[g][slot * kPanel + n] * a_scales[g];
                sums[slot * kPanel + n] += static_cast<float>(dot[n]) * scale;
            }
        }
}

void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums) {
    const int64_t array = chunk * kChunk / a.array_size, arrays = chunks * kChunk / a.array_size;
    for (int64_t m = 0; m < rows; ++m)
        multiply_row(tile, a.entries_at(first_row + m) + chunk * kChunk, a.scales_at(first_row + m) + array, arrays,
                     a.array_size, sums + m * kTileRows);
}

}  // namespace

const Isa kPortable = {
    .name = "portable",
    .planes = 3,
    .load = load_row,
    .rotate = rotate_arrays<4>,
    .absmax = absmax_rows,
    .array_scales = array_scales<kEntryMax>,
    .encode = encode,
    .entries = entries,
    .errors = grid_errors,
    .values = entry_values,
    .squares = add_squares,
    .compensate = compensate,
    .correct = correct_arrays,
    .correct_wide = correct_arrays,
    .int8_scales = array_scales<kInt8Max>,
    .int8_entries = int8_entries,
    .split = split_arrays<3, 8>,
    .fused_rows = 0,
    .fused_limit = 0,
    .fused = nullptr,
    .decode = decode,
    .multiply = multiply,
    .attend = attend_block<FloatProducts<EncodedStates>>,
    .attend_int8 = attend_block<Int8Products>,
    .attend_floats = attend_block<FloatProducts<PlainStates>>,
    .finish = finish_row,
};

}  // namespace lobcq
