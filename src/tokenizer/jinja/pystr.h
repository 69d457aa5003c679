/* Python's str on borrowed UTF-8: what strip takes for whitespace, positions in code points. */
#ifndef TOKENIZER_JINJA_PYSTR_H
#define TOKENIZER_JINJA_PYSTR_H
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

/* Borrowed bytes; may hold NUL. */
struct span {
    const char *at;
    size_t bytes;
};

static inline struct span span_of(const char *s)
{
    return (struct span){ s, strlen(s) };
}
static inline bool span_equal(struct span a, struct span b)
{
    return a.bytes == b.bytes && (a.bytes == 0 || memcmp(a.at, b.at, a.bytes) == 0);
}
static inline bool span_is(struct span a, const char *b)
{
    return span_equal(a, span_of(b));
}
static inline struct span span_from(struct span s, size_t begin)
{
    return (struct span){ s.at + begin, s.bytes - begin };
}

enum { PYSTR_LEFT = 1, PYSTR_RIGHT = 2 };
/* Without these characters at the chosen ends; chars.at NULL: without whitespace. */
struct span pystr_strip(struct span s, struct span chars, unsigned ends);
/* Bytes of the whitespace character (str.isspace) at the start of s, or 0. */
size_t pystr_space(struct span s);
bool pystr_starts(struct span s, struct span what);
bool pystr_ends(struct span s, struct span what);
/* Offset of the first `what` at or after `from`; s.bytes when there is none. An empty `what` is found at
 * `from`. */
size_t pystr_find(struct span s, struct span what, size_t from);
size_t pystr_length(struct span s);                   /* code points */
size_t pystr_offset(struct span s, size_t character); /* byte offset of a code point; s.bytes past the end */
bool pystr_is_ascii(struct span s);
#endif
