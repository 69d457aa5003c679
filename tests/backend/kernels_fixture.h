/* What the cases of test_kernels.c share: the two backends, random numbers, matrices between guards, weights
 * of both. */
#ifndef TESTS_KERNELS_FIXTURE_H
#define TESTS_KERNELS_FIXTURE_H
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "backend/ops.h"
#include "backend/rounding.h"
#include "num/e4m3.h"
#include "num/fp8.h"
#include "num/nvfp4.h"
#include "support/models.h"
#include <jansson.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state_of_random = 1;

static uint32_t random_u32(void)
{
    state_of_random = state_of_random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state_of_random >> 32);
}

static int64_t random_below(int64_t n)
{
    return (int64_t)(random_u32() % (uint64_t)n);
}

static float random_normal(void)
{
    float s = 0;
    for (int i = 0; i < 6; i++) s += (float)random_u32() * 0x1p-32f - 0.5f;
    return s * 1.4f;
}

static struct backend ref, cpu; /* cpu: the one that is tested, whatever it runs on */
static bool rounded;            /* both may round inputs */
static bool bf16_inputs;        /* of a GPU: it may round inputs of products; the tests' are BF16 numbers */

/* Memory that ref and the tested backend both work on. A GPU's is the host's too (shared_memory). */
static bool on_device(void)
{
    return strcmp(cpu.ops->name, "cuda") == 0;
}

static void *take(size_t bytes)
{
    void *p;
    struct err e = { 0 };
    if (!on_device()) return malloc(bytes);
    must(cpu.ops->memory_create(cpu.queue, &p, bytes, &e), &e);
    return p;
}

static void give(void *p)
{
    if (on_device())
        cpu.ops->memory_free(cpu.queue, p);
    else
        free(p);
}

/* To be called before what the tested backend wrote is looked at. */
static void finish(void)
{
    struct err e = { 0 };
    must(cpu.ops->wait(cpu.queue, &e), &e);
}

/* Matrices with guards. */

enum { GUARD = 32 };
static const uint32_t POISON = 0x7fc0dead;

struct guarded {
    struct mat m;
    uint32_t *all;
    int64_t n, width; /* width: columns of each row that may be written */
};

static struct guarded guarded(int64_t rows, int64_t cols, int64_t pad)
{
    struct guarded g;
    g.n = rows * (cols + pad) + 2 * GUARD;
    g.width = cols;
    g.all = take((size_t)g.n * 4);
    for (int64_t i = 0; i < g.n; i++) g.all[i] = POISON;
    g.m = (struct mat){ (float *)g.all + GUARD, rows, cols, cols + pad };
    return g;
}

/* Matrices of `rows` rows; where `joined` each row is a part of a longer one, in their order, and the first
 * has the memory of all. */
static void guarded_beside(bool joined, int64_t rows, int n, struct guarded *const *out, const int64_t *cols)
{
    int64_t all = 0;
    for (int i = 0; i < n; i++) all += cols[i];
    for (int i = 0; i < n; i++)
        if (!joined || i == 0) {
            *out[i] = guarded(rows, joined ? all : cols[i], i % 2 + 1);
            out[i]->m.cols = cols[i];
        } else {
            struct mat before = out[i - 1]->m;
            *out[i] = (struct guarded){ .m = { before.data + before.cols, rows, cols[i], before.stride } };
        }
}

static void fill(struct mat m, float scale)
{
    for (int64_t r = 0; r < m.rows; r++)
        for (int64_t c = 0; c < m.cols; c++) {
            float x = random_below(10) == 0 ? 0 : random_normal() * scale;
            m.data[r * m.stride + c] = bf16_inputs ? bf16_round(x) : x;
        }
}

static struct guarded filled(int64_t rows, int64_t cols, int64_t pad, float scale)
{
    struct guarded g = guarded(rows, cols, pad);
    fill(g.m, scale);
    return g;
}

static struct guarded copy_of(const struct guarded *g)
{
    struct guarded c = *g;
    finish();
    c.all = take((size_t)g->n * 4);
    memcpy(c.all, g->all, (size_t)g->n * 4);
    c.m.data = (float *)c.all + GUARD;
    return c;
}

static void check_guards(const struct guarded *g, const char *what)
{
    finish();
    for (int64_t i = 0; i < g->n; i++) {
        int64_t at = i - GUARD;
        bool inside = at >= 0 && at < g->m.rows * g->m.stride && at % g->m.stride < g->width;
        if (!inside && g->all[i] != POISON) fail_msg("%s on %s wrote outside at %d", what, cpu.name, (int)at);
    }
}

static void drop(struct guarded *g)
{
    give(g->all);
}

/* An empty matrix for each backend. */
static void both(struct guarded *want, struct guarded *got, int64_t rows, int64_t cols)
{
    *want = guarded(rows, cols, 1);
    *got = guarded(rows, cols, 3);
}

/* |got - want| <= relative * |want| + absolute; a NaN fails. */
static void check_close(const struct guarded *got, const struct guarded *want, double relative,
                        double absolute, const char *what)
{
    check_guards(got, what);
    for (int64_t r = 0; r < want->m.rows; r++)
        for (int64_t c = 0; c < want->m.cols; c++) {
            double g = got->m.data[r * got->m.stride + c], w = want->m.data[r * want->m.stride + c];
            if (!(fabs(g - w) <= relative * fabs(w) + absolute))
                fail_msg("%s on %s, [%d x %d]: (%d, %d) is %.9g, ref %.9g", what, cpu.name, (int)want->m.rows,
                         (int)want->m.cols, (int)r, (int)c, g, w);
        }
}

/* Weights. */

struct made {
    struct weight_source src;
    struct weight *ref, *cpu;
    void *data, *scale;
};

static struct made make_weight(enum weight_format format, int64_t rows, int64_t cols, enum weight_input input)
{
    static const int bytes[] = { 2, 2, 4, 1, 1, 1 };
    struct made w = { .src = { .format = format,
                               .rows = rows,
                               .cols = cols,
                               .input = input,
                               .input_global = input == INPUT_FP8_FIXED ? 0.01f : 600 } };
    int64_t n = rows * cols;
    uint8_t *data = w.data = malloc((size_t)(n * bytes[format]) + 1);
    for (int64_t i = 0; i < n; i++) {
        float x = random_normal() * 0.1f;
        uint16_t b = bf16_from_f32(x).bits;
        if (format == WEIGHT_BF16)
            memcpy(data + 2 * i, &b, 2);
        else if (format == WEIGHT_F16)
            memcpy(data + 2 * i, &(uint16_t){ (uint16_t)(random_u32() & 0x8fff) }, 2);
        else if (format == WEIGHT_F32)
            memcpy(data + 4 * i, &x, 4);
        else {
            data[i] = (uint8_t)random_u32();
            if (format != WEIGHT_NVFP4 && (data[i] & 0x7f) == 0x7f) data[i] = 0;
        }
    }
    if (format == WEIGHT_FP8 || format == WEIGHT_FP8_BLOCK) {
        int64_t n_scales = format == WEIGHT_FP8 ? rows : fp8_blocks(rows) * fp8_blocks(cols);
        float *scale = w.scale = malloc((size_t)n_scales * 4);
        for (int64_t r = 0; r < n_scales; r++)
            scale[r] = bf16_round(0.001f + (float)random_below(100) * 1e-4f);
    } else if (format == WEIGHT_NVFP4) {
        uint8_t *scale = w.scale = malloc((size_t)(n / 16) + 1);
        bool tiny = random_below(2), zeros = random_below(2); /* what is tiny has kernels of its own */
        for (int64_t i = 0; i < n / 16; i++) {
            int64_t code = tiny ? random_below(0x7f) : 0x20 + random_below(0x5f);
            if (zeros && random_below(7) == 0) code = 0;
            scale[i] = (uint8_t)(code | (random_below(9) == 0 ? 0x80 : 0));
        }
        w.src.global = 900;
    }
    w.src.data = w.data;
    w.src.scale = w.scale;
    struct err e = { 0 };
    must(ref.ops->weight_create(ref.queue, &w.ref, &w.src, &e), &e);
    must(cpu.ops->weight_create(cpu.queue, &w.cpu, &w.src, &e), &e);
    return w;
}

static void drop_weight(struct made *w)
{
    ref.ops->weight_free(ref.queue, w->ref);
    cpu.ops->weight_free(cpu.queue, w->cpu);
    free(w->data);
    free(w->scale);
}

static void reserve(int64_t rows, int64_t cols, int64_t intermediate, int picks, int n_experts)
{
    struct step_limits l = { rows, cols, 1024, intermediate, picks, n_experts, 0, 256 };
    struct err e = { 0 };
    must(ref.ops->reserve(ref.queue, &l, &e), &e);
    must(cpu.ops->reserve(cpu.queue, &l, &e), &e);
}

#endif
