/* Memory of weights: large blocks on huge pages, which a core reads a fifth faster than small ones (fewer
 * address translations), carved in order. A block is freed with its last piece. Not thread-safe. */
#ifndef BACKEND_CPU_SLAB_H
#define BACKEND_CPU_SLAB_H
#include <stdint.h>

struct cpu_slab {
    uint8_t *memory;
    uint64_t size, used;
    int64_t pieces; /* not yet given back */
};

/* `bytes` of uninitialised memory, 64-byte aligned, of *current or of a new block that becomes *current.
 * *from is the block, to be given back. NULL: no memory. */
void *slab_take(struct cpu_slab **current, struct cpu_slab **from, uint64_t bytes);
void slab_give_back(struct cpu_slab **current, struct cpu_slab *from);
void slab_free_current(struct cpu_slab **current); /* when no piece is left; NULL inside is fine */
#endif
