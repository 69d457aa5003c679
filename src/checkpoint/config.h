/* config.json of a Qwen3.5/3.6-MoE checkpoint: every field that changes the computation, checked where it
 * enters. Source: spec of the released config.json (docs/formats.md). Text fields are read from "text_config"
 * when present, else from the top level (text-only exports). Fields that select something not implemented are
 * errors that name it: hidden_act other than "silu", attention_bias true, attn_output_gate false, rope_type
 * other than "default" and "yarn", mrope_interleaved false, attention other than "linear_attention" /
 * "full_attention" in layer_types, a vision tower with deepstack. Numbers are positive and small enough that
 * the elements of every tensor they describe, and so its bytes, fit 63 bits. */
#ifndef CHECKPOINT_CONFIG_H
#define CHECKPOINT_CONFIG_H
#include "base/doc.h"
#include "base/err.h"
#include <stdint.h>

enum layer_kind { LAYER_LINEAR_ATTENTION, LAYER_FULL_ATTENTION };

struct config {
    char model_type[64], architecture[64];
    int64_t vocab_size, hidden_size;
    int n_layers;
    enum layer_kind *layer_kinds; /* [n_layers], owned. From layer_types or full_attention_interval */
    double rms_norm_eps;
    bool tie_word_embeddings;        /* top level or text_config */
    int64_t max_position_embeddings; /* with YaRN factor x original, whatever the file says, as in vLLM */
    /* gated full attention */
    int n_heads, n_kv_heads, head_dim; /* head_dim absent: hidden_size / n_heads */
    int rotary_dim; /* head_dim * partial_rotary_factor, even; rope_parameters or the flat keys */
    double rope_theta;
    int mrope_section[3]; /* sums to rotary_dim / 2; absent: {rotary_dim / 2, 0, 0} */
    struct {
        double factor;               /* at least 1; 0: no YaRN, and the others mean nothing */
        int64_t original;            /* positions it was trained on; absent: max_position_embeddings */
        double attention_factor;     /* 0: 0.1 ln(factor) + 1 */
        double beta_fast, beta_slow; /* turns within `original`; absent: 32 and 1 */
        bool truncate;               /* the ramp's ends to whole dimensions; absent: true */
    } yarn;
    /* Gated DeltaNet; all 0 when no layer uses it */
    int linear_key_heads, linear_value_heads, linear_key_dim, linear_value_dim, conv_kernel;
    /* mixture of experts */
    int n_experts, experts_per_token;
    int64_t moe_intermediate, shared_intermediate;
    int mtp_layers; /* mtp_num_hidden_layers; 0 when absent */
    bool has_vision;
    struct {
        int depth, n_heads, patch, temporal_patch, merge, channels;
        int64_t hidden, intermediate, out_hidden, n_positions;
    } vision;
    int64_t image_token, video_token, vision_start_token, vision_end_token; /* -1 when absent */
    int64_t eos_token;                                                      /* -1 when absent */
};

bool config_parse(struct config *c, const json_t *root, struct err *e);
void config_deinit(struct config *c); /* accepts a zeroed one */
#endif
