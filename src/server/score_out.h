/* Log-probabilities of tokens in the shapes that OpenAI's APIs and vLLM have for them. */
#ifndef SERVER_SCORE_OUT_H
#define SERVER_SCORE_OUT_H
#include "server/choice.h"

/* A token as text: its own where that is UTF-8 without NUL, else "bytes:\xe2\x82"; as_ids: "token_id:17". */
void score_out_token(struct json_out *o, const struct api *a, int32_t id, bool as_ids);
/* Chat: the array of `content`, entries from..l->n. */
void score_out_chat(struct json_out *o, const struct api *a, const struct score_list *l, size_t from,
                    bool as_ids);

struct score_range {
    const struct score_list *list;
    size_t from;
    int best; /* entries of a map besides the token's own */
};
/* Completions: the object of parallel arrays over two ranges, prompt and answer; offsets count characters
 * from *offset on, which moves. */
void score_out_completions(struct json_out *o, const struct api *a, const struct score_range ranges[2],
                           bool as_ids, int64_t *offset);
/* vLLM's prompt_logprobs: [null, {"17": {"logprob": ..., "rank": ..., "decoded_token": ...}}, ...] */
void score_out_prompt(struct json_out *o, const struct api *a, const struct score_list *l, int best);
#endif
