/* What drafting gains on given prompts: each is continued greedily without drafts and with them, one after
 * the other, and the time of both is added up. */
#ifndef EVAL_SPECULATION_H
#define EVAL_SPECULATION_H
#include "engine/generate.h"

struct speculation_options {
    struct model *model; /* its MTP head bound */
    const struct tokenizer *tokenizer;
    const char *prompts; /* JSON lines with "prompt" */
    int64_t max_prompts; /* the first so many of them; 0: all */
    int64_t max_tokens;  /* of an answer */
    int drafts;          /* most a round */
    bool is_fixed;       /* always that many, paying or not */
    enum kv_dtype kv;
    const int32_t *stop_tokens;
    int n_stop_tokens;
    const struct report *report;
    /* Whether such an engine fits, asked before it is made; NULL: yes. */
    bool (*fits)(void *ctx, const struct engine_options *o, struct err *e);
    void *ctx;
};

struct speculation_result {
    int64_t prompts, prompt_tokens, tokens; /* tokens generated, the same with and without drafts */
    double plain_seconds, seconds;          /* of decoding */
    double plain_prefill_seconds, prefill_seconds;
    int64_t different; /* prompts whose answers differ: 0, or something is wrong */
    struct speculation speculation;
};

bool speculation_measure(struct speculation_result *r, const struct speculation_options *o, struct err *e);
#endif
