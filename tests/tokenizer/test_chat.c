/* The chat format against the official template's output, and the forms of values that it writes as JSON. */
#include "tokenizer/chat.h"
#include "base/doc.h"
#include "base/file.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static struct chat_template *template;

static int load_template(void **state)
{
    struct err e = { 0 };
    (void)state;
    if (!chat_template_load(&template, "models/demo", &e)) fail_msg("%s", e.text);
    return 0;
}

static int free_template(void **state)
{
    (void)state;
    chat_template_free(template);
    return 0;
}

static json_t *parse(const char *text)
{
    json_t *v;
    struct err e = { 0 };
    if (!doc_parse(&v, text, strlen(text), &e)) fail_msg("%s", e.text);
    return v;
}

/* Integers over 64 bits do not pass the JSON parser: the one in the vectors, which stands in the template's
 * input and in its output, becomes a smaller one. */
static void shorten_big_integer(char *text)
{
    static const char big[] = "123456789012345678901234567890";
    const size_t keep = 19, cut = strlen(big) - keep;
    for (char *p; (p = strstr(text, big));) memmove(p + keep, p + keep + cut, strlen(p + keep + cut) + 1);
}

static struct chat_options options_of(const json_t *kwargs)
{
    const json_t *thinking = json_object_get(kwargs, "enable_thinking");
    struct chat_options o = { .add_generation_prompt =
                                  !json_is_false(json_object_get(kwargs, "add_generation_prompt")),
                              .preserve_thinking = json_is_true(json_object_get(kwargs, "preserve_thinking")),
                              .add_vision_id = json_is_true(json_object_get(kwargs, "add_vision_id")) };
    if (json_is_false(thinking)) o.thinking = CHAT_THINKING_OFF;
    if (json_is_true(thinking)) o.thinking = CHAT_THINKING_ON;
    return o;
}

static void check_case(const json_t *c)
{
    const char *name = json_string_value(json_object_get(c, "name")), *want, *want_error;
    const json_t *kwargs = json_object_get(c, "kwargs");
    struct chat_options o = options_of(kwargs);
    struct err e = { 0 };
    char *got;
    size_t bytes;
    bool ok = chat_render(&got, &bytes, template, json_object_get(c, "messages"),
                          json_object_get(kwargs, "tools"), &o, &e);
    want = json_string_value(json_object_get(c, "rendered"));
    want_error = json_string_value(json_object_get(c, "error"));
    /* What raise_exception says stands alone; Jinja2's own errors come with their line. */
    bool same_error = !ok && want_error && strlen(e.text) >= strlen(want_error) &&
                      strcmp(e.text + strlen(e.text) - strlen(want_error), want_error) == 0;
    if (ok != (want != NULL) || (!ok && !same_error)) fail_msg("%s: %s", name, ok ? "no error" : e.text);
    if (ok && strcmp(got, want) != 0) fail_msg("%s:\n%s\nwanted:\n%s", name, got, want);
    if (ok)
        assert_int_equal(bytes, strlen(want));
    else
        assert_int_equal(e.code, ERR_ARGUMENT);
    free(got);
}

static void test_official_template(void **state)
{
    (void)state;
    char *text;
    size_t bytes, n = 0;
    struct err e = { 0 };
    if (!file_read(&text, &bytes, "tests/golden/model_vectors.json", 1 << 20, &e)) fail_msg("%s", e.text);
    shorten_big_integer(text);
    json_t *all = parse(text);
    const json_t *cases = json_object_get(json_object_get(all, "chat_rendering"), "cases");
    for (; n < json_array_size(cases); n++) check_case(json_array_get(cases, n));
    assert_int_equal(n, 36);
    json_decref(all);
    free(text);
}

/* Renders one user message and a tool whose only member is `value`; *out is what stands for the value. */
static char *as_tool(const char *value)
{
    static const char open[] = "<tools>\n{\"v\": ", close[] = "}\n</tools>";
    char *text, *tools_text;
    size_t bytes;
    struct err e = { 0 };
    assert_true(asprintf(&tools_text, "[{\"v\":%s}]", value) > 0);
    json_t *tools = parse(tools_text), *messages = parse("[{\"role\":\"user\",\"content\":\"q\"}]");
    if (!chat_render(&text, &bytes, template, messages, tools, &(struct chat_options){ 0 }, &e))
        fail_msg("%s", e.text);
    char *begin = strstr(text, open), *end = strstr(text, close);
    assert_true(begin && end);
    char *out = strndup(begin + strlen(open), (size_t)(end - begin) - strlen(open));
    json_decref(tools);
    json_decref(messages);
    free(tools_text);
    free(text);
    return out;
}

static void check_json(const char *value, const char *want)
{
    char *got = as_tool(value);
    assert_string_equal(got, want);
    free(got);
}

static void test_json_numbers(void **state)
{
    (void)state;
    static const struct {
        const char *in, *want;
    } cases[] = {
        { "0", "0" },
        { "-0", "0" },
        { "9223372036854775807", "9223372036854775807" },
        { "-9223372036854775808", "-9223372036854775808" },
        { "1.0", "1.0" },
        { "1e0", "1.0" },
        { "-0.0", "-0.0" },
        { "0.0", "0.0" },
        { "-2.50", "-2.5" },
        { "0.1", "0.1" },
        { "100.0", "100.0" },
        { "123e3", "123000.0" },
        { "0.0001", "0.0001" },
        { "0.00012345", "0.00012345" },
        { "0.00001", "1e-05" },
        { "-0.000012345", "-1.2345e-05" },
        { "1e15", "1000000000000000.0" },
        { "9999999999999998.0", "9999999999999998.0" },
        { "9007199254740993.0", "9007199254740992.0" },
        { "1e16", "1e+16" },
        { "12345678901234567890.0", "1.2345678901234567e+19" },
        { "1e22", "1e+22" },
        { "1e23", "1e+23" },
        { "1e100", "1e+100" },
        { "0.30000000000000004", "0.30000000000000004" },
        { "3.141592653589793", "3.141592653589793" },
        { "1.7976931348623157e308", "1.7976931348623157e+308" },
        { "2.2250738585072014e-308", "2.2250738585072014e-308" },
        { "5e-324", "5e-324" },
        { "7.1202363472230444e-307", "7.120236347223045e-307" },   /* 2^-1017: 16 digits, one up */
        { "-8.2090736025967525e-289", "-8.209073602596753e-289" }, /* 2^-957 */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_json(cases[i].in, cases[i].want);
}

static void test_json_strings(void **state)
{
    (void)state;
    check_json("\"\\\"\\\\\\/\\n\\r\\t\\b\\f\"", "\"\\\"\\\\/\\n\\r\\t\\b\\f\"");
    check_json("\"\\u0000\\u0001\\u001F\\u007f\"", "\"\\u0000\\u0001\\u001f\x7f\"");
    check_json("\"K\\u00f6ln \\u2028\\u20AC\\ud83d\\ude00\"", "\"K\u00f6ln \u2028\u20ac\U0001F600\"");
    check_json("\"\"", "\"\"");
    check_json("\"plain\"", "\"plain\"");
}

static void test_json_structure(void **state)
{
    (void)state;
    check_json("[ ]", "[]");
    check_json("{ }", "{}");
    check_json("[1,[true,false],null,{\"z\":1,\"a\":[],\"m\":{\"\\n\":0}}]",
               "[1, [true, false], null, {\"z\": 1, \"a\": [], \"m\": {\"\\n\": 0}}]");
}

/* Content is `content` (JSON text) of a user message; the turn's text is compared. */
static void check_content(const char *content, const char *want)
{
    char *messages_text, *text, *wanted;
    size_t bytes;
    struct err e = { 0 };
    assert_true(asprintf(&messages_text, "[{\"role\":\"user\",\"content\":%s}]", content) > 0);
    assert_true(asprintf(&wanted, "<|im_start|>user\n%s<|im_end|>\n", want) > 0);
    json_t *messages = parse(messages_text);
    bool ok = chat_render(&text, &bytes, template, messages, NULL, &(struct chat_options){ 0 }, &e);
    assert_string_equal(ok ? text : e.text, ok ? wanted : want);
    json_decref(messages);
    free(messages_text);
    free(wanted);
    free(text);
}

static void test_trim(void **state)
{
    (void)state;
    static const int spaces[] = { 0x09,   0x0a,   0x0b,   0x0c,   0x0d,   0x1c,   0x1d,   0x1e,
                                  0x1f,   0x20,   0x85,   0xa0,   0x1680, 0x2000, 0x2001, 0x2002,
                                  0x2003, 0x2004, 0x2005, 0x2006, 0x2007, 0x2008, 0x2009, 0x200a,
                                  0x2028, 0x2029, 0x202f, 0x205f, 0x3000 };
    static const int others[] = { 0x08,   0x0e,   0x1b,   0x21,   0x7f,   0x84,  0x86,
                                  0x180e, 0x200b, 0x2027, 0x202a, 0x2060, 0xfeff };
    char in[64], want[16];
    json_t *char_text;
    for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) {
        snprintf(in, sizeof in, "\"\\u%04x \\u%04xa\\u%04xb\\u%04x\\u%04x\"", spaces[i], spaces[i], 0x20,
                 spaces[i], spaces[i]);
        check_content(in, "a b");
    }
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        snprintf(in, sizeof in, "\"\\u%04x\"", others[i]);
        char_text = parse(in);
        snprintf(want, sizeof want, "%s", json_string_value(char_text));
        json_decref(char_text);
        snprintf(in, sizeof in, "\" \\u%04x\\n\"", others[i]);
        check_content(in, want);
    }
}

static void test_content_forms(void **state)
{
    (void)state;
    check_content("null", "");
    check_content("[]", "");
    check_content("\" \\n \"", "");
    check_content("[{\"text\":\" a\"},{\"text\":\"b \"}]", "ab");
    check_content("[{\"video\":1},{\"text\":\"x\"}]", "<|vision_start|><|video_pad|><|vision_end|>x");
    check_content("[{\"type\":\"text\"}]", "Unexpected item type in content.");
    check_content("[{\"text\":null}]", "None"); /* as the template has it */
    check_content("[7]", "line 14: argument of type 'int' is not iterable");
    check_content("[\"words\"]", "Unexpected item type in content.");
    check_content("true", "Unexpected content type.");
    check_content("5", "Unexpected content type.");
}

static void check_messages(const char *messages_text, const char *tools_text, const char *want)
{
    char *text;
    size_t bytes;
    struct err e = { 0 };
    json_t *messages = parse(messages_text), *tools = parse(tools_text);
    bool ok = chat_render(&text, &bytes, template, messages, tools, &(struct chat_options){ 0 }, &e);
    assert_string_equal(ok ? text : e.text, want);
    json_decref(messages);
    json_decref(tools);
    free(text);
}

#define USER "{\"role\":\"user\",\"content\":\"q\"}"

static void test_errors(void **state)
{
    (void)state;
    check_messages("{}", "null", "No messages provided.");
    check_messages("[" USER ",{}]", "null", "Unexpected message role.");
    check_messages("[" USER ",3]", "null", "Unexpected message role.");
    check_messages("[{\"role\":\"system\",\"content\":[{\"type\":\"video\"}]}," USER "]", "null",
                   "System message cannot contain videos.");
    check_messages("[{\"role\":\"system\"}]", "[]", "No user query found in messages.");
    check_messages("[" USER ",{\"role\":\"assistant\",\"tool_calls\":[{\"name\":\"f\",\"arguments\":null}]}]",
                   "null", "line 39: Can only get item pairs from a mapping.");
}

static void test_reasoning_forms(void **state)
{
    (void)state;
    check_messages(
        "[" USER ",{\"role\":\"assistant\",\"content\":\"x<think>\\n\\na\\n<think>\\n "
        "b\\n\\n</think>c</think>\\n\\nd\"}]",
        "null",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\nb\n</think>\n\nd<|im_end|>\n");
    check_messages(
        "[" USER ",{\"role\":\"assistant\",\"content\":\"</think>\",\"tool_calls\":{\"not\":\"a list\"}}]",
        "null", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<|im_end|>\n");
}

static void test_tool_result_first(void **state)
{
    (void)state;
    check_messages("[{\"role\":\"tool\",\"content\":\"r\"}," USER "]", "null",
                   "\n<tool_response>\nr\n</tool_response><|im_end|>\n<|im_start|>user\nq<|im_end|>\n");
}

static void test_nul_inside(void **state)
{
    (void)state;
    char *text;
    size_t bytes;
    static const char want[] = "<|im_start|>user\na\0b<|im_end|>\n";
    json_t *messages = parse("[{\"role\":\"user\",\"content\":\"a\\u0000b\"}]");
    assert_true(chat_render(&text, &bytes, template, messages, NULL, &(struct chat_options){ 0 }, NULL));
    assert_int_equal(bytes, sizeof want - 1);
    assert_memory_equal(text, want, sizeof want);
    json_decref(messages);
    free(text);
}

static void test_long_content(void **state)
{
    (void)state;
    const size_t n = 3000000;
    char *text, *big = malloc(n + 1);
    size_t bytes;
    assert_non_null(big);
    memset(big, 'x', n);
    big[n] = 0;
    json_t *messages = json_pack("[{s:s,s:s}]", "role", "user", "content", big);
    assert_true(chat_render(&text, &bytes, template, messages, NULL,
                            &(struct chat_options){ .add_generation_prompt = true }, NULL));
    assert_int_equal(bytes, n + strlen("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think>\n"));
    json_decref(messages);
    free(text);
    free(big);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_official_template),
        cmocka_unit_test(test_json_numbers),
        cmocka_unit_test(test_json_strings),
        cmocka_unit_test(test_json_structure),
        cmocka_unit_test(test_trim),
        cmocka_unit_test(test_content_forms),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_reasoning_forms),
        cmocka_unit_test(test_tool_result_first),
        cmocka_unit_test(test_nul_inside),
        cmocka_unit_test(test_long_content),
    };
    return cmocka_run_group_tests(tests, load_template, free_template);
}
