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

static void see(struct logits_rules *l, int32_t id)
{
    if (l->counts[id] == 0) l->seen[l->n_seen++] = id;
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
    if (has_penalties(o)) {
        l->counts = calloc((size_t)n_vocab, sizeof *l->counts);
        l->seen = malloc((size_t)n_vocab * sizeof *l->seen);
    }
    if (l->recent_most) l->recent = calloc((size_t)l->recent_most, sizeof *l->recent);
    if (o->constraint || o->n_allowed) l->mask = calloc(words, sizeof *l->mask);
    if ((has_penalties(o) && (!l->counts || !l->seen)) || (l->recent_most && !l->recent) ||
        ((o->constraint || o->n_allowed) && !l->mask)) {
        logits_rules_deinit(l);
        return err_memory(e, "penalties", (uint64_t)n_vocab * sizeof *l->counts);
    }
    for (int64_t i = 0; l->counts && i < o->n_prompt; i++) {
        see(l, o->prompt[i]);
        l->counts[o->prompt[i]] |= IN_PROMPT;
    }
    return true;
}

void logits_rules_deinit(struct logits_rules *l)
{
    free(l->counts);
    free(l->seen);
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

bool logits_rules_may_change(const struct logits_rules *l)
{
    return logits_rules_change(l) || l->o->constraint;
}

const uint32_t *logits_rules_mask(struct logits_rules *l)
{
    const struct request_options *o = l->o;
    size_t bytes = ((size_t)l->n_vocab + 31) / 32 * sizeof *l->mask;
    if (!o->n_allowed && !l->constrained) return NULL;
    memset(l->mask, o->n_allowed ? 0 : 0xff, bytes);
    for (int i = 0; i < o->n_allowed; i++) l->mask[o->allowed[i] / 32] |= 1u << o->allowed[i] % 32;
    if (l->constrained) o->constraint->mask(o->constraint->state, l->mask, l->n_vocab);
    return l->mask;
}

static bool make_room(struct logits_edits *list, int64_t more, struct err *e)
{
    if (list->capacity - list->n >= more) return true;
    int64_t capacity = 2 * (list->n + more);
    struct logit_edit *grown = realloc(list->items, (size_t)capacity * sizeof *grown);
    if (!grown) return err_memory(e, "changes of logits", (uint64_t)capacity * sizeof *grown);
    list->items = grown;
    list->capacity = capacity;
    return true;
}

static void ban(struct logits_edits *list, int32_t row, int32_t id)
{
    list->items[list->n++] =
        (struct logit_edit){ .row = row, .column = id, .bias = -INFINITY, .repetition = 1 };
}

/* The last token of every bad run whose other tokens have just come. */
static void ban_bad_words(const struct logits_rules *l, int32_t row, struct logits_edits *list)
{
    for (int i = 0; i < l->o->n_bad_words; i++) {
        const struct token_run *w = &l->o->bad_words[i];
        int before = w->n - 1;
        if (before > l->n_recent) continue;
        if (before == 0 ||
            memcmp(l->recent + l->n_recent - before, w->ids, (size_t)before * sizeof *w->ids) == 0)
            ban(list, row, w->ids[before]);
    }
}

static void penalize(const struct logits_rules *l, int32_t row, struct logits_edits *list)
{
    const struct request_options *o = l->o;
    float repetition = o->repetition_penalty == 0 ? 1 : o->repetition_penalty;
    for (int64_t i = 0; i < l->n_seen; i++) {
        uint32_t times = l->counts[l->seen[i]] & ~IN_PROMPT;
        float minus = times ? o->frequency_penalty * (float)times + o->presence_penalty : 0;
        list->items[list->n++] = (struct logit_edit){ row, l->seen[i], 0, repetition, minus };
    }
}

bool logits_rules_edits(const struct logits_rules *l, int32_t row, struct logits_edits *rounds, struct err *e)
{
    const struct request_options *o = l->o;
    struct logits_edits *bans = &rounds[ROUND_BANS], *biased = &rounds[ROUND_BIAS];
    if (!make_room(bans, (int64_t)o->n_never + o->n_stop_tokens + o->n_bad_words, e) ||
        !make_room(biased, o->n_bias, e) || !make_room(&rounds[ROUND_PENALTIES], l->n_seen, e))
        return false;
    for (int i = 0; i < o->n_never; i++) ban(bans, row, o->never[i]);
    for (int i = 0; l->n_answer < o->min_tokens && i < o->n_stop_tokens; i++)
        ban(bans, row, o->stop_tokens[i]);
    ban_bad_words(l, row, bans);
    for (int i = 0; i < o->n_bias; i++)
        biased->items[biased->n++] = (struct logit_edit){ row, o->bias[i].id, o->bias[i].bias, 1, 0 };
    penalize(l, row, &rounds[ROUND_PENALTIES]);
    return true;
}

bool logits_rules_apply(struct logits_rules *l, float *logits, struct logits_edits *rounds, struct err *e)
{
    const uint32_t *mask = logits_rules_mask(l);
    for (int64_t i = 0; mask && i < l->n_vocab; i++)
        if (!draw_allows(mask, i)) logits[i] = -INFINITY;
    for (int k = 0; k < ROUNDS; k++) rounds[k].n = 0;
    if (!logits_rules_edits(l, 0, rounds, e)) return false;
    for (int k = 0; k < ROUNDS; k++)
        for (int64_t i = 0; i < rounds[k].n; i++) {
            float *at = &logits[rounds[k].items[i].column];
            *at = edit_apply(*at, &rounds[k].items[i]);
        }
    return true;
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
    if (l->counts) {
        see(l, id);
        l->counts[id]++;
    }
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
