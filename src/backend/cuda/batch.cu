/* Dense products of several rows (batch.cuh) in two kernels. prepare_inputs makes the inputs, a block a row: taken as they are,
 * normed, or gated and normed, split into parts or quantized; gated ones delta_batch.cu may have made before. In batch_products
 * weights and inputs come unit after unit into a ring that eight warps read, sixteen weight rows each of an item of up to 128. A
 * matrix of few rows is divided along its columns over a cluster of blocks, whose sums meet in their shared memory.
 * Moves: the weights once; the inputs once for each item, from the second cache. */
#include "backend/cuda/batch.cuh"
#include "backend/cuda/prepare.cuh"
#include "backend/cuda/tensor_map.cuh"
#include <type_traits>

namespace {

constexpr int WORKERS = 8;
constexpr int SUM_ROW = 16 * WORKERS + 4; /* floats of a row of sums */
constexpr int STAGES_MOST = 16, SPLITS_LEAST = 5;
constexpr size_t BESIDE_SHARED = 110 * 1024; /* has room beside a block with LEFT_SHARED, or another like it */

struct batch_args {
    cuda_matrix m[NORM_PRODUCTS_MAX];
    mat out[NORM_PRODUCTS_MAX], add; /* add.data: += what goes to out[0]; NULL: nothing */
    int first[NORM_PRODUCTS_MAX + 1]; /* item at which a matrix begins */
    int n, each, rounds;              /* matrices; tiles of sixteen rows side by side, and how often, an item */
    int rows, crew, splits;           /* shares of the columns; blocks of a cluster, which divide the shares */
    int stages, stage_bytes, weights_at; /* of the ring; of a stage, whose inputs come first */
    unsigned inverse;                    /* 2^32 / outputs of a row of an item */
    const uint8_t *parts, *quantized;
    const float *input_scale;
    /* sums of picks, to which the product is added behind its gate; down NULL: none */
    const float *down, *factor;
    mat gate;
    int k;
};

/* Of the matrices but NVFP4 ones. */
struct batch_maps {
    CUtensorMap m[NORM_PRODUCTS_MAX];
};

/* G: groups of eight rows; more than four: rounded, one part and one accumulator. */
template <int G> constexpr bool BATCH_EXACT = 8 * G <= ROWS_EXACT;

/* ASKER: a warp besides asks for all that comes, one of a group that gives its registers to the others. Of up to eight rows warps
 * ask by turns: so eight of 128 registers are half of a multiprocessor's, and the block of the kernel before or after has room. */
template <int G> constexpr bool ASKER = G > 1;
template <int G> constexpr int BATCH_BLOCK = (WORKERS + (ASKER<G> ? TEAM_WARPS : 0)) * LANES;
[[maybe_unused]] constexpr int ASKER_REGISTERS = 24, WORKER_REGISTERS = 240;

template <int FORMAT, int G> struct batch_form {
    static constexpr int PARTS_IN = FORMAT == WEIGHT_FP8 || !BATCH_EXACT<G> ? 1 : PARTS;
    static constexpr int N = 8 * PARTS_IN * G, PANELS = unit_cols(FORMAT) / PANEL;
    static constexpr int PANEL_IN = PARTS_IN * G * PANEL_BYTES, INPUTS = PANELS * PANEL_IN;
};

/* Shares of a matrix's columns, of `share` units but for the last; a block has up to `each` of them. */
struct batch_shares {
    int units, share, n, each;
    __host__ __device__ __forceinline__ batch_shares(const batch_args &p, const cuda_matrix &m)
    {
        units = units_of(m.format, m.cols);
        share = (units + p.crew - 1) / p.crew;
        n = (units + share - 1) / share;
        each = (n + p.splits - 1) / p.splits;
    }
    /* First unit of block `rank` of a cluster. */
    __host__ __device__ __forceinline__ int begin(int rank) const
    {
        int u = rank * each * share;
        return u < units ? u : units;
    }
};

/* Rounds of the item that begins at a tile. */
[[maybe_unused]] __device__ __forceinline__ int batch_rounds(const batch_args &p, const cuda_matrix &m, int tile0)
{
    int rounds = ((m.rows + 15) / 16 - tile0 + p.each - 1) / p.each;
    return rounds < p.rounds ? rounds : p.rounds;
}

/* Warps that work: whole groups of four. */
[[maybe_unused]] __device__ __forceinline__ int workers_of(const batch_args &p)
{
    return p.each > TEAM_WARPS ? WORKERS : TEAM_WARPS;
}

[[maybe_unused]] __device__ __forceinline__ int batch_matrix(const batch_args &p, int item)
{
    int m = 0;
#pragma unroll
    for (int i = 1; i < NORM_PRODUCTS_MAX; i++) m += i < p.n && item >= p.first[i];
    return m;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* The block's units, those of all rounds one after the other. */
struct batch_flow {
    const CUtensorMap *map;
    uint32_t ring;
    uint64_t *full, *empty;                     /* [STAGES_MOST] */
    int begin, units, rounds;                   /* first unit; units of a round */
    int unit, tile, left;                       /* asked for next; all that are left to ask for */
    ring_place place, before;                   /* to be read next; read before it, slot -1: none */
    int turn;                                   /* warp that asks next */
};

/* Weight row of a group of eight that a warp's lanes 4 g.. have: rows that are read together are four apart, so that they lie in
 * different banks. */
__device__ __forceinline__ int batch_row(int g)
{
    return g / 2 + g % 2 * 4;
}

/* Weights of a unit; the barrier waits for its inputs too. */
template <int FORMAT, int G>
__device__ __forceinline__ void ask_weights(const batch_args &p, const cuda_matrix &m, const batch_flow &flow, int slot)
{
    uint32_t to = flow.ring + slot * p.stage_bytes + p.weights_at;
    int unit = flow.begin + flow.unit, inputs = batch_form<FORMAT, G>::INPUTS;
    if constexpr (FORMAT == WEIGHT_NVFP4) {
        int tiles = tiles_of(m.rows) - 2 * flow.tile;
        tiles = tiles < 2 * p.each ? tiles : 2 * p.each;
        barrier_expect(&flow.full[slot], inputs + tiles * FP4_UNIT_BYTES);
        const uint8_t *from = tile_at(m, 0, 2 * flow.tile) + (int64_t)unit * FP4_UNIT_BYTES;
        for (int t = 0; t < tiles; t++, from += tile_bytes(m))
            copy_bulk(to + t * FP4_UNIT_BYTES, from, FP4_UNIT_BYTES, &flow.full[slot]);
    } else {
        barrier_expect(&flow.full[slot], inputs + p.each * 16 * UNIT_BYTES);
        copy_box(to, *flow.map, unit * (UNIT_BYTES / 2), flow.tile * 16, &flow.full[slot]);
    }
}

template <int FORMAT, int G>
__device__ __forceinline__ void ask_inputs(const batch_args &p, const cuda_matrix &m, const batch_flow &flow, int slot, int unit)
{
    constexpr int BYTES = batch_form<FORMAT, G>::INPUTS;
    const uint8_t *from = (m.input == INPUT_FP8_ROW ? p.quantized : p.parts) + (int64_t)(flow.begin + unit) * BYTES;
    copy_bulk(flow.ring + slot * p.stage_bytes, from, BYTES, &flow.full[slot]);
}

__device__ __forceinline__ void has_asked(const batch_args &p, batch_flow &flow)
{
    flow.left--;
    if (++flow.unit == flow.units) flow.unit = 0, flow.tile += p.each;
}

/* Once all have left the place. */
template <int FORMAT, int G>
__device__ __forceinline__ void ask_next(const batch_args &p, const cuda_matrix &m, const batch_flow &flow, ring_place to)
{
    barrier_wait(&flow.empty[to.slot], to.phase);
    ask_weights<FORMAT, G>(p, m, flow, to.slot);
    ask_inputs<FORMAT, G>(p, m, flow, to.slot, flow.unit);
}

/* Fills the ring, weights before the inputs are there. `mine`: this thread asks. */
template <int FORMAT, int G>
__device__ __forceinline__ void ask_first(const batch_args &p, const cuda_matrix &m, batch_flow &flow, bool mine)
{
    int n = flow.left < p.stages ? flow.left : p.stages;
#pragma unroll 1
    for (int i = 0; i < n; i++) {
        if (mine) ask_weights<FORMAT, G>(p, m, flow, i);
        has_asked(p, flow);
    }
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < n; i++)
        if (mine) ask_inputs<FORMAT, G>(p, m, flow, i, i % flow.units);
}

/* By the one thread that asks. */
template <int FORMAT, int G> __device__ __forceinline__ void ask_all(const batch_args &p, const cuda_matrix &m, batch_flow &flow)
{
    ask_first<FORMAT, G>(p, m, flow, true);
#pragma unroll 1
    for (; flow.left > 0; has_asked(p, flow), flow.place.advance(p.stages)) ask_next<FORMAT, G>(p, m, flow, flow.place);
}

/* This warp has read the next unit. Without an asker the place of the one before is filled again, which all have left by now or
 * soon. */
template <int FORMAT, int G>
__device__ __forceinline__ void batch_leave(const batch_args &p, const cuda_matrix &m, batch_flow &flow, int workers)
{
    if (threadIdx.x % LANES == 0) barrier_arrive(&flow.empty[flow.place.slot]);
    if constexpr (!ASKER<G>) {
        if (flow.before.slot >= 0 && flow.left > 0) {
            if (threadIdx.x == flow.turn * LANES) ask_next<FORMAT, G>(p, m, flow, flow.before);
            __syncwarp();
            has_asked(p, flow);
        }
        if (++flow.turn == workers) flow.turn = 0;
        flow.before = flow.place;
    }
    flow.place.advance(p.stages);
}

/* The sixteen weight rows of worker `warp`. */
template <int FORMAT> __device__ __forceinline__ void batch_load(words16<FORMAT> &w, const uint8_t *weights, int warp)
{
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if constexpr (FORMAT == WEIGHT_NVFP4) {
            const uint8_t *tile = weights + (warp * 2 + h) * FP4_UNIT_BYTES;
            w.w[h][0] = *(const uint4 *)(tile + lane * 16);
            w.w[h][1] = *(const uint4 *)(tile + 512 + lane * 16);
            w.scale[h] = *(const uint2 *)(tile + 1024 + lane / 2 * 8);
        } else {
            int r = batch_row(lane / 4);
            const uint8_t *row = weights + (warp * 16 + h * 8 + r) * UNIT_BYTES;
#pragma unroll
            for (int i = 0; i < 2; i++) w.w[h][i] = *(const uint4 *)(row + ((lane % 4 + 4 * i) ^ r) * 16);
        }
    }
}

/* Sixteen weight rows of each warp past this block's columns. Sums of shares, [share][row][weight row], if the columns are divided
 * over a cluster, else of all: shares are added one after the other. */
template <int FORMAT, int G>
__device__ __forceinline__ void batch_work(const batch_args &p, const cuda_matrix &m, batch_flow &flow, const uint8_t *shared,
                                           float *sums, int share)
{
    using form = batch_form<FORMAT, G>;
    constexpr int P = form::PARTS_IN, PANELS = form::PANELS;
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, tile = warp < p.each ? warp : p.each - 1;
    accumulators<form::N, BATCH_EXACT<G>> acc;
    float total[G][4];
    acc.clear();
#pragma unroll
    for (int r = 0; r < G; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) total[r][i] = 0;
    int row = FORMAT == WEIGHT_NVFP4 ? lane / 4 : batch_row(lane / 4);
    float *to = sums + lane % 4 * 2 * SUM_ROW + warp * 16 + row;
    auto leave_sums = [&] {
#pragma unroll
        for (int r = 0; r < G; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) to[(r * 8 + i % 2) * SUM_ROW + i / 2 * 8] = total[r][i];
        to += 8 * G * SUM_ROW;
    };
    words16<FORMAT> w;
    uint32_t even[4][4], odd[4][4];
    int left = share, u = 0, workers = workers_of(p);
    auto load = [&](ring_place from, uint32_t (&f)[4][4]) {
        barrier_wait(&flow.full[from.slot], from.phase);
        batch_load(w, shared + from.slot * p.stage_bytes + p.weights_at, tile);
        w.template decode<0>(f);
    };
    load(flow.place, even);
    /* Panel Q of a unit, and meanwhile the weights of the next one. */
    auto panel = [&](auto number, uint32_t (&f)[4][4], uint32_t (&next)[4][4]) {
        constexpr int Q = decltype(number)::value;
        acc.begin(f, wide_matrix(flow.ring + flow.place.slot * p.stage_bytes) + Q * form::PANEL_IN / 16, Q > 0 || left < share);
        if constexpr (Q + 1 < PANELS) {
            w.template decode<Q + 1>(next);
        } else if (u + 1 < flow.units) {
            ring_place after = flow.place;
            after.advance(p.stages);
            load(after, next);
        }
        acc.end(f);
        if constexpr (Q + 1 == PANELS) {
            batch_leave<FORMAT, G>(p, m, flow, workers);
            u++;
            if (--left > 0 && u < flow.units) return;
            left = share;
#pragma unroll
            for (int r = 0; r < G; r++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float s = acc.sum(r * P, i);
                    if constexpr (P > 1) s = s + acc.sum(r * P + 1, i) + acc.sum(r * P + 2, i);
                    total[r][i] = p.splits > 1 ? s : total[r][i] + s;
                }
            if (p.splits > 1) leave_sums();
        }
    };
#pragma unroll 1
    while (u < flow.units) {
        panel(std::integral_constant<int, 0>(), even, odd);
        if constexpr (PANELS == 1) {
            if (u < flow.units) panel(std::integral_constant<int, 0>(), odd, even);
        } else {
            panel(std::integral_constant<int, 1>(), odd, even);
            if constexpr (PANELS == 4) {
                panel(std::integral_constant<int, 2>(), even, odd);
                panel(std::integral_constant<int, 3>(), odd, even);
            }
        }
    }
    if (p.splits == 1) leave_sums();
}

/* Four neighbouring numbers, of which there are n; the others come to nothing, or stay. */
__device__ __forceinline__ float4 load_few(const float *p, int n)
{
    if (n == 4 && (uintptr_t)p % 16 == 0) return __ldcg((const float4 *)p);
    float4 x = {};
    if (n > 0) x.x = __ldcg(p);
    if (n > 1) x.y = __ldcg(p + 1);
    if (n > 2) x.z = __ldcg(p + 2);
    if (n > 3) x.w = __ldcg(p + 3);
    return x;
}

__device__ __forceinline__ void store_few(float *p, float4 x, int n)
{
    if (n == 4 && (uintptr_t)p % 16 == 0) {
        *(float4 *)p = x;
        return;
    }
    if (n > 0) p[0] = x.x;
    if (n > 1) p[1] = x.y;
    if (n > 2) p[2] = x.z;
    if (n > 3) p[3] = x.w;
}

/* Four neighbouring outputs of a row, what becomes of their sums, and where these are. */
template <int G> struct batch_outputs {
    const float *from;
    float4 old, picked, unit;
    float scale;
    int row, r, n; /* n: how many there are */

    /* Number `at` of an item. All but the sums is asked for. */
    __device__ __forceinline__ batch_outputs(const batch_args &p, const float *sums, int k, int tile0, int at)
    {
        const cuda_matrix &m = p.m[k];
        int width = p.each * 16;
        row = (int)((uint64_t)(4 * at) * p.inverse >> 32);
        int c = 4 * at - row * width, left = m.rows - (tile0 * 16 + c);
        r = tile0 * 16 + c;
        n = row >= p.rows || left < 0 ? 0 : left < 4 ? left : 4;
        from = sums + (n > 0 ? row * SUM_ROW + c : 0);
        old = load_few(p.add.data + row * p.add.stride + r, p.add.data && k == 0 ? n : 0);
        scale = m.input == INPUT_FP8_ROW && n > 0 ? __ldcg(p.input_scale + row) : 1;
        picked = {};
        unit.x = n > 0 ? unit_of(m, 0, r, m.global) : 0;
        unit.y = n > 1 ? unit_of(m, 0, r + 1, m.global) : 0;
        unit.z = n > 2 ? unit_of(m, 0, r + 2, m.global) : 0;
        unit.w = n > 3 ? unit_of(m, 0, r + 3, m.global) : 0;
        if (!p.down || n == 0) return;
        float gate = sigmoid(__ldcg(p.gate.data + row * p.gate.stride));
        unit.x *= gate, unit.y *= gate, unit.z *= gate, unit.w *= gate;
        const float *down = p.down + (int64_t)row * p.k * m.rows + r, *factor = p.factor + row * p.k;
#pragma unroll 8
        for (int i = 0; i < p.k; i++, down += m.rows) {
            float4 x = load_few(down, n);
            float f = __ldcg(factor + i);
            picked.x = fmaf(f, x.x, picked.x);
            picked.y = fmaf(f, x.y, picked.y);
            picked.z = fmaf(f, x.z, picked.z);
            picked.w = fmaf(f, x.w, picked.w);
        }
    }
    /* Shares of the columns are added one after the other. */
    __device__ __forceinline__ void store(const batch_args &p, const batch_shares &shares, int k) const
    {
        float4 s = {};
        if (p.splits == 1) {
            s = *(const float4 *)from;
        } else {
            int end = shares.each * (8 * G * SUM_ROW);
#pragma unroll 8
            for (int i = 0, at = 0, block = 0; i < shares.n; i++) {
                float4 x = load_four_of(from + at, block);
                s.x += x.x, s.y += x.y, s.z += x.z, s.w += x.w;
                at += 8 * G * SUM_ROW;
                if (at == end) at = 0, block++;
            }
        }
        if (p.m[k].input == INPUT_FP8_ROW) s.x *= scale, s.y *= scale, s.z *= scale, s.w *= scale;
        float4 y = { output(p, s.x, unit.x, picked.x), output(p, s.y, unit.y, picked.y), output(p, s.z, unit.z, picked.z),
                     output(p, s.w, unit.w, picked.w) };
        store_few(p.out[k].data + row * p.out[k].stride + r, y, n);
        if (!p.add.data || k != 0) return;
        store_few(p.add.data + row * p.add.stride + r, { old.x + y.x, old.y + y.y, old.z + y.z, old.w + y.w }, n);
    }
    static __device__ __forceinline__ float output(const batch_args &p, float sum, float unit, float picked)
    {
        return p.down ? fmaf(unit, sum, picked) : sum * unit;
    }
};

template <class F> __device__ __forceinline__ void by_format(int format, F f)
{
    if (format == WEIGHT_BF16)
        f(std::integral_constant<int, WEIGHT_BF16>());
    else if (format == WEIGHT_FP8)
        f(std::integral_constant<int, WEIGHT_FP8>());
    else
        f(std::integral_constant<int, WEIGHT_NVFP4>());
}

/* Workers, or all of the cluster. */
__device__ __forceinline__ void batch_meet(const batch_args &p)
{
    if (p.splits > 1)
        cluster_meet();
    else
        meet_256(1);
}
#endif

/* Shared memory: ring, sums. Grid: items times splits. */
template <int G>
__global__ void __launch_bounds__(BATCH_BLOCK<G>, ASKER<G> ? 1 : 2)
    batch_products(const __grid_constant__ batch_args p, const __grid_constant__ batch_maps maps)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ uint64_t barriers[2 * STAGES_MOST];
    int item = blockIdx.x / p.splits, k = batch_matrix(p, item), tile0 = (item - p.first[k]) * p.each * p.rounds;
    int rank = blockIdx.x % p.splits, warp = threadIdx.x / LANES;
    const cuda_matrix &m = p.m[k];
    batch_shares shares(p, m);
    batch_flow flow = {};
    flow.map = &maps.m[k];
    flow.ring = shared_at(shared);
    flow.full = barriers;
    flow.empty = barriers + STAGES_MOST;
    flow.begin = shares.begin(rank);
    flow.units = shares.begin(rank + 1) - flow.begin;
    flow.rounds = batch_rounds(p, m, tile0);
    flow.left = flow.units * flow.rounds;
    flow.tile = tile0;
    flow.before.slot = -1;
    float *sums = (float *)(shared + p.stages * p.stage_bytes);
    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) {
            barrier_init(&flow.full[i], 1);
            barrier_init(&flow.empty[i], workers_of(p));
        }
        barriers_ready();
    }
    __syncthreads();
    if (warp >= WORKERS) {
        if constexpr (ASKER<G>) fewer_registers<ASKER_REGISTERS>();
        if (ASKER<G> && threadIdx.x == WORKERS * LANES)
            by_format(m.format, [&](auto format) { ask_all<format.value, G>(p, m, flow); });
        __syncwarp();
        if (p.splits > 1) {
            cluster_meet();
            cluster_meet();
        }
    } else {
        if constexpr (ASKER<G>) {
            more_registers<WORKER_REGISTERS>();
        } else {
            by_format(m.format, [&](auto format) { ask_first<format.value, G>(p, m, flow, threadIdx.x == 0); });
            __syncwarp();
        }
        wait_for_previous();
#pragma unroll 1
        for (int round = 0; round < flow.rounds; round++, tile0 += p.each) {
            if (warp < workers_of(p) && flow.units > 0)
                by_format(m.format, [&](auto format) { batch_work<format.value, G>(p, m, flow, shared, sums, shares.share); });
            /* the warps that have not worked are first to ask for what becomes of the sums */
            int turn = (warp + WORKERS - workers_of(p)) % WORKERS;
            int at = (turn * p.splits + rank) * LANES + (int)threadIdx.x % LANES, n = p.rows * p.each * 4;
            batch_outputs<G> outputs(p, sums, k, tile0, at);
            batch_meet(p);
#pragma unroll 1
            while (at < n) {
                outputs.store(p, shares, k);
                at += WORKERS * p.splits * LANES;
                if (at < n) outputs = batch_outputs<G>(p, sums, k, tile0, at);
            }
            batch_meet(p); /* till all have read */
        }
    }
#endif
}

template <prepare_kind KIND> __global__ void __launch_bounds__(BLOCK, 2) prepare_inputs(const __grid_constant__ prepare_args p)
{
    let_next_start();
    if (blockIdx.y > 0) {
        wait_for_previous();
        advance_states(p);
    } else {
        prepare_row<KIND>(p, blockIdx.x);
    }
}

/* Whether there are kernels for these matrices: all that takes quantized inputs is FP8, and the other way round, so that the
 * order of columns is one. */
bool takes(const struct queue *q, const cuda_matrix *m, int n, int64_t rows)
{
    int64_t cols = m[0].cols;
    if (!q->has_wide || !q->map_maker || rows <= ROWS_FEW || rows > q->batch.rows || cols > q->batch.cols) return false;
    if (rows > ROWS_EXACT && !q->rounded) return false;
    for (int i = 0; i < n; i++) {
        bool quantized = m[i].input == INPUT_FP8_ROW;
        if (m[i].cols != cols || !cuda_streams(q, &m[i]) || cols % unit_cols(m[i].format) != 0) return false;
        if (quantized != (m[i].format == WEIGHT_FP8)) return false;
    }
    return true;
}

int tiles16(const cuda_matrix &m)
{
    return (m.rows + 15) / 16;
}

bool is_few(const struct queue *q, const cuda_matrix *m, int n)
{
    int tiles = 0;
    for (int i = 0; i < n; i++) tiles += tiles16(m[i]);
    return tiles < 3 * q->sms;
}

int items_of(const batch_args &a, int m)
{
    return (tiles16(a.m[m]) + a.each * a.rounds - 1) / (a.each * a.rounds);
}

/* Tiles an item, blocks a cluster: no more items than multiprocessors. */
void divide(const struct queue *q, batch_args &a)
{
    bool few = is_few(q, a.m, a.n);
    a.splits = few ? 8 : 1;
    a.rounds = 1;
    a.each = few ? WORKERS : 1;
    for (int items; !few; a.each++) {
        if (a.each > WORKERS) a.each = WORKERS, a.rounds++;
        items = 0;
        for (int i = 0; i < a.n; i++) items += items_of(a, i);
        if (items <= q->sms) break;
    }
}

/* The ring; returns bytes of shared memory, 0: too many. */
template <int G> size_t batch_shared(const struct queue *q, batch_args &a, enum side side)
{
    int inputs = 0, weights = 0, units = 0, each = 1;
    for (int i = 0; i < a.n; i++) {
        bool fp8 = a.m[i].format == WEIGHT_FP8, fp4 = a.m[i].format == WEIGHT_NVFP4;
        int in = unit_cols(a.m[i].format) / PANEL * G * (fp8 || !BATCH_EXACT<G> ? 1 : PARTS) * PANEL_BYTES;
        int of_tile = fp4 ? 2 * FP4_UNIT_BYTES : 16 * UNIT_BYTES;
        batch_shares s(a, a.m[i]);
        if (in > inputs) inputs = in;
        if (a.each * of_tile > weights) weights = a.each * of_tile;
        if (s.begin(1) * a.rounds > units) units = s.begin(1) * a.rounds;
        if (a.splits > 1 && s.each > each) each = s.each;
    }
    size_t sums = (size_t)each * 8 * G * SUM_ROW * sizeof(float), most = (size_t)q->shared_max - 1024;
    if (G == 1) most = side == LEFT ? LEFT_SHARED : BESIDE_SHARED;
    if (sums >= most) return 0;
    a.inverse = (unsigned)((1ull << 32) / (unsigned)(16 * a.each) + 1);
    a.weights_at = inputs;
    a.stage_bytes = (inputs + weights + PANEL_BYTES - 1) / PANEL_BYTES * PANEL_BYTES;
    a.stages = (int)((most - sums) / a.stage_bytes);
    if (a.stages > STAGES_MOST) a.stages = STAGES_MOST;
    if (a.stages > units) a.stages = units;
    if (a.stages < 2 && units > 1) return 0;
    return G == 1 && side == LEFT ? LEFT_SHARED : (size_t)a.stages * a.stage_bytes + sums;
}

/* START; or only say whether there is room for it, and for all of its clusters at once. */
enum batch_want { ROOM, AT_ONCE, START };

template <int G> bool start(struct queue *q, const char *operation, batch_args &a, enum side side, batch_want want)
{
    batch_maps maps = {};
    for (int i = 0; i < a.n; i++) a.first[i + 1] = a.first[i] + items_of(a, i);
    size_t bytes = batch_shared<G>(q, a, side);
    for (int i = 0; i < a.n && bytes > 0; i++) {
        const cuda_matrix &m = a.m[i];
        int64_t pairs = row_bytes_of(m) / 2; /* of bytes */
        if (m.format != WEIGHT_NVFP4 && !tensor_map(q->map_maker, &maps.m[i], m.data, m.rows, pairs, pairs, a.each * 16)) bytes = 0;
    }
    if (bytes == 0) return false;
    cluster_launch l(q, BATCH_BLOCK<G>, (unsigned)(a.first[a.n] * a.splits), (unsigned)a.splits, bytes);
    if (want == START) l.start(q, operation, batch_products<G>, a, maps);
    return want != AT_ONCE || l.at_once(q, operation, batch_products<G>) >= a.first[a.n];
}

bool run(struct queue *q, const char *operation, batch_args &a, enum side side, batch_want want)
{
    switch (groups_of(a.rows)) {
    case 1: return start<1>(q, operation, a, side, want);
    case 2: return start<2>(q, operation, a, side, want);
    case 4: return start<4>(q, operation, a, side, want);
    case 8: return start<8>(q, operation, a, side, want);
    default: return start<16>(q, operation, a, side, want);
    }
}

/* Blocks a cluster: as many as let all clusters run at once. */
bool split(struct queue *q, const char *operation, batch_args &a, enum side side)
{
    int most = a.splits;
    bool exact = a.rows <= ROWS_EXACT;
    for (; a.splits > 1 && a.splits >= SPLITS_LEAST; a.splits--) {
        a.crew = exact ? CREW : a.splits;
        if (run(q, operation, a, side, AT_ONCE)) return true;
    }
    a.splits = most;
    a.crew = exact ? CREW : a.splits;
    return run(q, operation, a, side, ROOM);
}

/* Of clusters two have room on a multiprocessor. */
enum side side_of(const batch_args &a)
{
    return a.splits > 1 ? RIGHT : LEFT;
}

/* How the matrices of a are divided for so many rows; false: there is no kernel for them. */
bool plan(struct queue *q, const char *operation, batch_args &a, int64_t rows)
{
    a.rows = (int)rows;
    if (!takes(q, a.m, a.n, rows)) return false;
    divide(q, a);
    return split(q, operation, a, side_of(a));
}

template <prepare_kind KIND> void prepare(struct queue *q, const char *operation, const prepare_args &in)
{
    launch<BLOCK>(q, operation, true, prepare_inputs<KIND>, dim3((unsigned)in.x.rows, in.conv ? 1 + ADVANCERS : 1),
                  prepare_shared(in.cols), in);
}

/* Inputs of the matrices of a, unless they are `there`, and their product. */
template <prepare_kind KIND>
bool product(struct queue *q, const char *operation, batch_args &a, prepare_args &in, bool there = false)
{
    struct cuda_batch &b = q->batch;
    if (!plan(q, operation, a, in.x.rows)) return false;
    a.parts = (const uint8_t *)b.parts;
    a.quantized = (const uint8_t *)b.quantized;
    a.input_scale = b.scale;
    in.cols = a.m[0].cols;
    prepare_for(in, a.rows);
    for (int i = 0; i < a.n; i++)
        if (a.m[i].input == INPUT_FP8_ROW)
            in.quantized = (uint8_t *)b.quantized, in.scale = b.scale;
        else
            in.parts = (uint8_t *)b.parts;
    if (in.parts) b.known = KIND == PREPARE_NORMED ? in.made.data : nullptr;
    if (!there) prepare<KIND>(q, operation, in);
    return run(q, operation, a, side_of(a), START);
}

} /* namespace */

void cuda_batch_prepare(struct queue *q, struct mat x)
{
    prepare_args in = {};
    in.x = x;
    in.cols = (int)x.cols;
    prepare_for(in, x.rows);
    in.parts = (uint8_t *)q->batch.parts;
    q->batch.known = nullptr;
    prepare<PREPARE_RAW>(q, "experts", in);
}

bool cuda_batch_product(struct queue *q, struct mat y, struct mat x, const struct cuda_matrix *m)
{
    batch_args a = {};
    prepare_args in = {};
    a.n = 1;
    a.m[0] = *m;
    a.out[0] = y;
    in.x = x;
    return product<PREPARE_RAW>(q, "matmul", a, in);
}

bool cuda_batch_norm_products(struct queue *q, const struct norm_products *r)
{
    batch_args a = {};
    prepare_args in = {};
    a.n = r->n;
    for (int i = 0; i < r->n; i++) {
        a.m[i] = cuda_matrix_of(r->w[i]);
        a.out[i] = r->out[i];
    }
    /* whatever is done now, h will be another */
    q->batch.known = q->prefill.known = nullptr;
    if (r->x.rows > ROWS_EXACT && !is_few(q, a.m, a.n)) return false; /* dense.cu is faster */
    in.x = r->x;
    in.made = r->h;
    in.gain = r->gain;
    in.eps = r->eps;
    return product<PREPARE_NORMED>(q, "norm_products", a, in);
}

bool cuda_batch_delta_out_takes(struct queue *q, const struct delta_run *r)
{
    batch_args a = {};
    a.n = 1;
    a.m[0] = cuda_matrix_of(r->out);
    return a.m[0].input != INPUT_FP8_ROW && plan(q, "delta_run", a, r->raw.rows);
}

bool cuda_batch_delta_out(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows, enum delta_done done)
{
    batch_args a = {};
    prepare_args in = prepare_gated(r);
    a.n = 1;
    a.m[0] = cuda_matrix_of(r->out);
    a.out[0] = r->y;
    a.add = r->x;
    in.conv = done == DELTA_TO_ADVANCE ? r->state->conv : nullptr;
    in.rows = *rows;
    in.u = r->u;
    in.keep = r->shape->kernel - 1;
    return product<PREPARE_GATED>(q, "delta_run", a, in, done == DELTA_INPUTS);
}

bool cuda_batch_attention_out(struct queue *q, const struct attention_run *r)
{
    batch_args a = {};
    prepare_args in = {};
    a.n = 1;
    a.m[0] = cuda_matrix_of(r->o);
    a.out[0] = r->y;
    a.add = r->x;
    in.x = r->att;
    return product<PREPARE_RAW>(q, "attention_run", a, in);
}

bool cuda_batch_shared_down(struct queue *q, const struct moe_run *r, bool ask)
{
    batch_args a = {};
    struct cuda_batch &b = q->batch;
    a.n = 1;
    a.m[0] = cuda_matrix_of(r->w_down);
    a.out[0] = r->y;
    a.add = r->x;
    a.rows = (int)r->h.rows;
    a.crew = a.rows > ROWS_EXACT ? 1 : CREW / 2;
    a.parts = (const uint8_t *)b.shared_parts;
    a.quantized = (const uint8_t *)b.shared_quantized;
    a.input_scale = b.shared_scale;
    a.down = b.down;
    a.factor = b.factor;
    a.gate = r->shared_gate;
    a.k = r->picks->k;
    a.splits = a.each = a.rounds = 1;
    return (!ask || takes(q, a.m, 1, a.rows)) && run(q, "experts", a, RIGHT, ask ? ROOM : START);
}
