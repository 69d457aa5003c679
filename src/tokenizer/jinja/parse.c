/* Tokens to a tree, by recursive descent in the order of Jinja's own precedences. */
#include "tokenizer/jinja/builtins.h"
#include "tokenizer/jinja/lex.h"
#include "tokenizer/jinja/syntax.h"
#include <stdint.h>
#include <stdio.h>

enum { SOURCE_BYTES_MAX = 1 << 20, NAMES_MAX = 1000, LEVELS_MAX = 200, STORE_BYTES_MAX = 256 << 20 };

struct parser {
    struct syntax *syntax;
    struct lexer lexer;
    struct token token; /* the next one */
    int levels, loops;  /* nested: anything; for, inside of the macro */
    bool in_macro;
    struct err *e;
};

/* A list under construction. */
struct list {
    struct node *first, **end;
};

static void list_add(struct list *list, struct node *n)
{
    *(list->end ? list->end : &list->first) = n;
    list->end = &n->next;
}

static bool advance(struct parser *p)
{
    return lex_next(&p->lexer, &p->token, p->e);
}

static struct node *new_node(struct parser *p, enum node_kind kind)
{
    struct node *n = store_take(&p->syntax->store, 1, sizeof *n);
    if (!n) {
        err_memory(p->e, "a template", sizeof *n);
        return NULL;
    }
    *n = (struct node){ .kind = kind, .line = p->token.line };
    return n;
}

static const char *shown(char out[64], const struct token *t)
{
    static const char *const kinds[] = { [TOKEN_END] = "the end of the template",
                                         [TOKEN_TEXT] = "text",
                                         [TOKEN_OUTPUT_BEGIN] = "'{{'",
                                         [TOKEN_OUTPUT_END] = "'}}'",
                                         [TOKEN_TAG_BEGIN] = "'{%'",
                                         [TOKEN_TAG_END] = "'%}'" };
    int n = t->text.bytes < 40 ? (int)t->text.bytes : 40;
    if (t->kind >= TOKEN_NAME)
        snprintf(out, 64, t->kind == TOKEN_STRING ? "a string" : "'%.*s'", n, t->text.at);
    else
        snprintf(out, 64, "%s", kinds[t->kind]);
    return out;
}

static bool unexpected(struct parser *p, const char *expected)
{
    char found[64];
    return err_set(p->e, ERR_FORMAT, "line %d: expected %s, found %s", p->token.line, expected,
                   shown(found, &p->token));
}

static bool unsupported(struct parser *p, int line, const char *what, struct span name)
{
    return err_set(p->e, ERR_UNSUPPORTED, "line %d: the %s '%.*s' is not supported", line, what,
                   name.bytes < 60 ? (int)name.bytes : 60, name.at);
}

static bool at_operator(const struct parser *p, const char *text)
{
    return p->token.kind == TOKEN_OPERATOR && span_is(p->token.text, text);
}

static bool at_word(const struct parser *p, const char *text)
{
    return p->token.kind == TOKEN_NAME && span_is(p->token.text, text);
}

static bool want(struct parser *p, enum token_kind kind, const char *expected)
{
    return p->token.kind == kind ? advance(p) : unexpected(p, expected);
}

static bool want_operator(struct parser *p, const char *text)
{
    char quoted[8];
    snprintf(quoted, sizeof quoted, "'%s'", text);
    return at_operator(p, text) ? advance(p) : unexpected(p, quoted);
}

static bool want_word(struct parser *p, const char *text)
{
    char quoted[16];
    snprintf(quoted, sizeof quoted, "'%s'", text);
    return at_word(p, text) ? advance(p) : unexpected(p, quoted);
}

static bool is_reserved(struct span name)
{
    static const char *const words[] = { "if", "elif", "else", "for", "in",
                                         "is", "not",  "and",  "or",  "recursive" };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (span_is(name, words[i])) return true;
    return false;
}

static bool is_constant(struct span name)
{
    return span_is(name, "true") || span_is(name, "false") || span_is(name, "none") ||
           span_is(name, "True") || span_is(name, "False") || span_is(name, "None");
}

static bool intern(struct parser *p, int *id, struct span name)
{
    struct syntax *s = p->syntax;
    for (*id = 0; *id < s->n_names; ++*id)
        if (span_equal(s->names[*id], name)) return true;
    if (s->n_names == NAMES_MAX)
        return err_set(p->e, ERR_LIMIT, "line %d: more than %d names", p->token.line, NAMES_MAX);
    s->names[s->n_names++] = name;
    return true;
}

static bool enter(struct parser *p)
{
    if (++p->levels <= LEVELS_MAX) return true;
    return err_set(p->e, ERR_LIMIT, "line %d: nested over %d levels deep", p->token.line, LEVELS_MAX);
}

static bool parse_expression(struct parser *p, struct node **out);
static bool parse_unary(struct parser *p, struct node **out, bool with_filters);

/* The name that a token assigns to or that a parameter has. */
static bool parse_name(struct parser *p, struct node **out)
{
    *out = NULL;
    bool is_free = p->token.kind == TOKEN_NAME && !is_reserved(p->token.text) && !is_constant(p->token.text);
    if (!is_free) return unexpected(p, "a name");
    *out = new_node(p, NODE_NAME);
    return *out && intern(p, &(*out)->id, p->token.text) && advance(p);
}

static bool parse_word_expression(struct parser *p, struct node **out)
{
    struct span name = p->token.text;
    if (is_constant(name)) {
        char first = name.at[0];
        *out = new_node(p, NODE_LITERAL);
        if (!*out) return false;
        (*out)->literal = (struct value){ .kind = VALUE_NONE };
        if (first != 'n' && first != 'N') (*out)->literal = value_bool(first == 't' || first == 'T');
        return advance(p);
    }
    if (is_reserved(name)) return unsupported(p, p->token.line, "name", name);
    if (span_is(name, "varargs") || span_is(name, "kwargs") || span_is(name, "caller"))
        return unsupported(p, p->token.line, "name", name);
    return parse_name(p, out);
}

/* Strings that stand side by side are one. */
static bool parse_strings(struct parser *p, struct node **out)
{
    *out = new_node(p, NODE_LITERAL);
    if (!*out) return false;
    struct span all = p->token.text;
    if (!advance(p)) return false;
    while (p->token.kind == TOKEN_STRING) {
        struct span more = p->token.text;
        char *joined = store_take(&p->syntax->store, all.bytes + more.bytes, 1);
        if (!joined) return err_memory(p->e, "a template", all.bytes + more.bytes);
        memcpy(joined, all.at, all.bytes);
        memcpy(joined + all.bytes, more.at, more.bytes);
        all = (struct span){ joined, all.bytes + more.bytes };
        if (!advance(p)) return false;
    }
    (*out)->literal = value_string(all);
    return true;
}

/* Expressions up to a closing bracket; a comma may stand at the end. */
static bool parse_items(struct parser *p, struct list *list, const char *close)
{
    struct node *item;
    while (!at_operator(p, close)) {
        if (!parse_expression(p, &item)) return false;
        list_add(list, item);
        if (!at_operator(p, ",")) break;
        if (!advance(p)) return false;
    }
    return want_operator(p, close);
}

static bool parse_parentheses(struct parser *p, struct node **out)
{
    struct list list = { 0 };
    struct node *tuple = new_node(p, NODE_TUPLE), *item;
    if (!tuple || !advance(p)) return false;
    if (!at_operator(p, ")")) {
        if (!parse_expression(p, &item)) return false;
        if (at_operator(p, ")")) {
            *out = item;
            return advance(p);
        }
        list_add(&list, item);
        if (!want_operator(p, ",")) return false;
    }
    *out = tuple;
    if (!parse_items(p, &list, ")")) return false;
    tuple->args = list.first;
    return true;
}

static bool parse_dict(struct parser *p, struct node **out)
{
    struct list list = { 0 };
    *out = new_node(p, NODE_DICT);
    if (!*out || !advance(p)) return false;
    while (!at_operator(p, "}")) {
        struct node *pair = new_node(p, NODE_PAIR);
        if (!pair || !parse_expression(p, &pair->a) || !want_operator(p, ":") ||
            !parse_expression(p, &pair->b))
            return false;
        list_add(&list, pair);
        if (!at_operator(p, ",")) break;
        if (!advance(p)) return false;
    }
    (*out)->args = list.first;
    return want_operator(p, "}");
}

static bool parse_primary(struct parser *p, struct node **out)
{
    struct list list = { 0 };
    if (p->token.kind == TOKEN_NAME) return parse_word_expression(p, out);
    if (p->token.kind == TOKEN_STRING) return parse_strings(p, out);
    if (at_operator(p, "(")) return parse_parentheses(p, out);
    if (at_operator(p, "{")) return parse_dict(p, out);
    if (p->token.kind == TOKEN_NUMBER) {
        *out = new_node(p, NODE_LITERAL);
        if (!*out) return false;
        (*out)->literal = p->token.value;
        return advance(p);
    }
    if (!at_operator(p, "[")) return unexpected(p, "an expression");
    *out = new_node(p, NODE_LIST);
    if (!*out || !advance(p) || !parse_items(p, &list, "]")) return false;
    (*out)->args = list.first;
    return true;
}

/* name = value, where a name and "=" follow. */
static bool parse_argument(struct parser *p, struct node **out)
{
    struct lexer before = p->lexer;
    struct token name = p->token;
    if (name.kind == TOKEN_NAME && !is_reserved(name.text)) {
        if (!advance(p)) return false;
        if (at_operator(p, "=")) {
            *out = new_node(p, NODE_KEYWORD);
            if (!*out || !advance(p)) return false;
            (*out)->literal = value_string(name.text);
            return parse_expression(p, &(*out)->a);
        }
        p->lexer = before;
        p->token = name;
    }
    if (at_operator(p, "*") || at_operator(p, "**"))
        return unsupported(p, p->token.line, "unpacked argument", p->token.text);
    return parse_expression(p, out);
}

/* From "(" to ")". */
static bool parse_arguments(struct parser *p, struct node **args)
{
    struct list list = { 0 };
    struct node *arg;
    bool named = false;
    if (!want_operator(p, "(")) return false;
    while (!at_operator(p, ")")) {
        if (!parse_argument(p, &arg)) return false;
        if (named && arg->kind != NODE_KEYWORD)
            return err_set(p->e, ERR_FORMAT, "line %d: an argument without a name follows one with",
                           arg->line);
        named = arg->kind == NODE_KEYWORD;
        list_add(&list, arg);
        if (!at_operator(p, ",")) break;
        if (!advance(p)) return false;
    }
    *args = list.first;
    return want_operator(p, ")");
}

static bool check_arguments(struct parser *p, const struct node *n, const char *what, const struct builtin *b)
{
    bool given[BUILTIN_PARAMETERS] = { false };
    int count = 0, most = builtins_parameters(b);
    for (const struct node *arg = n->args; arg; arg = arg->next, count++) {
        int i = arg->kind == NODE_KEYWORD ? builtins_parameter(b, arg->literal.string) : count;
        if (i < 0)
            return err_set(p->e, ERR_UNSUPPORTED,
                           "line %d: the argument '%.*s' of the %s '%s' is not supported", n->line,
                           (int)arg->literal.string.bytes, arg->literal.string.at, what, b->name);
        if (i >= most || given[i])
            return err_set(p->e, ERR_FORMAT, "line %d: the %s '%s' takes at most %d arguments, each once",
                           n->line, what, b->name, most);
        given[i] = true;
    }
    for (int i = 0; i < b->required; i++)
        if (!given[i])
            return err_set(p->e, ERR_FORMAT, "line %d: the %s '%s' needs its argument '%s'", n->line, what,
                           b->name, b->parameters[i]);
    return true;
}

static bool look_up(struct parser *p, struct node *n, const struct builtin *table, const char *what,
                    struct span name)
{
    n->id = builtins_find(table, name);
    return n->id >= 0 || unsupported(p, n->line, what, name);
}

static bool parse_filter(struct parser *p, struct node **out)
{
    struct node *n = new_node(p, NODE_FILTER);
    if (!n || !advance(p)) return false;
    n->a = *out;
    *out = n;
    if (p->token.kind != TOKEN_NAME) return unexpected(p, "the name of a filter");
    if (!look_up(p, n, builtins_filters, "filter", p->token.text) || !advance(p)) return false;
    if (at_operator(p, "(") && !parse_arguments(p, &n->args)) return false;
    return check_arguments(p, n, "filter", &builtins_filters[n->id]);
}

static bool begins_operand(const struct parser *p)
{
    if (p->token.kind == TOKEN_NAME) return !is_reserved(p->token.text);
    return p->token.kind == TOKEN_STRING || p->token.kind == TOKEN_NUMBER || at_operator(p, "[") ||
           at_operator(p, "{");
}

static bool parse_postfix(struct parser *p, struct node **out);

/* is [not] NAME, NAME(arguments), or NAME operand. */
static bool parse_test(struct parser *p, struct node **out)
{
    struct node *n = new_node(p, NODE_TEST);
    if (!n || !advance(p)) return false;
    n->a = *out;
    *out = n;
    if (at_word(p, "not")) {
        struct node *negated = new_node(p, NODE_NOT);
        if (!negated || !advance(p)) return false;
        negated->a = n;
        *out = negated;
    }
    if (p->token.kind != TOKEN_NAME) return unexpected(p, "the name of a test");
    if (!look_up(p, n, builtins_tests, "test", p->token.text) || !advance(p)) return false;
    if (at_operator(p, "(")) {
        if (!parse_arguments(p, &n->args)) return false;
    } else if (begins_operand(p)) {
        if (!parse_primary(p, &n->args) || !parse_postfix(p, &n->args)) return false;
    }
    return check_arguments(p, n, "test", &builtins_tests[n->id]);
}

static bool parse_filters(struct parser *p, struct node **out)
{
    for (;;) {
        bool ok = true;
        if (at_operator(p, "|"))
            ok = parse_filter(p, out);
        else if (at_word(p, "is"))
            ok = parse_test(p, out);
        else
            return true;
        if (!ok) return false;
    }
}

/* One bound of a slice, or what stands for none. */
static bool parse_bound(struct parser *p, struct list *list)
{
    struct node *n;
    if (at_operator(p, ":") || at_operator(p, "]")) {
        n = new_node(p, NODE_LITERAL);
        if (!n) return false;
        n->literal.kind = VALUE_NONE;
    } else if (!parse_expression(p, &n)) {
        return false;
    }
    list_add(list, n);
    return true;
}

static bool parse_subscript(struct parser *p, struct node **out)
{
    struct list bounds = { 0 };
    struct node *n = new_node(p, NODE_ITEM);
    if (!n || !advance(p)) return false;
    n->a = *out;
    *out = n;
    int colons = 0;
    if (at_operator(p, "]")) return unexpected(p, "an expression");
    for (; colons < 3; colons++) {
        if (!parse_bound(p, &bounds)) return false;
        if (!at_operator(p, ":") || colons == 2) break;
        if (!advance(p)) return false;
    }
    if (colons == 0) {
        n->b = bounds.first;
        return want_operator(p, "]");
    }
    n->kind = NODE_SLICE;
    n->args = bounds.first;
    if (colons == 1) {
        struct node *step = new_node(p, NODE_LITERAL);
        if (!step) return false;
        step->literal.kind = VALUE_NONE;
        list_add(&bounds, step);
    }
    return want_operator(p, "]");
}

static bool parse_attribute(struct parser *p, struct node **out)
{
    struct node *n = new_node(p, NODE_ATTRIBUTE);
    if (!n || !advance(p)) return false;
    n->a = *out;
    *out = n;
    if (p->token.kind == TOKEN_NUMBER && p->token.value.kind == VALUE_INT) {
        n->kind = NODE_ITEM;
        n->b = new_node(p, NODE_LITERAL);
        if (!n->b) return false;
        n->b->literal = p->token.value;
        return advance(p);
    }
    if (p->token.kind != TOKEN_NAME) return unexpected(p, "the name of an attribute");
    n->literal = value_string(p->token.text);
    return advance(p);
}

/* A name calls a macro or function, an attribute a method. */
static bool parse_call(struct parser *p, struct node *n)
{
    if (n->kind == NODE_NAME) {
        n->kind = NODE_CALL;
        return parse_arguments(p, &n->args);
    }
    if (n->kind != NODE_ATTRIBUTE)
        return err_set(p->e, ERR_UNSUPPORTED, "line %d: only macros, functions and methods can be called",
                       n->line);
    n->kind = NODE_METHOD;
    return look_up(p, n, builtins_methods, "method", n->literal.string) && parse_arguments(p, &n->args) &&
           check_arguments(p, n, "method", &builtins_methods[n->id]);
}

static bool parse_postfix(struct parser *p, struct node **out)
{
    for (;;) {
        bool ok = true;
        if (at_operator(p, "."))
            ok = parse_attribute(p, out);
        else if (at_operator(p, "["))
            ok = parse_subscript(p, out);
        else if (at_operator(p, "("))
            ok = parse_call(p, *out);
        else
            return true;
        if (!ok) return false;
    }
}

static bool parse_unary(struct parser *p, struct node **out, bool with_filters)
{
    bool ok = enter(p);
    if (ok && (at_operator(p, "-") || at_operator(p, "+"))) {
        struct node *n = new_node(p, NODE_NEGATE);
        bool plus = at_operator(p, "+");
        if (!n || !advance(p) || !parse_unary(p, &n->a, false)) return false;
        if (plus) return unsupported(p, n->line, "operator", span_of("+x"));
        *out = n;
    } else {
        ok = ok && parse_primary(p, out);
    }
    ok = ok && parse_postfix(p, out) && (!with_filters || parse_filters(p, out));
    p->levels--;
    if (ok && at_operator(p, "**")) return unsupported(p, p->token.line, "operator", p->token.text);
    return ok;
}

struct symbol {
    const char *text;
    enum operator operator;
};

/* left (symbol operand)*, from the left. */
static bool parse_binary(struct parser *p, struct node **out, const struct symbol *symbols, int n_symbols,
                         bool (*operand)(struct parser *p, struct node **out))
{
    if (!operand(p, out)) return false;
    for (int i = 0; i < n_symbols; i++) {
        if (!at_operator(p, symbols[i].text)) continue;
        struct node *n = new_node(p, NODE_BINARY);
        if (!n || !advance(p) || !operand(p, &n->b)) return false;
        n->id = symbols[i].operator;
        n->a = *out;
        *out = n;
        i = -1;
    }
    return true;
}

static bool parse_factor(struct parser *p, struct node **out)
{
    return parse_unary(p, out, true);
}

static bool parse_product(struct parser *p, struct node **out)
{
    static const struct symbol symbols[] = { { "*", OPERATOR_MULTIPLY },
                                             { "/", OPERATOR_DIVIDE },
                                             { "//", OPERATOR_FLOOR_DIVIDE },
                                             { "%", OPERATOR_MODULO } };
    return parse_binary(p, out, symbols, 4, parse_factor);
}

static bool parse_concat(struct parser *p, struct node **out)
{
    struct list list = { 0 };
    struct node *part;
    if (!parse_product(p, out)) return false;
    if (!at_operator(p, "~")) return true;
    struct node *n = new_node(p, NODE_CONCAT);
    if (!n) return false;
    list_add(&list, *out);
    while (at_operator(p, "~")) {
        if (!advance(p) || !parse_product(p, &part)) return false;
        list_add(&list, part);
    }
    n->args = list.first;
    *out = n;
    return true;
}

static bool parse_sum(struct parser *p, struct node **out)
{
    static const struct symbol symbols[] = { { "+", OPERATOR_ADD }, { "-", OPERATOR_SUBTRACT } };
    return parse_binary(p, out, symbols, 2, parse_concat);
}

/* Goes past a comparison; false when there is none, and then *ok says whether that is fine. */
static bool take_comparison(struct parser *p, enum operator* which, bool *ok)
{
    static const struct symbol symbols[] = {
        { "==", OPERATOR_EQUAL },         { "!=", OPERATOR_NOT_EQUAL }, { "<=", OPERATOR_LESS_EQUAL },
        { ">=", OPERATOR_GREATER_EQUAL }, { "<", OPERATOR_LESS },       { ">", OPERATOR_GREATER },
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        if (!at_operator(p, symbols[i].text)) continue;
        *which = symbols[i].operator;
        *ok = advance(p);
        return *ok;
    }
    bool negated = at_word(p, "not");
    *ok = true;
    if (!negated && !at_word(p, "in")) return false;
    *which = negated ? OPERATOR_NOT_IN : OPERATOR_IN;
    *ok = advance(p) && (!negated || want_word(p, "in"));
    return *ok;
}

static bool parse_comparison(struct parser *p, struct node **out)
{
    struct list list = { 0 };
    enum operator which;
    bool ok;
    if (!parse_sum(p, out)) return false;
    struct node *n = NULL;
    while (take_comparison(p, &which, &ok)) {
        struct node *operand = new_node(p, NODE_PAIR);
        if (!n) n = new_node(p, NODE_COMPARE);
        if (!n || !operand || !parse_sum(p, &operand->a)) return false;
        operand->id = which;
        list_add(&list, operand);
    }
    if (!n) return ok;
    n->a = *out;
    n->args = list.first;
    *out = n;
    return ok;
}

static bool parse_not(struct parser *p, struct node **out)
{
    if (!at_word(p, "not")) return parse_comparison(p, out);
    *out = new_node(p, NODE_NOT);
    bool ok = enter(p) && *out && advance(p) && parse_not(p, &(*out)->a);
    p->levels--;
    return ok;
}

static bool parse_logic(struct parser *p, struct node **out, const char *word, enum node_kind kind,
                        bool (*operand)(struct parser *p, struct node **out))
{
    if (!operand(p, out)) return false;
    while (at_word(p, word)) {
        struct node *n = new_node(p, kind);
        if (!n || !advance(p) || !operand(p, &n->b)) return false;
        n->a = *out;
        *out = n;
    }
    return true;
}

static bool parse_and(struct parser *p, struct node **out)
{
    return parse_logic(p, out, "and", NODE_AND, parse_not);
}

static bool parse_or(struct parser *p, struct node **out)
{
    return parse_logic(p, out, "or", NODE_OR, parse_and);
}

/* value if condition else other: without the parts of its values that are such expressions themselves. */
static bool parse_choice(struct parser *p, struct node **out)
{
    if (!parse_or(p, out)) return false;
    while (at_word(p, "if")) {
        struct node *n = new_node(p, NODE_CHOICE);
        if (!n || !advance(p) || !parse_or(p, &n->a)) return false;
        n->b = *out;
        *out = n;
        if (!at_word(p, "else")) continue;
        if (!advance(p) || !parse_expression(p, &n->c)) return false;
    }
    return true;
}

static bool parse_expression(struct parser *p, struct node **out)
{
    *out = NULL;
    bool ok = enter(p) && parse_choice(p, out);
    p->levels--;
    return ok;
}

/* An expression, or several with commas between them: a tuple. */
static bool parse_tuple(struct parser *p, struct node **out)
{
    struct list list = { 0 };
    struct node *item;
    if (!parse_expression(p, out)) return false;
    if (!at_operator(p, ",")) return true;
    struct node *tuple = new_node(p, NODE_TUPLE);
    if (!tuple) return false;
    list_add(&list, *out);
    while (at_operator(p, ",")) {
        if (!advance(p)) return false;
        if (p->token.kind == TOKEN_TAG_END || p->token.kind == TOKEN_OUTPUT_END) break;
        if (!parse_expression(p, &item)) return false;
        list_add(&list, item);
    }
    tuple->args = list.first;
    *out = tuple;
    return true;
}

/* Statements up to a tag that begins with one of the words in `ends`, which is left as the next token. */
static bool parse_body(struct parser *p, struct node **out, const char *const *ends);

static bool end_tag(struct parser *p, const char *word)
{
    return want_word(p, word) && want(p, TOKEN_TAG_END, "'%}'");
}

static bool parse_if(struct parser *p, struct node **out)
{
    static const char *const ends[] = { "elif", "else", "endif", NULL }, *const last[] = { "endif", NULL };
    struct node **link = out;
    do {
        struct node *n = *link = new_node(p, NODE_IF);
        if (!n || !advance(p) || !parse_expression(p, &n->a) || !want(p, TOKEN_TAG_END, "'%}'") ||
            !parse_body(p, &n->body, ends))
            return false;
        link = &n->other;
    } while (at_word(p, "elif"));
    if (at_word(p, "else"))
        return advance(p) && want(p, TOKEN_TAG_END, "'%}'") && parse_body(p, link, last) &&
               end_tag(p, "endif");
    return end_tag(p, "endif");
}

/* Names with commas between them, as they stand after `for` and `set`. */
static bool parse_targets(struct parser *p, struct node **out)
{
    struct list list = { 0 };
    struct node *name;
    bool in_parentheses = at_operator(p, "(");
    if (in_parentheses && !advance(p)) return false;
    do {
        if (list.first && !advance(p)) return false;
        if (!parse_name(p, &name)) return false;
        if (span_is(p->syntax->names[name->id], "loop"))
            return err_set(p->e, ERR_FORMAT, "line %d: 'loop' cannot be assigned to", name->line);
        list_add(&list, name);
    } while (at_operator(p, ","));
    *out = list.first;
    return !in_parentheses || want_operator(p, ")");
}

static bool parse_for(struct parser *p, struct node **out)
{
    static const char *const ends[] = { "else", "endfor", NULL }, *const last[] = { "endfor", NULL };
    struct node *n = *out = new_node(p, NODE_FOR);
    int loop_id;
    if (!n || !advance(p) || !parse_targets(p, &n->targets) || !want_word(p, "in") || !parse_or(p, &n->a))
        return false;
    if (at_operator(p, ",")) return unexpected(p, "'%}' (a tuple needs parentheses here)");
    if (at_word(p, "if") && (!advance(p) || !parse_expression(p, &n->b))) return false;
    if (at_word(p, "recursive")) return unsupported(p, n->line, "loop", p->token.text);
    if (!intern(p, &loop_id, span_of("loop"))) return false;
    n->id = loop_id;
    p->loops++;
    if (!want(p, TOKEN_TAG_END, "'%}'") || !parse_body(p, &n->body, ends)) return false;
    p->loops--;
    if (at_word(p, "else") &&
        (!advance(p) || !want(p, TOKEN_TAG_END, "'%}'") || !parse_body(p, &n->other, last)))
        return false;
    return end_tag(p, "endfor");
}

/* set NAME.ATTRIBUTE */
static bool parse_set_attribute(struct parser *p, struct node *n)
{
    struct node *name = n->targets;
    if (name->next) return unexpected(p, "'='");
    n->targets = name;
    if (!parse_attribute(p, &n->targets)) return false;
    return n->targets->kind == NODE_ATTRIBUTE || unexpected(p, "the name of an attribute");
}

static bool parse_set(struct parser *p, struct node **out)
{
    static const char *const ends[] = { "endset", NULL };
    struct node *n = *out = new_node(p, NODE_SET);
    if (!n || !advance(p) || !parse_targets(p, &n->targets)) return false;
    if (at_operator(p, ".") && !parse_set_attribute(p, n)) return false;
    if (at_operator(p, "=")) return advance(p) && parse_tuple(p, &n->a) && want(p, TOKEN_TAG_END, "'%}'");
    if (at_operator(p, "|")) return unsupported(p, n->line, "filter of a", span_of("set block"));
    if (n->targets->next) return unexpected(p, "'='");
    int loops = p->loops;
    p->loops = 0;
    if (!want(p, TOKEN_TAG_END, "'%}'") || !parse_body(p, &n->body, ends)) return false;
    p->loops = loops;
    return end_tag(p, "endset");
}

static bool parse_parameters(struct parser *p, struct node **out)
{
    struct list list = { 0 };
    struct node *name;
    if (!want_operator(p, "(")) return false;
    while (!at_operator(p, ")")) {
        if (!parse_name(p, &name)) return false;
        if (at_operator(p, "=") && (!advance(p) || !parse_expression(p, &name->a))) return false;
        list_add(&list, name);
        if (!at_operator(p, ",")) break;
        if (!advance(p)) return false;
    }
    *out = list.first;
    return want_operator(p, ")");
}

/* Macros see the variables of the template, so they stand where there are no others. */
static bool parse_macro(struct parser *p, struct node **out)
{
    static const char *const ends[] = { "endmacro", NULL };
    struct node *n = *out = new_node(p, NODE_MACRO), *name;
    if (p->loops || p->in_macro)
        return err_set(p->e, ERR_UNSUPPORTED, "line %d: a macro inside of a loop or a macro is not supported",
                       p->token.line);
    if (!n || !advance(p) || !parse_name(p, &name) || !parse_parameters(p, &n->args) ||
        !want(p, TOKEN_TAG_END, "'%}'"))
        return false;
    n->id = name->id;
    p->in_macro = true;
    if (!parse_body(p, &n->body, ends)) return false;
    p->in_macro = false;
    return end_tag(p, "endmacro");
}

static bool parse_jump(struct parser *p, struct node **out)
{
    enum node_kind kind = at_word(p, "break") ? NODE_BREAK : NODE_CONTINUE;
    *out = new_node(p, kind);
    if (p->loops == 0)
        return err_set(p->e, ERR_FORMAT, "line %d: '%s' outside of a loop", p->token.line,
                       kind == NODE_BREAK ? "break" : "continue");
    return *out && advance(p) && want(p, TOKEN_TAG_END, "'%}'");
}

/* What a mask of the assistant's tokens is made from when training; here the text of its body. */
static bool parse_generation(struct parser *p, struct node **out)
{
    static const char *const ends[] = { "endgeneration", NULL };
    struct node *n = *out = new_node(p, NODE_IF);
    if (!n) return false;
    n->a = new_node(p, NODE_LITERAL);
    if (!n->a) return false;
    n->a->literal = value_bool(true);
    return advance(p) && want(p, TOKEN_TAG_END, "'%}'") && parse_body(p, &n->body, ends) &&
           end_tag(p, "endgeneration");
}

static bool parse_tag(struct parser *p, struct node **out)
{
    static const struct {
        const char *word;
        bool (*parse)(struct parser *p, struct node **out);
    } tags[] = { { "if", parse_if },
                 { "for", parse_for },
                 { "set", parse_set },
                 { "macro", parse_macro },
                 { "break", parse_jump },
                 { "continue", parse_jump },
                 { "generation", parse_generation } };
    if (p->token.kind != TOKEN_NAME) return unexpected(p, "the name of a tag");
    for (size_t i = 0; i < sizeof tags / sizeof *tags; i++)
        if (at_word(p, tags[i].word)) return tags[i].parse(p, out);
    return unsupported(p, p->token.line, "tag", p->token.text);
}

static bool parse_output(struct parser *p, struct node **out)
{
    *out = new_node(p, NODE_OUTPUT);
    return *out && advance(p) && parse_tuple(p, &(*out)->a) && want(p, TOKEN_OUTPUT_END, "'}}'");
}

static bool parse_text(struct parser *p, struct node **out)
{
    *out = new_node(p, NODE_TEXT);
    if (!*out) return false;
    (*out)->literal = value_string(p->token.text);
    return advance(p);
}

static bool is_one_of(const struct parser *p, const char *const *words)
{
    for (; *words; words++)
        if (at_word(p, *words)) return true;
    return false;
}

static bool parse_statements(struct parser *p, struct node **out, const char *const *ends)
{
    struct list list = { 0 };
    *out = NULL;
    for (;;) {
        struct node *n = NULL;
        bool ok;
        if (p->token.kind == TOKEN_END) {
            if (*ends) return err_set(p->e, ERR_FORMAT, "line %d: '%s' is missing", p->token.line, *ends);
            return true;
        }
        if (p->token.kind == TOKEN_TAG_BEGIN) {
            if (!advance(p)) return false;
            if (is_one_of(p, ends)) return true;
            ok = parse_tag(p, &n);
        } else {
            ok = p->token.kind == TOKEN_TEXT ? parse_text(p, &n) : parse_output(p, &n);
        }
        if (!ok) return false;
        list_add(&list, n);
        *out = list.first;
    }
}

static bool parse_body(struct parser *p, struct node **out, const char *const *ends)
{
    bool ok = enter(p) && parse_statements(p, out, ends);
    p->levels--;
    return ok;
}

/* \r\n and \r become \n, and one newline at the end goes. */
static bool copy_source(struct span *out, struct store *store, const char *text, size_t bytes)
{
    char *copy = store_take(store, bytes, 1);
    size_t n = 0;
    if (!copy) return false;
    for (size_t i = 0; i < bytes; i++) {
        bool is_return = text[i] == '\r';
        if (is_return && i + 1 < bytes && text[i + 1] == '\n') continue;
        copy[n++] = is_return ? '\n' : text[i];
    }
    *out = (struct span){ copy, n - (n > 0 && copy[n - 1] == '\n') };
    return true;
}

bool syntax_parse(struct syntax *s, const char *text, size_t bytes, struct err *e)
{
    static const char *const no_ends[] = { NULL };
    struct parser p = { .syntax = s, .e = e };
    struct span source;
    *s = (struct syntax){ .store.left = STORE_BYTES_MAX };
    if (bytes > SOURCE_BYTES_MAX)
        return err_set(e, ERR_LIMIT, "a template of %zu bytes; at most %d are read", bytes, SOURCE_BYTES_MAX);
    s->names = store_take(&s->store, NAMES_MAX, sizeof *s->names);
    if (!s->names || !copy_source(&source, &s->store, text, bytes)) return err_memory(e, "a template", bytes);
    lex_init(&p.lexer, source, &s->store);
    return advance(&p) && parse_body(&p, &s->body, no_ends);
}

void syntax_deinit(struct syntax *s)
{
    store_free(&s->store);
}
