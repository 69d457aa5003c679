/* Sums of products of columns, a tile of outputs in registers while the rows pass by. */
#include "backend/cpu/parts.h"

/* Columns of a tile: what 16 vector registers of the plainest x86 hold beside the inputs. */
enum { TILE = 32, ITEM_ROWS = 8 };

struct sum {
    float *h;
    struct mat x;
};

/* h[i][first ...] of one tile; a ragged one where fewer than TILE columns are left. */
static void add_tile(const struct sum *s, int64_t i, int64_t first)
{
    int64_t n = s->x.cols, width = n - first < TILE ? n - first : TILE;
    float *to = s->h + i * n + first, total[TILE] = { 0 };
    for (int64_t r = 0; r < s->x.rows; r++) {
        const float *x = s->x.data + r * s->x.stride;
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
    int64_t end = (item + 1) * ITEM_ROWS < s->x.cols ? (item + 1) * ITEM_ROWS : s->x.cols;
    (void)thread;
    for (int64_t i = item * ITEM_ROWS; i < end; i++)
        for (int64_t first = i; first < s->x.cols; first += TILE) add_tile(s, i, first);
}

/* The same bits for any number of threads. */
void cpu_moments(struct queue *q, float *h, struct mat x)
{
    struct sum s = { h, x };
    pool_run(q->pool, (x.cols + ITEM_ROWS - 1) / ITEM_ROWS, add_rows, &s);
}
