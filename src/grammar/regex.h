/* Regular expressions as Python's re and ECMAScript share them: literals, . [...] [^...] \d \w \s (ASCII) and
 * their opposites, escapes, groups, | * + ? {n} {n,} {n,m}; lazy marks change nothing and are ignored. ^ and
 * $ only at the ends of the expression. What is not a regular language or not here (look-around, references,
 * \b, flags, \p) is refused with its offset. */
#ifndef GRAMMAR_REGEX_H
#define GRAMMAR_REGEX_H
#include "grammar/chars.h"

/* is_search: the expression may match anywhere in the text, as JSON schema's pattern; otherwise all of it. */
int32_t regex_expr(struct rules *r, const char *text, size_t n, enum chars_form form, bool is_search);
/* \xHH \uHHHH \UHHHHHHHH \u{H...}: *at is after the backslash and is moved on. False: it is not one. */
bool regex_code(const char *text, size_t n, size_t *at, uint32_t *c);
#endif
