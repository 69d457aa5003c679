/* The vocabulary as matchers walk it: nodes in depth-first order, so that the tokens below a byte that cannot
 * come are skipped at once. Most positions of most answers are inside of some text that almost any token, or
 * any word, may continue; of such a kind of text a slice knows the tokens that consist of it, and where the
 * others leave it. The usual kinds are made with the trie, others by the matcher that meets them. */
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

enum slice_kind {
    SLICE_JSON,   /* no " \ or control */
    SLICE_MARKUP, /* no < or newline */
    SLICE_LINE,   /* no newline */
    SLICES
};

struct slice_chars {
    bool ascii[128]; /* these */
    bool others;     /* and every other character; its token may end inside of it */
};

struct slice {
    struct slice_chars chars;
    uint32_t *all;                   /* [words] tokens of such characters */
    uint32_t *upto[SLICE_CHARS + 1]; /* [words] those of at most so many */
    /* Nodes of token_trie.whole with which tokens leave the slice, by the number of characters before and by
     * the first byte: exits[begin[n * 256 + byte] ...). With SLICE_CHARS before, every character leaves. */
    int32_t *exits;
    int32_t begin[(SLICE_CHARS + 1) * 256 + 1];
    /* Only of those made with the trie: the other tokens from the first character on that does not belong.
     * All that counts where the characters before lead back to where they began. */
    struct trie tails;
    int32_t *same;
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

/* Without tails. False: out of memory; *s may be freed then as well. */
bool slice_init(struct slice *s, const struct token_trie *t, const struct slice_chars *chars);
void slice_deinit(struct slice *s);
#endif
