/* The mixture of experts for several rows, each expert's weights read once for a chunk of the rows that picked it. NVFP4 experts
 * whose inputs are taken as they are.
 *
 * batch_route: a block a row chooses, and makes the shared expert's hidden row; the last of them puts picks in chunks by expert.
 * batch_chunks: both products of the chunks. Items are eight gate and the same eight up rows of a chunk, then sixteen rows of
 * down: the sixteen rows of a tensor-core instruction whose columns are the chunk's slots. A warp has an item from the first
 * weight column to the last. Blocks take equal runs of all items of either kind, of which only the device knows how many there
 * are, and a block's warps an item after the other. Down items wait for all blocks' up items: blocks are on the device at once. What remains is cuda_batch_shared_down: it adds
 * up what the picks gave.
 *
 * A chunk's inputs are eight slots. Of up to ROWS_EXACT rows two are a chunk, with the sums of experts.cu to the bit: of row t
 * slots 4 t, 4 t + 1 and 4 t + 2 have the high, middle and low parts. Of more rows, whose inputs are BF16, eight are. */
#include "backend/cuda/prepare.cuh"
#include "backend/cuda/route.cuh"

namespace {

constexpr int ENTRY = CHUNK_ENTRY, PICKS_AT = ENTRY - CHUNK_SLOTS, CHUNKS_MOST = 32; /* CHUNKS_MOST: of a block */
constexpr int UP_ROWS = 8, DOWN_ROWS = 16, STAGE = 2, STAGE_BYTES = STAGE * 2 * FP4_UNIT_BYTES;

/* Rows of a chunk; of them, those whose sums a lane gets. */
template <bool EXACT> constexpr int CHUNK = EXACT ? CHUNK_EXACT : CHUNK_SLOTS;
template <bool EXACT> constexpr int OWN = EXACT ? 1 : 2;

/* chunks: [0] how many, [1] blocks of batch_route that are done, [2] of batch_chunks that have all hidden rows; from ENTRY on, of
 * each: expert, rows, picks */
struct route_args {
    mat logits;
    picks p;
    int n_experts;
    const float *globals; /* of down */
    float *factor;
    int *chunks;
    int chunk; /* rows of one */
};

struct chunk_args {
    cuda_experts e;
    int *chunks;
    const uint8_t *parts; /* of all rows */
    int groups, k;
    uint8_t *hidden; /* [chunk][panel] */
    float *down;     /* [pick][rows of down] */
};

/* Sum of x over the threads before this one. part: [CREW] */
__device__ int sum_before(int x, int *part)
{
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, sum = x;
    for (int o = 1; o < LANES; o *= 2) {
        int other = __shfl_up_sync(ALL, sum, o);
        if (lane >= o) sum += other;
    }
    if (lane == LANES - 1) part[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++) sum += part[w];
    return sum - x;
}

/* A block: counts, then places, then entries. A pick's place within its expert changes nothing it gives. */
__device__ void make_chunks(const route_args &a, int picked)
{
    __shared__ int count[EXPERTS_MAX], first[EXPERTS_MAX], part[CREW];
    constexpr int EACH = EXPERTS_MAX / BLOCK;
    for (int e = threadIdx.x; e < EXPERTS_MAX; e += BLOCK) count[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < picked; i += BLOCK) atomicAdd(&count[__ldcg(a.p.expert + i)], 1);
    __syncthreads();
    int n[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += n[i] = (count[threadIdx.x * EACH + i] + a.chunk - 1) / a.chunk;
    int at = sum_before(sum, part);
    if (threadIdx.x == BLOCK - 1) a.chunks[0] = at + sum, a.chunks[2] = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = threadIdx.x * EACH + i, left = count[e];
        first[e] = at;
        for (int c = 0; c < n[i]; c++, left -= a.chunk) {
            int *entry = a.chunks + (1 + at + c) * ENTRY;
            entry[0] = e;
            entry[1] = left < a.chunk ? left : a.chunk;
        }
        at += n[i];
        count[e] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < picked; i += BLOCK) {
        int e = __ldcg(a.p.expert + i), place = atomicAdd(&count[e], 1);
        a.chunks[(1 + first[e] + place / a.chunk) * ENTRY + PICKS_AT + place % a.chunk] = i;
    }
}

__global__ void __launch_bounds__(BLOCK) batch_route(const __grid_constant__ route_args a,
                                                     const __grid_constant__ prepare_args shared_row)
{
    __shared__ uint32_t keys[EXPERTS_MAX];
    __shared__ int expert[PICKS_MAX], last;
    __shared__ float weight[PICKS_MAX];
    int row = blockIdx.x, k = a.p.k;
    let_next_start();
    wait_for_previous();
    if (threadIdx.x < LANES) choose(expert, weight, keys, a.logits.data + (int64_t)row * a.logits.stride, a.n_experts, k);
    prepare_row(shared_row, row);
    __syncthreads();
    for (int j = threadIdx.x; j < k; j += BLOCK) {
        a.p.expert[row * k + j] = expert[j];
        a.p.weight[row * k + j] = weight[j];
        a.factor[row * k + j] = weight[j] * (FP4_UNIT / a.globals[expert[j]]);
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&a.chunks[1], 1) == (int)gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    make_chunks(a, (int)gridDim.x * k);
    if (threadIdx.x == 0) a.chunks[1] = 0;
}

/* Warps that multiply; one more brings inputs. Chunks' inputs at a time; stages of a warp's ring. */
constexpr int MULTIPLIERS = 16, CHUNKS_BLOCK = (MULTIPLIERS + 1) * LANES, BUFFERS = 2, DEPTH = 2;

/* Panels of a buffer of inputs. Shared memory: those, and rings of weights. */
__host__ __device__ inline int buffer_panels(const cuda_experts &e)
{
    return (e.m[GATE].cols > e.m[DOWN].cols ? e.m[GATE].cols : e.m[DOWN].cols) / PANEL;
}

inline size_t chunks_shared(const cuda_experts &e)
{
    return (size_t)BUFFERS * buffer_panels(e) * PANEL_BYTES + MULTIPLIERS * DEPTH * STAGE_BYTES;
}

/* Of an item's columns, whose sums are added up: single units, some units each, all together. */
enum shares { UNIT, UNITS, ONE };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* The block's items of a kind, [begin, end) of all, `each` a chunk. */
struct chunk_run {
    int begin, end, each, first, n; /* first chunk, chunks */
    float by_each;

    __device__ __forceinline__ chunk_run(int chunks, int of_a_chunk) : each(of_a_chunk), by_each(1.0f / of_a_chunk)
    {
        int64_t items = (int64_t)chunks * each;
        begin = (int)(items * blockIdx.x / gridDim.x);
        end = (int)(items * (blockIdx.x + 1) / gridDim.x);
        first = begin / each;
        n = end > begin ? (end - 1) / each - first + 1 : 0;
    }
};

/* An item as a warp keeps it beside the weights: kind, chunk of the run, and place among the chunk's. */
struct chunk_item {
    int packed;
    static constexpr int NONE = -1;

    __device__ __forceinline__ bool is_down() const { return packed >> 30; }
    __device__ __forceinline__ int chunk() const { return packed >> 16 & 0x3fff; }
    __device__ __forceinline__ int at() const { return packed & 0xffff; }
};

/* A lane's words of a unit of a stage's two tiles, and their scales. */
struct pair_words {
    uint4 w[2][2];
    uint2 scale[2];

    /* codes, scales: this lane's of the unit */
    __device__ __forceinline__ pair_words(const uint8_t *codes, const uint8_t *scales)
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            w[h][0] = *(const uint4 *)(codes + h * STAGE_BYTES / 2);
            w[h][1] = *(const uint4 *)(codes + h * STAGE_BYTES / 2 + 512);
            scale[h] = *(const uint2 *)(scales + h * STAGE_BYTES / 2);
        }
    }
    /* Adds the unit's products to a and b as stream.cuh does. x: where this lane reads the slots' panels (matrices). */
    __device__ __forceinline__ void add(float (&a)[4], float (&b)[4], uint32_t x) const
    {
        uint32_t odd = x ^ 64;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 &u = w[0][half], &v = w[1][half];
            uint32_t p[4] = { u.x, u.y, u.z, u.w }, q[4] = { v.x, v.y, v.z, v.w }, in[4];
            fp4_scales scales(half ? scale[0].y : scale[0].x), others(half ? scale[1].y : scale[1].x);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                __nv_bfloat162 s = scales.of(i), r = others.of(i);
                matrices(in, (i % 2 ? odd : x) + (half * 2 + i / 2) * PANEL_BYTES);
                mma(a, bf16_pair_product(fp4_pair<0>(p[i]), s), bf16_pair_product(fp4_pair<0>(q[i]), r),
                    bf16_pair_product(fp4_pair<1>(p[i]), s), bf16_pair_product(fp4_pair<1>(q[i]), r), in[0], in[1]);
                mma(b, bf16_pair_product(fp4_pair<2>(p[i]), s), bf16_pair_product(fp4_pair<2>(q[i]), r),
                    bf16_pair_product(fp4_pair<3>(p[i]), s), bf16_pair_product(fp4_pair<3>(q[i]), r), in[2], in[3]);
            }
        }
    }
};

/* A warp's weights ahead of their use across items: stages of up to STAGE units of an item's two tiles. */
struct chunk_weights {
    const cuda_experts &e;
    chunk_run ups, downs;
    const int (*entries)[ENTRY];
    int *taken;    /* items of the block */
    int *items;    /* of each stage */
    const uint8_t *ring, *tile[2]; /* tile: of the item asked for */
    uint32_t ring_at, come;
    int item, units, asked, slot, phase; /* asked: units of the item asked for; slot: used next */

    __device__ __forceinline__ void begin()
    {
        asked = slot = phase = 0;
        units = 1;
        for (int i = 0; i < DEPTH; i++) ask(i);
    }
    __device__ __forceinline__ void next_item()
    {
        int n = 0, lane = threadIdx.x % LANES;
        if (lane == 0) n = atomicAdd(taken, 1);
        n = __shfl_sync(ALL, n, 0);
        bool is_down = n >= ups.end - ups.begin;
        int of_ups = ups.begin - ups.first * ups.each, of_downs = downs.begin - downs.first * downs.each - (ups.end - ups.begin);
        item = chunk_item::NONE;
        if (n >= ups.end - ups.begin + downs.end - downs.begin) return;
        n += is_down ? of_downs : of_ups;
        int chunk = (int)(((float)n + 0.5f) * (is_down ? downs.by_each : ups.by_each)), at = n - chunk * (is_down ? downs.each : ups.each);
        unsigned expert = entries[chunk][0];
        item = is_down << 30 | chunk << 16 | at;
        if (is_down) {
            tile[0] = tile_at(e.m[DOWN], expert, 2 * at);
            tile[1] = tile[0] + tile_bytes(e.m[DOWN]);
        } else {
            tile[0] = tile_at(e.m[GATE], expert, at);
            tile[1] = tile_at(e.m[UP], expert, at);
        }
        units = e.m[is_down ? DOWN : GATE].cols / FP4_UNIT_COLS;
    }
    __device__ __forceinline__ void ask(int to)
    {
        if (asked == 0) next_item();
        int n = units - asked < STAGE ? units - asked : STAGE, bytes = n * FP4_UNIT_BYTES;
        if (elected()) {
            uint32_t at = ring_at + to * STAGE_BYTES, barrier = come + to * 8;
            items[to] = item;
            if (item != chunk_item::NONE) {
                barrier_expect(barrier, 2 * bytes);
                copy_bulk(at, tile[0] + asked * FP4_UNIT_BYTES, bytes, barrier);
                copy_bulk(at + STAGE_BYTES / 2, tile[1] + asked * FP4_UNIT_BYTES, bytes, barrier);
            }
        }
        __syncwarp();
        asked = asked + n < units ? asked + n : 0;
    }
    /* The item whose first stage comes next. */
    __device__ __forceinline__ chunk_item next() const { return { items[slot] }; }
    __device__ __forceinline__ const uint8_t *await() const
    {
        barrier_wait(come + slot * 8, phase);
        return ring + slot * STAGE_BYTES;
    }
    /* What lay in the stage has been read by all lanes. */
    __device__ __forceinline__ void leave()
    {
        __syncwarp();
        ask(slot);
        if (++slot == DEPTH) slot = 0, phase ^= 1;
    }
};

/* The lane's own rows of a chunk: which, and of each the sums of row g of both tiles. */
template <bool EXACT> __device__ __forceinline__ int own_row(int i)
{
    int t = threadIdx.x % 4;
    return EXACT ? t / 2 : 2 * t + i;
}

template <bool EXACT>
__device__ __forceinline__ void add_own(float2 (&total)[OWN<EXACT>], const float (&a)[4], const float (&b)[4])
{
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = a[i] + b[i];
    if constexpr (EXACT) { /* of an odd lane the second slot is nothing */
        float x = sum[0], y = sum[2];
        if (threadIdx.x % 2 == 0) x += sum[1], y += sum[3];
        total[0].x += x + __shfl_xor_sync(ALL, x, 1);
        total[0].y += y + __shfl_xor_sync(ALL, y, 1);
    } else {
#pragma unroll
        for (int i = 0; i < OWN<EXACT>; i++) total[i].x += sum[i], total[i].y += sum[2 + i];
    }
}

/* Byte of part p of row t at a place of a chunk's panel. */
template <bool EXACT> __device__ __forceinline__ int chunk_byte(unsigned t, unsigned p, unsigned place)
{
    return panel_byte(EXACT ? 4 * t + p : t, place);
}

/* Buffers of inputs: first of the chunks of the up run, then of the down run, number c in buffer c % BUFFERS. Every working warp
 * leaves every one once. */
struct chunk_buffers {
    uint64_t *full, *empty;
    int current; /* a warp is in */

    __device__ __forceinline__ explicit chunk_buffers(uint64_t *barriers) : full(barriers), empty(barriers + BUFFERS), current(-1) {}
    /* A worker: on to number c, through each before it, of which it may have no item. A barrier tells a phase from the next only. */
    __device__ __forceinline__ void enter(int c)
    {
        while (current < c) {
            leave();
            current++;
            barrier_wait(&full[current % BUFFERS], current / BUFFERS % 2);
        }
    }
    __device__ __forceinline__ void leave()
    {
        __syncwarp(); /* no lane waits for it still */
        if (current >= 0 && threadIdx.x % LANES == 0) barrier_arrive(&empty[current % BUFFERS]);
    }
    /* The copier: until the buffer of number c is free. */
    __device__ __forceinline__ void reserve(int c)
    {
        barrier_wait(&empty[c % BUFFERS], c / BUFFERS % 2 ^ 1);
    }
};

/* A working warp has no more up items. */
__device__ __forceinline__ void tell(uint64_t *made)
{
    __syncwarp();
    if (threadIdx.x % LANES == 0) barrier_arrive(made);
}

/* Until all blocks' hidden rows are made; by a warp. */
__device__ __forceinline__ void meet_blocks(int *arrived, uint64_t *made)
{
    barrier_wait(made, 0);
    if (threadIdx.x % LANES == 0) {
        __threadfence();
        atomicAdd(arrived, 1);
        wait_for_number((const unsigned *)arrived, gridDim.x);
    }
    __syncwarp();
}

/* Asks for a chunk's rows from the panels of all rows, by a warp. */
template <bool EXACT>
__device__ __forceinline__ void gather_rows(uint32_t to, const chunk_args &a, const int *entry, int panels)
{
    constexpr int N = EXACT ? PARTS : 1;
    int lane = threadIdx.x % LANES;
    for (int t = 0; t < entry[1]; t++) {
        int row = entry[PICKS_AT + t] / a.k, r = row % 8;
        const uint8_t *from = a.parts + row / 8 * (N * PANEL_BYTES);
#pragma unroll 4
        for (int i = lane; i < panels * N * 8; i += LANES) {
            int place = i % 8 * 8, part = i / 8 % N, c = i / (8 * N);
            copy_async16(to + c * PANEL_BYTES + chunk_byte<EXACT>(t, part, place),
                         from + ((int64_t)c * a.groups * N + part) * PANEL_BYTES + panel_byte(r, place), true);
        }
    }
}

/* Sums of an item's `units` units. x: where the lane reads its first panel. */
template <bool EXACT, shares SHARES>
__device__ __forceinline__ void sum_item(float2 (&total)[OWN<EXACT>], chunk_weights &weights, uint32_t x, int units)
{
    int lane = threadIdx.x % LANES, share = share_of(units, CREW / 2), left = share;
    float a[4] = {}, b[4] = {};
#pragma unroll 1
    for (int u = 0; u < units; u += STAGE) {
        const uint8_t *stage = weights.await(), *codes = stage + lane * 16, *scales = stage + 1024 + lane / 2 * 8;
#pragma unroll
        for (int i = 0; i < STAGE; i++, x += FP4_UNIT_COLS / PANEL * PANEL_BYTES) {
            pair_words w(codes + i * FP4_UNIT_BYTES, scales + i * FP4_UNIT_BYTES); /* what there is not is not looked at */
            if (i + 1 == STAGE) weights.leave();
            if (u + i >= units) break;
            w.add(a, b, x);
            if (SHARES == ONE || (SHARES == UNITS && --left > 0 && u + i + 1 < units)) continue;
            left = share;
            add_own<EXACT>(total, a, b);
#pragma unroll
            for (int j = 0; j < 4; j++) a[j] = b[j] = 0;
        }
    }
    if (SHARES == ONE) add_own<EXACT>(total, a, b);
}

/* An up item's sums to the chunk's hidden rows. panel: the chunk's first. */
template <bool EXACT>
__device__ __forceinline__ void store_hidden(const chunk_args &a, int panel, int rows, unsigned at, const float2 (&total)[OWN<EXACT>],
                                             float2 unit)
{
    unsigned lane = threadIdx.x % LANES, r = at * UP_ROWS + lane / 4, place = panel_place(r % PANEL, false);
    uint8_t *to = a.hidden + (int64_t)(panel + r / PANEL) * PANEL_BYTES;
#pragma unroll
    for (int i = 0; i < OWN<EXACT>; i++) {
        int t = own_row<EXACT>(i);
        if (t >= rows) continue;
        split_pair s(make_float2(silu(total[i].x * unit.x) * (total[i].y * unit.y), 0));
        if (EXACT && lane % 2) {
            *(uint16_t *)(to + chunk_byte<EXACT>(t, 2, place)) = (uint16_t)s.part[2];
        } else {
#pragma unroll
            for (int p = 0; p < (EXACT ? 2 : 1); p++) *(uint16_t *)(to + chunk_byte<EXACT>(t, p, place)) = (uint16_t)s.part[p];
        }
    }
}

/* A down item's, to the rows of its picks. */
template <bool EXACT>
__device__ __forceinline__ void store_down(const chunk_args &a, const int *entry, int at, const float2 (&total)[OWN<EXACT>])
{
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int i = 0; i < OWN<EXACT>; i++) {
        int t = own_row<EXACT>(i);
        if (t >= entry[1]) continue;
        float *to = a.down + (int64_t)entry[PICKS_AT + t] * a.e.m[DOWN].rows + at * DOWN_ROWS + lane / 4;
        if (!EXACT || lane % 2 == 0) to[0] = total[i].x;
        if (!EXACT || lane % 2 == 1) to[8] = total[i].y;
    }
}

/* Where a lane reads panels as four matrices of eight slots by eight columns, the pairs of an FP4 word. */
__device__ __forceinline__ uint32_t lane_panel(uint32_t panels)
{
    int lane = threadIdx.x % LANES;
    return panels + panel_byte(lane % 8, lane / 8 * 8);
}
#endif

/* Grid: multiprocessors, a block each. */
template <bool EXACT, shares SHARES>
__global__ void __launch_bounds__(CHUNKS_BLOCK, 1) batch_chunks(const __grid_constant__ chunk_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ uint64_t barriers[2 * BUFFERS], come[MULTIPLIERS][DEPTH], made;
    __shared__ int entries[CHUNKS_MOST][ENTRY], items[MULTIPLIERS][DEPTH], taken;
    const cuda_matrix &gate = a.e.m[GATE], &down = a.e.m[DOWN];
    unsigned warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    int buffer = buffer_panels(a.e) * PANEL_BYTES, hidden_panels = down.cols / PANEL;
    uint32_t buffers = shared_at(shared);
    if (warp < MULTIPLIERS && lane < DEPTH) barrier_init(&come[warp][lane], 1);
    if (threadIdx.x == 0) barrier_init(&made, MULTIPLIERS);
    if (threadIdx.x < BUFFERS) {
        barrier_init(&barriers[threadIdx.x], LANES);
        barrier_init(&barriers[BUFFERS + threadIdx.x], MULTIPLIERS);
    }
    barriers_ready();
    if (threadIdx.x == 0) taken = 0;
    wait_for_previous();
    let_next_start();
    int chunks = __ldcg(a.chunks);
    chunk_run ups(chunks, gate.rows / UP_ROWS), downs(chunks, down.rows / DOWN_ROWS);
    int *first = a.chunks + (1 + ups.first) * ENTRY; /* of either run */
    for (int i = threadIdx.x; i < (ups.n > downs.n ? ups.n : downs.n) * ENTRY; i += CHUNKS_BLOCK) entries[0][i] = __ldcg(first + i);
    __syncthreads();
    chunk_buffers inputs(barriers);
    if (warp == MULTIPLIERS) {
        if (downs.n == 0) meet_blocks(a.chunks + 2, &made);
        for (int c = 0; c < ups.n + downs.n; c++) {
            uint32_t to = buffers + c % BUFFERS * buffer;
            inputs.reserve(c);
            if (c < ups.n) {
                gather_rows<EXACT>(to, a, entries[c], gate.cols / PANEL);
            } else {
                const uint8_t *from = a.hidden + (int64_t)(ups.first + c - ups.n) * hidden_panels * PANEL_BYTES;
                if (c == ups.n) meet_blocks(a.chunks + 2, &made);
                for (int i = lane * 16; i < hidden_panels * PANEL_BYTES; i += LANES * 16) copy_async16(to + i, from + i, true);
            }
            barrier_arrive_copied(&barriers[c % BUFFERS]);
        }
        copy_wait<0>();
        return;
    }
    uint8_t *ring = shared + BUFFERS * buffer + warp * DEPTH * STAGE_BYTES;
    chunk_weights weights = { a.e, ups, downs, entries, &taken, items[warp], ring, {}, shared_at(ring), shared_at(come[warp]) };
    weights.begin();
    float2 unit = {};
    bool told = false; /* that it has no more up items */
#pragma unroll 1
    for (chunk_item item = weights.next(); item.packed != chunk_item::NONE; item = weights.next()) {
        int chunk = item.chunk(), c = item.is_down() ? ups.n + chunk : chunk;
        float2 total[OWN<EXACT>] = {};
        if (item.is_down() && !told) tell(&made), told = true;
        if (inputs.current < c) {
            inputs.enter(c);
            unit = make_float2(FP4_UNIT / a.e.globals[entries[chunk][0]], FP4_UNIT / a.e.globals[a.e.n + entries[chunk][0]]);
        }
        uint32_t x = lane_panel(buffers + c % BUFFERS * buffer);
        if (item.is_down()) {
            sum_item<EXACT, ONE>(total, weights, x, down.cols / FP4_UNIT_COLS);
            store_down<EXACT>(a, entries[chunk], item.at(), total);
        } else {
            sum_item<EXACT, SHARES>(total, weights, x, gate.cols / FP4_UNIT_COLS);
            store_hidden<EXACT>(a, (ups.first + chunk) * hidden_panels, entries[chunk][1], item.at(), total, unit);
        }
    }
    if (!told) tell(&made);
    inputs.enter(ups.n + downs.n - 1);
    inputs.leave();
#endif
}

auto chunks_kernel(bool exact, int cols)
{
    bool one = share_of(cols / FP4_UNIT_COLS, CREW / 2) == 1;
    return exact ? (one ? batch_chunks<true, UNIT> : batch_chunks<true, UNITS>)
                 : (one ? batch_chunks<false, UNIT> : batch_chunks<false, UNITS>);
}

bool takes(struct queue *q, const cuda_experts &e, const struct moe_run *r)
{
    const cuda_matrix &up = e.m[GATE], &down = e.m[DOWN];
    int64_t n = r->h.rows;
    const struct cuda_batch &b = q->batch;
    int64_t picked = n * r->picks->k, chunk = n > ROWS_EXACT ? CHUNK<false> : CHUNK<true>;
    int64_t chunks = picked / chunk + (picked < e.n ? picked : e.n);
    if (cuda_experts_together(q, r)) return false;
    if (!q->has_wide || n <= ROWS_FEW || n > b.rows || (n > ROWS_EXACT && !q->rounded)) return false;
    if (e.n > EXPERTS_MAX || r->picks->k > PICKS_MAX) return false;
    for (int i = 0; i < 3; i++)
        if (e.m[i].format != WEIGHT_NVFP4 || e.m[i].input != INPUT_AS_IS || e.m[i].cols % FP4_UNIT_COLS != 0) return false;
    if (down.rows % DOWN_ROWS != 0 || up.rows % UP_ROWS != 0 || up.cols > b.cols || up.rows > b.intermediate || down.rows > b.width) return false;
    if (picked > b.picked || chunks > b.chunks_most || chunks / q->sms + 3 > CHUNKS_MOST) return false;
    if (chunks_shared(e) + sizeof(int[CHUNKS_MOST][ENTRY]) + 2048 > (size_t)q->shared_max) return false; /* 2048: barriers, alignment */
    return cuda_batch_shared_down(q, r, true);
}

} /* namespace */

bool cuda_batch_moe(struct queue *q, const struct moe_run *r)
{
    const cuda_experts &e = *(const struct cuda_experts *)r->experts->bound;
    if (!takes(q, e, r)) return false;
    struct cuda_batch &b = q->batch;
    cuda_matrix shared = cuda_matrix_of(r->w_down);
    bool exact = r->h.rows <= ROWS_EXACT;
    if (b.known != r->h.data) cuda_batch_prepare(q, r->h);
    int chunk = exact ? CHUNK<true> : CHUNK<false>;
    route_args route = { r->logits, *r->picks, e.n, e.globals + DOWN * e.n, b.factor, b.chunks, chunk };
    prepare_args in = {};
    in.kind = PREPARE_SILU;
    in.x = r->gate;
    in.z = r->up;
    in.made = r->hidden;
    in.cols = shared.cols;
    prepare_for(in, r->h.rows);
    if (shared.input == INPUT_FP8_ROW)
        in.quantized = (uint8_t *)b.shared_quantized, in.scale = b.shared_scale;
    else
        in.parts = (uint8_t *)b.shared_parts;
    launch<BLOCK>(q, "experts", true, batch_route, dim3((unsigned)r->h.rows), prepare_shared(in.cols), route, in);
    chunk_args a = { e, b.chunks, (const uint8_t *)b.parts, in.groups, r->picks->k, (uint8_t *)b.hidden, b.down };
    launch<CHUNKS_BLOCK>(q, "experts", true, chunks_kernel(exact, e.m[GATE].cols), dim3((unsigned)q->sms), chunks_shared(e), a);
    return cuda_batch_shared_down(q, r, false);
}
