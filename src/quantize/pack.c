/* Rows of a matrix, spread over threads; a row is the unit of every format here, so the result does not
 * depend on how they are spread. Sums are kept per row and added in order for the same reason. */
#include "quantize/pack.h"
#include "num/fp8.h"
#include "num/nvfp4.h"
#include "quantize/gptq.h"
#include "quantize/search.h"
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Weights of one work item: long enough to hide the hand-over, short enough to balance. */
enum { ITEM_WEIGHTS = 1 << 12 };

struct work {
    struct packer *packer;
    const struct matrix *matrix;
    const struct curvature *curvature;
    int64_t rows_each; /* 0: as many as ITEM_WEIGHTS has */
    float global;
    atomic_uint top;     /* largest |w| so far, as BF16 bits */
    atomic_bool invalid; /* a byte that must not be written */
};

static int64_t item_rows(const struct matrix *m)
{
    int64_t n = ITEM_WEIGHTS / (m->cols ? m->cols : 1);
    return n ? n : 1;
}

static void for_each_item(struct packer *p, struct work *w, void (*body)(void *ctx, int64_t item, int thread))
{
    if (!w->rows_each) w->rows_each = item_rows(w->matrix);
    pool_run(p->pool, (w->matrix->rows + w->rows_each - 1) / w->rows_each, body, w);
}

static int64_t last_row(const struct work *w, int64_t item)
{
    int64_t end = (item + 1) * w->rows_each;
    return end < w->matrix->rows ? end : w->matrix->rows;
}

static void absmax_item(void *ctx, int64_t item, int thread)
{
    struct work *w = ctx;
    const struct matrix *m = w->matrix;
    uint16_t *row = (uint16_t *)(void *)(w->packer->rows + thread * 2 * w->packer->cols_max);
    unsigned top = 0;
    for (int64_t r = item * w->rows_each; r < last_row(w, item); r++) {
        memcpy(row, m->data + r * m->cols * 2, (size_t)m->cols * 2);
        uint16_t most = 0;
        for (int64_t i = 0; i < m->cols; i++) {
            uint16_t u = row[i] & 0x7fff;
            most = u > most ? u : most;
        }
        top = most > top ? most : top;
    }
    unsigned seen = atomic_load_explicit(&w->top, memory_order_relaxed);
    while (top > seen && !atomic_compare_exchange_weak(&w->top, &seen, top)) {
    }
}

bool packer_absmax(struct packer *p, float *out, const struct matrix *m, struct err *e)
{
    struct work w = { .packer = p, .matrix = m };
    for_each_item(p, &w, absmax_item);
    unsigned bits = atomic_load(&w.top);
    *out = bf16_to_f32((bf16){ (uint16_t)bits });
    return bits < 0x7f80 || err_set(e, ERR_FORMAT, "tensor '%s': module '%s' has a weight that is %s",
                                    m->source->name, m->module, bits > 0x7f80 ? "NaN" : "infinite");
}

static void load_row(float *out, const struct matrix *m, int64_t r)
{
    const uint8_t *from = m->data + r * m->cols * 2;
    for (int64_t i = 0; i < m->cols; i++) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, 2);
        out[i] = bf16_to_f32((bf16){ bits });
    }
}

/* Eight sums side by side: their order of additions is fixed, and a compiler can keep them in vectors. */
static void sum_row(double sums[2], const float *weights, const float *packed, int64_t n)
{
    enum { LANES = 8 };
    double difference[LANES] = { 0 }, total[LANES] = { 0 };
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) {
            double w = (double)weights[i + k], d = w - (double)packed[i + k];
            difference[k] += d * d;
            total[k] += w * w;
        }
    for (; i < n; i++) {
        double w = (double)weights[i], d = w - (double)packed[i];
        difference[0] += d * d;
        total[0] += w * w;
    }
    sums[0] = sums[1] = 0;
    for (int k = 0; k < LANES; k++) {
        sums[0] += difference[k];
        sums[1] += total[k];
    }
}

static bool scales_are_valid(const e4m3 *scale, int64_t n)
{
    bool ok = true;
    for (int64_t i = 0; i < n; i++) ok &= scale[i].bits >= 1 && scale[i].bits <= 0x7e;
    return ok;
}

static void nvfp4_item(void *ctx, int64_t item, int thread)
{
    struct work *w = ctx;
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    float *row = p->rows + thread * 2 * p->cols_max, *back = row + p->cols_max;
    bool valid = true;
    for (int64_t r = item * w->rows_each; r < last_row(w, item); r++) {
        uint8_t *codes = p->codes + r * (m->cols / 2);
        e4m3 *scale = (e4m3 *)p->scales + r * (m->cols / NVFP4_GROUP);
        load_row(row, m, r);
        if (w->curvature)
            search_row(codes, scale, row, w->curvature->importance, w->global, m->cols);
        else
            nvfp4_pack_row(codes, scale, row, w->global, m->cols);
        nvfp4_unpack_row(back, codes, scale, w->global, m->cols);
        sum_row(&p->sums[2 * r], row, back, m->cols);
        valid &= scales_are_valid(scale, m->cols / NVFP4_GROUP);
    }
    if (!valid) atomic_store(&w->invalid, true);
}

static void gptq_item(void *ctx, int64_t item, int thread)
{
    struct work *w = ctx;
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    float *x = p->blocks + thread * 3 * p->cols_max * GPTQ_ROWS, *back = x + p->cols_max * GPTQ_ROWS;
    int64_t first = item * w->rows_each, rows = last_row(w, item) - first, groups = m->cols / NVFP4_GROUP;
    uint8_t *codes = p->codes + first * (m->cols / 2);
    e4m3 *scale = (e4m3 *)p->scales + first * groups;
    for (int64_t r = 0; r < rows; r++) load_row(x + r * m->cols, m, first + r);
    gptq_pack_rows(codes, scale, x, (int)rows, w->curvature->factor, w->global, m->cols, back);
    for (int64_t r = 0; r < rows; r++) {
        nvfp4_unpack_row(back, codes + r * (m->cols / 2), scale + r * groups, w->global, m->cols);
        sum_row(&p->sums[2 * (first + r)], x + r * m->cols, back, m->cols);
    }
    if (!scales_are_valid(scale, rows * groups)) atomic_store(&w->invalid, true);
}

static void fp8_item(void *ctx, int64_t item, int thread)
{
    struct work *w = ctx;
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    float *row = p->rows + thread * 2 * p->cols_max, *back = row + p->cols_max;
    bool valid = true;
    for (int64_t r = item * w->rows_each; r < last_row(w, item); r++) {
        e4m3 *codes = (e4m3 *)p->codes + r * m->cols;
        load_row(row, m, r);
        bf16 scale = fp8_pack_row(codes, row, m->cols);
        memcpy(p->scales + 2 * r, &scale, 2);
        valid &= scale.bits > 0 && scale.bits < 0x7f80;
        for (int64_t i = 0; i < m->cols; i++) {
            valid &= (codes[i].bits & 0x7f) != 0x7f;
            back[i] = e4m3_to_f32(codes[i]) * bf16_to_f32(scale);
        }
        sum_row(&p->sums[2 * r], row, back, m->cols);
    }
    if (!valid) atomic_store(&w->invalid, true);
}

static void add_sums(struct packed *out, const struct packer *p, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++) {
        out->difference += p->sums[2 * r];
        out->total += p->sums[2 * r + 1];
    }
}

static float global_of(float absmax, const struct curvature *curvature)
{
    return curvature ? nvfp4_global_scale_roomy(absmax) : nvfp4_global_scale(absmax);
}

bool packer_run(struct packer *p, struct packed *out, const struct matrix *m, float absmax,
                const struct curvature *curvature, struct err *e)
{
    bool nvfp4 = scheme_is_nvfp4(m->scheme), passes_on = nvfp4 && curvature && curvature->factor;
    uint64_t weights = (uint64_t)m->rows * (uint64_t)m->cols;
    struct work w = { .packer = p,
                      .matrix = m,
                      .curvature = curvature,
                      .rows_each = passes_on ? GPTQ_ROWS : 0,
                      .global = nvfp4 ? global_of(absmax, curvature) : 0 };
    for_each_item(p, &w, passes_on ? gptq_item : nvfp4 ? nvfp4_item : fp8_item);
    *out = (struct packed){ .codes = p->codes,
                            .scales = p->scales,
                            .codes_bytes = nvfp4 ? weights / 2 : weights,
                            .scales_bytes = nvfp4 ? weights / NVFP4_GROUP : (uint64_t)m->rows * 2,
                            .global = w.global };
    add_sums(out, p, m->rows);
    if (!atomic_load(&w.invalid) && isfinite(out->difference + out->total) &&
        (!nvfp4 || (w.global > 0 && isfinite(w.global))))
        return true;
    return err_set(e, ERR_FORMAT,
                   "module '%s': packing as %s gave a scale or code that is not finite and above zero",
                   m->module, scheme_name(m->scheme));
}

int64_t packer_piece_rows(const struct matrix *m)
{
    enum { PIECE_WEIGHTS = 1 << 23, MULTIPLE = 128 };
    int64_t n = PIECE_WEIGHTS / (m->cols ? m->cols : 1) / MULTIPLE * MULTIPLE;
    if (n == 0) n = MULTIPLE;
    return n < m->rows ? n : m->rows;
}

bool packer_init(struct packer *p, const struct plan *plan, int threads, struct err *e)
{
    uint64_t largest = 0;
    *p = (struct packer){ 0 };
    for (size_t i = 0; i < plan->n_matrices; i++) {
        const struct matrix *m = &plan->matrices[i];
        int64_t rows = packer_piece_rows(m);
        uint64_t weights = (uint64_t)rows * (uint64_t)m->cols;
        largest = weights > largest ? weights : largest;
        p->rows_max = rows > p->rows_max ? rows : p->rows_max;
        p->cols_max = m->cols > p->cols_max ? m->cols : p->cols_max;
    }
    if (!pool_create(&p->pool, threads, e)) return false;
    uint64_t scales = largest / NVFP4_GROUP + (uint64_t)p->rows_max * 2;
    p->scales = malloc(scales + 1);
    p->rows = malloc((uint64_t)threads * 2 * (uint64_t)p->cols_max * sizeof *p->rows + 1);
    p->sums = malloc((uint64_t)p->rows_max * 2 * sizeof *p->sums + 1);
    p->blocks = malloc((uint64_t)threads * 3 * GPTQ_ROWS * (uint64_t)p->cols_max * sizeof *p->blocks + 1);
    if (p->scales && p->rows && p->sums && p->blocks) return true;
    packer_deinit(p);
    return err_memory(e, "packing buffers", scales);
}

void packer_deinit(struct packer *p)
{
    pool_free(p->pool);
    free(p->scales);
    free(p->rows);
    free(p->sums);
    free(p->blocks);
    *p = (struct packer){ 0 };
}
