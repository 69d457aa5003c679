/* Regular expressions, choices, EBNF and JSON objects: what is accepted and refused, masks against a token by
 * token check, taking back, limits, messages. tests/grammar/test_schema.c has JSON schema. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "grammar/matching.h"
#include <stdio.h>

static void test_regex(void **state)
{
    (void)state;
    static const struct {
        const char *regex, *yes[6], *no[6];
    } cases[] = {
        { "abc", { "abc" }, { "", "ab", "abcd", "abd" } },
        { "a|bc|", { "a", "bc", "" }, { "b", "abc" } },
        { "(a|b)*c+", { "c", "abbac", "cc" }, { "", "ab", "ca" } },
        { "a{2,3}", { "aa", "aaa" }, { "a", "aaaa" } },
        { "(?:ab){2}", { "abab" }, { "ab", "ababab" } },
        { "a{,2}b", { "b", "ab", "aab" }, { "aaab" } },
        { "a{x}", { "a{x}" }, { "a" } },
        { "[a-c\\d_-]+", { "a1_-b" }, { "d", "" } },
        { "[^a]", { "b", "\u00e9", "\U0001f600", "\n" }, { "a", "\xc3", "\xed\xa0\x80" } },
        { ".", { "b", "\u20ac" }, { "\n", "" } },
        { "^\\w+@\\w+\\.org$", { "me@x.org" }, { "@x.org", "me@xorg" } },
        { "(?P<y>\\d{4})-(?<m>\\d\\d)", { "2026-01" }, { "2026-1" } },
        { "\\x41\\u0042\\U0001f600\\u{43}", { "AB\U0001f600C" }, { "AB" } },
        { "[\\ud83d\\ude00-\\ud83d\\ude02]", { "\U0001f601" }, { "\U0001f603" } },
        { "(a*)*b", { "b", "aab" }, { "a" } },
        { "(a?){3}", { "", "a", "aaa" }, { "aaaa" } },
        { "(a{0,300}){0,300}", { "", "a", "aaaaaaaaaaaaaaaaaaaaa" }, { "b" } },
        { "\\.\\\\\\*[.\\]]", { ".\\*.", ".\\*]" }, { "a" } },
        { "x*?y+?", { "xxyy" }, { "xx" } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err e = { 0 };
        struct grammar *g;
        if (!grammar_from_regex(&g, cases[i].regex, strlen(cases[i].regex), &e))
            fail_msg("%s: %s", cases[i].regex, e.text);
        check_texts(g, cases[i].regex, cases[i].yes, cases[i].no, 6);
        grammar_free(g);
    }
}

static void test_ebnf(void **state)
{
    (void)state;
    static const struct {
        const char *text, *yes[6], *no[6];
    } cases[] = {
        { "root ::= \"a\" b* # so\nb ::= \"b\" | [x-z]", { "a", "abx" }, { "b", "aa" } },
        /* the same beginnings in every alternative, deep: what doubles at each level elsewhere */
        { "root ::= expr\nexpr ::= term | term \"+\" expr\nterm ::= factor | factor \"*\" term\n"
          "factor ::= [0-9]+ | \"(\" expr \")\"",
          { "1", "1+2*3", "((((((((((((((((((((1))))))))))))))))))))", "(1+2)*3" },
          { "1+", "(1", "()" } },
        { "root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"x\"", { "x", "aaaaaxbcbcb" }, { "ax", "axbb" } },
        { "root ::= item (\",\" item){1,2}\nitem ::= \"\\\"\" [^\"]* \"\\\"\"",
          { "\"a\",\"b\"" },
          { "\"a\"" } },
        { "root ::= ( \"x\" |\n \"y\" )? \"\\x41\\u00e9\" .", { "A\u00e9!", "yA\u00e9\n" }, { "xA\u00e9" } },
        { "root ::= a a a\na ::= \"x\"?", { "", "x", "xxx" }, { "xxxx" } },
        { "root ::= e\ne ::= \"\" | \"(\" e \")\" e", { "", "()", "(()())()" }, { "(", ")(" } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err e = { 0 };
        struct grammar *g;
        if (!grammar_from_ebnf(&g, cases[i].text, strlen(cases[i].text), &e))
            fail_msg("%s: %s", cases[i].text, e.text);
        check_texts(g, cases[i].text, cases[i].yes, cases[i].no, 6);
        grammar_free(g);
    }
}

static void test_json_object(void **state)
{
    (void)state;
    struct grammar *g;
    struct err e = { 0 };
    static const char *const yes[] = {
        "{}",
        "{\"a\":1}",
        "{\"a\": [1, 2.5, -0e3, null, {\"b\": \"\\u00e9\\ud83d\\ude00\\n\"}]}",
        "{\n  \"a\": {},\n  \"b\": []\n}",
        "{\"\u20ac\": [[[[[[[[[[[[]]]]]]]]]]]]}",
        "{\"\": \"\"}",
    };
    static const char *const no[] = { "[]",         "{\"a\": 01}",    "{\"a\": \"\\ud83d\"}",
                                      "{\"a\":1,}", "{ \n \"a\": 1}", "{\"a\": \"\n\"}" };
    assert_true(grammar_from_json_object(&g, &e));
    check_texts(g, "a JSON object", yes, no, 6);
    grammar_free(g);
}

static void test_choices(void **state)
{
    (void)state;
    struct grammar *g;
    struct err e = { 0 };
    static const char *const choices[] = { "yes", "no", "yesterday", "", "\u20ac", "yes" };
    static const char *const no[] = { "y", "yesterda", "noo", "\xe2", NULL, NULL };
    assert_true(grammar_from_choices(&g, choices, 6, &e));
    check_texts(g, "choices", choices, no, 6);
    grammar_free(g);
    assert_false(grammar_from_choices(&g, NULL, 0, &e));
    assert_string_equal(e.text, "choice: the list is empty");
    const char *long_ones[2000];
    char all[2001];
    memset(all, 'a', 2000);
    all[2000] = 0;
    for (int i = 0; i < 2000; i++) long_ones[i] = all + i;
    assert_false(grammar_from_choices(&g, long_ones, 2000, &e)); /* each the end of the one before */
    assert_int_equal(e.code, ERR_LIMIT);
    assert_true(grammar_from_choices(&g, long_ones + 1600, 400, &e));
    assert_true(accepts(g, all + 1650));
    grammar_free(g);
}

static void test_masks(void **state)
{
    (void)state;
    static const char *const regexes[] = { ".*",
                                           "[^<]*",
                                           "(\"[^\"\\\\\\x00-\\x1f]{0,20}\",? ?)*",
                                           "a{0,40}b*",
                                           "(\\d+\\.\\d\\d|\u20ac)+",
                                           "[^a]*a",
                                           "(a|ab|abc)*(bc)?",
                                           "[\\w ]{5,18}",
                                           "[a-z]{1,64}",
                                           "[0-9a-f]{8}(-[0-9a-f]{4}){2}",
                                           "[^a]{3,60}a?",
                                           ".{3,9}",
                                           "([a-z]{2,9}[0-9\u20ac]{0,50})*",
                                           "[a-c]{1,45}[a-z]{2,3}" };
    for (size_t i = 0; i < sizeof regexes / sizeof *regexes; i++) {
        struct grammar *g;
        struct err e = { 0 };
        if (!grammar_from_regex(&g, regexes[i], strlen(regexes[i]), &e)) fail_msg("%s", e.text);
        check_random_walks(g, regexes[i], 30, 40);
        grammar_free(g);
    }
    struct grammar *g;
    struct err e = { 0 };
    assert_true(grammar_from_json_object(&g, &e));
    check_random_walks(g, "a JSON object", 60, 60);
    grammar_free(g);
}

static void test_messages(void **state)
{
    (void)state;
    static const struct {
        const char *regex, *text;
    } regexes[] = {
        { "a(b", "regular expression, offset 1: ( without )" },
        { "ab)", "regular expression, offset 2: ) without (" },
        { "[ab", "regular expression, offset 0: [ without ]" },
        { "[]a]",
          "regular expression, offset 1: a set that begins with ] means different things: write \\]" },
        { "[b-a]", "regular expression, offset 1: not a range of characters" },
        { "[\\d-z]", "regular expression, offset 1: not a range of characters" },
        { "*a", "regular expression, offset 0: nothing to repeat" },
        { "a**", "regular expression, offset 2: several repetitions of one thing" },
        { "a++", "regular expression, offset 2: several repetitions of one thing" },
        { "a{3,2}", "regular expression, offset 1: {n,m} with n over m" },
        { "(?=a)b", "regular expression, offset 0: look-around, flags and references are not supported" },
        { "(?i)b", "regular expression, offset 0: look-around, flags and references are not supported" },
        { "(?<!a)b", "regular expression, offset 0: look-around, flags and references are not supported" },
        { "(a)\\1", "regular expression, offset 3: references and octal numbers are not supported" },
        { "\\bx", "regular expression, offset 0: this escape is not supported" },
        { "\\p{L}", "regular expression, offset 0: this escape is not supported" },
        { "a^b", "regular expression, offset 1: ^ and $ are supported at the ends of the expression only" },
        { "\\xg0", "regular expression, offset 0: not the number of a character" },
        { "\\ud83d", "regular expression, offset 0: not the number of a character" },
        { "a\\", "regular expression, offset 1: a backslash at the end" },
        { "\xc3", "regular expression, offset 0: not UTF-8" },
        { "a{70000}", "a repetition of 70000 is over the limit of 65536" },
        { "[^\\s\\S]", "no text matches: its parts contradict each other, or never end" },
    };
    struct grammar *g;
    for (size_t i = 0; i < sizeof regexes / sizeof *regexes; i++) {
        struct err e = { 0 };
        if (grammar_from_regex(&g, regexes[i].regex, strlen(regexes[i].regex), &e))
            fail_msg("%s", regexes[i].regex);
        assert_null(g);
        assert_string_equal(e.text, regexes[i].text);
    }
    static const struct {
        const char *text, *message;
    } grammars[] = {
        { "", "grammar: there is no rule root, where texts start" },
        { "a ::= \"b\"", "grammar: there is no rule root, where texts start" },
        { "root ::= b", "grammar, offset 9: no rule is named 'b'" },
        { "root ::= \"a\nroot", "grammar, line 1 (offset 9): a text without its closing \"" },
        { "root ::= \"a\"\nroot ::= \"b\"", "grammar, line 2 (offset 13): this rule is defined twice" },
        { "root ::= root \"a\" | \"b\"",
          "'root' begins with itself (left recursion): put something before it, or write a repetition" },
        { "root ::= a? b \"x\"\na ::= \"q\"\nb ::= root | \"z\"",
          "'root' begins with itself (left recursion): put something before it, or write a repetition" },
        { "root ::= \"a\" root", "no text matches: its parts contradict each other, or never end" },
        { "root ::= (\"a\"", "grammar, line 1 (offset 9): ( without )" },
        { "root ::= [a", "grammar, line 1 (offset 9): [ without ]" },
        { "root ::= \"a\"{2,1}", "grammar, line 1 (offset 12): {n,m} with n over m" },
        { "root ::= \"a\"{x}", "grammar, line 1 (offset 12): expected {n}, {n,} or {n,m}" },
        { "root ::= \"\\q\"", "grammar, line 1 (offset 10): this escape is not known" },
        { "start: \"a\"",
          "grammar, line 1 (offset 0): expected NAME ::= (the dialect is GBNF; Lark grammars are not read)" },
        { "root ::= = \"a\"",
          "grammar, line 1 (offset 9): expected a text in double quotes, a set, a name or (" },
    };
    for (size_t i = 0; i < sizeof grammars / sizeof *grammars; i++) {
        struct err e = { 0 };
        if (grammar_from_ebnf(&g, grammars[i].text, strlen(grammars[i].text), &e))
            fail_msg("%s", grammars[i].text);
        assert_null(g);
        assert_string_equal(e.text, grammars[i].message);
    }
}

/* What killed others: each is refused or compiled, quickly. */
static void test_killers(void **state)
{
    (void)state;
    struct grammar *g;
    struct err e = { 0 };
    enum { N = 60000 };
    char *text = malloc(2 * N + 64);
    assert_non_null(text);
    memset(text, '(', N);
    memset(text + N, ')', N);
    assert_false(grammar_from_regex(&g, text, 2 * N, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    assert_false(grammar_from_regex(&g, text, N, &e));
    memcpy(text, "root ::= ", 9);
    memset(text + 9, '(', N);
    assert_false(grammar_from_ebnf(&g, text, N + 9, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    for (int i = 0; i < N; i++) text[i] = "a|"[i & 1];
    assert_true(grammar_from_regex(&g, text, N, &e));
    grammar_free(g);
    memset(text, '|', N);
    assert_true(grammar_from_regex(&g, text, N, &e));
    assert_true(accepts(g, ""));
    grammar_free(g);
    static const char *const large[] = { "((a{1000}){1000}){1000}", "(((a?){0,60000}){0,60000}){0,60000}b",
                                         "([a-z]{0,60000}[0-9]{0,60000}){0,60000}x" };
    struct token_trie *t = word_trie();
    for (size_t i = 0; i < sizeof large / sizeof *large; i++) {
        if (!grammar_from_regex(&g, large[i], strlen(large[i]), &e)) {
            assert_int_equal(e.code, ERR_LIMIT);
            continue;
        }
        struct matcher *m;
        if (!matcher_create(&m, g, t, &e)) {
            assert_int_equal(e.code, ERR_LIMIT);
            grammar_free(g);
            continue;
        }
        uint32_t mask[VOCAB / 32 + 1];
        for (int k = 0; k < 20; k++) {
            memset(mask, 255, sizeof mask);
            matcher_mask(m, mask, VOCAB);
            if (!matcher_advance(m, 'a')) break;
        }
        matcher_free(m);
        grammar_free(g);
    }
    token_trie_free(t);
    free(text);
}

/* Bytes from a trie of other sizes than the mask; more taken back than kept at once; ends. */
static void test_ends(void **state)
{
    (void)state;
    struct grammar *g;
    struct matcher *m;
    struct err e = { 0 };
    struct token_trie *t = word_trie();
    assert_true(grammar_from_regex(&g, "a+", 2, &e));
    assert_true(matcher_create(&m, g, t, &e));
    uint32_t mask[VOCAB / 32 + 9];
    memset(mask, 255, sizeof mask);
    matcher_mask(m, mask, VOCAB + 200);
    for (int64_t id = 0; id < VOCAB + 200; id++)
        if (id >= VOCAB || (id < 256 && id != 'a')) assert_false(mask[id / 32] >> id % 32 & 1);
    assert_true(mask['a' / 32] >> 'a' % 32 & 1);
    assert_false(matcher_advance(m, STOP));
    for (int i = 0; i < 1000; i++) assert_true(matcher_advance(m, 'a'));
    assert_false(matcher_must_end(m));
    memset(mask, 255, sizeof mask);
    mask[(STOP + 1) / 32] &= ~(1u << (STOP + 1) % 32);
    matcher_mask(m, mask, VOCAB);
    assert_true(mask[STOP / 32] >> STOP % 32 & 1); /* both stop tokens may come; the caller forbade one */
    assert_false(mask[(STOP + 1) / 32] >> (STOP + 1) % 32 & 1);
    assert_true(matcher_advance(m, STOP));
    assert_true(matcher_may_end(m) && matcher_must_end(m));
    assert_false(matcher_advance(m, 'a'));
    matcher_back(m, 1);
    assert_true(matcher_advance(m, 'a'));
    matcher_back(m, MATCHER_BACK_MAX);
    assert_true(matcher_may_end(m));
    matcher_free(m);
    grammar_free(g);
    token_trie_free(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_regex),   cmocka_unit_test(test_ebnf),  cmocka_unit_test(test_json_object),
        cmocka_unit_test(test_choices), cmocka_unit_test(test_masks), cmocka_unit_test(test_messages),
        cmocka_unit_test(test_killers), cmocka_unit_test(test_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
