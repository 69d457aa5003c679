/* What the argument objects of a group ask for: takes "weights", "input_activations" and "format", gives one
 * of the schemes we compute or a sentence on what is not supported. */
#include "checkpoint/quantization.h"
#include "num/fp8.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

enum { PATH_BYTES = 256 };

const char *scheme_name(enum scheme s)
{
    static const char *const names[N_SCHEMES] = { "-",      "NVFP4", "NVFP4A16", "FP8_DYNAMIC",
                                                  "FP8A16", "FP8",   "FP8_BLOCK" };
    return names[s];
}

/* One argument object of compressed-tensors (QuantizationArgs), with its defaults where a field is absent or
 * null. */
struct args {
    const json_t *object;
    const char *path;
    int64_t bits, group_size; /* group_size 0: null */
    int64_t block[2];         /* rows and columns; 0: null */
    const char *type, *strategy, *scale_dtype;
    enum { DYNAMIC_NO, DYNAMIC_YES, DYNAMIC_LOCAL } dynamic;
};

static bool string_or(const char **out, const json_t *object, const char *path, const char *key,
                      struct err *e)
{
    const json_t *v = json_object_get(object, key);
    return !v || json_is_null(v) || doc_string(out, object, path, key, e);
}

static bool read_dynamic(struct args *a, struct err *e)
{
    const json_t *v = json_object_get(a->object, "dynamic");
    if (json_is_string(v) && strcmp(json_string_value(v), "local") == 0) {
        a->dynamic = DYNAMIC_LOCAL;
        return true;
    }
    bool dynamic = false;
    if (v && !json_is_null(v) && !json_is_boolean(v))
        return err_set(e, ERR_FORMAT, "%s.dynamic: expected true, false or \"local\"", a->path);
    if (!doc_bool_or(&dynamic, a->object, a->path, "dynamic", e)) return false;
    a->dynamic = dynamic ? DYNAMIC_YES : DYNAMIC_NO;
    return true;
}

/* Orders that permute columns need a g_idx tensor; "static" and "weight" only change how the weights were
 * found. */
static bool check_actorder(const struct args *a, struct err *e)
{
    const char *order = "static";
    if (!string_or(&order, a->object, a->path, "actorder", e)) return false;
    if (strcmp(order, "static") == 0 || strcmp(order, "weight") == 0) return true;
    return err_set(e, ERR_UNSUPPORTED, "%s.actorder: '%.100s' is not supported", a->path, order);
}

static bool read_block(struct args *a, struct err *e)
{
    const json_t *v = json_object_get(a->object, "block_structure");
    if (!v || json_is_null(v)) return true;
    for (size_t i = 0; i < 2; i++) {
        const json_t *n = json_array_get(v, i);
        if (json_array_size(v) != 2 || !json_is_integer(n) || json_integer_value(n) <= 0)
            return err_set(e, ERR_FORMAT, "%s.block_structure: expected two integers above 0", a->path);
        a->block[i] = json_integer_value(n);
    }
    return true;
}

static bool read_args(struct args *a, const json_t *object, const char *path, struct err *e)
{
    bool symmetric = true;
    *a = (struct args){ .object = object, .path = path, .bits = 8, .type = "int", .strategy = NULL };
    if (!json_is_object(object)) return err_set(e, ERR_FORMAT, "%s: expected an object", path);
    if (!doc_int_or(&a->bits, object, path, "num_bits", 1, 64, e) ||
        !doc_int_or(&a->group_size, object, path, "group_size", -1, INT32_MAX, e) ||
        !string_or(&a->type, object, path, "type", e) ||
        !string_or(&a->strategy, object, path, "strategy", e) ||
        !string_or(&a->scale_dtype, object, path, "scale_dtype", e) || !read_dynamic(a, e) ||
        !read_block(a, e) || !check_actorder(a, e) || !doc_bool_or(&symmetric, object, path, "symmetric", e))
        return false;
    if (!symmetric) return err_set(e, ERR_UNSUPPORTED, "%s.symmetric: false is not supported", path);
    if (!a->strategy) a->strategy = a->group_size > 0 ? "group" : a->group_size < 0 ? "channel" : "tensor";
    return true;
}

static bool is_float(const struct args *a, int64_t bits)
{
    return a->bits == bits && strcmp(a->type, "float") == 0;
}

static bool has_strategy(const struct args *a, const char *strategy)
{
    return strcmp(a->strategy, strategy) == 0;
}

static bool is_nvfp4(const struct args *a)
{
    return is_float(a, 4) && has_strategy(a, "tensor_group") && a->group_size == 16 &&
           (!a->scale_dtype || strcmp(a->scale_dtype, "torch.float8_e4m3fn") == 0);
}

static bool unsupported(const struct args *a, struct err *e)
{
    static const char *const dynamic[] = { "false", "true", "\"local\"" };
    char block[64] = "";
    if (a->block[0])
        snprintf(block, sizeof block, ", blocks of %" PRId64 " x %" PRId64, a->block[0], a->block[1]);
    return err_set(e, ERR_UNSUPPORTED,
                   "%s: %" PRId64 "-bit %.40s, strategy '%.40s', group_size %" PRId64 ", dynamic %s%s%s%.60s"
                   " is not supported",
                   a->path, a->bits, a->type, a->strategy, a->group_size, dynamic[a->dynamic], block,
                   a->scale_dtype ? ", scale_dtype " : "", a->scale_dtype ? a->scale_dtype : "");
}

/* SCHEME_NVFP4A16, SCHEME_FP8A16 or SCHEME_FP8_BLOCK: what the weights alone decide. */
static bool weight_scheme(enum scheme *out, const struct args *w, struct err *e)
{
    bool fp8 = is_float(w, 8) && (has_strategy(w, "channel") || has_strategy(w, "tensor"));
    bool block =
        is_float(w, 8) && has_strategy(w, "block") && w->block[0] == FP8_BLOCK && w->block[1] == FP8_BLOCK;
    if ((!is_nvfp4(w) && !fp8 && !block) || w->dynamic != DYNAMIC_NO || (w->block[0] && !block))
        return unsupported(w, e);
    *out = fp8 ? SCHEME_FP8A16 : block ? SCHEME_FP8_BLOCK : SCHEME_NVFP4A16;
    return true;
}

/* in: NULL when inputs stay as they are. */
static bool with_input(enum scheme *scheme, const struct args *in, const char *path, struct err *e)
{
    enum scheme weights = *scheme;
    if (!in)
        return weights != SCHEME_FP8_BLOCK ||
               err_set(e, ERR_UNSUPPORTED,
                       "%s: null; FP8 weights in blocks are supported with inputs of 8-bit float, strategy "
                       "'group', group_size 128, dynamic true",
                       path);
    if (weights == SCHEME_NVFP4A16 && is_nvfp4(in) && in->dynamic == DYNAMIC_LOCAL) {
        *scheme = SCHEME_NVFP4;
        return true;
    }
    bool fp8 = is_float(in, 8) && !in->scale_dtype;
    if (weights == SCHEME_FP8A16 && fp8 && has_strategy(in, "token") && in->dynamic == DYNAMIC_YES) {
        *scheme = SCHEME_FP8_DYNAMIC;
        return true;
    }
    if (weights == SCHEME_FP8A16 && fp8 && has_strategy(in, "tensor") && in->dynamic == DYNAMIC_NO) {
        *scheme = SCHEME_FP8;
        return true;
    }
    return (weights == SCHEME_FP8_BLOCK && fp8 && has_strategy(in, "group") && in->group_size == FP8_BLOCK &&
            in->dynamic == DYNAMIC_YES) ||
           unsupported(in, e);
}

static bool is_given(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return v && !json_is_null(v);
}

/* The packing of a group, when it or the whole config names one; "mixed-precision" leaves it to the groups.
 */
static bool check_format(const json_t *config, const json_t *group, const char *path, enum scheme scheme,
                         struct err *e)
{
    const char *format = "mixed-precision";
    if (!string_or(&format, config, "quantization_config", "format", e) ||
        !string_or(&format, group, path, "format", e))
        return false;
    if (strcmp(format, "mixed-precision") == 0) return true;
    bool fp4 = scheme == SCHEME_NVFP4 || scheme == SCHEME_NVFP4A16;
    if (fp4 ? strcmp(format, "nvfp4-pack-quantized") == 0
            : strcmp(format, "float-quantized") == 0 || strcmp(format, "naive-quantized") == 0)
        return true;
    return err_set(e, ERR_UNSUPPORTED, "%s.format: '%.100s' is not supported for %s", path, format,
                   scheme_name(scheme));
}

bool quantization_group_scheme(enum scheme *out, const json_t *config, const json_t *group, const char *path,
                               struct err *e)
{
    char weights_path[PATH_BYTES + 24], input_path[PATH_BYTES + 24];
    struct args args;
    snprintf(weights_path, sizeof weights_path, "%s.weights", path);
    snprintf(input_path, sizeof input_path, "%s.input_activations", path);
    if (is_given(group, "output_activations"))
        return err_set(e, ERR_UNSUPPORTED, "%s.output_activations is not supported", path);
    bool has_input = is_given(group, "input_activations");
    if (!read_args(&args, json_object_get(group, "weights"), weights_path, e) ||
        !weight_scheme(out, &args, e) ||
        (has_input && !read_args(&args, json_object_get(group, "input_activations"), input_path, e)) ||
        !with_input(out, has_input ? &args : NULL, input_path, e))
        return false;
    return check_format(config, group, path, *out, e);
}

bool quantization_preset(enum scheme *out, const char *name, struct err *e)
{
    static const enum scheme presets[] = { SCHEME_NVFP4, SCHEME_NVFP4A16, SCHEME_FP8_DYNAMIC, SCHEME_FP8,
                                           SCHEME_FP8_BLOCK };
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++) {
        if (strcasecmp(name, scheme_name(presets[i])) != 0) continue;
        *out = presets[i];
        return true;
    }
    return err_set(
        e, ERR_UNSUPPORTED,
        "preset '%.100s' is not supported, only NVFP4, NVFP4A16, FP8_DYNAMIC, FP8 and FP8_BLOCK are", name);
}
