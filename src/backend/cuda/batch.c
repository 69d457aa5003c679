/* Scratch of steps of more than ROWS_FEW, up to ROWS_BATCH rows. */
#include "backend/cuda/batch.h"
#include "base/arena.h"

enum { BF16_BYTES = 2, ALIGNED = 1024 };

static int64_t whole(int64_t n)
{
    return (n + FP4_UNIT_COLS - 1) / FP4_UNIT_COLS * FP4_UNIT_COLS;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Products; three parts of ROWS_EXACT rows are less than one of ROWS_BATCH. */
static void layout_products(struct cuda_batch *b, struct arena *a)
{
    int64_t numbers = b->rows ? ROWS_BATCH * b->cols : 0;
    b->parts = arena_take(a, numbers, BF16_BYTES, ALIGNED);
    b->quantized = arena_take(a, numbers, BF16_BYTES, ALIGNED);
    b->shared_parts = arena_take(a, numbers, BF16_BYTES, ALIGNED);
    b->shared_quantized = arena_take(a, numbers, BF16_BYTES, ALIGNED);
    b->scale = arena_take(a, b->rows, sizeof *b->scale, 64);
    b->shared_scale = arena_take(a, b->rows, sizeof *b->shared_scale, 64);
}

/* Experts; most chunks have all the rows they can, but for one of each expert. */
static void layout_experts(struct cuda_batch *b, const struct step_limits *l, struct arena *a)
{
    int64_t few = least(b->rows, ROWS_EXACT) * l->picks, many = b->rows * l->picks;
    int64_t a_few = few / CHUNK_EXACT + least(few, l->n_experts),
            a_many = many / CHUNK_SLOTS + least(many, l->n_experts);
    b->picked = many;
    b->chunks_most = a_few > a_many ? a_few : a_many;
    b->chunks = arena_take(a, b->chunks_most + 1, CHUNK_ENTRY * sizeof *b->chunks, 64);
    b->hidden = arena_take(a, b->chunks_most * b->intermediate, CHUNK_SLOTS * BF16_BYTES, ALIGNED);
    b->down = arena_take(a, b->picked * b->width, sizeof *b->down, 64);
    b->factor = arena_take(a, b->picked, sizeof *b->factor, 64);
}

void cuda_batch_layout(struct queue *q, struct arena *a)
{
    struct cuda_batch *b = &q->batch;
    const struct step_limits *l = &q->limits;
    b->known = NULL;
    b->rows = !q->has_wide || l->rows <= ROWS_FEW ? 0 : least(l->rows, ROWS_BATCH);
    b->cols = whole(l->cols);
    b->intermediate = whole(l->intermediate);
    b->width = l->hidden ? l->hidden : l->cols;
    layout_products(b, a);
    layout_experts(b, l, a);
}
