/* Kernels of one ISA: inputs rounded to a product's form, words interleaved. Included by kernels_*.c only. */
#ifndef BACKEND_CPU_KERNELS_INPUT_H
#define BACKEND_CPU_KERNELS_INPUT_H
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd.h"
#include "num/bf16.h"
#include "num/fp8.h"
#include "num/int8.h"

#if defined(__AVX512F__)
/* Transposes 16 rows of 16 words in four exchanges: neighbours, pairs, quarters, halves. Of a line, `stride`
 * words from the one before, the first `keep` words are written. */
INLINE void transpose16(uint32_t *out, int stride, const uint8_t *const *rows, int64_t at, const int keep)
{
    const __mmask16 kept = (__mmask16)((1u << keep) - 1);
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + at);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* a[4k + i] holds, quarter q, words 4q + i of rows 4k .. 4k + 3 */
        __m512i lo01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44),
                hi01 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xee);
        __m512i lo23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44);
        __m512i hi23 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xee);
        _mm512_mask_storeu_epi32(out + stride * i, kept, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
        _mm512_mask_storeu_epi32(out + stride * (4 + i), kept, _mm512_shuffle_i32x4(lo01, lo23, 0xdd));
        _mm512_mask_storeu_epi32(out + stride * (8 + i), kept, _mm512_shuffle_i32x4(hi01, hi23, 0x88));
        _mm512_mask_storeu_epi32(out + stride * (12 + i), kept, _mm512_shuffle_i32x4(hi01, hi23, 0xdd));
    }
}
#elif defined(__AVX2__)
/* Transposes 8 rows of 8 words; a line of `out` is `stride` words. */
INLINE void transpose8(uint32_t *out, int stride, const uint8_t *const *rows, int64_t at)
{
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256((const __m256i *)(const void *)(rows[i] + at));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m256i *lo = (__m256i *)(void *)(out + (int64_t)i * stride),
                *hi = (__m256i *)(void *)(out + (int64_t)(i + 4) * stride);
        _mm256_storeu_si256(lo, _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
        _mm256_storeu_si256(hi, _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
    }
}
#endif

static void interleave(uint32_t *out, const uint8_t *const *rows, int n_rows, int64_t n)
{
    int64_t i = 0;
#if defined(__AVX512F__)
    const uint8_t *all[16];
    for (int r = 0; r < 16; r++) all[r] = rows[r < n_rows ? r : 0];
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                  high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    if (n_rows == 2)
        for (; i + 16 <= n; i += 16) {
            __m512i a = _mm512_loadu_si512(rows[0] + 4 * i), b = _mm512_loadu_si512(rows[1] + 4 * i);
            _mm512_storeu_si512(out + 2 * i, _mm512_permutex2var_epi32(a, low, b));
            _mm512_storeu_si512(out + 2 * i + 16, _mm512_permutex2var_epi32(a, high, b));
        }
    else if (n_rows == 16)
        for (; i + 16 <= n; i += 16) transpose16(out + i * 16, 16, all, 4 * i, 16);
    else
        for (; i + 16 <= n; i += 16) transpose16(out + i * n_rows, n_rows, all, 4 * i, n_rows);
#elif defined(__AVX2__)
    if (n_rows % 8 == 0)
        for (; i + 8 <= n; i += 8)
            for (int r = 0; r < n_rows; r += 8) transpose8(out + i * n_rows + r, n_rows, rows + r, 4 * i);
#endif
    for (; i < n; i++)
        for (int r = 0; r < n_rows; r++) memcpy(out + i * n_rows + r, rows[r] + 4 * i, 4);
}

static void round_bf16(uint32_t *out, const float *x, int64_t n)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vecu u = (vecu)vload(x + i), up = u + 0x7fff + (u >> 16 & 1);
        veci is_nan = (veci)((u & 0x7fffffff) > 0x7f800000u);
        vech h = __builtin_convertvector(((vecu)vselect(is_nan, (vec)(u | 0x400000), (vec)up)) >> 16, vech);
        memcpy((uint16_t *)(void *)out + i, &h, sizeof h);
    }
    for (; i < n; i++) ((bf16 *)(void *)out)[i] = bf16_from_f32(x[i]);
}

INLINE float absmax(const float *x, int64_t n)
{
    vec most = { 0 };
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vec a = (vec)((vecu)vload(x + i) & 0x7fffffff);
        most = vselect(a > most, a, most);
    }
    float m = vmaximum(most);
    for (; i < n; i++) m = __builtin_fabsf(x[i]) > m ? __builtin_fabsf(x[i]) : m;
    return m;
}

/* To the nearest E4M3 value, saturating: three bits after the leading one, above 2^-6; multiples of 2^-9
 * below, which adding 1.5 * 2^14 rounds to. */
INLINE vec vround_e4m3(vec x)
{
    vecu sign = (vecu)x & 0x80000000u, a = (vecu)x & 0x7fffffff;
    vec tiny = ((vec)a + vset(0x1.8p14f)) - vset(0x1.8p14f);
    vec normal = (vec)((a + 0x7ffff + (a >> 20 & 1)) & 0xfff00000u);
    normal = vselect(normal > vset(448), vset(448), normal);
    vec rounded = vselect((vec)a < vset(0x1p-6f), tiny, normal);
    return vselect(x != x, x, (vec)((vecu)rounded | sign));
}

static float round_fp8(float *out, const float *x, int64_t n)
{
    float m = absmax(x, n) / E4M3_MAX, least = 1.0f / (E4M3_MAX * 512), s = m > least ? m : least;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vstore(out + i, vround_e4m3(vload(x + i) / s));
    for (; i < n; i++) out[i] = vround_e4m3(vset(x[i] / s))[0];
    return s;
}

/* 16 columns, the first or the second of a record (kernels.h). */
INLINE void write_int8(uint32_t *out, const int8_t *codes, int half)
{
    static const uint8_t order[16] = { 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15 };
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) {
        ((int8_t *)(void *)(out + i / 4 * 2 + half))[i % 4] = codes[order[i]];
        sum += codes[i];
    }
    out[INT8_LESS + half] = (uint32_t)(-12 * sum);
}

#if defined(__AVX512F__)
INLINE void record_int8(uint32_t *out, __m512 a, __m512 b, __m512 inverse, float scale)
{
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    const __m256i pairs = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i p = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)),
            q = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
    __m256i codes = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtsepi32_epi8(p)),
                                            _mm512_cvtsepi32_epi8(q), 1);
    codes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(codes, order), pairs);
    _mm256_storeu_si256((__m256i *)(void *)out, codes);
    out[INT8_LESS] = (uint32_t)(-12 * _mm512_reduce_add_epi32(p));
    out[INT8_LESS + 1] = (uint32_t)(-12 * _mm512_reduce_add_epi32(q));
    memcpy(out + INT8_SCALE, &scale, 4);
    out[INT8_SCALE + 1] = 0;
}
#endif

static void round_int8(uint32_t *out, const float *x, int64_t n)
{
    int64_t c = 0;
#if defined(__AVX512F__)
    for (; c + INT8_GROUP <= n; c += INT8_GROUP, out += INT8_WORDS) {
        __m512 a = _mm512_loadu_ps(x + c), b = _mm512_loadu_ps(x + c + 16);
        float m = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        float scale = m < 0x1p-100f ? 0 : m / 127;
        record_int8(out, a, b, _mm512_set1_ps(m < 0x1p-100f ? 0 : 127 / m), scale);
    }
#endif
    for (; c < n; c += INT8_GROUP, out += INT8_WORDS) {
        int8_t codes[INT8_GROUP] = { 0 };
        float scale = int8_quantize_group(codes, x + c, n - c < INT8_GROUP ? n - c : INT8_GROUP);
        write_int8(out, codes, 0);
        write_int8(out, codes + 16, 1);
        memcpy(out + INT8_SCALE, &scale, 4);
        out[INT8_SCALE + 1] = 0;
    }
}

/* The codes of VL numbers times `inverse`, at most 127 in magnitude. */
INLINE void write_codes(int8_t *codes, const float *x, float inverse)
{
#if defined(__AVX512F__)
    __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
    _mm_storeu_si128((__m128i *)(void *)codes, _mm512_cvtepi32_epi8(code));
#elif defined(__AVX2__)
    __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(inverse)));
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64((__m128i *)(void *)codes, _mm_packs_epi16(words, words));
#else
    for (int i = 0; i < VL; i++) codes[i] = (int8_t)__builtin_rintf(x[i] * inverse);
#endif
}

/* Magnitudes are compared as integers, so that a NaN is the largest. */
static float quantize_int8(int8_t *codes, const float *x, int64_t n)
{
    veci top = { 0 };
    int32_t m = 0;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        veci a = (veci)vload(x + i) & 0x7fffffff;
        top = (veci)vselect(a > top, (vec)a, (vec)top);
    }
    for (int k = 0; k < VL; k++) m = top[k] > m ? top[k] : m;
    for (int64_t k = i; k < n; k++) {
        int32_t a = (int32_t)(f32_bits(x[k]) & 0x7fffffff);
        m = a > m ? a : m;
    }
    if (m >= 0x7f800000 || m < 0x0d800000)
        return int8_quantize_row(codes, x, n); /* not finite, under 2^-100 */
    float most = f32_from_bits((uint32_t)m), inverse = 127 / most;
    for (i = 0; i + VL <= n; i += VL) write_codes(codes + i, x + i, inverse);
    for (; i < n; i++) codes[i] = (int8_t)__builtin_rintf(x[i] * inverse);
    return most / 127;
}
#endif
