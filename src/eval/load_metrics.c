#include "eval/load_metrics.h"
#include <math.h>
#include <stdlib.h>

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile(const double *sorted, int64_t n, double p)
{
    double place = p / 100 * (double)(n - 1);
    int64_t below = (int64_t)place, above = below + 1 < n ? below + 1 : below;
    return sorted[below] + (sorted[above] - sorted[below]) * (place - (double)below);
}

void load_summarize(struct load_summary *s, double *x, int64_t n, const double *percentiles,
                    int n_percentiles)
{
    *s = (struct load_summary){ 0 };
    if (n == 0) return;
    double squares = 0;
    for (int64_t i = 0; i < n; i++) s->mean += x[i] / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (x[i] - s->mean) * (x[i] - s->mean);
    s->deviation = sqrt(squares / (double)n);
    qsort(x, (size_t)n, sizeof *x, compare);
    s->median = percentile(x, n, 50);
    for (int i = 0; i < n_percentiles; i++) s->percentiles[i] = percentile(x, n, percentiles[i]);
}

static double tpot_of(const struct load_answer *a)
{
    return a->output_tokens > 1 ? (a->latency - a->ttft) / (double)(a->output_tokens - 1) : 0;
}

static bool is_good(const struct load_answer *a, const struct load_goals *g)
{
    return a->ttft <= g->ttft && tpot_of(a) <= g->tpot && a->latency <= g->e2el;
}

static void count(struct load_metrics *m, const struct load_answer *answers, int64_t n,
                  const struct load_goals *goals)
{
    for (int64_t i = 0; i < n; i++) {
        const struct load_answer *a = &answers[i];
        m->failed += !a->ok;
        if (!a->ok) continue;
        m->completed++;
        m->good += is_good(a, goals);
        if (a->prompt_tokens > 0) m->input_tokens += a->prompt_tokens;
        m->output_tokens += a->output_tokens;
    }
}

static double ttft_of(const struct load_answer *a)
{
    return a->ttft;
}

static double e2el_of(const struct load_answer *a)
{
    return a->latency;
}

static double queued_of(const struct load_answer *a)
{
    return a->queued;
}

/* One figure of each answer; x has room for all. */
static void summarize(struct load_summary *s, double (*of)(const struct load_answer *),
                      const struct load_answer *answers, int64_t n, const struct load_metrics_options *o,
                      double *x)
{
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++)
        if (answers[i].ok && (of != tpot_of || answers[i].output_tokens > 1)) x[k++] = of(&answers[i]);
    load_summarize(s, x, k, o->percentiles, o->n_percentiles);
}

static void summarize_itl(struct load_metrics *m, const struct load_answer *answers, int64_t n,
                          const struct load_metrics_options *o, double *x)
{
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; answers[i].ok && j < answers[i].n_itl; j++) x[k++] = answers[i].itl[j];
    load_summarize(&m->itl, x, k, o->percentiles, o->n_percentiles);
}

/* starts and ends, sorted apart, walked together: an end at the moment of a start comes first. */
static int64_t peak_requests(double *starts, double *ends, int64_t n)
{
    int64_t now = 0, most = 0;
    qsort(starts, (size_t)n, sizeof *starts, compare);
    qsort(ends, (size_t)n, sizeof *ends, compare);
    for (int64_t i = 0, k = 0; i < n; i++) {
        for (; k < n && ends[k] <= starts[i]; k++) now--;
        if (++now > most) most = now;
    }
    return most;
}

/* x: [events], times of tokens. */
static double peak_tokens(double *x, int64_t n)
{
    double most = 0, run = 0;
    qsort(x, (size_t)n, sizeof *x, compare);
    for (int64_t i = 0; i < n; i++) {
        run = i && floor(x[i]) == floor(x[i - 1]) ? run + 1 : 1;
        most = fmax(most, run);
    }
    return most;
}

static void find_peaks(struct load_metrics *m, const struct load_answer *answers, int64_t n, double *x,
                       double *y)
{
    double first = INFINITY;
    int64_t k = 0, events = 0;
    for (int64_t i = 0; i < n; i++)
        if (answers[i].ok) {
            x[k] = answers[i].start;
            y[k++] = answers[i].start + answers[i].latency;
            first = fmin(first, answers[i].start);
        }
    m->peak_requests = peak_requests(x, y, k);
    for (int64_t i = 0; i < n; i++) {
        double at = answers[i].start + answers[i].ttft - first;
        for (int64_t j = 0; answers[i].ok && j <= answers[i].n_itl; j++) {
            x[events++] = at;
            if (j < answers[i].n_itl) at += answers[i].itl[j];
        }
    }
    m->peak_tokens = peak_tokens(x, events);
}

bool load_metrics(struct load_metrics *m, const struct load_answer *answers, int64_t n,
                  const struct load_metrics_options *o, struct err *e)
{
    *m = (struct load_metrics){ 0 };
    size_t room = (size_t)n;
    for (int64_t i = 0; i < n; i++) room += (size_t)answers[i].n_itl;
    double *x = calloc(room, sizeof *x), *y = calloc((size_t)n, sizeof *y);
    bool ok = (x && y) || err_memory(e, "metrics", room * sizeof *x);
    if (ok) {
        count(m, answers, n, &o->goals);
        summarize(&m->ttft, ttft_of, answers, n, o, x);
        summarize(&m->tpot, tpot_of, answers, n, o, x);
        summarize(&m->e2el, e2el_of, answers, n, o, x);
        summarize(&m->queued, queued_of, answers, n, o, x);
        summarize_itl(m, answers, n, o, x);
        find_peaks(m, answers, n, x, y);
    }
    free(x);
    free(y);
    return ok;
}
