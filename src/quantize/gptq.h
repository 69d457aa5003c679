/* Rounding that makes later columns of a row pay for the errors of earlier ones. With the second moments H of
 * a matrix's inputs, an error e in a row of weights costs e H e^T on its output. H = R R^T with R upper
 * triangular turns that into a sum over columns i of R_ii^2 (e_i + sum over j < i of e_j R_ji / R_ii)^2: so
 * column i is rounded towards w_i + sum over j < i of e_j R_ji / R_ii. The same choice as GPTQ's, which works
 * with the inverse. Source: Frantar et al., arXiv 2210.17323; Chee et al., arXiv 2307.13304 (this form). Here
 * the scale of each group is chosen when its turn comes, by what it does to this sum (search.h). */
#ifndef QUANTIZE_GPTQ_H
#define QUANTIZE_GPTQ_H
#include "num/e4m3.h"
#include <stdbool.h>
#include <stdint.h>

enum { GPTQ_ROWS = 16 };   /* rows worked on together */
#define GPTQ_DAMPING 0.01f /* of the mean of the diagonal, added to it */

/* In place. h: [n][n], upper triangle filled, any positive factor. GPTQ_DAMPING is added
 * first, which also takes care of columns whose input was always zero. Afterwards row i holds R_ji / R_ii at
 * j < i and R_ii^2, scaled to a mean of about 1, at j = i. False: H is zero, not finite or not positive
 * definite. */
bool gptq_factor(float *h, int64_t n);

/* Packs up to GPTQ_ROWS rows. codes, scale: rows one behind the other, as nvfp4_pack_row has them. x:
 * [rows][n]. factor: gptq_factor's. scratch: [2][n][GPTQ_ROWS] floats. */
void gptq_pack_rows(uint8_t *codes, e4m3 *scale, const float *x, int rows, const float *factor, float global,
                    int64_t n, float *scratch);

/* sum of a[k] * b[k] in double, in eight lanes of fixed order. */
double gptq_dot(const float *a, const float *b, int64_t n);
#endif
