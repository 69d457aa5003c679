#include "tokenizer/reply_call.h"
#include "base/doc.h"
#include <stdlib.h>
#include <strings.h>

static const char OPEN[] = "<tool_call>", CLOSE[] = "</tool_call>",
                  FUNCTION[] = "<function=", END_FUNCTION[] = "</function>",
                  PARAMETER[] = "<parameter=", END_PARAMETER[] = "</parameter>";

enum { NAME_BYTES_MAX = 256, JSON_ATTEMPTS_MAX = 16 };

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

static struct span trim(struct span s)
{
    s = call_skip_blanks(s);
    while (s.bytes && is_blank(s.at[s.bytes - 1])) s.bytes--;
    return s;
}

static bool starts(struct span s, const char *marker)
{
    return pystr_starts(s, span_of(marker));
}

/* s may become the marker when more comes. */
static bool may_start(struct span s, const char *marker)
{
    return s.bytes < strlen(marker) && pystr_starts(span_of(marker), s);
}

static size_t find(struct span s, const char *marker, size_t from)
{
    return pystr_find(s, span_of(marker), from);
}

/* Types of arguments. */

static const json_t *parameters_of(const json_t *tools, const char *function)
{
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const json_t *tool = json_array_get(tools, i), *f = json_object_get(tool, "function");
        if (!f) f = tool;
        const char *name = json_string_value(json_object_get(f, "name"));
        if (name && strcmp(name, function) == 0) return json_object_get(f, "parameters");
    }
    return NULL;
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

/* The value that text stands for where the schema asks for it; text that does not fit stays a string. */
static json_t *typed(struct span text, const json_t *schema, const json_t *root)
{
    bool nullable = false;
    const char *type = type_in(schema, root, &nullable);
    struct span s = trim(text);
    if (type && (nullable || !is_one_of(type, "string", "str", "text")) &&
        (is_word(s, "null") || is_word(s, "none")))
        return json_null();
    if (!type || is_one_of(type, "string", "str", "text") || strcmp(type, "enum") == 0)
        return json_stringn(text.at, text.bytes);
    if (strncmp(type, "bool", 4) == 0) return json_boolean(is_word(s, "true"));
    json_t *v = parse_json(s);
    if (strncmp(type, "int", 3) == 0 || strcmp(type, "number") == 0 || strcmp(type, "float") == 0) {
        bool fits = *type == 'i' ? json_is_integer(v) : json_is_number(v);
        if (fits) return whole_or_number(v);
        json_decref(v);
        return json_stringn(text.at, text.bytes);
    }
    if (!v) v = parse_python(s);
    return v ? v : json_stringn(text.at, text.bytes);
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
        char name[NAME_BYTES_MAX] = "";
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

/* The key between "=" and ">", into name; bytes of it, 0: there is no such name. */
static size_t read_name(char name[NAME_BYTES_MAX], struct span s)
{
    size_t n = find(s, ">", 0);
    if (n == 0 || n == s.bytes || n >= NAME_BYTES_MAX) return 0;
    for (size_t i = 0; i < n; i++)
        if (s.at[i] == '\n' || s.at[i] == '<' || s.at[i] == 0) return 0;
    memcpy(name, s.at, n);
    name[n] = 0;
    return n;
}

/* The beginning of a parameter that the end of the text cut before its value. */
static bool is_cut_parameter(struct span s)
{
    return may_start(s, PARAMETER) || (starts(s, PARAMETER) && !memchr(s.at, '>', s.bytes));
}

/* False for text that is not parameters and blanks. */
static bool read_parameters(json_t *arguments, struct span body, const json_t *parameters, bool is_cut)
{
    const json_t *properties = json_object_get(parameters, "properties");
    char key[NAME_BYTES_MAX];
    for (body = call_skip_blanks(body); body.bytes; body = call_skip_blanks(body)) {
        size_t n, next;
        if (is_cut && is_cut_parameter(body)) return true;
        if (!starts(body, PARAMETER) || !(n = read_name(key, span_from(body, strlen(PARAMETER)))))
            return false;
        body = span_from(body, strlen(PARAMETER) + n + 1);
        size_t end = value_end(body, 0, properties, &next);
        struct span value = without_newlines((struct span){ body.at, end });
        json_t *v = typed(value, json_object_get(properties, key), parameters);
        /* Text that is not UTF-8 cannot become an argument. */
        if (!v || json_object_set_new(arguments, key, v) != 0) return false;
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
    char name[NAME_BYTES_MAX];
    size_t n = read_name(name, span_from(s, strlen(FUNCTION)));
    if (n == 0) {
        bool may_come = !final && s.bytes < strlen(FUNCTION) + NAME_BYTES_MAX &&
                        !memchr(s.at, '\n', s.bytes) && !memchr(s.at, '>', s.bytes);
        return may_come ? CALL_WAIT : CALL_NONE;
    }
    size_t body = strlen(FUNCTION) + n + 1, end = s.bytes;
    if (search->from < body) search->from = body;
    for (;;) {
        size_t close = find(s, END_FUNCTION, search->from), bare = find(s, CLOSE, search->from);
        if (bare < close) { /* </tool_call> without </function> */
            struct span inside = trim((struct span){ s.at + body, bare - body });
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
    json_t *v = parse_json(trim(text)), *arguments = json_object_get(v, "arguments");
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
