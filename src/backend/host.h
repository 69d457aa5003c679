/* Memory operations of backends whose memory is the host's. */
#ifndef BACKEND_HOST_H
#define BACKEND_HOST_H
#include "backend/ops.h"
bool host_memory_create(struct queue *q, void **out, uint64_t bytes, struct err *e);
void host_memory_free(struct queue *q, void *memory);
void host_copy(struct queue *q, void *to, const void *from, uint64_t bytes);
void host_zero(struct queue *q, void *memory, uint64_t bytes);
#endif
