/* Expressions to automata: lower() writes a rule's states from its end to its beginning, each expression
 * being told where to go on. Then four facts that matchers rest on: which rules match nothing but the empty
 * text too (nullable), an order of the rules, which states lead to an end, and which bytes need not be told
 * apart. */
#include "grammar/automaton.h"
#include "grammar/grammar.h"
#include "grammar/rules.h"
#include <stdlib.h>
#include <string.h>

enum { STATES_MAX = 1 << 19, EDGES_MAX = 1 << 21, WORK_MAX = 50000000 };

struct compiler {
    struct rules *r;
    struct grammar *g;
    int64_t states_room, edges_room, work;
    int32_t *stack; /* [n_states + 1] of searches */
    int32_t *seen;  /* [n_states] of the search that saw it */
    int32_t search;
    int32_t *begin; /* [n_rules + 1] the first state of each rule */
};

static bool too_large(struct compiler *c)
{
    return rules_fail(c->r, ERR_LIMIT,
                      "the grammar needs too many states: make it shorter, or lower its repetitions");
}

static int32_t add_state(struct compiler *c, enum state_kind kind, int32_t first, int32_t n)
{
    struct grammar *g = c->g;
    if (c->r->failed) return 0;
    if (g->n_states >= STATES_MAX) {
        too_large(c);
        return 0;
    }
    if (!rules_room(&g->states, g->n_states, &c->states_room, 1, sizeof *g->states)) {
        rules_fail(c->r, ERR_MEMORY, "no memory for a grammar");
        return 0;
    }
    g->states[g->n_states] = (struct state){ .kind = (uint8_t)kind, .first = first, .n = n };
    return g->n_states++;
}

static bool add_edge(struct compiler *c, struct edge edge)
{
    struct grammar *g = c->g;
    if (c->r->failed) return false;
    if (g->n_edges >= EDGES_MAX) return too_large(c);
    if (!rules_room(&g->edges, g->n_edges, &c->edges_room, 1, sizeof *g->edges))
        return rules_fail(c->r, ERR_MEMORY, "no memory for a grammar");
    g->edges[g->n_edges++] = edge;
    return true;
}

static int32_t one_edge(struct compiler *c, int low, int high, int32_t to)
{
    int32_t first = c->g->n_edges;
    add_edge(c, (struct edge){ .low = (uint8_t)low, .high = (uint8_t)high, .to = to });
    return add_state(c, STATE_BYTES, first, 1);
}

static int32_t lower(struct compiler *c, int32_t e, int32_t next);

/* The edges of all parts that begin with a byte become one state. */
static int32_t lower_alt(struct compiler *c, struct expr x, int32_t next)
{
    struct expr_list bytes = { 0 }, others = { 0 };
    for (int32_t i = 0; i < x.b && !c->r->failed; i++) {
        int32_t s = lower(c, c->r->parts[x.a + i], next);
        expr_list_add(c->r, c->g->states[s].kind == STATE_BYTES && s != next ? &bytes : &others, s);
    }
    int32_t first = c->g->n_edges, n = 0, merged;
    for (int64_t i = 0; i < bytes.n; i++)
        for (int32_t k = 0; k < c->g->states[bytes.items[i]].n; k++, n++)
            add_edge(c, c->g->edges[c->g->states[bytes.items[i]].first + k]);
    merged = bytes.n == 1 ? bytes.items[0] : add_state(c, STATE_BYTES, first, n);
    if (others.n > 0) {
        first = c->g->n_edges;
        for (int64_t i = 0; i < others.n; i++) add_edge(c, (struct edge){ .to = others.items[i] });
        if (bytes.n) add_edge(c, (struct edge){ .to = merged });
        merged = add_state(c, STATE_SPLIT, first, c->g->n_edges - first);
    }
    free(bytes.items);
    free(others.items);
    return merged;
}

static int32_t split(struct compiler *c, int32_t one, int32_t other)
{
    int32_t first = c->g->n_edges;
    add_edge(c, (struct edge){ .to = one });
    add_edge(c, (struct edge){ .to = other });
    return add_state(c, STATE_SPLIT, first, 2);
}

/* What is repeated was made a byte range or a call by hoist(), so each copy is one state or two. */
static int32_t lower_repeat(struct compiler *c, struct expr x, int32_t next)
{
    int32_t s = next;
    if (x.c < 0) {
        s = split(c, next, next);
        int32_t body = lower(c, x.a, s);
        if (!c->r->failed) c->g->edges[c->g->states[s].first].to = body;
    } else
        for (int32_t i = x.b; i < x.c && !c->r->failed; i++) s = split(c, lower(c, x.a, s), next);
    for (int32_t i = 0; i < x.b && !c->r->failed; i++) s = lower(c, x.a, s);
    return s;
}

static int32_t lower(struct compiler *c, int32_t e, int32_t next)
{
    if (c->r->failed) return 0;
    struct expr x = c->r->exprs[e];
    switch (x.kind) {
    case EXPR_EMPTY: return next;
    case EXPR_RANGE: return one_edge(c, x.a, x.b, next);
    case EXPR_BYTES:
        for (int32_t i = x.b; i > 0; i--) {
            int byte = (unsigned char)c->r->bytes[x.a + i - 1];
            next = one_edge(c, byte, byte, next);
        }
        return next;
    case EXPR_SEQ:
        for (int32_t i = x.b; i > 0; i--) next = lower(c, c->r->parts[x.a + i - 1], next);
        return next;
    case EXPR_ALT: return lower_alt(c, x, next);
    case EXPR_REPEAT: return lower_repeat(c, x, next);
    case EXPR_CALL: return add_state(c, STATE_CALL, x.a, next);
    default: return add_state(c, STATE_BYTES, 0, 0);
    }
}

/* Makes what is repeated several times, and is not small, a rule of its own. */
static void hoist(struct rules *r)
{
    for (int64_t i = 0; i < r->n_exprs && !r->failed; i++) {
        struct expr x = r->exprs[i];
        if (x.kind != EXPR_REPEAT || (x.b + (x.c < 0) <= 1 && x.c <= 1)) continue;
        uint8_t kind = r->exprs[x.a].kind;
        if (kind == EXPR_RANGE || kind == EXPR_CALL) continue;
        int32_t call = expr_call(r, rules_add(r, "a repetition", x.a));
        if (r->failed) return;
        r->exprs[i].a = call;
    }
}

static bool lower_rules(struct compiler *c, int32_t start)
{
    struct grammar *g = c->g;
    hoist(c->r);
    add_state(c, STATE_END, 0, 0);
    if (c->r->failed) return false;
    g->n_rules = (int32_t)c->r->n_rules;
    g->rules = calloc((size_t)g->n_rules, sizeof *g->rules);
    c->begin = malloc(((size_t)g->n_rules + 1) * sizeof *c->begin);
    if (!g->rules || !c->begin) return rules_fail(c->r, ERR_MEMORY, "no memory for a grammar");
    for (int32_t i = 0; i < g->n_rules; i++) {
        c->begin[i] = g->n_states;
        g->rules[i].start = lower(c, c->r->rules[i].body, 0);
    }
    c->begin[g->n_rules] = g->n_states;
    g->start = add_state(c, STATE_CALL, start, 0);
    return !c->r->failed;
}

/* Visits what rule `i` reaches before any byte. calls: takes the calls met. Returns whether the end is met.
 */
static bool walk(struct compiler *c, int32_t i, struct expr_list *calls)
{
    const struct grammar *g = c->g;
    int32_t n = 0;
    bool ends = false;
    c->search++;
    c->stack[n++] = g->rules[i].start;
    c->seen[g->rules[i].start] = c->search;
    while (n > 0) {
        const struct state *s = &g->states[c->stack[--n]];
        c->work++;
        if (s->kind == STATE_END) ends = true;
        if (s->kind == STATE_CALL && calls) expr_list_add(c->r, calls, s->first);
        bool is_open = s->kind == STATE_SPLIT || (s->kind == STATE_CALL && g->rules[s->first].is_nullable);
        for (int32_t k = 0; is_open && k < (s->kind == STATE_CALL ? 1 : s->n); k++) {
            int32_t to = s->kind == STATE_CALL ? s->n : g->edges[s->first + k].to;
            if (c->seen[to] == c->search) continue;
            c->seen[to] = c->search;
            c->stack[n++] = to;
        }
    }
    return ends;
}

/* Facts grow until none is new. Directions alternate: chains of rules run either way. */
static bool find_nullable(struct compiler *c)
{
    struct grammar *g = c->g;
    bool changed = true;
    for (int pass = 0; changed; pass++) {
        changed = false;
        for (int32_t k = 0; k < g->n_rules; k++) {
            int32_t i = pass & 1 ? k : g->n_rules - 1 - k;
            if (g->rules[i].is_nullable || !walk(c, i, NULL)) continue;
            g->rules[i].is_nullable = changed = true;
        }
        if (c->work > WORK_MAX) return too_large(c);
    }
    return true;
}

static bool is_alive(const struct grammar *g, const struct state *s)
{
    if (s->kind == STATE_END) return true;
    if (s->kind == STATE_CALL)
        return g->states[g->rules[s->first].start].is_alive && g->states[s->n].is_alive;
    for (int32_t k = 0; k < s->n; k++)
        if (g->states[g->edges[s->first + k].to].is_alive) return true;
    return false;
}

/* States from begin to end; whether one became alive. */
static bool revive(struct compiler *c, int32_t begin, int32_t end)
{
    struct grammar *g = c->g;
    bool changed = false;
    for (int32_t i = begin; i < end; i++) {
        struct state *s = &g->states[i];
        c->work += 1 + (s->kind == STATE_BYTES ? s->n : 0);
        if (s->is_alive || !is_alive(g, s)) continue;
        s->is_alive = changed = true;
    }
    return changed;
}

/* States of a rule mostly lead to earlier ones; of rules, chains run either way. */
static bool find_alive(struct compiler *c)
{
    struct grammar *g = c->g;
    bool changed = true;
    revive(c, 0, 1);
    for (int pass = 0; changed; pass++) {
        changed = false;
        for (int32_t k = 0; k < g->n_rules; k++) {
            int32_t i = pass & 1 ? k : g->n_rules - 1 - k;
            if (revive(c, c->begin[i], c->begin[i + 1])) changed = true;
        }
        if (c->work > WORK_MAX) return too_large(c);
    }
    revive(c, g->start, g->start + 1);
    if (g->states[g->start].is_alive) return true;
    return rules_fail(c->r, ERR_ARGUMENT, "no text matches: its parts contradict each other, or never end");
}

/* Depth first over "may call before any byte"; a rule gets its place when all that it calls have theirs. */
static bool find_order(struct compiler *c)
{
    struct grammar *g = c->g;
    struct frame {
        int32_t rule;
        int64_t at;
        struct expr_list calls;
    } *path = calloc((size_t)g->n_rules + 1, sizeof *path);
    enum { NEW, OPEN, DONE };
    uint8_t *mark = calloc((size_t)g->n_rules + 1, 1);
    int32_t depth = 0, place = g->n_rules;
    if (!path || !mark) rules_fail(c->r, ERR_MEMORY, "no memory for a grammar");
    for (int32_t i = 0; i < g->n_rules && !c->r->failed; i++) {
        if (mark[i] != NEW) continue;
        mark[i] = OPEN;
        path[depth++] = (struct frame){ .rule = i };
        walk(c, i, &path[0].calls);
        while (depth > 0 && !c->r->failed) {
            struct frame *f = &path[depth - 1];
            if (f->at == f->calls.n) {
                free(f->calls.items);
                mark[f->rule] = DONE;
                g->rules[f->rule].order = --place;
                depth--;
                continue;
            }
            int32_t called = f->calls.items[f->at++];
            if (mark[called] == OPEN)
                rules_fail(c->r, ERR_ARGUMENT,
                           "'%s' begins with itself (left recursion): put something before it, or write a "
                           "repetition",
                           c->r->rules[called].name);
            if (mark[called] != NEW) continue;
            mark[called] = OPEN;
            path[depth] = (struct frame){ .rule = called };
            walk(c, called, &path[depth++].calls);
        }
        if (c->work > WORK_MAX) too_large(c);
    }
    while (depth > 0) free(path[--depth].calls.items);
    free(path);
    free(mark);
    return !c->r->failed;
}

static void find_classes(struct grammar *g)
{
    bool begins[257] = { [0] = true };
    for (int32_t i = 0; i < g->n_states; i++)
        for (int32_t k = 0; g->states[i].kind == STATE_BYTES && k < g->states[i].n; k++) {
            begins[g->edges[g->states[i].first + k].low] = true;
            begins[g->edges[g->states[i].first + k].high + 1] = true;
        }
    for (int b = 0; b < 256; b++) {
        if (begins[b]) g->member[g->n_classes++] = (uint8_t)b;
        g->class_of[b] = (uint8_t)(g->n_classes - 1);
    }
}

bool rules_compile(struct grammar **out, struct rules *r, int32_t start)
{
    *out = NULL;
    if (r->failed) return false;
    struct compiler c = { .r = r, .g = calloc(1, sizeof *c.g) };
    if (!c.g) return rules_fail(r, ERR_MEMORY, "no memory for a grammar");
    bool ok = lower_rules(&c, start);
    if (ok) {
        c.stack = malloc(((size_t)c.g->n_states + 1) * sizeof *c.stack);
        c.seen = calloc((size_t)c.g->n_states, sizeof *c.seen);
        ok = (c.stack && c.seen) || rules_fail(r, ERR_MEMORY, "no memory for a grammar");
    }
    ok = ok && find_nullable(&c) && find_order(&c) && find_alive(&c);
    free(c.begin);
    free(c.stack);
    free(c.seen);
    if (!ok) {
        grammar_free(c.g);
        return false;
    }
    find_classes(c.g);
    *out = c.g;
    return true;
}

void grammar_free(struct grammar *g)
{
    if (!g) return;
    free(g->states);
    free(g->edges);
    free(g->rules);
    free(g);
}
