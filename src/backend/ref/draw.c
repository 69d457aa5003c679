/* Reference meaning of a draw: everybody in order, then along the line. */
#include "backend/ref/parts.h"
#include "num/draw.h"
#include <stdlib.h>

struct place {
    uint32_t at;
    int32_t id;
};

static int in_order(const void *a, const void *b)
{
    const struct place *x = a, *y = b;
    if (x->at != y->at) return x->at < y->at ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static float largest(const float *x, int64_t n, const uint32_t *allowed)
{
    float top = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (draw_allows(allowed, i) && x[i] > top) top = x[i];
    return top;
}

static int64_t gather(struct place *out, const struct draw *d, const float *x, int64_t n,
                      const uint32_t *allowed)
{
    float top = largest(x, n, allowed), scale = d->scale == 0 ? 1 : d->scale;
    int64_t found = 0;
    for (int64_t i = 0; i < n && top > -INFINITY; i++) {
        if (!draw_allows(allowed, i)) continue;
        uint32_t at = draw_place(top, x[i], scale, d->scale == 0 ? 0 : d->reach);
        if (at != DRAW_OUT) out[found++] = (struct place){ at, (int32_t)i };
    }
    qsort(out, (size_t)found, sizeof *out, in_order);
    return found;
}

static int32_t draw(const struct draw *d, const struct place *p, int64_t n)
{
    uint64_t total = 0, sum = 0;
    if (n == 0) return -1;
    if (d->scale == 0) return p[0].id;
    if (d->top_k > 0)
        for (int64_t i = n - 1; i >= d->top_k && p[i].at != p[d->top_k - 1].at; i--) n--;
    for (int64_t i = 0; i < n; i++) total += draw_weight(p[i].at);
    if (d->top_p > 0 && d->top_p < 1) {
        uint64_t share = draw_share(d->top_p, total);
        for (int64_t i = 0; sum < share; i++) sum += draw_weight(p[i].at);
        total = sum;
    }
    uint64_t mark = draw_mark(d->uniform, total);
    int64_t i = 0;
    for (sum = draw_weight(p[0].at); sum < mark; i++) sum += draw_weight(p[i + 1].at);
    return p[i].id;
}

void ref_draw(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed, const struct draw *draws)
{
    (void)q;
    struct place *p = malloc((size_t)x.cols * sizeof *p + 1);
    for (int64_t i = 0; i < x.rows; i++)
        out[i] = p ? draw(&draws[i], p, gather(p, &draws[i], x.data + i * x.stride, x.cols, allowed)) : -1;
    free(p);
}
