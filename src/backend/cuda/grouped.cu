/* The routed experts of many rows. Picks are put in the order of their experts, on the device: a pick's place
 * is its slot. Tiles of up to 32 or 128 slots of one expert then meet tiles of weight rows (tile.cuh): 64
 * gate and the same 64 up rows, whose sums become SiLU(gate) up, and 128 down rows. In the end each row adds
 * what its picks gave, in their order. The order of slots within an expert changes nothing: a slot's numbers
 * are its own. */
#include "backend/cuda/tile.cuh"

namespace
{

constexpr int SORTERS = EXPERTS_MAX, ENTRY = 4, AHEAD = 4;

/* Sums of x and of y over the threads before this one; a meeting. part: [SORTERS / LANES] */
__device__ int2 before(int x, int y, int2 *part)
{
    static_assert(SORTERS / LANES == LANES, "a warp sums what warps have");
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    auto add_up = [&](int2 v) {
        for (int o = 1; o < LANES; o *= 2) {
            int2 other = make_int2(__shfl_up_sync(ALL, v.x, o), __shfl_up_sync(ALL, v.y, o));
            if (lane >= o) v.x += other.x, v.y += other.y;
        }
        return v;
    };
    int2 sum = add_up(make_int2(x, y));
    if (lane == LANES - 1) part[warp] = sum;
    __syncthreads();
    int2 warps = add_up(part[lane]);
    int2 base = make_int2(__shfl_sync(ALL, warps.x, (warp - 1) & (LANES - 1)), __shfl_sync(ALL, warps.y, (warp - 1) & (LANES - 1)));
    return warp ? make_int2(base.x + sum.x - x, base.y + sum.y - y) : make_int2(sum.x - x, sum.y - y);
}

/* Of an expert of thread e, of n slots: its first slot. Tiles of at most `most` are written if wanted. All threads. */
__device__ int expert_slots(const cuda_prefill &s, int n, int most, bool write, int2 *part)
{
    int e = threadIdx.x, tiles = (n + most - 1) / most, each = tiles ? ((n + tiles - 1) / tiles + 7) / 8 * 8 : 8;
    tiles = (n + each - 1) / each;
    int2 earlier = before(n, tiles, part);
    int first = earlier.x, tile = earlier.y;
    for (int i = 0; write && i < tiles; i++) {
        int *to = s.tiles + ENTRY * (1 + tile + i);
        to[0] = e;
        to[1] = first + i * each;
        to[2] = n - i * each < each ? n - i * each : each;
    }
    if (write && e == SORTERS - 1) s.tiles[0] = tile + tiles;
    return first;
}

/* The experts of the picks first, first + SORTERS, ... of a thread; -1 past the last. */
template <int N> __device__ __forceinline__ void load_experts(int (&expert)[N], const picks &p, int first, int picked)
{
#pragma unroll
    for (int i = 0; i < N; i++) expert[i] = first + i * SORTERS < picked ? p.expert[first + i * SORTERS] : -1;
}

/* One block: counts, places, tiles. Thread e is expert e's. */
__global__ void __launch_bounds__(SORTERS) sort_picks(cuda_prefill s, picks p, int picked, int most)
{
    __shared__ int count[EXPERTS_MAX], place[EXPERTS_MAX];
    __shared__ int2 part[SORTERS / LANES];
    int e = threadIdx.x, expert[2 * AHEAD], rank[2 * AHEAD];
    count[e] = 0;
    __syncthreads();
    wait_for_previous();
    let_next_start();
    load_experts(expert, p, threadIdx.x, picked);
#pragma unroll
    for (int i = 0; i < 2 * AHEAD; i++)
        if (expert[i] >= 0) rank[i] = atomicAdd(&count[expert[i]], 1);
    __syncthreads();
    place[e] = expert_slots(s, count[e], most, true, part);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * AHEAD; i++) {
        if (expert[i] < 0) continue;
        int pick = threadIdx.x + i * SORTERS, slot = place[expert[i]] + rank[i];
        s.slot_row[slot] = pick / p.k;
        s.slot_of[pick] = slot;
    }
}

/* The same for many picks, by many blocks of SORTERS * AHEAD: how many each expert has, then their places. counts: [0, EXPERTS_MAX)
 * of all, from there on how many have a place; zeros before. */
__global__ void __launch_bounds__(SORTERS) count_picks(cuda_prefill s, picks p, int picked)
{
    wait_for_previous();
    let_next_start();
    __shared__ int count[EXPERTS_MAX];
    int e = threadIdx.x, expert[AHEAD];
    count[e] = 0;
    load_experts(expert, p, blockIdx.x * SORTERS * AHEAD + threadIdx.x, picked);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (expert[i] >= 0) atomicAdd(&count[expert[i]], 1);
    __syncthreads();
    if (count[e]) atomicAdd(&s.counts[e], count[e]);
}

__global__ void __launch_bounds__(SORTERS) place_picks(cuda_prefill s, picks p, int picked, int most)
{
    wait_for_previous();
    let_next_start();
    __shared__ int count[EXPERTS_MAX], place[EXPERTS_MAX];
    __shared__ int2 part[SORTERS / LANES];
    int e = threadIdx.x, begin = blockIdx.x * SORTERS * AHEAD + threadIdx.x, expert[AHEAD], rank[AHEAD];
    count[e] = 0;
    load_experts(expert, p, begin, picked);
    place[e] = expert_slots(s, __ldcg(&s.counts[e]), most, blockIdx.x == 0, part);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (expert[i] >= 0) rank[i] = atomicAdd(&count[expert[i]], 1);
    __syncthreads();
    if (count[e]) place[e] += atomicAdd(&s.counts[EXPERTS_MAX + e], count[e]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        if (expert[i] < 0) continue;
        int pick = begin + i * SORTERS, slot = place[expert[i]] + rank[i];
        s.slot_row[slot] = pick / p.k;
        s.slot_of[pick] = slot;
    }
}

struct grouped_args {
    cuda_experts e;
    cuda_prefill s;
    const __nv_bfloat16 *x; /* inputs of gate and up, by row; of down, by slot */
    const float *scale;     /* of quantized ones, likewise */
    int parts;
    bool rounded;          /* what picks give is kept in BF16 */
    __nv_bfloat16 *hidden; /* SiLU(gate) up in BF16, or NULL: */
    float *hidden_f32;
};

/* Of an expert, from row0 (a multiple of 8) on. */
template <int FORMAT>
__device__ const uint8_t *expert_rows(const cuda_matrix &m, int expert, int row0, int pitch)
{
    return (const uint8_t *)m.data + expert * tile_matrix_bytes(FORMAT, m.rows, m.cols) +
           (int64_t)(FORMAT == WEIGHT_NVFP4 ? row0 / 8 : row0) * pitch;
}

/* Grid: tiles of 64 rows of gate and up, tiles of slots. */
template <int FORMAT, int TOKENS>
__global__ void __launch_bounds__(THREADS, 2) up_tiles(const __grid_constant__ grouped_args a)
{
    wait_for_previous();
    let_next_start();
    SHARED_MEMORY(uint8_t, shared, 1024);
    if ((int)blockIdx.y >= a.s.tiles[0]) return;
    const int *entry = a.s.tiles + ENTRY * (1 + blockIdx.y);
    int expert = entry[0], first = entry[1], tokens = entry[2], row0 = blockIdx.x * UP_ROWS,
        lane = threadIdx.x % LANES;
    const cuda_matrix &m = a.e.m[GATE];
    tile_source s = {};
    s.rows = m.rows - row0;
    s.split = UP_ROWS;
    s.pitch = tile_pitch(FORMAT, m.cols);
    s.x = a.x;
    s.x_stride = a.parts * m.cols;
    s.index = a.s.slot_row + first;
    for (int i = 0; i < 2; i++) s.data[i] = expert_rows<FORMAT>(a.e.m[GATE + i], expert, row0, s.pitch);
    tile_sums<FORMAT, TOKENS>(shared, s, m.cols / TILE_K, a.parts, tokens);
    const float *sums = (const float *)shared;
    float unit[2][2];
    int c = 2 * lane;
    if (row0 + c >= m.rows) return;
    for (int i = 0; i < 4; i++) {
        const cuda_matrix &w = a.e.m[GATE + i / 2];
        unit[i / 2][i % 2] = FORMAT == WEIGHT_FP8
                                 ? w.scale[(int64_t)expert * m.rows + row0 + c + i % 2]
                                 : matrix_unit(FORMAT, a.e.globals[(GATE + i / 2) * a.e.n + expert]);
    }
    bool quantized = m.input == INPUT_FP8_ROW;
    for (int i = threadIdx.x / LANES; i < tokens; i += WARPS) {
        float2 g = *(const float2 *)(sums + i * OUT_STRIDE + c),
               u = *(const float2 *)(sums + i * OUT_STRIDE + UP_ROWS + c);
        float in = quantized ? a.scale[s.index[i]] : 1;
        float h0 = silu(g.x * in * unit[0][0]) * (u.x * in * unit[1][0]);
        float h1 = silu(g.y * in * unit[0][1]) * (u.y * in * unit[1][1]);
        int64_t row = (int64_t)(first + i) * m.rows;
        if (a.hidden)
            *(__nv_bfloat162 *)(a.hidden + row + row0 + tile_place(c)) = __floats2bfloat162_rn(h0, h1);
        else
            *(float2 *)(a.hidden_f32 + row + row0 + c) = make_float2(h0, h1);
    }
}

/* Grid: tiles of rows of down, tiles of slots. */
template <int FORMAT, int TOKENS>
__global__ void __launch_bounds__(THREADS, 2) down_tiles(const __grid_constant__ grouped_args a)
{
    wait_for_previous();
    let_next_start();
    SHARED_MEMORY(uint8_t, shared, 1024);
    if ((int)blockIdx.y >= a.s.tiles[0]) return;
    const int *entry = a.s.tiles + ENTRY * (1 + blockIdx.y);
    int expert = entry[0], first = entry[1], tokens = entry[2], row0 = blockIdx.x * TILE_ROWS,
        lane = threadIdx.x % LANES;
    const cuda_matrix &m = a.e.m[DOWN];
    tile_source s = {};
    s.rows = m.rows - row0;
    s.split = TILE_ROWS;
    s.pitch = tile_pitch(FORMAT, m.cols);
    s.x_stride = a.parts * m.cols;
    s.x = a.x + (int64_t)first * s.x_stride;
    s.data[0] = expert_rows<FORMAT>(m, expert, row0, s.pitch);
    tile_sums<FORMAT, TOKENS>(shared, s, m.cols / TILE_K, a.parts, tokens);
    const float *sums = (const float *)shared;
    float unit[4];
    int c = 4 * lane;
    if (row0 + c >= m.rows) return;
    for (int i = 0; i < 4; i++)
        unit[i] = FORMAT == WEIGHT_FP8 ? m.scale[(int64_t)expert * m.rows + row0 + c + i]
                                       : matrix_unit(FORMAT, a.e.globals[DOWN * a.e.n + expert]);
    bool quantized = m.input == INPUT_FP8_ROW;
    for (int i = threadIdx.x / LANES; i < tokens; i += WARPS) {
        float4 v = *(const float4 *)(sums + i * OUT_STRIDE + c);
        float in = quantized ? a.scale[first + i] : 1;
        float4 y =
            make_float4(v.x * in * unit[0], v.y * in * unit[1], v.z * in * unit[2], v.w * in * unit[3]);
        int64_t to = (int64_t)(first + i) * m.rows + row0 + c;
        if (a.rounded)
            *(uint2 *)((__nv_bfloat16 *)a.s.down + to) = make_uint2(pair_of(y.x, y.y), pair_of(y.z, y.w));
        else
            *(float4 *)(a.s.down + to) = y;
    }
}

constexpr int SUMMED = 8; /* columns a thread adds up, and picks it asks for at a time */

/* What a pick gave, in BF16 or f32. */
template <bool ROUNDED> struct pick_values {
    uint4 v[ROUNDED ? 1 : 2];

    __device__ __forceinline__ void load(const float *down, int64_t at)
    {
        if (ROUNDED) {
            v[0] = *(const uint4 *)((const __nv_bfloat16 *)down + at);
        } else {
            v[0] = *(const uint4 *)(down + at);
            v[ROUNDED ? 0 : 1] = *(const uint4 *)(down + at + 4);
        }
    }
    __device__ __forceinline__ void add(float (&sum)[SUMMED], float weight) const
    {
        const uint32_t word[8] = { v[0].x, v[0].y, v[0].z, v[0].w, v[ROUNDED ? 0 : 1].x, v[ROUNDED ? 0 : 1].y,
                                   v[ROUNDED ? 0 : 1].z, v[ROUNDED ? 0 : 1].w };
#pragma unroll
        for (int i = 0; i < SUMMED; i++) {
            uint32_t x = !ROUNDED ? word[i] : i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16;
            sum[i] += weight * __uint_as_float(x);
        }
    }
};

/* Columns of a row; those that are not there are 0, or left alone. */
__device__ __forceinline__ void load_columns(float (&x)[SUMMED], const float *from, int n)
{
    if (n >= SUMMED && (uintptr_t)from % 16 == 0) {
        float4 a = *(const float4 *)from, b = *(const float4 *)(from + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < SUMMED; i++) x[i] = i < n ? from[i] : 0;
}

__device__ __forceinline__ void store_columns(float *to, const float (&x)[SUMMED], int n)
{
    if (n >= SUMMED && (uintptr_t)to % 16 == 0) {
        *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
        *(float4 *)(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
        return;
    }
#pragma unroll
    for (int i = 0; i < SUMMED; i++)
        if (i < n) to[i] = x[i];
}

/* Of the picks from `first` on, n at most. */
__device__ __forceinline__ void load_slots(int (&slot)[SUMMED], const cuda_prefill &s, int64_t first, int n)
{
#pragma unroll
    for (int j = 0; j < SUMMED; j++)
        if (j < n) slot[j] = __ldcg(s.slot_of + first + j);
}

/* y = what the picks gave, weighted, in order, and the shared expert's behind its gate; add += y. y.data NULL: only
 * that. Grid: columns by eights, rows. */
template <bool ROUNDED>
__global__ void __launch_bounds__(THREADS, ROUNDED ? 3 : 2) sum_picks(mat y, mat add, mat shared, mat gate, cuda_prefill s, picks p)
{
    int64_t row = blockIdx.y, c = SUMMED * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
    if (c >= y.cols) return;
    int n = y.cols - c < SUMMED ? (int)(y.cols - c) : SUMMED;
    float sum[SUMMED] = {}, other[SUMMED], before[SUMMED];
    int slot[SUMMED];
    load_slots(slot, s, row * p.k, p.k); /* there before the experts' last kernel let this one start */
    wait_for_previous();
    let_next_start();
    if (shared.data) load_columns(other, shared.data + row * shared.stride + c, n);
    if (add.data) load_columns(before, add.data + row * add.stride + c, n);
    for (int first = 0; first < p.k; first += SUMMED) {
        pick_values<ROUNDED> v[SUMMED];
        float weight[SUMMED];
        if (first > 0) load_slots(slot, s, row * p.k + first, p.k - first);
#pragma unroll
        for (int j = 0; j < SUMMED; j++) {
            if (first + j >= p.k) break;
            weight[j] = p.weight[row * p.k + first + j];
            v[j].load(s.down, (int64_t)slot[j] * y.cols + c);
        }
#pragma unroll
        for (int j = 0; j < SUMMED; j++) {
            if (first + j >= p.k) break;
            v[j].add(sum, weight[j]);
        }
    }
    float open = shared.data ? sigmoid(gate.data[row * gate.stride]) : 0;
#pragma unroll
    for (int i = 0; i < SUMMED; i++) {
        if (shared.data) sum[i] += open * other[i];
        before[i] += sum[i];
    }
    if (y.data) store_columns(y.data + row * y.stride + c, sum, n);
    if (add.data) store_columns(add.data + row * add.stride + c, before, n);
}

template <int FORMAT, int TOKENS> void run(struct queue *q, grouped_args &a, int64_t n, const picks &p)
{
    const cuda_matrix &up = a.e.m[GATE], &down = a.e.m[DOWN];
    int64_t picked = n * p.k;
    unsigned most = (unsigned)(picked / TOKENS + (a.e.n < picked ? a.e.n : picked));
    mat none = {}, hidden = { q->hidden, picked, up.rows, up.rows };
    cuda_sort_picks(q, &p, n, TOKENS);
    launch(q, "experts", true, up_tiles<FORMAT, TOKENS>, dim3(blocks(up.rows, UP_ROWS), most), tile<FORMAT, TOKENS>::SHARED, a);
    bool quantized = down.input == INPUT_FP8_ROW;
    a.parts = q->rounded || quantized ? 1 : EXACT_PARTS;
    if (!a.hidden)
        cuda_dense_inputs(q, q->prefill.hidden, q->prefill.scale, hidden, none, quantized, a.parts);
    a.x = (const __nv_bfloat16 *)q->prefill.hidden;
    launch(q, "experts", true, down_tiles<FORMAT, TOKENS>, dim3(blocks(down.rows, TILE_ROWS), most),
           tile<FORMAT, TOKENS>::SHARED, a);
}

template <int FORMAT> void run_any(struct queue *q, grouped_args &a, int64_t n, const picks &p)
{
    if (n * p.k > 48 * (int64_t)a.e.n)
        run<FORMAT, 128>(q, a, n, p);
    else
        run<FORMAT, 32>(q, a, n, p);
}

void run_format(struct queue *q, grouped_args &a, int format, int64_t n, const picks &p)
{
    if (format == WEIGHT_BF16)
        run_any<WEIGHT_BF16>(q, a, n, p);
    else if (format == WEIGHT_FP8)
        run_any<WEIGHT_FP8>(q, a, n, p);
    else
        run_any<WEIGHT_NVFP4>(q, a, n, p);
}

bool takes(const struct queue *q, const cuda_experts &e, int64_t n, int k)
{
    const cuda_prefill &s = q->prefill;
    const cuda_matrix &up = e.m[GATE], &down = e.m[DOWN];
    if (queue_few(q, n) || n > s.rows || n * k > s.picked || e.n > EXPERTS_MAX) return false;
    for (int i = 0; i < 3; i++)
        if (e.m[i].format != up.format || !tile_takes(e.m[i], i == DOWN ? s.intermediate : s.cols))
            return false;
    return e.m[UP].input == up.input && down.rows <= s.width && down.rows % SUMMED == 0;
}

} /* namespace */

static void sort_all(struct queue *q, const struct picks *p, int picked, int most)
{
    constexpr int ONE_BLOCK = 2 * SORTERS * AHEAD;
    if (picked <= ONE_BLOCK) {
        launch<SORTERS>(q, "experts", true, sort_picks, dim3(1), 0, q->prefill, *p, picked, most);
        return;
    }
    if (!queue_failed(q))
        queue_check(q, cudaMemsetAsync(q->prefill.counts, 0, 2 * EXPERTS_MAX * sizeof *q->prefill.counts, q->stream), "experts");
    launch<SORTERS>(q, "experts", true, count_picks, dim3(blocks(picked, SORTERS * AHEAD)), 0, q->prefill, *p, picked);
    launch<SORTERS>(q, "experts", true, place_picks, dim3(blocks(picked, SORTERS * AHEAD)), 0, q->prefill, *p, picked, most);
}

void cuda_sort_picks(struct queue *q, const struct picks *p, int64_t rows, int most)
{
    if (q->forked) queue_other(q);
    sort_all(q, p, (int)(rows * p->k), most);
    if (!q->forked) return;
    queue_other(q);
    queue_join(q);
}

void cuda_sum_picks(struct queue *q, struct mat y, const struct picks *p)
{
    mat none = {};
    launch(q, "experts", true, sum_picks<false>, dim3(blocks(y.cols, SUMMED * THREADS), (unsigned)y.rows), 0, y, none, none,
           none, q->prefill, *p);
}

bool cuda_grouped_knows(const struct queue *q, const struct moe_run *run)
{
    const cuda_experts *e = (const cuda_experts *)run->experts->bound;
    return takes(q, *e, run->h.rows, run->picks->k) && e->m[GATE].input == INPUT_AS_IS;
}

bool cuda_grouped(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                  const struct cuda_experts *e, const struct moe_run *run)
{
    grouped_args a = {};
    mat none = {};
    if (!takes(q, *e, x.rows, p->k)) return false;
    const cuda_matrix &up = e->m[GATE], &down = e->m[DOWN];
    bool quantized = up.input == INPUT_FP8_ROW;
    a.e = *e;
    a.s = q->prefill;
    a.rounded = q->rounded;
    a.scale = q->prefill.scale;
    int parts = q->rounded ? 1 : EXACT_PARTS;
    if (!run || quantized || q->prefill.known != x.data) {
        cuda_dense_inputs(q, q->prefill.inputs, q->prefill.scale, x, none, quantized, parts);
        q->prefill.known = nullptr;
    }
    a.x = (const __nv_bfloat16 *)q->prefill.inputs;
    if (q->rounded && down.input == INPUT_AS_IS)
        a.hidden = (__nv_bfloat16 *)q->prefill.hidden;
    else
        a.hidden_f32 = q->hidden;
    a.parts = quantized ? 1 : parts;
    if (quantized || !cuda_grouped_wide(q, e, p, x.rows)) run_format(q, a, up.format, x.rows, *p);
    if (run && run->lean) y.data = nullptr;
    launch(q, "experts", true, q->rounded ? sum_picks<true> : sum_picks<false>,
           dim3(blocks(y.cols, SUMMED * THREADS), (unsigned)x.rows), 0, y, run ? run->x : none,
           run ? run->shared : none, run ? run->shared_gate : none, q->prefill, *p);
    return true;
}
