// What the operands of the prepacked linears have to be: as in lobcq_fx/ops/contracts.py. The core is given
// addresses alone, so that whatever passes here is read and multiplied.
#pragma once

#include "torch_api.h"

namespace lobcq::torch {

enum class Dtypes { kFloats, kFloat32, kUint8, kInt32, kInt64 };  // kFloats: fp32, bf16 or fp16

// One row of the table.
struct Contract {
    const char* name;
    Dtypes dtypes;
    int rank;           // -1: one dimension or more, of any strides; otherwise contiguous
    const char* remedy; // for another number of elements; may be empty
};

constexpr Contract kX{"x", Dtypes::kFloats, -1, ""};
constexpr Contract kActivationTables{"activation_tables", Dtypes::kUint8, 1, ": tables are what this core makes"};
constexpr Contract kStaticScale{"static_scale", Dtypes::kFloat32, 0, ""};
constexpr Contract kWeights{"weights", Dtypes::kUint8, 1, ": it was packed for another shape or format"};
constexpr Contract kTensorScales{"tensor_scales", Dtypes::kFloat32, 0, ""};
constexpr Contract kWeightTables{"weight_tables", Dtypes::kUint8, 1, ": tables are what this core makes"};
constexpr Contract kBiases{"biases", Dtypes::kFloats, 1, ""};

constexpr Contract kStack{"weights", Dtypes::kUint8, 2, ": it was packed for another shape or format"};
constexpr Contract kStackScales{"tensor_scales", Dtypes::kFloat32, 1, ""};
constexpr Contract kOffsets{"offsets", Dtypes::kInt32, 1, ""};
constexpr Contract kRows{"rows", Dtypes::kInt64, 1, ""};

constexpr int kAlone = -1;  // the index of an operand that is in no list

// What is refused, until it is known by which op.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] void refuse(const std::string& what);

constexpr const char* kNoGradient = "the lobcq:: ops are inference only and have no gradient";

// Refuses what the core has refused.
void check_core(int32_t status);

// Runs an op's body; what that refuses, it refuses in the op's name.
template <class Body>
void in_op(const char* name, const Body& body) {
    try {
        body();
    } catch (const Refusal& refusal) {
        throw std::runtime_error(std::string(name) + ": " + refusal.what());
    }
}

// Refuses an operand that breaks its contract, has not `elements`, or whose storage ends before its last element. Its
// device is the dispatcher's business: a tensor of another one takes the call to that one's kernel.
void require(const Contract& contract, const Tensor& operand, int64_t elements, int index = kAlone);

// One operand of an op that reads any strides: its dtypes and sizes, where -1 is any.
struct StridedContract {
    const char* name;
    std::vector<int32_t> dtypes;  // torch's numbers
    std::vector<int64_t> sizes;
};

// Refuses an operand that breaks its contract, or whose storage ends before its last element.
void require(const StridedContract& contract, const Tensor& operand);

// The activation, whose shape is the caller's to choose.
void require_activation(const Tensor& x);

// torch's numbers of the ops' float dtypes.
std::vector<int32_t> float_dtypes();

// enum lobcq_dtype of one of the ops' float dtypes.
int32_t float_dtype(int32_t torch_dtype);

// "uint8", "float32", ...
std::string dtype_name(int32_t torch_dtype);

std::string to_string(const std::vector<int64_t>& numbers);

}  // namespace lobcq::torch
