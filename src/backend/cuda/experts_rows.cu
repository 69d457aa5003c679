/* The experts that 2 to ROWS_TOGETHER rows picked, with the sums of experts.cu to the bit: NVFP4 whose inputs are taken as they
 * are. The multiprocessors are dealt out to the rows, a block each, and each of the two kernels has one block on them. Sixteen
 * weight rows are one operand of a tensor-core instruction, a row's slots the other. Experts that several rows picked are read
 * by each, mostly from the second cache.
 *
 * experts_up_rows: the router's choice, then a run of items: eight gate and the same eight up rows of a pick, whole tiles that
 * come by bulk copies through a ring of all warps. experts_down_rows: the choice, and the shared expert, while experts_up_rows
 * works; then pairs of tiles of a pick by a warp each, through a ring of its own; and the sum over picks, in order. */
#include "backend/cuda/barrier.cuh"
#include "backend/cuda/route.cuh"
#include "backend/cuda/stream.cuh"

namespace {

struct up_rows_args {
    cuda_experts e;
    mat x;
    picks p;
    mat logits;     /* data NULL: the picks are given */
    float *hidden;  /* [rows][k][intermediate] */
    int rows, ring; /* ring: items ahead */
};

struct down_rows_args {
    cuda_experts e;
    const float *hidden;
    picks p;
    mat logits, y, add; /* add.data NULL: no residual */
    cuda_matrix w;      /* shared down; rows 0: none */
    mat gate, up, made; /* the shared expert's products, and what becomes of them */
    mat shared_gate;
    int rows, most; /* pairs of tiles of a block at most */
};

constexpr int TOGETHER = CREW, RING_MOST = CREW / 2;                         /* items between meetings, and ahead at most */
static_assert(RING_MOST % 2 == 0 && TOGETHER % 2 == 0, "a place in the ring is one team's");
constexpr int DEPTH = 2, PAIR_BYTES = 2 * FP4_UNIT_BYTES, PARTS = SLOTS - 1; /* DEPTH: of a warp's ring, units of two tiles */
constexpr int TEAM = CREW / 2;
constexpr int SUMS = CREW / 2 * TOGETHER * 16; /* floats of a set */

/* The grid's blocks are dealt out to the rows: which of its row's blocks this is, and how many that has. */
struct row_block {
    int row, x, n;

    __device__ __forceinline__ explicit row_block(int rows)
    {
        int all = gridDim.x;
        row = ((blockIdx.x + 1) * rows - 1) / all;
        int first = row * all / rows;
        x = blockIdx.x - first;
        n = (row + 1) * all / rows - first;
    }
};

__host__ __device__ inline size_t up_rows_shared(const cuda_matrix &gate, int ring)
{
    return (size_t)ring * 2 * tile_bytes(gate) + 2 * SUMS * sizeof(float) + (size_t)SLOTS * slot_stride(gate.cols) * 2;
}

#if __CUDA_ARCH__ >= 900
/* The row's input by all warps but the first. */
__device__ __forceinline__ void place_input(__nv_bfloat16 *slots, int stride, const float *x, int cols)
{
    constexpr int AT_ONCE = 3, STEP = 2 * (BLOCK - LANES);
#pragma unroll 1
    for (int first = 2 * ((int)threadIdx.x - LANES); first < cols; first += AT_ONCE * STEP) {
        float2 v[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) v[i] = first + i * STEP < cols ? load_pair(x, first + i * STEP) : float2{};
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (first + i * STEP < cols) put_parts(slots, stride, first + i * STEP, v[i]);
    }
}

/* One side of item `number` of a row into place `slot` of the ring, by one thread. */
__device__ __forceinline__ void ask_tile(const up_rows_args &a, uint8_t *ring, uint64_t *full, const int *expert, int each,
                                         int number, int side, int slot)
{
    int pick = number / each, bytes = (int)tile_bytes(a.e.m[GATE]);
    barrier_expect(&full[slot], bytes);
    copy_bulk(shared_at(ring + (2 * slot + side) * bytes), tile_at(a.e.m[side], expert[pick], number - pick * each), bytes,
              &full[slot]);
}

/* A unit of two tiles against a row's slots, added to a and b as stream.cuh does. Lane 4 g + t: row g of both tiles with slots
 * 2 t and 2 t + 1, [0], [1] of the first, [2], [3] of the second. */
__device__ __forceinline__ void add_units(float (&a)[4], float (&b)[4], const uint8_t *first, const uint8_t *second,
                                          const __nv_bfloat16 *x)
{
    int lane = threadIdx.x % LANES;
    uint2 scale = *(const uint2 *)(first + 1024 + lane / 2 * 8), other = *(const uint2 *)(second + 1024 + lane / 2 * 8);
#pragma unroll
    for (int half = 0; half < 2; half++, x += FP4_UNIT_COLS / 2) {
        uint4 u = *(const uint4 *)(first + half * 512 + lane * 16), v = *(const uint4 *)(second + half * 512 + lane * 16);
        uint32_t p[4] = { u.x, u.y, u.z, u.w }, q[4] = { v.x, v.y, v.z, v.w };
        fp4_scales scales(half ? scale.y : scale.x), others(half ? other.y : other.x);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint4 w = *(const uint4 *)(x + i * 32);
            __nv_bfloat162 s = scales.of(i), r = others.of(i);
            mma(a, bf16_pair_product(fp4_pair<0>(p[i]), s), bf16_pair_product(fp4_pair<0>(q[i]), r),
                bf16_pair_product(fp4_pair<1>(p[i]), s), bf16_pair_product(fp4_pair<1>(q[i]), r), w.x, w.z);
            mma(b, bf16_pair_product(fp4_pair<2>(p[i]), s), bf16_pair_product(fp4_pair<2>(q[i]), r),
                bf16_pair_product(fp4_pair<3>(p[i]), s), bf16_pair_product(fp4_pair<3>(q[i]), r), w.y, w.w);
        }
    }
}

/* Sums of the three parts, for row g of both tiles; lanes 4 g get them. */
__device__ __forceinline__ float2 three_slots(const float (&a)[4], const float (&b)[4])
{
    bool low = threadIdx.x % 4 == 1; /* slots 2 and 3, of which the latter is not taken */
    float x = a[0] + b[0], y = a[2] + b[2];
    if (!low) x += a[1] + b[1], y += a[3] + b[3];
    return make_float2(x + __shfl_xor_sync(ALL, x, 1), y + __shfl_xor_sync(ALL, y, 1));
}
#endif

/* Grid: multiprocessors. Shared memory: ring of [gate, up] tiles, two sets of sums [share][item][gate, up][8], slots. Half the
 * warps take every other item; a warp has a share of its columns. */
__global__ void __launch_bounds__(BLOCK, 2) experts_up_rows(const __grid_constant__ up_rows_args a)
{
#if __CUDA_ARCH__ >= 900
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int expert[PICKS_MAX];
    __shared__ float weight[PICKS_MAX];
    __shared__ uint64_t full[RING_MOST], empty[RING_MOST];
    const cuda_matrix &gate = a.e.m[GATE];
    int bytes = (int)tile_bytes(gate), cols = gate.cols, stride = slot_stride(cols), units = units_of(WEIGHT_NVFP4, cols);
    float *sums = (float *)(shared + a.ring * 2 * bytes);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + 2 * SUMS);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, team = warp / TEAM, member = warp % TEAM;
    row_block at(a.rows);
    int64_t row = at.row;
    int each = tiles_of(gate.rows), all = a.p.k * each, fewest = all / at.n, extra = all - fewest * at.n;
    int begin = at.x * fewest + (at.x < extra ? at.x : extra), items = fewest + (at.x < extra);
    share s = share_at(units, share_of(units, TEAM), member);
    if ((int)threadIdx.x < a.ring) barrier_init(&full[threadIdx.x], 2), barrier_init(&empty[threadIdx.x], TEAM);
    if (warp == 0) barriers_ready();
    put_padding(slots, stride, cols, threadIdx.x, BLOCK);
    wait_for_previous();
    let_next_start(); /* which may count on the logits */
    if (warp > 0)
        place_input(slots, stride, a.x.data + row * a.x.stride, cols);
    else if (a.logits.data)
        choose(expert, at.x == 0 ? weight : nullptr, (uint32_t *)sums, a.logits.data + row * a.logits.stride, a.e.n, a.p.k);
    else
        for (int j = lane; j < a.p.k; j += LANES) expert[j] = __ldcg(a.p.expert + row * a.p.k + j);
    __syncthreads();
    if (lane == 0 && warp / 2 < a.ring && warp / 2 < items)
        ask_tile(a, shared, full, expert, each, begin + warp / 2, warp % 2, warp / 2);
    __syncwarp();
    if (a.logits.data && at.x == 0 && warp == 0)
        for (int j = lane; j < a.p.k; j += LANES) {
            a.p.expert[row * a.p.k + j] = expert[j];
            a.p.weight[row * a.p.k + j] = weight[j];
        }
    int slot = team, phase = 0, of_lane = lane / 4 % SLOTS;
    const __nv_bfloat16 *x = slots + (of_lane < SLOTS - 1 ? of_lane : 0) * stride + s.first * FP4_UNIT_COLS + lane % 4 * 8;
#pragma unroll 1
    for (int first = 0; first < items; first += TOGETHER, sums += first & TOGETHER ? SUMS : -SUMS) {
        int count = items - first < TOGETHER ? items - first : TOGETHER, number = begin + first + threadIdx.x / 8;
        int pick = number / each, r = (number - pick * each) * 8 + threadIdx.x % 8;
        bool stores = (int)threadIdx.x / 8 < count && r < gate.rows;
        float unit[2] = { 1, 1 };
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (stores) unit[i] = a.e.globals[i * a.e.n + expert[pick]];
#pragma unroll 1
        for (int i = team; i < count; i += 2) {
            float p[4] = {}, q[4] = {};
            const uint8_t *tile = shared + 2 * slot * bytes + s.first * FP4_UNIT_BYTES;
            barrier_wait(&full[slot], phase);
#pragma unroll 1
            for (int u = 0; u < s.n; u++)
                add_units(p, q, tile + u * FP4_UNIT_BYTES, tile + bytes + u * FP4_UNIT_BYTES, x + u * FP4_UNIT_COLS);
            float2 sum = three_slots(p, q);
            float *to = sums + (member * TOGETHER + i) * 16 + lane / 4;
            if (lane % 4 == 0) to[0] = sum.x, to[8] = sum.y;
            if (first + i + a.ring < items && lane == 0) {
                barrier_arrive(&empty[slot]);
                if (member == i / 2) { /* this item's place is its to fill again */
                    barrier_wait(&empty[slot], phase);
                    for (int side = 0; side < 2; side++)
                        ask_tile(a, shared, full, expert, each, begin + first + i + a.ring, side, slot);
                }
            }
            __syncwarp();
            slot += 2;
            if (slot >= a.ring) slot -= a.ring, phase ^= 1;
        }
        __syncthreads();
        if (!stores) continue;
        float value[2] = { 0, 0 };
#pragma unroll
        for (int w = 0; w < TEAM; w++)
#pragma unroll
            for (int side = 0; side < 2; side++)
                value[side] += sums[(w * TOGETHER + threadIdx.x / 8) * 16 + side * 8 + threadIdx.x % 8];
        a.hidden[(row * a.p.k + pick) * gate.rows + r] =
            silu(value[0] * (FP4_UNIT / unit[0])) * (value[1] * (FP4_UNIT / unit[1]));
    }
#endif
}

__host__ __device__ inline int shares_of(const cuda_matrix &w)
{
    int units = units_of(w.format, w.cols);
    return w.rows ? (units + share_of(units, TEAM) - 1) / share_of(units, TEAM) : 0;
}

__host__ __device__ inline size_t down_sums(const down_rows_args &a)
{
    return (size_t)2 * a.most * (a.p.k + shares_of(a.w)) * 8;
}

__host__ __device__ inline size_t down_rows_shared(const down_rows_args &a)
{
    size_t slots = ((size_t)a.p.k * PARTS * slot_stride(a.e.m[DOWN].cols) + (size_t)SLOTS * slot_stride(a.w.cols)) * 2;
    size_t keys = EXPERTS_MAX * sizeof(uint32_t);
    return (size_t)CREW * DEPTH * PAIR_BYTES + down_sums(a) * sizeof(float) + (slots < keys ? keys : slots);
}

#if __CUDA_ARCH__ >= 900
/* The shared expert's hidden row as parts, by all warps but the first; returns the largest magnitude. */
__device__ __forceinline__ float place_shared(const down_rows_args &a, int64_t row, bool first, __nv_bfloat16 *slots,
                                              int stride)
{
    const float *gate = a.gate.data + row * a.gate.stride, *up = a.up.data + row * a.up.stride;
    float top = 0;
#pragma unroll 1
    for (int c = 2 * ((int)threadIdx.x - LANES); c < a.w.cols; c += 2 * (BLOCK - LANES)) {
        float2 x = load_pair(gate, c), y = load_pair(up, c);
        x = make_float2(silu(x.x) * y.x, silu(x.y) * y.y);
        if (first) a.made.data[row * a.made.stride + c] = x.x, a.made.data[row * a.made.stride + c + 1] = x.y;
        top = fmaxf(top, put_parts(slots, stride, c, x));
    }
    return top;
}

/* Units s of a tile as it lies in device memory. */
template <int FORMAT>
__device__ __forceinline__ void read_tile(float (&sum)[4], const uint8_t *tile, int row_bytes, share s,
                                          const __nv_bfloat16 *slots, int stride, bool quantized)
{
    constexpr int COLS = unit_cols(FORMAT), LANE_COLS = FORMAT == WEIGHT_FP8 ? 16 : 8;
    using words = stream<CUT | TILED, 1>;
    int lane = threadIdx.x % LANES, slot = lane / 4 % SLOTS;
    const __nv_bfloat16 *x = slots + slot * stride + s.first * COLS + lane % 4 * LANE_COLS;
    const uint8_t *at = words::lane_at(tile, row_bytes, s.first);
    int rest = row_bytes - s.first * UNIT_BYTES - lane % 4 * 16;
    float a[4] = {}, b[4] = {};
#pragma unroll 1
    for (int u = 0; u < s.n; u++, x += COLS, at += UNIT_BYTES, rest -= UNIT_BYTES) {
        uint4 low = rest > 0 ? *(const uint4 *)at : uint4{}, high = rest > PIECE ? *(const uint4 *)(at + PIECE) : uint4{};
        words::piece<1, FORMAT>(a, b, low, 0, x, 0);
        words::piece<1, FORMAT>(a, b, high, 0, x + COLS / 2, 0);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = a[i] + b[i ^ 2];
    words::collect<1>(sum, quantized == (slot == SLOTS - 1));
}

/* The shared expert's sums, a share of a tile's columns a warp at a time. */
__device__ __forceinline__ void sum_shared(const down_rows_args &a, float *sums, const row_block &at, int pairs,
                                           const __nv_bfloat16 *slots, int stride)
{
    int units = units_of(a.w.format, a.w.cols), shares = shares_of(a.w), lane = threadIdx.x % LANES;
    bool quantized = a.w.input == INPUT_FP8_ROW;
#pragma unroll 1
    for (int i = threadIdx.x / LANES; i < 2 * pairs * shares; i += CREW) {
        int t = i / shares, member = i - t * shares;
        share s = share_at(units, share_of(units, TEAM), member);
        const uint8_t *tile = tile_at(a.w, 0, 2 * (at.x + t / 2 * at.n) + t % 2);
        float sum[4];
        if (a.w.format == WEIGHT_NVFP4)
            stream<TILED, 1>::work_tile(sum, tile, s, slots, stride, quantized);
        else if (a.w.format == WEIGHT_FP8)
            read_tile<WEIGHT_FP8>(sum, tile, row_bytes_of(a.w), s, slots, stride, quantized);
        else
            read_tile<WEIGHT_BF16>(sum, tile, row_bytes_of(a.w), s, slots, stride, quantized);
        if (lane < 4) *(float2 *)(sums + (t * (a.p.k + shares) + a.p.k + member) * 8 + lane * 2) = make_float2(sum[0], sum[1]);
    }
}

/* The picks' hidden rows as parts, two warps each. */
__device__ __forceinline__ void place_hidden(const down_rows_args &a, int64_t row, __nv_bfloat16 *slots, int stride)
{
    constexpr int AT_ONCE = 4, STEP = 2 * 2 * LANES;
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, cols = a.e.m[DOWN].cols;
#pragma unroll 1
    for (int j = warp / 2; j < a.p.k; j += CREW / 2) {
        const float *x = a.hidden + (row * a.p.k + j) * cols;
#pragma unroll 1
        for (int c = 2 * (warp % 2 * LANES + lane); c < cols; c += AT_ONCE * STEP) {
            float2 v[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) v[i] = c + i * STEP < cols ? load_pair(x, c + i * STEP) : float2{};
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (c + i * STEP < cols) put_parts(slots + j * PARTS * stride, stride, c + i * STEP, v[i]);
        }
    }
}

/* A warp's jobs: a pick and a pair of tiles each, every CREW-th of all. */
struct down_jobs {
    int pair, pick, unit;

    __device__ __forceinline__ void advance(int units, int k)
    {
        if (++unit < units) return;
        unit = 0;
        pick += CREW;
        while (pick >= k) pick -= k, pair++;
    }
};

/* Both tiles' units into a place of the warp's ring, by one thread. */
__device__ __forceinline__ void ask_units(const cuda_matrix &w, const row_block &at, const int *expert, const down_jobs &job,
                                          uint8_t *to, uint64_t *come)
{
    const uint8_t *from = tile_at(w, expert[job.pick], 2 * (at.x + job.pair * at.n)) + job.unit * FP4_UNIT_BYTES;
    barrier_expect(come, PAIR_BYTES);
    copy_bulk(shared_at(to), from, FP4_UNIT_BYTES, come);
    copy_bulk(shared_at(to + FP4_UNIT_BYTES), from + tile_bytes(w), FP4_UNIT_BYTES, come);
}
#endif

/* Grid: multiprocessors. Shared memory: a ring a warp, sums [tile][picks, shares of the shared expert][8], slots of the picks
 * and of the shared expert. */
__global__ void __launch_bounds__(BLOCK, 2) experts_down_rows(const __grid_constant__ down_rows_args a)
{
#if __CUDA_ARCH__ >= 900
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int expert[PICKS_MAX];
    __shared__ float weight[PICKS_MAX], factor[PICKS_MAX], scratch[CREW];
    __shared__ uint64_t come[CREW][DEPTH];
    const cuda_matrix &w = a.e.m[DOWN];
    int k = a.p.k, stride = slot_stride(w.cols), shared_stride = slot_stride(a.w.cols), units = units_of(WEIGHT_NVFP4, w.cols);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, shares = shares_of(a.w), sums_each = (k + shares) * 8;
    uint8_t *ring = shared + warp * DEPTH * PAIR_BYTES;
    float *sums = (float *)(shared + CREW * DEPTH * PAIR_BYTES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + down_sums(a)), *shared_slots = slots + k * PARTS * stride;
    row_block at(a.rows);
    int64_t row = at.row;
    int pairs = (tiles_of(w.rows) / 2 - at.x + at.n - 1) / at.n, all = pairs * k;
    let_next_start();
    if (lane < DEPTH) barrier_init(&come[warp][lane], 1);
    barriers_ready();
    if (warp == 0) {
        if (a.logits.data)
            choose(expert, weight, (uint32_t *)slots, a.logits.data + row * a.logits.stride, a.e.n, k);
        else
            for (int j = lane; j < k; j += LANES) {
                expert[j] = __ldcg(a.p.expert + row * k + j);
                weight[j] = __ldcg(a.p.weight + row * k + j);
            }
    }
    __syncthreads();
    down_jobs job = { 0, warp, 0 };
    while (job.pick >= k) job.pick -= k, job.pair++;
    down_jobs asked = job;
    int steps = (all - warp + CREW - 1) / CREW * units;
    for (int i = 0; i < DEPTH && i < steps; i++) {
        if (lane == 0) ask_units(w, at, expert, asked, ring + i * PAIR_BYTES, &come[warp][i]);
        asked.advance(units, k);
    }
    __syncwarp();
    for (int j = threadIdx.x; j < k; j += BLOCK) factor[j] = weight[j] * (FP4_UNIT / a.e.globals[DOWN * a.e.n + expert[j]]);
    for (int j = warp; j < k; j += CREW) put_padding(slots + j * PARTS * stride, stride, w.cols, lane, LANES, PARTS);
    float input_scale = 1;
    if (a.w.rows) {
        float top = 0;
        put_padding(shared_slots, shared_stride, a.w.cols, threadIdx.x, BLOCK);
        if (warp > 0) top = place_shared(a, row, at.x == 0, shared_slots, shared_stride);
        top = block_max<CREW>(top, scratch);
        if (a.w.input == INPUT_FP8_ROW) {
            input_scale = fp8_input_scale(top);
#pragma unroll 1
            for (int c = 2 * threadIdx.x; c < a.w.cols; c += 2 * BLOCK)
                put_quantized(shared_slots, shared_stride, c, parts_sum(shared_slots, shared_stride, c), input_scale,
                              1.0f / input_scale);
            __syncthreads();
        }
        sum_shared(a, sums, at, pairs, shared_slots, shared_stride);
    }
    int t = threadIdx.x / 8, r = (2 * (at.x + t / 2 * at.n) + t % 2) * 8 + threadIdx.x % 8;
    bool stores = t < 2 * pairs && r < w.rows;
    float shared_unit = stores && a.w.rows ? unit_of(a.w, 0, r, a.w.global) : 0, old = 0, gate = 0;
    wait_for_previous();
    place_hidden(a, row, slots, stride);
    if (stores && a.add.data) old = __ldcg(a.add.data + row * a.add.stride + r);
    if (stores && a.w.rows) gate = __ldcg(a.shared_gate.data + row * a.shared_gate.stride);
    __syncthreads();
    int slot = 0, phase = 0, of_lane = lane / 4 % SLOTS;
    const __nv_bfloat16 *lane_slot = slots + (of_lane < PARTS ? of_lane : 0) * stride + lane % 4 * 8;
    float p[4] = {}, q[4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        const uint8_t *unit = ring + slot * PAIR_BYTES;
        barrier_wait(&come[warp][slot], phase);
        add_units(p, q, unit, unit + FP4_UNIT_BYTES, lane_slot + job.pick * PARTS * stride + job.unit * FP4_UNIT_COLS);
        __syncwarp();
        if (step + DEPTH < steps && lane == 0) ask_units(w, at, expert, asked, ring + slot * PAIR_BYTES, &come[warp][slot]);
        asked.advance(units, k);
        if (++slot == DEPTH) slot = 0, phase ^= 1;
        if (job.unit + 1 == units) {
            float2 sum = three_slots(p, q);
            float *to = sums + 2 * job.pair * sums_each + job.pick * 8 + lane / 4;
            if (lane % 4 == 0) to[0] = sum.x, to[sums_each] = sum.y;
#pragma unroll
            for (int i = 0; i < 4; i++) p[i] = q[i] = 0;
        }
        job.advance(units, k);
    }
    __syncthreads();
    if (!stores) return;
    const float *from = sums + t * sums_each + threadIdx.x % 8;
    float y = 0, sum = 0;
#pragma unroll 4
    for (int j = 0; j < k; j++) y = fmaf(factor[j], from[j * 8], y);
    if (a.w.rows) {
        for (int m = 0; m < shares; m++) sum += from[(k + m) * 8];
        y = fmaf(sigmoid(gate) * shared_unit, sum * input_scale, y);
    }
    a.y.data[row * a.y.stride + r] = y;
    if (a.add.data) a.add.data[row * a.add.stride + r] = old + y;
#endif
}

/* Items ahead; 0: not even two. An even number: so a place in the ring is always one team's. Were it the other's in turn, a team
 * that is ahead could find the parity it waits for in a place that has not been filled once, and arrive there uncounted. */
int ring_of(const struct queue *q, const cuda_matrix &gate)
{
    size_t limit = (size_t)q->shared_max < LEFT_SHARED ? (size_t)q->shared_max : LEFT_SHARED;
    int ring = RING_MOST;
    while (ring > 0 && up_rows_shared(gate, ring) > limit) ring -= 2;
    return ring;
}

/* The arguments of both kernels; false: not for these shapes. */
bool together_args(const struct queue *q, up_rows_args &u, down_rows_args &d, const struct cuda_experts *e, int64_t rows, int k,
                   const struct moe_run *run)
{
    for (int i = 0; i < 3; i++)
        if (e->m[i].format != WEIGHT_NVFP4 || e->m[i].input != INPUT_AS_IS || !cuda_streams(q, &e->m[i])) return false;
    if (!q->has_pdl || rows < 2 || rows > ROWS_TOGETHER || e->n > EXPERTS_MAX || k > PICKS_MAX) return false;
    int pairs = tiles_of(e->m[DOWN].rows) / 2, each = q->sms / (int)rows;
    u.e = d.e = *e;
    u.p.k = d.p.k = k;
    u.rows = d.rows = (int)rows;
    u.ring = ring_of(q, e->m[GATE]);
    if (run) d.w = cuda_matrix_of(run->w_down);
    if (each == 0 || u.ring == 0 || tiles_of(e->m[DOWN].rows) % 2 || (run && !cuda_streams(q, &d.w))) return false;
    d.most = (pairs + each - 1) / each;
    return 2 * d.most * 8 <= BLOCK && down_rows_shared(d) + 4096 <= (size_t)q->shared_max;
}

} /* namespace */

bool cuda_experts_together(const struct queue *q, const struct moe_run *r)
{
    up_rows_args u = {};
    down_rows_args d = {};
    return together_args(q, u, d, static_cast<const cuda_experts *>(r->experts->bound), r->h.rows, r->picks->k, r);
}

bool cuda_experts_rows(struct queue *q, struct mat y, struct mat x, const struct picks *p, const struct cuda_experts *e,
                       const struct moe_run *run)
{
    up_rows_args u = {};
    down_rows_args d = {};
    if (!together_args(q, u, d, e, x.rows, p->k, run)) return false;
    u.x = x;
    u.p = d.p = *p;
    d.hidden = u.hidden = q->hidden;
    d.y = y;
    if (run) {
        u.logits = d.logits = run->logits;
        d.gate = run->gate;
        d.up = run->up;
        d.made = run->hidden;
        d.shared_gate = run->shared_gate;
        d.add = run->x;
    }
    dim3 grid((unsigned)q->sms);
    launch_side<BLOCK>(q, "experts", LEFT, experts_up_rows, grid, up_rows_shared(e->m[GATE], u.ring), u);
    launch_side<BLOCK>(q, "experts", RIGHT, experts_down_rows, grid, down_rows_shared(d), d);
    return true;
}
