/* One prompt continued: prefill, then a token a step until a stop token, a stop string, or the limit. Text is
 * handed out as it becomes certain: whole characters, and nothing that may yet turn out to begin a stop
 * string. */
#ifndef ENGINE_GENERATE_H
#define ENGINE_GENERATE_H
#include "engine/engine.h"
#include "engine/sample.h"
#include "engine/speculate.h"
#include "tokenizer/tokenizer.h"

struct generation {
    struct sampling sampling;
    int64_t max_tokens;
    const char *const *stops; /* strings, not part of the text when met */
    int n_stops;
    const int32_t *stop_tokens;
    int n_stop_tokens;
    const int32_t *never; /* never sampled, besides ids without meaning: placeholders of pictures, say */
    int n_never;
    bool keep_special; /* print special tokens as their text */
    struct speculation
        *speculation; /* where the engine drafts: what was learned so far, and goes on; or NULL */
    void *ctx;
    void (*text)(void *ctx, const char *bytes, size_t n); /* may be NULL */
    const struct report *report;
};

enum finish { FINISH_STOP, FINISH_LENGTH };

struct generated {
    struct token_list tokens; /* without the stop token; free(tokens.ids) */
    enum finish finish;
    double prefill_seconds, decode_seconds;
};

/* The engine needs room for the prompt and max_tokens. Where it drafts, tokens come several at a time; they
 * are the same. */
bool generate(struct generated *out, struct engine *g, const struct tokenizer *t, const int32_t *prompt,
              int64_t n, const struct generation *o, struct err *e);
/* The same for a prompt with pictures in it (engine/prompt.h). */
bool generate_rows(struct generated *out, struct engine *g, const struct tokenizer *t,
                   const struct row *prompt, int64_t n, const struct generation *o, struct err *e);
#endif
