/* What makes two runs the same one, so that the second may continue the first: everything that has a part in
 * the output's bytes. A JSON object, the first record of the journal. */
#ifndef QUANTIZE_IDENTITY_H
#define QUANTIZE_IDENTITY_H
#include "checkpoint/checkpoint.h"
#include "quantize/quantize.h"
#include "quantize/samples.h"

/* The caller owns *out (json_decref). samples: n = 0 where none are used. */
bool identity_create(json_t **out, const struct quantize_options *o, const struct checkpoint *source,
                     const struct samples *samples, struct err *e);
/* false: a sentence that names what differs; folder: of the run that is `old`. */
bool identity_same(const json_t *old, const json_t *now, const char *folder, struct err *e);
#endif
