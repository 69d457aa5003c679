#include "engine/scheduler.h"
#include "base/clock.h"
#include "engine/batch.h"
#include "engine/drafting.h"
#include "engine/prefix.h"
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Between two cuts a prompt is divided at multiples of DELTA_CHUNK rows, and no piece may be short enough for
 * the other form of the delta rule: so a row has the same bits however the prompt was divided. */
enum { PIECE_LEAST = DELTA_CHUNK + ROWS_EXACT, INTERVAL = 4096 };

struct scheduler {
    struct scheduler_options o;
    struct engine *engine;
    struct picture_reader *reader;
    struct request_maker maker;
    struct inbox inbox;
    pthread_t thread;
    bool has_lock, has_inbox;
    pthread_mutex_t lock; /* of published */
    struct scheduler_stats published;
    atomic_bool forgets; /* what is known of prompts and pictures, before requests begin */

    /* Of the thread. */
    struct waiting waiting;
    struct request **running; /* in the order of request_before */
    int n_running;
    struct request **ready; /* those that generate in this step */
    int n_ready;
    struct drafting drafting;
    struct batch *batch;
    struct prefix_cache *prefixes; /* NULL: none are kept */
    struct disk_cache *disk;       /* or NULL */
    struct encoder_cache *seen;
    const struct request *stuck; /* found no pages while so many were free */
    int64_t stuck_pages;
    struct scheduler_stats stats;
    double row_seconds, decode_seconds; /* of a prompt's row, and of a step without any, of late */
};

static void publish(struct scheduler *s)
{
    struct scheduler_stats *t = &s->stats;
    struct encoder_stats seen = encoder_cache_stats(s->seen);
    t->running = s->n_running;
    t->waiting = s->waiting.n;
    t->waiting_tokens = s->waiting.tokens;
    t->pages = engine_pages(s->engine);
    t->pages_used = t->pages - engine_pages_free(s->engine);
    t->states = engine_sequences(s->engine);
    t->states_used = s->n_running;
    t->encoder_queries = seen.queries;
    t->encoder_hits = seen.hits;
    t->encoder_bytes = seen.bytes;
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

/* The engine's sequence is free again. */
static struct request *take_off(struct scheduler *s, int at)
{
    struct request *r = s->running[at];
    engine_close(s->engine, r->handle);
    r->handle = -1;
    memmove(s->running + at, s->running + at + 1, (size_t)(--s->n_running - at) * sizeof *s->running);
    return r;
}

/* Its last event is posted. */
static void leave(struct scheduler *s, int at)
{
    request_let_go(take_off(s, at));
}

static void drop_waiting(struct scheduler *s, struct request *r, enum request_finish finish)
{
    waiting_remove(&s->waiting, r);
    inbox_count(&s->inbox, -1);
    if (s->stuck == r) s->stuck = NULL;
    request_finish(r, finish);
    request_end(r);
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
        if (!r->is_over) {
            request_finish(r, FINISHED_CANCELLED);
            request_end(r);
        }
        leave(s, i);
        n++;
    }
    return n;
}

/* A request that cannot go on for a reason of its own. */
static void fail_one(struct request *r, const struct err *e)
{
    r->error = *e;
    request_finish(r, FINISHED_ERROR);
    request_end(r);
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
        if (r->inbox) fail_one(r, e); /* else its last event is posted */
        leave(s, s->n_running - 1);
    }
}

/* Starts of requests, and stops for want of memory. */

/* The last of those that run waits again, what it knows in host memory. */
static void preempt(struct scheduler *s)
{
    struct err e = { 0 };
    struct request *r = s->running[s->n_running - 1];
    bool packed = parcel_pack(&r->parcel, s->engine, r->handle, &e);
    take_off(s, s->n_running - 1);
    r->drafts_ready = false;
    s->stats.preemptions++;
    if (packed) {
        waiting_add_again(&s->waiting, r);
        inbox_count(&s->inbox, 1);
    } else {
        fail_one(r, &e);
        request_let_go(r);
    }
}

static bool make_room(struct scheduler *s)
{
    return s->prefixes && prefix_give_up(s->prefixes);
}

static bool reads_prefixes(const struct scheduler *s, const struct request *r)
{
    return s->prefixes && !r->o.no_prefix_cache && r->o.prompt_logprobs < 0;
}

/* At the cut that was read from a file, if that is further than what is known by now. */
static bool begin_fetched(struct scheduler *s, struct request *r, int64_t end)
{
    if (!r->fetched || r->fetch->at >= end || r->fetch->at <= prefix_depth(s->prefixes, &r->cuts, end))
        return false;
    while (!parcel_unpack(r->fetched, s->engine, r->handle))
        if (!make_room(s)) return false;
    r->done = r->fetch->at;
    prefix_add(s->prefixes, r->handle, r->fetch);
    s->stats.disk_hits += r->done;
    return true;
}

/* Where the prompt begins: at its first row, or at the last cut before row `end` that is known. */
static void begin(struct scheduler *s, struct request *r, int64_t end)
{
    if (reads_prefixes(s, r) && begin_fetched(s, r, end)) return;
    r->done = reads_prefixes(s, r) ? prefix_begin(s->prefixes, r->handle, &r->cuts, end) : 0;
}

static void count_found(struct scheduler *s, struct request *r, int64_t rows)
{
    s->stats.prefix_hits += rows;
    pthread_mutex_lock(&r->lock);
    r->usage.cached_tokens += rows;
    r->usage.prefilled = r->done;
    pthread_mutex_unlock(&r->lock);
}

/* It has its place. */
static void began(struct scheduler *s, struct request *r)
{
    r->began = clock_seconds();
    if (reads_prefixes(s, r)) s->stats.prefix_queries += r->prompt.n;
    count_found(s, r, r->done);
}

static bool resume(struct scheduler *s, struct request *r)
{
    while (!parcel_unpack(r->parcel, s->engine, r->handle))
        if (!make_room(s)) return false;
    return true;
}

/* Rows of the sequence that are sure to come: the prompt and the first round after it, or the next. */
static int64_t rows_ahead(const struct scheduler *s, const struct request *r)
{
    int64_t left = r->most - r->n_answer, round = engine_drafts(s->engine) + 1;
    return r->prompt.n - r->done + (left < round ? left : round);
}

/* A sequence with pages for what is sure to come. Requests of lower priority make room; others do not. */
static bool seat(struct scheduler *s, struct request *r)
{
    if (!engine_open(s->engine, &r->handle, NULL)) return false;
    bool ok = true;
    if (r->parcel)
        ok = resume(s, r);
    else
        begin(s, r, r->prompt.n);
    while (ok && !engine_reserve(s->engine, r->handle, rows_ahead(s, r))) {
        if (make_room(s)) continue;
        ok = s->n_running > 0 && s->running[s->n_running - 1]->o.priority > r->o.priority;
        if (ok) preempt(s);
    }
    if (!ok) {
        engine_close(s->engine, r->handle);
        r->handle = -1;
        return false;
    }
    if (!r->parcel) began(s, r);
    parcel_free(r->parcel);
    parcel_free(r->fetched);
    r->parcel = r->fetched = NULL;
    return true;
}

static void enter(struct scheduler *s, struct request *r)
{
    int at = s->n_running++;
    for (; at > 0 && request_before(r, s->running[at - 1]); at--) s->running[at] = s->running[at - 1];
    s->running[at] = r;
}

/* A seat was looked for in vain, and no pages have become free since: each try costs the copy of a state. */
static bool is_stuck(struct scheduler *s, const struct request *r)
{
    int64_t pages = engine_pages_free(s->engine);
    if (s->stuck != r || s->n_running == 0 || pages > s->stuck_pages) return false;
    s->stuck_pages = pages;
    return true;
}

static bool try_seat(struct scheduler *s, struct request *r)
{
    if (is_stuck(s, r)) return false;
    bool seated = seat(s, r);
    s->stuck = seated ? NULL : r;
    s->stuck_pages = engine_pages_free(s->engine);
    return seated;
}

static void admit(struct scheduler *s)
{
    for (struct request *r; (r = waiting_best(&s->waiting));) {
        bool full = s->n_running == engine_sequences(s->engine);
        if (full && s->running[s->n_running - 1]->o.priority <= r->o.priority) return;
        if (full) preempt(s);
        if (!try_seat(s, r)) return;
        waiting_remove(&s->waiting, r);
        inbox_count(&s->inbox, -1);
        enter(s, r);
    }
}

/* Pages for the next round of the request at `at`; those after it, or it itself, may have to stop. False: it
 * did. */
static bool keep_seat(struct scheduler *s, int at)
{
    struct request *r = s->running[at];
    while (!engine_reserve(s->engine, r->handle, rows_ahead(s, r))) {
        if (make_room(s)) continue;
        preempt(s);
        if (s->n_running == at) return false;
    }
    return true;
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

static int64_t whole_chunks(int64_t n)
{
    return (n + DELTA_CHUNK - 1) / DELTA_CHUNK * DELTA_CHUNK;
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

/* What a step takes besides its rows counts for little where there are many. */
static void learn(struct scheduler *s, int64_t answers, int64_t prompts, double seconds)
{
    if (prompts == 0)
        settle(&s->decode_seconds, seconds);
    else if (prompts >= DELTA_CHUNK && (seconds > s->decode_seconds || answers == 0))
        settle(&s->row_seconds, (seconds - (answers ? s->decode_seconds : 0)) / (double)prompts);
}

static bool add_answers(struct scheduler *s, struct err *e)
{
    int n = 0, most = engine_drafts(s->engine), rows = most + 1;
    for (int i = 0; i < s->n_running; i++) {
        struct request *r = s->running[i];
        if (r->done == r->prompt.n && request_room(r, rows) >= rows && keep_seat(s, i)) s->ready[n++] = r;
    }
    s->n_ready = n;
    most = s->o.fixed_drafts ? drafting_most(&s->drafting, n) : drafting_choose(&s->drafting, n);
    if (!batch_draft(s->batch, s->ready, n, most, e)) return false;
    for (int i = 0; i < n; i++) batch_add_round(s->batch, s->ready[i]);
    return true;
}

/* One that runs before it is on its way to this cut, and waits for no reader. */
static bool comes_soon(const struct scheduler *s, int at, const struct cut *cut)
{
    for (int i = 0; i < at; i++) {
        const struct request *r = s->running[i];
        const struct cut *same = r->done < cut->at ? cuts_at(&r->cuts, cut->at) : NULL;
        if (same && reads_prefixes(s, r) && memcmp(same->key, cut->key, sizeof cut->key) == 0) return true;
    }
    return false;
}

/* Requests that begin alike and come together compute what they share once: the later ones wait for the
 * first, and go on from what it leaves at a cut. False: r waits. */
static bool share(struct scheduler *s, int at)
{
    struct request *r = s->running[at];
    int64_t had = r->done, known = had;
    const struct cut *cut = NULL;
    if (!reads_prefixes(s, r) || (had > 0 && !cuts_at(&r->cuts, had))) return true;
    while ((cut = cuts_at(&r->cuts, cuts_next(&r->cuts, known, r->prompt.n))) && cut->at < r->prompt.n &&
           prefix_knows(s->prefixes, cut))
        known = cut->at;
    if (known > had) {
        engine_close(s->engine, r->handle);
        engine_open(s->engine, &r->handle, NULL); /* which the close has made possible */
        begin(s, r, known + 1);
        count_found(s, r, r->done - had);
    }
    return !cut || cut->at >= r->prompt.n || !comes_soon(s, at, cut);
}

/* Pages for all that is sure to come of the request at `at`. It was let in with them, but share() may have
 * had to give some back; then one that comes after it, and has nothing in this step, may have to stop. */
static bool has_pages(struct scheduler *s, int at)
{
    const struct request *r = s->running[at];
    while (!engine_reserve(s->engine, r->handle, rows_ahead(s, r))) {
        const struct request *last = s->running[s->n_running - 1];
        if (make_room(s)) continue;
        if (last == r || last->n_rows > 0 || last->is_over) return false;
        preempt(s);
    }
    return true;
}

static void add_prompts(struct scheduler *s)
{
    int64_t budget = prompt_budget(s, batch_rows(s->batch)), room = whole_chunks(s->o.step_tokens);
    for (int i = 0; i < s->n_running && budget > 0 && room > 0; i++) {
        struct request *r = s->running[i];
        struct err e = { 0 };
        if (r->done == r->prompt.n || !share(s, i) || !has_pages(s, i)) continue;
        int64_t left = cuts_next(&r->cuts, r->done, r->prompt.n) - r->done, most = least(budget, room);
        if (r->o.prompt_logprobs >= 0) most = least(most, request_room(r, (int)least(left, PIECE_LEAST)));
        int64_t n = most > 0 ? piece_of(left, most) : 0;
        if (n <= 0) continue;
        if (!batch_add_prompt(s->batch, r, n, &e)) {
            fail_one(r, &e);
            continue;
        }
        budget -= n;
        if (engine_few_differ(s->engine)) room -= whole_chunks(n);
    }
}

/* What is known at a cut now is kept for prompts to come. */
static void remember(struct scheduler *s, struct request *r)
{
    const struct cut *cut = cuts_at(&r->cuts, r->done);
    if (s->prefixes && cut && !r->o.no_prefix_cache && engine_length(s->engine, r->handle) == r->done)
        prefix_add(s->prefixes, r->handle, cut);
}

/* What a step that took so long tells about drafts. Its time does where nearly all of the requests in it had
 * as many as most of them. */
static void learn_drafts(struct scheduler *s, bool prompts, double seconds)
{
    int drafted = 0, most = 0, n = s->n_ready;
    for (int i = 0; i < n; i++) {
        const struct request *r = s->ready[i];
        int k = r->tentative ? r->draft.n : 0;
        drafted += k;
        if (k > most) most = k;
        if (k > 0) drafting_count(&s->drafting, k, r->right - 1);
    }
    if (n > 0 && !prompts && 10 * drafted >= 9 * n * most) drafting_learn(&s->drafting, n, most, seconds);
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
    for (int i = 0; i < s->n_running; i++) {
        struct request *r = s->running[i];
        if (r->n_rows > 0)
            remember(s, r);
        else
            r->drafts_ready = false;
    }
    s->stats.last_step = clock_seconds();
    s->stats.steps++;
    s->stats.step_rows += rows;
    learn(s, answers, rows - answers, s->stats.last_step - begin);
    learn_drafts(s, rows > answers, s->stats.last_step - begin);
    return true;
}

/* Files. */

/* A file is asked for where reading it may take less time than computing what it knows. */
static void want(struct scheduler *s, struct request *r)
{
    if (!s->disk || !reads_prefixes(s, r)) return;
    int64_t depth = prefix_depth(s->prefixes, &r->cuts, r->prompt.n), i = r->cuts.n - 1;
    uint64_t bytes = 0;
    for (; i >= 0 && r->cuts.items[i].at > depth; i--)
        if (r->cuts.items[i].at < r->prompt.n && (bytes = disk_cache_has(s->disk, r->cuts.items[i].key)))
            break;
    if (bytes == 0) return;
    r->fetch = &r->cuts.items[i];
    double rows = (double)(r->fetch->at - depth) * s->row_seconds;
    if (rows > 0 && disk_cache_seconds(s->disk, bytes) > 2 * rows) return;
    r->fetching = disk_cache_fetch(s->disk, r->fetch->key);
}

/* Of those that wait for this key the first gets it; the others will find it known. */
static void hand_over(struct scheduler *s, const uint8_t key[32], struct parcel *p)
{
    struct request *first = NULL;
    for (struct request *r = s->waiting.first; r; r = r->next) {
        if (!r->fetching || memcmp(r->fetch->key, key, 32) != 0) continue;
        r->fetching = false;
        if (p && (!first || request_before(r, first)) && parcel_fits(p, s->engine, r->fetch->at)) first = r;
    }
    if (first && !first->fetched)
        first->fetched = p;
    else
        parcel_free(p);
}

static void take_fetched(struct scheduler *s)
{
    uint8_t key[32];
    struct parcel *p;
    while (s->disk && disk_cache_fetched(s->disk, key, &p)) hand_over(s, key, p);
}

/* The last moment for what has no file yet. */
static void store_all(struct scheduler *s)
{
    if (!s->disk || s->stats.failed) return;
    do disk_cache_await_room(s->disk);
    while (prefix_store(s->prefixes));
}

/* The thread. */

static void receive(struct scheduler *s, struct request *all)
{
    for (struct request *r = all, *next; r; r = next) {
        next = r->next;
        want(s, r);
        waiting_add(&s->waiting, r);
    }
}

static void forget(struct scheduler *s)
{
    encoder_cache_clear(s->seen);
    if (!s->prefixes) return;
    prefix_clear(s->prefixes);
    for (struct request *r = s->waiting.first; r; r = r->next) {
        parcel_free(r->fetched);
        r->fetched = NULL;
    }
}

static void *run(void *ctx)
{
    struct scheduler *s = ctx;
    bool closed = false, worked = false;
    while (!closed) {
        struct err e = { 0 };
        bool stored = !worked && s->disk && prefix_store(s->prefixes);
        struct request *fresh = inbox_take(&s->inbox, !worked && !stored, &closed);
        if (atomic_exchange(&s->forgets, false)) forget(s);
        take_fetched(s);
        receive(s, fresh);
        bool ended = sweep(s, closed) > 0;
        admit(s);
        publish(s);
        worked = false;
        if (!step(s, &worked, &e)) {
            fail_all(s, &e);
            ended = true;
        }
        ended = sweep(s, false) > 0 || ended;
        publish(s);
        if ((worked || ended) && s->o.wake) s->o.wake(s->o.ctx, ended);
    }
    store_all(s);
    return NULL;
}

static bool set_defaults(struct scheduler *s, const struct scheduler_options *o, struct err *e)
{
    int sequences = engine_sequences(o->engine), drafts = engine_drafts(o->engine);
    int64_t pool = engine_pages(o->engine) * KV_PAGE, interval = o->interval ? o->interval : INTERVAL;
    int64_t needed = (int64_t)(sequences - 1) * (drafts + 1) + least(PIECE_LEAST, engine_context(o->engine));
    s->o = *o;
    s->engine = o->engine;
    drafting_init(&s->drafting, drafts);
    if (s->o.max_queued == 0) s->o.max_queued = 1024;
    if (s->o.decode_seconds == 0) s->o.decode_seconds = 0.1;
    if (s->o.step_tokens == 0 || s->o.step_tokens > engine_step_rows(o->engine))
        s->o.step_tokens = engine_step_rows(o->engine);
    s->maker =
        (struct request_maker){ .model = o->model,
                                .images = o->images,
                                .limit = least(engine_context(o->engine), pool),
                                .rules = { o->turn_end, o->n_turn_end,
                                           (interval + DELTA_CHUNK - 1) / DELTA_CHUNK * DELTA_CHUNK } };
    return s->o.step_tokens >= needed ||
           err_set(e, ERR_LIMIT,
                   "steps of %lld tokens are too short: %d sequences with %d drafts and a piece of a prompt "
                   "need %lld",
                   (long long)s->o.step_tokens, sequences, drafts, (long long)needed);
}

static bool start(struct scheduler *s, struct err *e)
{
    errno = pthread_create(&s->thread, NULL, run, s);
    if (errno == EAGAIN || errno == ENOMEM) return err_memory(e, "scheduler's thread", 0);
    return errno == 0 || err_errno(e, "scheduler's thread");
}

static void destroy(struct scheduler *s)
{
    batch_free(s->batch);
    prefix_free(s->prefixes);
    disk_cache_free(s->disk);
    encoder_cache_free(s->seen);
    picture_reader_free(s->reader);
    if (s->has_inbox) inbox_deinit(&s->inbox);
    if (s->has_lock) pthread_mutex_destroy(&s->lock);
    free(s->running);
    free(s->ready);
    free(s);
}

static void ring(void *ctx)
{
    struct scheduler *s = ctx;
    inbox_ring(&s->inbox);
}

static bool open_disk(struct scheduler *s, struct err *e)
{
    struct disk_cache_options o = { .folder = s->o.disk_folder,
                                    .bytes = s->o.disk_bytes,
                                    .ctx = s->o.ctx,
                                    .warn = s->o.warn,
                                    .ring_ctx = s,
                                    .ring = ring };
    memcpy(o.identity, s->o.disk_identity, sizeof o.identity);
    return !o.folder || disk_cache_create(&s->disk, &o, e);
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
    s->maker.reader = s->reader;
    if (ok && engine_snapshots(s->engine) > 0 && !o->no_prefix_cache)
        ok = open_disk(s, e) && prefix_create(&s->prefixes, s->engine, o->host_cache_bytes, s->disk, e);
    ok = ok && encoder_cache_create(&s->seen, o->encoder_cache_bytes, e) &&
         batch_create(&s->batch, s->engine, s->reader, s->seen, o->known, e) && start(s, e);
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

void scheduler_forget(struct scheduler *s)
{
    atomic_store(&s->forgets, true);
    inbox_ring(&s->inbox);
}

bool scheduler_submit(struct scheduler *s, struct request **out, const struct request_options *o,
                      struct err *e)
{
    if (!request_create(out, o, &s->maker, e)) return false;
    if (inbox_put(&s->inbox, *out, e)) return true;
    request_let_go(*out);
    *out = NULL;
    return false;
}
