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
enum { ITEM_WEIGHTS = 1 << 16 };

/* Of a matrix that the fast kernel takes: all that a network's weights are. */
static const float ABSMAX_LEAST = 0x1p-28f, ABSMAX_MOST = 0x1p18f;

struct work {
    struct packer *packer;
    const struct matrix *matrix;
    const struct curvature *curvature;
    void (*body)(struct work *w, int64_t item, int thread);
    int64_t rows_each, items;
    uint8_t *codes, *scales;
    double *sums; /* [rows][2] squares of the difference and of the weights */
    float global, absmax;
    atomic_uint top;     /* largest |w| so far, as BF16 bits */
    atomic_bool invalid; /* a byte that must not be written */
};

struct works {
    struct work *list;
};

static void any_item(void *ctx, int64_t item, int thread)
{
    struct work *w = ((struct works *)ctx)->list;
    while (item >= w->items) item -= w++->items;
    w->body(w, item, thread);
}

/* Sets what follows from rows_each, 0: as many as ITEM_WEIGHTS has. */
static void run_all(struct packer *p, struct work *list, size_t n)
{
    int64_t items = 0;
    for (size_t i = 0; i < n; i++) {
        const struct matrix *m = list[i].matrix;
        int64_t rows = ITEM_WEIGHTS / (m->cols ? m->cols : 1);
        if (!list[i].rows_each) list[i].rows_each = rows ? rows : 1;
        list[i].items = (m->rows + list[i].rows_each - 1) / list[i].rows_each;
        items += list[i].items;
    }
    pool_run(p->pool, items, any_item, &(struct works){ list });
}

static int64_t last_row(const struct work *w, int64_t item)
{
    int64_t end = (item + 1) * w->rows_each;
    return end < w->matrix->rows ? end : w->matrix->rows;
}

static void absmax_item(struct work *w, int64_t item, int thread)
{
    const struct matrix *m = w->matrix;
    int64_t first = item * w->rows_each, rows = last_row(w, item) - first;
    unsigned top = w->packer->kernels->absmax(m->data + first * m->cols * 2, rows * m->cols);
    unsigned seen = atomic_load_explicit(&w->top, memory_order_relaxed);
    (void)thread;
    while (top > seen && !atomic_compare_exchange_weak(&w->top, &seen, top)) {
    }
}

static struct work look_of(struct packer *p, const struct matrix *m)
{
    return (struct work){ .packer = p, .matrix = m, .body = absmax_item };
}

static bool finish_look(float *out, struct work *w, struct err *e)
{
    unsigned bits = atomic_load(&w->top);
    *out = bf16_to_f32((bf16){ (uint16_t)bits });
    return bits < 0x7f80 ||
           err_set(e, ERR_FORMAT, "tensor '%s': module '%s' has a weight that is %s", w->matrix->source->name,
                   w->matrix->module, bits > 0x7f80 ? "NaN" : "infinite");
}

bool packer_absmax(struct packer *p, float *out, const struct matrix *m, struct err *e)
{
    struct work w = look_of(p, m);
    run_all(p, &w, 1);
    return finish_look(out, &w, e);
}

static void load_row(const struct packer *p, float *out, const struct matrix *m, int64_t r)
{
    p->kernels->widen(out, m->data + r * m->cols * 2, m->cols);
}

/* Without branches: the loop becomes vector compares. */
static bool scales_are_valid(const e4m3 *scale, int64_t n)
{
    uint8_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint8_t x = (uint8_t)(scale[i].bits - 1);
        top = x > top ? x : top;
    }
    return top < 0x7e;
}

/* The nearest values, of a matrix whose magnitudes no kernel minds. */
static void nearest_item(struct work *w, int64_t item, int thread)
{
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    int64_t first = item * w->rows_each, rows = last_row(w, item) - first, groups = m->cols / NVFP4_GROUP;
    e4m3 *scale = (e4m3 *)w->scales + first * groups;
    (void)thread;
    for (int64_t r = first; r < first + rows; r++, scale += groups)
        p->kernels->nvfp4_nearest(w->codes + r * (m->cols / 2), scale, &w->sums[2 * r],
                                  m->data + r * m->cols * 2, w->global, m->cols);
    if (!scales_are_valid(scale - rows * groups, rows * groups)) atomic_store(&w->invalid, true);
}

static void nvfp4_item(struct work *w, int64_t item, int thread)
{
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    float *row = p->rows + thread * 2 * p->cols_max, *back = row + p->cols_max;
    bool valid = true;
    for (int64_t r = item * w->rows_each; r < last_row(w, item); r++) {
        uint8_t *codes = w->codes + r * (m->cols / 2);
        e4m3 *scale = (e4m3 *)w->scales + r * (m->cols / NVFP4_GROUP);
        load_row(p, row, m, r);
        if (w->curvature && w->curvature->four_over_six)
            four_over_six_row(codes, scale, row, w->global, m->cols);
        else if (w->curvature)
            search_row(codes, scale, row, w->curvature->importance, w->global, m->cols);
        else
            nvfp4_pack_row(codes, scale, row, w->global, m->cols);
        p->kernels->nvfp4_unpack(back, codes, scale, w->global, m->cols);
        p->kernels->squares(&w->sums[2 * r], row, back, m->cols);
        valid &= scales_are_valid(scale, m->cols / NVFP4_GROUP);
    }
    if (!valid) atomic_store(&w->invalid, true);
}

static void gptq_item(struct work *w, int64_t item, int thread)
{
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    float *x = p->blocks + thread * 3 * p->cols_max * GPTQ_ROWS, *back = x + p->cols_max * GPTQ_ROWS;
    int64_t first = item * w->rows_each, rows = last_row(w, item) - first, groups = m->cols / NVFP4_GROUP;
    uint8_t *codes = w->codes + first * (m->cols / 2);
    e4m3 *scale = (e4m3 *)w->scales + first * groups;
    for (int64_t r = 0; r < rows; r++) load_row(p, x + r * m->cols, m, first + r);
    gptq_pack_rows(codes, scale, x, (int)rows, w->curvature->factor, w->global, m->cols, back);
    for (int64_t r = 0; r < rows; r++) {
        p->kernels->nvfp4_unpack(back, codes + r * (m->cols / 2), scale + r * groups, w->global, m->cols);
        p->kernels->squares(&w->sums[2 * (first + r)], x + r * m->cols, back, m->cols);
    }
    if (!scales_are_valid(scale, rows * groups)) atomic_store(&w->invalid, true);
}

static void fp8_item(struct work *w, int64_t item, int thread)
{
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    float *row = p->rows + thread * 2 * p->cols_max, *back = row + p->cols_max;
    bool valid = true;
    uint8_t nan = 0;
    for (int64_t r = item * w->rows_each; r < last_row(w, item); r++) {
        e4m3 *codes = (e4m3 *)w->codes + r * m->cols;
        load_row(p, row, m, r);
        uint16_t top = p->kernels->absmax(m->data + r * m->cols * 2, m->cols);
        bf16 scale = fp8_scale(bf16_to_f32((bf16){ top }));
        p->kernels->fp8_pack(codes, row, m->cols, scale);
        memcpy(w->scales + 2 * r, &scale, 2);
        valid &= scale.bits > 0 && scale.bits < 0x7f80;
        for (int64_t i = 0; i < m->cols; i++) nan |= (codes[i].bits & 0x7f) == 0x7f;
        p->kernels->fp8_unpack(back, codes, scale, m->cols);
        p->kernels->squares(&w->sums[2 * r], row, back, m->cols);
    }
    if (!valid || nan) atomic_store(&w->invalid, true);
}

/* One scale for the matrix. */
static void fp8_tensor_item(struct work *w, int64_t item, int thread)
{
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    float *row = p->rows + thread * 2 * p->cols_max, *back = row + p->cols_max;
    bf16 scale = fp8_scale(w->absmax);
    if (item == 0) memcpy(w->scales, &scale, 2);
    for (int64_t r = item * w->rows_each; r < last_row(w, item); r++) {
        e4m3 *codes = (e4m3 *)w->codes + r * m->cols;
        load_row(p, row, m, r);
        p->kernels->fp8_pack(codes, row, m->cols, scale);
        p->kernels->fp8_unpack(back, codes, scale, m->cols);
        p->kernels->squares(&w->sums[2 * r], row, back, m->cols);
    }
}

/* The scales of a row of blocks, 128 rows. top: scratch [blocks]. */
static void block_scales(const struct packer *p, bf16 *scales, float *row, const struct matrix *m,
                         int64_t first, int64_t end, float *top)
{
    int64_t blocks = fp8_blocks(m->cols);
    for (int64_t b = 0; b < blocks; b++) top[b] = 0;
    for (int64_t r = first; r < end; r++) {
        load_row(p, row, m, r);
        for (int64_t i = 0; i < m->cols; i++) top[i / FP8_BLOCK] = fmaxf(top[i / FP8_BLOCK], fabsf(row[i]));
    }
    for (int64_t b = 0; b < blocks; b++) scales[b] = fp8_scale(top[b]);
}

static void fp8_block_item(struct work *w, int64_t item, int thread)
{
    struct packer *p = w->packer;
    const struct matrix *m = w->matrix;
    float *row = p->rows + thread * 2 * p->cols_max, *back = row + p->cols_max;
    bf16 *scales = (bf16 *)(void *)w->scales + item * fp8_blocks(m->cols);
    block_scales(p, scales, row, m, item * FP8_BLOCK, last_row(w, item), back);
    for (int64_t r = item * FP8_BLOCK; r < last_row(w, item); r++) {
        e4m3 *codes = (e4m3 *)w->codes + r * m->cols;
        load_row(p, row, m, r);
        for (int64_t c = 0; c < m->cols; c += FP8_BLOCK) {
            int64_t n = m->cols - c < FP8_BLOCK ? m->cols - c : FP8_BLOCK;
            bf16 scale = scales[c / FP8_BLOCK];
            p->kernels->fp8_pack(codes + c, row + c, n, scale);
            p->kernels->fp8_unpack(back + c, codes + c, scale, n);
        }
        p->kernels->squares(&w->sums[2 * r], row, back, m->cols);
    }
}

static float global_of(float absmax, const struct curvature *curvature)
{
    return curvature ? nvfp4_global_scale_roomy(absmax) : nvfp4_global_scale(absmax);
}

static uint64_t scales_bytes(const struct matrix *m)
{
    switch (m->scheme) {
    case SCHEME_NVFP4:
    case SCHEME_NVFP4A16: return (uint64_t)m->rows * (uint64_t)m->cols / NVFP4_GROUP;
    case SCHEME_FP8: return 2;
    case SCHEME_FP8_BLOCK: return (uint64_t)fp8_blocks(m->rows) * (uint64_t)fp8_blocks(m->cols) * 2;
    default: return (uint64_t)m->rows * 2;
    }
}

static struct work work_of(struct packer *p, const struct packing *in, const struct curvature *curvature)
{
    const struct matrix *m = in->matrix;
    bool nvfp4 = scheme_is_nvfp4(m->scheme), passes_on = nvfp4 && curvature && curvature->factor;
    bool is_plain = nvfp4 && !curvature && in->absmax >= ABSMAX_LEAST && in->absmax <= ABSMAX_MOST;
    return (struct work){ .packer = p,
                          .matrix = m,
                          .curvature = curvature,
                          .body = passes_on                       ? gptq_item
                                  : is_plain                      ? nearest_item
                                  : nvfp4                         ? nvfp4_item
                                  : m->scheme == SCHEME_FP8       ? fp8_tensor_item
                                  : m->scheme == SCHEME_FP8_BLOCK ? fp8_block_item
                                                                  : fp8_item,
                          .rows_each = passes_on                       ? GPTQ_ROWS
                                       : m->scheme == SCHEME_FP8_BLOCK ? FP8_BLOCK
                                                                       : 0,
                          .codes = in->codes,
                          .scales = in->scales,
                          .absmax = in->absmax,
                          .global = nvfp4 ? global_of(in->absmax, curvature) : 0 };
}

static bool unsound(const struct matrix *m, struct err *e)
{
    return err_set(e, ERR_FORMAT,
                   "module '%s': packing as %s gave a scale or code that is not finite and above zero",
                   m->module, scheme_name(m->scheme));
}

bool packed_check(const struct packed *p, const struct matrix *m, const e4m3 *scales, struct err *e)
{
    bool nvfp4 = scheme_is_nvfp4(m->scheme);
    if (isfinite(p->difference + p->total) &&
        (!nvfp4 || (p->global > 0 && isfinite(p->global) &&
                    (!scales || scales_are_valid(scales, (int64_t)p->scales_bytes)))))
        return true;
    return unsound(m, e);
}

static bool finish(struct packed *out, struct work *w, struct err *e)
{
    const struct matrix *m = w->matrix;
    bool nvfp4 = scheme_is_nvfp4(m->scheme);
    uint64_t weights = (uint64_t)m->rows * (uint64_t)m->cols;
    *out = (struct packed){ .codes_bytes = nvfp4 ? weights / 2 : weights,
                            .scales_bytes = scales_bytes(m),
                            .global = w->global };
    for (int64_t r = 0; r < m->rows; r++) {
        out->difference += w->sums[2 * r];
        out->total += w->sums[2 * r + 1];
    }
    return atomic_load(&w->invalid) ? unsound(m, e) : packed_check(out, m, NULL, e);
}

bool packer_run(struct packer *p, struct packed *out, const struct packing *in, size_t n,
                const struct curvature *curvature, struct packer_look *ahead, struct err *e)
{
    struct work works[2 * PACKER_MATRICES];
    double *sums = p->sums;
    size_t n_looks = ahead ? ahead->n : 0;
    for (size_t i = 0; i < n; i++) {
        works[i] = work_of(p, &in[i], curvature);
        works[i].sums = sums;
        sums += 2 * in[i].matrix->rows;
    }
    for (size_t i = 0; i < n_looks; i++) works[n + i] = look_of(p, ahead->matrices[i]);
    run_all(p, works, n + n_looks);
    for (size_t i = 0; i < n; i++)
        if (!finish(&out[i], &works[i], e)) return false;
    for (size_t i = 0; i < n_looks; i++)
        if (!finish_look(&ahead->absmax[i], &works[n + i], e)) return false;
    return true;
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
    p->kernels = rows_select(ROWS_BEST);
    if (!pool_create(&p->pool, threads, e)) return false;
    uint64_t scales = largest / NVFP4_GROUP + (uint64_t)p->rows_max * 2;
    p->scales = malloc(scales + 1);
    p->rows = malloc((uint64_t)threads * 2 * (uint64_t)p->cols_max * sizeof *p->rows + 1);
    int64_t sums = p->rows_max > PACKER_ROWS ? p->rows_max : PACKER_ROWS;
    p->sums = malloc((uint64_t)sums * 2 * sizeof *p->sums);
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
