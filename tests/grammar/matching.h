/* Checks that all grammars share: texts accepted and refused by bytes and in random cuts into tokens, and
 * along random walks every mask against a trial of every token, and back() against the position it returns
 * to. */
#ifndef TESTS_GRAMMAR_MATCHING_H
#define TESTS_GRAMMAR_MATCHING_H
#include "grammar/words.h"

static uint64_t matching_seed = 1;
static inline uint32_t any_below(uint32_t n)
{
    matching_seed = matching_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((matching_seed >> 33) % n);
}

/* Whether the text matches. Each byte, and with longer tokens where they fit. */
static inline bool accepts(const struct grammar *g, const char *text)
{
    struct token_trie *t = word_trie();
    struct matcher *m;
    struct err e = { 0 };
    if (!matcher_create(&m, g, t, &e)) fail_msg("%s", e.text);
    bool alive = true, may_end;
    for (size_t i = 0; text[i] && alive; i++) alive = matcher_advance(m, (unsigned char)text[i]);
    may_end = alive && matcher_may_end(m);
    matcher_free(m);
    for (int trial = 0; trial < 3; trial++) {
        assert_true(matcher_create(&m, g, t, &e));
        bool same = true;
        for (size_t i = 0, n = 1; text[i] && same; i += n) {
            int32_t id = (unsigned char)text[i];
            n = 1;
            for (int k = 0; k < N_WORDS; k++)
                if (strncmp(text + i, words[k], strlen(words[k])) == 0 && any_below(2)) {
                    id = 256 + k;
                    n = strlen(words[k]);
                }
            same = matcher_advance(m, id);
        }
        if ((same && matcher_may_end(m)) != may_end) fail_msg("tokens and bytes differ: %s", text);
        matcher_free(m);
    }
    token_trie_free(t);
    return may_end;
}

static inline void check_texts(const struct grammar *g, const char *what, const char *const *yes,
                               const char *const *no, int n)
{
    for (int i = 0; i < n && yes[i]; i++)
        if (!accepts(g, yes[i])) fail_msg("%s\n  refuses %s", what, yes[i]);
    for (int i = 0; i < n && no[i]; i++)
        if (accepts(g, no[i])) fail_msg("%s\n  accepts %s", what, no[i]);
}

static inline void check_mask(struct matcher *m, const char *what, uint32_t *mask)
{
    memset(mask, 255, (VOCAB / 32 + 1) * sizeof *mask);
    matcher_mask(m, mask, VOCAB);
    bool may_end = matcher_may_end(m), must_end = matcher_must_end(m), any = false;
    for (int32_t id = 0; id < VOCAB; id++) {
        bool fits = matcher_advance(m, id);
        if (fits) matcher_back(m, 1);
        if (fits != (mask[id / 32] >> id % 32 & 1)) fail_msg("%s: the mask is wrong for token %d", what, id);
        any = any || (fits && id < STOP);
    }
    assert_int_equal(may_end, matcher_may_end(m));
    assert_int_equal(must_end, matcher_must_end(m));
    if (!may_end && !any) fail_msg("%s: a dead end", what);
}

static inline void check_random_walks(const struct grammar *g, const char *what, int walks, int steps)
{
    struct token_trie *t = word_trie();
    struct err e = { 0 };
    uint32_t mask[VOCAB / 32 + 1], again[VOCAB / 32 + 1];
    for (int w = 0; w < walks; w++) {
        struct matcher *m;
        if (!matcher_create(&m, g, t, &e)) fail_msg("%s", e.text);
        for (int s = 0; s < steps; s++) {
            check_mask(m, what, mask);
            int32_t ids[VOCAB], n = 0;
            for (int32_t id = 0; id < STOP; id++)
                if (mask[id / 32] >> id % 32 & 1) ids[n++] = id;
            if (n == 0) break;
            int deep = 0;
            for (int k = 1 + (int)any_below(8); k > 0; k--) /* as a draft that is not accepted */
                deep += matcher_advance(m, k & 1 ? ids[any_below((uint32_t)n)] : (int32_t)any_below(STOP));
            matcher_back(m, deep);
            check_mask(m, what, again);
            assert_memory_equal(mask, again, sizeof mask);
            assert_true(matcher_advance(m, ids[any_below((uint32_t)n)]));
        }
        matcher_free(m);
    }
    token_trie_free(t);
}
#endif
