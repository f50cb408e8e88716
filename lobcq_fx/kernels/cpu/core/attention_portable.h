// What attention computes with in plain C++: see attention_vectors.h.
#pragma once

#include "attention_plain.h"

namespace lobcq {
namespace {

constexpr int kLanes = 4;
constexpr int kTileVectors = 2;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Quarter __attribute__((vector_size(4)));

inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) { return a * b + c; }

inline Ints dot_bytes(Ints c, const Bytes& a, const Bytes& b) {
    for (int i = 0; i < 4 * kLanes; ++i) c[i / 4] += a[i] * static_cast<int8_t>(b[i]);
    return c;
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
    copy_columns(entries, padded, tokens, to);
}

}  // namespace
}  // namespace lobcq
