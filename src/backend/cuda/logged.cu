/* Steps in which rows may be taken back, or some were kept of an earlier one: convolution and delta rule with the log of
 * ops.h (struct span). Sums and their order are those of delta.cu, so a row has its bits; a step's other spans come along. */
#include "backend/cuda/device.cuh"

namespace {

constexpr int COLUMNS = LANES;

struct log_args {
    mat o, qkv, a, b;
    const float *A_log, *dt_bias;
    delta_state state;
    delta_shape shape;
    cuda_rows rows;
};

__device__ delta_log log_at(const log_args &p, int slot, int row)
{
    int64_t keys = (int64_t)p.shape.key_heads * p.shape.key_dim, values = (int64_t)p.shape.value_heads * p.shape.value_dim;
    float *u = p.state.log + ((int64_t)slot * p.state.log_rows + row) * (3 * keys + 2 * values + p.shape.value_heads);
    return { u, u + 2 * keys + values, u + 3 * keys + values, u + 3 * keys + 2 * values };
}

/* A thread owns a channel of a span, row after row. */
__global__ void conv_spans(mat y, mat u, const float *weight, const __grid_constant__ log_args p)
{
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x, n = u.cols;
    cuda_span span = p.rows.spans[blockIdx.y];
    int keep = p.shape.kernel - 1;
    float *past = p.state.conv + (int64_t)span.slot * keep * n + c;
    const float *in = u.data + span.first * u.stride + c;
    if (c >= n) return;
    for (int j = 0; span.kept > 0 && j < keep; j++) {
        int at = span.kept + j - keep;
        past[j * n] = at >= 0 ? log_at(p, span.slot, at).u[c] : past[(keep + at) * n];
    }
    for (int row = 0; row < span.n; row++) {
        float sum = weight[keep * n + c] * in[row * u.stride];
        for (int j = 0; j < keep; j++) {
            int at = row - keep + j; /* row of the span; negative: before this step */
            sum = fmaf(weight[j * n + c], at >= 0 ? in[at * u.stride] : past[(keep + at) * n], sum);
        }
        y.data[(span.first + row) * y.stride + c] = silu(sum);
        if (span.logged) log_at(p, span.slot, row).u[c] = in[row * u.stride];
    }
    for (int j = 0; !span.logged && j < keep; j++) {
        int at = span.n + j - keep;
        past[j * n] = at >= 0 ? in[at * u.stride] : past[(keep + at) * n];
    }
}

/* q and k of a row as `to`, normalised by a warp. */
__device__ void normalised(float *to, const float *x, int n, float scale)
{
    float sum = 0;
    for (int i = threadIdx.x % LANES; i < n; i += LANES) sum = fmaf(x[i], x[i], sum);
    float r = scale / sqrtf(warp_sum(sum) + 1e-6f);
    for (int i = threadIdx.x % LANES; i < n; i += LANES) to[i] = x[i] * r;
}

__device__ float decay_of(const log_args &p, int64_t row, int head)
{
    float x = p.a.data[row * p.a.stride + head] + p.dt_bias[head];
    return expf(-expf(p.A_log[head]) * (x > 20 ? x : log1pf(expf(x))));
}

/* A block holds 32 columns of one value head's state in registers, key rows warp + 8 i of column `lane` a thread. */
template <int EACH> __global__ void __launch_bounds__(THREADS) delta_spans(const __grid_constant__ log_args p)
{
    __shared__ float q[HEAD_MAX], k[HEAD_MAX], sums[2][WARPS][COLUMNS];
    int dk = p.shape.key_dim, dv = p.shape.value_dim, slices = (dv + COLUMNS - 1) / COLUMNS;
    int head = blockIdx.x / slices, key = head / (p.shape.value_heads / p.shape.key_heads);
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, column = blockIdx.x % slices * COLUMNS + lane;
    bool inside = column < dv;
    int64_t keys = (int64_t)p.shape.key_heads * dk;
    cuda_span span = p.rows.spans[blockIdx.y];
    float *S = p.state.matrix + ((int64_t)span.slot * p.shape.value_heads + head) * dk * dv + column, s[EACH];
    for (int i = 0; i < EACH; i++) s[i] = warp + WARPS * i < dk && inside ? S[(int64_t)(warp + WARPS * i) * dv] : 0;
    for (int t = 0; t < span.kept; t++) {
        delta_log log = log_at(p, span.slot, t);
        float d = inside ? log.update[(int64_t)head * dv + column] : 0;
        for (int i = 0; i < EACH; i++)
            if (warp + WARPS * i < dk)
                s[i] = fmaf(log.key[(int64_t)key * dk + warp + WARPS * i], d, s[i] * log.decay[head]);
    }
    for (int i = 0; i < EACH && span.kept && span.logged; i++)
        if (warp + WARPS * i < dk && inside) S[(int64_t)(warp + WARPS * i) * dv] = s[i];
    for (int row = 0; row < span.n; row++) {
        int64_t at = span.first + row;
        const float *in = p.qkv.data + at * p.qkv.stride;
        __syncthreads(); /* the row before is done with q and k, the log with its reading */
        if (warp == 0) normalised(q, in + (int64_t)key * dk, dk, 1.0f / sqrtf((float)dk));
        if (warp == 1) normalised(k, in + keys + (int64_t)key * dk, dk, 1);
        __syncthreads();
        float decay = decay_of(p, at, head), beta = sigmoid(p.b.data[at * p.b.stride + head]), read = 0, out = 0;
        for (int i = 0; i < EACH; i++) {
            s[i] *= decay;
            if (warp + WARPS * i < dk) read = fmaf(s[i], k[warp + WARPS * i], read);
        }
        sums[0][warp][lane] = read;
        __syncthreads();
        read = 0;
        for (int w = 0; w < WARPS; w++) read += sums[0][w][lane];
        float d = beta * ((inside ? in[2 * keys + (int64_t)head * dv + column] : 0) - read);
        for (int i = 0; i < EACH; i++) {
            if (warp + WARPS * i >= dk) continue;
            s[i] = fmaf(k[warp + WARPS * i], d, s[i]);
            out = fmaf(s[i], q[warp + WARPS * i], out);
        }
        sums[1][warp][lane] = out;
        __syncthreads();
        if (warp > 0 || !inside) continue;
        out = 0;
        for (int w = 0; w < WARPS; w++) out += sums[1][w][lane];
        p.o.data[at * p.o.stride + (int64_t)head * dv + column] = out;
        if (span.logged) log_at(p, span.slot, row).update[(int64_t)head * dv + column] = d;
    }
    for (int i = 0; i < EACH && !span.logged; i++)
        if (warp + WARPS * i < dk && inside) S[(int64_t)(warp + WARPS * i) * dv] = s[i];
}

/* What the heads share of a log, written when no block reads it any more. A block owns a row. */
__global__ void log_keys(const __grid_constant__ log_args p)
{
    int64_t row = blockIdx.x, keys = (int64_t)p.shape.key_heads * p.shape.key_dim;
    cuda_span span = p.rows.spans[p.rows.rows[row].span];
    if (!span.logged) return;
    delta_log log = log_at(p, span.slot, (int)row - span.first);
    const float *k = p.qkv.data + row * p.qkv.stride + keys;
    for (int h = threadIdx.x / LANES; h < p.shape.key_heads; h += WARPS)
        normalised(log.key + (int64_t)h * p.shape.key_dim, k + (int64_t)h * p.shape.key_dim, p.shape.key_dim, 1);
    for (int h = threadIdx.x; h < p.shape.value_heads; h += THREADS) log.decay[h] = decay_of(p, row, h);
}

} /* namespace */

void cuda_conv_logged(struct queue *q, struct mat y, struct mat u, const float *weight, const struct delta_state *state,
                      const struct delta_shape *shape, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return;
    log_args p = { {}, {}, {}, {}, nullptr, nullptr, *state, *shape, *rows };
    launch(q, "conv", false, conv_spans, dim3(blocks(u.cols), (unsigned)step->n_spans), 0, y, u, weight, p);
}

void cuda_delta_logged(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
                       const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
                       const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return;
    log_args p = { o, qkv, a, b, A_log, dt_bias, *state, *shape, *rows };
    dim3 grid((unsigned)(shape->value_heads * ((shape->value_dim + COLUMNS - 1) / COLUMNS)), (unsigned)step->n_spans);
    if (shape->key_dim > HEAD_MAX) {
        queue_refuse(q, "delta", "key heads wider than 256 are not supported on a GPU");
        return;
    }
    launch(q, "delta", false, shape->key_dim <= 128 ? delta_spans<16> : delta_spans<HEAD_MAX / WARPS>, grid, 0, p);
    launch(q, "delta", false, log_keys, dim3((unsigned)step->n), 0, p);
}
