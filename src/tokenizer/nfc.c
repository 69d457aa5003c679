/* Most text is left alone by NFC and only looked at: a run of plain characters is never copied. What is not
 * plain is normalised in segments: the plain character before it (which may compose with it) up to the next
 * plain one.
 *
 * utf8proc gives decompositions and compositions, but not the order of marks: utf8proc_decompose() sorts them
 * by exchanging neighbours, which is quadratic, and a prompt may hold a million marks in a row. */
#include "tokenizer/nfc.h"
#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

enum { DECOMPOSED_MAX = 4, ORDERS = 256 }; /* no character has a longer canonical decomposition */

static bool grow_text(struct nfc *n, size_t more, struct err *e)
{
    if (n->capacity - n->bytes >= more) return true;
    size_t capacity = 2 * n->capacity + more + 256;
    char *text = realloc(n->text, capacity);
    if (!text) return err_memory(e, "normalised text", capacity);
    n->text = text;
    n->capacity = capacity;
    return true;
}

static bool append(struct nfc *n, const char *text, size_t bytes, struct err *e)
{
    if (!grow_text(n, bytes, e)) return false;
    if (bytes > 0) memcpy(n->text + n->bytes, text, bytes);
    n->bytes += bytes;
    return true;
}

/* The three arrays of a segment have one capacity, so a failure leaves it as it was. */
static bool grow_chars(struct nfc *n, struct err *e)
{
    if (n->chars_capacity - n->n_chars >= DECOMPOSED_MAX) return true;
    size_t capacity = 2 * n->chars_capacity + 64;
    struct nfc_char *chars = realloc(n->chars, capacity * sizeof *chars);
    if (chars) n->chars = chars;
    struct nfc_char *sorted = realloc(n->sorted, capacity * sizeof *sorted);
    if (sorted) n->sorted = sorted;
    int32_t *codes = realloc(n->codes, (capacity + 1) * sizeof *codes); /* utf8proc may write a terminator */
    if (codes) n->codes = codes;
    if (!chars || !sorted || !codes) return err_memory(e, "characters", capacity * sizeof *chars);
    n->chars_capacity = capacity;
    return true;
}

static bool decompose(struct nfc *n, const char *text, size_t bytes, struct err *e)
{
    n->n_chars = 0;
    for (size_t at = 0; at < bytes;) {
        const unsigned char *s = (const unsigned char *)text + at;
        int length = utf8_length(*s), boundary = 0;
        int32_t parts[DECOMPOSED_MAX];
        utf8proc_ssize_t n_parts =
            utf8proc_decompose_char((int32_t)utf8_get(s, length), parts, DECOMPOSED_MAX,
                                    UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, &boundary);
        if (n_parts < 1 || n_parts > DECOMPOSED_MAX)
            return err_set(e, ERR_UNSUPPORTED, "utf8proc cannot decompose U+%04X",
                           (unsigned)utf8_get(s, length));
        if (!grow_chars(n, e)) return false;
        for (utf8proc_ssize_t i = 0; i < n_parts; i++) {
            const utf8proc_property_t *p = utf8proc_get_property(parts[i]);
            n->chars[n->n_chars++] = (struct nfc_char){ parts[i], (uint8_t)p->combining_class };
        }
        at += (size_t)length;
    }
    return true;
}

/* Stable, by combining class. A few marks: insertion; many: one pass of counting. */
static void sort_marks(struct nfc_char *c, struct nfc_char *spare, size_t n)
{
    if (n <= 32) {
        for (size_t i = 1; i < n; i++) {
            struct nfc_char moved = c[i];
            size_t j = i;
            for (; j > 0 && c[j - 1].order > moved.order; j--) c[j] = c[j - 1];
            c[j] = moved;
        }
        return;
    }
    size_t begin[ORDERS + 1] = { 0 };
    for (size_t i = 0; i < n; i++) begin[c[i].order + 1]++;
    for (size_t i = 1; i < ORDERS; i++) begin[i] += begin[i - 1];
    for (size_t i = 0; i < n; i++) spare[begin[c[i].order]++] = c[i];
    memcpy(c, spare, n * sizeof *c);
}

static bool normalize_segment(struct nfc *n, const char *text, size_t bytes, struct err *e)
{
    if (!decompose(n, text, bytes, e)) return false;
    for (size_t i = 0; i < n->n_chars;) {
        size_t end = i + 1;
        if (n->chars[i].order > 0) {
            while (end < n->n_chars && n->chars[end].order > 0) end++;
            sort_marks(n->chars + i, n->sorted, end - i);
        }
        i = end;
    }
    for (size_t i = 0; i < n->n_chars; i++) n->codes[i] = n->chars[i].code;
    utf8proc_ssize_t n_codes =
        utf8proc_normalize_utf32(n->codes, (utf8proc_ssize_t)n->n_chars, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    if (n_codes < 0) return err_set(e, ERR_UNSUPPORTED, "utf8proc: %s", utf8proc_errmsg(n_codes));
    if (!grow_text(n, 4 * (size_t)n_codes, e)) return false;
    for (utf8proc_ssize_t i = 0; i < n_codes; i++)
        n->bytes += (size_t)utf8_put(n->text + n->bytes, (uint32_t)n->codes[i]);
    return true;
}

/* The next part of text that may need work, [*begin, *end) at or after *at, plain character before it
 * included. False when there is none. */
static bool next_segment(struct nfc *n, const char *text, size_t bytes, size_t at, size_t *begin, size_t *end)
{
    size_t before = at; /* where the segment would begin: the last character that may compose, else here */
    bool found = false;
    while (at < bytes) {
        size_t ascii = found ? 0 : utf8_ascii_prefix(text + at, bytes - at);
        if (ascii > 0) {
            at += ascii;
            before = at - 1;
            continue;
        }
        const unsigned char *s = (const unsigned char *)text + at;
        int length = utf8_length(*s);
        uint32_t c = utf8_get(s, length);
        bool is_plain = unicode_is_plain(c), is_barrier = !is_plain && unicode_is_nfc_barrier(c);
        if (!is_plain && unicode_stand_in(c) != c) n->has_later = true;
        if (found && (is_plain || is_barrier)) break;
        if (!found && !is_plain && !is_barrier) {
            found = true;
            *begin = before;
        }
        if (!found) before = is_plain ? at : at + (size_t)length;
        at += (size_t)length;
    }
    *end = at;
    return found;
}

bool nfc_normalize(struct nfc *n, const char **text, size_t *bytes, struct err *e)
{
    const char *in = *text;
    size_t copied = 0, begin = 0, end = 0, at = 0;
    n->bytes = 0;
    n->has_later = false;
    while (next_segment(n, in, *bytes, at, &begin, &end)) {
        if (!append(n, in + copied, begin - copied, e)) return false;
        if (!normalize_segment(n, in + begin, end - begin, e)) return false;
        copied = at = end;
    }
    if (copied == 0) return true;
    if (!append(n, in + copied, *bytes - copied, e)) return false;
    *text = n->text;
    *bytes = n->bytes;
    return true;
}

void nfc_deinit(struct nfc *n)
{
    free(n->text);
    free(n->chars);
    free(n->sorted);
    free(n->codes);
    *n = (struct nfc){ 0 };
}
