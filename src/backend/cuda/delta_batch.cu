/* A token of many sequences of Gated DeltaNet, with the sums of delta_step (delta.cu) to the bit, for heads of 128. A block holds
 * 64 columns of a value head's state in registers, four blocks a multiprocessor, so that one's loads cover another's sums.
 * Moves: every state once in, once out. */
#include "backend/cuda/batch.h"
#include "backend/cuda/device.cuh"

namespace {

constexpr int HEAD = 128, COLUMNS = 64, EACH = HEAD / WARPS, TAPS = 3;

struct delta_batch_args {
    mat o, u, a, b;
    const float *A_log, *dt_bias, *weight; /* weight: [TAPS + 1][channels] */
    float *matrix, *conv;
    int key_heads, value_heads;
    cuda_rows rows;
};

/* q, k and v of the head, convolved. */
constexpr int ITEMS_ALL = 2 * HEAD + COLUMNS;
__device__ __forceinline__ void convolve(float (&t)[ITEMS_ALL], const delta_batch_args &p, const cuda_span &span, int head,
                                         int first)
{
    constexpr int ITEMS = 2;
    int channels = (int)p.u.cols, key = head / (p.value_heads / p.key_heads), keys = p.key_heads * HEAD;
    const float *u = p.u.data + span.first * p.u.stride, *past = p.conv + (int64_t)span.slot * TAPS * channels;
    float x[ITEMS], w[ITEMS][TAPS + 1], old[ITEMS][TAPS];
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int i = threadIdx.x + n * THREADS;
        if (i >= ITEMS_ALL) break;
        int at = i < HEAD       ? key * HEAD + i
                 : i < 2 * HEAD ? keys + key * HEAD + i - HEAD
                                : 2 * keys + head * HEAD + first + i - 2 * HEAD;
        x[n] = __ldcg(u + at);
#pragma unroll
        for (int j = 0; j <= TAPS; j++) w[n][j] = p.weight[j * channels + at];
#pragma unroll
        for (int j = 0; j < TAPS; j++) old[n][j] = __ldcg(past + j * channels + at);
    }
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int i = threadIdx.x + n * THREADS;
        if (i >= ITEMS_ALL) break;
        float y = x[n] * w[n][TAPS];
#pragma unroll
        for (int j = 0; j < TAPS; j++) y = fmaf(w[n][j], old[n][j], y);
        t[i] = silu(y);
    }
}

__device__ __forceinline__ void normalise_head(float *x, float scale)
{
    float sum = 0;
    for (int i = threadIdx.x % LANES; i < HEAD; i += LANES) sum = fmaf(x[i], x[i], sum);
    float r = scale / sqrtf(warp_sum(sum) + 1e-6f);
    for (int i = threadIdx.x % LANES; i < HEAD; i += LANES) x[i] *= r;
}

/* A thread: rows warp + 8 i, columns 2 lane, 2 lane + 1 of the block's. Grid: halves of heads, spans. */
__global__ void __launch_bounds__(THREADS, 4) delta_sequences(const __grid_constant__ delta_batch_args p)
{
    __shared__ float t[ITEMS_ALL];
    const float *tq = t, *tk = t + HEAD, *tv = t + 2 * HEAD;
    __shared__ float2 sums[2][WARPS][LANES];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, head = blockIdx.x / 2, first = blockIdx.x % 2 * COLUMNS;
    let_next_start();
    cuda_span span = p.rows.spans[blockIdx.y];
    float *S = p.matrix + (((int64_t)span.slot * p.value_heads + head) * HEAD + warp) * HEAD + first + 2 * lane;
    float2 s[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) s[i] = __ldcs((const float2 *)(S + i * WARPS * HEAD));
    wait_for_previous();
    float a = __ldcg(p.a.data + span.first * p.a.stride + head) + p.dt_bias[head];
    float beta = sigmoid(__ldcg(p.b.data + span.first * p.b.stride + head)), rate = -expf(p.A_log[head]);
    convolve(t, p, span, head, first);
    float decay = expf(rate * (a > 20 ? a : log1pf(expf(a))));
    __syncthreads();
    if (warp < 2) normalise_head(t + warp * HEAD, warp == 0 ? 1.0f / sqrtf((float)HEAD) : 1);
    __syncthreads();
    float2 read = make_float2(0, 0), out = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float k = tk[warp + WARPS * i];
        s[i].x *= decay;
        s[i].y *= decay;
        read.x = fmaf(s[i].x, k, read.x);
        read.y = fmaf(s[i].y, k, read.y);
    }
    sums[0][warp][lane] = read;
    __syncthreads();
    read = make_float2(0, 0);
#pragma unroll
    for (int n = 0; n < WARPS; n++) read.x += sums[0][n][lane].x, read.y += sums[0][n][lane].y;
    float dx = beta * (tv[2 * lane] - read.x), dy = beta * (tv[2 * lane + 1] - read.y);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float k = tk[warp + WARPS * i], q = tq[warp + WARPS * i];
        s[i].x = fmaf(k, dx, s[i].x);
        s[i].y = fmaf(k, dy, s[i].y);
        out.x = fmaf(s[i].x, q, out.x);
        out.y = fmaf(s[i].y, q, out.y);
        __stcs((float2 *)(S + i * WARPS * HEAD), s[i]);
    }
    sums[1][warp][lane] = out;
    __syncthreads();
    if (warp > 0) return;
    out = make_float2(0, 0);
#pragma unroll
    for (int n = 0; n < WARPS; n++) out.x += sums[1][n][lane].x, out.y += sums[1][n][lane].y;
    float *o = p.o.data + span.first * p.o.stride + head * HEAD + first + 2 * lane;
    o[0] = out.x;
    o[1] = out.y;
}

/* Grid: channels, spans. */
__global__ void __launch_bounds__(THREADS) advance_sequences(float *conv, mat u, cuda_rows rows)
{
    int64_t channels = u.cols, c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    cuda_span span = rows.spans[blockIdx.y];
    float *state = conv + span.slot * TAPS * channels + c;
    wait_for_previous();
    let_next_start(); /* which may count on the kernel that wrote the states */
    if (c >= channels) return;
    float x = __ldcg(u.data + span.first * u.stride + c);
#pragma unroll
    for (int j = 0; j + 1 < TAPS; j++) state[j * channels] = __ldcg(state + (j + 1) * channels);
    state[(TAPS - 1) * channels] = x;
}

} /* namespace */

bool cuda_batch_delta(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows, bool advance)
{
    const struct delta_shape *s = r->shape;
    if (rows->n_spans <= ROWS_FEW || s->key_dim != HEAD || s->value_dim != HEAD || s->kernel != TAPS + 1) return false;
    delta_batch_args a = { r->raw, r->u, r->a, r->b, r->A_log, r->dt_bias, r->conv_weight, r->state->matrix, r->state->conv,
                           s->key_heads, s->value_heads, *rows };
    launch(q, "delta", true, delta_sequences, dim3((unsigned)s->value_heads * 2, (unsigned)rows->n_spans), 0, a);
    if (advance)
        launch(q, "delta", true, advance_sequences, dim3(blocks(r->u.cols), (unsigned)rows->n_spans), 0, r->state->conv, r->u,
               *rows);
    return true;
}
