/* The mixture of experts on the CPU: picks are grouped by expert, each expert's rows are packed, and gate, up
 * and SiLU happen panel by panel while both panels' sums are in the first cache. */
#include "backend/cpu/parts.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct moe {
    struct queue *q;
    struct mat y, x;
    const struct picks *picks;
    const struct experts *experts;
    int n_active;
    int64_t items; /* of one expert in this phase, panels_each panels each */
    int panels_each;
    int64_t most;       /* rows of an expert */
    atomic_llong taken; /* experts */
};

/* Groups the picks by expert: order[begin[e] .. begin[e + 1]) are the picks of expert e, ascending. */
static int group_picks(struct queue *q, const struct picks *picks, int64_t rows, int n_experts)
{
    int64_t n = rows * picks->k;
    memset(q->begin, 0, (size_t)(n_experts + 1) * sizeof *q->begin);
    for (int64_t i = 0; i < n; i++) q->begin[picks->expert[i] + 1]++;
    int n_active = 0;
    for (int32_t e = 0; e < n_experts; e++) {
        if (q->begin[e + 1] > 0) q->active[n_active++] = e;
        q->begin[e + 1] += q->begin[e];
    }
    for (int64_t i = n - 1; i >= 0; i--) q->order[--q->begin[picks->expert[i] + 1]] = i;
    /* begin[e + 1] now is where e begins: shift back */
    memmove(q->begin, q->begin + 1, (size_t)n_experts * sizeof *q->begin);
    q->begin[n_experts] = n;
    return n_active;
}

/* The form both matrices take. */
static enum input_form form_of(const struct queue *q, const struct weight *a, const struct weight *b)
{
    enum input_form form = cpu_form(q, a);
    return form == cpu_form(q, b) && a->format == b->format ? form : FORM_F32;
}

/* Blocks begin where the widest words of an expert matrix put them: at begin[e] * q->words_most. */
static struct packed packed_of(const struct moe *m, int32_t e, const struct weight *w, enum input_form form)
{
    const struct queue *q = m->q;
    int64_t begin = q->begin[e], n = q->begin[e + 1] - begin;
    bool wide = cpu_is_wide(q->k, form, m->x.rows, n);
    return (struct packed){ q->packed + begin * q->words_most,
                            w->input == INPUT_FP8_ROW ? q->row_scale + begin : NULL,
                            form,
                            n,
                            cpu_words_apart(cpu_words(form, w), wide),
                            wide };
}

/* Packs an expert's inputs: rows of x for gate and up, rows of hidden for down. */
static void pack_expert(struct moe *m, int32_t e, int thread, const float *x, int64_t stride, bool by_row,
                        const struct weight *w, enum input_form form)
{
    struct queue *q = m->q;
    int64_t begin = q->begin[e], n = q->begin[e + 1] - begin;
    bool wide = cpu_is_wide(q->k, form, m->x.rows, n), as_rows = n == 1 || wide;
    int64_t words = cpu_words_apart(cpu_words(form, w), wide);
    uint32_t *rounded = q->rounded_rows + begin * q->words_most, *packed = q->packed + begin * q->words_most;
    for (int64_t r = 0; r < n;) {
        int rows = cpu_block_rows(q->k, form, n, r);
        const uint8_t *row[BLOCK_ROWS_MAX];
        for (int i = 0; i < rows; i++) {
            int64_t from = by_row ? q->order[begin + r + i] / m->picks->k : begin + r + i;
            uint32_t *to = (as_rows ? packed : rounded) + (r + i) * words;
            row[i] = (const uint8_t *)to;
            q->row_scale[begin + r + i] =
                cpu_write_row(q, w, form, to, x + from * stride, q->threads[thread].quantized);
        }
        if (!as_rows) q->k->interleave(packed + r * words, row, rows, words);
        r += rows;
    }
}

static void pack_gate_up(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    int32_t e = m->q->active[item];
    const struct weight *gate = m->experts->gate[e];
    pack_expert(m, e, thread, m->x.data, m->x.stride, true, gate, form_of(m->q, gate, m->experts->up[e]));
}

static void pack_down(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    int32_t e = m->q->active[item];
    const struct weight *down = m->experts->down[e];
    pack_expert(m, e, thread, m->q->hidden, down->cols, false, down, cpu_form(m->q, down));
}

/* Where every expert takes int8, which has no scale of the weight's, a row is rounded once for all of its
 * picks. */
static bool is_shared(const struct moe *m)
{
    for (int i = 0; i < m->n_active; i++) {
        int32_t e = m->q->active[i];
        if (form_of(m->q, m->experts->gate[e], m->experts->up[e]) != FORM_INT8) return false;
    }
    return true;
}

static uint32_t *shared_row(const struct moe *m, int64_t row)
{
    return m->q->rounded_rows + row * cpu_words(FORM_INT8, m->experts->gate[m->q->active[0]]);
}

static void round_shared(void *ctx, int64_t row, int thread)
{
    struct moe *m = ctx;
    (void)thread;
    m->q->k->round_int8(shared_row(m, row), m->x.data + row * m->x.stride, m->x.cols);
}

static void pack_shared(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    struct queue *q = m->q;
    int32_t e = q->active[item];
    int64_t begin = q->begin[e], n = q->begin[e + 1] - begin,
            words = cpu_words(FORM_INT8, m->experts->gate[e]);
    bool wide = cpu_is_wide(q->k, FORM_INT8, m->x.rows, n), as_rows = n == 1 || wide;
    int64_t apart = cpu_words_apart(words, wide);
    uint32_t *packed = q->packed + begin * q->words_most;
    (void)thread;
    for (int64_t r = 0; r < n;) {
        int rows = cpu_block_rows(q->k, FORM_INT8, n, r);
        const uint8_t *row[BLOCK_ROWS_MAX];
        for (int i = 0; i < rows; i++)
            row[i] = (const uint8_t *)shared_row(m, q->order[begin + r + i] / m->picks->k);
        for (int i = 0; as_rows && i < rows; i++)
            memcpy(packed + (r + i) * apart, row[i], (size_t)words * sizeof *packed);
        if (!as_rows) q->k->interleave(packed + r * words, row, rows, words);
        r += rows;
    }
}

/* What an item is: an expert and some panels of its matrix. */
struct part {
    int32_t expert;
    int panels;
    int64_t panel;
};

static struct part part_of(const struct moe *m, int64_t item, int64_t rows)
{
    int64_t panel = item % m->items * m->panels_each, left = (rows + PANEL - 1) / PANEL - panel;
    return (struct part){ m->q->active[item / m->items], left < m->panels_each ? (int)left : m->panels_each,
                          panel };
}

/* Panels of one expert's gate and up: 16 columns of its hidden rows each. */
static void gate_up(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    struct queue *q = m->q;
    struct cpu_thread *t = &q->threads[thread];
    struct part part = part_of(m, item, m->experts->gate[q->active[0]]->rows);
    const struct weight *gate = m->experts->gate[part.expert], *up = m->experts->up[part.expert];
    struct packed in = packed_of(m, part.expert, gate, form_of(q, gate, up));
    int64_t each = in.rows * PANEL;
    float *g = t->sums, *u = t->sums + part.panels * each;
    for (int p = 0; p < part.panels && in.wide; p++)
        cpu_pair_product(q, g + p * each, u + p * each, &in, (const struct cpu_weight *)gate,
                         (const struct cpu_weight *)up, part.panel + p);
    if (!in.wide) {
        cpu_panels_product(q, t, g, &in, (const struct cpu_weight *)gate, part.panel, part.panels);
        cpu_panels_product(q, t, u, &in, (const struct cpu_weight *)up, part.panel, part.panels);
    }
    q->k->silu_mul(g, g, u, part.panels * each);
    for (int p = 0; p < part.panels; p++) {
        int64_t first = (part.panel + p) * PANEL, n = gate->rows - first < PANEL ? gate->rows - first : PANEL;
        for (int64_t r = 0; r < in.rows; r++)
            cpu_keep(q->hidden + (q->begin[part.expert] + r) * gate->rows + first, g + p * each + r * PANEL,
                     n);
    }
}

static void down(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    struct queue *q = m->q;
    struct cpu_thread *t = &q->threads[thread];
    struct part part = part_of(m, item, m->experts->down[q->active[0]]->rows);
    const struct weight *w = m->experts->down[part.expert];
    struct packed in = packed_of(m, part.expert, w, cpu_form(q, w));
    cpu_panels_product(q, t, t->sums, &in, (const struct cpu_weight *)w, part.panel, part.panels);
    for (int p = 0; p < part.panels; p++) {
        int64_t first = (part.panel + p) * PANEL, n = w->rows - first < PANEL ? w->rows - first : PANEL;
        for (int64_t r = 0; r < in.rows; r++)
            cpu_keep(q->outputs + q->order[q->begin[part.expert] + r] * w->rows + first,
                     t->sums + (p * in.rows + r) * PANEL, n);
    }
}

static void combine(void *ctx, int64_t row, int thread)
{
    struct moe *m = ctx;
    (void)thread;
    float *y = m->y.data + row * m->y.stride;
    memset(y, 0, (size_t)m->y.cols * sizeof *y);
    for (int64_t i = row * m->picks->k; i < (row + 1) * m->picks->k; i++)
        m->q->k->scale_add(y, m->q->outputs + i * m->y.cols, m->picks->weight[i], m->y.cols);
}

/* A prompt's experts, one thread each from beginning to end: its rows, hidden rows and sums stay in the
 * second cache, and the thread knows which weights it reads next. Every matrix takes int8. */

static void gather_rows(struct moe *m, int32_t e, uint32_t *to, int64_t apart)
{
    const struct queue *q = m->q;
    int64_t words = cpu_words(FORM_INT8, m->experts->gate[e]);
    for (int64_t i = q->begin[e]; i < q->begin[e + 1]; i++, to += apart)
        memcpy(to, shared_row(m, q->order[i] / m->picks->k), (size_t)words * sizeof *to);
}

static void whole_gate_up(struct moe *m, int32_t e, const struct packed *in, float *hidden, int thread)
{
    struct queue *q = m->q;
    const struct cpu_weight *gate = (const struct cpu_weight *)m->experts->gate[e],
                            *up = (const struct cpu_weight *)m->experts->up[e],
                            *down = (const struct cpu_weight *)m->experts->down[e];
    float *sums = q->threads[thread].sums;
    int64_t each = in->rows * PANEL,
            longer = gate->head.cols / down->head.cols; /* panels of down that one of gate is as long as */
    for (int64_t p = 0; p < gate->panels; p++) {
        bool last = p + 1 == gate->panels;
        const struct panel pair[2] = { { gate, p }, { up, p } };
        const struct ahead next[2] = { last ? panel_ahead(down, 0, 0) : panel_ahead(gate, p + 1, 0),
                                       last ? panel_ahead(down, longer, 0) : panel_ahead(up, p + 1, 0) };
        q->k->wide_int8(sums, each, in->words, in->words_each, pair, next, 2, in->rows);
        q->k->silu_mul(sums, sums, sums + each, each);
        int64_t n = gate->head.rows - p * PANEL < PANEL ? gate->head.rows - p * PANEL : PANEL;
        for (int64_t r = 0; r < in->rows; r++)
            cpu_keep(hidden + r * gate->head.rows + p * PANEL, sums + r * PANEL, n);
    }
}

static void keep_output(float *to, const float *sums, const struct cpu_weight *w, int64_t panel)
{
    if (w->head.rows % PANEL == 0)
        cpu_keep_away(to, sums);
    else
        cpu_keep(to, sums, w->head.rows - panel * PANEL < PANEL ? w->head.rows - panel * PANEL : PANEL);
}

enum { DOWN_PANELS = 2 * PANELS_MAX }; /* whose sums are written together */

static void whole_down(struct moe *m, int32_t e, int32_t then, const struct packed *in, int thread)
{
    struct queue *q = m->q;
    const struct cpu_weight *w = (const struct cpu_weight *)m->experts->down[e],
                            *gate = (const struct cpu_weight *)m->experts->gate[then],
                            *up = (const struct cpu_weight *)m->experts->up[then];
    float *sums = q->threads[thread].sums;
    int64_t each = in->rows * PANEL, column = 0;
    for (int64_t p = 0; p < w->panels; p += DOWN_PANELS) {
        int64_t here = w->panels - p < DOWN_PANELS ? w->panels - p : DOWN_PANELS;
        for (int64_t i = 0; i < here; i += 2) {
            int n = here - i < 2 ? 1 : 2;
            int64_t ahead = p + i + DOWN_PANELS;
            const struct panel pair[2] = { { w, p + i }, { w, p + i + 1 } };
            struct ahead next[2] = { panel_ahead(gate, 0, column), panel_ahead(up, 0, column) };
            if (ahead + n <= w->panels)
                for (int k = 0; k < n; k++) next[k] = panel_ahead(w, ahead + k, 0);
            else if (column + 2 * w->head.cols <= gate->head.cols)
                column += w->head.cols;
            q->k->wide_int8(sums + i * each, each, in->words, in->words_each, pair, next, n, in->rows);
        }
        for (int64_t r = 0; r < in->rows; r++) {
            float *to = q->outputs + q->order[q->begin[e] + r] * w->head.rows + p * PANEL;
            for (int64_t i = 0; i < here; i++)
                keep_output(to + i * PANEL, sums + i * each + r * PANEL, w, p + i);
        }
    }
}

static void whole_expert(struct moe *m, int32_t e, int32_t then, int thread)
{
    struct queue *q = m->q;
    const struct weight *gate = m->experts->gate[e], *down = m->experts->down[e];
    uint32_t *packed = q->packed + thread * m->most * q->words_most;
    float *hidden = q->hidden + thread * m->most * gate->rows;
    struct packed in = { packed,
                         NULL,
                         FORM_INT8,
                         q->begin[e + 1] - q->begin[e],
                         cpu_words_apart(cpu_words(FORM_INT8, gate), true),
                         true };
    gather_rows(m, e, packed, in.words_each);
    whole_gate_up(m, e, &in, hidden, thread);
    in.words_each = cpu_words_apart(cpu_words(FORM_INT8, down), true);
    for (int64_t r = 0; r < in.rows; r++)
        q->k->round_int8(packed + r * in.words_each, hidden + r * gate->rows, gate->rows);
    whole_down(m, e, then, &in, thread);
}

/* A thread knows its next expert while it works on one. */
static void take_experts(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    const int32_t *active = m->q->active;
    (void)item;
    for (int64_t at = atomic_fetch_add(&m->taken, 1), then; at < m->n_active; at = then) {
        then = atomic_fetch_add(&m->taken, 1);
        whole_expert(m, active[at], active[then < m->n_active ? then : at], thread);
    }
    cpu_kept();
}

static int compare_rows(const void *a, const void *b, void *ctx)
{
    const int64_t *begin = ctx;
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    int64_t rows_x = begin[x + 1] - begin[x], rows_y = begin[y + 1] - begin[y];
    return rows_x != rows_y ? rows_x < rows_y ? 1 : -1 : x < y ? -1 : 1;
}

/* Longest first, so that threads end together. False where one would be left with the rest of the work. */
static bool run_whole(struct moe *m)
{
    struct queue *q = m->q;
    int threads = pool_threads(q->pool);
    int64_t picked = m->x.rows * m->picks->k;
    if (!cpu_is_wide(q->k, FORM_INT8, m->x.rows, 1)) return false;
    for (int i = 0; i < m->n_active; i++) {
        int64_t rows = q->begin[q->active[i] + 1] - q->begin[q->active[i]];
        if (cpu_form(q, m->experts->down[q->active[i]]) != FORM_INT8) return false;
        if (rows > m->most) m->most = rows;
    }
    if (2 * m->most * threads > picked) return false;
    qsort_r(q->active, (size_t)m->n_active, sizeof *q->active, compare_rows, q->begin);
    pool_run(q->pool, threads, take_experts, m);
    return true;
}

static void run_panels(struct moe *m, int64_t rows, void (*body)(void *, int64_t, int))
{
    m->items = ((rows + PANEL - 1) / PANEL + m->panels_each - 1) / m->panels_each;
    pool_run(m->q->pool, m->n_active * m->items, body, m);
}

void cpu_experts(struct queue *q, struct mat y, struct mat x, const struct picks *picks,
                 const struct experts *experts)
{
    if (x.rows == 0) return;
    struct moe m = { .q = q, .y = y, .x = x, .picks = picks, .experts = experts };
    m.n_active = group_picks(q, picks, x.rows, experts->n_experts);
    m.panels_each = cpu_panels_each(x.rows * picks->k / m.n_active);
    int32_t first = q->active[0];
    bool shared = is_shared(&m);
    if (shared) cpu_run_rows(q, x.rows, 2 * x.cols, round_shared, &m);
    if (!shared || !run_whole(&m)) {
        cpu_run_rows(q, m.n_active, 2 * x.rows * picks->k * x.cols / m.n_active,
                     shared ? pack_shared : pack_gate_up, &m);
        run_panels(&m, experts->gate[first]->rows, gate_up);
        cpu_run_rows(q, m.n_active, 2 * x.rows * picks->k * experts->down[first]->cols / m.n_active,
                     pack_down, &m);
        if (x.rows > ROWS_EXACT) m.panels_each = 2;
        run_panels(&m, experts->down[first]->rows, down);
    }
    cpu_run_rows(q, x.rows, 2 * picks->k * y.cols, combine, &m);
}
