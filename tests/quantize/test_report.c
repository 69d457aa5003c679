/* quantization_report.json and README.md of a real run, judged by the written tensors, by formulas restated
 * here and by counts that transformers made. */
#include "quantize/fixture.h"
#include "quantize/front_matter.h"
#include "quantize/verify.h"
#include <dirent.h>
#include <math.h>

enum { LAYERS = 4, EXPERTS = 16, SAMPLES = 2, TOKENS = 600 };

static struct fixture fixture;
static struct checkpoint source, result;
static struct quantize_result numbers;
static json_t *report;

/* Readers. */

static char *read_all(const char *folder, const char *name)
{
    struct err e = { 0 };
    char path[700], *text;
    size_t bytes;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!file_read(&text, &bytes, path, 1 << 26, &e)) fail_msg("%s", e.text);
    assert_int_equal(strlen(text), bytes);
    return text;
}

static json_t *read_report(const char *folder)
{
    json_error_t je;
    char path[700];
    snprintf(path, sizeof path, "%s/quantization_report.json", folder);
    json_t *o = json_load_file(path, JSON_REJECT_DUPLICATES, &je);
    if (!o) fail_msg("%s: %s, line %d", path, je.text, je.line);
    return o;
}

/* By a path of keys and indices: "layers.0.routed.min". */
static json_t *at(json_t *o, const char *path)
{
    char key[64];
    while (o && *path) {
        size_t n = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        o = json_is_array(o) ? json_array_get(o, (size_t)atoi(key)) : json_object_get(o, key);
        path += n + (path[n] == '.');
    }
    return o;
}

static double real(const char *path)
{
    json_t *v = at(report, path);
    if (!json_is_number(v)) fail_msg("%s is no number", path);
    return json_number_value(v);
}

/* A matrix decoded from what the formats' definitions say (docs/formats.md). */

static double e2m1(int code)
{
    static const double values[8] = { 0, 0.5, 1, 1.5, 2, 3, 4, 6 };
    return code & 8 ? -values[code & 7] : values[code & 7];
}

static double e4m3_value(int byte)
{
    int exponent = byte >> 3 & 15, mantissa = byte & 7;
    double x = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    return byte & 0x80 ? -x : x;
}

struct decoded {
    const struct tensor *codes, *scale, *global; /* global NULL: FP8 */
    int64_t cols;
};

static double decode(const struct decoded *d, int64_t i)
{
    int byte = d->global ? d->codes->data[i / 2] >> (i % 2 ? 4 : 0) & 15 : d->codes->data[i];
    return d->global ? e2m1(byte) * (e4m3_value(d->scale->data[i / 16]) / (double)f32_at(d->global))
                     : e4m3_value(byte) * (double)bf16_at(d->scale, i / d->cols);
}

/* The source tensor of a module and its first element there. */
static const struct tensor *source_of(const char *module, int64_t *first, int64_t rows, int64_t cols)
{
    char stem[200];
    int expert;
    const char *mark = strstr(module, ".experts.");
    *first = 0;
    if (!mark) return must_find(&source, "%s.weight", module);
    snprintf(stem, sizeof stem, "%.*s", (int)(mark - module), module);
    assert_int_equal(sscanf(mark, ".experts.%d.", &expert), 1);
    bool down = ends_in(module, "down_proj"), up = ends_in(module, "up_proj");
    *first = (int64_t)expert * rows * cols * (down ? 1 : 2) + (up ? rows * cols : 0);
    return must_find(&source, "%s.experts.%s", stem, down ? "down_proj" : "gate_up_proj");
}

static void check_matrix(json_t *m)
{
    const char *module = json_string_value(at(m, "module"));
    bool nvfp4 = strcmp(json_string_value(at(m, "scheme")), "NVFP4") == 0;
    int64_t rows = json_integer_value(at(m, "shape.0")), cols = json_integer_value(at(m, "shape.1")), first;
    struct decoded d = { .codes = must_find(&result, "%s.%s", module, nvfp4 ? "weight_packed" : "weight"),
                         .scale = must_find(&result, "%s.weight_scale", module),
                         .global = nvfp4 ? must_find(&result, "%s.weight_global_scale", module) : NULL,
                         .cols = cols };
    const struct tensor *w = source_of(module, &first, rows, cols);
    double difference = 0, total = 0;
    for (int64_t i = 0; i < rows * cols; i++) {
        double x = (double)bf16_at(w, first + i), y = decode(&d, i);
        difference += (x - y) * (x - y);
        total += x * x;
    }
    double error = json_number_value(at(m, "relative_error")), snr = json_number_value(at(m, "snr_db"));
    if (!(fabs(error / sqrt(difference / total) - 1) < 1e-5)) fail_msg("%s: error %g", module, error);
    if (!(fabs(snr - 10 * log10(total / difference)) < 1e-4)) fail_msg("%s: %g dB", module, snr);
    if (nvfp4)
        assert_true((float)json_number_value(at(m, "global_scale")) == f32_at(d.global));
    else
        assert_true(json_is_null(at(m, "global_scale")));
}

/* A scale is bf(2688 * bf(1 / absmax)): two roundings. */
static void check_input(json_t *m)
{
    const char *module = json_string_value(at(m, "module"));
    if (strcmp(json_string_value(at(m, "scheme")), "NVFP4") != 0) return;
    double top = json_number_value(at(m, "largest_input"));
    double scale = (double)f32_at(must_find(&result, "%s.input_global_scale", module));
    if (!(fabs(top * scale / 2688 - 1) < 0.009)) fail_msg("%s: input %g, scale %g", module, top, scale);
}

static void errors_are_those_of_the_written_tensors(void **state)
{
    (void)state;
    json_t *all = at(report, "matrices");
    assert_int_equal(json_array_size(all), LAYERS * EXPERTS * 3 + LAYERS * 3 + 4);
    for (size_t i = 0; i < json_array_size(all); i++) {
        check_matrix(json_array_get(all, i));
        check_input(json_array_get(all, i));
    }
}

/* Sums. */

static void assert_close(double have, double want)
{
    if (!(fabs(have - want) <= 2e-5 * fabs(want))) fail_msg("%.9g, expected %.9g", have, want);
}

static void check_scheme(json_t *errors, const char *scheme, int layer)
{
    json_t *all = at(report, "matrices");
    char mark[40];
    double sum = 0, worst = 0;
    int64_t n = 0, weights = 0;
    snprintf(mark, sizeof mark, ".layers.%d.", layer);
    for (size_t i = 0; i < json_array_size(all); i++) {
        json_t *m = json_array_get(all, i);
        if (strcmp(json_string_value(at(m, "scheme")), scheme) != 0) continue;
        if (layer >= 0 && !strstr(json_string_value(at(m, "module")), mark)) continue;
        double error = json_number_value(at(m, "relative_error"));
        sum += error;
        worst = fmax(worst, error);
        weights += json_integer_value(at(m, "shape.0")) * json_integer_value(at(m, "shape.1"));
        n++;
    }
    assert_int_equal(json_integer_value(at(errors, "matrices")), n);
    assert_int_equal(json_integer_value(at(errors, "weights")), weights);
    assert_close(json_number_value(at(errors, "mean_relative_error")), sum / (double)n);
    assert_close(json_number_value(at(errors, "worst_relative_error")), worst);
}

static void sums_are_of_the_matrices(void **state)
{
    (void)state;
    static const char *const schemes[] = { "NVFP4", "FP8_DYNAMIC" };
    uint64_t bytes = 0;
    for (int i = 0; i < 2; i++) {
        json_t *whole = at(at(report, "schemes"), schemes[i]);
        check_scheme(whole, schemes[i], -1);
        bytes += (uint64_t)json_integer_value(at(whole, "bytes"));
        for (int layer = 0; layer < LAYERS; layer++)
            check_scheme(at(at(json_array_get(at(report, "layers"), (size_t)layer), "schemes"), schemes[i]),
                         schemes[i], layer);
    }
    uint64_t written = 0;
    for (size_t i = 0; i < result.n_tensors; i++) written += result.tensors[i]->bytes;
    assert_true((uint64_t)real("result.bytes") == written);
    assert_true(bytes + (uint64_t)real("result.copied_bytes") == written);
    assert_int_equal((size_t)real("result.tensors"), result.n_tensors);
    assert_int_equal((int)real("result.mtp_tensors"), 19);
}

static void the_worst_come_first(void **state)
{
    (void)state;
    json_t *worst = at(report, "worst"), *all = at(report, "matrices");
    assert_int_equal(json_array_size(worst), 10);
    double least = json_number_value(at(worst, "9.relative_error"));
    size_t above = 0;
    for (size_t i = 1; i < 10; i++)
        assert_true(json_number_value(at(json_array_get(worst, i - 1), "relative_error")) >=
                    json_number_value(at(json_array_get(worst, i), "relative_error")));
    for (size_t i = 0; i < json_array_size(all); i++)
        above += json_number_value(at(json_array_get(all, i), "relative_error")) > least;
    assert_true(above <= 9);
    assert_int_equal(numbers.n_worst, 10);
    for (int i = 0; i < 10; i++)
        assert_string_equal(numbers.worst[i].module,
                            json_string_value(at(json_array_get(worst, (size_t)i), "module")));
}

/* Coverage. */

static int ascending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

/* transformers' counts in float32; the closest of its 4,800 calls is 2e-6 wide, so one may fall otherwise. */
static void the_router_is_counted_as_transformers_counts_it(void **state)
{
    (void)state;
    struct err e = { 0 };
    json_t *golden;
    int64_t all[LAYERS * EXPERTS], few = 0;
    if (!doc_load(&golden, "tests/golden/demo/routing.json", 1 << 16, &e)) fail_msg("%s", e.text);
    assert_int_equal(json_integer_value(at(golden, "samples")), SAMPLES);
    assert_int_equal(json_integer_value(at(golden, "max_tokens")), TOKENS);
    for (int i = 0; i < LAYERS; i++) {
        json_t *have = json_array_get(at(report, "experts"), (size_t)i);
        json_t *want = json_array_get(at(golden, "routed"), (size_t)i);
        int64_t sum = 0, layer[EXPERTS];
        for (size_t k = 0; k < EXPERTS; k++) {
            layer[k] = json_integer_value(json_array_get(at(have, "routed_tokens"), k));
            assert_true(llabs(layer[k] - json_integer_value(json_array_get(want, k))) <= 1);
            sum += layer[k];
            all[i * EXPERTS + (int)k] = layer[k];
            few += layer[k] < 64;
        }
        assert_int_equal(sum, SAMPLES * TOKENS * 4);
        assert_int_equal(json_integer_value(at(have, "calibrated_tokens")), SAMPLES * TOKENS);
        qsort(layer, EXPERTS, sizeof *layer, ascending);
        assert_int_equal(json_integer_value(at(have, "routed.min")), layer[0]);
        assert_int_equal(json_integer_value(at(have, "routed.median")), layer[7]);
        assert_int_equal(json_integer_value(at(have, "routed.max")), layer[15]);
    }
    json_decref(golden);
    qsort(all, LAYERS * EXPERTS, sizeof *all, ascending);
    const struct quantize_coverage *c = &numbers.coverage;
    assert_int_equal(c->experts, LAYERS * EXPERTS);
    assert_int_equal(c->minimum, all[0]);
    assert_int_equal(c->median, all[31]);
    assert_int_equal(c->maximum, all[63]);
    assert_int_equal(c->few, few);
    assert_true(few > QUANTIZE_FEWEST); /* layer 3 of this model is uneven */
    for (int i = 0; i < QUANTIZE_FEWEST; i++) assert_int_equal(c->fewest[i].tokens, all[i]);
    assert_int_equal(c->fewest[0].layer, 3);
    assert_int_equal(c->fewest[0].expert, 4);
    assert_int_equal(json_array_size(at(at(report, "experts.3"), "few.experts")), few);
}

/* The card. */

static int columns(const char *line)
{
    int n = 0;
    for (const char *p = line; *p && *p != '\n'; p++) n += *p == '|' && (p == line || p[-1] != '\\');
    return n;
}

/* Every row of a table has as many cells as the one above; code blocks are closed. */
static void check_markdown(const char *text)
{
    int above = 0, fences = 0;
    for (const char *line = text; *line; line += strcspn(line, "\n") + 1) {
        fences += strncmp(line, "```", 3) == 0;
        int n = *line == '|' ? columns(line) : 0;
        if (n && above) assert_int_equal(n, above);
        above = n;
        if (!strchr(line, '\n')) fail_msg("the last line has no end");
    }
    assert_int_equal(fences % 2, 0);
}

static void the_card_is_for_hubs_and_people(void **state)
{
    (void)state;
    struct err e = { 0 };
    json_t *front;
    char *card = read_all(in(&fixture, "out"), "README.md"),
         *kept = read_all(in(&fixture, "out"), "README.source.md"), *old = read_all(DEMO, "README.md");
    assert_string_equal(kept, old);
    check_markdown(card);
    if (!front_matter_parse(&front, card, strlen(card), &e)) fail_msg("%s", e.text);
    assert_string_equal(json_string_value(at(front, "base_model")), "demo");
    assert_string_equal(json_string_value(at(front, "base_model_relation")), "quantized");
    assert_string_equal(json_string_value(at(front, "tags.0")), "nvfp4");
    assert_null(at(front, "license"));
    assert_non_null(strstr(card, "| 3 | attention |"));
    assert_non_null(strstr(card, "4 (5)")); /* layer 3's expert 4 */
    assert_null(strstr(card, fixture.path));
    json_decref(front);
    free(card);
    free(kept);
    free(old);
}

/* Neither place nor clock nor number of threads shows. */
static void a_second_run_writes_the_same(void **state)
{
    (void)state;
    static const char *const names[] = { "README.md", "quantization_report.json" };
    struct quantize_options o = fixture_options(&fixture, DEMO "/../demo/", in(&fixture, "other"));
    o.max_seq_length = TOKENS;
    o.threads = 1;
    o.calibration = "./" CALIBRATION;
    must_run(&o);
    for (int i = 0; i < 2; i++) {
        char *a = read_all(in(&fixture, "out"), names[i]), *b = read_all(in(&fixture, "other"), names[i]);
        assert_string_equal(a, b);
        free(a);
        free(b);
    }
}

static void verify_accepts_the_folder(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct verify_result r = { 0 };
    struct verify_options o = {
        .path = in(&fixture, "out"), .source = DEMO, .threads = 2, .backend = &fixture.backend
    };
    if (!verify_run(&r, &o, &e)) fail_msg("%s", e.text);
    assert_int_equal(verify_faults(&r), 0);
    verify_deinit(&r);
}

/* A source whose card has what hubs want, in a folder with an odd name. */
static void fields_of_the_sources_card_are_kept(void **state)
{
    (void)state;
    struct err e = { 0 };
    static const char name[] = "a|b`c*\n\xff [x]";
    json_t *front;
    char path[700];
    copy_demo(&fixture, name);
    snprintf(path, sizeof path, "%s/README.md", in(&fixture, name));
    write_text(path, "---\nlicense: apache-2.0\nlanguage: [en, 'no']\nbase_model: some/base\ntags:\n- chat\n"
                     "- quench\nmodel-index: {a: b}\n---\n# x\n");
    snprintf(path, sizeof path, "%s/README.source.md", in(&fixture, name));
    write_text(path, "from elsewhere");
    struct quantize_options o = fixture_options(&fixture, in(&fixture, name), in(&fixture, "odd"));
    o.recipe = recipe_builtin("nvfp4a16");
    struct quantize_result r = must_run(&o);
    assert_int_equal(r.coverage.experts, 0);
    assert_non_null(strstr(fixture.warnings, "README.source.md: not copied"));
    char *card = read_all(in(&fixture, "odd"), "README.md"),
         *kept = read_all(in(&fixture, "odd"), "README.source.md");
    assert_true(strncmp(kept, "---\nlicense", 11) == 0);
    if (!front_matter_parse(&front, card, strlen(card), &e)) fail_msg("%s", e.text);
    assert_string_equal(json_string_value(at(front, "license")), "apache-2.0");
    assert_string_equal(json_string_value(at(front, "language.1")), "no");
    assert_string_equal(json_string_value(at(front, "base_model")), "some/base");
    assert_null(at(front, "base_model_relation"));
    assert_int_equal(json_array_size(at(front, "tags")), 4); /* quench once, no fp8 */
    check_markdown(card);
    assert_non_null(strstr(card, "# a\\|b\\`c\\*\xef\xbf\xbd\xef\xbf\xbd \\[x\\], NVFP4\n"));
    assert_non_null(strstr(card, "apache-2.0"));
    assert_non_null(strstr(card, "None: no scale"));
    json_t *about = read_report(in(&fixture, "odd"));
    assert_true(json_is_null(at(about, "calibration")));
    assert_true(json_is_null(at(about, "matrices.0.largest_input")));
    assert_int_equal(json_array_size(at(about, "experts")), 0);
    json_decref(about);
    json_decref(front);
    free(card);
    free(kept);
}

/* Evaluation. */

static bool measured(void *ctx, struct evaluation *out, const char *folder, struct err *e)
{
    struct checkpoint c; /* what is scored is whole, and has no name yet */
    assert_false(file_exists(in(&fixture, "scored")));
    if (!checkpoint_open(&c, folder, e)) return false;
    checkpoint_close(&c);
    *out = *(const struct evaluation *)ctx;
    return out->chunks > 0 || err_set(e, ERR_ARGUMENT, "no text");
}

static void an_evaluation_is_in_card_and_report(void **state)
{
    (void)state;
    struct evaluation v = {
        "/some/where/wiki|text", "f32", 512, 1000, 2, 998, 8, 8.25, 1.03125, 1.01, 1.05294, 0.012345, 0.9
    };
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "scored"));
    o.recipe = recipe_builtin("nvfp4a16");
    o.evaluate = measured;
    o.evaluate_ctx = &v;
    must_run(&o);
    char *card = read_all(in(&fixture, "scored"), "README.md");
    check_markdown(card);
    assert_non_null(strstr(card, "| NVFP4 | 12.22 MB | 8.2500 | +0.2500 | +3.125 | +1.000 % to +5.294 % |"));
    assert_non_null(strstr(card, "`wiki|text`: 1,000 tokens in 2 chunks of 512"));
    json_t *about = read_report(in(&fixture, "scored"));
    assert_string_equal(json_string_value(at(about, "evaluation.text")), "wiki|text");
    assert_true(json_number_value(at(about, "evaluation.delta")) == 0.25);
    json_decref(about);
    free(card);
    assert_true(file_remove_tree(in(&fixture, "scored"), NULL));
}

static void a_failed_evaluation_is_repeated_alone(void **state)
{
    (void)state;
    struct evaluation v = { 0 };
    struct err e = { 0 };
    struct quantize_result r;
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "scored"));
    o.recipe = recipe_builtin("nvfp4a16");
    o.evaluate = measured;
    o.evaluate_ctx = &v;
    assert_false(quantize_run(&o, &r, &e));
    assert_string_equal(e.text, "no text");
    assert_false(file_exists(in(&fixture, "scored")));
    assert_true(has_partial(in(&fixture, "scored")));
    v = (struct evaluation){ "t", "f32", 512, 10, 1, 9, 8, 8, 1, 1, 1, 0, 1 };
    fixture.warnings[0] = 0;
    must_run(&o); /* the same again, with a text */
    assert_non_null(strstr(fixture.warnings, "continuing an interrupted run"));
    assert_false(has_partial(in(&fixture, "scored")));
}

static int set_up(void **state)
{
    (void)state;
    fixture_init(&fixture);
    struct quantize_options o = fixture_options(&fixture, DEMO, in(&fixture, "out"));
    o.max_seq_length = TOKENS;
    numbers = must_run(&o);
    must_open(&source, DEMO);
    must_open(&result, in(&fixture, "out"));
    report = read_report(in(&fixture, "out"));
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    json_decref(report);
    checkpoint_close(&source);
    checkpoint_close(&result);
    fixture_deinit(&fixture);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(errors_are_those_of_the_written_tensors),
        cmocka_unit_test(sums_are_of_the_matrices),
        cmocka_unit_test(the_worst_come_first),
        cmocka_unit_test(the_router_is_counted_as_transformers_counts_it),
        cmocka_unit_test(the_card_is_for_hubs_and_people),
        cmocka_unit_test(a_second_run_writes_the_same),
        cmocka_unit_test(verify_accepts_the_folder),
        cmocka_unit_test(fields_of_the_sources_card_are_kept),
        cmocka_unit_test(an_evaluation_is_in_card_and_report),
        cmocka_unit_test(a_failed_evaluation_is_repeated_alone),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
