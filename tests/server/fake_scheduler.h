/* A scheduler that gives scripted tokens: the functions of engine/scheduler.h, on the caller's thread. */
#ifndef TESTS_SERVER_FAKE_SCHEDULER_H
#define TESTS_SERVER_FAKE_SCHEDULER_H
#include "engine/scheduler.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct scheduler {
    int32_t tokens[4096]; /* the answer to every request */
    int n_tokens;
    int piece;       /* events of one request_take; 0: all; -1: none come */
    int room;        /* requests until the queue is full; < 0: no end */
    int64_t context; /* 0: any */
    int fail_at;     /* tokens until the request fails; < 0: never */
    int64_t cached;
    /* what was asked last */
    int submitted, open;
    struct request_options last;
    int32_t last_prompt[4096], last_stops[64];
    char last_picture[64];
    uint64_t seeds[64];
};

struct request {
    struct scheduler *s;
    struct request_event *events;
    int n, at, answered;
    int64_t n_prompt;
    int64_t n_pictures;
    struct constraint *constraint;
};

/* Some finite score that a float does not hold in few digits; best tokens are the ones after `id`. */
static inline void fake_score(struct request_event *e, int32_t id, int n_top)
{
    e->token = (struct token_score){ id, -(float)(id % 97) / 7.0f - 0.5f };
    e->rank = 2;
    e->n_top = n_top;
    for (int i = 0; i < n_top; i++)
        e->top[i] = (struct token_score){ (id + 1 + i) % 256, -0.1f - (float)i / 3.0f };
}

/* As the request wants it. */
static inline void fake_score_as(struct request_event *e, int32_t id, const struct request_options *o)
{
    fake_score(e, id, o->n_score_ids ? 0 : o->top_logprobs);
    if (o->n_score_ids) e->n_top = o->n_score_ids;
    for (int i = 0; i < o->n_score_ids; i++)
        e->top[i] = (struct token_score){ o->score_ids[i], -(float)(o->score_ids[i] % 89) / 9.0f - 0.25f };
}

static inline bool fake_stops(const struct request_options *o, int32_t id)
{
    for (int i = 0; i < o->n_stop_tokens; i++)
        if (o->stop_tokens[i] == id) return true;
    return false;
}

static inline void fake_answer(struct request *r, const struct request_options *o)
{
    const struct scheduler *s = r->s;
    bool follows = o->constraint && o->constraint_after < 0;
    struct request_event end = { .kind = REQUEST_FINISHED, .finish = FINISHED_LENGTH, .stop_token = -1 };
    for (int64_t i = 1; o->prompt_logprobs >= 0 && i < o->n_prompt; i++) {
        r->events[r->n] = (struct request_event){ .kind = REQUEST_PROMPT };
        fake_score(&r->events[r->n++], o->prompt[i], o->prompt_logprobs);
    }
    for (int i = 0; i < s->n_tokens && (o->max_tokens < 0 || i < o->max_tokens); i++) {
        bool more = true;
        if (fake_stops(o, s->tokens[i])) {
            end.finish = FINISHED_STOP;
            end.stop_token = s->tokens[i];
            if (o->top_logprobs >= 0) fake_score_as(&end, s->tokens[i], o);
            break;
        }
        if (s->fail_at == i) {
            end.finish = FINISHED_ERROR;
            break;
        }
        r->events[r->n] = (struct request_event){ .kind = REQUEST_TOKEN, .token.id = s->tokens[i] };
        if (o->top_logprobs >= 0) fake_score_as(&r->events[r->n], s->tokens[i], o);
        r->n++;
        if (follows) more = o->constraint->advance(o->constraint->state, s->tokens[i]);
        if (o->constraint && s->tokens[i] == o->constraint_after) follows = true;
        if (more) continue;
        end.finish = FINISHED_STOP;
        break;
    }
    r->events[r->n++] = end;
}

static inline void fake_remember(struct scheduler *s, const struct request_options *o)
{
    s->last = *o;
    for (int64_t i = 0; i < o->n_prompt && i < 4096; i++) s->last_prompt[i] = o->prompt[i];
    for (int i = 0; i < o->n_stop_tokens && i < 64; i++) s->last_stops[i] = o->stop_tokens[i];
    if (o->n_pictures) snprintf(s->last_picture, sizeof s->last_picture, "%s", o->pictures[0]);
    if (s->submitted < 64) s->seeds[s->submitted] = o->sampling.seed;
    s->submitted++;
}

bool scheduler_submit(struct scheduler *s, struct request **out, const struct request_options *o,
                      struct err *e)
{
    *out = NULL;
    bool ok = true;
    if (s->room == 0) ok = err_set(e, ERR_BUSY, "the queue is full");
    if (s->context && o->n_prompt > s->context)
        ok = err_set(e, ERR_LIMIT, "the prompt has %lld tokens, the context is %lld with the answer",
                     (long long)o->n_prompt, (long long)s->context);
    if (!ok) {
        if (o->constraint) o->constraint->free(o->constraint->state);
        return false;
    }
    if (s->room > 0) s->room--;
    struct request *r = calloc(1, sizeof *r);
    r->s = s;
    r->events = calloc((size_t)o->n_prompt + (size_t)s->n_tokens + 1, sizeof *r->events);
    r->n_prompt = o->n_prompt;
    r->n_pictures = o->n_pictures;
    r->constraint = o->constraint;
    fake_remember(s, o);
    fake_answer(r, o);
    s->open++;
    *out = r;
    return true;
}

int request_take(struct request *r, struct request_event *out, int most)
{
    int n = r->n - r->at;
    if (r->s->piece < 0) return 0;
    if (n > most) n = most;
    if (r->s->piece && n > r->s->piece) n = r->s->piece;
    /* A piece is all there is now: the caller asks again until there is none. */
    if (r->s->piece && r->answered) {
        r->answered = 0;
        return 0;
    }
    memcpy(out, r->events + r->at, (size_t)n * sizeof *out);
    r->at += n;
    r->answered = n;
    return n;
}

void request_usage(const struct request *r, struct request_usage *out)
{
    *out = (struct request_usage){ .prompt_tokens = r->n_prompt,
                                   .cached_tokens = r->s->cached,
                                   .picture_tokens = 4 * r->n_pictures,
                                   .drafted = 5,
                                   .accepted = 3,
                                   .prefilled = r->n_prompt };
}

const char *request_error(const struct request *r)
{
    (void)r;
    return "the device was lost";
}

void request_cancel(struct request *r)
{
    (void)r;
}

void request_free(struct request *r)
{
    if (!r) return;
    r->s->open--;
    if (r->constraint) r->constraint->free(r->constraint->state);
    free(r->events);
    free(r);
}
#endif
