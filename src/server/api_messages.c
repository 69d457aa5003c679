/* /v1/messages and its count_tokens: Anthropic's conversation as a chat, the answer in its blocks and events.
 * Source: Anthropic's API reference, "Messages" and "Streaming messages". */
#include "base/clock.h"
#include "server/api_routes.h"
#include "image/image.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The request. A chat's message under construction for one of Anthropic's. */

static bool append(json_t *list, json_t *item, struct fault *f)
{
    return json_array_append_new(list, item) == 0 || fault_memory(f);
}

static bool set(json_t *object, const char *key, json_t *value, struct fault *f)
{
    return json_object_set_new(object, key, value) == 0 || fault_memory(f);
}

/* The field as it is, under another name. */
static bool copy(json_t *to, const char *as, const json_t *from, const char *key, struct fault *f)
{
    json_t *v = json_object_get(from, key);
    return !v || json_is_null(v) || json_object_set(to, as, v) == 0 || fault_memory(f);
}

static bool text_of(const json_t *block, const char *key, const char *param, const json_t **out,
                    struct fault *f)
{
    struct param at;
    *out = json_object_get(block, key);
    param_set(&at, "%s.%s", param, key);
    return json_is_string(*out) || fields_wrong(f, at.text, "a string", *out);
}

/* {"type": "base64", "media_type": ..., "data": ...} as a part with a data: URL. */
static bool image_block(json_t *parts, const json_t *block, const char *param, struct fault *f)
{
    const json_t *source = json_object_get(block, "source");
    const char *type = json_string_value(json_object_get(source, "type"));
    const char *media = json_string_value(json_object_get(source, "media_type"));
    const char *data = json_string_value(json_object_get(source, "data"));
    struct param at;
    param_set(&at, "%s.source", param);
    json_t *given = json_object_get(source, "url");
    if (type && strcmp(type, "url") == 0 && json_is_string(given))
        return append(parts, json_pack("{s:s, s:{s:O}}", "type", "image_url", "image_url", "url", given), f);
    if (!type || strcmp(type, "base64") != 0)
        return fault_set(f, at.text, "%s: expected type base64, or type url and a url", at.text);
    if (!media || !data) return fault_set(f, at.text, "%s: expected media_type and data", at.text);
    json_t *url = json_sprintf("data:%s;base64,%s", media, data);
    return append(parts, json_pack("{s:s, s:{s:o}}", "type", "image_url", "image_url", "url", url), f);
}

static bool text_block(json_t *parts, const json_t *block, const char *param, struct fault *f)
{
    const json_t *text;
    return text_of(block, "text", param, &text, f) &&
           append(parts, json_pack("{s:s, s:O}", "type", "text", "text", text), f);
}

static const char *type_of(const json_t *block)
{
    const char *type = json_string_value(json_object_get(block, "type"));
    return type ? type : "nothing";
}

/* Texts and images. */
static bool plain_blocks(json_t *parts, const json_t *blocks, const char *param, struct fault *f)
{
    if (json_is_string(blocks))
        return append(parts, json_pack("{s:s, s:O}", "type", "text", "text", blocks), f);
    if (blocks && !json_is_array(blocks))
        return fields_wrong(f, param, "a string or an array of blocks", blocks);
    for (size_t i = 0; i < json_array_size(blocks); i++) {
        const json_t *block = json_array_get(blocks, i);
        struct param at;
        param_set(&at, "%s[%zu]", param, i);
        if (strcmp(type_of(block), "text") == 0 ? text_block(parts, block, at.text, f)
            : strcmp(type_of(block), "image") == 0
                ? image_block(parts, block, at.text, f)
                : fault_set(f, at.text, "%s: expected a block of type text or image, found \"%.40s\"",
                            at.text, type_of(block)))
            continue;
        return false;
    }
    return true;
}

static bool tool_result(json_t *messages, const json_t *block, const char *param, struct fault *f)
{
    struct param at;
    json_t *parts = json_array();
    param_set(&at, "%s.content", param);
    bool ok = plain_blocks(parts, json_object_get(block, "content"), at.text, f);
    if (!ok) {
        json_decref(parts);
        return false;
    }
    return append(messages, json_pack("{s:s, s:o}", "role", "tool", "content", parts), f);
}

/* Results of tools are messages of their own; what else a user says is one. */
static bool user_blocks(json_t *messages, const json_t *blocks, const char *param, struct fault *f)
{
    json_t *parts = json_array();
    bool ok = parts || fault_memory(f);
    for (size_t i = 0; ok && i < json_array_size(blocks); i++) {
        json_t *block = json_array_get(blocks, i);
        struct param at;
        param_set(&at, "%s[%zu]", param, i);
        if (strcmp(type_of(block), "tool_result") == 0) {
            ok = tool_result(messages, block, at.text, f);
        } else {
            json_t *one = json_pack("[O]", block);
            ok = plain_blocks(parts, one, param, f);
            json_decref(one);
        }
    }
    if (ok && json_array_size(parts) > 0)
        return append(messages, json_pack("{s:s, s:o}", "role", "user", "content", parts), f);
    json_decref(parts);
    return ok;
}

static bool join(json_t *message, const char *key, const json_t *text, struct fault *f)
{
    const json_t *before = json_object_get(message, key);
    size_t n = json_string_length(before), more = json_string_length(text);
    char *both = malloc(n + more + 1);
    if (!both) return fault_memory(f);
    if (n) memcpy(both, json_string_value(before), n);
    memcpy(both + n, json_string_value(text), more);
    bool ok = set(message, key, json_stringn(both, n + more), f);
    free(both);
    return ok;
}

static bool tool_use(json_t *message, const json_t *block, const char *param, struct fault *f)
{
    const json_t *name, *input = json_object_get(block, "input");
    struct param at;
    param_set(&at, "%s.input", param);
    if (!text_of(block, "name", param, &name, f)) return false;
    if (!json_is_object(input)) return fields_wrong(f, at.text, "an object", input);
    json_t *calls = json_object_get(message, "tool_calls");
    if (!calls) {
        calls = json_array();
        if (!set(message, "tool_calls", calls, f)) return false;
    }
    return append(
        calls,
        json_pack("{s:s, s:{s:O, s:O}}", "type", "function", "function", "name", name, "arguments", input),
        f);
}

static bool assistant_block(json_t *message, const json_t *block, const char *param, struct fault *f)
{
    const char *type = type_of(block);
    const json_t *text;
    if (strcmp(type, "text") == 0)
        return text_of(block, "text", param, &text, f) && join(message, "content", text, f);
    if (strcmp(type, "thinking") == 0)
        return text_of(block, "thinking", param, &text, f) && join(message, "reasoning_content", text, f);
    if (strcmp(type, "redacted_thinking") == 0) return true;
    if (strcmp(type, "tool_use") == 0) return tool_use(message, block, param, f);
    return fault_set(f, param, "%s: expected a block of type text, thinking or tool_use, found \"%.40s\"",
                     param, type);
}

static bool assistant_blocks(json_t *messages, const json_t *blocks, const char *param, struct fault *f)
{
    json_t *message = json_pack("{s:s}", "role", "assistant");
    bool ok = message || fault_memory(f);
    for (size_t i = 0; ok && i < json_array_size(blocks); i++) {
        struct param at;
        param_set(&at, "%s[%zu]", param, i);
        ok = assistant_block(message, json_array_get(blocks, i), at.text, f);
    }
    if (ok) return append(messages, message, f);
    json_decref(message);
    return false;
}

static bool add_message(json_t *messages, const json_t *given, const char *param, struct fault *f)
{
    const char *role = json_string_value(json_object_get(given, "role"));
    json_t *content = json_object_get(given, "content");
    struct param at;
    param_set(&at, "%s.role", param);
    if (!role || (strcmp(role, "user") != 0 && strcmp(role, "assistant") != 0))
        return fault_set(f, at.text, "%s: expected user or assistant", at.text);
    param_set(&at, "%s.content", param);
    if (json_is_string(content))
        return append(messages, json_pack("{s:s, s:O}", "role", role, "content", content), f);
    if (!json_is_array(content)) return fields_wrong(f, at.text, "a string or an array of blocks", content);
    return *role == 'u' ? user_blocks(messages, content, at.text, f)
                        : assistant_blocks(messages, content, at.text, f);
}

static bool add_system(json_t *messages, const json_t *system, struct fault *f)
{
    if (!system || json_is_null(system)) return true;
    json_t *parts = json_array();
    if (plain_blocks(parts, system, "system", f))
        return append(messages, json_pack("{s:s, s:o}", "role", "system", "content", parts), f);
    json_decref(parts);
    return false;
}

/* An answer that is begun by the caller is gone on with. */
static bool add_messages(json_t *chat, const json_t *body, struct fault *f)
{
    const json_t *given = json_object_get(body, "messages");
    json_t *messages = json_array();
    if (!set(chat, "messages", messages, f)) return false;
    if (!json_is_array(given)) return fields_wrong(f, "messages", "an array", given);
    if (!add_system(messages, json_object_get(body, "system"), f)) return false;
    for (size_t i = 0; i < json_array_size(given); i++) {
        struct param at;
        param_set(&at, "messages[%zu]", i);
        if (!add_message(messages, json_array_get(given, i), at.text, f)) return false;
    }
    const json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    const char *role = json_string_value(json_object_get(last, "role"));
    bool goes_on = role && strcmp(role, "assistant") == 0 &&
                   json_is_string(json_object_get(last, "content")) && !json_object_get(last, "tool_calls");
    return !goes_on || set(chat, "continue_final_message", json_true(), f);
}

static bool add_tool(json_t *tools, const json_t *tool, const char *param, struct fault *f)
{
    const char *type = json_string_value(json_object_get(tool, "type"));
    const json_t *name;
    struct param at;
    param_set(&at, "%s.type", param);
    if (type && strcmp(type, "custom") != 0)
        return fault_set(f, at.text,
                         "%s: \"%.40s\" runs at Anthropic; only tools that the caller runs are known",
                         at.text, type);
    if (!text_of(tool, "name", param, &name, f)) return false;
    json_t *function = json_pack("{s:O}", "name", name);
    if (!copy(function, "description", tool, "description", f) ||
        !copy(function, "parameters", tool, "input_schema", f) ||
        !copy(function, "strict", tool, "strict", f)) {
        json_decref(function);
        return false;
    }
    return append(tools, json_pack("{s:s, s:o}", "type", "function", "function", function), f);
}

static bool add_tool_choice(json_t *chat, const json_t *choice, struct fault *f)
{
    static const char *const words[][2] = { { "auto", "auto" }, { "any", "required" }, { "none", "none" } };
    const char *type = json_string_value(json_object_get(choice, "type"));
    if (!choice || json_is_null(choice)) return true;
    if (json_is_true(json_object_get(choice, "disable_parallel_tool_use")) &&
        !set(chat, "parallel_tool_calls", json_false(), f))
        return false;
    for (int i = 0; type && i < 3; i++)
        if (strcmp(type, words[i][0]) == 0) return set(chat, "tool_choice", json_string(words[i][1]), f);
    const json_t *name;
    if (!type || strcmp(type, "tool") != 0)
        return fault_set(f, "tool_choice.type", "tool_choice.type: expected auto, any, tool or none");
    return text_of(choice, "name", "tool_choice", &name, f) &&
           set(chat, "tool_choice", json_pack("{s:s, s:{s:O}}", "type", "function", "function", "name", name),
               f);
}

static bool add_tools(json_t *chat, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *given = NULL;
    json_t *tools = json_array();
    if (!fields_array(&in, "tools", &given)) {
        json_decref(tools);
        return false;
    }
    if (!set(chat, "tools", tools, f)) return false;
    for (size_t i = 0; i < json_array_size(given); i++) {
        struct param at;
        param_set(&at, "tools[%zu]", i);
        if (!add_tool(tools, json_array_get(given, i), at.text, f)) return false;
    }
    return add_tool_choice(chat, json_object_get(body, "tool_choice"), f);
}

/* Off unless asked for, as there. */
static bool add_thinking(json_t *chat, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *thinking = NULL;
    const char *type = "disabled";
    if (!fields_object(&in, "thinking", &thinking)) return false;
    const struct fields inside = { thinking, "thinking.", f };
    if (thinking && !fields_text(&inside, "type", &type)) return false;
    bool on = strcmp(type, "disabled") != 0;
    if (on && strcmp(type, "enabled") != 0 && strcmp(type, "adaptive") != 0)
        return fault_set(f, "thinking.type", "thinking.type: expected enabled, adaptive or disabled");
    return set(chat, "chat_template_kwargs", json_pack("{s:b}", "enable_thinking", on), f) &&
           (!on || copy(chat, "thinking_token_budget", thinking, "budget_tokens", f));
}

/* output_config.format, the schema of an answer */
static bool add_format(json_t *chat, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *config = NULL, *format = NULL;
    if (!fields_object(&in, "output_config", &config)) return false;
    const struct fields inside = { config, "output_config.", f };
    if (!fields_object(&inside, "format", &format) || !format) return !f->status;
    const json_t *schema = json_object_get(format, "schema");
    if (strcmp(type_of(format), "json_schema") != 0 || !schema)
        return fault_set(f, "output_config.format",
                         "output_config.format: expected type json_schema and a schema");
    return set(chat, "response_format",
               json_pack("{s:s, s:{s:O}}", "type", "json_schema", "json_schema", "schema", schema), f);
}

static bool make_chat(struct exchange *x)
{
    static const char *const same[] = { "model", "stream", "temperature", "top_p", "top_k", "max_tokens" };
    const json_t *body = x->body;
    struct fault *f = &x->fault;
    x->chat = json_object();
    if (!x->chat) return fault_memory(f);
    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (!copy(x->chat, same[i], body, same[i], f)) return false;
    const struct fields in = { body, "", f };
    const json_t *stops = NULL;
    return fields_array(&in, "stop_sequences", &stops) && copy(x->chat, "stop", body, "stop_sequences", f) &&
           add_thinking(x->chat, body, f) && add_format(x->chat, body, f) && add_tools(x->chat, body, f) &&
           add_messages(x->chat, body, f);
}

/* The answer. */

struct blocks {
    int n;               /* begun so far */
    enum part_kind open; /* of the last one; PART_NONE: none is open */
};

static void write_usage(struct exchange *x)
{
    struct request_usage u;
    int64_t reasoning;
    exchange_usage(x, NULL, &u, &reasoning);
    json_out_key_open(&x->out, "usage", '{');
    json_out_key_int(&x->out, "input_tokens", u.prompt_tokens - u.cached_tokens);
    json_out_key_int(&x->out, "cache_creation_input_tokens", 0);
    json_out_key_int(&x->out, "cache_read_input_tokens", u.cached_tokens);
    json_out_key_int(&x->out, "output_tokens", u.answer_tokens);
    json_out_close(&x->out, '}');
}

static const char *stop_reason(const struct choice *c)
{
    if (strcmp(c->finish, "tool_calls") == 0) return "tool_use";
    if (strcmp(c->finish, "length") == 0) return "max_tokens";
    return c->stop_string >= 0 ? "stop_sequence" : "end_turn";
}

static void write_stop(struct exchange *x, const struct choice *c)
{
    json_out_key_text(&x->out, "stop_reason", c ? stop_reason(c) : NULL);
    if (c && c->stop_string >= 0)
        json_out_key_string(&x->out, "stop_sequence", x->params.stops[c->stop_string].text,
                            x->params.stops[c->stop_string].n);
    else
        json_out_key_null(&x->out, "stop_sequence");
}

static void open_message(struct exchange *x)
{
    json_out_open(&x->out, '{');
    exchange_write_id(x, "msg_");
    json_out_key_text(&x->out, "type", "message");
    json_out_key_text(&x->out, "role", "assistant");
    json_out_key_text(&x->out, "model", x->model);
    json_out_key_open(&x->out, "content", '[');
}

/* A block; NULL text for the empty one that a stream begins with. */
static void write_block(struct exchange *x, enum part_kind kind, const struct json_out *text)
{
    struct json_out *o = &x->out;
    const char *name = kind == PART_REASONING ? "thinking" : "text";
    json_out_open(o, '{');
    json_out_key_text(o, "type", name);
    json_out_key_string(o, name, text ? text->data : "", text ? text->n : 0);
    if (kind == PART_REASONING) json_out_key_text(o, "signature", "");
    json_out_close(o, '}');
}

/* An object: of a call that was cut the arguments that are complete. */
static void write_input(struct json_out *o, const struct tool_call *call)
{
    json_out_raw(o, call->whole ? call->arguments.data : "{", call->whole ? call->whole : 1);
    if (call->is_cut) json_out_raw(o, "}", 1);
    o->needs_comma = true;
}

static void write_tool(struct exchange *x, const struct choice *c, int index, bool whole)
{
    struct json_out *o = &x->out;
    char id[120];
    snprintf(id, sizeof id, "toolu_%s_%d", x->request_id, index);
    json_out_open(o, '{');
    json_out_key_text(o, "type", "tool_use");
    json_out_key_text(o, "id", id);
    json_out_key_text(o, "name", c->calls[index].name);
    json_out_key(o, "input");
    if (whole) {
        write_input(o, &c->calls[index]);
    } else {
        json_out_open(o, '{');
        json_out_close(o, '}');
    }
    json_out_close(o, '}');
}

static void open_event(struct exchange *x, const char *name)
{
    exchange_event(x, name);
    json_out_open(&x->out, '{');
    json_out_key_text(&x->out, "type", name);
}

static void close_event(struct exchange *x)
{
    json_out_close(&x->out, '}');
    exchange_event_end(x);
}

static void begin(struct exchange *x, struct choice *c)
{
    (void)c;
    open_event(x, "message_start");
    json_out_key(&x->out, "message");
    open_message(x);
    json_out_close(&x->out, ']');
    write_stop(x, NULL);
    write_usage(x);
    json_out_close(&x->out, '}');
    close_event(x);
}

static void close_block(struct exchange *x)
{
    struct blocks *b = x->state;
    if (b->open == PART_NONE) return;
    open_event(x, "content_block_stop");
    json_out_key_int(&x->out, "index", b->n - 1);
    close_event(x);
    b->open = PART_NONE;
}

static void open_block(struct exchange *x)
{
    struct blocks *b = x->state;
    close_block(x);
    open_event(x, "content_block_start");
    json_out_key_int(&x->out, "index", b->n++);
    json_out_key(&x->out, "content_block");
}

static void block_delta(struct exchange *x, const char *type, const char *key, const char *text, size_t n)
{
    struct blocks *b = x->state;
    open_event(x, "content_block_delta");
    json_out_key_int(&x->out, "index", b->n - 1);
    json_out_key_open(&x->out, "delta", '{');
    json_out_key_text(&x->out, "type", type);
    json_out_key_string(&x->out, key, text, n);
    json_out_close(&x->out, '}');
    close_event(x);
}

static void delta(struct exchange *x, struct choice *c, enum part_kind kind, const char *text, size_t n)
{
    struct blocks *b = x->state;
    (void)c;
    if (kind == PART_ARGUMENTS) {
        block_delta(x, "input_json_delta", "partial_json", text, n);
        return;
    }
    if (b->open != kind) {
        open_block(x);
        write_block(x, kind, NULL);
        close_event(x);
        b->open = kind;
    }
    if (kind == PART_REASONING)
        block_delta(x, "thinking_delta", "thinking", text, n);
    else
        block_delta(x, "text_delta", "text", text, n);
}

static void call(struct exchange *x, struct choice *c, int index)
{
    struct blocks *b = x->state;
    open_block(x);
    write_tool(x, c, index, false);
    close_event(x);
    b->open = PART_ARGUMENTS;
}

static void call_end(struct exchange *x, struct choice *c, int index)
{
    (void)c, (void)index;
    close_block(x);
}

static void finish(struct exchange *x, struct choice *c)
{
    close_block(x);
    open_event(x, "message_delta");
    json_out_key_open(&x->out, "delta", '{');
    write_stop(x, c);
    json_out_close(&x->out, '}');
    write_usage(x);
    close_event(x);
}

static void end(struct exchange *x)
{
    open_event(x, "message_stop");
    close_event(x);
}

static void fail(struct exchange *x)
{
    exchange_event(x, "error");
    fault_write(&x->out, x->route, x->fault.status, NULL, NULL, NULL, x->fault.text);
    exchange_event_end(x);
}

static void whole(struct exchange *x)
{
    const struct choice *c = &x->choices[0];
    open_message(x);
    if (c->reasoning.n) write_block(x, PART_REASONING, &c->reasoning);
    if (c->content.n) write_block(x, PART_CONTENT, &c->content);
    for (int i = 0; i < c->n_calls; i++) write_tool(x, c, i, true);
    json_out_close(&x->out, ']');
    write_stop(x, c);
    write_usage(x);
    json_out_close(&x->out, '}');
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

bool api_messages_begin(struct exchange *x)
{
    const struct fields in = { x->body, "", &x->fault };
    if (!fields_get(&in, "max_tokens")) return fields_wrong(&x->fault, "max_tokens", "an integer", NULL);
    x->state = calloc(1, sizeof(struct blocks));
    if (!x->state) return fault_memory(&x->fault);
    static const char *const names[][2] = { { "stop", "stop_sequences" },
                                            { "thinking_token_budget", "thinking.budget_tokens" },
                                            { "response_format.json_schema.schema",
                                              "output_config.format.schema" },
                                            { NULL, NULL } };
    return make_chat(x) && (api_chat_begin_as(x, &shape) || fault_rename(&x->fault, names));
}

/* Rows that a picture takes in place of its one token. */
static bool picture_rows(int64_t *rows, const struct api *a, const char *source,
                         const struct image_limits *limits, struct err *e)
{
    const struct patch_rule *p = &a->patch_rule;
    const int64_t side = (int64_t)p->side * p->merge;
    const struct resize_rule rule = { side, p->pixels_min, p->pixels_max };
    struct image image;
    int64_t height, width;
    if (!image_load(&image, source, limits, e)) return false;
    bool ok = resize_fit(&height, &width, image.height, image.width, &rule, e);
    image_free(&image);
    if (ok) *rows = height / side * (width / side);
    return ok;
}

bool api_count_tokens(struct exchange *x)
{
    struct fault *f = &x->fault;
    x->prompts = calloc(1, sizeof *x->prompts);
    if (!x->prompts) return fault_memory(f);
    x->n_prompts = 1;
    if (!make_chat(x) || !params_read_template(&x->params, x->api, x->chat, f) ||
        !conversation_prompt(x->prompts, x->api, x->chat, &x->params, f))
        return false;
    struct image_limits limits = x->api->o.images ? *x->api->o.images : (struct image_limits){ 0 };
    limits.until = clock_seconds() + IMAGE_SECONDS; /* of all of them together */
    int64_t n = x->prompts->n - x->prompts->n_pictures, rows;
    for (int i = 0; i < x->prompts->n_pictures; i++, n += rows) {
        struct err e = { 0 };
        if (!picture_rows(&rows, x->api, x->prompts->pictures[i], &limits, &e))
            return fault_from_err(f, "messages", &e);
    }
    json_out_open(&x->out, '{');
    json_out_key_int(&x->out, "input_tokens", n);
    json_out_close(&x->out, '}');
    return exchange_answered(x);
}
