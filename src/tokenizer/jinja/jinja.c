/* Walks the tree of a template and writes its text. Variables live in scopes: the one given by the caller,
 * the template's own, and one for each loop's pass and each call of a macro, which sees the template's but
 * not its caller's. */
#include "tokenizer/jinja/jinja.h"
#include "tokenizer/jinja/builtins.h"
#include "tokenizer/jinja/syntax.h"
#include <math.h>
#include <stdlib.h>

enum { MEMORY_DEFAULT = 256 << 20, STEPS_DEFAULT = 20000000 };

struct jinja {
    struct syntax syntax;
};

struct variable {
    int id;
    struct value value;
};

struct scope {
    struct scope *parent;
    struct variable *variables;
    size_t n, capacity;
    enum node_kind
        jump; /* NODE_BREAK, NODE_CONTINUE: on the way out of this pass of a loop; else NODE_TEXT */
};

struct loop {
    const struct value_list *items;
    size_t index;
};

static const struct value undefined = { .kind = VALUE_UNDEFINED };

static struct value eval(struct run *r, const struct node *n);
static void execute(struct run *r, const struct node *n);

static struct value *find(struct scope *s, int id)
{
    for (size_t i = 0; i < s->n; i++)
        if (s->variables[i].id == id) return &s->variables[i].value;
    return NULL;
}

static const struct value *look_up(struct run *r, int id)
{
    for (struct scope *s = r->scope; s; s = s->parent) {
        const struct value *v = find(s, id);
        if (v) return v;
    }
    return NULL;
}

static void assign(struct run *r, struct scope *s, int id, struct value v)
{
    struct value *known = find(s, id);
    if (known) {
        *known = v;
        return;
    }
    if (s->n == s->capacity) {
        size_t capacity = s->capacity ? 2 * s->capacity : 4;
        struct variable *grown = run_take(r, capacity, sizeof *grown);
        if (!grown) return;
        if (s->n) memcpy(grown, s->variables, s->n * sizeof *grown);
        s->variables = grown;
        s->capacity = capacity;
    }
    s->variables[s->n++] = (struct variable){ id, v };
}

static struct value eval_name(struct run *r, const struct node *n)
{
    const struct value *found = look_up(r, n->id);
    return found ? *found : (struct value){ .kind = VALUE_UNDEFINED, .string = r->syntax->names[n->id] };
}

static size_t count(const struct node *list)
{
    size_t n = 0;
    for (; list; list = list->next) n++;
    return n;
}

static struct value eval_items(struct run *r, const struct node *n)
{
    struct value v = value_new_list(r, n->kind == NODE_TUPLE ? VALUE_TUPLE : VALUE_LIST, count(n->args));
    size_t i = 0;
    for (const struct node *item = n->args; item && !r->failed; item = item->next)
        v.list->items[i++] = eval(r, item);
    return v;
}

static struct value eval_dict(struct run *r, const struct node *n)
{
    struct value v = value_new_dict(r, VALUE_DICT);
    for (const struct node *pair = n->args; pair && !r->failed; pair = pair->next) {
        struct value key = eval(r, pair->a), value = eval(r, pair->b);
        if (key.kind != VALUE_STRING) run_fail(r, ERR_UNSUPPORTED, "a key of a mapping that is not a string");
        if (!r->failed) value_set(r, v.dict, key.string, value);
    }
    return v;
}

static struct value eval_loop_attribute(struct run *r, const struct loop *l, struct span name)
{
    int64_t i = (int64_t)l->index, n = (int64_t)l->items->n;
    const struct {
        const char *name;
        int64_t value;
    } numbers[] = { { "index", i + 1 },
                    { "index0", i },
                    { "revindex", n - i },
                    { "revindex0", n - i - 1 },
                    { "length", n } };
    if (span_is(name, "first")) return value_bool(i == 0);
    if (span_is(name, "last")) return value_bool(i == n - 1);
    if (span_is(name, "previtem")) return i > 0 ? l->items->items[i - 1] : undefined;
    if (span_is(name, "nextitem")) return i + 1 < n ? l->items->items[i + 1] : undefined;
    for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
        if (span_is(name, numbers[k].name)) return value_integer(numbers[k].value);
    run_fail(r, ERR_UNSUPPORTED, "loop.%.*s is not supported", (int)name.bytes, name.at);
    return undefined;
}

static struct value eval_attribute(struct run *r, const struct node *n)
{
    struct value v = eval(r, n->a);
    if (r->failed) return undefined;
    if (v.kind == VALUE_LOOP) return eval_loop_attribute(r, v.loop, n->literal.string);
    return value_attribute(r, v, n->literal.string);
}

static struct value eval_slice(struct run *r, const struct node *n)
{
    struct value v = eval(r, n->a), from = eval(r, n->args), to = eval(r, n->args->next);
    struct value step = eval(r, n->args->next->next);
    return r->failed ? undefined : value_slice(r, v, from, to, step);
}

/* Arguments of a builtin, each at the place of its parameter. */
static struct value call_builtin(struct run *r, const struct node *n, const struct builtin *b)
{
    struct value args[BUILTIN_PARAMETERS] = { 0 }, self = eval(r, n->a);
    int i = 0;
    for (const struct node *arg = n->args; arg && !r->failed; arg = arg->next, i++) {
        if (arg->kind == NODE_KEYWORD)
            args[builtins_parameter(b, arg->literal.string)] = eval(r, arg->a);
        else
            args[i] = eval(r, arg);
    }
    r->line = n->line;
    return r->failed ? undefined : b->call(r, self, args);
}

struct arguments {
    struct value *positional;
    size_t n;
    struct value_dict keywords;
};

static void eval_arguments(struct run *r, struct arguments *a, const struct node *args)
{
    *a = (struct arguments){ .positional = run_take(r, count(args), sizeof *a->positional) };
    for (; args && !r->failed; args = args->next) {
        if (args->kind == NODE_KEYWORD)
            value_set(r, &a->keywords, args->literal.string, eval(r, args->a));
        else
            a->positional[a->n++] = eval(r, args);
    }
}

/* Parameters that got no argument have their default, which may use those before it, or are undefined. */
static void bind(struct run *r, const struct node *macro, const struct arguments *a)
{
    size_t i = 0, named = 0;
    for (const struct node *p = macro->args; p && !r->failed; p = p->next, i++) {
        struct span name = r->syntax->names[p->id];
        const struct value *keyword = value_get(&a->keywords, name);
        struct value v = { .kind = VALUE_UNDEFINED, .string = name };
        named += keyword != NULL;
        if (i < a->n && keyword) run_fail(r, ERR_ARGUMENT, "a macro's argument is given twice");
        if (i < a->n)
            v = a->positional[i];
        else if (keyword)
            v = *keyword;
        else if (p->a)
            v = eval(r, p->a);
        assign(r, r->scope, p->id, v);
    }
    if (a->n > i || named < a->keywords.n)
        run_fail(r, ERR_ARGUMENT, "the macro '%.*s' does not take these arguments",
                 (int)r->syntax->names[macro->id].bytes, r->syntax->names[macro->id].at);
}

static struct scope *template_scope(struct scope *s)
{
    while (s->parent->parent) s = s->parent;
    return s;
}

static struct value call_macro(struct run *r, const struct node *macro, const struct arguments *a)
{
    struct scope own = { .parent = template_scope(r->scope), .jump = NODE_TEXT }, *caller = r->scope;
    size_t begin = r->out.used;
    r->scope = &own;
    bind(r, macro, a);
    execute(r, macro->body);
    r->scope = caller;
    return r->failed ? undefined : value_copy_text(r, begin);
}

static struct value eval_call(struct run *r, const struct node *n)
{
    struct span name = r->syntax->names[n->id];
    const struct value *found = look_up(r, n->id);
    struct value callee = found ? *found : undefined;
    struct arguments a;
    if (!found && !builtins_is_function(name))
        return value_refuse_undefined(r, (struct value){ .kind = VALUE_UNDEFINED, .string = name });
    eval_arguments(r, &a, n->args);
    r->line = n->line;
    if (r->failed) return undefined;
    if (!found) return builtins_function(r, name, a.positional, a.n, &a.keywords);
    if (callee.kind == VALUE_MACRO) return call_macro(r, callee.macro, &a);
    run_fail(r, ERR_ARGUMENT, "'%s' object is not callable", value_type(callee));
    return undefined;
}

static struct value eval_concat(struct run *r, const struct node *n)
{
    size_t parts = count(n->args), i = 0;
    struct value *values = run_take(r, parts, sizeof *values);
    for (const struct node *part = n->args; part && !r->failed; part = part->next)
        values[i++] = eval(r, part);
    size_t begin = r->out.used;
    for (i = 0; i < parts && !r->failed; i++) value_write(r, values[i]);
    return value_copy_text(r, begin);
}

static struct value refuse_operands(struct run *r, enum operator o, struct value a, struct value b)
{
    static const char *const symbols[] = { "+", "-", "*", "/", "//", "%" };
    if (a.kind == VALUE_UNDEFINED) return value_refuse_undefined(r, a);
    if (b.kind == VALUE_UNDEFINED) return value_refuse_undefined(r, b);
    run_fail(r, ERR_ARGUMENT, "unsupported operand types for %s: '%s' and '%s'", symbols[o], value_type(a),
             value_type(b));
    return undefined;
}

static double as_real(struct value v)
{
    return v.kind == VALUE_REAL ? v.real : v.kind == VALUE_INT ? (double)v.integer : v.truth;
}

static struct value real_operation(struct run *r, enum operator o, double x, double y)
{
    if (o >= OPERATOR_DIVIDE && y == 0) run_fail(r, ERR_ARGUMENT, "division by zero");
    switch (o) {
    case OPERATOR_ADD: return value_real(x + y);
    case OPERATOR_SUBTRACT: return value_real(x - y);
    case OPERATOR_MULTIPLY: return value_real(x * y);
    case OPERATOR_DIVIDE: return value_real(x / y);
    case OPERATOR_FLOOR_DIVIDE: return value_real(floor(x / y));
    default: {
        double m = fmod(x, y);
        return value_real(m != 0 && (m < 0) != (y < 0) ? m + y : copysign(m, y));
    }
    }
}

/* Rounds down, as Python does. */
static int64_t floor_divide(int64_t x, int64_t y)
{
    return x / y - (x % y != 0 && (x < 0) != (y < 0));
}

static struct value integer_operation(struct run *r, enum operator o, int64_t x, int64_t y)
{
    int64_t z = 0;
    bool over = false;
    switch (o) {
    case OPERATOR_ADD: over = __builtin_add_overflow(x, y, &z); break;
    case OPERATOR_SUBTRACT: over = __builtin_sub_overflow(x, y, &z); break;
    case OPERATOR_MULTIPLY: over = __builtin_mul_overflow(x, y, &z); break;
    case OPERATOR_FLOOR_DIVIDE:
    case OPERATOR_MODULO:
        if (y == 0) {
            run_fail(r, ERR_ARGUMENT, "division by zero");
        } else if (y == -1) {
            over = __builtin_sub_overflow(0, x, &z);
            if (o == OPERATOR_MODULO) z = over = 0;
        } else {
            z = o == OPERATOR_MODULO ? x - floor_divide(x, y) * y : floor_divide(x, y);
        }
        break;
    default: return real_operation(r, o, (double)x, (double)y);
    }
    if (over) run_fail(r, ERR_LIMIT, "an integer over 64 bits");
    return value_integer(z);
}

static struct value joined_lists(struct run *r, struct value a, struct value b)
{
    struct value v = value_new_list(r, a.kind, a.list->n + b.list->n);
    if (!run_step(r, 64 * (a.list->n + b.list->n))) return undefined;
    for (size_t i = 0; i < a.list->n; i++) v.list->items[i] = a.list->items[i];
    for (size_t i = 0; i < b.list->n; i++) v.list->items[a.list->n + i] = b.list->items[i];
    return v;
}

static struct value repeated(struct run *r, struct value v, int64_t times)
{
    size_t begin = r->out.used;
    if (value_is_list(v)) {
        struct value all = value_new_list(r, v.kind, 0);
        for (int64_t i = 0; i < times && v.list->n && !r->failed; i++) all = joined_lists(r, all, v);
        return all;
    }
    for (int64_t i = 0; i < times && v.string.bytes && run_step(r, v.string.bytes); i++)
        text_put(&r->out, v.string);
    return value_copy_text(r, begin);
}

static bool is_whole(struct value v)
{
    return v.kind == VALUE_INT || v.kind == VALUE_BOOL;
}

static bool is_sequence(struct value v)
{
    return v.kind == VALUE_STRING || value_is_list(v);
}

static int64_t as_integer(struct value v)
{
    return v.kind == VALUE_INT ? v.integer : v.truth;
}

static struct value number_operation(struct run *r, enum operator o, struct value a, struct value b)
{
    if (is_whole(a) && is_whole(b)) return integer_operation(r, o, as_integer(a), as_integer(b));
    return real_operation(r, o, as_real(a), as_real(b));
}

static struct value eval_binary(struct run *r, const struct node *n)
{
    struct value a = eval(r, n->a), b = eval(r, n->b);
    enum operator o = n->id;
    r->line = n->line;
    if (r->failed) return undefined;
    if (value_is_number(a) && value_is_number(b)) return number_operation(r, o, a, b);
    if (o == OPERATOR_ADD && a.kind == VALUE_STRING && b.kind == VALUE_STRING) {
        size_t begin = r->out.used;
        text_put(&r->out, a.string);
        text_put(&r->out, b.string);
        return value_copy_text(r, begin);
    }
    if (o == OPERATOR_ADD && value_is_list(a) && a.kind == b.kind) return joined_lists(r, a, b);
    if (o == OPERATOR_MULTIPLY && is_sequence(a) && is_whole(b)) return repeated(r, a, as_integer(b));
    if (o == OPERATOR_MULTIPLY && is_whole(a) && is_sequence(b)) return repeated(r, b, as_integer(a));
    if (o == OPERATOR_MODULO && a.kind == VALUE_STRING)
        run_fail(r, ERR_UNSUPPORTED, "formatting with %% is not supported");
    return refuse_operands(r, o, a, b);
}

static bool compare(struct run *r, enum operator o, struct value a, struct value b)
{
    static const char *const symbols[] = { [OPERATOR_LESS] = "<",
                                           [OPERATOR_LESS_EQUAL] = "<=",
                                           [OPERATOR_GREATER] = ">",
                                           [OPERATOR_GREATER_EQUAL] = ">=" };
    if (o == OPERATOR_EQUAL || o == OPERATOR_NOT_EQUAL) return value_equal(r, a, b) == (o == OPERATOR_EQUAL);
    if (o == OPERATOR_IN || o == OPERATOR_NOT_IN) return value_contains(r, b, a) == (o == OPERATOR_IN);
    int order = value_order(r, a, b, symbols[o]);
    switch (o) {
    case OPERATOR_LESS: return order < 0;
    case OPERATOR_LESS_EQUAL: return order <= 0;
    case OPERATOR_GREATER: return order == 1;
    default: return order == 0 || order == 1;
    }
}

/* a < b < c: each neighbour pair, until one does not hold. */
static struct value eval_compare(struct run *r, const struct node *n)
{
    struct value left = eval(r, n->a);
    for (const struct node *operand = n->args; operand && !r->failed; operand = operand->next) {
        struct value right = eval(r, operand->a);
        r->line = operand->line;
        if (r->failed || !compare(r, operand->id, left, right)) return value_bool(false);
        left = right;
    }
    return value_bool(true);
}

static struct value eval_negate(struct run *r, const struct node *n)
{
    struct value v = eval(r, n->a);
    if (r->failed) return undefined;
    if (v.kind == VALUE_REAL) return value_real(-v.real);
    if (v.kind == VALUE_UNDEFINED) return value_refuse_undefined(r, v);
    if (is_whole(v)) return integer_operation(r, OPERATOR_SUBTRACT, 0, as_integer(v));
    run_fail(r, ERR_ARGUMENT, "bad operand type for unary -: '%s'", value_type(v));
    return undefined;
}

static struct value eval_logic(struct run *r, const struct node *n)
{
    struct value a = eval(r, n->a);
    bool decides = r->failed || value_truth(a) == (n->kind == NODE_OR);
    return decides ? a : eval(r, n->b);
}

static struct value eval_choice(struct run *r, const struct node *n)
{
    bool chosen = value_truth(eval(r, n->a));
    if (r->failed) return undefined;
    return chosen ? eval(r, n->b) : n->c ? eval(r, n->c) : undefined;
}

static struct value eval_item(struct run *r, const struct node *n)
{
    struct value v = eval(r, n->a), index = eval(r, n->b);
    return r->failed ? undefined : value_item(r, v, index);
}

static struct value eval_kind(struct run *r, const struct node *n)
{
    switch (n->kind) {
    case NODE_LITERAL: return n->literal;
    case NODE_NAME: return eval_name(r, n);
    case NODE_LIST:
    case NODE_TUPLE: return eval_items(r, n);
    case NODE_DICT: return eval_dict(r, n);
    case NODE_ATTRIBUTE: return eval_attribute(r, n);
    case NODE_ITEM: return eval_item(r, n);
    case NODE_SLICE: return eval_slice(r, n);
    case NODE_CALL: return eval_call(r, n);
    case NODE_METHOD: return call_builtin(r, n, &builtins_methods[n->id]);
    case NODE_FILTER: return call_builtin(r, n, &builtins_filters[n->id]);
    case NODE_TEST: return call_builtin(r, n, &builtins_tests[n->id]);
    case NODE_NEGATE: return eval_negate(r, n);
    case NODE_NOT: return value_bool(!value_truth(eval(r, n->a)));
    case NODE_AND:
    case NODE_OR: return eval_logic(r, n);
    case NODE_BINARY: return eval_binary(r, n);
    case NODE_COMPARE: return eval_compare(r, n);
    case NODE_CONCAT: return eval_concat(r, n);
    case NODE_CHOICE: return eval_choice(r, n);
    default: return undefined;
    }
}

static struct value eval(struct run *r, const struct node *n)
{
    struct value v = undefined;
    if (!run_step(r, 0)) return v;
    r->line = n->line;
    if (run_enter(r)) v = eval_kind(r, n);
    run_leave(r);
    return r->failed ? undefined : v;
}

static void execute_if(struct run *r, const struct node *n)
{
    for (; n && n->kind == NODE_IF; n = n->other) {
        bool holds = value_truth(eval(r, n->a));
        if (r->failed) return;
        if (holds) {
            execute(r, n->body);
            return;
        }
        /* An else part is a list of statements; an elif is a NODE_IF alone, and both mean the same here. */
        if (n->other && (n->other->kind != NODE_IF || n->other->next)) {
            execute(r, n->other);
            return;
        }
    }
}

/* One value to one name, or its items to as many. */
static void assign_targets(struct run *r, struct scope *s, const struct node *targets, struct value v)
{
    if (!targets->next) {
        assign(r, s, targets->id, v);
        return;
    }
    struct value items = value_items(r, v);
    if (r->failed) return;
    if (items.list->n != count(targets)) {
        run_fail(r, ERR_ARGUMENT, "%zu values for %zu names", items.list->n, count(targets));
        return;
    }
    for (size_t i = 0; targets; targets = targets->next, i++) assign(r, s, targets->id, items.list->items[i]);
}

/* The items that pass the condition, which sees the loop's names. */
static struct value filtered(struct run *r, const struct node *n, struct value items)
{
    struct value out = value_new_list(r, VALUE_LIST, items.list->n);
    struct scope own = { .parent = r->scope, .jump = NODE_TEXT };
    size_t kept = 0;
    for (size_t i = 0; i < items.list->n && !r->failed; i++) {
        own.n = 0;
        r->scope = &own;
        assign_targets(r, &own, n->targets, items.list->items[i]);
        bool passes = !r->failed && value_truth(eval(r, n->b));
        r->scope = own.parent;
        if (passes && !r->failed) out.list->items[kept++] = items.list->items[i];
    }
    if (!r->failed) out.list->n = kept;
    return out;
}

static void execute_for(struct run *r, const struct node *n)
{
    struct value v = eval(r, n->a), items = r->failed ? undefined : value_items(r, v);
    if (!r->failed && n->b) items = filtered(r, n, items);
    struct loop *loop = run_take(r, 1, sizeof *loop); /* a template may keep it for longer than this call */
    if (!loop) return;
    *loop = (struct loop){ .items = items.list };
    struct scope own = { .parent = r->scope };
    for (; loop->index < items.list->n && run_step(r, 0); loop->index++) {
        own.n = 0;
        own.jump = NODE_TEXT;
        assign(r, &own, n->id, (struct value){ .kind = VALUE_LOOP, .loop = loop });
        if (!r->failed) assign_targets(r, &own, n->targets, items.list->items[loop->index]);
        r->scope = &own;
        execute(r, n->body);
        r->scope = own.parent;
        if (own.jump == NODE_BREAK) break;
    }
    if (items.list->n == 0) execute(r, n->other);
}

/* What the body writes; names it sets are its own. */
static struct value captured(struct run *r, const struct node *body)
{
    struct scope own = { .parent = r->scope, .jump = NODE_TEXT };
    size_t begin = r->out.used;
    r->scope = &own;
    execute(r, body);
    r->scope = own.parent;
    return r->failed ? undefined : value_copy_text(r, begin);
}

static void execute_set(struct run *r, const struct node *n)
{
    struct value v = n->a ? eval(r, n->a) : captured(r, n->body);
    if (r->failed) return;
    if (n->targets->kind != NODE_ATTRIBUTE) {
        assign_targets(r, r->scope, n->targets, v);
        return;
    }
    struct value space = eval(r, n->targets->a);
    if (space.kind == VALUE_NAMESPACE)
        value_set(r, space.dict, n->targets->literal.string, v);
    else
        run_fail(r, ERR_ARGUMENT, "cannot assign attribute on non-namespace object");
}

static void execute_one(struct run *r, const struct node *n)
{
    switch (n->kind) {
    case NODE_TEXT: text_put(&r->out, n->literal.string); break;
    case NODE_OUTPUT: value_write(r, eval(r, n->a)); break;
    case NODE_IF: execute_if(r, n); break;
    case NODE_FOR: execute_for(r, n); break;
    case NODE_SET: execute_set(r, n); break;
    case NODE_MACRO: assign(r, r->scope, n->id, (struct value){ .kind = VALUE_MACRO, .macro = n }); break;
    case NODE_BREAK:
    case NODE_CONTINUE: r->scope->jump = n->kind; break;
    default: break;
    }
}

static void execute(struct run *r, const struct node *n)
{
    if (!run_enter(r)) n = NULL;
    for (; n && run_step(r, 0); n = n->next) {
        r->line = n->line;
        execute_one(r, n);
        if (r->scope->jump != NODE_TEXT) break;
    }
    run_leave(r);
}

bool jinja_create(struct jinja **out, const char *text, size_t bytes, struct err *e)
{
    struct jinja *t = calloc(1, sizeof *t);
    *out = NULL;
    if (!t) return err_memory(e, "a template", sizeof *t);
    if (!syntax_parse(&t->syntax, text, bytes, e)) {
        jinja_free(t);
        return false;
    }
    *out = t;
    return true;
}

void jinja_free(struct jinja *t)
{
    if (!t) return;
    syntax_deinit(&t->syntax);
    free(t);
}

static void assign_given(struct run *r, struct scope *s, const struct jinja_variable *given)
{
    for (int id = 0; given->value && id < r->syntax->n_names; id++)
        if (span_is(r->syntax->names[id], given->name)) assign(r, s, id, value_from_json(r, given->value));
}

bool jinja_render(char **text, size_t *bytes, const struct jinja *t, const struct jinja_variable *variables,
                  size_t n, const struct jinja_limits *limits, struct err *e)
{
    struct scope given = { .jump = NODE_TEXT }, own = { .parent = &given, .jump = NODE_TEXT };
    size_t memory = limits && limits->memory ? limits->memory : MEMORY_DEFAULT;
    struct run r = { .e = e,
                     .steps = limits && limits->steps ? limits->steps : STEPS_DEFAULT,
                     .store.left = memory,
                     .out.limit = memory,
                     .scope = &own,
                     .syntax = &t->syntax };
    *text = NULL;
    *bytes = 0;
    for (size_t i = 0; i < n && !r.failed; i++) assign_given(&r, &given, &variables[i]);
    execute(&r, t->syntax.body);
    run_step(&r, 0); /* notices text that did not fit */
    text_put(&r.out, (struct span){ "", 1 });
    if (!r.failed && r.out.full) run_fail(&r, ERR_LIMIT, "the text grows over %zu bytes", memory);
    store_free(&r.store);
    if (r.failed) {
        free(r.out.data);
        return false;
    }
    *text = r.out.data;
    *bytes = r.out.used - 1;
    return true;
}
