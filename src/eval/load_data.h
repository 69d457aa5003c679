/* Prompts for a load: random words, conversations of ShareGPT, or lines of a file. */
#ifndef EVAL_LOAD_DATA_H
#define EVAL_LOAD_DATA_H
#include "base/err.h"
#include "tokenizer/tokenizer.h"
#include <jansson.h>
#include <stdint.h>

enum load_data_kind {
    LOAD_RANDOM,   /* common English words, each a token in nearly every vocabulary */
    LOAD_SHAREGPT, /* a JSON array of {"conversations": [{"value": ...}, ...]}: the first message and, for its
                      length, the second; too short and too long ones left out, as `vllm bench serve` does */
    LOAD_LINES     /* JSON lines of "prompt" or "messages", perhaps "output_tokens" */
};

struct load_data_options {
    enum load_data_kind kind;
    const char *path;                  /* but for LOAD_RANDOM */
    const struct tokenizer *tokenizer; /* counts ShareGPT's lengths; or NULL, with output_tokens */
    int64_t n;
    int64_t input_tokens, prefix_tokens; /* LOAD_RANDOM: words of its own after words that all share */
    int64_t output_tokens;               /* 0: as the data say */
    double range_ratio; /* LOAD_RANDOM: lengths are uniform within this share of the above; 0 to 1 */
    uint64_t seed;
};

struct load_prompt {
    char *text;                           /* owned; NULL: messages */
    json_t *messages;                     /* owned; or NULL */
    int64_t prompt_tokens, output_tokens; /* -1: not known */
};
struct load_data {
    struct load_prompt *items;
    int64_t n; /* as many as asked for, or as the file has */
};
/* Errors name file and line. */
bool load_data_create(struct load_data *d, const struct load_data_options *o, struct err *e);
void load_data_free(struct load_data *d); /* accepts a zeroed one */

/* The request: a streamed chat (or completion) with usage at its end, and what `extra` adds. malloc'd; NULL
 * when out of memory, or when messages meet the completions endpoint. */
char *load_data_body(const struct load_prompt *p, const char *model, bool chat, const json_t *extra);
#endif
