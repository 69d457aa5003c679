#include "tokenizer/unicode.h"
#include <stddef.h>

struct range {
    uint32_t first, last;
};
enum kind { LETTER, MARK, NUMBER };
struct later {
    uint32_t first, last;
    enum kind kind;
};

/* General categories L*, M*, N* of Unicode 15.0, 15.1 and 16.0 less those of 14.0. */
static const struct later later[] = {
    { 0x0897, 0x0897, MARK },     { 0x0cf3, 0x0cf3, MARK },     { 0x0ece, 0x0ece, MARK },
    { 0x1c89, 0x1c8a, LETTER },   { 0xa7cb, 0xa7cd, LETTER },   { 0xa7da, 0xa7dc, LETTER },
    { 0x105c0, 0x105f3, LETTER }, { 0x10d40, 0x10d49, NUMBER }, { 0x10d4a, 0x10d65, LETTER },
    { 0x10d69, 0x10d6d, MARK },   { 0x10d6f, 0x10d85, LETTER }, { 0x10ec2, 0x10ec4, LETTER },
    { 0x10efc, 0x10eff, MARK },   { 0x1123f, 0x11240, LETTER }, { 0x11241, 0x11241, MARK },
    { 0x11380, 0x11389, LETTER }, { 0x1138b, 0x1138b, LETTER }, { 0x1138e, 0x1138e, LETTER },
    { 0x11390, 0x113b5, LETTER }, { 0x113b7, 0x113b7, LETTER }, { 0x113b8, 0x113c0, MARK },
    { 0x113c2, 0x113c2, MARK },   { 0x113c5, 0x113c5, MARK },   { 0x113c7, 0x113ca, MARK },
    { 0x113cc, 0x113d0, MARK },   { 0x113d1, 0x113d1, LETTER }, { 0x113d2, 0x113d2, MARK },
    { 0x113d3, 0x113d3, LETTER }, { 0x113e1, 0x113e2, MARK },   { 0x116d0, 0x116e3, NUMBER },
    { 0x11bc0, 0x11be0, LETTER }, { 0x11bf0, 0x11bf9, NUMBER }, { 0x11f00, 0x11f01, MARK },
    { 0x11f02, 0x11f02, LETTER }, { 0x11f03, 0x11f03, MARK },   { 0x11f04, 0x11f10, LETTER },
    { 0x11f12, 0x11f33, LETTER }, { 0x11f34, 0x11f3a, MARK },   { 0x11f3e, 0x11f42, MARK },
    { 0x11f50, 0x11f59, NUMBER }, { 0x11f5a, 0x11f5a, MARK },   { 0x1342f, 0x1342f, LETTER },
    { 0x13440, 0x13440, MARK },   { 0x13441, 0x13446, LETTER }, { 0x13447, 0x13455, MARK },
    { 0x13460, 0x143fa, LETTER }, { 0x16100, 0x1611d, LETTER }, { 0x1611e, 0x1612f, MARK },
    { 0x16130, 0x16139, NUMBER }, { 0x16d40, 0x16d6c, LETTER }, { 0x16d70, 0x16d79, NUMBER },
    { 0x18cff, 0x18cff, LETTER }, { 0x1b132, 0x1b132, LETTER }, { 0x1b155, 0x1b155, LETTER },
    { 0x1ccf0, 0x1ccf9, NUMBER }, { 0x1d2c0, 0x1d2d3, NUMBER }, { 0x1df25, 0x1df2a, LETTER },
    { 0x1e030, 0x1e06d, LETTER }, { 0x1e08f, 0x1e08f, MARK },   { 0x1e4d0, 0x1e4eb, LETTER },
    { 0x1e4ec, 0x1e4ef, MARK },   { 0x1e4f0, 0x1e4f9, NUMBER }, { 0x1e5d0, 0x1e5ed, LETTER },
    { 0x1e5ee, 0x1e5ef, MARK },   { 0x1e5f0, 0x1e5f0, LETTER }, { 0x1e5f1, 0x1e5fa, NUMBER },
    { 0x2b739, 0x2b739, LETTER }, { 0x2ebf0, 0x2ee5d, LETTER }, { 0x31350, 0x323af, LETTER },
};

/* Characters newer than Unicode 9 with a combining class, or with a part in a canonical composition; up to
 * Unicode 18. */
static const struct range barriers[] = {
    { 0x05c8, 0x05c9 },   { 0x07fd, 0x07fd },   { 0x0897, 0x089f },   { 0x08ca, 0x08d3 },
    { 0x09fe, 0x09fe },   { 0x0c3c, 0x0c3c },   { 0x0d3b, 0x0d3c },   { 0x0eba, 0x0eba },
    { 0x1715, 0x1715 },   { 0x1abf, 0x1af0 },   { 0x1df6, 0x1dfa },   { 0xa82c, 0xa82c },
    { 0x105c9, 0x105e4 }, { 0x10d24, 0x10d27 }, { 0x10d69, 0x10d6d }, { 0x10eab, 0x10eac },
    { 0x10ecb, 0x10ecf }, { 0x10ef0, 0x10efb }, { 0x10efd, 0x10eff }, { 0x10f46, 0x10f50 },
    { 0x10f82, 0x10f85 }, { 0x11070, 0x11070 }, { 0x1133b, 0x1133b }, { 0x11380, 0x113d0 },
    { 0x1145e, 0x1145e }, { 0x11839, 0x1183a }, { 0x11930, 0x11938 }, { 0x1193d, 0x1193e },
    { 0x11943, 0x11943 }, { 0x119e0, 0x119e0 }, { 0x11a34, 0x11a34 }, { 0x11a47, 0x11a47 },
    { 0x11a99, 0x11a99 }, { 0x11d42, 0x11d42 }, { 0x11d44, 0x11d45 }, { 0x11d97, 0x11d97 },
    { 0x11f41, 0x11f42 }, { 0x1611e, 0x16129 }, { 0x1612f, 0x1612f }, { 0x16d63, 0x16d6a },
    { 0x16ff0, 0x16ff1 }, { 0x1d127, 0x1d128 }, { 0x1d250, 0x1d252 }, { 0x1d25b, 0x1d25c },
    { 0x1d25f, 0x1d25f }, { 0x1d280, 0x1d281 }, { 0x1e08f, 0x1e08f }, { 0x1e130, 0x1e136 },
    { 0x1e2ae, 0x1e2ae }, { 0x1e2ec, 0x1e2ef }, { 0x1e4ec, 0x1e4ef }, { 0x1e5ee, 0x1e5ef },
    { 0x1e6e3, 0x1e6e3 }, { 0x1e6e6, 0x1e6e6 }, { 0x1e6ee, 0x1e6ef }, { 0x1e6f5, 0x1e6f5 },
};

/* The large blocks of text in use, so that the tables above are searched for rare characters only. */
static const struct range plain[] = {
    { 0x0000, 0x02ff },   /* Latin */
    { 0x0388, 0x0482 },   /* Greek, Cyrillic */
    { 0x048a, 0x0590 },   /* Cyrillic, Armenian */
    { 0x05d0, 0x05ea },   /* Hebrew letters */
    { 0x0620, 0x064a },   /* Arabic letters */
    { 0x0671, 0x06d5 },   /* Arabic letters */
    { 0x0904, 0x0927 },   /* Devanagari letters */
    { 0x0e01, 0x0e37 },   /* Thai */
    { 0x1e00, 0x1f70 },   /* Latin, Greek */
    { 0x2002, 0x20cf },   /* punctuation, currency */
    { 0x212c, 0x2328 },   /* letterlike, arrows, mathematics */
    { 0x232b, 0x2adb },   /* technical, boxes, dingbats */
    { 0x2e00, 0x3029 },   /* punctuation, radicals */
    { 0x3030, 0x3098 },   /* Hiragana */
    { 0x309b, 0xa66e },   /* Katakana, CJK */
    { 0xac00, 0xf8ff },   /* Hangul */
    { 0xfe30, 0x101fc },  /* full and half width, ... */
    { 0x1f000, 0x1ffff }, /* emoji */
};

static bool range_holds(const struct range *r, size_t n, uint32_t c)
{
    size_t low = 0;
    while (n > 0) {
        size_t half = n / 2;
        if (r[low + half].last < c)
            low += half + 1, n -= half + 1;
        else if (r[low + half].first > c)
            n = half;
        else
            return true;
    }
    return false;
}

bool unicode_is_plain(uint32_t c)
{
    return c < 0x300 || range_holds(plain, sizeof plain / sizeof *plain, c);
}

bool unicode_is_nfc_barrier(uint32_t c)
{
    return c >= barriers[0].first && range_holds(barriers, sizeof barriers / sizeof *barriers, c);
}

uint32_t unicode_stand_in(uint32_t c)
{
    static const uint32_t of_three_bytes[] = { [LETTER] = 0x4e00, [MARK] = 0x20d0, [NUMBER] = 0x2460 };
    static const uint32_t of_four_bytes[] = { [LETTER] = 0x20000, [MARK] = 0x1d165, [NUMBER] = 0x1d7ce };
    size_t low = 0, n = sizeof later / sizeof *later;
    while (n > 0) {
        size_t half = n / 2;
        const struct later *l = &later[low + half];
        if (l->last < c)
            low += half + 1, n -= half + 1;
        else if (l->first > c)
            n = half;
        else
            return c < 0x10000 ? of_three_bytes[l->kind] : of_four_bytes[l->kind];
    }
    return c;
}
