/* Sets of Unicode characters, and how they are written: as UTF-8, or inside of a JSON string. Surrogates are
 * never members. */
#ifndef GRAMMAR_CHARS_H
#define GRAMMAR_CHARS_H
#include "grammar/rules.h"

struct char_range {
    uint32_t low, high;
};

struct chars {
    struct char_range *ranges; /* after chars_settle: ascending, apart, without surrogates */
    int64_t n, room;
};

enum chars_form {
    CHARS_RAW,    /* UTF-8 */
    CHARS_TAGGED, /* UTF-8, without <, which may begin a tag */
    CHARS_JSON, /* inside of a JSON string: what must be escaped is, in its shortest form; the rest is not */
};

void chars_add(struct rules *r, struct chars *c, uint32_t low, uint32_t high);
void chars_settle(struct rules *r, struct chars *c);
void chars_complement(struct rules *r, struct chars *c);
void chars_remove(struct rules *r, struct chars *c, uint32_t low, uint32_t high);
void chars_free(struct chars *c);
/* One character of the set; settles it. Equal sets become one rule. */
int32_t chars_expr(struct rules *r, struct chars *c, enum chars_form form);
int32_t chars_any(struct rules *r, enum chars_form form);
/* A text, character by character. Not UTF-8: fails. */
int32_t chars_text(struct rules *r, const char *text, size_t n, enum chars_form form);
void chars_forget(struct rules *r);

int chars_put(char *out, uint32_t c); /* UTF-8 of c: up to 4 bytes; returns how many */
/* The character at text, n > 0 bytes; its length, 0: not UTF-8. */
int chars_get(const char *text, size_t n, uint32_t *c);
#endif
