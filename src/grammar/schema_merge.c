/* allOf and $ref are written out: keyword by keyword two schemas become the one that both mean. */
#include "grammar/schema.h"
#include <stdlib.h>
#include <string.h>

enum { NESTING_MAX = 48, STEPS_MAX = 50000, APART_NESTING_MAX = 6 };

bool schema_is_annotation(const char *keyword)
{
    static const char *const words[] = { "title",    "description", "default",  "examples",
                                         "example",  "$schema",     "$comment", "deprecated",
                                         "readOnly", "writeOnly",   "$defs",    "definitions" };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (strcmp(keyword, words[i]) == 0) return true;
    return false;
}

static void put(struct schema *s, json_t *object, const char *key, json_t *value)
{
    if (json_object_set_new_nocheck(object, key, value) != 0)
        rules_fail(s->r, ERR_MEMORY, "no memory for a grammar");
}

static void append(struct schema *s, json_t *list, json_t *value)
{
    if (json_array_append_new(list, value) != 0) rules_fail(s->r, ERR_MEMORY, "no memory for a grammar");
}

static json_t *hold(const json_t *x)
{
    return json_incref((json_t *)x);
}

bool schema_is_equal(const json_t *a, const json_t *b)
{
    if (json_is_number(a) && json_is_number(b))
        return json_is_integer(a) && json_is_integer(b) ? json_integer_value(a) == json_integer_value(b)
                                                        : json_number_value(a) == json_number_value(b);
    if (json_typeof(a) != json_typeof(b)) return false;
    if (json_is_array(a)) {
        if (json_array_size(a) != json_array_size(b)) return false;
        for (size_t i = 0; i < json_array_size(a); i++)
            if (!schema_is_equal(json_array_get(a, i), json_array_get(b, i))) return false;
        return true;
    }
    if (!json_is_object(a)) return json_equal(a, b);
    const char *key;
    json_t *value;
    if (json_object_size(a) != json_object_size(b)) return false;
    json_object_foreach((json_t *)a, key, value)
    {
        const json_t *other = json_object_get(b, key);
        if (!other || !schema_is_equal(value, other)) return false;
    }
    return true;
}

const json_t *schema_resolve(struct schema *s, const char *ref)
{
    const json_t *at = s->root;
    const char *p = ref + 1;
    if (ref[0] != '#' || (*p && *p != '/')) {
        schema_refuse(s, "$ref", "to '%.200s' is not supported: only #/... into this schema is", ref);
        return NULL;
    }
    while (at && *p == '/') {
        char key[512];
        size_t n = 0;
        for (p++; *p && *p != '/' && n < sizeof key - 1; p++) {
            char hex[3] = { p[0], p[0] ? p[1] : 0, 0 };
            if (*p == '~' && (p[1] == '0' || p[1] == '1'))
                key[n++] = *++p == '0' ? '~' : '/';
            else if (*p == '%' && strspn(p + 1, "0123456789abcdefABCDEF") >= 2) {
                memcpy(hex, p + 1, 2);
                key[n++] = (char)strtol(hex, NULL, 16);
                p += 2;
            } else
                key[n++] = *p;
        }
        key[n] = 0;
        if (json_is_array(at)) {
            char *end;
            unsigned long i = strtoul(key, &end, 10);
            at = n && !*end && key[0] != '-' ? json_array_get(at, i) : NULL;
        } else
            at = json_object_get(at, key);
    }
    if (!at) schema_refuse(s, "$ref", "to '%.200s' leads nowhere", ref);
    return at;
}

unsigned schema_type_of(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT: return TYPE_OBJECT;
    case JSON_ARRAY: return TYPE_ARRAY;
    case JSON_STRING: return TYPE_STRING;
    case JSON_INTEGER: return TYPE_INTEGER;
    case JSON_REAL: {
        double v = json_real_value(value);
        return v == (double)(int64_t)(v < 1e18 && v > -1e18 ? v : 0) ? TYPE_INTEGER : TYPE_NUMBER;
    }
    case JSON_NULL: return TYPE_NULL;
    default: return TYPE_BOOLEAN;
    }
}

static unsigned type_bits(struct schema *s, const json_t *name)
{
    static const struct {
        const char *name;
        unsigned bits;
    } types[] = { { "null", TYPE_NULL },
                  { "boolean", TYPE_BOOLEAN },
                  { "integer", TYPE_INTEGER },
                  { "string", TYPE_STRING },
                  { "array", TYPE_ARRAY },
                  { "object", TYPE_OBJECT },
                  { "number", TYPE_NUMBER | TYPE_INTEGER } };
    for (size_t i = 0; json_is_string(name) && i < sizeof types / sizeof *types; i++)
        if (strcmp(json_string_value(name), types[i].name) == 0) return types[i].bits;
    schema_refuse(s, "type",
                  "must be null, boolean, integer, number, string, array or object, or a list of these");
    return 0;
}

unsigned schema_types(struct schema *s, const json_t *schema)
{
    const json_t *type = json_object_get(schema, "type");
    unsigned bits = 0;
    if (!type) return TYPE_ALL;
    for (size_t i = 0; i < json_array_size(type); i++) bits |= type_bits(s, json_array_get(type, i));
    if (!json_is_array(type)) bits = type_bits(s, type);
    return bits | (json_is_true(json_object_get(schema, "nullable")) ? TYPE_NULL : 0);
}

static json_t *type_list(struct schema *s, unsigned bits)
{
    static const char *const names[] = {
        "null", "boolean", "integer", "number", "string", "array", "object"
    };
    json_t *list = json_array();
    if (bits & TYPE_NUMBER) bits &= ~(unsigned)TYPE_INTEGER;
    for (int i = 0; i < 7; i++)
        if (bits >> i & 1) append(s, list, json_string(names[i]));
    return list;
}

static json_t *both(struct schema *s, const json_t *a, const json_t *b)
{
    if (json_is_false(a) || json_is_false(b)) return json_false();
    if (json_is_true(a) || schema_is_equal(a, b)) return hold(b);
    if (json_is_true(b)) return hold(a);
    json_t *x = json_pack("{s:[O,O]}", "allOf", a, b);
    if (!x) rules_fail(s->r, ERR_MEMORY, "no memory for a grammar");
    return x;
}

/* Names that only one side lists must suit the other side's additionalProperties. */
static json_t *merge_properties(struct schema *s, const json_t *a, const json_t *b)
{
    const json_t *sides[] = { a, b };
    json_t *out = json_object(), *value;
    const char *key;
    for (int i = 0; i < 2; i++) json_object_foreach(json_object_get(sides[i], "properties"), key, value)
        {
            const json_t *other = json_object_get(json_object_get(sides[1 - i], "properties"), key);
            if (!other) other = json_object_get(sides[1 - i], "additionalProperties");
            if (!json_object_get(out, key)) put(s, out, key, other ? both(s, value, other) : hold(value));
        }
    return out;
}

static bool contains(const json_t *list, const json_t *x)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (schema_is_equal(json_array_get(list, i), x)) return true;
    return false;
}

static json_t *merge_lists(struct schema *s, const json_t *a, const json_t *b, bool is_union)
{
    json_t *out = json_array();
    for (size_t i = 0; i < json_array_size(a); i++)
        if (is_union || contains(b, json_array_get(a, i))) append(s, out, hold(json_array_get(a, i)));
    for (size_t i = 0; is_union && i < json_array_size(b); i++)
        if (!contains(a, json_array_get(b, i))) append(s, out, hold(json_array_get(b, i)));
    return out;
}

/* Every choice on the left with every one on the right. */
static json_t *merge_choices(struct schema *s, const json_t *a, const json_t *b)
{
    json_t *out = json_array();
    if (json_array_size(a) * json_array_size(b) > 256) {
        schema_refuse(s, "anyOf", "beside others gives more than 256 combinations");
        return out;
    }
    for (size_t i = 0; i < json_array_size(a); i++)
        for (size_t k = 0; k < json_array_size(b); k++)
            append(s, out, both(s, json_array_get(a, i), json_array_get(b, k)));
    return out;
}

static json_t *merge_items(struct schema *s, const json_t *a, const json_t *b)
{
    json_t *out = json_array();
    if (json_array_size(a) != json_array_size(b))
        schema_refuse(s, "allOf", "cannot merge prefixItems of different lengths");
    for (size_t i = 0; i < json_array_size(a) && !s->r->failed; i++)
        append(s, out, both(s, json_array_get(a, i), json_array_get(b, i)));
    return out;
}

static json_t *merge_keyword(struct schema *s, const char *key, const json_t *x, const json_t *y)
{
    static const char *const largest[] = { "minimum", "exclusiveMinimum", "minLength", "minItems",
                                           "minProperties" };
    static const char *const least[] = { "maximum", "exclusiveMaximum", "maxLength", "maxItems",
                                         "maxProperties" };
    for (size_t i = 0; i < 5; i++) {
        bool is_largest = strcmp(key, largest[i]) == 0;
        if ((is_largest || strcmp(key, least[i]) == 0) && json_is_number(x) && json_is_number(y))
            return hold((json_number_value(x) > json_number_value(y)) == is_largest ? x : y);
    }
    if (strcmp(key, "required") == 0) return merge_lists(s, x, y, true);
    if (strcmp(key, "enum") == 0) return merge_lists(s, x, y, false);
    if (strcmp(key, "items") == 0 || strcmp(key, "additionalProperties") == 0 ||
        strcmp(key, "propertyNames") == 0)
        return both(s, x, y);
    if (strcmp(key, "prefixItems") == 0) return merge_items(s, x, y);
    if (strcmp(key, "anyOf") == 0) return merge_choices(s, x, y);
    if (strcmp(key, "uniqueItems") == 0) return hold(json_is_true(x) ? x : y);
    if (strcmp(key, "nullable") == 0) return json_boolean(json_is_true(x) && json_is_true(y));
    schema_refuse(s, "allOf", "cannot merge two different '%.60s'", key);
    return NULL;
}

static bool has(const json_t *schema, const char *key)
{
    return json_object_get(schema, key);
}

/* Keywords whose meaning depends on their neighbours, where each side has some. */
static bool can_merge(struct schema *s, const json_t *a, const json_t *b)
{
    const json_t *sides[] = { a, b };
    for (int i = 0; i < 2; i++) {
        const json_t *x = sides[i], *y = sides[1 - i];
        if (has(x, "prefixItems") && !has(y, "prefixItems") && has(y, "items"))
            return schema_refuse(s, "allOf", "cannot merge prefixItems with items");
        if (has(x, "patternProperties") &&
            (has(y, "properties") || has(y, "additionalProperties") || has(y, "patternProperties")))
            return schema_refuse(s, "allOf", "cannot merge patternProperties");
    }
    return true;
}

json_t *schema_merge(struct schema *s, const json_t *a, const json_t *b)
{
    if (!json_is_object(a) || !json_is_object(b)) return both(s, a, b);
    if (!can_merge(s, a, b)) return NULL;
    json_t *out = json_copy((json_t *)a), *value;
    const char *key;
    if (!out) rules_fail(s->r, ERR_MEMORY, "no memory for a grammar");
    json_object_foreach((json_t *)b, key, value)
    {
        const json_t *have = json_object_get(a, key);
        if (!have)
            put(s, out, key, hold(value));
        else if (!schema_is_annotation(key) && strcmp(key, "properties") != 0 && strcmp(key, "type") != 0 &&
                 strcmp(key, "nullable") != 0 && !schema_is_equal(have, value)) {
            json_t *merged = merge_keyword(s, key, have, value);
            if (!s->r->failed) put(s, out, key, merged);
        }
        if (s->r->failed) break;
    }
    if (has(a, "properties") || has(b, "properties")) put(s, out, "properties", merge_properties(s, a, b));
    if (has(a, "type") && has(b, "type"))
        put(s, out, "type", type_list(s, schema_types(s, a) & schema_types(s, b)));
    if (has(a, "type") || has(b, "type")) {
        bool is_nullable = schema_types(s, a) & schema_types(s, b) & TYPE_NULL;
        json_object_del(out, "nullable");
        if (is_nullable) put(s, out, "nullable", json_true());
    }
    if (!s->r->failed) return out;
    json_decref(out);
    return NULL;
}

static json_t *flatten(struct schema *s, const json_t *schema, int depth)
{
    if (json_is_boolean(schema)) return hold(schema);
    if (!json_is_object(schema)) {
        schema_refuse(s, "schema", "must be an object or a boolean");
        return NULL;
    }
    if (depth > NESTING_MAX || ++s->steps > STEPS_MAX) {
        rules_fail(s->r, ERR_LIMIT, "schema, %s: $ref and allOf lead to each other without end, or too far",
                   s->path);
        return NULL;
    }
    if (has(schema, "$id") && schema != s->root) {
        schema_refuse(s, "$id", "is supported at the root only");
        return NULL;
    }
    const json_t *ref = json_object_get(schema, "$ref"), *all = json_object_get(schema, "allOf");
    json_t *out = json_copy((json_t *)schema);
    if (!out) rules_fail(s->r, ERR_MEMORY, "no memory for a grammar");
    if (ref && !json_is_string(ref)) schema_refuse(s, "$ref", "must be a string");
    if (all && (!json_is_array(all) || json_array_size(all) == 0))
        schema_refuse(s, "allOf", "must be a list");
    json_object_del(out, "$ref");
    json_object_del(out, "allOf");
    for (size_t i = 0; i < json_array_size(all) + (ref ? 1 : 0) && !s->r->failed; i++) {
        const json_t *part =
            i < json_array_size(all) ? json_array_get(all, i) : schema_resolve(s, json_string_value(ref));
        json_t *flat = s->r->failed ? NULL : flatten(s, part, depth + 1);
        json_t *merged = flat ? schema_merge(s, out, flat) : NULL;
        json_decref(flat);
        json_decref(out);
        out = merged;
    }
    if (!s->r->failed) return out;
    json_decref(out);
    return NULL;
}

json_t *schema_flatten(struct schema *s, const json_t *schema)
{
    return s->r->failed ? NULL : flatten(s, schema, 0);
}

/* Types of the values that are written for a schema: of those without `type`, what schema.c infers. */
static bool values_apart(const json_t *a, const json_t *b)
{
    const json_t *const_a = json_object_get(a, "const"), *const_b = json_object_get(b, "const");
    const json_t *enum_a = json_object_get(a, "enum"), *enum_b = json_object_get(b, "enum");
    if (const_a && const_b) return !schema_is_equal(const_a, const_b);
    if (const_a && enum_b) return !contains(enum_b, const_a);
    if (enum_a && const_b) return !contains(enum_a, const_b);
    for (size_t i = 0; i < json_array_size(enum_a); i++)
        if (contains(enum_b, json_array_get(enum_a, i))) return false;
    return enum_a && enum_b;
}

static unsigned value_types(struct schema *s, const json_t *schema)
{
    const json_t *one = json_object_get(schema, "const"), *several = json_object_get(schema, "enum");
    unsigned bits = one ? schema_type_of(one) : several ? 0 : TYPE_ALL;
    for (size_t i = 0; i < json_array_size(several); i++) bits |= schema_type_of(json_array_get(several, i));
    return bits & schema_types(s, schema);
}

static bool requires(const json_t *schema, const char *name)
{
    const json_t *list = json_object_get(schema, "required");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *x = json_string_value(json_array_get(list, i));
        if (x && strcmp(x, name) == 0) return true;
    }
    return false;
}

/* No object written for a is valid for b: b asks for a property that a never has, or forbids one that a
 * always has, or they differ in the values of one that a always has. */
static bool objects_apart(struct schema *s, const json_t *a, const json_t *b, int depth)
{
    const json_t *in_a = json_object_get(a, "properties"), *in_b = json_object_get(b, "properties");
    const json_t *list = json_object_get(b, "required"), *more = json_object_get(a, "additionalProperties");
    bool is_closed = in_a && (!more || json_is_false(more)) && !has(a, "patternProperties");
    for (size_t i = 0; is_closed && i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (name && !json_object_get(in_a, name) && !requires(a, name)) return true;
    }
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)in_a, key, value)
    {
        const json_t *other = json_object_get(in_b, key);
        if (!requires(a, key)) continue;
        if (!other) {
            if (json_is_false(json_object_get(b, "additionalProperties")) && !has(b, "patternProperties"))
                return true;
            continue;
        }
        json_t *x = schema_flatten(s, value), *y = schema_flatten(s, other);
        bool is_apart = x && y && schema_is_apart(s, x, y, depth + 1);
        json_decref(x);
        json_decref(y);
        if (is_apart) return true;
    }
    return false;
}

/* Of a with one of its choices, each. */
static bool choices_apart(struct schema *s, const json_t *a, const char *keyword, const json_t *b, int depth)
{
    const json_t *list = json_object_get(a, keyword);
    bool is_apart = true;
    for (size_t i = 0; i < json_array_size(list) && is_apart; i++) {
        json_t *base = json_copy((json_t *)a);
        json_object_del(base, keyword);
        json_t *choice = schema_flatten(s, json_array_get(list, i));
        json_t *merged = base && choice ? schema_merge(s, base, choice) : NULL;
        is_apart = merged && schema_is_apart(s, merged, b, depth + 1);
        json_decref(base);
        json_decref(choice);
        json_decref(merged);
    }
    return is_apart;
}

bool schema_is_apart(struct schema *s, const json_t *a, const json_t *b, int depth)
{
    if (json_is_false(a) || json_is_false(b)) return true;
    if (!json_is_object(a) || !json_is_object(b) || depth > APART_NESTING_MAX || s->r->failed) return false;
    if (values_apart(a, b)) return true;
    unsigned shared = value_types(s, a) & value_types(s, b);
    if (shared == 0 && has(a, "type") + has(a, "const") + has(a, "enum") &&
        has(b, "type") + has(b, "const") + has(b, "enum"))
        return true;
    static const char *const keywords[] = { "anyOf", "oneOf" };
    for (int i = 0; i < 2; i++) {
        if (has(a, keywords[i])) return choices_apart(s, a, keywords[i], b, depth);
        if (has(b, keywords[i])) return choices_apart(s, b, keywords[i], a, depth);
    }
    if (shared & ~(unsigned)TYPE_OBJECT) return false;
    return objects_apart(s, a, b, depth) && objects_apart(s, b, a, depth);
}
