/* The template interpreter against Jinja2's output for each construct, what it refuses and with which words,
 * and its limits. tools/test_chat_template.py compares many more. */
#include "tokenizer/jinja/jinja.h"
#include "base/doc.h"
#include "base/file.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* Renders; *text is malloc'd, NULL after an error. */
static void render(char **text, const char *source, const json_t *given, const struct jinja_limits *limits,
                   struct err *e)
{
    struct jinja_variable variables[32];
    struct jinja *t;
    size_t n = 0, bytes;
    json_t *o = (json_t *)given;
    *e = (struct err){ 0 };
    *text = NULL;
    for (void *it = json_object_iter(o); it; it = json_object_iter_next(o, it))
        variables[n++] = (struct jinja_variable){ json_object_iter_key(it), json_object_iter_value(it) };
    if (!jinja_create(&t, source, strlen(source), e)) return;
    jinja_render(text, &bytes, t, variables, n, limits, e);
    jinja_free(t);
}

static void check_case(const json_t *c, const json_t *variables)
{
    const char *source = json_string_value(json_object_get(c, "template"));
    const char *want = json_string_value(json_object_get(c, "text"));
    const char *own_words = json_string_value(json_object_get(c, "error"));
    struct err e;
    char *got;
    render(&got, source, variables, NULL, &e);
    if (!got != !want) fail_msg("%s\n%s", source, got ? got : e.text);
    if (want && strcmp(got, want) != 0) fail_msg("%s\n  found  %s\n  wanted %s", source, got, want);
    if (own_words) assert_string_equal(e.text, own_words);
    if (!want) assert_true(e.code != ERR_NONE && *e.text);
    free(got);
}

static void test_golden_cases(void **state)
{
    (void)state;
    json_t *all;
    struct err e = { 0 };
    if (!doc_load(&all, "tests/golden/jinja_cases.json", 1 << 20, &e)) fail_msg("%s", e.text);
    const json_t *cases = json_object_get(all, "cases");
    for (size_t i = 0; i < json_array_size(cases); i++)
        check_case(json_array_get(cases, i), json_object_get(all, "variables"));
    assert_true(json_array_size(cases) > 100);
    json_decref(all);
}

static void test_messages(void **state)
{
    (void)state;
    static const struct {
        const char *source, *error;
        enum err_code code;
    } cases[] = {
        { "a\n\n{% include 'x' %}", "line 3: the tag 'include' is not supported", ERR_UNSUPPORTED },
        { "{% extends 'x' %}", "line 1: the tag 'extends' is not supported", ERR_UNSUPPORTED },
        { "{% call m() %}", "line 1: the tag 'call' is not supported", ERR_UNSUPPORTED },
        { "{% raw %}", "line 1: the tag 'raw' is not supported", ERR_UNSUPPORTED },
        { "\n{{ x | sort }}", "line 2: the filter 'sort' is not supported", ERR_UNSUPPORTED },
        { "{{ x is callable }}", "line 1: the test 'callable' is not supported", ERR_UNSUPPORTED },
        { "{{ x.append(1) }}", "line 1: the method 'append' is not supported", ERR_UNSUPPORTED },
        { "{{ x\n | tojson(sort_keys=true) }}",
          "line 2: the argument 'sort_keys' of the filter 'tojson' is not supported", ERR_UNSUPPORTED },
        { "{{ x() () }}", "line 1: only macros, functions and methods can be called", ERR_UNSUPPORTED },
        { "{{ 2 ** 3 }}", "line 1: the operator '**' is not supported", ERR_UNSUPPORTED },
        { "{% for x in y recursive %}{% endfor %}", "line 1: the loop 'recursive' is not supported",
          ERR_UNSUPPORTED },
        { "{% for x in y %}{% macro m() %}{% endmacro %}{% endfor %}",
          "line 1: a macro inside of a loop or a macro is not supported", ERR_UNSUPPORTED },
        { "{% macro m() %}{{ kwargs }}{% endmacro %}", "line 1: the name 'kwargs' is not supported",
          ERR_UNSUPPORTED },
        { "{{ '\\N{DASH}' }}", "line 1: the escape '\\N' in a string is not supported", ERR_UNSUPPORTED },
        { "{{ f(*x) }}", "line 1: the unpacked argument '*' is not supported", ERR_UNSUPPORTED },
        { "{{ 'a' % 1 }}", "line 1: formatting with % is not supported", ERR_UNSUPPORTED },
        { "{{ 'ß' | upper }}", "line 1: upper and lower case of text outside of ASCII is not supported",
          ERR_UNSUPPORTED },
        { "{% for x in [1] %}{{ loop.depth }}{% endfor %}", "line 1: loop.depth is not supported",
          ERR_UNSUPPORTED },
        { "{% if x %}\n\n", "line 2: 'elif' is missing", ERR_FORMAT },
        { "{% for x in y %}{% endif %}", "line 1: the tag 'endif' is not supported", ERR_UNSUPPORTED },
        { "{{ 1", "line 1: a tag has no end", ERR_FORMAT },
        { "{{ 'x }}", "line 1: a string has no end", ERR_FORMAT },
        { "\n{# x", "line 2: a comment has no end", ERR_FORMAT },
        { "{{ 1 2 }}", "line 1: expected '}}', found '2'", ERR_FORMAT },
        { "{{ 0x10 }}", "line 1: a number that is not plain decimal", ERR_UNSUPPORTED },
        { "{{ 9223372036854775808 }}", "line 1: 9223372036854775808 has over 64 bits", ERR_LIMIT },
        { "{{ '\\ud800' }}", "line 1: a string escapes what is no character", ERR_FORMAT },
        { "{{ $ }}", "line 1: unexpected byte 0x24 in a tag", ERR_FORMAT },
        { "{{ 9223372036854775807 + 1 }}", "line 1: an integer over 64 bits", ERR_LIMIT },
        { "x\n{{ a.b }}", "line 2: 'a' is undefined", ERR_ARGUMENT },
        { "{{ {}.a.b }}", "line 1: 'dict object' has no attribute 'a'", ERR_ARGUMENT },
        { "{{ {'items': 1}.items }}",
          "line 1: '.items' is a method of mappings; for a key of that name write [\"items\"]",
          ERR_ARGUMENT },
        { "{{ raise_exception('Say it.') }}", "Say it.", ERR_ARGUMENT },
        { "\n{{ strftime_now('%Y') }}", "line 2: 'strftime_now' is undefined", ERR_ARGUMENT },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err e;
        char *text;
        render(&text, cases[i].source, NULL, NULL, &e);
        if (text) fail_msg("%s: rendered %s", cases[i].source, text);
        assert_string_equal(e.text, cases[i].error);
        assert_int_equal(e.code, cases[i].code);
    }
}

static void check_limit(const char *source, const char *error)
{
    static const struct jinja_limits small = { .memory = 1 << 20, .steps = 100000 };
    struct err e;
    char *text;
    render(&text, source, NULL, &small, &e);
    if (text) fail_msg("%s: rendered", source);
    assert_string_equal(e.text, error);
    assert_int_equal(e.code, ERR_LIMIT);
}

static void test_limits(void **state)
{
    (void)state;
    check_limit("{% set r = range(1000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
                "line 1: the template takes too many steps");
    check_limit("{% set s = 'x' * 50000 %}{% for a in range(1000) %}{% set t = s ~ s %}{% endfor %}",
                "line 1: the template takes too much memory");
    check_limit("{% set s = 'x' * 50000 %}{% for a in range(1000) %}{{ s }}{% endfor %}",
                "line 1: the text grows over 1048576 bytes");
    check_limit("{{ 'x' * 9223372036854775807 }}", "line 1: the template takes too many steps");
    check_limit("{{ [1] * 9223372036854775807 }}", "line 1: the template takes too much memory");
    check_limit("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "line 1: nested over 500 levels deep");
    check_limit(
        "{% set n = namespace(x=[]) %}{% for i in range(5000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
        "line 1: nested over 500 levels deep");
    check_limit("{{ range(100001) }}",
                "line 1: Range too big. The sandbox blocks ranges larger than 100000.");
    check_limit("{{ 'a' | tojson(indent=1000000) }}", "line 1: tojson: an indent of 0 to 100 is supported");
}

/* n copies of a between n copies of b, in front of `end`. */
static char *nested(const char *a, const char *middle, const char *b, int n)
{
    char *text = malloc((strlen(a) + strlen(b)) * (size_t)n + strlen(middle) + 1), *to = text;
    assert_non_null(text);
    for (int i = 0; i < n; i++) to = stpcpy(to, a);
    to = stpcpy(to, middle);
    for (int i = 0; i < n; i++) to = stpcpy(to, b);
    return text;
}

static void check_nesting(const char *a, const char *middle, const char *b)
{
    struct err e;
    char *text, *source = nested(a, middle, b, 20000);
    render(&text, source, NULL, NULL, &e);
    assert_null(text);
    assert_int_equal(e.code, ERR_LIMIT);
    assert_non_null(strstr(e.text, "nested over"));
    free(source);
}

static void test_nesting(void **state)
{
    (void)state;
    check_nesting("{{ ", "1", " }}");
    check_nesting("{% if 1 %}", "x", "{% endif %}");
}

static void test_deep_expressions(void **state)
{
    (void)state;
    static const char *const parts[][3] = { { "(", "1", ")" },        { "[", "1", "]" },
                                            { "not ", "1", "" },      { "-", "1", "" },
                                            { "1 + ", "1", "" },      { "", "a", ".b" },
                                            { "", "1", " | string" }, { "1 if ", "1", "" },
                                            { "{'a':", "1", "}" },    { "1 and ", "1", "" } };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        char *middle = nested(parts[i][0], parts[i][1], parts[i][2], 20000), *source, *text;
        struct err e;
        assert_true(asprintf(&source, "{{ %s }}", middle) > 0);
        render(&text, source, NULL, NULL, &e);
        assert_null(text);
        assert_true(e.code == ERR_LIMIT || e.code == ERR_FORMAT);
        free(source);
        free(middle);
    }
}

static void test_size(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct jinja *t;
    size_t n = (1 << 20) + 1;
    char *text = malloc(n);
    assert_non_null(text);
    memset(text, 'x', n);
    assert_false(jinja_create(&t, text, n, &e));
    assert_string_equal(e.text, "a template of 1048577 bytes; at most 1048576 are read");
    assert_true(jinja_create(&t, text, n - 1, &e));
    jinja_free(t);
    free(text);
}

/* A loop outlives its pass where a template keeps it. */
static void test_kept_loop(void **state)
{
    (void)state;
    struct err e;
    char *text;
    render(&text,
           "{% set n = namespace() %}{% for x in 'ab' %}{% set n.l = loop %}{% endfor %}{{ n.l.index }}",
           NULL, NULL, &e);
    if (!text) fail_msg("%s", e.text);
    assert_string_equal(text, "3");
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_cases),     cmocka_unit_test(test_messages),
        cmocka_unit_test(test_limits),           cmocka_unit_test(test_nesting),
        cmocka_unit_test(test_deep_expressions), cmocka_unit_test(test_size),
        cmocka_unit_test(test_kept_loop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
