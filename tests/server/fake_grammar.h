/* Stand-ins until src/grammar is there. */
#ifndef TESTS_SERVER_FAKE_GRAMMAR_H
#define TESTS_SERVER_FAKE_GRAMMAR_H
#include "grammar/grammar.h"
#include <stdlib.h>
struct grammar {
    int x;
};
struct matcher {
    int x;
};
struct token_trie {
    int x;
};
bool token_trie_create(struct token_trie **out, int64_t n, const char *(*b)(void *, int32_t, size_t *),
                       void *c, const int32_t *s, int ns, struct err *e)
{
    (void)n;
    (void)b;
    (void)c;
    (void)s;
    (void)ns;
    (void)e;
    *out = calloc(1, sizeof **out);
    return true;
}
void token_trie_free(struct token_trie *t)
{
    free(t);
}
static bool g1(struct grammar **out)
{
    *out = calloc(1, sizeof **out);
    return true;
}
bool grammar_from_schema(struct grammar **out, const json_t *s, struct err *e)
{
    (void)s;
    (void)e;
    return g1(out);
}
bool grammar_from_json_object(struct grammar **out, struct err *e)
{
    (void)e;
    return g1(out);
}
bool grammar_from_regex(struct grammar **out, const char *r, size_t n, struct err *e)
{
    (void)r;
    (void)n;
    (void)e;
    return g1(out);
}
bool grammar_from_choices(struct grammar **out, const char *const *c, int n, struct err *e)
{
    (void)c;
    (void)n;
    (void)e;
    return g1(out);
}
bool grammar_from_ebnf(struct grammar **out, const char *t, size_t n, struct err *e)
{
    (void)t;
    (void)n;
    (void)e;
    return g1(out);
}
void grammar_free(struct grammar *g)
{
    free(g);
}
bool matcher_create(struct matcher **out, const struct grammar *g, const struct token_trie *t, struct err *e)
{
    (void)g;
    (void)t;
    (void)e;
    *out = calloc(1, sizeof **out);
    return true;
}
void matcher_free(struct matcher *m)
{
    free(m);
}
void matcher_mask(struct matcher *m, uint32_t *mask, int64_t n)
{
    (void)m;
    (void)mask;
    (void)n;
}
bool matcher_advance(struct matcher *m, int32_t id)
{
    (void)m;
    (void)id;
    return true;
}
bool matcher_must_end(const struct matcher *m)
{
    (void)m;
    return false;
}
#endif
