#include "num/draw.h"
#include <math.h>
#include <string.h>

enum { FEW = 1024, BLOCK = 32 };

struct vocabulary {
    const struct draw *d;
    const float *logits;
    int64_t n;
    const uint32_t *allowed;
    float top;
    uint32_t limit; /* places behind it are out */
};

static bool any_above(const float *x, float top)
{
    int any = 0;
    for (int i = 0; i < BLOCK; i++) any |= x[i] > top;
    return any;
}

/* Few blocks have a logit above the best so far. */
static int32_t likeliest(const struct vocabulary *v)
{
    int64_t best = -1;
    float top = -INFINITY;
    for (int64_t from = 0, end; from < v->n; from = end) {
        end = from + BLOCK < v->n ? from + BLOCK : v->n;
        if (end - from == BLOCK && !any_above(v->logits + from, top)) continue;
        for (int64_t i = from; i < end; i++)
            if (v->logits[i] > top && draw_allows(v->allowed, i)) top = v->logits[best = i];
    }
    return (int32_t)best;
}

static inline uint32_t place_of(const struct vocabulary *v, int64_t i)
{
    uint32_t place = draw_place(v->top, v->logits[i], v->d->scale, v->d->reach);
    return place <= v->limit && draw_allows(v->allowed, i) ? place : DRAW_OUT;
}

/* Tokens, or their weights, by the digit of `level` of their places; level 1: of places behind `first`. */
static void count(uint64_t *bins, const struct vocabulary *v, int level, uint32_t first, bool weighs)
{
    memset(bins, 0, DRAW_BINS * sizeof *bins);
    for (int64_t i = 0; i < v->n; i++) {
        uint32_t place = place_of(v, i);
        if (place != DRAW_OUT && draw_begins(place, level, first))
            bins[draw_digit(place, level)] += weighs ? draw_weight(place) : 1;
    }
}

static uint64_t total_of(const uint64_t *bins)
{
    uint64_t total = 0;
    for (int i = 0; i < DRAW_BINS; i++) total += bins[i];
    return total;
}

/* The bin in which the sum reaches *left, which becomes what is left of it there. */
static uint32_t reached_in(const uint64_t *bins, uint64_t *left)
{
    uint32_t i = 0;
    for (; *left > bins[i]; i++) *left -= bins[i];
    return i;
}

/* The place at which tokens or weights reach *left, which becomes what is left of it there. bins: those of
 * level 0, whose total is no less. */
static uint32_t descend(const struct vocabulary *v, const uint64_t *bins, bool weighs, uint64_t *left)
{
    uint64_t finer[DRAW_BINS];
    uint32_t first = reached_in(bins, left);
    count(finer, v, 1, first, weighs);
    return first << DRAW_DIGIT | reached_in(finer, left);
}

static void sift_down(float *heap, int n)
{
    for (int i = 0;;) {
        int child = 2 * i + 1;
        if (child >= n) return;
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[i] <= heap[child]) return;
        float x = heap[i];
        heap[i] = heap[child];
        heap[child] = x;
        i = child;
    }
}

/* The k-th largest logit, by a heap of the k best so far; -inf: there are fewer. */
static float kth_largest(const struct vocabulary *v, int k)
{
    float heap[FEW];
    for (int i = 0; i < k; i++) heap[i] = -INFINITY;
    for (int64_t i = 0; i < v->n; i++)
        if (v->logits[i] > heap[0] && draw_allows(v->allowed, i)) {
            heap[0] = v->logits[i];
            sift_down(heap, k);
        }
    return heap[0];
}

static void limit_to_top_k(struct vocabulary *v)
{
    int k = v->d->top_k;
    if (k <= 0 || k >= v->n) return;
    if (k <= FEW) {
        uint32_t place = draw_place(v->top, kth_largest(v, k), v->d->scale, v->d->reach);
        if (place != DRAW_OUT) v->limit = place;
    } else {
        uint64_t bins[DRAW_BINS], left = (uint64_t)k;
        count(bins, v, 0, 0, false);
        if (total_of(bins) > left) v->limit = descend(v, bins, false, &left);
    }
}

/* Where few are left the others are not looked at again. False: there are more than FEW. */
static bool gather(struct vocabulary *v, float *logits, int32_t *ids)
{
    int n = 0;
    for (int64_t i = 0; i < v->n; i++) {
        if (place_of(v, i) == DRAW_OUT) continue;
        if (n == FEW) return false;
        logits[n] = v->logits[i];
        ids[n++] = (int32_t)i;
    }
    v->logits = logits;
    v->n = n;
    v->allowed = NULL;
    return true;
}

int32_t draw_token(const struct draw *d, const float *logits, int64_t n, const uint32_t *allowed)
{
    struct vocabulary v = { d, logits, n, allowed, 0, DRAW_OUT - 1 };
    uint64_t bins[DRAW_BINS];
    int32_t best = likeliest(&v);
    if (best < 0 || d->scale == 0) return best;
    float few[FEW];
    int32_t ids[FEW];
    v.top = logits[best];
    limit_to_top_k(&v);
    bool gathered = v.limit != DRAW_OUT - 1 && gather(&v, few, ids);
    count(bins, &v, 0, 0, true);
    uint64_t kept = total_of(bins);
    if (d->top_p > 0 && d->top_p < 1) {
        uint64_t share = draw_share(d->top_p, kept), left = share;
        uint32_t last = descend(&v, bins, true, &left);
        kept = draw_kept(share, left, last);
    }
    uint64_t left = draw_mark(d->uniform, kept);
    uint32_t place = descend(&v, bins, true, &left);
    uint64_t before = (left - 1) / draw_weight(place);
    int64_t id = 0;
    while (place_of(&v, id) != place || before-- > 0) id++;
    return gathered ? ids[id] : (int32_t)id;
}
