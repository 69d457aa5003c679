/* Requests through the scheduler against the same requests alone: tokens, log-probabilities to the bit,
 * whatever else runs, however drafts turn out, whatever is cached. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/clock.h"
#include "engine/generate.h"
#include "engine/logits.h"
#include "engine/scheduler.h"
#include "support/models.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 1024, ANSWER_MOST = 128, PROMPT_MOST = 1024, IM_END = 2024, NEWLINE = 198 };

/* Rounds of a test: a sanitizer of threads makes each many times as long. */
static int rounds(int n)
{
#if defined(__SANITIZE_THREAD__)
    return (n + 5) / 6;
#else
    return n;
#endif
}

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
    until.tv_sec += 600;
    pthread_mutex_lock(&f->lock);
    int late = 0;
    while (f->wakes == seen && !late) late = pthread_cond_timedwait(&f->news, &f->lock, &until);
    pthread_mutex_unlock(&f->lock);
    if (late) fail_msg("no news from the scheduler in ten minutes");
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
        for (int round = 0; round < rounds(3); round++) {
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
        assert_true(drafts ? accepted > rounds(60) : accepted == 0);
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
    for (int round = 0; round < rounds(8); round++) {
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
    assert_true(cancelled > rounds(12));
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

/* Rules by their definitions, worked out anew for each row, against what was sampled greedily. */
static void rules_by_definition(void **state)
{
    (void)state;
    enum { VOCAB = 40, STEPS = 60 };
    static const int32_t prompt[] = { 3, 4, 4, 5 }, allowed[] = { 1, 3, 4, 5, 7, 9, 11, 13, 20, 39 },
                         stops[] = { 20 }, never[] = { 9 }, one[] = { 7 }, two[] = { 3, 11 },
                         three[] = { 1, 1, 13 };
    static const struct token_run bad[] = { { one, 1 }, { two, 2 }, { three, 3 } };
    static const struct logit_bias bias[] = { { 13, 1.5f }, { 5, -2 } };
    struct request_options o = plain(prompt, 4, STEPS);
    struct logits_rules l;
    struct err e = { 0 };
    o.presence_penalty = 0.4f;
    o.frequency_penalty = 0.2f;
    o.repetition_penalty = 1.7f;
    o.allowed = allowed, o.n_allowed = 10;
    o.stop_tokens = stops, o.n_stop_tokens = 1;
    o.min_tokens = 10;
    o.never = never, o.n_never = 1;
    o.bad_words = bad, o.n_bad_words = 3;
    o.bias = bias, o.n_bias = 2;
    must(logits_rules_init(&l, &o, VOCAB, &e), &e);
    struct logits_edits rounds[ROUNDS] = { 0 };
    int32_t said[STEPS];
    int banned = 0;
    for (int n = 0; n < STEPS; n++) {
        float logits[VOCAB], want[VOCAB];
        for (int i = 0; i < VOCAB; i++) logits[i] = (float)(random_below(2001) - 1000) / 100;
        for (int i = 0; i < VOCAB; i++) {
            int count = 0;
            bool in_prompt = i >= 3 && i <= 5, ok = false;
            for (int k = 0; k < 10; k++) ok |= allowed[k] == i;
            for (int k = 0; k < n; k++) count += said[k] == i;
            ok = ok && i != 9 && i != 7 && !(i == 20 && n < 10);
            if (i == 11 && n >= 1 && said[n - 1] == 3) ok = false, banned++;
            if (i == 13 && n >= 2 && said[n - 1] == 1 && said[n - 2] == 1) ok = false, banned++;
            float x = logits[i] + (i == 13 ? 1.5f : i == 5 ? -2 : 0);
            if (in_prompt || count) x = x > 0 ? x / 1.7f : x * 1.7f;
            if (count) x -= 0.2f * (float)count + 0.4f;
            want[i] = ok ? x : -INFINITY;
        }
        must(logits_rules_apply(&l, logits, rounds, &e), &e);
        for (int i = 0; i < VOCAB; i++)
            if (logits[i] != want[i])
                fail_msg("token %d of row %d: %g, expected %g", i, n, (double)logits[i], (double)want[i]);
        said[n] = n % 5 == 0 ? 3 : n % 3 ? 1 : 13;
        assert_true(logits_rules_take(&l, said[n]));
    }
    assert_true(banned > 10);
    for (int i = 0; i < ROUNDS; i++) free(rounds[i].items);
    logits_rules_deinit(&l);
}

/* Log-softmax in double, the order by sorting. */
static void scores_by_definition(void **state)
{
    (void)state;
    enum { VOCAB = 300 };
    float x[VOCAB];
    for (int round = 0; round < 50; round++) {
        struct request_event got = { 0 };
        double total = 0;
        int id = (int)random_below(VOCAB), above = 0;
        for (int i = 0; i < VOCAB; i++) x[i] = (float)random_below(200) / 10;
        for (int i = 0; i < VOCAB; i++) total += exp((double)x[i]);
        for (int i = 0; i < VOCAB; i++) above += x[i] > x[id];
        logits_score(&got, x, VOCAB, id, TOP_LOGPROBS_MAX);
        assert_int_equal(got.token.id, id);
        assert_int_equal(got.rank, above + 1);
        assert_true(fabs((double)got.token.logprob - ((double)x[id] - log(total))) < 2e-6);
        assert_int_equal(got.n_top, TOP_LOGPROBS_MAX);
        for (int k = 0; k < got.n_top; k++) {
            int before = 0; /* equals go by id */
            int32_t at = got.top[k].id;
            for (int i = 0; i < VOCAB; i++) before += x[i] > x[at] || (x[i] == x[at] && i < at);
            assert_int_equal(before, k);
            assert_true(fabs((double)got.top[k].logprob - ((double)x[at] - log(total))) < 2e-6);
        }
    }
}

/* Even and odd ids by turns, nine of them. */
struct by_turns {
    struct constraint c;
    int n, freed;
};

static void mask_turns(void *state, uint32_t *mask, int64_t n_vocab)
{
    const struct by_turns *t = state;
    for (int64_t i = 0; i < (n_vocab + 31) / 32; i++) mask[i] &= t->n % 2 ? 0xaaaaaaaau : 0x55555555u;
}

static bool advance_turns(void *state, int32_t id)
{
    struct by_turns *t = state;
    assert_int_equal(id % 2, t->n % 2);
    return ++t->n < 9;
}

static void free_turns(void *state)
{
    ((struct by_turns *)state)->freed++;
}

static void constraints_and_thinking(void **state)
{
    (void)state;
    struct fixture f;
    struct answer a, plain_answer;
    static const int32_t end[] = { 50, 60, 71 };
    load(&f);
    struct token_list t = encode(&f, text);
    for (int drafts = 0; drafts <= 2; drafts++) {
        start(&f, (struct engine_options){ .drafts = drafts }, (struct scheduler_options){ 0 });
        for (int after = 0; after < 2; after++) {
            struct by_turns turns = { { &turns, mask_turns, advance_turns, free_turns }, 0, 0 };
            struct request_options o = plain(t.ids, 50, 60);
            o.sampling = (struct sampling){ .temperature = 1, .seed = 5 };
            ask(&f, &plain_answer, &o);
            o.constraint = &turns.c;
            if (after) { /* thinks freely for 6 tokens, then is made to stop, then is bound */
                o.thinking_budget = 6;
                o.thinking_end = end;
                o.n_thinking_end = 3;
                o.constraint_after = 71;
            }
            ask(&f, &a, &o);
            assert_int_equal(turns.freed, 1);
            assert_int_equal(a.finish, FINISHED_STOP);
            assert_int_equal(a.stop_token, -1);
            assert_int_equal(a.n, after ? 6 + 3 + 9 : 9);
            for (int i = 0; after && i < 6; i++)
                assert_int_equal(a.tokens[i].token.id, plain_answer.tokens[i].token.id);
            for (int i = 0; after && i < 3; i++) assert_int_equal(a.tokens[6 + i].token.id, end[i]);
            static int32_t kept[2][ANSWER_MOST];
            for (int i = 0; i < a.n; i++) {
                if (drafts == 0) kept[after][i] = a.tokens[i].token.id;
                assert_int_equal(kept[after][i], a.tokens[i].token.id);
            }
        }
        stop(&f);
    }
    free(t.ids);
    unload(&f);
}

/* Greedy or not, with rules or without, what is not known never comes; where the likeliest is known, nothing
 * changes. */
static void unknown_tokens_never_come(void **state)
{
    (void)state;
    struct fixture f;
    struct answer a, all;
    uint32_t known[2048 / 32];
    load(&f);
    struct token_list t = encode(&f, text);
    for (int kind = 0; kind < 4; kind++) {
        struct request_options o = plain(t.ids, 70, 40);
        if (kind & 1) o.sampling = (struct sampling){ 1, kind == 1 ? 20 : 0, 0, 0, 8 };
        if (kind & 2) o.presence_penalty = 0.5f;
        if (kind == 0) o.top_logprobs = -1;
        start(&f, (struct engine_options){ .drafts = 1 }, (struct scheduler_options){ 0 });
        ask(&f, &all, &o);
        stop(&f);
        int missing = all.tokens[3].token.id;
        memset(known, 0xff, sizeof known);
        known[missing / 32] &= ~(1u << missing % 32);
        start(&f, (struct engine_options){ .drafts = 1 }, (struct scheduler_options){ .known = known });
        ask(&f, &a, &o);
        assert_int_equal(a.n, 40);
        for (int i = 0; i < a.n; i++) assert_int_not_equal(a.tokens[i].token.id, missing);
        for (int i = 0; kind == 0 && i < 3 && all.tokens[i].token.id != missing; i++)
            assert_int_equal(a.tokens[i].token.id, all.tokens[i].token.id);
        stop(&f);
    }
    free(t.ids);
    unload(&f);
}

/* A backend that is lost after some steps. */
static int waits_left;
static bool (*real_wait)(struct queue *q, struct err *e);
static bool failing_wait(struct queue *q, struct err *e)
{
    if (--waits_left >= 0) return real_wait(q, e);
    return err_set(e, ERR_IO, "the device fell off the bus");
}

static void a_lost_backend_ends_every_request(void **state)
{
    (void)state;
    struct fixture f;
    struct answer *a = calloc(6, sizeof *a);
    struct err e = { 0 };
    struct request *r;
    struct scheduler_stats stats;
    load(&f);
    struct token_list t = encode(&f, text);
    struct ops broken = *f.loaded.backend.ops;
    real_wait = broken.wait;
    broken.wait = failing_wait;
    waits_left = 1 << 20;
    f.loaded.backend.ops = &broken;
    start(&f, (struct engine_options){ .sequences = 3 }, (struct scheduler_options){ 0 });
    waits_left = 30; /* the thread sleeps until the first request */
    struct request_options o = plain(t.ids, 40, 100);
    for (int i = 0; i < 6; i++) {
        a[i] = (struct answer){ .finished = true };
        if (scheduler_submit(f.scheduler, &a[i].request, &o, &e)) a[i].finished = false;
    }
    finish_all(&f, a, 6);
    for (int i = 0; i < 6; i++)
        if (a[i].usage.prompt_tokens) assert_int_equal(a[i].finish, FINISHED_ERROR);
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    assert_int_equal(e.code, ERR_IO);
    scheduler_stats(f.scheduler, &stats);
    assert_true(stats.failed);
    stop(&f);
    free(t.ids);
    free(a);
    unload(&f);
}

/* Few pages: the youngest go to host memory and come back with the same bits. */
static void preempted_ones_go_on_with_the_same_bits(void **state)
{
    (void)state;
    struct fixture f;
    struct variety v;
    struct answer *alone = calloc(16, sizeof *alone), *now = calloc(16, sizeof *now);
    load(&f);
    make_variety(&f, &v);
    for (int i = 0; i < 16; i++)
        if (v.o[i].max_tokens > 1 && i % 3) v.o[i].max_tokens = 120;
    for (int drafts = 0; drafts <= 2; drafts += 2) {
        start(&f,
              (struct engine_options){
                  .context = 384, .sequences = 8, .pages = 10, .drafts = drafts, .snapshots = drafts },
              (struct scheduler_options){ 0 });
        for (int i = 0; drafts == 0 && i < 16; i++) ask(&f, &alone[i], &v.o[i]);
        for (int round = 0; round < rounds(3); round++) {
            for (int i = 0; i < 16; i++) {
                v.o[i].priority = round == 1 ? i % 3 : 0;
                submit(&f, &now[i], &v.o[i]);
            }
            finish_all(&f, now, 16);
            for (int i = 0; i < 16; i++) same(&alone[i], &now[i], "with few pages");
        }
        struct scheduler_stats stats;
        scheduler_stats(f.scheduler, &stats);
        printf("note: %d drafts: preempted %d times\n", drafts, (int)stats.preemptions);
        assert_true(stats.preemptions > 2);
        assert_int_equal(stats.pages, 10);
        if (drafts == 0) assert_int_equal(stats.pages_used, 0);
        stop(&f);
    }
    free(v.text.ids);
    free(alone);
    free(now);
    unload(&f);
}

/* One sequence, so requests come one after the other. */
static void turns(void **state)
{
    (void)state;
    enum { N = 12 };
    struct fixture f;
    struct answer *a = calloc(N, sizeof *a), first;
    int order[N], done = 0;
    load(&f);
    struct token_list t = encode(&f, text);
    start(&f, (struct engine_options){ .sequences = 1 }, (struct scheduler_options){ 0 });
    struct request_options o = plain(t.ids, 60, 120);
    submit(&f, &first, &o); /* its ring fills, so it holds the sequence until it is read */
    o.max_tokens = 2;
    for (int i = 0; i < N; i++) { /* six of owner 1, three of owner 2, three urgent ones of owner 1 */
        o.owner = i < 6 || i >= 9 ? 1 : 2;
        o.priority = i >= 9 ? -1 : 0;
        submit(&f, &a[i], &o);
    }
    bool counted[N] = { false };
    while (done < N) {
        int64_t seen = wakes(&f);
        pump(&first, 16);
        for (int i = 0; i < N; i++) {
            pump(&a[i], 16);
            if (!a[i].finished || counted[i]) continue;
            counted[i] = true;
            order[done++] = i;
        }
        if (done < N) await(&f, seen);
    }
    int place[N];
    for (int i = 0; i < N; i++) place[order[i]] = i;
    for (int i = 0; i < 9; i++)
        for (int k = 9; k < N; k++) assert_true(place[k] < place[i] || a[i].usage.queued_seconds == 0);
    /* of the others each owner has a turn in each of the first rounds: 0 6 1 7 2 8 3 4 5 */
    static const int want[] = { 9, 10, 11, 0, 6, 1, 7, 2, 8, 3, 4, 5 };
    for (int i = 0; i < N; i++) assert_int_equal(order[i], want[i]);
    finish_all(&f, &first, 1);
    free(t.ids);
    free(a);
    stop(&f);
    unload(&f);
}

/* Conversations: each grows from an answer, or branches off where an earlier turn is changed. */
enum { TALKS = 5, TALK_MOST = 600 };
static const char *const shapes[] = { "tests/golden/images/grey.png", "tests/golden/images/cmyk.jpg",
                                      "tests/golden/images/full_colour.jpg" };

struct talk {
    int32_t ids[TALK_MOST + 200];
    int64_t n, rows, turns[64];
    const char *pictures[3];
    int n_turns, n_pictures, pictures_at[64];
};

static void say(struct talk *t, const int32_t *ids, int64_t n)
{
    memcpy(t->ids + t->n, ids, (size_t)n * sizeof *ids);
    t->n += n;
}

static void say_user(struct talk *t, const struct token_list *words)
{
    int64_t n = 5 + random_below(90), from = random_below((int64_t)words->n - n);
    t->turns[t->n_turns] = t->n;
    t->pictures_at[t->n_turns++] = t->n_pictures;
    say(t, (int32_t[]){ 2023, 1000, NEWLINE }, 3);
    if (t->n_pictures < 2 && random_below(4) == 0) {
        t->pictures[t->n_pictures++] = shapes[random_below(3)];
        say(t, (int32_t[]){ 2031, 2034, 2032 }, 3);
    }
    say(t, words->ids + from, n);
    say(t, (int32_t[]){ IM_END, NEWLINE, 2023, 1001, NEWLINE }, 5);
}

static void say_answer(struct talk *t, const struct answer *a)
{
    for (int i = 0; i < a->n; i++) say(t, &a->tokens[i].token.id, 1);
    say(t, (int32_t[]){ IM_END, NEWLINE }, 2);
}

/* The next prompt of a conversation. */
static void go_on(struct talk *t, const struct answer *a, const struct token_list *words)
{
    if (t->n > 0) say_answer(t, a);
    int64_t how = random_below(6);
    if (t->n > TALK_MOST - 120 || (how == 0 && t->n_turns > 1)) { /* back to an earlier turn */
        int turn = (int)random_below(t->n_turns);
        t->n = t->turns[turn];
        t->n_pictures = t->pictures_at[turn];
        t->n_turns = turn;
    }
    say_user(t, words);
}

static void check_histories(struct fixture *f, int n, int drafts, uint64_t host)
{
    struct talk *talks = calloc(TALKS, sizeof *talks);
    struct answer *warm = calloc(TALKS, sizeof *warm), *cold = calloc(1, sizeof *cold);
    struct token_list words = encode(f, text);
    static const int32_t stops[] = { IM_END, 2022 }, never[] = { 2023, 2031, 2032, 2034, 2035 },
                         turn_end[] = { IM_END, NEWLINE };
    start(f, (struct engine_options){ .sequences = 4, .snapshots = 12, .drafts = drafts, .pages = 60 },
          (struct scheduler_options){ .turn_end = turn_end,
                                      .n_turn_end = 2,
                                      .interval = 128,
                                      .host_cache_bytes = host,
                                      .step_tokens = 200 });
    int compared = 0;
    for (int done = 0; done < n; done += TALKS) {
        struct request_options o[TALKS];
        for (int i = 0; i < TALKS; i++) {
            go_on(&talks[i], &warm[i], &words);
            o[i] = plain(talks[i].ids, talks[i].n, 4 + random_below(8));
            o[i].stop_tokens = stops;
            o[i].n_stop_tokens = 2;
            o[i].never = never;
            o[i].n_never = 5;
            o[i].pictures = talks[i].pictures;
            o[i].n_pictures = talks[i].n_pictures;
            o[i].salt[0] = i == 4;
            if (i % 2) o[i].sampling = (struct sampling){ 1, 50, 0.95f, 0, (uint64_t)done };
            submit(f, &warm[i], &o[i]);
        }
        finish_all(f, warm, TALKS);
        for (int i = 0; i < TALKS; i++) {
            char what[64];
            o[i].no_prefix_cache = true;
            ask(f, cold, &o[i]);
            snprintf(what, sizeof what, "history %d, %d drafts, %d of %d cached", done + i, drafts,
                     (int)warm[i].usage.cached_tokens, (int)warm[i].usage.prompt_tokens);
            assert_int_equal(cold->usage.cached_tokens, 0);
            same(&warm[i], cold, what);
            compared++;
        }
    }
    struct scheduler_stats stats;
    scheduler_stats(f->scheduler, &stats);
    printf("note: %d histories, %d drafts, host tier %d MB: %d of %d rows found; %d of %d drafts right\n",
           compared, drafts, (int)(host >> 20), (int)stats.prefix_hits, (int)stats.prefix_queries,
           (int)stats.accepted, (int)stats.drafted);
    if (n >= 50) assert_true(stats.prefix_hits * 4 > stats.prefix_queries);
    stop(f);
    free(words.ids);
    free(talks);
    free(warm);
    free(cold);
}

static void a_known_prefix_changes_no_bit(void **state)
{
    (void)state;
    struct fixture f;
    const char *n = getenv("QUENCH_HISTORIES");
    int most = n ? atoi(n) : rounds(60);
    load(&f);
    for (int drafts = 0; drafts <= 2; drafts += 2) {
        check_histories(&f, most, drafts, 0);
        check_histories(&f, most / 2, drafts, 64 << 20);
    }
    unload(&f);
}

/* Four at once that begin alike: one of them computes what they share. */
static void what_is_shared_is_computed_once(void **state)
{
    (void)state;
    struct fixture f;
    struct answer *a = calloc(4, sizeof *a), *alone = calloc(1, sizeof *alone);
    static const int32_t turn_end[] = { IM_END, NEWLINE };
    load(&f);
    struct token_list t = encode(&f, text);
    start(&f, (struct engine_options){ .snapshots = 8, .drafts = 1 },
          (struct scheduler_options){ .turn_end = turn_end, .n_turn_end = 2, .interval = 64 });
    struct request_options o[4];
    int64_t cached = 0;
    for (int i = 0; i < 4; i++) {
        o[i] = plain(t.ids, (int64_t)t.n - i, 20);
        o[i].sampling = (struct sampling){ 1, 0, 0, 0, (uint64_t)i };
        submit(&f, &a[i], &o[i]);
    }
    finish_all(&f, a, 4);
    for (int i = 0; i < 4; i++) {
        cached += a[i].usage.cached_tokens;
        o[i].no_prefix_cache = true;
        ask(&f, alone, &o[i]);
        same(&a[i], alone, "what is shared");
    }
    assert_int_equal(cached, 3 * (((int64_t)t.n - 4) / 64 * 64));
    free(t.ids);
    free(a);
    free(alone);
    stop(&f);
    unload(&f);
}

int main(int argc, char **argv)
{
    if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(agrees_with_generate),
        cmocka_unit_test(the_same_alone_and_among_others),
        cmocka_unit_test(cancelled_at_any_moment),
        cmocka_unit_test(a_slow_reader_holds_up_nobody),
        cmocka_unit_test(refusals),
        cmocka_unit_test(rules_by_definition),
        cmocka_unit_test(scores_by_definition),
        cmocka_unit_test(constraints_and_thinking),
        cmocka_unit_test(unknown_tokens_never_come),
        cmocka_unit_test(a_lost_backend_ends_every_request),
        cmocka_unit_test(preempted_ones_go_on_with_the_same_bits),
        cmocka_unit_test(turns),
        cmocka_unit_test(what_is_shared_is_computed_once),
        cmocka_unit_test(a_known_prefix_changes_no_bit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
