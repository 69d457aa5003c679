#include "grammar/trie.h"
#include <stdlib.h>
#include <string.h>

static size_t length(const struct token_trie *t, int32_t id)
{
    return t->begin[id + 1] - t->begin[id];
}

static bool is_stop(const struct token_trie *t, int64_t id)
{
    for (int i = 0; i < t->n_stop; i++)
        if (t->stop[i] == id) return true;
    return false;
}

static int compare(const void *x, const void *y, void *ctx)
{
    const struct token_trie *t = ctx;
    int32_t a = *(const int32_t *)x, b = *(const int32_t *)y;
    size_t n = length(t, a), m = length(t, b);
    int order = memcmp(t->bytes + t->begin[a], t->bytes + t->begin[b], n < m ? n : m);
    if (order == 0) order = (n > m) - (n < m);
    return order ? order : (a > b) - (a < b);
}

/* How many bytes of b, which follows a in order, are new. */
static size_t shared(const struct token_trie *t, int32_t a, int32_t b)
{
    size_t n = length(t, a) < length(t, b) ? length(t, a) : length(t, b), i = 0;
    while (i < n && t->bytes[t->begin[a] + i] == t->bytes[t->begin[b] + i]) i++;
    return i;
}

/* order: tokens sorted by their bytes, without two of the same. */
static bool build(struct trie *out, const struct token_trie *t, const int32_t *order, int64_t n)
{
    int32_t open[TRIE_TOKEN_MAX + 1]; /* the node of each depth above the last one */
    size_t depth = 0;
    int64_t total = 0;
    for (int64_t i = 0; i < n; i++)
        total += (int64_t)(length(t, order[i]) - (i ? shared(t, order[i - 1], order[i]) : 0));
    out->nodes = malloc(((size_t)total + 1) * sizeof *out->nodes);
    if (!out->nodes) return false;
    for (int64_t i = 0; i < n; i++) {
        size_t common = i ? shared(t, order[i - 1], order[i]) : 0, bytes = length(t, order[i]);
        while (depth > common) out->nodes[open[depth--]].end = out->n;
        while (depth < bytes) {
            uint8_t byte = (uint8_t)t->bytes[t->begin[order[i]] + depth];
            open[++depth] = out->n;
            out->nodes[out->n++] = (struct trie_node){ .token = -1, .depth = (uint16_t)depth, .byte = byte };
        }
        out->nodes[open[depth]].token = order[i];
    }
    while (depth > 0) out->nodes[open[depth--]].end = out->n;
    return true;
}

/* Characters of which the token consists, the last one perhaps cut; -1: it is not such text. */
static int count_chars(const unsigned char *s, size_t n, const bool *excluded)
{
    int chars = 0;
    for (size_t i = 0; i < n; chars++) {
        unsigned char lead = s[i];
        size_t bytes = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
        if (lead < 0x80 ? excluded[lead] : lead < 0xc2 || lead > 0xf4) return -1;
        for (size_t k = 1; k < bytes && i + k < n; k++) {
            unsigned low = k > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
            unsigned high = k > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
            if (s[i + k] < low || s[i + k] > high) return -1;
        }
        i += bytes;
    }
    return chars;
}

static bool make_slice(struct slice *s, const struct token_trie *t, const int32_t *order, int64_t n,
                       int32_t *rest, int32_t *brief_rest)
{
    int64_t n_rest = 0, n_brief = 0;
    s->all = calloc((size_t)t->words, sizeof *s->all);
    s->brief = calloc((size_t)t->words, sizeof *s->brief);
    if (!s->all || !s->brief) return false;
    for (int64_t i = 0; i < n; i++) {
        const unsigned char *bytes = (const unsigned char *)t->bytes + t->begin[order[i]];
        int chars = count_chars(bytes, length(t, order[i]), s->excluded);
        if (chars < 0) rest[n_rest++] = order[i];
        if (chars < 0 || chars > SLICE_BRIEF) brief_rest[n_brief++] = order[i];
        for (int32_t id = order[i]; chars >= 0 && id >= 0; id = t->same[id]) {
            s->all[id / 32] |= 1u << id % 32;
            if (chars <= SLICE_BRIEF) s->brief[id / 32] |= 1u << id % 32;
        }
    }
    return build(&s->rest, t, rest, n_rest) && build(&s->brief_rest, t, brief_rest, n_brief);
}

static void exclude(struct token_trie *t)
{
    for (int b = 0; b < 0x20; b++) t->slices[SLICE_JSON].excluded[b] = true;
    t->slices[SLICE_JSON].excluded['"'] = t->slices[SLICE_JSON].excluded['\\'] = true;
    t->slices[SLICE_MARKUP].excluded['<'] = true;
    t->slices[SLICE_LINE].excluded['\n'] = true;
}

static bool arrange(struct token_trie *t)
{
    size_t room = (size_t)t->n_vocab + 1;
    int32_t *order = malloc(room * sizeof *order), *rest = malloc(room * sizeof *rest);
    int32_t *brief_rest = malloc(room * sizeof *brief_rest);
    bool ok = order && rest && brief_rest;
    int64_t n = 0, kept = 0;
    for (int64_t id = 0; ok && id < t->n_vocab; id++) {
        if (length(t, (int32_t)id)) order[n++] = (int32_t)id;
        if ((int)length(t, (int32_t)id) > t->depth_max) t->depth_max = (int)length(t, (int32_t)id);
    }
    if (n) qsort_r(order, (size_t)n, sizeof *order, compare, t);
    for (int64_t i = 0; i < n; i++) {
        size_t bytes = length(t, order[i]);
        int32_t last = i ? order[i - 1] : -1;
        if (last >= 0 && length(t, last) == bytes && shared(t, last, order[i]) == bytes) {
            t->same[last] = order[i];
            continue;
        }
        rest[kept++] = order[i];
    }
    if (kept) memcpy(order, rest, (size_t)kept * sizeof *order);
    ok = ok && build(&t->whole, t, order, kept);
    exclude(t);
    for (int i = 0; i < SLICES && ok; i++) ok = make_slice(&t->slices[i], t, order, kept, rest, brief_rest);
    free(order);
    free(rest);
    free(brief_rest);
    return ok;
}

static bool copy_bytes(struct token_trie *t, const char *(*bytes)(void *, int32_t, size_t *), void *ctx)
{
    uint64_t used = 0, room = (uint64_t)t->n_vocab * 8 + TRIE_TOKEN_MAX;
    t->bytes = malloc(room);
    for (int64_t id = 0; t->bytes && id < t->n_vocab; id++) {
        size_t n = 0;
        const char *text = bytes(ctx, (int32_t)id, &n);
        if (!text || n > TRIE_TOKEN_MAX || is_stop(t, id)) n = 0;
        if (used + n > room) {
            room = room * 2 + TRIE_TOKEN_MAX;
            char *grown = realloc(t->bytes, room);
            if (!grown) return false;
            t->bytes = grown;
        }
        t->begin[id] = (uint32_t)used;
        if (n) memcpy(t->bytes + used, text, n);
        used += n;
        t->begin[id + 1] = (uint32_t)used;
        t->same[id] = -1;
    }
    return t->bytes;
}

bool token_trie_create(struct token_trie **out, int64_t n_vocab,
                       const char *(*bytes)(void *ctx, int32_t id, size_t *n), void *ctx, const int32_t *stop,
                       int n_stop, struct err *e)
{
    *out = NULL;
    if (n_vocab < 0 || n_vocab > 1 << 21)
        return err_set(e, ERR_LIMIT, "a vocabulary of %lld tokens", (long long)n_vocab);
    struct token_trie *t = calloc(1, sizeof *t);
    if (!t) return err_memory(e, "the trie of tokens", sizeof *t);
    t->n_vocab = n_vocab;
    t->words = (n_vocab + 31) / 32;
    t->begin = calloc((size_t)n_vocab + 1, sizeof *t->begin);
    t->same = malloc(((size_t)n_vocab + 1) * sizeof *t->same);
    t->stop = malloc(((size_t)n_stop + 1) * sizeof *t->stop);
    bool ok = t->begin && t->same && t->stop;
    for (int i = 0; ok && i < n_stop; i++)
        if (stop[i] >= 0 && stop[i] < n_vocab) t->stop[t->n_stop++] = stop[i];
    if (ok && copy_bytes(t, bytes, ctx) && arrange(t)) {
        *out = t;
        return true;
    }
    token_trie_free(t);
    return err_memory(e, "the trie of tokens", (unsigned long long)n_vocab * 64);
}

void token_trie_free(struct token_trie *t)
{
    if (!t) return;
    for (int i = 0; i < SLICES; i++) {
        free(t->slices[i].all);
        free(t->slices[i].brief);
        free(t->slices[i].rest.nodes);
        free(t->slices[i].brief_rest.nodes);
    }
    free(t->whole.nodes);
    free(t->bytes);
    free(t->begin);
    free(t->same);
    free(t->stop);
    free(t);
}
