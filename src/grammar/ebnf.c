/* EBNF in the dialect of llama.cpp's GBNF, which xgrammar reads too:
 *   root ::= item ("," item)*   # comment
 * with "text", [a-z] [^a-z], . (any character), names, ( ), |, * + ? {n} {n,} {n,m}. The text starts at root.
 * A rule lasts until the next NAME ::=. In texts and sets: \n \r \t \\ \" \' \[ \] \- \^ \xHH \uHHHH
 * \UHHHHHHHH. */
#include "grammar/grammar.h"
#include "grammar/regex.h"
#include <stdlib.h>
#include <string.h>

enum { NESTING_MAX = 200, BYTES_MAX = 1 << 18, NAMES_MAX = 5000 };

struct name {
    const char *text;
    size_t n, at; /* at: where it was first used */
    int32_t rule;
    bool is_defined;
};

struct parser {
    struct rules *r;
    const char *text;
    size_t n, at;
    struct name *names;
    int64_t n_names, names_room;
    int nesting;
};

static int32_t refuse(struct parser *p, size_t at, const char *what)
{
    size_t line = 1;
    for (size_t i = 0; i < at && i < p->n; i++) line += p->text[i] == '\n';
    rules_fail(p->r, ERR_ARGUMENT, "grammar, line %zu (offset %zu): %s", line, at, what);
    return 0;
}

static void skip(struct parser *p)
{
    while (p->at < p->n && p->text[p->at]) {
        char c = p->text[p->at];
        if (c == '#')
            while (p->at < p->n && p->text[p->at] != '\n') p->at++;
        else if (strchr(" \t\r\n", c))
            p->at++;
        else
            return;
    }
}

static bool next_is(struct parser *p, char c)
{
    skip(p);
    return p->at < p->n && p->text[p->at] == c;
}

static bool is_name_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
}

/* Bytes of a name at p->at; 0: none. */
static size_t name_length(const struct parser *p)
{
    size_t n = 0;
    while (p->at + n < p->n && is_name_char(p->text[p->at + n])) n++;
    return n;
}

static bool take_defines(struct parser *p)
{
    skip(p);
    if (p->n - p->at < 3 || memcmp(p->text + p->at, "::=", 3) != 0) return false;
    p->at += 3;
    return true;
}

/* Whether NAME ::= stands next; moves nothing. */
static bool at_definition(struct parser *p)
{
    size_t begin = p->at;
    p->at += name_length(p);
    bool is = p->at > begin && take_defines(p);
    p->at = begin;
    return is;
}

static struct name *find_name(struct parser *p, const char *text, size_t n, size_t at)
{
    for (int64_t i = 0; i < p->n_names; i++)
        if (p->names[i].n == n && memcmp(p->names[i].text, text, n) == 0) return &p->names[i];
    char *copy = strndup(text, n);
    if (p->n_names >= NAMES_MAX)
        rules_fail(p->r, ERR_LIMIT, "grammar: more than %d rules", NAMES_MAX);
    else if (!copy || !rules_room(&p->names, p->n_names, &p->names_room, 1, sizeof *p->names))
        rules_fail(p->r, ERR_MEMORY, "no memory for a grammar");
    else
        p->names[p->n_names++] =
            (struct name){ .text = text, .n = n, .at = at, .rule = rules_declare(p->r, copy) };
    free(copy);
    return p->r->failed ? NULL : &p->names[p->n_names - 1];
}

static bool one_char(struct parser *p, uint32_t *c)
{
    size_t begin = p->at;
    if (p->text[p->at] != '\\') {
        int length = chars_get(p->text + p->at, p->n - p->at, c);
        p->at += (size_t)length;
        return length > 0 || refuse(p, begin, "not UTF-8");
    }
    if (++p->at == p->n) return refuse(p, begin, "a backslash at the end");
    char kind = p->text[p->at];
    if (kind == 'x' || kind == 'u' || kind == 'U')
        return regex_code(p->text, p->n, &p->at, c) || refuse(p, begin, "not the number of a character");
    static const char pairs[] = "n\nr\rt\t\\\\\"\"''[[]]--^^";
    for (size_t i = 0; i < sizeof pairs - 1; i += 2)
        if (pairs[i] == kind) {
            *c = (uint32_t)pairs[i + 1];
            p->at++;
            return true;
        }
    return refuse(p, begin, "this escape is not known");
}

static int32_t parse_text(struct parser *p)
{
    size_t begin = p->at++;
    struct expr_list parts = { 0 };
    while (!p->r->failed && p->at < p->n && p->text[p->at] != '"') {
        char bytes[4];
        uint32_t c;
        if (one_char(p, &c))
            expr_list_add(p->r, &parts, expr_bytes(p->r, bytes, (size_t)chars_put(bytes, c)));
    }
    if (p->at == p->n) refuse(p, begin, "a text without its closing \"");
    p->at++;
    return expr_list_seq(p->r, &parts);
}

static int32_t parse_class(struct parser *p)
{
    size_t begin = p->at++;
    struct chars set = { 0 };
    bool is_complement = p->at < p->n && p->text[p->at] == '^';
    p->at += is_complement;
    while (!p->r->failed && p->at < p->n && p->text[p->at] != ']') {
        uint32_t low, high;
        size_t from = p->at;
        if (!one_char(p, &low)) break;
        high = low;
        if (p->n - p->at >= 2 && p->text[p->at] == '-' && p->text[p->at + 1] != ']') {
            p->at++;
            if (!one_char(p, &high)) break;
        }
        if (high < low) refuse(p, from, "not a range of characters");
        chars_add(p->r, &set, low, high);
    }
    if (p->at >= p->n) refuse(p, begin, "[ without ]");
    p->at++;
    if (is_complement) chars_complement(p->r, &set);
    int32_t x = chars_expr(p->r, &set, CHARS_RAW);
    chars_free(&set);
    return x;
}

static int32_t parse_alternatives(struct parser *p);

static int32_t parse_atom(struct parser *p)
{
    size_t begin = p->at;
    char c = p->text[p->at];
    if (c == '"') return parse_text(p);
    if (c == '[') return parse_class(p);
    if (c == '.') {
        p->at++;
        return chars_any(p->r, CHARS_RAW);
    }
    if (c == '(') {
        p->at++;
        if (++p->nesting > NESTING_MAX) {
            rules_fail(p->r, ERR_LIMIT, "grammar, offset %zu: nested more than %d deep", begin, NESTING_MAX);
            return 0;
        }
        int32_t x = parse_alternatives(p);
        p->nesting--;
        if (!next_is(p, ')')) return refuse(p, begin, "( without )");
        p->at++;
        return x;
    }
    size_t n = name_length(p);
    if (n == 0) return refuse(p, begin, "expected a text in double quotes, a set, a name or (");
    struct name *name = find_name(p, p->text + begin, n, begin);
    p->at += n;
    return name ? expr_call(p->r, name->rule) : 0;
}

static int64_t number(struct parser *p)
{
    int64_t x = -1;
    skip(p);
    for (; p->at < p->n && p->text[p->at] >= '0' && p->text[p->at] <= '9'; p->at++)
        if (x < 1 << 30) x = (x < 0 ? 0 : x) * 10 + (p->text[p->at] - '0');
    return x;
}

static int32_t parse_braces(struct parser *p, int32_t x)
{
    size_t begin = p->at++;
    int64_t least = number(p), most = least;
    if (next_is(p, ',')) {
        p->at++;
        most = number(p);
        if (least < 0 && most >= 0) least = 0;
    }
    if (least < 0 || !next_is(p, '}')) return refuse(p, begin, "expected {n}, {n,} or {n,m}");
    p->at++;
    return most >= 0 && least > most ? refuse(p, begin, "{n,m} with n over m")
                                     : expr_repeat(p->r, x, least, most);
}

static int32_t parse_sequence(struct parser *p)
{
    struct expr_list parts = { 0 };
    while (!p->r->failed) {
        skip(p);
        if (p->at == p->n || p->text[p->at] == '|' || p->text[p->at] == ')' || at_definition(p)) break;
        int32_t x = parse_atom(p);
        for (bool more = true; more && !p->r->failed;) {
            skip(p);
            char c = p->at < p->n ? p->text[p->at] : 0;
            more = c == '*' || c == '+' || c == '?' || c == '{';
            if (!more) break;
            if (c == '{') {
                x = parse_braces(p, x);
                continue;
            }
            p->at++;
            x = expr_repeat(p->r, x, c == '+', c == '?' ? 1 : -1);
        }
        expr_list_add(p->r, &parts, x);
    }
    return expr_list_seq(p->r, &parts);
}

static int32_t parse_alternatives(struct parser *p)
{
    struct expr_list branches = { 0 };
    do {
        expr_list_add(p->r, &branches, parse_sequence(p));
        if (p->r->failed || !next_is(p, '|')) break;
        p->at++;
    } while (true);
    return expr_list_alt(p->r, &branches);
}

static void parse_rule(struct parser *p)
{
    size_t begin = p->at, n = name_length(p);
    if (!at_definition(p)) {
        refuse(p, begin, "expected NAME ::= (the dialect is GBNF; Lark grammars are not read)");
        return;
    }
    p->at += n;
    take_defines(p);
    struct name *name = find_name(p, p->text + begin, n, begin);
    if (!name) return;
    if (name->is_defined) {
        refuse(p, begin, "this rule is defined twice");
        return;
    }
    name->is_defined = true;
    int32_t rule = name->rule;
    rules_define(p->r, rule, parse_alternatives(p));
}

static int32_t parse_grammar(struct parser *p)
{
    if (p->n > BYTES_MAX)
        rules_fail(p->r, ERR_LIMIT, "a grammar of %zu bytes is over the limit of %d", p->n, BYTES_MAX);
    for (skip(p); !p->r->failed && p->at < p->n; skip(p)) parse_rule(p);
    int32_t root = -1;
    for (int64_t i = 0; i < p->n_names && !p->r->failed; i++) {
        const struct name *x = &p->names[i];
        if (!x->is_defined) {
            rules_fail(p->r, ERR_ARGUMENT, "grammar, offset %zu: no rule is named '%.*s'", x->at,
                       (int)(x->n < 100 ? x->n : 100), x->text);
        }
        if (x->n == 4 && memcmp(x->text, "root", 4) == 0) root = x->rule;
    }
    if (!p->r->failed && root < 0)
        rules_fail(p->r, ERR_ARGUMENT, "grammar: there is no rule root, where texts start");
    return root;
}

bool grammar_from_ebnf(struct grammar **out, const char *text, size_t n, struct err *e)
{
    struct rules r;
    *out = NULL;
    rules_init(&r, e);
    struct parser p = { .r = &r, .text = text, .n = n };
    int32_t root = parse_grammar(&p);
    bool ok = rules_compile(out, &r, root);
    free(p.names);
    rules_deinit(&r);
    return ok;
}
