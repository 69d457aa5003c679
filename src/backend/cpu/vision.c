/* What a vision tower needs besides products, on the CPU. Attention goes by tiles of 64 queries and 64 keys
 * of a head, with the kernel of dense products: scores are keys times queries, 16 queries side by side, and
 * so are the sums of values. A row's additions have one order, whatever the threads. */
#include "backend/cpu/parts.h"
#include <math.h>

enum { TILE_ROWS = 64, TILE_PANELS = TILE_ROWS / PANEL };

struct vision_job {
    struct queue *q;
    struct mat y, x, angle;
    const float *gain, *bias;
    float eps;
    enum activation activation;
    int n_heads;
};

static void layer_norm_row(void *ctx, int64_t i, int thread)
{
    struct vision_job *j = ctx;
    (void)thread;
    j->q->k->layer_norm(j->y.data + i * j->y.stride, j->x.data + i * j->x.stride, j->gain, j->bias, j->x.cols,
                        j->eps);
}

void cpu_layer_norm(struct queue *q, struct mat y, struct mat x, const float *gain, const float *bias,
                    float eps)
{
    struct vision_job j = { .q = q, .y = y, .x = x, .gain = gain, .bias = bias, .eps = eps };
    pool_run(q->pool, x.rows, layer_norm_row, &j);
}

static void add_bias_row(void *ctx, int64_t i, int thread)
{
    struct vision_job *j = ctx;
    float *row = j->y.data + i * j->y.stride;
    (void)thread;
    j->q->k->scale_add(row, j->bias, 1, j->y.cols);
    if (j->activation == ACTIVATION_GELU_TANH) j->q->k->gelu_tanh(row, j->y.cols);
    for (int64_t c = 0; j->activation == ACTIVATION_GELU && c < j->y.cols; c++)
        row[c] = row[c] / 2 * (1 + erff(row[c] * 0x1.6a09e6p-1f));
}

void cpu_add_bias(struct queue *q, struct mat y, const float *bias, enum activation f)
{
    struct vision_job j = { .q = q, .y = y, .bias = bias, .activation = f };
    pool_run(q->pool, y.rows, add_bias_row, &j);
}

static void rotate_row(void *ctx, int64_t i, int thread)
{
    struct vision_job *j = ctx;
    int64_t n = j->angle.cols;
    (void)thread;
    for (int64_t f = 0; f < n; f++) {
        float s, c;
        sincosf(j->angle.data[i * j->angle.stride + f], &s, &c);
        for (int h = 0; h < j->n_heads; h++) {
            float *pair = j->x.data + i * j->x.stride + 2 * h * n + f, a = pair[0], b = pair[n];
            pair[0] = a * c - b * s;
            pair[n] = b * c + a * s;
        }
    }
}

void cpu_rotate(struct queue *q, struct mat x, int n_heads, struct mat angle)
{
    struct vision_job j = { .q = q, .x = x, .n_heads = n_heads, .angle = angle };
    pool_run(q->pool, x.rows, rotate_row, &j);
}

/* A thread's work of one tile of queries. dim: of a head; wide: rounded up to whole blocks. */
struct attend_tile {
    const struct cpu_kernels *k;
    int64_t dim, wide;
    float *queries; /* [TILE_PANELS][dim][16] */
    float *keys;    /* blocks of block_rows keys: [dim][block_rows] */
    float *values;  /* blocks of block_rows columns: [TILE_ROWS][block_rows]; the last is filled up with what
                       lies there */
    float *sums;    /* [TILE_PANELS][wide][16] */
    float *scores;  /* [TILE_ROWS][16] */
    float *top, *total, *factor; /* [TILE_PANELS][16], the last [16] */
};

/* All within cpu_thread.work: 256 * wide + 64 * 16 + 9 * 16 floats are no more than DELTA_CHUNK * (3 * cols +
 * 2
 * * DELTA_CHUNK), as cols >= 3 * dim and wide < dim + 16. */
static struct attend_tile tile_of(const struct cpu_kernels *k, float *work, int64_t dim)
{
    struct attend_tile t = { .k = k, .dim = dim, .wide = (dim + PANEL - 1) / PANEL * PANEL };
    t.queries = work;
    t.keys = t.queries + TILE_ROWS * t.wide;
    t.values = t.keys + TILE_ROWS * t.wide;
    t.sums = t.values + TILE_ROWS * t.wide;
    t.scores = t.sums + TILE_ROWS * t.wide;
    t.top = t.scores + TILE_ROWS * PANEL;
    t.total = t.top + TILE_ROWS;
    t.factor = t.total + TILE_ROWS;
    return t;
}

/* Rows first .. of a matrix, `each` at a time word by word; the last stands in for those past the end. */
static void interleave_rows(const struct cpu_kernels *k, float *out, const float *data, int64_t stride,
                            int64_t rows, int64_t cols, int each)
{
    for (int64_t r = 0; r < rows; r += each) {
        const uint8_t *row[PANEL];
        for (int i = 0; i < each; i++)
            row[i] = (const uint8_t *)(data + (r + i < rows ? r + i : rows - 1) * stride);
        k->interleave((uint32_t *)(void *)(out + r * cols), row, each, cols);
    }
}

static void lay_values(const struct attend_tile *t, const float *data, int64_t stride, int64_t n)
{
    int each = t->k->block_rows;
    for (int64_t c = 0; c < t->dim; c += each) {
        int64_t some = t->dim - c < each ? t->dim - c : each;
        float *out = t->values + c * TILE_ROWS;
        for (int64_t r = 0; r < n; r++)
            memcpy(out + r * each, data + r * stride + c, (size_t)some * sizeof *out);
    }
}

/* n keys and their values meet a panel of queries. */
static void meet(const struct attend_tile *t, int panel, int64_t n, float scale)
{
    int each = t->k->block_rows;
    float *sums = t->sums + panel * t->wide * PANEL;
    memset(t->scores, 0, (size_t)TILE_ROWS * PANEL * sizeof *t->scores);
    for (int64_t r = 0; r < n; r += each)
        t->k->product(t->scores + r * PANEL, t->keys + r * t->dim, t->queries + panel * t->dim * PANEL,
                      t->dim, each);
    t->k->attend_weights(t->scores, n, scale, t->top + panel * PANEL, t->total + panel * PANEL, t->factor);
    for (int64_t c = 0; c < t->dim; c += each) {
        for (int64_t i = c; i < c + each; i++)
            for (int l = 0; l < PANEL; l++) sums[i * PANEL + l] *= t->factor[l];
        t->k->product(sums + c * PANEL, t->values + c * TILE_ROWS, t->scores, n, each);
    }
}

static void attend_item(void *ctx, int64_t item, int thread)
{
    struct vision_job *j = ctx;
    int64_t dim = j->y.cols / j->n_heads, n = j->x.rows, stride = j->x.stride;
    int64_t head = item % j->n_heads, first = item / j->n_heads * TILE_ROWS;
    int64_t rows = n - first < TILE_ROWS ? n - first : TILE_ROWS;
    struct attend_tile t = tile_of(j->q->k, j->q->threads[thread].work, dim);
    const float *query = j->x.data + head * dim, *key = query + j->y.cols, *value = key + j->y.cols;
    interleave_rows(t.k, t.queries, query + first * stride, stride, rows, dim, PANEL);
    memset(t.values, 0, (size_t)(2 * TILE_ROWS * t.wide) * sizeof *t.values); /* and the sums */
    for (int i = 0; i < TILE_ROWS; i++) t.top[i] = -INFINITY, t.total[i] = 0;
    for (int64_t at = 0; at < n; at += TILE_ROWS) {
        int64_t keys = n - at < TILE_ROWS ? n - at : TILE_ROWS;
        interleave_rows(t.k, t.keys, key + at * stride, stride, keys, dim, t.k->block_rows);
        lay_values(&t, value + at * stride, stride, keys);
        for (int p = 0; p * PANEL < rows; p++) meet(&t, p, keys, 1 / sqrtf((float)dim));
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t panel = r / PANEL, lane = r % PANEL;
        const float *sums = t.sums + panel * t.wide * PANEL + lane;
        float *out = j->y.data + (first + r) * j->y.stride + head * dim;
        for (int64_t d = 0; d < dim; d++) out[d] = sums[d * PANEL] / t.total[r];
    }
}

void cpu_attention_all(struct queue *q, struct mat y, struct mat qkv, int n_heads)
{
    struct vision_job j = { .q = q, .y = y, .x = qkv, .n_heads = n_heads };
    pool_run(q->pool, (y.rows + TILE_ROWS - 1) / TILE_ROWS * n_heads, attend_item, &j);
}
