/* Gated DeltaNet for many rows of a sequence: convolution, then the delta rule in chunks of 64 tokens. Heads of 128 by
 * 128, a convolution of 4; what enters the tensor cores is BF16, sums, solves and the state are f32.
 *
 * conv_heads: convolution, SiLU and, of q and k, the norm, to BF16. A warp a head, one token after the other.
 * chunk_parts: what a chunk needs of itself, for all chunks and value heads at once. With c the running sum of the log
 *   decay, A = beta_i (K_i . K_j) e^(c_i - c_j) below the diagonal, it solves (I + A) U = beta V and
 *   (I + A) W = beta e^c K, a thread a column, and forms M = (Q_i . K_j) e^(c_i - c_j) on and below the diagonal.
 * chunk_scan: chunk after chunk, a block for 32 columns of one head's state S, which stays in registers:
 *   N = U - W S; O = e^c Q S + M N; S = e^(c_last) S + (e^(c_last - c) K)^T N. */
#include "backend/cuda/matrices.cuh"
#include "backend/cuda/prefill.h"

namespace {

constexpr int CHUNK = DELTA_CHUNK, DIM = 128, SLICE = 32, TAPS = 4;
constexpr int BIG = CHUNK * DIM * 2, SQUARE = CHUNK * CHUNK * 2, NARROW = CHUNK * SLICE * 2; /* bytes */

struct scan_args {
    mat u, a, b, o;
    const float *conv_weight, *A_log, *dt_bias;
    float *conv, *matrix;
    delta_shape shape;
    cuda_rows rows;
    /* scratch; chunks of a span lie one after the other, those of its successor after them */
    __nv_bfloat16 *qk, *v;  /* [rows][2 * key heads][DIM], [rows][value heads][DIM] */
    __nv_bfloat16 *U, *W;   /* [chunk][value head][CHUNK][DIM] */
    __nv_bfloat16 *M;       /* [chunk][value head][CHUNK][CHUNK] */
    float *sums;            /* [chunk][value head][CHUNK]: c */
};

struct chunk {
    cuda_span span;
    int first, n; /* rows of the step; n 0: no such chunk */
    int index;    /* in its span */
};

__device__ chunk chunk_of(const cuda_rows &rows, int number)
{
    chunk c = {};
    for (int s = 0; s < rows.n_spans; s++) {
        cuda_span span = rows.spans[s];
        int chunks = (span.n + CHUNK - 1) / CHUNK;
        if (number < chunks) {
            int left = span.n - number * CHUNK;
            c.span = span;
            c.index = number;
            c.first = span.first + number * CHUNK;
            c.n = left < CHUNK ? left : CHUNK;
            return c;
        }
        number -= chunks;
    }
    return c;
}

__device__ __forceinline__ void load4(float (&x)[4], const float *from)
{
    if ((uintptr_t)from % 16 == 0) {
        float4 v = *(const float4 *)from;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
        for (int i = 0; i < 4; i++) x[i] = from[i];
    }
}

/* Grid: parts of chunks, heads of q, k and v by eights. A lane has four neighbouring channels. */
__global__ void conv_heads(const __grid_constant__ scan_args p, int parts)
{
    wait_for_previous();
    let_next_start();
    constexpr int AHEAD = 8;
    chunk c = chunk_of(p.rows, blockIdx.x / parts);
    int keys = p.shape.key_heads, head = blockIdx.y * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int begin = blockIdx.x % parts * (CHUNK / parts), end = begin + CHUNK / parts < c.n ? begin + CHUNK / parts : c.n;
    if (begin >= end || head >= 2 * keys + p.shape.value_heads) return;
    int64_t channel = (int64_t)head * DIM + 4 * lane, channels = p.u.cols;
    float weight[TAPS][4], x[TAPS - 1 + AHEAD][4];
    const float *past = p.conv + (int64_t)c.span.slot * (TAPS - 1) * channels;
    for (int j = 0; j < TAPS; j++) load4(weight[j], p.conv_weight + j * channels + channel);
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++) {
        int at = c.index * CHUNK + begin + j - (TAPS - 1);
        load4(x[j], at >= 0 ? p.u.data + (c.span.first + at) * p.u.stride + channel : past + (at + TAPS - 1) * channels + channel);
    }
    bool normed = head < 2 * keys;
    float scale = head < keys ? 1.0f / sqrtf((float)DIM) : 1;
    __nv_bfloat16 *to = normed ? p.qk + (int64_t)c.first * 2 * keys * DIM + channel
                               : p.v + (int64_t)c.first * p.shape.value_heads * DIM + channel - 2 * keys * DIM;
    int64_t step = (normed ? 2 * keys : p.shape.value_heads) * DIM;
    for (int first = begin; first < end; first += AHEAD) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (first + k < end) load4(x[TAPS - 1 + k], p.u.data + (int64_t)(c.first + first + k) * p.u.stride + channel);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (first + k >= end) break;
            float y[4], sum = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float s = weight[TAPS - 1][i] * x[k + TAPS - 1][i];
#pragma unroll
                for (int j = 0; j < TAPS - 1; j++) s = fmaf(weight[j][i], x[k + j][i], s);
                y[i] = silu(s);
                sum = fmaf(y[i], y[i], sum);
            }
            float r = normed ? scale / sqrtf(warp_sum(sum) + 1e-6f) : 1;
            __nv_bfloat162 pair[2] = { __floats2bfloat162_rn(y[0] * r, y[1] * r), __floats2bfloat162_rn(y[2] * r, y[3] * r) };
            *(uint2 *)(to + (first + k) * step) = *(uint2 *)pair;
        }
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[j][i] = x[AHEAD + j][i];
    }
}

/* The last TAPS - 1 inputs of each span. Grid: channels, spans. */
__global__ void conv_advance(const __grid_constant__ scan_args p)
{
    wait_for_previous();
    let_next_start();
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x, channels = p.u.cols;
    cuda_span span = p.rows.spans[blockIdx.y];
    if (c >= channels) return;
    float *past = p.conv + (int64_t)span.slot * (TAPS - 1) * channels + c, last[TAPS - 1];
    for (int j = 0; j < TAPS - 1; j++) {
        int at = span.n + j - (TAPS - 1);
        last[j] = at >= 0 ? p.u.data[(int64_t)(span.first + at) * p.u.stride + c] : past[(at + TAPS - 1) * channels];
    }
    for (int j = 0; j < TAPS - 1; j++) past[j * channels] = last[j];
}

/* ---- matrices in shared memory: rows of 256, 128 or 64 bytes, their 16-byte pieces permuted by row ---- */

__device__ __forceinline__ uint32_t at256(int row, int piece)
{
    return row * 256 + (piece ^ (row & 7)) * 16;
}

__device__ __forceinline__ uint32_t at128(int row, int piece)
{
    return row * 128 + (piece ^ (row & 7)) * 16;
}

__device__ __forceinline__ uint32_t at64(int row, int piece)
{
    return row * 64 + (piece ^ (row >> 1 & 3)) * 16;
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    mma(d, a[0], a[1], a[2], a[3], b0, b1);
}

/* Rows of DIM BF16 numbers into shared memory, zeros past n. */
__device__ __forceinline__ void copy_rows(uint32_t to, const __nv_bfloat16 *from, int64_t stride, int n)
{
#pragma unroll
    for (int i = 0; i < CHUNK * 16 / THREADS; i++) {
        int row = threadIdx.x / 16 + i * (THREADS / 16), piece = threadIdx.x % 16;
        copy_async16(to + at256(row, piece), row < n ? from + row * stride + piece * 8 : from, row < n);
    }
}

/* ---- chunks by themselves ---- */

constexpr int A_STRIDE = CHUNK + 4, PARTS_SHARED = 3 * BIG + CHUNK * A_STRIDE * 4 + 3 * CHUNK * 4;

/* Running sums of the log decay, their powers of e, and beta. By one warp. */
__device__ void gates(const scan_args &p, const chunk &c, int head, float *sums, float *powers, float *beta)
{
    int lane = threadIdx.x % LANES;
    float before = 0;
    for (int half = 0; half < CHUNK / LANES; half++) {
        int i = half * LANES + lane;
        float g = 0, b = 0;
        if (i < c.n) {
            float x = p.a.data[(int64_t)(c.first + i) * p.a.stride + head] + p.dt_bias[head];
            g = -expf(p.A_log[head]) * (x > 20 ? x : log1pf(expf(x)));
            b = sigmoid(p.b.data[(int64_t)(c.first + i) * p.b.stride + head]);
        }
        for (int o = 1; o < LANES; o *= 2) {
            float other = __shfl_up_sync(ALL, g, o);
            if (lane >= o) g += other;
        }
        g += before;
        before = __shfl_sync(ALL, g, LANES - 1);
        sums[i] = g;
        powers[i] = expf(g);
        beta[i] = b;
    }
}

/* Grid: chunks, value heads. Shared memory: K, Q, V of the chunk, A, c, e^c, beta. */
__global__ void __launch_bounds__(THREADS, 2) chunk_parts(const __grid_constant__ scan_args p)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ __align__(1024) uint8_t shared[];
    float *A = (float *)(shared + 3 * BIG), *sums = A + CHUNK * A_STRIDE, *powers = sums + CHUNK, *beta = powers + CHUNK;
    chunk c = chunk_of(p.rows, blockIdx.x);
    int head = blockIdx.y, heads = p.shape.value_heads, keys = p.shape.key_heads, key = head / (heads / keys);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int64_t number = (int64_t)blockIdx.x * heads + head;
    if (c.n == 0) return;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    const __nv_bfloat16 *q = p.qk + ((int64_t)c.first * 2 * keys + key) * DIM;
    copy_rows(base, q + keys * DIM, 2 * keys * DIM, c.n);
    copy_rows(base + BIG, q, 2 * keys * DIM, c.n);
    copy_rows(base + 2 * BIG, p.v + ((int64_t)c.first * heads + head) * DIM, (int64_t)heads * DIM, c.n);
    copy_commit();
    if (warp == 0) gates(p, c, head, sums, powers, beta);
    copy_wait<0>();
    __syncthreads();
    if (threadIdx.x < CHUNK) p.sums[number * CHUNK + threadIdx.x] = sums[threadIdx.x];
    /* warps 0..3: K K^T, 4..7: Q K^T; 16 rows each */
    int row0 = warp % 4 * 16, quarter = lane / 8, eighth = lane % 8;
    bool queries = warp >= 4;
    float s[8][4] = {};
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        uint32_t a[4];
        matrices(a, base + (queries ? BIG : 0) + at256(row0 + (quarter & 1) * 8 + eighth, 2 * k + quarter / 2));
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t b[4];
            if (n > warp % 4) break;
            matrices(b, base + at256(n * 16 + quarter / 2 * 8 + eighth, 2 * k + (quarter & 1)));
            mma(s[2 * n], a, b[0], b[1]);
            mma(s[2 * n + 1], a, b[2], b[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = row0 + g + 8 * h, j = n * 8 + 2 * t;
            float x[2];
            for (int k = 0; k < 2; k++) {
                bool in = j + k < i || (queries && j + k == i);
                x[k] = in ? s[n][2 * h + k] * expf(sums[i] - sums[j + k]) : 0;
            }
            if (queries)
                *(__nv_bfloat162 *)(p.M + number * CHUNK * CHUNK + i * CHUNK + j) = __floats2bfloat162_rn(x[0], x[1]);
            else
                *(float2 *)(A + i * A_STRIDE + j) = make_float2(beta[i] * x[0], beta[i] * x[1]);
        }
    __syncthreads();
    int column = threadIdx.x % DIM;
    bool values = threadIdx.x < DIM;
    const uint8_t *right = shared + (values ? 2 * BIG : 0);
    __nv_bfloat16 *to = (values ? p.U : p.W) + number * CHUNK * DIM + column;
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        float r = __bfloat162float(*(const __nv_bfloat16 *)(right + at256(i, column / 8) + column % 8 * 2)) * beta[i];
        if (!values) r *= powers[i];
#pragma unroll
        for (int j = 0; j < i; j += 4) {
            float4 a = *(const float4 *)(A + i * A_STRIDE + j);
            r = fmaf(-a.x, x[j], r);
            if (j + 1 < i) r = fmaf(-a.y, x[j + 1], r);
            if (j + 2 < i) r = fmaf(-a.z, x[j + 2], r);
            if (j + 3 < i) r = fmaf(-a.w, x[j + 3], r);
        }
        x[i] = r;
        to[i * DIM] = __float2bfloat16_rn(r);
    }
}

/* ---- chunk after chunk ---- */

/* A stage: W, Q, K, M, 32 columns of U, c. Then S and twice N in BF16. */
constexpr int STAGE_M = 3 * BIG, STAGE_U = STAGE_M + SQUARE, STAGE_C = STAGE_U + NARROW, STAGE = STAGE_C + 1024;
constexpr int STATE = DIM * SLICE * 2, SCAN_SHARED = 2 * STAGE + STATE + 2 * NARROW;

__device__ __forceinline__ void load_stage(uint32_t to, const scan_args &p, const cuda_span &span, int64_t number, int chunk,
                                           int key, int column)
{
    int keys = p.shape.key_heads, first = span.first + chunk * CHUNK, left = span.n - chunk * CHUNK;
    const __nv_bfloat16 *q = p.qk + ((int64_t)first * 2 * keys + key) * DIM, *U = p.U + number * CHUNK * DIM + column;
    copy_rows(to, p.W + number * CHUNK * DIM, DIM, CHUNK);
    copy_rows(to + BIG, q, 2 * keys * DIM, left);
    copy_rows(to + 2 * BIG, q + keys * DIM, 2 * keys * DIM, left);
#pragma unroll
    for (int i = 0; i < SQUARE / 16 / THREADS; i++) {
        int row = threadIdx.x / 8 + i * (THREADS / 8), piece = threadIdx.x % 8;
        copy_async16(to + STAGE_M + at128(row, piece), p.M + (number * CHUNK + row) * CHUNK + piece * 8, true);
    }
    int row = threadIdx.x / 4, piece = threadIdx.x % 4;
    copy_async16(to + STAGE_U + at64(row, piece), U + row * DIM + piece * 8, true);
    if (threadIdx.x < CHUNK / 4)
        copy_async16(to + STAGE_C + threadIdx.x * 16, p.sums + number * CHUNK + threadIdx.x * 4, true);
}

/* Grid: heads by slices of columns, spans. */
__global__ void __launch_bounds__(THREADS, 1) chunk_scan(const __grid_constant__ scan_args p)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ __align__(1024) uint8_t shared[];
    constexpr int SLICES = DIM / SLICE;
    int head = blockIdx.x / SLICES, column = blockIdx.x % SLICES * SLICE, heads = p.shape.value_heads;
    int key = head / (heads / p.shape.key_heads);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int quarter = lane / 8, eighth = lane % 8, row0 = warp % 4 * 16, side = warp / 4; /* of N and O: 16 x 16 */
    cuda_span span = p.rows.spans[blockIdx.y];
    int64_t number = head;
    for (int s = 0; s < (int)blockIdx.y; s++) number += (int64_t)((p.rows.spans[s].n + CHUNK - 1) / CHUNK) * heads;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared), state = base + 2 * STAGE, news = state + STATE;
    float *matrix = p.matrix + ((int64_t)span.slot * heads + head) * DIM * DIM + (int64_t)(warp * 16 + g) * DIM + column + 2 * t;
    float S[4][4]; /* rows 16 warp + g, + 8 */
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) S[n][i] = matrix[(int64_t)(i / 2) * 8 * DIM + n * 8 + i % 2];
    int chunks = (span.n + CHUNK - 1) / CHUNK;
    load_stage(base, p, span, number, 0, key, column);
    copy_commit();
    for (int c = 0; c < chunks; c++) {
        uint32_t stage = base + c % 2 * STAGE;
        const uint8_t *at = shared + c % 2 * STAGE;
        const float *sums = (const float *)(at + STAGE_C);
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                *(uint32_t *)(shared + 2 * STAGE + at64(warp * 16 + g + 8 * h, n) + 4 * t) = pair_of(S[n][2 * h], S[n][2 * h + 1]);
        copy_wait<0>();
        __syncthreads();
        if (c + 1 < chunks)
            load_stage(base + (c + 1) % 2 * STAGE, p, span, number + (int64_t)(c + 1) * heads, c + 1, key, column);
        copy_commit();
        float ws[2][4] = {}, o[2][4] = {};
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            uint32_t w[4], q[4], b[4], from = at256(row0 + (quarter & 1) * 8 + eighth, 2 * k + quarter / 2);
            matrices(w, stage + from);
            matrices(q, stage + BIG + from);
            matrices_turned(b, state + at64(k * 16 + (quarter & 1) * 8 + eighth, side * 2 + quarter / 2));
            for (int n = 0; n < 2; n++) {
                mma(ws[n], w, b[2 * n], b[2 * n + 1]);
                mma(o[n], q, b[2 * n], b[2 * n + 1]);
            }
        }
        float last = sums[CHUNK - 1];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = row0 + g + 8 * h;
            float power = expf(sums[i]), rest = expf(last - sums[i]);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                uint32_t to = at64(i, side * 2 + n) + 4 * t;
                __nv_bfloat162 u = *(const __nv_bfloat162 *)(at + STAGE_U + to);
                float x = __bfloat162float(u.x) - ws[n][2 * h], y = __bfloat162float(u.y) - ws[n][2 * h + 1];
                *(uint32_t *)(shared + 2 * STAGE + STATE + to) = pair_of(x, y);
                *(uint32_t *)(shared + 2 * STAGE + STATE + NARROW + to) = pair_of(x * rest, y * rest);
                o[n][2 * h] *= power;
                o[n][2 * h + 1] *= power;
            }
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            uint32_t m[4], b[4];
            if (k > warp % 4) break;
            matrices(m, stage + STAGE_M + at128(row0 + (quarter & 1) * 8 + eighth, 2 * k + quarter / 2));
            matrices_turned(b, news + at64(k * 16 + (quarter & 1) * 8 + eighth, side * 2 + quarter / 2));
            for (int n = 0; n < 2; n++) mma(o[n], m, b[2 * n], b[2 * n + 1]);
        }
        float decay = expf(last);
#pragma unroll
        for (int n = 0; n < 4; n++)
            for (int i = 0; i < 4; i++) S[n][i] *= decay;
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            uint32_t a[4], b[4];
            matrices_turned(a, stage + 2 * BIG + at256(k * 16 + quarter / 2 * 8 + eighth, warp * 2 + (quarter & 1)));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                matrices_turned(b, news + NARROW + at64(k * 16 + (quarter & 1) * 8 + eighth, half * 2 + quarter / 2));
                mma(S[2 * half], a, b[0], b[1]);
                mma(S[2 * half + 1], a, b[2], b[3]);
            }
        }
        int left = span.n - c * CHUNK;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = row0 + g + 8 * h;
            if (i >= left) continue;
            float *to = p.o.data + (int64_t)(span.first + c * CHUNK + i) * p.o.stride + head * DIM + column + side * 16 + 2 * t;
            for (int n = 0; n < 2; n++) {
                to[n * 8] = o[n][2 * h];
                to[n * 8 + 1] = o[n][2 * h + 1];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) matrix[(int64_t)(i / 2) * 8 * DIM + n * 8 + i % 2] = S[n][i];
}

/* The next `bytes` of scratch. */
template <class P> void place(P *&p, uint8_t *&at, int64_t count)
{
    p = (P *)at;
    at += (count * (int64_t)sizeof(P) + 127) / 128 * 128;
}

} /* namespace */

bool cuda_scan(struct queue *q, const struct delta_run *r, const struct step_rows *step)
{
    const delta_shape *s = r->shape;
    int64_t chunks = 0;
    bool many = step->prompts || (step->n > ROWS_EXACT && step->n >= 16 * step->n_spans);
    if (!q->rounded || !many || step->n > q->prefill.rows || s->key_dim != DIM || s->value_dim != DIM ||
        s->kernel != TAPS || SCAN_SHARED > q->shared_max)
        return false;
    for (int64_t i = 0; i < step->n_spans; i++) chunks += (step->spans[i].n + CHUNK - 1) / CHUNK;
    scan_args p = {};
    uint8_t *at = (uint8_t *)q->prefill.down;
    int64_t heads = s->value_heads;
    place(p.qk, at, step->n * 2 * s->key_heads * DIM);
    place(p.v, at, step->n * heads * DIM);
    place(p.U, at, chunks * heads * CHUNK * DIM);
    place(p.W, at, chunks * heads * CHUNK * DIM);
    place(p.M, at, chunks * heads * CHUNK * CHUNK);
    place(p.sums, at, chunks * heads * CHUNK);
    if (at - (uint8_t *)q->prefill.down > q->room) return false;
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return true;
    p.u = r->u;
    p.a = r->a;
    p.b = r->b;
    p.o = r->raw;
    p.conv_weight = r->conv_weight;
    p.A_log = r->A_log;
    p.dt_bias = r->dt_bias;
    p.conv = r->state->conv;
    p.matrix = r->state->matrix;
    p.shape = *s;
    p.rows = *rows;
    unsigned n = (unsigned)chunks, by_heads = blocks(2 * s->key_heads + heads, WARPS);
    int parts = n * by_heads < 4u * q->sms ? 4 : 1; /* so that all multiprocessors have some */
    launch(q, "conv", true, conv_heads, dim3(n * parts, by_heads), 0, p, parts);
    launch(q, "conv", true, conv_advance, dim3(blocks(r->u.cols), (unsigned)step->n_spans), 0, p);
    launch(q, "delta", true, chunk_parts, dim3(n, (unsigned)heads), PARTS_SHARED, p);
    launch(q, "delta", true, chunk_scan, dim3((unsigned)(heads * (DIM / SLICE)), (unsigned)step->n_spans), SCAN_SHARED, p);
    return true;
}
