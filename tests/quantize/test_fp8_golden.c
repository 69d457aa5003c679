/* FP8 and FP8_BLOCK against compressed-tensors (tests/golden/README.md): the bytes of a packed matrix, and
 * products of every backend with the inputs that its emulation quantized. */
#include "checkpoint/safetensors.h"
#include "num/fp8.h"
#include "quantize/pack.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "support/models.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 129, COLS = 256, TOKENS = 3 };
static struct safetensors golden;
static uint16_t weights[ROWS * COLS];

static const void *bytes_of(const char *name, const char *part, uint64_t bytes)
{
    char full[64];
    snprintf(full, sizeof full, "%s%s", name, part);
    const struct tensor *t = safetensors_find(&golden, full);
    if (!t || t->bytes != bytes) fail_msg("golden '%s'", full);
    return t->data;
}

/* As tools/make_fp8_golden.py makes them. */
static int setup(void **state)
{
    (void)state;
    struct err e = { 0 };
    uint64_t s = 1;
    must(safetensors_open(&golden, "tests/golden/fp8_products.safetensors", &e), &e);
    for (int i = 0; i < ROWS * COLS; i++) {
        s = s * 6364136223846793005u + 1442695040888963407u;
        weights[i] = bf16_from_f32(ldexpf((float)((int)((s >> 33) % 256) - 128), -(9 + i / 64 % 5))).bits;
    }
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    safetensors_close(&golden);
    return 0;
}

static int64_t n_scales(enum scheme s)
{
    return s == SCHEME_FP8 ? 1 : fp8_blocks(ROWS) * fp8_blocks(COLS);
}

static void check_packed(enum scheme scheme, int threads)
{
    const struct tensor source = { .name = "w", .dtype = DTYPE_BF16 };
    struct matrix m = { .module = (char *)(uintptr_t) "m",
                        .source = &source,
                        .data = (const uint8_t *)weights,
                        .rows = ROWS,
                        .cols = COLS,
                        .scheme = scheme,
                        .partner = SIZE_MAX };
    struct plan plan = { .matrices = &m, .n_matrices = 1 };
    struct packer p;
    struct packed packed;
    uint8_t codes[ROWS * COLS];
    struct err e = { 0 };
    float absmax;
    must(packer_init(&p, &plan, threads, &e), &e);
    must(packer_absmax(&p, &absmax, &m, &e), &e);
    struct packing in = { .matrix = &m, .absmax = absmax, .codes = codes, .scales = p.scales };
    must(packer_run(&p, &packed, &in, 1, NULL, NULL, &e), &e);
    assert_int_equal(packed.codes_bytes, ROWS * COLS);
    assert_int_equal(packed.scales_bytes, 2 * n_scales(scheme));
    assert_memory_equal(codes, bytes_of(scheme_name(scheme), ".codes", ROWS * COLS), ROWS * COLS);
    assert_memory_equal(p.scales, bytes_of(scheme_name(scheme), ".scale", packed.scales_bytes),
                        packed.scales_bytes);
    double error = sqrt(packed.difference / packed.total);
    assert_true(error > 0.01 && error < 0.05);
    packer_deinit(&p);
}

static void packed_bytes(void **state)
{
    (void)state;
    for (int threads = 1; threads <= 3; threads += 2) {
        check_packed(SCHEME_FP8, threads);
        check_packed(SCHEME_FP8_BLOCK, threads);
    }
}

/* To 2e-6 of a token's largest product: sums differ in order, the inputs' rounding would differ by percents.
 */
static void check_products(enum scheme scheme, const struct backend_options *o)
{
    const char *name = scheme_name(scheme);
    struct backend b;
    struct weight *w;
    struct err e = { 0 };
    float scales[ROWS], x[TOKENS * COLS], y[TOKENS * ROWS];
    double want[TOKENS * ROWS];
    const uint8_t *stored = bytes_of(name, ".scale", (uint64_t)n_scales(scheme) * 2);
    bool block = scheme == SCHEME_FP8_BLOCK;
    for (int64_t r = 0; r < (block ? n_scales(scheme) : ROWS); r++) {
        bf16 s;
        memcpy(&s, stored + (block ? 2 * r : 0), 2);
        scales[r] = bf16_to_f32(s);
    }
    memcpy(x, bytes_of("x", "", sizeof x), sizeof x);
    memcpy(want, bytes_of(name, ".y", sizeof want), sizeof want);
    struct weight_source src = { .format = block ? WEIGHT_FP8_BLOCK : WEIGHT_FP8,
                                 .rows = ROWS,
                                 .cols = COLS,
                                 .data = bytes_of(name, ".codes", ROWS * COLS),
                                 .scale = scales,
                                 .input = block ? INPUT_FP8_GROUPS : INPUT_FP8_FIXED };
    if (!block) memcpy(&src.input_global, bytes_of(name, ".input_scale", 4), 4);
    must(backend_create(&b, o, &e), &e);
    struct step_limits limits = {
        .rows = TOKENS, .cols = COLS, .context = 64, .intermediate = 16, .picks = 1, .n_experts = 1
    };
    must(b.ops->reserve(b.queue, &limits, &e), &e);
    must(b.ops->weight_create(b.queue, &w, &src, &e), &e);
    b.ops->matmul(b.queue, mat_of(y, TOKENS, ROWS), mat_of(x, TOKENS, COLS), w);
    for (int t = 0; t < TOKENS; t++) {
        double largest = 0;
        for (int r = 0; r < ROWS; r++) largest = fmax(largest, fabs(want[t * ROWS + r]));
        for (int r = 0; r < ROWS; r++)
            if (!(fabs(y[t * ROWS + r] - want[t * ROWS + r]) <= 2e-6 * largest))
                fail_msg("%s on %s: token %d, row %d: %.9g, expected %.9g", name, b.name, t, r,
                         (double)y[t * ROWS + r], want[t * ROWS + r]);
    }
    b.ops->weight_free(b.queue, w);
    backend_destroy(&b);
}

static void products(void **state)
{
    (void)state;
    const struct backend_options all[] = { { .device = DEVICE_REF },
                                           { .device = DEVICE_CPU, .threads = 2 },
                                           { .device = DEVICE_CPU, .threads = 1, .isa = CPU_ISA_GENERIC } };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        check_products(SCHEME_FP8, &all[i]);
        check_products(SCHEME_FP8_BLOCK, &all[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(packed_bytes), cmocka_unit_test(products) };
    return cmocka_run_group_tests(tests, setup, teardown);
}
