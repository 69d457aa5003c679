/* A conversation's place in the engine: one sequence that outlives its answers. A prompt that begins with
 * everything the sequence holds costs only its new tokens; any other is computed from its beginning. */
#ifndef ENGINE_SESSION_H
#define ENGINE_SESSION_H
#include "engine/engine.h"
#include "engine/prompt.h"
#include "engine/sample.h"
#include "engine/speculate.h"
#include "tokenizer/tokenizer.h"

struct session_options {
    struct sampling sampling;
    int64_t max_tokens; /* of one answer */
    const int32_t *stop_tokens, *never;
    int n_stop_tokens, n_never;
    void *ctx;
    void (*text)(void *ctx, const char *bytes, size_t n); /* whole characters, as they become certain */
    bool (*cancelled)(void *ctx);                         /* asked between steps; may be NULL */
    const struct report *report;
};

enum session_finish { SESSION_STOP, SESSION_LENGTH, SESSION_CANCELLED };

struct session_result {
    enum session_finish finish;
    int64_t prompt_tokens, reused_tokens; /* reused: of the prompt, not computed again */
    int64_t tokens;                       /* generated, without the stop token */
    int64_t drafted, accepted;            /* accepted: a stop token foreseen is one */
    int64_t rounds;                       /* steps of decoding */
    double prefill_seconds, decode_seconds;
};

struct session;
/* The engine and the tokenizer are borrowed; the session holds one of the engine's sequences. Where the
 * engine drafts, tokens come several at a time; they are the same. */
bool session_create(struct session **out, struct engine *g, const struct tokenizer *t, struct err *e);
void session_free(struct session *s); /* NULL is fine */
/* The prompt's rows begin at position 0; pictures are the same when their rows lie at the same address, so
 * they stay where they are until session_reset. ERR_LIMIT: the prompt leaves no room in the engine's context.
 * After an error the sequence is empty. */
bool session_answer(struct session *s, struct session_result *out, const struct prompt *prompt,
                    const struct session_options *o, struct err *e);
void session_reset(struct session *s); /* forgets everything said */
/* What drafting did and learned, over all answers. */
const struct speculation *session_speculation(const struct session *s);
#endif
