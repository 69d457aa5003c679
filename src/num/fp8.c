#include "num/fp8.h"
#include <math.h>

/* Sixteen maxima side by side: compilers keep them in vectors, which they may not do with one running fmaxf.
 */
static float row_absmax(const float *x, int64_t n)
{
    enum { LANES = 16 };
    float m[LANES] = { 0 };
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) m[k] = fabsf(x[i + k]) > m[k] ? fabsf(x[i + k]) : m[k];
    for (; i < n; i++) m[0] = fabsf(x[i]) > m[0] ? fabsf(x[i]) : m[0];
    for (int k = 1; k < LANES; k++) m[0] = m[k] > m[0] ? m[k] : m[0];
    return m[0];
}

bf16 fp8_scale(float absmax)
{
    bf16 scale = bf16_from_f32(absmax / E4M3_MAX);
    return scale.bits ? scale : bf16_from_f32(0x1p-7f);
}

void fp8_pack(e4m3 *codes, const float *x, int64_t n, bf16 scale)
{
    float s = bf16_to_f32(scale);
    for (int64_t i = 0; i < n; i++) codes[i] = e4m3_from_f32(bf16_round(x[i] / s));
}

bf16 fp8_pack_row(e4m3 *codes, const float *x, int64_t n)
{
    bf16 scale = fp8_scale(row_absmax(x, n));
    fp8_pack(codes, x, n, scale);
    return scale;
}

/* Without the scale. */
static void quantize(float *out, const float *x, int64_t n, float scale)
{
    for (int64_t i = 0; i < n; i++) out[i] = e4m3_to_f32(e4m3_from_f32(x[i] / scale));
}

float fp8_quantize_activations(float *out, const float *x, int64_t n)
{
    float m = row_absmax(x, n) / E4M3_MAX, floor = 1.0f / (E4M3_MAX * 512);
    float s = m > floor ? m : floor;
    quantize(out, x, n, s);
    return s;
}

void fp8_round_fixed(float *out, const float *x, int64_t n, float scale)
{
    quantize(out, x, n, scale);
    for (int64_t i = 0; i < n; i++) out[i] *= scale;
}

void fp8_round_groups(float *out, const float *x, int64_t n)
{
    for (int64_t c = 0; c < n; c += FP8_BLOCK) {
        int64_t k = n - c < FP8_BLOCK ? n - c : FP8_BLOCK;
        float m = row_absmax(x + c, k);
        fp8_round_fixed(out + c, x + c, k, (m > 1e-10f ? m : 1e-10f) / E4M3_MAX);
    }
}
