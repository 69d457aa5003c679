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

struct span call_skip_blanks(struct span s); /* without space, tab, \r and \n at its start */
#endif
