/* Weights of the CUDA backend: copied to the device as they lie in the file, NVFP4 rearranged there, the
 * experts of a layer put below one another. */
#include "backend/cuda/parts.h"
#include "base/checked.h"
#include "num/fp8.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static bool is_fp8(enum weight_format f)
{
    return f == WEIGHT_FP8 || f == WEIGHT_FP8_BLOCK;
}

static uint64_t data_bytes(const struct weight *w)
{
    uint64_t n = (uint64_t)w->rows * (uint64_t)w->cols;
    if (w->format == WEIGHT_NVFP4) return (uint64_t)fp4_bytes(w->rows, w->cols);
    return is_fp8(w->format) ? n : w->format == WEIGHT_F32 ? 4 * n : 2 * n;
}

static uint64_t scale_bytes(const struct weight *w)
{
    if (w->format == WEIGHT_FP8) return (uint64_t)w->rows * sizeof(float);
    return w->format == WEIGHT_FP8_BLOCK
               ? (uint64_t)(fp8_blocks(w->rows) * fp8_blocks(w->cols)) * sizeof(float)
               : 0;
}

/* Streaming kernels read whole tiles of eight rows. */
static uint64_t tile_slack(const struct weight *w)
{
    bool tiled = w->format == WEIGHT_BF16 || w->format == WEIGHT_FP8;
    return tiled ? 8 * (uint64_t)w->cols * (w->format == WEIGHT_BF16 ? 2 : 1) : 0;
}

/* The first NaN among E4M3 bytes, or -1. */
static int64_t find_nan(const uint8_t *bytes, int64_t n)
{
    enum { BLOCK = 4096 };
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t count = n - at < BLOCK ? n - at : BLOCK;
        uint8_t found = 0;
        for (int64_t i = 0; i < count; i++) found |= (bytes[at + i] & 0x7f) == 0x7f;
        for (int64_t i = 0; found && i < count; i++)
            if ((bytes[at + i] & 0x7f) == 0x7f) return at + i;
    }
    return -1;
}

static bool takes_input(const struct weight_source *s, struct err *e)
{
    static const char *const fp8[] = {
        [INPUT_FP8_FIXED] = "FP8 with one scale for all", [INPUT_FP8_GROUPS] = "FP8 in groups of 128"
    };
    if (s->input != INPUT_FP8_FIXED && s->input != INPUT_FP8_GROUPS) return true;
    return err_set(e, ERR_UNSUPPORTED, "inputs rounded to %s are not implemented on a GPU; use --device cpu",
                   fp8[s->input]);
}

static bool check_source(const struct weight_source *s, struct err *e)
{
    uint64_t elements, bytes;
    int64_t at = -1, n = s->rows * s->cols;
    if (!fits_mul((uint64_t)s->rows, (uint64_t)s->cols, &elements) || !fits_mul(elements, 4, &bytes) ||
        s->rows > INT32_MAX / 2 || s->cols > INT32_MAX / 2)
        return err_set(e, ERR_LIMIT, "matrix of %" PRId64 " x %" PRId64 " is too large", s->rows, s->cols);
    if (s->is_table) return true;
    if (!takes_input(s, e)) return false;
    if (is_fp8(s->format)) at = find_nan(s->data, n);
    if (s->format == WEIGHT_NVFP4 && (at = find_nan(s->scale, n / 16)) >= 0) at *= 16;
    return at < 0 ||
           err_set(e, ERR_FORMAT, "NaN at row %" PRId64 ", column %" PRId64, at / s->cols, at % s->cols);
}

static bool copy(struct queue *q, void *to, const void *host, uint64_t bytes)
{
    return bytes == 0 ||
           queue_check(q, cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, q->stream), "weights");
}

/* Codes and scales as stored pass through memory that is given back. */
static bool fill_fp4(struct queue *q, struct cuda_weight *w, const struct weight_source *s, struct err *e)
{
    uint64_t codes = (uint64_t)s->rows * (uint64_t)s->cols / 2, scales = codes / 8;
    void *staged;
    if (!queue_take(q, &staged, codes + scales, "weights", e)) return false;
    copy(q, staged, s->data, codes);
    copy(q, (char *)staged + codes, s->scale, scales);
    cuda_lay_fp4(q, w->data, staged, (char *)staged + codes, s->rows, s->cols, s->input == INPUT_NVFP4);
    queue_give(q, staged);
    return true;
}

static bool fill(struct queue *q, struct cuda_weight *w, const struct weight_source *s, struct err *e)
{
    void *scale = NULL;
    uint64_t bytes = data_bytes(&w->head);
    bool ok = queue_take(q, &w->data, bytes + tile_slack(&w->head), "weights", e) &&
              (!scale_bytes(&w->head) || queue_take(q, &scale, scale_bytes(&w->head), "weights", e));
    w->scale = scale;
    if (!ok) return false;
    if (s->format == WEIGHT_NVFP4) {
        if (!fill_fp4(q, w, s, e)) return false;
    } else {
        copy(q, w->data, s->data, bytes);
        copy(q, scale, s->scale, scale_bytes(&w->head));
    }
    return !queue_failed(q) || err_set(e, ERR_IO, "GPU: %s: %s", q->failed, q->failure);
}

bool cuda_weight_create(struct queue *q, struct weight **out, const struct weight_source *s, struct err *e)
{
    *out = NULL;
    if (!check_source(s, e)) return false;
    struct cuda_weight *w = calloc(1, sizeof *w);
    if (!w) return err_memory(e, "weight", sizeof *w);
    w->head = (struct weight){ s->format, s->rows, s->cols, s->input, s->input_global, s->is_table };
    w->global = s->global;
    if (fill(q, w, s, e)) {
        *out = &w->head;
        return true;
    }
    cuda_weight_free(q, &w->head);
    return false;
}

static void give_parts(struct queue *q, struct cuda_weight *w)
{
    if (!w->moved) {
        queue_give(q, w->data);
        queue_give(q, w->scale);
    }
    w->data = NULL;
    w->scale = NULL;
}

void cuda_weight_free(struct queue *q, struct weight *weight)
{
    if (!weight) return;
    cuda_forget_steps(q);
    give_parts(q, (struct cuda_weight *)weight);
    free(weight);
}

struct cuda_matrix cuda_matrix_of(const struct weight *weight)
{
    const struct cuda_weight *w = (const struct cuda_weight *)weight;
    return (struct cuda_matrix){ .data = w->data,
                                 .scale = w->scale,
                                 .global = w->global,
                                 .input_global = weight->input_global,
                                 .rows = (int)weight->rows,
                                 .cols = (int)weight->cols,
                                 .format = (unsigned char)weight->format,
                                 .input = (unsigned char)weight->input };
}

/* Experts. */

static bool all_alike(struct weight **list, int n, struct err *e)
{
    for (int i = 1; i < n; i++) {
        const struct weight *a = list[0], *b = list[i];
        if (a->format != b->format || a->rows != b->rows || a->cols != b->cols || a->input != b->input)
            return err_set(
                e, ERR_UNSUPPORTED,
                "experts 0 and %d differ in format or shape: on a GPU all experts of a layer must agree", i);
    }
    return true;
}

/* One of the parts of every weight of the list, below one another in *block. */
static bool move_part(struct queue *q, struct weight **list, int n, size_t part, uint64_t each, void **block,
                      struct err *e)
{
    *block = NULL;
    if (each == 0) return true;
    if (!queue_take(q, block, each * (uint64_t)n + tile_slack(list[0]), "experts", e)) return false;
    for (int i = 0; i < n; i++) {
        void **at = (void **)((char *)list[i] + part), *to = (char *)*block + (uint64_t)i * each;
        queue_check(q, cudaMemcpyAsync(to, *at, each, cudaMemcpyDeviceToDevice, q->stream), "experts");
        queue_give(q, *at);
        *at = to;
    }
    return true;
}

static bool move_all(struct queue *q, struct cuda_matrix *m, struct weight **list, int n, struct err *e)
{
    void *data, *scale;
    const struct weight *w = list[0];
    bool ok = all_alike(list, n, e) &&
              move_part(q, list, n, offsetof(struct cuda_weight, data), data_bytes(w), &data, e) &&
              move_part(q, list, n, offsetof(struct cuda_weight, scale), scale_bytes(w), &scale, e);
    if (!ok) return false;
    for (int i = 0; i < n; i++) ((struct cuda_weight *)list[i])->moved = true;
    *m = cuda_matrix_of(w);
    return true;
}

static bool upload_globals(struct queue *q, struct cuda_experts *x, struct weight **lists[3], struct err *e)
{
    size_t n = (size_t)x->n * 3;
    float *host = malloc(2 * n * sizeof *host + 1);
    void *device;
    if (!host) return err_memory(e, "experts", 2 * n * sizeof *host);
    for (size_t i = 0; i < n; i++) {
        const struct cuda_weight *w = (const struct cuda_weight *)lists[i / (size_t)x->n][i % (size_t)x->n];
        host[i] = w->global;
        host[n + i] = w->head.input_global;
    }
    bool ok = queue_take(q, &device, 2 * n * sizeof *host, "experts", e);
    if (ok) {
        copy(q, device, host, 2 * n * sizeof *host);
        x->globals = device;
        x->input_globals = x->globals + n;
    }
    free(host);
    return ok;
}

bool cuda_experts_bind(struct queue *q, struct experts *list, struct err *e)
{
    struct weight **lists[] = { list->gate, list->up, list->down };
    struct cuda_experts *x = calloc(1, sizeof *x);
    list->bound = x;
    if (!x) return err_memory(e, "experts", sizeof *x);
    x->n = list->n_experts;
    bool ok = true;
    for (int i = 0; ok && i < 3; i++) ok = move_all(q, &x->m[i], lists[i], x->n, e);
    ok = ok && upload_globals(q, x, lists, e);
    return ok;
}

void cuda_experts_unbind(struct queue *q, struct experts *list)
{
    struct cuda_experts *x = list->bound;
    if (!x) return;
    cuda_forget_steps(q);
    for (int i = 0; i < 3; i++) {
        queue_give(q, (void *)x->m[i].data);
        queue_give(q, (void *)x->m[i].scale);
    }
    queue_give(q, x->globals);
    free(x);
    list->bound = NULL;
}
