#include "torch_grouped.h"

#include "groups.h"
#include "torch_activation.h"

namespace lobcq::torch {
namespace {

// A call's arguments; see lobcq_fx/ops/grouped_linear.py.
struct Call {
    FloatActivation activation;
    Tensor weights, tensor_scales, weight_tables, offsets, rows;
    int64_t out_features = 0;
    int32_t dtype = 0;  // torch's number

    // Takes what follows the activation's arguments.
    void take_rest(const Value* stack) {
        weights = Tensor(stack[0]);
        tensor_scales = Tensor(stack[1]);
        weight_tables = Tensor(stack[2]);
        offsets = take_optional_tensor(stack[3]);
        rows = take_optional_tensor(stack[4]);
        out_features = static_cast<int64_t>(stack[5]);
        activation.array_size = static_cast<int64_t>(stack[6]);
    }

    Tensor run();

  private:
    void check_operands() const;
    int64_t matrices() const { return weights.sizes().front(); }  // once the rank is checked
    std::vector<int64_t> result_sizes() const;
    Tensor gathered(lobcq_activation* encoded) const;
    void multiply(const lobcq_activation& encoded, int64_t bytes, int32_t codebooks, const Tensor& out) const;
};

void Call::check_operands() const {
    activation.check_operands();
    if (float_dtype(dtype) < 0) refuse("dtype is " + dtype_name(dtype) + ": pass float32 or bfloat16 or float16");
    require(kWeightTables, weight_tables, lobcq_tables_bytes());
    require(kStack, weights, weights.numel());
    require(kStackScales, tensor_scales, matrices());
    const std::vector<int64_t> sizes = activation.x.sizes();
    if (offsets) {
        require(kOffsets, offsets, matrices());
        if (sizes.size() != 2) refuse("x is " + to_string(sizes) + ": pass rows [T, K] with offsets");
        if (rows) require(kRows, rows, rows.numel());
    } else if (sizes.size() != 3 || rows || sizes[0] != matrices()) {
        refuse("x is " + to_string(sizes) + ": without offsets pass [E, M, K], and no rows");
    }
}

std::vector<int64_t> Call::result_sizes() const {
    std::vector<int64_t> sizes = rows ? rows.sizes() : activation.x.sizes();
    if (rows) sizes.push_back(0);
    sizes.back() = out_features;
    int64_t elements = 1;
    for (const int64_t size : sizes)
        if (__builtin_mul_overflow(elements, size, &elements)) refuse("the result is too large");
    return sizes;
}

// The activation's rows as `rows` names them, in place of all; the memory lives as long as the result.
Tensor Call::gathered(lobcq_activation* encoded) const {
    const Tensor aligned = realigned(rows.another(), sizeof(int64_t));
    const auto* wanted = aligned.data<int64_t>();
    const int64_t count = rows.numel();
    const RowRange range = range_of(wanted, count);
    if (!range.exist(encoded->rows))
        refuse("rows reach from " + std::to_string(range.least) + " to " + std::to_string(range.most) +
               ": the activation has rows 0 to " + std::to_string(encoded->rows - 1));
    const int64_t bytes = activation.activation_bytes(count, encoded->columns);
    if (bytes < 0) refuse("rows are " + std::to_string(count) + ": too many");
    Tensor buffer = Tensor::empty({bytes}, api.aoti_torch_dtype_uint8());
    lobcq_activation to = *encoded;
    to.data = buffer.data<void>();
    to.rows = count;
    check_core(lobcq_activation_gather(encoded, wanted, &to, api.torch_parallel_for));
    *encoded = to;
    return buffer;
}

// bytes: of one matrix in kernel layout.
void Call::multiply(const lobcq_activation& encoded, int64_t bytes, int32_t codebooks, const Tensor& out) const {
    const auto* given = offsets ? offsets.data<int32_t>() : nullptr;
    const std::vector<int64_t> ends = group_ends(given, matrices(), encoded.rows);
    GroupProducts products(weight_tables.data<void>(), {out.data<void>(), encoded.rows, out_features, out_features,
                                                        float_dtype(dtype)});
    int64_t before = 0;
    for (size_t i = 0; i < ends.size(); before = ends[i++]) {
        auto* data = weights.data<uint8_t>() + static_cast<int64_t>(i) * bytes;
        const lobcq_weight weight{data, out_features, encoded.columns, codebooks, encoded.array_size};
        if (ends[i] > before) require_packed_for(weight, static_cast<int>(i));
        float scale;
        std::memcpy(&scale, tensor_scales.data<uint8_t>() + i * sizeof scale, sizeof scale);
        products.add(weight, scale, ends[i]);
    }
    check_core(products.run(encoded, api.torch_parallel_for));
}

Tensor Call::run() {
    check_operands();
    weight_tables = realigned(std::move(weight_tables), kAlign);
    const int32_t codebooks = lobcq_tables_codebooks(weight_tables.data<void>());
    if (codebooks < 0) refuse("weight_tables are not what this core makes of codebooks");
    const lobcq_matrix matrix = activation.rows();
    const int64_t bytes =
        lobcq_weight_bytes(out_features, matrix.columns, codebooks, activation.narrow_array_size());
    if (bytes < 0) refuse("out_features is " + std::to_string(out_features) + ": no weight's");
    if (weights.sizes().back() != bytes)
        refuse("weights are " + to_string(weights.sizes()) + ": pass [E, " + std::to_string(bytes) +
               "]: they were packed for another shape or format");
    const std::vector<int64_t> sizes = result_sizes();
    lobcq_activation encoded;
    Tensor buffer = activation.encoded(matrix, &encoded);
    if (rows) buffer = gathered(&encoded);
    Tensor out = Tensor::empty(sizes, dtype);
    if (out.numel()) multiply(encoded, bytes, codebooks, out);
    return out;
}

}  // namespace

void grouped_linear_prepacked(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::grouped_linear_prepacked", [stack] {
        Call call;
        call.activation.take(stack);
        call.take_rest(stack + 3);
        call.dtype = static_cast<int32_t>(stack[10]);
        call.activation.rotated = stack[11] & 1;  // a bool: only its byte is written
        stack[0] = call.run().release();
    });
}

void grouped_linear_prepacked_float_activation(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::grouped_linear_prepacked", [stack] {
        Call call;
        call.activation.x = Tensor(stack[0]);
        call.take_rest(stack + 1);
        call.dtype = call.activation.x.dtype();
        stack[0] = call.run().release();
    });
}

}  // namespace lobcq::torch
