/* What grammar fuzz targets do with a grammar: a short walk, each mask compared with tries of some tokens. */
#ifndef TESTS_FUZZ_GRAMMAR_WALK_H
#define TESTS_FUZZ_GRAMMAR_WALK_H
#include "../grammar/words.h"

static inline void require(bool claim)
{
    if (!claim) abort();
}

static inline void grammar_walk(struct grammar *g, const struct err *e, bool ok)
{
    static struct token_trie *t;
    struct matcher *m;
    struct err limit = { 0 };
    uint32_t mask[VOCAB / 32 + 1], seed = 1;
    if (!t) t = word_trie();
    require(ok ? g != NULL : !g && e->code != ERR_NONE && e->text[0]);
    if (!ok) return;
    if (!matcher_create(&m, g, t, &limit)) {
        require(limit.code == ERR_LIMIT);
        grammar_free(g);
        return;
    }
    for (int step = 0; step < 12; step++) {
        memset(mask, 255, sizeof mask);
        matcher_mask(m, mask, VOCAB);
        if (matcher_is_stuck(m)) break;
        int32_t next = -1;
        for (int32_t i = 0; i < VOCAB; i++) {
            seed = seed * 1103515245 + 12345;
            int32_t id = (int32_t)((seed >> 8) % STOP);
            if (i % 16 == 0 && !matcher_is_stuck(m)) {
                bool fits = matcher_advance(m, id);
                if (fits) matcher_back(m, 1);
                require(matcher_is_stuck(m) || fits == (mask[id / 32] >> id % 32 & 1));
            }
            if (next < 0 && (mask[id / 32] >> id % 32 & 1)) next = id;
        }
        if (next < 0 || !matcher_advance(m, next)) break;
    }
    matcher_free(m);
    grammar_free(g);
}
#endif
