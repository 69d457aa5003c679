/* The load client below its sockets: streams cut anywhere, moments of arrival, sums against figures that
 * numpy 1.26 gave. With a server: tools/test_clients.py. */
#include "cli/bench_serve.h"
#include "engine/sample.h"
#include "eval/load.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const char CHAT[] =
    ": prompt 1/2\n\n"
    "data: "
    "{\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\r\n\r\n"
    "data: {\"choices\":[{\"delta\":{\"reasoning\":\"Hm \",\"reasoning_content\":\"Hm \"}}]}\n\n"
    "event: "
    "message\ndata:{\"choices\":[{\"delta\":{\"content\":\"\\u00e4\"}}],\"usage\":{\"prompt_tokens\":7,"
    "\"completion_tokens\":2}}\n\n"
    "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"index\":0}]}}]}\n\n"
    "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":4}}\n\n"
    "data: [DONE]\n\n";

static void near(double found, double want, double relative)
{
    if (!(fabs(found - want) <= relative * fabs(want) + 1e-12))
        fail_msg("expected %.17g, found %.17g", want, found);
}

static void any_cut_gives_the_same_answer(void **state)
{
    (void)state;
    size_t all = sizeof CHAT - 1;
    for (size_t cut = 0; cut <= all; cut++)
        for (size_t second = cut; second <= all; second += 29) {
            struct load_answer a = { .start = 10, .prompt_tokens = -1, .output_tokens = -1 };
            struct load_stream s = { 0 };
            struct err e = { 0 };
            bool ok = load_stream_push(&s, &a, CHAT, cut, 11, &e) &&
                      load_stream_push(&s, &a, CHAT + cut, second - cut, 12, &e) &&
                      load_stream_push(&s, &a, CHAT + second, all - second, 14, &e) &&
                      load_stream_end(&s, &a, &e);
            if (!ok) fail_msg("cut at %zu and %zu: %s", cut, second, e.text);
            assert_string_equal(a.text, "Hm \xc3\xa4");
            assert_int_equal(a.prompt_tokens, 8);
            assert_int_equal(a.output_tokens, 4);
            assert_int_equal(a.n_itl, 2);
            near(a.ttft + a.itl[0] + a.itl[1], a.latency, 1e-12);
            assert_true(a.ttft >= 1 && a.latency <= 4);
            load_stream_deinit(&s);
            load_answer_deinit(&a);
        }
}

static void expect_fault(const char *text, const char *want)
{
    struct load_answer a = { .start = 1, .output_tokens = -1 };
    struct load_stream s = { 0 };
    struct err e = { 0 };
    bool ok = load_stream_push(&s, &a, text, strlen(text), 2, &e) && load_stream_end(&s, &a, &e);
    if (ok || !strstr(e.text, want)) fail_msg("expected '%s', found '%s'", want, e.text);
    load_stream_deinit(&s);
    load_answer_deinit(&a);
}

static void faults_are_named(void **state)
{
    (void)state;
    expect_fault("data: {\"error\":{\"message\":\"out of pages\"}}\n\n", "in the stream: out of pages");
    expect_fault("data: {\"error\":{}}\n\n", "an error without a message");
    expect_fault("data: {\"choices\":\n\n", "an event of the stream");
    expect_fault("data: {\"choices\":[{\"text\":\"a\"}]}\n\n", "without a finish_reason");
    expect_fault("data: [DONE]\n\n", "has no token");
    expect_fault("data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"stop\"}]}\n\n", "has no token");
    expect_fault("<html>", "without a finish_reason");
    expect_fault("", "without a finish_reason");
}

/* Bytes of a true stream, changed at random: never more than a sentence. */
static void noise_is_survived(void **state)
{
    (void)state;
    uint64_t counter = 0;
    for (int round = 0; round < 20000; round++) {
        char text[sizeof CHAT];
        struct load_answer a = { .start = 1 };
        struct load_stream s = { 0 };
        struct err e = { 0 };
        memcpy(text, CHAT, sizeof CHAT);
        for (int k = 0; k < 3; k++) {
            size_t at = (size_t)(sample_uniform(1, counter++) * (sizeof CHAT - 1));
            text[at] = (char)(sample_uniform(1, counter++) * 256);
        }
        size_t cut = (size_t)(sample_uniform(1, counter++) * sizeof CHAT);
        if (load_stream_push(&s, &a, text, cut, 2, &e) &&
            load_stream_push(&s, &a, text + cut, sizeof CHAT - 1 - cut, 3, &e))
            load_stream_end(&s, &a, &e);
        load_stream_deinit(&s);
        load_answer_deinit(&a);
    }
}

/* Shape and mean of the gaps: a gamma distribution's deviation is its mean over the root of the shape. */
static void arrivals_follow_their_distribution(void **state)
{
    enum { N = 20000 };
    static double at[N], again[N];
    static const double shapes[] = { 0.25, 1, 1.7, 16 };
    (void)state;
    for (int k = 0; k < 4; k++) {
        double squares = 0, below = 0, mean = 1 / 50.0;
        load_arrivals(at, N, 50, shapes[k], 3);
        near(at[N - 1], N / 50.0, 1e-9);
        for (int i = 1; i < N; i++) {
            double gap = at[i] - at[i - 1];
            assert_true(gap >= 0);
            squares += (gap - mean) * (gap - mean) / N;
            below += gap < mean;
        }
        near(sqrt(squares), mean / sqrt(shapes[k]), 0.05);
        if (shapes[k] == 1) near(below / N, 1 - exp(-1), 0.02); /* exponential */
    }
    load_arrivals(again, N, 50, 16, 3);
    assert_memory_equal(at, again, sizeof at);
    load_arrivals(again, N, 50, 16, 4);
    assert_memory_not_equal(at, again, sizeof at);
    load_arrivals(at, N, 50, INFINITY, 3);
    for (int i = 0; i < N; i++) near(at[i], (i + 1) / 50.0, 1e-9);
    load_arrivals(at, N, INFINITY, 1, 3);
    for (int i = 0; i < N; i++) assert_true(at[i] == 0);
}

static void sums_are_pythons(void **state)
{
    double x[] = { 0.3, 0.1, 0.25, 0.9, 0.15 }, one[] = { 2 };
    const double percentiles[] = { 0, 25, 90, 99, 100 };
    const double want[] = { 0.1, 0.15, 0.66, 0.876, 0.9 };
    struct load_summary s;
    (void)state;
    load_summarize(&s, x, 5, percentiles, 5);
    near(s.mean, 0.34, 1e-12);
    near(s.median, 0.25, 1e-12);
    near(s.deviation, 0.28879058156387305, 1e-12);
    for (int i = 0; i < 5; i++) near(s.percentiles[i], want[i], 1e-12);
    load_summarize(&s, one, 1, percentiles, 5);
    for (int i = 0; i < 5; i++) assert_true(s.percentiles[i] == 2 && s.deviation == 0);
    load_summarize(&s, one, 0, percentiles, 5);
    assert_true(s.mean == 0 && s.median == 0 && s.percentiles[4] == 0);
}

static void only_answered_requests_count(void **state)
{
    double itl[] = { 0.5, 1.5 };
    const struct load_answer answers[] = {
        { .ok = true,
          .start = 100,
          .ttft = 1,
          .latency = 3,
          .itl = itl,
          .n_itl = 2,
          .prompt_tokens = 10,
          .output_tokens = 5 },
        { .ok = false, .start = 100, .ttft = 9, .latency = 9, .prompt_tokens = 10, .output_tokens = 3 },
        { .ok = true, .start = 102, .ttft = 2, .latency = 2, .prompt_tokens = -1, .output_tokens = 1 },
        { .ok = true, .start = 103, .ttft = 1, .latency = 1, .prompt_tokens = 4, .output_tokens = 1 },
    };
    struct load_metrics_options o = {
        .duration = 4, .percentiles = { 99 }, .n_percentiles = 1, .goals = { 1, 0.5, 2.5, true }
    };
    struct load_metrics m;
    struct err e = { 0 };
    (void)state;
    assert_true(load_metrics(&m, answers, 4, &o, &e));
    assert_int_equal(m.completed, 3);
    assert_int_equal(m.failed, 1);
    assert_int_equal(m.good, 1);
    assert_int_equal(m.input_tokens, 14);
    assert_int_equal(m.output_tokens, 7);
    near(m.ttft.mean, 4 / 3.0, 1e-12);
    near(m.tpot.mean, 0.5, 1e-12); /* of the one with more than a token */
    near(m.itl.mean, 1, 1e-12);
    assert_int_equal(m.peak_requests, 2); /* the first ends when the last begins */
    near(m.peak_tokens, 2, 0);            /* seconds 1 1 3 4 4 */
}

static void counters_are_read(void **state)
{
    struct serve_counters c = serve_counters_read(
        "# HELP vllm:spec_decode_num_drafts_total n\n"
        "vllm:spec_decode_num_drafts_total{engine=\"0\",model_name=\"a b\"} 10.0\n"
        "vllm:spec_decode_num_drafts_created{engine=\"0\",model_name=\"m\"} 1.7e9\n"
        "vllm:spec_decode_num_draft_tokens_total{engine=\"0\"} "
        "20\nvllm:spec_decode_num_draft_tokens_total{engine=\"1\"} 4\n"
        "vllm:spec_decode_num_accepted_tokens_total 15\n"
        "vllm:spec_decode_num_accepted_tokens_per_pos_total{position=\"1\"} 6\n"
        "vllm:spec_decode_num_accepted_tokens_per_pos_total{position=\"99\"} 6\nvllm:num_requests_running 3");
    (void)state;
    assert_true(c.known);
    assert_true(c.drafts == 10 && c.draft_tokens == 24 && c.accepted == 15 && c.accepted_at[1] == 6 &&
                c.accepted_at[0] == 0);
    assert_false(serve_counters_read("vllm:num_requests_running 3\n").known);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_cut_gives_the_same_answer),
        cmocka_unit_test(faults_are_named),
        cmocka_unit_test(noise_is_survived),
        cmocka_unit_test(arrivals_follow_their_distribution),
        cmocka_unit_test(sums_are_pythons),
        cmocka_unit_test(only_answered_requests_count),
        cmocka_unit_test(counters_are_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
