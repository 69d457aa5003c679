/* The kernels of the CPU backend: pure functions over plain memory, one set per ISA. The driver (product.c,
 * sequence.c, rows.c) splits the work and owns threads and scratch. Widths that are not a multiple of the
 * vector length are handled inside; nothing is read or written past what the comment says. */
#ifndef BACKEND_CPU_KERNELS_H
#define BACKEND_CPU_KERNELS_H
#include "backend/ops.h"

/* A weight is laid out in panels of 16 output rows, the rows interleaved: element (row, col) of panel p at
 * [p][col][row % 16]; rows past the end are zero. NVFP4: 8 bytes a column, byte j = row j | row j + 8 << 4,
 * and scales [p][col / 16][16]. */
enum { PANEL = 16, BLOCK_ROWS_MAX = 16 };

struct cpu_weight {
    struct weight head;
    int64_t panels;
    uint8_t *data;     /* owned */
    uint8_t *groups;   /* NVFP4: E4M3 scales; owned */
    float *scale;      /* FP8: [panels * 16]; FP8_BLOCK: [rows / 128][cols / 128], rounded up; owned */
    float global;      /* NVFP4 */
    const void *table; /* is_table: borrowed rows */
};

/* One value head's inputs: token t's at pointer + t * its stride. q, k are normalised, q scaled. */
struct delta_head {
    float *o;
    const float *q, *k, *v;
    const float *log_decay, *beta;
    int64_t o_stride, stride, gate_stride;
    float *S; /* [dk][dv] */
    int dk, dv;
};

struct cpu_kernels {
    const char *name;
    int block_rows; /* widest block `product` takes */

    /* Columns [first, first + n) of a panel as f32 [n][16]; NVFP4: multiples of 16. FP8 without the row
     * scales, FP8_BLOCK with those of its blocks. */
    void (*decode)(float *out, const struct cpu_weight *w, int64_t panel, int64_t first, int64_t n);
    /* y[i][0..16) += sum_c x[c * rows + i] * w[c][0..16), c ascending, one fused product at a time. y:
     * [rows][16]. rows: 1, 2, 4, 8 or 16, at most block_rows. */
    void (*product)(float *y, const float *x, const float *w, int64_t cols, int rows);

    void (*rmsnorm)(float *y, const float *x, const float *gain, int64_t n, float eps);
    void (*gated_norm)(float *y, const float *x, const float *z, const float *gain, int64_t n, float eps);
    void (*silu_mul)(float *y, const float *gate, const float *up, int64_t n);
    void (*scale_add)(float *y, const float *x, float scale, int64_t n); /* y += scale * x */
    void (*log_softmax)(float *x, int64_t n);                            /* in place */
    double (*divergence)(const float *p, const float *q, int64_t n);     /* sum e^p (p - q) */

    /* One query head against n_tokens keys and values: y[dim] = softmax(q.k / sqrt(dim)) v * sigmoid(gate).
     * pages as in struct span; head: the kv head. scores: scratch, [n_tokens]. */
    void (*attend)(float *y, const float *query, const float *gate, const struct kv_cache *kv,
                   const int32_t *pages, int head, int64_t n_tokens, float *scores);
    /* y[c] = SiLU(sum_j w[j * n + c] * rows[j][c]) for n channels, j < kernel. */
    void (*conv_row)(float *y, const float *const *rows, const float *w, int kernel, int64_t n);
    /* In place: x / sqrt(sum x^2 + 1e-6) * scale. */
    void (*l2norm)(float *x, int64_t n, float scale);
    /* The gated delta rule over n_tokens of one value head, token after token. */
    void (*delta)(const struct delta_head *h, int64_t n_tokens);
    /* The same for 1..DELTA_CHUNK tokens in the chunked form. work: DELTA_CHUNK * (dk + 2 * DELTA_CHUNK + dv)
     * floats. */
    void (*delta_chunk)(const struct delta_head *h, int64_t n_tokens, float *work);
};

extern const struct cpu_kernels cpu_kernels_generic;
#if defined(__x86_64__)
extern const struct cpu_kernels cpu_kernels_avx2;
extern const struct cpu_kernels cpu_kernels_avx512;
#endif
/* The best set this machine runs, at most `isa`. */
const struct cpu_kernels *cpu_kernels_select(enum cpu_isa isa);
#endif
