/* Writes a document as YAML: block style, key order kept, strings that are not plain words in single quotes,
 * where backslashes of patterns stay as they are. */
#ifndef QUANTIZE_YAML_H
#define QUANTIZE_YAML_H
#include "base/err.h"
#include <jansson.h>
#include <stddef.h>

/* *text is malloc'd and the caller's. */
bool yaml_write(char **text, size_t *bytes, const json_t *root, struct err *e);
#endif
