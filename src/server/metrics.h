/* What a server has done, as Prometheus text under the names vLLM gives them. Loop's thread only. */
#ifndef SERVER_METRICS_H
#define SERVER_METRICS_H
#include "server/api.h"
#include <stdio.h>

enum { HISTOGRAM_BUCKETS_MAX = 24 };

struct histogram {
    const double *bounds; /* upper ones, ascending */
    int n_bounds;
    uint64_t counts[HISTOGRAM_BUCKETS_MAX + 1];
    double sum;
};
void histogram_observe(struct histogram *h, double value, uint64_t times);

enum metrics_finish {
    METRICS_STOP,
    METRICS_LENGTH,
    METRICS_ABORT,
    METRICS_ERROR,
    METRICS_REPETITION,
    METRICS_FINISHES
};

struct metrics {
    struct histogram first_token, inter_token, per_token, latency, queued, inference, prefill, decode;
    struct histogram prompt_tokens, generation_tokens, params_n, params_max_tokens, step_rows;
    uint64_t finished[METRICS_FINISHES], prompt_tokens_total, generation_tokens_total;
    uint64_t accepted_connections, refused_connections; /* over the limit */
    uint64_t disconnects, slow_readers, timeouts;       /* answers cut: client gone, reads too slowly, ... */
    uint64_t expired;                                   /* answers cut: they took too long */
    uint64_t unauthorized, rejected;                    /* 401; 429 and 503 */
    uint64_t steps_seen, rows_seen;
};
void metrics_init(struct metrics *m);
/* Steps since the last look, each with the mean of their rows. */
void metrics_take_steps(struct metrics *m, const struct scheduler_stats *s);
/* A request that generates has ended, seconds after it came. */
void metrics_take_request(struct metrics *m, const struct exchange_account *a, double seconds);

/* Answers by route and class of status. */
struct metrics_route {
    const char *path, *method;
    uint64_t by_class[6]; /* by_class[2]: 200 to 299 */
};

struct metrics_now {
    const char *model_name;
    const struct scheduler_stats *stats; /* NULL: no model yet */
    const struct metrics_route *routes;
    int n_routes;
    int64_t connections, exchanges, body_bytes;
    bool draining, paused;
};
void metrics_write(const struct metrics *m, const struct metrics_now *now, FILE *f);
#endif
