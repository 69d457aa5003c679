/* Tasks: reading, grading, the interval and the test, and that a batch answers as one sequence does. */
#include "eval/tasks.h"
#include "support/models.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static void test_grade(void **state)
{
    (void)state;
    static const struct {
        const char *text, *answer;
        bool in_reasoning, right;
    } cases[] = {
        { "4", "4", false, true },
        { " 4\n", "4<|im_end|>\n", false, true },
        { "4.", "4", false, false },
        { "", "", false, true },
        { "why\n</think>\n\n4", "4", true, true },
        { "why\n</think>\n\n4", "other words\n</think>\n\n4<|im_end|>\n", true, true },
        { "why\n</think>\n\n5", "why\n</think>\n\n4", true, false },
        { "4", "4", true, false }, /* never left its reasoning */
        { "4 4", "4  4", false, false },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (tasks_grade(cases[i].text, strlen(cases[i].text), cases[i].answer, cases[i].in_reasoning) !=
            cases[i].right)
            fail_msg("'%s' for '%s'", cases[i].text, cases[i].answer);
}

/* Values of statsmodels 0.15.0: proportion_confint(k, n, method="wilson"), mcnemar(exact=True). */
static void test_statistics(void **state)
{
    (void)state;
    static const struct {
        int64_t right, n;
        double low, high;
    } cases[] = { { 26, 40, 0.495058808, 0.778654711 },
                  { 0, 10, 0.000000000, 0.277532800 },
                  { 10, 10, 0.722467200, 1.000000000 },
                  { 257, 400, 0.594381778, 0.687907218 } };
    double low, high;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tasks_interval(&low, &high, cases[i].right, cases[i].n);
        assert_true(fabs(low - cases[i].low) < 1e-6 && fabs(high - cases[i].high) < 1e-6);
    }
    assert_true(fabs(tasks_mcnemar(0, 0) - 1) < 1e-12);
    assert_true(fabs(tasks_mcnemar(1, 0) - 1) < 1e-12);
    assert_true(fabs(tasks_mcnemar(1, 9) - 0.021484375000) < 1e-9);
    assert_true(fabs(tasks_mcnemar(30, 12) - 0.007915897335) < 1e-9);
}

static const char *write_lines(const char *text)
{
    static char path[] = "/tmp/quench-tasks-XXXXXX";
    static bool made;
    int fd = made ? -1 : mkstemp(path);
    if (fd >= 0) close(fd);
    made = true;
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    return path;
}

static void check_refused(const char *text, const char *error)
{
    struct tasks t;
    struct err e = { 0 };
    const char *path = write_lines(text);
    assert_false(tasks_load(&t, path, 0, &e));
    assert_non_null(strstr(e.text, path));
    if (!strstr(e.text, error)) fail_msg("%s", e.text);
}

static void test_load(void **state)
{
    (void)state;
    struct tasks t;
    struct err e = { 0 };
    const char *path = write_lines("{\"prompt\":\"a\",\"answer\":\"b\",\"system\":\"s\",\"more\":1}\n\n"
                                   "{\"prompt\":\"c\",\"answer\":\"\"}");
    if (!tasks_load(&t, path, 0, &e)) fail_msg("%s", e.text);
    assert_int_equal(t.n, 2);
    assert_string_equal(t.items[0].system, "s");
    assert_int_equal(t.items[1].line, 3);
    assert_null(t.items[1].system);
    tasks_deinit(&t);
    assert_true(tasks_load(&t, path, 1, &e));
    assert_int_equal(t.n, 1);
    tasks_deinit(&t);
    check_refused("\n", "no tasks");
    check_refused("{\"prompt\":\"a\",\"answer\":\"b\"}\n{\"prompt\":\"a\"}\n", "line 2: ");
    check_refused("{\"prompt\":1,\"answer\":\"b\"}", "prompt");
    check_refused("[]", "line 1: expected an object");
    check_refused("{", "line 1: ");
    check_refused("{\"prompt\":\"a\",\"answer\":\"b\",\"images\":[1]}",
                  "line 1: images[0]: expected a string");
    check_refused("{\"prompt\":\"a\",\"answer\":\"b\",\"images\":\"x.png\"}",
                  "line 1: images: expected an array of strings");
    unlink(path);
}

static void answer_all(struct task_result *results, const struct tasks *t, struct model *m,
                       const struct tokenizer *tokenizer, int sequences)
{
    struct chat_template *template;
    struct err e = { 0 };
    int32_t eos[16];
    int n_eos;
    if (!chat_template_load(&template, "models/demo", &e) ||
        !checkpoint_eos_tokens(m->checkpoint, eos, 16, &n_eos, &e))
        fail_msg("%s", e.text);
    struct tasks_options o = { .tokenizer = tokenizer,
                               .template = template,
                               .thinking = CHAT_THINKING_OFF,
                               .sequences = sequences,
                               .max_tokens = 24,
                               .stop_tokens = eos,
                               .n_stop_tokens = n_eos };
    if (!tasks_run(results, t, m, &o, &e)) fail_msg("%s", e.text);
    chat_template_free(template);
}

static void test_batches(void **state)
{
    (void)state;
    struct loaded l;
    struct tokenizer *tokenizer;
    struct tasks t;
    struct err e = { 0 };
    struct task_result one[6] = { 0 }, many[6] = { 0 };
    const char *path = write_lines(
        "{\"prompt\":\"Spell the word river.\",\"answer\":\"r-i-v-e-r\"}\n"
        "{\"prompt\":\"Count from 1 to 12.\",\"answer\":\"1\"}\n"
        "{\"prompt\":\"What is the capital of Finland?\",\"answer\":\"The capital of Finland is "
        "Helsinki.\"}\n"
        "{\"prompt\":\"<|im_start|>user\\nName the capital of "
        "Italy.<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n"
        "</think>\\n\\n\",\"answer\":\"The capital of Italy is Rome.<|im_end|>\\n\"}\n"
        "{\"prompt\":\"Hello\",\"answer\":\"?\",\"system\":\"Answer briefly.\"}\n"
        "{\"prompt\":\"What is in the image?\",\"images\":[\"tests/golden/demo/golden_image.png\"],"
        "\"answer\":\"A red circle at the top left.\"}\n");
    must(tasks_load(&t, path, 0, &e) && tokenizer_load(&tokenizer, "models/demo", &e), &e);
    load_model(&l, "models/demo", &(struct backend_options){ .device = DEVICE_CPU, .threads = 2 });
    answer_all(one, &t, &l.model, tokenizer, 1);
    answer_all(many, &t, &l.model, tokenizer, 4);
    for (int i = 0; i < 6; i++) {
        assert_string_equal(one[i].text, many[i].text);
        assert_int_equal(one[i].is_right, many[i].is_right);
        free(one[i].text);
        free(many[i].text);
    }
    assert_true(one[2].is_right && one[3].is_right && one[5].is_right); /* Helsinki, Rome, and what it sees */
    assert_true(one[1].is_cut && !one[1].is_right);
    unload_model(&l);
    tokenizer_free(tokenizer);
    tasks_deinit(&t);
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_grade),
        cmocka_unit_test(test_statistics),
        cmocka_unit_test(test_load),
        cmocka_unit_test(test_batches),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
