/* Values as text: str, repr, json.dumps. */
#include "tokenizer/jinja/value.h"
#include "tokenizer/utf8.h"
#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <utf8proc.h>

/* Adds one to the last digit of "-1.2345e+06"; false where the carry passes the first digit. */
static bool next_digit_up(char *number)
{
    char *p = strchr(number, 'e') - 1;
    for (; *p == '9' || *p == '.'; p--) {
        if (p == number || p[-1] == '-') return false;
        if (*p == '9') *p = '0';
    }
    ++*p;
    return true;
}

/* The fewest significant digits that read back as x, in exponent form. Above a power of two the neighbour is
 * twice as far as below it: there the shortest number that reads back may be the one after the correctly
 * rounded. */
static void shortest_digits(char *out, size_t size, double x)
{
    for (int precision = 0; precision < 17; precision++) {
        snprintf(out, size, "%.*e", precision, x);
        if (strtod(out, NULL) == x || (next_digit_up(out) && strtod(out, NULL) == x)) return;
    }
}

/* Python's repr of a finite float: shortest_digits, positional from 1e-4 to below 1e16, where powers of two
 * have so few digits that rounding x to them gives the same. */
static void write_finite(struct text *t, double x)
{
    char digits[32], positional[48];
    shortest_digits(digits, sizeof digits, x);
    const char *mark = strchr(digits, 'e'), *point = strchr(digits, '.');
    assert(mark);
    int exponent = atoi(mark + 1), decimals = (point ? (int)(mark - point) - 1 : 0) - exponent;
    if (exponent < -4 || exponent >= 16) {
        text_puts(t, digits);
        return;
    }
    snprintf(positional, sizeof positional, "%.*f", decimals > 1 ? decimals : 1, x);
    text_puts(t, positional);
}

static void write_number(struct text *t, struct value v, const char *infinity, const char *nan)
{
    char number[32];
    if (v.kind == VALUE_INT) {
        snprintf(number, sizeof number, "%" PRId64, v.integer);
        text_puts(t, number);
    } else if (isfinite(v.real)) {
        write_finite(t, v.real);
    } else {
        text_puts(t, isnan(v.real) ? nan : v.real < 0 ? "-" : "");
        if (isinf(v.real)) text_puts(t, infinity);
    }
}

void value_write(struct run *r, struct value v)
{
    if (!run_step(r, v.kind == VALUE_STRING ? v.string.bytes : 0)) return;
    switch (v.kind) {
    case VALUE_ABSENT:
    case VALUE_UNDEFINED: break;
    case VALUE_STRING: text_put(&r->out, v.string); break;
    default: value_write_repr(r, v);
    }
}

struct value value_text(struct run *r, struct value v)
{
    if (v.kind == VALUE_STRING) return v;
    size_t begin = r->out.used;
    value_write(r, v);
    return value_copy_text(r, begin);
}

/* str.isprintable: not a control, format, private, unassigned or separator character, but the space is. */
static bool is_printable(uint32_t c)
{
    if (c == ' ') return true;
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS: return false;
    default: return true;
    }
}

static void write_repr_character(struct text *t, struct span s, char quote)
{
    static const char escaped[] = "\\\n\r\t", letter[] = "\\nrt";
    uint32_t c = utf8_get((const unsigned char *)s.at, (int)s.bytes);
    const char *known = c ? strchr(escaped, (int)(c < 0x80 ? c : 0)) : NULL;
    char code[16];
    if (c < 0x80 && known && *known) {
        snprintf(code, sizeof code, "\\%c", letter[known - escaped]);
        text_puts(t, code);
    } else if (c == (uint32_t)quote) {
        snprintf(code, sizeof code, "\\%c", quote);
        text_puts(t, code);
    } else if (is_printable(c)) {
        text_put(t, s);
    } else {
        snprintf(code, sizeof code, c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c);
        text_puts(t, code);
    }
}

static void write_repr_string(struct run *r, struct span s)
{
    bool has_single = memchr(s.at, '\'', s.bytes), has_double = memchr(s.at, '"', s.bytes);
    char quote[2] = { has_single && !has_double ? '"' : '\'' };
    text_puts(&r->out, quote);
    for (size_t i = 0; i < s.bytes && !r->out.full;) {
        int n = utf8_scan((const unsigned char *)s.at + i, s.bytes - i);
        if (n <= 0) {
            run_fail(r, ERR_ARGUMENT, "text that is not UTF-8");
            return;
        }
        write_repr_character(&r->out, (struct span){ s.at + i, (size_t)n }, quote[0]);
        i += (size_t)n;
    }
    text_puts(&r->out, quote);
}

static void write_repr_items(struct run *r, struct value v)
{
    bool tuple = v.kind == VALUE_TUPLE;
    text_puts(&r->out, tuple ? "(" : "[");
    for (size_t i = 0; i < v.list->n && !r->failed; i++) {
        if (i > 0) text_puts(&r->out, ", ");
        value_write_repr(r, v.list->items[i]);
    }
    text_puts(&r->out, !tuple ? "]" : v.list->n == 1 ? ",)" : ")");
}

static void write_repr_entries(struct run *r, const struct value_dict *d)
{
    text_puts(&r->out, "{");
    for (size_t i = 0; i < d->n && !r->failed; i++) {
        if (i > 0) text_puts(&r->out, ", ");
        value_write_repr(r, value_string(d->entries[i].key));
        text_puts(&r->out, ": ");
        value_write_repr(r, d->entries[i].value);
    }
    text_puts(&r->out, "}");
}

static void write_repr(struct run *r, struct value v)
{
    switch (v.kind) {
    case VALUE_UNDEFINED: text_puts(&r->out, "Undefined"); break;
    case VALUE_NONE: text_puts(&r->out, "None"); break;
    case VALUE_BOOL: text_puts(&r->out, v.truth ? "True" : "False"); break;
    case VALUE_INT:
    case VALUE_REAL: write_number(&r->out, v, "inf", "nan"); break;
    case VALUE_STRING: write_repr_string(r, v.string); break;
    case VALUE_LIST:
    case VALUE_TUPLE: write_repr_items(r, v); break;
    case VALUE_DICT: write_repr_entries(r, v.dict); break;
    default: run_fail(r, ERR_ARGUMENT, "a %s cannot be printed", value_type(v));
    }
}

void value_write_repr(struct run *r, struct value v)
{
    if (!run_step(r, v.kind == VALUE_STRING ? v.string.bytes : 0)) return;
    if (run_enter(r)) write_repr(r, v);
    run_leave(r);
}

static void write_json_string(struct text *t, struct span s)
{
    static const char escaped[] = "\"\\\n\r\t\b\f", letter[] = "\"\\nrtbf";
    text_puts(t, "\"");
    for (size_t i = 0, begin = 0; i <= s.bytes; i++) {
        unsigned char c = i < s.bytes ? (unsigned char)s.at[i] : 0;
        if (i < s.bytes && c >= 0x20 && c != '"' && c != '\\') continue;
        text_put(t, (struct span){ s.at + begin, i - begin });
        begin = i + 1;
        if (i == s.bytes) break;
        const char *known = c ? strchr(escaped, c) : NULL;
        char code[8];
        if (known)
            snprintf(code, sizeof code, "\\%c", letter[known - escaped]);
        else
            snprintf(code, sizeof code, "\\u%04x", c);
        text_puts(t, code);
    }
    text_puts(t, "\"");
}

/* Between two items, or on both sides of all of them. */
static void write_break(struct run *r, int indent, int depth)
{
    if (indent < 0) return;
    text_puts(&r->out, "\n");
    for (int64_t i = 0; i < (int64_t)indent * depth && !r->out.full; i++) text_puts(&r->out, " ");
}

static void write_json(struct run *r, struct value v, int indent, int depth);

static void write_json_items(struct run *r, const struct value_list *list, int indent, int depth)
{
    text_puts(&r->out, "[");
    for (size_t i = 0; i < list->n && !r->failed; i++) {
        if (i > 0) text_puts(&r->out, indent < 0 ? ", " : ",");
        write_break(r, indent, depth + 1);
        write_json(r, list->items[i], indent, depth + 1);
    }
    if (list->n) write_break(r, indent, depth);
    text_puts(&r->out, "]");
}

static void write_json_entries(struct run *r, const struct value_dict *d, int indent, int depth)
{
    text_puts(&r->out, "{");
    for (size_t i = 0; i < d->n && !r->failed; i++) {
        if (i > 0) text_puts(&r->out, indent < 0 ? ", " : ",");
        write_break(r, indent, depth + 1);
        write_json_string(&r->out, d->entries[i].key);
        text_puts(&r->out, ": ");
        write_json(r, d->entries[i].value, indent, depth + 1);
    }
    if (d->n) write_break(r, indent, depth);
    text_puts(&r->out, "}");
}

static void write_json_value(struct run *r, struct value v, int indent, int depth)
{
    switch (v.kind) {
    case VALUE_NONE: text_puts(&r->out, "null"); break;
    case VALUE_BOOL: text_puts(&r->out, v.truth ? "true" : "false"); break;
    case VALUE_INT:
    case VALUE_REAL: write_number(&r->out, v, "Infinity", "NaN"); break;
    case VALUE_STRING: write_json_string(&r->out, v.string); break;
    case VALUE_LIST:
    case VALUE_TUPLE: write_json_items(r, v.list, indent, depth); break;
    case VALUE_DICT: write_json_entries(r, v.dict, indent, depth); break;
    default: run_fail(r, ERR_ARGUMENT, "Object of type %s is not JSON serializable", value_type(v));
    }
}

static void write_json(struct run *r, struct value v, int indent, int depth)
{
    if (!run_step(r, v.kind == VALUE_STRING ? v.string.bytes : 0)) return;
    if (run_enter(r)) write_json_value(r, v, indent, depth);
    run_leave(r);
}

void value_write_json(struct run *r, struct value v, int indent)
{
    write_json(r, v, indent, 0);
}
