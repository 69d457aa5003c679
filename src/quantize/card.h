/* README.md of a result: the model card a hub shows. Front matter for the hub; for people what the checkpoint
 * is, how to run it, what was done and what that cost. */
#ifndef QUANTIZE_CARD_H
#define QUANTIZE_CARD_H
#include "quantize/evaluation.h"
#include "quantize/summary.h"
#include <jansson.h>

/* front: of the source's card (front_matter.h), {} when it has none. evaluation: NULL when there was none.
 * *text is malloc'd and the caller's. */
bool card_text(char **text, size_t *bytes, const struct summary *s, const json_t *front,
               const struct evaluation *evaluation, struct err *e);
#endif
