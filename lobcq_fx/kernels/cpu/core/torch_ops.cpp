// lobcq::linear_prepacked and lobcq::linear_prepacked.float_activation for CPU tensors, and the registration of all ops.
#include <dlfcn.h>

#include <cmath>

#include "half.h"
#include "layout.h"
#include "lobcq_torch.h"
#include "torch_operands.h"
#include "torch_states.h"

namespace lobcq::torch {
namespace {

// A call's arguments; see lobcq_fx/ops/linear_prepacked.py.
struct Call {
    Tensor x, activation_tables, static_scale;
    int32_t kind = LOBCQ_FLOAT;  // what the activation is multiplied as
    std::vector<Tensor> weights, tensor_scales;
    Tensor weight_tables;
    std::vector<Tensor> biases;
    std::vector<int64_t> out_features;
    int64_t array_size = 0;
    int32_t dtype = 0;  // torch's number
    bool rotated = false;

    // Takes what follows the activation's arguments.
    void take_rest(const Value* stack) {
        weights = take_tensors(stack[0]);
        tensor_scales = take_tensors(stack[1]);
        weight_tables = Tensor(stack[2]);
        biases = take_tensors(stack[3]);
        out_features = take_integers(stack[4]);
        array_size = static_cast<int64_t>(stack[5]);
    }

    std::vector<Tensor> run();

  private:
    void check_operands() const;
    int32_t narrow_array_size() const { return static_cast<int32_t>(array_size); }  // once it is checked
    int64_t activation_bytes(int64_t rows, int64_t columns) const {
        return lobcq_activation_bytes(rows, columns, narrow_array_size(), kind);
    }
    lobcq_matrix rows();
    lobcq_weight weight(size_t index, int64_t columns, int32_t codebooks) const;
    Tensor encoded(const lobcq_matrix& rows, lobcq_activation* activation) const;
};

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

// x as a matrix, copied where its strides are none of a matrix.
lobcq_matrix Call::rows() {
    const std::vector<int64_t> sizes = x.sizes();
    const int64_t columns = sizes.back();
    int64_t count = 1;
    for (size_t i = sizes.size() - 1; i-- > 0;) count *= sizes[i];
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

// Fills in the activation; its memory lives as long as the result.
Tensor Call::encoded(const lobcq_matrix& rows, lobcq_activation* activation) const {
    Tensor buffer = Tensor::empty({activation_bytes(rows.rows, rows.columns)}, api.aoti_torch_dtype_uint8());
    *activation = {buffer.data<void>(), rows.rows, rows.columns, narrow_array_size(), kind};
    if (kind == LOBCQ_FLOAT) {
        check_core(lobcq_activation_split(&rows, activation, api.torch_parallel_for));
        return buffer;
    }
    const void* tables = kind == LOBCQ_ENCODED ? activation_tables.data<void>() : nullptr;
    if (tables && lobcq_tables_codebooks(tables) < 0) refuse("activation_tables are not what this core makes of codebooks");
    if (!static_scale) {
        check_core(lobcq_activation_encode(tables, &rows, LOBCQ_ABSMAX_SCALES, nullptr, rotated, activation,
                                           api.torch_parallel_for));
        return buffer;
    }
    const auto scale = static_scale.first<float>();
    if (!(scale > 0 && std::isfinite(scale)))
        refuse("static_scale is " + std::to_string(scale) + ": it must be positive and finite");
    // Given for each row, the rule that makes NaN of a whole row with NaN or infinity in it.
    const std::vector<float> scales(static_cast<size_t>(rows.rows), scale);
    check_core(lobcq_activation_encode(tables, &rows, LOBCQ_ROW_SCALES, scales.data(), rotated, activation,
                                       api.torch_parallel_for));
    return buffer;
}

void Call::check_operands() const {
    if (requires_grad(x)) refuse(kNoGradient);
    const size_t count = weights.size();
    if (tensor_scales.size() != count || biases.size() != count || out_features.size() != count)
        refuse("weights, tensor_scales, biases and out_features differ in length");
    if (array_size != 16 && array_size != 32 && array_size != 64 && array_size != 128)
        refuse("array_size is " + std::to_string(array_size) + ": pass 16, 32, 64 or 128");
    require_activation(x);
    if (float_dtype(dtype) < 0) refuse("dtype is " + dtype_name(dtype) + ": pass float32 or bfloat16 or float16");
    if (activation_tables) require(kActivationTables, activation_tables, lobcq_tables_bytes());
    if (static_scale) require(kStaticScale, static_scale, 1);
    require(kWeightTables, weight_tables, lobcq_tables_bytes());
}

// A bias in fp32: as it lies, or converted or moved into `buffer`. No elements: no bias.
const float* float_bias(const Tensor& bias, int64_t outputs, int index, std::vector<float>* buffer) {
    const int64_t count = bias.numel() ? outputs : 0;
    require(kBiases, bias, count, index);
    if (count == 0) return nullptr;
    const int32_t dtype = float_dtype(bias.dtype());
    const auto* data = bias.data<uint8_t>();
    if (dtype == LOBCQ_FP32 && aligned(data, sizeof(float))) return bias.data<float>();
    buffer->resize(static_cast<size_t>(count));
    if (dtype == LOBCQ_FP32) std::memcpy(buffer->data(), data, static_cast<size_t>(count) * sizeof(float));
    for (int64_t i = 0; dtype != LOBCQ_FP32 && i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, data + i * 2, sizeof half);
        (*buffer)[static_cast<size_t>(i)] = dtype == LOBCQ_BF16 ? bf16_to_float(half) : fp16_to_float(half);
    }
    return buffer->data();
}

std::string target_of(const WeightStamp& stamp) {
    return to_string({stamp.rows, stamp.columns}) + " in " + std::to_string(stamp.num_codebooks) + "x" +
           std::to_string(stamp.array_size);
}

// Weight `index` [rows, columns] of the call.
lobcq_weight Call::weight(size_t index, int64_t columns, int32_t codebooks) const {
    const int64_t rows = out_features[index];
    const int at = static_cast<int>(index);
    const int64_t bytes = lobcq_weight_bytes(rows, columns, codebooks, narrow_array_size());
    if (bytes < 0) refuse("out_features[" + std::to_string(at) + "] is " + std::to_string(rows) + ": no weight's");
    require(kWeights, weights[index], bytes, at);
    const lobcq_weight weight{weights[index].data<void>(), rows, columns, codebooks, narrow_array_size()};
    const WeightStamp stamp = WeightView(weight).stamp(), expected = stamp_of(weight);
    if (stamp.magic != expected.magic) refuse("weights[" + std::to_string(at) + "] was not packed by this core");
    if (stamp != expected)
        refuse("weights[" + std::to_string(at) + "] was packed for another shape or format: " + target_of(stamp) +
               ", this call reads " + target_of(expected));
    return weight;
}

std::vector<Tensor> Call::run() {
    check_operands();
    weight_tables = realigned(std::move(weight_tables), kAlign);
    if (activation_tables) activation_tables = realigned(std::move(activation_tables), kAlign);
    const auto* tables = weight_tables.data<void>();
    const int32_t codebooks = lobcq_tables_codebooks(tables);
    if (codebooks < 0) refuse("weight_tables are not what this core makes of codebooks");
    const lobcq_matrix matrix = rows();
    const size_t count = weights.size();
    std::vector<lobcq_weight> kernel_weights(count);
    for (size_t i = 0; i < count; ++i) kernel_weights[i] = weight(i, matrix.columns, codebooks);
    lobcq_activation activation;
    const Tensor buffer = encoded(matrix, &activation);
    std::vector<Tensor> outputs;
    std::vector<lobcq_matrix> matrices(count);
    std::vector<std::vector<float>> bias_buffers(count);
    std::vector<lobcq_product> products(count);
    std::vector<int64_t> sizes = x.sizes();
    for (size_t i = 0; i < count; ++i) {
        const int at = static_cast<int>(i);
        const int64_t n = sizes.back() = out_features[i];
        if (int64_t elements = 0; __builtin_mul_overflow(matrix.rows, n, &elements)) refuse("a result is too large");
        require(kTensorScales, tensor_scales[i], 1, at);
        const float* bias = float_bias(biases[i], n, at, &bias_buffers[i]);
        outputs.push_back(Tensor::empty(sizes, dtype));
        matrices[i] = {outputs[i].data<void>(), matrix.rows, n, n, float_dtype(dtype)};
        products[i] = {tables, &kernel_weights[i], tensor_scales[i].first<float>(), bias, &matrices[i]};
    }
    check_core(lobcq_linear(products.data(), static_cast<int64_t>(count), &activation, api.torch_parallel_for));
    return outputs;
}

void linear_prepacked(Value* stack, uint64_t, uint64_t) {
    Call call;
    call.x = Tensor(stack[0]);
    call.activation_tables = take_optional_tensor(stack[1]);
    call.kind = call.activation_tables ? LOBCQ_ENCODED : LOBCQ_INT8;
    call.static_scale = take_optional_tensor(stack[2]);
    call.take_rest(stack + 3);
    call.dtype = static_cast<int32_t>(stack[9]);
    call.rotated = stack[10] & 1;  // a bool: only its byte is written
    stack[0] = give_tensors(call.run());
}

void linear_prepacked_float_activation(Value* stack, uint64_t, uint64_t) {
    Call call;
    call.x = Tensor(stack[0]);
    call.take_rest(stack + 1);
    call.dtype = call.x.dtype();
    stack[0] = give_tensors(call.run());
}

template <class Function>
bool find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    return *function != nullptr;
}

bool find_all(void* torch) {
#define LOBCQ_FIND(name) find(torch, #name, &api.name)
    LOBCQ_FIND(torch_delete_stable_ivalue);  // may be absent
    return LOBCQ_FIND(aoti_torch_library_init_impl) && LOBCQ_FIND(torch_library_impl) &&
           LOBCQ_FIND(torch_call_dispatcher) && LOBCQ_FIND(aoti_torch_get_data_ptr) &&
           LOBCQ_FIND(aoti_torch_get_dim) && LOBCQ_FIND(aoti_torch_get_sizes) &&
           LOBCQ_FIND(aoti_torch_get_strides) && LOBCQ_FIND(aoti_torch_get_dtype) &&
           LOBCQ_FIND(aoti_torch_get_numel) && LOBCQ_FIND(aoti_torch_is_contiguous) &&
           LOBCQ_FIND(aoti_torch_get_storage_size) && LOBCQ_FIND(aoti_torch_get_storage_offset) &&
           LOBCQ_FIND(aoti_torch_empty_strided) && LOBCQ_FIND(aoti_torch_new_tensor_handle) &&
           LOBCQ_FIND(aoti_torch_delete_tensor_object) && LOBCQ_FIND(aoti_torch_grad_mode_is_enabled) &&
           LOBCQ_FIND(torch_new_list_reserve_size) && LOBCQ_FIND(torch_list_size) &&
           LOBCQ_FIND(torch_list_get_item) && LOBCQ_FIND(torch_list_push_back) && LOBCQ_FIND(torch_delete_list) &&
           LOBCQ_FIND(aoti_torch_dtype_float32) && LOBCQ_FIND(aoti_torch_dtype_bfloat16) &&
           LOBCQ_FIND(aoti_torch_dtype_float16) && LOBCQ_FIND(aoti_torch_dtype_uint8) &&
           LOBCQ_FIND(aoti_torch_dtype_int8) && LOBCQ_FIND(aoti_torch_dtype_bool) &&
           LOBCQ_FIND(aoti_torch_device_type_cpu) && LOBCQ_FIND(torch_parallel_for);
#undef LOBCQ_FIND
}

}  // namespace
}  // namespace lobcq::torch

int32_t lobcq_register_torch_ops(void* libtorch) {
    using namespace lobcq::torch;
    if (!libtorch || !find_all(libtorch)) return LOBCQ_INVALID_ARGUMENT;
    void* library = nullptr;  // lives as long as the process: its registrations end with it
    const int32_t failed =
        api.aoti_torch_library_init_impl("lobcq", "CPU", __FILE__, __LINE__, &library) ||
        api.torch_library_impl(library, "linear_prepacked", linear_prepacked, kVersion) ||
        api.torch_library_impl(library, "linear_prepacked.float_activation", linear_prepacked_float_activation,
                               kVersion) ||
        api.torch_library_impl(library, "quantize_states", quantize_states, kVersion) ||
        api.torch_library_impl(library, "attention", attention, kVersion);
    return failed ? LOBCQ_INVALID_ARGUMENT : LOBCQ_OK;
}
