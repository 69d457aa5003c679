/* What goes where in memory, before anything is loaded. */
#ifndef CLI_PLAN_H
#define CLI_PLAN_H
#include "checkpoint/checkpoint.h"
#include "engine/engine.h"

struct plan_options {
    const struct checkpoint *checkpoint;
    const struct backend *backend;
    enum kv_dtype kv;
    int drafts;
    bool prefix_cache;
    uint64_t encoder_cache; /* bytes, of the host's memory */
    int64_t context;        /* of a sequence; 0: what fits, up to the model's */
    int64_t sequences;      /* 0: as many as fit, up to 32 */
    int64_t step_rows;      /* of a step; 0: as the backend likes */
    bool exact;             /* pages for all sequences in full and no more; context and sequences are given */
    uint64_t budget;        /* 0: a share of what there is */
    double utilization;     /* that share; 0: 0.92 of a device's memory, half of what a host has left */
};

/* Sequences share the pages: each may take `context` tokens of them, all together what there is. */
struct plan {
    int64_t context, sequences, pages, snapshots;
    uint64_t budget, weights, coarse, steps,
        reserve;            /* bytes; coarse: of a copy of the head, steps: buffers of a step, on a device */
    uint64_t encoder_cache; /* of the budget: 0 where that is a device's */
    uint64_t page, state, snapshot_state; /* bytes of one; a sequence's state has a log of drafts besides */
};

/* ERR_LIMIT with the numbers where it does not fit. */
bool plan_make(struct plan *p, const struct plan_options *o, struct err *e);
void plan_print(const struct plan *p, const struct plan_options *o);

/* For commands that give each sequence all it may fill, on a device with memory of its own; elsewhere nothing
 * happens. The plan of o's context and sequences is printed, unless quiet; ERR_LIMIT: it does not fit into
 * what the device had free, less *taken, to which it is added. taken: NULL where there is one plan. */
bool plan_device(const struct checkpoint *c, const struct backend *b, const struct engine_options *o,
                 uint64_t *taken, bool quiet, struct err *e);

/* For evaluations that know their engine's size once they have read what they are to do: plan_device as their
 * `fits`, with one of these. */
struct plan_fits {
    const struct checkpoint *checkpoint;
    const struct backend *backend;
    uint64_t *taken; /* or NULL */
    bool quiet;
};
bool plan_fits(void *ctx, const struct engine_options *o, struct err *e);
#endif
