#include "server/stops.h"
#include <stdlib.h>
#include <string.h>

/* Knuth, Morris, Pratt: `state` bytes of the string are the end of the text so far; border[i] is the longest
 * proper prefix of its first i bytes that is their suffix too. */
struct automaton {
    const char *text;
    size_t n, state, *border; /* [n + 1] */
};

struct stops {
    int n;
    char *data; /* held back bytes, then what was pushed */
    size_t held, capacity, released;
    struct automaton each[];
};

static bool build(struct automaton *a, const struct stop_string *string)
{
    a->text = string->text;
    a->n = string->n;
    a->border = calloc(a->n + 1, sizeof *a->border);
    if (!a->border) return false;
    for (size_t i = 2, k = 0; i <= a->n; i++) {
        while (k > 0 && a->text[k] != a->text[i - 1]) k = a->border[k];
        if (a->text[k] == a->text[i - 1]) k++;
        a->border[i] = k;
    }
    return true;
}

bool stops_create(struct stops **out, const struct stop_string *strings, int n, struct err *e)
{
    struct stops *s = calloc(1, sizeof *s + (size_t)n * sizeof *s->each);
    bool ok = s;
    for (int i = 0; ok && i < n; i++) {
        s->n = i + 1;
        ok = build(&s->each[i], &strings[i]);
    }
    if (!ok) {
        stops_free(s);
        s = NULL;
    }
    *out = s;
    return ok || err_memory(e, "stop strings", (size_t)n);
}

void stops_free(struct stops *s)
{
    if (!s) return;
    for (int i = 0; i < s->n; i++) free(s->each[i].border);
    free(s->data);
    free(s);
}

/* Drops what the last call gave out and adds the new text. Out of memory the text is lost. */
static size_t append(struct stops *s, const char *text, size_t n)
{
    if (s->released) memmove(s->data, s->data + s->released, s->held);
    s->released = 0;
    if (s->capacity < s->held + n) {
        char *grown = realloc(s->data, 2 * (s->held + n));
        if (!grown) return 0;
        s->data = grown;
        s->capacity = 2 * (s->held + n);
    }
    if (n) memcpy(s->data + s->held, text, n);
    return n;
}

static size_t release(struct stops *s, size_t n, size_t held, const char **out)
{
    s->released = n;
    s->held = held;
    *out = s->data;
    return n;
}

static bool advance(struct automaton *a, char c)
{
    while (a->state > 0 && a->text[a->state] != c) a->state = a->border[a->state];
    if (a->text[a->state] == c) a->state++;
    return a->state == a->n;
}

/* The longest string that the byte completes; -1: none. */
static int advance_all(struct stops *s, char c)
{
    int found = -1;
    for (int i = 0; i < s->n; i++)
        if (advance(&s->each[i], c) && (found < 0 || s->each[i].n > s->each[found].n)) found = i;
    return found;
}

size_t stops_push(struct stops *s, const char *text, size_t n, const char **out, int *found)
{
    size_t before = s->held, taken = append(s, text, n), begun = 0;
    *found = -1;
    for (size_t i = 0; i < taken; i++) {
        *found = advance_all(s, s->data[before + i]);
        if (*found >= 0) return release(s, before + i + 1 - s->each[*found].n, 0, out);
    }
    for (int i = 0; i < s->n; i++)
        if (s->each[i].state > begun) begun = s->each[i].state;
    return release(s, before + taken - begun, begun, out);
}

size_t stops_pass(struct stops *s, const char *text, size_t n, const char **out)
{
    size_t before = s->held, taken = append(s, text, n);
    for (int i = 0; i < s->n; i++) s->each[i].state = 0;
    return release(s, before + taken, 0, out);
}

size_t stops_finish(struct stops *s, const char **out)
{
    return stops_pass(s, NULL, 0, out);
}
