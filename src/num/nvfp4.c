#include "num/nvfp4.h"
#include "num/e2m1.h"
#include <float.h>
#include <math.h>

float nvfp4_global_scale(float absmax)
{
    float a = absmax > FLT_MIN ? absmax : FLT_MIN; /* BF16 and f32 share their smallest normal */
    float global = bf16_round(E4M3_MAX * E2M1_MAX * bf16_round(1.0f / a));
    return isfinite(global) ? global : 1.0f;
}

static float group_absmax(const float *x)
{
    float m = 0;
    for (int i = 0; i < NVFP4_GROUP; i++) m = fmaxf(m, fabsf(x[i]));
    return m;
}

static e4m3 group_scale(float absmax, float global)
{
    e4m3 s = e4m3_from_f32(global * bf16_round(absmax / E2M1_MAX));
    return s.bits ? s : (e4m3){ 0x20 };
}

void nvfp4_pack_row(uint8_t *codes, e4m3 *scale, const float *x, float global, int64_t n)
{
    for (int64_t g = 0; g < n / NVFP4_GROUP; g++, x += NVFP4_GROUP, codes += NVFP4_GROUP / 2) {
        scale[g] = group_scale(group_absmax(x), global);
        float step = e4m3_to_f32(scale[g]) / global;
        for (int i = 0; i < NVFP4_GROUP / 2; i++) {
            unsigned low = e2m1_from_f32(x[2 * i] / step), high = e2m1_from_f32(x[2 * i + 1] / step);
            codes[i] = (uint8_t)(low | high << 4);
        }
    }
}

void nvfp4_unpack_row(float *out, const uint8_t *codes, const e4m3 *scale, float global, int64_t n)
{
    for (int64_t i = 0; i < n; i += 2) {
        float step = e4m3_to_f32(scale[i / NVFP4_GROUP]) / global;
        out[i] = e2m1_to_f32(codes[i / 2] & 15) * step;
        out[i + 1] = e2m1_to_f32(codes[i / 2] >> 4) * step;
    }
}
