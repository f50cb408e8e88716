// lobcq::linear_prepacked and lobcq::linear_prepacked.float_activation for CPU tensors, and the registration of all ops.
#include <dlfcn.h>

#include "half.h"
#include "lobcq_torch.h"
#include "torch_activation.h"
#include "torch_between.h"
#include "torch_grouped.h"
#include "torch_states.h"

namespace lobcq::torch {
namespace {

// A call's arguments; see lobcq_fx/ops/linear_prepacked.py.
struct Call {
    FloatActivation activation;
    std::vector<Tensor> weights, tensor_scales;
    Tensor weight_tables;
    std::vector<Tensor> biases;
    std::vector<int64_t> out_features;
    int32_t dtype = 0;  // torch's number

    // Takes what follows the activation's arguments.
    void take_rest(const Value* stack) {
        weights = take_tensors(stack[0]);
        tensor_scales = take_tensors(stack[1]);
        weight_tables = Tensor(stack[2]);
        biases = take_tensors(stack[3]);
        out_features = take_integers(stack[4]);
        activation.array_size = static_cast<int64_t>(stack[5]);
    }

    std::vector<Tensor> run();

  private:
    void check_operands() const;
    lobcq_weight weight(size_t index, int64_t columns, int32_t codebooks) const;
};

void Call::check_operands() const {
    const size_t count = weights.size();
    if (tensor_scales.size() != count || biases.size() != count || out_features.size() != count)
        refuse("weights, tensor_scales, biases and out_features differ in length");
    activation.check_operands();
    if (float_dtype(dtype) < 0) refuse("dtype is " + dtype_name(dtype) + ": pass float32 or bfloat16 or float16");
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

// Weight `index` [rows, columns] of the call.
lobcq_weight Call::weight(size_t index, int64_t columns, int32_t codebooks) const {
    const int64_t rows = out_features[index];
    const int at = static_cast<int>(index);
    const int64_t bytes = lobcq_weight_bytes(rows, columns, codebooks, activation.narrow_array_size());
    if (bytes < 0) refuse("out_features[" + std::to_string(at) + "] is " + std::to_string(rows) + ": no weight's");
    require(kWeights, weights[index], bytes, at);
    const lobcq_weight weight{weights[index].data<void>(), rows, columns, codebooks, activation.narrow_array_size()};
    require_packed_for(weight, at);
    return weight;
}

std::vector<Tensor> Call::run() {
    check_operands();
    weight_tables = realigned(std::move(weight_tables), kAlign);
    const auto* tables = weight_tables.data<void>();
    const int32_t codebooks = lobcq_tables_codebooks(tables);
    if (codebooks < 0) refuse("weight_tables are not what this core makes of codebooks");
    const lobcq_matrix matrix = activation.rows();
    const size_t count = weights.size();
    std::vector<lobcq_weight> kernel_weights(count);
    for (size_t i = 0; i < count; ++i) kernel_weights[i] = weight(i, matrix.columns, codebooks);
    lobcq_activation encoded;
    const Tensor buffer = activation.encoded(matrix, &encoded);
    std::vector<Tensor> outputs;
    std::vector<lobcq_matrix> matrices(count);
    std::vector<std::vector<float>> bias_buffers(count);
    std::vector<lobcq_product> products(count);
    std::vector<int64_t> sizes = activation.x.sizes();
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
    check_core(lobcq_linear(products.data(), static_cast<int64_t>(count), &encoded, api.torch_parallel_for));
    return outputs;
}

void linear_prepacked(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::linear_prepacked", [stack] {
        Call call;
        call.activation.take(stack);
        call.take_rest(stack + 3);
        call.dtype = static_cast<int32_t>(stack[9]);
        call.activation.rotated = stack[10] & 1;  // a bool: only its byte is written
        stack[0] = give_tensors(call.run());
    });
}

void linear_prepacked_float_activation(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::linear_prepacked", [stack] {
        Call call;
        call.activation.x = Tensor(stack[0]);
        call.take_rest(stack + 1);
        call.dtype = call.activation.x.dtype();
        stack[0] = give_tensors(call.run());
    });
}

template <class Function>
bool find(void* library, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, name));
    return *function != nullptr;
}

bool find_all(void* torch) {
#define LOBCQ_FIND(name) find(torch, #name, &api.name)
    LOBCQ_FIND(torch_new_stable_ivalue);  // may be absent, both
    LOBCQ_FIND(torch_delete_stable_ivalue);
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
           LOBCQ_FIND(aoti_torch_dtype_int32) && LOBCQ_FIND(aoti_torch_dtype_int64) &&
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
        api.torch_library_impl(library, "grouped_linear_prepacked", grouped_linear_prepacked, kVersion) ||
        api.torch_library_impl(library, "grouped_linear_prepacked.float_activation",
                               grouped_linear_prepacked_float_activation, kVersion) ||
        api.torch_library_impl(library, "quantize_states", quantize_states, kVersion) ||
        api.torch_library_impl(library, "attention", attention, kVersion) ||
        api.torch_library_impl(library, "attention.float_states", attention_float_states, kVersion) ||
        api.torch_library_impl(library, "rms_norm", rms_norm, kVersion) ||
        api.torch_library_impl(library, "rotate_half", rotate_half, kVersion);
    return failed ? LOBCQ_INVALID_ARGUMENT : LOBCQ_OK;
}
