/* Calibration files: what each kind of line gives, and the message for each that is broken. */
#include "quantize/samples.h"
#include "quantize/fixture.h"
#include "tokenizer/tokenizer.h"

static struct fixture fixture;

static struct samples_options options(const char *text, int64_t n, int64_t max_tokens)
{
    write_text(in(&fixture, "samples.jsonl"), text);
    fixture.warnings[0] = 0;
    return (
        struct samples_options){ in(&fixture, "samples.jsonl"), DEMO, n, max_tokens, 2048, &fixture.report };
}

static struct samples must_load(const char *text, int64_t n, int64_t max_tokens)
{
    struct samples s;
    struct err e = { 0 };
    struct samples_options o = options(text, n, max_tokens);
    if (!samples_load(&s, &o, &e)) fail_msg("%s", e.text);
    return s;
}

static void refuse(const char *text, const char *want)
{
    struct samples s;
    struct err e = { 0 };
    struct samples_options o = options(text, 4, 100);
    char full[300];
    snprintf(full, sizeof full, "%s: %s", o.path, want);
    assert_false(samples_load(&s, &o, &e));
    if (strncmp(e.text, full, strlen(full)) != 0) fail_msg("expected '%s', found '%s'", full, e.text);
}

static void ids_are_used_as_they_are(void **state)
{
    (void)state;
    struct samples s = must_load("{\"input_ids\": [5, 0, 2047]}\n\n{\"input_ids\": [1, 2, 3, 4, 5]}\n", 2, 4);
    static const int32_t want[] = { 5, 0, 2047, 1, 2, 3, 4 };
    assert_int_equal(s.n, 2);
    assert_int_equal(s.n_tokens, 7);
    assert_int_equal(s.longest, 4);
    assert_int_equal(s.begin[1], 3);
    assert_memory_equal(s.tokens, want, sizeof want);
    assert_string_equal(fixture.warnings, "");
    samples_deinit(&s);
}

static void assert_tokens(const struct samples *s, const char *text)
{
    struct tokenizer *t;
    struct token_list list = { 0 };
    struct err e = { 0 };
    assert_true(tokenizer_load(&t, DEMO, &e) && tokenizer_encode(t, &list, text, strlen(text), 0, &e));
    assert_int_equal(s->n_tokens, list.n);
    assert_memory_equal(s->tokens, list.ids, list.n * sizeof *list.ids);
    free(list.ids);
    tokenizer_free(t);
}

static void text_is_tokenized(void **state)
{
    (void)state;
    struct samples s = must_load("{\"text\": \"History is the life of nations.\"}", 1, 1000);
    assert_tokens(&s, "History is the life of nations.");
    samples_deinit(&s);
}

static void messages_are_rendered(void **state)
{
    (void)state;
    struct samples s =
        must_load("{\"text\": \"not this\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi\"},"
                  " {\"role\": \"assistant\", \"content\": \"Yes?\"}]}",
                  1, 1000);
    assert_tokens(
        &s, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYes?<|im_end|>\n");
    samples_deinit(&s);
}

static void fewer_samples_are_told(void **state)
{
    (void)state;
    struct samples s = must_load("{\"text\": \"\"}\n{\"text\": \"one\"}\n{\"input_ids\": []}\n", 64, 100);
    assert_int_equal(s.n, 1);
    assert_non_null(strstr(fixture.warnings, "2 samples without tokens skipped\n"));
    assert_non_null(strstr(fixture.warnings, "64 calibration samples asked for, 1 found\n"));
    samples_deinit(&s);
}

static void broken_lines_are_named(void **state)
{
    (void)state;
    refuse("", "no samples");
    refuse("\n  \n", "no samples");
    refuse("{\"text\": \"\"}\n", "no samples: every line is empty once tokenized");
    refuse("{\"text\": \"a\"}\n{\"text\": \"b\"", "line 2: JSON: ");
    refuse("{\"text\": \"a\"}\n\n[1]\n", "line 3: expected an object");
    refuse("{\"prompt\": \"a\"}\n", "line 1: none of 'text', 'messages' and 'input_ids'");
    refuse("{\"text\": 5}\n", "line 1: text: expected a string");
    refuse("{\"input_ids\": 5}\n", "line 1: input_ids: expected an array of integers");
    refuse("{\"input_ids\": [1, 2048]}\n", "line 1: input_ids[1]: expected an integer from 0 to 2047");
    refuse("{\"input_ids\": [-1]}\n", "line 1: input_ids[0]: expected an integer from 0 to 2047");
    refuse("{\"input_ids\": [1.5]}\n", "line 1: input_ids[0]: expected an integer from 0 to 2047");
    refuse("{\"messages\": []}\n", "line 1: messages: ");
}

static void a_missing_file_is_named(void **state)
{
    (void)state;
    struct samples s;
    struct err e = { 0 };
    struct samples_options o = { in(&fixture, "none.jsonl"), DEMO, 1, 1, 2048, NULL };
    assert_false(samples_load(&s, &o, &e));
    assert_non_null(strstr(e.text, "none.jsonl: No such file or directory"));
}

static int setup(void **state)
{
    (void)state;
    fixture_init(&fixture);
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
        cmocka_unit_test(ids_are_used_as_they_are), cmocka_unit_test(text_is_tokenized),
        cmocka_unit_test(messages_are_rendered),    cmocka_unit_test(fewer_samples_are_told),
        cmocka_unit_test(broken_lines_are_named),   cmocka_unit_test(a_missing_file_is_named),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
