#include "num/nvfp4.h"
#include "num/e2m1.h"
#include <float.h>
#include <math.h>

static float global_scale(float absmax, float top)
{
    float a = absmax > FLT_MIN ? absmax : FLT_MIN; /* BF16 and f32 share their smallest normal */
    float global = bf16_round(top * bf16_round(1.0f / a));
    return isfinite(global) ? global : 1.0f;
}

float nvfp4_global_scale(float absmax)
{
    return global_scale(absmax, E4M3_MAX * E2M1_MAX);
}

float nvfp4_global_scale_roomy(float absmax)
{
    return global_scale(absmax, 256 * E2M1_MAX);
}

/* Four maxima side by side: compilers keep them in a vector, which they may not do with one running fmaxf. */
static float group_absmax(const float *x)
{
    float m[4] = { 0 };
    for (int i = 0; i < NVFP4_GROUP; i += 4)
        for (int k = 0; k < 4; k++) m[k] = fabsf(x[i + k]) > m[k] ? fabsf(x[i + k]) : m[k];
    float a = m[0] > m[1] ? m[0] : m[1], b = m[2] > m[3] ? m[2] : m[3];
    return a > b ? a : b;
}

e4m3 nvfp4_group_scale(const float *x, float global)
{
    e4m3 s = e4m3_from_f32(global * bf16_round(group_absmax(x) / E2M1_MAX));
    return s.bits ? s : (e4m3){ 0x20 };
}

/* e2m1_from_f32 of 16 quotients as 32-bit lanes, without branches: the loop becomes vector compares. */
static void group_codes(uint8_t *codes, const float *x, float step)
{
    int32_t code[NVFP4_GROUP];
    for (int i = 0; i < NVFP4_GROUP; i++) {
        float q = x[i] / step, a = fabsf(q);
        code[i] = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) +
                  (a > 5.0f) + 8 * (q < 0);
    }
    for (int i = 0; i < NVFP4_GROUP / 2; i++) codes[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
}

void nvfp4_pack_row(uint8_t *codes, e4m3 *scale, const float *x, float global, int64_t n)
{
    for (int64_t g = 0; g < n / NVFP4_GROUP; g++, x += NVFP4_GROUP, codes += NVFP4_GROUP / 2) {
        scale[g] = nvfp4_group_scale(x, global);
        group_codes(codes, x, e4m3_to_f32(scale[g]) / global);
    }
}

void nvfp4_unpack_row(float *out, const uint8_t *codes, const e4m3 *scale, float global, int64_t n)
{
    for (int64_t g = 0; g < n / NVFP4_GROUP; g++, out += NVFP4_GROUP, codes += NVFP4_GROUP / 2) {
        float step = e4m3_to_f32(scale[g]) / global;
        for (int i = 0; i < NVFP4_GROUP / 2; i++) {
            out[2 * i] = e2m1_to_f32(codes[i] & 15) * step;
            out[2 * i + 1] = e2m1_to_f32(codes[i] >> 4) * step;
        }
    }
}

void nvfp4_quantize_activations(float *out, const float *x, float global, int64_t n)
{
    const float sixth = 1.0f / E2M1_MAX, inverse = 1.0f / global;
    for (; n > 0; n -= NVFP4_GROUP, x += NVFP4_GROUP, out += NVFP4_GROUP) {
        float rounded[NVFP4_GROUP];
        for (int i = 0; i < NVFP4_GROUP; i++) rounded[i] = bf16_round(x[i]);
        float scale = e4m3_to_f32(e4m3_from_f32(global * (group_absmax(rounded) * sixth)));
        float up = scale > 0 ? 1.0f / (scale * inverse) : 0, step = scale / global;
        for (int i = 0; i < NVFP4_GROUP; i++) out[i] = e2m1_round(rounded[i] * up) * step;
    }
}
