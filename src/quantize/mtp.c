/* Source of names and shapes: the released checkpoint (docs/formats.md); its layers are full attention. */
#include "quantize/mtp.h"
#include "quantize/modules.h"
#include <stdio.h>
#include <string.h>

/* Dimensions by what they are called in config.json. */
enum size { NONE, HIDDEN, HIDDEN_2, HEAD, QUERIES, QUERIES_2, KEYS, EXPERTS, INNER, INNER_2, SHARED, ONE };

struct row {
    const char *name;
    enum size size[3];
};

static const struct row once[] = {
    { "fc.weight", { HIDDEN, HIDDEN_2 } },
    { "norm.weight", { HIDDEN } },
    { "pre_fc_norm_embedding.weight", { HIDDEN } },
    { "pre_fc_norm_hidden.weight", { HIDDEN } },
};

static const struct row per_layer[] = {
    { "input_layernorm.weight", { HIDDEN } },
    { "post_attention_layernorm.weight", { HIDDEN } },
    { "self_attn.q_proj.weight", { QUERIES_2, HIDDEN } },
    { "self_attn.k_proj.weight", { KEYS, HIDDEN } },
    { "self_attn.v_proj.weight", { KEYS, HIDDEN } },
    { "self_attn.o_proj.weight", { HIDDEN, QUERIES } },
    { "self_attn.q_norm.weight", { HEAD } },
    { "self_attn.k_norm.weight", { HEAD } },
    { "mlp.gate.weight", { EXPERTS, HIDDEN } },
    { "mlp.experts.gate_up_proj", { EXPERTS, INNER_2, HIDDEN } },
    { "mlp.experts.down_proj", { EXPERTS, HIDDEN, INNER } },
    { "mlp.shared_expert.gate_proj.weight", { SHARED, HIDDEN } },
    { "mlp.shared_expert.up_proj.weight", { SHARED, HIDDEN } },
    { "mlp.shared_expert.down_proj.weight", { HIDDEN, SHARED } },
    { "mlp.shared_expert_gate.weight", { ONE, HIDDEN } },
};

static int64_t size_of(const struct config *c, enum size s)
{
    switch (s) {
    case HIDDEN: return c->hidden_size;
    case HIDDEN_2: return 2 * c->hidden_size;
    case HEAD: return c->head_dim;
    case QUERIES: return (int64_t)c->n_heads * c->head_dim;
    case QUERIES_2: return 2 * (int64_t)c->n_heads * c->head_dim;
    case KEYS: return (int64_t)c->n_kv_heads * c->head_dim;
    case EXPERTS: return c->n_experts;
    case INNER: return c->moe_intermediate;
    case INNER_2: return 2 * c->moe_intermediate;
    case SHARED: return c->shared_intermediate;
    case ONE: return 1;
    default: return 0;
    }
}

static void fill(struct mtp_tensor *t, const struct config *c, const struct row *r)
{
    t->n_dims = 0;
    while (t->n_dims < 3 && r->size[t->n_dims] != NONE) {
        t->shape[t->n_dims] = size_of(c, r->size[t->n_dims]);
        t->n_dims++;
    }
    t->is_fused = t->n_dims == 3;
}

bool mtp_is_name(const char *tensor)
{
    return strncmp(tensor, "mtp.", 4) == 0;
}

size_t mtp_count(const struct checkpoint *c)
{
    size_t n = 0;
    for (size_t i = 0; i < c->n_tensors; i++) n += mtp_is_name(c->tensors[i]->name);
    return n;
}

bool mtp_visit(const struct config *c, bool (*visit)(void *ctx, const struct mtp_tensor *t), void *ctx)
{
    struct mtp_tensor t;
    if (c->mtp_layers == 0) return true;
    for (size_t i = 0; i < sizeof once / sizeof *once; i++) {
        fill(&t, c, &once[i]);
        snprintf(t.name, sizeof t.name, "mtp.%s", once[i].name);
        if (!visit(ctx, &t)) return false;
    }
    for (int layer = 0; layer < c->mtp_layers; layer++)
        for (size_t i = 0; i < sizeof per_layer / sizeof *per_layer; i++) {
            fill(&t, c, &per_layer[i]);
            snprintf(t.name, sizeof t.name, "mtp.layers.%d.%s", layer, per_layer[i].name);
            if (!visit(ctx, &t)) return false;
        }
    return true;
}

static bool has_either(const struct checkpoint *c, const char *stem, int bytes)
{
    char name[256];
    snprintf(name, sizeof name, "%.*s.weight", bytes, stem);
    if (checkpoint_find(c, name)) return true;
    snprintf(name, sizeof name, "%.*s.weight_packed", bytes, stem);
    return checkpoint_find(c, name);
}

static bool has_experts(const struct checkpoint *c, const char *fused)
{
    size_t stem;
    bool gate_up;
    char module[256];
    module_is_fused(fused, &stem, &gate_up);
    for (int i = 0; i < c->config.n_experts; i++)
        for (int part = gate_up ? PART_GATE : PART_DOWN; part <= (gate_up ? PART_UP : PART_DOWN); part++) {
            int n =
                snprintf(module, sizeof module, "%.*s.%d.%s", (int)stem, fused, i, expert_part_name[part]);
            if (!has_either(c, module, n)) return false;
        }
    return true;
}

bool mtp_has(const struct checkpoint *c, const struct mtp_tensor *t)
{
    if (checkpoint_find(c, t->name)) return true;
    if (t->is_fused) return has_experts(c, t->name);
    return has_either(c, t->name, (int)(strlen(t->name) - strlen(".weight")));
}

/* Stored as it is, and quantized in the eyes of a reader. */
static bool is_uncovered(char out[128], const struct checkpoint *c, const char *tensor)
{
    size_t stem, n = strlen(tensor), end = strlen(".weight");
    bool gate_up;
    if (module_is_fused(tensor, &stem, &gate_up))
        snprintf(out, 128, "%.*s.0.%s", (int)(stem < 100 ? stem : 100), tensor,
                 gate_up ? "gate_proj" : "down_proj");
    else if (n > end && n - end < 128 && strcmp(tensor + n - end, ".weight") == 0)
        snprintf(out, 128, "%.*s", (int)(n - end), tensor);
    else
        return false;
    return quantization_scheme(c->quantization, out, "Linear") != SCHEME_NONE;
}

bool mtp_uncovered(char out[128], const struct checkpoint *c)
{
    for (size_t i = 0; i < c->n_tensors; i++) {
        const struct tensor *t = c->tensors[i];
        if (mtp_is_name(t->name) && t->n_dims >= 2 && t->dtype != DTYPE_F8_E4M3 && t->dtype != DTYPE_U8 &&
            is_uncovered(out, c, t->name))
            return true;
    }
    return false;
}
