/* Attention: norms and rotation of heads, the KV cache, and each row over its sequence. A block takes one part of a
 * row's tokens for one kv head: its warps read each key and value once for up to eight query heads, four heads a warp,
 * and keep running maximum, sum and values. The parts of a row are put together by a second kernel. A part is at least
 * PART tokens, and how many there are depends on the row's own length only. */
#include "backend/cuda/device.cuh"

namespace {

constexpr int PART = 64, HEADS = 4, EACH = HEAD_MAX / LANES, BATCH = 2;

__device__ int part_length(int tokens, int splits)
{
    int each = (tokens + splits - 1) / splits;
    each = (each + 15) / 16 * 16;
    return splits == 1 ? tokens : each < PART ? PART : each;
}

/* Norm and rotation of one head by a warp; `out` may be `x`. */
__device__ void norm_rope_head(float *out, const float *x, int dim, const float *gain, float eps, const rope &rope,
                               const int position[3])
{
    int lane = threadIdx.x % LANES;
    float scale = warp_inverse_rms(x, dim, eps);
    for (int d = lane; d < dim; d += LANES) out[d] = __ldcg(x + d) * scale * gain[d];
    __syncwarp();
    for (int j = lane; j < rope.n; j += LANES) {
        float angle = (float)position[rope.axis[j]] * rope.inverse[j], c = cosf(angle), s = sinf(angle);
        float a = out[j], b = out[j + rope.n];
        out[j] = a * c - b * s;
        out[j + rope.n] = b * c + a * s;
    }
    __syncwarp();
}

/* A warp a head; grid: heads, rows. */
__global__ void norm_rope_heads(mat x, int n_heads, int head_stride, int dim, const float *gain, float eps, rope rope,
                                cuda_rows rows)
{
    int head = blockIdx.x * WARPS + threadIdx.x / LANES;
    if (head >= n_heads) return;
    float *at = x.data + blockIdx.y * x.stride + (int64_t)head * head_stride;
    norm_rope_head(at, at, dim, gain, eps, rope, rows.rows[blockIdx.y].position);
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
    int n_heads, splits;
    kv_cache kv;
    cuda_rows rows;
    float *parts; /* [rows][n_heads][splits][dim + 2]: values, maximum, sum */
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

/* The row's own key and value into the cache, by the block whose part they end. */
__device__ void append_own(const attention_args &a, int64_t row, int span, int token, int kv_head, float *scratch)
{
    int dim = a.kv.head_dim;
    int64_t line = kv_line(a.kv, a.rows, span, token) + (int64_t)kv_head * dim;
    if (threadIdx.x < LANES)
        norm_rope_head(scratch, a.k.data + row * a.k.stride + (int64_t)kv_head * dim, dim, a.k_gain, a.eps, a.rope,
                       a.rows.rows[row].position);
    __syncthreads();
    for (int d = threadIdx.x; d < dim; d += THREADS) {
        kv_store(a.kv.keys, a.kv.dtype, line + d, scratch[d]);
        kv_store(a.kv.values, a.kv.dtype, line + d, __ldcg(a.v.data + row * a.v.stride + (int64_t)kv_head * dim + d));
    }
    __syncthreads();
}

/* Running values of all warps of a head group put together in order, by the threads of the group's first warps. */
__device__ void store_parts(const attention_args &a, const running (&r)[HEADS], float *meeting, int64_t row, int split,
                            int head, int n, int group, int warps, bool wide)
{
    int dim = a.kv.head_dim, lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, size = dim + 2;
    for (int h = 0; h < n; h++) {
        float *to = meeting + (warp * HEADS + h) * size;
        for (int i = 0; i < EACH; i++) {
            int d = wide ? lane * EACH + i : lane + LANES * i;
            if (d < dim) to[d] = r[h].value[i];
        }
        if (lane == 0) to[dim] = r[h].top, to[dim + 1] = r[h].sum;
    }
    __syncthreads();
    for (int h = warp % warps; h < n; h += warps) {
        const float *from = meeting + (group * warps * HEADS + h) * size;
        float *out = a.parts + ((row * a.n_heads + head + h) * a.splits + split) * size, top = -INFINITY, sum = 0;
        for (int w = 0; w < warps; w++) top = fmaxf(top, from[w * HEADS * size + dim]);
        for (int w = 0; w < warps; w++) sum += from[w * HEADS * size + dim + 1] * expf(from[w * HEADS * size + dim] - top);
        for (int d = lane; d < dim; d += LANES) {
            float x = 0;
            for (int w = 0; w < warps; w++) x += from[w * HEADS * size + d] * expf(from[w * HEADS * size + dim] - top);
            out[d] = x;
        }
        if (lane == 0) out[dim] = top, out[dim + 1] = sum;
    }
    __syncthreads();
}

/* Grid: parts, kv heads, rows. Shared memory: queries [heads of the kv head][dim], own key [dim], meeting
 * [warps][HEADS][dim + 2]. */
template <int DTYPE, bool WIDE>
__global__ void __launch_bounds__(THREADS) attention_parts(const __grid_constant__ attention_args a)
{
    extern __shared__ float shared_f[];
    int dim = a.kv.head_dim, group = a.n_heads / a.kv.n_kv_heads, kv_head = blockIdx.y, warp = threadIdx.x / LANES;
    int64_t row = blockIdx.z;
    float *queries = shared_f, *own = queries + group * dim, *meeting = own + dim;
    let_next_start();
    int span = a.rows.rows[row].span, token = a.rows.spans[span].past + (int)row - a.rows.spans[span].first;
    int length = part_length(token + 1, a.splits), begin = blockIdx.x * length;
    int end = begin + length < token + 1 ? begin + length : token + 1;
    if (begin >= end) return;
    wait_for_previous();
    for (int h = warp; h < group; h += WARPS) {
        const float *from = a.qg.data + row * a.qg.stride + (int64_t)(kv_head * group + h) * 2 * dim;
        if (a.q_gain)
            norm_rope_head(queries + h * dim, from, dim, a.q_gain, a.eps, a.rope, a.rows.rows[row].position);
        else
            for (int d = threadIdx.x % LANES; d < dim; d += LANES) queries[h * dim + d] = __ldcg(from + d);
    }
    if (a.q_gain && end == token + 1) append_own(a, row, span, token, kv_head, own);
    __syncthreads();
    for (int head = 0; head < group; head += 2 * HEADS) {
        int sides = group - head > HEADS ? 2 : 1, warps = WARPS / sides, side = warp / warps;
        int mine = head + side * HEADS, n = group - mine < HEADS ? group - mine : HEADS;
        running r[HEADS];
        attend<DTYPE, WIDE>(r, queries + mine * dim, n, a, span, kv_head, begin + warp % warps, end, warps);
        store_parts(a, r, meeting, row, blockIdx.x, kv_head * group + mine, n, side, warps, WIDE);
    }
}

/* Grid: heads, rows. */
__global__ void attention_whole(mat y, const __grid_constant__ attention_args a)
{
    __shared__ float share[SPLITS], total;
    int dim = a.kv.head_dim, head = blockIdx.x, size = dim + 2;
    int64_t row = blockIdx.y;
    let_next_start();
    int span = a.rows.rows[row].span, token = a.rows.spans[span].past + (int)row - a.rows.spans[span].first;
    int length = part_length(token + 1, a.splits), parts = (token + length) / length;
    wait_for_previous();
    const float *from = a.parts + (row * a.n_heads + head) * a.splits * size;
    if (threadIdx.x < LANES) {
        float top = -INFINITY, sum = 0;
        for (int s = threadIdx.x; s < parts; s += LANES) top = fmaxf(top, __ldcg(from + s * size + dim));
        top = warp_max(top);
        for (int s = threadIdx.x; s < parts; s += LANES) {
            share[s] = expf(__ldcg(from + s * size + dim) - top);
            sum += share[s] * __ldcg(from + s * size + dim + 1);
        }
        sum = warp_sum(sum);
        if (threadIdx.x == 0) total = sum;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < dim; d += THREADS) {
        float x = 0;
        for (int s = 0; s < parts; s++) x = fmaf(__ldcg(from + s * size + d), share[s], x);
        float gate = __ldcg(a.qg.data + row * a.qg.stride + (int64_t)head * 2 * dim + dim + d);
        y.data[row * y.stride + (int64_t)head * dim + d] = x / total * sigmoid(gate);
    }
}

template <int DTYPE> void start(struct queue *q, const attention_args &a, dim3 grid, size_t shared)
{
    if (a.kv.head_dim == HEAD_MAX)
        launch(q, "attention", true, attention_parts<DTYPE, true>, grid, shared, a);
    else
        launch(q, "attention", true, attention_parts<DTYPE, false>, grid, shared, a);
}

void run(struct queue *q, mat y, attention_args a, int64_t n)
{
    int group = a.n_heads / a.kv.n_kv_heads, dim = a.kv.head_dim;
    size_t shared = (size_t)((group + 1) * dim + WARPS * HEADS * (dim + 2)) * sizeof(float);
    a.splits = n <= ROWS_EXACT ? SPLITS : 1;
    a.parts = q->attended;
    dim3 grid((unsigned)a.splits, (unsigned)a.kv.n_kv_heads, (unsigned)n);
    if (dim > HEAD_MAX || shared > (size_t)q->shared_max) {
        queue_refuse(q, "attention", "heads wider than 256, or so many for a kv head, are not supported on a GPU");
        return;
    }
    if (a.kv.dtype == KV_F32)
        start<KV_F32>(q, a, grid, shared);
    else if (a.kv.dtype == KV_BF16)
        start<KV_BF16>(q, a, grid, shared);
    else
        start<KV_FP8>(q, a, grid, shared);
    launch(q, "attention", true, attention_whole, dim3((unsigned)a.n_heads, (unsigned)n), 0, y, a);
}

} /* namespace */

void cuda_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim, const float *gain,
                    float eps, const struct rope *rope, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (rows)
        launch(q, "norm_rope", false, norm_rope_heads, dim3(blocks(n_heads, WARPS), (unsigned)x.rows), 0, x, n_heads,
               head_stride, head_dim, gain, eps, *rope, *rows);
}

void cuda_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                    const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (rows)
        launch(q, "kv_append", false, kv_append_rows, dim3(blocks(k.cols), (unsigned)step->n), 0, *kv, k, v, *rows);
}

void cuda_attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                    const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    attention_args a = {};
    if (!rows) return;
    a.qg = qg;
    a.n_heads = n_heads;
    a.kv = *kv;
    a.rows = *rows;
    run(q, y, a, step->n);
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
