/* Which fields of config.json an override may name, the merge, and that all that was merged is read. Whether
 * the values make sense is config_parse's to say. */
#include "checkpoint/overrides.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_BYTES = 160 };

/* An object of config.json; lists end with NULL, parts with one that has no name. */
struct part {
    const char *name;
    const char *const *free, *const *fixed; /* fixed: by the weights, which were made for what is said */
    const struct part *parts;
};

static const char *const none[] = { NULL };
static const struct part no_parts[] = { { .name = NULL } };

static const char *const rope_free[] = { "rope_type",
                                         "type",
                                         "rope_theta",
                                         "partial_rotary_factor",
                                         "mrope_interleaved",
                                         "mrope_section",
                                         "factor",
                                         "original_max_position_embeddings",
                                         "attention_factor",
                                         "beta_fast",
                                         "beta_slow",
                                         "truncate",
                                         NULL };
static const char *const yarn_only[] = { "factor",    "original_max_position_embeddings",
                                         "truncate",  "attention_factor",
                                         "beta_fast", "beta_slow",
                                         NULL };
static const struct part text_parts[] = { { "rope_parameters", rope_free, none, no_parts },
                                          { "rope_scaling", rope_free, none, no_parts },
                                          { .name = NULL } };
static const char *const text_free[] = { "rope_theta",
                                         "partial_rotary_factor",
                                         "max_position_embeddings",
                                         "rms_norm_eps",
                                         "num_experts_per_tok",
                                         "eos_token_id",
                                         NULL };
static const char *const text_fixed[] = { "model_type",
                                          "architectures",
                                          "quantization_config",
                                          "vocab_size",
                                          "hidden_size",
                                          "num_hidden_layers",
                                          "layer_types",
                                          "full_attention_interval",
                                          "num_attention_heads",
                                          "num_key_value_heads",
                                          "head_dim",
                                          "linear_num_key_heads",
                                          "linear_num_value_heads",
                                          "linear_key_head_dim",
                                          "linear_value_head_dim",
                                          "linear_conv_kernel_dim",
                                          "num_experts",
                                          "moe_intermediate_size",
                                          "shared_expert_intermediate_size",
                                          "mtp_num_hidden_layers",
                                          "mtp_use_dedicated_embeddings",
                                          "tie_word_embeddings",
                                          "hidden_act",
                                          "attention_bias",
                                          "attn_output_gate",
                                          "output_gate_type",
                                          "norm_topk_prob",
                                          "mlp_only_layers",
                                          NULL };
static const char *const vision_fixed[] = { "depth",
                                            "num_heads",
                                            "patch_size",
                                            "temporal_patch_size",
                                            "spatial_merge_size",
                                            "in_channels",
                                            "hidden_size",
                                            "intermediate_size",
                                            "out_hidden_size",
                                            "num_position_embeddings",
                                            "hidden_act",
                                            "deepstack_visual_indexes",
                                            NULL };
static const char *const top_free[] = { "image_token_id",      "video_token_id", "vision_start_token_id",
                                        "vision_end_token_id", "eos_token_id",   NULL };
static const char *const top_fixed[] = { "model_type", "architectures", "tie_word_embeddings",
                                         "quantization_config", NULL };
static const struct part top_parts[] = { { "text_config", text_free, text_fixed, text_parts },
                                         { "vision_config", none, vision_fixed, no_parts },
                                         { .name = NULL } };
static const struct part with_parts = { "", top_free, top_fixed, top_parts };
static const struct part text_only = { "", text_free, text_fixed, text_parts };

static bool is_among(const char *name, const char *const *list)
{
    for (; *list; list++)
        if (strcmp(*list, name) == 0) return true;
    return false;
}

static const struct part *find_part(const struct part *parts, const char *name)
{
    for (; parts->name; parts++)
        if (strcmp(parts->name, name) == 0) return parts;
    return NULL;
}

static bool is_given(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return v && !json_is_null(v);
}

static json_t *text_of(json_t *config)
{
    json_t *text = json_object_get(config, "text_config");
    return json_is_object(text) ? text : config;
}

/* rope_scaling is read where rope_parameters is not there. */
static const char *rope_name(const json_t *text)
{
    return is_given(text, "rope_parameters") || !is_given(text, "rope_scaling") ? "rope_parameters"
                                                                                : "rope_scaling";
}

static bool same(const json_t *a, const json_t *b)
{
    return json_is_number(a) && json_is_number(b) ? json_number_value(a) == json_number_value(b)
                                                  : json_equal(a, b);
}

/* Takes out of `given` what config.json says already. */
static void drop_repeated(json_t *given, const json_t *config)
{
    const char *key;
    void *next;
    json_t *v;
    json_object_foreach_safe(given, next, key, v)
    {
        const json_t *said = json_object_get(config, key);
        if (json_is_object(v) && json_is_object(said))
            drop_repeated(v, said);
        else if (said && same(v, said))
            json_object_del(given, key);
    }
}

static bool refuse(const char *path, const char *why, struct err *e)
{
    return err_set(e, ERR_ARGUMENT, "%s: %s", path, why);
}

static bool refuse_fixed(const char *path, const json_t *said, struct err *e)
{
    char *text = said ? json_dumps(said, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    err_set(e, ERR_ARGUMENT, "%s: fixed by the weights, which were made for %.100s; it cannot be overridden",
            path, text ? text : "its default");
    free(text);
    return false;
}

static bool refuse_unread(const char *path, const char *key, const struct part *p, struct err *e)
{
    bool is_text = is_among(key, text_free) || is_among(key, text_fixed) || find_part(text_parts, key);
    if (p == &with_parts && is_text)
        return refuse(path, "not read at the top level of this config.json, but in its text_config", e);
    if (p == &text_only && find_part(top_parts, key))
        return refuse(path, "this config.json has no such part; its fields are at the top level", e);
    return refuse(path, "not read by quench, so overriding it would change nothing", e);
}

/* given: what is overridden of `said`, which is part p of config.json and at `path` of it. */
static bool check_part(const json_t *given, const json_t *said, const struct part *p, const char *path,
                       struct err *e)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)given, key, v)
    {
        char full[PATH_BYTES];
        snprintf(full, sizeof full, "%s%s%.64s", path, *path ? "." : "", key);
        const struct part *inner = find_part(p->parts, key);
        if (is_among(key, p->fixed)) return refuse_fixed(full, json_object_get(said, key), e);
        if (!inner && !is_among(key, p->free)) return refuse_unread(full, key, p, e);
        if (!inner) continue;
        if (!json_is_object(v)) return refuse(full, "expected an object", e);
        if (!check_part(v, json_object_get(said, key), inner, full, e)) return false;
    }
    return true;
}

/* A field that something else in config.json is read instead of. */
static bool refuse_beside(json_t *config, const char *field, const char *why, struct err *e)
{
    char path[2 * PATH_BYTES];
    bool nested = text_of(config) != config;
    snprintf(path, sizeof path, "%s%s", nested ? "text_config." : "", field);
    return refuse(path, why, e);
}

/* Only one of rope_parameters and rope_scaling is read; the other may not be overridden. */
static bool check_rope_name(json_t *config, const json_t *given, struct err *e)
{
    const char *name = rope_name(text_of(config));
    bool is_new = strcmp(name, "rope_parameters") == 0;
    const char *other = is_new ? "rope_scaling" : "rope_parameters";
    if (json_object_size(json_object_get(given, other)) == 0) return true;
    return refuse_beside(config, other,
                         is_new ? "not read beside rope_parameters; override that"
                                : "this config.json has rope_scaling in its place; override that",
                         e);
}

/* YaRN's fields are read with it, and max_position_embeddings without. */
static bool check_yarn(json_t *config, const json_t *given, const char *name, struct err *e)
{
    const json_t *rope = json_object_get(text_of(config), name), *changed = json_object_get(given, name);
    const char *type = json_string_value(json_object_get(rope, "rope_type"));
    if (!type) type = json_string_value(json_object_get(rope, "type"));
    bool is_yarn = type && strcmp(type, "yarn") == 0,
         is_plain = !type || strcmp(type, "default") == 0 || strcmp(type, "mrope") == 0;
    for (const char *const *key = yarn_only; is_plain && *key; key++) {
        char field[PATH_BYTES];
        snprintf(field, sizeof field, "%s.%s", name, *key);
        if (is_given(changed, *key))
            return refuse_beside(config, field, "only read where rope_type is \"yarn\"", e);
    }
    if (!is_yarn || !is_given(given, "max_position_embeddings") ||
        !is_given(rope, "original_max_position_embeddings"))
        return true;
    return refuse_beside(config, "max_position_embeddings",
                         "not read beside YaRN's factor and original_max_position_embeddings, whose product "
                         "is the limit; leave it out",
                         e);
}

/* given: what was overridden of the language model's fields, and is in config by now. */
static bool check_read(json_t *config, const json_t *given, struct err *e)
{
    static const char *const twice[] = { "rope_theta", "partial_rotary_factor", NULL };
    const char *name = rope_name(text_of(config));
    const json_t *rope = json_object_get(text_of(config), name);
    for (const char *const *key = twice; *key; key++)
        if (is_given(given, *key) && is_given(rope, *key))
            return refuse_beside(config, *key, "not read beside the one of rope_parameters; override that",
                                 e);
    return check_yarn(config, given, name, e);
}

static bool set_yarn(json_t *config, const json_t *given, double factor, struct err *e)
{
    json_t *text = text_of(config);
    const char *name = rope_name(text);
    const json_t *changed = json_object_get(given, name);
    if (is_given(changed, "rope_type") || is_given(changed, "type") || is_given(changed, "factor"))
        return refuse_beside(config, name,
                             "overridden beside the short form for YaRN; one of the two is enough", e);
    json_t *rope = json_object_get(text, name);
    if (!json_is_object(rope)) {
        rope = json_object();
        if (json_object_set_new(text, name, rope) != 0) return err_memory(e, "config.json", 0);
    }
    json_object_del(rope, "type");
    return (json_object_set_new(rope, "rope_type", json_string("yarn")) == 0 &&
            json_object_set_new(rope, "factor", json_real(factor)) == 0) ||
           err_memory(e, "config.json", 0);
}

static bool merge(json_t *config, json_t *given, const struct overrides *o, struct err *e)
{
    const struct part *top = text_of(config) == config ? &text_only : &with_parts;
    drop_repeated(given, config);
    const json_t *text = top == &text_only ? given : json_object_get(given, "text_config");
    if (!check_part(given, config, top, "", e) || !check_rope_name(config, text, e)) return false;
    if (json_object_update_recursive(config, given) != 0) return err_memory(e, "config.json", 0);
    return (o->rope_yarn == 0 || set_yarn(config, text, o->rope_yarn, e)) && check_read(config, text, e);
}

bool overrides_apply(json_t *config, const struct overrides *o, struct err *e)
{
    if (!o || (!o->fields && o->rope_yarn == 0) || !json_is_object(config)) return true;
    json_t *given = o->fields ? json_deep_copy(o->fields) : json_object();
    bool ok = given ? merge(config, given, o, e) : err_memory(e, "overrides", 0);
    json_decref(given);
    return ok || err_note(e, "overrides of config.json");
}
