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
typedef int32_t quad __attribute__((vector_size(16)));
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

INLINE vec vabs(vec x)
{
    return (vec)((vecu)x & 0x7fffffffu);
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

/* Lanes of 0..15, a nibble each. */
INLINE void vstore_nibbles(uint8_t *p, vecu v)
{
    enum { BYTES = VL < 8 ? VL : 8 };
    uint8_t bytes[VL];
    vstore_bytes(bytes, v);
    for (int i = 0; i < VL / BYTES; i++) {
        uint64_t t = 0;
        memcpy(&t, bytes + i * BYTES, BYTES);
        t = (t | t >> 4) & 0x00ff00ff00ff00ffu;
        t = (t | t >> 8) & 0x0000ffff0000ffffu;
        t |= t >> 16;
        memcpy(p + i * BYTES / 2, &t, BYTES / 2);
    }
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

/* e2m1_from_f32: a comparison that holds is -1. */
INLINE vecu vto_e2m1(vec x)
{
    vec a = vabs(x);
    veci count =
        (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return (vecu)-count | ((vecu)(x < 0.0f) & 8);
}

INLINE vec vmax(vec a, vec b) /* b where a is NaN */
{
    return (vec)vselect(a > b, (vecu)a, (vecu)b);
}

/* The largest lane; none is negative or NaN, so that their bits have the same order. */
INLINE float vmaximum(vec v)
{
    quad q[VL / 4];
    memcpy(q, &v, sizeof q);
    for (int n = VL / 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) q[i] = ((q[i] > q[i + n]) & q[i]) | (~(q[i] > q[i + n]) & q[i + n]);
    int32_t a = q[0][0] > q[0][1] ? q[0][0] : q[0][1], b = q[0][2] > q[0][3] ? q[0][2] : q[0][3];
    return f32_from_bits((uint32_t)(a > b ? a : b));
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

INLINE float group_absmax(const float *x)
{
    vec m = { 0 };
    for (int k = 0; k < PARTS; k++) m = vmax(vabs(vload(x + k * VL)), m);
    return vmaximum(m);
}

/* The scales and steps of 16 groups side by side: S = e4m3(global * bf(m / 6)), 0x20 where that is zero. */
INLINE void group_scales(uint8_t *scale, float *step, const float *absmax_of, float global)
{
    for (int i = 0; i < GROUP; i += VL) {
        vecu s = vto_e4m3(global * vbf16_round(vload(absmax_of + i) / E2M1_MAX));
        s = vselect((veci)s == 0, (vecu){ 0 } + 0x20, s);
        vstore_bytes(scale + i, s);
        vstore(step + i, vfrom_e4m3(s) / global);
    }
}

static void nvfp4_pack(uint8_t *codes, e4m3 *scale, const float *x, float global, int64_t n)
{
    for (int64_t left = n / GROUP; left > 0; left -= GROUP, scale += GROUP) {
        int64_t groups = left < GROUP ? left : GROUP;
        float absmax_of[GROUP] = { 0 }, step[GROUP];
        uint8_t bytes[GROUP];
        for (int64_t g = 0; g < groups; g++) absmax_of[g] = group_absmax(x + g * GROUP);
        group_scales(bytes, step, absmax_of, global);
        memcpy(scale, bytes, (size_t)groups);
        for (int64_t g = 0; g < groups; g++)
            for (int k = 0; k < PARTS; k++, x += VL, codes += VL / 2)
                vstore_nibbles(codes, vto_e2m1(vload(x) / step[g]));
    }
}

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
                                                   .nvfp4_pack = nvfp4_pack,                                 \
                                                   .nvfp4_unpack = nvfp4_unpack,                             \
                                                   .fp8_pack = fp8_codes,                                    \
                                                   .fp8_unpack = fp8_unpack,                                 \
                                                   .squares = squares }
#endif
