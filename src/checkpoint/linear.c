#include "checkpoint/linear.h"
#include "num/fp8.h"
#include <stdio.h>

enum { NAME_BYTES = 768 };

static const struct tensor *part(const struct checkpoint *c, const char *module, const char *suffix)
{
    char name[NAME_BYTES];
    int n = snprintf(name, sizeof name, "%s%s", module, suffix);
    return n < NAME_BYTES ? checkpoint_find(c, name) : NULL;
}

bool linear_scale_is_block(const struct linear *l)
{
    int64_t rows = fp8_blocks(l->rows), cols = fp8_blocks(l->cols);
    const struct tensor *t = l->scale;
    return (t->n_dims == 2 && t->shape[0] == rows && t->shape[1] == cols) ||
           (t->n_dims == 4 && t->shape[0] == rows && t->shape[1] == 1 && t->shape[2] == cols &&
            t->shape[3] == 1);
}

bool linear_scale_is_row(const struct linear *l)
{
    return l->scale->n_dims >= 1 && l->scale->shape[0] == l->rows && tensor_elements(l->scale) == l->rows;
}

bool linear_scale_is_single(const struct linear *l)
{
    return l->scale->n_dims <= 1 && tensor_elements(l->scale) == 1;
}

/* A matrix of one row and 128 columns at most has one scale either way: then the config decides. */
static bool is_block(const struct linear *l, const struct checkpoint *c, const char *module)
{
    return l->scale && linear_scale_is_block(l) &&
           (!linear_scale_is_row(l) ||
            quantization_scheme(c->quantization, module, "Linear") == SCHEME_FP8_BLOCK);
}

static enum storage storage_of(const struct linear *l, const struct checkpoint *c, const char *module,
                               bool packed, bool inverse)
{
    if (packed || (l->codes->dtype == DTYPE_U8 && l->multiplies)) return STORED_NVFP4;
    if (l->codes->dtype != DTYPE_F8_E4M3) return STORED_PLAIN;
    return inverse || is_block(l, c, module) ? STORED_FP8_BLOCK : STORED_FP8;
}

bool linear_find(struct linear *out, const struct checkpoint *c, const char *module)
{
    const struct tensor *packed = part(c, module, ".weight_packed"), *weight = part(c, module, ".weight");
    const struct tensor *scale = part(c, module, ".weight_scale"),
                        *inverse = part(c, module, ".weight_scale_inv");
    const struct tensor *global = part(c, module, ".weight_global_scale"),
                        *second = part(c, module, ".weight_scale_2");
    *out = (struct linear){ .codes = packed ? packed : weight,
                            .scale = scale ? scale : inverse,
                            .global = global ? global : second,
                            .input = part(c, module, packed ? ".input_global_scale" : ".input_scale"),
                            .multiplies = !global && second,
                            .both = packed && weight };
    if (!out->codes) return false;
    if (out->codes->n_dims == 2) {
        out->rows = out->codes->shape[0];
        out->cols = out->codes->shape[1];
    }
    out->storage = storage_of(out, c, module, packed, !scale && inverse);
    if (out->storage == STORED_NVFP4) out->cols *= 2;
    return true;
}

bool linear_agrees(enum storage s, enum scheme scheme)
{
    switch (scheme) {
    case SCHEME_NVFP4:
    case SCHEME_NVFP4A16: return s == STORED_NVFP4;
    case SCHEME_FP8_DYNAMIC:
    case SCHEME_FP8A16:
    case SCHEME_FP8: return s == STORED_FP8;
    case SCHEME_FP8_BLOCK: return s == STORED_FP8_BLOCK;
    default: return s == STORED_PLAIN;
    }
}

enum scheme linear_scheme(const struct linear *l, const struct checkpoint *c, const char *module)
{
    enum scheme said = quantization_scheme(c->quantization, module, "Linear");
    if (quantization_origin(c->quantization) == QUANTIZATION_COMPRESSED_TENSORS ||
        linear_agrees(l->storage, said))
        return said;
    switch (l->storage) {
    case STORED_NVFP4: return l->input ? SCHEME_NVFP4 : SCHEME_NVFP4A16;
    case STORED_FP8: return l->input ? SCHEME_FP8 : SCHEME_FP8_DYNAMIC;
    case STORED_FP8_BLOCK: return SCHEME_FP8_BLOCK;
    default: return SCHEME_NONE;
    }
}
