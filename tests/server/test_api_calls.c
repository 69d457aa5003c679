/* Tool calls in streams: arguments come in pieces that add up to what the whole answer has, in all three
 * APIs, however the tokens arrive and wherever a limit cuts them. */
#include "server/api_fixture.h"

#define SCHEMA                                                                                               \
    "{\"type\":\"object\",\"properties\":{\"s\":{\"type\":\"string\"},\"t\":{\"type\":\"string\"},\"i\":{"   \
    "\"type\":\"integer\"},\"o\":{\"type\":\"object\"},\"n\":{\"type\":[\"string\",\"null\"]}}}"
#define CHAT                                                                                                 \
    "\"reasoning_effort\":\"none\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"tools\":[{"       \
    "\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":" SCHEMA "}}]"
#define RESPONSES                                                                                            \
    "\"reasoning\":{\"effort\":\"none\"},\"input\":\"hi\",\"tools\":[{\"type\":\"function\",\"name\":"       \
    "\"f\",\"parameters\":" SCHEMA "}]"
#define MESSAGES                                                                                             \
    "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"tools\":[{\"name\":\"f\",\"input_"              \
    "schema\":" SCHEMA "}]"
#define P(key, value) "<parameter=" key ">\n" value "\n</parameter>\n"
#define CALL(body)    "<tool_call>\n<function=f>\n" body "</function>\n</tool_call>"

static uint64_t seed;

static int below(int n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (int)((seed >> 33) % (uint64_t)n);
}

/* Text with one or two calls. */
static void random_script(char *text)
{
    static const char *const values[] = { "plain words",
                                          "\"quoted\" \\ and\ttabs",
                                          "line\nline\n\n",
                                          "a < b, <i>c</i> </parameter> d",
                                          "\xe2\x82\xac\xc3\xa9",
                                          "",
                                          "12",
                                          "{\"k\": [1, 2.5, \"x\"]}",
                                          "null",
                                          "</function>",
                                          "nullify",
                                          "\n<parameter=zz>",
                                          "x </tool_call> y" };
    static const char *const keys[] = { "s", "t", "i", "o", "n", "s", "unknown" };
    *text = 0;
    if (below(2)) strcat(text, "Let me look.\n\n");
    for (int calls = 1 + below(2); calls > 0; calls--) {
        strcat(text, "<tool_call>\n<function=f>\n");
        for (int n = below(4); n > 0; n--) {
            const char *key = keys[below(7)], *value = values[below(13)];
            sprintf(text + strlen(text),
                    below(8) ? "<parameter=%s>\n%s\n</parameter>\n" : "<parameter=%s>%s</parameter>", key,
                    value);
        }
        strcat(text, below(12) ? "</function>\n</tool_call>" : "</function>");
        if (calls > 1) strcat(text, "\n");
    }
    if (!below(8)) strcat(text, "\nDone.");
}

/* What an answer comes to: its text, then a line for each call, and how it ended. */
struct seen {
    char text[8000];
    json_t *calls; /* ["NAME", "ARGUMENTS"] */
    const char *finish;
    int pieces; /* of arguments */
};

static void add_call(struct seen *s, const char *name, const char *arguments)
{
    assert_string_equal(name, "f");
    json_array_append_new(s->calls, json_pack("[s, s]", name, arguments));
}

static void add_arguments(struct seen *s, const char *piece)
{
    json_t *last = json_array_get(s->calls, json_array_size(s->calls) - 1);
    char all[8000];
    assert_non_null(last);
    assert_true(*piece != 0);
    snprintf(all, sizeof all, "%s%s", json_string_value(json_array_get(last, 1)), piece);
    json_array_set_new(last, 1, json_string(all));
    s->pieces++;
}

static void chat_whole(struct seen *s, struct fixture *x, const char *body)
{
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, body), *calls = at(r, "choices.0.message.tool_calls"),
           *c;
    size_t i;
    if (json_is_string(at(r, "choices.0.message.content")))
        strcat(s->text, text_at(r, "choices.0.message.content"));
    json_array_foreach(calls, i, c)
        add_call(s, text_at(c, "function.name"), text_at(c, "function.arguments"));
    s->finish = x->account.finish;
    json_decref(r);
}

static void chat_stream(struct seen *s, struct fixture *x, const char *body)
{
    json_t *r = fixture_stream(x, API_CHAT_COMPLETIONS, body), *e;
    size_t i;
    json_array_foreach(r, i, e)
    {
        json_t *call = at(e, "choices.0.delta.tool_calls.0");
        if (at(e, "choices.0.delta.content")) strcat(s->text, text_at(e, "choices.0.delta.content"));
        if (!call) continue;
        bool begins = at(call, "id");
        if (begins) add_call(s, text_at(call, "function.name"), text_at(call, "function.arguments"));
        if (!begins) add_arguments(s, text_at(call, "function.arguments"));
        assert_int_equal(json_integer_value(at(call, "index")), json_array_size(s->calls) - 1);
    }
    s->finish = x->account.finish;
    json_decref(r);
}

static void responses_whole(struct seen *s, struct fixture *x, const char *body)
{
    json_t *r = fixture_ask(x, API_RESPONSES, body), *item;
    size_t i;
    json_array_foreach(at(r, "output"), i, item)
    {
        if (strcmp(text_at(item, "type"), "message") == 0) strcat(s->text, text_at(item, "content.0.text"));
        if (strcmp(text_at(item, "type"), "function_call") != 0) continue;
        add_call(s, text_at(item, "name"), text_at(item, "arguments"));
        json_t *whole = json_loads(text_at(item, "arguments"), 0, NULL);
        assert_string_equal(text_at(item, "status"), whole ? "completed" : "incomplete");
        json_decref(whole);
    }
    s->finish = x->account.finish;
    json_decref(r);
}

static void responses_stream(struct seen *s, struct fixture *x, const char *body)
{
    json_t *r = fixture_stream(x, API_RESPONSES, body), *e;
    size_t i;
    json_array_foreach(r, i, e)
    {
        const char *name = text_at(e, "event");
        if (strcmp(name, "response.output_text.delta") == 0) strcat(s->text, text_at(e, "data.delta"));
        if (strcmp(name, "response.output_item.added") == 0 && at(e, "data.item.arguments"))
            add_call(s, text_at(e, "data.item.name"), text_at(e, "data.item.arguments"));
        if (strcmp(name, "response.function_call_arguments.delta") == 0)
            add_arguments(s, text_at(e, "data.delta"));
        json_t *last = json_array_get(s->calls, json_array_size(s->calls) - 1);
        if (strcmp(name, "response.function_call_arguments.done") == 0)
            assert_string_equal(text_at(last, "1"), text_at(e, "data.arguments"));
        if (strcmp(name, "response.output_item.done") == 0 && at(e, "data.item.arguments"))
            assert_string_equal(text_at(last, "1"), text_at(e, "data.item.arguments"));
    }
    s->finish = x->account.finish;
    json_decref(r);
}

static void messages_stream(struct seen *s, struct fixture *x, const char *body)
{
    json_t *r = fixture_stream(x, API_MESSAGES, body), *e;
    size_t i;
    int open = -1;
    json_array_foreach(r, i, e)
    {
        const char *name = text_at(e, "event");
        bool is_tool = strcmp(text_at(e, "data.content_block.type"), "tool_use") == 0;
        if (strcmp(name, "content_block_start") == 0) {
            assert_int_equal(open, -1);
            open = (int)json_integer_value(at(e, "data.index"));
        }
        if (is_tool) add_call(s, text_at(e, "data.content_block.name"), "");
        if (strcmp(name, "content_block_delta") == 0)
            assert_int_equal(json_integer_value(at(e, "data.index")), open);
        if (strcmp(text_at(e, "data.delta.type"), "text_delta") == 0)
            strcat(s->text, text_at(e, "data.delta.text"));
        if (strcmp(text_at(e, "data.delta.type"), "input_json_delta") == 0)
            add_arguments(s, text_at(e, "data.delta.partial_json"));
        if (strcmp(name, "content_block_stop") == 0) open = -1;
    }
    assert_int_equal(open, -1);
    s->finish = x->account.finish;
    json_decref(r);
}

/* Inputs are objects: the arguments, or of a call that was cut the complete ones of them. */
static void check_messages(struct fixture *x, const char *body, const struct seen *want)
{
    json_t *r = fixture_ask(x, API_MESSAGES, body), *block;
    size_t i, calls = 0;
    json_array_foreach(at(r, "content"), i, block)
    {
        if (strcmp(text_at(block, "type"), "tool_use") != 0) continue;
        json_t *input = at(block, "input"), *own, *value;
        const char *arguments = text_at(json_array_get(want->calls, calls++), "1"), *key;
        assert_true(json_is_object(input));
        own = json_loads(arguments, 0, NULL);
        if (own) assert_true(json_equal(own, input));
        if (!own) json_object_foreach(input, key, value)
            {
                char *text = json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY);
                assert_non_null(strstr(arguments, text));
                free(text);
            }
        json_decref(own);
    }
    assert_int_equal(calls, json_array_size(want->calls));
    json_decref(r);
}

/* A stop string may stand in a value, in a tag, or across both. */
static void add_stop(char *body, const char *key)
{
    static const char *const stops[] = { "rds", "parameter", "\\n\\n", "tabs", "</", "Let", "e\\n", "k" };
    size_t n = strlen(body) - 1;
    assert_true(body[n] == '}');
    sprintf(body + n, ",\"%s\":[\"%s\"]}", key, stops[below(8)]);
}

static void check_same(const struct seen *want, const struct seen *got, const char *what, const char *script)
{
    if (strcmp(want->text, got->text) == 0 && json_equal(want->calls, got->calls) &&
        strcmp(want->finish, got->finish) == 0)
        return;
    char *a = json_dumps(want->calls, JSON_COMPACT), *b = json_dumps(got->calls, JSON_COMPACT);
    fail_msg("%s of %s\n  wanted %s %s %s\n  found  %s %s %s", what, script, want->text, a, want->finish,
             got->text, b, got->finish);
}

static void test_pieces_add_up(void **state)
{
    struct fixture *x = *state;
    static void (*const asks[])(struct seen *, struct fixture *,
                                const char *) = { chat_whole, chat_stream, responses_whole, responses_stream,
                                                  messages_stream };
    static const char *const bodies[] = { "{\"max_tokens\":%d," CHAT "}",
                                          "{\"max_tokens\":%d,\"stream\":true,\"stream_interval\":%d," CHAT
                                          "}",
                                          "{\"max_output_tokens\":%d," RESPONSES "}",
                                          "{\"max_output_tokens\":%d,\"stream\":true," RESPONSES "}",
                                          "{\"max_tokens\":%d,\"stream\":true," MESSAGES "}" };
    static const char *const names[] = { "chat", "chat stream", "responses", "responses stream",
                                         "messages stream" };
    char script[2000], body[2000];
    int cut = 0;
    seed = 7;
    for (int i = 0; i < 600; i++) {
        random_script(script);
        fixture_script(x, script);
        int limit = below(2) ? 1000 : 1 + below(x->scheduler.n_tokens);
        struct seen want = { .calls = json_array() };
        for (int k = 0; k < 5; k++) {
            struct seen got = { .calls = json_array() };
            x->scheduler.piece = below(5);
            snprintf(body, sizeof body, bodies[k], limit, 1 + below(6));
            asks[k](k ? &got : &want, x, body);
            if (k) check_same(&want, &got, names[k], script);
            json_decref(got.calls);
        }
        snprintf(body, sizeof body, "{\"max_tokens\":%d," MESSAGES "}", limit);
        check_messages(x, body, &want);
        cut += strcmp(want.finish, "length") == 0 && json_array_size(want.calls) > 0;
        json_decref(want.calls);
    }
    assert_true(cut > 50);
}

static void test_stop_strings(void **state)
{
    struct fixture *x = *state;
    static const char *const bodies[] = { "{" CHAT "}", "{\"stream\":true," CHAT "}",
                                          "{\"max_tokens\":1000,\"stream\":true," MESSAGES "}" };
    char script[2000], body[2000];
    int cut = 0;
    seed = 21;
    for (int i = 0; i < 400; i++) {
        uint64_t before;
        random_script(script);
        fixture_script(x, script);
        before = seed;
        struct seen want = { .calls = json_array() };
        for (int k = 0; k < 3; k++) {
            struct seen got = { .calls = json_array() };
            x->scheduler.piece = i % 5;
            strcpy(body, bodies[k]);
            seed = before; /* the same stop */
            add_stop(body, k == 2 ? "stop_sequences" : "stop");
            (k == 0 ? chat_whole : k == 1 ? chat_stream : messages_stream)(k ? &got : &want, x, body);
            if (k) check_same(&want, &got, k == 1 ? "chat stream" : "messages stream", body);
            json_decref(got.calls);
        }
        json_t *last = json_array_get(want.calls, json_array_size(want.calls) - 1);
        json_t *whole = last ? json_loads(text_at(last, "1"), 0, NULL) : NULL;
        if (last) assert_string_equal(want.finish, whole ? "tool_calls" : "stop");
        cut += last && !whole;
        json_decref(whole);
        json_decref(want.calls);
    }
    assert_true(cut > 20);
}

/* A string comes while it is written, not when its call is complete. */
static void test_pieces_come_early(void **state)
{
    struct fixture *x = *state;
    fixture_script(
        x, CALL(P("i", "12") P("s", "a long text that goes on and on, word after word, for a while")));
    x->scheduler.piece = 1;
    struct seen s = { .calls = json_array() };
    chat_stream(&s, x, "{\"stream\":true," CHAT "}");
    assert_true(s.pieces > 10);
    json_decref(s.calls);
    /* And what a limit leaves of it nobody can take for the whole. */
    char body[1000];
    snprintf(body, sizeof body, "{\"max_tokens\":%d," CHAT "}", x->scheduler.n_tokens - 12);
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, body);
    const char *arguments = text_at(r, "choices.0.message.tool_calls.0.function.arguments");
    assert_int_equal(strncmp(arguments, "{\"i\":12,\"s\":\"a long text", 24), 0);
    assert_null(json_loads(arguments, 0, NULL));
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "length");
    json_decref(r);
    snprintf(body, sizeof body, "{\"max_tokens\":%d," MESSAGES "}", x->scheduler.n_tokens - 12);
    r = fixture_ask(x, API_MESSAGES, body);
    assert_string_equal(text_at(r, "stop_reason"), "max_tokens");
    assert_int_equal(json_object_size(at(r, "content.0.input")), 1);
    assert_int_equal(json_integer_value(at(r, "content.0.input.i")), 12);
    json_decref(r);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = { TEST(test_pieces_add_up), TEST(test_stop_strings),
                                        TEST(test_pieces_come_early) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
