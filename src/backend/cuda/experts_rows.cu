/* The experts that 2 to ROWS_TOGETHER rows picked, with the sums of experts.cu to the bit: NVFP4 whose inputs are taken as they
 * are. The multiprocessors are dealt out to the rows, a block each, and each of the two kernels has one block on them. Sixteen
 * weight rows are one operand of a tensor-core instruction, a row's slots the other. Experts that several rows picked are read
 * by each, mostly from the second cache. Both kernels are bound by the instructions they issue: each warp asks for its weights
 * itself, by bulk copies into a ring of its own, and meets the others only when its sums are there.
 *
 * experts_up_rows: the router's choice, then a run of items: eight gate and the same eight up rows of a pick. An item is a warp's,
 * or that of several, which share its columns. experts_down_rows: the choice, and the shared expert, while experts_up_rows works;
 * then pairs of tiles of a pick by a warp each; and the sum over picks, in order. */
#include "backend/cuda/route.cuh"
#include "backend/cuda/stream.cuh"

namespace {

/* All experts' units of the first of two tiles, and bytes from there to the second's. */
struct pair_source {
    const uint8_t *units;
    int64_t apart;
};

/* Of a matrix of an expert: tiles, units of one. */
struct tile_shape {
    unsigned n, units;
};

struct up_rows_args {
    cuda_experts e;
    mat x;
    picks p;
    mat logits;    /* data NULL: the picks are given */
    float *hidden; /* [rows][k][intermediate] */
    pair_source w; /* gate and up */
    tile_shape t;
    int rows, each; /* each: units of a share */
    int teams;      /* of CREW / teams warps, a power of two */
};

struct down_rows_args {
    cuda_experts e;
    const float *hidden;
    picks p;
    mat logits, y, add; /* add.data NULL: no residual */
    cuda_matrix w;      /* shared down; rows 0: none */
    unsigned shares;    /* of its columns */
    int each, bytes;    /* of a share, units; of a tile */
    mat gate, up, made; /* the shared expert's products, and what becomes of them */
    mat shared_gate;
    pair_source pairs; /* of tiles of down */
    tile_shape t;
    unsigned all_units; /* of an expert */
    int rows, most;     /* most: pairs of tiles of a block */
    int sums, slots;    /* floats of a tile, bytes of a pick */
    int on, by;         /* from a warp's job to its next: pairs of tiles, picks; to_on, x_on: in sums, and from the end of its slots */
    int to_on, x_on;
};

constexpr int TEAM = CREW / 2, PARTS = SLOTS - 1; /* TEAM: shares of an item's columns */
constexpr int TOGETHER = 2 * CREW;                /* items between meetings */
constexpr int UNIT_SLOT_BYTES = FP4_UNIT_COLS * 2;
/* A warp's ring: the same unit of two tiles a stage, and a barrier behind it. */
constexpr int DEPTH = 2, PAIR_BYTES = 2 * FP4_UNIT_BYTES, STAGE_BYTES = PAIR_BYTES + 16, RINGS = CREW * DEPTH * STAGE_BYTES;
static_assert(DEPTH == 2, "stages take turns");
static_assert(2 * PICKS_MAX <= BLOCK, "a thread has one factor to get");

/* The grid's blocks are dealt out to the rows: which of its row's blocks this is, and how many that has. */
struct row_block {
    int64_t row;
    int x, n;

    row_block() = default;

    __device__ __forceinline__ explicit row_block(unsigned rows)
    {
        unsigned all = gridDim.x, of = ((blockIdx.x + 1) * rows - 1) / all, first = of * all / rows;
        row = of;
        x = (int)(blockIdx.x - first);
        n = (int)((of + 1) * all / rows - first);
    }
};

__host__ __device__ inline size_t up_rows_shared(const cuda_matrix &gate)
{
    return RINGS + (size_t)TEAM * TOGETHER * 16 * sizeof(float) + (size_t)PARTS * slot_stride(gate.cols) * 2;
}

#if __CUDA_ARCH__ >= 900
/* The row's input by all warps but the first. */
__device__ __forceinline__ void place_input(__nv_bfloat16 *slots, int stride, const float *x, int cols)
{
#pragma unroll 1
    for (int c = 8 * ((int)threadIdx.x - LANES); c < cols; c += 8 * (BLOCK - LANES))
        place_eight<false>(shared_at(slots + c), stride, load_eight(x + c));
}

/* A warp's ring, and what is asked for next. */
struct pair_ring {
    uint32_t at, codes, scales; /* addresses of stage 0, and of what this lane reads there */
    int stage, phase;
    unsigned next, end; /* units, of all experts'; end: of these tiles */

    __device__ __forceinline__ pair_ring(uint8_t *rings)
    {
        int lane = threadIdx.x % LANES;
        uint8_t *own = rings + threadIdx.x / LANES * DEPTH * STAGE_BYTES;
        at = shared_at(own);
        codes = at + lane * 16;
        scales = at + 1024 + lane / 2 * 8;
        now(at);
        now(codes);
        now(scales);
        stage = next = end = 0;
        phase = 1; /* stages are filled before they are read */
        if (lane < DEPTH) barrier_init((uint64_t *)(own + lane * STAGE_BYTES + PAIR_BYTES), 1);
        barriers_ready();
        __syncwarp();
    }

    __device__ __forceinline__ void advance()
    {
        stage ^= 1;
        phase ^= stage ^ 1;
    }

    /* Into the present stage, which all lanes have read, by one lane. more() begins the next two tiles; false: there are none. */
    template <class MORE> __device__ __forceinline__ void ask(const pair_source &of, MORE &&more)
    {
        if (next == end && !more()) return;
        uint32_t to = at + stage * STAGE_BYTES;
        if (elected()) {
            const uint8_t *from = of.units + (uint64_t)next * FP4_UNIT_BYTES;
            barrier_expect(to + PAIR_BYTES, PAIR_BYTES);
            copy_bulk_once(to, from, FP4_UNIT_BYTES, to + PAIR_BYTES);
            copy_bulk_once(to + FP4_UNIT_BYTES, from + of.apart, FP4_UNIT_BYTES, to + PAIR_BYTES);
        }
        next++;
    }

    /* As often as there are stages. */
    template <class MORE> __device__ __forceinline__ void fill(const pair_source &of, MORE &&more)
    {
#pragma unroll 1
        for (int i = 0; i < DEPTH; i++) {
            ask(of, more);
            advance();
        }
    }
};
/* Sixteen rows of weights, lane 4 g + t eight columns of row g of two tiles, against a row's slots, added to a and b as stream.cuh
 * does: row g with slots 2 t and 2 t + 1, [0], [1] of the first tile, [2], [3] of the second. x: their address in shared memory. */
__device__ __forceinline__ void add_eight(float (&a)[4], float (&b)[4], const uint32_t (&p)[4], const uint32_t (&q)[4],
                                          uint32_t x)
{
    uint4 w = load_shared16(x);
    mma(a, p[0], q[0], p[1], q[1], w.x, w.y);
    mma(b, p[2], q[2], p[3], q[3], w.z, w.w);
}

/* A lane's part of one half of a unit of NVFP4 of two tiles. */
__device__ __forceinline__ void add_half(float (&a)[4], float (&b)[4], uint4 u, uint4 v, uint32_t scale, uint32_t other,
                                         uint32_t x)
{
    uint32_t words[4] = { u.x, u.y, u.z, u.w }, others[4] = { v.x, v.y, v.z, v.w };
    fp4_scales first(scale), second(other);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        fp4_pairs p(words[i], first.of(i)), q(others[i], second.of(i));
        add_eight(a, b, p.v, q.v, x + i * 64);
    }
}

/* The ring's next unit; another is asked for as soon as it is in registers. */
template <class MORE>
__device__ __forceinline__ void add_next(float (&a)[4], float (&b)[4], pair_ring &ring, const pair_source &of, uint32_t x,
                                         MORE &&more)
{
    int at = ring.stage * STAGE_BYTES;
    barrier_wait(ring.at + at + PAIR_BYTES, ring.phase);
    uint32_t codes = ring.codes + at, scales = ring.scales + at;
    uint2 scale = load_shared8(scales), other = load_shared8(scales + FP4_UNIT_BYTES);
    uint4 u = load_shared16(codes), v = load_shared16(codes + FP4_UNIT_BYTES);
    uint4 p = load_shared16(codes + 512), q = load_shared16(codes + FP4_UNIT_BYTES + 512);
    __syncwarp();
    ring.ask(of, more);
    ring.advance();
    add_half(a, b, u, v, scale.x, other.x, x);
    add_half(a, b, p, q, scale.y, other.y, x + FP4_UNIT_COLS);
}

/* The ring's next units, against a row's slots from x to end. */
template <class MORE>
__device__ __forceinline__ void add_units(float (&a)[4], float (&b)[4], pair_ring &ring, const pair_source &of, uint32_t &x,
                                          uint32_t end, MORE &&more)
{
#pragma unroll 1
    do {
        add_next(a, b, ring, of, x, more);
        x += UNIT_SLOT_BYTES;
    } while (x < end);
}

/* Where a lane reads a row's slots: lane 4 g + t column g of the operand. Columns that are no slot's come to nothing, and all of
 * their lanes read one place, in other banks than the last slot is. */
__device__ __forceinline__ uint32_t lane_slot(const __nv_bfloat16 *slots, int stride)
{
    int lane = threadIdx.x % LANES;
    return shared_at(slots + (lane / 4 < PARTS ? lane / 4 * stride + lane % 4 * 8 : stride));
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

/* Grid: multiprocessors. Shared memory: a ring a warp, sums [share][item][8][gate, up], slots. A team has every teams-th item, each
 * of its warps as many shares of the columns as the others. */
__global__ void __launch_bounds__(BLOCK, 2) experts_up_rows(const __grid_constant__ up_rows_args a)
{
#if __CUDA_ARCH__ >= 900
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int expert[PICKS_MAX];
    __shared__ float weight[PICKS_MAX], factor[2][PICKS_MAX];
    __shared__ int kept_before, kept_begin, kept_items; /* items of rows before, and before the block: registers are short */
    int cols = a.e.m[GATE].cols, stride = slot_stride(cols);
    float *sums = (float *)(shared + RINGS);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + TEAM * TOGETHER * 16);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    row_block at(a.rows);
    int64_t row = at.row;
    int all = a.p.k * a.t.n, fewest = (unsigned)all / at.n, extra = all - fewest * at.n;
    int begin = at.x * fewest + (at.x < extra ? at.x : extra), items = fewest + (at.x < extra);
    int team = warp & (a.teams - 1), member = (warp - team) / 2; /* member: the first of its shares, of which it has teams / 2 */
    int units = min((int)a.t.units - member * a.each, a.teams / 2 * a.each);
    int pick = (begin + team) / a.t.n, tile = begin + team - pick * a.t.n;
    if (units <= 0) pick = a.p.k; /* behind the last */
    if (threadIdx.x == 0) kept_before = row * all, kept_begin = begin, kept_items = items;
    pair_ring ring(shared);
    if (cols % SLOT_UNIT) put_padding(slots, stride, cols, threadIdx.x, BLOCK, PARTS);
    wait_for_previous();
    let_next_start(); /* which may count on the logits */
    if (warp > 0)
        place_input(slots, stride, a.x.data + row * a.x.stride, cols);
    else if (a.logits.data)
        choose(expert, at.x == 0 ? weight : nullptr, (uint32_t *)sums, a.logits.data + row * a.logits.stride, a.e.n, a.p.k);
    else
#pragma unroll 1
        for (int j = lane; j < a.p.k; j += LANES) expert[j] = __ldcg(a.p.expert + row * a.p.k + j);
    __syncthreads();
    auto more = [&] {
        if (pick * (int)a.t.n + tile >= kept_begin + kept_items) return false;
        ring.next = (expert[pick] * a.t.n + tile) * a.t.units + member * a.each;
        ring.end = ring.next + units;
        tile += a.teams;
        while (tile >= (int)a.t.n) tile -= a.t.n, pick++;
        return true;
    };
    ring.fill(a.w, more);
    if (a.logits.data && at.x == 0 && warp == 0)
#pragma unroll 1
        for (int j = lane; j < a.p.k; j += LANES) {
            a.p.expert[row * a.p.k + j] = expert[j];
            a.p.weight[row * a.p.k + j] = weight[j];
        }
    if ((int)threadIdx.x < 2 * a.p.k) {
        int side = (int)threadIdx.x >= a.p.k, j = threadIdx.x - side * a.p.k;
        factor[side][j] = FP4_UNIT / a.e.globals[side * a.e.n + expert[j]];
    }
    uint32_t begin_x = lane_slot(slots, stride) + member * a.each * UNIT_SLOT_BYTES;
#pragma unroll 1
    for (int first = 0;; first += TOGETHER) {
#pragma unroll 1
        for (int i = team; i < min(kept_items - first, TOGETHER); i += a.teams) {
            uint32_t x = begin_x, end = begin_x + units * UNIT_SLOT_BYTES;
            float *to = sums + (member * TOGETHER + i) * 16 + lane / 4 * 2;
#pragma unroll 1
            for (; x < end; to += TOGETHER * 16) {
                uint32_t share_end = min(x + a.each * UNIT_SLOT_BYTES, end);
                float p[4] = {}, q[4] = {};
                add_units(p, q, ring, a.w, x, share_end, more);
                float2 sum = three_slots(p, q);
                if (lane % 4 == 0) *(float2 *)to = sum;
            }
        }
        __syncthreads();
        int stored = threadIdx.x / 8;
        if (stored < min(kept_items - first, TOGETHER)) {
            int number = kept_begin + first + stored, of = number / a.t.n;
            float value[2] = { 0, 0 };
#pragma unroll
            for (int m = 0; m < TEAM; m++)
                if (m * a.each < (int)a.t.units) {
                    float2 sum = *(const float2 *)(sums + m * TOGETHER * 16 + threadIdx.x * 2);
                    value[GATE] += sum.x;
                    value[UP] += sum.y;
                }
            a.hidden[((int64_t)kept_before + number) * 8 + threadIdx.x % 8] =
                silu(value[GATE] * factor[GATE][of]) * (value[UP] * factor[UP][of]);
        }
        if (first + TOGETHER >= kept_items) return;
        __syncthreads();
    }
#endif
}

__host__ __device__ inline size_t down_sums(const down_rows_args &a)
{
    return (size_t)2 * a.most * a.sums;
}

__host__ __device__ inline size_t down_rows_shared(const down_rows_args &a)
{
    size_t slots = ((size_t)a.p.k * PARTS * slot_stride(a.e.m[DOWN].cols) + (size_t)SLOTS * slot_stride(a.w.cols)) * 2;
    size_t keys = EXPERTS_MAX * sizeof(uint32_t);
    return RINGS + down_sums(a) * sizeof(float) + (slots < keys ? keys : slots);
}

#if __CUDA_ARCH__ >= 900
/* The shared expert's hidden row as parts, by all warps but the first; returns the largest magnitude. */
__device__ __forceinline__ float place_shared(const down_rows_args &a, int64_t row, bool first, __nv_bfloat16 *slots,
                                              int stride)
{
    float top = 0;
#pragma unroll 1
    for (int c = 8 * ((int)threadIdx.x - LANES); c < a.w.cols; c += 8 * (BLOCK - LANES)) {
        eight x = load_eight(a.gate.data + row * a.gate.stride + c), y = load_eight(a.up.data + row * a.up.stride + c);
        float v[8] = { x.low.x, x.low.y, x.low.z, x.low.w, x.high.x, x.high.y, x.high.z, x.high.w };
        float w[8] = { y.low.x, y.low.y, y.low.z, y.low.w, y.high.x, y.high.y, y.high.z, y.high.w };
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[i] = silu(v[i]) * w[i];
            if (first) a.made.data[row * a.made.stride + c + i] = v[i];
            top = fmaxf(top, fabsf(v[i]));
        }
        place_eight<false>(shared_at(slots + c), stride, { { v[0], v[1], v[2], v[3] }, { v[4], v[5], v[6], v[7] } });
    }
    return warp_max(top);
}

/* Units s of two tiles of `bytes` each that follow one another in device memory; x: the address of this lane's slot. */
template <int FORMAT>
__device__ __forceinline__ void add_rows(float (&a)[4], float (&b)[4], const uint8_t *tile, int bytes, share s, uint32_t x)
{
    constexpr int COLS = unit_cols(FORMAT), EIGHTS = FORMAT == WEIGHT_FP8 ? 2 : 1;
    int lane = threadIdx.x % LANES, at = s.first * UNIT_BYTES + lane % 4 * 16, rest = bytes / 8 - at;
    tile += lane / 4 * (bytes / 8) + at;
    x += 2 * (s.first * COLS + lane % 4 * (8 * EIGHTS));
#pragma unroll 1
    for (int u = 0; u < s.n; u++, x += 2 * COLS, tile += UNIT_BYTES, rest -= UNIT_BYTES) {
        uint4 w[2][2] = {};
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (rest > half * PIECE) w[half][i] = *(const uint4 *)(tile + half * PIECE + i * bytes);
#pragma unroll
        for (int e = 0; e < 2 * EIGHTS; e++) {
            uint32_t p[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint4 v = w[e / EIGHTS][i];
                uint32_t low = e % EIGHTS ? v.z : v.x, high = e % EIGHTS ? v.w : v.y;
                p[i][0] = FORMAT == WEIGHT_FP8 ? fp8_pair(low, 0) : v.x;
                p[i][1] = FORMAT == WEIGHT_FP8 ? fp8_pair(low, 2) : v.y;
                p[i][2] = FORMAT == WEIGHT_FP8 ? fp8_pair(high, 0) : v.z;
                p[i][3] = FORMAT == WEIGHT_FP8 ? fp8_pair(high, 2) : v.w;
            }
            add_eight(a, b, p[0], p[1], x + e / EIGHTS * COLS + e % EIGHTS * 16);
        }
    }
}

template <>
__device__ __forceinline__ void add_rows<WEIGHT_NVFP4>(float (&a)[4], float (&b)[4], const uint8_t *tile, int bytes, share s,
                                                       uint32_t x)
{
    int lane = threadIdx.x % LANES;
    tile += s.first * FP4_UNIT_BYTES;
    x += 2 * (s.first * FP4_UNIT_COLS + lane % 4 * 8);
#pragma unroll 1
    for (int i = 0; i < 2 * s.n; i++, x += FP4_UNIT_COLS) {
        const uint8_t *codes = tile + i / 2 * FP4_UNIT_BYTES + i % 2 * 512 + lane * 16;
        const uint8_t *scales = tile + i / 2 * FP4_UNIT_BYTES + 1024 + lane / 2 * 8 + i % 2 * 4;
        add_half(a, b, *(const uint4 *)codes, *(const uint4 *)(codes + bytes), *(const uint32_t *)scales,
                 *(const uint32_t *)(scales + bytes), x);
    }
}

/* The shared expert's sums, of a pair of tiles a share of the columns a warp at a time. */
__device__ __forceinline__ void sum_shared(const down_rows_args &a, float *sums, const row_block &at, unsigned pairs,
                                           const __nv_bfloat16 *slots, int stride)
{
    int lane = threadIdx.x % LANES, slot = lane / 4 % SLOTS;
    bool quantized = a.w.input == INPUT_FP8_ROW;
    uint32_t x = shared_at(slots + (quantized ? SLOTS - 1 : slot < PARTS ? slot : 1) * stride);
#pragma unroll 1
    for (unsigned i = threadIdx.x / LANES; i < pairs * a.shares; i += CREW) {
        unsigned pair = i / a.shares, member = i - pair * a.shares;
        share s = share_at(units_of(a.w.format, a.w.cols), a.each, member);
        const uint8_t *tile = (const uint8_t *)a.w.data + (uint64_t)(2 * (at.x + pair * at.n)) * a.bytes;
        float p[4] = {}, q[4] = {};
        if (a.w.format == WEIGHT_NVFP4)
            add_rows<WEIGHT_NVFP4>(p, q, tile, a.bytes, s, x);
        else if (a.w.format == WEIGHT_FP8)
            add_rows<WEIGHT_FP8>(p, q, tile, a.bytes, s, x);
        else
            add_rows<WEIGHT_BF16>(p, q, tile, a.bytes, s, x);
        float2 sum = quantized ? make_float2(p[0] + q[0], p[2] + q[2]) : three_slots(p, q);
        float *to = sums + 2 * pair * a.sums + (a.p.k + member) * 8 + lane / 4;
        if (lane % 4 == 0) to[0] = sum.x, to[a.sums] = sum.y;
    }
}

/* The picks' hidden rows as parts, two warps each. */
__device__ __forceinline__ void place_hidden(const down_rows_args &a, int64_t row, __nv_bfloat16 *slots, int stride)
{
    int cols = a.e.m[DOWN].cols;
#pragma unroll 1
    for (int j = threadIdx.x / (2 * LANES); j < a.p.k; j += CREW / 2)
#pragma unroll 1
        for (int c = threadIdx.x % (2 * LANES) * 8; c < cols; c += 2 * LANES * 8)
            place_eight<false>(shared_at(slots + j * PARTS * stride + c), stride,
                               load_whole(a.hidden + (row * a.p.k + j) * cols + c));
}

/* The output that a thread stores: a block has every n-th pair of tiles of its row. */
__device__ __forceinline__ int output_of(const row_block &at)
{
    int thread = threadIdx.x;
    return (2 * (at.x + thread / 16 * at.n) + thread / 8 % 2) * 8 + thread % 8;
}

/* A warp's jobs are every CREW-th of a block's, which go through all picks of a pair of tiles, then of the next. */
struct down_job {
    int pair, pick; /* of its first */

    __device__ __forceinline__ explicit down_job(int k)
    {
        pair = 0;
        for (pick = threadIdx.x / LANES; pick >= k; pick -= k) pair++;
    }
};
#endif

/* Grid: multiprocessors. Shared memory: a ring a warp, sums [tile][picks, shares of the shared expert, its factor, residual][8],
 * slots of the picks and of the shared expert. */
__global__ void __launch_bounds__(BLOCK, 2) experts_down_rows(const __grid_constant__ down_rows_args a)
{
#if __CUDA_ARCH__ >= 900
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int expert[PICKS_MAX];
    __shared__ float weight[PICKS_MAX], factor[PICKS_MAX], top[CREW];
    __shared__ row_block kept; /* as in experts_up_rows */
    __shared__ unsigned kept_pairs;
    __shared__ float kept_scale;
    const cuda_matrix &w = a.e.m[DOWN];
    int k = a.p.k, stride = slot_stride(w.cols), shared_stride = slot_stride(a.w.cols);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float *sums = (float *)(shared + RINGS);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + down_sums(a)), *shared_slots = slots + k * PARTS * stride;
    row_block at(a.rows);
    let_next_start();
    pair_ring ring(shared);
    if (threadIdx.x == 0) kept = at, kept_pairs = (a.t.n / 2 - at.x + at.n - 1) / at.n, kept_scale = 1;
    if (warp == 0) {
        if (a.logits.data)
            choose(expert, weight, (uint32_t *)slots, a.logits.data + at.row * a.logits.stride, a.e.n, k);
        else
#pragma unroll 1
            for (int j = lane; j < k; j += LANES) {
                expert[j] = __ldcg(a.p.expert + at.row * k + j);
                weight[j] = __ldcg(a.p.weight + at.row * k + j);
            }
    }
    __syncthreads();
    down_job asked(k);
    unsigned next_unit = 2 * (kept.x + asked.pair * kept.n) * a.t.units;
    auto more = [&] {
        if (next_unit >= a.all_units) return false;
        ring.next = expert[asked.pick] * a.all_units + next_unit;
        ring.end = ring.next + a.t.units;
        asked.pick += a.by;
        next_unit += 2 * a.on * (kept.n * a.t.units);
        if (asked.pick >= a.p.k) asked.pick -= a.p.k, next_unit += 2 * (kept.n * a.t.units);
        return true;
    };
    ring.fill(a.pairs, more);
    if ((int)threadIdx.x < k)
        factor[threadIdx.x] = weight[threadIdx.x] * (FP4_UNIT / a.e.globals[DOWN * a.e.n + expert[threadIdx.x]]);
    if (w.cols % SLOT_UNIT)
        for (int j = warp; j < k; j += CREW) put_padding(slots + j * PARTS * stride, stride, w.cols, lane, LANES, PARTS);
    if (a.w.rows) {
        if (a.w.cols % SLOT_UNIT) put_padding(shared_slots, shared_stride, a.w.cols, threadIdx.x, BLOCK);
        float most = warp > 0 ? place_shared(a, kept.row, kept.x == 0, shared_slots, shared_stride) : 0;
        if (lane == 0) top[warp] = most;
        __syncthreads();
        if (a.w.input == INPUT_FP8_ROW) {
            float scale = fp8_input_scale(__uint_as_float(__reduce_max_sync(ALL, __float_as_uint(top[lane % CREW]))));
            if (threadIdx.x == 0) kept_scale = scale;
#pragma unroll 1
            for (int c = 2 * threadIdx.x; c < a.w.cols; c += 2 * BLOCK)
                put_quantized_at(shared_slots, shared_stride, c, parts_sum_at(shared_slots, shared_stride, c), scale, 1.0f / scale);
            __syncthreads();
        }
        sum_shared(a, sums, kept, kept_pairs, shared_slots, shared_stride);
    }
    float *own = sums + threadIdx.x / 8 * a.sums + threadIdx.x % 8; /* of the output that this thread stores */
    int r = output_of(kept);
    bool stores = threadIdx.x / 8 < 2 * kept_pairs && r < w.rows;
    float shared_unit = stores && a.w.rows ? unit_of(a.w, 0, r, a.w.global) : 0, old = 0, gate = 0;
    wait_for_previous();
    if (stores && a.add.data) old = __ldcg(a.add.data + kept.row * a.add.stride + r);
    if (stores && a.w.rows) gate = __ldcg(a.shared_gate.data + kept.row * a.shared_gate.stride);
    place_hidden(a, kept.row, slots, stride);
    if (stores) own[a.sums - 16] = sigmoid(gate) * shared_unit, own[a.sums - 8] = old;
    __syncthreads();
    down_job job(k);
    uint32_t x = lane_slot(slots, stride) + job.pick * a.slots;
    float *to = sums + 2 * job.pair * a.sums + job.pick * 8 + lane / 4;
#pragma unroll 1
    for (int jobs = ((int)kept_pairs * k - warp + CREW - 1) / CREW; jobs > 0; jobs--) {
        uint32_t end = x + a.t.units * UNIT_SLOT_BYTES;
        float p[4] = {}, q[4] = {};
        add_units(p, q, ring, a.pairs, x, end, more);
        float2 sum = three_slots(p, q);
        if (lane % 4 == 0) to[0] = sum.x, to[a.sums] = sum.y;
        job.pick += a.by;
        x += a.x_on;
        to += a.to_on;
        if (job.pick >= a.p.k) job.pick -= a.p.k, x -= a.p.k * a.slots, to += 2 * a.sums - a.p.k * 8;
    }
    __syncthreads();
    r = output_of(kept);
    if (threadIdx.x / 8 >= 2 * kept_pairs || r >= w.rows) return;
    const float *from = sums + threadIdx.x / 8 * a.sums + threadIdx.x % 8;
    float y = 0, sum = 0;
#pragma unroll 4
    for (int j = 0; j < a.p.k; j++) y = fmaf(factor[j], from[j * 8], y);
    if (a.w.rows) {
#pragma unroll 4
        for (int m = a.p.k * 8; m < a.sums - 16; m += 8) sum += from[m];
        y = fmaf(from[a.sums - 16], sum * kept_scale, y);
    }
    a.y.data[kept.row * a.y.stride + r] = y;
    if (a.add.data) a.add.data[kept.row * a.add.stride + r] = from[a.sums - 8] + y;
#endif
}

/* Teams of warps for a block of `items`, so that the warp with most to do is done soonest. An item takes a sixth of the time of a
 * unit besides. */
void deal_out(up_rows_args &a, int items)
{
    int units = (int)a.t.units, least = 0;
    a.each = share_of(units, TEAM);
    for (int teams = CREW; teams >= 2; teams /= 2) {
        int part = teams / 2 * a.each;
        int most = (items + teams - 1) / teams * (6 * (part < units ? part : units) + 1);
        if (teams == CREW || most < least) least = most, a.teams = teams;
    }
}

tile_shape shape_of(const cuda_matrix &m)
{
    return { (unsigned)tiles_of(m.rows), (unsigned)units_of(WEIGHT_NVFP4, m.cols) };
}

/* The arguments of both kernels; false: not for these shapes. */
bool together_args(const struct queue *q, up_rows_args &u, down_rows_args &d, const struct cuda_experts *e, int64_t rows, int k,
                   const struct moe_run *run)
{
    for (int i = 0; i < 3; i++)
        if (e->m[i].format != WEIGHT_NVFP4 || e->m[i].input != INPUT_AS_IS || !cuda_streams(q, &e->m[i])) return false;
    if (!q->has_pdl || rows < 2 || rows > ROWS_TOGETHER || e->n > EXPERTS_MAX || k > PICKS_MAX) return false;
    const cuda_matrix &gate = e->m[GATE];
    int pairs = tiles_of(e->m[DOWN].rows) / 2, each = q->sms / (int)rows;
    size_t left = (size_t)q->shared_max < LEFT_SHARED ? (size_t)q->shared_max : LEFT_SHARED;
    u.e = d.e = *e;
    u.p.k = d.p.k = k;
    u.rows = d.rows = (int)rows;
    if (run) d.w = cuda_matrix_of(run->w_down);
    if (each == 0 || up_rows_shared(gate) > left || tiles_of(e->m[DOWN].rows) % 2 || (run && !cuda_streams(q, &d.w))) return false;
    u.t = shape_of(gate);
    d.t = shape_of(e->m[DOWN]);
    u.w = { (const uint8_t *)gate.data, (const uint8_t *)e->m[UP].data - (const uint8_t *)gate.data };
    d.pairs = { (const uint8_t *)e->m[DOWN].data, tile_bytes(e->m[DOWN]) };
    deal_out(u, (k * (int)u.t.n + each - 1) / each);
    d.most = (pairs + each - 1) / each;
    d.all_units = d.t.n * d.t.units;
    d.on = CREW / k;
    d.by = CREW % k;
    if (d.w.rows) {
        int units = units_of(d.w.format, d.w.cols);
        d.each = share_of(units, TEAM);
        d.shares = (unsigned)share_of(units, d.each);
        d.bytes = (int)tile_bytes(d.w);
    }
    d.sums = (k + (int)d.shares + 2) * 8;
    d.to_on = 2 * d.on * d.sums + d.by * 8;
    d.slots = PARTS * slot_stride(e->m[DOWN].cols) * (int)sizeof(__nv_bfloat16);
    d.x_on = d.by * d.slots - (int)d.t.units * UNIT_SLOT_BYTES;
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
    launch_side<BLOCK>(q, "experts", LEFT, experts_up_rows, grid, up_rows_shared(e->m[GATE]), u);
    launch_side<BLOCK>(q, "experts", RIGHT, experts_down_rows, grid, down_rows_shared(d), d);
    return true;
}
