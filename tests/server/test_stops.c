/* Stop strings: against a plain search, however the text is cut. */
#include "server/stops.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* The string that is complete first, of several the longest; where the text ends. */
static int search(const char *text, size_t n, const struct stop_string *s, int n_strings, size_t *end)
{
    for (size_t i = 1; i <= n; i++) {
        int found = -1;
        for (int k = 0; k < n_strings; k++)
            if (s[k].n <= i && memcmp(text + i - s[k].n, s[k].text, s[k].n) == 0 &&
                (found < 0 || s[k].n > s[found].n))
                found = k;
        if (found < 0) continue;
        *end = i - s[found].n;
        return found;
    }
    *end = n;
    return -1;
}

static void check(const char *text, size_t n, const struct stop_string *strings, int n_strings, size_t piece)
{
    struct stops *s;
    struct err e;
    char got[64];
    const char *out;
    size_t have = 0, end;
    int found = -1, want = search(text, n, strings, n_strings, &end);
    assert_true(stops_create(&s, strings, n_strings, &e));
    for (size_t at = 0; at < n && found < 0; at += piece) {
        size_t certain = stops_push(s, text + at, piece < n - at ? piece : n - at, &out, &found);
        memcpy(got + have, out, certain);
        have += certain;
        /* Nothing is held back but what may begin a stop string. */
        if (found < 0)
            for (size_t held = at + (piece < n - at ? piece : n - at) - have; held > 0; held = 0) {
                bool begins = false;
                for (int k = 0; k < n_strings; k++)
                    begins |= strings[k].n > held && memcmp(strings[k].text, text + have, held) == 0;
                assert_true(begins);
            }
    }
    if (found < 0) {
        size_t certain = stops_finish(s, &out);
        memcpy(got + have, out, certain);
        have += certain;
    }
    assert_int_equal(found, want);
    assert_int_equal(have, end);
    assert_memory_equal(got, text, have);
    stops_free(s);
}

static void test_random(void **state)
{
    (void)state;
    srand(7);
    for (int round = 0; round < 20000; round++) {
        char text[40], words[3][6];
        struct stop_string strings[3];
        size_t n = 1 + (size_t)rand() % 39;
        int n_strings = 1 + rand() % 3;
        for (size_t i = 0; i < n; i++) text[i] = (char)('a' + rand() % 2);
        for (int k = 0; k < n_strings; k++) {
            strings[k] = (struct stop_string){ words[k], 1 + (size_t)rand() % 6 };
            for (size_t i = 0; i < strings[k].n; i++) words[k][i] = (char)('a' + rand() % 2);
        }
        check(text, n, strings, n_strings, 1 + (size_t)rand() % 5);
    }
}

/* While no stop may be found, nothing is held back; what came then is no part of one. */
static void test_pass(void **state)
{
    (void)state;
    const struct stop_string string = { "ab", 2 };
    struct stops *s;
    struct err e;
    const char *out;
    int found;
    assert_true(stops_create(&s, &string, 1, &e));
    assert_int_equal(stops_pass(s, "xa", 2, &out), 2);
    assert_int_equal(stops_push(s, "bb", 2, &out, &found), 2);
    assert_int_equal(found, -1);
    assert_int_equal(stops_push(s, "a", 1, &out, &found), 0);
    assert_int_equal(stops_push(s, "b", 1, &out, &found), 0);
    assert_int_equal(found, 0);
    stops_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_random), cmocka_unit_test(test_pass) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
