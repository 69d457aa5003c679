/* Calibrating and packing on a GPU (QUENCH_DEVICE=cuda; else all is skipped): for the same moments the bytes
 * are those of the host's way, and a run's statistics are a CPU's but for rounding. */
#include "quantize/contest.h"
#include "quantize/fixture.h"
#include "quantize/gptq.h"
#include "quantize/search.h"
#include <math.h>

static bool is_there(void)
{
    const char *device = getenv("QUENCH_DEVICE");
    if (device && strcmp(device, "cuda") == 0) return true;
    printf("SKIP: quantizing on a GPU: QUENCH_DEVICE is not cuda\n");
    return false;
}

static uint64_t seed = 11;

static float normal(void)
{
    float sum = 0;
    for (int i = 0; i < 6; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(seed >> 40) * 0x1p-24f - 0.5f;
    }
    return sum * 1.4f;
}

static void must(bool ok, const struct err *e)
{
    if (!ok) fail_msg("%s", e->text);
}

/* Experts' matrices of one part, and moments of their inputs; some without any. */
struct problem {
    int experts;
    int sets; /* of moments: one for all experts, or one each */
    int64_t rows, cols;
    uint16_t *w;      /* BF16 [experts][rows][cols] */
    float *h, *held;  /* [sets][cols][cols] */
    float global[16]; /* of each expert */
};

static void fill_moments(float *h, int64_t n)
{
    int inputs = n < 1000 ? 200 : 20;
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n * n; i++) h[i] = 0;
    for (int s = 0; s < inputs; s++) {
        float common = normal();
        for (int64_t i = 0; i < n; i++) x[i] = normal() * (i % 7 ? 1.0f : 3.0f) + 0.8f * common;
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = i; j < n; j++) h[i * n + j] += x[i] * x[j];
    }
    free(x);
}

static struct problem problem_of(int experts, int64_t rows, int64_t cols, bool shared)
{
    struct problem p = { .experts = experts, .sets = shared ? 1 : experts, .rows = rows, .cols = cols };
    int64_t n = experts * rows * cols;
    p.w = malloc((size_t)n * sizeof *p.w);
    p.h = calloc((size_t)(p.sets * cols * cols), sizeof *p.h);
    p.held = calloc((size_t)(p.sets * cols * cols), sizeof *p.held);
    for (int x = 0; x < experts; x++) {
        float size = ldexpf(0.02f, -(x % 3) * 4), top = 0;
        for (int64_t i = x * rows * cols; i < (x + 1) * rows * cols; i++) {
            float v = bf16_round(normal() * size * (i % 50 ? 1 : 6));
            if (i % 16 == 0 && normal() > 2) v = 0;
            p.w[i] = bf16_from_f32(v).bits;
            top = fmaxf(top, fabsf(v));
        }
        for (int64_t r = x * rows; r < (x + 1) * rows && cols >= 32; r++) /* see make_up_factor */
            memcpy(p.w + r * cols + 16, p.w + r * cols, 16 * sizeof *p.w);
        memset(p.w + x * rows * cols, 0, 32); /* two groups of zeros */
        p.global[x] = nvfp4_global_scale_roomy(top);
        if (x >= p.sets) continue;
        if (x != 1) fill_moments(p.h + x * cols * cols, cols); /* expert 1 saw only zeros */
        fill_moments(p.held + x * cols * cols, cols);
    }
    return p;
}

/* The experts' matrices as gate_proj and up_proj are [rows][cols] or, is_down, as down_proj is. */
static struct experts bind(struct fixture *f, const struct problem *p, struct weight **list, bool is_down)
{
    struct err e = { 0 };
    int n = p->experts;
    struct experts x = { n, list, list + n, list + 2 * n, NULL };
    for (int i = 0; i < 3 * n; i++) {
        bool turned = (i >= 2 * n) != is_down; /* the others have the shape that goes with it */
        struct weight_source src = { .format = WEIGHT_BF16,
                                     .rows = turned ? p->cols : p->rows,
                                     .cols = turned ? p->rows : p->cols,
                                     .data = p->w + i % n * p->rows * p->cols };
        must(f->backend.ops->weight_create(f->backend.queue, &list[i], &src, &e), &e);
    }
    must(f->backend.ops->experts_bind(f->backend.queue, &x, &e), &e);
    return x;
}

static void *to_device(struct fixture *f, const void *host, size_t bytes)
{
    struct err e = { 0 };
    void *out;
    must(f->backend.ops->memory_create(f->backend.queue, &out, bytes, &e), &e);
    if (host) f->backend.ops->upload(f->backend.queue, out, host, bytes);
    return out;
}

static void *to_host(struct fixture *f, const void *device, size_t bytes)
{
    void *out = malloc(bytes);
    struct err e = { 0 };
    f->backend.ops->download(f->backend.queue, out, device, bytes);
    must(f->backend.ops->wait(f->backend.queue, &e), &e);
    return out;
}

/* Factors and importance of every set, the host's, and where the same lie on the GPU. */
struct weighed {
    float *factor, *importance;
    int32_t factored[16];
    struct factoring there;
};

static struct weighed weighed_of(struct fixture *f, const struct problem *p)
{
    int64_t n = p->cols;
    size_t columns = (size_t)(p->sets * n) * sizeof(float), square = columns * (size_t)n;
    return (
        struct weighed){ .factor = malloc(square),
                         .importance = malloc(columns),
                         .there = { .h = to_device(f, p->h, square),
                                    .n = n,
                                    .count = p->sets,
                                    .importance = to_device(f, NULL, columns),
                                    .factored = to_device(f, NULL, sizeof(int32_t[16])),
                                    .scratch = to_device(f, NULL, (size_t)p->sets * (8 + 4 * (size_t)n)) } };
}

static void weigh_on_host(struct weighed *w, const struct problem *p)
{
    int64_t n = p->cols;
    for (int s = 0; s < p->sets; s++) {
        float *h = w->factor + s * n * n;
        double mean = 0;
        memcpy(h, p->h + s * n * n, (size_t)(n * n) * sizeof *h);
        for (int64_t k = 0; k < n; k++) mean += (double)h[k * n + k] / (double)n;
        for (int64_t k = 0; k < n; k++)
            w->importance[s * n + k] = mean > 0 ? (float)((double)h[k * n + k] / mean) : 1;
        w->factored[s] = gptq_factor(h, n);
    }
}

/* got lies transposed */
static void same_factors(const struct problem *p, const struct weighed *w, const float *got)
{
    int64_t n = p->cols;
    for (int s = 0; s < p->sets; s++)
        for (int64_t i = 0; i < n && w->factored[s]; i++)
            for (int64_t j = i; j < n; j++) {
                float a = w->factor[(s * n + j) * n + i], b = got[(s * n + i) * n + j];
                if (memcmp(&a, &b, sizeof a) != 0)
                    fail_msg("factor %d of %d, (%d, %d): %.9g, host %.9g", s, p->sets, (int)j, (int)i,
                             (double)b, (double)a);
            }
}

static struct weighed weigh(struct fixture *f, const struct problem *p)
{
    struct weighed w = weighed_of(f, p);
    struct factoring importance = w.there;
    size_t columns = (size_t)(p->sets * p->cols) * sizeof(float);
    importance.factored = NULL;
    weigh_on_host(&w, p);
    f->backend.ops->factor(f->backend.queue, &importance);
    float *kept = to_host(f, w.there.h, columns * (size_t)p->cols);
    assert_memory_equal(kept, p->h, columns * (size_t)p->cols);
    f->backend.ops->factor(f->backend.queue, &w.there);
    float *got = to_host(f, w.there.h, columns * (size_t)p->cols),
          *weights = to_host(f, w.there.importance, columns);
    int32_t *factored = to_host(f, w.there.factored, sizeof w.factored);
    assert_memory_equal(factored, w.factored, (size_t)p->sets * sizeof *factored);
    assert_memory_equal(weights, w.importance, columns);
    same_factors(p, &w, got);
    free(kept);
    free(got);
    free(weights);
    free(factored);
    return w;
}

/* Of any numbers, for rows too long to factor on an emulated GPU. The first two groups are packed alike, and
 * what they ask of the others cancels but for the rounding of large sums: another order is other codes. */
static float made_up(const float *factor, int64_t i, int64_t j, int64_t n)
{
    if (j >= 16 && j < 32) return i < 32 ? factor[(i - 16) * n + j - 16] : -factor[i * n + j - 16];
    if (i == j) return 0.5f + fabsf(normal());
    if (j < 16 && i >= 16) return i < 32 ? 0.0f : 0x1p20f * normal();
    return 0.02f * normal();
}

static struct weighed make_up_factor(struct fixture *f, const struct problem *p)
{
    const struct ops *op = f->backend.ops;
    struct queue *q = f->backend.queue;
    struct weighed w = weighed_of(f, p);
    int64_t n = p->cols;
    size_t columns = (size_t)n * sizeof(float);
    float *turned = calloc((size_t)n, columns);
    w.factored[0] = 1;
    for (int64_t i = 0; i < n; i++) {
        w.importance[i] = 0.5f + fabsf(normal());
        for (int64_t j = 0; j <= i; j++) w.factor[i * n + j] = turned[j * n + i] = made_up(w.factor, i, j, n);
    }
    op->upload(q, w.there.h, turned, columns * (size_t)n);
    op->upload(q, w.there.importance, w.importance, columns);
    op->upload(q, w.there.factored, w.factored, sizeof w.factored);
    free(turned);
    return w;
}

static void weighed_free(struct fixture *f, struct weighed *w)
{
    void *memory[] = { w->there.h, w->there.importance, w->there.factored, w->there.scratch };
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        f->backend.ops->memory_free(f->backend.queue, memory[i]);
    free(w->factor);
    free(w->importance);
}

/* error held error^T, in the order of quantize/contest.c */
static double loss_of(const float *error, const float *h, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)error[i] *
               (2 * gptq_dot(error + i, h + i * n + i, n - i) - (double)(error[i] * h[i * n + i]));
    return sum;
}

static void check_rows(const struct problem *p, const struct packing_run *run, const struct weighed *weighed,
                       const uint8_t *codes, const uint8_t *scales, const double *sums)
{
    int64_t n = p->cols, groups = n / NVFP4_GROUP;
    float *x = malloc((size_t)(GPTQ_ROWS * n) * 3 * sizeof *x), *scratch = x + GPTQ_ROWS * n;
    float *back = malloc((size_t)n * sizeof *back);
    uint8_t *want = malloc((size_t)(n / 2) * GPTQ_ROWS);
    e4m3 *scale = malloc((size_t)groups * GPTQ_ROWS);
    for (int e = 0; e < p->experts; e++) {
        int set = run->shared ? 0 : e;
        for (int64_t r = 0; r < run->rows; r++) {
            for (int64_t c = 0; c < n; c++)
                x[c] = bf16_to_f32((bf16){ p->w[(e * p->rows + r * run->step) * n + c] });
            if (run->factor && weighed->factored[set])
                gptq_pack_rows(want, scale, x, 1, weighed->factor + set * n * n, p->global[e], n, scratch);
            else
                search_row(want, scale, x, weighed->importance + set * n, p->global[e], n);
            int64_t at = e * run->rows + r;
            if (memcmp(want, codes + at * (n / 2), (size_t)(n / 2)) != 0 ||
                memcmp(scale, scales + at * groups, (size_t)groups) != 0)
                fail_msg("%s of %d x %d, expert %d, row %d: other bytes than the host's",
                         run->factor ? "gptq" : "mse", (int)p->rows, (int)n, e, (int)r);
            double difference = 0, total = 0;
            nvfp4_unpack_row(back, want, scale, p->global[e], n);
            for (int64_t c = 0; c < n; c++) {
                back[c] = x[c] - back[c];
                difference += (double)back[c] * (double)back[c];
                total += (double)x[c] * (double)x[c];
            }
            if (run->held) difference = loss_of(back, p->held + set * n * n, n);
            if (run->held && sums[2 * at] != difference)
                fail_msg("row %d loses %.17g, of the host %.17g", (int)r, sums[2 * at], difference);
            assert_true(fabs(sums[2 * at] - difference) <= 1e-9 * difference);
            assert_true(fabs(sums[2 * at + 1] - total) <= 1e-9 * total);
        }
    }
    free(x);
    free(back);
    free(want);
    free(scale);
}

/* mse and gptq, then both again with their losses on inputs held out. */
static void pack_all_ways(struct fixture *f, const struct problem *p, const struct weighed *w,
                          const struct experts *x, int64_t step)
{
    const struct ops *op = f->backend.ops;
    struct queue *q = f->backend.queue;
    size_t packed = (size_t)(p->experts * p->rows * p->cols);
    size_t of_rows = (size_t)(p->experts * p->rows) * 2 * sizeof(double);
    float *global = to_device(f, p->global, sizeof p->global),
          *held = to_device(f, p->held, (size_t)(p->sets * p->cols * p->cols) * sizeof *held);
    struct packing_run run = { .experts = x,
                               .part = p->sets > 1 ? EXPERT_DOWN : EXPERT_UP,
                               .rows = p->rows / step,
                               .step = step,
                               .cols = p->cols,
                               .global = global,
                               .shared = p->sets == 1,
                               .importance = w->there.importance,
                               .factored = w->there.factored,
                               .codes = to_device(f, NULL, packed / 2),
                               .scales = to_device(f, NULL, packed / 16),
                               .sums = to_device(f, NULL, of_rows) };
    for (int i = 0; i < 4; i++) {
        run.factor = i % 2 ? w->there.h : NULL;
        run.held = i / 2 ? held : NULL;
        op->pack(q, &run);
        uint8_t *codes = to_host(f, run.codes, packed / 2), *scales = to_host(f, run.scales, packed / 16);
        double *sums = to_host(f, run.sums, of_rows);
        check_rows(p, &run, w, codes, scales, sums);
        free(codes);
        free(scales);
        free(sums);
    }
    void *memory[] = { global, held, run.codes, run.scales, run.sums };
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) op->memory_free(q, memory[i]);
}

static void bytes_case(struct fixture *f, int experts, int64_t rows, int64_t cols, bool is_down, int64_t step)
{
    const struct ops *op = f->backend.ops;
    struct problem p = problem_of(experts, rows, cols, !is_down);
    struct weight **list = malloc(3 * (size_t)experts * sizeof *list);
    struct experts x = bind(f, &p, list, is_down);
    struct weighed w = cols < 1000 ? weigh(f, &p) : make_up_factor(f, &p);
    pack_all_ways(f, &p, &w, &x, step);
    weighed_free(f, &w);
    op->experts_unbind(f->backend.queue, &x);
    for (int i = 0; i < 3 * experts; i++) op->weight_free(f->backend.queue, list[i]);
    free(list);
    free(p.w);
    free(p.h);
    free(p.held);
}

static void the_same_bytes(void **state)
{
    (void)state;
    struct fixture f;
    if (!is_there()) skip();
    fixture_init(&f);
    bytes_case(&f, 3, 64, 128, false, 1);
    bytes_case(&f, 4, 48, 96, true, 1);
    bytes_case(&f, 2, 37, 16, true, 1);
    bytes_case(&f, 3, 160, 272, true, 10);
    bytes_case(&f, 1, 6, 2048, false, 2);
    bytes_case(&f, 1, 9, 3600, false, 1); /* eight rows at a time where shared memory is 227 KiB */
    fixture_deinit(&f);
}

static bool is_code(const char *name)
{
    return ends_in(name, "weight_packed") || ends_in(name, ".weight") || ends_in(name, "weight_scale");
}

/* Every tensor of two results: scales of inputs within a step or two of BF16, and of the codes at most so
 * many bytes in a thousand apart. */
static void compare(const char *left, const char *right, double per_mille)
{
    struct checkpoint a, b;
    uint64_t bytes = 0, apart = 0;
    must_open(&a, left);
    must_open(&b, right);
    assert_int_equal(a.n_tensors, b.n_tensors);
    for (size_t i = 0; i < a.n_tensors; i++) {
        const struct tensor *x = a.tensors[i], *y = must_find(&b, "%s", x->name);
        assert_int_equal(x->bytes, y->bytes);
        if (ends_in(x->name, "input_global_scale")) {
            if (!(fabsf(f32_at(x) / f32_at(y) - 1) < 0.01f))
                fail_msg("%s: %.9g and %.9g", x->name, (double)f32_at(x), (double)f32_at(y));
        } else if (is_code(x->name)) {
            bytes += x->bytes;
            for (uint64_t k = 0; k < x->bytes; k++) apart += x->data[k] != y->data[k];
        } else {
            assert_memory_equal(x->data, y->data, x->bytes);
        }
    }
    print_message("%s: %.3f bytes in a thousand differ from the CPU's\n", right,
                  1e3 * (double)apart / (double)bytes);
    assert_true((double)apart <= per_mille * 1e-3 * (double)bytes);
    checkpoint_close(&a);
    checkpoint_close(&b);
}

/* Both ways take the moments of a GPU, which are the same in every run. */
static void a_layer_packed_there_has_the_hosts_bytes(void **state)
{
    (void)state;
    static const enum quantize_method methods[] = { QUANTIZE_MSE, QUANTIZE_GPTQ, QUANTIZE_AUTO };
    struct fixture f;
    if (!is_there()) skip();
    fixture_init(&f);
    const struct ops *there = f.backend.ops;
    struct ops host = *there;
    host.pack = NULL;
    for (int i = 0; i < 3; i++) {
        char names[2][20];
        snprintf(names[0], sizeof names[0], "host%d", i);
        snprintf(names[1], sizeof names[1], "there%d", i);
        struct quantize_options o = fixture_options(&f, DEMO, in(&f, names[0]));
        o.method = methods[i];
        f.backend.ops = &host;
        struct quantize_result left = must_run(&o);
        f.backend.ops = there;
        o.destination = in(&f, names[1]);
        struct quantize_result right = must_run(&o);
        assert_true(right.device_bytes > left.device_bytes);
        assert_int_equal(left.gptq_matrices, right.gptq_matrices);
        assert_true(fabs(left.nvfp4_error.mean / right.nvfp4_error.mean - 1) < 1e-9);
        same_tensors(in(&f, names[0]), in(&f, names[1]));
    }
    fixture_deinit(&f);
}

static void a_run_is_a_cpus_but_for_rounding(void **state)
{
    (void)state;
    static const enum quantize_method methods[] = { QUANTIZE_NEAREST, QUANTIZE_MSE, QUANTIZE_GPTQ,
                                                    QUANTIZE_AUTO };
    static const double per_mille[] = { 0, 1, 100, 100 };
    struct fixture f;
    if (!is_there()) skip();
    fixture_init(&f);
    struct backend gpu = f.backend, cpu;
    struct backend_options options = { .device = DEVICE_CPU, .threads = 2 };
    struct err e = { 0 };
    must(backend_create(&cpu, &options, &e), &e);
    for (int i = 0; i < 4; i++) {
        char names[2][20];
        snprintf(names[0], sizeof names[0], "cpu%d", i);
        snprintf(names[1], sizeof names[1], "gpu%d", i);
        struct quantize_options o = fixture_options(&f, DEMO, in(&f, names[0]));
        o.method = methods[i];
        o.num_calibration_samples = 4;
        o.max_seq_length = 300;
        o.backend = &cpu;
        struct quantize_result left = must_run(&o);
        o.backend = &gpu;
        o.destination = in(&f, names[1]);
        struct quantize_result right = must_run(&o);
        assert_int_equal(left.gptq_matrices, right.gptq_matrices);
        assert_true(fabs(left.nvfp4_error.mean / right.nvfp4_error.mean - 1) < 1e-2);
        assert_true(right.device_bytes > 0 && left.device_bytes == 0);
        compare(in(&f, names[0]), o.destination, per_mille[i]);
    }
    backend_destroy(&cpu);
    fixture_deinit(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_bytes),
        cmocka_unit_test(a_layer_packed_there_has_the_hosts_bytes),
        cmocka_unit_test(a_run_is_a_cpus_but_for_rounding),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
