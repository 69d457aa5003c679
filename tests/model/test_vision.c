/* The vision tower against Hugging Face transformers in float32 (tests/golden/README.md): its output for
 * given pixel values, on every backend at hand, in one part and in many. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "model/vision.h"
#include "support/models.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct tensor *find(const struct safetensors *f, const char *name)
{
    const struct tensor *t = safetensors_find(f, name);
    assert_non_null(t);
    return t;
}

/* |got - want| / |want| of the worst row. */
static double worst_row(const float *got, const float *want, int64_t rows, int64_t cols)
{
    double worst = 0;
    for (int64_t r = 0; r < rows; r++) {
        double d = 0, w = 0;
        for (int64_t c = r * cols; c < (r + 1) * cols; c++) {
            d += ((double)got[c] - want[c]) * ((double)got[c] - want[c]);
            w += (double)want[c] * want[c];
        }
        double error = sqrt(d / w);
        if (!(error <= worst)) worst = error;
    }
    return worst;
}

/* To the nearest number with ten bits after the first: the study golden's patch embedding ran as a
 * convolution on tensor cores, which take no more of their inputs. The other products of that run were in
 * f32. */
static void round_tf32(float *out, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits += 0xfff + (bits >> 13 & 1);
        bits &= ~(uint32_t)0x1fff;
        memcpy(out + i, &bits, 4);
    }
}

static void check_tower(const char *model, const char *golden, bool tf32_pixels,
                        const struct backend_options *o, int64_t step_rows, double most)
{
    struct loaded l;
    struct safetensors f;
    struct vision *v;
    struct err e = { 0 };
    must(safetensors_open(&f, golden, &e), &e);
    load_model(&l, model, o);
    if (step_rows) l.backend.step_rows = step_rows;
    must(vision_create(&v, &l.model, &e), &e);
    const struct tensor *pixels = find(&f, "pixel_values"), *want = find(&f, "vision_out");
    const int32_t *grid = (const int32_t *)(const void *)find(&f, "grid_thw")->data;
    assert_int_equal(grid[0], 1);
    assert_int_equal(pixels->shape[0], grid[1] * grid[2]);
    float *got = malloc((size_t)tensor_elements(want) * sizeof *got);
    const float *x = (const float *)(const void *)pixels->data;
    float *rounded = malloc(pixels->bytes);
    if (tf32_pixels) round_tf32(rounded, x, tensor_elements(pixels));
    must(vision_run(v, got, tf32_pixels ? rounded : x, grid[1], grid[2], &e), &e);
    double error = worst_row(got, (const float *)(const void *)want->data, want->shape[0], want->shape[1]);
    printf("note: %s on %s: vision output, worst relative error of a row %.1e\n", model, l.backend.name,
           error);
    assert_true(error <= most);
    free(rounded);
    free(got);
    vision_free(v);
    unload_model(&l);
    safetensors_close(&f);
}

static const char demo_golden[] = "tests/golden/demo/golden_image.safetensors";
static struct backend_options tested = { .device = DEVICE_CPU };

static void demo_matches_its_golden(void **state)
{
    (void)state;
    check_tower("models/demo", demo_golden, false, &tested, 0, 1e-5);
    check_tower("models/demo", demo_golden, false, &tested, 4, 1e-5);
    check_tower("models/demo", demo_golden, false, &tested, 13, 1e-5);
    struct backend_options rounded = tested;
    rounded.rounded = true;
    check_tower("models/demo", demo_golden, false, &rounded, 0, 2e-2);
    if (tested.device != DEVICE_CPU) return;
    check_tower("models/demo", demo_golden, false, &(struct backend_options){ .device = DEVICE_REF }, 0,
                1e-5);
    check_tower("models/demo", demo_golden, false,
                &(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_GENERIC }, 0, 1e-5);
    check_tower("models/demo", demo_golden, false,
                &(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_AVX2 }, 0, 1e-5);
}

static void study_matches_its_golden(void **state)
{
    (void)state;
    const char *shared = shared_folder("the study model's vision tower");
    char model[512], golden[512];
    if (!shared) skip();
    snprintf(model, sizeof model, "%s/models/study", shared);
    snprintf(golden, sizeof golden, "%s/models/study-golden/golden_image.safetensors", shared);
    check_tower(model, golden, true, &tested, 0, 1e-5);
}

/* tests/golden/shapes/tied is a text-only export. */
static void a_model_without_a_tower_says_so(void **state)
{
    (void)state;
    struct loaded l;
    struct vision *v;
    struct err e = { 0 };
    load_model(&l, "tests/golden/shapes/tied", &tested);
    assert_false(l.model.config->has_vision);
    assert_false(vision_create(&v, &l.model, &e));
    assert_null(v);
    assert_int_equal(e.code, ERR_UNSUPPORTED);
    assert_string_equal(e.text, "tests/golden/shapes/tied: config.json has no vision_config: this model does "
                                "not see images");
    unload_model(&l);
}

int main(void)
{
    const char *device = getenv("QUENCH_DEVICE");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(demo_matches_its_golden),
        cmocka_unit_test(study_matches_its_golden),
        cmocka_unit_test(a_model_without_a_tower_says_so),
    };
    if (device && strcmp(device, "cuda") == 0)
        tested = (struct backend_options){ .device = DEVICE_CUDA, .shared_memory = true };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
