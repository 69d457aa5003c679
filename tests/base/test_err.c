/* Error texts: who found it last, who asked for it first, and never more than fits. */
#include "base/err.h"
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static bool find(struct err *e)
{
    return err_set(e, ERR_FORMAT, "bytes [%d, %d) of %d", 64, 96, 80);
}

static void test_chain(void **state)
{
    (void)state;
    struct err e = { 0 };
    bool ok = find(&e) || err_note(&e, "tensor '%s'", "mtp.fc.weight");
    ok = ok || err_note(&e, "model-%05d.safetensors", 3);
    assert_false(ok);
    assert_int_equal(e.code, ERR_FORMAT);
    assert_string_equal(e.text, "model-00003.safetensors: tensor 'mtp.fc.weight': bytes [64, 96) of 80");
}

static void test_set_replaces(void **state)
{
    (void)state;
    struct err e = { 0 };
    find(&e);
    assert_false(err_set(&e, ERR_LIMIT, "x"));
    assert_int_equal(e.code, ERR_LIMIT);
    assert_string_equal(e.text, "x");
}

static void test_no_listener(void **state)
{
    (void)state;
    assert_false(err_set(NULL, ERR_IO, "%d", 1));
    assert_false(err_note(NULL, "%d", 1));
    assert_false(err_errno(NULL, "x"));
    assert_false(err_memory(NULL, "x", 1));
}

static void test_system_messages(void **state)
{
    (void)state;
    struct err e = { 0 };
    errno = ENOENT;
    assert_false(err_errno(&e, "some/path"));
    assert_int_equal(e.code, ERR_IO);
    assert_string_equal(e.text, "some/path: No such file or directory");
    assert_false(err_memory(&e, "step buffers", 1ull << 40));
    assert_int_equal(e.code, ERR_MEMORY);
    assert_string_equal(e.text, "no memory for step buffers (1099511627776 bytes)");
}

static void test_percent_in_text(void **state)
{
    (void)state;
    struct err e = { 0 };
    err_set(&e, ERR_FORMAT, "%s", "100%s%n");
    err_note(&e, "%s", "50%d");
    assert_string_equal(e.text, "50%d: 100%s%n");
}

static char *letters(char c, size_t n)
{
    char *s = malloc(n + 1);
    assert_non_null(s);
    memset(s, c, n);
    s[n] = 0;
    return s;
}

/* Every split of note and text around the size of the buffer: all of the note that fits, ": ", then the
 * text's start. */
static void test_truncation(void **state)
{
    (void)state;
    const size_t room = sizeof((struct err *)0)->text - 1;
    for (size_t note = 0; note <= room + 40; note += note < room - 40 ? 37 : 1) {
        for (size_t text = 0; text <= room + 40; text += text < room - note ? 101 : 13) {
            struct {
                struct err e;
                char guard[8];
            } s = { .guard = "guards" };
            char *a = letters('a', text), *b = letters('b', note);
            err_set(&s.e, ERR_IO, "%s", a);
            assert_int_equal(strlen(s.e.text), text < room ? text : room);
            assert_false(err_note(&s.e, "%s", b));
            size_t kept = note < room - 2 ? note : room - 2,
                   bytes = kept + 2 + text < room ? kept + 2 + text : room;
            assert_int_equal(strlen(s.e.text), bytes);
            assert_int_equal(strspn(s.e.text, "b"), kept);
            assert_memory_equal(s.e.text + kept, ": ", 2);
            assert_int_equal(strspn(s.e.text + kept + 2, "a"), bytes - kept - 2);
            assert_string_equal(s.guard, "guards");
            free(a);
            free(b);
        }
    }
}

static void test_many_notes(void **state)
{
    (void)state;
    struct err e = { 0 };
    find(&e);
    for (int i = 0; i < 1000; i++) err_note(&e, "layer %d", i);
    assert_int_equal(strlen(e.text), sizeof e.text - 1);
    assert_memory_equal(e.text, "layer 999: layer 998: ", 22);
    assert_int_equal(e.code, ERR_FORMAT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chain),           cmocka_unit_test(test_set_replaces),
        cmocka_unit_test(test_no_listener),     cmocka_unit_test(test_system_messages),
        cmocka_unit_test(test_percent_in_text), cmocka_unit_test(test_truncation),
        cmocka_unit_test(test_many_notes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
