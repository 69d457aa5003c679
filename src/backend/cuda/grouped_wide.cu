/* The routed experts of many rows on compute capability 9.0a: NVFP4 weights, inputs rounded to BF16. Slots and tiles of slots
 * are those of grouped.cu. An item is 256 weight rows of a tile: 128 gate and the same 128 up rows, or 256 down rows. Blocks
 * take items in turn, so that those that read the same weights run at the same time and memory is asked once.
 *
 * Eight warps multiply, in two groups of four, each group 64 rows of either half of the item; a group's two products take
 * turns, so that one is under way while the other's weights are decoded. A warp has its rows of weights copied into a ring
 * of its own, units ahead, across items. Four more warps gather the slots' inputs, 64 columns at a time: a panel. */
#include "backend/cuda/batch.cuh"
#include "backend/cuda/prefill.h"

namespace {

constexpr int STEPS = PANEL / 16; /* of the instruction, a panel */
constexpr int MULTIPLIERS = 8, GATHERERS = 4 * LANES, WIDE_BLOCK = MULTIPLIERS * LANES + GATHERERS, ITEM_ROWS = 256;
[[maybe_unused]] constexpr int FEWER = 40, MORE = 232; /* registers of a thread that gathers, that multiplies */

struct wide_args {
    cuda_experts e;
    cuda_prefill s;
    const __nv_bfloat16 *x; /* inputs of gate and up, by row; of down, by slot */
    int items;              /* most of a block */
};

/* MOST: slots of a tile. Shared memory: panels, rings of weights, the block's items. */
template <int MOST> struct wide_form {
    static constexpr int PANELS_AHEAD = MOST > 32 ? 6 : 8, UNITS_AHEAD = MOST > 32 ? 3 : 4;
    static constexpr int STEP = MOST > 32 ? 32 : 8; /* slots are multiplied by multiples of */
    static constexpr int PANEL_SIZE = MOST * 128, RING = UNITS_AHEAD * 4 * FP4_UNIT_BYTES;
    static constexpr int RINGS_AT = PANELS_AHEAD * PANEL_SIZE, ITEMS_AT = RINGS_AT + MULTIPLIERS * RING;
};

/* Tile and rows of an item. */
struct wide_work {
    int expert, first, tokens, row0;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int MOST> struct wide_barriers {
    using form = wide_form<MOST>;
    uint64_t full[form::PANELS_AHEAD], empty[form::PANELS_AHEAD], weights[MULTIPLIERS][form::UNITS_AHEAD];

    __device__ __forceinline__ void init()
    {
        for (int i = 0; i < form::PANELS_AHEAD; i++) barrier_init(&full[i], GATHERERS), barrier_init(&empty[i], MULTIPLIERS);
        for (int w = 0; w < MULTIPLIERS; w++)
            for (int i = 0; i < form::UNITS_AHEAD; i++) barrier_init(&weights[w][i], 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
};

/* A warp's weights: of a unit of columns sixteen rows of either half, four units of parts.h. */
template <int MOST, bool DOWN_ROWS> struct wide_weights {
    using form = wide_form<MOST>;
    const wide_args &a;
    const wide_work *work;
    uint8_t *ring;
    uint64_t *full;
    int n, units; /* items; units of a row */
    ring_place place;
    /* asked for next */
    int item, unit, slot;
    const uint8_t *at[2];

    __device__ __forceinline__ wide_weights(const wide_args &args, const wide_work *w, int items, uint8_t *to, uint64_t *barriers)
        : a(args), work(w), ring(to), full(barriers), n(items), units(args.e.m[DOWN_ROWS ? DOWN : GATE].cols / FP4_UNIT_COLS), place{ 0, 0 },
          item(0), unit(0), slot(0), at{}
    {
#pragma unroll 1
        for (int i = 0; i < form::UNITS_AHEAD; i++) ask();
    }
    /* By the whole warp, which has read what was in the slot. */
    __device__ __forceinline__ void ask()
    {
        if (item == n) return;
        int warp = threadIdx.x / LANES, half = TEAM_WARPS * 16;
        unsigned pitch = units * FP4_UNIT_BYTES;
        if (unit == 0) {
            const wide_work &w = work[item];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int row = w.row0 + warp % TEAM_WARPS * 16 + warp / TEAM_WARPS * (DOWN_ROWS ? 2 * half : half) + (DOWN_ROWS ? i * half : 0);
                at[i] = tile_at(a.e.m[DOWN_ROWS ? DOWN : i], w.expert, row / 8);
            }
        }
        if (threadIdx.x % LANES == 0) {
            uint64_t *b = full + slot;
            uint32_t to = shared_at(ring) + slot * 4 * FP4_UNIT_BYTES;
            barrier_expect(b, 4 * FP4_UNIT_BYTES);
#pragma unroll
            for (int i = 0; i < 4; i++)
                copy_bulk(to + i * FP4_UNIT_BYTES, at[i / 2] + i % 2 * pitch, FP4_UNIT_BYTES, b);
        }
        at[0] += FP4_UNIT_BYTES;
        at[1] += FP4_UNIT_BYTES;
        slot = slot + 1 == form::UNITS_AHEAD ? 0 : slot + 1;
        if (++unit == units) unit = 0, item++;
    }
    __device__ __forceinline__ const uint8_t *await()
    {
        barrier_wait(full + place.slot, place.phase);
        return ring + place.slot * 4 * FP4_UNIT_BYTES;
    }
    __device__ __forceinline__ void leave()
    {
        __syncwarp();
        ask();
        place.advance(form::UNITS_AHEAD);
    }
};

/* 64 columns of sixteen rows. */
struct wide_words {
    uint2 w[2];
    uint32_t scale[2];

    /* from: the first eight rows' unit */
    __device__ __forceinline__ void load(const uint8_t *from, int panel)
    {
        int lane = threadIdx.x % LANES;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            w[h] = *(const uint2 *)(from + h * FP4_UNIT_BYTES + panel / 2 * 512 + panel % 2 * 8 + lane * 16);
            scale[h] = *(const uint16_t *)(from + h * FP4_UNIT_BYTES + 1024 + lane / 2 * 8 + panel * 2);
        }
    }
    __device__ __forceinline__ void decode(uint32_t (&f)[STEPS][4]) const
    {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < STEPS / 2; i++) {
                uint32_t v = i ? w[h].y : w[h].x;
                __nv_bfloat162 s = fp4_scale(scale[h], i);
                f[2 * i][h] = bf16_pair_product(fp4_pair<0>(v), s);
                f[2 * i][2 + h] = bf16_pair_product(fp4_pair<1>(v), s);
                f[2 * i + 1][h] = bf16_pair_product(fp4_pair<2>(v), s);
                f[2 * i + 1][2 + h] = bf16_pair_product(fp4_pair<3>(v), s);
            }
    }
};

/* The registers of this group of four warps from now on. */
template <int N> __device__ __forceinline__ void fewer_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ __forceinline__ void more_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

/* The compiler is to keep what an instruction under way reads. */
__device__ __forceinline__ void keep(uint32_t (&f)[STEPS][4])
{
#pragma unroll
    for (int k = 0; k < STEPS; k++) asm volatile("" : "+r"(f[k][0]), "+r"(f[k][1]), "+r"(f[k][2]), "+r"(f[k][3])::"memory");
}

/* Panels as a multiplying warp meets them. */
template <int MOST> struct wide_panels {
    uint32_t at;
    uint64_t *full, *empty;
    ring_place next, last; /* last: what instructions may still read */

    __device__ __forceinline__ uint64_t await()
    {
        barrier_wait(full + next.slot, next.phase);
        uint64_t x = wide_matrix(at + next.slot * wide_form<MOST>::PANEL_SIZE);
        next.advance(wide_form<MOST>::PANELS_AHEAD);
        return x;
    }
    __device__ __forceinline__ void leave()
    {
        if (threadIdx.x % LANES == 0) barrier_arrive(empty + last.slot);
        last.advance(wide_form<MOST>::PANELS_AHEAD);
    }
};

/* The first product's registers are free once the second is asked for, and the other way round. */
template <int N> struct wide_product {
    float sum[N / 8][4];
    uint32_t f[STEPS][4];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[n][i] = 0;
    }
    __device__ __forceinline__ void ask(uint64_t x)
    {
        wide_hold(sum);
        wide_begin();
#pragma unroll
        for (int k = 0; k < STEPS; k++) wide_mma<N>(sum, f[k], x + k * WIDE_STEP);
        wide_commit();
    }
    __device__ __forceinline__ void hold()
    {
        wide_hold(sum);
        keep(f);
    }
};

template <int N, int MOST, bool DOWN_ROWS>
__device__ __forceinline__ void item_sums(wide_product<N> &a, wide_product<N> &b,
                                          wide_weights<MOST, DOWN_ROWS> &weights, wide_panels<MOST> &panels)
{
    a.clear();
    b.clear();
#pragma unroll 1
    for (int unit = 0; unit < weights.units; unit++) {
        const uint8_t *from = weights.await();
#pragma unroll 1
        for (int panel = 0; panel < FP4_UNIT_COLS / PANEL; panel++) {
            wide_words u, v;
            u.load(from, panel);
            u.decode(a.f);
            uint64_t x = panels.await();
            a.ask(x);
            v.load(from + 2 * FP4_UNIT_BYTES, panel);
            wide_wait<1>();
            b.hold();
            if (unit + panel) panels.leave();
            v.decode(b.f);
            b.ask(x);
            wide_wait<1>();
            a.hold();
        }
        weights.leave();
    }
    wide_wait<0>();
    b.hold();
    panels.leave();
}

/* Of a matrix of 8 x 8, rows and columns exchanged: lane 4 g + t has columns 2 t, 2 t + 1 of row g. */
__device__ __forceinline__ uint32_t turned(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* SiLU(gate) up of a warp's sixteen rows, to the slots' hidden rows. */
template <int N>
__device__ __forceinline__ void store_hidden(const wide_args &p, const wide_work &w, const float (&gate)[N / 8][4],
                                             const float (&up)[N / 8][4])
{
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int inner = p.e.m[GATE].rows, c = w.row0 + warp * 16;
    float u = FP4_UNIT / p.e.globals[w.expert], v = FP4_UNIT / p.e.globals[p.e.n + w.expert];
    __nv_bfloat16 *to = (__nv_bfloat16 *)p.s.hidden + (int64_t)(w.first + g) * inner + c / PANEL * PANEL + panel_place(c % PANEL + 2 * t, false);
#pragma unroll
    for (int n = 0; n < N / 8; n++, to += 8 * (int64_t)inner) {
        uint32_t x[2];
#pragma unroll
        for (int h = 0; h < 2; h++)
            x[h] = turned(pack(silu(gate[n][2 * h] * u) * (up[n][2 * h] * v), silu(gate[n][2 * h + 1] * u) * (up[n][2 * h + 1] * v)));
        if (n * 8 + g < w.tokens) *(uint2 *)to = make_uint2(x[0], x[1]);
    }
}

/* A warp's sixteen rows from row on, in BF16. */
template <int N>
__device__ __forceinline__ void store_down(const wide_args &p, const wide_work &w, const float (&sum)[N / 8][4], int row)
{
    int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int width = p.e.m[DOWN].rows;
    float unit = FP4_UNIT / p.e.globals[DOWN * p.e.n + w.expert];
    bool odd = t % 2;
    __nv_bfloat16 *to = (__nv_bfloat16 *)p.s.down + (int64_t)(w.first + g) * width + row + (odd ? 6 + 2 * t : 2 * t);
#pragma unroll
    for (int n = 0; n < N / 8; n++, to += 8 * (int64_t)width) {
        uint32_t x[2];
#pragma unroll
        for (int h = 0; h < 2; h++) x[h] = turned(pack(sum[n][2 * h] * unit, sum[n][2 * h + 1] * unit));
        uint32_t other = __shfl_xor_sync(ALL, odd ? x[0] : x[1], 1);
        if (n * 8 + g < w.tokens) *(uint2 *)to = odd ? make_uint2(other, x[1]) : make_uint2(x[0], other);
    }
}

template <int N, int MOST, bool DOWN_ROWS>
__device__ __forceinline__ void run_item(const wide_args &p, const wide_work &w, wide_weights<MOST, DOWN_ROWS> &weights,
                                         wide_panels<MOST> &panels)
{
    wide_product<N> a, b;
    item_sums(a, b, weights, panels);
    if constexpr (DOWN_ROWS) {
        int warp = threadIdx.x / LANES, row = w.row0 + warp / TEAM_WARPS * 128 + warp % TEAM_WARPS * 16;
        store_down<N>(p, w, a.sum, row);
        store_down<N>(p, w, b.sum, row + 64);
    } else {
        store_hidden<N>(p, w, a.sum, b.sum);
    }
}

/* The warps that gather. A panel is announced when LAG more have been asked for. */
template <int MOST, bool DOWN_ROWS>
__device__ __forceinline__ void gather_panels(const wide_args &p, const wide_work *work, int n, uint32_t to, uint64_t *full,
                                              uint64_t *empty)
{
    using form = wide_form<MOST>;
    constexpr int STEP = GATHERERS / 8, EACH = MOST / STEP, LAG = form::PANELS_AHEAD / 2;
    int row = threadIdx.x % GATHERERS / 8, piece = threadIdx.x % 8, cols = p.e.m[DOWN_ROWS ? DOWN : GATE].cols;
    ring_place ask = { 0, 1 }, tell = { 0, 0 };
    int ahead = 0;
#pragma unroll 1
    for (int item = 0; item < n; item++) {
        const wide_work &w = work[item];
        int at[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int slot = row + STEP * i;
            at[i] = slot < w.tokens ? DOWN_ROWS ? w.first + slot : p.s.slot_row[w.first + slot] : 0;
        }
#pragma unroll 1
        for (int c = 0; c < cols; c += PANEL) {
            barrier_wait(empty + ask.slot, ask.phase);
            uint32_t panel = to + ask.slot * form::PANEL_SIZE + row * 128 + (piece ^ row % 8) * 16;
            const __nv_bfloat16 *x = p.x + c + piece * 8;
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (row + STEP * i < w.tokens) copy_async16(panel + i * STEP * 128, x + (int64_t)at[i] * cols, true);
            copy_commit();
            ask.advance(form::PANELS_AHEAD);
            if (ahead < LAG) {
                ahead++;
                continue;
            }
            copy_wait<LAG>();
            wide_show();
            barrier_arrive(full + tell.slot);
            tell.advance(form::PANELS_AHEAD);
        }
    }
    copy_wait<0>();
    wide_show();
    for (; ahead > 0; ahead--) {
        barrier_arrive(full + tell.slot);
        tell.advance(form::PANELS_AHEAD);
    }
}
#endif

template <int MOST, bool DOWN_ROWS>
__global__ void __launch_bounds__(WIDE_BLOCK, 1) wide_experts(const __grid_constant__ wide_args p)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using form = wide_form<MOST>;
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ wide_barriers<MOST> barriers;
    wide_work *work = (wide_work *)(shared + form::ITEMS_AT);
    int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0);
    int each = p.e.m[DOWN_ROWS ? DOWN : GATE].rows / (DOWN_ROWS ? ITEM_ROWS : ITEM_ROWS / 2);
    if (threadIdx.x == 0) barriers.init();
    if (!DOWN_ROWS) wait_for_previous();
    let_next_start(); /* which may count on the tiles */
    int items = __ldcg(p.s.tiles) * each, n = ((int)gridDim.x - 1 - (int)blockIdx.x + items) / (int)gridDim.x;
    for (int i = threadIdx.x; i < n; i += WIDE_BLOCK) {
        int number = blockIdx.x + i * gridDim.x;
        int4 tile = __ldcg((const int4 *)p.s.tiles + 1 + number / each);
        work[i] = { tile.x, tile.y, tile.z, number % each * (DOWN_ROWS ? ITEM_ROWS : ITEM_ROWS / 2) };
    }
    __syncthreads();
    uint32_t at = shared_at(shared);
    if (warp >= MULTIPLIERS) {
        fewer_registers<FEWER>();
        if (DOWN_ROWS) wait_for_previous();
        gather_panels<MOST, DOWN_ROWS>(p, work, n, at, barriers.full, barriers.empty);
    } else {
        more_registers<MORE>();
        wide_weights<MOST, DOWN_ROWS> weights(p, work, n, shared + form::RINGS_AT + warp * form::RING, barriers.weights[warp]);
        wide_panels<MOST> panels = { at, barriers.full, barriers.empty, { 0, 0 }, { 0, 0 } };
#pragma unroll 1
        for (int i = 0; i < n; i++) {
            const wide_work &w = work[i];
            constexpr int STEP = form::STEP;
            int n_of = (w.tokens + STEP - 1) / STEP;
            if (n_of <= 1)
                run_item<STEP>(p, w, weights, panels);
            else if (n_of == 2)
                run_item<2 * STEP>(p, w, weights, panels);
            else if (n_of == 3 || MOST == 3 * STEP)
                run_item<3 * STEP>(p, w, weights, panels);
            else
                run_item<MOST>(p, w, weights, panels);
        }
    }
#endif
}

template <int MOST> size_t shared_of(int items)
{
    return wide_form<MOST>::ITEMS_AT + (size_t)items * sizeof(wide_work);
}

template <int MOST> bool start(struct queue *q, const cuda_experts &e, const struct picks *p, int64_t rows)
{
    int64_t picked = rows * p->k, tiles = picked / MOST + (e.n < picked ? e.n : picked);
    unsigned blocks = (unsigned)q->sms;
    int up = (int)(tiles * (e.m[GATE].rows / (ITEM_ROWS / 2)) / blocks + 1), down = (int)(tiles * (e.m[DOWN].rows / ITEM_ROWS) / blocks + 1);
    size_t most = (size_t)q->shared_max - 2048;
    if (shared_of<MOST>(up) > most || shared_of<MOST>(down) > most) return false;
    cuda_sort_picks(q, p, rows, e.n, MOST);
    wide_args a = { e, q->prefill, (const __nv_bfloat16 *)q->prefill.inputs };
    launch<WIDE_BLOCK>(q, "experts", true, wide_experts<MOST, false>, dim3(blocks), shared_of<MOST>(up), a);
    a.x = (const __nv_bfloat16 *)q->prefill.hidden;
    launch<WIDE_BLOCK>(q, "experts", true, wide_experts<MOST, true>, dim3(blocks), shared_of<MOST>(down), a);
    return true;
}

} /* namespace */

bool cuda_grouped_wide(struct queue *q, const struct cuda_experts *e, const struct picks *p, int64_t rows)
{
    const cuda_matrix &up = e->m[GATE], &down = e->m[DOWN];
    if (!q->has_wide || !q->rounded || up.rows % (ITEM_ROWS / 2) != 0 || down.rows % ITEM_ROWS != 0) return false;
    for (int i = 0; i < 3; i++)
        if (e->m[i].format != WEIGHT_NVFP4 || e->m[i].input != INPUT_AS_IS || e->m[i].cols % FP4_UNIT_COLS != 0) return false;
    return rows * p->k > 24 * (int64_t)e->n ? start<96>(q, *e, p, rows) : start<32>(q, *e, p, rows);
}
