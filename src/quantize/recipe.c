/* The built-in recipes and how any recipe is written down. Takes a table of groups, gives the JSON block that
 * goes into config.json and the YAML text of recipe.yaml. */
#include "quantize/recipe.h"
#include "num/fp8.h"
#include "quantize/yaml.h"
#include <string.h>

/* The version of compressed-tensors whose schema the block follows. */
static const char CT_VERSION[] = "0.15.0.1";

#define COUNT(array) (sizeof(array) / sizeof *(array))

#define EXPERTS                                                                                              \
    "re:.*mlp\\.experts\\.\\d+\\.gate_proj$", "re:.*mlp\\.experts\\.\\d+\\.up_proj$",                        \
        "re:.*mlp\\.experts\\.\\d+\\.down_proj$"
#define DENSE "re:.*self_attn\\.(q|k|v|o)_proj$", "re:.*shared_expert\\.(gate|up|down)_proj$"

static const char *const routed[] = { EXPERTS };
static const char *const dense[] = { DENSE };
static const char *const routed_and_dense[] = { EXPERTS, DENSE };
/* Patterns, since readers rename modules and match patterns against their own names: "lm_head" may be
 * "language_model.lm_head" there. */
static const char *const dense_and_delta[] = {
    DENSE,
    "re:.*linear_attn\\.(in_proj_qkv|in_proj_z|out_proj)$",
    "re:.*lm_head$",
};
static const char *const card_ignore[] = {
    "lm_head",
    "re:.*embed_tokens$",
    "re:.*mlp\\.gate$",
    "re:.*mlp\\.shared_expert_gate$",
    "re:.*linear_attn.*",
    "re:.*visual.*",
    "re:.*vision_tower.*",
    "re:.*mtp.*",
};
static const char *const fast_ignore[] = {
    "re:.*embed_tokens$",
    "re:.*mlp\\.gate$",
    "re:.*mlp\\.shared_expert_gate$",
    "re:.*linear_attn\\.(conv1d|in_proj_a|in_proj_b)$",
    "re:.*visual.*",
    "re:.*vision_tower.*",
    "re:.*mtp.*",
};
static const char *const routed_only_ignore[] = {
    "lm_head",          "re:.*embed_tokens$", "re:.*mlp\\.gate$", "re:.*mlp\\.shared_expert.*",
    "re:.*self_attn.*", "re:.*linear_attn.*", "re:.*visual.*",    "re:.*vision_tower.*",
    "re:.*mtp.*",
};
static const struct recipe_group card_groups[] = {
    { "group_0", SCHEME_NVFP4, routed, COUNT(routed) },
    { "group_1", SCHEME_FP8_DYNAMIC, dense, COUNT(dense) },
};
static const struct recipe_group nvfp4_groups[] = {
    { "group_0", SCHEME_NVFP4, routed_and_dense, COUNT(routed_and_dense) },
};
static const struct recipe_group fast_groups[] = {
    { "group_0", SCHEME_NVFP4, routed, COUNT(routed) },
    { "group_1", SCHEME_FP8_DYNAMIC, dense_and_delta, COUNT(dense_and_delta) },
};
static const struct recipe_group nvfp4a16_groups[] = {
    { "group_0", SCHEME_NVFP4A16, routed, COUNT(routed) },
};
static const struct recipe builtin[] = {
    { "card", card_groups, COUNT(card_groups), card_ignore, COUNT(card_ignore) },
    { "nvfp4", nvfp4_groups, COUNT(nvfp4_groups), card_ignore, COUNT(card_ignore) },
    { "fast", fast_groups, COUNT(fast_groups), fast_ignore, COUNT(fast_ignore) },
    { "nvfp4a16", nvfp4a16_groups, COUNT(nvfp4a16_groups), routed_only_ignore, COUNT(routed_only_ignore) },
};

const struct recipe *recipe_card(void)
{
    return &builtin[0];
}

const struct recipe *recipe_builtin(const char *name)
{
    for (size_t i = 0; i < COUNT(builtin); i++)
        if (strcmp(builtin[i].name, name) == 0) return &builtin[i];
    return NULL;
}

bool scheme_measures(enum scheme s)
{
    return s == SCHEME_NVFP4 || s == SCHEME_FP8;
}

bool recipe_measures(const struct recipe *r)
{
    for (size_t i = 0; i < r->n_groups; i++)
        if (scheme_measures(r->groups[i].scheme)) return true;
    return false;
}

/* QuantizationArgs; 0 and NULL are null. */
struct args {
    int num_bits, group_size;
    const char *strategy, *dynamic, *scale_dtype, *observer; /* dynamic NULL: false, "": true */
};

static const struct args nvfp4_weights = {
    4, 16, "tensor_group", NULL, "torch.float8_e4m3fn", "memoryless_minmax"
};
static const struct args nvfp4_input = {
    4, 16, "tensor_group", "local", "torch.float8_e4m3fn", "static_minmax"
};
static const struct args fp8_weights = { 8, 0, "channel", NULL, NULL, "memoryless_minmax" };
static const struct args fp8_input = { 8, 0, "token", "", NULL, NULL };
static const struct args fp8_tensor = { 8, 0, "tensor", NULL, NULL, "memoryless_minmax" };
static const struct args fp8_fixed = { 8, 0, "tensor", NULL, NULL, "static_minmax" };
static const struct args fp8_block = { 8, 0, "block", NULL, NULL, "memoryless_minmax" };
static const struct args fp8_groups = { 8, FP8_BLOCK, "group", "", NULL, NULL };

static const struct {
    const char *format;
    const struct args *weights, *input;
} schemes[] = {
    [SCHEME_NVFP4] = { "nvfp4-pack-quantized", &nvfp4_weights, &nvfp4_input },
    [SCHEME_NVFP4A16] = { "nvfp4-pack-quantized", &nvfp4_weights, NULL },
    [SCHEME_FP8_DYNAMIC] = { "float-quantized", &fp8_weights, &fp8_input },
    [SCHEME_FP8A16] = { "float-quantized", &fp8_weights, NULL },
    [SCHEME_FP8] = { "float-quantized", &fp8_tensor, &fp8_fixed },
    [SCHEME_FP8_BLOCK] = { "float-quantized", &fp8_block, &fp8_groups },
};

/* jansson takes NULL for a value as a failure and passes it on, so a lost allocation shows at the end. */
static json_t *text_or_null(const char *text)
{
    return text ? json_string(text) : json_null();
}

static json_t *number_or_null(int n)
{
    return n ? json_integer(n) : json_null();
}

static json_t *dynamic_json(const struct args *a)
{
    return !a->dynamic ? json_false() : *a->dynamic ? json_string(a->dynamic) : json_true();
}

static bool has_blocks(const struct args *a)
{
    return strcmp(a->strategy, "block") == 0;
}

static json_t *block_json(const struct args *a)
{
    return has_blocks(a) ? json_pack("[i, i]", FP8_BLOCK, FP8_BLOCK) : json_null();
}

static json_t *args_json(const struct args *a)
{
    if (!a) return json_null();
    return json_pack("{s:i, s:s, s:s, s:o, s:b, s:o, s:o, s:o, s:n, s:o, s:{}, s:n}", "num_bits", a->num_bits,
                     "type", "float", "strategy", a->strategy, "group_size", number_or_null(a->group_size),
                     "symmetric", 1, "dynamic", dynamic_json(a), "scale_dtype", text_or_null(a->scale_dtype),
                     "observer", text_or_null(a->observer), "actorder", "block_structure", block_json(a),
                     "observer_kwargs", "zp_dtype");
}

static json_t *texts_json(const char *const *texts, size_t n)
{
    json_t *list = json_array();
    bool ok = list;
    for (size_t i = 0; ok && i < n; i++) ok = json_array_append_new(list, json_string(texts[i])) == 0;
    if (ok) return list;
    json_decref(list);
    return NULL;
}

static json_t *groups_json(const struct recipe *r)
{
    json_t *groups = json_object();
    bool ok = groups;
    for (size_t i = 0; ok && i < r->n_groups; i++) {
        const struct recipe_group *g = &r->groups[i];
        json_t *group = json_pack("{s:s, s:o, s:n, s:o, s:o}", "format", schemes[g->scheme].format, "targets",
                                  texts_json(g->targets, g->n_targets), "output_activations", "weights",
                                  args_json(schemes[g->scheme].weights), "input_activations",
                                  args_json(schemes[g->scheme].input));
        ok = json_object_set_new(groups, g->name, group) == 0;
    }
    if (ok) return groups;
    json_decref(groups);
    return NULL;
}

/* The packing of all groups, or the word for several. */
static const char *overall_format(const struct recipe *r)
{
    for (size_t i = 1; i < r->n_groups; i++)
        if (schemes[r->groups[i].scheme].format != schemes[r->groups[0].scheme].format)
            return "mixed-precision";
    return schemes[r->groups[0].scheme].format;
}

bool recipe_config(json_t **out, const struct recipe *r, json_t *ignore, struct err *e)
{
    *out = json_pack("{s:{s:o, s:s, s:n, s:O, s:n, s:s, s:s, s:{}, s:{}, s:s}}", "quantization_config",
                     "config_groups", groups_json(r), "format", overall_format(r), "global_compression_ratio",
                     "ignore", ignore, "kv_cache_scheme", "quant_method", "compressed-tensors",
                     "quantization_status", "compressed", "sparsity_config", "transform_config", "version",
                     CT_VERSION);
    return *out || err_memory(e, "quantization_config", 0);
}

/* Recipes leave out what is null or empty; observers and the rest of the order as in the tool's own dumps. */
static json_t *yaml_args(const struct args *a)
{
    json_t *o =
        json_pack("{s:i, s:s, s:s}", "num_bits", a->num_bits, "type", "float", "strategy", a->strategy);
    bool ok = o &&
              (!a->group_size || json_object_set_new(o, "group_size", json_integer(a->group_size)) == 0) &&
              (!has_blocks(a) || json_object_set_new(o, "block_structure", block_json(a)) == 0) &&
              json_object_set_new(o, "symmetric", json_true()) == 0 &&
              json_object_set_new(o, "dynamic", dynamic_json(a)) == 0 &&
              (!a->scale_dtype || json_object_set_new(o, "scale_dtype", json_string(a->scale_dtype)) == 0) &&
              (!a->observer || json_object_set_new(o, "observer", json_string(a->observer)) == 0);
    if (ok) return o;
    json_decref(o);
    return NULL;
}

static json_t *yaml_group(const struct recipe_group *g)
{
    json_t *o = json_pack("{s:o, s:o}", "targets", texts_json(g->targets, g->n_targets), "weights",
                          yaml_args(schemes[g->scheme].weights));
    const struct args *input = schemes[g->scheme].input;
    if (o && (!input || json_object_set_new(o, "input_activations", yaml_args(input)) == 0)) return o;
    json_decref(o);
    return NULL;
}

static json_t *yaml_groups(const struct recipe *r)
{
    json_t *groups = json_object();
    bool ok = groups;
    for (size_t i = 0; ok && i < r->n_groups; i++)
        ok = json_object_set_new(groups, r->groups[i].name, yaml_group(&r->groups[i])) == 0;
    if (ok) return groups;
    json_decref(groups);
    return NULL;
}

bool recipe_yaml(char **text, size_t *bytes, const struct recipe *r, struct err *e)
{
    *text = NULL;
    json_t *root =
        json_pack("{s:{s:{s:{s:o, s:o}}}}", "default_stage", "default_modifiers", "QuantizationModifier",
                  "config_groups", yaml_groups(r), "ignore", texts_json(r->ignore, r->n_ignore));
    bool ok = root ? yaml_write(text, bytes, root, e) : err_memory(e, "recipe.yaml", 0);
    json_decref(root);
    return ok;
}
