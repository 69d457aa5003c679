/* Tool calls in the form of Qwen3's chat template:
 *   <tool_call>\n<function=NAME>\n(<parameter=KEY>\nVALUE\n</parameter>\n)*</function>\n</tool_call>
 * calls apart by a newline. Source: the model's chat template; tokenizer/reply.c reads it back. */
#include "grammar/grammar.h"
#include "grammar/schema.h"
#include "grammar/text.h"
#include <string.h>

enum { TOOLS_MAX = 1024, NAME_BYTES_MAX = 256, NESTING_MAX = 8 };

static int32_t text_without_tag(struct rules *r, const char *tag)
{
    return text_without(r, &tag, 1);
}

struct caller {
    struct schema s;
    int32_t text; /* without </parameter> */
};

static int32_t value(struct caller *c, const json_t *schema, int depth);

static bool has(const json_t *schema, const char *key)
{
    return json_object_get(schema, key);
}

static int32_t choices(struct caller *c, const json_t *flat, const char *keyword, int depth)
{
    struct expr_list parts = { 0 };
    const json_t *list = json_object_get(flat, keyword);
    if (!json_is_array(list)) return schema_refuse(&c->s, keyword, "must be a list");
    json_t *base = json_copy((json_t *)flat);
    json_object_del(base, keyword);
    for (size_t i = 0; i < json_array_size(list) && !c->s.r->failed; i++) {
        json_t *whole = json_pack("{s:[O,O]}", "allOf", base, json_array_get(list, i));
        expr_list_add(c->s.r, &parts, value(c, whole, depth + 1));
        json_decref(whole);
    }
    json_decref(base);
    return expr_list_alt(c->s.r, &parts);
}

static bool is_free(const json_t *flat)
{
    return !has(flat, "minLength") && !has(flat, "maxLength") && !has(flat, "pattern") &&
           !has(flat, "format");
}

/* A value that may be a string among others: the string raw, the others as JSON. */
static int32_t typed(struct caller *c, const json_t *flat, unsigned types)
{
    struct schema *s = &c->s;
    int32_t text = is_free(flat) ? c->text : schema_string(s, flat, CHARS_TAGGED), others = expr_none(s->r);
    json_t *rest = json_array();
    static const char *const names[] = { "null", "boolean", "integer", "number", "", "array", "object" };
    for (int i = 0; i < 7; i++)
        if (types >> i & 1 && names[i][0]) json_array_append_new(rest, json_string(names[i]));
    if (json_array_size(rest) && has(flat, "type")) {
        json_t *copy = json_copy((json_t *)flat);
        json_object_set(copy, "type", rest);
        json_object_del(copy, "nullable");
        others = schema_expr(s, copy, "%s", "");
        json_decref(copy);
    }
    json_decref(rest);
    return ALT(s->r, text, others);
}

/* enum or const, raw where it is a string. */
static int32_t listed(struct caller *c, const json_t *flat)
{
    const json_t *list = json_object_get(flat, "enum"), *one = json_object_get(flat, "const");
    for (size_t i = 0; i < json_array_size(list) + (one ? 1 : 0); i++) {
        const char *text = json_string_value(i < json_array_size(list) ? json_array_get(list, i) : one);
        if (text && strchr(text, '<'))
            return schema_refuse(&c->s, "enum", "with < in a string is not supported in calls");
    }
    return schema_values(&c->s, flat, CHARS_TAGGED);
}

static int32_t value(struct caller *c, const json_t *schema, int depth)
{
    struct schema *s = &c->s;
    json_t *flat = schema_flatten(s, schema);
    int32_t x = 0;
    if (depth > NESTING_MAX)
        rules_fail(s->r, ERR_LIMIT, "schema, %.300s: anyOf is nested more than %d deep", s->path,
                   NESTING_MAX);
    else if (flat && !json_is_object(flat))
        x = json_is_true(flat) ? c->text : expr_none(s->r);
    else if (flat) {
        unsigned about = schema_check_keywords(s, flat),
                 types = has(flat, "type") ? schema_types(s, flat) : about;
        if (s->r->failed)
            x = 0;
        else if (has(flat, "anyOf"))
            x = choices(c, flat, "anyOf", depth);
        else if (has(flat, "enum") || has(flat, "const"))
            x = listed(c, flat);
        else if (types == 0 && !has(flat, "oneOf"))
            x = c->text;
        else if (types & TYPE_STRING)
            x = typed(c, flat, types);
        else
            x = schema_expr(s, flat, "%s", "");
    }
    json_decref(flat);
    return x;
}

static bool check_name(struct schema *s, const char *what, const char *name)
{
    bool ok = name && *name && strlen(name) <= NAME_BYTES_MAX;
    for (const char *p = name; ok && *p; p++) ok = (unsigned char)*p >= ' ' && *p != '>' && *p != '<';
    return ok ||
           rules_fail(s->r, ERR_ARGUMENT,
                      "tools: the name of a %s must be 1 to %d bytes without < > and control characters",
                      what, NAME_BYTES_MAX);
}

static bool is_required(const json_t *schema, const char *name)
{
    const json_t *list = json_object_get(schema, "required");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *x = json_string_value(json_array_get(list, i));
        if (x && strcmp(x, name) == 0) return true;
    }
    return false;
}

static int32_t parameter(struct caller *c, const char *name, const json_t *schema, bool required)
{
    struct schema *s = &c->s;
    struct rules *r = s->r;
    char path[700];
    const char *before = s->path;
    if (!check_name(s, "parameter", name)) return 0;
    snprintf(path, sizeof path, "%.300s/properties/%s", before, name);
    s->path = path;
    int32_t rule = rules_add(r, path, value(c, schema, 0));
    s->path = before;
    int32_t x = SEQ(r, expr_text(r, "<parameter="), expr_text(r, name), expr_text(r, ">\n"),
                    expr_call(r, rule), expr_text(r, "\n</parameter>\n"));
    return required ? x : OPTIONAL(r, x);
}

static int32_t parameters(struct caller *c, const json_t *flat)
{
    static const char *const known[] = { "type", "properties", "required", "additionalProperties", "$id" };
    struct schema *s = &c->s;
    const char *key;
    json_t *x;
    struct expr_list parts = { 0 };
    json_object_foreach((json_t *)flat, key, x)
    {
        bool is_known = schema_is_annotation(key);
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            is_known = is_known || strcmp(known[i], key) == 0;
        if (!is_known) {
            char name[100];
            snprintf(name, sizeof name, "%s", key);
            return schema_refuse(s, name, "of a function's parameters is not supported");
        }
    }
    const json_t *properties = json_object_get(flat, "properties"),
                 *required = json_object_get(flat, "required");
    if (!(schema_types(s, flat) & TYPE_OBJECT))
        schema_refuse(s, "type", "of a function's parameters must be object");
    json_object_foreach((json_t *)properties, key, x)
        expr_list_add(s->r, &parts, parameter(c, key, x, is_required(flat, key)));
    for (size_t i = 0; i < json_array_size(required) && !s->r->failed; i++) {
        const char *name = json_string_value(json_array_get(required, i));
        if (name && !json_object_get(properties, name))
            schema_refuse(s, "required", "names '%.100s', which is not among properties", name);
    }
    return expr_list_seq(s->r, &parts);
}

static int32_t function(struct caller *c, const json_t *f, const char *name)
{
    struct schema *s = &c->s;
    struct rules *r = s->r;
    const json_t *schema = json_object_get(f, "parameters");
    char path[400];
    if (!check_name(s, "function", name)) return 0;
    snprintf(path, sizeof path, "%s.parameters", name);
    schema_set_root(s, schema ? schema : json_true(), path);
    json_t *flat = schema ? schema_flatten(s, schema) : json_object();
    int32_t list = flat ? parameters(c, flat) : 0;
    schema_finish(s);
    json_decref(flat);
    return SEQ(r, expr_text(r, name), expr_text(r, ">\n"), list);
}

static int32_t functions(struct caller *c, const json_t *tools, const char *wanted)
{
    struct expr_list parts = { 0 };
    struct rules *r = c->s.r;
    if (!json_is_array(tools) || json_array_size(tools) > TOOLS_MAX)
        rules_fail(r, ERR_ARGUMENT, "tools: must be a list of at most %d functions", TOOLS_MAX);
    for (size_t i = 0; i < json_array_size(tools) && !r->failed; i++) {
        const json_t *tool = json_array_get(tools, i), *f = json_object_get(tool, "function");
        if (!f) f = tool;
        const char *name = json_string_value(json_object_get(f, "name"));
        if (!wanted || (name && strcmp(name, wanted) == 0)) expr_list_add(r, &parts, function(c, f, name));
    }
    if (!r->failed && parts.n == 0)
        rules_fail(r, ERR_ARGUMENT,
                   wanted ? "tools: there is no function '%.100s'" : "tools: the list is empty", wanted);
    return expr_list_alt(r, &parts);
}

bool grammar_from_tool_calls(struct grammar **out, const json_t *tools, const struct tool_call_options *o,
                             struct err *e)
{
    struct rules r;
    struct caller c;
    *out = NULL;
    rules_init(&r, e);
    schema_init(&c.s, &r);
    c.text = text_without_tag(&r, "</parameter>");
    int32_t any = functions(&c, tools, o->name);
    int32_t call = expr_call(&r, rules_add(&r, "call",
                                           SEQ(&r, expr_text(&r, "<tool_call>\n<function="), any,
                                               expr_text(&r, "</function>\n</tool_call>"))));
    int32_t newline = expr_text(&r, "\n");
    int32_t calls = o->only_one ? call : SEQ(&r, call, expr_repeat(&r, SEQ(&r, newline, call), 0, -1));
    int32_t before = o->is_optional ? text_without_tag(&r, "<tool_call>") : expr_repeat(&r, newline, 0, 2);
    int32_t all = SEQ(&r, before, o->is_optional ? OPTIONAL(&r, calls) : calls);
    bool ok = rules_compile(out, &r, rules_add(&r, "tool calls", all));
    schema_deinit(&c.s);
    rules_deinit(&r);
    return ok;
}
