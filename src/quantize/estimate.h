/* What a run will take, before it starts: memory by counting, time by short probes of this machine. */
#ifndef QUANTIZE_ESTIMATE_H
#define QUANTIZE_ESTIMATE_H
#include "quantize/run.h"

/* Peak resident bytes, at most: buffers of known size, an allowance for what grows with the number of
 * tensors, and while calibrating one decoder layer twice, in the source's pages and as the backend holds it.
 * A backend with memory of its own needs less. */
uint64_t estimate_memory(const struct run *r);
/* Of the device's own memory, at most; 0: it has none, or nothing is calibrated. */
uint64_t estimate_device_memory(const struct run *r);
/* Fills seconds of reading, packing and calibrating. Reads up to 64 MB of the source; writes nothing. */
bool estimate_seconds(struct quantize_forecast *f, struct run *r, struct err *e);
#endif
