/* FP8 W8A8: E4M3 weights with a BF16 scale per output row, per matrix or per block of 128 x 128; activations
 * quantized per token, with one fixed scale, or per token and 128 columns. Source: compressed-tensors, format
 * "float-quantized", presets FP8_DYNAMIC, FP8 and FP8_BLOCK; vLLM csrc/quantization/w8a8/fp8. */
#ifndef NUM_FP8_H
#define NUM_FP8_H
#include "num/bf16.h"
#include "num/e4m3.h"
#include <stdint.h>

enum { FP8_BLOCK = 128 }; /* rows and columns of a weight block; columns of an input group */
static inline int64_t fp8_blocks(int64_t n) /* the last one may be ragged */
{
    return n / FP8_BLOCK + (n % FP8_BLOCK != 0);
}

/* The scale of weights whose largest magnitude this is: bf(absmax / 448), 2^-7 where that is zero. */
bf16 fp8_scale(float absmax);
/* codes[i] = e4m3(bf(x[i] / scale)), saturating; the inner rounding is the reference tool's. x: values of
 * BF16 weights. */
void fp8_pack(e4m3 *codes, const float *x, int64_t n, bf16 scale);
/* One weight row. x: f32 [n] (values of BF16 weights). Returns the row's fp8_scale. */
bf16 fp8_pack_row(e4m3 *codes, const float *x, int64_t n);

/* One activation row, in place of x: out[i] = e4m3(x[i] / scale) as f32 (unscaled); returns
 * scale = max(absmax / 448, 1 / (448 * 512)). */
float fp8_quantize_activations(float *out, const float *x, int64_t n);
/* Each 128 columns (the last group may be shorter) by a scale of their own: out[i] = e4m3(x[i] / s) * s, s =
 * max(absmax, 1e-10) / 448. out may be x. */
void fp8_round_groups(float *out, const float *x, int64_t n);
/* All by one: out[i] = e4m3(x[i] / scale) * scale, saturating. out may be x. */
void fp8_round_fixed(float *out, const float *x, int64_t n, float scale);
#endif
