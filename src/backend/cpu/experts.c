/* The mixture of experts on the CPU: picks are grouped by expert, each expert's rows are packed, and gate, up
 * and SiLU happen panel by panel while both panels' sums are in the first cache. */
#include "backend/cpu/parts.h"
#include <string.h>

struct moe {
    struct queue *q;
    struct mat y, x;
    const struct picks *picks;
    const struct experts *experts;
    int n_active;
    int64_t items; /* of one expert in this phase, panels_each panels each */
    int panels_each;
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
    cpu_run_rows(q, m.n_active, 2 * x.rows * picks->k * x.cols / m.n_active,
                 shared ? pack_shared : pack_gate_up, &m);
    run_panels(&m, experts->gate[first]->rows, gate_up);
    cpu_run_rows(q, m.n_active, 2 * x.rows * picks->k * experts->down[first]->cols / m.n_active, pack_down,
                 &m);
    if (x.rows > ROWS_EXACT) m.panels_each = 2;
    run_panels(&m, experts->down[first]->rows, down);
    cpu_run_rows(q, x.rows, 2 * picks->k * y.cols, combine, &m);
}
