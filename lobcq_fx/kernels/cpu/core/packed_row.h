// One row of packed bytes: 4-bit codes and selectors of 0 to 4 bits, little-endian.
#pragma once

#include "format.h"

namespace lobcq {

inline float tensor_scale_at(const lobcq_packed& packed, int64_t row) {
    return packed.tensor_scale[packed.num_tensor_scales == 1 ? 0 : row];
}

inline void pack_codes(const uint8_t* codes, int64_t n, uint8_t* to) {
    for (int64_t i = 0; i < n / 2; ++i) to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}

inline void unpack_codes(const uint8_t* from, int64_t n, uint8_t* codes) {
    for (int64_t i = 0; i < n / 2; ++i) {
        codes[2 * i] = from[i] & 15;
        codes[2 * i + 1] = from[i] >> 4;
    }
}

// Eight selectors fill `bits` bytes exactly; the last byte of fewer is filled up with zero bits.
inline void pack_selectors(const uint8_t* selectors, int64_t n, int bits, uint8_t* to) {
    for (int64_t first = 0; bits && first < n; first += 8, to += bits) {
        const int64_t count = n - first < 8 ? n - first : 8;
        uint64_t word = 0;
        for (int64_t i = 0; i < count; ++i) word |= static_cast<uint64_t>(selectors[first + i]) << (i * bits);
        std::memcpy(to, &word, static_cast<size_t>(ceil_div(count * bits, 8)));
    }
}

inline void unpack_selectors(const uint8_t* from, int64_t n, int bits, uint8_t* selectors) {
    if (!bits) std::memset(selectors, 0, static_cast<size_t>(n));
    for (int64_t first = 0; bits && first < n; first += 8, from += bits) {
        const int64_t count = n - first < 8 ? n - first : 8;
        const uint64_t word = load_bytes(from, ceil_div(count * bits, 8));
        for (int64_t i = 0; i < count; ++i)
            selectors[first + i] = static_cast<uint8_t>((word >> (i * bits)) & ((1u << bits) - 1));
    }
}

// Selector of one block. Reads only bytes that hold bits of it.
inline int selector_at(const uint8_t* row, int64_t block, int bits) {
    if (!bits) return 0;
    const int64_t bit = block * bits;
    const uint64_t word = load_bytes(row + bit / 8, (bit % 8 + bits + 7) / 8);
    return static_cast<int>((word >> (bit % 8)) & ((1u << bits) - 1));
}

}  // namespace lobcq
