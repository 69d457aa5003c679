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

/* Candidates at least this likely: most of the vocabulary falls here, before anything is sorted. */
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
static float kth_largest(const struct candidate *c, int64_t n, int k)
{
    enum { HEAP_MAX = 1024 };
    float heap[HEAP_MAX];
    if (k <= 0 || k >= n || k > HEAP_MAX) return -INFINITY;
    for (int i = 0; i < k; i++) heap[i] = -INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (c[i].logit > heap[0]) {
            heap[0] = c[i].logit;
            sift_down(heap, k);
        }
    return heap[0];
}

/* The shortest prefix of the sorted candidates whose probabilities reach top_p; the first always stays. */
static int64_t nucleus(const struct candidate *c, int64_t n, float top_p)
{
    double total = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) total += exp((double)c[i].logit - (double)c[0].logit);
    for (int64_t i = 0; i < n; i++) {
        sum += exp((double)c[i].logit - (double)c[0].logit);
        if (sum >= (double)top_p * total) return i + 1;
    }
    return n;
}

/* Few are ever looked at for being banned: those that are the largest so far. */
static int32_t greedy(const float *logits, int64_t n_vocab, bool (*banned)(void *ctx, int32_t id), void *ctx)
{
    int64_t best = -1;
    for (int64_t i = 0; i < n_vocab; i++)
        if ((best < 0 || logits[i] > logits[best]) && !(banned && banned(ctx, (int32_t)i))) best = i;
    return (int32_t)best;
}

int32_t sample_token(const struct sampling *s, const float *logits, int64_t n_vocab, uint64_t counter,
                     struct candidate *work, bool (*banned)(void *ctx, int32_t id), void *ctx)
{
    int64_t n = 0, best = 0;
    if (s->temperature < 1e-5f) return greedy(logits, n_vocab, banned, ctx);
    for (int64_t i = 0; i < n_vocab; i++) {
        if (logits[i] == -INFINITY || (banned && banned(ctx, (int32_t)i))) continue;
        work[n] = (struct candidate){ logits[i], (int32_t)i };
        if (work[n].logit > work[best].logit) best = n;
        n++;
    }
    float top = work[best].logit / s->temperature;
    for (int64_t i = 0; i < n; i++) work[i].logit /= s->temperature;
    if (s->min_p > 0) n = keep_from(work, n, top + logf(s->min_p));
    n = keep_from(work, n, kth_largest(work, n, s->top_k));
    qsort(work, (size_t)n, sizeof *work, by_logit);
    if (s->top_k > 0 && s->top_k < n) n = keep_from(work, n, work[s->top_k - 1].logit);
    if (s->top_p > 0 && s->top_p < 1) n = nucleus(work, n, s->top_p);
    double total = 0, at = 0;
    for (int64_t i = 0; i < n; i++) total += exp((double)work[i].logit - (double)work[0].logit);
    double draw = sample_uniform(s->seed, counter) * total;
    for (int64_t i = 0; i < n; i++) {
        at += exp((double)work[i].logit - (double)work[0].logit);
        if (draw < at) return work[i].id;
    }
    return work[n - 1].id;
}
