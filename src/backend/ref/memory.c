/* Weights and memory of the reference backend: a weight is the f32 matrix it stands for. */
#include "backend/ref/parts.h"
#include "backend/fused.h"
#include "backend/host.h"
#include "base/checked.h"
#include "num/e4m3.h"
#include "num/f16.h"
#include "num/fp8.h"
#include "num/nvfp4.h"
#include <stdlib.h>
#include <string.h>

static float element(enum weight_format format, const void *data, int64_t i)
{
    uint16_t half;
    float x;
    switch (format) {
    case WEIGHT_BF16: memcpy(&half, (const uint8_t *)data + 2 * i, 2); return bf16_to_f32((bf16){ half });
    case WEIGHT_F16: memcpy(&half, (const uint8_t *)data + 2 * i, 2); return f16_to_f32(half);
    case WEIGHT_FP8:
    case WEIGHT_FP8_BLOCK: return e4m3_to_f32(((const e4m3 *)data)[i]);
    default: memcpy(&x, (const uint8_t *)data + 4 * i, 4); return x;
    }
}

void ref_row(float *out, const struct ref_weight *w, int64_t row)
{
    int64_t n = w->head.cols;
    if (w->dense)
        memcpy(out, w->dense + row * n, (size_t)n * sizeof *out);
    else
        for (int64_t c = 0; c < n; c++) out[c] = element(w->head.format, w->table, row * n + c);
}

static void fill(struct ref_weight *w, const struct weight_source *src)
{
    for (int64_t r = 0; r < src->rows; r++) {
        float *row = w->dense + r * src->cols;
        if (src->format == WEIGHT_NVFP4) {
            nvfp4_unpack_row(row, (const uint8_t *)src->data + r * src->cols / 2,
                             (const e4m3 *)src->scale + r * src->cols / NVFP4_GROUP, src->global, src->cols);
            continue;
        }
        for (int64_t c = 0; c < src->cols; c++) row[c] = element(src->format, src->data, r * src->cols + c);
        if (src->format == WEIGHT_FP8) w->scale[r] = ((const float *)src->scale)[r];
        if (src->format == WEIGHT_FP8_BLOCK) {
            const float *scale = (const float *)src->scale + r / FP8_BLOCK * fp8_blocks(src->cols);
            for (int64_t c = 0; c < src->cols; c++) row[c] *= scale[c / FP8_BLOCK];
        }
    }
}

static bool weight_create(struct queue *q, struct weight **out, const struct weight_source *src,
                          struct err *e)
{
    (void)q;
    *out = NULL;
    uint64_t elements = 0, bytes = 0;
    struct ref_weight *w = calloc(1, sizeof *w);
    if (!w) return err_memory(e, "weight", sizeof *w);
    w->head =
        (struct weight){ src->format, src->rows, src->cols, src->input, src->input_global, src->is_table, 0 };
    w->table = src->data;
    bool ok = fits_mul((uint64_t)src->rows, (uint64_t)src->cols, &elements) && fits_mul(elements, 4, &bytes);
    if (ok && !src->is_table) {
        w->dense = malloc(bytes ? bytes : 1);
        w->scale = malloc((size_t)src->rows * sizeof *w->scale + 1);
        ok = w->dense && w->scale;
        if (ok) fill(w, src);
    }
    *out = &w->head;
    if (ok) return true;
    ref_ops.weight_free(q, &w->head);
    *out = NULL;
    return err_memory(e, "weight", bytes);
}

static void weight_free(struct queue *q, struct weight *weight)
{
    (void)q;
    if (!weight) return;
    struct ref_weight *w = (struct ref_weight *)weight;
    free(w->dense);
    free(w->scale);
    free(w);
}

static bool grow(float **buffer, int64_t *room, int64_t want, struct err *e)
{
    if (want <= *room) return true;
    float *grown = realloc(*buffer, (size_t)want * sizeof *grown);
    if (!grown) return err_memory(e, "scratch", (uint64_t)want * sizeof *grown);
    *buffer = grown;
    *room = want;
    return true;
}

static bool reserve(struct queue *q, const struct step_limits *l, struct err *e)
{
    int64_t scores = l->context > l->together ? l->context : l->together;
    return grow(&q->scratch, &q->room, 2 * l->cols > scores ? 2 * l->cols : scores, e) &&
           grow(&q->row, &q->row_room, 3 * l->cols, e);
}

bool ref_queue_create(struct queue **out, bool rounded, struct err *e)
{
    *out = calloc(1, sizeof **out);
    if (!*out) return err_memory(e, "reference backend", sizeof **out);
    (*out)->rounded = rounded;
    return true;
}

void ref_queue_free(struct queue *q)
{
    if (!q) return;
    free(q->scratch);
    free(q->row);
    free(q);
}

static void draw_product(struct queue *q, int32_t *out, struct mat y, struct mat x, const struct weight *w,
                         const uint32_t *allowed, const struct draw *draws)
{
    fused_draw_product(&ref_ops, q, out, y, x, w, allowed, draws);
}

static void norm_products(struct queue *q, const struct norm_products *r)
{
    fused_norm_products(&ref_ops, q, r);
}

static void delta_run(struct queue *q, const struct delta_run *r, const struct step_rows *rows)
{
    fused_delta(&ref_ops, q, r, rows);
}

static void attention_run(struct queue *q, const struct attention_run *r, const struct step_rows *rows)
{
    fused_attention(&ref_ops, q, r, rows);
}

static void moe_run(struct queue *q, const struct moe_run *r)
{
    fused_moe(&ref_ops, q, r);
}

static void observe(struct queue *q, const struct observation *o, struct mat x, const struct experts *experts)
{
    fused_observe(&ref_ops, q, o, x, experts);
}

static bool weights_create(struct queue *q, struct weight **out, const struct weight_source *src, int n,
                           int *failed, struct err *e)
{
    return fused_weights(&ref_ops, q, out, src, n, failed, e);
}

const struct ops ref_ops = {
    .name = "ref",
    .weight_create = weight_create,
    .weights_create = weights_create,
    .weights_join = host_weights_join,
    .coarse_bytes = host_coarse_bytes,
    .weight_coarsen = host_weight_coarsen,
    .weight_free = weight_free,
    .memory_create = host_memory_create,
    .memory_free = host_memory_free,
    .upload = host_copy,
    .copy = host_copy,
    .download = host_copy,
    .zero = host_zero,
    .reserve = reserve,
    .reserve_bytes = host_reserve_bytes,
    .experts_bind = host_experts_bind,
    .experts_unbind = host_experts_unbind,
    .wait = host_wait,
    .read_speed = host_read_speed,
    .step_begin = host_step_begin,
    .step_end = host_step_end,
    .embed = ref_embed,
    .matmul = ref_matmul,
    .add = ref_add,
    .rmsnorm = ref_rmsnorm,
    .gather = ref_gather,
    .silu_mul = ref_silu_mul,
    .add_gated = ref_add_gated,
    .norm_rope = ref_norm_rope,
    .kv_append = ref_kv_append,
    .attention = ref_attention,
    .conv = ref_conv,
    .delta = ref_delta,
    .gated_norm = ref_gated_norm,
    .layer_norm = ref_layer_norm,
    .add_bias = ref_add_bias,
    .rotate = ref_rotate,
    .attention_all = ref_attention_all,
    .route = ref_route,
    .experts = ref_experts,
    .absmax = host_absmax,
    .moments = ref_moments,
    .log_softmax = ref_log_softmax,
    .divergence = ref_divergence,
    .pick = host_pick,
    .argmax = host_argmax,
    .mask = host_mask,
    .edit = host_edit,
    .draw = ref_draw,
    .draw_product = draw_product,
    .norm_products = norm_products,
    .delta_run = delta_run,
    .attention_run = attention_run,
    .moe_run = moe_run,
    .observe = observe,
};
