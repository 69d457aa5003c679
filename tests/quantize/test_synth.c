/* Random checkpoints: the tensors against the released model's published counts and against a checkpoint that
 * others made; what is written is read by the loader, run, quantized and verified; values by their
 * statistics. */
#include "checkpoint/temp.h"
#include "engine/engine.h"
#include "num/e2m1.h"
#include "num/e4m3.h"
#include "num/nvfp4.h"
#include "quantize/plan.h"
#include "quantize/quantize.h"
#include "quantize/synth.h"
#include "quantize/synth_values.h"
#include "quantize/verify.h"
#include "support/models.h"
#include <math.h>
#include <signal.h>
#include <sys/resource.h>

static const char released[] = "tests/checkpoint/reference_config.json";
static const char demo[] = "models/demo";
static struct temp temp;

static json_t *config_of(const char *path)
{
    struct err e = { 0 };
    json_t *config;
    char *folder;
    must(synth_load_config(&config, &folder, path, &e), &e);
    free(folder);
    return config;
}

static void init(struct synth *s, const char *path, int64_t layers, const char *recipe)
{
    struct err e = { 0 };
    json_t *config = config_of(path);
    must(synth_init(s, config, path, layers, recipe ? recipe_builtin(recipe) : NULL, &e), &e);
    json_decref(config);
}

/* Tensors and bytes of the index of Qwen/Qwen3.6-35B-A3B. */
static void the_released_shape_has_the_released_tensors(void **state)
{
    (void)state;
    static const char *const sources[] = { released, "35b-a3b" };
    for (int i = 0; i < 2; i++) {
        struct synth s;
        init(&s, sources[i], 0, NULL);
        uint64_t mtp = 0, visual = 0;
        for (size_t k = 0; k < s.tensors.n; k++) {
            mtp += strncmp(s.tensors.items[k].name, "mtp.", 4) == 0;
            visual += strncmp(s.tensors.items[k].name, "model.visual.", 13) == 0;
        }
        assert_int_equal(s.tensors.n, 1045);
        assert_int_equal(s.bytes, UINT64_C(71903645408));
        assert_int_equal(mtp, 19);
        assert_int_equal(visual, 333);
        synth_deinit(&s);
    }
}

/* The known config and the released file describe the same network. */
static void the_known_config_is_the_released_one(void **state)
{
    (void)state;
    struct synth a, b;
    init(&a, released, 0, NULL);
    init(&b, "35b-a3b", 0, NULL);
    for (size_t i = 0; i < a.tensors.n; i++) {
        assert_string_equal(a.tensors.items[i].name, b.tensors.items[i].name);
        assert_memory_equal(a.tensors.items[i].shape, b.tensors.items[i].shape,
                            sizeof a.tensors.items[i].shape);
    }
    struct config *x = &a.checkpoint.config, *y = &b.checkpoint.config;
    assert_int_equal(memcmp(x->layer_kinds, y->layer_kinds, (size_t)x->n_layers * sizeof *x->layer_kinds), 0);
    free(x->layer_kinds);
    free(y->layer_kinds);
    x->layer_kinds = y->layer_kinds = NULL;
    assert_memory_equal(x, y, sizeof *x);
    synth_deinit(&a);
    synth_deinit(&b);
}

/* Matrices by scheme that the model card's recipe gives: 30,720 NVFP4 of four tensors, 160 FP8 of two. */
static void the_card_recipe_gives_the_cards_counts(void **state)
{
    (void)state;
    struct synth s;
    init(&s, released, 0, "card");
    uint64_t packed = 0, fp8 = 0, inputs = 0;
    for (size_t i = 0; i < s.tensors.n; i++) {
        const struct tensor *t = &s.tensors.items[i];
        const char *dot = strrchr(t->name, '.');
        packed += strcmp(dot, ".weight_packed") == 0;
        inputs += strcmp(dot, ".input_global_scale") == 0;
        fp8 += t->dtype == DTYPE_F8_E4M3 && strcmp(dot, ".weight") == 0;
    }
    assert_int_equal(packed, 30720);
    assert_int_equal(inputs, 30720);
    assert_int_equal(fp8, 160);
    const json_t *q = json_object_get(s.checkpoint.config_json, "quantization_config");
    assert_int_equal(json_array_size(json_object_get(q, "ignore")), 341 + 2);
    synth_deinit(&s);
}

/* The demo model was made by another program. */
static void names_and_shapes_are_those_of_a_real_checkpoint(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct checkpoint c;
    struct synth s;
    must(checkpoint_open(&c, demo, &e), &e);
    init(&s, demo, 0, NULL);
    assert_int_equal(s.tensors.n, c.n_tensors);
    for (size_t i = 0; i < c.n_tensors; i++) {
        assert_string_equal(s.tensors.items[i].name, c.tensors[i]->name);
        assert_int_equal(s.tensors.items[i].n_dims, c.tensors[i]->n_dims);
        assert_memory_equal(s.tensors.items[i].shape, c.tensors[i]->shape, sizeof c.tensors[i]->shape);
    }
    synth_deinit(&s);
    checkpoint_close(&c);
}

static void write_as(const char *config, const char *name, const char *recipe, int64_t layers, uint64_t seed,
                     int threads, uint64_t shard_bytes)
{
    struct err e = { 0 };
    struct synth_result r;
    struct synth_options o = { .config = config,
                               .destination = temp_path(&temp, name),
                               .layers = layers,
                               .recipe = recipe ? recipe_builtin(recipe) : NULL,
                               .seed = seed,
                               .max_shard_bytes = shard_bytes,
                               .threads = threads };
    must(synth_write(&o, &r, &e), &e);
}

static void a_few_tokens_run(const char *folder)
{
    struct loaded l;
    struct err e = { 0 };
    struct engine *g;
    const float *logits;
    int handle;
    int32_t tokens[] = { 1, 5, 2, 7, 3 };
    struct engine_options options = { .context = 8 };
    struct backend_options cpu = { .device = DEVICE_CPU, .threads = 1 };
    load_model(&l, folder, &cpu);
    must(engine_create(&g, &l.model, &options, &e), &e);
    must(engine_open(g, &handle, &e), &e);
    must(engine_prefill(g, handle, tokens, 5, &logits, NULL, &e), &e);
    double sum = 0;
    for (int64_t i = 0; i < engine_vocab(g); i++) {
        assert_true(isfinite(logits[i]));
        sum += fabsf(logits[i]);
    }
    assert_true(sum > 0);
    engine_free(g);
    unload_model(&l);
}

static void verify_finds_no_fault(const char *folder)
{
    struct err e = { 0 };
    struct backend b;
    struct backend_options cpu = { .device = DEVICE_CPU, .threads = 1 };
    struct verify_result r;
    must(backend_create(&b, &cpu, &e), &e);
    struct verify_options o = { .path = folder, .threads = 1, .backend = &b };
    must(verify_run(&r, &o, &e), &e);
    assert_int_equal(verify_faults(&r), 0);
    assert_int_equal(r.findings.n, 0);
    verify_deinit(&r);
    backend_destroy(&b);
}

static void every_format_loads_runs_and_verifies(void **state)
{
    (void)state;
    static const char *const formats[] = { NULL, "card", "fast", "nvfp4", "nvfp4a16" };
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        char name[32];
        snprintf(name, sizeof name, "format-%zu", i);
        write_as(demo, name, formats[i], i == 1 ? 3 : 0, 0, 2, i % 2 ? 1 << 20 : UINT64_C(1) << 40);
        a_few_tokens_run(temp_path(&temp, name));
        verify_finds_no_fault(temp_path(&temp, name));
    }
}

/* Changes of the demo's config; each is loaded, run and verified. */
static void odd_shapes_load_and_run(void **state)
{
    (void)state;
    static const char *const changes[][8] = {
        { "vision_config", NULL, "text_config.mtp_num_hidden_layers", "0", NULL },
        { "text_config.hidden_size", "80", "vision_config.out_hidden_size", "80", NULL },
        { "text_config.linear_conv_kernel_dim", "3", "text_config.num_experts", "5", NULL },
        { "text_config.moe_intermediate_size", "16", "text_config.shared_expert_intermediate_size", "33",
          NULL },
        { "text_config.tie_word_embeddings", "true", "tie_word_embeddings", "true", NULL },
        { "text_config.vocab_size", "2051", "text_config.linear_key_head_dim", "24", NULL },
        { "text_config.layer_types", NULL, "text_config.full_attention_interval", "2", NULL },
    };
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        json_t *config = config_of(demo);
        for (int k = 0; changes[i][k]; k += 2) json_change(config, changes[i][k], changes[i][k + 1]);
        char *text = json_dumps(config, 0), name[32], to[32];
        snprintf(name, sizeof name, "odd-%zu.json", i);
        snprintf(to, sizeof to, "odd-%zu", i);
        temp_text(&temp, name, text);
        write_as(temp_path(&temp, name), to, NULL, 0, 0, 1, 1 << 30);
        a_few_tokens_run(temp_path(&temp, to));
        verify_finds_no_fault(temp_path(&temp, to));
        free(text);
        json_decref(config);
    }
}

static void quantize_takes_it_with_and_without_calibration(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct backend b;
    struct backend_options cpu = { .device = DEVICE_CPU, .threads = 2 };
    struct quantize_result r;
    write_as("models/demo/config.json", "bf16", NULL, 2, 0, 2, 1 << 30);
    temp_text(&temp, "ids.jsonl",
              "{\"input_ids\": [1, 2, 3, 4, 5, 6, 7, 8]}\n{\"input_ids\": [9, 10, 2000]}\n");
    must(backend_create(&b, &cpu, &e), &e);
    static const char *const recipes[] = { "nvfp4a16", "card" };
    for (int i = 0; i < 2; i++) {
        struct quantize_options o = { .source = temp_path(&temp, "bf16"),
                                      .destination = temp_path(&temp, recipes[i]),
                                      .calibration = i ? temp_path(&temp, "ids.jsonl") : NULL,
                                      .recipe = recipe_builtin(recipes[i]),
                                      .backend = &b };
        must(quantize_run(&o, &r, &e), &e);
        struct synth s;
        struct checkpoint c;
        init(&s, demo, 2, recipes[i]);
        must(checkpoint_open(&c, temp_path(&temp, recipes[i]), &e), &e);
        assert_int_equal(s.tensors.n, c.n_tensors);
        for (size_t k = 0; k < c.n_tensors; k++)
            assert_string_equal(s.tensors.items[k].name, c.tensors[k]->name);
        assert_true(json_equal(json_object_get(s.checkpoint.config_json, "quantization_config"),
                               json_object_get(c.config_json, "quantization_config")));
        checkpoint_close(&c);
        synth_deinit(&s);
    }
    backend_destroy(&b);
}

static void assert_same_files(const char *a, const char *b, bool same)
{
    struct err e = { 0 };
    char path[600];
    struct file_map x, y;
    snprintf(path, sizeof path, "%s/model-00001-of-00001.safetensors", a);
    must(file_map_open(&x, path, &e), &e);
    snprintf(path, sizeof path, "%s/model-00001-of-00001.safetensors", b);
    must(file_map_open(&y, path, &e), &e);
    assert_int_equal(x.bytes, y.bytes);
    assert_int_equal(memcmp(x.data, y.data, x.bytes) == 0, same);
    file_map_close(&x);
    file_map_close(&y);
}

static void a_seed_gives_one_file_whatever_the_threads(void **state)
{
    (void)state;
    write_as(demo, "one", "card", 2, 7, 1, UINT64_C(1) << 40);
    write_as(demo, "two", "card", 2, 7, 2, UINT64_C(1) << 40);
    write_as(demo, "other", "card", 2, 8, 2, UINT64_C(1) << 40);
    assert_same_files(temp_path(&temp, "one"), temp_path(&temp, "two"), true);
    assert_same_files(temp_path(&temp, "one"), temp_path(&temp, "other"), false);
}

enum { DRAWN = 1 << 20 };

static uint8_t *drawn(const char *name, enum dtype dtype, uint64_t bytes)
{
    struct err e = { 0 };
    struct synth_values *v;
    uint8_t *out = malloc(bytes);
    struct tensor t = { .name = name, .dtype = dtype };
    assert_non_null(out);
    must(synth_values_create(&v, 3, &e), &e);
    synth_values_fill(v, out, &t, 0, bytes, NULL);
    uint8_t *part = malloc(bytes); /* any part of it is the same alone; an odd length too */
    assert_non_null(part);
    synth_values_fill(v, part, &t, 4096, bytes - 4096 - 3, NULL);
    assert_memory_equal(part, out + 4096, bytes - 4096 - 3);
    free(part);
    synth_values_free(v);
    return out;
}

static void weights_are_normal(void **state)
{
    (void)state;
    bf16 *x = (bf16 *)(void *)drawn("a.weight", DTYPE_BF16, 2 * DRAWN);
    double sum = 0, squares = 0, fourth = 0, lag = 0, top = 0, past = 0;
    for (int i = 0; i < DRAWN; i++) {
        double z = bf16_to_f32(x[i]) / 0.02;
        sum += z;
        squares += z * z;
        fourth += z * z * z * z;
        lag += z * past;
        past = z;
        top = fabs(z) > top ? fabs(z) : top;
    }
    assert_true(fabs(sum / DRAWN) < 0.005);
    assert_true(fabs(squares / DRAWN - 1) < 0.01);
    assert_true(fabs(fourth / DRAWN - 3) < 0.05);
    assert_true(fabs(lag / DRAWN) < 0.005);
    assert_true(top > 4 && top < 4.5);
    free(x);
}

static void rows_of_a_router_differ_in_length(void **state)
{
    (void)state;
    enum { ROWS = 256, COLS = 512 };
    struct err e = { 0 };
    struct synth_values *v;
    struct tensor t = {
        .name = "model.layers.0.mlp.gate.weight", .dtype = DTYPE_BF16, .n_dims = 2, .shape = { ROWS, COLS }
    };
    static bf16 x[ROWS][COLS], part[COLS];
    double sum = 0, squares = 0;
    must(synth_values_create(&v, 0, &e), &e);
    synth_values_fill(v, x, &t, 0, sizeof x, NULL);
    synth_values_fill(v, part, &t, 100 * sizeof x[0], sizeof part, NULL);
    assert_memory_equal(part, x[100], sizeof part);
    for (int r = 0; r < ROWS; r++) {
        double length = 0;
        for (int c = 0; c < COLS; c++) length += pow(bf16_to_f32(x[r][c]), 2);
        length = 0.5 * log(length / COLS);
        sum += length / ROWS;
        squares += length * length / ROWS;
    }
    assert_true(fabs(sqrt(squares - sum * sum) - 0.25) < 0.05);
    assert_true(fabs(exp(sum) - 0.03) < 0.003);
    synth_values_free(v);
}

static void codes_and_scales_are_valid_and_of_the_right_size(void **state)
{
    (void)state;
    uint8_t *groups = drawn("a.weight_scale", DTYPE_F8_E4M3, DRAWN),
            *fp8 = drawn("a.weight", DTYPE_F8_E4M3, DRAWN);
    uint8_t *codes = drawn("a.weight_packed", DTYPE_U8, DRAWN);
    double scale = 0, squares = 0, packed = 0;
    int used[16] = { 0 };
    for (int i = 0; i < DRAWN; i++) {
        assert_true(groups[i] > 0x50 && groups[i] < 0x7f);
        assert_true((fp8[i] & 0x7f) != 0x7f);
        scale += e4m3_to_f32((e4m3){ groups[i] }) / DRAWN;
        squares += pow(e4m3_to_f32((e4m3){ fp8[i] }), 2) / DRAWN;
        packed += pow(e2m1_to_f32(codes[i] & 15), 2) / DRAWN;
        used[codes[i] & 15]++;
        used[codes[i] >> 4]++;
    }
    for (int i = 0; i < 16; i++) assert_true(i == 8 || used[i] > DRAWN / 100);
    assert_true(fabs(0.02 * 3.6 / 448 * sqrt(squares) - 0.02) < 0.001);
    assert_true(fabs(sqrt(packed) * scale / nvfp4_global_scale(0.02f * 4.5f) - 0.02) < 0.002);
    free(groups);
    free(fp8);
    free(codes);
}

static void refuse(const char *config, const char *destination, int64_t layers, const char *message)
{
    struct err e = { 0 };
    struct synth_result r;
    struct synth_options o = { .config = config,
                               .destination = destination,
                               .layers = layers,
                               .max_shard_bytes = 1 << 30,
                               .threads = 1 };
    assert_false(synth_write(&o, &r, &e));
    assert_message(&e, temp.path, message);
}

static void faults_are_named(void **state)
{
    (void)state;
    char to[256], partial[300];
    snprintf(to, sizeof to, "%s/refused", temp.path);
    snprintf(partial, sizeof partial, "%s.quench-partial", to);
    temp_text(&temp, "broken.json", "{");
    temp_text(&temp, "empty.json", "{}");
    refuse(demo, to, 5, "models/demo: 5 layers were asked for, the config has 4");
    refuse(demo, to, -1, "models/demo: -1 layers were asked for, the config has 4");
    refuse("no/such.json", to, 0, "no/such.json: No such file or directory");
    refuse(temp_path(&temp, "broken.json"), to, 0, "/broken.json: ");
    refuse(temp_path(&temp, "empty.json"), to, 0, "/empty.json: model_type: ");
    refuse(demo, temp.path, 0, ": already exists; remove it or name another destination");
    refuse(demo, "/no-such-folder/x", 0, "/no-such-folder/x: no folder /no-such-folder to create it in");
    assert_false(file_exists(to));
    assert_false(file_exists(partial));
}

static void a_full_disk_leaves_nothing(void **state)
{
    (void)state;
    static const char message[] = "/full.quench-partial/model-00001-of-00001.safetensors: tensor '";
    char to[256], partial[300];
    snprintf(to, sizeof to, "%s/full", temp.path);
    snprintf(partial, sizeof partial, "%s.quench-partial", to);
    struct rlimit old, limit;
    getrlimit(RLIMIT_FSIZE, &old);
    limit = (struct rlimit){ 3 << 20, old.rlim_max };
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    refuse(demo, to, 0, message);
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, handler);
    assert_false(file_exists(to));
    assert_false(file_exists(partial));
}

static int setup(void **state)
{
    (void)state;
    temp = temp_make();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    temp_remove(&temp);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_released_shape_has_the_released_tensors),
        cmocka_unit_test(the_known_config_is_the_released_one),
        cmocka_unit_test(the_card_recipe_gives_the_cards_counts),
        cmocka_unit_test(names_and_shapes_are_those_of_a_real_checkpoint),
        cmocka_unit_test(every_format_loads_runs_and_verifies),
        cmocka_unit_test(odd_shapes_load_and_run),
        cmocka_unit_test(quantize_takes_it_with_and_without_calibration),
        cmocka_unit_test(a_seed_gives_one_file_whatever_the_threads),
        cmocka_unit_test(weights_are_normal),
        cmocka_unit_test(rows_of_a_router_differ_in_length),
        cmocka_unit_test(codes_and_scales_are_valid_and_of_the_right_size),
        cmocka_unit_test(faults_are_named),
        cmocka_unit_test(a_full_disk_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
