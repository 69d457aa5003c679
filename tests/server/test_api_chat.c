/* Chat completions over scripted tokens. */
#include "server/api_fixture.h"
#include "server/repeats.h"
#include <math.h>
#include <unistd.h>

#define USER "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"
#define TOOLS                                                                                                \
    "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"type\":\"object\","    \
    "\"properties\":{\"i\":{\"type\":\"integer\"},\"s\":{\"type\":\"string\"}}}}}]"
#define CALL(name, value)                                                                                    \
    "<tool_call>\n<function=f>\n<parameter=" name ">\n" value "\n</parameter>\n</function>\n</tool_call>"

static void test_whole(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "I add.\n</think>\n\nFive \xe2\x82\xac \"quoted\"\n");
    x->scheduler.cached = 3;
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"model\":\"alias\"," USER "}");
    assert_int_equal(x->status, 200);
    assert_string_equal(text_at(r, "object"), "chat.completion");
    assert_string_equal(text_at(r, "id"), "chatcmpl-r1");
    assert_string_equal(text_at(r, "model"), "alias");
    assert_string_equal(text_at(r, "choices.0.message.role"), "assistant");
    assert_string_equal(text_at(r, "choices.0.message.content"), "Five \xe2\x82\xac \"quoted\"\n");
    assert_string_equal(text_at(r, "choices.0.message.reasoning"), "I add.");
    assert_string_equal(text_at(r, "choices.0.message.reasoning_content"), "I add.");
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "stop");
    assert_true(json_is_null(at(r, "choices.0.stop_reason")));
    assert_int_equal(json_integer_value(at(r, "usage.completion_tokens")), x->scheduler.n_tokens);
    assert_int_equal(json_integer_value(at(r, "usage.prompt_tokens_details.cached_tokens")), 3);
    assert_int_equal(json_integer_value(at(r, "usage.completion_tokens_details.accepted_prediction_tokens")),
                     3);
    assert_int_equal(json_integer_value(at(r, "usage.completion_tokens_details.rejected_prediction_tokens")),
                     2);
    int reasoning = (int)json_integer_value(at(r, "usage.completion_tokens_details.reasoning_tokens"));
    assert_true(reasoning > 2 && reasoning < x->scheduler.n_tokens - 5);
    assert_string_equal(x->account.finish, "stop");
    assert_int_equal(x->account.usage.answer_tokens, x->scheduler.n_tokens);
    json_decref(r);
}

static char *joined(json_t *events, const char *path)
{
    char *all = calloc(1, 1);
    size_t i;
    json_t *e;
    json_array_foreach(events, i, e)
    {
        const char *part = json_string_value(at(e, path));
        if (!part) continue;
        all = realloc(all, strlen(all) + strlen(part) + 1);
        strcat(all, part);
    }
    return all;
}

static void check_joined(json_t *events, const char *path, const char *want)
{
    char *got = joined(events, path);
    assert_string_equal(got, want);
    free(got);
}

/* Whatever the pieces in which tokens come, the deltas add up to the same. */
static void test_stream(void **state)
{
    struct fixture *x = *state;
    for (int piece = 0; piece <= 3; piece++) {
        fixture_script(x, "I add.\n</think>\n\n\x01"
                          "F\xc3\xa9 \xe2\x82\xac\xf0\x9f\x98\x80!");
        x->scheduler.piece = piece;
        json_t *r = fixture_stream(x, API_CHAT_COMPLETIONS, "{\"stream\":true," USER "}");
        size_t n = json_array_size(r);
        assert_string_equal(text_at(r, "0.object"), "chat.completion.chunk");
        assert_string_equal(text_at(r, "0.choices.0.delta.role"), "assistant");
        check_joined(r, "choices.0.delta.content", "F\xc3\xa9 \xe2\x82\xac\xf0\x9f\x98\x80!");
        check_joined(r, "choices.0.delta.reasoning", "I add.");
        check_joined(r, "choices.0.delta.reasoning_content", "I add.");
        assert_string_equal(json_string_value(json_array_get(r, n - 1)), "[DONE]");
        assert_string_equal(text_at(json_array_get(r, n - 2), "choices.0.finish_reason"), "stop");
        assert_null(at(json_array_get(r, n - 2), "usage"));
        json_decref(r);
    }
}

static void test_stream_usage(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "a</think>b c d");
    x->scheduler.piece = 1;
    json_t *r = fixture_stream(x, API_CHAT_COMPLETIONS,
                               "{\"stream\":true,\"stream_options\":{\"include_usage\":true,"
                               "\"continuous_usage_stats\":true}," USER "}");
    size_t n = json_array_size(r);
    json_t *last = json_array_get(r, n - 2);
    assert_int_equal(json_array_size(at(last, "choices")), 0);
    assert_int_equal(json_integer_value(at(last, "usage.completion_tokens")), x->scheduler.n_tokens);
    int64_t before = 0;
    for (size_t i = 0; i + 1 < n; i++) {
        int64_t now = json_integer_value(at(json_array_get(r, i), "usage.completion_tokens"));
        assert_true(now >= before && now > 0);
        before = now;
    }
    json_decref(r);
}

/* A character that the limit cut in two is shown as one replacement character. */
static void test_cut_character(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>\x01"
                      "ab\xe2\x82");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"max_tokens\":5," USER "}");
    assert_string_equal(text_at(r, "choices.0.message.content"), "ab\xef\xbf\xbd");
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "length");
    json_decref(r);
}

static void test_eaten_budget(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "thinking and thinking");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"max_completion_tokens\":2," USER "}");
    assert_true(json_is_null(at(r, "choices.0.message.content")));
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "length");
    assert_non_null(strstr(text_at(r, "usage.note"), "thinking_token_budget"));
    assert_int_equal(json_integer_value(at(r, "usage.completion_tokens_details.reasoning_tokens")), 2);
    json_decref(r);
}

static void test_thinking_switches(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "plain");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS,
                            "{\"chat_template_kwargs\":{\"enable_thinking\":false}," USER "}");
    assert_string_equal(text_at(r, "choices.0.message.content"), "plain");
    assert_null(at(r, "choices.0.message.reasoning"));
    json_decref(r);
    r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"reasoning_effort\":\"none\"," USER "}");
    assert_string_equal(text_at(r, "choices.0.message.content"), "plain");
    assert_int_equal(x->scheduler.last.constraint_after, -1);
    json_decref(r);
    r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"reasoning_effort\":\"low\"," USER "}");
    assert_int_equal(x->scheduler.last.thinking_budget, 2048);
    assert_true(x->scheduler.last.n_thinking_end >= 2);
    assert_int_equal(x->scheduler.last.constraint_after, tokenizer_find(x->tokenizer, "</think>"));
    json_decref(r);
    r = fixture_ask(x, API_CHAT_COMPLETIONS,
                    "{\"thinking_token_budget\":5,\"include_reasoning\":false," USER "}");
    assert_int_equal(x->scheduler.last.thinking_budget, 5);
    assert_null(at(r, "choices.0.message.reasoning"));
    json_decref(r);
}

static void test_tool_calls(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "t</think>Let me see.\n\n" CALL("i", "12") "\n" CALL("s", "a\"<b"));
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{" TOOLS "," USER "}");
    assert_string_equal(text_at(r, "choices.0.message.content"), "Let me see.");
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "tool_calls");
    assert_int_equal(json_array_size(at(r, "choices.0.message.tool_calls")), 2);
    assert_string_equal(text_at(r, "choices.0.message.tool_calls.0.type"), "function");
    assert_string_equal(text_at(r, "choices.0.message.tool_calls.0.function.name"), "f");
    assert_string_equal(text_at(r, "choices.0.message.tool_calls.0.function.arguments"), "{\"i\":12}");
    assert_string_equal(text_at(r, "choices.0.message.tool_calls.1.function.arguments"),
                        "{\"s\":\"a\\\"<b\"}");
    assert_string_not_equal(text_at(r, "choices.0.message.tool_calls.0.id"),
                            text_at(r, "choices.0.message.tool_calls.1.id"));
    json_decref(r);
    for (x->scheduler.piece = 1; x->scheduler.piece <= 4; x->scheduler.piece++) {
        r = fixture_stream(x, API_CHAT_COMPLETIONS, "{\"stream\":true," TOOLS "," USER "}");
        check_joined(r, "choices.0.delta.content", "Let me see.");
        check_joined(r, "choices.0.delta.tool_calls.0.function.arguments", "{\"i\":12}{\"s\":\"a\\\"<b\"}");
        check_joined(r, "choices.0.delta.tool_calls.0.function.name", "ff");
        json_decref(r);
    }
}

/* What is left of a call that max_tokens cut is shown, not executed. */
static void test_no_tools(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>" CALL("i", "12"));
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{" USER "}");
    assert_string_equal(text_at(r, "choices.0.message.content"), CALL("i", "12"));
    json_decref(r);
    r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"tool_choice\":\"none\"," TOOLS "," USER "}");
    assert_string_equal(text_at(r, "choices.0.message.content"), CALL("i", "12"));
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "stop");
    json_decref(r);
}

static void test_stop_strings(void **state)
{
    struct fixture *x = *state;
    static const struct {
        const char *stop, *content, *reason;
    } cases[] = {
        { "\"stop\":\"three\"", "one two ", "three" },
        { "\"stop\":[\"wo th\",\"four\"]", "one t", "wo th" },
        { "\"stop\":[\"ee f\",\"three\"]", "one two ", "three" },
        { "\"stop\":\"three\",\"include_stop_str_in_output\":true", "one two three", "three" },
        { "\"stop\":[\"five\"]", "one two three four", "(none)" },
        { "\"stop\":\"four!\"", "one two three four", "(none)" },
        { "\"stop\":[\"o\"],\"min_tokens\":14", "one two three f", "o" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int piece = 0; piece < 3; piece++) {
            char body[300];
            fixture_script(x, "</think>\x01"
                              "one two three four");
            x->scheduler.piece = piece;
            snprintf(body, sizeof body, "{%s," USER "}", cases[i].stop);
            json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, body);
            assert_string_equal(text_at(r, "choices.0.message.content"), cases[i].content);
            assert_string_equal(text_at(r, "choices.0.finish_reason"), "stop");
            assert_string_equal(text_at(r, "choices.0.stop_reason"), cases[i].reason);
            json_decref(r);
            snprintf(body, sizeof body, "{\"stream\":true,%s," USER "}", cases[i].stop);
            r = fixture_stream(x, API_CHAT_COMPLETIONS, body);
            check_joined(r, "choices.0.delta.content", cases[i].content);
            json_decref(r);
        }
}

static void test_stop_tokens(void **state)
{
    struct fixture *x = *state;
    struct token_list list = { 0 };
    struct err e;
    char body[300];
    fixture_script(x, "</think>one\x01;two");
    assert_true(tokenizer_encode(x->tokenizer, &list, ";", 1, 0, &e));
    assert_int_equal(list.n, 1);
    snprintf(body, sizeof body, "{\"stop_token_ids\":[%d]," USER "}", list.ids[0]);
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, body);
    assert_string_equal(text_at(r, "choices.0.message.content"), "one");
    assert_int_equal(json_integer_value(at(r, "choices.0.stop_reason")), list.ids[0]);
    json_decref(r);
    snprintf(body, sizeof body,
             "{\"include_stop_str_in_output\":true,\"ignore_eos\":true,\"stop_token_ids\":[%d]," USER "}",
             list.ids[0]);
    r = fixture_ask(x, API_CHAT_COMPLETIONS, body);
    assert_string_equal(text_at(r, "choices.0.message.content"), "one;");
    assert_int_equal(x->scheduler.last.n_stop_tokens, 1);
    json_decref(r);
    free(list.ids);
}

static void test_logprobs(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>\x01"
                      "a\xe2\x82\xac");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS,
                            "{\"logprobs\":true,\"top_logprobs\":2,\"return_token_ids\":true," USER "}");
    json_t *content = at(r, "choices.0.logprobs.content");
    assert_int_equal(json_array_size(content), x->scheduler.n_tokens);
    assert_string_equal(text_at(content, "1.token"), "a");
    assert_string_equal(text_at(content, "2.token"), "bytes:\\xe2");
    assert_int_equal(json_integer_value(at(content, "2.bytes.0")), 0xe2);
    assert_int_equal(json_array_size(at(content, "1.top_logprobs")), 2);
    assert_true(json_is_real(at(content, "1.logprob")));
    assert_int_equal(json_array_size(at(r, "choices.0.token_ids")), x->scheduler.n_tokens);
    assert_int_equal(json_array_size(at(r, "prompt_token_ids")), x->scheduler.last.n_prompt);
    json_decref(r);
    x->scheduler.piece = 1;
    r = fixture_stream(x, API_CHAT_COMPLETIONS,
                       "{\"stream\":true,\"logprobs\":true,\"return_token_ids\":true," USER "}");
    size_t i, scores = 0, ids = 0;
    json_t *e;
    json_array_foreach(r, i, e)
    {
        scores += json_array_size(at(e, "choices.0.logprobs.content"));
        ids += json_array_size(at(e, "choices.0.token_ids"));
    }
    assert_int_equal(scores, x->scheduler.n_tokens);
    assert_int_equal(ids, x->scheduler.n_tokens);
    json_decref(r);
}

/* The tokens asked for, in that order, in place of the best. */
static void test_logprob_token_ids(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>one");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS,
                            "{\"logprob_token_ids\":[50,49],\"return_tokens_as_token_ids\":true," USER "}");
    assert_int_equal(x->scheduler.last.n_score_ids, 2);
    json_t *top = at(r, "choices.0.logprobs.content.0.top_logprobs");
    assert_int_equal(json_array_size(top), 2);
    assert_string_equal(text_at(top, "0.token"), "token_id:50");
    assert_string_equal(text_at(top, "1.token"), "token_id:49");
    assert_true(fabs(json_real_value(at(top, "1.logprob")) + 49 / 9.0 + 0.25) < 1e-6);
    json_decref(r);
    r = fixture_ask(x, API_COMPLETIONS,
                    "{\"logprob_token_ids\":[50,49],\"return_tokens_as_token_ids\":true,\"prompt\":\"a\"}");
    top = at(r, "choices.0.logprobs.top_logprobs.0");
    assert_int_equal(json_object_size(top), 3); /* and the token itself */
    assert_non_null(at(top, "token_id:49"));
    json_decref(r);
}

static void test_repeats(void **state)
{
    struct fixture *x = *state;
    static const char script[] = "</think>\x01"
                                 "xababababab";
    static const struct {
        const char *rule, *content, *finish;
    } cases[] = {
        { "\"max_pattern_size\":4,\"min_count\":3", "xababab", "repetition" },
        { "\"max_pattern_size\":1,\"min_count\":2", "xababababab", "stop" },
        { "\"max_pattern_size\":8,\"min_pattern_size\":3,\"min_count\":2", "xabababab", "repetition" },
        { "\"max_pattern_size\":4,\"min_count\":50", "xababababab", "stop" },
        { "\"max_pattern_size\":0", "xababababab", "stop" },
    };
    fixture_script(x, script);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (x->scheduler.piece = 0; x->scheduler.piece < 3; x->scheduler.piece++) {
            char body[400];
            snprintf(body, sizeof body, "{\"repetition_detection\":{%s}," USER "}", cases[i].rule);
            json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, body);
            assert_string_equal(text_at(r, "choices.0.message.content"), cases[i].content);
            assert_string_equal(text_at(r, "choices.0.finish_reason"), cases[i].finish);
            bool found = strcmp(cases[i].finish, "repetition") == 0;
            assert_string_equal(text_at(r, "choices.0.stop_reason"),
                                found ? "repetition_detected" : "(none)");
            json_decref(r);
        }
    char body[400];
    snprintf(body, sizeof body,
             "{\"min_tokens\":%d,\"repetition_detection\":{\"max_pattern_size\":4,\"min_count\":3}," USER "}",
             x->scheduler.n_tokens - 2);
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, body);
    assert_string_equal(text_at(r, "choices.0.message.content"), "xababababa");
    json_decref(r);
    /* Against a plain search. */
    uint64_t seed = 5;
    int32_t ids[200];
    int found = 0;
    for (int round = 0; round < 3000; round++) {
        struct repeats *p;
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        const struct repeats_rule rule = { 1 + (int)(seed >> 33) % 3, 3 + (int)(seed >> 40) % 5,
                                           2 + (int)(seed >> 50) % 3 };
        assert_true(repeats_create(&p, &rule, NULL));
        for (int n = 0; n < 200; n++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            ids[n] = (int32_t)(seed >> 60) % 4 == 0 && n > 6 ? (int32_t)(seed >> 33) % 3
                     : n > 6                                 ? ids[n - 4]
                                                             : n % 3;
            bool want = false;
            for (int k = rule.size_min; k <= rule.size_max && k * rule.count <= n + 1; k++) {
                bool all = true;
                for (int64_t i = n; all && i > n - k * (rule.count - 1); i--) all = ids[i] == ids[i - k];
                want = want || all;
            }
            assert_int_equal(repeats_push(p, ids[n]), want);
            found += want;
        }
        repeats_free(p);
    }
    assert_true(found > 1000);
}

static void test_prompt_logprobs(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>a");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"prompt_logprobs\":1," USER "}");
    json_t *list = at(r, "prompt_logprobs");
    assert_int_equal(json_array_size(list), x->scheduler.last.n_prompt);
    assert_true(json_is_null(json_array_get(list, 0)));
    char key[20];
    snprintf(key, sizeof key, "%d", x->scheduler.last_prompt[1]);
    json_t *own = json_object_get(json_array_get(list, 1), key);
    assert_int_equal(json_integer_value(json_object_get(own, "rank")), 2);
    assert_int_equal(json_object_size(json_array_get(list, 1)), 2);
    json_decref(r);
}

static void test_several(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>a");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"n\":3,\"seed\":41," USER "}");
    assert_int_equal(json_array_size(at(r, "choices")), 3);
    assert_int_equal(json_integer_value(at(r, "choices.2.index")), 2);
    for (uint64_t i = 0; i < 3; i++) assert_int_equal(x->scheduler.seeds[i], 41 + i);
    assert_int_equal(json_integer_value(at(r, "usage.completion_tokens")), 3 * x->scheduler.n_tokens);
    assert_int_equal(json_integer_value(at(r, "usage.prompt_tokens")), x->scheduler.last.n_prompt);
    json_decref(r);
    r = fixture_stream(x, API_CHAT_COMPLETIONS, "{\"n\":2,\"stream\":true," USER "}");
    size_t i;
    json_t *e;
    int finished[2] = { 0, 0 };
    json_array_foreach(r, i, e) if (json_is_string(at(e, "choices.0.finish_reason")))
        finished[json_integer_value(at(e, "choices.0.index"))]++;
    assert_int_equal(finished[0], 1);
    assert_int_equal(finished[1], 1);
    json_decref(r);
}

static void test_parameters(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>a");
    json_decref(fixture_ask(x, API_CHAT_COMPLETIONS, "{" USER "}"));
    const struct request_options *o = &x->scheduler.last;
    assert_true(o->sampling.temperature == 1.0f && o->sampling.top_k == 20 && o->sampling.top_p == 0.95f);
    assert_int_equal(o->max_tokens, -1);
    assert_int_equal(o->top_logprobs, -1);
    assert_int_equal(o->prompt_logprobs, -1);
    assert_int_equal(o->thinking_budget, -1);
    assert_int_equal(o->owner, 7);
    assert_int_equal(o->salt[1], 2);
    assert_int_equal(o->n_stop_tokens, 2);
    assert_true(o->n_never >= 2);
    uint8_t plain[32];
    memcpy(plain, o->salt, 32);
    json_decref(
        fixture_ask(x, API_CHAT_COMPLETIONS,
                    "{\"temperature\":0,\"top_p\":0.5,\"top_k\":-1,\"min_p\":0.1,\"presence_penalty\":1.5,"
                    "\"frequency_penalty\":-1,\"repetition_penalty\":1.1,\"seed\":-3,\"max_tokens\":9.0,"
                    "\"min_tokens\":2,\"logit_bias\":{\"5\":-100,\"7\":2.5},\"allowed_token_ids\":[1,2],"
                    "\"bad_words\":[\"cat\"],\"priority\":4,\"cache_salt\":\"s\",\"user\":\"u\"," USER "}"));
    assert_true(o->sampling.temperature == 0 && o->sampling.top_k == 0 && o->sampling.min_p == 0.1f);
    assert_true(o->sampling.seed == (uint64_t)-3);
    assert_true(o->presence_penalty == 1.5f && o->frequency_penalty == -1 && o->repetition_penalty == 1.1f);
    assert_int_equal(o->max_tokens, 9);
    assert_int_equal(o->min_tokens, 2);
    assert_int_equal(o->n_bias, 2);
    assert_int_equal(o->n_allowed, 2);
    assert_true(o->n_bad_words >= 1);
    assert_int_equal(o->priority, 4);
    assert_memory_not_equal(plain, o->salt, 32);
}

/* Defaults: generation_config.json, overridden by the server's options. */
static void test_request_id(void **state)
{
    struct fixture *x = *state;
    static const struct wrong wrongs[] = {
        { "{\"request_id\":\"a b\"," USER "}", 400, "request_id", "letters" },
        { "{\"request_id\":\"\"," USER "}", 400, "request_id", "1 to 79" },
        { "{\"request_id\":7," USER "}", 400, "request_id", "a string" },
        { "{\"session_id\":\"a\\r\\nb: c\"," USER "}", 400, "session_id", "letters" }
    };
    fixture_script(x, "</think>a");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"request_id\":\"my.id-1\"," USER "}");
    assert_string_equal(text_at(r, "id"), "chatcmpl-my.id-1");
    json_decref(r);
    check_wrong(x, API_CHAT_COMPLETIONS, wrongs, 4);
    r = fixture_ask(x, API_SERVER_INFO, "");
    assert_int_equal(json_integer_value(at(r, "max_model_len")), 2048);
    assert_int_equal(json_integer_value(at(r, "max_images")), 16);
    assert_true(at(r, "default_sampling_params.temperature") && json_is_false(at(r, "images_by_url")));
    json_decref(r);
}

static void test_defaults(void **state)
{
    struct fixture *x = *state;
    json_t *generation = fixture_parse("{\"temperature\":0.25,\"max_new_tokens\":7}");
    json_t *kwargs = fixture_parse("{\"enable_thinking\":false}");
    x->options.generation = generation;
    x->options.chat_kwargs = kwargs;
    fixture_api(x);
    fixture_script(x, "a");
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{" USER "}");
    assert_true(x->scheduler.last.sampling.temperature == 0.25f && x->scheduler.last.sampling.top_k == 20);
    assert_int_equal(x->scheduler.last.max_tokens, 7);
    assert_string_equal(text_at(r, "choices.0.message.content"), "a");
    json_decref(r);
    r = fixture_ask(x, API_CHAT_COMPLETIONS,
                    "{\"chat_template_kwargs\":{\"enable_thinking\":true}," USER "}");
    assert_string_equal(text_at(r, "choices.0.message.reasoning"), "a");
    json_decref(r);
    x->options.generation = x->options.chat_kwargs = NULL;
    fixture_api(x);
    json_decref(generation);
    json_decref(kwargs);
}

static void test_messages(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>a");
    json_decref(fixture_ask(x, API_CHAT_COMPLETIONS,
                            "{\"messages\":[{\"role\":\"system\",\"content\":\"A\"},{\"role\":\"developer\","
                            "\"content\":[{\"type\":"
                            "\"text\",\"text\":\"B\"}]},{\"role\":\"user\",\"content\":\"q\"},{\"role\":"
                            "\"assistant\",\"content\":null,"
                            "\"reasoning\":\"why\",\"tool_calls\":[{\"id\":\"c\",\"type\":\"function\","
                            "\"function\":{\"name\":\"f\","
                            "\"arguments\":\"{\\\"a\\\": [1, 2.5], \\\"b\\\": "
                            "\\\"x\\\"}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"c\","
                            "\"content\":\"4\"}]}"));
    fixture_prompt(
        x, "<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
           "<think>\nwhy\n</think>\n\n<tool_call>\n<function=f>\n<parameter=a>\n[1, 2.5]\n</parameter>\n"
           "<parameter=b>\nx\n</parameter>\n</function>\n</tool_call><|im_end|>\n<|im_start|>user\n"
           "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n");
    json_t *r = fixture_ask(
        x, API_CHAT_COMPLETIONS,
        "{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"content\":"
        "\"The answer is \"}],\"continue_final_message\":true}");
    fixture_prompt(
        x, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nThe answer is");
    assert_null(at(r, "choices.0.message.reasoning"));
    json_decref(r);
}

/* Where the template has a place for them. */
static void test_documents(void **state)
{
    struct fixture *x = *state;
    static const struct wrong refused[] = { { "{\"documents\":[{\"text\":\"t\"}]," USER "}", 400, "documents",
                                              "template takes none" } };
    static const struct wrong wrongs[] = {
        { "{\"documents\":[1]," USER "}", 400, "documents[0]", "an object" },
        { "{\"documents\":{}," USER "}", 400, "documents", "an array" },
    };
    static const char text[] =
        "{% for d in documents %}[{{ d.title }}: {{ d.text }}]{% endfor %}{{ messages[0].content }}";
    struct err e = { 0 };
    char path[] = "/tmp/quench-template-XXXXXX";
    int fd = mkstemp(path);
    struct chat_template *own;
    check_wrong(x, API_CHAT_COMPLETIONS, refused, 1);
    assert_true(fd >= 0 && write(fd, text, sizeof text - 1) == (ssize_t)sizeof text - 1 && close(fd) == 0);
    if (!chat_template_load_file(&own, "models/demo", path, &e)) fail_msg("%s", e.text);
    unlink(path);
    x->options.chat_template = own;
    fixture_api(x);
    fixture_script(x, "a");
    json_decref(fixture_ask(
        x, API_CHAT_COMPLETIONS,
        "{\"documents\":[{\"title\":\"A\",\"text\":\"b\"},{\"title\":\"C\",\"text\":\"d\"}]," USER "}"));
    fixture_prompt(x, "[A: b][C: d]hi");
    check_wrong(x, API_CHAT_COMPLETIONS, wrongs, 2);
    chat_template_free(own);
}

static void test_images(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>a");
    json_t *r =
        fixture_ask(x, API_CHAT_COMPLETIONS,
                    "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":"
                    "{\"url\":\"data:image/"
                    "png;base64,AAAA\",\"detail\":\"low\"}},{\"type\":\"text\",\"text\":\"what?\"}]}]}");
    assert_int_equal(x->scheduler.last.n_pictures, 1);
    assert_string_equal(x->scheduler.last_picture, "data:image/png;base64,AAAA");
    fixture_prompt(x, "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?<|im_end|>\n"
                      "<|im_start|>assistant\n<think>\n");
    assert_int_equal(json_integer_value(at(r, "usage.prompt_tokens_details.image_tokens")), 4);
    json_decref(r);
}

#define CLIP(url) "{\"type\":\"video_url\",\"video_url\":{\"url\":\"" url "\"}}"
#define JPEGS(f)  "data:video/jpeg;base64," f
#define PLACE     "<|vision_start|><|video_pad|><|vision_end|>"
#define CHATTED   "<|im_end|>\n<|im_start|>assistant\n<think>\n"

/* What is asked of the model for videos: two of them and an image between, each with its frames' times. */
static void test_videos(void **state)
{
    struct fixture *x = *state;
    static const char image[] = "{\"type\":\"image_url\",\"image_url\":\"data:image/png;base64,AA\"}";
    static const struct {
        const char *fields, *content, *prompt;
        int n_pictures;
    } cases[] = {
        { "", CLIP(JPEGS("AA,BB")), "<0.5 seconds>" PLACE, 1 },
        { "", CLIP(JPEGS("AA,BB,CC")), "<0.5 seconds>" PLACE "<2.0 seconds>" PLACE, 1 },
        { "", "{\"video_url\":\"" JPEGS("AA,BB") "\"}", "<0.5 seconds>" PLACE, 1 },
        { "\"media_io_kwargs\":{\"video\":{\"fps\":2,\"num_frames\":-1,\"do_sample_frames\":false}},",
          CLIP(JPEGS("AA,BB,CC,DD")), "<0.2 seconds>" PLACE "<1.2 seconds>" PLACE, 1 },
        { "\"media_io_kwargs\":{\"video\":{\"fps\":24,\"frames_indices\":[0,12,240],\"duration\":60}},",
          CLIP(JPEGS("AA,BB,CC")), "<0.2 seconds>" PLACE "<10.0 seconds>" PLACE, 1 },
        { "", NULL,
          "<0.5 seconds>" PLACE "<|vision_start|><|image_pad|><|vision_end|><0.5 seconds>" PLACE
          "<2.5 seconds>" PLACE,
          3 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char body[1024], content[512], want[512];
        snprintf(content, sizeof content, "%s,%s,%s", CLIP(JPEGS("AA,BB")), image, CLIP(JPEGS("A,B,C,D")));
        snprintf(body, sizeof body,
                 "{%s\"messages\":[{\"role\":\"user\",\"content\":[%s,{\"type\":\"text\",\"text\":\"so?\"}"
                 "]}]}",
                 cases[i].fields, cases[i].content ? cases[i].content : content);
        snprintf(want, sizeof want, "<|im_start|>user\n%sso?" CHATTED, cases[i].prompt);
        fixture_script(x, "</think>a");
        json_decref(fixture_ask(x, API_CHAT_COMPLETIONS, body));
        if (x->status != 200) fail_msg("%s: %d", body, x->status);
        assert_int_equal(x->scheduler.last.n_pictures, cases[i].n_pictures);
        assert_memory_equal(x->scheduler.last_picture, "data:video/jpeg;base64,A", 24);
        fixture_prompt(x, want);
        json_t *r = fixture_ask(x, API_CHAT_RENDER, body);
        assert_int_equal(json_integer_value(at(r, "videos")), (cases[i].n_pictures + 1) / 2);
        assert_int_equal(json_integer_value(at(r, "images")), cases[i].n_pictures / 2);
        json_decref(r);
    }
}

static void test_video_errors(void **state)
{
    struct fixture *x = *state;
#define WITH(fields, url) "{" fields "\"messages\":[{\"role\":\"user\",\"content\":[" CLIP(url) "]}]}"
#define URL               "messages[0].content[0].video_url.url"
#define TIMES(fields)     WITH("\"media_io_kwargs\":{\"video\":{" fields "}},", JPEGS("AA,BB"))
#define IS_VIDEO          "media_io_kwargs.video"
    static const struct wrong cases[] = {
        { WITH("", "data:video/mp4;base64,AAAA"), 400, URL,
          "taken as its frames and in no other form: expected data:video/jpeg;base64,FRAME,FRAME,..." },
        { WITH("", "https://a/b.mp4"), 400, URL, "in no other form" },
        { WITH("", "file:///etc/passwd"), 400, URL, "in no other form" },
        { WITH("", "data:image/jpeg;base64,AA,BB"), 400, URL, "in no other form" },
        { WITH("", JPEGS("AA")), 400, URL, "2 to 768 frames, found 1" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"video_url\",\"video_url\":3}]}]}", 400,
          URL, "expected a data: URL" },
        { "{\"messages\":[{\"role\":\"system\",\"content\":[" CLIP(JPEGS("AA,BB")) "]},{\"role\":\"user\","
                                                                                   "\"content\":\"\"}]}",
          400, "messages", "System message cannot contain videos" },
        { TIMES("\"fps\":0"), 400, IS_VIDEO ".fps", "expected 0.001 to" },
        { TIMES("\"fps\":\"2\""), 400, IS_VIDEO ".fps", "a number" },
        { TIMES("\"frames_indices\":[1,2,3]"), 400, IS_VIDEO, "3 of them, the video has 2 frames" },
        { TIMES("\"frames_indices\":[2,1]"), 400, IS_VIDEO, "integers from 0 on that ascend" },
        { TIMES("\"frames_indices\":[-1,1]"), 400, IS_VIDEO, "integers from 0 on that ascend" },
        { TIMES("\"frames_indices\":[0,1.5]"), 400, IS_VIDEO, "integers from 0 on that ascend" },
        { TIMES("\"do_sample_frames\":true"), 400, IS_VIDEO, "send those wanted" },
        { TIMES("\"num_frames\":1"), 400, IS_VIDEO, "the video has 2; send those wanted" },
        { WITH("\"media_io_kwargs\":{\"image\":{\"a\":1}},", JPEGS("AA,BB")), 400, "media_io_kwargs.image",
          "as the checkpoint says" },
        { WITH("\"media_io_kwargs\":3,", JPEGS("AA,BB")), 400, "media_io_kwargs", "an object" },
        { WITH("\"prompt_logprobs\":1,", JPEGS("AA,BB")), 400, "prompt_logprobs", "not with images" },
    };
    check_wrong(x, API_CHAT_COMPLETIONS, cases, sizeof cases / sizeof *cases);
    static const struct wrong completion = { "{\"prompt\":\"a\",\"media_io_kwargs\":{\"video\":{\"fps\":2}}}",
                                             400, "media_io_kwargs", "no videos" };
    check_wrong(x, API_COMPLETIONS, &completion, 1);
}

/* As many as the server allows, of each kind by itself. */
static void test_video_limits(void **state)
{
    struct fixture *x = *state;
    static const char two[] = "{\"messages\":[{\"role\":\"user\",\"content\":[" CLIP(JPEGS("AA,BB")) "," CLIP(
        JPEGS("AA,BB")) ",{\"type\":\"image_url\",\"image_url\":\"data:image/png;base64,AA\"}]}]}";
    static const struct {
        int images, videos;
        const char *says; /* NULL: it is taken */
    } cases[] = { { 0, 0, NULL },
                  { 1, 2, NULL },
                  { 0, 1, "more than 1 videos" },
                  { 0, -1, "more than 0 videos" },
                  { -1, 2, "more than 0 images" } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        x->options.max_images = cases[i].images;
        x->options.max_videos = cases[i].videos;
        fixture_api(x);
        fixture_script(x, "</think>a");
        json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, two);
        assert_int_equal(x->status, cases[i].says ? 400 : 200);
        if (cases[i].says) assert_non_null(strstr(text_at(r, "error.message"), cases[i].says));
        json_decref(r);
    }
    x->config.video_token = -1;
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, two);
    assert_int_equal(x->status, 400);
    assert_non_null(strstr(text_at(r, "error.message"), "the served model takes no videos"));
    json_decref(r);
}

static void test_errors(void **state)
{
    struct fixture *x = *state;
    static const struct wrong cases[] = {
        { "", 400, "(none)", "empty" },
        { "[]", 400, "(none)", "not a JSON object" },
        { "{\"a\":1,\"a\":2}", 400, "(none)", "duplicate" },
        { "{\"model\":\"gpt\"," USER "}", 404, "model", "'gpt' does not exist" },
        { "{\"model\":1," USER "}", 400, "model", "string" },
        { "{}", 400, "messages", "expected an array, found nothing" },
        { "{\"messages\":[]}", 400, "messages", "at least one" },
        { "{\"messages\":[3]}", 400, "messages[0]", "expected an object" },
        { "{\"messages\":[{\"role\":\"bot\",\"content\":\"\"}]}", 400, "messages[0].role", "\"bot\"" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":{}}]}", 400, "messages[0].content",
          "found an object" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"video_url\"}]}]}", 400,
          "messages[0].content[0].video_url.url", "found nothing" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{\"url\":"
          "\"/etc/passwd\"}}]}]}",
          400, "messages[0].content[0].image_url.url", "data: URL" },
        { "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":\"http://a/"
          "b.png\"}]}]}",
          400, "messages[0].content[0].image_url", "--allowed-media-domains" },
        { "{\"messages\":[{\"role\":\"assistant\",\"content\":\"\",\"tool_calls\":[{\"function\":{\"name\":"
          "\"f\","
          "\"arguments\":\"{\"}}]}]}",
          400, "messages[0].tool_calls[0].function.arguments", "JSON" },
        { "{\"messages\":[{\"role\":\"assistant\",\"content\":\"a\"}]}", 400, "messages", "No user query" },
        { "{\"max_tokens\":0," USER "}", 400, "max_tokens", "expected 1 to" },
        { "{\"max_tokens\":\"5\"," USER "}", 400, "max_tokens", "found a string" },
        { "{\"max_tokens\":1.5," USER "}", 400, "max_tokens", "an integer" },
        { "{\"max_tokens\":2048," USER "}", 400, "max_tokens", "the context holds 2048 tokens" },
        { "{\"temperature\":-1," USER "}", 400, "temperature", "0 to 100" },
        { "{\"temperature\":true," USER "}", 400, "temperature", "a number" },
        { "{\"top_p\":1.5," USER "}", 400, "top_p", "0 to 1" },
        { "{\"n\":17," USER "}", 400, "n", "1 to 16" },
        { "{\"best_of\":2," USER "}", 400, "best_of", "ask for n" },
        { "{\"use_beam_search\":true," USER "}", 400, "use_beam_search", "not supported" },
        { "{\"stop\":[1]," USER "}", 400, "stop[0]", "a string" },
        { "{\"stop\":[\"\"]," USER "}", 400, "stop[0]", "1 to" },
        { "{\"stop_token_ids\":[5000]," USER "}", 400, "stop_token_ids[0]", "token id 5000" },
        { "{\"logit_bias\":{\"x\":1}," USER "}", 400, "logit_bias", "token ids" },
        { "{\"logit_bias\":{\"1\":101}," USER "}", 400, "logit_bias.1", "-100 to 100" },
        { "{\"allowed_token_ids\":[]," USER "}", 400, "allowed_token_ids", "no token" },
        { "{\"top_logprobs\":2," USER "}", 400, "top_logprobs", "needs" },
        { "{\"logprobs\":true,\"top_logprobs\":21," USER "}", 400, "top_logprobs", "0 to 20" },
        { "{\"prompt_logprobs\":1,\"stream\":true," USER "}", 400, "prompt_logprobs", "without" },
        { "{\"logprob_token_ids\":[99999]," USER "}", 400, "logprob_token_ids[0]", "token id 99999" },
        { "{\"logprob_token_ids\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21]," USER "}", 400,
          "logprob_token_ids", "at most 20 ids, found 21" },
        { "{\"repetition_detection\":{\"max_pattern_size\":3}," USER "}", 400,
          "repetition_detection.min_count", "found nothing" },
        { "{\"repetition_detection\":{\"max_pattern_size\":3,\"min_count\":1}," USER "}", 400,
          "repetition_detection.min_count", "expected 2 to" },
        { "{\"repetition_detection\":{\"max_pattern_size\":3,\"min_pattern_size\":4,\"min_count\":2}," USER
          "}",
          400, "repetition_detection.min_pattern_size", "0 to 3" },
        { "{\"repetition_detection\":{\"max_pattern_size\":1025,\"min_count\":2}," USER "}", 400,
          "repetition_detection.max_pattern_size", "0 to 1024" },
        { "{\"stream_options\":{}," USER "}", 400, "stream_options", "\"stream\": true" },
        { "{\"min_tokens\":5,\"max_tokens\":4," USER "}", 400, "min_tokens", "max_tokens (4)" },
        { "{\"reasoning_effort\":\"much\"," USER "}", 400, "reasoning_effort", "\"much\"" },
        { "{\"chat_template_kwargs\":{\"x\":1}," USER "}", 400, "chat_template_kwargs", "enable_thinking" },
        { "{\"chat_template\":\"x\"," USER "}", 400, "chat_template", "--chat-template" },
        { "{\"continue_final_message\":true,\"add_generation_prompt\":true," USER "}", 400,
          "continue_final_message", "false" },
        { "{\"tools\":[{\"type\":\"web_search\"}]," USER "}", 400, "tools[0].type", "web_search" },
        { "{\"tools\":[{\"type\":\"function\",\"function\":{}}]," USER "}", 400, "tools[0].function.name",
          "a name" },
        { "{\"cache_salt\":\"\"," USER "}", 400, "cache_salt", "1 to 1024" },
        { "{\"response_format\":{\"type\":\"xml\"}," USER "}", 400, "response_format.type", "xml" },
        { "{\"response_format\":{\"type\":\"json_object\"},\"guided_regex\":\"a\"," USER "}", 400,
          "guided_regex", "twice" },
        { "{\"truncate_prompt_tokens\":0," USER "}", 400, "messages", "no tokens" },
    };
    check_wrong(x, API_CHAT_COMPLETIONS, cases, sizeof cases / sizeof *cases);
}

static void test_strict(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>a");
    json_decref(fixture_ask(x, API_CHAT_COMPLETIONS, "{\"temprature\":1," USER "}"));
    assert_int_equal(x->status, 200);
    x->options.strict_params = true;
    fixture_api(x);
    static const struct wrong cases[] = { { "{\"temprature\":1," USER "}", 400, "temprature",
                                            "no such field" } };
    check_wrong(x, API_CHAT_COMPLETIONS, cases, 1);
    json_decref(fixture_ask(x, API_CHAT_COMPLETIONS, "{\"temperature\":1," USER "}"));
    assert_int_equal(x->status, 200);
}

static void test_busy(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>a");
    x->scheduler.room = 0;
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"stream\":true," USER "}");
    assert_int_equal(x->status, 503);
    assert_false(x->is_stream);
    assert_true(x->retry_after > 0);
    json_decref(r);
    x->scheduler.room = -1;
    x->scheduler.context = 3;
    r = fixture_ask(x, API_CHAT_COMPLETIONS, "{" USER "}");
    assert_int_equal(x->status, 400);
    assert_string_equal(text_at(r, "error.code"), "context_length_exceeded");
    json_decref(r);
}

/* What fails before the first byte is a status; after it, an event. */
static void test_failure(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "</think>one two three");
    x->scheduler.fail_at = 3;
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, "{\"n\":2," USER "}");
    assert_int_equal(x->status, 500);
    assert_string_equal(text_at(r, "error.message"), "the device was lost");
    json_decref(r);
    x->scheduler.piece = 1;
    r = fixture_stream(x, API_CHAT_COMPLETIONS, "{\"stream\":true," USER "}");
    size_t n = json_array_size(r);
    assert_string_equal(text_at(json_array_get(r, n - 2), "error.type"), "server_error");
    json_decref(r);
}

/* Once it is known to be a stream, an error is an event, though no byte was sent yet. */
static void test_failure_of_silent_stream(void **state)
{
    struct fixture *x = *state;
    static const char body[] = "{\"stream\":true,\"stream_interval\":100," USER "}";
    const struct api_caller caller = { .request_id = "r" };
    bool done;
    size_t n;
    fixture_script(x, "one two three");
    x->scheduler.piece = -1; /* nothing yet */
    x->scheduler.fail_at = 0;
    struct exchange *e = exchange_create(x->api, API_CHAT_COMPLETIONS, NULL, body, sizeof body - 1, &caller);
    exchange_pump(e, &n, &done);
    assert_int_equal(n, 0);
    assert_int_equal(exchange_status(e), 200);
    assert_true(exchange_is_stream(e));
    x->scheduler.piece = 0;
    const char *text = exchange_pump(e, &n, &done);
    assert_true(done);
    assert_int_equal(exchange_status(e), 200);
    assert_true(exchange_is_stream(e));
    assert_int_equal(strncmp(text, "data: {\"error\":", 15), 0);
    exchange_free(e);
}

static void test_leaving(void **state)
{
    struct fixture *x = *state;
    const struct api_caller caller = { .request_id = "r" };
    size_t n;
    bool done;
    fixture_script(x, "</think>one two three");
    x->scheduler.piece = 1;
    for (int pumps = 0; pumps < 4; pumps++) {
        static const char body[] = "{\"stream\":true,\"n\":3," USER "}";
        struct exchange *e =
            exchange_create(x->api, API_CHAT_COMPLETIONS, NULL, body, sizeof body - 1, &caller);
        const char *comment = exchange_comment(e, &n);
        assert_int_equal(strncmp(comment, ": prompt ", 9), 0);
        assert_int_equal(strncmp(comment + n - 2, "\n\n", 2), 0);
        /* The others find the first one's prompt in the cache. */
        assert_int_equal(x->scheduler.open, 1);
        for (int i = 0; i < pumps; i++) exchange_pump(e, &n, &done);
        assert_int_equal(x->scheduler.open, pumps ? 3 : 1);
        exchange_free(e);
        assert_int_equal(x->scheduler.open, 0);
    }
}

/* The scripted tokens are let through as far as the grammar goes. */
static void test_forms(void **state)
{
    struct fixture *x = *state;
    static const struct {
        const char *format, *script, *content;
    } cases[] = {
        { "\"response_format\":{\"type\":\"json_object\"}", "{\"a\": 1} and more", "{\"a\": 1}" },
        { "\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"n\",\"schema\":{"
          "\"type\":"
          "\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}},\"required\":[\"a\"],"
          "\"additionalProperties\":"
          "false}}}",
          "{\"a\": 12}x", "{\"a\": 12}" },
        { "\"structured_outputs\":{\"choice\":[\"yes\",\"no\"]}", "no way", "no" },
        { "\"guided_choice\":[\"yes\",\"no\"]", "yes sir", "yes" },
        { "\"guided_regex\":\"[a-c]+;\"",
          "\x01"
          "abc;a",
          "abc;" },
        { "\"guided_grammar\":\"root ::= \\\"x\\\" [0-9] \\\".\\\"\"",
          "\x01"
          "x7.8",
          "x7." },
        { "\"response_format\":{\"type\":\"structural_tag\",\"triggers\":[\"<a>\"],\"structures\":[{"
          "\"begin\":\"<a>\","
          "\"schema\":{\"type\":\"boolean\"},\"end\":\"</a>\"}]}",
          "so <a>true</a> it is", "so <a>true</a> it is" },
        { "\"structured_outputs\":{\"structural_tag\":\"{\\\"triggers\\\":[\\\"<a>\\\"],\\\"structures\\\":[{"
          "\\\"begin"
          "\\\":\\\"<a>\\\",\\\"schema\\\":true,\\\"end\\\":\\\"\\\"}]}\"}",
          "a <a>[1]", "a <a>[1]" },
        { "\"guided_json\":\"{\\\"type\\\": \\\"boolean\\\"}\"", "true or", "true" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char body[600];
        fixture_script(x, cases[i].script);
        snprintf(body, sizeof body, "{\"reasoning_effort\":\"none\",%s," USER "}", cases[i].format);
        json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS, body);
        assert_string_equal(text_at(r, "choices.0.message.content"), cases[i].content);
        assert_string_equal(text_at(r, "choices.0.finish_reason"), "stop");
        json_decref(r);
    }
    /* Behind the reasoning, and newlines that belong to neither. */
    static const char *const gaps[] = { "", "\n", "\n\n" };
    for (int i = 0; i < 3; i++) {
        char script[80];
        snprintf(script, sizeof script, "{\"why\n</think>%s{\"a\": 1} and more", gaps[i]);
        fixture_script(x, script);
        json_t *r =
            fixture_ask(x, API_CHAT_COMPLETIONS, "{\"response_format\":{\"type\":\"json_object\"}," USER "}");
        assert_string_equal(text_at(r, "choices.0.message.content"), "{\"a\": 1}");
        json_decref(r);
    }
    static const struct wrong wrongs[] = {
        { "{\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":{\"type\":\"object\","
          "\"unevaluatedProperties\":false}}}," USER "}",
          400, "response_format.json_schema.schema", "unevaluatedProperties" },
        { "{\"guided_regex\":\"(\"," USER "}", 400, "guided_regex", "guided_regex" },
        { "{\"guided_regex\":7," USER "}", 400, "guided_regex", "a string" },
        { "{\"guided_choice\":[]," USER "}", 400, "guided_choice", "array" },
    };
    check_wrong(x, API_CHAT_COMPLETIONS, wrongs, sizeof wrongs / sizeof *wrongs);
}

#define CHOOSE "\"reasoning_effort\":\"none\",\"tool_choice\":"

static void test_tool_choice(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, CALL("i", "12") " and");
    x->scheduler.n_tokens--; /* no end of turn */
    json_t *r = fixture_ask(x, API_CHAT_COMPLETIONS,
                            "{" CHOOSE "\"required\",\"parallel_tool_calls\":false," TOOLS "," USER "}");
    assert_int_equal(json_array_size(at(r, "choices.0.message.tool_calls")), 1);
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "tool_calls");
    assert_true(json_is_null(at(r, "choices.0.message.content")));
    assert_non_null(x->scheduler.last.constraint);
    json_decref(r);
    r = fixture_ask(x, API_CHAT_COMPLETIONS,
                    "{" CHOOSE "{\"type\":\"function\",\"function\":{\"name\":\"f\"}}," TOOLS "," USER "}");
    assert_int_equal(json_array_size(at(r, "choices.0.message.tool_calls")), 1);
    json_decref(r);
    r = fixture_ask(x, API_CHAT_COMPLETIONS, "{" CHOOSE "\"auto\"," TOOLS "," USER "}");
    assert_null(x->scheduler.last.constraint);
    json_decref(r);
    /* A form, or a call instead. */
    static const char *const scripts[] = { CALL("i", "12"), "{\"a\": 1}" };
    for (int i = 0; i < 2; i++) {
        fixture_script(x, scripts[i]);
        r = fixture_ask(x, API_CHAT_COMPLETIONS,
                        "{" CHOOSE "\"auto\",\"response_format\":{\"type\":\"json_object\"}," TOOLS "," USER
                        "}");
        assert_string_equal(text_at(r, "choices.0.finish_reason"), i ? "stop" : "tool_calls");
        assert_string_equal(text_at(r, "choices.0.message.content"), i ? "{\"a\": 1}" : "(none)");
        json_decref(r);
    }
    /* Without a grammar the second call is not waited for. */
    fixture_script(x, CALL("i", "1") CALL("i", "2"));
    r = fixture_ask(x, API_CHAT_COMPLETIONS,
                    "{" CHOOSE "\"auto\",\"parallel_tool_calls\":false," TOOLS "," USER "}");
    assert_int_equal(json_array_size(at(r, "choices.0.message.tool_calls")), 1);
    json_decref(r);
    static const struct wrong wrongs[] = {
        { "{\"tool_choice\":\"required\"," USER "}", 400, "tool_choice", "no tools" },
        { "{\"tool_choice\":\"maybe\"," TOOLS "," USER "}", 400, "tool_choice", "\"maybe\"" },
        { "{\"tool_choice\":{\"function\":{\"name\":\"g\"}}," TOOLS "," USER "}", 400,
          "tool_choice.function.name", "no tool \"g\"" },
        { "{\"tool_choice\":\"required\",\"response_format\":{\"type\":\"json_object\"}," TOOLS "," USER "}",
          400, "tool_choice", "another form" },
    };
    check_wrong(x, API_CHAT_COMPLETIONS, wrongs, sizeof wrongs / sizeof *wrongs);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_whole),
        TEST(test_stream),
        TEST(test_stream_usage),
        TEST(test_cut_character),
        TEST(test_eaten_budget),
        TEST(test_thinking_switches),
        TEST(test_tool_calls),
        TEST(test_no_tools),
        TEST(test_stop_strings),
        TEST(test_stop_tokens),
        TEST(test_logprobs),
        TEST(test_logprob_token_ids),
        TEST(test_repeats),
        TEST(test_prompt_logprobs),
        TEST(test_several),
        TEST(test_parameters),
        TEST(test_request_id),
        TEST(test_defaults),
        TEST(test_messages),
        TEST(test_documents),
        TEST(test_images),
        TEST(test_errors),
        TEST(test_videos),
        TEST(test_video_errors),
        TEST(test_video_limits),
        TEST(test_strict),
        TEST(test_busy),
        TEST(test_forms),
        TEST(test_tool_choice),
        TEST(test_failure),
        TEST(test_failure_of_silent_stream),
        TEST(test_leaving),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
