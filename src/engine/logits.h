/* What a request makes of a row of logits before a token is drawn from it: penalties, bias, tokens that must
 * not come. State advances with every token of the answer, so that the rows of a verified run are each seen
 * as if the tokens before them had come one by one. Order as in vLLM: allowed tokens and bans, bias,
 * repetition, frequency, presence. */
#ifndef ENGINE_LOGITS_H
#define ENGINE_LOGITS_H
#include "engine/scheduler.h"

struct logits_rules {
    const struct request_options *o; /* borrow */
    int64_t n_vocab, n_answer;
    uint32_t *counts; /* [n_vocab] of the answer; the top bit: in the prompt. NULL without penalties */
    int32_t *seen;    /* [n_seen] tokens with a count */
    int64_t n_seen;
    int32_t *recent; /* the answer's last tokens, as many as the longest of bad_words, less one */
    int n_recent, recent_most;
    uint32_t *mask;   /* see logits_rules_mask */
    bool constrained; /* the constraint has begun */
    bool thinking;    /* until thinking_end */
    int forced;       /* tokens of thinking_end given so far; 0: none */
};

/* o outlives it. prompt: what penalties count. */
bool logits_rules_init(struct logits_rules *l, const struct request_options *o, int64_t n_vocab,
                       struct err *e);
void logits_rules_deinit(struct logits_rules *l); /* accepts a zeroed one */

/* Whether a row is changed at all. */
bool logits_rules_change(const struct logits_rules *l);
/* Whether it or one of a later token may be. */
bool logits_rules_may_change(const struct logits_rules *l);
/* The tokens that may come next as far as `allowed` and the constraint say, bits as in num/draw.h; NULL: all.
 * Valid until the next call. */
const uint32_t *logits_rules_mask(struct logits_rules *l);
/* What else changes, appended for a row of that number: rounds of edits to be made one after the other, each
 * of which names a token once, but for bans. */
enum { ROUND_BANS, ROUND_BIAS, ROUND_PENALTIES, ROUNDS };
struct logits_edits {
    struct logit_edit *items;
    int64_t n, capacity;
};
bool logits_rules_edits(const struct logits_rules *l, int32_t row, struct logits_edits *rounds,
                        struct err *e);
/* Both, in place, for a row in host memory. rounds: used up. */
bool logits_rules_apply(struct logits_rules *l, float *logits, struct logits_edits *rounds, struct err *e);
/* The token that has to come whatever the logits say; -1: none. */
int32_t logits_rules_forced(const struct logits_rules *l);
/* The token came. False: the constraint wants no more. */
bool logits_rules_take(struct logits_rules *l, int32_t id);

/* The score of token id in a row of logits, and the `most` best of the row: log-softmax in f32. */
void logits_score(struct request_event *out, const float *logits, int64_t n_vocab, int32_t id, int most);
/* The same with those of ids[n] in place of the best. */
void logits_score_ids(struct request_event *out, const float *logits, int64_t n_vocab, int32_t id,
                      const int32_t *ids, int n);
#endif
