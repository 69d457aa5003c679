/* Added tokens: strings that are one token wherever they stand in the raw text. */
#ifndef TOKENIZER_ADDED_H
#define TOKENIZER_ADDED_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct added_token {
    char *text; /* owned, NUL-terminated */
    size_t bytes;
    int32_t id;
    bool is_special;
};
struct added_set {
    struct added_token *tokens; /* ascending by bytes of text once sealed */
    size_t n, capacity;
    bool may_begin[256]; /* first bytes */
};

bool added_append(struct added_set *s, const char *text, size_t bytes, int32_t id, bool is_special,
                  struct err *e);
/* Sorts. One id with one text given twice becomes one token, the first; one id with two texts, or one text
 * with two ids, is an error. */
bool added_seal(struct added_set *s, struct err *e);
void added_deinit(struct added_set *s);

/* The token with exactly this text, or NULL. */
const struct added_token *added_find(const struct added_set *s, const char *text, size_t bytes);
/* The leftmost occurrence in text at or after `at`, the longest there: its place in *at. NULL: none, *at =
 * bytes. */
const struct added_token *added_next(const struct added_set *s, const char *text, size_t bytes, size_t *at);
#endif
