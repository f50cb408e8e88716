// Products with smmla: it adds 8 columns of two activation rows by two weight rows to 4 sums, twice as many products as
// sdot, and takes the weight as the look-up gives it.
#if defined(__aarch64__)
#include "neon_i8mm.h"
#include "neon_linear.h"

namespace lobcq::neon_i8mm {
namespace {

using neon::kQuads;
using neon::Quad;

struct MatrixProducts {
    // Part 2 block + half: 8 columns of two rows.
    static Quad arranged(const uint8x16_t w[2][2]) { return {{w[0][0], w[0][1], w[1][0], w[1][1]}}; }

    // Rows are taken in pairs. The last of an odd number makes one with itself, which takes no more instructions than
    // sdot would, and nobody reads the second row's sums.
    template <int kRows>
    class Sums {
      public:
        Sums(const ActivationView& a, int64_t first_row, int64_t array) {
            for (int p = 0; p < kPairs; ++p) {
                const int32x2_t first = vdup_n_s32(a.corrections_at(first_row + 2 * p)[array * a.parts]);
                const int32x2_t second = vdup_n_s32(a.corrections_at(first_row + second_row(p))[array * a.parts]);
                for (int i = 0; i < kQuads; ++i) dots_[p][i][0] = dots_[p][i][1] = vcombine_s32(first, second);
            }
        }

        template <class Weights>
        void add(const Weights& weights, const int8_t* a, int64_t stride) {
            int8x16_t x[kPairs][2];  // 8 columns of two rows, as the weight's parts
            for (int p = 0; p < kPairs; ++p) {
                const int64x2_t first = vreinterpretq_s64_s8(vld1q_s8(a + 2 * p * stride));
                const int64x2_t second = vreinterpretq_s64_s8(vld1q_s8(a + second_row(p) * stride));
                x[p][0] = vreinterpretq_s8_s64(vzip1q_s64(first, second));
                x[p][1] = vreinterpretq_s8_s64(vzip2q_s64(first, second));
            }
#pragma GCC unroll 4
            for (int i = 0; i < kQuads; ++i) {
                const Quad w = weights.quad(i);
#pragma GCC unroll 4
                for (int part = 0; part < 4; ++part)
#pragma GCC unroll 4
                    for (int p = 0; p < kPairs; ++p) {
                        int32x4_t& dot = dots_[p][i][part % 2];
                        dot = vmmlaq_s32(dot, x[p][part / 2], vreinterpretq_s8_u8(w.parts[part]));
                    }
                neon::keep_loads_here();
            }
        }

        int32x4_t quad(int m, int i) const {
            const int64x2_t rows01 = vreinterpretq_s64_s32(dots_[m / 2][i][0]);
            const int64x2_t rows23 = vreinterpretq_s64_s32(dots_[m / 2][i][1]);
            return vreinterpretq_s32_s64(m % 2 ? vzip2q_s64(rows01, rows23) : vzip1q_s64(rows01, rows23));
        }

      private:
        static constexpr int kPairs = (kRows + 1) / 2;
        static constexpr int second_row(int pair) { return 2 * pair + 1 < kRows ? 2 * pair + 1 : 2 * pair; }

        int32x4_t dots_[kPairs][kQuads][2];  // [pair][quad][half]: the first row by two rows of the weight, the second
    };
};

}  // namespace

void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    // One row stays with sdot: of two that are the same, smmla would compute half its sums for nobody.
    constexpr decltype(&fused) kernels[neon::kFusedRows] = {neon::fused, neon::fused_rows<MatrixProducts, 2>,
                                                            neon::fused_rows<MatrixProducts, 3>,
                                                            neon::fused_rows<MatrixProducts, 4>};
    kernels[a.rows * a.planes - 1](t, w, a, panel, sums);
}

void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile) {
    neon::decode_panel<MatrixProducts>(t, w, panel, chunk, chunks, slot, tile);
}

void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums) {
    neon::multiply_tile<MatrixProducts>(tile, a, first_row, rows, chunk, chunks, sums);
}

}  // namespace lobcq::neon_i8mm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
