/* Overrides of config.json: what they merge to, and one case per message. */
#include "checkpoint/checkpoint.h"
#include "checkpoint/temp.h"

static const char REFERENCE[] = "tests/checkpoint/reference_config.json";
/* As in vllm-project/recipes, models/Qwen/Qwen3.6-35B-A3B.yaml. */
static const char RECIPE[] =
    "{\"text_config\": {\"rope_parameters\": {\"mrope_interleaved\": true, \"mrope_section\": [11, 11, 10], "
    "\"rope_type\": \"yarn\", \"rope_theta\": 10000000, \"partial_rotary_factor\": 0.25, \"factor\": 4.0, "
    "\"original_max_position_embeddings\": 262144}}}";

/* The reference with the overrides; text_only: its text_config alone. */
static json_t *applied(const char *fields, double rope_yarn, bool text_only, struct err *e)
{
    json_t *root = must_load(REFERENCE), *given = fields ? must_parse(fields) : NULL;
    if (text_only) {
        json_t *text = json_incref(json_object_get(root, "text_config"));
        json_decref(root);
        root = text;
    }
    bool ok = overrides_apply(root, &(struct overrides){ given, rope_yarn }, e);
    if (given) { /* what was given is as it was */
        json_t *again = must_parse(fields);
        assert_true(json_equal(given, again));
        json_decref(again);
    }
    json_decref(given);
    if (ok) return root;
    json_decref(root);
    return NULL;
}

static json_t *must_apply(const char *fields, double rope_yarn, bool text_only)
{
    struct err e = { 0 };
    json_t *root = applied(fields, rope_yarn, text_only, &e);
    if (!root) fail_msg("%s: %s", fields ? fields : "short form", e.text);
    return root;
}

static json_t *edited(const char *path, const char *text)
{
    json_t *root = must_load(REFERENCE);
    json_change(root, path, text);
    return root;
}

static void assert_same(json_t *found, json_t *want)
{
    if (!json_equal(found, want)) fail_msg("%s", json_dumps(found, JSON_INDENT(1)));
    json_decref(found);
    json_decref(want);
}

static void fields_merge_at_any_depth(void **state)
{
    (void)state;
    assert_same(must_apply("{\"text_config\":{\"num_experts_per_tok\":4}}", 0, false),
                edited("text_config.num_experts_per_tok", "4"));
    assert_same(must_apply("{\"text_config\":{\"rope_parameters\":{\"rope_theta\":5e6}}}", 0, false),
                edited("text_config.rope_parameters.rope_theta", "5e6"));
    assert_same(must_apply("{\"image_token_id\":7}", 0, false), edited("image_token_id", "7"));
    assert_same(must_apply("{}", 0, false), must_load(REFERENCE));
}

static void the_recipe_is_an_edited_file(void **state)
{
    (void)state;
    struct config c;
    struct err e = { 0 };
    json_t *want = must_load(REFERENCE), *given = must_parse(RECIPE);
    json_object_set(json_object_get(want, "text_config"), "rope_parameters",
                    json_object_get(json_object_get(given, "text_config"), "rope_parameters"));
    json_t *found = must_apply(RECIPE, 0, false);
    assert_true(config_parse(&c, found, &e));
    assert_int_equal(c.max_position_embeddings, 1048576);
    assert_true(c.yarn.factor == 4 && c.rope_theta == 1e7 && c.mrope_section[2] == 10);
    config_deinit(&c);
    json_decref(given);
    assert_same(found, want);
}

static void the_short_form_is_the_recipe(void **state)
{
    (void)state;
    json_t *want = must_apply(RECIPE, 0, false);
    json_change(want, "text_config.rope_parameters.original_max_position_embeddings", NULL);
    assert_same(must_apply(NULL, 4, false), want);
    assert_same(must_apply("{\"text_config\":{\"rope_parameters\":{\"beta_fast\":64}}}", 2, false),
                must_apply("{\"text_config\":{\"rope_parameters\":{\"beta_fast\":64,\"rope_type\":\"yarn\","
                           "\"factor\":2.0}}}",
                           0, false));
    /* where the language model's fields are the outermost ones, and with older names */
    json_t *text = must_apply(NULL, 4, true), *old = must_load(REFERENCE);
    assert_string_equal(
        json_string_value(json_object_get(json_object_get(text, "rope_parameters"), "rope_type")), "yarn");
    json_decref(text);
    json_change(old, "text_config.rope_parameters", NULL);
    json_change(old, "text_config.rope_scaling", "{\"type\":\"mrope\",\"rope_theta\":1e7}");
    json_t *given = must_parse(RECIPE);
    struct err e = { 0 };
    assert_false(overrides_apply(old, &(struct overrides){ given, 0 }, &e));
    assert_message(
        &e, "overrides of config.json: ",
        "text_config.rope_parameters: this config.json has rope_scaling in its place; override that");
    json_decref(given);
    assert_true(overrides_apply(old, &(struct overrides){ NULL, 4 }, NULL));
    json_t *scaling = must_parse("{\"rope_theta\":1e7,\"rope_type\":\"yarn\",\"factor\":4.0}");
    assert_true(json_equal(json_object_get(json_object_get(old, "text_config"), "rope_scaling"), scaling));
    json_decref(scaling);
    json_decref(old);
}

/* All that config.json says, said again, is nothing overridden, read or not. */
static void repetitions_are_fine(void **state)
{
    (void)state;
    json_t *root = must_load(REFERENCE);
    char *text = json_dumps(root, 0);
    assert_same(must_apply(text, 0, false), root);
    free(text);
    assert_same(must_apply("{\"text_config\":{\"rope_parameters\":{\"rope_theta\":1e7}}}", 0, false),
                must_load(REFERENCE));
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        const char *fields, *message;
        bool text_only;
    } cases[] = {
        { "{\"text_config\":{\"sliding_window\":512}}",
          "text_config.sliding_window: not read by quench, so overriding it would change nothing", false },
        { "{\"max_seq_len\":512}", "max_seq_len: not read by quench, so overriding", false },
        { "{\"text_config\":{\"rope_parameters\":{\"mscale\":1}}}",
          "text_config.rope_parameters.mscale: not read by quench", false },
        { "{\"rope_parameters\":{\"rope_type\":\"yarn\"}}",
          "rope_parameters: not read at the top level of this config.json, but in its text_config", false },
        { "{\"text_config\":{\"num_experts_per_tok\":4}}",
          "text_config: this config.json has no such part; its fields are at the top level", true },
        { "{\"text_config\":{\"hidden_size\":4096}}",
          "text_config.hidden_size: fixed by the weights, which were made for 2048; it cannot be overridden",
          false },
        { "{\"hidden_size\":4096}", "hidden_size: fixed by the weights, which were made for 2048; it", true },
        { "{\"text_config\":{\"num_hidden_layers\":20}}",
          "text_config.num_hidden_layers: fixed by the weights, which were made for 40; it", false },
        { "{\"text_config\":{\"mlp_only_layers\":[1]}}",
          "text_config.mlp_only_layers: fixed by the weights, which were made for ", false },
        { "{\"vision_config\":{\"depth\":3}}",
          "vision_config.depth: fixed by the weights, which were made for 27; it", false },
        { "{\"architectures\":[\"Other\"]}", "architectures: fixed by the weights", false },
        { "{\"quantization_config\":{\"bits\":4}}",
          "quantization_config: fixed by the weights, which were made for its default", false },
        { "{\"text_config\":null}", "text_config: expected an object", false },
        { "{\"text_config\":{\"rope_parameters\":[]}}", "text_config.rope_parameters: expected an object",
          false },
        { "{\"text_config\":{\"rope_parameters\":{\"factor\":4}}}",
          "text_config.rope_parameters.factor: only read where rope_type is \"yarn\"", false },
        { "{\"text_config\":{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4}}}",
          "text_config.rope_scaling: not read beside rope_parameters; override that", false },
        { "{\"text_config\":{\"rope_theta\":5e6}}",
          "text_config.rope_theta: not read beside the one of rope_parameters; override that", false },
        { "{\"rope_theta\":5e6}", "rope_theta: not read beside the one of rope_parameters", true },
        { "{\"text_config\":{\"max_position_embeddings\":1010000,\"rope_parameters\":{\"rope_type\":\"yarn\","
          "\"factor\":4,\"original_max_position_embeddings\":262144}}}",
          "text_config.max_position_embeddings: not read beside YaRN's factor and", false },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err e = { 0 };
        json_t *root = applied(cases[i].fields, 0, cases[i].text_only, &e);
        if (root) fail_msg("accepted: %s", cases[i].fields);
        assert_message(&e, "overrides of config.json: ", cases[i].message);
        assert_int_equal(e.code, ERR_ARGUMENT);
    }
    struct err e = { 0 };
    assert_null(applied(RECIPE, 4, false, &e));
    assert_message(
        &e, "overrides of config.json: ",
        "text_config.rope_parameters: overridden beside the short form for YaRN; one of the two is");
}

static bool is_known(const char *key)
{
    static const char *const places[] = { "{\"%s\":\"?\"}", "{\"text_config\":{\"%s\":\"?\"}}",
                                          "{\"text_config\":{\"rope_parameters\":{\"%s\":\"?\"}}}",
                                          "{\"vision_config\":{\"%s\":\"?\"}}" };
    for (int i = 0; i < 4; i++) {
        struct err e = { 0 };
        char fields[160];
        snprintf(fields, sizeof fields, places[i], key);
        json_t *root = applied(fields, 0, false, &e);
        json_decref(root);
        if (root || !strstr(e.text, "not read by quench")) return true;
    }
    return false;
}

/* config.c has names of fields as arguments: in quotes, a comma behind. None of them may be unknown here. */
static void every_field_that_is_read_is_known(void **state)
{
    (void)state;
    static const char others[] = " gelu_pytorch_tanh mscale_all_dim attn_factor extrapolation_factor ";
    char *source;
    size_t bytes;
    int n = 0;
    struct err e = { 0 };
    assert_true(file_read(&source, &bytes, "src/checkpoint/config.c", 1 << 20, &e));
    for (char *p = strchr(source, '"'); p; p = strchr(p + 1, '"')) {
        char key[64], word[66];
        size_t length = strspn(p + 1, "abcdefghijklmnopqrstuvwxyz_");
        if (length >= sizeof key || p[length + 1] != '"' || p[length + 2] != ',') continue;
        snprintf(key, sizeof key, "%.*s", (int)length, p + 1);
        snprintf(word, sizeof word, " %s ", key);
        if (!strchr(key, '_') || strstr(others, word)) continue;
        if (!is_known(key)) fail_msg("config.c reads '%s', overrides.c does not know it", key);
        n++;
    }
    assert_true(n > 40);
    free(source);
}

static void a_checkpoint_opens_with_them(void **state)
{
    (void)state;
    struct checkpoint c;
    struct err e = { 0 };
    json_t *given = must_parse(RECIPE);
    if (!checkpoint_open_overridden(&c, "models/demo", &(struct overrides){ given, 0 }, &e))
        fail_msg("%s", e.text);
    assert_int_equal(c.config.max_position_embeddings, 1048576);
    checkpoint_close(&c);
    json_decref(given);
    given = must_parse("{\"text_config\":{\"num_experts_per_tok\":17}}");
    assert_false(checkpoint_open_overridden(&c, "models/demo", &(struct overrides){ given, 0 }, &e));
    assert_message(&e, "models/demo/config.json with what is overridden: ",
                   "text_config.num_experts_per_tok: expected 1 to 16, found 17");
    json_decref(given);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fields_merge_at_any_depth),
        cmocka_unit_test(the_recipe_is_an_edited_file),
        cmocka_unit_test(the_short_form_is_the_recipe),
        cmocka_unit_test(repetitions_are_fine),
        cmocka_unit_test(refusals),
        cmocka_unit_test(every_field_that_is_read_is_known),
        cmocka_unit_test(a_checkpoint_opens_with_them),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
