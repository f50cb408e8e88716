// The ops of a cache. They run many times a token, on few numbers each: what they check is what
// lobcq_fx/ops/contracts.py says.
#include "torch_states.h"

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "layout.h"
#include "torch_operands.h"

namespace lobcq::torch {
namespace {

// Look-up tables of the codebooks that a thread has used last: a model has one set.
const Tables& tables_of(const Tensor& codebooks) {
    struct Known {
        Tables tables;
        int8_t entries[kMaxCodebooks * kCodebookSize];
        int32_t number = 0;
    };
    static thread_local Known known;
    require({"codebooks", {api.aoti_torch_dtype_int8()}, {-1, kCodebookSize}}, codebooks);
    const int64_t number = codebooks.sizes()[0];
    if (number < 1 || number > kMaxCodebooks || !valid_num_codebooks(static_cast<int32_t>(number)))
        refuse("codebooks is int8 [" + std::to_string(number) + ", 16]: pass 1, 2, 4, 8 or 16 of them");
    const Tensor whole = contiguous(codebooks.another());
    const auto* entries = whole.data<int8_t>();
    const auto bytes = static_cast<size_t>(number * kCodebookSize);
    if (known.number == number && std::memcmp(known.entries, entries, bytes) == 0) return known.tables;
    known.number = 0;
    check_core(lobcq_tables_init(entries, static_cast<int32_t>(number), &known.tables));
    std::memcpy(known.entries, entries, bytes);
    known.number = static_cast<int32_t>(number);
    return known.tables;
}

int32_t array_size_of(int64_t size, const char* name) {
    if (size != 16 && size != 32 && size != 64 && size != 128)
        refuse(std::string(name) + " is " + std::to_string(size) + ": array_size must be 16, 32, 64 or 128");
    return static_cast<int32_t>(size);
}

int64_t row_bytes(int64_t heads, int64_t width, int32_t array_size, const Tables& tables) {
    return state_row_bytes({nullptr, 0, width, array_size, 0, {}}, heads, tables.num_codebooks);
}

// x [.., D] of strides that the core reads: those of the last dimension are 1, and addresses are a scalar's.
Tensor readable(Tensor x) {
    const std::vector<int64_t> sizes = x.sizes(), strides = x.strides();
    if (sizes.back() > 1 && strides.back() != 1) x = contiguous(std::move(x));
    return realigned(std::move(x), static_cast<uintptr_t>(scalar_bytes(float_dtype(x.dtype()))));
}

Tensor quantized(const Tensor& given, const Tensor& codebooks, int64_t array_size) {
    require({"x", float_dtypes(), {-1, -1, -1, -1}}, given);
    const Tables& tables = tables_of(codebooks);
    const int32_t size = array_size_of(array_size, "array_size");
    if (requires_grad(given)) refuse(kNoGradient);
    const std::vector<int64_t> sizes = given.sizes();
    const int64_t batch = sizes[0], heads = sizes[1], tokens = sizes[2], width = sizes[3];
    const int64_t bytes = row_bytes(heads, width, size, tables);
    const Tensor x = readable(given.another());
    Tensor rows = Tensor::empty({batch, tokens, bytes}, api.aoti_torch_dtype_uint8());
    const std::vector<int64_t> strides = x.strides();
    const lobcq_new_states states{x.data<void>(), {strides[0], strides[1], strides[2]}, rows.data<uint8_t>(), bytes,
                                  batch, heads, tokens, width, float_dtype(x.dtype()), size};
    check_core(lobcq_encode_states(&tables, &states, api.torch_parallel_for));
    return rows;
}

// Refuses a mask of another shape, or dtype; dimensions of size 1 are repeated.
void require_mask(const Tensor& mask, const std::vector<int64_t>& wanted) {
    if (!mask) return;
    std::vector<int32_t> dtypes = float_dtypes();
    dtypes.insert(dtypes.begin(), api.aoti_torch_dtype_bool());
    const std::vector<int64_t> sizes = mask.sizes();
    std::vector<int64_t> expected = wanted;
    for (size_t i = 0; i < expected.size() && i < sizes.size(); ++i)
        if (sizes[i] == 1) expected[i] = 1;
    require({"mask", dtypes, expected}, mask);
}

// Puts such a mask into a call; returns what owns it.
Tensor take_mask(Tensor mask, lobcq_attention* call) {
    if (!mask) return mask;
    const std::vector<int64_t> sizes = mask.sizes();
    const bool added = mask.dtype() != api.aoti_torch_dtype_bool();
    call->mask_kind = added ? LOBCQ_ADDED_MASK : LOBCQ_BOOL_MASK;
    call->mask_dtype = added ? float_dtype(mask.dtype()) : 0;
    mask = realigned(std::move(mask), added ? static_cast<uintptr_t>(scalar_bytes(call->mask_dtype)) : 1);
    call->mask = mask.data<void>();
    const std::vector<int64_t> strides = mask.strides();
    for (size_t i = 0; i < strides.size(); ++i) call->mask_strides[i] = sizes[i] == 1 ? 0 : strides[i];
    return mask;
}

// The arguments of lobcq::attention; see lobcq_fx/ops/attention.py.
struct Attend {
    Tensor query, keys, values, codebooks, mask;
    int64_t heads, value_width, key_array_size, value_array_size;
    float scale;
    bool in_int8;

    Tensor run();
};

Tensor Attend::run() {
    require({"query", float_dtypes(), {-1, -1, -1, -1}}, query);
    const Tables& tables = tables_of(codebooks);
    const std::vector<int64_t> sizes = query.sizes();
    const int64_t batch = sizes[0], query_heads = sizes[1], queries = sizes[2], width = sizes[3];
    const int32_t key_size = array_size_of(key_array_size, "key_array_size");
    const int32_t value_size = array_size_of(value_array_size, "value_array_size");
    if (heads < 1 || query_heads % heads)
        refuse("heads is " + std::to_string(heads) + ", which does not divide the " + std::to_string(query_heads) +
               " of query");
    for (const int64_t one : {width, value_width})
        if (one < 1 || one > kMaxWidth)
            refuse("value_width is " + std::to_string(value_width) + " and a query's " + std::to_string(width) +
                   ": the core attends to heads of 1 to 1024 scalars");
    const int64_t key_bytes = row_bytes(heads, width, key_size, tables);
    const int64_t value_bytes = row_bytes(heads, value_width, value_size, tables);
    const std::vector<int32_t> bytes{api.aoti_torch_dtype_uint8()};
    require({"keys", bytes, {batch, -1, key_bytes}}, keys);
    const int64_t tokens = keys.sizes()[1];
    require({"values", bytes, {batch, tokens, value_bytes}}, values);
    require_mask(mask, {batch, query_heads, queries, tokens});
    if (requires_grad(query)) refuse(kNoGradient);
    query = readable(std::move(query));
    keys = contiguous(std::move(keys));
    values = contiguous(std::move(values));
    Tensor out = Tensor::empty({batch, query_heads, queries, value_width}, query.dtype());
    const std::vector<int64_t> strides = query.strides();
    lobcq_attention call{};
    call.query = query.data<void>();
    std::memcpy(call.query_strides, strides.data(), sizeof call.query_strides);
    call.keys = {keys.data<uint8_t>(), key_bytes, width, key_size, 0, {}};
    call.values = {values.data<uint8_t>(), value_bytes, value_width, value_size, 0, {}};
    call.out = out.data<void>();
    const std::vector<int64_t> out_strides = out.strides();
    std::memcpy(call.out_strides, out_strides.data(), sizeof call.out_strides);
    call.batch = batch, call.query_heads = query_heads, call.queries = queries;
    call.heads = heads, call.tokens = tokens, call.scale = scale;
    call.dtype = float_dtype(query.dtype());
    call.products = in_int8 ? LOBCQ_INT8_PRODUCTS : LOBCQ_FLOAT_PRODUCTS;
    const Tensor owned = take_mask(std::move(mask), &call);
    check_core(lobcq_attend(&tables, &call, api.torch_parallel_for));
    return out;
}

// The arguments of lobcq::attention.float_states.
struct AttendFloats {
    Tensor query, key, value, mask;
    std::optional<double> scale;
    bool enable_gqa;

    Tensor run();

  private:
    Tensor by_torch();
};

Tensor AttendFloats::by_torch() {
    Value stack[8] = {query.release(), key.release(), value.release(), mask ? give_optional(mask.release()) : 0,
                      give_double(0.0), 0, scale ? give_optional(give_double(*scale)) : 0, enable_gqa};
    check(api.torch_call_dispatcher("aten::scaled_dot_product_attention", "", stack, kVersion),
          "scaled_dot_product_attention");
    return Tensor(stack[0]);
}

Tensor AttendFloats::run() {
    const int32_t dtype = query.dtype();
    require({"query", float_dtypes(), {-1, -1, -1, -1}}, query);
    const std::vector<int64_t> sizes = query.sizes();
    const int64_t batch = sizes[0], query_heads = sizes[1], queries = sizes[2], width = sizes[3];
    require({"key", {dtype}, {batch, -1, -1, width}}, key);
    const int64_t heads = key.sizes()[1], tokens = key.sizes()[2];
    require({"value", {dtype}, {batch, heads, tokens, -1}}, value);
    const int64_t value_width = value.sizes()[3], group = enable_gqa && heads > 0 ? query_heads / heads : 1;
    if (query_heads != heads * group)
        refuse("key has " + std::to_string(heads) + " heads, which query's " + std::to_string(query_heads) +
               (enable_gqa ? " are no multiple of" : " have to be, without enable_gqa"));
    require_mask(mask, {batch, query_heads, queries, tokens});
    if (requires_grad(query) || requires_grad(key) || requires_grad(value)) refuse(kNoGradient);
    // As torch's own attention lays its result out: the heads of a token side by side.
    const std::vector<int64_t> strides{queries * query_heads * value_width, value_width, query_heads * value_width, 1};
    // A step of decoding, which torch spends on packing; of several queries its own kernel is as fast, or faster.
    const bool fits = std::min({width, value_width, tokens}) > 0 && std::max(width, value_width) <= kMaxWidth;
    if (queries != 1 || !fits) {
        Tensor found = by_torch();
        if (found.strides() == strides) return found;
        Tensor out = Tensor::empty({batch, query_heads, queries, value_width}, strides, dtype);
        Value stack[3] = {out.release(), found.release(), 0};
        check(api.torch_call_dispatcher("aten::copy_", "", stack, kVersion), "copy_");
        return Tensor(stack[0]);
    }
    Tensor out = Tensor::empty({batch, query_heads, queries, value_width}, strides, dtype);
    query = readable(std::move(query));
    key = readable(std::move(key));
    value = readable(std::move(value));
    lobcq_attention call{};
    call.query = query.data<void>();
    call.out = out.data<void>();
    const std::vector<int64_t> query_strides = query.strides();
    std::memcpy(call.query_strides, query_strides.data(), sizeof call.query_strides);
    std::memcpy(call.out_strides, strides.data(), sizeof call.out_strides);
    const auto states = [&](const Tensor& x, lobcq_states* to) {
        const std::vector<int64_t> x_strides = x.strides();
        *to = {x.data<uint8_t>(), 0, x.sizes()[3], 0, float_dtype(dtype), {x_strides[0], x_strides[1], x_strides[2]}};
    };
    states(key, &call.keys);
    states(value, &call.values);
    call.batch = batch, call.query_heads = query_heads, call.queries = queries;
    call.heads = heads, call.tokens = tokens;
    call.scale = static_cast<float>(scale ? *scale : 1 / std::sqrt(static_cast<double>(width)));
    call.dtype = float_dtype(dtype);
    call.products = LOBCQ_FLOAT_STATES;
    const Tensor owned = take_mask(std::move(mask), &call);
    check_core(lobcq_attend(nullptr, &call, api.torch_parallel_for));
    return out;
}

}  // namespace

void quantize_states(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::quantize_states", [stack] {
        const Tensor x(stack[0]), codebooks(stack[1]);
        stack[0] = quantized(x, codebooks, static_cast<int64_t>(stack[2])).release();
    });
}

void attention(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::attention", [stack] {
        Attend call{Tensor(stack[0]), Tensor(stack[1]), Tensor(stack[2]), Tensor(stack[3]),
                    take_optional_tensor(stack[4]), static_cast<int64_t>(stack[5]), static_cast<int64_t>(stack[6]),
                    static_cast<int64_t>(stack[7]), static_cast<int64_t>(stack[8]),
                    static_cast<float>(take_double(stack[9])), (stack[10] & 1) != 0};
        stack[0] = call.run().release();
    });
}

void attention_float_states(Value* stack, uint64_t, uint64_t) {
    in_op("lobcq::attention", [stack] {
        AttendFloats call{Tensor(stack[0]), Tensor(stack[1]), Tensor(stack[2]), take_optional_tensor(stack[3]),
                          take_optional_double(stack[4]), (stack[5] & 1) != 0};
        stack[0] = call.run().release();
    });
}

}  // namespace lobcq::torch
