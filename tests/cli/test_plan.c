/* Plans against what an engine really takes: an engine on the CPU, whose every allocation is counted, planned
 * for as if it ran on a device with memory of its own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "cli/common.h"
#include "cli/plan.h"
#include "support/models.h"
#include <string.h>

static struct loaded demo;
static struct ops counting;
static const struct ops *plain;
static uint64_t taken;

static bool count_memory(struct queue *q, void **out, uint64_t bytes, struct err *e)
{
    taken += bytes;
    return plain->memory_create(q, out, bytes, e);
}

static uint64_t scratch(struct queue *q, const struct step_limits *l)
{
    (void)q;
    return 1000 * (uint64_t)l->rows + (uint64_t)l->context;
}

static int load(void **state)
{
    (void)state;
    struct err e = { 0 };
    load_model(&demo, "models/demo", &(struct backend_options){ .device = DEVICE_CPU, .threads = 1 });
    must(model_bind_mtp(&demo.model, true, &e), &e);
    plain = demo.backend.ops;
    counting = *plain;
    counting.memory_create = count_memory;
    return 0;
}

static int unload(void **state)
{
    (void)state;
    demo.backend.ops = plain;
    unload_model(&demo);
    return 0;
}

static struct plan_options for_engine(const struct engine_options *o)
{
    return (struct plan_options){ .checkpoint = &demo.checkpoint,
                                  .backend = &demo.backend,
                                  .kv = o->kv,
                                  .drafts = o->drafts,
                                  .context = o->context,
                                  .sequences = o->sequences,
                                  .step_rows = o->step_rows,
                                  .exact = true,
                                  .budget = 1ull << 40 };
}

static uint64_t state_and_steps(const struct plan *p)
{
    return (uint64_t)p->pages * p->page + (uint64_t)p->sequences * p->state + p->steps;
}

static void an_engine_takes_what_was_planned(void **state)
{
    (void)state;
    static const struct engine_options all[] = {
        { .context = 1000, .sequences = 1, .step_rows = 100 },
        { .context = 64, .sequences = 7, .step_rows = 7, .kv = KV_FP8 },
        { .context = 4097, .sequences = 3, .kv = KV_BF16 },
        { .context = 500, .sequences = 2, .step_rows = 40, .kv = KV_BF16, .drafts = 3 },
        { .context = 777, .sequences = 3, .step_rows = 40, .kv = KV_INT8, .drafts = 1 },
    };
    uint64_t weights = 0, head = 0;
    for (size_t i = 0; i < demo.checkpoint.n_tensors; i++) {
        const struct tensor *t = demo.checkpoint.tensors[i];
        *(strncmp(t->name, "mtp.", 4) == 0 ? &head : &weights) += t->bytes;
    }
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        struct err e = { 0 };
        struct plan p;
        struct engine *g;
        struct plan_options o = for_engine(&all[i]);
        demo.backend.memory = 1; /* whatever its size */
        must(plan_make(&p, &o, &e), &e);
        demo.backend.ops = &counting;
        taken = 0;
        struct weight *fc = demo.model.mtp.fc; /* step buffers of the head are taken where one is bound */
        if (!all[i].drafts) demo.model.mtp.fc = NULL;
        must(engine_create(&g, &demo.model, &all[i], &e), &e);
        demo.model.mtp.fc = fc;
        engine_free(g);
        demo.backend.ops = plain;
        assert_int_equal(state_and_steps(&p), taken);
        assert_int_equal(p.weights, weights + (all[i].drafts ? head : 0));
    }
    demo.backend.memory = 0;
}

static void what_does_not_fit_is_refused_with_the_difference(void **state)
{
    (void)state;
    struct engine_options eo = { .context = 1000, .sequences = 3, .step_rows = 64 };
    struct plan_options o = for_engine(&eo);
    struct err e = { 0 };
    struct plan p;
    demo.backend.memory = 24ull << 30;
    must(plan_make(&p, &o, &e), &e);
    uint64_t need = p.weights + p.reserve + state_and_steps(&p), base = 0;
    demo.backend.memory_free = need;
    must(plan_device(&demo.checkpoint, &demo.backend, &eo, NULL, true, &e), &e);
    demo.backend.memory_free = need - 1500000;
    assert_false(plan_device(&demo.checkpoint, &demo.backend, &eo, NULL, true, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    assert_non_null(strstr(e.text, "models/demo: "));
    assert_non_null(
        strstr(e.text, " for each of 3 sequences of 1000 tokens; that is 1.50 MB more than the "));
    demo.backend.memory_free = 2 * need - p.reserve; /* two beside each other */
    must(plan_device(&demo.checkpoint, &demo.backend, &eo, &base, true, &e), &e);
    assert_int_equal(base, need - p.reserve);
    must(plan_device(&demo.checkpoint, &demo.backend, &eo, &base, true, &e), &e);
    assert_false(plan_device(&demo.checkpoint, &demo.backend, &eo, &base, true, &e));
    demo.backend.memory = demo.backend.memory_free = 0; /* the host's: not planned */
    must(plan_device(&demo.checkpoint, &demo.backend, &eo, NULL, true, &e), &e);
}

/* On a GPU. What the command line says comes before anything is loaded. */
static void a_backend_without_int8_caches_refuses_them(void **state)
{
    (void)state;
    struct engine *g;
    struct err e = { 0 };
    struct common c = { .kv = 4 };
    assert_int_equal(common_kv_dtype(&c, &demo.backend), KV_INT8);
    must(common_check_kv(&c, &demo.backend, &e), &e);
    demo.backend.kv_int8 = false;
    assert_false(common_check_kv(&c, &demo.backend, &e));
    assert_int_equal(e.code, ERR_ARGUMENT);
    assert_string_equal(e.text, "--kv-cache-dtype: int8_per_token_head: expected auto, f32, bf16 or fp8 on a "
                                "GPU; take fp8, which is as small, or --device cpu");
    e = (struct err){ 0 };
    assert_false(
        engine_create(&g, &demo.model, &(struct engine_options){ .context = 64, .kv = KV_INT8 }, &e));
    assert_non_null(strstr(e.text, " keeps no keys and values in INT8"));
    must(engine_create(&g, &demo.model, &(struct engine_options){ .context = 64, .kv = KV_FP8 }, &e), &e);
    engine_free(g);
    demo.backend.kv_int8 = true;
}

static uint64_t coarse(struct queue *q, enum weight_format format, int64_t rows, int64_t cols)
{
    (void)q;
    return format == WEIGHT_BF16 ? (uint64_t)(rows * cols) : 0;
}

/* A server's: the whole budget is given out, and never more. */
static void a_server_fills_its_budget(void **state)
{
    (void)state;
    struct ops device = *plain;
    device.reserve_bytes = scratch;
    device.coarse_bytes = coarse;
    demo.backend.ops = &device;
    for (uint64_t size = 600ull << 20; size < 20ull << 30; size += size / 3) {
        struct plan_options o = { .checkpoint = &demo.checkpoint,
                                  .backend = &demo.backend,
                                  .prefix_cache = true };
        struct err e = { 0 };
        struct plan p;
        demo.backend.memory = size;
        if (!plan_make(&p, &o, &e)) {
            assert_int_equal(e.code, ERR_LIMIT);
            assert_non_null(strstr(e.text, "more than the budget of"));
            assert_non_null(strstr(e.text, "take --kv-cache-dtype int8, or"));
            assert_true(size < 700ull << 20);
            continue;
        }
        assert_int_equal(p.coarse, 2048 * 256);
        uint64_t all =
            p.weights + p.coarse + p.reserve + state_and_steps(&p) + (uint64_t)p.snapshots * p.snapshot_state;
        assert_true(all <= (uint64_t)((double)size * 0.92));
        assert_true(p.context >= KV_PAGE && p.sequences >= 1 && p.pages * KV_PAGE >= p.context);
    }
    demo.backend.ops = plain;
    demo.backend.memory = 0;
}

/* What is kept of images counts where the budget is the host's, to the byte; a device's is as large as ever.
 */
static void an_encoder_cache_is_the_hosts(void **state)
{
    (void)state;
    for (int device = 0; device < 2; device++) {
        struct plan_options o = for_engine(&(struct engine_options){ .context = 1000, .sequences = 2 });
        struct err e = { 0 };
        struct plan without, with;
        demo.backend.memory = device ? 24ull << 30 : 0;
        must(plan_make(&without, &o, &e), &e);
        uint64_t need = without.weights + without.reserve + state_and_steps(&without), kept = 123456789;
        o.encoder_cache = kept;
        o.budget = need + (device ? 0 : kept);
        must(plan_make(&with, &o, &e), &e);
        assert_int_equal(with.encoder_cache, device ? 0 : kept);
        assert_int_equal(with.pages, without.pages);
        o.budget--;
        assert_false(plan_make(&with, &o, &e));
        assert_int_equal(e.code, ERR_LIMIT);
        /* a server has the same pages in a budget larger by it */
        o = (struct plan_options){ .checkpoint = &demo.checkpoint,
                                   .backend = &demo.backend,
                                   .prefix_cache = true,
                                   .budget = 2ull << 30 };
        must(plan_make(&without, &o, &e), &e);
        o.encoder_cache = kept;
        o.budget += device ? 0 : kept;
        must(plan_make(&with, &o, &e), &e);
        assert_int_equal(with.pages, without.pages);
        assert_int_equal(with.snapshots, without.snapshots);
        assert_int_equal(with.context, without.context);
    }
    demo.backend.memory = 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_engine_takes_what_was_planned),
        cmocka_unit_test(what_does_not_fit_is_refused_with_the_difference),
        cmocka_unit_test(a_backend_without_int8_caches_refuses_them),
        cmocka_unit_test(a_server_fills_its_budget),
        cmocka_unit_test(an_encoder_cache_is_the_hosts),
    };
    return cmocka_run_group_tests(tests, load, unload);
}
