/* Reads one safetensors file: takes its map, gives the tensors sorted by name. The header goes through the
 * JSON parser once; the names are copied into one block so that the parsed document, ten times their size,
 * need not stay. */
#include "checkpoint/safetensors.h"
#include "base/checked.h"
#include "base/doc.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct safetensors_names {
    char *text; /* every name with its NUL, in the order of the header */
};

/* The two parts of a file after its length field. */
struct parts {
    const uint8_t *header, *data;
    uint64_t header_bytes, data_bytes;
};

static bool split_parts(struct parts *p, const struct file_map *map, struct err *e)
{
    if (map->bytes < 8)
        return err_set(e, ERR_FORMAT,
                       "%" PRIu64 " bytes, a safetensors file begins with an 8-byte header length",
                       map->bytes);
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | map->data[i];
    if (n > SAFETENSORS_HEADER_MAX)
        return err_set(e, ERR_FORMAT, "header of %" PRIu64 " bytes, at most %d are read", n,
                       SAFETENSORS_HEADER_MAX);
    if (n > map->bytes - 8)
        return err_set(e, ERR_FORMAT, "header of %" PRIu64 " bytes, only %" PRIu64 " are left in the file", n,
                       map->bytes - 8);
    *p = (struct parts){ .header = map->data + 8,
                         .data = map->data + 8 + n,
                         .header_bytes = n,
                         .data_bytes = map->bytes - 8 - n };
    if (n == 0 || p->header[0] != '{') return err_set(e, ERR_FORMAT, "header does not begin with '{'");
    return true;
}

static bool check_metadata(const json_t *metadata, struct err *e)
{
    if (!json_is_object(metadata)) return err_set(e, ERR_FORMAT, "__metadata__: expected an object");
    const char *key;
    const json_t *value;
    json_object_foreach((json_t *)(uintptr_t)metadata, key, value)
    {
        if (!json_is_string(value)) return err_set(e, ERR_FORMAT, "__metadata__.%s: expected a string", key);
    }
    return true;
}

static bool read_dtype(struct tensor *t, const json_t *entry, struct err *e)
{
    const char *name;
    if (!doc_string(&name, entry, "", "dtype", e)) return false;
    return dtype_from_name(&t->dtype, name) || err_set(e, ERR_UNSUPPORTED, "unknown dtype '%s'", name);
}

static bool read_shape(struct tensor *t, const json_t *entry, struct err *e)
{
    const json_t *shape = json_object_get(entry, "shape");
    if (!json_is_array(shape)) return err_set(e, ERR_FORMAT, "shape: expected an array");
    size_t n = json_array_size(shape);
    if (n > TENSOR_DIMS_MAX)
        return err_set(e, ERR_UNSUPPORTED, "shape: %zu dimensions, at most %d are read", n, TENSOR_DIMS_MAX);
    t->n_dims = (int)n;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(shape, i);
        if (!json_is_integer(v)) return err_set(e, ERR_FORMAT, "shape[%zu]: expected an integer", i);
        t->shape[i] = json_integer_value(v);
        if (t->shape[i] < 0)
            return err_set(e, ERR_FORMAT, "shape[%zu]: %" PRId64 " is negative", i, t->shape[i]);
    }
    return true;
}

static bool read_offset(uint64_t *out, const json_t *offsets, size_t i, struct err *e)
{
    const json_t *v = json_array_get(offsets, i);
    if (!json_is_integer(v)) return err_set(e, ERR_FORMAT, "data_offsets[%zu]: expected an integer", i);
    if (json_integer_value(v) < 0)
        return err_set(e, ERR_FORMAT, "data_offsets[%zu]: %" JSON_INTEGER_FORMAT " is negative", i,
                       json_integer_value(v));
    *out = (uint64_t)json_integer_value(v);
    return true;
}

static bool read_span(struct tensor *t, const json_t *entry, const struct parts *p, struct err *e)
{
    const json_t *offsets = json_object_get(entry, "data_offsets");
    uint64_t begin = 0, end = 0;
    if (!json_is_array(offsets) || json_array_size(offsets) != 2)
        return err_set(e, ERR_FORMAT, "data_offsets: expected an array of two integers");
    if (!read_offset(&begin, offsets, 0, e) || !read_offset(&end, offsets, 1, e)) return false;
    if (begin > end || end > p->data_bytes)
        return err_set(e, ERR_FORMAT, "bytes [%" PRIu64 ", %" PRIu64 ") of %" PRIu64, begin, end,
                       p->data_bytes);
    t->data = p->data + begin;
    t->bytes = end - begin;
    return true;
}

/* The span has exactly the bytes that dtype and shape need. No product on the way to the element count passes
 * 63 bits, not even one that a later zero would undo: tensor_elements() forms the same ones, unchecked. */
static bool check_size(const struct tensor *t, struct err *e)
{
    uint64_t elements = 1, need;
    char shape[200];
    bool fits = true;
    for (int i = 0; i < t->n_dims; i++)
        fits = fits && fits_mul(elements, (uint64_t)t->shape[i], &elements) && elements <= INT64_MAX;
    if (!fits || !fits_mul(elements, dtype_bytes(t->dtype), &need))
        return err_set(e, ERR_FORMAT, "shape %s: its size does not fit 63 bits",
                       tensor_shape_text(t, shape, sizeof shape));
    if (need != t->bytes)
        return err_set(e, ERR_FORMAT, "%s %s needs %" PRIu64 " bytes, its span has %" PRIu64,
                       dtype_name(t->dtype), tensor_shape_text(t, shape, sizeof shape), need, t->bytes);
    return true;
}

static bool read_tensor(struct tensor *t, const json_t *entry, const struct parts *p, struct err *e)
{
    if (!json_is_object(entry)) return err_set(e, ERR_FORMAT, "expected an object");
    if (!read_dtype(t, entry, e) || !read_shape(t, entry, e) || !read_span(t, entry, p, e)) return false;
    if (json_object_size(entry) != 3)
        return err_set(e, ERR_FORMAT, "expected dtype, shape and data_offsets, found %zu fields",
                       json_object_size(entry));
    return check_size(t, e);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct tensor *)a)->name, ((const struct tensor *)b)->name);
}

static bool is_metadata(const char *key)
{
    return strcmp(key, "__metadata__") == 0;
}

static bool reserve(struct safetensors *s, json_t *header, struct err *e)
{
    size_t text_bytes = 1, count = json_object_size(header) + 1;
    const char *key;
    const json_t *entry;
    json_object_foreach(header, key, entry) text_bytes += strlen(key) + 1;
    s->names = calloc(1, sizeof *s->names);
    s->tensors = calloc(count, sizeof *s->tensors);
    if (s->names) s->names->text = malloc(text_bytes);
    if (s->tensors && s->names && s->names->text) return true;
    return err_memory(e, "tensor list", text_bytes + count * sizeof *s->tensors);
}

static bool read_tensors(struct safetensors *s, json_t *header, const struct parts *p, struct err *e)
{
    if (!reserve(s, header, e)) return false;
    char *text = s->names->text;
    const char *key;
    const json_t *entry;
    json_object_foreach(header, key, entry)
    {
        if (is_metadata(key)) {
            if (!check_metadata(entry, e)) return false;
            continue;
        }
        struct tensor *t = &s->tensors[s->n_tensors];
        if (!read_tensor(t, entry, p, e)) return err_note(e, "tensor '%s'", key);
        size_t bytes = strlen(key) + 1;
        t->name = memcpy(text, key, bytes);
        text += bytes;
        s->n_tensors++;
    }
    qsort(s->tensors, s->n_tensors, sizeof *s->tensors, by_name);
    return true;
}

static int by_place(const void *a, const void *b)
{
    const struct tensor *x = *(const struct tensor *const *)a, *y = *(const struct tensor *const *)b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

/* In order of place each tensor begins where the one before it ended; the last ends with the file. A tensor
 * without bytes sorts before the one that begins at the same place, so it never looks like an overlap. */
static bool check_cover(const struct tensor *const *order, size_t n, const struct parts *p, struct err *e)
{
    const struct tensor *before = NULL;
    uint64_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const struct tensor *t = order[i];
        uint64_t begin = (uint64_t)(t->data - p->data);
        if (begin < at)
            return err_set(e, ERR_FORMAT,
                           "tensor '%s': begins at byte %" PRIu64 ", overlaps '%s' that ends at %" PRIu64,
                           t->name, begin, before->name, at);
        if (begin > at)
            return err_set(e, ERR_FORMAT,
                           "tensor '%s': begins at byte %" PRIu64 ", hole of %" PRIu64 " bytes before it",
                           t->name, begin, begin - at);
        at = begin + t->bytes;
        before = t;
    }
    if (at == p->data_bytes) return true;
    return err_set(e, ERR_FORMAT, "%" PRIu64 " bytes after the last tensor", p->data_bytes - at);
}

static bool check_spans(const struct safetensors *s, const struct parts *p, struct err *e)
{
    const struct tensor **order = malloc((s->n_tensors + 1) * sizeof *order);
    if (!order) return err_memory(e, "tensor order", s->n_tensors * sizeof *order);
    for (size_t i = 0; i < s->n_tensors; i++) order[i] = &s->tensors[i];
    qsort(order, s->n_tensors, sizeof *order, by_place);
    bool ok = check_cover(order, s->n_tensors, p, e);
    free(order);
    return ok;
}

static bool parse(struct safetensors *s, struct err *e)
{
    struct parts p = { 0 };
    json_t *header = NULL;
    if (!split_parts(&p, &s->map, e)) return false;
    if (!doc_parse(&header, (const char *)p.header, (size_t)p.header_bytes, e)) return err_note(e, "header");
    bool ok = read_tensors(s, header, &p, e) && check_spans(s, &p, e);
    json_decref(header);
    return ok;
}

bool safetensors_parse(struct safetensors *s, struct file_map map, struct err *e)
{
    *s = (struct safetensors){ .map = map };
    if (parse(s, e)) return true;
    safetensors_close(s);
    return false;
}

bool safetensors_open(struct safetensors *s, const char *path, struct err *e)
{
    struct file_map map;
    *s = (struct safetensors){ 0 };
    if (!file_map_open(&map, path, e)) return false;
    return safetensors_parse(s, map, e) || err_note(e, "%s", path);
}

void safetensors_close(struct safetensors *s)
{
    if (s->names) free(s->names->text);
    free(s->names);
    free(s->tensors);
    file_map_close(&s->map);
    *s = (struct safetensors){ 0 };
}

const struct tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    struct tensor key = { .name = name };
    if (s->n_tensors == 0) return NULL;
    return bsearch(&key, s->tensors, s->n_tensors, sizeof *s->tensors, by_name);
}

int64_t tensor_elements(const struct tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->n_dims; i++) n *= t->shape[i];
    return n;
}

char *tensor_shape_text(const struct tensor *t, char *out, size_t bytes)
{
    size_t used = 0;
    if (bytes == 0) return out;
    snprintf(out, bytes, "[]");
    for (int i = 0; i < t->n_dims && used < bytes; i++) {
        const char *close = i + 1 == t->n_dims ? "]" : "";
        int n = snprintf(out + used, bytes - used, "%s%" PRId64 "%s", i ? ", " : "[", t->shape[i], close);
        used += n > 0 ? (size_t)n : 0;
    }
    return out;
}
