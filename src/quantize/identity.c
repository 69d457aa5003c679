/* Takes the options of a run, gives an object, and compares two of them. */
#include "quantize/identity.h"
#include "quantize/digest.h"
#include "quantize/source.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of the journal, the work files and of what a run writes: other numbers cannot continue. */
enum { VERSION = 1 };

static json_t *hex(uint64_t x)
{
    char text[20];
    snprintf(text, sizeof text, "%016" PRIx64, x);
    return json_string(text);
}

static json_t *samples_digest(const struct samples *s)
{
    uint64_t h = DIGEST_START;
    if (s->n == 0) return json_string("none");
    h = digest(h, s->begin, (size_t)(s->n + 1) * sizeof *s->begin);
    return hex(digest(h, s->tokens, (size_t)s->n_tokens * sizeof *s->tokens));
}

/* "cpu avx512", without the number of threads: the same bits with any. */
static json_t *device(const struct quantize_options *o, const struct samples *s)
{
    const char *name = s->n ? o->backend->name : "none";
    return json_stringn(name, strcspn(name, ","));
}

static json_t *recipe_digest(const struct recipe *r, struct err *e)
{
    char *text;
    size_t bytes;
    if (!recipe_yaml(&text, &bytes, r, e)) return NULL;
    json_t *out = hex(digest(digest(DIGEST_START, r->name, strlen(r->name)), text, bytes));
    free(text);
    return out;
}

bool identity_create(json_t **out, const struct quantize_options *o, const struct checkpoint *source,
                     const struct samples *samples, struct err *e)
{
    json_t *recipe = recipe_digest(o->recipe, e);
    *out = json_object();
    bool ok = recipe && *out && json_object_set_new(*out, "version", json_integer(VERSION)) == 0 &&
              json_object_set_new(*out, "source's weights", hex(source_digest(source))) == 0 &&
              json_object_set(*out, "recipe", recipe) == 0 &&
              json_object_set_new(*out, "method", json_string(quantize_method_name(o->method))) == 0 &&
              json_object_set_new(*out, "calibration samples", samples_digest(samples)) == 0 &&
              json_object_set_new(*out, "calibration device", device(o, samples)) == 0 &&
              json_object_set_new(*out, "shard size", json_integer((json_int_t)o->max_shard_bytes)) == 0;
    json_decref(recipe);
    if (ok) return true;
    json_decref(*out);
    *out = NULL;
    return (e && e->code) || err_memory(e, "identity", 0);
}

static void add_text(char *text, size_t size, const json_t *v)
{
    size_t n = strlen(text);
    if (json_is_string(v)) snprintf(text + n, size - n, "%s", json_string_value(v));
    if (json_is_integer(v)) snprintf(text + n, size - n, "%" JSON_INTEGER_FORMAT, json_integer_value(v));
}

bool identity_same(const json_t *old, const json_t *now, const char *folder, struct err *e)
{
    const char *key;
    json_t *v;
    char text[400] = "";
    if (json_equal(old, now)) return true;
    json_object_foreach((json_t *)(uintptr_t)now, key, v)
    {
        size_t n = strlen(text);
        if (json_equal(json_object_get(old, key), v)) continue;
        snprintf(text + n, sizeof text - n, "%s%s ", n ? ", " : "", key);
        add_text(text, sizeof text, json_object_get(old, key));
        n = strlen(text);
        snprintf(text + n, sizeof text - n, ", now ");
        add_text(text, sizeof text, v);
    }
    return err_set(
        e, ERR_ARGUMENT,
        "%s: holds an interrupted run that differs (%s); repeat that run's command to continue it, or "
        "remove the folder to start anew",
        folder, text);
}
