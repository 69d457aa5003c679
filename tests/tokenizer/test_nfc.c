/* nfc_normalize and the Unicode tables behind it. The reference's ids are in test_tokenizer. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/clock.h"
#include "tokenizer/nfc.h"
#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

static void expect_nfc(struct nfc *n, const char *text, const char *want)
{
    struct err e = { 0 };
    size_t bytes = strlen(text);
    assert_true(nfc_normalize(n, &text, &bytes, &e));
    assert_int_equal(bytes, strlen(want));
    assert_memory_equal(text, want, bytes);
}

static void test_worked(void **state)
{
    (void)state;
    struct nfc n = { 0 };
    expect_nfc(&n, "plain", "plain");
    expect_nfc(&n, "\u4e2d\u6587 \u043f\u0440\u0438", "\u4e2d\u6587 \u043f\u0440\u0438");
    expect_nfc(&n, "cafe\u0301 cafe\u0301", "caf\u00e9 caf\u00e9");
    expect_nfc(&n, "e\u0301\u0327x", "\u0229\u0301x"); /* cedilla first */
    expect_nfc(&n, "\u1100\u1161\u11a8\uac00\u11a8", "\uac01\uac01");
    expect_nfc(&n, "\u304b\u3099", "\u304c");
    expect_nfc(&n, "\u0958", "\u0915\u093c"); /* excluded from composition: grows */
    expect_nfc(&n, "\U0001d15e", "\U0001d157\U0001d165");
    expect_nfc(&n, "\u2126\u2000", "\u03a9\u2002");
    expect_nfc(&n, "\u0301", "\u0301");
    /* newer than Unicode 9: neither composed, nor reordered, nor crossed */
    expect_nfc(&n, "\U00011935\U00011930", "\U00011935\U00011930");
    expect_nfc(&n, "\U000105d2\u0307", "\U000105d2\u0307");
    expect_nfc(&n, "a\u08d3\u0316\u0301", "a\u08d3\u0316\u0301");
    expect_nfc(&n, "a\u0301\u1dfa\u0316\u0301", "\u00e1\u1dfa\u0316\u0301");
    nfc_deinit(&n);
}

/* The fast path rests on this: a plain character is its own NFC and has combining class 0. */
static void test_plain_characters(void **state)
{
    (void)state;
    struct nfc n = { 0 };
    for (uint32_t c = 0; c < 0x110000; c += c == 0xd7ff ? 0x801 : 1) {
        if (!unicode_is_plain(c)) continue;
        int32_t codes[8] = { (int32_t)c };
        assert_int_equal(utf8proc_get_property((int32_t)c)->combining_class, 0);
        utf8proc_ssize_t parts =
            utf8proc_decompose_char((int32_t)c, codes, 4, UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, NULL);
        assert_in_range(parts, 1, 4);
        parts = utf8proc_normalize_utf32(codes, parts, UTF8PROC_COMPOSE | UTF8PROC_STABLE);
        assert_int_equal(parts, 1);
        assert_int_equal(codes[0], c);
        assert_int_equal(unicode_stand_in(c), c);
        assert_false(unicode_is_nfc_barrier(c));
    }
    nfc_deinit(&n);
}

/* No second character of a composition is plain; found by taking every composition apart. */
static void test_compositions(void **state)
{
    (void)state;
    for (uint32_t c = 0xc0; c < 0x110000; c += c == 0xd7ff ? 0x801 : 1) {
        const utf8proc_property_t *p = utf8proc_get_property((int32_t)c);
        int32_t parts[4];
        utf8proc_ssize_t n =
            utf8proc_decompose_char((int32_t)c, parts, 4, UTF8PROC_DECOMPOSE | UTF8PROC_STABLE, NULL);
        for (utf8proc_ssize_t i = 1; i < n && !p->comp_exclusion; i++)
            assert_false(unicode_is_plain((uint32_t)parts[i]));
    }
}

static void test_stand_ins(void **state)
{
    (void)state;
    int changed = 0;
    for (uint32_t c = 0; c < 0x110000; c += c == 0xd7ff ? 0x801 : 1) {
        uint32_t other = unicode_stand_in(c);
        char text[4];
        assert_int_equal(utf8_put(text, c), utf8_put(text, other));
        changed += other != c;
    }
    assert_int_equal(changed, 9272 + 93 + 120); /* letters, marks, numbers */
    assert_int_equal(unicode_stand_in(0x31350), 0x20000);
    assert_int_equal(unicode_stand_in(0x0897), 0x20d0);
    assert_int_equal(unicode_stand_in(0x1ccf9), 0x1d7ce);
    assert_int_equal(unicode_stand_in(0x1ccfa), 0x1ccfa);
}

/* A million marks in the worst order: sorted by class, stable, and not in quadratic time. */
static void test_many_marks(void **state)
{
    (void)state;
    enum { PAIRS = 500000 };
    char *text = malloc(1 + 4 * PAIRS), *at = text;
    *at++ = 'q';
    for (int i = 0; i < PAIRS; i++) at += utf8_put(at, i % 2 ? 0x0301 : 0x0302);
    for (int i = 0; i < PAIRS; i++) at += utf8_put(at, 0x0316);
    struct nfc n = { 0 };
    struct err e = { 0 };
    const char *out = text;
    size_t bytes = (size_t)(at - text);
    double begin = clock_seconds();
    assert_true(nfc_normalize(&n, &out, &bytes, &e));
    assert_true(clock_seconds() - begin < 30);
    assert_int_equal(bytes, at - text);
    const unsigned char *s = (const unsigned char *)out + 1;
    for (int i = 0; i < PAIRS; i++) assert_int_equal(utf8_get(s + 2 * i, 2), 0x0316);
    for (int i = 0; i < PAIRS; i++)
        assert_int_equal(utf8_get(s + 2 * (PAIRS + i), 2), i % 2 ? 0x0301 : 0x0302);
    nfc_deinit(&n);
    free(text);
}

static void test_utf8(void **state)
{
    (void)state;
    for (uint32_t c = 0; c < 0x110000; c += c == 0xd7ff ? 0x801 : 1) {
        char text[4];
        int length = utf8_put(text, c);
        assert_int_equal(utf8_scan((unsigned char *)text, (size_t)length), length);
        assert_int_equal(utf8_get((unsigned char *)text, length), c);
        for (int cut = 0; cut < length; cut++)
            assert_int_equal(utf8_scan((unsigned char *)text, (size_t)cut), 0);
    }
    static const struct {
        const char *text;
        int scan;
    } wrong[] = { { "\x80", -1 },          { "\xc1\x80", -1 },         { "\xe0\x9f\x80", -1 },
                  { "\xed\xa0\x80", -1 },  { "\xf0\x8f\x80", -1 },     { "\xf4\x90\x80\x80", -1 },
                  { "\xf5\x80", -1 },      { "\xe4\xb8 ", -2 },        { "\xc3 ", -1 },
                  { "\xf0\x9f\x91 ", -3 }, { "\xf0\x9f\x80\xc0", -3 }, { "\xff", -1 } };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        size_t bytes = strlen(wrong[i].text);
        assert_int_equal(utf8_scan((const unsigned char *)wrong[i].text, bytes), wrong[i].scan);
        assert_int_equal(utf8_valid_prefix(wrong[i].text, bytes), 0);
    }
    assert_int_equal(utf8_valid_prefix("0123456789\u00e9\xff", 13), 12);
    assert_int_equal(utf8_ascii_prefix("0123456789\u00e9", 12), 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_worked),       cmocka_unit_test(test_plain_characters),
        cmocka_unit_test(test_compositions), cmocka_unit_test(test_stand_ins),
        cmocka_unit_test(test_many_marks),   cmocka_unit_test(test_utf8),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
