/* The CUDA backend: one GPU, one stream. Weights keep the checkpoint's layout but for NVFP4 codes
 * (device.cuh, "FP4 words"). Steps of up to ROWS_EXACT rows read each weight through one kernel family, whose
 * order of additions does not depend on the rows. */
#ifndef BACKEND_CUDA_CUDA_H
#define BACKEND_CUDA_CUDA_H
#include "backend/ops.h"
extern const struct ops cuda_ops;
/* False with ERR_UNSUPPORTED: no driver, no device, or one older than compute capability 8.0. Of the options
 * shared_memory and rounded count. */
bool cuda_queue_create(struct queue **out, const struct backend_options *options, struct err *e);
void cuda_queue_free(struct queue *q);
/* "cuda NVIDIA H100 80GB HBM3, sm_90, kernels sm_90a". Borrow. */
const char *cuda_queue_name(const struct queue *q);
/* Bytes of the device in all, and free now. */
void cuda_queue_memory(uint64_t *all, uint64_t *available);
#endif
