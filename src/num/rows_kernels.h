/* The row kernels in GCC's and clang's vector notation: a group of 16 weights is PARTS vectors of VL lanes.
 * The file that includes this is compiled once per instruction set (rows_generic.c, rows_avx2.c), without
 * contraction: nothing here may be fused. */
#ifndef NUM_ROWS_KERNELS_H
#define NUM_ROWS_KERNELS_H
#include "num/e2m1.h"
#include "num/nvfp4.h"
#include "num/rows.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX2__)
enum { VL = 8 };
#else
enum { VL = 4 };
#endif
enum { GROUP = NVFP4_GROUP, PARTS = GROUP / VL };

typedef float vec __attribute__((vector_size(4 * VL)));
typedef int32_t veci __attribute__((vector_size(4 * VL)));
typedef uint32_t vecu __attribute__((vector_size(4 * VL)));
typedef int16_t vecs __attribute__((vector_size(4 * VL)));
typedef float vech __attribute__((vector_size(2 * VL)));
typedef double vecd __attribute__((vector_size(4 * VL)));
#define INLINE static inline __attribute__((always_inline))

INLINE vec vload(const float *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void vstore(float *p, vec v)
{
    memcpy(p, &v, sizeof v);
}

INLINE vecu vselect(veci mask, vecu yes, vecu no) /* mask lanes are 0 or -1 */
{
    return ((vecu)mask & yes) | (~(vecu)mask & no);
}

/* Lanes of 0..255, a byte each. */
INLINE void vstore_bytes(uint8_t *p, vecu v)
{
#if defined(__AVX2__)
    __m256i x = (__m256i)v;
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi16(words, words));
#else
    for (int i = 0; i < VL; i++) p[i] = (uint8_t)v[i];
#endif
}

INLINE vecu vload_bytes(const uint8_t *p)
{
#if defined(__AVX2__)
    return (vecu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
#else
    return (vecu){ p[0], p[1], p[2], p[3] };
#endif
}

/* bf16_round. */
INLINE vec vbf16_round(vec x)
{
    vecu u = (vecu)x, rounded = (u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u;
    return (vec)vselect((u & 0x7fffffffu) > 0x7f800000u, (u | 0x400000u) & 0xffff0000u, rounded);
}

/* e4m3_from_f32. */
INLINE vecu vto_e4m3(vec x)
{
    vecu u = (vecu)x, a = u & 0x7fffffffu, sign = u >> 24 & 0x80;
    vecu normal = ((a + 0x7ffffu + (a >> 20 & 1)) >> 20) - (120u << 3), top = (vecu){ 0 } + 0x7e;
    vecu tiny = (vecu)((vec)a + 0x1.8p14f) & 0x0f;
    vecu code = vselect((veci)a < 0x3c800000, tiny, vselect((veci)a < 0x43e00000, normal, top));
    code = vselect((veci)a > 0x7f800000, top | 1, code);
    return sign | code;
}

/* e4m3_to_f32. */
INLINE vec vfrom_e4m3(vecu code)
{
    vecu rest = code & 0x7f, sign = (code & 0x80) << 24, nan = (vecu){ 0 } + 0x7fc00000u;
    vecu normal = (rest << 20) + (120u << 23);
    vecu tiny = (vecu)(__builtin_convertvector((veci)rest, vec) * 0x1p-9f);
    vecu magnitude = vselect((veci)rest < 8, tiny, normal);
    return (vec)(vselect((veci)rest == 0x7f, nan, magnitude) | sign);
}

/* Of m and the magnitudes of the numbers at p, as signed integers: they have the same order. */
INLINE vecs larger(vecs m, const uint8_t *p)
{
    vecs x;
    memcpy(&x, p, sizeof x);
    x &= 0x7fff;
    vecs above = x > m;
    return (above & x) | (~above & m);
}

static uint16_t absmax(const void *bf16s, int64_t n)
{
    enum { LANES = 2 * VL, SUMS = 4 };
    const uint8_t *from = bf16s;
    uint8_t rest[SUMS * sizeof(vecs)] = { 0 };
    vecs m[SUMS] = { { 0 } };
    for (; n >= SUMS * LANES; n -= SUMS * LANES, from += sizeof rest)
        for (int k = 0; k < SUMS; k++) m[k] = larger(m[k], from + (size_t)k * sizeof(vecs));
    memcpy(rest, from, (size_t)n * 2);
    int16_t top = 0;
    for (int k = 0; k < SUMS; k++) {
        m[k] = larger(m[k], rest + (size_t)k * sizeof(vecs));
        for (int i = 0; i < LANES; i++) top = m[k][i] > top ? m[k][i] : top;
    }
    return (uint16_t)top;
}

static void widen(float *out, const void *bf16s, int64_t n)
{
    const uint8_t *from = bf16s;
    for (int64_t i = 0; i < n; i++) {
        bf16 w;
        memcpy(&w, from + 2 * i, 2);
        out[i] = bf16_to_f32(w);
    }
}

/* Columns whose errors are summed in f32 before they join a sum in double. */
enum { BLOCK = 512, BLOCK_GROUPS = BLOCK / GROUP };

#if defined(__AVX2__)
/* The scales and steps of 16 groups side by side: S = e4m3(global * bf(m / 6)), 0x20 where that is zero. */
INLINE void group_scales(uint8_t *scale, float *step, const float *absmax_of, float global)
{
    for (int i = 0; i < BLOCK_GROUPS; i += VL) {
        vecu s = vto_e4m3(global * vbf16_round(vload(absmax_of + i) / E2M1_MAX));
        s = vselect((veci)s == 0, (vecu){ 0 } + 0x20, s);
        vstore_bytes(scale + i, s);
        vstore(step + i, vfrom_e4m3(s) / global);
    }
}

/* Bits of bf16(step * c), rounded towards zero, of 8 steps. The products are exact. */
INLINE vecu below(__m256d low, __m256d high, double c)
{
    __m256i a = _mm256_srli_epi64(_mm256_castpd_si256(_mm256_mul_pd(low, _mm256_set1_pd(c))), 45);
    __m256i b = _mm256_srli_epi64(_mm256_castpd_si256(_mm256_mul_pd(high, _mm256_set1_pd(c))), 45);
    __m256 both = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88);
    return (vecu)_mm256_permute4x64_epi64(_mm256_castps_si256(both), 0xd8) - ((1023 - 127) << 7);
}

INLINE void put_limit(uint32_t *to, int k, vecu t)
{
    t |= t << 16;
    vstore((float *)(void *)(to + k * BLOCK_GROUPS), (vec)t);
}

/* For each step and each of the seven comparisons of e2m1_from_f32 the BF16 number above which it holds for
 * f32(x / step), as bits in both halves of a word. x / step rounds to more than t where x > step * (t + half
 * a unit), to t or more where x >= step * (t - half a unit); these products have 25 significant bits or more,
 * so x, which has 8, is never one of them, and is above one where it is above the next BF16 number below. */
INLINE void limits(uint32_t to[7 * BLOCK_GROUPS], const float *step)
{
    for (int i = 0; i < BLOCK_GROUPS; i += VL) {
        __m256d low = _mm256_cvtps_pd(_mm_loadu_ps(step + i)),
                high = _mm256_cvtps_pd(_mm_loadu_ps(step + i + VL / 2));
        vecu half = ((vecu)vload(step + i) >> 16) - (2 << 7), more = below(low, high, 0.75 - 0x1p-25);
        vecu second = below(low, high, 1.25 + 0x1p-24), third = below(low, high, 1.75 - 0x1p-24);
        put_limit(to + i, 0, half);
        put_limit(to + i, 1, more);
        put_limit(to + i, 2, second);
        put_limit(to + i, 3, third);
        put_limit(to + i, 4, second + (1 << 7));
        put_limit(to + i, 5, third + (1 << 7));
        put_limit(to + i, 6, second + (2 << 7));
    }
}

/* The largest magnitude of a group, as an f32. */
INLINE float group_top(const uint8_t *bf16s)
{
    __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)bf16s);
    __m256i rest = _mm256_andnot_si256(x, _mm256_set1_epi16(INT16_MAX)); /* 0x7fff - |x| */
    __m128i least = _mm_min_epu16(_mm256_castsi256_si128(rest), _mm256_extracti128_si256(rest, 1));
    return f32_from_bits(~(uint32_t)_mm_cvtsi128_si32(_mm_minpos_epu16(least)) << 16 & 0x7fffffffu);
}

/* Codes of a group, four bits of each 16; adds to the sums of its errors and squares. */
INLINE void group_codes(uint8_t *codes, vec sums[2], const uint8_t *bf16s, const uint32_t *limit, float step)
{
    const __m256i zero = _mm256_setzero_si256(), ends = _mm256_set1_epi32(0x0c080400);
    __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)bf16s);
    __m256i a = _mm256_and_si256(x, _mm256_set1_epi16(INT16_MAX));
    __m256i plus = _mm256_cmpeq_epi16(_mm256_subs_epu16(x, _mm256_set1_epi16(INT16_MIN)), zero);
    __m256i code = _mm256_andnot_si256(plus, _mm256_set1_epi16(8));
    for (int k = 0; k < 7; k++)
        code = _mm256_sub_epi16(code, _mm256_cmpgt_epi16(a, _mm256_set1_epi32((int)limit[k * BLOCK_GROUPS])));
    __m256i pairs = _mm256_shuffle_epi8(_mm256_madd_epi16(code, _mm256_set1_epi32(0x00100001)), ends);
    pairs = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    _mm_storel_epi64((__m128i *)(void *)codes, _mm256_castsi256_si128(pairs));

    const vec value = (vec){ 0, 0.5f, 1, 1.5f, 2, 3, 4, 6 } * step;
    vec even = (vec)((vecu)a << 16), odd = (vec)((vecu)a & 0xffff0000u);
    vec d = even - _mm256_permutevar8x32_ps(value, code); /* by the low three bits */
    vec f = odd - _mm256_permutevar8x32_ps(value, _mm256_srli_epi32(code, 16));
    sums[0] += d * d + f * f;
    sums[1] += even * even + odd * odd;
}

static void nvfp4_nearest(uint8_t *codes, e4m3 *scale, double sums[2], const void *bf16s, float global,
                          int64_t n)
{
    const uint8_t *x = bf16s;
    double all[2][VL] = { { 0 } };
    for (int64_t left = n / GROUP; left > 0; left -= BLOCK_GROUPS, scale += BLOCK_GROUPS) {
        int64_t groups = left < BLOCK_GROUPS ? left : BLOCK_GROUPS;
        float top[BLOCK_GROUPS] = { 0 }, step[BLOCK_GROUPS];
        uint32_t limit[7 * BLOCK_GROUPS];
        uint8_t bytes[BLOCK_GROUPS];
        vec block[2] = { { 0 } };
        for (int64_t g = 0; g < groups; g++) top[g] = group_top(x + g * GROUP * 2);
        group_scales(bytes, step, top, global);
        memcpy(scale, bytes, (size_t)groups);
        limits(limit, step);
        for (int64_t g = 0; g < groups; g++, x += GROUP * 2, codes += GROUP / 2)
            group_codes(codes, block, x, limit + g, step[g]);
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < VL; k++) all[i][k] += (double)block[i][k];
    }
    for (int i = 0; i < 2; i++) {
        sums[i] = 0;
        for (int k = 0; k < VL; k++) sums[i] += all[i][k];
    }
}
#else
static void nvfp4_nearest(uint8_t *codes, e4m3 *scale, double sums[2], const void *bf16s, float global,
                          int64_t n)
{
    enum { LANES = 8 };
    const uint8_t *from = bf16s;
    double all[2][LANES] = { { 0 } };
    for (int64_t left = n; left > 0; left -= BLOCK) {
        int64_t cols = left < BLOCK ? left : BLOCK;
        float x[BLOCK], back[BLOCK], block[2][LANES] = { { 0 } };
        widen(x, from, cols);
        nvfp4_pack_row(codes, scale, x, global, cols);
        nvfp4_unpack_row(back, codes, scale, global, cols);
        for (int64_t i = 0; i < cols; i += 2) {
            float d = x[i] - back[i], f = x[i + 1] - back[i + 1];
            block[0][i / 2 % LANES] += d * d + f * f;
            block[1][i / 2 % LANES] += x[i] * x[i] + x[i + 1] * x[i + 1];
        }
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < LANES; k++) all[i][k] += (double)block[i][k];
        from += 2 * cols, codes += cols / 2, scale += cols / GROUP;
    }
    for (int i = 0; i < 2; i++) {
        sums[i] = 0;
        for (int k = 0; k < LANES; k++) sums[i] += all[i][k];
    }
}
#endif

#if defined(__AVX2__)
/* Each half of a group is 8 nibbles of one word, the lowest first. */
static void nvfp4_unpack(float *out, const uint8_t *codes, const e4m3 *scale, float global, int64_t n)
{
    const vecu shift = { 0, 4, 8, 12, 16, 20, 24, 28 };
    const __m256 value = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
    for (int64_t g = 0; g < n / GROUP; g++) {
        float step = e4m3_to_f32(scale[g]) / global;
        for (int k = 0; k < PARTS; k++, out += VL, codes += VL / 2) {
            uint32_t word;
            memcpy(&word, codes, sizeof word);
            vecu code = ((vecu){ 0 } + word) >> shift, sign = (code & 8) << 28;
            vecu magnitude = (vecu)_mm256_permutevar8x32_ps(value, (__m256i)code); /* by the low three bits */
            vstore(out, (vec)(magnitude | sign) * step);
        }
    }
}
#else
/* There is no shift of each lane by its own count. */
static void nvfp4_unpack(float *out, const uint8_t *codes, const e4m3 *scale, float global, int64_t n)
{
    nvfp4_unpack_row(out, codes, scale, global, n);
}
#endif

static void fp8_codes(e4m3 *codes, const float *x, int64_t n, bf16 scale)
{
    float s = bf16_to_f32(scale);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vstore_bytes(&codes[i].bits, vto_e4m3(vbf16_round(vload(x + i) / s)));
    for (; i < n; i++) codes[i] = e4m3_from_f32(bf16_round(x[i] / s));
}

static void fp8_unpack(float *out, const e4m3 *codes, bf16 scale, int64_t n)
{
    float s = bf16_to_f32(scale);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vstore(out + i, vfrom_e4m3(vload_bytes(&codes[i].bits)) * s);
    for (; i < n; i++) out[i] = e4m3_to_f32(codes[i]) * s;
}

INLINE vecd load_doubles(const float *p)
{
    vech h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vecd);
}

static void squares(double sums[2], const float *w, const float *packed, int64_t n)
{
    enum { LANES = 8, EACH = VL / 2, SUMS = LANES / EACH };
    vecd difference[SUMS] = { { 0 } }, total[SUMS] = { { 0 } };
    for (; n >= LANES; n -= LANES, w += LANES, packed += LANES)
        for (int k = 0; k < SUMS; k++) {
            vecd x = load_doubles(w + k * EACH), d = x - load_doubles(packed + k * EACH);
            difference[k] += d * d;
            total[k] += x * x;
        }
    double a[LANES], b[LANES];
    memcpy(a, difference, sizeof a);
    memcpy(b, total, sizeof b);
    sums[0] = sums[1] = 0;
    for (int k = 0; k < LANES; k++) {
        double x = k < n ? (double)w[k] : 0, d = k < n ? x - (double)packed[k] : 0;
        sums[0] += a[k] + d * d;
        sums[1] += b[k] + x * x;
    }
}

#define ROW_KERNELS(isa)                                                                                     \
    const struct row_kernels row_kernels_##isa = { .name = #isa,                                             \
                                                   .absmax = absmax,                                         \
                                                   .widen = widen,                                           \
                                                   .nvfp4_nearest = nvfp4_nearest,                           \
                                                   .nvfp4_unpack = nvfp4_unpack,                             \
                                                   .fp8_pack = fp8_codes,                                    \
                                                   .fp8_unpack = fp8_unpack,                                 \
                                                   .squares = squares }
#endif
