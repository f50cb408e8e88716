#include "ort_ops.h"

#include <cmath>
#include <optional>

#include "ort_grouped.h"
#include "ort_linears.h"

namespace lobcq::ort {
namespace {

float scalar(const Node& node, size_t index, const Tensor& tensor) {
    if (elements(tensor.shape) != 1) node.check_shape(index, tensor, {});
    return *tensor.as<const float>();
}

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

// A product with one weight.
class Product : public StoredProduct<Weight> {
  protected:
    using StoredProduct::StoredProduct;

    void multiply(const Call& call, const Activation& a, ElementType type) const;
};

void Product::multiply(const Call& call, const Activation& a, ElementType type) const {
    std::optional<Weight> of_call;
    const Weight& w = weights(call, &of_call);
    const int64_t columns = a.view.columns;
    check_columns(node_, w, columns, array_size_, weight_array_size_);
    const Tensor bias = call.input(at_.bias());
    if (bias) node_.check_shape(at_.bias(), bias, {w.outputs});
    const float scale = scalar(node_, at_.tensor_scale(), call.input(at_.tensor_scale()));
    const lobcq_weight weight{w.data.data(), w.outputs, columns, w.tables->num_codebooks, array_size_};
    const lobcq_matrix out{call.output(0, with(a.leading, w.outputs)), a.view.rows, w.outputs, w.outputs, dtype_of(type)};
    const lobcq_product product{w.tables.get(), &weight, scale, bias.as<const float>(), &out};
    node_.check_core(lobcq_linear(&product, 1, &a.view, parallel_for), "the product");
}

// The inputs of a linear of groups: where they end, and which rows they are of, in place of the bias.
std::vector<Port> grouped(std::vector<Port> linear) {
    linear.back() = {"ends", kInt32};
    linear.push_back({"rows", kInt64});
    return linear;
}

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
        {"Linear", linear, {y}, create<Linear<Product>>},
        {"LinearInt8Activation", int8_activation, {y}, create<LinearInt8Activation<Product>>},
        {"LinearFloatActivation", float_activation, {y_like_x}, create<LinearFloatActivation<Product>>},
        {"GroupedLinear", grouped(linear), {y}, create_grouped_linear},
        {"GroupedLinearInt8Activation", grouped(int8_activation), {y}, create_grouped_linear_int8_activation},
        {"GroupedLinearFloatActivation", grouped(float_activation), {y_like_x}, create_grouped_linear_float_activation},
    };
}

}  // namespace lobcq::ort
