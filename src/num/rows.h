/* What packing does to rows of weights, for each instruction set: the bytes and bits of nvfp4.c and fp8.c,
 * which say what is meant, from vector code. n is a row's length; sums are exact to the bit too, because
 * every set adds in the same order. */
#ifndef NUM_ROWS_H
#define NUM_ROWS_H
#include "num/bf16.h"
#include "num/e4m3.h"
#include <stdint.h>

struct row_kernels {
    const char *name;
    /* Bits of the largest magnitude of n BF16 numbers at any alignment: above 0x7f80 where one is NaN, 0x7f80
     * where one is infinite, 0 for none. */
    uint16_t (*absmax)(const void *bf16s, int64_t n);
    /* out: f32 [n]. bf16s: at any alignment. Exact. */
    void (*widen)(float *out, const void *bf16s, int64_t n);
    /* nvfp4_pack_row of n finite BF16 numbers at any alignment, n % 16 == 0, 2^-7 <= global <= 2^40, and what
     * it cost: sums as squares() has them, but in f32 over 512 columns at a time, elements 2i and 2i + 1 as
     * one to the (i mod 8)-th of eight. */
    void (*nvfp4_nearest)(uint8_t *codes, e4m3 *scale, double sums[2], const void *bf16s, float global,
                          int64_t n);
    /* nvfp4_unpack_row; n % 16 == 0. */
    void (*nvfp4_unpack)(float *out, const uint8_t *codes, const e4m3 *scale, float global, int64_t n);
    /* fp8_pack, and its way back: out[i] = e4m3(codes[i]) * scale. */
    void (*fp8_pack)(e4m3 *codes, const float *x, int64_t n, bf16 scale);
    void (*fp8_unpack)(float *out, const e4m3 *codes, bf16 scale, int64_t n);
    /* sums[0] = sum of (w - packed)^2, sums[1] = sum of w^2, in double: element i to the (i mod 8)-th of
     * eight sums, these in order. */
    void (*squares)(double sums[2], const float *w, const float *packed, int64_t n);
};

extern const struct row_kernels row_kernels_generic, row_kernels_avx2;

enum rows_isa { ROWS_BEST, ROWS_GENERIC }; /* the best that the machine has; what every machine has */
const struct row_kernels *rows_select(enum rows_isa isa);
#endif
