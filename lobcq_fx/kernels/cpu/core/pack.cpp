#include "pack.h"

#include "packed_row.h"

namespace lobcq {
namespace {

constexpr int kChunkBlocks = kChunk / kBlock;
constexpr uint64_t kLowNibbles = 0x0f0f0f0f0f0f0f0f;

// Eight nibbles, one a byte, and back.
uint64_t spread_nibbles(uint32_t packed) {
    uint64_t x = packed;
    x = (x | x << 16) & 0x0000ffff0000ffff;
    x = (x | x << 8) & 0x00ff00ff00ff00ff;
    return (x | x << 4) & kLowNibbles;
}

uint32_t gather_nibbles(uint64_t x) {
    x &= kLowNibbles;
    x = (x | x >> 4) & 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return static_cast<uint32_t>(x | x >> 16);
}

// One row of the packed weight, or of zeros where the panel reaches behind the last row.
struct Row {
    const uint8_t *codes, *selectors, *scales;
    int64_t blocks;

    uint32_t block_codes(int64_t block) const {
        return block < blocks ? static_cast<uint32_t>(load_bytes(codes + block * kBlock / 2, kBlock / 2)) : 0;
    }
    uint64_t selector(int64_t block, int bits) const {
        return block < blocks ? static_cast<uint64_t>(selector_at(selectors, block, bits)) : 0;
    }
};

Row row_of(const lobcq_packed& packed, const PackedRow& bytes, int64_t row) {
    if (row >= packed.rows) return {nullptr, nullptr, nullptr, 0};
    return {packed.codes + row * bytes.codes, packed.selectors + row * bytes.selectors,
            packed.scales + row * bytes.scales, bytes.blocks};
}

void pack_chunk(const Row* rows, const WeightView& w, int64_t panel, int64_t chunk) {
    uint8_t* codes = w.codes_at(panel, chunk);
    uint64_t groups[kBlock] = {};
    for (int half = 0; half < 2; ++half)
        for (int place = 0; place < 8; ++place) {
            const Row& row = rows[row_at(half, place)];
            for (int b = 0; b < kChunkBlocks; ++b) {
                const int64_t block = chunk * kChunkBlocks + b;
                groups[selector_group(half, place)] |= row.selector(block, w.bits)
                                                       << (w.bits * (2 * b + selector_second(place)));
                if (b % 2) continue;
                const uint64_t pair =
                    spread_nibbles(row.block_codes(block)) | spread_nibbles(row.block_codes(block + 1)) << 4;
                std::memcpy(codes + b / 2 * kPairBytes + half * kChunk + place * kBlock, &pair, sizeof pair);
            }
        }
    for (int g = 0; g < kBlock; ++g)
        std::memcpy(w.selectors_at(panel, chunk) + g * 2 * w.bits, &groups[g], static_cast<size_t>(2 * w.bits));
}

// Blocks [first, first + n) of a panel's row.
void unpack_row(const WeightView& w, int64_t panel, int row, int64_t first, int64_t n, uint8_t* codes,
                uint8_t* selectors) {
    const int half = row >> 1 & 1, place = row >> 2 << 1 | (row & 1);  // the inverse of row_at
    for (int64_t block = first; block < first + n; ++block) {
        const int64_t chunk = block / kChunkBlocks;
        const int b = static_cast<int>(block % kChunkBlocks);
        uint64_t pair;
        std::memcpy(&pair, w.codes_at(panel, chunk) + b / 2 * kPairBytes + half * kChunk + place * kBlock, sizeof pair);
        const uint32_t block_codes = gather_nibbles(pair >> (b % 2 * 4));
        std::memcpy(codes + (block - first) * kBlock / 2, &block_codes, kBlock / 2);
        const uint64_t group =
            load_bytes(w.selectors_at(panel, chunk) + selector_group(half, place) * 2 * w.bits, 2 * w.bits);
        selectors[block - first] =
            static_cast<uint8_t>((group >> (w.bits * (2 * b + selector_second(place)))) & ((1u << w.bits) - 1));
    }
}

// Scales are finite and not negative, and the bits behind the last selector are zero.
bool plausible(const Row& row, const PackedRow& bytes, int bits) {
    uint8_t worst = 0;
    for (int64_t g = 0; g < bytes.scales; ++g) worst = row.scales[g] > worst ? row.scales[g] : worst;
    const int64_t used = bytes.blocks * bits % 8;
    return worst < kScaleNaN && (used == 0 || row.selectors[bytes.selectors - 1] >> used == 0);
}

}  // namespace

bool pack_weight(const lobcq_packed& packed, const WeightView& w, int64_t begin, int64_t end) {
    const PackedRow bytes(packed.columns, packed.num_codebooks, packed.array_size);
    for (int64_t panel = begin; panel < end; ++panel) {
        Row rows[kPanel];
        for (int n = 0; n < kPanel; ++n) {
            rows[n] = row_of(packed, bytes, panel * kPanel + n);
            if (rows[n].blocks && !plausible(rows[n], bytes, w.bits)) return false;
            for (int64_t g = 0; g < w.arrays; ++g)
                w.scales_at(panel, g)[n] = rows[n].blocks && g < bytes.scales ? rows[n].scales[g] : uint8_t{0};
        }
        for (int64_t chunk = 0; chunk < w.chunks; ++chunk) pack_chunk(rows, w, panel, chunk);
    }
    return true;
}

void unpack_weight(const WeightView& w, const lobcq_packed& packed, int64_t begin, int64_t end) {
    const PackedRow bytes(packed.columns, packed.num_codebooks, packed.array_size);
    constexpr int64_t span = 512;  // blocks at a time, a multiple of the chunk's
    uint8_t selectors[span];
    for (int64_t row = begin * kPanel; row < end * kPanel && row < packed.rows; ++row) {
        for (int64_t block = 0; block < bytes.blocks; block += span) {
            const int64_t n = bytes.blocks - block < span ? bytes.blocks - block : span;
            unpack_row(w, row / kPanel, static_cast<int>(row % kPanel), block, n,
                       packed.codes + row * bytes.codes + block * kBlock / 2, selectors);
            pack_selectors(selectors, n, w.bits, packed.selectors + row * bytes.selectors + block * w.bits / 8);
        }
        for (int64_t g = 0; g < bytes.scales; ++g)
            packed.scales[row * bytes.scales + g] = w.scales_at(row / kPanel, g)[row % kPanel];
    }
}

}  // namespace lobcq
