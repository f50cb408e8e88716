// What attention computes with on AVX-512: see attention_vectors.h.
#pragma once

#include "attention.h"

namespace lobcq {
namespace {

constexpr int kLanes = 16;
constexpr int kTileVectors = 4;  // of each of four rows
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint8_t Quarter __attribute__((vector_size(16)));

inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

inline Ints dot_bytes(const Ints& c, const Bytes& a, const Bytes& b) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
}

// Biased entries of n tokens of a head, [n][padded]: 64 codes and their 8 selectors at a time.
inline void load_entries(const Tables& t, const StateRows& s, int64_t head, int64_t token, int64_t n, uint8_t* to) {
    const avx512::EntryTable table(t);
    const bool sixteen = s.bits == 4;
    alignas(64) uint8_t shifts[64];  // put the selector of each byte's block above its code
    for (int i = 0; i < 64; ++i) shifts[i] = static_cast<uint8_t>((s.bits * (i / kBlock) - 4) & 63);
    const __m512i shift = _mm512_load_si512(shifts);
    const uint8_t* row = s.rows + token * s.row_bytes + kStateScaleBytes + head * s.head_bytes;
    for (int64_t j = 0; j < n; ++j, row += s.row_bytes, to += s.padded)
        for (int64_t d = 0; d < s.padded; d += 64) {
            const int64_t left = s.padded - d < 64 ? s.padded - d : 64;
            const __mmask32 codes = static_cast<__mmask32>((1ull << (left / 2)) - 1);
            const auto selectors = static_cast<__mmask16>((1u << ceil_div(left / kBlock * s.bits, 8)) - 1);
            const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(codes, row + d / 2));
            const __m512i apart = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
            const __m128i packed = _mm_maskz_loadu_epi8(selectors, row + s.code_bytes + d / 64 * s.bits);
            const __m512i above = _mm512_multishift_epi64_epi8(shift, _mm512_broadcastq_epi64(packed));
            // 0x0f ? codes : selectors, bit by bit.
            const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), apart, above, 0xca);
            const __m512i entries = sixteen ? table.look_up<true>(index) : table.look_up<false>(index);
            if (left == 64) _mm512_storeu_si512(to + d, entries);
            else _mm512_mask_storeu_epi8(to + d, (1ull << left) - 1, entries);
        }
}

// 16 tokens' quads of bytes, [16][stride] to [16][apart]: a transposition of 32-bit numbers.
inline void transpose_quads(const uint8_t* from, int64_t stride, uint8_t* to, int64_t apart) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            x[i + 2 * k] = _mm512_unpacklo_epi64(y[i + k], y[i + k + 2]);
            x[i + 2 * k + 1] = _mm512_unpackhi_epi64(y[i + k], y[i + k + 2]);
        }
    // x[4 i + k], 128-bit lane l: quad 4 l + k of tokens 4 i to 4 i + 3.
    for (int k = 0; k < 4; ++k) {
        const __m512i low01 = _mm512_shuffle_i32x4(x[k], x[4 + k], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(x[k], x[4 + k], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(x[8 + k], x[12 + k], 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(x[8 + k], x[12 + k], 0xee);
        _mm512_storeu_si512(to + k * apart, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_storeu_si512(to + (4 + k) * apart, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_storeu_si512(to + (8 + k) * apart, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_storeu_si512(to + (12 + k) * apart, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// A square of kLanes floats a side, its rows `stride` apart, to rows `apart`.
inline void transpose_floats(const float* from, int64_t stride, float* to, int64_t apart) {
    constexpr int64_t kBytes = sizeof(float);
    transpose_quads(reinterpret_cast<const uint8_t*>(from), stride * kBytes, reinterpret_cast<uint8_t*>(to),
                    apart * kBytes);
}

// These two go over columns 64 at a time. What they write behind the last ones nobody reads, or is written again.
inline void quads_of(const uint8_t* entries, int64_t padded, int64_t tokens, uint8_t* to) {
    for (int64_t j = 0; j < tokens; j += 16)
        for (int64_t d = 0; d < padded; d += 64)
            transpose_quads(entries + j * padded + d, padded, to + (d / 4 * tokens + j) * 4, tokens * 4);
}

inline void columns_of(const uint8_t* entries, int64_t padded, int64_t tokens, int8_t* to) {
    const __m512i bias = _mm512_set1_epi8(kBias);
    for (int64_t j = 0; j < tokens; j += 4, entries += 4 * padded, to += 4 * padded)
        for (int64_t d = 0; d < padded; d += 64) {
            __m512i x[4];
            for (int k = 0; k < 4; ++k)
                x[k] = _mm512_sub_epi8(_mm512_loadu_si512(entries + k * padded + d), bias);
            const __m512i low01 = _mm512_unpacklo_epi8(x[0], x[1]), high01 = _mm512_unpackhi_epi8(x[0], x[1]);
            const __m512i low23 = _mm512_unpacklo_epi8(x[2], x[3]), high23 = _mm512_unpackhi_epi8(x[2], x[3]);
            // y[k], 128-bit lane l: columns 16 l + 4 k and the next three.
            const __m512i y[] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                                 _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
            const __m512i first01 = _mm512_shuffle_i32x4(y[0], y[1], 0x44), last01 = _mm512_shuffle_i32x4(y[0], y[1], 0xee);
            const __m512i first23 = _mm512_shuffle_i32x4(y[2], y[3], 0x44), last23 = _mm512_shuffle_i32x4(y[2], y[3], 0xee);
            _mm512_storeu_si512(to + d * 4, _mm512_shuffle_i32x4(first01, first23, 0x88));
            _mm512_storeu_si512(to + d * 4 + 64, _mm512_shuffle_i32x4(first01, first23, 0xdd));
            _mm512_storeu_si512(to + d * 4 + 128, _mm512_shuffle_i32x4(last01, last23, 0x88));
            _mm512_storeu_si512(to + d * 4 + 192, _mm512_shuffle_i32x4(last01, last23, 0xdd));
        }
}

}  // namespace
}  // namespace lobcq
