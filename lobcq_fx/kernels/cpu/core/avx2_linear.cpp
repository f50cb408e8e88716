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
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "avx2.h"

namespace lobcq::avx2 {
namespace {

const __m256i* at256(const void* p) { return static_cast<const __m256i*>(p); }

// In the order written: GCC would regroup a chain of additions, which spills registers.
void add16(__m256i& sum, __m256i x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }
void add32(__m256i& sum, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }

constexpr int kAnyBits = -1;  // of a selector: known when the weight is

// Decodes a quarter of a panel: places 4 j to 4 j + 3 of a half, in 8 columns each. With kBits known, where arrays have
// a chunk or more, the shifts of its selectors are constants.
template <int kBits>
class Quarter {
  public:
    Quarter(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int half, int j)
        : pairs_(t.pairs[0][0]), codes_(w.codes_at(panel, chunk) + half * kChunk + j * 32),
          selectors_(w.selectors_at(panel, chunk) + (half * 4 + j * 2) * 2 * w.bits), group_bits_(2 * w.bits) {}

    // Selectors of the chunk that comes `chunks` after the first.
    void to_chunk(int64_t chunks) {
        for (int i = 0; i < 2; ++i)
            std::memcpy(&groups_[i], selectors_ + (8 * chunks + i) * group_bits(), sizeof groups_[i]);
    }

    // Two blocks in a row: the pair that comes `pairs` after the first, the `place`-th of its chunk.
    void decode(int64_t pairs, int place, __m256i* low, __m256i* high) const {
        const __m256i codes = _mm256_loadu_si256(at256(codes_ + pairs * kPairBytes));
        *low = block(codes, 2 * place);
        *high = block(_mm256_srli_epi16(codes, 4), 2 * place + 1);
    }

    void prefetch(int64_t bytes) const {
        _mm_prefetch(reinterpret_cast<const char*>(codes_ + bytes), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(codes_ + bytes + 64), _MM_HINT_T0);
    }

  private:
    int group_bits() const { return kBits == kAnyBits ? group_bits_ : 2 * kBits; }

    // The codes are in the low nibbles.
    __m256i block(__m256i codes, int place) const {
        const __m256i index = _mm256_and_si256(codes, _mm256_set1_epi8(0x0f));
        const __m256i even = _mm256_shuffle_epi8(table(groups_[0], place), index);
        const __m256i odd = _mm256_shuffle_epi8(table(groups_[1], place), index);
        return _mm256_blend_epi32(even, odd, 0xcc);
    }

    // Of a block's two codebooks.
    __m256i table(uint64_t group, int place) const {
        constexpr int kShift = 5;
        static_assert(sizeof(__m256i) == 1 << kShift);
        const uint64_t mask = ((uint64_t{1} << group_bits()) - 1) << kShift;
        // A rotation, unlike a shift by a constant, has an instruction that writes another register.
        const uint64_t offset = std::rotr(group, place * group_bits() - kShift) & mask;
        return _mm256_load_si256(at256(pairs_ + offset));
    }

    const uint8_t *pairs_, *codes_, *selectors_;
    uint64_t groups_[2];
    int group_bits_;
};

constexpr int64_t kPrefetch = 4096 + 512;  // bytes ahead: into the next page, where hardware prefetchers stop

__m256i widen(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

// 8 E4M3 bytes, not negative and not NaN, as fp32: moved into place they are fp16 numbers times 2^-8.
__m256 scales_of(const uint8_t* bytes) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_slli_epi16(wide, 7)), _mm256_set1_ps(256.0f));
}

// Four activation entries to every lane.
__m256i four_columns(const int8_t* a) {
    int32_t four;
    std::memcpy(&four, a, sizeof four);
    return _mm256_set1_epi32(four);
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
        add32(dot, widen(_mm256_add_epi16(first, second)));
    } else {
        add16(dot, first);
        add16(dot, second);
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

// Products of kRows activation rows with a part of an array, from `pair` on, of as many quarters as their sums leave
// registers for: for each of a quarter's 4 weight rows four 16-bit lanes, or two wide ones.
template <int kRows, int kQuarters, bool kWide, int kBits>
void add_quarters(Quarter<kBits>* quarters, const ActivationView& a, int64_t pair, int pairs, __m256i (*dots)[kRows]) {
    constexpr int kChunkPairs = kChunk / kPairColumns;
    const int8_t* entries = a.entries + pair * kPairColumns;
    __m256i sums[kQuarters][kRows];  // in registers: every loop over them is unrolled
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q)
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sums[q][m] = _mm256_setzero_si256();
    const int each = kBits == kAnyBits && pairs < kChunkPairs ? pairs : kChunkPairs;
    for (const int64_t end = pair + pairs; pair < end; pair += each) {
        for (int q = 0; q < kQuarters; ++q) quarters[q].to_chunk(pair / kChunkPairs);
        const int first = kBits == kAnyBits ? static_cast<int>(pair % kChunkPairs) : 0;
#pragma GCC unroll 4
        for (int i = 0; i < (kBits == kAnyBits ? each : kChunkPairs); ++i, entries += kPairColumns) {
#pragma GCC unroll 4
            for (int q = 0; q < kQuarters; ++q) {
                __m256i w0, w1;
                quarters[q].decode(pair + i, first + i, &w0, &w1);
#pragma GCC unroll 8
                for (int m = 0; m < kRows; ++m) {
                    int64_t eight[2];
                    std::memcpy(eight, entries + m * a.stride, sizeof eight);
                    add_products<kWide>(sums[q][m], _mm256_maddubs_epi16(w0, _mm256_set1_epi64x(eight[0])),
                                        _mm256_maddubs_epi16(w1, _mm256_set1_epi64x(eight[1])));
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQuarters; ++q)
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) dots[q][m] = sums[q][m];
}

// Here a 16-bit lane sums at most 16 products of biased entries, 63 * 32 each: it cannot wrap around, and corrections
// are made in 32 bits.
template <int kRows, bool kWide, int kBits>
void fused_rows(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    constexpr int kTogether = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
    Quarter<kBits> quarters[4] = {{t, w, panel, 0, 0, 0}, {t, w, panel, 0, 1, 0}, {t, w, panel, 0, 0, 1},
                                  {t, w, panel, 0, 1, 1}};
    const int pairs = part_of_array<kWide>(w.array_size) / kPairColumns, parts = kWide ? 1 : a.parts;
    const int32_t* corrections = a.corrections;
    std::memset(sums, 0, kRows * kPanel * sizeof(float));
    int64_t pair = 0;
    for (int64_t g = 0; g < w.arrays; ++g, corrections += a.parts)
        for (int part = 0; part < parts; ++part, pair += pairs) {
            for (int i = 0; i < pairs; ++i) quarters[0].prefetch((pair + i) * kPairBytes + kPrefetch);
            __m256i dots[4][kRows];
            for (int q = 0; q < 4; q += kTogether)
                add_quarters<kRows, kTogether, kWide>(quarters + q, a, pair, pairs, dots + q);
            for (int j = 0; j < 2; ++j) {
                const __m256 w_scale = scales_of(w.scales_at(panel, g) + 8 * j);
                for (int m = 0; m < kRows; ++m) {
                    float* sum = sums + m * kPanel + 8 * j;
                    const int32_t correction = corrections[m * a.arrays * a.parts + part];
                    const __m256i rows = in_order(widened<kWide>(dots[2 * j][m]), widened<kWide>(dots[2 * j + 1][m]));
                    const __m256i dot = _mm256_add_epi32(rows, widened<kWide>(_mm256_set1_epi32(correction)));
                    _mm256_storeu_ps(sum, scaled(dot, w_scale, a.scales_at(m)[g], _mm256_loadu_ps(sum)));
                }
            }
        }
}

// One block of 8 rows into the tile's order: 32-bit lanes hold 4 columns of a row.
void store_block(__m256i half0, __m256i half1, uint8_t* to) {
    const __m256 a = _mm256_castsi256_ps(half0), b = _mm256_castsi256_ps(half1);
    _mm256_store_ps(reinterpret_cast<float*>(to), _mm256_shuffle_ps(a, b, 0x88));
    _mm256_store_ps(reinterpret_cast<float*>(to + 64), _mm256_shuffle_ps(a, b, 0xdd));
}

template <int kBits>
void decode_panel(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, uint8_t* to) {
    for (int64_t c = 0; c < chunks; ++c, to += kChunk * kPanel)
        for (int j = 0; j < 2; ++j) {
            Quarter<kBits> half0(t, w, panel, chunk + c, 0, j), half1(t, w, panel, chunk + c, 1, j);
            half0.to_chunk(0);
            half1.to_chunk(0);
#pragma GCC unroll 4
            for (int pair = 0; pair < kChunk / kPairColumns; ++pair) {
                if (j == 0) half0.prefetch(pair * kPairBytes + kPrefetch);
                __m256i low[2], high[2];
                half0.decode(pair, pair, &low[0], &high[0]);
                half1.decode(pair, pair, &low[1], &high[1]);
                uint8_t* pair_to = to + pair * kPairColumns * kPanel + j * 32;
                store_block(low[0], low[1], pair_to);
                store_block(high[0], high[1], pair_to + kBlock * kPanel);
            }
        }
}

// Adds the products of 4 columns, or 8 that are wide, of kRows activation rows by one panel.
template <int kRows>
void add_narrow(const uint8_t* w, const int8_t* entries, int64_t stride, __m256i (&dots)[kRows][2]) {
    const __m256i w0 = _mm256_load_si256(at256(w)), w1 = _mm256_load_si256(at256(w + 32));
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
        const __m256i four = four_columns(entries + m * stride);
        add16(dots[m][0], _mm256_maddubs_epi16(w0, four));
        add16(dots[m][1], _mm256_maddubs_epi16(w1, four));
    }
}

template <int kRows>
void add_wide(const uint8_t* w, const int8_t* entries, int64_t stride, __m256i (&dots)[kRows][2]) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
        const __m256i w0 = _mm256_load_si256(at256(w + 32 * j)), w1 = _mm256_load_si256(at256(w + 64 + 32 * j));
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m)
            add_products<true>(dots[m][j], _mm256_maddubs_epi16(w0, four_columns(entries + m * stride)),
                               _mm256_maddubs_epi16(w1, four_columns(entries + m * stride + 4)));
    }
}

// kRows activation rows by one panel: sums of a part of an array in registers, of 12 narrow or 8 wide, fp32 sums in
// memory. kPart is the part's size, 0 where it is smaller than usual.
template <int kRows, bool kWide, int kPart>
void multiply_rows(const uint8_t* w, const float* w_scales, const ActivationView& a, int64_t first_row, int64_t chunk,
                   int64_t chunks, float* sums) {
    constexpr int kStep = kWide ? 8 : 4;
    const int part = kPart ? kPart : part_of_array<kWide>(a.array_size);
    const int halved = !kWide && a.array_size > part;  // into two parts, each with a correction
    const int64_t columns = chunk * kChunk, array = columns / a.array_size;
    const int64_t scale_stride = a.arrays, correction_stride = a.arrays * a.parts;
    const int8_t* entries = a.entries_at(first_row) + columns;
    const float* scales = a.scales_at(first_row) + array;
    const int32_t* corrections = a.corrections_at(first_row) + array * a.parts;
    for (int64_t p = 0, parts = chunks * kChunk / part; p < parts; ++p) {
        __m256i dots[kRows][2];  // in registers: every loop over them is unrolled
#pragma GCC unroll 6
        for (int m = 0; m < kRows; ++m)
            dots[m][0] = dots[m][1] =
                _mm256_set1_epi32(corrections[m * correction_stride + (kWide ? p * a.parts : p)]);
#pragma GCC unroll 2
        for (int k = 0; k < part; k += kStep, entries += kStep, w += kStep * kPanel) {
            if constexpr (kWide) add_wide<kRows>(w, entries, a.stride, dots);
            else add_narrow<kRows>(w, entries, a.stride, dots);
        }
        const int64_t g = p >> halved;
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m256 w_scale = _mm256_load_ps(w_scales + g * kTileRows + 8 * j);
#pragma GCC unroll 6
            for (int m = 0; m < kRows; ++m) {
                float* sum = sums + m * kTileRows + 8 * j;
                const float a_scale = scales[m * scale_stride + g];
                _mm256_store_ps(sum, scaled(widened<kWide>(dots[m][j]), w_scale, a_scale, _mm256_load_ps(sum)));
            }
        }
    }
}

// For 1 row, 2 rows and so on.
template <bool kWide, int kPart, int... kRows>
constexpr auto multipliers(std::integer_sequence<int, kRows...>) {
    return std::array{&multiply_rows<kRows + 1, kWide, kPart>...};
}

template <bool kWide>
void multiply_all(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
                  int64_t chunks, float* sums) {
    constexpr int kMost = kWide ? 4 : 6;
    using Rows = std::make_integer_sequence<int, kMost>;
    constexpr auto usual = multipliers<kWide, kChunk>(Rows()), others = multipliers<kWide, 0>(Rows());
    const auto& kernels = part_of_array<kWide>(a.array_size) == kChunk ? usual : others;
    for (int slot = 0; slot < kTilePanels; ++slot)
        for (int64_t m = 0; m < rows; m += kMost) {
            const int64_t n = rows - m < kMost ? rows - m : kMost;
            kernels[static_cast<size_t>(n - 1)](tile.entries[slot], tile.scales[0] + slot * kPanel, a, first_row + m,
                                                chunk, chunks, sums + m * kTileRows + slot * kPanel);
        }
}

template <bool kWide, int kBits, int... kRows>
constexpr auto fused_kernels(std::integer_sequence<int, kRows...>) {
    return std::array{&fused_rows<kRows + 1, kWide, kBits>...};
}

template <bool kWide>
void fused_any(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    using Rows = std::make_integer_sequence<int, kFusedRows>;
    constexpr auto eight = fused_kernels<kWide, 3>(Rows()), sixteen = fused_kernels<kWide, 4>(Rows()),
                   others = fused_kernels<kWide, kAnyBits>(Rows());
    const auto& kernels = w.array_size < kChunk ? others : w.bits == 3 ? eight : w.bits == 4 ? sixteen : others;
    kernels[static_cast<size_t>(a.rows * a.planes - 1)](t, w, a, panel, sums);
}

}  // namespace

void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    (a.wide ? fused_any<true> : fused_any<false>)(t, w, a, panel, sums);
}

void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile) {
    const auto panel_decoder = w.bits == 3 ? decode_panel<3> : w.bits == 4 ? decode_panel<4> : decode_panel<kAnyBits>;
    panel_decoder(t, w, panel, chunk, chunks, tile->entries[slot]);
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
