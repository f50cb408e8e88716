#include "torch_activation.h"

#include <cmath>

namespace lobcq::torch {
namespace {

// All leading dimensions step as one, so that the tensor is a matrix as it lies.
bool is_matrix(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    if (sizes.back() > 1 && strides.back() != 1) return false;
    int64_t next = 0;  // of the dimension further in, its size times its stride; 0 before the first
    for (size_t i = sizes.size() - 1; i-- > 0;) {
        if (sizes[i] == 1) continue;
        if (next ? strides[i] != next : strides[i] < sizes.back()) return false;
        next = strides[i] * sizes[i];
    }
    return true;
}

std::string target_of(const WeightStamp& stamp) {
    return to_string({stamp.rows, stamp.columns}) + " in " + std::to_string(stamp.num_codebooks) + "x" +
           std::to_string(stamp.array_size);
}

}  // namespace

void require_packed_for(const lobcq_weight& weight, int index) {
    const WeightStamp stamp = WeightView(weight).stamp(), expected = stamp_of(weight);
    if (stamp.magic != expected.magic) refuse("weights[" + std::to_string(index) + "] was not packed by this core");
    if (stamp != expected)
        refuse("weights[" + std::to_string(index) + "] was packed for another shape or format: " + target_of(stamp) +
               ", this call reads " + target_of(expected));
}

void FloatActivation::take(const Value* stack) {
    x = Tensor(stack[0]);
    tables = take_optional_tensor(stack[1]);
    kind = tables ? LOBCQ_ENCODED : LOBCQ_INT8;
    static_scale = take_optional_tensor(stack[2]);
}

void FloatActivation::check_operands() const {
    if (requires_grad(x)) refuse(kNoGradient);
    if (array_size != 16 && array_size != 32 && array_size != 64 && array_size != 128)
        refuse("array_size is " + std::to_string(array_size) + ": pass 16, 32, 64 or 128");
    require_activation(x);
    if (tables) require(kActivationTables, tables, lobcq_tables_bytes());
    if (static_scale) require(kStaticScale, static_scale, 1);
}

lobcq_matrix FloatActivation::rows() {
    const std::vector<int64_t> sizes = x.sizes();
    const int64_t columns = sizes.back();
    int64_t count = 1;
    for (size_t i = sizes.size() - 1; i-- > 0;) count *= sizes[i];
    if (tables) tables = realigned(std::move(tables), kAlign);
    if (activation_bytes(count, columns) < 0) refuse("x is " + to_string(sizes) + ": too large");
    if (rotated && columns % array_size)
        refuse("x has " + std::to_string(columns) + " columns: pass whole block arrays, multiples of " +
               std::to_string(array_size));
    if (!is_matrix(sizes, x.strides())) x = contiguous(std::move(x));
    x = realigned(std::move(x), float_dtype(x.dtype()) == LOBCQ_FP32 ? 4 : 2);
    const std::vector<int64_t> strides = x.strides();
    int64_t stride = columns;  // that of the innermost dimension which has more than one row
    for (size_t i = sizes.size() - 1; i-- > 0 && count > 1;)
        if (sizes[i] != 1) {
            stride = strides[i];
            break;
        }
    return {x.data<void>(), count, columns, stride, float_dtype(x.dtype())};
}

Tensor FloatActivation::encoded(const lobcq_matrix& rows, lobcq_activation* activation) const {
    Tensor buffer = Tensor::empty({activation_bytes(rows.rows, rows.columns)}, api.aoti_torch_dtype_uint8());
    *activation = {buffer.data<void>(), rows.rows, rows.columns, narrow_array_size(), kind};
    if (kind == LOBCQ_FLOAT) {
        check_core(lobcq_activation_split(&rows, activation, api.torch_parallel_for));
        return buffer;
    }
    const void* codebooks = kind == LOBCQ_ENCODED ? tables.data<void>() : nullptr;
    if (codebooks && lobcq_tables_codebooks(codebooks) < 0)
        refuse("activation_tables are not what this core makes of codebooks");
    if (!static_scale) {
        check_core(lobcq_activation_encode(codebooks, &rows, LOBCQ_ABSMAX_SCALES, nullptr, rotated, activation,
                                           api.torch_parallel_for));
        return buffer;
    }
    const auto scale = static_scale.first<float>();
    if (!(scale > 0 && std::isfinite(scale)))
        refuse("static_scale is " + std::to_string(scale) + ": it must be positive and finite");
    // Given for each row, the rule that makes NaN of a whole row with NaN or infinity in it.
    const std::vector<float> scales(static_cast<size_t>(rows.rows), scale);
    check_core(lobcq_activation_encode(codebooks, &rows, LOBCQ_ROW_SCALES, scales.data(), rotated, activation,
                                       api.torch_parallel_for));
    return buffer;
}

}  // namespace lobcq::torch
