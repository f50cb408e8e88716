#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "avx2.h"
#include "feedback.h"
#include "loops.h"
#include "rotate.h"

#include "attention_avx2.h"
#include "attention_loops.h"

namespace lobcq {

// Digits of 6 bits: products with digits up to 32 in magnitude stay within 16 bits where those of 8 bits would not.
const Isa kAvx2 = {
    .name = "avx2",
    .planes = 4,
    .load = load_row,
    .rotate = rotate_arrays<8>,
    .absmax = absmax_rows,
    .array_scales = array_scales<kEntryMax>,
    .encode = avx2::encode,
    .entries = avx2::entries,
    .errors = grid_errors,
    .values = entry_values,
    .squares = add_squares,
    .compensate = compensate,
    .correct = avx2::correct,
    .correct_wide = correct_arrays,
    .int8_scales = array_scales<kInt8Max>,
    .int8_entries = int8_entries,
    .split = split_arrays<4, 6>,
    .fused_rows = avx2::kFusedRows,
    .fused_limit = avx2::kFusedLimit,
    .fused = avx2::fused,
    .decode = avx2::decode,
    .multiply = avx2::multiply,
    .attend = attend_block<FloatProducts<EncodedStates>>,
    .attend_int8 = attend_block<Int8Products>,
    .attend_floats = attend_block<FloatProducts<PlainStates>>,
    .finish = finish_row,
};

}  // namespace lobcq

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
