/* BF16: the upper half of an IEEE f32. C and CUDA share this file. */
#ifndef NUM_BF16_H
#define NUM_BF16_H
#include <stdint.h>
#include <string.h>

typedef struct {
    uint16_t bits;
} bf16;

static inline uint32_t f32_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float f32_from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float bf16_to_f32(bf16 x)
{
    return f32_from_bits((uint32_t)x.bits << 16);
}

/* Nearest even; overflow goes to infinity; NaN stays NaN (made quiet). */
static inline bf16 bf16_from_f32(float x)
{
    uint32_t u = f32_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16){ (uint16_t)(u >> 16 | 0x40) };
    return (bf16){ (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16) };
}

/* x rounded to BF16, as f32. */
static inline float bf16_round(float x)
{
    return bf16_to_f32(bf16_from_f32(x));
}
#endif
