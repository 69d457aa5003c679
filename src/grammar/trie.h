/* The vocabulary as matchers walk it: nodes in depth-first order, so that the tokens below a byte that cannot
 * come are skipped at once. Most positions of most answers are inside of some text that almost any token may
 * continue; for the usual kinds of text the tokens that are nothing else are known beforehand (slices). */
#ifndef GRAMMAR_TRIE_H
#define GRAMMAR_TRIE_H
#include "grammar/grammar.h"

enum {
    TRIE_TOKEN_MAX = 1024, /* bytes; longer tokens never match */
    SLICE_BRIEF = 16,      /* characters */
};

struct trie_node {
    int32_t end;    /* the first node that is not below this one */
    int32_t token;  /* -1: none ends here */
    uint16_t depth; /* 1: first byte */
    uint8_t byte;
};

struct trie {
    struct trie_node *nodes;
    int32_t n;
};

/* Tokens of whole UTF-8 characters, the last one perhaps not complete, none of them one of `excluded`. */
enum slice_kind {
    SLICE_JSON /* no " \ or control */,
    SLICE_MARKUP /* no < */,
    SLICE_LINE /* no newline */,
    SLICES
};
struct slice {
    bool excluded[128];
    uint32_t *all, *brief;        /* [words] those of any length; of at most SLICE_BRIEF characters */
    struct trie rest, brief_rest; /* the other tokens */
};

struct token_trie {
    int64_t n_vocab, words;
    char *bytes;
    uint32_t *begin; /* [n_vocab + 1] of each token in bytes */
    int32_t *same;   /* [n_vocab] the next token with the same bytes; -1: none */
    int32_t *stop;
    int n_stop, depth_max;
    struct trie whole;
    struct slice slices[SLICES];
};
#endif
