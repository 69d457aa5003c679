/* Requests through the scheduler against the same requests alone: tokens, log-probabilities to the bit,
 * whatever else runs, however drafts turn out, whatever is cached. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "engine/generate.h"
#include "engine/logits.h"
#include "support/requests.h"
#include "support/sanitized.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct demo demo;

static const char text[] =
    "<|im_start|>user\nWhat is the capital of Finland?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>"
    "\n\nThe capital of Finland is Helsinki.<|im_end|>\n<|im_start|>user\nA farmer has 17 sheep and buys 5 "
    "more. How many does he have? Write the sum, then a sentence about sheep, rivers, mountains and the sea, "
    "as a list in JSON with the keys name and "
    "size.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

/* A request of each kind; prompts are parts of one text. */
struct variety {
    struct token_list text;
    struct request_options o[16];
};

static void make_variety(struct variety *v)
{
    static const int32_t stops[] = { IM_END };
    static const struct logit_bias bias[] = { { 100, 4 }, { 300, -100 } };
    static const int32_t never[] = { 2023, 2034 }, first[] = { 220 }, second[] = { 11, 220 };
    static const struct token_run bad[] = { { first, 1 }, { second, 2 } };
    static int32_t allowed[500], end[] = { 13, 198 };
    v->text = demo_encode(&demo, text);
    for (int i = 0; i < 500; i++) allowed[i] = 900 - i;
    for (int i = 0; i < 16; i++) {
        int64_t n = 10 + 11 * i < (int64_t)v->text.n ? 10 + 11 * i : (int64_t)v->text.n;
        struct request_options *o = &v->o[i];
        *o = answer_options(v->text.ids, n, 12 + 2 * i);
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
    struct service f;
    struct variety v;
    struct answer *alone = calloc(16, sizeof *alone), *among = calloc(16, sizeof *among);
    make_variety(&v);
    for (int drafts = 0; drafts <= 2; drafts++) {
        service_start(&f, &demo,
                      (struct engine_options){ .drafts = drafts, .step_rows = drafts == 1 ? 150 : 0 },
                      (struct scheduler_options){ .decode_seconds = drafts == 2 ? 1e-6 : 0,
                                                  .fixed_drafts = drafts == 2 });
        for (int i = 0; drafts == 0 && i < 16; i++) answer_ask(&alone[i], &f, &v.o[i]);
        int64_t accepted = 0;
        for (int round = 0; round < rounds(3); round++) {
            for (int i = 0; i < 16; i++) {
                answer_submit(&among[i], &f, &v.o[i]);
                for (int pause = (int)random_below(3); round && pause > 0; pause--) {
                    int64_t seen = service_wakes(&f);
                    for (int k = 0; k <= i; k++) answer_pump(&among[k], 16);
                    bool busy = false;
                    for (int k = 0; k <= i; k++) busy |= !among[k].finished;
                    if (busy) service_await(&f, seen);
                }
            }
            answer_finish_all(among, 16, &f);
            for (int i = 0; i < 16; i++) {
                char what[64];
                snprintf(what, sizeof what, "%d drafts, round %d, request %d", drafts, round, i);
                answer_same(&alone[i], &among[i], what);
                accepted += among[i].usage.accepted;
            }
        }
        assert_true(drafts == 2 ? accepted > rounds(60) : drafts == 1 || accepted == 0);
        struct scheduler_stats stats;
        scheduler_stats(f.scheduler, &stats);
        assert_int_equal(stats.accepted, accepted);
        assert_int_equal(stats.running + stats.waiting, 0);
        service_stop(&f);
    }
    free(v.text.ids);
    free(alone);
    free(among);
}

/* generate() and the engine's own logits are the outside truth. */
static void agrees_with_generate(void **state)
{
    (void)state;
    struct service f;
    struct err e = { 0 };
    struct answer a;
    struct generated want;
    struct token_list t = demo_encode(&demo, text);
    service_start(&f, &demo, (struct engine_options){ 0 }, (struct scheduler_options){ 0 });
    struct engine *g;
    must(engine_create(&g, &demo.loaded.model, &(struct engine_options){ .context = 1024 }, &e), &e);
    for (uint64_t seed = 0; seed < 6; seed++) {
        struct generation o = { .sampling = { seed ? 0.8f : 0, seed % 2 ? 20 : 0, 0.95f, 0, seed },
                                .max_tokens = 40,
                                .stop_tokens = (int32_t[]){ IM_END },
                                .n_stop_tokens = 1 };
        struct request_options r = answer_options(t.ids, (int64_t)t.n, 40);
        r.sampling = o.sampling;
        r.stop_tokens = o.stop_tokens;
        r.n_stop_tokens = 1;
        r.prompt_logprobs = 0;
        must(generate(&want, g, demo.tokenizer, t.ids, (int64_t)t.n, &o, &e), &e);
        answer_ask(&a, &f, &r);
        assert_int_equal(a.n, want.tokens.n);
        for (int i = 0; i < a.n; i++) assert_int_equal(a.tokens[i].token.id, want.tokens.ids[i]);
        assert_int_equal(a.finish, want.finish == FINISH_STOP ? FINISHED_STOP : FINISHED_LENGTH);
        assert_int_equal(a.n_prompt, t.n - 1);
        for (int i = 0; i < a.n_prompt; i++) assert_int_equal(a.prompt[i].token.id, t.ids[i + 1]);
        free(want.tokens.ids);
    }
    engine_free(g);
    free(t.ids);
    service_stop(&f);
}

static void cancelled_at_any_moment(void **state)
{
    (void)state;
    struct service f;
    struct variety v;
    struct answer *alone = calloc(16, sizeof *alone), *now = calloc(16, sizeof *now);
    int cancelled = 0;
    make_variety(&v);
    service_start(&f, &demo, (struct engine_options){ .sequences = 5, .drafts = 2 },
                  (struct scheduler_options){ .fixed_drafts = true });
    for (int i = 0; i < 16; i++) answer_ask(&alone[i], &f, &v.o[i]);
    for (int round = 0; round < rounds(8); round++) {
        for (int i = 0; i < 16; i++) answer_submit(&now[i], &f, &v.o[i]);
        for (int steps = 0; steps < 30; steps++) {
            int i = (int)random_below(16);
            for (int k = 0; k < 16; k++) answer_pump(&now[k], 16);
            if (now[i].request && i % 2) {
                if (i % 4 == 1) {
                    request_free(now[i].request); /* gives up all at once */
                    now[i] = (struct answer){ .finished = true, .finish = FINISHED_CANCELLED };
                } else
                    request_cancel(now[i].request);
                cancelled++;
            }
        }
        answer_finish_all(now, 16, &f);
        for (int i = 0; i < 16; i++) {
            if (now[i].finish == FINISHED_CANCELLED) {
                for (int k = 0; k < now[i].n; k++)
                    assert_int_equal(now[i].tokens[k].token.id, alone[i].tokens[k].token.id);
                assert_true(i % 2);
            } else {
                answer_same(&alone[i], &now[i], "beside cancelled ones");
            }
        }
    }
    assert_true(cancelled > rounds(12));
    free(v.text.ids);
    free(alone);
    free(now);
    service_stop(&f);
}

static void a_slow_reader_holds_up_nobody(void **state)
{
    (void)state;
    struct service f;
    struct answer slow, fast, again;
    struct token_list t = demo_encode(&demo, text);
    service_start(&f, &demo, (struct engine_options){ .drafts = 1 },
                  (struct scheduler_options){ .fixed_drafts = true });
    struct request_options o = answer_options(t.ids, (int64_t)t.n, 120);
    struct request_options scores = answer_options(t.ids, (int64_t)t.n, 5);
    answer_submit(&slow, &f, &o);
    for (int i = 0; i < 3; i++) {
        answer_ask(&fast, &f, &scores);
        assert_int_equal(fast.n, 5);
    }
    answer_ask(&fast, &f, &o);
    assert_int_equal(fast.n, 120);
    struct request_usage usage;
    request_usage(slow.request, &usage);
    assert_true(usage.answer_tokens < 64); /* the ring is full; nothing was computed beyond it */
    answer_finish_all(&slow, 1, &f);
    answer_ask(&again, &f, &o);
    answer_same(&slow, &again, "slow reader");
    answer_same(&slow, &fast, "fast reader");
    free(t.ids);
    service_stop(&f);
}

static void refusals(void **state)
{
    (void)state;
    struct service f;
    struct err e = { 0 };
    struct request *r;
    struct answer a[4];
    static const int32_t big[] = { 5, 2048 };
    struct token_list t = demo_encode(&demo, text);
    service_start(&f, &demo, (struct engine_options){ .context = 64, .sequences = 1 },
                  (struct scheduler_options){ .max_queued = 2 });
    struct request_options o = answer_options(t.ids, 64, 4);
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    assert_non_null(strstr(e.text, "64 tokens"));
    o = answer_options(big, 2, 4);
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    assert_int_equal(e.code, ERR_ARGUMENT);
    o = answer_options(t.ids, 0, 4);
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    o = answer_options(t.ids, 10, 4);
    o.pictures = (const char *const[]){ "nowhere.png" };
    o.n_pictures = 1;
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    assert_non_null(strstr(e.text, "image 1"));
    o = answer_options(t.ids, 10, -1);
    int taken = 0;
    for (int i = 0; i < 4; i++) { /* one runs, two wait, or three wait for a moment */
        a[i] = (struct answer){ .finished = true };
        if (!scheduler_submit(f.scheduler, &a[i].request, &o, &e)) continue;
        a[i].finished = false;
        taken++;
    }
    assert_int_equal(e.code, ERR_BUSY);
    assert_true(taken == 2 || taken == 3);
    answer_finish_all(a, 4, &f);
    for (int i = 0; i < 4; i++)
        if (a[i].n) assert_int_equal(a[i].n, 54);
    /* no token may come */
    static const int32_t one[] = { 7 };
    o.allowed = o.never = one;
    o.n_allowed = o.n_never = 1;
    answer_ask(&a[0], &f, &o);
    assert_int_equal(a[0].finish, FINISHED_ERROR);
    /* scores only */
    o = answer_options(t.ids, 64, 0);
    o.prompt_logprobs = 5;
    answer_ask(&a[0], &f, &o);
    assert_int_equal(a[0].finish, FINISHED_LENGTH);
    assert_int_equal(a[0].n, 0);
    assert_int_equal(a[0].n_prompt, 63);
    free(t.ids);
    service_stop(&f);
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
    struct request_options o = answer_options(prompt, 4, STEPS);
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
    struct service f;
    struct answer a, plain_answer;
    static const int32_t end[] = { 50, 60, 71 };
    struct token_list t = demo_encode(&demo, text);
    for (int drafts = 0; drafts <= 2; drafts++) {
        service_start(&f, &demo, (struct engine_options){ .drafts = drafts },
                      (struct scheduler_options){ .fixed_drafts = true });
        for (int after = 0; after < 2; after++) {
            struct by_turns turns = { { &turns, mask_turns, advance_turns, free_turns }, 0, 0 };
            struct request_options o = answer_options(t.ids, 50, 60);
            o.sampling = (struct sampling){ .temperature = 1, .seed = 5 };
            answer_ask(&plain_answer, &f, &o);
            o.constraint = &turns.c;
            if (after) { /* thinks freely for 6 tokens, then is made to stop, then is bound */
                o.thinking_budget = 6;
                o.thinking_end = end;
                o.n_thinking_end = 3;
                o.constraint_after = 71;
            }
            answer_ask(&a, &f, &o);
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
        service_stop(&f);
    }
    free(t.ids);
}

/* Greedy or not, with rules or without, what is not known never comes; where the likeliest is known, nothing
 * changes. */
static void unknown_tokens_never_come(void **state)
{
    (void)state;
    struct service f;
    struct answer a, all;
    uint32_t known[2048 / 32];
    struct token_list t = demo_encode(&demo, text);
    for (int kind = 0; kind < 4; kind++) {
        struct request_options o = answer_options(t.ids, 70, 40);
        if (kind & 1) o.sampling = (struct sampling){ 1, kind == 1 ? 20 : 0, 0, 0, 8 };
        if (kind & 2) o.presence_penalty = 0.5f;
        if (kind == 0) o.top_logprobs = -1;
        service_start(&f, &demo, (struct engine_options){ .drafts = 1 },
                      (struct scheduler_options){ .fixed_drafts = true });
        answer_ask(&all, &f, &o);
        service_stop(&f);
        int missing = all.tokens[3].token.id;
        memset(known, 0xff, sizeof known);
        known[missing / 32] &= ~(1u << missing % 32);
        service_start(&f, &demo, (struct engine_options){ .drafts = 1 },
                      (struct scheduler_options){ .known = known, .fixed_drafts = true });
        answer_ask(&a, &f, &o);
        assert_int_equal(a.n, 40);
        for (int i = 0; i < a.n; i++) assert_int_not_equal(a.tokens[i].token.id, missing);
        for (int i = 0; kind == 0 && i < 3 && all.tokens[i].token.id != missing; i++)
            assert_int_equal(a.tokens[i].token.id, all.tokens[i].token.id);
        service_stop(&f);
    }
    free(t.ids);
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
    struct service f;
    struct answer *a = calloc(6, sizeof *a);
    struct err e = { 0 };
    struct request *r;
    struct scheduler_stats stats;
    struct token_list t = demo_encode(&demo, text);
    const struct ops *whole = demo.loaded.backend.ops;
    struct ops broken = *whole;
    real_wait = broken.wait;
    broken.wait = failing_wait;
    waits_left = 1 << 20;
    demo.loaded.backend.ops = &broken;
    service_start(&f, &demo, (struct engine_options){ .sequences = 3 }, (struct scheduler_options){ 0 });
    waits_left = 30; /* the thread sleeps until the first request */
    struct request_options o = answer_options(t.ids, 40, 100);
    for (int i = 0; i < 6; i++) {
        a[i] = (struct answer){ .finished = true };
        if (scheduler_submit(f.scheduler, &a[i].request, &o, &e)) a[i].finished = false;
    }
    answer_finish_all(a, 6, &f);
    for (int i = 0; i < 6; i++)
        if (a[i].usage.prompt_tokens) assert_int_equal(a[i].finish, FINISHED_ERROR);
    assert_false(scheduler_submit(f.scheduler, &r, &o, &e));
    assert_int_equal(e.code, ERR_IO);
    scheduler_stats(f.scheduler, &stats);
    assert_true(stats.failed);
    service_stop(&f);
    demo.loaded.backend.ops = whole;
    free(t.ids);
    free(a);
}

/* Few pages: the youngest go to host memory and come back with the same bits. */
static void preempted_ones_go_on_with_the_same_bits(void **state)
{
    (void)state;
    struct service f;
    struct variety v;
    struct answer *alone = calloc(16, sizeof *alone), *now = calloc(16, sizeof *now);
    make_variety(&v);
    for (int i = 0; i < 16; i++)
        if (v.o[i].max_tokens > 1 && i % 3) v.o[i].max_tokens = 120;
    for (int drafts = 0; drafts <= 2; drafts += 2) {
        service_start(
            &f, &demo,
            (struct engine_options){
                .context = 384, .sequences = 8, .pages = 10, .drafts = drafts, .snapshots = drafts },
            (struct scheduler_options){ 0 });
        for (int i = 0; drafts == 0 && i < 16; i++) answer_ask(&alone[i], &f, &v.o[i]);
        for (int round = 0; round < rounds(3); round++) {
            for (int i = 0; i < 16; i++) {
                v.o[i].priority = round == 1 ? i % 3 : 0;
                answer_submit(&now[i], &f, &v.o[i]);
            }
            answer_finish_all(now, 16, &f);
            for (int i = 0; i < 16; i++) answer_same(&alone[i], &now[i], "with few pages");
        }
        struct scheduler_stats stats;
        scheduler_stats(f.scheduler, &stats);
        printf("note: %d drafts: preempted %d times\n", drafts, (int)stats.preemptions);
        assert_true(stats.preemptions > 2);
        assert_int_equal(stats.pages, 10);
        if (drafts == 0) assert_int_equal(stats.pages_used, 0);
        service_stop(&f);
    }
    free(v.text.ids);
    free(alone);
    free(now);
}

/* Notes on the scheduler's thread which request's token was drawn. */
struct noted {
    struct constraint c;
    int id, *order, *n;
};

static void mask_nothing(void *state, uint32_t *mask, int64_t n_vocab)
{
    (void)state, (void)mask, (void)n_vocab;
}

static bool note_token(void *state, int32_t id)
{
    const struct noted *x = state;
    (void)id;
    x->order[(*x->n)++] = x->id;
    return true;
}

static void await_token(struct service *f, struct answer *a)
{
    for (struct request_usage usage = { 0 }; usage.answer_tokens == 0;) {
        int64_t seen = service_wakes(f);
        request_usage(a->request, &usage);
        if (usage.answer_tokens == 0) service_await(f, seen);
    }
}

/* One sequence, so requests come one after the other: the urgent ones at once, of the others each owner one
 * in turn. */
static void turns(void **state)
{
    (void)state;
    enum { N = 12 };
    static const int want[N] = { 9, 10, 11, 0, 6, 1, 7, 2, 8, 3, 4, 5 };
    struct service f;
    struct answer *a = calloc(N, sizeof *a), first;
    struct noted noted[N];
    struct scheduler_stats stats;
    int order[2 * N], n = 0;
    struct token_list t = demo_encode(&demo, text);
    service_start(&f, &demo, (struct engine_options){ .sequences = 1 }, (struct scheduler_options){ 0 });
    struct request_options o = answer_options(t.ids, 60, 120);
    answer_submit(&first, &f, &o); /* its ring fills, so it holds the sequence until it is read */
    await_token(&f, &first);
    o.max_tokens = 2;
    for (int i = 0; i < N; i++) { /* six of owner 1, three of owner 2, three urgent ones of owner 1 */
        noted[i] = (struct noted){ { &noted[i], mask_nothing, note_token, NULL }, i, order, &n };
        o.constraint = &noted[i].c;
        o.owner = i < 6 || i >= 9 ? 1 : 2;
        o.priority = i >= 9 ? -1 : 0;
        answer_submit(&a[i], &f, &o);
    }
    answer_finish_all(a + 9, 3, &f); /* they need not wait for the first one's reader */
    scheduler_stats(f.scheduler, &stats);
    assert_true(stats.preemptions >= 1);
    assert_false(first.finished);
    answer_finish_all(&first, 1, &f);
    answer_finish_all(a, N, &f);
    assert_int_equal(n, 2 * N);
    for (int i = 0; i < 2 * N; i++) assert_int_equal(order[i], want[i / 2]);
    free(t.ids);
    free(a);
    service_stop(&f);
}

/* Rows of steps, by looking at what is embedded. */
static int64_t most_rows;
static void (*real_embed)(struct queue *q, struct mat y, const struct weight *table,
                          const struct step_rows *rows);
static void counting_embed(struct queue *q, struct mat y, const struct weight *table,
                           const struct step_rows *rows)
{
    if (rows->n > most_rows) most_rows = rows->n;
    real_embed(q, y, table, rows);
}

/* A request that comes when another one's answer has four tokens. */
struct arriving {
    struct constraint c;
    int n;
    struct answer *a;
    struct service *f;
    const struct request_options *o;
};

static bool arrive(void *state, int32_t id)
{
    struct arriving *x = state;
    (void)id;
    if (++x->n != 4) return true;
    most_rows = 0;
    answer_submit(x->a, x->f, x->o);
    return true;
}

/* Beside a stream a prompt comes in pieces as large as the time between two tokens allows. */
static void prompts_come_in_pieces_beside_a_stream(void **state)
{
    (void)state;
    enum { LONG = 900 };
    struct ops counting = *demo.loaded.backend.ops;
    const struct ops *whole = demo.loaded.backend.ops;
    real_embed = counting.embed;
    counting.embed = counting_embed;
    demo.loaded.backend.ops = &counting;
    struct token_list t = demo_encode(&demo, text);
    int32_t *ids = malloc(LONG * sizeof *ids);
    for (int i = 0; i < LONG; i++) ids[i] = t.ids[i % (int)t.n];
    for (int patient = 0; patient < 2; patient++) {
        struct service f;
        struct answer first, stream, late;
        service_start(&f, &demo, (struct engine_options){ .step_rows = 1000 },
                      (struct scheduler_options){ .decode_seconds = patient ? 1000 : 1e-6 });
        struct request_options o = answer_options(ids, LONG, 1), s = answer_options(t.ids, 20, 60);
        answer_ask(&first, &f, &o); /* tells what a prompt's row takes */
        struct arriving arriving = { { &arriving, mask_nothing, arrive, NULL }, 0, &late, &f, &o };
        s.constraint = &arriving.c;
        answer_ask(&stream, &f, &s);
        answer_finish_all(&late, 1, &f);
        answer_same(&late, &first, "beside a stream");
        if (patient)
            assert_int_equal(most_rows, LONG + !engine_few_differ(f.engine));
        else
            assert_in_range(most_rows, 2,
                            97); /* the least that a prompt may be divided into, and the stream's */
        service_stop(&f);
    }
    demo.loaded.backend.ops = whole;
    free(ids);
    free(t.ids);
}

/* Four at once that begin alike: one of them computes what they share. */
static void what_is_shared_is_computed_once(void **state)
{
    (void)state;
    struct service f;
    struct answer *a = calloc(4, sizeof *a), *alone = calloc(1, sizeof *alone);
    static const int32_t turn_end[] = { IM_END, NEWLINE };
    struct token_list t = demo_encode(&demo, text);
    service_start(&f, &demo, (struct engine_options){ .snapshots = 8, .drafts = 1 },
                  (struct scheduler_options){ .turn_end = turn_end, .n_turn_end = 2, .interval = 64 });
    struct request_options o[4];
    int64_t cached = 0;
    for (int i = 0; i < 4; i++) {
        o[i] = answer_options(t.ids, (int64_t)t.n - i, 20);
        o[i].sampling = (struct sampling){ 1, 0, 0, 0, (uint64_t)i };
        answer_submit(&a[i], &f, &o[i]);
    }
    answer_finish_all(a, 4, &f);
    for (int i = 0; i < 4; i++) {
        cached += a[i].usage.cached_tokens;
        o[i].no_prefix_cache = true;
        answer_ask(alone, &f, &o[i]);
        answer_same(&a[i], alone, "what is shared");
    }
    assert_int_equal(cached, 3 * (((int64_t)t.n - 4) / 64 * 64));
    free(t.ids);
    free(a);
    free(alone);
    service_stop(&f);
}

static int load(void **state)
{
    (void)state;
    demo_load(&demo);
    return 0;
}

static int unload(void **state)
{
    (void)state;
    demo_unload(&demo);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern */
    const struct CMUnitTest of_threads[] = {
        cmocka_unit_test(the_same_alone_and_among_others),
        cmocka_unit_test(cancelled_at_any_moment),
        cmocka_unit_test(a_slow_reader_holds_up_nobody),
        cmocka_unit_test(a_lost_backend_ends_every_request),
        cmocka_unit_test(preempted_ones_go_on_with_the_same_bits),
        cmocka_unit_test(prompts_come_in_pieces_beside_a_stream),
    };
    if (RACES) return cmocka_run_group_tests(of_threads, load, unload);
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
        cmocka_unit_test(prompts_come_in_pieces_beside_a_stream),
        cmocka_unit_test(what_is_shared_is_computed_once),
    };
    return cmocka_run_group_tests(tests, load, unload);
}
