/* Calibration samples: JSON lines, each an object with `input_ids` (used as they are), `messages` (rendered
 * in the model's chat format, no generation prompt, then tokenized) or `text` (tokenized); the first of these
 * keys that a line has counts. Errors begin with the file and the line. */
#ifndef QUANTIZE_SAMPLES_H
#define QUANTIZE_SAMPLES_H
#include "base/err.h"
#include "base/report.h"
#include <stddef.h>
#include <stdint.h>

struct samples {
    int32_t *tokens;  /* of all samples, one behind the other */
    int64_t *begin;   /* [n + 1] */
    int64_t n;        /* samples */
    int64_t n_tokens; /* begin[n] */
    int64_t longest;  /* tokens of the longest one */
    size_t tokens_capacity;
};

struct samples_options {
    const char *path, *model; /* model: folder with tokenizer.json, read when a line needs it */
    int64_t n, max_tokens;    /* samples wanted; tokens kept of each */
    int64_t vocab_size;
    const struct report *report; /* told of fewer samples than wanted, and of empty ones, which are skipped */
};

/* At least one sample, or an error. */
bool samples_load(struct samples *s, const struct samples_options *o, struct err *e);
void samples_deinit(struct samples *s); /* accepts a zeroed one */
#endif
