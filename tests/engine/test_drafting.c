/* Drafts of sequences that share steps, over made-up machines: never much slower than without, and most of
 * what the best count gives where drafts are right. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "engine/drafting.h"
#include "engine/sample.h"
#include <stdio.h>

enum { MOST = 3 };

/* Time of a step of n sequences with k drafts each: rows cost nothing until the machine is busy with them,
 * and each depth of drafts is a pass of the head. */
struct machine {
    double free_rows, row, pass, noise;
};

/* What a clock says of a step: noise, a step in fifty that something disturbs, the first ones slow; and the
 * step after one with drafts does what that one put off. */
static double clock_says(const struct machine *m, double took, int step, int k, int last_k)
{
    uint64_t i = (uint64_t)step;
    double x = took * (1 + m->noise * sample_uniform(12, i));
    if (last_k > 0 && k == 0) x *= 1.25;
    if (last_k == 0 && k > 0) x *= 0.75;
    if (sample_uniform(13, i) < 0.02) x *= 4;
    return step < 6 ? 3 * x : x;
}

static double step_time(const struct machine *m, int n, int k)
{
    double rows = n * (k + 1) - m->free_rows;
    return 1 + (rows > 0 ? rows * m->row : 0) + k * m->pass;
}

struct outcome {
    double seconds, plain, best; /* this; without drafts; with the best fixed count */
    int64_t drafted, rounds;
};

/* Steps of how_many(step) sequences whose drafts are right with probability rate(step). */
static struct outcome simulate(const struct machine *m, int steps, int (*how_many)(int), double (*rate)(int))
{
    struct drafting d;
    struct outcome o = { 0 };
    uint64_t draws = 0;
    int last_k = 0;
    drafting_init(&d, MOST);
    for (int i = 0; i < steps; i++) {
        int n = how_many(i), k = drafting_choose(&d, n), tokens = 0;
        assert_true(k == 0 || n * (k + 1) <= ROWS_EXACT);
        for (int s = 0; s < n; s++) {
            int right = 0;
            while (right < k && sample_uniform(11, draws++) < rate(i)) right++;
            drafting_count(&d, k, right);
            tokens += right + 1;
        }
        double took = step_time(m, n, k), most = 1;
        drafting_learn(&d, n, k, clock_says(m, took, i, k, last_k));
        last_k = k;
        for (int b = 1; b <= MOST && n * (b + 1) <= ROWS_EXACT; b++) {
            double all = 1, expected = 1;
            for (int j = 0; j < b; j++) expected += all *= rate(i);
            double gain = expected * step_time(m, n, 0) / step_time(m, n, b);
            if (gain > most) most = gain;
        }
        double plain = (double)tokens / n * step_time(m, n, 0);
        o.seconds += took;
        o.plain += plain;
        o.best += plain / most;
        o.drafted += n * k;
        o.rounds += n;
    }
    return o;
}

static int one(int i)
{
    return (void)i, 1;
}

static int four(int i)
{
    return (void)i, 4;
}

static int sixteen(int i)
{
    return (void)i, 16;
}

static int sixty_four(int i)
{
    return (void)i, 64;
}

/* They come and go. */
static int changing(int i)
{
    int x = i / 7 % 47;
    return 1 + (x < 24 ? x : 47 - x);
}

static double never(int i)
{
    return (void)i, 0;
}

static double half(int i)
{
    return (void)i, 0.5;
}

static double nearly_always(int i)
{
    return (void)i, 0.95;
}

/* Texts that are easy for a while, and others. */
static double by_turns(int i)
{
    return i / 1500 % 2 ? 0.9 : 0.1;
}

static const struct machine machines[] = {
    { 64, 0, 0.1, 0.05 },  /* reads weights, whatever the rows */
    { 4, 0.1, 0.2, 0.1 },  /* busy from four rows on */
    { 0, 0.5, 0.45, 0.1 }, /* each row costs */
};
static int (*const counts[])(int) = { one, four, sixteen, sixty_four, changing };
static double (*const rates[])(int) = { never, half, nearly_always, by_turns };

static void never_much_slower(void **state)
{
    (void)state;
    double worst = 0;
    for (int m = 0; m < 3; m++)
        for (int c = 0; c < 5; c++)
            for (int r = 0; r < 4; r++) {
                struct outcome o = simulate(&machines[m], 6000, counts[c], rates[r]);
                double share = o.seconds / o.plain;
                if (share > worst) worst = share;
                if (!(share <= 1.02))
                    fail_msg("machine %d, sequences %d, rate %d: %.3f of the time without, %.2f drafts", m, c,
                             r, share, (double)o.drafted / (double)o.rounds);
            }
    printf("note: at worst %.3f of the time without drafts\n", worst);
}

static void what_pays_is_drafted(void **state)
{
    (void)state;
    for (int m = 0; m < 2; m++)
        for (int c = 0; c < 3; c++)
            for (int r = 2; r < 4; r++) {
                struct outcome o = simulate(&machines[m], 12000, counts[c], rates[r]);
                if (!(o.seconds <= 1.1 * o.best))
                    fail_msg("machine %d, sequences %d, rate %d: %.3f of the best time", m, c, r,
                             o.seconds / o.best);
            }
}

/* With many in a step rows cost too much, and none is drafted but in tries. */
static void a_full_batch_drafts_nothing(void **state)
{
    (void)state;
    struct outcome many = simulate(&machines[2], 6000, sixteen, half),
                   more = simulate(&machines[0], 6000, sixty_four, nearly_always);
    assert_true(many.drafted * 20 < many.rounds);
    assert_int_equal(more.drafted, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(never_much_slower),
        cmocka_unit_test(what_pays_is_drafted),
        cmocka_unit_test(a_full_batch_drafts_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
