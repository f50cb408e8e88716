#include "ort_grouped.h"

#include <optional>

#include "groups.h"
#include "ort_product.h"

namespace lobcq::ort {
namespace {

class GroupedProduct : public Kernel {
  protected:
    GroupedProduct(const Signature& op, const Api& api, const KernelInfo* info, size_t first_weight_input)
        : node_(op.node(api, info)), array_size_(kernel_array_size_of(node_, info)),
          weight_array_size_(array_size_of(node_, info)), at_{first_weight_input} {
        if (!at_.all_constant(node_)) return;
        weights_ = repacked([&](size_t index) { return node_.constant(index); });
        release_constants(node_, at_);
    }

    void multiply(const Call& call, const Activation& a, ElementType type) const;

    Node node_;
    int32_t array_size_;  // that the product is computed in

  private:
    std::vector<Weight> repacked(const std::function<Tensor(size_t)>& input) const {
        return repack_stack(node_, at_, weight_array_size_, array_size_, input);
    }
    Activation gathered(const Activation& from, const Tensor& rows) const;

    int32_t weight_array_size_;
    WeightInputs at_;
    std::optional<std::vector<Weight>> weights_;  // none where they are not constant
};

Activation GroupedProduct::gathered(const Activation& from, const Tensor& rows) const {
    if (rows.shape.size() != 1) node_.refuse("rows has the shape " + to_string(rows.shape) + ", not [S]");
    if (from.leading.size() != 1)
        node_.refuse("the activation has the leading dimensions " + to_string(from.leading) + ", not [T]");
    const auto* wanted = rows.as<const int64_t>();
    const RowRange range = range_of(wanted, rows.shape[0]);
    if (!range.exist(from.view.rows))
        node_.refuse("rows reach from " + std::to_string(range.least) + " to " + std::to_string(range.most) +
                     ": the activation has rows 0 to " + std::to_string(from.view.rows - 1));
    Activation to(node_, rows.shape, from.view.columns, from.view.array_size, from.view.kind);
    node_.check_core(lobcq_activation_gather(&from.view, wanted, &to.view, parallel_for), "rows");
    return to;
}

void GroupedProduct::multiply(const Call& call, const Activation& all, ElementType type) const {
    std::optional<std::vector<Weight>> of_call;
    if (!weights_) of_call = repacked([&](size_t index) { return call.input(index); });
    const std::vector<Weight>& weights = weights_ ? *weights_ : *of_call;
    if (weights.empty()) node_.refuse("w_codes has no matrix");
    const auto count = static_cast<int64_t>(weights.size());
    const Tensor ends = call.input(at_.ends()), scales = call.input(at_.tensor_scale());
    node_.check_shape(at_.ends(), ends, {count});
    node_.check_shape(at_.tensor_scale(), scales, {count});
    const int64_t columns = all.view.columns, outputs = weights[0].outputs;
    check_columns(node_, weights[0], columns, array_size_, weight_array_size_);
    const Activation a = gathered(all, call.input(at_.rows()));
    const int64_t rows = a.view.rows;
    GroupProducts products(weights[0].tables.get(),
                           {call.output(0, {rows, outputs}), rows, outputs, outputs, dtype_of(type)});
    const std::vector<int64_t> last = group_ends(ends.as<const int32_t>(), count, rows);
    for (size_t i = 0; i < weights.size(); ++i)
        products.add({weights[i].data.data(), outputs, columns, weights[i].tables->num_codebooks, array_size_},
                     scales.as<const float>()[i], last[i]);
    node_.check_core(products.run(a.view, parallel_for), "the product");
}

class GroupedLinear : public GroupedProduct {
  public:
    GroupedLinear(const Signature& op, const Api& api, const KernelInfo* info)
        : GroupedProduct(op, api, info, kWeight), in_features_(in_features_of(node_, info)) {
        if (node_.is_constant(kCodebooks)) tables_ = tables_of(node_, kCodebooks, node_.constant(kCodebooks));
    }

    void compute(KernelContext* context) const override {
        const Call call(node_, context);
        const SharedTables tables = tables_ ? tables_ : tables_of(node_, kCodebooks, call.input(kCodebooks));
        multiply(call, encoded_activation(node_, call, *tables, in_features_, array_size_), kFloat);
    }

  private:
    enum { kCodebooks = 4, kWeight };  // behind codes, selectors, scales and tensor_scale

    int64_t in_features_;
    SharedTables tables_;  // of the activation; null where its codebooks are not constant
};

class GroupedLinearInt8Activation : public GroupedProduct {
  public:
    GroupedLinearInt8Activation(const Signature& op, const Api& api, const KernelInfo* info)
        : GroupedProduct(op, api, info, kWeight), in_features_(in_features_of(node_, info)) {}

    void compute(KernelContext* context) const override {
        const Call call(node_, context);
        multiply(call, int8_activation(node_, call, in_features_, array_size_), kFloat);
    }

  private:
    enum { kWeight = 3 };  // behind entries, scales and tensor_scale

    int64_t in_features_;
};

class GroupedLinearFloatActivation : public GroupedProduct {
  public:
    GroupedLinearFloatActivation(const Signature& op, const Api& api, const KernelInfo* info)
        : GroupedProduct(op, api, info, kWeight) {}

    void compute(KernelContext* context) const override {
        const Call call(node_, context);
        multiply(call, float_activation(node_, call, array_size_), call.input(kX).type);
    }

  private:
    enum { kX, kWeight };
};

}  // namespace

std::unique_ptr<Kernel> create_grouped_linear(const Signature& op, const Api& api, const KernelInfo* info) {
    return std::make_unique<GroupedLinear>(op, api, info);
}

std::unique_ptr<Kernel> create_grouped_linear_int8_activation(const Signature& op, const Api& api,
                                                              const KernelInfo* info) {
    return std::make_unique<GroupedLinearInt8Activation>(op, api, info);
}

std::unique_ptr<Kernel> create_grouped_linear_float_activation(const Signature& op, const Api& api,
                                                               const KernelInfo* info) {
    return std::make_unique<GroupedLinearFloatActivation>(op, api, info);
}

}  // namespace lobcq::ort
