/* What the answers of a load amount to, in the terms and by the rules of `vllm bench serve`. */
#ifndef EVAL_LOAD_METRICS_H
#define EVAL_LOAD_METRICS_H
#include "eval/load_stream.h"

enum { LOAD_PERCENTILES_MAX = 16 };

/* Seconds; zero where there were no values. */
struct load_summary {
    double mean, median, deviation; /* deviation: of the population */
    double percentiles[LOAD_PERCENTILES_MAX];
};

/* Seconds; INFINITY: no goal. */
struct load_goals {
    double ttft, tpot, e2el;
    bool any;
};

struct load_metrics_options {
    double duration;
    double percentiles[LOAD_PERCENTILES_MAX]; /* 0 to 100 */
    int n_percentiles;
    struct load_goals goals;
};

/* Of answers that are ok, but for `failed`. */
struct load_metrics {
    int64_t completed, failed, good; /* good: met every goal */
    int64_t input_tokens, output_tokens;
    struct load_summary ttft, e2el;
    struct load_summary tpot;   /* (latency - ttft) / (output_tokens - 1), of answers of more than one */
    struct load_summary itl;    /* over all gaps of all answers */
    struct load_summary queued; /* here, by max_concurrency */
    double peak_tokens;         /* events in the fullest second, seconds counted from the first start */
    int64_t peak_requests;      /* at one moment */
};
bool load_metrics(struct load_metrics *m, const struct load_answer *answers, int64_t n,
                  const struct load_metrics_options *o, struct err *e);

/* x is sorted by it. Percentiles interpolate linearly between the two nearest ranks, as numpy's do. */
void load_summarize(struct load_summary *s, double *x, int64_t n, const double *percentiles,
                    int n_percentiles);
#endif
