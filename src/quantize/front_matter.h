/* The YAML between two lines of three dashes at the head of a model card, which hubs and tools read. */
#ifndef QUANTIZE_FRONT_MATTER_H
#define QUANTIZE_FRONT_MATTER_H
#include "base/err.h"
#include "base/report.h"
#include <jansson.h>
#include <stddef.h>

/* Of README.md in `folder`: an object of the keys whose values are texts or lists of texts; empty when there
 * is no card, when it has no front matter, and, with a warning, when that is not YAML. The caller owns *out.
 */
bool front_matter_load(json_t **out, const char *folder, const struct report *report, struct err *e);
/* The same of a card's text. */
bool front_matter_parse(json_t **out, const char *text, size_t bytes, struct err *e);
#endif
