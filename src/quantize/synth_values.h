/* Random tensor contents that a network of this family could have: weights N(0, 0.02), norms near their
 * neutral value, decays and time steps in the ranges that training starts from, routers with popular experts,
 * NVFP4 codes with group scales, and FP8 codes with row scales, as packing such weights would give. A value
 * is a function of the seed, the tensor's name and the element's number alone. */
#ifndef QUANTIZE_SYNTH_VALUES_H
#define QUANTIZE_SYNTH_VALUES_H
#include "base/err.h"
#include "base/pool.h"
#include "checkpoint/safetensors.h"

struct synth_values; /* tables of quantiles, 65,536 a kind */
bool synth_values_create(struct synth_values **out, uint64_t seed, struct err *e);
void synth_values_free(struct synth_values *v); /* NULL is fine */

/* Bytes [first, first + bytes) of the tensor, from its name, dtype and shape. first % 8 == 0. BF16, U8 (two
 * E2M1 codes), F8_E4M3 and F32 (one number a matrix). Cannot fail; pool NULL: this thread alone. */
void synth_values_fill(const struct synth_values *v, void *out, const struct tensor *t, uint64_t first,
                       uint64_t bytes, struct pool *pool);
/* Whether its values are N(0, 0.02) like those of any other weight matrix. */
bool synth_values_are_weights(const struct tensor *t);
#endif
