/* Each built-in recipe on the demo checkpoint: which module got which scheme, judged by name alone; scales
 * shared and measured as readers need; and that the result, loaded again, still says what the source says. */
#include "eval/perplexity.h"
#include "quantize/fixture.h"
#include "quantize/plan.h"
#include "quantize/samples.h"
#include <math.h>

enum { LAYERS = 4, EXPERTS = 16, TOKENS = 64, PAGES = 2 };
#define STEM "model.language_model.layers."

static struct fixture fixture;
static struct checkpoint source;

static const struct expected {
    const char *name;
    enum scheme experts, attention, delta, head;
    int64_t nvfp4, fp8, copied, ignored; /* of the demo: 192 expert matrices, 12 shared, 4 attention */
    const char *format;
} recipes[] = {
    { "card", SCHEME_NVFP4, SCHEME_FP8_DYNAMIC, SCHEME_NONE, SCHEME_NONE, 192, 16, 100, 34,
      "mixed-precision" },
    { "nvfp4", SCHEME_NVFP4, SCHEME_NVFP4, SCHEME_NONE, SCHEME_NONE, 208, 0, 100, 34,
      "nvfp4-pack-quantized" },
    { "fast", SCHEME_NVFP4, SCHEME_FP8_DYNAMIC, SCHEME_FP8_DYNAMIC, SCHEME_FP8_DYNAMIC, 192, 26, 90, 24,
      "mixed-precision" },
    { "nvfp4a16", SCHEME_NVFP4A16, SCHEME_NONE, SCHEME_NONE, SCHEME_NONE, 192, 0, 116, 50,
      "nvfp4-pack-quantized" },
};
enum { N_RECIPES = sizeof recipes / sizeof *recipes };
static struct quantize_result results[N_RECIPES];

/* attention stands for the shared expert too. */
static enum scheme scheme_of(const struct expected *x, const char *module)
{
    if (strncmp(module, "mtp.", 4) == 0 || strstr(module, "visual")) return SCHEME_NONE;
    if (strcmp(module, "lm_head") == 0) return x->head;
    if (strstr(module, ".experts.")) return x->experts;
    if (strstr(module, "self_attn.") && ends_in(module, "_proj")) return x->attention;
    if (strstr(module, "shared_expert.")) return x->attention;
    if (strstr(module, "in_proj_a") || strstr(module, "in_proj_b")) return SCHEME_NONE;
    return strstr(module, "linear_attn.") && ends_in(module, "_proj")       ? x->delta
           : ends_in(module, "in_proj_qkv") || ends_in(module, "in_proj_z") ? x->delta
                                                                            : SCHEME_NONE;
}

static void check_module(const struct expected *x, const struct checkpoint *c, const char *module,
                         int64_t counts[2])
{
    enum scheme want = scheme_of(x, module);
    enum scheme announced = quantization_scheme(c->quantization, module, "Linear");
    if (want != announced)
        fail_msg("%s: '%s' is %s, expected %s", x->name, module, scheme_name(announced), scheme_name(want));
    if (want == SCHEME_NONE) {
        assert_int_equal(must_find(c, "%s.weight", module)->dtype, DTYPE_BF16);
    } else if (want == SCHEME_FP8_DYNAMIC) {
        counts[1]++;
        assert_int_equal(must_find(c, "%s.weight", module)->dtype, DTYPE_F8_E4M3);
        must_find(c, "%s.weight_scale", module);
    } else {
        char input[300];
        counts[0]++;
        must_find(c, "%s.weight_packed", module);
        snprintf(input, sizeof input, "%s.input_global_scale", module);
        assert_true((checkpoint_find(c, input) != NULL) == (want == SCHEME_NVFP4));
    }
}

static void check_experts(const struct expected *x, const struct checkpoint *c, int64_t counts[2])
{
    static const char *const parts[] = { "gate_proj", "up_proj", "down_proj" };
    char module[200];
    for (int i = 0; i < LAYERS * EXPERTS * 3; i++) {
        snprintf(module, sizeof module, STEM "%d.mlp.experts.%d.%s", i / 3 / EXPERTS, i / 3 % EXPERTS,
                 parts[i % 3]);
        check_module(x, c, module, counts);
    }
}

static void every_module_has_its_scheme(void **state)
{
    (void)state;
    for (int i = 0; i < N_RECIPES; i++) {
        const struct expected *x = &recipes[i];
        struct checkpoint c;
        char module[200];
        int64_t counts[2] = { 0 };
        must_open(&c, in(&fixture, x->name));
        for (size_t k = 0; k < source.n_tensors; k++) {
            const struct tensor *t = source.tensors[k];
            if (t->n_dims != 2 || !ends_in(t->name, ".weight")) continue;
            snprintf(module, sizeof module, "%.*s", (int)strlen(t->name) - 7, t->name);
            check_module(x, &c, module, counts);
        }
        check_experts(x, &c, counts);
        assert_int_equal(counts[0], x->nvfp4);
        assert_int_equal(counts[1], x->fp8);
        assert_int_equal(results[i].nvfp4_matrices, x->nvfp4);
        assert_int_equal(results[i].fp8_matrices, x->fp8);
        assert_int_equal(results[i].copied_tensors, x->copied);
        assert_int_equal(results[i].ignored_modules, x->ignored);
        const json_t *block = json_object_get(c.config_json, "quantization_config");
        assert_string_equal(json_string_value(json_object_get(block, "format")), x->format);
        checkpoint_close(&c);
    }
}

/* The block that was written, parsed again, decides as the plan did; a plan is made from the same recipe. */
static void the_plan_is_what_is_written(void **state)
{
    (void)state;
    for (int i = 0; i < N_RECIPES; i++) {
        struct err e = { 0 };
        struct plan plan;
        struct checkpoint c;
        must_open(&c, in(&fixture, recipes[i].name));
        if (!plan_create(&plan, &source, recipe_builtin(recipes[i].name), &e)) fail_msg("%s", e.text);
        assert_true(json_equal(json_object_get(plan.block, "quantization_config"),
                               json_object_get(c.config_json, "quantization_config")));
        for (size_t k = 0; k < plan.n_matrices; k++)
            assert_int_equal(plan.matrices[k].scheme,
                             quantization_scheme(c.quantization, plan.matrices[k].module, "Linear"));
        assert_int_equal(plan.n_matrices, recipes[i].nvfp4 + recipes[i].fp8);
        plan_deinit(&plan);
        checkpoint_close(&c);
    }
}

/* Scales of the dense NVFP4 modules. */

static float scale(const struct checkpoint *c, int layer, const char *module, const char *suffix)
{
    return f32_at(must_find(c, STEM "%d.%s_proj.%s", layer, module, suffix));
}

static double weight_absmax(int layer, const char *module)
{
    const struct tensor *t = must_find(&source, STEM "%d.%s_proj.weight", layer, module);
    double top = 0;
    for (int64_t i = 0; i < t->shape[0] * t->shape[1]; i++) top = fmax(top, fabs((double)bf16_at(t, i)));
    return top;
}

/* Two roundings to BF16 and a last bit of the maximum: 1.2 %. */
static void assert_near(double have, double want)
{
    if (!(fabs(have / want - 1) < 0.012)) fail_msg("%g, expected %g", have, want);
}

static void check_set(const struct checkpoint *c, int layer, const char *const *modules, int n)
{
    double top = 0;
    for (int i = 0; i < n; i++) top = fmax(top, weight_absmax(layer, modules[i]));
    for (int i = 0; i < n; i++) {
        assert_near((double)scale(c, layer, modules[i], "weight_global_scale"), 2688 / top);
        for (int k = 0; k < i; k++) {
            assert_true(scale(c, layer, modules[i], "weight_global_scale") ==
                        scale(c, layer, modules[k], "weight_global_scale"));
            assert_true(scale(c, layer, modules[i], "input_global_scale") ==
                        scale(c, layer, modules[k], "input_global_scale"));
        }
    }
}

static void products_share_a_scale(void **state)
{
    (void)state;
    static const char *const qkv[] = { "self_attn.q", "self_attn.k", "self_attn.v" }, *const o =
                                                                                          "self_attn.o";
    static const char *const gate_up[] = { "mlp.shared_expert.gate", "mlp.shared_expert.up" },
                             *const down = "mlp.shared_expert.down";
    struct checkpoint c;
    must_open(&c, in(&fixture, "nvfp4"));
    check_set(&c, 3, qkv, 3);
    check_set(&c, 3, &o, 1);
    for (int layer = 0; layer < LAYERS; layer++) {
        check_set(&c, layer, gate_up, 2);
        check_set(&c, layer, &down, 1);
        float expert = f32_at(must_find(&c, STEM "%d.mlp.experts.0.up_proj.input_global_scale", layer));
        assert_true(scale(&c, layer, gate_up[0], "input_global_scale") == expert);
    }
    checkpoint_close(&c);
}

/* What a step computed, seen through its tap. */
struct observer {
    float *input, *output; /* the last step's attention.out and mixer.out of layer 3 */
    int64_t rows, in_cols, out_cols;
    double mixer, attended, hidden[LAYERS];
};

static double mat_absmax(struct mat x)
{
    double top = 0;
    for (int64_t i = 0; i < x.rows; i++)
        for (int64_t j = 0; j < x.cols; j++) top = fmax(top, fabs((double)x.data[i * x.stride + j]));
    return top;
}

static float *copy_mat(float *old, struct mat x)
{
    free(old);
    float *out = malloc((size_t)(x.rows * x.cols) * sizeof *out);
    for (int64_t i = 0; i < x.rows; i++)
        memcpy(out + i * x.cols, x.data + i * x.stride, (size_t)x.cols * sizeof *out);
    return out;
}

/* SiLU(gate x) * up x of the shared expert, from the source's weights. */
static double shared_absmax(int layer, struct mat x)
{
    const struct tensor *gate = must_find(&source, STEM "%d.mlp.shared_expert.gate_proj.weight", layer);
    const struct tensor *up = must_find(&source, STEM "%d.mlp.shared_expert.up_proj.weight", layer);
    double top = 0;
    for (int64_t i = 0; i < x.rows; i++)
        for (int64_t r = 0; r < gate->shape[0]; r++) {
            double g = 0, u = 0;
            for (int64_t k = 0; k < x.cols; k++) {
                g += (double)x.data[i * x.stride + k] * (double)bf16_at(gate, r * x.cols + k);
                u += (double)x.data[i * x.stride + k] * (double)bf16_at(up, r * x.cols + k);
            }
            top = fmax(top, fabs(g / (1 + exp(-g)) * u));
        }
    return top;
}

static void watch(void *ctx, const char *name, int layer, struct mat x)
{
    struct observer *o = ctx;
    if (strcmp(name, "moe.in") == 0) o->hidden[layer] = fmax(o->hidden[layer], shared_absmax(layer, x));
    if (layer != 3) return;
    if (strcmp(name, "mixer.in") == 0) o->mixer = fmax(o->mixer, mat_absmax(x));
    if (strcmp(name, "attention.out") == 0) {
        o->attended = fmax(o->attended, mat_absmax(x));
        o->input = copy_mat(o->input, x);
        o->in_cols = x.cols;
    } else if (strcmp(name, "mixer.out") == 0) {
        o->output = copy_mat(o->output, x);
        o->out_cols = x.cols;
        o->rows = x.rows;
    }
}

static void run_sample(struct step *step, struct model *model, const int32_t *tokens, int64_t n)
{
    struct err e = { 0 };
    struct layer_state states[LAYERS];
    struct row rows[TOKENS];
    static const int32_t pages[PAGES] = { 0, 1 };
    struct span span = { .n = n, .pages = pages };
    for (int i = 0; i < LAYERS; i++)
        assert_true(layer_state_create(&states[i], model, i, KV_F32, PAGES, 1, &e));
    for (int32_t i = 0; i < n; i++) rows[i] = (struct row){ tokens[i], { i, i, i }, NULL };
    struct step_rows all = { rows, n, &span, 1, false };
    step_run(step, &all, states);
    for (int i = 0; i < LAYERS; i++) layer_state_free(&states[i], model);
}

/* Few tokens: the samples that the fixture calibrates with. */
static void load_samples(struct samples *samples, int64_t n, int64_t max_tokens)
{
    struct err e = { 0 };
    struct samples_options asked = { CALIBRATION, DEMO, n, max_tokens, source.config.vocab_size, NULL };
    if (!samples_load(samples, &asked, &e)) fail_msg("%s", e.text);
}

static void observe(struct observer *o)
{
    struct err e = { 0 };
    struct model model;
    struct step *step;
    struct samples samples;
    load_samples(&samples, 2, TOKENS);
    if (!model_init(&model, &source, &fixture.backend, NULL, &e) || !model_bind_all(&model, &e) ||
        !step_create(&step, &model, TOKENS, 0, TOKENS, &e))
        fail_msg("%s", e.text);
    step_set_tap(step, (struct tap){ o, watch });
    for (int64_t i = 0; i < samples.n; i++)
        run_sample(step, &model, samples.tokens + samples.begin[i], samples.begin[i + 1] - samples.begin[i]);
    step_free(step);
    model_deinit(&model);
    samples_deinit(&samples);
}

/* attention.out is what o_proj reads: its product with the weights is the mixer's result. */
static void check_product(const struct observer *o)
{
    const struct tensor *w = must_find(&source, STEM "3.self_attn.o_proj.weight");
    for (int64_t i = 0; i < o->rows; i++)
        for (int64_t r = 0; r < o->out_cols; r++) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < o->in_cols; k++) {
                double p = (double)o->input[i * o->in_cols + k] * (double)bf16_at(w, r * o->in_cols + k);
                sum += p;
                size += fabs(p);
            }
            assert_true(fabs(sum - (double)o->output[i * o->out_cols + r]) <= 1e-5 * size);
        }
}

static void dense_inputs_are_measured(void **state)
{
    (void)state;
    struct observer o = { 0 };
    struct checkpoint c;
    observe(&o);
    check_product(&o);
    must_open(&c, in(&fixture, "nvfp4"));
    assert_near((double)scale(&c, 3, "self_attn.q", "input_global_scale"), 2688 / o.mixer);
    assert_near((double)scale(&c, 3, "self_attn.o", "input_global_scale"), 2688 / o.attended);
    for (int i = 0; i < LAYERS; i++)
        assert_near((double)scale(&c, i, "mlp.shared_expert.down", "input_global_scale"), 2688 / o.hidden[i]);
    checkpoint_close(&c);
    free(o.input);
    free(o.output);
}

/* Quality. */

static double divergence(const char *folder, const struct samples *samples)
{
    struct err e = { 0 };
    struct checkpoint c;
    struct model base, other;
    struct comparison r;
    struct perplexity_options options = { .ctx = 128 };
    must_open(&c, folder);
    if (!model_init(&base, &source, &fixture.backend, NULL, &e) || !model_bind_all(&base, &e) ||
        !model_init(&other, &c, &fixture.backend, NULL, &e) || !model_bind_all(&other, &e) ||
        !perplexity_compare(&r, &base, &other, samples->tokens, samples->n_tokens, &options, &e))
        fail_msg("%s", e.text);
    model_deinit(&other);
    model_deinit(&base);
    checkpoint_close(&c);
    printf("note: %s: KLD %.4f, perplexity %.4f of %.4f, same top %.3f\n", folder, r.kld, r.other.perplexity,
           r.base.perplexity, r.same_top);
    return r.kld;
}

static void results_say_what_the_source_says(void **state)
{
    (void)state;
    struct samples samples;
    load_samples(&samples, 8, TOKENS);
    for (int i = 0; i < N_RECIPES; i++) {
        double kld = divergence(in(&fixture, recipes[i].name), &samples);
        assert_true(kld > 0 && kld < 0.1);
    }
    samples_deinit(&samples);
}

/* Other recipes that can be done: DeltaNet in NVFP4, and everything by class name. */
static void run_text(const char *name, const char *text)
{
    struct recipe_file f;
    struct err e = { 0 };
    if (!recipe_parse(&f, name, text, strlen(text), &e)) fail_msg("%s", e.text);
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, name));
    o.recipe = &f.recipe;
    must_run(&o);
    recipe_file_deinit(&f);
}

static void every_layer_module_can_be_nvfp4(void **state)
{
    (void)state;
    static const char *const names[] = { "in_proj_qkv", "in_proj_z" };
    struct checkpoint c;
    struct samples samples;
    run_text(
        "all",
        "a_stage:\n  a_modifiers:\n    QuantizationModifier:\n      scheme: NVFP4\n      targets: Linear\n"
        "      ignore: [lm_head, 're:.*mlp\\.gate$', 're:.*shared_expert_gate$', 're:.*visual.*']\n");
    must_open(&c, in(&fixture, "all"));
    float globals[2];
    for (int i = 0; i < 2; i++)
        globals[i] = f32_at(must_find(&c, STEM "0.linear_attn.%s.weight_global_scale", names[i]));
    assert_true(globals[0] == globals[1]);
    must_find(&c, STEM "0.linear_attn.out_proj.input_global_scale");
    checkpoint_close(&c);
    load_samples(&samples, 8, TOKENS);
    assert_true(divergence(in(&fixture, "all"), &samples) < 0.2);
    samples_deinit(&samples);
}

static void fp8_everywhere(void **state)
{
    (void)state;
    struct checkpoint c;
    run_text("fp8", "a_stage:\n  a_modifiers:\n    QuantizationModifier:\n      scheme: FP8_DYNAMIC\n"
                    "      ignore: ['re:.*mlp\\.gate$', 're:.*shared_expert_gate$', 're:.*visual.*']\n");
    must_open(&c, in(&fixture, "fp8"));
    assert_int_equal(must_find(&c, STEM "2.mlp.experts.7.up_proj.weight")->dtype, DTYPE_F8_E4M3);
    checkpoint_close(&c);
}

static int setup(void **state)
{
    (void)state;
    fixture_init(&fixture);
    must_open(&source, DEMO);
    for (int i = 0; i < N_RECIPES; i++) {
        struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, recipes[i].name));
        o.recipe = recipe_builtin(recipes[i].name);
        if (!recipe_measures(o.recipe)) o.calibration = NULL;
        results[i] = must_run(&o);
    }
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    checkpoint_close(&source);
    fixture_deinit(&fixture);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_module_has_its_scheme),
        cmocka_unit_test(the_plan_is_what_is_written),
        cmocka_unit_test(products_share_a_scale),
        cmocka_unit_test(dense_inputs_are_measured),
        cmocka_unit_test(results_say_what_the_source_says),
        cmocka_unit_test(every_layer_module_can_be_nvfp4),
        cmocka_unit_test(fp8_everywhere),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
