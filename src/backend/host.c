#include "backend/host.h"
#include <stdlib.h>
#include <string.h>

bool host_memory_create(struct queue *q, void **out, uint64_t bytes, struct err *e)
{
    (void)q;
    uint64_t rounded = (bytes + 63) & ~(uint64_t)63;
    *out = rounded >= bytes ? aligned_alloc(64, rounded ? rounded : 64) : NULL;
    if (!*out) return err_memory(e, "activations and state", bytes);
    memset(*out, 0, rounded);
    return true;
}

void host_memory_free(struct queue *q, void *memory)
{
    (void)q;
    free(memory);
}

void host_copy(struct queue *q, void *to, const void *from, uint64_t bytes)
{
    (void)q;
    memcpy(to, from, bytes);
}

void host_zero(struct queue *q, void *memory, uint64_t bytes)
{
    (void)q;
    memset(memory, 0, bytes);
}
