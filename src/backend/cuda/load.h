/* From host memory to the device: several threads copy pieces into pinned memory, from where the device takes
 * them. A mapped checkpoint in the page cache is read that way as fast as the bus goes. */
#ifndef BACKEND_CUDA_LOAD_H
#define BACKEND_CUDA_LOAD_H
#include "backend/cuda/parts.h"

struct load {
    void *to;         /* device */
    const void *from; /* host */
    uint64_t bytes;
    bool is_e4m3;   /* look for NaN */
    int64_t nan_at; /* out: the first NaN's byte, or -1 */
};

/* Returns when the sources may go; the copies are queued on q's stream. Takes threads and 16 MB of pinned
 * memory with the first call, which stay q's. */
bool cuda_load(struct queue *q, struct load *list, int n, struct err *e);
void cuda_load_end(struct queue *q);
#endif
