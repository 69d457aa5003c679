/* JSON as answers write it: RFC 8259, with blanks bounded so that a model cannot go on with them for ever:
 * after { [ and , and before } and ] nothing, one space, or a newline and at most 40 spaces or 10 tabs; after
 * : at most one space; none elsewhere. Numbers: at most 18 digits before and 18 after the point, exponents of
 * at most two digits. Strings: UTF-8 or any escape that is a character (no lone surrogate). */
#ifndef GRAMMAR_JSON_H
#define GRAMMAR_JSON_H
#include "grammar/rules.h"
#include <jansson.h>

enum { JSON_DIGITS = 18 };

/* Rules. */
struct json {
    int32_t space, comma, colon, character, string, integer, number, value, object, array;
};

void json_rules(struct rules *r, struct json *j);
/* open ... close around a list of things; `list` is not empty; may_be_empty: open close is fine as well. */
int32_t json_brackets(struct rules *r, const struct json *j, const char *open, int32_t list,
                      const char *close, bool may_be_empty);
/* A text as a JSON string, with quotes, in its shortest form. */
int32_t json_text(struct rules *r, const char *text, size_t n);
/* A value in its shortest form, with the blanks of above. Nesting over 64: fails. */
int32_t json_value(struct rules *r, const struct json *j, const json_t *value);
#endif
