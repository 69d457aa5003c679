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

/* Range of the k-th byte of a character that begins with lead. Source: Unicode table 3-7. */
static bool continues(unsigned lead, int k, unsigned byte)
{
    unsigned low = k > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned high = k > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    return byte >= low && byte <= high;
}

static int char_length(const struct slice_chars *c, unsigned lead)
{
    if (lead < 0x80) return c->ascii[lead] ? 1 : 0;
    if (!c->others || lead < 0xc2 || lead > 0xf4) return 0;
    return lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

/* Whether the character that begins at node i belongs, with all that is below it up to its end. */
static bool belongs(const struct slice_chars *c, const struct trie *t, int32_t i)
{
    const struct trie_node *first = &t->nodes[i];
    int length = char_length(c, first->byte);
    for (int32_t k = i + 1; length > 1 && k < first->end; k++) {
        int at = t->nodes[k].depth - first->depth;
        if (at >= length)
            k = t->nodes[k].end - 1;
        else if (!continues(first->byte, at, t->nodes[k].byte))
            return false;
    }
    return length > 0;
}

/* Where a walk over whole stands: characters before the node of each depth, and bytes left of the last one.
 */
struct walk {
    uint8_t chars[TRIE_TOKEN_MAX + 1], left[TRIE_TOKEN_MAX + 1];
};

/* Calls exit for each node that leaves the slice, token for each that ends within. */
static void each_node(struct slice *s, const struct token_trie *t, struct walk *w,
                      void (*exit)(struct slice *s, const struct token_trie *t, int32_t node, int chars))
{
    w->chars[0] = w->left[0] = 0;
    for (int32_t i = 0; i < t->whole.n;) {
        const struct trie_node *node = &t->whole.nodes[i];
        int chars = w->chars[node->depth - 1], left = w->left[node->depth - 1];
        if (left == 0 && (chars == SLICE_CHARS || !belongs(&s->chars, &t->whole, i))) {
            exit(s, t, i, chars);
            i = node->end;
            continue;
        }
        chars += left == 0;
        w->chars[node->depth] = (uint8_t)chars;
        w->left[node->depth] = (uint8_t)(left ? left - 1 : char_length(&s->chars, node->byte) - 1);
        for (int32_t id = node->token; id >= 0 && !s->exits; id = t->same[id])
            s->upto[chars][id / 32] |= 1u << id % 32;
        i++;
    }
}

static int32_t *place(struct slice *s, const struct token_trie *t, int32_t node, int chars)
{
    return &s->begin[chars * 256 + t->whole.nodes[node].byte];
}

static void count_exit(struct slice *s, const struct token_trie *t, int32_t node, int chars)
{
    ++*place(s, t, node, chars);
}

static void put_exit(struct slice *s, const struct token_trie *t, int32_t node, int chars)
{
    s->exits[--*place(s, t, node, chars)] = node;
}

bool slice_init(struct slice *s, const struct token_trie *t, const struct slice_chars *chars)
{
    *s = (struct slice){ .chars = *chars };
    struct walk *w = malloc(sizeof *w);
    bool ok = w && (s->all = calloc((size_t)t->words + 1, sizeof *s->all));
    for (int k = 0; k <= SLICE_CHARS && ok; k++)
        ok = (s->upto[k] = calloc((size_t)t->words + 1, sizeof *s->all)) != NULL;
    if (ok) each_node(s, t, w, count_exit);
    for (int k = 1; k <= SLICE_CHARS && ok; k++)
        for (int64_t i = 0; i < t->words; i++) s->upto[k][i] |= s->upto[k - 1][i];
    enum { PLACES = (SLICE_CHARS + 1) * 256 };
    for (int i = 1; i <= PLACES; i++) s->begin[i] += s->begin[i - 1];
    ok = ok && (s->exits = malloc(((size_t)s->begin[PLACES] + 1) * sizeof *s->exits));
    if (ok) each_node(s, t, w, put_exit);
    if (ok && t->words) memcpy(s->all, s->upto[SLICE_CHARS], (size_t)t->words * sizeof *s->all);
    free(w);
    return ok;
}

void slice_deinit(struct slice *s)
{
    free(s->all);
    free(s->tails.nodes);
    free(s->same);
    free(s->exits);
    for (int k = 0; k <= SLICE_CHARS; k++) free(s->upto[k]);
    *s = (struct slice){ 0 };
}

/* Bytes at the beginning that belong to the slice, a cut character at the end with them. */
static uint32_t clean_bytes(const struct slice_chars *c, const unsigned char *s, uint32_t n)
{
    for (uint32_t i = 0; i < n;) {
        int length = char_length(c, s[i]);
        if (length == 0) return i;
        for (int k = 1; k < length && i + (uint32_t)k < n; k++)
            if (!continues(s[i], k, s[i + (uint32_t)k])) return i;
        i += (uint32_t)length;
    }
    return n;
}

/* Tokens of more than SLICE_CHARS characters are among all as well. */
static bool add_tails(struct slice *s, const struct token_trie *t, const struct piece *all, int64_t n,
                      struct piece *work)
{
    int64_t some = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t clean = clean_bytes(&s->chars, all[i].bytes, all[i].n);
        if (clean == all[i].n)
            s->all[all[i].id / 32] |= 1u << all[i].id % 32;
        else
            work[some++] = (struct piece){ all[i].bytes + clean, all[i].n - clean, all[i].id };
    }
    s->same = make_chains(t->n_vocab);
    return s->same && build(&s->tails, s->same, work, some);
}

static void usual_chars(struct slice_chars c[SLICES])
{
    for (int i = 0; i < SLICES; i++) {
        memset(c[i].ascii, true, sizeof c[i].ascii);
        c[i].others = true;
    }
    memset(c[SLICE_JSON].ascii, false, 0x20);
    c[SLICE_JSON].ascii['"'] = c[SLICE_JSON].ascii['\\'] = false;
    c[SLICE_MARKUP].ascii['<'] = c[SLICE_MARKUP].ascii['\n'] = false;
    c[SLICE_LINE].ascii['\n'] = false;
}

static bool arrange(struct token_trie *t)
{
    size_t room = (size_t)t->n_vocab + 1;
    struct piece *all = malloc(room * sizeof *all), *work = malloc(room * sizeof *work);
    struct slice_chars usual[SLICES];
    int64_t n = 0;
    bool ok = all && work && (t->same = make_chains(t->n_vocab));
    for (int64_t id = 0; ok && id < t->n_vocab; id++) {
        uint32_t bytes = t->begin[id + 1] - t->begin[id];
        if (bytes) all[n++] = (struct piece){ (unsigned char *)t->bytes + t->begin[id], bytes, (int32_t)id };
        if ((int)bytes > t->depth_max) t->depth_max = (int)bytes;
    }
    usual_chars(usual);
    ok = ok && build(&t->whole, t->same, all, n);
    for (int i = 0; i < SLICES && ok; i++)
        ok = slice_init(&t->slices[i], t, &usual[i]) && add_tails(&t->slices[i], t, all, n, work);
    free(all);
    free(work);
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

void token_trie_free(struct token_trie *t)
{
    if (!t) return;
    for (int i = 0; i < SLICES; i++) slice_deinit(&t->slices[i]);
    free(t->whole.nodes);
    free(t->same);
    free(t->bytes);
    free(t->begin);
    free(t->stop);
    free(t);
}
