/* The forward pass: rows in, hidden rows and logits out. Prefill, decode, batches and verification are this
 * one function with different rows. Takes a model and per-layer state; gives matrices in the backend's
 * memory. */
#include "model/step.h"
#include <assert.h>
#include <stdlib.h>

static int64_t largest(const int64_t *x, int n)
{
    int64_t top = 0;
    for (int i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

static struct mat take(struct arena *a, int64_t rows, int64_t cols)
{
    float *data = arena_take(a, rows, (uint64_t)cols * sizeof *data, 64);
    return mat_of(data, rows, cols);
}

/* Matrices whose rows are parts of longer rows, in their order. */
static void take_beside(struct arena *a, int64_t rows, int n, struct mat *const *out, const int64_t *cols)
{
    enum { ROUND = 16 };
    int64_t all = 0;
    for (int i = 0; i < n; i++) all += (cols[i] + ROUND - 1) / ROUND * ROUND;
    struct mat whole = take(a, rows, all);
    float *at = whole.data;
    for (int i = 0; i < n; i++) {
        *out[i] = (struct mat){ at, rows, cols[i], all };
        if (at) at += (cols[i] + ROUND - 1) / ROUND * ROUND; /* NULL while bytes are counted */
    }
}

static void layout(struct step *s, struct arena *a)
{
    const struct config *c = s->model->config;
    int64_t n = s->rows_max, hidden = c->hidden_size, heads = (int64_t)c->n_heads * c->head_dim;
    int64_t kv = (int64_t)c->n_kv_heads * c->head_dim,
            values = (int64_t)c->linear_value_heads * c->linear_value_dim;
    int64_t channels = 2 * (int64_t)c->linear_key_heads * c->linear_key_dim + values;
    s->x = take(a, n, hidden);
    s->h = take(a, n, hidden);
    s->y = take(a, n, hidden);
    take_beside(a, n, 3, (struct mat *[]){ &s->qg, &s->k, &s->v }, (int64_t[]){ 2 * heads, kv, kv });
    s->att = take(a, n, heads);
    take_beside(a, n, 4, (struct mat *[]){ &s->u, &s->z, &s->a, &s->b },
                (int64_t[]){ channels, values, c->linear_value_heads, c->linear_value_heads });
    s->conv = take(a, n, channels);
    s->raw = take(a, n, values);
    s->o = take(a, n, values);
    s->router = take(a, n, c->n_experts);
    take_beside(a, n, 2, (struct mat *[]){ &s->gate, &s->up },
                (int64_t[]){ c->shared_intermediate, c->shared_intermediate });
    s->hidden = take(a, n, c->shared_intermediate);
    s->shared = take(a, n, hidden);
    s->shared_gate = take(a, n, 1);
    s->picks.k = c->experts_per_token;
    s->picks.expert = arena_take(a, n * c->experts_per_token, sizeof *s->picks.expert, 64);
    s->picks.weight = arena_take(a, n * c->experts_per_token, sizeof *s->picks.weight, 64);
    s->final = take(a, n, hidden);
    int64_t guesses = s->guesses ? n : 0;
    s->pair = take(a, guesses, 2 * hidden);
    s->guess = take(a, guesses, hidden);
    s->chosen = take(a, s->logits_max, hidden);
    s->logits = take(a, s->logits_max, c->vocab_size);
}

static struct step_limits limits_of(const struct step *s, int64_t context)
{
    const struct config *c = s->model->config;
    int64_t cols[] = { c->hidden_size,         s->qg.cols,          s->u.cols,
                       c->shared_intermediate, c->moe_intermediate, s->pair.rows ? s->pair.cols : 0 };
    return (struct step_limits){
        .rows = s->rows_max > s->logits_max ? s->rows_max : s->logits_max,
        .cols = largest(cols, sizeof cols / sizeof *cols),
        .context = context,
        .intermediate = c->moe_intermediate,
        .picks = c->experts_per_token,
        .n_experts = c->n_experts,
        .hidden = c->hidden_size,
    };
}

static bool take_last(struct step *s, struct err *e)
{
    size_t n = (size_t)s->rows_max;
    s->last_rows = calloc(n, sizeof *s->last_rows);
    s->last_spans = calloc(n, sizeof *s->last_spans);
    s->last_at = calloc(n, sizeof *s->last_at);
    return (s->last_rows && s->last_spans && s->last_at) ||
           err_memory(e, "step", n * (sizeof *s->last_rows + sizeof *s->last_spans));
}

uint64_t step_bytes(const struct config *c, const struct backend *b, bool drafts, int64_t rows_max,
                    int64_t logits_max, int64_t context)
{
    struct model m = { .config = c };
    struct step s = { .model = &m, .rows_max = rows_max, .logits_max = logits_max, .guesses = drafts };
    struct arena a = { 0 };
    layout(&s, &a);
    struct step_limits limits = limits_of(&s, context);
    uint64_t inside = b->ops->reserve_bytes(b->queue, &limits);
    return a.overflow || inside > UINT64_MAX - a.used ? UINT64_MAX : a.used + inside;
}

bool step_create(struct step **out, struct model *m, int64_t rows_max, int64_t logits_max, int64_t context,
                 struct err *e)
{
    struct step *s = calloc(1, sizeof *s);
    *out = NULL;
    if (!s) return err_memory(e, "step", sizeof *s);
    s->model = m;
    s->op = m->backend->ops;
    s->q = m->backend->queue;
    s->rows_max = rows_max;
    s->logits_max = logits_max;
    s->guesses = m->mtp.fc != NULL;
    struct arena a = { 0 };
    layout(s, &a);
    bool ok = !s->guesses || take_last(s, e);
    ok =
        ok && (!a.overflow || err_set(e, ERR_LIMIT, "a step of %lld rows is too large", (long long)rows_max));
    ok = ok && s->op->memory_create(s->q, &s->memory, a.used, e);
    if (ok) {
        a = (struct arena){ .memory = s->memory, .size = a.used };
        layout(s, &a);
        struct step_limits limits = limits_of(s, context);
        ok = s->op->reserve(s->q, &limits, e);
    }
    if (ok)
        *out = s;
    else
        step_free(s);
    return ok;
}

void step_free(struct step *s)
{
    if (!s) return;
    s->op->memory_free(s->q, s->memory);
    free(s->last_rows);
    free(s->last_spans);
    free(s->last_at);
    free(s);
}

int64_t step_rows_max(const struct step *s)
{
    return s->rows_max;
}

const struct picks *step_picks(const struct step *s)
{
    return &s->picks;
}

void step_set_tap(struct step *s, struct tap tap)
{
    s->tap = tap;
}

struct mat step_embed(struct step *s, const struct step_rows *rows)
{
    struct mat x = mat_rows(s->x, rows->n);
    assert(rows->n <= s->rows_max);
    s->op->embed(s->q, x, s->model->embed, rows);
    step_tap(s, "embed", -1, x);
    return x;
}

void step_layer(struct step *s, int layer, struct mat x, const struct step_rows *rows,
                const struct layer_state *state)
{
    const struct layer *l = &s->model->layers[layer];
    struct mat y = mat_rows(s->y, rows->n);
    if (l->kind == LAYER_FULL_ATTENTION)
        step_attention(s, layer, x, rows, &state->kv);
    else
        step_delta(s, layer, x, rows, &state->delta);
    step_tap(s, "mixer.out", layer, y);
    step_moe(s, layer, x);
    step_tap(s, "moe.out", layer, y);
    step_tap(s, "layer", layer, x);
}

static struct mat run_layers(struct step *s, const struct step_rows *rows, const struct layer_state *states)
{
    struct mat x = step_embed(s, rows), h = mat_rows(s->final, rows->n);
    for (int i = 0; i < s->model->config->n_layers; i++) step_layer(s, i, x, rows, &states[i]);
    s->op->rmsnorm(s->q, h, x, s->model->final_norm, (float)s->model->config->rms_norm_eps);
    step_tap(s, "final", -1, h);
    return h;
}

struct mat step_run(struct step *s, const struct step_rows *rows, const struct layer_state *states)
{
    if (s->tap.call) return run_layers(s, rows, states);
    if (!s->op->step_begin(s->q, states, rows)) run_layers(s, rows, states);
    s->op->step_end(s->q);
    return mat_rows(s->final, rows->n);
}

static bool are_first(const int64_t *index, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (index[i] != i) return false;
    return true;
}

static struct mat choose_rows(struct step *s, struct mat hidden, const int64_t *index, int64_t n)
{
    struct mat chosen = mat_rows(are_first(index, n) ? hidden : s->chosen, n);
    assert(n <= s->logits_max);
    if (chosen.data != hidden.data) s->op->gather(s->q, chosen, hidden, index);
    return chosen;
}

struct mat step_logits(struct step *s, struct mat hidden, const int64_t *index, int64_t n)
{
    struct mat logits = mat_rows(s->logits, n);
    s->op->matmul(s->q, logits, choose_rows(s, hidden, index, n), s->model->head);
    return logits;
}

void step_draw(struct step *s, int32_t *out, struct mat hidden, const int64_t *index, int64_t n,
               const uint32_t *allowed, const struct draw *draws)
{
    s->op->draw_product(s->q, out, mat_rows(s->logits, n), choose_rows(s, hidden, index, n), s->model->head,
                        allowed, draws);
}
