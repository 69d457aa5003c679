#include "grammar/trie.h"
#include <stdlib.h>
#include <string.h>

static bool is_stop(const struct token_trie *t, int64_t id)
{
    for (int i = 0; i < t->n_stop; i++)
        if (t->stop[i] == id) return true;
    return false;
}

/* A token from its byte `begin` on. */
struct piece {
    const unsigned char *bytes;
    uint32_t n;
    int32_t id;
};

static int compare(const void *x, const void *y)
{
    const struct piece *a = x, *b = y;
    int order = memcmp(a->bytes, b->bytes, a->n < b->n ? a->n : b->n);
    if (order == 0) order = (a->n > b->n) - (a->n < b->n);
    return order ? order : (a->id > b->id) - (a->id < b->id);
}

static uint32_t shared(const struct piece *a, const struct piece *b)
{
    uint32_t i = 0;
    while (i < a->n && i < b->n && a->bytes[i] == b->bytes[i]) i++;
    return i;
}

static int32_t *make_chains(int64_t n_vocab)
{
    int32_t *same = malloc(((size_t)n_vocab + 1) * sizeof *same);
    for (int64_t i = 0; same && i < n_vocab; i++) same[i] = -1;
    return same;
}

/* Sorts the pieces. same: from make_chains, of one or several tries that have no token in common. */
static bool build(struct trie *out, int32_t *same, struct piece *pieces, int64_t n)
{
    int32_t open[TRIE_TOKEN_MAX + 1]; /* the node of each depth above the last one */
    uint32_t depth = 0;
    int64_t total = 1;
    if (n) qsort(pieces, (size_t)n, sizeof *pieces, compare);
    for (int64_t i = 0; i < n; i++) total += pieces[i].n - (i ? shared(&pieces[i - 1], &pieces[i]) : 0);
    out->nodes = malloc((size_t)total * sizeof *out->nodes);
    out->same = same;
    if (!out->nodes) return false;
    for (int64_t i = 0; i < n; i++) {
        const struct piece *p = &pieces[i];
        uint32_t common = i ? shared(p - 1, p) : 0;
        while (depth > common) out->nodes[open[depth--]].end = out->n;
        while (depth < p->n) {
            open[depth + 1] = out->n;
            out->nodes[out->n++] =
                (struct trie_node){ .token = -1, .depth = (uint16_t)(depth + 1), .byte = p->bytes[depth] };
            depth++;
        }
        same[p->id] = out->nodes[open[depth]].token;
        out->nodes[open[depth]].token = p->id;
    }
    while (depth > 0) out->nodes[open[depth--]].end = out->n;
    return true;
}

/* How many characters at the beginning belong to the slice, the last one perhaps cut; *clean: their bytes. */
static int count_chars(const unsigned char *s, uint32_t n, const bool *excluded, uint32_t *clean)
{
    int chars = 0;
    uint32_t i = 0;
    for (*clean = 0; i < n; *clean = i, chars++) {
        unsigned char lead = s[i];
        uint32_t bytes = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
        if (lead < 0x80 ? excluded[lead] : lead < 0xc2 || lead > 0xf4) return chars;
        for (uint32_t k = 1; k < bytes && i + k < n; k++) {
            unsigned low = k > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
            unsigned high = k > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
            if (s[i + k] < low || s[i + k] > high) return chars;
        }
        i = i + bytes < n ? i + bytes : n;
    }
    return chars;
}

static bool make_bits(struct slice *s, int64_t words)
{
    s->all = calloc((size_t)words + 1, sizeof *s->all);
    bool ok = s->all;
    for (int k = 0; k <= SLICE_CHARS && ok; k++) {
        s->upto[k] = calloc((size_t)words + 1, sizeof **s->upto);
        ok = s->upto[k];
    }
    return ok;
}

/* begins: [n] a byte for each; work: [n]. Of the tokens with `chars` characters before: after[chars], or
 * longer. */
static bool build_after(struct slice *s, const struct piece *all, const uint8_t *begins, int64_t n,
                        struct piece *work, int chars)
{
    int64_t some = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t clean;
        if (begins[i] != chars) continue;
        count_chars(all[i].bytes, all[i].n, s->excluded, &clean);
        if (chars > SLICE_CHARS) clean = 0;
        if (clean < all[i].n)
            work[some++] = (struct piece){ all[i].bytes + clean, all[i].n - clean, all[i].id };
    }
    return build(chars > SLICE_CHARS ? &s->longer : &s->after[chars], s->same_apart, work, some);
}

static bool make_slice(struct slice *s, const struct token_trie *t, const struct piece *all, int64_t n,
                       struct piece *work, uint8_t *begins)
{
    int64_t n_tails = 0;
    s->same = make_chains(t->n_vocab);
    s->same_apart = make_chains(t->n_vocab);
    if (!s->same || !s->same_apart || !make_bits(s, t->words)) return false;
    for (int64_t i = 0; i < n; i++) {
        uint32_t clean, bit = 1u << all[i].id % 32;
        int chars = count_chars(all[i].bytes, all[i].n, s->excluded, &clean);
        begins[i] = (uint8_t)(chars <= SLICE_CHARS ? chars : SLICE_CHARS + 1);
        if (clean == all[i].n) {
            s->all[all[i].id / 32] |= bit;
            for (int k = chars; k <= SLICE_CHARS; k++) s->upto[k][all[i].id / 32] |= bit;
        } else
            work[n_tails++] = (struct piece){ all[i].bytes + clean, all[i].n - clean, all[i].id };
    }
    bool ok = build(&s->tails, s->same, work, n_tails);
    for (int chars = 0; chars <= SLICE_CHARS + 1 && ok; chars++)
        ok = build_after(s, all, begins, n, work, chars);
    return ok;
}

static void exclude(struct token_trie *t)
{
    for (int b = 0; b < 0x20; b++) t->slices[SLICE_JSON].excluded[b] = true;
    t->slices[SLICE_JSON].excluded['"'] = t->slices[SLICE_JSON].excluded['\\'] = true;
    t->slices[SLICE_MARKUP].excluded['<'] = t->slices[SLICE_MARKUP].excluded['\n'] = true;
    t->slices[SLICE_LINE].excluded['\n'] = true;
}

static bool arrange(struct token_trie *t)
{
    size_t room = (size_t)t->n_vocab + 1;
    struct piece *all = malloc(room * sizeof *all), *work = malloc(room * sizeof *work);
    uint8_t *begins = malloc(room);
    int64_t n = 0;
    bool ok = all && work && begins && (t->same = make_chains(t->n_vocab));
    for (int64_t id = 0; ok && id < t->n_vocab; id++) {
        uint32_t bytes = t->begin[id + 1] - t->begin[id];
        if (bytes) all[n++] = (struct piece){ (unsigned char *)t->bytes + t->begin[id], bytes, (int32_t)id };
        if ((int)bytes > t->depth_max) t->depth_max = (int)bytes;
    }
    exclude(t);
    ok = ok && build(&t->whole, t->same, all, n);
    for (int i = 0; i < SLICES && ok; i++) ok = make_slice(&t->slices[i], t, all, n, work, begins);
    free(all);
    free(work);
    free(begins);
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
    t->stop = malloc(((size_t)n_stop + 1) * sizeof *t->stop);
    bool ok = t->begin && t->stop;
    for (int i = 0; ok && i < n_stop; i++)
        if (stop[i] >= 0 && stop[i] < n_vocab) t->stop[t->n_stop++] = stop[i];
    if (ok && copy_bytes(t, bytes, ctx) && arrange(t)) {
        *out = t;
        return true;
    }
    token_trie_free(t);
    return err_memory(e, "the trie of tokens", (unsigned long long)n_vocab * 64);
}

static void slice_free(struct slice *s)
{
    free(s->all);
    free(s->tails.nodes);
    free(s->longer.nodes);
    free(s->same);
    free(s->same_apart);
    for (int k = 0; k <= SLICE_CHARS; k++) {
        free(s->upto[k]);
        free(s->after[k].nodes);
    }
}

void token_trie_free(struct token_trie *t)
{
    if (!t) return;
    for (int i = 0; i < SLICES; i++) slice_free(&t->slices[i]);
    free(t->whole.nodes);
    free(t->same);
    free(t->bytes);
    free(t->begin);
    free(t->stop);
    free(t);
}
