#include "base/pool.h"
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

/* A worker looks at `epoch` this many times before it sleeps: about 20 µs, the gap between two operations of
 * a step, so that a running step never pays a wake-up while an idle program uses no CPU. */
enum { LOOKS = 4000 };

struct pool {
    int n_threads;
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_uint epoch; /* changes when there is work; written under lock */
    atomic_bool stop;
    void (*body)(void *ctx, int64_t item, int thread);
    void *ctx;
    int64_t n_items;
    _Alignas(64) atomic_llong next;
    /* Workers inside the current loop, and whether it takes more. The caller closes a loop when no item is
     * left and waits for those inside only: a worker that the system has not let run yet holds nobody up. */
    _Alignas(64) atomic_uint inside;
};
static const unsigned CLOSED = 1u << 31;

struct start {
    struct pool *pool;
    int thread;
};

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Items side by side are memory side by side, so a thread takes a run of them: long ones at first, single
 * ones at the end, where threads have to finish together. */
static int64_t take_run(struct pool *p, int64_t *first)
{
    long long at = atomic_load_explicit(&p->next, memory_order_relaxed), n;
    do {
        int64_t left = p->n_items - at;
        if (left <= 0) return 0;
        n = left / (2 * p->n_threads);
        if (n == 0) n = 1;
    } while (!atomic_compare_exchange_weak_explicit(&p->next, &at, at + n, memory_order_relaxed,
                                                    memory_order_relaxed));
    *first = at;
    return n;
}

static void take_items(struct pool *p, int thread)
{
    int64_t first, n;
    while ((n = take_run(p, &first)) > 0)
        for (int64_t i = first; i < first + n; i++) p->body(p->ctx, i, thread);
}

static unsigned await_epoch(struct pool *p, unsigned seen)
{
    for (int i = 0; i < LOOKS; i++) {
        if (atomic_load_explicit(&p->epoch, memory_order_acquire) != seen) return atomic_load(&p->epoch);
        relax();
    }
    pthread_mutex_lock(&p->lock);
    while (atomic_load(&p->epoch) == seen) pthread_cond_wait(&p->wake, &p->lock);
    pthread_mutex_unlock(&p->lock);
    return atomic_load(&p->epoch);
}

/* False: the loop that was announced is over. What the loop is, is read after this. */
static bool enter(struct pool *p)
{
    unsigned inside = atomic_load_explicit(&p->inside, memory_order_relaxed);
    while (!(inside & CLOSED))
        if (atomic_compare_exchange_weak_explicit(&p->inside, &inside, inside + 1, memory_order_acquire,
                                                  memory_order_relaxed))
            return true;
    return false;
}

static void *work(void *arg)
{
    struct start start = *(struct start *)arg;
    free(arg);
    struct pool *p = start.pool;
    unsigned seen = 0;
    for (;;) {
        seen = await_epoch(p, seen);
        if (atomic_load(&p->stop)) return NULL;
        if (!enter(p)) continue;
        take_items(p, start.thread);
        atomic_fetch_sub_explicit(&p->inside, 1, memory_order_release);
    }
}

static bool start_thread(struct pool *p, int thread, struct err *e)
{
    struct start *s = malloc(sizeof *s);
    if (!s) return err_memory(e, "thread", sizeof *s);
    *s = (struct start){ p, thread };
    errno = pthread_create(&p->threads[thread], NULL, work, s);
    if (errno == 0) return true;
    err_errno(e, "pthread_create");
    free(s);
    return false;
}

bool pool_create(struct pool **out, int n_threads, struct err *e)
{
    *out = NULL;
    struct pool *p = aligned_alloc(64, sizeof *p);
    if (!p) return err_memory(e, "thread pool", sizeof *p);
    *p = (struct pool){ .n_threads = 1, .inside = CLOSED };
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->threads = calloc((size_t)n_threads, sizeof *p->threads);
    bool ok = p->threads || err_memory(e, "thread pool", (unsigned long long)n_threads * sizeof *p->threads);
    for (; ok && p->n_threads < n_threads; p->n_threads++) {
        ok = start_thread(p, p->n_threads, e);
        if (!ok) break;
    }
    if (!ok) {
        pool_free(p);
        return false;
    }
    *out = p;
    return true;
}

static void announce(struct pool *p)
{
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add_explicit(&p->epoch, 1, memory_order_release);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

void pool_free(struct pool *p)
{
    if (!p) return;
    atomic_store(&p->stop, true);
    announce(p);
    for (int i = 1; p->threads && i < p->n_threads; i++) pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p->threads);
    free(p);
}

int pool_threads(const struct pool *p)
{
    return p->n_threads;
}

void pool_run(struct pool *p, int64_t n_items, void (*body)(void *ctx, int64_t item, int thread), void *ctx)
{
    if (p->n_threads == 1 || n_items <= 1) {
        for (int64_t i = 0; i < n_items; i++) body(ctx, i, 0);
        return;
    }
    p->body = body;
    p->ctx = ctx;
    p->n_items = n_items;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    atomic_store_explicit(&p->inside, 0, memory_order_release);
    announce(p);
    take_items(p, 0);
    atomic_fetch_or_explicit(&p->inside, CLOSED, memory_order_relaxed);
    for (int looks = 0; atomic_load_explicit(&p->inside, memory_order_acquire) != CLOSED; looks++)
        if (looks < LOOKS)
            relax();
        else
            sched_yield();
}

/* The numbers of a file under root, in order; how many. */
static int read_numbers(long long *out, int most, const char *root, const char *name)
{
    char path[512];
    int n = 0;
    snprintf(path, sizeof path, "%s/%s", root, name);
    FILE *f = fopen(path, "r");
    while (f && n < most && fscanf(f, "%lld", &out[n]) == 1) n++;
    if (f) fclose(f);
    return n;
}

int pool_quota(const char *cgroups)
{
    long long x[2]; /* microseconds of a period, and the period */
    int n = read_numbers(x, 2, cgroups, "cpu.max");
    if (n == 0) {
        n = read_numbers(x, 1, cgroups, "cpu/cpu.cfs_quota_us");
        if (n == 1) n += read_numbers(x + 1, 1, cgroups, "cpu/cpu.cfs_period_us");
    }
    if (n < 2 || x[0] <= 0 || x[1] <= 0) return 0;
    long long threads = x[0] / x[1] + (x[0] % x[1] > 0);
    return threads < INT_MAX ? (int)threads : 0;
}

int pool_default_threads(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    int quota = pool_quota("/sys/fs/cgroup");
    if (quota > 0 && quota < n) n = quota;
    return n > 0 ? n : 1;
}
