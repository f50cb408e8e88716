// What attention computes with on AVX2: see attention_vectors.h.
#pragma once

#include "attention_plain.h"

namespace lobcq {
namespace {

constexpr int kLanes = 8;
constexpr int kTileVectors = 2;  // of each of four rows, in 16 registers
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(32)));
typedef uint8_t Quarter __attribute__((vector_size(8)));

inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

// Pairs of products fit in 16 bits: 2 * 127 * 31 of values, 2 * 63 * 127 of keys.
inline Ints dot_bytes(const Ints& c, const Bytes& a, const Bytes& b) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return c + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

inline void load_entries(const Tables& t, const StateRows& s, int64_t head, int64_t token, int64_t n, uint8_t* to) {
    load_entries_by_codes(t, s, head, token, n, to);
}

// Tokens 8 at a time: their quads are transposed as 32-bit numbers.
inline void quads_of(const uint8_t* entries, int64_t padded, int64_t tokens, uint8_t* to) {
    for (int64_t j = 0; j < tokens; j += 8)
        for (int64_t d = 0; d < padded; d += 16) {  // a block array is 16 columns at least
            __m256i x[4], y[4];
            for (int i = 0; i < 4; ++i) {
                const auto at = [&](int64_t token) {
                    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + token * padded + d));
                };
                x[i] = _mm256_set_m128i(at(j + i + 4), at(j + i));
            }
            y[0] = _mm256_unpacklo_epi32(x[0], x[1]), y[1] = _mm256_unpackhi_epi32(x[0], x[1]);
            y[2] = _mm256_unpacklo_epi32(x[2], x[3]), y[3] = _mm256_unpackhi_epi32(x[2], x[3]);
            x[0] = _mm256_unpacklo_epi64(y[0], y[2]), x[1] = _mm256_unpackhi_epi64(y[0], y[2]);
            x[2] = _mm256_unpacklo_epi64(y[1], y[3]), x[3] = _mm256_unpackhi_epi64(y[1], y[3]);
            for (int k = 0; k < 4; ++k)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + ((d / 4 + k) * tokens + j) * 4), x[k]);
        }
}

// A square of kLanes floats a side, its rows `stride` apart, to rows `apart`.
inline void transpose_floats(const float* from, int64_t stride, float* to, int64_t apart) {
    __m256 x[8], y[8];
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)  // rows i and i + 4 side by side
            x[i + 4 * half] = _mm256_set_m128(_mm_loadu_ps(from + (i + 4) * stride + 4 * half),
                                              _mm_loadu_ps(from + i * stride + 4 * half));
    for (int half = 0; half < 8; half += 4) {
        for (int i = 0; i < 4; i += 2) {
            y[half + i] = _mm256_unpacklo_ps(x[half + i], x[half + i + 1]);
            y[half + i + 1] = _mm256_unpackhi_ps(x[half + i], x[half + i + 1]);
        }
        for (int k = 0; k < 2; ++k) {
            const __m256 low = y[half + k], high = y[half + k + 2];
            _mm256_storeu_ps(to + (half + 2 * k) * apart, _mm256_shuffle_ps(low, high, 0x44));
            _mm256_storeu_ps(to + (half + 2 * k + 1) * apart, _mm256_shuffle_ps(low, high, 0xee));
        }
    }
}

inline void columns_of(const uint8_t* entries, int64_t padded, int64_t tokens, int8_t* to) {
    const __m128i bias = _mm_set1_epi8(kBias);
    for (int64_t j = 0; j < tokens; j += 4, entries += 4 * padded, to += 4 * padded)
        for (int64_t d = 0; d < padded; d += 16) {
            __m128i x[4];
            for (int k = 0; k < 4; ++k) {
                const auto* from = reinterpret_cast<const __m128i*>(entries + k * padded + d);
                x[k] = _mm_sub_epi8(_mm_loadu_si128(from), bias);
            }
            const __m128i low[] = {_mm_unpacklo_epi8(x[0], x[1]), _mm_unpacklo_epi8(x[2], x[3])};
            const __m128i high[] = {_mm_unpackhi_epi8(x[0], x[1]), _mm_unpackhi_epi8(x[2], x[3])};
            auto* out = reinterpret_cast<__m128i*>(to + d * 4);
            _mm_storeu_si128(out, _mm_unpacklo_epi16(low[0], low[1]));
            _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low[0], low[1]));
            _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high[0], high[1]));
            _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high[0], high[1]));
        }
}

}  // namespace
}  // namespace lobcq
