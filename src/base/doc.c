#include "base/doc.h"
#include "base/file.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH_MAX = 64 };

/* Nesting of brackets outside strings; jansson's own limit is 2048 calls deep, more than a small stack likes.
 */
static bool depth_is_sane(const char *text, size_t bytes)
{
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > DEPTH_MAX) return false;
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    return true;
}

bool doc_parse(json_t **out, const char *text, size_t bytes, struct err *e)
{
    *out = NULL;
    if (!depth_is_sane(text, bytes)) return err_set(e, ERR_FORMAT, "JSON nested deeper than %d", DEPTH_MAX);
    json_error_t je;
    *out = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &je);
    if (*out) return true;
    return err_set(e, ERR_FORMAT, "JSON: %s (line %d, byte %d)", je.text, je.line, je.position);
}

bool doc_load(json_t **out, const char *path, size_t max_bytes, struct err *e)
{
    char *text;
    size_t bytes;
    *out = NULL;
    if (!file_read(&text, &bytes, path, max_bytes, e)) return false;
    bool ok = doc_parse(out, text, bytes, e) || err_note(e, "%s", path);
    free(text);
    return ok;
}

static const char *type_name(const json_t *v)
{
    static const char *const names[] = { "an object", "an array", "a string", "an integer",
                                         "a number",  "true",     "false",    "null" };
    return v ? names[json_typeof(v)] : "absent";
}

static bool wrong(struct err *e, const char *where, const char *key, const char *want, const json_t *got)
{
    return err_set(e, ERR_FORMAT, "%s%s%s: expected %s, found %s", where, *where ? "." : "", key, want,
                   type_name(got));
}

bool doc_int(int64_t *out, const json_t *object, const char *where, const char *key, int64_t min, int64_t max,
             struct err *e)
{
    const json_t *v = json_object_get(object, key);
    if (!json_is_integer(v)) return wrong(e, where, key, "an integer", v);
    *out = json_integer_value(v);
    if (*out >= min && *out <= max) return true;
    return err_set(e, ERR_FORMAT, "%s%s%s: expected %" PRId64 " to %" PRId64 ", found %" PRId64, where,
                   *where ? "." : "", key, min, max, *out);
}

bool doc_number(double *out, const json_t *object, const char *where, const char *key, struct err *e)
{
    const json_t *v = json_object_get(object, key);
    if (!json_is_number(v)) return wrong(e, where, key, "a number", v);
    *out = json_number_value(v);
    return true;
}

bool doc_string(const char **out, const json_t *object, const char *where, const char *key, struct err *e)
{
    const json_t *v = json_object_get(object, key);
    if (!json_is_string(v)) return wrong(e, where, key, "a string", v);
    *out = json_string_value(v);
    if (strlen(*out) == json_string_length(v)) return true;
    return err_set(e, ERR_FORMAT, "%s%s%s: a string with a NUL inside", where, *where ? "." : "", key);
}

static bool is_absent(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return !v || json_is_null(v);
}

bool doc_int_or(int64_t *out, const json_t *object, const char *where, const char *key, int64_t min,
                int64_t max, struct err *e)
{
    return is_absent(object, key) || doc_int(out, object, where, key, min, max, e);
}

bool doc_number_or(double *out, const json_t *object, const char *where, const char *key, struct err *e)
{
    return is_absent(object, key) || doc_number(out, object, where, key, e);
}

bool doc_bool_or(bool *out, const json_t *object, const char *where, const char *key, struct err *e)
{
    const json_t *v = json_object_get(object, key);
    if (!v || json_is_null(v)) return true;
    if (!json_is_boolean(v)) return wrong(e, where, key, "true or false", v);
    *out = json_is_true(v);
    return true;
}

char *doc_dump(const json_t *root, bool sort_keys)
{
    char *text = NULL;
    for (size_t digits = 15; digits <= 17; digits++) {
        free(text);
        text =
            json_dumps(root, JSON_INDENT(2) | (sort_keys ? JSON_SORT_KEYS : 0) | JSON_REAL_PRECISION(digits));
        json_t *back = text ? json_loads(text, JSON_ALLOW_NUL, NULL) : NULL;
        bool same = back && json_equal(root, back);
        json_decref(back);
        if (same) break;
    }
    return text;
}
