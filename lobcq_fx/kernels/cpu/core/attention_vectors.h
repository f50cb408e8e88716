// What attention computes with: vectors of kLanes numbers, which each instruction set's file has defined before, with
//     Floats multiply_add(a, b, c), a * b + c, rounded once or twice;
//     Ints dot_bytes(c, a, b), c plus the products of four unsigned bytes of a with four signed ones of b, in each lane.
#pragma once

#include <cmath>
#include <cstring>

namespace lobcq {
namespace {

template <class Vector, class Number>
Vector load_vector(const Number* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Floats load_floats(const float* from) { return load_vector<Floats>(from); }
inline void store_floats(const Floats& x, float* to) { std::memcpy(to, &x, sizeof x); }
inline Floats all(float x) { return Floats{} + x; }
inline Floats larger(const Floats& a, const Floats& b) { return a > b ? a : b; }

// The same four bytes in every lane.
inline Bytes four_bytes(const void* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    const Ints lanes = Ints{} + four;
    return (Bytes)lanes;
}

inline float largest_lane(const Floats& x) {
    float most = x[0];
    for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

// e^x for x <= 0, as format/int8_attention.py says.
inline Floats exp_of(const Floats& x) {
    const Floats shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // the nearest integer is left in the lowest bits
    const Floats n = shifted - 0x1.8p23f;
    const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    Floats p = r * 0x1.6850e4p-10f + 0x1.123bccp-7f;
    p = p * r + 0x1.555b98p-5f;
    p = p * r + 0x1.55548ep-3f;
    p = p * r + 0x1.fffff8p-2f;
    p = (p * r) * r + r + 1.0f;
    const Ints exponent = ((Ints)shifted - 0x4b400000 + 127) << 23;
    const Floats result = p * (Floats)exponent;
    const Ints none = x < -87.0f;  // all bits where it holds
    return (Floats)((Ints)result & ~none);
}

}  // namespace
}  // namespace lobcq
