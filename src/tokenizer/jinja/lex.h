/* A template's characters to tokens, one at a time. Text between tags comes out with the whitespace control
 * of tags, trim_blocks and lstrip_blocks applied; comments do not come out. */
#ifndef TOKENIZER_JINJA_LEX_H
#define TOKENIZER_JINJA_LEX_H
#include "tokenizer/jinja/value.h"

enum token_kind {
    TOKEN_END,
    TOKEN_TEXT,
    TOKEN_OUTPUT_BEGIN,
    TOKEN_OUTPUT_END,
    TOKEN_TAG_BEGIN,
    TOKEN_TAG_END,
    TOKEN_NAME,
    TOKEN_STRING,
    TOKEN_NUMBER,
    TOKEN_OPERATOR
};

struct token {
    enum token_kind kind;
    int line;
    struct span text;   /* as written; of a string: what it stands for */
    struct value value; /* of a number */
};

/* A plain value: a copy of it is a place to go back to. */
struct lexer {
    struct span source;
    size_t at;
    int line;
    enum token_kind inside; /* TOKEN_OUTPUT_BEGIN, TOKEN_TAG_BEGIN, else between tags */
    enum token_kind coming; /* the tag that follows the text just given; TOKEN_TEXT: none */
    int open;               /* brackets */
    bool line_starts;       /* the last tag ate the end of its line */
    struct store *store;
};

/* source: newlines are \n. */
void lex_init(struct lexer *l, struct span source, struct store *store);
bool lex_next(struct lexer *l, struct token *out, struct err *e);
#endif
