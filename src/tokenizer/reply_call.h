/* One tool call in generated text: where it ends, its name and its arguments. A part of reply.c. */
#ifndef TOKENIZER_REPLY_CALL_H
#define TOKENIZER_REPLY_CALL_H
#include "base/err.h"
#include "tokenizer/jinja/pystr.h"
#include <jansson.h>

enum call_result {
    CALL_NONE, /* the text at hand is no call */
    CALL_WAIT, /* more text will tell */
    CALL_FOUND,
    CALL_FAILED /* out of memory */
};

/* Where the search for the end goes on when more text has come; zeroed for a new call. */
struct call_search {
    size_t from;
    size_t first_close; /* end of the first </function>; 0: none */
    int attempts;
};

struct call {
    size_t bytes; /* of the text */
    char *name;
    json_t *arguments;
    bool is_cut;
};

/* s begins with <tool_call> or <function=. final: nothing comes after s. */
enum call_result call_find(struct call *out, struct call_search *search, struct span s, const json_t *tools,
                           bool final, struct err *e);
void call_deinit(struct call *c);

/* Parts of this, for reply_preview.c. */
enum { CALL_NAME_MAX = 256 };

struct span call_skip_blanks(struct span s); /* without space, tab, \r and \n at its start */
struct span call_trim(struct span s);        /* and at its end */
/* The name in s up to '>', `bytes` long. CALL_NONE: there is none; CALL_WAIT: s ends first. */
enum call_result call_name(char name[CALL_NAME_MAX], struct span s, size_t *bytes);
/* NULL: none is called so. */
const json_t *call_function(const json_t *tools, const char *name);

enum argument_kind {
    ARGUMENT_TEXT,         /* a string, whatever it is */
    ARGUMENT_TEXT_OR_NULL, /* unless the whole of it is null or none */
    ARGUMENT_WHOLE         /* the whole text decides */
};
enum argument_kind call_argument_kind(const json_t *parameters, const char *key);
/* value: between the tags. NULL: out of memory. */
json_t *call_argument(const json_t *parameters, const char *key, struct span value);
#endif
