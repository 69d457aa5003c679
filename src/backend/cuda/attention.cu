/* Attention: norms and rotation of heads, the KV cache, and each row over its sequence. A block takes one part of a row's
 * tokens for one kv head. Heads of 256 go through the tensor cores, 16 tokens a warp at a time (attention_tiles.cuh);
 * others four heads a warp, token by token. Parts are put together in their order: of one row by all of its blocks, which
 * meet, a few columns each; of several by the block that is done last. What a part is depends on the row's own length only. */
#include "backend/cuda/attention_tiles.cuh"

namespace {

constexpr int ALONE_MAX = 8, PART = 4, HEADS = 4, EACH = HEAD_MAX / LANES, BATCH = 2; /* tiles of the only part; of several */

/* A block's part of a row: tiles of 16 tokens [first, last) of `parts` parts that differ by a tile at most. */
struct row_part {
    int token, parts, first, last;

    __device__ __forceinline__ row_part(int of_row, int splits) : token(of_row)
    {
        int tiles = token / TILE_TOKENS + 1;
        parts = tiles <= ALONE_MAX ? 1 : (tiles + PART - 1) / PART;
        parts = parts < splits ? parts : splits;
        first = parts == 1 ? 0 : (int)((unsigned)tiles * blockIdx.x / (unsigned)parts);
        last = parts == 1 ? tiles : (int)((unsigned)tiles * (blockIdx.x + 1) / (unsigned)parts);
    }

    __device__ __forceinline__ bool is_any() const
    {
        return (int)blockIdx.x < parts;
    }

    __device__ __forceinline__ bool has_end() const
    {
        return (int)blockIdx.x == parts - 1;
    }

    __device__ __forceinline__ int end() const
    {
        return has_end() ? token + 1 : last * TILE_TOKENS;
    }
};

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

    __device__ __forceinline__ float scale(int dim, float eps) const
    {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) sum = fmaf(v[i], v[i], sum);
        return 1.0f / sqrtf(warp_sum(sum) / (float)dim + eps);
    }

    __device__ __forceinline__ void store(float *out, int dim, const float *gain, float eps) const
    {
        float by = gain ? scale(dim, eps) : 1;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int d = threadIdx.x % LANES + i * LANES;
            if (d < dim) out[d] = gain ? v[i] * by * gain[d] : v[i];
        }
        __syncwarp();
    }
};

/* Cosine and sine of pair j at a position, scaled. */
__device__ __forceinline__ float2 rope_turn(const rope &rope, const int position[3], int j)
{
    float angle = (float)position[rope.axis[j]] * rope.inverse[j];
    return make_float2(cosf(angle) * rope.scale, sinf(angle) * rope.scale);
}

__device__ __forceinline__ void turn_two(float &a, float &b, float2 turn)
{
    float x = a * turn.x - b * turn.y;
    b = b * turn.x + a * turn.y;
    a = x;
}

__device__ __forceinline__ void turn_pair(float *head, int n, int j, float2 turn)
{
    turn_two(head[j], head[j + n], turn);
}

/* A warp a head; grid: heads, rows. */
__global__ void norm_rope_heads(mat x, int n_heads, int head_stride, int dim, const float *gain, float eps, rope rope,
                                cuda_rows rows)
{
    __shared__ float2 turn[HEAD_MAX / 2];
    int head = blockIdx.x * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if ((int)threadIdx.x < rope.n) turn[threadIdx.x] = rope_turn(rope, rows.rows[blockIdx.y].position, threadIdx.x);
    __syncthreads();
    wait_for_previous();
    let_next_start();
    if (head >= n_heads) return;
    float *at = x.data + blockIdx.y * x.stride + (int64_t)head * head_stride;
    head_values values;
    values.load(at, dim);
    values.store(at, dim, gain, eps);
    for (int j = lane; j < rope.n; j += LANES) turn_pair(at, rope.n, j, turn[j]);
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
    unsigned *arrived; /* [ROWS_EXACT][KV_HEADS_MAX], 0 between kernels: parts of a row and kv head that are done */
    bool meet;         /* one row, all of whose blocks run at once: the second counter is of those that have met */
    mat y;
    /* norm and rotate queries, keys and append here; NULL: done before */
    const float *q_gain, *k_gain;
    float eps;
    rope rope;
};

__device__ __forceinline__ float gate_of(const attention_args &a, int64_t row, int head, int d)
{
    return __ldcg(a.qg.data + row * a.qg.stride + (int64_t)(2 * head + 1) * a.kv.head_dim + d);
}

/* A value of a head put together, and gated. inverse: 1 / total. */
__device__ __forceinline__ void put_out(const attention_args &a, int64_t row, int head, int d, float x, float total,
                                        float inverse, float gate)
{
    a.y.data[row * a.y.stride + (int64_t)head * a.kv.head_dim + d] = divided(x, total, inverse) * sigmoid(gate);
}

/* What `warps` warps have left of a head of DIM (0: any), warp w at left(w), put together in their order by this one: the row's
 * output where the part is the only one, else the part's. */
template <int DIM, class LEFT_BY>
__device__ __forceinline__ void join_warps(const attention_args &a, LEFT_BY &&left, int warps, int64_t row, int head,
                                           const row_part &part, const float (&gate)[EACH])
{
    int dim = DIM ? DIM : a.kv.head_dim, lane = threadIdx.x % LANES;
    float top = -INFINITY, sum = 0, x[EACH] = {};
#pragma unroll 1
    for (int w = 0; w < warps; w++) top = fmaxf(top, left(w)[dim]);
#pragma unroll 1
    for (int w = 0; w < warps; w++) {
        const float *from = left(w);
        float share = expf(from[dim] - top);
        sum += from[dim + 1] * share;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane + i * LANES < dim) x[i] += from[lane + i * LANES] * share;
    }
    if (part.parts == 1) {
        float inverse = 1 / sum;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane + i * LANES < dim) put_out(a, row, head, lane + i * LANES, x[i], sum, inverse, gate[i]);
        return;
    }
    float *out = a.parts + ((row * a.n_heads + head) * a.splits + blockIdx.x) * (dim + 2);
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (lane + i * LANES < dim) out[lane + i * LANES] = x[i];
    if (lane == 0) out[dim] = top, out[dim + 1] = sum;
}

/* N columns a lane, from `first` on, of the parts of a head, by a warp. share: [SPLITS_ROOM], its own. The same sums for any N. */
constexpr int SPLITS_ROOM = (SPLITS + LANES - 1) / LANES * LANES;
template <int N>
__device__ __forceinline__ void join_parts(const attention_args &a, int64_t row, int head, int first, int parts, float *share)
{
    constexpr int AHEAD = 24 / N;
    int dim = a.kv.head_dim, size = dim + 2, lane = threadIdx.x % LANES;
    const float *from = a.parts + (row * a.n_heads + head) * a.splits * size;
    float tops[SPLITS_ROOM / LANES], sums[SPLITS_ROOM / LANES], gate[N], top = -INFINITY, sum = 0, x[N] = {};
#pragma unroll
    for (int i = 0; i < SPLITS_ROOM / LANES; i++) {
        int s = lane + i * LANES;
        tops[i] = s < parts ? __ldcg(from + s * size + dim) : -INFINITY;
        sums[i] = s < parts ? __ldcg(from + s * size + dim + 1) : 0;
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        int d = first + lane + n * LANES;
        gate[n] = d < dim ? gate_of(a, row, head, d) : 0;
    }
#pragma unroll
    for (int i = 0; i < SPLITS_ROOM / LANES; i++) top = fmaxf(top, tops[i]);
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < SPLITS_ROOM / LANES; i++) {
        float s = expf(tops[i] - top);
        share[lane + i * LANES] = s;
        sum += s * sums[i];
    }
    sum = warp_sum(sum);
    float inverse = 1 / sum;
    __syncwarp();
#pragma unroll 1
    for (int s = 0; s < parts; s += AHEAD) {
        float v[AHEAD][N];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int n = 0; n < N; n++) {
                int d = first + lane + n * LANES;
                v[i][n] = s + i < parts && d < dim ? __ldcg(from + (s + i) * size + d) : 0;
            }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int n = 0; n < N; n++)
                if (s + i < parts) x[n] = fmaf(v[i][n], share[s + i], x[n]);
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        int d = first + lane + n * LANES;
        if (d < dim) put_out(a, row, head, d, x[n], sum, inverse, gate[n]);
    }
    __syncwarp();
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

/* Waits until all blocks of the row and kv head have done their parts. */
__device__ __forceinline__ void meet(const attention_args &a, int parts)
{
    unsigned *arrived = a.arrived + blockIdx.y, *met = arrived + (ROWS_EXACT - 1) * KV_HEADS_MAX;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(arrived, 1u);
        wait_for_number(arrived, (unsigned)parts);
        if (atomicAdd(met, 1u) == (unsigned)parts - 1) *arrived = *met = 0;
        __threadfence();
    }
    __syncthreads();
}

/* The parts of a kv head's query heads together. shared: room for SPLITS_ROOM floats a warp. */
__device__ __forceinline__ void finish(const attention_args &a, int64_t row, int first_head, int group, int parts, float *shared)
{
    int warp = threadIdx.x / LANES, columns = (a.kv.head_dim + LANES - 1) / LANES;
    shared += warp * SPLITS_ROOM;
    if (a.meet) {
        meet(a, parts);
#pragma unroll 1
        for (int i = warp * parts + blockIdx.x; i < group * columns; i += WARPS * parts)
            join_parts<1>(a, row, first_head + i / columns, i % columns * LANES, parts, shared);
    } else if (is_last(a, row, parts)) {
#pragma unroll 1
        for (int i = warp; i < group * 2; i += WARPS)
            join_parts<EACH / 2>(a, row, first_head + i / 2, i % 2 * (HEAD_MAX / 2), parts, shared);
    }
}

/* ---- heads of 256 ---- */

__device__ __noinline__ void turn_in_place(float *head, const rope &rope, const int *position)
{
    __syncwarp();
    for (int j = threadIdx.x % LANES; j < rope.n; j += LANES) turn_pair(head, rope.n, j, rope_turn(rope, position, j));
    __syncwarp();
}

/* What a warp brings to the queries: a head with its norm and rotation. Columns are every 32nd, so that where 32 pairs are
 * turned, a pair is a lane's own. */
__device__ __forceinline__ void norm_and_turn(head_values &x, const attention_args &a, const float *gains, float2 turn,
                                              const int position[3], float *place)
{
    int lane = threadIdx.x % LANES;
    float gain[EACH];
    if (!a.q_gain) return;
#pragma unroll
    for (int i = 0; i < EACH; i++) gain[i] = gains[lane + i * LANES];
    float by = x.scale(TILE_DIM, a.eps);
#pragma unroll
    for (int i = 0; i < EACH; i++) x.v[i] = x.v[i] * by * gain[i];
    if (a.rope.n == LANES) {
        turn_two(x.v[0], x.v[1], turn);
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) place[lane + i * LANES] = x.v[i];
    turn_in_place(place, a.rope, position);
#pragma unroll
    for (int i = 0; i < EACH; i++) x.v[i] = place[lane + i * LANES];
    __syncwarp();
}

/* A row of keys or values into the cache, and into the ring. */
template <int DTYPE>
__device__ __forceinline__ void append(void *cache, int64_t line, uint8_t *pieces, int row, const float (&v)[EACH])
{
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int d = lane + i * LANES;
        kv_store(cache, DTYPE, line + d, v[i]);
        kv_store(pieces + own_byte<DTYPE>(row, d), DTYPE, 0, v[i]);
    }
}

/* Grid: parts, kv heads, rows. Shared memory: operands, then rings. */
template <int DTYPE> __global__ void __launch_bounds__(THREADS, 2) attention_wide(const __grid_constant__ attention_args a)
{
    using kind = tile_kind<DTYPE>;
    SHARED_MEMORY(uint8_t, shared_bytes, 128);
    __shared__ uint64_t barriers[2][kind::CREW * kind::DEPTH]; /* pieces that are full, and empty */
    uint32_t *operands = (uint32_t *)shared_bytes;
    uint8_t *rings = shared_bytes + OPERANDS_BYTES;
    int group = a.n_heads / a.kv.n_kv_heads, kv_head = blockIdx.y, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int64_t row = a.row0 + blockIdx.z;
    bool appends = a.k_gain; /* else the kernel before may have written keys and values */
    let_next_start();
    const cuda_row &r = a.rows.rows[row];
    cuda_span span = a.rows.spans[r.span];
    row_part part(span.past + (int)row - span.first, a.splits);
    if (!part.is_any()) return;
    bool owner = appends && part.has_end(); /* of the row's own key and value */
    int64_t head_bytes = (int64_t)kv_head * TILE_DIM * kind::BYTES;
    kv_tiles from = { (const uint8_t *)a.kv.keys + head_bytes,
                      (const uint8_t *)a.kv.values + head_bytes,
                      a.rows.pages + (int64_t)r.span * a.rows.pages_each,
                      a.kv.n_kv_heads * TILE_DIM * kind::BYTES,
                      part.first,
                      part.last,
                      part.end(),
                      part.end() - owner };
#if __CUDA_ARCH__ >= 900
    if ((int)threadIdx.x < 2 * kind::CREW * kind::DEPTH) barrier_init(&barriers[0][0] + threadIdx.x, 1);
    if (warp < 2) barriers_ready();
    __syncthreads();
#endif
    kv_ring<DTYPE> ring(rings, barriers);
    if (appends) ring.start(from);
    if (part.has_end()) place_padding<DTYPE>(rings, from.end);
    bool has_key = owner && warp == WARPS - 1, has_value = owner && warp == WARPS - 2;
    if (appends && threadIdx.x < 2 * TILE_DIM * 4 / 128) /* gains will be near */
        prefetch((lane / 8 ? a.k_gain : a.q_gain) + lane % 8 * LANES);
    float2 turn = a.q_gain && a.rope.n == LANES ? rope_turn(a.rope, r.position, lane) : float2{};
    int64_t line = kv_line(a.kv, a.rows, r.span, part.token) + (int64_t)kv_head * TILE_DIM;
    wait_for_previous();
    if (!appends) ring.start(from);
#pragma unroll 1
    for (int head = 0; head < group; head += TILE_HEADS) {
        int n = group - head < TILE_HEADS ? group - head : TILE_HEADS, mine = kv_head * group + head + warp;
        head_values q = {}, own = {};
        if (warp < n) q.load(a.qg.data + row * a.qg.stride + (int64_t)mine * 2 * TILE_DIM, TILE_DIM);
        if (head == 0 && has_key) own.load(a.k.data + row * a.k.stride + (int64_t)kv_head * TILE_DIM, TILE_DIM);
        if (head == 0 && has_value) own.load(a.v.data + row * a.v.stride + (int64_t)kv_head * TILE_DIM, TILE_DIM);
        norm_and_turn(q, a, a.q_gain, turn, r.position, (float *)shared_bytes + warp * TILE_DIM);
        if (head == 0 && has_key) {
            norm_and_turn(own, a, a.k_gain, turn, r.position, (float *)shared_bytes + warp * TILE_DIM);
            append<DTYPE>(a.kv.keys, line, rings, part.token % TILE_TOKENS, own.v);
        }
        if (head == 0 && has_value)
            append<DTYPE>(a.kv.values, line, rings + kind::PIECES * kind::PIECE, part.token % TILE_TOKENS, own.v);
        if (a.q_gain && a.rope.n != LANES) __syncthreads(); /* they were turned where operands go */
        place_query<DTYPE>(operands, q.v, warp);
        let_copies_follow(); /* the own row, and padding */
        __syncthreads();
        int warps = part.last - part.first < kind::CREW ? part.last - part.first : kind::CREW;
        float gate[EACH];
        tile_running running;
        if (warp < warps)
            attend_tiles(running, ring, (const uint2 *)operands, from);
        else if (ring.fills)
            ring.fill(from);
#pragma unroll
        for (int i = 0; i < EACH; i++) gate[i] = warp < n && part.parts == 1 ? gate_of(a, row, mine, lane + i * LANES) : 0;
        __syncwarp();
        if (warp < warps) running.leave<DTYPE>((float *)(rings + kind::begin(warp)));
        __syncthreads();
        if (warp < n)
            join_warps<TILE_DIM>(a, [&](int w) { return (const float *)(rings + kind::begin(w)) + warp * TILE_SIZE; }, warps, row,
                                 mine, part, gate);
        if (head + TILE_HEADS < group) { /* once more for the other heads; the own row is in the cache now */
            let_copies_see();
            __syncthreads();
            from.copied = from.end;
            if (part.has_end()) place_padding<DTYPE>(rings, from.end);
            ring.start(from);
        }
    }
    if (part.parts > 1) finish(a, row, kv_head * group, group, part.parts, (float *)operands);
}

/* ---- others ---- */

/* This lane's share of one key or value. */
template <int DTYPE> __device__ void load_head(float (&out)[EACH], const void *from, int64_t at, int dim)
{
    for (int i = 0; i < EACH; i++) {
        int d = threadIdx.x % LANES + LANES * i;
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
template <int DTYPE>
__device__ void attend(running (&r)[HEADS], const float *queries, int n, const attention_args &a, int span, int kv_head,
                       int begin, int end, int step)
{
    int dim = a.kv.head_dim, lane = threadIdx.x % LANES;
    float q[HEADS][EACH], scale = 1.0f / sqrtf((float)dim);
    for (int h = 0; h < HEADS; h++) {
        r[h].top = -INFINITY;
        r[h].sum = 0;
        for (int i = 0; i < EACH; i++) {
            int d = lane + LANES * i;
            q[h][i] = h < n && d < dim ? queries[h * dim + d] : 0;
            r[h].value[i] = 0;
        }
    }
    for (int token = begin; token < end; token += step * BATCH) {
        float k[BATCH][EACH], v[BATCH][EACH];
        for (int b = 0; b < BATCH; b++) {
            int at = token + b * step < end ? token + b * step : token;
            int64_t line = kv_line(a.kv, a.rows, span, at) + (int64_t)kv_head * dim;
            load_head<DTYPE>(k[b], a.kv.keys, line, dim);
            load_head<DTYPE>(v[b], a.kv.values, line, dim);
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

/* To [HEADS][dim values, maximum, sum]. */
__device__ __forceinline__ void leave(const running (&r)[HEADS], float *to, int n, int dim)
{
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int h = 0; h < HEADS; h++, to += dim + 2) {
        if (h >= n) continue;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane + i * LANES < dim) to[lane + i * LANES] = r[h].value[i];
        if (lane == 0) to[dim] = r[h].top, to[dim + 1] = r[h].sum;
    }
}

/* Queries of a kv head, and its own key behind them, into shared memory: normed and rotated where that has not been done. */
__device__ __forceinline__ void place_heads(const attention_args &a, float *queries, const float2 *turns, const float *k,
                                            int64_t row, int kv_head, int group, bool owner)
{
    int dim = a.kv.head_dim;
#pragma unroll 1
    for (int h = threadIdx.x / LANES; h < group + owner; h += WARPS) {
        head_values values;
        float *to = queries + h * dim;
        values.load(h == group ? k : a.qg.data + row * a.qg.stride + (int64_t)(kv_head * group + h) * 2 * dim, dim);
        values.store(to, dim, h == group ? a.k_gain : a.q_gain, a.eps);
        for (int j = threadIdx.x % LANES; a.q_gain && j < a.rope.n; j += LANES) turn_pair(to, a.rope.n, j, turns[j]);
    }
}

/* Grid: parts, kv heads, rows. Shared memory: queries [heads of the kv head][dim], own key [dim], turns
 * [rope.n][2] (room for dim), then what warps leave. */
template <int DTYPE> __global__ void __launch_bounds__(THREADS, 2) attention_narrow(const __grid_constant__ attention_args a)
{
    SHARED_MEMORY(float, shared_f, 128);
    int dim = a.kv.head_dim, group = a.n_heads / a.kv.n_kv_heads, kv_head = blockIdx.y, warp = threadIdx.x / LANES;
    int64_t row = a.row0 + blockIdx.z;
    float *queries = shared_f, *own = queries + group * dim, *meeting = own + 2 * dim;
    float2 *turns = (float2 *)(own + dim);
    let_next_start();
    int span = a.rows.rows[row].span;
    row_part part(a.rows.spans[span].past + (int)row - a.rows.spans[span].first, a.splits);
    bool owner = a.k_gain && part.has_end(); /* of the row's own key and value */
    if (!part.is_any()) return;
    for (int j = threadIdx.x; a.q_gain && j < a.rope.n; j += THREADS)
        turns[j] = rope_turn(a.rope, a.rows.rows[row].position, j);
    __syncthreads();
    int64_t line = kv_line(a.kv, a.rows, span, part.token) + (int64_t)kv_head * dim;
    bool mine = owner && (int)threadIdx.x < dim;
    wait_for_previous();
    float value = mine ? __ldcg(a.v.data + row * a.v.stride + (int64_t)kv_head * dim + threadIdx.x) : 0;
    place_heads(a, queries, turns, a.k.data + row * a.k.stride + (int64_t)kv_head * dim, row, kv_head, group, owner);
    __syncthreads();
    if (mine) {
        kv_store(a.kv.keys, DTYPE, line + threadIdx.x, own[threadIdx.x]);
        kv_store(a.kv.values, DTYPE, line + threadIdx.x, value);
    }
    if (owner) __syncthreads();
#pragma unroll 1
    for (int head = 0; head < group; head += 2 * HEADS) {
        int sides = group - head > HEADS ? 2 : 1, warps = WARPS / sides, side = warp / warps, member = warp % warps;
        int first = head + side * HEADS, n = group - first < HEADS ? group - first : HEADS, size = HEADS * (dim + 2);
        running r[HEADS];
        attend<DTYPE>(r, queries + first * dim, n, a, span, kv_head, part.first * TILE_TOKENS + member, part.end(), warps);
        leave(r, meeting + warp * size, n, dim);
        __syncthreads();
        for (int h = member; h < n; h += warps) {
            int at = kv_head * group + first + h;
            float gate[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int d = threadIdx.x % LANES + i * LANES;
                gate[i] = part.parts == 1 && d < dim ? gate_of(a, row, at, d) : 0;
            }
            const float *from = meeting + side * warps * size + h * (dim + 2);
            join_warps<0>(a, [&](int w) { return from + w * size; }, warps, row, at, part, gate);
        }
        __syncthreads();
    }
    if (part.parts > 1) finish(a, row, kv_head * group, group, part.parts, shared_f);
}

/* Keys normed and rotated, they and values appended, before rows of a sequence look at one another's. Grid: kv heads, rows. */
__global__ void __launch_bounds__(THREADS) append_heads(const __grid_constant__ attention_args a)
{
    __shared__ float key[HEAD_MAX];
    int dim = a.kv.head_dim, lane = threadIdx.x % LANES, d = threadIdx.x;
    int64_t row = blockIdx.y, head = (int64_t)blockIdx.x * dim;
    let_next_start();
    int span = a.rows.rows[row].span, token = a.rows.spans[span].past + (int)row - a.rows.spans[span].first;
    int64_t line = kv_line(a.kv, a.rows, span, token) + head;
    float2 turn = threadIdx.x < LANES && lane < a.rope.n ? rope_turn(a.rope, a.rows.rows[row].position, lane) : float2{};
    wait_for_previous();
    float value = d < dim ? __ldcg(a.v.data + row * a.v.stride + head + d) : 0;
    if (threadIdx.x < LANES) {
        head_values values;
        values.load(a.k.data + row * a.k.stride + head, dim);
        values.store(key, dim, a.k_gain, a.eps);
        for (int j = lane; j < a.rope.n; j += LANES)
            turn_pair(key, a.rope.n, j, j == lane ? turn : rope_turn(a.rope, a.rows.rows[row].position, j));
    }
    __syncthreads();
    if (d >= dim) return;
    kv_store(a.kv.keys, a.kv.dtype, line + d, key[d]);
    kv_store(a.kv.values, a.kv.dtype, line + d, value);
}

template <int DTYPE> void start(struct queue *q, attention_args &a, int64_t n)
{
    int group = a.n_heads / a.kv.n_kv_heads, dim = a.kv.head_dim;
    bool wide = dim == HEAD_MAX;
    dim3 grid((unsigned)a.splits, (unsigned)a.kv.n_kv_heads, (unsigned)n);
    size_t shared = wide ? OPERANDS_BYTES + tile_kind<DTYPE>::RINGS
                         : (size_t)((group + 2) * dim + WARPS * HEADS * (dim + 2)) * sizeof(float);
    a.meet = n == 1 && grid.x * grid.y <= (unsigned)q->sms;
    if (!wide && shared < WARPS * SPLITS_ROOM * sizeof(float)) shared = WARPS * SPLITS_ROOM * sizeof(float);
    if (dim > HEAD_MAX || a.kv.n_kv_heads > KV_HEADS_MAX || shared > (size_t)q->shared_max) {
        queue_refuse(q, "attention", "heads wider than 256, or so many, are not supported on a GPU");
        return;
    }
    launch_side<THREADS>(q, "attention", a.meet ? RIGHT : ALONE, wide ? attention_wide<DTYPE> : attention_narrow<DTYPE>, grid,
                         shared, a);
}

void run(struct queue *q, mat y, attention_args a, int64_t n)
{
    a.splits = queue_few(q, a.rows.n) ? SPLITS : 1;
    a.parts = q->attended;
    a.arrived = q->arrived;
    a.y = y;
    if (a.kv.dtype == KV_F32)
        start<KV_F32>(q, a, n);
    else if (a.kv.dtype == KV_BF16)
        start<KV_BF16>(q, a, n);
    else
        start<KV_FP8>(q, a, n);
}

} /* namespace */

void cuda_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim, const float *gain, float eps,
                    const struct rope *rope, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (head_dim > HEAD_MAX)
        queue_refuse(q, "norm_rope", "heads wider than 256 are not supported on a GPU");
    else if (rows)
        launch(q, "norm_rope", true, norm_rope_heads, dim3(blocks(n_heads, WARPS), (unsigned)x.rows), 0, x, n_heads,
               head_stride, head_dim, gain, eps, *rope, *rows);
}

void cuda_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v, const struct step_rows *step)
{
    const struct cuda_rows *rows = queue_rows(q, step);
    if (rows) launch(q, "kv_append", false, kv_append_rows, dim3(blocks(k.cols), (unsigned)step->n), 0, *kv, k, v, *rows);
}

void cuda_attention_some(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
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
    if (rows) cuda_attention_some(q, y, qg, n_heads, kv, rows, 0, step->n);
}

static attention_args args_of(const struct attention_run *r, const struct cuda_rows *rows)
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
    return a;
}

void cuda_attention_decode(struct queue *q, const struct attention_run *r, const struct cuda_rows *rows)
{
    run(q, r->att, args_of(r, rows), rows->n);
}

void cuda_attention_append(struct queue *q, const struct attention_run *r, const struct cuda_rows *rows)
{
    attention_args a = args_of(r, rows);
    if (r->kv->head_dim > HEAD_MAX)
        queue_refuse(q, "attention", "heads wider than 256 are not supported on a GPU");
    else
        launch(q, "attention", true, append_heads, dim3((unsigned)r->kv->n_kv_heads, (unsigned)rows->n), 0, a);
}

void cuda_attention_rows(struct queue *q, const struct attention_run *r, const struct cuda_rows *rows)
{
    attention_args a = args_of(r, rows);
    cuda_attention_append(q, r, rows);
    a.k_gain = nullptr;
    run(q, r->att, a, rows->n);
}
