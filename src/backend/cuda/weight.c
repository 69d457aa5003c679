/* Weights of the CUDA backend: copied to the device as they lie in the file, NVFP4 rearranged there, the
 * experts of a layer put below one another. */
#include "backend/cuda/load.h"
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
    if (!fits_mul((uint64_t)s->rows, (uint64_t)s->cols, &elements) || !fits_mul(elements, 4, &bytes) ||
        s->rows > INT32_MAX / 2 || s->cols > INT32_MAX / 2)
        return err_set(e, ERR_LIMIT, "matrix of %" PRId64 " x %" PRId64 " is too large", s->rows, s->cols);
    return s->is_table || takes_input(s, e);
}

static bool copy(struct queue *q, void *to, const void *host, uint64_t bytes)
{
    return bytes == 0 ||
           queue_check(q, cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, q->stream), "weights");
}

/* A matrix on its way: what of it is copied where. Codes and scales of NVFP4 pass through memory that is
 * given back. */
struct arrival {
    struct cuda_weight *w;
    const struct weight_source *src;
    void *staged;
    int loads[2]; /* of data and scale: index of its struct load, -1: none */
};

static int add_load(struct load *list, int *n, void *to, const void *from, uint64_t bytes, bool is_e4m3)
{
    if (bytes == 0) return -1;
    list[*n] = (struct load){ .to = to, .from = from, .bytes = bytes, .is_e4m3 = is_e4m3 };
    return (*n)++;
}

static bool expect(struct queue *q, struct arrival *a, struct load *list, int *n, struct err *e)
{
    const struct weight_source *s = a->src;
    struct cuda_weight *w = a->w;
    uint64_t codes = (uint64_t)s->rows * (uint64_t)s->cols / 2, bytes = data_bytes(&w->head);
    void *scale = NULL;
    bool packed = s->format == WEIGHT_NVFP4;
    bool ok = queue_take(q, &w->data, bytes + tile_slack(&w->head), "weights", e) &&
              (!scale_bytes(&w->head) || queue_take(q, &scale, scale_bytes(&w->head), "weights", e)) &&
              (!packed || queue_take(q, &a->staged, codes + codes / 8, "weights", e));
    w->scale = scale;
    if (!ok) return false;
    if (packed) {
        a->loads[0] = add_load(list, n, a->staged, s->data, codes, false);
        a->loads[1] = add_load(list, n, (char *)a->staged + codes, s->scale, codes / 8, !s->is_table);
    } else {
        a->loads[0] = add_load(list, n, w->data, s->data, bytes, is_fp8(s->format) && !s->is_table);
        a->loads[1] = add_load(list, n, scale, s->scale, scale_bytes(&w->head), false);
    }
    return true;
}

/* Once the bytes are on their way: what they are is known, and NVFP4 is laid out. */
static bool settle(struct queue *q, const struct arrival *a, const struct load *list, struct err *e)
{
    const struct weight_source *s = a->src;
    bool packed = s->format == WEIGHT_NVFP4;
    int which = a->loads[packed];
    int64_t at = which < 0 ? -1 : list[which].nan_at * (packed ? 16 : 1);
    if (at >= 0)
        return err_set(e, ERR_FORMAT, "NaN at row %" PRId64 ", column %" PRId64, at / s->cols, at % s->cols);
    if (packed)
        cuda_lay_fp4(q, a->w->data, a->staged, (char *)a->staged + s->rows * s->cols / 2, s->rows, s->cols,
                     s->input == INPUT_NVFP4);
    return !queue_failed(q) || err_set(e, ERR_IO, "GPU: %s: %s", q->failed, q->failure);
}

static bool arrive(struct queue *q, struct arrival *all, struct load *list, int n, int *failed, struct err *e)
{
    int n_loads = 0;
    for (int i = 0; i < n; i++) {
        *failed = i;
        if (!check_source(all[i].src, e)) return false;
        struct cuda_weight *w = all[i].w = calloc(1, sizeof *w);
        const struct weight_source *s = all[i].src;
        if (!w) return err_memory(e, "weight", sizeof *w);
        w->head = (struct weight){ s->format, s->rows, s->cols, s->input, s->input_global, s->is_table, 0 };
        w->global = s->global;
        if (!expect(q, &all[i], list, &n_loads, e)) return false;
    }
    *failed = 0;
    if (!cuda_load(q, list, n_loads, e)) return false;
    for (int i = 0; i < n; i++) {
        *failed = i;
        if (!settle(q, &all[i], list, e)) return false;
    }
    return true;
}

bool cuda_weights_create(struct queue *q, struct weight **out, const struct weight_source *src, int n,
                         int *failed, struct err *e)
{
    struct arrival *all = calloc((size_t)n, sizeof *all);
    struct load *list = calloc(2 * (size_t)n, sizeof *list);
    bool ok = (all && list) || err_memory(e, "weights", (uint64_t)n * (sizeof *all + 2 * sizeof *list));
    *failed = 0;
    for (int i = 0; ok && i < n; i++) all[i].src = &src[i];
    ok = ok && arrive(q, all, list, n, failed, e);
    for (int i = 0; i < n; i++) {
        out[i] = ok ? &all[i].w->head : NULL;
        if (all) queue_give(q, all[i].staged);
        if (all && all[i].w && !ok) cuda_weight_free(q, &all[i].w->head);
    }
    free(all);
    free(list);
    return ok;
}

bool cuda_weight_create(struct queue *q, struct weight **out, const struct weight_source *s, struct err *e)
{
    int failed;
    return cuda_weights_create(q, out, s, 1, &failed, e);
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
    queue_give(q, ((struct cuda_weight *)weight)->coarse);
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

/* Bytes of one of a weight's parts. */
typedef uint64_t part_bytes(const struct weight *w);

/* Room for that part of every weight of the list; NULL where they have none. */
static bool take_block(struct queue *q, struct weight **list, int n, part_bytes *bytes, void **block,
                       struct err *e)
{
    uint64_t all = 0;
    *block = NULL;
    for (int i = 0; i < n; i++) all += bytes(list[i]);
    return all == 0 || queue_take(q, block, all + tile_slack(list[0]), "weights", e);
}

/* These parts, below one another in the block. */
static void move_part(struct queue *q, struct weight **list, int n, size_t part, part_bytes *bytes,
                      void *block)
{
    char *to = block;
    for (int i = 0; block && i < n; i++) {
        void **at = (void **)((char *)list[i] + part);
        queue_check(q, cudaMemcpyAsync(to, *at, bytes(list[i]), cudaMemcpyDeviceToDevice, q->stream),
                    "weights");
        queue_give(q, *at);
        *at = to;
        to += bytes(list[i]);
    }
}

/* Both parts or, where there is no room for one of them, neither. */
static bool move_all(struct queue *q, struct weight **list, int n, struct err *e)
{
    void *data = NULL, *scale = NULL;
    bool ok = take_block(q, list, n, data_bytes, &data, e) && take_block(q, list, n, scale_bytes, &scale, e);
    if (!ok) {
        queue_give(q, data);
        return false;
    }
    move_part(q, list, n, offsetof(struct cuda_weight, data), data_bytes, data);
    move_part(q, list, n, offsetof(struct cuda_weight, scale), scale_bytes, scale);
    for (int i = 0; i < n; i++) ((struct cuda_weight *)list[i])->moved = true;
    return true;
}

/* Kernels want parts that begin at 256 bytes, as what was allocated does. */
static bool joins(const struct weight *a, const struct weight *b)
{
    return (a->format == WEIGHT_BF16 || a->format == WEIGHT_FP8) && a->format == b->format &&
           a->cols == b->cols && a->input == b->input && !a->is_table && !b->is_table &&
           data_bytes(a) % 256 == 0 && scale_bytes(a) % 256 == 0;
}

void cuda_weights_join(struct queue *q, struct weight **list, int n)
{
    struct err none = { 0 };
    for (int first = 0, next; first < n; first = next) {
        next = first + 1;
        while (next < n && joins(list[next - 1], list[next])) next++;
        if (next > first + 1 && move_all(q, list + first, next - first, &none))
            ((struct cuda_weight *)list[first])->moved = false; /* it has the block */
    }
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
    for (int i = 0; ok && i < 3; i++) {
        ok = all_alike(lists[i], x->n, e) && move_all(q, lists[i], x->n, e);
        if (ok) x->m[i] = cuda_matrix_of(lists[i][0]);
    }
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
