/* Requests through the scheduler against the same requests alone: tokens, log-probabilities to the bit,
 * whatever else runs, however drafts turn out, whatever is cached. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/clock.h"
#include "engine/generate.h"
#include "engine/scheduler.h"
#include "support/models.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 1024, ANSWER_MOST = 128, PROMPT_MOST = 1024, IM_END = 2024, NEWLINE = 198 };

struct fixture {
    struct loaded loaded;
    struct tokenizer *tokenizer;
    struct engine *engine;
    struct scheduler *scheduler;
    pthread_mutex_t lock;
    pthread_cond_t news;
    int64_t wakes;
};

static void wake(void *ctx)
{
    struct fixture *f = ctx;
    pthread_mutex_lock(&f->lock);
    f->wakes++;
    pthread_cond_broadcast(&f->news);
    pthread_mutex_unlock(&f->lock);
}

static int64_t wakes(struct fixture *f)
{
    pthread_mutex_lock(&f->lock);
    int64_t n = f->wakes;
    pthread_mutex_unlock(&f->lock);
    return n;
}

static void await(struct fixture *f, int64_t seen)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 60;
    pthread_mutex_lock(&f->lock);
    int late = 0;
    while (f->wakes == seen && !late) late = pthread_cond_timedwait(&f->news, &f->lock, &until);
    pthread_mutex_unlock(&f->lock);
    if (late) fail_msg("no news from the scheduler in a minute");
}

static void load(struct fixture *f)
{
    struct err e = { 0 };
    *f = (struct fixture){ .lock = PTHREAD_MUTEX_INITIALIZER, .news = PTHREAD_COND_INITIALIZER };
    load_model(&f->loaded, "models/demo", &(struct backend_options){ .device = DEVICE_CPU, .threads = 2 });
    must(model_bind_mtp(&f->loaded.model, true, &e), &e);
    must(tokenizer_load(&f->tokenizer, "models/demo", &e), &e);
}

static void unload(struct fixture *f)
{
    tokenizer_free(f->tokenizer);
    unload_model(&f->loaded);
}

static void start(struct fixture *f, struct engine_options g, struct scheduler_options o)
{
    struct err e = { 0 };
    if (!g.context) g.context = CONTEXT;
    if (!g.sequences) g.sequences = 16;
    must(engine_create(&f->engine, &f->loaded.model, &g, &e), &e);
    o.engine = f->engine;
    o.model = &f->loaded.model;
    o.ctx = f;
    o.wake = wake;
    must(scheduler_create(&f->scheduler, &o, &e), &e);
}

static void stop(struct fixture *f)
{
    scheduler_free(f->scheduler);
    engine_free(f->engine);
}

/* A small generator: the tests' choices repeat. */
static uint64_t random_state = 1;
static int64_t random_below(int64_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((random_state >> 33) % (uint64_t)n);
}

static struct request_options plain(const int32_t *prompt, int64_t n, int64_t most)
{
    return (struct request_options){ .prompt = prompt,
                                     .n_prompt = n,
                                     .max_tokens = most,
                                     .top_logprobs = 3,
                                     .prompt_logprobs = -1,
                                     .constraint_after = -1,
                                     .thinking_budget = -1 };
}

/* What came of a request. */
struct answer {
    struct request *request;
    struct request_event tokens[ANSWER_MOST], prompt[PROMPT_MOST];
    int n, n_prompt;
    bool finished;
    enum request_finish finish;
    int32_t stop_token;
    struct request_usage usage;
};

static void submit(struct fixture *f, struct answer *a, const struct request_options *o)
{
    struct err e = { 0 };
    *a = (struct answer){ 0 };
    must(scheduler_submit(f->scheduler, &a->request, o, &e), &e);
}

/* Takes what there is; frees the request after its last event. */
static void pump(struct answer *a, int most)
{
    struct request_event events[16];
    int n;
    while (a->request && !a->finished && (n = request_take(a->request, events, most < 16 ? most : 16)) > 0)
        for (int i = 0; i < n; i++) {
            assert_false(a->finished);
            if (events[i].kind == REQUEST_TOKEN) {
                assert_true(a->n < ANSWER_MOST);
                a->tokens[a->n++] = events[i];
            } else if (events[i].kind == REQUEST_PROMPT) {
                a->prompt[a->n_prompt++] = events[i];
            } else {
                a->finished = true;
                a->finish = events[i].finish;
                a->stop_token = events[i].stop_token;
            }
        }
    if (!a->request || !a->finished) return;
    request_usage(a->request, &a->usage);
    assert_int_equal(a->usage.answer_tokens, a->n);
    if (a->finish == FINISHED_ERROR) assert_true(request_error(a->request)[0]);
    request_free(a->request);
    a->request = NULL;
}

static void finish_all(struct fixture *f, struct answer *a, int n)
{
    for (int left = n; left > 0;) {
        int64_t seen = wakes(f);
        left = 0;
        for (int i = 0; i < n; i++) {
            pump(&a[i], 16);
            left += !a[i].finished;
        }
        if (left) await(f, seen);
    }
}

static void ask(struct fixture *f, struct answer *a, const struct request_options *o)
{
    submit(f, a, o);
    finish_all(f, a, 1);
}

static void same(const struct answer *a, const struct answer *b, const char *what)
{
    if (a->n != b->n || a->finish != b->finish || a->stop_token != b->stop_token)
        fail_msg("%s: %d tokens and %d tokens", what, a->n, b->n);
    assert_int_equal(a->n_prompt, b->n_prompt);
    for (int i = 0; i < a->n; i++)
        if (memcmp(&a->tokens[i], &b->tokens[i], sizeof a->tokens[i]) != 0)
            fail_msg("%s: token %d of %d: %d %.9g and %d %.9g", what, i, a->n, a->tokens[i].token.id,
                     (double)a->tokens[i].token.logprob, b->tokens[i].token.id,
                     (double)b->tokens[i].token.logprob);
    assert_memory_equal(a->prompt, b->prompt, (size_t)a->n_prompt * sizeof a->prompt[0]);
}

static const char text[] =
    "<|im_start|>user\nWhat is the capital of Finland?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>"
    "\n\nThe capital of Finland is Helsinki.<|im_end|>\n<|im_start|>user\nA farmer has 17 sheep and buys 5 "
    "more. How many does he have? Write the sum, then a sentence about sheep, rivers, mountains and the sea, "
    "as a list in JSON with the keys name and "
    "size.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

static struct token_list encode(struct fixture *f, const char *s)
{
    struct token_list list = { 0 };
    struct err e = { 0 };
    must(tokenizer_encode(f->tokenizer, &list, s, strlen(s), 0, &e), &e);
    return list;
}

/* A request of each kind; prompts are parts of one text. */
struct variety {
    struct token_list text;
    struct request_options o[16];
};

static void make_variety(struct fixture *f, struct variety *v)
{
    static const int32_t stops[] = { IM_END };
    static const struct logit_bias bias[] = { { 100, 4 }, { 300, -100 } };
    static const int32_t never[] = { 2023, 2034 }, first[] = { 220 }, second[] = { 11, 220 };
    static const struct token_run bad[] = { { first, 1 }, { second, 2 } };
    static int32_t allowed[500], end[] = { 13, 198 };
    v->text = encode(f, text);
    for (int i = 0; i < 500; i++) allowed[i] = 900 - i;
    for (int i = 0; i < 16; i++) {
        int64_t n = 10 + 11 * i < (int64_t)v->text.n ? 10 + 11 * i : (int64_t)v->text.n;
        struct request_options *o = &v->o[i];
        *o = plain(v->text.ids, n, 12 + 2 * i);
        o->never = never;
        o->n_never = 2;
        if (i % 2) o->sampling = (struct sampling){ 0.9f, i % 3 ? 40 : 0, 0.95f, 0.01f, (uint64_t)i };
        if (i % 4 == 1) o->presence_penalty = 0.7f, o->frequency_penalty = 0.3f;
        if (i % 4 == 2) o->repetition_penalty = 1.3f;
        if (i % 5 == 1) o->bias = bias, o->n_bias = 2;
        if (i % 5 == 2) o->bad_words = bad, o->n_bad_words = 2;
        if (i % 5 == 3) o->allowed = allowed, o->n_allowed = 500;
        if (i % 5 == 4) o->thinking_budget = 5, o->thinking_end = end, o->n_thinking_end = 2;
        if (i % 3 == 0) o->stop_tokens = stops, o->n_stop_tokens = 1;
        if (i % 6 == 0) o->min_tokens = 9;
        if (i % 7 == 3) o->prompt_logprobs = 2;
    }
}

static void the_same_alone_and_among_others(void **state)
{
    (void)state;
    struct fixture f;
    struct variety v;
    struct answer *alone = calloc(16, sizeof *alone), *among = calloc(16, sizeof *among);
    load(&f);
    make_variety(&f, &v);
    for (int drafts = 0; drafts <= 2; drafts++) {
        start(&f, (struct engine_options){ .drafts = drafts, .step_rows = drafts == 1 ? 150 : 0 },
              (struct scheduler_options){ .decode_seconds = drafts == 2 ? 1e-6 : 0 });
        for (int i = 0; drafts == 0 && i < 16; i++) ask(&f, &alone[i], &v.o[i]);
        int64_t accepted = 0;
        for (int round = 0; round < 3; round++) {
            for (int i = 0; i < 16; i++) {
                submit(&f, &among[i], &v.o[i]);
                for (int pause = (int)random_below(3); round && pause > 0; pause--) {
                    int64_t seen = wakes(&f);
                    for (int k = 0; k <= i; k++) pump(&among[k], 16);
                    bool busy = false;
                    for (int k = 0; k <= i; k++) busy |= !among[k].finished;
                    if (busy) await(&f, seen);
                }
            }
            finish_all(&f, among, 16);
            for (int i = 0; i < 16; i++) {
                char what[64];
                snprintf(what, sizeof what, "%d drafts, round %d, request %d", drafts, round, i);
                same(&alone[i], &among[i], what);
                accepted += among[i].usage.accepted;
            }
        }
        assert_true(drafts ? accepted > 100 : accepted == 0);
        struct scheduler_stats stats;
        scheduler_stats(f.scheduler, &stats);
        assert_int_equal(stats.accepted, accepted);
        assert_int_equal(stats.running + stats.waiting, 0);
        stop(&f);
    }
    free(v.text.ids);
    free(alone);
    free(among);
    unload(&f);
}

/* generate() and the engine's own logits are the outside truth. */
static void agrees_with_generate(void **state)
{
    (void)state;
    struct fixture f;
    struct err e = { 0 };
    struct answer a;
    struct generated want;
    load(&f);
    struct token_list t = encode(&f, text);
    start(&f, (struct engine_options){ 0 }, (struct scheduler_options){ 0 });
    struct engine *g;
    must(engine_create(&g, &f.loaded.model, &(struct engine_options){ .context = CONTEXT }, &e), &e);
    for (uint64_t seed = 0; seed < 6; seed++) {
        struct generation o = { .sampling = { seed ? 0.8f : 0, seed % 2 ? 20 : 0, 0.95f, 0, seed },
                                .max_tokens = 40,
                                .stop_tokens = (int32_t[]){ IM_END },
                                .n_stop_tokens = 1 };
        struct request_options r = plain(t.ids, (int64_t)t.n, 40);
        r.sampling = o.sampling;
        r.stop_tokens = o.stop_tokens;
        r.n_stop_tokens = 1;
        r.prompt_logprobs = 0;
        must(generate(&want, g, f.tokenizer, t.ids, (int64_t)t.n, &o, &e), &e);
        ask(&f, &a, &r);
        assert_int_equal(a.n, want.tokens.n);
        for (int i = 0; i < a.n; i++) assert_int_equal(a.tokens[i].token.id, want.tokens.ids[i]);
        assert_int_equal(a.finish, want.finish == FINISH_STOP ? FINISHED_STOP : FINISHED_LENGTH);
        assert_int_equal(a.n_prompt, t.n - 1);
        for (int i = 0; i < a.n_prompt; i++) assert_int_equal(a.prompt[i].token.id, t.ids[i + 1]);
        free(want.tokens.ids);
    }
    engine_free(g);
    free(t.ids);
    stop(&f);
    unload(&f);
}

static void cancelled_at_any_moment(void **state)
{
    (void)state;
    struct fixture f;
    struct variety v;
    struct answer *alone = calloc(16, sizeof *alone), *now = calloc(16, sizeof *now);
    int cancelled = 0;
    load(&f);
    make_variety(&f, &v);
    start(&f, (struct engine_options){ .sequences = 5, .drafts = 2 }, (struct scheduler_options){ 0 });
    for (int i = 0; i < 16; i++) ask(&f, &alone[i], &v.o[i]);
    for (int round = 0; round < 12; round++) {
        for (int i = 0; i < 16; i++) submit(&f, &now[i], &v.o[i]);
        for (int steps = 0; steps < 30; steps++) {
            int i = (int)random_below(16);
            for (int k = 0; k < 16; k++) pump(&now[k], 16);
            if (now[i].request && i % 2) {
                if (i % 4 == 1) {
                    request_free(now[i].request); /* gives up all at once */
                    now[i] = (struct answer){ .finished = true, .finish = FINISHED_CANCELLED };
                } else
                    request_cancel(now[i].request);
                cancelled++;
            }
        }
        finish_all(&f, now, 16);
        for (int i = 0; i < 16; i++) {
            if (now[i].finish == FINISHED_CANCELLED) {
                for (int k = 0; k < now[i].n; k++)
                    assert_int_equal(now[i].tokens[k].token.id, alone[i].tokens[k].token.id);
                assert_true(i % 2);
            } else {
                same(&alone[i], &now[i], "beside cancelled ones");
            }
        }
    }
    assert_true(cancelled > 20);
    free(v.text.ids);
    free(alone);
    free(now);
    stop(&f);
    unload(&f);
}

static void a_slow_reader_holds_up_nobody(void **state)
{
    (void)state;
    struct fixture f;
    struct answer slow, fast, again;
    load(&f);
    struct token_list t = encode(&f, text);
    start(&f, (struct engine_options){ .drafts = 1 }, (struct scheduler_options){ 0 });
    struct request_options o = plain(t.ids, (int64_t)t.n, 120);
    struct request_options scores = plain(t.ids, (int64_t)t.n, 5);
    submit(&f, &slow, &o);
    for (int i = 0; i < 3; i++) {
        ask(&f, &fast, &scores);
        assert_int_equal(fast.n, 5);
    }
    ask(&f, &fast, &o);
    assert_int_equal(fast.n, 120);
    struct request_usage usage;
    request_usage(slow.request, &usage);
    assert_true(usage.answer_tokens < 64); /* the ring is full; nothing was computed beyond it */
    finish_all(&f, &slow, 1);
    ask(&f, &again, &o);
    same(&slow, &again, "slow reader");
    same(&slow, &fast, "fast reader");
    free(t.ids);
    stop(&f);
    unload(&f);
}

static void refusals(void **state)
{
    (void)state;
    struct fixture f;
    struct err e = { 0 };
    struct request *r;
    struct answer a[4];
    static const int32_t big[] = { 5, 2048 };
    load(&f);
    struct token_list t = encode(&f, text);
    start(&f, (struct engine_options){ .context = 64, .sequences = 1 },
          (struct scheduler_options){ .max_queued = 2 });
    struct request_options o = plain(t.ids, 64, 4);
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    assert_non_null(strstr(e.text, "64 tokens"));
    o = plain(big, 2, 4);
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    assert_int_equal(e.code, ERR_ARGUMENT);
    o = plain(t.ids, 0, 4);
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    o = plain(t.ids, 10, 4);
    o.pictures = (const char *const[]){ "nowhere.png" };
    o.n_pictures = 1;
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    assert_non_null(strstr(e.text, "image 1"));
    o = plain(t.ids, 10, -1);
    int taken = 0;
    for (int i = 0; i < 4; i++) { /* one runs, two wait, or three wait for a moment */
        a[i] = (struct answer){ .finished = true };
        if (!scheduler_submit(f.scheduler, &a[i].request, &o, &e)) continue;
        a[i].finished = false;
        taken++;
    }
    assert_int_equal(e.code, ERR_BUSY);
    assert_true(taken == 2 || taken == 3);
    finish_all(&f, a, 4);
    for (int i = 0; i < 4; i++)
        if (a[i].n) assert_int_equal(a[i].n, 54);
    /* no token may come */
    static const int32_t one[] = { 7 };
    o.allowed = o.never = one;
    o.n_allowed = o.n_never = 1;
    ask(&f, &a[0], &o);
    assert_int_equal(a[0].finish, FINISHED_ERROR);
    /* scores only */
    o = plain(t.ids, 64, 0);
    o.prompt_logprobs = 5;
    ask(&f, &a[0], &o);
    assert_int_equal(a[0].finish, FINISHED_LENGTH);
    assert_int_equal(a[0].n, 0);
    assert_int_equal(a[0].n_prompt, 63);
    free(t.ids);
    stop(&f);
    unload(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(agrees_with_generate),
        cmocka_unit_test(the_same_alone_and_among_others),
        cmocka_unit_test(cancelled_at_any_moment),
        cmocka_unit_test(a_slow_reader_holds_up_nobody),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
