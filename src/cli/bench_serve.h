/* quench bench serve: what it was asked, and what it says of the answers. */
#ifndef CLI_BENCH_SERVE_H
#define CLI_BENCH_SERVE_H
#include "cli/flags.h"
#include "eval/load_metrics.h"
#include <jansson.h>

int bench_serve(int argc, char **argv); /* the words after "bench serve" */

/* Counters of speculative decoding, from /metrics. */
enum { SERVE_PLACES_MAX = 16 };
struct serve_counters {
    bool known;
    double drafts, draft_tokens, accepted, accepted_at[SERVE_PLACES_MAX];
};

struct serve_result {
    const char *backend, *label, *model, *tokenizer; /* label, tokenizer: NULL for none */
    const struct text_list *metadata;                /* "KEY=VALUE" */
    const char *metrics;                             /* "ttft,tpot,itl,e2el": those shown */
    double rate, burstiness;
    int64_t n, max_concurrency; /* 0: no limit */
    bool detailed;              /* every request in the JSON */
    struct load_metrics_options options;
    struct load_metrics sums;
    const struct load_answer *answers; /* [n] */
    struct serve_counters drafting;    /* during the run */
    char date[32];                     /* 20261128-181500 */
};
void serve_print(const struct serve_result *r);      /* the table of `vllm bench serve` */
json_t *serve_json(const struct serve_result *r);    /* its keys */
bool serve_knows_metric(const char *name, size_t n); /* a word of `metrics` */
/* Prometheus text; counters are summed over labels. */
struct serve_counters serve_counters_read(const char *text);
#endif
