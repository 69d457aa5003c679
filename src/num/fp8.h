/* FP8 W8A8: E4M3 weights with one BF16 scale per output row; activations quantized per token at run time.
 * Source: compressed-tensors, format "float-quantized", preset FP8_DYNAMIC; vLLM csrc/quantization/w8a8/fp8.
 */
#ifndef NUM_FP8_H
#define NUM_FP8_H
#include "num/bf16.h"
#include "num/e4m3.h"
#include <stdint.h>

/* One weight row. x: f32 [n] (values of BF16 weights). Returns the row's scale, bf(absmax / 448), or 2^-7 for
 * a row of zeros; codes: e4m3(bf(x / scale)), saturating; the inner rounding is the reference tool's. */
bf16 fp8_pack_row(e4m3 *codes, const float *x, int64_t n);

/* One activation row, in place of x: out[i] = e4m3(x[i] / scale) as f32 (unscaled); returns
 * scale = max(absmax / 448, 1 / (448 * 512)). */
float fp8_quantize_activations(float *out, const float *x, int64_t n);
#endif
