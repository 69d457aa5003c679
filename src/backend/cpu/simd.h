/* Vectors of VL floats in GCC's and clang's own notation, so that one kernel source serves every ISA: the
 * file that includes this is compiled once per ISA (kernels_generic.c, kernels_avx2.c, kernels_avx512.c).
 * Products that feed a sum become fused where the ISA has them (-ffp-contract=fast on those files only). */
#ifndef BACKEND_CPU_SIMD_H
#define BACKEND_CPU_SIMD_H
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { VL = 16 };
#elif defined(__AVX2__)
enum { VL = 8 };
#else
enum { VL = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * VL)));
typedef int32_t veci __attribute__((vector_size(4 * VL)));
typedef uint32_t vecu __attribute__((vector_size(4 * VL)));
typedef uint16_t vech __attribute__((vector_size(2 * VL)));
typedef uint8_t vecb __attribute__((vector_size(VL)));
typedef int8_t vecc __attribute__((vector_size(VL)));
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

INLINE vec vset(float x)
{
    return x - (vec){ 0 };
}

/* a * b + c, rounded once where the ISA can: for what two pieces of code have to compute alike. A plain sum
 * of two products may be fused either way. */
INLINE vec vmuladd(vec a, vec b, vec c)
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < VL; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE vec vselect(veci mask, vec yes, vec no) /* mask lanes are 0 or -1 */
{
    return (vec)((mask & (veci)yes) | (~mask & (veci)no));
}

INLINE vec vmax(vec a, vec b)
{
    return vselect(a > b, a, b);
}

/* Halves added until one is left: the order is fixed. */
INLINE float vsum(vec v)
{
    float x[VL];
    vstore(x, v);
    for (int half = VL / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

INLINE float vmaximum(vec v)
{
    float x[VL];
    vstore(x, v);
    for (int i = 1; i < VL; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
}

INLINE vec vload_bf16(const uint16_t *p)
{
    vech h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, vecu) << 16);
}

/* By name where there is one instruction for it: gcc 12 widens bytes one at a time. */
INLINE vecu vload_u8(const uint8_t *p)
{
#if defined(__AVX512F__)
    return (vecu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
#elif defined(__AVX2__)
    return (vecu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
#else
    vecb b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, vecu);
#endif
}

/* 8-bit integers with a sign as f32. */
INLINE vec vload_i8(const int8_t *p)
{
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
#else
    vecc c;
    memcpy(&c, p, sizeof c);
    return __builtin_convertvector(__builtin_convertvector(c, veci), vec);
#endif
}

/* E4M3 codes to f32, exact; codes are not NaN (rejected when the weight was laid out, never made by a cache).
 */
INLINE vec vfrom_e4m3(vecu code)
{
    vecu rest = code & 0x7f, sign = (code & 0x80) << 24;
    vec normal = (vec)((rest << 20) + (120u << 23));
    vec tiny = __builtin_convertvector((veci)rest, vec) * 0x1p-9f;
    return (vec)((vecu)vselect((veci)(rest < 8), tiny, normal) | sign);
}

INLINE vecu vload_u32(const uint8_t *p)
{
    vecu v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Four columns of VL rows in the panels' order, as f32: the bytes go by way of f16, whose tiny values a
 * conversion gets right, where there is one. */
INLINE void vload_fp8(vec *c0, vec *c1, vec *c2, vec *c3, const uint8_t *p)
{
#if defined(__AVX512F__)
    const __m512i keep = _mm512_set1_epi16((short)0xbf80), order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i q = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(p));
    const __m512 up = _mm512_set1_ps(0x1p8f);
    __m512i odd = _mm512_and_si512(_mm512_srai_epi16(q, 1), keep);
    __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(q, 8), 1), keep);
    *c0 = (vec)_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(even)), up);
    *c1 = (vec)_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(odd)), up);
    *c2 = (vec)_mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1)), up);
    *c3 = (vec)_mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1)), up);
#elif defined(__AVX2__)
    const __m256i keep = _mm256_set1_epi16((short)0xbf80);
    const __m256i q = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)(const void *)p), 0xd8);
    const __m256 up = _mm256_set1_ps(0x1p8f);
    __m256i odd = _mm256_and_si256(_mm256_srai_epi16(q, 1), keep);
    __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(q, 8), 1), keep);
    *c0 = (vec)_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(even)), up);
    *c1 = (vec)_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(odd)), up);
    *c2 = (vec)_mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(even, 1)), up);
    *c3 = (vec)_mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1)), up);
#else
    vech a, b;
    memcpy(&a, p, sizeof a);
    memcpy(&b, p + sizeof a, sizeof b);
    vecu x = __builtin_convertvector(a, vecu), y = __builtin_convertvector(b, vecu);
    *c0 = vfrom_e4m3(x & 0xff);
    *c1 = vfrom_e4m3(x >> 8);
    *c2 = vfrom_e4m3(y & 0xff);
    *c3 = vfrom_e4m3(y >> 8);
#endif
}

/* E2M1 codes 0..15 to f32. */
INLINE vec vfrom_e2m1(vecu code)
{
#if defined(__AVX512F__)
    const __m512 value =
        _mm512_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6);
    return (vec)_mm512_permutexvar_ps((__m512i)code, value);
#elif defined(__AVX2__)
    const __m256 value = _mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6);
    return (vec)((vecu)_mm256_permutevar8x32_ps(value, (__m256i)code) | ((code & 8) << 28));
#else
    /* 1 + m/2 times 2^(e-1), but 0 and 0.5 where e = 0 */
    vecu magnitude = code & 7;
    vec normal = (vec)((magnitude << 22) + (126u << 23));
    vec tiny = __builtin_convertvector((veci)magnitude, vec) * 0.5f;
    return (vec)((vecu)vselect((veci)(magnitude < 2), tiny, normal) | ((code & 8) << 28));
#endif
}

/* e^x within 2 units in the last place for |x| < 87, saturating beyond; e^x = 2^n e^r with |r| <= ln 2 / 2.
 */
INLINE vec vexp(vec x)
{
    x = vselect(x > 88.0f, vset(88.0f), x);
    x = vselect(x < -87.0f, vset(-87.0f), x);
    const vec magic = vset(0x1.8p23f);
    vec shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
    vec r = x - n * 0x1.62e4p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    vec p = r * (1 / 5040.0f) + 1 / 720.0f;
    p = p * r + 1 / 120.0f;
    p = p * r + 1 / 24.0f;
    p = p * r + 1 / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vec)((vecu)p + ((vecu)shifted << 23));
}

INLINE vec vsigmoid(vec x)
{
    return 1.0f / (1.0f + vexp(-x));
}

INLINE vec vsilu(vec x)
{
    return x / (1.0f + vexp(-x));
}
#endif
