/* The hot operations of the CPU backend against the machine's limits.
 * usage: bench_kernels [THREADS [generic|avx2|avx512|avx512bf16|amx]]
 * CSV: operation, format, inputs as they are or rounded, rows, MB of weights, microseconds (best of 9: the
 * machine is shared), GB/s, share of the read bandwidth measured just before, GFLOP/s. The weights of several
 * products rotate, so that none is found in the caches. First a line for what a loop of the
 * thread pool costs beyond its work, one item of 5 microseconds a thread: rows is the number of threads. Then
 * attention of one row and of a round of drafts over 4096 tokens, by dtype of the cache: one layer of 16
 * heads, 2 of keys and values, 256 wide. */
#include "backend/ops.h"
#include "base/clock.h"
#include "base/pool.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { RUNS = 9, PIECE = 16 << 20, OUT = 4096, IN = 2048, COPIES_MAX = 64 };
static const double COLD_BYTES = 256e6; /* the copies of a matrix together */

/* Read bandwidth: each thread sums its part of 16 MiB, of 1 GiB on huge pages, as the weights are. */
struct reading {
    const uint64_t *data;
    int64_t words;
    uint64_t sums[1024];
};

static void read_part(void *ctx, int64_t item, int thread)
{
    struct reading *r = ctx;
    const uint64_t *p = r->data + item * r->words;
    uint64_t sum[8] = { 0 };
    for (int64_t i = 0; i < r->words; i += 8)
        for (int k = 0; k < 8; k++) sum[k] += p[i + k];
    for (int k = 0; k < 8; k++) r->sums[thread] += sum[k];
}

static uint64_t *reading_memory(void)
{
    uint64_t bytes = 1ull << 30, *data = aligned_alloc(2 << 20, bytes);
    if (!data) exit(1);
    madvise(data, bytes, MADV_HUGEPAGE);
    memset(data, 1, bytes);
    return data;
}

static double read_bandwidth(struct pool *pool, const uint64_t *data)
{
    const uint64_t bytes = 1ull << 30, parts = 64;
    double least = INFINITY;
    for (uint64_t at = 0; at + PIECE <= bytes; at += PIECE) {
        struct reading r = { .data = data + at / 8, .words = PIECE / parts / 8 };
        double begin = clock_seconds();
        pool_run(pool, (int64_t)parts, read_part, &r);
        least = fmin(least, clock_seconds() - begin);
    }
    return PIECE / least;
}

static const double BUSY = 5e-6;

static void busy(void *ctx, int64_t item, int thread)
{
    double begin = clock_seconds();
    (void)ctx, (void)item, (void)thread;
    while (clock_seconds() - begin < BUSY) continue;
}

/* Median of loops one after the other, as a step has them. */
static int compare_seconds(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void bench_pool(struct pool *pool)
{
    enum { LOOPS = 10001 };
    static double seconds[LOOPS];
    for (int i = 0; i < LOOPS; i++) {
        double begin = clock_seconds();
        pool_run(pool, pool_threads(pool), busy, NULL);
        seconds[i] = clock_seconds() - begin - BUSY;
    }
    qsort(seconds, LOOPS, sizeof *seconds, compare_seconds);
    printf("pool_run,,,%d,0,%.2f,,,\n", pool_threads(pool), seconds[LOOPS / 2] * 1e6);
    fflush(stdout);
}

static struct weight *make(struct backend *b, enum weight_format f, uint32_t seed)
{
    static const int bits[] = { 16, 16, 32, 8, 4 };
    int64_t n = (int64_t)OUT * IN;
    uint8_t *data = malloc((size_t)(n * bits[f] / 8)), *groups = malloc((size_t)n / 16);
    float *scale = malloc(OUT * sizeof *scale);
    if (!data || !groups || !scale) exit(1);
    for (int64_t i = 0; i < n * bits[f] / 8; i++) {
        seed = seed * 1664525 + 1013904223;
        data[i] = (uint8_t)(seed >> 25); /* under 0x7f80: finite in every format */
        if (f == WEIGHT_FP8 && data[i] == 0x7f) data[i] = 1;
    }
    memset(groups, 0x38, (size_t)n / 16);
    for (int i = 0; i < OUT; i++) scale[i] = 0.01f;
    struct weight_source src = { .format = f,
                                 .rows = OUT,
                                 .cols = IN,
                                 .data = data,
                                 .scale = f == WEIGHT_FP8 ? (void *)scale : groups,
                                 .global = 100,
                                 .input = f == WEIGHT_FP8 ? INPUT_FP8_ROW : INPUT_AS_IS };
    struct weight *w;
    struct err e = { 0 };
    if (!b->ops->weight_create(b->queue, &w, &src, &e)) {
        fprintf(stderr, "bench_kernels: %s\n", e.text);
        exit(1);
    }
    free(data);
    free(groups);
    free(scale);
    return w;
}

/* Seconds of one product; the weights rotate so that each call finds its own outside the caches. */
static double product_seconds(struct backend *b, struct weight **w, int copies, struct mat y, struct mat x)
{
    double least = INFINITY;
    for (int i = 0; i < RUNS * copies; i++) {
        double begin = clock_seconds();
        b->ops->matmul(b->queue, y, x, w[i % copies]);
        least = fmin(least, clock_seconds() - begin);
    }
    return least;
}

/* Layers rotate as weights do. */
enum { DEPTH = 4096, HEADS = 16, KV_HEADS = 2, DIM = 256, ATTEND_MOST = 4 };

struct layers {
    struct kv_cache kv[COPIES_MAX];
    int n;
    double bytes; /* of one */
};

static void make_layers(struct layers *l, struct backend *b, enum kv_dtype dtype,
                        const struct step_rows *rows, struct mat k)
{
    struct err e = { 0 };
    uint64_t side = (uint64_t)(DEPTH * kv_line_bytes(dtype, KV_HEADS, DIM));
    l->bytes = 2 * (double)side;
    l->n = COLD_BYTES / l->bytes < COPIES_MAX ? (int)(COLD_BYTES / l->bytes) : COPIES_MAX;
    for (int i = 0; i < l->n; i++) {
        l->kv[i] = (struct kv_cache){ NULL, NULL, dtype, KV_HEADS, DIM };
        if (!b->ops->memory_create(b->queue, &l->kv[i].keys, side, &e) ||
            !b->ops->memory_create(b->queue, &l->kv[i].values, side, &e)) {
            fprintf(stderr, "bench_kernels: %s\n", e.text);
            exit(1);
        }
        b->ops->kv_append(b->queue, &l->kv[i], k, k, rows);
    }
}

static double attention_seconds(struct backend *b, const struct layers *l, const struct step_rows *rows,
                                struct mat y, struct mat qg)
{
    double least = INFINITY;
    for (int i = 0; i < RUNS * l->n; i++) {
        double begin = clock_seconds();
        b->ops->attention(b->queue, y, qg, HEADS, &l->kv[i % l->n], rows);
        least = fmin(least, clock_seconds() - begin);
    }
    return least;
}

static void bench_attention(struct backend *b, struct pool *pool, const uint64_t *memory, struct mat y,
                            const float *x)
{
    static const char *const dtypes[] = { "f32", "bf16", "fp8", "int8_per_token_head" };
    int32_t pages[DEPTH / KV_PAGE];
    for (int i = 0; i < DEPTH / KV_PAGE; i++) pages[i] = i;
    struct span fill = { .n = DEPTH, .pages = pages };
    float *k = malloc((size_t)DEPTH * KV_HEADS * DIM * sizeof *k),
          *qg = malloc(ATTEND_MOST * HEADS * 2 * DIM * 4);
    if (!k || !qg) exit(1);
    for (int64_t i = 0; i < (int64_t)DEPTH * KV_HEADS * DIM; i++) k[i] = 0.1f * x[i % 1021];
    for (int64_t i = 0; i < ATTEND_MOST * HEADS * 2 * DIM; i++) qg[i] = 0.1f * x[i % 1009];
    for (int d = 0; d < KV_DTYPES; d++) {
        struct layers l;
        make_layers(&l, b, (enum kv_dtype)d, &(struct step_rows){ NULL, DEPTH, &fill, 1, false },
                    mat_of(k, DEPTH, KV_HEADS * DIM));
        for (int n = 1; n <= ATTEND_MOST; n += ATTEND_MOST - 1) {
            struct span span = { .n = n, .past = DEPTH - n, .pages = pages };
            double bandwidth = read_bandwidth(pool, memory),
                   s = attention_seconds(b, &l, &(struct step_rows){ NULL, n, &span, 1, false },
                                         mat_of(y.data, n, HEADS * DIM), mat_of(qg, n, HEADS * 2 * DIM));
            printf("attention,%s,f32,%d,%.2f,%.1f,%.2f,%.3f,%.1f\n", dtypes[d], n, l.bytes * 1e-6, s * 1e6,
                   l.bytes / s * 1e-9, l.bytes / s / bandwidth, 4.0 * n * DEPTH * HEADS * DIM / s * 1e-9);
            fflush(stdout);
        }
        for (int i = 0; i < l.n; i++) {
            b->ops->memory_free(b->queue, l.kv[i].keys);
            b->ops->memory_free(b->queue, l.kv[i].values);
        }
    }
    free(k);
    free(qg);
}

static const char *const names[] = { "BF16", "F16", "F32", "FP8", "NVFP4" };
static const double bytes_each[] = { 2, 4, 4, 1, 0.5625 };

static void bench_format(struct backend *b, struct pool *pool, const uint64_t *memory, enum weight_format f,
                         const char *inputs, struct mat y, struct mat x)
{
    static const int64_t rows[] = { 1, 2, 4, 16, 512 };
    double bytes = bytes_each[f] * OUT * IN;
    int copies = COLD_BYTES / bytes < COPIES_MAX ? (int)(COLD_BYTES / bytes) : COPIES_MAX;
    struct weight *w[COPIES_MAX];
    for (int k = 0; k < copies; k++) w[k] = make(b, f, (uint32_t)k + 1);
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
        double bandwidth = read_bandwidth(pool, memory);
        x.rows = y.rows = rows[r];
        double s = product_seconds(b, w, rows[r] < 100 ? copies : 1, y, x),
               flops = 2.0 * OUT * IN * (double)rows[r];
        printf("matmul,%s,%s,%lld,%.2f,%.1f,%.2f,%.3f,%.1f\n", names[f], inputs, (long long)rows[r],
               bytes * 1e-6, s * 1e6, bytes / s * 1e-9, bytes / s / bandwidth, flops / s * 1e-9);
        fflush(stdout);
    }
    for (int k = 0; k < copies; k++) b->ops->weight_free(b->queue, w[k]);
}

static enum cpu_isa isa_of(const char *name)
{
    static const char *const isas[] = { "best", "generic", "avx2", "avx512", "avx512bf16", "amx" };
    for (int i = 0; i < 6; i++)
        if (strcmp(name, isas[i]) == 0) return (enum cpu_isa)i;
    fprintf(stderr, "bench_kernels: no instruction set '%s'\n", name);
    exit(2);
}

int main(int argc, char **argv)
{
    static const enum weight_format formats[] = { WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4, WEIGHT_F32 };
    int threads = argc > 1 ? atoi(argv[1]) : pool_default_threads();
    struct pool *pool;
    struct err e = { 0 };
    struct step_limits limits = {
        .rows = 512, .cols = OUT, .context = DEPTH, .intermediate = 64, .picks = 1, .n_experts = 1
    };
    float *x = aligned_alloc(64, 512 * IN * sizeof *x), *y = aligned_alloc(64, 512 * OUT * sizeof *y);
    uint64_t *memory = reading_memory();
    if (!x || !y || threads < 1 || !pool_create(&pool, threads, &e)) return 1;
    for (int64_t i = 0; i < 512 * IN; i++) x[i] = (float)(i % 17) - 8;
    for (int rounded = 0; rounded < 2; rounded++) {
        struct backend b;
        struct backend_options o = { .device = DEVICE_CPU,
                                     .threads = threads,
                                     .isa = argc > 2 ? isa_of(argv[2]) : CPU_ISA_BEST,
                                     .rounded = rounded };
        if (!backend_create(&b, &o, &e) || !b.ops->reserve(b.queue, &limits, &e)) {
            fprintf(stderr, "bench_kernels: %s\n", e.text);
            return 1;
        }
        if (!rounded)
            printf(
                "# %s; read bandwidth %.1f GB/s\noperation,format,inputs,rows,MB,us,GB_per_s,share_of_read,"
                "GFLOP_per_s\n",
                b.name, read_bandwidth(pool, memory) * 1e-9);
        if (!rounded) bench_pool(pool);
        if (!rounded) bench_attention(&b, pool, memory, mat_of(y, 512, OUT), x);
        for (size_t f = 0; f < sizeof formats / sizeof *formats; f++)
            if (!rounded || formats[f] != WEIGHT_F32)
                bench_format(&b, pool, memory, formats[f], rounded ? "rounded" : "f32", mat_of(y, 512, OUT),
                             mat_of(x, 512, IN));
        backend_destroy(&b);
    }
    pool_free(pool);
    free(memory);
    free(x);
    free(y);
    return 0;
}
