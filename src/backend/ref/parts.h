/* What the files of the reference backend share. */
#ifndef BACKEND_REF_PARTS_H
#define BACKEND_REF_PARTS_H
#include "backend/ref/ref.h"
#include <math.h>

struct queue {
    float *scratch;         /* a quantized row, two normalised heads, or the scores of one query */
    float *row;             /* gate, up and down of one expert */
    int64_t room, row_room; /* floats in each */
    bool rounded;           /* see backend_options */
};

struct ref_weight {
    struct weight head;
    float *dense;      /* [rows][cols], without the row scales of FP8; NULL for a table */
    float *scale;      /* FP8: [rows] */
    const void *table; /* borrowed, in head.format */
};

void ref_row(float *out, const struct ref_weight *w, int64_t row);

static inline float ref_sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

static inline float ref_silu(float x)
{
    return x / (1.0f + expf(-x));
}

void ref_embed(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *rows);
void ref_matmul(struct queue *q, struct mat y, struct mat x, const struct weight *w);
void ref_add(struct queue *q, struct mat y, struct mat x);
void ref_rmsnorm(struct queue *q, struct mat y, struct mat x, const float *gain, float eps);
void ref_gather(struct queue *q, struct mat y, struct mat x, const int64_t *index);
void ref_silu_mul(struct queue *q, struct mat y, struct mat gate, struct mat up);
void ref_add_gated(struct queue *q, struct mat y, struct mat x, struct mat gate);
void ref_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim,
                   const float *gain, float eps, const struct rope *rope, const struct step_rows *rows);
void ref_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                   const struct step_rows *rows);
void ref_attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                   const struct step_rows *rows);
void ref_conv(struct queue *q, struct mat y, struct mat u, const float *weight,
              const struct delta_state *state, const struct delta_shape *shape, const struct step_rows *rows);
void ref_delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
               const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
               const struct step_rows *rows);
void ref_gated_norm(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim,
                    float eps);
void ref_layer_norm(struct queue *q, struct mat y, struct mat x, const float *gain, const float *bias,
                    float eps);
void ref_add_bias(struct queue *q, struct mat y, const float *bias, enum activation f);
void ref_rotate(struct queue *q, struct mat x, int n_heads, struct mat angle);
void ref_attention_all(struct queue *q, struct mat y, struct mat qkv, int n_heads);
void ref_route(struct queue *q, const struct picks *picks, struct mat logits);
void ref_experts(struct queue *q, struct mat y, struct mat x, const struct picks *picks,
                 const struct experts *experts);
void ref_moments(struct queue *q, float *h, struct mat x);
void ref_draw(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed, const struct draw *draws);
void ref_log_softmax(struct queue *q, struct mat x);
void ref_divergence(struct queue *q, double *out, struct mat p, struct mat other);
#endif
