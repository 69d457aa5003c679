/* The reply parser: what models emit to events, however it is cut; nothing lost; rendering undone. */
#include "tokenizer/reply.h"
#include "base/doc.h"
#include "base/file.h"
#include "tokenizer/chat.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const char TOOLS[] =
    "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"type\":\"object\",\"properties\":"
    "{"
    "\"s\":{\"type\":\"string\"},\"t\":{\"type\":\"string\"},\"i\":{\"type\":\"integer\"},\"x\":{\"type\":"
    "\"number\"},"
    "\"b\":{\"type\":\"boolean\"},\"o\":{\"type\":\"object\"},\"a\":{\"type\":\"array\"},"
    "\"n\":{\"anyOf\":[{\"type\":\"null\"},{\"type\":\"string\"}]},\"m\":{\"type\":[\"integer\",\"null\"]},"
    "\"u\":{},\"r\":{\"$ref\":\"#/$defs/R\"},\"q\":{\"anyOf\":[{\"$ref\":\"#/$defs/"
    "Q\"},{\"type\":\"null\"}]},"
    "\"l\":{\"$ref\":\"#/$defs/L\"}},\"$defs\":{\"R\":{\"type\":\"object\"},\"Q\":{\"$ref\":\"#/$defs/I\"},"
    "\"I\":{\"type\":\"integer\"},\"L\":{\"$ref\":\"#/$defs/L\"}}}}}]";

/* What came: a JSON array of [kind, text] with neighbours of one kind joined, and all texts as they were.
 * ahead: of each call "NAME" and the arguments' JSON as far as it came ahead of the call, a line each. */
struct seen {
    json_t *events;
    char *input;
    size_t n, calls;
    char ahead[2000];
    size_t call; /* where the call's JSON begins in `ahead`; 0: none came ahead */
    bool in_text;
};

/* Appends JSON without its first and last `cut` bytes. */
static void add_ahead(struct seen *s, const json_t *v, size_t cut)
{
    char *text = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
    assert_non_null(text);
    size_t n = strlen(s->ahead), bytes = strlen(text) - 2 * cut;
    assert_true(n + bytes < sizeof s->ahead);
    memcpy(s->ahead + n, text + cut, bytes);
    s->ahead[n + bytes] = 0;
    free(text);
}

static void take_ahead(struct seen *s, const struct reply_event *e)
{
    assert_true(e->bytes == 0 && (s->call > 0 || e->kind == REPLY_CALL_BEGINS));
    json_t *text = e->name ? json_string(e->name) : json_stringn(e->part, e->part_bytes);
    assert_true(text || e->kind == REPLY_ARGUMENT_ENDS);
    assert_int_equal(s->in_text, e->kind == REPLY_ARGUMENT_PART || e->kind == REPLY_ARGUMENT_ENDS);
    if (e->kind == REPLY_CALL_BEGINS) {
        add_ahead(s, text, 1);
        strcat(s->ahead, " {");
        s->call = strlen(s->ahead) - 1;
    } else if (e->kind == REPLY_ARGUMENT) {
        if (s->ahead[strlen(s->ahead) - 1] != '{') strcat(s->ahead, ",");
        add_ahead(s, text, 0);
        strcat(s->ahead, e->value ? ":" : ":\"");
        if (e->value) add_ahead(s, e->value, 0);
        s->in_text = !e->value;
    } else if (e->kind == REPLY_ARGUMENT_PART) {
        assert_true(e->part_bytes > 0);
        add_ahead(s, text, 1);
    } else {
        strcat(s->ahead, "\"");
        s->in_text = false;
    }
    json_decref(text);
}

/* What came ahead is how the whole call's arguments begin. */
static void check_ahead(struct seen *s, const struct reply_event *e)
{
    char *whole = json_dumps(e->arguments, JSON_COMPACT);
    assert_non_null(whole);
    if (s->call) assert_memory_equal(whole, s->ahead + s->call, strlen(s->ahead + s->call));
    if (s->call) strcat(s->ahead, "\n");
    s->call = 0;
    s->in_text = false;
    free(whole);
}

static const char *const kinds[] = { "mark", "reasoning", "content", "call" };

static void append(struct seen *s, const char *text, size_t n)
{
    s->input = realloc(s->input, s->n + n + 1);
    assert_non_null(s->input);
    memcpy(s->input + s->n, text, n);
    s->n += n;
    s->input[s->n] = 0;
}

static void take(void *ctx, const struct reply_event *e)
{
    struct seen *s = ctx;
    if (e->kind > REPLY_CALL) {
        take_ahead(s, e);
        return;
    }
    append(s, e->text, e->bytes);
    if (e->kind == REPLY_CALL) {
        check_ahead(s, e);
        s->calls++;
        json_array_append_new(s->events, json_pack("[s,s,O]", e->is_cut ? "cut call" : "call", e->name,
                                                   (json_t *)e->arguments));
        return;
    }
    if (e->kind == REPLY_MARK) return;
    json_t *last = json_array_get(s->events, json_array_size(s->events) - 1), *text = json_array_get(last, 1);
    if (last && strcmp(json_string_value(json_array_get(last, 0)), kinds[e->kind]) == 0) {
        char *joined;
        assert_true(asprintf(&joined, "%s%.*s", json_string_value(text), (int)e->bytes, e->text) >= 0);
        json_array_set_new(last, 1, json_string(joined));
        free(joined);
        return;
    }
    json_array_append_new(s->events, json_pack("[s,o]", kinds[e->kind], json_stringn(e->text, e->bytes)));
}

/* What came ahead of the calls of the text parsed last. */
static char ahead[2000];

/* Parses text given in pieces that end at `cut` and then have `piece` bytes (0: the rest at once). */
static char *parse(const char *text, bool in_reasoning, const json_t *tools, size_t cut, size_t piece)
{
    struct seen s = { .events = json_array() };
    struct reply_options o = { .in_reasoning = in_reasoning, .tools = tools, .event = take, .ctx = &s };
    struct reply *p;
    struct err e = { 0 };
    size_t n = strlen(text);
    append(&s, "", 0);
    assert_true(reply_create(&p, &o, &e));
    assert_true(reply_feed(p, text, cut, &e));
    for (size_t at = cut; at < n; at += piece ? piece : n)
        assert_true(reply_feed(p, text + at, piece && piece < n - at ? piece : n - at, &e));
    assert_true(reply_finish(p, &e));
    assert_int_equal(reply_calls(p), s.calls);
    reply_free(p);
    assert_string_equal(s.input, text);
    assert_int_equal(s.call, 0);
    strcpy(ahead, s.ahead);
    char *events = json_dumps(s.events, JSON_COMPACT);
    json_decref(s.events);
    free(s.input);
    return events;
}

static void check_cuts(const char *text, bool in_reasoning, const json_t *tools, const char *want)
{
    char first[sizeof ahead] = "";
    for (size_t cut = 0; cut <= strlen(text); cut++) {
        char *got = parse(text, in_reasoning, tools, cut, 0);
        if (strcmp(got, want) != 0)
            fail_msg("cut at %zu: %s\n  found  %s\n  wanted %s", cut, text, got, want);
        if (cut == 0) strcpy(first, ahead);
        assert_string_equal(ahead, first);
        free(got);
    }
    for (size_t piece = 1; piece <= 3; piece++) {
        char *got = parse(text, in_reasoning, tools, 0, piece);
        if (strcmp(got, want) != 0)
            fail_msg("pieces of %zu: %s\n  found  %s\n  wanted %s", piece, text, got, want);
        assert_string_equal(ahead, first);
        free(got);
    }
}

struct reply_case {
    const char *text, *want;
};

static void check_all(const struct reply_case *cases, size_t n, bool in_reasoning)
{
    json_t *tools;
    struct err e = { 0 };
    if (!doc_parse(&tools, TOOLS, sizeof TOOLS - 1, &e)) fail_msg("%s", e.text);
    for (size_t i = 0; i < n; i++) check_cuts(cases[i].text, in_reasoning, tools, cases[i].want);
    json_decref(tools);
}
#define CHECK(cases, in_reasoning) check_all(cases, sizeof(cases) / sizeof *(cases), in_reasoning)

#define CALL(body)    "<tool_call>\n<function=f>\n" body "</function>\n</tool_call>"
#define P(key, value) "<parameter=" key ">\n" value "\n</parameter>\n"

static void test_reasoning(void **state)
{
    (void)state;
    static const struct reply_case cases[] = {
        { "", "[]" },
        { "why\n</think>\n\nbecause", "[[\"reasoning\",\"why\"],[\"content\",\"because\"]]" },
        { "<think>\nwhy\n\n</think>because\n", "[[\"reasoning\",\"why\"],[\"content\",\"because\\n\"]]" },
        { "<think", "[[\"reasoning\",\"<think\"]]" },
        { "never ends\n\n", "[[\"reasoning\",\"never ends\"]]" },
        { "a\n\nb </thin", "[[\"reasoning\",\"a\\n\\nb </thin\"]]" },
        { "\n</think>\n\n", "[]" },
        { "a</think>b</think>c", "[[\"reasoning\",\"a\"],[\"content\",\"b</think>c\"]]" },
        { "I may use <tool_call> here\n</think>\n\nx",
          "[[\"reasoning\",\"I may use <tool_call> here\"],[\"content\",\"x\"]]" },
        { "go\n\n" CALL(P("s", "v")), "[[\"reasoning\",\"go\"],[\"call\",\"f\",{\"s\":\"v\"}]]" },
        { "go <tool_call>", "[[\"reasoning\",\"go <tool_call>\"]]" },
        { "go <tool_call>\n <func", "[[\"reasoning\",\"go <tool_call>\\n <func\"]]" },
        { "t\n</think>\n\n" CALL(P("i", "3")) "\n", "[[\"reasoning\",\"t\"],[\"call\",\"f\",{\"i\":3}]]" },
    };
    CHECK(cases, true);
}

static void test_calls(void **state)
{
    (void)state;
    static const struct reply_case cases[] = {
        { CALL(""), "[[\"call\",\"f\",{}]]" },
        { CALL(P("s", "a\n\n b ")), "[[\"call\",\"f\",{\"s\":\"a\\n\\n b \"}]]" },
        { CALL(P("s", "1") P("t", "")), "[[\"call\",\"f\",{\"s\":\"1\",\"t\":\"\"}]]" },
        { "Let me check.\n\n" CALL(P("s", "v")) "\n" CALL(P("s", "w")),
          "[[\"content\",\"Let me check.\"],[\"call\",\"f\",{\"s\":\"v\"}],[\"call\",\"f\",{\"s\":\"w\"}]]" },
        { CALL(P("s", "v")) "\nDone.\n", "[[\"call\",\"f\",{\"s\":\"v\"}],[\"content\",\"\\nDone.\\n\"]]" },
        { "<tool_call><function=g><parameter=k>v</parameter></function></tool_call>",
          "[[\"call\",\"g\",{\"k\":\"v\"}]]" },
        { "<function=f>\n" P("s", "v") "</function>", "[[\"call\",\"f\",{\"s\":\"v\"}]]" },
        { "<function=f>\n" P("s", "v") "</function>\n</tool_call> x",
          "[[\"call\",\"f\",{\"s\":\"v\"}],[\"content\",\" x\"]]" },
        { "<function=f>\n" P("s", "v") "</function>\n<function=f>\n</function>",
          "[[\"call\",\"f\",{\"s\":\"v\"}],[\"call\",\"f\",{}]]" },
        { "<tool_call>\n<function=f>\n" P("s", "v") "</function>", "[[\"call\",\"f\",{\"s\":\"v\"}]]" },
        { "<tool_call>\n<function=f>\n" P("s", "v") "</tool_call>", "[[\"call\",\"f\",{\"s\":\"v\"}]]" },
        { "<tool_call>\n<function=f>\n" P("s", "v") "</function>\nAnd more text",
          "[[\"call\",\"f\",{\"s\":\"v\"}],[\"content\",\"\\nAnd more text\"]]" },
    };
    CHECK(cases, false);
}

static void test_types(void **state)
{
    (void)state;
    static const struct reply_case cases[] = {
        { CALL(P("s", "1") P("i", "1") P("x", "1.5") P("b", "True")),
          "[[\"call\",\"f\",{\"s\":\"1\",\"i\":1,\"x\":1.5,\"b\":true}]]" },
        { CALL(P("x", "2.0") P("i", "2.5") P("b", "no")),
          "[[\"call\",\"f\",{\"x\":2,\"i\":\"2.5\",\"b\":false}]]" },
        { CALL(P("i", "x") P("x", "x") P("s", "null") P("i", " 4 ")),
          "[[\"call\",\"f\",{\"i\":\"x\",\"x\":\"x\",\"s\":\"null\"}]]" },
        { CALL(P("n", "None") P("m", "null") P("i", "null")),
          "[[\"call\",\"f\",{\"n\":null,\"m\":null,\"i\":null}]]" },
        { CALL(P("n", "text") P("m", "5") P("u", "5") P("other", "6")),
          "[[\"call\",\"f\",{\"n\":\"text\",\"m\":5,\"u\":\"5\",\"other\":\"6\"}]]" },
        { CALL(P("o", "{\"k\": [1, 2.5, true, null]}") P("a", "[1, \"x\"]")),
          "[[\"call\",\"f\",{\"o\":{\"k\":[1,2.5,true,null]},\"a\":[1,\"x\"]}]]" },
        { CALL(P("o", "{'k': True, 'it\\'s': None, 'q': '\"'}") P("a", "[1, ")),
          "[[\"call\",\"f\",{\"o\":{\"k\":true,\"it's\":null,\"q\":\"\\\"\"},\"a\":\"[1, \"}]]" },
        { CALL(P("i", "123456789012345678901234567890")),
          "[[\"call\",\"f\",{\"i\":\"123456789012345678901234567890\"}]]" },
        { CALL(P("r", "{\"k\": 1}") P("q", "7") P("l", "8")),
          "[[\"call\",\"f\",{\"r\":{\"k\":1},\"q\":7,\"l\":\"8\"}]]" },
    };
    CHECK(cases, false);
}

static void test_quoted_markers(void **state)
{
    (void)state;
    static const struct reply_case cases[] = {
        { CALL(P("s", "say </parameter> twice") P("t", "x")),
          "[[\"call\",\"f\",{\"s\":\"say </parameter> twice\",\"t\":\"x\"}]]" },
        { CALL(P("s", "a </function> b")), "[[\"call\",\"f\",{\"s\":\"a </function> b\"}]]" },
        { CALL(P("s", "a </tool_call> b")), "[[\"call\",\"f\",{\"s\":\"a </tool_call> b\"}]]" },
        { CALL(P("s", "<parameter=no>")), "[[\"call\",\"f\",{\"s\":\"<parameter=no>\"}]]" },
        { CALL(P("s", "if (a < b) <b>c</b>")), "[[\"call\",\"f\",{\"s\":\"if (a < b) <b>c</b>\"}]]" },
        { CALL("<parameter=s>\nno end\n<parameter=t>\nx\n</parameter>\n"),
          "[[\"call\",\"f\",{\"s\":\"no end\",\"t\":\"x\"}]]" },
        { CALL("<parameter=s>\nno end\n"), "[[\"call\",\"f\",{\"s\":\"no end\"}]]" },
        { CALL(P("s", "v") "prose\n" P("t", "x") "more"), "[[\"call\",\"f\",{\"s\":\"v\",\"t\":\"x\"}]]" },
        { CALL(P("s", "v") "<parameter=a\nb>"), "[[\"call\",\"f\",{\"s\":\"v\"}]]" },
    };
    CHECK(cases, false);
}

static void test_cut_text(void **state)
{
    (void)state;
    static const struct reply_case cases[] = {
        { "<tool_call>\n<function=f>\n<parameter=s>\nhalf a va",
          "[[\"cut call\",\"f\",{\"s\":\"half a va\"}]]" },
        { "<tool_call>\n<function=f>\n<parameter=s>\nv\n</para", "[[\"cut call\",\"f\",{\"s\":\"v\"}]]" },
        { "<tool_call>\n<function=f>\n" P("s", "v") "<parameter=t", "[[\"cut call\",\"f\",{\"s\":\"v\"}]]" },
        { "<tool_call>\n<function=f>\n" P("s", "v"), "[[\"cut call\",\"f\",{\"s\":\"v\"}]]" },
        { "<tool_call>\n<function=f>\n" P("s", "v") "</func", "[[\"cut call\",\"f\",{\"s\":\"v\"}]]" },
        { "<tool_call>\n<function=f>\n", "[[\"cut call\",\"f\",{}]]" },
        { "x <tool_call>\n<function=f", "[[\"content\",\"x <tool_call>\\n<function=f\"]]" },
        { "x <tool_call>", "[[\"content\",\"x <tool_call>\"]]" },
        { "x <tool_c", "[[\"content\",\"x <tool_c\"]]" },
        { "x \n", "[[\"content\",\"x \\n\"]]" },
    };
    CHECK(cases, false);
}

static void test_not_understood(void **state)
{
    (void)state;
    static const struct reply_case cases[] = {
        { "use  <tool_call> for it", "[[\"content\",\"use  <tool_call> for it\"]]" },
        { "<tool_call></tool_call>", "[[\"content\",\"<tool_call></tool_call>\"]]" },
        { "<function=> x", "[[\"content\",\"<function=> x\"]]" },
        { "write <function=f> and then prose", "[[\"content\",\"write <function=f> and then prose\"]]" },
        { CALL("prose\n" P("s", "v")), "[[\"content\",\"<tool_call>\\n<function=f>\\nprose\\n<parameter=s>"
                                       "\\nv\\n</parameter>\\n</function>\\n</"
                                       "tool_call>\"]]" },
        { "a </tool_call> b </function>", "[[\"content\",\"a </tool_call> b </function>\"]]" },
        { "<think>\nx</think>", "[[\"content\",\"<think>\\nx</think>\"]]" },
        { "\n\n x", "[[\"content\",\"\\n\\n x\"]]" },
    };
    CHECK(cases, false);
}

static void test_json_calls(void **state)
{
    (void)state;
    static const struct reply_case cases[] = {
        { "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"s\": 1, \"o\": {\"k\": []}}}\n</tool_call>",
          "[[\"call\",\"f\",{\"s\":1,\"o\":{\"k\":[]}}]]" },
        { "x\n<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"s\\\": 1}\"}</tool_call>\n",
          "[[\"content\",\"x\"],[\"call\",\"f\",{\"s\":1}]]" },
        { "<tool_call>{\"name\": \"f\", \"parameters\": {}}", "[[\"call\",\"f\",{}]]" },
        { "<tool_call>{\"name\": \"f\"}</tool_call>", "[[\"call\",\"f\",{}]]" },
        { "<tool_call>{\"name\": \"f\", \"arguments\": {\"s\": \"a </tool_call> b\"}}</tool_call>",
          "[[\"call\",\"f\",{\"s\":\"a </tool_call> b\"}]]" },
        { "<tool_call>{\"name\": 1}</tool_call>",
          "[[\"content\",\"<tool_call>{\\\"name\\\": 1}</tool_call>\"]]" },
        { "<tool_call>{\"name\": \"f\", \"argu",
          "[[\"content\",\"<tool_call>{\\\"name\\\": \\\"f\\\", \\\"argu\"]]" },
    };
    CHECK(cases, false);
}

/* What is said of a call before it is complete: `text` and nothing behind it. */
static void test_ahead(void **state)
{
    (void)state;
    static const struct reply_case cases[] = {
        { "<tool_call>\n<function=f>\n", "" },
        { "<tool_call>\n<function=f>\n<parameter=s>", "f {\"s\":\"\n" },
        { "<tool_call>\n<function=g>\n<parameter=s>\nv", "" }, /* no such function */
        { "<function=f><parameter=s>\nhalf a", "f {\"s\":\"half a\n" },
        { "<function=f><parameter=s>\nline\n", "f {\"s\":\"line\n" },
        { "<function=f><parameter=s>\nline\n\n", "f {\"s\":\"line\\n\n" },
        { "<function=f><parameter=s>\n\"a\\\t\xc3\xa9 </para", "f {\"s\":\"\\\"a\\\\\\t\xc3\xa9 \n" },
        { "<function=f><parameter=s>a < b <i>c</i>\n<par", "f {\"s\":\"a < b <i>c</i>\n" },
        { "<function=f><parameter=s>a</parameter>\n", "f {\"s\":\"a\n" },
        { "<function=f><parameter=s>a</parameter>\n<parameter=t>", "f {\"s\":\"a\",\"t\":\"\n" },
        { "<function=f><parameter=s>a</parameter> or </parameter>\n<parameter=t>x", "f {\"s\":\"a\n" },
        { "<function=f><parameter=i>\n12", "f {\n" },
        { "<function=f><parameter=i>\n12\n</parameter>\n<parameter=o>{\"k\"", "f {\"i\":12\n" },
        { "<function=f><parameter=n>nu", "f {\n" },
        { "<function=f><parameter=n>null and", "f {\"n\":\"null and\n" },
        { "<function=f><parameter=n>\nnone\n</parameter><parameter=s>x", "f {\"n\":null,\"s\":\"x\n" },
        { CALL(P("s", "v") P("i", "2")), "f {\"s\":\"v\"\n" },
        { "<function=f>" P("s", "v") P("s", "w") P("t", "x") "<parameter=i>",
          "f {\"s\":\"v\",\"t\":\"x\"\n" },
    };
    json_t *tools;
    assert_true(doc_parse(&tools, TOOLS, sizeof TOOLS - 1, NULL));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        free(parse(cases[i].text, false, tools, 0, 1));
        if (strcmp(ahead, cases[i].want) != 0)
            fail_msg("%s\n  found  %s\n  wanted %s", cases[i].text, ahead, cases[i].want);
    }
    json_decref(tools);
}

/* Random strings of the grammar's own pieces: nothing lost, and the same however it is cut. */
static void test_random_texts(void **state)
{
    (void)state;
    static const char *const pieces[] = { "<think>",
                                          "</think>",
                                          "<tool_call>",
                                          "</tool_call>",
                                          "<function=f>",
                                          "<function=",
                                          "</function>",
                                          "<parameter=s>",
                                          "<parameter=i>",
                                          "<parameter=n>",
                                          "<function=f><parameter=t>",
                                          "</parameter>\n<parameter=m>",
                                          "null",
                                          "<parameter=",
                                          "</parameter>",
                                          "\n",
                                          "\n\n",
                                          " ",
                                          "x",
                                          "v>",
                                          "{\"name\": \"f\"}",
                                          "<",
                                          "</",
                                          "text" };
    json_t *tools;
    uint64_t seed = 1;
    int n_ahead = 0;
    assert_true(doc_parse(&tools, TOOLS, sizeof TOOLS - 1, NULL));
    for (int i = 0; i < 20000; i++) {
        char text[256] = "";
        for (int k = 0; k < 12; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            strcat(text, pieces[(seed >> 33) % (sizeof pieces / sizeof *pieces)]);
        }
        char first[sizeof ahead], *whole = parse(text, i & 1, tools, 0, 0);
        strcpy(first, ahead);
        char *bytes = parse(text, i & 1, tools, 0, 1);
        bool same = strcmp(first, ahead) == 0;
        char *threes = parse(text, i & 1, tools, 0, 3);
        if (!same || strcmp(first, ahead) != 0)
            fail_msg("%s\n  ahead at once %s\n  last %s", text, first, ahead);
        n_ahead += *first != 0;
        if (strcmp(whole, bytes) != 0 || strcmp(whole, threes) != 0)
            fail_msg("%s\n  at once %s\n  bytes   %s\n  threes  %s", text, whole, bytes, threes);
        free(whole);
        free(bytes);
        free(threes);
    }
    assert_true(n_ahead > 1000);
    json_decref(tools);
}

/* Tools whose parameters have the types that these arguments have. */
static json_t *tools_for(const json_t *calls)
{
    static const char *const types[] = { "object", "array",   "string",  "integer",
                                         "number", "boolean", "boolean", "null" };
    json_t *tools = json_array(), *properties = json_object();
    for (size_t i = 0; i < json_array_size(calls); i++) {
        const json_t *call = json_array_get(calls, i), *f = json_object_get(call, "function");
        json_t *arguments = json_object_get(f ? f : call, "arguments");
        for (void *it = json_object_iter(arguments); it; it = json_object_iter_next(arguments, it))
            json_object_set_new(properties, json_object_iter_key(it),
                                json_pack("{s:s}", "type", types[json_typeof(json_object_iter_value(it))]));
        json_array_append_new(tools, json_pack("{s:{s:O,s:{s:O}}}", "function", "name",
                                               json_object_get(f ? f : call, "name"), "parameters",
                                               "properties", properties));
    }
    json_decref(properties);
    return tools;
}

/* The events that an assistant's message should come back as. */
static json_t *events_of(const json_t *message)
{
    json_t *events = json_array();
    const json_t *reasoning = json_object_get(message, "reasoning_content");
    const json_t *calls = json_object_get(message, "tool_calls"),
                 *content = json_object_get(message, "content");
    if (json_string_length(reasoning))
        json_array_append_new(events, json_pack("[s,O]", "reasoning", reasoning));
    if (json_string_length(content)) json_array_append_new(events, json_pack("[s,O]", "content", content));
    for (size_t i = 0; i < json_array_size(calls); i++) {
        const json_t *call = json_array_get(calls, i), *f = json_object_get(call, "function");
        json_t *arguments = json_object_get(f ? f : call, "arguments");
        json_array_append_new(events, json_pack("[s,O,o]", "call", json_object_get(f ? f : call, "name"),
                                                arguments ? json_incref(arguments) : json_object()));
    }
    return events;
}

static void check_message(const struct chat_template *t, const json_t *message)
{
    static const char open[] = "<|im_start|>assistant\n<think>\n", close[] = "<|im_end|>\n";
    json_t *messages = json_pack("[{s:s,s:s},O]", "role", "user", "content", "q", message);
    struct chat_options o = { 0 };
    struct err e = { 0 };
    char *text;
    size_t bytes;
    if (!chat_render(&text, &bytes, t, messages, NULL, &o, &e)) fail_msg("%s", e.text);
    char *answer = strstr(text, open);
    assert_non_null(answer);
    text[bytes - strlen(close)] = 0;
    json_t *tools = tools_for(json_object_get(message, "tool_calls")), *want = events_of(message);
    char *got = parse(answer + strlen(open), true, tools, 0, 0), *wanted = json_dumps(want, JSON_COMPACT);
    assert_string_equal(got, wanted);
    json_decref(tools);
    json_decref(want);
    json_decref(messages);
    free(wanted);
    free(got);
    free(text);
}

static void test_rendering_undone(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct chat_template *t;
    char *text;
    size_t bytes, checked = 0;
    json_t *all;
    if (!file_read(&text, &bytes, "tests/golden/model_vectors.json", 1 << 20, &e)) fail_msg("%s", e.text);
    char *big = strstr(text, "123456789012345678901234567890"); /* no JSON integer of ours */
    for (; big; big = strstr(big + 1, "123456789012345678901234567890"))
        memset(big, '1', 12), memset(big + 12, ' ', 18);
    if (!doc_parse(&all, text, strlen(text), &e) || !chat_template_load(&t, "models/demo", &e))
        fail_msg("%s", e.text);
    const json_t *cases = json_object_get(json_object_get(all, "chat_rendering"), "cases");
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i), *messages = json_object_get(c, "messages");
        for (size_t k = 0; json_object_get(c, "rendered") && k < json_array_size(messages); k++) {
            const json_t *m = json_array_get(messages, k);
            const char *role = json_string_value(json_object_get(m, "role"));
            const char *content = json_string_value(json_object_get(m, "content"));
            if (strcmp(role, "assistant") != 0 || (content && strstr(content, "<think>"))) continue;
            check_message(t, m);
            checked++;
        }
    }
    assert_true(checked >= 10);
    json_decref(all);
    chat_template_free(t);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reasoning),    cmocka_unit_test(test_calls),
        cmocka_unit_test(test_types),        cmocka_unit_test(test_quoted_markers),
        cmocka_unit_test(test_cut_text),     cmocka_unit_test(test_not_understood),
        cmocka_unit_test(test_json_calls),   cmocka_unit_test(test_ahead),
        cmocka_unit_test(test_random_texts), cmocka_unit_test(test_rendering_undone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
