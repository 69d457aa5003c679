/* quench verify and quench merge-mtp from outside: exit status, what they print, JSON, messages.
 * $BUILD/quench (build/quench) is the program. */
#include "quantize/variant.h"
#include <limits.h>
#include <sys/wait.h>

enum { TEXT_MAX = 1 << 16, ARGUMENTS_MAX = 16 };
#define EXPERT3 "model.language_model.layers.1.mlp.experts.3."

static struct fixture fixture;
static char program[PATH_MAX], out[TEXT_MAX], err[TEXT_MAX];
static const char *good, *text;

static void read_back(char *to, const char *name)
{
    char *all;
    size_t n;
    struct err e = { 0 };
    if (!file_read(&all, &n, in(&fixture, name), TEXT_MAX - 1, &e)) fail_msg("%s", e.text);
    memcpy(to, all, n + 1);
    free(all);
}

static void redirect(int fd, const char *path)
{
    int opened = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (opened < 0 || dup2(opened, fd) != fd) _exit(99);
    close(opened);
}

static int run(const char *const *words)
{
    const char *argv[ARGUMENTS_MAX] = { program };
    int n = 1, status;
    while (*words) argv[n++] = *words++;
    assert_true(n < ARGUMENTS_MAX);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        redirect(STDOUT_FILENO, in(&fixture, "out"));
        redirect(STDERR_FILENO, in(&fixture, "err"));
        execv(argv[0], (char *const *)(uintptr_t)argv);
        _exit(98);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!WIFEXITED(status)) fail_msg("ended by signal %d", WTERMSIG(status));
    read_back(out, "out");
    read_back(err, "err");
    return WEXITSTATUS(status);
}

#define RUN(...) run((const char *const[]){ __VA_ARGS__, NULL })

static void expect_out(const char *want)
{
    if (!strstr(out, want)) fail_msg("expected '%s' in '%s' (stderr '%s')", want, out, err);
}

static json_t *json_out(void)
{
    struct err e = { 0 };
    json_t *v;
    if (!doc_parse(&v, out, strlen(out), &e)) fail_msg("%s: %s", e.text, out);
    return v;
}

static void plant_scale(const char *name, float x)
{
    struct variant_of v = { .edits = { { .tensor = EXPERT3 "up_proj.weight_global_scale",
                                         .kind = EDIT_BYTES,
                                         .n = 1,
                                         .bytes = &x,
                                         .size = sizeof x } } };
    variant_write(&fixture, name, good, &v);
}

static void help_and_misuse(void **state)
{
    (void)state;
    assert_int_equal(RUN("verify", "--help"), 0);
    expect_out("quench verify MODEL");
    expect_out("--source SRC");
    expect_out("--text FILE");
    assert_int_equal(RUN("merge-mtp", "--help"), 0);
    expect_out("quench merge-mtp MODEL --from SRC");
    assert_int_equal(RUN("--help"), 0);
    expect_out("  verify  ");
    expect_out("  merge-mtp  ");
    assert_int_equal(RUN("verify"), 2);
    assert_non_null(strstr(err, "expected: quench verify MODEL"));
    assert_int_equal(RUN("merge-mtp", DEMO), 2);
    assert_string_equal(err, "quench merge-mtp: --from SRC is needed\n");
    assert_int_equal(RUN("merge-mtp", DEMO, "--from", DEMO), 2);
    assert_string_equal(err, "quench merge-mtp: " DEMO ": already has 19 mtp tensors\n");
    assert_int_equal(RUN("verify", in(&fixture, "nowhere")), 1);
    assert_non_null(strstr(err, "nowhere: no such folder\n"));
    assert_int_equal(RUN("verify", DEMO, "--text", in(&fixture, "nowhere")), 1);
    assert_non_null(strstr(err, "nowhere: No such file"));
    assert_string_equal(out, "");
}

static void a_good_checkpoint_passes(void **state)
{
    (void)state;
    assert_int_equal(RUN("verify", good, "--source", DEMO, "--text", text, "--threads", "2"), 0);
    expect_out("check       looked at                     faults   warnings\n");
    expect_out("files             900  tensors                 0          0\n");
    expect_out("source            124  source tensors          0          0\n");
    expect_out("NVFP4               192        192");
    expect_out("FP8_DYNAMIC          16         16");
    expect_out("furthest from the source");
    expect_out(", of the source ");
    expect_out("\nno faults, 0 warnings\n");
    assert_string_equal(err, "");
    assert_int_equal(RUN("verify", DEMO), 0);
    expect_out("as stored           252");
    expect_out("\nno faults, 0 warnings\n");
}

static void faults_are_named_and_counted(void **state)
{
    (void)state;
    plant_scale("bad", 0);
    assert_int_equal(RUN("verify", in(&fixture, "bad")), 1);
    expect_out("scales            592  scale tensors           1          0\n");
    expect_out("fault: scales: weight_global_scale is not a finite number above 0 (0): " EXPERT3
               "up_proj.weight_global_scale\n");
    expect_out("fault: fused: weight_global_scale of gate_proj and up_proj differ");
    expect_out("\n2 faults, 0 warnings\n");
    plant_scale("bad", 1);
    assert_int_equal(RUN("verify", in(&fixture, "bad"), "--quiet"), 1);
    expect_out("warning: scales: weight_global_scale is exactly 1 although");
    expect_out("\n1 fault, 1 warning\n");
}

static void results_as_json(void **state)
{
    (void)state;
    assert_int_equal(RUN("verify", good, "--source", DEMO, "--text", text, "--json"), 0);
    json_t *o = json_out();
    assert_true(json_is_true(json_object_get(o, "ok")));
    assert_int_equal(json_array_size(json_object_get(o, "checks")), 8);
    assert_int_equal(json_array_size(json_object_get(o, "worst")), 10);
    assert_int_equal(json_array_size(json_object_get(o, "faults")), 0);
    double perplexity = json_real_value(json_object_get(o, "perplexity"));
    double source = json_real_value(json_object_get(o, "source_perplexity"));
    assert_true(perplexity > 1 && perplexity < 2048 && perplexity < 1.1 * source);
    const json_t *nvfp4 = json_object_get(json_object_get(o, "schemes"), "NVFP4");
    assert_int_equal(json_integer_value(json_object_get(nvfp4, "modules")), 192);
    json_decref(o);
    plant_scale("bad", -1);
    assert_int_equal(RUN("verify", in(&fixture, "bad"), "--source", DEMO, "--json"), 1);
    o = json_out();
    assert_true(json_is_false(json_object_get(o, "ok")));
    const json_t *fault = json_array_get(json_object_get(o, "faults"), 0);
    assert_string_equal(json_string_value(json_object_get(fault, "check")), "scales");
    assert_int_equal(json_integer_value(json_object_get(fault, "count")), 1);
    assert_non_null(strstr(json_string_value(json_object_get(fault, "text")), "above 0 (-1): " EXPERT3));
    json_decref(o);
}

/* A checkpoint without a tokenizer, and one whose layers are not whole, which is not loaded at all. */
static void scoring_what_cannot_be_scored(void **state)
{
    (void)state;
    plant_scale("bad", 4);
    assert_int_equal(RUN("verify", in(&fixture, "bad"), "--text", text), 1);
    expect_out("fault: score: the text could not be scored: ");
    variant_without(&fixture, "bad", good, EXPERT3 "up_proj.", NULL, NULL);
    assert_int_equal(RUN("verify", in(&fixture, "bad"), "--text", text), 1);
    assert_null(strstr(out, "score"));
    expect_out("fault: layers: tensor '" EXPERT3 "up_proj.weight' is missing\n");
}

static void the_head_comes_back(void **state)
{
    (void)state;
    const char *folder = in(&fixture, "lost");
    variant_without(&fixture, "lost", good, "mtp.", NULL, NULL);
    assert_int_equal(RUN("verify", folder), 1);
    expect_out("no mtp tensor is there: quench merge-mtp brings them back from the source\n");
    assert_int_equal(RUN("merge-mtp", folder, "--from", DEMO), 0);
    expect_out(": 19 tensors of the MTP head, 2.99 MB, from " DEMO ", in model.safetensors\n");
    assert_int_equal(RUN("verify", folder, "--source", DEMO), 0);
    variant_without(&fixture, "lost", good, "mtp.", "quantization_config.ignore", "[]");
    assert_int_equal(RUN("merge-mtp", folder, "--from", DEMO, "--json"), 0);
    json_t *o = json_out();
    assert_int_equal(json_integer_value(json_object_get(o, "tensors")), 19);
    assert_true(json_is_true(json_object_get(o, "ignore_added")));
    assert_true(json_is_false(json_object_get(o, "layers_added")));
    json_decref(o);
}

static int setup(void **state)
{
    (void)state;
    static char path[512];
    const char *build = getenv("BUILD");
    fixture_init(&fixture);
    snprintf(program, sizeof program, "%s/quench", build ? build : "build");
    snprintf(path, sizeof path, "%s", in(&fixture, "good"));
    good = path;
    text = "data/calibration.jsonl"; /* any text will do */
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
        cmocka_unit_test(help_and_misuse),
        cmocka_unit_test(a_good_checkpoint_passes),
        cmocka_unit_test(faults_are_named_and_counted),
        cmocka_unit_test(results_as_json),
        cmocka_unit_test(scoring_what_cannot_be_scored),
        cmocka_unit_test(the_head_comes_back),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
