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

bf16 fp8_pack_row(e4m3 *codes, const float *x, int64_t n)
{
    bf16 scale = bf16_from_f32(row_absmax(x, n) / E4M3_MAX);
    if (scale.bits == 0) scale = bf16_from_f32(0x1p-7f);
    float s = bf16_to_f32(scale);
    for (int64_t i = 0; i < n; i++) codes[i] = e4m3_from_f32(bf16_round(x[i] / s));
    return scale;
}

float fp8_quantize_activations(float *out, const float *x, int64_t n)
{
    float m = row_absmax(x, n) / E4M3_MAX, floor = 1.0f / (E4M3_MAX * 512);
    float s = m > floor ? m : floor;
    for (int64_t i = 0; i < n; i++) out[i] = e4m3_to_f32(e4m3_from_f32(x[i] / s));
    return s;
}
