/* Operations that go row by row: embedding, norms, gates, log-probabilities. One block a row, or a thread an element. */
#include "backend/cuda/device.cuh"

namespace {

__global__ void embed_rows(mat y, const void *table, int format, cuda_rows rows)
{
    cuda_row row = rows.rows[blockIdx.x];
    for (int64_t c = threadIdx.x; c < y.cols; c += THREADS) {
        int64_t i = row.token * y.cols + c;
        float v;
        if (row.embedding >= 0)
            v = rows.embeddings[row.embedding * y.cols + c];
        else if (format == WEIGHT_BF16)
            v = __bfloat162float(((const __nv_bfloat16 *)table)[i]);
        else
            v = format == WEIGHT_F16 ? __half2float(((const __half *)table)[i]) : ((const float *)table)[i];
        y.data[blockIdx.x * y.stride + c] = v;
    }
}

__global__ void add_rows(mat y, mat x)
{
    wait_for_previous();
    let_next_start();
    int64_t r = blockIdx.y, c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (c < y.cols) y.data[r * y.stride + c] += x.data[r * x.stride + c];
}

__global__ void norm_rows(mat y, mat x, const float *gain, float eps)
{
    __shared__ float part[WARPS];
    const float *in = x.data + blockIdx.x * x.stride;
    float scale = block_inverse_rms(in, (int)x.cols, eps, part);
    for (int c = threadIdx.x; c < x.cols; c += THREADS) y.data[blockIdx.x * y.stride + c] = in[c] * scale * gain[c];
}

__global__ void gather_rows(mat y, mat x, const long long *index)
{
    const float *in = x.data + index[blockIdx.x] * x.stride;
    for (int64_t c = threadIdx.x; c < y.cols; c += THREADS) y.data[blockIdx.x * y.stride + c] = in[c];
}

__global__ void silu_mul_rows(mat y, mat gate, mat up)
{
    int64_t r = blockIdx.y, c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (c < y.cols) y.data[r * y.stride + c] = silu(gate.data[r * gate.stride + c]) * up.data[r * up.stride + c];
}

__global__ void add_gated_rows(mat y, mat x, mat gate)
{
    int64_t r = blockIdx.y, c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (c < y.cols) y.data[r * y.stride + c] += sigmoid(gate.data[r * gate.stride]) * x.data[r * x.stride + c];
}

/* A warp a head, to the bit as streaming products make their gated inputs (product.cu: place_heads); grid: heads, rows. */
__global__ void gated_norm_heads(mat y, mat x, mat z, const float *gain, int dim, float eps)
{
    int64_t head = ((int64_t)blockIdx.x * WARPS + threadIdx.x / LANES) * dim, r = blockIdx.y;
    if (head >= x.cols) return;
    const float *in = x.data + r * x.stride + head, *gate = z.data + r * z.stride + head;
    float sum = 0;
    for (int d = 2 * (threadIdx.x % LANES); d < dim; d += 2 * LANES) {
        float second = d + 1 < dim ? in[d + 1] : 0;
        sum = fmaf(in[d], in[d], fmaf(second, second, sum));
    }
    float scale = rsqrtf(warp_sum(sum) / (float)dim + eps);
    for (int d = threadIdx.x % LANES; d < dim; d += LANES)
        y.data[r * y.stride + head + d] = in[d] * scale * gain[d] * silu(gate[d]);
}

__device__ double block_sum_double(double x, double *part)
{
    for (int o = LANES / 2; o > 0; o /= 2) x += __shfl_xor_sync(ALL, x, o);
    if (threadIdx.x % LANES == 0) part[threadIdx.x / LANES] = x;
    __syncthreads();
    x = part[0];
    for (int w = 1; w < WARPS; w++) x += part[w];
    return x;
}

__global__ void log_softmax_rows(mat x)
{
    __shared__ float top_part[WARPS];
    __shared__ double part[WARPS];
    float *row = x.data + blockIdx.x * x.stride, top = -INFINITY;
    double sum = 0;
    for (int64_t c = threadIdx.x; c < x.cols; c += THREADS) top = fmaxf(top, row[c]);
    top = block_max(top, top_part);
    for (int64_t c = threadIdx.x; c < x.cols; c += THREADS) sum += (double)expf(row[c] - top);
    double log_sum = log(block_sum_double(sum, part));
    for (int64_t c = threadIdx.x; c < x.cols; c += THREADS) row[c] = (float)((double)row[c] - top - log_sum);
}

__global__ void divergence_rows(double *out, mat p, mat other)
{
    __shared__ double part[WARPS];
    double sum = 0;
    for (int64_t c = threadIdx.x; c < p.cols; c += THREADS) {
        double a = p.data[blockIdx.x * p.stride + c], b = other.data[blockIdx.x * other.stride + c];
        sum += (double)expf((float)a) * (a - b);
    }
    sum = block_sum_double(sum, part);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void pick_elements(float *out, mat x, const long long *column)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < x.rows) out[i] = x.data[i * x.stride + column[i]];
}

/* Orders values, of equals the first column first; NaN below everything. */
__device__ unsigned long long argmax_key(float x, int64_t c)
{
    uint32_t u = __float_as_uint(x);
    u = isnan(x) ? 0 : u & 0x80000000u ? ~u : u | 0x80000000u;
    return (unsigned long long)u << 32 | (uint32_t)~c;
}

/* Grid: parts of a row, rows. keys: 0 before. */
__global__ void argmax_rows(unsigned long long *keys, mat x)
{
    const float *row = x.data + blockIdx.y * x.stride;
    unsigned long long best = 0;
    for (int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x; c < x.cols; c += (int64_t)gridDim.x * THREADS) {
        unsigned long long key = argmax_key(row[c], c);
        best = key > best ? key : best;
    }
    for (int o = LANES / 2; o > 0; o /= 2) {
        unsigned long long other = __shfl_xor_sync(ALL, best, o);
        best = other > best ? other : best;
    }
    if (threadIdx.x % LANES == 0) atomicMax(keys + blockIdx.y, best);
}

__global__ void argmax_columns(int *out, const unsigned long long *keys, int64_t rows)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < rows) out[i] = (int)~(uint32_t)keys[i];
}

dim3 elements(const mat &m)
{
    return dim3(blocks(m.cols), (unsigned)m.rows);
}

} /* namespace */

/* Small arrays from the host: staged by the driver before the call returns. */
static bool upload_to(struct queue *q, void *to, const void *host, size_t bytes, const char *operation)
{
    return !queue_failed(q) &&
           queue_check(q, cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, q->stream), operation);
}

void cuda_embed(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    const struct cuda_weight *w = (const struct cuda_weight *)table;
    for (int64_t i = 0; rows && i < step->n; i++)
        if (step->rows[i].embedding && !upload_to(q, q->embeddings + i * y.cols, step->rows[i].embedding,
                                                  (size_t)y.cols * sizeof(float), "embed"))
            return;
    if (rows)
        launch(q, "embed", false, embed_rows, dim3((unsigned)step->n), 0, y, (const void *)w->data,
               (int)table->format, *rows);
}

void cuda_add(struct queue *q, struct mat y, struct mat x)
{
    launch(q, "add", true, add_rows, elements(y), 0, y, x);
}

void cuda_rmsnorm(struct queue *q, struct mat y, struct mat x, const float *gain, float eps)
{
    launch(q, "rmsnorm", false, norm_rows, dim3((unsigned)x.rows), 0, y, x, gain, eps);
}

static void answer(struct queue *q, void *host, const void *device, size_t bytes, const char *operation)
{
    if (queue_failed(q)) return;
    if (queue_check(q, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, q->stream), operation))
        queue_check(q, cudaStreamSynchronize(q->stream), operation);
}

void cuda_gather(struct queue *q, struct mat y, struct mat x, const int64_t *index)
{
    if (y.rows > 0 && upload_to(q, q->index, index, (size_t)y.rows * sizeof *index, "gather"))
        launch(q, "gather", false, gather_rows, dim3((unsigned)y.rows), 0, y, x, (const long long *)q->index);
}

void cuda_silu_mul(struct queue *q, struct mat y, struct mat gate, struct mat up)
{
    launch(q, "silu_mul", false, silu_mul_rows, elements(y), 0, y, gate, up);
}

void cuda_add_gated(struct queue *q, struct mat y, struct mat x, struct mat gate)
{
    launch(q, "add_gated", false, add_gated_rows, elements(y), 0, y, x, gate);
}

void cuda_gated_norm(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim, float eps)
{
    launch(q, "gated_norm", false, gated_norm_heads, dim3(blocks(x.cols / dim, WARPS), (unsigned)x.rows), 0, y, x, z,
           gain, dim, eps);
}

void cuda_log_softmax(struct queue *q, struct mat x)
{
    launch(q, "log_softmax", false, log_softmax_rows, dim3((unsigned)x.rows), 0, x);
}

void cuda_divergence(struct queue *q, double *out, struct mat p, struct mat other)
{
    launch(q, "divergence", false, divergence_rows, dim3((unsigned)p.rows), 0, q->answers, p, other);
    answer(q, out, q->answers, (size_t)p.rows * sizeof *out, "divergence");
}

void cuda_pick(struct queue *q, float *out, struct mat x, const int32_t *column)
{
    if (x.rows == 0) return;
    for (int64_t i = 0; i < x.rows; i++) q->host_index[i] = column[i];
    if (!upload_to(q, q->index, q->host_index, (size_t)x.rows * sizeof *q->host_index, "pick")) return;
    launch(q, "pick", false, pick_elements, dim3(blocks(x.rows)), 0, (float *)q->answers, x,
           (const long long *)q->index);
    answer(q, out, q->answers, (size_t)x.rows * sizeof *out, "pick");
}

void cuda_argmax(struct queue *q, int32_t *out, struct mat x)
{
    unsigned long long *keys = (unsigned long long *)q->index;
    unsigned parts = blocks(x.cols, 4 * THREADS);
    if (queue_failed(q) || x.rows == 0) return;
    if (!queue_check(q, cudaMemsetAsync(keys, 0, (size_t)x.rows * sizeof *keys, q->stream), "argmax")) return;
    launch(q, "argmax", false, argmax_rows, dim3(parts < 256 ? parts : 256, (unsigned)x.rows), 0, keys, x);
    launch(q, "argmax", false, argmax_columns, dim3(blocks(x.rows)), 0, (int *)q->answers, (const unsigned long long *)keys,
           x.rows);
    answer(q, out, q->answers, (size_t)x.rows * sizeof *out, "argmax");
}
