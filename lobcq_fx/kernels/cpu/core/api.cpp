// The C interface: checks every argument, then runs the work over rows or panels.
#include "lobcq.h"

#include <atomic>
#include <initializer_list>

#include "attention.h"
#include "decode.h"
#include "encode.h"
#include "linear.h"
#include "pack.h"
#include "parallel.h"

namespace lobcq {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 40;  // rows * columns: keeps every byte count far from overflow

bool aligned(const void* p, int64_t to) {
    return p && reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(to) == 0;
}

bool valid_shape(int64_t rows, int64_t columns) {
    return rows >= 0 && columns >= 0 && rows <= kMaxSize && columns <= kMaxSize &&
           (columns == 0 || rows <= kMaxSize / columns);
}

bool valid_dtype(int32_t dtype) { return dtype == LOBCQ_FP32 || dtype == LOBCQ_BF16 || dtype == LOBCQ_FP16; }

bool valid_matrix(const lobcq_matrix* m) {
    if (!m || !valid_shape(m->rows, m->columns) || m->row_stride < m->columns) return false;
    if (m->rows > 1 && !valid_shape(m->rows, m->row_stride)) return false;
    if (!valid_dtype(m->dtype)) return false;
    return m->rows == 0 || m->columns == 0 || aligned(m->data, scalar_bytes(m->dtype));
}

bool valid_format(int32_t num_codebooks, int32_t array_size) {
    return valid_num_codebooks(num_codebooks) && valid_array_size(array_size);
}

const Tables& as_tables(const void* tables) { return *static_cast<const Tables*>(tables); }

bool valid_tables(const void* tables) {
    return aligned(tables, kAlign) && as_tables(tables).magic == kTablesMagic &&
           valid_num_codebooks(as_tables(tables).num_codebooks);
}

// One tensor scale for all rows, or one for each.
template <class Operand>
bool valid_scale_count(const Operand& p) {
    return p.num_tensor_scales == 1 || p.num_tensor_scales == p.rows;
}

int64_t scales_of(int32_t rule, int64_t rows) { return rule == LOBCQ_SHARED_SCALE ? 1 : rows; }

bool valid_scale_rule(int32_t rule) { return rule >= LOBCQ_SHARED_SCALE && rule <= LOBCQ_ABSMAX_SCALES; }

int32_t check_packed(const lobcq_packed* p, bool with_tensor_scale) {
    if (!p) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_format(p->num_codebooks, p->array_size)) return LOBCQ_INVALID_FORMAT;
    if (!valid_shape(p->rows, p->columns)) return LOBCQ_INVALID_ARGUMENT;
    if (with_tensor_scale && p->rows > 0 && (!valid_scale_count(*p) || !aligned(p->tensor_scale, 4)))
        return LOBCQ_INVALID_ARGUMENT;
    const bool empty = p->rows == 0 || p->columns == 0;
    const bool complete = p->codes && p->scales && (p->selectors || p->num_codebooks == 1);
    return empty || complete ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

int32_t check_weight(const lobcq_weight* w) {
    if (!w) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_format(w->num_codebooks, w->array_size)) return LOBCQ_INVALID_FORMAT;
    return valid_shape(w->rows, w->columns) && w->data ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

int32_t check_packed_weight(const lobcq_weight* w) {
    if (const int32_t status = check_weight(w)) return status;
    return WeightView(*w).stamp() == stamp_of(*w) ? LOBCQ_OK : LOBCQ_OTHER_WEIGHT;
}

int32_t check_int8(const lobcq_int8* p) {
    if (!p) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_array_size(p->array_size)) return LOBCQ_INVALID_FORMAT;
    if (!valid_shape(p->rows, p->columns)) return LOBCQ_INVALID_ARGUMENT;
    if (p->rows > 0 && (!valid_scale_count(*p) || !aligned(p->tensor_scale, 4))) return LOBCQ_INVALID_ARGUMENT;
    return p->rows == 0 || p->columns == 0 || (p->entries && p->scales) ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

bool valid_kind(int32_t kind) { return kind == LOBCQ_ENCODED || kind == LOBCQ_FLOAT || kind == LOBCQ_INT8; }

int32_t check_activation(const lobcq_activation* a) {
    if (!a || !valid_kind(a->kind)) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_array_size(a->array_size)) return LOBCQ_INVALID_FORMAT;
    return valid_shape(a->rows, a->columns) && aligned(a->data, kAlign) ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

// `rows` of the activation's are multiplied.
int32_t check_product(const lobcq_product& p, const lobcq_activation& a, int64_t rows) {
    if (!valid_tables(p.tables) || !valid_matrix(p.out) || (p.bias && !aligned(p.bias, 4)))
        return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_packed_weight(p.weight)) return status;
    const bool fits = p.weight->columns == a.columns && p.weight->array_size == a.array_size &&
                      p.weight->num_codebooks == as_tables(p.tables).num_codebooks && p.out->rows == rows &&
                      p.out->columns == p.weight->rows;
    return fits ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

int32_t check_feedback(const lobcq_feedback* f) {
    if (!f || !valid_shape(f->rows, f->columns) || !valid_shape(f->columns, f->columns)) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_array_size(f->array_size)) return LOBCQ_INVALID_FORMAT;
    if (f->columns % f->array_size) return LOBCQ_INVALID_ARGUMENT;
    if (f->rows == 0 || f->columns == 0) return LOBCQ_OK;
    for (const float* floats : {f->weight, f->other_errors, f->coupling, f->power, const_cast<const float*>(f->errors)})
        if (!aligned(floats, 4)) return LOBCQ_INVALID_ARGUMENT;
    return f->codes && f->selectors && f->scales && aligned(f->costs, 8) ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

int32_t check_states(const lobcq_states& s, int64_t heads, int32_t num_codebooks) {
    if (!valid_array_size(s.array_size)) return LOBCQ_INVALID_FORMAT;
    if (s.width < 1 || s.width > kMaxWidth || round_up(s.width, s.array_size) > kMaxWidth) return LOBCQ_INVALID_ARGUMENT;
    return s.row_bytes == state_row_bytes(s, heads, num_codebooks) ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

int32_t check_float_states(const lobcq_states& s, const lobcq_attention& a) {
    if (s.width < 1 || round_up(s.width, 16) > kMaxWidth || !valid_dtype(s.dtype)) return LOBCQ_INVALID_ARGUMENT;
    return a.tokens == 0 || aligned(s.rows, scalar_bytes(s.dtype)) ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

int32_t check_attention(const void* tables, const lobcq_attention* a) {
    if (!a || a->heads < 1 || a->heads > kMaxSize || a->query_heads < 0) return LOBCQ_INVALID_ARGUMENT;
    const bool floats = a->products == LOBCQ_FLOAT_STATES;
    if (!floats && !valid_tables(tables)) return LOBCQ_INVALID_ARGUMENT;
    if (a->query_heads % a->heads || a->mask_kind < LOBCQ_NO_MASK || a->mask_kind > LOBCQ_ADDED_MASK ||
        a->products < LOBCQ_FLOAT_PRODUCTS || a->products > LOBCQ_FLOAT_STATES || !valid_dtype(a->dtype) ||
        (a->mask_kind == LOBCQ_ADDED_MASK && !valid_dtype(a->mask_dtype)))
        return LOBCQ_INVALID_ARGUMENT;
    for (const lobcq_states* s : {&a->keys, &a->values})
        if (const int32_t status = floats ? check_float_states(*s, *a)
                                          : check_states(*s, a->heads, as_tables(tables).num_codebooks))
            return status;
    const int64_t rows = a->queries;
    if (!valid_shape(a->batch, a->query_heads) || !valid_shape(a->batch * a->query_heads, rows) ||
        !valid_shape(a->batch * a->query_heads * rows, kMaxWidth) || !valid_shape(a->batch, a->tokens))
        return LOBCQ_INVALID_ARGUMENT;
    if (a->batch * a->query_heads * rows == 0) return LOBCQ_OK;
    const bool states = a->tokens == 0 || (a->keys.rows && a->values.rows);
    const int64_t added = a->mask_kind == LOBCQ_ADDED_MASK ? scalar_bytes(a->mask_dtype) : 1;
    const bool mask = a->mask_kind == LOBCQ_NO_MASK || a->tokens == 0 || aligned(a->mask, added);
    const int64_t scalar = scalar_bytes(a->dtype);
    return states && mask && aligned(a->query, scalar) && aligned(a->out, scalar) ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

int32_t check_new_states(const void* tables, const lobcq_new_states* s) {
    if (!valid_tables(tables) || !s || !valid_dtype(s->dtype)) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_array_size(s->array_size)) return LOBCQ_INVALID_FORMAT;
    if (!valid_shape(s->batch, s->tokens) || !valid_shape(s->heads, s->width) ||
        !valid_shape(s->batch * s->tokens, s->heads * s->width))
        return LOBCQ_INVALID_ARGUMENT;
    const lobcq_states as_stored{s->rows, s->row_bytes, s->width, s->array_size, s->dtype, {}};
    if (s->row_bytes != state_row_bytes(as_stored, s->heads, as_tables(tables).num_codebooks))
        return LOBCQ_INVALID_ARGUMENT;
    if (s->batch * s->tokens == 0) return LOBCQ_OK;
    const bool readable = s->heads * s->width == 0 || aligned(s->x, scalar_bytes(s->dtype));
    return s->rows && readable ? LOBCQ_OK : LOBCQ_INVALID_ARGUMENT;
}

template <class A, class B>
bool same_shape(const A& a, const B& b) {
    return a.rows == b.rows && a.columns == b.columns;
}

int planes_of(int32_t kind) { return kind == LOBCQ_FLOAT ? isa().planes : 1; }

ActivationView view(const lobcq_activation& a) {
    return ActivationView(a.data, a.rows, a.columns, a.array_size, planes_of(a.kind), a.kind == LOBCQ_INT8);
}

constexpr int64_t kFeedbackGrain = 4;

bool finite_value(const lobcq_matrix& x, int64_t row, int64_t column) {
    const auto* base = static_cast<const uint8_t*>(x.data);
    lobcq_matrix one = x;
    one.data = const_cast<uint8_t*>(base + (row * x.row_stride + column) * (x.dtype == LOBCQ_FP32 ? 4 : 2));
    one.rows = one.columns = 1;
    return absmax_of_rows(one, 0, 1) < kInfBits;
}

}  // namespace
}  // namespace lobcq

using namespace lobcq;

extern "C" {

int32_t lobcq_abi_version(void) { return LOBCQ_ABI_VERSION; }

const char* lobcq_isa(void) { return isa().name; }

int32_t lobcq_check_isa(void) { return *isa_error() ? LOBCQ_UNKNOWN_ISA : LOBCQ_OK; }

const char* lobcq_status_text(int32_t status) {
    switch (status) {
        case LOBCQ_OK: return "success";
        case LOBCQ_INVALID_ARGUMENT: return "an argument is null, misaligned or inconsistent with another";
        case LOBCQ_INVALID_FORMAT: return "num_codebooks must be 1, 2, 4, 8 or 16 and array_size 16, 32, 64 or 128";
        case LOBCQ_INVALID_CODEBOOKS: return "codebook entries must lie in [-31, 31], each codebook sorted ascending";
        case LOBCQ_CORRUPT_DATA: return "the packed bytes are corrupt: a scale or selector that no encoder writes";
        case LOBCQ_NOT_FINITE: return "a value is NaN or infinite";
        case LOBCQ_PARALLEL_FAILED: return "the caller's parallel_for reported an error";
        case LOBCQ_UNKNOWN_ISA: return isa_error();
        case LOBCQ_OTHER_WEIGHT: return "a weight was packed for another shape or format than that of this call";
        default: return "unknown status";
    }
}

int64_t lobcq_tables_bytes(void) { return sizeof(Tables); }

int32_t lobcq_tables_init(const int8_t* codebooks, int32_t num_codebooks, void* tables) {
    if (const int32_t status = lobcq_check_isa()) return status;
    if (!codebooks || !aligned(tables, kAlign)) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_num_codebooks(num_codebooks)) return LOBCQ_INVALID_FORMAT;
    for (int i = 0; i < num_codebooks * kCodebookSize; ++i) {
        if (codebooks[i] < -kEntryMax || codebooks[i] > kEntryMax) return LOBCQ_INVALID_CODEBOOKS;
        if (i % kCodebookSize && codebooks[i] < codebooks[i - 1]) return LOBCQ_INVALID_CODEBOOKS;
    }
    make_tables(codebooks, num_codebooks, static_cast<Tables*>(tables));
    return LOBCQ_OK;
}

int32_t lobcq_tables_codebooks(const void* tables) {
    return valid_tables(tables) ? as_tables(tables).num_codebooks : -1;
}

int32_t lobcq_tensor_scale(const lobcq_matrix* x, float* tensor_scale, int64_t bad[2]) {
    if (!valid_matrix(x) || !tensor_scale || !bad) return LOBCQ_INVALID_ARGUMENT;
    const IeeeMode mode;
    uint32_t most = 0;
    for (int64_t row = 0; row < x->rows; ++row) {
        const uint32_t bits = absmax_of_rows(*x, row, row + 1);
        most = bits > most ? bits : most;
        if (bits < kInfBits) continue;
        bad[0] = row;
        for (bad[1] = 0; finite_value(*x, row, bad[1]);) ++bad[1];
        return LOBCQ_NOT_FINITE;
    }
    *tensor_scale = tensor_scale_of(most, kEntryMax);
    return LOBCQ_OK;
}

static int32_t encode(const void* tables, const lobcq_matrix* x, int32_t scale_rule, bool search, lobcq_packed* out,
                      lobcq_parallel_for parallel) {
    if (!valid_tables(tables) || !valid_matrix(x)) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_scale_rule(scale_rule)) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_packed(out, true)) return status;
    if (!same_shape(*x, *out) || out->num_codebooks != as_tables(tables).num_codebooks) return LOBCQ_INVALID_ARGUMENT;
    if (out->num_tensor_scales != scales_of(scale_rule, out->rows)) return LOBCQ_INVALID_ARGUMENT;
    return run(x->rows, row_grain(x->columns), parallel, [&](int64_t begin, int64_t end) {
        encode_packed(as_tables(tables), *x, scale_rule, search, *out, begin, end);
    });
}

int32_t lobcq_encode(const void* tables, const lobcq_matrix* x, int32_t scale_rule, lobcq_packed* out,
                     lobcq_parallel_for parallel) {
    return encode(tables, x, scale_rule, false, out, parallel);
}

int32_t lobcq_encode_searched(const void* tables, const lobcq_matrix* x, lobcq_packed* out,
                              lobcq_parallel_for parallel) {
    return encode(tables, x, LOBCQ_SHARED_SCALE, true, out, parallel);
}

int32_t lobcq_compensate(const void* tables, const lobcq_feedback* feedback, lobcq_parallel_for parallel) {
    if (!valid_tables(tables)) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_feedback(feedback)) return status;
    return run(feedback->rows, kFeedbackGrain, parallel, [&](int64_t begin, int64_t end) {
        isa().compensate(as_tables(tables), *feedback, begin, end);
    });
}

int32_t lobcq_encode_int8(const lobcq_matrix* x, int32_t scale_rule, lobcq_int8* out, lobcq_parallel_for parallel) {
    if (!valid_matrix(x) || !valid_scale_rule(scale_rule)) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_int8(out)) return status;
    if (!same_shape(*x, *out) || out->num_tensor_scales != scales_of(scale_rule, out->rows))
        return LOBCQ_INVALID_ARGUMENT;
    return run(x->rows, row_grain(x->columns), parallel,
               [&](int64_t begin, int64_t end) { encode_int8(*x, scale_rule, *out, begin, end); });
}

int32_t lobcq_rotate(const lobcq_matrix* x, int32_t array_size, lobcq_matrix* out, lobcq_parallel_for parallel) {
    if (!valid_matrix(x) || !valid_matrix(out) || out->dtype != LOBCQ_FP32) return LOBCQ_INVALID_ARGUMENT;
    if (!valid_array_size(array_size)) return LOBCQ_INVALID_FORMAT;
    if (!same_shape(*x, *out) || x->columns % array_size) return LOBCQ_INVALID_ARGUMENT;
    return run(x->rows, row_grain(x->columns), parallel,
               [&](int64_t begin, int64_t end) { rotate_rows(*x, array_size, *out, begin, end); });
}

int32_t lobcq_decode(const void* tables, const lobcq_packed* packed, lobcq_matrix* out, lobcq_parallel_for parallel) {
    if (!valid_tables(tables) || !valid_matrix(out) || out->dtype != LOBCQ_FP32) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_packed(packed, true)) return status;
    if (!same_shape(*packed, *out)) return LOBCQ_INVALID_ARGUMENT;
    if (packed->num_codebooks != as_tables(tables).num_codebooks) return LOBCQ_INVALID_ARGUMENT;
    return run(out->rows, row_grain(out->columns), parallel, [&](int64_t begin, int64_t end) {
        decode_packed(as_tables(tables), *packed, *out, begin, end);
    });
}

int32_t lobcq_squares(const void* tables, const lobcq_matrix* x, const lobcq_packed* packed, double* squares,
                      lobcq_parallel_for parallel) {
    if (!valid_tables(tables) || !valid_matrix(x)) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_packed(packed, true)) return status;
    if (!same_shape(*x, *packed) || packed->num_codebooks != as_tables(tables).num_codebooks)
        return LOBCQ_INVALID_ARGUMENT;
    if (x->rows > 0 && !aligned(squares, alignof(double))) return LOBCQ_INVALID_ARGUMENT;
    return run(x->rows, row_grain(x->columns), parallel, [&](int64_t begin, int64_t end) {
        add_up_squares(as_tables(tables), *x, *packed, squares, begin, end);
    });
}

int64_t lobcq_weight_bytes(int64_t rows, int64_t columns, int32_t num_codebooks, int32_t array_size) {
    if (!valid_format(num_codebooks, array_size) || !valid_shape(rows, columns)) return -1;
    return WeightView(nullptr, rows, columns, num_codebooks, array_size).bytes;
}

int32_t lobcq_weight_pack(const lobcq_packed* packed, lobcq_weight* weight, lobcq_parallel_for parallel) {
    if (const int32_t status = check_packed(packed, false)) return status;
    if (const int32_t status = check_weight(weight)) return status;
    if (!same_shape(*packed, *weight) || packed->num_codebooks != weight->num_codebooks ||
        packed->array_size != weight->array_size)
        return LOBCQ_INVALID_ARGUMENT;
    const WeightView w(*weight);
    ask_for_large_pages(w);
    std::atomic<bool> intact{true};
    const int32_t status = run(w.panels, 1, parallel, [&](int64_t begin, int64_t end) {
        if (!pack_weight(*packed, w, begin, end)) intact = false;
    });
    w.set_stamp(stamp_of(*weight));
    return status == LOBCQ_OK && !intact ? LOBCQ_CORRUPT_DATA : status;
}

int32_t lobcq_weight_unpack(const lobcq_weight* weight, lobcq_packed* packed, lobcq_parallel_for parallel) {
    if (const int32_t status = check_packed(packed, false)) return status;
    if (const int32_t status = check_packed_weight(weight)) return status;
    if (!same_shape(*packed, *weight) || packed->num_codebooks != weight->num_codebooks ||
        packed->array_size != weight->array_size)
        return LOBCQ_INVALID_ARGUMENT;
    const WeightView w(*weight);
    return run(w.panels, 1, parallel,
               [&](int64_t begin, int64_t end) { unpack_weight(w, *packed, begin, end); });
}

int64_t lobcq_activation_bytes(int64_t rows, int64_t columns, int32_t array_size, int32_t kind) {
    if (!valid_array_size(array_size) || !valid_shape(rows, columns)) return -1;
    if (!valid_kind(kind)) return -1;
    return view({nullptr, rows, columns, array_size, kind}).bytes;
}

int32_t lobcq_activation_encode(const void* tables, const lobcq_matrix* x, int32_t scale_rule,
                                const float* tensor_scale, int32_t rotated, lobcq_activation* activation,
                                lobcq_parallel_for parallel) {
    if (!valid_matrix(x) || !valid_scale_rule(scale_rule)) return LOBCQ_INVALID_ARGUMENT;
    if (scale_rule != LOBCQ_ABSMAX_SCALES && x->rows > 0 && !aligned(tensor_scale, 4)) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_activation(activation)) return status;
    const bool codebooks = activation->kind == LOBCQ_ENCODED;
    if (!same_shape(*x, *activation) || activation->kind == LOBCQ_FLOAT) return LOBCQ_INVALID_ARGUMENT;
    if (codebooks ? !valid_tables(tables) : tables != nullptr) return LOBCQ_INVALID_ARGUMENT;
    if (rotated && x->columns % activation->array_size) return LOBCQ_INVALID_ARGUMENT;
    const ActivationView a = view(*activation);
    return run(x->rows, row_grain(x->columns), parallel, [&](int64_t begin, int64_t end) {
        if (codebooks) encode_activation(as_tables(tables), *x, scale_rule, tensor_scale, rotated, a, begin, end);
        else encode_int8_activation(*x, scale_rule, tensor_scale, rotated, a, begin, end);
    });
}

int32_t lobcq_activation_load(const void* tables, const lobcq_packed* packed, lobcq_activation* activation,
                              lobcq_parallel_for parallel) {
    if (!valid_tables(tables)) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_packed(packed, true)) return status;
    if (const int32_t status = check_activation(activation)) return status;
    if (!same_shape(*packed, *activation) || packed->array_size != activation->array_size ||
        packed->num_codebooks != as_tables(tables).num_codebooks || activation->kind != LOBCQ_ENCODED)
        return LOBCQ_INVALID_ARGUMENT;
    const ActivationView a = view(*activation);
    return run(packed->rows, row_grain(packed->columns), parallel, [&](int64_t begin, int64_t end) {
        load_activation(as_tables(tables), *packed, a, begin, end);
    });
}

int32_t lobcq_activation_load_int8(const lobcq_int8* operand, lobcq_activation* activation,
                                   lobcq_parallel_for parallel) {
    if (const int32_t status = check_int8(operand)) return status;
    if (const int32_t status = check_activation(activation)) return status;
    if (!same_shape(*operand, *activation) || operand->array_size != activation->array_size ||
        activation->kind != LOBCQ_INT8)
        return LOBCQ_INVALID_ARGUMENT;
    const ActivationView a = view(*activation);
    return run(operand->rows, row_grain(operand->columns), parallel,
               [&](int64_t begin, int64_t end) { load_int8_activation(*operand, a, begin, end); });
}

int32_t lobcq_activation_split(const lobcq_matrix* x, lobcq_activation* activation, lobcq_parallel_for parallel) {
    if (!valid_matrix(x)) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_activation(activation)) return status;
    if (!same_shape(*x, *activation) || activation->kind != LOBCQ_FLOAT) return LOBCQ_INVALID_ARGUMENT;
    const ActivationView a = view(*activation);
    return run(x->rows, row_grain(x->columns), parallel,
               [&](int64_t begin, int64_t end) { split_activation(*x, a, begin, end); });
}

int32_t lobcq_linear(const lobcq_product* products, int64_t count, const lobcq_activation* activation,
                     lobcq_parallel_for parallel) {
    if (count < 0 || (count > 0 && !products)) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_activation(activation)) return status;
    for (int64_t i = 0; i < count; ++i)
        if (const int32_t status = check_product(products[i], *activation, activation->rows)) return status;
    const LinearGroup group{products, count, view(*activation)};
    return run(group.tasks(), group.grain(), parallel, [&](int64_t begin, int64_t end) { group.run(begin, end); });
}

int32_t lobcq_activation_gather(const lobcq_activation* from, const int64_t* rows, lobcq_activation* to,
                                lobcq_parallel_for parallel) {
    if (const int32_t status = check_activation(from)) return status;
    if (const int32_t status = check_activation(to)) return status;
    if (from->columns != to->columns || from->array_size != to->array_size || from->kind != to->kind ||
        (to->rows > 0 && !aligned(rows, 8)))
        return LOBCQ_INVALID_ARGUMENT;
    for (int64_t i = 0; i < to->rows; ++i)
        if (rows[i] < 0 || rows[i] >= from->rows) return LOBCQ_INVALID_ARGUMENT;
    const ActivationView source = view(*from), a = view(*to);
    return run(to->rows, row_grain(to->columns), parallel,
               [&](int64_t begin, int64_t end) { gather_activation(source, rows, a, begin, end); });
}

int32_t lobcq_grouped_linear(const lobcq_product* products, const int64_t* first_rows, int64_t count,
                             const lobcq_activation* activation, lobcq_parallel_for parallel) {
    if (count < 0 || (count > 0 && (!products || !aligned(first_rows, 8)))) return LOBCQ_INVALID_ARGUMENT;
    if (const int32_t status = check_activation(activation)) return status;
    for (int64_t i = 0; i < count; ++i) {
        const lobcq_matrix* out = products[i].out;
        if (!out || first_rows[i] < 0 || out->rows > activation->rows || first_rows[i] > activation->rows - out->rows)
            return LOBCQ_INVALID_ARGUMENT;
        if (const int32_t status = check_product(products[i], *activation, out->rows)) return status;
    }
    const GroupedLinears group{products, first_rows, count, view(*activation)};
    return run(group.cost(), group.grain(), parallel, [&](int64_t begin, int64_t end) { group.run(begin, end); });
}

int32_t lobcq_encode_states(const void* tables, const lobcq_new_states* states, lobcq_parallel_for parallel) {
    if (const int32_t status = check_new_states(tables, states)) return status;
    return run(states->batch * states->tokens, row_grain(states->heads * states->width), parallel,
               [&](int64_t begin, int64_t end) { encode_states(as_tables(tables), *states, begin, end); });
}

int32_t lobcq_attend(const void* tables, const lobcq_attention* attention, lobcq_parallel_for parallel) {
    if (const int32_t status = check_attention(tables, attention)) return status;
    static const Tables none{};
    const Attention work(attention->products == LOBCQ_FLOAT_STATES ? none : as_tables(tables), *attention);
    return run(work.tasks(), work.grain(), parallel, [&](int64_t begin, int64_t end) { work.run(begin, end); });
}

}  // extern "C"
