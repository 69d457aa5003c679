/* Products and experts of every format and number of rows. */
#ifndef TESTS_KERNELS_PRODUCTS_H
#define TESTS_KERNELS_PRODUCTS_H
#include "backend/kernels_fixture.h"

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
            double cols = (double)w->src.cols;
            /* the roundings of a sum in order add up as the root of their number */
            double units = 8 + (on_device() && x->m.rows > ROWS_EXACT ? 3 * cols / 16 : sqrt(cols) / 4);
            if (on_device() && bf16_inputs && x->m.rows > ROWS_EXACT && w->src.input == INPUT_FP8_ROW)
                units += 0x1p-12 / (double)FLT_EPSILON; /* FP8 tensor cores keep 14 bits of a sum */
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
    reserve(140, 1024, 64, 2, 4);
    /* many tiles a block: of heads; two rows have kernels of their own */
    if (on_device()) product_case(WEIGHT_BF16, 1, 8 * 64 * 150, 128, INPUT_AS_IS);
    if (on_device()) product_case(WEIGHT_FP8, 1, 8 * 64 * 150, 128, INPUT_FP8_ROW);
    for (int n = 2; on_device() && n <= 4; n++) {
        product_case(WEIGHT_BF16, n, 8 * 64 * 150, 256, INPUT_AS_IS);
        product_case(WEIGHT_FP8, n, 8 * 64 * 150, 128, INPUT_FP8_ROW);
    }
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
    for (int f = 0; f < 3; f++) /* few panels and many rows, which are divided among threads */
        product_case((enum weight_format[]){ WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4 }[f],
                     128 + random_below(12), 80, 64, f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
}

static void join(int n, struct weight **list)
{
    cpu.ops->weights_join(cpu.queue, list, n);
}

static void bind(struct experts *x)
{
    struct err e = { 0 };
    must(cpu.ops->experts_bind(cpu.queue, x, &e), &e);
}

static void experts_case(enum weight_format f, int64_t n, int64_t hidden, int64_t inner, int n_experts, int k)
{
    enum { EXPERTS_MOST = 48 };
    struct made w[3][EXPERTS_MOST];
    struct weight *of_ref[3 * EXPERTS_MOST], *of_cpu[3 * EXPERTS_MOST];
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
    if (n <= ROWS_EXACT || (f == WEIGHT_NVFP4 && !on_device()))
        assert_memory_equal(one.m.data, got.m.data + (n - 1) * got.m.stride, (size_t)hidden * 4);
    struct guarded *all[] = { &x, &want, &got, &logits, &one };
    for (int i = 0; i < 5; i++) drop(all[i]);
    for (int i = 0; i < 2; i++) give(id[i]), give(weight[i]);
    cpu.ops->experts_unbind(cpu.queue, &xc);
    for (int e = 0; e < n_experts; e++)
        for (int m = 0; m < 3; m++) drop_weight(&w[m][e]);
}

/* Of equal logits the first counts. step: logits are multiples of it; 0: any. */
static void route_case(int64_t n, int64_t n_experts, int k, float step)
{
    struct guarded logits = filled(n, n_experts, random_below(5), 3);
    const struct backend *all[] = { &ref, &cpu };
    int32_t *id[2];
    float *weight[2];
    for (int64_t i = 0; step > 0 && i < n; i++)
        for (int64_t c = 0; c < n_experts; c++) {
            float *x = logits.m.data + i * logits.m.stride + c;
            *x = step * floorf(*x / step);
        }
    for (int b = 0; b < 2; b++) {
        id[b] = take((size_t)(n * k) * 4);
        weight[b] = take((size_t)(n * k) * 4);
        all[b]->ops->route(all[b]->queue, &(struct picks){ id[b], weight[b], k }, logits.m);
        finish();
    }
    assert_memory_equal(id[0], id[1], (size_t)(n * k) * 4);
    for (int64_t i = 0; i < n * k; i++) assert_true(fabsf(weight[0][i] - weight[1][i]) <= 1e-6f);
    drop(&logits);
    for (int b = 0; b < 2; b++) give(id[b]), give(weight[b]);
}

static void routes(void)
{
    static const int shapes[][2] = { { 8, 8 }, { 33, 5 }, { 256, 8 }, { 256, 32 }, { 250, 9 }, { 300, 8 } };
    reserve(64, 64, 64, 32, 300);
    for (int i = 0; i < 6; i++)
        for (int f = 0; f < 4; f++)
            route_case(5, shapes[i][0], shapes[i][1], (float[]){ 0, 0.125f, 0.001f, 100 }[f]);
}

static void experts(void)
{
    static const enum weight_format formats[] = { WEIGHT_NVFP4, WEIGHT_BF16, WEIGHT_FP8, WEIGHT_FP8_BLOCK };
    routes();
    if (on_device()) { /* several units, more jobs a block than it has warps */
        reserve(4, 2080, 640, 10, 12);
        experts_case(WEIGHT_NVFP4, 1 + random_below(4), 2048 + 16 * random_below(3),
                     16 * (20 + random_below(21)), 12, 10);
        experts_case(WEIGHT_NVFP4, 1, 2048, 512, 12, 8);
        reserve(2, 2560, 2560, 10, 12); /* too wide for experts_fp4.cu */
        experts_case(WEIGHT_NVFP4, 2, 64, 2560, 12, 10);
    }
    reserve(64, 256, 80, 4, 8);
    for (int f = 0; f < 4; f++)
        for (int i = 0; i < 6; i++)
            experts_case(formats[f], i < 2 ? 33 + random_below(30) : 1 + random_below(32),
                         16 * (1 + random_below(12)), 16 * (1 + random_below(5)), 8,
                         1 + (int)random_below(4));
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

#endif
