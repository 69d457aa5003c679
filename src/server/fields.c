#include "server/fields.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const json_t *fields_get(const struct fields *in, const char *key)
{
    const json_t *v = json_object_get(in->object, key);
    return json_is_null(v) ? NULL : v;
}

static struct param param_of(const struct fields *in, const char *key)
{
    struct param p;
    param_set(&p, "%s%s", in->where, key);
    return p;
}

bool fields_wrong(struct fault *f, const char *param, const char *expected, const json_t *found)
{
    static const char *const names[] = { "an object", "an array", "a string", "an integer",
                                         "a number",  "true",     "false",    "null" };
    return fault_set(f, param, "%s: expected %s, found %s", param, expected,
                     found ? names[json_typeof(found)] : "nothing");
}

static bool wrong(const struct fields *in, const char *key, const char *expected)
{
    return fields_wrong(in->fault, param_of(in, key).text, expected, fields_get(in, key));
}

bool fields_integer(const json_t *v, int64_t *out)
{
    if (json_is_integer(v)) {
        *out = json_integer_value(v);
        return true;
    }
    double d = json_is_real(v) ? json_real_value(v) : 0.5;
    if (!(fabs(d) <= 0x1p53) || d != floor(d)) return false;
    *out = (int64_t)d;
    return true;
}

bool fields_int(const struct fields *in, const char *key, int64_t min, int64_t max, int64_t *out)
{
    const json_t *v = fields_get(in, key);
    int64_t value;
    if (!v) return true;
    if (!fields_integer(v, &value)) return wrong(in, key, "an integer");
    if (value < min || value > max) {
        struct param p = param_of(in, key);
        return fault_set(in->fault, p.text, "%s: expected %" PRId64 " to %" PRId64 ", found %" PRId64, p.text,
                         min, max, value);
    }
    *out = value;
    return true;
}

bool fields_float(const struct fields *in, const char *key, double min, double max, float *out)
{
    const json_t *v = fields_get(in, key);
    if (!v) return true;
    if (!json_is_number(v)) return wrong(in, key, "a number");
    double value = json_number_value(v);
    if (!(value >= min && value <= max)) {
        struct param p = param_of(in, key);
        return fault_set(in->fault, p.text, "%s: expected %g to %g, found %g", p.text, min, max, value);
    }
    *out = (float)value;
    return true;
}

bool fields_bool(const struct fields *in, const char *key, bool *out)
{
    const json_t *v = fields_get(in, key);
    if (!v) return true;
    if (!json_is_boolean(v)) return wrong(in, key, "true or false");
    *out = json_is_true(v);
    return true;
}

bool fields_text(const struct fields *in, const char *key, const char **out)
{
    const json_t *v = fields_get(in, key);
    if (!v) return true;
    if (!json_is_string(v)) return wrong(in, key, "a string");
    if (strlen(json_string_value(v)) != json_string_length(v))
        return wrong(in, key, "a string without NUL characters");
    *out = json_string_value(v);
    return true;
}

bool fields_object(const struct fields *in, const char *key, const json_t **out)
{
    const json_t *v = fields_get(in, key);
    if (!v) return true;
    if (!json_is_object(v)) return wrong(in, key, "an object");
    *out = v;
    return true;
}

bool fields_array(const struct fields *in, const char *key, const json_t **out)
{
    const json_t *v = fields_get(in, key);
    if (!v) return true;
    if (!json_is_array(v)) return wrong(in, key, "an array");
    *out = v;
    return true;
}

bool fields_ids(const struct fields *in, const char *key, int64_t n_vocab, int32_t **ids, int *n)
{
    const json_t *list = NULL;
    if (!fields_array(in, key, &list) || !list) return !in->fault->status;
    size_t size = json_array_size(list);
    *ids = calloc(size + 1, sizeof **ids);
    if (!*ids) return fault_memory(in->fault);
    for (size_t i = 0; i < size; i++) {
        int64_t id;
        char name[140];
        snprintf(name, sizeof name, "%s[%zu]", key, i);
        if (!fields_integer(json_array_get(list, i), &id))
            return fields_wrong(in->fault, param_of(in, name).text, "a token id", json_array_get(list, i));
        if (id < 0 || id >= n_vocab)
            return fault_set(in->fault, param_of(in, name).text,
                             "%s%s: token id %" PRId64 " where the vocabulary has %" PRId64, in->where, name,
                             id, n_vocab);
        (*ids)[i] = (int32_t)id;
    }
    *n = (int)size;
    return true;
}

static bool says_nothing(const json_t *v)
{
    switch (json_typeof(v)) {
    case JSON_OBJECT: return json_object_size(v) == 0;
    case JSON_ARRAY: return json_array_size(v) == 0;
    case JSON_STRING: return json_string_length(v) == 0;
    case JSON_INTEGER: return json_integer_value(v) == 0;
    case JSON_TRUE: return false;
    case JSON_REAL: return false;
    default: return true;
    }
}

bool fields_refuse(const struct fields *in, const char *key, const char *why)
{
    const json_t *v = fields_get(in, key);
    if (!v || says_nothing(v)) return true;
    return fault_set(in->fault, param_of(in, key).text, "%s%s is not supported: %s", in->where, key, why);
}
