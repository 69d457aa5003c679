#include "server/choice.h"
#include "base/clock.h"
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EVENTS = 32 };

/* The call that is under way; NULL: none is. */
static struct tool_call *open_call(const struct choice *c)
{
    struct tool_call *last = c->n_calls ? &c->calls[c->n_calls - 1] : NULL;
    return last && last->is_open ? last : NULL;
}

static void begin_call(struct choice *c, const char *name)
{
    if (c->o.params->one_call && c->n_calls > 0) return;
    struct tool_call *grown = realloc(c->calls, (size_t)(c->n_calls + 1) * sizeof *grown);
    if (grown) c->calls = grown;
    char *copy = grown ? strdup(name) : NULL;
    if (!copy) {
        c->content.failed = true;
        return;
    }
    grown[c->n_calls++] = (struct tool_call){ .name = copy, .is_open = true };
    c->o.part(c->o.ctx, PART_CALL, NULL, 0);
}

/* Hands on the arguments from `from` on. */
static void give_arguments(struct choice *c, const struct tool_call *call, size_t from)
{
    if (call->arguments.failed)
        c->content.failed = true;
    else if (call->arguments.n > from)
        c->o.part(c->o.ctx, PART_ARGUMENTS, call->arguments.data + from, call->arguments.n - from);
}

/* What is certain of a call that is not complete. */
static void take_argument(struct choice *c, const struct reply_event *event)
{
    struct tool_call *call = open_call(c);
    if (!call) return;
    struct json_out *o = &call->arguments;
    size_t from = o->n;
    if (from == 0) json_out_open(o, '{');
    if (event->kind == REPLY_ARGUMENT) json_out_name(o, event->name);
    if (event->kind == REPLY_ARGUMENT && event->value) json_out_value(o, event->value);
    if (event->kind == REPLY_ARGUMENT && !event->value) json_out_string_begin(o);
    if (event->kind == REPLY_ARGUMENT_PART) json_out_string_part(o, event->part, event->part_bytes);
    if (event->kind == REPLY_ARGUMENT_ENDS) json_out_string_end(o);
    if (event->kind == REPLY_ARGUMENT_ENDS || event->value) call->whole = o->n;
    give_arguments(c, call, from);
}

static void end_call(struct choice *c, struct tool_call *call, bool is_cut)
{
    call->is_open = false;
    call->is_cut = is_cut;
    c->o.part(c->o.ctx, PART_CALL_END, NULL, 0);
}

/* A complete call: what was not handed on yet of the arguments. */
static void take_call(struct choice *c, const struct reply_event *event)
{
    if (!open_call(c)) begin_call(c, event->name);
    struct tool_call *call = open_call(c);
    if (!call) return;
    struct json_out all = { 0 };
    size_t from = call->arguments.n;
    json_out_value(&all, event->arguments);
    if (all.failed) {
        c->content.failed = true;
        json_out_deinit(&all);
        return;
    }
    assert(from <= all.n && (from == 0 || memcmp(all.data, call->arguments.data, from) == 0));
    json_out_deinit(&call->arguments);
    call->arguments = all;
    call->whole = all.n;
    give_arguments(c, call, from);
    end_call(c, call, false);
}

static void give(struct choice *c, enum part_kind kind, const char *text, size_t n)
{
    if (n == 0) return;
    json_out_raw(kind == PART_REASONING ? &c->reasoning : &c->content, text, n);
    c->o.part(c->o.ctx, kind, text, n);
}

/* A call that a limit cut keeps its arguments open, so that nobody can take half a command for the whole; it
 * is text if nothing was said of it yet. */
static void take_event(void *ctx, const struct reply_event *event)
{
    struct choice *c = ctx;
    bool is_cut = event->is_cut && (strcmp(c->finish, "stop") != 0 || c->stop_string >= 0);
    switch (event->kind) {
    case REPLY_MARK: return;
    case REPLY_CALL_BEGINS:
        if (c->o.tools) begin_call(c, event->name);
        return;
    case REPLY_ARGUMENT:
    case REPLY_ARGUMENT_PART:
    case REPLY_ARGUMENT_ENDS: take_argument(c, event); return;
    case REPLY_REASONING:
        if (!c->o.params->no_reasoning) give(c, PART_REASONING, event->text, event->bytes);
        return;
    case REPLY_CALL:
        if (c->o.tools && !is_cut) {
            take_call(c, event);
            return;
        }
        if (open_call(c)) {
            end_call(c, open_call(c), true);
            return;
        }
        break;
    default: break;
    }
    give(c, PART_CONTENT, event->text, event->bytes);
}

/* Room for one more than n. */
static bool grow(void **items, size_t *capacity, size_t n, size_t size)
{
    if (n < *capacity) return true;
    size_t more = 2 * n + 16;
    void *grown = realloc(*items, more * size);
    if (!grown) return false;
    *items = grown;
    *capacity = more;
    return true;
}

static bool keep_score(struct score_list *l, const struct request_event *event, bool has_score)
{
    if (!grow((void **)&l->items, &l->capacity, l->n, sizeof *l->items)) return false;
    int n = has_score ? event->n_top : 0;
    for (int i = 0; i < n; i++) {
        if (!grow((void **)&l->top, &l->top_capacity, l->n_top + (size_t)i, sizeof *l->top)) return false;
        l->top[l->n_top + (size_t)i] = event->top[i];
    }
    l->items[l->n++] =
        (struct score){ event->token.id, event->token.logprob, event->rank, has_score, l->n_top, (size_t)n };
    l->n_top += (size_t)n;
    return true;
}

bool choice_init(struct choice *c, const struct choice_options *o, struct fault *f)
{
    struct err e = { 0 };
    const struct reply_options ro = {
        .in_reasoning = o->prompt->in_reasoning, .tools = o->tools, .event = take_event, .ctx = c
    };
    c->o = *o;
    c->stop_string = c->stop_token = -1;
    c->in_reasoning = o->prompt->in_reasoning;
    bool ok =
        (o->params->n_stops == 0 || stops_create(&c->stops, o->params->stops, o->params->n_stops, &e)) &&
        (o->params->repeats.size_max == 0 || repeats_create(&c->repeats, &o->params->repeats, &e)) &&
        (o->is_plain || reply_create(&c->reply, &ro, &e));
    /* The first token of a text follows nothing. */
    const struct request_event first = { .token.id = o->prompt->ids[0] };
    if (ok && o->wants_prompt)
        ok = keep_score(&c->prompt_scores, &first, false) || err_memory(&e, "scores", 1);
    return ok || fault_from_err(f, NULL, &e);
}

static void score_list_deinit(struct score_list *l)
{
    free(l->items);
    free(l->top);
}

void choice_deinit(struct choice *c)
{
    request_free(c->request);
    stops_free(c->stops);
    reply_free(c->reply);
    repeats_free(c->repeats);
    json_out_deinit(&c->reasoning);
    json_out_deinit(&c->content);
    for (int i = 0; i < c->n_calls; i++) {
        free(c->calls[i].name);
        json_out_deinit(&c->calls[i].arguments);
    }
    free(c->calls);
    score_list_deinit(&c->scores);
    score_list_deinit(&c->prompt_scores);
    free(c->tokens);
}

static bool is_one_of(const int32_t *ids, int n, int32_t id)
{
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

/* Past the stop strings. */
static bool take_certain(struct choice *c, const char *text, size_t n)
{
    struct err e;
    if (c->reply) return reply_feed(c->reply, text, n, &e);
    give(c, PART_CONTENT, text, n);
    return true;
}

static void end(struct choice *c, const char *finish)
{
    c->finish = finish;
    c->is_over = true;
}

static bool take_text(struct choice *c, const char *text, size_t n)
{
    const char *certain = text;
    int found = -1;
    if (c->stops && c->n_tokens <= c->o.params->min_tokens)
        n = stops_pass(c->stops, text, n, &certain);
    else if (c->stops)
        n = stops_push(c->stops, text, n, &certain, &found);
    if (!take_certain(c, certain, n)) return false;
    if (found < 0) return true;
    c->stop_string = found;
    end(c, "stop");
    const struct stop_string *s = &c->o.params->stops[found];
    return !c->o.params->include_stop || take_certain(c, s->text, s->n);
}

static bool take_bytes(struct choice *c, int32_t id)
{
    char small[256], *out = small;
    size_t bytes;
    tokenizer_bytes(c->o.api->o.tokenizer, id, &bytes);
    if (3 * bytes + DETOKENIZER_ROOM > sizeof small) out = malloc(3 * bytes + DETOKENIZER_ROOM);
    if (!out) return false;
    size_t n = detokenizer_push(&c->detokenizer, c->o.api->o.tokenizer, id, !c->o.params->keep_special, out);
    bool ok = take_text(c, out, n);
    if (out != small) free(out);
    return ok;
}

static bool keep_token(struct choice *c, int32_t id)
{
    if (!c->o.params->return_token_ids) return true;
    if (!grow((void **)&c->tokens, &c->tokens_capacity, (size_t)c->n_tokens, sizeof *c->tokens)) return false;
    c->tokens[c->n_tokens] = id;
    return true;
}

static bool take_token(struct choice *c, const struct request_event *event)
{
    const struct params *p = c->o.params;
    int32_t id = event->kind == REQUEST_FINISHED ? event->stop_token : event->token.id;
    c->last_token = clock_seconds();
    if (c->n_tokens == 0) c->first_token = c->last_token;
    if (!keep_token(c, id)) return false;
    c->n_tokens++;
    if (id == c->o.api->think_end)
        c->in_reasoning = false;
    else if (c->in_reasoning)
        c->n_reasoning++;
    return p->logprobs < 0 || keep_score(&c->scores, event, true);
}

/* Its score counts where lm-eval looks for one entry more than the prompt has tokens. */
static bool take_stop_token(struct choice *c, const struct request_event *event)
{
    if (!is_one_of(c->o.api->stops, c->o.api->n_stops, event->stop_token)) c->stop_token = event->stop_token;
    return take_token(c, event) && (!c->o.params->include_stop || take_bytes(c, event->stop_token));
}

/* What was held back comes out, unless a stop string ended the text. */
static bool flush(struct choice *c)
{
    char tail[DETOKENIZER_ROOM];
    const char *held;
    struct err e;
    bool ok = true;
    if (c->stop_string < 0) ok = take_text(c, tail, detokenizer_finish(&c->detokenizer, tail));
    if (c->stop_string < 0 && c->stops) {
        size_t n = stops_finish(c->stops, &held);
        ok = ok && take_certain(c, held, n);
    }
    ok = ok && (!c->reply || reply_finish(c->reply, &e));
    if (c->n_calls && !c->calls[c->n_calls - 1].is_cut && strcmp(c->finish, "stop") == 0)
        c->finish = "tool_calls";
    return ok;
}

static bool take_finish(struct choice *c, const struct request_event *event)
{
    static const char *const names[] = { "stop", "length", "abort", "error" };
    if (event->finish == FINISHED_STOP && event->stop_token >= 0 && !take_stop_token(c, event)) return false;
    end(c, names[event->finish]);
    if (event->finish == FINISHED_STOP && event->stop_token < 0 && grammar_share_is_stuck(c->o.grammar))
        c->finish = "length";
    if (event->finish == FINISHED_ERROR) {
        const char *text = request_error(c->request);
        snprintf(c->error, sizeof c->error, "%s", text ? text : "the request failed");
    }
    return true;
}

/* Before min_tokens nothing ends an answer. */
static void look_for_repeats(struct choice *c, int32_t id)
{
    if (c->repeats && repeats_push(c->repeats, id) && !c->is_over && c->n_tokens >= c->o.params->min_tokens)
        end(c, "repetition");
}

static bool take(struct choice *c, const struct request_event *event)
{
    switch (event->kind) {
    case REQUEST_PROMPT: return !c->o.wants_prompt || keep_score(&c->prompt_scores, event, true);
    case REQUEST_TOKEN:
        if (!take_token(c, event) || !take_bytes(c, event->token.id)) return false;
        look_for_repeats(c, event->token.id);
        return true;
    default: return take_finish(c, event);
    }
}

/* One call was asked for, and has come. */
static bool has_enough(const struct choice *c)
{
    return c->o.params->one_call && c->n_calls > 0 && !open_call(c);
}

bool choice_pump(struct choice *c)
{
    struct request_event events[EVENTS];
    bool ok = true;
    int n;
    while (ok && !c->is_over && (n = request_take(c->request, events, EVENTS)) > 0)
        for (int i = 0; ok && i < n && !c->is_over; i++) {
            ok = take(c, &events[i]);
            if (ok && !c->is_over && has_enough(c)) end(c, "stop");
        }
    if (!c->is_over || !ok) return ok && !c->content.failed && !c->reasoning.failed;
    ok = flush(c);
    request_usage(c->request, &c->usage);
    request_free(c->request);
    c->request = NULL;
    return ok && !c->content.failed && !c->reasoning.failed;
}

void choice_usage(const struct choice *c, struct request_usage *out)
{
    *out = c->usage;
    if (c->request) request_usage(c->request, out);
    out->answer_tokens = c->n_tokens;
}
