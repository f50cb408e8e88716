// What attention computes with on NEON: see attention_vectors.h.
#pragma once

#include "attention_plain.h"

namespace lobcq {
namespace {

constexpr int kLanes = 4;
constexpr int kTileVectors = 4;  // of each of four rows, in 32 registers
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Quarter __attribute__((vector_size(4)));

inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

// Bytes of a are at most 127, the same number signed.
inline Ints dot_bytes(const Ints& c, const Bytes& a, const Bytes& b) {
    return (Ints)vdotq_s32((int32x4_t)c, (int8x16_t)a, (int8x16_t)b);
}

inline void load_entries(const Tables& t, const StateRows& s, int64_t head, int64_t token, int64_t n, uint8_t* to) {
    load_entries_by_codes(t, s, head, token, n, to);
}

inline void quads_of(const uint8_t* entries, int64_t padded, int64_t tokens, uint8_t* to) {
    copy_quads(entries, padded, tokens, to);
}

inline void transpose_floats(const float* from, int64_t stride, float* to, int64_t apart) {
    transpose_square<kLanes>(from, stride, to, apart);
}

inline void columns_of(const uint8_t* entries, int64_t padded, int64_t tokens, int8_t* to) {
    const uint8x16_t bias = vdupq_n_u8(kBias);
    for (int64_t j = 0; j < tokens; j += 4, entries += 4 * padded, to += 4 * padded)
        for (int64_t d = 0; d < padded; d += 16) {
            uint8x16x4_t rows;
            for (int k = 0; k < 4; ++k) rows.val[k] = vsubq_u8(vld1q_u8(entries + k * padded + d), bias);
            vst4q_u8(reinterpret_cast<uint8_t*>(to) + d * 4, rows);
        }
}

}  // namespace
}  // namespace lobcq
