/* The routed experts of many rows on compute capability 9.0a: NVFP4 weights, inputs rounded to BF16. Slots and tiles of slots
 * are those of grouped.cu. An item is 256 weight rows of a tile: 128 gate and the same 128 up rows, or 256 down rows. Blocks
 * take items in turn, so that those that read the same weights run at the same time and memory is asked once.
 *
 * Groups of four warps multiply. For tiles of many slots two groups, each 64 rows of either half of the item; a group's two
 * products take turns, so that one is under way while the other's weights are decoded. For tiles of few slots, which take
 * fewer registers, four groups of 64 rows, of each eight rows of either half a warp: what decodes while another multiplies
 * is another group. A warp has its rows of weights copied into a ring of its own, units ahead, across items. Four more warps
 * gather the slots' inputs, 64 columns at a time: a panel; those of down a thread has copied. */
#include "backend/cuda/batch.cuh"
#include "backend/cuda/prefill.h"
#include "backend/cuda/tensor_map.cuh"

namespace {

[[maybe_unused]] constexpr int STEPS = PANEL / 16; /* of the instruction, a panel */
constexpr int GATHERERS = 4 * LANES, ITEM_ROWS = 256; /* threads; rows */

struct wide_args {
    cuda_experts e;
    cuda_prefill s;
};

/* MOST: slots of a tile. Shared memory: panels, rings of weights, the block's items. */
template <int MOST> struct wide_form {
    static constexpr bool MANY = MOST > 32;
    static constexpr int PRODUCTS = MANY ? 2 : 1, MULTIPLIERS = ITEM_ROWS / 16 / PRODUCTS; /* of a warp; warps */
    static constexpr int BLOCK = MULTIPLIERS * LANES + GATHERERS;
    static constexpr int PANELS_AHEAD = MANY ? 6 : 8, UNITS_AHEAD = MANY ? 3 : 4;
    enum {
        FEWER = MANY ? 24 : 40,
        MORE = MANY ? 240 : 104, /* registers of those that gather, multiply */
        STEP = MANY ? 32 : 8,    /* slots are multiplied by multiples of */
    };
    static constexpr int PANEL_SIZE = MOST * 128, SLOT = 2 * PRODUCTS * FP4_UNIT_BYTES, RING = UNITS_AHEAD * SLOT;
    static constexpr int RINGS_AT = PANELS_AHEAD * PANEL_SIZE, ITEMS_AT = RINGS_AT + MULTIPLIERS * RING;
};

/* Tile and rows of an item. */
struct wide_work {
    int expert, first, tokens, row0;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int MOST> struct wide_barriers {
    using form = wide_form<MOST>;
    uint64_t full[form::PANELS_AHEAD], empty[form::PANELS_AHEAD], weights[form::MULTIPLIERS][form::UNITS_AHEAD];

    __device__ __forceinline__ void init(int tellers)
    {
        for (int i = 0; i < form::PANELS_AHEAD; i++) barrier_init(&full[i], tellers), barrier_init(&empty[i], form::MULTIPLIERS);
        for (int w = 0; w < form::MULTIPLIERS; w++)
            for (int i = 0; i < form::UNITS_AHEAD; i++) barrier_init(&weights[w][i], 1);
        barriers_ready();
    }
};

/* A warp's weights: of a unit of columns sixteen rows a product, two units of parts.h each. */
template <int MOST, bool DOWN_ROWS> struct wide_weights {
    using form = wide_form<MOST>;
    static constexpr int HALF = TEAM_WARPS * 16;
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
    /* The first of a warp's rows, of the item's; of gate and up rows alike. */
    static __device__ __forceinline__ int row_of(int warp)
    {
        if (!form::MANY) return warp * (DOWN_ROWS ? 16 : 8);
        return warp % TEAM_WARPS * 16 + warp / TEAM_WARPS * (DOWN_ROWS ? 2 * HALF : HALF);
    }
    /* By the whole warp, which has read what was in the slot. */
    __device__ __forceinline__ void ask()
    {
        if (item == n) return;
        int warp = threadIdx.x / LANES;
        unsigned pitch = units * FP4_UNIT_BYTES;
        if (unit == 0) {
            const wide_work &w = work[item];
            int row = w.row0 + row_of(warp);
#pragma unroll
            for (int i = 0; i < 2; i++)
                at[i] = DOWN_ROWS ? tile_at(a.e.m[DOWN], w.expert, row / 8 + i * (form::MANY ? HALF / 8 : 1))
                                  : tile_at(a.e.m[i], w.expert, row / 8);
        }
        if (threadIdx.x % LANES == 0) {
            uint64_t *b = full + slot;
            uint32_t to = shared_at(ring) + slot * form::SLOT;
            barrier_expect(b, form::SLOT);
#pragma unroll
            for (int i = 0; i < 2 * form::PRODUCTS; i++)
                copy_bulk(to + i * FP4_UNIT_BYTES, form::MANY ? at[i / 2] + i % 2 * pitch : at[i], FP4_UNIT_BYTES, b);
        }
        at[0] += FP4_UNIT_BYTES;
        at[1] += FP4_UNIT_BYTES;
        slot = slot + 1 == form::UNITS_AHEAD ? 0 : slot + 1;
        if (++unit == units) unit = 0, item++;
    }
    __device__ __forceinline__ const uint8_t *await()
    {
        barrier_wait(full + place.slot, place.phase);
        return ring + place.slot * form::SLOT;
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
        for (int h = 0; h < 2; h++) {
            fp4_scales scales(scale[h]);
#pragma unroll
            for (int i = 0; i < STEPS / 2; i++) {
                uint32_t v = i ? w[h].y : w[h].x;
                __nv_bfloat162 s = scales.of(i);
                f[2 * i][h] = bf16_pair_product(fp4_pair<0>(v), s);
                f[2 * i][2 + h] = bf16_pair_product(fp4_pair<1>(v), s);
                f[2 * i + 1][h] = bf16_pair_product(fp4_pair<2>(v), s);
                f[2 * i + 1][2 + h] = bf16_pair_product(fp4_pair<3>(v), s);
            }
        }
    }
};

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

/* A product's sums, and the weights that instructions under way read. */
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
        wide_keep(f);
    }
};

/* Two products by turns. */
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

/* One product: other groups multiply meanwhile. */
template <int N, int MOST, bool DOWN_ROWS>
__device__ __forceinline__ void item_sums(wide_product<N> &a, wide_weights<MOST, DOWN_ROWS> &weights, wide_panels<MOST> &panels)
{
    a.clear();
#pragma unroll 1
    for (int unit = 0; unit < weights.units; unit++) {
        const uint8_t *from = weights.await();
#pragma unroll
        for (int panel = 0; panel < FP4_UNIT_COLS / PANEL; panel++) {
            wide_words u;
            u.load(from, panel);
            u.decode(a.f);
            a.ask(panels.await());
            wide_wait<0>();
            a.hold();
            panels.leave();
        }
        weights.leave();
    }
}

/* SiLU(gate) up of a warp's rows from c on, to the slots' hidden rows. HALVES of eight rows: their gate sums are in gate[n][2 h],
 * gate[n][2 h + 1], for up likewise from UP on. */
template <int N, int HALVES, int UP>
__device__ __forceinline__ void store_hidden(const wide_args &p, const wide_work &w, const float (&gate)[N / 8][4],
                                             const float (&up)[N / 8][4], int c)
{
    int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4, inner = p.e.m[GATE].rows;
    float u = FP4_UNIT / p.e.globals[w.expert], v = FP4_UNIT / p.e.globals[p.e.n + w.expert];
    __nv_bfloat16 *to = (__nv_bfloat16 *)p.s.hidden + (int64_t)(w.first + g) * inner + c / PANEL * PANEL + panel_place(c % PANEL + 2 * t, false);
#pragma unroll
    for (int n = 0; n < N / 8; n++, to += 8 * (int64_t)inner) {
        uint32_t x[HALVES];
#pragma unroll
        for (int h = 0; h < HALVES; h++)
            x[h] = turned(pack(silu(gate[n][2 * h] * u) * (up[n][UP + 2 * h] * v), silu(gate[n][2 * h + 1] * u) * (up[n][UP + 2 * h + 1] * v)));
        if (n * 8 + g >= w.tokens) continue;
        if constexpr (HALVES == 2)
            *(uint2 *)to = make_uint2(x[0], x[1]); /* the second eight rows lie behind the first */
        else
            *(uint32_t *)to = x[0];
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
    int row = w.row0 + weights.row_of(threadIdx.x / LANES);
    wide_product<N> a;
    if constexpr (wide_form<MOST>::MANY) {
        wide_product<N> b;
        item_sums(a, b, weights, panels);
        if constexpr (DOWN_ROWS) {
            store_down<N>(p, w, a.sum, row);
            store_down<N>(p, w, b.sum, row + weights.HALF);
        } else {
            store_hidden<N, 2, 0>(p, w, a.sum, b.sum, row);
        }
    } else {
        item_sums(a, weights, panels);
        if constexpr (DOWN_ROWS)
            store_down<N>(p, w, a.sum, row);
        else
            store_hidden<N, 1, 2>(p, w, a.sum, a.sum, row);
    }
}

/* The warps that gather rows. A panel is announced when LAG more have been asked for. */
template <int MOST>
__device__ __forceinline__ void gather_panels(const wide_args &p, const wide_work *work, int n, uint32_t to, uint64_t *full,
                                              uint64_t *empty)
{
    using form = wide_form<MOST>;
    constexpr int STEP = GATHERERS / 8, LAG = form::PANELS_AHEAD / 2;
    int row = threadIdx.x % GATHERERS / 8, piece = threadIdx.x % 8, cols = p.e.m[GATE].cols;
    ring_place ask = { 0, 1 }, tell = { 0, 0 };
    int ahead = 0;
#pragma unroll 1
    for (int item = 0; item < n; item++) {
        const wide_work &w = work[item];
        const int *rows = p.s.slot_row + w.first + row;
        const __nv_bfloat16 *x = (const __nv_bfloat16 *)p.s.inputs + piece * 8;
        int left = w.tokens - row;
#pragma unroll 1
        for (int c = 0; c < cols; c += PANEL) {
            barrier_wait(empty + ask.slot, ask.phase);
            uint32_t panel = to + ask.slot * form::PANEL_SIZE + row * 128 + (piece ^ row % 8) * 16;
#pragma unroll 4
            for (int i = 0; i < left; i += STEP) copy_async16(panel + i * 128, x + (unsigned)rows[i] * (unsigned)cols, true);
            x += PANEL;
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

/* The same of down, whose slots lie one after the other, by one thread. */
template <int MOST>
__device__ __forceinline__ void copy_panels(const CUtensorMap &x, const wide_work *work, int n, int cols, uint32_t to, uint64_t *full,
                                            uint64_t *empty)
{
    using form = wide_form<MOST>;
    ring_place ask = { 0, 1 };
#pragma unroll 1
    for (int item = 0; item < n; item++) {
        const wide_work &w = work[item];
#pragma unroll 1
        for (int c = 0; c < cols; c += PANEL) {
            uint32_t panel = to + ask.slot * form::PANEL_SIZE;
            barrier_wait(empty + ask.slot, ask.phase);
            barrier_expect(full + ask.slot, (w.tokens + form::STEP - 1) / form::STEP * form::STEP * 128);
            for (int i = 0; i < w.tokens; i += form::STEP) copy_box(panel + i * 128, x, c, w.first + i, full + ask.slot);
            ask.advance(form::PANELS_AHEAD);
        }
    }
}
#endif

template <int MOST, bool DOWN_ROWS>
__global__ void __launch_bounds__(wide_form<MOST>::BLOCK, 1) wide_experts(const __grid_constant__ wide_args p, const __grid_constant__ CUtensorMap hidden)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using form = wide_form<MOST>;
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ wide_barriers<MOST> barriers;
    wide_work *work = (wide_work *)(shared + form::ITEMS_AT);
    int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0);
    int each = p.e.m[DOWN_ROWS ? DOWN : GATE].rows / (DOWN_ROWS ? ITEM_ROWS : ITEM_ROWS / 2);
    if (threadIdx.x == 0) barriers.init(DOWN_ROWS ? 1 : GATHERERS);
    if (!DOWN_ROWS) wait_for_previous();
    let_next_start(); /* which may count on the tiles */
    int items = __ldcg(p.s.tiles) * each, n = ((int)gridDim.x - 1 - (int)blockIdx.x + items) / (int)gridDim.x;
    for (int i = threadIdx.x; i < n; i += form::BLOCK) {
        int number = blockIdx.x + i * gridDim.x;
        int4 tile = __ldcg((const int4 *)p.s.tiles + 1 + number / each);
        work[i] = { tile.x, tile.y, tile.z, number % each * (DOWN_ROWS ? ITEM_ROWS : ITEM_ROWS / 2) };
    }
    __syncthreads();
    uint32_t at = shared_at(shared);
    if (warp >= form::MULTIPLIERS) {
        fewer_registers<form::FEWER>();
        if (DOWN_ROWS) wait_for_previous();
        if (!DOWN_ROWS)
            gather_panels<MOST>(p, work, n, at, barriers.full, barriers.empty);
        else if (threadIdx.x % GATHERERS == 0)
            copy_panels<MOST>(hidden, work, n, p.e.m[DOWN].cols, at, barriers.full, barriers.empty);
    } else {
        more_registers<form::MORE>();
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
            else if (n_of == 3)
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
    int inner = e.m[DOWN].cols;
    CUtensorMap hidden;
    if (!tensor_map(q->map_maker, &hidden, q->prefill.hidden, picked, inner, inner, wide_form<MOST>::STEP)) return false;
    cuda_sort_picks(q, p, rows, MOST);
    wide_args a = { e, q->prefill };
    launch<wide_form<MOST>::BLOCK>(q, "experts", true, wide_experts<MOST, false>, dim3(blocks), shared_of<MOST>(up), a, hidden);
    launch<wide_form<MOST>::BLOCK>(q, "experts", true, wide_experts<MOST, true>, dim3(blocks), shared_of<MOST>(down), a, hidden);
    return true;
}

} /* namespace */

bool cuda_grouped_wide(struct queue *q, const struct cuda_experts *e, const struct picks *p, int64_t rows)
{
    const cuda_matrix &up = e->m[GATE], &down = e->m[DOWN];
    if (!q->has_wide || !q->rounded || up.rows % (ITEM_ROWS / 2) != 0 || down.rows % ITEM_ROWS != 0) return false;
    for (int i = 0; i < 3; i++)
        if (e->m[i].format != WEIGHT_NVFP4 || e->m[i].input != INPUT_AS_IS || e->m[i].cols % FP4_UNIT_COLS != 0) return false;
    return rows * p->k > 24 * (int64_t)e->n ? start<128>(q, *e, p, rows) : start<32>(q, *e, p, rows);
}
