/* The next token from logits. Order as in vLLM: temperature, min-p, top-k (ties with the k-th stay), top-p,
 * draw. temperature under 1e-5 means greedy. The generator is counter based: draw number `counter` of a seed
 * is the same whatever else runs. */
#ifndef ENGINE_SAMPLE_H
#define ENGINE_SAMPLE_H
#include "base/err.h"
#include <stdint.h>

struct sampling {
    float temperature; /* 0: greedy */
    int top_k;         /* 0: off */
    float top_p;       /* 0 or 1: off */
    float min_p;       /* 0: off; of the most likely token's probability */
    uint64_t seed;
};
bool sampling_check(const struct sampling *s, struct err *e); /* ranges, with the flag's name */

struct candidate {
    float logit;
    int32_t id;
};
/* work: [n_vocab]. banned(ctx, id) true: never sampled; NULL: all allowed. Logits may hold -inf, which are
 * never sampled either. -1: there is no other. */
int32_t sample_token(const struct sampling *s, const float *logits, int64_t n_vocab, uint64_t counter,
                     struct candidate *work, bool (*banned)(void *ctx, int32_t id), void *ctx);
/* Uniform in [0, 1), a function of its two arguments only. */
double sample_uniform(uint64_t seed, uint64_t counter);
#endif
