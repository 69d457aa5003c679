/* Where a text stands in a grammar: the set of automaton states it may be in, each with a frame that says
 * where to go on when its rule ends. Sets and frames are kept once each, so equal positions have equal
 * numbers, and where a byte leads from a set is computed once. A frame serves all calls of a rule at one
 * place of the text, so there are never more frames at a place than rules, however ambiguous the grammar
 * (Earley sets as a lazily made automaton). */
#ifndef GRAMMAR_SETS_H
#define GRAMMAR_SETS_H
#include "grammar/automaton.h"
#include "grammar/trie.h"

enum {
    SETS_DEAD = 0,           /* the set from which nothing matches */
    SETS_FAILED = -1,        /* out of memory, or over a limit */
    SETS_DEPTH_MAX = 400,    /* frames above each other; a rule that would be deeper cannot come */
    SETS_WORK_MAX = 1000000, /* pairs looked at for one token */
    SETS_FLUSH = 4 << 20,    /* bytes from which sets_flush() is due */
    SETS_BYTES_MAX = 32 << 20
};

struct pair {
    int32_t state, frame;
};

struct frame {
    int32_t first, n; /* of sets.pairs: where to go on, in which frame */
    int32_t depth;
};

struct set {
    int32_t first, n;        /* of sets.pairs; only states that read a byte */
    bool accepts;            /* the text may end here */
    int32_t mask;            /* the matcher's */
    int32_t uniform[SLICES]; /* what sets_uniform said of slices made with the trie; -1: not asked yet */
};

struct seen_pair {
    struct pair pair;
    uint32_t round; /* of the closure that saw it */
};

struct call {
    int32_t next, frame, more; /* more: another call of the same rule; -1 */
};

struct sets {
    const struct grammar *g;
    struct pair *pairs;
    struct frame *frames;
    struct set *sets;
    int32_t *rows; /* [n_sets][classes] the set that a byte leads to; -1: not known yet */
    int64_t n_pairs, n_frames, n_sets, pairs_room, frames_room, sets_room, rows_room;
    int32_t *frame_table, *set_table; /* hash tables of numbers + 1 */
    int64_t frame_slots, set_slots;
    int64_t work;
    struct pair *last; /* what the last step's byte led to, and the set it became: neighbours often agree */
    int64_t n_last, last_room;
    int32_t last_set;

    /* of one closure */
    struct pair *todo, *kernel, *content;
    struct call *calls;
    int32_t *first_call;    /* [n_rules]; -1 */
    int32_t *heap;          /* [n_rules] rules called, first in order on top */
    struct seen_pair *seen; /* hash table */
    uint32_t round;
    int64_t n_todo, n_kernel, n_content, n_calls, n_heap, n_seen;
    int64_t todo_room, kernel_room, content_room, calls_room, seen_slots;
};

bool sets_init(struct sets *s, const struct grammar *g); /* false: out of memory */
void sets_deinit(struct sets *s);
int32_t sets_start(struct sets *s);
int32_t sets_step(struct sets *s, int32_t set, int class); /* computes what rows do not know yet */
/* The set to which each of these characters leads, whichever it is; SETS_DEAD: there is no such set. which:
 * of the slices made with the trie, the answer is kept; -1: another. */
int32_t sets_uniform(struct sets *s, int32_t set, const struct slice_chars *chars, int which);
bool sets_is_closed(struct sets *s, int32_t set,
                    const struct slice_chars *chars); /* none of these may come */
uint64_t sets_bytes(const struct sets *s);
/* Forgets all but the sets in keep[n], which get new numbers. */
bool sets_flush(struct sets *s, int32_t *keep, int n);

static inline int32_t sets_next(struct sets *s, int32_t set, uint8_t byte)
{
    int class = s->g->class_of[byte];
    int32_t to = s->rows[(int64_t)set * s->g->n_classes + class];
    return to >= 0 ? to : sets_step(s, set, class);
}
#endif
