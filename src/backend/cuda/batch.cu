/* Dense products of several rows (batch.cuh) in two kernels. prepare_rows makes the inputs, a block a row: taken as they are,
 * normed, or gated and normed, split into parts or quantized. batch_products streams the weights past them: each of eight
 * warps sixteen weight rows of an item of up to 128. A matrix of few rows is divided along its
 * columns over a cluster of blocks, whose sums meet in their shared memory.
 * Moves: the weights once; the inputs once for each tile, from the second cache. */
#include "backend/cuda/batch.cuh"
#include "backend/cuda/prepare.cuh"

namespace {

constexpr int WORKERS = 8, BATCH_BLOCK = WORKERS * LANES;
constexpr int SUM_ROW = 16 * WORKERS + 4; /* floats of a row of sums that meet */

struct batch_args {
    cuda_matrix m[NORM_PRODUCTS_MAX];
    mat out[NORM_PRODUCTS_MAX], add; /* add.data: += what goes to out[0]; NULL: nothing */
    int first[NORM_PRODUCTS_MAX + 1]; /* item at which a matrix begins */
    int n, each, rounds;              /* matrices; tiles of sixteen rows side by side, and how often, an item */
    int rows, crew, splits;           /* shares of the columns; blocks of a cluster, which divide the shares */
    bool meet;                        /* sums meet in shared memory */
    int slot_bytes, most_parts;       /* of the ring of inputs, parts for which there is room */
    int unit_bytes;                   /* of a ring of weights */
    const uint8_t *parts, *quantized;
    const float *input_scale;
    /* sums of picks, to which the product is added behind its gate; down NULL: none */
    const float *down, *factor;
    mat gate;
    int k;
};

/* G: groups of eight rows; more than four: rounded, one part and one accumulator. */
template <int G> struct batch_size {
    static constexpr bool EXACT = 8 * G <= ROWS_EXACT;
    static constexpr int SLOTS_IN = G > 8 ? 4 : 8; /* of the ring of inputs */
};

template <int FORMAT, int G> struct batch_form {
    static constexpr int PARTS_IN = FORMAT == WEIGHT_FP8 || !batch_size<G>::EXACT ? 1 : PARTS;
    static constexpr int N = 8 * PARTS_IN * G, PANELS = unit_cols(FORMAT) / PANEL;
};

/* Units of a share, and those of this block of an item of matrix m. */
struct batch_range {
    int share, begin, end;
    __device__ __forceinline__ batch_range(const batch_args &p, const cuda_matrix &m)
    {
        int units = units_of(m.format, m.cols), each = (p.crew + p.splits - 1) / p.splits, rank = blockIdx.x % p.splits;
        share = (units + p.crew - 1) / p.crew;
        begin = rank * each * share < units ? rank * each * share : units;
        end = begin + each * share < units ? begin + each * share : units;
    }
};

[[maybe_unused]] __device__ __forceinline__ int batch_matrix(const batch_args &p, int item)
{
    int m = 0;
#pragma unroll
    for (int i = 1; i < NORM_PRODUCTS_MAX; i++) m += i < p.n && item >= p.first[i];
    return m;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Inputs, panels one after the other, asked for by one thread; again for each round. */
template <int SLOTS_IN> struct batch_inputs {
    uint32_t to;
    uint64_t *full, *empty;
    ring_place place;
    const uint8_t *begin;
    int bytes, slot_bytes, panels, next, left; /* of a round, next of it; of all */

    /* The next panel, once its place is free. */
    __device__ __forceinline__ void ask()
    {
        if (left == 0) return;
        left--;
        barrier_wait(&empty[place.slot], place.phase);
        barrier_expect(&full[place.slot], bytes);
        copy_bulk(to + place.slot * slot_bytes, begin + next * bytes, bytes, &full[place.slot]);
        next = next + 1 == panels ? 0 : next + 1;
        place.advance(SLOTS_IN);
    }
};

/* What goes on side by side: inputs, and this warp's weights ahead of their use. */
template <int FORMAT, int SLOTS_IN, int DEPTH> struct batch_flow {
    static constexpr bool FP4 = FORMAT == WEIGHT_NVFP4;
    static constexpr int UNIT = FP4 ? UNIT16 : 2 * 1024, FROM = FP4 ? FP4_UNIT_BYTES : UNIT_BYTES;
    batch_inputs<SLOTS_IN> inputs;
    ring_place input;
    const uint8_t *weights;
    int slot;
    /* asked for next */
    tile16 tile;
    int units, left, rounds, tiles_left, step; /* of a round; of this one; rounds after it; tiles from `tile` on; a round's */
    int64_t skip;                              /* bytes from a round's end to the next */

    __device__ __forceinline__ void ask(int to)
    {
        if (left == 0 && rounds > 0) {
            rounds--;
            left = units;
            tiles_left -= step;
            tile.halves = tile.halves == 0 || tiles_left <= 0 ? 0 : tiles_left < 2 ? tiles_left : 2;
            tile.at += skip;
        }
        ask16<FP4>(shared_at(weights) + to * UNIT, tile, left > 0);
        if (left > 0) left--;
    }
    __device__ __forceinline__ void take(words16<FORMAT> &w)
    {
        copy_wait<DEPTH - 1>();
        w.load(weights + slot * UNIT);
        __syncwarp();
        ask(slot);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    __device__ __forceinline__ void await()
    {
        barrier_wait(&inputs.full[input.slot], input.phase);
    }
    __device__ __forceinline__ void leave()
    {
        if (threadIdx.x % LANES == 0) barrier_arrive(&inputs.empty[input.slot]);
        input.advance(SLOTS_IN);
        if (threadIdx.x == 0) inputs.ask();
        __syncwarp();
    }
};

/* Panels Q.. of a unit. */
template <int FORMAT, int G, int Q, class FLOW>
__device__ __forceinline__ void batch_panels(accumulators<batch_form<FORMAT, G>::N, batch_size<G>::EXACT> &acc,
                                             const words16<FORMAT> &w, FLOW &flow)
{
    uint32_t f[4][4];
    w.template decode<Q>(f);
    flow.await();
    acc.add(f, flow.inputs.to + flow.input.slot * flow.inputs.slot_bytes);
    flow.leave();
    if constexpr (Q + 1 < batch_form<FORMAT, G>::PANELS) batch_panels<FORMAT, G, Q + 1>(acc, w, flow);
}

/* Sixteen weight rows: their shares one after the other, added up in total, [group of rows][lane's: weight rows g, g + 8 of
 * input rows 2 t, 2 t + 1, as mma leaves them], or kept apart in sums [share][row][weight row]. */
template <int FORMAT, int G, class FLOW>
__device__ __forceinline__ void batch_tile(float (&total)[G][4], float *sums, bool meet, FLOW &flow, const batch_range &range)
{
    using form = batch_form<FORMAT, G>;
    constexpr int P = form::PARTS_IN;
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    accumulators<form::N, batch_size<G>::EXACT> acc;
    acc.clear();
#pragma unroll
    for (int r = 0; r < G; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) total[r][i] = 0;
    float *to = sums + lane % 4 * 2 * SUM_ROW + warp * 16 + lane / 4;
#pragma unroll 1
    for (int u = range.begin, left = range.share; u < range.end; u++) {
        words16<FORMAT> w;
        flow.take(w);
        batch_panels<FORMAT, G, 0>(acc, w, flow);
        if (--left > 0 && u + 1 < range.end) continue;
        left = range.share;
#pragma unroll
        for (int r = 0; r < G; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float s = acc.sum(r * P, i);
                if constexpr (P > 1) s = s + acc.sum(r * P + 1, i) + acc.sum(r * P + 2, i);
                if (meet)
                    to[(r * 8 + i % 2) * SUM_ROW + i / 2 * 8] = s;
                else
                    total[r][i] += s;
            }
        to += 8 * G * SUM_ROW;
        acc.clear();
    }
}

/* The output at weight row r of matrix k and input row `row`, from the sum of all shares. */
__device__ __forceinline__ void batch_store(const batch_args &p, int k, int r, int row, float sum)
{
    const cuda_matrix &m = p.m[k];
    float unit = unit_of(m, 0, r, m.global), y;
    if (m.input == INPUT_FP8_ROW) sum *= __ldcg(p.input_scale + row);
    if (p.down) {
        const float *from = p.down + (int64_t)row * p.k * m.rows + r;
        float open = sigmoid(__ldcg(p.gate.data + row * p.gate.stride)) * unit;
        y = 0;
#pragma unroll 8
        for (int j = 0; j < p.k; j++) y = fmaf(__ldcg(p.factor + row * p.k + j), __ldcg(from + (int64_t)j * m.rows), y);
        y = fmaf(open, sum, y);
    } else {
        y = sum * unit;
    }
    p.out[k].data[row * p.out[k].stride + r] = y;
    if (p.add.data && k == 0) {
        float *add = p.add.data + row * p.add.stride + r;
        *add = __ldcg(add) + y;
    }
}

/* All blocks of the cluster have left their sums; each adds up an equal part of the outputs. */
__device__ __forceinline__ void batch_meeting(const batch_args &p, const float *sums, int k, int tile0, int groups)
{
    const cuda_matrix &m = p.m[k];
    int units = units_of(m.format, m.cols), share = (units + p.crew - 1) / p.crew, shares = (units + share - 1) / share;
    int each = (p.crew + p.splits - 1) / p.splits, rank = blockIdx.x % p.splits, width = p.each * 16, n = p.rows * width;
    if (p.splits > 1)
        cluster_meet();
    else
        __syncthreads();
    for (int i = rank * BATCH_BLOCK + threadIdx.x; i < n; i += p.splits * BATCH_BLOCK) {
        int row = i / width, c = i - row * width, r = tile0 * 16 + c;
        const float *from = sums + row * SUM_ROW + c;
        float sum = 0;
        if (r >= m.rows) continue;
        if (p.splits > 1) {
#pragma unroll 8
            for (int s = 0; s < shares; s++) sum += load_of(from + s % each * (8 * groups * SUM_ROW), s / each);
        } else {
            for (int s = 0; s < shares; s++) sum += from[s * (8 * groups * SUM_ROW)];
        }
        batch_store(p, k, r, row, sum);
    }
    if (p.splits > 1)
        cluster_meet();
    else
        __syncthreads();
}
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int FORMAT, int G, int DEPTH>
__device__ __forceinline__ void batch_item(const batch_args &p, uint8_t *shared, uint64_t *barriers, int k, int tile0)
{
    constexpr int SLOTS_IN = batch_size<G>::SLOTS_IN, PANELS = batch_form<FORMAT, G>::PANELS;
    using flow_of = batch_flow<FORMAT, SLOTS_IN, DEPTH>;
    const cuda_matrix &m = p.m[k];
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, workers = p.each > TEAM_WARPS ? WORKERS : TEAM_WARPS;
    uint8_t *ring = shared + SLOTS_IN * p.slot_bytes;
    float *sums = (float *)(ring + WORKERS * DEPTH * p.unit_bytes);
    batch_range range(p, m);
    flow_of flow;
    int tile = 2 * (tile0 + warp);
    flow.weights = ring + warp * DEPTH * p.unit_bytes;
    flow.tile = warp < p.each ? tile16(m, 0, tile, range.begin) : tile16();
    flow.tiles_left = tiles_of(m.rows) - tile;
    flow.left = flow.units = range.end - range.begin;
    flow.rounds = p.rounds - 1;
    flow.step = 2 * p.each;
    flow.skip = (int64_t)flow.step * tile_bytes(m) - flow.units * flow_of::FROM;
    flow.slot = 0;
#pragma unroll 1
    for (int i = 0; i < DEPTH; i++) flow.ask(i);
    int bytes = batch_form<FORMAT, G>::PARTS_IN * G * PANEL_BYTES, panels = flow.units * PANELS;
    const uint8_t *from = m.input == INPUT_FP8_ROW ? p.quantized : p.parts;
    flow.input = { 0, 0 };
    flow.inputs = { shared_at(shared), barriers, barriers + SLOTS_IN, { 0, 1 }, from + (int64_t)range.begin * PANELS * bytes,
                    bytes, p.slot_bytes, panels, 0, panels * p.rounds };
    wait_for_previous();
    if (threadIdx.x == 0)
#pragma unroll 1
        for (int i = 0; i < SLOTS_IN - 2; i++) flow.inputs.ask(); /* the last two are still read when one more is asked for */
    __syncwarp();
#pragma unroll 1
    for (int round = 0; round < p.rounds; round++, tile0 += p.each) {
        float total[G][4];
        if (warp < workers) batch_tile<FORMAT, G>(total, sums, p.meet, flow, range);
        if (p.meet) {
            batch_meeting(p, sums, k, tile0, G);
            continue;
        }
        if (warp >= p.each) continue;
#pragma unroll
        for (int a = 0; a < G; a++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = a * 8 + lane % 4 * 2 + i % 2, r = (tile0 + warp) * 16 + lane / 4 + i / 2 * 8;
                if (row < p.rows && r < m.rows) batch_store(p, k, r, row, total[a][i]);
            }
    }
    copy_wait<0>();
}
#endif

/* Shared memory: ring of inputs, rings of weights DEPTH units deep, sums that meet. Grid: items times splits. */
template <int G, int DEPTH> __global__ void __launch_bounds__(BATCH_BLOCK, 1) batch_products(const __grid_constant__ batch_args p)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_MEMORY(uint8_t, shared, 1024);
    constexpr int SLOTS_IN = batch_size<G>::SLOTS_IN;
    __shared__ uint64_t barriers[2 * SLOTS_IN];
    int item = blockIdx.x / p.splits, k = batch_matrix(p, item), tile0 = (item - p.first[k]) * p.each * p.rounds;
    let_next_start();
    if (threadIdx.x == 0) {
        int workers = p.each > TEAM_WARPS ? WORKERS : TEAM_WARPS;
        for (int i = 0; i < SLOTS_IN; i++) barrier_init(&barriers[i], 1), barrier_init(&barriers[SLOTS_IN + i], workers);
        barriers_ready();
    }
    __syncthreads();
    if (p.m[k].format == WEIGHT_BF16)
        batch_item<WEIGHT_BF16, G, DEPTH>(p, shared, barriers, k, tile0);
    else if (p.m[k].format == WEIGHT_FP8)
        batch_item<WEIGHT_FP8, G, DEPTH>(p, shared, barriers, k, tile0);
    else
        batch_item<WEIGHT_NVFP4, G, DEPTH>(p, shared, barriers, k, tile0);
#endif
}

__global__ void __launch_bounds__(BLOCK) prepare_inputs(const __grid_constant__ prepare_args p)
{
    let_next_start();
    if (blockIdx.y > 0) {
        wait_for_previous();
        advance_states(p);
    } else {
        prepare_row(p, blockIdx.x);
    }
}

/* Whether there are kernels for these matrices: all that takes quantized inputs is FP8, and the other way round, so that the
 * order of columns is one. */
bool takes(const struct queue *q, const cuda_matrix *m, int n, int64_t rows)
{
    int64_t cols = m[0].cols;
    if (!q->has_wide || rows <= ROWS_FEW || rows > q->batch.rows || cols > q->batch.cols) return false;
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
    a.meet = is_few(q, a.m, a.n);
    a.splits = a.meet ? 8 : 1;
    a.rounds = 1;
    a.each = a.meet ? WORKERS : 1;
    for (int items; !a.meet; a.each++) {
        if (a.each > WORKERS) a.each = WORKERS, a.rounds++;
        items = 0;
        for (int i = 0; i < a.n; i++) items += items_of(a, i);
        if (items <= q->sms) break;
    }
}

/* Shared memory; sets what of it depends on the matrices. */
template <int G, int DEPTH> size_t batch_shared(batch_args &a)
{
    int shares = 0, most = (a.crew + a.splits - 1) / a.splits;
    bool parts = false;
    a.unit_bytes = 2 * 1024;
    for (int i = 0; i < a.n; i++) {
        int units = units_of(a.m[i].format, a.m[i].cols), share = (units + a.crew - 1) / a.crew, n = (units + share - 1) / share;
        if (n > most) n = most;
        if (n > shares) shares = n;
        parts = parts || (a.m[i].input != INPUT_FP8_ROW && batch_size<G>::EXACT);
        if (a.m[i].format == WEIGHT_NVFP4) a.unit_bytes = UNIT16;
    }
    a.most_parts = parts ? PARTS : 1;
    a.slot_bytes = a.most_parts * G * PANEL_BYTES;
    return batch_size<G>::SLOTS_IN * a.slot_bytes + WORKERS * DEPTH * a.unit_bytes +
           (a.meet ? (size_t)shares * 8 * G * SUM_ROW * sizeof(float) : 0);
}

template <int G, int DEPTH> bool start(struct queue *q, const char *operation, batch_args &a, bool ask)
{
    for (int i = 0; i < a.n; i++) a.first[i + 1] = a.first[i] + items_of(a, i);
    size_t bytes = batch_shared<G, DEPTH>(a);
    if (bytes + 2048 > (size_t)q->shared_max) return false;
    if (!ask)
        launch_clusters<BATCH_BLOCK>(q, operation, batch_products<G, DEPTH>, (unsigned)(a.first[a.n] * a.splits),
                                     (unsigned)a.splits, bytes, a);
    return true;
}

/* ask: only say whether there is room. */
bool run(struct queue *q, const char *operation, batch_args &a, bool ask)
{
    switch (groups_of(a.rows)) {
    case 1: return start<1, 8>(q, operation, a, ask);
    case 2: return start<2, 8>(q, operation, a, ask);
    case 4: return a.meet ? start<4, 4>(q, operation, a, ask) : start<4, 6>(q, operation, a, ask);
    case 8: return a.meet ? start<8, 4>(q, operation, a, ask) : start<8, 6>(q, operation, a, ask);
    default: return start<16, 4>(q, operation, a, ask);
    }
}

/* Inputs of the matrices of a, and their product. */
bool product(struct queue *q, const char *operation, batch_args &a, prepare_args &in)
{
    struct cuda_batch &b = q->batch;
    a.rows = (int)in.x.rows;
    if (!takes(q, a.m, a.n, a.rows)) return false;
    divide(q, a);
    a.crew = a.rows > ROWS_EXACT ? a.splits : CREW;
    if (!run(q, operation, a, true)) return false;
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
    if (in.parts) b.known = in.kind == PREPARE_NORMED ? in.made.data : nullptr;
    launch<BLOCK>(q, operation, true, prepare_inputs, dim3((unsigned)a.rows, in.conv ? 1 + ADVANCERS : 1),
                  prepare_shared(in.cols), in);
    return run(q, operation, a, false);
}

} /* namespace */

void cuda_batch_prepare(struct queue *q, struct mat x)
{
    prepare_args in = {};
    in.kind = PREPARE_RAW;
    in.x = x;
    in.cols = (int)x.cols;
    prepare_for(in, x.rows);
    in.parts = (uint8_t *)q->batch.parts;
    q->batch.known = nullptr;
    launch<BLOCK>(q, "experts", true, prepare_inputs, dim3((unsigned)x.rows), prepare_shared(in.cols), in);
}

bool cuda_batch_product(struct queue *q, struct mat y, struct mat x, const struct cuda_matrix *m)
{
    batch_args a = {};
    prepare_args in = {};
    a.n = 1;
    a.m[0] = *m;
    a.out[0] = y;
    in.kind = PREPARE_RAW;
    in.x = x;
    return product(q, "matmul", a, in);
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
    in.kind = PREPARE_NORMED;
    in.x = r->x;
    in.made = r->h;
    in.gain = r->gain;
    in.eps = r->eps;
    return product(q, "norm_products", a, in);
}

bool cuda_batch_delta_out(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows, bool advance)
{
    batch_args a = {};
    prepare_args in = {};
    a.n = 1;
    a.m[0] = cuda_matrix_of(r->out);
    a.out[0] = r->y;
    a.add = r->x;
    in.kind = PREPARE_GATED;
    in.x = r->raw;
    in.z = r->z;
    in.made = r->o;
    in.gain = r->gain;
    in.eps = r->eps;
    in.dim = r->shape->value_dim;
    in.conv = advance ? r->state->conv : nullptr;
    in.rows = *rows;
    in.u = r->u;
    in.keep = r->shape->kernel - 1;
    return product(q, "delta_run", a, in);
}

bool cuda_batch_attention_out(struct queue *q, const struct attention_run *r)
{
    batch_args a = {};
    prepare_args in = {};
    a.n = 1;
    a.m[0] = cuda_matrix_of(r->o);
    a.out[0] = r->y;
    a.add = r->x;
    in.kind = PREPARE_RAW;
    in.x = r->att;
    return product(q, "attention_run", a, in);
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
    a.meet = true;
    return (!ask || takes(q, a.m, 1, a.rows)) && run(q, "experts", a, ask);
}
