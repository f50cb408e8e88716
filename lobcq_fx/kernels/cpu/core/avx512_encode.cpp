// Encoding with AVX-512: all comparisons of 16 blocks with one codebook at a time, in integers.
//
// With u = entry + 32 and Q = q + 512, the part of sum (q - 16 entry)^2 that depends on the codebook is 32 times
//     sum of u (8 u - Q) = 8 sum of u (u - p) - sum of u g,   Q = 8 p + g,
// where p, the bucket, is what the nearest entry is looked up by, and g is 1..8, or what is missing outside the
// buckets. u, u - p and g fit in bytes while |q| <= 630, so both sums are byte dot products.
#if defined(__x86_64__)
#include <cstring>

#include "avx512.h"

namespace lobcq::avx512 {
namespace {

constexpr int kZmm = 16;  // floats

// Buckets p and remainders g of 64 scalars, one a byte. Packing within 128-bit lanes leaves the quads (4 scalars) in
// the order 0 4 8 12, 1 5 9 13, 2 6 10 14, 3 7 11 15: the first and third lane hold blocks' first halves.
struct Grid64 {
    __m512i p, g;
};

__m512i to_grid(const float* x, float divisor) {
    const __m512 bound = _mm512_set1_ps(kGridMax);
    const __m512 y = _mm512_mul_ps(_mm512_div_ps(_mm512_loadu_ps(x), _mm512_set1_ps(divisor)), _mm512_set1_ps(kGrid));
    return _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(y, bound), _mm512_sub_ps(_mm512_setzero_ps(), bound)));
}

Grid64 grid_of(const float* x, const float* divisors) {
    __m512i p[2], g[2];
    for (int i = 0; i < 2; ++i) {
        const __m512i q = _mm512_packs_epi32(to_grid(x + 2 * i * kZmm, divisors[2 * i]),
                                             to_grid(x + (2 * i + 1) * kZmm, divisors[2 * i + 1]));
        const __m512i from_zero = _mm512_add_epi16(q, _mm512_set1_epi16(-8 * kFirstBucket - 1));
        const __m512i bucket = _mm512_srai_epi16(from_zero, 3);
        p[i] = _mm512_max_epi16(_mm512_min_epi16(bucket, _mm512_set1_epi16(kBuckets - 1)), _mm512_setzero_si512());
        const __m512i start = _mm512_slli_epi16(p[i], 3);
        g[i] = _mm512_add_epi16(_mm512_sub_epi16(from_zero, start), _mm512_set1_epi16(1));
    }
    return {_mm512_packus_epi16(p[0], p[1]), _mm512_packs_epi16(g[0], g[1])};
}

// 16 blocks: a holds their first halves, b their second, a block's at the same 32-bit place of both. Place 4 l + i
// is block 8 (l / 2) + 2 i + l % 2.
struct Halves {
    __m512i a, b;
};

Halves halves(__m512i first64, __m512i second64) {
    return {_mm512_shuffle_i64x2(first64, second64, 0x88), _mm512_shuffle_i64x2(first64, second64, 0xdd)};
}

struct Best {
    __m512i error, selector;
    Halves codes;
};

void try_codebook(const Tables& t, int k, const Halves& p, const Halves& g, Best* best) {
    const __m512i nearest0 = _mm512_load_si512(t.nearest[k]), nearest1 = _mm512_load_si512(t.nearest[k] + 64);
    const auto* codebook = reinterpret_cast<const __m128i*>(t.biased + k * kCodebookSize);
    const __m512i entry_of = _mm512_broadcast_i32x4(_mm_load_si128(codebook));
    const Halves codes = {_mm512_permutex2var_epi8(nearest0, p.a, nearest1),
                          _mm512_permutex2var_epi8(nearest0, p.b, nearest1)};
    const Halves u = {_mm512_shuffle_epi8(entry_of, codes.a), _mm512_shuffle_epi8(entry_of, codes.b)};
    __m512i up = _mm512_dpbusd_epi32(_mm512_setzero_si512(), u.a, _mm512_sub_epi8(u.a, p.a));
    up = _mm512_dpbusd_epi32(up, u.b, _mm512_sub_epi8(u.b, p.b));
    __m512i ug = _mm512_dpbusd_epi32(_mm512_setzero_si512(), u.a, g.a);
    ug = _mm512_dpbusd_epi32(ug, u.b, g.b);
    const __m512i error = _mm512_sub_epi32(_mm512_slli_epi32(up, 3), ug);
    const __mmask16 better = _mm512_cmplt_epi32_mask(error, best->error);  // a tie stays with the lower codebook
    best->error = _mm512_min_epi32(error, best->error);
    best->selector = _mm512_mask_mov_epi32(best->selector, better, _mm512_set1_epi32(k));
    best->codes.a = _mm512_mask_mov_epi32(best->codes.a, better, codes.a);
    best->codes.b = _mm512_mask_mov_epi32(best->codes.b, better, codes.b);
}

// Undoes the order of Halves: quad 4 i + l of the first 64 scalars is at place 4 (l / 2) + i of a (l even) or b (odd).
void store(const Best& best, uint8_t* codes, uint8_t* selectors) {
    const __m512i quads = _mm512_setr_epi32(0, 16, 4, 20, 1, 17, 5, 21, 2, 18, 6, 22, 3, 19, 7, 23);
    const __m512i second = _mm512_add_epi32(quads, _mm512_set1_epi32(8));
    _mm512_storeu_si512(codes, _mm512_permutex2var_epi32(best.codes.a, quads, best.codes.b));
    _mm512_storeu_si512(codes + 64, _mm512_permutex2var_epi32(best.codes.a, second, best.codes.b));
    const __m512i blocks = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(blocks, best.selector));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(selectors), bytes);
}

}  // namespace

void encode(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
            uint8_t* selectors) {
    for (int64_t group = 0; group < groups; ++group) {
        const Grid64 first = grid_of(x, divisors), second = grid_of(x + 64, divisors + 4);
        const Halves p = halves(first.p, second.p), g = halves(first.g, second.g);
        Best best = {_mm512_set1_epi32(INT32_MAX), _mm512_setzero_si512(), {}};
        for (int k = 0; k < t.num_codebooks; ++k) try_codebook(t, k, p, g, &best);
        store(best, codes, selectors);
        x += kGroup;
        divisors += kGroup / kZmm;
        codes += kGroup;
        selectors += kGroupBlocks;
    }
}

void entries(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int64_t groups, int8_t* out) {
    const EntryTable table(t);
    const __m512i bias = _mm512_set1_epi8(kBias);
    const __m512i lowest_of_eight = _mm512_set4_epi32(0x08080808, 0x08080808, 0, 0);
    for (int64_t i = 0; i < groups * kGroup; i += 64) {
        // Each selector eight times: bytes widened to 64 bits, then the lowest of each 8 bytes copied to all of them.
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(selectors + i / kBlock));
        const __m512i wide = _mm512_slli_epi64(_mm512_cvtepu8_epi64(eight), 4);
        const __m512i selector = _mm512_shuffle_epi8(wide, lowest_of_eight);
        const __m512i index = _mm512_or_si512(selector, _mm512_loadu_si512(codes + i));
        _mm512_storeu_si512(out + i, _mm512_sub_epi8(table.look_up<true>(index), bias));
    }
}

}  // namespace lobcq::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
