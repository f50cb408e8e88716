// AVX2 and what CPUs with it have besides. To be included after the standard headers: what follows it in a file is
// compiled for that target.
#pragma once

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi2,fma,f16c")
#endif

#include <immintrin.h>

namespace lobcq::avx2 {

void encode(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
            uint8_t* selectors);
void entries(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int64_t groups, int8_t* out);
void correct(const int8_t* entries, int64_t arrays, int array_size, int32_t* corrections);
void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums);
void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile);
void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums);

constexpr int64_t kFusedRows = 8;
constexpr int64_t kFusedLimit = 8;

}  // namespace lobcq::avx2
