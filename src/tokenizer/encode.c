/* Text to ids. Each span between added tokens is normalised, cut by the Split expression and merged piece by
 * piece. */
#include "tokenizer/nfc.h"
#include "tokenizer/tokenizer_struct.h"
#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"
#include <stdlib.h>
#include <string.h>

enum {
    TEXT_MAX = 1 << 30,      /* NFC may make three times as much, and positions have 32 bits */
    CACHE_LOG2 = 12,         /* 4096 lines of 64 bytes: a share of the second-level cache */
    CACHE_FROM_BYTES = 4096, /* a short text repeats too little to pay for clearing it */
    KEY_BYTES = 24,
    KEPT_IDS = 9,
};

/* Pieces seen in this call, direct mapped: words repeat, and merging one costs more than finding it
 * (WikiText, 2022 symbols: 48 MB/s instead of 37). */
struct cache_line {
    unsigned char piece[KEY_BYTES]; /* zeros after it; the last byte is its length */
    int32_t n_ids;
    int32_t ids[KEPT_IDS];
};

struct work {
    const struct tokenizer *t;
    struct token_list *list;
    struct split_work split;
    struct nfc nfc;
    struct bpe_work bpe;
    struct cache_line *cache; /* NULL for short texts */
    char *view;               /* text with stand-ins */
    size_t view_capacity;
};

static bool list_room(struct token_list *list, size_t more, struct err *e)
{
    if (list->capacity - list->n >= more) return true;
    size_t capacity = 2 * list->capacity + more + 16;
    int32_t *ids = realloc(list->ids, capacity * sizeof *ids);
    if (!ids) return err_memory(e, "tokens", capacity * sizeof *ids);
    list->ids = ids;
    list->capacity = capacity;
    return true;
}

static bool merge_piece(struct work *w, const char *piece, size_t bytes, struct err *e)
{
    size_t n_ids = 0;
    if (!bpe_encode(&w->t->bpe, &w->bpe, (const unsigned char *)piece, bytes, w->list->ids + w->list->n,
                    &n_ids, e))
        return false;
    w->list->n += n_ids;
    return true;
}

static struct cache_line *line_of(struct cache_line *cache, const unsigned char key[KEY_BYTES])
{
    uint64_t a, b, c;
    memcpy(&a, key, 8);
    memcpy(&b, key + 8, 8);
    memcpy(&c, key + 16, 8);
    uint64_t mixed = (a ^ b * 0x9e3779b97f4a7c15u ^ c * 0xc2b2ae3d27d4eb4fu) * 0xff51afd7ed558ccdu;
    return &cache[(mixed ^ mixed >> 29) * 0x9e3779b97f4a7c15u >> (64 - CACHE_LOG2)];
}

static bool encode_piece(struct work *w, const char *piece, size_t bytes, struct err *e)
{
    struct token_list *list = w->list;
    if (!list_room(list, bytes, e)) return false;
    if (bytes == 1) {
        list->ids[list->n++] = w->t->bpe.byte_id[(unsigned char)*piece];
        return true;
    }
    if (!w->cache || bytes >= KEY_BYTES) return merge_piece(w, piece, bytes, e);
    unsigned char key[KEY_BYTES] = { 0 };
    memcpy(key, piece, bytes);
    key[KEY_BYTES - 1] = (unsigned char)bytes;
    struct cache_line *line = line_of(w->cache, key);
    size_t first = list->n;
    if (memcmp(line->piece, key, KEY_BYTES) == 0) {
        for (int i = 0; i < line->n_ids; i++) list->ids[first + (size_t)i] = line->ids[i];
        list->n += (size_t)line->n_ids;
        return true;
    }
    if (!merge_piece(w, piece, bytes, e)) return false;
    size_t n_ids = list->n - first;
    if (n_ids > KEPT_IDS) return true;
    memcpy(line->piece, key, KEY_BYTES);
    memcpy(line->ids, list->ids + first, n_ids * sizeof *line->ids);
    line->n_ids = (int32_t)n_ids;
    return true;
}

/* A copy of text in which the expression sees characters of PCRE2's Unicode version, at the same offsets. */
static bool make_view(struct work *w, const char *text, size_t bytes, struct err *e)
{
    if (bytes > w->view_capacity) {
        char *view = realloc(w->view, bytes);
        if (!view) return err_memory(e, "text", bytes);
        w->view = view;
        w->view_capacity = bytes;
    }
    memcpy(w->view, text, bytes);
    for (size_t at = 0; at < bytes;) {
        int length = utf8_length((unsigned char)text[at]);
        uint32_t c = length < 3 ? 0 : utf8_get((const unsigned char *)text + at, length);
        if (c && !unicode_is_plain(c)) utf8_put(w->view + at, unicode_stand_in(c));
        at += (size_t)length;
    }
    return true;
}

/* What the expression matches is a piece, and so is what lies between two matches. */
static bool encode_split(struct work *w, const char *text, const char *view, size_t bytes, struct err *e)
{
    for (size_t at = 0, begin, end; at < bytes; at = end) {
        if (!split_next(&w->split, view, bytes, at, &begin, &end, e)) return false;
        if (begin > at && !encode_piece(w, text + at, begin - at, e)) return false;
        if (end > begin && !encode_piece(w, text + begin, end - begin, e)) return false;
    }
    return true;
}

static bool encode_span(struct work *w, const char *text, size_t bytes, struct err *e)
{
    if (bytes == 0) return true;
    w->nfc.has_later = false;
    if (w->t->has_nfc && !nfc_normalize(&w->nfc, &text, &bytes, e)) return false;
    const char *view = text;
    if (w->nfc.has_later || !w->t->has_nfc) {
        if (!make_view(w, text, bytes, e)) return false;
        view = w->view;
    }
    return encode_split(w, text, view, bytes, e);
}

static bool encode_text(struct work *w, const char *text, size_t bytes, unsigned flags, struct err *e)
{
    size_t at = 0, found_at;
    while (!(flags & TOKENIZE_DATA) && at < bytes) {
        found_at = at;
        const struct added_token *found = added_next(&w->t->added, text, bytes, &found_at);
        if (!found) break;
        if (!encode_span(w, text + at, found_at - at, e) || !list_room(w->list, 1, e)) return false;
        w->list->ids[w->list->n++] = found->id;
        at = found_at + found->bytes;
    }
    return encode_span(w, text + at, bytes - at, e);
}

static void work_deinit(struct work *w)
{
    split_work_deinit(&w->split);
    nfc_deinit(&w->nfc);
    bpe_work_deinit(&w->bpe);
    free(w->cache);
    free(w->view);
}

bool tokenizer_encode(const struct tokenizer *t, struct token_list *list, const char *text, size_t bytes,
                      unsigned flags, struct err *e)
{
    if (bytes == 0) return true;
    if (bytes > TEXT_MAX) return err_set(e, ERR_LIMIT, "text of %zu bytes, at most %d", bytes, TEXT_MAX);
    size_t valid = utf8_valid_prefix(text, bytes), before = list->n;
    if (valid < bytes) return err_set(e, ERR_FORMAT, "the text is not UTF-8 at byte %zu", valid);
    struct work w = { .t = t, .list = list };
    /* without memory for it the cache is left out */
    if (bytes >= CACHE_FROM_BYTES) w.cache = calloc((size_t)1 << CACHE_LOG2, sizeof *w.cache);
    bool ok = split_work_init(&w.split, &t->split, bytes, e) && encode_text(&w, text, bytes, flags, e);
    if (!ok) list->n = before;
    work_deinit(&w);
    return ok;
}
