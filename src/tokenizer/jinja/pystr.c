#include "tokenizer/jinja/pystr.h"
#include "tokenizer/utf8.h"

size_t pystr_space(struct span s)
{
    static const char wide[][4] = { "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\xa8",
                                    "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80" };
    if (s.bytes == 0) return 0;
    unsigned char c = (unsigned char)s.at[0];
    if (c < 0x80) return c == ' ' || (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x1f);
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (pystr_starts(s, span_of(wide[i]))) return strlen(wide[i]);
    bool is_general = pystr_starts(s, span_of("\xe2\x80")) && s.bytes >= 3; /* U+2000 to 200A */
    return is_general && (unsigned char)s.at[2] >= 0x80 && (unsigned char)s.at[2] <= 0x8a ? 3 : 0;
}

/* Bytes of the character at the start of s when it is to be stripped. */
static size_t strips(struct span s, struct span chars)
{
    if (!chars.at) return pystr_space(s);
    if (s.bytes == 0) return 0;
    size_t n = (size_t)utf8_length((unsigned char)s.at[0]);
    if (n > s.bytes) n = s.bytes;
    bool listed = chars.bytes > 0 && memmem(chars.at, chars.bytes, s.at, n);
    return listed ? n : 0;
}

/* The same at the end. UTF-8 synchronizes itself: no tail of another character looks like one. */
static size_t strips_at_end(struct span s, struct span chars)
{
    for (size_t n = 1; n <= 4 && n <= s.bytes; n++) {
        struct span last = span_from(s, s.bytes - n);
        if ((last.at[0] & 0xc0) == 0x80) continue;
        return strips(last, chars) == n ? n : 0;
    }
    return 0;
}

struct span pystr_strip(struct span s, struct span chars, unsigned ends)
{
    size_t n;
    if (ends & PYSTR_LEFT)
        while ((n = strips(s, chars)) > 0) s = span_from(s, n);
    if (ends & PYSTR_RIGHT)
        while ((n = strips_at_end(s, chars)) > 0) s.bytes -= n;
    return s;
}

bool pystr_starts(struct span s, struct span what)
{
    return s.bytes >= what.bytes && span_equal((struct span){ s.at, what.bytes }, what);
}

bool pystr_ends(struct span s, struct span what)
{
    return s.bytes >= what.bytes && span_equal(span_from(s, s.bytes - what.bytes), what);
}

size_t pystr_find(struct span s, struct span what, size_t from)
{
    if (what.bytes == 0) return from;
    const char *at = s.bytes > from ? memmem(s.at + from, s.bytes - from, what.at, what.bytes) : NULL;
    return at ? (size_t)(at - s.at) : s.bytes;
}

size_t pystr_length(struct span s)
{
    size_t n = 0;
    for (size_t i = 0; i < s.bytes; i++) n += (s.at[i] & 0xc0) != 0x80;
    return n;
}

size_t pystr_offset(struct span s, size_t character)
{
    for (size_t i = 0; i < s.bytes; i++)
        if ((s.at[i] & 0xc0) != 0x80 && character-- == 0) return i;
    return s.bytes;
}

bool pystr_is_ascii(struct span s)
{
    return utf8_ascii_prefix(s.at, s.bytes) == s.bytes;
}
