// Encoding with AVX2: all scalars of a group against one codebook after the other, in integers.
//
// A scalar q on the grid is in bucket p and g above its lower end. With the biased entry u that a codebook has for p,
// (q - 16 (u - kBias))^2 is what it would be without a codebook, plus 32 (8 u (u - p) - u g): this is summed over a
// block and compared. Its parts fit into 16 bits, as |q| <= 600 leaves |g| < 100.
#if defined(__x86_64__)
#include <cstring>

#include "avx2.h"

namespace lobcq::avx2 {
namespace {

constexpr int kSegments = kBuckets / kCodebookSize;  // of a table of codes by bucket: what one byte shuffle looks up
constexpr int kHalves = 4;                           // registers that hold a group

// 8 blocks, 4 scalars of each in a 32-bit lane: their first halves in even registers, their second in the odd ones.
using Halves = __m256i[kHalves];

__m256i at(const uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

__m256i to_grid(const float* x, float divisor) {
    const __m256 bound = _mm256_set1_ps(kGridMax);
    const __m256 y = _mm256_mul_ps(_mm256_div_ps(_mm256_loadu_ps(x), _mm256_set1_ps(divisor)), _mm256_set1_ps(kGrid));
    return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(y, bound), _mm256_sub_ps(_mm256_setzero_ps(), bound)));
}

// The halves of 4 blocks, the first in the low lane.
void buckets_of(const float* x, const float* divisors, __m256i* p, __m256i* g) {
    __m256i p16[2], g16[2];
    for (int i = 0; i < 2; ++i) {
        const __m256i q = _mm256_packs_epi32(to_grid(x + 2 * i * kBlock, divisors[i]),
                                             to_grid(x + (2 * i + 1) * kBlock, divisors[i]));
        const __m256i from_zero = _mm256_add_epi16(q, _mm256_set1_epi16(-8 * kFirstBucket - 1));
        const __m256i bucket = _mm256_srai_epi16(from_zero, 3);
        p16[i] = _mm256_max_epi16(_mm256_min_epi16(bucket, _mm256_set1_epi16(kBuckets - 1)), _mm256_setzero_si256());
        const __m256i start = _mm256_slli_epi16(p16[i], 3);
        g16[i] = _mm256_add_epi16(_mm256_sub_epi16(from_zero, start), _mm256_set1_epi16(1));
    }
    *p = _mm256_packus_epi16(p16[0], p16[1]);
    *g = _mm256_packs_epi16(g16[0], g16[1]);
}

void group_of(const float* x, const float* divisors, Halves& p, Halves& g) {
    for (int i = 0; i < kHalves; i += 2) {
        __m256i p4[2], g4[2];
        for (int j = 0; j < 2; ++j)
            buckets_of(x + 4 * (i + j) * kBlock, divisors + 2 * (i + j), &p4[j], &g4[j]);
        p[i] = _mm256_permute2x128_si256(p4[0], p4[1], 0x20);
        p[i + 1] = _mm256_permute2x128_si256(p4[0], p4[1], 0x31);
        g[i] = _mm256_permute2x128_si256(g4[0], g4[1], 0x20);
        g[i + 1] = _mm256_permute2x128_si256(g4[0], g4[1], 0x31);
    }
}

// A bucket's place in every segment; above 0x7f, which shuffles take for 0, in all but its own.
void places_of(const Halves& p, Halves (&places)[kSegments]) {
    for (int s = 0; s < kSegments; ++s)
        for (int i = 0; i < kHalves; ++i)
            places[s][i] = _mm256_adds_epu8(_mm256_xor_si256(p[i], _mm256_set1_epi8(static_cast<char>(s << 4))),
                                            _mm256_set1_epi8(0x70));
}

// In the order written: GCC would make a tree of the chain, which spills registers.
void add_bits(__m256i& sum, __m256i x) { asm("vpor %1, %0, %0" : "+x"(sum) : "x"(x)); }

struct Best {
    __m256i error[kHalves / 2], selector[kHalves / 2];
    Halves codes;
};

void try_codebook(const Tables& t, int k, const Halves& p, const Halves& g, const Halves (&places)[kSegments],
                  Best* best) {
    Halves codes, up, ug;
    for (int s = 0; s < kSegments; ++s)
#pragma GCC unroll 4
        for (int i = 0; i < kHalves; ++i) {
            const __m256i found = _mm256_shuffle_epi8(at(t.nearest[k] + s * kCodebookSize), places[s][i]);
            if (s == 0) codes[i] = found;
            else add_bits(codes[i], found);
        }
    const __m256i entry_of = at(t.biased + k * kCodebookSize);
#pragma GCC unroll 4
    for (int i = 0; i < kHalves; ++i) {
        const __m256i u = _mm256_shuffle_epi8(entry_of, codes[i]);
        up[i] = _mm256_maddubs_epi16(u, _mm256_sub_epi8(u, p[i]));
        ug[i] = _mm256_maddubs_epi16(u, g[i]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kHalves; i += 2) {
        const __m256i error = _mm256_sub_epi32(
            _mm256_madd_epi16(_mm256_add_epi16(up[i], up[i + 1]), _mm256_set1_epi16(8)),
            _mm256_madd_epi16(_mm256_add_epi16(ug[i], ug[i + 1]), _mm256_set1_epi16(1)));
        const __m256i better = _mm256_cmpgt_epi32(best->error[i / 2], error);  // a tie stays with the lower codebook
        best->error[i / 2] = _mm256_min_epi32(best->error[i / 2], error);
        best->selector[i / 2] = _mm256_blendv_epi8(best->selector[i / 2], _mm256_set1_epi32(k), better);
        for (int j = i; j < i + 2; ++j) best->codes[j] = _mm256_blendv_epi8(best->codes[j], codes[j], better);
    }
}

// 8 blocks in order.
void store(__m256i first, __m256i second, __m256i selector, uint8_t* codes, uint8_t* selectors) {
    const __m256i low = _mm256_unpacklo_epi32(first, second), high = _mm256_unpackhi_epi32(first, second);
    auto* to = reinterpret_cast<__m256i*>(codes);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(selector), _mm256_extracti128_si256(selector, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(selectors), _mm_packus_epi16(words, words));
}

}  // namespace

void encode(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
            uint8_t* selectors) {
    for (int64_t group = 0; group < groups; ++group) {
        Halves p, g, places[kSegments];
        group_of(x, divisors, p, g);
        places_of(p, places);
        Best best = {};
        for (__m256i& error : best.error) error = _mm256_set1_epi32(INT32_MAX);
        for (int k = 0; k < t.num_codebooks; ++k) try_codebook(t, k, p, g, places, &best);
        for (int i = 0; i < kHalves; i += 2)
            store(best.codes[i], best.codes[i + 1], best.selector[i / 2], codes + i * kGroup / kHalves,
                  selectors + i * kGroupBlocks / kHalves);
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
