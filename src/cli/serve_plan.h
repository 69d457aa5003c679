/* How much of the memory the sequences get, before anything is loaded. */
#ifndef CLI_SERVE_PLAN_H
#define CLI_SERVE_PLAN_H
#include "checkpoint/checkpoint.h"
#include "engine/engine.h"

struct plan_options {
    const struct checkpoint *checkpoint;
    const struct backend *backend;
    enum kv_dtype kv;
    int drafts;
    int64_t context;    /* of a sequence; 0: what fits, up to the model's */
    int64_t sequences;  /* 0: as many as fit, up to 32 */
    uint64_t budget;    /* 0: a share of what there is */
    double utilization; /* that share */
};

struct plan {
    int64_t context, sequences;
    uint64_t budget, weights, reserve, kv_token, state; /* bytes: in all; a token's KV; a sequence's state */
};

/* ERR_LIMIT with both numbers where it does not fit. */
bool plan_make(struct plan *p, const struct plan_options *o, struct err *e);
void plan_print(const struct plan *p, const struct plan_options *o);
#endif
