/* Every fault that verify knows, planted one at a time in a checkpoint that has none. */
#include "quantize/variant.h"
#include "quantize/verify.h"
#include <math.h>

#define LAYER1  "model.language_model.layers.1."
#define EXPERT3 LAYER1 "mlp.experts.3."
#define SHARED  LAYER1 "mlp.shared_expert."
#define Q_PROJ  "model.language_model.layers.3.self_attn.q_proj"
#define IGNORE  "quantization_config.ignore"

static struct fixture fixture;
static const char *good;

static void run(struct verify_result *r, const char *path, const char *source)
{
    struct err e = { 0 };
    struct verify_options o = { .path = path, .source = source, .threads = 2, .backend = &fixture.backend };
    if (!verify_run(r, &o, &e)) fail_msg("%s", e.text);
}

static void print_all(const struct verify_result *r)
{
    for (size_t i = 0; i < r->findings.n; i++) {
        char *text = findings_sentence(&r->findings.items[i]);
        print_message("%s: %s: %s\n", r->findings.items[i].is_fault ? "fault" : "warning",
                      verify_name((enum verify_step)r->findings.items[i].step), text);
        free(text);
    }
}

static void expect_clean(const char *path, const char *source)
{
    struct verify_result r;
    run(&r, path, source);
    if (r.findings.n > 0) print_all(&r);
    assert_int_equal(r.findings.n, 0);
    verify_deinit(&r);
}

static bool has(const struct verify_result *r, enum verify_step step, bool fault, const char *want)
{
    for (size_t i = 0; i < r->findings.n; i++) {
        const struct finding *x = &r->findings.items[i];
        char *text = findings_sentence(x);
        bool found = x->step == (int)step && x->is_fault == fault && strstr(text, want);
        free(text);
        if (found) return true;
    }
    return false;
}

/* The checkpoint has this finding, and no fault of another step unless the step is the one of layers, which
 * sees some faults of modules again. */
static void expect(const char *path, const char *source, enum verify_step step, bool fault, const char *want)
{
    struct verify_result r;
    run(&r, path, source);
    if (!has(&r, step, fault, want)) {
        print_all(&r);
        fail_msg("no %s of %s: '%s'", fault ? "fault" : "warning", verify_name(step), want);
    }
    for (size_t i = 0; i < r.findings.n; i++)
        if (r.findings.items[i].is_fault && r.findings.items[i].step != (int)step &&
            r.findings.items[i].step != VERIFY_LAYERS) {
            print_all(&r);
            fail_msg("a fault of another step");
        }
    if (!fault) assert_int_equal(verify_faults(&r), 0);
    verify_deinit(&r);
}

struct planted {
    struct variant_of variant;
    enum verify_step step;
    bool fault;
    const char *want;
};

static void plant(const struct planted *p, size_t n, const char *source)
{
    for (size_t i = 0; i < n; i++) {
        variant_write(&fixture, "variant", good, &p[i].variant);
        expect(in(&fixture, "variant"), source, p[i].step, p[i].fault, p[i].want);
    }
}

static const float zero = 0, one = 1, minus = -3, infinite = INFINITY, not_a_number = NAN, tiny = 2e-5f,
                   large = 1e6f, fifth = 0.02f;
static const uint16_t bf_two = 0x4000, bf_one = 0x3f80, bf_minus = 0xbf80;
static const uint8_t byte_00 = 0x00, byte_7f = 0x7f, byte_81 = 0x81, byte_ff = 0xff;

#define F32_SET(t, x)                                                                                        \
    {                                                                                                        \
        t, EDIT_BYTES, NULL, 0, 1, &(x), 4, 0                                                                \
    }
#define BYTE_SET(t, x)                                                                                       \
    {                                                                                                        \
        t, EDIT_BYTES, NULL, 5, 1, &(x), 1, 0                                                                \
    }
#define DROP(t)                                                                                              \
    {                                                                                                        \
        .tensor = t, .kind = EDIT_DROP                                                                       \
    }
#define RENAME(t, to)                                                                                        \
    {                                                                                                        \
        .tensor = t, .kind = EDIT_RENAME, .name = to                                                         \
    }
#define ADD(t, copy)                                                                                         \
    {                                                                                                        \
        .tensor = t, .kind = EDIT_ADD, .name = copy                                                          \
    }

/* Good ones. */

static void good_checkpoints_have_no_findings(void **state)
{
    (void)state;
    struct verify_result r;
    expect_clean(DEMO, NULL);
    expect_clean(DEMO, DEMO);
    expect_clean(good, NULL);
    expect_clean(good, DEMO);
    run(&r, good, DEMO);
    assert_int_equal(r.modules[SCHEME_NVFP4], 4 * 16 * 3);
    assert_int_equal(r.modules[SCHEME_FP8_DYNAMIC], 16);
    assert_int_equal(r.compared[SCHEME_NVFP4], 4 * 16 * 3);
    assert_int_equal(r.compared[SCHEME_FP8_DYNAMIC], 16);
    /* gate and up of experts, of shared experts with the MTP head's, q with k and v, DeltaNet's projections
     */
    assert_int_equal(r.steps[VERIFY_FUSED].n, 4 * 16 + 5 + 2 * 2 + 3 * 2);
    assert_int_equal(r.steps[VERIFY_MTP].n, 19);
    assert_int_equal(r.n_worst, VERIFY_WORST);
    assert_true(r.mean_error[SCHEME_NVFP4] > 0.08 && r.mean_error[SCHEME_NVFP4] < 0.11);
    for (int i = 1; i < r.n_worst; i++) assert_true(r.worst[i - 1].error >= r.worst[i].error);
    verify_deinit(&r);
}

static void zero_matrices_may_have_a_scale_of_one(void **state)
{
    (void)state;
    static const struct variant_of v = { .edits = {
                                             F32_SET(EXPERT3 "down_proj.weight_global_scale", one),
                                             { EXPERT3 "down_proj.weight_packed", EDIT_BYTES, NULL, 0,
                                               256 * 64 / 2, &byte_00, 1, 0 },
                                         } };
    variant_write(&fixture, "variant", good, &v);
    expect_clean(in(&fixture, "variant"), NULL);
}

/* Files. */

static void folders_that_do_not_open(void **state)
{
    (void)state;
    struct verify_result r;
    struct err e = { 0 };
    struct verify_options o = { .path = in(&fixture, "nowhere"), .backend = &fixture.backend };
    assert_false(verify_run(&r, &o, &e));
    assert_non_null(strstr(e.text, "no such folder"));
    verify_deinit(&r);
    copy_demo(&fixture, "stray");
    write_text(in(&fixture, "stray/model.safetensors"), "x");
    expect(in(&fixture, "stray"), NULL, VERIFY_FILES, true, "model.safetensors lies beside");
    assert_int_equal(unlink(in(&fixture, "stray/model.safetensors")), 0);
    assert_int_equal(unlink(in(&fixture, "stray/model-00002-of-00002.safetensors")), 0);
    expect(in(&fixture, "stray"), NULL, VERIFY_FILES, true,
           "shard model-00002-of-00002.safetensors is missing");
    o = (struct verify_options){ .path = good,
                                 .source = in(&fixture, "nowhere"),
                                 .backend = &fixture.backend };
    assert_false(verify_run(&r, &o, &e));
    assert_non_null(strstr(e.text, "--source: "));
    verify_deinit(&r);
}

/* Modules and layers. */

static void modules_are_accounted_for(void **state)
{
    (void)state;
    static const struct planted planted[] = {
        { { .edits = { DROP(EXPERT3 "up_proj.weight_scale") } },
          VERIFY_MODULES,
          true,
          "weight_packed has no weight_scale: " EXPERT3 "up_proj" },
        { { .edits = { DROP(EXPERT3 "up_proj.weight_global_scale") } },
          VERIFY_MODULES,
          true,
          "weight_packed has no weight_global_scale: " EXPERT3 "up_proj" },
        { { .edits = { DROP(EXPERT3 "up_proj.weight_packed") } },
          VERIFY_MODULES,
          true,
          "a scale whose weight is missing: " EXPERT3 "up_proj.input_global_scale, " EXPERT3
          "up_proj.weight_global_scale, " EXPERT3 "up_proj.weight_scale" },
        { { .edits = { DROP(SHARED "up_proj.weight_scale") } },
          VERIFY_MODULES,
          true,
          "weight is F8_E4M3 and has no weight_scale: " SHARED "up_proj" },
        { { .edits = { { .tensor = EXPERT3 "up_proj.weight_packed", .kind = EDIT_FLATTEN } } },
          VERIFY_MODULES,
          true,
          "weight_packed is not a matrix of U8" },
        { { .edits = { { .tensor = EXPERT3 "up_proj.weight_scale",
                         .kind = EDIT_DTYPE,
                         .dtype = DTYPE_U8 } } },
          VERIFY_MODULES,
          true,
          "weight_scale is not F8_E4M3 with one element per 16 columns" },
        { { .edits = { { .tensor = EXPERT3 "up_proj.weight_global_scale",
                         .kind = EDIT_DTYPE,
                         .dtype = DTYPE_I32 } } },
          VERIFY_MODULES,
          true,
          "weight_global_scale is not one F32" },
        { { .edits = { { .tensor = EXPERT3 "up_proj.input_global_scale",
                         .kind = EDIT_DTYPE,
                         .dtype = DTYPE_I32 } } },
          VERIFY_MODULES,
          true,
          "input_global_scale is not one F32" },
        { { .edits = { { .tensor = SHARED "up_proj.weight_scale",
                         .kind = EDIT_DTYPE,
                         .dtype = DTYPE_I16 } } },
          VERIFY_MODULES,
          true,
          "weight_scale of an FP8 weight is not BF16, F16 or F32" },
        { { .edits = { DROP(SHARED "up_proj.weight_scale"),
                       ADD(SHARED "down_proj.weight_scale", SHARED "up_proj.weight_scale") } },
          VERIFY_MODULES,
          true,
          "weight_scale of an FP8 weight is neither one, nor one per row, nor one per 128 x 128" },
        { { .edits = { ADD(SHARED "up_proj.weight", EXPERT3 "up_proj.weight") } },
          VERIFY_MODULES,
          true,
          "both weight and weight_packed are there: " EXPERT3 "up_proj" },
        { { .edits = { ADD("mtp.layers.0.mlp.experts.down_proj", LAYER1 "mlp.experts.down_proj") } },
          VERIFY_MODULES,
          true,
          "experts are there twice, fused and one by one: " LAYER1 "mlp.experts.0.down_proj" },
        { { .edits = { RENAME(SHARED "up_proj.weight",
                              "model.language_model.layers.9.mlp.shared_expert.up_proj.weight"),
                       RENAME(SHARED "up_proj.weight_scale",
                              "model.language_model.layers.9.mlp.shared_expert.up_proj.weight_scale") } },
          VERIFY_MODULES,
          true,
          "belongs to a layer or expert that config.json does not have" },
        { { .edits = { ADD(SHARED "up_proj.weight_scale", LAYER1 "mlp.gate.weight_scale") } },
          VERIFY_MODULES,
          true,
          "scales lie beside a weight that needs none: " LAYER1 "mlp.gate" },
        { { .edits = { ADD(EXPERT3 "up_proj.weight_global_scale", EXPERT3 "up_proj.weight_scale_2") } },
          VERIFY_MODULES,
          true,
          "names of another format (compressed-tensors, ModelOpt" },
        { { .config = "quantization_config", .value = NULL },
          VERIFY_MODULES,
          true,
          "quantization_config says not quantized, the file holds NVFP4" },
        { { .config = IGNORE, .value = "[\"re:.*\"]" },
          VERIFY_MODULES,
          true,
          "quantization_config says not quantized, the file holds FP8" },
        { { .edits = { RENAME(SHARED "up_proj.weight", SHARED "up_proj.other") } },
          VERIFY_MODULES,
          true,
          "a scale whose weight is missing" },
    };
    plant(planted, sizeof planted / sizeof *planted, NULL);
}

/* The config says that what is plain is quantized. */
static void plain_weights_must_be_ignored(void **state)
{
    (void)state;
    static const char group[] =
        "{\"targets\": [\"Linear\", \"re:.*norm$\"], \"weights\": {\"num_bits\": 8, \"type\": \"float\", "
        "\"strategy\": \"channel\"}}";
    static const struct planted planted[] = {
        { { .config = "quantization_config.config_groups.group_9", .value = group },
          VERIFY_MODULES,
          true,
          "quantization_config quantizes what is no linear module: model.language_model." },
    };
    plant(planted, 1, NULL);
    char block[600];
    snprintf(block, sizeof block,
             "{\"quant_method\": \"compressed-tensors\", \"ignore\": [\"re:.*mtp.*\"], \"config_groups\": "
             "{\"group_0\": {\"targets\": [\"re:.*experts.*\"], \"weights\": {\"num_bits\": 8, \"type\": "
             "\"float\", \"strategy\": \"channel\"}}}}");
    variant_write(&fixture, "variant", DEMO,
                  &(struct variant_of){ .config = "quantization_config", .value = block });
    expect(in(&fixture, "variant"), NULL, VERIFY_MODULES, true,
           "quantization_config says FP8A16, the file holds plain weights: "
           "model.language_model.layers.0.mlp.experts.0.down_proj, "
           "model.language_model.layers.0.mlp.experts.1.down_proj, "
           "model.language_model.layers.0.mlp.experts.2.down_proj and 189 more");
}

static void layers_have_the_shapes_of_the_config(void **state)
{
    (void)state;
    static const struct planted planted[] = {
        { { .edits = { DROP(LAYER1 "input_layernorm.weight") } },
          VERIFY_LAYERS,
          true,
          "tensor '" LAYER1 "input_layernorm.weight' is missing" },
        { { .edits = { DROP("lm_head.weight") } }, VERIFY_LAYERS, true, "'lm_head.weight' is missing" },
        { { .edits = { DROP("model.language_model.norm.weight") } },
          VERIFY_LAYERS,
          true,
          "norm.weight' is missing" },
        { { .config = "text_config.shared_expert_intermediate_size", .value = "128" },
          VERIFY_LAYERS,
          true,
          "shared_expert.gate_proj.weight': expected shape [128, 256] from config.json, found [64, 256]" },
    };
    plant(planted, 3, NULL);
    variant_write(&fixture, "variant", good, &planted[3].variant); /* the MTP head has such tensors too */
    struct verify_result r;
    run(&r, in(&fixture, "variant"), NULL);
    assert_true(has(&r, VERIFY_LAYERS, true, planted[3].want));
    assert_true(has(&r, VERIFY_MTP, true, "do not have the shape that config.json asks for"));
    verify_deinit(&r);
    variant_without(&fixture, "variant", good, "model.visual.", NULL, NULL);
    expect(in(&fixture, "variant"), NULL, VERIFY_MODULES, false, "no tensor of one is there");
}

/* Scales. */

static void scales_are_numbers(void **state)
{
    (void)state;
    static const char global[] = "weight_global_scale is not a finite number above 0";
    static const char input[] = "input_global_scale is not a finite number above 0";
    static const char fp8[] = "weight_scale of an FP8 matrix has values that are not finite and above 0";
    static const char groups[] = "group scales are zero, negative or NaN (bytes outside 0x01 to 0x7e)";
    static const struct planted planted[] = {
        { { .edits = { F32_SET(EXPERT3 "down_proj.weight_global_scale", zero) } },
          VERIFY_SCALES,
          true,
          global },
        { { .edits = { F32_SET(EXPERT3 "down_proj.weight_global_scale", minus) } },
          VERIFY_SCALES,
          true,
          global },
        { { .edits = { F32_SET(EXPERT3 "down_proj.weight_global_scale", infinite) } },
          VERIFY_SCALES,
          true,
          global },
        { { .edits = { F32_SET(EXPERT3 "down_proj.weight_global_scale", not_a_number) } },
          VERIFY_SCALES,
          true,
          "above 0 (nan): " EXPERT3 "down_proj.weight_global_scale" },
        { { .edits = { F32_SET(EXPERT3 "down_proj.weight_global_scale", one) } },
          VERIFY_SCALES,
          false,
          "weight_global_scale is exactly 1 although the matrix is not zero" },
        { { .edits = { F32_SET(EXPERT3 "down_proj.weight_global_scale", tiny) } },
          VERIFY_SCALES,
          true,
          "weight_global_scale is below 1: it divides, and looks like the reciprocal that ModelOpt stores as "
          "weight_scale_2 (2e-05)" },
        { { .edits = { F32_SET(EXPERT3 "down_proj.input_global_scale", zero) } },
          VERIFY_SCALES,
          true,
          input },
        { { .edits = { F32_SET(EXPERT3 "down_proj.input_global_scale", infinite) } },
          VERIFY_SCALES,
          true,
          input },
        { { .edits = { F32_SET(EXPERT3 "down_proj.input_global_scale", not_a_number) } },
          VERIFY_SCALES,
          true,
          input },
        { { .edits = { BYTE_SET(EXPERT3 "down_proj.weight_scale", byte_00) } }, VERIFY_SCALES, true, groups },
        { { .edits = { BYTE_SET(EXPERT3 "down_proj.weight_scale", byte_7f) } }, VERIFY_SCALES, true, groups },
        { { .edits = { BYTE_SET(EXPERT3 "down_proj.weight_scale", byte_81) } }, VERIFY_SCALES, true, groups },
        { { .edits = { BYTE_SET(EXPERT3 "down_proj.weight_scale", byte_ff) } }, VERIFY_SCALES, true, groups },
        { { .edits = { BYTE_SET(SHARED "up_proj.weight", byte_7f) } },
          VERIFY_SCALES,
          true,
          "FP8 codes hold NaN (0x7f or 0xff): " SHARED "up_proj.weight" },
        { { .edits = { BYTE_SET(SHARED "up_proj.weight", byte_ff) } },
          VERIFY_SCALES,
          true,
          "FP8 codes hold NaN" },
        { { .edits = { { Q_PROJ ".weight_scale", EDIT_BYTES, NULL, 8, 1, &bf_minus, 2, 0 } } },
          VERIFY_SCALES,
          true,
          fp8 },
        { { .edits = { { Q_PROJ ".weight_scale", EDIT_BYTES, NULL, 8, 1, &bf_two, 2, 0 } } },
          VERIFY_SCALES,
          true,
          "weight_scale of an FP8 matrix is above 1: it multiplies, and looks like a reciprocal (2)" },
        { { .edits = { { Q_PROJ ".weight_scale", EDIT_BYTES, NULL, 0, 1024, &bf_one, 2, 0 } } },
          VERIFY_SCALES,
          false,
          "weight_scale of an FP8 matrix is exactly 1" },
    };
    plant(planted, sizeof planted / sizeof *planted, NULL);
}

static void plain_weights_are_numbers(void **state)
{
    (void)state;
    static const uint16_t bf_nan = 0x7fc0, bf_infinite = 0xff80;
    static const struct planted planted[] = {
        { { .edits = { { "lm_head.weight", EDIT_BYTES, NULL, 6, 1, &bf_nan, 2, 0 } } },
          VERIFY_SCALES,
          true,
          "unquantized tensors hold NaN or infinity: lm_head.weight" },
        { { .edits = { { "mtp.norm.weight", EDIT_BYTES, NULL, 510, 1, &bf_infinite, 2, 0 } } },
          VERIFY_SCALES,
          true,
          "unquantized tensors hold NaN or infinity: mtp.norm.weight" },
        { { .edits = { F32_SET(LAYER1 "linear_attn.A_log", infinite) } },
          VERIFY_SCALES,
          true,
          "unquantized tensors hold NaN or infinity: " LAYER1 "linear_attn.A_log" },
    };
    plant(planted, sizeof planted / sizeof *planted, NULL);
}

/* Suspicious values of an input scale are within the spread of a layer only when the whole layer has them. */
static void input_scales_that_look_wrong(void **state)
{
    (void)state;
    static const char *const want[] = { "input_global_scale is below 0.1: it looks like the reciprocal",
                                        "input_global_scale is exactly 1: either its calibration saw" };
    const float values[] = { fifth, one };
    struct checkpoint c;
    must_open(&c, good);
    for (int k = 0; k < 2; k++) {
        struct tensor *all = malloc(c.n_tensors * sizeof *all);
        for (size_t i = 0; i < c.n_tensors; i++) {
            all[i] = *c.tensors[i];
            if (ends_in(all[i].name, ".input_global_scale")) all[i].data = (const uint8_t *)&values[k];
        }
        assert_true(file_remove_tree(in(&fixture, "variant"), NULL));
        write_checkpoint(&fixture, "variant", c.config_json, all, c.n_tensors);
        free(all);
        expect(in(&fixture, "variant"), NULL, VERIFY_SCALES, false, want[k]);
    }
    checkpoint_close(&c);
}

/* Experts. */

static void experts_of_a_layer_agree(void **state)
{
    (void)state;
    static const float quadruple = 4, double_of = 8;
    static const struct planted planted[] = {
        { { .edits = { F32_SET(EXPERT3 "gate_proj.weight_global_scale", quadruple),
                       F32_SET(EXPERT3 "up_proj.weight_global_scale", double_of) } },
          VERIFY_FUSED,
          true,
          "weight_global_scale of gate_proj and up_proj differ; readers use one for both (4 and 8, "
          "ratio "
          "2, in " LAYER1 "mlp.experts.3): " LAYER1 "mlp.experts.3" },
        { { .edits = { DROP(EXPERT3 "up_proj.input_global_scale") } },
          VERIFY_FUSED,
          true,
          "some experts of a layer have no input_global_scale, which readers leave unset; how many matrices "
          "(1): layer 1" },
        { { .edits = { F32_SET(EXPERT3 "down_proj.input_global_scale", large) } },
          VERIFY_FUSED,
          true,
          "input_global_scale of down_proj spreads over a factor of 1024 or more" },
        { { .edits = { F32_SET(EXPERT3 "up_proj.input_global_scale", large) } },
          VERIFY_FUSED,
          true,
          "input_global_scale of gate_proj and up_proj spreads over a factor of 1024 or more" },
    };
    plant(planted, sizeof planted / sizeof *planted, NULL);
}

/* Gives the modules that match `target` a scheme of their own: like the group of that many bits, without
 * quantized inputs, so that what is stored still agrees with it. */
static void split_group(int bits, const char *target)
{
    struct checkpoint c;
    must_open(&c, good);
    const json_t *groups =
        json_object_get(json_object_get(c.config_json, "quantization_config"), "config_groups");
    const char *key;
    json_t *group, *changed = json_deep_copy(groups), *copy = NULL;
    json_object_foreach((json_t *)(uintptr_t)groups, key, group)
    {
        const json_t *found = json_object_get(json_object_get(group, "weights"), "num_bits");
        if (json_integer_value(found) == bits) copy = json_deep_copy(group);
    }
    assert_non_null(copy);
    json_object_set_new(copy, "targets", json_pack("[s]", target));
    json_object_set_new(copy, "input_activations", json_null());
    json_object_set_new(changed, "group_9", copy);
    char *text = json_dumps(changed, 0);
    variant_write(&fixture, "variant", good,
                  &(struct variant_of){ .config = "quantization_config.config_groups", .value = text });
    free(text);
    json_decref(changed);
    checkpoint_close(&c);
}

static void what_runs_as_one_has_one_scheme(void **state)
{
    (void)state;
    split_group(4, EXPERT3 "up_proj");
    expect(in(&fixture, "variant"), NULL, VERIFY_FUSED, true,
           "experts of one layer have different schemes; readers look at expert 0 only: layer 1");
    split_group(8, Q_PROJ);
    expect(in(&fixture, "variant"), NULL, VERIFY_FUSED, false,
           "q_proj and k_proj have different schemes; vLLM joins them and refuses: "
           "model.language_model.layers.3.self_attn");
    expect(in(&fixture, "variant"), NULL, VERIFY_FUSED, false, "q_proj and v_proj have different schemes");
}

static void a_layer_without_input_scales(void **state)
{
    (void)state;
    struct checkpoint c;
    must_open(&c, good);
    size_t n = 0;
    struct tensor *all = malloc(c.n_tensors * sizeof *all);
    for (size_t i = 0; i < c.n_tensors; i++)
        if (!ends_in(c.tensors[i]->name, ".input_global_scale") || !strstr(c.tensors[i]->name, "layers.2."))
            all[n++] = *c.tensors[i];
    assert_true(file_remove_tree(in(&fixture, "variant"), NULL));
    write_checkpoint(&fixture, "variant", c.config_json, all, n);
    free(all);
    checkpoint_close(&c);
    expect(in(&fixture, "variant"), NULL, VERIFY_FUSED, false,
           "no expert has an input_global_scale: layer 2");
}

/* The MTP head. */

static void the_mtp_head_is_there_and_left_alone(void **state)
{
    (void)state;
    static const struct planted planted[] = {
        { { .edits = { DROP("mtp.fc.weight"), DROP("mtp.layers.0.mlp.experts.down_proj") } },
          VERIFY_MTP,
          true,
          "tensors of the MTP head are missing: mtp.fc.weight, mtp.layers.0.mlp.experts.down_proj" },
        { { .edits = { { .tensor = "mtp.fc.weight", .kind = EDIT_FLATTEN } } },
          VERIFY_MTP,
          true,
          "tensors of the MTP head do not have the shape that config.json asks for: mtp.fc.weight" },
        { { .config = IGNORE, .value = "[]" },
          VERIFY_MTP,
          true,
          "no entry of quantization_config.ignore covers it (\"re:.*mtp.*\" would): "
          "mtp.layers.0.mlp.experts.0."
          "down_proj" },
        { { .config = "text_config.mtp_num_hidden_layers", .value = "0" },
          VERIFY_MTP,
          false,
          "mtp tensors are there, config.json has no mtp_num_hidden_layers" },
    };
    plant(planted, sizeof planted / sizeof *planted, NULL);
    variant_without(&fixture, "variant", good, "mtp.", NULL, NULL);
    expect(in(&fixture, "variant"), NULL, VERIFY_MTP, true,
           "config.json says mtp_num_hidden_layers = 1, no mtp tensor is there: quench merge-mtp brings them "
           "back from the source");
    variant_without(&fixture, "variant", good, "mtp.", "text_config.mtp_num_hidden_layers", "0");
    expect_clean(in(&fixture, "variant"), NULL);
}

/* The source. */

static void weights_are_the_sources(void **state)
{
    (void)state;
    static const uint8_t code = 0x77;
    static const struct planted planted[] = {
        { { .edits = { BYTE_SET("lm_head.weight", byte_81) } },
          VERIFY_SOURCE,
          true,
          "unquantized tensors differ from the source's: lm_head.weight" },
        { { .edits = { DROP("model.visual.merger.norm.bias") } },
          VERIFY_SOURCE,
          true,
          "tensors of the source are missing: model.visual.merger.norm.bias" },
        { { .edits = { { .tensor = "model.visual.blocks.0.mlp.linear_fc1.weight", .kind = EDIT_FLATTEN } } },
          VERIFY_SOURCE,
          true,
          "tensors do not have the source's shape: model.visual.blocks.0.mlp.linear_fc1" },
        { { .edits = { { .tensor = "model.visual.merger.norm.bias",
                         .kind = EDIT_DTYPE,
                         .dtype = DTYPE_F16 } } },
          VERIFY_SOURCE,
          false,
          "tensors are of another type than the source's: model.visual.merger.norm" },
        { { .edits = { { EXPERT3 "down_proj.weight_packed", EDIT_BYTES, NULL, 0, 256, &code, 1, 0 } } },
          VERIFY_SOURCE,
          false,
          "weights are further from the source's than rounding explains (17 %)" },
        { { .edits = { { EXPERT3 "down_proj.weight_packed", EDIT_BYTES, NULL, 0, 8192, &code, 1, 0 } } },
          VERIFY_SOURCE,
          true,
          "weights decode to something else than the source's" },
        { { .edits = { { .tensor = SHARED "up_proj.weight",
                         .kind = EDIT_BYTES,
                         .n = 16384,
                         .bytes = &byte_00,
                         .size = 1 } } },
          VERIFY_SOURCE,
          true,
          "weights decode to something else than the source's (100 %, 0 times the norm, " SHARED
          "up_proj): " SHARED "up_proj" },
    };
    plant(planted, sizeof planted / sizeof *planted, DEMO);
    struct verify_result r;
    variant_write(
        &fixture, "variant", good,
        &(struct variant_of){ .edits = { F32_SET(EXPERT3 "down_proj.weight_global_scale", tiny) } });
    run(&r, in(&fixture, "variant"), DEMO);
    assert_true(
        has(&r, VERIFY_SOURCE, true,
            "weights decode to many times the source's: weight_global_scale is stored as its reciprocal"));
    assert_string_equal(r.worst[0].module, EXPERT3 "down_proj");
    verify_deinit(&r);
}

/* A module that is gone is a fault of its layer, and the comparison names it as well. */
static void missing_experts_are_named(void **state)
{
    (void)state;
    struct verify_result r;
    variant_without(&fixture, "variant", good, EXPERT3 "up_proj.", NULL, NULL);
    run(&r, in(&fixture, "variant"), DEMO);
    assert_true(has(&r, VERIFY_LAYERS, true, "tensor '" EXPERT3 "up_proj.weight' is missing"));
    assert_true(has(&r, VERIFY_SOURCE, true, "matrices of the source are missing: " EXPERT3 "up_proj"));
    verify_deinit(&r);
}

/* Scores. */

static void scores_are_judged(void **state)
{
    (void)state;
    struct verify_result r = { 0 };
    verify_score(&r, 50, 49, 2048, NULL);
    assert_int_equal(r.findings.n, 0);
    verify_score(&r, 120, 50, 2048, NULL);
    assert_true(has(&r, VERIFY_SCORE, false, "perplexity 120.0000 is 2.4 times the source's"));
    assert_int_equal(verify_faults(&r), 0);
    verify_score(&r, NAN, 0, 2048, NULL);
    assert_true(has(&r, VERIFY_SCORE, true, "perplexity nan is no better than guessing among 2048 tokens"));
    verify_score(&r, 2048, 0, 2048, NULL);
    assert_true(has(&r, VERIFY_SCORE, true, "perplexity 2048 is no better"));
    verify_score(&r, 0, 0, 2048, "why not");
    assert_true(has(&r, VERIFY_SCORE, true, "the text could not be scored: why not"));
    verify_deinit(&r);
}

static int setup(void **state)
{
    (void)state;
    static char path[512];
    fixture_init(&fixture);
    snprintf(path, sizeof path, "%s", in(&fixture, "good"));
    good = path;
    struct quantize_options o = fixture_options(&fixture, DEMO, good);
    must_run(&o);
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
        cmocka_unit_test(good_checkpoints_have_no_findings),
        cmocka_unit_test(zero_matrices_may_have_a_scale_of_one),
        cmocka_unit_test(folders_that_do_not_open),
        cmocka_unit_test(modules_are_accounted_for),
        cmocka_unit_test(plain_weights_must_be_ignored),
        cmocka_unit_test(layers_have_the_shapes_of_the_config),
        cmocka_unit_test(scales_are_numbers),
        cmocka_unit_test(plain_weights_are_numbers),
        cmocka_unit_test(input_scales_that_look_wrong),
        cmocka_unit_test(experts_of_a_layer_agree),
        cmocka_unit_test(what_runs_as_one_has_one_scheme),
        cmocka_unit_test(a_layer_without_input_scales),
        cmocka_unit_test(the_mtp_head_is_there_and_left_alone),
        cmocka_unit_test(weights_are_the_sources),
        cmocka_unit_test(missing_experts_are_named),
        cmocka_unit_test(scores_are_judged),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
