/* Which tensors make up the network, and their life. */
#include "model/bind.h"
#include "model/mtp.h"
#include "model/rope.h"
#include "model/step.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 256 };

/* Names of one layer: at("mlp.gate") is the module's full name, valid until the next call. */
struct names {
    char text[NAME_BYTES];
    size_t stem;
};

static struct names names_of(const struct model *m, int layer)
{
    struct names n;
    bool is_mtp = layer == m->config->n_layers;
    n.stem = (size_t)snprintf(n.text, sizeof n.text, "%slayers.%d.", is_mtp ? "mtp." : m->prefix,
                              is_mtp ? 0 : layer);
    return n;
}

static const char *at(struct names *n, const char *module)
{
    snprintf(n->text + n->stem, sizeof n->text - n->stem, "%s", module);
    return n->text;
}

/* What is read with the same inputs. */
static bool join(struct model *m, int n, struct weight **list)
{
    const struct backend *b = m->backend;
    b->ops->weights_join(b->queue, list, n);
    return true;
}

static bool bind_attention(struct model *m, struct attention_weights *w, struct names n, struct err *e)
{
    const struct config *c = m->config;
    int64_t hidden = c->hidden_size, heads = c->n_heads, kv = c->n_kv_heads, dim = c->head_dim;
    return bind_linear(m, &w->q, at(&n, "self_attn.q_proj"), 2 * heads * dim, hidden, e) &&
           bind_linear(m, &w->k, at(&n, "self_attn.k_proj"), kv * dim, hidden, e) &&
           bind_linear(m, &w->v, at(&n, "self_attn.v_proj"), kv * dim, hidden, e) &&
           join(m, 3, (struct weight *[]){ w->q, w->k, w->v }) &&
           bind_linear(m, &w->o, at(&n, "self_attn.o_proj"), hidden, heads * dim, e) &&
           bind_vector(m, &w->q_norm, at(&n, "self_attn.q_norm.weight"), dim, 1, e) &&
           bind_vector(m, &w->k_norm, at(&n, "self_attn.k_norm.weight"), dim, 1, e);
}

static bool bind_delta(struct model *m, struct delta_weights *w, struct names n, struct err *e)
{
    const struct config *c = m->config;
    int64_t hidden = c->hidden_size, heads = c->linear_value_heads;
    int64_t keys = (int64_t)c->linear_key_heads * c->linear_key_dim, values = heads * c->linear_value_dim;
    return bind_linear(m, &w->qkv, at(&n, "linear_attn.in_proj_qkv"), 2 * keys + values, hidden, e) &&
           bind_linear(m, &w->z, at(&n, "linear_attn.in_proj_z"), values, hidden, e) &&
           bind_linear(m, &w->a, at(&n, "linear_attn.in_proj_a"), heads, hidden, e) &&
           bind_linear(m, &w->b, at(&n, "linear_attn.in_proj_b"), heads, hidden, e) &&
           join(m, 4, (struct weight *[]){ w->qkv, w->z, w->a, w->b }) &&
           bind_linear(m, &w->out, at(&n, "linear_attn.out_proj"), hidden, values, e) &&
           bind_conv(m, &w->conv, at(&n, "linear_attn.conv1d.weight"), 2 * keys + values, c->conv_kernel,
                     e) &&
           bind_vector(m, &w->A_log, at(&n, "linear_attn.A_log"), heads, 0, e) &&
           bind_vector(m, &w->dt_bias, at(&n, "linear_attn.dt_bias"), heads, 0, e) &&
           bind_vector(m, &w->norm, at(&n, "linear_attn.norm.weight"), c->linear_value_dim, 0, e);
}

/* Of gate and up, and of down: what inputs of any expert of the layer are scaled by. */
struct input_globals {
    float block, down;
};

static bool find_input_globals(struct input_globals *g, const struct model *m, struct names n, struct err *e)
{
    static const char *const parts[] = { "gate_proj", "up_proj", "down_proj" };
    *g = (struct input_globals){ INFINITY, INFINITY };
    for (int i = 0; i < 3 * m->config->n_experts; i++) {
        char module[64];
        snprintf(module, sizeof module, "mlp.experts.%d.%s", i / 3, parts[i % 3]);
        if (!bind_input_global(m, i % 3 == 2 ? &g->down : &g->block, at(&n, module), e)) return false;
    }
    return true;
}

static bool bind_expert_parts(struct model *m, struct experts *x, int expert, bool fused,
                              const struct input_globals *g, struct names n, struct err *e)
{
    int64_t hidden = m->config->hidden_size, inner = m->config->moe_intermediate;
    int count = x->n_experts;
    if (fused) {
        const char *name = at(&n, "mlp.experts.gate_up_proj");
        return bind_fused(m, &x->gate[expert], name, count, expert, 2 * inner, 0, inner, hidden, e) &&
               bind_fused(m, &x->up[expert], name, count, expert, 2 * inner, inner, inner, hidden, e) &&
               bind_fused(m, &x->down[expert], at(&n, "mlp.experts.down_proj"), count, expert, hidden, 0,
                          hidden, inner, e);
    }
    char module[64];
    snprintf(module, sizeof module, "mlp.experts.%d.gate_proj", expert);
    if (!bind_expert(m, &x->gate[expert], at(&n, module), g->block, inner, hidden, e)) return false;
    snprintf(module, sizeof module, "mlp.experts.%d.up_proj", expert);
    if (!bind_expert(m, &x->up[expert], at(&n, module), g->block, inner, hidden, e)) return false;
    snprintf(module, sizeof module, "mlp.experts.%d.down_proj", expert);
    return bind_expert(m, &x->down[expert], at(&n, module), g->down, hidden, inner, e);
}

static bool bind_moe(struct model *m, struct moe_weights *w, struct names n, struct err *e)
{
    const struct config *c = m->config;
    int64_t hidden = c->hidden_size, shared = c->shared_intermediate;
    struct experts *x = &w->experts;
    struct input_globals g;
    x->n_experts = c->n_experts;
    x->gate = calloc(3 * (size_t)c->n_experts, sizeof *x->gate);
    if (!x->gate) return err_memory(e, "experts", 3 * (uint64_t)c->n_experts * sizeof *x->gate);
    x->up = x->gate + c->n_experts;
    x->down = x->up + c->n_experts;
    bool fused = checkpoint_find(m->checkpoint, at(&n, "mlp.experts.gate_up_proj"));
    bool packs = m->packs;
    m->packs = false; /* small, and what is picked decides all that follows */
    bool ok = bind_linear(m, &w->router, at(&n, "mlp.gate"), c->n_experts, hidden, e) &&
              bind_linear(m, &w->shared_gate, at(&n, "mlp.shared_expert_gate"), 1, hidden, e);
    m->packs = packs;
    ok = ok && bind_linear(m, &w->gate, at(&n, "mlp.shared_expert.gate_proj"), shared, hidden, e) &&
         bind_linear(m, &w->up, at(&n, "mlp.shared_expert.up_proj"), shared, hidden, e) &&
         join(m, 2, (struct weight *[]){ w->gate, w->up }) &&
         bind_linear(m, &w->down, at(&n, "mlp.shared_expert.down_proj"), hidden, shared, e) &&
         find_input_globals(&g, m, n, e);
    ok = ok && bind_later(m, e);
    for (int i = 0; ok && i < c->n_experts; i++) ok = bind_expert_parts(m, x, i, fused, &g, n, e);
    return bind_now(m, ok, e) && m->backend->ops->experts_bind(m->backend->queue, x, e);
}

bool model_bind_layer(struct model *m, int layer, struct err *e)
{
    struct layer *l = &m->layers[layer];
    struct names n = names_of(m, layer);
    l->kind = layer_kind_of(m, layer);
    return bind_vector(m, &l->input_norm, at(&n, "input_layernorm.weight"), m->config->hidden_size, 1, e) &&
           bind_vector(m, &l->post_norm, at(&n, "post_attention_layernorm.weight"), m->config->hidden_size, 1,
                       e) &&
           (l->kind == LAYER_FULL_ATTENTION ? bind_attention(m, &l->attention, n, e)
                                            : bind_delta(m, &l->delta, n, e)) &&
           bind_moe(m, &l->moe, n, e);
}

void model_free_layer(struct model *m, int layer)
{
    const struct ops *op = m->backend->ops;
    struct queue *q = m->backend->queue;
    struct layer *l = &m->layers[layer];
    struct weight *weights[] = { l->attention.q, l->attention.k, l->attention.v,     l->attention.o,
                                 l->delta.qkv,   l->delta.z,     l->delta.a,         l->delta.b,
                                 l->delta.out,   l->moe.router,  l->moe.shared_gate, l->moe.gate,
                                 l->moe.up,      l->moe.down };
    float *vectors[] = { l->input_norm, l->post_norm,   l->attention.q_norm, l->attention.k_norm,
                         l->delta.conv, l->delta.A_log, l->delta.dt_bias,    l->delta.norm };
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) op->weight_free(q, weights[i]);
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) op->memory_free(q, vectors[i]);
    op->experts_unbind(q, &l->moe.experts);
    for (int i = 0; l->moe.experts.gate && i < 3 * l->moe.experts.n_experts; i++)
        op->weight_free(q, l->moe.experts.gate[i]);
    free(l->moe.experts.gate);
    *l = (struct layer){ 0 };
}

/* Which position axis each frequency follows: T H W T H W ..., height while j < 3 * section[1], width
 * likewise, time elsewhere (interleaved multi-axis rotary positions). */
static bool make_rope(struct model *m, struct err *e)
{
    const struct config *c = m->config;
    int n = c->rotary_dim / 2;
    float *inverse = malloc((size_t)n * sizeof *inverse + 1);
    uint8_t *axis = malloc((size_t)n + 1);
    bool ok = (inverse && axis) || err_memory(e, "rotary frequencies", (uint64_t)n * 5);
    struct backend *b = m->backend;
    void *memory[2] = { 0 };
    if (ok) rope_inverse(inverse, c);
    for (int j = 0; ok && j < n; j++)
        axis[j] = j % 3 > 0 && j < 3 * c->mrope_section[j % 3] ? (uint8_t)(j % 3) : 0;
    ok = ok && b->ops->memory_create(b->queue, &memory[0], (uint64_t)n * sizeof *inverse, e) &&
         b->ops->memory_create(b->queue, &memory[1], (uint64_t)n, e);
    m->rope_inverse = memory[0];
    m->rope_axis = memory[1];
    if (ok) {
        b->ops->upload(b->queue, memory[0], inverse, (uint64_t)n * sizeof *inverse);
        b->ops->upload(b->queue, memory[1], axis, (uint64_t)n);
        m->rope = (struct rope){ n, rope_scale(c), m->rope_inverse, m->rope_axis };
    }
    free(inverse);
    free(axis);
    return ok;
}

static bool bind_ends(struct model *m, struct err *e)
{
    const struct config *c = m->config;
    char embed[NAME_BYTES], norm[NAME_BYTES];
    snprintf(embed, sizeof embed, "%sembed_tokens.weight", m->prefix);
    snprintf(norm, sizeof norm, "%snorm.weight", m->prefix);
    return bind_table(m, &m->embed, embed, c->vocab_size, c->hidden_size, e) &&
           bind_vector(m, &m->final_norm, norm, c->hidden_size, 1, e);
}

static bool bind_head(struct model *m, struct err *e)
{
    const struct config *c = m->config;
    if (!c->tie_word_embeddings) return bind_linear(m, &m->head, "lm_head", c->vocab_size, c->hidden_size, e);
    char name[NAME_BYTES];
    snprintf(name, sizeof name, "%sembed_tokens.weight", m->prefix);
    return bind_plain(m, &m->head, name, c->vocab_size, c->hidden_size, e);
}

bool model_init(struct model *m, const struct checkpoint *c, struct backend *b, const struct report *report,
                struct err *e)
{
    *m = (struct model){ .checkpoint = c, .config = &c->config, .backend = b, .report = report };
    m->prefix =
        checkpoint_find(c, "model.language_model.embed_tokens.weight") ? "model.language_model." : "model.";
    m->delta_shape =
        (struct delta_shape){ c->config.linear_key_heads, c->config.linear_value_heads,
                              c->config.linear_key_dim, c->config.linear_value_dim, c->config.conv_kernel };
    m->layers = calloc((size_t)c->config.n_layers + 1, sizeof *m->layers);
    bool ok = m->layers || err_memory(e, "layers", (uint64_t)c->config.n_layers * sizeof *m->layers);
    if (ok && c->config.conv_kernel > CONV_KERNEL_MAX)
        ok = err_set(e, ERR_UNSUPPORTED, "linear_conv_kernel_dim is %d, at most %d is supported",
                     c->config.conv_kernel, CONV_KERNEL_MAX);
    if (ok && make_rope(m, e) && bind_ends(m, e)) return true;
    model_deinit(m);
    return err_note(e, "%s", c->path);
}

bool model_bind_all(struct model *m, struct err *e)
{
    int n = m->config->n_layers;
    for (int i = 0; i < n; i++) {
        if (!model_bind_layer(m, i, e)) return err_note(e, "%s", m->checkpoint->path);
        report_progress(m->report, "load", (uint64_t)i, (uint64_t)n);
    }
    if (!bind_head(m, e)) return err_note(e, "%s", m->checkpoint->path);
    m->backend->ops->weight_coarsen(m->backend->queue, m->head);
    report_progress(m->report, "load", (uint64_t)n, (uint64_t)n);
    return true;
}

void model_deinit(struct model *m)
{
    if (!m->backend) return;
    const struct ops *op = m->backend->ops;
    struct queue *q = m->backend->queue;
    for (int i = 0; m->layers && i <= m->config->n_layers; i++) model_free_layer(m, i);
    free(m->layers);
    mtp_deinit(&m->mtp, m->backend);
    op->weight_free(q, m->embed);
    op->weight_free(q, m->head);
    op->memory_free(q, m->final_norm);
    op->memory_free(q, m->rope_inverse);
    op->memory_free(q, m->rope_axis);
    *m = (struct model){ 0 };
}
