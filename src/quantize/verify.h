/* Proves a checkpoint that somebody made, here or elsewhere: opens it as a reader would, accounts for every
 * Linear of the model class, reads every scale and FP8 code, and, given the source, decodes every matrix and
 * compares. Changes nothing. What each fault does to a reader: docs/formats.md and the sentences themselves.
 */
#ifndef QUANTIZE_VERIFY_H
#define QUANTIZE_VERIFY_H
#include "backend/ops.h"
#include "base/report.h"
#include "checkpoint/quantization.h"
#include "quantize/findings.h"

enum verify_step {
    VERIFY_FILES,   /* shards, index, config.json */
    VERIFY_MODULES, /* one format each, the one quantization_config names */
    VERIFY_LAYERS,  /* types and shapes that config.json asks for */
    VERIFY_SCALES,  /* signs, sizes, NaN, of codes and plain weights too */
    VERIFY_FUSED,   /* what readers run as one: q, k and v; gate and up; the experts of a layer */
    VERIFY_MTP,
    VERIFY_SOURCE,
    VERIFY_SCORE, /* by the caller: verify_score */
    VERIFY_STEPS
};

enum { VERIFY_WORST = 10, VERIFY_SCHEMES = N_SCHEMES };

struct verify_error {
    char module[256];
    enum scheme scheme;
    double error; /* |W - decoded| / |W|, Frobenius norms */
};

struct verify_result {
    struct {
        bool done;
        int64_t n; /* of verify_unit(step) */
    } steps[VERIFY_STEPS];
    struct findings findings;
    int64_t modules[VERIFY_SCHEMES]; /* Linear modules by scheme; experts of a fused tensor one by one */
    int64_t compared[VERIFY_SCHEMES];
    double mean_error[VERIFY_SCHEMES]; /* of those compared */
    struct verify_error worst[VERIFY_WORST];
    int n_worst;
    double perplexity, source_perplexity; /* 0: not scored */
};

struct verify_options {
    const char *path, *source; /* source: NULL for none */
    int threads;               /* for decoding; 0: this process's share of the machine */
    struct backend *backend;   /* borrow; layers are bound to it one at a time */
    const struct report *report;
};

/* False only when the checkpoint could not be looked at (no such folder, no memory, a source that does not
 * open); what is wrong with it is in the result, which the caller gives to verify_deinit either way. */
bool verify_run(struct verify_result *r, const struct verify_options *o, struct err *e);
void verify_deinit(struct verify_result *r);

/* Enters the perplexity of one chunk; source: 0 for none. failure: why there is none, or NULL. */
void verify_score(struct verify_result *r, double perplexity, double source, int64_t vocab_size,
                  const char *failure);

const char *verify_name(enum verify_step s); /* "scales" */
const char *verify_unit(enum verify_step s); /* "tensors" */
int64_t verify_faults(const struct verify_result *r);
#endif
