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

constexpr int TAPS = 3; /* earlier tokens a convolution looks at */

/* Where key dimension i lies: a warp's key rows, warp + 8 i, are side by side. */
template <int EACH> __device__ __forceinline__ int place(int i)
{
    return i % WARPS * EACH + i / WARPS;
}

/* What a block keeps of CHUNK rows, no more than it has warps. Channels of the convolution, CHANNELS: queries, keys, columns. */
template <int EACH, int CHUNK> struct chunk_rows {
    static constexpr int WIDE = EACH * WARPS, CHANNELS = 2 * WIDE + COLUMNS, ITEMS = (2 * WIDE + THREADS - 1) / THREADS;
    float q[CHUNK][WIDE], k[CHUNK][WIDE], v[CHUNK][COLUMNS], decay[CHUNK], beta[CHUNK];
    float read[2][WARPS][COLUMNS], out[CHUNK][WARPS][COLUMNS];
    float w[TAPS + 1][CHANNELS], old[TAPS][CHANNELS], u[CHUNK][CHANNELS]; /* its weights, what came before, inputs */
    static_assert(CHUNK <= WARPS, "a warp makes the values of one row");
};

/* n numbers that lie at place(), by a warp. */
template <int EACH> __device__ __forceinline__ void normalise(float *x, int n, float scale)
{
    float sum = 0;
    for (int i = threadIdx.x % LANES; i < n; i += LANES) {
        float y = x[place<EACH>(i)];
        sum = fmaf(y, y, sum);
    }
    float r = scale / sqrtf(warp_sum(sum) + 1e-6f);
    for (int i = threadIdx.x % LANES; i < n; i += LANES) x[place<EACH>(i)] *= r;
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
template <int EACH, int CHUNK>
__device__ __forceinline__ void apply_kept(const log_args &p, const cuda_span &span, chunk_rows<EACH, CHUNK> &rows,
                                           float (&s)[EACH], int head, int key, int column)
{
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, dk = p.shape.key_dim, dv = p.shape.value_dim;
#pragma unroll 1
    for (int first = 0; first < span.kept; first += CHUNK) {
        int n = span.kept - first < CHUNK ? span.kept - first : CHUNK;
        for (int t = warp; t < n; t += WARPS) {
            delta_log log = log_at(p, span.slot, first + t);
            for (int i = lane; i < dk; i += LANES) rows.k[t][place<EACH>(i)] = __ldcg(log.key + (int64_t)key * dk + i);
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
 * span's rows one after the other, CHUNK at a time: a row costs one meeting. FUSED: the convolution too, of up to TAPS + 1
 * tokens. What blocks of a key head share of the log and of the convolution's state is written by the last of them to have
 * read it. No more than 80 registers, so that a block starts beside the product before it and has by then what lay there.
 * Shared memory: decays [CHUNK][value heads of a key head]. Moves: the state in, and out where something stayed; the log of as
 * many rows. Grid: columns of heads, spans. */
template <int EACH, int CHUNK, bool FUSED>
__global__ void __launch_bounds__(THREADS, EACH > 16 ? 2 : 3) delta_spans(const __grid_constant__ log_args p)
{
    using chunk = chunk_rows<EACH, CHUNK>;
    SHARED_MEMORY(float, decays, 16);
    __shared__ __align__(16) chunk rows;
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
    float s[EACH];
    auto channel_of = [&](int c) { /* -1: none */
        if (c < 2 * dk) return c < dk ? key * dk + c : keys + key * dk + c - dk;
        return c < 2 * dk + COLUMNS && first + c - 2 * dk < dv ? 2 * keys + head * dv + first + c - 2 * dk : -1;
    };
#pragma unroll
    for (int i = 0; i < EACH; i++) s[i] = warp + WARPS * i < dk && column < dv ? S[(int64_t)i * WARPS * dv] : 0;
#pragma unroll 1
    for (int c = threadIdx.x; FUSED && c < 2 * dk + COLUMNS; c += THREADS) {
        int at = channel_of(c);
#pragma unroll
        for (int j = 0; j <= TAPS; j++) {
            int tap = keep - TAPS + j, row = span.kept + tap - keep; /* of the log; negative: of the state */
            if (at < 0 || tap < 0) continue;
            rows.w[j][c] = p.weight[tap * channels + at];
            if (j < TAPS)
                rows.old[j][c] = __ldcg(row >= 0 ? log_at(p, span.slot, row).u + at : past + (keep + row) * channels + at);
        }
    }
    /* gates, by the last threads: of the value heads of this key head, a row each */
    int turned = THREADS - 1 - threadIdx.x, member = turned % group;
    float rate = -expf(p.A_log[key * group + member]), dt = p.dt_bias[key * group + member];
    for (int i = dk + threadIdx.x; i < EACH * WARPS; i += THREADS)
        for (int t = 0; t < CHUNK; t++) rows.q[t][place<EACH>(i)] = rows.k[t][place<EACH>(i)] = 0;
    if (lane + first >= dv)
        for (int t = warp; t < CHUNK; t += WARPS) rows.v[t][lane] = 0;
    __syncthreads();
    apply_kept<EACH, CHUNK>(p, span, rows, s, head, key, column);
    wait_for_previous();
    int from = 0;
    do {
        int n = span.n - from < CHUNK ? span.n - from : CHUNK;
        int64_t row0 = span.first + from;
        const mat &in = FUSED ? p.u : p.qkv;
        /* what this thread makes: channels of queries and keys, and a column of the values of row `warp` */
        float x[chunk::ITEMS][CHUNK], own[TAPS + 1];
#pragma unroll
        for (int i = 0; i < chunk::ITEMS; i++)
#pragma unroll
            for (int t = 0; t < CHUNK; t++) {
                int c = threadIdx.x + i * THREADS;
                x[i][t] = c < 2 * dk && t < n ? __ldcg(in.data + (row0 + t) * in.stride + channel_of(c)) : 0;
            }
        int value = warp < n ? channel_of(2 * dk + lane) : -1;
#pragma unroll
        for (int j = 0; j <= TAPS; j++) {
            int t = warp - TAPS + j;
            own[j] = value >= 0 && t >= 0 && (FUSED || j == TAPS) ? __ldcg(in.data + (row0 + t) * in.stride + value) : 0;
        }
        for (int t = turned / group; t < n; t += THREADS / group) {
            float a = __ldcg(p.a.data + (row0 + t) * p.a.stride + key * group + member) + dt;
            float b = __ldcg(p.b.data + (row0 + t) * p.b.stride + key * group + member);
            float decay = expf(rate * (a > 20 ? a : log1pf(expf(a))));
            decays[t * group + member] = decay;
            if (key * group + member == head) {
                rows.decay[t] = decay;
                rows.beta[t] = sigmoid(b);
            }
        }
        if (from == 0 && span.kept > 0 && span.logged)
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (warp + WARPS * i < dk && column < dv) S[(int64_t)i * WARPS * dv] = s[i];
#pragma unroll
        for (int i = 0; i < chunk::ITEMS; i++) {
            int c = threadIdx.x + i * THREADS;
            if (c >= 2 * dk) continue;
            float *to = c < dk ? rows.q[0] + place<EACH>(c) : rows.k[0] + place<EACH>(c - dk), w[TAPS + 1], old[TAPS];
#pragma unroll
            for (int j = 0; FUSED && j <= TAPS; j++) w[j] = rows.w[j][c];
#pragma unroll
            for (int j = 0; FUSED && j < TAPS; j++) old[j] = rows.old[j][c];
#pragma unroll
            for (int t = 0; t < CHUNK; t++) {
                float y = x[i][t];
                if (FUSED) {
                    rows.u[t][c] = y;
                    y *= w[TAPS];
#pragma unroll
                    for (int j = 0; j < TAPS; j++)
                        if (keep - TAPS + j >= 0) y = fmaf(w[j], t + j >= TAPS ? x[i][t + j - TAPS] : old[t + j], y);
                    y = silu(y);
                }
                to[t * chunk::WIDE] = y;
            }
        }
        if (value >= 0) {
            int c = 2 * dk + lane;
            float y = own[TAPS];
            if (FUSED) {
                rows.u[warp][c] = y;
                y *= rows.w[TAPS][c];
#pragma unroll
                for (int j = 0; j < TAPS; j++)
                    if (keep - TAPS + j >= 0) y = fmaf(rows.w[j][c], warp - TAPS + j >= 0 ? own[j] : rows.old[warp + j][c], y);
                y = silu(y);
            }
            rows.v[warp][lane] = y;
        }
        __syncthreads();
        /* all that was read of the log is in shared memory or has become part of what is */
        if (from == 0 && threadIdx.x == 0) before = atomicAdd(arrived, 1u);
#pragma unroll 1
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
#pragma unroll 1
        for (int t = warp; t < n; t += WARPS) {
            float out = 0;
#pragma unroll
            for (int m = 0; m < WARPS; m++) out += rows.out[t][m][lane];
            if (column < dv) p.o.data[(row0 + t) * p.o.stride + (int64_t)head * dv + column] = out;
        }
        /* the log, and the convolution's state: of a logged span what it was before this step, else what it is after it */
        bool ends = from + n == span.n, writes = FUSED && (span.logged ? from == 0 && span.kept > 0 : ends);
        delta_log log = log_at(p, span.slot, from);
        int64_t apart = log_at(p, span.slot, from + 1).u - log.u;
        if (span.logged && last) {
#pragma unroll 1
            for (int t = warp; t < n; t += WARPS) {
#pragma unroll 4
                for (int i = lane; i < dk; i += LANES) log.key[t * apart + key * dk + i] = rows.k[t][place<EACH>(i)];
#pragma unroll 1
                for (int h = lane; h < group; h += LANES) log.decay[t * apart + key * group + h] = decays[t * group + h];
            }
        }
#pragma unroll 1
        for (int c = threadIdx.x; FUSED && c < 2 * dk + COLUMNS; c += THREADS) {
            int at = channel_of(c);
            bool mine = at >= 2 * keys || (at >= 0 && last);
#pragma unroll
            for (int t = 0; t < CHUNK; t++)
                if (span.logged && mine && t < n) log.u[t * apart + at] = rows.u[t][c];
            if (!writes && ends) continue;
            float after[TAPS];
#pragma unroll
            for (int j = 0; j < TAPS; j++) after[j] = n + j >= TAPS ? rows.u[n + j - TAPS][c] : rows.old[n + j][c];
#pragma unroll
            for (int j = 0; j < TAPS; j++) {
                if (writes && mine && keep - TAPS + j >= 0)
                    past[(keep - TAPS + j) * channels + at] = span.logged ? rows.old[j][c] : after[j];
                rows.old[j][c] = after[j];
            }
        }
        from += CHUNK;
        if (ends) break;
        __syncthreads();
    } while (true);
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (!span.logged && warp + WARPS * i < dk && column < dv) S[(int64_t)i * WARPS * dv] = s[i];
}

/* As many spans at a time as there are counters for. */
template <bool FUSED> void start(struct queue *q, log_args p, int64_t n_spans)
{
    int64_t most = ROWS_EXACT * KV_HEADS_MAX / p.shape.key_heads;
    bool wide = p.shape.key_dim > 128, few = p.rows.n <= 4 * n_spans;
    auto *kernel = wide ? delta_spans<HEAD_MAX / WARPS, 4, FUSED> : few ? delta_spans<16, 4, FUSED> : delta_spans<16, 8, FUSED>;
    size_t shared = (size_t)(wide || few ? 4 : 8) * (size_t)(p.shape.value_heads / p.shape.key_heads) * sizeof(float);
    if (p.shape.key_dim > HEAD_MAX || most < 1 || p.shape.value_heads / p.shape.key_heads > THREADS) {
        queue_refuse(q, "delta", "key heads wider than 256, or so many, are not supported on a GPU");
        return;
    }
    p.arrived = q->arrived;
    for (int64_t first = 0; first < n_spans; first += most) {
        dim3 grid((unsigned)(p.shape.value_heads * ((p.shape.value_dim + COLUMNS - 1) / COLUMNS)),
                  (unsigned)(n_spans - first < most ? n_spans - first : most));
        p.first_span = (int)first;
        launch_side<THREADS>(q, "delta", RIGHT, kernel, grid, shared, p);
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
