/* An automaton that looks for all words at once, written as rules: one for each beginning of a word, which is
 * the longest that the text so far ends with. What would complete a word is left out. Source: Aho and
 * Corasick, "Efficient string matching", 1975. */
#include "grammar/text.h"
#include "grammar/chars.h"
#include <stdlib.h>
#include <string.h>

enum { STATES_MAX = TEXT_WORDS_BYTES_MAX + 1, ASCII = 128 };

struct search {
    int16_t next[STATES_MAX][ASCII]; /* 0: back to the start */
    int16_t shorter[STATES_MAX];     /* the next shorter beginning that the text ends with, too */
    bool ends[STATES_MAX];           /* a word stands at the end */
    int32_t rules[STATES_MAX];
    int n;
};

/* A tree of the words. */
static bool add_word(struct rules *r, struct search *s, const char *word)
{
    int at = 0;
    if (!*word) return rules_fail(r, ERR_ARGUMENT, "a word is empty");
    for (const unsigned char *c = (const unsigned char *)word; *c; c++) {
        if (*c >= ASCII) return rules_fail(r, ERR_ARGUMENT, "'%.60s' is not ASCII", word);
        if (!s->next[at][*c]) {
            if (s->n == STATES_MAX)
                return rules_fail(r, ERR_LIMIT, "the words have more than %d bytes", TEXT_WORDS_BYTES_MAX);
            s->next[at][*c] = (int16_t)s->n++;
        }
        at = s->next[at][*c];
    }
    s->ends[at] = true;
    return true;
}

/* Where each state goes on from when a byte does not fit: breadth first, so that shorter ones are complete.
 */
static void add_failures(struct search *s)
{
    int16_t queue[STATES_MAX];
    int head = 0, tail = 0;
    for (int c = 0; c < ASCII; c++)
        if (s->next[0][c]) queue[tail++] = s->next[0][c];
    while (head < tail) {
        int at = queue[head++];
        s->ends[at] = s->ends[at] || s->ends[s->shorter[at]];
        for (int c = 0; c < ASCII; c++) {
            int to = s->next[at][c], otherwise = s->next[s->shorter[at]][c];
            if (!to) {
                s->next[at][c] = (int16_t)otherwise;
                continue;
            }
            s->shorter[to] = (int16_t)otherwise;
            queue[tail++] = (int16_t)to;
        }
    }
}

/* The end, or a character and what may follow it. */
static void define(struct rules *r, const struct search *s, int at)
{
    struct expr_list parts = { 0 };
    struct chars others = { 0 };
    expr_list_add(r, &parts, expr_empty(r));
    for (int c = 0; c < ASCII && !r->failed; c++) {
        int to = s->next[at][c];
        char byte = (char)c;
        if (!to) continue;
        chars_add(r, &others, (uint32_t)c, (uint32_t)c);
        if (!s->ends[to])
            expr_list_add(r, &parts, SEQ(r, expr_bytes(r, &byte, 1), expr_call(r, s->rules[to])));
    }
    chars_complement(r, &others);
    expr_list_add(r, &parts, SEQ(r, chars_expr(r, &others, CHARS_RAW), expr_call(r, s->rules[0])));
    chars_free(&others);
    rules_define(r, s->rules[at], expr_list_alt(r, &parts));
}

int32_t text_without(struct rules *r, const char *const *words, size_t n)
{
    struct search *s = calloc(1, sizeof *s);
    if (!s) {
        rules_fail(r, ERR_MEMORY, "out of memory");
        return 0;
    }
    s->n = 1;
    for (size_t i = 0; i < n && !r->failed; i++) add_word(r, s, words[i]);
    if (!r->failed) add_failures(s);
    for (int i = 0; i < s->n; i++)
        if (!s->ends[i]) s->rules[i] = rules_declare(r, "text");
    for (int i = 0; i < s->n && !r->failed; i++)
        if (!s->ends[i]) define(r, s, i);
    int32_t start = expr_call(r, s->rules[0]);
    free(s);
    return start;
}
