/* usage: bench_pack [EXPERTS]
 * Packing a layer of the real width from memory: EXPERTS (default 256) times gate and up of 512 x 2048 and
 * down of 2048 x 512. CSV: what, threads, MB of BF16 source, seconds and CPU seconds (least of 5), MB/s of
 * source, share of the read bandwidth of the same run and threads, MB per CPU second. read: every byte
 * summed; memcpy: into another buffer; absmax: the first pass alone; nearest, mse: both passes over NVFP4,
 * four matrices at a time; fp8: the same in FP8. mse takes an eighth of the experts. */
#include "base/clock.h"
#include "num/nvfp4.h"
#include "quantize/pack.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RUNS = 5, PARTS = 3, WEIGHTS = 512 * 2048, MATRIX_BYTES = 2 * WEIGHTS, READ_WORDS = 1 << 16 };

struct bench {
    int64_t experts;
    struct plan plan;
    size_t n_used; /* matrices of the plan */
    struct packer packer;
    struct tensor tensor;
    uint8_t *data, *copy;
    uint8_t codes[8 * WEIGHTS], scales[8 * WEIGHTS / NVFP4_GROUP];
    const struct curvature *curvature;
    _Alignas(64) uint64_t sums[1024][8];
};

static void read_item(void *ctx, int64_t item, int thread)
{
    struct bench *b = ctx;
    const uint64_t *p = (const uint64_t *)(const void *)b->data + item * READ_WORDS;
    uint64_t sum[8] = { 0 };
    for (int64_t i = 0; i < READ_WORDS; i += 8)
        for (int k = 0; k < 8; k++) sum[k] += p[i + k];
    for (int k = 0; k < 8; k++) b->sums[thread][k] += sum[k];
}

static void copy_item(void *ctx, int64_t item, int thread)
{
    struct bench *b = ctx;
    (void)thread;
    memcpy(b->copy + item * READ_WORDS * 8, b->data + item * READ_WORDS * 8, READ_WORDS * 8);
}

static bool run_read(struct bench *b, struct err *e)
{
    (void)e;
    pool_run(b->packer.pool, (int64_t)b->n_used * (MATRIX_BYTES / 8 / READ_WORDS), read_item, b);
    return true;
}

static bool run_copy(struct bench *b, struct err *e)
{
    (void)e;
    pool_run(b->packer.pool, (int64_t)b->n_used * (MATRIX_BYTES / 8 / READ_WORDS), copy_item, b);
    return true;
}

/* As many at once as tensors.c takes, and those after them looked at beside them. */
enum { AT_ONCE = 8 };

static bool run_absmax(struct bench *b, struct err *e)
{
    float top;
    for (size_t i = 0; i < b->n_used; i++)
        if (!packer_absmax(&b->packer, &top, &b->plan.matrices[i], e)) return false;
    return true;
}

static bool pack(struct bench *b, enum scheme scheme, struct err *e)
{
    struct packer_look ahead = { .n = 0 };
    for (size_t i = 0; i < b->n_used; i++) b->plan.matrices[i].scheme = scheme;
    for (size_t i = 0; i < b->n_used; i += AT_ONCE) {
        struct packed out[AT_ONCE];
        struct packing in[AT_ONCE];
        size_t n = 0;
        for (struct matrix *m = &b->plan.matrices[i]; n < AT_ONCE && i + n < b->n_used; m++, n++) {
            in[n] = (struct packing){ m, ahead.absmax[n], b->codes + n * WEIGHTS,
                                      b->scales + n * (WEIGHTS / NVFP4_GROUP) };
            if (i == 0 && !packer_absmax(&b->packer, &in[n].absmax, m, e)) return false;
        }
        for (ahead.n = 0; ahead.n < AT_ONCE && i + n + ahead.n < b->n_used; ahead.n++)
            ahead.matrices[ahead.n] = &b->plan.matrices[i + n + ahead.n];
        if (!packer_run(&b->packer, out, in, n, b->curvature, &ahead, e)) return false;
    }
    return true;
}

static bool run_nearest(struct bench *b, struct err *e)
{
    b->curvature = NULL;
    return pack(b, SCHEME_NVFP4A16, e);
}

static bool run_mse(struct bench *b, struct err *e)
{
    static const struct curvature plain = { 0 };
    b->curvature = &plain;
    return pack(b, SCHEME_NVFP4A16, e);
}

static bool run_fp8(struct bench *b, struct err *e)
{
    b->curvature = NULL;
    return pack(b, SCHEME_FP8_DYNAMIC, e);
}

static double cpu_seconds(void)
{
    return (double)clock() / CLOCKS_PER_SEC;
}

static bool measure(struct bench *b, const char *what, double *read,
                    bool (*run)(struct bench *, struct err *), struct err *e)
{
    double least = INFINITY, least_cpu = INFINITY, bytes = (double)b->n_used * MATRIX_BYTES;
    for (int i = 0; i < RUNS; i++) {
        double start = clock_seconds(), cpu = cpu_seconds();
        if (!run(b, e)) return false;
        least = fmin(least, clock_seconds() - start);
        least_cpu = fmin(least_cpu, cpu_seconds() - cpu);
    }
    double rate = bytes / least;
    if (!*read) *read = rate;
    printf("%s,%d,%.1f,%.4f,%.4f,%.0f,%.3f,%.0f\n", what, pool_threads(b->packer.pool), bytes * 1e-6, least,
           least_cpu, rate * 1e-6, rate / *read, bytes / least_cpu * 1e-6);
    fflush(stdout);
    return true;
}

/* Sums of four uniform numbers: bell-shaped, as weights are. */
static void fill(uint8_t *data, int64_t n)
{
    uint64_t seed = 1;
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        int sum =
            (int)(seed >> 56) + (int)(seed >> 48 & 255) + (int)(seed >> 40 & 255) + (int)(seed >> 32 & 255);
        bf16 w = bf16_from_f32((float)(sum - 510) * 0x1p-13f);
        memcpy(data + 2 * i, &w, 2);
    }
}

static bool make(struct bench *b, struct err *e)
{
    uint64_t bytes = (uint64_t)b->experts * PARTS * MATRIX_BYTES;
    b->tensor = (struct tensor){ .name = "experts", .dtype = DTYPE_BF16, .bytes = bytes };
    b->plan.n_matrices = (size_t)b->experts * PARTS;
    b->plan.matrices = calloc(b->plan.n_matrices, sizeof *b->plan.matrices);
    b->data = aligned_alloc(4096, bytes);
    b->copy = aligned_alloc(4096, bytes);
    if (!b->plan.matrices || !b->data || !b->copy) return err_memory(e, "weights", 2 * bytes);
    fill(b->data, (int64_t)(bytes / 2));
    memset(b->copy, 1, bytes);
    for (size_t i = 0; i < b->plan.n_matrices; i++) {
        bool is_down = i % PARTS == 2;
        b->plan.matrices[i] = (struct matrix){ .source = &b->tensor,
                                               .module = "module",
                                               .data = b->data + i * MATRIX_BYTES,
                                               .rows = is_down ? 2048 : 512,
                                               .cols = is_down ? 512 : 2048 };
    }
    return true;
}

static bool measure_all(struct bench *b, int threads, struct err *e)
{
    double read = 0;
    b->n_used = b->plan.n_matrices;
    bool ok = packer_init(&b->packer, &b->plan, threads, e);
    ok = ok && measure(b, "read", &read, run_read, e) && measure(b, "memcpy", &read, run_copy, e) &&
         measure(b, "absmax", &read, run_absmax, e) && measure(b, "nearest", &read, run_nearest, e) &&
         measure(b, "fp8", &read, run_fp8, e);
    b->n_used = (size_t)(b->experts + 7) / 8 * PARTS;
    ok = ok && measure(b, "mse", &read, run_mse, e);
    packer_deinit(&b->packer);
    return ok;
}

int main(int argc, char **argv)
{
    struct err e = { 0 };
    struct bench *b = aligned_alloc(64, sizeof *b);
    if (!b) return 1;
    memset(b, 0, sizeof *b);
    b->experts = argc > 1 ? atoll(argv[1]) : 256;
    bool ok = b->experts > 0 ? make(b, &e) : err_set(&e, ERR_ARGUMENT, "usage: bench_pack [EXPERTS]");
    if (ok)
        printf(
            "what,threads,source_mb,seconds,cpu_seconds,source_mb_per_s,share_of_read,source_mb_per_cpu_s\n");
    for (int threads = 1; ok && threads <= 2; threads++) ok = measure_all(b, threads, &e);
    if (!ok) fprintf(stderr, "bench_pack: %s\n", e.text);
    free(b->plan.matrices);
    free(b->data);
    free(b->copy);
    free(b);
    return ok ? 0 : 1;
}
