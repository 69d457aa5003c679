/* Second moments of the routed experts' inputs in one layer: what an error in a weight costs at the output.
 */
#ifndef QUANTIZE_MOMENTS_H
#define QUANTIZE_MOMENTS_H
#include "base/pool.h"
#include <stdint.h>

struct moments {
    int n_experts;
    int64_t hidden, inner;
    float *block; /* [hidden][hidden] of gate_proj's and up_proj's input, shared by all experts */
    float *down;  /* [n_experts][inner][inner] of down_proj's input */
};

bool moments_init(struct moments *m, int n_experts, int64_t hidden, int64_t inner, struct err *e);
void moments_clear(struct moments *m);
void moments_deinit(struct moments *m); /* accepts a zeroed one */
static inline float *moments_down(const struct moments *m, int expert)
{
    return m->down + expert * m->inner * m->inner;
}

/* Of the same shape. */
void moments_copy(struct moments *to, const struct moments *from);
void moments_join(struct moments *to, const struct moments *from); /* to += from */

/* h[i][j] += sum over rows r of x[r][i] * x[r][j], for j >= i at least; what is below is unspecified. h:
 * [n][n]; x: [rows][n]. The same bits for any number of threads. */
void moments_add(float *h, const float *x, int64_t rows, int64_t n, struct pool *pool);
#endif
