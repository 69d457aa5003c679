/* How far to draft ahead of a sequence: as many tokens as give the most tokens a second, by how often drafts
 * turned out right at each place and what rounds took. One of a sequence, fed with what became of each
 * round; it starts hopeful, and where drafting does not pay it stops and only tries again now and then. */
#ifndef ENGINE_SPECULATE_H
#define ENGINE_SPECULATE_H
#include "engine/engine.h"
#include "engine/sample.h"

struct speculation {
    int most;      /* drafts a round, at most; 0: none */
    bool is_fixed; /* always that many */
    int64_t rounds, drafted, accepted;
    int64_t tried[DRAFTS_MAX];      /* by place: drafts whose predecessors were right */
    int64_t right[DRAFTS_MAX];      /* and themselves too */
    double rate[DRAFTS_MAX];        /* of these, of late */
    double seconds[DRAFTS_MAX + 1]; /* of a round with so many drafts, of late; 0: not tried */
    int idle, pause, probes;        /* plain rounds left and in all before a try; rounds left of one */
};

void speculation_init(struct speculation *s, int most);
/* A round: drafts what pays to come after draft->next, at most `most` tokens, and steps the sequence by all
 * of them. rows: [DRAFTS_MAX + 1], those of the step. ids: [DRAFTS_MAX + 1], of draft->n + 1 rows the tokens
 * sampled after each, by draws `counter` and on. *seconds: what it took. With drafts the rows are tentative:
 * engine_keep has to follow. */
bool speculation_run(struct speculation *s, struct engine *g, struct engine_draft *draft, int64_t most,
                     struct row *rows, const struct sampling *sampling, uint64_t counter, int32_t *ids,
                     double *seconds, struct err *e);
/* Drafts wanted for the next round. */
int speculation_choose(struct speculation *s);
/* A round with `drafted` drafts, of which the first `accepted` were right, took so long. */
void speculation_learn(struct speculation *s, int drafted, int accepted, double seconds);
/* Tokens a round by now: 1 and the drafts that were right. 0 before any. */
double speculation_mean_length(const struct speculation *s);
#endif
