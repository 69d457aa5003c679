#include "engine/engine.h"
#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { LOGITS_BYTES = 64 << 20 }; /* of one batch of logits: bounds memory for large vocabularies */

struct sequence {
    bool open;
    int64_t length;
    int64_t n_pages;
    int32_t *pages; /* [pages_each] */
};

struct engine {
    struct model *model;
    struct engine_options o;
    struct step *step;
    struct layer_state *states; /* [n_layers] */
    struct sequence *sequences;
    int64_t pages_each, n_free, logits_rows;
    int32_t *page_memory; /* every sequence's list, then the free list */
    int32_t *free_pages;
    struct row *rows; /* [step_rows] */
    struct span *spans;
    float *host_logits; /* [logits_rows][vocab] */
};

static void set_defaults(struct engine_options *o, const struct config *c, const struct backend *backend)
{
    if (o->context == 0) o->context = c->max_position_embeddings < 4096 ? c->max_position_embeddings : 4096;
    if (o->sequences == 0) o->sequences = 1;
    if (o->step_rows == 0) o->step_rows = backend->step_rows;
    if (o->step_rows > o->context * o->sequences) o->step_rows = o->context * o->sequences;
}

static bool take_host_memory(struct engine *g, struct err *e)
{
    int64_t n_seq = g->o.sequences, pages = g->pages_each * n_seq;
    g->sequences = calloc((size_t)n_seq, sizeof *g->sequences);
    g->page_memory = calloc((size_t)(2 * pages), sizeof *g->page_memory);
    g->rows = calloc((size_t)g->o.step_rows, sizeof *g->rows);
    g->spans = calloc((size_t)n_seq, sizeof *g->spans);
    g->states = calloc((size_t)g->model->config->n_layers, sizeof *g->states);
    g->host_logits = malloc((size_t)(g->logits_rows * g->model->config->vocab_size) * sizeof *g->host_logits);
    if (!g->sequences || !g->page_memory || !g->rows || !g->spans || !g->states || !g->host_logits)
        return err_memory(e, "sequences", (uint64_t)pages * 2 * sizeof *g->page_memory);
    g->free_pages = g->page_memory + pages;
    for (int64_t i = 0; i < n_seq; i++) g->sequences[i].pages = g->page_memory + i * g->pages_each;
    for (int64_t i = 0; i < pages; i++) g->free_pages[g->n_free++] = (int32_t)(pages - 1 - i);
    return true;
}

static bool take_state(struct engine *g, struct err *e)
{
    for (int i = 0; i < g->model->config->n_layers; i++)
        if (!layer_state_create(&g->states[i], g->model, i, g->o.kv, g->pages_each * g->o.sequences,
                                g->o.sequences, e))
            return err_note(e, "context of %" PRId64 " tokens for %d sequences", g->o.context,
                            g->o.sequences);
    return step_create(&g->step, g->model, g->o.step_rows, g->logits_rows, g->o.context, e);
}

bool engine_create(struct engine **out, struct model *m, const struct engine_options *o, struct err *e)
{
    *out = NULL;
    struct engine *g = calloc(1, sizeof *g);
    if (!g) return err_memory(e, "engine", sizeof *g);
    g->model = m;
    g->o = *o;
    set_defaults(&g->o, m->config, m->backend);
    g->pages_each = (g->o.context + KV_PAGE - 1) / KV_PAGE;
    g->logits_rows = LOGITS_BYTES / (m->config->vocab_size * (int64_t)sizeof(float));
    if (g->logits_rows > g->o.step_rows) g->logits_rows = g->o.step_rows;
    if (g->logits_rows < 1) g->logits_rows = 1;
    bool ok =
        g->o.context <= m->config->max_position_embeddings ||
        err_set(e, ERR_LIMIT, "a context of %" PRId64 " tokens was asked for, the model allows %" PRId64,
                g->o.context, m->config->max_position_embeddings);
    ok = ok && take_host_memory(g, e) && take_state(g, e);
    if (ok)
        *out = g;
    else
        engine_free(g);
    return ok;
}

void engine_free(struct engine *g)
{
    if (!g) return;
    step_free(g->step);
    for (int i = 0; g->states && i < g->model->config->n_layers; i++)
        layer_state_free(&g->states[i], g->model);
    free(g->states);
    free(g->sequences);
    free(g->page_memory);
    free(g->rows);
    free(g->spans);
    free(g->host_logits);
    free(g);
}

int64_t engine_context(const struct engine *g)
{
    return g->o.context;
}

int64_t engine_step_rows(const struct engine *g)
{
    return g->o.step_rows;
}

int64_t engine_logits_rows(const struct engine *g)
{
    return g->logits_rows;
}

int64_t engine_vocab(const struct engine *g)
{
    return g->model->config->vocab_size;
}

int64_t engine_length(const struct engine *g, int handle)
{
    return g->sequences[handle].length;
}

bool engine_open(struct engine *g, int *handle, struct err *e)
{
    for (int i = 0; i < g->o.sequences; i++) {
        if (g->sequences[i].open) continue;
        g->sequences[i].open = true;
        g->sequences[i].length = 0;
        for (int l = 0; l < g->model->config->n_layers; l++) layer_state_reset(&g->states[l], g->model, l, i);
        *handle = i;
        return true;
    }
    return err_set(e, ERR_LIMIT, "all %d sequences are in use", g->o.sequences);
}

void engine_close(struct engine *g, int handle)
{
    struct sequence *s = &g->sequences[handle];
    while (s->n_pages > 0) g->free_pages[g->n_free++] = s->pages[--s->n_pages];
    s->open = false;
    s->length = 0;
}

static bool no_room(const struct engine *g, int64_t tokens, struct err *e)
{
    return err_set(e, ERR_LIMIT, "%" PRId64 " tokens do not fit a context of %" PRId64, tokens, g->o.context);
}

/* Each sequence has a share of pages_each, so the free list cannot run out. */
static void take_pages(struct engine *g, struct sequence *s, int64_t tokens)
{
    while (s->n_pages * KV_PAGE < tokens) s->pages[s->n_pages++] = g->free_pages[--g->n_free];
}

bool engine_skip(struct engine *g, int handle, int64_t n, struct err *e)
{
    struct sequence *s = &g->sequences[handle];
    if (n > g->o.context - s->length) return no_room(g, s->length + n, e);
    take_pages(g, s, s->length + n);
    s->length += n;
    for (int i = 0; n > 0 && i < g->model->config->n_layers; i++)
        if (!layer_state_noise(&g->states[i], g->model, i, s->pages, s->n_pages, handle, e)) return false;
    return true;
}

bool engine_step(struct engine *g, const struct engine_run *runs, int n_runs, struct mat *hidden,
                 struct err *e)
{
    struct step_rows step = { .rows = g->rows, .spans = g->spans, .n_spans = n_runs };
    for (int i = 0; i < n_runs; i++) {
        struct sequence *s = &g->sequences[runs[i].handle];
        if (runs[i].n > g->o.context - s->length) return no_room(g, s->length + runs[i].n, e);
        step.n += runs[i].n;
        if (step.n > g->o.step_rows)
            return err_set(e, ERR_LIMIT, "%" PRId64 " rows in a step of at most %" PRId64, step.n,
                           g->o.step_rows);
    }
    int64_t first = 0;
    for (int i = 0; i < n_runs; i++) {
        struct sequence *s = &g->sequences[runs[i].handle];
        assert(s->open);
        memcpy(g->rows + first, runs[i].rows, (size_t)runs[i].n * sizeof *g->rows);
        take_pages(g, s, s->length + runs[i].n);
        g->spans[i] = (struct span){
            .first = first, .n = runs[i].n, .past = s->length, .pages = s->pages, .slot = runs[i].handle
        };
        s->length += runs[i].n;
        first += runs[i].n;
    }
    *hidden = step_run(g->step, &step, g->states);
    return true;
}

struct mat engine_logits(struct engine *g, struct mat hidden, const int64_t *index, int64_t n)
{
    return step_logits(g->step, hidden, index, n);
}

const float *engine_logits_host(struct engine *g, struct mat hidden, const int64_t *index, int64_t n)
{
    struct mat logits = engine_logits(g, hidden, index, n);
    const struct backend *b = g->model->backend;
    b->ops->download(b->queue, g->host_logits, logits.data, (uint64_t)(n * logits.cols) * sizeof(float));
    return g->host_logits;
}

void engine_text_rows(struct row *rows, const int32_t *tokens, int64_t n, int64_t first)
{
    for (int64_t i = 0; i < n; i++) {
        int32_t p = (int32_t)(first + i);
        rows[i] = (struct row){ .token = tokens[i], .position = { p, p, p } };
    }
}

bool engine_prefill(struct engine *g, int handle, const int32_t *tokens, int64_t n, const float **last,
                    const struct report *progress, struct err *e)
{
    struct mat hidden = { 0 };
    int64_t rows_max = g->o.step_rows, done = 0, past = g->sequences[handle].length;
    if (n > g->o.context - past) return no_room(g, past + n, e); /* before any step, with the whole count */
    struct row *rows = malloc((size_t)rows_max * sizeof *rows);
    if (!rows) return err_memory(e, "prompt", (uint64_t)rows_max * sizeof *rows);
    bool ok = true;
    while (ok && done < n) {
        int64_t count = n - done < rows_max ? n - done : rows_max;
        engine_text_rows(rows, tokens + done, count, past + done);
        ok = engine_step(g, &(struct engine_run){ handle, rows, count }, 1, &hidden, e);
        done += count;
        if (ok) report_progress(progress, "prompt", (uint64_t)done, (uint64_t)n);
    }
    free(rows);
    if (ok && last && n > 0) *last = engine_logits_host(g, hidden, &(int64_t){ hidden.rows - 1 }, 1);
    const struct backend *b = g->model->backend;
    return ok && b->ops->wait(b->queue, e);
}
