/* Sums of products, a tile of outputs in registers while the rows pass by. */
#include "quantize/moments.h"
#include "base/checked.h"
#include <stdlib.h>
#include <string.h>

/* Columns of a tile: what 16 vector registers of the plainest x86 hold beside the inputs. */
enum { TILE = 32, ITEM_ROWS = 8 };

struct sum {
    float *h;
    const float *x;
    int64_t rows, n;
};

/* h[i][first ...] of one tile; a ragged one where fewer than TILE columns are left. */
static void add_tile(const struct sum *s, int64_t i, int64_t first)
{
    float *to = s->h + i * s->n + first, total[TILE] = { 0 };
    int64_t width = s->n - first < TILE ? s->n - first : TILE;
    for (int64_t r = 0; r < s->rows; r++) {
        const float *x = s->x + r * s->n;
        if (width == TILE)
            for (int k = 0; k < TILE; k++) total[k] += x[i] * x[first + k];
        else
            for (int64_t k = 0; k < width; k++) total[k] += x[i] * x[first + k];
    }
    for (int64_t k = 0; k < width; k++) to[k] += total[k];
}

static void add_rows(void *ctx, int64_t item, int thread)
{
    const struct sum *s = ctx;
    (void)thread;
    int64_t end = (item + 1) * ITEM_ROWS < s->n ? (item + 1) * ITEM_ROWS : s->n;
    for (int64_t i = item * ITEM_ROWS; i < end; i++)
        for (int64_t first = i; first < s->n; first += TILE) add_tile(s, i, first);
}

void moments_add(float *h, const float *x, int64_t rows, int64_t n, struct pool *pool)
{
    struct sum s = { h, x, rows, n };
    pool_run(pool, (n + ITEM_ROWS - 1) / ITEM_ROWS, add_rows, &s);
}

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

void moments_clear(struct moments *m)
{
    memset(m->block, 0, (size_t)(m->hidden * m->hidden) * sizeof *m->block);
    memset(m->down, 0, (size_t)(m->n_experts * m->inner * m->inner) * sizeof *m->down);
}

void moments_copy(struct moments *to, const struct moments *from)
{
    memcpy(to->block, from->block, (size_t)(to->hidden * to->hidden) * sizeof *to->block);
    memcpy(to->down, from->down, (size_t)(to->n_experts * to->inner * to->inner) * sizeof *to->down);
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
