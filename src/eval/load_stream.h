/* Answers of OpenAI's chat and completions endpoints as they stream, and when their tokens came. */
#ifndef EVAL_LOAD_STREAM_H
#define EVAL_LOAD_STREAM_H
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

/* Times in seconds. Zero-initialise. */
struct load_answer {
    bool ok;
    char *error;          /* a sentence where it is not; owned, as the arrays */
    double start;         /* clock_seconds when it was sent */
    double queued;        /* held back before that, by the limit of requests at a time */
    double ttft, latency; /* from the start to the first and to the last token */
    double *itl; /* [n_itl] between a token's event and the one before; an event may hold several tokens */
    int64_t n_itl, itl_capacity;
    int64_t prompt_tokens, output_tokens; /* as `usage` says; -1: it did not */
    char *text;                           /* reasoning and answer */
    size_t text_bytes, text_capacity;
};
void load_answer_deinit(struct load_answer *a);

/* What is known of the stream between two pieces. Zero-initialise. */
struct load_stream {
    char *line; /* begun, not ended */
    size_t bytes, capacity;
    bool is_done; /* [DONE], or a finish_reason */
};
void load_stream_deinit(struct load_stream *s);
/* The next bytes of the stream, which came at `now`. Comment lines and events without a token (a role, the
 * usage) count for nothing. False: this is no such stream, or an error arrived in it. */
bool load_stream_push(struct load_stream *s, struct load_answer *a, const char *data, size_t n, double now,
                      struct err *e);
/* The stream has ended: false when it was cut or had no token. */
bool load_stream_end(const struct load_stream *s, const struct load_answer *a, struct err *e);
#endif
