#include "engine/session.h"
#include "base/clock.h"
#include <stdlib.h>
#include <string.h>

struct session {
    struct engine *engine;
    const struct tokenizer *tokenizer;
    int handle;
    struct row *held; /* what the sequence has computed; room for the engine's context */
    int64_t n_held;
    uint64_t draws; /* of the sampler, over all answers */
    struct speculation speculation;
    struct engine_draft draft;       /* the round under way */
    struct row rows[DRAFTS_MAX + 1]; /* and its rows */
    bool foresaw_end;  /* the draft after the last of the answer's tokens was the stop token that came */
    uint32_t *allowed; /* what may be sampled in the answer under way */
    char *text;        /* of one token */
    size_t text_size;
    const struct session_options *o; /* of the answer under way */
};

bool session_create(struct session **out, struct engine *g, const struct tokenizer *t, struct err *e)
{
    struct session *s = *out = calloc(1, sizeof *s);
    size_t context = (size_t)engine_context(g);
    if (!s) return err_memory(e, "a session", sizeof *s);
    *s = (struct session){ .engine = g, .tokenizer = t, .handle = -1 };
    speculation_init(&s->speculation, engine_drafts(g));
    s->held = malloc(context * sizeof *s->held);
    if (s->held) return true;
    session_free(s);
    *out = NULL;
    return err_memory(e, "a session", context * sizeof *s->held);
}

void session_reset(struct session *s)
{
    if (s->handle >= 0) engine_close(s->engine, s->handle);
    s->handle = -1;
    s->n_held = 0;
}

void session_free(struct session *s)
{
    if (!s) return;
    session_reset(s);
    free(s->held);
    free(s->allowed);
    free(s->text);
    free(s);
}

static bool is_one_of(const int32_t *ids, int n, int32_t id)
{
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

static bool find_allowed(struct session *s, struct err *e)
{
    free(s->allowed);
    return sampled_tokens(&s->allowed, s->tokenizer, engine_vocab(s->engine), s->o->never, s->o->n_never,
                          e) &&
           engine_allow(s->engine, s->allowed, e);
}

static bool is_cancelled(const struct session *s)
{
    return s->o->cancelled && s->o->cancelled(s->o->ctx);
}

/* The sequence must hold less than the prompt, and nothing else. */
static bool keeps(const struct session *s, const struct prompt *prompt)
{
    if (s->handle < 0 || s->n_held >= prompt->n) return false;
    for (int64_t i = 0; i < s->n_held; i++)
        if (s->held[i].token != prompt->rows[i].token || s->held[i].embedding != prompt->rows[i].embedding)
            return false;
    return true;
}

static bool append(struct session *s, const struct row *rows, int64_t n, const float **logits, struct err *e)
{
    if (!engine_prefill_rows(s->engine, s->handle, rows, n, logits, NULL, e)) return false;
    memcpy(s->held + s->n_held, rows, (size_t)n * sizeof *rows);
    s->n_held += n;
    return true;
}

/* The prompt's new rows, a step at a time, so that it can be cancelled. */
static bool prefill(struct session *s, struct session_result *out, const struct prompt *prompt,
                    const float **logits, struct err *e)
{
    if (!keeps(s, prompt)) {
        session_reset(s);
        if (!engine_open(s->engine, &s->handle, e)) return false;
    }
    out->reused_tokens = s->n_held;
    int64_t total = prompt->n - s->n_held, step = engine_step_rows(s->engine);
    for (int64_t done = 0; done < total;) {
        int64_t n = total - done < step ? total - done : step;
        if (is_cancelled(s)) {
            out->finish = SESSION_CANCELLED;
            return true;
        }
        if (!append(s, prompt->rows + s->n_held, n, logits, e)) return false;
        done += n;
        report_progress(s->o->report, "prompt", (uint64_t)done, (uint64_t)total);
    }
    return true;
}

static bool hand_out(struct session *s, struct detokenizer *d, int32_t id, struct err *e)
{
    size_t n;
    tokenizer_bytes(s->tokenizer, id, &n);
    if (s->text_size < 3 * n + DETOKENIZER_ROOM) {
        size_t size = 2 * (3 * n + DETOKENIZER_ROOM);
        char *grown = realloc(s->text, size);
        if (!grown) return err_memory(e, "text", size);
        s->text = grown;
        s->text_size = size;
    }
    n = detokenizer_push(d, s->tokenizer, id, true, s->text);
    if (n) s->o->text(s->o->ctx, s->text, n);
    return true;
}

/* The next tokens, sampled after each row of a round, for as long as each turns out to be the one drafted.
 * *right: how many were, and are part of the answer. *more: there is a next round, after draft.next. */
static bool take_round(struct session *s, struct session_result *out, const int32_t *ids, int64_t most,
                       struct detokenizer *d, int *right, bool *more, struct err *e)
{
    for (*right = 0, *more = false;;) {
        int32_t id = ids[*right];
        s->draws++;
        bool is_right = *right < s->draft.n && id == s->draft.tokens[*right];
        if (is_one_of(s->o->stop_tokens, s->o->n_stop_tokens, id)) {
            out->finish = SESSION_STOP;
            s->foresaw_end = is_right;
            return true;
        }
        *right += is_right;
        out->tokens++;
        s->draft.next = id;
        if (!hand_out(s, d, id, e)) return false;
        if (is_cancelled(s)) out->finish = SESSION_CANCELLED;
        if (out->finish == SESSION_CANCELLED || out->tokens == most) return true;
        *more = !is_right;
        if (*more) return true;
    }
}

/* Of the last round's rows, if there was one, those of the token sampled before it and of right drafts stay.
 */
static void settle(struct session *s, struct session_result *out, int right, double seconds)
{
    if (out->rounds == 0) return;
    speculation_learn(&s->speculation, s->draft.n, right + s->foresaw_end, seconds);
    if (s->draft.n > 0) engine_keep(s->engine, s->handle, right + 1);
    memcpy(s->held + s->n_held, s->rows, (size_t)(right + 1) * sizeof *s->rows);
    s->n_held += right + 1;
    out->drafted += s->draft.n;
    out->accepted += right + s->foresaw_end;
}

static bool decode(struct session *s, struct session_result *out, const float *logits, struct err *e)
{
    struct detokenizer d = { 0 };
    char rest[DETOKENIZER_ROOM];
    int64_t room = engine_context(s->engine) - s->n_held;
    int64_t most = s->o->max_tokens < room ? s->o->max_tokens : room;
    double seconds = 0;
    int32_t ids[DRAFTS_MAX + 1];
    ids[0] = sample_token(&s->o->sampling, logits, engine_vocab(s->engine), s->draws, s->allowed);
    s->draft = (struct engine_draft){ .handle = s->handle };
    s->foresaw_end = false;
    out->finish = SESSION_LENGTH;
    for (bool more = most > 0; more;) {
        int right;
        if (!take_round(s, out, ids, most, &d, &right, &more, e)) return false;
        settle(s, out, right, seconds);
        if (!more) break;
        if (!speculation_run(&s->speculation, s->engine, &s->draft, most - out->tokens - 1, s->rows,
                             &s->o->sampling, s->draws, ids, &seconds, e))
            return false;
        out->rounds++;
    }
    size_t n = detokenizer_finish(&d, rest);
    if (n) s->o->text(s->o->ctx, rest, n);
    return true;
}

bool session_answer(struct session *s, struct session_result *out, const struct prompt *prompt,
                    const struct session_options *o, struct err *e)
{
    const float *logits = NULL;
    int64_t n = prompt->n, context = engine_context(s->engine);
    *out = (struct session_result){ .prompt_tokens = n };
    s->o = o;
    if (n == 0) return err_set(e, ERR_ARGUMENT, "the prompt is empty");
    if (n >= context)
        return err_set(e, ERR_LIMIT, "the conversation has %lld tokens, the context is %lld with the answer",
                       (long long)n, (long long)context);
    double begin = clock_seconds();
    bool ok = find_allowed(s, e) && prefill(s, out, prompt, &logits, e);
    double middle = clock_seconds();
    ok = ok && (out->finish == SESSION_CANCELLED || decode(s, out, logits, e));
    out->prefill_seconds = middle - begin;
    out->decode_seconds = clock_seconds() - middle;
    if (!ok) session_reset(s);
    return ok;
}

const struct speculation *session_speculation(const struct session *s)
{
    return &s->speculation;
}
