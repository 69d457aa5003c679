#include "engine/sample.h"
#include <math.h>
#include <stdlib.h>

bool sampling_check(const struct sampling *s, struct err *e)
{
    if (!(s->temperature >= 0 && s->temperature <= 100))
        return err_set(e, ERR_ARGUMENT, "--temperature: expected 0 to 100, found %g", (double)s->temperature);
    if (s->top_k < 0) return err_set(e, ERR_ARGUMENT, "--top-k: expected 0 or more, found %d", s->top_k);
    if (!(s->top_p >= 0 && s->top_p <= 1))
        return err_set(e, ERR_ARGUMENT, "--top-p: expected 0 to 1, found %g", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return err_set(e, ERR_ARGUMENT, "--min-p: expected 0 to 1, found %g", (double)s->min_p);
    return true;
}

/* splitmix64's finaliser over seed and counter. Source: Steele, Lea, Flood, "Fast splittable pseudorandom
 * number generators", OOPSLA 2014. */
double sample_uniform(uint64_t seed, uint64_t counter)
{
    uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

static int by_logit(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

/* Whom a draw is among. */
struct vocabulary {
    const float *logits;
    int64_t n;
    bool (*banned)(void *ctx, int32_t id);
    void *ctx;
};

/* Asked last: most of a vocabulary is out for other reasons. */
static bool may_come(const struct vocabulary *v, int64_t id)
{
    return v->logits[id] > -INFINITY && !(v->banned && v->banned(v->ctx, (int32_t)id));
}

static int64_t gather(struct candidate *c, const struct vocabulary *v, float least)
{
    int64_t n = 0;
    for (int64_t i = 0; i < v->n; i++)
        if (v->logits[i] >= least && may_come(v, i)) c[n++] = (struct candidate){ v->logits[i], (int32_t)i };
    return n;
}

static int64_t keep_from(struct candidate *c, int64_t n, float least)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (c[i].logit >= least) c[kept++] = c[i];
    return kept;
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

/* The k-th largest logit, by a heap of the k best so far; -inf when k is too large to be worth one. */
static float kth_largest(const struct vocabulary *v, int k)
{
    enum { HEAP_MAX = 1024 };
    float heap[HEAP_MAX];
    if (k <= 0 || k >= v->n || k > HEAP_MAX) return -INFINITY;
    for (int i = 0; i < k; i++) heap[i] = -INFINITY;
    for (int64_t i = 0; i < v->n; i++)
        if (v->logits[i] > heap[0] && may_come(v, i)) {
            heap[0] = v->logits[i];
            sift_down(heap, k);
        }
    return heap[0];
}

/* Against the likeliest, `top`. */
static double weight(const struct candidate *c, float top)
{
    return exp((double)c->logit - (double)top);
}

static double sum(const struct candidate *c, int64_t n, float top)
{
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += weight(&c[i], top);
    return total;
}

/* The likeliest, sorted, until their probabilities reach top_p; the first always stays. Those that are left
 * out before the sort would not make up 1 - top_p if there were n of them. */
static int64_t nucleus(struct candidate *c, int64_t n, float top, float top_p)
{
    double total = sum(c, n, top), so_far = 0;
    double least = 0.5 * (1 - (double)top_p) * total / (double)n;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (weight(&c[i], top) >= least) c[kept++] = c[i];
    qsort(c, (size_t)kept, sizeof *c, by_logit);
    for (int64_t i = 0; i < kept; i++) {
        so_far += weight(&c[i], top);
        if (so_far >= (double)top_p * total) return i + 1;
    }
    return kept;
}

static int32_t greedy(const struct vocabulary *v)
{
    int64_t best = -1;
    for (int64_t i = 0; i < v->n; i++)
        if ((best < 0 || v->logits[i] > v->logits[best]) && may_come(v, i)) best = i;
    return (int32_t)best;
}

int32_t sample_token(const struct sampling *s, const float *logits, int64_t n_vocab, uint64_t counter,
                     struct candidate *work, bool (*banned)(void *ctx, int32_t id), void *ctx)
{
    struct vocabulary v = { logits, n_vocab, banned, ctx };
    int32_t best = greedy(&v);
    if (s->temperature < 1e-5f || best < 0) return best;
    int64_t n = gather(work, &v, kth_largest(&v, s->top_k));
    float top = logits[best] / s->temperature;
    for (int64_t i = 0; i < n; i++) work[i].logit /= s->temperature;
    if (s->min_p > 0) n = keep_from(work, n, top + logf(s->min_p));
    if (s->top_k > 0 && s->top_k < n) {
        qsort(work, (size_t)n, sizeof *work, by_logit);
        n = keep_from(work, n, work[s->top_k - 1].logit);
    }
    if (s->top_p > 0 && s->top_p < 1) n = nucleus(work, n, top, s->top_p);
    double draw = sample_uniform(s->seed, counter) * sum(work, n, top), at = 0;
    for (int64_t i = 0; i < n; i++) {
        at += weight(&work[i], top);
        if (draw < at) return work[i].id;
    }
    return work[n - 1].id;
}
