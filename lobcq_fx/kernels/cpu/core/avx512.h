// AVX-512 with VBMI (byte look-ups in 128-byte tables) and VNNI (dot products of bytes into int32): Ice Lake, Zen 4.
// To be included after the standard headers: what follows it in a file is compiled for that target.
#pragma once

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma")
#endif

#include <immintrin.h>

namespace lobcq::avx512 {

void encode(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
            uint8_t* selectors);
void entries(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int64_t groups, int8_t* out);
void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums);
void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile);
void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums);

constexpr int64_t kFusedRows = 16;
constexpr int64_t kFusedLimit = kFusedRows;  // more go through a tile, which is faster than decoding twice

// All 256 biased entries: byte look-ups by selector << 4 | code.
struct EntryTable {
    __m512i t[4];

    explicit EntryTable(const Tables& tables) {
        for (int i = 0; i < 4; ++i) t[i] = _mm512_load_si512(tables.biased + i * 64);
    }

    // vpermi2b reads 7 bits of each index: a table of 8 codebooks at once. For 16, the 8th bit chooses between two.
    template <bool kSixteen>
    __m512i look_up(__m512i index) const {
        const __m512i low = _mm512_permutex2var_epi8(t[0], index, t[1]);
        if (!kSixteen) return low;
        const __m512i high = _mm512_permutex2var_epi8(t[2], index, t[3]);
        return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(index), high);
    }
};

}  // namespace lobcq::avx512
