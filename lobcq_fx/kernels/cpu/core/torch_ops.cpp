// lobcq::linear_prepacked and lobcq::linear_prepacked.float_activation for CPU tensors.
#include <dlfcn.h>

#include <cmath>

#include "half.h"
#include "layout.h"
#include "lobcq_torch.h"
#include "torch_api.h"

namespace lobcq::torch {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("lobcq::linear_prepacked: " + what); }

void check_core(int32_t status) {
    if (status) refuse(lobcq_status_text(status));
}

int32_t dtype_of(int32_t torch_dtype) {
    if (torch_dtype == api.aoti_torch_dtype_float32()) return LOBCQ_FP32;
    if (torch_dtype == api.aoti_torch_dtype_bfloat16()) return LOBCQ_BF16;
    if (torch_dtype == api.aoti_torch_dtype_float16()) return LOBCQ_FP16;
    refuse("a tensor is not in fp32, bf16 or fp16");
}

bool aligned(const void* data, uintptr_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; }

// Refuses an operand of another dtype or size, with gaps between its elements, or whose memory was given back. Its
// device is the dispatcher's business: a tensor of another one takes the call to that one's kernel.
void require(const Tensor& operand, const char* name, int32_t dtype, const char* dtype_name, int64_t elements,
             const char* meaning) {
    if (operand.numel() != elements) refuse(meaning);
    if (operand.dtype() != dtype || !operand.is_contiguous() || (elements && !operand.data<void>()))
        refuse(std::string(name) + " is not contiguous " + dtype_name);
}

void require_bytes(const Tensor& operand, const char* name, int64_t bytes, const char* meaning) {
    require(operand, name, api.aoti_torch_dtype_uint8(), "uint8", bytes, meaning);
}

float scalar(const Tensor& operand, const char* name) {
    require(operand, name, api.aoti_torch_dtype_float32(), "fp32", 1, "a scale does not have one element");
    return operand.first<float>();
}

// The stable interface has no requires_grad. A view of a tensor that requires a gradient is no leaf.
bool requires_grad(const Tensor& x) {
    if (!api.aoti_torch_grad_mode_is_enabled()) return false;
    Value stack[1] = {x.another().release()};
    check(api.torch_call_dispatcher("aten::alias", "", stack, kVersion), "aten::alias");
    check(api.torch_call_dispatcher("aten::is_leaf", "", stack, kVersion), "aten::is_leaf");
    return (stack[0] & 1) == 0;
}

// A call's arguments; see lobcq_fx/ops/linear_prepacked.py. Without activation tables the activation stays in float.
struct Call {
    Tensor x, activation_tables, static_scale;
    std::vector<Tensor> weights, tensor_scales;
    Tensor weight_tables;
    std::vector<Tensor> biases;
    std::vector<int64_t> out_features;
    int32_t array_size = 0, dtype = 0;

    // Takes what follows the activation's arguments.
    void take_rest(const Value* stack) {
        weights = take_tensors(stack[0]);
        tensor_scales = take_tensors(stack[1]);
        weight_tables = Tensor(stack[2]);
        biases = take_tensors(stack[3]);
        out_features = take_integers(stack[4]);
        array_size = stack[5] > INT32_MAX ? 0 : static_cast<int32_t>(stack[5]);  // 0 is refused
    }

    std::vector<Tensor> run();

  private:
    void check_operands() const;
    lobcq_matrix rows();
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

Tensor contiguous(Tensor x) {
    Value stack[2] = {x.release(), 0};  // 0: the contiguous memory format
    check(api.torch_call_dispatcher("aten::contiguous", "", stack, kVersion), "aten::contiguous");
    return Tensor(stack[0]);
}

// The same elements where `align` bytes divide their address: a compiled program's constants, say, start anywhere.
Tensor realigned(Tensor x, uintptr_t align) {
    if (aligned(x.data<void>(), align)) return x;
    Value stack[2] = {x.release(), 0};  // 0: no memory format, that of x
    check(api.torch_call_dispatcher("aten::clone", "", stack, kVersion), "aten::clone");
    return Tensor(stack[0]);
}

// x as a matrix, copied where its strides are none of a matrix.
lobcq_matrix Call::rows() {
    const std::vector<int64_t> sizes = x.sizes();
    if (sizes.empty()) refuse("x has no dimension");
    if (!is_matrix(sizes, x.strides())) x = contiguous(std::move(x));
    x = realigned(std::move(x), dtype_of(x.dtype()) == LOBCQ_FP32 ? 4 : 2);
    const std::vector<int64_t> strides = x.strides();
    const int64_t columns = sizes.back();
    int64_t count = 1, stride = columns;
    for (size_t i = sizes.size() - 1; i-- > 0; count *= sizes[i])
        if (sizes[i] != 1 && count == 1) stride = strides[i];
    return {x.data<void>(), count, columns, count > 1 ? stride : columns, dtype_of(x.dtype())};
}

// Fills in the activation; its memory lives as long as the result.
Tensor Call::encoded(const lobcq_matrix& rows, lobcq_activation* activation) const {
    const int32_t kind = activation_tables ? LOBCQ_ENCODED : LOBCQ_FLOAT;
    const int64_t bytes = lobcq_activation_bytes(rows.rows, rows.columns, array_size, kind);
    if (bytes < 0) refuse("the activation's shape or array_size is not supported");
    Tensor buffer = Tensor::empty({bytes}, api.aoti_torch_dtype_uint8());
    *activation = {buffer.data<void>(), rows.rows, rows.columns, array_size, kind};
    if (kind == LOBCQ_FLOAT) {
        check_core(lobcq_activation_split(&rows, activation, api.torch_parallel_for));
        return buffer;
    }
    const auto* tables = activation_tables.data<void>();
    if (!static_scale) {
        check_core(lobcq_activation_encode(tables, &rows, LOBCQ_ABSMAX_SCALES, nullptr, activation,
                                           api.torch_parallel_for));
        return buffer;
    }
    const float scale = scalar(static_scale, "static_scale");
    if (!(scale > 0 && std::isfinite(scale)))
        refuse("static_scale is " + std::to_string(scale) + ": it must be positive and finite");
    // Given for each row, the rule that makes NaN of a whole row with NaN or infinity in it.
    const std::vector<float> scales(static_cast<size_t>(rows.rows), scale);
    check_core(lobcq_activation_encode(tables, &rows, LOBCQ_ROW_SCALES, scales.data(), activation,
                                       api.torch_parallel_for));
    return buffer;
}

void Call::check_operands() const {
    const size_t count = weights.size();
    if (tensor_scales.size() != count || biases.size() != count || out_features.size() != count)
        refuse("weights, tensor_scales, biases and out_features differ in length");
    for (const Tensor* tables : {&weight_tables, &activation_tables})
        if (*tables)
            require_bytes(*tables, "a set of tables", lobcq_tables_bytes(), "tables were not made by this core");
}

// A bias in fp32: as it lies, or converted or moved into `buffer`. No elements: no bias.
const float* float_bias(const Tensor& bias, int64_t outputs, std::vector<float>* buffer) {
    const int64_t count = bias.numel();
    if (count == 0) return nullptr;
    const int32_t dtype = dtype_of(bias.dtype());
    require(bias, "a bias", bias.dtype(), "floats", outputs, "a bias does not have one element for each output");
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

std::vector<Tensor> Call::run() {
    if (requires_grad(x)) refuse("the lobcq:: ops are inference only and have no gradient");
    check_operands();
    weight_tables = realigned(std::move(weight_tables), kAlign);
    if (activation_tables) activation_tables = realigned(std::move(activation_tables), kAlign);
    const lobcq_matrix matrix = rows();
    lobcq_activation activation;
    const Tensor buffer = encoded(matrix, &activation);
    const auto* tables = weight_tables.data<void>();
    const int32_t codebooks = lobcq_tables_codebooks(tables);
    const size_t count = weights.size();
    std::vector<Tensor> outputs;
    std::vector<lobcq_weight> kernel_weights(count);
    std::vector<lobcq_matrix> matrices(count);
    std::vector<std::vector<float>> bias_buffers(count);
    std::vector<lobcq_product> products(count);
    std::vector<int64_t> sizes = x.sizes();
    for (size_t i = 0; i < count; ++i) {
        const int64_t n = sizes.back() = out_features[i];
        require_bytes(weights[i], "a weight", lobcq_weight_bytes(n, matrix.columns, codebooks, array_size),
                      "a weight was packed for another shape or format than that of this call");
        outputs.push_back(Tensor::empty(sizes, dtype));
        kernel_weights[i] = {weights[i].data<void>(), n, matrix.columns, codebooks, array_size};
        matrices[i] = {outputs[i].data<void>(), matrix.rows, n, n, dtype_of(dtype)};
        products[i] = {tables, &kernel_weights[i], scalar(tensor_scales[i], "a tensor scale"),
                       float_bias(biases[i], n, &bias_buffers[i]), &matrices[i]};
    }
    check_core(lobcq_linear(products.data(), static_cast<int64_t>(count), &activation, api.torch_parallel_for));
    return outputs;
}

void linear_prepacked(Value* stack, uint64_t, uint64_t) {
    Call call;
    call.x = Tensor(stack[0]);
    call.activation_tables = Tensor(stack[1]);
    call.static_scale = take_optional_tensor(stack[2]);
    call.take_rest(stack + 3);
    call.dtype = static_cast<int32_t>(stack[9]);
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
           LOBCQ_FIND(aoti_torch_empty_strided) && LOBCQ_FIND(aoti_torch_new_tensor_handle) &&
           LOBCQ_FIND(aoti_torch_delete_tensor_object) && LOBCQ_FIND(aoti_torch_grad_mode_is_enabled) &&
           LOBCQ_FIND(torch_new_list_reserve_size) && LOBCQ_FIND(torch_list_size) &&
           LOBCQ_FIND(torch_list_get_item) && LOBCQ_FIND(torch_list_push_back) && LOBCQ_FIND(torch_delete_list) &&
           LOBCQ_FIND(aoti_torch_dtype_float32) && LOBCQ_FIND(aoti_torch_dtype_bfloat16) &&
           LOBCQ_FIND(aoti_torch_dtype_float16) && LOBCQ_FIND(aoti_torch_dtype_uint8) &&
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
                               kVersion);
    return failed ? LOBCQ_INVALID_ARGUMENT : LOBCQ_OK;
}
