/* Results of quench bench as llama-bench prints them: the same columns and keys, and after them what is set
 * against the machine's limits. */
#ifndef CLI_BENCH_PRINT_H
#define CLI_BENCH_PRINT_H
#include "eval/bench.h"
#include <jansson.h>
#include <stdio.h>

enum bench_format { BENCH_MD, BENCH_CSV, BENCH_JSON, BENCH_JSONL };

/* What all tests of one model and thread count share. */
struct bench_setting {
    const char *model;          /* as on the command line */
    char type[160];             /* "qwen3_5_moe NVFP4 + FP8 + BF16" */
    char mix[160];              /* "NVFP4 18.12 GB, FP8 0.40 GB, BF16 4.10 GB" */
    uint64_t bytes, parameters; /* of the language model */
    const struct backend *backend;
    int threads;
    const char *kv, *activations; /* of keys and values; of inputs of NVFP4 weights: "bf16", "fp4" */
    int64_t step_rows;
    double load_seconds;
    const char *content; /* NULL: random tokens */
};
/* Fills type, mix, bytes, parameters. */
void bench_setting_count(struct bench_setting *s, const struct checkpoint *c);

struct bench_printer {
    enum bench_format format;
    json_t *results; /* objects so far */
};
bool bench_printer_init(struct bench_printer *p, enum bench_format format);
void bench_printer_add(struct bench_printer *p, const struct bench_setting *s, const struct bench_test *t,
                       const struct bench_result *r);
/* What comes after the last result. */
void bench_printer_end(struct bench_printer *p);
#endif
