/* The three parts of a layer: gated attention, Gated DeltaNet, mixture of experts. Each norms x into s->h,
 * leaves its result in s->y and adds it to x. Source: the released model's definition (docs/numerics.md names
 * the equations). */
#include "model/step.h"

void step_attention(struct step *s, int layer, struct mat x, const struct step_rows *rows,
                    const struct kv_cache *kv)
{
    const struct config *c = s->model->config;
    const struct layer *l = &s->model->layers[layer];
    const struct attention_weights *w = &l->attention;
    int64_t n = x.rows;
    float eps = (float)c->rms_norm_eps;
    struct attention_run r = { .x = x,
                               .y = mat_rows(s->y, n),
                               .qg = mat_rows(s->qg, n),
                               .k = mat_rows(s->k, n),
                               .v = mat_rows(s->v, n),
                               .att = mat_rows(s->att, n),
                               .n_heads = c->n_heads,
                               .q_gain = w->q_norm,
                               .k_gain = w->k_norm,
                               .eps = eps,
                               .rope = &s->model->rope,
                               .kv = kv,
                               .o = w->o,
                               .lean = !s->tap.call };
    struct norm_products in = {
        mat_rows(s->h, n), x, l->input_norm, eps, 3, { r.qg, r.k, r.v }, { w->q, w->k, w->v }, .lean = r.lean
    };
    s->op->norm_products(s->q, &in);
    step_tap(s, "mixer.in", layer, in.h);
    s->op->attention_run(s->q, &r, rows);
    step_tap(s, "attention.out", layer, r.att);
}

void step_delta(struct step *s, int layer, struct mat x, const struct step_rows *rows,
                const struct delta_state *state)
{
    const struct layer *l = &s->model->layers[layer];
    const struct delta_weights *w = &l->delta;
    int64_t n = x.rows;
    float eps = (float)s->model->config->rms_norm_eps;
    struct delta_run r = { .x = x,
                           .y = mat_rows(s->y, n),
                           .u = mat_rows(s->u, n),
                           .conv = mat_rows(s->conv, n),
                           .z = mat_rows(s->z, n),
                           .a = mat_rows(s->a, n),
                           .b = mat_rows(s->b, n),
                           .raw = mat_rows(s->raw, n),
                           .o = mat_rows(s->o, n),
                           .conv_weight = w->conv,
                           .A_log = w->A_log,
                           .dt_bias = w->dt_bias,
                           .gain = w->norm,
                           .eps = eps,
                           .out = w->out,
                           .state = state,
                           .shape = &s->model->delta_shape,
                           .lean = !s->tap.call };
    struct norm_products in = { mat_rows(s->h, n),
                                x,
                                l->input_norm,
                                eps,
                                4,
                                { r.u, r.z, r.a, r.b },
                                { w->qkv, w->z, w->a, w->b },
                                .lean = r.lean,
                                .mixer = r.lean ? &r : NULL };
    s->op->norm_products(s->q, &in);
    step_tap(s, "mixer.in", layer, in.h);
    s->op->delta_run(s->q, &r, rows);
    step_tap(s, "delta.out", layer, r.o);
}

void step_moe(struct step *s, int layer, struct mat x)
{
    const struct layer *l = &s->model->layers[layer];
    const struct moe_weights *w = &l->moe;
    int64_t n = x.rows;
    struct moe_run r = { .x = x,
                         .y = mat_rows(s->y, n),
                         .h = mat_rows(s->h, n),
                         .logits = mat_rows(s->router, n),
                         .gate = mat_rows(s->gate, n),
                         .up = mat_rows(s->up, n),
                         .hidden = mat_rows(s->hidden, n),
                         .shared = mat_rows(s->shared, n),
                         .shared_gate = mat_rows(s->shared_gate, n),
                         .picks = &s->picks,
                         .experts = &w->experts,
                         .w_down = w->down,
                         .lean = !s->tap.call };
    struct norm_products in = { r.h,
                                x,
                                l->post_norm,
                                (float)s->model->config->rms_norm_eps,
                                4,
                                { r.logits, r.shared_gate, r.gate, r.up },
                                { w->router, w->shared_gate, w->gate, w->up },
                                .reader = r.lean ? &r : NULL };
    s->op->norm_products(s->q, &in);
    step_tap(s, "moe.in", layer, in.h);
    s->op->moe_run(s->q, &r);
    step_tap(s, "shared.hidden", layer, r.hidden);
}
