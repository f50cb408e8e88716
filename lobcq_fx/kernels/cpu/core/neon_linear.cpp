// Products with sdot: it adds 4 columns of 4 rows to 4 sums, the activation's 4 columns being one lane of a register
// that holds 16.
#if defined(__aarch64__)
#include "neon.h"
#include "neon_linear.h"

namespace lobcq::neon {
namespace {

struct DotProducts {
    // Part k: columns 4 k to 4 k + 3 of row 0, then of row 1, 2, 3.
    static Quad arranged(const uint8x16_t w[2][2]) { return {{even(w[0]), odd(w[0]), even(w[1]), odd(w[1])}}; }

    template <int kRows>
    class Sums {
      public:
        Sums(const ActivationView& a, int64_t first_row, int64_t array) {
            for (int m = 0; m < kRows; ++m)
                for (int i = 0; i < kQuads; ++i)
                    dots_[m][i] = vdupq_n_s32(a.corrections_at(first_row + m)[array * a.parts]);
        }

        template <class Weights>
        void add(const Weights& weights, const int8_t* a, int64_t stride) {
            int8x16_t x[kRows];
            for (int m = 0; m < kRows; ++m) x[m] = vld1q_s8(a + m * stride);
#pragma GCC unroll 4
            for (int i = 0; i < kQuads; ++i) {
                const Quad w = weights.quad(i);
#pragma GCC unroll 4
                for (int m = 0; m < kRows; ++m) {
                    int32x4_t& dot = dots_[m][i];
                    dot = vdotq_laneq_s32(dot, vreinterpretq_s8_u8(w.parts[0]), x[m], 0);
                    dot = vdotq_laneq_s32(dot, vreinterpretq_s8_u8(w.parts[1]), x[m], 1);
                    dot = vdotq_laneq_s32(dot, vreinterpretq_s8_u8(w.parts[2]), x[m], 2);
                    dot = vdotq_laneq_s32(dot, vreinterpretq_s8_u8(w.parts[3]), x[m], 3);
                }
                keep_loads_here();
            }
        }

        int32x4_t quad(int m, int i) const { return dots_[m][i]; }

      private:
        int32x4_t dots_[kRows][kQuads];
    };

  private:
    // Of the two rows in each half, the first and the last 4 columns.
    static uint8x16_t even(const uint8x16_t half[2]) {
        return vreinterpretq_u8_u32(vuzp1q_u32(vreinterpretq_u32_u8(half[0]), vreinterpretq_u32_u8(half[1])));
    }
    static uint8x16_t odd(const uint8x16_t half[2]) {
        return vreinterpretq_u8_u32(vuzp2q_u32(vreinterpretq_u32_u8(half[0]), vreinterpretq_u32_u8(half[1])));
    }
};

}  // namespace

void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    constexpr decltype(&fused) kernels[kFusedRows] = {fused_rows<DotProducts, 1>, fused_rows<DotProducts, 2>,
                                                      fused_rows<DotProducts, 3>, fused_rows<DotProducts, 4>};
    kernels[a.rows * a.planes - 1](t, w, a, panel, sums);
}

void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile) {
    decode_panel<DotProducts>(t, w, panel, chunk, chunks, slot, tile);
}

void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums) {
    multiply_tile<DotProducts>(tile, a, first_row, rows, chunk, chunks, sums);
}

}  // namespace lobcq::neon

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
