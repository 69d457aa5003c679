/* Messages as OpenAI's clients send them to prompts. */
#ifndef SERVER_CONVERSATION_H
#define SERVER_CONVERSATION_H
#include "server/params.h"

struct prompt_text {
    int32_t *ids; /* owned */
    int64_t n;
    char *text; /* owned, `bytes` long; NULL where the request has token ids */
    size_t bytes;
    const char **pictures; /* owned, what it points to is the body's, or of `fetched`; images and videos */
    int n_pictures, n_videos;
    char **fetched; /* data: URLs of images that came by URL, owned */
    int n_fetched;
    size_t fetched_bytes;
    double fetch_until; /* clock_seconds; 0: none was fetched */
    bool in_reasoning;  /* ends inside of <think> */
};
void prompt_text_deinit(struct prompt_text *p); /* accepts a zeroed one */

int conversation_images_most(const struct api *a); /* of a request */

/* Checks `messages` of the body and writes them as templates want them: parts of content in the template's
 * form, arguments of tool calls as objects, developer as system, system messages at the beginning as one. */
bool conversation_messages(json_t **out, struct prompt_text *p, const struct api *a, const json_t *body,
                           struct fault *f);
/* `tools` of the body, checked; NULL where there are none or tool_choice is "none". Borrowed from body. */
bool conversation_tools(const json_t **out, const json_t *body, struct fault *f);
/* Messages and tools of the body rendered and as tokens. */
bool conversation_prompt(struct prompt_text *out, const struct api *a, const json_t *body,
                         const struct params *p, struct fault *f);
/* A text, or token ids (then text is NULL). */
bool prompt_from_text(struct prompt_text *out, const struct api *a, const char *text, size_t bytes,
                      const char *param, struct fault *f);
/* truncate_prompt_tokens, then whether it is empty or leaves no room in the context for max_tokens. field:
 * where the request has the prompt. */
bool prompt_fit(struct prompt_text *out, const struct api *a, const struct params *p, const char *field,
                struct fault *f);
#endif
