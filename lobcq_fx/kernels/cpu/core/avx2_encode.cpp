// Encoding with AVX2: a scalar's distances to the nearest entries of all codebooks at a time, in fp32. One row of
// Tables::nearest_steps holds those entries. |q| <= 630 keeps a block's sum of squares below 2^24, hence exact.
#if defined(__x86_64__)
#include <cstring>

#include "avx2.h"

namespace lobcq::avx2 {
namespace {

constexpr int kYmm = 8;  // floats: a block

// A block's grid values and the rows of the tables they select.
struct Block {
    alignas(32) float q[kBlock];
    alignas(32) int32_t bucket[kBlock];
};

void to_grid(const float* x, float divisor, Block* block) {
    const __m256 bound = _mm256_set1_ps(kGridMax);
    const __m256 y = _mm256_mul_ps(_mm256_div_ps(_mm256_loadu_ps(x), _mm256_set1_ps(divisor)), _mm256_set1_ps(kGrid));
    const __m256 clamped = _mm256_max_ps(_mm256_min_ps(y, bound), _mm256_sub_ps(_mm256_setzero_ps(), bound));
    const __m256i q = _mm256_cvtps_epi32(clamped);
    const __m256i bucket = _mm256_srai_epi32(_mm256_add_epi32(q, _mm256_set1_epi32(-8 * kFirstBucket - 1)), 3);
    const __m256i last = _mm256_set1_epi32(kBuckets - 1);
    _mm256_store_ps(block->q, _mm256_cvtepi32_ps(q));
    _mm256_store_si256(reinterpret_cast<__m256i*>(block->bucket),
                       _mm256_max_epi32(_mm256_min_epi32(bucket, last), _mm256_setzero_si256()));
}

// Errors of 8 codebooks from `first` on.
__m256 errors(const Tables& t, const Block& block, int first) {
    __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();  // two chains: the additions' latency halves
    for (int i = 0; i < kBlock; i += 2) {
        const float* row0 = t.nearest_steps[block.bucket[i]] + first;
        const float* row1 = t.nearest_steps[block.bucket[i + 1]] + first;
        const __m256 e0 = _mm256_sub_ps(_mm256_broadcast_ss(block.q + i), _mm256_load_ps(row0));
        const __m256 e1 = _mm256_sub_ps(_mm256_broadcast_ss(block.q + i + 1), _mm256_load_ps(row1));
        even = _mm256_fmadd_ps(e0, e0, even);
        odd = _mm256_fmadd_ps(e1, e1, odd);
    }
    return _mm256_add_ps(even, odd);
}

// The least element in every lane.
__m256 least(__m256 x) {
    x = _mm256_min_ps(x, _mm256_permute2f128_ps(x, x, 1));
    x = _mm256_min_ps(x, _mm256_shuffle_ps(x, x, 0x4e));
    return _mm256_min_ps(x, _mm256_shuffle_ps(x, x, 0xb1));
}

// The lowest index of the least error.
int select(const Tables& t, const Block& block) {
    const __m256 low = errors(t, block, 0);
    if (t.num_codebooks <= kYmm) {
        const int equal = _mm256_movemask_ps(_mm256_cmp_ps(low, least(low), _CMP_EQ_OQ));
        return __builtin_ctz(static_cast<unsigned>(equal));
    }
    const __m256 high = errors(t, block, kYmm);
    const __m256 best = least(_mm256_min_ps(low, high));
    const int equal_low = _mm256_movemask_ps(_mm256_cmp_ps(low, best, _CMP_EQ_OQ));
    const int equal_high = _mm256_movemask_ps(_mm256_cmp_ps(high, best, _CMP_EQ_OQ));
    return __builtin_ctz(static_cast<unsigned>(equal_low | equal_high << kYmm));
}

}  // namespace

void encode(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
            uint8_t* selectors) {
    for (int64_t group = 0; group < groups; ++group) {
        Block blocks[kGroupBlocks];  // all first: loading them one float at a time waits for the vector stores
        for (int b = 0; b < kGroupBlocks; ++b) to_grid(x + b * kBlock, divisors[b / 2], &blocks[b]);
        for (int b = 0; b < kGroupBlocks; ++b) {
            const int selector = t.num_codebooks == 1 ? 0 : select(t, blocks[b]);
            selectors[b] = static_cast<uint8_t>(selector);
            const uint8_t* nearest = t.nearest[selector];
            for (int i = 0; i < kBlock; ++i) codes[b * kBlock + i] = nearest[blocks[b].bucket[i]];
        }
        x += kGroup;
        divisors += kGroupBlocks / 2;
        codes += kGroup;
        selectors += kGroupBlocks;
    }
}

// Two blocks a byte shuffle would serve; but codes come one a byte here, and a block's 8 look-ups share a codebook.
void entries(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int64_t groups, int8_t* out) {
    const __m128i bias = _mm_set1_epi8(kBias);
    for (int64_t b = 0; b < groups * kGroupBlocks; ++b) {
        const auto* codebook = reinterpret_cast<const __m128i*>(t.biased + selectors[b] * kCodebookSize);
        const __m128i code = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + b * kBlock));
        const __m128i entry = _mm_sub_epi8(_mm_shuffle_epi8(_mm_load_si128(codebook), code), bias);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + b * kBlock), entry);
    }
}

// For each 64 columns at most: -kBias times the sums over columns 0, 1 and 2, 3 of every 4, as two int16. That is what
// the two 16-bit lanes that accumulate them are to start from.
void correct(const int8_t* entries, int64_t arrays, int array_size, int32_t* corrections) {
    const int part = array_size > kChunk ? kChunk : array_size;
    const __m256i ones = _mm256_set1_epi8(1), bias = _mm256_set1_epi16(-kBias);
    for (int64_t p = 0; p < arrays * (array_size / part); ++p, entries += part) {
        __m128i sum = _mm_setzero_si128();
        for (int i = 0; i < part; i += 16) {
            const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(entries + i));
            sum = _mm_add_epi16(sum, _mm_maddubs_epi16(_mm256_castsi256_si128(ones), bytes));
        }
        sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0x4e));
        sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 0xb1));
        corrections[p] = _mm_cvtsi128_si32(_mm_mullo_epi16(sum, _mm256_castsi256_si128(bias)));
    }
}

}  // namespace lobcq::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
