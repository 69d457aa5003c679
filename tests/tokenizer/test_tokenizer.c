/* Encoding and decoding as a whole, against ids made by Hugging Face tokenizers
 * (tools/make_tokenizer_golden.py). QUENCH_SHARED: a folder with models/study and
 * data/wikitext-2-raw.test.txt. QUENCH_TOKENIZER: a folder with the tokenizer of Qwen3.6. Without them the
 * tests that need them say SKIP. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/doc.h"
#include "base/file.h"
#include "tokenizer/nfc.h"
#include "tokenizer/small.h"
#include "tokenizer/tokenizer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct tokenizer *demo;

static int setup(void **state)
{
    (void)state;
    struct err e = { 0 };
    if (tokenizer_load(&demo, "models/demo", &e)) return 0;
    fprintf(stderr, "%s\n", e.text);
    return -1;
}

static int teardown(void **state)
{
    (void)state;
    tokenizer_free(demo);
    return 0;
}

static void expect_ids(const struct tokenizer *t, const json_t *text, const json_t *ids, unsigned flags)
{
    struct token_list list = { 0 };
    struct err e = { 0 };
    assert_true(tokenizer_encode(t, &list, json_string_value(text), json_string_length(text), flags, &e));
    bool same = list.n == json_array_size(ids);
    for (size_t i = 0; same && i < list.n; i++)
        same = list.ids[i] == json_integer_value(json_array_get(ids, i));
    if (!same) {
        char *shown = json_dumps(text, JSON_ENCODE_ANY | JSON_ENSURE_ASCII);
        print_error("%s, flags %u:", shown, flags);
        for (size_t i = 0; i < list.n; i++) print_error(" %d", (int)list.ids[i]);
        print_error("\n");
        free(shown);
        fail();
    }
    free(list.ids);
}

static void test_golden_encode(void **state)
{
    (void)state;
    json_t *golden, *one;
    struct err e = { 0 };
    size_t i;
    assert_true(doc_load(&golden, "tests/golden/tokenizer_demo.json", 1 << 24, &e));
    assert_true(json_array_size(json_object_get(golden, "encode")) >= 200);
    json_array_foreach(json_object_get(golden, "encode"), i, one)
    {
        const json_t *text = json_object_get(one, "text");
        expect_ids(demo, text, json_object_get(one, "ids"), 0);
        expect_ids(demo, text, json_object_get(one, "ids_as_data"), TOKENIZE_DATA);
    }
    json_decref(golden);
}

static int32_t *ids_of(const json_t *array)
{
    int32_t *ids = malloc((json_array_size(array) + 1) * sizeof *ids);
    for (size_t i = 0; i < json_array_size(array); i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(array, i));
    return ids;
}

/* Whole and streamed; each piece that the stream hands out is UTF-8 by itself. */
static void expect_text(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                        const char *want, size_t want_bytes)
{
    struct err e = { 0 };
    char *text;
    size_t bytes, at = 0;
    assert_true(tokenizer_decode(t, ids, n, skip_special, &text, &bytes, &e));
    assert_int_equal(bytes, want_bytes);
    assert_memory_equal(text, want, bytes);
    assert_int_equal(text[bytes], 0);
    free(text);
    struct detokenizer d = { 0 };
    for (size_t i = 0; i <= n; i++) {
        size_t token_bytes = 0;
        if (i < n) tokenizer_bytes(t, ids[i], &token_bytes);
        char *out = malloc(3 * token_bytes + DETOKENIZER_ROOM);
        size_t got = i < n ? detokenizer_push(&d, t, ids[i], skip_special, out) : detokenizer_finish(&d, out);
        assert_true(got <= 3 * token_bytes + DETOKENIZER_ROOM);
        assert_int_equal(utf8_valid_prefix(out, got), got);
        assert_true(want_bytes - at >= got);
        assert_memory_equal(out, want + at, got);
        at += got;
        free(out);
    }
    assert_int_equal(at, want_bytes);
    assert_int_equal(d.n_tail, 0);
}

static void test_golden_decode(void **state)
{
    (void)state;
    json_t *golden, *one;
    struct err e = { 0 };
    size_t i;
    assert_true(doc_load(&golden, "tests/golden/tokenizer_demo.json", 1 << 24, &e));
    json_array_foreach(json_object_get(golden, "decode"), i, one)
    {
        const json_t *list = json_object_get(one, "ids"), *all = json_object_get(one, "text");
        const json_t *some = json_object_get(one, "text_without_special");
        int32_t *ids = ids_of(list);
        expect_text(demo, ids, json_array_size(list), false, json_string_value(all), json_string_length(all));
        expect_text(demo, ids, json_array_size(list), true, json_string_value(some),
                    json_string_length(some));
        free(ids);
    }
    json_decref(golden);
}

static void expect_round_trip(const struct tokenizer *t, const char *text, size_t bytes, unsigned flags)
{
    struct token_list list = { 0 };
    struct nfc n = { 0 };
    struct err e = { 0 };
    assert_true(tokenizer_encode(t, &list, text, bytes, flags, &e));
    assert_true(nfc_normalize(&n, &text, &bytes, &e));
    expect_text(t, list.ids, list.n, false, text, bytes);
    nfc_deinit(&n);
    free(list.ids);
}

/* Random characters of every plane; no control strings, so that the text is one span. */
static void test_round_trip(void **state)
{
    (void)state;
    uint64_t seed = 3;
    for (int round = 0; round < 2000; round++) {
        char text[4 * 64];
        size_t bytes = 0;
        for (int i = 0; i < 64; i++) {
            static const uint32_t ends[] = { 0x80, 0x80, 0x370, 0x3100, 0xd800, 0x10000, 0x20000, 0x110000 };
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            uint32_t c = (uint32_t)(seed >> 32) % ends[seed >> 29 & 7];
            if (c >= 0xd800 && c < 0xe000) c -= 0x800;
            bytes += (size_t)utf8_put(text + bytes, c);
        }
        expect_round_trip(demo, text, bytes, TOKENIZE_DATA);
    }
}

static void expect_refused(const char *text, size_t bytes, size_t at)
{
    struct err e = { 0 };
    char message[64];
    struct token_list list = { 0 };
    assert_true(tokenizer_encode(demo, &list, "kept", 4, 0, &e));
    size_t before = list.n;
    assert_false(tokenizer_encode(demo, &list, text, bytes, 0, &e));
    snprintf(message, sizeof message, "the text is not UTF-8 at byte %zu", at);
    assert_string_equal(e.text, message);
    assert_int_equal(e.code, ERR_FORMAT);
    assert_int_equal(list.n, before);
    free(list.ids);
}

static void test_not_utf8(void **state)
{
    (void)state;
    expect_refused("\xff", 1, 0);
    expect_refused("abc\x80", 4, 3);
    expect_refused("0123456789abcdef\xc3\xa9\xed\xa0\x80", 21, 18);
    expect_refused("caf\xc3", 4, 3);
    expect_refused("\xf4\x90\x80\x80", 4, 0);
}

static void test_too_long(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct token_list list = { 0 };
    assert_false(
        tokenizer_encode(demo, &list, "", ((size_t)1 << 30) + 1, 0, &e)); /* refused before it is read */
    assert_string_equal(e.text, "text of 1073741825 bytes, at most 1073741824");
    assert_int_equal(e.code, ERR_LIMIT);
    assert_null(list.ids);
}

static void test_appends(void **state)
{
    (void)state;
    struct err e = { 0 };
    struct token_list list = { 0 };
    assert_true(tokenizer_encode(demo, &list, NULL, 0, 0, &e));
    assert_int_equal(list.n, 0);
    assert_true(tokenizer_encode(demo, &list, "\0\0", 2, 0, &e)); /* NUL is a character */
    size_t first = list.n;
    assert_true(first >= 1);
    assert_true(tokenizer_encode(demo, &list, "<|im_end|>", 10, 0, &e));
    assert_int_equal(list.n, first + 1);
    assert_int_equal(list.ids[first], tokenizer_find(demo, "<|im_end|>"));
    assert_true(tokenizer_encode(demo, &list, "<|im_end|>", 10, TOKENIZE_DATA, &e));
    assert_true(list.n > first + 2);
    free(list.ids);
}

/* An expression that gives up in the middle: the error comes through, the list is as before. */
static void test_regex_gives_up(void **state)
{
    (void)state;
    json_t *root = small_json();
    json_t *list = json_object_get(json_object_get(root, "pre_tokenizer"), "pretokenizers");
    json_t *pattern = json_object_get(json_array_get(list, 0), "pattern");
    json_object_set_new(pattern, "Regex", json_string("x|(?:a+)+b"));
    char *json = json_dumps(root, 0);
    json_decref(root);
    struct tokenizer *t = NULL;
    struct err e = { 0 };
    struct token_list tokens = { 0 };
    char text[80] = "xx";
    memset(text + 2, 'a', 60);
    strcpy(text + 62, "c b");
    assert_true(tokenizer_create(&t, json, strlen(json), NULL, 0, &e));
    assert_false(tokenizer_encode(t, &tokens, text, strlen(text), 0, &e));
    assert_string_equal(e.text, "the Split expression gave up at byte 2 of the text: match limit exceeded");
    assert_int_equal(e.code, ERR_LIMIT);
    assert_int_equal(tokens.n, 0);
    /* what no match covers is a piece too: "ab" is 256 */
    assert_true(tokenizer_encode(t, &tokens, "c<p>xc<x>y<x>", 13, 0, &e));
    static const int32_t want[] = { 'c', 262, 'x', 'c', 261, 260 };
    assert_int_equal(tokens.n, 6);
    assert_memory_equal(tokens.ids, want, sizeof want);
    free(tokens.ids);
    tokenizer_free(t);
    free(json);
}

/* One text of a thousand repeats uses the cache, the repeats alone do not. */
static void test_cache_changes_nothing(void **state)
{
    (void)state;
    static const char part[] =
        " the quick brown fox's jumped\u00e9 over 12 lazy dogs, unbelievably! antidisestablishment\n";
    enum { REPEATS = 1000, BYTES = sizeof part - 1 };
    struct err e = { 0 };
    struct token_list whole = { 0 }, one = { 0 };
    char *text = malloc(REPEATS * BYTES);
    for (size_t i = 0; i < REPEATS; i++) memcpy(text + i * BYTES, part, BYTES);
    assert_true(tokenizer_encode(demo, &one, part, BYTES, 0, &e));
    assert_true(tokenizer_encode(demo, &whole, text, REPEATS * BYTES, 0, &e));
    assert_int_equal(whole.n, REPEATS * one.n);
    for (size_t i = 0; i < REPEATS; i++)
        assert_memory_equal(whole.ids + i * one.n, one.ids, one.n * sizeof *one.ids);
    free(text);
    free(one.ids);
    free(whole.ids);
}

static char *shared_path(const char *name)
{
    const char *folder = getenv("QUENCH_SHARED");
    if (!folder) return NULL;
    return file_join(folder, name);
}

/* The counts are of the text with plain newlines, as Python's text mode reads the file; the file has CR LF.
 */
static size_t without_cr(char *text, size_t bytes)
{
    size_t n = 0;
    for (size_t i = 0; i < bytes; i++)
        if (text[i] != '\r' || (i + 1 < bytes && text[i + 1] != '\n')) text[n++] = text[i];
    return n;
}

static void expect_counts(const struct tokenizer *t, size_t as_it_is, size_t without)
{
    char *path = shared_path("data/wikitext-2-raw.test.txt"), *text;
    size_t bytes;
    struct err e = { 0 };
    struct token_list list = { 0 };
    assert_true(file_read(&text, &bytes, path, 1 << 24, &e));
    free(path);
    assert_true(tokenizer_encode(t, &list, text, bytes, 0, &e));
    assert_int_equal(list.n, as_it_is);
    list.n = 0;
    bytes = without_cr(text, bytes);
    assert_true(tokenizer_encode(t, &list, text, bytes, 0, &e));
    assert_int_equal(list.n, without);
    expect_text(t, list.ids, list.n, false, text, bytes); /* the text is NFC */
    free(list.ids);
    free(text);
}

static void test_wikitext(void **state)
{
    (void)state;
    char *path = shared_path("models/study");
    if (!path) {
        printf("SKIP: WikiText token counts: QUENCH_SHARED is not set\n");
        return;
    }
    struct tokenizer *study = NULL;
    struct err e = { 0 };
    expect_counts(demo, 511860, 493007);
    assert_true(tokenizer_load(&study, path, &e));
    expect_counts(study, 406336, 386164);
    tokenizer_free(study);
    free(path);
}

static void expect_cases(const struct tokenizer *t, const json_t *section, unsigned flags)
{
    size_t i;
    json_t *one;
    assert_true(json_array_size(json_object_get(section, "cases")) > 0);
    json_array_foreach(json_object_get(section, "cases"), i, one)
        expect_ids(t, json_object_get(one, "text"), json_object_get(one, "ids"), flags);
}

static void test_real_tokenizer(void **state)
{
    (void)state;
    const char *folder = getenv("QUENCH_TOKENIZER");
    if (!folder) {
        printf("SKIP: vectors of the Qwen3.6 tokenizer: QUENCH_TOKENIZER is not set\n");
        return;
    }
    json_t *golden;
    struct tokenizer *t = NULL;
    struct err e = { 0 };
    assert_true(tokenizer_load(&t, folder, &e));
    assert_int_equal(tokenizer_size(t), 248077);
    assert_true(doc_load(&golden, "tests/golden/model_vectors.json", 1 << 24, &e));
    expect_cases(t, json_object_get(golden, "tokenizer_encode"), 0);
    expect_cases(t, json_object_get(golden, "tokenizer_encode_as_data"), TOKENIZE_DATA);
    json_decref(golden);
    tokenizer_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_encode),  cmocka_unit_test(test_golden_decode),
        cmocka_unit_test(test_round_trip),     cmocka_unit_test(test_not_utf8),
        cmocka_unit_test(test_too_long),       cmocka_unit_test(test_appends),
        cmocka_unit_test(test_regex_gives_up), cmocka_unit_test(test_cache_changes_nothing),
        cmocka_unit_test(test_wikitext),       cmocka_unit_test(test_real_tokenizer),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
