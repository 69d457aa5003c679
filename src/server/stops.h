/* Stop strings in a text that arrives in pieces. What may yet turn out to begin one is held back; however the
 * text is cut, the result is the same: the string that is complete first ends the text, of several that end
 * at one byte the longest. */
#ifndef SERVER_STOPS_H
#define SERVER_STOPS_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>

struct stops;
struct stop_string {
    const char *text; /* borrow */
    size_t n;         /* 1 or more */
};
bool stops_create(struct stops **out, const struct stop_string *strings, int n, struct err *e);
void stops_free(struct stops *s); /* NULL is fine */

/* Takes a piece; *out is text that is certain now, valid until the next call, its length is returned. *found:
 * the string that ended the text, which the text is without; -1: none yet. After one was found nothing may be
 * pushed. */
size_t stops_push(struct stops *s, const char *text, size_t n, const char **out, int *found);
/* The same without looking for any. */
size_t stops_pass(struct stops *s, const char *text, size_t n, const char **out);
/* What was held back, once no more text comes. */
size_t stops_finish(struct stops *s, const char **out);
#endif
