/* What a run refuses, and that a run which fails or dies leaves nothing that looks like a checkpoint. */
#include "quantize/fixture.h"
#include <math.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>

static struct fixture fixture;

#define LAYER  "model.language_model.layers."
#define LAYER1 LAYER "1."

/* --- destinations
 * ------------------------------------------------------------------------------------------------ */

static void destination_must_be_new(void **state)
{
    (void)state;
    assert_int_equal(mkdir(in(&fixture, "there"), 0777), 0);
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "there"));
    must_fail(&o, ERR_ARGUMENT, "already exists; remove it or name another destination");
    write_text(in(&fixture, "file"), "x");
    o.destination = in(&fixture, "file");
    must_fail(&o, ERR_ARGUMENT, "already exists");
    o.destination = in(&fixture, "none/new");
    must_fail(&o, ERR_ARGUMENT, "/none to create it in");
    o.destination = "";
    must_fail(&o, ERR_ARGUMENT, "the destination has no name");
}

static void destination_must_not_touch_the_source(void **state)
{
    (void)state;
    copy_demo(&fixture, "src");
    struct quantize_options o = fixture_options(&fixture, in(&fixture, "src"), in(&fixture, "src"));
    must_fail(&o, ERR_ARGUMENT, "the destination is the source folder");
    o.destination = in(&fixture, "src/");
    must_fail(&o, ERR_ARGUMENT, "the destination is the source folder");
    o.destination = in(&fixture, "src/new");
    must_fail(&o, ERR_ARGUMENT, "lies inside the source folder");
    assert_int_equal(symlink("src", in(&fixture, "link")), 0);
    o.destination = in(&fixture, "link");
    must_fail(&o, ERR_ARGUMENT, "the destination is the source folder");
    o.destination = in(&fixture, "link/new");
    must_fail(&o, ERR_ARGUMENT, "lies inside the source folder");
}

/* The source lies where the run would clear away an interrupted one. */
static void source_is_no_leftover(void **state)
{
    (void)state;
    struct quantize_result r;
    struct err e = { 0 };
    copy_demo(&fixture, "a.quench-partial");
    struct quantize_options o =
        fixture_options(&fixture, in(&fixture, "a.quench-partial"), in(&fixture, "a"));
    assert_false(quantize_run(&o, &r, &e));
    assert_non_null(strstr(e.text, "the source folder is where this run would write"));
    assert_true(file_exists(in(&fixture, "a.quench-partial/config.json")));
}

/* --- sources
 * ----------------------------------------------------------------------------------------------------- */

static void source_must_not_be_quantized(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "once"));
    must_run(&o);
    o.source = in(&fixture, "once");
    o.destination = in(&fixture, "twice");
    must_fail(&o, ERR_ARGUMENT, "already quantized: config.json has a quantization_config");

    static const uint8_t byte = 0;
    struct tensor packed = {
        .name = "x.weight_packed", .dtype = DTYPE_U8, .n_dims = 1, .shape = { 1 }, .data = &byte, .bytes = 1
    };
    json_t *config = demo_config();
    write_checkpoint(&fixture, "unannounced", config, &packed, 1);
    json_decref(config);
    o.source = in(&fixture, "unannounced");
    must_fail(&o, ERR_ARGUMENT, "already quantized: it has a tensor 'x.weight_packed'");
    o.source = in(&fixture, "missing");
    must_fail(&o, ERR_IO, "no such folder");
}

struct variant {
    const char *inner; /* moe_intermediate_size */
    int64_t gate_rows, down_cols;
    enum dtype dtype;
    enum err_code code;
    const char *want;
};

static void try_variant(const struct variant *v)
{
    static const char name[] = LAYER1 "mlp.experts.down_proj", other[] = LAYER1 "mlp.experts.gate_up_proj";
    unsigned width = dtype_bytes(v->dtype);
    struct tensor t[] = {
        { .name = name, .dtype = v->dtype, .n_dims = 3, .shape = { 16, 256, v->down_cols } },
        { .name = other, .dtype = v->dtype, .n_dims = 3, .shape = { 16, v->gate_rows, 256 } },
    };
    t[0].bytes = (uint64_t)(16 * 256 * v->down_cols) * width;
    t[1].bytes = (uint64_t)(16 * v->gate_rows * 256) * width;
    uint8_t *zeros = calloc(t[0].bytes + t[1].bytes, 1);
    t[0].data = t[1].data = zeros;
    json_t *config = demo_config();
    json_object_set_new(json_object_get(config, "text_config"), "moe_intermediate_size",
                        json_integer(atoi(v->inner)));
    write_checkpoint(&fixture, "odd", config, t, 2);
    json_decref(config);
    free(zeros);
    struct quantize_options o = fixture_options(&fixture, in(&fixture, "odd"), in(&fixture, "odd-q"));
    must_fail(&o, v->code, v->want);
    assert_true(file_remove_tree(in(&fixture, "odd"), NULL));
}

static void shapes_must_fit_the_format(void **state)
{
    (void)state;
    static const struct variant variants[] = {
        { "24", 48, 24, DTYPE_BF16, ERR_UNSUPPORTED,
          "tensor '" LAYER1 "mlp.experts.down_proj': 24 columns are not a multiple of 16, as NVFP4 needs" },
        { "64", 128, 32, DTYPE_BF16, ERR_FORMAT,
          "tensor '" LAYER1
          "mlp.experts.down_proj': shape [16, 256, 32], config.json asks for [16, 256, 64]" },
        { "64", 128, 64, DTYPE_F32, ERR_UNSUPPORTED,
          "tensor '" LAYER1 "mlp.experts.down_proj': F32 cannot be packed as NVFP4, only BF16 can" },
    };
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) try_variant(&variants[i]);
}

static void weights_must_be_finite(void **state)
{
    (void)state;
    copy_demo(&fixture, "nan");
    /* expert 5's up_proj, its last element */
    patch(&fixture, "nan", LAYER1 "mlp.experts.gate_up_proj", 6 * 128 * 256 - 1, 1, NAN);
    struct quantize_options o = fixture_options(&fixture, in(&fixture, "nan"), in(&fixture, "nan-q"));
    must_fail(&o, ERR_FORMAT, "calibration: layer 1, expert 5: the input of down_proj has NaN values");
    copy_demo(&fixture, "inf");
    patch(&fixture, "inf", LAYER1 "mlp.experts.down_proj", 3 * 256 * 64, 1, INFINITY);
    o.source = in(&fixture, "inf");
    /* which the calibration only sees where a token is routed to expert 3 */
    struct quantize_result r;
    struct err e = { 0 };
    assert_false(quantize_run(&o, &r, &e));
    if (!strstr(e.text, "experts.3.down_proj' has a weight that is infinite") &&
        !strstr(e.text, "calibration: "))
        fail_msg("%s", e.text);
    assert_false(file_exists(o.destination) || has_partial(o.destination));
}

/* An expert that is all zeros: its scales are 1 and the user hears of it. */
static void zeros_get_scale_one(void **state)
{
    (void)state;
    struct checkpoint c;
    copy_demo(&fixture, "zero");
    patch(&fixture, "zero", LAYER1 "mlp.experts.gate_up_proj", 5 * 128 * 256, 128 * 256, 0);
    struct quantize_options o = fixture_options(&fixture, in(&fixture, "zero"), in(&fixture, "zero-q"));
    fixture.warnings[0] = 0;
    must_run(&o);
    assert_non_null(strstr(fixture.warnings,
                           "module '" LAYER1 "mlp.experts.5.down_proj': every calibration input is"
                           " zero; its input scale is 1\n"));
    must_open(&c, o.destination);
    assert_true(f32_at(must_find(&c, LAYER1 "mlp.experts.5.down_proj.input_global_scale")) == 1);
    assert_true(f32_at(must_find(&c, LAYER1 "mlp.experts.5.up_proj.weight_global_scale")) == 1);
    const struct tensor *scale = must_find(&c, LAYER1 "mlp.experts.5.up_proj.weight_scale");
    for (uint64_t i = 0; i < scale->bytes; i++) assert_int_equal(scale->data[i], 0x20);
    checkpoint_close(&c);
}

/* --- recipes
 * ----------------------------------------------------------------------------------------------------- */

/* All but the targets is ignored. */
static void try_recipe(enum scheme scheme, const char *target, enum err_code code, const char *want)
{
    char others[300];
    const char *targets[] = { target }, *ignore[] = { others };
    struct recipe_group group = { "group_0", scheme, targets, 1 };
    struct recipe recipe = {
        .name = "test", .groups = &group, .n_groups = 1, .ignore = ignore, .n_ignore = 1
    };
    snprintf(others, sizeof others, "re:(?!%s)", strncmp(target, "re:", 3) == 0 ? target + 3 : target);
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "recipe-q"));
    o.recipe = &recipe;
    must_fail(&o, code, want);
}

static void recipes_must_be_possible(void **state)
{
    (void)state;
    try_recipe(SCHEME_NVFP4, "re:.*nothing", ERR_ARGUMENT, "recipe 'test' matches none of its modules");
    try_recipe(SCHEME_NVFP4, "re:mtp.*", ERR_ARGUMENT, "recipe 'test' matches none of its modules");
    try_recipe(SCHEME_NVFP4, "re:(", ERR_FORMAT, "recipe 'test': ");
    try_recipe(SCHEME_NVFP4, "re:.*mlp\\.gate", ERR_UNSUPPORTED,
               "module '" LAYER "0.mlp.gate': NVFP4: readers build this one unquantized");
    try_recipe(SCHEME_FP8_DYNAMIC, "re:.*shared_expert_gate", ERR_UNSUPPORTED,
               "shared_expert_gate': FP8_DYNAMIC: readers build this one unquantized");
    try_recipe(SCHEME_NVFP4, "lm_head", ERR_UNSUPPORTED, "module 'lm_head': NVFP4 needs a measured input");
    try_recipe(SCHEME_NVFP4, "re:.*visual.*attn.*", ERR_UNSUPPORTED, "NVFP4 needs a measured input");
    try_recipe(SCHEME_NVFP4, "re:.*experts\\.3\\.down_proj", ERR_UNSUPPORTED, "one scheme for all of them");
    try_recipe(SCHEME_NVFP4, "re:.*experts\\.\\d+\\.down_proj", ERR_UNSUPPORTED,
               "must all be there, in one scheme");
}

/* Readers run these as one product. */
static void sets_must_not_be_split(void **state)
{
    (void)state;
    static const char *const parts[] = { "self_attn\\.(q|v)_proj", "mlp\\.shared_expert\\.up_proj",
                                         "linear_attn\\.in_proj_qkv", "linear_attn\\.in_proj_b" };
    static const char *const want[] = {
        "self_attn.q_proj' is %s, '" LAYER "3.self_attn.k_proj' is not quantized: readers run them as one",
        "shared_expert.up_proj' is %s, '" LAYER "0.mlp.shared_expert.gate_proj' is not quantized",
        "linear_attn.in_proj_qkv' is %s, '" LAYER "0.linear_attn.in_proj_z' is not quantized",
        "linear_attn.in_proj_b' is %s, '" LAYER "0.linear_attn.in_proj_a' is not quantized",
    };
    static const enum scheme schemes[] = { SCHEME_NVFP4, SCHEME_FP8_DYNAMIC };
    for (size_t i = 0; i < 8; i++) {
        char target[200], text[300];
        snprintf(target, sizeof target, "re:.*%s$", parts[i / 2]);
        snprintf(text, sizeof text, want[i / 2], scheme_name(schemes[i % 2]));
        try_recipe(schemes[i % 2], target, ERR_UNSUPPORTED, text);
    }
}

static void modules_must_be_named(void **state)
{
    (void)state;
    static const char *const targets[] = { "re:.*mlp\\.experts.*" };
    static const char *const ignore[] = { "re:.*(linear_attn|visual|gate).*", "lm_head",
                                          "re:.*self_attn\\.[^o].*", "re:.*shared_expert.*" };
    struct recipe_group group = { "group_0", SCHEME_NVFP4, targets, 1 };
    struct recipe recipe = { "test", &group, 1, ignore, 4 };
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "unnamed-q"));
    o.recipe = &recipe;
    must_fail(&o, ERR_ARGUMENT,
              "recipe 'test': module '" LAYER "3.self_attn.o_proj' is neither targeted nor ignored");
}

static void modules_must_have_one_scheme(void **state)
{
    (void)state;
    static const char *const fp4[] = { "re:.*mlp\\.experts.*", "Linear" }, *const fp8[] = {
        "re:.*down_proj"
    };
    static const char *const ignore[] = { "re:.*(linear_attn|visual|gate|self_attn|shared_expert).*",
                                          "lm_head" };
    struct recipe_group groups[] = { { "a", SCHEME_NVFP4, fp4, 2 }, { "b", SCHEME_FP8_DYNAMIC, fp8, 1 } };
    struct recipe recipe = { "test", groups, 2, ignore, 2 };
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "two-q"));
    o.recipe = &recipe;
    must_fail(&o, ERR_ARGUMENT,
              "recipe 'test': module '" LAYER
              "0.mlp.experts.0.down_proj' is a target of two schemes, and readers "
              "differ in which one they take");
}

static void calibration_must_be_there(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "uncalibrated"));
    o.calibration = NULL;
    must_fail(&o, ERR_ARGUMENT, "needs calibration samples, none are given");
    write_text(in(&fixture, "broken.jsonl"), "{\"text\": \"a\"}\n{\"text\"\n");
    o.calibration = in(&fixture, "broken.jsonl");
    must_fail(&o, ERR_FORMAT, "broken.jsonl: line 2: JSON: ");
    o.num_calibration_samples = -1;
    must_fail(&o, ERR_ARGUMENT, "-1 calibration samples");
}

/* --- runs that end early
 * ----------------------------------------------------------------------------------------- */

/* The plan of a run is what the run then does; the plan itself leaves no trace. */
static void plan_is_what_happens(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "planned"));
    struct quantize_forecast f;
    struct err e = { 0 };
    o.max_shard_bytes = 3000000;
    if (!quantize_dry_run(&o, &f, &e)) fail_msg("%s", e.text);
    assert_false(file_exists(o.destination) || has_partial(o.destination));
    assert_true(f.pack_seconds > 0 && f.calibrate_seconds > 0 && f.read_seconds > 0);
    struct quantize_result r = must_run(&o);
    assert_int_equal(f.matrices[SCHEME_NVFP4], r.nvfp4_matrices);
    assert_int_equal(f.matrices[SCHEME_FP8_DYNAMIC], r.fp8_matrices);
    assert_int_equal(f.copied_tensors, r.copied_tensors);
    assert_int_equal(f.bytes_in, r.bytes_in);
    assert_int_equal(f.bytes_out, r.bytes_out);
    assert_int_equal(f.shards, r.shards);
    assert_int_equal(f.tokens, r.tokens);
    assert_false(quantize_dry_run(&o, &f, &e));
    assert_non_null(strstr(e.text, "already exists"));
}

static void memory_has_a_limit(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "large"));
    o.max_memory = 100000000;
    must_fail(&o, ERR_LIMIT, "GB of memory may be needed, the limit is 0.1 GB; raise the limit");
}

static bool not_reached(void *ctx, struct evaluation *out, const char *folder, struct err *e)
{
    (void)ctx, (void)out, (void)folder;
    return err_set(e, ERR_ARGUMENT, "evaluated");
}

/* Enough for the run alone is not enough for both models in memory. */
static void memory_of_an_evaluation_counts(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "scored"));
    struct quantize_forecast alone, both;
    o.recipe = recipe_builtin("nvfp4a16");
    o.calibration = NULL;
    assert_true(quantize_dry_run(&o, &alone, NULL));
    o.evaluate = not_reached;
    assert_true(quantize_dry_run(&o, &both, NULL));
    assert_true(both.memory_bytes > alone.memory_bytes + alone.bytes_in + alone.bytes_out);
    o.max_memory = alone.memory_bytes;
    must_fail(&o, ERR_LIMIT, "or do without --evaluate");
}

static void die_midway(void *ctx, const char *what, uint64_t done, uint64_t total)
{
    (void)ctx;
    if (strcmp(what, "quantize") == 0 && done > total / 2) raise(SIGKILL);
}

/* Dies by SIGKILL half-way through the tensors. A program of its own: sanitizers take no threads after a
 * fork. */
static int run_and_die(const char *destination)
{
    struct fixture child = { .report = { .progress = die_midway } };
    struct backend_options options = { .device = DEVICE_CPU, .threads = 1 };
    struct quantize_result r;
    if (!backend_create(&child.backend, &options, NULL)) return 1;
    struct quantize_options o = fixture_options(&child, DEMO, destination);
    o.max_shard_bytes = 1000000;
    quantize_run(&o, &r, NULL);
    return 1;
}

/* What a program that knew no journal left is no help. */
static void foreign_leftover_is_removed(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "foreign"));
    assert_int_equal(mkdir(in(&fixture, "foreign.quench-partial"), 0777), 0);
    write_text(in(&fixture, "foreign.quench-partial/model-00001-of-00001.safetensors"), "x");
    fixture.warnings[0] = 0;
    must_run(&o);
    assert_non_null(
        strstr(fixture.warnings, "foreign.quench-partial: left by an interrupted run, removed\n"));
    assert_false(has_partial(o.destination));
}

static void killed_run_is_no_checkpoint(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "killed"));
    int status;
    pid_t child = fork();
    if (child == 0) {
        execl("/proc/self/exe", "test_failures", "die", o.destination, (char *)NULL);
        _exit(1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    assert_false(file_exists(o.destination));
    assert_true(has_partial(o.destination));
    assert_false(file_exists(in(&fixture, "killed.quench-partial/config.json")));

    fixture.warnings[0] = 0;
    o.max_shard_bytes = 1000000;
    must_run(&o);
    assert_non_null(strstr(fixture.warnings, "killed.quench-partial: continuing an interrupted run\n"));
    assert_false(has_partial(o.destination));
    struct checkpoint c;
    must_open(&c, o.destination);
    checkpoint_close(&c);
}

static void running_run_is_left_alone(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "busy"));
    struct quantize_result r;
    struct err e = { 0 };
    assert_int_equal(mkdir(in(&fixture, "busy.quench-partial"), 0777), 0);
    int fd = open(in(&fixture, "busy.quench-partial"), O_RDONLY | O_DIRECTORY);
    assert_int_equal(flock(fd, LOCK_EX), 0);
    assert_false(quantize_run(&o, &r, &e));
    assert_non_null(strstr(e.text, "another run is writing it"));
    assert_true(file_exists(in(&fixture, "busy.quench-partial")));
    close(fd);
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

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "die") == 0) return run_and_die(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(destination_must_be_new),
        cmocka_unit_test(destination_must_not_touch_the_source),
        cmocka_unit_test(source_is_no_leftover),
        cmocka_unit_test(source_must_not_be_quantized),
        cmocka_unit_test(shapes_must_fit_the_format),
        cmocka_unit_test(weights_must_be_finite),
        cmocka_unit_test(zeros_get_scale_one),
        cmocka_unit_test(recipes_must_be_possible),
        cmocka_unit_test(sets_must_not_be_split),
        cmocka_unit_test(modules_must_be_named),
        cmocka_unit_test(modules_must_have_one_scheme),
        cmocka_unit_test(calibration_must_be_there),
        cmocka_unit_test(plan_is_what_happens),
        cmocka_unit_test(memory_has_a_limit),
        cmocka_unit_test(memory_of_an_evaluation_counts),
        cmocka_unit_test(foreign_leftover_is_removed),
        cmocka_unit_test(killed_run_is_no_checkpoint),
        cmocka_unit_test(running_run_is_left_alone),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
