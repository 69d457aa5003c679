#include "num/fp8.h"
#include <math.h>

static float row_absmax(const float *x, int64_t n)
{
    float m = 0;
    for (int64_t i = 0; i < n; i++) m = fmaxf(m, fabsf(x[i]));
    return m;
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
