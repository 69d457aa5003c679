/* The thread pool: every item exactly once, by a thread of the pool, and all of it done when pool_run
 * returns. Items write plain memory, so that a thread sanitizer sees a missing happens-before. */
#include "base/pool.h"
#include <sched.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { ITEMS_MAX = 5000, THREADS_MOST = 256, THREADS_MAX = 8 };

struct job {
    struct pool *pool;
    int64_t n_items;
    unsigned mark;                  /* what an item leaves in done[] */
    unsigned done[ITEMS_MAX + 1];   /* one more, never touched */
    int64_t taken[THREADS_MOST][8]; /* per thread, a cache line each */
    bool is_out_of_range;
};

static struct job job;

static void body(void *ctx, int64_t item, int thread)
{
    struct job *j = ctx;
    if (item < 0 || item >= j->n_items || thread < 0 || thread >= pool_threads(j->pool)) {
        j->is_out_of_range = true;
        return;
    }
    j->done[item] += j->mark;
    j->taken[thread][0]++;
}

/* Starts with done[] all zero and leaves it so. */
static void run(int64_t n_items, unsigned mark)
{
    int64_t taken = 0, expected = n_items > 0 ? n_items : 0;
    job.n_items = n_items;
    job.mark = mark;
    memset(job.taken, 0, sizeof job.taken);
    pool_run(job.pool, n_items, body, &job);
    assert_false(job.is_out_of_range);
    for (int64_t i = 0; i < expected; i++) {
        assert_int_equal(job.done[i], mark);
        job.done[i] = 0;
    }
    assert_int_equal(job.done[expected], 0);
    for (int t = 0; t < THREADS_MOST; t++) taken += job.taken[t][0];
    assert_int_equal(taken, expected);
}

static void open_pool(int n_threads)
{
    struct err e = { 0 };
    memset(&job, 0, sizeof job);
    if (!pool_create(&job.pool, n_threads, &e)) fail_msg("%s", e.text);
    assert_int_equal(pool_threads(job.pool), n_threads);
}

static void test_every_item_once(void **state)
{
    (void)state;
    static const int64_t sizes[] = { 0,  1,  2,  3,  4,  5,   7,    8,    9,         15, 16,
                                     17, 31, 63, 64, 65, 255, 1000, 4097, ITEMS_MAX, -1 };
    for (int threads = 1; threads <= THREADS_MAX; threads++) {
        open_pool(threads);
        for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) run(sizes[i], i + 1);
        pool_free(job.pool);
    }
}

static void test_many_small_runs(void **state)
{
    (void)state;
    for (int threads = 1; threads <= THREADS_MAX; threads += threads) {
        open_pool(threads);
        int runs = threads <= 2
                       ? 20000
                       : 1000; /* more threads than cores: a run waits for each of them to be scheduled */
        for (int i = 0; i < runs; i++) run(i % 6, (unsigned)i + 1);
        pool_free(job.pool);
    }
}

static void test_after_sleep(void **state)
{
    (void)state;
    open_pool(4);
    for (unsigned i = 1; i <= 30; i++) {
        usleep(i % 3 * 1000); /* longer than workers stay awake */
        run(17, i);
    }
    pool_free(job.pool);
}

/* Threads that have not started yet when they are told to stop. */
static void test_create_and_free(void **state)
{
    (void)state;
    for (int i = 0; i < 100; i++) {
        open_pool(1 + i % THREADS_MAX);
        if (i % 3 == 0) run(10, 1);
        pool_free(job.pool);
    }
    pool_free(NULL);
}

static void wait_for_all(void *ctx, int64_t item, int thread)
{
    (void)item;
    int *arrived = ctx;
    (void)thread;
    __atomic_fetch_add(arrived, 1, __ATOMIC_RELAXED);
    while (__atomic_load_n(arrived, __ATOMIC_RELAXED) < 4) usleep(100);
}

/* Four items that wait for one another end only if four threads take part. */
static void test_all_threads_work(void **state)
{
    (void)state;
    open_pool(4);
    for (int i = 0; i < 20; i++) {
        int arrived = 0;
        pool_run(job.pool, 4, wait_for_all, &arrived);
        assert_int_equal(arrived, 4);
    }
    pool_free(job.pool);
}

static void test_more_threads_than_cores(void **state)
{
    (void)state;
    open_pool(THREADS_MOST);
    for (unsigned i = 1; i <= 20; i++) run(ITEMS_MAX / (int64_t)i, i);
    pool_free(job.pool);
}

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void test_idle_threads_use_no_time(void **state)
{
    (void)state;
    open_pool(8);
    run(1000, 1);
    usleep(50000);
    double before = cpu_seconds();
    usleep(300000);
    double used = cpu_seconds() - before;
    if (used > 0.02) fail_msg("8 idle threads used %.3f s of 0.3", used);
    pool_free(job.pool);
}

static void test_default_threads(void **state)
{
    (void)state;
    assert_in_range(pool_default_threads(), 1, sysconf(_SC_NPROCESSORS_CONF));
    cpu_set_t all, one;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    CPU_ZERO(&one);
    for (int i = 0; CPU_COUNT(&one) == 0; i++)
        if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    assert_int_equal(pool_default_threads(), 1);
    sched_setaffinity(0, sizeof all, &all);
}

static void put(const char *folder, const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!text) {
        remove(path);
        return;
    }
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static void test_quota_of_control_groups(void **state)
{
    (void)state;
    static const struct {
        const char *max, *quota, *period;
        int want;
    } cases[] = {
        { NULL, NULL, NULL, 0 },
        { "max 100000\n", NULL, NULL, 0 },
        { "200000 100000\n", NULL, NULL, 2 },
        { "150000 100000\n", NULL, NULL, 2 },
        { "1000 100000\n", NULL, NULL, 1 },
        { "100000 0\n", NULL, NULL, 0 },
        { "9223372036854775807 1\n", NULL, NULL, 0 },
        { NULL, "-1\n", "100000\n", 0 },
        { NULL, "300000\n", "100000\n", 3 },
        { NULL, "300000\n", NULL, 0 },
        { "100000 100000\n", "300000\n", "100000\n", 1 },
    };
    char folder[] = "/tmp/quench-pool-XXXXXX", cpu[64];
    assert_non_null(mkdtemp(folder));
    snprintf(cpu, sizeof cpu, "%s/cpu", folder);
    assert_int_equal(mkdir(cpu, 0700), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put(folder, "cpu.max", cases[i].max);
        put(cpu, "cpu.cfs_quota_us", cases[i].quota);
        put(cpu, "cpu.cfs_period_us", cases[i].period);
        assert_int_equal(pool_quota(folder), cases[i].want);
    }
    put(folder, "cpu.max", NULL);
    put(cpu, "cpu.cfs_quota_us", NULL);
    put(cpu, "cpu.cfs_period_us", NULL);
    assert_int_equal(rmdir(cpu), 0);
    assert_int_equal(rmdir(folder), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_item_once),
        cmocka_unit_test(test_many_small_runs),
        cmocka_unit_test(test_after_sleep),
        cmocka_unit_test(test_create_and_free),
        cmocka_unit_test(test_all_threads_work),
        cmocka_unit_test(test_more_threads_than_cores),
        cmocka_unit_test(test_idle_threads_use_no_time),
        cmocka_unit_test(test_default_threads),
        cmocka_unit_test(test_quota_of_control_groups),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
