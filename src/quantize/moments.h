/* Second moments of the routed experts' inputs in one layer: what an error in a weight costs at the output.
 * Upper triangles (backend/ops.h); what is below is unspecified. */
#ifndef QUANTIZE_MOMENTS_H
#define QUANTIZE_MOMENTS_H
#include "base/err.h"
#include <stdint.h>

struct moments {
    int n_experts;
    int64_t hidden, inner;
    float *block; /* [hidden][hidden] of gate_proj's and up_proj's input, shared by all experts */
    float *down;  /* [n_experts][inner][inner] of down_proj's input */
};

bool moments_init(struct moments *m, int n_experts, int64_t hidden, int64_t inner, struct err *e);
uint64_t moments_block_bytes(const struct moments *m);
uint64_t moments_down_bytes(const struct moments *m);
void moments_deinit(struct moments *m); /* accepts a zeroed one */
static inline float *moments_down(const struct moments *m, int expert)
{
    return m->down + expert * m->inner * m->inner;
}

/* Of the same shape. */
void moments_copy(struct moments *to, const struct moments *from);
void moments_join(struct moments *to, const struct moments *from); /* to += from */
#endif
