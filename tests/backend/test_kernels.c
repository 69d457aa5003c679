/* Every operation of every backend and ISA mask against ref: random shapes with ragged tails, random strides,
 * inputs with zeros, extremes and tiny scales, outputs poisoned beforehand with guards on both sides. A
 * failure prints the mask, the shape and the first bad index; the sequence of trials is fixed by SEED
 * (environment QUENCH_SEED). */
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
    int64_t n;
};

static struct guarded guarded(int64_t rows, int64_t cols, int64_t pad)
{
    struct guarded g;
    g.n = rows * (cols + pad) + 2 * GUARD;
    g.all = take((size_t)g.n * 4);
    for (int64_t i = 0; i < g.n; i++) g.all[i] = POISON;
    g.m = (struct mat){ (float *)g.all + GUARD, rows, cols, cols + pad };
    return g;
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
        bool inside = at >= 0 && at < g->m.rows * g->m.stride && at % g->m.stride < g->m.cols;
        if (!inside && g->all[i] != POISON) fail_msg("%s on %s wrote outside at %d", what, cpu.name, (int)at);
    }
}

static void drop(struct guarded *g)
{
    give(g->all);
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
        for (int64_t i = 0; i < n / 16; i++)
            scale[i] = (uint8_t)(random_below(0x7f) | (random_below(9) == 0 ? 0x80 : 0)); /* tiny ones too */
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

/* Products. */

/* |got - want| <= 8 eps * sum|x * w|, what entered the sum, found by running ref on absolute values. Tensor
 * cores cut off what does not fit the sum so far: a unit for each 16 columns of each of three parts, where a
 * GPU has many rows. */
static void check_product(struct made *w, const struct guarded *x, const struct guarded *got,
                          const char *what)
{
    struct guarded want = guarded(x->m.rows, w->src.rows, 0), size = guarded(x->m.rows, w->src.rows, 0);
    struct made a = make_weight(WEIGHT_F32, w->src.rows, w->src.cols, INPUT_AS_IS);
    struct guarded ax = copy_of(x), one = guarded(w->src.cols, w->src.cols, 0),
                   dense = guarded(w->src.cols, w->src.rows, 0);
    /* |W| through ref itself: W times the identity gives its columns */
    for (int64_t i = 0; i < w->src.cols; i++)
        for (int64_t c = 0; c < w->src.cols; c++) one.m.data[i * w->src.cols + c] = i == c;
    enum weight_input input = w->ref->input;
    w->ref->input = INPUT_AS_IS;
    ref.ops->matmul(ref.queue, dense.m, one.m, w->ref);
    w->ref->input = input;
    float *abs_w = malloc((size_t)(w->src.rows * w->src.cols) * 4);
    for (int64_t r = 0; r < w->src.rows; r++)
        for (int64_t c = 0; c < w->src.cols; c++)
            abs_w[r * w->src.cols + c] = fabsf(dense.m.data[c * w->src.rows + r]);
    struct weight_source src = {
        .format = WEIGHT_F32, .rows = w->src.rows, .cols = w->src.cols, .data = abs_w
    };
    struct weight *absolute;
    struct err e = { 0 };
    must(ref.ops->weight_create(ref.queue, &absolute, &src, &e), &e);
    for (int64_t r = 0; r < ax.m.rows; r++) {
        float *row = ax.m.data + r * ax.m.stride;
        float scale = rounding_apply(row, row, ax.m.cols, rounding_of(w->ref, rounded), w->ref);
        for (int64_t c = 0; c < ax.m.cols; c++) row[c] = fabsf(row[c] * scale);
    }
    ref.ops->matmul(ref.queue, want.m, x->m, w->ref);
    ref.ops->matmul(ref.queue, size.m, ax.m, absolute);
    check_guards(got, what);
    for (int64_t r = 0; r < want.m.rows; r++)
        for (int64_t c = 0; c < want.m.cols; c++) {
            double g = got->m.data[r * got->m.stride + c], v = want.m.data[r * want.m.stride + c];
            double units = on_device() && x->m.rows > ROWS_EXACT ? 8 + 3 * (double)w->src.cols / 16 : 8;
            double bound = units * (double)FLT_EPSILON * (double)size.m.data[r * size.m.stride + c];
            if (!(fabs(g - v) <= bound))
                fail_msg(
                    "%s on %s, %d rows, [%d x %d] format %d, input %d: (%d, %d) is %.9g, ref %.9g, bound "
                    "%.3g",
                    what, cpu.name, (int)x->m.rows, (int)w->src.rows, (int)w->src.cols, (int)w->src.format,
                    (int)w->src.input, (int)r, (int)c, g, v, bound);
        }
    ref.ops->weight_free(ref.queue, absolute);
    free(abs_w);
    drop_weight(&a);
    struct guarded *all[] = { &want, &size, &ax, &one, &dense };
    for (int i = 0; i < 5; i++) drop(all[i]);
}

static void product_case(enum weight_format f, int64_t n, int64_t rows, int64_t cols, enum weight_input input)
{
    struct made w = make_weight(f, rows, cols, input);
    struct guarded x = filled(n, cols, random_below(5), 1), y = guarded(n, rows, random_below(5));
    cpu.ops->matmul(cpu.queue, y.m, x.m, w.cpu);
    check_product(&w, &x, &y, "matmul");
    struct guarded one = guarded(1, rows, 0);
    /* a row alone has the bits it has among others */
    int64_t r = random_below(n);
    cpu.ops->matmul(cpu.queue, one.m, (struct mat){ x.m.data + r * x.m.stride, 1, cols, cols }, w.cpu);
    finish();
    bool exact = n <= ROWS_EXACT || (f == WEIGHT_NVFP4 && !on_device());
    if (exact) assert_memory_equal(one.m.data, y.m.data + r * y.m.stride, (size_t)rows * 4);
    drop(&one);
    drop(&x);
    drop(&y);
    drop_weight(&w);
}

static void products(void)
{
    static const int64_t ns[] = { 1, 2, 3, 7, 16, 17, 33, 70 }, rows[] = { 1, 15, 16, 17, 48, 131 };
    static const int64_t cols[] = { 16, 32, 48, 256, 272, 528 }, odd[] = { 1, 7, 100, 257 };
    static const int64_t blocks[] = { 1, 127, 128, 129, 300 };
    reserve(70, 1024, 64, 2, 4);
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++)
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            enum weight_format f = (enum weight_format)random_below(6);
            product_case(f, ns[i], rows[r], cols[random_below(6)],
                         f == WEIGHT_FP8 && random_below(2) ? INPUT_FP8_ROW : INPUT_AS_IS);
            product_case(WEIGHT_NVFP4, ns[i], rows[r], cols[random_below(6)], INPUT_AS_IS);
            product_case(WEIGHT_NVFP4, ns[i], rows[r], cols[random_below(6)], INPUT_NVFP4);
            product_case(WEIGHT_FP8, ns[i], rows[r], odd[random_below(4)], INPUT_FP8_ROW);
            product_case(WEIGHT_BF16, ns[i], rows[r], odd[random_below(4)], INPUT_AS_IS);
            product_case(WEIGHT_FP8_BLOCK, ns[i], blocks[random_below(5)], odd[random_below(4)], INPUT_AS_IS);
            if (on_device()) continue; /* refused: inputs_not_implemented_are_refused */
            product_case(WEIGHT_FP8_BLOCK, ns[i], blocks[random_below(5)], odd[random_below(4)],
                         INPUT_FP8_GROUPS);
            product_case(WEIGHT_FP8, ns[i], rows[r], odd[random_below(4)], INPUT_FP8_FIXED);
        }
}

static void bind(struct experts *x)
{
    struct err e = { 0 };
    must(cpu.ops->experts_bind(cpu.queue, x, &e), &e);
}

static void experts_case(enum weight_format f, int64_t n, int64_t hidden, int64_t inner, int n_experts, int k)
{
    struct made w[3][8];
    struct weight *of_ref[24], *of_cpu[24];
    for (int e = 0; e < n_experts; e++)
        for (int m = 0; m < 3; m++) {
            w[m][e] = make_weight(f, m < 2 ? inner : hidden, m < 2 ? hidden : inner,
                                  f == WEIGHT_FP8 ? INPUT_FP8_ROW : INPUT_AS_IS);
            of_ref[m * n_experts + e] = w[m][e].ref;
            of_cpu[m * n_experts + e] = w[m][e].cpu;
        }
    struct experts xr = { n_experts, of_ref, of_ref + n_experts, of_ref + 2 * n_experts, NULL };
    struct experts xc = { n_experts, of_cpu, of_cpu + n_experts, of_cpu + 2 * n_experts, NULL };
    bind(&xc);
    struct guarded x = filled(n, hidden, 3, 1), want = guarded(n, hidden, 0), got = guarded(n, hidden, 2);
    struct guarded logits = filled(n, n_experts, 1, 3);
    int32_t *id[] = { take((size_t)(n * k) * 4), take((size_t)(n * k) * 4) };
    float *weight[] = { take((size_t)(n * k) * 4), take((size_t)(n * k) * 4) };
    struct picks pr = { id[0], weight[0], k }, pc = { id[1], weight[1], k };
    ref.ops->route(ref.queue, &pr, logits.m);
    cpu.ops->route(cpu.queue, &pc, logits.m);
    finish();
    assert_memory_equal(id[0], id[1], (size_t)(n * k) * 4);
    for (int64_t i = 0; i < n * k; i++) assert_true(fabsf(weight[0][i] - weight[1][i]) <= 1e-6f);
    ref.ops->experts(ref.queue, want.m, x.m, &pr, &xr);
    cpu.ops->experts(cpu.queue, got.m, x.m, &pr, &xc);
    /* two products deep: bounded by what a row holds, not by each element */
    double top = 0;
    for (int64_t i = 0; i < n * hidden; i++) top = fmax(top, fabs((double)want.m.data[i]));
    bool rounds = f == WEIGHT_FP8 || rounded ||
                  (bf16_inputs && n > ROWS_EXACT); /* a hidden value on the edge may round the other way */
    check_close(&got, &want, 1e-5, (rounds ? 2e-2 : 4e-6) * top, "experts");
    struct guarded one = guarded(1, hidden, 0);
    struct picks last = { id[0] + (n - 1) * k, weight[0] + (n - 1) * k, k };
    cpu.ops->experts(cpu.queue, one.m, mat_of(x.m.data + (n - 1) * x.m.stride, 1, hidden), &last, &xc);
    finish();
    if (n <= ROWS_EXACT)
        assert_memory_equal(one.m.data, got.m.data + (n - 1) * got.m.stride, (size_t)hidden * 4);
    struct guarded *all[] = { &x, &want, &got, &logits, &one };
    for (int i = 0; i < 5; i++) drop(all[i]);
    for (int i = 0; i < 2; i++) give(id[i]), give(weight[i]);
    cpu.ops->experts_unbind(cpu.queue, &xc);
    for (int e = 0; e < n_experts; e++)
        for (int m = 0; m < 3; m++) drop_weight(&w[m][e]);
}

static void experts(void)
{
    static const enum weight_format formats[] = { WEIGHT_NVFP4, WEIGHT_BF16, WEIGHT_FP8, WEIGHT_FP8_BLOCK };
    reserve(64, 256, 80, 4, 8);
    for (int f = 0; f < 4; f++)
        for (int i = 0; i < 6; i++)
            experts_case(formats[f], 1 + random_below(40), 16 * (1 + random_below(12)),
                         16 * (1 + random_below(5)), 8, 1 + (int)random_below(4));
}

/* FP4 codes of the hidden rows jump where ref and cpu round differently, so the experts are set against their
 * own products on the same backend, and those against ref above. */
static void fp4_experts_case(int64_t n, int64_t hidden, int64_t inner)
{
    struct made w[3];
    for (int m = 0; m < 3; m++)
        w[m] = make_weight(WEIGHT_NVFP4, m < 2 ? inner : hidden, m < 2 ? hidden : inner, INPUT_NVFP4);
    struct experts x1 = { 1, &w[0].cpu, &w[1].cpu, &w[2].cpu, NULL };
    bind(&x1);
    struct guarded x = filled(n, hidden, 3, 1), want = guarded(n, hidden, 0), got = guarded(n, hidden, 2);
    struct guarded gate = guarded(n, inner, 0), up = guarded(n, inner, 0);
    int32_t *id = take(64 * 4);
    float *weight = take(64 * 4);
    for (int i = 0; i < 64; i++) id[i] = 0, weight[i] = 1;
    cpu.ops->experts(cpu.queue, got.m, x.m, &(struct picks){ id, weight, 1 }, &x1);
    cpu.ops->matmul(cpu.queue, gate.m, x.m, w[0].cpu);
    cpu.ops->matmul(cpu.queue, up.m, x.m, w[1].cpu);
    cpu.ops->silu_mul(cpu.queue, gate.m, gate.m, up.m);
    cpu.ops->matmul(cpu.queue, want.m, gate.m, w[2].cpu);
    check_close(&got, &want, 1e-6, 0, "experts with FP4 activations");
    struct guarded *all[] = { &x, &want, &got, &gate, &up };
    for (int i = 0; i < 5; i++) drop(all[i]);
    give(id);
    give(weight);
    cpu.ops->experts_unbind(cpu.queue, &x1);
    for (int m = 0; m < 3; m++) drop_weight(&w[m]);
}

static void fp4_experts(void)
{
    reserve(64, 256, 80, 4, 8);
    for (int i = 0; i < 6; i++)
        fp4_experts_case(1 + random_below(40), 16 * (1 + random_below(12)), 16 * (1 + random_below(5)));
}

/* Rows. */

static void both(struct guarded *want, struct guarded *got, int64_t rows, int64_t cols)
{
    *want = guarded(rows, cols, 1);
    *got = guarded(rows, cols, 3);
}

static void row_case(int64_t n, int64_t cols)
{
    struct guarded x = filled(n, cols, 2, 3), z = filled(n, cols, 1, 8), gain = filled(1, cols, 0, 1),
                   gate = filled(n, 1, 2, 4);
    struct guarded want, got;
    both(&want, &got, n, cols);
    ref.ops->rmsnorm(ref.queue, want.m, x.m, gain.m.data, 1e-6f);
    cpu.ops->rmsnorm(cpu.queue, got.m, x.m, gain.m.data, 1e-6f);
    check_close(&got, &want, 2e-6, 1e-30, "rmsnorm");
    ref.ops->silu_mul(ref.queue, want.m, z.m, x.m);
    cpu.ops->silu_mul(cpu.queue, got.m, z.m, x.m);
    check_close(&got, &want, 1e-6, 1e-30, "silu_mul");
    finish();
    fill(want.m, 1);
    for (int64_t r = 0; r < n; r++)
        memcpy(got.m.data + r * got.m.stride, want.m.data + r * want.m.stride, (size_t)cols * 4);
    ref.ops->add(ref.queue, want.m, x.m);
    cpu.ops->add(cpu.queue, got.m, x.m);
    check_close(&got, &want, 0, 0, "add");
    ref.ops->add_gated(ref.queue, want.m, x.m, gate.m);
    cpu.ops->add_gated(cpu.queue, got.m, x.m, gate.m);
    check_close(&got, &want, 1e-6, 1e-5, "add_gated");
    ref.ops->gated_norm(ref.queue, want.m, x.m, z.m, gain.m.data, (int)cols, 1e-6f);
    cpu.ops->gated_norm(cpu.queue, got.m, x.m, z.m, gain.m.data, (int)cols, 1e-6f);
    check_close(&got, &want, 3e-6, 1e-30, "gated_norm");
    struct guarded lw = copy_of(&z), lg = copy_of(&z), other = filled(n, cols, 1, 8);
    ref.ops->log_softmax(ref.queue, lw.m);
    cpu.ops->log_softmax(cpu.queue, lg.m);
    check_close(&lg, &lw, 1e-6, 4e-6, "log_softmax");
    ref.ops->log_softmax(ref.queue, other.m);
    double kr[64], kc[64];
    ref.ops->divergence(ref.queue, kr, lw.m, other.m);
    cpu.ops->divergence(cpu.queue, kc, lw.m, other.m);
    float pr[64], pc[64];
    int32_t column[64], best[2][64];
    for (int64_t i = 0; i < n; i++) column[i] = (int32_t)random_below(cols);
    ref.ops->pick(ref.queue, pr, x.m, column);
    cpu.ops->pick(cpu.queue, pc, x.m, column);
    ref.ops->argmax(ref.queue, best[0], x.m);
    cpu.ops->argmax(cpu.queue, best[1], x.m);
    finish();
    assert_memory_equal(pr, pc, (size_t)n * 4);
    assert_memory_equal(best[0], best[1], (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) assert_true(fabs(kr[i] - kc[i]) <= 1e-5 * fabs(kr[i]) + 1e-5);
    int64_t index[] = { n - 1, 0, n / 2 };
    struct guarded picked = guarded(3, cols, 1), picked_ref = guarded(3, cols, 1);
    ref.ops->gather(ref.queue, picked_ref.m, x.m, index);
    cpu.ops->gather(cpu.queue, picked.m, x.m, index);
    check_close(&picked, &picked_ref, 0, 0, "gather");
    struct guarded *all[] = { &x, &z, &gain, &gate, &want, &got, &lw, &lg, &other, &picked, &picked_ref };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

static void embed_case(enum weight_format f)
{
    struct made w = make_weight(f, 50, 37, INPUT_AS_IS);
    struct weight_source table = w.src;
    table.is_table = true;
    struct weight *tr, *tc;
    struct err e = { 0 };
    must(ref.ops->weight_create(ref.queue, &tr, &table, &e), &e);
    must(cpu.ops->weight_create(cpu.queue, &tc, &table, &e), &e);
    float own[37];
    for (int i = 0; i < 37; i++) own[i] = (float)i;
    struct row rows[] = { { .token = 49 }, { .token = 0 }, { .embedding = own }, { .token = 7 } };
    struct step_rows s = { .rows = rows, .n = 4 };
    struct guarded want, got;
    both(&want, &got, 4, 37);
    ref.ops->embed(ref.queue, want.m, tr, &s);
    cpu.ops->embed(cpu.queue, got.m, tc, &s);
    check_close(&got, &want, 0, 0, "embed");
    assert_true(got.m.data[2 * got.m.stride + 5] == 5.0f);
    ref.ops->weight_free(ref.queue, tr);
    cpu.ops->weight_free(cpu.queue, tc);
    drop(&want);
    drop(&got);
    drop_weight(&w);
}

static void rows(void)
{
    static const int64_t cols[] = { 1, 3, 4, 15, 16, 17, 64, 100, 129, 1000 };
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) row_case(1 + random_below(40), cols[i]);
    embed_case(WEIGHT_BF16);
    embed_case(WEIGHT_F16);
    embed_case(WEIGHT_F32);
}

/* What a vision tower needs. */

static void vision_rows_case(int64_t n, int64_t cols)
{
    struct guarded x = filled(n, cols, 2, 3), gain = filled(1, cols, 0, 1), bias = filled(1, cols, 0, 1),
                   want, got;
    both(&want, &got, n, cols);
    for (int64_t r = 0; r < n; r++) /* a mean far from zero, as towers have it */
        for (int64_t c = 0; c < cols; c++) x.m.data[r * x.m.stride + c] += 20;
    ref.ops->layer_norm(ref.queue, want.m, x.m, gain.m.data, bias.m.data, 1e-6f);
    cpu.ops->layer_norm(cpu.queue, got.m, x.m, gain.m.data, bias.m.data, 1e-6f);
    /* the mean's rounding, set against the deviation: what a row of one or two columns may have little of */
    check_close(&got, &want, 1e-5, cols < 3 ? 1e-1 : 2e-5, "layer_norm");
    for (int f = ACTIVATION_NONE; f <= ACTIVATION_GELU_TANH; f++) {
        struct guarded a = filled(n, cols, 1, 3), b = copy_of(&a);
        ref.ops->add_bias(ref.queue, a.m, bias.m.data, (enum activation)f);
        cpu.ops->add_bias(cpu.queue, b.m, bias.m.data, (enum activation)f);
        check_close(&b, &a, 2e-6, 2e-6, "add_bias");
        drop(&a);
        drop(&b);
    }
    struct guarded *all[] = { &x, &gain, &bias, &want, &got };
    for (int i = 0; i < 5; i++) drop(all[i]);
}

static void attention_all_case(int64_t n, int heads, int64_t dim)
{
    struct guarded qkv = filled(n, 3 * heads * dim, 5, 1), angle = filled(n, dim / 2, 3, 200),
                   turned = copy_of(&qkv), want, got;
    struct mat qk = { qkv.m.data, n, 2 * heads * dim, qkv.m.stride };
    ref.ops->rotate(ref.queue, qk, 2 * heads, angle.m);
    qk.data = turned.m.data;
    cpu.ops->rotate(cpu.queue, qk, 2 * heads, angle.m);
    check_close(&turned, &qkv, 1e-6, 2e-6, "rotate");
    both(&want, &got, n, heads * dim);
    ref.ops->attention_all(ref.queue, want.m, qkv.m, heads);
    cpu.ops->attention_all(cpu.queue, got.m, qkv.m, heads);
    check_close(&got, &want, 1e-5, 1e-5, "attention_all");
    struct guarded *all[] = { &qkv, &angle, &turned, &want, &got };
    for (int i = 0; i < 5; i++) drop(all[i]);
}

static void vision(void)
{
    static const int64_t cols[] = { 1, 2, 15, 16, 17, 64, 100, 1152 }, ns[] = { 1, 15, 64, 65, 130, 200 };
    static const int64_t dims[] = { 4, 16, 32, 72, 20, 128 };
    uint64_t kept =
        state_of_random; /* the other families' cases stay those that they have without this one */
    reserve(64, 3 * 3 * 128, 64, 2, 4);
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) vision_rows_case(1 + random_below(40), cols[i]);
    for (int i = 0; i < 6; i++)
        for (int d = 0; d < 6; d += 1 + i % 2) attention_all_case(ns[i], 1 + (int)random_below(3), dims[d]);
    state_of_random = kept;
}

/* Sequences. */

struct plan {
    struct row rows[300];
    struct span spans[3];
    int32_t pages[3][8];
    struct step_rows step;
};

static void make_plan(struct plan *p, const int64_t *n, const int64_t *past)
{
    p->step = (struct step_rows){ p->rows, 0, p->spans, 3 };
    for (int s = 0; s < 3; s++) {
        for (int i = 0; i < 8; i++) p->pages[s][i] = (2 - s) + 3 * (7 - i); /* scattered over 24 pages */
        p->spans[s] = (struct span){
            .first = p->step.n, .n = n[s], .past = past[s], .pages = p->pages[s], .slot = 2 - s
        };
        for (int64_t i = 0; i < n[s]; i++) {
            int32_t t = (int32_t)(past[s] + i);
            p->rows[p->step.n++] = (struct row){ .position = { t, t / 2 + 1, 3 * t } };
        }
    }
}

static void attention_case(enum kv_dtype dtype, int n_heads, int n_kv, int dim, const int64_t *n,
                           const int64_t *past)
{
    static const int bytes[] = { 4, 2, 1 };
    struct plan p;
    make_plan(&p, n, past);
    size_t size = (size_t)24 * KV_PAGE * (size_t)(n_kv * dim);
    uint8_t *memory[4];
    for (int i = 0; i < 4; i++) memory[i] = take(size * 4);
    struct kv_cache kr = { memory[0], memory[1], dtype, n_kv, dim },
                    kc = { memory[2], memory[3], dtype, n_kv, dim };
    for (size_t i = 0; i < size; i++) { /* what earlier steps left */
        float x = random_normal();
        if (dtype == KV_F32)
            ((float *)memory[0])[i] = x, ((float *)memory[1])[i] = -x;
        else if (dtype == KV_BF16)
            ((bf16 *)memory[0])[i] = bf16_from_f32(x), ((bf16 *)memory[1])[i] = bf16_from_f32(-x);
        else
            memory[0][i] = e4m3_from_f32(x).bits, memory[1][i] = e4m3_from_f32(-x).bits;
    }
    memcpy(memory[2], memory[0], size * (size_t)bytes[dtype]);
    memcpy(memory[3], memory[1], size * (size_t)bytes[dtype]);
    int64_t rows = p.step.n;
    struct guarded q = filled(rows, (int64_t)n_heads * 2 * dim, 3, 2),
                   k = filled(rows, (int64_t)n_kv * dim, 0, 1);
    struct guarded v = filled(rows, (int64_t)n_kv * dim, 0, 600), gain = filled(1, dim, 0, 1),
                   qr = copy_of(&q), want, got;
    float *inverse = take(12);
    uint8_t *axis = take(3);
    memcpy(inverse, (float[]){ 1, 0.3f, 0.01f }, 12);
    memcpy(axis, (uint8_t[]){ 0, 1, 2 }, 3);
    struct rope rope = { dim >= 6 ? 3 : 0, inverse, axis };
    ref.ops->norm_rope(ref.queue, qr.m, n_heads, 2 * dim, dim, gain.m.data, 1e-6f, &rope, &p.step);
    cpu.ops->norm_rope(cpu.queue, q.m, n_heads, 2 * dim, dim, gain.m.data, 1e-6f, &rope, &p.step);
    check_close(&q, &qr, 4e-6, 4e-6, "norm_rope");
    ref.ops->kv_append(ref.queue, &kr, k.m, v.m, &p.step);
    cpu.ops->kv_append(cpu.queue, &kc, k.m, v.m, &p.step);
    finish();
    assert_memory_equal(memory[0], memory[2], size * (size_t)bytes[dtype]);
    assert_memory_equal(memory[1], memory[3], size * (size_t)bytes[dtype]);
    both(&want, &got, rows, (int64_t)n_heads * dim);
    ref.ops->attention(ref.queue, want.m, qr.m, n_heads, &kr, &p.step);
    cpu.ops->attention(cpu.queue, got.m, qr.m, n_heads, &kc, &p.step);
    check_close(&got, &want, 1e-5, 600 * 2e-5, "attention");
    struct guarded *all[] = { &q, &k, &v, &gain, &qr, &want, &got };
    for (int i = 0; i < 7; i++) drop(all[i]);
    for (int i = 0; i < 4; i++) give(memory[i]);
    give(inverse);
    give(axis);
}

static void delta_case(int key_heads, int group, int dk, int dv, int kernel, const int64_t *n)
{
    struct plan p;
    int64_t none[] = { 0, 0, 0 };
    make_plan(&p, n, none);
    struct delta_shape s = { key_heads, key_heads * group, dk, dv, kernel };
    int64_t channels = 2 * (int64_t)key_heads * dk + (int64_t)s.value_heads * dv, rows = p.step.n;
    struct guarded u = filled(rows, channels, 1, 1), w = filled(kernel, channels, 0, 0.5f), want, got;
    struct guarded cr = filled(3, (kernel - 1) * channels, 0, 1), cc = copy_of(&cr);
    struct guarded mr = filled(3, (int64_t)s.value_heads * dk * dv, 0, 0.3f), mc = copy_of(&mr);
    struct delta_state sr = { .matrix = mr.m.data, .conv = cr.m.data },
                       sc = { .matrix = mc.m.data, .conv = cc.m.data };
    both(&want, &got, rows, channels);
    ref.ops->conv(ref.queue, want.m, u.m, w.m.data, &sr, &s, &p.step);
    cpu.ops->conv(cpu.queue, got.m, u.m, w.m.data, &sc, &s, &p.step);
    check_close(&got, &want, 3e-6, 1e-6, "conv");
    check_close(&cc, &cr, 0, 0, "conv state");
    struct guarded a = filled(rows, s.value_heads, 1, 2), b = filled(rows, s.value_heads, 1, 2),
                   ac = copy_of(&a), bc = copy_of(&b);
    struct guarded A = filled(1, s.value_heads, 0, 1), bias = filled(1, s.value_heads, 0, 1),
                   qkv = copy_of(&want);
    struct guarded o, oc;
    both(&o, &oc, rows, (int64_t)s.value_heads * dv);
    ref.ops->delta(ref.queue, o.m, want.m, a.m, b.m, A.m.data, bias.m.data, &sr, &s, &p.step);
    cpu.ops->delta(cpu.queue, oc.m, qkv.m, ac.m, bc.m, A.m.data, bias.m.data, &sc, &s, &p.step);
    /* terms of up to 10 cancel in a chunk: 30 units of their last place */
    check_close(&oc, &o, 2e-5, 3e-5, "delta");
    check_close(&mc, &mr, 2e-5, 3e-5, "delta state");
    struct guarded *all[] = { &u, &w,  &want, &got, &cr,   &cc,  &mr, &mc, &a,
                              &b, &ac, &bc,   &A,   &bias, &qkv, &o,  &oc };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

static void sequences(void)
{
    static const int64_t n[][3] = { { 1, 1, 1 }, { 3, 1, 40 }, { 32, 33, 2 }, { 65, 2, 130 }, { 1, 64, 63 } };
    static const int64_t past[][3] = {
        { 0, 63, 64 }, { 5, 100, 0 }, { 0, 0, 1 }, { 200, 1, 127 }, { 300, 0, 65 }
    };
    static const int dims[] = { 16, 64, 128, 256, 20, 3 };
    reserve(300, 2048, 64, 2, 4);
    for (int i = 0; i < 5; i++)
        for (int d = 0; d < 6; d++) {
            int n_kv = 1 + (int)random_below(2), group = 1 + (int)random_below(3);
            attention_case((enum kv_dtype)((i + d) % 3), n_kv * group, n_kv, dims[d], n[i], past[i]);
        }
    for (int i = 0; i < 5; i++) {
        delta_case(1, 2, 4, 3, 4, n[i]);
        delta_case(2, 2, 16, 20, 4, n[i]);
        delta_case(2, 1, 128, 128, 4, n[i]);
        delta_case(1, 3, 20, 48, 2, n[i]);
    }
}

/* Logged spans: rows that may be taken back, against the same rows run as ever, with what became of them
 * known. All bits are the same, of outputs and of the state in the end. */
enum { LOG_ROWS = 9, LOG_STEPS = 6 };

struct logging {
    struct delta_shape shape;
    struct guarded taps, A, bias, matrix, conv, log; /* of 3 slots */
    struct guarded plain_matrix, plain_conv;         /* the state of rows run as ever */
};

static struct guarded run_rows(const struct backend *b, const struct logging *l,
                               const struct delta_state *state, const struct guarded in[3],
                               const struct step_rows *step)
{
    const struct delta_shape *s = &l->shape;
    struct guarded u = copy_of(&in[0]), a = copy_of(&in[1]), beta = copy_of(&in[2]);
    struct guarded qkv = guarded(step->n, u.m.cols, 0),
                   o = guarded(step->n, (int64_t)s->value_heads * s->value_dim, 1);
    b->ops->conv(b->queue, qkv.m, u.m, l->taps.m.data, state, s, step);
    b->ops->delta(b->queue, o.m, qkv.m, a.m, beta.m, l->A.m.data, l->bias.m.data, state, s, step);
    finish();
    drop(&u), drop(&a), drop(&beta), drop(&qkv);
    return o;
}

static void same_bits(const struct guarded *got, const struct guarded *want, const char *backend,
                      const char *what)
{
    for (int64_t r = 0; r < want->m.rows; r++)
        for (int64_t c = 0; c < want->m.cols; c++) {
            const float *g = got->m.data + r * got->m.stride + c, *w = want->m.data + r * want->m.stride + c;
            if (memcmp(g, w, sizeof *g) != 0)
                fail_msg("%s on %s: (%d, %d) of %d columns is %.9g, expected %.9g", what, backend, (int)r,
                         (int)c, (int)want->m.cols, (double)*g, (double)*w);
        }
}

/* Runs the rows of `step` as ever, then only the first kept[s] of each span from where they began. */
static struct guarded run_plain(const struct backend *b, struct logging *l, const struct guarded in[3],
                                const struct step_rows *step, const int64_t *kept)
{
    struct delta_state state = { .matrix = l->plain_matrix.m.data, .conv = l->plain_conv.m.data };
    struct span spans[3];
    struct step_rows plain = { step->rows, step->n, spans, 3 };
    struct guarded matrix = copy_of(&l->plain_matrix), conv = copy_of(&l->plain_conv);
    for (int s = 0; s < 3; s++) {
        spans[s] = step->spans[s];
        spans[s].logged = false;
        spans[s].kept = 0;
    }
    struct guarded o = run_rows(b, l, &state, in, &plain);
    for (int s = 0; s < 3; s++) {
        if (kept[s] == spans[s].n) continue;
        int slot = spans[s].slot;
        memcpy(l->plain_matrix.m.data + slot * matrix.m.cols, matrix.m.data + slot * matrix.m.cols,
               (size_t)matrix.m.cols * sizeof(float));
        memcpy(l->plain_conv.m.data + slot * conv.m.cols, conv.m.data + slot * conv.m.cols,
               (size_t)conv.m.cols * sizeof(float));
        if (kept[s] == 0) continue;
        struct span first = { .n = kept[s], .pages = spans[s].pages, .slot = slot };
        struct step_rows again = { step->rows, kept[s], &first, 1 };
        struct guarded rest[3], out;
        for (int i = 0; i < 3; i++) {
            rest[i] = guarded(kept[s], in[i].m.cols, 0);
            for (int64_t r = 0; r < kept[s]; r++)
                memcpy(rest[i].m.data + r * rest[i].m.stride,
                       in[i].m.data + (spans[s].first + r) * in[i].m.stride,
                       (size_t)in[i].m.cols * sizeof(float));
        }
        out = run_rows(b, l, &state, rest, &again);
        drop(&out);
        for (int i = 0; i < 3; i++) drop(&rest[i]);
    }
    drop(&matrix), drop(&conv);
    return o;
}

static void logged_case(int key_heads, int group, int dk, int dv, int kernel)
{
    const struct backend *all[] = { &ref, &cpu };
    struct logging l[2];
    int64_t values = (int64_t)key_heads * group * dv, channels = 2 * (int64_t)key_heads * dk + values;
    for (int b = 0; b < 2; b++) {
        l[b].shape = (struct delta_shape){ key_heads, key_heads * group, dk, dv, kernel };
        l[b].taps = b ? copy_of(&l[0].taps) : filled(kernel, channels, 0, 0.5f);
        l[b].A = b ? copy_of(&l[0].A) : filled(1, key_heads * group, 0, 1);
        l[b].bias = b ? copy_of(&l[0].bias) : filled(1, key_heads * group, 0, 1);
        l[b].matrix = b ? copy_of(&l[0].matrix) : filled(3, values * dk, 0, 0.3f);
        l[b].conv = b ? copy_of(&l[0].conv) : filled(3, (kernel - 1) * channels, 0, 1);
        l[b].log = guarded(3, LOG_ROWS * delta_log_floats(&l[b].shape), 0);
        l[b].plain_matrix = copy_of(&l[b].matrix);
        l[b].plain_conv = copy_of(&l[b].conv);
    }
    int32_t kept[3] = { 0 };
    for (int step = 0; step < LOG_STEPS; step++) {
        struct plan p;
        int64_t n[3], none[3] = { 0 }, stay[3];
        for (int s = 0; s < 3; s++) n[s] = 1 + random_below(LOG_ROWS);
        make_plan(&p, n, none);
        for (int s = 0; s < 3; s++) {
            p.spans[s].kept = kept[s];
            p.spans[s].logged = step + 1 < LOG_STEPS && random_below(4) > 0;
            stay[s] = p.spans[s].logged ? random_below(n[s] + 1) : n[s];
            kept[s] = p.spans[s].logged ? (int32_t)stay[s] : 0;
        }
        struct guarded in[3] = { filled(p.step.n, channels, 1, 1), filled(p.step.n, key_heads * group, 1, 2),
                                 filled(p.step.n, key_heads * group, 1, 2) };
        struct guarded o[2];
        for (int b = 0; b < 2; b++) {
            struct delta_state state = { l[b].matrix.m.data, l[b].conv.m.data, l[b].log.m.data, LOG_ROWS };
            o[b] = run_rows(all[b], &l[b], &state, in, &p.step);
            check_guards(&o[b], "logged rows");
            struct guarded plain = run_plain(all[b], &l[b], in, &p.step, stay);
            same_bits(&o[b], &plain, all[b]->name, "outputs of logged rows");
            drop(&plain);
        }
        check_close(&o[1], &o[0], 2e-5, 1e-5, "logged rows");
        for (int b = 0; b < 2; b++) drop(&o[b]);
        for (int i = 0; i < 3; i++) drop(&in[i]);
    }
    for (int b = 0; b < 2; b++) {
        same_bits(&l[b].matrix, &l[b].plain_matrix, all[b]->name, "state after logged rows");
        same_bits(&l[b].conv, &l[b].plain_conv, all[b]->name, "convolution state after logged rows");
        check_guards(&l[b].log, "logged rows");
        struct guarded *made[] = { &l[b].taps, &l[b].A,   &l[b].bias,         &l[b].matrix,
                                   &l[b].conv, &l[b].log, &l[b].plain_matrix, &l[b].plain_conv };
        for (size_t i = 0; i < sizeof made / sizeof *made; i++) drop(made[i]);
    }
}

static void logged_rows(void)
{
    reserve(300, 2048, 64, 2, 4);
    for (int i = 0; i < 4; i++) {
        logged_case(1, 2, 4, 3, 4);
        logged_case(2, 2, 16, 20, 4);
        logged_case(2, 1, 128, 128, 4);
        logged_case(1, 3, 20, 48, 2);
        logged_case(1, 1, 8, 72, 1);
    }
}

/* Fused runs. |got - want| of all elements together and of the worst, as shares of want's: rounding of inputs
 * within a run is what the shares allow for. */
static void check_shares(const struct guarded *got, const struct guarded *want, double all, double worst,
                         const char *what)
{
    check_guards(got, what);
    double error = 0, size = 0, top = 0, most = -1;
    int64_t at[2] = { 0, 0 };
    for (int64_t r = 0; r < want->m.rows; r++)
        for (int64_t c = 0; c < want->m.cols; c++) {
            double g = got->m.data[r * got->m.stride + c], w = want->m.data[r * want->m.stride + c];
            error += (g - w) * (g - w);
            size += w * w;
            top = fmax(top, fabs(w));
            if (!(fabs(g - w) <= most)) most = fabs(g - w), at[0] = r, at[1] = c;
        }
    if (!(error <= all * all * size) || !(most <= worst * top))
        fail_msg("%s on %s%s, [%d x %d]: error %.3g of all, worst (%d, %d) is %.9g, ref %.9g, largest %.3g",
                 what, cpu.name, bf16_inputs ? ", rounding" : "", (int)want->m.rows, (int)want->m.cols,
                 sqrt(error / size), (int)at[0], (int)at[1],
                 (double)got->m.data[at[0] * got->m.stride + at[1]],
                 (double)want->m.data[at[0] * want->m.stride + at[1]], top);
}

/* loose: where a number may have been rounded the other way */
static void check_run(const struct guarded *got, const struct guarded *want, bool loose, const char *what)
{
    loose = loose || bf16_inputs || rounded;
    check_shares(got, want, loose ? 1e-2 : 1e-4, loose ? 5e-2 : 5e-4, what);
}

static void delta_run_case(int key_heads, int group, const int64_t *n)
{
    enum { DIM = 128, HIDDEN = 192 };
    struct plan p;
    make_plan(&p, n, (int64_t[]){ 0, 0, 0 });
    struct delta_shape s = { key_heads, key_heads * group, DIM, DIM, 4 };
    int64_t values = (int64_t)s.value_heads * DIM, channels = 2 * (int64_t)key_heads * DIM + values,
            rows = p.step.n;
    struct made w = make_weight(WEIGHT_BF16, HIDDEN, values, INPUT_AS_IS);
    struct guarded taps = filled(4, channels, 0, 0.5f), A = filled(1, s.value_heads, 0, 1),
                   bias = filled(1, s.value_heads, 0, 1), gain = filled(1, DIM, 0, 1);
    struct guarded in[7] = { filled(rows, HIDDEN, 2, 1),        filled(rows, channels, 4, 1),
                             filled(rows, values, 1, 2),        filled(rows, s.value_heads, 1, 2),
                             filled(rows, s.value_heads, 1, 2), filled(3, 3 * channels, 0, 1),
                             filled(3, values * DIM, 0, 0.3f) };
    struct guarded out[2][4];
    const struct backend *all[] = { &ref, &cpu };
    struct guarded x[2], state[2][2];
    for (int b = 0; b < 2; b++) {
        struct guarded c[7];
        for (int i = 0; i < 7; i++) c[i] = copy_of(&in[i]);
        out[b][0] = guarded(rows, HIDDEN, 1);
        out[b][1] = guarded(rows, channels, 0);
        out[b][2] = guarded(rows, values, 0);
        out[b][3] = guarded(rows, values, 2);
        struct delta_state st = { .matrix = c[6].m.data, .conv = c[5].m.data };
        struct delta_run r = { .x = c[0].m,
                               .y = out[b][0].m,
                               .u = c[1].m,
                               .conv = out[b][1].m,
                               .z = c[2].m,
                               .a = c[3].m,
                               .b = c[4].m,
                               .raw = out[b][2].m,
                               .o = out[b][3].m,
                               .conv_weight = taps.m.data,
                               .A_log = A.m.data,
                               .dt_bias = bias.m.data,
                               .gain = gain.m.data,
                               .eps = 1e-6f,
                               .out = b ? w.cpu : w.ref,
                               .state = &st,
                               .shape = &s };
        all[b]->ops->delta_run(all[b]->queue, &r, &p.step);
        finish();
        x[b] = c[0];
        state[b][0] = c[5];
        state[b][1] = c[6];
        for (int i = 1; i < 5; i++) drop(&c[i]);
    }
    check_close(&state[1][0], &state[0][0], 0, 0, "delta_run: conv state");
    check_run(&state[1][1], &state[0][1], false, "delta_run: state");
    check_run(&out[1][3], &out[0][3], false, "delta_run: o");
    check_run(&out[1][0], &out[0][0], false, "delta_run: y");
    check_run(&x[1], &x[0], false, "delta_run: x");
    for (int b = 0; b < 2; b++) {
        for (int i = 0; i < 4; i++) drop(&out[b][i]);
        drop(&x[b]);
        drop(&state[b][0]);
        drop(&state[b][1]);
    }
    for (int i = 0; i < 7; i++) drop(&in[i]);
    drop(&taps), drop(&A), drop(&bias), drop(&gain);
    drop_weight(&w);
}

static void attention_run_case(enum kv_dtype dtype, int group, int n_kv, const int64_t *n,
                               const int64_t *past)
{
    enum { DIM = 256, HIDDEN = 192 };
    static const int bytes[] = { 4, 2, 1 };
    struct plan p;
    make_plan(&p, n, past);
    int64_t rows = p.step.n, heads = (int64_t)group * n_kv, line = (int64_t)n_kv * DIM;
    size_t size = (size_t)24 * KV_PAGE * (size_t)line;
    struct made w = make_weight(WEIGHT_BF16, HIDDEN, heads * DIM, INPUT_AS_IS);
    struct guarded gains = filled(2, DIM, 0, 1),
                   in[4] = { filled(rows, HIDDEN, 2, 1), filled(rows, heads * 2 * DIM, 4, 2),
                             filled(rows, line, 0, 1), filled(rows, line, 1, 1) };
    struct guarded out[2][2], x[2];
    uint8_t *memory[4];
    float *inverse = take(12);
    uint8_t *axis = take(3);
    memcpy(inverse, (float[]){ 1, 0.3f, 0.01f }, 12);
    memcpy(axis, (uint8_t[]){ 0, 1, 2 }, 3);
    struct rope rope = { 3, inverse, axis };
    for (int i = 0; i < 4; i++) memory[i] = take(size * 4);
    for (int m = 0; m < 2; m++)
        for (size_t i = 0; i < size; i++) {
            float v = random_normal();
            if (dtype == KV_F32)
                ((float *)memory[m])[i] = v;
            else if (dtype == KV_BF16)
                ((bf16 *)memory[m])[i] = bf16_from_f32(v);
            else
                memory[m][i] = e4m3_from_f32(v).bits;
        }
    memcpy(memory[2], memory[0], size * (size_t)bytes[dtype]);
    memcpy(memory[3], memory[1], size * (size_t)bytes[dtype]);
    const struct backend *all[] = { &ref, &cpu };
    for (int b = 0; b < 2; b++) {
        struct guarded c[4];
        for (int i = 0; i < 4; i++) c[i] = copy_of(&in[i]);
        struct kv_cache kv = { memory[2 * b], memory[2 * b + 1], dtype, n_kv, DIM };
        out[b][0] = guarded(rows, HIDDEN, 1);
        out[b][1] = guarded(rows, heads * DIM, 2);
        struct attention_run r = { .x = c[0].m,
                                   .y = out[b][0].m,
                                   .qg = c[1].m,
                                   .k = c[2].m,
                                   .v = c[3].m,
                                   .att = out[b][1].m,
                                   .n_heads = (int)heads,
                                   .q_gain = gains.m.data,
                                   .k_gain = gains.m.data + DIM,
                                   .eps = 1e-6f,
                                   .rope = &rope,
                                   .kv = &kv,
                                   .o = b ? w.cpu : w.ref };
        all[b]->ops->attention_run(all[b]->queue, &r, &p.step);
        finish();
        x[b] = c[0];
        for (int i = 1; i < 4; i++) drop(&c[i]);
    }
    check_run(&out[1][1], &out[0][1], dtype != KV_F32, "attention_run: att");
    check_run(&out[1][0], &out[0][0], dtype != KV_F32, "attention_run: y");
    check_run(&x[1], &x[0], dtype != KV_F32, "attention_run: x");
    for (int b = 0; b < 2; b++) drop(&out[b][0]), drop(&out[b][1]), drop(&x[b]);
    for (int i = 0; i < 4; i++) drop(&in[i]), give(memory[i]);
    drop(&gains);
    give(inverse);
    give(axis);
    drop_weight(&w);
}

/* norm_products of router, gate and up, then moe_run; routing is set beforehand by logits of ref. */
static void moe_run_case(enum weight_format f, int64_t n, int64_t hidden, int64_t inner, int k)
{
    enum { EXPERTS = 8 };
    enum weight_input input = f == WEIGHT_FP8 ? INPUT_FP8_ROW : INPUT_AS_IS;
    struct made w[3][EXPERTS],
        dense[4] = { make_weight(WEIGHT_BF16, 1, hidden, INPUT_AS_IS), make_weight(f, inner, hidden, input),
                     make_weight(f, inner, hidden, input), make_weight(f, hidden, inner, input) };
    struct weight *lists[2][3][EXPERTS];
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < EXPERTS; e++) {
            w[m][e] = make_weight(f, m < 2 ? inner : hidden, m < 2 ? hidden : inner, input);
            lists[0][m][e] = w[m][e].ref;
            lists[1][m][e] = w[m][e].cpu;
        }
    struct guarded x = filled(n, hidden, 4, 0.3f), gain = filled(1, hidden, 0, 1),
                   logits = filled(n, EXPERTS, 1, 3);
    struct guarded out[2][8];
    const struct backend *all[] = { &ref, &cpu };
    for (int b = 0; b < 2; b++) {
        struct experts list = { EXPERTS, lists[b][0], lists[b][1], lists[b][2], NULL };
        struct err e = { 0 };
        must(all[b]->ops->experts_bind(all[b]->queue, &list, &e), &e);
        struct guarded *o = out[b];
        o[0] = copy_of(&x);
        for (int i = 1; i < 8; i++) o[i] = guarded(n, i < 4 ? hidden : i < 7 ? inner : 1, 4);
        int32_t *id = take((size_t)(n * k) * 4);
        float *weight = take((size_t)(n * k) * 4);
        struct picks picks = { id, weight, k };
        struct norm_products in = {
            o[1].m, o[0].m, gain.m.data, 1e-6f, 3, { o[7].m, o[4].m, o[5].m }, { 0 }
        };
        for (int i = 0; i < 3; i++) in.w[i] = b ? dense[i].cpu : dense[i].ref;
        all[b]->ops->norm_products(all[b]->queue, &in);
        struct moe_run r = { .x = o[0].m,
                             .y = o[2].m,
                             .h = o[1].m,
                             .logits = logits.m,
                             .gate = o[4].m,
                             .up = o[5].m,
                             .hidden = o[6].m,
                             .shared = o[3].m,
                             .shared_gate = o[7].m,
                             .picks = &picks,
                             .experts = &list,
                             .w_down = b ? dense[3].cpu : dense[3].ref };
        all[b]->ops->moe_run(all[b]->queue, &r);
        finish();
        give(id);
        give(weight);
        all[b]->ops->experts_unbind(all[b]->queue, &list);
    }
    check_run(&out[1][1], &out[0][1], false, "moe_run: h");
    check_run(&out[1][6], &out[0][6], f == WEIGHT_FP8, "moe_run: hidden");
    check_run(&out[1][2], &out[0][2], f == WEIGHT_FP8, "moe_run: y");
    check_run(&out[1][0], &out[0][0], f == WEIGHT_FP8, "moe_run: x");
    for (int b = 0; b < 2; b++)
        for (int i = 0; i < 8; i++) drop(&out[b][i]);
    drop(&x), drop(&gain), drop(&logits);
    for (int i = 0; i < 4; i++) drop_weight(&dense[i]);
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < EXPERTS; e++) drop_weight(&w[m][e]);
}

static void moe_runs(void)
{
    static const enum weight_format formats[] = { WEIGHT_NVFP4, WEIGHT_BF16, WEIGHT_FP8 };
    reserve(300, 1024, 256, 4, 8);
    for (int f = 0; f < 3; f++) {
        moe_run_case(formats[f], 40, 256, 128, 2);
        moe_run_case(formats[f], 200, 128, 256, 4);
    }
}

static void delta_runs(void)
{
    static const int64_t n[][3] = { { 64, 1, 1 }, { 40, 1, 3 }, { 65, 2, 130 }, { 128, 64, 63 } };
    reserve(300, 1024, 64, 2, 4);
    for (int i = 0; i < 4; i++) delta_run_case(1 + i % 2, 1 + (i + 1) % 2, n[i]);
}

static void attention_runs(void)
{
    static const int64_t n[][3] = { { 64, 1, 1 }, { 40, 1, 3 }, { 65, 2, 130 }, { 100, 64, 63 } };
    static const int64_t past[][3] = { { 0, 0, 0 }, { 5, 100, 0 }, { 200, 1, 127 }, { 300, 0, 65 } };
    reserve(300, 4096, 64, 2, 4);
    for (int i = 0; i < 4; i++)
        for (int d = 0; d < 3; d++)
            attention_run_case((enum kv_dtype)d, (int[]){ 8, 2, 1 }[(i + d) % 3], 1 + i % 2, n[i], past[i]);
}

/* The small case computed in double from the recurrence, by an outside program. */

static void numbers(float *out, const json_t *v, int *n)
{
    size_t i;
    json_t *item;
    if (json_is_number(v))
        out[(*n)++] = (float)json_number_value(v);
    else
        json_array_foreach(v, i, item) numbers(out, item, n);
}

static void gdn_small(void **state)
{
    (void)state;
    /* another section of the file holds an integer past 64 bits */
    json_t *root = json_load_file("tests/golden/model_vectors.json", JSON_DECODE_INT_AS_REAL, NULL);
    assert_non_null(root);
    const json_t *g = json_object_get(root, "gdn_small");
    float q[64], k[64], v[64], a[64], b[64], A_in[4], bias_in[4], want[64];
    struct {
        const char *key;
        float *to;
        int n;
    } in[] = { { "q", q, 24 },
               { "k", k, 24 },
               { "v", v, 36 },
               { "a", a, 12 },
               { "b", b, 12 },
               { "A_log", A_in, 2 },
               { "dt_bias", bias_in, 2 },
               { "o", want, 36 } };
    for (size_t i = 0; i < sizeof in / sizeof *in; i++) {
        int n = 0;
        numbers(in[i].to, json_object_get(g, in[i].key), &n);
        if (n != in[i].n) fail_msg("gdn_small.%s has %d numbers, expected %d", in[i].key, n, in[i].n);
    }
    struct backend *all[] = { &ref, &cpu };
    for (int x = 0; x < 2; x++) {
        struct guarded made = guarded(1, 84 + 12 + 12 + 36 + 24 + 8, 0);
        float *qkv = made.m.data, *ga = qkv + 84, *gb = ga + 12, *o = gb + 12, *S = o + 36, *A_log = S + 24,
              *bias = A_log + 2, *conv = bias + 2;
        memset(S, 0, 24 * sizeof *S);
        conv[0] = 0;
        memcpy(A_log, A_in, 8);
        memcpy(bias, bias_in, 8);
        for (int t = 0; t < 6; t++) {
            memcpy(qkv + t * 14, q + t * 4, 16);
            memcpy(qkv + t * 14 + 4, k + t * 4, 16);
            memcpy(qkv + t * 14 + 8, v + t * 6, 24);
        }
        memcpy(ga, a, 48);
        memcpy(gb, b, 48);
        struct delta_shape s = { 1, 2, 4, 3, 1 };
        struct span span = { .n = 6 };
        struct step_rows rows_of = { NULL, 6, &span, 1 };
        all[x]->ops->delta(all[x]->queue, mat_of(o, 6, 6), mat_of(qkv, 6, 14), mat_of(ga, 6, 2),
                           mat_of(gb, 6, 2), A_log, bias, &(struct delta_state){ .matrix = S, .conv = conv },
                           &s, &rows_of);
        finish();
        for (int i = 0; i < 36; i++)
            if (!(fabsf(o[i] - want[i]) <= 2e-6f * (1 + fabsf(want[i]))))
                fail_msg("gdn_small on %s: o[%d] is %g, expected %g", all[x]->name, i, (double)o[i],
                         (double)want[i]);
        drop(&made);
    }
    json_decref(root);
}

/* More rows than ROWS_EXACT, in shapes that a GPU has kernels for. Elsewhere they are what `products` tries.
 */

static void many_rows(void)
{
    static const int64_t ns[] = { 33, 64, 100, 129, 300 }, rows[] = { 1, 100, 128, 131, 300 };
    static const enum weight_format formats[] = { WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4 };
    if (!on_device()) return;
    reserve(512, 1024, 256, 4, 8);
    for (int i = 0; i < 5; i++)
        for (int f = 0; f < 4; f++)
            product_case(formats[f % 3], ns[i], rows[random_below(5)], 128 * (1 + random_below(3)),
                         f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
    for (int f = 0; f < 3; f++) /* wide enough for the large tiles */
        product_case(formats[f], 400, 4500 + random_below(3), 128, INPUT_AS_IS);
    for (int f = 0; f < 3; f++)
        for (int i = 0; i < 4; i++)
            experts_case(formats[f], i < 2 ? 33 + random_below(30) : 150 + random_below(100),
                         128 * (1 + random_below(3)), 128 * (1 + random_below(2)), 8, i < 2 ? 1 : 4);
}

/* A step of sequences of one row each gives every row what it gets alone, to the bit for up to ROWS_EXACT: a
 * layer of every kind, its weights in the mixes that have kernels for several rows. */
enum { SEQUENCES = 128, LAYER_HIDDEN = 256, LAYER_INNER = 256, LAYER_EXPERTS = 8, PAGES_EACH = 2 };

struct layer_case {
    struct made qkv, z, a, b, out, q, k, v, o, router, shared_gate, gate, up, down, expert[3][LAYER_EXPERTS];
    struct experts experts;
    struct weight *lists[3][LAYER_EXPERTS];
    struct guarded taps, A, bias, gain; /* gain: for norms of any width */
    struct rope rope;
};

static struct made made_of(enum weight_format f, int64_t rows, int64_t cols)
{
    return make_weight(f, rows, cols, f == WEIGHT_FP8 ? INPUT_FP8_ROW : INPUT_AS_IS);
}

static void make_layer_case(struct layer_case *l, enum weight_format delta, enum weight_format dense,
                            enum weight_format expert)
{
    enum { H = LAYER_HIDDEN };
    l->qkv = made_of(delta, 512, H), l->z = made_of(delta, 256, H), l->out = made_of(delta, H, 256);
    l->a = made_of(WEIGHT_BF16, 2, H), l->b = made_of(WEIGHT_BF16, 2, H);
    l->q = made_of(dense, 1024, H), l->k = made_of(dense, 256, H), l->v = made_of(dense, 256, H);
    l->o = made_of(dense, H, 512);
    l->router = made_of(WEIGHT_BF16, LAYER_EXPERTS, H), l->shared_gate = made_of(WEIGHT_BF16, 1, H);
    l->gate = made_of(dense, LAYER_INNER, H), l->up = made_of(dense, LAYER_INNER, H);
    l->down = made_of(dense, H, LAYER_INNER);
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < LAYER_EXPERTS; e++) {
            l->expert[m][e] = m < 2 ? made_of(expert, LAYER_INNER, H) : made_of(expert, H, LAYER_INNER);
            l->lists[m][e] = l->expert[m][e].cpu;
        }
    l->experts = (struct experts){ LAYER_EXPERTS, l->lists[0], l->lists[1], l->lists[2], NULL };
    bind(&l->experts);
    l->taps = filled(4, 512, 0, 0.5f), l->A = filled(1, 2, 0, 1), l->bias = filled(1, 2, 0, 1);
    l->gain = filled(1, 1024, 0, 1);
    float *inverse = take(12);
    uint8_t *axis = take(3);
    memcpy(inverse, (float[]){ 1, 0.3f, 0.01f }, 12);
    memcpy(axis, (uint8_t[]){ 0, 1, 2 }, 3);
    l->rope = (struct rope){ 3, inverse, axis };
}

static void drop_layer_case(struct layer_case *l)
{
    struct made *all[] = { &l->qkv, &l->z, &l->a,      &l->b,           &l->out,  &l->q,  &l->k,
                           &l->v,   &l->o, &l->router, &l->shared_gate, &l->gate, &l->up, &l->down };
    cpu.ops->experts_unbind(cpu.queue, &l->experts);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop_weight(all[i]);
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < LAYER_EXPERTS; e++) drop_weight(&l->expert[m][e]);
    drop(&l->taps), drop(&l->A), drop(&l->bias), drop(&l->gain);
    give((void *)l->rope.inverse);
    give((void *)l->rope.axis);
}

/* What sequences leave: rows after each of three mixers, states. */
struct layer_trace {
    struct guarded x[3], h, conv, matrix, keys, values;
};

static struct layer_trace make_trace(uint64_t seed)
{
    uint64_t before = state_of_random;
    state_of_random = seed;
    struct layer_trace t = { .x = { filled(SEQUENCES, LAYER_HIDDEN, 3, 0.5f),
                                    guarded(SEQUENCES, LAYER_HIDDEN, 3),
                                    guarded(SEQUENCES, LAYER_HIDDEN, 3) },
                             .h = guarded(SEQUENCES, LAYER_HIDDEN, 1),
                             .conv = filled(SEQUENCES, 3 * 512, 0, 1),
                             .matrix = filled(SEQUENCES, 2 * 128 * 128, 0, 0.3f),
                             .keys = filled(SEQUENCES, PAGES_EACH * KV_PAGE * 256, 0, 1),
                             .values = filled(SEQUENCES, PAGES_EACH * KV_PAGE * 256, 0, 1) };
    state_of_random = before;
    return t;
}

static void layer_mixers(struct layer_case *l, struct layer_trace *t, struct mat *x,
                         const struct step_rows *rows)
{
    int64_t n = rows->n;
    struct guarded u = guarded(n, 512, 1), z = guarded(n, 256, 0), a = guarded(n, 2, 0), b = guarded(n, 2, 0),
                   y = guarded(n, LAYER_HIDDEN, 0), conv = guarded(n, 512, 0), raw = guarded(n, 256, 0),
                   o = guarded(n, 256, 0), qg = guarded(n, 1024, 0), k = guarded(n, 256, 0),
                   v = guarded(n, 256, 0), att = guarded(n, 512, 0);
    struct delta_shape shape = { 1, 2, 128, 128, 4 };
    struct delta_state state = { .matrix = t->matrix.m.data, .conv = t->conv.m.data };
    struct kv_cache kv = { t->keys.m.data, t->values.m.data, KV_F32, 1, 256 };
    const float *gain = l->gain.m.data;
    cpu.ops->norm_products(cpu.queue,
                           &(struct norm_products){ y.m,
                                                    x[0],
                                                    gain,
                                                    1e-6f,
                                                    4,
                                                    { u.m, z.m, a.m, b.m },
                                                    { l->qkv.cpu, l->z.cpu, l->a.cpu, l->b.cpu } });
    cpu.ops->delta_run(cpu.queue,
                       &(struct delta_run){ x[0], y.m, u.m, conv.m, z.m, a.m, b.m, raw.m, o.m, l->taps.m.data,
                                            l->A.m.data, l->bias.m.data, gain, 1e-6f, l->out.cpu, &state,
                                            &shape },
                       rows);
    finish();
    for (int64_t r = 0; r < n; r++)
        memcpy(x[1].data + r * x[1].stride, x[0].data + r * x[0].stride, LAYER_HIDDEN * 4);
    cpu.ops->norm_products(
        cpu.queue, &(struct norm_products){
                       y.m, x[1], gain, 1e-6f, 3, { qg.m, k.m, v.m }, { l->q.cpu, l->k.cpu, l->v.cpu } });
    cpu.ops->attention_run(cpu.queue,
                           &(struct attention_run){ x[1], y.m, qg.m, k.m, v.m, att.m, 2, gain, gain + 256,
                                                    1e-6f, &l->rope, &kv, l->o.cpu },
                           rows);
    finish();
    struct guarded *all[] = { &u, &z, &a, &b, &y, &conv, &raw, &o, &qg, &k, &v, &att };
    for (int i = 0; i < 12; i++) check_guards(all[i], "mixers of a layer"), drop(all[i]);
}

static void layer_experts(struct layer_case *l, struct mat h, struct mat *x)
{
    int64_t n = h.rows;
    struct guarded router = guarded(n, LAYER_EXPERTS, 0), one = guarded(n, 1, 0),
                   gate = guarded(n, LAYER_INNER, 0), up = guarded(n, LAYER_INNER, 2),
                   hidden = guarded(n, LAYER_INNER, 0), y = guarded(n, LAYER_HIDDEN, 0),
                   shared = guarded(n, LAYER_HIDDEN, 0);
    int32_t *id = take((size_t)n * 3 * 4);
    float *weight = take((size_t)n * 3 * 4);
    struct picks picks = { id, weight, 3 };
    for (int64_t r = 0; r < n; r++)
        memcpy(x[2].data + r * x[2].stride, x[1].data + r * x[1].stride, LAYER_HIDDEN * 4);
    cpu.ops->norm_products(
        cpu.queue, &(struct norm_products){ h,
                                            x[2],
                                            l->gain.m.data,
                                            1e-6f,
                                            4,
                                            { router.m, one.m, gate.m, up.m },
                                            { l->router.cpu, l->shared_gate.cpu, l->gate.cpu, l->up.cpu } });
    cpu.ops->moe_run(cpu.queue, &(struct moe_run){ x[2], y.m, h, router.m, gate.m, up.m, hidden.m, shared.m,
                                                   one.m, &picks, &l->experts, l->down.cpu });
    finish();
    struct guarded *all[] = { &router, &one, &gate, &up, &hidden, &y, &shared };
    for (int i = 0; i < 7; i++) check_guards(all[i], "experts of a layer"), drop(all[i]);
    give(id);
    give(weight);
}

/* Sequences [first, first + n) as a step. */
static void layer_step(struct layer_case *l, struct layer_trace *t, int first, int n)
{
    struct row rows[SEQUENCES];
    struct span spans[SEQUENCES];
    int32_t pages[SEQUENCES][PAGES_EACH];
    struct mat x[3], h = t->h.m;
    for (int i = 0; i < n; i++) {
        int32_t past = (first + i) * 7 % 100;
        for (int32_t p = 0; p < PAGES_EACH; p++) pages[i][p] = (first + i) * PAGES_EACH + p;
        rows[i] = (struct row){ .position = { past, past, past } };
        spans[i] = (struct span){ .first = i, .n = 1, .past = past, .pages = pages[i], .slot = first + i };
    }
    for (int i = 0; i < 3; i++) {
        x[i] = t->x[i].m;
        x[i].data += first * x[i].stride;
        x[i].rows = n;
    }
    h.data += first * h.stride;
    h.rows = n;
    layer_mixers(l, t, x, &(struct step_rows){ rows, n, spans, n });
    layer_experts(l, h, x);
}

static struct guarded first_rows(const struct guarded *g, int n)
{
    struct guarded first = guarded(n, g->m.cols, 0);
    check_guards(g, "a layer");
    for (int64_t r = 0; r < n; r++)
        memcpy(first.m.data + r * first.m.stride, g->m.data + r * g->m.stride, (size_t)g->m.cols * 4);
    return first;
}

static void layer_alone_case(enum weight_format delta, enum weight_format dense, enum weight_format expert,
                             int n)
{
    struct layer_case l;
    make_layer_case(&l, delta, dense, expert);
    uint64_t seed = state_of_random;
    struct layer_trace together = make_trace(seed), alone = make_trace(seed);
    layer_step(&l, &together, 0, n);
    for (int i = 0; i < n; i++) layer_step(&l, &alone, i, 1);
    struct guarded *a[] = { &together.conv,   &together.matrix, &together.x[0], &together.keys,
                            &together.values, &together.x[1],   &together.h,    &together.x[2] };
    struct guarded *b[] = { &alone.conv,   &alone.matrix, &alone.x[0], &alone.keys,
                            &alone.values, &alone.x[1],   &alone.h,    &alone.x[2] };
    static const char *const names[] = { "conv state", "delta state",    "x after delta_run",
                                         "keys",       "values",         "x after attention_run",
                                         "normed x",   "x after moe_run" };
    for (int i = 0; i < 8; i++) {
        struct guarded have = first_rows(a[i], n), want = first_rows(b[i], n);
        if (n <= ROWS_EXACT)
            same_bits(&have, &want, cpu.name, names[i]);
        else if (i < 6) /* a router's choice may turn on a rounding, and a softmax does on many */
            check_shares(&have, &want, 0.1, 0.3, names[i]);
        drop(&have), drop(&want);
    }
    for (int i = 0; i < 8; i++) drop(a[i]), drop(b[i]);
    drop_layer_case(&l);
}

static void several_rows(void)
{
    static const enum weight_format formats[] = { WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4 };
    static const int ns[] = { 2, 5, 8, 9, 16, 17, 31, 32 };
    if (!on_device()) return;
    reserve(SEQUENCES, 2048, 256, 3, 8);
    for (int i = 0; i < 8; i++)
        for (int f = 0; f < 3; f++)
            product_case(formats[f], ns[i], 1 + random_below(300), 256 * (1 + random_below(2)),
                         f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
    for (int f = 0; f < 3; f++) /* shares of several units */
        product_case(formats[f], ns[random_below(8)], 1 + random_below(20), 256 * (3 + random_below(6)),
                     f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
    for (int f = 0; f < 3; f++) /* more tiles than there are multiprocessors */
        product_case(formats[f], ns[random_below(8)], 6400 + random_below(200), 256,
                     f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
    moe_run_case(WEIGHT_NVFP4, 2 + random_below(31), 256, 256, 3);
    for (int i = 0; i < 8; i++) layer_alone_case(WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4, ns[i]);
    moe_run_case(WEIGHT_NVFP4, 33 + random_below(32), 256, 256, 3);
    moe_run_case(WEIGHT_NVFP4, 65 + random_below(64), 256, 256, 3);
    layer_alone_case(WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4, 33 + (int)random_below(32));
    layer_alone_case(WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4, 65 + (int)random_below(64));
    layer_alone_case(WEIGHT_FP8, WEIGHT_FP8, WEIGHT_NVFP4, 2 + (int)random_below(31));
    layer_alone_case(WEIGHT_BF16, WEIGHT_BF16, WEIGHT_BF16, 2 + (int)random_below(31));
    layer_alone_case(WEIGHT_NVFP4, WEIGHT_NVFP4, WEIGHT_NVFP4, 2 + (int)random_below(31));
}

static void (*const families[])(void) = { several_rows, attention_runs, moe_runs, many_rows,
                                          delta_runs,   products,       experts,  fp4_experts,
                                          rows,         sequences,      vision,   logged_rows };

static void backends(int threads, enum cpu_isa isa)
{
    struct err e = { 0 };
    const char *device = getenv("QUENCH_DEVICE");
    struct backend_options o = { .device = DEVICE_CPU, .threads = threads, .isa = isa, .rounded = rounded };
    if (device && strcmp(device, "cuda") == 0)
        o = (struct backend_options){ .device = DEVICE_CUDA, .shared_memory = true, .rounded = bf16_inputs };
    backend_destroy(&cpu);
    backend_destroy(&ref);
    must(backend_create(&cpu, &o, &e), &e);
    o.device = DEVICE_REF;
    o.rounded = rounded;
    must(backend_create(&ref, &o, &e), &e);
    reserve(64, 64, 64, 2, 4);
}

static void every_mask(void **state)
{
    static const enum cpu_isa masks[] = { CPU_ISA_GENERIC, CPU_ISA_AVX2, CPU_ISA_AVX512, CPU_ISA_AVX512BF16,
                                          CPU_ISA_AMX };
    static const char *const names[] = { "cpu generic,", "cpu avx2,", "cpu avx512,", "cpu avx512bf16,",
                                         "cpu amx," };
    (void)state;
    for (int i = 0; i < 5 * 2 * 2; i++) {
        int m = i / 4, threads = i % 2 ? 3 : 1;
#ifdef __SANITIZE_THREAD__
        if (threads == 1 || m % 3 > 0) continue; /* races are the same in every instruction set */
#endif
        rounded = i / 2 % 2;
        backends(threads, masks[m]);
        if (!strstr(cpu.name, names[m])) {
            if (i % 4 == 0) printf("SKIP: mask %s this machine has only %s\n", names[m], cpu.name);
            continue;
        }
        for (size_t f = 0; f < sizeof families / sizeof *families; f++) families[f]();
        printf("note: %s%s agrees with ref\n", cpu.name, rounded ? ", inputs rounded," : "");
    }
    rounded = false;
    backends(0, CPU_ISA_BEST);
}

static void family_on_device(void **state)
{
    for (int i = 0; i < 2; i++) {
        bf16_inputs = i;
        backends(0, CPU_ISA_BEST);
        (*(void (**)(void)) * state)();
    }
    printf("note: %s agrees with ref\n", cpu.name);
    bf16_inputs = false;
}

static void nan_weights_are_refused(void **state)
{
    (void)state;
    uint8_t codes[32] = { 0 };
    float scale[2] = { 1, 1 };
    codes[17] = 0xff;
    struct weight_source src = { .format = WEIGHT_FP8, .rows = 2, .cols = 16, .data = codes, .scale = scale };
    struct weight *w;
    struct err e = { 0 };
    assert_false(cpu.ops->weight_create(cpu.queue, &w, &src, &e));
    assert_string_equal(e.text, "NaN at row 1, column 1");
}

static void inputs_not_implemented_are_refused(void **state)
{
    (void)state;
    uint8_t codes[16] = { 0 };
    float scale = 1;
    struct weight_source src = { .rows = 1, .cols = 16, .data = codes, .scale = &scale, .input_global = 1 };
    struct weight *w;
    struct err e = { 0 };
    src.format = WEIGHT_FP8;
    src.input = INPUT_FP8_FIXED;
    assert_false(cpu.ops->weight_create(cpu.queue, &w, &src, &e));
    assert_non_null(strstr(e.text, "FP8 with one scale for all are not implemented on a GPU"));
    src.format = WEIGHT_FP8_BLOCK;
    src.input = INPUT_FP8_GROUPS;
    assert_false(cpu.ops->weight_create(cpu.queue, &w, &src, &e));
    assert_non_null(strstr(e.text, "FP8 in groups of 128 are not implemented on a GPU"));
}

int main(void)
{
    const char *seed = getenv("QUENCH_SEED");
    state_of_random = seed ? strtoull(seed, NULL, 0) : 1;
    backends(0, CPU_ISA_BEST);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gdn_small),
        cmocka_unit_test(nan_weights_are_refused),
        cmocka_unit_test(every_mask),
    };
    const struct CMUnitTest device_tests[] = {
        cmocka_unit_test(gdn_small),
        cmocka_unit_test(nan_weights_are_refused),
        cmocka_unit_test(inputs_not_implemented_are_refused),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[0]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[1]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[2]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[3]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[4]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[5]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[6]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[7]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[8]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[9]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[10]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[11]),
    };
    int failed = on_device() ? cmocka_run_group_tests(device_tests, NULL, NULL)
                             : cmocka_run_group_tests(tests, NULL, NULL);
    backend_destroy(&cpu);
    backend_destroy(&ref);
    return failed;
}
