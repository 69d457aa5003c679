/* IEEE binary16, as found in some re-exported checkpoints; widened when loaded, never written. */
#ifndef NUM_F16_H
#define NUM_F16_H
#include "num/bf16.h"

/* Exact. */
static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return f32_from_bits(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return f32_from_bits(sign | ((rest << 13) + (112u << 23)));
    float magnitude = (float)rest * 0x1p-24f;
    return f32_from_bits(sign | f32_bits(magnitude));
}
#endif
