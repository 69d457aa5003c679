#include "engine/drafting.h"

enum {
    MEMORY = 32,     /* drafts that a rate looks back on */
    TRY_MEMORY = 12, /* and in a try, which has to show soon that texts have become easier */
    TRY = 4,         /* steps of one: before the first there is a gap in what the head has seen */
    IDLE_LEAST = 48, /* steps between tries */
    IDLE_MOST = 2048,
    FRESH = 256, /* steps with drafts until some without are measured again */
    PLAIN = 4,   /* so many */
    SURE = 6     /* steps of a kind until its time is taken for known */
};
static const double UNKNOWN = 0.3;     /* of a plain step: a draft more, before it is measured */
static const double WORTHWHILE = 1.03; /* gain below which nothing is drafted: times are not exact */
static const double CHANGE = 0.15;     /* of a plain step: what a try loses by its beginning and its end */
static const double PRICE = 0.005;     /* what tries may cost */

void drafting_init(struct drafting *d, int most)
{
    *d = (struct drafting){ .most = most };
    for (int i = 0; i < DRAFTS_MAX; i++) d->rate[i] = 0.8;
}

/* Tokens that a step with k drafts is expected to give a sequence. */
static double expected(const struct drafting *d, int k)
{
    double tokens = 1, all_right = 1;
    for (int i = 0; i < k; i++) tokens += all_right *= d->rate[i];
    return tokens;
}

/* Time with k drafts against time without, measured at some count of sequences near n; 0: nowhere. */
static double measured(const struct drafting *d, int n, int k)
{
    for (int away = 0; away <= n; away++)
        for (int sign = 1; sign >= -1; sign -= 2) {
            int at = n + sign * away;
            if (at > ROWS_EXACT || 2 * at < n || at < 1) continue;
            const struct drafting_cost *c = &d->costs[at];
            if (c->steps[0] > SURE && c->seconds[k] > 0) return c->seconds[k] / c->seconds[0];
        }
    return 0;
}

/* The same, as each draft has cost with other numbers of them where this one is unknown. */
static double cost(const struct drafting *d, int n, int k)
{
    double ratio = measured(d, n, k);
    for (int other = 1; ratio == 0 && other <= d->most; other++) {
        double known = measured(d, n, other);
        if (known > 0) ratio = 1 + (known - 1) * k / other;
    }
    return ratio > 0 ? ratio : 1 + UNKNOWN * k;
}

int drafting_most(const struct drafting *d, int n)
{
    int most = n > 0 && n <= ROWS_EXACT ? ROWS_EXACT / n - 1 : 0;
    return most < d->most ? most : d->most;
}

static int best(const struct drafting *d, int n, int most)
{
    int at = 0;
    double gain = WORTHWHILE;
    for (int k = 1; k <= most; k++) {
        double x = expected(d, k) / cost(d, n, k);
        if (x <= gain) continue;
        at = k;
        gain = x;
    }
    return at;
}

/* Steps until the next try, which loses so much of a plain step each time, and something by the change. */
static int64_t idle_for(double loss)
{
    double steps = TRY * (loss + CHANGE) / PRICE;
    return steps < IDLE_LEAST ? IDLE_LEAST : steps > IDLE_MOST ? IDLE_MOST : (int64_t)steps;
}

/* Nothing can be said about n sequences before a step without drafts was measured near them. */
static bool is_known(const struct drafting *d, int n)
{
    return d->costs[n].steps[0] > SURE || measured(d, n, 1) > 0 || measured(d, n, d->most) > 0;
}

/* While drafting pays: now and then a look at what it is compared with. */
static int go_on(struct drafting *d, int k)
{
    d->idle_until = d->try_until = 0;
    if (d->plain_until == 0) d->plain_until = d->step + FRESH;
    if (d->step <= d->plain_until) return k;
    if (d->step >= d->plain_until + PLAIN) d->plain_until = 0;
    return 0;
}

/* While it does not: now and then a try. */
static int idle(struct drafting *d, int n)
{
    d->plain_until = 0;
    if (d->idle_until == 0) d->idle_until = d->step + IDLE_LEAST;
    if (d->step <= d->idle_until) return 0;
    if (d->try_until == 0) d->try_until = d->step + TRY;
    if (d->step < d->try_until) return 1;
    d->idle_until = d->step + idle_for(cost(d, n, 1) / expected(d, 1) - 1);
    d->try_until = 0;
    return 0;
}

int drafting_choose(struct drafting *d, int n)
{
    int most = drafting_most(d, n);
    d->step++;
    if (most == 0 || !is_known(d, n)) return 0;
    int k = best(d, n, most);
    return k > 0 ? go_on(d, k) : idle(d, n);
}

/* What steps take when nothing disturbs them: the least of the first ones, then quick to fall, slow to rise.
 */
static void settle(double *usual, double x, int64_t before)
{
    if (*usual == 0)
        *usual = x;
    else if (before <= SURE)
        *usual = x < *usual ? x : *usual;
    else
        *usual += (x < *usual ? 0.25 : 0.05) * ((x < 2 * *usual ? x : 2 * *usual) - *usual);
}

void drafting_learn(struct drafting *d, int n, int k, double seconds)
{
    bool changes = k != d->last;
    d->last = k;
    /* what a step with drafts leaves undone is done in the next one */
    if (n < 1 || n > ROWS_EXACT || k > d->most || changes) return;
    struct drafting_cost *c = &d->costs[n];
    int64_t before = c->steps[k]++;
    if (before > 0) settle(&c->seconds[k], seconds, before); /* the first of a kind may have to prepare */
}

void drafting_count(struct drafting *d, int drafted, int accepted)
{
    double memory = d->try_until ? TRY_MEMORY : MEMORY;
    for (int i = 0; i < drafted && i <= accepted; i++) {
        double weight = 1.0 / (double)(++d->counted[i] + 1);
        if (weight < 1 / memory) weight = 1 / memory;
        d->rate[i] += weight * ((i < accepted) - d->rate[i]);
    }
}
