#include "grammar/schema.h"
#include "grammar/grammar.h"
#include "grammar/regex.h"
#include "grammar/sets.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SCHEMAS_MAX = 20000, SCHEMA_BYTES_MAX = 1 << 19 };

int32_t schema_refuse(struct schema *s, const char *keyword, const char *format, ...)
{
    char text[600];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    rules_fail(s->r, ERR_ARGUMENT, "schema, %.300s: '%s' %s", s->path, keyword, text);
    return 0;
}

int64_t schema_count(struct schema *s, const json_t *schema, const char *keyword, int64_t otherwise)
{
    const json_t *x = json_object_get(schema, keyword);
    if (!x) return otherwise;
    double v = json_number_value(x);
    if (json_is_number(x) && v >= 0 && v < 0x1p31 && v == (double)(int64_t)v) return (int64_t)v;
    schema_refuse(s, keyword, "must be an integer from 0 to 2147483647");
    return otherwise;
}

void schema_init(struct schema *s, struct rules *r)
{
    *s = (struct schema){ .r = r };
    json_rules(r, &s->j);
}

void schema_deinit(struct schema *s)
{
    for (int64_t i = 0; i < s->n_pending; i++) {
        json_decref(s->pending[i].schema);
        free(s->pending[i].path);
    }
    free(s->pending);
    json_decref(s->known);
    *s = (struct schema){ 0 };
}

void schema_set_root(struct schema *s, const json_t *root, const char *path)
{
    json_decref(s->known);
    s->known = json_object();
    if (!s->known) rules_fail(s->r, ERR_MEMORY, "no memory for a grammar");
    s->root = root;
    s->path = path;
}

static int32_t defer(struct schema *s, const json_t *schema, const char *path, const char *text)
{
    char *copy = strdup(path);
    int32_t rule = rules_declare(s->r, path);
    if (s->n_pending >= SCHEMAS_MAX)
        rules_fail(s->r, ERR_LIMIT, "the schema has more than %d parts", SCHEMAS_MAX);
    else if (!copy || !rules_room(&s->pending, s->n_pending, &s->room, 1, sizeof *s->pending) ||
             json_object_set_new_nocheck(s->known, text, json_integer(rule)) != 0)
        rules_fail(s->r, ERR_MEMORY, "no memory for a grammar");
    if (s->r->failed) {
        free(copy);
        return 0;
    }
    s->pending[s->n_pending++] = (struct pending_schema){
        .schema = json_incref((json_t *)schema), .root = s->root, .path = copy, .rule = rule
    };
    return rule;
}

int32_t schema_expr(struct schema *s, const json_t *schema, const char *format, ...)
{
    if (s->r->failed) return 0;
    char path[600], *text = json_dumps(schema, JSON_COMPACT | JSON_ENCODE_ANY);
    size_t n = (size_t)snprintf(path, sizeof path, "%.400s", s->path);
    va_list args;
    va_start(args, format);
    vsnprintf(path + n, sizeof path - n, format, args);
    va_end(args);
    if (!text) {
        rules_fail(s->r, ERR_LIMIT, "schema, %.300s: nested too deep", path);
        return 0;
    }
    s->steps += (int64_t)strlen(text) / 1024;
    if (strlen(text) > SCHEMA_BYTES_MAX)
        rules_fail(s->r, ERR_LIMIT, "a schema of %zu bytes is over the limit of %d", strlen(text),
                   SCHEMA_BYTES_MAX);
    const json_t *known = json_object_get(s->known, text);
    int32_t rule = known          ? (int32_t)json_integer_value(known)
                   : s->r->failed ? 0
                                  : defer(s, schema, path, text);
    free(text);
    return expr_call(s->r, rule);
}

static bool has(const json_t *schema, const char *key)
{
    return json_object_get(schema, key);
}

static const struct {
    const char *keyword;
    unsigned types; /* that it says something about */
} keywords[] = {
    { "type", 0 },
    { "enum", 0 },
    { "const", 0 },
    { "anyOf", 0 },
    { "oneOf", 0 },
    { "nullable", 0 },
    { "properties", TYPE_OBJECT },
    { "required", TYPE_OBJECT },
    { "additionalProperties", TYPE_OBJECT },
    { "patternProperties", TYPE_OBJECT },
    { "propertyNames", TYPE_OBJECT },
    { "minProperties", TYPE_OBJECT },
    { "maxProperties", TYPE_OBJECT },
    { "items", TYPE_ARRAY },
    { "prefixItems", TYPE_ARRAY },
    { "minItems", TYPE_ARRAY },
    { "maxItems", TYPE_ARRAY },
    { "uniqueItems", TYPE_ARRAY },
    { "minLength", TYPE_STRING },
    { "maxLength", TYPE_STRING },
    { "pattern", TYPE_STRING },
    { "format", TYPE_STRING },
    { "minimum", TYPE_NUMBER | TYPE_INTEGER },
    { "maximum", TYPE_NUMBER | TYPE_INTEGER },
    { "exclusiveMinimum", TYPE_NUMBER | TYPE_INTEGER },
    { "exclusiveMaximum", TYPE_NUMBER | TYPE_INTEGER },
    { "multipleOf", TYPE_NUMBER | TYPE_INTEGER },
};

/* Types that its keywords are about, 0: none; unknown keywords are refused. */
unsigned schema_check_keywords(struct schema *s, const json_t *schema)
{
    const char *key;
    json_t *value;
    unsigned about = 0;
    json_object_foreach((json_t *)schema, key, value)
    {
        size_t i = 0, n = sizeof keywords / sizeof *keywords;
        while (i < n && strcmp(keywords[i].keyword, key) != 0) i++;
        if (i < n)
            about |= keywords[i].types;
        else if (!schema_is_annotation(key) && strcmp(key, "$id") != 0) {
            char name[100];
            snprintf(name, sizeof name, "%s", key);
            schema_refuse(s, name, "is not supported");
        }
    }
    return about;
}

/* Objects. */

struct member {
    const char *name;
    int32_t expr; /* "name": value */
    bool is_required;
};

struct members {
    struct member *items;
    int64_t n, room;
    int32_t extra; /* a member of another name; EXPR_NONE: there are none */
};

static void add_member(struct schema *s, struct members *m, const char *name, const json_t *value,
                       bool is_required)
{
    struct rules *r = s->r;
    if (r->failed) return;
    if (!rules_room(&m->items, m->n, &m->room, 1, sizeof *m->items)) {
        rules_fail(r, ERR_MEMORY, "no memory for a grammar");
        return;
    }
    int32_t key = json_text(r, name, strlen(name)), v = schema_expr(s, value, "/properties/%.200s", name);
    m->items[m->n++] = (struct member){ name, SEQ(r, key, expr_call(r, s->j.colon), v), is_required };
}

static bool is_named(const json_t *list, const char *name)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (strcmp(json_string_value(json_array_get(list, i)), name) == 0) return true;
    return false;
}

static bool check_required(struct schema *s, const json_t *required)
{
    bool ok = !required || json_is_array(required);
    for (size_t i = 0; i < json_array_size(required); i++)
        ok = ok && json_is_string(json_array_get(required, i));
    return ok || schema_refuse(s, "required", "must be a list of strings");
}

/* Whether pattern, as JSON schema means it, matches in name. */
static bool pattern_matches(struct schema *s, const char *pattern, const char *name)
{
    struct rules r;
    struct grammar *g = NULL;
    struct sets sets;
    bool matches = false;
    rules_init(&r, s->r->e);
    int32_t body = regex_expr(&r, pattern, strlen(pattern), CHARS_RAW, true);
    if (!rules_compile(&g, &r, rules_add(&r, "pattern", body)) || !sets_init(&sets, g)) {
        s->r->failed = true;
    } else {
        int32_t at = sets_start(&sets);
        for (; *name && at > 0; name++) at = sets_next(&sets, at, (uint8_t)*name);
        matches = at > 0 && sets.sets[at].accepts;
        if (at == SETS_FAILED) rules_fail(s->r, ERR_LIMIT, "schema, %.300s: a pattern is too large", s->path);
        sets_deinit(&sets);
    }
    grammar_free(g);
    rules_deinit(&r);
    return matches;
}

static int32_t pattern_member(struct schema *s, const json_t *schema, const struct members *m)
{
    struct rules *r = s->r;
    const json_t *patterns = json_object_get(schema, "patternProperties"),
                 *more = json_object_get(schema, "additionalProperties");
    if (!json_is_object(patterns) || json_object_size(patterns) != 1)
        return schema_refuse(s, "patternProperties",
                             "must be an object with one pattern: more may contradict each other");
    if (more && !json_is_false(more))
        return schema_refuse(s, "patternProperties",
                             "is supported with additionalProperties absent or false");
    void *it = json_object_iter((json_t *)patterns);
    const char *pattern = json_object_iter_key(it);
    for (int64_t i = 0; i < m->n && !r->failed; i++)
        if (pattern_matches(s, pattern, m->items[i].name))
            return schema_refuse(s, "patternProperties", "matches the property '%.100s' as well",
                                 m->items[i].name);
    if (r->failed) return 0;
    int32_t quote = expr_text(r, "\""), key = regex_expr(r, pattern, strlen(pattern), CHARS_JSON, true);
    return SEQ(r, quote, key, quote, expr_call(r, s->j.colon),
               schema_expr(s, json_object_iter_value(it), "/patternProperties/%.100s", pattern));
}

static int32_t extra_member(struct schema *s, const json_t *schema, const struct members *m)
{
    struct rules *r = s->r;
    const json_t *more = json_object_get(schema, "additionalProperties"),
                 *names = json_object_get(schema, "propertyNames");
    if (has(schema, "patternProperties")) {
        if (names) return schema_refuse(s, "propertyNames", "beside patternProperties is not supported");
        return pattern_member(s, schema, m);
    }
    if (json_is_false(more) || (!more && has(schema, "properties"))) {
        if (names && m->n) return schema_refuse(s, "propertyNames", "beside properties is not supported");
        return expr_none(r);
    }
    int32_t key;
    if (names) {
        if (m->n) return schema_refuse(s, "propertyNames", "beside properties is not supported");
        json_t *string = json_pack("{s:[{s:s},O]}", "allOf", "type", "string", names);
        if (!string) return (int32_t)rules_fail(r, ERR_MEMORY, "no memory for a grammar");
        key = schema_expr(s, string, "/propertyNames");
        json_decref(string);
    } else {
        const char **known = malloc(((size_t)m->n + 1) * sizeof *known);
        if (!known) return (int32_t)rules_fail(r, ERR_MEMORY, "no memory for a grammar");
        for (int64_t i = 0; i < m->n; i++) known[i] = m->items[i].name;
        key = schema_other_key(s, known, (size_t)m->n);
        free(known);
    }
    int32_t value = more ? schema_expr(s, more, "/additionalProperties") : expr_call(r, s->j.value);
    return SEQ(r, key, expr_call(r, s->j.colon), value);
}

/* The members in order. Two rules for each: what may come when nothing, and when something, stands before. */
static int32_t member_list(struct schema *s, const struct members *m)
{
    struct rules *r = s->r;
    int32_t comma = expr_call(r, s->j.comma), more = SEQ(r, comma, m->extra);
    int32_t after = rules_add(r, "members", expr_repeat(r, more, 0, -1));
    int32_t first = rules_add(r, "members", SEQ(r, m->extra, expr_repeat(r, more, 0, -1)));
    for (int64_t i = m->n - 1; i >= 0 && !r->failed; i--) {
        const struct member *x = &m->items[i];
        int32_t rest = expr_call(r, after), then = SEQ(r, comma, x->expr, rest),
                begin = SEQ(r, x->expr, rest);
        after = rules_add(r, "members", x->is_required ? then : ALT(r, then, rest));
        first = rules_add(r, "members", x->is_required ? begin : ALT(r, begin, expr_call(r, first)));
    }
    return expr_call(r, first);
}

/* minProperties and maxProperties, where they say more than the members do. */
static int32_t counted_members(struct schema *s, const struct members *m, int64_t least, int64_t most,
                               bool *may_be_empty)
{
    struct rules *r = s->r;
    int64_t n_required = 0;
    for (int64_t i = 0; i < m->n; i++) n_required += m->items[i].is_required;
    *may_be_empty = n_required == 0 && least == 0;
    bool is_closed = m->extra == expr_none(r);
    if (most >= 0 && is_closed && most >= m->n) most = -1;
    if (least > 1 && least > n_required)
        return schema_refuse(s, "minProperties",
                             "over 1 is not supported: a grammar cannot tell whether names differ");
    if (most < 0) return member_list(s, m);
    if (m->n > 0) return schema_refuse(s, "maxProperties", "beside properties is not supported");
    if (most == 0) return expr_none(r);
    int32_t more = SEQ(r, expr_call(r, s->j.comma), m->extra);
    return SEQ(r, m->extra, expr_repeat(r, more, 0, most - 1));
}

static int32_t object(struct schema *s, const json_t *schema)
{
    const json_t *properties = json_object_get(schema, "properties"),
                 *required = json_object_get(schema, "required");
    struct members m = { 0 };
    const char *key;
    json_t *value;
    if (properties && !json_is_object(properties)) return schema_refuse(s, "properties", "must be an object");
    if (!check_required(s, required)) return 0;
    int64_t least = schema_count(s, schema, "minProperties", 0),
            most = schema_count(s, schema, "maxProperties", -1);
    json_object_foreach((json_t *)properties, key,
                        value) if (!json_is_false(value) || is_named(required, key))
        add_member(s, &m, key, value, is_named(required, key));
    const json_t *more = json_object_get(schema, "additionalProperties");
    for (size_t i = 0; i < json_array_size(required) && !s->r->failed; i++) {
        const char *name = json_string_value(json_array_get(required, i));
        bool is_known = json_object_get(properties, name);
        for (int64_t k = 0; k < m.n && !is_known; k++) is_known = strcmp(m.items[k].name, name) == 0;
        if (is_known) continue;
        if (has(schema, "patternProperties") || json_is_false(more))
            schema_refuse(s, "required", "names '%.100s', which is not among properties", name);
        json_t *any = json_true();
        add_member(s, &m, name, more ? more : any, true);
    }
    m.extra = s->r->failed ? 0 : extra_member(s, schema, &m);
    bool may_be_empty = false;
    int32_t list = s->r->failed ? 0 : counted_members(s, &m, least, most, &may_be_empty);
    free(m.items);
    return s->r->failed ? 0 : json_brackets(s->r, &s->j, "{", list, "}", may_be_empty);
}

/* Arrays. */

static int32_t array(struct schema *s, const json_t *schema)
{
    struct rules *r = s->r;
    const json_t *prefix = json_object_get(schema, "prefixItems"), *items = json_object_get(schema, "items");
    int64_t least = schema_count(s, schema, "minItems", 0), most = schema_count(s, schema, "maxItems", -1);
    int64_t n = (int64_t)json_array_size(prefix);
    if (has(schema, "uniqueItems") && !json_is_false(json_object_get(schema, "uniqueItems")))
        return schema_refuse(s, "uniqueItems", "is not supported: a grammar cannot compare items");
    if (json_is_array(items)) return schema_refuse(s, "items", "as a list is prefixItems today: write that");
    if (prefix && !json_is_array(prefix)) return schema_refuse(s, "prefixItems", "must be a list");
    if (json_is_false(items) || (prefix && !items)) most = most < 0 || most > n ? n : most;
    if (most >= 0 && least > most) return expr_none(r);
    int32_t comma = expr_call(r, s->j.comma);
    int32_t item = items ? schema_expr(s, items, "/items") : expr_call(r, s->j.value);
    if (most == 0) return expr_text(r, "[]");
    if (n == 0) {
        int32_t rest =
            expr_repeat(r, SEQ(r, comma, item), least > 0 ? least - 1 : 0, most < 0 ? -1 : most - 1);
        return json_brackets(r, &s->j, "[", SEQ(r, item, rest), "]", least == 0);
    }
    if (most >= 0 && n > most) n = most;
    int32_t rest = expr_repeat(r, SEQ(r, comma, item), least > n ? least - n : 0, most < 0 ? -1 : most - n);
    for (int64_t i = n - 1; i > 0 && !r->failed; i--) {
        int32_t rule = rules_add(r, "items", rest);
        int32_t one =
            SEQ(r, comma, schema_expr(s, json_array_get(prefix, (size_t)i), "/prefixItems/%d", (int)i),
                expr_call(r, rule));
        rest = i >= least ? OPTIONAL(r, one) : one;
    }
    int32_t list = SEQ(r, schema_expr(s, json_array_get(prefix, 0), "/prefixItems/0"), rest);
    return json_brackets(r, &s->j, "[", list, "]", least == 0);
}

/* The rest. */

int32_t schema_values(struct schema *s, const json_t *schema, enum chars_form form)
{
    const json_t *one = json_object_get(schema, "const"), *several = json_object_get(schema, "enum");
    const char *key;
    json_t *value;
    if (several && !json_is_array(several)) return schema_refuse(s, "enum", "must be a list");
    json_object_foreach((json_t *)schema, key, value)
    {
        for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
            if (keywords[i].types && strcmp(key, keywords[i].keyword) == 0)
                return schema_refuse(s, key, "beside enum or const is not supported");
    }
    unsigned types = schema_types(s, schema);
    struct expr_list parts = { 0 };
    struct rules *r = s->r;
    size_t n = one ? 1 : json_array_size(several), n_texts = 0;
    char **owned = calloc(n + 1, sizeof *owned);
    struct expr_literal *texts = calloc(n + 1, sizeof *texts);
    if (!owned || !texts) rules_fail(r, ERR_MEMORY, "no memory for a grammar");
    for (size_t i = 0; i < n && !r->failed; i++) {
        const json_t *x = one ? one : json_array_get(several, i);
        bool is_listed = !one || !several;
        for (size_t k = 0; !is_listed && k < json_array_size(several); k++)
            is_listed = schema_is_equal(one, json_array_get(several, k));
        if (!is_listed || !(types & schema_type_of(x))) continue;
        if (!json_is_string(x)) {
            expr_list_add(r, &parts, json_value(r, &s->j, x));
            continue;
        }
        owned[n_texts] = form == CHARS_JSON ? json_dumps(x, JSON_ENCODE_ANY) : strdup(json_string_value(x));
        if (!owned[n_texts])
            rules_fail(r, ERR_MEMORY, "no memory for a grammar");
        else {
            texts[n_texts] = (struct expr_literal){ owned[n_texts], strlen(owned[n_texts]) };
            n_texts++;
        }
    }
    if (n_texts && !r->failed) expr_list_add(r, &parts, expr_literals(r, texts, n_texts));
    for (size_t i = 0; owned && i < n; i++) free(owned[i]);
    free(owned);
    free(texts);
    return expr_list_alt(r, &parts);
}

static int32_t choices(struct schema *s, const json_t *schema, const char *keyword)
{
    const json_t *list = json_object_get(schema, keyword);
    if (!json_is_array(list) || json_array_size(list) == 0)
        return schema_refuse(s, keyword, "must be a list");
    if (has(schema, "anyOf") && has(schema, "oneOf"))
        return schema_refuse(s, "anyOf", "beside oneOf is not supported");
    size_t n = json_array_size(list);
    json_t *base = json_copy((json_t *)schema), **flat = calloc(n, sizeof *flat);
    struct expr_list parts = { 0 };
    bool is_bare = true, is_one = strcmp(keyword, "oneOf") == 0;
    const char *key;
    json_t *value;
    if (!base || !flat) rules_fail(s->r, ERR_MEMORY, "no memory for a grammar");
    json_object_del(base, keyword);
    json_object_foreach((json_t *)schema, key, value)
    {
        if (schema_is_annotation(key) || strcmp(key, "$id") == 0)
            json_object_del(base, key);
        else if (strcmp(key, keyword) != 0)
            is_bare = false;
    }
    for (size_t i = 0; i < n && !s->r->failed; i++) {
        const json_t *x = json_array_get(list, i);
        json_t *whole = is_bare ? json_incref((json_t *)x) : json_pack("{s:[O,O]}", "allOf", base, x);
        expr_list_add(s->r, &parts, schema_expr(s, whole, "/%s/%d", keyword, (int)i));
        if (is_one) flat[i] = schema_flatten(s, whole);
        json_decref(whole);
        for (size_t k = 0; k < i && is_one && !s->r->failed; k++)
            if (!schema_is_apart(s, flat[k], flat[i], 0))
                schema_refuse(s, keyword,
                              "has parts, %zu and %zu, that may allow the same value: use anyOf, or tell "
                              "them apart by type, by a const or by a required property",
                              k, i);
    }
    for (size_t i = 0; flat && i < n; i++) json_decref(flat[i]);
    free(flat);
    json_decref(base);
    return expr_list_alt(s->r, &parts);
}

static int32_t typed(struct schema *s, const json_t *schema, unsigned types)
{
    struct rules *r = s->r;
    struct expr_list parts = { 0 };
    int32_t quote = expr_text(r, "\"");
    if (types & TYPE_OBJECT) expr_list_add(r, &parts, object(s, schema));
    if (types & TYPE_ARRAY) expr_list_add(r, &parts, array(s, schema));
    if (types & TYPE_STRING) {
        int32_t text = schema_string(s, schema, CHARS_JSON);
        expr_list_add(r, &parts, SEQ(r, quote, text, quote));
    }
    if (types & TYPE_INTEGER) expr_list_add(r, &parts, schema_number(s, schema, !(types & TYPE_NUMBER)));
    if (types & TYPE_BOOLEAN) expr_list_add(r, &parts, ALT(r, expr_text(r, "true"), expr_text(r, "false")));
    if (types & TYPE_NULL) expr_list_add(r, &parts, expr_text(r, "null"));
    return expr_list_alt(r, &parts);
}

static int32_t flat_expr(struct schema *s, const json_t *schema)
{
    if (json_is_false(schema)) return expr_none(s->r);
    if (json_is_true(schema)) return expr_call(s->r, s->j.value);
    unsigned about = schema_check_keywords(s, schema), types = schema_types(s, schema);
    if (s->r->failed) return 0;
    if (has(schema, "anyOf")) return choices(s, schema, "anyOf");
    if (has(schema, "oneOf")) return choices(s, schema, "oneOf");
    if (has(schema, "enum") || has(schema, "const")) return schema_values(s, schema, CHARS_JSON);
    if (!has(schema, "type") && about == 0) return expr_call(s->r, s->j.value);
    if (!has(schema, "type")) types = about;
    return typed(s, schema, types);
}

static int32_t expr_of(struct schema *s, const json_t *schema)
{
    const json_t *ref = json_object_get(schema, "$ref");
    const char *key;
    json_t *value;
    bool is_bare = json_is_string(ref);
    json_object_foreach((json_t *)schema, key,
                        value) if (strcmp(key, "$ref") != 0 && !schema_is_annotation(key)) is_bare = false;
    if (is_bare) {
        const json_t *to = schema_resolve(s, json_string_value(ref));
        s->path = json_string_value(ref);
        return to ? schema_expr(s, to, "%s", "") : 0;
    }
    json_t *flat = schema_flatten(s, schema);
    int32_t x = flat ? flat_expr(s, flat) : 0;
    json_decref(flat);
    return x;
}

void schema_finish(struct schema *s)
{
    for (; s->n_done < s->n_pending && !s->r->failed; s->n_done++) {
        struct pending_schema p = s->pending[s->n_done];
        s->root = p.root;
        s->path = p.path;
        rules_define(s->r, p.rule, expr_of(s, p.schema));
    }
}

bool grammar_from_schema(struct grammar **out, const json_t *schema, struct err *e)
{
    struct rules r;
    struct schema s;
    *out = NULL;
    rules_init(&r, e);
    schema_init(&s, &r);
    schema_set_root(&s, schema, "#");
    int32_t start = rules_add(&r, "#", schema_expr(&s, schema, "%s", ""));
    schema_finish(&s);
    bool ok = rules_compile(out, &r, start);
    schema_deinit(&s);
    rules_deinit(&r);
    return ok;
}
