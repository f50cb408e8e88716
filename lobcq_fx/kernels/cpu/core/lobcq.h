/* LO-BCQ on the CPU: encode, repack, decode and multiply. A plain C interface: no allocation, no threads of its own, no
 * global state but the choice of instruction set, made once per process.
 *
 * Terms (docs/format.md has the rules bit for bit). An operand [rows, columns] is cut along its columns: a block is 8
 * scalars and has a selector, which names one of num_codebooks codebooks of 16 entries; a block array is array_size
 * scalars and has an E4M3 scale. num_codebooks is 1, 2, 4, 8 or 16, array_size 16, 32, 64 or 128.
 *
 * Contract of every function
 * - Returns LOBCQ_OK or one of the codes below; on any other value than LOBCQ_OK the outputs' contents are unspecified.
 * - Sizes are in elements unless a name says bytes; all are int64_t and at least 0. Rows or columns of 0 are allowed.
 * - "Opaque" buffers (tables, weight, activation) belong to the caller, must start on a multiple of 64 bytes (a weight
 *   should, but may start anywhere), hold at least the stated number of bytes, are read and written only by this
 *   library, and are valid only within the process that made them (their layout may depend on the instruction set).
 *   Moving them with memcpy is fine.
 * - Other pointers need the natural alignment of their element type. No output may overlap an input or another output.
 * - Inputs are never written. Calls are reentrant: any number of threads may share tables, weights and activations.
 * - `parallel` may be NULL: everything then runs on the calling thread. The number of threads changes no result bit.
 */
#ifndef LOBCQ_H
#define LOBCQ_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define LOBCQ_API __attribute__((visibility("default")))
#else
#define LOBCQ_API
#endif

/* Raised whenever a declaration in this header changes its meaning. */
#define LOBCQ_ABI_VERSION 8

enum lobcq_status {
    LOBCQ_OK = 0,
    LOBCQ_INVALID_ARGUMENT = 1, /* a null, misaligned or inconsistent argument */
    LOBCQ_INVALID_FORMAT = 2,   /* num_codebooks or array_size not in the format */
    LOBCQ_INVALID_CODEBOOKS = 3,/* an entry outside [-31, 31], or a codebook not sorted ascending */
    LOBCQ_CORRUPT_DATA = 4,     /* packed bytes that no encoder writes */
    LOBCQ_NOT_FINITE = 5,       /* NaN or infinity where a finite number is needed */
    LOBCQ_PARALLEL_FAILED = 6,  /* `parallel` returned an error */
    LOBCQ_UNKNOWN_ISA = 7,      /* LOBCQ_CPU_ISA names an instruction set that does not exist or that this CPU lacks */
    LOBCQ_OTHER_WEIGHT = 8      /* a weight in kernel layout was packed for another shape or format */
};

enum lobcq_dtype { LOBCQ_FP32 = 0, LOBCQ_BF16 = 1, LOBCQ_FP16 = 2 };

/* Where encoding takes the tensor scale from. */
enum lobcq_scale_rule {
    LOBCQ_SHARED_SCALE = 0,  /* tensor_scale [1], given: a weight's, or an activation's static one */
    LOBCQ_ROW_SCALES = 1,    /* tensor_scale [rows], given */
    LOBCQ_ABSMAX_SCALES = 2  /* tensor_scale [rows], computed: max|row| / 13888, in int8 / 56896; 1 for zeros alone */
};

/* What an activation buffer holds. */
enum lobcq_activation_kind {
    LOBCQ_ENCODED = 0, /* LO-BCQ entries: W4A4 */
    LOBCQ_FLOAT = 1,   /* the float values, exact to 2^-22 of their block array's largest magnitude: W4A16 */
    LOBCQ_INT8 = 2     /* integers in [-127, 127]: W4A8 */
};

/* Runs task(b, e, context) over disjoint ranges that cover [begin, end), in any order, on any threads, and returns 0
 * when all are done. `grain` is the least number of indices worth a thread. torch_parallel_for of libtorch's stable C
 * interface is such a function. */
typedef void (*lobcq_task)(int64_t begin, int64_t end, void* context);
typedef int32_t (*lobcq_parallel_for)(int64_t begin, int64_t end, int64_t grain, lobcq_task task, void* context);

/* Floats [rows, columns]; row_stride >= columns elements between rows, columns contiguous. */
typedef struct {
    void* data; /* not written where the matrix is an input */
    int64_t rows, columns, row_stride;
    int32_t dtype; /* enum lobcq_dtype */
} lobcq_matrix;

/* An encoded operand as it is stored; Kp = columns rounded up to a multiple of array_size. Each array is contiguous.
 *   codes        uint8 [rows, Kp/2]: scalar 2i in the low nibble, 2i+1 in the high nibble
 *   selectors    uint8 [rows, ceil(Kp/8 * log2(num_codebooks) / 8)]: little-endian bit order (NULL for 1 codebook)
 *   scales       uint8 [rows, Kp/array_size]: E4M3
 *   tensor_scale fp32 [num_tensor_scales], which is 1 (shared by all rows) or rows */
typedef struct {
    uint8_t* codes;
    uint8_t* selectors;
    uint8_t* scales;
    float* tensor_scale;
    int64_t num_tensor_scales;
    int64_t rows, columns;
    int32_t num_codebooks, array_size;
} lobcq_packed;

/* An activation in int8; Kp and tensor_scale as above. Each array is contiguous.
 *   entries      int8 [rows, Kp], in [-127, 127]; what is behind `columns` is written as zeros and never read
 *   scales       uint8 [rows, Kp/array_size]: E4M3 */
typedef struct {
    int8_t* entries;
    uint8_t* scales;
    float* tensor_scale;
    int64_t num_tensor_scales;
    int64_t rows, columns;
    int32_t array_size;
} lobcq_int8;

/* A weight [rows, columns] = [N, K] in kernel layout; `data` is opaque, of lobcq_weight_bytes() bytes. */
typedef struct {
    void* data;
    int64_t rows, columns;
    int32_t num_codebooks, array_size;
} lobcq_weight;

/* An activation [rows, columns] = [M, K] in kernel layout; `data` is opaque, of lobcq_activation_bytes() bytes. */
typedef struct {
    void* data;
    int64_t rows, columns;
    int32_t array_size;
    int32_t kind; /* enum lobcq_activation_kind */
} lobcq_activation;

LOBCQ_API int32_t lobcq_abi_version(void);

/* "portable", "avx2", "avx512", "neon" (Armv8 with byte dot products) or "neon_i8mm" (with products of 8-bit matrices
 * too; both have run in an emulator only, their speed was never measured): the best this CPU runs, or what the
 * environment variable LOBCQ_CPU_ISA named at the first call of any function. Static storage. */
LOBCQ_API const char* lobcq_isa(void);

/* LOBCQ_UNKNOWN_ISA: LOBCQ_CPU_ISA named none that this CPU runs. lobcq_tables_init says so too: without tables there
 * is no product. */
LOBCQ_API int32_t lobcq_check_isa(void);

/* One English sentence on a status; on LOBCQ_UNKNOWN_ISA, what was named and what this CPU runs. Static storage. */
LOBCQ_API const char* lobcq_status_text(int32_t status);

/* Look-up tables of one codebook set, opaque, lobcq_tables_bytes() bytes: made once, then passed to what encodes or
 * multiplies. codebooks: int8 [num_codebooks, 16], each row sorted ascending, entries in [-31, 31]. */
LOBCQ_API int64_t lobcq_tables_bytes(void);
LOBCQ_API int32_t lobcq_tables_init(const int8_t* codebooks, int32_t num_codebooks, void* tables);

/* num_codebooks of initialized tables; -1 where they are not. */
LOBCQ_API int32_t lobcq_tables_codebooks(const void* tables);

/* The weight rule's tensor scale: max|x| / 13888, or 1 where x is all zero or empty.
 * LOBCQ_NOT_FINITE: x holds NaN or infinity; bad[0], bad[1] are then the row and column of the first one. */
LOBCQ_API int32_t lobcq_tensor_scale(const lobcq_matrix* x, float* tensor_scale, int64_t bad[2]);

/* Encodes x into out's arrays; scale_rule (enum lobcq_scale_rule) says whether out->tensor_scale is read or written.
 * A block array with NaN or infinity gets the scale NaN (0x7f) and codes as of zeros. With one scale a row, given or
 * computed, the whole row does, and its tensor scale is written as NaN. */
LOBCQ_API int32_t lobcq_encode(const void* tables, const lobcq_matrix* x, int32_t scale_rule, lobcq_packed* out,
                               lobcq_parallel_for parallel);

/* The same in int8. */
LOBCQ_API int32_t lobcq_encode_int8(const lobcq_matrix* x, int32_t scale_rule, lobcq_int8* out,
                                    lobcq_parallel_for parallel);

/* out (fp32) = x, of columns a multiple of array_size, with each block array rotated. */
LOBCQ_API int32_t lobcq_rotate(const lobcq_matrix* x, int32_t array_size, lobcq_matrix* out,
                               lobcq_parallel_for parallel);

/* lobcq_encode with LOBCQ_SHARED_SCALE, but that each block array gets, of the scale that the rule asks for and the E4M3
 * numbers below and above it, the one with the least sum of (q - 16 entry)^2 times its square; of equal ones, the first
 * of these. */
LOBCQ_API int32_t lobcq_encode_searched(const void* tables, const lobcq_matrix* x, lobcq_packed* out,
                                        lobcq_parallel_for parallel);

/* A weight to be rounded with feedback of its errors, and what becomes of it. Every array is contiguous.
 *   weight       fp32 [rows, columns], columns a multiple of array_size
 *   other_errors fp32 [rows, columns], of another rounding, whose cost is wanted too
 *   coupling     fp32 [columns / 16][columns][16]: column 16 p + j of an upper triangular matrix with ones on the diagonal
 *                is [p][...][j]. The error of column i, times coupling (i, j), is added to column j
 *   power        fp32 [columns]: what column j's distance from that sum costs, squared
 *   tensor_scale positive
 *   codes        uint8 [rows, columns], selectors uint8 [rows, columns / 8], scales uint8 [rows, columns / array_size]:
 *                written, a code or selector a byte
 *   errors       fp32 [rows, columns], written: weight minus what the codes decode to
 *   costs        double [rows, 2], written: of the errors, and of the other errors */
typedef struct {
    const float *weight, *other_errors, *coupling, *power;
    uint8_t *codes, *selectors, *scales;
    float* errors;
    double* costs;
    int64_t rows, columns;
    int32_t array_size;
    float tensor_scale;
} lobcq_feedback;

/* Rounds column by column; lobcq_fx/format/feedback.py has the rule. A row's result depends on nothing but the row. */
LOBCQ_API int32_t lobcq_compensate(const void* tables, const lobcq_feedback* feedback, lobcq_parallel_for parallel);

/* out (fp32 [rows, columns]) = (entry * scale) * tensor_scale, each product rounded once. Any bytes decode to
 * something: no index leaves the tables, and a negative or NaN scale decodes to NaN. */
LOBCQ_API int32_t lobcq_decode(const void* tables, const lobcq_packed* packed, lobcq_matrix* out,
                               lobcq_parallel_for parallel);

/* Of each row of x two sums, squares [rows][2]: of its scalars squared, and of their distances from what packed decodes
 * to squared, which are rounded to fp32 before. In doubles, in one order on every instruction set. */
LOBCQ_API int32_t lobcq_squares(const void* tables, const lobcq_matrix* x, const lobcq_packed* packed, double* squares,
                                lobcq_parallel_for parallel);

/* Kernel layout of a weight and back; the tensor scale is no part of it. `weight_bytes` returns -1 for an invalid
 * shape, and is the packed size but for padding to 16 rows and 64 columns and a stamp that names format, rows
 * and columns, these rounded up to a multiple of array_size, which is all that stored bytes tell: what reads a weight of
 * another stamp refuses it (LOBCQ_OTHER_WEIGHT).
 * Packing refuses (LOBCQ_CORRUPT_DATA) a negative or NaN scale and selector padding bits that are not zero. Unpacking
 * restores the bytes that were packed. packed->tensor_scale is not looked at. */
LOBCQ_API int64_t lobcq_weight_bytes(int64_t rows, int64_t columns, int32_t num_codebooks, int32_t array_size);
LOBCQ_API int32_t lobcq_weight_pack(const lobcq_packed* packed, lobcq_weight* weight, lobcq_parallel_for parallel);
LOBCQ_API int32_t lobcq_weight_unpack(const lobcq_weight* weight, lobcq_packed* packed, lobcq_parallel_for parallel);

/* Fills an activation of x's shape, once, for any number of linears with K = columns and the same array_size.
 * encode (kind LOBCQ_ENCODED): as lobcq_encode; tensor_scale is as scale_rule says, or NULL for LOBCQ_ABSMAX_SCALES.
 *   With kind LOBCQ_INT8 as lobcq_encode_int8; tables is then NULL. rotated, not 0: what lobcq_rotate makes of x.
 * load (kind LOBCQ_ENCODED): from packed bytes, as lobcq_encode wrote them. Of kind LOBCQ_INT8 load_int8, from integers;
 *   one of -128, which no encoder writes, is read as -127.
 * split (kind LOBCQ_FLOAT): the values themselves.
 * A row with NaN or infinity gives NaN in that row of every product, and changes no other row. */
LOBCQ_API int64_t lobcq_activation_bytes(int64_t rows, int64_t columns, int32_t array_size, int32_t kind);
LOBCQ_API int32_t lobcq_activation_encode(const void* tables, const lobcq_matrix* x, int32_t scale_rule,
                                          const float* tensor_scale, int32_t rotated, lobcq_activation* activation,
                                          lobcq_parallel_for parallel);
LOBCQ_API int32_t lobcq_activation_load(const void* tables, const lobcq_packed* packed, lobcq_activation* activation,
                                        lobcq_parallel_for parallel);
LOBCQ_API int32_t lobcq_activation_load_int8(const lobcq_int8* operand, lobcq_activation* activation,
                                             lobcq_parallel_for parallel);
LOBCQ_API int32_t lobcq_activation_split(const lobcq_matrix* x, lobcq_activation* activation,
                                         lobcq_parallel_for parallel);

/* One linear: out [M, N] (fp32, bf16 or fp16) = (a @ w^T * a's scales) * weight_scale + bias, accumulated in fp32 and
 * rounded once to out's dtype. */
typedef struct {
    const void* tables;         /* of the weight's codebooks */
    const lobcq_weight* weight; /* [N, K], agrees with the activation in columns and array_size */
    float weight_scale;
    const float* bias;          /* [N], or NULL */
    const lobcq_matrix* out;
} lobcq_product;

/* `count` linears of one activation, as one parallel loop. Element (m, n) of each depends on row m of a, row n of its
 * weight and nothing else: its bits are the same for any M, N, company and number of threads. */
LOBCQ_API int32_t lobcq_linear(const lobcq_product* products, int64_t count, const lobcq_activation* activation,
                               lobcq_parallel_for parallel);

/* Rows of an activation in another order, or more than once: row i of `to` is row rows[i] of `from`, which has the same
 * columns, array_size and kind. LOBCQ_INVALID_ARGUMENT: one of the rows does not exist. */
LOBCQ_API int32_t lobcq_activation_gather(const lobcq_activation* from, const int64_t* rows, lobcq_activation* to,
                                          lobcq_parallel_for parallel);

/* `count` linears, each of its own rows of one activation, as one parallel loop: product i has out->rows rows, from row
 * first_rows[i] of the activation on. What holds of lobcq_linear's bits holds here. */
LOBCQ_API int32_t lobcq_grouped_linear(const lobcq_product* products, const int64_t* first_rows, int64_t count,
                                       const lobcq_activation* activation, lobcq_parallel_for parallel);

enum lobcq_mask { LOBCQ_NO_MASK = 0, LOBCQ_BOOL_MASK = 1 /* uint8, 0: not looked at */, LOBCQ_ADDED_MASK = 2 /* of mask_dtype */ };

/* fp32: of decoded keys and values. int8: integers, as docs/format.md says. float states: fp32, of keys and values that
 * are not encoded. */
enum lobcq_products { LOBCQ_FLOAT_PRODUCTS = 0, LOBCQ_INT8_PRODUCTS = 1, LOBCQ_FLOAT_STATES = 2 };

/* Keys or values of a cache, of a batch of sequences of as many tokens. `rows` is uint8 [batch, tokens, row bytes]: a
 * row is the token's tensor scale, fp32, anywhere in memory, and for each head its codes, selectors and scales, each as
 * one row of lobcq_packed with `width` columns. Any bytes decode to something.
 * Or, for LOBCQ_FLOAT_STATES, `rows` is [batch, heads, tokens, width] of `dtype`, of any strides but that of the last
 * dimension, which is 1. */
typedef struct {
    const uint8_t* rows;
    int64_t row_bytes; /* of an encoded token, as the caller sees it: checked */
    int64_t width;     /* 1 to 1024, rounded up to a multiple of array_size, of floats to one of 16 */
    int32_t array_size, dtype;
    int64_t strides[3]; /* of floats, in elements */
} lobcq_states;

/* Encodes tokens' keys or values, x [batch, heads, tokens, width], as rows of such a cache: each head as lobcq_encode
 * does, with one tensor scale for all heads of a token, by the absmax rule.
 *   x     of any strides, in elements, but that of the last dimension, which is 1
 *   rows  uint8 [batch, tokens, row_bytes], contiguous */
typedef struct {
    const void* x;
    int64_t strides[3];
    uint8_t* rows;
    int64_t row_bytes; /* as the caller sees it: checked */
    int64_t batch, heads, tokens, width;
    int32_t dtype, array_size;
} lobcq_new_states;

LOBCQ_API int32_t lobcq_encode_states(const void* tables, const lobcq_new_states* states, lobcq_parallel_for parallel);

/* Scaled dot-product attention over keys and values, its products as `products` (enum lobcq_products) says. Where they
 * are not encoded, no tables are needed.
 *   query [batch, query_heads, queries, keys.width], of any strides but that of the last dimension, which is 1
 *   out   [batch, query_heads, queries, values.width], of any strides but that of the last dimension, which is 1, of the
 *         query's dtype
 *   mask  as mask_kind (enum lobcq_mask) says, [batch, query_heads, queries, tokens] with strides in elements, which may
 *         be 0; NULL for LOBCQ_NO_MASK
 *   heads of keys and values, which divides query_heads: query heads that follow one another share one
 * A query that looks nowhere gives zeros. The bits of a result depend on its query, keys, values and mask alone. */
typedef struct {
    const void* query;
    int64_t query_strides[3]; /* in elements */
    lobcq_states keys, values;
    const void* mask;
    int64_t mask_strides[4];
    void* out;
    int64_t out_strides[3]; /* in elements */
    int64_t batch, query_heads, queries, heads, tokens;
    float scale;
    int32_t dtype, mask_kind, mask_dtype, products;
} lobcq_attention;

LOBCQ_API int32_t lobcq_attend(const void* tables, const lobcq_attention* attention, lobcq_parallel_for parallel);

#ifdef __cplusplus
}
#endif
#endif
