/* The n-th allocation fails, for every n: each function fails with ERR_MEMORY and leaks nothing (ASan looks),
 * or, where a matcher is at work, it is stuck and allows nothing wrong. Long answers stay within bounds. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "grammar/matching.h"
#include <stdio.h>

static int64_t left = -1; /* allocations until one fails; -1: none does */
static bool failed;

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t each);
void *__real_realloc(void *p, size_t n);
char *__real_strdup(const char *s);
char *__real_strndup(const char *s, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t each);
void *__wrap_realloc(void *p, size_t n);
char *__wrap_strdup(const char *s);
char *__wrap_strndup(const char *s, size_t n);

static bool fails(void)
{
    if (left < 0) return false;
    if (left-- > 0) return false;
    left = -1;
    return failed = true;
}

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t each)
{
    return fails() ? NULL : __real_calloc(n, each);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? NULL : __real_realloc(p, n);
}

char *__wrap_strdup(const char *s)
{
    return fails() ? NULL : __real_strdup(s);
}

char *__wrap_strndup(const char *s, size_t n)
{
    return fails() ? NULL : __real_strndup(s, n);
}

static json_t *schema, *tools;
static struct token_trie *trie;

static bool make(struct grammar **g, int kind, struct err *e)
{
    static const char regex[] = "(a|[^b]{2,5})*\\d+",
                      ebnf[] = "root ::= x+ \"a\"\nx ::= [a-z] | \"(\" x \")\"";
    static const char *const choices[] = { "yes", "no", "yesterday" };
    static const struct tool_call_options any;
    switch (kind) {
    case 0: return grammar_from_regex(g, regex, sizeof regex - 1, e);
    case 1: return grammar_from_ebnf(g, ebnf, sizeof ebnf - 1, e);
    case 2: return grammar_from_choices(g, choices, 3, e);
    case 3: return grammar_from_json_object(g, e);
    case 4: return grammar_from_schema(g, schema, e);
    default: return grammar_from_tool_calls(g, tools, &any, e);
    }
}

static void test_compile(void **state)
{
    (void)state;
    for (int kind = 0; kind < 6; kind++)
        for (int64_t n = 0;; n++) {
            struct grammar *g = NULL;
            struct err e = { 0 };
            failed = false;
            left = n;
            bool ok = make(&g, kind, &e);
            left = -1;
            if (!failed) {
                assert_true(ok && n > 8);
                grammar_free(g);
                break;
            }
            if (ok) fail_msg("grammar %d does not notice that allocation %d failed", kind, (int)n);
            assert_null(g);
            if (e.code != ERR_MEMORY) fail_msg("grammar %d, allocation %d: %s", kind, (int)n, e.text);
        }
}

static void test_trie(void **state)
{
    (void)state;
    for (int64_t n = 0;; n++) {
        struct token_trie *t;
        struct err e = { 0 };
        failed = false;
        left = n;
        bool ok = token_trie_create(&t, VOCAB, word_bytes, NULL, (const int32_t[]){ STOP }, 1, &e);
        left = -1;
        if (ok) token_trie_free(t);
        if (!failed) break;
        assert_false(ok);
        assert_int_equal(e.code, ERR_MEMORY);
    }
}

/* The first tokens of an answer. *right: masks met were those of a matcher with memory, or allowed no text.
 */
static void answer(const struct grammar *g, uint32_t (*masks)[VOCAB / 32 + 1], bool is_reference)
{
    static const char text[] = "{\"name\": \"ab\\n\", \"list\": [1, -2.5e3, {\"x\": null}]}";
    struct matcher *m;
    struct err e = { 0 };
    if (!matcher_create(&m, g, trie, &e)) {
        assert_int_equal(e.code, ERR_MEMORY);
        return;
    }
    for (size_t i = 0; text[i]; i++) {
        uint32_t mask[VOCAB / 32 + 1];
        memset(mask, 255, sizeof mask);
        matcher_mask(m, mask, VOCAB);
        if (is_reference) memcpy(masks[i], mask, sizeof mask);
        if (matcher_is_stuck(m)) {
            for (int32_t id = 0; id < STOP; id++) assert_false(mask[id / 32] >> id % 32 & 1);
            break;
        }
        assert_memory_equal(mask, masks[i], sizeof mask);
        if (!matcher_advance(m, (unsigned char)text[i])) {
            assert_true(matcher_is_stuck(m));
            break;
        }
    }
    matcher_free(m);
}

static void test_matcher(void **state)
{
    (void)state;
    static uint32_t masks[100][VOCAB / 32 + 1];
    struct grammar *g;
    assert_true(grammar_from_json_object(&g, NULL));
    answer(g, masks, true);
    for (int64_t n = 0;; n++) {
        failed = false;
        left = n;
        answer(g, masks, false);
        left = -1;
        if (!failed) break;
    }
    grammar_free(g);
}

/* Positions never seen before, one after the other: what is known is forgotten now and then, what may be
 * taken back is not. */
static void test_flush(void **state)
{
    (void)state;
    struct grammar *g;
    struct matcher *m;
    struct err e = { 0 };
    uint32_t now[VOCAB / 32 + 1], mask[VOCAB / 32 + 1];
    assert_true(grammar_from_regex(&g, "[a-z]{0,60000}[0-9]*", 20, &e));
    assert_true(matcher_create(&m, g, trie, &e));
    for (int i = 0; i < 50000; i++) {
        assert_true(matcher_advance(m, 'a' + i % 26));
        if (i % 5000 != 4999) continue;
        memset(now, 255, sizeof now);
        matcher_mask(m, now, VOCAB);
        for (int k = 0; k < MATCHER_BACK_MAX; k++) assert_true(matcher_advance(m, 'z'));
        matcher_back(m, MATCHER_BACK_MAX);
        memset(mask, 255, sizeof mask);
        matcher_mask(m, mask, VOCAB);
        assert_memory_equal(now, mask, sizeof mask);
    }
    for (int i = 0; i < 10000; i++) assert_true(matcher_advance(m, 'a'));
    assert_false(matcher_advance(m, 'a'));
    assert_true(matcher_advance(m, '1'));
    matcher_back(m, 2);
    assert_true(matcher_advance(m, 'a'));
    assert_false(matcher_advance(m, 'a'));
    matcher_free(m);
    grammar_free(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_compile), cmocka_unit_test(test_trie),
                                        cmocka_unit_test(test_matcher), cmocka_unit_test(test_flush) };
    schema = json_loads(
        "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"string\",\"pattern\":\"^x\"},\"b\":{\"enum\":"
        "[\"p\",2.5,[1]]},"
        "\"c\":{\"allOf\":[{\"type\":\"integer\"},{\"minimum\":3,\"multipleOf\":2,\"maximum\":9}]},\"d\":{"
        "\"oneOf\":[{\"type\":\"null\"},"
        "{\"type\":\"number\",\"minimum\":0.5}]}},\"additionalProperties\":{\"$ref\":\"#/properties/a\"}}",
        0, NULL);
    tools = json_loads("[{\"name\":\"f\",\"parameters\":{\"properties\":{\"a\":{\"type\":[\"string\","
                       "\"null\"]},\"b\":{\"anyOf\":[{\"type\":"
                       "\"integer\"},{\"const\":\"x\"}]}}}}]",
                       0, NULL);
    trie = word_trie();
    int bad = cmocka_run_group_tests(tests, NULL, NULL);
    token_trie_free(trie);
    json_decref(schema);
    json_decref(tools);
    return bad;
}
