/* A template as a tree. Made by syntax_parse, never changed after. */
#ifndef TOKENIZER_JINJA_SYNTAX_H
#define TOKENIZER_JINJA_SYNTAX_H
#include "base/err.h"
#include "tokenizer/jinja/value.h"

enum node_kind {
    /* statements; lists of them are linked by `next` */
    NODE_TEXT,   /* literal */
    NODE_OUTPUT, /* a */
    NODE_IF,     /* a: condition; body; other: the else part */
    NODE_FOR,    /* targets; a: what is iterated; b: condition or NULL; body; other: when nothing was */
    NODE_SET,    /* targets; a: value, or NULL and body: its text */
    NODE_MACRO,  /* id: name; args: parameters, each a NODE_NAME with its default in a; body */
    NODE_BREAK,
    NODE_CONTINUE,
    /* expressions */
    NODE_LITERAL,
    NODE_NAME,
    NODE_LIST,      /* args */
    NODE_TUPLE,     /* args */
    NODE_DICT,      /* args: NODE_PAIR */
    NODE_PAIR,      /* a: key; b: value */
    NODE_ATTRIBUTE, /* a; literal: name */
    NODE_ITEM,      /* a; b: index */
    NODE_SLICE,     /* a; args: three NODE_LITERAL or expressions, from, to, step */
    NODE_CALL,      /* id: name of a macro or function; args */
    NODE_METHOD,    /* a; id: row of builtins_methods; args */
    NODE_FILTER,    /* a; id: row of builtins_filters; args */
    NODE_TEST,      /* a; id: row of builtins_tests; args */
    NODE_KEYWORD,   /* an argument by name: literal: the name; a */
    NODE_NEGATE,    /* a */
    NODE_NOT,       /* a */
    NODE_AND,       /* a, b */
    NODE_OR,        /* a, b */
    NODE_BINARY,    /* a, b; id: enum operator */
    NODE_COMPARE,   /* a; args: operands, each a NODE_PAIR with id: enum operator and its value in a */
    NODE_CONCAT,    /* args */
    NODE_CHOICE     /* b if a else c; c may be NULL */
};

enum operator{
    OPERATOR_ADD,
    OPERATOR_SUBTRACT,
    OPERATOR_MULTIPLY,
    OPERATOR_DIVIDE,
    OPERATOR_FLOOR_DIVIDE,
    OPERATOR_MODULO,
    OPERATOR_EQUAL,
    OPERATOR_NOT_EQUAL,
    OPERATOR_LESS,
    OPERATOR_LESS_EQUAL,
    OPERATOR_GREATER,
    OPERATOR_GREATER_EQUAL,
    OPERATOR_IN,
    OPERATOR_NOT_IN
};

struct node {
    enum node_kind kind;
    int line, id;
    struct value literal;
    struct node *a, *b, *c, *args, *targets, *body, *other, *next;
};

struct syntax {
    struct store store;
    struct span *names; /* a name's id is its index */
    int n_names;
    struct node *body;
};

/* s: zeroed; freed by the caller also on failure. The text is copied. */
bool syntax_parse(struct syntax *s, const char *text, size_t bytes, struct err *e);
void syntax_deinit(struct syntax *s);
#endif
