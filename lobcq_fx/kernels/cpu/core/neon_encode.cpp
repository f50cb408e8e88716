// Encoding with NEON: a scalar's nearest entries in four codebooks at a time, in fp32. One row of Tables::nearest_steps
// holds them.
//
// Of a block's sum of (q - r)^2, r being the nearest entry in grid steps, all codebooks share the q^2. What is left,
//     sum of r^2 + sum of r (-2 q),
// takes two multiply-adds a scalar. |q| <= 600 and |r| <= 496 keep both sums below 2^23: integers, exact in fp32.
#if defined(__aarch64__)
#include <cstring>

#include "neon.h"

namespace lobcq::neon {
namespace {

constexpr int kLanes = 4;  // floats in a register

struct Block {
    alignas(16) float minus_2q[kBlock];   // grid values times -2
    alignas(16) int32_t bucket[kBlock];   // the rows of the tables they select
};

// No clamp at kGridMax: |x / divisor| <= kNarrow is promised.
void to_grid(const float* x, float divisor, Block* block) {
    for (int i = 0; i < kBlock; i += kLanes) {
        const float32x4_t y = vdivq_f32(vld1q_f32(x + i), vdupq_n_f32(divisor));
        const int32x4_t q = vcvtnq_s32_f32(vmulq_n_f32(y, kGrid));
        const int32x4_t bucket = vshrq_n_s32(vaddq_s32(q, vdupq_n_s32(-8 * kFirstBucket - 1)), 3);
        vst1q_f32(block->minus_2q + i, vmulq_n_f32(vcvtq_f32_s32(q), -2.0f));
        vst1q_s32(block->bucket + i, vmaxq_s32(vminq_s32(bucket, vdupq_n_s32(kBuckets - 1)), vdupq_n_s32(0)));
    }
}

// Errors of 4 codebooks from `first` on.
float32x4_t errors(const Tables& t, const Block& block, int first) {
    float32x4_t squares = vdupq_n_f32(0.0f), products = vdupq_n_f32(0.0f);
    for (int i = 0; i < kBlock; ++i) {
        const float32x4_t row = vld1q_f32(t.nearest_steps[block.bucket[i]] + first);
        squares = vfmaq_f32(squares, row, row);
        products = vfmaq_n_f32(products, row, block.minus_2q[i]);
    }
    return vaddq_f32(squares, products);
}

// The lowest index of the least error among 4 kVectors codebooks; those that do not exist are far away.
template <int kVectors>
uint8_t select(const Tables& t, const Block& block) {
    float32x4_t error[kVectors];
    for (int v = 0; v < kVectors; ++v) error[v] = errors(t, block, v * kLanes);
    float32x4_t least = error[0];
    for (int v = 1; v < kVectors; ++v) least = vminq_f32(least, error[v]);
    least = vdupq_n_f32(vminvq_f32(least));
    const uint32x4_t lanes = {0, 1, 2, 3};
    uint32x4_t index = vdupq_n_u32(UINT32_MAX);
    for (int v = kVectors - 1; v >= 0; --v) {
        const uint32x4_t number = vaddq_u32(lanes, vdupq_n_u32(static_cast<uint32_t>(v * kLanes)));
        index = vbslq_u32(vceqq_f32(error[v], least), number, index);
    }
    return static_cast<uint8_t>(vminvq_u32(index));
}

uint8_t select_first(const Tables&, const Block&) { return 0; }

}  // namespace

void encode(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
            uint8_t* selectors) {
    const auto choose = t.num_codebooks == 1   ? select_first
                        : t.num_codebooks <= 4 ? select<1>
                        : t.num_codebooks <= 8 ? select<2>
                                               : select<4>;
    for (int64_t group = 0; group < groups; ++group) {
        Block blocks[kGroupBlocks];  // all first: loading them one number at a time waits for the vector stores
        for (int b = 0; b < kGroupBlocks; ++b) to_grid(x + b * kBlock, divisors[b / 2], &blocks[b]);
        for (int b = 0; b < kGroupBlocks; ++b) {
            selectors[b] = choose(t, blocks[b]);
            const uint8_t* nearest = t.nearest[selectors[b]];
            for (int i = 0; i < kBlock; ++i) codes[b * kBlock + i] = nearest[blocks[b].bucket[i]];
        }
        x += kGroup;
        divisors += kGroupBlocks / 2;
        codes += kGroup;
        selectors += kGroupBlocks;
    }
}

void entries(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int64_t groups, int8_t* out) {
    const int8x16_t bias = vdupq_n_s8(kBias);
    for (int64_t b = 0; b < groups * kGroupBlocks; b += 2) {
        const uint8x16_t index = vorrq_u8(vld1q_u8(codes + b * kBlock), second_codebook());
        const uint8x16_t biased = look_up(t.biased + selectors[b] * kCodebookSize,
                                          t.biased + selectors[b + 1] * kCodebookSize, index);
        vst1q_s8(out + b * kBlock, vsubq_s8(vreinterpretq_s8_u8(biased), bias));
    }
}

}  // namespace lobcq::neon

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
