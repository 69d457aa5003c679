/* The two ways in which a calibrated layer's experts are packed: by threads of the host (layers.c), or by the
 * backend that calibrated it, where it can (backend/ops.h: pack). */
#ifndef QUANTIZE_LAYERS_H
#define QUANTIZE_LAYERS_H
#include "quantize/gptq.h"
#include "quantize/run.h"

/* Whether the backend packs all routed experts of this run's layers. */
bool layers_device_suits(const struct run *r);
/* What it takes of the backend's memory beside weights and moments. */
uint64_t layers_device_bytes(const struct config *c, bool contest);
bool layers_device_init(struct layers_device *d, struct backend *b, const struct config *c, bool contest,
                        struct err *e);
void layers_device_deinit(struct layers_device *d); /* accepts a zeroed one */
bool layers_device_pack(struct run *r, int layer, const struct calibrated *x, struct err *e);

/* layers.c */
void run_warn_no_factor(const struct run *r, size_t index);
#endif
