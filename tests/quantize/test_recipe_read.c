/* Recipe files: every form gives its groups, every mistake its line, and what is read can be written again.
 */
#include "quantize/fixture.h"

#define EXAMPLE "tests/quantize/recipe.example.yaml"
#define HEAD    "default_stage:\n  default_modifiers:\n    QuantizationModifier:\n" /* three lines */
#define NVFP4_WEIGHTS                                                                                        \
    "          weights: {num_bits: 4, type: float, strategy: tensor_group, group_size: 16, scale_dtype: "    \
    "float8_e4m3fn}\n"
#define FP8_WEIGHTS                                                                                          \
    "          weights: {num_bits: 8, type: float, strategy: channel, symmetric: true, dynamic: no}\n"
#define GROUP   HEAD "      config_groups:\n        a:\n" /* five lines */
#define TARGETS "          targets: [Linear]\n"

static void parse(struct recipe_file *f, const char *text)
{
    struct err e = { 0 };
    if (!recipe_parse(f, "r.yaml", text, strlen(text), &e)) fail_msg("%s", e.text);
}

/* quantization_config and recipe.yaml of a recipe, as one text. */
static char *written(const struct recipe *r)
{
    struct err e = { 0 };
    json_t *config, *ignore = json_array();
    char *yaml, *out;
    size_t bytes;
    if (!recipe_config(&config, r, ignore, &e) || !recipe_yaml(&yaml, &bytes, r, &e)) fail_msg("%s", e.text);
    char *block = json_dumps(config, JSON_INDENT(1));
    assert_true(asprintf(&out, "%s\n%s", block, yaml) > 0);
    free(block);
    free(yaml);
    json_decref(config);
    json_decref(ignore);
    return out;
}

static void assert_same(const struct recipe *a, const struct recipe *b)
{
    char *x = written(a), *y = written(b);
    assert_string_equal(x, y);
    free(x);
    free(y);
}

static void example_is_the_card(void **state)
{
    (void)state;
    struct recipe_file f;
    struct err e = { 0 };
    if (!recipe_load(&f, EXAMPLE, &e)) fail_msg("%s", e.text);
    assert_string_equal(f.recipe.name, EXAMPLE);
    assert_true(recipe_measures(&f.recipe));
    assert_same(&f.recipe, recipe_card());
    recipe_file_deinit(&f);
}

static void reading_undoes_writing(void **state)
{
    (void)state;
    static const char *const names[] = { "card", "nvfp4", "fast", "nvfp4a16" };
    for (size_t i = 0; i < 4; i++) {
        struct recipe_file f;
        struct err e = { 0 };
        char *text;
        size_t bytes;
        const struct recipe *r = recipe_builtin(names[i]);
        assert_true(recipe_yaml(&text, &bytes, r, &e));
        parse(&f, text);
        assert_same(&f.recipe, r);
        assert_int_equal(recipe_measures(r), i < 3);
        recipe_file_deinit(&f);
        free(text);
    }
    assert_null(recipe_builtin("cards"));
}

/* What a recipe writes of each scheme is read as that scheme, from recipe.yaml and from config.json. */
static void schemes_come_back(void **state)
{
    (void)state;
    static const char *const target = "re:x";
    for (enum scheme s = SCHEME_NVFP4; s < N_SCHEMES; s++) {
        struct recipe_group group = { "g", s, &target, 1 };
        struct recipe r = { .name = "r", .groups = &group, .n_groups = 1 };
        struct recipe_file f;
        struct quantization *q;
        struct err e = { 0 };
        char *text;
        size_t bytes;
        json_t *config, *ignore = json_array();
        assert_true(recipe_yaml(&text, &bytes, &r, &e));
        parse(&f, text);
        assert_int_equal(f.recipe.groups[0].scheme, s);
        assert_true(recipe_config(&config, &r, ignore, &e));
        if (!quantization_parse(&q, config, &e)) fail_msg("%s", e.text);
        assert_int_equal(quantization_scheme(q, "x", "Linear"), s);
        quantization_free(q);
        json_decref(config);
        json_decref(ignore);
        recipe_file_deinit(&f);
        free(text);
    }
}

/* "NAME SCHEME target,target; ... | ignored,ignored" */
static void expect(const char *text, const char *want)
{
    struct recipe_file f;
    char have[500];
    size_t at = 0;
    parse(&f, text);
    for (size_t i = 0; i < f.recipe.n_groups; i++) {
        const struct recipe_group *g = &f.recipe.groups[i];
        at += (size_t)snprintf(have + at, sizeof have - at, "%s%s %s ", i ? "; " : "", g->name,
                               scheme_name(g->scheme));
        for (size_t k = 0; k < g->n_targets; k++)
            at += (size_t)snprintf(have + at, sizeof have - at, "%s%s", k ? "," : "", g->targets[k]);
    }
    at += (size_t)snprintf(have + at, sizeof have - at, " |");
    for (size_t k = 0; k < f.recipe.n_ignore; k++)
        at += (size_t)snprintf(have + at, sizeof have - at, "%s%s", k ? "," : " ", f.recipe.ignore[k]);
    assert_string_equal(have, want);
    recipe_file_deinit(&f);
}

static void schemes_by_name(void **state)
{
    (void)state;
    expect(HEAD "      scheme: NVFP4\n", "group_0 NVFP4 Linear |");
    expect(HEAD "      scheme: nvfp4a16\n      targets: 're:.*\\d'\n      ignore: lm_head\n",
           "group_0 NVFP4A16 re:.*\\d | lm_head");
    expect(HEAD "      scheme: {NVFP4: ['re:a', b], FP8_DYNAMIC: c}\n      ignore: [d, \"re:\\\\d\"]\n",
           "group_0 NVFP4 re:a,b; group_1 FP8_DYNAMIC c | d,re:\\d");
    expect("x_stage: {}\nquant_stage:\n  quant_modifiers:\n    QuantizationModifier: {scheme: FP8_DYNAMIC, "
           "targets: [Linear], ignore: null, kv_cache_scheme: null, config_groups: ~, "
           "bypass_divisibility_checks: false}\n",
           "group_0 FP8_DYNAMIC Linear |");
    expect(HEAD "      scheme: FP8\n", "group_0 FP8 Linear |");
    expect(HEAD "      scheme:\n        NVFP4: [a]\n        fp8_block: [b]\n",
           "group_0 NVFP4 a; group_1 FP8_BLOCK b |");
}

#define BLOCK_WEIGHTS                                                                                        \
    "          weights: {num_bits: 8, type: float, strategy: block, block_structure: [128, 128]}\n"
#define BLOCK_INPUTS                                                                                         \
    "          input_activations: {num_bits: 8, type: float, strategy: group, group_size: 128, dynamic: "    \
    "true}\n"

static void schemes_by_arguments(void **state)
{
    (void)state;
    expect(GROUP TARGETS NVFP4_WEIGHTS
           "          input_activations:\n            {num_bits: 4, type: float, strategy: tensor_group, "
           "group_size: 16, dynamic: local, observer: static_minmax, observer_kwargs: {}, zp_dtype: null}\n"
           "          format: nvfp4-pack-quantized\n",
           "a NVFP4 Linear |");
    expect(GROUP TARGETS NVFP4_WEIGHTS "          input_activations: null\n", "a NVFP4A16 Linear |");
    expect(GROUP TARGETS FP8_WEIGHTS
           "          input_activations: {num_bits: 8, type: float, strategy: token, dynamic: true}\n",
           "a FP8_DYNAMIC Linear |");
    expect(GROUP TARGETS "          weights: {num_bits: 8, type: float, strategy: tensor}\n"
                         "          input_activations: {num_bits: 8, type: float, strategy: tensor, dynamic: "
                         "false, observer: static_minmax}\n",
           "a FP8 Linear |");
    expect(GROUP TARGETS BLOCK_WEIGHTS BLOCK_INPUTS, "a FP8_BLOCK Linear |");
    expect(GROUP TARGETS "          weights: {num_bits: 8, type: float, strategy: block, block_structure: "
                         "128x128}\n" BLOCK_INPUTS,
           "a FP8_BLOCK Linear |");
    expect(GROUP TARGETS "          weights: {num_bits: 8, type: float, group_size: -1}\n",
           "a FP8A16 Linear |");
    expect(GROUP TARGETS FP8_WEIGHTS "        NVFP4: ['re:x', y]\n", "a FP8A16 Linear; NVFP4 NVFP4 re:x,y |");
}

struct mistake {
    const char *text, *want;
    enum err_code code;
};

static void try_mistakes(const struct mistake *m, size_t n)
{
    for (; n--; m++) {
        struct recipe_file f;
        struct err e = { 0 };
        if (recipe_parse(&f, "r.yaml", m->text, strlen(m->text), &e)) fail_msg("no error: %s", m->want);
        if (strncmp(e.text, "r.yaml: ", 8) != 0 || strcmp(e.text + 8, m->want) != 0)
            fail_msg("expected '%s', found '%s'", m->want, e.text);
        if (e.code != m->code) fail_msg("code %d: %s", e.code, e.text);
        assert_null(f.texts);
    }
}

#define COUNT(list) (sizeof(list) / sizeof *(list))

static void structure_is_checked(void **state)
{
    (void)state;
    static const struct mistake mistakes[] = {
        { "", "line 1: nothing in it", ERR_FORMAT },
        { "- a\n", "line 1: recipe: expected a mapping", ERR_FORMAT },
        { "\nstages: {}\n", "line 2: unknown key 'stages': here stand stages (default_stage)", ERR_FORMAT },
        { "a_stage: 3\n", "line 1: a_stage: expected a mapping", ERR_FORMAT },
        { "a_stage:\n  run: x\n",
          "line 2: a_stage: unknown key 'run': here stand modifiers (default_modifiers)", ERR_FORMAT },
        { "a_stage:\n  b_modifiers: []\n", "line 2: b_modifiers: expected a mapping", ERR_FORMAT },
        { "a_stage:\n  b_modifiers:\n    GPTQModifier: {}\n",
          "line 3: modifier 'GPTQModifier' is not done here, only QuantizationModifier is", ERR_UNSUPPORTED },
        { "a_stage:\n  b_modifiers: {}\n", "line 1: no QuantizationModifier", ERR_FORMAT },
        { HEAD "      scheme: NVFP4\nb_stage:\n  b_modifiers:\n    QuantizationModifier: {}\n",
          "line 7: a second QuantizationModifier; one is read, with several groups", ERR_UNSUPPORTED },
        { HEAD "      - x\n", "line 3: QuantizationModifier: expected a mapping", ERR_FORMAT },
        { HEAD "      ignore: []\n      num_samples: 3\n",
          "line 5: QuantizationModifier: unknown key 'num_samples'", ERR_FORMAT },
        { HEAD "      ignore: []\n",
          "line 3: QuantizationModifier: either 'config_groups' or 'scheme' is needed", ERR_FORMAT },
        { HEAD "      scheme: NVFP4\n      config_groups: {}\n",
          "line 3: QuantizationModifier: either 'config_groups' or 'scheme' is needed", ERR_FORMAT },
        { HEAD "      config_groups: {}\n", "line 4: config_groups: empty", ERR_FORMAT },
        { HEAD "      config_groups: [a]\n", "line 4: config_groups: expected a mapping", ERR_FORMAT },
        { HEAD "      config_groups: {}\n      targets: x\n",
          "line 5: targets: with 'config_groups' they stand in the groups", ERR_FORMAT },
        { HEAD "      scheme: NVFP4\n      kv_cache_scheme: {num_bits: 8}\n",
          "line 5: kv_cache_scheme: scales of a cache are not written here", ERR_UNSUPPORTED },
        { HEAD "      scheme: NVFP4\n      bypass_divisibility_checks: true\n",
          "line 5: bypass_divisibility_checks: columns must fill whole groups", ERR_UNSUPPORTED },
    };
    try_mistakes(mistakes, COUNT(mistakes));
}

static void schemes_are_checked(void **state)
{
    (void)state;
    static const struct mistake mistakes[] = {
        { HEAD "      scheme: W4A16\n",
          "line 4: preset 'W4A16' is not supported, only NVFP4, NVFP4A16, FP8_DYNAMIC, FP8 and FP8_BLOCK are",
          ERR_UNSUPPORTED },
        { HEAD "      scheme: [NVFP4]\n", "line 4: scheme: expected a mapping", ERR_FORMAT },
        { HEAD "      scheme: {}\n", "line 4: scheme: empty", ERR_FORMAT },
        { HEAD "      scheme: {NVFP4: []}\n", "line 4: scheme: no targets", ERR_FORMAT },
        { HEAD "      scheme: {NVFP4: [a]}\n      targets: b\n",
          "line 5: targets: they stand under 'scheme' already", ERR_FORMAT },
        { HEAD "      scheme: NVFP4\n      targets: {a: b}\n", "line 5: targets: expected names or patterns",
          ERR_FORMAT },
        { HEAD "      scheme: NVFP4\n      targets:\n      - a\n      - [b]\n",
          "line 7: targets: expected a name or a pattern", ERR_FORMAT },
        { HEAD "      scheme: NVFP4\n      ignore: [a, '']\n", "line 5: ignore: expected a name or a pattern",
          ERR_FORMAT },
        { HEAD "      scheme: NVFP4\n      ignore: [~]\n", "line 5: ignore: expected a name or a pattern",
          ERR_FORMAT },
    };
    try_mistakes(mistakes, COUNT(mistakes));
}

#define WEIGHTS(arguments)                                                                                   \
    GROUP TARGETS "          weights:\n            {num_bits: 4, type: float, " arguments "}\n"
#define FP8(arguments)                                                                                       \
    GROUP TARGETS "          weights:\n            {num_bits: 8, type: float, strategy: channel, " arguments \
                  "}\n"

static void arguments_are_checked(void **state)
{
    (void)state;
    static const struct mistake mistakes[] = {
        { GROUP "          width: 3\n", "line 6: config_groups.a: unknown key 'width'", ERR_FORMAT },
        { GROUP TARGETS, "line 5: config_groups.a: 'weights' is missing", ERR_FORMAT },
        { GROUP NVFP4_WEIGHTS, "line 5: config_groups.a.targets: no targets", ERR_FORMAT },
        { GROUP TARGETS "          weights: 4\n", "line 7: config_groups.a.weights: expected a mapping",
          ERR_FORMAT },
        { GROUP TARGETS NVFP4_WEIGHTS "          output_activations: {}\n",
          "line 8: config_groups.a.output_activations is not supported", ERR_UNSUPPORTED },
        { GROUP TARGETS NVFP4_WEIGHTS "          format: float-quantized\n",
          "line 5: config_groups.a.format: 'float-quantized' is not supported for NVFP4A16",
          ERR_UNSUPPORTED },
        { GROUP TARGETS NVFP4_WEIGHTS "          format: [x]\n", "line 8: format: expected a text",
          ERR_FORMAT },
        { WEIGHTS("num_bit: 4"), "line 8: config_groups.a.weights: unknown key 'num_bit'", ERR_FORMAT },
        { WEIGHTS("strategy: [a]"), "line 8: config_groups.a.weights.strategy: expected a text", ERR_FORMAT },
        { WEIGHTS("strategy: group, group_size: 16"),
          "line 5: config_groups.a.weights: 4-bit float, strategy 'group', group_size 16, dynamic false is "
          "not "
          "supported",
          ERR_UNSUPPORTED },
        { WEIGHTS("group_size: '16'"),
          "line 5: config_groups.a.weights.group_size: expected an integer, found a string", ERR_FORMAT },
        { WEIGHTS("observer: mse"),
          "line 8: config_groups.a.weights.observer: 'mse' is not done here: scales come from the largest "
          "weight "
          "(memoryless_minmax)",
          ERR_UNSUPPORTED },
        { WEIGHTS("observer_kwargs: {a: 1}"),
          "line 8: config_groups.a.weights.observer_kwargs: '...' is not done here: the observer has none",
          ERR_UNSUPPORTED },
        { WEIGHTS("actorder: static"),
          "line 8: config_groups.a.weights.actorder: 'static' is not done here: columns keep their order",
          ERR_UNSUPPORTED },
        { WEIGHTS("block_structure: [128, 128]"),
          "line 5: config_groups.a.weights: 4-bit float, strategy 'tensor', group_size 0, dynamic false, "
          "blocks of 128 x 128 is not supported",
          ERR_UNSUPPORTED },
        { WEIGHTS("block_structure: 128x"),
          "line 8: config_groups.a.weights.block_structure: expected [128, 128]", ERR_FORMAT },
        { WEIGHTS("block_structure: [128]"),
          "line 5: config_groups.a.weights.block_structure: expected two integers above 0", ERR_FORMAT },
        { GROUP TARGETS
          "          weights: {num_bits: 8, type: float, strategy: block, block_structure: [64, "
          "128]}\n",
          "line 5: config_groups.a.weights: 8-bit float, strategy 'block', group_size 0, dynamic false, "
          "blocks of 64 x 128 is not supported",
          ERR_UNSUPPORTED },
        { GROUP TARGETS BLOCK_WEIGHTS,
          "line 5: config_groups.a.input_activations: null; FP8 weights in blocks are supported with inputs "
          "of 8-bit float, strategy 'group', group_size 128, dynamic true",
          ERR_UNSUPPORTED },
        { GROUP TARGETS BLOCK_WEIGHTS "          input_activations: {block_structure: [128, 128]}\n",
          "line 8: config_groups.a.input_activations.block_structure: '...' is not done here: inputs have no "
          "blocks",
          ERR_UNSUPPORTED },
        { FP8("zp_dtype: torch.int8"),
          "line 8: config_groups.a.weights.zp_dtype: 'torch.int8' is not done here: there are no zero points",
          ERR_UNSUPPORTED },
        { FP8("scale_dtype: torch.float32"),
          "line 5: config_groups.a.weights.scale_dtype: scales of FP8 weights are stored in the weights' own "
          "dtype",
          ERR_UNSUPPORTED },
        { GROUP TARGETS "          weights: {num_bits: 8, type: float, strategy: tensor}\n",
          "line 5: config_groups.a.weights: one scale for the whole matrix with these inputs is not done "
          "here; strategy 'channel' is",
          ERR_UNSUPPORTED },
        { GROUP TARGETS FP8_WEIGHTS
          "          input_activations: {num_bits: 8, type: float, strategy: tensor}\n",
          "line 5: config_groups.a.weights: one scale a row with one for all inputs is not done here; "
          "strategy 'tensor' is, or 'token' for the inputs",
          ERR_UNSUPPORTED },
        { GROUP TARGETS NVFP4_WEIGHTS "          input_activations: {observer: minmax}\n",
          "line 8: config_groups.a.input_activations.observer: 'minmax' is not done here: input scales come "
          "from "
          "the largest value of all samples (static_minmax)",
          ERR_UNSUPPORTED },
    };
    try_mistakes(mistakes, COUNT(mistakes));
}

static void yaml_is_bounded(void **state)
{
    (void)state;
    static const struct mistake mistakes[] = {
        { "a: &x [b]\nc: *x\n", "line 1: anchors and aliases are not read", ERR_UNSUPPORTED },
        { "a: *x\n", "line 1: anchors and aliases are not read", ERR_UNSUPPORTED },
        { "a:\n  &x k: v\n", "line 2: anchors and aliases are not read", ERR_UNSUPPORTED },
        { "a: !!python/tuple [b]\n", "line 1: tags are not read", ERR_UNSUPPORTED },
        { "a: 1\nb: 2\na: 3\n", "line 3: key 'a' stands on line 1 already", ERR_FORMAT },
        { "? [a]\n: b\n", "line 1: a key is not text", ERR_FORMAT },
        { "a: \"b\\0c\"\n", "line 1: a text contains NUL", ERR_FORMAT },
        { "a: 1\n---\nb: 2\n", "line 2: more than one document", ERR_FORMAT },
        { "a: [b\n", "line 2: not YAML: did not find expected ',' or ']'", ERR_FORMAT },
        { "a: [[[[[[[[[[[[[[[[b]]]]]]]]]]]]]]]]\n", "line 1: nested deeper than 16", ERR_LIMIT },
    };
    try_mistakes(mistakes, COUNT(mistakes));
    struct recipe_file f;
    struct err e = { 0 };
    size_t n = (1 << 20) + 1;
    char *large = malloc(n);
    memset(large, 'a', n);
    assert_false(recipe_parse(&f, "r", large, n, &e));
    assert_string_equal(e.text, "r: 1048577 bytes, at most 1048576 are read");
    for (size_t i = 0; i < n; i++) large[i] = "[,a"[i == 0 ? 0 : 1 + i % 2];
    assert_false(recipe_parse(&f, "r", large, n - 1, &e));
    assert_string_equal(e.text, "r: line 1: more than 16384 values");
    assert_false(recipe_parse(&f, "r", "a: \xff\xfe", 5, &e));
    assert_non_null(strstr(e.text, "not YAML: "));
    free(large);
    e = (struct err){ 0 };
    assert_false(recipe_load(&f, "/nonexistent/r.yaml", &e));
    assert_int_equal(e.code, ERR_IO);
}

static void cut_files_are_errors_or_recipes(void **state)
{
    (void)state;
    struct err e = { 0 };
    char *text;
    size_t n, good = 0;
    assert_true(file_read(&text, &n, EXAMPLE, 1 << 16, &e));
    for (size_t i = 0; i < n; i++) {
        struct recipe_file f;
        e = (struct err){ 0 };
        if (recipe_parse(&f, "r", text, i, &e))
            good++;
        else
            assert_true(e.code != ERR_NONE && strncmp(e.text, "r: ", 3) == 0);
        recipe_file_deinit(&f);
    }
    assert_true(good > 0);
    free(text);
}

/* What Python's re.match says of the pattern and the name; recorded with Python 3.11. */
static const struct {
    const char *pattern, *name;
    bool matches;
} python[] = {
    { "experts", "mlp.experts.0.up_proj", false }, /* the start counts */
    { "mlp", "mlp.experts.0.up_proj", true },      /* the end does not */
    { "mlp$", "mlp.experts.0.up_proj", false },
    { ".*mlp\\.experts\\.\\d+\\.up_proj$", "a.mlp.experts.12.up_proj", true },
    { ".*mlp\\.experts\\.\\d+\\.up_proj$", "a.mlp.experts.x.up_proj", false },
    { ".*mlp\\.experts\\.\\d+\\.up_proj$", "a.mlp.experts.1.up_proj.b", false },
    { "b|a", "ab", true }, /* every branch is anchored */
    { "c|b", "ab", false },
    { "^a|b", "ab", true },
    { "(?!mtp)a", "a.mtp", true },
    { "(?!.*mtp).*proj", "a.mtp.proj", false },
    { "(?P<x>a)(?P=x)b", "aab", true },
    { "(?i)LM_HEAD", "lm_head", true },
    { "a{2,3}b", "aaab", true },
    { "a{0,2}b", "aaab", false },
    { ".*?\\bq\\b", "a.q.b", true },
    { "a\\Z", "a", true },
    { "[^.]+\\.b", "aa.b", true },
    { "[^.]+\\.b", "a.a.b", false },
    { "", "anything", true },
    { "\\w+\\.[0-9]$", "layers.7", true },
    { "[]{,2}(*]+$", "](*{", true },
    { "[^]]b", "ab", true },
    { "\\{,2}", "{,2}", true },
    { "a++b", "aab", true },
    { "(?<!a)b|(?#no)c", "c", true },
};

static bool compile(struct quantization **q, const char *pattern, struct err *e)
{
    json_t *config, *ignore = json_array();
    char target[100];
    snprintf(target, sizeof target, "re:%s", pattern);
    const char *targets[] = { target };
    struct recipe_group group = { "g", SCHEME_NVFP4, targets, 1 };
    struct recipe r = { .name = "r", .groups = &group, .n_groups = 1 };
    assert_true(recipe_config(&config, &r, ignore, e));
    bool ok = quantization_parse(q, config, e);
    json_decref(config);
    json_decref(ignore);
    return ok;
}

static void patterns_match_as_in_python(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(python); i++) {
        struct err e = { 0 };
        struct quantization *q;
        if (!compile(&q, python[i].pattern, &e)) fail_msg("%s", e.text);
        if (python[i].matches != (quantization_scheme(q, python[i].name, "Linear") == SCHEME_NVFP4))
            fail_msg("%s: %s", python[i].pattern, python[i].name);
        quantization_free(q);
    }
}

/* PCRE2 takes these; Python refuses them or reads them otherwise. */
static void patterns_python_has_not(void **state)
{
    (void)state;
    static const char *const patterns[][2] = {
        { "a{,2}b", "'{,2' at byte 1" },      { "\\Qa\\E", "'\\Qa' at byte 0" },
        { "\\h", "'\\h' at byte 0" },         { "(?<x>a)", "'(?<' at byte 0" },
        { "[[:alpha:]]", "'[:a' at byte 1" }, { "a\\K", "'\\K' at byte 1" },
        { "x(*ACCEPT)", "'(*A' at byte 1" },  { "(?|a)", "'(?|' at byte 0" },
        { "(a)(?1)", "'(?1' at byte 3" },
    };
    for (size_t i = 0; i < COUNT(patterns); i++) {
        struct err e = { 0 };
        struct quantization *q;
        char want[100];
        assert_false(compile(&q, patterns[i][0], &e));
        snprintf(want, sizeof want, "pattern '%s': %s has another meaning or none in Python", patterns[i][0],
                 patterns[i][1]);
        if (!strstr(e.text, want)) fail_msg("expected '%s', found '%s'", want, e.text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(example_is_the_card),
        cmocka_unit_test(reading_undoes_writing),
        cmocka_unit_test(schemes_come_back),
        cmocka_unit_test(schemes_by_name),
        cmocka_unit_test(schemes_by_arguments),
        cmocka_unit_test(structure_is_checked),
        cmocka_unit_test(schemes_are_checked),
        cmocka_unit_test(arguments_are_checked),
        cmocka_unit_test(yaml_is_bounded),
        cmocka_unit_test(cut_files_are_errors_or_recipes),
        cmocka_unit_test(patterns_match_as_in_python),
        cmocka_unit_test(patterns_python_has_not),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
