/* What scoring the result against its source on one text gave. The measuring is not done here: quantize_run's
 * caller hands the numbers in. */
#ifndef QUANTIZE_EVALUATION_H
#define QUANTIZE_EVALUATION_H
#include <stdint.h>

struct evaluation {
    const char *text;     /* path; borrow */
    const char *kv_cache; /* "f32"; borrow */
    int64_t ctx, tokens, chunks, scored;
    double source_perplexity, perplexity;
    double ratio, ratio_low, ratio_high; /* of the two; 95 %, paired over chunks */
    double kld, same_top;                /* nats a token; share of scored positions */
};
#endif
