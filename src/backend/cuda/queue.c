/* The queue of the CUDA backend: the device, its stream, failures, memory. */
#include "backend/cuda/batch.h"
#include "backend/cuda/blas.h"
#include "backend/cuda/load.h"
#include "backend/cuda/prefill.h"
#include "backend/cuda/tensor_map.h"
#include "backend/fused.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool queue_check(struct queue *q, cudaError_t status, const char *operation)
{
    if (status == cudaSuccess) return !queue_failed(q);
    queue_refuse(q, operation, cudaGetErrorString(status));
    return false;
}

void queue_refuse(struct queue *q, const char *operation, const char *why)
{
    if (queue_failed(q)) return;
    q->failed = operation;
    snprintf(q->failure, sizeof q->failure, "%s", why);
}

static bool refused(struct err *e, cudaError_t status)
{
    return err_set(e, ERR_UNSUPPORTED, "CUDA: %s", cudaGetErrorString(status));
}

static bool describe(struct queue *q, struct err *e)
{
    struct cudaDeviceProp p;
    cudaError_t status = cudaGetDeviceProperties(&p, 0);
    int version;
    if (status != cudaSuccess) return refused(e, status);
    if (p.major < 8)
        return err_set(e, ERR_UNSUPPORTED, "CUDA: %s has compute capability %d.%d, 8.0 or later is needed",
                       p.name, p.major, p.minor);
    if (!cuda_has_kernels(&version))
        return err_set(e, ERR_UNSUPPORTED, "CUDA: this program was built without kernels for sm_%d%d (%s)",
                       p.major, p.minor, p.name);
    q->sms = p.multiProcessorCount;
    q->shared_max = (int)p.sharedMemPerBlockOptin;
    q->has_pdl = p.major >= 9;
    q->passing_most = (size_t)p.accessPolicyMaxWindowSize;
    q->map_maker = p.major >= 9 ? tensor_map_maker() : NULL;
    q->has_wide = p.major == 9 && version == 90;
    if (q->rounded) q->blas = blas_open();
    snprintf(q->name, sizeof q->name, "cuda %.70s, sm_%d%d, kernels for sm_%d%s", p.name, p.major, p.minor,
             version, q->blas ? ", cuBLASLt" : "");
    return true;
}

/* What is queued to the other stream from now on waits for this one's. */
static void tell_other(struct queue *q, const char *operation)
{
    queue_check(q, cudaEventRecord(q->here, q->stream), operation);
    queue_check(q, cudaStreamWaitEvent(q->beside, q->here, 0), operation);
}

void queue_fork(struct queue *q)
{
    if (queue_failed(q)) return;
    tell_other(q, "fork");
    q->forked = true;
}

void queue_other(struct queue *q)
{
    cudaStream_t s = q->stream;
    q->stream = q->beside;
    q->beside = s;
}

void queue_join(struct queue *q)
{
    if (!q->forked) return;
    q->forked = false;
    queue_other(q);
    tell_other(q, "join");
    queue_other(q);
}

/* Freed memory stays with the process: layers come and go during calibration. */
static bool keep_memory(void)
{
    cudaMemPool_t pool;
    uint64_t all = UINT64_MAX;
    return cudaDeviceGetDefaultMemPool(&pool, 0) == cudaSuccess &&
           cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all) == cudaSuccess;
}

bool cuda_queue_create(struct queue **out, const struct backend_options *options, struct err *e)
{
    *out = NULL;
    int n = 0;
    cudaError_t status = cudaGetDeviceCount(&n);
    if (status != cudaSuccess) return refused(e, status);
    struct queue *q = calloc(1, sizeof *q);
    if (!q) return err_memory(e, "CUDA backend", sizeof *q);
    q->shared_memory = options->shared_memory;
    q->rounded = options->rounded;
    bool ok = describe(q, e);
    if (ok) {
        status = cudaStreamCreateWithFlags(&q->stream, cudaStreamNonBlocking);
        if (status == cudaSuccess) status = cudaStreamCreateWithFlags(&q->beside, cudaStreamNonBlocking);
        if (status == cudaSuccess) status = cudaEventCreateWithFlags(&q->here, cudaEventDisableTiming);
        ok = (status == cudaSuccess && keep_memory()) || refused(e, status);
    }
    if (ok)
        *out = q;
    else
        cuda_queue_free(q);
    return ok;
}

void cuda_queue_free(struct queue *q)
{
    if (!q) return;
    cuda_forget_steps(q);
    cuda_load_end(q);
    queue_give(q, q->memory);
    if (q->stream) {
        cudaStreamSynchronize(q->stream);
        cudaStreamDestroy(q->stream);
    }
    if (q->beside) cudaStreamDestroy(q->beside);
    if (q->here) cudaEventDestroy(q->here);
    blas_close(q->blas);
    cudaFreeHost(q->draw.answers);
    free(q->host_step);
    free(q->host_next);
    free(q->host_index);
    free(q);
}

const char *cuda_queue_name(const struct queue *q)
{
    return q->name;
}

void cuda_queue_memory(uint64_t *all, uint64_t *available)
{
    size_t have = 0, total = 0;
    if (cudaMemGetInfo(&have, &total) != cudaSuccess) cudaGetLastError();
    *all = total;
    *available = have;
}

bool queue_take(struct queue *q, void **out, uint64_t bytes, const char *what, struct err *e)
{
    size_t have = 0, all = 0;
    *out = NULL;
    if (bytes == 0) bytes = 16;
    cudaError_t status = cudaMallocAsync(out, bytes, q->stream);
    if (status == cudaSuccess) return true;
    cudaGetLastError();
    cudaMemGetInfo(&have, &all);
    return err_set(e, ERR_MEMORY, "%s: %" PRIu64 " bytes of GPU memory wanted, %zu of %zu are free", what,
                   bytes, have, all);
}

void queue_give(struct queue *q, void *memory)
{
    if (memory) queue_check(q, cudaFreeAsync(memory, q->stream), "free");
}

static bool memory_create(struct queue *q, void **out, uint64_t bytes, struct err *e)
{
    *out = NULL;
    if (bytes == 0) bytes = 16;
    if (!q->shared_memory) {
        if (!queue_take(q, out, bytes, "activations and state", e)) return false;
    } else if (cudaHostAlloc(out, bytes, cudaHostAllocMapped) != cudaSuccess) {
        cudaGetLastError();
        return err_memory(e, "activations and state", bytes);
    }
    queue_check(q, cudaMemsetAsync(*out, 0, bytes, q->stream), "zero");
    if (q->shared_memory) queue_check(q, cudaStreamSynchronize(q->stream), "zero");
    return true;
}

static void memory_free(struct queue *q, void *memory)
{
    if (!memory) return;
    cuda_forget_steps(q);
    if (!q->shared_memory) {
        queue_give(q, memory);
        return;
    }
    queue_check(q, cudaStreamSynchronize(q->stream), "free");
    cudaFreeHost(memory);
}

static void upload(struct queue *q, void *to, const void *host, uint64_t bytes)
{
    if (queue_failed(q)) return;
    queue_check(q, cudaMemcpyAsync(to, host, bytes, cudaMemcpyDefault, q->stream), "upload");
    if (q->shared_memory) queue_check(q, cudaStreamSynchronize(q->stream), "upload");
}

static void copy(struct queue *q, void *to, const void *from, uint64_t bytes)
{
    if (queue_failed(q)) return;
    queue_check(q, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, q->stream), "copy");
}

static void download(struct queue *q, void *host, const void *from, uint64_t bytes)
{
    if (queue_failed(q)) return;
    queue_check(q, cudaMemcpyAsync(host, from, bytes, cudaMemcpyDefault, q->stream), "download");
    queue_check(q, cudaStreamSynchronize(q->stream), "download");
}

static void zero(struct queue *q, void *memory, uint64_t bytes)
{
    if (!queue_failed(q)) queue_check(q, cudaMemsetAsync(memory, 0, bytes, q->stream), "zero");
}

static bool wait(struct queue *q, struct err *e)
{
    if (!queue_failed(q)) queue_check(q, cudaStreamSynchronize(q->stream), "wait");
    return !queue_failed(q) || err_set(e, ERR_IO, "GPU: %s: %s", q->failed, q->failure);
}

/* The table's plain entries that choose between kernels. */

static void matmul(struct queue *q, struct mat y, struct mat x, const struct weight *w)
{
    struct cuda_matrix m = cuda_matrix_of(w);
    if (cuda_fp4_product(q, y, x, &m)) return;
    if (cuda_dense(q, &(struct cuda_products){ .x = x, .n = 1, .out = { y }, .m = { m } })) return;
    if (!queue_prompts(q) && cuda_batch_product(q, y, x, &m)) return;
    if (cuda_streams(q, &m))
        cuda_product(q, y, x, &m);
    else
        cuda_product_plain(q, y, x, &m);
}

static void draw_product(struct queue *q, int32_t *out, struct mat y, struct mat x, const struct weight *w,
                         const uint32_t *allowed, const struct draw *draws)
{
    if (!cuda_draw_coarse(q, out, y, x, w, allowed, draws))
        fused_draw_product(&cuda_ops, q, out, y, x, w, allowed, draws);
}

static void conv(struct queue *q, struct mat y, struct mat u, const float *weight,
                 const struct delta_state *state, const struct delta_shape *shape,
                 const struct step_rows *rows)
{
    (queue_logs(rows) ? cuda_conv_logged : cuda_conv)(q, y, u, weight, state, shape, rows);
}

static void delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b,
                  const float *A_log, const float *dt_bias, const struct delta_state *state,
                  const struct delta_shape *shape, const struct step_rows *rows)
{
    (queue_logs(rows) ? cuda_delta_logged : cuda_delta)(q, o, qkv, a, b, A_log, dt_bias, state, shape, rows);
}

static void experts(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                    const struct experts *list)
{
    const struct cuda_experts *e = list->bound;
    if (cuda_fp4_experts(q, y, x, p, e) || cuda_grouped(q, y, x, p, e, NULL)) return;
    if (!cuda_experts_stream(q, y, x, p, e, NULL)) cuda_experts_plain(q, y, x, p, e);
}

/* Fused runs, where shapes allow; else the operations they stand for. */

static bool delta_streams(const struct queue *q, const struct delta_run *r, const struct step_rows *step)
{
    struct cuda_matrix out = cuda_matrix_of(r->out);
    return queue_decodes(step) && cuda_streams(q, &out) && r->shape->value_dim <= 128;
}

/* A mixer's inputs told, z last: it is not read by DeltaNet's kernel but by the one after. False: not in such
 * a step. */
static bool tell(struct queue *q, struct norm_products *to, const struct norm_products *r)
{
    struct cuda_told *t = &q->told;
    const struct delta_run *m = r->mixer;
    if (!t->next || !m || r->n != 4 || r->x.rows != 1 || !q->current || !delta_streams(q, m, q->current))
        return false;
    static const int last_z[] = { 0, 2, 3, 1 };
    struct mat *const told[] = { &t->u, &t->z, &t->a, &t->b };
    const struct mat *const wanted[] = { &m->u, &m->z, &m->a, &m->b };
    int64_t words = 0;
    for (int i = 0; i < 4; i++) {
        if (r->out[i].data != wanted[i]->data) return false;
        words += r->out[i].cols;
    }
    if (words > t->absent) return false;
    float *at = t->next;
    *to = *r;
    for (int i = 0; i < 4; i++) {
        int k = last_z[i];
        *told[k] = mat_of(at, 1, r->out[k].cols);
        to->out[i] = *told[k];
        to->w[i] = r->w[k];
        at += r->out[k].cols;
    }
    t->used = true;
    return true;
}

static void norm_products(struct queue *q, const struct norm_products *r)
{
    bool streams = queue_few(q, r->x.rows);
    q->batch.known = q->prefill.known = NULL; /* h will be another */
    if ((!queue_prompts(q) && cuda_batch_norm_products(q, r)) || cuda_norm_products_many(q, r)) return;
    for (int i = 0; streams && i < r->n; i++) {
        struct cuda_matrix m = cuda_matrix_of(r->w[i]);
        streams = cuda_streams(q, &m);
    }
    struct norm_products told;
    if (streams)
        cuda_norm_products(q, tell(q, &told, r) ? &told : r);
    else
        fused_norm_products(&cuda_ops, q, r);
}

static void delta_run(struct queue *q, const struct delta_run *r, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return;
    if (!delta_streams(q, r, step)) {
        cuda_delta_many(q, r, step);
        return;
    }
    if (q->told.used) {
        struct delta_run told = *r;
        told.u = q->told.u, told.z = q->told.z, told.a = q->told.a, told.b = q->told.b;
        cuda_delta_decode(q, &told, rows);
        cuda_delta_out(q, &told, rows, true);
        q->told.used = false;
        return;
    }
    enum delta_done done = cuda_batch_delta(q, r, rows);
    bool advance = done == DELTA_TO_ADVANCE;
    if (advance) cuda_delta_decode(q, r, rows);
    if (!cuda_batch_delta_out(q, r, rows, done)) cuda_delta_out(q, r, rows, advance);
}

static void attention_run(struct queue *q, const struct attention_run *r, const struct step_rows *step)
{
    struct cuda_matrix o = cuda_matrix_of(r->o);
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return;
    if (!queue_decodes(step) || !cuda_streams(q, &o)) {
        cuda_attention_many(q, r, step);
        return;
    }
    cuda_attention_decode(q, r, rows);
    if (!cuda_batch_attention_out(q, r)) cuda_attention_out(q, r);
}

static void moe_run(struct queue *q, const struct moe_run *r)
{
    if ((!queue_prompts(q) && cuda_batch_moe(q, r)) || cuda_moe_many(q, r)) return;
    if (!queue_few(q, r->h.rows) || !cuda_experts_stream(q, r->y, r->h, r->picks, r->experts->bound, r))
        fused_moe(&cuda_ops, q, r);
}

const struct ops cuda_ops = {
    .name = "cuda",
    .weight_create = cuda_weight_create,
    .weights_create = cuda_weights_create,
    .weights_join = cuda_weights_join,
    .coarse_bytes = cuda_coarse_bytes,
    .weight_coarsen = cuda_weight_coarsen,
    .weight_free = cuda_weight_free,
    .memory_create = memory_create,
    .memory_free = memory_free,
    .upload = upload,
    .copy = copy,
    .download = download,
    .zero = zero,
    .reserve = cuda_reserve,
    .reserve_bytes = cuda_reserve_bytes,
    .experts_bind = cuda_experts_bind,
    .experts_unbind = cuda_experts_unbind,
    .wait = wait,
    .read_speed = cuda_read_speed,
    .step_begin = cuda_step_begin,
    .step_end = cuda_step_end,
    .embed = cuda_embed,
    .matmul = matmul,
    .add = cuda_add,
    .rmsnorm = cuda_rmsnorm,
    .gather = cuda_gather,
    .silu_mul = cuda_silu_mul,
    .add_gated = cuda_add_gated,
    .norm_rope = cuda_norm_rope,
    .kv_append = cuda_kv_append,
    .attention = cuda_attention,
    .conv = conv,
    .delta = delta,
    .gated_norm = cuda_gated_norm,
    .layer_norm = cuda_layer_norm,
    .add_bias = cuda_add_bias,
    .rotate = cuda_rotate,
    .attention_all = cuda_attention_all,
    .route = cuda_route,
    .experts = experts,
    .absmax = cuda_absmax,
    .moments = cuda_moments,
    .log_softmax = cuda_log_softmax,
    .divergence = cuda_divergence,
    .pick = cuda_pick,
    .argmax = cuda_argmax,
    .mask = cuda_mask,
    .edit = cuda_edit,
    .draw = cuda_draw,
    .draw_product = draw_product,
    .norm_products = norm_products,
    .delta_run = delta_run,
    .attention_run = attention_run,
    .moe_run = moe_run,
    .observe = cuda_observe,
    .packs = cuda_packs,
    .factor = cuda_factor,
    .pack = cuda_pack,
};
