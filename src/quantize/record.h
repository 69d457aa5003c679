/* quantization_report.json of a result: everything a summary holds, one line a matrix. The same run writes
 * the same bytes, on a slower day too: it has no times. Keys: docs/formats.md. */
#ifndef QUANTIZE_RECORD_H
#define QUANTIZE_RECORD_H
#include "quantize/evaluation.h"
#include "quantize/summary.h"

#define RECORD_FILE "quantization_report.json"
/* evaluation: NULL when there was none. *text is malloc'd and the caller's. */
bool record_text(char **text, size_t *bytes, const struct summary *s, const struct evaluation *evaluation,
                 struct err *e);
#endif
