/* The card's recipe as it is written down: quantization_config from names alone, recipe.yaml, and the byte
 * vectors that fix the packed formats. */
#include "num/fp8.h"
#include "num/nvfp4.h"
#include "quantize/fixture.h"
#include "quantize/modules.h"
#include "quantize/plan.h"
#include <yaml.h>

/* Quantization_config. */

struct names {
    char *items[2048];
    int n_dims[2048];
    size_t n;
};

static void add(struct names *l, int n_dims, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void add(struct names *l, int n_dims, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    assert_true(l->n < 2048 && vasprintf(&l->items[l->n], format, args) > 0);
    va_end(args);
    l->n_dims[l->n++] = n_dims;
}

static void add_layer(struct names *l, const char *stem, int layer, bool full)
{
    static const char *const delta[] = { "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj" };
    static const char *const attention[] = { "k_proj", "o_proj", "q_proj", "v_proj" };
    static const char *const shared[] = { "down_proj", "gate_proj", "up_proj" };
    add(l, 1, "%slayers.%d.input_layernorm.weight", stem, layer);
    add(l, 3, "%slayers.%d.mlp.experts.down_proj", stem, layer);
    add(l, 3, "%slayers.%d.mlp.experts.gate_up_proj", stem, layer);
    add(l, 2, "%slayers.%d.mlp.gate.weight", stem, layer);
    for (int i = 0; i < 3; i++) add(l, 2, "%slayers.%d.mlp.shared_expert.%s.weight", stem, layer, shared[i]);
    add(l, 2, "%slayers.%d.mlp.shared_expert_gate.weight", stem, layer);
    for (int i = 0; full && i < 4; i++)
        add(l, 2, "%slayers.%d.self_attn.%s.weight", stem, layer, attention[i]);
    for (int i = 0; !full && i < 5; i++)
        add(l, 2, "%slayers.%d.linear_attn.%s.weight", stem, layer, delta[i]);
    if (full)
        add(l, 1, "%slayers.%d.self_attn.q_norm.weight", stem, layer);
    else
        add(l, 3, "%slayers.%d.linear_attn.conv1d.weight", stem, layer);
    if (!full) add(l, 1, "%slayers.%d.linear_attn.A_log", stem, layer);
}

/* The released model's names, in the order of no file. */
static void reference_names(struct names *l, int n_layers, int every, int depth)
{
    static const char *const block[] = { "mlp.linear_fc2", "attn.proj", "mlp.linear_fc1", "attn.qkv" };
    add(l, 2, "lm_head.weight");
    for (int i = n_layers; i-- > 0;) add_layer(l, "model.language_model.", i, i % every == every - 1);
    add(l, 2, "model.language_model.embed_tokens.weight");
    for (int i = 0; i < depth; i++)
        for (int k = 0; k < 4; k++) {
            add(l, 2, "model.visual.blocks.%d.%s.weight", i, block[k]);
            add(l, 1, "model.visual.blocks.%d.%s.bias", i, block[k]);
        }
    add(l, 2, "model.visual.merger.linear_fc2.weight");
    add(l, 2, "model.visual.merger.linear_fc1.weight");
    add(l, 1, "model.visual.merger.norm.weight");
    add(l, 5, "model.visual.patch_embed.proj.weight");
    add(l, 2, "model.visual.pos_embed.weight");
    add(l, 2, "mtp.fc.weight");
    add_layer(l, "mtp.", 0, true);
}

static void block_equals_the_example(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct names l = { 0 };
    json_t *example, *config, *block;
    size_t n_ignored;
    assert_true(doc_load(&example, "tests/checkpoint/quantization_config.example.json", 1 << 20, &e));
    assert_true(doc_load(&config, "tests/checkpoint/reference_config.json", 1 << 20, &e));
    json_t *text = json_object_get(config, "text_config");
    int64_t n_layers, every, depth, n_experts;
    assert_true(doc_int(&n_layers, text, "", "num_hidden_layers", 1, 100, &e) &&
                doc_int(&every, text, "", "full_attention_interval", 1, 100, &e) &&
                doc_int(&n_experts, text, "", "num_experts", 1, 1000, &e) &&
                doc_int(&depth, json_object_get(config, "vision_config"), "", "depth", 1, 100, &e));
    reference_names(&l, (int)n_layers, (int)every, (int)depth);
    struct plan_names names = { (const char *const *)l.items, l.n_dims, l.n, (int)n_experts };
    if (!plan_block(&block, &n_ignored, &names, recipe_card(), &e)) fail_msg("%s", e.text);
    assert_int_equal(n_ignored, 341);
    char *have = json_dumps(block, JSON_INDENT(2) | JSON_SORT_KEYS);
    char *want = json_dumps(example, JSON_INDENT(2) | JSON_SORT_KEYS);
    assert_string_equal(have, want);
    free(have);
    free(want);
    json_decref(block);
    json_decref(config);
    json_decref(example);
    for (size_t i = 0; i < l.n; i++) free(l.items[i]);
}

static void one_format_is_named_at_the_top(void **state)
{
    (void)state;
    static const char *const target[] = { "re:.*mlp\\.experts\\.\\d+\\.down_proj$" };
    static const struct recipe_group group = { "group_0", SCHEME_NVFP4A16, target, 1 };
    static const struct recipe recipe = { .name = "one", .groups = &group, .n_groups = 1 };
    struct err e = { 0 };
    json_t *root, *ignore = json_array();
    assert_true(recipe_config(&root, &recipe, ignore, &e));
    json_t *config = json_object_get(root, "quantization_config");
    assert_string_equal(json_string_value(json_object_get(config, "format")), "nvfp4-pack-quantized");
    json_t *g = json_object_get(json_object_get(config, "config_groups"), "group_0");
    assert_true(json_is_null(json_object_get(g, "input_activations")));
    json_decref(root);
    json_decref(ignore);
}

static void modules_are_told_apart(void **state)
{
    (void)state;
    struct place p;
    size_t stem;
    bool gate_up;
    assert_true(module_place(&p, "model.language_model.layers.7.mlp.experts.12.up_proj", true));
    assert_int_equal(p.section, PLACE_LAYER);
    assert_int_equal(p.layer, 7);
    assert_int_equal(p.expert, 12);
    assert_int_equal(p.part, PART_UP);
    assert_true(module_place(&p, "model.layers.0.mlp.gate", true) && p.expert == -1);
    assert_true(module_place(&p, "mtp.layers.0.mlp.experts.0.up_proj", true) && p.section == PLACE_DRAFT);
    assert_false(module_place(&p, "model.language_model.embed_tokens", true));
    assert_false(module_place(&p, "model.visual.pos_embed", true));
    assert_false(module_place(&p, "model.layers.0.linear_attn.conv1d", false));
    assert_true(module_place(&p, "model.layers.99999999999999999999.mlp.gate", true) &&
                p.section == PLACE_OTHER);
    assert_true(module_is_fused("x.mlp.experts.gate_up_proj", &stem, &gate_up) && gate_up && stem == 13);
    assert_true(module_is_fused("x.mlp.experts.down_proj", &stem, &gate_up) && !gate_up);
    assert_false(module_is_fused("x.mlp.experts.3.down_proj", &stem, &gate_up));
    assert_false(module_is_fused("x.mlp.shared_expert.down_proj", &stem, &gate_up));
}

/* Recipe.yaml. */

static json_t *yaml_value(yaml_document_t *d, yaml_node_t *node)
{
    json_t *out;
    if (node->type == YAML_SEQUENCE_NODE) {
        out = json_array();
        for (yaml_node_item_t *i = node->data.sequence.items.start; i < node->data.sequence.items.top; i++)
            json_array_append_new(out, yaml_value(d, yaml_document_get_node(d, *i)));
        return out;
    }
    if (node->type == YAML_MAPPING_NODE) {
        out = json_object();
        for (yaml_node_pair_t *p = node->data.mapping.pairs.start; p < node->data.mapping.pairs.top; p++)
            json_object_set_new(out, (const char *)yaml_document_get_node(d, p->key)->data.scalar.value,
                                yaml_value(d, yaml_document_get_node(d, p->value)));
        return out;
    }
    const char *text = (const char *)node->data.scalar.value;
    char *end;
    long number = strtol(text, &end, 10);
    if (node->data.scalar.style != YAML_PLAIN_SCALAR_STYLE) return json_string(text);
    if (strcmp(text, "true") == 0 || strcmp(text, "false") == 0) return json_boolean(*text == 't');
    return *end ? json_string(text) : json_integer(number);
}

static json_t *yaml_tree(const char *text, size_t bytes)
{
    yaml_parser_t parser;
    yaml_document_t document;
    assert_true(yaml_parser_initialize(&parser));
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, bytes);
    if (!yaml_parser_load(&parser, &document))
        fail_msg("line %zu: %s", parser.problem_mark.line, parser.problem);
    json_t *out = yaml_value(&document, yaml_document_get_root_node(&document));
    yaml_document_delete(&document);
    yaml_parser_delete(&parser);
    return out;
}

static void yaml_equals_the_example(void **state)
{
    (void)state;
    struct err e = { 0 };
    char *example, *text;
    size_t example_bytes, bytes;
    assert_true(file_read(&example, &example_bytes, "tests/quantize/recipe.example.yaml", 1 << 16, &e));
    if (!recipe_yaml(&text, &bytes, recipe_card(), &e)) fail_msg("%s", e.text);
    json_t *want = yaml_tree(example, example_bytes), *have = yaml_tree(text, bytes);
    if (!json_equal(want, have)) fail_msg("%s", text);
    assert_int_equal(bytes, strlen(text));
    json_decref(want);
    json_decref(have);
    free(example);
    free(text);
}

/* Bytes. */

/* Source: outputs of compressed-tensors for this matrix (docs/formats.md). */
static const uint16_t vector_weights[2][32] = {
    { 0,      0,      0,      0,      0,      0,      0,      0,      0,      0,      0,
      0,      0,      0,      0,      0,      0xb880, 0xbd6e, 0x3d0f, 0x3c23, 0x3d31, 0x3c48,
      0xbd08, 0x3d25, 0x3d62, 0xbc10, 0xbde6, 0xbd94, 0x3b48, 0xbcfd, 0xbd23, 0xbbd8 },
    { 0x3dc0, 0xbb6c, 0x3c01, 0xbd1e, 0x3c23, 0x3b16, 0x3bfb, 0xbcc3, 0xbbb6, 0x3c70, 0xbc01,
      0xbabd, 0x3df1, 0xbd54, 0x3da1, 0xbd01, 0x3fc0, 0x3cdf, 0x3b59, 0xbcb3, 0x3d1c, 0x3cb5,
      0x3d6f, 0x3dce, 0x3be1, 0x3d40, 0xbc18, 0xbd04, 0x3d9e, 0xbd32, 0xbe2b, 0xbd19 },
};

static void vector_row(float out[32], int row)
{
    for (int i = 0; i < 32; i++) out[i] = bf16_to_f32((bf16){ vector_weights[row][i] });
}

static void nvfp4_vectors(void **state)
{
    (void)state;
    static const uint8_t scales[2][2] = { { 0x20, 0x60 }, { 0x61, 0x7e } };
    static const uint8_t codes[2][16] = {
        { 0, 0, 0, 0, 0, 0, 0, 0, 0xd8, 0x14, 0x14, 0x4c, 0x95, 0xef, 0xb0, 0x9c },
        { 0x86, 0xc1, 0x01, 0xa1, 0x19, 0x89, 0xd7, 0xb6, 0x07, 0x80, 0x00, 0x10, 0x00, 0x88, 0x81, 0x89 },
    };
    float global = nvfp4_global_scale(1.5f);
    assert_int_equal(f32_bits(global), 0x44e00000);
    for (int r = 0; r < 2; r++) {
        float x[32];
        uint8_t packed[16];
        e4m3 scale[2];
        vector_row(x, r);
        nvfp4_pack_row(packed, scale, x, global, 32);
        assert_memory_equal(packed, codes[r], 16);
        assert_memory_equal(scale, scales[r], 2);
    }
}

static void fp8_vectors(void **state)
{
    (void)state;
    static const uint16_t scales[2] = { 0x3983, 0x3b5b };
    static const uint8_t codes[2][32] = {
        { 0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,
          0xa8, 0xf7, 0x71, 0x62, 0x73, 0x64, 0xf0, 0x72, 0x76, 0xe1, 0xfe, 0xf9, 0x54, 0xef, 0xf2, 0xdd },
        { 0x5e, 0xb9, 0x41, 0xd4, 0x44, 0x33, 0x41, 0xce, 0xbd, 0x49, 0xc1, 0xae, 0x61, 0xd8, 0x5c, 0xd1,
          0x7e, 0x50, 0x38, 0xcd, 0x53, 0x4d, 0x59, 0x5f, 0x40, 0x56, 0xc3, 0xd2, 0x5c, 0xd5, 0xe4, 0xd3 },
    };
    for (int r = 0; r < 2; r++) {
        float x[32];
        e4m3 packed[32];
        vector_row(x, r);
        assert_int_equal(fp8_pack_row(packed, x, 32).bits, scales[r]);
        assert_memory_equal(packed, codes[r], 32);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(block_equals_the_example),
        cmocka_unit_test(one_format_is_named_at_the_top),
        cmocka_unit_test(modules_are_told_apart),
        cmocka_unit_test(yaml_equals_the_example),
        cmocka_unit_test(nvfp4_vectors),
        cmocka_unit_test(fp8_vectors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
