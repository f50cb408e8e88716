#include "pack.h"

#include "packed_row.h"
#include "pages.h"

namespace lobcq {
namespace {

constexpr int kChunkBlocks = kChunk / kBlock;
constexpr int kChunkPairs = kChunk / kPairColumns;
constexpr uint64_t kLowNibbles = 0x0f0f0f0f0f0f0f0f;

// What a chunk has of one row: the codes of each block pair as they are stored, and 8 selectors.
struct Part {
    uint64_t pairs[kChunkPairs], selectors;
};

// Bytes 2 and 3 with bytes 4 and 5, then within each half the second byte with the third: the two halves' bytes in
// turns. Each step is its own inverse.
constexpr uint64_t swap_middle(uint64_t x) {
    const uint64_t moved = (x ^ x >> 16) & 0x00000000ffff0000;
    return x ^ moved ^ moved << 16;
}
constexpr uint64_t swap_seconds(uint64_t x) {
    const uint64_t moved = (x ^ x >> 8) & 0x0000ff000000ff00;
    return x ^ moved ^ moved << 8;
}

// Two blocks of eight nibbles, one after the other, to bytes of a nibble of each; and back.
constexpr uint64_t zip_nibbles(uint64_t blocks) {
    const uint64_t even = blocks & kLowNibbles, odd = blocks >> 4 & kLowNibbles;
    const uint64_t evens = (even | even >> 28) & 0xffffffff, odds = (odd | odd >> 28) & 0xffffffff;
    return swap_seconds(swap_middle(evens | odds << 32));
}
constexpr uint64_t unzip_nibbles(uint64_t bytes) {
    const uint64_t turns = swap_middle(swap_seconds(bytes));
    const uint64_t evens = turns & 0xffffffff, odds = turns >> 32;
    return ((evens | evens << 28) & kLowNibbles) | ((odds | odds << 28) & kLowNibbles) << 4;
}

// `count` ones of `bits` bits each, that many bits apart.
constexpr uint64_t repeated(int bits, int apart, int count) {
    uint64_t mask = 0;
    for (int i = 0; i < count; ++i) mask |= ((uint64_t{1} << bits) - 1) << (i * apart);
    return mask;
}

// Eight selectors with as many zero bits behind each of them, and back; other bits are dropped.
template <int bits>
constexpr uint64_t spread_selectors(uint64_t x) {
    x = (x | x << 4 * bits) & repeated(4 * bits, 8 * bits, 2);
    x = (x | x << 2 * bits) & repeated(2 * bits, 4 * bits, 4);
    return (x | x << bits) & repeated(bits, 2 * bits, 8);
}
template <int bits>
constexpr uint64_t gather_selectors(uint64_t x) {
    x &= repeated(bits, 2 * bits, 8);
    x = (x | x >> bits) & repeated(2 * bits, 4 * bits, 4);
    x = (x | x >> 2 * bits) & repeated(4 * bits, 8 * bits, 2);
    return (x | x >> 4 * bits) & repeated(8 * bits, 8 * bits, 1);
}

// One row of the packed weight, of no blocks where the panel reaches behind the last row.
struct Row {
    uint8_t *codes, *selectors, *scales;
    int64_t blocks;

    // How many blocks of a chunk it has.
    int64_t blocks_in(int64_t chunk) const {
        const int64_t left = blocks - chunk * kChunkBlocks;
        return left < 0 ? 0 : left < kChunkBlocks ? left : kChunkBlocks;
    }
};

// A number of n bytes, little-endian. Put together in registers: a load that is wider than the store before it waits.
template <int n>
uint64_t load_word(const uint8_t* from) {
    uint64_t word = 0;
    for (int i = 0; i < n; ++i) word |= uint64_t{from[i]} << 8 * i;
    return word;
}

template <int n>
void store_word(uint64_t word, uint8_t* to) {
    for (int i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(word >> 8 * i);
}

// For what is read soon: hardware prefetchers stop where a row ends. It may lie behind the last byte there is.
inline void prefetch(const uint8_t* from, int64_t bytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes)));
}

// The part of a row that may end within the chunk, zeros behind its end.
template <int bits>
Part load_part(const Row& row, int64_t chunk) {
    Part part = {};
    const int64_t blocks = row.blocks_in(chunk);
    if (blocks == kChunkBlocks) {
        std::memcpy(part.pairs, row.codes + chunk * kChunk / 2, sizeof part.pairs);
        part.selectors = load_word<bits>(row.selectors + chunk * bits);
    } else if (blocks) {
        std::memcpy(part.pairs, row.codes + chunk * kChunk / 2, static_cast<size_t>(blocks * kBlock / 2));
        if constexpr (bits > 0) part.selectors = load_bytes(row.selectors + chunk * bits, ceil_div(blocks * bits, 8));
    }
    return part;
}

template <int bits>
void store_part(const Part& part, const Row& row, int64_t chunk) {
    const int64_t blocks = row.blocks_in(chunk);
    if (blocks == kChunkBlocks) {
        std::memcpy(row.codes + chunk * kChunk / 2, part.pairs, sizeof part.pairs);
        store_word<bits>(part.selectors, row.selectors + chunk * bits);
    } else if (blocks) {
        std::memcpy(row.codes + chunk * kChunk / 2, part.pairs, static_cast<size_t>(blocks * kBlock / 2));
        const auto bytes = static_cast<size_t>(ceil_div(blocks * bits, 8));
        if constexpr (bits > 0) std::memcpy(row.selectors + chunk * bits, &part.selectors, bytes);
    }
}

// Where the codes of a row lie in a chunk, those of a block pair after those of the one before.
inline uint8_t* codes_of(const WeightView& w, int64_t panel, int64_t chunk, int half, int place) {
    return w.codes_at(panel, chunk) + half * kChunk + place * kBlock;
}

template <int bits>
void pack_chunk(const Row* rows, const WeightView& w, int64_t panel, int64_t chunk, int64_t next_panel) {
    uint64_t groups[kBlock] = {};
    for (int half = 0; half < 2; ++half)
        for (int place = 0; place < 8; ++place) {
            const Row& row = rows[row_at(half, place)];
            prefetch(row.codes, chunk * kChunk / 2 + next_panel);
            const Part part = load_part<bits>(row, chunk);
            uint8_t* codes = codes_of(w, panel, chunk, half, place);
            for (int pair = 0; pair < kChunkPairs; ++pair) {
                const uint64_t bytes = zip_nibbles(part.pairs[pair]);
                std::memcpy(codes + pair * kPairBytes, &bytes, sizeof bytes);
            }
            groups[selector_group(half, place)] |= spread_selectors<bits>(part.selectors)
                                                   << (bits * selector_second(place));
        }
    for (int g = 0; g < kBlock; ++g) store_word<2 * bits>(groups[g], w.selectors_at(panel, chunk) + g * 2 * bits);
}

template <int bits>
void unpack_chunk(const WeightView& w, const Row* rows, int64_t panel, int64_t chunk) {
    for (int half = 0; half < 2; ++half)
        for (int place = 0; place < 8; ++place) {
            const uint8_t* codes = codes_of(w, panel, chunk, half, place);
            Part part;
            for (int pair = 0; pair < kChunkPairs; ++pair)
                part.pairs[pair] = unzip_nibbles(load_bytes(codes + pair * kPairBytes, kBlock));
            const uint64_t group =
                load_word<2 * bits>(w.selectors_at(panel, chunk) + selector_group(half, place) * 2 * bits);
            part.selectors = gather_selectors<bits>(group >> (bits * selector_second(place)));
            store_part<bits>(part, rows[row_at(half, place)], chunk);
        }
}

// Scales are finite and not negative, and the bits behind the last selector are zero.
bool plausible(const Row& row, const PackedRow& bytes, int bits) {
    uint8_t worst = 0;
    for (int64_t g = 0; g < bytes.scales; ++g) worst = row.scales[g] > worst ? row.scales[g] : worst;
    const int64_t used = bytes.blocks * bits % 8;
    return worst < kScaleNaN && (used == 0 || row.selectors[bytes.selectors - 1] >> used == 0);
}

struct Panel {
    Row rows[kPanel];

    Panel(const lobcq_packed& packed, const PackedRow& bytes, int64_t panel) {
        for (int n = 0; n < kPanel; ++n) {
            const int64_t row = panel * kPanel + n;
            rows[n] = row < packed.rows ? Row{packed.codes + row * bytes.codes, packed.selectors + row * bytes.selectors,
                                              packed.scales + row * bytes.scales, bytes.blocks}
                                        : Row{nullptr, nullptr, nullptr, 0};
        }
    }
};

template <int bits>
bool pack(const lobcq_packed& packed, const WeightView& w, int64_t begin, int64_t end) {
    const PackedRow bytes(packed.columns, packed.num_codebooks, packed.array_size);
    for (int64_t panel = begin; panel < end; ++panel) {
        const Panel from(packed, bytes, panel);
        for (int n = 0; n < kPanel; ++n) {
            const Row& row = from.rows[n];
            if (row.blocks && !plausible(row, bytes, bits)) return false;
            for (int64_t g = 0; g < w.arrays; ++g)
                w.scales_at(panel, g)[n] = row.blocks && g < bytes.scales ? row.scales[g] : uint8_t{0};
        }
        for (int64_t chunk = 0; chunk < w.chunks; ++chunk) pack_chunk<bits>(from.rows, w, panel, chunk, kPanel * bytes.codes);
    }
    return true;
}

template <int bits>
void unpack(const WeightView& w, const lobcq_packed& packed, int64_t begin, int64_t end) {
    const PackedRow bytes(packed.columns, packed.num_codebooks, packed.array_size);
    for (int64_t panel = begin; panel < end; ++panel) {
        const Panel to(packed, bytes, panel);
        for (int64_t chunk = 0; chunk < w.chunks; ++chunk) unpack_chunk<bits>(w, to.rows, panel, chunk);
        for (const Row& row : to.rows)
            for (int64_t g = 0; row.blocks && g < bytes.scales; ++g)
                row.scales[g] = w.scales_at(panel, g)[&row - to.rows];
    }
}

}  // namespace

void ask_for_large_pages([[maybe_unused]] const WeightView& w) {
#if defined(__linux__)
    constexpr int64_t kLargePage = 2 << 20;
    if (w.bytes >= kLargePage) WholePages(w.codes, w.bytes).advise(MADV_HUGEPAGE);  // refused: pages stay small
#endif
}

bool pack_weight(const lobcq_packed& packed, const WeightView& w, int64_t begin, int64_t end) {
    constexpr bool (*of_bits[])(const lobcq_packed&, const WeightView&, int64_t, int64_t) = {pack<0>, pack<1>, pack<2>,
                                                                                            pack<3>, pack<4>};
    return of_bits[w.bits](packed, w, begin, end);
}

void unpack_weight(const WeightView& w, const lobcq_packed& packed, int64_t begin, int64_t end) {
    constexpr void (*of_bits[])(const WeightView&, const lobcq_packed&, int64_t, int64_t) = {unpack<0>, unpack<1>,
                                                                                           unpack<2>, unpack<3>, unpack<4>};
    of_bits[w.bits](w, packed, begin, end);
}

}  // namespace lobcq
