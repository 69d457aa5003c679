/* Memory of one lifetime in one block. A layout function runs twice over the same arena: first it counts,
 * then, after arena_back() gave it memory, it places; so sizes cannot drift from pointers. struct arena a =
 * {0};  layout(&s, &a);  arena_back(&a, "step buffers", e) || ...;  layout(&s, &a); */
#ifndef BASE_ARENA_H
#define BASE_ARENA_H
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct arena {
    uint8_t *memory; /* NULL while counting */
    uint64_t used, size;
    bool overflow; /* a product or sum did not fit 64 bits */
};

/* count * bytes_each bytes, aligned to `align` (a power of two, at most 64). NULL while counting. */
void *arena_take(struct arena *a, int64_t count, uint64_t bytes_each, uint64_t align);
/* Allocates what was counted, zeroed, and rewinds. */
bool arena_back(struct arena *a, const char *what, struct err *e);
void arena_free(struct arena *a);
#endif
