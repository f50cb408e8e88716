#include "ort_product.h"

namespace lobcq::ort {
namespace {

int32_t checked_array_size(const Node& node, const char* name, int64_t size) {
    if (size != 16 && size != 32 && size != 64 && size != 128)
        node.refuse(std::string(name) + " is " + std::to_string(size) + ", not 16, 32, 64 or 128");
    return static_cast<int32_t>(size);
}

int64_t activation_bytes(const Node& node, int64_t rows, int64_t columns, int32_t array_size, int32_t kind) {
    const int64_t count = lobcq_activation_bytes(rows, columns, array_size, kind);
    if (count < 0) node.refuse("the activation is too large");
    return count;
}

}  // namespace

int32_t array_size_of(const Node& node, const KernelInfo* info) {
    return checked_array_size(node, "array_size", node.attribute(info, "array_size"));
}

int32_t kernel_array_size_of(const Node& node, const KernelInfo* info) {
    constexpr const char* kName = "activation_array_size";
    const int32_t of_weight = array_size_of(node, info);
    const int32_t size = checked_array_size(node, kName, node.attribute(info, kName, of_weight));
    if (size > of_weight) node.refuse("activation_array_size is larger than array_size");
    return size;
}

int32_t dtype_of(ElementType type) {
    return type == kFloat ? LOBCQ_FP32 : type == kBfloat16 ? LOBCQ_BF16 : LOBCQ_FP16;
}

Shape leading_of(const Node& node, size_t index, const Tensor& tensor) {
    if (tensor.shape.empty()) node.refuse(std::string(node.name(index)) + " has no dimension");
    return Shape(tensor.shape.begin(), tensor.shape.end() - 1);
}

Shape with(Shape leading, int64_t last) {
    leading.push_back(last);
    return leading;
}

int64_t in_features_of(const Node& node, const KernelInfo* info) {
    const int64_t features = node.attribute(info, "in_features");
    if (features < 0) node.refuse("in_features is " + std::to_string(features));
    return features;
}

Activation::Activation(const Node& node, Shape leading_, int64_t columns, int32_t array_size, int32_t kind)
    : leading(std::move(leading_)), data(activation_bytes(node, elements(leading), columns, array_size, kind)),
      view{data.data(), elements(leading), columns, array_size, kind} {}

Activation encoded_activation(const Node& node, const Call& call, const Tables& tables, int64_t columns,
                              int32_t array_size) {
    enum { kCodes, kSelectors, kScales, kTensorScale };
    const Tensor codes = call.input(kCodes), selectors = call.input(kSelectors), scales = call.input(kScales),
                 tensor_scale = call.input(kTensorScale);
    Activation activation(node, leading_of(node, kCodes, codes), columns, array_size, LOBCQ_ENCODED);
    const PackedRow row(columns, tables.num_codebooks, array_size);
    node.check_shape(kCodes, codes, with(activation.leading, row.codes));
    node.check_shape(kSelectors, selectors, with(activation.leading, row.selectors));
    node.check_shape(kScales, scales, with(activation.leading, row.scales));
    node.check_shape(kTensorScale, tensor_scale, with(activation.leading, 1));
    const int64_t rows = activation.view.rows;
    const lobcq_packed packed{codes.as<uint8_t>(), selectors.as<uint8_t>(), scales.as<uint8_t>(),
                              tensor_scale.as<float>(), rows, rows, columns, tables.num_codebooks, array_size};
    node.check_core(lobcq_activation_load(&tables, &packed, &activation.view, parallel_for), "the activation");
    return activation;
}

Activation int8_activation(const Node& node, const Call& call, int64_t columns, int32_t array_size) {
    enum { kEntries, kScales, kTensorScale };
    const Tensor entries = call.input(kEntries), scales = call.input(kScales), tensor_scale = call.input(kTensorScale);
    Activation activation(node, leading_of(node, kEntries, entries), columns, array_size, LOBCQ_INT8);
    const int64_t rows = activation.view.rows, padded = round_up(columns, array_size);
    node.check_shape(kEntries, entries, with(activation.leading, padded));
    node.check_shape(kScales, scales, with(activation.leading, padded / array_size));
    node.check_shape(kTensorScale, tensor_scale, with(activation.leading, 1));
    const lobcq_int8 operand{entries.as<int8_t>(), scales.as<uint8_t>(), tensor_scale.as<float>(), rows, rows, columns,
                             array_size};
    node.check_core(lobcq_activation_load_int8(&operand, &activation.view, parallel_for), "the activation");
    return activation;
}

Activation float_activation(const Node& node, const Call& call, int32_t array_size) {
    const Tensor x = call.input(0);
    Activation activation(node, leading_of(node, 0, x), x.shape.empty() ? 0 : x.shape.back(), array_size, LOBCQ_FLOAT);
    const int64_t columns = activation.view.columns;
    const lobcq_matrix matrix{x.data, activation.view.rows, columns, columns, dtype_of(x.type)};
    node.check_core(lobcq_activation_split(&matrix, &activation.view, parallel_for), "x");
    return activation;
}

void check_columns(const Node& node, const Weight& weight, int64_t columns, int32_t array_size,
                   int32_t weight_array_size) {
    if (array_size != weight_array_size && columns % weight_array_size)
        node.refuse("in_features is " + std::to_string(columns) +
                    ", no multiple of array_size, as arrays of two sizes need");
    if (round_up(columns, array_size) != weight.padded_columns)
        node.refuse("the weight has rows of " + std::to_string(weight.padded_columns) + " scalars, the activation of " +
                    std::to_string(columns) + ", filled up to a multiple of array_size");
}

}  // namespace lobcq::ort
