#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "avx512.h"
#include "feedback.h"
#include "loops.h"
#include "rotate.h"

#include "attention_avx512.h"
#include "attention_loops.h"

namespace lobcq {

const Isa kAvx512 = {
    .name = "avx512",
    .planes = 3,
    .load = load_row,
    .rotate = rotate_arrays<16>,
    .absmax = absmax_rows,
    .array_scales = array_scales<kEntryMax>,
    .encode = avx512::encode,
    .entries = avx512::entries,
    .errors = grid_errors,
    .values = entry_values,
    .squares = add_squares,
    .compensate = compensate,
    .correct = correct_arrays,
    .correct_wide = correct_arrays,
    .int8_scales = array_scales<kInt8Max>,
    .int8_entries = int8_entries,
    .split = split_arrays<3, 8>,
    .fused_rows = avx512::kFusedRows,
    .fused_limit = avx512::kFusedLimit,
    .fused = avx512::fused,
    .decode = avx512::decode,
    .multiply = avx512::multiply,
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
