/* quantization_config: takes config.json, gives a matcher from module name to scheme. Targets become sorted
 * names and compiled patterns; what other tools than compressed-tensors wrote is first put into its words. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "checkpoint/quantization.h"
#include <inttypes.h>
#include <pcre2.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One match tries at most MATCH_LIMIT positions: patterns in real files need hundreds for a module name, a
 * hostile one stops after milliseconds. */
enum {
    PATTERN_BYTES_MAX = 4096,
    MATCH_LIMIT = 100000,
    HEAP_LIMIT_KIB = 4096,
    PATH_BYTES = 256,
    NAME_BYTES = 640
};

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
    enum quantization_origin origin;
    json_t *document; /* what the texts borrow from */
    struct targets ignore_names, ignore_patterns, names, patterns;
    pcre2_compile_context *compile;
    pcre2_match_context *limits;
    pcre2_match_data *match;
};

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
    if (*out) pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE); /* where that is not possible it is interpreted */
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
    return quantization_group_scheme(&scheme, config, group, path, e) &&
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

static bool is_given(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return v && !json_is_null(v);
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

static bool make_document(struct quantization *q, json_t *config, struct err *e)
{
    if (!json_is_object(config)) return err_set(e, ERR_FORMAT, "quantization_config: expected an object");
    if (!quantization_translate(&q->document, &q->origin, config, e)) return false;
    if (q->origin != QUANTIZATION_COMPRESSED_TENSORS) return true;
    q->document = json_incref(config);
    return check_config(config, e);
}

bool quantization_parse(struct quantization **out, const json_t *root, struct err *e)
{
    json_t *config;
    *out = NULL;
    if (!find_config(&config, root, e)) return false;
    if (!config) return true;
    struct quantization *q = calloc(1, sizeof *q);
    if (!q) return err_memory(e, "quantization_config", sizeof *q);
    if (make_document(q, config, e) && create_contexts(q, e) && add_groups(q, q->document, e) &&
        add_ignore(q, q->document, e)) {
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

static bool matches(const struct quantization *q, const pcre2_code *code, const char *name, size_t bytes)
{
    int n = pcre2_match(code, (PCRE2_SPTR)name, bytes, 0, 0, q->match, q->limits);
    if (n == PCRE2_ERROR_JIT_STACKLIMIT)
        n = pcre2_match(code, (PCRE2_SPTR)name, bytes, 0, PCRE2_NO_JIT, q->match, q->limits);
    return n >= 0;
}

static const struct target *find_pattern(const struct quantization *q, const struct targets *list,
                                         const char *name)
{
    size_t bytes = strlen(name);
    for (size_t i = 0; i < list->n; i++)
        if (matches(q, list->items[i].code, name, bytes)) return &list->items[i];
    return NULL;
}

/* A name of the list that is the module's or, in other tools' lists, a parent's. Those tools name modules
 * with and without the parts in front of "layers". */
static const struct target *find_module(const struct quantization *q, const struct targets *list,
                                        const char *module)
{
    char name[NAME_BYTES];
    if (q->origin == QUANTIZATION_COMPRESSED_TENSORS) return find_name(list, module);
    snprintf(name, sizeof name, "%s", quantization_bare_name(module));
    for (char *end = name; end;) {
        const struct target *t = find_name(list, name);
        if (t) return t;
        end = strrchr(name, '.');
        if (end) *end = 0;
    }
    return NULL;
}

static const struct target *match_module(const struct quantization *q, const struct targets *names,
                                         const struct targets *patterns, const char *module)
{
    const struct target *t = find_module(q, names, module);
    bool bare = q->origin != QUANTIZATION_COMPRESSED_TENSORS;
    return t ? t : find_pattern(q, patterns, bare ? quantization_bare_name(module) : module);
}

bool quantization_ignores(const struct quantization *q, const char *module, const char *class_name)
{
    return q && (find_name(&q->ignore_names, class_name) ||
                 match_module(q, &q->ignore_names, &q->ignore_patterns, module));
}

enum quantization_origin quantization_origin(const struct quantization *q)
{
    return q ? q->origin : QUANTIZATION_COMPRESSED_TENSORS;
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
    const struct target *t = match_module(q, &q->names, &q->patterns, module);
    if (!t) t = find_name(&q->names, class_name);
    return t ? t->scheme : SCHEME_NONE;
}
