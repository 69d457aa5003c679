/* The hot operations of the CPU backend against the machine's limits.
 * usage: bench_kernels [THREADS]
 * CSV: operation, format, rows, MB of weights, microseconds (median of 9), GB/s, share of the read bandwidth
 * measured in this run, GFLOP/s. The weights of 16 products rotate, so that none is found in the caches. */
#include "backend/ops.h"
#include "base/clock.h"
#include "base/pool.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RUNS = 9, OUT = 4096, IN = 2048, COPIES = 16 };

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *t)
{
    qsort(t, RUNS, sizeof *t, by_value);
    return t[RUNS / 2];
}

/* Read bandwidth: each thread sums its part of 1 GiB. */
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

static double read_bandwidth(struct pool *pool)
{
    uint64_t bytes = 1ull << 30, parts = 256;
    uint64_t *data = aligned_alloc(64, bytes);
    if (!data) return 0;
    memset(data, 1, bytes);
    struct reading r = { .data = data, .words = (int64_t)(bytes / parts / 8) };
    double t[RUNS];
    for (int i = 0; i < RUNS; i++) {
        double begin = clock_seconds();
        pool_run(pool, (int64_t)parts, read_part, &r);
        t[i] = clock_seconds() - begin;
    }
    free(data);
    return (double)bytes / median(t);
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
static double product_seconds(struct backend *b, struct weight **w, struct mat y, struct mat x)
{
    double t[RUNS];
    for (int i = 0; i < RUNS; i++) {
        double begin = clock_seconds();
        for (int k = 0; k < COPIES; k++) b->ops->matmul(b->queue, y, x, w[k]);
        t[i] = (clock_seconds() - begin) / COPIES;
    }
    return median(t);
}

int main(int argc, char **argv)
{
    static const char *const names[] = { "BF16", "F16", "F32", "FP8", "NVFP4" };
    static const double bytes_each[] = { 2, 4, 4, 1, 0.5625 };
    static const enum weight_format formats[] = { WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4, WEIGHT_F32 };
    static const int64_t rows[] = { 1, 16, 512 };
    int threads = argc > 1 ? atoi(argv[1]) : pool_default_threads();
    struct backend b;
    struct pool *pool;
    struct err e = { 0 };
    struct backend_options o = { .device = DEVICE_CPU, .threads = threads };
    struct step_limits limits = { 512, OUT, 64, 64, 1, 1 };
    if (threads < 1 || !pool_create(&pool, threads, &e) || !backend_create(&b, &o, &e) ||
        !b.ops->reserve(b.queue, &limits, &e)) {
        fprintf(stderr, "bench_kernels: %s\n", e.text);
        return 1;
    }
    double bandwidth = read_bandwidth(pool);
    pool_free(pool);
    float *x = aligned_alloc(64, 512 * IN * sizeof *x), *y = aligned_alloc(64, 512 * OUT * sizeof *y);
    if (!x || !y) return 1;
    for (int64_t i = 0; i < 512 * IN; i++) x[i] = (float)(i % 17) - 8;
    printf("# %s; read bandwidth %.1f GB/s\n", b.name, bandwidth * 1e-9);
    printf("operation,format,rows,MB,us,GB_per_s,share_of_read,GFLOP_per_s\n");
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        struct weight *w[COPIES];
        for (int k = 0; k < COPIES; k++) w[k] = make(&b, formats[f], (uint32_t)k + 1);
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            double s = product_seconds(&b, w, mat_of(y, rows[r], OUT), mat_of(x, rows[r], IN));
            double bytes = bytes_each[formats[f]] * OUT * IN, flops = 2.0 * OUT * IN * (double)rows[r];
            printf("matmul,%s,%lld,%.2f,%.1f,%.2f,%.3f,%.1f\n", names[formats[f]], (long long)rows[r],
                   bytes * 1e-6, s * 1e6, bytes / s * 1e-9, bytes / s / bandwidth, flops / s * 1e-9);
            fflush(stdout);
        }
        for (int k = 0; k < COPIES; k++) b.ops->weight_free(b.queue, w[k]);
    }
    free(x);
    free(y);
    backend_destroy(&b);
    return 0;
}
