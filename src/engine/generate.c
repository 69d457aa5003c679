#include "engine/generate.h"
#include "base/clock.h"
#include <stdlib.h>
#include <string.h>

/* Decoded text not handed out yet. */
struct pending {
    char *bytes;
    size_t n, capacity;
    bool stopped;
};

static bool reserve(struct pending *p, size_t more, struct err *e)
{
    if (p->capacity - p->n >= more) return true;
    size_t capacity = 2 * (p->n + more);
    char *grown = realloc(p->bytes, capacity);
    if (!grown) return err_memory(e, "text", capacity);
    p->bytes = grown;
    p->capacity = capacity;
    return true;
}

/* Where the stop string that is complete first begins, or n; of several that end together the longest. So it
 * does not matter which bytes came in one token. */
static size_t find_stop(const struct pending *p, const struct generation *o)
{
    size_t best = p->n, best_end = SIZE_MAX;
    for (int i = 0; i < o->n_stops; i++) {
        size_t len = strlen(o->stops[i]);
        const char *at = memmem(p->bytes, p->n, o->stops[i], len);
        size_t begin = at ? (size_t)(at - p->bytes) : p->n, end = begin + len;
        if (!at || end > best_end || (end == best_end && begin >= best)) continue;
        best = begin;
        best_end = end;
    }
    return best;
}

/* How many bytes at the end may be the beginning of a stop string. */
static size_t held_back(const struct pending *p, const struct generation *o)
{
    size_t held = 0;
    for (int i = 0; i < o->n_stops; i++) {
        size_t len = strlen(o->stops[i]), k = len - 1 < p->n ? len - 1 : p->n;
        while (k > held && memcmp(p->bytes + p->n - k, o->stops[i], k) != 0) k--;
        if (k > held) held = k;
    }
    return held;
}

static void hand_out(struct pending *p, const struct generation *o, bool all)
{
    size_t stop = find_stop(p, o), certain = p->n - (all ? 0 : held_back(p, o));
    p->stopped = stop < p->n;
    if (p->stopped) certain = stop;
    if (certain > 0 && o->text) o->text(o->ctx, p->bytes, certain);
    memmove(p->bytes, p->bytes + certain, p->n - certain);
    p->n -= certain;
}

static bool is_stop_token(const struct generation *o, int32_t id)
{
    for (int i = 0; i < o->n_stop_tokens; i++)
        if (o->stop_tokens[i] == id) return true;
    return false;
}

struct decoding {
    struct engine *engine;
    struct generated *out;
    struct speculation *speculation;
    const struct tokenizer *tokenizer;
    const struct generation *o;
    uint32_t *allowed;
    struct detokenizer detokenizer;
    struct pending pending;
};

static bool append(struct token_list *list, int32_t id, struct err *e)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 256;
        int32_t *grown = realloc(list->ids, capacity * sizeof *grown);
        if (!grown) return err_memory(e, "tokens", capacity * sizeof *grown);
        list->ids = grown;
        list->capacity = capacity;
    }
    list->ids[list->n++] = id;
    return true;
}

static bool take_token(struct decoding *d, int32_t id, struct err *e)
{
    size_t n;
    tokenizer_bytes(d->tokenizer, id, &n);
    if (!append(&d->out->tokens, id, e) || !reserve(&d->pending, 3 * n + DETOKENIZER_ROOM, e)) return false;
    d->pending.n += detokenizer_push(&d->detokenizer, d->tokenizer, id, !d->o->keep_special,
                                     d->pending.bytes + d->pending.n);
    hand_out(&d->pending, d->o, false);
    return true;
}

/* The next tokens, sampled after each row of a round, for as long as each turns out to be the one drafted.
 * *right: how many were. *more: there is a next round, after draft->next. */
static bool take_round(struct decoding *d, const int32_t *ids, struct engine_draft *draft, int *right,
                       bool *more, struct err *e)
{
    struct generated *out = d->out;
    *more = false;
    for (*right = 0;;) {
        int32_t id = ids[*right];
        bool is_right = *right < draft->n && id == draft->tokens[*right];
        *right += is_right;
        if (is_stop_token(d->o, id)) {
            out->finish = FINISH_STOP;
            return true;
        }
        if (!take_token(d, id, e)) return false;
        if (d->pending.stopped) out->finish = FINISH_STOP;
        if (d->pending.stopped || (int64_t)out->tokens.n == d->o->max_tokens) return true;
        draft->next = id;
        if (is_right) continue;
        *more = true;
        return true;
    }
}

static bool decode(struct decoding *d, int handle, const float *logits, struct err *e)
{
    struct engine_draft draft = { .handle = handle };
    struct row rows[DRAFTS_MAX + 1];
    struct generated *out = d->out;
    int32_t ids[DRAFTS_MAX + 1];
    double seconds = 0;
    bool more = d->o->max_tokens > 0;
    ids[0] = sample_token(&d->o->sampling, logits, engine_vocab(d->engine), 0, d->allowed);
    out->finish = FINISH_LENGTH;
    for (bool first = true; more; first = false) {
        int right;
        if (!take_round(d, ids, &draft, &right, &more, e)) return false;
        if (!first) speculation_learn(d->speculation, draft.n, right, seconds);
        if (!more) break;
        if (draft.n > 0) engine_keep(d->engine, handle, right + 1);
        if (!speculation_run(d->speculation, d->engine, &draft, d->o->max_tokens - (int64_t)out->tokens.n - 1,
                             rows, &d->o->sampling, (uint64_t)out->tokens.n, ids, &seconds, e))
            return false;
    }
    if (d->pending.stopped) return true;
    if (!reserve(&d->pending, DETOKENIZER_ROOM, e)) return false;
    d->pending.n += detokenizer_finish(&d->detokenizer, d->pending.bytes + d->pending.n);
    hand_out(&d->pending, d->o, true);
    return true;
}

bool generate_rows(struct generated *out, struct engine *g, const struct tokenizer *t,
                   const struct row *prompt, int64_t n, const struct generation *o, struct err *e)
{
    *out = (struct generated){ 0 };
    struct speculation own;
    struct decoding d = { .engine = g, .tokenizer = t, .o = o, .out = out, .speculation = o->speculation };
    int handle;
    const float *logits;
    if (n == 0) return err_set(e, ERR_ARGUMENT, "the prompt is empty");
    if (!engine_open(g, &handle, e)) return false;
    speculation_init(&own, engine_drafts(g));
    if (!d.speculation) d.speculation = &own;
    bool ok = sampled_tokens(&d.allowed, t, engine_vocab(g), o->never, o->n_never, e) &&
              engine_allow(g, d.allowed, e);
    double begin = clock_seconds();
    ok = ok && engine_prefill_rows(g, handle, prompt, n, &logits, o->report, e);
    out->prefill_seconds = clock_seconds() - begin;
    begin = clock_seconds();
    ok = ok && decode(&d, handle, logits, e);
    out->decode_seconds = clock_seconds() - begin;
    engine_close(g, handle);
    free(d.allowed);
    free(d.pending.bytes);
    return ok;
}

bool generate(struct generated *out, struct engine *g, const struct tokenizer *t, const int32_t *prompt,
              int64_t n, const struct generation *o, struct err *e)
{
    struct row *rows = malloc((size_t)n * sizeof *rows + 1);
    *out = (struct generated){ 0 };
    if (!rows) return err_memory(e, "prompt", (uint64_t)n * sizeof *rows);
    engine_text_rows(rows, prompt, n, 0);
    bool ok = generate_rows(out, g, t, rows, n, o, e);
    free(rows);
    return ok;
}
