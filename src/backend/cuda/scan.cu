/* Gated DeltaNet for many rows of a sequence: convolution, then the delta rule in chunks of 64 tokens. Heads of 128 by
 * 128, a convolution of 4; what enters the tensor cores is BF16, sums, solves and the state are f32.
 *
 * conv_heads: convolution, SiLU and, of q and k, the norm, to BF16. A warp a head, one token after the other.
 * chunk_parts: what a chunk needs of itself, for all chunks and value heads at once. With c the running sum of the log
 *   decay, A = beta_i (K_i . K_j) e^(c_i - c_j) below the diagonal, it solves (I + A) U = beta V and
 *   (I + A) W = beta e^c K, a thread two columns, and forms M = (Q_i . K_j) e^(c_i - c_j) on and below the diagonal. It also moves
 *   the convolution's state on.
 * chunk_scan: chunk after chunk, a block for 32 columns of one head's state S, which stays in registers:
 *   N = U - W S; O = e^c Q S + M N; S = e^(c_last) S + (e^(c_last - c) K)^T N.
 * chunk_scan_wide: the same on compute capability 9.0a, 64 columns a block. */
#include "backend/cuda/matrices.cuh"
#include "backend/cuda/prefill.h"
#include "backend/cuda/tensor_map.cuh"
#include "backend/cuda/wide.cuh"

namespace {

constexpr int CHUNK = DELTA_CHUNK, DIM = 128, SLICE = 32, TAPS = 4;
constexpr int SCAN_THREADS = 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int STAGES = 2; /* chunks in shared memory: all that some devices have room for */
#else
constexpr int STAGES = 3;
#endif
constexpr int BIG = CHUNK * DIM * 2, SQUARE = CHUNK * CHUNK * 2, NARROW = CHUNK * SLICE * 2; /* bytes */

struct scan_args {
    mat u, a, b, o;
    bool narrow; /* o is BF16, in the first half of each row's bytes */
    const float *conv_weight, *A_log, *dt_bias;
    float *conv, *matrix;
    delta_shape shape;
    cuda_rows rows;
    /* scratch; chunks of a span lie one after the other, those of its successor after them */
    __nv_bfloat16 *qk, *v;  /* [rows][2 * key heads][DIM], [rows][value heads][DIM] */
    /* as they are to lie in shared memory: */
    uint8_t *U; /* [chunk][value head][DIM / SLICE]: at64 */
    uint8_t *W; /* [chunk][value head]: at256 */
    uint8_t *M; /* [chunk][value head]: at128 */
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
        float4 v = __ldcg((const float4 *)from);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
        for (int i = 0; i < 4; i++) x[i] = __ldcg(from + i);
    }
}

/* Grid: parts of chunks, heads of q, k and v by eights. A lane has four neighbouring channels, of AHEAD tokens at a time, and
 * asks for as many more before it works on them. */
__global__ void __launch_bounds__(THREADS, 2) conv_heads(const __grid_constant__ scan_args p, int parts)
{
    constexpr int AHEAD = 8;
    chunk c = chunk_of(p.rows, blockIdx.x / parts);
    int keys = p.shape.key_heads, head = blockIdx.y * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int begin = blockIdx.x % parts * (CHUNK / parts), end = begin + CHUNK / parts < c.n ? begin + CHUNK / parts : c.n;
    bool idle = begin >= end || head >= 2 * keys + p.shape.value_heads;
    int64_t channel = (int64_t)head * DIM + 4 * lane, channels = p.u.cols;
    float weight[TAPS][4], x[TAPS - 1 + AHEAD][4], next[AHEAD][4];
    const float *past = p.conv + (int64_t)c.span.slot * (TAPS - 1) * channels;
    int before = c.index * CHUNK + begin - (TAPS - 1); /* of the span's tokens, the first that is seen */
    for (int j = 0; j < TAPS && !idle; j++) {
        load4(weight[j], p.conv_weight + j * channels + channel);
        if (j < TAPS - 1 && before + j < 0) load4(x[j], past + (before + j + TAPS - 1) * channels + channel);
    }
    wait_for_previous();
    let_next_start();
    if (idle) return;
#pragma unroll
    for (int j = 0; j < TAPS - 1; j++)
        if (before + j >= 0) load4(x[j], p.u.data + (c.span.first + before + j) * p.u.stride + channel);
    bool normed = head < 2 * keys;
    float scale = head < keys ? 1.0f / sqrtf((float)DIM) : 1;
    __nv_bfloat16 *to = normed ? p.qk + (int64_t)c.first * 2 * keys * DIM + channel
                               : p.v + (int64_t)c.first * p.shape.value_heads * DIM + channel - 2 * keys * DIM;
    int64_t step = (normed ? 2 * keys : p.shape.value_heads) * DIM;
    const float *u = p.u.data + (int64_t)c.first * p.u.stride + channel;
#pragma unroll
    for (int k = 0; k < AHEAD; k++)
        if (begin + k < end) load4(x[TAPS - 1 + k], u + (begin + k) * p.u.stride);
#pragma unroll 1
    for (int first = begin; first < end; first += AHEAD) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (first + AHEAD + k < end) load4(next[k], u + (first + AHEAD + k) * p.u.stride);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (first + k >= end) break;
            float y[4], sum = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float s = weight[TAPS - 1][i] * x[k + TAPS - 1][i];
#pragma unroll
                for (int j = 0; j < TAPS - 1; j++) s = fmaf(weight[j][i], x[k + j][i], s);
                y[i] = __fdividef(s, 1.0f + __expf(-s)); /* to be BF16 */
                sum = fmaf(y[i], y[i], sum);
            }
            float r = normed ? scale * rsqrtf(warp_sum(sum) + 1e-6f) : 1;
            __nv_bfloat162 pair[2] = { __floats2bfloat162_rn(y[0] * r, y[1] * r), __floats2bfloat162_rn(y[2] * r, y[3] * r) };
            *(uint2 *)(to + (first + k) * step) = *(uint2 *)pair;
        }
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[j][i] = x[AHEAD + j][i];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[TAPS - 1 + k][i] = next[k][i];
    }
}

/* The last TAPS - 1 inputs of a span are the next one's past: channels [first, end), by SIZE threads. */
template <int SIZE> __device__ __forceinline__ void keep_last(const scan_args &p, const cuda_span &span, int first, int end)
{
    int64_t channels = p.u.cols;
#pragma unroll 1
    for (int c = first + threadIdx.x; c < end; c += SIZE) {
        float *past = p.conv + (int64_t)span.slot * (TAPS - 1) * channels + c, last[TAPS - 1];
        for (int j = 0; j < TAPS - 1; j++) {
            int at = span.n + j - (TAPS - 1);
            last[j] = at >= 0 ? p.u.data[(int64_t)(span.first + at) * p.u.stride + c] : past[(at + TAPS - 1) * channels];
        }
        for (int j = 0; j < TAPS - 1; j++) past[j * channels] = last[j];
    }
}

/* ---- matrices of CHUNK rows in shared memory: of 256 bytes as two halves, of 128, of 64; their 16-byte pieces permuted by row ---- */

__device__ __forceinline__ uint32_t at256(int row, int piece)
{
    return piece / 8 * (CHUNK * 128) + row * 128 + ((piece ^ row) & 7) * 16;
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

/* Until the copies at a barrier have come; or all but those of LEFT stages, of this thread. */
template <int LEFT> __device__ __forceinline__ void await_copies(uint64_t *b, int phase)
{
#if __CUDA_ARCH__ >= 900
    barrier_wait(b, phase);
#else
    copy_wait<LEFT>();
#endif
}

/* 64 rows of DIM BF16 numbers from (row, column) of a matrix of `rows` rows. Rows past a chunk's
 * last are another span's. One thread, or all. */
template <int SIZE>
__device__ __forceinline__ void copy_rows(uint32_t to, const CUtensorMap &map, const __nv_bfloat16 *matrix, int64_t stride, int rows,
                                          int row, int column, uint64_t *b)
{
#if __CUDA_ARCH__ >= 900
    copy_box(to, map, column, row, b);
    copy_box(to + CHUNK * 128, map, column + 64, row, b);
#else
#pragma unroll
    for (int i = 0; i < CHUNK * 16 / SIZE; i++) {
        int r = threadIdx.x / 16 + i * (SIZE / 16), piece = threadIdx.x % 16;
        bool in = row + r < rows;
        copy_async16(to + at256(r, piece), in ? matrix + (int64_t)(row + r) * stride + column + piece * 8 : matrix, in);
    }
#endif
}

template <int SIZE> __device__ __forceinline__ void copy_bytes(uint32_t to, const void *from, int bytes, uint64_t *b)
{
#if __CUDA_ARCH__ >= 900
    copy_bulk(to, from, bytes, b);
#else
    for (int i = threadIdx.x * 16; i < bytes; i += SIZE * 16) copy_async16(to + i, (const uint8_t *)from + i, true);
#endif
}

/* Whether this thread is to ask, having said how much comes. */
__device__ __forceinline__ bool begin_copies(uint64_t *b, int bytes)
{
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x != 0) return false;
    barrier_expect(b, bytes);
#endif
    return true;
}

__device__ __forceinline__ void end_copies()
{
#if __CUDA_ARCH__ < 900
    copy_commit();
#endif
}

/* By thread 0, before a meeting. */
__device__ __forceinline__ void init_copies(uint64_t *b, int n)
{
#if __CUDA_ARCH__ >= 900
    for (int i = 0; i < n; i++) barrier_init(b + i, 1);
    barriers_ready();
#endif
}

/* ---- chunks by themselves ---- */

constexpr int A_STRIDE = CHUNK + 4, PARTS_SHARED = 3 * BIG + CHUNK * A_STRIDE * 4 + 3 * CHUNK * 4;

/* Running sums of the log decay, beta, and beta times the powers of e of the former. By one warp. a and b are there before the
 * convolution, whose kernel lets this one start only once it has waited for them. */
__device__ void gates(const scan_args &p, const chunk &c, int head, float *sums, float *powers, float *beta)
{
    constexpr int HALVES = CHUNK / LANES;
    int lane = threadIdx.x % LANES;
    float before = 0, a[HALVES], b[HALVES], bias = p.dt_bias[head], rate = -expf(p.A_log[head]);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        int i = half * LANES + lane;
        a[half] = b[half] = 0;
        if (i < c.n) a[half] = __ldcg(p.a.data + (int64_t)(c.first + i) * p.a.stride + head);
        if (i < c.n) b[half] = __ldcg(p.b.data + (int64_t)(c.first + i) * p.b.stride + head);
    }
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        int i = half * LANES + lane;
        float x = a[half] + bias, g = i < c.n ? rate * (x > 20 ? x : log1pf(expf(x))) : 0;
        for (int o = 1; o < LANES; o *= 2) {
            float other = __shfl_up_sync(ALL, g, o);
            if (lane >= o) g += other;
        }
        g += before;
        before = __shfl_sync(ALL, g, LANES - 1);
        sums[i] = g;
        beta[i] = i < c.n ? sigmoid(b[half]) : 0;
        powers[i] = beta[i] * expf(g);
    }
}

/* Of (I + A) X = scale R two columns from `column` on, TURN rows at a time: what they give is taken off all later rows, which move
 * up, so that the code is a loop's. X goes to a matrix of rows of 64 bytes, as at64 has them, or of 128, as half of at256. */
__device__ __forceinline__ void solve(uint8_t *to, bool by64, const float *A, const uint8_t *right, int column, const float *scale)
{
    constexpr int TURN = 4;
    float r[CHUNK][2];
    int piece = by64 ? column % SLICE / 8 : column / 8 % 8, row = by64 ? 64 : 128, turned = by64 ? 1 : 0, mask = by64 ? 3 : 7;
    to += column % 8 * 2;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        float2 both = __bfloat1622float2(*(const __nv_bfloat162 *)((const __nv_bfloat16 *)(right + at256(i, column / 8)) + column % 8));
        r[i][0] = both.x * scale[i];
        r[i][1] = both.y * scale[i];
    }
#pragma unroll 1
    for (int first = 0; first < CHUNK; first += TURN, A += TURN * A_STRIDE + TURN) {
        float x[TURN][2];
#pragma unroll
        for (int i = 0; i < TURN; i++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                x[i][c] = r[i][c];
#pragma unroll
                for (int j = 0; j < i; j++) x[i][c] = fmaf(-A[i * A_STRIDE + j], x[j][c], x[i][c]);
            }
            *(uint32_t *)(to + (first + i) * row + (piece ^ (first + i >> turned & mask)) * 16) = pair_of(x[i][0], x[i][1]);
        }
#pragma unroll
        for (int i = TURN; i < CHUNK; i++) {
            if (i % TURN == 0 && first + i >= CHUNK) break;
            float4 a = *(const float4 *)(A + i * A_STRIDE);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float s = fmaf(-a.x, x[0][c], r[i][c]);
                s = fmaf(-a.y, x[1][c], s);
                s = fmaf(-a.z, x[2][c], s);
                r[i - TURN][c] = fmaf(-a.w, x[3][c], s);
            }
        }
    }
}

/* Rows from n on. */
template <int SIZE> __device__ __forceinline__ void clear_rows(uint8_t *to, int n)
{
#pragma unroll 1
    for (int i = n * 16 + threadIdx.x; i < CHUNK * 16; i += SIZE) *(uint4 *)(to + at256(i / 16, i % 16)) = make_uint4(0, 0, 0, 0);
}

/* SIZE: threads. Half of 256 form A and half of them M, after which one half's registers are the other's, which solves; 128 do one
 * after the other. Grid: chunks, value heads. Shared memory: K, Q, V of the chunk, A, c, beta e^c, beta. */
template <int SIZE>
__global__ void __launch_bounds__(SIZE, SIZE == DIM ? 3 : 2)
    chunk_parts(const __grid_constant__ scan_args p, const __grid_constant__ CUtensorMap qk, const __grid_constant__ CUtensorMap v)
{
    constexpr bool HALVES = SIZE > DIM;
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ uint64_t full;
    float *A = (float *)(shared + 3 * BIG), *sums = A + CHUNK * A_STRIDE, *powers = sums + CHUNK, *beta = powers + CHUNK;
    chunk c = chunk_of(p.rows, blockIdx.x);
    int head = blockIdx.y, heads = p.shape.value_heads, keys = p.shape.key_heads, key = head / (heads / keys);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int64_t number = (int64_t)blockIdx.x * heads + head;
    if (c.n == 0) return;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    if (threadIdx.x == 0) init_copies(&full, 1);
    if (warp == 1) gates(p, c, head, sums, powers, beta);
    wait_for_previous();
    let_next_start();
    if (begin_copies(&full, 3 * BIG)) {
        copy_rows<SIZE>(base, qk, p.qk, 2 * keys * DIM, p.rows.n, c.first, (keys + key) * DIM, &full);
        copy_rows<SIZE>(base + BIG, qk, p.qk, 2 * keys * DIM, p.rows.n, c.first, key * DIM, &full);
        copy_rows<SIZE>(base + 2 * BIG, v, p.v, heads * DIM, p.rows.n, c.first, head * DIM, &full);
    }
    end_copies();
    if (c.first + c.n == c.span.first + c.span.n) {
        int channels = (int)p.u.cols, each = (channels + heads - 1) / heads, end = (head + 1) * each;
        keep_last<SIZE>(p, c.span, head * each, end < channels ? end : channels);
    }
#if __CUDA_ARCH__ < 900
    await_copies<0>(&full, 0);
#endif
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    await_copies<0>(&full, 0);
#endif
    if (c.n < CHUNK) { /* what follows is another span's */
        clear_rows<SIZE>(shared, c.n);
        clear_rows<SIZE>(shared + 2 * BIG, c.n);
        __syncthreads();
    }
    if (threadIdx.x < CHUNK) p.sums[number * CHUNK + threadIdx.x] = sums[threadIdx.x];
    /* 16 rows a warp of K K^T and Q K^T, one after the other, or of one */
#pragma unroll 1
    for (int of_q = HALVES && warp >= 4; of_q < (HALVES && warp < 4 ? 1 : 2); of_q++) {
        int tile_row = warp % 4, row0 = tile_row * 16, quarter = lane / 8, eighth = lane % 8;
        float x[8][4] = {};
#pragma unroll 2
        for (int k = 0; k < DIM / 16; k++) {
            uint32_t a[4];
            matrices(a, base + of_q * BIG + at256(row0 + (quarter & 1) * 8 + eighth, 2 * k + quarter / 2));
#pragma unroll
            for (int n = 0; n < 4; n++) {
                uint32_t b[4];
                if (n > tile_row) break;
                matrices(b, base + at256(n * 16 + quarter / 2 * 8 + eighth, 2 * k + (quarter & 1)));
                mma(x[2 * n], a, b[0], b[1]);
                mma(x[2 * n + 1], a, b[2], b[3]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = row0 + g + 8 * h;
            float own = sums[i], factor = beta[i];
#pragma unroll
            for (int n = 0; n < 8; n++) {
                int j = n * 8 + 2 * t;
                float2 other = *(const float2 *)(sums + j);
                float v = x[n][2 * h] * expf(fminf(own - other.x, 0)), w = x[n][2 * h + 1] * expf(fminf(own - other.y, 0));
                if (of_q)
                    *(uint32_t *)(p.M + number * SQUARE + at128(i, n) + 4 * t) = pair_of(j <= i ? v : 0, j < i ? w : 0);
                else
                    *(float2 *)(A + i * A_STRIDE + j) = make_float2(j < i ? factor * v : 0, j + 1 < i ? factor * w : 0);
            }
        }
    }
    __syncthreads();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (HALVES) {
        if (warp >= 4)
            fewer_registers<40>();
        else
            more_registers<208>();
    }
#endif
    if (warp >= 4) return;
    int column = 2 * threadIdx.x % DIM;
    bool values = threadIdx.x < DIM / 2;
    uint8_t *to = values ? p.U + number * BIG + column / SLICE * NARROW : p.W + number * BIG + column / 64 * (CHUNK * 128);
    solve(to, values, A, shared + (values ? 2 * BIG : 0), column, values ? beta : powers);
}

/* ---- chunk after chunk ---- */

/* A stage: W, Q, K, M, 32 columns of U, c. After the stages S and twice N in BF16. */
constexpr int STAGE_M = 3 * BIG, STAGE_U = STAGE_M + SQUARE, STAGE_C = STAGE_U + NARROW, STAGE = STAGE_C + 1024;
constexpr int STATE = DIM * SLICE * 2;

constexpr int scan_shared(int stages)
{
    return stages * STAGE + STATE + 2 * NARROW;
}

__device__ __forceinline__ void load_stage(uint32_t to, const scan_args &p, const CUtensorMap &qk, const cuda_span &span,
                                           int64_t number, int chunk, int key, int slice, uint64_t *full)
{
    int keys = p.shape.key_heads, first = span.first + chunk * CHUNK;
    if (begin_copies(full, 3 * BIG + SQUARE + NARROW + CHUNK * 4)) {
        copy_bytes<SCAN_THREADS>(to, p.W + number * BIG, BIG, full);
        copy_rows<SCAN_THREADS>(to + BIG, qk, p.qk, 2 * keys * DIM, p.rows.n, first, key * DIM, full);
        copy_rows<SCAN_THREADS>(to + 2 * BIG, qk, p.qk, 2 * keys * DIM, p.rows.n, first, (keys + key) * DIM, full);
        copy_bytes<SCAN_THREADS>(to + STAGE_M, p.M + number * SQUARE, SQUARE, full);
        copy_bytes<SCAN_THREADS>(to + STAGE_U, p.U + number * BIG + slice * NARROW, NARROW, full);
        copy_bytes<SCAN_THREADS>(to + STAGE_C, p.sums + number * CHUNK, CHUNK * 4, full);
    }
}

/* Grid: heads by slices of columns, spans. Of S a warp has 16 rows of 16 columns, of N and O 16 rows of 8. */
__global__ void __launch_bounds__(SCAN_THREADS, 1) chunk_scan(const __grid_constant__ scan_args p, const __grid_constant__ CUtensorMap qk)
{
    wait_for_previous();
    let_next_start();
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ uint64_t full[STAGES];
    constexpr int SLICES = DIM / SLICE;
    int head = blockIdx.x / SLICES, slice = blockIdx.x % SLICES, column = slice * SLICE, heads = p.shape.value_heads;
    int key = head / (heads / p.shape.key_heads);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int quarter = lane / 8, eighth = lane % 8, row0 = warp % 4 * 16, side = warp / 4, deep = warp % 8 * 16, half = warp / 8;
    cuda_span span = p.rows.spans[blockIdx.y];
    int64_t number = head;
    for (int s = 0; s < (int)blockIdx.y; s++) number += (int64_t)((p.rows.spans[s].n + CHUNK - 1) / CHUNK) * heads;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared), state = base + STAGES * STAGE, news = state + STATE;
    float *matrix = p.matrix + ((int64_t)span.slot * heads + head) * DIM * DIM + (int64_t)(deep + g) * DIM + column + half * 16 + 2 * t;
    float S[2][4]; /* rows deep + g, + 8 */
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) S[n][i] = matrix[(int64_t)(i / 2) * 8 * DIM + n * 8 + i % 2];
    int chunks = (span.n + CHUNK - 1) / CHUNK;
    if (threadIdx.x == 0) init_copies(full, STAGES);
    for (int c = 0; c < STAGES - 1; c++) {
        if (c < chunks) load_stage(base + c * STAGE, p, qk, span, number + (int64_t)c * heads, c, key, slice, full + c);
        end_copies();
    }
    __syncthreads();
    for (int c = 0; c < chunks; c++) {
        uint32_t stage = base + c % STAGES * STAGE;
        uint8_t *at = shared + c % STAGES * STAGE, *own = shared + STAGES * STAGE;
        const float *sums = (const float *)(at + STAGE_C);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                *(uint32_t *)(own + at64(deep + g + 8 * h, half * 2 + n) + 4 * t) = pair_of(S[n][2 * h], S[n][2 * h + 1]);
        int left = span.n - c * CHUNK;
        await_copies<STAGES - 2>(full + c % STAGES, c / STAGES % 2);
        __syncthreads();
        if (left < CHUNK) {
            clear_rows<SCAN_THREADS>(at + 2 * BIG, left);
            __syncthreads();
        }
        int ahead = c + STAGES - 1, slot = ahead % STAGES;
        if (ahead < chunks) load_stage(base + slot * STAGE, p, qk, span, number + (int64_t)ahead * heads, ahead, key, slice, full + slot);
        end_copies();
        float ws[2][4] = {}, o[2][4] = {}; /* of even and odd steps */
#pragma unroll
        for (int k = 0; k < DIM / 16; k += 2) {
            uint32_t b[4];
            matrices_turned(b, state + at64(k * 16 + lane, side));
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint32_t w[4], q[4], from = at256(row0 + (quarter & 1) * 8 + eighth, 2 * (k + j) + quarter / 2);
                matrices(w, stage + from);
                matrices(q, stage + BIG + from);
                mma(ws[j], w, b[2 * j], b[2 * j + 1]);
                mma(o[j], q, b[2 * j], b[2 * j + 1]);
            }
        }
        float last = sums[CHUNK - 1];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = row0 + g + 8 * h;
            float power = expf(sums[i]), rest = expf(last - sums[i]);
            uint32_t to = at64(i, side) + 4 * t;
            __nv_bfloat162 u = *(const __nv_bfloat162 *)(at + STAGE_U + to);
            float x = __bfloat162float(u.x) - (ws[0][2 * h] + ws[1][2 * h]), y = __bfloat162float(u.y) - (ws[0][2 * h + 1] + ws[1][2 * h + 1]);
            *(uint32_t *)(own + STATE + to) = pair_of(x, y);
            *(uint32_t *)(own + STATE + NARROW + to) = pair_of(x * rest, y * rest);
            for (int k = 0; k < 2; k++) o[0][2 * h + k] = (o[0][2 * h + k] + o[1][2 * h + k]) * power;
        }
        __syncthreads();
        float decay = expf(last);
#pragma unroll
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < 4; i++) S[n][i] *= decay;
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            uint32_t a[4], b[4];
            matrices_turned(a, stage + 2 * BIG + at256(k * 16 + quarter / 2 * 8 + eighth, deep / 8 + (quarter & 1)));
            matrices_turned(b, news + NARROW + at64(k * 16 + (quarter & 1) * 8 + eighth, half * 2 + quarter / 2));
            mma(S[0], a, b[0], b[1]);
            mma(S[1], a, b[2], b[3]);
        }
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k += 2) {
            uint32_t m[4], b[4];
            if (k > warp % 4) break;
            matrices_turned(b, news + at64(k * 16 + lane, side));
            matrices(m, stage + STAGE_M + at128(row0 + (quarter & 1) * 8 + eighth, 2 * k + quarter / 2));
            mma(o[0], m, b[0], b[1]);
            if (k + 1 > warp % 4) break;
            matrices(m, stage + STAGE_M + at128(row0 + (quarter & 1) * 8 + eighth, 2 * k + 2 + quarter / 2));
            mma(o[0], m, b[2], b[3]);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int i = row0 + g + 8 * h;
            if (i >= left) continue;
            float *to = p.o.data + (int64_t)(span.first + c * CHUNK + i) * p.o.stride;
            int at_column = head * DIM + column + side * 8 + 2 * t;
            if (p.narrow) {
                *(uint32_t *)((__nv_bfloat16 *)to + at_column) = pair_of(o[0][2 * h], o[0][2 * h + 1]);
            } else {
                to[at_column] = o[0][2 * h];
                to[at_column + 1] = o[0][2 * h + 1];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) matrix[(int64_t)(i / 2) * 8 * DIM + n * 8 + i % 2] = S[n][i];
}

/* ---- the same by the wide instruction, which reads S and N where they lie ---- */

/* A stage: W, Q, K, M, 64 columns of U. After the stages S, N, N e^(c_last - c) and the stages' c. */
constexpr int WIDE_SLICE = 64, WIDE_STAGES = 3, WIDE_SCANNERS = 256, WIDE_SCAN_THREADS = WIDE_SCANNERS + LANES;
constexpr int WIDE_U = STAGE_M + SQUARE, WIDE_STAGE = WIDE_U + 2 * NARROW, WIDE_STATE = WIDE_STAGES * WIDE_STAGE,
              WIDE_N = WIDE_STATE + DIM * WIDE_SLICE * 2, WIDE_REST = WIDE_N + SQUARE, WIDE_C = WIDE_REST + SQUARE,
              WIDE_SHARED = WIDE_C + WIDE_STAGES * CHUNK * 4;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
struct wide_scan_barriers {
    uint64_t full[WIDE_STAGES], empty[WIDE_STAGES];
    uint64_t state[2]; /* half of S lies in shared memory */
    uint64_t news;     /* both N do */
    uint64_t queried;  /* Q S is done */
    uint64_t added;    /* M N is */

    __device__ __forceinline__ void init()
    {
        for (int i = 0; i < WIDE_STAGES; i++) barrier_init(full + i, 1), barrier_init(empty + i, WIDE_SCANNERS / LANES);
        barrier_init(state, 4);
        barrier_init(state + 1, 4);
        barrier_init(&news, 4);
        barrier_init(&queried, 4);
        barrier_init(&added, 4);
        barriers_ready();
    }
};

/* By a warp whose stores are to be seen. */
__device__ __forceinline__ void tell(uint64_t *b)
{
    __syncwarp();
    if (threadIdx.x % LANES == 0) barrier_arrive(b);
}

/* Sixteen rows of 64 columns a warp, in BF16. */
__device__ __forceinline__ void store_wide(uint32_t to, int row, const float (&x)[8][4])
{
    int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) store_shared(to + at128(row + g + 8 * h, n) + 4 * t, (int)pair_of(x[n][2 * h], x[n][2 * h + 1]));
}

/* Rows of o from `to` on, `left` of them at most. */
__device__ __forceinline__ void store_scanned(const scan_args &p, const float (&o)[8][4], int64_t first, int row, int left, int column)
{
    int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int i = row + g + 8 * h;
        float *to = p.o.data + (first + i) * p.o.stride;
        if (p.narrow) {
            bool odd = t % 2;
            __nv_bfloat16 *at = (__nv_bfloat16 *)to + column + (odd ? 6 + 2 * t : 2 * t);
#pragma unroll
            for (int n = 0; n < 8; n += 2) { /* a lane four columns that follow one another */
                uint32_t x = pair_of(o[n][2 * h], o[n][2 * h + 1]), y = pair_of(o[n + 1][2 * h], o[n + 1][2 * h + 1]);
                uint32_t other = __shfl_xor_sync(ALL, odd ? x : y, 1);
                if (i < left) *(uint2 *)(at + n * 8) = odd ? make_uint2(other, y) : make_uint2(x, other);
            }
        } else if (i < left) {
#pragma unroll
            for (int n = 0; n < 8; n++)
                for (int k = 0; k < 2; k++) to[column + n * 8 + 2 * t + k] = o[n][2 * h + k];
        }
    }
}

/* Four warps. The first group: W S and N; the second: Q S and M N; each half of S's rows. */
template <bool SECOND>
__device__ __forceinline__ void scan_group(const scan_args &p, uint8_t *shared, wide_scan_barriers &barriers, const cuda_span &span,
                                           float (&S)[8][4], int chunks, int head_column)
{
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int quarter = lane / 8, eighth = lane % 8, row0 = warp % 4 * 16, deep = warp * 16;
    uint32_t base = shared_at(shared), state = base + WIDE_STATE, news = base + WIDE_N, rest = base + WIDE_REST;
    ring_place place = { 0, 0 };
    store_wide(state, deep, S);
    wide_show();
    tell(barriers.state + SECOND);
#pragma unroll 1
    for (int c = 0; c < chunks; c++) {
        uint32_t stage = base + place.slot * WIDE_STAGE, f[DIM / 16][4], key[CHUNK / 16][4], m[CHUNK / 16][4];
        const uint8_t *at = shared + place.slot * WIDE_STAGE;
        const float *sums = (const float *)(shared + WIDE_C) + place.slot * CHUNK;
        int left = span.n - c * CHUNK, phase = c % 2;
        float x[8][4];
        barrier_wait(barriers.full + place.slot, place.phase);
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) matrices(f[k], stage + (SECOND ? BIG : 0) + at256(row0 + (quarter & 1) * 8 + eighth, 2 * k + quarter / 2));
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[n][i] = 0;
        barrier_wait(barriers.state, phase);
        barrier_wait(barriers.state + 1, phase);
        wide_hold(x);
        wide_keep(f);
        wide_begin();
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) wide_mma_turned(x, f[k], wide_turned(state + k * 2048, 8192));
        wide_commit();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            matrices_turned(key[k], stage + 2 * BIG + at256(k * 16 + quarter / 2 * 8 + eighth, deep / 8 + (quarter & 1)));
            if (SECOND) matrices(m[k], stage + STAGE_M + at128(row0 + (quarter & 1) * 8 + eighth, 2 * k + quarter / 2));
        }
        if (left < CHUNK) { /* what follows is another span's */
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int token = k * 16 + i / 2 * 8 + 2 * t;
                    key[k][i] = token + 1 < left ? key[k][i] : token < left ? key[k][i] & 0xffff : 0;
                }
        }
        float last = sums[CHUNK - 1], decay = expf(last), sum[2] = { sums[row0 + g], sums[row0 + g + 8] };
        if constexpr (SECOND) {
            tell(barriers.empty + place.slot);
            float power[2] = { expf(sum[0]), expf(sum[1]) };
            wide_wait<0>();
            wide_hold(x);
            wide_keep(f);
            tell(&barriers.queried);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) x[n][i] *= power[i / 2];
        } else {
            uint32_t u[8][2];
            float fade[2] = { expf(last - sum[0]), expf(last - sum[1]) };
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    u[n][h] = *(const uint32_t *)(at + WIDE_U + n / 4 * NARROW + at64(row0 + g + 8 * h, n % 4) + 4 * t);
            tell(barriers.empty + place.slot);
            barrier_wait(&barriers.added, phase ^ 1);
            wide_wait<0>();
            wide_hold(x);
            wide_keep(f);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float a = __uint_as_float(u[n][h] << 16) - x[n][2 * h], b = __uint_as_float(u[n][h] & 0xffff0000u) - x[n][2 * h + 1];
                    uint32_t to = at128(row0 + g + 8 * h, n) + 4 * t;
                    store_shared(rest + to, (int)pair_of(a * fade[h], b * fade[h]));
                    store_shared(news + to, (int)pair_of(a, b));
                }
            wide_show();
            tell(&barriers.news);
        }
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) S[n][i] *= decay;
        barrier_wait(&barriers.news, phase);
        wide_hold(S);
        wide_hold(x);
        wide_keep(key);
        if (SECOND) wide_keep(m);
        wide_begin();
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) wide_mma_turned(S, key[k], wide_turned(rest + k * 2048, 8192));
        wide_commit();
        if constexpr (SECOND) {
#pragma unroll
            for (int k = 0; k < CHUNK / 16; k++) wide_mma_turned(x, m[k], wide_turned(news + k * 2048, 8192));
            wide_commit();
            wide_wait<1>();
        } else {
            barrier_wait(&barriers.queried, phase);
            wide_wait<0>();
        }
        wide_hold(S);
        wide_keep(key);
        if (c + 1 < chunks) {
            store_wide(state, deep, S);
            wide_show();
            tell(barriers.state + SECOND);
        }
        if constexpr (SECOND) {
            wide_wait<0>();
            wide_hold(x);
            wide_keep(m);
            tell(&barriers.added);
            store_scanned(p, x, span.first + c * CHUNK, row0, left, head_column);
        }
        place.advance(WIDE_STAGES);
    }
}
#endif

/* Grid: heads by slices of columns, spans. Of S and of what is added to it a warp has 16 rows; one more warp asks for what comes. */
__global__ void __launch_bounds__(WIDE_SCAN_THREADS, 1) chunk_scan_wide(const __grid_constant__ scan_args p, const __grid_constant__ CUtensorMap qk)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ wide_scan_barriers barriers;
    constexpr int SLICES = DIM / WIDE_SLICE;
    int head = blockIdx.x / SLICES, slice = blockIdx.x % SLICES, heads = p.shape.value_heads, keys = p.shape.key_heads;
    int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES, deep = warp * 16, g = lane / 4, t = lane % 4;
    if (threadIdx.x == 0) barriers.init();
    __syncthreads();
    cuda_span span = p.rows.spans[blockIdx.y];
    int chunks = (span.n + CHUNK - 1) / CHUNK;
    if (warp == WIDE_SCANNERS / LANES) {
        wait_for_previous();
        let_next_start();
        if (lane > 0) return;
        int64_t number = head;
        for (int s = 0; s < (int)blockIdx.y; s++) number += (int64_t)((p.rows.spans[s].n + CHUNK - 1) / CHUNK) * heads;
        uint32_t base = shared_at(shared);
        ring_place place = { 0, 1 };
        int key = head / (heads / keys);
#pragma unroll 1
        for (int c = 0; c < chunks; c++, number += heads) {
            uint64_t *full = barriers.full + place.slot;
            uint32_t to = base + place.slot * WIDE_STAGE;
            int first = span.first + c * CHUNK;
            barrier_wait(barriers.empty + place.slot, place.phase);
            barrier_expect(full, WIDE_STAGE + CHUNK * 4);
            copy_bulk(to, p.W + number * BIG, BIG, full);
            copy_bulk(base + WIDE_C + place.slot * CHUNK * 4, p.sums + number * CHUNK, CHUNK * 4, full);
            copy_bulk(to + WIDE_U, p.U + number * BIG + slice * 2 * NARROW, 2 * NARROW, full);
            copy_rows<LANES>(to + 2 * BIG, qk, p.qk, 2 * keys * DIM, p.rows.n, first, (keys + key) * DIM, full);
            copy_rows<LANES>(to + BIG, qk, p.qk, 2 * keys * DIM, p.rows.n, first, key * DIM, full);
            copy_bulk(to + STAGE_M, p.M + number * SQUARE, SQUARE, full);
            place.advance(WIDE_STAGES);
        }
        return;
    }
    float *matrix = p.matrix + ((int64_t)span.slot * heads + head) * DIM * DIM + (int64_t)(deep + g) * DIM + slice * WIDE_SLICE + 2 * t;
    float S[8][4]; /* rows deep + g, + 8; of the step before */
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            float2 v = __ldcg((const float2 *)(matrix + (int64_t)(i / 2) * 8 * DIM + n * 8));
            S[n][i] = v.x, S[n][i + 1] = v.y;
        }
    wait_for_previous();
    let_next_start();
    if (warp < 4)
        scan_group<false>(p, shared, barriers, span, S, chunks, head * DIM + slice * WIDE_SLICE);
    else
        scan_group<true>(p, shared, barriers, span, S, chunks, head * DIM + slice * WIDE_SLICE);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) matrix[(int64_t)(i / 2) * 8 * DIM + n * 8 + i % 2] = S[n][i];
#endif
}

/* The next `bytes` of scratch. */
template <class P> void place(P *&p, uint8_t *&at, int64_t count)
{
    p = (P *)at;
    at += (count * (int64_t)sizeof(P) + 127) / 128 * 128;
}

} /* namespace */

bool cuda_scan(struct queue *q, const struct delta_run *r, const struct step_rows *step, bool narrow)
{
    const delta_shape *s = r->shape;
    int64_t chunks = 0;
    int shared = scan_shared(q->has_pdl ? 3 : 2);
    bool many = step->prompts || (step->n > ROWS_EXACT && step->n >= 16 * step->n_spans);
    if (!q->rounded || !many || step->n > q->prefill.rows || s->key_dim != DIM || s->value_dim != DIM || s->kernel != TAPS ||
        shared + 1024 > q->shared_max)
        return false;
    for (int64_t i = 0; i < step->n_spans; i++) chunks += (step->spans[i].n + CHUNK - 1) / CHUNK;
    scan_args p = {};
    uint8_t *at = (uint8_t *)q->prefill.down;
    int64_t heads = s->value_heads;
    place(p.qk, at, step->n * 2 * s->key_heads * DIM);
    place(p.v, at, step->n * heads * DIM);
    place(p.U, at, chunks * heads * BIG);
    place(p.W, at, chunks * heads * BIG);
    place(p.M, at, chunks * heads * SQUARE);
    place(p.sums, at, chunks * heads * CHUNK);
    if (at - (uint8_t *)q->prefill.down > q->room) return false;
    CUtensorMap qk = {}, v = {};
    int64_t keys = 2 * s->key_heads * DIM, values = heads * DIM;
    if (q->has_pdl && (!tensor_map(q->map_maker, &qk, p.qk, step->n, keys, keys, CHUNK) || !tensor_map(q->map_maker, &v, p.v, step->n, values, values, CHUNK))) return false;
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return true;
    p.u = r->u;
    p.a = r->a;
    p.b = r->b;
    p.o = r->raw;
    p.narrow = narrow;
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
    if (q->has_wide && n * heads < 6 * q->sms)
        launch<2 * DIM>(q, "delta", true, chunk_parts<2 * DIM>, dim3(n, (unsigned)heads), PARTS_SHARED, p, qk, v);
    else
        launch<DIM>(q, "delta", true, chunk_parts<DIM>, dim3(n, (unsigned)heads), PARTS_SHARED, p, qk, v);
    if (q->has_wide && WIDE_SHARED + 1024 + (int)sizeof(uint64_t) * 16 <= q->shared_max)
        launch<WIDE_SCAN_THREADS>(q, "delta", true, chunk_scan_wide, dim3((unsigned)(heads * (DIM / WIDE_SLICE)), (unsigned)step->n_spans), WIDE_SHARED, p, qk);
    else
        launch<SCAN_THREADS>(q, "delta", true, chunk_scan, dim3((unsigned)(heads * (DIM / SLICE)), (unsigned)step->n_spans), (size_t)shared, p, qk);
    return true;
}
