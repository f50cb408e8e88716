// What an instruction set has to provide. Everything else (shapes, threads, packing, argument checks) exists once.
#pragma once

#include "layout.h"

namespace lobcq {

constexpr int kGroup = 128;             // columns encoded at a time
constexpr int kGroupBlocks = kGroup / kBlock;
constexpr int kTilePanels = 2;          // weight panels decoded together into a tile
constexpr int kTileRows = kTilePanels * kPanel;
constexpr int kTileColumns = 512;       // 16 KiB of decoded weights: half of a usual L1 cache
constexpr int kTileArrays = kTileColumns / 16;

// Decoded weights of kTilePanels panels: biased entries [panel][columns/16], there 16 columns of 16 rows in the order
// that the instruction set multiplies them in; fp32 scales [array][32 rows].
struct alignas(64) WeightTile {
    uint8_t entries[kTilePanels][kTileColumns * kPanel];
    float scales[kTileArrays][kTileRows];
};

// Sums of squares of a row's scalars and errors: column i adds to place i % 16, in doubles, which hold each square of
// a float exactly. So the sums are those of any instruction set.
struct RowSquares {
    double scalars[16], errors[16];
};

struct QueryBlock;

struct Isa {
    const char* name;

    // Planes of digits that W4A16 splits floats into.
    int planes;

    // Encoding. Reads n scalars of a dtype as fp32.
    void (*load)(const void* from, int32_t dtype, int64_t n, float* to);
    // Rotates arrays in place; x is aligned to 64 bytes.
    void (*rotate)(float* x, int64_t arrays, int array_size);
    // Bits of max|x| of each array: infinity's or more where one of its scalars is not finite.
    void (*absmax)(const float* x, int64_t arrays, int array_size, uint32_t* bits);
    // Steps 1b and 2 of the encoding for n arrays of one row (see ArrayScales in loops.h).
    void (*array_scales)(const uint32_t* absmax, int64_t n, float tensor_scale, uint8_t* scales, float* divisors);
    // Steps 3 to 5 for `groups` times kGroup scalars, with one divisor for each 16 of them (infinity: all are 0).
    // Requires |x| / divisor <= kNarrow. codes: one a byte; selectors: one a byte.
    void (*encode)(const Tables& t, const float* x, const float* divisors, int64_t groups, uint8_t* codes,
                   uint8_t* selectors);
    // Entries of `groups` times kGroup codes.
    void (*entries)(const Tables& t, const uint8_t* codes, const uint8_t* selectors, int64_t groups, int8_t* entries);
    // Errors on the grid of arrays with these entries, divisors as for encode.
    void (*errors)(const float* x, const float* divisors, const int8_t* entries, int64_t arrays, int array_size,
                   int32_t* errors);
    // What n entries decode to, n a multiple of 16, with a scale for each 16 of them.
    void (*values)(const int8_t* entries, const float* scales, float tensor_scale, int64_t n, float* values);
    // Adds the squares of n scalars, and of their distances from others, to sums.
    void (*squares)(const float* x, const float* values, int64_t n, RowSquares* sums);
    // Rows [first, last) of lobcq_compensate.
    void (*compensate)(const Tables& t, const lobcq_feedback& f, int64_t first, int64_t last);
    // Corrections of one row of entries [arrays * array_size]; what they are is up to the kernels below. Those of wide
    // entries are one 32-bit number an array.
    void (*correct)(const int8_t* entries, int64_t arrays, int array_size, int32_t* corrections);
    void (*correct_wide)(const int8_t* entries, int64_t arrays, int array_size, int32_t* corrections);
    // The same two steps in int8: scales and divisors, and the entries of n arrays.
    void (*int8_scales)(const uint32_t* absmax, int64_t n, float tensor_scale, uint8_t* scales, float* divisors);
    void (*int8_entries)(const float* x, const float* divisors, int64_t n, int array_size, int8_t* entries);
    // Splits n arrays into digit planes: entries[p * stride], scales[p * scale_stride] is plane p's.
    void (*split)(const float* x, const uint32_t* absmax, int64_t arrays, int array_size, float row_scale,
                  int8_t* entries, int64_t stride, float* scales, int64_t scale_stride);

    // Multiplying. Up to fused_rows activation rows (planes counted): decode and multiply in registers, one panel.
    // sums: fp32 [rows][16]. Up to fused_limit rows, decoding the panel again for every fused_rows of them is faster
    // than going through a tile.
    int64_t fused_rows, fused_limit;
    void (*fused)(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums);
    // More rows: decode columns [chunk, chunk + chunks) of a panel into place `slot` of the tile, then multiply it with
    // `rows` activation rows from first_row on; sums: fp32 [rows][32], added to.
    void (*decode)(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
                   WeightTile* tile);
    void (*multiply)(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
                     int64_t chunks, float* sums);
    // Attention of a block of queries over encoded states, its products in fp32 or in integers, and over floats.
    void (*attend)(const QueryBlock& block);
    void (*attend_int8)(const QueryBlock& block);
    void (*attend_floats)(const QueryBlock& block);
    // out[i] = (sum over planes of sums[p * sums_stride + i]) * row_scale * weight_scale + bias[i], in a dtype.
    void (*finish)(const float* sums, int64_t sums_stride, int planes, int64_t n, float row_scale, float weight_scale,
                   const float* bias, int32_t dtype, void* out);
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#elif defined(__aarch64__)
extern const Isa kNeon;
extern const Isa kNeonI8mm;
#endif

// |x| / divisor up to here (600 grid steps; 31, or 33 with the scale's rounding, is usual): what the fast encoders
// handle exactly in 8-bit and fp32 arithmetic. More occurs where a static tensor scale is too small, or at the very
// bottom of fp32's range.
constexpr float kNarrow = 37.5f;

// The one that LOBCQ_CPU_ISA names; the best this CPU runs where it names none.
const Isa& isa();

// Why LOBCQ_CPU_ISA is not obeyed; empty where it is.
const char* isa_error();

}  // namespace lobcq
