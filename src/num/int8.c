#include "num/int8.h"
#include <math.h>
#include <stdbool.h>
#include <string.h>

float int8_quantize_group(int8_t *codes, const float *x, int64_t n)
{
    float m = 0;
    for (int64_t i = 0; i < n; i++) m = fabsf(x[i]) > m ? fabsf(x[i]) : m;
    float inverse = m < 0x1p-100f ? 0 : 127 / m;
    for (int64_t i = 0; i < n; i++) codes[i] = (int8_t)rintf(x[i] * inverse);
    return m < 0x1p-100f ? 0 : m / 127;
}

float int8_quantize_row(int8_t *codes, const float *x, int64_t n)
{
    bool finite = true;
    for (int64_t i = 0; i < n; i++) finite = finite && isfinite(x[i]);
    if (finite) return int8_quantize_group(codes, x, n);
    memset(codes, 0, (size_t)n);
    return NAN;
}

void int8_round_row(float *out, const float *x, int64_t n)
{
    int8_t codes[INT8_GROUP];
    for (int64_t c = 0; c < n; c += INT8_GROUP) {
        int64_t here = n - c < INT8_GROUP ? n - c : INT8_GROUP;
        float scale = int8_quantize_group(codes, x + c, here);
        for (int64_t i = 0; i < here; i++) out[c + i] = (float)codes[i] * scale;
    }
}
