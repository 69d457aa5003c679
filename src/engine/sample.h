/* The next token from logits. Order as in vLLM: temperature, min-p, top-k (ties with the k-th stay), top-p,
 * draw; num/draw.h says it exactly. temperature under 1e-5 means greedy. The generator is counter based: draw
 * number `counter` of a seed is the same whatever else runs. */
#ifndef ENGINE_SAMPLE_H
#define ENGINE_SAMPLE_H
#include "base/err.h"
#include "num/draw.h"
#include "tokenizer/tokenizer.h"

struct sampling {
    float temperature; /* 0: greedy */
    int top_k;         /* 0: off */
    float top_p;       /* 0 or 1: off */
    float min_p;       /* 0: off; of the most likely token's probability */
    uint64_t seed;
};
bool sampling_check(const struct sampling *s, struct err *e); /* ranges, with the flag's name */

/* What the backend's `draw` takes. */
struct draw sampling_draw(const struct sampling *s, uint64_t counter);
/* The same draw from a row in host memory. allowed: bits as in num/draw.h. */
int32_t sample_token(const struct sampling *s, const float *logits, int64_t n_vocab, uint64_t counter,
                     const uint32_t *allowed);
/* Uniform in [0, 1), a function of its two arguments only. */
double sample_uniform(uint64_t seed, uint64_t counter);

/* Bits of the tokens that may be sampled: those that have a text (rows of the head beyond the tokenizer's
 * entries hold ordinary logits), but for `never`. The caller frees *out. */
bool sampled_tokens(uint32_t **out, const struct tokenizer *t, int64_t n_vocab, const int32_t *never,
                    int n_never, struct err *e);
#endif
