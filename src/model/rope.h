/* Rotary positions: inverse frequencies and what cosine and sine are multiplied by, YaRN's where the
 * configuration asks for it (Peng et al., arXiv 2309.00071, in the form of transformers,
 * modeling_rope_utils.py: floor and ceil of the ramp's ends, 0.1 ln(factor) + 1). */
#ifndef MODEL_ROPE_H
#define MODEL_ROPE_H
#include "checkpoint/config.h"

void rope_inverse(float *inverse, const struct config *c); /* [rotary_dim / 2] */
float rope_scale(const struct config *c);
#endif
