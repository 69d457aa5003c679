/* How many tokens to draft ahead of each of n sequences that share a step: as many as give the most tokens a
 * second, by how often drafts turned out right at each place and what steps of n sequences took with them and
 * without. One of a scheduler. What is not measured is tried, hopefully; where drafting does not pay it
 * stops, and only so often tries again that this costs at most a hundredth. */
#ifndef ENGINE_DRAFTING_H
#define ENGINE_DRAFTING_H
#include "engine/engine.h"

struct drafting {
    int most; /* drafts of a sequence; 0: none */
    struct drafting_cost {
        double seconds[DRAFTS_MAX + 1]; /* of a step with so many drafts each, of late; 0: not measured */
        int64_t steps[DRAFTS_MAX + 1];
    } costs[ROWS_EXACT + 1]; /* by sequences */
    double rate[DRAFTS_MAX]; /* by place: drafts that are right where those before them are, of late */
    int64_t counted[DRAFTS_MAX];
    int last;                                         /* drafts of each in the last step */
    int64_t step, plain_until, idle_until, try_until; /* steps; see drafting_choose */
};

void drafting_init(struct drafting *d, int most);
/* Most drafts each for a step of n sequences: with them it has at most ROWS_EXACT rows, since so many have
 * the bits of a row alone on every backend. */
int drafting_most(const struct drafting *d, int n);
/* For the next step, of n sequences. */
int drafting_choose(struct drafting *d, int n);
/* A step of n sequences with k drafts each, and nothing else, took so long. */
void drafting_learn(struct drafting *d, int n, int k, double seconds);
/* Of `drafted` drafts of a sequence the first `accepted` were right. */
void drafting_count(struct drafting *d, int drafted, int accepted);
#endif
