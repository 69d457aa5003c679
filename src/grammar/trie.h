/* The vocabulary as matchers walk it: nodes in depth-first order, so that the tokens below a byte that cannot
 * come are skipped at once. Most positions of most answers are inside of some text that almost any token may
 * continue; for the usual kinds of text the tokens that are nothing else are known beforehand (slices). */
#ifndef GRAMMAR_TRIE_H
#define GRAMMAR_TRIE_H
#include "grammar/grammar.h"

enum {
    TRIE_TOKEN_MAX = 1024, /* bytes; longer tokens never match */
    SLICE_CHARS = 40       /* lengths of text that are told apart */
};

struct trie_node {
    int32_t end;    /* the first node that is not below this one */
    int32_t token;  /* -1: none ends here */
    uint16_t depth; /* 1: first byte */
    uint8_t byte;
};

struct trie {
    struct trie_node *nodes;
    const int32_t *same; /* [n_vocab] another token that ends at the same node; -1: none; borrow */
    int32_t n;
};

/* Tokens of whole UTF-8 characters, the last one perhaps not complete, none of them one of `excluded`. */
enum slice_kind {
    SLICE_JSON,   /* no " \ or control */
    SLICE_MARKUP, /* no < or newline */
    SLICE_LINE,   /* no newline */
    SLICES
};

struct slice {
    bool excluded[128];
    uint32_t *all;                   /* [words] tokens of such text */
    uint32_t *upto[SLICE_CHARS + 1]; /* [words] those of at most so many characters */
    struct trie tails;               /* the other tokens, from the first character on that does not belong */
    struct trie after[SLICE_CHARS + 1]; /* the same apart by how many characters stand before */
    struct trie longer;                 /* all tokens that begin with more characters */
    int32_t *same;                      /* owned here, for tails; after and longer share another */
    int32_t *same_apart;
};

struct token_trie {
    int64_t n_vocab, words;
    char *bytes;
    uint32_t *begin; /* [n_vocab + 1] of each token in bytes */
    int32_t *stop;
    int n_stop, depth_max;
    struct trie whole;
    int32_t *same; /* for whole */
    struct slice slices[SLICES];
};
#endif
