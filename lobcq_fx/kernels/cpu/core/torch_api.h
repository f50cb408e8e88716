// What the binding uses of libtorch's stable C interface (torch/csrc/stable/c/shim.h and
// torch/csrc/inductor/aoti_torch/c/shim.h, torch 2.10 and later), declared here and looked up at run time: the core
// links no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "lobcq.h"

namespace lobcq::torch {

using Value = uint64_t;  // StableIValue: an integer, or a pointer to what does not fit
using BoxedKernel = void (*)(Value* stack, uint64_t num_arguments, uint64_t num_outputs);

// Every function returns 0 for success unless it is said to return something else.
struct Api {
    int32_t (*aoti_torch_library_init_impl)(const char* ns, const char* key, const char* file, uint32_t line,
                                            void** library);
    int32_t (*torch_library_impl)(void* library, const char* name, BoxedKernel kernel, uint64_t version);
    int32_t (*torch_call_dispatcher)(const char* name, const char* overload, Value* stack, uint64_t version);
    int32_t (*aoti_torch_get_data_ptr)(void* tensor, void** data);
    int32_t (*aoti_torch_get_dim)(void* tensor, int64_t* dim);
    int32_t (*aoti_torch_get_sizes)(void* tensor, int64_t** sizes);
    int32_t (*aoti_torch_get_strides)(void* tensor, int64_t** strides);
    int32_t (*aoti_torch_get_dtype)(void* tensor, int32_t* dtype);
    int32_t (*aoti_torch_get_numel)(void* tensor, int64_t* elements);
    int32_t (*aoti_torch_is_contiguous)(void* tensor, bool* contiguous);
    int32_t (*aoti_torch_get_storage_size)(void* tensor, int64_t* bytes);
    int32_t (*aoti_torch_get_storage_offset)(void* tensor, int64_t* elements);
    int32_t (*aoti_torch_empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, void** tensor);
    int32_t (*aoti_torch_new_tensor_handle)(void* tensor, void** reference);
    int32_t (*aoti_torch_delete_tensor_object)(void* tensor);
    int32_t (*torch_new_list_reserve_size)(size_t size, void** list);
    int32_t (*torch_list_size)(void* list, size_t* size);
    int32_t (*torch_list_get_item)(void* list, size_t index, Value* item);
    int32_t (*torch_list_push_back)(void* list, Value item);
    int32_t (*torch_delete_list)(void* list);
    bool (*aoti_torch_grad_mode_is_enabled)();  // these return the value
    int32_t (*aoti_torch_dtype_float32)();
    int32_t (*aoti_torch_dtype_bfloat16)();
    int32_t (*aoti_torch_dtype_float16)();
    int32_t (*aoti_torch_dtype_uint8)();
    int32_t (*aoti_torch_dtype_int32)();
    int32_t (*aoti_torch_dtype_int64)();
    int32_t (*aoti_torch_dtype_int8)();
    int32_t (*aoti_torch_dtype_bool)();
    int32_t (*aoti_torch_device_type_cpu)();
    int32_t (*torch_new_stable_ivalue)(Value** value);    // since 2.13; null before: C++ `new`
    int32_t (*torch_delete_stable_ivalue)(Value* value);  // the same of `delete`
    lobcq_parallel_for torch_parallel_for;
};

extern Api api;

constexpr uint64_t kVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);  // of the interface that this is written for

// torch turns what is thrown here into a RuntimeError.
inline void check(int32_t error, const char* what) {
    if (error) throw std::runtime_error(std::string("lobcq: libtorch failed in ") + what);
}

// An owned reference to a tensor.
class Tensor {
  public:
    explicit Tensor(Value value = 0) : handle_(reinterpret_cast<void*>(value)) {}
    Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_) api.aoti_torch_delete_tensor_object(handle_);
    }

    static Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype);  // contiguous, on the CPU
    static Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype);

    Tensor another() const;  // reference to the same tensor

    explicit operator bool() const { return handle_; }
    Value release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

    template <class T>
    T* data() const {
        void* data = nullptr;
        check(api.aoti_torch_get_data_ptr(handle_, &data), "get_data_ptr");
        return static_cast<T*>(data);
    }
    int32_t dtype() const;
    std::vector<int64_t> sizes() const { return numbers(api.aoti_torch_get_sizes); }
    std::vector<int64_t> strides() const { return numbers(api.aoti_torch_get_strides); }
    int64_t dim() const { return number(api.aoti_torch_get_dim, "get_dim"); }
    int64_t numel() const { return number(api.aoti_torch_get_numel, "get_numel"); }
    int64_t storage_bytes() const { return number(api.aoti_torch_get_storage_size, "get_storage_size"); }
    int64_t storage_offset() const { return number(api.aoti_torch_get_storage_offset, "get_storage_offset"); }
    bool is_contiguous() const;

    // The first element, wherever it lies in memory.
    template <class T>
    T first() const {
        T value;
        std::memcpy(&value, data<void>(), sizeof value);
        return value;
    }

  private:
    int64_t number(int32_t (*get)(void*, int64_t*), const char* what) const {
        int64_t value = 0;
        check(get(handle_, &value), what);
        return value;
    }
    std::vector<int64_t> numbers(int32_t (*get)(void*, int64_t**)) const;

    void* handle_;
};

inline bool aligned(const void* data, uintptr_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; }

Tensor contiguous(Tensor x);

// The same elements where `align` bytes divide their address: a compiled program's constants, say, start anywhere.
Tensor realigned(Tensor x, uintptr_t align);

bool requires_grad(const Tensor& x);

// Taking arguments off the stack: each is owned afterwards, and must be taken even where an error is found first.
Tensor take_optional_tensor(Value value);
std::vector<Tensor> take_tensors(Value value);
std::vector<int64_t> take_integers(Value value);

Value give_tensors(std::vector<Tensor> tensors);
Value give_optional(Value value);

Value give_double(double value);
double take_double(Value value);
std::optional<double> take_optional_double(Value value);

}  // namespace lobcq::torch
