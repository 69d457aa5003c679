/* UTF-8 one character at a time (Unicode table 3-7: no surrogates, no overlong forms, nothing above
 * U+10FFFF). */
#ifndef TOKENIZER_UTF8_H
#define TOKENIZER_UTF8_H
#include <stddef.h>
#include <stdint.h>

/* What begins at s: 1 to 4 is a character of so many bytes; 0 means that all n bytes are the beginning of one
 * (also n = 0); -k means that k bytes form a maximal subpart that can never become one. */
int utf8_scan(const unsigned char *s, size_t n);
/* The code point of a character of 1 to 4 bytes that utf8_scan accepted. */
uint32_t utf8_get(const unsigned char *s, int length);
int utf8_put(char *out, uint32_t c); /* out: up to 4 bytes; returns how many */
/* Length of the longest well-formed prefix; equals bytes for UTF-8. */
size_t utf8_valid_prefix(const char *text, size_t bytes);
/* Length of the longest prefix of ASCII bytes. */
size_t utf8_ascii_prefix(const char *text, size_t bytes);

/* Length from the first byte, and code point, in text known to be UTF-8. */
static inline int utf8_length(unsigned char first)
{
    return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}
#endif
