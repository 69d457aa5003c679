/* Every field of every route with values of every wrong type and beyond every limit: the answer is an error
 * of that API's shape that names the field and says what was expected, and does not repeat what it must not.
 */
#include "server/api_fixture.h"

/* Types: b boolean, i integer, n number, s string, a array, o object; what else is asked of them stands in
 * the tables of limits and words. */
struct field {
    const char *name, *types;
    double min, max; /* of numbers; 0 and 0: no limits */
};

static const struct field common[] = {
    { "temperature", "n", 0, 100 },
    { "top_p", "n", 0, 1 },
    { "top_k", "i", -1, 2147483647 },
    { "stream", "b", 0, 0 },
};
static const struct field sampling[] = {
    { "min_p", "n", 0, 1 },
    { "presence_penalty", "n", -2, 2 },
    { "frequency_penalty", "n", -2, 2 },
    { "repetition_penalty", "n", 0.001, 1000 },
    { "seed", "i", 0, 0 },
    { "n", "i", 1, 16 },
    { "best_of", "i", 0, 2147483647 },
    { "max_completion_tokens", "i", 1, 2147483647 },
    { "min_tokens", "i", 0, 2147483647 },
    { "stop", "sa", 0, 0 },
    { "stop_token_ids", "a", 0, 0 },
    { "include_stop_str_in_output", "b", 0, 0 },
    { "ignore_eos", "b", 0, 0 },
    { "logit_bias", "o", 0, 0 },
    { "allowed_token_ids", "a", 0, 0 },
    { "bad_words", "a", 0, 0 },
    { "prompt_logprobs", "i", 0, 20 },
    { "logprob_token_ids", "a", 0, 0 },
    { "repetition_detection", "o", 0, 0 },
    { "repetition_detection.max_pattern_size", "i", 0, 1024 },
    { "return_token_ids", "b", 0, 0 },
    { "return_tokens_as_token_ids", "b", 0, 0 },
    { "stream_options", "o", 0, 0 },
    { "stream_interval", "i", 1, 2147483647 },
    { "skip_special_tokens", "b", 0, 0 },
    { "truncate_prompt_tokens", "i", -1, 2147483647 },
    { "truncation_side", "s", 0, 0 },
    { "cache_salt", "s", 0, 0 },
    { "priority", "i", -2147483648., 2147483647 },
    { "response_format", "o", 0, 0 },
    { "structured_outputs", "o", 0, 0 },
    { "guided_regex", "s", 0, 0 },
    { "guided_choice", "a", 0, 0 },
    { "guided_grammar", "s", 0, 0 },
    { "guided_json", "osb", 0, 0 },
};
static const struct field chat[] = {
    { "messages", "a", 0, 0 },
    { "max_tokens", "i", 1, 2147483647 },
    { "logprobs", "b", 0, 0 },
    { "top_logprobs", "i", 0, 20 },
    { "tools", "a", 0, 0 },
    { "tool_choice", "so", 0, 0 },
    { "parallel_tool_calls", "b", 0, 0 },
    { "reasoning_effort", "s", 0, 0 },
    { "thinking_token_budget", "i", 0, 2147483647 },
    { "include_reasoning", "b", 0, 0 },
    { "chat_template_kwargs", "o", 0, 0 },
    { "chat_template_kwargs.enable_thinking", "b", 0, 0 },
    { "add_generation_prompt", "b", 0, 0 },
    { "continue_final_message", "b", 0, 0 },
};
static const struct field completions[] = {
    { "prompt", "sa", 0, 0 },
    { "max_tokens", "i", 0, 2147483647 },
    { "logprobs", "i", 0, 20 },
    { "echo", "b", 0, 0 },
};
static const struct field responses[] = {
    { "input", "sa", 0, 0 },
    { "instructions", "s", 0, 0 },
    { "tools", "a", 0, 0 },
    { "tool_choice", "so", 0, 0 },
    { "parallel_tool_calls", "b", 0, 0 },
    { "max_output_tokens", "i", 1, 2147483647 },
    { "reasoning", "o", 0, 0 },
    { "reasoning.effort", "s", 0, 0 },
    { "text", "o", 0, 0 },
    { "text.format", "o", 0, 0 },
    { "include", "a", 0, 0 },
    { "previous_response_id", "s", 0, 0 },
    { "store", "b", 0, 0 },
    { "min_p", "n", 0, 1 },
    { "seed", "i", 0, 0 },
    { "cache_salt", "s", 0, 0 },
    { "priority", "i", -2147483648., 2147483647 },
};
static const struct field messages[] = {
    { "messages", "a", 0, 0 },
    { "system", "sa", 0, 0 },
    { "max_tokens", "i", 1, 2147483647 },
    { "stop_sequences", "a", 0, 0 },
    { "tools", "a", 0, 0 },
    { "tool_choice", "o", 0, 0 },
    { "thinking", "o", 0, 0 },
    { "thinking.budget_tokens", "i", 0, 2147483647 },
    { "output_config", "o", 0, 0 },
    { "output_config.format", "o", 0, 0 },
};

static const struct route_fields {
    enum api_route route;
    const char *body; /* a request that is in order, without its braces; the field replaces its like */
    struct {
        const struct field *fields;
        size_t n;
    } of[3];
} routes[] = {
#define LIST(l)                                                                                              \
    {                                                                                                        \
        l, sizeof l / sizeof *l                                                                              \
    }
    { API_CHAT_COMPLETIONS,
      "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]",
      { LIST(common), LIST(sampling), LIST(chat) } },
    { API_COMPLETIONS, "\"prompt\":\"hi\"", { LIST(common), LIST(sampling), LIST(completions) } },
    { API_RESPONSES, "\"input\":\"hi\"", { LIST(common), LIST(responses), { NULL, 0 } } },
    { API_MESSAGES,
      "\"max_tokens\":5,\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]",
      { LIST(common), LIST(messages), { NULL, 0 } } },
};

static const char SECRET[] = "sk-do-not-repeat";

/* A value and which letters of types it is of. */
static const struct {
    const char *json, *is;
} values[] = {
    { "true", "b" }, { "7", "in" }, { "7.5", "n" },    { "\"sk-do-not-repeat\"", "s" },
    { "[]", "a" },   { "{}", "o" }, { "[[[]]]", "a" }, { "{\"a\":{\"a\":[]}}", "o" },
};

static bool allows(const char *types, const char *is)
{
    return strpbrk(types, is) != NULL;
}

/* The request with one more field, which takes the place of one that it had. */
static char *with_field(const char *body, const char *name, const char *value)
{
    char text[1000], *dot, path[100];
    snprintf(text, sizeof text, "{%s}", body);
    json_t *r = fixture_parse(text), *v = json_loads(value, JSON_DECODE_ANY, NULL);
    snprintf(path, sizeof path, "%s", name);
    if ((dot = strchr(path, '.'))) {
        *dot = 0;
        v = json_pack("{s:o}", dot + 1, v);
        if (strcmp(path, "thinking") == 0) json_object_set_new(v, "type", json_string("enabled"));
        if (strcmp(path, "repetition_detection") == 0) json_object_set_new(v, "min_count", json_integer(2));
    }
    assert_non_null(v);
    json_object_set_new(r, path, v);
    char *out = json_dumps(r, JSON_COMPACT);
    json_decref(r);
    return out;
}

/* An error in the API's own shape; its sentence is not empty and names what is wrong. */
static void check_error(struct fixture *x, enum api_route route, const char *body, json_t *r)
{
    json_t *error = at(r, "error");
    if (route == API_MESSAGES) {
        assert_string_equal(text_at(r, "type"), "error");
        assert_int_equal(json_object_size(r), 2);
        assert_null(at(error, "param"));
    } else {
        assert_int_equal(json_object_size(r), 1);
        assert_true(at(error, "param") && at(error, "code"));
    }
    assert_string_equal(text_at(error, "type"), "invalid_request_error");
    if (x->status != 400 || strlen(text_at(error, "message")) < 10)
        fail_msg("%s: %d %s", body, x->status, text_at(error, "message"));
}

static void ask_wrong(struct fixture *x, const struct route_fields *route, const struct field *f,
                      const char *value, bool must_fail)
{
    char *body = with_field(route->body, f->name, value), *text = fixture_ask_at(x, route->route, NULL, body);
    if (must_fail && (x->status != 400 || x->is_stream)) fail_msg("%s: %d\n%s", body, x->status, text);
    if (x->status == 400) {
        json_t *r = fixture_parse(text);
        check_error(x, route->route, body, r);
        const char *message = text_at(r, "error.message"), *param = text_at(r, "error.param");
        if (must_fail && !strstr(message, f->name))
            fail_msg("%s: does not name its field: %s", body, message);
        if (must_fail && route->route != API_MESSAGES && strncmp(param, f->name, strlen(f->name)) != 0)
            fail_msg("%s: param %s: %s", body, param, message);
        if (must_fail && strstr(message, SECRET)) fail_msg("%s: repeats a secret: %s", body, message);
        json_decref(r);
    } else if (x->status != 200)
        fail_msg("%s: %d\n%s", body, x->status, text);
    free(body);
    free(text);
}

static void check_limits(struct fixture *x, const struct route_fields *route, const struct field *f)
{
    char value[60];
    double beyond[] = { f->min - 1, f->max + 1, f->min - 1e9, f->max * 4 + 1e9 };
    if (f->min == 0 && f->max == 0) return;
    for (size_t i = 0; i < sizeof beyond / sizeof *beyond; i++) {
        snprintf(value, sizeof value, strchr(f->types, 'i') ? "%.0f" : "%f", beyond[i]);
        ask_wrong(x, route, f, value, true);
    }
}

static void test_every_field(void **state)
{
    struct fixture *x = *state;
    int asked = 0;
    fixture_script(x, "a");
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++)
        for (int list = 0; list < 3; list++)
            for (size_t k = 0; k < routes[i].of[list].n; k++) {
                const struct field *f = &routes[i].of[list].fields[k];
                for (size_t v = 0; v < sizeof values / sizeof *values; v++, asked++)
                    ask_wrong(x, &routes[i], f, values[v].json, !allows(f->types, values[v].is));
                check_limits(x, &routes[i], f);
                /* null is as if the field were not there */
                bool needed = strstr(routes[i].body, f->name);
                if (!needed && !strchr(f->name, '.')) {
                    char *body = with_field(routes[i].body, f->name, "null");
                    free(fixture_ask_at(x, routes[i].route, NULL, body));
                    if (x->status != 200) fail_msg("%s: %d", body, x->status);
                    free(body);
                }
            }
    assert_true(asked > 1000);
}

/* With --strict-params these fields are known, and nothing else is. */
static void test_names(void **state)
{
    struct fixture *x = *state;
    x->options.strict_params = true;
    fixture_api(x);
    fixture_script(x, "a");
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
        for (int list = 0; list < 3; list++)
            for (size_t k = 0; k < routes[i].of[list].n; k++) {
                const struct field *f = &routes[i].of[list].fields[k];
                if (strchr(f->name, '.') || strstr(routes[i].body, f->name)) continue;
                char *body = with_field(routes[i].body, f->name, "null");
                free(fixture_ask_at(x, routes[i].route, NULL, body));
                if (x->status != 200) fail_msg("%s: %d", body, x->status);
                free(body);
            }
        const struct field unknown = { "sk_no_such_field", "", 0, 0 };
        ask_wrong(x, &routes[i], &unknown, "7", true);
    }
}

/* What no JSON value can be, and what is wrong with bodies as a whole. */
static void test_bodies(void **state)
{
    struct fixture *x = *state;
    static const char *const bodies[] = {
        "",
        "{",
        "null",
        "[]",
        "7",
        "\"a\"",
        "{\"seed\":1e999}",
        "{\"seed\":99999999999999999999}",
        "{\"n\":NaN}",
        "{\"n\":1,\"n\":1}",
        "{\"a\":\"\\ud800\"}",
        "{\"a\":\"\xff\"}",
        "{} {}",
        "{\"a\":'b'}",
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    };
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++)
        for (size_t k = 0; k < sizeof bodies / sizeof *bodies; k++) {
            json_t *r = fixture_ask(x, routes[i].route, bodies[k]);
            check_error(x, routes[i].route, bodies[k], r);
            json_decref(r);
        }
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = { TEST(test_every_field), TEST(test_names), TEST(test_bodies) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
