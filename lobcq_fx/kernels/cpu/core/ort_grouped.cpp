#include "ort_grouped.h"

#include "groups.h"
#include "ort_linears.h"

namespace lobcq::ort {
namespace {

// Products with the matrices of a stack.
class GroupedProduct : public StoredProduct<std::vector<Weight>> {
  protected:
    using StoredProduct::StoredProduct;

    void multiply(const Call& call, const Activation& a, ElementType type) const;

  private:
    Activation gathered(const Activation& from, const Tensor& rows) const;
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
    const std::vector<Weight>& stack = weights(call, &of_call);
    if (stack.empty()) node_.refuse("w_codes has no matrix");
    const auto count = static_cast<int64_t>(stack.size());
    const Tensor ends = call.input(at_.ends()), scales = call.input(at_.tensor_scale());
    node_.check_shape(at_.ends(), ends, {count});
    node_.check_shape(at_.tensor_scale(), scales, {count});
    const int64_t columns = all.view.columns, outputs = stack[0].outputs;
    check_columns(node_, stack[0], columns, array_size_, weight_array_size_);
    const Activation a = gathered(all, call.input(at_.rows()));
    const int64_t rows = a.view.rows;
    GroupProducts products(stack[0].tables.get(),
                           {call.output(0, {rows, outputs}), rows, outputs, outputs, dtype_of(type)});
    const std::vector<int64_t> last = group_ends(ends.as<const int32_t>(), count, rows);
    for (size_t i = 0; i < stack.size(); ++i)
        products.add({stack[i].data.data(), outputs, columns, stack[i].tables->num_codebooks, array_size_},
                     scales.as<const float>()[i], last[i]);
    node_.check_core(products.run(a.view, parallel_for), "the product");
}

}  // namespace

std::unique_ptr<Kernel> create_grouped_linear(const Signature& op, const Api& api, const KernelInfo* info) {
    return std::make_unique<Linear<GroupedProduct>>(op, api, info);
}

std::unique_ptr<Kernel> create_grouped_linear_int8_activation(const Signature& op, const Api& api,
                                                              const KernelInfo* info) {
    return std::make_unique<LinearInt8Activation<GroupedProduct>>(op, api, info);
}

std::unique_ptr<Kernel> create_grouped_linear_float_activation(const Signature& op, const Api& api,
                                                               const KernelInfo* info) {
    return std::make_unique<LinearFloatActivation<GroupedProduct>>(op, api, info);
}

}  // namespace lobcq::ort
