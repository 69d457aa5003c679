#include "eval/read_speed.h"
#include "base/clock.h"
#include "base/pool.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PARTS = 128, PASSES = 5 };

struct read_speed {
    struct pool *pool;
    uint8_t *data;
    uint64_t part; /* bytes */
    void (*read)(struct read_speed *r, const uint8_t *p);
    _Atomic uint64_t sum; /* kept, so that no reading is left out */
};

#define READ_BODY(vector)                                                                                    \
    vector sum[8] = { 0 };                                                                                   \
    const vector *v = (const vector *)(const void *)p;                                                       \
    for (uint64_t i = 0; i < r->part / sizeof(vector); i += 8)                                               \
        for (int k = 0; k < 8; k++) sum[k] ^= v[i + (uint64_t)k];                                            \
    for (int k = 1; k < 8; k++) sum[0] ^= sum[k];                                                            \
    r->sum ^= ((const uint64_t *)(const void *)sum)[0];

typedef uint64_t words_2 __attribute__((vector_size(16)));

static void read_plain(struct read_speed *r, const uint8_t *p)
{
    READ_BODY(words_2)
}

#if defined(__x86_64__)
typedef uint64_t words_4 __attribute__((vector_size(32)));
typedef uint64_t words_8 __attribute__((vector_size(64)));

__attribute__((target("avx2"))) static void read_avx2(struct read_speed *r, const uint8_t *p)
{
    READ_BODY(words_4)
}

__attribute__((target("avx512f"))) static void read_avx512(struct read_speed *r, const uint8_t *p)
{
    READ_BODY(words_8)
}
#endif

static void choose(struct read_speed *r)
{
    r->read = read_plain;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) r->read = read_avx2;
    if (__builtin_cpu_supports("avx512f")) r->read = read_avx512;
#endif
}

static void read_part(void *ctx, int64_t item, int thread)
{
    struct read_speed *r = ctx;
    (void)thread;
    r->read(r, r->data + (uint64_t)item * r->part);
}

/* First touched by the thread that may read it. */
static void write_part(void *ctx, int64_t item, int thread)
{
    struct read_speed *r = ctx;
    (void)thread;
    memset(r->data + (uint64_t)item * r->part, 1, r->part);
}

bool read_speed_create(struct read_speed **out, int threads, struct err *e)
{
    *out = NULL;
    struct read_speed *r = calloc(1, sizeof *r);
    if (!r) return err_memory(e, "read bandwidth", sizeof *r);
    r->part = READ_SPEED_BYTES / PARTS;
    r->data = aligned_alloc(2u << 20, READ_SPEED_BYTES);
    choose(r);
    if (!r->data || !pool_create(&r->pool, threads, e)) {
        bool no_memory = !r->data;
        read_speed_free(r);
        return no_memory ? err_memory(e, "read bandwidth", READ_SPEED_BYTES) : false;
    }
    madvise(r->data, READ_SPEED_BYTES, MADV_HUGEPAGE); /* without them it is only slower */
    pool_run(r->pool, PARTS, write_part, r);
    *out = r;
    return true;
}

void read_speed_free(struct read_speed *r)
{
    if (!r) return;
    pool_free(r->pool);
    free(r->data);
    free(r);
}

double read_speed_measure(struct read_speed *r)
{
    double best = 0;
    for (int i = 0; i < PASSES; i++) {
        double start = clock_seconds();
        pool_run(r->pool, PARTS, read_part, r);
        double speed = (double)READ_SPEED_BYTES / (clock_seconds() - start);
        best = speed > best ? speed : best;
    }
    return best;
}
