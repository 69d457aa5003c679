/* /v1/chat/completions. Source: OpenAI's API reference, "Chat"; vLLM's additions of the same names. */
#include "server/api_routes.h"
#include "server/constraint.h"
#include "server/score_out.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void write_head(struct exchange *x, const char *object)
{
    exchange_write_id(x, "chatcmpl-");
    json_out_key_text(&x->out, "object", object);
    json_out_key_int(&x->out, "created", x->created);
    json_out_key_text(&x->out, "model", x->model);
}

static void write_call(struct exchange *x, const struct choice *c, int index, bool in_stream)
{
    struct json_out *o = &x->out;
    char id[120];
    snprintf(id, sizeof id, "call_%s_%d_%d", x->request_id, c->index, index);
    json_out_open(o, '{');
    if (in_stream) json_out_key_int(o, "index", index);
    json_out_key_text(o, "id", id);
    json_out_key_text(o, "type", "function");
    json_out_key_open(o, "function", '{');
    json_out_key_text(o, "name", c->calls[index].name);
    json_out_key_string(o, "arguments", c->calls[index].arguments.data,
                        in_stream ? 0 : c->calls[index].arguments.n);
    json_out_close(o, '}');
    json_out_close(o, '}');
}

/* Scores and ids of the tokens since the last chunk. */
static void write_tokens(struct exchange *x, struct choice *c)
{
    struct pending *p = &x->pending[c->index];
    if (x->params.logprobs >= 0 && p->scores < c->scores.n) {
        json_out_key_open(&x->out, "logprobs", '{');
        json_out_key(&x->out, "content");
        score_out_chat(&x->out, x->api, &c->scores, p->scores, x->params.tokens_as_ids);
        json_out_close(&x->out, '}');
        p->scores = c->scores.n;
    } else {
        json_out_key_null(&x->out, "logprobs");
    }
    if (!x->params.return_token_ids) return;
    json_out_key_ids(&x->out, "token_ids", c->tokens, p->tokens_listed, (size_t)c->n_tokens);
    p->tokens_listed = (size_t)c->n_tokens;
}

/* A chunk up to the members of its delta, and from there to its end. */
static void open_chunk(struct exchange *x, const struct choice *c)
{
    exchange_event(x, NULL);
    json_out_open(&x->out, '{');
    write_head(x, "chat.completion.chunk");
    json_out_key_open(&x->out, "choices", '[');
    json_out_open(&x->out, '{');
    json_out_key_int(&x->out, "index", c->index);
    json_out_key_open(&x->out, "delta", '{');
}

static void close_chunk(struct exchange *x, struct choice *c, const char *finish, bool with_tokens)
{
    json_out_close(&x->out, '}');
    if (with_tokens)
        write_tokens(x, c);
    else
        json_out_key_null(&x->out, "logprobs");
    json_out_key_text(&x->out, "finish_reason", finish);
    if (finish) exchange_write_stop_reason(x, c);
    json_out_close(&x->out, '}');
    json_out_close(&x->out, ']');
    if (x->params.continuous_usage) exchange_write_usage(x, c);
    json_out_close(&x->out, '}');
    exchange_event_end(x);
}

static void begin(struct exchange *x, struct choice *c)
{
    open_chunk(x, c);
    json_out_key_text(&x->out, "role", "assistant");
    json_out_key_text(&x->out, "content", "");
    close_chunk(x, c, NULL, false);
}

static void write_arguments(struct exchange *x, int index, const char *text, size_t n)
{
    struct json_out *o = &x->out;
    json_out_key_open(o, "tool_calls", '[');
    json_out_open(o, '{');
    json_out_key_int(o, "index", index);
    json_out_key_open(o, "function", '{');
    json_out_key_string(o, "arguments", text, n);
    json_out_close(o, '}');
    json_out_close(o, '}');
    json_out_close(o, ']');
}

static void delta(struct exchange *x, struct choice *c, enum part_kind kind, const char *text, size_t n)
{
    open_chunk(x, c);
    if (kind == PART_ARGUMENTS) {
        write_arguments(x, c->n_calls - 1, text, n);
    } else if (kind == PART_REASONING) {
        json_out_key_string(&x->out, "reasoning", text, n);
        json_out_key_string(&x->out, "reasoning_content", text, n);
    } else {
        json_out_key_string(&x->out, "content", text, n);
    }
    close_chunk(x, c, NULL, true);
}

/* The name; the arguments follow in pieces. */
static void call(struct exchange *x, struct choice *c, int index)
{
    struct json_out *o = &x->out;
    open_chunk(x, c);
    json_out_key_open(o, "tool_calls", '[');
    write_call(x, c, index, true);
    json_out_close(o, ']');
    close_chunk(x, c, NULL, false);
}

static void finish(struct exchange *x, struct choice *c)
{
    open_chunk(x, c);
    close_chunk(x, c, c->finish, true);
}

static void end_head(struct exchange *x)
{
    write_head(x, "chat.completion.chunk");
}

static void end(struct exchange *x)
{
    exchange_write_end(x, end_head);
}

static void write_message(struct exchange *x, const struct choice *c)
{
    struct json_out *o = &x->out;
    json_out_key_open(o, "message", '{');
    json_out_key_text(o, "role", "assistant");
    if (c->content.n || (!c->n_calls && !c->reasoning.n))
        json_out_key_string(o, "content", c->content.data, c->content.n);
    else
        json_out_key_null(o, "content");
    json_out_key_null(o, "refusal");
    if (c->reasoning.n) {
        json_out_key_string(o, "reasoning", c->reasoning.data, c->reasoning.n);
        json_out_key_string(o, "reasoning_content", c->reasoning.data, c->reasoning.n);
    }
    if (c->n_calls) {
        json_out_key_open(o, "tool_calls", '[');
        for (int i = 0; i < c->n_calls; i++) write_call(x, c, i, false);
        json_out_close(o, ']');
    }
    json_out_close(o, '}');
}

static void whole(struct exchange *x)
{
    struct json_out *o = &x->out;
    json_out_open(o, '{');
    write_head(x, "chat.completion");
    json_out_key_open(o, "choices", '[');
    for (int i = 0; i < x->n_choices; i++) {
        struct choice *c = &x->choices[i];
        json_out_open(o, '{');
        json_out_key_int(o, "index", i);
        write_message(x, c);
        write_tokens(x, c);
        json_out_key_text(o, "finish_reason", c->finish);
        exchange_write_stop_reason(x, c);
        json_out_close(o, '}');
    }
    json_out_close(o, ']');
    exchange_write_usage(x, NULL);
    if (x->params.prompt_logprobs >= 0) {
        json_out_key(o, "prompt_logprobs");
        score_out_prompt(o, x->api, &x->choices[0].prompt_scores, x->params.prompt_logprobs);
    }
    if (x->params.return_token_ids)
        json_out_key_ids(o, "prompt_token_ids", x->prompts[0].ids, 0, (size_t)x->prompts[0].n);
    json_out_close(o, '}');
}

static const struct shape shape = { .begin = begin,
                                    .delta = delta,
                                    .call = call,
                                    .finish = finish,
                                    .end = end,
                                    .whole = whole,
                                    .fail = exchange_write_failure };

bool api_chat_begin_as(struct exchange *x, const struct shape *as)
{
    struct fault *f = &x->fault;
    x->shape = as;
    x->prompts = calloc(1, sizeof *x->prompts);
    if (!x->prompts) return fault_memory(f);
    x->n_prompts = 1;
    const char *model = json_string_value(json_object_get(x->body, "model"));
    if (model) x->model = model;
    if (!params_read(&x->params, x->api, x->chat, true, f) || !conversation_tools(&x->tools, x->chat, f) ||
        !conversation_prompt(x->prompts, x->api, x->chat, &x->params, f))
        return false;
    int64_t room = x->api->o.max_model_len - x->prompts->n;
    if (as->max_is_soft && room > 0 && x->params.max_tokens > room) x->params.max_tokens = room;
    const char *field = x->route == API_RESPONSES ? "input" : "messages";
    if (!prompt_fit(x->prompts, x->api, &x->params, field, f)) return false;
    if (x->params.prompt_logprobs >= 0 && x->prompts->n_pictures)
        return fault_set(f, "prompt_logprobs", "prompt_logprobs: not with images in the prompt");
    return constraint_read(&x->grammar, x->chat, x->tools, f) && exchange_start(x);
}

bool api_chat_begin(struct exchange *x)
{
    x->chat = json_incref(x->body);
    return api_chat_begin_as(x, &shape);
}
