/* Attention: norms and rotation of heads, the KV cache, and each row over its sequence. A block takes one
 * part of a row's tokens for one kv head: its warps read each key and value once for up to eight query heads
 * and keep running maximum, sum and values. BF16 heads of 256 go through the tensor cores, 16 tokens a warp at
 * a time (attention_tiles.cuh); others four heads a warp, token by token. The block that is done last puts the
 * parts of a row together, in their order. A part is at least PART tokens, and how many there are depends on
 * the row's own length only. */
#include "backend/cuda/attention_tiles.cuh"

namespace {

constexpr int PART = 64, HEADS = 4, EACH = HEAD_MAX / LANES, BATCH = 2;

__device__ int part_length(int tokens, int splits)
{
    int each = (tokens + splits - 1) / splits;
    each = (each + 15) / 16 * 16;
    return splits == 1 ? tokens : each < PART ? PART : each;
}

/* A head by a warp, and its norm into `out`, which may be where it came from. */
struct head_values {
    float v[EACH];

    __device__ __forceinline__ void load(const float *x, int dim)
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int d = threadIdx.x % LANES + i * LANES;
            v[i] = d < dim ? __ldcg(x + d) : 0;
        }
    }

    __device__ __forceinline__ void store(float *out, int dim, const float *gain, float eps) const
    {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) sum = fmaf(v[i], v[i], sum);
        float scale = gain ? 1.0f / sqrtf(warp_sum(sum) / (float)dim + eps) : 1;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int d = threadIdx.x % LANES + i * LANES;
            if (d < dim) out[d] = gain ? v[i] * scale * gain[d] : v[i];
        }
        __syncwarp();
    }
};

/* Cosine and sine of pair j at a position. */
__device__ __forceinline__ float2 rope_turn(const rope &rope, const int position[3], int j)
{
    float angle = (float)position[rope.axis[j]] * rope.inverse[j];
    return make_float2(cosf(angle), sinf(angle));
}

__device__ __forceinline__ void turn_pair(float *head, int n, int j, float2 turn)
{
    float a = head[j], b = head[j + n];
    head[j] = a * turn.x - b * turn.y;
    head[j + n] = b * turn.x + a * turn.y;
}

/* A warp a head; grid: heads, rows. */
__global__ void norm_rope_heads(mat x, int n_heads, int head_stride, int dim, const float *gain, float eps, rope rope,
                                cuda_rows rows)
{
    int head = blockIdx.x * WARPS + threadIdx.x / LANES;
    if (head >= n_heads) return;
    float *at = x.data + blockIdx.y * x.stride + (int64_t)head * head_stride;
    head_values values;
    values.load(at, dim);
    values.store(at, dim, gain, eps);
    for (int j = threadIdx.x % LANES; j < rope.n; j += LANES)
        turn_pair(at, rope.n, j, rope_turn(rope, rows.rows[blockIdx.y].position, j));
}

__device__ int64_t kv_line(const kv_cache &kv, const cuda_rows &rows, int span, int token)
{
    int page = rows.pages[(int64_t)span * rows.pages_each + token / KV_PAGE];
    return ((int64_t)page * KV_PAGE + token % KV_PAGE) * kv.n_kv_heads * kv.head_dim;
}

__device__ void kv_store(void *to, int dtype, int64_t at, float x)
{
    if (dtype == KV_F32)
        ((float *)to)[at] = x;
    else if (dtype == KV_BF16)
        ((__nv_bfloat16 *)to)[at] = __float2bfloat16_rn(x);
    else
        ((uint8_t *)to)[at] = e4m3_code(x);
}

__global__ void kv_append_rows(kv_cache kv, mat k, mat v, cuda_rows rows)
{
    int64_t row = blockIdx.y, c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int span = rows.rows[row].span;
    if (c >= k.cols) return;
    int64_t line = kv_line(kv, rows, span, rows.spans[span].past + (int)row - rows.spans[span].first);
    kv_store(kv.keys, kv.dtype, line + c, k.data[row * k.stride + c]);
    kv_store(kv.values, kv.dtype, line + c, v.data[row * v.stride + c]);
}

struct attention_args {
    mat qg, k, v;
    int n_heads, splits, row0; /* row0: the first block's */
    kv_cache kv;
    cuda_rows rows;
    float *parts;      /* [rows][n_heads][splits][dim + 2]: values, maximum, sum */
    unsigned *arrived; /* [rows][n_kv_heads]: parts that are done; 0 again when all are */
    mat y;
    /* decode: norm, rotate and append here; q_gain NULL: done before */
    const float *q_gain, *k_gain;
    float eps;
    rope rope;
};

/* This lane's share of one key or value. WIDE: 8 consecutive of 256, else every 32nd. */
template <int DTYPE, bool WIDE> __device__ void load_head(float (&out)[EACH], const void *from, int64_t at, int dim)
{
    int lane = threadIdx.x % LANES;
    if (WIDE && DTYPE == KV_BF16) {
        uint4 w = *(const uint4 *)((const __nv_bfloat16 *)from + at + lane * EACH);
        uint32_t u[4] = { w.x, w.y, w.z, w.w };
        for (int i = 0; i < 4; i++) {
            out[2 * i] = __uint_as_float(u[i] << 16);
            out[2 * i + 1] = __uint_as_float(u[i] & 0xffff0000u);
        }
    } else if (WIDE && DTYPE == KV_FP8) {
        uint2 w = *(const uint2 *)((const uint8_t *)from + at + lane * EACH);
        for (int i = 0; i < 4; i++) {
            out[i] = e4m3_value((uint8_t)(w.x >> 8 * i));
            out[4 + i] = e4m3_value((uint8_t)(w.y >> 8 * i));
        }
    } else {
        for (int i = 0; i < EACH; i++) {
            int d = WIDE ? lane * EACH + i : lane + LANES * i;
            out[i] = 0;
            if (d >= dim) continue;
            if (DTYPE == KV_F32)
                out[i] = ((const float *)from)[at + d];
            else if (DTYPE == KV_BF16)
                out[i] = __bfloat162float(((const __nv_bfloat16 *)from)[at + d]);
            else
                out[i] = e4m3_value(((const uint8_t *)from)[at + d]);
        }
    }
}

/* Of one query head over the tokens seen so far, this lane's share of the values. */
struct running {
    float top, sum, value[EACH];
};

__device__ void see(running &r, float score, const float (&v)[EACH])
{
    float top = fmaxf(r.top, score), keep = expf(r.top - top), p = expf(score - top);
    r.top = top;
    r.sum = fmaf(r.sum, keep, p);
    for (int i = 0; i < EACH; i++) r.value[i] = fmaf(p, v[i], r.value[i] * keep);
}

/* Tokens begin + w, begin + w + step, ... below end, for heads [head, head + n). */
template <int DTYPE, bool WIDE>
__device__ void attend(running (&r)[HEADS], const float *queries, int n, const attention_args &a, int span, int kv_head,
                       int begin, int end, int step)
{
    int dim = a.kv.head_dim, lane = threadIdx.x % LANES;
    float q[HEADS][EACH], scale = 1.0f / sqrtf((float)dim);
    for (int h = 0; h < HEADS; h++) {
        r[h].top = -INFINITY;
        r[h].sum = 0;
        for (int i = 0; i < EACH; i++) {
            int d = WIDE ? lane * EACH + i : lane + LANES * i;
            q[h][i] = h < n && d < dim ? queries[h * dim + d] : 0;
            r[h].value[i] = 0;
        }
    }
    for (int token = begin; token < end; token += step * BATCH) {
        float k[BATCH][EACH], v[BATCH][EACH];
        for (int b = 0; b < BATCH; b++) {
            int at = token + b * step < end ? token + b * step : token;
            int64_t line = kv_line(a.kv, a.rows, span, at) + (int64_t)kv_head * dim;
            load_head<DTYPE, WIDE>(k[b], a.kv.keys, line, dim);
            load_head<DTYPE, WIDE>(v[b], a.kv.values, line, dim);
        }
        for (int b = 0; b < BATCH; b++) {
            if (token + b * step >= end) break;
            for (int h = 0; h < HEADS; h++) {
                float dot = 0;
                for (int i = 0; i < EACH; i++) dot = fmaf(q[h][i], k[b][i], dot);
                see(r[h], warp_sum(dot) * scale, v[b]);
            }
        }
    }
}

__device__ __forceinline__ float gate_of(const attention_args &a, int64_t row, int head, int d)
{
    return __ldcg(a.qg.data + row * a.qg.stride + (int64_t)(2 * head + 1) * a.kv.head_dim + d);
}

/* A value of a head put together, and gated. */
__device__ __forceinline__ void put_out(const attention_args &a, int64_t row, int head, int d, float x, float total, float gate)
{
    a.y.data[row * a.y.stride + (int64_t)head * a.kv.head_dim + d] = x / total * sigmoid(gate);
}

/* Where warps leave their running values: [warp][N heads][dim values, maximum, sum]. */
template <int N>
__device__ __forceinline__ float *meeting_at(float *meeting, int warp, int head, int dim)
{
    return meeting + (warp * N + head) * (dim + 2);
}

template <bool WIDE>
__device__ __forceinline__ void leave(const running (&r)[HEADS], float *meeting, int n, int dim)
{
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float *to = meeting_at<HEADS>(meeting, warp, h, dim);
        if (h >= n) continue;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int d = WIDE ? lane * EACH + i : lane + LANES * i;
            if (d < dim) to[d] = r[h].value[i];
        }
        if (lane == 0) to[dim] = r[h].top, to[dim + 1] = r[h].sum;
    }
}

/* What warps [first, first + warps) have left of n heads from `head` on, put together in their order by these
 * warps. The only part of a row is its whole. */
template <int N>
__device__ __forceinline__ void join_warps(const attention_args &a, float *meeting, int64_t row, int head, int n, int first,
                                           int warps, bool only)
{
    int dim = a.kv.head_dim, lane = threadIdx.x % LANES, step = N * (dim + 2);
#pragma unroll 1
    for (int h = threadIdx.x / LANES - first; h < n; h += warps) {
        const float *from = meeting_at<N>(meeting, first, h, dim);
        float top = -INFINITY, sum = 0, share[WARPS], x[EACH], gate[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int d = lane + i * LANES;
            gate[i] = only && d < dim ? gate_of(a, row, head + h, d) : 0;
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            if (w < warps) top = fmaxf(top, from[w * step + dim]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            share[w] = w < warps ? expf(from[w * step + dim] - top) : 0;
            if (w < warps) sum += from[w * step + dim + 1] * share[w];
        }
        float *out = a.parts + ((row * a.n_heads + head + h) * a.splits + blockIdx.x) * (dim + 2);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            x[i] = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                if (w < warps && lane + i * LANES < dim) x[i] += from[w * step + lane + i * LANES] * share[w];
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int d = lane + i * LANES;
            if (d >= dim) continue;
            if (only)
                put_out(a, row, head + h, d, x[i], sum, gate[i]);
            else
                out[d] = x[i];
        }
        if (!only && lane == 0) out[dim] = top, out[dim + 1] = sum;
    }
}

/* The parts of a kv head's query heads, a warp a head; share: room for a warp's. */
__device__ __forceinline__ void join_parts(const attention_args &a, int64_t row, int first_head, int group, int parts,
                                           float *share)
{
    int dim = a.kv.head_dim, size = dim + 2, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    share += warp * SPLITS;
#pragma unroll 1
    for (int h = warp; h < group; h += WARPS) {
        const float *from = a.parts + (row * a.n_heads + first_head + h) * a.splits * size;
        float top = -INFINITY, sum = 0;
        for (int s = lane; s < parts; s += LANES) top = fmaxf(top, __ldcg(from + s * size + dim));
        top = warp_max(top);
        for (int s = lane; s < parts; s += LANES) {
            share[s] = expf(__ldcg(from + s * size + dim) - top);
            sum += share[s] * __ldcg(from + s * size + dim + 1);
        }
        sum = warp_sum(sum);
        __syncwarp();
        float x[EACH] = {}, gate[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            gate[i] = lane + i * LANES < dim ? gate_of(a, row, first_head + h, lane + i * LANES) : 0;
#pragma unroll 4
        for (int s = 0; s < parts; s++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (lane + i * LANES < dim) x[i] = fmaf(__ldcg(from + s * size + lane + i * LANES), share[s], x[i]);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane + i * LANES < dim) put_out(a, row, first_head + h, lane + i * LANES, x[i], sum, gate[i]);
        __syncwarp();
    }
}

/* Whether this block is the last of its row and kv head to be done with its part. */
__device__ __forceinline__ bool is_last(const attention_args &a, int64_t row, int parts)
{
    __shared__ bool last;
    unsigned *arrived = a.arrived + row * a.kv.n_kv_heads + blockIdx.y;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1u) == (unsigned)parts - 1;
        if (last) *arrived = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

/* Queries of a kv head, and its own key behind them, into shared memory: normed and rotated where that has not been done. */
__device__ __forceinline__ void place_heads(const attention_args &a, float *queries, const float2 *turns, const float *k,
                                            int64_t row, int kv_head, int group, bool owner)
{
    constexpr int AT_ONCE = 2;
    int dim = a.kv.head_dim;
#pragma unroll 1
    for (int h = threadIdx.x / LANES; h < group + owner; h += AT_ONCE * WARPS) {
        head_values values[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int head = h + i * WARPS;
            if (head < group + owner)
                values[i].load(head == group ? k : a.qg.data + row * a.qg.stride + (int64_t)(kv_head * group + head) * 2 * dim,
                               dim);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int head = h + i * WARPS;
            float *to = queries + head * dim;
            if (head >= group + owner) continue;
            values[i].store(to, dim, head == group ? a.k_gain : a.q_gain, a.eps);
            for (int j = threadIdx.x % LANES; a.q_gain && j < a.rope.n; j += LANES) turn_pair(to, a.rope.n, j, turns[j]);
        }
    }
}

/* Grid: parts, kv heads, rows. Shared memory: queries [heads of the kv head][dim], own key [dim], turns
 * [rope.n][2] (room for dim), then what warps leave, or before that what attention_tiles.cuh wants. */
template <int DTYPE, bool WIDE>
__global__ void __launch_bounds__(THREADS, 2) attention_parts(const __grid_constant__ attention_args a)
{
    extern __shared__ __align__(128) float shared_f[];
    int dim = a.kv.head_dim, group = a.n_heads / a.kv.n_kv_heads, kv_head = blockIdx.y, warp = threadIdx.x / LANES;
    int64_t row = a.row0 + blockIdx.z;
    float *queries = shared_f, *own = queries + group * dim, *meeting = own + 2 * dim;
    float2 *turns = (float2 *)(own + dim);
    let_next_start();
    int span = a.rows.rows[row].span, token = a.rows.spans[span].past + (int)row - a.rows.spans[span].first;
    int length = part_length(token + 1, a.splits), begin = blockIdx.x * length, parts = (token + length) / length;
    int end = begin + length < token + 1 ? begin + length : token + 1;
    bool owner = a.q_gain && end == token + 1; /* of the row's own key and value */
    if (begin >= end) return;
    for (int j = threadIdx.x; a.q_gain && j < a.rope.n; j += THREADS)
        turns[j] = rope_turn(a.rope, a.rows.rows[row].position, j);
    __syncthreads();
    int64_t line = kv_line(a.kv, a.rows, span, token) + (int64_t)kv_head * dim;
    const float *k = a.k.data + row * a.k.stride + (int64_t)kv_head * dim;
    const float *v = a.v.data + row * a.v.stride + (int64_t)kv_head * dim;
    bool mine = owner && (int)threadIdx.x < dim;
    wait_for_previous();
    float value = mine ? __ldcg(v + threadIdx.x) : 0;
    place_heads(a, queries, turns, k, row, kv_head, group, owner);
    __syncthreads();
    if (mine) {
        kv_store(a.kv.keys, a.kv.dtype, line + threadIdx.x, own[threadIdx.x]);
        kv_store(a.kv.values, a.kv.dtype, line + threadIdx.x, value);
    }
    if (owner) __syncthreads();
    if constexpr (DTYPE == KV_BF16 && WIDE) {
#pragma unroll 1
        for (int head = 0; head < group; head += TILE_HEADS) {
            int n = group - head < TILE_HEADS ? group - head : TILE_HEADS;
            const kv_tiles from = { (const __nv_bfloat16 *)a.kv.keys, (const __nv_bfloat16 *)a.kv.values,
                                    a.rows.pages + (int64_t)span * a.rows.pages_each, a.kv.n_kv_heads, kv_head };
            tile_running r;
            attend_tiles(r, (uint8_t *)meeting, queries + head * dim, n, from, begin, end);
            __syncthreads();
            r.leave(meeting);
            __syncthreads();
            join_warps<TILE_HEADS>(a, meeting, row, kv_head * group + head, n, 0, WARPS, parts == 1);
            __syncthreads();
        }
    } else {
#pragma unroll 1
        for (int head = 0; head < group; head += 2 * HEADS) {
            int sides = group - head > HEADS ? 2 : 1, warps = WARPS / sides, side = warp / warps;
            int mine = head + side * HEADS, n = group - mine < HEADS ? group - mine : HEADS;
            running r[HEADS];
            attend<DTYPE, WIDE>(r, queries + mine * dim, n, a, span, kv_head, begin + warp % warps, end, warps);
            leave<WIDE>(r, meeting, n, dim);
            __syncthreads();
            join_warps<HEADS>(a, meeting, row, kv_head * group + mine, n, side * warps, warps, parts == 1);
            __syncthreads();
        }
    }
    if (parts > 1 && is_last(a, row, parts)) join_parts(a, row, kv_head * group, group, parts, meeting);
}

template <int DTYPE> void start(struct queue *q, const attention_args &a, dim3 grid, size_t shared)
{
    bool wide = a.kv.head_dim == HEAD_MAX, one = grid.z == 1 && grid.x * grid.y <= (unsigned)q->sms;
    launch_side<THREADS>(q, "attention", one ? RIGHT : ALONE,
                         wide ? attention_parts<DTYPE, true> : attention_parts<DTYPE, false>, grid, shared, a);
}

void run(struct queue *q, mat y, attention_args a, int64_t n)
{
    int group = a.n_heads / a.kv.n_kv_heads, dim = a.kv.head_dim;
    size_t shared = (size_t)((group + 2) * dim + WARPS * HEADS * (dim + 2)) * sizeof(float);
    if (a.kv.dtype == KV_BF16 && dim == HEAD_MAX) shared = (size_t)(group + 2) * dim * sizeof(float) + TILES_SHARED;
    a.splits = queue_few(q, a.rows.n) ? SPLITS : 1;
    a.parts = q->attended;
    a.arrived = q->arrived;
    a.y = y;
    dim3 grid((unsigned)a.splits, (unsigned)a.kv.n_kv_heads, (unsigned)n);
    if (dim > HEAD_MAX || a.kv.n_kv_heads > KV_HEADS_MAX || shared > (size_t)q->shared_max) {
        queue_refuse(q, "attention", "heads wider than 256, or so many, are not supported on a GPU");
        return;
    }
    if (a.kv.dtype == KV_F32)
        start<KV_F32>(q, a, grid, shared);
    else if (a.kv.dtype == KV_BF16)
        start<KV_BF16>(q, a, grid, shared);
    else
        start<KV_FP8>(q, a, grid, shared);
}

} /* namespace */

void cuda_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim, const float *gain, float eps,
                    const struct rope *rope, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (head_dim > HEAD_MAX)
        queue_refuse(q, "norm_rope", "heads wider than 256 are not supported on a GPU");
    else if (rows)
        launch(q, "norm_rope", false, norm_rope_heads, dim3(blocks(n_heads, WARPS), (unsigned)x.rows), 0, x, n_heads,
               head_stride, head_dim, gain, eps, *rope, *rows);
}

void cuda_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (rows) launch(q, "kv_append", false, kv_append_rows, dim3(blocks(k.cols), (unsigned)step->n), 0, *kv, k, v, *rows);
}

void cuda_attention_rows(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                         const struct cuda_rows *rows, int64_t first, int64_t n)
{
    attention_args a = {};
    a.qg = qg;
    a.n_heads = n_heads;
    a.row0 = (int)first;
    a.kv = *kv;
    a.rows = *rows;
    run(q, y, a, n);
}

void cuda_attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                    const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (rows) cuda_attention_rows(q, y, qg, n_heads, kv, rows, 0, step->n);
}

void cuda_attention_decode(struct queue *q, const struct attention_run *r, const struct cuda_rows *rows)
{
    attention_args a = {};
    a.qg = r->qg;
    a.k = r->k;
    a.v = r->v;
    a.n_heads = r->n_heads;
    a.kv = *r->kv;
    a.rows = *rows;
    a.q_gain = r->q_gain;
    a.k_gain = r->k_gain;
    a.eps = r->eps;
    a.rope = *r->rope;
    run(q, r->att, a, rows->n);
}
