#if defined(__aarch64__)
#include <cmath>
#include <cstring>

#include "neon.h"
#include "feedback.h"
#include "loops.h"
#include "rotate.h"

#include "attention_neon.h"
#include "attention_loops.h"

namespace lobcq {

constexpr Isa kNeon = {
    .name = "neon",
    .planes = 3,
    .load = load_row,
    .rotate = rotate_arrays<4>,
    .absmax = absmax_rows,
    .array_scales = array_scales<kEntryMax>,
    .encode = neon::encode,
    .entries = neon::entries,
    .errors = grid_errors,
    .values = entry_values,
    .squares = add_squares,
    .compensate = compensate,
    .correct = correct_arrays,
    .correct_wide = correct_arrays,
    .int8_scales = array_scales<kInt8Max>,
    .int8_entries = int8_entries,
    .split = split_arrays<3, 8>,
    .fused_rows = neon::kFusedRows,
    .fused_limit = neon::kFusedLimit,
    .fused = neon::fused,
    .decode = neon::decode,
    .multiply = neon::multiply,
    .attend = attend_block<FloatProducts<EncodedStates>>,
    .attend_int8 = attend_block<Int8Products>,
    .attend_floats = attend_block<FloatProducts<PlainStates>>,
    .finish = finish_row,
};

// The same but for the products.
constexpr Isa kNeonI8mm = [] {
    Isa isa = kNeon;
    isa.name = "neon_i8mm";
    isa.fused = neon_i8mm::fused;
    isa.decode = neon_i8mm::decode;
    isa.multiply = neon_i8mm::multiply;
    return isa;
}();

}  // namespace lobcq

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
