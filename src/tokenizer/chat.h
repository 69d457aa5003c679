/* Conversations to prompts: a checkpoint's own chat template, rendered as Hugging Face's apply_chat_template
 * renders it, byte for byte, errors included. */
#ifndef TOKENIZER_CHAT_H
#define TOKENIZER_CHAT_H
#include "base/err.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

struct chat_template; /* immutable: may be shared by threads */

/* dir/chat_template.jinja; without it, chat_template of dir/tokenizer_config.json: a text, or a list of named
 * ones of which "default" is taken; without that, the built-in template of the Qwen3.6 family. Errors name
 * the file and the line of what the template asks for and jinja.h does not do. */
bool chat_template_load(struct chat_template **out, const char *dir, struct err *e);
/* The template of this file in place of the checkpoint's. */
bool chat_template_load_file(struct chat_template **out, const char *dir, const char *path, struct err *e);
void chat_template_free(struct chat_template *t); /* NULL is fine */
bool chat_template_is_built_in(const struct chat_template *t);
bool chat_template_takes_documents(const struct chat_template *t);            /* it has the word */
const char *chat_template_text(const struct chat_template *t, size_t *bytes); /* borrow; not NUL-terminated */

enum chat_thinking {
    CHAT_THINKING_DEFAULT, /* what the template does when nobody says: on */
    CHAT_THINKING_OFF,
    CHAT_THINKING_ON
};

struct chat_options {
    bool add_generation_prompt; /* end with the opening of an assistant turn */
    enum chat_thinking thinking;
    bool preserve_thinking;  /* keep the reasoning of turns before the last question */
    bool add_vision_id;      /* number images and videos: "Picture 1: " */
    const json_t *documents; /* an array of objects, or NULL */
};

/* messages: array of objects with role, content, and for assistants reasoning_content and tool_calls, whose
 * arguments are objects, not strings. tools: array of {"type": "function", ...}; NULL, null or [] for none.
 * Both stay unchanged. The template sees messages, tools, documents, the options under their names,
 * and the special tokens of tokenizer_config.json (bos_token, eos_token, ...). *text is malloc'd,
 * NUL-terminated, `bytes` long without the NUL, and the caller's. Integers over 64 bits are an error already
 * when a document is parsed. Errors are ERR_ARGUMENT (the template's own words where it raises one),
 * ERR_LIMIT or ERR_MEMORY. */
bool chat_render(char **text, size_t *bytes, const struct chat_template *t, const json_t *messages,
                 const json_t *tools, const struct chat_options *o, struct err *e);
#endif
