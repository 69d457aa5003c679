#include "model/bind.h"
#include "num/e4m3.h"
#include "num/f16.h"
#include "num/nvfp4.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_MAX_BYTES = 512 };

static const struct tensor *find(const struct model *m, const char *module, const char *suffix)
{
    char name[NAME_MAX_BYTES];
    snprintf(name, sizeof name, "%s%s", module, suffix);
    return checkpoint_find(m->checkpoint, name);
}

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

static bool create(struct model *m, struct weight **out, const struct weight_source *src, const char *name,
                   struct err *e)
{
    return m->backend->ops->weight_create(m->backend->queue, out, src, e) || err_note(e, "'%s'", name);
}

/* The formats of a linear module. */

static bool bind_dense(struct model *m, struct weight **out, const struct tensor *t, int64_t rows,
                       int64_t cols, struct err *e)
{
    struct weight_source src = { .rows = rows, .cols = cols, .data = t->data };
    return check_shape(t, 2, (int64_t[]){ rows, cols }, e) && dense_format(&src.format, t, e) &&
           create(m, out, &src, t->name, e);
}

/* Per row [rows, 1] or [rows], or one for all: [1] or []. */
static bool row_scales(float *out, const struct tensor *t, int64_t rows, struct err *e)
{
    enum weight_format format;
    int64_t n = tensor_elements(t);
    if (!dense_format(&format, t, e)) return false;
    bool per_row = n == rows && t->n_dims >= 1 && t->shape[0] == rows, single = n == 1 && t->n_dims <= 1;
    if (!per_row && !single) return check_shape(t, 2, (int64_t[]){ rows, 1 }, e);
    for (int64_t r = 0; r < rows; r++) {
        out[r] = element(t, per_row ? r : 0);
        if (!isfinite(out[r]) || out[r] <= 0)
            return err_set(e, ERR_FORMAT, "tensor '%s': expected scales above 0, found %g at row %" PRId64,
                           t->name, (double)out[r], r);
    }
    return true;
}

static bool bind_fp8(struct model *m, struct weight **out, const char *name, const struct tensor *t,
                     enum weight_input input, int64_t rows, int64_t cols, struct err *e)
{
    const struct tensor *scale = find(m, name, ".weight_scale");
    if (!scale)
        return err_set(e, ERR_FORMAT, "tensor '%s' is F8_E4M3 but '%s.weight_scale' is missing", t->name,
                       name);
    if (!check_shape(t, 2, (int64_t[]){ rows, cols }, e)) return false;
    float *scales = malloc((size_t)rows * sizeof *scales + 1);
    if (!scales) return err_memory(e, name, (uint64_t)rows * sizeof *scales);
    struct weight_source src = {
        .format = WEIGHT_FP8, .rows = rows, .cols = cols, .data = t->data, .scale = scales, .input = input
    };
    bool ok = row_scales(scales, scale, rows, e) && create(m, out, &src, t->name, e);
    free(scales);
    return ok;
}

static bool one_float(float *out, const struct tensor *t, struct err *e)
{
    if (t->dtype != DTYPE_F32 || tensor_elements(t) != 1)
        return err_set(e, ERR_FORMAT, "tensor '%s': expected F32 of one element, found %s of %" PRId64,
                       t->name, dtype_name(t->dtype), tensor_elements(t));
    *out = element(t, 0);
    return true;
}

bool bind_input_global(const struct model *m, float *least, const char *name, struct err *e)
{
    float scale;
    if (!m->backend->fp4_activations || !find(m, name, ".weight_packed")) return true;
    const struct tensor *t = find(m, name, ".input_global_scale");
    if (!t)
        return err_set(e, ERR_FORMAT,
                       "tensor '%s.input_global_scale' is missing: FP4 activations need measured input scales",
                       name);
    if (!one_float(&scale, t, e)) return false;
    if (!isfinite(scale) || scale <= 0)
        return err_set(e, ERR_FORMAT, "tensor '%s': expected a scale above 0 for FP4 activations, found %g",
                       t->name, (double)scale);
    *least = fminf(*least, scale);
    return true;
}

/* What divides the group scales. Files of older tools hold Inf for a matrix of zeros; then it stands for 1.
 */
static bool global_scale(struct model *m, float *out, const char *name, struct err *e)
{
    const struct tensor *t = find(m, name, ".weight_global_scale");
    if (!t) return err_set(e, ERR_FORMAT, "tensor '%s.weight_global_scale' is missing", name);
    if (!one_float(out, t, e)) return false;
    if (isfinite(*out) && *out > 0) return true;
    report_warn(m->report, "tensor '%s' is %g: taken as 1", t->name, (double)*out);
    *out = 1;
    return true;
}

static bool bind_nvfp4(struct model *m, struct weight **out, const char *name, const struct tensor *t,
                       float input_global, int64_t rows, int64_t cols, struct err *e)
{
    const struct tensor *scale = find(m, name, ".weight_scale");
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
           global_scale(m, &src.global, name, e) && create(m, out, &src, t->name, e);
}

static bool scheme_disagrees(const char *name, enum scheme scheme, const char *found, struct err *e)
{
    return err_set(e, ERR_FORMAT, "'%s': quantization_config says %s, the file holds %s", name,
                   scheme == SCHEME_NONE ? "not quantized" : scheme_name(scheme), found);
}

bool bind_expert(struct model *m, struct weight **out, const char *name, float input_global, int64_t rows,
                 int64_t cols, struct err *e)
{
    enum scheme scheme = quantization_scheme(m->checkpoint->quantization, name, "Linear");
    const struct tensor *packed = find(m, name, ".weight_packed"), *plain = find(m, name, ".weight");
    if (packed) {
        if (scheme != SCHEME_NVFP4 && scheme != SCHEME_NVFP4A16)
            return scheme_disagrees(name, scheme, "weight_packed (NVFP4)", e);
        return bind_nvfp4(m, out, name, packed, input_global, rows, cols, e);
    }
    if (!plain) {
        char full[NAME_MAX_BYTES];
        snprintf(full, sizeof full, "%s.weight", name);
        return missing(full, e);
    }
    if (plain->dtype == DTYPE_F8_E4M3) {
        if (scheme != SCHEME_FP8_DYNAMIC && scheme != SCHEME_FP8A16)
            return scheme_disagrees(name, scheme, "FP8", e);
        return bind_fp8(m, out, name, plain, scheme == SCHEME_FP8_DYNAMIC ? INPUT_FP8_ROW : INPUT_AS_IS, rows,
                        cols, e);
    }
    if (scheme != SCHEME_NONE) return scheme_disagrees(name, scheme, dtype_name(plain->dtype), e);
    return bind_dense(m, out, plain, rows, cols, e);
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

bool bind_fused(struct model *m, struct weight **out, const char *name, int n_experts, int expert,
                int64_t all_rows, int64_t first, int64_t rows, int64_t cols, struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    if (!t) return missing(name, e);
    struct weight_source src = { .rows = rows, .cols = cols };
    if (!check_shape(t, 3, (int64_t[]){ n_experts, all_rows, cols }, e) || !dense_format(&src.format, t, e))
        return false;
    src.data = t->data + ((int64_t)expert * all_rows + first) * cols * dtype_bytes(t->dtype);
    return create(m, out, &src, t->name, e);
}

bool bind_table(struct model *m, struct weight **out, const char *name, int64_t rows, int64_t cols,
                struct err *e)
{
    const struct tensor *t = checkpoint_find(m->checkpoint, name);
    if (!t) return missing(name, e);
    struct weight_source src = { .rows = rows, .cols = cols, .data = t->data, .is_table = true };
    return check_shape(t, 2, (int64_t[]){ rows, cols }, e) && dense_format(&src.format, t, e) &&
           create(m, out, &src, name, e);
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
