#include "backend/fused.h"
#include <stddef.h>

bool fused_weights(const struct ops *op, struct queue *q, struct weight **out,
                   const struct weight_source *src, int n, int *failed, struct err *e)
{
    for (int i = 0; i < n; i++) out[i] = NULL;
    for (int i = 0; i < n; i++) {
        *failed = i;
        if (op->weight_create(q, &out[i], &src[i], e)) continue;
        for (int k = 0; k < i; k++) {
            op->weight_free(q, out[k]);
            out[k] = NULL;
        }
        return false;
    }
    return true;
}

void fused_draw_product(const struct ops *op, struct queue *q, int32_t *out, struct mat y, struct mat x,
                        const struct weight *w, const uint32_t *allowed, const struct draw *draws)
{
    op->matmul(q, y, x, w);
    op->draw(q, out, y, allowed, draws);
}

void fused_norm_products(const struct ops *op, struct queue *q, const struct norm_products *r)
{
    op->rmsnorm(q, r->h, r->x, r->gain, r->eps);
    for (int i = 0; i < r->n; i++) op->matmul(q, r->out[i], r->h, r->w[i]);
}

void fused_delta(const struct ops *op, struct queue *q, const struct delta_run *r,
                 const struct step_rows *rows)
{
    op->conv(q, r->conv, r->u, r->conv_weight, r->state, r->shape, rows);
    op->delta(q, r->raw, r->conv, r->a, r->b, r->A_log, r->dt_bias, r->state, r->shape, rows);
    op->gated_norm(q, r->o, r->raw, r->z, r->gain, r->shape->value_dim, r->eps);
    op->matmul(q, r->y, r->o, r->out);
    op->add(q, r->x, r->y);
}

void fused_attention(const struct ops *op, struct queue *q, const struct attention_run *r,
                     const struct step_rows *rows)
{
    int dim = r->kv->head_dim;
    op->norm_rope(q, r->qg, r->n_heads, 2 * dim, dim, r->q_gain, r->eps, r->rope, rows);
    op->norm_rope(q, r->k, r->kv->n_kv_heads, dim, dim, r->k_gain, r->eps, r->rope, rows);
    op->kv_append(q, r->kv, r->k, r->v, rows);
    op->attention(q, r->att, r->qg, r->n_heads, r->kv, rows);
    op->matmul(q, r->y, r->att, r->o);
    op->add(q, r->x, r->y);
}

void fused_moe(const struct ops *op, struct queue *q, const struct moe_run *r)
{
    op->route(q, r->picks, r->logits);
    op->experts(q, r->y, r->h, r->picks, r->experts);
    op->silu_mul(q, r->hidden, r->gate, r->up);
    op->matmul(q, r->shared, r->hidden, r->w_down);
    op->add_gated(q, r->y, r->shared, r->shared_gate);
    op->add(q, r->x, r->y);
}

void fused_observe(const struct ops *op, struct queue *q, const struct observation *o, struct mat x,
                   const struct experts *experts)
{
    struct mat gate = o->gate, up = o->up;
    gate.rows = up.rows = x.rows;
    gate.cols = up.cols = experts->gate[0]->rows;
    if (o->block) op->moments(q, o->block, x);
    for (int i = 0; i < experts->n_experts; i++) {
        op->matmul(q, gate, x, experts->gate[i]);
        op->matmul(q, up, x, experts->up[i]);
        op->silu_mul(q, gate, gate, up);
        op->absmax(q, o->top + i, gate);
        if (o->down) op->moments(q, o->down + i * gate.cols * gate.cols, gate);
    }
}
