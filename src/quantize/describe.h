/* The last files of a result: quantization_report.json and README.md; and the same in short for the caller.
 */
#ifndef QUANTIZE_DESCRIBE_H
#define QUANTIZE_DESCRIBE_H
#include "quantize/quantize.h"
#include "quantize/summary.h"

/* Fills errors, worst and coverage. */
void describe_result(struct quantize_result *r, const struct summary *s);
/* Into the folder. Licence and base model come from the source's README.md. evaluation: NULL when there was
 * none. */
bool describe_write(const char *folder, const struct summary *s, const struct evaluation *evaluation,
                    const struct report *report, struct err *e);
#endif
