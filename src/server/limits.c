#include "server/limits.h"
#include "server/server_struct.h"
#include <inttypes.h>
#include <math.h>

enum { RETRY_SECONDS_MAX = 60 };

bool limits_allow_request(const struct connection *c, char message[LIMITS_MESSAGE])
{
    const struct server *s = c->server;
    int64_t n = 0, most = s->o.max_key_requests;
    if (most == 0) return true;
    for (const struct connection *x = s->connections; x; x = x->next)
        n += x != c && connection_is_answering(x) && x->caller.owner == c->caller.owner;
    if (n < most) return true;
    snprintf(message, LIMITS_MESSAGE,
             "%" PRId64 " requests of this key are under way, which is the limit (--max-requests-per-key)",
             n);
    return false;
}

/* Tokens of its prompts that are not computed yet. */
static int64_t waiting_tokens(const struct connection *c)
{
    struct exchange_account a;
    if (!c->exchange) return 0;
    exchange_account(c->exchange, &a);
    return a.usage.prompt_tokens - a.usage.prefilled;
}

bool limits_allow_tokens(const struct connection *c, int *status, char message[LIMITS_MESSAGE])
{
    const struct server *s = c->server;
    int64_t all = 0, of_key = 0, own;
    if (s->o.max_key_tokens == 0 && s->o.max_queued_tokens == 0) return true;
    for (const struct connection *x = s->connections; x; x = x->next) {
        int64_t n = x == c ? 0 : waiting_tokens(x);
        all += n;
        if (x->caller.owner == c->caller.owner) of_key += n;
    }
    own = waiting_tokens(c);
    if (s->o.max_key_tokens > 0 && of_key > 0 && of_key + own > s->o.max_key_tokens) {
        *status = 429;
        snprintf(message, LIMITS_MESSAGE,
                 "prompts of this key that wait have %" PRId64 " tokens, with this one's %" PRId64
                 " more than %" PRId64 " (--max-queued-tokens-per-key)",
                 of_key, own, s->o.max_key_tokens);
        return false;
    }
    if (s->o.max_queued_tokens == 0 || all == 0 || all + own <= s->o.max_queued_tokens) return true;
    *status = 503;
    snprintf(message, LIMITS_MESSAGE,
             "prompts that wait have %" PRId64 " tokens, with this one's %" PRId64 " more than %" PRId64
             " (--max-queued-tokens)",
             all, own, s->o.max_queued_tokens);
    return false;
}

bool limits_expired(const struct connection *c, double now)
{
    double most = c->server->o.request_seconds;
    return most > 0 && connection_is_answering(c) && now - c->begun > most;
}

void limits_observe(struct server *s, double seconds)
{
    double each = seconds / (double)(s->stats.running > 1 ? s->stats.running : 1);
    s->turn_seconds += (s->turn_seconds == 0 ? 1 : 0.1) * (each - s->turn_seconds);
}

int limits_retry_after(const struct server *s)
{
    double seconds = ceil((double)(s->stats.waiting + 1) * s->turn_seconds);
    return seconds < 1 ? 1 : seconds > RETRY_SECONDS_MAX ? RETRY_SECONDS_MAX : (int)seconds;
}
