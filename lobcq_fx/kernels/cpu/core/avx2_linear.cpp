// Products with AVX2. A 16-entry codebook is one pshufb table; a 256-bit table load from Tables::pairs serves two
// blocks, one in each 128-bit lane; two of them and a blend decode four. vpmaddubsw then multiplies biased entries
// (unsigned) with activation entries (signed) into 16-bit sums.
//
// A 16-bit lane sums at most 32 products |entry * a| <= 31 * 32, so its true sum fits, and starting from the correction
// makes wrapping around on the way harmless. After 64 columns at most it is widened.
//
// Wide activation entries (int8, +-127) leave room for four products of biased entries, 63 * 127 each: two vpmaddubsw,
// whose sum is widened at once. Sums and corrections of a whole array then have 32 bits.
#if defined(__x86_64__)
#include <cstring>

#include "avx2.h"

namespace lobcq::avx2 {
namespace {

const __m256i* at256(const void* p) { return static_cast<const __m256i*>(p); }

// Keeps GCC from regrouping a chain of 16-bit additions, which spills registers.
void keep(__m256i& x) { asm("" : "+x"(x)); }

// Decodes block pairs of one panel in order. Register [half][j] of a block: rows row_at(half, 4 j) and the next three
// places, 8 columns each.
class Decoder {
  public:
    Decoder(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk)
        : pairs_(t.pairs[0][0]), codes_(w.codes_at(panel, chunk)), selectors_(w.selectors_at(panel, chunk)),
          group_bits_(2 * w.bits), mask_((1u << group_bits_) - 1) {}

    void next_chunk() {
        for (int g = 0; g < 8; ++g) std::memcpy(&groups_[g], selectors_ + g * group_bits_, sizeof groups_[g]);
        selectors_ += 8 * group_bits_;
    }

    __m256i codes(int half, int j) const { return _mm256_loadu_si256(at256(codes_ + half * kChunk + j * 32)); }

    // The next block of [half][j], its codes in the low nibbles.
    __m256i next_block(__m256i codes, int half, int j) {
        const __m256i index = _mm256_and_si256(codes, _mm256_set1_epi8(0x0f));
        const __m256i even = _mm256_shuffle_epi8(next_table(half * 4 + j * 2), index);
        const __m256i odd = _mm256_shuffle_epi8(next_table(half * 4 + j * 2 + 1), index);
        return _mm256_blend_epi32(even, odd, 0xcc);
    }

    void next_pair() { codes_ += kPairBytes; }

    void prefetch(int64_t bytes) const {
        _mm_prefetch(reinterpret_cast<const char*>(codes_ + bytes), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(codes_ + bytes + 64), _MM_HINT_T0);
    }

  private:
    __m256i next_table(int group) {
        const uint64_t pair = groups_[group] & mask_;
        groups_[group] >>= group_bits_;
        return _mm256_load_si256(at256(pairs_ + pair * sizeof(__m256i)));
    }

    const uint8_t* pairs_;
    const uint8_t *codes_, *selectors_;
    uint64_t groups_[8];
    int group_bits_;
    uint64_t mask_;
};

constexpr int64_t kPrefetch = 4096 + 512;  // bytes ahead: into the next page, where hardware prefetchers stop

__m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// 8 E4M3 bytes, not negative and not NaN, as fp32: moved into place they are fp16 numbers times 2^-8.
__m256 scales_of(const uint8_t* bytes) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_slli_epi16(wide, 7)), _mm256_set1_ps(256.0f));
}

__m256 scaled(__m256i dot, __m256 w_scale, float a_scale, __m256 sum) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(w_scale, _mm256_set1_ps(a_scale)), sum);
}

// Lanes of 8 columns in two 32-bit sums each -> 8 rows in order.
__m256i in_order(__m256i half0, __m256i half1) {
    const __m256 a = _mm256_castsi256_ps(half0), b = _mm256_castsi256_ps(half1);
    return _mm256_add_epi32(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)),
                            _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
}

// Adds products of 8 columns that are in two registers.
template <bool kWide>
void add_products(__m256i& dot, __m256i first, __m256i second) {
    if constexpr (kWide) {
        dot = _mm256_add_epi32(dot, widen(_mm256_add_epi16(first, second)));
    } else {
        dot = _mm256_add_epi16(dot, first);
        keep(dot);
        dot = _mm256_add_epi16(dot, second);
        keep(dot);
    }
}

// Sums of a part of an array, in 32-bit lanes.
template <bool kWide>
__m256i widened(__m256i dot) {
    return kWide ? dot : widen(dot);
}

template <bool kWide>
int part_of_array(int array_size) {
    return !kWide && array_size > kChunk ? kChunk : array_size;
}

template <int kRows>
using Dots = __m256i[kRows][2][2];  // [row][half][j], for each weight row four 16-bit lanes, or two wide ones

template <int kRows, bool kWide>
void add_pair(Decoder& decoder, const int8_t* a, int64_t stride, Dots<kRows>& dots) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m256i codes = decoder.codes(half, j);
            const __m256i w0 = decoder.next_block(codes, half, j);
            const __m256i w1 = decoder.next_block(_mm256_srli_epi16(codes, 4), half, j);
#pragma GCC unroll 2
            for (int m = 0; m < kRows; ++m) {
                int64_t eight[2];
                std::memcpy(eight, a + m * stride, sizeof eight);
                add_products<kWide>(dots[m][half][j], _mm256_maddubs_epi16(w0, _mm256_set1_epi64x(eight[0])),
                                    _mm256_maddubs_epi16(w1, _mm256_set1_epi64x(eight[1])));
            }
        }
    decoder.next_pair();
}

// Here a 16-bit lane sums at most 16 products of biased entries, 63 * 32 each: it cannot wrap around, and the correction
// is made in 32 bits.
template <int kRows, bool kWide>
void fused_rows(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    Decoder decoder(t, w, panel, 0);
    const int part = part_of_array<kWide>(w.array_size), parts = kWide ? 1 : a.parts;
    __m256 sum[kRows][2] = {};
    int64_t column = 0;
    for (int64_t p = 0; p < w.arrays * parts; ++p) {
        Dots<kRows> dots = {};
        for (const int64_t end = column + part; column < end; column += kPairColumns) {
            if (column % kChunk == 0) decoder.next_chunk();
            decoder.prefetch(kPrefetch);
            add_pair<kRows, kWide>(decoder, a.entries + column, a.stride, dots);
        }
        const int64_t g = p / parts, corrected = kWide ? g * a.parts : p;
        for (int j = 0; j < 2; ++j) {
            const __m256 w_scale = scales_of(w.scales_at(panel, g) + 8 * j);
            for (int m = 0; m < kRows; ++m) {
                const __m256i correction = widened<kWide>(_mm256_set1_epi32(a.corrections_at(m)[corrected]));
                const __m256i rows = in_order(widened<kWide>(dots[m][0][j]), widened<kWide>(dots[m][1][j]));
                const __m256i dot = _mm256_add_epi32(rows, correction);
                sum[m][j] = scaled(dot, w_scale, a.scales_at(m)[g], sum[m][j]);
            }
        }
    }
    for (int m = 0; m < kRows; ++m)
        for (int j = 0; j < 2; ++j) _mm256_storeu_ps(sums + m * kPanel + 8 * j, sum[m][j]);
}

// One block of 16 rows into the tile's order: 32-bit lanes hold 4 columns of a row.
void store_block(const __m256i w[2][2], uint8_t* to) {
    for (int j = 0; j < 2; ++j) {
        const __m256 a = _mm256_castsi256_ps(w[0][j]), b = _mm256_castsi256_ps(w[1][j]);
        _mm256_store_ps(reinterpret_cast<float*>(to + j * 32), _mm256_shuffle_ps(a, b, 0x88));
        _mm256_store_ps(reinterpret_cast<float*>(to + 64 + j * 32), _mm256_shuffle_ps(a, b, 0xdd));
    }
}

// kRows activation rows by one panel: sums of a part of an array in registers, fp32 sums in memory.
template <int kRows, bool kWide>
void multiply_rows(const uint8_t* w, const float* w_scales, const ActivationView& a, int64_t first_row, int64_t chunk,
                   int64_t chunks, float* sums) {
    const int part = part_of_array<kWide>(a.array_size), each = kWide ? 1 : a.parts;  // parts of an array
    const int64_t first = chunk * kChunk / part, parts = chunks * kChunk / part;
    const int8_t* entries = a.entries_at(first_row) + chunk * kChunk;
    for (int64_t p = 0; p < parts; ++p) {
        __m256i dots[kRows][2];
        for (int m = 0; m < kRows; ++m)
            dots[m][0] = dots[m][1] = _mm256_set1_epi32(a.corrections_at(first_row + m)[(first + p) * a.parts / each]);
#pragma GCC unroll 2
        for (int k = 0; k < part; k += 8, entries += 8, w += 8 * kPanel) {
            for (int m = 0; m < kRows; ++m) {
                int32_t four[2];
                std::memcpy(four, entries + m * a.stride, sizeof four);
                const __m256i columns0 = _mm256_set1_epi32(four[0]), columns1 = _mm256_set1_epi32(four[1]);
                for (int j = 0; j < 2; ++j)
                    add_products<kWide>(dots[m][j], _mm256_maddubs_epi16(_mm256_load_si256(at256(w + 32 * j)), columns0),
                                        _mm256_maddubs_epi16(_mm256_load_si256(at256(w + 64 + 32 * j)), columns1));
            }
        }
        const int64_t g = p / each;
        for (int m = 0; m < kRows; ++m)
            for (int j = 0; j < 2; ++j) {
                float* sum = sums + m * kTileRows + 8 * j;
                const __m256 w_scale = _mm256_load_ps(w_scales + g * kTileRows + 8 * j);
                const float a_scale = a.scales_at(first_row + m)[first / each + g];
                _mm256_store_ps(sum, scaled(widened<kWide>(dots[m][j]), w_scale, a_scale, _mm256_load_ps(sum)));
            }
    }
}

template <bool kWide>
void multiply_all(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
                  int64_t chunks, float* sums) {
    constexpr int kMost = 4;
    constexpr decltype(&multiply_rows<kMost, kWide>) kernels[kMost] = {
        multiply_rows<1, kWide>, multiply_rows<2, kWide>, multiply_rows<3, kWide>, multiply_rows<4, kWide>};
    for (int slot = 0; slot < kTilePanels; ++slot)
        for (int64_t m = 0; m < rows; m += kMost) {
            const int64_t n = rows - m < kMost ? rows - m : kMost;
            kernels[n - 1](tile.entries[slot], tile.scales[0] + slot * kPanel, a, first_row + m, chunk, chunks,
                           sums + m * kTileRows + slot * kPanel);
        }
}

}  // namespace

void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    constexpr decltype(&fused) kernels[kFusedRows][2] = {{fused_rows<1, false>, fused_rows<1, true>},
                                                         {fused_rows<2, false>, fused_rows<2, true>}};
    kernels[a.rows * a.planes - 1][a.wide](t, w, a, panel, sums);
}

void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile) {
    Decoder decoder(t, w, panel, chunk);
    uint8_t* to = tile->entries[slot];
    for (int64_t pair = 0; pair < chunks * 4; ++pair, to += kPairColumns * kPanel) {
        if (pair % 4 == 0) decoder.next_chunk();
        decoder.prefetch(kPrefetch);
        __m256i w8[2][2][2];  // [block][half][j]
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const __m256i codes = decoder.codes(half, j);
                w8[0][half][j] = decoder.next_block(codes, half, j);
                w8[1][half][j] = decoder.next_block(_mm256_srli_epi16(codes, 4), half, j);
            }
        decoder.next_pair();
        store_block(w8[0], to);
        store_block(w8[1], to + kBlock * kPanel);
    }
    const uint8_t* scales = w.scales_at(panel, chunk * kChunk / w.array_size);
    for (int64_t g = 0; g < chunks * kChunk / w.array_size; ++g)
        for (int j = 0; j < 2; ++j)
            _mm256_store_ps(tile->scales[g] + slot * kPanel + 8 * j, scales_of(scales + g * kPanel + 8 * j));
}

void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums) {
    (a.wide ? multiply_all<true> : multiply_all<false>)(tile, a, first_row, rows, chunk, chunks, sums);
}

}  // namespace lobcq::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
