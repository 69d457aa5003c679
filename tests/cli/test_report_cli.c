/* quench quantize --evaluate from outside: what it prints and writes, that its figures are those of quench
 * perplexity, and that a run killed while it evaluates can be repeated. $BUILD/quench (build/quench) is the
 * program. */
#include "quantize/fixture.h"
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

enum { TEXT_MAX = 1 << 17, ARGUMENTS_MAX = 24, POLLS = 2000 };

static struct fixture fixture;
static char program[PATH_MAX], out[TEXT_MAX], err[TEXT_MAX];
static char text[80];

static char *contents(const char *path)
{
    struct err e = { 0 };
    char *all;
    size_t n;
    if (!file_read(&all, &n, path, 1 << 24, &e)) fail_msg("%s", e.text);
    return all;
}

static void read_back(char *to, const char *name)
{
    char *all = contents(in(&fixture, name));
    snprintf(to, TEXT_MAX, "%s", all);
    free(all);
}

static void redirect(int fd, const char *path)
{
    int opened = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (opened < 0 || dup2(opened, fd) != fd) _exit(99);
    close(opened);
}

static pid_t start(const char *const *words)
{
    const char *argv[ARGUMENTS_MAX] = { program };
    int n = 1;
    while (*words) argv[n++] = *words++;
    assert_true(n < ARGUMENTS_MAX);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid > 0) return pid;
    redirect(STDOUT_FILENO, in(&fixture, "stdout"));
    redirect(STDERR_FILENO, in(&fixture, "stderr"));
    execv(argv[0], (char *const *)(uintptr_t)argv);
    _exit(98);
}

static int run(const char *const *words)
{
    int status;
    pid_t pid = start(words);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!WIFEXITED(status)) fail_msg("ended by signal %d", WTERMSIG(status));
    read_back(out, "stdout");
    read_back(err, "stderr");
    return WEXITSTATUS(status);
}

#define WORDS(...) ((const char *const[]){ __VA_ARGS__, NULL })
#define QUANTIZE(to, ...)                                                                                    \
    WORDS("quantize", DEMO, in(&fixture, to), "--calibration", CALIBRATION, "--num-calibration-samples",     \
          "2", "--max-seq-length", "64", "--quiet", ##__VA_ARGS__)

static void succeed(const char *const *words)
{
    int status = run(words);
    if (status != 0) fail_msg("exit status %d: %s", status, err);
}

static json_t *json_out(void)
{
    struct err e = { 0 };
    json_t *v;
    if (!doc_parse(&v, out, strlen(out), &e)) fail_msg("%s: %s", e.text, out);
    return v;
}

static void assert_same(const char *a, const char *b, const char *name)
{
    char paths[2][600];
    snprintf(paths[0], sizeof paths[0], "%s/%s", in(&fixture, a), name);
    snprintf(paths[1], sizeof paths[1], "%s/%s", in(&fixture, b), name);
    char *x = contents(paths[0]), *y = contents(paths[1]);
    assert_string_equal(x, y);
    free(x);
    free(y);
}

static void the_table_says_what_was_done(void **state)
{
    (void)state;
    static const char *const parts[] = {
        "recipe card\n  calibrated on 128 tokens of 2 samples",
        "  NVFP4         192 matrices, relative error ",
        "\nfurthest from the source (|W - packed W| / |W|)\n",
        "\nexperts     all 64 calibrated on 128 tokens each; of these the router sent an expert ",
        " got fewer than 64: layer 3 expert ",
        "\nmemory      ",
    };
    succeed(QUANTIZE("plain"));
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strstr(out, parts[i])) fail_msg("no '%s' in\n%s", parts[i], out);
    assert_null(strstr(out, "perplexity"));
    assert_string_equal(err, "");
}

static const char *const same[] = { "source_perplexity", "perplexity", "ratio",   "ratio_low",
                                    "ratio_high",        "kld",        "same_top" };
static const char *const against[] = { "perplexity", "against_perplexity", "ratio",
                                       "ratio_low",  "ratio_high",         "kld",
                                       "same_top" };

static void figures_are_those_of_perplexity(void **state)
{
    (void)state;
    char figure[40];
    succeed(QUANTIZE("scored", "--evaluate", text, "--json"));
    json_t *o = json_out(), *have = json_object_get(o, "evaluation");
    assert_int_equal(json_array_size(json_object_get(o, "worst")), 10);
    assert_int_equal(json_integer_value(json_object_get(json_object_get(o, "coverage"), "experts")), 64);
    assert_true(json_integer_value(json_object_get(o, "peak_memory_bytes")) > 1 << 20);
    succeed(
        WORDS("perplexity", DEMO, "--text", text, "--against", in(&fixture, "scored"), "--quiet", "--json"));
    json_t *want = json_out();
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        json_t *x = json_object_get(have, same[i]), *y = json_object_get(want, against[i]);
        assert_true(json_is_real(x) && json_real_value(x) == json_real_value(y));
    }
    assert_true(json_equal(json_object_get(have, "scored_tokens"), json_object_get(want, "scored_tokens")));
    char path[600];
    snprintf(path, sizeof path, "%s/README.md", in(&fixture, "scored"));
    char *card = contents(path);
    for (int i = 0; i < 2; i++) {
        snprintf(figure, sizeof figure, "| %.4f |", json_number_value(json_object_get(have, same[i])));
        if (!strstr(card, figure)) fail_msg("no '%s' in\n%s", figure, card);
    }
    free(card);
    json_decref(o);
    json_decref(want);
    succeed(WORDS("verify", in(&fixture, "scored"), "--quiet"));
    assert_same("plain", "scored", "config.json");
}

static void refuse(const char *path, int status, const char *want)
{
    assert_int_equal(run(QUANTIZE("never", "--evaluate", path)), status);
    if (!strstr(err, want)) fail_msg("expected '%s' in '%s'", want, err);
    assert_string_equal(out, "");
    assert_false(file_exists(in(&fixture, "never")));
    assert_false(has_partial(in(&fixture, "never")));
}

/* Before anything is read of the weights. */
static void texts_that_cannot_be_scored(void **state)
{
    (void)state;
    const char *path = in(&fixture, "bad");
    refuse(in(&fixture, "none"), 1, "quench quantize: --evaluate: /tmp/");
    write_text(path, "");
    refuse(path, 1, "the text is empty\n");
    write_text(path, "a\xff");
    refuse(path, 1, "the text is not UTF-8 at byte 1\n");
    write_text(path, "a");
    refuse(path, 2, "one token cannot be scored, two are the least\n");
}

/* The tensors are written, the perplexity is not yet known. */
static bool is_evaluating(void)
{
    return file_exists(in(&fixture, "killed.quench-partial/checkpoint/config.json"));
}

static void killed_while_it_evaluates(void **state)
{
    (void)state;
    int status, polls = 0;
    pid_t pid = start(QUANTIZE("killed", "--evaluate", text));
    while (!is_evaluating() && polls++ < POLLS) nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
    kill(pid, SIGKILL);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(is_evaluating());
    if (file_exists(in(&fixture, "killed"))) fail_msg("it was over before it could be killed");
    succeed(QUANTIZE("killed", "--evaluate", text));
    assert_false(has_partial(in(&fixture, "killed")));
    assert_same("killed", "scored", "README.md");
    assert_same("killed", "scored", "quantization_report.json");
}

static int set_up(void **state)
{
    (void)state;
    const char *build = getenv("BUILD");
    char path[PATH_MAX];
    fixture_init(&fixture);
    snprintf(path, sizeof path, "%s/quench", build && *build ? build : "build");
    if (!realpath(path, program)) fail_msg("%s: build the program first (make)", path);
    snprintf(text, sizeof text, "%s/text", fixture.path);
    char *notice = contents("README.md");
    write_text(text, notice);
    free(notice);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    fixture_deinit(&fixture);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_table_says_what_was_done),
        cmocka_unit_test(figures_are_those_of_perplexity),
        cmocka_unit_test(texts_that_cannot_be_scored),
        cmocka_unit_test(killed_while_it_evaluates),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
