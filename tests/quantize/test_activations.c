/* How a quantized checkpoint's modules take their inputs: what --nvfp4-activations fp4 binds. */
#include "model/model.h"
#include "quantize/fixture.h"
#include <math.h>

static bool bind(struct model *m, struct checkpoint *c, struct backend *b, const char *path, struct err *e)
{
    must_open(c, path);
    return model_init(m, c, b, NULL, e) && model_bind_all(m, e);
}

static float scale_of(const struct checkpoint *c, int layer, int expert, const char *part)
{
    const struct tensor *t = must_find(
        c, "model.language_model.layers.%d.mlp.experts.%d.%s.input_global_scale", layer, expert, part);
    return f32_at(t);
}

static void experts_of_a_layer_share_the_widest_range(void **state)
{
    (void)state;
    struct fixture f;
    struct checkpoint c;
    struct model m;
    struct err e = { 0 };
    fixture_init(&f);
    struct quantize_options o = fixture_options(&f, DEMO, in(&f, "card"));
    must_run(&o);
    for (int fp4 = 0; fp4 < 2; fp4++) {
        f.backend.fp4_activations = fp4;
        if (!bind(&m, &c, &f.backend, o.destination, &e)) fail_msg("%s", e.text);
        for (int l = 0; l < c.config.n_layers; l++) {
            const struct experts *x = &m.layers[l].moe.experts;
            float block = INFINITY, down = INFINITY, most = 0;
            for (int i = 0; i < x->n_experts; i++) {
                block = fminf(block, fminf(scale_of(&c, l, i, "gate_proj"), scale_of(&c, l, i, "up_proj")));
                down = fminf(down, scale_of(&c, l, i, "down_proj"));
                most = fmaxf(most, scale_of(&c, l, i, "down_proj"));
            }
            assert_true(down < most); /* so the test can tell */
            for (int i = 0; i < x->n_experts; i++) {
                assert_int_equal(x->gate[i]->input, fp4 ? INPUT_NVFP4 : INPUT_AS_IS);
                assert_int_equal(x->down[i]->input, fp4 ? INPUT_NVFP4 : INPUT_AS_IS);
                if (!fp4) continue;
                assert_true(x->gate[i]->input_global == block && x->up[i]->input_global == block);
                assert_true(x->down[i]->input_global == down);
            }
            assert_int_equal(m.layers[l].moe.down->input, INPUT_FP8_ROW);
            assert_int_equal(m.layers[l].moe.router->input, INPUT_AS_IS);
        }
        model_deinit(&m);
        checkpoint_close(&c);
    }
    fixture_deinit(&f);
}

static void a_missing_scale_is_named(void **state)
{
    (void)state;
    struct fixture f;
    struct checkpoint c;
    struct model m;
    struct err e = { 0 };
    fixture_init(&f);
    struct quantize_options o = fixture_options(&f, DEMO, in(&f, "weights"));
    o.recipe = recipe_builtin("nvfp4a16");
    o.calibration = NULL;
    must_run(&o);
    if (!bind(&m, &c, &f.backend, o.destination, &e)) fail_msg("%s", e.text);
    model_deinit(&m);
    checkpoint_close(&c);
    f.backend.fp4_activations = true;
    assert_false(bind(&m, &c, &f.backend, o.destination, &e));
    assert_non_null(
        strstr(e.text, "tensor 'model.language_model.layers.0.mlp.experts.0.gate_proj.input_global_scale' "
                       "is missing: FP4 activations need measured input scales"));
    model_deinit(&m);
    checkpoint_close(&c);
    fixture_deinit(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(experts_of_a_layer_share_the_widest_range),
        cmocka_unit_test(a_missing_scale_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
