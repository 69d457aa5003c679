/* The APIs' JSON: a request's body to scheduler requests, their events to response bytes. Knows neither
 * sockets nor HTTP framing: http.c calls it on the loop's thread, tests call it with strings. */
#ifndef SERVER_API_H
#define SERVER_API_H
#include "engine/scheduler.h"
#include "grammar/grammar.h"
#include "server/local_media.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

struct api_options {
    struct scheduler *scheduler; /* borrow, all of them */
    const struct tokenizer *tokenizer;
    const struct chat_template *chat_template;
    const struct config *config;
    const char *dir;                 /* of the checkpoint: generation_config.json */
    const char *const *served_names; /* [n_served_names] the first is what answers say */
    int n_served_names;
    int64_t max_model_len;
    int max_n;                  /* of `n`; 0: 16 */
    int64_t stream_interval;    /* tokens of an event of a stream; 0: as time goes */
    int max_images, max_videos; /* of a request; 0: 16 and 4; < 0: none */
    const char *const
        *media_hosts; /* [n_media_hosts] images come from there by URL, see fetch.h; 0: from nowhere */
    int n_media_hosts;
    const struct image_limits *images;     /* NULL: the defaults */
    const struct local_media *local_media; /* and by file:// URL from below there; NULL: from nowhere */
    bool strict_params;                    /* unknown fields are refused */
    const json_t *chat_kwargs;             /* --default-chat-template-kwargs, or NULL */
    bool neutral_sampling;                 /* generation_config.json only says where answers end */
    const json_t *generation;              /* --override-generation-config, or NULL */
    size_t store_bytes;                    /* of responses that are kept; 0: none are */
    double store_seconds;                  /* how long they are kept at most */
};

/* Immutable but for atomic counters: any number of threads may call exchange_create at a time. An exchange
 * belongs to one thread at a time. */
struct api;
bool api_create(struct api **out, const struct api_options *o, struct err *e);
void api_free(struct api *a);

enum api_route {
    API_CHAT_COMPLETIONS,
    API_COMPLETIONS,
    API_RESPONSES,
    API_MESSAGES,
    API_COUNT_TOKENS,
    API_TOKENIZE,
    API_DETOKENIZE,
    API_TOKENIZER_INFO,
    API_CHAT_RENDER,
    API_COMPLETIONS_RENDER,
    API_MODELS,
    API_MODEL,    /* argument: the id */
    API_RESPONSE, /* the same, of one that is kept */
    API_RESPONSE_DELETE,
    API_RESPONSE_CANCEL, /* argument: "ID/cancel" */
    API_SERVER_INFO
};

struct api_caller {
    const char *request_id;
    uint64_t owner;   /* of the key; also the prefix cache's salt */
    uint8_t salt[32]; /* zero without keys */
};

/* One HTTP exchange, from its body to its last byte. */
struct exchange;
/* Never fails but out of memory: what is wrong with the body is the answer (exchange_status 400, 404, 413,
 * 429, 503, 500), in the shape of that API. */
struct exchange *exchange_create(struct api *a, enum api_route route, const char *argument, const char *body,
                                 size_t bytes, const struct api_caller *caller);
void exchange_free(struct exchange *x); /* cancels what runs; NULL is fine */

int exchange_status(const struct exchange *x);     /* HTTP status; 0: not known yet, pump again later */
bool exchange_is_stream(const struct exchange *x); /* text/event-stream instead of application/json */
/* The one that the body asked for; NULL: none. */
const char *exchange_request_id(const struct exchange *x);
const char *exchange_session_id(const struct exchange *x); /* likewise */
int exchange_retry_after(const struct exchange *x);        /* seconds; 0: no such header */
/* How many there are: the more, the longer a stream's text waits for more of it, up to 40 ms. Those that are
 * told the same number speak at the same time. */
void exchange_among(struct exchange *x, int64_t n_exchanges);
/* To be called when the scheduler wakes: appends what there is to send. *done: the body is complete. The
 * bytes are valid until the next call. Of an answer that is no stream all bytes come at once. */
const char *exchange_pump(struct exchange *x, size_t *bytes, bool *done);
/* clock_seconds at which it is to be pumped though the scheduler did not wake: text waits for more of it;
 * 0: none does. */
double exchange_due(const struct exchange *x);
/* clock_seconds until which a pump says nothing, unless an answer ends; 0: a first token is awaited */
double exchange_look(const struct exchange *x);
/* A comment line for a stream that has nothing to say yet; also counts tokens of the prompt done so far. */
const char *exchange_comment(struct exchange *x, size_t *bytes);

/* For the request log and metrics, once done. */
struct exchange_account {
    const char *finish; /* "stop", "length", "tool_calls", "repetition", "abort", "error" */
    int64_t n_choices, max_tokens;
    struct request_usage usage;    /* sums over choices */
    double first_token, per_token; /* seconds; 0 where there was none */
};
void exchange_account(const struct exchange *x, struct exchange_account *out);

/* An error in the shape of that route's API: {"error": {...}} or Anthropic's. malloc'd. */
char *api_error(enum api_route route, int status, const char *type, const char *param, const char *message);
#endif
