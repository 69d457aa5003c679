/* Texts in which certain words do not stand. */
#ifndef GRAMMAR_TEXT_H
#define GRAMMAR_TEXT_H
#include "grammar/rules.h"

enum { TEXT_WORDS_BYTES_MAX = 1024 };

/* Any text without these n words, which are ASCII and not empty; more than TEXT_WORDS_BYTES_MAX bytes of them
 * fail. */
int32_t text_without(struct rules *r, const char *const *words, size_t n);
#endif
