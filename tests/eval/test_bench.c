/* Throughput runs: the bytes of the released shape against the figures of its tensor table, on a backend that
 * computes nothing; what the account of operations says against a count of our own; the statistics against
 * llama-bench's documented sample; synthetic models. */
#include "backend/fused.h"
#include "backend/host.h"
#include "checkpoint/temp.h"
#include "eval/bench.h"
#include "eval/synthetic.h"
#include "support/models.h"
#include <math.h>

/* A backend that does nothing but look at the weights it is given and pick experts in turn. */

struct counters {
    int64_t weights, picked;
    uint64_t bytes, touched;
};
static struct counters counted;

static void touch(const void *data, uint64_t bytes)
{
    const uint8_t *p = data;
    assert_non_null(p);
    counted.touched += p[0] + (uint64_t)p[bytes - 1];
}

static bool null_weight_create(struct queue *q, struct weight **out, const struct weight_source *src,
                               struct err *e)
{
    (void)q;
    (void)e;
    struct weight w = {
        .format = src->format, .rows = src->rows, .cols = src->cols, .is_table = src->is_table
    };
    *out = malloc(sizeof **out);
    assert_non_null(*out);
    **out = w;
    uint64_t n = (uint64_t)(w.rows * w.cols);
    touch(src->data, w.format == WEIGHT_NVFP4 ? n / 2 : w.format == WEIGHT_FP8 ? n : 2 * n);
    if (w.format == WEIGHT_NVFP4) {
        touch(src->scale, n / 16);
        assert_true(src->global > 1 && isfinite(src->global));
    }
    counted.weights++;
    if (!w.is_table) counted.bytes += trace_weight_bytes(&w);
    return true;
}

static void null_weight_free(struct queue *q, struct weight *w)
{
    (void)q;
    free(w);
}

static bool null_memory_create(struct queue *q, void **out, uint64_t bytes, struct err *e)
{
    (void)q;
    *out = calloc(1, bytes + 1);
    return *out || err_memory(e, "memory", bytes);
}

static void null_memory_free(struct queue *q, void *memory)
{
    (void)q;
    free(memory);
}

static void null_copy(struct queue *q, void *to, const void *from, uint64_t bytes)
{
    (void)q;
    memcpy(to, from, bytes);
}

static void null_zero(struct queue *q, void *memory, uint64_t bytes)
{
    (void)q;
    memset(memory, 0, bytes);
}

static bool null_reserve(struct queue *q, const struct step_limits *l, struct err *e)
{
    (void)q;
    (void)l;
    (void)e;
    return true;
}

static void null_route(struct queue *q, const struct picks *picks, struct mat logits)
{
    (void)q;
    for (int64_t i = 0; i < logits.rows * picks->k; i++)
        picks->expert[i] = (int32_t)(counted.picked++ % logits.cols);
}

/* The other operations, by the shape of their arguments. */
static void null_1(struct queue *q, struct mat y, const struct weight *w, const struct step_rows *r)
{
    (void)q, (void)y, (void)w, (void)r;
}
static void null_2(struct queue *q, struct mat y, struct mat x, const struct weight *w)
{
    (void)q, (void)y, (void)x, (void)w;
}
static void null_3(struct queue *q, struct mat y, struct mat x)
{
    (void)q, (void)y, (void)x;
}
static void null_4(struct queue *q, struct mat y, struct mat x, const float *g, float e)
{
    (void)q, (void)y, (void)x, (void)g, (void)e;
}
static void null_5(struct queue *q, struct mat y, struct mat x, const int64_t *i)
{
    (void)q, (void)y, (void)x, (void)i;
}
static void null_6(struct queue *q, struct mat y, struct mat a, struct mat b)
{
    (void)q, (void)y, (void)a, (void)b;
}
static void null_7(struct queue *q, struct mat x, int a, int b, int c, const float *g, float e,
                   const struct rope *p, const struct step_rows *r)
{
    (void)q, (void)x, (void)a, (void)b, (void)c, (void)g, (void)e, (void)p, (void)r;
}
static void null_8(struct queue *q, const struct kv_cache *c, struct mat k, struct mat v,
                   const struct step_rows *r)
{
    (void)q, (void)c, (void)k, (void)v, (void)r;
}
static void null_9(struct queue *q, struct mat y, struct mat x, int n, const struct kv_cache *c,
                   const struct step_rows *r)
{
    (void)q, (void)y, (void)x, (void)n, (void)c, (void)r;
}
static void null_10(struct queue *q, struct mat y, struct mat u, const float *w, const struct delta_state *s,
                    const struct delta_shape *h, const struct step_rows *r)
{
    (void)q, (void)y, (void)u, (void)w, (void)s, (void)h, (void)r;
}
static void null_11(struct queue *q, struct mat o, struct mat x, struct mat a, struct mat b, const float *g,
                    const float *d, const struct delta_state *s, const struct delta_shape *h,
                    const struct step_rows *r)
{
    (void)q, (void)o, (void)x, (void)a, (void)b, (void)g, (void)d, (void)s, (void)h, (void)r;
}
static void null_12(struct queue *q, struct mat y, struct mat x, struct mat z, const float *g, int n, float e)
{
    (void)q, (void)y, (void)x, (void)z, (void)g, (void)n, (void)e;
}
static void null_13(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                    const struct experts *x2)
{
    (void)q, (void)y, (void)x, (void)p, (void)x2;
}

static const struct ops null_ops;
static void null_norm_products(struct queue *q, const struct norm_products *r)
{
    fused_norm_products(&null_ops, q, r);
}
static void null_delta_run(struct queue *q, const struct delta_run *r, const struct step_rows *rows)
{
    fused_delta(&null_ops, q, r, rows);
}
static void null_attention_run(struct queue *q, const struct attention_run *r, const struct step_rows *rows)
{
    fused_attention(&null_ops, q, r, rows);
}
static void null_moe_run(struct queue *q, const struct moe_run *r)
{
    fused_moe(&null_ops, q, r);
}

static void null_draw_product(struct queue *q, int32_t *out, struct mat y, struct mat x,
                              const struct weight *w, const uint32_t *allowed, const struct draw *draws)
{
    (void)q, (void)out, (void)y, (void)x, (void)w, (void)allowed, (void)draws;
}

static bool weights_create(struct queue *q, struct weight **out, const struct weight_source *src, int n,
                           int *failed, struct err *e)
{
    return fused_weights(&null_ops, q, out, src, n, failed, e);
}

static const struct ops null_ops = {
    .name = "null",
    .weight_create = null_weight_create,
    .weights_create = weights_create,
    .weights_join = host_weights_join,
    .coarse_bytes = host_coarse_bytes,
    .weight_coarsen = host_weight_coarsen,
    .weight_free = null_weight_free,
    .memory_create = null_memory_create,
    .memory_free = null_memory_free,
    .upload = null_copy,
    .download = null_copy,
    .zero = null_zero,
    .reserve = null_reserve,
    .embed = null_1,
    .matmul = null_2,
    .add = null_3,
    .rmsnorm = null_4,
    .gather = null_5,
    .silu_mul = null_6,
    .add_gated = null_6,
    .norm_rope = null_7,
    .kv_append = null_8,
    .attention = null_9,
    .conv = null_10,
    .delta = null_11,
    .gated_norm = null_12,
    .route = null_route,
    .experts = null_13,
    .draw_product = null_draw_product,
    .experts_bind = host_experts_bind,
    .experts_unbind = host_experts_unbind,
    .wait = host_wait,
    .read_speed = host_read_speed,
    .step_begin = host_step_begin,
    .step_end = host_step_end,
    .norm_products = null_norm_products,
    .delta_run = null_delta_run,
    .attention_run = null_attention_run,
    .moe_run = null_moe_run,
};

/* A synthetic model on a backend, ready for bench_run. */
struct ready {
    struct synthetic synthetic;
    struct backend inner, trace;
    struct model model;
    struct bench_options options;
};
static struct read_speed *speed; /* of all tests */

static void make_ready(struct ready *r, const char *what, const struct backend_options *backend)
{
    struct err e = { 0 };
    *r = (struct ready){ .inner = { .ops = &null_ops, .name = "null" } };
    if (backend) must(backend_create(&r->inner, backend, &e), &e);
    must(synthetic_create(&r->synthetic, what, &e), &e);
    must(trace_create(&r->trace, &r->inner, &e), &e);
    must(model_init(&r->model, &r->synthetic.synth.checkpoint, &r->trace, NULL, &e), &e);
    must(model_bind_all(&r->model, &e), &e);
    must(bench_label(&r->model, &e), &e);
    r->options = (struct bench_options){ &r->model, speed, NULL, 0, KV_BF16, 512, 2, false, NULL };
}

static void unmake(struct ready *r)
{
    model_deinit(&r->model);
    trace_destroy(&r->trace);
    if (r->inner.ops != &null_ops) backend_destroy(&r->inner);
    synthetic_destroy(&r->synthetic);
}

static struct bench_result bench(struct ready *r, int64_t n_prompt, int64_t n_gen, int64_t depth,
                                 int sequences)
{
    struct err e = { 0 };
    struct bench_result result;
    struct bench_test t = { n_prompt, n_gen, depth, sequences };
    must(bench_run(&result, &t, &r->options, &e), &e);
    return result;
}

static void near(double found, double want, double relative)
{
    if (!(fabs(found - want) <= relative * want)) fail_msg("expected %g, found %g", want, found);
}

/* Bytes of one token at batch 1, in MB, from the published tensor table: every weight once, eight experts a
 * layer. Convolution state is f32 here and its weights are counted: 9.8 MB instead of 3. */
static void bytes_of_the_released_shape_are_the_tables(void **state)
{
    (void)state;
    static const struct {
        const char *format;
        double mb[BENCH_KV], all; /* deltanet, attention, shared, experts, router, head, state */
    } cases[] = {
        { "35b-a3b:format=bf16", { 2021.1, 545.3, 251.8, 2013.3, 41.9, 1017.1, 135.7 }, 6019 },
        { "35b-a3b", { 2021.1, 272.6, 125.9, 566.2, 41.9, 1017.1, 135.7 }, 4174 },
        { "35b-a3b:format=fast", { 1014.5, 272.6, 125.9, 566.2, 41.9, 508.6, 135.7 }, 2665 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct ready r;
        make_ready(&r, cases[i].format, NULL);
        struct bench_result b = bench(&r, 0, 2, 0, 1);
        double sum = 0;
        for (int g = 0; g < BENCH_KV; g++) {
            near(b.bytes[g], 1e6 * cases[i].mb[g], 0.005);
            sum += b.bytes[g];
        }
        near(b.total_bytes, 1e6 * cases[i].all, 0.005);
        near(b.total_bytes, sum + b.bytes[BENCH_KV], 1e-12);
        assert_true(b.experts_per_step == 8);
        near(b.flops, 2 * 2945.3e6, 0.002);
        bench_result_deinit(&b);
        unmake(&r);
    }
}

/* Everything that the language model consists of was bound: 22.6 GB less the embedding and small tensors. */
static void every_weight_of_the_card_mix_is_bound(void **state)
{
    (void)state;
    struct ready r;
    counted = (struct counters){ 0 };
    make_ready(&r, "35b-a3b", NULL);
    assert_int_equal(counted.weights, 1 + 1 + 30 * 5 + 10 * 4 + 40 * (5 + 3 * 256));
    near((double)counted.bytes, 22.6e9 - 1.017e9, 0.005);
    unmake(&r);
}

static void kv_and_shared_weights_follow_depth_and_batch(void **state)
{
    (void)state;
    struct ready r;
    make_ready(&r, "35b-a3b:layers=4", NULL);
    struct bench_result one = bench(&r, 0, 1, 4096, 1), eight = bench(&r, 0, 1, 4096, 8);
    struct bench_result prompt = bench(&r, 1024, 0, 0, 1), two = bench(&r, 256, 0, 0, 2);
    near(one.bytes[BENCH_KV], 2048.0 * (4097 + 1), 1e-9); /* 2 x 2 heads x 256 x 2 bytes; read and appended */
    near(eight.bytes[BENCH_KV], one.bytes[BENCH_KV], 1e-9);
    near(eight.bytes[BENCH_STATE], one.bytes[BENCH_STATE], 0.08);
    near(eight.bytes[BENCH_LM_HEAD], one.bytes[BENCH_LM_HEAD] / 8, 1e-9);
    assert_true(eight.experts_per_step == 64); /* picked in turn: all different */
    near(eight.bytes[BENCH_EXPERTS], one.bytes[BENCH_EXPERTS], 1e-9);
    near(prompt.bytes[BENCH_DELTANET], one.bytes[BENCH_DELTANET] / 512, 1e-9); /* two steps of 512 rows */
    near(two.bytes[BENCH_DELTANET], one.bytes[BENCH_DELTANET] / 512, 1e-9);    /* both in one step */
    near(two.bytes[BENCH_LM_HEAD], one.bytes[BENCH_LM_HEAD] / 512, 1e-9);      /* of two rows */
    assert_true(prompt.experts_per_step == 256);
    assert_int_equal(two.tokens, 512);
    struct bench_result *all[] = { &one, &eight, &prompt, &two };
    for (int i = 0; i < 4; i++) bench_result_deinit(all[i]);
    unmake(&r);
}

/* The README of llama-bench shows these samples with these results. */
static void statistics_are_llama_benchs(void **state)
{
    (void)state;
    const double ns[] = { 74601900, 71632900, 71745200, 71952700, 70745500 };
    const double ts[] = { 6863.1, 7147.55, 7136.37, 7115.79, 7237.21 };
    struct bench_summary s = bench_summarize(ns, 5), t = bench_summarize(ts, 5);
    assert_int_equal((int64_t)s.mean, 72135640);
    assert_int_equal((int64_t)s.deviation, 1453752);
    near(t.mean, 7100.002165, 1e-6);
    near(t.deviation, 140.341520, 1e-4);
    assert_true(s.median == 71745200 && s.min == 70745500 && s.max == 74601900);
    s = bench_summarize(ns, 2);
    assert_true(s.median == 0.5 * (74601900.0 + 71632900.0));
    s = bench_summarize(ns, 1);
    assert_true(s.deviation == 0 && s.median == ns[0]);
}

static const struct backend_options cpu = { .device = DEVICE_CPU, .threads = 2 };

static void a_profile_accounts_for_the_time_and_the_bytes(void **state)
{
    (void)state;
    struct ready r;
    make_ready(&r, "models/demo", &cpu);
    r.options.profile = true;
    struct bench_result b = bench(&r, 8, 4, 64, 2);
    double seconds = 0, bytes = 0, flops = 0;
    for (int i = 0; i < b.n_profile; i++) {
        const struct trace_entry *x = &b.profile[i];
        assert_true(x->calls ? x->seconds > 0 : x->seconds == 0);
        assert_true(strcmp(x->op, "matmul") != 0 || x->calls == 0 || x->rows > 0);
        seconds += x->seconds;
        bytes += (double)x->bytes;
        flops += (double)x->flops;
    }
    assert_int_equal(b.n, 2);
    assert_int_equal(b.tokens, 24);
    assert_true(seconds > 0);
    near(bytes, b.total_bytes * 24, 1e-9); /* the warm-up's account, of the same tokens */
    near(flops, b.flops * 24, 1e-9);
    assert_true(b.read_bandwidth > 1e8);
    for (int i = 0; i < b.n; i++) assert_true(b.seconds[i] > 0);
    bench_result_deinit(&b);
    unmake(&r);
}

static void text_tokens_route_otherwise_than_one_token(void **state)
{
    (void)state;
    struct ready r;
    int32_t same[64] = { 0 }, text[64];
    make_ready(&r, "models/demo", &cpu);
    for (int i = 0; i < 64; i++) text[i] = 31 * i + 7;
    r.options.n_tokens = 64;
    r.options.tokens = same;
    struct bench_result a = bench(&r, 1, 0, 0, 8);
    r.options.tokens = text;
    struct bench_result b = bench(&r, 1, 0, 0, 8);
    assert_true(a.experts_per_step == 4); /* eight rows of one token pick the same */
    assert_true(b.experts_per_step > 6);
    bench_result_deinit(&a);
    bench_result_deinit(&b);
    unmake(&r);
}

/* Eight rows of four picks among 16 that are neither uniform (14.4 different ones) nor all alike (4). */
static void random_routers_spread_their_picks(void **state)
{
    (void)state;
    struct ready r;
    make_ready(&r, "models/demo:format=bf16", &cpu);
    struct bench_result many = bench(&r, 64, 0, 0, 1), few = bench(&r, 0, 8, 0, 8);
    if (!(few.experts_per_step > 8 && few.experts_per_step < 14.6)) fail_msg("%g", few.experts_per_step);
    if (!(many.experts_per_step > 14)) fail_msg("%g", many.experts_per_step);
    bench_result_deinit(&many);
    bench_result_deinit(&few);
    unmake(&r);
}

/* An operation without a wrapper would be called through NULL. */
static void every_operation_is_wrapped(void **state)
{
    (void)state;
    struct ready r;
    make_ready(&r, "models/demo", &cpu);
    void *const *wrapped = (void *const *)(const void *)r.trace.ops;
    void *const *inner = (void *const *)(const void *)r.inner.ops;
    for (size_t i = 0; i < sizeof(struct ops) / sizeof(void *); i++) {
        assert_true(!inner[i] == !wrapped[i]);
        assert_true(!inner[i] || inner[i] != wrapped[i]);
    }
    unmake(&r);
}

/* The account changes no result. */
static void a_traced_backend_computes_the_same(void **state)
{
    (void)state;
    struct ready r;
    struct err e = { 0 };
    struct model plain;
    const float *logits;
    float *first = NULL;
    int32_t tokens[] = { 3, 1, 4, 1, 5, 9, 2, 6 };
    make_ready(&r, "models/demo:layers=4", &cpu);
    must(model_init(&plain, &r.synthetic.synth.checkpoint, &r.inner, NULL, &e), &e);
    must(model_bind_all(&plain, &e), &e);
    struct model *models[] = { &plain, &r.model };
    for (int i = 0; i < 2; i++) {
        struct engine *g;
        int handle;
        struct engine_options o = { .context = 32 };
        trace_start(&r.trace, TRACE_TIME);
        must(engine_create(&g, models[i], &o, &e), &e);
        must(engine_open(g, &handle, &e), &e);
        must(engine_skip(g, handle, 20, &e), &e);
        assert_int_equal(engine_length(g, handle), 20);
        must(engine_prefill(g, handle, tokens, 8, &logits, NULL, &e), &e);
        size_t bytes = (size_t)engine_vocab(g) * sizeof *logits;
        if (i == 0) {
            first = malloc(bytes);
            assert_non_null(first);
            memcpy(first, logits, bytes);
            for (size_t k = 0; k < bytes / sizeof *logits; k++) assert_true(isfinite(logits[k]));
        } else {
            assert_memory_equal(first, logits, bytes);
        }
        assert_false(engine_skip(g, handle, 5, &e));
        assert_string_equal(e.text, "33 tokens do not fit a context of 32");
        engine_free(g);
    }
    free(first);
    model_deinit(&plain);
    unmake(&r);
}

static void specs_are_checked(void **state)
{
    (void)state;
    static const struct {
        const char *spec, *message;
    } cases[] = {
        { "35b-a3b:layers=0", "'layers=0': expected layers=N or format=bf16, card, fast, nvfp4 or nvfp4a16" },
        { "35b-a3b:layers=x", "'layers=x': expected layers=N" },
        { "35b-a3b:formats=card", "'formats=card': expected layers=N" },
        { "35b-a3b:format=q4", "'format=q4': expected layers=N" },
        { "35b-a3b:layers=41", "35b-a3b:layers=41: 41 layers were asked for, the config has 40" },
        { "36b", "36b: No such file or directory" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct synthetic s;
        struct err e = { 0 };
        assert_false(synthetic_create(&s, cases[i].spec, &e));
        assert_message(&e, "", cases[i].message);
    }
}

static int setup(void **state)
{
    struct err e = { 0 };
    (void)state;
    must(read_speed_create(&speed, 1, &e), &e);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    read_speed_free(speed);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bytes_of_the_released_shape_are_the_tables),
        cmocka_unit_test(every_weight_of_the_card_mix_is_bound),
        cmocka_unit_test(kv_and_shared_weights_follow_depth_and_batch),
        cmocka_unit_test(statistics_are_llama_benchs),
        cmocka_unit_test(a_profile_accounts_for_the_time_and_the_bytes),
        cmocka_unit_test(text_tokens_route_otherwise_than_one_token),
        cmocka_unit_test(random_routers_spread_their_picks),
        cmocka_unit_test(every_operation_is_wrapped),
        cmocka_unit_test(a_traced_backend_computes_the_same),
        cmocka_unit_test(specs_are_checked),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
