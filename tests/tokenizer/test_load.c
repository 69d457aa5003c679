/* tokenizer_create: what it accepts, and one test per message. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "tokenizer/small.h"
#include "tokenizer/tokenizer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Creates from the small tokenizer after the value at path ("model/vocab/a", array elements by number) was
 * replaced by a JSON text, or removed (NULL). */
static bool create_changed(struct tokenizer **t, const char *path, const char *value, const char *config,
                           struct err *e)
{
    json_t *root = small_json(), *at = root;
    assert_non_null(root);
    char key[128];
    for (const char *slash; (slash = strchr(path, '/')); path = slash + 1) {
        snprintf(key, sizeof key, "%.*s", (int)(slash - path), path);
        at = json_is_array(at) ? json_array_get(at, (size_t)atoi(key)) : json_object_get(at, key);
        assert_non_null(at);
    }
    json_t *v = value ? json_loads(value, JSON_DECODE_ANY, NULL) : NULL;
    assert_true(!value || v);
    if (json_is_array(at) && v)
        json_array_set_new(at, (size_t)atoi(path), v);
    else if (json_is_array(at))
        json_array_remove(at, (size_t)atoi(path));
    else if (v)
        json_object_set_new(at, path, v);
    else
        json_object_del(at, path);
    char *text = json_dumps(root, 0);
    json_decref(root);
    bool ok = tokenizer_create(t, text, strlen(text), config, config ? strlen(config) : 0, e);
    free(text);
    return ok;
}

struct wrong {
    const char *path, *value;
    enum err_code code;
    const char *message;
};

#define SPLIT    "pre_tokenizer/pretokenizers/0/"
#define LEVEL    "pre_tokenizer/pretokenizers/1/"
#define REGEX    SPLIT "pattern/Regex"
#define AT_REGEX "tokenizer.json: pre_tokenizer.pretokenizers[0].pattern.Regex: "

static const struct wrong wrongs[] = {
    { "model", NULL, ERR_UNSUPPORTED, "tokenizer.json: model: found nothing, expected an object" },
    { "model/type", "\"Unigram\"", ERR_UNSUPPORTED,
      "tokenizer.json: model.type: found \"Unigram\", expected \"BPE\"" },
    { "model/type", NULL, ERR_UNSUPPORTED, "tokenizer.json: model.type: found nothing, expected \"BPE\"" },
    { "model/dropout", "0.1", ERR_UNSUPPORTED,
      "tokenizer.json: model.dropout: found 0.10000000000000001, expected null" },
    { "model/unk_token", "\"<unk>\"", ERR_UNSUPPORTED,
      "tokenizer.json: model.unk_token: found \"<unk>\", expected null" },
    { "model/continuing_subword_prefix", "\"##\"", ERR_UNSUPPORTED,
      "tokenizer.json: model.continuing_subword_prefix: found \"##\", expected null" },
    { "model/end_of_word_suffix", "\"</w>\"", ERR_UNSUPPORTED,
      "tokenizer.json: model.end_of_word_suffix: found \"</w>\", expected null" },
    { "model/byte_fallback", "true", ERR_UNSUPPORTED,
      "tokenizer.json: model.byte_fallback: found true, expected false" },
    { "model/ignore_merges", "true", ERR_UNSUPPORTED,
      "tokenizer.json: model.ignore_merges: found true, expected false" },
    { "normalizer", "{\"type\":\"NFKC\"}", ERR_UNSUPPORTED,
      "tokenizer.json: normalizer.type: found \"NFKC\", expected \"NFC\"" },
    { "decoder", "null", ERR_UNSUPPORTED, "tokenizer.json: decoder: found null, expected an object" },
    { "decoder/type", "\"WordPiece\"", ERR_UNSUPPORTED,
      "tokenizer.json: decoder.type: found \"WordPiece\", expected \"ByteLevel\"" },
    { "post_processor", "{\"type\":\"TemplateProcessing\"}", ERR_UNSUPPORTED,
      "tokenizer.json: post_processor.type: found \"TemplateProcessing\", expected \"ByteLevel\"" },
    { "pre_tokenizer", "null", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer: found null, expected an object" },
    { "pre_tokenizer/type", "\"Whitespace\"", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.type: found \"Whitespace\", expected \"Sequence\"" },
    { "pre_tokenizer/pretokenizers", "[1]", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.pretokenizers: found [1], expected two: Split, ByteLevel" },
    { SPLIT "type", "\"Digits\"", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.pretokenizers[0].type: found \"Digits\", expected \"Split\"" },
    { SPLIT "behavior", "\"Removed\"", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.pretokenizers[0].behavior: found \"Removed\", expected \"Isolated\"" },
    { SPLIT "invert", "true", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.pretokenizers[0].invert: found true, expected false" },
    { SPLIT "pattern", "\"x\"", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.pretokenizers[0].pattern: found \"x\", expected an object" },
    { SPLIT "pattern", "{\"String\":\"x\"}", ERR_FORMAT,
      "tokenizer.json: pre_tokenizer.pretokenizers[0].pattern.Regex: expected a string, found absent" },
    { LEVEL "type", "\"Metaspace\"", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.pretokenizers[1].type: found \"Metaspace\", expected \"ByteLevel\"" },
    { LEVEL "add_prefix_space", "true", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.pretokenizers[1].add_prefix_space: found true, expected false" },
    { LEVEL "use_regex", "true", ERR_UNSUPPORTED,
      "tokenizer.json: pre_tokenizer.pretokenizers[1].use_regex: found true, expected false" },
    { REGEX, "\"(\"", ERR_UNSUPPORTED,
      AT_REGEX "PCRE2 refuses the expression at byte 1: missing closing parenthesis" },
    { REGEX, "\"a*\"", ERR_UNSUPPORTED, AT_REGEX "the expression can match the empty string" },
    { REGEX, "\"a\\\\hb\"", ERR_UNSUPPORTED,
      AT_REGEX "\"\\hb\" at byte 1 of the expression is not supported" },
    { REGEX, "\"[a[b]]\"", ERR_UNSUPPORTED,
      AT_REGEX "\"[b]]\" at byte 2 of the expression is not supported" },
    { REGEX, "\"[]a]\"", ERR_UNSUPPORTED, AT_REGEX "\"[]a]\" at byte 0 of the expression is not supported" },
    { REGEX, "\"[a&&b]\"", ERR_UNSUPPORTED,
      AT_REGEX "\"&&b]\" at byte 2 of the expression is not supported" },
    { REGEX, "\"a(?x)b\"", ERR_UNSUPPORTED,
      AT_REGEX "\"(?x)b\" at byte 1 of the expression is not supported" },
    { REGEX, "\"(*UTF)b\"", ERR_UNSUPPORTED,
      AT_REGEX "\"(*UTF)b\" at byte 0 of the expression is not supported" },
    { "model/vocab", "[]", ERR_UNSUPPORTED, "tokenizer.json: model.vocab: found [], expected an object" },
    { "model/vocab", "{}", ERR_FORMAT, "tokenizer.json: model.vocab: no entry for byte 0, \"\u0100\"" },
    { "model/vocab/A", NULL, ERR_FORMAT, "tokenizer.json: model.vocab: no entry for byte 65, \"A\"" },
    { "model/vocab/A", "-1", ERR_FORMAT, "tokenizer.json: model.vocab.A: expected 0 to 16777215, found -1" },
    { "model/vocab/A", "16777216", ERR_FORMAT,
      "tokenizer.json: model.vocab.A: expected 0 to 16777215, found 16777216" },
    { "model/vocab/A", "\"1\"", ERR_FORMAT,
      "tokenizer.json: model.vocab.A: expected an integer, found a string" },
    { "model/vocab/A", "66", ERR_FORMAT, "tokenizer.json: model.vocab: id 66 is given twice" },
    { "model/vocab/A", "262", ERR_FORMAT, "tokenizer.json: model.vocab: id 262 is given twice" },
    { "model/vocab/a b", "300", ERR_UNSUPPORTED,
      "tokenizer.json: model.vocab: \"a b\" is not made of byte characters" },
    { "model/vocab/", "300", ERR_FORMAT, "tokenizer.json: model.vocab: an empty entry" },
    { "model/merges", NULL, ERR_UNSUPPORTED,
      "tokenizer.json: model.merges: found nothing, expected an array" },
    { "model/merges/0", "\"bc\"", ERR_UNSUPPORTED,
      "tokenizer.json: model.merges[0]: found \"bc\", expected \"left right\" or [left, right]" },
    { "model/merges/0", "\"b c d\"", ERR_UNSUPPORTED,
      "tokenizer.json: model.merges[0]: found \"b c d\", expected \"left right\" or [left, right]" },
    { "model/merges/0", "[\"b\"]", ERR_UNSUPPORTED,
      "tokenizer.json: model.merges[0]: found [\"b\"], expected \"left right\" or [left, right]" },
    { "model/merges/0", "[\"b\",\"no\"]", ERR_FORMAT,
      "tokenizer.json: model.merges[0]: \"no\" is not in model.vocab" },
    { "model/merges/0", "[\"b\",\"b\"]", ERR_FORMAT,
      "tokenizer.json: model.merges[0]: \"bb\" is not in model.vocab" },
    { "model/merges/1", "[\"b\",\"c\"]", ERR_FORMAT,
      "tokenizer.json: model.merges[1]: \"b c\" is given twice" },
    { "added_tokens", "7", ERR_UNSUPPORTED, "tokenizer.json: added_tokens: found 7, expected an array" },
    { "added_tokens/1", "7", ERR_UNSUPPORTED,
      "tokenizer.json: added_tokens[1]: found 7, expected an object" },
    { "added_tokens/1/id", "-5", ERR_FORMAT,
      "tokenizer.json: added_tokens[1].id: expected 0 to 16777215, found -5" },
    { "added_tokens/1/id", NULL, ERR_FORMAT,
      "tokenizer.json: added_tokens[1].id: expected an integer, found absent" },
    { "added_tokens/1/content", "7", ERR_FORMAT,
      "tokenizer.json: added_tokens[1].content: expected a string, found an integer" },
    { "added_tokens/1/content", "\"\"", ERR_FORMAT,
      "tokenizer.json: added_tokens[1].content: an empty added token" },
    { "added_tokens/1/special", "1", ERR_FORMAT,
      "tokenizer.json: added_tokens[1].special: expected true or false, found an integer" },
    { "added_tokens/1/lstrip", "true", ERR_UNSUPPORTED,
      "tokenizer.json: not supported: added_tokens[1].lstrip: found true, expected false" },
    { "added_tokens/1/rstrip", "true", ERR_UNSUPPORTED,
      "tokenizer.json: not supported: added_tokens[1].rstrip: found true, expected false" },
    { "added_tokens/1/single_word", "true", ERR_UNSUPPORTED,
      "tokenizer.json: not supported: added_tokens[1].single_word: found true, expected false" },
    { "added_tokens/1/normalized", "true", ERR_UNSUPPORTED,
      "tokenizer.json: not supported: added_tokens[1].normalized: found true, expected false" },
    { "added_tokens/1/id", "260", ERR_FORMAT, "added token 260 is both \"<x>\" and \"<x>y\"" },
    { "added_tokens/1/content", "\"<x>\"", ERR_FORMAT, "added token \"<x>\" has the ids 260 and 261" },
    { "added_tokens/1/content", "\"ab\"", ERR_FORMAT,
      "tokenizer.json: added token \"ab\" has the id 261, but 256 in model.vocab" },
};

static void expect_error(bool ok, const struct tokenizer *t, const struct err *e, enum err_code code,
                         const char *message)
{
    assert_false(ok);
    assert_null(t);
    assert_string_equal(e->text, message);
    assert_int_equal(e->code, code);
}

static void test_messages(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof wrongs / sizeof *wrongs; i++) {
        struct tokenizer *t = NULL;
        struct err e = { 0 };
        bool ok = create_changed(&t, wrongs[i].path, wrongs[i].value, NULL, &e);
        expect_error(ok, t, &e, wrongs[i].code, wrongs[i].message);
    }
}

static void test_long_regex(void **state)
{
    (void)state;
    static char value[17000];
    struct tokenizer *t = NULL;
    struct err e = { 0 };
    memset(value, 'a', sizeof value - 1);
    value[0] = value[sizeof value - 2] = '"';
    bool ok = create_changed(&t, REGEX, value, NULL, &e);
    expect_error(ok, t, &e, ERR_LIMIT, AT_REGEX "expression of 16997 bytes, at most 16384");
}

static void test_not_json(void **state)
{
    (void)state;
    struct tokenizer *t = NULL;
    struct err e = { 0 };
    assert_false(tokenizer_create(&t, "{", 1, NULL, 0, &e));
    assert_memory_equal(e.text, "tokenizer.json: JSON: ", 22);
    bool ok = tokenizer_create(&t, "[]", 2, NULL, 0, &e);
    expect_error(ok, t, &e, ERR_FORMAT, "tokenizer.json: expected an object");
}

static const struct wrong config_wrongs[] = {
    { "", "[]", ERR_FORMAT, "tokenizer_config.json: expected an object" },
    { "", "{\"added_tokens_decoder\":1}", ERR_UNSUPPORTED,
      "tokenizer_config.json: added_tokens_decoder: found 1, expected an object" },
    { "", "{\"added_tokens_decoder\":{\"x\":{\"content\":\"a\"}}}", ERR_FORMAT,
      "tokenizer_config.json: added_tokens_decoder.x: expected an id from 0 to 16777215" },
    { "", "{\"added_tokens_decoder\":{\"16777216\":{\"content\":\"a\"}}}", ERR_FORMAT,
      "tokenizer_config.json: added_tokens_decoder.16777216: expected an id from 0 to 16777215" },
    { "", "{\"added_tokens_decoder\":{\"270\":\"a\"}}", ERR_UNSUPPORTED,
      "tokenizer_config.json: added_tokens_decoder.270: found \"a\", expected an object" },
    { "", "{\"added_tokens_decoder\":{\"270\":{\"content\":\"q\",\"lstrip\":true}}}", ERR_UNSUPPORTED,
      "tokenizer_config.json: not supported: added_tokens_decoder.270.lstrip: found true, expected false" },
    { "", "{\"added_tokens_decoder\":{\"260\":{\"content\":\"q\"}}}", ERR_FORMAT,
      "added token 260 is both \"<x>\" and \"q\"" },
    { "", "{\"added_tokens_decoder\":{\"270\":{\"content\":\"<x>\"}}}", ERR_FORMAT,
      "added token \"<x>\" has the ids 260 and 270" },
};

static void test_config_messages(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof config_wrongs / sizeof *config_wrongs; i++) {
        struct tokenizer *t = NULL;
        struct err e = { 0 };
        bool ok = create_changed(&t, "version", "\"1.0\"", config_wrongs[i].value, &e);
        expect_error(ok, t, &e, config_wrongs[i].code, config_wrongs[i].message);
    }
}

static void test_config_adds(void **state)
{
    (void)state;
    static const char config[] = "{\"added_tokens_decoder\":{\"260\":{\"content\":\"<x>\",\"special\":true},"
                                 "\"300\":{\"content\":\"\u00e9 \",\"special\":true}}}";
    struct tokenizer *t = NULL;
    struct err e = { 0 };
    assert_true(create_changed(&t, "version", "\"1.0\"", config, &e));
    assert_int_equal(tokenizer_size(t), 301);
    assert_int_equal(tokenizer_find(t, "\u00e9 "), 300);
    assert_int_equal(tokenizer_find(t, "<x>"), 260);
    assert_int_equal(tokenizer_find(t, "<x"), -1);
    assert_int_equal(tokenizer_find(t, "ab"), -1);
    assert_true(tokenizer_is_special(t, 300));
    assert_false(tokenizer_is_special(t, 260)); /* tokenizer.json wins */
    assert_false(tokenizer_is_special(t, -1));
    assert_false(tokenizer_is_special(t, 301));
    size_t bytes;
    assert_memory_equal(tokenizer_bytes(t, 300, &bytes), "\u00e9 ", 3); /* literal, not byte characters */
    assert_int_equal(bytes, 3);
    assert_memory_equal(tokenizer_bytes(t, 259, &bytes), " a", 2);
    assert_int_equal(bytes, 2);
    static const int32_t without_meaning[] = { -1, 270, 301, INT32_MAX, INT32_MIN };
    for (size_t i = 0; i < 5; i++) {
        tokenizer_bytes(t, without_meaning[i], &bytes);
        assert_int_equal(bytes, 0);
    }
    tokenizer_free(t);
}

/* What other writers of the format put there and what does not change ids. */
static void test_accepted(void **state)
{
    (void)state;
    static const struct wrong good[] = {
        { "model/continuing_subword_prefix", "\"\"", 0, NULL },
        { "model/merges", "[\"a b\",\"ab c\"]", 0, NULL },
        { "model/merges", "[]", 0, NULL },
        { "normalizer", "null", 0, NULL },
        { "added_tokens", NULL, 0, NULL },
        { "added_tokens/1/content", "\"<x> \u00e9\"", 0, NULL },
        { "model/vocab/<x>", "260", 0, NULL },
        { "post_processor", "{\"type\":\"ByteLevel\"}", 0, NULL },
        { "truncation", "{\"max_length\":512}", 0, NULL },
        { "model/vocab/zz", "16777215", 0, NULL },
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct tokenizer *t = NULL;
        struct err e = { 0 };
        assert_true(create_changed(&t, good[i].path, good[i].value, NULL, &e));
        tokenizer_free(t);
    }
}

static void test_load_folder(void **state)
{
    (void)state;
    struct tokenizer *t = NULL;
    struct err e = { 0 };
    assert_false(tokenizer_load(&t, "tests/tokenizer", &e));
    assert_null(t);
    assert_string_equal(e.text, "tests/tokenizer/tokenizer.json: No such file or directory");
    assert_int_equal(e.code, ERR_IO);
    assert_true(tokenizer_load(&t, "models/demo", &e));
    tokenizer_free(t);
    tokenizer_free(NULL);
}

/* Cut anywhere, it is an error and never a crash. */
static void test_cut(void **state)
{
    (void)state;
    json_t *root = small_json();
    char *text = json_dumps(root, 0);
    size_t bytes = strlen(text);
    json_decref(root);
    for (size_t n = 0; n < bytes; n++) {
        struct tokenizer *t = NULL;
        struct err e = { 0 };
        char *exact = malloc(n + 1); /* so that a sanitizer sees a read past the end */
        memcpy(exact, text, n);
        char *shrunk = realloc(exact, n ? n : 1);
        assert_false(tokenizer_create(&t, shrunk, n, NULL, 0, &e));
        free(shrunk);
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_messages),    cmocka_unit_test(test_long_regex),
        cmocka_unit_test(test_not_json),    cmocka_unit_test(test_config_messages),
        cmocka_unit_test(test_config_adds), cmocka_unit_test(test_accepted),
        cmocka_unit_test(test_load_folder), cmocka_unit_test(test_cut),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
