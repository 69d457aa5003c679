#include "engine/sample.h"
#include <math.h>
#include <stdlib.h>

bool sampling_check(const struct sampling *s, struct err *e)
{
    if (!(s->temperature >= 0 && s->temperature <= 100))
        return err_set(e, ERR_ARGUMENT, "--temperature: expected 0 to 100, found %g", (double)s->temperature);
    if (s->top_k < 0) return err_set(e, ERR_ARGUMENT, "--top-k: expected 0 or more, found %d", s->top_k);
    if (!(s->top_p >= 0 && s->top_p <= 1))
        return err_set(e, ERR_ARGUMENT, "--top-p: expected 0 to 1, found %g", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return err_set(e, ERR_ARGUMENT, "--min-p: expected 0 to 1, found %g", (double)s->min_p);
    return true;
}

/* splitmix64's finaliser over seed and counter. Source: Steele, Lea, Flood, "Fast splittable pseudorandom
 * number generators", OOPSLA 2014. */
double sample_uniform(uint64_t seed, uint64_t counter)
{
    uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

struct draw sampling_draw(const struct sampling *s, uint64_t counter)
{
    if (s->temperature < 1e-5f) return (struct draw){ 0 };
    float reach = s->min_p > 0 ? -logf(s->min_p) : DRAW_REACH;
    return (struct draw){ .scale = 1 / s->temperature,
                          .reach = reach < DRAW_REACH ? reach : DRAW_REACH,
                          .top_k = s->top_k,
                          .top_p = s->top_p,
                          .uniform = sample_uniform(s->seed, counter) };
}

int32_t sample_token(const struct sampling *s, const float *logits, int64_t n_vocab, uint64_t counter,
                     const uint32_t *allowed)
{
    struct draw d = sampling_draw(s, counter);
    return draw_token(&d, logits, n_vocab, allowed);
}

bool sampled_tokens(uint32_t **out, const struct tokenizer *t, int64_t n_vocab, const int32_t *never,
                    int n_never, struct err *e)
{
    size_t words = (size_t)(n_vocab + 31) / 32, n;
    uint32_t *allowed = *out = calloc(words, sizeof *allowed);
    if (!allowed) return err_memory(e, "vocabulary", words * sizeof *allowed);
    for (int32_t id = 0; id < n_vocab; id++) {
        tokenizer_bytes(t, id, &n);
        if (n > 0) allowed[id / 32] |= 1u << id % 32;
    }
    for (int i = 0; i < n_never; i++)
        if (never[i] >= 0 && never[i] < n_vocab) allowed[never[i] / 32] &= ~(1u << never[i] % 32);
    return true;
}
