/* The Split expression: worked splits, the meaning of \s, what fails while matching. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "tokenizer/small.h"
#include "tokenizer/split.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void expect_pieces(const char *regex, const char *text, const char *const *pieces)
{
    struct split s;
    struct split_work w = { 0 };
    struct err e = { 0 };
    size_t bytes = strlen(text), begin, end;
    assert_true(split_compile(&s, regex, &e));
    assert_true(split_work_init(&w, &s, bytes, &e));
    for (size_t at = 0; at < bytes; at = end) {
        assert_true(split_next(&w, text, bytes, at, &begin, &end, &e));
        assert_non_null(*pieces);
        assert_int_equal(begin, at);
        assert_int_equal(end - begin, strlen(*pieces));
        assert_memory_equal(text + begin, *pieces, end - begin);
        pieces++;
    }
    assert_null(*pieces);
    split_work_deinit(&w);
    split_free(&s);
}

#define PIECES(text, ...) expect_pieces(SMALL_REGEX, text, (const char *const[]){ __VA_ARGS__, NULL })

static void test_worked(void **state)
{
    (void)state;
    PIECES("  one\t two\n\nthree  \n", " ", " one", "\t", " two", "\n\n", "three", "  \n");
    PIECES("  a\t\ta  1x  \n \n  x!\r\n\r\nx", " ", " a", "\t", "\ta", " ", " ", "1", "x", "  \n \n", " ",
           " x", "!\r\n\r\n", "x");
    PIECES(".foo ..foo !a !!a", ".foo", " ..", "foo", " !", "a", " !!", "a");
    PIECES("\u0301!I", "\u0301", "!I");
    PIECES("x'\u017fx'LLy", "x", "'\u017f", "x", "'LL", "y");
    PIECES("a\xc2\x85"
           "b\u180ec\u1680",
           "a",
           "\xc2\x85"
           "b",
           "\u180ec", "\u1680");
    PIECES("\u180e\u180e \x1c\x1d", "\u180e\u180e", " \x1c\x1d"); /* neither is white space */
}

static void test_spaces(void **state)
{
    (void)state;
    static const struct {
        uint32_t first, last;
    } spaces[] = { { 9, 13 },          { 32, 32 },         { 0x85, 0x85 },     { 0xa0, 0xa0 },
                   { 0x1680, 0x1680 }, { 0x2000, 0x200a }, { 0x2028, 0x2029 }, { 0x202f, 0x202f },
                   { 0x205f, 0x205f }, { 0x3000, 0x3000 } };
    static const char *const regexes[] = { "\\s", "[\\s]", "[^\\S]", "\\S", "[\\S]", "[^\\s]" };
    for (int r = 0; r < 6; r++) {
        struct split s;
        struct split_work w = { 0 };
        struct err e = { 0 };
        assert_true(split_compile(&s, regexes[r], &e));
        assert_true(split_work_init(&w, &s, 4, &e));
        for (uint32_t c = 0; c < 0x110000; c += c == 0xd7ff ? 0x801 : 1) {
            bool is_space = false;
            for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++)
                is_space = is_space || (c >= spaces[i].first && c <= spaces[i].last);
            char text[4];
            size_t bytes = (size_t)utf8_put(text, c), begin, end;
            assert_true(split_next(&w, text, bytes, 0, &begin, &end, &e));
            assert_true((begin == 0) == (is_space == (r < 3)));
        }
        split_work_deinit(&w);
        split_free(&s);
    }
}

static void test_rewrite(void **state)
{
    (void)state;
    static const char *const same[] = { "a\\[\\]b", "[a\\]b](?:x)", "\\\\\\p{L}\\n", "(?<=a)b(?<!c)d(?>e)(f)",
                                        "a++b?+" };
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        char *out = NULL;
        struct err e = { 0 };
        assert_true(split_rewrite(&out, same[i], &e));
        assert_string_equal(out, same[i]);
        free(out);
    }
}

static void expect_failure(const char *regex, const char *text, enum err_code code, const char *message)
{
    struct split s;
    struct split_work w = { 0 };
    struct err e = { 0 };
    size_t begin, end;
    assert_true(split_compile(&s, regex, &e));
    assert_true(split_work_init(&w, &s, strlen(text), &e));
    assert_false(split_next(&w, text, strlen(text), 0, &begin, &end, &e));
    assert_string_equal(e.text, message);
    assert_int_equal(e.code, code);
    split_work_deinit(&w);
    split_free(&s);
}

static void test_match_fails(void **state)
{
    (void)state;
    expect_failure("x|(?:a+)+b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac b",
                   ERR_LIMIT, "the Split expression gave up at byte 0 of the text: match limit exceeded");
}

/* An expression that keeps a frame per character outgrows any stack: an error, not a crash. */
static void test_stack(void **state)
{
    (void)state;
    enum { BYTES = 4000000 };
    char *text = malloc(BYTES + 1);
    memset(text, 'a', BYTES);
    text[BYTES] = 0;
    expect_failure("(?:(a|b))+c", text, ERR_LIMIT,
                   "the Split expression gave up at byte 0 of the text: JIT stack limit reached");
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_worked),      cmocka_unit_test(test_spaces), cmocka_unit_test(test_rewrite),
        cmocka_unit_test(test_match_fails), cmocka_unit_test(test_stack),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
