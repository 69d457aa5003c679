/* The three parts of a layer: gated attention, Gated DeltaNet, mixture of experts. Each reads s->h and leaves
 * its result in s->y. Source: the released model's definition (docs/numerics.md names the equations). */
#include "model/step.h"

void step_attention(struct step *s, int layer, const struct step_rows *rows, const struct kv_cache *kv)
{
    const struct config *c = s->model->config;
    const struct attention_weights *w = &s->model->layers[layer].attention;
    const struct ops *op = s->op;
    struct queue *q = s->q;
    int64_t n = rows->n;
    struct mat h = mat_rows(s->h, n), qg = mat_rows(s->qg, n), k = mat_rows(s->k, n), v = mat_rows(s->v, n);
    float eps = (float)c->rms_norm_eps;
    op->matmul(q, qg, h, w->q);
    op->matmul(q, k, h, w->k);
    op->matmul(q, v, h, w->v);
    op->norm_rope(q, qg, c->n_heads, 2 * c->head_dim, c->head_dim, w->q_norm, eps, &s->model->rope, rows);
    op->norm_rope(q, k, c->n_kv_heads, c->head_dim, c->head_dim, w->k_norm, eps, &s->model->rope, rows);
    op->kv_append(q, kv, k, v, rows);
    op->attention(q, mat_rows(s->att, n), qg, c->n_heads, kv, rows);
    step_tap(s, "attention.out", layer, mat_rows(s->att, n));
    op->matmul(q, mat_rows(s->y, n), mat_rows(s->att, n), w->o);
}

void step_delta(struct step *s, int layer, const struct step_rows *rows, const struct delta_state *state)
{
    const struct delta_weights *w = &s->model->layers[layer].delta;
    const struct delta_shape *shape = &s->model->delta_shape;
    const struct ops *op = s->op;
    struct queue *q = s->q;
    int64_t n = rows->n;
    struct mat h = mat_rows(s->h, n), u = mat_rows(s->u, n), z = mat_rows(s->z, n), a = mat_rows(s->a, n);
    struct mat b = mat_rows(s->b, n), conv = mat_rows(s->conv, n), o = mat_rows(s->o, n);
    op->matmul(q, u, h, w->qkv);
    op->matmul(q, z, h, w->z);
    op->matmul(q, a, h, w->a);
    op->matmul(q, b, h, w->b);
    op->conv(q, conv, u, w->conv, state, shape, rows);
    op->delta(q, o, conv, a, b, w->A_log, w->dt_bias, state, shape, rows);
    op->gated_norm(q, o, o, z, w->norm, shape->value_dim, (float)s->model->config->rms_norm_eps);
    step_tap(s, "delta.out", layer, o);
    op->matmul(q, mat_rows(s->y, n), o, w->out);
}

void step_moe(struct step *s, int layer, int64_t n)
{
    const struct moe_weights *w = &s->model->layers[layer].moe;
    const struct ops *op = s->op;
    struct queue *q = s->q;
    struct mat h = mat_rows(s->h, n), y = mat_rows(s->y, n), gate = mat_rows(s->gate, n),
               up = mat_rows(s->up, n);
    op->matmul(q, mat_rows(s->router, n), h, w->router);
    op->route(q, &s->picks, mat_rows(s->router, n));
    op->experts(q, y, h, &s->picks, &w->experts);
    op->matmul(q, gate, h, w->gate);
    op->matmul(q, up, h, w->up);
    op->silu_mul(q, gate, gate, up);
    step_tap(s, "shared.hidden", layer, gate);
    op->matmul(q, mat_rows(s->shared, n), gate, w->down);
    op->matmul(q, mat_rows(s->shared_gate, n), h, w->shared_gate);
    op->add_gated(q, y, mat_rows(s->shared, n), mat_rows(s->shared_gate, n));
}
