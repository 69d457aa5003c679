/* What an answer cost, into metrics and the request log. */
#include "base/clock.h"
#include "server/crash.h"
#include "server/server_struct.h"
#include <string.h>
#include <time.h>

static const double LOOK_SECONDS = 0.1;

static bool generates(const struct connection *c)
{
    if (!c->route || c->route->kind != ROUTE_API) return false;
    enum api_route r = c->route->api;
    return r == API_CHAT_COMPLETIONS || r == API_COMPLETIONS || r == API_RESPONSES || r == API_MESSAGES;
}

static void see_prompt(struct connection *c, const struct exchange_account *a)
{
    if (c->prompt_counted) return;
    c->prompt_counted = true;
    c->server->metrics.prompt_tokens_total += (uint64_t)a->usage.prompt_tokens;
}

/* Tokens of a look are taken to have come evenly since the look before; of n answers at once each has its
 * share of them. */
static void see_tokens(struct connection *c, const struct exchange_account *a, double now)
{
    struct metrics *m = &c->server->metrics;
    int64_t fresh = a->usage.answer_tokens - c->seen_tokens;
    if (fresh <= 0) return;
    m->generation_tokens_total += (uint64_t)fresh;
    if (c->seen_tokens == 0) {
        see_prompt(c, a);
        c->first_token = now - c->begun;
        histogram_observe(&m->first_token, c->first_token, 1);
    } else {
        int64_t choices = a->n_choices > 0 ? a->n_choices : 1;
        histogram_observe(&m->inter_token, (now - c->seen_at) * (double)choices / (double)fresh,
                          (uint64_t)fresh);
    }
    c->seen_tokens = a->usage.answer_tokens;
    c->seen_at = now;
}

/* state: NULL where it is over. */
static void note(struct connection *c, const char *state, const struct exchange_account *a, double now)
{
    const struct request_usage *u = &a->usage;
    struct crash_request r = { .path = c->route ? c->route->path : "",
                               .state = state,
                               .owner = c->caller.owner,
                               .began = c->begun,
                               .seconds = now - c->begun,
                               .status = c->status,
                               .stream = c->streams,
                               .body_bytes = c->request.chunked ? 0 : (int64_t)c->request.content_length,
                               .prompt_tokens = u->prompt_tokens,
                               .cached_tokens = u->cached_tokens,
                               .answer_tokens = u->answer_tokens };
    snprintf(r.id, sizeof r.id, "%s", c->request_id);
    crash_note(&c->crash_place, &r);
}

void account_state(struct connection *c, const char *state)
{
    struct exchange_account a = { 0 };
    if (c->exchange) exchange_account(c->exchange, &a);
    note(c, state, &a, c->begun);
}

/* How many there are costs a lock and a sum; after the first one it is asked with events, and now and then.
 */
void account_tokens(struct connection *c, double now, bool says)
{
    struct exchange_account a = { 0 };
    if (!says && c->seen_tokens > 0 && now - c->seen_at < LOOK_SECONDS) return;
    if (!c->exchange || !generates(c)) return;
    exchange_account(c->exchange, &a);
    if (a.usage.answer_tokens > c->seen_tokens) note(c, "decode", &a, now);
    see_tokens(c, &a, now);
}

static void count_route(struct server *s, const struct connection *c, int status)
{
    int i = 0, class = status / 100;
    while (route_at(i) && route_at(i) != c->route) i++;
    struct metrics_route *r = &s->routes[i < ROUTES_MAX && route_at(i) ? i : ROUTES_MAX];
    r->by_class[class > 0 && class < 6 ? class : 5]++;
    s->metrics.rejected += status == 429 || status == 503;
}

/* 00-TRACE-SPAN-FLAGS; W3C Trace Context. */
static const char *trace_of(const struct http_request *r)
{
    const char *t = http_header(r, "traceparent");
    return t && strlen(t) == 55 && strspn(t, "0123456789abcdef-") == 55 ? t : NULL;
}

static void add_tokens(json_t *line, const struct exchange_account *a, const struct connection *c,
                       bool aborted)
{
    const struct request_usage *u = &a->usage;
    const char *finish = a->finish && *a->finish && !aborted ? a->finish : "abort";
    json_object_update_new(line, json_pack("{s:b, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "stream",
                                           c->streams, "finish", finish, "choices", (json_int_t)a->n_choices,
                                           "prompt_tokens", (json_int_t)u->prompt_tokens, "cached_tokens",
                                           (json_int_t)u->cached_tokens, "picture_tokens",
                                           (json_int_t)u->picture_tokens, "answer_tokens",
                                           (json_int_t)u->answer_tokens, "drafted", (json_int_t)u->drafted,
                                           "accepted", (json_int_t)u->accepted));
    json_object_update_new(line, json_pack("{s:f, s:f, s:f, s:f}", "queued_seconds", u->queued_seconds,
                                           "prefill_seconds", u->prefill_seconds, "decode_seconds",
                                           u->decode_seconds, "first_token_seconds", c->first_token));
}

/* Of the path only what the table of routes has. */
static json_t *line_of(const struct connection *c, int status, double now)
{
    struct timespec t;
    char owner[20];
    clock_gettime(CLOCK_REALTIME, &t);
    json_t *line = json_pack("{s:f, s:s, s:s?, s:s, s:s, s:i, s:f, s:I}", "time",
                             (double)t.tv_sec + 1e-9 * (double)t.tv_nsec, "id", c->request_id, "trace",
                             trace_of(&c->request), "method", c->route ? c->route->method : "", "path",
                             c->route ? c->route->path : "", "status", status, "seconds",
                             c->begun > 0 ? now - c->begun : 0.0, "sent_bytes", (json_int_t)c->sent_bytes);
    const char *session = c->exchange ? exchange_session_id(c->exchange) : NULL;
    if (session) json_object_set_new(line, "session", json_string(session));
    if (c->caller.owner) {
        snprintf(owner, sizeof owner, "%016llx", (unsigned long long)c->caller.owner);
        json_object_set_new(line, "key", json_string(owner));
    }
    return line;
}

void account_request(struct connection *c, bool aborted)
{
    struct server *s = c->server;
    struct exchange_account a = { 0 };
    double now = clock_seconds();
    int status = c->status ? c->status : 499; /* as nginx has it: the client left before an answer began */
    bool counts = false;
    if (c->exchange && generates(c)) {
        exchange_account(c->exchange, &a);
        counts = a.n_choices > 0;
        see_tokens(c, &a, now);
        if (aborted) a.finish = "abort";
        if (counts) {
            see_prompt(c, &a);
            metrics_take_request(&s->metrics, &a, now - c->begun);
            if (!aborted) limits_observe(s, a.usage.prefill_seconds + a.usage.decode_seconds);
        }
    }
    if (!c->is_admin) count_route(s, c, status);
    if (c->crash_place) note(c, NULL, &a, now);
    if (!s->log) return;
    json_t *line = line_of(c, status, now);
    if (counts) add_tokens(line, &a, c, aborted);
    request_log_write(s->log, line);
}
