/* Counts for memory; for time a few rows packed, a piece of the source read, and a product of one expert's
 * shape. */
#include "quantize/estimate.h"
#include "base/clock.h"
#include "base/pages.h"
#include "model/model.h"
#include "quantize/layers.h"
#include <stdlib.h>
#include <string.h>

enum { STEP_ROWS = 512, PROBE_BYTES = 64 << 20 };
static const uint64_t BASE_BYTES = 64 << 20, NAME_BYTES = 1536;
static const double PROBE_SECONDS = 0.2;

/* Weights of one decoder layer's products, all experts. */
static uint64_t layer_weights(const struct config *c, enum layer_kind kind)
{
    uint64_t h = (uint64_t)c->hidden_size, values = (uint64_t)c->linear_value_heads * c->linear_value_dim;
    uint64_t keys = (uint64_t)c->linear_key_heads * c->linear_key_dim,
             heads = (uint64_t)c->n_heads * c->head_dim;
    uint64_t mixer = kind == LAYER_FULL_ATTENTION
                         ? h * (3 * heads + 2 * (uint64_t)c->n_kv_heads * c->head_dim)
                         : h * (2 * keys + 3 * values + 2 * (uint64_t)c->linear_value_heads);
    uint64_t experts = (uint64_t)c->n_experts * (3 * (uint64_t)c->moe_intermediate + 1);
    return mixer + h * (experts + 3 * (uint64_t)c->shared_intermediate + 1);
}

static uint64_t moments_bytes(const struct config *c)
{
    uint64_t h = (uint64_t)c->hidden_size, inner = (uint64_t)c->moe_intermediate;
    return 4 * (h * h + (uint64_t)c->n_experts * inner * inner);
}

/* f32 beside each other in a step's row, at most. */
static uint64_t step_widths(const struct config *c)
{
    return 8 * (uint64_t)c->hidden_size + 6 * (uint64_t)c->n_heads * c->head_dim +
           8 * (uint64_t)c->linear_value_heads * c->linear_value_dim + 4 * (uint64_t)c->n_experts;
}

/* Source and result in memory, and for each a chunk's step, logits and keys. */
static uint64_t evaluation_memory(const struct run *r)
{
    const struct config *c = &r->source.config;
    uint64_t row = 4 * (step_widths(c) + 2 * (uint64_t)c->vocab_size) +
                   8 * (uint64_t)c->n_kv_heads * c->head_dim * (uint64_t)c->n_layers;
    return (r->result->bytes_in + r->result->bytes_out) * 17 / 16 + 2 * STEP_ROWS * row;
}

/* Of the largest layer, bound. */
static uint64_t layer_bytes(const struct config *c)
{
    uint64_t most = 0;
    for (int i = 0; i < c->n_layers; i++) {
        uint64_t n = 2 * layer_weights(c, c->layer_kinds[i]) * 17 / 16; /* padding */
        most = n > most ? n : most;
    }
    return most;
}

static uint64_t kv_bytes(const struct run *r)
{
    const struct config *c = &r->source.config;
    return 8 * (uint64_t)c->n_kv_heads * c->head_dim * (uint64_t)r->samples.longest;
}

static uint64_t calibration_memory(const struct run *r)
{
    const struct config *c = &r->source.config;
    uint64_t layer = layer_bytes(c), tokens = (uint64_t)r->samples.n_tokens, vocab = (uint64_t)c->vocab_size;
    uint64_t row = 2 * (uint64_t)c->hidden_size, looked_up = tokens < vocab ? tokens : vocab;
    uint64_t table = looked_up * (row > 4096 ? row : 4096);
    uint64_t sums = !run_measures(r) ? 0
                    : layers_device_suits(r)
                        ? layers_device_bytes(c, false)
                        : moments_bytes(c) * (r->options.method == QUANTIZE_AUTO ? 3 : 1);
    return (table > 2 * layer ? table : 2 * layer) + 4 * step_widths(c) * STEP_ROWS + kv_bytes(r) +
           16 * tokens + sums;
}

/* A layer's experts are put below one another while they still lie apart. */
uint64_t estimate_device_memory(const struct run *r)
{
    const struct config *c = &r->source.config;
    const struct backend *b = r->options.backend;
    if (!b->memory || r->samples.n == 0 || run_is_calibrated(r)) return 0;
    bool contest = r->options.method == QUANTIZE_AUTO && contest_held(r->samples.n) > 0;
    uint64_t rows = (uint64_t)calibration_rows(b, &r->samples);
    uint64_t wide = 2 * (uint64_t)c->hidden_size +
                    2 * (uint64_t)calibration_together(b, c) * (uint64_t)c->moe_intermediate;
    uint64_t state = 4 * (uint64_t)c->linear_value_heads * c->linear_key_dim * c->linear_value_dim;
    uint64_t n = BASE_BYTES + 2 * layer_bytes(c) + 4 * rows * wide + kv_bytes(r) + state;
    n += step_bytes(c, b, false, (int64_t)rows, 0, r->samples.longest);
    if (!run_measures(r)) return n;
    return n + moments_bytes(c) * (contest ? 2 : 1) +
           (layers_device_suits(r) ? layers_device_bytes(c, contest) : 0);
}

uint64_t estimate_memory(const struct run *r)
{
    const struct plan *p = &r->plan;
    uint64_t piece = run_piece_bytes(p), largest_scales = 0, cols = 0;
    for (size_t i = 0; i < p->n_matrices; i++) {
        const struct matrix *m = &p->matrices[i];
        uint64_t n = (uint64_t)m->rows * ((uint64_t)m->cols / 16 + 4);
        largest_scales = n > largest_scales ? n : largest_scales;
        cols = (uint64_t)m->cols > cols ? (uint64_t)m->cols : cols;
    }
    uint64_t n = BASE_BYTES + NAME_BYTES * (p->n_outputs + r->source.n_tensors);
    n += writer_memory(piece) + 8 * piece + 2 * largest_scales;
    n += (uint64_t)r->options.threads * 200 * cols;
    uint64_t calibration = r->samples.n && !run_is_calibrated(r) ? calibration_memory(r) : 0;
    uint64_t evaluation = r->options.evaluate ? evaluation_memory(r) : 0;
    return n + (calibration > evaluation ? calibration : evaluation);
}

/* Bytes a second, by touching the pages of the largest tensor. */
static double read_rate(const struct run *r)
{
    const struct tensor *t = NULL;
    for (size_t i = 0; i < r->source.n_tensors; i++)
        if (!t || r->source.tensors[i]->bytes > t->bytes) t = r->source.tensors[i];
    if (!t || t->bytes == 0) return 1;
    uint64_t n = t->bytes < PROBE_BYTES ? t->bytes : PROBE_BYTES;
    const uint8_t *data = t->data + (t->bytes - n) / 2;
    volatile uint8_t sum = 0;
    double start = clock_seconds();
    pages_read_ahead(data, n);
    for (uint64_t i = 0; i < n; i += 4096) sum = (uint8_t)(sum + data[i]);
    double seconds = clock_seconds() - start;
    pages_release(data, n);
    return (double)n / (seconds > 1e-6 ? seconds : 1e-6);
}

struct probe_outlet {
    void *buffer;
};

static void *probe_room(void *ctx, uint64_t bytes, struct err *e)
{
    (void)bytes, (void)e;
    return ((struct probe_outlet *)ctx)->buffer;
}

static bool probe_put(void *ctx, uint64_t bytes, struct err *e)
{
    (void)ctx, (void)bytes, (void)e;
    return true;
}

/* Seconds a weight, of the plan's matrices in one scheme; 0: there are none. */
static bool pack_cost(double *out, struct run *r, enum scheme scheme, const struct curvature *c, void *buffer,
                      struct err *e)
{
    struct probe_outlet x = { buffer };
    struct outlet to = { &x, probe_room, probe_put };
    double start = clock_seconds(), weights = 0;
    *out = 0;
    for (size_t i = 0; i < r->plan.n_matrices && clock_seconds() - start < PROBE_SECONDS; i++) {
        const struct matrix *m = &r->plan.matrices[i];
        struct packed packed;
        if (m->scheme != scheme) continue;
        if (!run_pack(r, &packed, i, c, &to, e)) return false;
        weights += (double)m->rows * (double)m->cols;
        *out = (clock_seconds() - start) / weights;
    }
    return true;
}

/* A factor that passes nothing on costs as much as any other. */
static float *identity_factor(int64_t n)
{
    float *f = calloc((size_t)(n * n) + 1, sizeof *f);
    for (int64_t i = 0; f && i < n; i++) f[i * n + i] = 1;
    return f;
}

static bool packing_seconds(double *out, struct run *r, struct err *e)
{
    double cost[N_SCHEMES] = { 0 };
    int64_t cols = 0;
    for (size_t i = 0; i < r->plan.n_matrices; i++)
        cols = r->plan.matrices[i].cols > cols ? r->plan.matrices[i].cols : cols;
    bool elsewhere = layers_device_suits(r);
    bool passes_on = run_measures(r) && r->options.method != QUANTIZE_MSE && !elsewhere;
    float *factor = passes_on ? identity_factor(cols) : NULL;
    struct curvature gptq = { .factor = factor };
    const struct curvature *c = passes_on ? &gptq : run_plain(r);
    void *buffer = malloc(run_piece_bytes(&r->plan) + 1);
    bool ok = (buffer && (factor || !passes_on)) || err_memory(e, "probe", run_piece_bytes(&r->plan));
    for (int i = 0; ok && i < N_SCHEMES; i++)
        ok = pack_cost(&cost[i], r, (enum scheme)i, scheme_is_nvfp4((enum scheme)i) ? c : NULL, buffer, e);
    *out = 0;
    for (size_t i = 0; ok && i < r->plan.n_matrices; i++) {
        const struct matrix *m = &r->plan.matrices[i];
        if (!elsewhere || m->expert < 0) *out += cost[m->scheme] * (double)m->rows * (double)m->cols;
    }
    free(buffer);
    free(factor);
    return ok;
}

/* Multiplications and additions a second of a product of an expert's shape and a step's rows. */
static bool product_rate(double *out, const struct run *r, struct err *e)
{
    const struct backend *b = r->options.backend;
    const struct ops *op = b->ops;
    int64_t rows = r->source.config.moe_intermediate, cols = r->source.config.hidden_size, done = 0;
    int64_t n = calibration_rows(b, &r->samples);
    void *weights = calloc((size_t)(rows * cols), 2), *x = NULL, *y = NULL;
    struct weight *w = NULL;
    struct weight_source src = { .format = WEIGHT_BF16, .rows = rows, .cols = cols, .data = weights };
    struct step_limits limits = { .rows = n, .cols = cols > rows ? cols : rows };
    bool ok = (weights || err_memory(e, "probe", (uint64_t)(rows * cols) * 2)) &&
              op->weight_create(b->queue, &w, &src, e) && op->reserve(b->queue, &limits, e) &&
              op->memory_create(b->queue, &x, (uint64_t)(n * cols) * sizeof(float), e) &&
              op->memory_create(b->queue, &y, (uint64_t)(n * rows) * sizeof(float), e);
    double start = clock_seconds(), seconds = 0;
    float last;
    while (ok && seconds < PROBE_SECONDS) {
        op->matmul(b->queue, mat_of(y, n, rows), mat_of(x, n, cols), w);
        op->download(b->queue, &last, y, sizeof last);
        done++;
        seconds = clock_seconds() - start;
    }
    *out = ok ? 2.0 * (double)done * (double)n * (double)rows * (double)cols / seconds : 1;
    op->memory_free(b->queue, x);
    op->memory_free(b->queue, y);
    op->weight_free(b->queue, w);
    free(weights);
    return ok;
}

/* The same of sums of second moments, whose upper triangles alone are summed. */
static bool moments_rate(double *out, const struct run *r, struct err *e)
{
    const struct backend *b = r->options.backend;
    int64_t n = r->source.config.hidden_size, rows = calibration_rows(b, &r->samples), done = 0;
    void *h = NULL, *x = NULL;
    bool ok = b->ops->memory_create(b->queue, &h, (uint64_t)(n * n) * sizeof(float), e) &&
              b->ops->memory_create(b->queue, &x, (uint64_t)(rows * n) * sizeof(float), e);
    double start = clock_seconds(), seconds = 0;
    while (ok && seconds < PROBE_SECONDS) {
        b->ops->moments(b->queue, h, mat_of(x, rows, n));
        ok = b->ops->wait(b->queue, e);
        done++;
        seconds = clock_seconds() - start;
    }
    *out = ok ? (double)done * (double)rows * (double)n * (double)n / seconds : 1;
    b->ops->memory_free(b->queue, h);
    b->ops->memory_free(b->queue, x);
    return ok;
}

static bool calibration_seconds(double *out, const struct run *r, struct err *e)
{
    const struct config *c = &r->source.config;
    double products, moments, weights = 0, tokens = (double)r->samples.n_tokens;
    if (!product_rate(&products, r, e)) return false;
    for (int i = 0; i < c->n_layers; i++) weights += (double)layer_weights(c, c->layer_kinds[i]);
    *out = 2 * weights * tokens / products;
    if (!run_measures(r)) return true;
    if (!moments_rate(&moments, r, e)) return false;
    *out += (double)moments_bytes(c) / 4 * c->n_layers * tokens / moments;
    return true;
}

bool estimate_seconds(struct quantize_forecast *f, struct run *r, struct err *e)
{
    f->read_seconds = (double)r->result->bytes_in / read_rate(r);
    f->calibrate_seconds = 0;
    return packing_seconds(&f->pack_seconds, r, e) &&
           (r->samples.n == 0 || calibration_seconds(&f->calibrate_seconds, r, e));
}
