/* A text's position in a grammar, and which tokens may follow. Walks the trie of tokens over the sets of
 * sets.h; masks that took long are kept, a bounded number of them. */
#include "grammar/grammar.h"
#include "grammar/rules.h"
#include "grammar/sets.h"
#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum {
    SLICES_MAX = 4,       /* made here */
    SLICE_LEAST = 8,      /* characters of ASCII that are worth one */
    ENDED = -1,           /* a position: after the stop token */
    MASKS_MAX = 64,       /* kept */
    MASK_WORTH = 1 << 10, /* nodes whose visit costs more than a copy of the mask */
};

struct kept_mask {
    int32_t set;
    uint32_t *bits; /* [words] */
};

struct matcher {
    const struct token_trie *t;
    struct sets sets;
    int32_t now;                       /* set, or ENDED */
    int32_t history[MATCHER_BACK_MAX]; /* positions before the last tokens, oldest first */
    int n_history;
    bool is_stuck;
    int32_t *path;  /* [depth_max + 1] sets along the way to a node */
    uint32_t *bits; /* [words] */
    struct kept_mask masks[MASKS_MAX];
    int n_masks, next_mask;
    int64_t visited;
    struct slice slices[SLICES_MAX]; /* of texts that this grammar asks for */
    int n_slices, next_slice;
};

bool matcher_create(struct matcher **out, const struct grammar *g, const struct token_trie *t, struct err *e)
{
    *out = NULL;
    struct matcher *m = calloc(1, sizeof *m);
    if (!m || !sets_init(&m->sets, g)) {
        free(m);
        return err_memory(e, "a matcher", sizeof *m);
    }
    m->t = t;
    m->path = calloc((size_t)t->depth_max + 1, sizeof *m->path);
    m->bits = calloc((size_t)t->words + 1, sizeof *m->bits);
    m->now = m->path && m->bits ? sets_start(&m->sets) : SETS_FAILED;
    if (m->now >= 0) {
        *out = m;
        return true;
    }
    bool is_limit = m->sets.work > SETS_WORK_MAX;
    matcher_free(m);
    return is_limit ? err_set(e, ERR_LIMIT, "the grammar allows too much at its beginning: make it shorter")
                    : err_memory(e, "a matcher", (unsigned long long)t->words * 4);
}

void matcher_free(struct matcher *m)
{
    if (!m) return;
    for (int i = 0; i < m->n_masks; i++) free(m->masks[i].bits);
    for (int i = 0; i < m->n_slices; i++) slice_deinit(&m->slices[i]);
    sets_deinit(&m->sets);
    free(m->path);
    free(m->bits);
    free(m);
}

/* Before a token: keeps memory bounded. What may be taken back stays. */
static void prepare(struct matcher *m)
{
    m->sets.work = 0;
    if (sets_bytes(&m->sets) < SETS_FLUSH || m->is_stuck) return;
    int32_t keep[MATCHER_BACK_MAX + 1];
    int n = 0;
    for (int i = 0; i < m->n_history; i++)
        if (m->history[i] >= 0) keep[n++] = m->history[i];
    if (m->now >= 0) keep[n++] = m->now;
    if (!sets_flush(&m->sets, keep, n)) {
        m->is_stuck = true;
        return;
    }
    n = 0;
    for (int i = 0; i < m->n_history; i++)
        if (m->history[i] >= 0) m->history[i] = keep[n++];
    if (m->now >= 0) m->now = keep[n];
    for (int i = 0; i < m->n_masks; i++) m->masks[i].set = -1;
}

/* Tokens of nodes[begin .. end) into m->bits; `from` is where the first of them is reached. */
static void walk(struct matcher *m, const struct trie *trie, int32_t begin, int32_t end, int32_t from)
{
    const struct trie_node *nodes = trie->nodes;
    int32_t *path = m->path;
    if (begin < end) path[nodes[begin].depth - 1] = from;
    for (int32_t i = begin; i < end;) {
        const struct trie_node *node = &nodes[i];
        int32_t to = sets_next(&m->sets, path[node->depth - 1], node->byte);
        m->visited++;
        if (to <= 0) {
            if (to == SETS_FAILED) {
                m->is_stuck = true;
                return;
            }
            i = node->end;
            continue;
        }
        path[node->depth] = to;
        for (int32_t id = node->token; id >= 0; id = trie->same[id]) m->bits[id / 32] |= 1u << id % 32;
        i++;
    }
}

/* Tokens that leave the slice after n characters, which led to `from`. */
static void walk_exits(struct matcher *m, const struct slice *s, int n, int32_t from)
{
    const struct trie *whole = &m->t->whole;
    for (int b = 0; b < 256 && !m->is_stuck; b++) {
        int32_t i = s->begin[n * 256 + b], end = s->begin[n * 256 + b + 1];
        if (i == end) continue;
        int32_t to = sets_next(&m->sets, from, (uint8_t)b);
        if (to == SETS_FAILED) m->is_stuck = true;
        for (; to > 0 && i < end; i++) walk(m, whole, s->exits[i], whole->nodes[s->exits[i]].end, from);
    }
}

/* Where any n characters of the slice, whatever they are, lead to at[n], the tokens made of them need no
 * walk, and the others only from where they leave the slice. False: this is no such place. */
static bool find_by_slice(struct matcher *m, const struct slice *s, int which)
{
    size_t bytes = (size_t)m->t->words * sizeof *m->bits;
    int32_t at[SLICE_CHARS + 1] = { m->now };
    int n = 0;
    bool loops = false;
    while (n < SLICE_CHARS && !loops) {
        int32_t to = sets_uniform(&m->sets, at[n], &s->chars, which);
        if (to == SETS_DEAD) break;
        loops = to == at[n];
        at[++n] = to;
    }
    if (n == 0 || (n < SLICE_CHARS && !loops && !sets_is_closed(&m->sets, at[n], &s->chars))) return false;
    for (int k = n + 1; loops && k <= SLICE_CHARS; k++) at[k] = at[n];
    if (loops) n = SLICE_CHARS;
    bool has_tails = loops && at[1] == at[0] && s->tails.nodes;
    memcpy(m->bits, has_tails ? s->all : s->upto[n], bytes);
    if (has_tails) walk(m, &s->tails, 0, s->tails.n, m->now);
    for (int k = 0; k <= n && !has_tails; k++) walk_exits(m, s, k, at[k]);
    return true;
}

/* Characters that all lead from here to one other set, where that is worth a slice: a text of them is
 * counted, and further sets like this one follow. (Of a set that leads to itself the mask is kept.) */
static bool find_chars(struct matcher *m, struct slice_chars *c)
{
    static const char usual[] = "aA0 ";
    int32_t want = SETS_DEAD;
    int n = 0;
    for (int i = 0; usual[i] && want <= 0; i++) want = sets_next(&m->sets, m->now, (uint8_t)usual[i]);
    if (want <= 0 || want == m->now) return false;
    *c = (struct slice_chars){ 0 };
    for (int b = 0; b < 0x80; b++) n += c->ascii[b] = sets_next(&m->sets, m->now, (uint8_t)b) == want;
    struct slice_chars with_others = *c;
    with_others.others = true;
    c->others = sets_uniform(&m->sets, m->now, &with_others, -1) == want;
    return n >= SLICE_LEAST && sets_uniform(&m->sets, want, c, -1) != SETS_DEAD;
}

/* A slice for this position, made now or before; NULL: none is worth it. */
static const struct slice *own_slice(struct matcher *m)
{
    struct slice_chars c;
    if (!find_chars(m, &c)) return NULL;
    for (int i = 0; i < m->n_slices; i++)
        if (memcmp(&m->slices[i].chars, &c, sizeof c) == 0) return &m->slices[i];
    struct slice s;
    if (!slice_init(&s, m->t, &c)) {
        slice_deinit(&s);
        return NULL;
    }
    int slot = m->n_slices < SLICES_MAX ? m->n_slices++ : m->next_slice++ % SLICES_MAX;
    slice_deinit(&m->slices[slot]);
    m->slices[slot] = s;
    return &m->slices[slot];
}

/* All tokens that may follow, into m->bits. */
static void find_tokens(struct matcher *m)
{
    m->visited = 0;
    for (int i = 0; i < SLICES; i++)
        if (find_by_slice(m, &m->t->slices[i], i)) return;
    const struct slice *own = own_slice(m);
    if (own && find_by_slice(m, own, -1)) return;
    memset(m->bits, 0, (size_t)m->t->words * sizeof *m->bits);
    walk(m, &m->t->whole, 0, m->t->whole.n, m->now);
}

/* Kept or found; NULL: the matcher is stuck. */
static const uint32_t *tokens_now(struct matcher *m)
{
    int32_t slot = m->sets.sets[m->now].mask;
    if (slot >= 0 && slot < m->n_masks && m->masks[slot].set == m->now) return m->masks[slot].bits;
    find_tokens(m);
    if (m->is_stuck) return NULL;
    size_t bytes = (size_t)m->t->words * sizeof *m->bits;
    if (m->visited < MASK_WORTH || bytes == 0) return m->bits;
    slot = m->n_masks < MASKS_MAX ? m->n_masks : m->next_mask++ % MASKS_MAX;
    if (slot == m->n_masks) {
        m->masks[slot].bits = malloc(bytes);
        if (!m->masks[slot].bits) return m->bits;
        m->n_masks++;
    }
    memcpy(m->masks[slot].bits, m->bits, bytes);
    m->masks[slot].set = m->now;
    m->sets.sets[m->now].mask = slot;
    return m->bits;
}

void matcher_mask(struct matcher *m, uint32_t *mask, int64_t n_vocab)
{
    int64_t words = (n_vocab + 31) / 32;
    prepare(m);
    const uint32_t *allowed = m->is_stuck || m->now == ENDED ? NULL : tokens_now(m);
    bool may_stop = matcher_may_end(m), any = false;
    for (int64_t i = 0; allowed && !may_stop && !any && i < m->t->words; i++) any = allowed[i] != 0;
    if (!may_stop && !any) m->is_stuck = true;
    uint32_t stops[64], n_stops = 0;
    for (int i = 0; i < m->t->n_stop && (may_stop || m->is_stuck); i++) {
        int32_t id = m->t->stop[i];
        if (n_stops < 64 && id < n_vocab && (mask[id / 32] >> id % 32 & 1)) stops[n_stops++] = (uint32_t)id;
    }
    for (int64_t i = 0; i < words; i++) mask[i] &= allowed && i < m->t->words ? allowed[i] : 0;
    for (uint32_t i = 0; i < n_stops; i++) mask[stops[i] / 32] |= 1u << stops[i] % 32;
}

/* The position after the token; SETS_DEAD: it cannot come. */
static int32_t after(struct matcher *m, int32_t id)
{
    const struct token_trie *t = m->t;
    for (int i = 0; i < t->n_stop; i++)
        if (t->stop[i] == id) return matcher_may_end(m) ? ENDED : SETS_DEAD;
    int32_t set = m->now;
    if (set == ENDED || t->begin[id] == t->begin[id + 1]) return SETS_DEAD;
    for (uint32_t k = t->begin[id]; k < t->begin[id + 1]; k++) {
        set = sets_next(&m->sets, set, (uint8_t)t->bytes[k]);
        if (set == SETS_FAILED) m->is_stuck = true;
        if (set <= 0) return SETS_DEAD;
    }
    return set;
}

bool matcher_advance(struct matcher *m, int32_t id)
{
    prepare(m);
    if (m->is_stuck || id < 0 || id >= m->t->n_vocab) return false;
    int32_t next = after(m, id);
    if (next == SETS_DEAD) return false;
    if (m->n_history == MATCHER_BACK_MAX) {
        memmove(m->history, m->history + 1, (MATCHER_BACK_MAX - 1) * sizeof *m->history);
        m->n_history--;
    }
    m->history[m->n_history++] = m->now;
    m->now = next;
    return true;
}

void matcher_back(struct matcher *m, int n)
{
    assert(n >= 0 && n <= m->n_history);
    if (n == 0) return;
    m->n_history -= n;
    m->now = m->history[m->n_history];
    m->is_stuck = false;
}

bool matcher_may_end(const struct matcher *m)
{
    return m->now == ENDED || m->sets.sets[m->now].accepts;
}

bool matcher_must_end(const struct matcher *m)
{
    return m->is_stuck || m->now == ENDED || m->sets.sets[m->now].n == 0;
}

bool matcher_is_stuck(const struct matcher *m)
{
    return m->is_stuck;
}
