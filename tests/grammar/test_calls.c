/* Grammars of tool calls: what they accept, and that random walks through their masks are what the reply
 * parser (tokenizer/reply.h) reads as calls of these tools, with arguments of the types asked for. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "grammar/matching.h"
#include "tokenizer/reply.h"
#include <stdio.h>

static const char TOOLS[] =
    "[{\"type\":\"function\",\"function\":{\"name\":\"get\",\"description\":\"d\",\"parameters\":{\"type\":"
    "\"object\",\"properties\":{"
    "\"city\":{\"type\":\"string\",\"description\":\"a "
    "city\"},\"days\":{\"type\":\"integer\",\"minimum\":1,\"maximum\":14},"
    "\"unit\":{\"type\":\"string\",\"enum\":[\"C\",\"F\"]},\"opts\":{\"type\":\"object\",\"properties\":{"
    "\"x\":{\"type\":\"boolean\"}},"
    "\"required\":[\"x\"]},\"list\":{\"type\":\"array\",\"items\":{\"type\":\"number\"},\"maxItems\":3}},"
    "\"required\":[\"city\",\"days\"]}}},"
    "{\"name\":\"ping\"}]";

static struct grammar *calls_grammar(const char *text, const struct tool_call_options *o)
{
    struct grammar *g;
    struct err e = { 0 };
    json_t *tools = json_loads(text, 0, NULL);
    assert_non_null(tools);
    if (!grammar_from_tool_calls(&g, tools, o, &e)) fail_msg("%s", e.text);
    json_decref(tools);
    return g;
}

#define CALL(name, body) "<tool_call>\n<function=" name ">\n" body "</function>\n</tool_call>"
#define P(key, value)    "<parameter=" key ">\n" value "\n</parameter>\n"

static void test_texts(void **state)
{
    (void)state;
    static const char *const yes[] = {
        CALL("ping", ""), "\n\n" CALL("get", P("city", "K\u00f6ln\n</b> <parameter") P("days", "7")),
        CALL("get",
             P("city", "") P("days", "14") P("unit", "C") P("opts", "{\"x\": true}") P("list", "[1.5, 2]")),
        CALL("ping", "") "\n" CALL("get", P("city", "</parameter\n") P("days", "1") P("list", "[]"))
    };
    static const char *const no[] = { CALL("pong", ""),
                                      CALL("get", P("city", "a")),
                                      CALL("get", P("days", "7") P("city", "a")),
                                      CALL("get", P("city", "a") P("days", "15")),
                                      CALL("get", P("city", "a") P("days", "1") P("unit", "K")),
                                      CALL("get", P("city", "a</parameter>") P("days", "1")) };
    struct tool_call_options any = { 0 }, ping = { .name = "ping", .only_one = true },
                             optional = { .is_optional = true };
    struct grammar *g = calls_grammar(TOOLS, &any);
    check_texts(g, "calls", yes, no, 4);
    for (int i = 4; i < 6; i++) assert_false(accepts(g, no[i]));
    assert_false(accepts(g, ""));
    assert_false(accepts(g, "text " CALL("ping", "")));
    grammar_free(g);
    g = calls_grammar(TOOLS, &ping);
    assert_true(accepts(g, CALL("ping", "")));
    assert_false(accepts(g, CALL("ping", "") "\n" CALL("ping", "")));
    assert_false(accepts(g, yes[2]));
    grammar_free(g);
    g = calls_grammar(TOOLS, &optional);
    assert_true(accepts(g, ""));
    assert_true(accepts(g, "a <tool_cal <b>\n"));
    assert_true(accepts(g, "text\n\n" CALL("ping", "")));
    assert_false(accepts(g, "<tool_call>"));
    assert_false(accepts(g, CALL("ping", "") " more"));
    grammar_free(g);
}

struct seen {
    int calls, others;
};

static void look(void *ctx, const struct reply_event *e)
{
    struct seen *s = ctx;
    if (e->kind == REPLY_CONTENT || e->kind == REPLY_REASONING) s->others++;
    if (e->kind != REPLY_CALL) return;
    s->calls++;
    assert_false(e->is_cut);
    if (strcmp(e->name, "ping") == 0) {
        assert_int_equal(json_object_size(e->arguments), 0);
        return;
    }
    assert_string_equal(e->name, "get");
    assert_true(json_is_string(json_object_get(e->arguments, "city")));
    assert_in_range(json_integer_value(json_object_get(e->arguments, "days")), 1, 14);
    const json_t *unit = json_object_get(e->arguments, "unit"), *opts = json_object_get(e->arguments, "opts");
    const json_t *list = json_object_get(e->arguments, "list");
    if (unit)
        assert_true(strcmp(json_string_value(unit), "C") == 0 || strcmp(json_string_value(unit), "F") == 0);
    if (opts) assert_true(json_is_boolean(json_object_get(opts, "x")));
    if (list) assert_true(json_is_array(list) && json_array_size(list) <= 3);
}

/* Takes the bytes if all of them may come. */
static bool try_text(struct matcher *m, const char *text)
{
    int n = 0;
    while (text[n] && matcher_advance(m, (unsigned char)text[n])) n++;
    if (!text[n]) return true;
    matcher_back(m, n);
    return false;
}

/* A random text, or what it was when it had become too long; *ended: whether it is whole. */
static void walk(struct matcher *m, struct reply *p, bool *ended)
{
    static const char close[] = "\n</parameter>\n";
    *ended = false;
    for (int step = 0; step < 600 && !*ended; step++) {
        uint32_t mask[VOCAB / 32 + 1];
        memset(mask, 255, sizeof mask);
        matcher_mask(m, mask, VOCAB);
        int32_t ids[VOCAB], n = 0;
        for (int32_t id = 0; id < VOCAB; id++)
            if (mask[id / 32] >> id % 32 & 1) ids[n++] = id;
        assert_true(n > 0);
        if (any_below(8) == 0 && try_text(m, close)) {
            assert_true(reply_feed(p, close, sizeof close - 1, NULL));
            continue;
        }
        int32_t id = ids[any_below((uint32_t)n)];
        size_t bytes;
        const char *word = word_bytes(NULL, id, &bytes);
        assert_true(matcher_advance(m, id));
        *ended = id >= STOP;
        if (!*ended) assert_true(reply_feed(p, word, bytes, NULL));
    }
}

static void test_walks(void **state)
{
    (void)state;
    struct tool_call_options any = { 0 };
    struct grammar *g = calls_grammar(TOOLS, &any);
    struct token_trie *t = word_trie();
    json_t *tools = json_loads(TOOLS, 0, NULL);
    int whole = 0;
    for (int w = 0; w < 400; w++) {
        struct matcher *m;
        struct seen s = { 0 };
        struct reply *p;
        struct reply_options o = { .tools = tools, .event = look, .ctx = &s };
        bool ended;
        assert_true(matcher_create(&m, g, t, NULL));
        assert_true(reply_create(&p, &o, NULL));
        walk(m, p, &ended);
        if (ended) {
            assert_true(reply_finish(p, NULL));
            assert_true(s.calls > 0);
            assert_int_equal(s.others, 0);
            whole++;
        }
        reply_free(p);
        matcher_free(m);
    }
    assert_true(whole > 100);
    json_decref(tools);
    token_trie_free(t);
    grammar_free(g);
}

static void test_masks(void **state)
{
    (void)state;
    struct tool_call_options any = { 0 }, optional = { .is_optional = true };
    struct grammar *g = calls_grammar(TOOLS, &any);
    check_random_walks(g, "calls", 20, 60);
    grammar_free(g);
    g = calls_grammar(TOOLS, &optional);
    check_random_walks(g, "text and calls", 10, 40);
    grammar_free(g);
}

static void test_messages(void **state)
{
    (void)state;
    static const struct {
        const char *tools, *name, *text;
    } refused[] = {
        { "[]", NULL, "tools: the list is empty" },
        { "{}", NULL, "tools: must be a list of at most 1024 functions" },
        { "[{\"name\":\"f\"}]", "g", "tools: there is no function 'g'" },
        { "[{\"name\":\"f>\"}]", NULL,
          "tools: the name of a function must be 1 to 256 bytes without < > and control characters" },
        { "[{}]", NULL,
          "tools: the name of a function must be 1 to 256 bytes without < > and control characters" },
        { "[{\"name\":\"f\",\"parameters\":{\"properties\":{\"a\\n\":{}}}}]", NULL,
          "tools: the name of a parameter must be 1 to 256 bytes without < > and control characters" },
        { "[{\"name\":\"f\",\"parameters\":{\"anyOf\":[{}]}}]", NULL,
          "schema, f.parameters: 'anyOf' of a function's parameters is not supported" },
        { "[{\"name\":\"f\",\"parameters\":{\"type\":\"string\"}}]", NULL,
          "schema, f.parameters: 'type' of a function's parameters must be object" },
        { "[{\"name\":\"f\",\"parameters\":{\"required\":[\"x\"]}}]", NULL,
          "schema, f.parameters: 'required' names 'x', which is not among properties" },
        { "[{\"name\":\"f\",\"parameters\":{\"properties\":{\"a\":{\"type\":\"array\",\"items\":{\"not\":{}}}"
          "}}}]",
          NULL, "schema, f.parameters/properties/a/items: 'not' is not supported" },
        { "[{\"name\":\"f\",\"parameters\":{\"properties\":{\"a\":{\"enum\":[\"<b>\"]}}}}]", NULL,
          "schema, f.parameters/properties/a: 'enum' with < in a string is not supported in calls" },
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        struct grammar *g;
        struct err e = { 0 };
        struct tool_call_options o = { .name = refused[i].name };
        json_t *tools = json_loads(refused[i].tools, 0, NULL);
        assert_non_null(tools);
        assert_false(grammar_from_tool_calls(&g, tools, &o, &e));
        assert_string_equal(e.text, refused[i].text);
        json_decref(tools);
    }
}

/* Strings among other types are raw, with their own limits; the rest is JSON. */
static void test_types(void **state)
{
    (void)state;
    static const char tools[] =
        "[{\"name\":\"f\",\"parameters\":{\"properties\":{\"v\":{\"anyOf\":[{\"type\":\"integer\"},{\"type\":"
        "\"string\","
        "\"maxLength\":2}]}},\"required\":[\"v\"]}},"
        "{\"name\":\"g\",\"parameters\":{\"properties\":{\"v\":{\"$ref\":\"#/$defs/"
        "p\"}},\"required\":[\"v\"],\"$defs\":{\"p\":"
        "{\"type\":\"object\",\"properties\":{\"p\":{\"anyOf\":[{\"$ref\":\"#/$defs/"
        "p\"},{\"type\":\"null\"}]}}}}}},"
        "{\"name\":\"h\",\"parameters\":{\"properties\":{\"v\":{\"type\":[\"boolean\",\"string\"],"
        "\"pattern\":\"^x+$\"}},\"required\":[\"v\"]}},"
        "{\"name\":\"i\",\"parameters\":{\"properties\":{\"v\":{}},\"required\":[\"v\"]}}]";
    static const char *const yes[] = {
        CALL("f", P("v", "123")), CALL("f", P("v", "ab")),   CALL("g", P("v", "{\"p\": {\"p\": null}}")),
        CALL("h", P("v", "xxx")), CALL("h", P("v", "true")), CALL("i", P("v", "any\nthing"))
    };
    static const char *const no[] = { CALL("f", P("v", "abc")),
                                      CALL("g", P("v", "{\"p\": 1}")),
                                      CALL("g", P("v", "x")),
                                      CALL("h", P("v", "y")),
                                      CALL("i", ""),
                                      CALL("f", P("v", "1.5x")) };
    struct tool_call_options any = { 0 };
    struct grammar *g = calls_grammar(tools, &any);
    check_texts(g, "calls", yes, no, 6);
    grammar_free(g);
}

static bool tag_grammar(struct grammar **out, const char *text, struct err *e)
{
    json_t *tag = json_loads(text, 0, NULL);
    assert_non_null(tag);
    *e = (struct err){ 0 };
    bool ok = grammar_from_structural_tag(out, tag, e);
    json_decref(tag);
    return ok;
}

#define SCHEMA                                                                                               \
    "\"schema\":{\"type\":\"object\",\"properties\":{\"x\":{\"type\":\"integer\"}},\"required\":[\"x\"]}"

static void test_structural_tags(void **state)
{
    (void)state;
    static const char tag[] =
        "{\"type\":\"structural_tag\",\"triggers\":[\"<f=\",\"[[\"],\"structures\":[{\"begin\":\"<f=a>"
        "\"," SCHEMA
        ",\"end\":\"</f>\"},{\"begin\":\"<f=b>\",\"schema\":true,\"end\":\"\"},{\"begin\":\"[[\"," SCHEMA
        ",\"end\":\"]]\"}]}";
    static const char *const yes[] = { "",
                                       "any text < at [ all K\u00f6ln <f",
                                       "<f=a>{\"x\": 1}</f>",
                                       "see <f=a>{\"x\": 1}</f> and [[{\"x\": 2}]] <",
                                       "<f=b>null<f=b>[1, 2] more",
                                       "<<f=a>{\"x\":1}</f>",
                                       "[<f=a>{\"x\":1}</f>[" };
    static const char *const no[] = {
        "<f=", "<f=c>", "text <f=a>{\"x\": \"1\"}</f>", "<f=a>{\"x\": 1}", "[[", "[[1]]", "[[["
    };
    static const char *const wrong[][2] = {
        { "{}", "structures" },
        { "{\"triggers\":[\"<\"],\"structures\":[]}", "structures" },
        { "{\"structures\":[{}]}", "triggers" },
        { "{\"triggers\":[1],\"structures\":[{}]}", "triggers[0]" },
        { "{\"triggers\":[\"\"],\"structures\":[{}]}", "triggers[0]" },
        { "{\"triggers\":[\"\u00e9\"],\"structures\":[{}]}", "not ASCII" },
        { "{\"triggers\":[\"<f\"],\"structures\":[{\"begin\":\"<g\"," SCHEMA ",\"end\":\"\"}]}",
          "structures[0].begin" },
        { "{\"triggers\":[\"<f\"],\"structures\":[{\"begin\":\"<f\"," SCHEMA "}]}", "structures[0].end" },
        { "{\"triggers\":[\"<f\"],\"structures\":[{\"begin\":\"<f\",\"end\":\"\"}]}",
          "structures[0].schema" },
        { "{\"triggers\":[\"<f\"],\"structures\":[{\"begin\":\"<f\",\"schema\":{\"not\":{}},\"end\":\"\"}]}",
          "structures[0].schema" },
        { "{\"format\":{\"type\":\"any_text\"}}", "format" },
    };
    struct grammar *g;
    struct err e;
    if (!tag_grammar(&g, tag, &e)) fail_msg("%s", e.text);
    check_texts(g, "tags", yes, no, 7);
    grammar_free(g);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        if (tag_grammar(&g, wrong[i][0], &e) || !strstr(e.text, wrong[i][1]))
            fail_msg("%s: %s", wrong[i][0], e.text);
}

/* Random triggers over three letters, whose beginnings are in each other, against a plain search. */
static void test_triggers(void **state)
{
    (void)state;
    int with = 0, without = 0;
    for (int round = 0; round < 60; round++) {
        char tag[600], trigger[3][6], text[16];
        struct grammar *g;
        struct err e;
        for (int k = 0; k < 3; k++) {
            int n = 1 + (int)any_below(5);
            for (int i = 0; i < n; i++) trigger[k][i] = (char)('a' + any_below(3));
            trigger[k][n] = 0;
        }
        snprintf(tag, sizeof tag,
                 "{\"triggers\":[\"%s\",\"%s\",\"%s\"],\"structures\":[{\"begin\":\"%s\",\"schema\":{"
                 "\"const\":7},\"end\":"
                 "\"!\"}]}",
                 trigger[0], trigger[1], trigger[2], trigger[0]);
        if (!tag_grammar(&g, tag, &e)) fail_msg("%s", e.text);
        for (int i = 0; i < 60; i++) {
            int n = (int)any_below(12);
            for (int k = 0; k < n; k++) text[k] = (char)('a' + any_below(4));
            text[n] = 0;
            bool found = strstr(text, trigger[0]) || strstr(text, trigger[1]) || strstr(text, trigger[2]);
            if (accepts(g, text) == found) fail_msg("%s: %s", tag, text);
            with += found;
            without += !found;
        }
        grammar_free(g);
    }
    assert_true(with > 500 && without > 500);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_texts),    cmocka_unit_test(test_walks), cmocka_unit_test(test_masks),
        cmocka_unit_test(test_messages), cmocka_unit_test(test_types), cmocka_unit_test(test_structural_tags),
        cmocka_unit_test(test_triggers)
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
