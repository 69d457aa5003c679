/* The row kernels of every instruction set that this machine has against the scalar code that says what they
 * mean, to the bit: all BF16 numbers under scales of every kind, ties, rows of any length and alignment. */
#include "num/rows.h"
#include "num/fp8.h"
#include "num/nvfp4.h"
#include "num/random.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { ALL = 1 << 16, SPARE = 64, POISON = 0xa5 };

static struct {
    const struct row_kernels *sets[2];
    int n_sets;
    float x[ALL], got[ALL + SPARE], want[ALL + SPARE];
    uint8_t codes[ALL + SPARE], want_codes[ALL + SPARE], bits[2 * ALL + SPARE];
    e4m3 scale[ALL], want_scale[ALL];
} t;

static int find_sets(void **state)
{
    (void)state;
    t.sets[t.n_sets++] = rows_select(ROWS_GENERIC);
    if (rows_select(ROWS_BEST) != t.sets[0]) t.sets[t.n_sets++] = rows_select(ROWS_BEST);
    if (t.n_sets == 1) print_message("SKIP: this machine has the generic row kernels only\n");
    return 0;
}

/* As rows.h says, one pair at a time. */
static void add_blocks(double sums[2], const float *w, const float *packed, int64_t n)
{
    double all[2][8] = { { 0 } };
    for (int64_t first = 0; first < n; first += 512) {
        float eight[2][8] = { { 0 } };
        for (int64_t i = first; i < n && i < first + 512; i += 2) {
            float d = w[i] - packed[i], f = w[i + 1] - packed[i + 1];
            float dd = d * d, ff = f * f, ww = w[i] * w[i], vv = w[i + 1] * w[i + 1];
            eight[0][i / 2 % 8] += dd + ff;
            eight[1][i / 2 % 8] += ww + vv;
        }
        for (int k = 0; k < 8; k++) all[0][k] += (double)eight[0][k], all[1][k] += (double)eight[1][k];
    }
    sums[0] = sums[1] = 0;
    for (int k = 0; k < 8; k++) sums[0] += all[0][k], sums[1] += all[1][k];
}

static void check_nvfp4(const struct row_kernels *k, float global, int64_t n)
{
    size_t codes = (size_t)n / 2, scales = (size_t)n / NVFP4_GROUP;
    double sums[2], want_sums[2];
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(t.x[i])) t.x[i] = 0;
        uint16_t bits = (uint16_t)(f32_bits(t.x[i]) >> 16);
        memcpy(t.bits + 1 + 2 * i, &bits, 2);
    }
    memset(t.codes, POISON, codes + SPARE);
    memset(t.scale, POISON, scales + 1);
    nvfp4_pack_row(t.want_codes, t.want_scale, t.x, global, n);
    k->nvfp4_nearest(t.codes, t.scale, sums, t.bits + 1, global, n);
    for (size_t i = 0; i < scales; i++)
        if (t.scale[i].bits != t.want_scale[i].bits)
            fail_msg("%s: global %a: scale %zu of %lld is %02x, wanted %02x", k->name, (double)global, i,
                     (long long)scales, t.scale[i].bits, t.want_scale[i].bits);
    for (size_t i = 0; i < codes; i++)
        if (t.codes[i] != t.want_codes[i])
            fail_msg("%s: global %a: %a %a became %02x, wanted %02x", k->name, (double)global,
                     (double)t.x[2 * i], (double)t.x[2 * i + 1], t.codes[i], t.want_codes[i]);
    nvfp4_unpack_row(t.want, t.codes, t.scale, global, n);
    add_blocks(want_sums, t.x, t.want, n);
    assert_memory_equal(sums, want_sums, sizeof sums);
    memset(t.got, POISON, ((size_t)n + 1) * sizeof *t.got);
    k->nvfp4_unpack(t.got, t.codes, t.scale, global, n);
    assert_memory_equal(t.got, t.want, (size_t)n * sizeof *t.got);
    assert_int_equal(f32_bits(t.got[n]), POISON * 0x01010101u);
    assert_int_equal(t.scale[scales].bits, POISON);
    for (int i = 0; i < SPARE; i++) assert_int_equal(t.codes[codes + (size_t)i], POISON);
}

static void check_fp8(const struct row_kernels *k, int64_t n)
{
    memset(t.codes, POISON, (size_t)n + SPARE);
    memset(t.got, POISON, ((size_t)n + 1) * sizeof *t.got);
    bf16 scale = fp8_pack_row((e4m3 *)t.want_codes, t.x, n);
    k->fp8_pack((e4m3 *)t.codes, t.x, n, scale);
    assert_memory_equal(t.codes, t.want_codes, (size_t)n);
    for (int i = 0; i < SPARE; i++) assert_int_equal(t.codes[n + i], POISON);
    k->fp8_unpack(t.got, (const e4m3 *)t.codes, scale, n);
    for (int64_t i = 0; i < n; i++) {
        float back = e4m3_to_f32((e4m3){ t.codes[i] }) * bf16_to_f32(scale);
        assert_int_equal(f32_bits(t.got[i]), f32_bits(back));
    }
    assert_int_equal(f32_bits(t.got[n]), POISON * 0x01010101u);
}

/* Every finite BF16 number beside numbers near to it, and each beside each exponent's
 * least: a group's scale is its neighbours' matter, the steps are spread by the global scale. */
static void test_all_weights(void **state)
{
    (void)state;
    static const unsigned stride[] = { 1, 257, 4099, 32769 };
    for (int s = 0; s < 4; s++) {
        for (unsigned i = 0; i < ALL; i++) t.x[i] = bf16_to_f32((bf16){ (uint16_t)(i * stride[s]) });
        for (int k = 0; k < t.n_sets; k++)
            for (int e = -7; e <= 39; e += 2) {
                check_nvfp4(t.sets[k], ldexpf(1, e), ALL);
                check_nvfp4(t.sets[k], ldexpf(1.6640625f, e), ALL);
                check_nvfp4(t.sets[k], ldexpf(1.9921875f, e), ALL);
            }
    }
}

/* Every BF16 number under every scale code: one weight of the group sets the scale. */
static void test_all_scales(void **state)
{
    (void)state;
    for (unsigned code = 1; code < 0x7f; code++) {
        float top = 6 * e4m3_to_f32((e4m3){ (uint8_t)code });
        for (unsigned i = 0; i < ALL; i++) {
            float x = bf16_to_f32((bf16){ (uint16_t)i });
            t.x[i] = i % 16 == code % 16 ? top : fabsf(x) > top ? x * 0x1p-60f : x;
        }
        for (int k = 0; k < t.n_sets; k++)
            check_nvfp4(t.sets[k], 1, ALL), check_nvfp4(t.sets[k], 1.0078125f, ALL);
    }
}

/* Multiples of an eighth of a step: every threshold is met exactly. */
static void test_ties(void **state)
{
    (void)state;
    for (int g = 0; g < 64; g++) {
        float step = ldexpf(1, g % 8 - 4);
        for (int i = 0; i < 16; i++) {
            float eighths = (float)((g * 16 + i) % 49);
            t.x[g * 16 + i] = (i == g % 16 ? 6 : eighths / 8) * step * (i % 2 ? -1 : 1);
        }
    }
    for (int k = 0; k < t.n_sets; k++)
        for (int64_t n = 0; n <= 1024; n += 16) check_nvfp4(t.sets[k], 1, n), check_nvfp4(t.sets[k], 2, n);
}

/* Steps that put a weight a few units of f32 from a threshold, or on it: 8-bit weights over 24-bit steps. */
static void test_near_ties(void **state)
{
    (void)state;
    static const float threshold[] = { 0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5 };
    uint64_t seed = 6;
    for (int round = 0; round < 20000; round++) {
        float near = bf16_to_f32((bf16){ (uint16_t)(0x3c00 + random_bits(&seed) % 0x100) });
        float target = threshold[round % 7], global = 16 * target / near;
        for (int u = (int)(random_bits(&seed) % 5); u > 0; u--) global = nextafterf(global, u % 2 ? 0 : 1e9f);
        float step = 16 / global;
        for (int i = 0; i < 16; i++) {
            float x = bf16_round(threshold[i % 7] * step);
            uint32_t bits = f32_bits(x) + ((uint32_t)(i % 3) << 16) - (1 << 16);
            t.x[i] = i == round % 16 ? 6 * step : i % 7 == round % 7 ? near : f32_from_bits(bits);
            t.x[i] = bf16_round(i % 2 ? -t.x[i] : t.x[i]);
        }
        for (int k = 0; k < t.n_sets; k++) check_nvfp4(t.sets[k], global, 16);
    }
}

static void test_fp8_rows(void **state)
{
    (void)state;
    uint64_t seed = 3;
    for (unsigned octaves = 0; octaves < 40; octaves++) {
        for (int i = 0; i < 4096; i++) t.x[i] = random_bf16(&seed, octaves);
        for (int k = 0; k < t.n_sets; k++) {
            check_fp8(t.sets[k], 4096);
            for (int64_t n = 0; n < 70; n++) check_fp8(t.sets[k], n);
        }
    }
    for (unsigned top = 0; top < 0x8000; top += 0x7f) /* every exponent; infinity and NaN are the last two */
        for (int k = 0; k < t.n_sets; k++) {
            for (unsigned i = 0; i < 256; i++)
                t.x[i] = bf16_to_f32((bf16){ (uint16_t)(top - top / 256 * i) });
            check_fp8(t.sets[k], 256);
        }
}

static void test_absmax(void **state)
{
    (void)state;
    uint64_t seed = 4;
    for (int64_t n = 0; n < 300; n++)
        for (int at = 0; at < 3; at++) {
            uint16_t want = 0;
            memset(t.bits, 0xff, (size_t)n * 2 + SPARE); /* NaN on both sides */
            for (int64_t i = 0; i < n; i++) {
                uint16_t u = (uint16_t)(random_bits(&seed) & (n % 7 ? 0xbfff : 0xffff));
                memcpy(t.bits + at + 2 * i, &u, 2);
                want = (u & 0x7fff) > want ? u & 0x7fff : want;
            }
            for (int k = 0; k < t.n_sets; k++) assert_int_equal(t.sets[k]->absmax(t.bits + at, n), want);
        }
    static const uint16_t ends[] = { 0x8001, 0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7f81, 0xffff };
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        for (int at = 0; at < 130; at++)
            for (int k = 0; k < t.n_sets; k++) {
                memset(t.bits, 0, 260);
                memcpy(t.bits + 2 * at, &ends[i], 2);
                assert_int_equal(t.sets[k]->absmax(t.bits, 130), ends[i] & 0x7fff);
            }
}

static void test_widen(void **state)
{
    (void)state;
    for (int at = 0; at < 2; at++) {
        for (unsigned i = 0; i < ALL; i++) memcpy(t.bits + at + 2 * i, &(uint16_t){ (uint16_t)i }, 2);
        for (int k = 0; k < t.n_sets; k++) {
            memset(t.got, POISON, sizeof t.got);
            t.sets[k]->widen(t.got, t.bits + at, ALL);
            for (unsigned i = 0; i < ALL; i++) assert_int_equal(f32_bits(t.got[i]), i << 16);
            assert_int_equal(f32_bits(t.got[ALL]), POISON * 0x01010101u);
        }
    }
}

/* As rows.h says, one number at a time. */
static void add_squares(double sums[2], const float *w, const float *packed, int64_t n)
{
    double eight[2][8] = { { 0 } };
    for (int64_t i = 0; i < n; i++) {
        double d = (double)w[i] - (double)packed[i];
        eight[0][i % 8] += d * d;
        eight[1][i % 8] += (double)w[i] * (double)w[i];
    }
    sums[0] = sums[1] = 0;
    for (int k = 0; k < 8; k++) sums[0] += eight[0][k], sums[1] += eight[1][k];
}

static void test_squares(void **state)
{
    (void)state;
    uint64_t seed = 5;
    for (int64_t n = 0; n < 200; n++) {
        double want[2], got[2];
        for (int64_t i = 0; i < n; i++) {
            t.x[i] = random_bf16(&seed, 20);
            t.want[i] = t.x[i] * (1 + (float)(random_bits(&seed) >> 8) * 0x1p-27f);
        }
        add_squares(want, t.x, t.want, n);
        for (int k = 0; k < t.n_sets; k++) {
            t.sets[k]->squares(got, t.x, t.want, n);
            assert_memory_equal(got, want, sizeof want);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_weights), cmocka_unit_test(test_all_scales), cmocka_unit_test(test_ties),
        cmocka_unit_test(test_near_ties),   cmocka_unit_test(test_fp8_rows),   cmocka_unit_test(test_absmax),
        cmocka_unit_test(test_widen),       cmocka_unit_test(test_squares),
    };
    return cmocka_run_group_tests(tests, find_sets, NULL);
}
