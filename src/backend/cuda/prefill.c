/* Steps of many rows: their scratch, and the fused runs as a few launches each. */
#include "backend/cuda/prefill.h"
#include "backend/cuda/batch.h"
#include "base/arena.h"

/* SCAN_BYTES: of a row and channel, scan.cu */
enum { BF16_BYTES = 2, UNIT = 64, SCAN_BYTES = 8 };

static int64_t whole(int64_t n)
{
    return (n + UNIT - 1) / UNIT * UNIT;
}

void cuda_prefill_layout(struct queue *q, struct arena *a)
{
    struct cuda_prefill *p = &q->prefill;
    const struct step_limits *l = &q->limits;
    uint64_t parts = q->rounded ? 1 : EXACT_PARTS;
    p->known = NULL;
    p->rows = l->rows;
    p->cols = whole(l->cols);
    p->picked = p->rows * l->picks;
    p->intermediate = whole(l->intermediate);
    p->width = l->hidden ? l->hidden : l->cols;
    p->inputs = arena_take(a, p->rows * p->cols, parts * BF16_BYTES, 64);
    p->straight = q->rounded ? arena_take(a, p->rows * p->cols, BF16_BYTES, 64) : NULL;
    p->codes = q->blas ? arena_take(a, p->rows * p->cols, 1, 64) : NULL;
    p->quantized = arena_take(a, p->rows * p->cols, BF16_BYTES, 64);
    p->scale = arena_take(a, p->picked + p->rows, sizeof *p->scale, 64);
    p->hidden = arena_take(a, p->picked * p->intermediate, parts * BF16_BYTES, 64);
    /* or what the scan of spans takes, and a copy of the cache; spans of whole chunks together may have a
     * chunk more rows than the step */
    int64_t scan = (p->rows + DELTA_CHUNK) * l->cols * SCAN_BYTES;
    q->room = p->picked * p->width * (int64_t)sizeof *p->down;
    if (q->room < scan) q->room = scan;
    p->down = arena_take(a, q->room, 1, 64);
    p->slot_row = arena_take(a, p->picked, sizeof *p->slot_row, 64);
    p->slot_of = arena_take(a, p->picked, sizeof *p->slot_of, 64);
    p->tiles = arena_take(a, p->picked + l->n_experts + 1, 4 * sizeof *p->tiles, 64);
    p->counts = arena_take(a, 2 * EXPERTS_MAX, sizeof *p->counts, 64);
}

/* Whether cuda_moe_many will do it, without h. */
static bool knows(const struct queue *q, const struct moe_run *r)
{
    struct cuda_products out = { .x = r->gate, .n = 1, .m = { cuda_matrix_of(r->w_down) } };
    bool many = queue_prompts(q) || r->h.rows > ROWS_BATCH;
    return many && out.m[0].input == INPUT_FP8_ROW && cuda_dense_takes(q, &out) && cuda_grouped_knows(q, r);
}

bool cuda_norm_products_many(struct queue *q, const struct norm_products *r)
{
    struct cuda_products p = { .x = r->x, .gain = r->gain, .eps = r->eps, .n = r->n };
    if (!r->lean) p.h = r->h;
    p.unread = r->reader && knows(q, r->reader);
    p.choice = p.unread && !q->recording;
    for (int i = 0; i < r->n; i++) {
        p.out[i] = r->out[i];
        p.m[i] = cuda_matrix_of(r->w[i]);
    }
    return cuda_dense(q, &p);
}

void cuda_delta_many(struct queue *q, const struct delta_run *r, const struct step_rows *rows)
{
    struct cuda_products out = { .x = r->raw,
                                 .up = r->z,
                                 .add = r->x,
                                 .gain = r->gain,
                                 .eps = r->eps,
                                 .head = r->shape->value_dim,
                                 .lean = r->lean,
                                 .n = 1,
                                 .out = { r->y },
                                 .m = { cuda_matrix_of(r->out) } };
    const struct cuda_rows *device_rows = queue_rows(q, rows);
    if (!device_rows) return;
    if (!r->lean) out.h = r->o;
    bool logs = queue_logs(rows);
    enum delta_done done = DELTA_TO_ADVANCE;
    if (!logs && !rows->prompts && rows->n_spans == rows->n) done = cuda_batch_delta(q, r, device_rows);
    bool decoded = logs ? cuda_delta_run_logged(q, r, device_rows) : done != DELTA_TO_ADVANCE;
    /* by nothing but cuda_dense */
    bool narrow = r->raw.stride % 2 == 0 && (uintptr_t)r->raw.data % 8 == 0 &&
                  (rows->prompts || r->x.rows > ROWS_BATCH) && cuda_dense_takes(q, &out);
    bool scanned = !decoded && !logs && cuda_scan(q, r, rows, narrow);
    out.narrow = scanned && narrow;
    if (!decoded && !scanned) {
        cuda_ops.conv(q, r->conv, r->u, r->conv_weight, r->state, r->shape, rows);
        cuda_ops.delta(q, r->raw, r->conv, r->a, r->b, r->A_log, r->dt_bias, r->state, r->shape, rows);
    }
    if (done == DELTA_TO_ADVANCE) done = DELTA_RAW; /* by the others */
    if ((!rows->prompts && cuda_batch_delta_out(q, r, device_rows, done)) || cuda_dense(q, &out)) return;
    if (queue_few(q, r->x.rows) && r->shape->value_dim <= 128 && cuda_streams(q, &out.m[0])) {
        cuda_delta_out(q, r, device_rows, false);
        return;
    }
    cuda_ops.gated_norm(q, r->o, r->raw, r->z, r->gain, r->shape->value_dim, r->eps);
    cuda_ops.matmul(q, r->y, r->o, r->out);
    cuda_ops.add(q, r->x, r->y);
}

static void attend(struct queue *q, const struct attention_run *r, const struct step_rows *step)
{
    int dim = r->kv->head_dim;
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return;
    if (step->n_spans == step->n && step->n <= ROWS_BATCH && !step->prompts) {
        cuda_attention_decode(q, r, rows);
        return;
    }
    if (queue_few(q, step->n)) {
        cuda_attention_rows(q, r, rows);
        return;
    }
    cuda_ops.norm_rope(q, r->qg, r->n_heads, 2 * dim, dim, r->q_gain, r->eps, r->rope, step);
    cuda_attention_append(q, r, rows);
    if (!cuda_flash(q, r->att, r->qg, r->n_heads, r->kv, step))
        cuda_ops.attention(q, r->att, r->qg, r->n_heads, r->kv, step);
}

void cuda_attention_many(struct queue *q, const struct attention_run *r, const struct step_rows *rows)
{
    attend(q, r, rows);
    if (!rows->prompts && cuda_batch_attention_out(q, r)) return;
    struct cuda_products o = {
        .x = r->att, .add = r->x, .lean = r->lean, .n = 1, .out = { r->y }, .m = { cuda_matrix_of(r->o) }
    };
    if (cuda_dense(q, &o)) return;
    if (queue_few(q, r->x.rows) && cuda_streams(q, &o.m[0])) {
        cuda_attention_out(q, r);
        return;
    }
    cuda_ops.matmul(q, r->y, r->att, r->o);
    cuda_ops.add(q, r->x, r->y);
}

bool cuda_moe_many(struct queue *q, const struct moe_run *r)
{
    if (queue_few(q, r->h.rows)) return false;
    struct cuda_products out = {
        .x = r->gate, .up = r->up, .n = 1, .out = { r->shared }, .m = { cuda_matrix_of(r->w_down) }
    };
    if (!r->lean) out.h = r->hidden;
    if (q->forked) queue_other(q);
    cuda_ops.route(q, r->picks, r->logits);
    if (q->forked) queue_other(q);
    bool done = cuda_dense(q, &out) && cuda_grouped(q, r->y, r->h, r->picks, r->experts->bound, r);
    queue_join(q);
    return done;
}
