#include "tokenizer/jinja/value.h"
#include "base/checked.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { CHUNK_BYTES = 64 << 10, DEPTH_MAX = 500 };

struct store_chunk {
    struct store_chunk *next;
    size_t used, size;
    max_align_t data[];
};

void *store_take(struct store *s, size_t count, size_t bytes_each)
{
    uint64_t bytes;
    if (!fits_mul(count, bytes_each, &bytes) || bytes > s->left) return NULL;
    bytes = (bytes + 15) & ~(uint64_t)15;
    if (bytes > s->left) return NULL;
    struct store_chunk *c = s->chunks;
    if (!c || c->size - c->used < bytes) {
        size_t size = bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES;
        c = malloc(sizeof *c + size);
        if (!c) return NULL;
        *c = (struct store_chunk){ .next = s->chunks, .size = size };
        s->chunks = c;
    }
    void *p = (char *)c->data + c->used;
    c->used += bytes;
    s->left -= bytes;
    return p;
}

void store_free(struct store *s)
{
    for (struct store_chunk *c = s->chunks, *next; c; c = next) {
        next = c->next;
        free(c);
    }
    s->chunks = NULL;
}

static bool text_reserve(struct text *t, size_t more)
{
    if (t->full || more > t->limit - t->used) {
        t->full = true;
        return false;
    }
    if (more < t->size - t->used) return true; /* one byte stays for the NUL */
    size_t size = t->size < 1024 ? 1024 : t->size;
    while (size - t->used <= more) size *= 2;
    char *data = realloc(t->data, size);
    if (!data) {
        t->full = true;
        return false;
    }
    t->data = data;
    t->size = size;
    return true;
}

void text_put(struct text *t, struct span s)
{
    if (!text_reserve(t, s.bytes)) return;
    if (s.bytes) memcpy(t->data + t->used, s.at, s.bytes);
    t->used += s.bytes;
}

void text_puts(struct text *t, const char *s)
{
    text_put(t, span_of(s));
}

void run_fail(struct run *r, enum err_code code, const char *format, ...)
{
    if (r->failed) return;
    char what[800];
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    r->failed = true;
    err_set(r->e, code, "line %d: %s", r->line, what);
}

bool run_step(struct run *r, size_t bytes)
{
    size_t cost = 1 + bytes / 64;
    if (r->failed) return false;
    if (r->out.full) {
        run_fail(r, ERR_LIMIT, "the text grows over %zu bytes", r->out.limit);
    } else if (cost > r->steps) {
        run_fail(r, ERR_LIMIT, "the template takes too many steps");
    } else {
        r->steps -= cost;
    }
    return !r->failed;
}

bool run_enter(struct run *r)
{
    if (++r->depth > DEPTH_MAX) run_fail(r, ERR_LIMIT, "nested over %d levels deep", DEPTH_MAX);
    return !r->failed;
}

void run_leave(struct run *r)
{
    r->depth--;
}

void *run_take(struct run *r, size_t count, size_t bytes_each)
{
    void *p = r->failed ? NULL : store_take(&r->store, count, bytes_each);
    if (!p) run_fail(r, ERR_LIMIT, "the template takes too much memory");
    return p;
}

static const struct value undefined = { .kind = VALUE_UNDEFINED };

struct value value_new_list(struct run *r, enum value_kind kind, size_t n)
{
    struct value_list *list = run_take(r, 1, sizeof *list);
    struct value *items = list ? run_take(r, n, sizeof *items) : NULL;
    if (!items) return undefined;
    memset(items, 0, n * sizeof *items);
    *list = (struct value_list){ n, items };
    return (struct value){ .kind = kind, .list = list };
}

struct value value_new_dict(struct run *r, enum value_kind kind)
{
    struct value_dict *dict = run_take(r, 1, sizeof *dict);
    if (!dict) return undefined;
    *dict = (struct value_dict){ 0 };
    return (struct value){ .kind = kind, .dict = dict };
}

const struct value *value_get(const struct value_dict *d, struct span key)
{
    for (size_t i = 0; i < d->n; i++)
        if (span_equal(d->entries[i].key, key)) return &d->entries[i].value;
    return NULL;
}

static void append(struct run *r, struct value_dict *d, struct span key, struct value v)
{
    if (d->n == d->capacity) {
        size_t capacity = d->capacity ? 2 * d->capacity : 8;
        struct value_entry *grown = run_take(r, capacity, sizeof *grown);
        if (!grown) return;
        if (d->n) memcpy(grown, d->entries, d->n * sizeof *grown);
        d->entries = grown;
        d->capacity = capacity;
    }
    d->entries[d->n++] = (struct value_entry){ key, v };
}

void value_set(struct run *r, struct value_dict *d, struct span key, struct value v)
{
    if (!run_step(r, 64 * d->n)) return;
    struct value *known = (struct value *)value_get(d, key);
    if (known)
        *known = v;
    else
        append(r, d, key, v);
}

static struct value list_from_json(struct run *r, const json_t *json)
{
    size_t n = json_array_size(json);
    struct value v = value_new_list(r, VALUE_LIST, n);
    for (size_t i = 0; i < n && !r->failed; i++)
        v.list->items[i] = value_from_json(r, json_array_get(json, i));
    return v;
}

static struct value dict_from_json(struct run *r, const json_t *json)
{
    json_t *o = (json_t *)json; /* iterators are not const-correct */
    struct value v = value_new_dict(r, VALUE_DICT);
    for (void *it = json_object_iter(o); it && !r->failed; it = json_object_iter_next(o, it))
        append(r, v.dict, span_of(json_object_iter_key(it)), value_from_json(r, json_object_iter_value(it)));
    return v;
}

struct value value_from_json(struct run *r, const json_t *json)
{
    struct value v = undefined;
    if (!json || !run_step(r, 0)) return v;
    if (!run_enter(r)) {
        run_leave(r);
        return v;
    }
    switch (json_typeof(json)) {
    case JSON_OBJECT: v = dict_from_json(r, json); break;
    case JSON_ARRAY: v = list_from_json(r, json); break;
    case JSON_STRING:
        v = value_string((struct span){ json_string_value(json), json_string_length(json) });
        break;
    case JSON_INTEGER: v = value_integer(json_integer_value(json)); break;
    case JSON_REAL: v = value_real(json_real_value(json)); break;
    case JSON_TRUE:
    case JSON_FALSE: v = value_bool(json_is_true(json)); break;
    case JSON_NULL: v.kind = VALUE_NONE; break;
    }
    run_leave(r);
    return v;
}

struct value value_copy_text(struct run *r, size_t begin)
{
    if (!run_step(r, 0)) return undefined;
    size_t n = r->out.used - begin;
    char *copy = run_take(r, n, 1);
    if (!copy) return undefined;
    if (n) memcpy(copy, r->out.data + begin, n);
    r->out.used = begin;
    return value_string((struct span){ copy, n });
}

const char *value_type(struct value v)
{
    static const char *const names[] = { [VALUE_UNDEFINED] = "Undefined", [VALUE_NONE] = "NoneType",
                                         [VALUE_BOOL] = "bool",           [VALUE_INT] = "int",
                                         [VALUE_REAL] = "float",          [VALUE_STRING] = "str",
                                         [VALUE_LIST] = "list",           [VALUE_TUPLE] = "tuple",
                                         [VALUE_DICT] = "dict",           [VALUE_LOOP] = "LoopContext",
                                         [VALUE_NAMESPACE] = "Namespace", [VALUE_MACRO] = "Macro" };
    return names[v.kind];
}

struct value value_refuse_undefined(struct run *r, struct value v)
{
    int n = v.string.bytes < 200 ? (int)v.string.bytes : 200;
    const char *name = n ? v.string.at : "";
    if (v.owner == VALUE_ABSENT)
        run_fail(r, ERR_ARGUMENT, "'%.*s' is undefined", n, name);
    else if (v.owner == VALUE_NONE)
        run_fail(r, ERR_ARGUMENT, "'None' has no attribute '%.*s'", n, name);
    else
        run_fail(r, ERR_ARGUMENT, "'%s object' has no attribute '%.*s'",
                 value_type((struct value){ .kind = v.owner }), n, name);
    return undefined;
}

bool value_truth(struct value v)
{
    switch (v.kind) {
    case VALUE_ABSENT:
    case VALUE_UNDEFINED:
    case VALUE_NONE: return false;
    case VALUE_BOOL: return v.truth;
    case VALUE_INT: return v.integer != 0;
    case VALUE_REAL: return v.real != 0;
    case VALUE_STRING: return v.string.bytes > 0;
    case VALUE_LIST:
    case VALUE_TUPLE: return v.list->n > 0;
    case VALUE_DICT: return v.dict->n > 0;
    default: return true;
    }
}

static double as_real(struct value v)
{
    return v.kind == VALUE_REAL ? v.real : v.kind == VALUE_INT ? (double)v.integer : (double)v.truth;
}

static int64_t as_integer(struct value v)
{
    return v.kind == VALUE_INT ? v.integer : v.truth;
}

/* An integer beside a float is compared as a double: exact up to 2^53. */
static int order_numbers(struct value a, struct value b)
{
    if (a.kind != VALUE_REAL && b.kind != VALUE_REAL) {
        int64_t x = as_integer(a), y = as_integer(b);
        return (x > y) - (x < y);
    }
    double x = as_real(a), y = as_real(b);
    return x != x || y != y ? 2 : (x > y) - (x < y);
}

static bool lists_equal(struct run *r, const struct value_list *a, const struct value_list *b)
{
    if (a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++)
        if (!value_equal(r, a->items[i], b->items[i])) return false;
    return true;
}

static bool dicts_equal(struct run *r, const struct value_dict *a, const struct value_dict *b)
{
    if (a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++) {
        if (!run_step(r, 64 * b->n)) return false;
        const struct value *other = value_get(b, a->entries[i].key);
        if (!other || !value_equal(r, a->entries[i].value, *other)) return false;
    }
    return true;
}

static bool same_kind_equal(struct run *r, struct value a, struct value b)
{
    switch (a.kind) {
    case VALUE_STRING: return span_equal(a.string, b.string);
    case VALUE_LIST:
    case VALUE_TUPLE: return lists_equal(r, a.list, b.list);
    case VALUE_DICT: return dicts_equal(r, a.dict, b.dict);
    case VALUE_NAMESPACE: return a.dict == b.dict;
    case VALUE_LOOP: return a.loop == b.loop;
    case VALUE_MACRO: return a.macro == b.macro;
    default: return true;
    }
}

bool value_equal(struct run *r, struct value a, struct value b)
{
    if (!run_step(r, a.kind == VALUE_STRING ? a.string.bytes : 0)) return false;
    if (value_is_number(a) && value_is_number(b)) return order_numbers(a, b) == 0;
    if (a.kind != b.kind) return false;
    bool equal = run_enter(r) && same_kind_equal(r, a, b);
    run_leave(r);
    return equal;
}

int value_order(struct run *r, struct value a, struct value b, const char *operation)
{
    if (a.kind == VALUE_UNDEFINED) value_refuse_undefined(r, a);
    if (b.kind == VALUE_UNDEFINED) value_refuse_undefined(r, b);
    if (value_is_number(a) && value_is_number(b)) return order_numbers(a, b);
    if (a.kind == VALUE_STRING && b.kind == VALUE_STRING) {
        size_t n = a.string.bytes < b.string.bytes ? a.string.bytes : b.string.bytes;
        int order = n ? memcmp(a.string.at, b.string.at, n) : 0;
        if (order) return order < 0 ? -1 : 1;
        return (a.string.bytes > b.string.bytes) - (a.string.bytes < b.string.bytes);
    }
    run_fail(r, ERR_ARGUMENT, "'%s' not supported between instances of '%s' and '%s'", operation,
             value_type(a), value_type(b));
    return 2;
}

static bool list_contains(struct run *r, const struct value_list *list, struct value v)
{
    for (size_t i = 0; i < list->n && !r->failed; i++)
        if (value_equal(r, list->items[i], v)) return true;
    return false;
}

static bool check_hashable(struct run *r, struct value v);

static bool items_hashable(struct run *r, const struct value_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        if (!check_hashable(r, list->items[i])) return false;
    return true;
}

/* What Python's hash() takes: of a tuple, if it takes what the tuple holds. */
static bool check_hashable(struct run *r, struct value v)
{
    if (!run_step(r, 0)) return false;
    if (v.kind == VALUE_LIST || v.kind == VALUE_DICT)
        run_fail(r, ERR_ARGUMENT, "unhashable type: '%s'", value_type(v));
    bool ok = run_enter(r) && !r->failed && (v.kind != VALUE_TUPLE || items_hashable(r, v.list));
    run_leave(r);
    return ok;
}

bool value_contains(struct run *r, struct value container, struct value v)
{
    if (!run_step(r, container.kind == VALUE_STRING ? container.string.bytes : 0)) return false;
    switch (container.kind) {
    case VALUE_UNDEFINED: return false;
    case VALUE_LIST:
    case VALUE_TUPLE: return list_contains(r, container.list, v);
    case VALUE_DICT:
        return check_hashable(r, v) && v.kind == VALUE_STRING && value_get(container.dict, v.string);
    case VALUE_STRING:
        if (v.kind == VALUE_STRING)
            return v.string.bytes == 0 || pystr_find(container.string, v.string, 0) < container.string.bytes;
        run_fail(r, ERR_ARGUMENT, "'in <string>' requires string as left operand, not %s", value_type(v));
        return false;
    default:
        run_fail(r, ERR_ARGUMENT, "argument of type '%s' is not iterable", value_type(container));
        return false;
    }
}

int64_t value_length(struct run *r, struct value v)
{
    if (!run_step(r, v.kind == VALUE_STRING ? v.string.bytes : 0)) return 0;
    switch (v.kind) {
    case VALUE_UNDEFINED: return 0;
    case VALUE_STRING: return (int64_t)pystr_length(v.string);
    case VALUE_LIST:
    case VALUE_TUPLE: return (int64_t)v.list->n;
    case VALUE_DICT: return (int64_t)v.dict->n;
    default: run_fail(r, ERR_ARGUMENT, "object of type '%s' has no len()", value_type(v)); return 0;
    }
}

static struct value characters(struct run *r, struct span s)
{
    if (!run_step(r, s.bytes)) return undefined;
    size_t n = pystr_length(s), at = 0;
    struct value v = value_new_list(r, VALUE_LIST, n);
    for (size_t i = 0; i < n && !r->failed; i++) {
        size_t end = at + 1;
        while (end < s.bytes && (s.at[end] & 0xc0) == 0x80) end++;
        v.list->items[i] = value_string((struct span){ s.at + at, end - at });
        at = end;
    }
    return v;
}

static struct value keys(struct run *r, const struct value_dict *d)
{
    struct value v = value_new_list(r, VALUE_LIST, d->n);
    for (size_t i = 0; i < d->n && !r->failed; i++) v.list->items[i] = value_string(d->entries[i].key);
    return v;
}

struct value value_items(struct run *r, struct value v)
{
    switch (v.kind) {
    case VALUE_UNDEFINED: return value_new_list(r, VALUE_LIST, 0);
    case VALUE_STRING: return characters(r, v.string);
    case VALUE_LIST:
    case VALUE_TUPLE: return v;
    case VALUE_DICT: return keys(r, v.dict);
    default: run_fail(r, ERR_ARGUMENT, "'%s' object is not iterable", value_type(v)); return undefined;
    }
}

static struct value missing(struct value v, struct span name)
{
    return (struct value){ .kind = VALUE_UNDEFINED, .owner = v.kind, .string = name };
}

/* Jinja finds Python's methods before the key of that name; a template that means the key writes v["items"].
 */
static bool is_dict_method(struct span name)
{
    static const char *const names[] = { "items", "keys",  "values", "get",        "pop",     "popitem",
                                         "copy",  "clear", "update", "setdefault", "fromkeys" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (span_is(name, names[i])) return true;
    return false;
}

struct value value_attribute(struct run *r, struct value v, struct span name)
{
    if (v.kind == VALUE_UNDEFINED) return value_refuse_undefined(r, v);
    if (v.kind != VALUE_DICT && v.kind != VALUE_NAMESPACE) return missing(v, name);
    if (!run_step(r, 64 * v.dict->n)) return undefined;
    if (v.kind == VALUE_DICT && is_dict_method(name)) {
        run_fail(r, ERR_ARGUMENT, "'.%.*s' is a method of mappings; for a key of that name write [\"%.*s\"]",
                 (int)name.bytes, name.at, (int)name.bytes, name.at);
        return undefined;
    }
    const struct value *found = value_get(v.dict, name);
    return found ? *found : missing(v, name);
}

static struct value at_index(struct run *r, struct value v, int64_t i)
{
    int64_t n = value_length(r, v);
    if (i < 0) i += n;
    if (r->failed || i < 0 || i >= n) return missing(v, span_of("[index]"));
    if (value_is_list(v)) return v.list->items[i];
    size_t begin = pystr_offset(v.string, (size_t)i), end = pystr_offset(v.string, (size_t)i + 1);
    return value_string((struct span){ v.string.at + begin, end - begin });
}

struct value value_item(struct run *r, struct value v, struct value index)
{
    if (v.kind == VALUE_UNDEFINED) return value_refuse_undefined(r, v);
    bool is_whole = index.kind == VALUE_INT || index.kind == VALUE_BOOL;
    if (is_whole && (value_is_list(v) || v.kind == VALUE_STRING)) return at_index(r, v, as_integer(index));
    if (index.kind != VALUE_STRING) return missing(v, span_of("[index]"));
    if (v.kind != VALUE_DICT) return value_attribute(r, v, index.string);
    if (!run_step(r, 64 * v.dict->n)) return undefined;
    const struct value *found = value_get(v.dict, index.string);
    return found ? *found : missing(v, index.string);
}

/* A bound of a slice as Python takes it: counted from the end when negative, then cut to [low, high]. */
static int64_t slice_bound(struct run *r, struct value v, int64_t otherwise, int64_t n, int64_t low,
                           int64_t high)
{
    if (v.kind == VALUE_NONE || v.kind == VALUE_UNDEFINED) return otherwise;
    if (v.kind != VALUE_INT && v.kind != VALUE_BOOL) {
        run_fail(r, ERR_ARGUMENT, "slice indices must be integers");
        return otherwise;
    }
    int64_t i = as_integer(v);
    if (i < 0) i += n;
    return i < low ? low : i > high ? high : i;
}

static struct value joined(struct run *r, struct value characters_of)
{
    size_t begin = r->out.used;
    for (size_t i = 0; i < characters_of.list->n; i++) text_put(&r->out, characters_of.list->items[i].string);
    return value_copy_text(r, begin);
}

struct value value_slice(struct run *r, struct value v, struct value from, struct value to, struct value step)
{
    if (v.kind == VALUE_UNDEFINED) return value_refuse_undefined(r, v);
    if (!value_is_list(v) && v.kind != VALUE_STRING) {
        run_fail(r, ERR_ARGUMENT, "'%s' object has no slices", value_type(v));
        return undefined;
    }
    struct value all = value_items(r, v);
    if (r->failed) return undefined;
    int64_t n = (int64_t)all.list->n;
    int64_t by = slice_bound(r, step, 1, 0, INT64_MIN, INT64_MAX);
    if (by == 0) run_fail(r, ERR_ARGUMENT, "slice step cannot be zero");
    int64_t low = by < 0 ? -1 : 0, high = by < 0 ? n - 1 : n;
    int64_t begin = slice_bound(r, from, by < 0 ? high : low, n, low, high);
    int64_t end = slice_bound(r, to, by < 0 ? low : high, n, low, high);
    int64_t distance = by < 0 ? begin - end : end - begin;
    uint64_t stride = by < 0 ? 0 - (uint64_t)by : (uint64_t)by;
    size_t count = distance > 0 && stride > 0 ? ((uint64_t)distance - 1) / stride + 1 : 0;
    struct value out =
        r->failed ? undefined : value_new_list(r, value_is_list(v) ? v.kind : VALUE_LIST, count);
    if (!run_step(r, 64 * count)) return undefined;
    for (size_t i = 0; i < count; i++) out.list->items[i] = all.list->items[begin + (int64_t)i * by];
    return value_is_list(v) ? out : joined(r, out);
}
