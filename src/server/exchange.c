#include "server/exchange.h"
#include "server/api_routes.h"
#include "server/body.h"
#include "server/constraint.h"
#include "base/clock.h"
#include <inttypes.h>
#include <math.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    CHOICES_MAX = 1024,  /* of one exchange */
    SUBMITTED_MAX = 64,  /* of them in the scheduler's hands at a time */
    SCORES_MAX = 1 << 21 /* of prompts' tokens: some 100 MB of an answer */
};

/* Each event costs packets and wake-ups on both sides, so streams share so many a second; but nobody waits
 * longer for more text than readers notice. */
static const double EVENTS_A_SECOND = 1600, EVENT_SECONDS_MOST = 0.04;

void exchange_event(struct exchange *x, const char *name)
{
    if (name) {
        json_out_raw(&x->out, "event: ", 7);
        json_out_raw(&x->out, name, strlen(name));
        json_out_raw(&x->out, "\n", 1);
    }
    json_out_raw(&x->out, "data: ", 6);
    x->out.needs_comma = false;
}

void exchange_event_end(struct exchange *x)
{
    json_out_raw(&x->out, "\n\n", 2);
}

void exchange_write_id(struct exchange *x, const char *prefix)
{
    char id[120];
    snprintf(id, sizeof id, "%s%s", prefix, x->request_id);
    json_out_key_text(&x->out, "id", id);
}

void exchange_write_stop_reason(struct exchange *x, const struct choice *c)
{
    const struct stop_string *s = c->stop_string >= 0 ? &x->params.stops[c->stop_string] : NULL;
    if (s)
        json_out_key_string(&x->out, "stop_reason", s->text, s->n);
    else if (c->finish && strcmp(c->finish, "repetition") == 0)
        json_out_key_text(&x->out, "stop_reason", "repetition_detected");
    else if (c->stop_token >= 0)
        json_out_key_int(&x->out, "stop_reason", c->stop_token);
    else
        json_out_key_null(&x->out, "stop_reason");
}

void exchange_write_end(struct exchange *x, void (*head)(struct exchange *x))
{
    if (x->params.include_usage) {
        exchange_event(x, NULL);
        json_out_open(&x->out, '{');
        head(x);
        json_out_key_open(&x->out, "choices", '[');
        json_out_close(&x->out, ']');
        exchange_write_usage(x, NULL);
        json_out_close(&x->out, '}');
        exchange_event_end(x);
    }
    json_out_raw(&x->out, "data: [DONE]\n\n", 14);
}

void exchange_write_failure(struct exchange *x)
{
    exchange_event(x, NULL);
    fault_write(&x->out, x->route, x->fault.status, NULL, x->fault.param.text, x->fault.code, x->fault.text);
    exchange_event_end(x);
    json_out_raw(&x->out, "data: [DONE]\n\n", 14);
}

void exchange_usage(const struct exchange *x, const struct choice *only, struct request_usage *out,
                    int64_t *reasoning)
{
    *out = (struct request_usage){ 0 };
    *reasoning = 0;
    for (int i = 0; i < x->n_choices; i++) {
        const struct choice *c = &x->choices[i];
        struct request_usage u;
        if (only && c != only) continue;
        choice_usage(c, &u);
        if (only || i % x->params.n == 0) {
            out->prompt_tokens += u.prompt_tokens ? u.prompt_tokens : c->o.prompt->n;
            out->cached_tokens += u.cached_tokens;
            out->picture_tokens += u.picture_tokens;
            out->prefilled += u.prefilled;
        }
        out->answer_tokens += u.answer_tokens;
        out->drafted += u.drafted;
        out->accepted += u.accepted;
        out->queued_seconds += u.queued_seconds;
        out->prefill_seconds += u.prefill_seconds;
        out->decode_seconds += u.decode_seconds;
        *reasoning += c->n_reasoning;
    }
}

void exchange_write_usage(struct exchange *x, const struct choice *only)
{
    struct request_usage u;
    int64_t reasoning;
    struct json_out *o = &x->out;
    exchange_usage(x, only, &u, &reasoning);
    json_out_key_open(o, "usage", '{');
    json_out_key_int(o, "prompt_tokens", u.prompt_tokens);
    json_out_key_int(o, "completion_tokens", u.answer_tokens);
    json_out_key_int(o, "total_tokens", u.prompt_tokens + u.answer_tokens);
    json_out_key_open(o, "prompt_tokens_details", '{');
    json_out_key_int(o, "cached_tokens", u.cached_tokens);
    if (u.picture_tokens) json_out_key_int(o, "image_tokens", u.picture_tokens);
    json_out_close(o, '}');
    json_out_key_open(o, "completion_tokens_details", '{');
    json_out_key_int(o, "reasoning_tokens", reasoning);
    json_out_key_int(o, "accepted_prediction_tokens", u.accepted);
    json_out_key_int(o, "rejected_prediction_tokens", u.drafted - u.accepted);
    json_out_close(o, '}');
    const char *finish = x->choices[0].finish;
    if (reasoning > 0 && reasoning == u.answer_tokens && finish && strcmp(finish, "length") == 0)
        json_out_key_text(o, "note",
                          "the limit on tokens was reached while the model was thinking: there is no answer; "
                          "raise max_tokens, or set thinking_token_budget or reasoning_effort");
    json_out_close(o, '}');
}

/* From answers to events. */

static void say_text(struct exchange *x, int i)
{
    struct pending *p = &x->pending[i];
    if (p->text.n == 0) return;
    x->shape->delta(x, &x->choices[i], p->kind, p->text.data, p->text.n);
    json_out_clear(&p->text);
    p->said_at = x->now;
}

/* All streams speak at the same ticks of the clock: then a wake-up serves all of them, on both sides. */
static double tick_after(const struct exchange *x, double at)
{
    return (floor(at / x->between) + 1) * x->between;
}

/* Clock at which text that waits is to be said, whatever comes until then. */
static double due_at(const struct exchange *x, const struct pending *p)
{
    bool waits = p->text.n > 0 && p->said_at > 0 && !x->params.stream_interval;
    return waits ? tick_after(x, p->said_at) : 0;
}

/* The first text and the last are said at once. */
static bool is_due(const struct exchange *x, const struct pending *p, const struct choice *c)
{
    if (c->is_over || p->said_at == 0) return true;
    if (x->params.stream_interval) return c->n_tokens - p->tokens >= x->params.stream_interval;
    return x->now >= due_at(x, p);
}

static void begin(struct exchange *x, int i)
{
    if (x->pending[i].has_begun) return;
    x->pending[i].has_begun = true;
    if (x->shape->begin) x->shape->begin(x, &x->choices[i]);
}

static void take_part(void *ctx, enum part_kind kind, const char *text, size_t n)
{
    struct choice *c = ctx;
    struct exchange *x = c->exchange;
    struct pending *p = &x->pending[c->index];
    if (!x->params.stream) return;
    begin(x, c->index);
    if (kind != p->kind) say_text(x, c->index);
    p->kind = kind;
    if (kind == PART_CALL)
        x->shape->call(x, c, c->n_calls - 1);
    else if (kind == PART_CALL_END && x->shape->call_end)
        x->shape->call_end(x, c, c->n_calls - 1);
    else if (text)
        json_out_raw(&p->text, text, n);
}

static void say(struct exchange *x, int i)
{
    struct pending *p = &x->pending[i];
    struct choice *c = &x->choices[i];
    if (c->n_tokens == p->tokens && !c->is_over) return;
    begin(x, i);
    if (is_due(x, p, c)) {
        say_text(x, i);
        p->tokens = c->n_tokens;
    }
    if (c->is_over && !p->has_finished) {
        p->has_finished = true;
        x->shape->finish(x, c);
    }
}

/* To the scheduler. */

/* Prefixes are shared within a key and, where a request names one, within its salt. */
static bool salt(uint8_t out[32], const struct exchange *x)
{
    const char *more = x->params.cache_salt;
    memcpy(out, x->salt, 32);
    if (!more) return true;
    EVP_MD_CTX *d = EVP_MD_CTX_new();
    bool ok = d && EVP_DigestInit_ex(d, EVP_sha256(), NULL) && EVP_DigestUpdate(d, x->salt, 32) &&
              EVP_DigestUpdate(d, more, strlen(more)) && EVP_DigestFinal_ex(d, out, NULL);
    EVP_MD_CTX_free(d);
    return ok;
}

static bool submit(struct exchange *x, struct choice *c, struct err *e)
{
    const struct params *p = &x->params;
    const struct prompt_text *t = c->o.prompt;
    const struct api *a = x->api;
    struct request_options o = { .prompt = t->ids,
                                 .n_prompt = t->n,
                                 .pictures = t->pictures,
                                 .n_pictures = t->n_pictures,
                                 .sampling = p->sampling,
                                 .presence_penalty = p->presence_penalty,
                                 .frequency_penalty = p->frequency_penalty,
                                 .repetition_penalty = p->repetition_penalty,
                                 .max_tokens = p->max_tokens,
                                 .min_tokens = p->min_tokens,
                                 .stop_tokens = p->stop_tokens,
                                 .n_stop_tokens = p->n_stop_tokens,
                                 .never = a->never,
                                 .n_never = a->n_never,
                                 .bias = p->bias,
                                 .n_bias = p->n_bias,
                                 .allowed = p->allowed,
                                 .n_allowed = p->n_allowed,
                                 .bad_words = p->bad_words,
                                 .n_bad_words = p->n_bad_words,
                                 .top_logprobs = p->logprobs,
                                 .score_ids = p->score_ids,
                                 .n_score_ids = p->n_score_ids,
                                 .prompt_logprobs = p->prompt_logprobs >= 0 ? p->prompt_logprobs : -1,
                                 .constraint_after = -1,
                                 .thinking_budget = -1,
                                 .priority = (int)p->priority,
                                 .owner = x->owner };
    o.sampling.seed += (uint64_t)(c->index % p->n);
    if (p->echo && p->logprobs > o.prompt_logprobs) o.prompt_logprobs = p->logprobs;
    if (t->in_reasoning) {
        o.constraint_after = a->think_end;
        o.thinking_budget = p->thinking_budget;
        o.thinking_end = a->force_end.ids;
        o.n_thinking_end = (int)a->force_end.n;
    }
    if (!salt(o.salt, x)) return err_memory(e, "a cache salt", 32);
    if (x->grammar && !constraint_create(&o.constraint, x->grammar, a, t->in_reasoning, e)) return false;
    return scheduler_submit(a->o.scheduler, &c->request, &o, e);
}

/* Those after the first of a prompt wait until that one's prompt is computed: then they find it in the prefix
 * cache. Not so with pictures, which are decoded while a request is submitted: better now than on the loop.
 */
static bool may_submit(const struct exchange *x, int i)
{
    const struct choice *first = &x->choices[i - i % x->params.n];
    return !x->choices[i].is_submitted &&
           (i % x->params.n == 0 || first->o.prompt->n_pictures > 0 || first->n_tokens > 0 || first->is_over);
}

static bool submit_one(struct exchange *x, int i, bool *is_full)
{
    struct err e = { 0 };
    if (submit(x, &x->choices[i], &e)) {
        x->choices[i].is_submitted = true;
        x->n_submitted++;
        return true;
    }
    /* A full queue is an answer only while nothing has been taken yet. */
    *is_full = e.code == ERR_BUSY && x->n_submitted > 0;
    if (*is_full) return true;
    fault_from_err(&x->fault, NULL, &e);
    if (e.code == ERR_LIMIT) {
        x->fault.status = 400;
        x->fault.code = "context_length_exceeded";
    }
    return false;
}

static bool submit_more(struct exchange *x)
{
    bool is_full = false;
    for (int i = 0; i < x->n_choices && !is_full && x->n_submitted - x->n_over < SUBMITTED_MAX; i++)
        if (may_submit(x, i) && !submit_one(x, i, &is_full)) return false;
    return true;
}

/* Life of an exchange. */

static void cancel(struct exchange *x)
{
    for (int i = 0; i < x->n_choices; i++) {
        request_free(x->choices[i].request);
        x->choices[i].request = NULL;
        x->choices[i].is_over = true;
        if (!x->choices[i].finish) x->choices[i].finish = "error";
    }
}

/* The answer is an error; of a stream that has begun, its last event. */
static void fail(struct exchange *x)
{
    cancel(x);
    x->is_done = true;
    if (x->has_begun) {
        x->shape->fail(x);
        return;
    }
    json_out_clear(&x->out);
    x->params.stream = false;
    x->status = x->fault.status;
    fault_write(&x->out, x->route, x->fault.status, NULL, x->fault.param.text, x->fault.code, x->fault.text);
}

/* What prompts' scores cost in memory is known before they are computed. */
static bool check_scores(struct exchange *x)
{
    const struct params *p = &x->params;
    int best = p->echo && p->logprobs > p->prompt_logprobs ? p->logprobs : p->prompt_logprobs;
    int64_t n = 0;
    for (int i = 0; best >= 0 && i < x->n_prompts; i++) n += x->prompts[i].n * (best + 1) * p->n;
    return n <= SCORES_MAX || fault_status(&x->fault, 413, NULL,
                                           "log-probabilities of prompts: %" PRId64
                                           " asked for, at most %d in a request; send fewer "
                                           "prompts at a time or ask for fewer of the best",
                                           n, SCORES_MAX);
}

bool exchange_start(struct exchange *x)
{
    int n = x->n_prompts * x->params.n;
    if (!check_scores(x)) return false;
    if (n > CHOICES_MAX)
        return fault_set(&x->fault, "n", "%d prompts times n = %d: at most %d answers in a request",
                         x->n_prompts, x->params.n, CHOICES_MAX);
    x->choices = calloc((size_t)n + 1, sizeof *x->choices);
    x->pending = calloc((size_t)n + 1, sizeof *x->pending);
    if (!x->choices || !x->pending) return fault_memory(&x->fault);
    for (int i = 0; i < n; i++) {
        struct choice *c = &x->choices[i];
        const struct choice_options o = { .api = x->api,
                                          .params = &x->params,
                                          .prompt = &x->prompts[i / x->params.n],
                                          .tools = x->tools,
                                          .is_plain = x->shape->is_plain,
                                          .wants_prompt = x->params.prompt_logprobs >= 0 ||
                                                          (x->params.echo && x->params.logprobs >= 0),
                                          .grammar = x->grammar,
                                          .ctx = c,
                                          .part = take_part };
        c->exchange = x;
        c->index = i;
        x->n_choices = i + 1;
        if (!choice_init(c, &o, &x->fault)) return false;
    }
    if (!submit_more(x)) return false;
    if (x->params.stream) x->status = 200;
    return true;
}

/* An id of the client's choice in the body, as vLLM takes them: what a header and a log can hold. */
static bool take_id(char out[EXCHANGE_ID_MAX], struct exchange *x, const char *key, bool *given)
{
    static const char fine[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:";
    const struct fields in = { x->body, "", &x->fault };
    const char *id = NULL;
    if (!fields_text(&in, key, &id) || !id) return !x->fault.status;
    size_t n = strlen(id);
    if (n == 0 || n >= EXCHANGE_ID_MAX || id[strspn(id, fine)])
        return fault_set(&x->fault, key, "%s: expected 1 to %d letters, digits or . _ - :", key,
                         EXCHANGE_ID_MAX - 1);
    memcpy(out, id, n + 1);
    *given = true;
    return true;
}

static bool take_ids(struct exchange *x)
{
    return take_id(x->request_id, x, "request_id", &x->chose_id) &&
           take_id(x->session_id, x, "session_id", &x->has_session);
}

struct exchange *exchange_create(struct api *a, enum api_route route, const char *argument, const char *body,
                                 size_t bytes, const struct api_caller *caller)
{
    struct exchange *x = calloc(1, sizeof *x);
    if (!x) return NULL;
    x->api = a;
    x->route = route;
    x->began = clock_seconds();
    x->between = EVENT_SECONDS_MOST;
    x->created = (int64_t)time(NULL);
    x->owner = caller->owner;
    memcpy(x->salt, caller->salt, sizeof x->salt);
    snprintf(x->request_id, sizeof x->request_id, "%s", caller->request_id ? caller->request_id : "0");
    x->model = a->o.served_names[0];
    if (!(api_route_reads_body(route) ? body_parse(&x->body, route, a, body, bytes, &x->fault) && take_ids(x)
                                      : true) ||
        !api_route_begin(x, argument))
        fail(x);
    return x;
}

void exchange_free(struct exchange *x)
{
    if (!x) return;
    for (int i = 0; i < x->n_choices; i++) {
        choice_deinit(&x->choices[i]);
        json_out_deinit(&x->pending[i].text);
    }
    free(x->choices);
    free(x->pending);
    for (int i = 0; i < x->n_prompts; i++) prompt_text_deinit(&x->prompts[i]);
    free(x->prompts);
    grammar_share_release(x->grammar);
    params_deinit(&x->params);
    json_decref(x->chat);
    json_decref(x->body);
    json_out_deinit(&x->out);
    json_out_deinit(&x->kept);
    free(x->state);
    free(x);
}

int exchange_status(const struct exchange *x)
{
    return x->status;
}

bool exchange_is_stream(const struct exchange *x)
{
    return x->params.stream;
}

const char *exchange_request_id(const struct exchange *x)
{
    return x->chose_id ? x->request_id : NULL;
}

const char *exchange_session_id(const struct exchange *x)
{
    return x->has_session ? x->session_id : NULL;
}

int exchange_retry_after(const struct exchange *x)
{
    return x->fault.retry_after;
}

static bool take_news(struct exchange *x)
{
    for (int i = 0; i < x->n_choices; i++) {
        struct choice *c = &x->choices[i];
        if (!c->is_submitted || c->is_over) continue;
        if (!choice_pump(c)) return fault_memory(&x->fault);
        if (c->is_over && strcmp(c->finish, "error") == 0)
            return fault_status(&x->fault, 500, NULL, "%s", c->error);
        if (x->params.stream) say(x, i);
        x->n_over += c->is_over;
    }
    return submit_more(x);
}

bool exchange_answered(struct exchange *x)
{
    x->status = 200;
    x->is_done = true;
    return !x->out.failed || fault_memory(&x->fault);
}

static void answer_whole(struct exchange *x)
{
    x->shape->whole(x);
    x->status = 200;
}

static void pump(struct exchange *x)
{
    json_out_clear(&x->out);
    x->now = clock_seconds();
    if (!take_news(x)) {
        fail(x);
        return;
    }
    if (x->n_over == x->n_choices) {
        x->is_done = true;
        if (x->params.stream)
            x->shape->end(x);
        else
            answer_whole(x);
    }
    if (!x->out.failed) return;
    json_out_deinit(&x->out);
    fault_memory(&x->fault);
    fail(x);
}

void exchange_among(struct exchange *x, int64_t n_exchanges)
{
    x->between = fmin((double)n_exchanges / EVENTS_A_SECOND, EVENT_SECONDS_MOST);
}

const char *exchange_pump(struct exchange *x, size_t *bytes, bool *done)
{
    /* What was answered while the exchange was made is handed out by the first call. */
    if (!x->is_done)
        pump(x);
    else if (x->was_taken)
        json_out_clear(&x->out);
    x->was_taken = x->is_done;
    /* Who calls now knows that it is a stream. */
    if (x->params.stream) x->has_begun = true;
    *bytes = x->out.n;
    *done = x->is_done;
    return x->out.data ? x->out.data : "";
}

double exchange_due(const struct exchange *x)
{
    double first = 0;
    for (int i = 0; i < x->n_choices && x->params.stream && !x->is_done; i++) {
        double at = due_at(x, &x->pending[i]);
        if (at > 0 && (first == 0 || at < first)) first = at;
    }
    return first;
}

double exchange_look(const struct exchange *x)
{
    bool counts = x->params.stream_interval || x->params.one_call;
    for (int i = 0; i < x->n_choices; i++) {
        const struct choice *c = &x->choices[i];
        if (!c->is_over && c->n_tokens == 0) return 0;
        counts = counts || c->stops || c->repeats;
    }
    return counts ? x->now : tick_after(x, x->now);
}

const char *exchange_comment(struct exchange *x, size_t *bytes)
{
    struct request_usage u;
    int64_t reasoning;
    char text[80];
    exchange_usage(x, NULL, &u, &reasoning);
    int n = snprintf(text, sizeof text, ": prompt %" PRId64 "/%" PRId64 "\n\n", u.prefilled, u.prompt_tokens);
    json_out_clear(&x->out);
    json_out_raw(&x->out, text, (size_t)n);
    x->has_begun = true;
    *bytes = x->out.n;
    return x->out.data ? x->out.data : "";
}

void exchange_account(const struct exchange *x, struct exchange_account *out)
{
    double first = 0, last = 0;
    int64_t reasoning;
    *out = (struct exchange_account){ .finish = "",
                                      .n_choices = x->n_choices,
                                      .max_tokens = x->params.max_tokens };
    if (x->fault.status) out->finish = "error";
    for (int i = 0; i < x->n_choices; i++) {
        const struct choice *c = &x->choices[i];
        if (c->first_token > 0 && (first == 0 || c->first_token < first)) first = c->first_token;
        if (c->last_token > last) last = c->last_token;
        if (i == 0 && c->finish && !x->fault.status) out->finish = c->finish;
    }
    exchange_usage(x, NULL, &out->usage, &reasoning);
    if (first > 0) out->first_token = first - x->began;
    if (out->usage.answer_tokens > 1)
        out->per_token = (last - first) / (double)(out->usage.answer_tokens - 1);
}
