#include "ort_ops.h"

#include <cmath>
#include <optional>

#include "ort_weight.h"

namespace lobcq::ort {
namespace {

int32_t checked_array_size(const Node& node, const char* name, int64_t size) {
    if (size != 16 && size != 32 && size != 64 && size != 128)
        node.refuse(std::string(name) + " is " + std::to_string(size) + ", not 16, 32, 64 or 128");
    return static_cast<int32_t>(size);
}

int32_t array_size_of(const Node& node, const KernelInfo* info) {
    return checked_array_size(node, "array_size", node.attribute(info, "array_size"));
}

// L_A of the activation, in which the product is computed; that of the weight, a multiple of it, where it is not given.
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

// Of a tensor [..., columns].
Shape leading_of(const Node& node, size_t index, const Tensor& tensor) {
    if (tensor.shape.empty()) node.refuse(std::string(node.name(index)) + " has no dimension");
    return Shape(tensor.shape.begin(), tensor.shape.end() - 1);
}

Shape with(Shape leading, int64_t last) {
    leading.push_back(last);
    return leading;
}

float scalar(const Node& node, size_t index, const Tensor& tensor) {
    if (elements(tensor.shape) != 1) node.check_shape(index, tensor, {});
    return *tensor.as<const float>();
}

// An activation in kernel layout, for one call.
struct Activation {
    Buffer data;
    lobcq_activation view;

    Activation(const Node& node, int64_t rows, int64_t columns, int32_t array_size, int32_t kind)
        : data(bytes(node, rows, columns, array_size, kind)), view{data.data(), rows, columns, array_size, kind} {}

  private:
    static int64_t bytes(const Node& node, int64_t rows, int64_t columns, int32_t array_size, int32_t kind) {
        const int64_t count = lobcq_activation_bytes(rows, columns, array_size, kind);
        if (count < 0) node.refuse("the activation is too large");
        return count;
    }
};

// What both encoders have in common.
class Encoder : public Kernel {
  protected:
    Encoder(const Signature& op, const Api& api, const KernelInfo* info, size_t static_scale)
        : node_(op.node(api, info)), array_size_(array_size_of(node_, info)), static_scale_(static_scale) {
        if (node_.is_constant(static_scale)) checked(node_.constant(static_scale));
    }

    // The rule for tensor scales [rows], which are filled in where a static one is given: for each row, the rule that
    // makes NaN of a whole row with NaN or infinity in it.
    int32_t scale_rule(const Call& call, float* scales, int64_t rows) const {
        const Tensor given = call.input(static_scale_);
        if (!given) return LOBCQ_ABSMAX_SCALES;
        const float scale = checked(given);
        for (int64_t i = 0; i < rows; ++i) scales[i] = scale;
        return LOBCQ_ROW_SCALES;
    }

    Node node_;
    int32_t array_size_;

  private:
    float checked(const Tensor& tensor) const {
        const float scale = scalar(node_, static_scale_, tensor);
        if (!(scale > 0 && std::isfinite(scale)))
            node_.refuse("static_scale is " + std::to_string(scale) + ": it must be positive and finite");
        return scale;
    }

    size_t static_scale_;  // its input
};

class QuantizeActivation : public Encoder {
  public:
    QuantizeActivation(const Signature& op, const Api& api, const KernelInfo* info)
        : Encoder(op, api, info, kStaticScale) {
        if (node_.is_constant(kCodebooks)) tables_ = tables_of(node_, kCodebooks, node_.constant(kCodebooks));
    }

    void compute(KernelContext* context) const override;

  private:
    enum { kX, kCodebooks, kStaticScale };

    SharedTables tables_;  // null where the codebooks are not constant
};

void QuantizeActivation::compute(KernelContext* context) const {
    const Call call(node_, context);
    const Tensor x = call.input(kX);
    const SharedTables tables = tables_ ? tables_ : tables_of(node_, kCodebooks, call.input(kCodebooks));
    const Shape leading = leading_of(node_, kX, x);
    const int64_t rows = elements(leading), columns = x.shape.back();
    const PackedRow row(columns, tables->num_codebooks, array_size_);
    auto output = [&](size_t index, int64_t last) { return call.output(index, with(leading, last)); };
    lobcq_packed out{static_cast<uint8_t*>(output(0, row.codes)), static_cast<uint8_t*>(output(1, row.selectors)),
                     static_cast<uint8_t*>(output(2, row.scales)), static_cast<float*>(output(3, 1)), rows, rows,
                     columns, tables->num_codebooks, array_size_};
    const lobcq_matrix matrix{x.data, rows, columns, columns, dtype_of(x.type)};
    const int32_t rule = scale_rule(call, out.tensor_scale, rows);
    node_.check_core(lobcq_encode(tables.get(), &matrix, rule, &out, parallel_for), "x");
}

class QuantizeActivationInt8 : public Encoder {
  public:
    QuantizeActivationInt8(const Signature& op, const Api& api, const KernelInfo* info)
        : Encoder(op, api, info, kStaticScale) {}

    void compute(KernelContext* context) const override {
        const Call call(node_, context);
        const Tensor x = call.input(kX);
        const Shape leading = leading_of(node_, kX, x);
        const int64_t rows = elements(leading), columns = x.shape.back(), padded = round_up(columns, array_size_);
        auto output = [&](size_t index, int64_t last) { return call.output(index, with(leading, last)); };
        lobcq_int8 out{static_cast<int8_t*>(output(0, padded)), static_cast<uint8_t*>(output(1, padded / array_size_)),
                       static_cast<float*>(output(2, 1)), rows, rows, columns, array_size_};
        const lobcq_matrix matrix{x.data, rows, columns, columns, dtype_of(x.type)};
        const int32_t rule = scale_rule(call, out.tensor_scale, rows);
        node_.check_core(lobcq_encode_int8(&matrix, rule, &out, parallel_for), "x");
    }

  private:
    enum { kX, kStaticScale };
};

class Rotate : public Kernel {
  public:
    Rotate(const Signature& op, const Api& api, const KernelInfo* info)
        : node_(op.node(api, info)), array_size_(array_size_of(node_, info)) {}

    void compute(KernelContext* context) const override {
        const Call call(node_, context);
        const Tensor x = call.input(kX);
        const int64_t rows = elements(leading_of(node_, kX, x)), columns = x.shape.back();
        if (columns % array_size_)
            node_.refuse("x has " + std::to_string(columns) + " columns, no multiple of array_size, " +
                         std::to_string(array_size_));
        const lobcq_matrix matrix{x.data, rows, columns, columns, dtype_of(x.type)};
        lobcq_matrix out{call.output(0, x.shape), rows, columns, columns, LOBCQ_FP32};
        node_.check_core(lobcq_rotate(&matrix, array_size_, &out, parallel_for), "x");
    }

  private:
    enum { kX };

    Node node_;
    int32_t array_size_;
};

// What all linears have in common.
class Product : public Kernel {
  protected:
    Product(const Signature& op, const Api& api, const KernelInfo* info, size_t first_weight_input)
        : node_(op.node(api, info)), array_size_(kernel_array_size_of(node_, info)),
          weight_array_size_(array_size_of(node_, info)), at_{first_weight_input} {
        if (!at_.all_constant(node_)) return;
        weight_ = repacked([&](size_t index) { return node_.constant(index); });
        release_constants(node_, at_);
    }

    void multiply(const Call& call, const Activation& a, const Shape& leading, ElementType type) const;

    Node node_;
    int32_t array_size_;  // that the product is computed in

  private:
    Weight repacked(const std::function<Tensor(size_t)>& input) const {
        return repack(node_, at_, weight_array_size_, array_size_, input);
    }

    int32_t weight_array_size_;
    WeightInputs at_;
    std::optional<Weight> weight_;  // none where it is not constant
};

void Product::multiply(const Call& call, const Activation& a, const Shape& leading, ElementType type) const {
    std::optional<Weight> of_call;
    if (!weight_) of_call = repacked([&](size_t index) { return call.input(index); });
    const Weight& w = weight_ ? *weight_ : *of_call;
    const int64_t columns = a.view.columns;
    if (array_size_ != weight_array_size_ && columns % weight_array_size_)
        node_.refuse("in_features is " + std::to_string(columns) +
                     ", no multiple of array_size, as arrays of two sizes need");
    if (round_up(columns, array_size_) != w.padded_columns)
        node_.refuse("the weight has rows of " + std::to_string(w.padded_columns) + " scalars, the activation of " +
                     std::to_string(columns) + ", filled up to a multiple of array_size");
    const Tensor bias = call.input(at_.bias());
    if (bias) node_.check_shape(at_.bias(), bias, {w.outputs});
    const float scale = scalar(node_, at_.tensor_scale(), call.input(at_.tensor_scale()));
    const lobcq_weight weight{w.data.data(), w.outputs, columns, w.tables->num_codebooks, array_size_};
    const lobcq_matrix out{call.output(0, with(leading, w.outputs)), a.view.rows, w.outputs, w.outputs, dtype_of(type)};
    const lobcq_product product{w.tables.get(), &weight, scale, bias.as<const float>(), &out};
    node_.check_core(lobcq_linear(&product, 1, &a.view, parallel_for), "the product");
}

int64_t in_features_of(const Node& node, const KernelInfo* info) {
    const int64_t features = node.attribute(info, "in_features");
    if (features < 0) node.refuse("in_features is " + std::to_string(features));
    return features;
}

class Linear : public Product {
  public:
    Linear(const Signature& op, const Api& api, const KernelInfo* info)
        : Product(op, api, info, kWeight), in_features_(in_features_of(node_, info)) {
        if (node_.is_constant(kCodebooks)) tables_ = tables_of(node_, kCodebooks, node_.constant(kCodebooks));
    }

    void compute(KernelContext* context) const override;

  private:
    enum { kCodes, kSelectors, kScales, kTensorScale, kCodebooks, kWeight };

    int64_t in_features_;
    SharedTables tables_;  // of the activation; null where its codebooks are not constant
};

void Linear::compute(KernelContext* context) const {
    const Call call(node_, context);
    const Tensor codes = call.input(kCodes), selectors = call.input(kSelectors), scales = call.input(kScales),
                 tensor_scale = call.input(kTensorScale);
    const SharedTables tables = tables_ ? tables_ : tables_of(node_, kCodebooks, call.input(kCodebooks));
    const Shape leading = leading_of(node_, kCodes, codes);
    const int64_t rows = elements(leading);
    Activation activation(node_, rows, in_features_, array_size_, LOBCQ_ENCODED);
    const PackedRow row(in_features_, tables->num_codebooks, array_size_);
    node_.check_shape(kCodes, codes, with(leading, row.codes));
    node_.check_shape(kSelectors, selectors, with(leading, row.selectors));
    node_.check_shape(kScales, scales, with(leading, row.scales));
    node_.check_shape(kTensorScale, tensor_scale, with(leading, 1));
    const lobcq_packed packed{codes.as<uint8_t>(), selectors.as<uint8_t>(), scales.as<uint8_t>(),
                              tensor_scale.as<float>(), rows, rows, in_features_, tables->num_codebooks, array_size_};
    node_.check_core(lobcq_activation_load(tables.get(), &packed, &activation.view, parallel_for), "the activation");
    multiply(call, activation, leading, kFloat);
}

class LinearInt8Activation : public Product {
  public:
    LinearInt8Activation(const Signature& op, const Api& api, const KernelInfo* info)
        : Product(op, api, info, kWeight), in_features_(in_features_of(node_, info)) {}

    void compute(KernelContext* context) const override {
        const Call call(node_, context);
        const Tensor entries = call.input(kEntries), scales = call.input(kScales),
                     tensor_scale = call.input(kTensorScale);
        const Shape leading = leading_of(node_, kEntries, entries);
        const int64_t rows = elements(leading);
        Activation activation(node_, rows, in_features_, array_size_, LOBCQ_INT8);
        const int64_t padded = round_up(in_features_, array_size_);
        node_.check_shape(kEntries, entries, with(leading, padded));
        node_.check_shape(kScales, scales, with(leading, padded / array_size_));
        node_.check_shape(kTensorScale, tensor_scale, with(leading, 1));
        const lobcq_int8 operand{entries.as<int8_t>(), scales.as<uint8_t>(), tensor_scale.as<float>(), rows, rows,
                                 in_features_, array_size_};
        node_.check_core(lobcq_activation_load_int8(&operand, &activation.view, parallel_for), "the activation");
        multiply(call, activation, leading, kFloat);
    }

  private:
    enum { kEntries, kScales, kTensorScale, kWeight };

    int64_t in_features_;
};

class LinearFloatActivation : public Product {
  public:
    LinearFloatActivation(const Signature& op, const Api& api, const KernelInfo* info)
        : Product(op, api, info, kWeight) {}

    void compute(KernelContext* context) const override {
        const Call call(node_, context);
        const Tensor x = call.input(kX);
        const Shape leading = leading_of(node_, kX, x);
        const int64_t rows = elements(leading), columns = x.shape.back();
        Activation activation(node_, rows, columns, array_size_, LOBCQ_FLOAT);
        const lobcq_matrix matrix{x.data, rows, columns, columns, dtype_of(x.type)};
        node_.check_core(lobcq_activation_split(&matrix, &activation.view, parallel_for), "x");
        multiply(call, activation, leading, x.type);
    }

  private:
    enum { kX, kWeight };
};

template <class K>
std::unique_ptr<Kernel> create(const Signature& op, const Api& api, const KernelInfo* info) {
    return std::make_unique<K>(op, api, info);
}

}  // namespace

Node Signature::node(const Api& api, const KernelInfo* info) const {
    std::vector<const char*> names;
    for (const Port& port : inputs) names.push_back(port.name);
    return Node(api, info, name, names);
}

std::vector<Signature> signatures() {
    const std::vector<Port> encoded{
        {"codes", kUint8}, {"selectors", kUint8}, {"scales", kFloat8E4M3FN}, {"tensor_scale", kFloat}};
    const std::vector<Port> weight{{"w_codes", kUint8},        {"w_selectors", kUint8}, {"w_scales", kFloat8E4M3FN},
                                   {"w_tensor_scale", kFloat}, {"w_codebooks", kInt8},  {"bias", kFloat, kOptional}};
    const std::vector<Port> in_int8{{"entries", kInt8}, {"scales", kFloat8E4M3FN}, {"tensor_scale", kFloat}};
    const Port x{"x", kSame}, y{"y", kFloat}, y_like_x{"y", kSame}, codebooks{"codebooks", kInt8};
    const Port static_scale{"static_scale", kFloat, kOptional};
    std::vector<Port> linear = encoded, int8_activation = in_int8, float_activation{x};
    linear.push_back(codebooks);
    for (std::vector<Port>* inputs : {&linear, &int8_activation, &float_activation})
        inputs->insert(inputs->end(), weight.begin(), weight.end());
    return {
        {"QuantizeActivation", {x, codebooks, static_scale}, encoded, create<QuantizeActivation>},
        {"QuantizeActivationInt8", {x, static_scale}, in_int8, create<QuantizeActivationInt8>},
        {"Rotate", {x}, {y}, create<Rotate>},
        {"Linear", linear, {y}, create<Linear>},
        {"LinearInt8Activation", int8_activation, {y}, create<LinearInt8Activation>},
        {"LinearFloatActivation", float_activation, {y_like_x}, create<LinearFloatActivation>},
    };
}

}  // namespace lobcq::ort
