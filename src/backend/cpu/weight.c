/* Lays a matrix out in panels of 16 rows (kernels.h) while it is loaded, all cores at work: words of 32 bits
 * change places, nothing is computed. */
#include "backend/cpu/parts.h"
#include "base/checked.h"
#include "num/f16.h"
#include "num/fp8.h"
#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct laying {
    const struct cpu_kernels *k;
    struct cpu_weight *w;
    const struct weight_source *src;
    atomic_llong nan_at; /* element + 1 of an FP8 NaN */
    atomic_bool small;   /* an NVFP4 scale is: see `narrow` */
};

static bool is_fp8(enum weight_format f)
{
    return f == WEIGHT_FP8 || f == WEIGHT_FP8_BLOCK;
}

/* Bits of an element as laid out. F16 is widened: it is rare and small. */
static int element_bits(enum weight_format f)
{
    return f == WEIGHT_NVFP4 ? 4 : is_fp8(f) ? 8 : f == WEIGHT_BF16 ? 16 : 32;
}

/* Words of one row. */
static int64_t words_of(enum weight_format f, int64_t cols)
{
    int64_t each = 32 / element_bits(f);
    return (cols + each - 1) / each;
}

/* The rows of a panel, each `bytes` long, as words of lanes. Rows past the end are zero, bytes past a row's
 * end too. */
static void lay_rows(const struct laying *l, uint32_t *out, const uint8_t *first, int64_t rows, int64_t bytes)
{
    const uint8_t *row[PANEL];
    int64_t whole = bytes / 4, words = (bytes + 3) / 4;
    for (int64_t r = 0; r < PANEL; r++) row[r] = first + (r < rows ? r : 0) * bytes;
    l->k->interleave(out, row, PANEL, whole);
    if (whole < words) memset(out + whole * PANEL, 0, PANEL * sizeof *out);
    for (int64_t r = 0; whole < words && r < PANEL; r++)
        memcpy(out + whole * PANEL + r, row[r] + 4 * whole, (size_t)(bytes - 4 * whole));
    for (int64_t r = rows; r < PANEL; r++)
        for (int64_t i = 0; i < words; i++) out[i * PANEL + r] = 0;
}

/* Words of four columns become pairs of columns, quarter by quarter. */
static void pair_columns(uint32_t *words, int64_t n_words)
{
    uint16_t in[8], out[8];
    for (int64_t i = 0; i < n_words; i += 4) {
        memcpy(in, words + i, 16);
        for (int r = 0; r < 4; r++) {
            out[r] = in[2 * r];
            out[4 + r] = in[2 * r + 1];
        }
        memcpy(words + i, out, 16);
    }
}

static bool has_nan(const uint8_t *codes, int64_t n)
{
    unsigned char found = 0;
    for (int64_t i = 0; i < n; i++) found |= (codes[i] & 0x7f) == 0x7f;
    return found;
}

static bool has_sign(const uint8_t *codes, int64_t n)
{
    unsigned char found = 0;
    for (int64_t i = 0; i < n; i++) found |= codes[i];
    return found & 0x80;
}

/* A scale is under 1/8 and not 0. */
static bool has_small(const uint8_t *codes, int64_t n)
{
    unsigned char found = 0;
    for (int64_t i = 0; i < n; i++) found |= (uint8_t)((codes[i] & 0x7f) - 1) < 0x1f;
    return found;
}

/* Where the NaN is: element + 1, by the stored order. `each` columns stand behind a code. */
static void note_nan(struct laying *l, const uint8_t *codes, int64_t first, int64_t rows, int64_t cols,
                     int64_t each)
{
    for (int64_t i = 0; i < rows * cols; i++)
        if ((codes[i] & 0x7f) == 0x7f) {
            atomic_store(&l->nan_at, (first + i / cols) * l->src->cols + i % cols * each + 1);
            return;
        }
}

/* Scales of 4 groups of 16 rows, a word a row, become [group][16]; what is negative turns its codes instead.
 */
static void lay_scales(struct laying *l, int64_t panel, int64_t rows)
{
    int64_t groups = l->src->cols / 16, words = (groups + 3) / 4;
    const uint8_t *stored = (const uint8_t *)l->src->scale + panel * PANEL * groups;
    uint8_t *out = l->w->groups + panel * PANEL * groups, *codes = l->w->data + panel * l->w->panel_bytes;
    if (has_nan(stored, rows * groups)) note_nan(l, stored, panel * PANEL, rows, groups, 16);
    for (int64_t i = 0; i < words; i++)
        for (int64_t g = 4 * i; g < 4 * i + 4 && g < groups; g++)
            for (int64_t r = 0; r < PANEL; r++) out[g * PANEL + r] = r < rows ? stored[r * groups + g] : 0;
    if (has_small(out, groups * PANEL)) atomic_store(&l->small, true);
    if (!has_sign(out, groups * PANEL)) return;
    for (int64_t i = 0; i < groups * PANEL; i++) {
        if (!(out[i] & 0x80)) continue;
        out[i] &= 0x7f;
        for (int b = 0; b < 8; b++) codes[i / PANEL * 128 + b / 4 * 64 + i % PANEL * 4 + b % 4] ^= 0x88;
    }
}

static void lay_f16(const struct laying *l, float *out, const uint8_t *first, int64_t rows)
{
    int64_t cols = l->src->cols;
    for (int64_t c = 0; c < cols; c++)
        for (int64_t r = 0; r < PANEL; r++) {
            uint16_t h = 0;
            if (r < rows) memcpy(&h, first + 2 * (r * cols + c), 2);
            out[c * PANEL + r] = f16_to_f32(h);
        }
}

static void lay_panel(void *ctx, int64_t panel, int thread)
{
    struct laying *l = ctx;
    const struct weight_source *src = l->src;
    (void)thread;
    int64_t left = src->rows - panel * PANEL, rows = left < PANEL ? left : PANEL;
    int64_t bits = src->format == WEIGHT_F16 ? 16 : element_bits(src->format), bytes = src->cols * bits / 8;
    const uint8_t *first = (const uint8_t *)src->data + panel * PANEL * bytes;
    uint32_t *out = (uint32_t *)(void *)(l->w->data + panel * l->w->panel_bytes);
    if (src->format == WEIGHT_F16) {
        lay_f16(l, (float *)out, first, rows);
        return;
    }
    lay_rows(l, out, first, rows, bytes);
    if (is_fp8(src->format)) {
        if (has_nan(first, rows * bytes)) note_nan(l, first, panel * PANEL, rows, bytes, 1);
        pair_columns(out, l->w->panel_bytes / 4);
    }
    if (src->format == WEIGHT_NVFP4) lay_scales(l, panel, rows);
}

/* FP8 scales in w->scale: one a row, or one a block. */
static int64_t n_scales(const struct cpu_weight *w)
{
    if (w->head.format == WEIGHT_FP8) return w->panels * PANEL;
    return w->head.format == WEIGHT_FP8_BLOCK ? fp8_blocks(w->head.rows) * fp8_blocks(w->head.cols) : 0;
}

/* One piece: codes, then scales, each on its own line of the cache. */
static bool take_memory(struct queue *q, struct cpu_weight *w, struct err *e)
{
    const struct weight *h = &w->head;
    uint64_t data = 0, rows = (uint64_t)w->panels * PANEL, widest;
    bool fits = fits_mul(rows, (uint64_t)h->cols, &widest) && fits_mul(widest, 8, &widest);
    if (!fits)
        return err_set(e, ERR_LIMIT, "matrix of %" PRId64 " x %" PRId64 " is too large", h->rows, h->cols);
    w->panel_bytes = words_of(h->format, h->cols) * PANEL * 4;
    data = (uint64_t)w->panels * (uint64_t)w->panel_bytes;
    uint64_t groups = h->format == WEIGHT_NVFP4 ? rows * (uint64_t)h->cols / 16 : 0;
    uint64_t scales = (uint64_t)n_scales(w) * sizeof *w->scale, padded = (groups + 63) & ~(uint64_t)63;
    w->data = slab_take(&q->slab, &w->slab, data + padded + scales + 64);
    if (!w->data) return err_memory(e, "weights", data + padded + scales);
    w->groups = w->data + data;
    w->scale = (float *)(void *)(w->data + data + padded);
    return true;
}

bool cpu_weight_create(struct queue *q, struct weight **out, const struct weight_source *src, struct err *e)
{
    *out = NULL;
    struct cpu_weight *w = calloc(1, sizeof *w);
    if (!w) return err_memory(e, "weight", sizeof *w);
    w->head =
        (struct weight){ src->format, src->rows, src->cols, src->input, src->input_global, src->is_table, 0 };
    w->panels = (src->rows + PANEL - 1) / PANEL;
    w->global = src->global;
    w->table = src->data;
    *out = &w->head;
    if (src->is_table) return true;
    struct laying l = { .k = q->k, .w = w, .src = src };
    bool ok = take_memory(q, w, e);
    if (ok) {
        int64_t n = src->format == WEIGHT_FP8 ? src->rows : n_scales(w);
        if (is_fp8(src->format)) {
            memcpy(w->scale, src->scale, (size_t)n * sizeof *w->scale);
            for (int64_t i = n; i < n_scales(w); i++) w->scale[i] = 0;
        }
        pool_run(q->pool, w->panels, lay_panel, &l);
        w->narrow = src->format == WEIGHT_NVFP4 && !atomic_load(&l.small);
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
    if (!weight) return;
    struct cpu_weight *w = (struct cpu_weight *)weight;
    if (w->slab) slab_give_back(&q->slab, w->slab);
    free(w);
}
