/* Many requests over one engine, each with the tokens that it would get alone. A thread of the scheduler's
 * own drives the engine, its sequences and its caches; requests come in and tokens go out through bounded
 * queues, so any other thread may call what is below. Knows tokens and pictures, not text. */
#ifndef ENGINE_SCHEDULER_H
#define ENGINE_SCHEDULER_H
#include "engine/engine.h"
#include "engine/sample.h"

enum { TOP_LOGPROBS_MAX = 20 };

struct scheduler_options {
    struct engine *engine;     /* borrow; nobody else's while the scheduler lives */
    const struct model *model; /* the engine's */
    int64_t max_queued;        /* requests that wait; 0: 1024 */
    int64_t step_tokens;       /* most rows of a step, prompts' chunks included; 0: the engine's */
    bool fixed_drafts;         /* always as many as may be, whether it pays or not */
    double decode_seconds;     /* target between two tokens of a stream, to which chunks are cut; 0: 0.1 */
    /* Bit id % 32 of known[id / 32] is set where token id has a text: no other is ever sampled. Borrow; NULL:
     * all are known. */
    const uint32_t *known;
    const struct image_limits
        *images;                  /* of requests' pictures, and who decodes them; borrow; NULL: defaults */
    bool no_pictures;             /* the vision tower is not bound, pictures are refused */
    bool no_prefix_cache;         /* as if the engine had no snapshots */
    uint64_t host_cache_bytes;    /* states and pages kept in host memory besides; 0: none */
    uint64_t encoder_cache_bytes; /* what the tower made of pictures, in host memory; 0: none is kept */
    /* They are kept in files of this folder too, up to so many bytes, for whoever has the same identity: see
     * engine/disk_cache.h. NULL: they are not */
    const char *disk_folder; /* borrow */
    uint64_t disk_bytes;
    uint8_t disk_identity[32];
    /* The run of tokens that ends a turn, <|im_end|> and the newline after it: where prompts are likely to
     * part, so what is known there is kept. 0: none */
    const int32_t *turn_end; /* borrow */
    int n_turn_end;
    int64_t interval; /* and so many rows after the last such place; 0: 4096 */
    void *ctx;
    /* From the scheduler's thread, at most once a step: a request has news. ended: the last of one */
    void (*wake)(void *ctx, bool ended);
    void (*warn)(void *ctx, const char *text); /* from any thread: a line about the folder; may be NULL */
};

struct scheduler;
/* Starts the thread. */
bool scheduler_create(struct scheduler **out, const struct scheduler_options *o, struct err *e);
void scheduler_free(struct scheduler *s); /* cancels what runs, then waits for the thread; NULL is fine */

/* What an answer must look like, a token at a time. Called on the scheduler's thread. */
struct constraint {
    void *state;
    /* Clears bit id % 32 of mask[id / 32] where token id must not come next. */
    void (*mask)(void *state, uint32_t *mask, int64_t n_vocab);
    /* The token was sampled. false: no more may follow, the request ends with FINISHED_STOP. */
    bool (*advance)(void *state, int32_t id);
    void (*free)(void *state);
};

struct logit_bias {
    int32_t id;
    float bias;
};

/* Everything is copied but `constraint`, which is taken over: its free is called once, also on failure, and
 * it lives until then. A zeroed one with a prompt scores it and no more: see max_tokens, top_logprobs,
 * prompt_logprobs, thinking_budget, and constraint_after where there is a constraint. */
struct request_options {
    const int32_t *prompt; /* one image token for each image, one video token for each pair of frames */
    int64_t n_prompt;
    const char *const *pictures; /* [n_pictures] in the prompt's order: images as image_load takes them,
                                  videos as frames_patches does */
    int n_pictures;

    struct sampling sampling;
    float presence_penalty, frequency_penalty; /* of the answer's tokens; as OpenAI's */
    float repetition_penalty;                  /* of prompt and answer, as Hugging Face's; 0 or 1: off */
    int64_t max_tokens;                        /* 0: no token, scores of the prompt only; < 0: what fits */
    int64_t min_tokens;                        /* no stop token before */
    const int32_t *stop_tokens;
    int n_stop_tokens;
    const int32_t *never; /* placeholders, say */
    int n_never;
    const struct logit_bias *bias;
    int n_bias;
    const int32_t *allowed; /* [n_allowed] no others; n_allowed 0: all */
    int n_allowed;
    const struct token_run {
        const int32_t *ids;
        int n;
    } * bad_words; /* sequences that are never completed */
    int n_bad_words;
    int top_logprobs;         /* of each answer token: itself and so many best; < 0: none asked for */
    const int32_t *score_ids; /* [n_score_ids] of an answer token itself and these, in place of the best */
    int n_score_ids;          /* at most TOP_LOGPROBS_MAX; top_logprobs >= 0 where there are any */
    int prompt_logprobs;      /* best ones of the prompt's tokens; < 0: none */
    struct constraint *constraint; /* or NULL */
    int32_t constraint_after;      /* the constraint begins after this token (</think>); < 0: at once */
    /* Tokens of the answer until thinking_end is forced; < 0: none. The answer begins in thinking, which is
     * over once constraint_after has come, or if thinking_end does not have that, the first of it. */
    int64_t thinking_budget;
    const int32_t *thinking_end;
    int n_thinking_end;

    int priority;         /* lower first */
    uint64_t owner;       /* whose: requests of one priority take turns among owners */
    uint8_t salt[32];     /* prefixes and pictures are shared by requests of the same salt only */
    bool no_prefix_cache; /* neither reads nor writes it, nor the encoder cache */
};

struct token_score {
    int32_t id;
    float logprob;
};

enum request_event_kind {
    REQUEST_PROMPT,  /* a prompt token's score, an image token's too; in order; the first token has none */
    REQUEST_TOKEN,   /* of the answer */
    REQUEST_FINISHED /* the last event */
};
enum request_finish { FINISHED_STOP, FINISHED_LENGTH, FINISHED_CANCELLED, FINISHED_ERROR };

struct request_event {
    enum request_event_kind kind;
    struct token_score token; /* logprob: of the distribution before temperature and penalties, f32 */
    int rank;                 /* 1: the most likely */
    int n_top;
    struct token_score top[TOP_LOGPROBS_MAX];
    enum request_finish finish;
    int32_t stop_token; /* of FINISHED_STOP: which; token, rank and top are its score; -1: none */
};

struct request_usage {
    int64_t prompt_tokens, cached_tokens, picture_tokens, answer_tokens;
    int64_t drafted, accepted;
    double queued_seconds, prefill_seconds, decode_seconds;
    int64_t prefilled; /* rows of the prompt computed so far, cached ones included: progress */
};

struct request;
/* ERR_BUSY: the queue is full. ERR_LIMIT: the prompt leaves no room for a token (the sentence has both
 * numbers). ERR_ARGUMENT: what cannot be done. */
bool scheduler_submit(struct scheduler *s, struct request **out, const struct request_options *o,
                      struct err *e);
/* Up to `most` events, in order, each once; 0: none now. After REQUEST_FINISHED none comes. A request whose
 * events are not taken is not stepped when its queue is full, and holds up no other. */
int request_take(struct request *r, struct request_event *out, int most);
void request_usage(const struct request *r, struct request_usage *out);
/* Of FINISHED_ERROR: the sentence; valid until request_free. */
const char *request_error(const struct request *r);
void request_cancel(struct request *r); /* takes effect before the next step; a FINISHED event comes */
void request_free(struct request *r);   /* cancels, and gives up the events; does not wait; NULL is fine */

struct scheduler_stats {
    int64_t running, waiting, waiting_tokens; /* now */
    int64_t pages, pages_used, states, states_used;
    int64_t preemptions, steps, step_rows;
    int64_t prefix_queries, prefix_hits;   /* tokens asked for, tokens found */
    int64_t disk_hits;                     /* of these, by reading files */
    int64_t encoder_queries, encoder_hits; /* pictures whose rows were asked for, that were kept */
    uint64_t encoder_bytes;                /* of rows kept now */
    int64_t drafts, drafted, accepted, accepted_at[DRAFTS_MAX];
    double last_step; /* clock_seconds of its end; for a watchdog */
    bool failed;      /* the backend is lost; every request ends in FINISHED_ERROR */
};
void scheduler_stats(struct scheduler *s, struct scheduler_stats *out);
/* What is known of prompts, in files too, and of pictures is forgotten before any request submitted from now
 * on begins. Requests that run leave theirs again. */
void scheduler_forget(struct scheduler *s);
#endif
