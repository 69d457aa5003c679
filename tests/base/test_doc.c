/* JSON documents: what is refused and in which words. */
#include "base/doc.h"
#include <stdio.h>
#include <unistd.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static json_t *parse(const char *text)
{
    json_t *v;
    struct err e = { 0 };
    if (!doc_parse(&v, text, strlen(text), &e)) fail_msg("%s", e.text);
    return v;
}

/* The message must start with `want`: what follows is the JSON library's wording. */
static void refuse(const char *text, size_t bytes, const char *want)
{
    json_t *v = (json_t *)&v;
    struct err e = { 0 };
    assert_false(doc_parse(&v, text, bytes, &e));
    assert_null(v);
    assert_int_equal(e.code, ERR_FORMAT);
    if (strncmp(e.text, want, strlen(want)) != 0) fail_msg("%s\nwanted %s", e.text, want);
}

static void test_parse(void **state)
{
    (void)state;
    static const char *const good[] = { "{}",  " [1, 2.5, \"x\", null, true] ", "3", "\"a\\u0000b\"", "null",
                                        "-0.5" };
    static const char *const bad[] = { "",
                                       " ",
                                       "{",
                                       "{} {}",
                                       "[1,]",
                                       "{\"a\":}",
                                       "nul",
                                       "[01]",
                                       "'a'",
                                       "{a:1}",
                                       "\"\\q\"",
                                       "\"\\ud800\"",
                                       "[1e999]",
                                       "]",
                                       "\"a\nb\"",
                                       "[NaN]",
                                       "12345678901234567890" };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) json_decref(parse(good[i]));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) refuse(bad[i], strlen(bad[i]), "JSON: ");
    refuse("[1] \0", 5, "JSON: ");
    refuse("[\"\xff\"]", 5, "JSON: unable to decode byte 0xff");
    refuse("[\"\xc0\x80\"]", 6, "JSON: ");
    refuse("{\"a\":1,\"b\":2,\"a\":1}", 19, "JSON: duplicate object key");
    refuse("{\n  \"a\": x}", 11, "JSON: invalid token near 'x' (line 2, byte 10)");
}

/* `depth` openings, a scalar, as many closings; brackets alternate. */
static char *nested(size_t depth)
{
    static const char open_object[] = "{\"[\\\"\":";
    char *text = calloc(depth + 1, sizeof open_object + 1), *p = text;
    assert_non_null(text);
    for (size_t i = 0; i < depth; i++) p = stpcpy(p, i % 2 ? open_object : "[");
    *p++ = '0';
    for (size_t i = depth; i-- > 0;) *p++ = i % 2 ? '}' : ']';
    return text;
}

static void test_depth(void **state)
{
    (void)state;
    static const size_t refused[] = { 65, 66, 2048, 100000 };
    char *text = nested(64);
    json_decref(parse(text));
    free(text);
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        text = nested(refused[i]);
        refuse(text, strlen(text), "JSON nested deeper than 64");
        free(text);
    }
}

/* Many brackets side by side or inside strings are not deep. */
static void test_shallow(void **state)
{
    (void)state;
    enum { N = 1000 };
    char text[3 * N + 64] = "[\"", *p = text + 2;
    for (int i = 0; i < N; i++) *p++ = "[{"[i % 2];
    p = stpcpy(p, "\\\\\"");
    for (int i = 0; i < N / 2; i++) p = stpcpy(p, ",[]");
    strcpy(p, "]");
    json_t *v = parse(text);
    assert_int_equal(json_array_size(v), N / 2 + 1);
    json_decref(v);
}

static void expect(bool ok, const struct err *e, const char *want)
{
    assert_false(ok);
    assert_int_equal(e->code, ERR_FORMAT);
    assert_string_equal(e->text, want);
}

static const char fields[] =
    "{\"int\": 7, \"real\": 0.5, \"text\": \"abc\", \"nul\": \"a\\u0000b\", \"yes\": true, "
    "\"no\": false, \"null\": null, \"list\": [], \"object\": {}}";

static void test_required(void **state)
{
    (void)state;
    json_t *o = parse(fields);
    struct err e = { 0 };
    int64_t i = 0;
    double d = 0;
    const char *s = NULL;
    assert_true(doc_int(&i, o, "", "int", 7, 7, &e) && i == 7);
    assert_true(doc_number(&d, o, "", "real", &e) && d == 0.5);
    assert_true(doc_number(&d, o, "", "int", &e) && d == 7);
    assert_true(doc_string(&s, o, "", "text", &e));
    assert_string_equal(s, "abc");
    json_decref(o);
}

static void test_required_messages(void **state)
{
    (void)state;
    json_t *o = parse(fields);
    struct err e = { 0 };
    int64_t i;
    double d;
    const char *s;
    expect(doc_int(&i, o, "a.b", "absent", 0, 9, &e), &e, "a.b.absent: expected an integer, found absent");
    expect(doc_int(&i, o, "", "real", 0, 9, &e), &e, "real: expected an integer, found a number");
    expect(doc_int(&i, o, "", "text", 0, 9, &e), &e, "text: expected an integer, found a string");
    expect(doc_int(&i, o, "", "yes", 0, 9, &e), &e, "yes: expected an integer, found true");
    expect(doc_int(&i, o, "", "no", 0, 9, &e), &e, "no: expected an integer, found false");
    expect(doc_int(&i, o, "", "null", 0, 9, &e), &e, "null: expected an integer, found null");
    expect(doc_int(&i, o, "", "list", 0, 9, &e), &e, "list: expected an integer, found an array");
    expect(doc_int(&i, o, "", "object", 0, 9, &e), &e, "object: expected an integer, found an object");
    expect(doc_int(&i, o, "c", "int", 8, 9, &e), &e, "c.int: expected 8 to 9, found 7");
    expect(doc_int(&i, o, "", "int", -3, 6, &e), &e, "int: expected -3 to 6, found 7");
    expect(doc_number(&d, o, "", "text", &e), &e, "text: expected a number, found a string");
    expect(doc_number(&d, o, "", "absent", &e), &e, "absent: expected a number, found absent");
    expect(doc_string(&s, o, "", "int", &e), &e, "int: expected a string, found an integer");
    expect(doc_string(&s, o, "c", "nul", &e), &e, "c.nul: a string with a NUL inside");
    expect(doc_int(&i, NULL, "", "int", 0, 9, &e), &e, "int: expected an integer, found absent");
    json_decref(o);
}

static void test_optional(void **state)
{
    (void)state;
    json_t *o = parse(fields);
    struct err e = { 0 };
    int64_t i = 42;
    double d = 4.5;
    bool b = true;
    static const char *const missing[] = { "absent", "null" };
    for (int k = 0; k < 2; k++) {
        assert_true(doc_int_or(&i, o, "", missing[k], 0, 1, &e) && i == 42);
        assert_true(doc_number_or(&d, o, "", missing[k], &e) && d == 4.5);
        assert_true(doc_bool_or(&b, o, "", missing[k], &e) && b);
    }
    assert_true(doc_bool_or(&b, o, "", "no", &e) && !b);
    assert_true(doc_bool_or(&b, o, "", "yes", &e) && b);
    assert_true(doc_int_or(&i, o, "", "int", 0, 9, &e) && i == 7);
    assert_true(doc_number_or(&d, o, "", "real", &e) && d == 0.5);
    expect(doc_int_or(&i, o, "", "int", 0, 6, &e), &e, "int: expected 0 to 6, found 7");
    expect(doc_number_or(&d, o, "", "list", &e), &e, "list: expected a number, found an array");
    expect(doc_bool_or(&b, o, "x", "int", &e), &e, "x.int: expected true or false, found an integer");
    json_decref(o);
}

static void test_load(void **state)
{
    (void)state;
    char path[] = "/tmp/quench-doc-XXXXXX", want[256];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, "{\"a\": 1}", 8), 8);
    json_t *v;
    struct err e = { 0 };
    assert_true(doc_load(&v, path, 8, &e));
    assert_int_equal(json_integer_value(json_object_get(v, "a")), 1);
    json_decref(v);
    assert_false(doc_load(&v, path, 7, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    assert_null(v);
    assert_int_equal(write(fd, "]", 1), 1);
    assert_false(doc_load(&v, path, 100, &e));
    snprintf(want, sizeof want, "%s: JSON: end of file expected near ']' (line 1, byte 9)", path);
    assert_string_equal(e.text, want);
    close(fd);
    unlink(path);
    assert_false(doc_load(&v, path, 100, &e));
    assert_int_equal(e.code, ERR_IO);
    assert_null(v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parse),    cmocka_unit_test(test_depth),
        cmocka_unit_test(test_shallow),  cmocka_unit_test(test_required),
        cmocka_unit_test(test_optional), cmocka_unit_test(test_required_messages),
        cmocka_unit_test(test_load),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
