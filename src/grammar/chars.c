#include "grammar/chars.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RANGES_MAX = 100000, LAST = 0x10ffff };

struct chars_known {
    struct chars set;
    enum chars_form form;
    int32_t rule;
};

int chars_put(char *out, uint32_t c)
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

int chars_get(const char *text, size_t n, uint32_t *c)
{
    const unsigned char *s = (const unsigned char *)text;
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    int length = s[0] < 0x80 ? 1 : s[0] < 0xc0 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf8 ? 4 : 0;
    if (length == 0 || (size_t)length > n) return 0;
    *c = length == 1 ? s[0] : s[0] & (0xffu >> (length + 1));
    for (int i = 1; i < length; i++) {
        if ((s[i] & 0xc0) != 0x80) return 0;
        *c = *c << 6 | (s[i] & 0x3f);
    }
    return *c < least[length] || *c > LAST || (*c >= 0xd800 && *c < 0xe000) ? 0 : length;
}

void chars_free(struct chars *c)
{
    free(c->ranges);
    *c = (struct chars){ 0 };
}

void chars_forget(struct rules *r)
{
    for (int64_t i = 0; i < r->n_chars; i++) chars_free(&r->chars[i].set);
    free(r->chars);
}

void chars_add(struct rules *r, struct chars *c, uint32_t low, uint32_t high)
{
    if (r->failed) return;
    if (c->n >= RANGES_MAX)
        rules_fail(r, ERR_LIMIT, "a set of characters has more than %d ranges", RANGES_MAX);
    else if (!rules_room(&c->ranges, c->n, &c->room, 1, sizeof *c->ranges))
        rules_fail(r, ERR_MEMORY, "no memory for a grammar");
    else
        c->ranges[c->n++] = (struct char_range){ low, high };
}

static int compare(const void *x, const void *y)
{
    const struct char_range *a = x, *b = y;
    return a->low < b->low ? -1 : a->low > b->low;
}

static void unite(struct chars *c)
{
    if (c->n) qsort(c->ranges, (size_t)c->n, sizeof *c->ranges, compare);
    int64_t n = 0;
    for (int64_t i = 0; i < c->n; i++) {
        struct char_range g = c->ranges[i];
        if (n && g.low <= c->ranges[n - 1].high + 1) {
            if (g.high > c->ranges[n - 1].high) c->ranges[n - 1].high = g.high;
        } else
            c->ranges[n++] = g;
    }
    c->n = n;
}

/* Leaves [low, high] out of a united set. */
static void cut(struct rules *r, struct chars *c, uint32_t low, uint32_t high)
{
    int64_t n = c->n;
    for (int64_t i = 0; i < n && !r->failed; i++) {
        struct char_range g = c->ranges[i];
        if (g.high < low || g.low > high) continue;
        if (g.high > high) chars_add(r, c, high + 1, g.high);
        if (g.low < low)
            c->ranges[i].high = low - 1;
        else
            c->ranges[i] = (struct char_range){ 1, 0 };
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < c->n; i++)
        if (c->ranges[i].low <= c->ranges[i].high) c->ranges[kept++] = c->ranges[i];
    c->n = kept;
    unite(c);
}

void chars_settle(struct rules *r, struct chars *c)
{
    unite(c);
    cut(r, c, 0xd800, 0xdfff);
}

void chars_remove(struct rules *r, struct chars *c, uint32_t low, uint32_t high)
{
    unite(c);
    cut(r, c, low, high);
}

void chars_complement(struct rules *r, struct chars *c)
{
    unite(c);
    struct chars out = { 0 };
    uint32_t next = 0;
    for (int64_t i = 0; i < c->n; i++) {
        if (c->ranges[i].low > next) chars_add(r, &out, next, c->ranges[i].low - 1);
        next = c->ranges[i].high + 1;
    }
    if (next <= LAST) chars_add(r, &out, next, LAST);
    chars_free(c);
    *c = out;
    chars_settle(r, c);
}

/* Characters low to high, of one length in UTF-8, as sequences of byte ranges. Where the first bytes differ,
 * the span is cut so that every piece but the outer ones is a full block below its first byte. */
static void utf8_spans(struct rules *r, struct expr_list *out, uint32_t low, uint32_t high)
{
    char a[4], b[4];
    int n = chars_put(a, low);
    chars_put(b, high);
    for (int i = 1; i < n; i++) {
        uint32_t block = (1u << 6 * i) - 1;
        if ((low & ~block) == (high & ~block)) continue;
        if (low & block) {
            utf8_spans(r, out, low, low | block);
            utf8_spans(r, out, (low | block) + 1, high);
            return;
        }
        if ((high & block) != block) {
            utf8_spans(r, out, low, (high & ~block) - 1);
            utf8_spans(r, out, high & ~block, high);
            return;
        }
    }
    int32_t parts[4];
    for (int i = 0; i < n; i++) parts[i] = expr_range(r, (unsigned char)a[i], (unsigned char)b[i]);
    expr_list_add(r, out, expr_seq(r, parts, (size_t)n));
}

static void utf8_range(struct rules *r, struct expr_list *out, uint32_t low, uint32_t high)
{
    static const uint32_t ends[] = { 0x7f, 0x7ff, 0xffff, LAST };
    for (int i = 0; i < 4 && low <= high; i++) {
        if (low > ends[i]) continue;
        uint32_t end = high < ends[i] ? high : ends[i];
        utf8_spans(r, out, low, end);
        low = end + 1;
    }
}

static void escape(struct rules *r, struct expr_list *out, uint32_t c)
{
    static const char shorts[] = "\"\"\\\\\bb\ff\nn\rr\tt";
    char text[8];
    for (size_t i = 0; i < sizeof shorts - 1; i += 2)
        if ((uint32_t)shorts[i] == c) {
            snprintf(text, sizeof text, "\\%c", shorts[i + 1]);
            expr_list_add(r, out, expr_text(r, text));
            return;
        }
    snprintf(text, sizeof text, "\\u00%02x", c & 0xff);
    expr_list_add(r, out, expr_text(r, text));
}

static bool holds(const struct chars *set, uint32_t c)
{
    for (int64_t i = 0; i < set->n; i++)
        if (c >= set->ranges[i].low && c <= set->ranges[i].high) return true;
    return false;
}

static int32_t write_set(struct rules *r, const struct chars *set, enum chars_form form)
{
    struct expr_list out = { 0 };
    struct chars raw = { 0 };
    for (int64_t i = 0; i < set->n; i++) chars_add(r, &raw, set->ranges[i].low, set->ranges[i].high);
    if (form == CHARS_TAGGED) chars_remove(r, &raw, '<', '<');
    if (form == CHARS_JSON) {
        for (uint32_t c = 0; c <= '\\'; c++)
            if ((c < 0x20 || c == '"' || c == '\\') && holds(set, c)) escape(r, &out, c);
        chars_remove(r, &raw, 0, 0x1f);
        chars_remove(r, &raw, '"', '"');
        chars_remove(r, &raw, '\\', '\\');
    }
    for (int64_t i = 0; i < raw.n && !r->failed; i++)
        utf8_range(r, &out, raw.ranges[i].low, raw.ranges[i].high);
    chars_free(&raw);
    return expr_list_alt(r, &out);
}

static bool same(const struct chars *a, const struct chars *b)
{
    return a->n == b->n && (a->n == 0 || memcmp(a->ranges, b->ranges, (size_t)a->n * sizeof *a->ranges) == 0);
}

int32_t chars_expr(struct rules *r, struct chars *c, enum chars_form form)
{
    chars_settle(r, c);
    if (r->failed) return 0;
    if (c->n == 0) return expr_none(r);
    if (c->n == 1 && c->ranges[0].high < 0x80 && form == CHARS_RAW)
        return expr_range(r, (int)c->ranges[0].low, (int)c->ranges[0].high);
    if (c->n == 1 && c->ranges[0].low == c->ranges[0].high) return write_set(r, c, form);
    for (int64_t i = 0; i < r->n_chars; i++)
        if (r->chars[i].form == form && same(&r->chars[i].set, c)) return expr_call(r, r->chars[i].rule);
    if (!rules_room(&r->chars, r->n_chars, &r->chars_room, 1, sizeof *r->chars)) {
        rules_fail(r, ERR_MEMORY, "no memory for a grammar");
        return 0;
    }
    struct chars_known known = { .form = form };
    for (int64_t i = 0; i < c->n; i++) chars_add(r, &known.set, c->ranges[i].low, c->ranges[i].high);
    known.rule = rules_add(r, "a set of characters", write_set(r, c, form));
    r->chars[r->n_chars++] = known;
    return expr_call(r, known.rule);
}

int32_t chars_any(struct rules *r, enum chars_form form)
{
    struct chars c = { 0 };
    chars_add(r, &c, 0, LAST);
    int32_t x = chars_expr(r, &c, form);
    chars_free(&c);
    return x;
}

int32_t chars_text(struct rules *r, const char *text, size_t n, enum chars_form form)
{
    struct expr_list parts = { 0 };
    for (size_t i = 0, from = 0; i <= n && !r->failed;) {
        uint32_t c = 0;
        bool is_plain = i < n && (form == CHARS_RAW ||
                                  ((unsigned char)text[i] >= 0x20 && text[i] != '"' && text[i] != '\\'));
        int length = i < n ? chars_get(text + i, n - i, &c) : 1;
        if (length == 0) {
            rules_fail(r, ERR_ARGUMENT, "byte %zu of a text is not UTF-8", i);
            break;
        }
        if (!is_plain) {
            expr_list_add(r, &parts, expr_bytes(r, text + from, i - from));
            if (i < n) escape(r, &parts, c);
            from = i + 1;
        }
        i += (size_t)length;
    }
    return expr_list_seq(r, &parts);
}
