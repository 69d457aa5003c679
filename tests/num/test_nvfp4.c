/* NVFP4 packing: the reference tool's bytes for a small matrix, the scales at the ends of their range, and
 * how far unpacked weights may be from packed ones. */
#include "num/nvfp4.h"
#include "num/e2m1.h"
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
static const uint8_t packed[2][COLUMNS / 2] = {
    { 0, 0, 0, 0, 0, 0, 0, 0, 0xd8, 0x14, 0x14, 0x4c, 0x95, 0xef, 0xb0, 0x9c },
    { 0x86, 0xc1, 0x01, 0xa1, 0x19, 0x89, 0xd7, 0xb6, 0x07, 0x80, 0x00, 0x10, 0x00, 0x88, 0x81, 0x89 },
};
static const uint8_t scales[2][COLUMNS / NVFP4_GROUP] = { { 0x20, 0x60 }, { 0x61, 0x7e } };

static float absmax_of(const float *x, int64_t n)
{
    float m = 0;
    for (int64_t i = 0; i < n; i++) m = fmaxf(m, fabsf(x[i]));
    return m;
}

static void widen(float *out, const uint16_t *bits, int n)
{
    for (int i = 0; i < n; i++) out[i] = bf16_to_f32((bf16){ bits[i] });
}

static void test_reference_bytes(void **state)
{
    (void)state;
    float x[2][COLUMNS];
    widen(x[0], weights[0], COLUMNS);
    widen(x[1], weights[1], COLUMNS);
    float global = nvfp4_global_scale(absmax_of(x[0], (int64_t)2 * COLUMNS));
    assert_int_equal(f32_bits(global), 0x44e00000); /* 1792 */
    for (int row = 0; row < 2; row++) {
        uint8_t codes[COLUMNS / 2];
        e4m3 scale[COLUMNS / NVFP4_GROUP];
        nvfp4_pack_row(codes, scale, x[row], global, COLUMNS);
        assert_memory_equal(codes, packed[row], sizeof codes);
        assert_memory_equal(scale, scales[row], sizeof scale);
    }
}

static void test_reference_values(void **state)
{
    (void)state;
    float x[COLUMNS];
    e4m3 scale[2] = { { scales[1][0] }, { scales[1][1] } };
    nvfp4_unpack_row(x, packed[1], scale, 1792, COLUMNS);
    float first = 36.0f / 1792; /* byte 0x61 is 36, 0x7e is 448 */
    assert_true(x[0] == 4 * first && x[1] == -0.0f * first && x[2] == 0.5f * first && x[3] == -2 * first);
    assert_true(signbit(x[1]));
    assert_true(x[16] == 1.5f && x[17] == 0 && x[30] == -0.125f && x[31] == -0.0f);
}

static void test_global_scale(void **state)
{
    (void)state;
    assert_true(nvfp4_global_scale(0) == 1);
    assert_true(nvfp4_global_scale(f32_from_bits(0x00010000)) == 1); /* the smallest BF16 subnormal */
    assert_true(nvfp4_global_scale(0x1p-149f) == 1);
    assert_true(nvfp4_global_scale(FLT_MIN) == 1);
    assert_true(nvfp4_global_scale(1) == 2688);
    assert_true(nvfp4_global_scale(2688) == 1 && nvfp4_global_scale(3) == 896);
    assert_int_equal(f32_bits(nvfp4_global_scale(f32_from_bits(0x3dcd0000))), 0x46d20000); /* 26880 */
    assert_int_equal(f32_bits(nvfp4_global_scale(f32_from_bits(0x7f7f0000))),
                     0x05280000); /* 1.3125 * 2^-117 */
}

/* Two roundings to BF16 cost at most 2^-8 each; where the reciprocal is subnormal, up to 2^-6. */
static void test_global_scale_everywhere(void **state)
{
    (void)state;
    for (uint32_t c = 0; c < 0x7f80; c++) {
        float absmax = f32_from_bits(c << 16), global = nvfp4_global_scale(absmax);
        double exact = 2688.0 / (double)absmax, tolerance = absmax > 0x1p126f ? 0x1p-6 + 0x1p-8 : 0x1.01p-7;
        assert_true(isfinite(global) && global > 0);
        assert_int_equal(f32_bits(global) & 0xffff, 0);
        if (exact > 3.3e38)
            assert_true(global == 1 || fabs(global / exact - 1) <= tolerance);
        else
            assert_true(fabs(global / exact - 1) <= tolerance);
    }
}

static void test_zero_groups(void **state)
{
    (void)state;
    float x[48] = { 0 }, out[48];
    uint8_t codes[24];
    e4m3 scale[3];
    x[3] = -0.0f;
    x[20] = 1;
    nvfp4_pack_row(codes, scale, x, nvfp4_global_scale(1), 48);
    for (int i = 0; i < 24; i++) assert_int_equal(codes[i], i == 10 ? 0x07 : 0);
    assert_int_equal(scale[0].bits, 0x20);
    assert_int_equal(scale[1].bits, 0x7e);
    assert_int_equal(scale[2].bits, 0x20);
    nvfp4_unpack_row(out, codes, scale, nvfp4_global_scale(1), 48);
    for (int i = 0; i < 48; i++) assert_true(out[i] == (i == 20 ? 1.0f : 0.0f));
}

static void test_zero_matrix(void **state)
{
    (void)state;
    float x[16] = { 0 };
    uint8_t codes[8];
    e4m3 scale;
    float global = nvfp4_global_scale(absmax_of(x, 16));
    assert_true(global == 1);
    nvfp4_pack_row(codes, &scale, x, global, 16);
    assert_int_equal(scale.bits, 0x20);
    for (int i = 0; i < 8; i++) assert_int_equal(codes[i], 0);
}

/* One value of 1 fixes the global scale; the second group's scale is then subnormal, the smallest, and zero.
 */
static void test_small_groups(void **state)
{
    (void)state;
    static const struct {
        float absmax;
        uint8_t scale;
    } cases[] = {
        { 0x1p-15f, 0x07 }, { 0x1p-17f, 0x02 }, { 0x1p-18f, 0x01 }, { 0x1p-19f, 0x20 }, { 0x1p-120f, 0x20 }
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float x[32] = { [0] = 1, [16] = cases[i].absmax, [17] = -cases[i].absmax };
        uint8_t codes[16];
        e4m3 scale[2];
        nvfp4_pack_row(codes, scale, x, nvfp4_global_scale(1), 32);
        assert_int_equal(scale[1].bits, cases[i].scale);
        assert_int_equal(codes[8] == 0x80, cases[i].scale == 0x20); /* rounded to 0 and -0 */
    }
}

/* Group maxima whose scale byte is the reference tool's only if m / 6 is rounded to BF16; one rounding less
 * gives the byte in the comment. */
static void test_group_scale_rounding(void **state)
{
    (void)state;
    static const struct {
        uint16_t absmax, group;
        uint8_t scale;
    } cases[] = {
        { 0x3f81, 0x3eaf, 0x71 }, /* 0x72 */
        { 0x3f81, 0x3ec1, 0x73 }, /* 0x72 */
        { 0x3f81, 0x3ed4, 0x73 }, /* 0x74 */
        { 0x3f81, 0x3ee6, 0x74 }, /* 0x75 */
        { 0x3f82, 0x3ed6, 0x74 }, /* 0x73 */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float x[16] = { [5] = bf16_to_f32((bf16){ cases[i].group }) };
        uint8_t codes[8];
        e4m3 scale;
        nvfp4_pack_row(codes, &scale, x, nvfp4_global_scale(bf16_to_f32((bf16){ cases[i].absmax })), 16);
        assert_int_equal(scale.bits, cases[i].scale);
    }
}

/* Half the distance between codes around a value of a steps; above 6 what the clipping takes. */
static float half_gap(float a)
{
    if (a > 6) return a - 6;
    return a > 4 ? 1 : a > 2 ? 0.5f : 0.25f;
}

static void check_group(const float *x, const float *got, e4m3 scale, float global)
{
    float step = e4m3_to_f32(scale) / global;
    bool is_normal = scale.bits >= 8 && scale.bits <= 0x7e;
    assert_true(scale.bits > 0 && scale.bits <= 0x7e);
    for (int i = 0; i < NVFP4_GROUP; i++) {
        float a = fabsf(x[i]) / step;
        if (is_normal) assert_true(a <= 6 * (1 + 1.0f / 16 + 1.0f / 128));
        if (!(fabsf(got[i] - x[i]) <= step * half_gap(a) + 4 * FLT_EPSILON * fabsf(x[i])))
            fail_msg("weight %a came back as %a, step %a", (double)x[i], (double)got[i], (double)step);
    }
}

static void test_error_bound(void **state)
{
    (void)state;
    enum { N = 2048 };
    static float x[N], got[N];
    static uint8_t codes[N / 2 + 1];
    static e4m3 scale[N / NVFP4_GROUP + 1];
    uint64_t seed = 1;
    for (unsigned octaves = 0; octaves < 40; octaves++) {
        for (int i = 0; i < N; i++) x[i] = random_bf16(&seed, octaves) * (i % 32 < 16 ? 1 : 0x1p-12f);
        float global = nvfp4_global_scale(absmax_of(x, N));
        codes[N / 2] = scale[N / NVFP4_GROUP].bits = 0xa5;
        nvfp4_pack_row(codes, scale, x, global, N);
        nvfp4_unpack_row(got, codes, scale, global, N);
        assert_int_equal(codes[N / 2], 0xa5);
        assert_int_equal(scale[N / NVFP4_GROUP].bits, 0xa5);
        for (int g = 0; g < N / NVFP4_GROUP; g++)
            check_group(x + g * NVFP4_GROUP, got + g * NVFP4_GROUP, scale[g], global);
    }
}

/* Where the codes lie: column 2j in the low nibble of byte j; every code with every scale is a product of
 * two. */
static void test_unpack_all_codes(void **state)
{
    (void)state;
    uint8_t codes[8];
    float out[16];
    for (unsigned i = 0; i < 8; i++) codes[i] = (uint8_t)(2 * i | (2 * i + 1) << 4);
    for (unsigned s = 1; s < 0x7f; s++) {
        e4m3 scale = { (uint8_t)s };
        nvfp4_unpack_row(out, codes, &scale, 3, 16);
        for (unsigned c = 0; c < 16; c++) {
            float want = e2m1_to_f32((uint8_t)c) * (e4m3_to_f32(scale) / 3);
            assert_int_equal(f32_bits(out[c]), f32_bits(want));
        }
    }
}

/* BF16 bits, and codes and scales as compressed-tensors 0.20.0 casts them (FP4_E2M1_DATA.cast_to_fp4 of x
 * over S / global, S of m / 6 * global as float8_e4m3fn). */
static const uint16_t activations[COLUMNS] = {
    0x3fec, 0x3f05, 0xbfdb, 0xbfda, 0x4001, 0xbe8a, 0xbe06, 0xbfb8, 0x3ec8, 0xbc9b, 0xbfad,
    0xbf3b, 0x3f7d, 0xbed7, 0xbf16, 0xbf48, 0x4105, 0x406b, 0xbf81, 0xc039, 0xbec7, 0xbfe7,
    0x3edf, 0xbee6, 0xbfa8, 0x4016, 0xbe33, 0xc0c3, 0x408e, 0x3fbe, 0x3f3f, 0x40a8,
};
static const float activation_codes[COLUMNS] = { 6,  1.5f, -4,    -4, 6,     -1,    -0.5f, -4,
                                                 1,  0,    -4,    -2, 3,     -1,    -1.5f, -2,
                                                 6,  3,    -0.5f, -2, -0.5f, -1.5f, 0.5f,  -0.5f,
                                                 -1, 1.5f, 0,     -4, 3,     1,     0.5f,  4 };
static const uint8_t activation_scales[COLUMNS / NVFP4_GROUP] = { 109, 125 };

static void test_activations(void **state)
{
    (void)state;
    float x[COLUMNS], out[COLUMNS], global = 2688.0f / 9;
    widen(x, activations, COLUMNS);
    for (int i = 0; i < COLUMNS; i++) x[i] *= 1 + 0x1p-10f; /* what BF16 drops does not count */
    nvfp4_quantize_activations(out, x, global, COLUMNS);
    for (int i = 0; i < COLUMNS; i++) {
        float step = e4m3_to_f32((e4m3){ activation_scales[i / NVFP4_GROUP] }) / global;
        assert_true(out[i] == activation_codes[i] * step);
    }
    /* a group far below the others keeps no scale and becomes zeros; above the range it saturates */
    for (int i = 0; i < COLUMNS; i++) x[i] = i < NVFP4_GROUP ? 1e-6f : -100;
    nvfp4_quantize_activations(x, x, global, COLUMNS);
    for (int i = 0; i < COLUMNS; i++) assert_true(x[i] == (i < NVFP4_GROUP ? 0 : -6 * (448 / global)));
}

static void test_rounding_agrees_with_codes(void **state)
{
    (void)state;
    for (int i = -7000; i <= 7000; i++) {
        float x = (float)i / 1000;
        assert_true(e2m1_round(x) == e2m1_to_f32(e2m1_from_f32(x)));
        assert_true(e2m1_round(nextafterf(x, 9)) == e2m1_to_f32(e2m1_from_f32(nextafterf(x, 9))));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference_bytes),
        cmocka_unit_test(test_activations),
        cmocka_unit_test(test_rounding_agrees_with_codes),
        cmocka_unit_test(test_reference_values),
        cmocka_unit_test(test_global_scale),
        cmocka_unit_test(test_global_scale_everywhere),
        cmocka_unit_test(test_zero_groups),
        cmocka_unit_test(test_zero_matrix),
        cmocka_unit_test(test_small_groups),
        cmocka_unit_test(test_group_scale_rounding),
        cmocka_unit_test(test_error_bound),
        cmocka_unit_test(test_unpack_all_codes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
