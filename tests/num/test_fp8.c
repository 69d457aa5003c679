/* FP8 rows: the reference tool's bytes for a small matrix, the scales' lower bounds, and how far codes may be
 * from what they stand for. */
#include "num/fp8.h"
#include "num/random.h"
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { COLUMNS = 32 };

static const uint16_t weights[2][COLUMNS] = {
    { 0,      0,      0,      0,      0,      0,      0,      0,      0,      0,      0,
      0,      0,      0,      0,      0,      0xb880, 0xbd6e, 0x3d0f, 0x3c23, 0x3d31, 0x3c48,
      0xbd08, 0x3d25, 0x3d62, 0xbc10, 0xbde6, 0xbd94, 0x3b48, 0xbcfd, 0xbd23, 0xbbd8 },
    { 0x3dc0, 0xbb6c, 0x3c01, 0xbd1e, 0x3c23, 0x3b16, 0x3bfb, 0xbcc3, 0xbbb6, 0x3c70, 0xbc01,
      0xbabd, 0x3df1, 0xbd54, 0x3da1, 0xbd01, 0x3fc0, 0x3cdf, 0x3b59, 0xbcb3, 0x3d1c, 0x3cb5,
      0x3d6f, 0x3dce, 0x3be1, 0x3d40, 0xbc18, 0xbd04, 0x3d9e, 0xbd32, 0xbe2b, 0xbd19 },
};
static const uint8_t packed[2][COLUMNS] = {
    { 0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,
      0xa8, 0xf7, 0x71, 0x62, 0x73, 0x64, 0xf0, 0x72, 0x76, 0xe1, 0xfe, 0xf9, 0x54, 0xef, 0xf2, 0xdd },
    { 0x5e, 0xb9, 0x41, 0xd4, 0x44, 0x33, 0x41, 0xce, 0xbd, 0x49, 0xc1, 0xae, 0x61, 0xd8, 0x5c, 0xd1,
      0x7e, 0x50, 0x38, 0xcd, 0x53, 0x4d, 0x59, 0x5f, 0x40, 0x56, 0xc3, 0xd2, 0x5c, 0xd5, 0xe4, 0xd3 },
};
static const uint16_t scales[2] = { 0x3983, 0x3b5b };

static void test_reference_bytes(void **state)
{
    (void)state;
    for (int row = 0; row < 2; row++) {
        float x[COLUMNS];
        e4m3 codes[COLUMNS];
        for (int i = 0; i < COLUMNS; i++) x[i] = bf16_to_f32((bf16){ weights[row][i] });
        assert_int_equal(fp8_pack_row(codes, x, COLUMNS).bits, scales[row]);
        assert_memory_equal(codes, packed[row], sizeof codes);
    }
}

static void test_zero_rows(void **state)
{
    (void)state;
    float x[5] = { 0, -0.0f, 0, 0, -0.0f }, out[5];
    e4m3 codes[5];
    assert_int_equal(fp8_pack_row(codes, x, 5).bits, 0x3c00); /* 2^-7 */
    float s = fp8_quantize_activations(out, x, 5);
    assert_true(s == 1.0f / (448 * 512));
    for (int i = 0; i < 5; i++) {
        assert_int_equal(codes[i].bits, signbit(x[i]) ? 0x80 : 0);
        assert_int_equal(f32_bits(out[i]), f32_bits(x[i]));
    }
    assert_int_equal(fp8_pack_row(codes, x, 0).bits, 0x3c00);
}

/* The smallest BF16 number over 448 rounds to a scale of zero. */
static void test_vanishing_weight_scale(void **state)
{
    (void)state;
    float x[2] = { f32_from_bits(0x00010000), -f32_from_bits(0x00010000) };
    e4m3 codes[2];
    assert_int_equal(fp8_pack_row(codes, x, 2).bits, 0x3c00);
    assert_int_equal(codes[0].bits, 0);
    assert_int_equal(codes[1].bits, 0x80);
}

static void test_activation_floor(void **state)
{
    (void)state;
    const float floor = 1.0f / (448 * 512), edge = 0x1p-9f; /* absmax of 2^-9 over 448 is the floor itself */
    float out[3];
    assert_true(fp8_quantize_activations(out, (float[]){ edge, -edge / 2, 0 }, 3) == floor);
    assert_true(out[0] == 448 && out[1] == -224 && out[2] == 0);
    assert_true(fp8_quantize_activations(out, (float[]){ edge / 64, -edge / 128, 0 }, 3) == floor);
    assert_true(out[0] == 7 && out[1] == -3.5f && out[2] == 0);
    assert_true(fp8_quantize_activations(out, (float[]){ 1e-30f, 0, 0 }, 3) == floor);
    assert_true(out[0] == 0);
    assert_true(fp8_quantize_activations(out, (float[]){ 2 * edge, 0, 0 }, 3) == 2 * floor);
    assert_true(out[0] == 448);
}

static void test_activation_has_no_ceiling(void **state)
{
    (void)state;
    float out[2];
    assert_true(fp8_quantize_activations(out, (float[]){ -0x1p127f, 0x1p126f }, 2) == 0x1p127f / 448);
    assert_true(out[0] == -448 && out[1] == 224);
}

/* Half the distance between E4M3 codes around a. */
static float half_gap(float a)
{
    int exponent;
    frexpf(a, &exponent); /* a in [2^(exponent - 1), 2^exponent) */
    return ldexpf(1, exponent - 5 > -10 ? exponent - 5 : -10);
}

static void test_weight_error(void **state)
{
    (void)state;
    enum { N = 333 };
    float x[N];
    e4m3 codes[N];
    uint64_t seed = 2;
    for (unsigned octaves = 0; octaves < 30; octaves++) {
        for (int i = 0; i < N; i++) x[i] = random_bf16(&seed, octaves) * 0.03125f;
        float s = bf16_to_f32(fp8_pack_row(codes, x, N));
        for (int i = 0; i < N; i++) {
            float a = fabsf(x[i]) / s, got = e4m3_to_f32(codes[i]) * s;
            float clipped = a > 448 ? a - 448 : 0,
                  tolerance = half_gap(a) + a * 0x1p-8f + clipped; /* inner BF16 */
            assert_true(a <= 448 * (1 + 0x1p-8f));
            if (!(fabsf(got - x[i]) <= s * tolerance))
                fail_msg("%a came back as %a", (double)x[i], (double)got);
        }
    }
}

static void test_activation_error(void **state)
{
    (void)state;
    enum { N = 333 };
    float x[N], out[N];
    uint64_t seed = 3;
    for (unsigned octaves = 0; octaves < 30; octaves++) {
        float absmax = 0, largest = 0;
        for (int i = 0; i < N; i++) absmax = fmaxf(absmax, fabsf(x[i] = random_bf16(&seed, octaves) * 3.7f));
        memcpy(out, x, sizeof x);
        float s = fp8_quantize_activations(out, out, N); /* in place */
        assert_true(s == absmax / 448);
        for (int i = 0; i < N; i++) {
            largest = fmaxf(largest, fabsf(out[i]));
            assert_int_equal(f32_bits(e4m3_to_f32(e4m3_from_f32(out[i]))),
                             f32_bits(out[i])); /* unscaled E4M3 values */
            if (!(fabsf(out[i] * s - x[i]) <= s * half_gap(fabsf(x[i]) / s) * (1 + 1e-5f)))
                fail_msg("%a became %a with scale %a", (double)x[i], (double)out[i], (double)s);
        }
        assert_true(largest == 448);
    }
}

/* Groups of 128 columns stand alone, the last one too when it is shorter; the smallest scale is 1e-10 / 448.
 */
static void test_groups(void **state)
{
    (void)state;
    enum { N = 2 * FP8_BLOCK + 7 };
    float x[N], out[N], part[FP8_BLOCK];
    uint64_t seed = 5;
    for (int i = 0; i < N; i++)
        x[i] = random_bf16(&seed, 6) * (i < FP8_BLOCK ? 100 : i < 2 * FP8_BLOCK ? 1 : 0.01f);
    fp8_round_groups(out, x, N);
    for (int c = 0; c < N; c += FP8_BLOCK) {
        int n = N - c < FP8_BLOCK ? N - c : FP8_BLOCK;
        float s = fp8_quantize_activations(part, x + c, n);
        for (int i = 0; i < n; i++) assert_true(out[c + i] == part[i] * s);
    }
    memset(x, 0, sizeof x);
    x[3] = 1e-10f;
    x[200] = 0x1p-120f;
    fp8_round_groups(x, x, N); /* in place */
    assert_true(x[3] == 448 * (1e-10f / 448) && x[2] == 0 && x[200] == 0);
}

static void test_fixed(void **state)
{
    (void)state;
    float x[] = { 0.5f, -1000, 1e9f, 0x1p-11f, 3, -0.0f };
    fp8_round_fixed(x, x, 6, 0.5f);
    assert_true(x[0] == 0.5f && x[1] == -224 && x[2] == 224 && x[3] == 0 && x[4] == 3 && signbit(x[5]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_bytes),
        cmocka_unit_test(test_zero_rows),
        cmocka_unit_test(test_vanishing_weight_scale),
        cmocka_unit_test(test_activation_floor),
        cmocka_unit_test(test_activation_has_no_ceiling),
        cmocka_unit_test(test_weight_error),
        cmocka_unit_test(test_activation_error),
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_fixed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
