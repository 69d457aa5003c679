/* Row-wise operations on the CPU: each row, or each head of a row, is one item of the pool. */
#include "backend/cpu/parts.h"
#include "num/f16.h"
#include <math.h>
#include <string.h>

static void table_row(float *out, const struct cpu_weight *w, int64_t row)
{
    int64_t n = w->head.cols;
    uint16_t half;
    const uint8_t *in = (const uint8_t *)w->table + row * n * (w->head.format == WEIGHT_F32 ? 4 : 2);
    if (w->head.format == WEIGHT_F32)
        memcpy(out, in, (size_t)n * 4);
    else
        for (int64_t c = 0; c < n; c++) {
            memcpy(&half, in + 2 * c, 2);
            out[c] = w->head.format == WEIGHT_BF16 ? bf16_to_f32((bf16){ half }) : f16_to_f32(half);
        }
}

void cpu_embed(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *rows)
{
    (void)q;
    for (int64_t i = 0; i < rows->n; i++) {
        float *out = y.data + i * y.stride;
        if (rows->rows[i].embedding)
            memcpy(out, rows->rows[i].embedding, (size_t)y.cols * sizeof *out);
        else
            table_row(out, (const struct cpu_weight *)table, rows->rows[i].token);
    }
}

void cpu_gather(struct queue *q, struct mat y, struct mat x, const int64_t *index)
{
    (void)q;
    for (int64_t i = 0; i < y.rows; i++)
        memcpy(y.data + i * y.stride, x.data + index[i] * x.stride, (size_t)y.cols * sizeof *y.data);
}

/* One context serves the simple operations. */
struct rows_job {
    struct queue *q;
    struct mat y, x, z;
    const float *gain;
    float eps;
    int dim;
};

static void add_row(void *ctx, int64_t i, int thread)
{
    struct rows_job *j = ctx;
    (void)thread;
    j->q->k->scale_add(j->y.data + i * j->y.stride, j->x.data + i * j->x.stride, 1, j->y.cols);
}

void cpu_add(struct queue *q, struct mat y, struct mat x)
{
    struct rows_job j = { .q = q, .y = y, .x = x };
    cpu_run_rows(q, y.rows, y.cols, add_row, &j);
}

static void rmsnorm_row(void *ctx, int64_t i, int thread)
{
    struct rows_job *j = ctx;
    (void)thread;
    j->q->k->rmsnorm(j->y.data + i * j->y.stride, j->x.data + i * j->x.stride, j->gain, j->x.cols, j->eps);
}

void cpu_rmsnorm(struct queue *q, struct mat y, struct mat x, const float *gain, float eps)
{
    struct rows_job j = { .q = q, .y = y, .x = x, .gain = gain, .eps = eps };
    cpu_run_rows(q, x.rows, x.cols, rmsnorm_row, &j);
}

static void silu_mul_row(void *ctx, int64_t i, int thread)
{
    struct rows_job *j = ctx;
    (void)thread;
    j->q->k->silu_mul(j->y.data + i * j->y.stride, j->x.data + i * j->x.stride, j->z.data + i * j->z.stride,
                      j->y.cols);
}

void cpu_silu_mul(struct queue *q, struct mat y, struct mat gate, struct mat up)
{
    struct rows_job j = { .q = q, .y = y, .x = gate, .z = up };
    cpu_run_rows(q, y.rows, 4 * y.cols, silu_mul_row, &j);
}

static void add_gated_row(void *ctx, int64_t i, int thread)
{
    struct rows_job *j = ctx;
    (void)thread;
    float gate = 1 / (1 + expf(-j->z.data[i * j->z.stride]));
    j->q->k->scale_add(j->y.data + i * j->y.stride, j->x.data + i * j->x.stride, gate, j->y.cols);
}

void cpu_add_gated(struct queue *q, struct mat y, struct mat x, struct mat gate)
{
    struct rows_job j = { .q = q, .y = y, .x = x, .z = gate };
    cpu_run_rows(q, y.rows, y.cols, add_gated_row, &j);
}

static void gated_norm_row(void *ctx, int64_t i, int thread)
{
    struct rows_job *j = ctx;
    (void)thread;
    for (int64_t head = 0; head < j->x.cols; head += j->dim)
        j->q->k->gated_norm(j->y.data + i * j->y.stride + head, j->x.data + i * j->x.stride + head,
                            j->z.data + i * j->z.stride + head, j->gain, j->dim, j->eps);
}

void cpu_gated_norm(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim,
                    float eps)
{
    struct rows_job j = { .q = q, .y = y, .x = x, .z = z, .gain = gain, .dim = dim, .eps = eps };
    cpu_run_rows(q, x.rows, 4 * x.cols, gated_norm_row, &j);
}

struct rope_job {
    struct queue *q;
    struct mat x;
    int n_heads, head_stride, head_dim;
    const float *gain;
    float eps;
    const struct rope *rope;
    const struct row *rows;
};

static void norm_rope_row(void *ctx, int64_t i, int thread)
{
    struct rope_job *j = ctx;
    (void)thread;
    float *row = j->x.data + i * j->x.stride;
    for (int h = 0; h < j->n_heads; h++) {
        float *head = row + (int64_t)h * j->head_stride;
        j->q->k->rmsnorm(head, head, j->gain, j->head_dim, j->eps);
    }
    for (int f = 0; f < j->rope->n; f++) {
        float angle = (float)j->rows[i].position[j->rope->axis[f]] * j->rope->inverse[f], s, c;
        sincosf(angle, &s, &c);
        s *= j->rope->scale;
        c *= j->rope->scale;
        for (int h = 0; h < j->n_heads; h++) {
            float *pair = row + (int64_t)h * j->head_stride + f, a = pair[0], b = pair[j->rope->n];
            pair[0] = a * c - b * s;
            pair[j->rope->n] = b * c + a * s;
        }
    }
}

void cpu_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim,
                   const float *gain, float eps, const struct rope *rope, const struct step_rows *rows)
{
    struct rope_job j = { q, x, n_heads, head_stride, head_dim, gain, eps, rope, rows->rows };
    cpu_run_rows(q, x.rows, 4 * (int64_t)n_heads * head_dim, norm_rope_row, &j);
}

struct route_job {
    const struct picks *picks;
    struct mat logits;
};

/* The k largest logits, best first, by insertion: k is small. Ties keep the lower index. */
static void route_row(void *ctx, int64_t i, int thread)
{
    struct route_job *j = ctx;
    (void)thread;
    const float *l = j->logits.data + i * j->logits.stride;
    int k = j->picks->k, n = 0;
    int32_t *expert = j->picks->expert + i * k;
    float *weight = j->picks->weight + i * k, sum = 0;
    for (int32_t e = 0; e < j->logits.cols; e++) {
        if (n == k && !(l[e] > l[expert[n - 1]])) continue;
        int at = n < k ? n++ : k - 1;
        for (; at > 0 && l[e] > l[expert[at - 1]]; at--) expert[at] = expert[at - 1];
        expert[at] = e;
    }
    for (int p = 0; p < k; p++) sum += weight[p] = expf(l[expert[p]] - l[expert[0]]);
    for (int p = 0; p < k; p++) weight[p] /= sum;
}

void cpu_route(struct queue *q, const struct picks *picks, struct mat logits)
{
    struct route_job j = { picks, logits };
    cpu_run_rows(q, logits.rows, logits.cols, route_row, &j);
}

static void log_softmax_row(void *ctx, int64_t i, int thread)
{
    struct rows_job *j = ctx;
    (void)thread;
    j->q->k->log_softmax(j->x.data + i * j->x.stride, j->x.cols);
}

void cpu_log_softmax(struct queue *q, struct mat x)
{
    struct rows_job j = { .q = q, .x = x };
    cpu_run_rows(q, x.rows, x.cols, log_softmax_row, &j);
}

struct divergence_job {
    struct queue *q;
    double *out;
    struct mat p, other;
};

static void divergence_row(void *ctx, int64_t i, int thread)
{
    struct divergence_job *j = ctx;
    (void)thread;
    j->out[i] =
        j->q->k->divergence(j->p.data + i * j->p.stride, j->other.data + i * j->other.stride, j->p.cols);
}

void cpu_divergence(struct queue *q, double *out, struct mat p, struct mat other)
{
    struct divergence_job j = { q, out, p, other };
    cpu_run_rows(q, p.rows, p.cols, divergence_row, &j);
}

struct draw_job {
    int32_t *out;
    struct mat x;
    const uint32_t *allowed;
    const struct draw *draws;
};

static void draw_row(void *ctx, int64_t i, int thread)
{
    struct draw_job *j = ctx;
    (void)thread;
    j->out[i] = draw_token(&j->draws[i], j->x.data + i * j->x.stride, j->x.cols, j->allowed);
}

void cpu_draw(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed, const struct draw *draws)
{
    struct draw_job j = { out, x, allowed, draws };
    cpu_run_rows(q, x.rows, x.cols, draw_row, &j);
}
