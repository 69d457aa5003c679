#include "backend/trace.h"
#include "backend/fused.h"
#include "base/clock.h"
#include "num/fp8.h"
#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum op {
    OP_MATMUL,
    OP_EMBED,
    OP_ADD,
    OP_RMSNORM,
    OP_GATHER,
    OP_SILU_MUL,
    OP_ADD_GATED,
    OP_NORM_ROPE,
    OP_KV_APPEND,
    OP_ATTENTION,
    OP_CONV,
    OP_DELTA,
    OP_GATED_NORM,
    OP_LAYER_NORM,
    OP_ADD_BIAS,
    OP_ROTATE,
    OP_ATTENTION_ALL,
    OP_ROUTE,
    OP_EXPERTS,
    OP_ABSMAX,
    OP_MOMENTS,
    OP_LOG_SOFTMAX,
    OP_DIVERGENCE,
    OP_PICK,
    OP_ARGMAX,
    OP_MASK,
    OP_EDIT,
    OP_DRAW,
    N_OPS
};
static const char *const op_names[N_OPS] = {
    "matmul",      "embed",      "add",           "rmsnorm", "gather",  "silu_mul",   "add_gated",
    "norm_rope",   "kv_append",  "attention",     "conv",    "delta",   "gated_norm", "layer_norm",
    "add_bias",    "rotate",     "attention_all", "route",   "experts", "absmax",     "moments",
    "log_softmax", "divergence", "pick",          "argmax",  "mask",    "edit",       "draw",
};
enum { ENTRIES_MAX = 128 };

struct labelled {
    const struct weight *weight;
    int entry;
};

/* What the wrapped operations get as their queue. */
struct trace {
    const struct ops *op;
    struct queue *q;
    enum trace_mode mode;
    struct trace_entry entries[ENTRIES_MAX];
    int n_entries;
    struct labelled *labels; /* sorted by weight */
    int64_t n_labels;
    int32_t *picks; /* [picks_capacity] those of the step, in host memory */
    uint8_t *seen;  /* [seen_capacity] by expert */
    int64_t picks_capacity, seen_capacity;
    uint64_t experts, expert_steps;
};

static struct trace *trace_of(struct queue *q)
{
    return (struct trace *)(void *)q;
}

uint64_t trace_weight_bytes(const struct weight *w)
{
    uint64_t n = (uint64_t)w->rows * (uint64_t)w->cols;
    switch (w->format) {
    case WEIGHT_NVFP4: return n / 2 + n / 16;
    case WEIGHT_FP8: return n + 4 * (uint64_t)w->rows;
    case WEIGHT_FP8_BLOCK: return n + 4 * (uint64_t)fp8_blocks(w->rows) * (uint64_t)fp8_blocks(w->cols);
    case WEIGHT_F32: return 4 * n;
    default: return 2 * n;
    }
}

static double begin(const struct trace *t)
{
    return t->mode == TRACE_TIME ? clock_seconds() : 0;
}

static void end(struct trace *t, int entry, double start, uint64_t bytes, uint64_t flops)
{
    if (t->mode == TRACE_OFF) return;
    struct trace_entry *x = &t->entries[entry];
    if (t->mode == TRACE_TIME) {
        t->op->wait(t->q, NULL); /* a failure stays with the queue */
        x->seconds += clock_seconds() - start;
    }
    x->calls++;
    x->bytes += bytes;
    x->flops += flops;
}

static int compare_addresses(const void *a, const void *b)
{
    uintptr_t x = (uintptr_t)((const struct labelled *)a)->weight;
    uintptr_t y = (uintptr_t)((const struct labelled *)b)->weight;
    return (x > y) - (x < y);
}

static int entry_of(const struct trace *t, const struct weight *w)
{
    struct labelled key = { w, 0 };
    const struct labelled *found =
        t->n_labels ? bsearch(&key, t->labels, (size_t)t->n_labels, sizeof key, compare_addresses) : NULL;
    return found ? found->entry : OP_MATMUL;
}

/* The entry of products with such weights; the common one when there are too many. */
static int add_entry(struct trace *t, const struct trace_label *l)
{
    const struct weight *w = l->weight;
    for (int i = N_OPS; i < t->n_entries; i++) {
        const struct trace_entry *x = &t->entries[i];
        if (strcmp(x->label, l->label) == 0 && x->format == w->format && x->rows == w->rows &&
            x->cols == w->cols)
            return i;
    }
    if (t->n_entries == ENTRIES_MAX) return OP_MATMUL;
    t->entries[t->n_entries] = (struct trace_entry){
        .op = op_names[OP_MATMUL], .label = l->label, .format = w->format, .rows = w->rows, .cols = w->cols
    };
    return t->n_entries++;
}

bool trace_set_labels(struct backend *b, const struct trace_label *labels, int64_t n, struct err *e)
{
    struct trace *t = trace_of(b->queue);
    free(t->labels);
    t->n_labels = 0;
    t->n_entries = N_OPS;
    t->labels = malloc(((size_t)n + 1) * sizeof *t->labels);
    if (!t->labels) return err_memory(e, "labels", (size_t)n * sizeof *t->labels);
    for (int64_t i = 0; i < n; i++)
        t->labels[t->n_labels++] = (struct labelled){ labels[i].weight, add_entry(t, &labels[i]) };
    qsort(t->labels, (size_t)n, sizeof *t->labels, compare_addresses);
    return true;
}

void trace_start(struct backend *b, enum trace_mode mode)
{
    struct trace *t = trace_of(b->queue);
    t->mode = mode;
    t->experts = t->expert_steps = 0;
    for (int i = 0; i < t->n_entries; i++) {
        t->entries[i].calls = t->entries[i].bytes = t->entries[i].flops = 0;
        t->entries[i].seconds = 0;
    }
}

const struct trace_entry *trace_entries(const struct backend *b, int *n)
{
    const struct trace *t = trace_of(b->queue);
    *n = t->n_entries;
    return t->entries;
}

uint64_t trace_experts(const struct backend *b, uint64_t *steps)
{
    const struct trace *t = trace_of(b->queue);
    *steps = t->expert_steps;
    return t->experts;
}

/* Weights and memory: passed on. */

static bool weight_create(struct queue *q, struct weight **out, const struct weight_source *src,
                          struct err *e)
{
    return trace_of(q)->op->weight_create(trace_of(q)->q, out, src, e);
}

static bool weights_create(struct queue *q, struct weight **out, const struct weight_source *src, int n,
                           int *failed, struct err *e)
{
    return trace_of(q)->op->weights_create(trace_of(q)->q, out, src, n, failed, e);
}

static void weights_join(struct queue *q, struct weight **list, int n)
{
    trace_of(q)->op->weights_join(trace_of(q)->q, list, n);
}

static void weight_free(struct queue *q, struct weight *w)
{
    trace_of(q)->op->weight_free(trace_of(q)->q, w);
}

static uint64_t coarse_bytes(struct queue *q, enum weight_format format, int64_t rows, int64_t cols)
{
    const struct trace *t = trace_of(q);
    return t->op->coarse_bytes(t->q, format, rows, cols);
}

static void weight_coarsen(struct queue *q, struct weight *w)
{
    trace_of(q)->op->weight_coarsen(trace_of(q)->q, w);
}

static bool memory_create(struct queue *q, void **out, uint64_t bytes, struct err *e)
{
    return trace_of(q)->op->memory_create(trace_of(q)->q, out, bytes, e);
}

static void memory_free(struct queue *q, void *memory)
{
    trace_of(q)->op->memory_free(trace_of(q)->q, memory);
}

static void upload(struct queue *q, void *to, const void *host, uint64_t bytes)
{
    trace_of(q)->op->upload(trace_of(q)->q, to, host, bytes);
}

static void copy(struct queue *q, void *to, const void *from, uint64_t bytes)
{
    trace_of(q)->op->copy(trace_of(q)->q, to, from, bytes);
}

static void download(struct queue *q, void *host, const void *from, uint64_t bytes)
{
    trace_of(q)->op->download(trace_of(q)->q, host, from, bytes);
}

static void zero(struct queue *q, void *memory, uint64_t bytes)
{
    trace_of(q)->op->zero(trace_of(q)->q, memory, bytes);
}

static bool grow(void **memory, int64_t *capacity, int64_t n, size_t each, struct err *e)
{
    if (n <= *capacity) return true;
    void *larger = realloc(*memory, (size_t)n * each);
    if (!larger) return err_memory(e, "account of experts", (size_t)n * each);
    *memory = larger;
    *capacity = n;
    return true;
}

static bool reserve(struct queue *q, const struct step_limits *limits, struct err *e)
{
    struct trace *t = trace_of(q);
    void *picks = t->picks, *seen = t->seen;
    bool ok = grow(&picks, &t->picks_capacity, limits->rows * limits->picks, sizeof *t->picks, e) &&
              grow(&seen, &t->seen_capacity, limits->n_experts, 1, e);
    t->picks = picks;
    t->seen = seen;
    return ok && t->op->reserve(t->q, limits, e);
}

static uint64_t reserve_bytes(struct queue *q, const struct step_limits *limits)
{
    struct trace *t = trace_of(q);
    return t->op->reserve_bytes(t->q, limits);
}

static bool experts_bind(struct queue *q, struct experts *x, struct err *e)
{
    return trace_of(q)->op->experts_bind(trace_of(q)->q, x, e);
}

static void experts_unbind(struct queue *q, struct experts *x)
{
    trace_of(q)->op->experts_unbind(trace_of(q)->q, x);
}

static bool wait(struct queue *q, struct err *e)
{
    return trace_of(q)->op->wait(trace_of(q)->q, e);
}

static double product_speed(struct queue *q, enum weight_format f)
{
    const struct trace *t = trace_of(q);
    return t->op->product_speed ? t->op->product_speed(t->q, f) : 0;
}

static double read_speed(struct queue *q)
{
    return trace_of(q)->op->read_speed(trace_of(q)->q);
}

/* A recorded step would not be counted. */
static bool step_begin(struct queue *q, const void *key, const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    return t->mode == TRACE_OFF && t->op->step_begin(t->q, key, rows);
}

static void step_end(struct queue *q)
{
    struct trace *t = trace_of(q);
    if (t->mode == TRACE_OFF) t->op->step_end(t->q);
}

/* Operations. */

static void embed(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->embed(t->q, y, table, rows);
    end(t, OP_EMBED, start, 0, 0);
}

static void matmul(struct queue *q, struct mat y, struct mat x, const struct weight *w)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->matmul(t->q, y, x, w);
    if (t->mode != TRACE_OFF)
        end(t, entry_of(t, w), start, trace_weight_bytes(w),
            2 * (uint64_t)x.rows * (uint64_t)w->rows * (uint64_t)w->cols);
}

static void add(struct queue *q, struct mat y, struct mat x)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->add(t->q, y, x);
    end(t, OP_ADD, start, 0, 0);
}

static void rmsnorm(struct queue *q, struct mat y, struct mat x, const float *gain, float eps)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->rmsnorm(t->q, y, x, gain, eps);
    end(t, OP_RMSNORM, start, 0, 0);
}

static void gather(struct queue *q, struct mat y, struct mat x, const int64_t *index)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->gather(t->q, y, x, index);
    end(t, OP_GATHER, start, 0, 0);
}

static void silu_mul(struct queue *q, struct mat y, struct mat gate, struct mat up)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->silu_mul(t->q, y, gate, up);
    end(t, OP_SILU_MUL, start, 0, 0);
}

static void add_gated(struct queue *q, struct mat y, struct mat x, struct mat gate)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->add_gated(t->q, y, x, gate);
    end(t, OP_ADD_GATED, start, 0, 0);
}

static void norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim,
                      const float *gain, float eps, const struct rope *rope, const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->norm_rope(t->q, x, n_heads, head_stride, head_dim, gain, eps, rope, rows);
    end(t, OP_NORM_ROPE, start, 0, 0);
}

/* Keys and values of one token. */
static uint64_t line_bytes(const struct kv_cache *kv)
{
    return 2 * (uint64_t)kv_line_bytes(kv->dtype, kv->n_kv_heads, kv->head_dim);
}

static void kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                      const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->kv_append(t->q, kv, k, v, rows);
    end(t, OP_KV_APPEND, start, (uint64_t)rows->n * line_bytes(kv), 0);
}

static void attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                      const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->attention(t->q, y, qg, n_heads, kv, rows);
    uint64_t tokens = 0;
    for (int64_t i = 0; i < rows->n_spans; i++) tokens += (uint64_t)(rows->spans[i].past + rows->spans[i].n);
    end(t, OP_ATTENTION, start, tokens * line_bytes(kv), 0);
}

static void conv(struct queue *q, struct mat y, struct mat u, const float *weight,
                 const struct delta_state *state, const struct delta_shape *shape,
                 const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->conv(t->q, y, u, weight, state, shape, rows);
    uint64_t kept = (uint64_t)(shape->kernel - 1) * (uint64_t)u.cols;
    end(t, OP_CONV, start,
        sizeof(float) * ((uint64_t)shape->kernel * (uint64_t)u.cols + 2 * kept * (uint64_t)rows->n_spans), 0);
}

static void delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b,
                  const float *A_log, const float *dt_bias, const struct delta_state *state,
                  const struct delta_shape *shape, const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->delta(t->q, o, qkv, a, b, A_log, dt_bias, state, shape, rows);
    uint64_t matrix = (uint64_t)shape->value_heads * (uint64_t)shape->key_dim * (uint64_t)shape->value_dim;
    end(t, OP_DELTA, start, sizeof(float) * matrix * 2 * (uint64_t)rows->n_spans, 0); /* read and written */
}

static void gated_norm(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim,
                       float eps)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->gated_norm(t->q, y, x, z, gain, dim, eps);
    end(t, OP_GATED_NORM, start, 0, 0);
}

static void layer_norm(struct queue *q, struct mat y, struct mat x, const float *gain, const float *bias,
                       float eps)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->layer_norm(t->q, y, x, gain, bias, eps);
    end(t, OP_LAYER_NORM, start, 0, 0);
}

static void add_bias(struct queue *q, struct mat y, const float *bias, enum activation f)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->add_bias(t->q, y, bias, f);
    end(t, OP_ADD_BIAS, start, 0, 0);
}

static void rotate(struct queue *q, struct mat x, int n_heads, struct mat angle)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->rotate(t->q, x, n_heads, angle);
    end(t, OP_ROTATE, start, 0, 0);
}

static void attention_all(struct queue *q, struct mat y, struct mat qkv, int n_heads)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->attention_all(t->q, y, qkv, n_heads);
    end(t, OP_ATTENTION_ALL, start, 0, 4 * (uint64_t)y.rows * (uint64_t)y.rows * (uint64_t)y.cols);
}

static void route(struct queue *q, const struct picks *picks, struct mat logits)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->route(t->q, picks, logits);
    end(t, OP_ROUTE, start, 0, 0);
}

/* Bytes of the experts that some row picked. */
static uint64_t picked_bytes(struct trace *t, const struct picks *picks, int64_t rows,
                             const struct experts *x)
{
    uint64_t bytes = 0;
    int64_t n = rows * picks->k;
    assert(n <= t->picks_capacity && x->n_experts <= t->seen_capacity);
    t->op->download(t->q, t->picks, picks->expert, (uint64_t)n * sizeof *t->picks);
    memset(t->seen, 0, (size_t)x->n_experts);
    for (int64_t i = 0; i < n; i++) {
        int32_t k = t->picks[i];
        if (t->seen[k]) continue;
        t->seen[k] = 1;
        t->experts++;
        bytes +=
            trace_weight_bytes(x->gate[k]) + trace_weight_bytes(x->up[k]) + trace_weight_bytes(x->down[k]);
    }
    t->expert_steps++;
    return bytes;
}

static void experts(struct queue *q, struct mat y, struct mat x, const struct picks *picks,
                    const struct experts *weights)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->experts(t->q, y, x, picks, weights);
    if (t->mode == TRACE_OFF) return;
    end(t, OP_EXPERTS, start, 0, 0);
    const struct weight *w = weights->gate[0];
    t->entries[OP_EXPERTS].bytes += picked_bytes(t, picks, x.rows, weights);
    t->entries[OP_EXPERTS].format = w->format;
    t->entries[OP_EXPERTS].flops += 6 * (uint64_t)(x.rows * picks->k) * (uint64_t)w->rows * (uint64_t)w->cols;
}

static void absmax(struct queue *q, uint32_t *top, struct mat x)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->absmax(t->q, top, x);
    end(t, OP_ABSMAX, start, 0, 0);
}

static void moments(struct queue *q, float *h, struct mat x)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->moments(t->q, h, x);
    end(t, OP_MOMENTS, start, 0, (uint64_t)x.rows * (uint64_t)x.cols * (uint64_t)x.cols);
}

static void log_softmax(struct queue *q, struct mat x)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->log_softmax(t->q, x);
    end(t, OP_LOG_SOFTMAX, start, 0, 0);
}

static void divergence(struct queue *q, double *out, struct mat p, struct mat other)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->divergence(t->q, out, p, other);
    end(t, OP_DIVERGENCE, start, 0, 0);
}

static void pick(struct queue *q, float *out, struct mat x, const int32_t *column)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->pick(t->q, out, x, column);
    end(t, OP_PICK, start, 0, 0);
}

static void argmax(struct queue *q, int32_t *out, struct mat x)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->argmax(t->q, out, x);
    end(t, OP_ARGMAX, start, 0, 0);
}

static void mask(struct queue *q, struct mat x, const uint32_t *allowed)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->mask(t->q, x, allowed);
    end(t, OP_MASK, start, 0, 0);
}

static void edit(struct queue *q, struct mat x, const struct logit_edit *edits, int64_t n)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->edit(t->q, x, edits, n);
    end(t, OP_EDIT, start, 0, 0);
}

static void draw(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed,
                 const struct draw *draws)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->draw(t->q, out, x, allowed, draws);
    end(t, OP_DRAW, start, 0, 0);
}

/* What is read of a matrix with a coarse copy is that, and few rows besides. */
static void draw_product(struct queue *q, int32_t *out, struct mat y, struct mat x, const struct weight *w,
                         const uint32_t *allowed, const struct draw *draws)
{
    struct trace *t = trace_of(q);
    double start = begin(t);
    t->op->draw_product(t->q, out, y, x, w, allowed, draws);
    if (t->mode != TRACE_OFF)
        end(t, entry_of(t, w), start,
            draws_coarse(w, x.rows, draws) ? w->coarse_bytes : trace_weight_bytes(w),
            2 * (uint64_t)x.rows * (uint64_t)w->rows * (uint64_t)w->cols);
}

/* Runs are counted operation by operation. */

static const struct ops trace_ops;

static void norm_products(struct queue *q, const struct norm_products *r)
{
    struct trace *t = trace_of(q);
    if (t->mode == TRACE_OFF)
        t->op->norm_products(t->q, r);
    else
        fused_norm_products(&trace_ops, q, r);
}

static void delta_run(struct queue *q, const struct delta_run *r, const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    if (t->mode == TRACE_OFF)
        t->op->delta_run(t->q, r, rows);
    else
        fused_delta(&trace_ops, q, r, rows);
}

static void attention_run(struct queue *q, const struct attention_run *r, const struct step_rows *rows)
{
    struct trace *t = trace_of(q);
    if (t->mode == TRACE_OFF)
        t->op->attention_run(t->q, r, rows);
    else
        fused_attention(&trace_ops, q, r, rows);
}

static void moe_run(struct queue *q, const struct moe_run *r)
{
    struct trace *t = trace_of(q);
    if (t->mode == TRACE_OFF)
        t->op->moe_run(t->q, r);
    else
        fused_moe(&trace_ops, q, r);
}

static void observe(struct queue *q, const struct observation *o, struct mat x, const struct experts *experts)
{
    struct trace *t = trace_of(q);
    if (t->mode == TRACE_OFF)
        t->op->observe(t->q, o, x, experts);
    else
        fused_observe(&trace_ops, q, o, x, experts);
}

static const struct ops trace_ops = {
    .name = "trace",
    .weight_create = weight_create,
    .weights_create = weights_create,
    .weights_join = weights_join,
    .coarse_bytes = coarse_bytes,
    .weight_coarsen = weight_coarsen,
    .weight_free = weight_free,
    .memory_create = memory_create,
    .memory_free = memory_free,
    .upload = upload,
    .copy = copy,
    .download = download,
    .zero = zero,
    .reserve = reserve,
    .reserve_bytes = reserve_bytes,
    .experts_bind = experts_bind,
    .experts_unbind = experts_unbind,
    .wait = wait,
    .read_speed = read_speed,
    .product_speed = product_speed,
    .step_begin = step_begin,
    .step_end = step_end,
    .embed = embed,
    .matmul = matmul,
    .add = add,
    .rmsnorm = rmsnorm,
    .gather = gather,
    .silu_mul = silu_mul,
    .add_gated = add_gated,
    .norm_rope = norm_rope,
    .kv_append = kv_append,
    .attention = attention,
    .conv = conv,
    .delta = delta,
    .gated_norm = gated_norm,
    .layer_norm = layer_norm,
    .add_bias = add_bias,
    .rotate = rotate,
    .attention_all = attention_all,
    .route = route,
    .experts = experts,
    .absmax = absmax,
    .moments = moments,
    .log_softmax = log_softmax,
    .divergence = divergence,
    .pick = pick,
    .argmax = argmax,
    .mask = mask,
    .edit = edit,
    .draw = draw,
    .draw_product = draw_product,
    .norm_products = norm_products,
    .delta_run = delta_run,
    .attention_run = attention_run,
    .moe_run = moe_run,
    .observe = observe,
};

bool trace_create(struct backend *out, const struct backend *inner, struct err *e)
{
    struct trace *t = calloc(1, sizeof *t);
    *out = (struct backend){ 0 };
    if (!t) return err_memory(e, "account of operations", sizeof *t);
    t->op = inner->ops;
    t->q = inner->queue;
    for (int i = 0; i < N_OPS; i++) t->entries[i] = (struct trace_entry){ .op = op_names[i], .label = "" };
    t->n_entries = N_OPS;
    *out = *inner;
    out->ops = &trace_ops;
    out->queue = (struct queue *)(void *)t;
    out->queue_free = NULL;
    return true;
}

void trace_destroy(struct backend *b)
{
    if (!b->ops) return;
    struct trace *t = trace_of(b->queue);
    free(t->labels);
    free(t->picks);
    free(t->seen);
    free(t);
    *b = (struct backend){ 0 };
}
