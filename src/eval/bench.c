#include "eval/bench.h"
#include "base/clock.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

const char *const bench_group_names[BENCH_GROUPS] = { "deltanet", "attention", "shared_expert", "experts",
                                                      "router",   "lm_head",   "state",         "kv" };

struct labels {
    struct trace_label *items;
    int64_t n;
};

static void label(struct labels *l, enum bench_group group, struct weight *const *weights, int n)
{
    for (int i = 0; i < n; i++)
        if (weights[i]) l->items[l->n++] = (struct trace_label){ weights[i], bench_group_names[group] };
}

bool bench_label(struct model *m, struct err *e)
{
    enum { LAYER_WEIGHTS = 5 + 4 + 4 + 1 };
    int n_layers = m->config->n_layers;
    struct labels l = { .items = malloc(((size_t)n_layers * LAYER_WEIGHTS + 1) * sizeof *l.items) };
    if (!l.items) return err_memory(e, "labels", (size_t)n_layers * LAYER_WEIGHTS * sizeof *l.items);
    for (int i = 0; i < n_layers; i++) {
        const struct delta_weights *d = &m->layers[i].delta;
        const struct attention_weights *a = &m->layers[i].attention;
        const struct moe_weights *w = &m->layers[i].moe;
        label(&l, BENCH_DELTANET, (struct weight *[]){ d->qkv, d->z, d->a, d->b, d->out }, 5);
        label(&l, BENCH_ATTENTION, (struct weight *[]){ a->q, a->k, a->v, a->o }, 4);
        label(&l, BENCH_SHARED_EXPERT, (struct weight *[]){ w->gate, w->up, w->down, w->shared_gate }, 4);
        label(&l, BENCH_ROUTER, &w->router, 1);
    }
    label(&l, BENCH_LM_HEAD, &m->head, 1);
    bool ok = trace_set_labels(m->backend, l.items, l.n, e);
    free(l.items);
    return ok;
}

/* One test at work. */
struct bench {
    const struct bench_test *t;
    const struct bench_options *o;
    struct engine *engine;
    int *handles;            /* [sequences] */
    struct engine_run *runs; /* [sequences] */
    struct row *rows;        /* [step_rows] */
    int64_t *last;           /* [sequences] rows of the step after which a token is wanted */
    int32_t *drawn;          /* [sequences] */
    struct draw *greedy;     /* [sequences] zeros */
    int64_t step_rows;
    double flops[WEIGHT_FORMATS]; /* a token */
};

static int32_t token_at(const struct bench *b, int sequence, int64_t at)
{
    const struct bench_options *o = b->o;
    if (o->n_tokens) return o->tokens[(sequence * (o->n_tokens / b->t->sequences) + at) % o->n_tokens];
    uint64_t x = ((uint64_t)sequence << 40 | (uint64_t)at) + 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (int32_t)((x >> 33) % (uint64_t)engine_vocab(b->engine));
}

/* Rows [at, at + n) of a sequence, counted behind its depth. */
static void add_rows(struct bench *b, struct row *rows, int sequence, int64_t at, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        int32_t token = token_at(b, sequence, at + i);
        engine_text_rows(rows + i, &token, 1, b->t->depth + at + i);
    }
}

/* The likeliest token after n rows of the step, in the host's memory. */
static void want_tokens(struct bench *b, struct mat hidden, int64_t n)
{
    int64_t most = engine_logits_rows(b->engine);
    for (int64_t i = 0; i < n; i += most)
        engine_draw_rows(b->engine, b->drawn, hidden, b->last + i, n - i < most ? n - i : most, b->greedy);
}

/* Prompts of all sequences one after the other, steps filled up; logits of each prompt's last row. */
static bool run_prompts(struct bench *b, struct err *e)
{
    int64_t n = b->t->n_prompt, at = 0;
    for (int sequence = 0; n > 0 && sequence < b->t->sequences;) {
        int n_runs = 0, n_last = 0;
        int64_t used = 0;
        for (; sequence < b->t->sequences && used < b->step_rows; n_runs++) {
            int64_t count = n - at < b->step_rows - used ? n - at : b->step_rows - used;
            add_rows(b, b->rows + used, sequence, at, count);
            b->runs[n_runs] = (struct engine_run){
                .handle = b->handles[sequence], .rows = b->rows + used, .n = count, .prompt = true
            };
            used += count;
            at += count;
            if (at < n) continue;
            b->last[n_last++] = used - 1;
            sequence++;
            at = 0;
        }
        struct mat hidden;
        if (!engine_step(b->engine, b->runs, n_runs, &hidden, e)) return false;
        want_tokens(b, hidden, n_last);
    }
    return true;
}

static bool run_generation(struct bench *b, struct err *e)
{
    for (int64_t at = b->t->n_prompt; at < b->t->n_prompt + b->t->n_gen; at++) {
        for (int i = 0; i < b->t->sequences; i++) {
            add_rows(b, b->rows + i, i, at, 1);
            b->runs[i] = (struct engine_run){ .handle = b->handles[i], .rows = b->rows + i, .n = 1 };
            b->last[i] = i;
        }
        struct mat hidden;
        if (!engine_step(b->engine, b->runs, b->t->sequences, &hidden, e)) return false;
        want_tokens(b, hidden, b->t->sequences);
    }
    return true;
}

static bool repeat(struct bench *b, double *seconds, enum trace_mode mode, struct err *e)
{
    bool ok = true;
    int n_open = 0;
    while (ok && n_open < b->t->sequences) {
        ok = engine_open(b->engine, &b->handles[n_open], e);
        n_open += ok;
        ok = ok && engine_skip(b->engine, b->handles[n_open - 1], b->t->depth, e);
    }
    trace_start(b->o->model->backend, mode);
    double start = clock_seconds();
    ok = ok && run_prompts(b, e) && run_generation(b, e);
    *seconds = clock_seconds() - start;
    while (n_open > 0) engine_close(b->engine, b->handles[--n_open]);
    return ok;
}

static int group_of(const struct trace_entry *x)
{
    static const struct {
        const char *op;
        int group;
    } ops[] = { { "experts", BENCH_EXPERTS },
                { "delta", BENCH_STATE },
                { "conv", BENCH_STATE },
                { "attention", BENCH_KV },
                { "kv_append", BENCH_KV } };
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (strcmp(ops[i].op, x->op) == 0) return ops[i].group;
    for (int i = 0; i < BENCH_GROUPS; i++)
        if (strcmp(bench_group_names[i], x->label) == 0) return i;
    return -1;
}

/* Takes the account of the repetition that has just run. */
static void take_bytes(struct bench *bench, struct bench_result *r)
{
    const struct backend *b = bench->o->model->backend;
    int n;
    uint64_t steps, experts = trace_experts(b, &steps);
    const struct trace_entry *x = trace_entries(b, &n);
    double tokens = (double)r->tokens;
    for (int i = 0; i < n; i++) {
        int group = group_of(&x[i]);
        if (group >= 0) r->bytes[group] += (double)x[i].bytes / tokens;
        r->total_bytes += (double)x[i].bytes / tokens;
        r->flops += (double)x[i].flops / tokens;
        bench->flops[x[i].format] += (double)x[i].flops / tokens;
    }
    r->experts_per_step = steps ? (double)experts / (double)steps : 0;
}

static bool take_profile(struct bench_result *r, const struct backend *b, struct err *e)
{
    int n;
    const struct trace_entry *x = trace_entries(b, &n);
    r->profile = malloc((size_t)n * sizeof *r->profile);
    if (!r->profile) return err_memory(e, "profile", (size_t)n * sizeof *r->profile);
    memcpy(r->profile, x, (size_t)n * sizeof *x);
    r->n_profile = n;
    return true;
}

static double best_speed(const struct bench_options *o, double so_far)
{
    const struct backend *b = o->model->backend;
    double speed = b->ops->read_speed(b->queue);
    if (speed == 0) speed = read_speed_measure(o->speed);
    return speed > so_far ? speed : so_far;
}

/* The instructions' speed where it is better than before, and what the products would take with it. */
static void best_products(const struct bench *b, struct bench_result *r)
{
    const struct backend *backend = b->o->model->backend;
    bool known = true;
    r->product_seconds = 0;
    for (int f = 0; f < WEIGHT_FORMATS; f++) {
        if (b->flops[f] == 0) continue;
        double speed = backend->ops->product_speed(backend->queue, (enum weight_format)f);
        if (speed > r->product_speed[f]) r->product_speed[f] = speed;
        known = known && r->product_speed[f] > 0;
        if (known) r->product_seconds += b->flops[f] / r->product_speed[f];
    }
    if (!known) r->product_seconds = 0;
}

static bool run_all(struct bench *b, struct bench_result *r, struct err *e)
{
    const struct bench_options *o = b->o;
    const struct backend *backend = o->model->backend;
    double warm_up;
    uint64_t n = (uint64_t)o->repetitions + 1 + o->profile, done = 0;
    report_progress(o->report, "bench", done, n);
    if (!repeat(b, &warm_up, TRACE_BYTES, e)) return false;
    take_bytes(b, r);
    report_progress(o->report, "bench", ++done, n);
    r->read_bandwidth = best_speed(o, 0);
    best_products(b, r);
    for (; r->n < o->repetitions; r->n++) {
        if (!repeat(b, &r->seconds[r->n], TRACE_OFF, e)) return false;
        report_progress(o->report, "bench", ++done, n);
    }
    r->read_bandwidth = best_speed(o, r->read_bandwidth);
    best_products(b, r);
    if (!o->profile) return true;
    if (!repeat(b, &warm_up, TRACE_TIME, e)) return false;
    report_progress(o->report, "bench", ++done, n);
    return take_profile(r, backend, e);
}

struct engine_options bench_engine(const struct bench_test *t, int64_t step_rows, enum kv_dtype kv)
{
    int64_t rows = step_rows > t->sequences ? step_rows : t->sequences;
    int64_t needed = t->n_prompt > 0 ? t->n_prompt * t->sequences : t->sequences;
    return (struct engine_options){ .context = t->depth + t->n_prompt + t->n_gen,
                                    .sequences = t->sequences,
                                    .step_rows = rows < needed ? rows : needed,
                                    .kv = kv };
}

static bool prepare(struct bench *b, struct bench_result *r, struct err *e)
{
    const struct bench_test *t = b->t;
    struct engine_options options = bench_engine(t, b->o->step_rows, b->o->kv);
    b->step_rows = options.step_rows;
    size_t n = (size_t)t->sequences;
    b->handles = calloc(n, sizeof *b->handles);
    b->runs = calloc(n + 1, sizeof *b->runs);
    b->last = calloc(n, sizeof *b->last);
    b->drawn = calloc(n, sizeof *b->drawn);
    b->greedy = calloc(n, sizeof *b->greedy);
    b->rows = calloc((size_t)b->step_rows, sizeof *b->rows);
    r->seconds = calloc((size_t)b->o->repetitions, sizeof *r->seconds);
    if (!b->handles || !b->runs || !b->last || !b->drawn || !b->greedy || !b->rows || !r->seconds)
        return err_memory(e, "bench", n * sizeof *b->runs);
    return engine_create(&b->engine, b->o->model, &options, e);
}

bool bench_run(struct bench_result *r, const struct bench_test *t, const struct bench_options *o,
               struct err *e)
{
    *r = (struct bench_result){ .tokens = (t->n_prompt + t->n_gen) * t->sequences };
    struct bench b = { .t = t, .o = o };
    bool ok = prepare(&b, r, e) && run_all(&b, r, e);
    engine_free(b.engine);
    free(b.handles);
    free(b.runs);
    free(b.last);
    free(b.drawn);
    free(b.greedy);
    free(b.rows);
    if (!ok) bench_result_deinit(r);
    return ok;
}

void bench_result_deinit(struct bench_result *r)
{
    free(r->seconds);
    free(r->profile);
    *r = (struct bench_result){ 0 };
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct bench_summary bench_summarize(const double *x, int n)
{
    struct bench_summary s = { 0 };
    double squares = 0, *sorted = malloc((size_t)n * sizeof *sorted);
    for (int i = 0; i < n; i++) s.mean += x[i] / n;
    for (int i = 0; i < n; i++) squares += (x[i] - s.mean) * (x[i] - s.mean);
    s.deviation = n > 1 ? sqrt(squares / (n - 1)) : 0;
    s.median = s.mean; /* without memory for the order */
    s.min = s.max = x[0];
    for (int i = 1; i < n; i++) {
        s.min = x[i] < s.min ? x[i] : s.min;
        s.max = x[i] > s.max ? x[i] : s.max;
    }
    if (!sorted) return s;
    memcpy(sorted, x, (size_t)n * sizeof *x);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    s.median = n % 2 ? sorted[n / 2] : 0.5 * (sorted[n / 2 - 1] + sorted[n / 2]);
    free(sorted);
    return s;
}
