/* A layer packed where it was calibrated: weights and moments lie in the backend's memory already, and only
 * codes, scales and sums of squares come back. The bytes are those of the host's way (layers.c) for the same
 * moments. */
#include "base/pages.h"
#include "num/nvfp4.h"
#include "quantize/layers.h"
#include <stdlib.h>
#include <string.h>

/* Rows and columns of an expert's matrix. */
static int64_t rows_of(const struct config *c, enum expert_part part)
{
    return part == PART_DOWN ? c->hidden_size : c->moe_intermediate;
}

static int64_t cols_of(const struct config *c, enum expert_part part)
{
    return part == PART_DOWN ? c->moe_intermediate : c->hidden_size;
}

static uint64_t weights_of(const struct config *c)
{
    return (uint64_t)c->n_experts * (uint64_t)c->moe_intermediate * (uint64_t)c->hidden_size;
}

static uint64_t columns_of(const struct config *c)
{
    return (uint64_t)c->hidden_size + (uint64_t)c->n_experts * (uint64_t)c->moe_intermediate;
}

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* Bytes of two sums of every row. */
static uint64_t sums_bytes(const struct config *c)
{
    return (uint64_t)c->n_experts * larger((uint64_t)c->hidden_size, (uint64_t)c->moe_intermediate) * 2 *
           sizeof(double);
}

static uint64_t scratch_bytes(const struct config *c)
{
    uint64_t block = sizeof(double) + (uint64_t)c->hidden_size * sizeof(float),
             down = sizeof(double) + (uint64_t)c->moe_intermediate * sizeof(float);
    return larger(block, (uint64_t)c->n_experts * down);
}

bool layers_device_suits(const struct run *r)
{
    const struct backend *b = r->options.backend;
    const struct config *c = &r->source.config;
    size_t n = (size_t)c->n_layers * (size_t)c->n_experts * N_PARTS;
    bool all = b->ops->pack && b->ops->packs(b->queue, c->hidden_size) &&
               b->ops->packs(b->queue, c->moe_intermediate) && run_measures(r);
    for (size_t i = 0; i < n && all; i++)
        all = r->plan.experts[i] != SIZE_MAX && scheme_is_nvfp4(r->plan.matrices[r->plan.experts[i]].scheme);
    return all;
}

uint64_t layers_device_bytes(const struct config *c, bool contest)
{
    uint64_t moments = sizeof(float) * ((uint64_t)c->hidden_size * (uint64_t)c->hidden_size +
                                        (uint64_t)c->n_experts * (uint64_t)c->moe_intermediate *
                                            (uint64_t)c->moe_intermediate);
    return weights_of(c) / 2 + weights_of(c) / NVFP4_GROUP + sums_bytes(c) + columns_of(c) * sizeof(float) +
           scratch_bytes(c) + (contest ? moments : 0);
}

bool layers_device_init(struct layers_device *d, struct backend *b, const struct config *c, bool contest,
                        struct err *e)
{
    const struct ops *op = b->ops;
    uint64_t n = (uint64_t)c->n_experts, w = weights_of(c);
    void *global = NULL, *importance = NULL, *factored = NULL, *scratch = NULL, *codes = NULL, *scales = NULL,
         *sums = NULL, *block = NULL, *down = NULL;
    *d = (struct layers_device){ .backend = b, .config = c };
    struct moments *t = &d->trial;
    *t = (struct moments){ c->n_experts, c->hidden_size, c->moe_intermediate, NULL, NULL };
    bool ok = op->memory_create(b->queue, &global, n * sizeof *d->global, e) &&
              op->memory_create(b->queue, &importance, columns_of(c) * sizeof *d->importance, e) &&
              op->memory_create(b->queue, &factored, (n + 1) * sizeof *d->factored, e) &&
              op->memory_create(b->queue, &scratch, scratch_bytes(c), e) &&
              op->memory_create(b->queue, &codes, w / 2, e) &&
              op->memory_create(b->queue, &scales, w / NVFP4_GROUP, e) &&
              op->memory_create(b->queue, &sums, sums_bytes(c), e) &&
              (!contest || (op->memory_create(b->queue, &block, moments_block_bytes(t), e) &&
                            op->memory_create(b->queue, &down, moments_down_bytes(t), e)));
    d->global = global;
    d->importance = importance;
    d->factored = factored;
    d->scratch = scratch;
    d->codes = codes;
    d->scales = scales;
    d->sums = sums;
    t->block = block;
    t->down = down;
    d->host = malloc(w / 2 + w / NVFP4_GROUP + sums_bytes(c) + 1);
    d->host_global = malloc((size_t)(N_PARTS * n) * sizeof *d->host_global + 1);
    d->losses = malloc((size_t)(N_PARTS * 2 * n) * sizeof *d->losses + 1);
    d->host_factored = calloc((size_t)n + 1, sizeof *d->host_factored);
    if (ok && d->host && d->host_global && d->losses && d->host_factored) return true;
    layers_device_deinit(d);
    return ok ? err_memory(e, "packed experts", w / 2 + w / NVFP4_GROUP + sums_bytes(c)) : false;
}

void layers_device_deinit(struct layers_device *d)
{
    if (!d->backend) return;
    void *all[] = { d->global, d->importance, d->factored,    d->scratch,   d->codes,
                    d->scales, d->sums,       d->trial.block, d->trial.down };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        d->backend->ops->memory_free(d->backend->queue, all[i]);
    free(d->host);
    free(d->host_global);
    free(d->losses);
    free(d->host_factored);
    *d = (struct layers_device){ 0 };
}

/* Of all parts' matrices: the scales that partners share. */
static bool find_globals(struct run *r, int layer, struct err *e)
{
    struct layers_device *d = &r->there;
    int64_t n = (int64_t)d->config->n_experts * N_PARTS;
    for (int64_t i = 0; i < n; i++) {
        size_t index = r->plan.experts[layer * n + i];
        float absmax;
        if (!run_absmax(r, &absmax, index, e)) return false;
        d->host_global[i % N_PARTS * d->config->n_experts + i / N_PARTS] = nvfp4_global_scale_roomy(absmax);
        pages_release(r->plan.matrices[index].data, run_matrix_bytes(&r->plan.matrices[index]));
    }
    return true;
}

/* Importance of all columns, and where factors are wanted these in place of the moments. */
static void weigh(struct layers_device *d, const struct moments *m, bool factors)
{
    const struct ops *op = d->backend->ops;
    struct factoring block = {
        m->block, m->hidden, 1, d->importance, factors ? d->factored : NULL, d->scratch
    };
    struct factoring down = {
        m->down,   m->inner, m->n_experts, d->importance + m->hidden, factors ? d->factored + 1 : NULL,
        d->scratch
    };
    op->factor(d->backend->queue, &block);
    op->factor(d->backend->queue, &down);
}

static struct packing_run packing_of(const struct layers_device *d, enum expert_part part,
                                     const struct calibrated *x, const struct moments *factors)
{
    bool is_down = part == PART_DOWN;
    static const enum expert_matrix matrices[] = { EXPERT_GATE, EXPERT_UP, EXPERT_DOWN };
    return (struct packing_run){ .experts = x->experts,
                                 .part = matrices[part],
                                 .rows = rows_of(d->config, part),
                                 .step = 1,
                                 .cols = cols_of(d->config, part),
                                 .global = d->global,
                                 .shared = !is_down,
                                 .importance = d->importance + (is_down ? d->config->hidden_size : 0),
                                 .factor = !factors  ? NULL
                                           : is_down ? factors->down
                                                     : factors->block,
                                 .factored = d->factored + is_down,
                                 .codes = d->codes,
                                 .scales = d->scales,
                                 .sums = d->sums };
}

/* Queues it, then fetches the sums. */
static const double *pack(struct layers_device *d, enum expert_part part, const struct packing_run *p)
{
    const struct ops *op = d->backend->ops;
    struct queue *q = d->backend->queue;
    uint64_t n = (uint64_t)d->config->n_experts;
    double *sums = (double *)(void *)d->host;
    op->upload(q, d->global, d->host_global + (uint64_t)part * n, n * sizeof *d->global);
    op->pack(q, p);
    op->download(q, sums, d->sums, n * (uint64_t)p->rows * 2 * sizeof *sums);
    return sums;
}

/* What the rows that are tried of each matrix lose at the output on samples held out. */
static void try_part(struct layers_device *d, enum expert_part part, const struct calibrated *x, bool passes)
{
    struct packing_run p = packing_of(d, part, x, passes ? &d->trial : NULL);
    int64_t n = p.rows < GPTQ_ROWS ? p.rows : GPTQ_ROWS, experts = d->config->n_experts;
    double *loss = d->losses + (part * 2 + passes) * experts;
    p.step = p.rows / n;
    p.rows = n;
    p.held = part == PART_DOWN ? x->held->down : x->held->block;
    const double *sums = pack(d, part, &p);
    for (int64_t i = 0; i < experts; i++) {
        loss[i] = 0;
        for (int64_t r = 0; r < n; r++) loss[i] += sums[2 * (i * n + r)];
    }
}

/* contest.h, added up in the same order. Afterwards the moments are those of all samples. */
static struct contest_result hold_contest(struct layers_device *d, const struct calibrated *x)
{
    const struct ops *op = d->backend->ops;
    struct queue *q = d->backend->queue;
    const struct moments *m = x->moments, *held = x->held;
    int64_t square = m->inner * m->inner, n = d->config->n_experts;
    double block = 0, down = 0;
    op->copy(q, d->trial.block, m->block, moments_block_bytes(m));
    op->copy(q, d->trial.down, m->down, moments_down_bytes(m));
    op->add(q, mat_of(m->block, m->hidden, m->hidden), mat_of(held->block, m->hidden, m->hidden));
    op->add(q, mat_of(m->down, m->n_experts, square), mat_of(held->down, m->n_experts, square));
    weigh(d, &d->trial, true);
    for (int i = 0; i < N_PARTS * 2; i++) try_part(d, (enum expert_part)(i / 2), x, i % 2);
    for (int64_t i = 0; i < n * N_PARTS; i++) {
        const double *alone = d->losses + i % N_PARTS * 2 * n + i / N_PARTS, *passed = alone + n;
        *(i % N_PARTS == PART_DOWN ? &down : &block) += *alone - *passed;
    }
    return (struct contest_result){ block > 0, down > 0 };
}

/* One expert's matrix, whose codes, scales and sums of rows are on the host. */
static bool spool_expert(struct run *r, size_t index, const uint8_t *codes, const uint8_t *scales,
                         const double *sums, float global, bool is_gptq, struct err *e)
{
    const struct matrix *m = &r->plan.matrices[index];
    uint64_t weights = (uint64_t)m->rows * (uint64_t)m->cols;
    struct packed p = { .codes_bytes = weights / 2, .scales_bytes = weights / NVFP4_GROUP, .global = global };
    struct spooled item = { .index = index, .at = r->spool.end };
    for (int64_t i = 0; i < m->rows; i++) {
        p.difference += sums[2 * i];
        p.total += sums[2 * i + 1];
    }
    item.codes_bytes = p.codes_bytes;
    item.scales_bytes = p.scales_bytes;
    item.result.difference = p.difference;
    item.result.total = p.total;
    item.result.global = p.global;
    item.result.is_gptq = is_gptq;
    if (!packed_check(&p, m, (const e4m3 *)scales, e) || !spool_append(&r->spool, codes, p.codes_bytes, e) ||
        !spool_append(&r->spool, scales, p.scales_bytes, e))
        return false;
    spool_add(&r->spool, &item);
    return true;
}

static bool pack_part(struct run *r, int layer, enum expert_part part, const struct calibrated *x,
                      bool passes, struct err *e)
{
    struct layers_device *d = &r->there;
    const struct ops *op = d->backend->ops;
    struct queue *q = d->backend->queue;
    struct packing_run p = packing_of(d, part, x, passes ? x->moments : NULL);
    int n = d->config->n_experts;
    uint64_t each = (uint64_t)(p.rows * p.cols), all = each * (uint64_t)n;
    const double *sums = pack(d, part, &p);
    uint8_t *codes = d->host + sums_bytes(d->config), *scales = codes + all / 2;
    op->download(q, codes, d->codes, all / 2);
    op->download(q, scales, d->scales, all / NVFP4_GROUP);
    if (passes) op->download(q, d->host_factored, d->factored, ((uint64_t)n + 1) * sizeof *d->host_factored);
    if (!op->wait(q, e)) return false;
    for (int i = 0; i < n; i++) {
        size_t index = r->plan.experts[((int64_t)layer * n + i) * N_PARTS + part];
        bool is_gptq = passes && d->host_factored[part == PART_DOWN ? 1 + i : 0];
        if (passes && !is_gptq) run_warn_no_factor(r, index);
        if (!spool_expert(r, index, codes + (uint64_t)i * each / 2, scales + (uint64_t)i * each / NVFP4_GROUP,
                          sums + 2 * i * p.rows, d->host_global[part * n + i], is_gptq, e))
            return false;
    }
    return true;
}

bool layers_device_pack(struct run *r, int layer, const struct calibrated *x, struct err *e)
{
    struct layers_device *d = &r->there;
    bool always = r->options.method == QUANTIZE_GPTQ;
    struct contest_result passes = { always, always };
    if (!find_globals(r, layer, e)) return false;
    if (x->held) passes = hold_contest(d, x);
    weigh(d, x->moments, passes.block || passes.down);
    return pack_part(r, layer, PART_GATE, x, passes.block, e) &&
           pack_part(r, layer, PART_UP, x, passes.block, e) &&
           pack_part(r, layer, PART_DOWN, x, passes.down, e) && spool_sync(&r->spool, e);
}
