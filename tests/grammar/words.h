/* A vocabulary for the tests: every byte, and pieces that cross the borders grammars care about. */
#ifndef TESTS_GRAMMAR_WORDS_H
#define TESTS_GRAMMAR_WORDS_H
#include "grammar/grammar.h"
#include <stdlib.h>
#include <string.h>

static const char *const words[] = {
    "\"",
    "\",",
    "\": ",
    "\":\"",
    "\"}",
    "\"]",
    "{\"",
    "{\n  \"",
    "[1",
    "], [",
    "]]",
    "}}",
    ", \"",
    ",\n    ",
    "null",
    "true",
    "false",
    "tru",
    "al",
    "the",
    " the",
    "12",
    "1.5",
    "-1",
    "0.",
    "e+",
    "\\n",
    "\\u00",
    "\\\"",
    "\\u",
    "d8",
    "name",
    "name\":",
    "  ",
    "        ",
    "\n",
    "\n\n",
    "a",
    "ab",
    "abc",
    "bc",
    "c",
    "aaaa",
    "aaaaaaaa",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\"",
    "cccccccccccccccccccccccccccccccccccccccccc\n",
    "bbb\"",
    "cc\",",
    "ab\\n",
    "\u00e9",
    "\u00e9\u00e9",
    "\xc3",
    "\xa9",
    "\xe2\x82",
    "\u20ac",
    "\xf0\x9f\x98",
    "\U0001f600",
    "\x80\"",
    "</",
    "</parameter>",
    "<parameter=",
    "<function=",
    "<tool_call>",
    "\n</",
    ">\n",
    "\xff",
    "a\x80",
    "\xc3\xa9\"",
    "\xed\xa0",
    "\xc0\x80",
    "ab",
    "2026-01-02",
    "T10:00:00Z",
    "@x.org",
    "-",
    "::",
    "127.",
};
enum { N_WORDS = sizeof words / sizeof *words, STOP = 256 + N_WORDS, VOCAB = STOP + 3 };

static inline const char *word_bytes(void *ctx, int32_t id, size_t *n)
{
    static char bytes[256];
    (void)ctx;
    if (id < 256) {
        bytes[id] = (char)id;
        *n = 1;
        return &bytes[id];
    }
    if (id < STOP) {
        *n = strlen(words[id - 256]);
        return words[id - 256];
    }
    *n = id == STOP ? 6 : 0; /* a stop token's text is no text */
    return "<stop>";
}

static inline struct token_trie *word_trie(void)
{
    struct token_trie *t;
    struct err e = { 0 };
    if (!token_trie_create(&t, VOCAB, word_bytes, NULL, (const int32_t[]){ STOP, STOP + 1 }, 2, &e)) abort();
    return t;
}
#endif
