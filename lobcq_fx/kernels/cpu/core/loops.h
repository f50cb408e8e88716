// The row operations that plain loops express well: compilers vectorise them. Included by each instruction set's file
// after it has set the target, hence everything here has internal linkage: each file gets a copy compiled its own way.
#pragma once

#include <cmath>

#include "half.h"
#include "isa.h"

namespace lobcq {
namespace {

void absmax_rows(const float* x, int64_t arrays, int array_size, uint32_t* bits) {
    for (int64_t g = 0; g < arrays; ++g, x += array_size) {
        int32_t most = 0;
        for (int i = 0; i < array_size; ++i) {
            const auto magnitude = static_cast<int32_t>(as_bits(x[i]) & 0x7fffffff);
            most = magnitude > most ? magnitude : most;
        }
        bits[g] = static_cast<uint32_t>(most);
    }
}

// Step 2 without branches: E4M3((a / kMax) / t), saturating, at least 2^-9 where a > 0; 0 where a = 0; NaN where a or t
// is not finite. For entries of 31 rounded to nearest even, for those of int8 up. The divisor is scale * t, or infinity
// where that is 0 or NaN, so that x / divisor is 0.
template <int kMax>
void array_scales(const uint32_t* absmax, int64_t n, float t, uint8_t* scales, float* divisors) {
    const uint32_t t_bits = as_bits(t) & 0x7fffffff;
    for (int64_t g = 0; g < n; ++g) {
        const float ratio = as_float(absmax[g]) / static_cast<float>(kMax) / t;
        const float v = ratio > kScaleMax ? kScaleMax : ratio;  // 0/0, at the bottom of fp32's range, counts as 0
        const uint32_t bits = as_bits(v);
        const float nearest = v * 512.0f + 0x1p23f;  // units of 2^-9 in the lowest bits
        uint32_t normal = (bits + 0x7ffff + ((bits >> 20) & 1)) >> 20;
        uint32_t subnormal = as_bits(nearest) & 0xf;
        if constexpr (kMax == kInt8Max) {
            normal = (bits + 0xfffff) >> 20;
            subnormal += nearest - 0x1p23f < v * 512.0f ? 1 : 0;
        }
        normal -= 120u << 3;
        uint32_t byte = v < 0x1p-6f ? subnormal : normal;
        byte = v >= 0x1p-10f && byte > 0 ? byte : 1;
        byte = absmax[g] == 0 ? 0 : byte;
        const bool finite = absmax[g] < kInfBits && t_bits < kInfBits;
        const float small = static_cast<float>(static_cast<int32_t>(byte)) * 0x1p-9f;
        const float d = (byte < 8 ? small : as_float((byte << 20) + (120u << 23))) * t;
        divisors[g] = finite && d != 0.0f ? d : HUGE_VALF;
        scales[g] = static_cast<uint8_t>(finite ? byte : kScaleNaN);
    }
}

// Sum of (q - 16 entry)^2 over each array, with one divisor for each 16 scalars.
void grid_errors(const float* x, const float* divisors, const int8_t* entries, int64_t arrays, int array_size,
                 int32_t* errors) {
    const float bound = static_cast<float>(kGridMax);
    for (int64_t g = 0; g < arrays; ++g) {
        int32_t sum = 0;  // below 2^31: 128 times (2047 + 496)^2
        for (int part = 0; part < array_size; part += 16, x += 16, entries += 16, ++divisors)
            for (int i = 0; i < 16; ++i) {
                const float steps = x[i] / *divisors * static_cast<float>(kGrid);
                const float clamped = steps > bound ? bound : steps < -bound ? -bound : steps;
                // 1.5 * 2^23 added: the nearest integer is left in the lowest bits.
                const auto q = static_cast<int32_t>(as_bits(clamped + 0x1.8p23f) - as_bits(0x1.8p23f));
                const int32_t error = q - kGrid * entries[i];
                sum += error * error;
            }
        errors[g] = sum;
    }
}

// Each product rounded once, in this order.
void entry_values(const int8_t* entries, const float* scales, float tensor_scale, int64_t n, float* values) {
    for (int64_t part = 0; part < n / 16; ++part, entries += 16, values += 16)
        for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(entries[i]) * scales[part] * tensor_scale;
}

void add_squares(const float* x, const float* values, int64_t n, RowSquares* sums) {
    RowSquares own = *sums;
    for (int64_t part = 0; part < n / 16; ++part, x += 16, values += 16)
        for (int i = 0; i < 16; ++i) {
            const auto scalar = static_cast<double>(x[i]), error = static_cast<double>(x[i] - values[i]);
            own.scalars[i] += scalar * scalar;
            own.errors[i] += error * error;
        }
    *sums = own;
}

// The correction -kBias * sum(entries) of each array, for kernels that accumulate in 32 bits.
void correct_arrays(const int8_t* entries, int64_t arrays, int array_size, int32_t* corrections) {
    const int parts = array_size > kChunk ? array_size / kChunk : 1;
    for (int64_t g = 0; g < arrays; ++g, entries += array_size) {
        int32_t sum = 0;
        for (int i = 0; i < array_size; ++i) sum += entries[i];
        corrections[g * parts] = -kBias * sum;
    }
}

// Step 3 in int8. 1.5 * 2^23 added: the integer nearest to the quotient is left in the lowest bits.
void int8_entries(const float* x, const float* divisors, int64_t n, int array_size, int8_t* entries) {
    const float bound = static_cast<float>(kInt8Max);
    for (int64_t g = 0; g < n; ++g, x += array_size, entries += array_size) {
        for (int i = 0; i < array_size; ++i) {
            const float y = x[i] / divisors[g];
            const float clamped = y > bound ? bound : y < -bound ? -bound : y;
            entries[i] = static_cast<int8_t>(as_bits(clamped + 0x1.8p23f) - as_bits(0x1.8p23f));
        }
    }
}

// x / row_scale, fixed point with 22 bits under the array's largest magnitude, in balanced digits. Scales are powers of
// two: nothing but the last rounding is inexact.
template <int kPlanes, int kBits>
void split_arrays(const float* x, const uint32_t* absmax, int64_t arrays, int array_size, float row_scale,
                  int8_t* entries, int64_t stride, float* scales, int64_t scale_stride) {
    constexpr int32_t kLow = kBits == 8 ? 128 : (1 << (kBits - 1)) - 1;  // digits from -kLow on: -128..127, -31..32
    const float inverse_row = 1.0f / row_scale;
    for (int64_t g = 0; g < arrays; ++g, x += array_size, entries += array_size) {
        const uint32_t exponent = as_bits(as_float(absmax[g]) * inverse_row) >> 23;
        const uint32_t unit = exponent > 22 ? exponent - 21 : 1;  // |x| / unit < 2^22
        const float scale = as_float(unit << 23), inverse = as_float((254 - unit) << 23);
        for (int p = 0; p < kPlanes; ++p)
            scales[p * scale_stride + g] = scale * static_cast<float>(1 << (kBits * (kPlanes - 1 - p)));
        for (int i = 0; i < array_size; ++i) {
            // 1.5 * 2^23 added: the integer nearest to the value is left in the lowest bits.
            const float shifted = x[i] * inverse_row * inverse + 0x1.8p23f;
            auto rest = static_cast<int32_t>(as_bits(shifted) - as_bits(0x1.8p23f));
            for (int p = kPlanes - 1; p > 0; --p) {
                const int32_t digit = ((rest + kLow) & ((1 << kBits) - 1)) - kLow;
                entries[p * stride + i] = static_cast<int8_t>(digit);
                rest = (rest - digit) >> kBits;
            }
            entries[i] = static_cast<int8_t>(rest);
        }
    }
}

void finish_row(const float* sums, int64_t sums_stride, int planes, int64_t n, float row_scale, float weight_scale,
                const float* bias, int32_t dtype, void* out) {
    float result[kTileRows];
    for (int64_t i = 0; i < n; ++i) result[i] = sums[i];
    for (int p = 1; p < planes; ++p)
        for (int64_t i = 0; i < n; ++i) result[i] += sums[p * sums_stride + i];
    for (int64_t i = 0; i < n; ++i) result[i] = result[i] * row_scale * weight_scale;  // their product may underflow
    if (bias)
        for (int64_t i = 0; i < n; ++i) result[i] += bias[i];
    store_row(result, dtype, n, out);
}

}  // namespace
}  // namespace lobcq
