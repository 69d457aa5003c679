#include "grammar/regex.h"
#include "grammar/schema.h"
#include <stdlib.h>
#include <string.h>

#define MONTH_DAY                                                                                            \
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|02-(?:0[1-9]|1\\d|"  \
    "2[0-8]))"
#define YEAR  "(?:[1-9]\\d{3}|0[1-9]\\d{2}|00[1-9]\\d|000[1-9])"
#define LEAP  "(?:\\d\\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
#define DATE  "(?:" YEAR "-" MONTH_DAY "|" LEAP "-02-29)"
#define TIME  "(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d{1,9})?(?:Z|[+-](?:[01]\\d|2[0-3]):[0-5]\\d)"
#define LABEL "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
#define HEX4  "[0-9a-fA-F]{1,4}"
#define BYTE  "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
#define PCT   "%[0-9A-Fa-f]{2}"

/* Each a part of what the format's RFC allows: the plain forms. No leap seconds, no quoted local parts, no
 * host in brackets, no IPv4 inside of IPv6. */
static const struct {
    const char *name, *regex;
} formats[] = {
    { "date", DATE },
    { "time", TIME },
    { "date-time", DATE "T" TIME },
    { "uuid", "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}" },
    { "email", "[A-Za-z0-9_+-]{1,30}(?:\\.[A-Za-z0-9_+-]{1,30})?@(?:" LABEL "\\.){1,4}[A-Za-z]{2,24}" },
    { "hostname", "(?:" LABEL "\\.){0,3}" LABEL },
    { "ipv4", "(?:" BYTE "\\.){3}" BYTE },
    { "ipv6",
      "(?:" HEX4 ":){7}" HEX4 "|(?:" HEX4 ":){1,7}:|(?:" HEX4 ":){1,6}:" HEX4 "|(?:" HEX4 ":){1,5}(?::" HEX4
      "){1,2}|(?:" HEX4 ":){1,4}(?::" HEX4 "){1,3}|(?:" HEX4 ":){1,3}(?::" HEX4 "){1,4}|(?:" HEX4
      ":){1,2}(?::" HEX4 "){1,5}|" HEX4 ":(?::" HEX4 "){1,6}|:(?::" HEX4 "){1,7}|::" },
    { "uri", "[A-Za-z][A-Za-z0-9+.-]{1,20}://(?:[A-Za-z0-9._~!$&'()*+,;=-]|" PCT
             ")+(?::\\d{1,4})?(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|" PCT
             ")*)*(?:\\?(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|" PCT
             ")*)?(?:#(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|" PCT ")*)?" },
};

static int32_t format_expr(struct schema *s, const char *name, enum chars_form form)
{
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (strcmp(formats[i].name, name) == 0)
            return regex_expr(s->r, formats[i].regex, strlen(formats[i].regex), form, false);
    return schema_refuse(
        s, "format",
        "of '%.40s' is not supported: date, time, date-time, uuid, email, hostname, ipv4, ipv6, uri are",
        name);
}

int32_t schema_string(struct schema *s, const json_t *schema, enum chars_form form)
{
    const json_t *pattern = json_object_get(schema, "pattern"), *format = json_object_get(schema, "format");
    int64_t least = schema_count(s, schema, "minLength", 0), most = schema_count(s, schema, "maxLength", -1);
    if (pattern && !json_is_string(pattern)) return schema_refuse(s, "pattern", "must be a string");
    if (format && !json_is_string(format)) return schema_refuse(s, "format", "must be a string");
    if (s->r->failed) return 0;
    if (!pattern && !format)
        return expr_repeat(s->r, form == CHARS_JSON ? expr_call(s->r, s->j.character) : chars_any(s->r, form),
                           least, most);
    if (pattern && format)
        return schema_refuse(s, "format", "beside pattern is not supported: leave one out");
    if (least > 0 || most >= 0)
        return schema_refuse(
            s, pattern ? "pattern" : "format",
            "beside minLength or maxLength is not supported: put the length into the pattern");
    if (format) return format_expr(s, json_string_value(format), form);
    int32_t x = regex_expr(s->r, json_string_value(pattern), json_string_length(pattern), form, true);
    if (s->r->failed) err_note(s->r->e, "schema, %s: 'pattern'", s->path);
    return x;
}

static int compare(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* What may follow `from` bytes that the sorted names have in common, closing quote included, so that the
 * whole is none of them. Each step takes a character, so the recursion is as deep as the longest name. */
static int32_t other_than(struct schema *s, const char *const *names, size_t n, size_t from, int32_t rest)
{
    struct rules *r = s->r;
    struct expr_list parts = { 0 };
    struct chars others = { 0 };
    chars_add(r, &others, 0, 0x10ffff);
    size_t i = 0;
    bool is_name = n > 0 && names[0][from] == 0;
    if (is_name) i++;
    if (!is_name) expr_list_add(r, &parts, expr_text(r, "\""));
    while (i < n && !r->failed) {
        uint32_t c;
        int length = chars_get(names[i] + from, strlen(names[i] + from), &c);
        if (length == 0) {
            rules_fail(r, ERR_ARGUMENT, "schema, %s: a property's name is not UTF-8", s->path);
            break;
        }
        size_t end = i + 1;
        while (end < n && strncmp(names[end] + from, names[i] + from, (size_t)length) == 0) end++;
        struct chars one = { 0 };
        chars_add(r, &one, c, c);
        chars_remove(r, &others, c, c);
        int32_t below =
            rules_add(r, "another key", other_than(s, names + i, end - i, from + (size_t)length, rest));
        expr_list_add(r, &parts, SEQ(r, chars_expr(r, &one, CHARS_JSON), expr_call(r, below)));
        chars_free(&one);
        i = end;
    }
    expr_list_add(r, &parts, SEQ(r, chars_expr(r, &others, CHARS_JSON), rest));
    chars_free(&others);
    return expr_list_alt(r, &parts);
}

int32_t schema_other_key(struct schema *s, const char *const *names, size_t n)
{
    enum { NAME_MAX_BYTES = 256 };
    struct rules *r = s->r;
    if (n == 0) return expr_call(r, s->j.string);
    for (size_t i = 0; i < n; i++)
        if (strlen(names[i]) > NAME_MAX_BYTES)
            return schema_refuse(s, "additionalProperties", "beside a property whose name is over %d bytes",
                                 NAME_MAX_BYTES);
    const char **sorted = malloc(n * sizeof *sorted);
    if (!sorted) return (int32_t)rules_fail(r, ERR_MEMORY, "no memory for a grammar");
    memcpy(sorted, names, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, compare);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(sorted[i], sorted[kept - 1]) != 0) sorted[kept++] = sorted[i];
    int32_t quote = expr_text(r, "\"");
    int32_t rest = SEQ(r, expr_repeat(r, chars_any(r, CHARS_JSON), 0, -1), quote);
    int32_t rule = rules_add(r, "another key", SEQ(r, quote, other_than(s, sorted, kept, 0, rest)));
    free(sorted);
    return expr_call(r, rule);
}
