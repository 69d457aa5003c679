/* quantization_config: takes config.json, gives a matcher from module name to scheme. A group's argument
 * objects are reduced to one of the schemes we compute, or refused; its targets become sorted names and
 * compiled patterns. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "checkpoint/quantization.h"
#include <inttypes.h>
#include <pcre2.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* One match tries at most MATCH_LIMIT positions: patterns in real files need hundreds for a module name, a
 * hostile one stops after milliseconds. */
enum { PATTERN_BYTES_MAX = 4096, MATCH_LIMIT = 100000, HEAP_LIMIT_KIB = 4096, PATH_BYTES = 256 };

struct target {
    const char *text; /* borrow from the document; without "re:" */
    pcre2_code *code; /* NULL: a plain name */
    enum scheme scheme;
};

/* Targets of one kind, sorted by text. */
struct targets {
    struct target *items;
    size_t n, capacity;
};

struct quantization {
    json_t *document; /* what the texts borrow from */
    struct targets ignore_names, ignore_patterns, names, patterns;
    pcre2_compile_context *compile;
    pcre2_match_context *limits;
    pcre2_match_data *match;
};

const char *scheme_name(enum scheme s)
{
    static const char *const names[] = { "-", "NVFP4", "NVFP4A16", "FP8_DYNAMIC", "FP8A16" };
    return names[s];
}

/* One argument object of compressed-tensors (QuantizationArgs), with its defaults where a field is absent or
 * null. */
struct args {
    const json_t *object;
    const char *path;
    int64_t bits, group_size; /* group_size 0: null */
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
        !check_actorder(a, e) || !doc_bool_or(&symmetric, object, path, "symmetric", e))
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
    return err_set(e, ERR_UNSUPPORTED,
                   "%s: %" PRId64 "-bit %.40s, strategy '%.40s', group_size %" PRId64 ", dynamic %s%s%.60s"
                   " is not supported",
                   a->path, a->bits, a->type, a->strategy, a->group_size, dynamic[a->dynamic],
                   a->scale_dtype ? ", scale_dtype " : "", a->scale_dtype ? a->scale_dtype : "");
}

/* SCHEME_NVFP4A16 or SCHEME_FP8A16: what the weights alone decide. */
static bool weight_scheme(enum scheme *out, const struct args *w, struct err *e)
{
    bool fp8 = is_float(w, 8) && (has_strategy(w, "channel") || has_strategy(w, "tensor"));
    if ((!is_nvfp4(w) && !fp8) || w->dynamic != DYNAMIC_NO) return unsupported(w, e);
    *out = fp8 ? SCHEME_FP8A16 : SCHEME_NVFP4A16;
    return true;
}

static bool with_input(enum scheme *scheme, const struct args *in, struct err *e)
{
    if (*scheme == SCHEME_NVFP4A16 && is_nvfp4(in) && in->dynamic == DYNAMIC_LOCAL) {
        *scheme = SCHEME_NVFP4;
        return true;
    }
    if (*scheme == SCHEME_FP8A16 && is_float(in, 8) && has_strategy(in, "token") &&
        in->dynamic == DYNAMIC_YES) {
        *scheme = SCHEME_FP8_DYNAMIC;
        return true;
    }
    return unsupported(in, e);
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

static bool group_scheme(enum scheme *out, const json_t *config, const json_t *group, const char *path,
                         struct err *e)
{
    char weights_path[PATH_BYTES + 24], input_path[PATH_BYTES + 24];
    struct args args;
    snprintf(weights_path, sizeof weights_path, "%s.weights", path);
    snprintf(input_path, sizeof input_path, "%s.input_activations", path);
    if (is_given(group, "output_activations"))
        return err_set(e, ERR_UNSUPPORTED, "%s.output_activations is not supported", path);
    if (!read_args(&args, json_object_get(group, "weights"), weights_path, e) ||
        !weight_scheme(out, &args, e))
        return false;
    if (is_given(group, "input_activations") &&
        (!read_args(&args, json_object_get(group, "input_activations"), input_path, e) ||
         !with_input(out, &args, e)))
        return false;
    return check_format(config, group, path, *out, e);
}

bool quantization_group_scheme(enum scheme *out, const json_t *group, const char *where, struct err *e)
{
    return group_scheme(out, NULL, group, where, e);
}

bool quantization_preset(enum scheme *out, const char *name, struct err *e)
{
    static const enum scheme presets[] = { SCHEME_NVFP4, SCHEME_NVFP4A16, SCHEME_FP8_DYNAMIC };
    for (size_t i = 0; i < sizeof presets / sizeof *presets; i++) {
        if (strcasecmp(name, scheme_name(presets[i])) != 0) continue;
        *out = presets[i];
        return true;
    }
    return err_set(e, ERR_UNSUPPORTED,
                   "preset '%.100s' is not supported, only NVFP4, NVFP4A16 and FP8_DYNAMIC are", name);
}

static bool targets_add(struct targets *list, struct target t, struct err *e)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 16;
        struct target *items = realloc(list->items, capacity * sizeof *items);
        if (!items) {
            pcre2_code_free(t.code);
            return err_memory(e, "quantization targets", capacity * sizeof *items);
        }
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->n++] = t;
    return true;
}

static void targets_free(struct targets *list)
{
    for (size_t i = 0; i < list->n; i++) pcre2_code_free(list->items[i].code);
    free(list->items);
}

static int by_text(const void *a, const void *b)
{
    return strcmp(((const struct target *)a)->text, ((const struct target *)b)->text);
}

/* Sorts; one text may stand in two groups only when both mean the same. */
static bool targets_sort(struct targets *list, struct err *e)
{
    if (list->n) qsort(list->items, list->n, sizeof *list->items, by_text);
    for (size_t i = 1; i < list->n; i++) {
        const struct target *a = &list->items[i - 1], *b = &list->items[i];
        if (strcmp(a->text, b->text) == 0 && a->scheme != b->scheme)
            return err_set(e, ERR_FORMAT, "target '%.100s' is both %s and %s", a->text,
                           scheme_name(a->scheme), scheme_name(b->scheme));
    }
    return true;
}

/* What follows "(?" in Python. */
static bool is_python_group(const char *p)
{
    return (*p && strchr(":=!#>(aimsx-", *p)) || strncmp(p, "<=", 2) == 0 || strncmp(p, "<!", 2) == 0 ||
           strncmp(p, "P<", 2) == 0 || strncmp(p, "P=", 2) == 0;
}

/* The first place where PCRE2 would accept what Python refuses or reads otherwise; NULL: none. Other readers
 * run these patterns in Python, and both must pick the same modules. */
static const char *not_python(const char *p)
{
    const char *first = NULL; /* inside [...]: where a ']' is a plain one */
    for (; *p; p++) {
        unsigned char next = (unsigned char)p[1];
        if (*p == '\\') {
            bool letter = (next >= 'a' && next <= 'z') || (next >= 'A' && next <= 'Z');
            if (letter && !strchr("AbBdDsSwWZafnrtvx", next)) return p;
            if (next) p++;
        } else if (first) {
            if (*p == '[' && next && strchr(":.=", next)) return p;
            if (*p == ']' && p != first) first = NULL;
        } else if (*p == '[') {
            first = p + 1 + (next == '^');
            if (next == '^') p++;
        } else if (*p == '(' && (next == '*' || (next == '?' && !is_python_group(p + 2)))) {
            return p;
        } else if (*p == '{' && next == ',') {
            return p;
        }
    }
    return NULL;
}

static bool compile(pcre2_code **out, const struct quantization *q, const char *pattern, struct err *e)
{
    const char *odd = not_python(pattern);
    if (odd)
        return err_set(e, ERR_FORMAT,
                       "pattern '%.200s': '%.3s' at byte %td has another meaning or none in Python", pattern,
                       odd, odd - pattern);
    int code;
    PCRE2_SIZE at;
    PCRE2_UCHAR why[200];
    *out = pcre2_compile((PCRE2_SPTR)pattern, strlen(pattern),
                         PCRE2_ANCHORED | PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C, &code, &at, q->compile);
    if (*out) return true;
    pcre2_get_error_message(code, why, sizeof why);
    return err_set(e, ERR_FORMAT, "pattern '%.200s': %s at byte %zu", pattern, (const char *)why, at);
}

/* Adds every string of a list as a name or, behind "re:", as a pattern. */
static bool add_list(struct quantization *q, struct targets *names, struct targets *patterns,
                     const json_t *list, enum scheme scheme, const char *path, struct err *e)
{
    if (!json_is_array(list)) return err_set(e, ERR_FORMAT, "%s: expected an array of strings", path);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        const char *text = json_string_value(v);
        if (!text || strlen(text) != json_string_length(v) || !*text)
            return err_set(e, ERR_FORMAT, "%s[%zu]: expected a name or a pattern", path, i);
        struct target t = { .text = text, .scheme = scheme };
        bool pattern = strncmp(text, "re:", 3) == 0;
        if (pattern) t.text += 3;
        if (pattern && !compile(&t.code, q, t.text, e)) return err_note(e, "%s[%zu]", path, i);
        if (!targets_add(pattern ? patterns : names, t, e)) return false;
    }
    return true;
}

/* A group is an object with targets and arguments, or a list of targets whose key is the name of a preset. */
static bool add_group(struct quantization *q, const json_t *config, const char *key, const json_t *group,
                      struct err *e)
{
    char path[PATH_BYTES], targets_path[PATH_BYTES + 16];
    enum scheme scheme = SCHEME_NONE;
    snprintf(path, sizeof path, "quantization_config.config_groups.%.100s", key);
    if (json_is_array(group))
        return (quantization_preset(&scheme, key, e) || err_note(e, "quantization_config.config_groups")) &&
               add_list(q, &q->names, &q->patterns, group, scheme, path, e);
    if (!json_is_object(group)) return err_set(e, ERR_FORMAT, "%s: expected an object or a list", path);
    snprintf(targets_path, sizeof targets_path, "%s.targets", path);
    return group_scheme(&scheme, config, group, path, e) &&
           add_list(q, &q->names, &q->patterns, json_object_get(group, "targets"), scheme, targets_path, e);
}

static bool add_groups(struct quantization *q, const json_t *config, struct err *e)
{
    const json_t *groups = json_object_get(config, "config_groups");
    if (!json_is_object(groups))
        return err_set(e, ERR_FORMAT, "quantization_config.config_groups: expected an object");
    const char *key;
    const json_t *group;
    json_object_foreach((json_t *)(uintptr_t)groups, key, group)
    {
        if (!add_group(q, config, key, group, e)) return false;
    }
    return targets_sort(&q->names, e) && targets_sort(&q->patterns, e);
}

static bool add_ignore(struct quantization *q, const json_t *config, struct err *e)
{
    const json_t *list = json_object_get(config, "ignore");
    if (!list || json_is_null(list)) return true;
    return add_list(q, &q->ignore_names, &q->ignore_patterns, list, SCHEME_NONE, "quantization_config.ignore",
                    e) &&
           targets_sort(&q->ignore_names, e);
}

static bool check_string(const json_t *config, const char *key, const char *value, struct err *e)
{
    const char *found;
    if (!doc_string(&found, config, "quantization_config", key, e)) return false;
    return strcmp(found, value) == 0 ||
           err_set(e, ERR_UNSUPPORTED, "quantization_config.%s: '%.100s' is not supported, only '%s' is", key,
                   found, value);
}

static bool check_empty(const json_t *config, const char *key, struct err *e)
{
    const json_t *v = json_object_get(config, key);
    if (!v || json_is_null(v) || (json_is_object(v) && json_object_size(v) == 0)) return true;
    return err_set(e, ERR_UNSUPPORTED, "quantization_config.%s: only an empty one is supported", key);
}

static bool check_config(const json_t *config, struct err *e)
{
    if (!json_is_object(config)) return err_set(e, ERR_FORMAT, "quantization_config: expected an object");
    if (!check_string(config, "quant_method", "compressed-tensors", e)) return false;
    if (is_given(config, "quantization_status") &&
        !check_string(config, "quantization_status", "compressed", e))
        return false;
    const json_t *cache = json_object_get(config, "kv_cache_scheme");
    if (cache && !json_is_null(cache) && !json_is_object(cache))
        return err_set(e, ERR_FORMAT, "quantization_config.kv_cache_scheme: expected an object or null");
    return check_empty(config, "transform_config", e) && check_empty(config, "sparsity_config", e);
}

static bool create_contexts(struct quantization *q, struct err *e)
{
    q->compile = pcre2_compile_context_create(NULL);
    q->limits = pcre2_match_context_create(NULL);
    q->match = pcre2_match_data_create(1, NULL);
    if (!q->compile || !q->limits || !q->match) return err_memory(e, "pattern matcher", 0);
    pcre2_set_max_pattern_length(q->compile, PATTERN_BYTES_MAX);
    pcre2_set_match_limit(q->limits, MATCH_LIMIT);
    pcre2_set_heap_limit(q->limits, HEAP_LIMIT_KIB);
    return true;
}

/* The block stands beside text_config, or inside it after some converters; NULL when there is none. */
static bool find_config(json_t **out, const json_t *root, struct err *e)
{
    json_t *top = json_object_get(root, "quantization_config");
    json_t *text = json_object_get(json_object_get(root, "text_config"), "quantization_config");
    if (json_is_null(top)) top = NULL;
    if (json_is_null(text)) text = NULL;
    *out = top ? top : text;
    return !top || !text || json_equal(top, text) ||
           err_set(e, ERR_FORMAT, "quantization_config: differs from the one in text_config");
}

bool quantization_parse(struct quantization **out, const json_t *root, struct err *e)
{
    json_t *config;
    *out = NULL;
    if (!find_config(&config, root, e)) return false;
    if (!config) return true;
    struct quantization *q = calloc(1, sizeof *q);
    if (!q) return err_memory(e, "quantization_config", sizeof *q);
    q->document = json_incref(config);
    if (check_config(config, e) && create_contexts(q, e) && add_groups(q, config, e) &&
        add_ignore(q, config, e)) {
        *out = q;
        return true;
    }
    quantization_free(q);
    return false;
}

void quantization_free(struct quantization *q)
{
    if (!q) return;
    targets_free(&q->ignore_names);
    targets_free(&q->ignore_patterns);
    targets_free(&q->names);
    targets_free(&q->patterns);
    pcre2_match_data_free(q->match);
    pcre2_match_context_free(q->limits);
    pcre2_compile_context_free(q->compile);
    json_decref(q->document);
    free(q);
}

static const struct target *find_name(const struct targets *list, const char *name)
{
    struct target key = { .text = name };
    return list->n ? bsearch(&key, list->items, list->n, sizeof *list->items, by_text) : NULL;
}

static const struct target *find_pattern(const struct quantization *q, const struct targets *list,
                                         const char *name)
{
    size_t bytes = strlen(name);
    for (size_t i = 0; i < list->n; i++)
        if (pcre2_match(list->items[i].code, (PCRE2_SPTR)name, bytes, 0, 0, q->match, q->limits) >= 0)
            return &list->items[i];
    return NULL;
}

bool quantization_ignores(const struct quantization *q, const char *module, const char *class_name)
{
    return q && (find_name(&q->ignore_names, module) || find_name(&q->ignore_names, class_name) ||
                 find_pattern(q, &q->ignore_patterns, module));
}

bool quantization_agrees(const struct quantization *q, const char *module)
{
    const struct target *t = q ? find_name(&q->names, module) : NULL;
    enum scheme found = t ? t->scheme : SCHEME_NONE;
    for (size_t i = 0; q && i < q->patterns.n; i++) {
        struct targets one = { &q->patterns.items[i], 1, 1 };
        if (!find_pattern(q, &one, module)) continue;
        if (found != SCHEME_NONE && found != one.items->scheme) return false;
        found = one.items->scheme;
    }
    return true;
}

enum scheme quantization_scheme(const struct quantization *q, const char *module, const char *class_name)
{
    if (!q || quantization_ignores(q, module, class_name)) return SCHEME_NONE;
    const struct target *t = find_name(&q->names, module);
    if (!t) t = find_pattern(q, &q->patterns, module);
    if (!t) t = find_name(&q->names, class_name);
    return t ? t->scheme : SCHEME_NONE;
}
