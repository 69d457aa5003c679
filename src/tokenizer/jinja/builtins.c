#include "tokenizer/jinja/builtins.h"
#include <math.h>
#include <stdlib.h>

static const struct value undefined = { .kind = VALUE_UNDEFINED };

int builtins_find(const struct builtin *table, struct span name)
{
    for (int i = 0; table[i].name; i++)
        if (span_is(name, table[i].name)) return i;
    return -1;
}

int builtins_parameters(const struct builtin *b)
{
    int n = 0;
    while (n < BUILTIN_PARAMETERS && b->parameters[n]) n++;
    return n;
}

int builtins_parameter(const struct builtin *b, struct span name)
{
    for (int i = 0; i < builtins_parameters(b); i++)
        if (span_is(name, b->parameters[i])) return i;
    return -1;
}

/* An argument that is a string, or was left out (at NULL then). */
static struct span string_argument(struct run *r, struct value v)
{
    if (v.kind == VALUE_STRING) return v.string.at ? v.string : span_of("");
    if (v.kind != VALUE_ABSENT && v.kind != VALUE_NONE)
        run_fail(r, ERR_ARGUMENT, "expected a string, found %s", value_type(v));
    return (struct span){ NULL, 0 };
}

/* The value that a method of strings is called on. */
static struct span self_string(struct run *r, struct value v)
{
    if (v.kind == VALUE_STRING) {
        run_step(r, v.string.bytes);
        return v.string;
    }
    if (v.kind == VALUE_UNDEFINED)
        value_refuse_undefined(r, v);
    else
        run_fail(r, ERR_ARGUMENT, "this method is one of strings, not of '%s'", value_type(v));
    return span_of("");
}

static struct span needed_string(struct run *r, struct value v)
{
    struct span s = string_argument(r, v);
    if (!s.at) run_fail(r, ERR_ARGUMENT, "expected a string, found %s", value_type(v));
    return s.at ? s : span_of("");
}

static int64_t integer_argument(struct run *r, struct value v, int64_t otherwise)
{
    if (v.kind == VALUE_ABSENT || v.kind == VALUE_NONE) return otherwise;
    if (v.kind == VALUE_INT) return v.integer;
    run_fail(r, ERR_ARGUMENT, "expected an integer, found %s", value_type(v));
    return otherwise;
}

/* Strings. */

static struct value strip_ends(struct run *r, struct span s, struct value chars, unsigned ends)
{
    struct span which = string_argument(r, chars);
    run_step(r, s.bytes * (1 + which.bytes / 16));
    return value_string(pystr_strip(s, which, ends));
}

static struct value method_strip(struct run *r, struct value v, const struct value *args)
{
    return strip_ends(r, self_string(r, v), args[0], PYSTR_LEFT | PYSTR_RIGHT);
}

static struct value method_lstrip(struct run *r, struct value v, const struct value *args)
{
    return strip_ends(r, self_string(r, v), args[0], PYSTR_LEFT);
}

static struct value method_rstrip(struct run *r, struct value v, const struct value *args)
{
    return strip_ends(r, self_string(r, v), args[0], PYSTR_RIGHT);
}

static struct value filter_trim(struct run *r, struct value v, const struct value *args)
{
    return strip_ends(r, value_text(r, v).string, args[0], PYSTR_LEFT | PYSTR_RIGHT);
}

/* what: a string, or a tuple of which any will do. */
static struct value has_end(struct run *r, struct value v, struct value what,
                            bool (*has)(struct span s, struct span what))
{
    struct span s = self_string(r, v);
    if (what.kind != VALUE_TUPLE) return value_bool(has(s, needed_string(r, what)));
    for (size_t i = 0; i < what.list->n && !r->failed; i++)
        if (run_step(r, 0) && has(s, needed_string(r, what.list->items[i]))) return value_bool(!r->failed);
    return value_bool(false);
}

static struct value method_startswith(struct run *r, struct value v, const struct value *args)
{
    return has_end(r, v, args[0], pystr_starts);
}

static struct value method_endswith(struct run *r, struct value v, const struct value *args)
{
    return has_end(r, v, args[0], pystr_ends);
}

static struct value method_removeprefix(struct run *r, struct value v, const struct value *args)
{
    struct span s = self_string(r, v), what = needed_string(r, args[0]);
    return value_string(pystr_starts(s, what) ? span_from(s, what.bytes) : s);
}

static struct value method_removesuffix(struct run *r, struct value v, const struct value *args)
{
    struct span s = self_string(r, v), what = needed_string(r, args[0]);
    if (pystr_ends(s, what)) s.bytes -= what.bytes;
    return value_string(s);
}

static struct value method_find(struct run *r, struct value v, const struct value *args)
{
    struct span s = self_string(r, v), what = needed_string(r, args[0]);
    size_t at = pystr_find(s, what, 0);
    if (at == s.bytes && what.bytes > 0) return value_integer(-1);
    return value_integer((int64_t)pystr_length((struct span){ s.at, at }));
}

/* Up to `most` times (negative: always). An empty `old` stands between all characters. */
static struct value replace(struct run *r, struct span s, struct span old, struct span new, int64_t most)
{
    size_t begin = r->out.used, at = 0;
    while (at <= s.bytes && most != 0 && run_step(r, new.bytes)) {
        size_t found = pystr_find(s, old, at), next = found + old.bytes;
        if (old.bytes > 0 && found == s.bytes) break;
        text_put(&r->out, (struct span){ s.at + at, found - at });
        text_put(&r->out, new);
        if (most > 0) most--;
        at = next;
        if (old.bytes > 0) continue;
        if (at == s.bytes) break;
        size_t character = pystr_offset(span_from(s, at), 1);
        text_put(&r->out, (struct span){ s.at + at, character });
        at += character;
    }
    if (at < s.bytes) text_put(&r->out, span_from(s, at));
    return value_copy_text(r, begin);
}

static struct value method_replace(struct run *r, struct value v, const struct value *args)
{
    struct span s = self_string(r, v), old = needed_string(r, args[0]), new = needed_string(r, args[1]);
    return replace(r, s, old, new, integer_argument(r, args[2], -1));
}

static struct value filter_replace(struct run *r, struct value v, const struct value *args)
{
    struct span s = value_text(r, v).string, old = value_text(r, args[0]).string,
                new = value_text(r, args[1]).string;
    return replace(r, s, old, new, integer_argument(r, args[2], -1));
}

/* Pieces collected for a list: n of them in an array that doubles. */
struct pieces {
    struct value *items;
    size_t n, capacity;
};

static void add_piece(struct run *r, struct pieces *p, struct value v)
{
    if (!run_step(r, 0)) return;
    if (p->n == p->capacity) {
        size_t capacity = p->capacity ? 2 * p->capacity : 8;
        struct value *grown = run_take(r, capacity, sizeof *grown);
        if (!grown) return;
        if (p->n) memcpy(grown, p->items, p->n * sizeof *grown);
        p->items = grown;
        p->capacity = capacity;
    }
    p->items[p->n++] = v;
}

static struct value pieces_list(struct run *r, const struct pieces *p)
{
    struct value v = value_new_list(r, VALUE_LIST, p->n);
    if (!r->failed && p->n) memcpy(v.list->items, p->items, p->n * sizeof *p->items);
    return v;
}

/* Words between whitespace. */
static void split_words(struct run *r, struct pieces *p, struct span s, int64_t most)
{
    static const struct span spaces = { NULL, 0 };
    for (;;) {
        size_t n = 0;
        s = pystr_strip(s, spaces, PYSTR_LEFT);
        if (s.bytes == 0 || r->failed) return;
        if (most-- == 0) {
            add_piece(r, p, value_string(s));
            return;
        }
        while (n < s.bytes && pystr_space(span_from(s, n)) == 0) n++;
        add_piece(r, p, value_string((struct span){ s.at, n }));
        s = span_from(s, n);
    }
}

static struct value method_split(struct run *r, struct value v, const struct value *args)
{
    struct pieces p = { 0 };
    struct span s = self_string(r, v), separator = string_argument(r, args[0]);
    int64_t most = integer_argument(r, args[1], -1);
    if (separator.at && separator.bytes == 0) run_fail(r, ERR_ARGUMENT, "empty separator");
    if (!separator.at) {
        split_words(r, &p, s, most);
        return pieces_list(r, &p);
    }
    for (size_t at; !r->failed && most-- != 0 && (at = pystr_find(s, separator, 0)) < s.bytes;) {
        add_piece(r, &p, value_string((struct span){ s.at, at }));
        s = span_from(s, at + separator.bytes);
    }
    add_piece(r, &p, value_string(s));
    return pieces_list(r, &p);
}

static struct value change_case(struct run *r, struct span s, char first, char last, bool only_first)
{
    if (!pystr_is_ascii(s)) {
        run_fail(r, ERR_UNSUPPORTED, "upper and lower case of text outside of ASCII is not supported");
        return undefined;
    }
    if (!run_step(r, s.bytes)) return undefined;
    char *text = run_take(r, s.bytes, 1);
    for (size_t i = 0; text && i < s.bytes; i++) {
        bool changes = s.at[i] >= first && s.at[i] <= last && !(only_first && i > 0);
        text[i] = (char)(changes ? s.at[i] ^ 32 : s.at[i]);
    }
    return text ? value_string((struct span){ text, s.bytes }) : undefined;
}

static struct value filter_upper(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    return change_case(r, value_text(r, v).string, 'a', 'z', false);
}

static struct value filter_lower(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    return change_case(r, value_text(r, v).string, 'A', 'Z', false);
}

static struct value filter_capitalize(struct run *r, struct value v, const struct value *args)
{
    struct value low = filter_lower(r, v, args);
    return r->failed ? undefined : change_case(r, low.string, 'a', 'z', true);
}

static struct value method_upper(struct run *r, struct value v, const struct value *args)
{
    return filter_upper(r, value_string(self_string(r, v)), args);
}

static struct value method_lower(struct run *r, struct value v, const struct value *args)
{
    return filter_lower(r, value_string(self_string(r, v)), args);
}

static struct value method_capitalize(struct run *r, struct value v, const struct value *args)
{
    return filter_capitalize(r, value_string(self_string(r, v)), args);
}

static struct value join(struct run *r, struct value list, struct span between)
{
    struct value items = r->failed ? undefined : value_items(r, list);
    if (r->failed) return undefined;
    size_t begin = r->out.used;
    for (size_t i = 0; i < items.list->n && run_step(r, between.bytes); i++) {
        if (i > 0) text_put(&r->out, between);
        value_write(r, items.list->items[i]);
    }
    return value_copy_text(r, begin);
}

static struct value method_join(struct run *r, struct value v, const struct value *args)
{
    struct value items = value_items(r, args[0]);
    for (size_t i = 0; !r->failed && i < items.list->n; i++)
        if (items.list->items[i].kind != VALUE_STRING)
            run_fail(r, ERR_ARGUMENT, "sequence item %zu: expected str instance, %s found", i,
                     value_type(items.list->items[i]));
    return join(r, items, self_string(r, v));
}

static struct value filter_string(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    return value_text(r, v);
}

/* Mappings. */

static const struct value_dict *self_dict(struct run *r, struct value v)
{
    static const struct value_dict empty = { 0 };
    if (v.kind == VALUE_DICT) return v.dict;
    if (v.kind == VALUE_UNDEFINED)
        value_refuse_undefined(r, v);
    else
        run_fail(r, ERR_ARGUMENT, "this method is one of mappings, not of '%s'", value_type(v));
    return &empty;
}

static struct value pairs(struct run *r, const struct value_dict *d)
{
    struct value all = value_new_list(r, VALUE_LIST, d->n);
    for (size_t i = 0; i < d->n && !r->failed; i++) {
        struct value pair = value_new_list(r, VALUE_TUPLE, 2);
        if (r->failed) break;
        pair.list->items[0] = value_string(d->entries[i].key);
        pair.list->items[1] = d->entries[i].value;
        all.list->items[i] = pair;
    }
    return all;
}

static struct value filter_items(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    if (v.kind == VALUE_UNDEFINED) return value_new_list(r, VALUE_LIST, 0);
    if (v.kind == VALUE_DICT) return pairs(r, v.dict);
    run_fail(r, ERR_ARGUMENT, "Can only get item pairs from a mapping.");
    return undefined;
}

static struct value method_items(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    return pairs(r, self_dict(r, v));
}

static struct value method_keys(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    self_dict(r, v);
    return r->failed ? undefined : value_items(r, v);
}

static struct value method_values(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    const struct value_dict *d = self_dict(r, v);
    struct value all = value_new_list(r, VALUE_LIST, d->n);
    for (size_t i = 0; i < d->n && !r->failed; i++) all.list->items[i] = d->entries[i].value;
    return all;
}

static struct value method_get(struct run *r, struct value v, const struct value *args)
{
    static const struct value none = { .kind = VALUE_NONE };
    const struct value_dict *d = self_dict(r, v);
    const struct value *found = args[0].kind == VALUE_STRING ? value_get(d, args[0].string) : NULL;
    run_step(r, 64 * d->n);
    return found ? *found : args[1].kind == VALUE_ABSENT ? none : args[1];
}

/* Values of any kind. */

static struct value filter_default(struct run *r, struct value v, const struct value *args)
{
    (void)r;
    bool replaced = v.kind == VALUE_UNDEFINED || (value_truth(args[1]) && !value_truth(v));
    if (!replaced) return v;
    return args[0].kind == VALUE_ABSENT ? value_string(span_of("")) : args[0];
}

static struct value filter_length(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    return value_integer(value_length(r, v));
}

static struct value filter_tojson(struct run *r, struct value v, const struct value *args)
{
    bool on_one_line = args[0].kind == VALUE_ABSENT || args[0].kind == VALUE_NONE;
    int64_t indent = integer_argument(r, args[0], 0);
    if (indent < 0 || indent > 100) run_fail(r, ERR_LIMIT, "tojson: an indent of 0 to 100 is supported");
    size_t begin = r->out.used;
    value_write_json(r, v, on_one_line ? -1 : (int)indent);
    return value_copy_text(r, begin);
}

static struct value filter_list(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    struct value items = value_items(r, v);
    items.kind = r->failed ? VALUE_UNDEFINED : VALUE_LIST;
    return items;
}

static struct value filter_first(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    struct value items = value_items(r, v);
    return r->failed || items.list->n == 0 ? undefined : items.list->items[0];
}

static struct value filter_last(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    struct value items = value_items(r, v);
    return r->failed || items.list->n == 0 ? undefined : items.list->items[items.list->n - 1];
}

static struct value filter_reverse(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    static const struct value none = { .kind = VALUE_NONE };
    struct value items = v.kind == VALUE_STRING ? v : value_items(r, v);
    return r->failed ? undefined : value_slice(r, items, none, none, value_integer(-1));
}

/* strtoll and strtod of a string's whole text, blanks at its ends aside; no digits, no number. */
static bool read_number(struct value *out, struct span s, bool real)
{
    char copy[64], *end;
    s = pystr_strip(s, (struct span){ NULL, 0 }, PYSTR_LEFT | PYSTR_RIGHT);
    if (s.bytes == 0 || s.bytes >= sizeof copy) return false;
    memcpy(copy, s.at, s.bytes);
    copy[s.bytes] = 0;
    if (strspn(copy, real ? "0123456789+-.eE" : "0123456789+-") != s.bytes) return false;
    *out = real ? value_real(strtod(copy, &end)) : value_integer(strtoll(copy, &end, 10));
    return *end == 0;
}

static struct value filter_int(struct run *r, struct value v, const struct value *args)
{
    struct value out;
    if (v.kind == VALUE_UNDEFINED) return value_refuse_undefined(r, v);
    if (v.kind == VALUE_INT) return v;
    if (v.kind == VALUE_BOOL) return value_integer(v.truth);
    if (v.kind == VALUE_STRING && read_number(&out, v.string, false)) return out;
    bool is_real = v.kind == VALUE_REAL || (v.kind == VALUE_STRING && read_number(&out, v.string, true));
    double x = v.kind == VALUE_REAL ? v.real : is_real ? out.real : 0;
    if (is_real && fabs(x) < 9e18) return value_integer((int64_t)x);
    return args[0].kind == VALUE_ABSENT ? value_integer(0) : args[0];
}

static struct value filter_float(struct run *r, struct value v, const struct value *args)
{
    struct value out;
    if (v.kind == VALUE_UNDEFINED) return value_refuse_undefined(r, v);
    if (v.kind == VALUE_REAL) return v;
    if (v.kind == VALUE_INT) return value_real((double)v.integer);
    if (v.kind == VALUE_BOOL) return value_real(v.truth);
    if (v.kind == VALUE_STRING && read_number(&out, v.string, true)) return out;
    return args[0].kind == VALUE_ABSENT ? value_real(0) : args[0];
}

static struct value filter_abs(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    if (v.kind == VALUE_REAL) return value_real(fabs(v.real));
    if (v.kind == VALUE_BOOL) return value_integer(v.truth);
    if (v.kind == VALUE_INT && v.integer != INT64_MIN)
        return value_integer(v.integer < 0 ? -v.integer : v.integer);
    run_fail(r, ERR_ARGUMENT, "bad operand type for abs(): '%s'", value_type(v));
    return undefined;
}

/* a.b.c of a value, the names in one string. */
static struct value attribute_path(struct run *r, struct value v, struct span path)
{
    for (size_t dot; !r->failed; path = span_from(path, dot + 1)) {
        dot = pystr_find(path, span_of("."), 0);
        v = value_item(r, v, value_string((struct span){ path.at, dot }));
        if (dot == path.bytes) break;
    }
    return v;
}

static struct value filter_join(struct run *r, struct value v, const struct value *args)
{
    struct span between = value_text(r, args[0]).string;
    struct value items = value_items(r, v);
    if (args[1].kind == VALUE_ABSENT || r->failed) return r->failed ? undefined : join(r, v, between);
    struct span path = needed_string(r, args[1]);
    struct value named = value_new_list(r, VALUE_LIST, items.list->n);
    for (size_t i = 0; i < items.list->n && run_step(r, 0); i++)
        named.list->items[i] = attribute_path(r, items.list->items[i], path);
    return r->failed ? undefined : join(r, named, between);
}

/* What map and select go through: nothing of values that are not true, as in Jinja. */
static struct value mapped_items(struct run *r, struct value v)
{
    return value_truth(v) ? value_items(r, v) : value_new_list(r, VALUE_LIST, 0);
}

/* map('filter'), map(attribute='path') */
static struct value filter_map(struct run *r, struct value v, const struct value *args)
{
    static const struct value none[BUILTIN_PARAMETERS] = { 0 };
    struct value items = mapped_items(r, v);
    bool by_attribute = args[1].kind == VALUE_STRING;
    struct span name = needed_string(r, by_attribute ? args[1] : args[0]);
    int id = by_attribute ? 0 : builtins_find(builtins_filters, name);
    if (id < 0 || builtins_filters[id].required > 0)
        run_fail(r, ERR_UNSUPPORTED, "map with the filter '%.*s' is not supported", (int)name.bytes, name.at);
    struct value out = r->failed ? undefined : value_new_list(r, VALUE_LIST, items.list->n);
    for (size_t i = 0; !r->failed && i < items.list->n && run_step(r, 0); i++) {
        struct value item = items.list->items[i];
        out.list->items[i] =
            by_attribute ? attribute_path(r, item, name) : builtins_filters[id].call(r, item, none);
    }
    return out;
}

/* Items, or those whose attribute `path` (at NULL: which themselves), pass the test; of no test: are true. */
static struct value choose(struct run *r, struct value v, struct span path, struct value test,
                           const struct value *args, bool wanted)
{
    struct pieces p = { 0 };
    struct value items = mapped_items(r, v);
    struct span name = string_argument(r, test);
    int id = name.at ? builtins_find(builtins_tests, name) : 0;
    if (id < 0) run_fail(r, ERR_UNSUPPORTED, "the test '%.*s' is not supported", (int)name.bytes, name.at);
    for (size_t i = 0; !r->failed && i < items.list->n && run_step(r, 0); i++) {
        struct value item = items.list->items[i], judged = path.at ? attribute_path(r, item, path) : item;
        bool passes = value_truth(name.at ? builtins_tests[id].call(r, judged, args) : judged);
        if (passes == wanted) add_piece(r, &p, item);
    }
    return r->failed ? undefined : pieces_list(r, &p);
}

static struct value filter_select(struct run *r, struct value v, const struct value *args)
{
    return choose(r, v, (struct span){ NULL, 0 }, args[0], args + 1, true);
}

static struct value filter_reject(struct run *r, struct value v, const struct value *args)
{
    return choose(r, v, (struct span){ NULL, 0 }, args[0], args + 1, false);
}

static struct value filter_selectattr(struct run *r, struct value v, const struct value *args)
{
    return choose(r, v, needed_string(r, args[0]), args[1], args + 2, true);
}

static struct value filter_rejectattr(struct run *r, struct value v, const struct value *args)
{
    return choose(r, v, needed_string(r, args[0]), args[1], args + 2, false);
}

const struct builtin builtins_filters[] = {
    { "tojson", 0, { "indent" }, filter_tojson },
    { "trim", 0, { "chars" }, filter_trim },
    { "string", 0, { 0 }, filter_string },
    { "default", 0, { "default_value", "boolean" }, filter_default },
    { "d", 0, { "default_value", "boolean" }, filter_default },
    { "length", 0, { 0 }, filter_length },
    { "count", 0, { 0 }, filter_length },
    { "items", 0, { 0 }, filter_items },
    { "join", 0, { "d", "attribute" }, filter_join },
    { "replace", 2, { "old", "new", "count" }, filter_replace },
    { "upper", 0, { 0 }, filter_upper },
    { "lower", 0, { 0 }, filter_lower },
    { "capitalize", 0, { 0 }, filter_capitalize },
    { "first", 0, { 0 }, filter_first },
    { "last", 0, { 0 }, filter_last },
    { "list", 0, { 0 }, filter_list },
    { "reverse", 0, { 0 }, filter_reverse },
    { "int", 0, { "default" }, filter_int },
    { "float", 0, { "default" }, filter_float },
    { "abs", 0, { 0 }, filter_abs },
    { "safe", 0, { 0 }, filter_string },
    { "map", 0, { "filter", "attribute" }, filter_map },
    { "select", 0, { "test", "argument" }, filter_select },
    { "reject", 0, { "test", "argument" }, filter_reject },
    { "selectattr", 1, { "attribute", "test", "argument" }, filter_selectattr },
    { "rejectattr", 1, { "attribute", "test", "argument" }, filter_rejectattr },
    { 0 },
};

const struct builtin builtins_methods[] = {
    { "startswith", 1, { "prefix" }, method_startswith },
    { "endswith", 1, { "suffix" }, method_endswith },
    { "strip", 0, { "chars" }, method_strip },
    { "lstrip", 0, { "chars" }, method_lstrip },
    { "rstrip", 0, { "chars" }, method_rstrip },
    { "split", 0, { "sep", "maxsplit" }, method_split },
    { "replace", 2, { "old", "new", "count" }, method_replace },
    { "removeprefix", 1, { "prefix" }, method_removeprefix },
    { "removesuffix", 1, { "suffix" }, method_removesuffix },
    { "find", 1, { "sub" }, method_find },
    { "join", 1, { "iterable" }, method_join },
    { "upper", 0, { 0 }, method_upper },
    { "lower", 0, { 0 }, method_lower },
    { "capitalize", 0, { 0 }, method_capitalize },
    { "items", 0, { 0 }, method_items },
    { "keys", 0, { 0 }, method_keys },
    { "values", 0, { 0 }, method_values },
    { "get", 1, { "key", "default" }, method_get },
    { 0 },
};

/* Tests. */

#define KIND_TEST(name, condition)                                                                           \
    static struct value test_##name(struct run *r, struct value v, const struct value *args)                 \
    {                                                                                                        \
        (void)r, (void)args;                                                                                 \
        return value_bool(condition);                                                                        \
    }
KIND_TEST(defined, v.kind != VALUE_UNDEFINED)
KIND_TEST(undefined, v.kind == VALUE_UNDEFINED)
KIND_TEST(none, v.kind == VALUE_NONE)
KIND_TEST(boolean, v.kind == VALUE_BOOL)
KIND_TEST(true, v.kind == VALUE_BOOL && v.truth)
KIND_TEST(false, v.kind == VALUE_BOOL && !v.truth)
KIND_TEST(integer, v.kind == VALUE_INT)
KIND_TEST(float, v.kind == VALUE_REAL)
KIND_TEST(number, value_is_number(v))
KIND_TEST(string, v.kind == VALUE_STRING)
KIND_TEST(mapping, v.kind == VALUE_DICT)
/* Jinja calls a sequence what has a length and items: mappings and undefined values too. */
KIND_TEST(sequence,
          value_is_list(v) || v.kind == VALUE_STRING || v.kind == VALUE_DICT || v.kind == VALUE_UNDEFINED)
#undef KIND_TEST

/* What is left after dividing by two is `rest`. */
static struct value leaves(struct run *r, struct value v, double rest)
{
    if (!value_is_number(v)) {
        run_fail(r, ERR_ARGUMENT, "expected a number, found %s", value_type(v));
        return value_bool(false);
    }
    double left = v.kind == VALUE_REAL  ? fabs(fmod(v.real, 2))
                  : v.kind == VALUE_INT ? (double)(v.integer & 1)
                                        : v.truth;
    if (v.kind == VALUE_REAL && v.real < 0 && left != 0) left = 2 - left;
    return value_bool(left == rest);
}

static struct value test_odd(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    return leaves(r, v, 1);
}

static struct value test_even(struct run *r, struct value v, const struct value *args)
{
    (void)args;
    return leaves(r, v, 0);
}

static struct value test_divisibleby(struct run *r, struct value v, const struct value *args)
{
    int64_t x = integer_argument(r, v, 0), by = integer_argument(r, args[0], 0);
    if (by == 0) run_fail(r, ERR_ARGUMENT, "modulo by zero");
    return value_bool(!r->failed && by != -1 ? x % by == 0 : true);
}

static struct value test_equal(struct run *r, struct value v, const struct value *args)
{
    return value_bool(value_equal(r, v, args[0]));
}

static struct value test_not_equal(struct run *r, struct value v, const struct value *args)
{
    return value_bool(!value_equal(r, v, args[0]));
}

static struct value test_in(struct run *r, struct value v, const struct value *args)
{
    return value_bool(value_contains(r, args[0], v));
}

const struct builtin builtins_tests[] = {
    { "defined", 0, { 0 }, test_defined },
    { "undefined", 0, { 0 }, test_undefined },
    { "none", 0, { 0 }, test_none },
    { "boolean", 0, { 0 }, test_boolean },
    { "true", 0, { 0 }, test_true },
    { "false", 0, { 0 }, test_false },
    { "integer", 0, { 0 }, test_integer },
    { "float", 0, { 0 }, test_float },
    { "number", 0, { 0 }, test_number },
    { "string", 0, { 0 }, test_string },
    { "mapping", 0, { 0 }, test_mapping },
    { "sequence", 0, { 0 }, test_sequence },
    { "iterable", 0, { 0 }, test_sequence },
    { "odd", 0, { 0 }, test_odd },
    { "even", 0, { 0 }, test_even },
    { "divisibleby", 1, { "num" }, test_divisibleby },
    { "equalto", 1, { "other" }, test_equal },
    { "eq", 1, { "other" }, test_equal },
    { "ne", 1, { "other" }, test_not_equal },
    { "in", 1, { "seq" }, test_in },
    { 0 },
};

/* Functions. */

static struct value function_raise(struct run *r, struct value message)
{
    struct value text = value_text(r, message);
    if (r->failed) return undefined;
    r->failed = true;
    err_set(r->e, ERR_ARGUMENT, "%.*s", text.string.bytes < 900 ? (int)text.string.bytes : 900,
            text.string.bytes ? text.string.at : "");
    return undefined;
}

enum { RANGE_MAX = 100000 }; /* Jinja's sandbox has the same */

static struct value function_range(struct run *r, const struct value *args, size_t n)
{
    int64_t from = n > 1 ? integer_argument(r, args[0], 0) : 0, to = integer_argument(r, args[n > 1], 0);
    int64_t step = n > 2 ? integer_argument(r, args[2], 1) : 1, count = 0, limit = INT64_MAX / 4;
    if (step == 0) run_fail(r, ERR_ARGUMENT, "range() arg 3 must not be zero");
    if (from > limit || from < -limit || to > limit || to < -limit || step > limit || step < -limit)
        run_fail(r, ERR_LIMIT, "range: numbers are too large");
    if (r->failed) return undefined;
    if (step > 0 && to > from) count = (to - from - 1) / step + 1;
    if (step < 0 && to < from) count = (from - to - 1) / -step + 1;
    if (count > RANGE_MAX)
        run_fail(r, ERR_LIMIT, "Range too big. The sandbox blocks ranges larger than %d.", RANGE_MAX);
    struct value v = r->failed ? undefined : value_new_list(r, VALUE_LIST, (size_t)count);
    for (int64_t i = 0; i < count && !r->failed; i++) v.list->items[i] = value_integer(from + i * step);
    return v;
}

static struct value function_dict(struct run *r, enum value_kind kind, const struct value_dict *keywords)
{
    struct value v = value_new_dict(r, kind);
    for (size_t i = 0; i < keywords->n && !r->failed; i++)
        value_set(r, v.dict, keywords->entries[i].key, keywords->entries[i].value);
    return v;
}

bool builtins_is_function(struct span name)
{
    return span_is(name, "raise_exception") || span_is(name, "range") || span_is(name, "namespace") ||
           span_is(name, "dict");
}

struct value builtins_function(struct run *r, struct span name, const struct value *args, size_t n,
                               const struct value_dict *keywords)
{
    bool fits = span_is(name, "range")             ? n >= 1 && n <= 3 && keywords->n == 0
                : span_is(name, "raise_exception") ? n == 1 && keywords->n == 0
                                                   : n == 0;
    if (!fits) {
        run_fail(r, ERR_ARGUMENT, "%.*s() does not take these arguments", (int)name.bytes, name.at);
        return undefined;
    }
    if (span_is(name, "range")) return function_range(r, args, n);
    if (span_is(name, "raise_exception")) return function_raise(r, args[0]);
    return function_dict(r, span_is(name, "dict") ? VALUE_DICT : VALUE_NAMESPACE, keywords);
}
