/* The small formats on all their codes, and the conversions from f32 against a search for the nearest value
 * that shares no code with them. QUENCH_EXHAUSTIVE=1 runs all f32 patterns instead of one in 211. */
#include "num/bf16.h"
#include "num/dtype.h"
#include "num/e2m1.h"
#include "num/e4m3.h"
#include "num/f16.h"
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

/* Magnitude of a small float by its fields, exact in double. */
static double decode(unsigned code, int mantissa_bits, int bias)
{
    unsigned fraction = code & ((1u << mantissa_bits) - 1);
    int exponent = (int)(code >> mantissa_bits);
    if (exponent == 0) return ldexp(fraction, 1 - bias - mantissa_bits);
    return ldexp(fraction + (1u << mantissa_bits), exponent - bias - mantissa_bits);
}

static double e4m3_values[127], e2m1_values[8];

static int fill_tables(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 127; c++) e4m3_values[c] = decode(c, 3, 7);
    for (unsigned c = 0; c < 8; c++) e2m1_values[c] = decode(c, 1, 1);
    return 0;
}

/* Code of the value nearest to a >= 0, the even code in the middle, the last one above all. */
static unsigned nearest(const double *values, unsigned n, double a)
{
    unsigned below = 0, above = n - 1; /* values[below] <= a < values[above], once a is inside */
    if (a >= values[above]) return above;
    while (above - below > 1) {
        unsigned middle = (below + above) / 2;
        if (values[middle] <= a)
            below = middle;
        else
            above = middle;
    }
    double down = a - values[below], up = values[above] - a;
    if (down != up) return down < up ? below : above;
    return below % 2 ? above : below;
}

static unsigned e4m3_want(float x)
{
    unsigned sign = signbit(x) ? 0x80 : 0;
    return sign | (isnan(x) ? 0x7f : nearest(e4m3_values, 127, fabs((double)x)));
}

static unsigned e2m1_want(float x)
{
    return nearest(e2m1_values, 8, fabs((double)x)) | (x < 0 ? 8 : 0);
}

static void check_e4m3(float x)
{
    if (e4m3_from_f32(x).bits != e4m3_want(x))
        fail_msg("e4m3_from_f32(%a [%08x]) = %02x, wanted %02x", (double)x, f32_bits(x),
                 e4m3_from_f32(x).bits, e4m3_want(x));
}

static void check_e2m1(float x)
{
    if (e2m1_from_f32(x) != e2m1_want(x))
        fail_msg("e2m1_from_f32(%a [%08x]) = %x, wanted %x", (double)x, f32_bits(x), e2m1_from_f32(x),
                 e2m1_want(x));
}

static void test_bf16_codes(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 0x10000; c++) {
        float x = bf16_to_f32((bf16){ (uint16_t)c });
        bool is_nan = (c & 0x7fff) > 0x7f80;
        assert_int_equal(f32_bits(x), c << 16);
        assert_int_equal(bf16_from_f32(x).bits, is_nan ? c | 0x40 : c);
        if (!is_nan) assert_int_equal(f32_bits(bf16_round(x)), c << 16);
    }
}

static uint16_t bf16_of_bits(uint32_t u)
{
    return bf16_from_f32(f32_from_bits(u)).bits;
}

static void test_bf16_rounding(void **state)
{
    (void)state;
    for (uint32_t sign = 0; sign < 2; sign++) {
        for (uint32_t magnitude = 0; magnitude < 0x7f80;
             magnitude++) { /* the last one's upper neighbour is infinity */
            uint32_t c = sign << 15 | magnitude, even = c + (c & 1);
            assert_int_equal(bf16_of_bits(c << 16 | 1), c);
            assert_int_equal(bf16_of_bits(c << 16 | 0x7fff), c);
            assert_int_equal(bf16_of_bits(c << 16 | 0x8000), even);
            assert_int_equal(bf16_of_bits(c << 16 | 0x8001), c + 1);
            assert_int_equal(bf16_of_bits(c << 16 | 0xffff), c + 1);
        }
        assert_int_equal(bf16_of_bits(sign << 31 | 0x7f800001), sign << 15 | 0x7fc0); /* not infinity */
        assert_int_equal(bf16_of_bits(sign << 31 | 0x7fffffff), sign << 15 | 0x7fff);
    }
    assert_int_equal(bf16_from_f32(FLT_MAX).bits, 0x7f80);
    assert_int_equal(bf16_from_f32(-FLT_MAX).bits, 0xff80);
}

static void test_f16_codes(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 0x10000; c++) {
        float x = f16_to_f32((uint16_t)c);
        assert_int_equal(signbit(x) != 0, c >> 15);
        if ((c & 0x7c00) != 0x7c00)
            assert_true(fabs((double)x) == decode(c & 0x7fff, 10, 15));
        else if (c & 0x3ff)
            assert_true(isnan(x));
        else
            assert_true(isinf(x));
    }
}

static void test_e4m3_codes(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 0x100; c++) {
        float x = e4m3_to_f32((e4m3){ (uint8_t)c });
        assert_int_equal(signbit(x) != 0, c >> 7);
        if ((c & 0x7f) == 0x7f)
            assert_true(isnan(x));
        else
            assert_true(fabs((double)x) == decode(c & 0x7f, 3, 7));
        assert_int_equal(e4m3_from_f32(x).bits, c);
    }
}

static void test_e4m3_midpoints(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 126; c++) {
        float middle = (float)((e4m3_values[c] + e4m3_values[c + 1]) / 2);
        for (int sign = 1; sign >= -1; sign -= 2) {
            unsigned s = sign < 0 ? 0x80 : 0;
            float m = (float)sign * middle, toward_0 = nextafterf(m, 0),
                  away = nextafterf(m, (float)sign * INFINITY);
            assert_int_equal(e4m3_from_f32(m).bits, s | (c % 2 ? c + 1 : c));
            assert_int_equal(e4m3_from_f32(toward_0).bits, s | c);
            assert_int_equal(e4m3_from_f32(away).bits, s | (c + 1));
            check_e4m3(m), check_e4m3(toward_0), check_e4m3(away);
        }
    }
}

static void test_e4m3_limits(void **state)
{
    (void)state;
    static const float saturated[] = { 448, 449, 463.99997f, 464,     464.00003f,
                                       479, 480, 1e30f,      FLT_MAX, INFINITY };
    static const float vanishing[] = { 0, 0x1p-149f, 0x1.8p-140f, FLT_MIN, 0x1p-11f, 0x1p-10f };
    for (size_t i = 0; i < sizeof saturated / sizeof *saturated; i++) {
        assert_int_equal(e4m3_from_f32(saturated[i]).bits, 0x7e);
        assert_int_equal(e4m3_from_f32(-saturated[i]).bits, 0xfe);
    }
    for (size_t i = 0; i < sizeof vanishing / sizeof *vanishing; i++) {
        assert_int_equal(e4m3_from_f32(vanishing[i]).bits, 0);
        assert_int_equal(e4m3_from_f32(-vanishing[i]).bits, 0x80);
    }
    assert_int_equal(e4m3_from_f32(0x1.000002p-10f).bits, 1);
    assert_int_equal(e4m3_from_f32(0x1.8p-9f).bits, 2); /* the tie 3 * 2^-10 goes to 2^-8 */
    assert_int_equal(e4m3_from_f32(0x1.fp-7f).bits, 8); /* the tie below the first normal carries into it */
    assert_int_equal(e4m3_from_f32(f32_from_bits(0x7f800001)).bits, 0x7f);
    assert_int_equal(e4m3_from_f32(f32_from_bits(0x7fc00000)).bits, 0x7f);
    assert_int_equal(e4m3_from_f32(f32_from_bits(0xffffffff)).bits, 0xff);
}

static void test_e2m1_codes(void **state)
{
    (void)state;
    for (unsigned c = 0; c < 16; c++) {
        float x = e2m1_to_f32((uint8_t)c);
        assert_true(fabs((double)x) == decode(c & 7, 1, 1));
        assert_int_equal(signbit(x) != 0, c >> 3);
        assert_int_equal(e2m1_from_f32(x), c == 8 ? 0 : c); /* an exact zero has no sign when written */
    }
}

static void test_e2m1_thresholds(void **state)
{
    (void)state;
    static const struct {
        float at;
        uint8_t below, exact, above;
    } thresholds[] = { { 0.25f, 0, 0, 1 }, { 0.75f, 1, 2, 2 }, { 1.25f, 2, 2, 3 }, { 1.75f, 3, 4, 4 },
                       { 2.5f, 4, 4, 5 },  { 3.5f, 5, 6, 6 },  { 5, 6, 6, 7 } };
    for (size_t i = 0; i < sizeof thresholds / sizeof *thresholds; i++) {
        float t = thresholds[i].at;
        for (int sign = 0; sign <= 8; sign += 8) {
            float s = sign ? -1 : 1;
            assert_int_equal(e2m1_from_f32(s * nextafterf(t, 0)), thresholds[i].below | sign);
            assert_int_equal(e2m1_from_f32(s * t), thresholds[i].exact | sign);
            assert_int_equal(e2m1_from_f32(s * nextafterf(t, INFINITY)), thresholds[i].above | sign);
        }
    }
}

static void test_e2m1_limits(void **state)
{
    (void)state;
    assert_int_equal(e2m1_from_f32(0.0f), 0);
    assert_int_equal(e2m1_from_f32(-0.0f), 0);
    assert_int_equal(e2m1_from_f32(0x1p-149f), 0);
    assert_int_equal(e2m1_from_f32(-0x1p-149f), 8);
    assert_int_equal(e2m1_from_f32(-0.25f), 8);
    assert_int_equal(e2m1_from_f32(6.5f), 7);
    assert_int_equal(e2m1_from_f32(INFINITY), 7);
    assert_int_equal(e2m1_from_f32(-INFINITY), 15);
}

/* The stride is prime, so that all low bits meet all exponents. */
static void test_all_patterns(void **state)
{
    (void)state;
    const char *exhaustive = getenv("QUENCH_EXHAUSTIVE");
    uint64_t stride = exhaustive && strcmp(exhaustive, "1") == 0 ? 1 : 211;
    for (uint64_t u = 0; u < (uint64_t)1 << 32; u += stride) {
        float x = f32_from_bits((uint32_t)u);
        check_e4m3(x);
        if (!isnan(x)) check_e2m1(x);
    }
}

static void test_dtype_names(void **state)
{
    (void)state;
    enum dtype found;
    for (int d = 0; d < DTYPE_COUNT; d++) {
        assert_true(dtype_from_name(&found, dtype_name((enum dtype)d)));
        assert_int_equal(found, d);
        assert_in_range(dtype_bytes(found), 1, 8);
    }
    assert_false(dtype_from_name(&found, "bf16"));
    assert_false(dtype_from_name(&found, ""));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bf16_codes),     cmocka_unit_test(test_bf16_rounding),
        cmocka_unit_test(test_f16_codes),      cmocka_unit_test(test_e4m3_codes),
        cmocka_unit_test(test_e4m3_midpoints), cmocka_unit_test(test_e4m3_limits),
        cmocka_unit_test(test_e2m1_codes),     cmocka_unit_test(test_e2m1_thresholds),
        cmocka_unit_test(test_e2m1_limits),    cmocka_unit_test(test_all_patterns),
        cmocka_unit_test(test_dtype_names),
    };
    return cmocka_run_group_tests(tests, fill_tables, NULL);
}
