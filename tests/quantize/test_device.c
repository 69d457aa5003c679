/* Calibrating on a GPU (QUENCH_DEVICE=cuda; else all is skipped): a run's statistics are a CPU's but for
 * rounding. */
#include "quantize/fixture.h"
#include <math.h>

static bool is_there(void)
{
    const char *device = getenv("QUENCH_DEVICE");
    return device && strcmp(device, "cuda") == 0;
}

static void must(bool ok, const struct err *e)
{
    if (!ok) fail_msg("%s", e->text);
}

static bool is_code(const char *name)
{
    return ends_in(name, "weight_packed") || ends_in(name, ".weight") || ends_in(name, "weight_scale");
}

/* Every tensor of two results: scales of inputs within a step or two of BF16, and of the codes at most so
 * many bytes in a thousand apart. */
static void compare(const char *left, const char *right, double per_mille)
{
    struct checkpoint a, b;
    uint64_t bytes = 0, apart = 0;
    must_open(&a, left);
    must_open(&b, right);
    assert_int_equal(a.n_tensors, b.n_tensors);
    for (size_t i = 0; i < a.n_tensors; i++) {
        const struct tensor *x = a.tensors[i], *y = must_find(&b, "%s", x->name);
        assert_int_equal(x->bytes, y->bytes);
        if (ends_in(x->name, "input_global_scale")) {
            if (!(fabsf(f32_at(x) / f32_at(y) - 1) < 0.01f))
                fail_msg("%s: %.9g and %.9g", x->name, (double)f32_at(x), (double)f32_at(y));
        } else if (is_code(x->name)) {
            bytes += x->bytes;
            for (uint64_t k = 0; k < x->bytes; k++) apart += x->data[k] != y->data[k];
        } else {
            assert_memory_equal(x->data, y->data, x->bytes);
        }
    }
    print_message("%s: %.3f bytes in a thousand differ from the CPU's\n", right,
                  1e3 * (double)apart / (double)bytes);
    assert_true((double)apart <= per_mille * 1e-3 * (double)bytes);
    checkpoint_close(&a);
    checkpoint_close(&b);
}

static void a_run_is_a_cpus_but_for_rounding(void **state)
{
    (void)state;
    static const enum quantize_method methods[] = { QUANTIZE_NEAREST, QUANTIZE_MSE, QUANTIZE_GPTQ,
                                                    QUANTIZE_AUTO };
    static const double per_mille[] = { 0, 1, 100, 100 };
    struct fixture f;
    if (!is_there()) skip();
    fixture_init(&f);
    struct backend gpu = f.backend, cpu;
    struct backend_options options = { .device = DEVICE_CPU, .threads = 2 };
    struct err e = { 0 };
    must(backend_create(&cpu, &options, &e), &e);
    for (int i = 0; i < 4; i++) {
        char names[2][20];
        snprintf(names[0], sizeof names[0], "cpu%d", i);
        snprintf(names[1], sizeof names[1], "gpu%d", i);
        struct quantize_options o = fixture_options(&f, DEMO, in(&f, names[0]));
        o.method = methods[i];
        o.num_calibration_samples = 4;
        o.max_seq_length = 300;
        o.backend = &cpu;
        struct quantize_result left = must_run(&o);
        o.backend = &gpu;
        o.destination = in(&f, names[1]);
        struct quantize_result right = must_run(&o);
        assert_int_equal(left.gptq_matrices, right.gptq_matrices);
        assert_true(fabs(left.nvfp4_error.mean / right.nvfp4_error.mean - 1) < 1e-2);
        assert_true(right.device_bytes > 0 && left.device_bytes == 0);
        compare(in(&f, names[0]), o.destination, per_mille[i]);
    }
    backend_destroy(&cpu);
    fixture_deinit(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_run_is_a_cpus_but_for_rounding),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
