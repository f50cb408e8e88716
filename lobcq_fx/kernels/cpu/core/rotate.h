// Rotation of block arrays: docs/format.md. Included by each instruction set's file after it has set the target, as
// loops.h is, for vectors of as many lanes as its registers have.
#pragma once

#include <utility>

#include "isa.h"

namespace lobcq {
namespace {

template <int kLanes>
struct Vector {
    typedef float type __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
};

// A stage whose pairs lie in one vector: every lane plus or minus the one kStride from it. Multiplied by -1, a number
// is exact.
template <int kStride, int kLanes, int... kLane>
typename Vector<kLanes>::type butterflies(typename Vector<kLanes>::type x, std::integer_sequence<int, kLane...>) {
    const typename Vector<kLanes>::type sign = {(kLane & kStride ? -1.0f : 1.0f)...};
    return __builtin_shufflevector(x, x, (kLane ^ kStride)...) + x * sign;
}

// The stages whose pairs lie in two vectors, kStride apart. A template argument, so that compilers know all indices and
// keep the vectors in registers.
template <int kStride, class Floats, int kVectors>
void butterflies(Floats (&v)[kVectors]) {
    if constexpr (kStride < kVectors) {
        for (int pair = 0; pair < kVectors / 2; ++pair) {
            const int i = pair / kStride * kStride + pair;
            const Floats first = v[i], second = v[i + kStride];
            v[i] = first + second;
            v[i + kStride] = first - second;
        }
        butterflies<2 * kStride>(v);
    }
}

template <int kLanes, int kSize>
void rotate_array(float* x) {
    constexpr int kVectors = kSize / kLanes;
    constexpr std::make_integer_sequence<int, kLanes> lanes{};
    auto* vectors = reinterpret_cast<typename Vector<kLanes>::type*>(x);  // aligned: arrays of a slab are
    typename Vector<kLanes>::type v[kVectors];
    for (int i = 0; i < kVectors; ++i) {
        v[i] = butterflies<1, kLanes>(vectors[i], lanes);
        v[i] = butterflies<2, kLanes>(v[i], lanes);
        if constexpr (kLanes > 4) v[i] = butterflies<4, kLanes>(v[i], lanes);
        if constexpr (kLanes > 8) v[i] = butterflies<8, kLanes>(v[i], lanes);
    }
    butterflies<1>(v);
    for (int i = 0; i < kVectors; ++i) vectors[i] = v[i] * rotation_scale(kSize);
}

template <int kLanes>
void rotate_arrays(float* x, int64_t arrays, int array_size) {
    const auto rotate = array_size == 16   ? rotate_array<kLanes, 16>
                        : array_size == 32 ? rotate_array<kLanes, 32>
                        : array_size == 64 ? rotate_array<kLanes, 64>
                                           : rotate_array<kLanes, 128>;
    for (int64_t g = 0; g < arrays; ++g) rotate(x + g * array_size);
}

}  // namespace
}  // namespace lobcq
