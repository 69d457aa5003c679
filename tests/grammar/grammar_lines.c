/* For tools/test_grammar.py. A line in: {"kind": "schema" | "regex" | "ebnf", "grammar": ..., "texts": [...],
 * "walks": n, "seed": n}. A line out: {"error": text} or {"accepts": [bool...], "walks": [text...], "open":
 * n}: of each text whether it matches, and texts made of tokens that masks allow; open: walks that did not
 * end. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "grammar/matching.h"
#include <stdio.h>

enum { STEPS = 400 };

static bool compile(struct grammar **g, const json_t *line, struct err *e)
{
    const char *kind = json_string_value(json_object_get(line, "kind"));
    const json_t *x = json_object_get(line, "grammar");
    if (strcmp(kind, "schema") == 0) return grammar_from_schema(g, x, e);
    if (strcmp(kind, "regex") == 0)
        return grammar_from_regex(g, json_string_value(x), json_string_length(x), e);
    return grammar_from_ebnf(g, json_string_value(x), json_string_length(x), e);
}

static bool matches(const struct grammar *g, const struct token_trie *t, const json_t *text)
{
    struct matcher *m;
    const char *bytes = json_string_value(text);
    bool alive = true;
    if (!matcher_create(&m, g, t, NULL)) abort();
    for (size_t i = 0; i < json_string_length(text) && alive; i++)
        alive = matcher_advance(m, (unsigned char)bytes[i]);
    alive = alive && matcher_may_end(m);
    matcher_free(m);
    return alive;
}

/* Prefers what ends an answer, so that most walks end. */
static json_t *walk(const struct grammar *g, const struct token_trie *t)
{
    struct matcher *m;
    uint32_t mask[VOCAB / 32 + 1];
    char text[STEPS * 64];
    size_t n = 0;
    bool ended = false;
    if (!matcher_create(&m, g, t, NULL)) abort();
    for (int s = 0; s < STEPS && !ended; s++) {
        memset(mask, 255, sizeof mask);
        matcher_mask(m, mask, VOCAB);
        int32_t ids[VOCAB], some = 0;
        for (int32_t id = 0; id < VOCAB; id++)
            if (mask[id / 32] >> id % 32 & 1) ids[some++] = id;
        if (some == 0 || matcher_is_stuck(m)) break;
        int32_t id = ids[any_below((uint32_t)some)];
        static const char closing[] = "\"}]";
        char c = closing[any_below(3)];
        if ((mask[c / 32] >> c % 32 & 1) && any_below(4) == 0) id = c;
        if (matcher_may_end(m) && any_below(3) == 0) id = STOP;
        if (!matcher_advance(m, id)) abort();
        size_t bytes;
        const char *word = word_bytes(NULL, id, &bytes);
        ended = id >= STOP;
        if (!ended) memcpy(text + n, word, bytes);
        n += ended ? 0 : bytes;
    }
    matcher_free(m);
    return ended ? json_stringn(text, n) : NULL;
}

static json_t *answer(const json_t *line, const struct token_trie *t)
{
    struct err e = { 0 };
    struct grammar *g;
    if (!compile(&g, line, &e)) return json_pack("{s:s}", "error", e.text);
    json_t *accepted = json_array(), *walks = json_array();
    const json_t *texts = json_object_get(line, "texts");
    for (size_t i = 0; i < json_array_size(texts); i++)
        json_array_append_new(accepted, json_boolean(matches(g, t, json_array_get(texts, i))));
    matching_seed = (uint64_t)json_integer_value(json_object_get(line, "seed"));
    int open = 0;
    for (int64_t i = json_integer_value(json_object_get(line, "walks")); i > 0; i--) {
        json_t *text = walk(g, t);
        if (text) json_array_append_new(walks, text);
        open += !text;
    }
    grammar_free(g);
    return json_pack("{s:o,s:o,s:i}", "accepts", accepted, "walks", walks, "open", open);
}

int main(void)
{
    char *text = NULL;
    size_t room = 0;
    struct token_trie *t = word_trie();
    while (getline(&text, &room, stdin) > 0) {
        json_t *line = json_loads(text, JSON_ALLOW_NUL, NULL);
        if (!line) return 2;
        json_t *out = answer(line, t);
        char *dump = json_dumps(out, JSON_COMPACT);
        puts(dump);
        fflush(stdout);
        free(dump);
        json_decref(out);
        json_decref(line);
    }
    free(text);
    token_trie_free(t);
    return 0;
}
