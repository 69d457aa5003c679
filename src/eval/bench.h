/* Throughput of a model: prompts and generation as rows of steps, without sampling, set against the bytes
 * that had to move and the read bandwidth measured beside it. The shape of a run is llama-bench's: a warm-up,
 * then repetitions of the same tokens, each a sample. */
#ifndef EVAL_BENCH_H
#define EVAL_BENCH_H
#include "backend/trace.h"
#include "engine/engine.h"
#include "eval/read_speed.h"

struct bench_test {
    int64_t n_prompt, n_gen; /* tokens of a sequence; either may be 0 */
    int64_t depth; /* tokens each sequence has seen before: their state is noise, nothing is computed */
    int sequences; /* that run together */
};

enum bench_group {
    BENCH_DELTANET, /* projections */
    BENCH_ATTENTION,
    BENCH_SHARED_EXPERT, /* and its gate */
    BENCH_EXPERTS,       /* those that the step's rows picked, each once */
    BENCH_ROUTER,
    BENCH_LM_HEAD,
    BENCH_STATE, /* recurrent and convolution state, read and written, and the convolution's weights */
    BENCH_KV,
    BENCH_GROUPS
};
extern const char *const bench_group_names[BENCH_GROUPS]; /* "deltanet" ... */

struct bench_options {
    struct model *model; /* its backend is a trace with the labels of bench_label */
    struct read_speed *speed;
    const int32_t *tokens; /* a text's, from which sequences read on; NULL: random ids */
    int64_t n_tokens;
    enum kv_dtype kv;
    int64_t step_rows; /* most rows of a step */
    int repetitions;
    bool profile; /* one more repetition with every operation timed */
    const struct report *report;
};

struct bench_result {
    double *seconds; /* [n] samples, in order */
    int n;
    int64_t tokens;                                 /* of one sample, all sequences together */
    double bytes[BENCH_GROUPS], total_bytes, flops; /* per token; weights of a step are shared by its rows */
    double experts_per_step; /* different ones that the rows of a step picked, mean over layers */
    double read_bandwidth;   /* bytes a second, the best of before and after */
    double product_speed[WEIGHT_FORMATS]; /* ops.product_speed of the formats in use, likewise; else 0 */
    double product_seconds;      /* that a token's products would take at that speed; 0: not known of some */
    struct trace_entry *profile; /* [n_profile] of one repetition; NULL unless asked for */
    int n_profile;
};

/* Names the model's weights in its trace, by bench_group_names. */
bool bench_label(struct model *m, struct err *e);
/* What a test needs of an engine. */
struct engine_options bench_engine(const struct bench_test *t, int64_t step_rows, enum kv_dtype kv);
bool bench_run(struct bench_result *r, const struct bench_test *t, const struct bench_options *o,
               struct err *e);
void bench_result_deinit(struct bench_result *r);

/* Of n > 0 numbers; the deviation is the sample's (n - 1), 0 for one number. */
struct bench_summary {
    double mean, deviation, median, min, max;
};
struct bench_summary bench_summarize(const double *x, int n);
#endif
