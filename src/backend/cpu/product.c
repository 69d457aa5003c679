/* Matrix products and the mixture of experts on the CPU. A product packs its inputs into blocks of rows, then
 * works through the weight panel by panel: 256 columns of a panel are decoded to f32 into the first cache and
 * meet every block of rows there. Each output is one running sum over the columns in order, whatever the
 * number of rows. */
#include "backend/cpu/parts.h"
#include "num/fp8.h"
#include "num/nvfp4.h"
#include <math.h>
#include <string.h>

void cpu_panel_product(struct queue *q, struct cpu_thread *t, float *sums, const struct packed *in,
                       const struct cpu_weight *w, int64_t panel)
{
    memset(sums, 0, (size_t)in->rows * PANEL * sizeof *sums);
    for (int64_t c = 0; c < in->cols; c += DECODE_COLUMNS) {
        int64_t n = in->cols - c < DECODE_COLUMNS ? in->cols - c : DECODE_COLUMNS;
        q->k->decode(t->panel, w, panel, c, n);
        for (int64_t r = 0; r < in->rows;) {
            int rows = block_rows(q->k, in->rows - r);
            q->k->product(sums + r * PANEL, in->x + r * in->cols + c * rows, t->panel, n, rows);
            r += rows;
        }
    }
    if (w->head.format != WEIGHT_FP8) return;
    const float *scale = w->scale + panel * PANEL;
    for (int64_t r = 0; r < in->rows; r++)
        for (int i = 0; i < PANEL; i++)
            sums[r * PANEL + i] *= scale[i] * (in->row_scale ? in->row_scale[r] : 1);
}

void cpu_pack_block(float *packed, float *row_scale, float *quantized, const float *x, int64_t stride,
                    const int64_t *index, int rows, int64_t cols, const struct weight *w)
{
    for (int i = 0; i < rows; i++) {
        const float *row = x + (index ? index[i] : i) * stride;
        if (w->input == INPUT_FP8_ROW)
            row_scale[i] = fp8_quantize_activations(quantized, row, cols);
        else if (w->input == INPUT_NVFP4)
            nvfp4_quantize_activations(quantized, row, w->input_global, cols);
        if (w->input != INPUT_AS_IS) row = quantized;
        for (int64_t c = 0; c < cols; c++) packed[c * rows + i] = row[c];
    }
}

/* One matrix. */

struct matmul {
    struct queue *q;
    struct mat y, x;
    const struct cpu_weight *w;
    struct packed in;
    int64_t panels_per_item;
};

static void pack_rows(void *ctx, int64_t item, int thread)
{
    struct matmul *m = ctx;
    struct queue *q = m->q;
    int64_t r = item * q->k->block_rows,
            end = r + q->k->block_rows < m->x.rows ? r + q->k->block_rows : m->x.rows;
    while (r < end) {
        int rows = block_rows(q->k, m->x.rows - r);
        cpu_pack_block(q->packed + r * m->x.cols, q->row_scale + r, q->threads[thread].quantized,
                       m->x.data + r * m->x.stride, m->x.stride, NULL, rows, m->x.cols, &m->w->head);
        r += rows;
    }
}

static void multiply(void *ctx, int64_t item, int thread)
{
    struct matmul *m = ctx;
    struct cpu_thread *t = &m->q->threads[thread];
    int64_t panel = item * m->panels_per_item, end = panel + m->panels_per_item;
    for (; panel < end && panel < m->w->panels; panel++) {
        cpu_panel_product(m->q, t, t->sums, &m->in, m->w, panel);
        int64_t first = panel * PANEL, n = m->y.cols - first < PANEL ? m->y.cols - first : PANEL;
        for (int64_t r = 0; r < m->x.rows; r++)
            memcpy(m->y.data + r * m->y.stride + first, t->sums + r * PANEL, (size_t)n * sizeof(float));
    }
}

void cpu_matmul(struct queue *q, struct mat y, struct mat x, const struct weight *weight)
{
    const struct cpu_weight *w = (const struct cpu_weight *)weight;
    struct matmul m = {
        q, y, x, w, { q->packed, weight->input == INPUT_FP8_ROW ? q->row_scale : NULL, x.rows, x.cols }, 1
    };
    if (x.rows == 0) return;
    while (m.panels_per_item < 16 && m.panels_per_item * x.rows * x.cols < 4096) m.panels_per_item *= 2;
    pool_run(q->pool, (x.rows + q->k->block_rows - 1) / q->k->block_rows, pack_rows, &m);
    pool_run(q->pool, (w->panels + m.panels_per_item - 1) / m.panels_per_item, multiply, &m);
}

/* Experts. */

struct moe {
    struct queue *q;
    struct mat y, x;
    const struct picks *picks;
    const struct experts *experts;
    int n_active;
    int64_t panels; /* of one expert's matrix in this phase */
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

/* Packs an expert's inputs: rows of x for gate and up, rows of hidden for down. */
static void pack_expert(struct moe *m, int32_t e, int thread, const float *x, int64_t stride, int64_t cols,
                        bool by_row, const struct weight *w)
{
    struct queue *q = m->q;
    int64_t end = q->begin[e + 1];
    for (int64_t r = q->begin[e]; r < end;) {
        int rows = block_rows(q->k, end - r);
        int64_t index[BLOCK_ROWS_MAX];
        for (int i = 0; i < rows; i++) index[i] = by_row ? q->order[r + i] / m->picks->k : r + i;
        cpu_pack_block(q->packed + r * cols, q->row_scale + r, q->threads[thread].quantized, x, stride, index,
                       rows, cols, w);
        r += rows;
    }
}

static void pack_gate_up(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    int32_t e = m->q->active[item];
    pack_expert(m, e, thread, m->x.data, m->x.stride, m->x.cols, true, m->experts->gate[e]);
}

static void pack_down(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    int32_t e = m->q->active[item];
    const struct weight *down = m->experts->down[e];
    pack_expert(m, e, thread, m->q->hidden, down->cols, down->cols, false, down);
}

static struct packed packed_of(const struct queue *q, int32_t e, const struct weight *w)
{
    int64_t begin = q->begin[e];
    return (struct packed){ q->packed + begin * w->cols,
                            w->input == INPUT_FP8_ROW ? q->row_scale + begin : NULL, q->begin[e + 1] - begin,
                            w->cols };
}

/* One panel of one expert's gate and up: 16 columns of its hidden rows. */
static void gate_up(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    struct queue *q = m->q;
    struct cpu_thread *t = &q->threads[thread];
    int32_t e = q->active[item / m->panels];
    const struct weight *gate = m->experts->gate[e], *up = m->experts->up[e];
    int64_t panel = item % m->panels, first = panel * PANEL;
    int64_t n = gate->rows - first < PANEL ? gate->rows - first : PANEL;
    struct packed in = packed_of(q, e, gate);
    float *g = t->sums, *u = t->sums + q->limits.rows * PANEL;
    cpu_panel_product(q, t, g, &in, (const struct cpu_weight *)gate, panel);
    cpu_panel_product(q, t, u, &in, (const struct cpu_weight *)up, panel);
    q->k->silu_mul(g, g, u, in.rows * PANEL);
    for (int64_t r = 0; r < in.rows; r++)
        memcpy(q->hidden + (q->begin[e] + r) * gate->rows + first, g + r * PANEL, (size_t)n * sizeof *g);
}

static void down(void *ctx, int64_t item, int thread)
{
    struct moe *m = ctx;
    struct queue *q = m->q;
    struct cpu_thread *t = &q->threads[thread];
    int32_t e = q->active[item / m->panels];
    const struct weight *w = m->experts->down[e];
    int64_t panel = item % m->panels, first = panel * PANEL;
    int64_t n = w->rows - first < PANEL ? w->rows - first : PANEL;
    struct packed in = packed_of(q, e, w);
    cpu_panel_product(q, t, t->sums, &in, (const struct cpu_weight *)w, panel);
    for (int64_t r = 0; r < in.rows; r++)
        memcpy(q->outputs + q->order[q->begin[e] + r] * w->rows + first, t->sums + r * PANEL,
               (size_t)n * sizeof(float));
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

void cpu_experts(struct queue *q, struct mat y, struct mat x, const struct picks *picks,
                 const struct experts *experts)
{
    if (x.rows == 0) return;
    struct moe m = { q, y, x, picks, experts, group_picks(q, picks, x.rows, experts->n_experts), 0 };
    const struct weight *gate = experts->gate[q->active[0]], *out = experts->down[q->active[0]];
    pool_run(q->pool, m.n_active, pack_gate_up, &m);
    m.panels = (gate->rows + PANEL - 1) / PANEL;
    pool_run(q->pool, m.n_active * m.panels, gate_up, &m);
    pool_run(q->pool, m.n_active, pack_down, &m);
    m.panels = (out->rows + PANEL - 1) / PANEL;
    pool_run(q->pool, m.n_active * m.panels, down, &m);
    pool_run(q->pool, x.rows, combine, &m);
}
