/* The routed experts of many rows on compute capability 9.0a: NVFP4 weights, inputs rounded to BF16. Slots and tiles of slots
 * are those of grouped.cu. An item is 256 weight rows of a tile: 128 gate and the same 128 up rows, or 256 down rows. Blocks
 * take items in turn, so that those that read the same weights run at the same time and memory is asked once.
 *
 * Groups of four warps multiply. For tiles of many slots two groups, each 64 rows of either half of the item; a group's two
 * products take turns, so that one is under way while the other's weights are decoded. For tiles of few slots, which take
 * fewer registers, four groups of 64 rows, of each eight rows of either half a warp; a panel, 64 columns of inputs, is
 * multiplied while the weights of the next one are decoded. One more group fills two rings, ahead and across items: a thread
 * has weights copied, 256 columns of all the item's rows at a time, three or four warps gather the slots' inputs, a panel at a time or,
 * where slots are few, four; those of down a thread has copied. */
#include "backend/cuda/batch.cuh"
#include "backend/cuda/prefill.h"
#include "backend/cuda/tensor_map.cuh"

namespace {

[[maybe_unused]] constexpr int STEPS = PANEL / 16; /* of the instruction, a panel */
constexpr int ITEM_ROWS = 256, ITEM_TILES = ITEM_ROWS / 8; /* tiles: of parts.h */
constexpr int HALF_TILES = ITEM_TILES / 2, UNIT = ITEM_TILES * FP4_UNIT_BYTES; /* an item's weights of a unit of columns */

struct wide_args {
    cuda_experts e;
    cuda_prefill s;
    int tiles_most; /* there may be */
};

/* Of the matrices whose rows an item has, in boxes of an item's tiles; of what down multiplies. */
struct wide_maps {
    CUtensorMap weights[2], hidden;
};

/* MOST: slots of a tile. Shared memory: rings of inputs and of weights, the block's items. */
template <int MOST> struct wide_form {
    static constexpr bool MANY = MOST > 32;
    static constexpr int PRODUCTS = MANY ? 2 : 1, MULTIPLIERS = ITEM_ROWS / 16 / PRODUCTS; /* of a warp; warps */
    static constexpr int BLOCK = (MULTIPLIERS + TEAM_WARPS) * LANES;
    static constexpr int PANELS = MANY ? 1 : FP4_UNIT_COLS / PANEL; /* of a stage: what is gathered, awaited and left at once */
    static constexpr int STAGES = MANY ? 6 : 5, UNITS = MANY ? 3 : 4;
    enum {
        ASKS = MANY,                        /* a warp that multiplies has weights copied, since all others are busy */
        GATHERERS = (MANY ? 4 : 3) * LANES, /* threads */
        FEWER = MANY ? 24 : 40,
        MORE = MANY ? 240 : 104, /* registers of those that gather, multiply */
        STEP = MANY ? 32 : 8,    /* slots are multiplied by multiples of */
    };
    static constexpr int PANEL_SIZE = MOST * 128, STAGE = PANELS * PANEL_SIZE;
    static constexpr int WEIGHTS_AT = STAGES * STAGE, ITEMS_AT = WEIGHTS_AT + UNITS * UNIT;
};

/* Tile and rows of an item, from row `part` times how many it has of a matrix; unit: what sums of the first and second matrix
 * are multiplied by, here since at an item's end nobody should wait for it. */
struct wide_work {
    int first;
    unsigned expert : 11, tokens : 8, part : 13;
    float unit[2];

    template <bool DOWN_ROWS> __device__ __forceinline__ int row0() const { return (int)part * (DOWN_ROWS ? ITEM_ROWS : ITEM_ROWS / 2); }
};
static_assert(sizeof(wide_work) == 16 && EXPERTS_MAX < 1 << 11, "many items have room");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* A ring that one side fills and multiplying warps read. */
template <int N> struct wide_ring {
    uint64_t full[N], empty[N];

    __device__ __forceinline__ void init(int fillers, int readers)
    {
        for (int i = 0; i < N; i++) barrier_init(&full[i], fillers), barrier_init(&empty[i], readers);
    }
    /* The slot at a place, once it is full. */
    __device__ __forceinline__ int await(ring_place &p)
    {
        int slot = p.slot;
        barrier_wait(&full[slot], p.phase);
        p.advance(N);
        return slot;
    }
    /* By a warp that has read it. */
    __device__ __forceinline__ void leave(int slot)
    {
        if (threadIdx.x % LANES == 0) barrier_arrive(&empty[slot]);
    }
};

template <int MOST> struct wide_rings {
    wide_ring<wide_form<MOST>::STAGES> inputs;
    wide_ring<wide_form<MOST>::UNITS> weights;
};

/* What of the items' weights is to be asked for next; in shared memory, for a thread at a time. */
struct wide_next {
    int item, unit;
    ring_place place;
};

/* Items' weights, by one thread, a unit of columns at a time. */
template <int MOST, bool DOWN_ROWS> struct wide_asker {
    const cuda_matrix &m;
    const wide_maps &maps;
    const wide_work *work;
    int items;
    uint32_t to;
    wide_ring<wide_form<MOST>::UNITS> &ring;
    wide_next &next;

    /* The next unit; false: there is none. */
    __device__ __forceinline__ bool ask() const
    {
        constexpr int MAPS = DOWN_ROWS ? 1 : 2;
        wide_next n = next;
        if (n.item == items) return false;
        int tile = ((int)work[n.item].expert * m.rows + work[n.item].template row0<DOWN_ROWS>()) / 8;
        uint64_t *full = &ring.full[n.place.slot];
        barrier_wait(&ring.empty[n.place.slot], n.place.phase);
        barrier_expect(full, UNIT);
#pragma unroll
        for (int i = 0; i < MAPS; i++)
            copy_tensor(to + n.place.slot * UNIT + i * (UNIT / MAPS), &maps.weights[i], n.unit * (FP4_UNIT_BYTES / 8), tile, full);
        n.place.advance(wide_form<MOST>::UNITS);
        if (++n.unit == m.cols / FP4_UNIT_COLS) n.unit = 0, n.item++;
        next = n;
        return true;
    }
    __device__ __forceinline__ void ask_all() const
    {
        while (ask()) {
        }
    }
};

/* What a multiplying warp reads: of weights sixteen rows a product. */
template <int MOST, bool DOWN_ROWS> struct wide_reader {
    using form = wide_form<MOST>;
    /* From a product's first eight rows to the next. */
    static constexpr int NEXT = (form::MANY || DOWN_ROWS ? 1 : HALF_TILES) * FP4_UNIT_BYTES;
    wide_rings<MOST> &rings;
    const wide_asker<MOST, DOWN_ROWS> &asker;
    const uint8_t *shared;
    int units; /* of a row */
    ring_place input, weight;

    /* The first of a warp's rows, of the item's; of gate and up rows alike. */
    static __device__ __forceinline__ int row()
    {
        int warp = threadIdx.x / LANES, group = warp / TEAM_WARPS;
        if (!form::MANY) return warp * (DOWN_ROWS ? 16 : 8);
        return warp % TEAM_WARPS * 16 + group * TEAM_WARPS * (DOWN_ROWS ? 32 : 16);
    }
    __device__ __forceinline__ const uint8_t *weights_of(int slot) const
    {
        return shared + form::WEIGHTS_AT + slot * UNIT + row() / 8 * FP4_UNIT_BYTES;
    }
    __device__ __forceinline__ uint64_t inputs_of(int slot) const
    {
        return wide_matrix(shared_at(shared) + slot * form::STAGE);
    }
};

/* A unit of sixteen rows, `next` bytes from eight to eight; of a panel alone, as if it were the first. */
__device__ __forceinline__ void load_panel(words16<WEIGHT_NVFP4> &u, const uint8_t *from, int next, int panel)
{
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int h = 0; h < 2; h++, from += next) {
        uint2 w = *(const uint2 *)(from + panel / 2 * 512 + panel % 2 * 8 + lane * 16);
        u.w[h][0].x = w.x;
        u.w[h][0].y = w.y;
        u.scale[h].x = *(const uint16_t *)(from + 1024 + lane / 2 * 8 + panel * 2);
    }
}

__device__ __forceinline__ void load_unit(words16<WEIGHT_NVFP4> &u, const uint8_t *from, int next)
{
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int h = 0; h < 2; h++, from += next) {
        u.w[h][0] = *(const uint4 *)(from + lane * 16);
        u.w[h][1] = *(const uint4 *)(from + 512 + lane * 16);
        u.scale[h] = *(const uint2 *)(from + 1024 + lane / 2 * 8);
    }
}

/* A product's sums. */
template <int N> struct wide_product {
    float sum[N / 8][4];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[n][i] = 0;
    }
    /* f stays as it is till the instructions have been waited for. */
    __device__ __forceinline__ void ask(const uint32_t (&f)[STEPS][4], uint64_t x)
    {
        wide_hold(sum);
        wide_begin();
#pragma unroll
        for (int k = 0; k < STEPS; k++) wide_mma<N>(sum, f[k], x + k * WIDE_STEP);
        wide_commit();
    }
    /* After that. */
    __device__ __forceinline__ void hold(uint32_t (&f)[STEPS][4])
    {
        wide_hold(sum);
        wide_keep(f);
    }
};

/* Two products by turns. */
template <int N, int MOST, bool DOWN_ROWS>
__device__ __forceinline__ void item_sums(wide_product<N> &a, wide_product<N> &b, wide_reader<MOST, DOWN_ROWS> &r)
{
    using form = wide_form<MOST>;
    constexpr int SECOND = (DOWN_ROWS ? 2 * TEAM_WARPS : HALF_TILES) * FP4_UNIT_BYTES; /* from a's weights to those of b */
    uint32_t f[STEPS][4], g[STEPS][4];
    int last = -1; /* stage that instructions may still read */
    a.clear();
    b.clear();
#pragma unroll 1
    for (int unit = 0; unit < r.units; unit++) {
        int weights = r.rings.weights.await(r.weight);
        const uint8_t *from = r.weights_of(weights);
#pragma unroll 1
        for (int panel = 0; panel < FP4_UNIT_COLS / PANEL; panel++) {
            words16<WEIGHT_NVFP4> u, v;
            load_panel(u, from, r.NEXT, panel);
            u.decode<0>(f);
            int stage = r.rings.inputs.await(r.input);
            uint64_t x = r.inputs_of(stage);
            a.ask(f, x);
            load_panel(v, from + SECOND, r.NEXT, panel);
            wide_wait<1>();
            b.hold(g);
            if (last >= 0) r.rings.inputs.leave(last);
            last = stage;
            v.decode<0>(g);
            b.ask(g, x);
            wide_wait<1>();
            a.hold(f);
            /* the place of the unit before this one, which all warps have left by now or soon */
            if (panel == 2 && form::ASKS && threadIdx.x < LANES && elected()) r.asker.ask();
        }
        __syncwarp();
        r.rings.weights.leave(weights);
    }
    wide_wait<0>();
    b.hold(g);
    r.rings.inputs.leave(last);
}

/* Adds panels Q to 3 of a unit; f: panel Q. The next one is decoded into g meanwhile. */
template <int Q, int MOST, int N>
__device__ __forceinline__ void add_panels(wide_product<N> &a, uint32_t (&f)[STEPS][4], uint32_t (&g)[STEPS][4],
                                           const words16<WEIGHT_NVFP4> &u, uint64_t x)
{
    a.ask(f, x + Q * wide_form<MOST>::PANEL_SIZE / 16);
    if constexpr (Q < 3) u.template decode<Q + 1>(g);
    wide_wait<0>();
    a.hold(f);
    if constexpr (Q < 3) add_panels<Q + 1, MOST>(a, g, f, u, x);
}

/* One product: a panel is decoded while the one before it is multiplied. */
template <int N, int MOST, bool DOWN_ROWS>
__device__ __forceinline__ void item_sums(wide_product<N> &a, wide_reader<MOST, DOWN_ROWS> &r)
{
    uint32_t f[STEPS][4], g[STEPS][4];
    a.clear();
#pragma unroll 1
    for (int unit = 0; unit < r.units; unit++) {
        int weights = r.rings.weights.await(r.weight), stage = r.rings.inputs.await(r.input);
        words16<WEIGHT_NVFP4> u;
        load_unit(u, r.weights_of(weights), r.NEXT);
        u.decode<0>(f);
        add_panels<0, MOST>(a, f, g, u, r.inputs_of(stage));
        __syncwarp();
        r.rings.weights.leave(weights);
        r.rings.inputs.leave(stage);
    }
}

/* SiLU(gate) up of a warp's rows from c on, to the slots' hidden rows. HALVES of eight rows: their gate sums are in gate[n][2 h],
 * gate[n][2 h + 1], for up likewise from UP on. */
template <int N, int HALVES, int UP>
__device__ __forceinline__ void store_hidden(const wide_args &p, const wide_work &w, const float (&gate)[N / 8][4],
                                             const float (&up)[N / 8][4], int c)
{
    int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4, inner = p.e.m[GATE].rows;
    float u = w.unit[0], v = w.unit[1];
    __nv_bfloat16 *to = (__nv_bfloat16 *)p.s.hidden + (int64_t)(w.first + g) * inner + c / PANEL * PANEL + panel_place(c % PANEL + 2 * t, false);
#pragma unroll
    for (int n = 0; n < N / 8; n++, to += 8 * (int64_t)inner) {
        uint32_t x[HALVES];
#pragma unroll
        for (int h = 0; h < HALVES; h++)
            x[h] = turned(pack(silu(gate[n][2 * h] * u) * (up[n][UP + 2 * h] * v), silu(gate[n][2 * h + 1] * u) * (up[n][UP + 2 * h + 1] * v)));
        if (n * 8 + g >= (int)w.tokens) continue;
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
    float unit = w.unit[0];
    bool odd = t % 2;
    __nv_bfloat16 *to = (__nv_bfloat16 *)p.s.down + (int64_t)(w.first + g) * width + row + (odd ? 6 + 2 * t : 2 * t);
#pragma unroll
    for (int n = 0; n < N / 8; n++, to += 8 * (int64_t)width) {
        uint32_t x[2];
#pragma unroll
        for (int h = 0; h < 2; h++) x[h] = turned(pack(sum[n][2 * h] * unit, sum[n][2 * h + 1] * unit));
        uint32_t other = __shfl_xor_sync(ALL, odd ? x[0] : x[1], 1);
        if (n * 8 + g < (int)w.tokens) *(uint2 *)to = odd ? make_uint2(other, x[1]) : make_uint2(x[0], other);
    }
}

template <int N, int MOST, bool DOWN_ROWS>
__device__ __forceinline__ void run_item(const wide_args &p, const wide_work &w, wide_reader<MOST, DOWN_ROWS> &r)
{
    int row = w.template row0<DOWN_ROWS>() + r.row();
    wide_product<N> a;
    if constexpr (wide_form<MOST>::MANY) {
        wide_product<N> b;
        item_sums(a, b, r);
        if constexpr (DOWN_ROWS) {
            store_down<N>(p, w, a.sum, row);
            store_down<N>(p, w, b.sum, row + TEAM_WARPS * 16);
        } else {
            store_hidden<N, 2, 0>(p, w, a.sum, b.sum, row);
        }
    } else {
        item_sums(a, r);
        if constexpr (DOWN_ROWS)
            store_down<N>(p, w, a.sum, row);
        else
            store_hidden<N, 1, 2>(p, w, a.sum, a.sum, row);
    }
}

/* The warps that gather rows. A stage is announced when LAG more have been asked for. */
template <int MOST>
__device__ __forceinline__ void gather_inputs(const wide_args &p, const wide_work *work, int n, uint32_t to,
                                              wide_ring<wide_form<MOST>::STAGES> &ring)
{
    using form = wide_form<MOST>;
    constexpr int GATHERERS = form::GATHERERS, STEP = GATHERERS / 8, EACH = 4, LAG = form::STAGES / 2;
    static_assert(STEP % 4 == 0, "four rows on, a place's number differs in one bit");
    int row = threadIdx.x % GATHERERS / 8, piece = threadIdx.x % 8, cols = p.e.m[GATE].cols;
    ring_place ask = { 0, 1 }, tell = { 0, 0 };
    int ahead = 0;
#pragma unroll 1
    for (int item = 0; item < n; item++) {
        const int *rows = p.s.slot_row + work[item].first;
        const __nv_bfloat16 *x = (const __nv_bfloat16 *)p.s.inputs + piece * 8;
        int tokens = (int)work[item].tokens;
#pragma unroll 1
        for (int c = 0; c < cols; c += form::PANELS * PANEL) {
            barrier_wait(&ring.empty[ask.slot], ask.phase);
            uint32_t stage = to + ask.slot * form::STAGE + (piece ^ row % 8) * 16;
#pragma unroll 1
            for (int i = row; i < tokens; i += EACH * STEP) {
                int from[EACH]; /* loaded at once: a copy lets no later load pass */
#pragma unroll
                for (int k = 0; k < EACH; k++) from[k] = i + k * STEP < tokens ? rows[i + k * STEP] : -1;
#pragma unroll
                for (int k = 0; k < EACH; k++) {
                    if (from[k] < 0) break;
#pragma unroll
                    for (int q = 0; q < form::PANELS; q++)
                        copy_async16((stage + q * form::PANEL_SIZE + (i + k * STEP) * 128) ^ k * STEP % 8 * 16,
                                     x + (unsigned)from[k] * (unsigned)cols + q * PANEL, true);
                }
            }
            x += form::PANELS * PANEL;
            copy_commit();
            ask.advance(form::STAGES);
            if (ahead < LAG) {
                ahead++;
                continue;
            }
            copy_wait<LAG>();
            wide_show();
            barrier_arrive(&ring.full[tell.slot]);
            tell.advance(form::STAGES);
        }
    }
    copy_wait<0>();
    wide_show();
    for (; ahead > 0; ahead--) {
        barrier_arrive(&ring.full[tell.slot]);
        tell.advance(form::STAGES);
    }
}

/* The inputs of down, whose slots lie one after the other, by one thread. */
template <int MOST>
__device__ __forceinline__ void copy_inputs(const CUtensorMap &x, const wide_work *work, int n, int cols, uint32_t to,
                                            wide_ring<wide_form<MOST>::STAGES> &ring)
{
    using form = wide_form<MOST>;
    ring_place ask = { 0, 1 };
#pragma unroll 1
    for (int item = 0; item < n; item++) {
        const wide_work &w = work[item];
        int tokens = (int)w.tokens;
#pragma unroll 1
        for (int c = 0; c < cols; c += form::PANELS * PANEL) {
            uint32_t stage = to + ask.slot * form::STAGE;
            uint64_t *full = &ring.full[ask.slot];
            barrier_wait(&ring.empty[ask.slot], ask.phase);
            barrier_expect(full, (tokens + form::STEP - 1) / form::STEP * form::STEP * 128 * form::PANELS);
            for (int i = 0; i < tokens; i += form::STEP)
#pragma unroll
                for (int k = 0; k < form::PANELS; k++)
                    copy_box(stage + k * form::PANEL_SIZE + i * 128, x, c + k * PANEL, w.first + i, full);
            ask.advance(form::STAGES);
        }
    }
}

#endif

template <int MOST, bool DOWN_ROWS>
__global__ void __launch_bounds__(wide_form<MOST>::BLOCK, 1)
    wide_experts(const __grid_constant__ wide_args p, const __grid_constant__ wide_maps maps)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using form = wide_form<MOST>;
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ wide_rings<MOST> rings;
    __shared__ wide_next next;
    wide_work *work = (wide_work *)(shared + form::ITEMS_AT);
    const cuda_matrix &m = p.e.m[DOWN_ROWS ? DOWN : GATE];
    int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0);
    int each = m.rows / (DOWN_ROWS ? ITEM_ROWS : ITEM_ROWS / 2);
    if (threadIdx.x == 0) {
        rings.inputs.init(DOWN_ROWS ? 1 : form::GATHERERS, form::MULTIPLIERS);
        rings.weights.init(1, form::MULTIPLIERS);
        next = { 0, 0, { 0, 1 } };
        barriers_ready();
    }
    if (!DOWN_ROWS) wait_for_previous();
    let_next_start(); /* which may count on the tiles */
    int number = (int)blockIdx.x + (int)threadIdx.x * (int)gridDim.x;
    int4 tile = number / each < p.tiles_most ? __ldcg((const int4 *)p.s.tiles + 1 + number / each) : int4{};
    int items = __ldcg(p.s.tiles) * each, n = ((int)gridDim.x - 1 - (int)blockIdx.x + items) / (int)gridDim.x;
    if ((int)threadIdx.x < n) {
        wide_work &w = work[threadIdx.x];
        w.first = tile.y;
        w.expert = (unsigned)tile.x;
        w.tokens = (unsigned)tile.z;
        w.part = (unsigned)(number % each);
    }
    __syncthreads();
    uint32_t at = shared_at(shared);
    wide_asker<MOST, DOWN_ROWS> asker = { m, maps, work, n, at + form::WEIGHTS_AT, rings.weights, next };
    if (warp == form::MULTIPLIERS) { /* before it announces inputs */
#pragma unroll 1
        for (int i = threadIdx.x % LANES; i < n; i += LANES)
            for (int k = 0; k < (DOWN_ROWS ? 1 : 2); k++)
                work[i].unit[k] = FP4_UNIT / p.e.globals[(DOWN_ROWS ? DOWN : k) * p.e.n + (int)work[i].expert];
        __syncwarp();
    }
    if (warp >= form::MULTIPLIERS) {
        fewer_registers<form::FEWER>();
        int helper = threadIdx.x - form::MULTIPLIERS * LANES;
        if (!form::ASKS && helper == TEAM_WARPS * LANES - 1) asker.ask_all();
        if constexpr (DOWN_ROWS) {
            if (helper > 0) return;
            wait_for_previous();
            copy_inputs<MOST>(maps.hidden, work, n, m.cols, at, rings.inputs);
        } else {
            if (helper < form::GATHERERS) gather_inputs<MOST>(p, work, n, at, rings.inputs);
        }
    } else {
        more_registers<form::MORE>();
        wide_reader<MOST, DOWN_ROWS> reader = { rings, asker, shared, m.cols / FP4_UNIT_COLS, { 0, 0 }, { 0, 0 } };
        if (form::ASKS && threadIdx.x < LANES && elected()) /* one more at each unit's third panel */
            for (int i = 0; i + 1 < form::UNITS; i++) asker.ask();
#pragma unroll 1
        for (int i = 0; i < n; i++) {
            const wide_work &w = work[i];
            constexpr int STEP = form::STEP;
            int n_of = ((int)w.tokens + STEP - 1) / STEP;
            if (n_of <= 1)
                run_item<STEP>(p, w, reader);
            else if (n_of == 2)
                run_item<2 * STEP>(p, w, reader);
            else if (n_of == 3)
                run_item<3 * STEP>(p, w, reader);
            else
                run_item<MOST>(p, w, reader);
        }
    }
#endif
}

template <int MOST> size_t shared_of(int items)
{
    return wide_form<MOST>::ITEMS_AT + (size_t)items * sizeof(wide_work);
}

/* All experts' tiles, a unit of columns a box. */
bool weights_map(struct queue *q, CUtensorMap *out, const cuda_experts &e, int which, int tiles)
{
    const cuda_matrix &m = e.m[which];
    return tensor_map_words(q->map_maker, out, m.data, (int64_t)e.n * (m.rows / 8), tile_bytes(m) / 8, tiles, FP4_UNIT_BYTES / 8);
}

template <int MOST> bool start(struct queue *q, const cuda_experts &e, const struct picks *p, int64_t rows)
{
    int64_t picked = rows * p->k, tiles = picked / MOST + (e.n < picked ? e.n : picked);
    unsigned blocks = (unsigned)q->sms;
    int up = (int)(tiles * (e.m[GATE].rows / (ITEM_ROWS / 2)) / blocks + 1), down = (int)(tiles * (e.m[DOWN].rows / ITEM_ROWS) / blocks + 1);
    size_t most = (size_t)q->shared_max - 2048;
    if (shared_of<MOST>(up) > most || shared_of<MOST>(down) > most || (up > down ? up : down) > wide_form<MOST>::BLOCK) return false;
    int inner = e.m[DOWN].cols;
    wide_maps of_up = {}, of_down = {};
    if (!weights_map(q, &of_up.weights[0], e, GATE, HALF_TILES) || !weights_map(q, &of_up.weights[1], e, UP, HALF_TILES) ||
        !weights_map(q, &of_down.weights[0], e, DOWN, ITEM_TILES) ||
        !tensor_map(q->map_maker, &of_down.hidden, q->prefill.hidden, picked, inner, inner, wide_form<MOST>::STEP))
        return false;
    cuda_sort_picks(q, p, rows, MOST);
    wide_args a = { e, q->prefill, (int)tiles };
    launch<wide_form<MOST>::BLOCK>(q, "experts", true, wide_experts<MOST, false>, dim3(blocks), shared_of<MOST>(up), a, of_up);
    launch<wide_form<MOST>::BLOCK>(q, "experts", true, wide_experts<MOST, true>, dim3(blocks), shared_of<MOST>(down), a, of_down);
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
