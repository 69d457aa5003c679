/* Perplexity of a text by the card's rule, alone or against another model on the same chunks.
 * Rule "card": the whole text is tokenized once, nothing added; consecutive chunks of `ctx` tokens; a last
 * short chunk counts if it has two tokens; each chunk starts from nothing; its first token is not scored;
 * perplexity = exp(-sum of log-probabilities / scored tokens). Source: docs/quality.md. */
#ifndef EVAL_PERPLEXITY_H
#define EVAL_PERPLEXITY_H
#include "engine/engine.h"

struct perplexity_options {
    int64_t ctx;        /* 0: 512 */
    int64_t max_chunks; /* 0: all */
    enum kv_dtype kv;
    const struct report *report;
};

struct perplexity_result {
    int64_t tokens, chunks, scored;
    double nll, perplexity; /* nll: the sum, in nats */
    double seconds;
};

/* Of `other` against `model`: the first is the base, its perplexity the denominator. */
struct comparison {
    struct perplexity_result base, other;
    double delta, ratio;          /* other - base; other / base */
    double ratio_low, ratio_high; /* 95 %, paired over chunks */
    double kld;                   /* mean KL(base || other), nats a scored token */
    double same_top;              /* share of scored positions with the same most likely token */
};

/* What either needs of an engine for each model. */
struct engine_options perplexity_engine(int64_t ctx, enum kv_dtype kv);
bool perplexity_run(struct perplexity_result *r, struct model *m, const int32_t *tokens, int64_t n,
                    const struct perplexity_options *o, struct err *e);
bool perplexity_compare(struct comparison *c, struct model *base, struct model *other, const int32_t *tokens,
                        int64_t n, const struct perplexity_options *o, struct err *e);
/* How many chunks and scored positions n tokens make. */
void perplexity_count(int64_t n, int64_t ctx, int64_t max_chunks, int64_t *chunks, int64_t *scored);
#endif
