/* Responses over scripted tokens. */
#include "server/api_fixture.h"

#define TOOLS                                                                                                \
    "\"tools\":[{\"type\":\"function\",\"name\":\"f\",\"parameters\":{\"type\":\"object\",\"properties\":{"  \
    "\"i\":{\"type\":\"integer\"}}}}]"
#define CALL "<tool_call>\n<function=f>\n<parameter=i>\n12\n</parameter>\n</function>\n</tool_call>"

static void test_whole(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "why\n</think>\n\nSee.\n\n" CALL);
    json_t *r = fixture_ask(x, API_RESPONSES,
                            "{\"input\":\"hi\",\"instructions\":\"S\",\"metadata\":{\"a\":\"b\"}," TOOLS "}");
    assert_int_equal(x->status, 200);
    assert_string_equal(text_at(r, "object"), "response");
    assert_string_equal(text_at(r, "status"), "completed");
    assert_string_equal(text_at(r, "metadata.a"), "b");
    assert_string_equal(text_at(r, "tools.0.name"), "f");
    assert_true(json_is_false(at(r, "store")));
    assert_int_equal(json_array_size(at(r, "output")), 3);
    assert_string_equal(text_at(r, "output.0.type"), "reasoning");
    assert_string_equal(text_at(r, "output.0.content.0.text"), "why");
    assert_string_equal(text_at(r, "output.1.content.0.type"), "output_text");
    assert_string_equal(text_at(r, "output.1.content.0.text"), "See.");
    assert_string_equal(text_at(r, "output.2.type"), "function_call");
    assert_string_equal(text_at(r, "output.2.arguments"), "{\"i\":12}");
    assert_true(json_integer_value(at(r, "usage.output_tokens_details.reasoning_tokens")) > 0);
    json_decref(r);
    fixture_script(x, "thinking");
    r = fixture_ask(x, API_RESPONSES, "{\"input\":\"hi\",\"max_output_tokens\":1}");
    assert_string_equal(text_at(r, "status"), "incomplete");
    assert_string_equal(text_at(r, "incomplete_details.reason"), "max_output_tokens");
    json_decref(r);
}

/* Events in order, numbered; what is done is what its deltas add up to. */
static void test_stream(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "why\n</think>\n\nSee.\n\n" CALL);
    json_t *r = fixture_stream(x, API_RESPONSES, "{\"stream\":true,\"input\":\"hi\"," TOOLS "}");
    static const char *const want[] = { "response.created",
                                        "response.in_progress",
                                        "response.output_item.added",
                                        "response.content_part.added",
                                        "response.reasoning_text.delta",
                                        "response.reasoning_text.done",
                                        "response.content_part.done",
                                        "response.output_item.done",
                                        "response.output_item.added",
                                        "response.content_part.added",
                                        "response.output_text.delta",
                                        "response.output_text.done",
                                        "response.content_part.done",
                                        "response.output_item.done",
                                        "response.output_item.added",
                                        "response.function_call_arguments.delta",
                                        "response.function_call_arguments.done",
                                        "response.output_item.done",
                                        "response.completed" };
    assert_int_equal(json_array_size(r), sizeof want / sizeof *want);
    for (size_t i = 0; i < json_array_size(r); i++) {
        json_t *e = json_array_get(r, i);
        assert_string_equal(text_at(e, "event"), want[i]);
        assert_string_equal(text_at(e, "data.type"), want[i]);
        assert_int_equal(json_integer_value(at(e, "data.sequence_number")), i);
    }
    assert_string_equal(text_at(r, "5.data.text"), "why");
    assert_string_equal(text_at(r, "11.data.text"), "See.");
    assert_string_equal(text_at(r, "13.data.item.content.0.text"), "See.");
    assert_string_equal(text_at(r, "11.data.item_id"), text_at(r, "8.data.item.id"));
    assert_string_equal(text_at(r, "16.data.arguments"), "{\"i\":12}");
    assert_string_equal(text_at(r, "17.data.item.call_id"), text_at(r, "18.data.response.output.2.call_id"));
    assert_int_equal(json_integer_value(at(r, "18.data.response.usage.output_tokens")),
                     x->scheduler.n_tokens);
    json_decref(r);
    for (x->scheduler.piece = 1; x->scheduler.piece < 4; x->scheduler.piece++) {
        fixture_script(x, "</think>\x01"
                          "one two three");
        r = fixture_stream(x, API_RESPONSES, "{\"stream\":true,\"input\":\"hi\"}");
        char all[100] = "";
        for (size_t i = 0; i < json_array_size(r); i++) {
            json_t *e = json_array_get(r, i);
            if (strcmp(text_at(e, "event"), "response.output_text.delta") == 0)
                strcat(all, text_at(e, "data.delta"));
            if (strcmp(text_at(e, "event"), "response.output_text.done") == 0)
                assert_string_equal(text_at(e, "data.text"), all);
        }
        assert_string_equal(all, "one two three");
        json_decref(r);
    }
}

static void test_input(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "a");
    json_decref(fixture_ask(x, API_RESPONSES,
                            "{\"instructions\":\"S\",\"reasoning\":{\"effort\":\"none\"},\"input\":[{"
                            "\"role\":\"developer\",\"content\":\"D\"},{"
                            "\"role\":\"user\",\"content\":[{\"type\":\"input_text\",\"text\":\"q\"},{"
                            "\"type\":\"input_image\",\"image_url\":"
                            "\"data:image/"
                            "png;base64,AAAA\",\"detail\":\"auto\"}]},{\"type\":\"reasoning\",\"id\":\"r\","
                            "\"summary\":[],\"content\":[{"
                            "\"type\":\"reasoning_text\",\"text\":\"why\"}]},{\"type\":\"message\",\"role\":"
                            "\"assistant\",\"content\":[{\"type\":"
                            "\"output_text\",\"text\":\"A\",\"annotations\":[]}]},{\"type\":\"function_"
                            "call\",\"call_id\":\"c\",\"name\":\"f\","
                            "\"arguments\":\"{\\\"i\\\":3}\"},{\"type\":\"function_call_output\",\"call_id\":"
                            "\"c\",\"output\":\"4\"}]}"));
    assert_int_equal(x->status, 200);
    fixture_prompt(
        x,
        "<|im_start|>system\nS\n\nD<|im_end|>\n<|im_start|>user\nq<|vision_start|><|image_pad|><|vision_end|>"
        "<|im_end|>\n<|im_start|>assistant\n<think>\nwhy\n</think>\n\nA\n\n<tool_call>\n<function=f>\n"
        "<parameter=i>\n3\n</parameter>\n</function>\n</tool_call><|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
    json_decref(fixture_ask(x, API_RESPONSES,
                            "{\"input\":\"hi\",\"text\":{\"format\":{\"type\":\"json_schema\",\"name\":\"n\","
                            "\"schema\":{\"type\":\"object\"}}}}"));
    assert_int_equal(x->status, 200);
    assert_non_null(x->scheduler.last.constraint);
}

static void test_errors(void **state)
{
    struct fixture *x = *state;
    static const struct wrong cases[] = {
        { "{}", 400, "input", "found nothing" },
        { "{\"input\":\"a\",\"previous_response_id\":\"r\"}", 400, "previous_response_id",
          "no response is stored" },
        { "{\"input\":\"a\",\"background\":true}", 400, "background", "stream it" },
        { "{\"input\":\"a\",\"tools\":[{\"type\":\"web_search\"}]}", 400, "tools[0].type", "web_search" },
        { "{\"input\":\"a\",\"include\":[\"message.output_text.logprobs\"]}", 400, "include",
          "chat/completions" },
        { "{\"input\":[{\"type\":\"item_reference\",\"id\":\"i\"}]}", 400, "input[0]", "item_reference" },
        { "{\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_file\"}]}]}", 400,
          "input[0].content[0]", "input_file" },
        { "{\"input\":[{\"role\":\"user\"}]}", 400, "input[0].content", "found nothing" },
        { "{\"input\":[3]}", 400, "input[0]", "nothing" },
        { "{\"input\":[{\"type\":\"function_call\",\"name\":\"f\"}]}", 400, "input[0].arguments",
          "JSON object" },
    };
    check_wrong(x, API_RESPONSES, cases, sizeof cases / sizeof *cases);
    fixture_script(x, "</think>a b c");
    x->scheduler.piece = 1;
    x->scheduler.fail_at = 2;
    json_t *r = fixture_stream(x, API_RESPONSES, "{\"stream\":true,\"input\":\"hi\"}");
    json_t *last = json_array_get(r, json_array_size(r) - 1);
    assert_string_equal(text_at(last, "data.type"), "error");
    json_decref(r);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = { TEST(test_whole), TEST(test_stream), TEST(test_input),
                                        TEST(test_errors) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
