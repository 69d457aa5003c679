/* The mixture of experts for few rows: two kernels, the router's choice inside each. A block does a share of one row's
 * work.
 *
 * experts_up: the k best of the router's logits; then eight gate rows by one half of the warps and the same eight up rows by
 * the other, split along columns.
 * experts_down: eight rows of the output by eight warps, warp j on the expert of pick j (j + 8, ...) and all of them on a
 * share of the shared expert's; then the sum over picks in order, the shared expert behind its gate, and the residual. It
 * starts when the logits are final and chooses for itself, so that its weights come while experts_up still works. */
#include "backend/cuda/route.cuh"
#include "backend/cuda/stream.cuh"

namespace {

struct up_args {
    cuda_experts e;
    mat x;
    picks p;
    mat logits;    /* data NULL: the picks are given */
    float *hidden; /* [rows][k][intermediate] */
    mat gate, up, made; /* the shared expert's products, and what becomes of them; made.data NULL: no shared expert */
};

struct down_args {
    cuda_experts e;
    const float *hidden;
    picks p;
    mat y, add; /* add.data NULL: no residual */
    mat logits;
    cuda_matrix w; /* shared down; rows 0: none */
    mat made, shared_gate;
};

constexpr int TEAM = CREW / 2, UP_ITEMS = 16, DOWN_TILES = 4; /* of a block at most */
constexpr int UP_SUMS = CREW * UP_ITEMS * 8;                  /* floats */

/* ---- routing ---- */

__global__ void route_rows(picks p, mat logits)
{
    __shared__ uint32_t keys[WARPS][EXPERTS_MAX];
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / LANES;
    if (row >= logits.rows) return;
    choose(p.expert + row * p.k, p.weight + row * p.k, keys[threadIdx.x / LANES], logits.data + row * logits.stride,
           (int)logits.cols, p.k);
}

/* N pairs of columns of a row into slots, pairs first, first + step, ...; returns the largest magnitude. */
template <int N>
__device__ __forceinline__ float place_pairs(__nv_bfloat16 *slots, int stride, const float *x, int cols, int first, int step)
{
    float2 v[N];
    float top = 0;
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = 2 * (first + i * step) < cols ? load_pair(x, 2 * (first + i * step)) : float2{};
#pragma unroll
    for (int i = 0; i < N; i++)
        if (2 * (first + i * step) < cols) top = fmaxf(top, put_parts(slots, stride, 2 * (first + i * step), v[i]));
    return top;
}

/* A warp's part of expert `number` of e, a tile of which begins at row 8 * tile. */
__device__ __forceinline__ part expert_part(const cuda_matrix &m, int number, int tile, int w, int crew)
{
    return part_of(m, tile_at(m, number, tile), w, crew);
}

__device__ __forceinline__ float expert_unit(const cuda_experts &e, int which, int number, int row)
{
    const cuda_matrix &m = e.m[which];
    return unit_of(m, number, row, m.format == WEIGHT_NVFP4 ? e.globals[which * e.n + number] : 1);
}

/* ---- gate and up ---- */

/* Grid: blocks, rows. Shared memory: ring, sums [warp][item][8], slots. Item i of block b is number b + i * gridDim.x: eight
 * gate and eight up rows of a pick. */
__global__ void __launch_bounds__(BLOCK, 2) experts_up(const __grid_constant__ up_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int expert[PICKS_MAX];
    __shared__ uint32_t keys[EXPERTS_MAX];
    __shared__ float weight[PICKS_MAX], scratch[CREW];
    const cuda_matrix &gate = a.e.m[GATE];
    float *sums = (float *)(shared + RING_BYTES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + UP_SUMS);
    int cols = gate.cols, stride = slot_stride(cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int each = tiles_of(gate.rows), items = (a.p.k * each - 1 - (int)blockIdx.x) / (int)gridDim.x + 1;
    int64_t row = blockIdx.y;
    const float *x = a.x.data + row * a.x.stride;
    float top = 0, input_scale = 1;
    stream weights(shared);
    wait_for_previous();
    let_next_start(); /* which may count on the logits */
    if (warp == 0) {
        if (a.logits.data)
            choose(expert, weight, keys, a.logits.data + row * a.logits.stride, a.e.n, a.p.k);
        else
            for (int j = lane; j < a.p.k; j += LANES) expert[j] = __ldcg(a.p.expert + row * a.p.k + j);
    } else {
        for (int first = threadIdx.x - LANES; 2 * first < cols; first += 3 * (BLOCK - LANES))
            top = fmaxf(top, place_pairs<3>(slots, stride, x, cols, first, BLOCK - LANES));
        put_padding(slots, stride, cols, threadIdx.x - LANES, BLOCK - LANES);
    }
    __syncthreads();
    part list = {};
    if (lane < items) {
        int number = blockIdx.x + lane * gridDim.x, pick = number / each;
        list = expert_part(a.e.m[warp / TEAM], expert[pick], number - pick * each, warp % TEAM, TEAM);
    }
    weights.fill(list, items);
    if (gate.input == INPUT_FP8_ROW) {
        input_scale = fp8_input_scale(block_max<CREW>(top, scratch));
#pragma unroll 1
        for (int c = 2 * threadIdx.x; c < cols; c += 2 * BLOCK)
            put_quantized(slots, stride, c, parts_sum(slots, stride, c), input_scale, 1.0f / input_scale);
        __syncthreads();
    }
    if (a.made.data && blockIdx.x == gridDim.x - 1)
        for (int c = threadIdx.x; c < a.made.cols; c += BLOCK)
            a.made.data[row * a.made.stride + c] =
                silu(__ldcg(a.gate.data + row * a.gate.stride + c)) * __ldcg(a.up.data + row * a.up.stride + c);
    if (a.logits.data && blockIdx.x == 0 && warp == 0)
        for (int j = lane; j < a.p.k; j += LANES) {
            a.p.expert[row * a.p.k + j] = expert[j];
            a.p.weight[row * a.p.k + j] = weight[j];
        }
    /* the thread's output */
    int number = blockIdx.x + threadIdx.x / 8 * gridDim.x, pick = number / each;
    int r = (number - pick * each) * 8 + threadIdx.x % 8;
    bool mine = (int)threadIdx.x / 8 < items && r < gate.rows;
    float unit[2] = { 1, 1 };
    for (int i = 0; mine && i < 2; i++) unit[i] = expert_unit(a.e, i, expert[pick], r) * input_scale;
#pragma unroll 1
    for (int i = 0; i < items; i++) {
        float sum[4];
        weights.work<1>(sum, i, slots, stride, gate.input == INPUT_FP8_ROW, list, items);
        if (lane < 4) *(float2 *)(sums + (warp * UP_ITEMS + i) * 8 + lane * 2) = make_float2(sum[0], sum[1]);
    }
    copy_wait<0>();
    __syncthreads();
    if (!mine) return;
    float value[2] = { 0, 0 };
#pragma unroll
    for (int w = 0; w < CREW; w++) value[w / TEAM] += sums[w * UP_ITEMS * 8 + threadIdx.x];
    a.hidden[(row * a.p.k + pick) * gate.rows + r] = silu(value[0] * unit[0]) * (value[1] * unit[1]);
}

/* ---- down ---- */

/* A hidden row into slots by a warp; returns its scale. */
__device__ __forceinline__ float place_hidden(const cuda_matrix &w, __nv_bfloat16 *slots, int stride, const float *x)
{
    constexpr int EACH = 8;
    int lane = threadIdx.x % LANES;
    float top = 0;
#pragma unroll 1
    for (int first = lane; 2 * first < w.cols; first += EACH * LANES)
        top = fmaxf(top, place_pairs<EACH>(slots, stride, x, w.cols, first, LANES));
    put_padding(slots, stride, w.cols, lane, LANES);
    if (w.input != INPUT_FP8_ROW) return 1;
    float scale = fp8_input_scale(warp_max(top)), inverse = 1.0f / scale;
#pragma unroll 1
    for (int c = 2 * lane; c < w.cols; c += 2 * LANES)
        put_quantized(slots, stride, c, parts_sum(slots, stride, c), scale, inverse);
    return scale;
}

__host__ __device__ inline size_t down_shared(int k, int cols, int shared_cols)
{
    return RING_BYTES + (size_t)DOWN_TILES * (k + TEAM) * 8 * sizeof(float) +
           (size_t)SLOTS * 2 * ((size_t)k * slot_stride(cols) + slot_stride(shared_cols));
}

/* Grid: blocks, rows. Shared memory: ring, sums [tile][k picks, TEAM of the shared expert][8], slots of picks [k], slots of
 * the shared expert. */
__global__ void __launch_bounds__(BLOCK, 2) experts_down(const __grid_constant__ down_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int expert[PICKS_MAX];
    __shared__ uint32_t keys[EXPERTS_MAX];
    __shared__ float weight[PICKS_MAX], input_scale[PICKS_MAX + 1];
    __shared__ float factor[PICKS_MAX]; /* of a pick's sums: its weight, and what FP4 is multiplied by */
    const cuda_matrix &w = a.e.m[DOWN];
    int k = a.p.k, stride = slot_stride(w.cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float *sums = (float *)(shared + RING_BYTES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + DOWN_TILES * (k + TEAM) * 8);
    __nv_bfloat16 *shared_slots = slots + (size_t)k * SLOTS * stride;
    int64_t row = blockIdx.y;
    int tiles = (tiles_of(w.rows) - 1 - (int)blockIdx.x) / (int)gridDim.x + 1, team = warp / TEAM, member = warp % TEAM;
    let_next_start();
    stream weights(shared);
    if (a.logits.data && warp == 0)
        choose(expert, weight, keys, a.logits.data + row * a.logits.stride, a.e.n, k);
    for (int j = threadIdx.x; !a.logits.data && j < k; j += BLOCK) {
        expert[j] = __ldcg(a.p.expert + row * k + j);
        weight[j] = __ldcg(a.p.weight + row * k + j);
    }
    __syncthreads();
    /* the team's tiles are team, team + 2, ...; of each the warp's picks, then its share of the shared expert */
    int picked = (k - 1 - member) / TEAM + 1, own = k > member ? picked : 0, jobs = own + (a.w.rows ? 1 : 0);
    int mine = (tiles - team + 1) / 2 * jobs;
    part list = {};
    if (lane < mine) {
        int i = lane / jobs, j = lane - i * jobs, tile = blockIdx.x + (team + 2 * i) * gridDim.x;
        list = j < own ? expert_part(w, expert[member + j * TEAM], tile, 0, 1)
                       : expert_part(a.w, 0, tile, member, TEAM);
    }
    weights.fill(list, mine);
    for (int j = threadIdx.x; j < k; j += BLOCK)
        factor[j] = weight[j] * (w.format == WEIGHT_NVFP4 ? FP4_UNIT / a.e.globals[DOWN * a.e.n + expert[j]] : 1);
    wait_for_previous();
#pragma unroll 1
    for (int s = warp; s < k + (a.w.rows ? 1 : 0); s += CREW) {
        bool last = s == k;
        float scale = place_hidden(last ? a.w : w, slots + (size_t)s * SLOTS * stride, last ? slot_stride(a.w.cols) : stride,
                                   last ? a.made.data + row * a.made.stride : a.hidden + (row * k + s) * w.cols);
        if (lane == 0) input_scale[s] = scale;
    }
    int tile = threadIdx.x / 8, r = (blockIdx.x + tile * gridDim.x) * 8 + threadIdx.x % 8;
    bool stores = tile < tiles && r < w.rows;
    float old = 0, gate = 0;
    if (stores && a.add.data) old = __ldcg(a.add.data + row * a.add.stride + r);
    if (stores && a.w.rows)
        gate = sigmoid(__ldcg(a.shared_gate.data + row * a.shared_gate.stride)) * unit_of(a.w, 0, r, a.w.global);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < mine; i++) {
        float sum[4];
        int t = i / jobs, j = i - t * jobs, p = member + j * TEAM;
        bool last = j == own;
        weights.work<1>(sum, i, last ? shared_slots : slots + (size_t)p * SLOTS * stride, last ? slot_stride(a.w.cols) : stride,
                        (last ? a.w.input : w.input) == INPUT_FP8_ROW, list, mine);
        float *to = sums + ((team + 2 * t) * (k + TEAM) + (last ? k + member : p)) * 8 + lane * 2;
        if (lane < 4) *(float2 *)to = make_float2(sum[0], sum[1]);
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
        y = fmaf(gate, sum * input_scale[k], y);
    }
    a.y.data[row * a.y.stride + r] = y;
    if (a.add.data) a.add.data[row * a.add.stride + r] = old + y;
}

size_t up_shared(int cols)
{
    return RING_BYTES + UP_SUMS * sizeof(float) + (size_t)SLOTS * slot_stride(cols) * 2;
}

} /* namespace */

void cuda_route(struct queue *q, const struct picks *picks, struct mat logits)
{
    if (logits.cols > EXPERTS_MAX || picks->k > PICKS_MAX)
        queue_refuse(q, "route", "more than 1024 experts, or 64 of them a token, are not supported on a GPU");
    else
        launch(q, "route", false, route_rows, dim3(blocks(logits.rows, WARPS)), 0, *picks, logits);
}

bool cuda_experts_stream(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                         const struct cuda_experts *e, const struct moe_run *run)
{
    up_args u = {};
    down_args d = {};
    int limit = q->shared_max;
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
        d.shared_gate = run->shared_gate;
        d.add = run->x;
    }
    const cuda_matrix &gate = e->m[GATE], &down = e->m[DOWN];
    if (p->k > PICKS_MAX || up_shared(gate.cols) > (size_t)limit || down_shared(p->k, down.cols, d.w.cols) > (size_t)limit)
        return false;
    /* no more a block than it has room for, nor a warp than a list holds */
    int items = p->k * tiles_of(gate.rows), tiles = tiles_of(down.rows), sms = q->sms;
    int jobs = (p->k + TEAM - 1) / TEAM + 1, most = 2 * (LANES / jobs) < DOWN_TILES ? 2 * (LANES / jobs) : DOWN_TILES;
    unsigned up_blocks = blocks(items, UP_ITEMS), down_blocks = blocks(tiles, most);
    if (up_blocks < (unsigned)sms) up_blocks = (unsigned)(items < sms ? items : sms);
    if (down_blocks < (unsigned)sms) down_blocks = (unsigned)(tiles < sms ? tiles : sms);
    launch<BLOCK>(q, "experts", true, experts_up, dim3(up_blocks, (unsigned)x.rows), up_shared(gate.cols), u);
    launch<BLOCK>(q, "experts", true, experts_down, dim3(down_blocks, (unsigned)x.rows),
                  down_shared(p->k, down.cols, d.w.cols), d);
    return true;
}
