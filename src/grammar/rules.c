#include "grammar/rules.h"
#include "grammar/chars.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXPRS_MAX = 1 << 20, RULES_MAX = 1 << 17, BYTES_MAX = 16 << 20, LITERALS_NESTING_MAX = 400 };

bool rules_room(void *items, int64_t n, int64_t *room, int64_t more, size_t each)
{
    void **p = items;
    if (n + more <= *room) return true;
    int64_t want = *room * 2 < n + more ? n + more : *room * 2;
    if (want < 16) want = 16;
    void *grown = realloc(*p, (size_t)want * each);
    if (!grown) return false;
    *p = grown;
    *room = want;
    return true;
}

bool rules_fail(struct rules *r, enum err_code code, const char *format, ...)
{
    if (r->failed) return false;
    char text[sizeof r->e->text];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    r->failed = true;
    return err_set(r->e, code, "%s", text);
}

static bool room(struct rules *r, void *items, int64_t n, int64_t *capacity, int64_t more, size_t each,
                 int64_t most)
{
    if (r->failed) return false;
    if (n + more > most)
        return rules_fail(r, ERR_LIMIT,
                          "the grammar is too large: make it shorter, or lower its repetitions");
    if (!rules_room(items, n, capacity, more, each))
        return rules_fail(r, ERR_MEMORY, "no memory for a grammar");
    return true;
}

static int32_t add(struct rules *r, struct expr x)
{
    if (x.depth > RULES_DEPTH_MAX) {
        rules_fail(r, ERR_LIMIT, "the grammar is nested more than %d deep", RULES_DEPTH_MAX);
        return 0;
    }
    if (!room(r, &r->exprs, r->n_exprs, &r->exprs_room, 1, sizeof *r->exprs, EXPRS_MAX)) return 0;
    r->exprs[r->n_exprs] = x;
    return (int32_t)r->n_exprs++;
}

void rules_init(struct rules *r, struct err *e)
{
    *r = (struct rules){ .e = e };
    add(r, (struct expr){ .kind = EXPR_NONE });
    add(r, (struct expr){ .kind = EXPR_EMPTY });
}

void rules_deinit(struct rules *r)
{
    for (int64_t i = 0; i < r->n_rules; i++) free(r->rules[i].name);
    chars_forget(r);
    free(r->rules);
    free(r->exprs);
    free(r->parts);
    free(r->bytes);
    *r = (struct rules){ 0 };
}

int32_t expr_none(struct rules *r)
{
    (void)r;
    return 0;
}

int32_t expr_empty(struct rules *r)
{
    return r->failed ? 0 : 1;
}

int32_t expr_range(struct rules *r, int low, int high)
{
    return add(r, (struct expr){ .kind = EXPR_RANGE, .a = low, .b = high });
}

int32_t expr_bytes(struct rules *r, const char *bytes, size_t n)
{
    if (n == 0) return expr_empty(r);
    if (n > BYTES_MAX) n = BYTES_MAX + 1;
    if (!room(r, &r->bytes, r->n_bytes, &r->bytes_room, (int64_t)n, 1, BYTES_MAX)) return 0;
    memcpy(r->bytes + r->n_bytes, bytes, n);
    struct expr x = { .kind = EXPR_BYTES, .a = (int32_t)r->n_bytes, .b = (int32_t)n };
    r->n_bytes += (int64_t)n;
    return add(r, x);
}

int32_t expr_text(struct rules *r, const char *text)
{
    return expr_bytes(r, text, strlen(text));
}

static int32_t join(struct rules *r, enum expr_kind kind, const int32_t *parts, size_t n)
{
    if (!room(r, &r->parts, r->n_parts, &r->parts_room, (int64_t)n, sizeof *r->parts, EXPRS_MAX)) return 0;
    struct expr x = { .kind = (uint8_t)kind, .a = (int32_t)r->n_parts, .b = (int32_t)n };
    for (size_t i = 0; i < n; i++) {
        int depth = r->exprs[parts[i]].depth + 1;
        if (depth > x.depth) x.depth = (uint16_t)depth;
        r->parts[r->n_parts++] = parts[i];
    }
    return add(r, x);
}

int32_t expr_seq(struct rules *r, const int32_t *parts, size_t n)
{
    return n == 0 ? expr_empty(r) : n == 1 ? parts[0] : join(r, EXPR_SEQ, parts, n);
}

int32_t expr_alt(struct rules *r, const int32_t *parts, size_t n)
{
    return n == 0 ? expr_none(r) : n == 1 ? parts[0] : join(r, EXPR_ALT, parts, n);
}

int32_t expr_repeat(struct rules *r, int32_t what, int64_t least, int64_t most)
{
    if (r->failed) return 0;
    if (most >= 0 && least > most) return expr_none(r);
    if (least > RULES_REPEAT_MAX || most > RULES_REPEAT_MAX) {
        rules_fail(r, ERR_LIMIT, "a repetition of %lld is over the limit of %d",
                   (long long)(least > most ? least : most), RULES_REPEAT_MAX);
        return 0;
    }
    if (most == 0) return expr_empty(r);
    if (least == 1 && most == 1) return what;
    return add(r, (struct expr){ .kind = EXPR_REPEAT,
                                 .depth = (uint16_t)(r->exprs[what].depth + 1),
                                 .a = what,
                                 .b = (int32_t)least,
                                 .c = (int32_t)most });
}

int32_t expr_call(struct rules *r, int32_t rule)
{
    return add(r, (struct expr){ .kind = EXPR_CALL, .a = rule });
}

static int compare_literals(const void *x, const void *y)
{
    const struct expr_literal *a = x, *b = y;
    int order = memcmp(a->bytes, b->bytes, a->n < b->n ? a->n : b->n);
    return order ? order : (a->n > b->n) - (a->n < b->n);
}

/* Sorted texts that agree in their first `from` bytes. */
static int32_t literals(struct rules *r, const struct expr_literal *t, size_t n, size_t from, int nesting)
{
    if (n == 1) return expr_bytes(r, t[0].bytes + from, t[0].n - from);
    size_t common = from;
    while (common < t[0].n && common < t[n - 1].n && t[0].bytes[common] == t[n - 1].bytes[common]) common++;
    int32_t prefix = expr_bytes(r, t[0].bytes + from, common - from);
    struct expr_list branches = { 0 };
    size_t i = 0;
    while (i < n && t[i].n == common) i++;
    if (i > 0) expr_list_add(r, &branches, expr_empty(r));
    while (i < n && !r->failed) {
        size_t end = i + 1;
        while (nesting < LITERALS_NESTING_MAX && end < n && t[end].bytes[common] == t[i].bytes[common]) end++;
        expr_list_add(r, &branches, literals(r, t + i, end - i, common, nesting + 1));
        i = end;
    }
    int32_t rest = expr_list_alt(r, &branches);
    return SEQ(r, prefix, rest);
}

int32_t expr_literals(struct rules *r, struct expr_literal *texts, size_t n)
{
    if (n == 0) return expr_none(r);
    qsort(texts, n, sizeof *texts, compare_literals);
    return literals(r, texts, n, 0, 0);
}

void expr_list_add(struct rules *r, struct expr_list *l, int32_t item)
{
    if (room(r, &l->items, l->n, &l->room, 1, sizeof *l->items, EXPRS_MAX)) l->items[l->n++] = item;
}

static void clear(struct expr_list *l)
{
    free(l->items);
    *l = (struct expr_list){ 0 };
}

int32_t expr_list_seq(struct rules *r, struct expr_list *l)
{
    int32_t x = r->failed ? 0 : expr_seq(r, l->items, (size_t)l->n);
    clear(l);
    return x;
}

int32_t expr_list_alt(struct rules *r, struct expr_list *l)
{
    int32_t x = r->failed ? 0 : expr_alt(r, l->items, (size_t)l->n);
    clear(l);
    return x;
}

int32_t rules_declare(struct rules *r, const char *name)
{
    if (!room(r, &r->rules, r->n_rules, &r->rules_room, 1, sizeof *r->rules, RULES_MAX)) return 0;
    struct rule rule = { .name = strndup(name, 200) };
    if (!rule.name) {
        rules_fail(r, ERR_MEMORY, "no memory for a grammar");
        return 0;
    }
    r->rules[r->n_rules] = rule;
    return (int32_t)r->n_rules++;
}

void rules_define(struct rules *r, int32_t rule, int32_t body)
{
    if (!r->failed) r->rules[rule].body = body;
}

int32_t rules_add(struct rules *r, const char *name, int32_t body)
{
    int32_t rule = rules_declare(r, name);
    rules_define(r, rule, body);
    return rule;
}
