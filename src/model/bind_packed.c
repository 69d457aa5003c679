/* Matrices that a checkpoint stores as numbers, in the nearest NVFP4 codes: for drafts, which need not be
 * exact. */
#include "model/bind.h"
#include "num/f16.h"
#include "num/nvfp4.h"
#include "num/rows.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct packing {
    const struct weight_source *src;
    const struct row_kernels *kernels;
    int64_t row_bytes;
    float *row; /* one, widened */
    uint8_t *codes;
    e4m3 *scales;
};

static const uint8_t *row_at(const struct packing *p, int64_t row)
{
    return (const uint8_t *)p->src->data + row * p->row_bytes;
}

static void widen(const struct packing *p, int64_t row)
{
    const uint8_t *in = row_at(p, row);
    if (p->src->format == WEIGHT_BF16) p->kernels->widen(p->row, in, p->src->cols);
    if (p->src->format == WEIGHT_F32) memcpy(p->row, in, (size_t)p->row_bytes);
    for (int64_t c = 0; p->src->format == WEIGHT_F16 && c < p->src->cols; c++) {
        uint16_t half;
        memcpy(&half, in + 2 * c, 2);
        p->row[c] = f16_to_f32(half);
    }
}

static float largest(const struct packing *p, const int32_t *ids, int64_t n)
{
    float most = 0;
    for (int64_t i = 0; i < n; i++) {
        widen(p, ids ? ids[i] : i);
        for (int64_t c = 0; c < p->src->cols; c++) most = fmaxf(most, fabsf(p->row[c]));
    }
    return most;
}

/* The kernel takes finite BF16 rows and usual scales, the plain function any. */
static void pack(const struct packing *p, const int32_t *ids, int64_t n, float global)
{
    int64_t cols = p->src->cols;
    bool usual = p->src->format == WEIGHT_BF16 && global >= 0x1p-7f && global <= 0x1p40f;
    for (int64_t i = 0; i < n; i++) {
        int64_t row = ids ? ids[i] : i;
        uint8_t *codes = p->codes + i * cols / 2;
        e4m3 *scales = p->scales + i * cols / NVFP4_GROUP;
        double sums[2];
        if (usual && p->kernels->absmax(row_at(p, row), cols) < 0x7f80) {
            p->kernels->nvfp4_nearest(codes, scales, sums, row_at(p, row), global, cols);
        } else {
            widen(p, row);
            nvfp4_pack_row(codes, scales, p->row, global, cols);
        }
    }
}

bool bind_packed(struct model *m, struct weight **out, const struct weight_source *src, const int32_t *ids,
                 int64_t n, struct err *e)
{
    int64_t cols = src->cols;
    struct packing p = { .src = src,
                         .kernels = rows_select(ROWS_BEST),
                         .row_bytes = cols * (src->format == WEIGHT_F32 ? 4 : 2),
                         .row = malloc((size_t)cols * sizeof *p.row),
                         .codes = malloc((size_t)(n * cols / 2)),
                         .scales = malloc((size_t)(n * cols / NVFP4_GROUP)) };
    bool ok = (p.row && p.codes && p.scales) || err_memory(e, "NVFP4 codes", (uint64_t)(n * cols / 2));
    if (ok) {
        struct weight_source packed = { .format = WEIGHT_NVFP4,
                                        .rows = n,
                                        .cols = cols,
                                        .data = p.codes,
                                        .scale = p.scales,
                                        .global = nvfp4_global_scale(largest(&p, ids, n)) };
        pack(&p, ids, n, packed.global);
        ok = m->backend->ops->weight_create(m->backend->queue, out, &packed, e);
    }
    free(p.row);
    free(p.codes);
    free(p.scales);
    return ok;
}
