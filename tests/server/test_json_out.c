/* The writer: what it writes is JSON that says the same. */
#include "server/json_out.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static json_t *parsed(const struct json_out *o)
{
    json_error_t e;
    assert_false(o->failed);
    json_t *v = json_loadb(o->data, o->n, JSON_DECODE_ANY | JSON_ALLOW_NUL, &e);
    if (!v) fail_msg("%s: %.*s", e.text, (int)o->n, o->data);
    return v;
}

static void test_strings(void **state)
{
    (void)state;
    struct json_out o = { 0 };
    char all[200];
    size_t n = 0;
    for (int c = 0; c < 128; c++) all[n++] = (char)c;
    n += (size_t)sprintf(all + n, "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xe2\x80\xa8");
    json_out_string(&o, all, n);
    json_t *v = parsed(&o);
    assert_int_equal(json_string_length(v), n);
    assert_memory_equal(json_string_value(v), all, n);
    json_decref(v);
    json_out_deinit(&o);
}

static void test_floats(void **state)
{
    (void)state;
    struct json_out o = { 0 };
    srand(3);
    for (int i = 0; i < 200000; i++) {
        union {
            unsigned bits;
            float f;
        } u = { .bits = (unsigned)rand() * 2u + (unsigned)(rand() & 1) };
        json_out_clear(&o);
        json_out_float(&o, u.f);
        json_t *v = parsed(&o);
        assert_true(json_is_real(v));
        assert_true((float)json_real_value(v) == (isfinite(u.f) ? u.f : -9999.0f));
        json_decref(v);
    }
    json_out_deinit(&o);
}

static void test_structure(void **state)
{
    (void)state;
    struct json_out o = { 0 };
    json_t *inner = json_pack("{s:[i,b,n], s:s}", "a", 1, 1, "b", "x"), *want;
    json_out_open(&o, '{');
    json_out_key_open(&o, "list", '[');
    json_out_int(&o, INT64_MIN);
    json_out_bool(&o, false);
    json_out_null(&o);
    json_out_open(&o, '[');
    json_out_close(&o, ']');
    json_out_value(&o, inner);
    json_out_close(&o, ']');
    json_out_key_text(&o, "none", NULL);
    json_out_key_value(&o, "inner", inner);
    json_out_close(&o, '}');
    json_t *v = parsed(&o);
    want = json_pack("{s:[I,b,n,[],O], s:n, s:O}", "list", (json_int_t)INT64_MIN, 0, inner, "none", "inner",
                     inner);
    assert_true(json_equal(v, want));
    json_decref(v);
    json_decref(want);
    json_decref(inner);
    json_out_deinit(&o);
}

/* Values come back as they were, with as few digits as do. */
static void test_values(void **state)
{
    (void)state;
    static const char *const texts[] = {
        "[0.1,1.0,-2.5,1e+300,123456789012345,0.30000000000000004,true,false,null]",
        "{\"a\":{\"b\":[]},\"c\\n\":\"\xc3\xa9\\u0000\"}", "7", "\"x\""
    };
    struct json_out o = { 0 };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        json_t *v = json_loads(texts[i], JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        assert_non_null(v);
        json_out_clear(&o);
        json_out_value(&o, v);
        json_out_raw(&o, "", 1);
        assert_string_equal(o.data, texts[i]);
        json_decref(v);
    }
    json_out_deinit(&o);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_strings), cmocka_unit_test(test_floats),
                                        cmocka_unit_test(test_structure), cmocka_unit_test(test_values) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
