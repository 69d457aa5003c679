/* Reproducible inputs: BF16 values of either sign whose exponents spread over a range. */
#ifndef NUM_TESTS_RANDOM_H
#define NUM_TESTS_RANDOM_H
#include "num/bf16.h"
#include <math.h>
#include <stdint.h>

static inline uint32_t random_bits(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*seed >> 32);
}

/* Magnitudes 2^-octaves to 2, as many in each octave. */
static inline float random_bf16(uint64_t *seed, unsigned octaves)
{
    uint32_t r = random_bits(seed);
    float magnitude = ldexpf(1 + (float)(r >> 8 & 127) / 128, -(int)((r >> 16) % (octaves + 1)));
    return r & 1 ? -magnitude : magnitude;
}
#endif
