// bf16 and fp16 in plain integer arithmetic, in a form that compilers vectorise. Rounding is to nearest even. Internal
// linkage, as in loops.h: each instruction set's file compiles its own copy.
#pragma once

#include "format.h"

namespace lobcq {

static inline float bf16_to_float(uint16_t h) { return as_float(static_cast<uint32_t>(h) << 16); }

static inline float fp16_to_float(uint16_t h) {
    // Exponent and fraction moved into place give the value times 2^-112, subnormals included.
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | kInfBits;
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    return as_float((magnitude >= (31u << 23) ? special : finite) | sign);
}

static inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffff) > kInfBits ? 0x7fc0 : rounded);
}

static inline uint16_t float_to_fp16(float x) {
    const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    // Below 2^-14: adding 0.5 leaves the value in units of 2^-24, rounded, in the lowest bits.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
    if (magnitude >= 0x477ff000) result = 0x7c00;  // 65520 and more round to infinity
    if (magnitude > kInfBits) result = 0x7e00;
    return static_cast<uint16_t>(result | sign);
}

// n scalars of a dtype (enum lobcq_dtype) as fp32, and back.
static inline void load_row(const void* from, int32_t dtype, int64_t n, float* to) {
    const auto* half = static_cast<const uint16_t*>(from);
    if (dtype == LOBCQ_FP32) {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    } else if (dtype == LOBCQ_BF16) {
        for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(half[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(half[i]);
    }
}

static inline void store_row(const float* from, int32_t dtype, int64_t n, void* to) {
    auto* half = static_cast<uint16_t*>(to);
    if (dtype == LOBCQ_FP32) {
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    } else if (dtype == LOBCQ_BF16) {
        for (int64_t i = 0; i < n; ++i) half[i] = float_to_bf16(from[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) half[i] = float_to_fp16(from[i]);
    }
}

}  // namespace lobcq
