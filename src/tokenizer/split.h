/* The Split expression of tokenizer.json, which cuts text into pieces before merging. PCRE2 runs it with the
 * meaning that the reference's engine (Oniguruma) gives it. */
#ifndef TOKENIZER_SPLIT_H
#define TOKENIZER_SPLIT_H
#define PCRE2_CODE_UNIT_WIDTH 8
#include "base/err.h"
#include <pcre2.h>
#include <stdbool.h>
#include <stddef.h>

struct split {
    pcre2_code *code;
    bool has_jit;
};

bool split_compile(struct split *s, const char *regex, struct err *e);
void split_free(struct split *s);
/* regex with \s and \S as Unicode White_Space, which PCRE2 takes to hold U+180E too; malloc'd. */
bool split_rewrite(char **out, const char *regex, struct err *e);

/* What one thread needs to match. Zero-initialise. */
struct split_work {
    const struct split *split;
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};
/* text_bytes: the longest text that will be matched; sets how long one match may search. */
bool split_work_init(struct split_work *w, const struct split *s, size_t text_bytes, struct err *e);
void split_work_deinit(struct split_work *w);
/* The next match at or after `at` in text, which is UTF-8: [*begin, *end), not empty. Both are `bytes` if
 * none. */
bool split_next(struct split_work *w, const char *text, size_t bytes, size_t at, size_t *begin, size_t *end,
                struct err *e);
#endif
