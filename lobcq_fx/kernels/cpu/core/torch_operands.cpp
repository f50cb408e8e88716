#include "torch_operands.h"

namespace lobcq::torch {
namespace {

int64_t element_size(int32_t torch_dtype) {
    if (torch_dtype == api.aoti_torch_dtype_float32() || torch_dtype == api.aoti_torch_dtype_int32()) return 4;
    if (torch_dtype == api.aoti_torch_dtype_int64()) return 8;
    return torch_dtype == api.aoti_torch_dtype_bfloat16() || torch_dtype == api.aoti_torch_dtype_float16() ? 2 : 1;
}

bool has_dtype(Dtypes dtypes, int32_t torch_dtype) {
    switch (dtypes) {
        case Dtypes::kFloats: return float_dtype(torch_dtype) >= 0;
        case Dtypes::kFloat32: return torch_dtype == api.aoti_torch_dtype_float32();
        case Dtypes::kUint8: return torch_dtype == api.aoti_torch_dtype_uint8();
        case Dtypes::kInt32: return torch_dtype == api.aoti_torch_dtype_int32();
        case Dtypes::kInt64: return torch_dtype == api.aoti_torch_dtype_int64();
    }
    return false;
}

const char* names_of(Dtypes dtypes) {
    switch (dtypes) {
        case Dtypes::kFloats: return "float32 or bfloat16 or float16";
        case Dtypes::kFloat32: return "float32";
        case Dtypes::kUint8: return "uint8";
        case Dtypes::kInt32: return "int32";
        case Dtypes::kInt64: return "int64";
    }
    return "";
}

// Whether the storage holds `elements` of them from the first one on.
bool holds(const Tensor& operand, int64_t elements) {
    const int64_t size = element_size(operand.dtype()), held = operand.storage_bytes() / size;
    return elements == 0 || (operand.storage_offset() <= held - elements && operand.data<void>());
}

[[noreturn]] void refuse_operand(const Contract& contract, const Tensor& operand, int index,
                                 const std::string& expected) {
    std::string text = contract.name;
    if (index != kAlone) text += "[" + std::to_string(index) + "]";
    text += " is " + dtype_name(operand.dtype()) + " " + to_string(operand.sizes());
    if (!operand.is_contiguous()) text += " with strides " + to_string(operand.strides());
    else if (has_dtype(contract.dtypes, operand.dtype()) && !holds(operand, operand.numel()))
        text += " in a storage of " + std::to_string(operand.storage_bytes()) + " bytes";
    refuse(text + ": pass " + expected);
}

std::string expected_of(const Contract& contract, int64_t elements) {
    std::string shape = contract.rank == 0 ? "[]" : to_string(std::vector<int64_t>{elements});
    if (contract.rank == 2) shape = "[E, bytes] of " + std::to_string(elements) + " elements";
    return std::string("contiguous ") + names_of(contract.dtypes) + " " + shape;
}

}  // namespace

void refuse(const std::string& what) { throw Refusal(what); }

void check_core(int32_t status) {
    if (status) refuse(lobcq_status_text(status));
}

void require(const Contract& contract, const Tensor& operand, int64_t elements, int index) {
    const bool counted = operand.dim() == contract.rank && operand.numel() == elements;
    if (counted && has_dtype(contract.dtypes, operand.dtype()) && operand.is_contiguous() && holds(operand, elements))
        return;
    refuse_operand(contract, operand, index, expected_of(contract, elements) + (counted ? "" : contract.remedy));
}

namespace {

// Whether what the sizes and strides reach is there.
bool lies_in_its_storage(const Tensor& x) {
    const std::vector<int64_t> sizes = x.sizes(), strides = x.strides();
    int64_t elements = 1, last = 0;  // `last` lies as far behind the first
    for (size_t i = 0; i < sizes.size(); ++i) {
        int64_t reach = 0;
        if (__builtin_mul_overflow(elements, sizes[i], &elements) ||
            __builtin_mul_overflow(sizes[i] - 1, strides[i], &reach) || __builtin_add_overflow(last, reach, &last))
            return false;
    }
    return elements == 0 || holds(x, last + 1);
}

}  // namespace

void require(const StridedContract& contract, const Tensor& operand) {
    const std::vector<int64_t> sizes = operand.sizes();
    bool fits = sizes.size() == contract.sizes.size();
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = contract.sizes[i] < 0 || contract.sizes[i] == sizes[i];
    bool known = false;
    std::string names, shape;
    for (const int32_t dtype : contract.dtypes) known |= dtype == operand.dtype();
    if (fits && known && lies_in_its_storage(operand)) return;
    for (const int32_t dtype : contract.dtypes) names += (names.empty() ? "" : " or ") + dtype_name(dtype);
    for (const int64_t size : contract.sizes)
        shape += (shape.empty() ? "" : ", ") + (size < 0 ? std::string("any") : std::to_string(size));
    std::string actual = dtype_name(operand.dtype()) + " " + to_string(sizes);
    if (fits && known) actual += " in a storage of " + std::to_string(operand.storage_bytes()) + " bytes";
    refuse(std::string(contract.name) + " is " + actual + ": pass " + names + " [" + shape + "]");
}

void require_activation(const Tensor& x) {
    if (!has_dtype(kX.dtypes, x.dtype()) || x.dim() == 0 || !lies_in_its_storage(x))
        refuse_operand(kX, x, kAlone, std::string(names_of(kX.dtypes)) + " [..., K]");
}

std::vector<int32_t> float_dtypes() {
    return {api.aoti_torch_dtype_float32(), api.aoti_torch_dtype_bfloat16(), api.aoti_torch_dtype_float16()};
}

int32_t float_dtype(int32_t torch_dtype) {
    if (torch_dtype == api.aoti_torch_dtype_float32()) return LOBCQ_FP32;
    if (torch_dtype == api.aoti_torch_dtype_bfloat16()) return LOBCQ_BF16;
    if (torch_dtype == api.aoti_torch_dtype_float16()) return LOBCQ_FP16;
    return -1;
}

std::string dtype_name(int32_t torch_dtype) {
    // By c10::ScalarType, whose numbers libtorch's stable interface hands out.
    static constexpr const char* kNames[] = {"uint8",   "int8",      "int16",     "int32",      "int64", "float16",
                                             "float32", "float64",   "complex32", "complex64",  "complex128", "bool",
                                             "qint8",   "quint8",    "qint32",    "bfloat16"};
    if (torch_dtype >= 0 && torch_dtype < static_cast<int32_t>(std::size(kNames))) return kNames[torch_dtype];
    return "of dtype number " + std::to_string(torch_dtype);
}

std::string to_string(const std::vector<int64_t>& numbers) {
    std::string text = "[";
    for (size_t i = 0; i < numbers.size(); ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
    return text + "]";
}

}  // namespace lobcq::torch
