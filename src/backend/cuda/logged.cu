/* Steps in which rows may be taken back, or some were kept of an earlier one: convolution and delta rule with the log of
 * ops.h (struct span), in one kernel, or one each. Sums and their order are those of delta.cu, so a row has its bits; a step's
 * other spans come along. */
#include "backend/cuda/device.cuh"

namespace {

constexpr int COLUMNS = LANES;

struct log_args {
    mat o, qkv, a, b;
    const float *A_log, *dt_bias;
    delta_state state;
    delta_shape shape;
    cuda_rows rows;
    mat u;               /* in place of qkv, where the convolution is done too */
    const float *weight; /* of it */
    unsigned *arrived;   /* [span][key head]: blocks that have read the log, 0 between kernels */
    int first_span;
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

/* What a block keeps of CHUNK rows. A warp's key rows, warp + 8 i, lie side by side: a key dimension at place(). */
constexpr int CHUNK = 8, TAPS = 3; /* TAPS: earlier tokens a convolution looks at, kept in registers */
template <int EACH> struct chunk_rows {
    float q[CHUNK][EACH * WARPS], k[CHUNK][EACH * WARPS], v[CHUNK][COLUMNS], decay[CHUNK], beta[CHUNK];
    float read[2][WARPS][COLUMNS], out[CHUNK][WARPS][COLUMNS];

    static __device__ __forceinline__ int place(int i)
    {
        return i % WARPS * EACH + i / WARPS;
    }
};

/* n numbers that lie at place(), by a warp. */
template <int EACH> __device__ __forceinline__ void normalise(float *x, int n, float scale)
{
    float sum = 0;
    for (int i = threadIdx.x % LANES; i < n; i += LANES) {
        float y = x[chunk_rows<EACH>::place(i)];
        sum = fmaf(y, y, sum);
    }
    float r = scale / sqrtf(warp_sum(sum) + 1e-6f);
    for (int i = threadIdx.x % LANES; i < n; i += LANES) x[chunk_rows<EACH>::place(i)] *= r;
}

__device__ float decay_of(const log_args &p, int64_t row, int head)
{
    float x = __ldcg(p.a.data + row * p.a.stride + head) + p.dt_bias[head];
    return expf(-expf(p.A_log[head]) * (x > 20 ? x : log1pf(expf(x))));
}

/* This warp's part of a row of keys or queries. */
template <int EACH> __device__ __forceinline__ void take(float (&to)[EACH], const float *row)
{
    const float4 *from = (const float4 *)(row + threadIdx.x / LANES * EACH);
#pragma unroll
    for (int i = 0; i < EACH / 4; i++) {
        float4 x = from[i];
        to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
    }
}

/* The rows of the span before this one that stay, applied to the state. */
template <int EACH>
__device__ __forceinline__ void apply_kept(const log_args &p, const cuda_span &span, chunk_rows<EACH> &rows, float (&s)[EACH],
                                           int head, int key, int column)
{
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, dk = p.shape.key_dim, dv = p.shape.value_dim;
#pragma unroll 1
    for (int first = 0; first < span.kept; first += CHUNK) {
        int n = span.kept - first < CHUNK ? span.kept - first : CHUNK;
        for (int t = warp; t < n; t += WARPS) {
            delta_log log = log_at(p, span.slot, first + t);
            for (int i = lane; i < dk; i += LANES) rows.k[t][rows.place(i)] = __ldcg(log.key + (int64_t)key * dk + i);
            rows.v[t][lane] = column < dv ? __ldcg(log.update + (int64_t)head * dv + column) : 0;
            if (lane == 0) rows.decay[t] = __ldcg(log.decay + head);
        }
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < n; t++) {
            float k[EACH], d = rows.v[t][lane], decay = rows.decay[t];
            take<EACH>(k, rows.k[t]);
#pragma unroll
            for (int i = 0; i < EACH; i++) s[i] = fmaf(k[i], d, s[i] * decay);
        }
        __syncthreads();
    }
}

/* A block holds 32 columns of one value head's state in registers, key rows warp + 8 i of column `lane` a thread, and takes the
 * span's rows one after the other: a row costs one meeting. FUSED: the convolution too, of up to TAPS + 1 tokens. What blocks
 * of a key head share of the log and of the convolution's state is written by the last of them to have read it. Moves: the
 * state in, and out where something stayed; the log of as many rows. Grid: columns of heads, spans. */
template <int EACH, bool FUSED> __global__ void __launch_bounds__(THREADS, 2) delta_spans(const __grid_constant__ log_args p)
{
    constexpr int ITEMS = (2 * EACH * WARPS + COLUMNS + THREADS - 1) / THREADS; /* values of q, k and v a thread makes */
    __shared__ __align__(16) chunk_rows<EACH> rows;
    __shared__ bool last;
    int dk = p.shape.key_dim, dv = p.shape.value_dim, slices = (dv + COLUMNS - 1) / COLUMNS;
    int group = p.shape.value_heads / p.shape.key_heads, head = blockIdx.x / slices, key = head / group;
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, first = blockIdx.x % slices * COLUMNS, column = first + lane;
    int keep = p.shape.kernel - 1, keys = p.shape.key_heads * dk, channels = 2 * keys + p.shape.value_heads * dv;
    let_next_start();
    cuda_span span = p.rows.spans[p.first_span + blockIdx.y];
    unsigned *arrived = p.arrived + blockIdx.y * p.shape.key_heads + key, before = 0;
    float *S = p.state.matrix + (((int64_t)span.slot * p.shape.value_heads + head) * dk + warp) * dv + column;
    float *past = p.state.conv + (int64_t)span.slot * keep * channels;
    float s[EACH], w[ITEMS][TAPS + 1] = {}, old[ITEMS][TAPS] = {}, begin[ITEMS][TAPS];
    int at[ITEMS];
#pragma unroll
    for (int i = 0; i < EACH; i++) s[i] = warp + WARPS * i < dk && column < dv ? S[(int64_t)i * WARPS * dv] : 0;
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int i = threadIdx.x + n * THREADS;
        at[n] = i < dk ? key * dk + i : i < 2 * dk ? keys + key * dk + i - dk : 2 * keys + head * dv + first + i - 2 * dk;
        if (i >= 2 * dk + COLUMNS || (i >= 2 * dk && first + i - 2 * dk >= dv)) at[n] = -1;
#pragma unroll
        for (int j = 0; FUSED && j <= TAPS; j++) {
            int tap = keep - TAPS + j, row = span.kept + tap - keep; /* of the log; negative: of the state */
            if (at[n] < 0 || tap < 0) continue;
            w[n][j] = p.weight[tap * channels + at[n]];
            if (j < TAPS)
                old[n][j] = __ldcg(row >= 0 ? log_at(p, span.slot, row).u + at[n] : past + (keep + row) * channels + at[n]);
        }
#pragma unroll
        for (int j = 0; j < TAPS; j++) begin[n][j] = old[n][j];
    }
    for (int i = dk + threadIdx.x; i < EACH * WARPS; i += THREADS)
        for (int t = 0; t < CHUNK; t++) rows.q[t][rows.place(i)] = rows.k[t][rows.place(i)] = 0;
    if (lane + first >= dv)
        for (int t = warp; t < CHUNK; t += WARPS) rows.v[t][lane] = 0;
    __syncthreads();
    apply_kept<EACH>(p, span, rows, s, head, key, column);
    wait_for_previous();
    int from = 0;
    do {
        int n = span.n - from < CHUNK ? span.n - from : CHUNK;
        const mat &in = FUSED ? p.u : p.qkv;
        const float *x0 = in.data + (int64_t)(span.first + from) * in.stride;
        float x[ITEMS][CHUNK];
#pragma unroll
        for (int i = 0; i < ITEMS; i++)
#pragma unroll
            for (int t = 0; t < CHUNK; t++) x[i][t] = at[i] >= 0 && t < n ? __ldcg(x0 + t * in.stride + at[i]) : 0;
        if (from == 0 && span.kept > 0 && span.logged)
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (warp + WARPS * i < dk && column < dv) S[(int64_t)i * WARPS * dv] = s[i];
        if ((int)threadIdx.x >= THREADS - n) {
            int t = THREADS - 1 - threadIdx.x;
            int64_t row = span.first + from + t;
            rows.decay[t] = decay_of(p, row, head);
            rows.beta[t] = sigmoid(__ldcg(p.b.data + row * p.b.stride + head));
        }
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int c = threadIdx.x + i * THREADS;
            if (at[i] < 0) continue;
            float *to = c < dk       ? rows.q[0] + rows.place(c)
                        : c < 2 * dk ? rows.k[0] + rows.place(c - dk)
                                     : rows.v[0] + c - 2 * dk;
            int step = c < 2 * dk ? EACH * WARPS : COLUMNS;
#pragma unroll
            for (int t = 0; t < CHUNK; t++) {
                float y = x[i][t];
                if (t >= n) break;
                if (FUSED) {
                    y *= w[i][TAPS];
#pragma unroll
                    for (int j = 0; j < TAPS; j++)
                        if (keep - TAPS + j >= 0) y = fmaf(w[i][j], old[i][j], y);
                    y = silu(y);
#pragma unroll
                    for (int j = 0; j + 1 < TAPS; j++) old[i][j] = old[i][j + 1];
                    old[i][TAPS - 1] = x[i][t];
                }
                to[t * step] = y;
            }
        }
        __syncthreads();
        /* all that was read of the log is in shared memory or has become part of what is */
        if (from == 0 && threadIdx.x == 0) before = atomicAdd(arrived, 1u);
        for (int t = warp; t < 2 * n; t += WARPS)
            normalise<EACH>(t % 2 ? rows.k[t / 2] : rows.q[t / 2], dk, t % 2 ? 1 : 1.0f / sqrtf((float)dk));
        __syncthreads();
#pragma unroll 1
        for (int t = 0; t < n; t++) {
            float k[EACH], q[EACH], decay = rows.decay[t], read = 0, out = 0;
            take<EACH>(k, rows.k[t]);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                s[i] *= decay;
                read = fmaf(s[i], k[i], read);
            }
            rows.read[t % 2][warp][lane] = read;
            __syncthreads();
            take<EACH>(q, rows.q[t]);
            read = 0;
#pragma unroll
            for (int m = 0; m < WARPS; m++) read += rows.read[t % 2][m][lane];
            float d = rows.beta[t] * (rows.v[t][lane] - read);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                s[i] = fmaf(k[i], d, s[i]);
                out = fmaf(s[i], q[i], out);
            }
            rows.out[t][warp][lane] = out;
            if (span.logged && warp == 0 && column < dv) log_at(p, span.slot, from + t).update[(int64_t)head * dv + column] = d;
        }
        if (from == 0 && threadIdx.x == 0) {
            last = before == (unsigned)(group * slices) - 1;
            if (last) *arrived = 0;
        }
        __syncthreads();
        for (int t = warp; t < n; t += WARPS) {
            float out = 0;
#pragma unroll
            for (int m = 0; m < WARPS; m++) out += rows.out[t][m][lane];
            if (column < dv) p.o.data[(span.first + from + t) * p.o.stride + (int64_t)head * dv + column] = out;
            if (!span.logged || !last) continue;
            delta_log log = log_at(p, span.slot, from + t);
            for (int i = lane; i < dk; i += LANES) log.key[(int64_t)key * dk + i] = rows.k[t][rows.place(i)];
            for (int h = lane; h < group; h += LANES)
                log.decay[key * group + h] = decay_of(p, span.first + from + t, key * group + h);
        }
#pragma unroll
        for (int i = 0; FUSED && i < ITEMS; i++)
#pragma unroll
            for (int t = 0; t < CHUNK; t++)
                if (span.logged && at[i] >= 0 && (at[i] >= 2 * keys || last) && t < n)
                    log_at(p, span.slot, from + t).u[at[i]] = x[i][t];
        from += CHUNK;
        __syncthreads();
    } while (from < span.n);
#pragma unroll
    for (int i = 0; FUSED && i < ITEMS; i++)
#pragma unroll
        for (int j = 0; j < TAPS; j++)
            if ((span.kept > 0 || !span.logged) && at[i] >= 0 && (at[i] >= 2 * keys || last) && keep - TAPS + j >= 0)
                past[(keep - TAPS + j) * channels + at[i]] = span.logged ? begin[i][j] : old[i][j];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (!span.logged && warp + WARPS * i < dk && column < dv) S[(int64_t)i * WARPS * dv] = s[i];
}

/* As many spans at a time as there are counters for. */
template <bool FUSED> void start(struct queue *q, log_args p, int64_t n_spans)
{
    int64_t most = ROWS_EXACT * KV_HEADS_MAX / p.shape.key_heads;
    auto *kernel = p.shape.key_dim <= 128 ? delta_spans<16, FUSED> : delta_spans<HEAD_MAX / WARPS, FUSED>;
    if (p.shape.key_dim > HEAD_MAX || most < 1) {
        queue_refuse(q, "delta", "key heads wider than 256, or so many, are not supported on a GPU");
        return;
    }
    p.arrived = q->arrived;
    for (int64_t first = 0; first < n_spans; first += most) {
        dim3 grid((unsigned)(p.shape.value_heads * ((p.shape.value_dim + COLUMNS - 1) / COLUMNS)),
                  (unsigned)(n_spans - first < most ? n_spans - first : most));
        p.first_span = (int)first;
        launch_side<THREADS>(q, "delta", RIGHT, kernel, grid, 0, p);
    }
}

} /* namespace */

void cuda_conv_logged(struct queue *q, struct mat y, struct mat u, const float *weight, const struct delta_state *state,
                      const struct delta_shape *shape, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return;
    log_args p = {};
    p.state = *state;
    p.shape = *shape;
    p.rows = *rows;
    launch(q, "conv", false, conv_spans, dim3(blocks(u.cols), (unsigned)step->n_spans), 0, y, u, weight, p);
}

void cuda_delta_logged(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
                       const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
                       const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return;
    start<false>(q, log_args{ o, qkv, a, b, A_log, dt_bias, *state, *shape, *rows }, step->n_spans);
}

bool cuda_delta_run_logged(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows)
{
    if (r->shape->kernel > TAPS + 1 || r->shape->key_dim > HEAD_MAX) return false;
    log_args p = { r->raw, {}, r->a, r->b, r->A_log, r->dt_bias, *r->state, *r->shape, *rows };
    p.u = r->u;
    p.weight = r->conv_weight;
    start<true>(q, p, rows->n_spans);
    return true;
}
