#include "server/constraint.h"
#include "server/fields.h"
#include "base/doc.h"
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of several grammars an answer follows any: the form asked for, or calls of tools instead. */
enum { GRAMMARS_MAX = 2 };

struct grammar_share {
    struct grammar *grammars[GRAMMARS_MAX];
    int n;
    atomic_int holders; /* answers are let go of on the scheduler's thread */
    atomic_bool is_stuck;
};

static bool share(struct grammar_share **out, struct grammar *g, struct fault *f)
{
    if (!*out) *out = calloc(1, sizeof **out);
    if (!*out) {
        grammar_free(g);
        return fault_memory(f);
    }
    (*out)->holders = 1;
    (*out)->grammars[(*out)->n++] = g;
    return true;
}

void grammar_share_release(struct grammar_share *g)
{
    if (!g || atomic_fetch_sub(&g->holders, 1) > 1) return;
    for (int i = 0; i < g->n; i++) grammar_free(g->grammars[i]);
    free(g);
}

bool grammar_share_is_stuck(const struct grammar_share *g)
{
    return g && atomic_load(&g->is_stuck);
}

/* What the fields ask for, before it is compiled. */
struct wish {
    enum { WISH_NONE, WISH_OBJECT, WISH_SCHEMA, WISH_REGEX, WISH_CHOICE, WISH_EBNF, WISH_TAG } kind;
    const json_t *value;
    char param[80];
};

static bool wish(struct wish *w, int kind, const json_t *value, const char *param, struct fault *f)
{
    if (!value || json_is_null(value)) return true;
    if (w->kind != WISH_NONE)
        return fault_set(f, param, "%s: the form of the answer is given twice, by %s too", param, w->param);
    w->kind = kind;
    w->value = value;
    snprintf(w->param, sizeof w->param, "%s", param);
    return true;
}

static bool read_response_format(struct wish *w, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *format = NULL;
    const char *type = "";
    if (!fields_object(&in, "response_format", &format) || !format) return !f->status;
    const struct fields inside = { format, "response_format.", f };
    if (!fields_text(&inside, "type", &type)) return false;
    if (strcmp(type, "text") == 0) return true;
    if (strcmp(type, "json_object") == 0) return wish(w, WISH_OBJECT, format, "response_format", f);
    if (strcmp(type, "json_schema") == 0) {
        const json_t *named = json_object_get(format, "json_schema"),
                     *schema = json_object_get(named, "schema");
        if (!json_is_object(schema) && !json_is_boolean(schema))
            return fields_wrong(f, "response_format.json_schema.schema", "a JSON schema", schema);
        return wish(w, WISH_SCHEMA, schema, "response_format.json_schema.schema", f);
    }
    if (strcmp(type, "structural_tag") == 0) return wish(w, WISH_TAG, format, "response_format", f);
    return fault_set(f, "response_format.type",
                     "response_format.type: expected text, json_object, json_schema or structural_tag, found "
                     "\"%.40s\"",
                     type);
}

static bool read_structured_outputs(struct wish *w, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *o = NULL;
    bool object = false;
    if (!fields_object(&in, "structured_outputs", &o) || !o) return !f->status;
    const struct fields inside = { o, "structured_outputs.", f };
    return fields_bool(&inside, "json_object", &object) &&
           (!object || wish(w, WISH_OBJECT, o, "structured_outputs.json_object", f)) &&
           wish(w, WISH_SCHEMA, json_object_get(o, "json"), "structured_outputs.json", f) &&
           wish(w, WISH_REGEX, json_object_get(o, "regex"), "structured_outputs.regex", f) &&
           wish(w, WISH_CHOICE, json_object_get(o, "choice"), "structured_outputs.choice", f) &&
           wish(w, WISH_EBNF, json_object_get(o, "grammar"), "structured_outputs.grammar", f) &&
           wish(w, WISH_TAG, json_object_get(o, "structural_tag"), "structured_outputs.structural_tag", f);
}

static bool read_guided(struct wish *w, const json_t *body, struct fault *f)
{
    return wish(w, WISH_SCHEMA, json_object_get(body, "guided_json"), "guided_json", f) &&
           wish(w, WISH_REGEX, json_object_get(body, "guided_regex"), "guided_regex", f) &&
           wish(w, WISH_CHOICE, json_object_get(body, "guided_choice"), "guided_choice", f) &&
           wish(w, WISH_EBNF, json_object_get(body, "guided_grammar"), "guided_grammar", f);
}

/* A schema, and a structural tag, may come as a text that holds it. */
static bool compile_json(struct grammar **out, const struct wish *w,
                         bool (*from)(struct grammar **, const json_t *, struct err *), struct err *e)
{
    json_t *parsed;
    if (!json_is_string(w->value)) return from(out, w->value, e);
    if (!doc_parse(&parsed, json_string_value(w->value), json_string_length(w->value), e)) return false;
    bool ok = from(out, parsed, e);
    json_decref(parsed);
    return ok;
}

static bool compile_choices(struct grammar **out, const struct wish *w, struct err *e)
{
    size_t n = json_array_size(w->value);
    if (n == 0 || n > 100000) return err_set(e, ERR_ARGUMENT, "expected an array of 1 to 100000 strings");
    const char **choices = calloc(n, sizeof *choices);
    if (!choices) return err_memory(e, "choices", n * sizeof *choices);
    bool ok = true;
    for (size_t i = 0; ok && i < n; i++) {
        choices[i] = json_string_value(json_array_get(w->value, i));
        ok = choices[i] || err_set(e, ERR_ARGUMENT, "[%zu]: expected a string", i);
    }
    ok = ok && grammar_from_choices(out, choices, (int)n, e);
    free(choices);
    return ok;
}

static bool compile(struct grammar **out, const struct wish *w, struct err *e)
{
    if (w->kind == WISH_OBJECT) return grammar_from_json_object(out, e);
    if (w->kind == WISH_SCHEMA) return compile_json(out, w, grammar_from_schema, e);
    if (w->kind == WISH_TAG) return compile_json(out, w, grammar_from_structural_tag, e);
    if (w->kind == WISH_CHOICE) return compile_choices(out, w, e);
    if (!json_is_string(w->value)) return err_set(e, ERR_ARGUMENT, "expected a string");
    const char *text = json_string_value(w->value);
    size_t n = json_string_length(w->value);
    return w->kind == WISH_REGEX ? grammar_from_regex(out, text, n, e) : grammar_from_ebnf(out, text, n, e);
}

static bool read_form(struct grammar_share **out, const json_t *body, bool *has_form, struct fault *f)
{
    struct wish w = { .kind = WISH_NONE };
    struct grammar *g;
    struct err e = { 0 };
    if (!read_response_format(&w, body, f) || !read_structured_outputs(&w, body, f) ||
        !read_guided(&w, body, f))
        return false;
    *has_form = w.kind != WISH_NONE;
    if (!*has_form) return true;
    if (!compile(&g, &w, &e)) {
        err_note(&e, "%s", w.param);
        return fault_from_err(f, w.param, &e);
    }
    return share(out, g, f);
}

/* Whether a call must come, and of which function. */
struct choice_of_tool {
    bool is_forced;
    const char *name; /* NULL: any */
};

static const json_t *function_of(const json_t *tools, size_t i)
{
    return json_object_get(json_array_get(tools, i), "function");
}

static bool has_tool(const json_t *tools, const char *name)
{
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const char *own = json_string_value(json_object_get(function_of(tools, i), "name"));
        if (own && strcmp(own, name) == 0) return true;
    }
    return false;
}

static bool is_strict(const json_t *tools)
{
    for (size_t i = 0; i < json_array_size(tools); i++)
        if (json_is_true(json_object_get(function_of(tools, i), "strict"))) return true;
    return false;
}

static bool read_tool_choice(struct choice_of_tool *out, const json_t *body, const json_t *tools,
                             struct fault *f)
{
    static const char param[] = "tool_choice";
    const struct fields in = { body, "", f };
    const json_t *choice = fields_get(&in, param);
    const char *word = json_string_value(choice);
    if (!choice || (word && (strcmp(word, "auto") == 0 || strcmp(word, "none") == 0))) return true;
    if (word && strcmp(word, "required") != 0)
        return fault_set(f, param, "%s: expected none, auto, required or a function, found \"%.40s\"", param,
                         word);
    out->is_forced = true;
    if (!word) {
        const json_t *name = json_object_get(json_object_get(choice, "function"), "name");
        if (!json_is_string(name)) return fields_wrong(f, "tool_choice.function.name", "a string", name);
        out->name = json_string_value(name);
        if (!has_tool(tools, out->name))
            return fault_set(f, "tool_choice.function.name", "tool_choice: there is no tool \"%.60s\"",
                             out->name);
    }
    return json_array_size(tools) > 0 || fault_set(f, param, "%s: there are no tools to call", param);
}

/* Calls are constrained where one must come, where a tool is strict, and where an answer without one has a
 * form. */
static bool read_calls(struct grammar_share **out, const json_t *body, const json_t *tools, bool has_form,
                       struct fault *f)
{
    struct choice_of_tool c = { 0 };
    struct grammar *g;
    struct err e = { 0 };
    if (!read_tool_choice(&c, body, tools, f)) return false;
    if (c.is_forced && has_form)
        return fault_set(f, "tool_choice",
                         "tool_choice: an answer cannot be a call and have another form as well");
    if (json_array_size(tools) == 0 || !(c.is_forced || has_form || is_strict(tools))) return true;
    const struct tool_call_options o = { .name = c.name,
                                         .only_one =
                                             json_is_false(json_object_get(body, "parallel_tool_calls")),
                                         .is_optional = !c.is_forced && !has_form };
    if (!grammar_from_tool_calls(&g, tools, &o, &e)) return fault_from_err(f, "tools", &e);
    return share(out, g, f);
}

bool constraint_read(struct grammar_share **out, const json_t *body, const json_t *tools, struct fault *f)
{
    bool has_form = false;
    *out = NULL;
    return read_form(out, body, &has_form, f) && read_calls(out, body, tools, has_form, f);
}

/* On the scheduler's thread. */
struct follower {
    struct constraint constraint;
    const struct api *api;
    struct grammar_share *share;
    struct matcher *matchers[GRAMMARS_MAX]; /* NULL: the answer is none of this grammar */
    uint32_t *bits;                         /* of one of several */
    int newlines;                           /* that may still come before the answer */
};

static void mask_grammars(struct follower *w, uint32_t *bits, int64_t n_vocab)
{
    size_t words = (size_t)(n_vocab + 31) / 32;
    if (w->share->n == 1) {
        matcher_mask(w->matchers[0], bits, n_vocab);
        return;
    }
    uint32_t *either = w->bits, *one = w->bits + words;
    memset(either, 0, words * sizeof *either);
    for (int i = 0; i < w->share->n; i++) {
        if (!w->matchers[i]) continue;
        memset(one, 0xff, words * sizeof *one);
        matcher_mask(w->matchers[i], one, n_vocab);
        for (size_t k = 0; k < words; k++) either[k] |= one[k];
    }
    for (size_t k = 0; k < words; k++) bits[k] &= either[k];
}

/* Behind </think> models write two newlines, which belong to nobody's grammar. */
static void mask(void *state, uint32_t *bits, int64_t n_vocab)
{
    struct follower *w = state;
    uint32_t kept[2] = { 0, 0 };
    for (int i = 0; i < w->newlines; i++) {
        int32_t id = w->api->newlines[i];
        if (id >= 0) kept[i] = bits[id / 32] & 1u << id % 32;
    }
    mask_grammars(w, bits, n_vocab);
    for (int i = 0; i < w->newlines; i++)
        if (kept[i]) bits[w->api->newlines[i] / 32] |= kept[i];
}

static bool take_newlines(struct follower *w, int32_t id)
{
    for (int i = 0; i < w->newlines; i++) {
        if (id != w->api->newlines[i]) continue;
        w->newlines -= i + 1;
        return true;
    }
    w->newlines = 0;
    return false;
}

static bool advance(void *state, int32_t id)
{
    struct follower *w = state;
    bool more = false, is_stuck = true;
    if (take_newlines(w, id)) return true;
    for (int i = 0; i < w->share->n; i++) {
        if (w->matchers[i] && !matcher_advance(w->matchers[i], id)) {
            matcher_free(w->matchers[i]);
            w->matchers[i] = NULL;
        }
        if (!w->matchers[i]) continue;
        more |= !matcher_must_end(w->matchers[i]);
        is_stuck &= matcher_is_stuck(w->matchers[i]);
    }
    if (is_stuck) atomic_store(&w->share->is_stuck, true);
    return more;
}

static void release(void *state)
{
    struct follower *w = state;
    for (int i = 0; i < GRAMMARS_MAX; i++) matcher_free(w->matchers[i]);
    grammar_share_release(w->share);
    free(w->bits);
    free(w);
}

bool constraint_create(struct constraint **out, struct grammar_share *g, const struct api *a,
                       bool in_reasoning, struct err *e)
{
    struct follower *w = calloc(1, sizeof *w);
    size_t words = (size_t)(a->o.config->vocab_size + 31) / 32;
    *out = NULL;
    if (!w) return err_memory(e, "a constraint", sizeof *w);
    atomic_fetch_add(&g->holders, 1);
    w->share = g;
    w->api = a;
    w->newlines = in_reasoning ? 2 : 0;
    w->constraint = (struct constraint){ .state = w, .mask = mask, .advance = advance, .free = release };
    w->bits = malloc(2 * words * sizeof *w->bits);
    bool ok = w->bits || err_memory(e, "a constraint", words);
    for (int i = 0; ok && i < g->n; i++) ok = matcher_create(&w->matchers[i], g->grammars[i], a->trie, e);
    if (ok)
        *out = &w->constraint;
    else
        release(w);
    return ok;
}
