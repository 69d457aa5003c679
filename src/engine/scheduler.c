#include "engine/scheduler.h"
#include "base/clock.h"
#include "engine/batch.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A prompt is divided at multiples of DELTA_CHUNK rows from where a part of it begins, and no piece may be
 * short enough for the other form of the delta rule: so a row has the same bits however the prompt was
 * divided. */
enum { PIECE_LEAST = DELTA_CHUNK + ROWS_EXACT };

struct scheduler {
    struct scheduler_options o;
    struct engine *engine;
    struct picture_reader *reader;
    struct inbox inbox;
    pthread_t thread;
    bool has_lock, has_inbox;
    pthread_mutex_t lock; /* of published */
    struct scheduler_stats published;

    /* Of the thread. */
    struct waiting waiting;
    struct request **running; /* in the order of request_before */
    int n_running;
    struct request **ready; /* those that generate in this step */
    struct batch *batch;
    struct scheduler_stats stats;
    double row_seconds, decode_seconds; /* of a prompt's row, and of a step without any, of late */
};

static void publish(struct scheduler *s)
{
    struct scheduler_stats *t = &s->stats;
    t->running = s->n_running;
    t->waiting = s->waiting.n;
    t->waiting_tokens = s->waiting.tokens;
    t->states = engine_sequences(s->engine);
    t->states_used = s->n_running;
    pthread_mutex_lock(&s->lock);
    s->published = *t;
    pthread_mutex_unlock(&s->lock);
}

void scheduler_stats(struct scheduler *s, struct scheduler_stats *out)
{
    pthread_mutex_lock(&s->lock);
    *out = s->published;
    pthread_mutex_unlock(&s->lock);
}

/* Ends of requests. */

/* Its last event is posted: the engine's sequence is free again. */
static void leave(struct scheduler *s, int at)
{
    struct request *r = s->running[at];
    engine_close(s->engine, r->handle);
    memmove(s->running + at, s->running + at + 1, (size_t)(--s->n_running - at) * sizeof *s->running);
    request_let_go(r);
}

static void drop_waiting(struct scheduler *s, struct request *r, enum request_finish finish)
{
    waiting_remove(&s->waiting, r);
    inbox_no_longer_waits(&s->inbox);
    request_end(r, finish, -1);
    request_let_go(r);
}

/* Returns how many left. */
static int sweep(struct scheduler *s, bool all)
{
    int n = 0;
    for (struct request *r = s->waiting.first, *next; r; r = next) {
        next = r->next;
        if (!all && !request_is_cancelled(r)) continue;
        drop_waiting(s, r, FINISHED_CANCELLED);
        n++;
    }
    for (int i = s->n_running - 1; i >= 0; i--) {
        struct request *r = s->running[i];
        if (!all && !r->is_over && !request_is_cancelled(r)) continue;
        if (!r->is_over) request_end(r, FINISHED_CANCELLED, -1);
        leave(s, i);
        n++;
    }
    return n;
}

/* The backend is lost. */
static void fail_all(struct scheduler *s, const struct err *e)
{
    pthread_mutex_lock(&s->inbox.lock);
    s->inbox.failed = true;
    pthread_mutex_unlock(&s->inbox.lock);
    s->stats.failed = true;
    while (s->waiting.first) {
        s->waiting.first->error = *e;
        drop_waiting(s, s->waiting.first, FINISHED_ERROR);
    }
    while (s->n_running > 0) {
        struct request *r = s->running[s->n_running - 1];
        if (!r->is_over) {
            r->error = *e;
            request_end(r, FINISHED_ERROR, -1);
        }
        leave(s, s->n_running - 1);
    }
}

/* Starts of requests. */

static void enter(struct scheduler *s, struct request *r)
{
    int at = s->n_running++;
    for (; at > 0 && request_before(r, s->running[at - 1]); at--) s->running[at] = s->running[at - 1];
    s->running[at] = r;
    if (r->began == 0) r->began = clock_seconds();
}

static void admit(struct scheduler *s)
{
    for (struct request *r; (r = waiting_best(&s->waiting)) && s->n_running < engine_sequences(s->engine);) {
        if (!engine_open(s->engine, &r->handle, NULL)) return;
        waiting_remove(&s->waiting, r);
        inbox_no_longer_waits(&s->inbox);
        enter(s, r);
    }
}

/* A step. */

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rows to compute next of `left`, at most `budget`; 0: too few are allowed to divide here. */
static int64_t piece_of(int64_t left, int64_t budget)
{
    if (left <= budget) return left;
    int64_t n = budget / DELTA_CHUNK * DELTA_CHUNK;
    return left - n > ROWS_EXACT ? n : n - DELTA_CHUNK;
}

/* Rows of prompts beside `used` ones of answers, so that the step takes the time it should. */
static int64_t prompt_budget(const struct scheduler *s, int64_t used)
{
    int64_t most = s->o.step_tokens - used;
    if (used == 0 || s->row_seconds == 0) return most;
    double rows = (s->o.decode_seconds - s->decode_seconds) / s->row_seconds;
    return rows < PIECE_LEAST ? least(PIECE_LEAST, most) : rows < (double)most ? (int64_t)rows : most;
}

static void settle(double *usual, double x)
{
    *usual += (*usual == 0 ? 1 : 0.2) * (x - *usual);
}

static void learn(struct scheduler *s, int64_t answers, int64_t prompts, double seconds)
{
    if (prompts == 0)
        settle(&s->decode_seconds, seconds);
    else if (seconds > s->decode_seconds || answers == 0)
        settle(&s->row_seconds, (seconds - (answers ? s->decode_seconds : 0)) / (double)prompts);
}

static bool add_answers(struct scheduler *s, struct err *e)
{
    int n = 0;
    for (int i = 0; i < s->n_running; i++) {
        struct request *r = s->running[i];
        if (r->done == r->prompt.n &&
            request_room(r, engine_drafts(s->engine) + 1) > engine_drafts(s->engine))
            s->ready[n++] = r;
    }
    if (!batch_draft(s->batch, s->ready, n, e)) return false;
    for (int i = 0; i < n; i++) batch_add_round(s->batch, s->ready[i]);
    return true;
}

/* A request that cannot go on for a reason of its own. */
static void fail_one(struct request *r, const struct err *e)
{
    r->error = *e;
    r->is_over = true;
    request_end(r, FINISHED_ERROR, -1);
}

static void add_prompts(struct scheduler *s)
{
    int64_t budget = prompt_budget(s, batch_rows(s->batch));
    for (int i = 0; i < s->n_running && budget > 0; i++) {
        struct request *r = s->running[i];
        struct err e = { 0 };
        int64_t left = r->prompt.n - r->done, most = budget;
        if (left == 0) continue;
        if (r->o.prompt_logprobs >= 0) most = least(most, request_room(r, (int)least(left, PIECE_LEAST)));
        int64_t n = most > 0 ? piece_of(left, most) : 0;
        if (n <= 0) continue;
        if (batch_add_prompt(s->batch, r, n, &e))
            budget -= n;
        else
            fail_one(r, &e);
    }
}

/* *worked: there was something to do. */
static bool step(struct scheduler *s, bool *worked, struct err *e)
{
    double begin = clock_seconds();
    batch_clear(s->batch);
    for (int i = 0; i < s->n_running; i++) s->running[i]->n_rows = 0;
    if (!add_answers(s, e)) return false;
    int64_t answers = batch_rows(s->batch);
    add_prompts(s);
    int64_t rows = batch_rows(s->batch);
    *worked = rows > 0;
    if (rows == 0) return true;
    if (!batch_run(s->batch, &s->stats, e)) return false;
    for (int i = 0; i < s->n_running; i++) s->running[i]->drafts_ready = s->running[i]->n_rows > 0;
    s->stats.last_step = clock_seconds();
    s->stats.steps++;
    s->stats.step_rows += rows;
    learn(s, answers, rows - answers, s->stats.last_step - begin);
    return true;
}

/* The thread. */

static void receive(struct scheduler *s, struct request *all)
{
    for (struct request *r = all, *next; r; r = next) {
        next = r->next;
        waiting_add(&s->waiting, r);
    }
}

static void *run(void *ctx)
{
    struct scheduler *s = ctx;
    bool closed = false, worked = false;
    while (!closed) {
        struct err e = { 0 };
        struct request *fresh = inbox_take(&s->inbox, !worked, &closed);
        receive(s, fresh);
        bool news = sweep(s, closed) > 0;
        admit(s);
        publish(s);
        worked = false;
        if (!step(s, &worked, &e)) {
            fail_all(s, &e);
            news = true;
        }
        news = sweep(s, false) > 0 || worked || news;
        publish(s);
        if (news && s->o.wake) s->o.wake(s->o.ctx);
    }
    return NULL;
}

static bool set_defaults(struct scheduler *s, const struct scheduler_options *o, struct err *e)
{
    int sequences = engine_sequences(o->engine), drafts = engine_drafts(o->engine);
    int64_t needed = (int64_t)(sequences - 1) * (drafts + 1) + least(PIECE_LEAST, engine_context(o->engine));
    s->o = *o;
    s->engine = o->engine;
    if (s->o.max_queued == 0) s->o.max_queued = 1024;
    if (s->o.decode_seconds == 0) s->o.decode_seconds = 0.1;
    if (s->o.step_tokens == 0 || s->o.step_tokens > engine_step_rows(o->engine))
        s->o.step_tokens = engine_step_rows(o->engine);
    return s->o.step_tokens >= needed ||
           err_set(e, ERR_LIMIT,
                   "steps of %lld tokens are too short: %d sequences with %d drafts and a piece of a prompt "
                   "need %lld",
                   (long long)s->o.step_tokens, sequences, drafts, (long long)needed);
}

static bool start(struct scheduler *s, struct err *e)
{
    if ((errno = pthread_create(&s->thread, NULL, run, s)) != 0) return err_errno(e, "scheduler's thread");
    return true;
}

static void destroy(struct scheduler *s)
{
    batch_free(s->batch);
    picture_reader_free(s->reader);
    if (s->has_inbox) inbox_deinit(&s->inbox);
    if (s->has_lock) pthread_mutex_destroy(&s->lock);
    free(s->running);
    free(s->ready);
    free(s);
}

bool scheduler_create(struct scheduler **out, const struct scheduler_options *o, struct err *e)
{
    struct scheduler *s = calloc(1, sizeof *s);
    struct model *m = (struct model *)(uintptr_t)o->model; /* the tower's weights go through its backend */
    size_t n = (size_t)engine_sequences(o->engine);
    *out = NULL;
    if (!s) return err_memory(e, "scheduler", sizeof *s);
    s->has_lock = pthread_mutex_init(&s->lock, NULL) == 0;
    s->running = calloc(n, sizeof *s->running);
    s->ready = calloc(n, sizeof *s->ready);
    bool ok = (s->has_lock && s->running && s->ready) || err_memory(e, "scheduler", 2 * n * sizeof *s->ready);
    ok = ok && set_defaults(s, o, e);
    if (ok) ok = s->has_inbox = inbox_init(&s->inbox, s->o.max_queued, e);
    if (ok && m->config->has_vision && !o->no_pictures) ok = picture_reader_create(&s->reader, m, e);
    ok = ok && batch_create(&s->batch, s->engine, m, s->reader, e) && start(s, e);
    if (ok)
        *out = s;
    else
        destroy(s);
    return ok;
}

void scheduler_free(struct scheduler *s)
{
    if (!s) return;
    pthread_mutex_lock(&s->inbox.lock);
    s->inbox.closed = true;
    pthread_cond_signal(&s->inbox.news);
    pthread_mutex_unlock(&s->inbox.lock);
    pthread_join(s->thread, NULL);
    destroy(s);
}

bool scheduler_submit(struct scheduler *s, struct request **out, const struct request_options *o,
                      struct err *e)
{
    if (!request_create(out, o, s->o.model, s->reader, engine_context(s->engine), e)) return false;
    if (inbox_put(&s->inbox, *out, e)) return true;
    request_let_go(*out);
    *out = NULL;
    return false;
}
