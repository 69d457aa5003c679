/* One work item a matrix. Losses are kept per matrix and added in order. */
#include "quantize/contest.h"
#include "num/bf16.h"
#include "num/nvfp4.h"
#include "quantize/gptq.h"
#include "quantize/search.h"
#include <stdlib.h>
#include <string.h>

enum { HELD_SHARE = 8 };

int64_t contest_held(int64_t n)
{
    return n >= HELD_SHARE ? n / HELD_SHARE : n >= 2;
}

bool contest_init(struct contest *c, const struct config *config, struct err *e)
{
    *c = (struct contest){ 0 };
    if (curvatures_init(&c->trial, config, true, e) &&
        moments_init(&c->held, config->n_experts, config->hidden_size, config->moe_intermediate, e))
        return true;
    contest_deinit(c);
    return false;
}

void contest_deinit(struct contest *c)
{
    curvatures_deinit(&c->trial);
    moments_deinit(&c->held);
}

/* GPTQ_ROWS rows of a matrix, spread over it, and what they were packed as. */
struct trial {
    float *rows;    /* [GPTQ_ROWS][n] */
    float *error;   /* [n] */
    float *scratch; /* gptq_pack_rows's */
    uint8_t *codes;
    e4m3 *scale;
    int64_t n;
};

static bool trial_init(struct trial *t, int64_t n)
{
    size_t floats = (size_t)n * (GPTQ_ROWS + 1 + 2 * GPTQ_ROWS);
    *t = (struct trial){ .rows = malloc(floats * sizeof(float) + (size_t)n * GPTQ_ROWS), .n = n };
    if (!t->rows) return false;
    t->error = t->rows + n * GPTQ_ROWS;
    t->scratch = t->error + n;
    t->codes = (uint8_t *)(t->scratch + 2 * n * GPTQ_ROWS);
    t->scale = (e4m3 *)(t->codes + n / 2 * GPTQ_ROWS);
    return true;
}

static void load_rows(struct trial *t, const struct matrix *m, int rows)
{
    for (int r = 0; r < rows; r++) {
        const uint8_t *from = m->data + r * (m->rows / rows) * m->cols * 2;
        for (int64_t i = 0; i < t->n; i++) {
            uint16_t bits;
            memcpy(&bits, from + 2 * i, 2);
            t->rows[r * t->n + i] = bf16_to_f32((bf16){ bits });
        }
    }
}

/* error H error^T, of H's upper triangle. */
static double loss_of(const float *error, const float *h, int64_t n)
{
    double total = 0;
    for (int64_t i = 0; i < n; i++) {
        const float *row = h + i * n;
        total += (double)error[i] * (2 * gptq_dot(error + i, row + i, n - i) - (double)(error[i] * row[i]));
    }
    return total;
}

static double trial_loss(struct trial *t, int rows, float global, const float *h)
{
    double total = 0;
    for (int r = 0; r < rows; r++) {
        const float *w = t->rows + r * t->n;
        nvfp4_unpack_row(t->error, t->codes + r * (t->n / 2), t->scale + r * (t->n / NVFP4_GROUP), global,
                         t->n);
        for (int64_t i = 0; i < t->n; i++) t->error[i] = w[i] - t->error[i];
        total += loss_of(t->error, h, t->n);
    }
    return total;
}

struct work {
    const struct contest *contest;
    const struct contestant *contestants;
    double (*loss)[2]; /* alone, passed on; negative: no memory */
};

static void try_matrix(void *ctx, int64_t item, int thread)
{
    struct work *w = ctx;
    const struct matrix *m = w->contestants[item].matrix;
    struct curvature c = curvatures_of(&w->contest->trial, m);
    const float *held =
        m->part == PART_DOWN ? moments_down(&w->contest->held, m->expert) : w->contest->held.block;
    float global = nvfp4_global_scale_roomy(w->contestants[item].absmax);
    int rows = m->rows < GPTQ_ROWS ? (int)m->rows : GPTQ_ROWS;
    struct trial t;
    (void)thread;
    w->loss[item][0] = w->loss[item][1] = -1;
    if (!trial_init(&t, m->cols)) return;
    load_rows(&t, m, rows);
    for (int r = 0; r < rows; r++)
        search_row(t.codes + r * (t.n / 2), t.scale + r * (t.n / NVFP4_GROUP), t.rows + r * t.n, c.importance,
                   global, t.n);
    w->loss[item][0] = w->loss[item][1] = trial_loss(&t, rows, global, held);
    if (c.factor) {
        gptq_pack_rows(t.codes, t.scale, t.rows, rows, c.factor, global, t.n, t.scratch);
        w->loss[item][1] = trial_loss(&t, rows, global, held);
    }
    free(t.rows);
}

bool contest_run(struct contest_result *out, struct contest *c, struct moments *moments,
                 const struct contestant *contestants, int64_t n, struct pool *pool, struct err *e)
{
    struct work w = { .contest = c,
                      .contestants = contestants,
                      .loss = malloc((size_t)(n ? n : 1) * sizeof *w.loss) };
    if (!w.loss) return err_memory(e, "losses of the contest", (uint64_t)n * sizeof *w.loss);
    moments_copy(&c->trial.moments, moments);
    moments_join(moments, &c->held);
    curvatures_update(&c->trial, pool);
    pool_run(pool, n, try_matrix, &w);
    double block = 0, down = 0;
    bool ok = true;
    for (int64_t i = 0; i < n; i++) {
        double gain = w.loss[i][0] - w.loss[i][1];
        ok = ok && w.loss[i][0] >= 0;
        if (contestants[i].matrix->part == PART_DOWN)
            down += gain;
        else
            block += gain;
    }
    *out = (struct contest_result){ block > 0, down > 0 };
    free(w.loss);
    return ok || err_memory(e, "rows of the contest", 0);
}
