/* OCP FP8 E4M3 ("e4m3fn"): bias 7, max 448, no infinity, NaN = 0x7f and 0xff. */
#ifndef NUM_E4M3_H
#define NUM_E4M3_H
#include "num/bf16.h"

#define E4M3_MAX 448.0f

typedef struct {
    uint8_t bits;
} e4m3;

/* Exact. */
static inline float e4m3_to_f32(e4m3 x)
{
    uint32_t sign = (uint32_t)(x.bits & 0x80) << 24, rest = x.bits & 0x7f;
    if (rest == 0x7f) return f32_from_bits(sign | 0x7fc00000u);
    if (rest >= 8) return f32_from_bits(sign | ((rest << 20) + (120u << 23)));
    return f32_from_bits(sign | f32_bits((float)rest * 0x1p-9f));
}

/* Nearest even, saturating at 448 (infinities too); NaN stays NaN. Source: OCP 8-bit floating point
 * specification 1.0, conversion with saturation; what cvt.rn.satfinite.e4m3x2.f32 does. */
static inline e4m3 e4m3_from_f32(float x)
{
    uint32_t u = f32_bits(x), a = u & 0x7fffffffu;
    uint8_t sign = (uint8_t)(u >> 24 & 0x80);
    if (a > 0x7f800000u) return (e4m3){ (uint8_t)(sign | 0x7f) };
    if (a >= 0x43e00000u) return (e4m3){ (uint8_t)(sign | 0x7e) }; /* 448 and above */
    if (a < 0x3c800000u) { /* under 2^-6: multiples of 2^-9; adding 1.5 * 2^14 rounds at exactly that bit */
        float code = f32_from_bits(a) + 0x1.8p14f;
        return (e4m3){ (uint8_t)(sign | (f32_bits(code) & 0x0f)) };
    }
    uint32_t code = ((a + 0x7ffffu + (a >> 20 & 1)) >> 20) - (120u << 3);
    return (e4m3){ (uint8_t)(sign | (code < 0x7e ? code : 0x7e)) };
}
#endif
