// Products with AVX-512: codes are decoded by one byte look-up and multiplied by one byte dot product, 64 at a time.
#if defined(__x86_64__)
#include <cstring>

#include "avx512.h"

namespace lobcq::avx512 {
namespace {

// Selectors of one chunk, ready to be placed above the codes: `spread` moves each row's selector group into the row's
// 64 bits, for the two halves of the panel; vpmultishiftqb then copies any 8 bits of it to all 8 bytes of the row.
struct SelectorLayout {
    alignas(64) uint8_t spread[2][64] = {};
    alignas(64) uint8_t shift[kChunk / kBlock][64] = {};  // puts the block's selector at bits 4 and up

    constexpr explicit SelectorLayout(int bits) {
        for (int place = 0; place < 8; ++place)
            for (int i = 0; i < 8; ++i) {
                for (int half = 0; half < 2; ++half)
                    spread[half][place * 8 + i] =
                        static_cast<uint8_t>((selector_group(half, place) * 2 * bits + i) & 63);
                for (int block = 0; block < kChunk / kBlock; ++block)
                    shift[block][place * 8 + i] =
                        static_cast<uint8_t>((bits * (2 * block + selector_second(place)) - 4) & 63);
            }
    }
};

// Constants: code that ran at load time here could meet a CPU without AVX-512.
constexpr SelectorLayout kSelectorLayouts[] = {SelectorLayout(0), SelectorLayout(1), SelectorLayout(2),
                                               SelectorLayout(3), SelectorLayout(4)};

// 8 columns of 16 rows: 4 columns of row n in 32-bit lane n, first columns 0..3, then 4..7. Biased entries.
struct Block {
    __m512i first, second;
};

// Decodes block pairs of one panel in order. Without selectors (one codebook) all look-ups go to codebook 0, repeated
// in the table; with 1 or 2 bits, bits above the selector are the next one's, and the table is repeated for that too.
template <bool kSixteen>
class Decoder {
  public:
    Decoder(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk)
        : table_(t), layout_(kSelectorLayouts[w.bits]), codes_(w.codes_at(panel, chunk)),
          selectors_(w.selectors_at(panel, chunk)), chunk_selectors_(w.chunk_selectors()) {
        for (int half = 0; half < 2; ++half) spread_[half] = _mm512_load_si512(layout_.spread[half]);
    }

    void next_chunk() {
        const __m512i raw = _mm512_loadu_si512(selectors_);
        for (int half = 0; half < 2; ++half) group_[half] = _mm512_permutexvar_epi8(spread_[half], raw);
        selectors_ += chunk_selectors_;
    }

    // `pair` (0..3) is the block pair's place in its chunk.
    void next(int pair, Block* low, Block* high) {
        __m512i w[2][2];
        for (int half = 0; half < 2; ++half) {
            const __m512i codes = _mm512_loadu_si512(codes_ + half * kChunk);
            w[half][0] = look_up(codes, half, 2 * pair);
            w[half][1] = look_up(_mm512_srli_epi16(codes, 4), half, 2 * pair + 1);
        }
        codes_ += kPairBytes;
        *low = in_order(w[0][0], w[1][0]);
        *high = in_order(w[0][1], w[1][1]);
    }

    void prefetch(int64_t bytes) const {
        _mm_prefetch(reinterpret_cast<const char*>(codes_ + bytes), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(codes_ + bytes + 64), _MM_HINT_T0);
    }

  private:
    __m512i look_up(__m512i codes, int half, int block) const {
        const __m512i selector = _mm512_multishift_epi64_epi8(_mm512_load_si512(layout_.shift[block]), group_[half]);
        // 0x0f ? codes : selector, bit by bit.
        const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), codes, selector, 0xca);
        return table_.template look_up<kSixteen>(index);
    }

    static Block in_order(__m512i half0, __m512i half1) {
        const __m512 a = _mm512_castsi512_ps(half0), b = _mm512_castsi512_ps(half1);
        return {_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd))};
    }

    EntryTable table_;
    const SelectorLayout& layout_;
    __m512i spread_[2], group_[2];
    const uint8_t *codes_, *selectors_;
    int64_t chunk_selectors_;
};

// 16 E4M3 bytes, not negative and not NaN, as fp32 times 2^-8: moved into place they are fp16 numbers times 2^-8.
__m512 scales_of(const uint8_t* bytes) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_slli_epi16(wide, 7)), _mm512_set1_ps(256.0f));
}

// Four activation entries to every lane.
__m512i four_columns(const int8_t* a) {
    int32_t four;
    std::memcpy(&four, a, sizeof four);
    return _mm512_set1_epi32(four);
}

__m512 scaled(__m512i dot, __m512 w_scale, float a_scale, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(w_scale, _mm512_set1_ps(a_scale)), sum);
}

constexpr int64_t kPrefetch = 4096 + 512;  // bytes ahead: into the next page, where hardware prefetchers stop

// Brings the codes of the next kStreams panels into the L2 cache while the kStreams panels before them are multiplied:
// side by side, an equal part of each of them meanwhile. Memory delivers several streams faster than a single one.
class PanelsAhead {
  public:
    PanelsAhead(const WeightView& w, int64_t panel)
        : apart_(w.chunks * kChunkCodes),
          next_(reinterpret_cast<intptr_t>(w.codes) + (panel / kStreams + 1) * kStreams * apart_ +
                panel % kStreams * (w.chunks / kStreams) * kChunkCodes) {}

    // To be called once a chunk. Behind the last panel there is nothing to read, and prefetching it does no harm.
    void prefetch() {
#pragma GCC unroll 4
        for (int i = 0; i < kStreams; ++i)
            for (int line = 0; line < kChunkCodes / kStreams; line += kAlign)
                _mm_prefetch(reinterpret_cast<const char*>(next_ + i * apart_ + line), _MM_HINT_T1);
        next_ += kChunkCodes / kStreams;
    }

  private:
    static constexpr int kStreams = 4;
    int64_t apart_;
    intptr_t next_;
};

// Rows up to which sums stay in registers beside the products of an array; of more rows they are in the L1 cache.
constexpr int kRegisterRows = 8;

template <int kRows, bool kSixteen>
void fused_rows(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    Decoder<kSixteen> decoder(t, w, panel, 0);
    const int pairs = w.array_size / kPairColumns;
    constexpr bool kRegisters = kRows <= kRegisterRows;
    __m512 sum[kRegisters ? kRows : 1];
    for (int m = 0; m < kRows; ++m) {
        if (kRegisters) sum[m] = _mm512_setzero_ps();
        else _mm512_storeu_ps(sums + m * kPanel, _mm512_setzero_ps());
    }
    PanelsAhead ahead(w, panel);
    const int8_t* entries = a.entries;
    int64_t pair = 0;
    for (int64_t g = 0; g < w.arrays; ++g) {
        __m512i dot[kRows];
        for (int m = 0; m < kRows; ++m) dot[m] = _mm512_set1_epi32(a.corrections_at(m)[g * a.parts]);
        for (int i = 0; i < pairs; ++i, ++pair, entries += kPairColumns) {
            if (pair % 4 == 0) {
                decoder.next_chunk();
                ahead.prefetch();
            }
            decoder.prefetch(kPrefetch);
            Block low, high;
            decoder.next(static_cast<int>(pair % 4), &low, &high);
#pragma GCC unroll 16
            for (int m = 0; m < kRows; ++m) {
                const int8_t* row = entries + m * a.stride;
                dot[m] = _mm512_dpbusd_epi32(dot[m], low.first, four_columns(row));
                dot[m] = _mm512_dpbusd_epi32(dot[m], low.second, four_columns(row + 4));
                dot[m] = _mm512_dpbusd_epi32(dot[m], high.first, four_columns(row + 8));
                dot[m] = _mm512_dpbusd_epi32(dot[m], high.second, four_columns(row + 12));
            }
        }
        const __m512 w_scale = scales_of(w.scales_at(panel, g));
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const float a_scale = a.scales_at(m)[g];
            float* to = sums + m * kPanel;
            if (kRegisters) sum[m] = scaled(dot[m], w_scale, a_scale, sum[m]);
            else _mm512_storeu_ps(to, scaled(dot[m], w_scale, a_scale, _mm512_loadu_ps(to)));
        }
    }
    for (int m = 0; kRegisters && m < kRows; ++m) _mm512_storeu_ps(sums + m * kPanel, sum[m]);
}

template <bool kSixteen>
void decode_panel(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, uint8_t* to) {
    Decoder<kSixteen> decoder(t, w, panel, chunk);
    for (int64_t c = 0; c < chunks; ++c) {
        decoder.next_chunk();
        for (int pair = 0; pair < 4; ++pair, to += kPairColumns * kPanel) {
            Block low, high;
            decoder.prefetch(kPrefetch);
            decoder.next(pair, &low, &high);
            _mm512_store_si512(to, low.first);
            _mm512_store_si512(to + 64, low.second);
            _mm512_store_si512(to + 128, high.first);
            _mm512_store_si512(to + 192, high.second);
        }
    }
}

// kRows activation rows by 32 weight rows: 12 accumulators of each kind stay in registers.
template <int kRows>
void multiply_rows(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t chunk, int64_t chunks,
                   float* sums) {
    const int64_t array = chunk * kChunk / a.array_size, arrays = chunks * kChunk / a.array_size;
    const uint8_t* w = tile.entries[0];
    const int8_t* entries = a.entries_at(first_row) + chunk * kChunk;
    __m512 sum[kRows][2];
    for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < 2; ++v) sum[m][v] = _mm512_load_ps(sums + m * kTileRows + v * kPanel);
    for (int64_t g = 0; g < arrays; ++g) {
        __m512i dot[kRows][2];
        for (int m = 0; m < kRows; ++m)
            dot[m][0] = dot[m][1] = _mm512_set1_epi32(a.corrections_at(first_row + m)[(array + g) * a.parts]);
        for (int i = 0; i < a.array_size / 16; ++i, entries += 16, w += 16 * kPanel) {
#pragma GCC unroll 4
            for (int k = 0; k < 16; k += 4) {
                const __m512i w0 = _mm512_load_si512(w + k * kPanel);
                const __m512i w1 = _mm512_load_si512(w + k * kPanel + kTileColumns * kPanel);
#pragma GCC unroll 6
                for (int m = 0; m < kRows; ++m) {
                    const __m512i four = four_columns(entries + m * a.stride + k);
                    dot[m][0] = _mm512_dpbusd_epi32(dot[m][0], w0, four);
                    dot[m][1] = _mm512_dpbusd_epi32(dot[m][1], w1, four);
                }
            }
        }
        const __m512 s0 = _mm512_load_ps(tile.scales[g]), s1 = _mm512_load_ps(tile.scales[g] + kPanel);
#pragma GCC unroll 6
        for (int m = 0; m < kRows; ++m) {
            const float a_scale = a.scales_at(first_row + m)[array + g];
            sum[m][0] = scaled(dot[m][0], s0, a_scale, sum[m][0]);
            sum[m][1] = scaled(dot[m][1], s1, a_scale, sum[m][1]);
        }
    }
    for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < 2; ++v) _mm512_store_ps(sums + m * kTileRows + v * kPanel, sum[m][v]);
}

template <bool kSixteen>
void fused_any(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    constexpr decltype(&fused) kernels[kFusedRows] = {
        fused_rows<1, kSixteen>, fused_rows<2, kSixteen>, fused_rows<3, kSixteen>, fused_rows<4, kSixteen>,
        fused_rows<5, kSixteen>, fused_rows<6, kSixteen>, fused_rows<7, kSixteen>, fused_rows<8, kSixteen>,
        fused_rows<9, kSixteen>, fused_rows<10, kSixteen>, fused_rows<11, kSixteen>, fused_rows<12, kSixteen>,
        fused_rows<13, kSixteen>, fused_rows<14, kSixteen>, fused_rows<15, kSixteen>, fused_rows<16, kSixteen>};
    kernels[a.rows * a.planes - 1](t, w, a, panel, sums);
}

}  // namespace

void fused(const Tables& t, const WeightView& w, const ActivationView& a, int64_t panel, float* sums) {
    (w.bits == 4 ? fused_any<true> : fused_any<false>)(t, w, a, panel, sums);
}

void decode(const Tables& t, const WeightView& w, int64_t panel, int64_t chunk, int64_t chunks, int slot,
            WeightTile* tile) {
    (w.bits == 4 ? decode_panel<true> : decode_panel<false>)(t, w, panel, chunk, chunks, tile->entries[slot]);
    const uint8_t* scales = w.scales_at(panel, chunk * kChunk / w.array_size);
    for (int64_t g = 0; g < chunks * kChunk / w.array_size; ++g)
        _mm512_store_ps(tile->scales[g] + slot * kPanel, scales_of(scales + g * kPanel));
}

void multiply(const WeightTile& tile, const ActivationView& a, int64_t first_row, int64_t rows, int64_t chunk,
              int64_t chunks, float* sums) {
    constexpr int kMost = 6;
    constexpr decltype(&multiply_rows<kMost>) kernels[kMost] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                                                multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};
    for (int64_t m = 0; m < rows; m += kMost) {
        const int64_t n = rows - m < kMost ? rows - m : kMost;
        kernels[n - 1](tile, a, first_row + m, chunk, chunks, sums + m * kTileRows);
    }
}

}  // namespace lobcq::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
