/* One HTTP exchange between a route and the scheduler: a route's shape says how what comes is written. */
#ifndef SERVER_EXCHANGE_H
#define SERVER_EXCHANGE_H
#include "server/choice.h"

/* How a route writes what comes. Of a stream `delta` (reasoning, content, arguments of the last call),
 * `call`, `call_end` and `finish` append events to x->out; else only `whole` does, once all choices are over.
 * `begin` and `call_end` may be NULL. */
struct shape {
    bool is_plain;    /* answers are neither parsed for reasoning nor for calls */
    bool max_is_soft; /* max_tokens is a bound: more than fits is no error */
    void (*begin)(struct exchange *x, struct choice *c);
    void (*delta)(struct exchange *x, struct choice *c, enum part_kind kind, const char *text, size_t n);
    void (*call)(struct exchange *x, struct choice *c, int index); /* begins: its name is there */
    void (*call_end)(struct exchange *x, struct choice *c, int index);
    void (*finish)(struct exchange *x, struct choice *c);
    void (*end)(struct exchange *x);
    void (*whole)(struct exchange *x);
    /* An error after the first bytes of a stream. */
    void (*fail)(struct exchange *x);
};

/* What a stream has yet to say of a choice. */
struct pending {
    enum part_kind kind;
    struct json_out text;
    int64_t tokens;               /* of the choice when it spoke last */
    double said_at;               /* clock_seconds when a text of it was said last; 0: none was */
    size_t scores, tokens_listed; /* said already */
    bool has_begun, has_finished, prompt_said;
    int64_t offset; /* of the next token in the text, in characters */
};

enum { EXCHANGE_ID_MAX = 80 };

struct exchange {
    struct api *api;
    enum api_route route;
    const struct shape *shape;
    char request_id[EXCHANGE_ID_MAX], session_id[EXCHANGE_ID_MAX];
    bool chose_id, has_session; /* the body gave them */
    const char *model;          /* as asked for, or the first served */
    int64_t created;            /* seconds since 1970 */
    double began, now;          /* clock_seconds: when it was made, and of this pump */
    double between;             /* seconds between the ticks at which streams say their text */
    uint64_t owner;
    uint8_t salt[32];
    json_t *body, *chat; /* chat: the body in the form of chat completions; may be the same */
    const json_t *tools; /* of chat; NULL: calls are not parsed */
    struct params params;
    struct fault fault;
    struct prompt_text *prompts;
    int n_prompts;
    struct choice *choices;  /* [n_prompts * n], those of one prompt together */
    struct pending *pending; /* [n_choices] */
    int n_choices, n_submitted, n_over;
    struct json_out out;
    struct json_out kept; /* of a response that is to be kept: its messages, an array that lacks its end */
    int status;
    bool is_done, was_taken;       /* the body is complete; and has been handed out */
    bool has_begun;                /* a stream has said something */
    struct grammar_share *grammar; /* NULL: answers are free */
    void *state;                   /* of the shape's; free() */
};

/* Prompts and parameters are there: makes the answers and hands them to the scheduler. */
bool exchange_start(struct exchange *x);

/* Around the data of a stream's event. name: of its event: line; NULL: none. */
void exchange_event(struct exchange *x, const char *name);
void exchange_event_end(struct exchange *x);

/* "chatcmpl-" and the request's id. */
void exchange_write_id(struct exchange *x, const char *prefix);
/* "stop_reason": the stop string or the token that ended an answer, or null. */
void exchange_write_stop_reason(struct exchange *x, const struct choice *c);
/* The end of OpenAI's streams: usage where it was asked for, [DONE]. head: writes the members of a chunk. */
void exchange_write_end(struct exchange *x, void (*head)(struct exchange *x));
/* An error as the end of such a stream. */
void exchange_write_failure(struct exchange *x);
/* OpenAI's usage object of all choices, or of one. */
void exchange_write_usage(struct exchange *x, const struct choice *only);
/* Sums over choices; prompts count once. */
void exchange_usage(const struct exchange *x, const struct choice *only, struct request_usage *out,
                    int64_t *reasoning);
#endif
