/* Load on an OpenAI server: requests that arrive at given moments, whose streams are read and timed. One
 * thread. Source of the terms: `vllm bench serve`. */
#ifndef EVAL_LOAD_H
#define EVAL_LOAD_H
#include "base/report.h"
#include "eval/load_http.h"
#include "eval/load_stream.h"

struct load_request {
    char *body;            /* JSON; owned */
    int64_t prompt_tokens; /* what the maker of the prompt knows; -1: nothing */
};

struct load_options {
    struct load_http *http;
    const char *endpoint;    /* "/v1/chat/completions" */
    double rate, burstiness; /* requests a second, INFINITY: all at once; 1: Poisson */
    uint64_t seed;
    int64_t max_concurrency; /* those over it wait here, in order; 0: no limit */
    const struct report *report;
};

/* Sends all, waits for all. answers: [n], zeroed, each to be freed with load_answer_deinit. *duration: from
 * the first arrival to the last answer's end. False only when nothing could be measured: a request that
 * failed is an answer that is not ok. */
bool load_run(struct load_answer *answers, double *duration, const struct load_request *requests, int64_t n,
              const struct load_options *o, struct err *e);

/* at: [n] seconds from the start, ascending: gaps from the gamma distribution of shape `burstiness` and mean
 * 1 / rate, stretched so that the last is at n / rate. INFINITY as burstiness: equal gaps. */
void load_arrivals(double *at, int64_t n, double rate, double burstiness, uint64_t seed);
#endif
