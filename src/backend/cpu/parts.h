/* What the files of the CPU backend's driver share. */
#ifndef BACKEND_CPU_PARTS_H
#define BACKEND_CPU_PARTS_H
#include "backend/cpu/cpu.h"
#include "backend/cpu/kernels.h"
#include "base/pool.h"

enum { DECODE_COLUMNS = 256 }; /* of a panel at a time: 16 KiB of f32, half of the first cache */

/* Scratch of one thread. */
struct cpu_thread {
    float *panel;     /* [DECODE_COLUMNS][16] */
    float *sums;      /* [rows][16], twice: gate and up */
    float *scores;    /* [context] */
    float *work;      /* of delta_chunk */
    float *quantized; /* one row of inputs */
};

struct queue {
    struct pool *pool;
    const struct cpu_kernels *k;
    struct step_limits limits;
    struct cpu_thread *threads;
    float *memory;    /* holds all below and the threads' scratch */
    float *packed;    /* inputs of a product in blocks: rows * max(cols, picks * widest expert matrix) */
    float *row_scale; /* of quantized inputs, [rows * picks] */
    float *hidden;    /* [rows * picks][intermediate] */
    float *outputs;   /* [rows * picks][cols] */
    int64_t *order;   /* [rows * picks] pick numbers grouped by expert */
    int64_t *begin;   /* [n_experts + 1] into order */
    int32_t *active;  /* [n_experts] experts with rows */
};

/* Inputs of a product, laid out for the kernels: blocks of 16, 8, 4, 2 or 1 rows, a block's columns after one
 * another. Block at row r begins at r * cols. */
struct packed {
    const float *x;
    const float *row_scale; /* INPUT_FP8_ROW: per row; else NULL: 1 */
    int64_t rows, cols;
};

/* Rows of the block that begins with `left` rows to go. */
static inline int block_rows(const struct cpu_kernels *k, int64_t left)
{
    int rows = k->block_rows;
    while (rows > left) rows /= 2;
    return rows;
}

/* sums[i][0..16) = x_i . rows of one panel, scaled for FP8. */
void cpu_panel_product(struct queue *q, struct cpu_thread *t, float *sums, const struct packed *in,
                       const struct cpu_weight *w, int64_t panel);
/* Packs one block of `rows` rows; row(i) = x + index[i] * stride, or x + i * stride when index is NULL.
 * Quantizes first if the weight says so; INPUT_FP8_ROW writes row_scale. quantized: scratch [cols]. */
void cpu_pack_block(float *packed, float *row_scale, float *quantized, const float *x, int64_t stride,
                    const int64_t *index, int rows, int64_t cols, const struct weight *w);

bool cpu_weight_create(struct queue *q, struct weight **out, const struct weight_source *src, struct err *e);
void cpu_weight_free(struct queue *q, struct weight *w);

void cpu_embed(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *rows);
void cpu_matmul(struct queue *q, struct mat y, struct mat x, const struct weight *w);
void cpu_add(struct queue *q, struct mat y, struct mat x);
void cpu_rmsnorm(struct queue *q, struct mat y, struct mat x, const float *gain, float eps);
void cpu_gather(struct queue *q, struct mat y, struct mat x, const int64_t *index);
void cpu_silu_mul(struct queue *q, struct mat y, struct mat gate, struct mat up);
void cpu_add_gated(struct queue *q, struct mat y, struct mat x, struct mat gate);
void cpu_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim,
                   const float *gain, float eps, const struct rope *rope, const struct step_rows *rows);
void cpu_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                   const struct step_rows *rows);
void cpu_attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                   const struct step_rows *rows);
void cpu_conv(struct queue *q, struct mat y, struct mat u, const float *weight,
              const struct delta_state *state, const struct delta_shape *shape, const struct step_rows *rows);
void cpu_delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
               const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
               const struct step_rows *rows);
void cpu_gated_norm(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim,
                    float eps);
void cpu_route(struct queue *q, const struct picks *picks, struct mat logits);
void cpu_experts(struct queue *q, struct mat y, struct mat x, const struct picks *picks,
                 const struct experts *experts);
void cpu_log_softmax(struct queue *q, struct mat x);
void cpu_divergence(struct queue *q, double *out, struct mat p, struct mat other);
#endif
