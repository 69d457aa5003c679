/* Generated text back to reasoning, content and tool calls, while it arrives. Understands the Qwen3.6 form,
 *   reasoning </think> content <tool_call> <function=NAME> <parameter=KEY> \n VALUE \n </parameter> ...
 * </function> </tool_call> and what models make of it: <think> repeated, </think> missing before a call, text
 * around calls, <function=...> without <tool_call>, closing tags missing at the end, markers quoted inside of
 * values, and JSON inside of <tool_call>
 * ({"name": ..., "arguments": {...}}). What is not understood is content; nothing is lost: the events' texts,
 * one after the other, are the input. However the input is cut into pieces, the events are the same once
 * neighbours of one kind are joined. Of two parameters of one name the first counts. Source: spec of the
 * model, 7.5; vLLM qwen3_reasoning_parser and qwen3coder_tool_parser. */
#ifndef TOKENIZER_REPLY_H
#define TOKENIZER_REPLY_H
#include "base/err.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

enum reply_kind {
    REPLY_MARK,      /* tags, and blanks beside them: to be shown to nobody */
    REPLY_REASONING, /* without newlines at its ends */
    REPLY_CONTENT,
    REPLY_CALL, /* the whole of it */
    /* What is certain of a call before it is complete, in the order of its arguments (reply_preview.h). These
     * have no text: that comes with the call, which follows for sure, unless memory runs out. */
    REPLY_CALL_BEGINS,   /* name */
    REPLY_ARGUMENT,      /* name: of the parameter; its value; NULL: a string, which comes in parts */
    REPLY_ARGUMENT_PART, /* part */
    REPLY_ARGUMENT_ENDS, /* no more parts of it come */
};

struct reply_event {
    enum reply_kind kind;
    const char *text; /* borrowed until the next event: the part of the input; not NUL-terminated */
    size_t bytes;
    const char *name;        /* of the function, or of a parameter; borrowed, as are all others */
    const json_t *arguments; /* REPLY_CALL: an object */
    bool is_cut;             /* REPLY_CALL: the text ended inside of it */
    const json_t *value;     /* REPLY_ARGUMENT */
    const char *part;        /* REPLY_ARGUMENT_PART: whole characters of the string */
    size_t part_bytes;
};

struct reply_options {
    bool in_reasoning; /* the prompt ended in an open <think> */
    const json_t
        *tools; /* as given to the template; types of arguments come from there; NULL: all are strings */
    void (*event)(void *ctx, const struct reply_event *event);
    void *ctx;
};

struct reply;
/* The options are copied, what they point to is borrowed. */
bool reply_create(struct reply **out, const struct reply_options *o, struct err *e);
void reply_free(struct reply *p); /* NULL is fine */
/* Both fail only out of memory. */
bool reply_feed(struct reply *p, const char *text, size_t bytes, struct err *e);
bool reply_finish(struct reply *p, struct err *e); /* no more text comes */
int reply_calls(const struct reply *p);            /* so far */
#endif
