/* The mixture of experts for few rows: two kernels, the router's choice inside each. A block does a share of
 * one row's work. experts_fp4.cu does NVFP4 experts that fit it.
 *
 * experts_up: the k best of the router's logits; then eight gate rows by one half of the warps and the same
 * eight up rows by the other, split along columns. experts_down: eight rows of the output by eight warps,
 * warp j on the expert of pick j (j + 8, ...) and all of them on a share of the shared expert's; then the sum
 * over picks in order, the shared expert behind its gate, and the residual. It starts when the logits are
 * final and chooses for itself, so that its weights come while experts_up still works. */
#include "backend/cuda/route.cuh"
#include "backend/cuda/stream.cuh"

namespace
{

struct up_args {
    cuda_experts e;
    mat x;
    picks p;
    mat logits;    /* data NULL: the picks are given */
    float *hidden; /* [rows][k][intermediate] */
    mat gate, up,
        made; /* the shared expert's products, and what becomes of them; made.data NULL: no shared expert */
    float *made_scale; /* [rows]: what that row is quantized by, where its product asks for it */
    int items, extra;  /* of a block; blocks that have one more */
};

struct down_args {
    cuda_experts e;
    const float *hidden;
    picks p;
    mat y, add; /* add.data NULL: no residual */
    mat logits;
    cuda_matrix w; /* shared down; rows 0: none */
    mat made, shared_gate;
    const float *made_scale;
    int tiles, extra; /* of a block; blocks that have one more */
};

constexpr int TEAM = CREW / 2, UP_ITEMS = 16, DOWN_TILES = 4; /* of a block at most */
constexpr int UP_RING = 4, DOWN_RING = 3;
constexpr int UP_SUMS = CREW * UP_ITEMS * 8; /* floats */

/* ---- routing ---- */

__global__ void route_rows(picks p, mat logits)
{
    __shared__ uint32_t keys[WARPS][EXPERTS_MAX];
    __shared__ int expert[WARPS][PICKS_MAX];
    int warp = threadIdx.x / LANES;
    int64_t row = (int64_t)blockIdx.x * WARPS + warp;
    wait_for_previous();
    let_next_start();
    if (row >= logits.rows) return;
    choose(expert[warp], p.weight + row * p.k, keys[warp], logits.data + row * logits.stride, (int)logits.cols,
           p.k);
    for (int j = threadIdx.x % LANES; j < p.k; j += LANES) p.expert[row * p.k + j] = expert[warp][j];
}

/* N pairs of columns of a row into slots, pairs first, first + step, ...; returns the largest magnitude. */
template <int N>
__device__ __forceinline__ float place_pairs(__nv_bfloat16 *slots, int stride, const float *x, int cols,
                                             int first, int step)
{
    float2 v[N];
    float top = 0;
#pragma unroll
    for (int i = 0; i < N; i++)
        v[i] = 2 * (first + i * step) < cols ? load_pair(x, 2 * (first + i * step)) : float2{};
#pragma unroll
    for (int i = 0; i < N; i++)
        if (2 * (first + i * step) < cols)
            top = fmaxf(top, put_parts(slots, stride, 2 * (first + i * step), v[i]));
    return top;
}

/* What a sum of row `row` is multiplied by: FP8, or what FP4_UNIT is divided by to get it. */
__device__ __forceinline__ float expert_number(const cuda_experts &e, int which, int number, int row)
{
    const cuda_matrix &m = e.m[which];
    return m.format == WEIGHT_NVFP4 ? e.globals[which * e.n + number]
           : m.format == WEIGHT_FP8 ? m.scale[number * m.rows + row]
                                    : 1;
}

__device__ __forceinline__ float expert_unit(const cuda_experts &e, int which, float number)
{
    return e.m[which].format == WEIGHT_NVFP4 ? FP4_UNIT / number : number;
}

/* ---- gate and up ---- */

/* The shared expert's hidden row, and what it is quantized by. */
__device__ __forceinline__ void make_shared_row(const up_args &a, int64_t row, float *scratch)
{
    float top = 0;
    for (int c = threadIdx.x; c < a.made.cols; c += BLOCK) {
        float x =
            silu(__ldcg(a.gate.data + row * a.gate.stride + c)) * __ldcg(a.up.data + row * a.up.stride + c);
        a.made.data[row * a.made.stride + c] = x;
        top = fmaxf(top, fabsf(x));
    }
    top = block_max<CREW>(top, scratch);
    if (threadIdx.x == 0) a.made_scale[row] = fp8_input_scale(top);
}

/* The tiles a warp asks for: lane i knows where tile i begins. */
template <int KINDS, int RING> struct listed_tiles {
    stream<KINDS, RING> &weights;
    const uint8_t *tile;
    int row_bytes;
    share s;
    int next, n;

    __device__ __forceinline__ bool operator()()
    {
        if (next >= n) return false;
        const uint8_t *at = (const uint8_t *)__shfl_sync(ALL, (unsigned long long)tile, next++);
        weights.begin(weights.lane_at(at, row_bytes, s.first), row_bytes, s);
        return true;
    }
};

/* Grid: blocks, rows. Shared memory: ring, sums [warp][item][8], slots. An item is eight gate
 * and eight up rows of a pick; those of a block follow one another, so that they lie on few pages of memory.
 */
template <int KINDS> __global__ void __launch_bounds__(BLOCK, 2) experts_up(const __grid_constant__ up_args a)
{
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int expert[PICKS_MAX];
    __shared__ uint32_t keys[EXPERTS_MAX];
    __shared__ float weight[PICKS_MAX], scratch[2][CREW];
    const cuda_matrix &gate = a.e.m[GATE];
    float *sums = (float *)(shared + ring_bytes(UP_RING, KINDS & TILED));
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + UP_SUMS);
    int cols = gate.cols, stride = slot_stride(cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int each = tiles_of(gate.rows), items = a.items + ((int)blockIdx.x < a.extra);
    int64_t row = blockIdx.y;
    const float *x = a.x.data + row * a.x.stride;
    int units = units_of(gate.format, cols);
    share s = share_at(units, share_of(units, TEAM), warp % TEAM);
    int begin = blockIdx.x * a.items + ((int)blockIdx.x < a.extra ? (int)blockIdx.x : a.extra);
    int pick = (begin + lane) / each; /* of the item whose tile this lane knows */
    const uint8_t *tile = tile_at(a.e.m[warp / TEAM], 0, begin + lane - pick * each);
    int number = begin + threadIdx.x / 8, mine_pick = number / each,
        r = (number - mine_pick * each) * 8 + threadIdx.x % 8;
    bool stores = (int)threadIdx.x / 8 < items && r < gate.rows;
    put_padding(slots, stride, cols, threadIdx.x, BLOCK);
    float top = 0, input_scale = 1;
    wait_for_previous();
    let_next_start(); /* which may count on the logits */
    if (warp == 0) {
        if (a.logits.data)
            choose(expert, blockIdx.x == 0 ? weight : nullptr, keys, a.logits.data + row * a.logits.stride,
                   a.e.n, a.p.k);
        else
            for (int j = lane; j < a.p.k; j += LANES) expert[j] = __ldcg(a.p.expert + row * a.p.k + j);
    } else {
        for (int c = threadIdx.x - LANES; 2 * c < cols; c += 3 * (BLOCK - LANES))
            top = fmaxf(top, place_pairs<3>(slots, stride, x, cols, c, BLOCK - LANES));
    }
    __syncthreads();
    float unit[2] = { 1, 1 };
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (stores) unit[i] = expert_number(a.e, i, expert[mine_pick], r);
    stream<KINDS, UP_RING> weights(shared);
    listed_tiles<KINDS, UP_RING> next = { weights, nullptr, gate.format == WEIGHT_NVFP4 ? 0 : row_bytes_of(gate),
                                          s, 0, items };
    if (lane < items) next.tile = tile + (uint64_t)expert[pick] * matrix_bytes(gate);
#pragma unroll 1
    for (int n = 0; n < UP_RING; n++) weights.ask(next);
    if (gate.input == INPUT_FP8_ROW) {
        input_scale = fp8_input_scale(block_max<CREW>(top, scratch[0]));
#pragma unroll 1
        for (int c = 2 * threadIdx.x; c < cols; c += 2 * BLOCK)
            put_quantized(slots, stride, c, parts_sum(slots, stride, c), input_scale, 1.0f / input_scale);
        __syncthreads();
    }
    if (a.made.data && blockIdx.x == gridDim.x - 1) make_shared_row(a, row, scratch[1]);
    if (a.logits.data && blockIdx.x == 0 && warp == 0)
        for (int j = lane; j < a.p.k; j += LANES) {
            a.p.expert[row * a.p.k + j] = expert[j];
            a.p.weight[row * a.p.k + j] = weight[j];
        }
#pragma unroll 1
    for (int i = 0; i < items; i++) {
        float sum[4];
        weights.template work<1>(sum, gate.format, s, slots, stride, SLOTS, gate.input == INPUT_FP8_ROW, next);
        if (lane < 4) *(float2 *)(sums + (warp * UP_ITEMS + i) * 8 + lane * 2) = make_float2(sum[0], sum[1]);
    }
    copy_wait<0>();
    __syncthreads();
    if (!stores) return;
    float value[2] = { 0, 0 };
#pragma unroll
    for (int w = 0; w < CREW; w++) value[w / TEAM] += sums[w * UP_ITEMS * 8 + threadIdx.x];
    a.hidden[(row * a.p.k + mine_pick) * gate.rows + r] =
        silu(value[0] * (expert_unit(a.e, GATE, unit[0]) * input_scale)) *
        (value[1] * (expert_unit(a.e, UP, unit[1]) * input_scale));
}

/* ---- down ---- */

/* Of rows that are quantized all slots are used, of others the parts: then a row begins where the unused slot
 * of the one before is. */
__host__ __device__ inline int slots_used(const cuda_matrix &w)
{
    return w.input == INPUT_FP8_ROW ? SLOTS : SLOTS - 1;
}

/* A hidden row into slots by a warp, quantized too; returns its scale. */
__device__ __forceinline__ float place_hidden(const cuda_matrix &w, __nv_bfloat16 *slots, int stride,
                                              const float *x)
{
    constexpr int EACH = 8;
    int lane = threadIdx.x % LANES;
    float top = 0;
#pragma unroll 1
    for (int first = lane; 2 * first < w.cols; first += EACH * LANES)
        top = fmaxf(top, place_pairs<EACH>(slots, stride, x, w.cols, first, LANES));
    float scale = fp8_input_scale(warp_max(top)), inverse = 1.0f / scale;
#pragma unroll 1
    for (int c = 2 * lane; c < w.cols; c += 2 * LANES)
        put_quantized(slots, stride, c, parts_sum(slots, stride, c), scale, inverse);
    return scale;
}

/* The picks' hidden rows into slots: by two warps each, or one where they are quantized. */
__device__ __forceinline__ void place_picks(const down_args &a, __nv_bfloat16 *slots, int stride,
                                            const float *hidden, float *input_scale)
{
    constexpr int EACH = 4;
    const cuda_matrix &w = a.e.m[DOWN];
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, each = slots_used(w) * stride;
    if (w.input == INPUT_FP8_ROW) {
#pragma unroll 1
        for (int j = warp; j < a.p.k; j += CREW) {
            float scale = place_hidden(w, slots + (size_t)j * each, stride, hidden + (size_t)j * w.cols);
            if (lane == 0) input_scale[j] = scale;
        }
        return;
    }
#pragma unroll 1
    for (int j = warp / 2; j < a.p.k; j += CREW / 2)
#pragma unroll 1
        for (int first = warp % 2 * LANES + lane; 2 * first < w.cols; first += EACH * 2 * LANES)
            place_pairs<EACH>(slots + (size_t)j * each, stride, hidden + (size_t)j * w.cols, w.cols, first,
                              2 * LANES);
}

/* The pair of the shared expert's hidden row that a thread begins with. */
struct shared_pair {
    float2 v;
    float scale;

    __device__ __forceinline__ shared_pair(const down_args &a, int64_t row)
    {
        v = float2{};
        scale = 1;
        if (2 * (int)threadIdx.x >= a.w.cols || !a.w.rows) return;
        v = load_pair(a.made.data + row * a.made.stride, 2 * threadIdx.x);
        if (a.w.input == INPUT_FP8_ROW) scale = __ldcg(a.made_scale + row);
    }

    __device__ __forceinline__ void place(const down_args &a, int64_t row, __nv_bfloat16 *slots,
                                          float *input_scale)
    {
        if (!a.w.rows) return;
        int stride = slot_stride(a.w.cols);
        float inverse = 1.0f / scale;
#pragma unroll 1
        for (int c = 2 * threadIdx.x; c < a.w.cols; c += 2 * BLOCK) {
            if (c >= 2 * BLOCK) v = load_pair(a.made.data + row * a.made.stride, c);
            if (a.w.input == INPUT_FP8_ROW)
                put_quantized(slots, stride, c, v, scale, inverse);
            else
                put_parts(slots, stride, c, v);
        }
        if (threadIdx.x == 0) *input_scale = scale;
    }
};

__host__ __device__ inline size_t down_shared(int k, const cuda_matrix &w, const cuda_matrix &shared)
{
    return ring_bytes(DOWN_RING, true) + (size_t)DOWN_TILES * (k + TEAM) * 8 * sizeof(float) +
           2 * ((size_t)(slots_used(w) * k + 1) * slot_stride(w.cols) +
                (size_t)SLOTS * slot_stride(shared.cols));
}

/* The jobs of a warp: of each of its team's tiles its picks, then its share of the shared expert. Lane i
 * knows job i. */
struct down_job {
    const uint8_t *tile;
    int at; /* of the sums: tile * (k + TEAM) + pick, or k + member */
};

/* Grid: blocks, rows. Shared memory: ring, sums [tile][k picks, TEAM of the shared expert][8], slots of picks
 * [k], slots of the shared expert. */
__global__ void __launch_bounds__(BLOCK, 2) experts_down(const __grid_constant__ down_args a)
{
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int expert[PICKS_MAX];
    __shared__ uint32_t keys[EXPERTS_MAX];
    __shared__ float weight[PICKS_MAX], input_scale[PICKS_MAX + 1];
    __shared__ float factor[PICKS_MAX]; /* of a pick's sums: its weight, and what FP4 is multiplied by */
    const cuda_matrix &w = a.e.m[DOWN];
    int k = a.p.k, stride = slot_stride(w.cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float *sums = (float *)(shared + ring_bytes(DOWN_RING, true));
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + DOWN_TILES * (k + TEAM) * 8);
    int slots_each = slots_used(w) * stride;
    __nv_bfloat16 *shared_slots = slots + (size_t)k * slots_each;
    int64_t row = blockIdx.y;
    int tiles = a.tiles + ((int)blockIdx.x < a.extra), team = warp / TEAM, member = warp % TEAM;
    let_next_start();
    stream<CUT | TILED, DOWN_RING> weights(shared);
    if (a.logits.data && warp == 0)
        choose(expert, weight, keys, a.logits.data + row * a.logits.stride, a.e.n, k);
    for (int j = threadIdx.x; !a.logits.data && j < k; j += BLOCK) {
        expert[j] = __ldcg(a.p.expert + row * k + j);
        weight[j] = __ldcg(a.p.weight + row * k + j);
    }
    __syncthreads();
    /* the team's tiles are team, team + 2, ... */
    int picked = (k - 1 - member) / TEAM + 1, own = k > member ? picked : 0, jobs = own + (a.w.rows ? 1 : 0);
    int mine = (tiles - team + 1) / 2 * jobs, asked = 0;
    int units = units_of(w.format, w.cols), shared_units = units_of(a.w.format, a.w.cols);
    share whole = { 0, units }, shared_share = share_at(shared_units, share_of(shared_units, TEAM), member);
    down_job job = {};
    bool last = false;
    if (lane < mine) {
        int i = lane / jobs, j = lane - i * jobs, tile = blockIdx.x + (team + 2 * i) * gridDim.x;
        last = j == own;
        job.tile = last ? tile_at(a.w, 0, tile) : tile_at(w, expert[member + j * TEAM], tile);
        job.at = (team + 2 * i) * (k + TEAM) + (last ? k + member : member + j * TEAM);
    }
    unsigned lasts = __ballot_sync(ALL, last);
    auto next = [&] {
        if (asked >= mine) return false;
        bool of_shared = lasts >> asked & 1;
        const cuda_matrix &m = of_shared ? a.w : w;
        const uint8_t *tile = (const uint8_t *)__shfl_sync(ALL, (unsigned long long)job.tile, asked++);
        int row_bytes = m.format == WEIGHT_NVFP4 ? 0 : row_bytes_of(m);
        share s = of_shared ? shared_share : whole;
        weights.begin(weights.lane_at(tile, row_bytes, s.first), row_bytes, s);
        return true;
    };
#pragma unroll 1
    for (int i = 0; i < DOWN_RING; i++) weights.ask(next);
    for (int j = threadIdx.x; j < k; j += BLOCK)
        factor[j] =
            weight[j] * (w.format == WEIGHT_NVFP4 ? FP4_UNIT / a.e.globals[DOWN * a.e.n + expert[j]] : 1);
    int tile = threadIdx.x / 8, r = (blockIdx.x + tile * gridDim.x) * 8 + threadIdx.x % 8;
    bool stores = tile < tiles && r < w.rows;
    float shared_unit = stores && a.w.rows ? unit_of(a.w, 0, r, a.w.global) : 0, old = 0, gate = 0;
    for (int j = warp; j < k; j += CREW)
        put_padding(slots + (size_t)j * slots_each, stride, w.cols, lane, LANES, slots_used(w));
    if (a.w.rows) put_padding(shared_slots, slot_stride(a.w.cols), a.w.cols, threadIdx.x, BLOCK);
    if (w.input != INPUT_FP8_ROW && (int)threadIdx.x < k) input_scale[threadIdx.x] = 1;
    wait_for_previous();
    shared_pair pair(a, row);
    place_picks(a, slots, stride, a.hidden + row * k * w.cols, input_scale);
    pair.place(a, row, shared_slots, &input_scale[k]);
    if (stores && a.add.data) old = __ldcg(a.add.data + row * a.add.stride + r);
    if (stores && a.w.rows) gate = __ldcg(a.shared_gate.data + row * a.shared_gate.stride);
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < mine; n++) {
        float sum[4];
        int at = __shfl_sync(ALL, job.at, n);
        bool of_shared = lasts >> n & 1;
        const cuda_matrix &m = of_shared ? a.w : w;
        int p = at % (k + TEAM);
        weights.template work<1>(sum, m.format, of_shared ? shared_share : whole,
                                 of_shared ? shared_slots : slots + (size_t)p * slots_each,
                                 of_shared ? slot_stride(a.w.cols) : stride, SLOTS, m.input == INPUT_FP8_ROW, next);
        if (lane < 4) *(float2 *)(sums + at * 8 + lane * 2) = make_float2(sum[0], sum[1]);
    }
    copy_wait<0>();
    __syncthreads();
    if (!stores) return;
    const float *from = sums + tile * (k + TEAM) * 8 + threadIdx.x % 8;
    float y = 0, sum = 0;
#pragma unroll 4
    for (int j = 0; j < k; j++) {
        float unit = w.format == WEIGHT_FP8 ? w.scale[(int64_t)expert[j] * w.rows + r] : 1;
        y = fmaf(factor[j] * input_scale[j] * unit, from[j * 8], y);
    }
    if (a.w.rows) {
#pragma unroll
        for (int m = 0; m < TEAM; m++) sum += from[(k + m) * 8];
        y = fmaf(sigmoid(gate) * shared_unit, sum * input_scale[k], y);
    }
    a.y.data[row * a.y.stride + r] = y;
    if (a.add.data) a.add.data[row * a.add.stride + r] = old + y;
}

__host__ __device__ inline size_t up_shared(const cuda_matrix &gate)
{
    return ring_bytes(UP_RING, gate.format == WEIGHT_NVFP4) + UP_SUMS * sizeof(float) +
           (size_t)SLOTS * slot_stride(gate.cols) * 2;
}

} /* namespace */

void cuda_route(struct queue *q, const struct picks *picks, struct mat logits)
{
    if (logits.cols > EXPERTS_MAX || picks->k > PICKS_MAX)
        queue_refuse(q, "route", "more than 1024 experts, or 64 of them a token, are not supported on a GPU");
    else
        launch(q, "route", true, route_rows, dim3(blocks(logits.rows, WARPS)), 0, *picks, logits);
}

bool cuda_experts_stream(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                         const struct cuda_experts *e, const struct moe_run *run)
{
    up_args u = {};
    down_args d = {};
    int limit = q->shared_max;
    if (cuda_experts_rows(q, y, x, p, e, run) || cuda_experts_near(q, y, x, p, e, run)) return true;
    u.e = d.e = *e;
    u.x = x;
    u.p = d.p = *p;
    d.hidden = u.hidden = q->hidden;
    d.y = y;
    for (int i = 0; i < 3; i++)
        if (!cuda_streams(q, &e->m[i])) return false;
    if (run) {
        d.w = cuda_matrix_of(run->w_down);
        if (!cuda_streams(q, &d.w) || e->n > EXPERTS_MAX) return false;
        u.logits = d.logits = run->logits;
        u.gate = run->gate;
        u.up = run->up;
        u.made = d.made = run->hidden;
        d.made_scale = u.made_scale = q->input_scale;
        d.shared_gate = run->shared_gate;
        d.add = run->x;
    }
    const cuda_matrix &gate = e->m[GATE], &down = e->m[DOWN];
    size_t of_up = up_shared(gate), of_down = down_shared(p->k, down, d.w);
    if (p->k > PICKS_MAX || of_up > (size_t)limit || of_down > (size_t)limit) return false;
    /* no more a block than it has room for, nor a warp than a list holds */
    int items = p->k * tiles_of(gate.rows), tiles = tiles_of(down.rows), sms = q->sms;
    int jobs = (p->k + TEAM - 1) / TEAM + 1,
        most = 2 * (LANES / jobs) < DOWN_TILES ? 2 * (LANES / jobs) : DOWN_TILES;
    unsigned up_blocks = blocks(items, UP_ITEMS), down_blocks = blocks(tiles, most);
    if (up_blocks < (unsigned)sms) up_blocks = (unsigned)(items < sms ? items : sms);
    if (down_blocks < (unsigned)sms) down_blocks = (unsigned)(tiles < sms ? tiles : sms);
    u.items = items / (int)up_blocks;
    u.extra = items % (int)up_blocks;
    d.tiles = tiles / (int)down_blocks;
    d.extra = tiles % (int)down_blocks;
    launch_side<BLOCK>(q, "experts", LEFT, gate.format == WEIGHT_NVFP4 ? experts_up<CUT | TILED> : experts_up<CUT>,
                       dim3(up_blocks, (unsigned)x.rows), of_up, u);
    launch_side<BLOCK>(q, "experts", RIGHT, experts_down, dim3(down_blocks, (unsigned)x.rows), of_down, d);
    return true;
}
