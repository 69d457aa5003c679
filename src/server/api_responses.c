/* /v1/responses: its input items as a chat, the answer as output items and events; what is kept of it, where
 * the server keeps responses. Source: OpenAI's API reference, "Responses" and "Streaming". */
#include "server/api_routes.h"
#include "server/body.h"
#include "base/doc.h"
#include <sys/random.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The request. */

static bool set(json_t *object, const char *key, json_t *value, struct fault *f)
{
    return json_object_set_new(object, key, value) == 0 || fault_memory(f);
}

static bool copy(json_t *to, const char *as, const json_t *from, const char *key, struct fault *f)
{
    json_t *v = json_object_get(from, key);
    return !v || json_is_null(v) || json_object_set(to, as, v) == 0 || fault_memory(f);
}

static bool append(json_t *list, json_t *item, struct fault *f)
{
    return json_array_append_new(list, item) == 0 || fault_memory(f);
}

static const char *type_of(const json_t *item)
{
    const char *type = json_string_value(json_object_get(item, "type"));
    return type ? type : json_object_get(item, "role") ? "message" : "nothing";
}

/* Parts of content: input_text, output_text, input_image as those of chats. */
static bool add_part(json_t *parts, const json_t *part, const char *param, struct fault *f)
{
    const char *type = type_of(part);
    bool is_image = strcmp(type, "input_image") == 0, is_refusal = strcmp(type, "refusal") == 0;
    if (!is_image && !is_refusal && strcmp(type, "input_text") != 0 && strcmp(type, "output_text") != 0 &&
        strcmp(type, "text") != 0)
        return fault_set(
            f, param, "%s: expected a part of type input_text, output_text or input_image, found \"%.40s\"",
            param, type);
    const char *key = is_image ? "image_url" : is_refusal ? "refusal" : "text";
    json_t *v = json_object_get(part, key);
    struct param at;
    param_set(&at, "%s.%s", param, key);
    if (!json_is_string(v)) return fields_wrong(f, at.text, "a string", v);
    return append(
        parts, json_pack("{s:s, s:O}", "type", is_image ? "image_url" : "text", is_image ? key : "text", v),
        f);
}

/* A string, or an array of parts; into message.content. */
static bool add_content(json_t *message, const json_t *content, const char *param, struct fault *f)
{
    if (json_is_string(content))
        return json_object_set(message, "content", (json_t *)content) == 0 || fault_memory(f);
    if (!json_is_array(content)) return fields_wrong(f, param, "a string or an array of parts", content);
    json_t *parts = json_array();
    if (!set(message, "content", parts, f)) return false;
    for (size_t i = 0; i < json_array_size(content); i++) {
        struct param at;
        param_set(&at, "%s[%zu]", param, i);
        if (!add_part(parts, json_array_get(content, i), at.text, f)) return false;
    }
    return true;
}

/* What an assistant said comes in several items: reasoning, text, calls make one message of a chat. NULL: out
 * of memory. */
static json_t *assistant(json_t *messages, bool begins)
{
    json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    const char *role = json_string_value(json_object_get(last, "role"));
    if (!begins && role && strcmp(role, "assistant") == 0) return last;
    last = json_pack("{s:s}", "role", "assistant");
    return json_array_append_new(messages, last) == 0 ? last : NULL;
}

static bool add_message(json_t *messages, const json_t *item, const char *param, struct fault *f)
{
    const json_t *role = json_object_get(item, "role");
    bool is_assistant = json_is_string(role) && strcmp(json_string_value(role), "assistant") == 0;
    struct param at;
    param_set(&at, "%s.role", param);
    if (!json_is_string(role)) return fields_wrong(f, at.text, "a string", role);
    json_t *last = json_array_get(messages, json_array_size(messages) - 1), *message;
    if (is_assistant) {
        message =
            assistant(messages, json_object_get(last, "content") || json_object_get(last, "tool_calls"));
    } else {
        message = json_pack("{s:O}", "role", role);
        if (json_array_append_new(messages, message) != 0) message = NULL;
    }
    param_set(&at, "%s.content", param);
    return message ? add_content(message, json_object_get(item, "content"), at.text, f) : fault_memory(f);
}

static bool add_call(json_t *messages, const json_t *item, const char *param, struct fault *f)
{
    json_t *message = assistant(messages, false), *calls = json_object_get(message, "tool_calls");
    json_t *name = json_object_get(item, "name"), *arguments = json_object_get(item, "arguments");
    struct param at;
    param_set(&at, "%s.name", param);
    if (!message) return fault_memory(f);
    if (!json_is_string(name)) return fields_wrong(f, at.text, "a string", name);
    param_set(&at, "%s.arguments", param);
    if (!json_is_string(arguments)) return fields_wrong(f, at.text, "a JSON object as a string", arguments);
    if (!calls) {
        calls = json_array();
        if (!set(message, "tool_calls", calls, f)) return false;
    }
    return append(calls,
                  json_pack("{s:s, s:{s:O, s:O}}", "type", "function", "function", "name", name, "arguments",
                            arguments),
                  f);
}

static bool add_output(json_t *messages, const json_t *item, const char *param, struct fault *f)
{
    json_t *message = json_pack("{s:s}", "role", "tool");
    struct param at;
    param_set(&at, "%s.output", param);
    return append(messages, message, f) && add_content(message, json_object_get(item, "output"), at.text, f);
}

static bool add_reasoning(json_t *messages, const json_t *item, struct fault *f)
{
    const json_t *content = json_object_get(item, "content");
    if (json_array_size(content) == 0) content = json_object_get(item, "summary");
    struct json_out all = { 0 };
    for (size_t i = 0; i < json_array_size(content); i++) {
        const json_t *text = json_object_get(json_array_get(content, i), "text");
        if (json_is_string(text)) json_out_raw(&all, json_string_value(text), json_string_length(text));
    }
    json_t *message = all.n ? assistant(messages, true) : NULL;
    bool ok = all.n == 0 || (message && set(message, "reasoning_content", json_stringn(all.data, all.n), f));
    json_out_deinit(&all);
    return ok || fault_memory(f);
}

static bool add_item(json_t *messages, const json_t *item, const char *param, struct fault *f)
{
    const char *type = type_of(item);
    if (strcmp(type, "message") == 0) return add_message(messages, item, param, f);
    if (strcmp(type, "function_call") == 0) return add_call(messages, item, param, f);
    if (strcmp(type, "function_call_output") == 0) return add_output(messages, item, param, f);
    if (strcmp(type, "reasoning") == 0) return add_reasoning(messages, item, f);
    return fault_set(
        f, param,
        "%s: expected an item of type message, function_call, function_call_output or reasoning, found "
        "\"%.40s\"",
        param, type);
}

static bool unknown_response(struct fault *f, int status, const char *id)
{
    return fault_status(
        f, status, status == 400 ? "previous_response_not_found" : "not_found",
        "response '%.80s' is not here: it was not kept, is too old, or has made room for others", id);
}

/* The conversation that ends with a response that was kept. */
static bool add_previous(json_t *messages, const struct exchange *x, struct fault *f)
{
    const struct fields in = { x->body, "", f };
    const char *id = NULL;
    struct err e = { 0 };
    json_t *before = NULL;
    if (!fields_text(&in, "previous_response_id", &id) || !id) return !f->status;
    if (!x->api->store)
        return fault_set(
            f, "previous_response_id",
            "previous_response_id: this server keeps no responses; start it with --response-store 64M, "
            "or send the conversation as input items");
    const struct stored_response *r = response_store_get(x->api->store, id, x->owner);
    if (!r) {
        unknown_response(f, 400, id);
        param_set(&f->param, "previous_response_id");
        return false;
    }
    bool ok = body_values(r->messages, r->messages_bytes) <= BODY_VALUES_MAX ||
              fault_status(f, 413, NULL, "the conversation of '%.80s' has more than %d values", id,
                           BODY_VALUES_MAX);
    ok = ok && (doc_parse(&before, r->messages, r->messages_bytes, &e) ||
                fault_from_err(f, "previous_response_id", &e));
    ok = ok && (json_array_extend(messages, before) == 0 || fault_memory(f));
    json_decref(before);
    response_store_release(r);
    return ok;
}

static bool add_instructions(json_t *messages, const json_t *body, struct fault *f)
{
    json_t *instructions = json_object_get(body, "instructions");
    if (!instructions || json_is_null(instructions)) return true;
    if (!json_is_string(instructions)) return fields_wrong(f, "instructions", "a string", instructions);
    return append(messages, json_pack("{s:s, s:O}", "role", "system", "content", instructions), f);
}

static bool add_input(json_t *messages, const json_t *body, struct fault *f)
{
    json_t *input = json_object_get(body, "input");
    if (json_is_string(input))
        return append(messages, json_pack("{s:s, s:O}", "role", "user", "content", input), f);
    if (!json_is_array(input)) return fields_wrong(f, "input", "a string or an array of items", input);
    for (size_t i = 0; i < json_array_size(input); i++) {
        struct param at;
        param_set(&at, "input[%zu]", i);
        if (!add_item(messages, json_array_get(input, i), at.text, f)) return false;
    }
    return true;
}

static bool add_messages(struct exchange *x)
{
    struct fault *f = &x->fault;
    json_t *messages = json_array();
    return set(x->chat, "messages", messages, f) && add_instructions(messages, x->body, f) &&
           add_previous(messages, x, f) && add_input(messages, x->body, f);
}

static bool add_tools(json_t *chat, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *given = NULL, *choice = fields_get(&in, "tool_choice");
    json_t *tools = json_array();
    if (!set(chat, "tools", tools, f) || !fields_array(&in, "tools", &given)) return false;
    for (size_t i = 0; i < json_array_size(given); i++) {
        json_t *tool = json_array_get(given, i);
        struct param at;
        param_set(&at, "tools[%zu].type", i);
        if (strcmp(type_of(tool), "function") != 0)
            return fault_set(
                f, at.text,
                "%s: expected \"function\", found \"%.40s\": only tools that the caller runs are "
                "known",
                at.text, type_of(tool));
        if (!append(tools, json_pack("{s:s, s:O}", "type", "function", "function", tool), f)) return false;
    }
    if (!json_is_object(choice)) return copy(chat, "tool_choice", body, "tool_choice", f);
    if (strcmp(type_of(choice), "function") != 0)
        return fault_set(f, "tool_choice.type", "tool_choice.type: expected \"function\", found \"%.40s\"",
                         type_of(choice));
    return set(chat, "tool_choice", json_pack("{s:s, s:O}", "type", "function", "function", choice), f);
}

/* text.format, flat here, nested there */
static bool add_format(json_t *chat, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *text = NULL, *found = NULL;
    if (!fields_object(&in, "text", &text)) return false;
    const struct fields inside = { text, "text.", f };
    if (!fields_object(&inside, "format", &found) || !found) return !f->status;
    json_t *format = (json_t *)found;
    if (strcmp(type_of(format), "json_schema") == 0)
        return set(chat, "response_format",
                   json_pack("{s:s, s:O}", "type", "json_schema", "json_schema", format), f);
    return json_object_set(chat, "response_format", format) == 0 || fault_memory(f);
}

static bool refuse(const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *include = NULL;
    if (!fields_array(&in, "include", &include)) return false;
    for (size_t i = 0; i < json_array_size(include); i++) {
        const char *what = json_string_value(json_array_get(include, i));
        if (what && strcmp(what, "message.output_text.logprobs") == 0)
            return fault_set(f, "include", "include: log-probabilities come from /v1/chat/completions");
    }
    return fields_refuse(&in, "conversation", "go on with previous_response_id, or send it as input items") &&
           fields_refuse(&in, "prompt", "no prompts are stored; send instructions and input") &&
           fields_refuse(&in, "background", "an answer is made while its client waits; stream it") &&
           fields_refuse(&in, "top_logprobs", "log-probabilities come from /v1/chat/completions");
}

static bool make_chat(struct exchange *x)
{
    static const char *const same[] = { "model", "stream", "temperature",         "top_p",      "top_k",
                                        "min_p", "seed",   "parallel_tool_calls", "cache_salt", "priority" };
    const json_t *body = x->body, *reasoning = NULL;
    const struct fields in = { body, "", &x->fault };
    x->chat = json_object();
    if (!x->chat) return fault_memory(&x->fault);
    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (!copy(x->chat, same[i], body, same[i], &x->fault)) return false;
    return refuse(body, &x->fault) && fields_object(&in, "reasoning", &reasoning) &&
           copy(x->chat, "reasoning_effort", reasoning, "effort", &x->fault) &&
           copy(x->chat, "max_tokens", body, "max_output_tokens", &x->fault) &&
           add_format(x->chat, body, &x->fault) && add_tools(x->chat, body, &x->fault) && add_messages(x);
}

/* The answer. */

struct items {
    char id[RESPONSE_ID_MAX];
    bool is_kept;
    int64_t sequence;    /* of events */
    int n;               /* items begun */
    enum part_kind open; /* of the last one; PART_NONE: none is open */
    size_t from;         /* where its text begins in the choice's */
    size_t said[3];      /* of the choice's text, by kind */
};

static void write_id(struct exchange *x, const char *key, const char *prefix, int index)
{
    char id[120];
    snprintf(id, sizeof id, "%s_%s_%d", prefix, x->request_id, index);
    json_out_key_text(&x->out, key, id);
}

static const char *prefix_of(enum part_kind kind)
{
    return kind == PART_REASONING ? "rs" : "msg";
}

/* The part inside of an item of text. */
static void write_part(struct exchange *x, enum part_kind kind, const char *text, size_t n)
{
    struct json_out *o = &x->out;
    json_out_open(o, '{');
    json_out_key_text(o, "type", kind == PART_REASONING ? "reasoning_text" : "output_text");
    json_out_key_string(o, "text", text, n);
    if (kind == PART_CONTENT) {
        json_out_key_open(o, "annotations", '[');
        json_out_close(o, ']');
        json_out_key_open(o, "logprobs", '[');
        json_out_close(o, ']');
    }
    json_out_close(o, '}');
}

/* An item of text; text NULL: just begun. */
static void write_text_item(struct exchange *x, enum part_kind kind, int index, const char *text, size_t n,
                            const char *status)
{
    struct json_out *o = &x->out;
    json_out_open(o, '{');
    write_id(x, "id", prefix_of(kind), index);
    json_out_key_text(o, "type", kind == PART_REASONING ? "reasoning" : "message");
    json_out_key_text(o, "status", status);
    if (kind == PART_REASONING) {
        json_out_key_open(o, "summary", '[');
        json_out_close(o, ']');
    } else {
        json_out_key_text(o, "role", "assistant");
    }
    json_out_key_open(o, "content", '[');
    if (text) write_part(x, kind, text, n);
    json_out_close(o, ']');
    json_out_close(o, '}');
}

static void write_call_item(struct exchange *x, const struct choice *c, int call, int index, bool whole)
{
    struct json_out *o = &x->out;
    const struct tool_call *t = &c->calls[call];
    json_out_open(o, '{');
    write_id(x, "id", "fc", index);
    json_out_key_text(o, "type", "function_call");
    json_out_key_text(o, "status", !whole ? "in_progress" : t->is_cut ? "incomplete" : "completed");
    write_id(x, "call_id", "call", call);
    json_out_key_text(o, "name", t->name);
    json_out_key_string(o, "arguments", t->arguments.data, whole ? t->arguments.n : 0);
    json_out_close(o, '}');
}

static const char *status_of(const struct choice *c)
{
    if (!c) return "in_progress";
    return strcmp(c->finish, "length") == 0  ? "incomplete"
           : strcmp(c->finish, "abort") == 0 ? "cancelled"
                                             : "completed";
}

static void write_output(struct exchange *x, const struct choice *c)
{
    int n = 0;
    json_out_key_open(&x->out, "output", '[');
    if (c && c->reasoning.n)
        write_text_item(x, PART_REASONING, n++, c->reasoning.data, c->reasoning.n, "completed");
    if (c && c->content.n) write_text_item(x, PART_CONTENT, n++, c->content.data, c->content.n, status_of(c));
    for (int i = 0; c && i < c->n_calls; i++) write_call_item(x, c, i, n++, true);
    json_out_close(&x->out, ']');
}

static void write_usage(struct exchange *x)
{
    struct json_out *o = &x->out;
    struct request_usage u;
    int64_t reasoning;
    exchange_usage(x, NULL, &u, &reasoning);
    json_out_key_open(o, "usage", '{');
    json_out_key_int(o, "input_tokens", u.prompt_tokens);
    json_out_key_open(o, "input_tokens_details", '{');
    json_out_key_int(o, "cached_tokens", u.cached_tokens);
    json_out_close(o, '}');
    json_out_key_int(o, "output_tokens", u.answer_tokens);
    json_out_key_open(o, "output_tokens_details", '{');
    json_out_key_int(o, "reasoning_tokens", reasoning);
    json_out_close(o, '}');
    json_out_key_int(o, "total_tokens", u.prompt_tokens + u.answer_tokens);
    json_out_close(o, '}');
}

static const json_t *asked(const struct exchange *x, const char *key)
{
    return json_object_get(x->body, key);
}

/* What was asked for, as the service repeats it. */
static void write_request(struct exchange *x)
{
    struct json_out *o = &x->out;
    const struct items *items = x->state;
    const json_t *tools = asked(x, "tools"), *choice = asked(x, "tool_choice"), *text = asked(x, "text");
    json_out_key_value(o, "instructions", asked(x, "instructions"));
    json_out_key_value(o, "max_output_tokens", asked(x, "max_output_tokens"));
    json_out_key_value(o, "metadata", asked(x, "metadata"));
    json_out_key_bool(o, "parallel_tool_calls", !json_is_false(asked(x, "parallel_tool_calls")));
    json_out_key_value(o, "previous_response_id", asked(x, "previous_response_id"));
    json_out_key_value(o, "reasoning", asked(x, "reasoning"));
    json_out_key_bool(o, "store", items->is_kept);
    json_out_key(o, "temperature");
    json_out_float(o, x->params.sampling.temperature);
    json_out_key(o, "top_p");
    json_out_float(o, x->params.sampling.top_p);
    if (text) json_out_key_value(o, "text", text);
    json_out_key(o, "tool_choice");
    if (choice)
        json_out_value(o, choice);
    else
        json_out_text(o, "auto");
    json_out_key(o, "tools");
    if (json_is_array(tools)) {
        json_out_value(o, tools);
    } else {
        json_out_open(o, '[');
        json_out_close(o, ']');
    }
    json_out_key_text(o, "truncation", "disabled");
}

/* An assistant's message of a chat, without calls that a limit cut. */
static void write_turn(struct json_out *o, const struct choice *c)
{
    json_out_open(o, '{');
    json_out_key_text(o, "role", "assistant");
    json_out_key_string(o, "content", c->content.data, c->content.n);
    if (c->reasoning.n) json_out_key_string(o, "reasoning_content", c->reasoning.data, c->reasoning.n);
    json_out_key_open(o, "tool_calls", '[');
    for (int i = 0; i < c->n_calls; i++) {
        if (c->calls[i].is_cut) continue;
        json_out_open(o, '{');
        json_out_key_text(o, "type", "function");
        json_out_key_open(o, "function", '{');
        json_out_key_text(o, "name", c->calls[i].name);
        json_out_key_string(o, "arguments", c->calls[i].arguments.data, c->calls[i].arguments.n);
        json_out_close(o, '}');
        json_out_close(o, '}');
    }
    json_out_close(o, ']');
    json_out_close(o, '}');
}

/* Before the answer begins, away from the loop: what a long conversation costs to write. */
static void keep_messages(struct exchange *x)
{
    const json_t *messages = json_object_get(x->chat, "messages");
    const json_t *instructions = json_object_get(x->body, "instructions");
    size_t i = instructions && !json_is_null(instructions); /* not of the next response */
    json_out_open(&x->kept, '[');
    for (; i < json_array_size(messages); i++) json_out_value(&x->kept, json_array_get(messages, i));
}

/* The response is x->out from `from` on. */
static void keep(struct exchange *x, const struct choice *c, size_t from)
{
    const struct items *items = x->state;
    if (!items->is_kept || strcmp(c->finish, "abort") == 0) return;
    write_turn(&x->kept, c);
    json_out_close(&x->kept, ']');
    if (x->out.failed || x->kept.failed) return;
    const struct stored_response r = { x->out.data + from, x->out.n - from, x->kept.data, x->kept.n };
    response_store_put(x->api->store, items->id, x->owner, &r);
}

/* c NULL: under way */
static void write_response(struct exchange *x, const struct choice *c)
{
    struct json_out *o = &x->out;
    const struct items *items = x->state;
    const char *status = status_of(c);
    size_t from = o->n + o->needs_comma;
    json_out_open(o, '{');
    json_out_key_text(o, "id", items->id);
    json_out_key_text(o, "object", "response");
    json_out_key_int(o, "created_at", x->created);
    json_out_key_text(o, "status", status);
    json_out_key_null(o, "error");
    if (strcmp(status, "incomplete") == 0) {
        json_out_key_open(o, "incomplete_details", '{');
        json_out_key_text(o, "reason", "max_output_tokens");
        json_out_close(o, '}');
    } else {
        json_out_key_null(o, "incomplete_details");
    }
    json_out_key_text(o, "model", x->model);
    write_output(x, c);
    write_request(x);
    if (c)
        write_usage(x);
    else
        json_out_key_null(o, "usage");
    json_out_close(o, '}');
    if (c) keep(x, c, from);
}

static void open_event(struct exchange *x, const char *name)
{
    struct items *items = x->state;
    exchange_event(x, name);
    json_out_open(&x->out, '{');
    json_out_key_text(&x->out, "type", name);
    json_out_key_int(&x->out, "sequence_number", items->sequence++);
}

static void close_event(struct exchange *x)
{
    json_out_close(&x->out, '}');
    exchange_event_end(x);
}

static void response_event(struct exchange *x, const char *name, const struct choice *c)
{
    open_event(x, name);
    json_out_key(&x->out, "response");
    write_response(x, c);
    close_event(x);
}

static void begin(struct exchange *x, struct choice *c)
{
    (void)c;
    response_event(x, "response.created", NULL);
    response_event(x, "response.in_progress", NULL);
}

/* Where an event of the open item of text belongs. */
static void write_place(struct exchange *x, bool in_part)
{
    const struct items *items = x->state;
    write_id(x, "item_id", prefix_of(items->open), items->n - 1);
    json_out_key_int(&x->out, "output_index", items->n - 1);
    if (in_part) json_out_key_int(&x->out, "content_index", 0);
}

static void part_event(struct exchange *x, const char *name, const char *text, size_t n)
{
    const struct items *items = x->state;
    open_event(x, name);
    write_place(x, true);
    json_out_key(&x->out, "part");
    write_part(x, items->open, text, n);
    close_event(x);
}

static void text_event(struct exchange *x, const char *name, const char *key, const char *text, size_t n)
{
    const struct items *items = x->state;
    open_event(x, name);
    write_place(x, true);
    json_out_key_string(&x->out, key, text, n);
    if (items->open == PART_CONTENT) {
        json_out_key_open(&x->out, "logprobs", '[');
        json_out_close(&x->out, ']');
    }
    close_event(x);
}

static const struct json_out *text_so_far(const struct choice *c, enum part_kind kind)
{
    return kind == PART_REASONING ? &c->reasoning : &c->content;
}

static void close_item(struct exchange *x, const struct choice *c)
{
    struct items *items = x->state;
    bool is_reasoning = items->open == PART_REASONING;
    if (items->open == PART_NONE) return;
    const struct json_out *all = text_so_far(c, items->open);
    const char *text = all->data + items->from;
    size_t n = items->said[items->open] - items->from;
    text_event(x, is_reasoning ? "response.reasoning_text.done" : "response.output_text.done", "text", text,
               n);
    part_event(x, "response.content_part.done", text, n);
    open_event(x, "response.output_item.done");
    json_out_key_int(&x->out, "output_index", items->n - 1);
    json_out_key(&x->out, "item");
    write_text_item(x, items->open, items->n - 1, text, n, c->is_over ? status_of(c) : "completed");
    close_event(x);
    items->open = PART_NONE;
}

static void open_item(struct exchange *x, enum part_kind kind, size_t from)
{
    struct items *items = x->state;
    items->open = kind;
    items->from = from;
    items->n++;
    open_event(x, "response.output_item.added");
    json_out_key_int(&x->out, "output_index", items->n - 1);
    json_out_key(&x->out, "item");
    write_text_item(x, kind, items->n - 1, NULL, 0, "in_progress");
    close_event(x);
    part_event(x, "response.content_part.added", "", 0);
}

static void arguments_delta(struct exchange *x, const char *text, size_t n)
{
    const struct items *items = x->state;
    open_event(x, "response.function_call_arguments.delta");
    write_id(x, "item_id", "fc", items->n - 1);
    json_out_key_int(&x->out, "output_index", items->n - 1);
    json_out_key_string(&x->out, "delta", text, n);
    close_event(x);
}

static void delta(struct exchange *x, struct choice *c, enum part_kind kind, const char *text, size_t n)
{
    struct items *items = x->state;
    if (kind == PART_ARGUMENTS) {
        arguments_delta(x, text, n);
        return;
    }
    if (items->open != kind) {
        close_item(x, c);
        open_item(x, kind, items->said[kind]);
    }
    items->said[kind] += n;
    text_event(x, kind == PART_REASONING ? "response.reasoning_text.delta" : "response.output_text.delta",
               "delta", text, n);
}

static void item_event(struct exchange *x, const char *name, const struct choice *c, int call, bool whole)
{
    const struct items *items = x->state;
    open_event(x, name);
    json_out_key_int(&x->out, "output_index", items->n - 1);
    json_out_key(&x->out, "item");
    write_call_item(x, c, call, items->n - 1, whole);
    close_event(x);
}

static void call(struct exchange *x, struct choice *c, int index)
{
    struct items *items = x->state;
    close_item(x, c);
    items->n++;
    item_event(x, "response.output_item.added", c, index, false);
}

static void call_end(struct exchange *x, struct choice *c, int index)
{
    const struct items *items = x->state;
    open_event(x, "response.function_call_arguments.done");
    write_id(x, "item_id", "fc", items->n - 1);
    json_out_key_int(&x->out, "output_index", items->n - 1);
    json_out_key_text(&x->out, "name", c->calls[index].name);
    json_out_key_string(&x->out, "arguments", c->calls[index].arguments.data, c->calls[index].arguments.n);
    close_event(x);
    item_event(x, "response.output_item.done", c, index, true);
}

static void finish(struct exchange *x, struct choice *c)
{
    close_item(x, c);
    response_event(x, strcmp(status_of(c), "incomplete") == 0 ? "response.incomplete" : "response.completed",
                   c);
}

static void end(struct exchange *x)
{
    (void)x;
}

static void fail(struct exchange *x)
{
    open_event(x, "error");
    json_out_key_text(&x->out, "code", x->fault.code ? x->fault.code : "server_error");
    json_out_key_text(&x->out, "message", x->fault.text);
    json_out_key_null(&x->out, "param");
    close_event(x);
}

static void whole(struct exchange *x)
{
    write_response(x, &x->choices[0]);
}

static const struct shape shape = { .begin = begin,
                                    .delta = delta,
                                    .call = call,
                                    .call_end = call_end,
                                    .finish = finish,
                                    .end = end,
                                    .whole = whole,
                                    .fail = fail,
                                    .max_is_soft = true };

/* An id that nobody guesses, where it leads to something. */
static bool begin_items(struct exchange *x)
{
    const struct fields in = { x->body, "", &x->fault };
    unsigned char random[16];
    struct items *items = x->state = calloc(1, sizeof *items);
    if (!items) return fault_memory(&x->fault);
    items->is_kept = x->api->store;
    if (!fields_bool(&in, "store", &items->is_kept)) return false;
    items->is_kept =
        items->is_kept && x->api->store && getrandom(random, sizeof random, 0) == (ssize_t)sizeof random;
    int n = snprintf(items->id, sizeof items->id, "resp_%.80s", items->is_kept ? "" : x->request_id);
    for (size_t i = 0; items->is_kept && i < sizeof random; i++)
        n += snprintf(items->id + n, sizeof items->id - (size_t)n, "%02x", random[i]);
    return true;
}

bool api_responses_begin(struct exchange *x)
{
    static const char *const names[][2] = { { "max_tokens", "max_output_tokens" },
                                            { "reasoning_effort", "reasoning.effort" },
                                            { "response_format.json_schema", "text.format" },
                                            { "response_format", "text.format" },
                                            { NULL, NULL } };
    if (!begin_items(x) || !make_chat(x)) return false;
    if (((const struct items *)x->state)->is_kept) keep_messages(x);
    return api_chat_begin_as(x, &shape) || fault_rename(&x->fault, names);
}

/* Responses that are kept. */

static const struct stored_response *find(struct exchange *x, const char *id)
{
    const struct stored_response *r = x->api->store ? response_store_get(x->api->store, id, x->owner) : NULL;
    if (!r && x->api->store)
        unknown_response(&x->fault, 404, id);
    else if (!r)
        fault_status(&x->fault, 404, "not_found",
                     "this server keeps no responses; start it with --response-store 64M");
    return r;
}

bool api_response(struct exchange *x, const char *id)
{
    const struct stored_response *r = find(x, id);
    if (!r) return false;
    json_out_raw(&x->out, r->body, r->body_bytes);
    response_store_release(r);
    return exchange_answered(x);
}

bool api_response_delete(struct exchange *x, const char *id)
{
    const struct stored_response *r = find(x, id);
    if (!r) return false;
    response_store_release(r);
    response_store_delete(x->api->store, id, x->owner);
    json_out_open(&x->out, '{');
    json_out_key_text(&x->out, "id", id);
    json_out_key_text(&x->out, "object", "response");
    json_out_key_bool(&x->out, "deleted", true);
    json_out_close(&x->out, '}');
    return exchange_answered(x);
}

bool api_response_cancel(struct exchange *x, const char *argument)
{
    static const char cancel[] = "/cancel";
    char id[RESPONSE_ID_MAX] = "";
    size_t n = strlen(argument), tail = sizeof cancel - 1;
    if (n < tail || strcmp(argument + n - tail, cancel) != 0)
        return fault_status(&x->fault, 404, NULL,
                            "there is no such path; POST /v1/responses makes a response");
    if (n - tail < sizeof id) memcpy(id, argument, n - tail);
    const struct stored_response *r = find(x, id);
    if (!r) return false;
    response_store_release(r);
    return fault_set(&x->fault, NULL,
                     "the response is complete; one that is under way ends when its client leaves");
}
