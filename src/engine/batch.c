#include "engine/batch.h"
#include "base/clock.h"
#include <stdlib.h>
#include <string.h>

/* Ends of what a step of the engine takes of rows, runs, and rows that logits are wanted of. */
struct part {
    int64_t rows, logits;
    int runs;
};

struct batch {
    struct engine *engine;
    struct picture_reader *reader;
    struct encoder_cache *seen;
    const uint32_t *known;
    int64_t vocab, n_rows, n_logits;
    int n_runs;
    struct part answers;       /* the others are prompts' */
    struct row *rows;          /* [step rows] */
    struct engine_run *runs;   /* [sequences] */
    struct request **requests; /* [sequences] whose run it is */
    struct engine_draft *drafts;
    int64_t *index;      /* [step rows] of the rows that logits are wanted of */
    int64_t *at;         /* [logits rows] such rows in the engine's step */
    struct request **of; /* [step rows] whose they are */
    struct draw *draws;  /* [logits rows] */
    int32_t *drawn;      /* [logits rows] the backend's answers to them; see is_drawn */
    float *changed;      /* [vocab] a row of logits under the request's rules */
    struct logits_edits edits[ROUNDS];
};

bool batch_create(struct batch **out, struct engine *g, struct picture_reader *reader,
                  struct encoder_cache *seen, const uint32_t *known, struct err *e)
{
    struct batch *b = *out = calloc(1, sizeof *b);
    size_t rows = (size_t)engine_step_rows(g), n = (size_t)engine_sequences(g),
           vocab = (size_t)engine_vocab(g);
    if (!b) return err_memory(e, "scheduler", sizeof *b);
    *b = (struct batch){
        .engine = g, .reader = reader, .seen = seen, .known = known, .vocab = (int64_t)vocab
    };
    b->rows = calloc(rows, sizeof *b->rows);
    b->runs = calloc(n, sizeof *b->runs);
    b->requests = calloc(n, sizeof *b->requests);
    b->drafts = calloc(n, sizeof *b->drafts);
    b->index = calloc(rows, sizeof *b->index);
    b->at = calloc((size_t)engine_logits_rows(g), sizeof *b->at);
    b->of = calloc(rows, sizeof *b->of);
    b->draws = calloc((size_t)engine_logits_rows(g), sizeof *b->draws);
    b->drawn = calloc((size_t)engine_logits_rows(g), sizeof *b->drawn);
    b->changed = malloc(vocab * sizeof *b->changed);
    bool ok = (b->rows && b->runs && b->requests && b->drafts && b->index && b->at && b->of && b->draws &&
               b->drawn && b->changed) ||
              err_memory(e, "scheduler", vocab * sizeof *b->changed);
    if (ok && engine_allow(g, known, e)) return true;
    batch_free(b);
    *out = NULL;
    return false;
}

void batch_free(struct batch *b)
{
    if (!b) return;
    free(b->rows);
    free(b->runs);
    free(b->requests);
    free(b->drafts);
    free(b->index);
    free(b->at);
    free(b->of);
    free(b->draws);
    free(b->drawn);
    free(b->changed);
    for (int i = 0; i < ROUNDS; i++) free(b->edits[i].items);
    free(b);
}

/* What goes in. */

void batch_clear(struct batch *b)
{
    b->n_rows = 0;
    b->n_runs = 0;
    b->n_logits = 0;
    b->answers = (struct part){ 0 };
}

int64_t batch_rows(const struct batch *b)
{
    return b->n_rows;
}

bool batch_draft(struct batch *b, struct request *const *r, int n, int most, struct err *e)
{
    int n_drafts = 0;
    for (int i = 0; i < n; i++) {
        int64_t left = r[i]->most - r[i]->n_answer - 1;
        r[i]->draft.n = most < left ? most : (int)left;
        if (!r[i]->drafts_ready) r[i]->draft.n = 0;
        r[i]->draft.handle = r[i]->handle;
        if (r[i]->draft.n > 0) b->drafts[n_drafts++] = r[i]->draft;
    }
    if (n_drafts == 0) return true;
    if (!engine_draft(b->engine, b->drafts, n_drafts, e)) return false;
    for (int i = 0, from = 0; i < n; i++)
        if (r[i]->draft.n > 0) r[i]->draft = b->drafts[from++];
    return true;
}

static struct part all_of(const struct batch *b)
{
    return (struct part){ b->n_rows, b->n_logits, b->n_runs };
}

static void add(struct batch *b, struct request *r, int64_t n, bool tentative, bool prompt)
{
    r->first = b->n_rows;
    r->n_rows = n;
    r->tentative = tentative;
    r->right = 0;
    r->ended = false;
    b->runs[b->n_runs] = (struct engine_run){ r->handle, b->rows + r->first, n, tentative, prompt };
    b->requests[b->n_runs++] = r;
    b->n_rows += n;
}

static void want_logits(struct batch *b, struct request *r, int64_t first, int64_t end)
{
    for (int64_t i = first; i < end; i++) {
        b->index[b->n_logits] = r->first + i;
        b->of[b->n_logits++] = r;
    }
}

void batch_add_round(struct batch *b, struct request *r)
{
    struct row *rows = b->rows + b->n_rows;
    int64_t position = engine_position(b->engine, r->handle), n = r->draft.n + 1;
    engine_text_rows(rows, &r->draft.next, 1, position);
    engine_text_rows(rows + 1, r->draft.tokens, r->draft.n, position + 1);
    add(b, r, n, r->draft.n > 0, false);
    want_logits(b, r, 0, n);
    b->answers = all_of(b);
}

static bool see(struct batch *b, struct request_picture *p, bool may_keep, struct err *e)
{
    if (may_keep && encoder_cache_find(b->seen, p->key, &p->picture)) return true;
    if (!picture_see(b->reader, &p->picture, &p->patches, e)) return false;
    if (may_keep) encoder_cache_add(b->seen, p->key, &p->picture);
    return true;
}

/* The tower's rows of the pictures that rows [r->done, end) need. */
static bool see_pictures(struct batch *b, struct request *r, int64_t end, struct err *e)
{
    for (int i = 0; i < r->n_pictures; i++) {
        struct request_picture *p = &r->pictures[i];
        int64_t first = p->place.first, n = p->place.height * p->place.width, cols = p->picture.cols;
        if (first >= end || first + n <= r->done || p->picture.rows) continue;
        if (!see(b, p, !r->o.no_prefix_cache, e)) return err_note(e, "image %d", i + 1);
        for (int64_t k = 0; k < n; k++) r->prompt.rows[first + k].embedding = p->picture.rows + k * cols;
        patches_free(&p->patches);
    }
    return true;
}

bool batch_add_prompt(struct batch *b, struct request *r, int64_t n, struct err *e)
{
    if (!see_pictures(b, r, r->done + n, e)) return false;
    memcpy(b->rows + b->n_rows, r->prompt.rows + r->done, (size_t)n * sizeof *b->rows);
    add(b, r, n, false, true);
    bool scores = r->o.prompt_logprobs >= 0, is_last = r->done + n == r->prompt.n;
    if (scores)
        want_logits(b, r, 0, n - (is_last && r->most == 0));
    else if (is_last && r->most > 0)
        want_logits(b, r, n - 1, n);
    return true;
}

/* What comes out. */

static void end(struct request *r, enum request_finish finish)
{
    r->ended = true;
    request_finish(r, finish);
}

static bool is_one_of(const int32_t *ids, int n, int32_t id)
{
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

/* Row `row` of r's rows of this step is the last of a prompt or one of an answer: it is sampled from. */
static bool samples(const struct request *r, int64_t row)
{
    return r->done + row + 1 >= r->prompt.n && r->most > 0;
}

/* The backend draws where the logits themselves are not wanted. What the rules say of the rows after a
 * round's first one depends on the tokens that come: these are drawn as if there were none, and again by
 * the host if it turns out that there are. */
static bool is_drawn(const struct request *r, int64_t row)
{
    return samples(r, row) && r->o.top_logprobs < 0;
}

static bool is_first(const struct request *r, int64_t row)
{
    return r->done < r->prompt.n || row == 0;
}

/* By the host. *id -1: the rules leave none. */
static bool choose(struct batch *b, struct request *r, const float *logits, int32_t *id, struct err *e)
{
    if (logits_rules_change(&r->rules)) {
        memcpy(b->changed, logits, (size_t)b->vocab * sizeof *logits);
        if (!logits_rules_apply(&r->rules, b->changed, b->edits, e)) return false;
        logits = b->changed;
    }
    *id = sample_token(&r->o.sampling, logits, b->vocab, (uint64_t)r->n_answer, b->known);
    return true;
}

static void end_without_token(struct request *r)
{
    if (r->rules.constrained) {
        end(r, FINISHED_STOP);
        return;
    }
    err_set(&r->error, ERR_ARGUMENT,
            "no token may come after %lld of the answer: bans, bias and allowed tokens exclude all",
            (long long)r->n_answer);
    end(r, FINISHED_ERROR);
}

/* The next token of the answer; logits: where its score is wanted. The rows of a round count for as long as
 * each token is the one drafted. */
static void take_token(struct batch *b, struct request *r, int32_t id, const float *logits)
{
    int row = r->right++;
    if (id < 0) {
        end_without_token(r);
        return;
    }
    struct request_event event = { .kind = REQUEST_TOKEN, .token.id = id };
    if (r->o.n_score_ids)
        logits_score_ids(&event, logits, b->vocab, id, r->o.score_ids, r->o.n_score_ids);
    else if (r->o.top_logprobs >= 0)
        logits_score(&event, logits, b->vocab, id, r->o.top_logprobs);
    if (is_one_of(r->o.stop_tokens, r->o.n_stop_tokens, id)) {
        end(r, FINISHED_STOP);
        event.kind = REQUEST_FINISHED;
        event.finish = FINISHED_STOP;
        event.stop_token = id;
        r->last = event;
        return;
    }
    request_post(r, &event);
    r->n_answer++;
    r->ended = !r->tentative || row == r->draft.n || id != r->draft.tokens[row];
    r->draft.next = id;
    if (!logits_rules_take(&r->rules, id))
        end(r, FINISHED_STOP);
    else if (r->n_answer == r->most)
        end(r, FINISHED_LENGTH);
}

/* Of pictures only the first row is a token of the prompt as the caller wrote it. */
static bool is_token(const struct request *r, int64_t row)
{
    for (int i = 0; i < r->n_pictures; i++) {
        const struct cut_picture *p = &r->pictures[i].place;
        if (row > p->first && row < p->first + p->height * p->width) return false;
    }
    return true;
}

/* Row `row` of the prompt tells the score of the one after it. */
static void score_prompt(struct batch *b, struct request *r, int64_t row, const float *logits)
{
    struct request_event event = { .kind = REQUEST_PROMPT };
    if (!is_token(r, row + 1)) return;
    logits_score(&event, logits, b->vocab, r->prompt.rows[row + 1].token, r->o.prompt_logprobs);
    request_post(r, &event);
}

/* Rows [first, first + n) of those that logits are wanted of: what the backend is to draw. *any: something;
 * *alone: and nobody will ask for the logits, or change them. */
static void list_draws(struct batch *b, int64_t first, int64_t n, bool *any, bool *alone)
{
    *any = false;
    *alone = true;
    for (int64_t i = 0; i < n; i++) {
        struct request *r = b->of[first + i];
        int64_t row = b->index[first + i] - r->first, at = r->n_answer - r->right;
        bool drawn = is_drawn(r, row);
        b->draws[i] = (struct draw){ 0 };
        if (r->ended) continue;
        *alone &= drawn &&
                  !(is_first(r, row) ? logits_rules_change(&r->rules) : logits_rules_may_change(&r->rules));
        if (!drawn) continue;
        *any = true;
        b->draws[i] = sampling_draw(&r->o.sampling, (uint64_t)(is_first(r, row) ? at : at + row));
    }
}

static bool change_logits(struct batch *b, struct mat logits, int64_t first, int64_t n, struct err *e)
{
    for (int k = 0; k < ROUNDS; k++) b->edits[k].n = 0;
    for (int64_t i = 0; i < n; i++) {
        struct request *r = b->of[first + i];
        int64_t row = b->index[first + i] - r->first;
        if (r->ended || !is_drawn(r, row) || !is_first(r, row) || !logits_rules_change(&r->rules) ||
            logits_rules_forced(&r->rules) >= 0)
            continue;
        const uint32_t *mask = logits_rules_mask(&r->rules);
        if (mask) engine_mask(b->engine, logits, i, mask);
        if (!logits_rules_edits(&r->rules, (int32_t)i, b->edits, e)) return false;
    }
    for (int k = 0; k < ROUNDS; k++) engine_edit(b->engine, logits, b->edits[k].items, b->edits[k].n);
    return true;
}

static bool take_row(struct batch *b, struct mat logits, int64_t i, int64_t row, struct request *r,
                     struct err *e)
{
    int32_t id = logits_rules_forced(&r->rules);
    bool host = !is_drawn(r, row) || (!is_first(r, row) && logits_rules_change(&r->rules));
    const float *x = host ? engine_fetch(b->engine, logits, i, 1) : NULL;
    if (x && !engine_wait(b->engine, e)) return false;
    if (!samples(r, row)) {
        score_prompt(b, r, r->done + row, x);
        return true;
    }
    if (id < 0 && !host) id = b->drawn[i];
    if (id < 0 && host && !choose(b, r, x, &id, e)) return false;
    take_token(b, r, id, x);
    return true;
}

static bool take_rows(struct batch *b, struct mat hidden, int64_t begin, int64_t first, int64_t n,
                      struct err *e)
{
    struct mat logits = { 0 };
    bool any, alone;
    for (int64_t i = 0; i < n; i++) b->at[i] = b->index[first + i] - begin;
    list_draws(b, first, n, &any, &alone);
    if (any && alone) {
        engine_draw_rows(b->engine, b->drawn, hidden, b->at, n, b->draws);
    } else {
        logits = engine_logits(b->engine, hidden, b->at, n);
        if (!change_logits(b, logits, first, n, e)) return false;
        if (any) engine_draw(b->engine, b->drawn, logits, b->draws);
    }
    if (!engine_wait(b->engine, e)) return false;
    for (int64_t i = 0; i < n; i++) {
        struct request *r = b->of[first + i];
        if (!r->ended && !take_row(b, logits, i, b->index[first + i] - r->first, r, e)) return false;
    }
    return true;
}

/* No more rows at a time than have bits of their own, but for answers that are more anyway. */
static int64_t logits_at_once(const struct batch *b)
{
    int64_t most = engine_logits_rows(b->engine);
    bool few = engine_few_differ(b->engine) && b->answers.rows <= ROWS_EXACT && most > ROWS_EXACT;
    return few ? ROWS_EXACT : most;
}

/* One step of the engine, and what comes of it. */
static bool run_part(struct batch *b, struct part begin, struct part end, struct err *e)
{
    struct mat hidden;
    int64_t most = logits_at_once(b);
    if (!engine_step(b->engine, b->runs + begin.runs, end.runs - begin.runs, &hidden, e)) return false;
    for (int64_t i = begin.logits; i < end.logits; i += most)
        if (!take_rows(b, hidden, begin.rows, i, end.logits - i < most ? end.logits - i : most, e))
            return false;
    return end.logits > begin.logits || engine_wait(b->engine, e);
}

/* Where short steps are computed otherwise than long ones, prompts and answers are steps of their own: a
 * request's company changes neither's kind. Answers come last, since drafts need their hidden rows. */
static bool run_parts(struct batch *b, struct err *e)
{
    struct part all = all_of(b), none = { 0 };
    bool apart = engine_few_differ(b->engine) && b->answers.runs < all.runs;
    for (int i = 0; i < b->n_runs; i++)
        b->requests[i]->drafts_ready = !apart || b->answers.runs == 0 || i < b->answers.runs;
    if (!apart) return run_part(b, none, all, e);
    return run_part(b, b->answers, all, e) && (b->answers.runs == 0 || run_part(b, none, b->answers, e));
}

/* What the rows computed mean for the request. */
static void advance_prompt(struct request *r)
{
    r->done += r->n_rows;
    for (int i = 0; i < r->n_pictures; i++) {
        struct request_picture *p = &r->pictures[i];
        if (p->place.first + p->place.height * p->place.width <= r->done) picture_free(&p->picture);
    }
    if (r->done == r->prompt.n && r->most == 0) end(r, FINISHED_LENGTH);
}

static void count(struct request *r, struct scheduler_stats *stats, double now)
{
    int64_t drafted = r->tentative ? r->draft.n : 0, accepted = r->tentative ? r->right - 1 : 0;
    bool first = r->decoding == 0 && r->n_answer > 0;
    if (first) r->decoding = now;
    stats->drafts += drafted > 0;
    stats->drafted += drafted;
    stats->accepted += accepted;
    for (int i = 0; i < accepted; i++) stats->accepted_at[i]++;
    pthread_mutex_lock(&r->lock);
    struct request_usage *u = &r->usage;
    u->prefilled = r->done;
    u->drafted += drafted;
    u->accepted += accepted;
    u->queued_seconds = r->began - r->submitted;
    u->prefill_seconds = (r->decoding > 0 ? r->decoding : now) - r->began;
    if (r->decoding > 0) u->decode_seconds = now - r->decoding;
    pthread_mutex_unlock(&r->lock);
}

bool batch_run(struct batch *b, struct scheduler_stats *stats, struct err *e)
{
    if (!run_parts(b, e)) return false;
    double now = clock_seconds();
    for (int i = 0; i < b->n_runs; i++) {
        struct request *r = b->requests[i];
        if (r->done < r->prompt.n) advance_prompt(r);
        if (r->tentative) engine_keep(b->engine, r->handle, r->right);
        count(r, stats, now);
        if (r->is_over) request_end(r);
    }
    return true;
}
