/* What is certain of a tool call while more of it arrives: its name once it is a function of the tools and
 * its first parameter has begun; strings as far as nothing in them may turn out to be a tag or blank before
 * one; other values once they are complete. Put together it is the beginning of the arguments that call_find
 * gives for the whole call, and depends on the text alone, not on how it came. Where a call leaves the form
 * that templates teach, nothing more is said of it. A part of reply.c. */
#ifndef TOKENIZER_REPLY_PREVIEW_H
#define TOKENIZER_REPLY_PREVIEW_H
#include "tokenizer/reply_call.h"

enum call_news_kind {
    CALL_NEWS_NAME,        /* name: the function */
    CALL_NEWS_VALUE,       /* name: the parameter, and its value */
    CALL_NEWS_TEXT_BEGINS, /* name: the parameter, a string */
    CALL_NEWS_TEXT,        /* more of it: whole characters */
    CALL_NEWS_TEXT_ENDS
};

/* Valid until the next call. */
struct call_news {
    enum call_news_kind kind;
    const char *name;
    const json_t *value;
    struct span text;
};

enum preview_state { PREVIEW_HEAD, PREVIEW_BETWEEN, PREVIEW_VALUE, PREVIEW_OVER };

/* Zero-initialise for a new call. */
struct call_preview {
    enum preview_state state;
    enum argument_kind kind;
    bool is_again; /* a parameter of this name came before */
    size_t value;  /* where the value begins */
    size_t at;     /* everything before was looked at */
    char function[CALL_NAME_MAX], key[CALL_NAME_MAX];
    json_t *seen;    /* names of parameters */
    json_t *current; /* the value handed out last */
};

/* s: the call as far as it has come, as for call_find, and only that. False: there is no news. */
bool call_preview_next(struct call_preview *v, struct call_news *out, struct span s, const json_t *tools);
void call_preview_deinit(struct call_preview *v);
#endif
