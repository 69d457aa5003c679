#include "engine/speculate.h"
#include "base/clock.h"

enum {
    RATE_MEMORY = 24, /* rounds that a rate looks back on */
    IDLE_LEAST = 24,  /* plain rounds before the next try, doubled while tries fail */
    IDLE_MOST = 192,
    PROBES = 4 /* rounds of a try: the first has a gap before it in what the head has seen */
};

void speculation_init(struct speculation *s, int most)
{
    *s = (struct speculation){ .most = most, .idle = IDLE_LEAST, .pause = IDLE_LEAST };
    for (int i = 0; i < DRAFTS_MAX; i++) s->rate[i] = 0.8;
}

/* Tokens that a round with n drafts is expected to give. */
static double expected(const struct speculation *s, int n)
{
    double tokens = 1, all_right = 1;
    for (int i = 0; i < n; i++) tokens += all_right *= s->rate[i];
    return tokens;
}

/* Of a round with n drafts: measured, or as one draft more has cost so far. */
static double cost(const struct speculation *s, int n)
{
    if (s->seconds[n] > 0) return s->seconds[n];
    int known = n - 1;
    while (known > 0 && s->seconds[known] == 0) known--;
    double each = known > 0 ? (s->seconds[known] - s->seconds[0]) / known : 0.3 * s->seconds[0];
    return s->seconds[known] + (n - known) * each;
}

static int best(const struct speculation *s)
{
    int at = 0;
    for (int n = 1; n <= s->most; n++)
        if (expected(s, n) * cost(s, at) > expected(s, at) * cost(s, n)) at = n;
    return at;
}

int speculation_choose(struct speculation *s)
{
    if (s->is_fixed) return s->most;
    if (s->most == 0 || s->seconds[0] == 0) return 0;
    int n = best(s);
    if (n > 0) {
        s->probes = 0;
        s->idle = s->pause = IDLE_LEAST;
        return n;
    }
    if (s->idle > 0) {
        s->idle--;
        return 0;
    }
    if (s->probes == 0) s->probes = PROBES;
    if (--s->probes > 0) return 1;
    s->pause = 2 * s->pause < IDLE_MOST ? 2 * s->pause : IDLE_MOST;
    s->idle = s->pause;
    return 1;
}

/* What rounds take when nothing disturbs them: quick to fall, slow to rise. */
static void settle(double *usual, double x)
{
    if (*usual == 0)
        *usual = x;
    else
        *usual += (x < *usual ? 0.3 : 0.03) * ((x < 2 * *usual ? x : 2 * *usual) - *usual);
}

void speculation_learn(struct speculation *s, int drafted, int accepted, double seconds)
{
    s->rounds++;
    s->drafted += drafted;
    s->accepted += accepted;
    settle(&s->seconds[drafted], seconds);
    for (int i = 0; i < drafted && i <= accepted; i++) {
        s->tried[i]++;
        s->right[i] += i < accepted;
        double weight = 1.0 / (double)(s->tried[i] + 2 < RATE_MEMORY ? s->tried[i] + 2 : RATE_MEMORY);
        s->rate[i] += weight * ((i < accepted) - s->rate[i]);
    }
}

double speculation_mean_length(const struct speculation *s)
{
    return s->rounds ? 1 + (double)s->accepted / (double)s->rounds : 0;
}

bool speculation_run(struct speculation *s, struct engine *g, struct engine_draft *draft, int64_t most,
                     struct row *rows, const struct sampling *sampling, uint64_t counter, int32_t *ids,
                     double *seconds, struct err *e)
{
    struct mat hidden;
    int64_t index[DRAFTS_MAX + 1];
    struct draw draws[DRAFTS_MAX + 1];
    double begin = clock_seconds();
    draft->n = speculation_choose(s);
    if (draft->n > most) draft->n = (int)most;
    if (draft->n > 0 && !engine_draft(g, draft, 1, e)) return false;
    engine_text_rows(rows, &draft->next, 1, engine_position(g, draft->handle));
    engine_text_rows(rows + 1, draft->tokens, draft->n, engine_position(g, draft->handle) + 1);
    struct engine_run run = {
        .handle = draft->handle, .rows = rows, .n = draft->n + 1, .tentative = draft->n > 0
    };
    for (int i = 0; i <= draft->n; i++) {
        index[i] = i;
        draws[i] = sampling_draw(sampling, counter + (uint64_t)i);
    }
    if (!engine_step(g, &run, 1, &hidden, e)) return false;
    engine_draw_rows(g, ids, hidden, index, run.n, draws);
    bool ok = engine_wait(g, e);
    *seconds = clock_seconds() - begin;
    return ok;
}
