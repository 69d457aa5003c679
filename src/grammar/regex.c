#include "grammar/regex.h"
#include "grammar/grammar.h"
#include <stdlib.h>
#include <string.h>

enum { NESTING_MAX = 200, BYTES_MAX = 1 << 16 };

struct parser {
    struct rules *r;
    const char *text;
    size_t n, at;
    enum chars_form form;
    bool is_search;
    int nesting;
};

static int32_t refuse(struct parser *p, size_t at, const char *what)
{
    rules_fail(p->r, ERR_ARGUMENT, "regular expression, offset %zu: %s", at, what);
    return 0;
}

static bool next_is(const struct parser *p, char c)
{
    return p->at < p->n && p->text[p->at] == c;
}

static bool take(struct parser *p, const char *text)
{
    size_t n = strlen(text);
    if (p->n - p->at < n || memcmp(p->text + p->at, text, n) != 0) return false;
    p->at += n;
    return true;
}

static bool hex(const char *text, size_t n, size_t *at, size_t digits, uint32_t *c)
{
    *c = 0;
    if (n - *at < digits) return false;
    for (size_t i = 0; i < digits; i++, ++*at) {
        const char *all = "0123456789abcdef", *d = text[*at] ? strchr(all, text[*at] | 0x20) : NULL;
        if (!d || text[*at] < '0') return false;
        *c = *c << 4 | (uint32_t)(d - all);
    }
    return true;
}

bool regex_code(const char *text, size_t n, size_t *at, uint32_t *c)
{
    char kind = *at < n ? text[*at] : 0;
    if (kind != 'x' && kind != 'u' && kind != 'U') return false;
    ++*at;
    if (kind == 'u' && *at < n && text[*at] == '{') {
        const char *close = memchr(text + *at, '}', n - *at);
        size_t digits = close ? (size_t)(close - text) - *at - 1 : 0;
        if (digits < 1 || digits > 6) return false;
        ++*at;
        if (!hex(text, n, at, digits, c)) return false;
        ++*at;
    } else if (!hex(text, n, at, kind == 'x' ? 2 : kind == 'u' ? 4 : 8, c))
        return false;
    size_t second = *at + 2;
    uint32_t low;
    if (*c >= 0xd800 && *c < 0xdc00 && kind == 'u' && n - *at >= 6 && memcmp(text + *at, "\\u", 2) == 0 &&
        hex(text, n, &second, 4, &low) && low >= 0xdc00 && low < 0xe000) {
        *c = 0x10000 + ((*c - 0xd800) << 10 | (low - 0xdc00));
        *at = second;
    }
    return *c <= 0x10ffff && (*c < 0xd800 || *c > 0xdfff);
}

/* \d \w \s and their opposites. */
static bool add_shorthand(struct parser *p, struct chars *set, char kind)
{
    struct chars s = { 0 };
    char lower = (char)(kind | 0x20);
    if (lower != 'd' && lower != 'w' && lower != 's') return false;
    if (lower != 's') chars_add(p->r, &s, '0', '9');
    if (lower == 's') {
        chars_add(p->r, &s, '\t', '\r');
        chars_add(p->r, &s, ' ', ' ');
    }
    if (lower == 'w') {
        chars_add(p->r, &s, 'A', 'Z');
        chars_add(p->r, &s, 'a', 'z');
        chars_add(p->r, &s, '_', '_');
    }
    if (kind != lower) chars_complement(p->r, &s);
    for (int64_t i = 0; i < s.n; i++) chars_add(p->r, set, s.ranges[i].low, s.ranges[i].high);
    chars_free(&s);
    return true;
}

/* A single character, escaped or not; false: refused, or a shorthand, which stands at p->at then. */
static bool one_char(struct parser *p, bool in_class, uint32_t *c)
{
    size_t begin = p->at;
    if (p->text[p->at] != '\\') {
        int length = chars_get(p->text + p->at, p->n - p->at, c);
        p->at += (size_t)length;
        return length > 0 || refuse(p, begin, "not UTF-8");
    }
    if (++p->at == p->n) return refuse(p, begin, "a backslash at the end");
    char kind = p->text[p->at];
    if (strchr("dDwWsS", kind) && kind) return false;
    if (kind == 'x' || kind == 'u' || kind == 'U')
        return regex_code(p->text, p->n, &p->at, c) || refuse(p, begin, "not the number of a character");
    static const char letters[] = "n\nr\rt\tf\fv\v";
    const char *found = kind ? strchr(letters, kind) : NULL;
    if (found && kind >= 'a') {
        *c = (uint32_t)found[1];
        p->at++;
        return true;
    }
    if (kind == 'b' && in_class)
        *c = '\b';
    else if (kind == '0' && (p->at + 1 == p->n || p->text[p->at + 1] < '0' || p->text[p->at + 1] > '9'))
        *c = 0;
    else if (kind >= '0' && kind <= '9')
        return refuse(p, begin, "references and octal numbers are not supported");
    else if ((kind >= 'a' && kind <= 'z') || (kind >= 'A' && kind <= 'Z'))
        return refuse(p, begin, "this escape is not supported");
    else {
        int length = chars_get(p->text + p->at, p->n - p->at, c);
        p->at += (size_t)length;
        return length > 0 || refuse(p, begin, "not UTF-8");
    }
    p->at++;
    return true;
}

static int32_t parse_class(struct parser *p)
{
    size_t begin = p->at++;
    struct chars set = { 0 };
    bool is_complement = take(p, "^");
    if (next_is(p, ']'))
        return refuse(p, p->at, "a set that begins with ] means different things: write \\]");
    while (!p->r->failed && !next_is(p, ']')) {
        uint32_t low = 0, high;
        size_t from = p->at;
        if (p->at == p->n) {
            refuse(p, begin, "[ without ]");
            break;
        }
        bool is_char = one_char(p, true, &low);
        if (p->r->failed) break;
        if (!is_char) add_shorthand(p, &set, p->text[p->at++]);
        high = low;
        if (next_is(p, '-') && p->at + 1 < p->n && p->text[p->at + 1] != ']') {
            p->at++;
            if (!is_char || !one_char(p, true, &high) || high < low) {
                refuse(p, from, "not a range of characters");
                break;
            }
        }
        if (is_char) chars_add(p->r, &set, low, high);
    }
    p->at++;
    if (is_complement) chars_complement(p->r, &set);
    int32_t x = chars_expr(p->r, &set, p->form);
    chars_free(&set);
    return x;
}

static int32_t parse_alternatives(struct parser *p, bool is_top);

static int32_t parse_group(struct parser *p)
{
    size_t begin = p->at++;
    if (next_is(p, '?')) {
        bool is_named = take(p, "?P<") || (p->n - p->at > 2 && p->text[p->at + 2] != '=' &&
                                           p->text[p->at + 2] != '!' && take(p, "?<"));
        const char *close = is_named ? memchr(p->text + p->at, '>', p->n - p->at) : NULL;
        if (is_named && !close) return refuse(p, begin, "the group's name has no >");
        if (is_named)
            p->at = (size_t)(close - p->text) + 1;
        else if (!take(p, "?:"))
            return refuse(p, begin, "look-around, flags and references are not supported");
    }
    if (++p->nesting > NESTING_MAX) {
        rules_fail(p->r, ERR_LIMIT, "regular expression, offset %zu: groups are nested more than %d deep",
                   begin, NESTING_MAX);
        return 0;
    }
    int32_t x = parse_alternatives(p, false);
    p->nesting--;
    if (!next_is(p, ')')) return refuse(p, begin, "( without )");
    p->at++;
    return x;
}

static int32_t parse_atom(struct parser *p)
{
    char c = p->text[p->at];
    struct chars set = { 0 };
    uint32_t code;
    if (c == '(') return parse_group(p);
    if (c == '[') return parse_class(p);
    if (c == '*' || c == '+' || c == '?') return refuse(p, p->at, "nothing to repeat");
    if (c == '^' || c == '$')
        return refuse(p, p->at, "^ and $ are supported at the ends of the expression only");
    if (c == '.') {
        p->at++;
        chars_add(p->r, &set, '\n', '\n');
        if (p->is_search) { /* ECMAScript's, whose . is a part of Python's */
            chars_add(p->r, &set, '\r', '\r');
            chars_add(p->r, &set, 0x2028, 0x2029);
        }
        chars_complement(p->r, &set);
    } else if (one_char(p, false, &code))
        chars_add(p->r, &set, code, code);
    else if (!p->r->failed)
        add_shorthand(p, &set, p->text[p->at++]);
    int32_t x = chars_expr(p->r, &set, p->form);
    chars_free(&set);
    return x;
}

static bool number(struct parser *p, int64_t *out)
{
    size_t begin = p->at;
    for (*out = 0; p->at < p->n && p->text[p->at] >= '0' && p->text[p->at] <= '9'; p->at++)
        if (*out < 1 << 30) *out = *out * 10 + (p->text[p->at] - '0');
    return p->at > begin;
}

/* {n} {n,} {n,m} {,m}; anything else is a literal {. */
static bool braces(struct parser *p, int64_t *least, int64_t *most)
{
    size_t begin = p->at++;
    bool has_least = number(p, least);
    *most = *least;
    bool has_comma = take(p, ","), has_most = has_comma && number(p, most);
    if (has_comma && !has_most) *most = -1;
    if (next_is(p, '}') && (has_least || has_most)) {
        p->at++;
        if (!has_least && p->is_search) refuse(p, begin, "{,m} means different things: write {0,m}");
        return true;
    }
    p->at = begin;
    return false;
}

static int32_t parse_repeat(struct parser *p)
{
    int32_t x;
    int64_t least, most;
    if (next_is(p, '{')) {
        size_t begin = p->at;
        if (braces(p, &least, &most)) return refuse(p, begin, "nothing to repeat");
    }
    x = parse_atom(p);
    if (p->r->failed || p->at == p->n) return x;
    size_t at = p->at;
    if (take(p, "*"))
        least = 0, most = -1;
    else if (take(p, "+"))
        least = 1, most = -1;
    else if (take(p, "?"))
        least = 0, most = 1;
    else if (!next_is(p, '{') || !braces(p, &least, &most))
        return x;
    if (most >= 0 && least > most) return refuse(p, at, "{n,m} with n over m");
    if (!take(p, "?") && (next_is(p, '+') || next_is(p, '*')))
        return refuse(p, p->at, "several repetitions of one thing");
    size_t after = p->at;
    if (next_is(p, '?') || next_is(p, '*') || next_is(p, '+') ||
        (next_is(p, '{') && braces(p, &(int64_t){ 0 }, &(int64_t){ 0 })))
        return refuse(p, after, "several repetitions of one thing");
    return expr_repeat(p->r, x, least, most);
}

static int32_t parse_sequence(struct parser *p, bool is_top)
{
    struct expr_list parts = { 0 };
    int32_t anything = is_top && p->is_search ? expr_repeat(p->r, chars_any(p->r, p->form), 0, -1) : 0;
    bool has_begin = is_top && take(p, "^"), has_end = false;
    if (is_top && p->is_search && !has_begin) expr_list_add(p->r, &parts, anything);
    while (!p->r->failed && p->at < p->n && !next_is(p, '|') && !next_is(p, ')')) {
        bool is_last = p->at + 1 == p->n || p->text[p->at + 1] == '|';
        if (is_top && is_last && take(p, "$"))
            has_end = true;
        else
            expr_list_add(p->r, &parts, parse_repeat(p));
    }
    if (is_top && p->is_search && !has_end) expr_list_add(p->r, &parts, anything);
    return expr_list_seq(p->r, &parts);
}

static int32_t parse_alternatives(struct parser *p, bool is_top)
{
    struct expr_list branches = { 0 };
    do expr_list_add(p->r, &branches, parse_sequence(p, is_top));
    while (!p->r->failed && take(p, "|"));
    return expr_list_alt(p->r, &branches);
}

int32_t regex_expr(struct rules *r, const char *text, size_t n, enum chars_form form, bool is_search)
{
    struct parser p = { .r = r, .text = text, .n = n, .form = form, .is_search = is_search };
    if (n > BYTES_MAX) {
        rules_fail(r, ERR_LIMIT, "a regular expression of %zu bytes is over the limit of %d", n, BYTES_MAX);
        return 0;
    }
    int32_t x = parse_alternatives(&p, true);
    return !r->failed && p.at < n ? refuse(&p, p.at, ") without (") : x;
}

bool grammar_from_regex(struct grammar **out, const char *regex, size_t n, struct err *e)
{
    struct rules r;
    *out = NULL;
    rules_init(&r, e);
    int32_t body = regex_expr(&r, regex, n, CHARS_RAW, false);
    bool ok = rules_compile(out, &r, rules_add(&r, "regular expression", body));
    rules_deinit(&r);
    return ok;
}

bool grammar_from_choices(struct grammar **out, const char *const *choices, int n, struct err *e)
{
    struct rules r;
    *out = NULL;
    struct expr_literal *texts = calloc((size_t)n + 1, sizeof *texts);
    if (!texts) return err_memory(e, "choices", (size_t)n * sizeof *texts);
    rules_init(&r, e);
    for (int i = 0; i < n; i++) texts[i] = (struct expr_literal){ choices[i], strlen(choices[i]) };
    if (n == 0) rules_fail(&r, ERR_ARGUMENT, "choice: the list is empty");
    int32_t body = expr_literals(&r, texts, (size_t)n);
    bool ok = rules_compile(out, &r, rules_add(&r, "choice", body));
    rules_deinit(&r);
    free(texts);
    return ok;
}
