#include "base/arena.h"
#include "base/checked.h"
#include <assert.h>
#include <stdlib.h>
#include <string.h>

void *arena_take(struct arena *a, int64_t count, uint64_t bytes_each, uint64_t align)
{
    uint64_t begin = (a->used + align - 1) & ~(align - 1), bytes = 0, end = 0;
    if (count < 0 || begin < a->used || !fits_mul((uint64_t)count, bytes_each, &bytes) ||
        !fits_add(begin, bytes, &end)) {
        a->overflow = true;
        return NULL;
    }
    a->used = end;
    if (!a->memory) return NULL;
    assert(end <= a->size);
    return a->memory + begin;
}

bool arena_back(struct arena *a, const char *what, struct err *e)
{
    uint64_t size = (a->used + 63) & ~(uint64_t)63;
    if (a->overflow || size < a->used) return err_set(e, ERR_LIMIT, "%s: size does not fit 64 bits", what);
    if (size == 0) size = 64;
    a->memory = aligned_alloc(64, size);
    if (!a->memory) return err_memory(e, what, size);
    memset(a->memory, 0, size);
    a->size = size;
    a->used = 0;
    return true;
}

void arena_free(struct arena *a)
{
    free(a->memory);
    *a = (struct arena){ 0 };
}
