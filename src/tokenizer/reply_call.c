#include "tokenizer/reply_call.h"
#include "tokenizer/reply_tags.h"
#include "tokenizer/utf8.h"
#include "base/doc.h"
#include <stdlib.h>
#include <strings.h>

enum { JSON_ATTEMPTS_MAX = 16 };

void call_deinit(struct call *c)
{
    free(c->name);
    json_decref(c->arguments);
    *c = (struct call){ 0 };
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

struct span call_skip_blanks(struct span s)
{
    while (s.bytes && is_blank(s.at[0])) s = span_from(s, 1);
    return s;
}

struct span call_trim(struct span s)
{
    s = call_skip_blanks(s);
    while (s.bytes && is_blank(s.at[s.bytes - 1])) s.bytes--;
    return s;
}

static size_t find(struct span s, const char *marker, size_t from)
{
    return pystr_find(s, span_of(marker), from);
}

/* Types of arguments. */

const json_t *call_function(const json_t *tools, const char *name)
{
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const json_t *tool = json_array_get(tools, i), *f = json_object_get(tool, "function");
        if (!f) f = tool;
        const char *own = json_string_value(json_object_get(f, "name"));
        if (own && strcmp(own, name) == 0) return f;
    }
    return NULL;
}

static const json_t *parameters_of(const json_t *tools, const char *function)
{
    return json_object_get(call_function(tools, function), "parameters");
}

/* What "$ref" points to, "#/$defs/NAME" of the parameters' schema. */
static const json_t *referred(const json_t *schema, const json_t *root)
{
    enum { CHAIN = 8 };
    for (int i = 0; i < CHAIN && json_object_get(schema, "$ref"); i++) {
        const char *path = json_string_value(json_object_get(schema, "$ref"));
        if (!path || path[0] != '#') return NULL;
        schema = root;
        for (path++; *path == '/';) {
            size_t n = strcspn(++path, "/");
            schema = json_object_getn(schema, path, n);
            path += n;
        }
    }
    return schema;
}

/* The first type that is not null; *nullable: one of them is. NULL: none is given, a string then. */
static const char *type_in(const json_t *schema, const json_t *root, bool *nullable)
{
    schema = referred(schema, root);
    const json_t *type = json_object_get(schema, "type"), *any = json_object_get(schema, "anyOf");
    const char *first = json_string_value(type);
    if (first) return first;
    for (size_t i = 0; i < json_array_size(type ? type : any); i++) {
        const json_t *item = json_array_get(type ? type : any, i);
        const char *name = json_string_value(type ? item : json_object_get(referred(item, root), "type"));
        if (name && strcmp(name, "null") == 0)
            *nullable = true;
        else if (!first)
            first = name;
    }
    return first;
}

/* JSON that fills s; NULL for anything else. */
static json_t *parse_json(struct span s)
{
    json_t *v;
    struct err ignored;
    return s.bytes && doc_parse(&v, s.at, s.bytes, &ignored) ? v : NULL;
}

/* Python's spelling to JSON's: True, False, None, and quotes. out: room for 2 * s.bytes. */
static size_t respell(char *out, struct span s)
{
    static const struct {
        const char *python, *json;
    } words[] = { { "True", "true" }, { "False", "false" }, { "None", "null" } };
    size_t n = 0;
    char quote = 0;
    for (size_t i = 0; i < s.bytes; i++) {
        char c = s.at[i];
        size_t word = 0;
        while (!quote && word < 3 && !starts(span_from(s, i), words[word].python)) word++;
        if (!quote && word < 3) {
            n += (size_t)(stpcpy(out + n, words[word].json) - (out + n));
            i += strlen(words[word].python) - 1;
        } else if (quote && c == '\\' && i + 1 < s.bytes) {
            if (s.at[i + 1] != '\'') out[n++] = c;
            out[n++] = s.at[++i];
        } else if (c == quote || (!quote && (c == '\'' || c == '"'))) {
            quote = quote ? 0 : c;
            out[n++] = '"';
        } else {
            if (quote == '\'' && c == '"') out[n++] = '\\';
            out[n++] = c;
        }
    }
    return n;
}

static json_t *parse_python(struct span s)
{
    char *text = malloc(2 * s.bytes + 8);
    json_t *v = text ? parse_json((struct span){ text, respell(text, s) }) : NULL;
    free(text);
    return v;
}

static bool is_word(struct span s, const char *word)
{
    return s.bytes == strlen(word) && strncasecmp(s.at, word, s.bytes) == 0;
}

static json_t *whole_or_number(json_t *v)
{
    double x = json_real_value(v);
    if (!json_is_real(v) || x < -9e15 || x > 9e15 || x != (double)(json_int_t)x) return v;
    json_decref(v);
    return json_integer((json_int_t)x);
}

static bool is_one_of(const char *type, const char *a, const char *b, const char *c)
{
    return strcmp(type, a) == 0 || strcmp(type, b) == 0 || strcmp(type, c) == 0;
}

/* A string; what is not UTF-8 in it becomes U+FFFD. */
static json_t *text_value(struct span s)
{
    json_t *v = json_stringn(s.at, s.bytes);
    char *out = v ? NULL : malloc(3 * s.bytes + 1);
    size_t n = 0;
    for (size_t i = 0; out && i < s.bytes;) {
        int k = utf8_scan((const unsigned char *)s.at + i, s.bytes - i);
        size_t bytes = k > 0 ? (size_t)k : k < 0 ? (size_t)-k : s.bytes - i;
        memcpy(out + n, k > 0 ? s.at + i : "\xef\xbf\xbd", k > 0 ? bytes : 3);
        n += k > 0 ? bytes : 3;
        i += bytes;
    }
    if (out) v = json_stringn(out, n);
    free(out);
    return v;
}

enum argument_kind call_argument_kind(const json_t *parameters, const char *key)
{
    bool nullable = false;
    const char *type =
        type_in(json_object_get(json_object_get(parameters, "properties"), key), parameters, &nullable);
    if (!type) return ARGUMENT_TEXT;
    if (strcmp(type, "enum") == 0) return ARGUMENT_TEXT_OR_NULL;
    if (!is_one_of(type, "string", "str", "text")) return ARGUMENT_WHOLE;
    return nullable ? ARGUMENT_TEXT_OR_NULL : ARGUMENT_TEXT;
}

/* The value that text stands for where the schema asks for it; text that does not fit stays a string. */
static json_t *typed(struct span text, const json_t *schema, const json_t *root)
{
    bool nullable = false;
    const char *type = type_in(schema, root, &nullable);
    struct span s = call_trim(text);
    if (type && (nullable || !is_one_of(type, "string", "str", "text")) &&
        (is_word(s, "null") || is_word(s, "none")))
        return json_null();
    if (!type || is_one_of(type, "string", "str", "text") || strcmp(type, "enum") == 0)
        return text_value(text);
    if (strncmp(type, "bool", 4) == 0) return json_boolean(is_word(s, "true"));
    json_t *v = parse_json(s);
    if (strncmp(type, "int", 3) == 0 || strcmp(type, "number") == 0 || strcmp(type, "float") == 0) {
        bool fits = *type == 'i' ? json_is_integer(v) : json_is_number(v);
        if (fits) return whole_or_number(v);
        json_decref(v);
        return text_value(text);
    }
    if (!v) v = parse_python(s);
    return v ? v : text_value(text);
}

/* <parameter=KEY> ... inside of a function. */

/* A value ends at the first </parameter> that is followed by another parameter or by nothing. One is missing,
 * and the value ends at the next <parameter= on a line of its own, when that names a parameter of the tool,
 * or when there is no
 * </parameter> left. Returns the end; *next: where to go on. */
static size_t value_end(struct span body, size_t from, const json_t *properties, size_t *next)
{
    size_t end = body.bytes, first = find(body, END_PARAMETER, from), open = from;
    for (size_t at = first; at < body.bytes && end == body.bytes; at = find(body, END_PARAMETER, at + 1)) {
        struct span after = call_skip_blanks(span_from(body, at + strlen(END_PARAMETER)));
        if (after.bytes == 0 || starts(after, PARAMETER)) end = at;
    }
    if (end == body.bytes) end = first;
    while ((open = find(body, "\n<parameter=", open)) < first) {
        size_t key = open + 1 + strlen(PARAMETER), stop = find(body, ">", key);
        char name[CALL_NAME_MAX] = "";
        if (stop - key < sizeof name) memcpy(name, body.at + key, stop - key);
        if (first == body.bytes || json_object_get(properties, name)) {
            *next = open + 1;
            return open + 1;
        }
        open++;
    }
    *next = end < body.bytes ? end + strlen(END_PARAMETER) : end;
    return end;
}

/* Without one newline at each end. */
static struct span without_newlines(struct span s)
{
    if (s.bytes && s.at[0] == '\n') s = span_from(s, 1);
    if (s.bytes && s.at[s.bytes - 1] == '\n') s.bytes--;
    return s;
}

json_t *call_argument(const json_t *parameters, const char *key, struct span value)
{
    return typed(without_newlines(value), json_object_get(json_object_get(parameters, "properties"), key),
                 parameters);
}

enum call_result call_name(char name[CALL_NAME_MAX], struct span s, size_t *bytes)
{
    size_t n = 0;
    while (n < s.bytes && n < CALL_NAME_MAX && s.at[n] != '>' && s.at[n] != '\n' && s.at[n] != '<' && s.at[n])
        n++;
    if (n == s.bytes && n < CALL_NAME_MAX) return CALL_WAIT;
    if (n == 0 || n == CALL_NAME_MAX || s.at[n] != '>' || utf8_valid_prefix(s.at, n) != n) return CALL_NONE;
    memcpy(name, s.at, n);
    name[n] = 0;
    *bytes = n;
    return CALL_FOUND;
}

/* "<parameter=KEY>", the bytes of it; 0: s does not begin so. */
static size_t read_parameter(char key[CALL_NAME_MAX], struct span s)
{
    size_t n;
    if (!starts(s, PARAMETER) || call_name(key, span_from(s, strlen(PARAMETER)), &n) != CALL_FOUND) return 0;
    return strlen(PARAMETER) + n + 1;
}

/* The beginning of a parameter that the end of the text cut before its value. */
static bool is_cut_parameter(struct span s)
{
    return may_start(s, PARAMETER) || (starts(s, PARAMETER) && !memchr(s.at, '>', s.bytes));
}

/* Where the next parameter begins in what comes behind one and is neither blank nor a parameter. */
static struct span next_parameter(struct span s)
{
    char key[CALL_NAME_MAX];
    size_t at = 0;
    while (at < s.bytes && !read_parameter(key, span_from(s, at))) at = find(s, PARAMETER, at + 1);
    return span_from(s, at);
}

/* False for text that does not begin with a parameter. What comes between two of them is dropped; of two of
 * one name the first counts, as it may have been handed on already. */
static bool read_parameters(json_t *arguments, struct span body, const json_t *parameters, bool is_cut)
{
    const json_t *properties = json_object_get(parameters, "properties");
    char key[CALL_NAME_MAX];
    bool first = true;
    for (body = call_skip_blanks(body); body.bytes; body = call_skip_blanks(body), first = false) {
        size_t next;
        if (is_cut && is_cut_parameter(body)) return true;
        if (!first) body = next_parameter(body);
        if (body.bytes == 0) return true;
        size_t head = read_parameter(key, body);
        if (head == 0) return false;
        body = span_from(body, head);
        size_t end = value_end(body, 0, properties, &next);
        if (!json_object_get(arguments, key)) {
            json_t *v = call_argument(parameters, key, (struct span){ body.at, end });
            if (!v || json_object_set_new(arguments, key, v) != 0) return false;
        }
        body = span_from(body, next);
    }
    return true;
}

static enum call_result give(struct call *out, size_t bytes, const char *name, json_t *arguments, bool is_cut,
                             struct err *e)
{
    *out = (struct call){ .bytes = bytes, .name = strdup(name), .arguments = arguments, .is_cut = is_cut };
    if (out->name) return CALL_FOUND;
    call_deinit(out);
    err_memory(e, "a tool call", bytes);
    return CALL_FAILED;
}

/* The call whose parameters are `body`, and which takes `bytes` of the text. */
static enum call_result read_call(struct call *out, struct span body, size_t bytes, const char *name,
                                  const json_t *tools, bool is_cut, struct err *e)
{
    json_t *arguments = json_object();
    if (!arguments) {
        err_memory(e, "a tool call", sizeof *arguments);
        return CALL_FAILED;
    }
    if (read_parameters(arguments, body, parameters_of(tools, name), is_cut))
        return give(out, bytes, name, arguments, is_cut, e);
    json_decref(arguments);
    return CALL_NONE;
}

/* What follows </function>: blanks and what shows that it was meant. *end: behind the call. */
static enum call_result close_follows(struct span s, size_t after, size_t *end, bool final)
{
    struct span rest = call_skip_blanks(span_from(s, after));
    size_t at = s.bytes - rest.bytes;
    *end = after;
    if (starts(rest, CLOSE)) {
        *end = at + strlen(CLOSE);
        return CALL_FOUND;
    }
    if (starts(rest, OPEN) || starts(rest, FUNCTION)) return CALL_FOUND;
    if (rest.bytes == 0 || may_start(rest, CLOSE) || may_start(rest, OPEN) || may_start(rest, FUNCTION))
        return final ? rest.bytes == 0 ? CALL_FOUND : CALL_NONE : CALL_WAIT;
    return CALL_NONE;
}

static bool ends_with(struct span s, const char *marker)
{
    return pystr_ends(s, span_of(marker));
}

/* Without blanks and the beginning of a closing tag at its end: where a text was cut. */
static struct span without_cut_tag(struct span s)
{
    static const char *const tags[] = { "</parameter>", "</function>", "</tool_call>" };
    for (size_t i = 0; i < 3; i++)
        for (size_t n = strlen(tags[i]) - 1; n > 1; n--)
            if (pystr_ends(s, (struct span){ tags[i], n })) return (struct span){ s.at, s.bytes - n };
    return s;
}

/* s from <function= on; `before`: bytes in front of it that belong to the call. */
static enum call_result find_function(struct call *out, struct call_search *search, struct span s,
                                      size_t before, const json_t *tools, bool final, struct err *e)
{
    char name[CALL_NAME_MAX];
    size_t n;
    enum call_result named = call_name(name, span_from(s, strlen(FUNCTION)), &n);
    if (named != CALL_FOUND) return final ? CALL_NONE : named;
    size_t body = strlen(FUNCTION) + n + 1, end = s.bytes;
    if (search->from < body) search->from = body;
    for (;;) {
        size_t close = find(s, END_FUNCTION, search->from), bare = find(s, CLOSE, search->from);
        if (bare < close) { /* </tool_call> without </function> */
            struct span inside = call_trim((struct span){ s.at + body, bare - body });
            if (inside.bytes == 0 || ends_with(inside, END_PARAMETER))
                return read_call(out, inside, before + bare + strlen(CLOSE), name, tools, false, e);
            search->from = bare + 1;
            continue;
        }
        if (close == s.bytes) break;
        enum call_result r = close_follows(s, close + strlen(END_FUNCTION), &end, final);
        if (r == CALL_FOUND)
            return read_call(out, (struct span){ s.at + body, close - body }, before + end, name, tools,
                             false, e);
        if (r == CALL_WAIT) return CALL_WAIT;
        if (!search->first_close) search->first_close = close + strlen(END_FUNCTION);
        search->from = close + 1;
    }
    if (!final) {
        size_t keep = strlen(CLOSE) - 1; /* a marker may be cut by the end of what is here */
        if (s.bytes > keep && s.bytes - keep > search->from) search->from = s.bytes - keep;
        return CALL_WAIT;
    }
    if (search->first_close) {
        struct span inside = { s.at + body, search->first_close - strlen(END_FUNCTION) - body };
        return read_call(out, inside, before + search->first_close, name, tools, false, e);
    }
    return read_call(out, without_cut_tag(span_from(s, body)), before + s.bytes, name, tools, true, e);
}

/* {"name": ..., "arguments": {...}}, the arguments perhaps as a string that holds an object. */
static enum call_result read_json_call(struct call *out, struct span text, size_t bytes, struct err *e)
{
    json_t *v = parse_json(call_trim(text)), *arguments = json_object_get(v, "arguments");
    const char *name = json_string_value(json_object_get(v, "name"));
    if (!arguments) arguments = json_object_get(v, "parameters");
    json_t *object =
        json_is_string(arguments)
            ? parse_json((struct span){ json_string_value(arguments), json_string_length(arguments) })
            : json_incref(arguments);
    if (!object && name && !arguments) object = json_object();
    enum call_result r = CALL_NONE;
    if (name && *name && json_is_object(object)) r = give(out, bytes, name, json_incref(object), false, e);
    json_decref(object);
    json_decref(v);
    return r;
}

/* s from { on, which ends at a </tool_call> before which it is JSON, or at the end of the text. */
static enum call_result find_json(struct call *out, struct call_search *search, struct span s, size_t before,
                                  bool final, struct err *e)
{
    while (search->attempts < JSON_ATTEMPTS_MAX) {
        size_t close = find(s, CLOSE, search->from);
        if (close == s.bytes) break;
        enum call_result r =
            read_json_call(out, (struct span){ s.at, close }, before + close + strlen(CLOSE), e);
        if (r != CALL_NONE) return r;
        search->from = close + 1;
        search->attempts++;
    }
    if (search->attempts == JSON_ATTEMPTS_MAX) return CALL_NONE;
    if (final) return read_json_call(out, s, before + s.bytes, e);
    size_t keep = strlen(CLOSE) - 1;
    if (s.bytes > keep && s.bytes - keep > search->from) search->from = s.bytes - keep;
    return CALL_WAIT;
}

enum call_result call_find(struct call *out, struct call_search *search, struct span s, const json_t *tools,
                           bool final, struct err *e)
{
    struct span inside = starts(s, OPEN) ? call_skip_blanks(span_from(s, strlen(OPEN))) : s;
    size_t before = s.bytes - inside.bytes;
    if (starts(inside, FUNCTION)) return find_function(out, search, inside, before, tools, final, e);
    if (starts(inside, "{")) return find_json(out, search, inside, before, final, e);
    return !final && may_start(inside, FUNCTION) ? CALL_WAIT : CALL_NONE;
}
