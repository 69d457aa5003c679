/* JSON schema: values accepted and refused, masks, and that what is not supported is refused by path and
 * keyword. tools/test_grammar.py compares with the jsonschema package. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "grammar/matching.h"
#include <stdio.h>

static struct grammar *schema_grammar(const char *text)
{
    struct grammar *g;
    struct err e = { 0 };
    json_t *schema = json_loads(text, JSON_DECODE_ANY, NULL);
    if (!schema) fail_msg("not JSON: %s", text);
    if (!grammar_from_schema(&g, schema, &e)) fail_msg("%s\n  %s", text, e.text);
    json_decref(schema);
    return g;
}

#define NODE                                                                                                 \
    "{\"$ref\":\"#/$defs/"                                                                                   \
    "node\",\"$defs\":{\"node\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":\"integer\"},"          \
    "\"next\":{\"anyOf\":[{\"$ref\":\"#/$defs/"                                                              \
    "node\"},{\"type\":\"null\"}]}},\"required\":[\"v\",\"next\"]}}}"
#define TAGGED                                                                                               \
    "{\"oneOf\":[{\"type\":\"object\",\"properties\":{\"k\":{\"const\":\"a\"},\"x\":{\"type\":\"integer\"}}" \
    ",\"required\":[\"k\",\"x\"]},"                                                                          \
    "{\"type\":\"object\",\"properties\":{\"k\":{\"const\":\"b\"}},\"required\":[\"k\"]},{\"type\":"         \
    "\"null\"}]}"

static const struct {
    const char *schema, *yes[6], *no[6];
} cases[] = {
    { "true", { "1", "[{}]", "null" }, { "", "nul", "1 " } },
    { "{\"title\":\"t\"}", { "\"x\"" }, { "x" } },
    { "{\"type\":\"object\"}", { "{}", "{\"a\": [1]}" }, { "[]", "{\"a\"}" } },
    { "{\"type\":\"object\",\"properties\":{}}", { "{}" }, { "{\"a\": 1}" } },
    { "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"null\"},\"b\":{\"type\":\"null\"},\"c\":{"
      "\"type\":\"null\"}},\"required\":[\"b\"]}",
      { "{\"b\": null}", "{\"a\":null,\"b\":null}", "{\"a\": null,\n  \"b\": null, \"c\": null }" },
      { "{}", "{\"a\": null}", "{\"b\":null,\"a\":null}", "{,\"b\":null}", "{\"b\":null,}" } },
    { "{\"type\":\"object\",\"properties\":{\"ab\":{\"type\":\"null\"},\"a\":{\"type\":\"null\"}},"
      "\"additionalProperties\":{\"type\":\"integer\"}}",
      { "{}", "{\"a\":null}", "{\"ab\":null,\"a\":null,\"abc\":1,\"\":2}", "{\"b\":1}" },
      { "{\"a\":1}", "{\"ab\":1}", "{\"\\u0061\":1}", "{\"b\":null}" } },
    { "{\"type\":\"object\",\"required\":[\"z\"],\"additionalProperties\":true}",
      { "{\"z\": 1, \"y\": 2}" },
      { "{}", "{\"y\": 2}" } },
    { "{\"type\":\"object\",\"minProperties\":1,\"maxProperties\":2}",
      { "{\"a\":1}", "{\"a\":1,\"b\":2}" },
      { "{}", "{\"a\":1,\"b\":2,\"c\":3}" } },
    { "{\"type\":\"object\",\"patternProperties\":{\"^x\":{\"type\":\"integer\"}},\"properties\":{\"a\":{"
      "\"const\":1}}}",
      { "{\"a\":1,\"x1\":2}", "{\"x\":1}" },
      { "{\"y\":1}", "{\"x\":\"\"}" } },
    { "{\"type\":\"object\",\"propertyNames\":{\"enum\":[\"a\",\"b\"]},\"additionalProperties\":{\"type\":"
      "\"integer\"}}",
      { "{\"a\":1}" },
      { "{\"c\":1}" } },
    { "{\"type\":\"array\",\"items\":{\"type\":\"integer\"},\"minItems\":1,\"maxItems\":3}",
      { "[1]", "[1, 2,3]", "[\n  1,\n  2\n]" },
      { "[]", "[1,2,3,4]", "[1,]" } },
    { "{\"type\":\"array\",\"prefixItems\":[{\"const\":1},{\"const\":2}]}",
      { "[]", "[1]", "[1,2]" },
      { "[2]", "[1,2,3]" } },
    { "{\"type\":\"array\",\"prefixItems\":[{\"const\":1},{\"const\":2}],\"items\":{\"const\":3},"
      "\"minItems\":2,\"maxItems\":4}",
      { "[1,2]", "[1,2,3,3]" },
      { "[1]", "[1,2,3,3,3]" } },
    { "{\"type\":\"array\",\"maxItems\":0}", { "[]" }, { "[1]" } },
    { "{\"enum\":[\"a\",\"ab\",1,null,{\"x\":[1.5]}]}",
      { "\"a\"", "\"ab\"", "1", "null", "{\"x\": [1.5]}" },
      { "\"\"", "2", "a" } },
    { "{\"enum\":[\"a\",1],\"type\":\"integer\"}", { "1" }, { "\"a\"" } },
    { "{\"const\":\"q\\\"\\n\"}", { "\"q\\\"\\n\"" }, { "\"q\"" } },
    { "{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}",
      { "\"ab\"", "\"\\n\\u20ac\"", "\"\u20ac\U0001f600a\"", "\"\\ud83d\\ude00a\"" },
      { "\"a\"", "\"abcd\"", "\"\\ud83d\"" } },
    { "{\"type\":\"string\",\"pattern\":\"a.c\"}",
      { "\"xxabcyy\"", "\"a\\\"c\"" },
      { "\"ac\"", "\"a\\nc\"" } },
    { "{\"type\":\"string\",\"pattern\":\"^(ab|c)$\"}", { "\"ab\"", "\"c\"" }, { "\"xc\"", "\"abc\"" } },
    { "{\"type\":\"string\",\"format\":\"date\"}",
      { "\"2024-02-29\"", "\"2026-12-31\"" },
      { "\"2023-02-29\"", "\"2026-13-01\"", "\"0000-01-01\"", "\"1900-02-29\"" } },
    { "{\"type\":\"string\",\"format\":\"date-time\"}",
      { "\"2026-01-02T03:04:05Z\"", "\"2026-01-02T03:04:05.123+01:00\"" },
      { "\"2026-01-02 03:04:05Z\"", "\"2026-01-02T24:00:00Z\"" } },
    { "{\"type\":\"string\",\"format\":\"ipv4\"}",
      { "\"127.0.0.1\"", "\"255.255.255.255\"" },
      { "\"256.0.0.1\"", "\"01.0.0.1\"", "\"1.2.3\"" } },
    { "{\"type\":\"string\",\"format\":\"ipv6\"}",
      { "\"::1\"", "\"1:2:3:4:5:6:7:8\"", "\"fe80::\"" },
      { "\"1::2::3\"", "\"1:2:3:4:5:6:7\"" } },
    { "{\"type\":\"string\",\"format\":\"uuid\"}",
      { "\"123e4567-e89b-12d3-a456-426614174000\"" },
      { "\"123e4567-e89b-12d3-a456-42661417400\"" } },
    { "{\"type\":\"string\",\"format\":\"email\"}", { "\"me@x.org\"" }, { "\"me@x\"", "\"@x.org\"" } },
    { "{\"type\":\"string\",\"format\":\"uri\"}",
      { "\"https://x.org/a?b=c#d\"" },
      { "\"x.org\"", "\"https://x y\"" } },
    { "{\"type\":\"integer\"}",
      { "0", "-12", "123456789012345678" },
      { "01", "-0", "1.0", "1e3", "1234567890123456789" } },
    { "{\"type\":\"integer\",\"minimum\":-5,\"maximum\":123}",
      { "-5", "0", "99", "123" },
      { "-6", "124", "1000", "00" } },
    { "{\"type\":\"integer\",\"exclusiveMinimum\":9,\"exclusiveMaximum\":11}", { "10" }, { "9", "11" } },
    { "{\"type\":\"integer\",\"minimum\":9223372036854775806}",
      { "9223372036854775806", "9223372036854775807" },
      { "9223372036854775805", "9223372036854775808" } },
    { "{\"type\":\"integer\",\"maximum\":-9223372036854775807}",
      { "-9223372036854775808" },
      { "-9223372036854775806", "-9223372036854775809" } },
    { "{\"type\":\"integer\",\"minimum\":0.5,\"maximum\":2.5}", { "1", "2" }, { "0", "3" } },
    { "{\"type\":\"integer\",\"multipleOf\":7}", { "0", "-7", "49", "700000007" }, { "1", "48" } },
    { "{\"type\":\"integer\",\"multipleOf\":1000000,\"minimum\":0,\"maximum\":5000000}",
      { "0", "5000000" },
      { "1", "6000000" } },
    { "{\"type\":\"number\",\"minimum\":0.1,\"exclusiveMaximum\":2.5}",
      { "0.1", "0.10", "0.11", "1", "2.4999", "2" },
      { "0", "0.09", "2.5", "2.50", "3", "1e0" } },
    { "{\"type\":\"number\",\"minimum\":-1.5,\"maximum\":-0.25}",
      { "-1.5", "-0.25", "-1", "-0.3" },
      { "-1.51", "-0.2", "0", "-0.0" } },
    { "{\"type\":\"number\",\"exclusiveMinimum\":0}", { "0.001", "12.5" }, { "0", "-0.0", "-1" } },
    { "{\"type\":\"number\",\"minimum\":-1,\"maximum\":0}",
      { "-0", "-0.0", "0", "-1.0" },
      { "0.1", "-1.1" } },
    { "{\"type\":\"number\",\"minimum\":-1,\"exclusiveMaximum\":0}", { "-0.1" }, { "-0", "0", "-0.0" } },
    { "{\"type\":\"number\",\"multipleOf\":0.01}", { "1.25", "3", "-0.5" }, { "1.255" } },
    { "{\"type\":[\"integer\",\"null\"]}", { "1", "null" }, { "1.5", "\"\"" } },
    { "{\"type\":\"string\",\"nullable\":true,\"maxLength\":0}", { "null", "\"\"" }, { "\"a\"" } },
    { "{\"anyOf\":[{\"type\":\"integer\"},{\"const\":\"x\"}]}", { "1", "\"x\"" }, { "\"y\"" } },
    { "{\"type\":\"object\",\"properties\":{\"a\":{\"const\":1},\"b\":{\"const\":2}},\"anyOf\":[{"
      "\"required\":[\"a\"]},{\"required\":[\"b\"]}]}",
      { "{\"a\":1}", "{\"b\":2}", "{\"a\":1,\"b\":2}" },
      { "{}" } },
    { "{\"allOf\":[{\"type\":\"integer\",\"minimum\":3},{\"maximum\":5,\"minimum\":1}]}",
      { "3", "5" },
      { "2", "6" } },
    { "{\"allOf\":[{\"properties\":{\"a\":{\"type\":\"integer\"}}},{\"properties\":{\"a\":{\"minimum\":2},"
      "\"b\":{\"const\":0}},\"required\":[\"a\"]}]}",
      { "{\"a\":2}", "{\"a\":3,\"b\":0}" },
      { "{\"a\":1}", "{}" } },
    { "{\"allOf\":[{\"properties\":{\"a\":true},\"additionalProperties\":false},{\"properties\":{\"b\":true}}"
      "]}",
      { "{}", "{\"a\":1}" },
      { "{\"b\":1}" } },
    { "{\"allOf\":[{\"enum\":[1,2,3]},{\"enum\":[2.0,3,4]}]}", { "2", "3" }, { "1", "4" } },
    { TAGGED,
      { "{\"k\":\"a\",\"x\":1}", "{\"k\":\"b\"}", "null" },
      { "{\"k\":\"a\"}", "{\"k\":\"b\",\"x\":1}", "{\"k\":\"c\"}" } },
    { NODE,
      { "{\"v\":1,\"next\":null}", "{\"v\":1,\"next\":{\"v\":2,\"next\":{\"v\":3,\"next\":null}}}" },
      { "{\"v\":1}", "{\"v\":1,\"next\":{}}" } },
    { "{\"$ref\":\"#/definitions/a~1b%25\",\"definitions\":{\"a/b%\":{\"const\":1}}}", { "1" }, { "2" } },
    { "{\"$ref\":\"#/$defs/i\",\"minimum\":5,\"$defs\":{\"i\":{\"type\":\"integer\"}}}", { "5" }, { "4" } },
    { "{\"properties\":{\"a\":{\"type\":\"integer\"}}}", { "{}", "{\"a\":1}" }, { "1", "{\"a\":\"\"}" } },
    { "{\"type\":\"object\",\"properties\":{\"a\":false,\"b\":true}}", { "{\"b\":1}" }, { "{\"a\":1}" } },
};

static void test_values(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct grammar *g = schema_grammar(cases[i].schema);
        check_texts(g, cases[i].schema, cases[i].yes, cases[i].no, 6);
        grammar_free(g);
    }
}

static void test_masks(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct grammar *g = schema_grammar(cases[i].schema);
        check_random_walks(g, cases[i].schema, 3, 25);
        grammar_free(g);
    }
    static const char *const lengths[] = { "{\"type\":\"string\",\"maxLength\":39}",
                                           "{\"type\":\"string\",\"maxLength\":200}",
                                           "{\"type\":\"string\",\"minLength\":5}",
                                           "{\"type\":\"string\",\"minLength\":50,\"maxLength\":60}" };
    for (size_t i = 0; i < 4; i++) {
        struct grammar *g = schema_grammar(lengths[i]);
        check_random_walks(g, lengths[i], 10, 40);
        grammar_free(g);
    }
}

static void test_messages(void **state)
{
    (void)state;
    static const struct {
        const char *schema, *text;
    } refused[] = {
        { "3", "schema, #: 'schema' must be an object or a boolean" },
        { "false", "no text matches: its parts contradict each other, or never end" },
        { "{\"type\":\"int\"}", "schema, #: 'type' must be null, boolean, integer, number, string, array or "
                                "object, or a list of these" },
        { "{\"type\":\"object\",\"properties\":{\"a\":{\"items\":{\"not\":{}}}}}",
          "schema, #/properties/a/items: 'not' is not supported" },
        { "{\"if\":{},\"type\":\"string\"}", "schema, #: 'if' is not supported" },
        { "{\"unevaluatedProperties\":false}", "schema, #: 'unevaluatedProperties' is not supported" },
        { "{\"type\":\"array\",\"contains\":{}}", "schema, #: 'contains' is not supported" },
        { "{\"type\":\"array\",\"uniqueItems\":true}",
          "schema, #: 'uniqueItems' is not supported: a grammar cannot compare items" },
        { "{\"type\":\"array\",\"items\":[{}]}",
          "schema, #: 'items' as a list is prefixItems today: write that" },
        { "{\"type\":\"array\",\"minItems\":-1}",
          "schema, #: 'minItems' must be an integer from 0 to 2147483647" },
        { "{\"type\":\"array\",\"minItems\":100000}", "a repetition of 99999 is over the limit of 65536" },
        { "{\"type\":\"string\",\"format\":\"regex\"}",
          "schema, #: 'format' of 'regex' is not supported: date, time, date-time, uuid, email, hostname, "
          "ipv4, ipv6, uri are" },
        { "{\"type\":\"string\",\"pattern\":\"(?=a)\"}",
          "schema, #: 'pattern': regular expression, offset 0: look-around, flags and references are not "
          "supported" },
        { "{\"type\":\"string\",\"pattern\":\"a{,2}\"}",
          "schema, #: 'pattern': regular expression, offset 1: {,m} means different things: write {0,m}" },
        { "{\"type\":\"string\",\"pattern\":\"a\",\"minLength\":2}",
          "schema, #: 'pattern' beside minLength or maxLength is not supported: put the length into the "
          "pattern" },
        { "{\"type\":\"string\",\"pattern\":\"a\",\"format\":\"date\"}",
          "schema, #: 'format' beside pattern is not supported: leave one out" },
        { "{\"type\":\"string\",\"maxLength\":70000}", "a repetition of 70000 is over the limit of 65536" },
        { "{\"enum\":[\"a\"],\"maxLength\":1}",
          "schema, #: 'maxLength' beside enum or const is not supported" },
        { "{\"enum\":[]}", "no text matches: its parts contradict each other, or never end" },
        { "{\"type\":\"integer\",\"minimum\":3,\"maximum\":2}",
          "no text matches: its parts contradict each other, or never end" },
        { "{\"type\":\"integer\",\"minimum\":\"3\"}", "schema, #: 'minimum' must be a number" },
        { "{\"type\":\"integer\",\"minimum\":3,\"exclusiveMinimum\":true}",
          "schema, #: 'exclusiveMinimum' must be a number" },
        { "{\"type\":\"integer\",\"multipleOf\":0}", "schema, #: 'multipleOf' must be over 0" },
        { "{\"type\":\"integer\",\"multipleOf\":0.3}",
          "schema, #: 'multipleOf' must be an integer or, of numbers, 0.1, 0.01 and so on" },
        { "{\"type\":\"integer\",\"multipleOf\":7,\"minimum\":5}",
          "schema, #: 'multipleOf' beside bounds allows more than 20000 values: narrow the bounds" },
        { "{\"type\":\"integer\",\"multipleOf\":1001}",
          "schema, #: 'multipleOf' over 1000 needs bounds on both sides" },
        { "{\"type\":\"number\",\"minimum\":1e16}",
          "schema, #: 'minimum, maximum' beyond 1e15 are supported for integers only" },
        { "{\"type\":\"number\",\"minimum\":1e-17}",
          "schema, #: 'minimum, maximum' with more than 15 digits are supported for integers only" },
        { "{\"$ref\":\"http://x.org/s\"}",
          "schema, #: '$ref' to 'http://x.org/s' is not supported: only #/... into this schema is" },
        { "{\"$ref\":\"#/$defs/x\"}", "schema, #: '$ref' to '#/$defs/x' leads nowhere" },
        { "{\"$ref\":\"#\"}",
          "'#' begins with itself (left recursion): put something before it, or write a repetition" },
        { "{\"allOf\":[{\"$ref\":\"#\"}]}",
          "schema, #: $ref and allOf lead to each other without end, or too far" },
        { "{\"anyOf\":[{\"$ref\":\"#\"},{\"type\":\"null\"}]}",
          "'#' begins with itself (left recursion): put something before it, or write a repetition" },
        { "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}",
          "no text matches: its parts contradict each other, or never end" },
        { "{\"type\":\"object\",\"required\":[\"a\"],\"properties\":{},\"additionalProperties\":false}",
          "schema, #: 'required' names 'a', which is not among properties" },
        { "{\"type\":\"object\",\"required\":[1]}", "schema, #: 'required' must be a list of strings" },
        { "{\"type\":\"object\",\"properties\":[]}", "schema, #: 'properties' must be an object" },
        { "{\"type\":\"object\",\"properties\":{\"a\":{},\"b\":{}},\"maxProperties\":1}",
          "schema, #: 'maxProperties' beside properties is not supported" },
        { "{\"type\":\"object\",\"minProperties\":2}",
          "schema, #: 'minProperties' over 1 is not supported: a grammar cannot tell whether names differ" },
        { "{\"type\":\"object\",\"properties\":{\"xa\":{}},\"patternProperties\":{\"^x\":{}}}",
          "schema, #: 'patternProperties' matches the property 'xa' as well" },
        { "{\"type\":\"object\",\"patternProperties\":{\"^x\":{},\"^y\":{}}}",
          "schema, #: 'patternProperties' must be an object with one pattern: more may contradict each "
          "other" },
        { "{\"type\":\"object\",\"patternProperties\":{\"^x\":{}},\"additionalProperties\":true}",
          "schema, #: 'patternProperties' is supported with additionalProperties absent or false" },
        { "{\"type\":\"object\",\"properties\":{\"a\":{}},\"propertyNames\":{}}",
          "schema, #: 'propertyNames' beside properties is not supported" },
        { "{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"number\"}]}",
          "schema, #: 'oneOf' has parts, 0 and 1, that may allow the same value: use anyOf, or tell them "
          "apart by type, by a const or by a required property" },
        { "{\"anyOf\":[{}],\"oneOf\":[{}]}", "schema, #: 'anyOf' beside oneOf is not supported" },
        { "{\"anyOf\":[]}", "schema, #: 'anyOf' must be a list" },
        { "{\"allOf\":[{\"pattern\":\"a\"},{\"pattern\":\"b\"}]}",
          "schema, #: 'allOf' cannot merge two different 'pattern'" },
        { "{\"items\":{\"$id\":\"x\"}}", "schema, #/items: '$id' is supported at the root only" },
        { "{\"nonsense\":1}", "schema, #: 'nonsense' is not supported" },
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        struct grammar *g;
        struct err e = { 0 };
        json_t *schema = json_loads(refused[i].schema, JSON_DECODE_ANY, NULL);
        assert_non_null(schema);
        if (grammar_from_schema(&g, schema, &e)) fail_msg("accepted: %s", refused[i].schema);
        assert_null(g);
        assert_string_equal(e.text, refused[i].text);
        json_decref(schema);
    }
}

/* Deep, wide and doubling schemas: compiled or refused over a limit, soon. */
static void test_killers(void **state)
{
    (void)state;
    struct grammar *g;
    struct err e = { 0 };
    json_t *deep = json_object();
    for (int i = 0; i < 3000; i++) deep = json_pack("{s:s,s:o}", "type", "array", "items", deep);
    assert_false(grammar_from_schema(&g, deep, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    json_decref(deep);
    json_t *defs = json_object(); /* each allOf twice the next */
    char name[16], ref[32];
    for (int i = 0; i < 40; i++) {
        snprintf(name, sizeof name, "d%d", i);
        snprintf(ref, sizeof ref, "#/$defs/d%d", i + 1);
        json_object_set_new(defs, name, json_pack("{s:[{s:s},{s:s}]}", "allOf", "$ref", ref, "$ref", ref));
    }
    json_object_set_new(defs, "d40", json_pack("{s:s}", "type", "integer"));
    json_t *doubling = json_pack("{s:s,s:o}", "$ref", "#/$defs/d0", "$defs", defs);
    assert_false(grammar_from_schema(&g, doubling, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    json_decref(doubling);
    json_t *properties = json_object();
    for (int i = 0; i < 3000; i++) {
        snprintf(name, sizeof name, "p%d", i);
        json_object_set_new(properties, name, json_pack("{s:s}", "type", "string"));
    }
    json_t *wide =
        json_pack("{s:s,s:o,s:b}", "type", "object", "properties", properties, "additionalProperties", 1);
    if (!grammar_from_schema(&g, wide, &e)) fail_msg("%s", e.text);
    assert_true(accepts(g, "{\"p7\":\"a\",\"p2999\":\"\",\"p3000\":1}"));
    assert_false(accepts(g, "{\"p2999\":\"\",\"p7\":\"\"}"));
    grammar_free(g);
    json_decref(wide);
    json_t *values = json_array();
    for (int i = 0; i < 20000; i++) {
        snprintf(name, sizeof name, "%d", i * 7919);
        json_array_append_new(values, json_string(name));
    }
    json_t *large = json_pack("{s:o}", "enum", values);
    if (!grammar_from_schema(&g, large, &e)) fail_msg("%s", e.text);
    assert_true(accepts(g, "\"7919\""));
    assert_false(accepts(g, "\"7918\""));
    grammar_free(g);
    json_decref(large);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_values), cmocka_unit_test(test_masks),
                                        cmocka_unit_test(test_messages), cmocka_unit_test(test_killers) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
