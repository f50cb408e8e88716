// Products with NEON, whatever instruction adds them up. One tbl decodes 8 columns of two rows, each row by a codebook
// of its own. In what order an instruction wants them, and how it adds products to sums, is up to `Products`:
//
//   Quad arranged(const uint8x16_t w[2][2]): what was decoded of a quad, [block][half], in that order
//   Sums<kRows>: of kRows activation rows by a block array of a panel
//     Sums(a, first_row, array): the corrections that they start from
//     void add(weights, a, stride): 16 columns of the activation times the panel that `weights` gives quad by quad
//     int32x4_t quad(m, i): those of row m by quad i
//
// Signed bytes are multiplied. Biased entries, 1..63, are the same numbers signed and unsigned, so they are multiplied
// as they are: the tables and the corrections that sums start from are those of every other instruction set, and taking
// the bias off before would cost an instruction for every register decoded. 32-bit sums cannot overflow.
//
// Included by each file of products after it has set the target, hence everything here has internal linkage: loops.h.
#pragma once

#include <cstring>

#include "neon.h"

namespace lobcq::neon {
namespace {

constexpr int kQuads = kPanel / 4;  // 4 rows are a quad: their sums fill a register

// 16 columns of a quad, biased entries.
struct Quad {
    uint8x16_t parts[4];
};

// Decodes block pairs of one panel in order.
template <class Products>
class Decoder {
  public:
    Decoder(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk)
        : codebooks_(t.biased), codes_(w.codes_at(panel, chunk)), selectors_(w.selectors_at(panel, chunk)),
          bits_(w.bits), mask_((1u << w.bits) - 1) {}

    void next_chunk() {
        for (int g = 0; g < 8; ++g) std::memcpy(&groups_[g], selectors_ + g * 2 * bits_, sizeof groups_[g]);
        selectors_ += 8 * 2 * bits_;
    }

    // Half 0 holds 8 columns of a quad's rows 0 and 1, half 1 those of rows 2 and 3.
    Quad quad(int i) const {
        uint8x16_t w[2][2];  // [block][half]
        for (int half = 0; half < 2; ++half) {
            const uint8x16_t codes = vld1q_u8(codes_ + half * kChunk + i * 2 * kBlock);
            const uint8x16_t low = vandq_u8(codes, vdupq_n_u8(0x0f));
            w[0][half] = look_up(half, i, 0, vorrq_u8(low, second_codebook()));
            w[1][half] = look_up(half, i, 1, vsriq_n_u8(second_codebook(), codes, 4));
        }
        return Products::arranged(w);
    }

    void next_pair() {
        codes_ += kPairBytes;
        for (uint64_t& group : groups_) group >>= 2 * 2 * bits_;
    }

  private:
    // One block of a half's places 2 i and 2 i + 1.
    uint8x16_t look_up(int half, int i, int block, uint8x16_t index) const {
        return neon::look_up(codebook(half, 2 * i, block), codebook(half, 2 * i + 1, block), index);
    }

    const uint8_t* codebook(int half, int place, int block) const {
        const int bit = bits_ * (2 * block + selector_second(place));
        return codebooks_ + ((groups_[selector_group(half, place)] >> bit) & mask_) * kCodebookSize;
    }

    const uint8_t *codebooks_, *codes_, *selectors_;
    uint64_t groups_[8];
    int bits_;
    uint64_t mask_;
};

// 16 columns of a panel in a tile, which holds them quad by quad.
struct TileColumns {
    const uint8_t* w;

    Quad quad(int i) const {
        Quad quad;
        for (int k = 0; k < 4; ++k) quad.parts[k] = vld1q_u8(w + (4 * i + k) * 16);
        return quad;
    }
};

// Keeps GCC from loading what all four quads need before it multiplies the first, which spills registers.
void keep_loads_here() { asm volatile("" : : : "memory"); }

// 16 E4M3 bytes, not negative and not NaN, as fp32: moved into place they are fp16 numbers times 2^-8.
void scales_of(const uint8_t* bytes, float32x4_t scales[kQuads]) {
    const uint8x16_t e4m3 = vld1q_u8(bytes);
    const float16x8_t low = vreinterpretq_f16_u16(vshll_n_u8(vget_low_u8(e4m3), 7));
    const float16x8_t high = vreinterpretq_f16_u16(vshll_high_n_u8(e4m3, 7));
    scales[0] = vmulq_n_f32(vcvt_f32_f16(vget_low_f16(low)), 256.0f);
    scales[1] = vmulq_n_f32(vcvt_high_f32_f16(low), 256.0f);
    scales[2] = vmulq_n_f32(vcvt_f32_f16(vget_low_f16(high)), 256.0f);
    scales[3] = vmulq_n_f32(vcvt_high_f32_f16(high), 256.0f);
}

float32x4_t scaled(int32x4_t dot, float32x4_t w_scale, float a_scale, float32x4_t sum) {
    return vfmaq_f32(sum, vcvtq_f32_s32(dot), vmulq_n_f32(w_scale, a_scale));
}

// `fused` of isa.h for kRows activation rows.
template <class Products, int kRows>
void fused_rows(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    Decoder<Products> decoder(t, w, panel, 0);
    float32x4_t sum[kRows][kQuads] = {};
    int64_t column = 0;
    for (int64_t g = 0; g < w.arrays; ++g) {
        typename Products::template Sums<kRows> dots(a, 0, g);
        for (const int64_t end = column + w.array_size; column < end; column += kPairColumns) {
            if (column % kChunk == 0) decoder.next_chunk();
            dots.add(decoder, a.entries + column, a.stride);
            decoder.next_pair();
        }
        float32x4_t w_scales[kQuads];
        scales_of(w.scales_at(panel, g), w_scales);
        for (int m = 0; m < kRows; ++m)
            for (int i = 0; i < kQuads; ++i)
                sum[m][i] = scaled(dots.quad(m, i), w_scales[i], a.scales_at(m)[g], sum[m][i]);
    }
    for (int m = 0; m < kRows; ++m)
        for (int i = 0; i < kQuads; ++i) vst1q_f32(sums + m * kPanel + 4 * i, sum[m][i]);
}

// `decode` of isa.h.
template <class Products>
void decode_panel(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
                  WeightTile* tile) {
    Decoder<Products> decoder(t, w, panel, chunk);
    uint8_t* to = tile->entries[slot];
    for (int64_t pair = 0; pair < chunks * 4; ++pair) {
        if (pair % 4 == 0) decoder.next_chunk();
#pragma GCC unroll 4
        for (int i = 0; i < kQuads; ++i) {
            const Quad quad = decoder.quad(i);
            for (int k = 0; k < 4; ++k, to += 16) vst1q_u8(to, quad.parts[k]);
        }
        decoder.next_pair();
    }
    const uint8_t* scales = w.scales_at(panel, chunk * kChunk / w.array_size);
    for (int64_t g = 0; g < chunks * kChunk / w.array_size; ++g) {
        float32x4_t values[kQuads];
        scales_of(scales + g * kPanel, values);
        for (int i = 0; i < kQuads; ++i) vst1q_f32(tile->scales[g] + slot * kPanel + 4 * i, values[i]);
    }
}

// kRows activation rows by one panel: 32-bit sums of an array in registers, fp32 sums in memory.
template <class Products, int kRows>
void multiply_rows(const uint8_t* w, const float* w_scales, const ActivationView& a, int64_t first_row, int64_t chunk,
                   int64_t chunks, float* sums) {
    const int64_t first = chunk * kChunk / a.array_size, arrays = chunks * kChunk / a.array_size;
    const int8_t* entries = a.entries_at(first_row) + chunk * kChunk;
    for (int64_t g = 0; g < arrays; ++g, w_scales += kTileRows) {
        typename Products::template Sums<kRows> dots(a, first_row, first + g);
        for (int k = 0; k < a.array_size; k += 16, entries += 16, w += 16 * kPanel)
            dots.add(TileColumns{w}, entries, a.stride);
#pragma GCC unroll 4  // where it unrolls later by itself, GCC has put the sums of the loop above into memory
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
            for (int i = 0; i < kQuads; ++i) {
                float* sum = sums + m * kTileRows + 4 * i;
                const float a_scale = a.scales_at(first_row + m)[first + g];
                vst1q_f32(sum, scaled(dots.quad(m, i), vld1q_f32(w_scales + 4 * i), a_scale, vld1q_f32(sum)));
            }
    }
}

// `multiply` of isa.h.
template <class Products>
void multiply_tile(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
                   int64_t chunks, float* sums) {
    constexpr int kMost = 4;
    constexpr decltype(&multiply_rows<Products, kMost>) kernels[kMost] = {
        multiply_rows<Products, 1>, multiply_rows<Products, 2>, multiply_rows<Products, 3>, multiply_rows<Products, 4>};
    for (int slot = 0; slot < kTilePanels; ++slot)
        for (int64_t m = 0; m < rows; m += kMost) {
            const int64_t n = rows - m < kMost ? rows - m : kMost;
            kernels[n - 1](tile.entries[slot], tile.scales[0] + slot * kPanel, a, first_row + m, chunk, chunks,
                           sums + m * kTileRows + slot * kPanel);
        }
}

}  // namespace
}  // namespace lobcq::neon
