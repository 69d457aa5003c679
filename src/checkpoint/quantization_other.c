/* ModelOpt's and the official FP8 releases' quantization_config, put into compressed-tensors' words: presets
 * and lists of names. Takes the block as it is, gives one that quantization.c reads like its own. */
#include "checkpoint/quantization.h"
#include "num/fp8.h"
#include "num/nvfp4.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { PATTERN_BYTES = 2048 };
static const char PLACE[] = "quantization_config";

const char *quantization_bare_name(const char *module)
{
    static const char *const parts[] = { "model.", "language_model." };
    for (int i = 0; i < 2;) {
        size_t n = strlen(parts[i]);
        bool here = strncmp(module, parts[i], n) == 0;
        if (here) module += n;
        i = here ? 0 : i + 1;
    }
    return module;
}

/* A shell-style wildcard as a pattern; fnmatch's brackets are not in use. */
static bool wildcard(json_t **out, const char *text, const char *where, struct err *e)
{
    char pattern[PATTERN_BYTES] = "re:";
    size_t n = strlen(pattern);
    if (strpbrk(text, "[]") || 2 * strlen(text) + 8 > sizeof pattern)
        return err_set(e, ERR_UNSUPPORTED, "%s.%s: wildcard '%.100s' is not supported, only * and ? are",
                       PLACE, where, text);
    for (; *text; text++) {
        if (*text == '*') pattern[n++] = '.';
        if (strchr("\\^$.|()+{}", *text)) pattern[n++] = '\\';
        pattern[n++] = *text == '?' ? '.' : *text;
    }
    memcpy(pattern + n, "$", 2);
    *out = json_string(pattern);
    return true;
}

static bool add_name(json_t *list, const char *name, const char *where, struct err *e)
{
    json_t *entry = NULL;
    const char *bare = quantization_bare_name(name);
    if (!*bare) return err_set(e, ERR_FORMAT, "%s.%s: '%.100s' names no module", PLACE, where, name);
    if (strpbrk(bare, "*?[")) {
        if (!wildcard(&entry, bare, where, e)) return false;
    } else if (strncmp(bare, "re:", 3) == 0) {
        return err_set(e, ERR_UNSUPPORTED, "%s.%s: '%.100s': a pattern is not expected here", PLACE, where,
                       name);
    } else {
        entry = json_string(bare);
    }
    return json_array_append_new(list, entry) == 0 || err_memory(e, PLACE, 0);
}

/* config[key], a list of names, appended to out; absent and null are empty. */
static bool add_names(json_t *out, const json_t *config, const char *key, struct err *e)
{
    const json_t *list = json_object_get(config, key);
    if (!list || json_is_null(list)) return true;
    if (!json_is_array(list)) return err_set(e, ERR_FORMAT, "%s.%s: expected a list of names", PLACE, key);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        const char *name = json_string_value(v);
        if (!name || strlen(name) != json_string_length(v))
            return err_set(e, ERR_FORMAT, "%s.%s[%zu]: expected a name", PLACE, key, i);
        if (!add_name(out, name, key, e)) return false;
    }
    return true;
}

/* ModelOpt. */

static bool preset_of(enum scheme *out, const json_t *object, const char *where, struct err *e)
{
    static const struct {
        const char *algorithm;
        enum scheme scheme;
    } known[] = {
        { "NVFP4", SCHEME_NVFP4 },
        { "W4A16_NVFP4", SCHEME_NVFP4A16 },
        { "FP8", SCHEME_FP8 },
        { "FP8_PER_CHANNEL_PER_TOKEN", SCHEME_FP8_DYNAMIC },
        { "FP8_PB_WO", SCHEME_FP8_BLOCK },
    };
    const char *name;
    int64_t group = NVFP4_GROUP;
    if (!doc_string(&name, object, where, "quant_algo", e)) return false;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].algorithm) != 0) continue;
        *out = known[i].scheme;
        if (*out != SCHEME_NVFP4 && *out != SCHEME_NVFP4A16) return true;
        return doc_int_or(&group, object, where, "group_size", 0, INT32_MAX, e) &&
               (group == NVFP4_GROUP ||
                err_set(e, ERR_UNSUPPORTED, "%s.group_size: %" PRId64 " is not supported, NVFP4 has %d",
                        where, group, NVFP4_GROUP));
    }
    return err_set(e, ERR_UNSUPPORTED,
                   "%s.quant_algo: '%.100s' is not supported, only NVFP4, W4A16_NVFP4, FP8, "
                   "FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO and MIXED_PRECISION of them are",
                   where, name);
}

/* {name: {"quant_algo": ...}}: one list per preset. */
static bool add_layers(json_t *groups, const json_t *layers, struct err *e)
{
    const char *name;
    json_t *layer;
    if (!json_is_object(layers))
        return err_set(e, ERR_FORMAT, "%s.quantized_layers: expected an object, as MIXED_PRECISION needs",
                       PLACE);
    json_object_foreach((json_t *)(uintptr_t)layers, name, layer)
    {
        char where[200];
        enum scheme scheme = SCHEME_NONE;
        snprintf(where, sizeof where, "%s.quantized_layers.%.100s", PLACE, name);
        if (!json_is_object(layer)) return err_set(e, ERR_FORMAT, "%s: expected an object", where);
        if (!preset_of(&scheme, layer, where, e)) return false;
        if (!json_object_get(groups, scheme_name(scheme)) &&
            json_object_set_new(groups, scheme_name(scheme), json_array()) != 0)
            return err_memory(e, PLACE, 0);
        if (!add_name(json_object_get(groups, scheme_name(scheme)), name, "quantized_layers", e))
            return false;
    }
    return true;
}

static bool translate_modelopt(json_t *groups, json_t *ignore, const json_t *config, struct err *e)
{
    const json_t *inner = json_object_get(config, "quantization");
    const char *algorithm;
    enum scheme scheme = SCHEME_NONE;
    if (json_is_object(inner)) config = inner;
    if (!doc_string(&algorithm, config, PLACE, "quant_algo", e) ||
        !add_names(ignore, config, "exclude_modules", e) || !add_names(ignore, config, "ignore", e))
        return false;
    if (strcmp(algorithm, "MIXED_PRECISION") == 0)
        return add_layers(groups, json_object_get(config, "quantized_layers"), e);
    return preset_of(&scheme, config, PLACE, e) &&
           (json_object_set_new(groups, scheme_name(scheme), json_pack("[s]", "Linear")) == 0 ||
            err_memory(e, PLACE, 0));
}

/* Block FP8. */

static bool check_text(const json_t *config, const char *key, const char *want, struct err *e)
{
    const char *found;
    return doc_string(&found, config, PLACE, key, e) &&
           (strcmp(found, want) == 0 ||
            err_set(e, ERR_UNSUPPORTED, "%s.%s: '%.100s' is not supported, only '%s' is", PLACE, key, found,
                    want));
}

static bool translate_block_fp8(json_t *groups, json_t *ignore, const json_t *config, struct err *e)
{
    const json_t *block = json_object_get(config, "weight_block_size");
    for (size_t i = 0; i < 2; i++)
        if (json_array_size(block) != 2 || json_integer_value(json_array_get(block, i)) != FP8_BLOCK)
            return err_set(e, ERR_UNSUPPORTED, "%s.weight_block_size: expected [128, 128]", PLACE);
    if (json_object_get(config, "fmt") && !check_text(config, "fmt", "e4m3", e)) return false;
    return check_text(config, "activation_scheme", "dynamic", e) &&
           add_names(ignore, config, "modules_to_not_convert", e) &&
           (json_object_set_new(groups, scheme_name(SCHEME_FP8_BLOCK), json_pack("[s]", "Linear")) == 0 ||
            err_memory(e, PLACE, 0));
}

/* hf_quant_config.json has no quant_method. */
static bool find_origin(enum quantization_origin *out, const json_t *config, struct err *e)
{
    const char *method = "modelopt";
    const json_t *v = json_object_get(config, "quant_method");
    if (!json_is_object(json_object_get(config, "quantization")) || (v && !json_is_null(v)))
        if (!doc_string(&method, config, PLACE, "quant_method", e)) return false;
    if (strcmp(method, "compressed-tensors") == 0)
        *out = QUANTIZATION_COMPRESSED_TENSORS;
    else if (strcmp(method, "modelopt") == 0 || strcmp(method, "modelopt_fp4") == 0 ||
             strcmp(method, "modelopt_mixed") == 0)
        *out = QUANTIZATION_MODELOPT;
    else if (strcmp(method, "fp8") == 0)
        *out = QUANTIZATION_BLOCK_FP8;
    else
        return err_set(
            e, ERR_UNSUPPORTED,
            "%s.quant_method: '%.100s' is not supported, only 'compressed-tensors', 'modelopt' and "
            "'fp8' are",
            PLACE, method);
    return true;
}

bool quantization_translate(json_t **out, enum quantization_origin *origin, const json_t *config,
                            struct err *e)
{
    *out = NULL;
    if (!find_origin(origin, config, e)) return false;
    if (*origin == QUANTIZATION_COMPRESSED_TENSORS) return true;
    json_t *groups = json_object(), *ignore = json_array();
    bool ok = (groups && ignore) || err_memory(e, PLACE, 0);
    ok = ok && (*origin == QUANTIZATION_MODELOPT ? translate_modelopt : translate_block_fp8)(groups, ignore,
                                                                                             config, e);
    if (ok) *out = json_pack("{s:O, s:O}", "config_groups", groups, "ignore", ignore);
    json_decref(groups);
    json_decref(ignore);
    return ok && (*out || err_memory(e, PLACE, 0));
}
