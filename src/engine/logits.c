#include "engine/logits.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define IN_PROMPT 0x80000000u

static bool has_penalties(const struct request_options *o)
{
    return o->presence_penalty != 0 || o->frequency_penalty != 0 ||
           (o->repetition_penalty != 0 && o->repetition_penalty != 1);
}

static int longest(const struct request_options *o)
{
    int n = 0;
    for (int i = 0; i < o->n_bad_words; i++) n = o->bad_words[i].n > n ? o->bad_words[i].n : n;
    return n;
}

bool logits_rules_init(struct logits_rules *l, const struct request_options *o, int64_t n_vocab,
                       struct err *e)
{
    size_t words = ((size_t)n_vocab + 31) / 32;
    int run = longest(o);
    *l = (struct logits_rules){ .o = o,
                                .n_vocab = n_vocab,
                                .recent_most = run > 1 ? run - 1 : 0,
                                .constrained = o->constraint && o->constraint_after < 0,
                                .thinking = o->thinking_budget >= 0 && o->n_thinking_end > 0 };
    if (has_penalties(o)) l->counts = calloc((size_t)n_vocab, sizeof *l->counts);
    if (l->recent_most) l->recent = calloc((size_t)l->recent_most, sizeof *l->recent);
    if (o->constraint) l->mask = calloc(words, sizeof *l->mask);
    if ((has_penalties(o) && !l->counts) || (l->recent_most && !l->recent) || (o->constraint && !l->mask)) {
        logits_rules_deinit(l);
        return err_memory(e, "penalties", (uint64_t)n_vocab * sizeof *l->counts);
    }
    for (int64_t i = 0; l->counts && i < o->n_prompt; i++) l->counts[o->prompt[i]] |= IN_PROMPT;
    return true;
}

void logits_rules_deinit(struct logits_rules *l)
{
    free(l->counts);
    free(l->recent);
    free(l->mask);
    *l = (struct logits_rules){ 0 };
}

bool logits_rules_change(const struct logits_rules *l)
{
    const struct request_options *o = l->o;
    return l->counts || o->n_bias || o->n_allowed || o->n_bad_words || o->n_never || l->constrained ||
           (l->n_answer < o->min_tokens && o->n_stop_tokens);
}

bool logits_rules_want_best(const struct logits_rules *l)
{
    const struct request_options *o = l->o;
    return o->sampling.temperature < 1e-5f && o->top_logprobs < 0 && !o->constraint && !l->thinking &&
           !logits_rules_change(l);
}

/* allowed is sorted. */
static void keep_allowed(float *logits, int64_t n_vocab, const int32_t *allowed, int n)
{
    int at = 0;
    for (int64_t id = 0; id < n_vocab; id++) {
        while (at < n && allowed[at] < id) at++;
        if (at == n || allowed[at] != id) logits[id] = -INFINITY;
    }
}

/* Bans the last token of every bad run whose other tokens have just come. */
static void ban_bad_words(const struct logits_rules *l, float *logits)
{
    for (int i = 0; i < l->o->n_bad_words; i++) {
        const struct token_run *w = &l->o->bad_words[i];
        int before = w->n - 1;
        if (before > l->n_recent) continue;
        if (before == 0 ||
            memcmp(l->recent + l->n_recent - before, w->ids, (size_t)before * sizeof *w->ids) == 0)
            logits[w->ids[before]] = -INFINITY;
    }
}

static void penalize(const struct logits_rules *l, float *logits)
{
    const struct request_options *o = l->o;
    float repetition = o->repetition_penalty == 0 ? 1 : o->repetition_penalty;
    for (int64_t i = 0; i < l->n_vocab; i++) {
        uint32_t count = l->counts[i] & ~IN_PROMPT;
        if (l->counts[i] == 0) continue;
        logits[i] = logits[i] > 0 ? logits[i] / repetition : logits[i] * repetition;
        if (count) logits[i] -= o->frequency_penalty * (float)count + o->presence_penalty;
    }
}

static void constrain(struct logits_rules *l, float *logits)
{
    memset(l->mask, 0xff, ((size_t)l->n_vocab + 31) / 32 * sizeof *l->mask);
    l->o->constraint->mask(l->o->constraint->state, l->mask, l->n_vocab);
    for (int64_t i = 0; i < l->n_vocab; i++)
        if (!(l->mask[i / 32] >> i % 32 & 1)) logits[i] = -INFINITY;
}

static bool any_left(const float *logits, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (logits[i] > -INFINITY) return true;
    return false;
}

bool logits_rules_apply(struct logits_rules *l, float *logits)
{
    const struct request_options *o = l->o;
    if (o->n_allowed) keep_allowed(logits, l->n_vocab, o->allowed, o->n_allowed);
    if (l->constrained) constrain(l, logits);
    for (int i = 0; i < o->n_never; i++) logits[o->never[i]] = -INFINITY;
    for (int i = 0; l->n_answer < o->min_tokens && i < o->n_stop_tokens; i++)
        logits[o->stop_tokens[i]] = -INFINITY;
    ban_bad_words(l, logits);
    for (int i = 0; i < o->n_bias; i++) logits[o->bias[i].id] += o->bias[i].bias;
    if (l->counts) penalize(l, logits);
    return any_left(logits, l->n_vocab);
}

int32_t logits_rules_forced(const struct logits_rules *l)
{
    if (!l->thinking || (l->forced == 0 && l->n_answer < l->o->thinking_budget)) return -1;
    return l->o->thinking_end[l->forced];
}

/* The token by which thinking ends of itself. */
static int32_t thinking_ends_with(const struct request_options *o)
{
    for (int i = 0; i < o->n_thinking_end; i++)
        if (o->thinking_end[i] == o->constraint_after) return o->constraint_after;
    return o->thinking_end[0];
}

static void think(struct logits_rules *l, int32_t id)
{
    bool forced = logits_rules_forced(l) >= 0;
    if (forced)
        l->thinking = ++l->forced < l->o->n_thinking_end;
    else if (l->thinking && id == thinking_ends_with(l->o))
        l->thinking = false;
}

static void remember(struct logits_rules *l, int32_t id)
{
    if (l->recent_most == 0) return;
    if (l->n_recent == l->recent_most)
        memmove(l->recent, l->recent + 1, (size_t)--l->n_recent * sizeof *l->recent);
    l->recent[l->n_recent++] = id;
}

bool logits_rules_take(struct logits_rules *l, int32_t id)
{
    const struct request_options *o = l->o;
    bool more = !l->constrained || o->constraint->advance(o->constraint->state, id);
    if (o->constraint && id == o->constraint_after && !l->constrained) l->constrained = true;
    think(l, id);
    remember(l, id);
    if (l->counts) l->counts[id]++;
    l->n_answer++;
    return more;
}

/* The `most` largest, best first, the lower id first of equals. */
static int best_of(struct token_score *top, const float *logits, int64_t n_vocab, int most)
{
    int n = 0;
    for (int64_t i = 0; i < n_vocab && most > 0; i++) {
        if (n == most && logits[i] <= top[n - 1].logprob) continue;
        int at = n < most ? n++ : n - 1;
        for (; at > 0 && top[at - 1].logprob < logits[i]; at--) top[at] = top[at - 1];
        top[at] = (struct token_score){ (int32_t)i, logits[i] };
    }
    return n;
}

/* The token's rank and score: its logit less the greatest, *top_logit, and less what is returned. */
static float score(struct request_event *out, const float *logits, int64_t n_vocab, int32_t id,
                   float *top_logit)
{
    float top = logits[0];
    double total = 0;
    out->rank = 1;
    for (int64_t i = 0; i < n_vocab; i++) {
        if (logits[i] > top) top = logits[i];
        if (logits[i] > logits[id]) out->rank++;
    }
    for (int64_t i = 0; i < n_vocab; i++) total += (double)expf(logits[i] - top);
    float log_total = (float)log(total);
    out->token = (struct token_score){ id, logits[id] - top - log_total };
    *top_logit = top;
    return log_total;
}

void logits_score(struct request_event *out, const float *logits, int64_t n_vocab, int32_t id, int most)
{
    float top, log_total = score(out, logits, n_vocab, id, &top);
    out->n_top = best_of(out->top, logits, n_vocab, most);
    for (int i = 0; i < out->n_top; i++) out->top[i].logprob = out->top[i].logprob - top - log_total;
}

void logits_score_ids(struct request_event *out, const float *logits, int64_t n_vocab, int32_t id,
                      const int32_t *ids, int n)
{
    float top, log_total = score(out, logits, n_vocab, id, &top);
    out->n_top = n;
    for (int i = 0; i < n; i++)
        out->top[i] = (struct token_score){ ids[i], logits[ids[i]] - top - log_total };
}
