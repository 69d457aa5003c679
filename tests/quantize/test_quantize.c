/* The demo checkpoint from end to end. What comes out is judged without the quantizer's own code: names,
 * shapes, copies and bytes are recomputed here from the format's definition. */
#include "model/model.h"
#include "quantize/fixture.h"
#include "quantize/samples.h"
#include <math.h>

/* Of the demo; samples are longer than one step of the calibration (512 rows). */
enum { N_LAYERS = 4, N_EXPERTS = 16, HIDDEN = 256, INNER = 64 };
enum { SAMPLES = 2, TOKENS = 600, PAGES = 10, SHARD_BYTES = 3000000 };
#define LAYERS "model.language_model.layers."

static struct fixture fixture;
static struct checkpoint source, result;
static struct quantize_result numbers;

/* --- formats, by search over all codes
 * --------------------------------------------------------------------------- */

static const double e2m1_values[8] = { 0, 0.5, 1, 1.5, 2, 3, 4, 6 };

static double e4m3_values[127];

static void fill_e4m3(void)
{
    for (int i = 0; i < 127; i++) e4m3_values[i] = i < 8 ? ldexp(i, -9) : ldexp(8 + (i & 7), (i >> 3) - 10);
}

/* x to eight significant bits, ties to even. */
static double bf(double x)
{
    int exponent;
    if (x == 0) return 0;
    frexp(x, &exponent);
    return ldexp(rint(ldexp(x, 8 - exponent)), exponent - 8);
}

/* The nearest of n ascending values; of two equally near the one with an even code. */
static int nearest(double x, int n, const double *values)
{
    int best = 0;
    for (int i = 1; i < n; i++) {
        double old = fabs(x - values[best]), new = fabs(x - values[i]);
        if (new < old || (new == old &&i % 2 == 0)) best = i;
    }
    return best;
}

static double global_scale(double absmax)
{
    return bf(2688 * bf(1 / absmax));
}

static int e4m3_code(double x)
{
    return nearest(fmin(fabs(x), 448), 127, e4m3_values) | (x < 0 || (x == 0 && signbit(x)) ? 0x80 : 0);
}

/* --- where matrices are
 * ------------------------------------------------------------------------------------------ */

static const char *const parts[] = { "gate_proj", "up_proj", "down_proj" };

/* Row-major elements of an expert's matrix in the fused source: [rows][cols]. */
static float *source_expert(int layer, int expert, int part, int64_t *rows, int64_t *cols)
{
    const struct tensor *t =
        must_find(&source, LAYERS "%d.mlp.experts.%s", layer, part == 2 ? "down_proj" : "gate_up_proj");
    *rows = part == 2 ? t->shape[1] : t->shape[1] / 2;
    *cols = t->shape[2];
    int64_t first = (int64_t)expert * t->shape[1] * *cols + (part == 1 ? *rows * *cols : 0);
    float *out = malloc((size_t)(*rows * *cols) * sizeof *out);
    for (int64_t i = 0; i < *rows * *cols; i++) out[i] = bf16_at(t, first + i);
    return out;
}

static const struct tensor *expert_tensor(int layer, int expert, int part, const char *suffix)
{
    return must_find(&result, LAYERS "%d.mlp.experts.%d.%s.%s", layer, expert, parts[part], suffix);
}

static double absmax(const float *x, int64_t n)
{
    double top = 0;
    for (int64_t i = 0; i < n; i++) top = fmax(top, fabs((double)x[i]));
    return top;
}

static void assert_kind(const struct tensor *t, enum dtype dtype, int n_dims, int64_t a, int64_t b)
{
    if (t->dtype != dtype || t->n_dims != n_dims || t->shape[0] != a || (n_dims > 1 && t->shape[1] != b))
        fail_msg("%s: %s, %d dimensions", t->name, dtype_name(t->dtype), t->n_dims);
}

/* --- census
 * ------------------------------------------------------------------------------------------------------ */

static double nvfp4_error(int layer, int expert, int part)
{
    int64_t rows, cols;
    float *w = source_expert(layer, expert, part, &rows, &cols);
    const struct tensor *codes = expert_tensor(layer, expert, part, "weight_packed");
    const struct tensor *scale = expert_tensor(layer, expert, part, "weight_scale");
    const struct tensor *global = expert_tensor(layer, expert, part, "weight_global_scale");
    assert_kind(codes, DTYPE_U8, 2, rows, cols / 2);
    assert_kind(scale, DTYPE_F8_E4M3, 2, rows, cols / 16);
    assert_kind(global, DTYPE_F32, 1, 1, 0);
    assert_kind(expert_tensor(layer, expert, part, "input_global_scale"), DTYPE_F32, 1, 1, 0);
    double difference = 0, total = 0;
    for (int64_t i = 0; i < rows * cols; i++) {
        int code = codes->data[i / 2] >> (i % 2 ? 4 : 0) & 15, s = scale->data[i / 16];
        if (s < 1 || s > 0x7e) fail_msg("%s: scale byte 0x%02x", scale->name, (unsigned)s);
        double x = e2m1_values[code & 7] * (code & 8 ? -1 : 1) * e4m3_values[s] / (double)f32_at(global);
        difference += (x - (double)w[i]) * (x - (double)w[i]);
        total += (double)w[i] * (double)w[i];
    }
    free(w);
    return sqrt(difference / total);
}

static void check_fp8(const struct tensor *t)
{
    const struct tensor *codes = must_find(&result, "%s", t->name),
                        *scale = must_find(&result, "%s_scale", t->name);
    assert_kind(codes, DTYPE_F8_E4M3, 2, t->shape[0], t->shape[1]);
    assert_kind(scale, DTYPE_BF16, 2, t->shape[0], 1);
    double difference = 0, total = 0;
    for (int64_t r = 0; r < t->shape[0]; r++) {
        double s = (double)bf16_at(scale, r), top = 0;
        for (int64_t c = 0; c < t->shape[1]; c++)
            top = fmax(top, fabs((double)bf16_at(t, r * t->shape[1] + c)));
        assert_true(s == bf(top / 448));
        for (int64_t c = 0; c < t->shape[1]; c++) {
            double w = (double)bf16_at(t, r * t->shape[1] + c);
            int code = codes->data[r * t->shape[1] + c];
            assert_int_equal(code, e4m3_code(bf(w / s)));
            double x = e4m3_values[code & 0x7f] * s * (code & 0x80 ? -1 : 1);
            difference += (x - w) * (x - w);
            total += w * w;
        }
    }
    assert_true(sqrt(difference / total) < 0.04);
}

static bool is_fp8(const char *name)
{
    return strncmp(name, LAYERS, strlen(LAYERS)) == 0 && ends_in(name, "_proj.weight") &&
           (strstr(name, ".self_attn.") || strstr(name, ".shared_expert."));
}

static void every_tensor_is_there(void **state)
{
    (void)state;
    size_t outputs = 0, copies = 0, draft = 0;
    for (size_t i = 0; i < source.n_tensors; i++) {
        const struct tensor *t = source.tensors[i];
        if (strstr(t->name, ".experts.") && strncmp(t->name, "mtp.", 4) != 0) {
            outputs += N_EXPERTS * (strstr(t->name, "gate_up") ? 8 : 4);
            assert_null(checkpoint_find(&result, t->name));
        } else if (is_fp8(t->name)) {
            check_fp8(t);
            outputs += 2;
        } else {
            const struct tensor *copy = must_find(&result, "%s", t->name);
            assert_int_equal(copy->dtype, t->dtype);
            assert_int_equal(copy->n_dims, t->n_dims);
            assert_memory_equal(copy->shape, t->shape, (size_t)t->n_dims * sizeof *t->shape);
            assert_int_equal(copy->bytes, t->bytes);
            assert_memory_equal(copy->data, t->data, t->bytes);
            copies++;
            draft += strncmp(t->name, "mtp.", 4) == 0;
        }
    }
    assert_int_equal(draft, 19);
    assert_int_equal(result.n_tensors, outputs + copies);
    assert_int_equal(numbers.copied_tensors, copies);
}

static void experts_are_close_to_the_source(void **state)
{
    (void)state;
    double sum = 0, worst = 0;
    for (int layer = 0; layer < N_LAYERS; layer++)
        for (int expert = 0; expert < N_EXPERTS; expert++)
            for (int part = 0; part < 3; part++) {
                double x = nvfp4_error(layer, expert, part);
                assert_true(x > 0.05 && x < 0.11);
                sum += x;
                worst = fmax(worst, x);
            }
    assert_int_equal(numbers.nvfp4_matrices, N_LAYERS * N_EXPERTS * 3);
    assert_true(fabs(numbers.nvfp4_error.mean - sum / (N_LAYERS * N_EXPERTS * 3)) < 1e-6);
    assert_true(fabs(numbers.nvfp4_error.worst - worst) < 1e-6);
    assert_int_equal(numbers.fp8_matrices, N_LAYERS * 3 + 4);
    assert_true(numbers.fp8_error.mean > 0.02 && numbers.fp8_error.worst < 0.04);
}

static void check_codes(int layer, int expert, int part)
{
    int64_t rows, cols;
    float *w = source_expert(layer, expert, part, &rows, &cols);
    double top = absmax(w, rows * cols);
    if (part < 2) {
        float *other = source_expert(layer, expert, 1 - part, &rows, &cols);
        top = fmax(top, absmax(other, rows * cols));
        free(other);
    }
    double gs = global_scale(top);
    assert_true((double)f32_at(expert_tensor(layer, expert, part, "weight_global_scale")) == gs);
    const uint8_t *codes = expert_tensor(layer, expert, part, "weight_packed")->data;
    const uint8_t *scales = expert_tensor(layer, expert, part, "weight_scale")->data;
    for (int64_t i = 0; i < rows * cols; i++) {
        int s = e4m3_code(gs * bf(absmax(w + i / 16 * 16, 16) / 6));
        if (s == 0) s = 0x20;
        float step = (float)e4m3_values[s] / (float)gs, x = w[i] / step;
        int code = nearest(fmin(fabs((double)x), 6), 8, e2m1_values) | (x < 0 ? 8 : 0);
        assert_int_equal(scales[i / 16], s);
        assert_int_equal(codes[i / 2] >> (i % 2 ? 4 : 0) & 15, code);
    }
    free(w);
}

static void codes_follow_from_the_definition(void **state)
{
    (void)state;
    check_codes(0, 3, 0);
    check_codes(0, 3, 1);
    check_codes(1, 0, 2);
    check_codes(3, 15, 1);
    check_codes(3, 15, 2);
}

/* --- input scales
 * ------------------------------------------------------------------------------------------------ */

static void scales_are_shared_as_readers_need(void **state)
{
    (void)state;
    for (int layer = 0; layer < N_LAYERS; layer++) {
        float input = f32_at(expert_tensor(layer, 0, 0, "input_global_scale"));
        int different = 0;
        assert_true(isfinite(input) && input > 0);
        for (int expert = 0; expert < N_EXPERTS; expert++) {
            uint32_t gate = f32_bits(f32_at(expert_tensor(layer, expert, 0, "weight_global_scale")));
            uint32_t up = f32_bits(f32_at(expert_tensor(layer, expert, 1, "weight_global_scale")));
            float down = f32_at(expert_tensor(layer, expert, 2, "input_global_scale"));
            assert_int_equal(gate, up);
            assert_true(f32_at(expert_tensor(layer, expert, 0, "input_global_scale")) == input);
            assert_true(f32_at(expert_tensor(layer, expert, 1, "input_global_scale")) == input);
            assert_true(isfinite(down) && down > 0 && down != 1);
            different += down != f32_at(expert_tensor(layer, 0, 2, "input_global_scale"));
        }
        assert_true(different > 0);
    }
}

/* Largest inputs, seen through a tap of one whole forward pass with plain kernels. */
struct observer {
    double block[N_LAYERS], down[N_LAYERS][N_EXPERTS];
};
static const int watched[] = { 0, 7, 15 };

static double expert_product(const float *x, const float *gate, const float *up)
{
    double top = 0;
    for (int r = 0; r < INNER; r++) {
        double g = 0, u = 0;
        for (int c = 0; c < HIDDEN; c++) {
            g += (double)x[c] * (double)gate[r * HIDDEN + c];
            u += (double)x[c] * (double)up[r * HIDDEN + c];
        }
        top = fmax(top, fabs(g / (1 + exp(-g)) * u));
    }
    return top;
}

static void watch(void *ctx, const char *name, int layer, struct mat x)
{
    struct observer *o = ctx;
    int64_t rows, cols;
    if (strcmp(name, "moe.in") != 0) return;
    for (int64_t i = 0; i < x.rows; i++)
        o->block[layer] = fmax(o->block[layer], absmax(x.data + i * x.stride, x.cols));
    for (size_t k = 0; k < sizeof watched / sizeof *watched; k++) {
        float *gate = source_expert(layer, watched[k], 0, &rows, &cols);
        float *up = source_expert(layer, watched[k], 1, &rows, &cols);
        for (int64_t i = 0; i < x.rows; i++)
            o->down[layer][watched[k]] =
                fmax(o->down[layer][watched[k]], expert_product(x.data + i * x.stride, gate, up));
        free(gate);
        free(up);
    }
}

static void run_sample(struct step *step, struct model *model, const int32_t *tokens, int64_t n)
{
    struct err e = { 0 };
    struct layer_state states[N_LAYERS];
    struct row rows[TOKENS];
    static const int32_t pages[PAGES] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 };
    struct span span = { .n = n, .pages = pages };
    for (int i = 0; i < N_LAYERS; i++)
        assert_true(layer_state_create(&states[i], model, i, KV_F32, PAGES, 1, &e));
    for (int32_t i = 0; i < n; i++) rows[i] = (struct row){ tokens[i], { i, i, i }, NULL };
    struct step_rows all = { rows, n, &span, 1, false };
    step_run(step, &all, states);
    for (int i = 0; i < N_LAYERS; i++) layer_state_free(&states[i], model);
}

static void observe_all(struct observer *o)
{
    struct err e = { 0 };
    struct backend backend;
    struct backend_options options = { .device = DEVICE_CPU, .isa = CPU_ISA_GENERIC };
    struct model model;
    struct step *step;
    struct samples samples;
    struct samples_options asked = { CALIBRATION, DEMO, SAMPLES, TOKENS, source.config.vocab_size, NULL };
    if (!samples_load(&samples, &asked, &e) || !backend_create(&backend, &options, &e) ||
        !model_init(&model, &source, &backend, NULL, &e) || !model_bind_all(&model, &e) ||
        !step_create(&step, &model, TOKENS, 0, TOKENS, &e))
        fail_msg("%s", e.text);
    step_set_tap(step, (struct tap){ o, watch });
    for (int64_t i = 0; i < samples.n; i++)
        run_sample(step, &model, samples.tokens + samples.begin[i], samples.begin[i + 1] - samples.begin[i]);
    step_free(step);
    model_deinit(&model);
    backend_destroy(&backend);
    samples_deinit(&samples);
}

/* Two roundings to BF16 and a last bit of the maximum: 1.2 %. */
static bool near(double have, double want)
{
    return fabs(have / want - 1) < 0.012;
}

static void input_scales_are_measured(void **state)
{
    (void)state;
    struct observer o = { 0 };
    observe_all(&o);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        assert_true(
            near((double)f32_at(expert_tensor(layer, 0, 0, "input_global_scale")), 2688 / o.block[layer]));
        for (size_t k = 0; k < sizeof watched / sizeof *watched; k++) {
            double scale = (double)f32_at(expert_tensor(layer, watched[k], 2, "input_global_scale"));
            assert_true(near(scale, 2688 / o.down[layer][watched[k]]));
        }
    }
    assert_int_equal(numbers.samples, SAMPLES);
    assert_int_equal(numbers.tokens, SAMPLES * TOKENS);
}

/* --- files
 * ------------------------------------------------------------------------------------------------------- */

static void assert_same_file(const char *name)
{
    struct err e = { 0 };
    struct file_map a, b;
    char from[200], to[600];
    snprintf(from, sizeof from, DEMO "/%s", name);
    snprintf(to, sizeof to, "%s/%s", result.path, name);
    assert_true(file_map_open(&a, from, &e));
    if (!file_map_open(&b, to, &e)) fail_msg("%s", e.text);
    assert_int_equal(a.bytes, b.bytes);
    assert_memory_equal(a.data, b.data, a.bytes);
    file_map_close(&a);
    file_map_close(&b);
}

static void side_files_are_copied(void **state)
{
    (void)state;
    assert_same_file("tokenizer.json");
    assert_same_file("tokenizer_config.json");
    assert_same_file("generation_config.json");
    assert_same_file("preprocessor_config.json");
    assert_false(has_partial(result.path));
}

static void config_gains_one_block(void **state)
{
    (void)state;
    json_t *config = json_deep_copy(result.config_json), *before = demo_config();
    const json_t *block = json_object_get(config, "quantization_config");
    assert_int_equal(json_array_size(json_object_get(block, "ignore")), (size_t)numbers.ignored_modules + 2);
    json_object_del(config, "quantization_config");
    assert_true(json_equal(config, before));
    json_decref(config);
    json_decref(before);
}

static void shards_are_bounded_and_indexed(void **state)
{
    (void)state;
    struct err e = { 0 };
    json_t *index;
    char path[600];
    uint64_t total = 0;
    assert_int_equal(numbers.shards, result.n_shards);
    assert_true(result.n_shards > 2);
    for (int i = 0; i < result.n_shards; i++) {
        char name[64];
        snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", i + 1, result.n_shards);
        assert_string_equal(result.shard_names[i], name);
        assert_true(result.shards[i].map.bytes <= SHARD_BYTES || result.shards[i].n_tensors == 1);
    }
    for (size_t i = 0; i < result.n_tensors; i++) total += result.tensors[i]->bytes;
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", result.path);
    assert_true(doc_load(&index, path, 1 << 24, &e));
    const json_t *size = json_object_get(json_object_get(index, "metadata"), "total_size");
    assert_true(json_is_integer(size) && (uint64_t)json_integer_value(size) == total);
    assert_int_equal(total, numbers.bytes_out);
    const char *name, *last = "";
    json_t *file;
    json_object_foreach(json_object_get(index, "weight_map"), name, file)
    {
        assert_true(strcmp(last, name) < 0);
        last = name;
    }
    json_decref(index);
}

/* --- other sources
 * ----------------------------------------------------------------------------------------------- */

/* Input scales aside, which the other run measured on fewer tokens. Vision tensors may be missing. */
static void assert_same_tensors(const char *folder, const char *prefix)
{
    struct checkpoint c;
    must_open(&c, folder);
    size_t seen = 0;
    for (size_t i = 0; i < c.n_tensors; i++) {
        const struct tensor *t = c.tensors[i];
        bool text = strncmp(t->name, prefix, strlen(prefix)) == 0;
        const struct tensor *same =
            text ? must_find(&result, "model.language_model.%s", t->name + strlen(prefix))
                 : must_find(&result, "%s", t->name);
        assert_int_equal(same->bytes, t->bytes);
        if (!ends_in(t->name, "input_global_scale")) assert_memory_equal(same->data, t->data, t->bytes);
        seen++;
    }
    for (size_t i = 0; i < result.n_tensors; i++) {
        const char *name = result.tensors[i]->name;
        seen += strncmp(name, "model.visual.", 13) == 0 && !checkpoint_find(&c, name);
    }
    assert_int_equal(seen, result.n_tensors);
    checkpoint_close(&c);
}

static void threads_and_shards_change_nothing(void **state)
{
    (void)state;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "one"));
    o.threads = 1;
    struct quantize_result r = must_run(&o);
    assert_int_equal(r.shards, 1);
    assert_same_tensors(o.destination, "model.language_model.");
}

/* Adds an expert's matrix as a tensor of its own, named as newer exports do. */
static void add_split(struct tensor *out, size_t *n, const struct tensor *t, int expert, int part, int stem)
{
    char *name;
    int64_t rows = part == 2 ? t->shape[1] : t->shape[1] / 2, cols = t->shape[2];
    uint64_t bytes = (uint64_t)(rows * cols * 2), whole = (uint64_t)(t->shape[1] * cols * 2);
    assert_true(asprintf(&name, "%.*s.%d.%s.weight", stem, t->name, expert, parts[part]) > 0);
    out[(*n)++] = (struct tensor){ .name = name,
                                   .dtype = t->dtype,
                                   .n_dims = 2,
                                   .shape = { rows, cols },
                                   .data = t->data + (uint64_t)expert * whole + (part == 1 ? bytes : 0),
                                   .bytes = bytes };
}

/* The text model alone, experts already split, under "model.": every matrix comes out as from the fused
 * source. */
static void split_source_gives_the_same(void **state)
{
    (void)state;
    struct tensor *list = calloc(1000, sizeof *list);
    size_t n = 0;
    for (size_t i = 0; i < source.n_tensors; i++) {
        const struct tensor *t = source.tensors[i];
        const char *experts = strstr(t->name, ".experts.");
        if (strncmp(t->name, "model.visual.", 13) == 0) continue;
        for (int expert = 0; experts && expert < N_EXPERTS && strncmp(t->name, "mtp.", 4) != 0; expert++)
            for (int part = ends_in(t->name, "gate_up_proj") ? 0 : 2;
                 part < (ends_in(t->name, "gate_up_proj") ? 2 : 3); part++)
                add_split(list, &n, t, expert, part, (int)(experts - t->name) + 8);
        if (experts && strncmp(t->name, "mtp.", 4) != 0) continue;
        list[n] = *t;
        list[n++].name = strdup(t->name);
    }
    for (size_t i = 0; i < n; i++) {
        char *at = strstr(list[i].name, "language_model.");
        if (at) memmove(at, at + 15, strlen(at + 15) + 1);
    }
    json_t *config = demo_config();
    write_checkpoint(&fixture, "split", config, list, n);
    char tokenizer[600];
    snprintf(tokenizer, sizeof tokenizer, "%s/tokenizer.json", in(&fixture, "split"));
    assert_true(file_copy(DEMO "/tokenizer.json", tokenizer, NULL));
    struct quantize_options o = fixture_options(&fixture, in(&fixture, "split"), in(&fixture, "split-q"));
    struct quantize_result r = must_run(&o);
    assert_int_equal(r.nvfp4_matrices, numbers.nvfp4_matrices);
    assert_same_tensors(o.destination, "model.");
    json_decref(config);
    for (size_t i = 0; i < n; i++) free((void *)(uintptr_t)list[i].name);
    free(list);
}

static int setup(void **state)
{
    (void)state;
    fill_e4m3();
    fixture_init(&fixture);
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "result"));
    o.num_calibration_samples = SAMPLES;
    o.max_seq_length = TOKENS;
    o.max_shard_bytes = SHARD_BYTES;
    numbers = must_run(&o);
    if (*fixture.warnings) fail_msg("%s", fixture.warnings);
    must_open(&source, DEMO);
    must_open(&result, o.destination);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    checkpoint_close(&source);
    checkpoint_close(&result);
    fixture_deinit(&fixture);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_tensor_is_there),
        cmocka_unit_test(experts_are_close_to_the_source),
        cmocka_unit_test(codes_follow_from_the_definition),
        cmocka_unit_test(scales_are_shared_as_readers_need),
        cmocka_unit_test(input_scales_are_measured),
        cmocka_unit_test(side_files_are_copied),
        cmocka_unit_test(config_gains_one_block),
        cmocka_unit_test(shards_are_bounded_and_indexed),
        cmocka_unit_test(threads_and_shards_change_nothing),
        cmocka_unit_test(split_source_gives_the_same),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
