/* The chat format of the Qwen3.5/3.6 family: messages and tools in, the prompt's text out. Renders what the
 * model's own chat_template.jinja renders, byte for byte, errors included. */
#ifndef TOKENIZER_CHAT_H
#define TOKENIZER_CHAT_H
#include "base/err.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

enum chat_thinking {
    CHAT_THINKING_DEFAULT, /* what the template does when nobody says: on */
    CHAT_THINKING_OFF,
    CHAT_THINKING_ON
};

struct chat_options {
    bool add_generation_prompt; /* end with the opening of an assistant turn */
    enum chat_thinking thinking;
    bool preserve_thinking; /* keep the reasoning of turns before the last question */
    bool add_vision_id;     /* number images and videos: "Picture 1: " */
};

/* messages: array of objects with role, content, and for assistants reasoning_content and tool_calls, whose
 * arguments are objects, not strings. tools: array of {"type": "function", ...}; NULL, null or [] for none.
 * Both stay unchanged. *text is malloc'd, NUL-terminated, `bytes` long without the NUL, and the caller's.
 * Values of tools and arguments are written as Python's json.dumps(ensure_ascii=False) writes them, but for
 * integers over 64 bits, which are an error already when the document is parsed. Errors are ERR_ARGUMENT with
 * the template's own words, or ERR_MEMORY. */
bool chat_render(char **text, size_t *bytes, const json_t *messages, const json_t *tools,
                 const struct chat_options *o, struct err *e);
#endif
