/* What a vision tower needs besides products. Attention goes by tiles: a block owns TILE queries of one head, looks at
 * TILE keys at a time and keeps, in shared memory, the sums of values, each query's largest score and the sum of its
 * weights. Shared: queries, keys and values [TILE][dim + 1], sums [TILE][dim], scores [TILE][TILE + 1]. */
#include "backend/cuda/device.cuh"

namespace {

constexpr int TILE = 32, WIDE = TILE + 1, LANES_EACH = THREADS / TILE;

__global__ void layer_norm_rows(mat y, mat x, const float *gain, const float *bias, float eps)
{
    __shared__ float part[WARPS], square_part[WARPS];
    const float *in = x.data + blockIdx.x * x.stride;
    float sum = 0, square = 0;
    for (int64_t c = threadIdx.x; c < x.cols; c += THREADS) sum += in[c];
    float mean = block_sum(sum, part) / (float)x.cols;
    for (int64_t c = threadIdx.x; c < x.cols; c += THREADS) square = fmaf(in[c] - mean, in[c] - mean, square);
    float scale = 1.0f / sqrtf(block_sum(square, square_part) / (float)x.cols + eps);
    for (int64_t c = threadIdx.x; c < x.cols; c += THREADS)
        y.data[blockIdx.x * y.stride + c] = (in[c] - mean) * scale * gain[c] + bias[c];
}

__device__ float activated(float x, int f)
{
    if (f == ACTIVATION_GELU) return x * 0.5f * (1.0f + erff(x * 0.70710678f));
    if (f == ACTIVATION_GELU_TANH) return x * 0.5f * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    return x;
}

__global__ void add_bias_rows(mat y, const float *bias, int f)
{
    float *row = y.data + blockIdx.x * y.stride;
    for (int64_t c = threadIdx.x; c < y.cols; c += THREADS) row[c] = activated(row[c] + bias[c], f);
}

/* A thread a pair. sincosf, not its fast form: angles go up to the number of patches of a side. */
__global__ void rotate_rows(mat x, int n_heads, mat angle)
{
    for (int64_t i = threadIdx.x; i < n_heads * angle.cols; i += THREADS) {
        int64_t head = i / angle.cols, j = i % angle.cols;
        float *pair = x.data + blockIdx.x * x.stride + 2 * head * angle.cols + j, a = pair[0], b = pair[angle.cols], s, c;
        sincosf(angle.data[blockIdx.x * angle.stride + j], &s, &c);
        pair[0] = a * c - b * s;
        pair[angle.cols] = b * c + a * s;
    }
}

/* Rows first .. of a head's columns; those past the end are zero. */
__device__ void load_tile(float *to, const float *from, int64_t stride, int64_t rows, int dim)
{
    for (int i = threadIdx.x; i < TILE * dim; i += THREADS) {
        int r = i / dim, d = i % dim;
        to[r * (dim + 1) + d] = r < rows ? from[r * stride + d] : 0.0f;
    }
}

/* Thread t: query t / LANES_EACH, and of that every LANES_EACH-th key or column, from t % LANES_EACH on. Grid: tiles of
 * queries, heads. */
__global__ void attend_tiles(mat y, mat qkv, int dim, float scale)
{
    SHARED_MEMORY(float, shared, 16);
    float *queries = shared, *keys = queries + TILE * (dim + 1), *values = keys + TILE * (dim + 1),
          *sums = values + TILE * (dim + 1), *scores = sums + TILE * dim;
    int64_t first = (int64_t)blockIdx.x * TILE, column = (int64_t)blockIdx.y * dim, left = qkv.rows - first;
    int query = threadIdx.x / LANES_EACH, lane = threadIdx.x % LANES_EACH;
    const float *base = qkv.data + column;
    float top = -INFINITY, total = 0;
    load_tile(queries, base + first * qkv.stride, qkv.stride, left, dim);
    for (int d = lane; d < dim; d += LANES_EACH) sums[query * dim + d] = 0;
    for (int64_t at = 0; at < qkv.rows; at += TILE) {
        int n = qkv.rows - at < TILE ? (int)(qkv.rows - at) : TILE;
        __syncthreads();
        load_tile(keys, base + y.cols + at * qkv.stride, qkv.stride, n, dim);
        load_tile(values, base + 2 * y.cols + at * qkv.stride, qkv.stride, n, dim);
        __syncthreads();
        float most = top, weight = 0;
        for (int k = lane; k < n; k += LANES_EACH) {
            float dot = 0;
            for (int d = 0; d < dim; d++) dot = fmaf(queries[query * (dim + 1) + d], keys[k * (dim + 1) + d], dot);
            scores[query * WIDE + k] = dot * scale;
            most = fmaxf(most, dot * scale);
        }
        for (int o = LANES_EACH / 2; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, o));
        for (int k = lane; k < n; k += LANES_EACH) {
            float p = expf(scores[query * WIDE + k] - most);
            scores[query * WIDE + k] = p;
            weight += p;
        }
        for (int o = LANES_EACH / 2; o > 0; o /= 2) weight += __shfl_xor_sync(ALL, weight, o);
        float factor = expf(top - most);
        total = total * factor + weight;
        top = most;
        __syncwarp();
        for (int d = lane; d < dim; d += LANES_EACH) {
            float sum = sums[query * dim + d] * factor;
            for (int k = 0; k < n; k++) sum = fmaf(scores[query * WIDE + k], values[k * (dim + 1) + d], sum);
            sums[query * dim + d] = sum;
        }
    }
    for (int d = lane; query < left && d < dim; d += LANES_EACH)
        y.data[(first + query) * y.stride + column + d] = sums[query * dim + d] / total;
}

} /* namespace */

void cuda_layer_norm(struct queue *q, struct mat y, struct mat x, const float *gain, const float *bias, float eps)
{
    launch(q, "layer_norm", false, layer_norm_rows, dim3((unsigned)x.rows), 0, y, x, gain, bias, eps);
}

void cuda_add_bias(struct queue *q, struct mat y, const float *bias, enum activation f)
{
    launch(q, "add_bias", false, add_bias_rows, dim3((unsigned)y.rows), 0, y, bias, (int)f);
}

void cuda_rotate(struct queue *q, struct mat x, int n_heads, struct mat angle)
{
    launch(q, "rotate", false, rotate_rows, dim3((unsigned)x.rows), 0, x, n_heads, angle);
}

void cuda_attention_all(struct queue *q, struct mat y, struct mat qkv, int n_heads)
{
    int dim = (int)(y.cols / n_heads);
    size_t shared = (size_t)(TILE * (4 * dim + 3) + TILE * WIDE) * sizeof(float);
    if (shared > (size_t)q->shared_max) {
        queue_refuse(q, "attention_all", "heads of this width do not fit a multiprocessor's memory");
        return;
    }
    launch(q, "attention_all", false, attend_tiles, dim3(blocks(y.rows, TILE), (unsigned)n_heads), shared, y, qkv, dim,
           1.0f / sqrtf((float)dim));
}
