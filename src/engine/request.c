#include "engine/request.h"
#include "base/clock.h"
#include "engine/encoder_cache.h"
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* The inbox. */

bool inbox_init(struct inbox *b, int64_t most, struct err *e)
{
    *b = (struct inbox){ .most = most };
    b->end = &b->first;
    if ((errno = pthread_mutex_init(&b->lock, NULL)) != 0) return err_errno(e, "scheduler");
    if ((errno = pthread_cond_init(&b->news, NULL)) == 0) return true;
    err_errno(e, "scheduler");
    pthread_mutex_destroy(&b->lock);
    return false;
}

void inbox_deinit(struct inbox *b)
{
    pthread_cond_destroy(&b->news);
    pthread_mutex_destroy(&b->lock);
}

static void ring_locked(struct inbox *b)
{
    b->rung = true;
    pthread_cond_signal(&b->news);
}

void inbox_ring(struct inbox *b)
{
    pthread_mutex_lock(&b->lock);
    ring_locked(b);
    pthread_mutex_unlock(&b->lock);
}

bool inbox_put(struct inbox *b, struct request *r, struct err *e)
{
    pthread_mutex_lock(&b->lock);
    bool failed = b->failed || b->closed, full = b->n_waiting >= b->most;
    if (!failed && !full) {
        r->inbox = b;
        r->holders = 2;
        *b->end = r;
        b->end = &r->next;
        b->n_waiting++;
        ring_locked(b);
    }
    pthread_mutex_unlock(&b->lock);
    if (failed) return err_set(e, ERR_IO, "the backend has failed, no request is taken any more");
    return !full || err_set(e, ERR_BUSY, "%lld requests wait already, which is the limit; try again later",
                            (long long)b->most);
}

struct request *inbox_take(struct inbox *b, bool wait, bool *closed)
{
    pthread_mutex_lock(&b->lock);
    while (wait && !b->first && !b->rung && !b->closed) pthread_cond_wait(&b->news, &b->lock);
    struct request *all = b->first;
    b->first = NULL;
    b->end = &b->first;
    b->rung = false;
    *closed = b->closed;
    pthread_mutex_unlock(&b->lock);
    return all;
}

void inbox_count(struct inbox *b, int more)
{
    pthread_mutex_lock(&b->lock);
    b->n_waiting += more;
    pthread_mutex_unlock(&b->lock);
}

/* Making one. */

static void *copy(struct arena *a, const void *from, int64_t n, size_t each)
{
    void *to = arena_take(a, n, each, 16);
    if (to && n > 0) memcpy(to, from, (size_t)n * each);
    return to;
}

static void copy_options(struct request *r, const struct request_options *o, struct arena *a)
{
    struct request_options *to = &r->o;
    *to = *o;
    to->prompt = copy(a, o->prompt, o->n_prompt, sizeof *o->prompt);
    to->stop_tokens = copy(a, o->stop_tokens, o->n_stop_tokens, sizeof *o->stop_tokens);
    to->never = copy(a, o->never, o->n_never, sizeof *o->never);
    to->bias = copy(a, o->bias, o->n_bias, sizeof *o->bias);
    to->allowed = copy(a, o->allowed, o->n_allowed, sizeof *o->allowed);
    to->score_ids = copy(a, o->score_ids, o->n_score_ids, sizeof *o->score_ids);
    to->thinking_end = copy(a, o->thinking_end, o->n_thinking_end, sizeof *o->thinking_end);
    struct token_run *words = copy(a, o->bad_words, o->n_bad_words, sizeof *o->bad_words);
    for (int i = 0; i < o->n_bad_words; i++) {
        const int32_t *ids = copy(a, o->bad_words[i].ids, o->bad_words[i].n, sizeof *ids);
        if (words) words[i].ids = ids;
    }
    to->bad_words = words;
    to->pictures = NULL;
    r->ring_size = o->prompt_logprobs >= 0 ? RING_EVENTS_SCORES : RING_EVENTS;
    r->ring = arena_take(a, r->ring_size, sizeof *r->ring, 16);
}

static int by_id(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* Of one token there is one, the sum. */
static void join_bias(struct request_options *o)
{
    struct logit_bias *b = (struct logit_bias *)(uintptr_t)o->bias; /* our copy */
    int n = 0;
    qsort(b, (size_t)o->n_bias, sizeof *b, by_id);
    for (int i = 0; i < o->n_bias; i++)
        if (n > 0 && b[n - 1].id == b[i].id)
            b[n - 1].bias += b[i].bias;
        else
            b[n++] = b[i];
    o->n_bias = n;
}

static bool check_ids(const char *what, const int32_t *ids, int64_t n, int64_t n_vocab, struct err *e)
{
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_vocab)
            return err_set(e, ERR_ARGUMENT, "%s: token %d, the model has %lld", what, ids[i],
                           (long long)n_vocab);
    return true;
}

static bool check(const struct request_options *o, int64_t n_vocab, struct err *e)
{
    bool ok = check_ids("prompt", o->prompt, o->n_prompt, n_vocab, e) &&
              check_ids("stop tokens", o->stop_tokens, o->n_stop_tokens, n_vocab, e) &&
              check_ids("never", o->never, o->n_never, n_vocab, e) &&
              check_ids("allowed tokens", o->allowed, o->n_allowed, n_vocab, e) &&
              check_ids("scored tokens", o->score_ids, o->n_score_ids, n_vocab, e) &&
              check_ids("end of thinking", o->thinking_end, o->n_thinking_end, n_vocab, e) &&
              sampling_check(&o->sampling, e);
    for (int i = 0; ok && i < o->n_bias; i++) ok = check_ids("bias", &o->bias[i].id, 1, n_vocab, e);
    for (int i = 0; ok && i < o->n_bad_words; i++) {
        ok = o->bad_words[i].n > 0 || err_set(e, ERR_ARGUMENT, "bad words: number %d is empty", i);
        ok = ok && check_ids("bad words", o->bad_words[i].ids, o->bad_words[i].n, n_vocab, e);
    }
    if (!ok) return false;
    if (o->n_prompt == 0) return err_set(e, ERR_ARGUMENT, "the prompt is empty");
    if (!(o->repetition_penalty >= 0))
        return err_set(e, ERR_ARGUMENT, "repetition_penalty: expected more than 0, found %g",
                       (double)o->repetition_penalty);
    if (o->n_score_ids > TOP_LOGPROBS_MAX || (o->n_score_ids && o->top_logprobs < 0))
        return err_set(e, ERR_ARGUMENT, "scored tokens: at most %d, and with log-probabilities only",
                       TOP_LOGPROBS_MAX);
    if (o->top_logprobs > TOP_LOGPROBS_MAX || o->prompt_logprobs > TOP_LOGPROBS_MAX)
        return err_set(
            e, ERR_ARGUMENT, "at most %d log-probabilities of a token are given, %d were asked for",
            TOP_LOGPROBS_MAX, o->top_logprobs > o->prompt_logprobs ? o->top_logprobs : o->prompt_logprobs);
    return true;
}

/* Pictures that a source becomes. */
static int64_t pictures_of(const struct picture_reader *reader, const char *source)
{
    int64_t n = picture_count_video(reader, source);
    return n ? n : 1;
}

static bool open_video(struct request_picture *to, int64_t n, const struct picture_reader *reader,
                       const char *source, const struct image_limits *limits, struct err *e)
{
    struct picture *pictures = calloc((size_t)n, sizeof *pictures);
    struct patches *patches = calloc((size_t)n, sizeof *patches);
    bool ok = ((pictures && patches) || err_memory(e, "a video", (size_t)n * sizeof *patches)) &&
              picture_open_video(reader, pictures, patches, source, limits, e);
    for (int64_t i = 0; ok && i < n; i++)
        to[i] = (struct request_picture){
            .picture = pictures[i], .patches = patches[i], .is_video = true, .place.goes_on = i + 1 < n
        };
    free(pictures);
    free(patches);
    return ok;
}

static bool identify(struct request_picture *p, const uint8_t salt[32], struct err *e)
{
    uint64_t values = (uint64_t)(p->patches.height * p->patches.width * p->patches.cols);
    p->place.height = p->picture.height;
    p->place.width = p->picture.width;
    return cuts_digest(p->place.digest, p->patches.values, values * sizeof(float), e) &&
           encoder_key(p->key, salt, &p->place, e);
}

static bool open_all(struct request *r, const struct request_options *o, const struct picture_reader *reader,
                     const struct image_limits *limits, struct err *e)
{
    struct request_picture *to = r->pictures;
    for (int i = 0, seen[2] = { 0 }; i < o->n_pictures; i++) {
        const char *source = o->pictures[i];
        bool is_video = picture_count_video(reader, source) > 0;
        int64_t n = pictures_of(reader, source);
        seen[is_video]++;
        if (!(is_video ? open_video(to, n, reader, source, limits, e)
                       : picture_open(reader, &to->picture, &to->patches, source, limits, e)))
            return err_note(e, "%s %d", is_video ? "video" : "image", seen[is_video]);
        for (; n > 0; n--, to++)
            if (!identify(to, o->salt, e)) return false;
    }
    return true;
}

static bool open_pictures(struct request *r, const struct request_options *o, const struct request_maker *m,
                          struct err *e)
{
    struct image_limits limits = m->images ? *m->images : (struct image_limits){ 0 };
    int64_t n = 0;
    limits.until = clock_seconds() + IMAGE_SECONDS; /* of all of them together */
    if (o->n_pictures == 0) return true;
    if (!m->reader) return err_set(e, ERR_UNSUPPORTED, "images are not taken here");
    for (int i = 0; i < o->n_pictures; i++) n += pictures_of(m->reader, o->pictures[i]);
    r->pictures = calloc((size_t)n, sizeof *r->pictures);
    if (!r->pictures) return err_memory(e, "images", (size_t)n * sizeof *r->pictures);
    r->n_pictures = (int)n;
    return open_all(r, o, m->reader, &limits, e);
}

/* Typed into a prompt without such a picture, the token stays an ordinary one. */
static struct place_tokens place_tokens_of(const struct request *r, const struct config *c)
{
    struct place_tokens t = { -1, -1 };
    for (int i = 0; i < r->n_pictures; i++)
        if (r->pictures[i].is_video)
            t.video = c->video_token;
        else
            t.image = c->image_token;
    return t;
}

/* Where the pictures stand among the rows. */
static bool find_places(struct request *r, struct place_tokens tokens, struct err *e)
{
    int64_t row = 0;
    for (int64_t i = 0, n = 0; n < r->n_pictures; i++, row++) {
        struct request_picture *p = &r->pictures[n];
        if (!place_tokens_have(tokens, r->o.prompt[i])) continue;
        if (r->o.prompt[i] != (p->is_video ? tokens.video : tokens.image))
            return err_set(e, ERR_ARGUMENT, "the prompt has images and videos in another order than given");
        p->place.first = row;
        row += p->place.height * p->place.width - 1;
        r->usage.picture_tokens += p->place.height * p->place.width;
        n++;
    }
    return true;
}

/* The rows, those of pictures without what the tower will make of them. */
static bool make_rows(struct request *r, const struct model *m, struct err *e)
{
    struct place_tokens tokens = place_tokens_of(r, m->config);
    struct picture *all = calloc((size_t)r->n_pictures + 1, sizeof *all);
    if (!all) return err_memory(e, "images", (size_t)r->n_pictures * sizeof *all);
    for (int i = 0; i < r->n_pictures; i++) all[i] = r->pictures[i].picture;
    bool ok = prompt_create(&r->prompt, r->o.prompt, r->o.n_prompt, tokens, all, r->n_pictures, 0, e) &&
              find_places(r, tokens, e);
    free(all);
    return ok;
}

static bool make_cuts(struct request *r, const struct cut_rules *rules, struct err *e)
{
    struct cut_picture *places = calloc((size_t)r->n_pictures + 1, sizeof *places);
    if (!places) return err_memory(e, "images", (size_t)r->n_pictures * sizeof *places);
    for (int i = 0; i < r->n_pictures; i++) places[i] = r->pictures[i].place;
    bool ok = cuts_make(&r->cuts, rules, &r->prompt, places, r->n_pictures, r->o.salt, e);
    free(places);
    return ok;
}

static bool find_room(struct request *r, int64_t limit, struct err *e)
{
    int64_t room = limit - r->prompt.n, asked = r->o.max_tokens;
    if (room < (asked != 0))
        return err_set(e, ERR_LIMIT, "the prompt has %lld tokens, the context is %lld with the answer",
                       (long long)r->prompt.n, (long long)limit);
    r->most = asked < 0 || asked > room ? room : asked;
    return true;
}

static bool create(struct request *r, const struct request_options *o, const struct request_maker *maker,
                   struct err *e)
{
    int64_t vocab = maker->model->config->vocab_size;
    if (!check(o, vocab, e)) return false;
    copy_options(r, o, &r->memory);
    if (!arena_back(&r->memory, "a request", e)) return false;
    copy_options(r, o, &r->memory);
    qsort((void *)(uintptr_t)r->o.allowed, (size_t)r->o.n_allowed, sizeof *r->o.allowed, by_id);
    join_bias(&r->o);
    return open_pictures(r, o, maker, e) && make_rows(r, maker->model, e) && find_room(r, maker->limit, e) &&
           make_cuts(r, &maker->rules, e) && logits_rules_init(&r->rules, &r->o, vocab, e);
}

static void destroy(struct request *r)
{
    struct constraint *c = r->o.constraint;
    if (c && c->free) c->free(c->state);
    logits_rules_deinit(&r->rules);
    prompt_free(&r->prompt);
    for (int i = 0; i < r->n_pictures; i++) {
        picture_free(&r->pictures[i].picture);
        patches_free(&r->pictures[i].patches);
    }
    free(r->pictures);
    cuts_free(&r->cuts);
    parcel_free(r->parcel);
    parcel_free(r->fetched);
    arena_free(&r->memory);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

bool request_create(struct request **out, const struct request_options *o, const struct request_maker *maker,
                    struct err *e)
{
    struct constraint *c = o->constraint;
    struct request *r = *out = calloc(1, sizeof *r);
    if (!r || (errno = pthread_mutex_init(&r->lock, NULL)) != 0) {
        if (c && c->free) c->free(c->state);
        free(r);
        *out = NULL;
        return err_memory(e, "a request", sizeof *r);
    }
    r->o.constraint = c;
    r->handle = -1;
    r->submitted = clock_seconds();
    if (create(r, o, maker, e)) {
        r->usage.prompt_tokens = r->prompt.n;
        return true;
    }
    destroy(r);
    *out = NULL;
    return false;
}

void request_let_go(struct request *r)
{
    pthread_mutex_lock(&r->lock);
    int left = --r->holders;
    pthread_mutex_unlock(&r->lock);
    if (left <= 0) destroy(r);
}

/* What the caller does with it. */

int request_take(struct request *r, struct request_event *out, int most)
{
    pthread_mutex_lock(&r->lock);
    int n = r->ring_n < most ? r->ring_n : most;
    for (int i = 0; i < n; i++) out[i] = r->ring[(r->ring_first + i) % r->ring_size];
    r->ring_first = (r->ring_first + n) % r->ring_size;
    r->ring_n -= n;
    if (r->blocked && n > 0) {
        r->blocked = false;
        if (r->inbox) inbox_ring(r->inbox);
    }
    pthread_mutex_unlock(&r->lock);
    return n;
}

void request_usage(const struct request *request, struct request_usage *out)
{
    struct request *r = (struct request *)(uintptr_t)request; /* for the lock */
    pthread_mutex_lock(&r->lock);
    *out = r->usage;
    pthread_mutex_unlock(&r->lock);
}

const char *request_error(const struct request *request)
{
    struct request *r = (struct request *)(uintptr_t)request;
    pthread_mutex_lock(&r->lock);
    const char *text = r->inbox ? "" : r->error.text; /* once finished it does not change */
    pthread_mutex_unlock(&r->lock);
    return text;
}

void request_cancel(struct request *r)
{
    pthread_mutex_lock(&r->lock);
    r->cancelled = true;
    if (r->inbox) inbox_ring(r->inbox);
    pthread_mutex_unlock(&r->lock);
}

void request_free(struct request *r)
{
    if (!r) return;
    request_cancel(r);
    request_let_go(r);
}

/* What the scheduler does with it. */

bool request_is_cancelled(struct request *r)
{
    pthread_mutex_lock(&r->lock);
    bool is = r->cancelled;
    pthread_mutex_unlock(&r->lock);
    return is;
}

int request_room(struct request *r, int needed)
{
    pthread_mutex_lock(&r->lock);
    int room = r->ring_size - 1 - r->ring_n; /* one is for the end */
    r->blocked = room < needed;
    pthread_mutex_unlock(&r->lock);
    return room;
}

static void post_locked(struct request *r, const struct request_event *event)
{
    assert(r->ring_n < r->ring_size);
    r->ring[(r->ring_first + r->ring_n++) % r->ring_size] = *event;
}

void request_post(struct request *r, const struct request_event *event)
{
    pthread_mutex_lock(&r->lock);
    post_locked(r, event);
    r->usage.answer_tokens += event->kind == REQUEST_TOKEN;
    pthread_mutex_unlock(&r->lock);
}

void request_finish(struct request *r, enum request_finish finish)
{
    r->is_over = true;
    r->last = (struct request_event){ .kind = REQUEST_FINISHED, .finish = finish, .stop_token = -1 };
}

void request_end(struct request *r)
{
    pthread_mutex_lock(&r->lock);
    post_locked(r, &r->last);
    r->inbox = NULL;
    pthread_mutex_unlock(&r->lock);
}

/* Requests that wait. */

bool request_before(const struct request *a, const struct request *b)
{
    if (a->o.priority != b->o.priority) return a->o.priority < b->o.priority;
    if (a->round != b->round) return a->round < b->round;
    return a->number < b->number;
}

static void insert(struct waiting *w, struct request *r)
{
    r->next = w->first;
    w->first = r;
    w->n++;
    w->tokens += r->prompt.n;
}

/* An owner's next request has its turn one round after the one it has waiting already, at the earliest in the
 * round that is being served: so who submits much gets a turn a round like everybody. */
void waiting_add(struct waiting *w, struct request *r)
{
    r->number = w->arrivals++;
    r->round = w->round;
    for (const struct request *x = w->first; x; x = x->next)
        if (x->o.owner == r->o.owner && x->o.priority == r->o.priority && x->round >= r->round)
            r->round = x->round + 1;
    insert(w, r);
}

void waiting_add_again(struct waiting *w, struct request *r)
{
    insert(w, r);
}

struct request *waiting_best(const struct waiting *w)
{
    struct request *best = NULL;
    for (struct request *r = w->first; r; r = r->next)
        if (!r->fetching && (!best || request_before(r, best))) best = r;
    return best;
}

void waiting_remove(struct waiting *w, struct request *r)
{
    struct request **at = &w->first;
    while (*at != r) at = &(*at)->next;
    *at = r->next;
    r->next = NULL;
    w->n--;
    w->tokens -= r->prompt.n;
    if (r->round > w->round) w->round = r->round;
}
