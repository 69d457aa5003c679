#include "grammar/json.h"
#include "grammar/chars.h"
#include "grammar/grammar.h"
#include <stdlib.h>
#include <string.h>

enum { NESTING_MAX = 64 };

static int32_t one_of(struct rules *r, const char *bytes)
{
    struct chars set = { 0 };
    for (; *bytes; bytes++) chars_add(r, &set, (unsigned char)*bytes, (unsigned char)*bytes);
    int32_t x = chars_expr(r, &set, CHARS_RAW);
    chars_free(&set);
    return x;
}

static int32_t range(struct rules *r, int low, int high, int64_t least, int64_t most)
{
    return expr_repeat(r, expr_range(r, low, high), least, most);
}

static int32_t make_space(struct rules *r)
{
    int32_t indent = ALT(r, range(r, ' ', ' ', 0, 40), range(r, '\t', '\t', 1, 10));
    return ALT(r, expr_empty(r), expr_text(r, " "), SEQ(r, expr_text(r, "\n"), indent));
}

static int32_t make_character(struct rules *r)
{
    struct chars plain = { 0 };
    chars_add(r, &plain, 0x20, 0x10ffff);
    chars_remove(r, &plain, '"', '"');
    chars_remove(r, &plain, '\\', '\\');
    int32_t raw = chars_expr(r, &plain, CHARS_RAW);
    chars_free(&plain);
    int32_t hex = one_of(r, "0123456789abcdefABCDEF"), d = one_of(r, "dD"), u = expr_text(r, "\\u");
    int32_t two = expr_repeat(r, hex, 2, 2), three = expr_repeat(r, hex, 3, 3);
    int32_t single = SEQ(r, u, one_of(r, "0123456789abcefABCEF"), three);
    int32_t below = SEQ(r, u, d, one_of(r, "01234567"), two);
    int32_t high = SEQ(r, u, d, one_of(r, "89abAB"), two), low = SEQ(r, u, d, one_of(r, "cdefCDEF"), two);
    int32_t escape = SEQ(r, expr_text(r, "\\"), one_of(r, "\"\\/bfnrt"));
    return ALT(r, raw, escape, single, below, SEQ(r, high, low));
}

static void make_numbers(struct rules *r, struct json *j)
{
    int32_t minus = expr_text(r, "-"), zero = expr_text(r, "0"), digit = expr_range(r, '0', '9');
    int32_t whole = SEQ(r, expr_range(r, '1', '9'), expr_repeat(r, digit, 0, JSON_DIGITS - 1));
    j->integer = rules_add(r, "integer", ALT(r, zero, SEQ(r, OPTIONAL(r, minus), whole)));
    int32_t fraction = SEQ(r, expr_text(r, "."), expr_repeat(r, digit, 1, JSON_DIGITS));
    int32_t exponent = SEQ(r, one_of(r, "eE"), OPTIONAL(r, one_of(r, "+-")), expr_repeat(r, digit, 1, 2));
    j->number = rules_add(
        r, "number",
        SEQ(r, OPTIONAL(r, minus), ALT(r, zero, whole), OPTIONAL(r, fraction), OPTIONAL(r, exponent)));
}

int32_t json_brackets(struct rules *r, const struct json *j, const char *open, int32_t list,
                      const char *close, bool may_be_empty)
{
    int32_t space = expr_call(r, j->space);
    int32_t inner = SEQ(r, space, list, space);
    return SEQ(r, expr_text(r, open), may_be_empty ? OPTIONAL(r, inner) : inner, expr_text(r, close));
}

void json_rules(struct rules *r, struct json *j)
{
    *j = (struct json){ .space = rules_add(r, "blanks", make_space(r)) };
    j->comma = rules_add(r, "comma", SEQ(r, expr_text(r, ","), expr_call(r, j->space)));
    j->colon = rules_add(r, "colon", SEQ(r, expr_text(r, ":"), OPTIONAL(r, expr_text(r, " "))));
    j->character = rules_add(r, "character", make_character(r));
    int32_t quote = expr_text(r, "\""), comma = expr_call(r, j->comma);
    j->string =
        rules_add(r, "string", SEQ(r, quote, expr_repeat(r, expr_call(r, j->character), 0, -1), quote));
    make_numbers(r, j);
    j->value = rules_declare(r, "value");
    j->object = rules_declare(r, "object");
    j->array = rules_declare(r, "array");
    int32_t value = expr_call(r, j->value), string = expr_call(r, j->string);
    int32_t member = SEQ(r, string, expr_call(r, j->colon), value);
    int32_t members = SEQ(r, member, expr_repeat(r, SEQ(r, comma, member), 0, -1));
    rules_define(r, j->object, json_brackets(r, j, "{", members, "}", true));
    int32_t items = SEQ(r, value, expr_repeat(r, SEQ(r, comma, value), 0, -1));
    rules_define(r, j->array, json_brackets(r, j, "[", items, "]", true));
    rules_define(r, j->value,
                 ALT(r, expr_call(r, j->object), expr_call(r, j->array), string, expr_call(r, j->number),
                     expr_text(r, "true"), expr_text(r, "false"), expr_text(r, "null")));
}

int32_t json_text(struct rules *r, const char *text, size_t n)
{
    int32_t quote = expr_text(r, "\"");
    return SEQ(r, quote, chars_text(r, text, n, CHARS_JSON), quote);
}

static int32_t scalar(struct rules *r, const json_t *value)
{
    if (json_is_string(value)) return json_text(r, json_string_value(value), json_string_length(value));
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(17));
    if (!text) {
        rules_fail(r, ERR_MEMORY, "no memory for a grammar");
        return 0;
    }
    for (int digits = 1; json_is_real(value) && digits < 17; digits++) { /* the fewest that give it back */
        char *brief = json_dumps(value, JSON_ENCODE_ANY | JSON_REAL_PRECISION(digits));
        bool same = brief && strtod(brief, NULL) == json_real_value(value);
        free(same ? text : brief);
        if (!same) continue;
        text = brief;
        break;
    }
    int32_t x = expr_text(r, text);
    free(text);
    return x;
}

static int32_t value_at(struct rules *r, const struct json *j, const json_t *value, int depth)
{
    if (depth > NESTING_MAX) {
        rules_fail(r, ERR_LIMIT, "a value is nested more than %d deep", NESTING_MAX);
        return 0;
    }
    if (!json_is_object(value) && !json_is_array(value)) return scalar(r, value);
    struct expr_list parts = { 0 };
    for (size_t i = 0; i < json_array_size(value); i++) {
        if (i > 0) expr_list_add(r, &parts, expr_call(r, j->comma));
        expr_list_add(r, &parts, value_at(r, j, json_array_get(value, i), depth + 1));
    }
    void *it = json_object_iter((json_t *)value);
    for (; it && !r->failed; it = json_object_iter_next((json_t *)value, it)) {
        if (parts.n > 0) expr_list_add(r, &parts, expr_call(r, j->comma));
        expr_list_add(r, &parts, json_text(r, json_object_iter_key(it), strlen(json_object_iter_key(it))));
        expr_list_add(r, &parts, expr_call(r, j->colon));
        expr_list_add(r, &parts, value_at(r, j, json_object_iter_value(it), depth + 1));
    }
    const char *open = json_is_array(value) ? "[" : "{", *close = json_is_array(value) ? "]" : "}";
    bool is_empty = parts.n == 0;
    int32_t list = expr_list_seq(r, &parts);
    return is_empty ? SEQ(r, expr_text(r, open), expr_text(r, close))
                    : json_brackets(r, j, open, list, close, false);
}

int32_t json_value(struct rules *r, const struct json *j, const json_t *value)
{
    return value_at(r, j, value, 0);
}

bool grammar_from_json_object(struct grammar **out, struct err *e)
{
    struct rules r;
    struct json j;
    *out = NULL;
    rules_init(&r, e);
    json_rules(&r, &j);
    bool ok = rules_compile(out, &r, j.object);
    rules_deinit(&r);
    return ok;
}
