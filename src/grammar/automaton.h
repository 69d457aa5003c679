/* A compiled grammar: one small automaton for each rule, over bytes and calls of other rules. Immutable.
 * No rule begins with itself, not even through others, so the rules called at one place of a text can be
 * taken in `order`; rules that match the empty text are also stepped over where they are called. */
#ifndef GRAMMAR_AUTOMATON_H
#define GRAMMAR_AUTOMATON_H
#include <stdbool.h>
#include <stdint.h>

enum state_kind {
    STATE_END,   /* of the rule. There is one, state 0 */
    STATE_BYTES, /* edges[first .. first + n) */
    STATE_SPLIT, /* goes on at each edge's `to`, without a byte */
    STATE_CALL   /* rule `first`, then state n */
};

struct state {
    uint8_t kind;
    bool is_alive; /* the end can be reached from here */
    int32_t first, n;
};

struct edge {
    uint8_t low, high;
    int32_t to;
};

struct automaton_rule {
    int32_t start;
    int32_t order; /* larger than that of every rule that may call it before any byte is read */
    bool is_nullable;
};

struct grammar {
    struct state *states;
    struct edge *edges;
    struct automaton_rule *rules;
    int32_t n_states, n_edges, n_rules, start; /* start: the state */
    int n_classes;                             /* bytes of one class lie on the same edges everywhere */
    uint8_t class_of[256];
    uint8_t member[256]; /* one byte of each class */
};
#endif
