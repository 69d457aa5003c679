/* quench chat and quench eval from outside. $BUILD/quench (build/quench) is the program. */
#include "cli/program.h"
#include <jansson.h>

#define RUN(input, ...) run(input, (const char *const[]){ __VA_ARGS__, NULL })
#define CHAT            "chat", "models/demo", "--quiet", "--device", "cpu"

static void test_conversation(void **state)
{
    (void)state;
    assert_int_equal(RUN("What is the capital of Finland?\n\n/think off\nName the capital of Italy.", CHAT),
                     0);
    assert_string_equal(out, "The capital of Finland is Helsinki.\n\nThe capital of Finland is Helsinki.\n"
                             "The capital of Italy is Rome.\n");
    assert_string_equal(err, "");
}

/* Members of the n-th line of JSON. */
static json_t *line(int n)
{
    char *at = out;
    for (; n > 0; n--) {
        at = strchr(at, '\n');
        assert_non_null(at);
        at++;
    }
    json_t *o = json_loads(at, JSON_DISABLE_EOF_CHECK, NULL);
    assert_non_null(o);
    return o;
}

static void check_line(int n, const char *content, const char *reasoning, bool reuses)
{
    json_t *o = line(n);
    assert_string_equal(json_string_value(json_object_get(o, "content")), content);
    assert_string_equal(json_string_value(json_object_get(o, "reasoning")), reasoning);
    assert_string_equal(json_string_value(json_object_get(o, "finish_reason")), "stop");
    assert_int_equal(json_integer_value(json_object_get(o, "reused_tokens")) > 0, reuses);
    json_decref(o);
}

static void test_reuse(void **state)
{
    (void)state;
    static const char input[] = "What is the capital of Finland?\nSpell the word river.\n";
    assert_int_equal(RUN(input, CHAT, "--json", "--preserve-thinking"), 0);
    check_line(0, "The capital of Finland is Helsinki.", "The capital of Finland is Helsinki.", false);
    check_line(1, "r-i-v-e-r", "The word river has 5 letters.", true);
    assert_int_equal(RUN(input, CHAT, "--json"), 0); /* the template drops old reasoning: nothing to reuse */
    check_line(1, "r-i-v-e-r", "The word river has 5 letters.", false);
}

static void test_commands(void **state)
{
    (void)state;
    assert_int_equal(RUN("/stats\n/help\n/system Be brief.\n/reset\n/stats\n", CHAT), 0);
    assert_non_null(strstr(out, "messages     0\n/image PATH"));
    assert_int_equal(RUN("/image tests/golden/demo/golden_image.png\nWhat is in the image?\n/stats\n", CHAT,
                         "--think", "off"),
                     0);
    assert_non_null(strstr(out, "A red circle at the top left.\nmessages     2\nprompt "));
    assert_non_null(strstr(out, " 0 reused, "));
}

/* The text of an object an answer, and without it. */
static void same_answers(char *with, char *without)
{
    for (int i = 0; i < 2; i++) {
        json_t *a = json_loads(with, JSON_DISABLE_EOF_CHECK, NULL),
               *b = json_loads(without, JSON_DISABLE_EOF_CHECK, NULL);
        const char *const same[] = { "reasoning", "content", "finish_reason", "prompt_tokens", "tokens" };
        for (int k = 0; k < 5; k++)
            assert_true(json_equal(json_object_get(a, same[k]), json_object_get(b, same[k])));
        assert_true(json_is_integer(json_object_get(a, "drafted")));
        if (i == 0) assert_true(json_integer_value(json_object_get(a, "drafted")) > 0); /* later as it pays */
        assert_true(json_real_value(json_object_get(a, "mean_accepted_length")) >= 1);
        assert_null(json_object_get(b, "drafted"));
        json_decref(a);
        json_decref(b);
        with = strchr(with, '\n') + 1;
        without = strchr(without, '\n') + 1;
    }
}

static void test_drafts(void **state)
{
    (void)state;
    static const char talk[] = "Count from 1 to 12.\nSpell the word river.\n";
    const char *config = "{\"method\":\"mtp\",\"num_speculative_tokens\":2}";
    assert_int_equal(RUN(talk, CHAT, "--json"), 0);
    char *without = strdup(out);
    assert_int_equal(RUN(talk, CHAT, "--json", "--speculative-config", config), 0);
    same_answers(out, without);
    free(without);
    assert_int_equal(RUN("Count from 1 to 12.\n/stats\n", CHAT, "--speculative-config", config), 0);
    assert_non_null(strstr(out, "\ndrafts       "));
    assert_non_null(strstr(out, " tokens a step; of all answers by place "));
}

static void expect(int status, int want, const char *text)
{
    assert_int_equal(status, want);
    assert_string_equal(err, text);
}

static void test_refusals(void **state)
{
    (void)state;
    expect(RUN("/nothing\n", CHAT), 2, "quench chat: unknown command '/nothing'; /help lists them\n");
    expect(RUN("/think maybe\n", CHAT), 2, "quench chat: /think: expected on or off, found 'maybe'\n");
    expect(RUN("/stats now\n", CHAT), 2, "quench chat: '/stats' takes nothing\n");
    expect(RUN("/image\n", CHAT), 2, "quench chat: /image: the path of a picture is missing\n");
    expect(RUN("a\xff\n", CHAT), 1, "quench chat: the message is not UTF-8 at byte 1\n");
    expect(RUN("Count from 1 to 12.\n", CHAT, "--context", "10"), 1,
           "quench chat: the conversation has 20 tokens, the context is 10 with the answer\n");
    expect(RUN("", CHAT, "--max-tokens", "0"), 2,
           "quench chat: --max-tokens: expected 1 to 16777216, found 0\n");
    assert_int_equal(RUN("Count from 1 to 12.\n", CHAT, "--max-tokens", "3"), 0);
    assert_string_equal(
        err, "quench: cut after 3 tokens, all of them thinking; --max-tokens and --context allow more\n");
}

static void test_eval(void **state)
{
    (void)state;
    struct err e = { 0 };
    static const char tasks[] =
        "{\"prompt\":\"What is the capital of Finland?\",\"answer\":\"The capital of Finland is "
        "Helsinki.\"}\n{\"prompt\":\"Name the capital of Italy.\",\"answer\":\"no\"}\n";
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", temp_path(&temp, "tasks.jsonl"));
    assert_true(file_write(path, tasks, strlen(tasks), &e));
    assert_int_equal(
        RUN("", "eval", "models/demo", "--tasks", path, "--against", "models/demo", "--json", "--quiet"), 0);
    json_t *o = line(0), *wrong = json_array_get(json_object_get(o, "wrong"), 0);
    assert_int_equal(json_integer_value(json_object_get(o, "right")), 1);
    assert_int_equal(json_integer_value(json_object_get(wrong, "line")), 2);
    assert_non_null(
        strstr(json_string_value(json_object_get(wrong, "found")), "The capital of Italy is Rome."));
    assert_int_equal(json_integer_value(json_object_get(json_object_get(o, "paired"), "both")), 1);
    json_decref(o);
    expect(RUN("", "eval", "models/demo"), 2, "quench eval: --tasks FILE is needed\n");
    expect(RUN("", "eval", "models/demo", "--tasks", path, "--batch", "65"), 2,
           "quench eval: --batch: expected 1 to 64, found 65\n");
}

static int make_temp(void **state)
{
    (void)state;
    temp = temp_make();
    return 0;
}

static int remove_temp(void **state)
{
    (void)state;
    temp_remove(&temp);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conversation), cmocka_unit_test(test_reuse), cmocka_unit_test(test_commands),
        cmocka_unit_test(test_refusals),     cmocka_unit_test(test_eval),  cmocka_unit_test(test_drafts),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
