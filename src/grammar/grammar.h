/* Which tokens may come next so that a text follows a grammar: JSON schema, regular expression, choice or
 * EBNF. A grammar is compiled once, off the engine's thread, within limits, and is immutable then; a matcher
 * walks it, one for each answer. What a schema asks for and is not supported is refused by name, never
 * ignored. */
#ifndef GRAMMAR_GRAMMAR_H
#define GRAMMAR_GRAMMAR_H
#include "base/err.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The tokens' bytes as a trie, made once a tokenizer, immutable. */
struct token_trie;
/* bytes(ctx, id, &n): of token id, borrowed for the call; n 0: the token never matches. stop: tokens that may
 * come where the text may end. */
bool token_trie_create(struct token_trie **out, int64_t n_vocab,
                       const char *(*bytes)(void *ctx, int32_t id, size_t *n), void *ctx, const int32_t *stop,
                       int n_stop, struct err *e);
void token_trie_free(struct token_trie *t);

struct grammar;
/* Each: ERR_ARGUMENT with the JSON path or the offset at fault and what to do; ERR_LIMIT over the limits. */
bool grammar_from_schema(struct grammar **out, const json_t *schema, struct err *e);
bool grammar_from_json_object(struct grammar **out, struct err *e); /* any JSON object */
bool grammar_from_regex(struct grammar **out, const char *regex, size_t n, struct err *e);
bool grammar_from_choices(struct grammar **out, const char *const *choices, int n, struct err *e);
bool grammar_from_ebnf(struct grammar **out, const char *text, size_t n, struct err *e);

/* {"triggers": [...], "structures": [{"begin", "schema", "end"}]}: any text; where one of the triggers, which
 * are ASCII, is written, it is the beginning of a structure, and JSON of its schema and its end follow. */
bool grammar_from_structural_tag(struct grammar **out, const json_t *tag, struct err *e);

struct tool_call_options {
    const char *name; /* the function that must be called; NULL: any of them */
    bool only_one;    /* one call, not several */
    bool is_optional; /* text without <tool_call> may stand before the calls, and there may be none */
};
/* Calls in the model's own form, as tokenizer/reply.h reads them, after at most two newlines: parameters in
 * the order of their schema, those not required may be left out; strings as they are, other values as JSON.
 * tools: as in requests, [{"type": "function", "function": {"name", "parameters"}}] or the functions alone.
 */
bool grammar_from_tool_calls(struct grammar **out, const json_t *tools, const struct tool_call_options *o,
                             struct err *e);
void grammar_free(struct grammar *g); /* NULL is fine */

/* One position of one answer. Tokens are taken one by one; the mask says which may come next. */
struct matcher;
enum { MATCHER_BACK_MAX = 256 }; /* tokens that can be taken back */
/* Borrows both. */
bool matcher_create(struct matcher **out, const struct grammar *g, const struct token_trie *t, struct err *e);
void matcher_free(struct matcher *m);
/* Clears in mask (bit id % 32 of mask[id / 32]) the tokens that cannot come next. */
void matcher_mask(struct matcher *m, uint32_t *mask, int64_t n_vocab);
/* Takes a token. False, and nothing changes: it cannot come next. */
bool matcher_advance(struct matcher *m, int32_t id);
/* Forgets the last n tokens, at most MATCHER_BACK_MAX of those taken. */
void matcher_back(struct matcher *m, int n);
bool matcher_may_end(const struct matcher *m);
bool matcher_must_end(const struct matcher *m); /* nothing but a stop token may come */
/* A limit was hit (memory, time for one token) or no token continues the text: nothing but a stop token is
 * allowed, though the text is not complete. Fails closed: never more is allowed than the grammar does. */
bool matcher_is_stuck(const struct matcher *m);
#endif
