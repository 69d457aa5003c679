#include "tokenizer/utf8.h"
#include <string.h>

/* The range of the second byte is narrower after E0 and F0 (overlong), ED (surrogates) and F4 (past
 * U+10FFFF). */
static int second_is_good(unsigned char first, unsigned char second)
{
    unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    return second >= low && second <= high;
}

int utf8_scan(const unsigned char *s, size_t n)
{
    if (n == 0) return 0;
    if (s[0] < 0x80) return 1;
    if (s[0] < 0xc2 || s[0] > 0xf4) return -1;
    int length = utf8_length(s[0]);
    if (n == 1) return 0;
    if (!second_is_good(s[0], s[1])) return -1;
    for (int i = 2; i < length; i++) {
        if ((size_t)i == n) return 0;
        if ((s[i] & 0xc0) != 0x80) return -i;
    }
    return length;
}

uint32_t utf8_get(const unsigned char *s, int length)
{
    switch (length) {
    case 1: return s[0];
    case 2: return (s[0] & 0x1fu) << 6 | (s[1] & 0x3fu);
    case 3: return (s[0] & 0x0fu) << 12 | (s[1] & 0x3fu) << 6 | (s[2] & 0x3fu);
    default: return (s[0] & 0x07u) << 18 | (s[1] & 0x3fu) << 12 | (s[2] & 0x3fu) << 6 | (s[3] & 0x3fu);
    }
}

int utf8_put(char *out, uint32_t c)
{
    int length = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char lead[] = { 0, 0, 0xc0, 0xe0, 0xf0 };
    for (int i = length - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (c & 0x3f));
        c >>= 6;
    }
    out[0] = (char)(lead[length] | c);
    return length;
}

size_t utf8_ascii_prefix(const char *text, size_t bytes)
{
    size_t at = 0;
    for (uint64_t word; bytes - at >= sizeof word; at += sizeof word) {
        memcpy(&word, text + at, sizeof word);
        if (word & 0x8080808080808080u) break;
    }
    while (at < bytes && (unsigned char)text[at] < 0x80) at++;
    return at;
}

size_t utf8_valid_prefix(const char *text, size_t bytes)
{
    size_t at = 0;
    while (at < bytes) {
        if ((unsigned char)text[at] < 0x80) {
            at += utf8_ascii_prefix(text + at, bytes - at);
            continue;
        }
        int length = utf8_scan((const unsigned char *)text + at, bytes - at);
        if (length <= 0) break;
        at += (size_t)length;
    }
    return at;
}
