/* The last look at a checkpoint before it gets its name: opens the written folder as a reader would and
 * compares it with the plan. */
#ifndef QUANTIZE_CENSUS_H
#define QUANTIZE_CENSUS_H
#include "quantize/plan.h"

/* Proves: every source tensor is there, packed or copied; nothing else is; dtypes and shapes are the planned
 * ones; every global scale is finite and above 0, the same for gate and up of an expert; a reader's rules
 * give each module the scheme it was packed in. */
bool census(const struct plan *p, const struct checkpoint *source, const char *folder, struct err *e);
#endif
