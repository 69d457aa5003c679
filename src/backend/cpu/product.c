/* Matrix products on the CPU. The inputs are written in the form that the kernels at hand take (kernels.h),
 * blocks of up to 16 rows interleaved, a lone row as it is; then the weight is worked through panel by panel.
 * Each output's additions have one order, whatever the number of rows. */
#include "backend/cpu/parts.h"
#include "base/clock.h"
#include <string.h>

enum input_form cpu_form(const struct queue *q, const struct weight *w)
{
    enum rounding rounding = rounding_of(w, q->rounded);
    bool halves = w->format == WEIGHT_BF16 || w->format == WEIGHT_FP8;
    if (q->k->dot_bf16 && halves && (rounding == ROUND_BF16 || rounding == ROUND_FP8_ROW)) return FORM_BF16;
    return q->k->dot_int8 && w->format == WEIGHT_NVFP4 && rounding == ROUND_INT8 ? FORM_INT8 : FORM_F32;
}

int64_t cpu_words(enum input_form form, const struct weight *w)
{
    if (form == FORM_INT8) return (w->cols + 31) / 32 * INT8_WORDS;
    if (form == FORM_F32) return w->cols;
    return w->format == WEIGHT_FP8 ? (w->cols + 3) / 4 * 2 : (w->cols + 1) / 2;
}

static void write_bf16(const struct cpu_kernels *k, uint32_t *out, int64_t words, const float *x, int64_t n)
{
    k->round_bf16(out, x, n);
    memset((uint16_t *)(void *)out + n, 0, (size_t)(2 * words - n) * 2);
}

float cpu_write_row(struct queue *q, const struct weight *w, enum input_form form, uint32_t *out,
                    const float *x, float *scratch)
{
    enum rounding rounding = rounding_of(w, q->rounded);
    float scale = 1;
    if (form == FORM_INT8) {
        q->k->round_int8(out, x, w->cols);
    } else if (form == FORM_BF16) {
        if (rounding == ROUND_FP8_ROW) scale = q->k->round_fp8(scratch, x, w->cols);
        write_bf16(q->k, out, cpu_words(form, w), rounding == ROUND_FP8_ROW ? scratch : x, w->cols);
    } else if (rounding == ROUND_FP8_ROW) {
        scale = q->k->round_fp8((float *)(void *)out, x, w->cols);
    } else {
        scale = rounding_apply((float *)(void *)out, x, w->cols, rounding, w);
    }
    return scale;
}

/* Every block of rows against a decoded panel. */
static void panel_f32(struct queue *q, struct cpu_thread *t, float *sums, const struct packed *in,
                      const struct cpu_weight *w, int64_t panel)
{
    memset(sums, 0, (size_t)in->rows * PANEL * sizeof *sums);
    for (int64_t c = 0; c < w->head.cols; c += DECODE_COLUMNS) {
        int64_t n = w->head.cols - c < DECODE_COLUMNS ? w->head.cols - c : DECODE_COLUMNS;
        q->k->decode(t->panel, w, panel, c, n);
        for (int64_t r = 0; r < in->rows;) {
            int rows = cpu_block_rows(q->k, FORM_F32, in->rows, r);
            const float *x = (const float *)(const void *)in->words;
            q->k->product(sums + r * PANEL, x + r * w->head.cols + c * rows, t->panel, n, rows);
            r += rows;
        }
    }
}

static void apply_scales(float *sums, const struct packed *in, const struct cpu_weight *w, int64_t panel,
                         int panels)
{
    int64_t each = in->rows * PANEL;
    const float by = 128 / w->global;
    for (int64_t i = 0; in->form == FORM_INT8 && !in->wide && i < panels * each; i++) sums[i] *= by;
    if (w->head.format != WEIGHT_FP8) return;
    for (int p = 0; p < panels; p++)
        for (int64_t r = 0; r < in->rows; r++)
            for (int i = 0; i < PANEL; i++)
                sums[p * each + r * PANEL + i] *=
                    w->scale[(panel + p) * PANEL + i] * (in->row_scale ? in->row_scale[r] : 1);
}

static cpu_wide *wide_of(const struct queue *q, enum input_form form)
{
    return form == FORM_INT8 ? q->k->wide_int8 : q->k->wide_bf16;
}

void cpu_panels_product(struct queue *q, struct cpu_thread *t, float *sums, const struct packed *in,
                        const struct cpu_weight *w, int64_t panel, int panels)
{
    int64_t each = in->rows * PANEL;
    for (int p = 0; in->wide && p < panels; p += 2) {
        int64_t at = panel + p, n = panels - p < 2 ? 1 : 2, then = at + 2 * n <= w->panels ? at + n : at;
        const struct panel pair[2] = { { w, at }, { w, at + 1 } };
        const struct ahead next[2] = { panel_ahead(w, then, 0), panel_ahead(w, then + n - 1, 0) };
        wide_of(q, in->form)(sums + p * each, each, in->words, in->words_each, pair, next, (int)n, in->rows);
    }
    cpu_dot *few = in->rows <= STREAM_ROWS_MAX ? q->k->stream : NULL;
    cpu_dot *dot = in->form == FORM_INT8 ? q->k->dot_int8 : in->form == FORM_BF16 ? q->k->dot_bf16 : few;
    for (int64_t r = 0; dot && !in->wide && r < in->rows;) {
        int rows = cpu_block_rows(q->k, in->form, in->rows, r);
        dot(sums + r * PANEL, each, in->words + r * in->words_each, w, panel, panels, rows);
        r += rows;
    }
    for (int p = 0; !dot && p < panels; p++) panel_f32(q, t, sums + p * each, in, w, panel + p);
    apply_scales(sums, in, w, panel, panels);
}

void cpu_pair_product(struct queue *q, float *a_sums, float *b_sums, const struct packed *in,
                      const struct cpu_weight *a, const struct cpu_weight *b, int64_t panel)
{
    int64_t then = panel + 1 < a->panels ? panel + 1 : panel;
    const struct panel pair[2] = { { a, panel }, { b, panel } };
    const struct ahead next[2] = { panel_ahead(a, then, 0), panel_ahead(b, then, 0) };
    wide_of(q, in->form)(a_sums, b_sums - a_sums, in->words, in->words_each, pair, next, 2, in->rows);
    apply_scales(a_sums, in, a, panel, 1);
    apply_scales(b_sums, in, b, panel, 1);
}

/* One matrix. */

struct matmul {
    struct queue *q;
    struct mat y, x;
    const struct cpu_weight *w;
    struct packed in;
    bool as_is, away; /* inputs are used where they are; outputs leave the caches */
    int panels_each;  /* of an item */
    int64_t rows_each;
};

/* An item is a run of rows: written in the product's form, then interleaved. */
static void pack_rows(void *ctx, int64_t item, int thread)
{
    struct matmul *m = ctx;
    struct queue *q = m->q;
    int64_t words = m->in.words_each, end = cpu_run_begin(q->k, m->in.form, m->x.rows, item + 1);
    for (int64_t r = cpu_run_begin(q->k, m->in.form, m->x.rows, item); r < end;) {
        int rows = cpu_block_rows(q->k, m->in.form, m->x.rows, r);
        const uint8_t *row[BLOCK_ROWS_MAX];
        for (int i = 0; i < rows; i++) {
            const float *x = m->x.data + (r + i) * m->x.stride;
            uint32_t *to = (m->in.wide ? q->packed : q->rounded_rows) + (r + i) * words;
            row[i] = m->as_is ? (const uint8_t *)x : (const uint8_t *)to;
            if (!m->as_is)
                q->row_scale[r + i] =
                    cpu_write_row(q, &m->w->head, m->in.form, to, x, q->threads[thread].quantized);
        }
        if (m->x.rows > 1 && !m->in.wide) q->k->interleave(q->packed + r * words, row, rows, words);
        r += rows;
    }
}

static int64_t runs_of_panels(const struct matmul *m)
{
    return (m->w->panels + m->panels_each - 1) / m->panels_each;
}

/* With few panels a thread may wait for the other's last one: then rows are divided too. */
static int64_t rows_each(const struct matmul *m)
{
    enum { ITEMS = 16, LEAST = 64 }; /* of a thread; rows */
    int64_t n = m->x.rows, parts = ITEMS * pool_threads(m->q->pool) / runs_of_panels(m);
    if (parts > n / LEAST) parts = n / LEAST;
    return parts > 1 ? (n + parts - 1) / parts : n;
}

static struct packed rows_of(const struct matmul *m, int64_t first)
{
    struct packed in = m->in;
    in.words += first * in.words_each;
    if (in.row_scale) in.row_scale += first;
    in.rows = in.rows - first < m->rows_each ? in.rows - first : m->rows_each;
    return in;
}

/* Sums of in->rows rows by some panels, to the rows of y from `row` on. */
static void keep_sums(const struct matmul *m, const float *sums, int64_t rows, int64_t row, int64_t panel,
                      int panels)
{
    for (int64_t r = 0; r < rows; r++) {
        float *to = m->y.data + (row + r) * m->y.stride + panel * PANEL;
        for (int p = 0; p < panels; p++) {
            int64_t left = m->y.cols - (panel + p) * PANEL;
            if (m->away)
                cpu_keep_away(to + p * PANEL, sums + (p * rows + r) * PANEL);
            else
                cpu_keep(to + p * PANEL, sums + (p * rows + r) * PANEL, left < PANEL ? left : PANEL);
        }
    }
    if (m->away) cpu_kept();
}

/* An item is some panels and some rows. */
static void multiply(void *ctx, int64_t item, int thread)
{
    struct matmul *m = ctx;
    struct cpu_thread *t = &m->q->threads[thread];
    int64_t runs = runs_of_panels(m), panel = item % runs * m->panels_each, left = m->w->panels - panel;
    int64_t row = item / runs * m->rows_each;
    int panels = left < m->panels_each ? (int)left : m->panels_each;
    struct packed in = rows_of(m, row);
    cpu_panels_product(m->q, t, t->sums, &in, m->w, panel, panels);
    keep_sums(m, t->sums, in.rows, row, panel, panels);
}

/* Panels side by side make longer runs of outputs. */
static int panels_each(const struct matmul *m, bool wide)
{
    int64_t threads = pool_threads(m->q->pool), panels = m->w->panels;
    if (!wide) return cpu_panels_each(m->x.rows);
    return panels >= 32 * threads ? 4 : panels >= 2 * threads ? 2 : 1;
}

static struct matmul matmul_of(struct queue *q, struct mat y, struct mat x, const struct weight *weight)
{
    const struct cpu_weight *w = (const struct cpu_weight *)weight;
    enum input_form form = cpu_form(q, weight);
    bool as_is = form == FORM_F32 && rounding_of(weight, q->rounded) == ROUND_NONE, alone = x.rows == 1;
    const uint32_t *words =
        alone ? as_is ? (const uint32_t *)(const void *)x.data : q->rounded_rows : q->packed;
    bool wide = cpu_is_wide(q->k, form, x.rows, x.rows);
    struct matmul m = { .q = q, .y = y, .x = x, .w = w, .as_is = as_is };
    m.panels_each = panels_each(&m, wide);
    m.rows_each = wide ? rows_each(&m) : x.rows;
    m.away = wide && y.cols % PANEL == 0 && y.stride % 4 == 0 && (uintptr_t)y.data % 16 == 0;
    m.in = (struct packed){ words,  weight->input == INPUT_FP8_ROW ? q->row_scale : NULL, form,
                            x.rows, cpu_words_apart(cpu_words(form, weight), wide),       wide };
    return m;
}

/* Two products take their inputs as the same words. */
static bool same_inputs(const struct matmul *a, const struct matmul *b)
{
    const struct weight *v = &a->w->head, *w = &b->w->head;
    return a->in.form == b->in.form && a->in.words_each == b->in.words_each && a->in.wide == b->in.wide &&
           a->as_is == b->as_is && v->cols == w->cols && v->input_global == w->input_global &&
           rounding_of(v, a->q->rounded) == rounding_of(w, a->q->rounded);
}

void cpu_products(struct queue *q, int n, const struct mat *y, struct mat x, const struct weight *const *w)
{
    struct matmul before = { 0 }, m;
    for (int i = 0; i < n && x.rows > 0; i++, before = m) {
        m = matmul_of(q, y[i], x, w[i]);
        bool packed = m.as_is && x.rows == 1;
        if (!packed && (i == 0 || !same_inputs(&before, &m)))
            pool_run(q->pool, cpu_runs(q->k, x.rows), pack_rows, &m);
        pool_run(q->pool, runs_of_panels(&m) * ((x.rows + m.rows_each - 1) / m.rows_each), multiply, &m);
    }
}

void cpu_matmul(struct queue *q, struct mat y, struct mat x, const struct weight *w)
{
    cpu_products(q, 1, &y, x, &w);
}

/* What the instructions reach. */

struct spinning {
    const struct cpu_kernels *k;
    enum input_form form;
    double flops; /* of one item */
};

static void spin_item(void *ctx, int64_t item, int thread)
{
    enum { TIMES = 100000 }; /* about a millisecond */
    struct spinning *s = ctx;
    double flops = s->k->spin(s->form, TIMES);
    (void)thread;
    if (item == 0) s->flops = flops;
}

double cpu_product_speed(struct queue *q, enum weight_format f)
{
    enum { PASSES = 10 };
    struct weight w = { .format = f, .input = f == WEIGHT_FP8 ? INPUT_FP8_ROW : INPUT_AS_IS };
    struct spinning s = { .k = q->k, .form = cpu_form(q, &w) };
    double best = 0;
    for (int i = 0; i < PASSES; i++) {
        double begin = clock_seconds();
        pool_run(q->pool, pool_threads(q->pool), spin_item, &s);
        double speed = s.flops * pool_threads(q->pool) / (clock_seconds() - begin);
        best = speed > best ? speed : best;
    }
    return best;
}
