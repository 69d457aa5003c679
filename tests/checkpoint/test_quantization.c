/* quantization_config: the example gives each module its scheme; spellings of schemes; matching rules;
 * messages. */
#include "checkpoint/quantization.h"
#include "checkpoint/temp.h"
#include <time.h>

static const char EXAMPLE[] = "tests/checkpoint/quantization_config.example.json";

static struct quantization *must_quantize(const json_t *root)
{
    struct quantization *q;
    struct err e = { 0 };
    if (!quantization_parse(&q, root, &e)) fail_msg("%s", e.text);
    return q;
}

static void assert_scheme(const struct quantization *q, const char *module, enum scheme want)
{
    enum scheme got = quantization_scheme(q, module, "Linear");
    if (got != want) fail_msg("%s: expected %s, found %s", module, scheme_name(want), scheme_name(got));
}

static void test_example(void **state)
{
    (void)state;
    json_t *root = must_load(EXAMPLE);
    struct quantization *q = must_quantize(root);
    json_decref(root);
#define LAYERS "model.language_model.layers."
    assert_scheme(q, LAYERS "0.mlp.experts.7.gate_proj", SCHEME_NVFP4);
    assert_scheme(q, LAYERS "39.mlp.experts.255.down_proj", SCHEME_NVFP4);
    assert_scheme(q, LAYERS "3.self_attn.q_proj", SCHEME_FP8_DYNAMIC);
    assert_scheme(q, LAYERS "39.self_attn.o_proj", SCHEME_FP8_DYNAMIC);
    assert_scheme(q, LAYERS "0.mlp.shared_expert.up_proj", SCHEME_FP8_DYNAMIC);
    assert_scheme(q, LAYERS "0.mlp.shared_expert_gate", SCHEME_NONE);
    assert_scheme(q, LAYERS "0.mlp.gate", SCHEME_NONE);
    assert_scheme(q, LAYERS "0.linear_attn.in_proj_qkv", SCHEME_NONE);
    assert_scheme(q, LAYERS "0.mlp.experts.7.gate_proj_x", SCHEME_NONE);
    assert_scheme(q, LAYERS "0.mlp.experts.x.gate_proj", SCHEME_NONE);
    assert_scheme(q, "model.visual.blocks.0.attn.qkv", SCHEME_NONE);
    assert_scheme(q, "lm_head", SCHEME_NONE);
    assert_scheme(q, "mtp.layers.0.mlp.experts.3.up_proj", SCHEME_NONE);
    assert_scheme(q, "mtp.layers.0.self_attn.q_proj", SCHEME_NONE);
    assert_scheme(q, "", SCHEME_NONE);
    assert_scheme(q, "\xff", SCHEME_NONE);
    quantization_free(q);
}

/* Every routed expert of the released model. */
static void test_example_counts(void **state)
{
    (void)state;
    static const char *const projections[] = { "gate_proj", "up_proj", "down_proj" };
    json_t *root = must_load(EXAMPLE);
    struct quantization *q = must_quantize(root);
    json_decref(root);
    int counts[N_SCHEMES] = { 0 };
    char name[128];
    for (int layer = 0; layer < 40; layer++)
        for (int expert = 0; expert < 256; expert++)
            for (int p = 0; p < 3; p++) {
                snprintf(name, sizeof name, LAYERS "%d.mlp.experts.%d.%s", layer, expert, projections[p]);
                counts[quantization_scheme(q, name, "Linear")]++;
            }
    assert_int_equal(counts[SCHEME_NVFP4], 40 * 256 * 3);
    quantization_free(q);
}

static void test_absent(void **state)
{
    (void)state;
    static const char *const roots[] = { "{}", "{\"quantization_config\":null}",
                                         "{\"text_config\":{\"quantization_config\":null}}",
                                         "{\"text_config\":3}" };
    for (size_t i = 0; i < sizeof roots / sizeof *roots; i++) {
        json_t *root = must_parse(roots[i]);
        struct quantization *q = must_quantize(root);
        assert_null(q);
        json_decref(root);
    }
    assert_int_equal(quantization_scheme(NULL, "x", "Linear"), SCHEME_NONE);
    quantization_free(NULL);
}

static void test_in_text_config(void **state)
{
    (void)state;
    json_t *inner = must_load(EXAMPLE), *root = json_pack("{s:O}", "text_config", inner);
    struct quantization *q = must_quantize(root);
    assert_scheme(q, "x.self_attn.k_proj", SCHEME_FP8_DYNAMIC);
    quantization_free(q);
    json_object_set(root, "quantization_config", json_object_get(inner, "quantization_config"));
    quantization_free(must_quantize(root));
    json_object_set_new(root, "quantization_config", must_parse("{\"quant_method\":\"compressed-tensors\"}"));
    struct err e = { 0 };
    assert_false(quantization_parse(&q, root, &e));
    assert_message(&e, "", "quantization_config: differs from the one in text_config");
    json_decref(root);
    json_decref(inner);
}

/* A config of these groups and this ignore list. */
static struct quantization *from_groups(const char *groups, const char *ignore)
{
    json_t *root = json_pack("{s:{s:s,s:o,s:o}}", "quantization_config", "quant_method", "compressed-tensors",
                             "config_groups", must_parse(groups), "ignore", must_parse(ignore));
    assert_non_null(root);
    struct quantization *q = must_quantize(root);
    json_decref(root);
    return q;
}

static void test_presets(void **state)
{
    (void)state;
    struct quantization *q =
        from_groups("{\"NVFP4\":[\"re:.*experts\"],\"nvfp4a16\":[\"a.b\"],\"FP8_DYNAMIC\":"
                    "[\"Linear\"]}",
                    "[\"lm_head\", \"Conv1d\"]");
    assert_scheme(q, "m.experts.0", SCHEME_NVFP4);
    assert_scheme(q, "a.b", SCHEME_NVFP4A16);
    assert_scheme(q, "other", SCHEME_FP8_DYNAMIC);
    assert_scheme(q, "lm_head", SCHEME_NONE);
    assert_int_equal(quantization_scheme(q, "other", "Embedding"), SCHEME_NONE);
    assert_int_equal(quantization_scheme(q, "a.b", "Conv1d"), SCHEME_NONE);
    quantization_free(q);
}

#define FP4W "{\"num_bits\":4,\"type\":\"float\",\"strategy\":\"tensor_group\",\"group_size\":16}"
#define FP4I                                                                                                 \
    "{\"num_bits\":4,\"type\":\"float\",\"strategy\":\"tensor_group\",\"group_size\":16,\"dynamic\":"        \
    "\"local\"}"
#define FP8W "{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"channel\",\"actorder\":\"static\"}"
#define FP8T "{\"num_bits\":8,\"type\":\"float\"}"
#define FP8I "{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"token\",\"dynamic\":true}"
#define FP8F "{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"tensor\",\"dynamic\":false}"
#define FP8B "{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"block\",\"block_structure\":[128,128]}"
#define FP8G "{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"group\",\"group_size\":128,\"dynamic\":true}"
#define GROUP(weights, input)                                                                                \
    "{\"targets\":[\"Linear\"],\"weights\":" weights ",\"input_activations\":" input "}"

static void test_schemes(void **state)
{
    (void)state;
    static const struct {
        const char *groups;
        enum scheme want;
    } cases[] = {
        { "{\"g\":" GROUP(FP4W, FP4I) "}", SCHEME_NVFP4 },
        { "{\"g\":" GROUP(FP4W, "null") "}", SCHEME_NVFP4A16 },
        { "{\"g\":" GROUP(FP8W, FP8I) "}", SCHEME_FP8_DYNAMIC },
        { "{\"g\":" GROUP(FP8T, FP8I) "}", SCHEME_FP8_DYNAMIC },
        { "{\"g\":" GROUP(FP8W, "null") "}", SCHEME_FP8A16 },
        { "{\"g\":" GROUP(FP8T, FP8F) "}", SCHEME_FP8 },
        { "{\"g\":" GROUP(FP8W, FP8F) "}", SCHEME_FP8 },
        { "{\"g\":" GROUP(FP8B, FP8G) "}", SCHEME_FP8_BLOCK },
        { "{\"g\":{\"targets\":[\"Linear\"],\"weights\":" FP4W ",\"format\":\"nvfp4-pack-quantized\"}}",
          SCHEME_NVFP4A16 },
        { "{\"g\":{\"targets\":[\"Linear\"],\"weights\":" FP8W ",\"format\":\"naive-quantized\"}}",
          SCHEME_FP8A16 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct quantization *q = from_groups(cases[i].groups, "null");
        assert_scheme(q, "x", cases[i].want);
        quantization_free(q);
    }
    assert_string_equal(scheme_name(SCHEME_NONE), "-");
    assert_string_equal(scheme_name(SCHEME_FP8A16), "FP8A16");
}

/* Exact before pattern before class; inside a kind the first in sorted order; anchored at the start, not the
 * end. */
static void test_order(void **state)
{
    (void)state;
    struct quantization *q = from_groups("{\"FP8_DYNAMIC\":[\"Linear\",\"re:b\",\"x.y\"],"
                                         "\"NVFP4\":[\"re:a.*\",\"re:.*c\",\"re:x\"],"
                                         "\"NVFP4A16\":[\"re:.*b\"]}",
                                         "[\"re:.*skip$\"]");
    assert_scheme(q, "x.y", SCHEME_FP8_DYNAMIC);
    assert_scheme(q, "x.z", SCHEME_NVFP4);
    assert_scheme(q, "x.skip", SCHEME_NONE);
    assert_scheme(q, "x.skipped", SCHEME_NVFP4);
    assert_scheme(q, "bb", SCHEME_NVFP4A16);
    assert_scheme(q, "bc", SCHEME_NVFP4A16);
    assert_scheme(q, "zc", SCHEME_NVFP4);
    assert_scheme(q, "zx", SCHEME_FP8_DYNAMIC);
    quantization_free(q);
}

static void test_python_patterns(void **state)
{
    (void)state;
    struct quantization *q = from_groups(
        "{\"NVFP4\":[\"re:(?!mtp)(?P<l>l\\\\d+)\\\\.(up|down)_proj$\",\"re:.*?\\\\bq\\\\b\"]}", "[]");
    assert_scheme(q, "l12.up_proj", SCHEME_NVFP4);
    assert_scheme(q, "l12.gate_proj", SCHEME_NONE);
    assert_scheme(q, "l12.up_proj.x", SCHEME_NONE);
    assert_scheme(q, "a.q.b", SCHEME_NVFP4);
    quantization_free(q);
}

/* Exponential backtracking stops at the step limit. */
static void test_hostile_pattern(void **state)
{
    (void)state;
    struct quantization *q = from_groups("{\"NVFP4\":[\"re:(a*)*(a*)*(a*)*b\"]}", "[]");
    clock_t begin = clock();
    assert_scheme(q, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac",
                  SCHEME_NONE);
    assert_true(clock() - begin < 5 * CLOCKS_PER_SEC);
    quantization_free(q);
}

struct change {
    const char *path, *value, *message;
};

#define Q  "quantization_config."
#define G0 Q "config_groups.group_0"
#define G1 Q "config_groups.group_1"

static void expect_messages(const struct change *cases, size_t n, enum err_code code)
{
    for (size_t i = 0; i < n; i++) {
        json_t *root = must_load(EXAMPLE);
        struct quantization *q;
        struct err e = { 0 };
        json_change(root, cases[i].path, cases[i].value);
        if (quantization_parse(&q, root, &e)) fail_msg("accepted: %s = %s", cases[i].path, cases[i].value);
        assert_message(&e, "", cases[i].message);
        assert_int_equal(e.code, code);
        assert_null(q);
        json_decref(root);
    }
}

static void test_unsupported(void **state)
{
    (void)state;
    static const struct change cases[] = {
        { Q "quant_method", "\"awq\"",
          Q "quant_method: 'awq' is not supported, only 'compressed-tensors', 'modelopt' and 'fp8' are" },
        { Q "quantization_status", "\"frozen\"",
          Q "quantization_status: 'frozen' is not supported, only 'compressed' is" },
        { Q "transform_config", "{\"a\":1}", Q "transform_config: only an empty one is supported" },
        { Q "sparsity_config", "{\"format\":\"x\"}", Q "sparsity_config: only an empty one is supported" },
        { Q "config_groups.W4A16", "[\"Linear\"]",
          "quantization_config.config_groups: preset 'W4A16' is not supported, only NVFP4, NVFP4A16, "
          "FP8_DYNAMIC, FP8 and FP8_BLOCK are" },
        { G0 ".output_activations", "{}", G0 ".output_activations is not supported" },
        { G0 ".format", "\"pack-quantized\"", G0 ".format: 'pack-quantized' is not supported for NVFP4" },
        { G1 ".format", "\"nvfp4-pack-quantized\"",
          G1 ".format: 'nvfp4-pack-quantized' is not supported for FP8_DYNAMIC" },
        { G0 ".weights.type", "\"int\"",
          G0 ".weights: 4-bit int, strategy 'tensor_group', group_size 16, dynamic "
             "false, scale_dtype torch.float8_e4m3fn is not supported" },
        { G0 ".weights.group_size", "32",
          G0 ".weights: 4-bit float, strategy 'tensor_group', group_size 32" },
        { G0 ".weights.scale_dtype", "\"torch.uint8\"", G0 ".weights: 4-bit float, strategy 'tensor_group'" },
        { G0 ".weights.strategy", "null", G0 ".weights: 4-bit float, strategy 'group', group_size 16" },
        { G0 ".weights.symmetric", "false", G0 ".weights.symmetric: false is not supported" },
        { G0 ".weights.actorder", "\"group\"", G0 ".weights.actorder: 'group' is not supported" },
        { G0 ".weights.dynamic", "true",
          G0 ".weights: 4-bit float, strategy 'tensor_group', group_size 16, "
             "dynamic true" },
        { G0 ".input_activations.dynamic", "false",
          G0 ".input_activations: 4-bit float, strategy 'tensor_group', "
             "group_size 16, dynamic false" },
        { G0 ".input_activations.num_bits", "8", G0 ".input_activations: 8-bit float" },
        { G1 ".weights.strategy", "\"block\"",
          G1 ".weights: 8-bit float, strategy 'block', group_size 0, dynamic false is not supported" },
        { G1 ".weights.block_structure", "[128, 64]",
          G1 ".weights: 8-bit float, strategy 'channel', group_size 0, dynamic false, blocks of 128 x 64" },
        { G1 ".input_activations.strategy", "\"tensor\"",
          G1
          ".input_activations: 8-bit float, strategy 'tensor', group_size 0, dynamic true is not supported" },
    };
    expect_messages(cases, sizeof cases / sizeof *cases, ERR_UNSUPPORTED);
}

static void test_format_messages(void **state)
{
    (void)state;
    static const struct change cases[] = {
        { "quantization_config", "[]", "quantization_config: expected an object" },
        { Q "quant_method", NULL, Q "quant_method: expected a string, found absent" },
        { Q "kv_cache_scheme", "3", Q "kv_cache_scheme: expected an object or null" },
        { Q "config_groups", NULL, Q "config_groups: expected an object" },
        { Q "config_groups.x", "3", Q "config_groups.x: expected an object or a list" },
        { G0 ".targets", NULL, G0 ".targets: expected an array of strings" },
        { G0 ".targets", "[\"a\", 3]", G0 ".targets[1]: expected a name or a pattern" },
        { G0 ".targets", "[\"\"]", G0 ".targets[0]: expected a name or a pattern" },
        { G0 ".targets", "[\"a\\u0000b\"]", G0 ".targets[0]: expected a name or a pattern" },
        { G0 ".targets", "[\"re:(a\"]",
          G0 ".targets[0]: pattern '(a': missing closing parenthesis at byte 2" },
        { G0 ".targets", "[\"re:.*self_attn\\\\.(q|k|v|o)_proj$\"]",
          "target '.*self_attn\\.(q|k|v|o)_proj$' is both " },
        { Q "ignore", "3", Q "ignore: expected an array of strings" },
        { Q "ignore", "[\"re:*\"]", Q "ignore[0]: pattern '*': " },
        { G0 ".weights", "null", G0 ".weights: expected an object" },
        { G0 ".input_activations", "[]", G0 ".input_activations: expected an object" },
        { G0 ".weights.dynamic", "\"yes\"", G0 ".weights.dynamic: expected true, false or \"local\"" },
        { G1 ".weights.block_structure", "[128, 0]",
          G1 ".weights.block_structure: expected two integers above 0" },
        { G0 ".weights.num_bits", "0", G0 ".weights.num_bits: expected 1 to 64, found 0" },
        { G0 ".weights.strategy", "1", G0 ".weights.strategy: expected a string, found an integer" },
    };
    expect_messages(cases, sizeof cases / sizeof *cases, ERR_FORMAT);
}

/* Other tools' words. */

static struct quantization *from_text(const char *text, enum quantization_origin want)
{
    json_t *root = must_parse(text);
    struct quantization *q = must_quantize(root);
    json_decref(root);
    assert_int_equal(quantization_origin(q), want);
    return q;
}

/* Parents stand for what is below them; names with and without prefixes are the same; wildcards match all of
 * a name. */
static void test_modelopt(void **state)
{
    (void)state;
    struct quantization *q =
        from_text("{\"quantization_config\":{\"quant_method\":\"modelopt\",\"quant_algo\":\"NVFP4\","
                  "\"group_size\":16,\"ignore\":[\"lm_head\",\"model.layers.*.mlp.gate\",\"*linear_attn*\","
                  "\"model.language_model.layers.?.self_attn\",\"model.visual\"]}}",
                  QUANTIZATION_MODELOPT);
    assert_scheme(q, LAYERS "0.mlp.experts.7.gate_proj", SCHEME_NVFP4);
    assert_scheme(q, "language_model.model.layers.0.mlp.gate_proj", SCHEME_NVFP4);
    assert_scheme(q, LAYERS "10.mlp.gate", SCHEME_NONE);
    assert_scheme(q, LAYERS "10.linear_attn.out_proj", SCHEME_NONE);
    assert_scheme(q, "model.layers.3.self_attn", SCHEME_NONE);
    assert_scheme(q, "model.layers.3.self_attn.q_proj", SCHEME_NVFP4);
    assert_scheme(q, "model.visual.blocks.0.attn.qkv", SCHEME_NONE);
    assert_scheme(q, "language_model.lm_head", SCHEME_NONE);
    quantization_free(q);
    q = from_text("{\"quantization_config\":{\"producer\":{\"name\":\"modelopt\"},\"quantization\":{"
                  "\"quant_algo\":\"MIXED_PRECISION\",\"exclude_modules\":[\"mtp*\"],\"quantized_layers\":{"
                  "\"model.layers.0.mlp.experts\":{\"quant_algo\":\"W4A16_NVFP4\",\"group_size\":16},"
                  "\"lm_head\":{\"quant_algo\":\"FP8_PB_WO\"},\"a.b\":{\"quant_algo\":"
                  "\"FP8_PER_CHANNEL_PER_TOKEN\"},\"a.c\":{\"quant_algo\":\"FP8\"}}}}}",
                  QUANTIZATION_MODELOPT);
    assert_scheme(q, LAYERS "0.mlp.experts.7.gate_proj", SCHEME_NVFP4A16);
    assert_scheme(q, LAYERS "1.mlp.experts.7.gate_proj", SCHEME_NONE);
    assert_scheme(q, "lm_head", SCHEME_FP8_BLOCK);
    assert_scheme(q, "a.b", SCHEME_FP8_DYNAMIC);
    assert_scheme(q, "a.c", SCHEME_FP8);
    assert_scheme(q, "a.bc", SCHEME_NONE);
    quantization_free(q);
}

static void test_block_fp8(void **state)
{
    (void)state;
    struct quantization *q = from_text(
        "{\"quantization_config\":{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\",\"activation_scheme\":"
        "\"dynamic\","
        "\"weight_block_size\":[128,128],\"modules_to_not_convert\":[\"lm_head\",\"model.visual\"]}}",
        QUANTIZATION_BLOCK_FP8);
    assert_scheme(q, LAYERS "0.mlp.experts.7.gate_proj", SCHEME_FP8_BLOCK);
    assert_scheme(q, "lm_head", SCHEME_NONE);
    assert_scheme(q, "model.visual.merger.linear_fc1", SCHEME_NONE);
    quantization_free(q);
}

static void test_other_messages(void **state)
{
    (void)state;
#define MODELOPT(rest) "{\"quantization_config\":{\"quant_method\":\"modelopt\"" rest "}}"
#define FP8(rest)      "{\"quantization_config\":{\"quant_method\":\"fp8\"" rest "}}"
    static const char *const cases[][2] = {
        { MODELOPT(""), Q "quant_algo: expected a string, found absent" },
        { MODELOPT(",\"quant_algo\":\"MXFP8\""),
          Q "quant_algo: 'MXFP8' is not supported, only NVFP4, W4A16_NVFP4, FP8, FP8_PER_CHANNEL_PER_TOKEN, "
            "FP8_PB_WO and MIXED_PRECISION of them are" },
        { MODELOPT(",\"quant_algo\":\"NVFP4\",\"group_size\":32"),
          Q "group_size: 32 is not supported, NVFP4 has 16" },
        { MODELOPT(",\"quant_algo\":\"NVFP4\",\"ignore\":[\"a[0-9]\"]"),
          Q "ignore: wildcard 'a[0-9]' is not supported, only * and ? are" },
        { MODELOPT(",\"quant_algo\":\"NVFP4\",\"ignore\":[3]"), Q "ignore[0]: expected a name" },
        { MODELOPT(",\"quant_algo\":\"NVFP4\",\"ignore\":{}"), Q "ignore: expected a list of names" },
        { MODELOPT(",\"quant_algo\":\"NVFP4\",\"ignore\":[\"model.\"]"),
          Q "ignore: 'model.' names no module" },
        { MODELOPT(",\"quant_algo\":\"NVFP4\",\"ignore\":[\"re:a\"]"),
          Q "ignore: 're:a': a pattern is not expected here" },
        { MODELOPT(",\"quant_algo\":\"MIXED_PRECISION\""),
          Q "quantized_layers: expected an object, as MIXED_PRECISION needs" },
        { MODELOPT(",\"quant_algo\":\"MIXED_PRECISION\",\"quantized_layers\":{\"a\":3}"),
          Q "quantized_layers.a: expected an object" },
        { MODELOPT(
              ",\"quant_algo\":\"MIXED_PRECISION\",\"quantized_layers\":{\"a\":{\"quant_algo\":\"W8A8\"}}"),
          Q "quantized_layers.a.quant_algo: 'W8A8' is not supported" },
        { MODELOPT(",\"quant_algo\":\"MIXED_PRECISION\",\"quantized_layers\":{\"a\":{\"quant_algo\":\"FP8\"},"
                   "\"model.a\":{\"quant_algo\":\"NVFP4\"}}"),
          "target 'a' is both " },
        { FP8(""), Q "weight_block_size: expected [128, 128]" },
        { FP8(",\"weight_block_size\":[128,64]"), Q "weight_block_size: expected [128, 128]" },
        { FP8(",\"weight_block_size\":[128,128],\"activation_scheme\":\"static\""),
          Q "activation_scheme: 'static' is not supported, only 'dynamic' is" },
        { FP8(",\"weight_block_size\":[128,128],\"activation_scheme\":\"dynamic\",\"fmt\":\"e5m2\""),
          Q "fmt: 'e5m2' is not supported, only 'e4m3' is" },
        { "{\"quantization_config\":{\"quant_method\":3}}", Q "quant_method: expected a string" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *root = must_parse(cases[i][0]);
        struct quantization *q;
        struct err e = { 0 };
        if (quantization_parse(&q, root, &e)) fail_msg("accepted: %s", cases[i][0]);
        assert_message(&e, "", cases[i][1]);
        assert_null(q);
        json_decref(root);
    }
}

static void test_long_pattern(void **state)
{
    (void)state;
    json_t *root = must_load(EXAMPLE);
    char text[5000] = "re:";
    struct quantization *q;
    struct err e = { 0 };
    memset(text + 3, 'a', sizeof text - 4);
    json_object_set_new(json_object_get(root, "quantization_config"), "ignore", json_pack("[s]", text));
    assert_false(quantization_parse(&q, root, &e));
    assert_message(&e, "", Q "ignore[0]: pattern 'aaa");
    json_decref(root);
}

static void test_kv_cache_scheme(void **state)
{
    (void)state;
    json_t *root = must_load(EXAMPLE);
    json_change(root, Q "kv_cache_scheme", "{\"num_bits\":8,\"type\":\"float\"}");
    quantization_free(must_quantize(root));
    json_change(root, Q "quantization_status", NULL);
    json_change(root, Q "ignore", NULL);
    quantization_free(must_quantize(root));
    json_decref(root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_example),         cmocka_unit_test(test_example_counts),
        cmocka_unit_test(test_absent),          cmocka_unit_test(test_in_text_config),
        cmocka_unit_test(test_presets),         cmocka_unit_test(test_schemes),
        cmocka_unit_test(test_order),           cmocka_unit_test(test_python_patterns),
        cmocka_unit_test(test_hostile_pattern), cmocka_unit_test(test_unsupported),
        cmocka_unit_test(test_format_messages), cmocka_unit_test(test_long_pattern),
        cmocka_unit_test(test_kv_cache_scheme), cmocka_unit_test(test_modelopt),
        cmocka_unit_test(test_block_fp8),       cmocka_unit_test(test_other_messages),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
