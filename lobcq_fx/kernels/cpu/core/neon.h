// NEON with byte dot products (optional in Armv8.2, common since 2018). To be included after the standard headers: what
// follows it in a file is compiled for that target. Clang wants the attribute popped at the end of the file.
#pragma once

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include <arm_neon.h>

namespace lobcq::neon {

void encode(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
            uint8_t* selectors);
void entries(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int64_t groups, int8_t* out);
void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums);
void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile);
void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums);

constexpr int64_t kFusedRows = 4;  // their 16 accumulators, and what decoding needs, stay in the 32 registers
constexpr int64_t kFusedLimit = kFusedRows;  // decoding is most of the work: not twice. Not measured

// What a code of each lane has to be combined with (bitwise or) for look_up: lanes 8 to 15 read the second codebook.
inline uint8x16_t second_codebook() { return vcombine_u8(vdup_n_u8(0), vdup_n_u8(kCodebookSize)); }

// Biased entries of two blocks, 8 lanes each, every block in a codebook of its own: two loads and one tbl, whatever the
// number of codebooks.
inline uint8x16_t look_up(const uint8_t* first, const uint8_t* second, uint8x16_t index) {
    const uint8x16x2_t codebooks = {{vld1q_u8(first), vld1q_u8(second)}};
    return vqtbl2q_u8(codebooks, index);
}

}  // namespace lobcq::neon

// The products of CPUs that can multiply 8-bit matrices, too: neon_i8mm.h.
namespace lobcq::neon_i8mm {

void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums);
void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile);
void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums);

}  // namespace lobcq::neon_i8mm
