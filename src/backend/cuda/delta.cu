/* Gated DeltaNet: the causal convolution and the gated delta rule, token by token. A block holds 32 columns of one value
 * head's state in registers, 8 warps a share of the key rows each; a token costs two meetings of the block. The state is
 * asked for before the kernel that makes the token's input is done: nothing since the last token has touched it. */
#include "backend/cuda/device.cuh"

namespace {

constexpr int COLUMNS = LANES;
constexpr size_t APART = 56 * 1024; /* shared memory, so that beside a LEFT block there is room for one only */

struct conv_args {
    mat u;
    const float *weight; /* [kernel][channels] */
    float *state;        /* [slot][kernel - 1][channels] */
    int kernel;
};

/* The convolution at row `row` of a span, channel c. */
__device__ float conv_value(const conv_args &a, const cuda_span &span, int row, int64_t c)
{
    int keep = a.kernel - 1;
    const float *past = a.state + (int64_t)span.slot * keep * a.u.cols;
    float sum = a.weight[keep * a.u.cols + c] * __ldcg(a.u.data + (span.first + row) * a.u.stride + c);
    for (int j = 0; j < keep; j++) {
        int at = row - keep + j; /* row of the span; negative: before this step */
        float u = __ldcg(at >= 0 ? a.u.data + (span.first + at) * a.u.stride + c : past + (keep + at) * a.u.cols + c);
        sum = fmaf(a.weight[j * a.u.cols + c], u, sum);
    }
    return silu(sum);
}

__global__ void conv_rows(mat y, conv_args a, cuda_rows rows)
{
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    cuda_span span = rows.spans[rows.rows[blockIdx.y].span];
    if (c < y.cols) y.data[blockIdx.y * y.stride + c] = conv_value(a, span, (int)blockIdx.y - span.first, c);
}

/* The last kernel - 1 inputs, of this step or left of earlier ones. */
__global__ void conv_keep(conv_args a, cuda_rows rows)
{
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    cuda_span span = rows.spans[blockIdx.y];
    int keep = a.kernel - 1;
    float *past = a.state + (int64_t)span.slot * keep * a.u.cols;
    if (c >= a.u.cols) return;
    for (int j = 0; j < keep; j++) {
        int at = span.n + j - keep;
        past[j * a.u.cols + c] =
            at >= 0 ? a.u.data[(span.first + at) * a.u.stride + c] : past[(keep + at) * a.u.cols + c];
    }
}

struct delta_args {
    mat o, qkv, a, b;
    const float *A_log, *dt_bias;
    float *matrix;
    delta_shape shape;
    cuda_rows rows;
    conv_args conv; /* of delta_step; for the scan qkv has been convolved */
    bool told;      /* u, a and b (parts.h) */
    float *clears;  /* words that become ABSENT, for the next layer */
    int words;
};

/* What a token brings to a head: q and k normalised, v, decay, beta. */
struct token {
    float q[HEAD_MAX], k[HEAD_MAX], v[COLUMNS], decay, beta;
};

__device__ float input_at(const delta_args &p, const cuda_span &span, int row, int64_t c)
{
    return __ldcg(p.qkv.data + (span.first + row) * p.qkv.stride + c);
}

__device__ void normalise(float *x, int n, float scale)
{
    float sum = 0;
    for (int i = threadIdx.x % LANES; i < n; i += LANES) sum = fmaf(x[i], x[i], sum);
    float r = scale / sqrtf(warp_sum(sum) + 1e-6f);
    for (int i = threadIdx.x % LANES; i < n; i += LANES) x[i] *= r;
}

__device__ void load_token(token &t, const delta_args &p, const cuda_span &span, int row, int head, int first_column)
{
    int dk = p.shape.key_dim, dv = p.shape.value_dim, key = head / (p.shape.value_heads / p.shape.key_heads);
    int64_t keys = (int64_t)p.shape.key_heads * dk, at = span.first + row;
    for (int i = threadIdx.x; i < 2 * dk + COLUMNS; i += THREADS) {
        if (i < dk)
            t.q[i] = input_at(p, span, row, (int64_t)key * dk + i);
        else if (i < 2 * dk)
            t.k[i - dk] = input_at(p, span, row, keys + (int64_t)key * dk + i - dk);
        else if (first_column + i - 2 * dk < dv)
            t.v[i - 2 * dk] = input_at(p, span, row, 2 * keys + (int64_t)head * dv + first_column + i - 2 * dk);
    }
    if (threadIdx.x == THREADS - 1) {
        float x = __ldcg(p.a.data + at * p.a.stride + head) + p.dt_bias[head];
        t.decay = expf(-expf(p.A_log[head]) * (x > 20 ? x : log1pf(expf(x))));
        t.beta = sigmoid(__ldcg(p.b.data + at * p.b.stride + head));
    }
    __syncthreads();
    if (threadIdx.x < LANES) normalise(t.q, dk, 1.0f / sqrtf((float)dk));
    else if (threadIdx.x < 2 * LANES) normalise(t.k, dk, 1);
    __syncthreads();
}

/* EACH: key rows a thread holds, rows warp + 8 i of column `lane`. */
template <int EACH> __global__ void __launch_bounds__(THREADS) delta_heads(const __grid_constant__ delta_args p)
{
    __shared__ token t;
    __shared__ float sums[2][WARPS][COLUMNS];
    int dk = p.shape.key_dim, dv = p.shape.value_dim, slices = (dv + COLUMNS - 1) / COLUMNS;
    int head = blockIdx.x / slices, first = blockIdx.x % slices * COLUMNS;
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, column = first + lane;
    cuda_span span = p.rows.spans[blockIdx.y];
    float *S = p.matrix + ((int64_t)span.slot * p.shape.value_heads + head) * dk * dv;
    float s[EACH];
    let_next_start();
    for (int i = 0; i < EACH; i++) {
        int r = warp + WARPS * i;
        s[i] = r < dk && column < dv ? S[(int64_t)r * dv + column] : 0;
    }
    wait_for_previous();
    for (int row = 0; row < span.n; row++) {
        load_token(t, p, span, row, head, first);
        float read = 0, out = 0;
        for (int i = 0; i < EACH; i++) {
            int r = warp + WARPS * i;
            s[i] *= t.decay;
            if (r < dk) read = fmaf(s[i], t.k[r], read);
        }
        sums[0][warp][lane] = read;
        __syncthreads();
        read = 0;
        for (int w = 0; w < WARPS; w++) read += sums[0][w][lane];
        float d = t.beta * (t.v[lane] - read);
        for (int i = 0; i < EACH; i++) {
            int r = warp + WARPS * i;
            if (r >= dk) continue;
            s[i] = fmaf(t.k[r], d, s[i]);
            out = fmaf(s[i], t.q[r], out);
        }
        sums[1][warp][lane] = out;
        __syncthreads();
        if (warp == 0 && column < dv) {
            out = 0;
            for (int w = 0; w < WARPS; w++) out += sums[1][w][lane];
            p.o.data[(span.first + row) * p.o.stride + (int64_t)head * dv + column] = out;
        }
    }
    for (int i = 0; i < EACH; i++) {
        int r = warp + WARPS * i;
        if (r < dk && column < dv) S[(int64_t)r * dv + column] = s[i];
    }
}

/* Sums of squares of q and k, a lane's share each, become what q and k are multiplied by: as normalise(), half a warp each. */
__device__ __forceinline__ void both_norms(float &q, float &k, float scale)
{
    bool upper = threadIdx.x & LANES / 2;
    float sum = (upper ? k : q) + __shfl_xor_sync(ALL, upper ? q : k, LANES / 2);
    for (int o = LANES / 4; o > 0; o /= 2) sum += __shfl_xor_sync(ALL, sum, o);
    float r = (upper ? 1 : scale) / sqrtf(sum + 1e-6f);
    q = __shfl_sync(ALL, r, 0);
    k = __shfl_sync(ALL, r, LANES / 2);
}

/* A token of every sequence, its convolution too. Nothing since the last token has touched either state: all but the token's
 * own inputs is asked for before the kernel that makes them is done. Where they are told that kernel goes on meanwhile, with what the one after
 * this wants. EXACT: heads of EACH * WARPS, a
 * convolution of TAPS + 1. */
template <int EACH, bool EXACT> __global__ void __launch_bounds__(THREADS, 2) delta_step(const __grid_constant__ delta_args p)
{
    constexpr int TAPS = 3;            /* of the convolution kept in registers */
    constexpr int ITEMS = (2 * EACH * WARPS + COLUMNS + THREADS - 1) / THREADS; /* values of q, k and v a thread makes */
    constexpr int PITCH = EACH + 4;    /* rows of a warp side by side, banks apart */
    __shared__ __align__(16) float keys_of[2][WARPS][PITCH]; /* q, k, not normalised: row r at [r % WARPS][r / WARPS] */
    __shared__ float values[COLUMNS], sums[2][WARPS][COLUMNS], gates[2];
    int dk = EXACT ? EACH * WARPS : p.shape.key_dim, dv = EXACT ? dk : p.shape.value_dim, slices = (dv + COLUMNS - 1) / COLUMNS;
    int head = blockIdx.x / slices, first = blockIdx.x % slices * COLUMNS, key = head / (p.shape.value_heads / p.shape.key_heads);
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, column = first + lane, keys = p.shape.key_heads * dk;
    int keep = EXACT ? TAPS : p.conv.kernel - 1, channels = (int)p.conv.u.cols;
    let_next_start();
    cuda_span span = p.rows.spans[blockIdx.y];
    float *S = p.matrix + ((int64_t)span.slot * p.shape.value_heads + head) * dk * dv + (int64_t)warp * dv + column;
    const float *past = p.conv.state + (int64_t)span.slot * keep * channels;
    float s[EACH], w[ITEMS][TAPS + 1], old[ITEMS][TAPS];
    int at[ITEMS];
    bool inside = EXACT || column < dv;
#pragma unroll
    for (int i = 0; i < EACH; i++) s[i] = (EXACT || warp + WARPS * i < dk) && inside ? S[i * WARPS * dv] : 0;
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int i = threadIdx.x + n * THREADS;
        at[n] = i < dk ? key * dk + i : i < 2 * dk ? keys + key * dk + i - dk : 2 * keys + head * dv + first + i - 2 * dk;
        if (i >= 2 * dk + COLUMNS || (!EXACT && i >= 2 * dk && first + i - 2 * dk >= dv)) at[n] = -1;
#pragma unroll
        for (int j = 0; j <= TAPS; j++) {
            int tap = keep - TAPS + j;
            w[n][j] = at[n] >= 0 && tap >= 0 ? p.conv.weight[tap * channels + at[n]] : 0;
            if (j < TAPS) old[n][j] = at[n] >= 0 && tap >= 0 ? __ldcg(past + tap * channels + at[n]) : 0;
        }
    }
    const float *u[ITEMS], *ab = (lane == 0 ? p.a.data + span.first * p.a.stride : p.b.data + span.first * p.b.stride) + head;
#pragma unroll
    for (int n = 0; n < ITEMS; n++) u[n] = p.conv.u.data + span.first * p.conv.u.stride + at[n];
    float dt = p.dt_bias[head], rate = -expf(p.A_log[head]);
    float x[ITEMS], gate = 0;
    bool gates_come = warp == WARPS - 1 && lane < 2;
    if (p.told) { /* a and b come last of what is wanted: until then two lanes of a block ask, not all threads */
        if (gates_come) do {
                gate = hear(ab);
            } while (absent(gate));
        __syncthreads();
        bool again;
        do {
            again = false;
#pragma unroll
            for (int n = 0; n < ITEMS; n++) x[n] = at[n] >= 0 ? hear(u[n]) : 0;
#pragma unroll
            for (int n = 0; n < ITEMS; n++) again = again || absent(x[n]);
        } while (again);
    } else {
        wait_for_previous();
        if (gates_come) gate = __ldcg(ab);
#pragma unroll
        for (int n = 0; n < ITEMS; n++) x[n] = at[n] >= 0 ? __ldcg(u[n]) : 0;
    }
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int i = threadIdx.x + n * THREADS, r = i < dk ? i : i - dk;
        if (at[n] < 0) continue;
        x[n] *= w[n][TAPS];
        for (int j = 0; j < keep - TAPS; j++) x[n] = fmaf(p.conv.weight[j * channels + at[n]], past[j * channels + at[n]], x[n]);
#pragma unroll
        for (int j = 0; j < TAPS; j++) x[n] = fmaf(w[n][j], old[n][j], x[n]);
        *(i < 2 * dk ? &keys_of[i >= dk][r % WARPS][r / WARPS] : values + i - 2 * dk) = silu(x[n]);
    }
    if (gates_come) { /* decay, and beta */
        float a = gate + dt;
        gates[lane] = lane ? sigmoid(gate) : expf(rate * (a > 20 ? a : log1pf(expf(a))));
    }
    __syncthreads();
    float of_q = 0, of_k = 0, k[EACH], read = 0, out = 0;
#pragma unroll
    for (int i = 0; i < EACH; i += LANES / WARPS) { /* every warp the norms of all, row lane first */
        if (!EXACT && lane + WARPS * i >= dk) continue;
        float x_q = keys_of[0][lane % WARPS][lane / WARPS + i], x_k = keys_of[1][lane % WARPS][lane / WARPS + i];
        of_q = fmaf(x_q, x_q, of_q);
        of_k = fmaf(x_k, x_k, of_k);
    }
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        float4 four = *(const float4 *)&keys_of[1][warp][i];
        k[i] = four.x, k[i + 1] = four.y, k[i + 2] = four.z, k[i + 3] = four.w;
    }
    both_norms(of_q, of_k, 1.0f / sqrtf((float)dk));
    float decay = gates[0];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        s[i] *= decay;
        k[i] *= of_k;
        if (EXACT || warp + WARPS * i < dk) read = fmaf(s[i], k[i], read);
    }
    sums[0][warp][lane] = read;
    __syncthreads();
    read = 0;
#pragma unroll
    for (int n = 0; n < WARPS; n++) read += sums[0][n][lane];
    float d = gates[1] * (values[lane] - read);
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        float4 four = *(const float4 *)&keys_of[0][warp][i];
        float q[4] = { four.x, four.y, four.z, four.w };
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (!EXACT && warp + WARPS * (i + j) >= dk) continue;
            s[i + j] = fmaf(k[i + j], d, s[i + j]);
            out = fmaf(s[i + j], q[j] * of_q, out);
            if (inside) S[(i + j) * WARPS * dv] = s[i + j];
        }
    }
    sums[1][warp][lane] = out;
#pragma unroll 1
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < p.words; i += gridDim.x * THREADS) p.clears[i] = __uint_as_float(ABSENT);
    __syncthreads();
    if (warp > 0 || !inside) return;
    out = 0;
#pragma unroll
    for (int n = 0; n < WARPS; n++) out += sums[1][n][lane];
    p.o.data[span.first * p.o.stride + (int64_t)head * dv + column] = out;
}

void start(struct queue *q, const delta_args &p, bool step)
{
    dim3 grid((unsigned)(p.shape.value_heads * ((p.shape.value_dim + COLUMNS - 1) / COLUMNS)), (unsigned)p.rows.n_spans);
    bool narrow = p.shape.key_dim <= 128;
    bool exact = p.shape.key_dim == 128 && p.shape.value_dim == 128 && p.conv.kernel == 4;
    if (p.shape.key_dim > HEAD_MAX)
        queue_refuse(q, "delta", "key heads wider than 256 are not supported on a GPU");
    else if (step)
        launch_side<THREADS>(q, "delta", RIGHT, exact ? delta_step<16, true> : narrow ? delta_step<16, false>
                                                    : delta_step<HEAD_MAX / WARPS, false>,
                             grid, q->has_pdl && p.rows.n_spans == 1 ? APART : 0, p);
    else
        launch(q, "delta", false, narrow ? delta_heads<16> : delta_heads<HEAD_MAX / WARPS>, grid, 0, p);
}

} /* namespace */

void cuda_conv(struct queue *q, struct mat y, struct mat u, const float *weight, const struct delta_state *state,
               const struct delta_shape *shape, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return;
    conv_args a = { u, weight, state->conv, shape->kernel };
    launch(q, "conv", false, conv_rows, dim3(blocks(u.cols), (unsigned)step->n), 0, y, a, *rows);
    launch(q, "conv", false, conv_keep, dim3(blocks(u.cols), (unsigned)step->n_spans), 0, a, *rows);
}

void cuda_delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
                const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
                const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (rows) start(q, delta_args{ o, qkv, a, b, A_log, dt_bias, state->matrix, *shape, *rows, {}, false, nullptr, 0 }, false);
}

void cuda_delta_decode(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows)
{
    conv_args c = { r->u, r->conv_weight, r->state->conv, r->shape->kernel };
    struct cuda_told *t = &q->told;
    int64_t words = r->u.cols + r->z.cols + r->a.cols + r->b.cols;
    bool goes_on = q->has_pdl && q->current && rows->n == 1 && words <= t->most;
    t->absent = goes_on ? words : 0;
    t->next = !goes_on ? nullptr : t->used && t->u.data == t->words ? t->words + t->most : t->words;
    start(q,
          delta_args{ r->raw, r->u, r->a, r->b, r->A_log, r->dt_bias, r->state->matrix, *r->shape, *rows, c, t->used, t->next,
                      (int)t->absent },
          true);
}
