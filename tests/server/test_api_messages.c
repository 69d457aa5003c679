/* Anthropic's messages over scripted tokens. */
#include "server/api_fixture.h"

#define USER "\"max_tokens\":50,\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"
#define TOOLS                                                                                                \
    "\"tools\":[{\"name\":\"f\",\"description\":\"d\",\"input_schema\":{\"type\":\"object\",\"properties\":" \
    "{\"i\":{\"type\":\"integer\"}}}}]"
#define CALL  "<tool_call>\n<function=f>\n<parameter=i>\n12\n</parameter>\n</function>\n</tool_call>"
#define THINK "\"thinking\":{\"type\":\"enabled\",\"budget_tokens\":40}"

static void test_whole(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "Hello");
    x->scheduler.cached = 2;
    json_t *r = fixture_ask(x, API_MESSAGES,
                            "{\"model\":\"demo\",\"system\":[{\"type\":\"text\",\"text\":\"S\"}]," USER "}");
    assert_int_equal(x->status, 200);
    fixture_prompt(x,
                   "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
                   "<think>\n\n</think>\n\n");
    assert_string_equal(text_at(r, "type"), "message");
    assert_string_equal(text_at(r, "role"), "assistant");
    assert_string_equal(text_at(r, "content.0.type"), "text");
    assert_string_equal(text_at(r, "content.0.text"), "Hello");
    assert_string_equal(text_at(r, "stop_reason"), "end_turn");
    assert_true(json_is_null(at(r, "stop_sequence")));
    assert_int_equal(json_integer_value(at(r, "usage.cache_read_input_tokens")), 2);
    assert_int_equal(json_integer_value(at(r, "usage.input_tokens")), x->scheduler.last.n_prompt - 2);
    assert_int_equal(json_integer_value(at(r, "usage.output_tokens")), x->scheduler.n_tokens);
    json_decref(r);
}

static void test_blocks(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "why\n</think>\n\nSee.\n\n" CALL);
    json_t *r = fixture_ask(x, API_MESSAGES, "{" THINK "," TOOLS "," USER "}");
    assert_int_equal(x->scheduler.last.thinking_budget, 40);
    assert_int_equal(json_array_size(at(r, "content")), 3);
    assert_string_equal(text_at(r, "content.0.thinking"), "why");
    assert_string_equal(text_at(r, "content.0.signature"), "");
    assert_string_equal(text_at(r, "content.1.text"), "See.");
    assert_string_equal(text_at(r, "content.2.type"), "tool_use");
    assert_string_equal(text_at(r, "content.2.name"), "f");
    assert_int_equal(json_integer_value(at(r, "content.2.input.i")), 12);
    assert_string_equal(text_at(r, "stop_reason"), "tool_use");
    json_decref(r);
}

static void test_stream(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "why\n</think>\n\nSee.\n\n" CALL);
    x->scheduler.piece = 100;
    json_t *r = fixture_stream(x, API_MESSAGES, "{\"stream\":true," THINK "," TOOLS "," USER "}");
    static const char *const want[] = { "message_start",      "content_block_start", "content_block_delta",
                                        "content_block_stop", "content_block_start", "content_block_delta",
                                        "content_block_stop", "content_block_start", "content_block_delta",
                                        "content_block_stop", "message_delta",       "message_stop" };
    assert_int_equal(json_array_size(r), sizeof want / sizeof *want);
    for (size_t i = 0; i < json_array_size(r); i++) {
        assert_string_equal(text_at(json_array_get(r, i), "event"), want[i]);
        assert_string_equal(text_at(json_array_get(r, i), "data.type"), want[i]);
    }
    assert_string_equal(text_at(r, "2.data.delta.thinking"), "why");
    assert_string_equal(text_at(r, "5.data.delta.text"), "See.");
    assert_string_equal(text_at(r, "7.data.content_block.name"), "f");
    assert_string_equal(text_at(r, "8.data.delta.partial_json"), "{\"i\":12}");
    assert_int_equal(json_integer_value(at(r, "8.data.index")), 2);
    assert_string_equal(text_at(r, "10.data.delta.stop_reason"), "tool_use");
    assert_int_equal(json_integer_value(at(r, "10.data.usage.output_tokens")), x->scheduler.n_tokens);
    json_decref(r);
}

static void test_history(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "a");
    json_decref(fixture_ask(x, API_MESSAGES,
                            "{\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":"
                            "\"assistant\",\"content\":[{"
                            "\"type\":\"thinking\",\"thinking\":\"why\",\"signature\":\"\"},{\"type\":"
                            "\"text\",\"text\":\"A\"},{\"type\":"
                            "\"text\",\"text\":\"B\"},{\"type\":\"tool_use\",\"id\":\"t\",\"name\":\"f\","
                            "\"input\":{\"i\":3}}]},{\"role\":"
                            "\"user\",\"content\":[{\"type\":\"tool_result\",\"tool_use_id\":\"t\","
                            "\"content\":[{\"type\":\"text\",\"text\":"
                            "\"4\"}]}]}]}"));
    fixture_prompt(
        x,
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\nAB\n\n<tool_call>\n"
        "<function=f>\n<parameter=i>\n3\n</parameter>\n</function>\n</"
        "tool_call><|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
    json_decref(fixture_ask(
        x, API_MESSAGES,
        "{\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\","
        "\"content\":\"The\"}]}"));
    fixture_prompt(x, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nThe");
}

static void test_stops(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "one two");
    json_t *r = fixture_ask(x, API_MESSAGES, "{\"stop_sequences\":[\" t\"]," USER "}");
    assert_string_equal(text_at(r, "content.0.text"), "one");
    assert_string_equal(text_at(r, "stop_reason"), "stop_sequence");
    assert_string_equal(text_at(r, "stop_sequence"), " t");
    json_decref(r);
    /* More than the context has left is a bound, no error. */
    r = fixture_ask(x, API_MESSAGES,
                    "{\"max_tokens\":100000,\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}");
    assert_int_equal(x->status, 200);
    assert_int_equal(x->scheduler.last.max_tokens, 2048 - x->scheduler.last.n_prompt);
    json_decref(r);
    x->scheduler.fail_at = 1;
    r = fixture_ask(x, API_MESSAGES, "{" USER "}");
    assert_string_equal(text_at(r, "type"), "error");
    assert_string_equal(text_at(r, "error.type"), "api_error");
    json_decref(r);
}

/* A red 64 x 64 PNG. */
#define PNG                                                                                                  \
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAS0lEQVR42u3PQQkAAAgAsetfWiP4FgYrsKZeS0BAQEBAQEBA"       \
    "QEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEDgsqnc8OJg6Ln3AAAAAElFTkSuQmCC"

static void test_images(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "a");
    json_decref(fixture_ask(
        x, API_MESSAGES,
        "{\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"source\":{"
        "\"type\":\"base64\",\"media_type\":\"image/png\",\"data\":\"AAAA\"}}]}]}"));
    assert_string_equal(x->scheduler.last_picture, "data:image/png;base64,AAAA");
    json_t *with =
        fixture_ask(x, API_COUNT_TOKENS,
                    "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"source\":{\"type\":"
                    "\"base64\",\"media_type\":\"image/png\",\"data\":\"" PNG "\"}}]}]}");
    json_t *without = fixture_ask(x, API_COUNT_TOKENS,
                                  "{\"messages\":[{\"role\":\"user\",\"content\":[]},{\"role\":"
                                  "\"user\",\"content\":\"\"}]}");
    assert_int_equal(x->scheduler.submitted, 0);
    /* <|vision_start|>, rows, <|vision_end|>; 64 pixels are 2 x 2 rows of 32, more where the least is more */
    int64_t rows =
        json_integer_value(at(with, "input_tokens")) - json_integer_value(at(without, "input_tokens")) - 2;
    int64_t side = 0;
    while (side * side < rows) side++;
    assert_true(rows >= 4 && side * side == rows);
    json_decref(with);
    json_decref(without);
}

static void test_errors(void **state)
{
    struct fixture *x = *state;
    static const struct {
        const char *body, *type, *says;
        int status;
    } cases[] = {
        { "{\"messages\":[]}", "invalid_request_error", "max_tokens: expected an integer", 400 },
        { "{\"max_tokens\":5}", "invalid_request_error", "messages: expected an array", 400 },
        { "{\"max_tokens\":5,\"model\":\"claude\",\"messages\":[]}", "not_found_error", "'claude'", 404 },
        { "{\"max_tokens\":5,\"messages\":[{\"role\":\"system\",\"content\":\"\"}]}", "invalid_request_error",
          "messages[0].role", 400 },
        { "{\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"document\"}]}]}",
          "invalid_request_error", "\"document\"", 400 },
        { "{\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"source\":{"
          "\"type\":\"url\","
          "\"url\":\"http://a\"}}]}]}",
          "invalid_request_error", "base64", 400 },
        { "{\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"source\":{"
          "\"type\":\"base64\","
          "\"media_type\":\"image/"
          "png\",\"data\":\"AAAA\"}}]}],\"tools\":[{\"type\":\"web_search_20250305\",\"name\":\"w\"}]}",
          "invalid_request_error", "web_search_20250305", 400 },
        { "{\"thinking\":{\"type\":\"x\"}," USER "}", "invalid_request_error", "thinking.type", 400 },
        { "{\"tool_choice\":{\"type\":\"x\"}," USER "}", "invalid_request_error", "tool_choice.type", 400 },
        { "{\"max_tokens\":5,\"messages\":[{\"role\":\"assistant\",\"content\":[{\"type\":\"tool_use\","
          "\"name\":\"f\"}]}]}",
          "invalid_request_error", "messages[0].content[0].input", 400 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *r = fixture_ask(x, API_MESSAGES, cases[i].body);
        if (x->status != cases[i].status || strcmp(text_at(r, "error.type"), cases[i].type) != 0 ||
            !strstr(text_at(r, "error.message"), cases[i].says))
            fail_msg("%s:\n  %d %s: %s", cases[i].body, x->status, text_at(r, "error.type"),
                     text_at(r, "error.message"));
        assert_string_equal(text_at(r, "type"), "error");
        json_decref(r);
    }
    json_t *r =
        fixture_ask(x, API_COUNT_TOKENS,
                    "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\",\"source\":{\"type\":"
                    "\"base64\",\"media_type\":\"image/png\",\"data\":\"AAAA\"}}]}]}");
    assert_int_equal(x->status, 400);
    json_decref(r);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_whole), TEST(test_blocks), TEST(test_stream), TEST(test_history),
        TEST(test_stops), TEST(test_images), TEST(test_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
