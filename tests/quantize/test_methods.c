/* Scales by search and rounding that passes errors on: judged by their own measures, recomputed here in
 * double from what was packed, and as whole runs over the demo checkpoint. */
#include "num/e2m1.h"
#include "quantize/contest.h"
#include "quantize/fixture.h"
#include "quantize/gptq.h"
#include "quantize/moments.h"
#include "quantize/search.h"
#include <math.h>

enum { COLS = 96, ROWS = 24, SAMPLES = 400 };

static uint64_t seed = 7;

static double uniform(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return ((double)(seed >> 11) + 0.5) * 0x1p-53;
}

static float normal(void)
{
    double u = uniform();
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * uniform()));
}

struct problem {
    float w[ROWS][COLS], x[SAMPLES][COLS], h[COLS][COLS], global;
};

/* What backend/ops.h calls moments. x: [rows][n]. */
static void add_moments(float *h, const float *x, int64_t rows, int64_t n)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = i; j < n; j++) h[i * n + j] += x[r * n + i] * x[r * n + j];
}

/* Weights of BF16 values; inputs that depend on one another, and of different size. */
static void fill_problem(struct problem *p)
{
    float top = 0;
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) {
            p->w[r][c] = bf16_round(0.02f * normal());
            top = fmaxf(top, fabsf(p->w[r][c]));
        }
    for (int s = 0; s < SAMPLES; s++)
        for (int c = 0; c < COLS; c++)
            p->x[s][c] = normal() * (c % 7 ? 1.0f : 3.0f) + (c > 2 ? 0.7f * p->x[s][c - 3] : 0);
    p->global = nvfp4_global_scale_roomy(top);
    memset(p->h, 0, sizeof p->h);
    add_moments(&p->h[0][0], &p->x[0][0], SAMPLES, COLS);
}

/* Sum over rows and samples of ((W - Q) x)^2. */
static double output_error(const struct problem *p, const uint8_t *codes, const e4m3 *scale)
{
    double total = 0;
    for (int r = 0; r < ROWS; r++) {
        float q[COLS];
        nvfp4_unpack_row(q, codes + r * COLS / 2, scale + r * COLS / NVFP4_GROUP, p->global, COLS);
        for (int s = 0; s < SAMPLES; s++) {
            double sum = 0;
            for (int c = 0; c < COLS; c++) sum += ((double)p->w[r][c] - (double)q[c]) * (double)p->x[s][c];
            total += sum * sum;
        }
    }
    return total;
}

static double group_error(const float *w, const float *h, int scale, float global, uint8_t *codes)
{
    double sum = 0;
    float step = e4m3_to_f32((e4m3){ (uint8_t)scale }) / global;
    for (int k = 0; k < NVFP4_GROUP; k++) {
        uint8_t code = e2m1_from_f32(w[k] / step);
        double d = (double)w[k] - (double)(e2m1_to_f32(code) * step);
        sum += (double)h[k] * d * d;
        if (codes) codes[k] = code;
    }
    return sum;
}

/* The best of all 126 scales, where it lies in the range that is searched; at most the nearest method's. */
static void search_finds_the_best_scale(void **state)
{
    (void)state;
    for (int i = 0; i < 3000; i++) {
        float w[NVFP4_GROUP], h[NVFP4_GROUP], size = ldexpf(1, -(int)(uniform() * 14));
        uint8_t codes[NVFP4_GROUP], want[NVFP4_GROUP];
        for (int k = 0; k < NVFP4_GROUP; k++) {
            w[k] = bf16_round(normal() * size);
            h[k] = (float)exp(2 * (double)normal());
        }
        struct search_group g = { .value = w, .start = w, .weight = h };
        int usual = nvfp4_group_scale(w, 600).bits, got = search_group(codes, &g, 600).bits;
        double error = group_error(w, h, got, 600, want), best = INFINITY;
        float from = 0.7f * e4m3_to_f32((e4m3){ (uint8_t)usual });
        int low = e4m3_from_f32(from).bits, high = e4m3_from_f32(from / 0.7f * 1.8f).bits;
        for (int c = low > 0 ? low : 1; c <= high; c++) best = fmin(best, group_error(w, h, c, 600, NULL));
        assert_memory_equal(codes, want, sizeof codes);
        assert_true(error <= best * (1 + 1e-5));
        assert_true(error <= group_error(w, h, usual, 600, NULL) * (1 + 1e-6));
        assert_true(got >= 1 && got <= 0x7e);
    }
}

/* The better of its two scales, and never worse than the nearest method's under the same global scale. */
static void four_over_six_takes_the_better(void **state)
{
    (void)state;
    static const float ones[NVFP4_GROUP] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    int fours = 0;
    for (int i = 0; i < 3000; i++) {
        float w[NVFP4_GROUP], size = ldexpf(1, -(int)(uniform() * 14));
        uint8_t packed[NVFP4_GROUP / 2], codes[NVFP4_GROUP], want[NVFP4_GROUP];
        e4m3 scale;
        for (int k = 0; k < NVFP4_GROUP; k++) w[k] = bf16_round(normal() * size);
        four_over_six_row(packed, &scale, w, 300, NVFP4_GROUP);
        for (int k = 0; k < NVFP4_GROUP; k++) codes[k] = packed[k / 2] >> k % 2 * 4 & 15;
        int six = nvfp4_group_scale(w, 300).bits;
        int four = e4m3_from_f32(1.5f * e4m3_to_f32((e4m3){ (uint8_t)six })).bits;
        assert_true(scale.bits == six || scale.bits == four);
        fours += scale.bits == four;
        double error = group_error(w, ones, scale.bits, 300, want);
        assert_memory_equal(codes, want, sizeof codes);
        assert_true(error <=
                    fmin(group_error(w, ones, six, 300, NULL), group_error(w, ones, four, 300, NULL)) *
                        (1 + 1e-5));
    }
    assert_true(fours > 300 && fours < 2700);
}

static void search_of_zeros(void **state)
{
    (void)state;
    float w[NVFP4_GROUP] = { 0 };
    uint8_t codes[NVFP4_GROUP / 2];
    e4m3 scale;
    four_over_six_row(codes, &scale, w, 1, NVFP4_GROUP);
    assert_int_equal(scale.bits, 0x20);
    search_row(codes, &scale, w, NULL, 1, NVFP4_GROUP);
    assert_int_equal(scale.bits, 0x20);
    for (int k = 0; k < NVFP4_GROUP / 2; k++) assert_int_equal(codes[k], 0);
}

/* R from what gptq_factor leaves; R R^T must be the damped moments over their mean. */
static void factor_gives_the_moments_back(void **state)
{
    (void)state;
    static struct problem p;
    static float f[COLS][COLS];
    double mean = 0;
    fill_problem(&p);
    memcpy(f, p.h, sizeof f);
    assert_true(gptq_factor(&f[0][0], COLS));
    for (int i = 0; i < COLS; i++) mean += (double)p.h[i][i] / COLS;
    for (int i = 0; i < COLS; i++)
        for (int j = i; j < COLS; j++) {
            double sum = 0; /* R[i][k] = f[k][i] * R[k][k] for i < k */
            for (int k = j; k < COLS; k++)
                sum += (i == k ? 1 : (double)f[k][i]) * (j == k ? 1 : (double)f[k][j]) * (double)f[k][k];
            double want = (double)p.h[i][j] / mean + (i == j ? GPTQ_DAMPING : 0);
            assert_true(fabs(sum - want) <= 1e-5 * (1 + fabs(want)));
        }
}

static void no_factor_without_inputs(void **state)
{
    (void)state;
    float zero[4] = { 0 }, bad[4] = { 1, NAN, 0, 1 }, indefinite[4] = { 1, 3, 0, 1 };
    assert_false(gptq_factor(zero, 2));
    assert_false(gptq_factor(bad, 2));
    assert_false(gptq_factor(indefinite, 2));
}

static void pack_gptq(const struct problem *p, const float *factor, uint8_t *codes, e4m3 *scale)
{
    static float scratch[2 * COLS * GPTQ_ROWS];
    for (int r = 0; r < ROWS; r += GPTQ_ROWS)
        gptq_pack_rows(codes + r * COLS / 2, scale + r * COLS / NVFP4_GROUP, p->w[r],
                       ROWS - r < GPTQ_ROWS ? ROWS - r : GPTQ_ROWS, factor, p->global, COLS, scratch);
}

static void gptq_lowers_the_output_error(void **state)
{
    (void)state;
    static struct problem p;
    static uint8_t codes[ROWS * COLS / 2];
    static e4m3 scale[ROWS * COLS / NVFP4_GROUP];
    float importance[COLS];
    fill_problem(&p);
    for (int c = 0; c < COLS; c++) importance[c] = p.h[c][c];
    for (int r = 0; r < ROWS; r++)
        nvfp4_pack_row(codes + r * COLS / 2, scale + r * COLS / NVFP4_GROUP, p.w[r], p.global, COLS);
    double nearest = output_error(&p, codes, scale);
    for (int r = 0; r < ROWS; r++)
        search_row(codes + r * COLS / 2, scale + r * COLS / NVFP4_GROUP, p.w[r], importance, p.global, COLS);
    double mse = output_error(&p, codes, scale);
    assert_true(gptq_factor(&p.h[0][0], COLS));
    pack_gptq(&p, &p.h[0][0], codes, scale);
    double gptq = output_error(&p, codes, scale);
    assert_true(mse < 0.9 * nearest);
    assert_true(gptq < 0.75 * mse);
}

static void gptq_of_independent_inputs_is_mse(void **state)
{
    (void)state;
    static struct problem p;
    static uint8_t codes[2][ROWS * COLS / 2];
    static e4m3 scale[2][ROWS * COLS / NVFP4_GROUP];
    float identity[COLS][COLS] = { 0 };
    fill_problem(&p);
    for (int c = 0; c < COLS; c++) identity[c][c] = 5;
    assert_true(gptq_factor(&identity[0][0], COLS));
    pack_gptq(&p, &identity[0][0], codes[0], scale[0]);
    for (int r = 0; r < ROWS; r++)
        search_row(codes[1] + r * COLS / 2, scale[1] + r * COLS / NVFP4_GROUP, p.w[r], NULL, p.global, COLS);
    assert_memory_equal(codes[0], codes[1], sizeof codes[0]);
    assert_memory_equal(scale[0], scale[1], sizeof scale[0]);
}

/* An expert whose inputs were all zero is packed as mse would with every column alike; its neighbour is not.
 */
static void zero_moments_fall_back(void **state)
{
    (void)state;
    struct config config = { .n_experts = 2, .hidden_size = 32, .moe_intermediate = 16 };
    struct curvatures c;
    struct pool *pool;
    struct err e = { 0 };
    if (!curvatures_init(&c, &config, true, &e) || !pool_create(&pool, 2, &e)) fail_msg("%s", e.text);
    memset(c.moments.block, 0, moments_block_bytes(&c.moments));
    memset(c.moments.down, 0, moments_down_bytes(&c.moments));
    for (int i = 0; i < 16; i++) moments_down(&c.moments, 1)[i * 17] = (float)(1 + i);
    curvatures_update(&c, pool);
    struct matrix m = { .part = PART_DOWN, .expert = 0 };
    struct curvature none = curvatures_of(&c, &m);
    assert_null(none.factor);
    for (int i = 0; i < 16; i++) assert_true(none.importance[i] == 1);
    m.expert = 1;
    struct curvature some = curvatures_of(&c, &m);
    assert_non_null(some.factor);
    assert_true(some.importance[15] == 16 / 8.5f);
    m.part = PART_GATE;
    assert_null(curvatures_of(&c, &m).factor);
    pool_free(pool);
    curvatures_deinit(&c);
}

/* Inputs of which the samples held out look like the others, or like nothing that was seen. */
static void fill_moments(float *h, int64_t n, double *mix)
{
    enum { TOKENS = 64 };
    float x[TOKENS][32];
    for (int t = 0; t < TOKENS; t++) {
        double common = (double)normal();
        for (int64_t c = 0; c < n; c++) x[t][c] = (float)((double)normal() + mix[c] * common);
    }
    memset(h, 0, (size_t)(n * n) * sizeof *h);
    add_moments(h, &x[0][0], TOKENS, n);
}

static void held_out_samples_decide(void **state)
{
    (void)state;
    struct config config = { .n_experts = 1, .hidden_size = 32, .moe_intermediate = 32 };
    struct pool *pool;
    struct err e = { 0 };
    double seen[32], unseen[32], seen_trace = 0;
    uint16_t weights[32 * 32];
    for (int i = 0; i < 32 * 32; i++) weights[i] = bf16_from_f32(0.02f * normal()).bits;
    for (int c = 0; c < 32; c++) {
        seen[c] = 8;
        unseen[c] = c % 2 ? 8 : -8; /* what makes up for errors on the one doubles them on the other */
    }
    if (!pool_create(&pool, 2, &e)) fail_msg("%s", e.text);
    for (int alike = 0; alike < 2; alike++) {
        struct contest c;
        struct moments m;
        struct contest_result r;
        struct matrix matrices[N_PARTS];
        struct contestant list[N_PARTS];
        if (!contest_init(&c, &config, &e) || !moments_init(&m, 1, 32, 32, &e)) fail_msg("%s", e.text);
        fill_moments(m.block, 32, seen);
        fill_moments(m.down, 32, seen);
        fill_moments(c.held.block, 32, alike ? seen : unseen);
        fill_moments(c.held.down, 32, seen);
        for (int i = 0; i < N_PARTS; i++) {
            matrices[i] = (struct matrix){
                .data = (const uint8_t *)weights, .rows = 32, .cols = 32, .part = (enum expert_part)i
            };
            list[i] = (struct contestant){ &matrices[i], 0.08f };
        }
        seen_trace = (double)m.block[0] + (double)c.held.block[0];
        if (!contest_run(&r, &c, &m, list, N_PARTS, pool, &e)) fail_msg("%s", e.text);
        assert_true(r.block == (alike == 1));
        assert_true(r.down);
        assert_true(m.block[0] == (float)seen_trace); /* for the packing that follows, all count */
        contest_deinit(&c);
        moments_deinit(&m);
    }
    pool_free(pool);
}

static void an_eighth_is_held_out(void **state)
{
    (void)state;
    static const int64_t n[] = { 0, 1, 2, 7, 8, 15, 16, 64 }, held[] = { 0, 0, 1, 1, 1, 1, 2, 8 };
    for (int i = 0; i < 8; i++) assert_int_equal(contest_held(n[i]), held[i]);
}

/* Whole runs. */

static void threads_do_not_matter(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    static const struct {
        enum quantize_method method;
        const char *one, *two;
    } runs[] = { { QUANTIZE_AUTO, "auto1", "auto2" },
                 { QUANTIZE_FOUR_OVER_SIX, "four1", "four2" },
                 { QUANTIZE_MSE, "mse1", "mse2" },
                 { QUANTIZE_GPTQ, "gptq1", "gptq2" } };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        struct quantize_options o = fixture_options(&f, DEMO, in(&f, runs[i].one));
        o.method = runs[i].method;
        o.threads = 1;
        struct quantize_result one = must_run(&o);
        o.threads = 2;
        const char *first = o.destination;
        o.destination = in(&f, runs[i].two);
        struct quantize_result two = must_run(&o);
        assert_true(one.nvfp4_error.mean == two.nvfp4_error.mean);
        assert_true(one.gptq_matrices == two.gptq_matrices);
        assert_true(one.bytes_out == two.bytes_out);
        same_tensors(first, o.destination);
    }
    fixture_deinit(&f);
}

static void methods_differ_only_in_codes(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    struct quantize_options o = fixture_options(&f, DEMO, in(&f, "nearest"));
    struct quantize_result nearest = must_run(&o);
    o.method = QUANTIZE_MSE;
    o.destination = in(&f, "mse");
    struct quantize_result mse = must_run(&o);
    assert_true(mse.nvfp4_error.mean < 0.95 * nearest.nvfp4_error.mean);
    assert_true(mse.bytes_out == nearest.bytes_out && mse.nvfp4_matrices == nearest.nvfp4_matrices);
    assert_true(mse.fp8_error.mean == nearest.fp8_error.mean);
    assert_string_equal(f.warnings, "");
    assert_true(nearest.gptq_matrices == 0 && mse.gptq_matrices == 0);
    o.method = QUANTIZE_FOUR_OVER_SIX;
    o.destination = in(&f, "four");
    struct quantize_result four = must_run(&o);
    assert_true(four.nvfp4_error.mean < nearest.nvfp4_error.mean &&
                four.nvfp4_error.mean > mse.nvfp4_error.mean);
    fixture_deinit(&f);
}

/* Method auto writes what gptq or mse writes: mse with one sample, since nothing can be held out. One step is
 * held out of four, so that sums add up in the same order. */
static void auto_is_one_of_its_methods(void **state)
{
    (void)state;
    struct fixture f;
    fixture_init(&f);
    struct quantize_options o = fixture_options(&f, DEMO, in(&f, "auto"));
    o.method = QUANTIZE_AUTO;
    o.num_calibration_samples = 1;
    const char *first = o.destination;
    must_run(&o);
    o.method = QUANTIZE_MSE;
    o.destination = in(&f, "mse");
    must_run(&o);
    same_tensors(first, o.destination);
    o.num_calibration_samples = 4;
    o.max_seq_length = 512;
    o.method = QUANTIZE_AUTO;
    o.destination = first = in(&f, "auto4");
    struct quantize_result r = must_run(&o);
    assert_int_equal(r.gptq_matrices, r.nvfp4_matrices); /* so much is enough for it to win everywhere */
    o.method = QUANTIZE_GPTQ;
    o.destination = in(&f, "gptq4");
    must_run(&o);
    same_tensors(first, o.destination);
    fixture_deinit(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(search_finds_the_best_scale),
        cmocka_unit_test(four_over_six_takes_the_better),
        cmocka_unit_test(search_of_zeros),
        cmocka_unit_test(factor_gives_the_moments_back),
        cmocka_unit_test(no_factor_without_inputs),
        cmocka_unit_test(gptq_lowers_the_output_error),
        cmocka_unit_test(gptq_of_independent_inputs_is_mse),
        cmocka_unit_test(zero_moments_fall_back),
        cmocka_unit_test(an_eighth_is_held_out),
        cmocka_unit_test(held_out_samples_decide),
        cmocka_unit_test(threads_do_not_matter),
        cmocka_unit_test(methods_differ_only_in_codes),
        cmocka_unit_test(auto_is_one_of_its_methods),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
