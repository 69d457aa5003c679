/* What the second moments of one layer mean for its matrices: how much each column counts, and for GPTQ the
 * factor that passes errors on. */
#ifndef QUANTIZE_CURVATURE_H
#define QUANTIZE_CURVATURE_H
#include "quantize/moments.h"
#include "quantize/pack.h"

struct curvatures {
    struct moments moments;
    bool wants_factors;
    float *importance; /* [hidden] of the block, then [n_experts][inner] of down_proj */
    bool *factored;    /* [1 + n_experts] in the same order; false where the moments had no factor */
};

bool curvatures_init(struct curvatures *c, const struct config *config, bool wants_factors, struct err *e);
void curvatures_deinit(struct curvatures *c); /* accepts a zeroed one */
/* From the moments of a layer, which factors replace. */
void curvatures_update(struct curvatures *c, struct pool *pool);
/* Of an expert's matrix of the layer that was updated last; borrows. */
struct curvature curvatures_of(const struct curvatures *c, const struct matrix *m);
#endif
