/* Every operation of every backend and ISA mask against ref: random shapes with ragged tails, random strides,
 * inputs with zeros, extremes and tiny scales, outputs poisoned beforehand with guards on both sides. A
 * failure prints the mask, the shape and the first bad index; the sequence of trials is fixed by SEED
 * (environment QUENCH_SEED). */
#include "backend/kernels_cache.h"
#include "backend/kernels_calibration.h"
#include "backend/kernels_head.h"
#include "backend/kernels_layer.h"
#include "backend/kernels_layers.h"
#include "backend/kernels_products.h"
#include "backend/kernels_rows.h"
#include "backend/kernels_runs.h"
#include "backend/kernels_sequences.h"
#include "support/sanitized.h"

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
        struct step_rows rows_of = { NULL, 6, &span, 1, false };
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

static void (*const families[])(void) = { several_rows, attention_runs, moe_runs,    many_rows,   delta_runs,
                                          products,     experts,        fp4_experts, rows,        sequences,
                                          vision,       logged_rows,    prompt_rows, calibration, int8_caches,
                                          heads,        layers };

/* QUENCH_FAMILY: the place of one in families[], which alone is tested. */
static bool is_wanted(void (*const *family)(void))
{
    const char *only = getenv("QUENCH_FAMILY");
    return !only || family == &families[atoi(only)];
}

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
        if (SANITIZED && threads == 1) continue;
        if (RACES && m > 0) continue; /* the same in every instruction set */
        rounded = i / 2 % 2;
        if (SANITIZED && rounded == m % 2) continue; /* each set once, by turns */
        backends(threads, masks[m]);
        if (!strstr(cpu.name, names[m])) {
            if (i % 4 == 0 || SANITIZED)
                printf("SKIP: mask %s this machine has only %s\n", names[m], cpu.name);
            continue;
        }
        for (size_t f = 0; f < sizeof families / sizeof *families; f++)
            if (is_wanted(&families[f])) families[f]();
        printf("note: %s%s agrees with ref\n", cpu.name, rounded ? ", inputs rounded," : "");
    }
    rounded = false;
    backends(0, CPU_ISA_BEST);
}

static void family_on_device(void **state)
{
    if (!is_wanted((void (*const *)(void)) * state)) skip();
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
        cmocka_unit_test_prestate(family_on_device, (void *)&families[12]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[13]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[15]),
        cmocka_unit_test_prestate(family_on_device, (void *)&families[16]),
    };
    int failed = on_device() ? cmocka_run_group_tests(device_tests, NULL, NULL)
                             : cmocka_run_group_tests(tests, NULL, NULL);
    backend_destroy(&cpu);
    backend_destroy(&ref);
    return failed;
}
