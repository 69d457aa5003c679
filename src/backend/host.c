#include "backend/host.h"
#include "num/bf16.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Of calloc's block, at the next multiple of 64 that leaves room for the block's address in front. Large
 * blocks are pages that the system gives when they are touched: sequences that never get long take no memory.
 */
bool host_memory_create(struct queue *q, void **out, uint64_t bytes, struct err *e)
{
    (void)q;
    *out = NULL;
    char *block = bytes <= SIZE_MAX - 128 ? calloc(1, bytes + 128) : NULL;
    if (!block) return err_memory(e, "activations and state", bytes);
    char *aligned = block + 128 - ((uintptr_t)block & 63);
    memcpy(aligned - sizeof block, &block, sizeof block);
    *out = aligned;
    return true;
}

void host_memory_free(struct queue *q, void *memory)
{
    (void)q;
    char *block = NULL;
    if (memory) memcpy(&block, (char *)memory - sizeof block, sizeof block);
    free(block);
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

bool host_experts_bind(struct queue *q, struct experts *x, struct err *e)
{
    (void)q, (void)x, (void)e;
    return true;
}

void host_experts_unbind(struct queue *q, struct experts *x)
{
    (void)q, (void)x;
}

bool host_wait(struct queue *q, struct err *e)
{
    (void)q, (void)e;
    return true;
}

void host_weights_join(struct queue *q, struct weight **list, int n)
{
    (void)q, (void)list, (void)n;
}

uint64_t host_coarse_bytes(struct queue *q, enum weight_format format, int64_t rows, int64_t cols)
{
    (void)q, (void)format, (void)rows, (void)cols;
    return 0;
}

void host_weight_coarsen(struct queue *q, struct weight *w)
{
    (void)q, (void)w;
}

uint64_t host_reserve_bytes(struct queue *q, const struct step_limits *limits)
{
    (void)q, (void)limits;
    return 0;
}

double host_read_speed(struct queue *q)
{
    (void)q;
    return 0;
}

bool host_step_begin(struct queue *q, const void *key, const struct step_rows *rows)
{
    (void)q, (void)key, (void)rows;
    return false;
}

void host_step_end(struct queue *q)
{
    (void)q;
}

void host_pick(struct queue *q, float *out, struct mat x, const int32_t *column)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++) out[i] = x.data[i * x.stride + column[i]];
}

void host_argmax(struct queue *q, int32_t *out, struct mat x)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++) {
        const float *row = x.data + i * x.stride;
        out[i] = 0;
        for (int64_t c = 1; c < x.cols; c++)
            if (row[c] > row[out[i]]) out[i] = (int32_t)c;
    }
}

void host_mask(struct queue *q, struct mat x, const uint32_t *allowed)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++)
        for (int64_t c = 0; c < x.cols; c++)
            if (!draw_allows(allowed, c)) x.data[i * x.stride + c] = -INFINITY;
}

void host_edit(struct queue *q, struct mat x, const struct logit_edit *edits, int64_t n)
{
    (void)q;
    for (int64_t i = 0; i < n; i++) {
        float *at = x.data + edits[i].row * x.stride + edits[i].column;
        *at = edit_apply(*at, &edits[i]);
    }
}

void host_absmax(struct queue *q, uint32_t *top, struct mat x)
{
    (void)q;
    for (int64_t r = 0; r < x.rows; r++) {
        const float *row = x.data + r * x.stride;
        uint32_t most = 0;
        for (int64_t c = 0; c < x.cols; c++) {
            uint32_t u = f32_bits(row[c]) & 0x7fffffffu;
            most = u > most ? u : most;
        }
        if (most > *top) *top = most;
    }
}
