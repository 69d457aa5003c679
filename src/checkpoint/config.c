/* config.json: takes the parsed document, gives struct config with every number checked. What the released
 * models never vary, but a field could ask for, is refused by name here, so that no later code computes
 * something else in silence. */
#include "checkpoint/config.h"
#include "base/checked.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    LAYERS_MAX = 4096,
    EXPERTS_MAX = 65536,
    HEADS_MAX = 65536,
    HEAD_DIM_MAX = 65536,
    KERNEL_MAX = 1024,
    PATCH_MAX = 1024
};
static const int64_t DIMENSION_MAX = INT64_C(1) << 31;
/* Elements of one tensor: with this even its bytes, of any dtype and a few times over, fit 63 bits. */
static const uint64_t ELEMENTS_MAX = UINT64_C(1) << 56;

/* An object of the document and its path, for messages. */
struct scope {
    const json_t *object;
    const char *path;
};

static bool get_int(int *out, struct scope s, const char *key, int64_t min, int64_t max, struct err *e)
{
    int64_t v;
    if (!doc_int(&v, s.object, s.path, key, min, max, e)) return false;
    *out = (int)v;
    return true;
}

static bool get_int_or(int *out, struct scope s, const char *key, int64_t min, int64_t max, struct err *e)
{
    int64_t v = *out;
    if (!doc_int_or(&v, s.object, s.path, key, min, max, e)) return false;
    *out = (int)v;
    return true;
}

static bool get_size(int64_t *out, struct scope s, const char *key, struct err *e)
{
    return doc_int(out, s.object, s.path, key, 1, DIMENSION_MAX, e);
}

static bool is_given(struct scope s, const char *key)
{
    const json_t *v = json_object_get(s.object, key);
    return v && !json_is_null(v);
}

/* "text_config.head_dim: " in front of what is wrong with it. */
static bool note_field(struct scope s, const char *key, struct err *e)
{
    return err_note(e, "%s%s%s", s.path, *s.path ? "." : "", key);
}

/* An object inside `outer`; its scope's object is NULL when absent or null. */
static bool get_scope(struct scope *out, struct scope outer, const char *key, const char *path, struct err *e)
{
    *out = (struct scope){ .path = path };
    if (!is_given(outer, key)) return true;
    out->object = json_object_get(outer.object, key);
    return json_is_object(out->object) || err_set(e, ERR_FORMAT, "%s: expected an object", path);
}

/* A field that must be absent, null, or one of the two values (the second may be NULL). */
static bool only_string(struct scope s, const char *key, const char *value, const char *other, struct err *e)
{
    const char *found;
    if (!is_given(s, key)) return true;
    if (!doc_string(&found, s.object, s.path, key, e)) return false;
    if (strcmp(found, value) == 0 || (other && strcmp(found, other) == 0)) return true;
    err_set(e, ERR_UNSUPPORTED, "'%s' is not supported, only '%s' is", found, value);
    return note_field(s, key, e);
}

static bool only_bool(struct scope s, const char *key, bool value, struct err *e)
{
    bool found = value;
    if (!doc_bool_or(&found, s.object, s.path, key, e)) return false;
    if (found == value) return true;
    err_set(e, ERR_UNSUPPORTED, "%s is not supported", found ? "true" : "false");
    return note_field(s, key, e);
}

static bool only_empty(struct scope s, const char *key, struct err *e)
{
    const json_t *v = json_object_get(s.object, key);
    if (!v || json_is_null(v) || (json_is_array(v) && json_array_size(v) == 0)) return true;
    err_set(e, ERR_UNSUPPORTED, "only an empty list is supported");
    return note_field(s, key, e);
}

static bool is_family(const char *type, const char *family)
{
    size_t n = strlen(family);
    return strncmp(type, family, n) == 0 && (type[n] == 0 || type[n] == '_');
}

static bool copy_text(char *out, size_t bytes, const char *text, struct err *e)
{
    if (strlen(text) >= bytes)
        return err_set(e, ERR_UNSUPPORTED, "'%.100s' is longer than %zu bytes", text, bytes - 1);
    memcpy(out, text, strlen(text) + 1);
    return true;
}

static bool read_identity(struct config *c, struct scope top, struct err *e)
{
    const char *type, *architecture = "";
    if (!doc_string(&type, top.object, top.path, "model_type", e)) return false;
    if (!is_family(type, "qwen3_5_moe") && !is_family(type, "qwen3_6_moe"))
        return err_set(e, ERR_UNSUPPORTED,
                       "model_type: '%.100s' is not supported, only qwen3_5_moe and qwen3_6_moe are", type);
    if (is_given(top, "architectures")) {
        const json_t *first = json_array_get(json_object_get(top.object, "architectures"), 0);
        if (!json_is_string(first))
            return err_set(e, ERR_FORMAT, "architectures: expected an array of strings");
        architecture = json_string_value(first);
    }
    if (!copy_text(c->model_type, sizeof c->model_type, type, e)) return err_note(e, "model_type");
    return copy_text(c->architecture, sizeof c->architecture, architecture, e) ||
           err_note(e, "architectures");
}

/* Fields that every released file of the family sets to the one thing implemented. */
static bool refuse_variants(struct scope text, struct err *e)
{
    return only_string(text, "hidden_act", "silu", NULL, e) && only_bool(text, "attention_bias", false, e) &&
           only_bool(text, "attn_output_gate", true, e) &&
           only_string(text, "output_gate_type", "silu", "swish", e) &&
           only_bool(text, "mtp_use_dedicated_embeddings", false, e) &&
           only_bool(text, "norm_topk_prob", true, e) && only_empty(text, "mlp_only_layers", e);
}

static bool layer_kind_from_name(enum layer_kind *out, const json_t *v, struct err *e)
{
    const char *name = json_string_value(v);
    if (!name) return err_set(e, ERR_FORMAT, "expected a string");
    bool full = strcmp(name, "full_attention") == 0;
    *out = full ? LAYER_FULL_ATTENTION : LAYER_LINEAR_ATTENTION;
    return full || strcmp(name, "linear_attention") == 0 ||
           err_set(e, ERR_UNSUPPORTED,
                   "'%.100s' is not supported, only 'linear_attention' and 'full_attention' are", name);
}

static bool read_layer_types(struct config *c, struct scope text, struct err *e)
{
    const json_t *types = json_object_get(text.object, "layer_types");
    if (!json_is_array(types)) {
        err_set(e, ERR_FORMAT, "expected an array");
        return note_field(text, "layer_types", e);
    }
    if (json_array_size(types) != (size_t)c->n_layers) {
        err_set(e, ERR_FORMAT, "%zu entries for num_hidden_layers = %d", json_array_size(types), c->n_layers);
        return note_field(text, "layer_types", e);
    }
    for (int i = 0; i < c->n_layers; i++) {
        if (layer_kind_from_name(&c->layer_kinds[i], json_array_get(types, (size_t)i), e)) continue;
        return err_note(e, "%s%slayer_types[%d]", text.path, *text.path ? "." : "", i);
    }
    return true;
}

static bool read_layers(struct config *c, struct scope text, struct err *e)
{
    int interval = 4;
    if (!get_int(&c->n_layers, text, "num_hidden_layers", 1, LAYERS_MAX, e) ||
        !get_int_or(&interval, text, "full_attention_interval", 1, LAYERS_MAX, e))
        return false;
    c->layer_kinds = calloc((size_t)c->n_layers, sizeof *c->layer_kinds);
    if (!c->layer_kinds) return err_memory(e, "layer kinds", (size_t)c->n_layers * sizeof *c->layer_kinds);
    if (is_given(text, "layer_types")) return read_layer_types(c, text, e);
    for (int i = 0; i < c->n_layers; i++)
        c->layer_kinds[i] = (i + 1) % interval == 0 ? LAYER_FULL_ATTENTION : LAYER_LINEAR_ATTENTION;
    return true;
}

static bool read_sizes(struct config *c, struct scope top, struct scope text, struct err *e)
{
    c->rms_norm_eps = 1e-6;
    c->max_position_embeddings = 32768;
    if (!get_size(&c->vocab_size, text, "vocab_size", e) ||
        !get_size(&c->hidden_size, text, "hidden_size", e) ||
        !doc_number_or(&c->rms_norm_eps, text.object, text.path, "rms_norm_eps", e) ||
        !doc_bool_or(&c->tie_word_embeddings, text.object, text.path, "tie_word_embeddings", e) ||
        !doc_bool_or(&c->tie_word_embeddings, top.object, top.path, "tie_word_embeddings", e) ||
        !doc_int_or(&c->max_position_embeddings, text.object, text.path, "max_position_embeddings", 1,
                    DIMENSION_MAX, e))
        return false;
    if (c->rms_norm_eps > 0 && c->rms_norm_eps < 1) return true;
    err_set(e, ERR_FORMAT, "%g is not between 0 and 1", c->rms_norm_eps);
    return note_field(text, "rms_norm_eps", e);
}

static bool read_head_dim(struct config *c, struct scope text, struct err *e)
{
    if (is_given(text, "head_dim")) return get_int(&c->head_dim, text, "head_dim", 1, HEAD_DIM_MAX, e);
    if (c->hidden_size % c->n_heads == 0 && c->hidden_size / c->n_heads <= HEAD_DIM_MAX) {
        c->head_dim = (int)(c->hidden_size / c->n_heads);
        return true;
    }
    err_set(e, ERR_FORMAT, "absent, and hidden_size %" PRId64 " is no multiple of num_attention_heads %d",
            c->hidden_size, c->n_heads);
    return note_field(text, "head_dim", e);
}

static bool read_attention(struct config *c, struct scope text, struct err *e)
{
    if (!get_int(&c->n_heads, text, "num_attention_heads", 1, HEADS_MAX, e) ||
        !get_int(&c->n_kv_heads, text, "num_key_value_heads", 1, HEADS_MAX, e) || !read_head_dim(c, text, e))
        return false;
    if (c->n_heads % c->n_kv_heads == 0) return true;
    err_set(e, ERR_FORMAT, "%d does not divide num_attention_heads %d", c->n_kv_heads, c->n_heads);
    return note_field(text, "num_key_value_heads", e);
}

static bool read_mrope(struct config *c, struct scope rope, struct err *e)
{
    c->mrope_section[0] = c->rotary_dim / 2;
    if (!only_bool(rope, "mrope_interleaved", true, e)) return false;
    if (!is_given(rope, "mrope_section")) return true;
    const json_t *section = json_object_get(rope.object, "mrope_section");
    int64_t sum = 0;
    bool sane = json_is_array(section) && json_array_size(section) == 3;
    for (size_t i = 0; sane && i < 3; i++) {
        int64_t v =
            json_is_integer(json_array_get(section, i)) ? json_integer_value(json_array_get(section, i)) : -1;
        sane = v >= 0 && v <= HEAD_DIM_MAX;
        c->mrope_section[i] = sane ? (int)v : 0;
        sum += c->mrope_section[i];
    }
    if (sane && sum == c->rotary_dim / 2) return true;
    err_set(e, ERR_FORMAT, "expected three integers whose sum is half the rotary dimensions, %d",
            c->rotary_dim / 2);
    return note_field(rope, "mrope_section", e);
}

static bool read_rotary_dim(struct config *c, struct scope text, struct scope rope, struct err *e)
{
    double factor = 0.25;
    if (!doc_number_or(&factor, text.object, text.path, "partial_rotary_factor", e) ||
        !doc_number_or(&factor, rope.object, rope.path, "partial_rotary_factor", e))
        return false;
    bool sane = factor > 0 && factor <= 1;
    c->rotary_dim = sane ? (int)(c->head_dim * factor) : 0;
    if (c->rotary_dim >= 2 && c->rotary_dim % 2 == 0) return true;
    err_set(e, ERR_FORMAT, "%g of head_dim %d is not an even number from 2 to %d", factor, c->head_dim,
            c->head_dim);
    return note_field(is_given(rope, "partial_rotary_factor") ? rope : text, "partial_rotary_factor", e);
}

static bool read_theta(struct config *c, struct scope text, struct scope rope, struct err *e)
{
    struct scope s = is_given(rope, "rope_theta") ? rope : text;
    if (!doc_number(&c->rope_theta, s.object, s.path, "rope_theta", e)) return false;
    if (c->rope_theta > 1) return true;
    err_set(e, ERR_FORMAT, "%g is not above 1", c->rope_theta);
    return note_field(s, "rope_theta", e);
}

/* "type" is the older name; "mrope" under it says what mrope_section says. */
static bool read_rope_type(bool *is_yarn, struct scope rope, struct err *e)
{
    static const char *const keys[] = { "rope_type", "type" };
    const char *found, *first = NULL;
    *is_yarn = false;
    for (int i = 0; i < 2; i++) {
        if (!is_given(rope, keys[i])) continue;
        if (!doc_string(&found, rope.object, rope.path, keys[i], e)) return false;
        bool yarn = strcmp(found, "yarn") == 0, mrope = i == 1 && strcmp(found, "mrope") == 0;
        if (!yarn && !mrope && strcmp(found, "default") != 0) {
            err_set(e, ERR_UNSUPPORTED, "'%s' is not supported, only 'default' and 'yarn' are", found);
            return note_field(rope, keys[i], e);
        }
        if (first && !mrope && strcmp(first, found) != 0) {
            err_set(e, ERR_FORMAT, "'%s' contradicts rope_type '%s'; one of the two is enough", found, first);
            return note_field(rope, keys[i], e);
        }
        if (!first) *is_yarn = yarn;
        first = found;
    }
    return true;
}

/* Other ways to say what attention_factor says, and to turn parts of it off. */
static bool refuse_yarn_variants(struct scope rope, struct err *e)
{
    static const char *const keys[] = { "mscale", "mscale_all_dim", "attn_factor", "extrapolation_factor",
                                        "apply_yarn_scaling" };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (is_given(rope, keys[i])) {
            err_set(e, ERR_UNSUPPORTED, "is not supported; attention_factor is");
            return note_field(rope, keys[i], e);
        }
    return true;
}

static bool refuse_number(struct scope s, const char *key, double found, const char *want, struct err *e)
{
    err_set(e, ERR_FORMAT, "%g is not %s", found, want);
    return note_field(s, key, e);
}

static bool check_yarn(const struct config *c, struct scope rope, struct err *e)
{
    double factor = c->yarn.factor, attention = c->yarn.attention_factor, fast = c->yarn.beta_fast,
           slow = c->yarn.beta_slow;
    return (factor >= 1 || refuse_number(rope, "factor", factor, "1 or more", e)) &&
           (factor * (double)c->yarn.original < (double)DIMENSION_MAX ||
            refuse_number(rope, "factor", factor, "small enough for 2^31 positions", e)) &&
           (attention > 0 || !is_given(rope, "attention_factor") ||
            refuse_number(rope, "attention_factor", attention, "above 0", e)) &&
           (slow > 0 || refuse_number(rope, "beta_slow", slow, "above 0", e)) &&
           (fast >= slow || refuse_number(rope, "beta_fast", fast, "beta_slow or more", e));
}

static bool read_yarn(struct config *c, struct scope rope, struct err *e)
{
    c->yarn.original = c->max_position_embeddings;
    c->yarn.beta_fast = 32;
    c->yarn.beta_slow = 1;
    c->yarn.truncate = true;
    if (!refuse_yarn_variants(rope, e) || !doc_number(&c->yarn.factor, rope.object, rope.path, "factor", e) ||
        !doc_int_or(&c->yarn.original, rope.object, rope.path, "original_max_position_embeddings", 1,
                    DIMENSION_MAX, e) ||
        !doc_number_or(&c->yarn.attention_factor, rope.object, rope.path, "attention_factor", e) ||
        !doc_number_or(&c->yarn.beta_fast, rope.object, rope.path, "beta_fast", e) ||
        !doc_number_or(&c->yarn.beta_slow, rope.object, rope.path, "beta_slow", e) ||
        !doc_bool_or(&c->yarn.truncate, rope.object, rope.path, "truncate", e) || !check_yarn(c, rope, e))
        return false;
    c->max_position_embeddings = (int64_t)(c->yarn.factor * (double)c->yarn.original);
    return true;
}

/* rope_scaling lies unread beside rope_parameters: it may not ask for what that does not. */
static bool check_unread(struct scope rope, struct scope scaling, bool is_yarn, struct err *e)
{
    bool other = false;
    if (rope.object == scaling.object || !scaling.object) return true;
    if (!read_rope_type(&other, scaling, e)) return false;
    const json_t *factor = json_object_get(scaling.object, "factor");
    if (!other ||
        (is_yarn && json_number_value(factor) == json_number_value(json_object_get(rope.object, "factor"))))
        return true;
    return err_set(e, ERR_FORMAT,
                   "%s: asks for YaRN, and %s beside it does not ask for the same; remove one of the two",
                   scaling.path, rope.path);
}

/* rope_parameters is the name since transformers 5, rope_scaling the one before; either may be missing. */
static bool read_rope(struct config *c, struct scope text, struct err *e)
{
    bool nested = *text.path != 0;
    struct scope rope, scaling;
    if (!get_scope(&rope, text, "rope_parameters", nested ? "text_config.rope_parameters" : "rope_parameters",
                   e) ||
        !get_scope(&scaling, text, "rope_scaling", nested ? "text_config.rope_scaling" : "rope_scaling", e))
        return false;
    if (!rope.object) rope = scaling;
    bool is_yarn;
    return read_rope_type(&is_yarn, rope, e) && read_rotary_dim(c, text, rope, e) &&
           read_theta(c, text, rope, e) && read_mrope(c, rope, e) && (!is_yarn || read_yarn(c, rope, e)) &&
           check_unread(rope, scaling, is_yarn, e);
}

static bool has_layer(const struct config *c, enum layer_kind kind)
{
    for (int i = 0; i < c->n_layers; i++)
        if (c->layer_kinds[i] == kind) return true;
    return false;
}

static bool read_deltanet(struct config *c, struct scope text, struct err *e)
{
    if (!has_layer(c, LAYER_LINEAR_ATTENTION)) return true;
    if (!get_int(&c->linear_key_heads, text, "linear_num_key_heads", 1, HEADS_MAX, e) ||
        !get_int(&c->linear_value_heads, text, "linear_num_value_heads", 1, HEADS_MAX, e) ||
        !get_int(&c->linear_key_dim, text, "linear_key_head_dim", 1, HEAD_DIM_MAX, e) ||
        !get_int(&c->linear_value_dim, text, "linear_value_head_dim", 1, HEAD_DIM_MAX, e) ||
        !get_int(&c->conv_kernel, text, "linear_conv_kernel_dim", 1, KERNEL_MAX, e))
        return false;
    if (c->linear_value_heads % c->linear_key_heads == 0) return true;
    err_set(e, ERR_FORMAT, "%d does not divide linear_num_value_heads %d", c->linear_key_heads,
            c->linear_value_heads);
    return note_field(text, "linear_num_key_heads", e);
}

static bool read_experts(struct config *c, struct scope text, struct err *e)
{
    return get_int(&c->n_experts, text, "num_experts", 1, EXPERTS_MAX, e) &&
           get_int(&c->experts_per_token, text, "num_experts_per_tok", 1, c->n_experts, e) &&
           get_size(&c->moe_intermediate, text, "moe_intermediate_size", e) &&
           get_size(&c->shared_intermediate, text, "shared_expert_intermediate_size", e) &&
           get_int_or(&c->mtp_layers, text, "mtp_num_hidden_layers", 0, LAYERS_MAX, e);
}

static bool check_elements(const char *what, uint64_t rows, uint64_t cols, uint64_t count, struct err *e)
{
    uint64_t n;
    if (fits_mul(rows, cols, &n) && fits_mul(n, count, &n) && n <= ELEMENTS_MAX) return true;
    return err_set(e, ERR_LIMIT, "%s: %" PRIu64 " x %" PRIu64 " x %" PRIu64 " elements are more than 2^56",
                   what, count, rows, cols);
}

static bool check_rows(const char *what, uint64_t rows, struct err *e)
{
    return rows <= (uint64_t)DIMENSION_MAX ||
           err_set(e, ERR_LIMIT, "%s: %" PRIu64 " rows are more than 2^31", what, rows);
}

/* Each number fits on its own; so must the tensors they span. The products formed here cannot wrap: heads and
 * their dimensions are at most 2^16, the others 2^31. */
static bool check_products(const struct config *c, struct err *e)
{
    uint64_t hidden = (uint64_t)c->hidden_size, q_rows = 2ull * (unsigned)c->n_heads * (unsigned)c->head_dim;
    uint64_t key_rows = (uint64_t)c->linear_key_heads * (unsigned)c->linear_key_dim;
    uint64_t value_rows = (uint64_t)c->linear_value_heads * (unsigned)c->linear_value_dim;
    uint64_t qkv_rows = 2 * key_rows + value_rows;
    return check_rows("attention", q_rows, e) && check_rows("linear attention", qkv_rows, e) &&
           check_elements("embedding", (uint64_t)c->vocab_size, hidden, 1, e) &&
           check_elements("attention", q_rows, hidden, 1, e) &&
           check_elements("linear attention", qkv_rows, hidden, 1, e) &&
           check_elements("linear attention state", value_rows, (unsigned)c->linear_key_dim, 1, e) &&
           check_elements("experts", 2 * (uint64_t)c->moe_intermediate, hidden, (unsigned)c->n_experts, e) &&
           check_elements("shared expert", 2 * (uint64_t)c->shared_intermediate, hidden, 1, e);
}

static bool check_vision_elements(const struct config *c, struct err *e)
{
    uint64_t hidden = (uint64_t)c->vision.hidden,
             merge = (uint64_t)c->vision.merge * (unsigned)c->vision.merge;
    uint64_t patch =
        (uint64_t)c->vision.patch * (unsigned)c->vision.patch * (unsigned)c->vision.temporal_patch;
    return check_elements("vision qkv", 3 * hidden, hidden, 1, e) &&
           check_elements("vision mlp", hidden, (uint64_t)c->vision.intermediate, 1, e) &&
           check_elements("vision merger", merge * hidden, merge * hidden, 1, e) &&
           check_elements("vision patches", hidden, patch, (unsigned)c->vision.channels, e) &&
           check_elements("vision positions", (uint64_t)c->vision.n_positions, hidden, 1, e);
}

static bool is_square(int64_t n)
{
    int64_t root = 0;
    while (root * root < n) root++;
    return root * root == n;
}

/* Positions form a square table; a head's rotary angles are two halves (row, column) of pairs, hence the 4.
 */
static bool check_vision(const struct config *c, struct scope v, struct err *e)
{
    if (c->vision.hidden % (4 * (int64_t)c->vision.n_heads) != 0) {
        err_set(e, ERR_FORMAT, "hidden_size %" PRId64 " is no multiple of 4 x %d", c->vision.hidden,
                c->vision.n_heads);
        return note_field(v, "num_heads", e);
    }
    if (c->vision.out_hidden != c->hidden_size) {
        err_set(e, ERR_FORMAT, "%" PRId64 " differs from the text's hidden_size %" PRId64,
                c->vision.out_hidden, c->hidden_size);
        return note_field(v, "out_hidden_size", e);
    }
    if (!is_square(c->vision.n_positions)) {
        err_set(e, ERR_FORMAT, "%" PRId64 " is not a square", c->vision.n_positions);
        return note_field(v, "num_position_embeddings", e);
    }
    return check_vision_elements(c, e);
}

static bool read_vision(struct config *c, struct scope top, struct err *e)
{
    struct scope v;
    if (!get_scope(&v, top, "vision_config", "vision_config", e)) return false;
    if (!v.object) return true;
    c->has_vision = true;
    c->vision.temporal_patch = 2;
    c->vision.merge = 2;
    c->vision.channels = 3;
    return only_string(v, "hidden_act", "gelu_pytorch_tanh", NULL, e) &&
           only_empty(v, "deepstack_visual_indexes", e) &&
           get_int(&c->vision.depth, v, "depth", 1, LAYERS_MAX, e) &&
           get_int(&c->vision.n_heads, v, "num_heads", 1, HEADS_MAX, e) &&
           get_int(&c->vision.patch, v, "patch_size", 1, PATCH_MAX, e) &&
           get_int_or(&c->vision.temporal_patch, v, "temporal_patch_size", 1, PATCH_MAX, e) &&
           get_int_or(&c->vision.merge, v, "spatial_merge_size", 1, 64, e) &&
           get_int_or(&c->vision.channels, v, "in_channels", 1, 64, e) &&
           get_size(&c->vision.hidden, v, "hidden_size", e) &&
           get_size(&c->vision.intermediate, v, "intermediate_size", e) &&
           get_size(&c->vision.out_hidden, v, "out_hidden_size", e) &&
           get_size(&c->vision.n_positions, v, "num_position_embeddings", e) && check_vision(c, v, e);
}

static bool read_token(int64_t *out, const struct config *c, struct scope s, const char *key, struct err *e)
{
    return doc_int_or(out, s.object, s.path, key, 0, c->vocab_size - 1, e);
}

/* An integer, or a list whose first counts here; checkpoint_eos_tokens() reads all of them. */
static bool read_eos(struct config *c, struct scope s, struct err *e)
{
    const json_t *list = json_object_get(s.object, "eos_token_id");
    if (!json_is_array(list)) return read_token(&c->eos_token, c, s, "eos_token_id", e);
    if (json_array_size(list) == 0) return true;
    const json_t *first = json_array_get(list, 0);
    if (json_is_integer(first) && json_integer_value(first) >= 0 &&
        json_integer_value(first) < c->vocab_size) {
        c->eos_token = json_integer_value(first);
        return true;
    }
    err_set(e, ERR_FORMAT, "expected integers from 0 to %" PRId64, c->vocab_size - 1);
    return note_field(s, "eos_token_id", e);
}

static bool read_tokens(struct config *c, struct scope top, struct scope text, struct err *e)
{
    c->image_token = c->video_token = c->vision_start_token = c->vision_end_token = c->eos_token = -1;
    return read_token(&c->image_token, c, top, "image_token_id", e) &&
           read_token(&c->video_token, c, top, "video_token_id", e) &&
           read_token(&c->vision_start_token, c, top, "vision_start_token_id", e) &&
           read_token(&c->vision_end_token, c, top, "vision_end_token_id", e) &&
           read_eos(c, is_given(text, "eos_token_id") ? text : top, e);
}

static bool read_all(struct config *c, const json_t *root, struct err *e)
{
    struct scope top = { root, "" }, text;
    if (!json_is_object(root)) return err_set(e, ERR_FORMAT, "expected an object");
    if (!read_identity(c, top, e) || !get_scope(&text, top, "text_config", "text_config", e)) return false;
    if (!text.object) text = top;
    return refuse_variants(text, e) && read_sizes(c, top, text, e) && read_layers(c, text, e) &&
           read_attention(c, text, e) && read_rope(c, text, e) && read_deltanet(c, text, e) &&
           read_experts(c, text, e) && check_products(c, e) && read_vision(c, top, e) &&
           read_tokens(c, top, text, e);
}

bool config_parse(struct config *c, const json_t *root, struct err *e)
{
    *c = (struct config){ 0 };
    if (read_all(c, root, e)) return true;
    config_deinit(c);
    return false;
}

void config_deinit(struct config *c)
{
    free(c->layer_kinds);
    *c = (struct config){ 0 };
}
