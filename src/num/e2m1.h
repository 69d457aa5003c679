/* OCP FP4 E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (bit 3); no infinity, no NaN. One code in the
 * low four bits of a byte. */
#ifndef NUM_E2M1_H
#define NUM_E2M1_H
#include "num/bf16.h"

#define E2M1_MAX 6.0f

static inline float e2m1_to_f32(uint8_t code)
{
    static const float value[16] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6 };
    return value[code & 15];
}

/* Nearest, ties to the even mantissa, saturating at 6; a negative that rounds to zero is code 8; an exact
 * zero of either sign is code 0, as compressed-tensors writes it. x is not NaN. */
static inline uint8_t e2m1_from_f32(float x)
{
    float a = x < 0 ? -x : x;
    unsigned code =
        (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return (uint8_t)(code | (x < 0 ? 8 : 0));
}

/* The value that code stands for, without branches: loops of it become vector instructions. */
static inline float e2m1_round(float x)
{
    float a = x < 0 ? -x : x;
    int halves = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + 2 * ((a > 2.5f) + (a >= 3.5f)) +
                 4 * (a > 5.0f);
    return x < 0 ? -0.5f * (float)halves : 0.5f * (float)halves;
}
#endif
