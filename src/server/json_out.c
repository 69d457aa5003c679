#include "server/json_out.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void json_out_deinit(struct json_out *o)
{
    free(o->data);
    *o = (struct json_out){ 0 };
}

void json_out_clear(struct json_out *o)
{
    o->n = 0;
    o->needs_comma = false;
}

static bool reserve(struct json_out *o, size_t n)
{
    if (o->failed || n <= o->capacity - o->n) return !o->failed;
    size_t capacity = 2 * (o->n + n) + 256;
    char *grown = realloc(o->data, capacity);
    if (!grown) {
        o->failed = true;
        return false;
    }
    o->data = grown;
    o->capacity = capacity;
    return true;
}

void json_out_raw(struct json_out *o, const char *bytes, size_t n)
{
    if (n == 0 || !reserve(o, n)) return;
    memcpy(o->data + o->n, bytes, n);
    o->n += n;
}

static void comma(struct json_out *o)
{
    if (o->needs_comma) json_out_raw(o, ",", 1);
    o->needs_comma = true;
}

void json_out_open(struct json_out *o, char bracket)
{
    comma(o);
    json_out_raw(o, &bracket, 1);
    o->needs_comma = false;
}

void json_out_close(struct json_out *o, char bracket)
{
    json_out_raw(o, &bracket, 1);
    o->needs_comma = true;
}

void json_out_key(struct json_out *o, const char *key)
{
    comma(o);
    json_out_raw(o, "\"", 1);
    json_out_raw(o, key, strlen(key));
    json_out_raw(o, "\":", 2);
    o->needs_comma = false;
}

static void escape(struct json_out *o, unsigned char c)
{
    static const char shorts[] = "\"\"\\\\\bb\ff\nn\rr\tt";
    char text[8];
    for (const char *s = shorts; *s; s += 2)
        if ((unsigned char)*s == c) {
            text[0] = '\\';
            text[1] = s[1];
            json_out_raw(o, text, 2);
            return;
        }
    snprintf(text, sizeof text, "\\u%04x", c);
    json_out_raw(o, text, 6);
}

void json_out_string_begin(struct json_out *o)
{
    comma(o);
    json_out_raw(o, "\"", 1);
}

void json_out_string_part(struct json_out *o, const char *text, size_t n)
{
    size_t from = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c >= 0x20 && c != '"' && c != '\\') continue;
        json_out_raw(o, text + from, i - from);
        escape(o, c);
        from = i + 1;
    }
    if (from < n) json_out_raw(o, text + from, n - from);
}

void json_out_string_end(struct json_out *o)
{
    json_out_raw(o, "\"", 1);
}

void json_out_string(struct json_out *o, const char *text, size_t n)
{
    json_out_string_begin(o);
    json_out_string_part(o, text, n);
    json_out_string_end(o);
}

void json_out_name(struct json_out *o, const char *name)
{
    json_out_text(o, name);
    json_out_raw(o, ":", 1);
    o->needs_comma = false;
}

void json_out_text(struct json_out *o, const char *text)
{
    if (text)
        json_out_string(o, text, strlen(text));
    else
        json_out_null(o);
}

static void word(struct json_out *o, const char *text)
{
    comma(o);
    json_out_raw(o, text, strlen(text));
}

void json_out_int(struct json_out *o, int64_t v)
{
    char text[24];
    snprintf(text, sizeof text, "%" PRId64, v);
    word(o, text);
}

void json_out_bool(struct json_out *o, bool v)
{
    word(o, v ? "true" : "false");
}

void json_out_null(struct json_out *o)
{
    word(o, "null");
}

void json_out_float(struct json_out *o, float v)
{
    char text[40];
    if (!isfinite(v)) v = -9999;
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof text - 2, "%.*g", digits, (double)v);
        if (strtof(text, NULL) == v) break;
    }
    if (!strpbrk(text, ".e")) strcat(text, ".0");
    word(o, text);
}

static void json_out_double(struct json_out *o, double v)
{
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text - 2, "%.*g", digits, v);
        if (strtod(text, NULL) == v) break;
    }
    if (!strpbrk(text, ".e")) strcat(text, ".0");
    word(o, text);
}

static void json_out_object(struct json_out *o, const json_t *v)
{
    const char *key;
    const json_t *member;
    json_out_open(o, '{');
    json_object_foreach((json_t *)v, key, member)
    {
        json_out_name(o, key);
        json_out_value(o, member);
    }
    json_out_close(o, '}');
}

static void json_out_array(struct json_out *o, const json_t *v)
{
    json_out_open(o, '[');
    for (size_t i = 0; i < json_array_size(v); i++) json_out_value(o, json_array_get(v, i));
    json_out_close(o, ']');
}

void json_out_value(struct json_out *o, const json_t *v)
{
    if (!v || json_is_null(v))
        json_out_null(o);
    else if (json_is_object(v))
        json_out_object(o, v);
    else if (json_is_array(v))
        json_out_array(o, v);
    else if (json_is_string(v))
        json_out_string(o, json_string_value(v), json_string_length(v));
    else if (json_is_integer(v))
        json_out_int(o, json_integer_value(v));
    else if (json_is_real(v))
        json_out_double(o, json_real_value(v));
    else
        json_out_bool(o, json_is_true(v));
}

void json_out_key_text(struct json_out *o, const char *key, const char *text)
{
    json_out_key(o, key);
    json_out_text(o, text);
}

void json_out_key_string(struct json_out *o, const char *key, const char *text, size_t n)
{
    json_out_key(o, key);
    json_out_string(o, text, n);
}

void json_out_key_int(struct json_out *o, const char *key, int64_t v)
{
    json_out_key(o, key);
    json_out_int(o, v);
}

void json_out_key_bool(struct json_out *o, const char *key, bool v)
{
    json_out_key(o, key);
    json_out_bool(o, v);
}

void json_out_key_null(struct json_out *o, const char *key)
{
    json_out_key(o, key);
    json_out_null(o);
}

void json_out_key_value(struct json_out *o, const char *key, const json_t *v)
{
    json_out_key(o, key);
    json_out_value(o, v);
}

void json_out_key_open(struct json_out *o, const char *key, char bracket)
{
    json_out_key(o, key);
    json_out_open(o, bracket);
}

void json_out_key_ids(struct json_out *o, const char *key, const int32_t *ids, size_t from, size_t n)
{
    json_out_key_open(o, key, '[');
    for (size_t i = from; i < n; i++) json_out_int(o, ids[i]);
    json_out_close(o, ']');
}
