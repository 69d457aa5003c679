/* One answer under way: tokens to text, stop strings, reasoning, content and calls, and what the client wants
 * to know of each token. Knows no API's shape. */
#ifndef SERVER_CHOICE_H
#define SERVER_CHOICE_H
#include "server/constraint.h"
#include "server/conversation.h"
#include "tokenizer/reply.h"

enum part_kind {
    PART_NONE,
    PART_REASONING,
    PART_CONTENT,
    PART_CALL,      /* calls[n_calls - 1] begins: its name is there */
    PART_ARGUMENTS, /* more of the JSON text of its arguments */
    PART_CALL_END
};

/* A token's score and the best ones of its place, in struct choice's `top`. */
struct score {
    int32_t id;
    float logprob;
    int rank;
    bool has_score; /* the first token of a prompt has none */
    size_t top, n_top;
};

struct score_list {
    struct score *items;
    size_t n, capacity;
    struct token_score *top;
    size_t n_top, top_capacity;
};

struct tool_call {
    char *name;
    struct json_out arguments; /* an object as JSON, or as much of it as came before a limit cut the call */
    size_t whole;              /* bytes of it up to the end of an argument that is complete */
    bool is_open;              /* more may come */
    bool is_cut;               /* nothing more comes, and the object has no end: nobody can take it for one */
};

struct choice_options {
    const struct api *api;
    const struct params *params;
    const struct prompt_text *prompt;
    const json_t *tools;                 /* NULL: text that looks like a call is content */
    bool is_plain;                       /* text as it comes: neither reasoning nor calls */
    bool wants_prompt;                   /* scores of the prompt are kept */
    const struct grammar_share *grammar; /* that it follows, or NULL */
    void *ctx;
    /* What is certain. text: of reasoning, content, arguments, never empty; NULL with the other kinds. */
    void (*part)(void *ctx, enum part_kind kind, const char *text, size_t n);
};

struct choice {
    struct choice_options o;
    struct exchange *exchange;
    int index;               /* in the exchange */
    struct request *request; /* NULL: not submitted yet, or over */
    struct detokenizer detokenizer;
    struct stops *stops;     /* NULL: none asked for */
    struct reply *reply;     /* NULL: is_plain */
    struct repeats *repeats; /* NULL: none are looked for */
    bool in_reasoning;
    int64_t n_tokens, n_reasoning; /* of the answer, a stop token included */
    struct json_out reasoning, content;
    struct tool_call *calls;
    int n_calls;
    struct score_list scores, prompt_scores;
    int32_t *tokens; /* where they are to be returned */
    size_t tokens_capacity;
    bool is_submitted, is_over;
    const char *finish;             /* "stop", "length", "tool_calls", "repetition", "abort", "error" */
    int stop_string;                /* which ended it; -1: none */
    int32_t stop_token;             /* not one of the model's own; -1: none */
    double first_token, last_token; /* clock_seconds; 0: none yet */
    struct request_usage usage;     /* once over */
    char error[1000];               /* of "error" */
};

bool choice_init(struct choice *c, const struct choice_options *o, struct fault *f);
void choice_deinit(struct choice *c); /* cancels; accepts a zeroed one */
/* Takes what the scheduler has. False: out of memory. */
bool choice_pump(struct choice *c);
void choice_usage(const struct choice *c, struct request_usage *out);
#endif
