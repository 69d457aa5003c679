/* Lays a matrix out in panels of 16 interleaved rows while it is loaded (kernels.h), all cores at work. */
#include "backend/cpu/parts.h"
#include "base/checked.h"
#include "num/f16.h"
#include "num/fp8.h"
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct laying {
    struct cpu_weight *w;
    const struct weight_source *src;
    atomic_llong nan_at; /* element + 1 of an FP8 NaN */
};

static bool is_fp8(enum weight_format f)
{
    return f == WEIGHT_FP8 || f == WEIGHT_FP8_BLOCK;
}

static unsigned element_bytes(enum weight_format f)
{
    return f == WEIGHT_BF16 ? 2 : is_fp8(f) ? 1 : 4; /* F16 is widened: it is rare and small */
}

static void lay_nvfp4(struct laying *l, int64_t panel)
{
    int64_t cols = l->src->cols, first = panel * PANEL;
    uint8_t *out = l->w->data + panel * cols * 8, *groups = l->w->groups + panel * cols;
    for (int64_t r = first; r < first + PANEL && r < l->src->rows; r++) {
        const uint8_t *codes = (const uint8_t *)l->src->data + r * cols / 2;
        const uint8_t *scales = (const uint8_t *)l->src->scale + r * cols / 16;
        int lane = (int)(r - first), shift = lane < 8 ? 0 : 4;
        for (int64_t c = 0; c < cols; c++)
            out[c * 8 + lane % 8] |= (uint8_t)((codes[c / 2] >> (c % 2 * 4) & 15) << shift);
        for (int64_t g = 0; g < cols / 16; g++) {
            groups[g * PANEL + lane] = scales[g];
            if ((scales[g] & 0x7f) == 0x7f) atomic_store(&l->nan_at, r * cols + g * 16 + 1);
        }
    }
}

static void lay_dense(struct laying *l, int64_t panel)
{
    int64_t cols = l->src->cols, first = panel * PANEL;
    unsigned bytes = element_bytes(l->src->format);
    uint8_t *out = l->w->data + panel * cols * PANEL * bytes;
    for (int64_t r = first; r < first + PANEL && r < l->src->rows; r++) {
        const uint8_t *row =
            (const uint8_t *)l->src->data + r * cols * (l->src->format == WEIGHT_F16 ? 2 : bytes);
        uint8_t *lane = out + (r - first) * bytes;
        for (int64_t c = 0; c < cols; c++, lane += PANEL * bytes) {
            if (l->src->format == WEIGHT_BF16) {
                memcpy(lane, row + 2 * c, 2);
            } else if (is_fp8(l->src->format)) {
                *lane = row[c];
                if ((row[c] & 0x7f) == 0x7f) atomic_store(&l->nan_at, r * cols + c + 1);
            } else if (l->src->format == WEIGHT_F16) {
                uint16_t h;
                memcpy(&h, row + 2 * c, 2);
                float x = f16_to_f32(h);
                memcpy(lane, &x, 4);
            } else {
                memcpy(lane, row + 4 * c, 4);
            }
        }
    }
}

static void lay_panel(void *ctx, int64_t panel, int thread)
{
    struct laying *l = ctx;
    (void)thread;
    if (l->src->format == WEIGHT_NVFP4)
        lay_nvfp4(l, panel);
    else
        lay_dense(l, panel);
}

/* FP8 scales in w->scale: one a row, or one a block. */
static int64_t n_scales(const struct cpu_weight *w)
{
    if (w->head.format == WEIGHT_FP8) return w->panels * PANEL;
    return w->head.format == WEIGHT_FP8_BLOCK ? fp8_blocks(w->head.rows) * fp8_blocks(w->head.cols) : 0;
}

static void *take(uint64_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) & ~(uint64_t)63);
    if (p) memset(p, 0, bytes);
    return p;
}

static bool take_memory(struct cpu_weight *w, const struct weight_source *src, struct err *e)
{
    uint64_t elements = 0, bytes = 0;
    bool fits = fits_mul((uint64_t)w->panels * PANEL, (uint64_t)src->cols, &elements) &&
                fits_mul(elements, 4, &bytes);
    if (!fits)
        return err_set(e, ERR_LIMIT, "matrix of %" PRId64 " x %" PRId64 " is too large", src->rows,
                       src->cols);
    bytes = src->format == WEIGHT_NVFP4 ? elements / 2 : elements * element_bytes(src->format);
    w->data = take(bytes ? bytes : 64);
    if (src->format == WEIGHT_NVFP4) w->groups = take(elements / 16 + 64);
    if (is_fp8(src->format)) w->scale = take((uint64_t)n_scales(w) * sizeof *w->scale + 64);
    if (w->data && (w->groups || src->format != WEIGHT_NVFP4) && (w->scale || !is_fp8(src->format)))
        return true;
    return err_memory(e, "weights", bytes);
}

bool cpu_weight_create(struct queue *q, struct weight **out, const struct weight_source *src, struct err *e)
{
    *out = NULL;
    struct cpu_weight *w = calloc(1, sizeof *w);
    if (!w) return err_memory(e, "weight", sizeof *w);
    w->head =
        (struct weight){ src->format, src->rows, src->cols, src->input, src->input_global, src->is_table };
    w->panels = (src->rows + PANEL - 1) / PANEL;
    w->global = src->global;
    w->table = src->data;
    *out = &w->head;
    if (src->is_table) return true;
    struct laying l = { .w = w, .src = src };
    bool ok = take_memory(w, src, e);
    if (ok) {
        int64_t n = src->format == WEIGHT_FP8 ? src->rows : n_scales(w);
        if (n > 0 && is_fp8(src->format)) memcpy(w->scale, src->scale, (size_t)n * sizeof *w->scale);
        pool_run(q->pool, w->panels, lay_panel, &l);
        int64_t at = atomic_load(&l.nan_at) - 1;
        ok = at < 0 || err_set(e, ERR_FORMAT, "NaN at row %" PRId64 ", column %" PRId64, at / src->cols,
                               at % src->cols);
    }
    if (ok) return true;
    cpu_weight_free(q, &w->head);
    *out = NULL;
    return false;
}

void cpu_weight_free(struct queue *q, struct weight *weight)
{
    (void)q;
    if (!weight) return;
    struct cpu_weight *w = (struct cpu_weight *)weight;
    free(w->data);
    free(w->groups);
    free(w->scale);
    free(w);
}
