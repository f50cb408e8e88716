#include "torch_api.h"

namespace lobcq::torch {

Api api;

Tensor Tensor::empty(const std::vector<int64_t>& sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
    return empty(sizes, strides, dtype);
}

Tensor Tensor::empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
    void* handle = nullptr;
    check(api.aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                       api.aoti_torch_device_type_cpu(), 0, &handle),
          "empty_strided");
    return Tensor(reinterpret_cast<Value>(handle));
}

Tensor Tensor::another() const {
    void* handle = nullptr;
    check(api.aoti_torch_new_tensor_handle(handle_, &handle), "new_tensor_handle");
    return Tensor(reinterpret_cast<Value>(handle));
}

int32_t Tensor::dtype() const {
    int32_t dtype = 0;
    check(api.aoti_torch_get_dtype(handle_, &dtype), "get_dtype");
    return dtype;
}

bool Tensor::is_contiguous() const {
    bool contiguous = false;
    check(api.aoti_torch_is_contiguous(handle_, &contiguous), "is_contiguous");
    return contiguous;
}

std::vector<int64_t> Tensor::numbers(int32_t (*get)(void*, int64_t**)) const {
    int64_t* first = nullptr;
    check(get(handle_, &first), "get_sizes or get_strides");
    return {first, first + dim()};
}

Tensor contiguous(Tensor x) {
    Value stack[2] = {x.release(), 0};  // 0: the contiguous memory format
    check(api.torch_call_dispatcher("aten::contiguous", "", stack, kVersion), "aten::contiguous");
    return Tensor(stack[0]);
}

Tensor realigned(Tensor x, uintptr_t align) {
    if (aligned(x.data<void>(), align)) return x;
    Value stack[2] = {x.release(), 0};  // 0: no memory format, that of x
    check(api.torch_call_dispatcher("aten::clone", "", stack, kVersion), "aten::clone");
    return Tensor(stack[0]);
}

// The stable interface has no requires_grad. A view of a tensor that requires a gradient is no leaf.
bool requires_grad(const Tensor& x) {
    if (!api.aoti_torch_grad_mode_is_enabled()) return false;
    Value stack[1] = {x.another().release()};
    check(api.torch_call_dispatcher("aten::alias", "", stack, kVersion), "aten::alias");
    check(api.torch_call_dispatcher("aten::is_leaf", "", stack, kVersion), "aten::is_leaf");
    return (stack[0] & 1) == 0;
}

namespace {

std::optional<Value> take_optional(Value value) {
    auto* boxed = reinterpret_cast<Value*>(value);
    if (!boxed) return std::nullopt;
    const Value inner = *boxed;
    if (api.torch_delete_stable_ivalue) api.torch_delete_stable_ivalue(boxed);
    else delete boxed;
    return inner;
}

template <class Item, class Make>
std::vector<Item> take_list(Value value, Make make) {
    auto* list = reinterpret_cast<void*>(value);
    std::vector<Item> items;
    size_t size = 0;
    int32_t error = api.torch_list_size(list, &size);
    for (size_t i = 0; i < size && !error; ++i) {
        Value item = 0;
        error = api.torch_list_get_item(list, i, &item);
        if (!error) items.push_back(make(item));
    }
    api.torch_delete_list(list);
    check(error, "reading a list");
    return items;
}

}  // namespace

Tensor take_optional_tensor(Value value) { return Tensor(take_optional(value).value_or(0)); }

std::optional<double> take_optional_double(Value value) {
    const std::optional<Value> inner = take_optional(value);
    return inner ? std::optional(take_double(*inner)) : std::nullopt;
}

double take_double(Value value) {
    double number;
    std::memcpy(&number, &value, sizeof number);
    return number;
}

Value give_double(double value) {
    Value bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

Value give_optional(Value value) {
    Value* boxed = nullptr;
    if (!api.torch_new_stable_ivalue) boxed = new Value;
    else check(api.torch_new_stable_ivalue(&boxed), "new_stable_ivalue");
    *boxed = value;
    return reinterpret_cast<Value>(boxed);
}

std::vector<Tensor> take_tensors(Value value) {
    return take_list<Tensor>(value, [](Value item) { return Tensor(item); });
}

std::vector<int64_t> take_integers(Value value) {
    return take_list<int64_t>(value, [](Value item) { return static_cast<int64_t>(item); });
}

Value give_tensors(std::vector<Tensor> tensors) {
    void* list = nullptr;
    check(api.torch_new_list_reserve_size(tensors.size(), &list), "new_list");
    for (Tensor& tensor : tensors) check(api.torch_list_push_back(list, tensor.release()), "list_push_back");
    return reinterpret_cast<Value>(list);
}

}  // namespace lobcq::torch
