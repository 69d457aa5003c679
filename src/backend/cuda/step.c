/* What a step needs on the device besides weights: scratch, its rows, and steps recorded as CUDA graphs. */
#include "backend/cuda/batch.h"
#include "base/arena.h"
#include <stdlib.h>
#include <string.h>

static int64_t largest(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Bytes of rows, spans and page lists of steps of up to `rows` rows. */
struct step_layout {
    uint64_t rows, spans, pages, all;
};

static int64_t pages_each(const struct step_limits *l)
{
    return l->context / KV_PAGE + 2;
}

/* Small steps have a layout of their own, so that their rows, spans and pages are one short copy. */
static struct step_layout layout_of(const struct step_limits *l, int64_t rows)
{
    int64_t most = rows <= ROWS_EXACT ? ROWS_EXACT : l->rows;
    struct step_layout s = { 0 };
    s.spans = (uint64_t)most * sizeof(struct cuda_row);
    s.pages = s.spans + (uint64_t)most * sizeof(struct cuda_span);
    s.all = s.pages + (uint64_t)(most * pages_each(l)) * sizeof(int);
    return s;
}

static void draw_layout(const struct queue *q, struct cuda_draw *d, struct arena *a)
{
    cuda_draw_sizes(d);
    d->state = arena_take(a, (int64_t)d->state_bytes, 1, 64);
    d->draws = arena_take(a, (int64_t)d->draws_bytes, 1, 64);
    d->edits = arena_take(a, (int64_t)d->edits_bytes, 1, 64);
    d->mask = arena_take(a, (int64_t)d->mask_bytes, 1, 64);
    d->least = arena_take(a, (int64_t)cuda_coarse_scratch(q), 1, 64);
}

static void layout(struct queue *q, struct arena *a)
{
    const struct step_limits *l = &q->limits;
    int64_t picked = l->rows * l->picks, rows = largest(l->rows, ROWS_EXACT);
    /* f32, or records of FP4, padded: no longer from 64 columns on */
    int64_t quantized = largest(l->rows * largest(l->cols, 64), picked * largest(l->intermediate, 64));
    q->quantized = arena_take(a, quantized, sizeof(float), 64);
    q->quantized_bytes = (size_t)quantized * sizeof(float);
    q->input_scale = arena_take(a, largest(l->rows, picked), sizeof(float), 64);
    q->hidden = arena_take(a, picked * l->intermediate, sizeof(float), 64);
    q->attended = arena_take(a, largest(l->rows, ROWS_EXACT * SPLITS) * l->cols, sizeof(float), 64);
    q->arrived = arena_take(a, ROWS_EXACT * KV_HEADS_MAX, sizeof *q->arrived, 64);
    q->index = arena_take(a, rows, sizeof *q->index, 64);
    q->answers = arena_take(a, rows, sizeof *q->answers, 64);
    q->embeddings = arena_take(a, l->rows * l->cols, sizeof(float), 64);
    cuda_prefill_layout(q, a);
    cuda_batch_layout(q, a);
    draw_layout(q, &q->draw, a);
    q->told.most = 3 * l->cols;
    q->told.words = arena_take(a, 2 * q->told.most, sizeof *q->told.words, 64);
    q->step = arena_take(a, (int64_t)layout_of(l, rows).all + (int64_t)layout_of(l, 1).all, 1, 64);
}

uint64_t cuda_reserve_bytes(struct queue *q, const struct step_limits *l)
{
    struct queue counted = *q; /* layout() sets pointers */
    struct arena a = { 0 };
    counted.limits = *l;
    layout(&counted, &a);
    return a.overflow ? UINT64_MAX : a.used;
}

bool cuda_reserve(struct queue *q, const struct step_limits *l, struct err *e)
{
    struct step_limits *have = &q->limits;
    have->rows = largest(have->rows, l->rows);
    have->cols = largest(have->cols, l->cols);
    have->context = largest(have->context, l->context);
    have->intermediate = largest(have->intermediate, l->intermediate);
    have->picks = (int)largest(have->picks, l->picks);
    have->n_experts = (int)largest(have->n_experts, l->n_experts);
    have->hidden = largest(have->hidden, l->hidden);
    struct arena a = { 0 };
    layout(q, &a);
    cuda_forget_steps(q);
    queue_give(q, q->memory);
    free(q->host_step);
    free(q->host_next);
    free(q->host_index);
    q->memory = NULL;
    q->step_bytes = 0;
    uint64_t bytes = layout_of(have, have->rows).all + layout_of(have, 1).all;
    q->host_step = malloc(bytes);
    q->host_next = malloc(bytes);
    q->host_index = malloc((size_t)have->rows * sizeof *q->host_index + 1);
    if (!q->host_step || !q->host_next || !q->host_index) return err_memory(e, "rows of a step", bytes);
    q->draw.is_used = true;
    if (!q->draw.answers &&
        cudaHostAlloc((void **)&q->draw.answers, q->draw.answers_bytes, cudaHostAllocMapped) != cudaSuccess)
        return err_memory(e, "tokens drawn", q->draw.answers_bytes);
    if (a.overflow) return err_set(e, ERR_LIMIT, "a step of %lld rows is too large", (long long)have->rows);
    if (!queue_take(q, &q->memory, a.used, "scratch of a step", e)) return false;
    a = (struct arena){ .memory = q->memory, .size = a.used };
    layout(q, &a);
    uint64_t arrived = ROWS_EXACT * KV_HEADS_MAX * sizeof *q->arrived, chunks = 2 * sizeof *q->batch.chunks;
    bool ok = queue_check(q, cudaMemsetAsync(q->arrived, 0, arrived, q->stream), "reserve") &&
              queue_check(q, cudaMemsetAsync(q->batch.chunks, 0, chunks, q->stream), "reserve");
    return ok || err_set(e, ERR_IO, "GPU: %s: %s", q->failed, q->failure);
}

static bool fill_spans(struct queue *q, struct cuda_row *rows, struct cuda_span *spans, int *pages,
                       const struct step_rows *step)
{
    int64_t each = pages_each(&q->limits);
    for (int64_t s = 0; s < step->n_spans; s++) {
        const struct span *span = &step->spans[s];
        int64_t n = (span->past + span->n + KV_PAGE - 1) / KV_PAGE;
        spans[s] = (struct cuda_span){ (int)span->first, (int)span->n, (int)span->past,
                                       span->slot,       span->kept,   span->logged };
        for (int64_t i = 0; i < span->n; i++) rows[span->first + i].span = (int)s;
        if (!span->pages) continue;
        if (n > each) return false;
        memcpy(pages + s * each, span->pages, (size_t)n * sizeof *pages);
        memset(pages + s * each + n, 0, (size_t)(each - n) * sizeof *pages);
    }
    return true;
}

const struct cuda_rows *queue_rows(struct queue *q, const struct step_rows *step)
{
    if (queue_failed(q)) return NULL;
    if (step == q->current) return &q->rows;
    int64_t each = pages_each(&q->limits);
    struct step_layout l = layout_of(&q->limits, step->n);
    struct cuda_row *rows = (struct cuda_row *)q->host_next;
    if (step->n > q->limits.rows || step->n_spans > q->limits.rows) {
        queue_refuse(q, "rows", "more rows than were reserved");
        return NULL;
    }
    uint64_t bytes = l.pages + (uint64_t)(step->n_spans * each) * sizeof(int);
    memset(q->host_next, 0, bytes);
    for (int64_t i = 0; step->rows && i < step->n; i++) {
        const struct row *r = &step->rows[i];
        rows[i] = (struct cuda_row){
            r->token, { r->position[0], r->position[1], r->position[2] }, 0, r->embedding ? (int)i : -1
        };
    }
    if (!fill_spans(q, rows, (struct cuda_span *)(q->host_next + l.spans), (int *)(q->host_next + l.pages),
                    step)) {
        queue_refuse(q, "rows", "a longer context than was reserved");
        return NULL;
    }
    unsigned char *to = q->step + (step->n <= ROWS_EXACT ? 0 : layout_of(&q->limits, 1).all);
    if (bytes != q->step_bytes || memcmp(q->host_step, q->host_next, bytes) != 0) {
        unsigned char *old = q->host_step;
        q->host_step = q->host_next;
        q->host_next = old;
        q->step_bytes = bytes;
        queue_check(q, cudaMemcpyAsync(to, q->host_step, bytes, cudaMemcpyHostToDevice, q->stream), "rows");
    }
    q->rows = (struct cuda_rows){ .rows = (const struct cuda_row *)to,
                                  .spans = (const struct cuda_span *)(to + l.spans),
                                  .pages = (const int *)(to + l.pages),
                                  .embeddings = q->embeddings,
                                  .n = (int)step->n,
                                  .n_spans = (int)step->n_spans,
                                  .pages_each = (int)each };
    return queue_failed(q) ? NULL : &q->rows;
}

bool queue_logs(const struct step_rows *step)
{
    for (int64_t i = 0; i < step->n_spans; i++)
        if (step->spans[i].logged || step->spans[i].kept) return true;
    return false;
}

bool queue_decodes(const struct step_rows *step)
{
    return step->n <= ROWS_EXACT && step->n_spans == step->n && !step->prompts && !queue_logs(step);
}

/* Recorded steps. */

void cuda_forget_steps(struct queue *q)
{
    for (int i = 0; i < GRAPHS; i++) {
        if (q->graphs[i].exec) cudaGraphExecDestroy(q->graphs[i].exec);
        q->graphs[i] = (struct cuda_graph){ 0 };
    }
    q->last = (struct cuda_graph){ 0 };
}

static bool has_embeddings(const struct step_rows *step)
{
    for (int64_t i = 0; i < step->n; i++)
        if (step->rows[i].embedding) return true;
    return false;
}

/* Kernels and their grids are the same for all steps of this kind. */
static struct cuda_graph kind_of(const void *key, const struct step_rows *step)
{
    return (struct cuda_graph){ key, step->n, step->n_spans, queue_logs(step), NULL };
}

static bool same_kind(const struct cuda_graph *a, const struct cuda_graph *b)
{
    return a->key == b->key && a->rows == b->rows && a->spans == b->spans && a->logs == b->logs;
}

bool cuda_step_begin(struct queue *q, const void *key, const struct step_rows *step)
{
    q->current = NULL;
    q->told.used = false;
    q->told.next = NULL;
    if (!queue_rows(q, step)) return false;
    q->current = step;
    struct cuda_graph kind = kind_of(key, step);
    if (step->prompts || step->n > (kind.spans == step->n ? ROWS_BATCH : ROWS_EXACT) || has_embeddings(step))
        return false;
    for (int i = 0; i < GRAPHS; i++)
        if (q->graphs[i].exec && same_kind(&q->graphs[i], &kind))
            return queue_check(q, cudaGraphLaunch(q->graphs[i].exec, q->stream), "step");
    /* what comes twice in a row will come again */
    q->recording = same_kind(&q->last, &kind);
    q->last = kind;
    if (q->recording)
        q->recording =
            queue_check(q, cudaStreamBeginCapture(q->stream, cudaStreamCaptureModeThreadLocal), "step");
    return false;
}

void cuda_step_end(struct queue *q)
{
    cudaGraph_t graph;
    q->current = NULL;
    if (!q->recording) return;
    q->recording = false;
    if (!queue_check(q, cudaStreamEndCapture(q->stream, &graph), "step")) return;
    struct cuda_graph *g = &q->graphs[q->next_graph++ % GRAPHS];
    if (g->exec) cudaGraphExecDestroy(g->exec);
    *g = q->last;
    if (queue_check(q, cudaGraphInstantiate(&g->exec, graph, 0), "step"))
        queue_check(q, cudaGraphLaunch(g->exec, q->stream), "step");
    cudaGraphDestroy(graph);
}
