/* A grammar while it is written down: rules, each an expression over bytes and other rules. Front ends
 * (regex, schema, EBNF, tool calls) build one, rules_compile() makes the automaton. The first failure is kept
 * in r->e and everything after it does nothing, so front ends check once. Expressions are numbers: handles
 * into r, valid until rules_deinit. */
#ifndef GRAMMAR_RULES_H
#define GRAMMAR_RULES_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RULES_DEPTH_MAX = 1000, RULES_REPEAT_MAX = 65536 };

enum expr_kind { EXPR_NONE, EXPR_EMPTY, EXPR_RANGE, EXPR_BYTES, EXPR_SEQ, EXPR_ALT, EXPR_REPEAT, EXPR_CALL };

struct expr {
    uint8_t kind;
    uint16_t depth;
    int32_t a, b, c; /* RANGE: low, high. BYTES: first of r->bytes, how many. SEQ, ALT: first of r->parts, how
                        many. REPEAT: what, least, most (-1: any number). CALL: the rule */
};

struct rule {
    char *name; /* for messages; owned */
    int32_t body;
};

struct chars_known; /* classes of characters that are rules already, chars.c */

struct rules {
    struct err *e;
    bool failed;
    struct expr *exprs;
    int32_t *parts;
    char *bytes;
    struct rule *rules;
    struct chars_known *chars;
    int64_t n_exprs, n_parts, n_bytes, n_rules, n_chars;
    int64_t exprs_room, parts_room, bytes_room, rules_room, chars_room;
};

void rules_init(struct rules *r, struct err *e);
void rules_deinit(struct rules *r);
/* Keeps the first failure. Return false. */
bool rules_fail(struct rules *r, enum err_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Room for `more` items after n; false: out of memory, *items as before. */
bool rules_room(void *items, int64_t n, int64_t *room, int64_t more, size_t each);

int32_t expr_none(struct rules *r);                     /* matches nothing at all */
int32_t expr_empty(struct rules *r);                    /* matches the empty text */
int32_t expr_range(struct rules *r, int low, int high); /* one byte */
int32_t expr_bytes(struct rules *r, const char *bytes, size_t n);
int32_t expr_text(struct rules *r, const char *text);
int32_t expr_seq(struct rules *r, const int32_t *parts, size_t n);
int32_t expr_alt(struct rules *r, const int32_t *parts, size_t n);
int32_t expr_repeat(struct rules *r, int32_t what, int64_t least, int64_t most); /* most -1: no limit */
int32_t expr_call(struct rules *r, int32_t rule);
/* One of these texts, common beginnings shared. Sorts the array; texts are borrowed for the call. */
struct expr_literal {
    const char *bytes;
    size_t n;
};
int32_t expr_literals(struct rules *r, struct expr_literal *texts, size_t n);

#define SEQ(r, ...)                                                                                          \
    expr_seq(r, (const int32_t[]){ __VA_ARGS__ }, sizeof((const int32_t[]){ __VA_ARGS__ }) / sizeof(int32_t))
#define ALT(r, ...)                                                                                          \
    expr_alt(r, (const int32_t[]){ __VA_ARGS__ }, sizeof((const int32_t[]){ __VA_ARGS__ }) / sizeof(int32_t))
#define OPTIONAL(r, what) expr_repeat(r, what, 0, 1)

/* A list of expressions that grows. */
struct expr_list {
    int32_t *items;
    int64_t n, room;
};
void expr_list_add(struct rules *r, struct expr_list *l, int32_t item);
int32_t expr_list_seq(struct rules *r, struct expr_list *l); /* both empty the list */
int32_t expr_list_alt(struct rules *r, struct expr_list *l);

int32_t rules_declare(struct rules *r, const char *name); /* a rule whose body comes later */
void rules_define(struct rules *r, int32_t rule, int32_t body);
int32_t rules_add(struct rules *r, const char *name, int32_t body);

struct grammar;
/* ERR_ARGUMENT: nothing matches, or a rule begins with itself. ERR_LIMIT: too large. */
bool rules_compile(struct grammar **out, struct rules *r, int32_t start);
#endif
