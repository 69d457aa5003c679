/* A BF16 checkpoint in, a compressed-tensors checkpoint out: calibrates, packs, copies, writes config.json,
 * recipe.yaml, the index, all side files, a report and a model card, and counts everything before the result
 * gets its name. Formats and formulas: num/nvfp4.h, num/fp8.h; files: docs/formats.md. */
#ifndef QUANTIZE_QUANTIZE_H
#define QUANTIZE_QUANTIZE_H
#include "backend/ops.h"
#include "base/err.h"
#include "base/report.h"
#include "quantize/evaluation.h"
#include "quantize/recipe.h"
#include <stdint.h>

/* How NVFP4 codes are chosen; the file has the same format and size with all of them. */
enum quantize_method {
    QUANTIZE_AUTO,          /* mse or gptq, whichever loses less in a layer on samples held out (contest.h);
                               mse without calibration */
    QUANTIZE_NEAREST,       /* the reference tool's, byte for byte */
    QUANTIZE_FOUR_OVER_SIX, /* the better of two scales (search.h) */
    QUANTIZE_MSE,           /* scales searched (search.h) */
    QUANTIZE_GPTQ,          /* scales searched, errors passed on to later columns (gptq.h) */
};

const char *quantize_method_name(enum quantize_method m); /* "nearest" */

struct quantize_options {
    const char *source, *destination; /* folders; the destination must not exist */
    const char *calibration;     /* JSONL (quantize/samples.h); unused by a recipe without measured scales */
    const struct recipe *recipe; /* NULL: the card's */
    enum quantize_method method;
    int64_t num_calibration_samples; /* 0: 64 */
    int64_t max_seq_length;          /* 0: 2048; tokens kept of each sample */
    uint64_t max_shard_bytes;        /* 0: 5 GB; a larger tensor gets a file of its own */
    uint64_t max_memory;             /* 0: 8 GB; a run that may need more is refused before it starts */
    uint64_t sync_bytes;             /* 0: 128 MiB; output between two points where a killed run continues */
    int threads;                     /* for packing; 0: this process's share of the machine */
    struct backend *backend;         /* borrow; runs the calibration */
    const char *version;             /* of the program, for the report and the model card */
    /* Scores the result in `folder`, whole but not yet under its name, against the source; the numbers go
     * into report and card. NULL: no evaluation. */
    bool (*evaluate)(void *ctx, struct evaluation *out, const char *folder, struct err *e);
    void *evaluate_ctx;
    const struct report *report; /* progress "calibrate" in tokens times layers, "quantize" in source bytes */
};

/* Of all matrices in one scheme: relative Frobenius error |W - packed W| / |W|. */
struct quantize_error {
    double mean, worst;
    double snr; /* dB, of all together; infinite without a difference */
    char worst_module[256];
};

enum { QUANTIZE_WORST = 10, QUANTIZE_FEWEST = 5 };
struct quantize_worst {
    char module[256];
    enum scheme scheme;
    double error, snr;
};

/* How many calibration tokens the router sent to an expert. */
struct quantize_routed {
    int layer, expert;
    int64_t tokens;
};

struct quantize_coverage {
    int64_t experts; /* 0: no calibration; else all of them, each calibrated on all tokens */
    int64_t minimum, median, maximum;
    int64_t few;                                    /* experts that got fewer than SUMMARY_FEW_TOKENS */
    struct quantize_routed fewest[QUANTIZE_FEWEST]; /* of those, ascending */
};

struct quantize_result {
    int64_t gptq_matrices; /* of the NVFP4 ones: where errors were passed on */
    int64_t nvfp4_matrices, fp8_matrices, copied_tensors, ignored_modules;
    struct quantize_error nvfp4_error, fp8_error;
    int64_t samples, tokens;      /* calibration */
    uint64_t bytes_in, bytes_out; /* of tensors */
    int64_t shards;
    struct quantize_worst worst[QUANTIZE_WORST]; /* worst first */
    int n_worst;
    struct quantize_coverage coverage;
    uint64_t peak_bytes;                                 /* of memory, before the evaluation */
    uint64_t device_bytes;                               /* of the device's own, at most; 0: none */
    double seconds, calibrate_seconds, evaluate_seconds; /* the first holds the others */
    bool was_finished; /* by an earlier run of the same options; nothing else is set but bytes and counts */
};

/* What a run would do and take. */
struct quantize_forecast {
    int64_t matrices[N_SCHEMES], copied_tensors, samples, tokens, shards;
    uint64_t bytes_in, bytes_out; /* of tensors */
    uint64_t disk_bytes;          /* of the destination's file system while it runs, at most */
    uint64_t memory_bytes;        /* resident, at most; held against max_memory */
    uint64_t device_bytes; /* of the backend's own memory, at most; held against what is free; 0: none */
    /* From short probes: estimates. Reading and packing overlap. Writing is not in them, nor what a GPU
     * packs. */
    double read_seconds, pack_seconds, calibrate_seconds;
};

/* Checks all that quantize_run checks before it writes, and writes nothing. */
bool quantize_dry_run(const struct quantize_options *o, struct quantize_forecast *f, struct err *e);

/* The destination appears when all is done. An interrupted run, or one that failed for want of memory or by
 * the system (a full disk, an unreadable file), leaves DST.quench-partial; a run with the same options
 * continues from there and writes the same bytes as one that was never interrupted. Other failures leave
 * nothing. Where the destination is what these options give, by its report and a census, nothing is done. */
bool quantize_run(const struct quantize_options *o, struct quantize_result *result, struct err *e);
#endif
