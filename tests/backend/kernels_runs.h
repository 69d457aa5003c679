/* Fused runs against the operations they stand for, and many rows at once. */
#ifndef TESTS_KERNELS_RUNS_H
#define TESTS_KERNELS_RUNS_H
#include "backend/kernels_products.h"
#include "backend/kernels_sequences.h"

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

/* lean: what is not wanted then is not looked at */
static void delta_run_case(int key_heads, int group, int key_dim, int value_dim, const int64_t *n, bool lean)
{
    enum { HIDDEN = 192 };
    struct plan p;
    make_plan(&p, n, (int64_t[]){ 0, 0, 0 });
    struct delta_shape s = { key_heads, key_heads * group, key_dim, value_dim, 4 };
    int64_t values = (int64_t)s.value_heads * value_dim, channels = 2 * (int64_t)key_heads * key_dim + values,
            rows = p.step.n;
    struct made w = make_weight(WEIGHT_BF16, HIDDEN, values, INPUT_AS_IS);
    struct guarded taps = filled(4, channels, 0, 0.5f), A = filled(1, s.value_heads, 0, 1),
                   bias = filled(1, s.value_heads, 0, 1), gain = filled(1, value_dim, 0, 1);
    struct guarded in[7] = { filled(rows, HIDDEN, 2, 1),          filled(rows, channels, 4, 1),
                             filled(rows, values, 1, 2),          filled(rows, s.value_heads, 1, 2),
                             filled(rows, s.value_heads, 1, 2),   filled(3, 3 * channels, 0, 1),
                             filled(3, values * key_dim, 0, 0.3f) };
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
                               .shape = &s,
                               .lean = lean };
        all[b]->ops->delta_run(all[b]->queue, &r, &p.step);
        finish();
        x[b] = c[0];
        state[b][0] = c[5];
        state[b][1] = c[6];
        for (int i = 1; i < 5; i++) drop(&c[i]);
    }
    check_close(&state[1][0], &state[0][0], 0, 0, "delta_run: conv state");
    check_run(&state[1][1], &state[0][1], false, "delta_run: state");
    if (!lean) check_run(&out[1][3], &out[0][3], false, "delta_run: o");
    if (!lean) check_run(&out[1][0], &out[0][0], false, "delta_run: y");
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
                               const int64_t *past, bool lean)
{
    enum { DIM = 256, HIDDEN = 192 };
    struct plan p;
    make_plan(&p, n, past);
    int64_t rows = p.step.n, heads = (int64_t)group * n_kv, line = (int64_t)n_kv * DIM;
    struct made w = make_weight(WEIGHT_BF16, HIDDEN, heads * DIM, INPUT_AS_IS);
    struct guarded gains = filled(2, DIM, 0, 1),
                   in[4] = { filled(rows, HIDDEN, 2, 1), filled(rows, heads * 2 * DIM, 4, 2),
                             filled(rows, line, 0, 1), filled(rows, line, 1, 1) };
    struct guarded out[2][2], x[2];
    struct kv_cache kv[2] = { take_cache(dtype, n_kv, DIM), take_cache(dtype, n_kv, DIM) };
    float *inverse = take(12);
    uint8_t *axis = take(3);
    memcpy(inverse, (float[]){ 1, 0.3f, 0.01f }, 12);
    memcpy(axis, (uint8_t[]){ 0, 1, 2 }, 3);
    struct rope rope = { 3, 1.1386294f, inverse, axis };
    fill_caches(&kv[0], &kv[1]);
    const struct backend *all[] = { &ref, &cpu };
    for (int b = 0; b < 2; b++) {
        struct guarded c[4];
        for (int i = 0; i < 4; i++) c[i] = copy_of(&in[i]);
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
                                   .kv = &kv[b],
                                   .o = b ? w.cpu : w.ref,
                                   .lean = lean };
        all[b]->ops->attention_run(all[b]->queue, &r, &p.step);
        finish();
        x[b] = c[0];
        for (int i = 1; i < 4; i++) drop(&c[i]);
    }
    if (!lean) check_run(&out[1][1], &out[0][1], dtype != KV_F32, "attention_run: att");
    if (!lean) check_run(&out[1][0], &out[0][0], dtype != KV_F32, "attention_run: y");
    check_run(&x[1], &x[0], dtype != KV_F32, "attention_run: x");
    for (int b = 0; b < 2; b++) drop(&out[b][0]), drop(&out[b][1]), drop(&x[b]);
    for (int i = 0; i < 4; i++) drop(&in[i]);
    for (int b = 0; b < 2; b++) give_cache(&kv[b]);
    drop(&gains);
    give(inverse);
    give(axis);
    drop_weight(&w);
}

/* norm_products of router, gate and up, then moe_run; routing is set beforehand by logits of ref. */
static void moe_run_case(enum weight_format f, int64_t n, int64_t hidden, int64_t inner, int k, bool lean)
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
    bool joined = random_below(2);
    if (joined) join(2, (struct weight *[]){ dense[1].cpu, dense[2].cpu });
    for (int b = 0; b < 2; b++) {
        struct experts list = { EXPERTS, lists[b][0], lists[b][1], lists[b][2], NULL };
        struct err e = { 0 };
        must(all[b]->ops->experts_bind(all[b]->queue, &list, &e), &e);
        struct guarded *o = out[b];
        o[0] = copy_of(&x);
        for (int i = 1; i < 8; i++) o[i] = guarded(n, i < 4 ? hidden : i < 7 ? inner : 1, 4);
        if (joined) {
            drop(&o[4]), drop(&o[5]);
            guarded_beside(true, n, 2, (struct guarded *[]){ &o[4], &o[5] }, (int64_t[]){ inner, inner });
        }
        int32_t *id = take((size_t)(n * k) * 4);
        float *weight = take((size_t)(n * k) * 4);
        struct picks picks = { id, weight, k };
        struct norm_products in = { .h = o[1].m,
                                    .x = o[0].m,
                                    .gain = gain.m.data,
                                    .eps = 1e-6f,
                                    .n = 3,
                                    .out = { o[7].m, o[4].m, o[5].m } };
        for (int i = 0; i < 3; i++) in.w[i] = b ? dense[i].cpu : dense[i].ref;
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
                             .w_down = b ? dense[3].cpu : dense[3].ref,
                             .lean = lean };
        if (lean) in.reader = &r;
        all[b]->ops->norm_products(all[b]->queue, &in);
        all[b]->ops->moe_run(all[b]->queue, &r);
        finish();
        give(id);
        give(weight);
        all[b]->ops->experts_unbind(all[b]->queue, &list);
    }
    if (!lean) check_run(&out[1][1], &out[0][1], false, "moe_run: h");
    if (!lean) check_run(&out[1][6], &out[0][6], f == WEIGHT_FP8, "moe_run: hidden");
    if (!lean) check_run(&out[1][2], &out[0][2], f == WEIGHT_FP8, "moe_run: y");
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
        moe_run_case(formats[f], 40, 256, 128, 2, f == 1);
        moe_run_case(formats[f], 200, 128, 256, 4, f != 1);
        moe_run_case(formats[f], 1 + random_below(3), 16 * (1 + random_below(20)),
                     16 * (1 + random_below(16)), 4, f != 1);
    }
    if (!on_device()) return;
    reserve(8, 2816, 256, 4, 8); /* so wide that shared memory holds few tiles of experts */
    for (int i = 0; i < 3; i++)
        moe_run_case(WEIGHT_NVFP4, 2 + random_below(7), 256 * (9 + i) - 16 * random_below(16),
                     16 * (1 + random_below(16)), 4, i == 1);
    reserve(8, 2080, 640, 8, 8); /* of one row, and of several, whose rings have fewer places in wider rows */
    for (int i = 0; i < 3; i++)
        moe_run_case(WEIGHT_NVFP4, i == 0 ? 1 : 2 + random_below(7), 2048 + 16 * i,
                     16 * (20 + random_below(21)), 8, i % 2);
}

static void delta_runs(void)
{
    static const int64_t n[][3] = {
        { 64, 1, 1 }, { 40, 1, 3 }, { 65, 2, 130 }, { 128, 64, 63 }, { 1, 1, 1 }
    };
    static const int dims[][2] = { { 128, 128 }, { 256, 128 }, { 20, 48 }, { 256, 64 } };
    reserve(300, 1024, 64, 2, 4);
    for (int i = 0; i < 4; i++) delta_run_case(1 + i % 2, 1 + (i + 1) % 2, 128, 128, n[i], i % 2);
    for (int i = 0; i < 4; i++)
        delta_run_case(1 + i % 2, 1 + (i + 1) % 2, dims[i][0], dims[i][1], n[4], i % 2);
}

static void attention_runs(void)
{
    static const int64_t n[][3] = { { 64, 1, 1 }, { 40, 1, 3 }, { 65, 2, 130 }, { 100, 64, 63 },
                                    { 5, 1, 9 },  { 1, 1, 1 },  { 1, 1, 1 } };
    static const int64_t past[][3] = { { 0, 0, 0 },    { 5, 100, 0 },  { 200, 1, 127 }, { 300, 0, 65 },
                                       { 62, 0, 190 }, { 450, 15, 0 }, { 16, 300, 137 } };
    reserve(300, 4096, 64, 2, 4);
    for (int i = on_device() ? 0 : 4; i < 7; i++) /* a CPU's run is the operations that `sequences` tries */
        for (int d = 0; d < kv_dtypes(); d++)
            attention_run_case((enum kv_dtype)d, (int[]){ 8, 2, 1 }[(i + d) % 3], 1 + i % 2, n[i], past[i],
                               (i + d) % 2);
    for (int d = 0; d < kv_dtypes(); d++)
        attention_run_case((enum kv_dtype)d, 16, 1, n[5], past[5 + d % 2], d % 2);
}

/* More rows than ROWS_EXACT, in shapes that a GPU has kernels for. Elsewhere they are what `products` tries.
 */

static void many_rows(void)
{
    static const int64_t ns[] = { 33, 64, 100, 129, 300 }, rows[] = { 1, 100, 128, 131, 300, 48, 64 };
    static const enum weight_format formats[] = { WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4 };
    if (!on_device()) return;
    reserve(512, 1024, 256, 4, 8);
    for (int i = 0; i < 5; i++)
        for (int f = 0; f < 4; f++)
            product_case(formats[f % 3], ns[i], rows[random_below(7)], 128 * (1 + random_below(3)),
                         f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
    for (int f = 0; f < 3; f++) /* wide enough for the large tiles */
        product_case(formats[f], 400, 4500 + random_below(3), 128, INPUT_AS_IS);
    product_case(WEIGHT_FP8, 510, 4800, 896 + 128 * random_below(2), INPUT_FP8_ROW); /* a library's, if any */
    for (int f = 0; f < 3; f++)
        for (int i = 0; i < 4; i++)
            experts_case(formats[f], i < 2 ? 33 + random_below(30) : 150 + random_below(100),
                         128 * (1 + random_below(3)), 128 * (1 + random_below(2)), 8, i < 2 ? 1 : 4);
    /* more work than multiprocessors, tiles of few and of many slots */
    reserve(512, 768, 1024, 4, 48);
    experts_case(WEIGHT_NVFP4, 50 + random_below(20), 768, 512, 48, 2);
    experts_case(WEIGHT_NVFP4, 110 + random_below(10), 256, 1024, 17, 4);
    reserve(2100, 256, 128, 4, 8); /* more picks than one block sorts */
    product_case(WEIGHT_BF16, 33 + random_below(60), 16 * (1 + random_below(4)), 256, INPUT_AS_IS);
    product_case(WEIGHT_BF16, 1025 + random_below(64), 16 * (1 + random_below(4)), 256, INPUT_AS_IS);
    experts_case(WEIGHT_NVFP4, 2049 + random_below(50), 128, 128, 8, 4);
}

#endif
