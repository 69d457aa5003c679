#include "quantize/synth_shapes.h"
#include "quantize/mtp.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Dimensions by what they are in config.json. */
enum size {
    NONE,
    ONE,
    VOCAB,
    HIDDEN,
    HEAD,
    QUERIES,
    QUERIES_2,
    KEYS,
    EXPERTS,
    INNER,
    INNER_2,
    SHARED,
    CHANNELS,
    KERNEL,
    VALUES,
    VALUE_HEADS,
    VALUE_DIM,
    V_HIDDEN,
    V_HIDDEN_3,
    V_INNER,
    V_MERGED,
    V_OUT,
    V_POSITIONS,
    V_CHANNELS,
    V_TIME,
    V_PATCH,
    N_SIZES
};

struct row {
    const char *name;
    enum size size[5];
};

static const struct row text_once[] = {
    { "embed_tokens.weight", { VOCAB, HIDDEN } },
    { "norm.weight", { HIDDEN } },
    { 0 },
};
static const struct row text_layer[] = {
    { "input_layernorm.weight", { HIDDEN } },
    { "post_attention_layernorm.weight", { HIDDEN } },
    { "mlp.gate.weight", { EXPERTS, HIDDEN } },
    { "mlp.experts.gate_up_proj", { EXPERTS, INNER_2, HIDDEN } },
    { "mlp.experts.down_proj", { EXPERTS, HIDDEN, INNER } },
    { "mlp.shared_expert.gate_proj.weight", { SHARED, HIDDEN } },
    { "mlp.shared_expert.up_proj.weight", { SHARED, HIDDEN } },
    { "mlp.shared_expert.down_proj.weight", { HIDDEN, SHARED } },
    { "mlp.shared_expert_gate.weight", { ONE, HIDDEN } },
    { 0 },
};
static const struct row linear_layer[] = {
    { "linear_attn.in_proj_qkv.weight", { CHANNELS, HIDDEN } },
    { "linear_attn.in_proj_z.weight", { VALUES, HIDDEN } },
    { "linear_attn.in_proj_b.weight", { VALUE_HEADS, HIDDEN } },
    { "linear_attn.in_proj_a.weight", { VALUE_HEADS, HIDDEN } },
    { "linear_attn.conv1d.weight", { CHANNELS, ONE, KERNEL } },
    { "linear_attn.A_log", { VALUE_HEADS } },
    { "linear_attn.dt_bias", { VALUE_HEADS } },
    { "linear_attn.norm.weight", { VALUE_DIM } },
    { "linear_attn.out_proj.weight", { HIDDEN, VALUES } },
    { 0 },
};
static const struct row full_layer[] = {
    { "self_attn.q_proj.weight", { QUERIES_2, HIDDEN } },
    { "self_attn.k_proj.weight", { KEYS, HIDDEN } },
    { "self_attn.v_proj.weight", { KEYS, HIDDEN } },
    { "self_attn.o_proj.weight", { HIDDEN, QUERIES } },
    { "self_attn.q_norm.weight", { HEAD } },
    { "self_attn.k_norm.weight", { HEAD } },
    { 0 },
};
static const struct row lm_head[] = { { "lm_head.weight", { VOCAB, HIDDEN } }, { 0 } };
static const struct row vision_once[] = {
    { "patch_embed.proj.weight", { V_HIDDEN, V_CHANNELS, V_TIME, V_PATCH, V_PATCH } },
    { "patch_embed.proj.bias", { V_HIDDEN } },
    { "pos_embed.weight", { V_POSITIONS, V_HIDDEN } },
    { "merger.norm.weight", { V_HIDDEN } },
    { "merger.norm.bias", { V_HIDDEN } },
    { "merger.linear_fc1.weight", { V_MERGED, V_MERGED } },
    { "merger.linear_fc1.bias", { V_MERGED } },
    { "merger.linear_fc2.weight", { V_OUT, V_MERGED } },
    { "merger.linear_fc2.bias", { V_OUT } },
    { 0 },
};
static const struct row vision_block[] = {
    { "norm1.weight", { V_HIDDEN } },
    { "norm1.bias", { V_HIDDEN } },
    { "norm2.weight", { V_HIDDEN } },
    { "norm2.bias", { V_HIDDEN } },
    { "attn.qkv.weight", { V_HIDDEN_3, V_HIDDEN } },
    { "attn.qkv.bias", { V_HIDDEN_3 } },
    { "attn.proj.weight", { V_HIDDEN, V_HIDDEN } },
    { "attn.proj.bias", { V_HIDDEN } },
    { "mlp.linear_fc1.weight", { V_INNER, V_HIDDEN } },
    { "mlp.linear_fc1.bias", { V_INNER } },
    { "mlp.linear_fc2.weight", { V_HIDDEN, V_INNER } },
    { "mlp.linear_fc2.bias", { V_HIDDEN } },
    { 0 },
};

static void take_sizes(int64_t size[N_SIZES], const struct config *c)
{
    int64_t values = (int64_t)c->linear_value_heads * c->linear_value_dim;
    const int64_t all[N_SIZES] = {
        [ONE] = 1,
        [VOCAB] = c->vocab_size,
        [HIDDEN] = c->hidden_size,
        [HEAD] = c->head_dim,
        [QUERIES] = (int64_t)c->n_heads * c->head_dim,
        [QUERIES_2] = 2 * (int64_t)c->n_heads * c->head_dim,
        [KEYS] = (int64_t)c->n_kv_heads * c->head_dim,
        [EXPERTS] = c->n_experts,
        [INNER] = c->moe_intermediate,
        [INNER_2] = 2 * c->moe_intermediate,
        [SHARED] = c->shared_intermediate,
        [CHANNELS] = 2 * (int64_t)c->linear_key_heads * c->linear_key_dim + values,
        [KERNEL] = c->conv_kernel,
        [VALUES] = values,
        [VALUE_HEADS] = c->linear_value_heads,
        [VALUE_DIM] = c->linear_value_dim,
        [V_HIDDEN] = c->vision.hidden,
        [V_HIDDEN_3] = 3 * c->vision.hidden,
        [V_INNER] = c->vision.intermediate,
        [V_MERGED] = (int64_t)c->vision.merge * c->vision.merge * c->vision.hidden,
        [V_OUT] = c->vision.out_hidden,
        [V_POSITIONS] = c->vision.n_positions,
        [V_CHANNELS] = c->vision.channels,
        [V_TIME] = c->vision.temporal_patch,
        [V_PATCH] = c->vision.patch,
    };
    memcpy(size, all, sizeof all);
}

static bool add(struct tensor_list *l, const char *prefix, const char *name, const int64_t *shape, int n_dims,
                struct err *e)
{
    if (l->n == l->capacity) {
        size_t capacity = l->capacity ? 2 * l->capacity : 256;
        struct tensor *items = realloc(l->items, capacity * sizeof *items);
        if (!items) return err_memory(e, "tensor list", capacity * sizeof *items);
        l->items = items;
        l->capacity = capacity;
    }
    char *full;
    if (asprintf(&full, "%s%s", prefix, name) < 0) return err_memory(e, "tensor name", strlen(name));
    struct tensor *t = &l->items[l->n++];
    *t = (struct tensor){ .name = full, .dtype = DTYPE_BF16, .n_dims = n_dims };
    memcpy(t->shape, shape, (size_t)n_dims * sizeof *shape);
    t->bytes = 2 * (uint64_t)tensor_elements(t);
    return true;
}

static bool add_rows(struct tensor_list *l, const char *prefix, const struct row *rows, const int64_t *size,
                     struct err *e)
{
    for (; rows->name; rows++) {
        int64_t shape[5];
        int n = 0;
        for (; n < 5 && rows->size[n] != NONE; n++) shape[n] = size[rows->size[n]];
        if (!add(l, prefix, rows->name, shape, n, e)) return false;
    }
    return true;
}

static bool add_text(struct tensor_list *l, const struct config *c, const char *prefix, const int64_t *size,
                     struct err *e)
{
    if (!add_rows(l, prefix, text_once, size, e)) return false;
    for (int i = 0; i < c->n_layers; i++) {
        char layer[80];
        bool full = c->layer_kinds[i] == LAYER_FULL_ATTENTION;
        snprintf(layer, sizeof layer, "%slayers.%d.", prefix, i);
        if (!add_rows(l, layer, text_layer, size, e) ||
            !add_rows(l, layer, full ? full_layer : linear_layer, size, e))
            return false;
    }
    return c->tie_word_embeddings || add_rows(l, "", lm_head, size, e);
}

static bool add_vision(struct tensor_list *l, const struct config *c, const int64_t *size, struct err *e)
{
    if (!c->has_vision) return true;
    if (!add_rows(l, "model.visual.", vision_once, size, e)) return false;
    for (int i = 0; i < c->vision.depth; i++) {
        char block[80];
        snprintf(block, sizeof block, "model.visual.blocks.%d.", i);
        if (!add_rows(l, block, vision_block, size, e)) return false;
    }
    return true;
}

struct adding {
    struct tensor_list *list;
    struct err *e;
};

static bool add_mtp(void *ctx, const struct mtp_tensor *t)
{
    const struct adding *a = ctx;
    return add(a->list, "", t->name, t->shape, t->n_dims, a->e);
}

bool synth_shapes(struct tensor_list *l, const struct config *c, bool has_text_config, struct err *e)
{
    int64_t size[N_SIZES];
    struct adding adding = { l, e };
    take_sizes(size, c);
    return add_text(l, c, has_text_config ? "model.language_model." : "model.", size, e) &&
           mtp_visit(c, add_mtp, &adding) && add_vision(l, c, size, e);
}

void tensor_list_deinit(struct tensor_list *l)
{
    for (size_t i = 0; i < l->n; i++) free((void *)(uintptr_t)l->items[i].name);
    free(l->items);
    *l = (struct tensor_list){ 0 };
}
