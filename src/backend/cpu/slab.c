#include "backend/cpu/slab.h"
#include <stdlib.h>
#include <sys/mman.h>

/* A block of its own for every piece under ASan, so that reading past one is seen. */
#if defined(__SANITIZE_ADDRESS__)
enum { SLAB_BYTES = 64, HUGE_PAGE = 64 };
#else
enum { SLAB_BYTES = 32 << 20, HUGE_PAGE = 2 << 20 };
#endif

static struct cpu_slab *slab_create(uint64_t bytes)
{
    uint64_t size = bytes > SLAB_BYTES ? bytes : SLAB_BYTES,
             rounded = (size + HUGE_PAGE - 1) & -(uint64_t)HUGE_PAGE;
    struct cpu_slab *s = calloc(1, sizeof *s);
    if (!s || rounded < bytes) {
        free(s);
        return NULL;
    }
    s->size = rounded;
    s->memory = aligned_alloc(HUGE_PAGE, rounded);
    if (!s->memory) {
        free(s);
        return NULL;
    }
#if !defined(__SANITIZE_ADDRESS__)
    madvise(s->memory, rounded, MADV_HUGEPAGE); /* a wish: small pages work as well */
#endif
    return s;
}

static void slab_destroy(struct cpu_slab *s)
{
    free(s->memory);
    free(s);
}

void *slab_take(struct cpu_slab **current, struct cpu_slab **from, uint64_t bytes)
{
    uint64_t rounded = (bytes + 63) & ~(uint64_t)63;
    if (rounded < bytes) return NULL;
    if (!*current || (*current)->size - (*current)->used < rounded) {
        struct cpu_slab *fresh = slab_create(rounded);
        if (!fresh) return NULL;
        slab_free_current(current);
        *current = fresh;
    }
    struct cpu_slab *s = *from = *current;
    void *p = s->memory + s->used;
    s->used += rounded;
    s->pieces++;
    return p;
}

void slab_give_back(struct cpu_slab **current, struct cpu_slab *from)
{
    if (--from->pieces > 0) return;
    if (from == *current)
        from->used = 0;
    else
        slab_destroy(from);
}

void slab_free_current(struct cpu_slab **current)
{
    if (*current && (*current)->pieces == 0) slab_destroy(*current);
    *current = NULL;
}
