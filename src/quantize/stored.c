/* Reads what names and shapes say; decodes rows through num/. */
#include "quantize/stored.h"
#include "num/f16.h"
#include "num/fp8.h"
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
static const char *nvfp4_fault(const struct linear *l)
{
    if (l->codes->dtype != DTYPE_U8 || l->codes->n_dims != 2) return "weight_packed is not a matrix of U8";
    if (!l->scale) return "weight_packed has no weight_scale";
    if (!l->global) return "weight_packed has no weight_global_scale";
    if (l->cols % NVFP4_GROUP != 0) return "the columns of weight_packed are not whole groups of 16";
    if (l->scale->dtype != DTYPE_F8_E4M3 || !has_shape(l->scale, l->rows, l->cols / NVFP4_GROUP))
        return "weight_scale is not F8_E4M3 with one element per 16 columns";
    if (!is_one_f32(l->global))
        return l->multiplies ? "weight_scale_2 is not one F32" : "weight_global_scale is not one F32";
    if (!l->input || is_one_f32(l->input)) return NULL;
    return l->multiplies ? "input_scale is not one F32" : "input_global_scale is not one F32";
}

static const char *fp8_fault(const struct linear *l)
{
    if (!l->scale) return "weight is F8_E4M3 and has no weight_scale";
    if (!stored_is_plain(l->scale)) return "weight_scale of an FP8 weight is not BF16, F16 or F32";
    if (l->storage == STORED_FP8_BLOCK)
        return linear_scale_is_block(l) ? NULL : "weight_scale_inv has not one element per 128 x 128 weights";
    if (l->input && (!stored_is_plain(l->input) || tensor_elements(l->input) != 1))
        return "input_scale is not one BF16, F16 or F32";
    if (linear_scale_is_single(l) || linear_scale_is_row(l)) return NULL;
    return "weight_scale of an FP8 weight is neither one, nor one per row, nor one per 128 x 128";
}

bool stored_get(struct stored *out, const struct checkpoint *c, const char *module)
{
    *out = (struct stored){ .name = (char *)(uintptr_t)module };
    struct linear *l = &out->part;
    if (!linear_find(l, c, module) || (l->storage == STORED_PLAIN && l->codes->n_dims != 2)) return false;
    out->scheme = linear_scheme(l, c, module);
    switch (l->storage) {
    case STORED_NVFP4: out->unsound = nvfp4_fault(l); break;
    case STORED_FP8:
    case STORED_FP8_BLOCK: out->unsound = l->codes->n_dims == 2 ? fp8_fault(l) : "weight is no matrix"; break;
    default: out->unsound = stored_is_plain(l->codes) ? NULL : "weight is not BF16, F16, F32 or F8_E4M3";
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
    if (!stored_get(&s, c, module) || (!packed && s.part.both)) return true;
    if (!module_place(&s.place, module, true) && s.part.storage == STORED_PLAIN) return true;
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

float stored_one(const struct tensor *t)
{
    float x;
    stored_widen(&x, t, 0, 1);
    return x;
}

float stored_global(const struct stored *s)
{
    float x = stored_one(s->part.global);
    return s->part.multiplies ? 1 / x : x;
}

static void fp8_row(float *out, const struct linear *l, int64_t r)
{
    const uint8_t *codes = l->codes->data + r * l->cols;
    bool block = l->storage == STORED_FP8_BLOCK;
    int64_t step = block ? FP8_BLOCK : l->cols, at = linear_scale_is_row(l) && !block ? r : 0;
    if (block) at = r / FP8_BLOCK * fp8_blocks(l->cols);
    for (int64_t c = 0; c < l->cols; c += step, at++) {
        float scale;
        stored_widen(&scale, l->scale, at, 1);
        for (int64_t i = c; i < c + step && i < l->cols; i++)
            out[i] = e4m3_to_f32((e4m3){ codes[i] }) * scale;
    }
}

void stored_row(float *out, const struct stored *s, int64_t r)
{
    const struct linear *l = &s->part;
    if (l->storage == STORED_PLAIN) {
        stored_widen(out, l->codes, r * l->cols, l->cols);
    } else if (l->storage == STORED_NVFP4) {
        const e4m3 *groups = (const e4m3 *)l->scale->data + r * (l->cols / NVFP4_GROUP);
        nvfp4_unpack_row(out, l->codes->data + r * (l->cols / 2), groups, stored_global(s), l->cols);
    } else {
        fp8_row(out, l, r);
    }
}
