/* Checkpoints in the words of ModelOpt and of the official FP8 releases, made from ours by renaming: they run
 * to the same bits as the same numbers under compressed-tensors' names, verify finds nothing in them, and it
 * finds what is planted. */
#include "eval/perplexity.h"
#include "quantize/merge_mtp.h"
#include "quantize/variant.h"
#include "quantize/verify.h"
#include "support/models.h"
#include <math.h>

#define LAYERS  "model.language_model.layers."
#define EXPERT3 LAYERS "1.mlp.experts.3."
#define Q_PROJ  LAYERS "3.self_attn.q_proj"
#define EXPERTS "re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$"
#define DENSE   "re:.*self_attn\\.(q|k|v|o)_proj$", "re:.*shared_expert\\.(gate|up|down)_proj$"

static struct fixture fixture;

static const char *const ignored[] = { "lm_head",
                                       "re:.*embed_tokens$",
                                       "re:.*mlp\\.gate$",
                                       "re:.*mlp\\.shared_expert_gate$",
                                       "re:.*linear_attn.*",
                                       "re:.*visual.*" };
static const char *const experts[] = { EXPERTS };
static const char *const dense[] = { DENSE };
static const char *const all[] = { EXPERTS, DENSE };

/* The demo in our own words, in the fixture's folder `name`. */
static void quantize_demo(const char *name, const struct recipe_group *groups, size_t n)
{
    struct recipe recipe = { "r", groups, n, ignored, sizeof ignored / sizeof *ignored };
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, name));
    o.recipe = &recipe;
    must_run(&o);
}

/* Rewriting. */

enum tool { COMPRESSED_TENSORS, MODELOPT, BLOCK_FP8 };

static void *copied(const void *bytes, size_t n)
{
    void *p = malloc(n);
    memcpy(p, bytes, n);
    return p;
}

static void set_f32(struct tensor *t, float x, bool scalar)
{
    t->dtype = DTYPE_F32;
    t->bytes = 4;
    if (scalar) t->n_dims = 0;
    t->data = copied(&x, sizeof x);
}

/* The tensor's name with another ending; false when it does not end so. */
static bool rename_end(struct tensor *t, const char *end, const char *other)
{
    char name[300];
    if (!ends_in(t->name, end)) return false;
    snprintf(name, sizeof name, "%.*s%s", (int)(strlen(t->name) - strlen(end)), t->name, other);
    t->name = copied(name, strlen(name) + 1);
    return true;
}

/* Reciprocals in f32 do not always come back: what ModelOpt's file cannot say, ours must not say either. */
static void to_reciprocal(struct tensor *t, enum tool tool)
{
    float x = 1 / f32_at(t);
    set_f32(t, tool == MODELOPT ? x : 1 / x, tool == MODELOPT);
}

static void to_modelopt(struct tensor *t, enum tool tool)
{
    bool modelopt = tool == MODELOPT;
    if (ends_in(t->name, ".weight_global_scale") || ends_in(t->name, ".input_global_scale")) {
        to_reciprocal(t, tool);
        if (modelopt && !rename_end(t, ".weight_global_scale", ".weight_scale_2"))
            rename_end(t, ".input_global_scale", ".input_scale");
    } else if (modelopt && t->dtype == DTYPE_BF16 && tensor_elements(t) == 1 && ends_in(t->name, "_scale")) {
        set_f32(t, bf16_at(t, 0), true);
    } else if (modelopt) {
        rename_end(t, ".weight_packed", ".weight");
    }
}

/* Writes `from` as `to` with that tool's tensors and quantization_config (NULL: none). Small leaks are fine.
 */
static void rewrite(const char *from, const char *to, enum tool tool, json_t *quantization)
{
    struct checkpoint c;
    must_open(&c, in(&fixture, from));
    struct tensor *list = malloc(c.n_tensors * sizeof *list);
    for (size_t i = 0; i < c.n_tensors; i++) {
        list[i] = *c.tensors[i];
        if (tool == BLOCK_FP8)
            rename_end(&list[i], ".weight_scale", ".weight_scale_inv");
        else
            to_modelopt(&list[i], tool);
    }
    json_t *config = json_deep_copy(c.config_json);
    if (tool != COMPRESSED_TENSORS) json_object_del(config, "quantization_config");
    if (quantization) json_object_set_new(config, "quantization_config", quantization);
    write_checkpoint(&fixture, to, config, list, c.n_tensors);
    json_decref(config);
    for (size_t i = 0; i < c.n_tensors; i++) {
        if (list[i].name != c.tensors[i]->name) free((void *)(uintptr_t)list[i].name);
        if (list[i].data != c.tensors[i]->data) free((void *)(uintptr_t)list[i].data);
    }
    free(list);
    checkpoint_close(&c);
}

/* Comparing. */

/* Whether all log-probabilities of both are the same bits. */
static bool run_alike(const char *one, const char *two, const struct backend_options *o)
{
    enum { TOKENS = 96 };
    struct loaded a, b;
    struct comparison r;
    struct err e = { 0 };
    int32_t tokens[TOKENS];
    for (int i = 0; i < TOKENS; i++) tokens[i] = (i * 37 + i * i) % 2000;
    load_model(&a, in(&fixture, one), o);
    load_model(&b, in(&fixture, two), o);
    struct perplexity_options options = { .ctx = 48 };
    if (!perplexity_compare(&r, &a.model, &b.model, tokens, TOKENS, &options, &e)) fail_msg("%s", e.text);
    assert_true(isfinite(r.base.nll) && r.base.nll > 0);
    unload_model(&a);
    unload_model(&b);
    return r.delta == 0 && r.kld == 0;
}

static void must_run_alike(const char *one, const char *two, const struct backend_options *o)
{
    if (!run_alike(one, two, o)) fail_msg("%s and %s differ", one, two);
}

static void run(struct verify_result *r, const char *name, const char *source)
{
    struct err e = { 0 };
    struct verify_options o = {
        .path = in(&fixture, name), .source = source, .threads = 2, .backend = &fixture.backend
    };
    if (!verify_run(r, &o, &e)) fail_msg("%s", e.text);
}

static void fail_with_findings(const struct verify_result *r, const char *want)
{
    for (size_t i = 0; i < r->findings.n; i++) {
        char *text = findings_sentence(&r->findings.items[i]);
        print_message("%s: %s\n", r->findings.items[i].is_fault ? "fault" : "warning", text);
        free(text);
    }
    fail_msg("expected %s", want);
}

static void must_be_clean(const char *name, enum scheme scheme, int64_t n)
{
    struct verify_result r;
    run(&r, name, DEMO);
    if (r.findings.n > 0) fail_with_findings(&r, "nothing");
    assert_int_equal(r.modules[scheme], n);
    assert_int_equal(r.compared[scheme], n);
    /* what rounding to the nearest costs: 2.6 % for E4M3, 9.5 % for NVFP4 */
    bool nvfp4 = scheme == SCHEME_NVFP4 || scheme == SCHEME_NVFP4A16;
    assert_true(r.mean_error[scheme] > (nvfp4 ? 0.09 : 0.025) &&
                r.mean_error[scheme] < (nvfp4 ? 0.1 : 0.027));
    verify_deinit(&r);
}

struct planted {
    struct variant_of variant;
    bool fault;
    const char *want;
};

static void must_find_planted(const char *good, const struct planted *p, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct verify_result r;
        bool found = false;
        variant_write(&fixture, "variant", in(&fixture, good), &p[i].variant);
        run(&r, "variant", DEMO);
        for (size_t k = 0; k < r.findings.n; k++) {
            char *text = findings_sentence(&r.findings.items[k]);
            found = found || (r.findings.items[k].is_fault == p[i].fault && strstr(text, p[i].want));
            free(text);
        }
        if (!found || (!p[i].fault && verify_faults(&r) > 0)) fail_with_findings(&r, p[i].want);
        verify_deinit(&r);
    }
}

#define COUNT(list) (sizeof(list) / sizeof *(list))
static const float zero = 0, thousand = 1000, not_a_number = NAN;
static const uint16_t bf_minus = 0xbf80, bf_two = 0x4000;

#define F32_SET(t, x)                                                                                        \
    {                                                                                                        \
        t, EDIT_BYTES, NULL, 0, 1, &(x), 4, 0                                                                \
    }

/* ModelOpt. */

/* {layer group: algorithm}, as a mixed export lists them: routed experts by their parent. */
static json_t *mixed_config(void)
{
    static const char *const parts[] = { "self_attn.q_proj",
                                         "self_attn.k_proj",
                                         "self_attn.v_proj",
                                         "self_attn.o_proj",
                                         "mlp.shared_expert.gate_proj",
                                         "mlp.shared_expert.up_proj",
                                         "mlp.shared_expert.down_proj" };
    json_t *layers = json_object();
    char name[100];
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, LAYERS "%d.mlp.experts", i);
        json_object_set_new(layers, name, json_pack("{s:s, s:i}", "quant_algo", "NVFP4", "group_size", 16));
        for (size_t k = i == 3 ? 0 : 4; k < COUNT(parts); k++) {
            snprintf(name, sizeof name, LAYERS "%d.%s", i, parts[k]);
            json_object_set_new(layers, name, json_pack("{s:s}", "quant_algo", "FP8"));
        }
    }
    return json_pack("{s:s, s:s, s:[s, s], s:o}", "quant_method", "modelopt", "quant_algo", "MIXED_PRECISION",
                     "ignore", "lm_head", "model.visual*", "quantized_layers", layers);
}

static void modelopt_mixed(void **state)
{
    (void)state;
    static const struct recipe_group groups[] = { { "group_0", SCHEME_NVFP4, experts, 1 },
                                                  { "group_1", SCHEME_FP8, dense, 2 } };
    struct backend_options cpu = { .device = DEVICE_CPU, .threads = 2 }, ref = { .device = DEVICE_REF };
    quantize_demo("mixed", groups, 2);
    rewrite("mixed", "mixed-ours", COMPRESSED_TENSORS, NULL);
    rewrite("mixed", "mixed-modelopt", MODELOPT, mixed_config());
    must_run_alike("mixed-ours", "mixed-modelopt", &cpu);
    must_run_alike("mixed-ours", "mixed-modelopt", &ref);
    cpu.fp4_activations = true;
    must_run_alike("mixed-ours", "mixed-modelopt", &cpu);
    must_be_clean("mixed-ours", SCHEME_FP8, 16);
    must_be_clean("mixed-modelopt", SCHEME_FP8, 16);
    must_be_clean("mixed-modelopt", SCHEME_NVFP4, 4 * 16 * 3);
}

/* A routed expert in NVFP4 and the shared one in FP8 read the same inputs: absmax is 2688 / one scale and 448
 * * the other, but for BF16. */
static void input_scales_are_measured(void **state)
{
    (void)state;
    struct checkpoint c;
    must_open(&c, in(&fixture, "mixed"));
    for (int i = 0; i < 4; i++) {
        float global = f32_at(must_find(&c, LAYERS "%d.mlp.experts.0.gate_proj.input_global_scale", i));
        const struct tensor *gate = must_find(&c, LAYERS "%d.mlp.shared_expert.gate_proj.input_scale", i),
                            *up = must_find(&c, LAYERS "%d.mlp.shared_expert.up_proj.input_scale", i);
        assert_true(gate->dtype == DTYPE_BF16 && gate->n_dims == 1 && gate->shape[0] == 1);
        assert_true(fabsf(global * bf16_at(gate, 0) / 6 - 1) < 0.012f);
        assert_memory_equal(gate->data, up->data, 2);
    }
    checkpoint_close(&c);
}

static void modelopt_faults(void **state)
{
    (void)state;
    static const struct planted faults[] = {
        { { .edits = { F32_SET(EXPERT3 "gate_proj.weight_scale_2", thousand),
                       F32_SET(EXPERT3 "up_proj.weight_scale_2", thousand) } },
          true,
          "weight_scale_2 is above 1: it multiplies, and looks like the reciprocal" },
        { { .edits = { F32_SET(EXPERT3 "up_proj.weight_scale_2", not_a_number) } },
          true,
          "weight_scale_2 is not a finite number above 0" },
        { { .edits = { F32_SET(EXPERT3 "up_proj.input_scale", zero) } },
          true,
          "input_scale is not a finite number above 0" },
        { { .edits = { { .tensor = EXPERT3 "up_proj.input_scale", .kind = EDIT_DROP } } },
          true,
          "some experts of a layer have no input_scale" },
        { { .edits = { { .tensor = EXPERT3 "up_proj.weight_scale_2",
                         .kind = EDIT_RENAME,
                         .name = EXPERT3 "up_proj.weight_global_scale" } } },
          true,
          "names of another format (compressed-tensors, ModelOpt" },
        { { .edits = { { .tensor = Q_PROJ ".input_scale", .kind = EDIT_DROP } } },
          true,
          "'" Q_PROJ ".input_scale' is missing" },
        { { .edits = { F32_SET(Q_PROJ ".input_scale", zero) } },
          true,
          "input_scale is not a finite number above 0" },
        { { .edits = { F32_SET(Q_PROJ ".input_scale", thousand) } },
          false,
          "input_scale of an FP8 matrix is above 250" },
        { { .edits = { { .tensor = EXPERT3 "up_proj.weight_scale_2",
                         .kind = EDIT_DTYPE,
                         .dtype = DTYPE_I32 } } },
          true,
          "weight_scale_2 is not one F32" },
        { { .edits = { { 0 } },
            .config = "quantization_config.quant_method",
            .value = "\"compressed-tensors\"" },
          true,
          "config_groups: expected an object" },
    };
    must_find_planted("mixed-modelopt", faults, COUNT(faults));
    /* gate and up by a few percent */
    struct checkpoint c;
    must_open(&c, in(&fixture, "mixed-modelopt"));
    float other = f32_at(must_find(&c, EXPERT3 "gate_proj.weight_scale_2")) * 1.05f;
    checkpoint_close(&c);
    const struct planted pair = { { .edits = { F32_SET(EXPERT3 "up_proj.weight_scale_2", other) } },
                                  false,
                                  "weight_scale_2 of gate_proj and up_proj differ; some readers use one" };
    must_find_planted("mixed-modelopt", &pair, 1);
    variant_without(&fixture, "variant", in(&fixture, "mixed-modelopt"), "mtp.", NULL, NULL);
    struct verify_result r;
    run(&r, "variant", NULL);
    assert_true(findings_count(&r.findings, VERIFY_MTP, true) == 1);
    verify_deinit(&r);
    struct merge_mtp_options merge = { .model = in(&fixture, "variant"), .source = DEMO };
    struct merge_mtp_result merged;
    struct err e = { 0 };
    assert_false(merge_mtp(&merge, &merged, &e));
    assert_non_null(strstr(e.text, "quantization_config is not compressed-tensors'"));
}

/* Weights only, said in hf_quant_config.json with wildcards. */
static void modelopt_weights_only(void **state)
{
    (void)state;
    static const struct recipe_group groups[] = { { "group_0", SCHEME_NVFP4A16, all, 3 } };
    struct backend_options cpu = { .device = DEVICE_CPU, .threads = 2 };
    char path[700];
    quantize_demo("a16", groups, 1);
    rewrite("a16", "a16-ours", COMPRESSED_TENSORS, NULL);
    rewrite("a16", "a16-modelopt", MODELOPT, NULL);
    snprintf(path, sizeof path, "%s/hf_quant_config.json", in(&fixture, "a16-modelopt"));
    write_text(path,
               "{\"producer\":{\"name\":\"modelopt\"},\"quantization\":{\"quant_algo\":\"W4A16_NVFP4\","
               "\"kv_cache_quant_algo\":null,\"group_size\":16,\"exclude_modules\":[\"lm_head\","
               "\"*.mlp.gate\",\"*shared_expert_gate\",\"model.layers.?.linear_attn*\",\"model.visual*\","
               "\"mtp*\"]}}");
    must_run_alike("a16-ours", "a16-modelopt", &cpu);
    must_be_clean("a16-modelopt", SCHEME_NVFP4A16, 4 * 16 * 3 + 16);
    write_text(path, "{\"producer\":{\"name\":\"modelopt\"},\"quantization\":{\"quant_algo\":\"INT4_AWQ\"}}");
    struct checkpoint c;
    struct err e = { 0 };
    assert_false(checkpoint_open(&c, in(&fixture, "a16-modelopt"), &e));
    assert_non_null(
        strstr(e.text, "hf_quant_config.json: quantization_config.quant_algo: 'INT4_AWQ' is not"));
    /* a list that says less than the tensors: the tensors are right, the list is worth a word */
    write_text(path,
               "{\"quantization\":{\"quant_algo\":\"NVFP4\",\"exclude_modules\":[\"lm_head\","
               "\"*.mlp.gate\",\"*shared_expert_gate\",\"*self_attn*\",\"*linear_attn*\",\"model.visual*\","
               "\"mtp*\"]}}");
    must_run_alike("a16-ours", "a16-modelopt", &cpu);
    struct verify_result r;
    run(&r, "a16-modelopt", DEMO);
    assert_int_equal(verify_faults(&r), 0);
    assert_int_equal(findings_count(&r.findings, VERIFY_MODULES, false), 1);
    verify_deinit(&r);
}

/* Block FP8. */

static json_t *block_config(void)
{
    struct checkpoint c;
    must_open(&c, in(&fixture, "block"));
    json_t *names = json_array(), *v;
    size_t i;
    json_array_foreach(json_object_get(json_object_get(c.config_json, "quantization_config"), "ignore"), i,
                       v) if (strncmp(json_string_value(v), "re:", 3) != 0) json_array_append(names, v);
    json_array_append_new(names, json_string("mtp"));
    checkpoint_close(&c);
    return json_pack("{s:s, s:s, s:s, s:[i, i], s:o}", "quant_method", "fp8", "fmt", "e4m3",
                     "activation_scheme", "dynamic", "weight_block_size", 128, 128, "modules_to_not_convert",
                     names);
}

static void block_fp8(void **state)
{
    (void)state;
    static const struct recipe_group groups[] = { { "group_0", SCHEME_FP8_BLOCK, all, 3 } };
    struct backend_options cpu = { .device = DEVICE_CPU, .threads = 2 }, ref = { .device = DEVICE_REF };
    quantize_demo("block", groups, 1);
    rewrite("block", "block-official", BLOCK_FP8, block_config());
    must_run_alike("block", "block-official", &cpu);
    must_run_alike("block", "block-official", &ref);
    must_be_clean("block", SCHEME_FP8_BLOCK, 4 * 16 * 3 + 16);
    must_be_clean("block-official", SCHEME_FP8_BLOCK, 4 * 16 * 3 + 16);
    static const struct planted faults[] = {
        { { .edits = { { EXPERT3 "up_proj.weight_scale_inv", EDIT_BYTES, NULL, 0, 1, &bf_minus, 2, 0 } } },
          true,
          "not finite and above 0" },
        { { .edits = { { EXPERT3 "up_proj.weight_scale_inv", EDIT_BYTES, NULL, 0, 1, &bf_two, 2, 0 } } },
          true,
          "is above 1: it multiplies" },
        { { .edits = { { .tensor = Q_PROJ ".weight_scale_inv", .kind = EDIT_FLATTEN } } },
          true,
          "weight_scale_inv has not one element per 128 x 128" },
        { { .edits = { { .tensor = Q_PROJ ".weight_scale_inv",
                         .kind = EDIT_RENAME,
                         .name = Q_PROJ ".weight_scale" } } },
          true,
          "names of another format" },
        { { .edits = { { .tensor = Q_PROJ ".weight_scale_inv", .kind = EDIT_DROP } } },
          true,
          "is F8_E4M3 and has no weight_scale" },
    };
    must_find_planted("block-official", faults, COUNT(faults));
}

/* Readers run a layer's experts with the largest input scale of any of them: whose it is does not matter. */
static void fp8_experts_share_an_input_scale(void **state)
{
    (void)state;
    static const struct recipe_group groups[] = { { "group_0", SCHEME_FP8, all, 3 } };
    static const uint16_t quarter = 0x3e80; /* inputs up to 112: larger than any of the demo's */
    static const struct variant_of one = { .edits = { { EXPERT3 "gate_proj.input_scale", EDIT_BYTES, NULL, 0,
                                                        1, &quarter, 2, 0 } } };
    static const struct variant_of two = { .edits = { { LAYERS "1.mlp.experts.5.up_proj.input_scale",
                                                        EDIT_BYTES, NULL, 0, 1, &quarter, 2, 0 } } };
    struct backend_options cpu = { .device = DEVICE_CPU, .threads = 2 };
    quantize_demo("fp8", groups, 1);
    must_be_clean("fp8", SCHEME_FP8, 4 * 16 * 3 + 16);
    variant_write(&fixture, "one", in(&fixture, "fp8"), &one);
    variant_write(&fixture, "two", in(&fixture, "fp8"), &two);
    must_run_alike("one", "two", &cpu);
    assert_false(run_alike("fp8", "one", &cpu));
}

static int setup(void **state)
{
    (void)state;
    fixture_init(&fixture);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    fixture_deinit(&fixture);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(modelopt_mixed),  cmocka_unit_test(input_scales_are_measured),
        cmocka_unit_test(modelopt_faults), cmocka_unit_test(modelopt_weights_only),
        cmocka_unit_test(block_fp8),       cmocka_unit_test(fp8_experts_share_an_input_scale),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
