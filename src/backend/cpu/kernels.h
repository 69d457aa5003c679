/* The kernels of the CPU backend: pure functions over plain memory, one set per ISA. The driver (product.c,
 * sequence.c, rows.c) splits the work and owns threads and scratch. Widths that are not a multiple of the
 * vector length are handled inside; nothing is read or written past what the comment says. */
#ifndef BACKEND_CPU_KERNELS_H
#define BACKEND_CPU_KERNELS_H
#include "backend/ops.h"

/* A weight is laid out in panels of 16 output rows, 16 lanes of 32 bits side by side, lane = row; rows past
 * the end are zero, and so are columns that fill up a lane:
 *   F32    [p][col][16]
 *   BF16   [p][col / 2][16][2]
 *   FP8    [p][col / 4][4][2][4][2]: a quarter of the rows, pair of columns, row, column
 *   NVFP4  [p][col / 8][16][4]: bytes as stored, so column c of 8 is bits 4c .. 4c + 3 of the lane; none of
 *          the scales [p][col / 16][16] is negative (their sign moved into the codes) */
enum { PANEL = 16, BLOCK_ROWS_MAX = 16, PANELS_MAX = 4, STREAM_ROWS_MAX = 4 };

struct cpu_weight {
    struct weight head;
    int64_t panels, panel_bytes;
    uint8_t *data;         /* owned, as the other two: one piece of the slab */
    uint8_t *groups;       /* NVFP4: E4M3 scales */
    float *scale;          /* FP8: [panels * 16]; FP8_BLOCK: [rows / 128][cols / 128], rounded up */
    struct cpu_slab *slab; /* slab.h */
    float global;          /* NVFP4 */
    bool narrow;           /* NVFP4: every scale is 0 or at least 1/8, so 64 times it is a 16-bit integer */
    const void *table;     /* is_table: borrowed rows */
};

/* How rows of inputs are written for a product, in words of 32 bits. A block of R rows interleaves their
 * words: [word][R].
 *   F32    a column a word
 *   BF16   two columns a word, zeros after the last (of FP8 weights: up to a multiple of 4 columns)
 *   INT8   twelve words for each 32 columns, of which the last 16 may be zeros: codes of columns 0 2 4 6 and
 * 16 18 20 22, 1 3 5 7 and 17 19 21 23, 8 10 12 14 and 24 26 28 30, 9 11 13 15 and 25 27 29 31; -12 times the
 * sum of the first 16 codes and of the others; their scale, f32; 0 */
enum input_form { FORM_F32, FORM_BF16, FORM_INT8 };
enum { INT8_WORDS = 12, INT8_LESS = 8, INT8_SCALE = 10 };

/* y[p * stride + i * 16 ..] = x_i . the 16 rows of panel `panel` + p, for p < panels, i < rows; x: a block of
 * 1 to 16 rows, of f32 a power of two. An output's additions have one order whatever `panels` and `rows`. FP8
 * is without its row scales, INT8 times 128 / w->global stays to be applied. */
typedef void cpu_dot(float *y, int64_t stride, const uint32_t *x, const struct cpu_weight *w, int64_t panel,
                     int panels, int rows);

/* The same for n panels, 1 or 2, of one weight or of two that are alike in format and columns, and any number
 * of rows, whose words lie one row after the other, `words` apart: y[p * stride + i * 16 ..]. INT8 is
 * complete. next: what this thread reads soon, as much for each panel as it has, from where it lies. */
struct panel {
    const struct cpu_weight *w;
    int64_t at;
};
struct ahead {
    const uint8_t *codes, *scales;
};
typedef void cpu_wide(float *y, int64_t stride, const uint32_t *x, int64_t words, const struct panel *panels,
                      const struct ahead *next, int n, int64_t rows);
static inline struct ahead panel_ahead(const struct cpu_weight *w, int64_t panel, int64_t column)
{
    return (struct ahead){ w->data + panel * w->panel_bytes + 8 * column,
                           w->groups + panel * w->head.cols + column };
}

/* Query heads that read one kv head. qg: per head the query, then the gate, [dim] each. pages as in struct
 * span. */
enum { ATTEND_HEADS_MAX = 8, ATTEND_PARTS_MAX = 16 };
struct attend_group {
    const float *qg;
    int n_heads; /* at most ATTEND_HEADS_MAX */
    const struct kv_cache *kv;
    const int32_t *pages;
    int kv_head;
};

enum { DELTA_COLUMNS = 64 }; /* of S that kernels work on at a time, at most */

/* Tokens of a log: key, update vector and decay of each, `stride` floats apart. */
struct delta_past {
    const float *key, *update, *decay;
    int64_t n, stride;
};

/* One value head's inputs: token t's at pointer + t * its stride. q, k are normalised, q scaled. */
struct delta_head {
    float *o;
    const float *q, *k, *v;
    const float *log_decay, *beta;
    int64_t o_stride, stride, gate_stride;
    float *S; /* [dk][dv] */
    int dk, dv;
    struct delta_past past; /* changes S before the first token; n may be 0 */
    /* of logged tokens: only the first changes S, [dk][DELTA_COLUMNS] holds what the others make of it; token
     * t's vector d goes to update + t * update_stride. Else NULL */
    float *copy, *update;
    int64_t update_stride;
};

struct cpu_kernels {
    const char *name;
    int block_rows; /* widest block of a product */

    /* out[i * n_rows + r] = word i of row r: blocks of inputs, panels of weights. Rows may be unaligned. */
    void (*interleave)(uint32_t *out, const uint8_t *const *rows, int n_rows, int64_t n);
    /* n columns as the words of a form; n % 16 == 0 for INT8 (num/int8.h). */
    void (*round_bf16)(uint32_t *out, const float *x, int64_t n);
    void (*round_int8)(uint32_t *out, const float *x, int64_t n);
    float (*round_fp8)(float *out, const float *x, int64_t n);        /* as fp8_quantize_activations */
    float (*quantize_int8)(int8_t *codes, const float *x, int64_t n); /* as int8_quantize_row */

    /* Products in f32, one fused multiply-add a column, ascending. `stream` takes blocks of at most
     * STREAM_ROWS_MAX rows; for more rows a panel is decoded once and meets every block.
     * decode: columns [first, first + n) of a panel as f32 [n][16], first % 256 == 0. FP8 without the row
     * scales, FP8_BLOCK with those of its blocks. product: y[i][0..16) += sum_c x[c * rows + i] *
     * w[c][0..16), rows: 1, 2, 4, 8 or 16, at most block_rows. */
    cpu_dot *stream;
    void (*decode)(float *out, const struct cpu_weight *w, int64_t panel, int64_t first, int64_t n);
    void (*product)(float *y, const float *x, const float *w, int64_t cols, int rows);
    /* n times the instructions of a form's products on registers alone; the flops that were done. */
    double (*spin)(enum input_form form, int64_t n);
    cpu_dot *dot_bf16;               /* FORM_BF16 with BF16 and FP8 weights; NULL: none */
    cpu_dot *dot_int8;               /* FORM_INT8 with NVFP4 weights; NULL: none */
    cpu_wide *wide_bf16, *wide_int8; /* of these two, in steps of more than ROWS_EXACT rows; NULL: none */

    void (*rmsnorm)(float *y, const float *x, const float *gain, int64_t n, float eps);
    void (*gated_norm)(float *y, const float *x, const float *z, const float *gain, int64_t n, float eps);
    void (*layer_norm)(float *y, const float *x, const float *gain, const float *bias, int64_t n, float eps);
    void (*gelu_tanh)(float *x, int64_t n); /* in place */
    void (*silu_mul)(float *y, const float *gate, const float *up, int64_t n);
    void (*scale_add)(float *y, const float *x, float scale, int64_t n); /* y += scale * x */
    void (*log_softmax)(float *x, int64_t n);                            /* in place */
    double (*divergence)(const float *p, const float *q, int64_t n);     /* sum e^p (p - q) */

    /* A group's query heads against tokens [first, end), first % KV_PAGE == 0: out[h][dim + 2] = sum of
     * e^(s_t - top) v_t with s = q.k / sqrt(dim), top = the largest s, sum of e^(s_t - top). scores: scratch,
     * [n_heads][end - first].
     */
    void (*attend)(const struct attend_group *g, int64_t first, int64_t end, float *out, float *scores);
    /* y[h][dim] = softmax(s) v * sigmoid(gate) of parts that attend left, `stride` apart. */
    void (*attend_finish)(float *y, const struct attend_group *g, const float *parts, int64_t stride,
                          int n_parts);
    /* Scores of n keys with 16 queries, [n][16], become p = e^(s * scale - top), where top, [16], grows to
     * what the scores need. sum and factor, [16]: sum = sum * factor + what is new, factor = e^(old top -
     * top). */
    void (*attend_weights)(float *scores, int64_t n, float scale, float *top, float *sum, float *factor);
    /* y[c] = SiLU(sum_j w[j * n + c] * rows[j][c]) for n channels, j < kernel. */
    void (*conv_row)(float *y, const float *const *rows, const float *w, int kernel, int64_t n);
    /* In place: x / sqrt(sum x^2 + 1e-6) * scale. */
    void (*l2norm)(float *x, int64_t n, float scale);
    /* The gated delta rule over n_tokens <= ROWS_EXACT of one value head, token after token. A token of
     * `past` does to S what it would have done had it not been logged, bit for bit. */
    void (*delta)(const struct delta_head *h, int64_t n_tokens);
    /* The same, without `past`, for 1..DELTA_CHUNK tokens in the chunked form. work: DELTA_CHUNK * (3 * dk +
     * 3 * dv + 2 * DELTA_CHUNK) floats. */
    void (*delta_chunk)(const struct delta_head *h, int64_t n_tokens, float *work);
};

extern const struct cpu_kernels cpu_kernels_generic;
#if defined(__x86_64__)
extern const struct cpu_kernels cpu_kernels_avx2;
extern const struct cpu_kernels cpu_kernels_avx512;
extern const struct cpu_kernels cpu_kernels_avx512bf16, cpu_kernels_zen5;
extern const struct cpu_kernels cpu_kernels_amx;
/* Asks the system for the tiles' registers, which a process has only on request. False: not to be had. */
bool cpu_amx_request(void);
#endif
/* The best set this machine runs, at most `isa`. */
const struct cpu_kernels *cpu_kernels_select(enum cpu_isa isa);
#endif
