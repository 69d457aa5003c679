/* Activations as 8-bit integers: groups of 32 columns with one f32 scale each, what integer dot products
 * take; keys and values: rows with one. */
#ifndef NUM_INT8_H
#define NUM_INT8_H
#include <stdint.h>

enum { INT8_GROUP = 32 }; /* the last of a row may be shorter */

/* codes[i] = nearest integer (ties to even) to x[i] * (127 / m), m = max|x|, i < n; returns the scale m /
 * 127. Where m < 2^-100 all is 0. x: finite. */
float int8_quantize_group(int8_t *codes, const float *x, int64_t n);
/* The same of a whole row, which has one scale. x: any; where one is not finite the codes are 0 and the scale
 * is NaN, so that none gets lost. */
float int8_quantize_row(int8_t *codes, const float *x, int64_t n);
/* out[i] = code * scale in f32, group by group. out may be x. */
void int8_round_row(float *out, const float *x, int64_t n);
#endif
