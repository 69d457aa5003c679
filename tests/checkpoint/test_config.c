/* config.json: the released file gives the documented values; what may be absent; one case per message. */
#include "checkpoint/config.h"
#include "checkpoint/temp.h"

static const char REFERENCE[] = "tests/checkpoint/reference_config.json";

static void test_reference(void **state)
{
    (void)state;
    json_t *root = must_load(REFERENCE);
    struct config c;
    struct err e = { 0 };
    if (!config_parse(&c, root, &e)) fail_msg("%s", e.text);
    assert_string_equal(c.model_type, "qwen3_5_moe");
    assert_string_equal(c.architecture, "Qwen3_5MoeForConditionalGeneration");
    assert_int_equal(c.vocab_size, 248320);
    assert_int_equal(c.hidden_size, 2048);
    assert_int_equal(c.n_layers, 40);
    for (int i = 0; i < 40; i++) assert_int_equal(c.layer_kinds[i] == LAYER_FULL_ATTENTION, i % 4 == 3);
    assert_true(c.rms_norm_eps == 1e-6);
    assert_false(c.tie_word_embeddings);
    assert_int_equal(c.max_position_embeddings, 262144);
    assert_int_equal(c.n_heads, 16);
    assert_int_equal(c.n_kv_heads, 2);
    assert_int_equal(c.head_dim, 256);
    assert_int_equal(c.rotary_dim, 64);
    assert_true(c.rope_theta == 1e7);
    assert_int_equal(c.mrope_section[0], 11);
    assert_int_equal(c.mrope_section[1], 11);
    assert_int_equal(c.mrope_section[2], 10);
    config_deinit(&c);
    config_deinit(&c);
    json_decref(root);
}

static void test_reference_layers(void **state)
{
    (void)state;
    json_t *root = must_load(REFERENCE);
    struct config c;
    struct err e = { 0 };
    if (!config_parse(&c, root, &e)) fail_msg("%s", e.text);
    assert_int_equal(c.linear_key_heads, 16);
    assert_int_equal(c.linear_value_heads, 32);
    assert_int_equal(c.linear_key_dim, 128);
    assert_int_equal(c.linear_value_dim, 128);
    assert_int_equal(c.conv_kernel, 4);
    assert_int_equal(c.n_experts, 256);
    assert_int_equal(c.experts_per_token, 8);
    assert_int_equal(c.moe_intermediate, 512);
    assert_int_equal(c.shared_intermediate, 512);
    assert_int_equal(c.mtp_layers, 1);
    assert_int_equal(c.eos_token, 248044);
    assert_int_equal(c.image_token, 248056);
    assert_int_equal(c.video_token, 248057);
    assert_int_equal(c.vision_start_token, 248053);
    assert_int_equal(c.vision_end_token, 248054);
    config_deinit(&c);
    json_decref(root);
}

static void test_reference_vision(void **state)
{
    (void)state;
    json_t *root = must_load(REFERENCE);
    struct config c;
    struct err e = { 0 };
    if (!config_parse(&c, root, &e)) fail_msg("%s", e.text);
    assert_true(c.has_vision);
    assert_int_equal(c.vision.depth, 27);
    assert_int_equal(c.vision.hidden, 1152);
    assert_int_equal(c.vision.n_heads, 16);
    assert_int_equal(c.vision.intermediate, 4304);
    assert_int_equal(c.vision.channels, 3);
    assert_int_equal(c.vision.patch, 16);
    assert_int_equal(c.vision.temporal_patch, 2);
    assert_int_equal(c.vision.merge, 2);
    assert_int_equal(c.vision.n_positions, 2304);
    assert_int_equal(c.vision.out_hidden, 2048);
    config_deinit(&c);
    json_decref(root);
}

/* Parses the reference after changes given as path, value, path, value, ..., NULL; a NULL value deletes. */
static void parse_changed(struct config *c, const char *const *changes)
{
    json_t *root = must_load(REFERENCE);
    struct err e = { 0 };
    for (; changes[0]; changes += 2) json_change(root, changes[0], changes[1]);
    if (!config_parse(c, root, &e)) fail_msg("%s", e.text);
    json_decref(root);
}

#define CHANGED(c, ...) parse_changed(c, (const char *const[]){ __VA_ARGS__, NULL })

static void test_optional_fields(void **state)
{
    (void)state;
    struct config c;
    CHANGED(&c, "vision_config", NULL, "architectures", NULL, "image_token_id", NULL, "video_token_id",
            "null", "vision_start_token_id", NULL, "vision_end_token_id", NULL, "text_config.eos_token_id",
            NULL, "text_config.mtp_num_hidden_layers", NULL, "text_config.rms_norm_eps", NULL,
            "text_config.hidden_act", NULL, "text_config.attention_bias", NULL,
            "text_config.attn_output_gate", NULL, "text_config.tie_word_embeddings", NULL,
            "tie_word_embeddings", NULL, "text_config.max_position_embeddings", NULL,
            "text_config.layer_types", NULL, "text_config.full_attention_interval", NULL,
            "text_config.rope_parameters.mrope_section", NULL);
    assert_string_equal(c.architecture, "");
    assert_false(c.has_vision);
    assert_int_equal(c.vision.depth, 0);
    assert_int_equal(c.image_token, -1);
    assert_int_equal(c.video_token, -1);
    assert_int_equal(c.vision_start_token, -1);
    assert_int_equal(c.vision_end_token, -1);
    assert_int_equal(c.eos_token, -1);
    assert_int_equal(c.mtp_layers, 0);
    assert_true(c.rms_norm_eps == 1e-6);
    assert_false(c.tie_word_embeddings);
    assert_int_equal(c.layer_kinds[3], LAYER_FULL_ATTENTION);
    assert_int_equal(c.layer_kinds[4], LAYER_LINEAR_ATTENTION);
    assert_int_equal(c.mrope_section[0], 32);
    assert_int_equal(c.mrope_section[2], 0);
    config_deinit(&c);
}

static void test_tied_embeddings(void **state)
{
    (void)state;
    struct config c;
    CHANGED(&c, "tie_word_embeddings", NULL, "text_config.tie_word_embeddings", "true");
    assert_true(c.tie_word_embeddings);
    config_deinit(&c);
    CHANGED(&c, "tie_word_embeddings", "true", "text_config.tie_word_embeddings", "false");
    assert_true(c.tie_word_embeddings);
    config_deinit(&c);
}

static void test_rope_spellings(void **state)
{
    (void)state;
    struct config c;
    CHANGED(&c, "text_config.rope_parameters", NULL, "text_config.rope_theta", "5000.5",
            "text_config.rope_scaling", "null", "text_config.partial_rotary_factor", "0.5");
    assert_true(c.rope_theta == 5000.5);
    assert_int_equal(c.rotary_dim, 128);
    assert_int_equal(c.mrope_section[0], 64);
    config_deinit(&c);
    CHANGED(&c, "text_config.rope_parameters", NULL, "text_config.rope_theta", "100",
            "text_config.rope_scaling", "{\"type\":\"mrope\",\"mrope_section\":[16,8,8]}",
            "text_config.partial_rotary_factor", NULL);
    assert_int_equal(c.rotary_dim, 64);
    assert_int_equal(c.mrope_section[1], 8);
    config_deinit(&c);
}

static void test_head_dim_absent(void **state)
{
    (void)state;
    struct config c;
    CHANGED(&c, "text_config.head_dim", NULL, "text_config.rope_parameters.mrope_section", NULL);
    assert_int_equal(c.head_dim, 128);
    assert_int_equal(c.rotary_dim, 32);
    config_deinit(&c);
}

static void test_layer_patterns(void **state)
{
    (void)state;
    struct config c;
    CHANGED(&c, "text_config.num_hidden_layers", "2", "text_config.layer_types",
            "[\"full_attention\",\"full_attention\"]", "text_config.linear_num_key_heads", NULL);
    assert_int_equal(c.layer_kinds[0], LAYER_FULL_ATTENTION);
    assert_int_equal(c.linear_value_heads, 0);
    assert_int_equal(c.conv_kernel, 0);
    config_deinit(&c);
    CHANGED(&c, "text_config.num_hidden_layers", "2", "text_config.layer_types",
            "[\"linear_attention\",\"linear_attention\"]");
    assert_int_equal(c.layer_kinds[1], LAYER_LINEAR_ATTENTION);
    config_deinit(&c);
    CHANGED(&c, "text_config.layer_types", "null", "text_config.full_attention_interval", "1");
    assert_int_equal(c.layer_kinds[0], LAYER_FULL_ATTENTION);
    config_deinit(&c);
}

static void test_text_only(void **state)
{
    (void)state;
    json_t *root = must_load(REFERENCE), *text = json_object_get(root, "text_config");
    struct config c;
    struct err e = { 0 };
    if (!config_parse(&c, text, &e)) fail_msg("%s", e.text);
    assert_string_equal(c.model_type, "qwen3_5_moe_text");
    assert_int_equal(c.n_layers, 40);
    assert_false(c.has_vision);
    config_deinit(&c);
    json_change(text, "hidden_size", NULL);
    assert_false(config_parse(&c, text, &e));
    assert_message(&e, "", "hidden_size: expected an integer, found absent");
    json_decref(root);
}

static void test_demo(void **state)
{
    (void)state;
    json_t *root = must_load("models/demo/config.json");
    struct config c;
    struct err e = { 0 };
    if (!config_parse(&c, root, &e)) fail_msg("%s", e.text);
    assert_int_equal(c.n_layers, 4);
    assert_int_equal(c.layer_kinds[3], LAYER_FULL_ATTENTION);
    assert_int_equal(c.n_experts, 16);
    config_deinit(&c);
    json_decref(root);
}

static void test_eos_list(void **state)
{
    (void)state;
    struct config c;
    CHANGED(&c, "text_config.eos_token_id", "[7, 8]");
    assert_int_equal(c.eos_token, 7);
    config_deinit(&c);
    CHANGED(&c, "text_config.eos_token_id", "null", "eos_token_id", "9");
    assert_int_equal(c.eos_token, 9);
    config_deinit(&c);
    CHANGED(&c, "text_config.eos_token_id", "[]");
    assert_int_equal(c.eos_token, -1);
    config_deinit(&c);
}

#define ROPE "text_config.rope_parameters."
#define YARN ROPE "rope_type", "\"yarn\"", ROPE "factor", "4.0"

static void test_yarn(void **state)
{
    (void)state;
    struct config c;
    CHANGED(&c, "tie_word_embeddings", "false");
    assert_true(c.yarn.factor == 0);
    config_deinit(&c);
    CHANGED(&c, YARN);
    assert_true(c.yarn.factor == 4 && c.yarn.beta_fast == 32 && c.yarn.beta_slow == 1);
    assert_true(c.yarn.attention_factor == 0 && c.yarn.truncate);
    assert_int_equal(c.yarn.original, 262144);
    assert_int_equal(c.max_position_embeddings, 1048576);
    config_deinit(&c);
    /* the limit is the product whatever max_position_embeddings says */
    CHANGED(&c, YARN, ROPE "original_max_position_embeddings", "32768", ROPE "factor", "1.5", ROPE "truncate",
            "false", ROPE "attention_factor", "1.25", ROPE "beta_fast", "64", ROPE "beta_slow", "2",
            "text_config.max_position_embeddings", "1010000");
    assert_int_equal(c.yarn.original, 32768);
    assert_int_equal(c.max_position_embeddings, 49152);
    assert_false(c.yarn.truncate);
    assert_true(c.yarn.attention_factor == 1.25 && c.yarn.beta_fast == 64 && c.yarn.beta_slow == 2);
    config_deinit(&c);
    /* the older names */
    CHANGED(&c, YARN, ROPE "rope_type", NULL, ROPE "type", "\"yarn\"");
    assert_int_equal(c.max_position_embeddings, 1048576);
    config_deinit(&c);
    CHANGED(&c, YARN, ROPE "type", "\"mrope\"");
    assert_int_equal(c.max_position_embeddings, 1048576);
    config_deinit(&c);
    CHANGED(&c, "text_config.rope_theta", "1e7", "text_config.rope_parameters", "null",
            "text_config.rope_scaling", "{\"type\":\"yarn\",\"factor\":2}");
    assert_int_equal(c.max_position_embeddings, 524288);
    config_deinit(&c);
}

/* Qwen's older recipe, a rope_scaling added by hand, in a file that has rope_parameters. */
static void test_two_places(void **state)
{
    (void)state;
    static const char yarn[] = "{\"rope_type\":\"yarn\",\"factor\":4.0}";
    struct config c;
    struct err e = { 0 };
    CHANGED(&c, "text_config.rope_scaling", "{\"type\":\"mrope\",\"mrope_section\":[11,11,10]}");
    assert_true(c.yarn.factor == 0);
    config_deinit(&c);
    CHANGED(&c, YARN, "text_config.rope_scaling", yarn);
    assert_int_equal(c.max_position_embeddings, 1048576);
    config_deinit(&c);
    for (int i = 0; i < 2; i++) {
        json_t *root = must_load(REFERENCE);
        json_change(root, "text_config.rope_scaling", yarn);
        if (i == 1) json_change(root, ROPE "rope_type", "\"yarn\"");
        if (i == 1) json_change(root, ROPE "factor", "2");
        assert_false(config_parse(&c, root, &e));
        assert_message(
            &e, "",
            "text_config.rope_scaling: asks for YaRN, and text_config.rope_parameters beside it does "
            "not ask for the same; remove one of the two");
        json_decref(root);
    }
}

static void test_broken_yarn(void **state)
{
    (void)state;
    static const struct {
        const char *key, *value, *message;
    } cases[] = {
        { "factor", NULL, "factor: expected a number, found absent" },
        { "factor", "\"4\"", "factor: expected a number, found a string" },
        { "factor", "0.9", "factor: 0.9 is not 1 or more" },
        { "factor", "8192", "factor: 8192 is not small enough for 2^31 positions" },
        { "original_max_position_embeddings", "0", "original_max_position_embeddings: expected 1 to" },
        { "original_max_position_embeddings", "1.5",
          "original_max_position_embeddings: expected an integer" },
        { "attention_factor", "0", "attention_factor: 0 is not above 0" },
        { "beta_slow", "0", "beta_slow: 0 is not above 0" },
        { "beta_slow", "33", "beta_fast: 32 is not beta_slow or more" },
        { "truncate", "1", "truncate: expected true or false, found an integer" },
        { "mscale", "1.0", "mscale: is not supported; attention_factor is" },
        { "extrapolation_factor", "1.0", "extrapolation_factor: is not supported; attention_factor is" },
        { "type", "\"default\"", "type: 'default' contradicts rope_type 'yarn'; one of the two is enough" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *root = must_load(REFERENCE);
        char path[100];
        struct config c;
        struct err e = { 0 };
        json_change(root, ROPE "rope_type", "\"yarn\"");
        json_change(root, ROPE "factor", "4");
        snprintf(path, sizeof path, ROPE "%s", cases[i].key);
        json_change(root, path, cases[i].value);
        if (config_parse(&c, root, &e)) fail_msg("accepted: %s = %s", path, cases[i].value);
        assert_message(&e, ROPE, cases[i].message);
        json_decref(root);
    }
}

struct change {
    const char *path, *value, *message;
};

static void expect_messages(const struct change *cases, size_t n, enum err_code code)
{
    for (size_t i = 0; i < n; i++) {
        json_t *root = must_load(REFERENCE);
        struct config c;
        struct err e = { 0 };
        json_change(root, cases[i].path, cases[i].value);
        if (config_parse(&c, root, &e)) fail_msg("accepted: %s = %s", cases[i].path, cases[i].value);
        assert_message(&e, "", cases[i].message);
        assert_int_equal(e.code, code);
        assert_null(c.layer_kinds);
        json_decref(root);
    }
}

static void test_unsupported(void **state)
{
    (void)state;
    static const struct change cases[] = {
        { "model_type", "\"llama\"",
          "model_type: 'llama' is not supported, only qwen3_5_moe and qwen3_6_moe are" },
        { "model_type", "\"qwen3_5_moelike\"", "model_type: 'qwen3_5_moelike' is not supported" },
        { "model_type", "\"qwen3_5_moe_a23456789b123456789c123456789d123456789e123456789f123\"",
          "model_type: 'qwen3_5_moe_a23456789b123456789c123456789d123456789e123456789f123' is longer than 63 "
          "bytes" },
        { "architectures", "[\"a123456789b123456789c123456789d123456789e123456789f123456789g123\"]",
          "architectures: 'a123456789b123456789c123456789d123456789e123456789f123456789g123' is longer than "
          "63" },
        { "text_config.hidden_act", "\"gelu\"",
          "text_config.hidden_act: 'gelu' is not supported, only 'silu' is" },
        { "text_config.output_gate_type", "\"sigmoid\"",
          "text_config.output_gate_type: 'sigmoid' is not supported, only 'silu' is" },
        { "text_config.attention_bias", "true", "text_config.attention_bias: true is not supported" },
        { "text_config.attn_output_gate", "false", "text_config.attn_output_gate: false is not supported" },
        { "text_config.mtp_use_dedicated_embeddings", "true",
          "text_config.mtp_use_dedicated_embeddings: true is not supported" },
        { "text_config.norm_topk_prob", "false", "text_config.norm_topk_prob: false is not supported" },
        { "text_config.mlp_only_layers", "[1]",
          "text_config.mlp_only_layers: only an empty list is supported" },
        { "text_config.rope_parameters.rope_type", "\"longrope\"",
          "text_config.rope_parameters.rope_type: 'longrope' is not supported, only 'default' and 'yarn' "
          "are" },
        { "text_config.rope_parameters.rope_type", "\"mrope\"",
          "text_config.rope_parameters.rope_type: 'mrope' is not supported, only 'default' and 'yarn' are" },
        { "text_config.rope_parameters.type", "\"linear\"",
          "text_config.rope_parameters.type: 'linear' is not supported, only 'default' and 'yarn' are" },
        { "text_config.rope_parameters.mrope_interleaved", "false",
          "text_config.rope_parameters.mrope_interleaved: false is not supported" },
        { "vision_config.hidden_act", "\"silu\"",
          "vision_config.hidden_act: 'silu' is not supported, only 'gelu_pytorch_tanh' is" },
        { "vision_config.deepstack_visual_indexes", "[8]",
          "vision_config.deepstack_visual_indexes: only an empty list is supported" },
    };
    expect_messages(cases, sizeof cases / sizeof *cases, ERR_UNSUPPORTED);
}

static void test_required(void **state)
{
    (void)state;
    static const struct change cases[] = {
        { "model_type", NULL, "model_type: expected a string, found absent" },
        { "text_config", "3", "text_config: expected an object" },
        { "text_config.vocab_size", NULL, "text_config.vocab_size: expected an integer, found absent" },
        { "text_config.hidden_size", NULL, "text_config.hidden_size: expected an integer, found absent" },
        { "text_config.num_hidden_layers", NULL,
          "text_config.num_hidden_layers: expected an integer, found" },
        { "text_config.num_attention_heads", NULL, "text_config.num_attention_heads: expected an integer" },
        { "text_config.num_key_value_heads", NULL, "text_config.num_key_value_heads: expected an integer" },
        { "text_config.linear_num_key_heads", NULL, "text_config.linear_num_key_heads: expected an integer" },
        { "text_config.linear_num_value_heads", NULL, "text_config.linear_num_value_heads: expected an" },
        { "text_config.linear_key_head_dim", NULL, "text_config.linear_key_head_dim: expected an integer" },
        { "text_config.linear_value_head_dim", NULL,
          "text_config.linear_value_head_dim: expected an integer" },
        { "text_config.linear_conv_kernel_dim", NULL, "text_config.linear_conv_kernel_dim: expected an" },
        { "text_config.num_experts", NULL, "text_config.num_experts: expected an integer, found absent" },
        { "text_config.num_experts_per_tok", NULL, "text_config.num_experts_per_tok: expected an integer" },
        { "text_config.moe_intermediate_size", NULL,
          "text_config.moe_intermediate_size: expected an integer" },
        { "text_config.shared_expert_intermediate_size", NULL,
          "text_config.shared_expert_intermediate_size: expected an integer, found absent" },
        { "text_config.rope_parameters", NULL, "text_config.rope_theta: expected a number, found absent" },
        { "text_config.rope_parameters", "[]", "text_config.rope_parameters: expected an object" },
        { "vision_config", "true", "vision_config: expected an object" },
        { "vision_config.depth", NULL, "vision_config.depth: expected an integer, found absent" },
        { "vision_config.num_heads", NULL, "vision_config.num_heads: expected an integer, found absent" },
        { "vision_config.patch_size", NULL, "vision_config.patch_size: expected an integer, found absent" },
        { "vision_config.hidden_size", NULL, "vision_config.hidden_size: expected an integer, found absent" },
        { "vision_config.intermediate_size", NULL, "vision_config.intermediate_size: expected an integer" },
        { "vision_config.out_hidden_size", NULL, "vision_config.out_hidden_size: expected an integer" },
        { "vision_config.num_position_embeddings", NULL,
          "vision_config.num_position_embeddings: expected an" },
        { "architectures", "\"x\"", "architectures: expected an array of strings" },
        { "text_config.layer_types", "{}", "text_config.layer_types: expected an array" },
        { "text_config.hidden_act", "1", "text_config.hidden_act: expected a string, found an integer" },
        { "text_config.attention_bias", "0", "text_config.attention_bias: expected true or false, found" },
    };
    expect_messages(cases, sizeof cases / sizeof *cases, ERR_FORMAT);
}

static void test_ranges(void **state)
{
    (void)state;
    static const struct change cases[] = {
        { "text_config.hidden_size", "0", "text_config.hidden_size: expected 1 to 2147483648, found 0" },
        { "text_config.vocab_size", "-1", "text_config.vocab_size: expected 1 to 2147483648, found -1" },
        { "text_config.num_hidden_layers", "4097", "text_config.num_hidden_layers: expected 1 to 4096" },
        { "text_config.num_hidden_layers", "41",
          "text_config.layer_types: 40 entries for num_hidden_layers = 41" },
        { "text_config.layer_types", "[1]", "text_config.layer_types: 1 entries for num_hidden_layers = 40" },
        { "text_config.full_attention_interval", "0",
          "text_config.full_attention_interval: expected 1 to 4096" },
        { "text_config.rms_norm_eps", "0", "text_config.rms_norm_eps: 0 is not between 0 and 1" },
        { "text_config.num_attention_heads", "65537",
          "text_config.num_attention_heads: expected 1 to 65536" },
        { "text_config.num_key_value_heads", "3",
          "text_config.num_key_value_heads: 3 does not divide num_attention_heads 16" },
        { "text_config.linear_num_key_heads", "5",
          "text_config.linear_num_key_heads: 5 does not divide linear_num_value_heads 32" },
        { "text_config.num_experts", "65537", "text_config.num_experts: expected 1 to 65536, found 65537" },
        { "text_config.num_experts_per_tok", "257", "text_config.num_experts_per_tok: expected 1 to 256" },
        { "text_config.rope_parameters.partial_rotary_factor", "1.5",
          "text_config.rope_parameters.partial_rotary_factor: 1.5 of head_dim 256 is not an even number from "
          "2" },
        { "text_config.head_dim", "12",
          "text_config.rope_parameters.partial_rotary_factor: 0.25 of head_dim 12 is not an even number" },
        { "text_config.rope_parameters.rope_theta", "1",
          "text_config.rope_parameters.rope_theta: 1 is not above 1" },
        { "text_config.rope_parameters.mrope_section", "[11, 11, 11]",
          "text_config.rope_parameters.mrope_section: expected three integers whose sum is half the rotary "
          "dimensions, 32" },
        { "text_config.rope_parameters.mrope_section", "[33, 0, -1]",
          "text_config.rope_parameters.mrope_section: expected three integers" },
        { "text_config.rope_parameters.mrope_section", "[32]",
          "text_config.rope_parameters.mrope_section: expected three integers" },
        { "vision_config.num_heads", "7",
          "vision_config.num_heads: hidden_size 1152 is no multiple of 4 x 7" },
        { "vision_config.out_hidden_size", "1024",
          "vision_config.out_hidden_size: 1024 differs from the text's hidden_size 2048" },
        { "vision_config.num_position_embeddings", "2305",
          "vision_config.num_position_embeddings: 2305 is not a square" },
        { "image_token_id", "248320", "image_token_id: expected 0 to 248319, found 248320" },
        { "text_config.eos_token_id", "-1", "text_config.eos_token_id: expected 0 to 248319, found -1" },
        { "text_config.eos_token_id", "[248320]",
          "text_config.eos_token_id: expected integers from 0 to 248319" },
    };
    expect_messages(cases, sizeof cases / sizeof *cases, ERR_FORMAT);
}

/* Numbers that pass one by one but whose tensors are too large. */
static void test_products(void **state)
{
    (void)state;
    static const char big[] = "2147483648";
    static const struct {
        const char *key[4], *value[4], *message; /* a NULL key: no more */
    } cases[] = {
        { { "text_config.vocab_size", "text_config.hidden_size" },
          { big, big },
          "embedding: 1 x 2147483648 x 2147483648 elements are more than 2^56" },
        { { "text_config.num_attention_heads", "text_config.head_dim", "text_config.hidden_size",
            "text_config.rope_parameters.mrope_section" },
          { "16384", "65536", big, "null" },
          "attention: 1 x 2147483648 x 2147483648 elements are" },
        { { "text_config.linear_num_value_heads", "text_config.linear_value_head_dim",
            "text_config.hidden_size" },
          { "32768", "32768", big },
          "linear attention: 1 x 1073745920 x 2147483648 elements are" },
        { { "text_config.linear_num_value_heads", "text_config.linear_value_head_dim",
            "text_config.linear_key_head_dim" },
          { "32768", "32768", "65536" },
          NULL },
        { { "text_config.moe_intermediate_size", "text_config.hidden_size" },
          { big, "1048576" },
          "experts: 256 x 4294967296 x 1048576 elements are" },
        { { "text_config.shared_expert_intermediate_size", "text_config.hidden_size" },
          { big, big },
          "shared expert: 1 x 4294967296 x 2147483648 elements are" },
        { { "text_config.num_attention_heads", "text_config.rope_parameters.mrope_section" },
          { "65536", "null" },
          NULL },
        { { "vision_config.hidden_size", "vision_config.depth" },
          { big, "1" },
          "vision qkv: 1 x 6442450944 x 2147483648 elements are" },
        { { "vision_config.intermediate_size", "vision_config.hidden_size" },
          { big, "134217728" },
          "vision mlp: 1 x 134217728 x 2147483648 elements are" },
        { { "vision_config.spatial_merge_size", "vision_config.hidden_size" },
          { "64", "1048576" },
          "vision merger: 1 x 4294967296 x 4294967296 elements are" },
        { { "vision_config.patch_size", "vision_config.temporal_patch_size" }, { "1024", "1024" }, NULL },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *root = must_load(REFERENCE);
        struct config c;
        struct err e = { 0 };
        for (int k = 0; k < 4 && cases[i].key[k]; k++) json_change(root, cases[i].key[k], cases[i].value[k]);
        bool ok = config_parse(&c, root, &e);
        if (ok != !cases[i].message) fail_msg("case %zu: %s", i, e.text);
        if (!ok) assert_message(&e, "", cases[i].message);
        config_deinit(&c);
        json_decref(root);
    }
}

static void test_rows(void **state)
{
    (void)state;
    json_t *root = must_load(REFERENCE);
    struct config c;
    struct err e = { 0 };
    json_change(root, "text_config.linear_num_value_heads", "65536");
    json_change(root, "text_config.linear_value_head_dim", "65536");
    assert_false(config_parse(&c, root, &e));
    assert_message(&e, "", "linear attention: 4294971392 rows are more than 2^31");
    json_change(root, "text_config.num_attention_heads", "65536");
    json_change(root, "text_config.head_dim", "65536");
    json_change(root, "text_config.rope_parameters.mrope_section", NULL);
    assert_false(config_parse(&c, root, &e));
    assert_message(&e, "", "attention: 8589934592 rows are more than 2^31");
    json_decref(root);
}

static void test_layer_type_names(void **state)
{
    (void)state;
    json_t *root = must_load(REFERENCE);
    json_t *types = json_object_get(json_object_get(root, "text_config"), "layer_types");
    struct config c;
    struct err e = { 0 };
    json_array_set_new(types, 1, json_string("sliding_attention"));
    assert_false(config_parse(&c, root, &e));
    assert_message(&e, "",
                   "text_config.layer_types[1]: 'sliding_attention' is not supported, only "
                   "'linear_attention' and 'full_attention' are");
    json_array_set_new(types, 1, json_integer(3));
    assert_false(config_parse(&c, root, &e));
    assert_message(&e, "", "text_config.layer_types[1]: expected a string");
    json_decref(root);
}

static void test_head_dim_message(void **state)
{
    (void)state;
    json_t *root = must_load(REFERENCE);
    struct config c;
    struct err e = { 0 };
    json_change(root, "text_config.head_dim", NULL);
    json_change(root, "text_config.num_attention_heads", "24");
    assert_false(config_parse(&c, root, &e));
    assert_message(&e, "",
                   "text_config.head_dim: absent, and hidden_size 2048 is no multiple of "
                   "num_attention_heads 24");
    json_decref(root);
    root = json_array();
    assert_false(config_parse(&c, root, &e));
    assert_message(&e, "", "expected an object");
    json_decref(root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference),
        cmocka_unit_test(test_reference_layers),
        cmocka_unit_test(test_reference_vision),
        cmocka_unit_test(test_optional_fields),
        cmocka_unit_test(test_tied_embeddings),
        cmocka_unit_test(test_rope_spellings),
        cmocka_unit_test(test_head_dim_absent),
        cmocka_unit_test(test_layer_patterns),
        cmocka_unit_test(test_text_only),
        cmocka_unit_test(test_demo),
        cmocka_unit_test(test_eos_list),
        cmocka_unit_test(test_yarn),
        cmocka_unit_test(test_broken_yarn),
        cmocka_unit_test(test_two_places),
        cmocka_unit_test(test_unsupported),
        cmocka_unit_test(test_required),
        cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_layer_type_names),
        cmocka_unit_test(test_head_dim_message),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
