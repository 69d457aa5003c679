#include "eval/perplexity.h"
#include "base/clock.h"
#include <math.h>
#include <stdlib.h>

/* One model's way through the chunks. */
struct scorer {
    struct engine *engine;
    struct model *model;
    struct row *rows;
    int64_t *index;
    struct mat hidden;
    double *nll; /* [chunks] */
};

void perplexity_count(int64_t n, int64_t ctx, int64_t max_chunks, int64_t *chunks, int64_t *scored)
{
    int64_t tail = n % ctx;
    *chunks = n / ctx + (tail >= 2);
    *scored = n / ctx * (ctx - 1) + (tail >= 2 ? tail - 1 : 0);
    if (max_chunks > 0 && *chunks > max_chunks) {
        *chunks = max_chunks;
        *scored = max_chunks * (ctx - 1); /* the tail is the last chunk, so it is cut off */
    }
}

static void scorer_close(struct scorer *s)
{
    engine_free(s->engine);
    free(s->rows);
    free(s->index);
    free(s->nll);
    *s = (struct scorer){ 0 };
}

struct engine_options perplexity_engine(int64_t ctx, enum kv_dtype kv)
{
    return (struct engine_options){ .context = ctx, .step_rows = ctx < 2048 ? ctx : 2048, .kv = kv };
}

static bool scorer_open(struct scorer *s, struct model *m, int64_t ctx, int64_t chunks, enum kv_dtype kv,
                        struct err *e)
{
    *s = (struct scorer){ .model = m };
    struct engine_options o = perplexity_engine(ctx, kv);
    if (!engine_create(&s->engine, m, &o, e)) return err_note(e, "%s", m->checkpoint->path);
    s->rows = calloc((size_t)ctx, sizeof *s->rows);
    s->index = calloc((size_t)ctx, sizeof *s->index);
    s->nll = calloc((size_t)chunks, sizeof *s->nll);
    if (s->rows && s->index && s->nll) return true;
    scorer_close(s);
    return err_memory(e, "perplexity", (uint64_t)(ctx + chunks) * sizeof *s->rows);
}

/* Log-probabilities after rows [first, first + n) of the current step's hidden rows. */
static struct mat log_probabilities(struct scorer *s, int64_t first, int64_t n)
{
    for (int64_t i = 0; i < n; i++) s->index[i] = first + i;
    struct mat l = engine_logits(s->engine, s->hidden, s->index, n);
    s->model->backend->ops->log_softmax(s->model->backend->queue, l);
    return l;
}

/* What the comparison gathers besides losses. */
struct pairing {
    double kld;
    int64_t same_top;
};

/* Of one batch of rows: the divergence, and what each model thinks most likely. */
struct pair_work {
    double *kld;
    float *picked;
    int32_t *top[2];
};

static void pair_rows(struct pairing *p, const struct scorer *base, struct mat a, struct mat b,
                      const struct pair_work *w)
{
    const struct backend *back = base->model->backend;
    back->ops->divergence(back->queue, w->kld, a, b);
    back->ops->argmax(back->queue, w->top[0], a);
    back->ops->argmax(back->queue, w->top[1], b);
    for (int64_t i = 0; i < a.rows; i++) {
        p->kld += w->kld[i];
        p->same_top += w->top[0][i] == w->top[1][i];
    }
}

static void add_losses(struct scorer *s, int64_t chunk, struct mat l, const int32_t *targets, float *picked)
{
    s->model->backend->ops->pick(s->model->backend->queue, picked, l, targets);
    for (int64_t i = 0; i < l.rows; i++) s->nll[chunk] -= (double)picked[i];
}

/* Scores rows [first, first + n) of a step; the row after each is its target. */
static void score_rows(struct scorer *s, int n_scorers, int64_t chunk, const int32_t *targets, int64_t n,
                       struct pairing *pairing, const struct pair_work *work)
{
    int64_t batch = engine_logits_rows(s[0].engine);
    if (n_scorers == 2 && engine_logits_rows(s[1].engine) < batch) batch = engine_logits_rows(s[1].engine);
    for (int64_t first = 0; first < n; first += batch) {
        struct mat l[2];
        int64_t count = n - first < batch ? n - first : batch;
        for (int k = 0; k < n_scorers; k++) {
            l[k] = log_probabilities(&s[k], first, count);
            add_losses(&s[k], chunk, l[k], targets + first, work->picked);
        }
        if (n_scorers == 2) pair_rows(pairing, &s[0], l[0], l[1], work);
    }
}

static bool score_chunk(struct scorer *s, int n_scorers, int64_t chunk, const int32_t *tokens, int64_t n,
                        struct pairing *pairing, const struct pair_work *work, struct err *e)
{
    int handle[2];
    for (int k = 0; k < n_scorers; k++)
        if (!engine_open(s[k].engine, &handle[k], e)) return false;
    bool ok = true;
    int64_t rows_max = engine_step_rows(s[0].engine);
    for (int64_t done = 0; ok && done < n - 1;) { /* the last token is only a target */
        int64_t count = n - 1 - done < rows_max ? n - 1 - done : rows_max;
        for (int k = 0; ok && k < n_scorers; k++) {
            engine_text_rows(s[k].rows, tokens + done, count, done);
            ok = engine_step(s[k].engine,
                             &(struct engine_run){ .handle = handle[k], .rows = s[k].rows, .n = count }, 1,
                             &s[k].hidden, e);
        }
        if (ok) score_rows(s, n_scorers, chunk, tokens + done + 1, count, pairing, work);
        done += count;
    }
    for (int k = 0; k < n_scorers; k++) engine_close(s[k].engine, handle[k]);
    return ok && s[0].model->backend->ops->wait(s[0].model->backend->queue, e);
}

static bool check_tokens(const struct model *m, const int32_t *tokens, int64_t n, struct err *e)
{
    if (n < 2)
        return err_set(e, ERR_ARGUMENT, "the text has %lld tokens, at least 2 are needed", (long long)n);
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= m->config->vocab_size)
            return err_set(e, ERR_FORMAT, "%s: the tokenizer gives token %d, the model has %lld",
                           m->checkpoint->path, tokens[i], (long long)m->config->vocab_size);
    return true;
}

static bool score_all(struct scorer *s, int n_scorers, const int32_t *tokens, int64_t n, int64_t ctx,
                      int64_t chunks, struct pairing *pairing, const struct report *report, struct err *e)
{
    struct pair_work w = { .kld = malloc((size_t)ctx * sizeof *w.kld), .picked = malloc((size_t)ctx * 12) };
    bool ok = (w.kld && w.picked) || err_memory(e, "perplexity", (uint64_t)ctx * (sizeof *w.kld + 12));
    if (ok) {
        w.top[0] = (int32_t *)(w.picked + ctx);
        w.top[1] = w.top[0] + ctx;
    }
    for (int64_t c = 0; ok && c < chunks; c++) {
        int64_t left = n - c * ctx;
        ok = score_chunk(s, n_scorers, c, tokens + c * ctx, left < ctx ? left : ctx, pairing, &w, e);
        report_progress(report, "perplexity", (uint64_t)c + 1, (uint64_t)chunks);
    }
    free(w.kld);
    free(w.picked);
    return ok;
}

static void summarize(struct perplexity_result *r, const struct scorer *s, int64_t tokens, int64_t chunks,
                      int64_t scored, double seconds)
{
    *r = (struct perplexity_result){
        .tokens = tokens, .chunks = chunks, .scored = scored, .seconds = seconds
    };
    for (int64_t c = 0; c < chunks; c++) r->nll += s->nll[c];
    r->perplexity = exp(r->nll / (double)scored);
}

/* 97.5 % point of Student's t: for 1 and 2 degrees of freedom in closed form, above by the Cornish-Fisher
 * expansion to the third order, within 1 % from 3 on (but 24 % short at 1). */
static double t_quantile(int64_t freedom)
{
    if (freedom == 1) return 12.706205;
    if (freedom == 2) return 4.302653;
    double z = 1.959964, n = (double)freedom, z3 = z * z * z, z5 = z3 * z * z, z7 = z5 * z * z;
    return z + (z3 + z) / (4 * n) + (5 * z5 + 16 * z3 + 3 * z) / (96 * n * n) +
           (3 * z7 + 19 * z5 + 17 * z3 - 15 * z) / (384 * n * n * n);
}

/* The mean difference of losses a token is a ratio of sums over chunks; its standard error by linearisation.
 * Tokens of a chunk share a context and are not independent, chunks nearly are. */
static void ratio_interval(struct comparison *c, const double *base, const double *other, int64_t n,
                           int64_t ctx, int64_t chunks, int64_t scored)
{
    double mean = (c->other.nll - c->base.nll) / (double)scored, sum = 0;
    for (int64_t i = 0; i < chunks; i++) {
        int64_t size = n - i * ctx < ctx ? n - i * ctx : ctx;
        double d = other[i] - base[i] - mean * (double)(size - 1);
        sum += d * d;
    }
    c->ratio = exp(mean);
    c->ratio_low = c->ratio_high = c->ratio;
    if (chunks < 2) return;
    double error = sqrt((double)chunks / (double)(chunks - 1) * sum) / (double)scored;
    c->ratio_low = exp(mean - t_quantile(chunks - 1) * error);
    c->ratio_high = exp(mean + t_quantile(chunks - 1) * error);
}

bool perplexity_run(struct perplexity_result *r, struct model *m, const int32_t *tokens, int64_t n,
                    const struct perplexity_options *o, struct err *e)
{
    int64_t ctx = o->ctx ? o->ctx : 512, chunks, scored;
    struct scorer s = { 0 };
    double begin = clock_seconds();
    perplexity_count(n, ctx, o->max_chunks, &chunks, &scored);
    bool ok = check_tokens(m, tokens, n, e) && scorer_open(&s, m, ctx, chunks, o->kv, e) &&
              score_all(&s, 1, tokens, n, ctx, chunks, NULL, o->report, e);
    if (ok) summarize(r, &s, n, chunks, scored, clock_seconds() - begin);
    scorer_close(&s);
    return ok;
}

bool perplexity_compare(struct comparison *c, struct model *base, struct model *other, const int32_t *tokens,
                        int64_t n, const struct perplexity_options *o, struct err *e)
{
    int64_t ctx = o->ctx ? o->ctx : 512, chunks, scored;
    struct scorer s[2] = { { 0 } };
    struct pairing pairing = { 0 };
    double begin = clock_seconds();
    if (base->config->vocab_size != other->config->vocab_size)
        return err_set(e, ERR_ARGUMENT,
                       "%s has %lld tokens, %s has %lld: their distributions cannot be compared",
                       base->checkpoint->path, (long long)base->config->vocab_size, other->checkpoint->path,
                       (long long)other->config->vocab_size);
    perplexity_count(n, ctx, o->max_chunks, &chunks, &scored);
    bool ok = check_tokens(base, tokens, n, e) && scorer_open(&s[0], base, ctx, chunks, o->kv, e) &&
              scorer_open(&s[1], other, ctx, chunks, o->kv, e) &&
              score_all(s, 2, tokens, n, ctx, chunks, &pairing, o->report, e);
    if (ok) {
        double seconds = clock_seconds() - begin;
        summarize(&c->base, &s[0], n, chunks, scored, seconds);
        summarize(&c->other, &s[1], n, chunks, scored, seconds);
        c->delta = c->other.perplexity - c->base.perplexity;
        ratio_interval(c, s[0].nll, s[1].nll, n, ctx, chunks, scored);
        c->kld = pairing.kld / (double)scored;
        c->same_top = (double)pairing.same_top / (double)scored;
    }
    scorer_close(&s[0]);
    scorer_close(&s[1]);
    return ok;
}
