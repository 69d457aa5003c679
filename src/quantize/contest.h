/* Whether passing errors on pays in a layer: a few rows of every expert matrix are packed with and without it
 * from the moments of most samples, and judged by what their errors do to outputs on samples that were held
 * out. The other methods do not take part: mse tries the scales of nearest and four-over-six too. */
#ifndef QUANTIZE_CONTEST_H
#define QUANTIZE_CONTEST_H
#include "quantize/curvature.h"

struct contest {
    struct curvatures trial; /* of the samples that are not held out */
    struct moments held;     /* of those that are: summed by the calibration */
};

/* An expert's matrix of the layer. */
struct contestant {
    const struct matrix *matrix;
    float absmax; /* joint, as packer_run takes it */
};

/* Of a layer: errors are passed on or not, gate_proj and up_proj together since they share a scale. */
struct contest_result {
    bool block, down;
};

/* Samples held out of n: an eighth, at least one of two. */
int64_t contest_held(int64_t n);
bool contest_init(struct contest *c, const struct config *config, struct err *e);
void contest_deinit(struct contest *c); /* accepts a zeroed one */
/* moments: of the samples not held out; afterwards of all. */
bool contest_run(struct contest_result *out, struct contest *c, struct moments *moments,
                 const struct contestant *contestants, int64_t n, struct pool *pool, struct err *e);
#endif
