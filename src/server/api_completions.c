/* /v1/completions. Source: OpenAI's API reference, "Completions"; vLLM's additions of the same names. */
#include "server/api_routes.h"
#include "server/constraint.h"
#include "server/score_out.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void write_head(struct exchange *x)
{
    exchange_write_id(x, "cmpl-");
    json_out_key_text(&x->out, "object", "text_completion");
    json_out_key_int(&x->out, "created", x->created);
    json_out_key_text(&x->out, "model", x->model);
}

/* What was asked to be said of the tokens since the last chunk; the first one has the prompt's too. */
static void write_tokens(struct exchange *x, struct choice *c)
{
    struct pending *p = &x->pending[c->index];
    const struct params *q = &x->params;
    bool with_prompt = q->echo && !p->prompt_said;
    if (q->logprobs >= 0) {
        const struct score_range ranges[2] = { { with_prompt ? &c->prompt_scores : NULL, 0, q->logprobs },
                                               { &c->scores, p->scores, q->logprobs } };
        json_out_key(&x->out, "logprobs");
        score_out_completions(&x->out, x->api, ranges, q->tokens_as_ids, &p->offset);
        p->scores = c->scores.n;
    } else {
        json_out_key_null(&x->out, "logprobs");
    }
    if (q->return_token_ids) {
        if (!p->prompt_said)
            json_out_key_ids(&x->out, "prompt_token_ids", c->o.prompt->ids, 0, (size_t)c->o.prompt->n);
        json_out_key_ids(&x->out, "token_ids", c->tokens, p->tokens_listed, (size_t)c->n_tokens);
        p->tokens_listed = (size_t)c->n_tokens;
    }
    p->prompt_said = true;
}

static void chunk(struct exchange *x, struct choice *c, const char *text, size_t n, const char *finish)
{
    struct json_out *o = &x->out;
    exchange_event(x, NULL);
    json_out_open(o, '{');
    write_head(x);
    json_out_key_open(o, "choices", '[');
    json_out_open(o, '{');
    json_out_key_int(o, "index", c->index);
    json_out_key_string(o, "text", text, n);
    write_tokens(x, c);
    json_out_key_text(o, "finish_reason", finish);
    if (finish) exchange_write_stop_reason(x, c);
    json_out_close(o, '}');
    json_out_close(o, ']');
    if (x->params.continuous_usage) exchange_write_usage(x, c);
    json_out_close(o, '}');
    exchange_event_end(x);
}

static void begin(struct exchange *x, struct choice *c)
{
    if (x->params.echo) chunk(x, c, c->o.prompt->text, c->o.prompt->bytes, NULL);
}

static void delta(struct exchange *x, struct choice *c, enum part_kind kind, const char *text, size_t n)
{
    (void)kind;
    chunk(x, c, text, n, NULL);
}

static void finish(struct exchange *x, struct choice *c)
{
    chunk(x, c, "", 0, c->finish);
}

static void end(struct exchange *x)
{
    exchange_write_end(x, write_head);
}

static void write_text(struct exchange *x, const struct choice *c)
{
    struct json_out text = { 0 };
    if (x->params.echo) json_out_raw(&text, c->o.prompt->text, c->o.prompt->bytes);
    json_out_raw(&text, c->content.data, c->content.n);
    json_out_key_string(&x->out, "text", text.data, text.n);
    x->out.failed |= text.failed;
    json_out_deinit(&text);
}

static void whole(struct exchange *x)
{
    struct json_out *o = &x->out;
    json_out_open(o, '{');
    write_head(x);
    json_out_key_open(o, "choices", '[');
    for (int i = 0; i < x->n_choices; i++) {
        struct choice *c = &x->choices[i];
        json_out_open(o, '{');
        json_out_key_int(o, "index", i);
        write_text(x, c);
        write_tokens(x, c);
        json_out_key_text(o, "finish_reason", c->finish);
        exchange_write_stop_reason(x, c);
        if (x->params.prompt_logprobs >= 0) {
            json_out_key(o, "prompt_logprobs");
            score_out_prompt(o, x->api, &c->prompt_scores, x->params.prompt_logprobs);
        }
        json_out_close(o, '}');
    }
    json_out_close(o, ']');
    exchange_write_usage(x, NULL);
    json_out_close(o, '}');
}

static const struct shape shape = { .is_plain = true,
                                    .begin = begin,
                                    .delta = delta,
                                    .finish = finish,
                                    .end = end,
                                    .whole = whole,
                                    .fail = exchange_write_failure };

/* Token ids as a prompt; the text they stand for is needed where it is echoed. */
static bool from_ids(struct prompt_text *out, const struct exchange *x, const json_t *list, const char *param,
                     struct fault *f)
{
    json_t *named = json_pack("{s:O}", param, list);
    const struct fields in = { named, "", f };
    struct err e = { 0 };
    int n = 0;
    bool ok = named || fault_memory(f);
    ok = ok && fields_ids(&in, param, x->api->n_vocab, &out->ids, &n);
    out->n = n;
    json_decref(named);
    return ok &&
           (!x->params.echo ||
            tokenizer_decode(x->api->o.tokenizer, out->ids, (size_t)n, false, &out->text, &out->bytes, &e) ||
            fault_from_err(f, param, &e));
}

static bool add_prompt(struct exchange *x, const json_t *v, const char *param)
{
    struct prompt_text *p = &x->prompts[x->n_prompts++];
    struct fault *f = &x->fault;
    bool ok = json_is_string(v)
                  ? prompt_from_text(p, x->api, json_string_value(v), json_string_length(v), param, f)
              : json_is_array(v) ? from_ids(p, x, v, param, f)
                                 : fields_wrong(f, param, "a string or an array of token ids", v);
    return ok && prompt_fit(p, x->api, &x->params, "prompt", f);
}

static bool add_prompts(struct exchange *x)
{
    const json_t *prompt = json_object_get(x->body, "prompt"), *first = json_array_get(prompt, 0);
    bool is_list = json_is_array(prompt) && (json_is_string(first) || json_is_array(first));
    size_t n = is_list ? json_array_size(prompt) : 1;
    if (!prompt || json_is_null(prompt))
        return fields_wrong(&x->fault, "prompt", "a string, token ids, or a list of these", prompt);
    x->prompts = calloc(n, sizeof *x->prompts);
    if (!x->prompts) return fault_memory(&x->fault);
    if (!is_list) return add_prompt(x, prompt, "prompt");
    for (size_t i = 0; i < n; i++) {
        char param[40];
        snprintf(param, sizeof param, "prompt[%zu]", i);
        if (!add_prompt(x, json_array_get(prompt, i), param)) return false;
    }
    return true;
}

bool api_completions_prompts(struct exchange *x)
{
    const char *model = json_string_value(json_object_get(x->body, "model"));
    if (model) x->model = model;
    return params_read(&x->params, x->api, x->body, false, &x->fault) && add_prompts(x);
}

bool api_completions_begin(struct exchange *x)
{
    x->shape = &shape;
    return api_completions_prompts(x) && constraint_read(&x->grammar, x->body, NULL, &x->fault) &&
           exchange_start(x);
}
