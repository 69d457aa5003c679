#include "model/bind.h"
#include "base/pages.h"
#include "num/e4m3.h"
#include "checkpoint/linear.h"
#include "num/f16.h"
#include "num/fp8.h"
#include "num/nvfp4.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_MAX_BYTES = 512 };

static bool check_shape(const struct tensor *t, int n_dims, const int64_t *shape, struct err *e)
{
    if (t->n_dims == n_dims && memcmp(t->shape, shape, (size_t)n_dims * sizeof *shape) == 0) return true;
    struct tensor want = { .n_dims = n_dims };
    memcpy(want.shape, shape, (size_t)n_dims * sizeof *shape);
    char expected[128], found[128];
    return err_set(e, ERR_FORMAT, "tensor '%s': expected shape %s from config.json, found %s", t->name,
                   tensor_shape_text(&want, expected, sizeof expected),
                   tensor_shape_text(t, found, sizeof found));
}

static bool missing(const char *name, struct err *e)
{
    return err_set(e, ERR_FORMAT, "tensor '%s' is missing", name);
}

static bool dense_format(enum weight_format *out, const struct tensor *t, struct err *e)
{
    switch (t->dtype) {
    case DTYPE_BF16: *out = WEIGHT_BF16; return true;
    case DTYPE_F16: *out = WEIGHT_F16; return true;
    case DTYPE_F32: *out = WEIGHT_F32; return true;
    default:
        return err_set(e, ERR_FORMAT, "tensor '%s': expected dtype BF16, F16 or F32, found %s", t->name,
                       dtype_name(t->dtype));
    }
}

static float element(const struct tensor *t, int64_t i)
{
    uint16_t half;
    float x;
    if (t->dtype == DTYPE_F32) {
        memcpy(&x, t->data + 4 * i, 4);
        return x;
    }
    memcpy(&half, t->data + 2 * i, 2);
    return t->dtype == DTYPE_BF16 ? bf16_to_f32((bf16){ half }) : f16_to_f32(half);
}

/* Matrices that are made together (bind_later). */
enum { TOGETHER = 96 };
struct later {
    int n;
    struct weight_source src[TOGETHER];
    struct weight **out[TOGETHER];
    const char *name[TOGETHER];
    void *owned[TOGETHER]; /* goes with the source */
};

/* The backend keeps its own copy: the file's pages need not stay. */
static void release(const struct weight_source *src, void *owned)
{
    static const uint64_t bits[] = { [WEIGHT_BF16] = 16, [WEIGHT_F16] = 16,  [WEIGHT_F32] = 32,
                                     [WEIGHT_FP8] = 8,   [WEIGHT_NVFP4] = 4, [WEIGHT_FP8_BLOCK] = 8 };
    if (!src->is_table) pages_release(src->data, (uint64_t)(src->rows * src->cols) * bits[src->format] / 8);
    free(owned);
}

static bool create_all(struct model *m, struct err *e)
{
    struct later *l = m->later;
    struct weight *made[TOGETHER];
    int failed = 0, n = l->n;
    bool ok = n == 0 || m->backend->ops->weights_create(m->backend->queue, made, l->src, n, &failed, e) ||
              err_note(e, "'%s'", l->name[failed]);
    for (int i = 0; i < n; i++) {
        if (ok) *l->out[i] = made[i];
        release(&l->src[i], l->owned[i]);
    }
    l->n = 0;
    return ok;
}

bool bind_later(struct model *m, struct err *e)
{
    m->later = calloc(1, sizeof *m->later);
    return m->later || err_memory(e, "weights", sizeof *m->later);
}

bool bind_now(struct model *m, bool ok, struct err *e)
{
    struct later *l = m->later;
    if (!l) return ok;
    ok = ok && create_all(m, e);
    for (int i = 0; i < l->n; i++) free(l->owned[i]);
    free(l);
    m->later = NULL;
    return ok;
}

static bool is_packed(const struct model *m, const struct weight_source *src)
{
    bool numbers = src->format == WEIGHT_BF16 || src->format == WEIGHT_F16 || src->format == WEIGHT_F32;
    return m->packs && numbers && !src->is_table && src->cols % NVFP4_GROUP == 0;
}

/* owned: malloc'd, what src points to besides the file; NULL: nothing. Taken over. */
static bool create(struct model *m, struct weight **out, const struct weight_source *src, const char *name,
                   void *owned, struct err *e)
{
    bool packs = is_packed(m, src);
    struct later *l = packs || src->is_table ? NULL : m->later;
    if (l) {
        int i = l->n++;
        l->src[i] = *src;
        l->out[i] = out;
        l->name[i] = name;
        l->owned[i] = owned;
        return l->n < TOGETHER || create_all(m, e);
    }
    bool ok = packs ? bind_packed(m, out, src, NULL, src->rows, e)
                    : m->backend->ops->weight_create(m->backend->queue, out, src, e);
    release(src, owned);
    return ok || err_note(e, "'%s'", name);
}

/* The formats of a linear module. */

static bool bind_dense(struct model *m, struct weight **out, const struct tensor *t, int64_t rows,
                       int64_t cols, struct err *e)
{
    struct weight_source src = { .rows = rows, .cols = cols, .data = t->data };
    return check_shape(t, 2, (int64_t[]){ rows, cols }, e) && dense_format(&src.format, t, e) &&
           create(m, out, &src, t->name, NULL, e);
}

static bool is_scale(float x, const struct tensor *t, int64_t i, struct err *e)
{
    return (isfinite(x) && x > 0) ||
           err_set(e, ERR_FORMAT, "tensor '%s': expected scales above 0, found %g at element %" PRId64,
                   t->name, (double)x, i);
}

/* Per row [rows, 1] or [rows], or one for all: [1] or []; per block: as many as there are. */
static bool widen_scales(float *out, const struct linear *l, int64_t n, struct err *e)
{
    const struct tensor *t = l->scale;
    enum weight_format format;
    bool block = l->storage == STORED_FP8_BLOCK, row = linear_scale_is_row(l);
    if (!dense_format(&format, t, e)) return false;
    if (block && !linear_scale_is_block(l))
        return check_shape(t, 2, (int64_t[]){ fp8_blocks(l->rows), fp8_blocks(l->cols) }, e);
    if (!block && !row && !linear_scale_is_single(l)) return check_shape(t, 2, (int64_t[]){ l->rows, 1 }, e);
    for (int64_t i = 0; i < n; i++) {
        out[i] = element(t, block || row ? i : 0);
        if (!is_scale(out[i], t, i, e)) return false;
    }
    return true;
}

static enum weight_input fp8_input(enum scheme s)
{
    switch (s) {
    case SCHEME_FP8_DYNAMIC: return INPUT_FP8_ROW;
    case SCHEME_FP8: return INPUT_FP8_FIXED;
    case SCHEME_FP8_BLOCK: return INPUT_FP8_GROUPS;
    default: return INPUT_AS_IS;
    }
}

static bool bind_fp8(struct model *m, struct weight **out, const char *name, const struct linear *l,
                     enum scheme scheme, float input_scale, struct err *e)
{
    bool block = l->storage == STORED_FP8_BLOCK;
    if (!l->scale)
        return err_set(e, ERR_FORMAT, "tensor '%s' is F8_E4M3 but '%s.weight_scale' is missing",
                       l->codes->name, name);
    if (scheme == SCHEME_FP8 && !isfinite(input_scale))
        return err_set(e, ERR_FORMAT, "tensor '%s.input_scale' is missing: inputs have a measured scale",
                       name);
    int64_t n = block ? fp8_blocks(l->rows) * fp8_blocks(l->cols) : l->rows;
    float *scales = malloc((size_t)n * sizeof *scales + 1);
    if (!scales) return err_memory(e, name, (uint64_t)n * sizeof *scales);
    struct weight_source src = { .format = block ? WEIGHT_FP8_BLOCK : WEIGHT_FP8,
                                 .rows = l->rows,
                                 .cols = l->cols,
                                 .data = l->codes->data,
                                 .scale = scales,
                                 .input = fp8_input(scheme),
                                 .input_global = input_scale };
    if (widen_scales(scales, l, n, e)) return create(m, out, &src, l->codes->name, scales, e);
    free(scales);
    return false;
}

static bool one_float(float *out, const struct tensor *t, struct err *e)
{
    if (t->dtype != DTYPE_F32 || tensor_elements(t) != 1)
        return err_set(e, ERR_FORMAT, "tensor '%s': expected F32 of one element, found %s of %" PRId64,
                       t->name, dtype_name(t->dtype), tensor_elements(t));
    *out = element(t, 0);
    return true;
}

static bool widen_fixed(float *widest, const struct tensor *t, struct err *e)
{
    enum weight_format format;
    if (!dense_format(&format, t, e)) return false;
    if (tensor_elements(t) != 1)
        return err_set(e, ERR_FORMAT, "tensor '%s': expected one element, found %" PRId64, t->name,
                       tensor_elements(t));
    float scale = element(t, 0);
    if (!is_scale(scale, t, 0, e)) return false;
    *widest = isfinite(*widest) ? fmaxf(*widest, scale) : scale;
    return true;
}

bool bind_input_global(const struct model *m, float *widest, const char *name, struct err *e)
{
    struct linear l;
    float scale = 0;
    if (!linear_find(&l, m->checkpoint, name)) return true;
    if (l.storage == STORED_FP8 && l.input && linear_scheme(&l, m->checkpoint, name) == SCHEME_FP8)
        return widen_fixed(widest, l.input, e);
    if (!m->backend->fp4_activations || l.storage != STORED_NVFP4) return true;
    if (!l.input)
        return err_set(e, ERR_FORMAT, "tensor '%s.%s' is missing: FP4 activations need measured input scales",
                       name, l.multiplies ? "input_scale" : "input_global_scale");
    if (!one_float(&scale, l.input, e)) return false;
    if (!isfinite(scale) || scale <= 0)
        return err_set(e, ERR_FORMAT, "tensor '%s': expected a scale above 0 for FP4 activations, found %g",
                       l.input->name, (double)scale);
    *widest = fminf(*widest, l.multiplies ? 1 / scale : scale);
    return true;
}

/* What divides the group scales. Files of older tools hold Inf for a matrix of zeros; then it stands for 1.
 */
static bool global_scale(struct model *m, float *out, const struct linear *l, const char *name, struct err *e)
{
    if (!l->global) return err_set(e, ERR_FORMAT, "tensor '%s.weight_global_scale' is missing", name);
    if (!one_float(out, l->global, e)) return false;
    bool sound = isfinite(*out) && *out > 0;
    if (!sound) report_warn(m->report, "tensor '%s' is %g: taken as 1", l->global->name, (double)*out);
    *out = !sound ? 1 : l->multiplies ? 1 / *out : *out;
    return true;
}

static bool bind_nvfp4(struct model *m, struct weight **out, const char *name, const struct linear *l,
                       float input_global, int64_t rows, int64_t cols, struct err *e)
{
    const struct tensor *scale = l->scale, *t = l->codes;
    if (!scale) return err_set(e, ERR_FORMAT, "tensor '%s.weight_scale' is missing", name);
    if (cols % NVFP4_GROUP != 0)
        return err_set(e, ERR_FORMAT,
                       "tensor '%s': NVFP4 needs columns divisible by 16, config.json gives %" PRId64,
                       t->name, cols);
    if (scale->dtype != DTYPE_F8_E4M3 || t->dtype != DTYPE_U8)
        return err_set(e, ERR_FORMAT, "'%s': expected U8 codes and F8_E4M3 scales, found %s and %s", name,
                       dtype_name(t->dtype), dtype_name(scale->dtype));
    struct weight_source src = { .format = WEIGHT_NVFP4,
                                 .rows = rows,
                                 .cols = cols,
                                 .data = t->data,
                                 .scale = scale->data,
                                 .input = m->backend->fp4_activations ? INPUT_NVFP4 : INPUT_AS_IS,
                                 .input_global = input_global };
    return check_shape(t, 2, (int64_t[]){ rows, cols / 2 }, e) &&
           check_shape(scale, 2, (int64_t[]){ rows, cols / NVFP4_GROUP }, e) &&
           global_scale(m, &src.global, l, name, e) && create(m, out, &src, t->name, NULL, e);
}

static bool check_scheme(const struct linear *l, enum scheme scheme, const char *name, struct err *e)
{
    const char *const found[] = { dtype_name(l->codes->dtype), "weight_packed (NVFP4)", "FP8",
                                  "FP8 in blocks" };
    return linear_agrees(l->storage, scheme) ||
           err_set(e, ERR_FORMAT, "'%s': quantization_config says %s, the file holds %s", name,
                   scheme == SCHEME_NONE ? "not quantized" : scheme_name(scheme), found[l->storage]);
}

bool bind_expert(struct model *m, struct weight **out, const char *name, float input_global, int64_t rows,
                 int64_t cols, struct err *e)
{
    struct linear l;
    if (!linear_find(&l, m->checkpoint, name)) {
        char full[NAME_MAX_BYTES];
        snprintf(full, sizeof full, "%s.weight", name);
        return missing(full, e);
    }
    enum scheme scheme = linear_scheme(&l, m->checkpoint, name);
    if (!check_scheme(&l, scheme, name, e)) return false;
    if (l.storage == STORED_NVFP4) return bind_nvfp4(m, out, name, &l, input_global, rows, cols, e);
    if (l.storage == STORED_PLAIN) return bind_dense(m, out, l.codes, rows, cols, e);
    return check_shape(l.codes, 2, (int64_t[]){ rows, cols }, e) &&
           bind_fp8(m, out, name, &l, scheme, input_global, e);
}

bool bind_linear(struct model *m, struct weight **out, const char *name, int64_t rows, int64_t cols,
                 struct err *e)
{
    float input_global = INFINITY;
    return bind_input_global(m, &input_global, name, e) &&
           bind_expert(m, out, name, input_global, rows, cols, e);
}

bool bind_plain(struct model *m, struct weight **out, const char *name, int64_t rows, int64_t cols,
                struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    return t ? bind_dense(m, out, t, rows, cols, e) : missing(name, e);
}

bool bind_patches(struct model *m, struct weight **out, const char *name, int64_t rows, int channels,
                  int frames, int side, struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    if (!t) return missing(name, e);
    struct weight_source src = { .rows = rows,
                                 .cols = (int64_t)channels * frames * side * side,
                                 .data = t->data };
    return check_shape(t, 5, (int64_t[]){ rows, channels, frames, side, side }, e) &&
           dense_format(&src.format, t, e) && create(m, out, &src, t->name, NULL, e);
}

bool bind_fused(struct model *m, struct weight **out, const char *name, int n_experts, int expert,
                int64_t all_rows, int64_t first, int64_t rows, int64_t cols, struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    if (!t) return missing(name, e);
    struct weight_source src = { .rows = rows, .cols = cols };
    if (!check_shape(t, 3, (int64_t[]){ n_experts, all_rows, cols }, e) || !dense_format(&src.format, t, e))
        return false;
    src.data = t->data + ((int64_t)expert * all_rows + first) * cols * dtype_bytes(t->dtype);
    return create(m, out, &src, t->name, NULL, e);
}

bool bind_table(struct model *m, struct weight **out, const char *name, int64_t rows, int64_t cols,
                struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    if (!t) return missing(name, e);
    struct weight_source src = { .rows = rows, .cols = cols, .data = t->data, .is_table = true };
    return check_shape(t, 2, (int64_t[]){ rows, cols }, e) && dense_format(&src.format, t, e) &&
           create(m, out, &src, name, NULL, e);
}

bool bind_rows_nvfp4(struct model *m, struct weight **out, const char *name, const int32_t *ids, int64_t n,
                     int64_t rows, int64_t cols, struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    struct weight_source src = { .rows = rows, .cols = cols };
    if (!t) return missing(name, e);
    src.data = t->data;
    return check_shape(t, 2, (int64_t[]){ rows, cols }, e) && dense_format(&src.format, t, e) &&
           (bind_packed(m, out, &src, ids, n, e) || err_note(e, "'%s'", name));
}

/* Small tensors. */

static bool upload(struct model *m, float **out, const float *host, int64_t n, const char *name,
                   struct err *e)
{
    struct backend *b = m->backend;
    void *memory;
    if (!b->ops->memory_create(b->queue, &memory, (uint64_t)n * sizeof *host, e))
        return err_note(e, "'%s'", name);
    b->ops->upload(b->queue, memory, host, (uint64_t)n * sizeof *host);
    *out = memory;
    return true;
}

static bool widened(float **host, const struct model *m, const char *name, int64_t n, struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    enum weight_format format;
    *host = NULL;
    if (!t) return missing(name, e);
    if (!dense_format(&format, t, e)) return false;
    if (tensor_elements(t) != n) return check_shape(t, 1, &n, e);
    *host = malloc((size_t)n * sizeof **host + 1);
    if (!*host) return err_memory(e, name, (uint64_t)n * sizeof **host);
    for (int64_t i = 0; i < n; i++) (*host)[i] = element(t, i);
    return true;
}

bool bind_vector(struct model *m, float **out, const char *name, int64_t n, float plus, struct err *e)
{
    float *host;
    if (!widened(&host, m, name, n, e)) return false;
    for (int64_t i = 0; i < n; i++) host[i] += plus;
    bool ok = upload(m, out, host, n, name, e);
    free(host);
    return ok;
}

bool bind_conv(struct model *m, float **out, const char *name, int64_t channels, int kernel, struct err *e)
{
    float *host, *turned = malloc((size_t)(channels * kernel) * sizeof *turned + 1);
    if (!turned) return err_memory(e, name, (uint64_t)(channels * kernel) * sizeof *turned);
    bool ok = widened(&host, m, name, channels * kernel, e);
    if (ok) {
        for (int64_t c = 0; c < channels; c++)
            for (int j = 0; j < kernel; j++) turned[j * channels + c] = host[c * kernel + j];
        ok = upload(m, out, turned, channels * kernel, name, e);
    }
    free(host);
    free(turned);
    return ok;
}

bool bind_host_table(const struct model *m, float **out, const char *name, int64_t rows, int64_t cols,
                     struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    *out = NULL;
    if (!t) return missing(name, e);
    return check_shape(t, 2, (int64_t[]){ rows, cols }, e) && widened(out, m, name, rows * cols, e);
}
