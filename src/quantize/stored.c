/* Reads what names and shapes say; decodes rows through num/. */
#include "quantize/stored.h"
#include "num/f16.h"
#include "num/nvfp4.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 640 };
static const char WEIGHT[] = ".weight", PACKED[] = ".weight_packed";

static bool strip(char out[NAME_BYTES], const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    if (n <= m || n - m >= NAME_BYTES || strcmp(name + n - m, end) != 0) return false;
    memcpy(out, name, n - m);
    out[n - m] = 0;
    return true;
}

static const struct tensor *part(const struct checkpoint *c, const char *module, const char *suffix)
{
    char name[2 * NAME_BYTES];
    snprintf(name, sizeof name, "%s%s", module, suffix);
    return checkpoint_find(c, name);
}

bool stored_is_plain(const struct tensor *t)
{
    return t->dtype == DTYPE_BF16 || t->dtype == DTYPE_F16 || t->dtype == DTYPE_F32;
}

static bool is_one_f32(const struct tensor *t)
{
    return t->dtype == DTYPE_F32 && tensor_elements(t) == 1;
}

static bool has_shape(const struct tensor *t, int64_t rows, int64_t cols)
{
    return t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == cols;
}

/* Why an NVFP4 module cannot be decoded. */
static const char *nvfp4_fault(const struct stored *s)
{
    if (s->codes->dtype != DTYPE_U8 || s->codes->n_dims != 2) return "weight_packed is not a matrix of U8";
    if (!s->scale) return "weight_packed has no weight_scale";
    if (!s->global) return "weight_packed has no weight_global_scale";
    if (s->cols % NVFP4_GROUP != 0) return "the columns of weight_packed are not whole groups of 16";
    if (s->scale->dtype != DTYPE_F8_E4M3 || !has_shape(s->scale, s->rows, s->cols / NVFP4_GROUP))
        return "weight_scale is not F8_E4M3 with one element per 16 columns";
    if (!is_one_f32(s->global)) return "weight_global_scale is not one F32";
    return s->input && !is_one_f32(s->input) ? "input_global_scale is not one F32" : NULL;
}

static bool is_per_row(const struct stored *s)
{
    return s->scale->n_dims >= 1 && s->scale->shape[0] == s->rows && tensor_elements(s->scale) == s->rows;
}

static const char *fp8_fault(const struct stored *s)
{
    if (!s->scale) return "weight is F8_E4M3 and has no weight_scale";
    if (!stored_is_plain(s->scale)) return "weight_scale of an FP8 weight is not BF16, F16 or F32";
    bool single = tensor_elements(s->scale) == 1 && s->scale->n_dims <= 1;
    return single || is_per_row(s) ? NULL : "weight_scale of an FP8 weight is neither one nor one per row";
}

bool stored_get(struct stored *out, const struct checkpoint *c, const char *module)
{
    const struct tensor *packed = part(c, module, PACKED), *weight = part(c, module, WEIGHT);
    *out = (struct stored){ .name = (char *)(uintptr_t)module,
                            .codes = packed ? packed : weight,
                            .scale = part(c, module, ".weight_scale"),
                            .global = part(c, module, ".weight_global_scale"),
                            .input = part(c, module, ".input_global_scale"),
                            .both = packed && weight };
    if (!out->codes || (!packed && weight->n_dims != 2)) return false;
    out->storage = packed ? STORED_NVFP4 : weight->dtype == DTYPE_F8_E4M3 ? STORED_FP8 : STORED_PLAIN;
    if (out->codes->n_dims == 2) {
        out->rows = out->codes->shape[0];
        out->cols = out->codes->shape[1] * (packed ? 2 : 1);
    }
    switch (out->storage) {
    case STORED_NVFP4: out->unsound = nvfp4_fault(out); break;
    case STORED_FP8: out->unsound = fp8_fault(out); break;
    default: out->unsound = stored_is_plain(weight) ? NULL : "weight is not BF16, F16, F32 or F8_E4M3";
    }
    return true;
}

static bool append(struct stored_list *l, const struct stored *s, struct err *e)
{
    if (l->n == l->capacity) {
        size_t capacity = l->capacity ? 2 * l->capacity : 1024;
        struct stored *items = realloc(l->items, capacity * sizeof *items);
        if (!items) return err_memory(e, "module list", capacity * sizeof *items);
        l->items = items;
        l->capacity = capacity;
    }
    l->items[l->n] = *s;
    l->items[l->n].name = strdup(s->name);
    if (!l->items[l->n].name) return err_memory(e, "module list", strlen(s->name));
    l->n++;
    return true;
}

/* A module is added at its packed tensor, or at its plain one when it has no other. */
static bool visit(struct stored_list *l, const struct checkpoint *c, const struct tensor *t, struct err *e)
{
    char module[NAME_BYTES];
    struct stored s;
    bool packed = strip(module, t->name, PACKED);
    if (!packed && !strip(module, t->name, WEIGHT)) return true;
    if (!stored_get(&s, c, module) || (!packed && s.both)) return true;
    if (!module_place(&s.place, module, true) && !packed && s.storage != STORED_FP8) return true;
    s.scheme = quantization_scheme(c->quantization, module, "Linear");
    return append(l, &s, e);
}

bool stored_find(struct stored_list *l, const struct checkpoint *c, struct err *e)
{
    *l = (struct stored_list){ 0 };
    for (size_t i = 0; i < c->n_tensors; i++)
        if (!visit(l, c, c->tensors[i], e)) {
            stored_deinit(l);
            return false;
        }
    return true;
}

void stored_deinit(struct stored_list *l)
{
    for (size_t i = 0; i < l->n; i++) free(l->items[i].name);
    free(l->items);
    *l = (struct stored_list){ 0 };
}

float stored_f32(const struct tensor *t)
{
    float x;
    memcpy(&x, t->data, sizeof x);
    return x;
}

void stored_widen(float *out, const struct tensor *t, int64_t first, int64_t n)
{
    if (t->dtype == DTYPE_F32) {
        memcpy(out, t->data + 4 * first, (size_t)n * 4);
        return;
    }
    const uint8_t *p = t->data + 2 * first;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, p + 2 * i, 2);
        out[i] = t->dtype == DTYPE_BF16 ? bf16_to_f32((bf16){ half }) : f16_to_f32(half);
    }
}

void stored_row(float *out, const struct stored *s, int64_t r)
{
    float scale;
    if (s->storage == STORED_PLAIN) {
        stored_widen(out, s->codes, r * s->cols, s->cols);
        return;
    }
    if (s->storage == STORED_NVFP4) {
        const e4m3 *groups = (const e4m3 *)s->scale->data + r * (s->cols / NVFP4_GROUP);
        nvfp4_unpack_row(out, s->codes->data + r * (s->cols / 2), groups, stored_f32(s->global), s->cols);
        return;
    }
    stored_widen(&scale, s->scale, is_per_row(s) ? r : 0, 1);
    for (int64_t i = 0; i < s->cols; i++)
        out[i] = e4m3_to_f32((e4m3){ s->codes->data[r * s->cols + i] }) * scale;
}
