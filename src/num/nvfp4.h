/* NVFP4: rows of E2M1 codes in groups of 16 with one E4M3 scale each, and one f32 scale per matrix that
 * divides. w = e2m1(code) * (e4m3(scale) / global) Code of column 2j sits in the low nibble of byte j, 2j + 1
 * in the high one. Source: compressed-tensors, format "nvfp4-pack-quantized"; llm-compressor observers. */
#ifndef NUM_NVFP4_H
#define NUM_NVFP4_H
#include "num/bf16.h"
#include "num/e4m3.h"
#include <stdint.h>

enum { NVFP4_GROUP = 16 };

/* The products and quotients below are rounded to BF16 where the reference tool's tensors are BF16, so that a
 * file made here can be compared with one of its byte for byte; exact f32 would be no better
 * (docs/numerics.md). */

/* 2688 / absmax, what maps the largest weight to 448 * 6, as bf(2688 * bf(1 / absmax)). absmax >= 0 and
 * finite; 1.0 where the quotient overflows (an all-zero matrix). */
float nvfp4_global_scale(float absmax);

/* 1536 / absmax: like it, but the group of the largest weight has room for scales up to 1.75 times the
 * nearest method's. For scales that are searched. */
float nvfp4_global_scale_roomy(float absmax);

/* Nearest codes for one row. x: f32 [n] (values of BF16 weights), n % 16 == 0. codes: n/2 bytes. scale:
 * [n/16]. Group scale: e4m3(global * bf(m / 6)), m the group's absmax; a zero becomes 0.125 (byte 0x20). */
void nvfp4_pack_row(uint8_t *codes, e4m3 *scale, const float *x, float global, int64_t n);

/* The scale such a row gives a group of 16. */
e4m3 nvfp4_group_scale(const float *x, float global);

/* One row of activations as FP4 tensor cores read it, as f32 again. With bf(x) in groups of 16, m a group's
 * absmax: S = e4m3(global * (m * (1 / 6))), code = e2m1(bf(x) * (1 / (S * (1 / global)))), out = code * (S /
 * global); a group whose S is 0 becomes zeros. global > 0; n % 16 == 0; out may be x. Each operation is an
 * f32 one, 1 / a rounded to nearest where the hardware's rcp.approx may be off by one unit. Source: vLLM,
 * csrc/quantization/fp4. */
void nvfp4_quantize_activations(float *out, const float *x, float global, int64_t n);

/* Unpacks n weights of one row. codes: n/2 bytes. scale: [n/16]. global > 0, divides. Cannot fail. */
void nvfp4_unpack_row(float *out, const uint8_t *codes, const e4m3 *scale, float global, int64_t n);
#endif
