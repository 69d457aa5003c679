/* A source checkpoint over the hours of a run: what it is, and whether it is still that. */
#ifndef QUANTIZE_SOURCE_H
#define QUANTIZE_SOURCE_H
#include "checkpoint/checkpoint.h"

/* Over config.json and every tensor's name, dtype, shape and samples of its bytes: a copy of the checkpoint
 * has the same, another one, even of the same shapes, has not. Reads one page a tensor, not the checkpoint.
 */
uint64_t source_digest(const struct checkpoint *c);
/* The shards, or the one that holds `data`, still have the sizes that were mapped: touching a page behind the
 * end of a file kills a process. */
bool source_check(const struct checkpoint *c, struct err *e);
bool source_check_at(const struct checkpoint *c, const uint8_t *data, struct err *e);
#endif
