#include "linear.h"

namespace lobcq {
namespace {

// Activation rows (planes counted) that share one decoding of the weight; their sums, 36 KiB, stay in the L2 cache.
constexpr int64_t kMaxBlockRows = 288;
// Blocks of rows are multiples of this: whole micro-kernels (6 or 4 rows) and whole sets of planes (1, 3 or 4).
constexpr int64_t kRowStep = 12;
constexpr int64_t kMaxFusedRows = 16;
constexpr int64_t kDecodeCost = 8;  // of a panel, in rows that are multiplied with it
constexpr int64_t kGrainProducts = 1 << 18;  // below this a thread costs more than it saves

}  // namespace

int64_t Linear::row_blocks() const { return ceil_div(rows(), kMaxBlockRows); }

int64_t Linear::rows_per_block() const { return round_up(ceil_div(rows(), row_blocks()), kRowStep); }

int64_t Linear::tasks() const {
    if (rows() == 0) return 0;
    return fused() ? w.panels : ceil_div(w.panels, kTilePanels) * row_blocks();
}

int64_t Linear::task_cost() const {
    if (fused() || rows() == 0) return rows() + kDecodeCost;
    return kTilePanels * (rows_per_block() + kDecodeCost);
}

void Linear::run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
        if (fused()) {
            run_panel(task);
            continue;
        }
        const int64_t first_row = task % row_blocks() * rows_per_block();
        const int64_t left = rows() - first_row;
        if (left <= 0) continue;
        run_tile(task / row_blocks() * kTilePanels, first_row, left < rows_per_block() ? left : rows_per_block());
    }
}

void Linear::run_panel(int64_t panel) const {
    alignas(64) float sums[kMaxFusedRows * kPanel];
    const int64_t step = isa().fused_rows / a.planes;
    for (int64_t row = 0; row < a.rows; row += step) {
        const int64_t left = a.rows - row, n = left < step ? left : step;
        isa().fused(tables, w, a.part(row, n), panel, sums);
        finish(sums, kPanel, row * a.planes, n * a.planes, panel * kPanel);
    }
}

void Linear::run_tile(int64_t first_panel, int64_t first_row, int64_t block_rows) const {
    constexpr int64_t tile_chunks = kTileColumns / kChunk;
    alignas(64) float sums[kMaxBlockRows * kTileRows];
    WeightTile tile;
    std::memset(sums, 0, static_cast<size_t>(block_rows * kTileRows) * sizeof(float));
    const bool single = first_panel + 1 == w.panels;
    if (single) tile = WeightTile{};  // the second panel is computed with the first, on zeros
    for (int64_t chunk = 0; chunk < w.chunks; chunk += tile_chunks) {
        const int64_t left = w.chunks - chunk, chunks = left < tile_chunks ? left : tile_chunks;
        isa().decode(tables, w, first_panel, chunk, chunks, 0, &tile);
        if (!single) isa().decode(tables, w, first_panel + 1, chunk, chunks, 1, &tile);
        isa().multiply(tile, a, first_row, block_rows, chunk, chunks, sums);
    }
    finish(sums, kTileRows, first_row, block_rows, first_panel * kPanel);
}

void Linear::finish(const float* sums, int64_t width, int64_t first_row, int64_t block_rows,
                    int64_t first_column) const {
    const int64_t left = w.rows - first_column, n = left < width ? left : width;
    const int64_t size = out.dtype == LOBCQ_FP32 ? 4 : 2;
    for (int64_t m = 0; m < block_rows / a.planes; ++m) {
        const int64_t row = first_row / a.planes + m;
        auto* to = static_cast<uint8_t*>(out.data) + (row * out.row_stride + first_column) * size;
        isa().finish(sums + m * a.planes * width, width, a.planes, n, a.row_scales[row], weight_scale,
                     bias ? bias + first_column : nullptr, out.dtype, to);
    }
}

int64_t LinearGroup::tasks() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += Linear(products[i], a).tasks();
    return sum;
}

int64_t LinearGroup::grain() const {
    double outputs = 0;  // in floats: M * N * K of sizes that are allowed may exceed int64
    for (int64_t i = 0; i < count; ++i) outputs += static_cast<double>(products[i].weight->rows);
    const double all = outputs * static_cast<double>(a.rows * a.planes) * static_cast<double>(a.arrays * a.array_size);
    const double each = all / static_cast<double>(tasks() + 1) + 1;
    return each < kGrainProducts ? ceil_div(kGrainProducts, static_cast<int64_t>(each)) : 1;
}

void LinearGroup::run(int64_t begin, int64_t end) const {
    for (int64_t i = 0, first = 0; i < count && first < end; ++i) {
        const Linear linear(products[i], a);
        const int64_t last = first + linear.tasks();
        if (begin < last) linear.run(begin < first ? 0 : begin - first, (end < last ? end : last) - first);
        first = last;
    }
}

int64_t GroupedLinears::cost() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += linear(i).tasks() * linear(i).task_cost();
    return sum;
}

int64_t GroupedLinears::grain() const {
    return ceil_div(kGrainProducts, (a.arrays * a.array_size + 1) * kPanel);
}

void GroupedLinears::run(int64_t begin, int64_t end) const {
    for (int64_t i = 0, first = 0; i < count && first < end; ++i) {
        const Linear one = linear(i);
        const int64_t cost = one.task_cost(), last = first + one.tasks() * cost;
        if (begin < last)
            one.run(begin < first ? 0 : ceil_div(begin - first, cost), ceil_div((end < last ? end : last) - first, cost));
        first = last;
    }
}

}  // namespace lobcq
