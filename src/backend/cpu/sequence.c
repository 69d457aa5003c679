/* Operations along a sequence on the CPU: KV cache, attention, convolution, the gated delta rule. */
#include "backend/cpu/parts.h"
#include "num/e4m3.h"
#include <math.h>
#include <string.h>

/* Kv cache and attention. */

/* One token's heads, on one side. */
static void kv_store(const struct cpu_kernels *k, const struct kv_cache *kv, void *side, int32_t page,
                     int64_t line, const float *x)
{
    int64_t n = (int64_t)kv->n_kv_heads * kv->head_dim, at = page * kv_page_stride(kv) + line * n;
    if (kv->dtype == KV_F32)
        memcpy((float *)side + at, x, (size_t)n * sizeof *x);
    else if (kv->dtype == KV_BF16)
        for (int64_t i = 0; i < n; i++) ((bf16 *)side)[at + i] = bf16_from_f32(x[i]);
    else if (kv->dtype == KV_FP8)
        for (int64_t i = 0; i < n; i++) ((e4m3 *)side)[at + i] = e4m3_from_f32(x[i]);
    else
        for (int h = 0; h < kv->n_kv_heads; h++, at += kv->head_dim, x += kv->head_dim)
            kv_scales(kv, side, page)[line * kv->n_kv_heads + h] =
                k->quantize_int8((int8_t *)side + at, x, kv->head_dim);
}

void cpu_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                   const struct step_rows *rows)
{
    for (int64_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        for (int64_t i = 0; i < span->n; i++) {
            int64_t token = span->past + i, line = token % KV_PAGE, row = span->first + i;
            int32_t page = span->pages[token / KV_PAGE];
            kv_store(q->k, kv, kv->keys, page, line, k.data + row * k.stride);
            kv_store(q->k, kv, kv->values, page, line, v.data + row * v.stride);
        }
    }
}

/* The span that holds a row: spans are few, and sorted. */
static const struct span *span_of(const struct step_rows *rows, int64_t row)
{
    int64_t low = 0, high = rows->n_spans - 1;
    while (low < high) {
        int64_t mid = (low + high + 1) / 2;
        if (rows->spans[mid].first <= row)
            low = mid;
        else
            high = mid - 1;
    }
    return &rows->spans[low];
}

struct attention_job {
    struct queue *q;
    struct mat y, qg;
    int n_heads;
    const struct kv_cache *kv;
    const struct step_rows *rows;
};

/* The query heads from h on that share a kv head, as many as a kernel takes. */
static struct attend_group group_of(const struct attention_job *j, int64_t row, const struct span *span,
                                    int kv_head, int h)
{
    int group = j->n_heads / j->kv->n_kv_heads, left = (kv_head + 1) * group - h;
    return (struct attend_group){ j->qg.data + row * j->qg.stride + (int64_t)h * 2 * j->kv->head_dim,
                                  left < ATTEND_HEADS_MAX ? left : ATTEND_HEADS_MAX, j->kv, span->pages,
                                  kv_head };
}

static int64_t context_of(const struct span *span, int64_t row)
{
    return span->past + row - span->first + 1;
}

static int parts_of(int64_t context)
{
    return (int)((context + cpu_attend_part(context) - 1) / cpu_attend_part(context));
}

static void attend_part(const struct attention_job *j, const struct attend_group *g, int64_t context,
                        int part, float *out, int thread)
{
    int64_t first = part * cpu_attend_part(context), end = first + cpu_attend_part(context);
    j->q->k->attend(g, first, end < context ? end : context, out, j->q->threads[thread].scores);
}

/* Many rows. Item = one row and one kv head. Late rows first, they are the longest. */
static void attend_row(void *ctx, int64_t item, int thread)
{
    struct attention_job *j = ctx;
    int n_kv = j->kv->n_kv_heads, group = j->n_heads / n_kv, dim = j->kv->head_dim,
        kv_head = (int)(item % n_kv);
    int64_t row = j->rows->n - 1 - item / n_kv;
    const struct span *span = span_of(j->rows, row);
    int64_t context = context_of(span, row);
    float *parts = j->q->threads[thread].attended;
    for (int h = kv_head * group; h < (kv_head + 1) * group;) {
        struct attend_group g = group_of(j, row, span, kv_head, h);
        int64_t stride = (int64_t)g.n_heads * (dim + 2);
        for (int p = 0; p < parts_of(context); p++)
            attend_part(j, &g, context, p, parts + p * stride, thread);
        j->q->k->attend_finish(j->y.data + row * j->y.stride + (int64_t)h * dim, &g, parts, stride,
                               parts_of(context));
        h += g.n_heads;
    }
}

/* Few rows. Item = a part of the context of one row and one kv head: [row][part][head][dim + 2]. */
static float *part_at(const struct attention_job *j, int64_t row, int part, int h)
{
    int64_t each = (int64_t)j->n_heads * (j->kv->head_dim + 2);
    return j->q->attended + (row * ATTEND_PARTS_MAX + part) * each + (int64_t)h * (j->kv->head_dim + 2);
}

static void attend_item(void *ctx, int64_t item, int thread)
{
    struct attention_job *j = ctx;
    int n_kv = j->kv->n_kv_heads, group = j->n_heads / n_kv, part = (int)(item / n_kv % ATTEND_PARTS_MAX);
    int64_t row = item / n_kv / ATTEND_PARTS_MAX;
    const struct span *span = span_of(j->rows, row);
    int64_t context = context_of(span, row);
    if (part >= parts_of(context)) return;
    for (int kv_head = (int)(item % n_kv), h = kv_head * group; h < (kv_head + 1) * group;) {
        struct attend_group g = group_of(j, row, span, kv_head, h);
        attend_part(j, &g, context, part, part_at(j, row, part, h), thread);
        h += g.n_heads;
    }
}

static void finish_item(void *ctx, int64_t item, int thread)
{
    struct attention_job *j = ctx;
    int n_kv = j->kv->n_kv_heads, group = j->n_heads / n_kv, dim = j->kv->head_dim;
    int64_t row = item / n_kv;
    const struct span *span = span_of(j->rows, row);
    (void)thread;
    for (int kv_head = (int)(item % n_kv), h = kv_head * group; h < (kv_head + 1) * group;) {
        struct attend_group g = group_of(j, row, span, kv_head, h);
        j->q->k->attend_finish(j->y.data + row * j->y.stride + (int64_t)h * dim, &g, part_at(j, row, 0, h),
                               (int64_t)j->n_heads * (dim + 2), parts_of(context_of(span, row)));
        h += g.n_heads;
    }
}

void cpu_attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                   const struct step_rows *rows)
{
    struct attention_job j = { q, y, qg, n_heads, kv, rows };
    if (rows->n > ROWS_EXACT) {
        pool_run(q->pool, rows->n * kv->n_kv_heads, attend_row, &j);
        return;
    }
    pool_run(q->pool, rows->n * kv->n_kv_heads * ATTEND_PARTS_MAX, attend_item, &j);
    pool_run(q->pool, rows->n * kv->n_kv_heads, finish_item, &j);
}

/* Convolution. */

struct conv_job {
    struct queue *q;
    struct mat y, u;
    const float *weight;
    const struct delta_state *state;
    const struct delta_shape *shape;
    const struct step_rows *rows;
};

static float *conv_state(const struct conv_job *j, const struct span *span)
{
    return j->state->conv + span->slot * (int64_t)(j->shape->kernel - 1) * j->u.cols;
}

static void conv_row(void *ctx, int64_t row, int thread)
{
    struct conv_job *j = ctx;
    (void)thread;
    const struct span *span = span_of(j->rows, row);
    const float *past = conv_state(j, span), *taps[CONV_KERNEL_MAX];
    int kernel = j->shape->kernel;
    for (int t = 0; t < kernel; t++) {
        int64_t at = row - span->first - (kernel - 1) + t; /* row of the span; negative: before this step */
        taps[t] =
            at >= 0 ? j->u.data + (span->first + at) * j->u.stride : past + (kernel - 1 + at) * j->u.cols;
    }
    j->q->k->conv_row(j->y.data + row * j->y.stride, taps, j->weight, kernel, j->u.cols);
}

/* The last kernel - 1 of n_rows raw rows, or what is left of the state before them. */
static void conv_keep(const struct conv_job *j, const struct span *span, const float *u, int64_t stride,
                      int64_t n_rows)
{
    int64_t keep = j->shape->kernel - 1, n = j->u.cols, fresh = n_rows < keep ? n_rows : keep;
    float *past = conv_state(j, span);
    memmove(past, past + fresh * n, (size_t)((keep - fresh) * n) * sizeof *past);
    for (int64_t i = 0; i < fresh; i++)
        memcpy(past + (keep - fresh + i) * n, u + (n_rows - fresh + i) * stride, (size_t)n * sizeof *past);
}

static void conv_log(const struct conv_job *j, const struct span *span)
{
    for (int64_t i = 0; i < span->n; i++)
        memcpy(delta_log_at(j->state, j->shape, span->slot, i).u, j->u.data + (span->first + i) * j->u.stride,
               (size_t)j->u.cols * sizeof(float));
}

void cpu_conv(struct queue *q, struct mat y, struct mat u, const float *weight,
              const struct delta_state *state, const struct delta_shape *shape, const struct step_rows *rows)
{
    struct conv_job j = { q, y, u, weight, state, shape, rows };
    for (int64_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        if (span->kept)
            conv_keep(&j, span, delta_log_at(state, shape, span->slot, 0).u, delta_log_floats(shape),
                      span->kept);
    }
    pool_run(q->pool, rows->n, conv_row, &j);
    for (int64_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        if (span->logged)
            conv_log(&j, span);
        else
            conv_keep(&j, span, u.data + span->first * u.stride, u.stride, span->n);
    }
}

/* The delta rule. */

struct delta_job {
    struct queue *q;
    struct mat o, qkv, a, b;
    const float *A_log, *dt_bias;
    const struct delta_state *state;
    const struct delta_shape *shape;
    const struct step_rows *rows;
};

/* q and k of a row become normalised, a the log decay, b beta. */
static void delta_prepare(void *ctx, int64_t row, int thread)
{
    struct delta_job *j = ctx;
    (void)thread;
    const struct delta_shape *s = j->shape;
    float *x = j->qkv.data + row * j->qkv.stride, *a = j->a.data + row * j->a.stride,
          *b = j->b.data + row * j->b.stride;
    for (int h = 0; h < 2 * s->key_heads; h++)
        j->q->k->l2norm(x + (int64_t)h * s->key_dim, s->key_dim,
                        h < s->key_heads ? 1 / sqrtf((float)s->key_dim) : 1);
    for (int h = 0; h < s->value_heads; h++) {
        float x_h = a[h] + j->dt_bias[h];
        a[h] = -expf(j->A_log[h]) * (x_h > 20 ? x_h : log1pf(expf(x_h)));
        b[h] = 1 / (1 + expf(-b[h]));
    }
}

static struct delta_head delta_head(const struct delta_job *j, const struct span *span, int h)
{
    const struct delta_shape *s = j->shape;
    int64_t key = (int64_t)(h / (s->value_heads / s->key_heads)) * s->key_dim,
            keys = (int64_t)s->key_heads * s->key_dim;
    const float *x = j->qkv.data + span->first * j->qkv.stride;
    return (struct delta_head){
        .o = j->o.data + span->first * j->o.stride + (int64_t)h * s->value_dim,
        .q = x + key,
        .k = x + keys + key,
        .v = x + 2 * keys + (int64_t)h * s->value_dim,
        .log_decay = j->a.data + span->first * j->a.stride + h,
        .beta = j->b.data + span->first * j->b.stride + h,
        .o_stride = j->o.stride,
        .stride = j->qkv.stride,
        .gate_stride = j->a.stride,
        .S = j->state->matrix + ((int64_t)span->slot * s->value_heads + h) * s->key_dim * s->value_dim,
        .dk = s->key_dim,
        .dv = s->value_dim,
    };
}

/* The first of the rows that were kept of the log changed S at once: it was certain to stay. */
static struct delta_past delta_past(const struct delta_job *j, const struct span *span, int h)
{
    const struct delta_shape *s = j->shape;
    struct delta_log log = delta_log_at(j->state, s, span->slot, 1);
    int key = h / (s->value_heads / s->key_heads);
    return (struct delta_past){ log.key + (int64_t)key * s->key_dim, log.update + (int64_t)h * s->value_dim,
                                log.decay + h, span->kept - 1, delta_log_floats(s) };
}

static void delta_item(void *ctx, int64_t item, int thread)
{
    struct delta_job *j = ctx;
    int head = (int)(item % j->shape->value_heads);
    const struct span *span = &j->rows->spans[item / j->shape->value_heads];
    struct delta_head h = delta_head(j, span, head);
    if (span->kept > 1) h.past = delta_past(j, span, head);
    if (span->logged) {
        h.copy = j->q->threads[thread].work;
        h.update = delta_log_at(j->state, j->shape, span->slot, 0).update + (int64_t)head * h.dv;
        h.update_stride = delta_log_floats(j->shape);
    }
    if (span->n <= ROWS_EXACT) {
        j->q->k->delta(&h, span->n);
        return;
    }
    j->q->k->delta(&h, 0); /* what is past */
    for (int64_t t = 0; t < span->n; t += DELTA_CHUNK) {
        j->q->k->delta_chunk(&h, span->n - t < DELTA_CHUNK ? span->n - t : DELTA_CHUNK,
                             j->q->threads[thread].work);
        h.o += DELTA_CHUNK * h.o_stride;
        h.q += DELTA_CHUNK * h.stride;
        h.k += DELTA_CHUNK * h.stride;
        h.v += DELTA_CHUNK * h.stride;
        h.log_decay += DELTA_CHUNK * h.gate_stride;
        h.beta += DELTA_CHUNK * h.gate_stride;
    }
}

/* What the heads share of a log: written when none reads it any more. */
static void log_keys(const struct delta_job *j, const struct span *span)
{
    const struct delta_shape *s = j->shape;
    int64_t keys = (int64_t)s->key_heads * s->key_dim;
    for (int64_t t = 0; t < span->n; t++) {
        struct delta_log log = delta_log_at(j->state, s, span->slot, t);
        const float *a = j->a.data + (span->first + t) * j->a.stride;
        memcpy(log.key, j->qkv.data + (span->first + t) * j->qkv.stride + keys, (size_t)keys * sizeof(float));
        for (int h = 0; h < s->value_heads; h++) log.decay[h] = expf(a[h]);
    }
}

void cpu_delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
               const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
               const struct step_rows *rows)
{
    struct delta_job j = { q, o, qkv, a, b, A_log, dt_bias, state, shape, rows };
    cpu_run_rows(q, rows->n, 2 * (int64_t)shape->key_heads * shape->key_dim, delta_prepare, &j);
    pool_run(q->pool, rows->n_spans * shape->value_heads, delta_item, &j);
    for (int64_t s = 0; s < rows->n_spans; s++)
        if (rows->spans[s].logged) log_keys(&j, &rows->spans[s]);
}
