/* Input: config.json. Both readers of it must refuse or hold their promises; a few module names are then
 * looked up. Its "overrides" are merged into it, and what that gives is read too. */
#include "checkpoint/config.h"
#include "checkpoint/overrides.h"
#include "checkpoint/quantization.h"
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(bool claim)
{
    if (!claim) abort();
}

static void check_config(const struct config *c)
{
    require(c->n_layers > 0 && c->layer_kinds && c->hidden_size > 0 && c->vocab_size > 0);
    require(c->n_kv_heads > 0 && c->n_heads % c->n_kv_heads == 0 && c->head_dim > 0);
    require(c->rotary_dim >= 2 && c->rotary_dim % 2 == 0 && c->rotary_dim <= c->head_dim);
    require(c->mrope_section[0] + c->mrope_section[1] + c->mrope_section[2] == c->rotary_dim / 2);
    require(c->experts_per_token >= 1 && c->experts_per_token <= c->n_experts);
    require(c->rope_theta > 1 && c->rms_norm_eps > 0);
    require(c->max_position_embeddings >= 1 && c->max_position_embeddings <= INT64_C(1) << 31);
    require(c->yarn.factor == 0 || (c->yarn.factor >= 1 && c->yarn.original >= 1 && c->yarn.beta_slow > 0));
    require(c->eos_token >= -1 && c->eos_token < c->vocab_size);
    for (int i = 0; i < c->n_layers; i++)
        require(c->layer_kinds[i] != LAYER_LINEAR_ATTENTION ||
                c->linear_value_heads % c->linear_key_heads == 0);
    require(!c->has_vision || c->vision.hidden % c->vision.n_heads == 0);
}

static void look_up(const struct quantization *q)
{
    static const char *const modules[] = { "model.language_model.layers.0.mlp.experts.7.gate_proj",
                                           "model.layers.3.self_attn.q_proj",
                                           "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "" };
    for (size_t i = 0; i < sizeof modules / sizeof *modules; i++)
        require(scheme_name(quantization_scheme(q, modules[i], "Linear")) != NULL);
}

static void read_config(const json_t *root)
{
    struct config c;
    struct err e = { 0 };
    if (config_parse(&c, root, &e))
        check_config(&c);
    else
        require(e.code != ERR_NONE && e.text[0]);
    config_deinit(&c);
}

static void override(json_t *root)
{
    const json_t *fields = json_object_get(root, "overrides");
    struct overrides o = { json_is_object(fields) ? fields : NULL,
                           json_number_value(json_object_get(root, "rope_yarn")) };
    struct err e = { 0 };
    json_t *copy = json_deep_copy(root);
    require(copy);
    if (overrides_apply(copy, &o, &e))
        read_config(copy);
    else
        require(e.code != ERR_NONE && e.text[0]);
    json_decref(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct quantization *q;
    struct err e = { 0 };
    json_t *root;
    if (!doc_parse(&root, (const char *)data, bytes, &e)) return 0;
    read_config(root);
    override(root);
    bool ok = quantization_parse(&q, root, &e);
    json_decref(root);
    if (ok)
        look_up(q);
    else
        require(e.code != ERR_NONE && e.text[0] && !q);
    quantization_free(q);
    return 0;
}
