#include "tokenizer/jinja/lex.h"
#include "tokenizer/utf8.h"
#include <errno.h>
#include <stdlib.h>

void lex_init(struct lexer *l, struct span source, struct store *store)
{
    *l = (struct lexer){ .source = source,
                         .line = 1,
                         .inside = TOKEN_TEXT,
                         .coming = TOKEN_TEXT,
                         .line_starts = true,
                         .store = store };
}

static struct span rest(const struct lexer *l)
{
    return span_from(l->source, l->at);
}

static bool sees(const struct lexer *l, const char *what)
{
    return pystr_starts(rest(l), span_of(what));
}

static void skip(struct lexer *l, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) l->line += l->source.at[l->at + i] == '\n';
    l->at += bytes;
}

static void skip_spaces(struct lexer *l)
{
    for (size_t n; (n = pystr_space(rest(l))) > 0;) skip(l, n);
}

static char begin_of_tag(const struct lexer *l, size_t at)
{
    char second = at + 1 < l->source.bytes ? l->source.at[at + 1] : 0;
    return l->source.at[at] == '{' && (second == '{' || second == '%' || second == '#') ? second : 0;
}

/* The text before a tag, without what whitespace control takes from it. */
static struct span trim_before(const struct lexer *l, struct span text, char tag, char sign)
{
    static const struct span spaces = { NULL, 0 };
    if (sign == '-') return pystr_strip(text, spaces, PYSTR_RIGHT);
    if (sign == '+' || tag == '{') return text;
    size_t line = text.bytes;
    while (line > 0 && text.at[line - 1] != '\n') line--;
    if (line == 0 && !l->line_starts) return text;
    if (pystr_strip(span_from(text, line), spaces, PYSTR_LEFT).bytes == 0) text.bytes = line;
    return text;
}

/* Goes past what ends a tag, "%}" say, and what its whitespace control takes after it; false when it is not
 * here. */
static bool take_end(struct lexer *l, const char *end, bool takes_newline)
{
    bool minus = l->at < l->source.bytes && l->source.at[l->at] == '-';
    bool plus = takes_newline && l->at < l->source.bytes && l->source.at[l->at] == '+';
    if (!pystr_starts(span_from(l->source, l->at + (minus || plus)), span_of(end))) return false;
    skip(l, (size_t)(minus || plus) + 2);
    size_t before = l->at;
    if (minus)
        skip_spaces(l);
    else if (takes_newline && !plus && sees(l, "\n"))
        skip(l, 1);
    l->line_starts = l->at > before && l->source.at[l->at - 1] == '\n';
    return true;
}

static bool skip_comment(struct lexer *l, struct err *e)
{
    int line = l->line;
    while (l->at < l->source.bytes) {
        if (take_end(l, "#}", true)) return true;
        skip(l, 1);
    }
    return err_set(e, ERR_FORMAT, "line %d: a comment has no end", line);
}

/* Text up to the next tag that is not a comment; may be empty. */
static bool lex_text(struct lexer *l, struct token *out, struct err *e)
{
    size_t begin = l->at, at = begin;
    char tag = 0;
    while (at < l->source.bytes && !(tag = begin_of_tag(l, at))) at++;
    *out =
        (struct token){ .kind = TOKEN_TEXT, .line = l->line, .text = { l->source.at + begin, at - begin } };
    if (!tag) {
        skip(l, at - begin);
        l->coming = TOKEN_END;
        return true;
    }
    char sign = at + 2 < l->source.bytes ? l->source.at[at + 2] : 0;
    if (sign != '-' && sign != '+') sign = 0;
    out->text = trim_before(l, out->text, tag, sign);
    skip(l, at - begin + 2 + (sign != 0));
    l->line_starts = false;
    if (tag == '#') return skip_comment(l, e);
    l->coming = tag == '{' ? TOKEN_OUTPUT_BEGIN : TOKEN_TAG_BEGIN;
    return true;
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static bool is_name(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || is_digit(c);
}

static size_t digits(struct span s, size_t at)
{
    size_t begin = at;
    while (at < s.bytes && is_digit(s.at[at])) at++;
    return at - begin;
}

static bool lex_number(struct lexer *l, struct token *out, struct err *e)
{
    struct span s = rest(l);
    char copy[64];
    size_t n = digits(s, 0), fraction = n < s.bytes && s.at[n] == '.' ? digits(s, n + 1) : 0;
    bool is_real = fraction > 0;
    if (is_real) n += 1 + fraction;
    if (n < s.bytes && (s.at[n] == 'e' || s.at[n] == 'E')) {
        size_t sign = n + 1 < s.bytes && (s.at[n + 1] == '-' || s.at[n + 1] == '+');
        size_t exponent = digits(s, n + 1 + sign);
        if (exponent > 0) n += 1 + sign + exponent;
        is_real = is_real || exponent > 0;
    }
    if (n >= sizeof copy || (n < s.bytes && is_name(s.at[n])))
        return err_set(e, ERR_UNSUPPORTED, "line %d: a number that is not plain decimal", l->line);
    memcpy(copy, s.at, n);
    copy[n] = 0;
    errno = 0;
    *out = (struct token){ .kind = TOKEN_NUMBER, .line = l->line, .text = { s.at, n } };
    out->value = is_real ? value_real(strtod(copy, NULL)) : value_integer(strtoll(copy, NULL, 10));
    if (!is_real && errno) return err_set(e, ERR_LIMIT, "line %d: %s has over 64 bits", l->line, copy);
    skip(l, n);
    return true;
}

/* \xhh, \uhhhh, \Uhhhhhhhh: the digits after the letter. */
static bool put_code(char **to, struct span s, size_t n, int line, struct err *e)
{
    uint32_t c = 0;
    bool ok = s.bytes >= n;
    for (size_t i = 0; ok && i < n; i++) {
        char d = s.at[i];
        int digit = is_digit(d) ? d - '0' : (d | 32) >= 'a' && (d | 32) <= 'f' ? (d | 32) - 'a' + 10 : -1;
        ok = digit >= 0;
        c = c << 4 | (uint32_t)(digit & 15);
    }
    if (!ok || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff))
        return err_set(e, ERR_FORMAT, "line %d: a string escapes what is no character", line);
    *to += utf8_put(*to, c);
    return true;
}

/* One escape, s begins after its backslash; *used: bytes of s that it took. */
static bool put_escape(char **to, struct span s, size_t *used, int line, struct err *e)
{
    static const char letters[] = "nrtbfav\\'\"", bytes[] = "\n\r\t\b\f\a\v\\'\"";
    char c = s.at[0];
    const char *known = strchr(letters, c);
    size_t n = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    *used = 1 + n;
    if (n > 0) return put_code(to, span_from(s, 1), n, line, e);
    if (is_digit(c) || c == 'N')
        return err_set(e, ERR_UNSUPPORTED, "line %d: the escape '\\%c' in a string is not supported", line,
                       c);
    if (c == '\n') return true;
    if (known && c) {
        *(*to)++ = bytes[known - letters];
        return true;
    }
    *(*to)++ = '\\';
    *(*to)++ = c;
    return true;
}

static bool lex_string(struct lexer *l, struct token *out, struct err *e)
{
    struct span s = span_from(rest(l), 1);
    char quote = s.at[-1];
    size_t end = 0, used;
    while (end < s.bytes && s.at[end] != quote) end += s.at[end] == '\\' ? 2 : 1;
    if (end >= s.bytes) return err_set(e, ERR_FORMAT, "line %d: a string has no end", l->line);
    char *text = store_take(l->store, end + 1, 1), *to = text;
    if (!text) return err_memory(e, "a template", end);
    for (size_t i = 0; i < end;) {
        if (s.at[i] != '\\') {
            *to++ = s.at[i++];
            continue;
        }
        if (!put_escape(&to, (struct span){ s.at + i + 1, end - i - 1 }, &used, l->line, e)) return false;
        i += 1 + used;
    }
    *out = (struct token){ .kind = TOKEN_STRING, .line = l->line, .text = { text, (size_t)(to - text) } };
    skip(l, end + 2);
    return true;
}

static bool lex_operator(struct lexer *l, struct token *out, struct err *e)
{
    static const char *const operators[] = { "//", "**", "==", "!=", ">=", "<=", "+", "-", "*",
                                             "/",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                             ">",  "<",  "=",  ".",  ":",  "|",  "," };
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        if (!sees(l, operators[i])) continue;
        *out = (struct token){ .kind = TOKEN_OPERATOR, .line = l->line, .text = span_of(operators[i]) };
        if (strchr("([{", *operators[i])) l->open++;
        if (strchr(")]}", *operators[i])) l->open--;
        skip(l, strlen(operators[i]));
        return true;
    }
    unsigned char c = (unsigned char)l->source.at[l->at];
    return err_set(e, ERR_FORMAT, "line %d: unexpected byte 0x%02x in a tag", l->line, c);
}

static bool lex_inside(struct lexer *l, struct token *out, struct err *e)
{
    bool in_tag = l->inside == TOKEN_TAG_BEGIN;
    skip_spaces(l);
    if (l->at == l->source.bytes) return err_set(e, ERR_FORMAT, "line %d: a tag has no end", l->line);
    *out = (struct token){ .kind = in_tag ? TOKEN_TAG_END : TOKEN_OUTPUT_END, .line = l->line };
    if (l->open == 0 && take_end(l, in_tag ? "%}" : "}}", in_tag)) {
        l->inside = TOKEN_TEXT;
        return true;
    }
    char c = l->source.at[l->at];
    if (is_digit(c)) return lex_number(l, out, e);
    if (c == '\'' || c == '"') return lex_string(l, out, e);
    if (!is_name(c)) return lex_operator(l, out, e);
    struct span s = rest(l);
    size_t n = 0;
    while (n < s.bytes && is_name(s.at[n])) n++;
    *out = (struct token){ .kind = TOKEN_NAME, .line = l->line, .text = { s.at, n } };
    skip(l, n);
    return true;
}

bool lex_next(struct lexer *l, struct token *out, struct err *e)
{
    if (l->inside != TOKEN_TEXT) return lex_inside(l, out, e);
    while (l->coming == TOKEN_TEXT) {
        if (!lex_text(l, out, e)) return false;
        if (out->text.bytes > 0) return true;
    }
    *out = (struct token){ .kind = l->coming, .line = l->line };
    if (l->coming == TOKEN_END) return true;
    l->inside = l->coming;
    l->coming = TOKEN_TEXT;
    l->open = 0;
    return true;
}
