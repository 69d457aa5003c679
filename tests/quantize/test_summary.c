/* The released model's shape, without its weights: what the plan makes of every tensor, and the report and
 * card of made-up results. Counts and sizes are those published for this model and recipe. */
#include "quantize/card.h"
#include "quantize/fixture.h"
#include "quantize/front_matter.h"
#include "quantize/markdown.h"
#include "quantize/record.h"
#include "quantize/yaml_tree.h"
#include <math.h>
#include <sys/mman.h>

enum {
    LAYERS = 40,
    EXPERTS = 256,
    HIDDEN = 2048,
    INNER = 512,
    DEPTH = 27,
    VISION = 1152,
    VOCABULARY = 248320
};
enum { TENSORS_MAX = 2000 };

static struct tensor tensors[TENSORS_MAX];
static const struct tensor *sorted[TENSORS_MAX];
static int shard_of[TENSORS_MAX];
static struct checkpoint source;
static uint8_t *space; /* where the weights would lie; nothing reads them */
static uint64_t space_bytes;
static struct plan plan;
static struct matrix_result *results;
static struct calibration calibration;

/* Tensors. */

static void add(int64_t a, int64_t b, int64_t c, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static void add(int64_t a, int64_t b, int64_t c, const char *format, ...)
{
    struct tensor *t = &tensors[source.n_tensors];
    char *name;
    va_list args;
    va_start(args, format);
    assert_true(source.n_tensors < TENSORS_MAX && vasprintf(&name, format, args) > 0);
    va_end(args);
    *t = (struct tensor){ .name = name,
                          .dtype = DTYPE_BF16,
                          .n_dims = c   ? 3
                                    : b ? 2
                                        : 1,
                          .shape = { a, b, c } };
    t->bytes = 2 * (uint64_t)tensor_elements(t);
    sorted[source.n_tensors++] = t;
    space_bytes += t->bytes;
}

static void add_moe(const char *stem)
{
    add(EXPERTS, 2 * INNER, HIDDEN, "%smlp.experts.gate_up_proj", stem);
    add(EXPERTS, HIDDEN, INNER, "%smlp.experts.down_proj", stem);
    add(EXPERTS, HIDDEN, 0, "%smlp.gate.weight", stem);
    add(1, HIDDEN, 0, "%smlp.shared_expert_gate.weight", stem);
    add(INNER, HIDDEN, 0, "%smlp.shared_expert.gate_proj.weight", stem);
    add(INNER, HIDDEN, 0, "%smlp.shared_expert.up_proj.weight", stem);
    add(HIDDEN, INNER, 0, "%smlp.shared_expert.down_proj.weight", stem);
    add(HIDDEN, 0, 0, "%sinput_layernorm.weight", stem);
    add(HIDDEN, 0, 0, "%spost_attention_layernorm.weight", stem);
}

static void add_attention(const char *stem)
{
    add(8192, HIDDEN, 0, "%sself_attn.q_proj.weight", stem);
    add(512, HIDDEN, 0, "%sself_attn.k_proj.weight", stem);
    add(512, HIDDEN, 0, "%sself_attn.v_proj.weight", stem);
    add(HIDDEN, 4096, 0, "%sself_attn.o_proj.weight", stem);
    add(256, 0, 0, "%sself_attn.q_norm.weight", stem);
    add(256, 0, 0, "%sself_attn.k_norm.weight", stem);
}

static void add_delta(const char *stem)
{
    add(8192, HIDDEN, 0, "%slinear_attn.in_proj_qkv.weight", stem);
    add(4096, HIDDEN, 0, "%slinear_attn.in_proj_z.weight", stem);
    add(32, HIDDEN, 0, "%slinear_attn.in_proj_a.weight", stem);
    add(32, HIDDEN, 0, "%slinear_attn.in_proj_b.weight", stem);
    add(HIDDEN, 4096, 0, "%slinear_attn.out_proj.weight", stem);
    add(8192, 1, 4, "%slinear_attn.conv1d.weight", stem);
    add(32, 0, 0, "%slinear_attn.A_log", stem);
    add(32, 0, 0, "%slinear_attn.dt_bias", stem);
    add(128, 0, 0, "%slinear_attn.norm.weight", stem);
}

static void add_vision(void)
{
    for (int i = 0; i < DEPTH; i++) {
        add(3 * VISION, VISION, 0, "model.visual.blocks.%d.attn.qkv.weight", i);
        add(VISION, VISION, 0, "model.visual.blocks.%d.attn.proj.weight", i);
        add(4304, VISION, 0, "model.visual.blocks.%d.mlp.linear_fc1.weight", i);
        add(VISION, 4304, 0, "model.visual.blocks.%d.mlp.linear_fc2.weight", i);
        add(VISION, 0, 0, "model.visual.blocks.%d.norm1.weight", i);
    }
    add(4608, 4608, 0, "model.visual.merger.linear_fc1.weight");
    add(HIDDEN, 4608, 0, "model.visual.merger.linear_fc2.weight");
    add(2304, VISION, 0, "model.visual.pos_embed.weight");
}

static void add_all(void)
{
    char stem[100];
    for (int i = 0; i < LAYERS; i++) {
        snprintf(stem, sizeof stem, "model.language_model.layers.%d.", i);
        add_moe(stem);
        if (i % 4 == 3)
            add_attention(stem);
        else
            add_delta(stem);
    }
    add_vision();
    add(VOCABULARY, HIDDEN, 0, "model.language_model.embed_tokens.weight");
    add(VOCABULARY, HIDDEN, 0, "lm_head.weight");
    add(HIDDEN, 0, 0, "model.language_model.norm.weight");
    add_moe("mtp.layers.0.");
    add_attention("mtp.layers.0.");
    add(HIDDEN, 2 * HIDDEN, 0, "mtp.fc.weight");
    add(HIDDEN, 0, 0, "mtp.norm.weight");
    add(HIDDEN, 0, 0, "mtp.pre_fc_norm_embedding.weight");
    add(HIDDEN, 0, 0, "mtp.pre_fc_norm_hidden.weight");
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const struct tensor *const *)a)->name, (*(const struct tensor *const *)b)->name);
}

/* Made-up results: errors grow with the matrix's number, expert 200 of layer 17 is off, layer 5 got few
 * tokens.
 */
static void make_up(void)
{
    struct calibration *c = &calibration;
    *c = (struct calibration){ .n_layers = LAYERS, .n_experts = EXPERTS, .tokens = 131072 };
    c->inputs = calloc(LAYERS * INPUT_EXPERT, sizeof *c->inputs);
    c->down = calloc(LAYERS * EXPERTS, sizeof *c->down);
    c->routed = calloc(LAYERS * EXPERTS, sizeof *c->routed);
    for (int i = 0; i < LAYERS * EXPERTS; i++) {
        c->routed[i] = i / EXPERTS == 5 && i % EXPERTS < 20 ? i % EXPERTS : 4096 + i % 7;
        c->down[i] = 1 + (float)(i % EXPERTS);
    }
    for (int i = 0; i < LAYERS * INPUT_EXPERT; i++) c->inputs[i] = (float)i;
    for (size_t i = 0; i < plan.n_matrices; i++) {
        const struct matrix *m = &plan.matrices[i];
        bool off = m->layer == 17 && m->expert == 200 && m->part == PART_DOWN;
        double error = m->expert < 0 ? 0.025 : off ? 0.5 : 0.09 + 1e-7 * (double)i;
        results[i] = (struct matrix_result){ error * error * 4, 4, 1792, 2.5f, true };
    }
}

static int set_up(void **state)
{
    (void)state;
    struct err e = { 0 };
    add_all();
    space = mmap(NULL, space_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(space != MAP_FAILED);
    uint64_t used = 0;
    for (size_t i = 0; i < source.n_tensors; i++) {
        tensors[i].data = space + used;
        used += tensors[i].bytes;
    }
    qsort(sorted, source.n_tensors, sizeof *sorted, by_name);
    source.path = (char *)(uintptr_t) "/models/Qwen3.6-35B-A3B";
    source.tensors = sorted;
    source.tensor_shard = shard_of;
    if (!doc_load(&source.config_json, "tests/checkpoint/reference_config.json", 1 << 20, &e) ||
        !config_parse(&source.config, source.config_json, &e) ||
        !plan_create(&plan, &source, recipe_card(), &e))
        fail_msg("%s", e.text);
    results = calloc(plan.n_matrices, sizeof *results);
    make_up();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    for (size_t i = 0; i < source.n_tensors; i++) free((void *)(uintptr_t)tensors[i].name);
    munmap(space, space_bytes);
    plan_deinit(&plan);
    config_deinit(&source.config);
    json_decref(source.config_json);
    calibration_deinit(&calibration);
    free(results);
    return 0;
}

/* The plan. */

static void the_plan_has_the_published_counts(void **state)
{
    (void)state;
    int64_t nvfp4 = 0, fp8 = 0, nvfp4_weights = 0, fp8_weights = 0, draft = 0, copied = 0;
    uint64_t bytes = 0;
    for (size_t i = 0; i < plan.n_matrices; i++) {
        const struct matrix *m = &plan.matrices[i];
        bool packed = m->scheme == SCHEME_NVFP4;
        assert_true(packed || m->scheme == SCHEME_FP8_DYNAMIC);
        *(packed ? &nvfp4 : &fp8) += 1;
        *(packed ? &nvfp4_weights : &fp8_weights) += m->rows * m->cols;
    }
    for (size_t i = 0; i < plan.n_jobs; i++) {
        bool is_draft = strncmp(plan.jobs[i].source->name, "mtp.", 4) == 0;
        draft += is_draft;
        copied += plan.jobs[i].n == 0;
        assert_true(!is_draft || plan.jobs[i].n == 0);
    }
    for (size_t i = 0; i < plan.n_outputs; i++) bytes += plan.outputs[i].bytes;
    assert_int_equal(nvfp4, 30720);
    assert_int_equal(fp8, 160);
    assert_int_equal(plan.n_ignored, 341);
    assert_int_equal(draft, 19);
    assert_int_equal(plan.n_outputs, 122880 + 320 + copied);
    assert_true(nvfp4_weights == 32212254720 && fp8_weights == 398458880);
    assert_true(plan.needs_inputs);
    assert_true(fabs((double)bytes / 1e9 - 25.2) < 0.3);
}

static struct summary_run run_of(const char *folder)
{
    return (struct summary_run){ .version = "quench 9",
                                 .method = "nearest",
                                 .source = folder,
                                 .calibration_file = "/text/in.jsonl",
                                 .checkpoint = &source,
                                 .plan = &plan,
                                 .results = results,
                                 .calibration = &calibration,
                                 .recipe = recipe_card(),
                                 .samples = 64,
                                 .max_seq_length = 2048,
                                 .shards = 6 };
}

static void must_create(struct summary *s, const char *folder)
{
    struct err e = { 0 };
    struct summary_run run = run_of(folder);
    if (!summary_create(s, &run, &e)) fail_msg("%s", e.text);
}

static char *card_of(const struct summary *s, const char *front)
{
    struct err e = { 0 };
    char *text;
    size_t bytes;
    json_t *fields = json_loads(front, 0, NULL);
    assert_non_null(fields);
    if (!card_text(&text, &bytes, s, fields, NULL, &e)) fail_msg("%s", e.text);
    assert_int_equal(strlen(text), bytes);
    json_decref(fields);
    return text;
}

static void the_report_holds_all_of_it(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct summary s;
    char *text;
    size_t bytes;
    must_create(&s, "/models/Qwen3.6-35B-A3B");
    if (!record_text(&text, &bytes, &s, NULL, &e)) fail_msg("%s", e.text);
    json_t *o = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, NULL), *x = json_object_get(o, "schemes");
    assert_non_null(o);
    assert_int_equal(json_array_size(json_object_get(o, "matrices")), 30880);
    assert_int_equal(json_array_size(json_object_get(o, "layers")), LAYERS);
    x = json_object_get(x, "NVFP4");
    assert_int_equal(json_integer_value(json_object_get(x, "matrices")), 30720);
    assert_true(json_integer_value(json_object_get(x, "bytes")) ==
                32212254720 / 2 + 32212254720 / 16 + 30720 * 8);
    x = json_array_get(json_object_get(o, "worst"), 0);
    assert_string_equal(json_string_value(json_object_get(x, "module")),
                        "model.language_model.layers.17.mlp.experts.200.down_proj");
    assert_true(fabs(json_number_value(json_object_get(x, "snr_db")) - 6.0206) < 1e-4); /* 20 log10 2 */
    assert_int_equal(s.n_far, 1);
    x = json_array_get(json_object_get(o, "experts"), 5);
    assert_int_equal(json_array_size(json_object_get(json_object_get(x, "few"), "experts")), 20);
    assert_true(bytes < 12000000);
    json_decref(o);
    free(text);
    summary_deinit(&s);
}

static void the_card_is_of_a_page(void **state)
{
    (void)state;
    struct summary s;
    must_create(&s, "/models/Qwen3.6-35B-A3B");
    char *card = card_of(&s, "{}");
    static const char *const parts[] = {
        "30,880 matrices are packed, ",
        "the 19 of the MTP head among them",
        "| 4.50 | 18.12 GB |",
        "--max-model-len 32768 --speculative-config '{\"method\":\"mtp\",\"num_speculative_tokens\":1}'",
        "| 5 | 20 of 256 | 0 (0), 1 (1), 2 (2), 3 (3), 4 (4), 5 (5), 6 (6), 7 (7) and 12 more |",
        "| `model.language_model.layers.17.mlp.experts.200.down_proj` | NVFP4 | 50.000 % | 6.02 |",
        "\nMatrices below 15 dB, more than rounding explains: 1.\n",
        "| 39 | attention | ",
        "| 38 | DeltaNet | ",
        "base_model: Qwen3.6-35B-A3B\n",
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strstr(card, parts[i])) fail_msg("no '%s' in\n%s", parts[i], card);
    assert_true(strlen(card) < 12000);
    free(card);
    summary_deinit(&s);
}

static void base_models_are_named_for_what_they_are(void **state)
{
    (void)state;
    static const struct {
        const char *folder, *front, *want;
        bool is_quantized_of;
    } cases[] = {
        { "/c/models--Qwen--Qwen3.6-35B-A3B/snapshots/0123", "{\"base_model\": \"Qwen/Base\"}",
          "base_model: 'Qwen/Qwen3.6-35B-A3B'\n", true },
        { "/m/Qwen3.6-35B-A3B/",
          "{\"base_model\": \"Qwen/Base\", \"license_link\": "
          "\"https://huggingface.co/Qwen/Qwen3.6-35B-A3B/blob/main/LICENSE\"}",
          "base_model: 'Qwen/Qwen3.6-35B-A3B'\n", true },
        { "/m/tuned",
          "{\"base_model\": [\"Qwen/Qwen3.6-35B-A3B\"], \"license_link\": "
          "\"https://huggingface.co/Qwen/Qwen3.6-35B-A3B/blob/main/LICENSE\"}",
          "base_model:\n- 'Qwen/Qwen3.6-35B-A3B'\n", false },
        { "/m/tuned", "{}", "base_model: tuned\n", true },
        { "/m/no", "{}", "base_model: 'no'\n", true },
        { "/m/a: 'b'\n", "{}", "base_model: 'a: ''b''\xef\xbf\xbd'\n", true },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct summary s;
        struct yaml_tree *root;
        struct err e = { 0 };
        must_create(&s, cases[i].folder);
        char *card = card_of(&s, cases[i].front), *end = strstr(card, "\n---\n\n");
        assert_non_null(end);
        if (!strstr(card, cases[i].want)) fail_msg("%s: %.300s", cases[i].folder, card);
        if (!yaml_tree_read(&root, card + 4, (size_t)(end + 1 - card - 4), &e)) fail_msg("%s", e.text);
        assert_true((yaml_tree_get(root, "base_model_relation") != NULL) == cases[i].is_quantized_of);
        yaml_tree_free(root);
        free(card);
        summary_deinit(&s);
    }
}

/* Front matter. */

static void front_matter_is_found(void **state)
{
    (void)state;
    static const struct {
        const char *text, *want; /* NULL: an error */
    } cases[] = {
        { "", "{}" },
        { "# card\n", "{}" },
        { "---\nlicense: mit\n", "{}" }, /* never closed: a rule and a paragraph */
        { "---\nlicense: mit\n---", "{\"license\": \"mit\"}" },
        { "\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# x", "{\"license\": \"mit\"}" },
        { "--- \na: [x, y, {z: 1}]\nb: {c: d}\ne:\nf: ~\ng: 'null'\n---\n",
          "{\"a\": [\"x\", \"y\"], \"g\": \"null\"}" },
        { "---\n- a\n---\n", "{}" },
        { "---\na: b\na: c\n---\n", NULL },
        { "---\na: &x b\n---\n", NULL },
        { "---\na: [\n---\n", NULL },
        { "----\na: b\n---\n", "{}" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err e = { 0 };
        json_t *have, *want = cases[i].want ? json_loads(cases[i].want, 0, NULL) : NULL;
        bool ok = front_matter_parse(&have, cases[i].text, strlen(cases[i].text), &e);
        if (ok != (want != NULL) || (ok && !json_equal(have, want))) fail_msg("case %zu: %s", i, e.text);
        json_decref(have);
        json_decref(want);
    }
}

/* Markdown. */

static void expect_markdown(void (*put)(FILE *, const char *), const char *text, const char *want)
{
    char *have;
    size_t n;
    FILE *f = open_memstream(&have, &n);
    put(f, text);
    fclose(f);
    assert_string_equal(have, want);
    free(have);
}

static void cell(FILE *f, const char *text)
{
    markdown_code(f, text, true);
}

static void code(FILE *f, const char *text)
{
    markdown_code(f, text, false);
}

static void text_does_not_become_markup(void **state)
{
    (void)state;
    expect_markdown(markdown_text, "a_b*c `d` <e> [f](g)|h\ni",
                    "a\\_b\\*c \\`d\\` \\<e\\> \\[f\\]\\(g\\)\\|h i");
    expect_markdown(cell, "plain", "`plain`");
    expect_markdown(code, "a|b", "`a|b`");
    expect_markdown(cell, "a|b\nc", "`a\\|b c`");
    expect_markdown(cell, "a`b``c", "```a`b``c```");
    expect_markdown(cell, "`a", "`` `a ``");
    expect_markdown(cell, " a ", "`  a  `");
    expect_markdown(cell, "", "`  `");
}

static void names_are_the_last_part_of_a_path(void **state)
{
    (void)state;
    static const char *const cases[][2] = { { "a/b", "b" },
                                            { "a/b//", "b" },
                                            { "b", "b" },
                                            { "/", "/" },
                                            { "a/\xff\tb", "\xef\xbf\xbd\xef\xbf\xbd"
                                                           "b" } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *have = summary_name(cases[i][0]);
        assert_string_equal(have, cases[i][1]);
        free(have);
    }
}

/* An exact matrix has no signal-to-noise ratio that JSON could hold; equal ones keep the plan's order. */
static void nothing_changed_is_exact(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct summary s;
    char *text;
    size_t bytes;
    for (size_t i = 0; i < plan.n_matrices; i++) results[i] = (struct matrix_result){ 0, 0, 1, 0, true };
    must_create(&s, "x");
    assert_int_equal(s.worst[0], 0);
    assert_int_equal(s.worst[9], 9);
    assert_int_equal(s.n_zero, 30720);
    if (!record_text(&text, &bytes, &s, NULL, &e)) fail_msg("%s", e.text);
    assert_non_null(strstr(text, "\"relative_error\": 0.0, \"snr_db\": null"));
    assert_null(strstr(text, "nan"));
    free(text);
    text = card_of(&s, "{}");
    assert_non_null(strstr(text, "30,720 matrices only ever saw zeros"));
    assert_non_null(strstr(text, "| exact |"));
    free(text);
    summary_deinit(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_plan_has_the_published_counts),
        cmocka_unit_test(the_report_holds_all_of_it),
        cmocka_unit_test(the_card_is_of_a_page),
        cmocka_unit_test(base_models_are_named_for_what_they_are),
        cmocka_unit_test(front_matter_is_found),
        cmocka_unit_test(text_does_not_become_markup),
        cmocka_unit_test(names_are_the_last_part_of_a_path),
        cmocka_unit_test(nothing_changed_is_exact),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
