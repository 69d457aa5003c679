/* What a run came to, gathered from its plan and results: errors by scheme and layer, the worst matrices, the
 * ranges of the inputs, and how many calibration tokens the router sent to each expert. Everything in it
 * follows from source, recipe, calibration and method; nothing from the machine, the clock or the paths, so
 * what is written from it is the same after an interruption. */
#ifndef QUANTIZE_SUMMARY_H
#define QUANTIZE_SUMMARY_H
#include "quantize/calibrate.h"
#include "quantize/plan.h"
#include "quantize/results.h"

enum { SUMMARY_WORST = 10 };
/* Experts that fewer routed tokens reached are named. All experts see all tokens; these saw few of their own.
 */
enum { SUMMARY_FEW_TOKENS = 64 };

/* dB. NVFP4 keeps 20 (1 % of |W|^2 lost), FP8 31; below this it is not rounding that went wrong. */
static const double SUMMARY_SNR_LOW = 15;

/* What a summary is made of; everything is borrowed. */
struct summary_run {
    const char *version, *method;
    const char *source, *calibration_file; /* paths as given; the latter NULL: none */
    const struct checkpoint *checkpoint;   /* the source */
    const struct plan *plan;
    const struct matrix_result *results;   /* [plan->n_matrices], all done */
    const struct calibration *calibration; /* tokens 0: none ran */
    const struct recipe *recipe;
    int64_t samples, max_seq_length, shards;
    const json_t *identity; /* identity.h */
};

/* Of a set of matrices. Relative error: |W - packed W| / |W|, Frobenius norms. */
struct summary_errors {
    int64_t matrices, weights;
    uint64_t bytes;           /* packed, scales included */
    double mean, worst;       /* of relative errors */
    double difference, total; /* sums of squares */
    size_t worst_matrix;      /* of the plan */
};

struct summary_range {
    double low, median, high; /* of an even number of values the median is the lower middle one */
};

struct summary_layer {
    struct summary_errors errors[N_SCHEMES];
    double inputs[INPUT_EXPERT];  /* max |x| by enum module_input */
    struct summary_range experts; /* max |x| in front of down_proj */
    struct summary_range routed;  /* tokens */
    int n_few;                    /* experts below SUMMARY_FEW_TOKENS */
};

struct summary {
    struct summary_run run;
    char *source_name, *calibration_name; /* without folders, valid UTF-8 without control characters; the
                                             latter NULL: no calibration. "org/name" in a Hugging Face cache
                                           */
    uint64_t bytes_in, bytes_out;         /* of tensors */
    int64_t copied, copied_bytes, draft;  /* tensors as in the source; those of the MTP head among them */
    struct summary_errors errors[N_SCHEMES];
    struct summary_layer *layers; /* [config->n_layers] */
    size_t worst[SUMMARY_WORST];  /* matrices of the plan, worst first; of equals the first */
    int n_worst;
    int64_t n_far;               /* matrices with SNR below SUMMARY_SNR_LOW */
    int64_t n_zero;              /* matrices with a measured scale whose calibration inputs were all zero */
    struct summary_range routed; /* tokens, over all experts of all layers */
    int n_few;
};

bool summary_create(struct summary *s, const struct summary_run *run, struct err *e);
void summary_deinit(struct summary *s); /* accepts a zeroed one */

static inline bool summary_is_calibrated(const struct summary *s)
{
    return s->run.calibration->tokens > 0;
}
double summary_error(const struct matrix_result *r); /* relative; 0 for a matrix of zeros */
/* 10 log10 |W|^2 / |W - packed W|^2; infinite without a difference. */
double summary_snr(double difference, double total);
/* Tokens that the router sent to an expert of a layer. */
int64_t summary_routed(const struct summary *s, int layer, int expert);
/* The last part of a path, malloc'd, with U+FFFD for what is not UTF-8 and for control characters; NULL when
 * out of memory. */
char *summary_name(const char *path);
int64_t summary_matrices(const struct summary *s, bool nvfp4); /* in NVFP4, or in FP8 */
/* "NVFP4 + FP8": the packed formats. */
void summary_formats(const struct summary *s, char out[32]);
#endif
