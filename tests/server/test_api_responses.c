/* Responses over scripted tokens. */
#include "server/api_fixture.h"
#include "server/response_store.h"

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
          "keeps no responses" },
        { "{\"input\":\"a\",\"background\":true}", 400, "background", "stream it" },
        { "{\"input\":\"a\",\"store\":1}", 400, "store", "true or false" },
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

static void keep_responses(struct fixture *x, size_t bytes, double seconds)
{
    x->options.store_bytes = bytes;
    x->options.store_seconds = seconds;
    fixture_api(x);
}

static json_t *get(struct fixture *x, enum api_route route, const char *id)
{
    char *text = fixture_ask_at(x, route, id, "");
    json_t *r = fixture_parse(text);
    free(text);
    return r;
}

/* Asks with a body that holds %s for an id. */
static json_t *ask_after(struct fixture *x, const char *id, const char *body)
{
    char text[1000];
    snprintf(text, sizeof text, body, id);
    return fixture_ask(x, API_RESPONSES, text);
}

static void test_kept(void **state)
{
    struct fixture *x = *state;
    keep_responses(x, 1 << 20, 60);
    fixture_script(x, "why\n</think>\n\nSee \"it\".\n\n" CALL);
    json_t *first = fixture_ask(x, API_RESPONSES, "{\"input\":\"hi\",\"instructions\":\"S\"," TOOLS "}");
    const char *id = text_at(first, "id");
    assert_true(json_is_true(at(first, "store")) && strlen(id) == 5 + 32);
    json_t *again = get(x, API_RESPONSE, id);
    assert_int_equal(x->status, 200);
    assert_true(json_equal(first, again));
    json_decref(again);
    /* It goes on, with instructions of its own; streamed, and kept under its own id. */
    fixture_script(x, "</think>done");
    char body[400];
    snprintf(body, sizeof body,
             "{\"previous_response_id\":\"%s\",\"instructions\":\"T\",\"stream\":true,\"input\":[{\"type\":"
             "\"function_call_output\",\"call_id\":\"c\",\"output\":\"4\"}]}",
             id);
    json_t *events = fixture_stream(x, API_RESPONSES, body);
    fixture_prompt(
        x, "<|im_start|>system\nT<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
           "why\n</think>\n\nSee \"it\".\n\n" CALL "<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n"
           "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n");
    json_t *last = at(json_array_get(events, json_array_size(events) - 1), "data.response");
    assert_string_equal(text_at(last, "previous_response_id"), id);
    again = get(x, API_RESPONSE, text_at(last, "id"));
    assert_true(json_equal(last, again));
    json_decref(again);
    json_t *third = ask_after(x, text_at(last, "id"), "{\"previous_response_id\":\"%s\",\"input\":\"more\"}");
    assert_int_equal(x->status, 200);
    json_decref(third);
    /* Another key knows nothing of it. */
    x->owner = 8;
    json_decref(get(x, API_RESPONSE, id));
    assert_int_equal(x->status, 404);
    json_decref(get(x, API_RESPONSE_DELETE, id));
    assert_int_equal(x->status, 404);
    json_decref(ask_after(x, id, "{\"previous_response_id\":\"%s\",\"input\":\"more\"}"));
    assert_int_equal(x->status, 400);
    x->owner = 7;
    snprintf(body, sizeof body, "%s/cancel", id);
    json_t *r = get(x, API_RESPONSE_CANCEL, body);
    assert_int_equal(x->status, 400);
    assert_non_null(strstr(text_at(r, "error.message"), "complete"));
    json_decref(r);
    r = get(x, API_RESPONSE_DELETE, id);
    assert_true(json_is_true(at(r, "deleted")));
    json_decref(r);
    json_decref(get(x, API_RESPONSE, id));
    assert_int_equal(x->status, 404);
    r = ask_after(x, id, "{\"previous_response_id\":\"%s\",\"input\":\"more\"}");
    assert_string_equal(text_at(r, "error.param"), "previous_response_id");
    assert_string_equal(text_at(r, "error.code"), "previous_response_not_found");
    json_decref(r);
    json_decref(events);
    json_decref(first);
}

static void test_not_kept(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>a");
    json_t *r = fixture_ask(x, API_RESPONSES, "{\"input\":\"hi\",\"store\":true}");
    assert_true(json_is_false(at(r, "store")));
    json_decref(get(x, API_RESPONSE, text_at(r, "id")));
    assert_int_equal(x->status, 404);
    json_decref(r);
    keep_responses(x, 1 << 20, 60);
    r = fixture_ask(x, API_RESPONSES, "{\"input\":\"hi\",\"store\":false}");
    assert_true(json_is_false(at(r, "store")));
    json_decref(get(x, API_RESPONSE, text_at(r, "id")));
    assert_int_equal(x->status, 404);
    json_decref(r);
    /* Too large, too old. */
    for (int i = 0; i < 2; i++) {
        keep_responses(x, i ? 1 << 20 : 600, i ? 1e-9 : 60);
        r = fixture_ask(x, API_RESPONSES, "{\"input\":\"hi\"}");
        json_decref(get(x, API_RESPONSE, text_at(r, "id")));
        assert_int_equal(x->status, 404);
        json_decref(r);
    }
    /* A conversation grows no larger in memory than one body may be. */
    keep_responses(x, 64 << 20, 60);
    char *many = malloc(20 << 20), *to = many, id[100] = "";
    assert_non_null(many);
    for (int turn = 0; turn < 6 && x->status != 413; turn++) {
        to = many +
             sprintf(
                 many,
                 "{%s%s%s\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_text\",\"text\":\"q\"}",
                 turn ? "\"previous_response_id\":\"" : "", id, turn ? "\"," : "");
        for (int i = 0; i < 120000; i++) to += sprintf(to, ",{\"type\":\"input_text\",\"text\":\"\"}");
        strcpy(to, "]}]}");
        r = fixture_ask(x, API_RESPONSES, many);
        snprintf(id, sizeof id, "%s", text_at(r, "id"));
        json_decref(r);
    }
    assert_int_equal(x->status, 413);
    free(many);
    fixture_script(x, "</think>a");
    /* A call that was cut is in the response, and in no conversation that follows. */
    keep_responses(x, 1 << 20, 60);
    fixture_script(x, "</think>" CALL CALL);
    char body[400];
    snprintf(body, sizeof body, "{\"input\":\"hi\",\"max_output_tokens\":%d," TOOLS "}",
             x->scheduler.n_tokens - 8);
    r = fixture_ask(x, API_RESPONSES, body);
    assert_string_equal(text_at(r, "status"), "incomplete");
    assert_string_equal(text_at(r, "output.1.status"), "incomplete");
    json_decref(ask_after(x, text_at(r, "id"), "{\"previous_response_id\":\"%s\",\"input\":\"more\"}"));
    assert_int_equal(x->status, 200);
    fixture_prompt(x, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" CALL
                      "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n<think>\n");
    json_decref(r);
}

enum { IDS = 40, ROOM = 20000 };

/* What the store should hold. */
struct held {
    size_t bytes; /* 0: not there */
    uint64_t used;
};

static size_t make_room(struct held all[IDS][2], size_t total, size_t wanted)
{
    while (total + wanted > ROOM) {
        struct held *oldest = NULL;
        for (int i = 0; i < 2 * IDS; i++) {
            struct held *h = &all[i / 2][i % 2];
            if (h->bytes && (!oldest || h->used < oldest->used)) oldest = h;
        }
        assert_non_null(oldest);
        total -= oldest->bytes;
        oldest->bytes = 0;
    }
    return total;
}

static void test_store(void **state)
{
    (void)state;
    struct held all[IDS][2] = { 0 };
    struct response_store *s;
    uint64_t seed = 3, now = 0;
    char id[20], text[1000];
    size_t total = 0, overhead, most = 0;
    assert_true(response_store_create(&s, ROOM, 60, NULL));
    assert_true(response_store_put(s, "x", 0, &(struct stored_response){ "", 0, "", 0 }));
    overhead = response_store_bytes(s);
    assert_true(response_store_delete(s, "x", 0));
    for (int i = 0; i < 50000; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        int k = (int)((seed >> 33) % IDS), owner = (int)(seed >> 50) & 1, what = (int)(seed >> 52) % 4;
        size_t n = (size_t)(seed >> 40) % 600, bytes = overhead + n + n / 2;
        struct held *h = &all[k][owner];
        snprintf(id, sizeof id, "resp_%d", k);
        memset(text, 'a' + k % 26, sizeof text);
        const struct stored_response *r = response_store_get(s, id, (uint64_t)owner);
        assert_int_equal(r != NULL, h->bytes > 0);
        if (r) {
            assert_int_equal(overhead + r->body_bytes + r->messages_bytes, h->bytes);
            assert_memory_equal(r->body, text, r->body_bytes);
            assert_memory_equal(r->messages, text, r->messages_bytes);
            h->used = ++now;
        }
        if (what <= 1) {
            total -= h->bytes;
            h->bytes = 0;
        }
        if (what == 0) assert_int_equal(response_store_delete(s, id, (uint64_t)owner), r != NULL);
        if (what == 1) {
            total = make_room(all, total, bytes) + bytes;
            *h = (struct held){ bytes, ++now };
            assert_true(response_store_put(s, id, (uint64_t)owner,
                                           &(struct stored_response){ text, n, text, n / 2 }));
        }
        assert_int_equal(response_store_bytes(s), total);
        if (total > most) most = total;
        if (r)
            assert_memory_equal(r->body, text,
                                r->body_bytes); /* held, though it may be gone from the store */
        response_store_release(r);
    }
    assert_true(most > ROOM - 1000);
    response_store_free(s);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = { TEST(test_whole),
                                        TEST(test_stream),
                                        TEST(test_input),
                                        TEST(test_errors),
                                        TEST(test_kept),
                                        TEST(test_not_kept),
                                        cmocka_unit_test(test_store) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
