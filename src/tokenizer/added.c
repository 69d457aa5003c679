#include "tokenizer/added.h"
#include <stdlib.h>
#include <string.h>

bool added_append(struct added_set *s, const char *text, size_t bytes, int32_t id, bool is_special,
                  struct err *e)
{
    if (s->n == s->capacity) {
        size_t capacity = 2 * s->capacity + 32;
        struct added_token *tokens = realloc(s->tokens, capacity * sizeof *tokens);
        if (!tokens) return err_memory(e, "added tokens", capacity * sizeof *tokens);
        s->tokens = tokens;
        s->capacity = capacity;
    }
    char *copy = malloc(bytes + 1);
    if (!copy) return err_memory(e, "an added token", bytes + 1);
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    s->tokens[s->n++] = (struct added_token){ copy, bytes, id, is_special };
    return true;
}

static int compare_text(const char *a, size_t a_bytes, const char *b, size_t b_bytes)
{
    int order = memcmp(a, b, a_bytes < b_bytes ? a_bytes : b_bytes);
    return order ? order : (a_bytes > b_bytes) - (a_bytes < b_bytes);
}

static int by_text(const void *a, const void *b)
{
    const struct added_token *x = a, *y = b;
    return compare_text(x->text, x->bytes, y->text, y->bytes);
}

static int by_id(const void *a, const void *b)
{
    const struct added_token *x = a, *y = b;
    return (x->id > y->id) - (x->id < y->id);
}

/* Merge sort: equal elements keep their order, so the first of two is the one that came first. */
static bool sort_stable(struct added_set *s, int (*compare)(const void *, const void *), struct err *e)
{
    struct added_token *spare = malloc((s->n + 1) * sizeof *spare);
    if (!spare) return err_memory(e, "added tokens", s->n * sizeof *spare);
    struct added_token *from = s->tokens, *to = spare;
    for (size_t width = 1; width < s->n; width *= 2) {
        for (size_t begin = 0; begin < s->n; begin += 2 * width) {
            size_t i = begin, middle = begin + width < s->n ? begin + width : s->n;
            size_t j = middle, end = middle + width < s->n ? middle + width : s->n;
            for (size_t k = begin; k < end; k++)
                to[k] = j == end || (i < middle && compare(&from[i], &from[j]) <= 0) ? from[i++] : from[j++];
        }
        struct added_token *swap = from;
        from = to;
        to = swap;
    }
    if (from != s->tokens) memcpy(s->tokens, from, s->n * sizeof *from);
    free(spare);
    return true;
}

static bool drop_repeated(struct added_set *s, struct err *e)
{
    size_t kept = 0;
    for (size_t i = 0; i < s->n; i++) {
        struct added_token *t = &s->tokens[i], *last = kept > 0 ? &s->tokens[kept - 1] : NULL;
        if (!last || last->id != t->id) {
            struct added_token moved = *t;
            t->text = NULL;
            s->tokens[kept++] = moved;
        } else if (by_text(last, t) != 0) {
            return err_set(e, ERR_FORMAT, "added token %d is both \"%.40s\" and \"%.40s\"", (int)t->id,
                           last->text, t->text);
        } else {
            free(t->text);
            t->text = NULL;
        }
    }
    s->n = kept;
    return true;
}

bool added_seal(struct added_set *s, struct err *e)
{
    if (s->n == 0) return true;
    if (!sort_stable(s, by_id, e) || !drop_repeated(s, e) || !sort_stable(s, by_text, e)) return false;
    for (size_t i = 0; i < s->n; i++) {
        const struct added_token *t = &s->tokens[i];
        s->may_begin[(unsigned char)*t->text] = true;
        if (i > 0 && by_text(t - 1, t) == 0)
            return err_set(e, ERR_FORMAT, "added token \"%.40s\" has the ids %d and %d", t->text,
                           (int)t[-1].id, (int)t->id);
    }
    return true;
}

void added_deinit(struct added_set *s)
{
    for (size_t i = 0; i < s->n; i++) free(s->tokens[i].text);
    free(s->tokens);
    *s = (struct added_set){ 0 };
}

const struct added_token *added_find(const struct added_set *s, const char *text, size_t bytes)
{
    size_t low = 0, n = s->n;
    while (n > 0) {
        size_t half = n / 2;
        const struct added_token *t = &s->tokens[low + half];
        int order = compare_text(t->text, t->bytes, text, bytes);
        if (order == 0) return t;
        if (order < 0)
            low += half + 1, n -= half + 1;
        else
            n = half;
    }
    return NULL;
}

/* First of tokens [low, high), all of which agree before byte `at` and are longer, whose byte `at` is >= c.
 */
static size_t lower_bound(const struct added_set *s, size_t low, size_t high, size_t at, unsigned c)
{
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if ((unsigned char)s->tokens[middle].text[at] < c)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The longest token that text begins with: byte by byte the sorted tokens that still agree become fewer, and
 * one that has been read to its end stands first among them. */
static const struct added_token *longest_at(const struct added_set *s, const char *text, size_t bytes)
{
    const struct added_token *best = NULL;
    size_t low = 0, high = s->n;
    for (size_t at = 0; at < bytes; at++) {
        unsigned c = (unsigned char)text[at];
        low = lower_bound(s, low, high, at, c);
        high = lower_bound(s, low, high, at, c + 1);
        if (low < high && s->tokens[low].bytes == at + 1) best = &s->tokens[low++];
        if (low == high) break;
    }
    return best;
}

const struct added_token *added_next(const struct added_set *s, const char *text, size_t bytes, size_t *at)
{
    for (size_t i = *at; i < bytes && s->n > 0; i++) {
        if (!s->may_begin[(unsigned char)text[i]]) continue;
        const struct added_token *found = longest_at(s, text + i, bytes - i);
        if (!found) continue;
        *at = i;
        return found;
    }
    *at = bytes;
    return NULL;
}
