/* Completions, tokens and models over scripted tokens. */
#include "server/api_fixture.h"

static void test_prompt_shapes(void **state)
{
    struct fixture *x = *state;
    static const struct {
        const char *prompt;
        int n;
    } cases[] = { { "\"the cat\"", 1 },
                  { "[\"the cat\",\"a\",\"b\"]", 3 },
                  { "[10,11,12]", 1 },
                  { "[[10,11,12],[13]]", 2 },
                  { "[\"the cat\",[13]]", 2 } };
    fixture_script(x, " sat");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char body[200];
        snprintf(body, sizeof body, "{\"prompt\":%s}", cases[i].prompt);
        json_t *r = fixture_ask(x, API_COMPLETIONS, body);
        assert_int_equal(x->status, 200);
        assert_int_equal(json_array_size(at(r, "choices")), cases[i].n);
        for (int k = 0; k < cases[i].n; k++)
            assert_int_equal(
                json_integer_value(json_object_get(json_array_get(at(r, "choices"), (size_t)k), "index")), k);
        assert_string_equal(text_at(r, "choices.0.text"), " sat");
        assert_string_equal(text_at(r, "object"), "text_completion");
        assert_int_equal(x->scheduler.last.max_tokens, 16);
        json_decref(r);
    }
}

/* The text is what came, reasoning and calls included. */
static void test_plain(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "<think>a</think><tool_call>b");
    json_t *r = fixture_ask(x, API_COMPLETIONS, "{\"prompt\":\"a\"}");
    assert_string_equal(text_at(r, "choices.0.text"), "<think>a</think><tool_call>b");
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "stop");
    json_decref(r);
    r = fixture_ask(x, API_COMPLETIONS,
                    "{\"prompt\":\"a\",\"skip_special_tokens\":false,\"ignore_eos\":true}");
    assert_string_equal(text_at(r, "choices.0.text"), "<think>a</think><tool_call>b<|im_end|>");
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "length");
    json_decref(r);
}

/* What lm-eval's local-completions sends and reads. */
static void test_lm_eval(void **state)
{
    struct fixture *x = *state;
    static const int lengths[] = { 5, 1 };
    for (int stops = 0; stops < 2; stops++) {
        fixture_script(x, stops ? "" : "cat");
        json_t *r =
            fixture_ask(x, API_COMPLETIONS,
                        "{\"model\":\"demo\",\"prompt\":[[1,2,3,4,5],[9]],\"temperature\":0,\"max_tokens\":1,"
                        "\"logprobs\":1,\"seed\":1234,\"echo\":true}");
        for (size_t i = 0; i < 2; i++) {
            json_t *l = json_object_get(json_array_get(at(r, "choices"), i), "logprobs");
            json_t *scores = at(l, "token_logprobs"), *maps = at(l, "top_logprobs"),
                   *tokens = at(l, "tokens");
            size_t n = (size_t)lengths[i] + 1;
            assert_int_equal(json_array_size(scores), n);
            assert_int_equal(json_array_size(maps), n);
            assert_int_equal(json_array_size(tokens), n);
            assert_int_equal(json_array_size(at(l, "text_offset")), n);
            assert_true(json_is_null(json_array_get(scores, 0)));
            assert_true(json_is_null(json_array_get(maps, 0)));
            for (size_t k = 1; k < n; k++) {
                json_t *map = json_array_get(maps, k), *own = json_array_get(scores, k);
                assert_int_equal(json_object_size(map), 2);
                const char *name = json_string_value(json_array_get(tokens, k));
                assert_true(json_equal(json_object_get(map, name), own));
            }
        }
        json_decref(r);
    }
}

/* Equal numbers are equal texts, and the text gives the float back. */
static void test_digits(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "c");
    char *text = fixture_ask_at(x, API_COMPLETIONS, NULL,
                                "{\"prompt\":[96,2],\"echo\":true,\"logprobs\":0,\"max_tokens\":0}");
    struct request_event e;
    fake_score(&e, 2, 0);
    const char *number = strstr(text, "\"token_logprobs\":[null,");
    assert_non_null(number);
    assert_true(strtof(number + 23, NULL) == e.token.logprob);
    free(text);
}

static void test_echo(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, " sat");
    json_t *r = fixture_ask(x, API_COMPLETIONS, "{\"prompt\":\"the cat\",\"echo\":true}");
    assert_string_equal(text_at(r, "choices.0.text"), "the cat sat");
    assert_int_equal(x->scheduler.last.prompt_logprobs, -1);
    json_decref(r);
    r = fixture_ask(x, API_COMPLETIONS,
                    "{\"prompt\":\"the cat\",\"echo\":true,\"logprobs\":2,\"max_tokens\":0}");
    assert_string_equal(text_at(r, "choices.0.text"), "the cat");
    assert_string_equal(text_at(r, "choices.0.finish_reason"), "length");
    assert_int_equal(json_array_size(at(r, "choices.0.logprobs.tokens")), x->scheduler.last.n_prompt);
    assert_int_equal(json_object_size(at(r, "choices.0.logprobs.top_logprobs.1")), 3);
    assert_int_equal(json_integer_value(at(r, "usage.completion_tokens")), 0);
    json_decref(r);
    x->scheduler.piece = 1;
    r = fixture_stream(x, API_COMPLETIONS,
                       "{\"prompt\":[\"the cat\",\"x\"],\"stream\":true,\"echo\":true,\"logprobs\":0}");
    size_t i, tokens = 0;
    json_t *e;
    char all[100] = "";
    json_array_foreach(r, i, e)
    {
        if (json_integer_value(at(e, "choices.0.index")) != 0 || !at(e, "choices.0.text")) continue;
        strcat(all, text_at(e, "choices.0.text"));
        tokens += json_array_size(at(e, "choices.0.logprobs.tokens"));
    }
    assert_string_equal(all, "the cat sat");
    struct token_list list = { 0 };
    struct err err;
    assert_true(tokenizer_encode(x->tokenizer, &list, "the cat", 7, 0, &err));
    assert_int_equal(tokens, list.n + (size_t)x->scheduler.n_tokens);
    free(list.ids);
    json_decref(r);
}

static void test_offsets(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "\x01"
                      "a\xe2\x82\xac"
                      "b");
    json_t *r = fixture_ask(x, API_COMPLETIONS, "{\"prompt\":\"q\",\"logprobs\":0}");
    static const int64_t want[] = { 0, 1, 2, 2, 2, 3 };
    for (size_t i = 0; i < 6; i++)
        assert_int_equal(json_integer_value(json_array_get(at(r, "choices.0.logprobs.text_offset"), i)),
                         want[i]);
    assert_string_equal(text_at(r, "choices.0.logprobs.tokens.1"), "bytes:\\xe2");
    json_decref(r);
    r = fixture_ask(x, API_COMPLETIONS,
                    "{\"prompt\":\"q\",\"logprobs\":0,\"return_tokens_as_token_ids\":true}");
    assert_int_equal(strncmp(text_at(r, "choices.0.logprobs.tokens.0"), "token_id:", 9), 0);
    json_decref(r);
}

static void test_truncate(void **state)
{
    struct fixture *x = *state;
    fixture_script(x, "a");
    json_decref(fixture_ask(x, API_COMPLETIONS, "{\"prompt\":[1,2,3,4],\"truncate_prompt_tokens\":2}"));
    assert_int_equal(x->scheduler.last.n_prompt, 2);
    assert_int_equal(x->scheduler.last_prompt[0], 3);
    json_decref(
        fixture_ask(x, API_COMPLETIONS,
                    "{\"prompt\":[1,2,3,4],\"truncate_prompt_tokens\":2,\"truncation_side\":\"right\"}"));
    assert_int_equal(x->scheduler.last_prompt[1], 2);
    json_t *r = fixture_ask(x, API_COMPLETIONS, "{\"prompt\":[1,2,3],\"return_token_ids\":true,\"n\":2}");
    assert_int_equal(json_array_size(at(r, "choices.1.prompt_token_ids")), 3);
    assert_int_equal(json_array_size(at(r, "choices.1.token_ids")), x->scheduler.n_tokens);
    json_decref(r);
}

/* More prompts than are submitted at a time, and a queue that fills meanwhile. */
static void test_many_prompts(void **state)
{
    struct fixture *x = *state;
    char body[2000] = "{\"prompt\":[[1]";
    for (int i = 1; i < 200; i++) strcat(body, ",[1]");
    strcat(body, "]}");
    fixture_script(x, "a");
    json_t *r = fixture_ask(x, API_COMPLETIONS, body);
    assert_int_equal(json_array_size(at(r, "choices")), 200);
    assert_int_equal(x->scheduler.submitted, 200);
    json_decref(r);
}

static void test_errors(void **state)
{
    struct fixture *x = *state;
    static const struct wrong cases[] = {
        { "{}", 400, "prompt", "found nothing" },
        { "{\"prompt\":7}", 400, "prompt", "found an integer" },
        { "{\"prompt\":\"\"}", 400, "prompt", "no tokens" },
        { "{\"prompt\":[]}", 400, "prompt", "no tokens" },
        { "{\"prompt\":[[1],[]]}", 400, "prompt", "no tokens" },
        { "{\"prompt\":[[1],7]}", 400, "prompt[1]", "found an integer" },
        { "{\"prompt\":[1,-1]}", 400, "prompt[1]", "token id -1" },
        { "{\"prompt\":[1,\"a\"]}", 400, "prompt[1]", "a token id" },
        { "{\"prompt\":\"a\",\"suffix\":\"b\"}", 400, "suffix", "not supported" },
        { "{\"prompt\":\"a\",\"max_tokens\":-1}", 400, "max_tokens", "0 to" },
        { "{\"prompt\":\"a\",\"logprobs\":21}", 400, "logprobs", "0 to 20" },
        { "{\"prompt\":\"a\",\"logprobs\":true}", 400, "logprobs", "found true" },
        { "{\"prompt\":\"a\",\"max_tokens\":4000}", 400, "max_tokens", "2048" },
    };
    check_wrong(x, API_COMPLETIONS, cases, sizeof cases / sizeof *cases);
}

static void test_body_limits(void **state)
{
    struct fixture *x = *state;
    size_t n = 5 << 20;
    char *body = malloc(n + 1);
    memset(body, '[', n);
    body[n] = 0;
    json_decref(fixture_ask(x, API_COMPLETIONS, body));
    assert_int_equal(x->status, 413);
    body[100] = 0;
    json_decref(fixture_ask(x, API_COMPLETIONS, body));
    assert_int_equal(x->status, 400);
    free(body);
}

/* 60 prompts of 2,000 tokens with 20 of the best each: refused before any is computed. */
static void test_too_many_scores(void **state)
{
    struct fixture *x = *state;
    json_t *prompt = json_array(), *prompts = json_array();
    for (int i = 0; i < 2000; i++) json_array_append_new(prompt, json_integer(i % 200));
    for (int i = 0; i < 60; i++) json_array_append(prompts, prompt);
    json_t *body =
        json_pack("{s:o, s:b, s:i, s:i}", "prompt", prompts, "echo", 1, "logprobs", 20, "max_tokens", 0);
    char *text = json_dumps(body, 0);
    json_t *r = fixture_ask(x, API_COMPLETIONS, text);
    assert_int_equal(x->status, 413);
    assert_non_null(strstr(text_at(r, "error.message"), "2520000"));
    assert_int_equal(x->scheduler.submitted, 0);
    json_decref(r);
    free(text);
    json_decref(body);
    json_decref(prompt);
}

static void test_tokens(void **state)
{
    struct fixture *x = *state;
    json_t *r = fixture_ask(x, API_TOKENIZE, "{\"prompt\":\"the <|im_end|>\",\"return_token_strs\":true}");
    size_t n = json_array_size(at(r, "tokens"));
    assert_int_equal(json_integer_value(at(r, "count")), n);
    assert_int_equal(json_integer_value(at(r, "max_model_len")), 2048);
    assert_string_equal(json_string_value(json_array_get(at(r, "token_strs"), n - 1)), "<|im_end|>");
    json_t *ask = json_pack("{s:O}", "tokens", at(r, "tokens"));
    char *body = json_dumps(ask, 0);
    json_t *back = fixture_ask(x, API_DETOKENIZE, body);
    assert_string_equal(text_at(back, "prompt"), "the <|im_end|>");
    json_decref(back);
    json_decref(ask);
    json_decref(r);
    free(body);
    r = fixture_ask(x, API_TOKENIZE, "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}");
    json_t *rendered =
        fixture_ask(x, API_CHAT_RENDER, "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}");
    assert_true(json_equal(at(r, "tokens"), at(rendered, "token_ids")));
    assert_string_equal(text_at(rendered, "prompt"),
                        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n");
    json_decref(r);
    json_decref(rendered);
    r = fixture_ask(x, API_COMPLETIONS_RENDER, "{\"prompt\":[\"hi\",\"ho\"]}");
    assert_int_equal(json_array_size(r), 2);
    json_decref(r);
    static const struct wrong tokenize[] = { { "{}", 400, "prompt", "messages instead" } },
                              detokenize[] = { { "{}", 400, "tokens", "array" },
                                               { "{\"tokens\":[1e9]}", 400, "tokens[0]", "token id" } };
    check_wrong(x, API_TOKENIZE, tokenize, 1);
    check_wrong(x, API_DETOKENIZE, detokenize, 2);
}

static void test_about(void **state)
{
    struct fixture *x = *state;
    json_t *r = fixture_ask(x, API_TOKENIZER_INFO, "");
    assert_string_equal(text_at(r, "eos_token"), "<|im_end|>");
    assert_non_null(strstr(text_at(r, "chat_template"), "add_generation_prompt"));
    json_decref(r);
    r = fixture_ask(x, API_MODELS, "");
    assert_string_equal(text_at(r, "object"), "list");
    assert_string_equal(text_at(r, "data.1.id"), "alias");
    assert_string_equal(text_at(r, "data.1.root"), "demo");
    assert_int_equal(json_integer_value(at(r, "data.0.max_model_len")), 2048);
    json_decref(r);
    char *text = fixture_ask_at(x, API_MODEL, "alias", "");
    r = fixture_parse(text);
    free(text);
    assert_int_equal(json_integer_value(at(r, "default_sampling_params.top_k")), 20);
    json_decref(r);
    free(fixture_ask_at(x, API_MODEL, "other", ""));
    assert_int_equal(x->status, 404);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_prompt_shapes), TEST(test_plain),       TEST(test_lm_eval),  TEST(test_digits),
        TEST(test_echo),          TEST(test_offsets),     TEST(test_truncate), TEST(test_many_prompts),
        TEST(test_errors),        TEST(test_body_limits), TEST(test_tokens),   TEST(test_too_many_scores),
        TEST(test_about),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
