/* Room for moments, and arithmetic on whole sets of them. */
#include "quantize/moments.h"
#include "base/checked.h"
#include <stdlib.h>
#include <string.h>

bool moments_init(struct moments *m, int n_experts, int64_t hidden, int64_t inner, struct err *e)
{
    uint64_t block, down, bytes;
    *m = (struct moments){ .n_experts = n_experts, .hidden = hidden, .inner = inner };
    if (!fits_mul((uint64_t)hidden * sizeof(float), (uint64_t)hidden, &block) ||
        !fits_mul((uint64_t)inner * sizeof(float), (uint64_t)inner, &down) ||
        !fits_mul(down, (uint64_t)n_experts, &bytes))
        return err_set(e, ERR_LIMIT, "second moments: size does not fit 64 bits");
    m->block = malloc(block);
    m->down = malloc(bytes);
    if (m->block && m->down) return true;
    moments_deinit(m);
    return err_memory(e, "second moments", block + bytes);
}

uint64_t moments_block_bytes(const struct moments *m)
{
    return (uint64_t)m->hidden * (uint64_t)m->hidden * sizeof(float);
}

uint64_t moments_down_bytes(const struct moments *m)
{
    return (uint64_t)m->n_experts * (uint64_t)m->inner * (uint64_t)m->inner * sizeof(float);
}

void moments_copy(struct moments *to, const struct moments *from)
{
    memcpy(to->block, from->block, moments_block_bytes(to));
    memcpy(to->down, from->down, moments_down_bytes(to));
}

void moments_join(struct moments *to, const struct moments *from)
{
    for (int64_t i = 0; i < to->hidden * to->hidden; i++) to->block[i] += from->block[i];
    for (int64_t i = 0; i < to->n_experts * to->inner * to->inner; i++) to->down[i] += from->down[i];
}

void moments_deinit(struct moments *m)
{
    free(m->block);
    free(m->down);
    *m = (struct moments){ 0 };
}
