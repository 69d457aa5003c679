/* A BF16 checkpoint in, a compressed-tensors checkpoint out: calibrates, packs, copies, writes config.json,
 * recipe.yaml, the index and all side files, and counts everything before the result gets its name.
 * Formats and formulas: num/nvfp4.h, num/fp8.h; files: docs/formats.md. */
#ifndef QUANTIZE_QUANTIZE_H
#define QUANTIZE_QUANTIZE_H
#include "backend/ops.h"
#include "base/err.h"
#include "base/report.h"
#include "quantize/recipe.h"
#include <stdint.h>

/* How NVFP4 codes are chosen; the file has the same format and size with all of them. */
enum quantize_method {
    QUANTIZE_NEAREST, /* the reference tool's, byte for byte */
    QUANTIZE_MSE,     /* scales searched (search.h) */
    QUANTIZE_GPTQ,    /* scales searched, errors passed on to later columns (gptq.h) */
};

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
    const struct report *report; /* progress "calibrate" in tokens times layers, "quantize" in source bytes */
};

/* Of all matrices in one scheme: relative Frobenius error |W - packed W| / |W|. */
struct quantize_error {
    double mean, worst;
    char worst_module[256];
};

struct quantize_result {
    int64_t nvfp4_matrices, fp8_matrices, copied_tensors, ignored_modules;
    struct quantize_error nvfp4_error, fp8_error;
    int64_t samples, tokens;      /* calibration */
    uint64_t bytes_in, bytes_out; /* of tensors */
    int64_t shards;
    double seconds, calibrate_seconds;
};

/* What a run would do and take. */
struct quantize_forecast {
    int64_t matrices[N_SCHEMES], copied_tensors, samples, tokens, shards;
    uint64_t bytes_in, bytes_out; /* of tensors */
    uint64_t disk_bytes;          /* of the destination's file system while it runs, at most */
    uint64_t memory_bytes;        /* resident, at most; held against max_memory */
    /* From short probes: estimates. Reading and packing overlap. Writing is not in them. */
    double read_seconds, pack_seconds, calibrate_seconds;
};

/* Checks all that quantize_run checks before it writes, and writes nothing. */
bool quantize_dry_run(const struct quantize_options *o, struct quantize_forecast *f, struct err *e);

/* The destination appears when all is done. An interrupted run, or one that failed for want of memory or by
 * the system (a full disk, an unreadable file), leaves DST.quench-partial; a run with the same options
 * continues from there and writes the same bytes as one that was never interrupted. Other failures leave
 * nothing. */
bool quantize_run(const struct quantize_options *o, struct quantize_result *result, struct err *e);
#endif
