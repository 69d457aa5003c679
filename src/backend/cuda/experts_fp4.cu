/* The mixture of experts for few rows, as in experts.cu and with its sums to the bit, of NVFP4 experts whose inputs are taken as they
 * are, from compute capability 9.0 on. All weights of a block lie in its shared memory, where a few bulk copies put them.
 *
 * fp4_up: the choice, then the same eight rows of gate and up together, sixteen rows of a tensor-core instruction whose columns are
 * the input's slots; and, while their weights are on the way, the whole shared expert. fp4_down: the choice, and each warp's first unit of
 * weights decoded, while fp4_up works; then the picks' hidden rows. */
#include "backend/cuda/barrier.cuh"
#include "backend/cuda/route.cuh"
#include "backend/cuda/stream.cuh"

namespace {

struct up_args {
    cuda_experts e;
    mat x;
    picks p;
    mat logits;       /* data NULL: the picks are given */
    float *hidden;    /* [rows][k][intermediate] */
    unsigned matrix;  /* bytes of gate, or up, of an expert */
    int items, extra; /* of a block; blocks that have one more */
    cuda_matrix w;    /* shared down; rows 0: none */
    mat gate, up, made, shared; /* the shared expert's products, what becomes of the first two, and what down makes of that, not yet times
                                   the scales of its rows */
    int tiles, tiles_extra;     /* of shared down, as items */
};

struct down_args {
    cuda_experts e;
    const float *hidden;
    picks p;
    mat logits;
    mat y, add;              /* add.data NULL: no residual */
    cuda_matrix w;           /* shared down; rows 0: none */
    mat shared, shared_gate; /* what fp4_up made with it, and how much of that counts */
    unsigned matrix;                 /* bytes of down of an expert */
    float by_picks, by_eights;       /* 1 / k, and 1 / eights of columns of down */
    int tiles, extra;                /* of a block; blocks that have one more */
};

constexpr int TEAM = CREW / 2, ITEMS = CREW / 2, PLACED = SLOTS - 1;
/* Shared memory: what a block may ask for beside one that asks for LEFT_SHARED; what a kernel has besides. */
constexpr size_t RIGHT_SHARED = 100 * 1024, OWN_SHARED = 8 * 1024;

#if __CUDA_ARCH__ >= 900
/* A bulk copy, whose bytes the barrier waits for; by one thread. */
__device__ __forceinline__ void ask(uint32_t to, const uint8_t *from, int bytes, uint32_t barrier)
{
    barrier_expect(barrier, bytes);
    copy_bulk(to, from, bytes, barrier);
}

/* Zeros in n slots, from column `cols` on as far as products read. */
__device__ __forceinline__ void place_zeros(__nv_bfloat16 *slots, int n, int stride, int cols, int first, int step)
{
#pragma unroll 1
    for (int c = cols + 2 * first; c < stride - SLOT_PAD; c += 2 * step)
        for (int s = 0; s < n; s++) *(uint32_t *)(slots + s * stride + c) = 0;
}

/* n / d for small n, given 1 / d. */
__device__ __forceinline__ int quotient(int n, float inverse)
{
    return (int)(((float)n + 0.5f) * inverse);
}

__device__ __forceinline__ void choose_or_take(const mat &logits, const picks &p, int n, int64_t row, int *expert, float *weight,
                                               uint32_t *keys)
{
    if (logits.data)
        choose(expert, weight, keys, logits.data + row * logits.stride, n, p.k);
    else
#pragma unroll 1
        for (int j = threadIdx.x; j < p.k; j += LANES) {
            expert[j] = __ldcg(p.expert + row * p.k + j);
            if (weight) weight[j] = __ldcg(p.weight + row * p.k + j);
        }
}

/* This lane's part of a unit. */
struct fp4_unit {
    uint4 code[2];
    fp4_scales low, high;

    __device__ __forceinline__ fp4_unit(const uint8_t *unit)
        : code{ *(const uint4 *)(unit + threadIdx.x % LANES * 16), *(const uint4 *)(unit + 512 + threadIdx.x % LANES * 16) },
          low(*(const uint32_t *)(unit + 1024 + threadIdx.x % LANES / 2 * 8)),
          high(*(const uint32_t *)(unit + 1028 + threadIdx.x % LANES / 2 * 8))
    {
    }

    __device__ __forceinline__ fp4_pairs pairs(int i) const
    {
        const uint4 &c = code[i / 4];
        uint32_t word = i % 4 == 0 ? c.x : i % 4 == 1 ? c.y : i % 4 == 2 ? c.z : c.w;
        return fp4_pairs(word, (i / 4 ? high : low).of(i % 4));
    }
};

/* Units s of two tiles. Lanes 4 g get the sums of row g of both; x: slots. */
__device__ __forceinline__ void work_two(float (&sum)[2], const uint8_t *first, const uint8_t *second, share s,
                                         const __nv_bfloat16 *slots, int stride)
{
    int lane = threadIdx.x % LANES, slot = min(lane / 4 % SLOTS, PLACED - 1), t = lane % 4;
    const __nv_bfloat16 *x = slots + slot * stride + s.first * FP4_UNIT_COLS + t * 8;
    float a[4] = {}, b[4] = {};
    int at = s.first * FP4_UNIT_BYTES;
#pragma unroll 1
    for (int u = 0; u < s.n; u++, x += FP4_UNIT_COLS, at += FP4_UNIT_BYTES) {
        fp4_unit v(first + at), w(second + at);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint4 in = *(const uint4 *)(x + i * 32);
            fp4_pairs p = v.pairs(i), q = w.pairs(i);
            mma(a, p.v[0], q.v[0], p.v[1], q.v[1], in.x, in.y);
            mma(b, p.v[2], q.v[2], p.v[3], q.v[3], in.z, in.w);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) { /* of t 0 slots 0 and 1, of t 1 slot 2 and nothing */
        sum[i] = a[2 * i] + b[2 * i];
        sum[i] += t == 0 ? a[2 * i + 1] + b[2 * i + 1] : 0;
        sum[i] += __shfl_xor_sync(ALL, sum[i], 1);
    }
}

/* The shared expert's hidden row as parts; returns its largest magnitude over this warp. By all warps but the first, the last ones first. */
__device__ __forceinline__ float place_shared(const up_args &a, int64_t row, __nv_bfloat16 *slots, int stride)
{
    const float *gate = a.gate.data + row * a.gate.stride, *up = a.up.data + row * a.up.stride;
    float top = 0;
#pragma unroll 1
    for (int c = 2 * (BLOCK - 1 - threadIdx.x); c < a.w.cols; c += 2 * (BLOCK - LANES)) {
        float2 x = load_pair(gate, c), y = load_pair(up, c);
        x = make_float2(silu(x.x) * y.x, silu(x.y) * y.y);
        if (blockIdx.x == gridDim.x - 1) { /* of those that have least to do */
            float *made = a.made.data + row * a.made.stride + c;
            made[0] = x.x;
            made[1] = x.y;
        }
        top = fmaxf(top, put_parts(slots, stride, c, x));
    }
    return warp_max(top);
}

/* Units s of a tile of rows as stored. */
template <int FORMAT>
__device__ __forceinline__ void work_rows(float (&sum)[4], const uint8_t *tile, int row_bytes, share s, const __nv_bfloat16 *slots,
                                          int stride, bool quantized)
{
    constexpr int COLS = unit_cols(FORMAT), LANE_COLS = FORMAT == WEIGHT_FP8 ? 16 : 8;
    int lane = threadIdx.x % LANES, g = lane / 4, at = s.first * UNIT_BYTES + lane % 4 * 16;
    const __nv_bfloat16 *x = slots + g % SLOTS * stride + s.first * COLS + lane % 4 * LANE_COLS;
    float a[4] = {}, b[4] = {};
    tile += g * row_bytes;
#pragma unroll 1
    for (int u = 0; u < s.n; u++, x += COLS, at += UNIT_BYTES) {
        uint4 low = at < row_bytes ? *(const uint4 *)(tile + at) : uint4{};
        uint4 high = at + PIECE < row_bytes ? *(const uint4 *)(tile + at + PIECE) : uint4{};
        stream<WHOLE, 1>::template piece<1, FORMAT>(a, b, low, 0, x, 0);
        stream<WHOLE, 1>::template piece<1, FORMAT>(a, b, high, 0, x + COLS / 2, 0);
    }
    for (int i = 0; i < 4; i++) sum[i] = a[i] + b[i ^ 2];
    stream<WHOLE, 1>::template collect<1>(sum, quantized == (g % SLOTS == SLOTS - 1));
}

__device__ __forceinline__ void work_shared(float (&sum)[4], const cuda_matrix &w, const uint8_t *tile, share s,
                                            const __nv_bfloat16 *slots, int stride)
{
    bool quantized = w.input == INPUT_FP8_ROW;
    if (w.format == WEIGHT_NVFP4)
        stream<TILED, 1>::work_tile(sum, tile, s, slots, stride, quantized);
    else if (w.format == WEIGHT_FP8)
        work_rows<WEIGHT_FP8>(sum, tile, row_bytes_of(w), s, slots, stride, quantized);
    else
        work_rows<WEIGHT_BF16>(sum, tile, row_bytes_of(w), s, slots, stride, quantized);
}
#endif

__host__ __device__ inline size_t up_shared(const cuda_matrix &gate, int items, const cuda_matrix &w, int tiles)
{
    size_t of_shared = w.rows ? tiles * (tile_bytes(w) + TEAM * 8 * sizeof(float)) + (size_t)SLOTS * slot_stride(w.cols) * 2 : 0;
    return (size_t)items * (2 * tile_bytes(gate) + TEAM * 16 * sizeof(float)) + (size_t)PLACED * slot_stride(gate.cols) * 2 + of_shared;
}

/* Grid: blocks, rows. Shared memory: of each item a gate and an up tile; the block's tiles of the shared expert; sums
 * [item][TEAM][gate and up, 8 rows], of the shared expert [tile][TEAM][8]; slots, the shared expert's slots. An item is eight
 * rows of a pick; those of a block follow one another. A tile's columns are shared out among a team of warps, the items among two. */
__global__ void __launch_bounds__(BLOCK, 2) fp4_up(const __grid_constant__ up_args a)
{
#if __CUDA_ARCH__ >= 900
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int expert[PICKS_MAX];
    __shared__ uint32_t keys[EXPERTS_MAX];
    __shared__ uint64_t come[ITEMS + 1]; /* the last: the shared expert's tiles */
    __shared__ float top[CREW];
    const cuda_matrix &gate = a.e.m[GATE];
    int cols = gate.cols, stride = slot_stride(cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int each = tiles_of(gate.rows), bytes = (int)tile_bytes(gate), most = a.items + (a.extra > 0);
    int items = a.items + ((int)blockIdx.x < a.extra);
    int begin = blockIdx.x * a.items + ((int)blockIdx.x < a.extra ? (int)blockIdx.x : a.extra);
    int tiles = a.tiles + ((int)blockIdx.x < a.tiles_extra), tiles_most = a.tiles + (a.tiles_extra > 0);
    int first_tile = blockIdx.x * a.tiles + ((int)blockIdx.x < a.tiles_extra ? (int)blockIdx.x : a.tiles_extra);
    int shared_bytes = a.w.rows ? (int)tile_bytes(a.w) : 0, shared_stride = slot_stride(a.w.cols);
    uint8_t *shared_tiles = shared + most * 2 * bytes;
    float *sums = (float *)(shared_tiles + tiles_most * shared_bytes), *shared_sums = sums + most * TEAM * 16;
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(shared_sums + (a.w.rows ? tiles_most * TEAM * 8 : 0));
    __nv_bfloat16 *shared_slots = slots + PLACED * stride;
    int64_t row = blockIdx.y;
    int units = units_of(WEIGHT_NVFP4, cols);
    share s = share_at(units, share_of(units, TEAM), warp % TEAM);
    /* the tile a warp asks for, of expert 0; and what a thread stores */
    int asked_pick = (begin + warp / 2) / each, pick = (begin + (int)threadIdx.x / 8) / each;
    const uint8_t *asked = tile_at(a.e.m[warp % 2], 0, begin + warp / 2 - asked_pick * each);
    uint32_t asked_to = shared_at(shared + warp * bytes), barrier = shared_at(&come[warp / 2]),
             asked_expert = shared_at(&expert[asked_pick]);
    bool asks = warp < 2 * items && lane == 0;
    now(asked);
    now(asked_to);
    now(barrier);
    now(asked_expert);
    int r = (begin + (int)threadIdx.x / 8 - pick * each) * 8 + threadIdx.x % 8;
    bool stores = (int)threadIdx.x / 8 < items && r < gate.rows;
    if (warp == 0) {
#pragma unroll 1
        for (int i = lane; i <= ITEMS; i += LANES) barrier_init(&come[i], i < ITEMS ? 2 : 1);
        barriers_ready();
        __syncwarp();
        if (lane == 0 && a.w.rows && tiles) {
            int rows = min(tiles * 8, a.w.rows - first_tile * 8);
            int n = a.w.format == WEIGHT_NVFP4 ? tiles * shared_bytes : rows * row_bytes_of(a.w);
            ask(shared_at(shared_tiles), tile_at(a.w, 0, first_tile), n, shared_at(&come[ITEMS]));
        }
        if (lane == 0) top[0] = 0;
        __syncwarp();
    }
    place_zeros(slots, PLACED, stride, cols, threadIdx.x, BLOCK);
    if (a.w.rows) place_zeros(shared_slots, SLOTS, shared_stride, a.w.cols, threadIdx.x, BLOCK);
    wait_for_previous();
    let_next_start(); /* which counts on what the kernel before this one wrote, and on nobody else reading what it writes */
    if (warp == 0) {
        choose_or_take(a.logits, a.p, a.e.n, row, expert, nullptr, keys);
    } else {
        const float *x = a.x.data + row * a.x.stride;
#pragma unroll 1
        for (int c = 8 * (threadIdx.x - LANES); c < cols; c += 8 * (BLOCK - LANES))
            place_eight<false>(shared_at(slots + c), stride, load_eight(x + c));
        if (a.w.rows) {
            float most_of = place_shared(a, row, shared_slots, shared_stride);
            if (lane == 0) top[warp] = most_of;
        }
    }
    __syncthreads();
    if (asks) ask(asked_to, asked + (uint64_t)load_shared(asked_expert) * a.matrix, bytes, barrier);
    float shared_scale = 1;
    if (a.w.rows && tiles) {
        if (a.w.input == INPUT_FP8_ROW) {
            shared_scale = fp8_input_scale(__uint_as_float(__reduce_max_sync(ALL, __float_as_uint(top[lane % CREW]))));
            float inverse = 1.0f / shared_scale;
#pragma unroll 1
            for (int c = 2 * threadIdx.x; c < a.w.cols; c += 2 * BLOCK)
                put_quantized(shared_slots, shared_stride, c, parts_sum(shared_slots, shared_stride, c), shared_scale, inverse);
            __syncthreads();
        }
        int all = units_of(a.w.format, a.w.cols), of_warp = share_of(all, TEAM);
#pragma unroll 1
        for (int at = warp / TEAM; at < tiles; at += 2) {
            float sum[4] = {};
            share part = share_at(all, of_warp, warp % TEAM);
            if (part.n) {
                barrier_wait(&come[ITEMS], 0);
                work_shared(sum, a.w, shared_tiles + at * shared_bytes, part, shared_slots, shared_stride);
            }
            if (lane < 4) *(float2 *)(shared_sums + (at * TEAM + warp % TEAM) * 8 + lane * 2) = make_float2(sum[0], sum[1]);
        }
    }
    float unit[2] = { 1, 1 };
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (stores) unit[i] = FP4_UNIT / a.e.globals[i * a.e.n + expert[pick]];
#pragma unroll 1
    for (int i = warp / TEAM; i < items; i += 2) {
        float sum[2];
        barrier_wait(&come[i], 0);
        work_two(sum, shared + 2 * i * bytes, shared + (2 * i + 1) * bytes, s, slots, stride);
        float *to = sums + (i * TEAM + warp % TEAM) * 16 + lane / 4;
        if (lane % 4 == 0) to[0] = sum[0], to[8] = sum[1];
    }
    __syncthreads();
    int last = BLOCK - 1 - threadIdx.x, shared_row = first_tile * 8 + last; /* the shared expert's are stored by the last threads */
    if (last < tiles * 8 && shared_row < a.w.rows) {
        const float *from = shared_sums + last / 8 * TEAM * 8 + last % 8;
        float sum = 0;
#pragma unroll
        for (int m = 0; m < TEAM; m++) sum += from[m * 8];
        a.shared.data[row * a.shared.stride + shared_row] = sum * shared_scale;
    }
    if (!stores) return;
    const float *from = sums + threadIdx.x / 8 * TEAM * 16 + threadIdx.x % 8;
    float value[2] = { 0, 0 };
#pragma unroll
    for (int m = 0; m < TEAM; m++) value[0] += from[m * 16], value[1] += from[m * 16 + 8];
    a.hidden[(row * a.p.k + pick) * gate.rows + r] = silu(value[0] * unit[0]) * (value[1] * unit[1]);
#endif
}

/* ---- down ---- */

#if __CUDA_ARCH__ >= 900
/* Units first.. of a tile of a pick; x: this lane's place in the first of its slots. */
__device__ __forceinline__ void work_one(float (&a)[4], float (&b)[4], const uint8_t *tile, int first, int units,
                                         const __nv_bfloat16 *x)
{
    x += first * FP4_UNIT_COLS;
#pragma unroll 1
    for (int u = first; u < units; u++, x += FP4_UNIT_COLS) {
        fp4_unit unit(tile + u * FP4_UNIT_BYTES);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            fp4_pairs v = unit.pairs(i);
            stream<TILED, 1>::template two<1>(a, b, x + i * 32, 0, v.v[0], v.v[1], v.v[2], v.v[3]);
        }
    }
}

__device__ __forceinline__ void store_one(float *to, const float (&a)[4], const float (&b)[4], bool counts)
{
    float sum[4] = { a[0] + b[2], a[1] + b[3] };
    stream<TILED, 1>::template collect<1>(sum, counts);
    if (threadIdx.x % LANES < 4) *(float2 *)to = make_float2(sum[0], sum[1]);
}

#endif

__host__ __device__ inline size_t down_shared(const cuda_matrix &down, int k, int tiles)
{
    return (size_t)tiles * k * (tile_bytes(down) + 8 * sizeof(float)) + 2 * (size_t)PLACED * k * slot_stride(down.cols);
}

/* Grid: blocks, rows. Shared memory: of each pick the block's tiles, which follow one another; sums [tile][k picks][8]; slots of picks [k].
 * A warp has a tile of a pick, or several. */
__global__ void __launch_bounds__(BLOCK, 2) fp4_down(const __grid_constant__ down_args a)
{
#if __CUDA_ARCH__ >= 900
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int expert[PICKS_MAX];
    __shared__ uint32_t keys[EXPERTS_MAX];
    __shared__ float weight[PICKS_MAX];
    __shared__ float factor[PICKS_MAX]; /* of a pick's sums: its weight, and what FP4 is multiplied by */
    __shared__ uint64_t come[PICKS_MAX];
    const cuda_matrix &w = a.e.m[DOWN];
    int k = a.p.k, stride = slot_stride(w.cols);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, bytes = (int)tile_bytes(w), most = a.tiles + (a.extra > 0);
    int tiles = a.tiles + ((int)blockIdx.x < a.extra);
    int begin = blockIdx.x * a.tiles + ((int)blockIdx.x < a.extra ? (int)blockIdx.x : a.extra);
    float *sums = (float *)(shared + k * most * bytes);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + most * k * 8);
    int64_t row = blockIdx.y;
    let_next_start();
    /* what a thread stores; the first warps, which have the most to do, last */
    int stored = threadIdx.x ^ 12 * LANES, tile = stored / 8, r = (begin + tile) * 8 + stored % 8;
    bool stores = tile < tiles && r < w.rows;
    float old = 0, gate = 0, shared_unit = 1;
    if (stores && a.add.data) old = __ldcg(a.add.data + row * a.add.stride + r);
    if (stores && a.w.rows) {
        gate = __ldcg(a.shared_gate.data + row * a.shared_gate.stride);
        shared_unit = unit_of(a.w, 0, r, a.w.global);
    }
    if (warp == 0) choose_or_take(a.logits, a.p, a.e.n, row, expert, weight, keys);
    if (warp == 1) {
#pragma unroll 1
        for (int j = lane; j < k; j += LANES) barrier_init(&come[j], 1);
        barriers_ready();
    }
    place_zeros(slots, PLACED * k, stride, w.cols, threadIdx.x, BLOCK);
    /* the eight columns a thread places: of the hidden rows, and an address in shared memory */
    int eights = w.cols / 8, chunks = k * eights, chunk = threadIdx.x, chunk_pick = quotient(chunk, a.by_eights);
    uint32_t place = shared_at(slots + chunk_pick * PLACED * stride + (chunk - chunk_pick * eights) * 8);
    /* a warp's first job */
    int units = units_of(WEIGHT_NVFP4, w.cols), jobs = tiles * k, job_tile = quotient(warp, a.by_picks), job_pick = warp - job_tile * k;
    int lane_at = min(lane / 4 % SLOTS, PLACED - 1) * stride + lane % 4 * 8; /* of a pick's slots */
    bool counts = lane / 4 % SLOTS != SLOTS - 1;
    __syncthreads();
    if (lane == 0)
#pragma unroll 1
        for (int j = warp; j < k; j += CREW)
            ask(shared_at(shared + j * most * bytes), tile_at(w, 0, begin) + (uint64_t)expert[j] * a.matrix, tiles * bytes,
                shared_at(&come[j]));
    if (BLOCK - 1 - (int)threadIdx.x < k) {
        int j = BLOCK - 1 - threadIdx.x;
        factor[j] = weight[j] * (FP4_UNIT / a.e.globals[DOWN * a.e.n + expert[j]]);
        if (a.logits.data && blockIdx.x == 0) {
            a.p.expert[row * k + j] = expert[j];
            a.p.weight[row * k + j] = weight[j];
        }
    }
    const uint8_t *from = shared + (job_pick * most + job_tile) * bytes;
    const __nv_bfloat16 *x = slots + job_pick * PLACED * stride + lane_at;
    float *to = sums + (job_tile * k + job_pick) * 8 + lane * 2;
    uint32_t ahead[8][4] = {};
    if (warp < jobs) {
        barrier_wait(&come[job_pick], 0);
        fp4_unit unit(from);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            fp4_pairs p = unit.pairs(i);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                ahead[i][n] = p.v[n];
                now(ahead[i][n]);
            }
        }
    }
    int at = (int)row * k * w.cols + chunk * 8;
    bool places = chunk < chunks;
    if (a.w.rows) shared_unit *= sigmoid(gate);
    now(shared_unit, old);
    now(place);
    now(at);
    wait_for_previous();
    float of_shared = stores && a.w.rows ? __ldcg(a.shared.data + row * a.shared.stride + r) : 0;
    if (places) place_eight<true>(place, stride, load_whole(a.hidden + at));
#pragma unroll 1
    for (chunk += BLOCK; chunk < chunks; chunk += BLOCK) {
        int j = chunk / eights;
        place_eight<true>(shared_at(slots + j * PLACED * stride + (chunk - j * eights) * 8), stride,
                          load_whole(a.hidden + (int)row * k * w.cols + chunk * 8));
    }
    __syncthreads();
    if (warp < jobs) {
        float p[4] = {}, q[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i++)
            stream<TILED, 1>::template two<1>(p, q, x + i * 32, 0, ahead[i][0], ahead[i][1], ahead[i][2], ahead[i][3]);
        work_one(p, q, from, 1, units, x);
        store_one(to, p, q, counts);
    }
#pragma unroll 1
    for (int job = warp + CREW; job < jobs; job += CREW) {
        float p[4] = {}, q[4] = {};
        job_tile = job / k;
        job_pick = job - job_tile * k;
        barrier_wait(&come[job_pick], 0);
        work_one(p, q, shared + (job_pick * most + job_tile) * bytes, 0, units, slots + job_pick * PLACED * stride + lane_at);
        store_one(sums + (job_tile * k + job_pick) * 8 + lane * 2, p, q, counts);
    }
    __syncthreads();
    if (!stores) return;
    const float *of = sums + tile * k * 8 + stored % 8;
    float y = 0;
#pragma unroll 8
    for (int j = 0; j < k; j++) y = fmaf(factor[j], of[j * 8], y);
    if (a.w.rows) y = fmaf(shared_unit, of_shared, y);
    a.y.data[row * a.y.stride + r] = y;
    if (a.add.data) a.add.data[row * a.add.stride + r] = old + y;
#endif
}

/* A share of n for each of at least `least` blocks, and of no more than `most`; blocks that have one more to *extra. */
int shares(int n, int most, int least, unsigned *blocks_used, int *extra)
{
    *blocks_used = blocks(n, most);
    if (*blocks_used < (unsigned)least) *blocks_used = (unsigned)(n < least ? n : least);
    *extra = n % (int)*blocks_used;
    return n / (int)*blocks_used;
}

} /* namespace */

bool cuda_experts_near(struct queue *q, struct mat y, struct mat x, const struct picks *p, const struct cuda_experts *e,
                       const struct moe_run *run)
{
    up_args u = {};
    down_args d = {};
    const cuda_matrix &gate = e->m[GATE], &down = e->m[DOWN];
    if (!q->has_pdl || p->k > PICKS_MAX || e->n > EXPERTS_MAX) return false;
    for (int i = 0; i < 3; i++)
        if (e->m[i].format != WEIGHT_NVFP4 || e->m[i].input != INPUT_AS_IS || e->m[i].cols % 16) return false;
    if (run) {
        u.w = d.w = cuda_matrix_of(run->w_down);
        if (!cuda_streams(q, &d.w)) return false;
        u.logits = d.logits = run->logits;
        u.gate = run->gate;
        u.up = run->up;
        u.made = run->hidden;
        u.shared = d.shared = run->shared;
        d.shared_gate = run->shared_gate;
        d.add = run->x;
    }
    u.e = d.e = *e;
    u.p = d.p = *p;
    u.x = x;
    d.y = y;
    d.hidden = u.hidden = q->hidden;
    size_t limit = (size_t)q->shared_max - OWN_SHARED;
    int items = ITEMS, tiles = BLOCK / 8;
    int shared_tiles = (tiles_of(u.w.rows) + q->sms - 1) / q->sms; /* of a block, if there are as many as multiprocessors */
    while (items > 0 && up_shared(gate, items, u.w, shared_tiles) > (limit < LEFT_SHARED ? limit : LEFT_SHARED)) items--;
    while (tiles > 0 && down_shared(down, p->k, tiles) > (limit < RIGHT_SHARED ? limit : RIGHT_SHARED)) tiles--;
    if (items == 0 || tiles == 0) return false;
    u.matrix = (unsigned)tiles_of(gate.rows) * tile_bytes(gate);
    d.by_picks = 1.0f / (float)p->k;
    d.by_eights = 8.0f / (float)down.cols;
    d.matrix = (unsigned)tiles_of(down.rows) * tile_bytes(down);
    unsigned up_blocks, down_blocks;
    u.items = shares(p->k * tiles_of(gate.rows), items, q->sms, &up_blocks, &u.extra);
    d.tiles = shares(tiles_of(down.rows), tiles, q->sms, &down_blocks, &d.extra);
    u.tiles = tiles_of(u.w.rows) / (int)up_blocks;
    u.tiles_extra = tiles_of(u.w.rows) % (int)up_blocks;
    int most_items = u.items + (u.extra > 0), most_tiles = u.tiles + (u.tiles_extra > 0);
    if (most_tiles * 8 > BLOCK || up_shared(gate, most_items, u.w, most_tiles) > limit) return false;
    launch_side<BLOCK>(q, "experts", LEFT, fp4_up, dim3(up_blocks, (unsigned)x.rows), up_shared(gate, most_items, u.w, most_tiles), u);
    launch_side<BLOCK>(q, "experts", RIGHT, fp4_down, dim3(down_blocks, (unsigned)x.rows),
                       down_shared(down, p->k, d.tiles + (d.extra > 0)), d);
    return true;
}
