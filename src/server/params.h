/* Fields that requests of all routes have in common: how to sample, when to stop, what to report. */
#ifndef SERVER_PARAMS_H
#define SERVER_PARAMS_H
#include "server/api_struct.h"
#include "server/fields.h"
#include "server/repeats.h"
#include "server/stops.h"

struct params {
    struct sampling sampling; /* seed of the first choice; each further one has the next */
    float presence_penalty, frequency_penalty, repetition_penalty;
    int64_t max_tokens; /* < 0: what fits */
    int64_t min_tokens;
    int n;
    bool stream, include_usage, continuous_usage;
    int64_t stream_interval; /* tokens between two chunks, at least; 0: as time goes */
    struct stop_string *stops;
    int n_stops;
    bool include_stop;
    int32_t *stop_tokens; /* the model's own included, unless ignore_eos */
    int n_stop_tokens;
    struct logit_bias *bias;
    int n_bias;
    int32_t *allowed;
    int n_allowed;
    struct token_run *bad_words; /* ids owned */
    int n_bad_words;
    int logprobs, prompt_logprobs; /* best tokens besides the token itself; < 0: none */
    int32_t *score_ids; /* [n_score_ids] scored in place of the best; logprobs is their number then */
    int n_score_ids;
    struct repeats_rule repeats;
    bool echo;         /* completions */
    bool keep_special; /* skip_special_tokens: false */
    bool return_token_ids, tokens_as_ids;
    bool no_reasoning; /* include_reasoning: false */
    int64_t truncate;  /* prompt tokens to keep; < 0: all */
    bool truncate_right;
    const char *cache_salt; /* borrow; NULL: none */
    int64_t priority;
    /* of conversations */
    enum chat_thinking thinking;
    bool preserve_thinking, add_vision_id, add_generation_prompt, continue_final_message;
    const json_t *documents; /* borrow; NULL: none */
    int64_t thinking_budget; /* < 0: none */
    bool one_call;           /* parallel_tool_calls: false */
};

/* Of a body in the form of the chat or the completions route. Borrows from body. False: *f says why; to be
 * freed in either case. */
bool params_read(struct params *p, const struct api *a, const json_t *body, bool is_chat, struct fault *f);
void params_deinit(struct params *p); /* accepts a zeroed one */

/* What template arguments and efforts say, without the rest: for routes that only render. */
bool params_read_template(struct params *p, const struct api *a, const json_t *body, struct fault *f);
#endif
