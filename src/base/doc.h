/* JSON documents (jansson underneath): parse with limits, read fields with errors that name them.
 * A getter's `where` is the path of the object in its file, "text_config" say, and only serves messages. */
#ifndef BASE_DOC_H
#define BASE_DOC_H
#include "base/err.h"
#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

/* Parses one JSON value that fills `text`. Duplicate keys, invalid UTF-8 and nesting over 64 are errors.
 * The caller owns *out (json_decref). */
bool doc_parse(json_t **out, const char *text, size_t bytes, struct err *e);
bool doc_load(json_t **out, const char *path, size_t max_bytes, struct err *e);

/* Required fields. */
bool doc_int(int64_t *out, const json_t *object, const char *where, const char *key, int64_t min, int64_t max,
             struct err *e);
bool doc_number(double *out, const json_t *object, const char *where, const char *key, struct err *e);
bool doc_string(const char **out, const json_t *object, const char *where, const char *key, struct err *e);
/* Optional ones: absent or null leaves *out as it is; another type is an error. */
bool doc_int_or(int64_t *out, const json_t *object, const char *where, const char *key, int64_t min,
                int64_t max, struct err *e);
bool doc_number_or(double *out, const json_t *object, const char *where, const char *key, struct err *e);
bool doc_bool_or(bool *out, const json_t *object, const char *where, const char *key, struct err *e);
/* The text of a document, indent 2, with the fewest digits that give every number back: 1e-06 stays 1e-06.
 * malloc'd; NULL when out of memory. */
char *doc_dump(const json_t *root, bool sort_keys);
#endif
