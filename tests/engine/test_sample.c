/* Sampling against the distribution written down directly: every candidate is kept or dropped by counting and
 * adding over all others, in double, nothing sorted. All draws are of fixed seeds. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "engine/sample.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 12, DRAWS = 200000, LARGE = 3000 };

/* Two pairs of equal logits, one that never comes, one far below. */
static const float tiny[VOCAB] = { 1.5f,  -0.25f, 2.0f, 0.5f,  -INFINITY, 1.5f,
                                   -1.0f, 0.5f,   0,    -9.0f, 1.75f,     -2.0f };

/* Before in the order of likelihood; equal ones by id. */
static bool ahead(const float *logits, int64_t a, int64_t b)
{
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

static bool in_top_k(const float *logits, int64_t n, int64_t i, int k)
{
    int64_t larger = 0;
    for (int64_t j = 0; j < n; j++) larger += logits[j] > logits[i];
    return k == 0 || larger < k;
}

/* p[i] = probability of i under the rules of sample.h. p holds zeros for what may not be drawn. */
static void target(double p[VOCAB], const struct sampling *s, const float logits[VOCAB])
{
    double top = -INFINITY, total = 0, kept = 0, before[VOCAB] = { 0 };
    for (int64_t i = 0; i < VOCAB; i++) top = fmax(top, logits[i]);
    for (int64_t i = 0; i < VOCAB; i++) {
        p[i] = exp((logits[i] - top) / s->temperature);
        if (p[i] < s->min_p || !in_top_k(logits, VOCAB, i, s->top_k)) p[i] = 0;
        total += p[i];
    }
    for (int64_t i = 0; i < VOCAB; i++)
        for (int64_t j = 0; j < VOCAB; j++) before[i] += ahead(logits, j, i) ? p[j] : 0;
    for (int64_t i = 0; i < VOCAB; i++) {
        if (s->top_p > 0 && s->top_p < 1 && before[i] >= s->top_p * total) p[i] = 0;
        kept += p[i];
    }
    for (int64_t i = 0; i < VOCAB; i++) p[i] /= kept;
}

/* Five standard deviations over the mean of chi-square, and room for its skew at few degrees of freedom. */
static double chi_square_limit(int freedom)
{
    return freedom + 5 * sqrt(2.0 * freedom) + 12;
}

static void check_counts(const int64_t *counts, const double *p, int64_t draws, const char *what)
{
    double sum = 0;
    int freedom = -1;
    for (int i = 0; i < VOCAB; i++) {
        double want = p[i] * (double)draws;
        if (p[i] == 0 && counts[i] != 0) fail_msg("%s: token %d drawn, it has no probability", what, i);
        if (p[i] == 0) continue;
        sum += ((double)counts[i] - want) * ((double)counts[i] - want) / want;
        freedom++;
    }
    if (!(sum <= chi_square_limit(freedom)))
        fail_msg("%s: chi-square %g with %d degrees of freedom", what, sum, freedom);
}

static void check_distribution(const struct sampling *s, const char *what)
{
    int64_t counts[VOCAB] = { 0 };
    double p[VOCAB];
    target(p, s, tiny);
    for (uint64_t i = 0; i < DRAWS; i++) counts[sample_token(s, tiny, VOCAB, i, NULL)]++;
    check_counts(counts, p, DRAWS, what);
}

static void draws_follow_the_target(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        struct sampling s;
    } cases[] = {
        { "temperature 1", { .temperature = 1, .seed = 1 } },
        { "temperature 0.5", { .temperature = 0.5f, .seed = 2 } },
        { "temperature 3", { .temperature = 3, .seed = 3 } },
        { "top-k 4", { .temperature = 1, .top_k = 4, .seed = 4 } },
        { "top-k 3, cut between equals", { .temperature = 1, .top_k = 3, .seed = 5 } },
        { "top-k above the vocabulary", { .temperature = 1, .top_k = 5000, .seed = 6 } },
        { "top-p 0.8", { .temperature = 1, .top_p = 0.8f, .seed = 7 } },
        { "top-p 0.3, between equals", { .temperature = 2, .top_p = 0.3f, .seed = 8 } },
        { "min-p 0.2", { .temperature = 1, .min_p = 0.2f, .seed = 9 } },
        { "min-p 0.3 after temperature 2", { .temperature = 2, .min_p = 0.3f, .seed = 10 } },
        { "all of them", { 1.5f, 6, 0.85f, 0.1f, 11 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_distribution(&cases[i].s, cases[i].what);
}

static void greedy_takes_the_first_of_the_largest(void **state)
{
    (void)state;
    float logits[VOCAB] = { -1, 0, 3, 2, 3, -INFINITY };
    static const float temperatures[] = { 0, 9e-6f };
    for (int i = 0; i < 2; i++) {
        struct sampling s = { .temperature = temperatures[i], .top_k = 2, .top_p = 0.1f, .min_p = 0.9f };
        for (uint64_t c = 0; c < 1000; c++) assert_int_equal(sample_token(&s, logits, VOCAB, c, NULL), 2);
    }
    for (int i = 0; i < VOCAB; i++) { /* wherever it stands */
        float one[VOCAB] = { 0 };
        one[i] = 1;
        struct sampling s = { 0 };
        assert_int_equal(sample_token(&s, one, VOCAB, 0, NULL), i);
    }
}

/* Which tokens `draws` draws gave. */
static void drawn(bool *seen, const struct sampling *s, const float *logits, int64_t n, uint64_t draws)
{
    memset(seen, 0, (size_t)n * sizeof *seen);
    for (uint64_t i = 0; i < draws; i++) seen[sample_token(s, logits, n, i, NULL)] = true;
}

static void ties_with_the_kth_stay(void **state)
{
    (void)state;
    float logits[VOCAB] = { 0, 2, 1, 1, 0, 1, 0, 1, 0 };
    bool seen[VOCAB];
    for (int k = 2; k <= 5; k++) {
        struct sampling s = { .temperature = 1, .top_k = k };
        drawn(seen, &s, logits, VOCAB, 2000);
        for (int i = 0; i < VOCAB; i++) assert_int_equal(seen[i], logits[i] >= 1);
    }
    struct sampling one = { .temperature = 1, .top_k = 1 };
    drawn(seen, &one, logits, VOCAB, 2000);
    for (int i = 0; i < VOCAB; i++) assert_int_equal(seen[i], i == 1);
}

/* A vocabulary with many equal logits. */
static void top_k_of_a_large_vocabulary(void **state)
{
    (void)state;
    static const int ks[] = { 1, 2, 17, 1000, 1023, 1024, 1025, 2000, LARGE - 1, LARGE, LARGE + 1 };
    float *logits = malloc(LARGE * sizeof *logits);
    bool *seen = malloc(LARGE * sizeof *seen);
    for (int i = 0; i < LARGE; i++) logits[i] = (float)(int)(sample_uniform(77, (uint64_t)i) * 800) / 100;
    for (size_t k = 0; k < sizeof ks / sizeof *ks; k++) {
        struct sampling s = { .temperature = 20, .top_k = ks[k], .seed = k };
        int distinct = 0, kept = 0;
        drawn(seen, &s, logits, LARGE, 400);
        for (int i = 0; i < LARGE; i++) {
            bool in = in_top_k(logits, LARGE, i, ks[k]);
            kept += in;
            distinct += seen[i];
            assert_true(in || !seen[i]);
        }
        assert_true(kept > 50 ? distinct > 30 : distinct == kept);
    }
    free(logits);
    free(seen);
}

/* Two values, half each, so that a cut one place off takes in the other half. */
static void a_large_top_k_cuts_in_the_right_place(void **state)
{
    (void)state;
    static const int ks[] = { LARGE / 2 - 1, LARGE / 2, LARGE / 2 + 1 };
    float logits[LARGE];
    for (int i = 0; i < LARGE; i++) logits[i] = (float)(i % 2);
    for (int k = 0; k < 3; k++) {
        struct sampling s = { .temperature = 1, .top_k = ks[k] };
        int even = 0;
        for (uint64_t i = 0; i < 200; i++) even += sample_token(&s, logits, LARGE, i, NULL) % 2 == 0;
        assert_int_equal(even > 0, ks[k] > LARGE / 2);
    }
}

static const uint32_t even_ones = 0x55555555, nine = 1 << 9;

static void banned_tokens_never_come(void **state)
{
    (void)state;
    float logits[VOCAB], even[VOCAB];
    int64_t counts[VOCAB] = { 0 };
    double p[VOCAB];
    memcpy(logits, tiny, sizeof logits);
    logits[1] = 50; /* all but certain, were it allowed */
    for (int i = 0; i < VOCAB; i++) even[i] = i % 2 ? -INFINITY : logits[i];
    struct sampling s = { .temperature = 1, .top_k = 4, .seed = 3 };
    target(p, &s, even);
    for (uint64_t i = 0; i < DRAWS; i++) counts[sample_token(&s, logits, VOCAB, i, &even_ones)]++;
    check_counts(counts, p, DRAWS, "banned");
    struct sampling greedy = { 0 };
    assert_int_equal(sample_token(&greedy, logits, VOCAB, 0, &even_ones), 2);
}

static void one_candidate_left(void **state)
{
    (void)state;
    static const struct sampling all[] = { { .temperature = 1, .top_k = 1 },
                                           { .temperature = 1, .top_p = 1e-6f },
                                           { .temperature = 1, .min_p = 1 },
                                           { .temperature = 1e-4f } };
    float only[VOCAB];
    for (int i = 0; i < VOCAB; i++) only[i] = i == 7 ? -3 : -INFINITY;
    for (uint64_t c = 0; c < 10000; c++) {
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) {
            assert_int_equal(sample_token(&all[k], tiny, VOCAB, c, NULL), 2);
            assert_int_equal(sample_token(&all[k], only, VOCAB, c, NULL), 7);
            assert_int_equal(sample_token(&all[k], tiny, VOCAB, c, &nine), 9);
            assert_int_equal(sample_token(&all[k], tiny, 1, c, NULL), 0);
        }
        struct sampling plain = { .temperature = 1 };
        assert_int_equal(sample_token(&plain, only, VOCAB, c, NULL), 7);
    }
}

static void seed_and_counter_decide(void **state)
{
    (void)state;
    struct sampling a = { .temperature = 1, .seed = 5 }, b = { .temperature = 1, .seed = 6 };
    int differ = 0;
    int32_t first[1000];
    for (uint64_t i = 0; i < 1000; i++) first[i] = sample_token(&a, tiny, VOCAB, i, NULL);
    for (uint64_t i = 1000; i-- > 0;) { /* in another order, between draws of another seed */
        differ += sample_token(&b, tiny, VOCAB, i, NULL) != first[i];
        assert_int_equal(sample_token(&a, tiny, VOCAB, i, NULL), first[i]);
    }
    assert_true(differ > 500);
    for (uint64_t i = 0; i < 100; i++) /* neighbouring seeds are not one stream shifted */
        assert_true(sample_uniform(1, i) != sample_uniform(0, i + 1));
}

/* Of single numbers and of neighbours, in 64 x 64 boxes. */
static void uniform_is_uniform(void **state)
{
    (void)state;
    enum { SIDE = 64 };
    static int64_t boxes[SIDE * SIDE];
    for (uint64_t seed = 0; seed < 3; seed++) {
        double sum = 0, want = (double)DRAWS / (SIDE * SIDE);
        memset(boxes, 0, sizeof boxes);
        for (uint64_t i = 0; i < DRAWS; i++) {
            double x = sample_uniform(seed, i), y = sample_uniform(seed, i + 1);
            assert_true(x >= 0 && x < 1);
            boxes[(int)(x * SIDE) * SIDE + (int)(y * SIDE)]++;
        }
        for (int i = 0; i < SIDE * SIDE; i++)
            sum += ((double)boxes[i] - want) * ((double)boxes[i] - want) / want;
        if (!(sum <= chi_square_limit(SIDE * SIDE - 1))) fail_msg("seed %d: chi-square %g", (int)seed, sum);
    }
}

/* The weights of a draw, in integers, against the exponential. */
static void weights_are_exponentials(void **state)
{
    (void)state;
    uint64_t before = UINT64_MAX;
    assert_int_equal(draw_weight(0), 1ull << 42);
    for (double nats = 0; nats <= (double)DRAW_REACH; nats += 0.001) {
        uint64_t weight = draw_weight((uint32_t)(nats * 0x1p19));
        double want = exp(-floor(nats * 0x1p19) * 0x1p-19) * 0x1p42;
        if (!(fabs((double)weight - want) <= 4e-9 * want + 1))
            fail_msg("%g nats: %g, not %g", nats, (double)weight, want);
        assert_true(weight >= 1 && weight <= before);
        before = weight;
    }
}

static void ranges_are_checked(void **state)
{
    (void)state;
    static const struct {
        struct sampling s;
        const char *message;
    } bad[] = {
        { { .temperature = -0.5f }, "--temperature: expected 0 to 100, found -0.5" },
        { { .temperature = 101 }, "--temperature: expected 0 to 100, found 101" },
        { { .temperature = NAN }, "--temperature: expected 0 to 100, found nan" },
        { { .temperature = INFINITY }, "--temperature: expected 0 to 100, found inf" },
        { { .top_k = -1 }, "--top-k: expected 0 or more, found -1" },
        { { .top_p = -0.25f }, "--top-p: expected 0 to 1, found -0.25" },
        { { .top_p = 1.5f }, "--top-p: expected 0 to 1, found 1.5" },
        { { .top_p = NAN }, "--top-p: expected 0 to 1, found nan" },
        { { .min_p = -1 }, "--min-p: expected 0 to 1, found -1" },
        { { .min_p = 2 }, "--min-p: expected 0 to 1, found 2" },
        { { .min_p = NAN }, "--min-p: expected 0 to 1, found nan" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct err e = { 0 };
        assert_false(sampling_check(&bad[i].s, &e));
        assert_string_equal(e.text, bad[i].message);
        assert_int_equal(e.code, ERR_ARGUMENT);
    }
    static const struct sampling good[] = { { 0 },
                                            { 100, 1 << 30, 1, 1, UINT64_MAX },
                                            { 1, 1, 0.5f, 0.5f, 1 } };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) assert_true(sampling_check(&good[i], NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(draws_follow_the_target),
        cmocka_unit_test(greedy_takes_the_first_of_the_largest),
        cmocka_unit_test(ties_with_the_kth_stay),
        cmocka_unit_test(top_k_of_a_large_vocabulary),
        cmocka_unit_test(a_large_top_k_cuts_in_the_right_place),
        cmocka_unit_test(banned_tokens_never_come),
        cmocka_unit_test(one_candidate_left),
        cmocka_unit_test(seed_and_counter_decide),
        cmocka_unit_test(uniform_is_uniform),
        cmocka_unit_test(weights_are_exponentials),
        cmocka_unit_test(ranges_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
