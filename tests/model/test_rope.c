/* YaRN's frequencies and scale against transformers' own (tools/make_yarn_goldens.py), and without YaRN the
 * powers of theta. */
#include "checkpoint/temp.h"
#include "model/rope.h"
#include <math.h>

static void parse(struct config *c, json_t *root)
{
    struct err e = { 0 };
    if (!config_parse(c, root, &e)) fail_msg("%s", e.text);
}

static void check_case(const json_t *golden, double *worst)
{
    json_t *root = must_load("models/demo/config.json"), *text = json_object_get(root, "text_config");
    const json_t *inverse = json_object_get(golden, "inverse");
    struct config c;
    float found[128];
    json_object_set(text, "head_dim", json_object_get(golden, "head_dim"));
    json_object_set(text, "rope_parameters", json_object_get(golden, "rope_parameters"));
    parse(&c, root);
    assert_int_equal(json_array_size(inverse), c.rotary_dim / 2);
    assert_true(c.rotary_dim / 2 <= 128);
    rope_inverse(found, &c);
    for (int j = 0; j < c.rotary_dim / 2; j++) {
        double want = json_number_value(json_array_get(inverse, (size_t)j)),
               error = fabs(found[j] / want - 1);
        if (!(error <= 1e-6)) /* theirs is a power in f32 */
            fail_msg("rotary dimension %d: %.9g, transformers has %.9g", j, (double)found[j], want);
        *worst = fmax(*worst, error);
    }
    assert_float_equal(rope_scale(&c), json_number_value(json_object_get(golden, "attention_factor")), 1e-7);
    config_deinit(&c);
    json_decref(root);
}

static void yarn_is_that_of_transformers(void **state)
{
    (void)state;
    json_t *root = must_load("tests/golden/yarn.json");
    const json_t *cases = json_object_get(root, "cases");
    double worst = 0;
    assert_true(json_array_size(cases) >= 12);
    for (size_t i = 0; i < json_array_size(cases); i++) check_case(json_array_get(cases, i), &worst);
    printf("note: %zu cases, worst relative error of a frequency %.1e\n", json_array_size(cases), worst);
    json_decref(root);
}

/* The numbers that the vendor's recipe comes to: dimensions up to 14 keep their frequency, from 22 on it is a
 * quarter, cosine and sine are multiplied by 1.1386294. */
static void the_recipe_in_numbers(void **state)
{
    (void)state;
    json_t *root = must_load("models/demo/config.json");
    struct config c, plain;
    float found[32], before[32];
    parse(&plain, root);
    rope_inverse(before, &plain);
    assert_true(rope_scale(&plain) == 1);
    for (int j = 0; j < 32; j++) assert_true(before[j] == (float)pow(1e7, -2.0 * j / 64));
    json_change(root, "text_config.rope_parameters.rope_type", "\"yarn\"");
    json_change(root, "text_config.rope_parameters.factor", "4.0");
    parse(&c, root);
    rope_inverse(found, &c);
    for (int j = 0; j <= 14; j++) assert_true(found[j] == before[j]);
    for (int j = 15; j < 22; j++) assert_true(found[j] < before[j] && found[j] > before[j] / 4);
    for (int j = 22; j < 32; j++) assert_float_equal(found[j] / before[j], 0.25, 1e-6);
    assert_float_equal(rope_scale(&c), 1.1386294, 1e-6);
    assert_int_equal(c.max_position_embeddings, 1048576);
    config_deinit(&c);
    config_deinit(&plain);
    json_decref(root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(yarn_is_that_of_transformers),
        cmocka_unit_test(the_recipe_in_numbers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
