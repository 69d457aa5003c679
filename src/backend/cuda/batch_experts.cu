/* The mixture of experts for several rows, each expert's weights read once for a chunk of the rows that picked it. NVFP4 experts
 * whose inputs are taken as they are.
 *
 * batch_route: a block a row chooses, and makes the shared expert's hidden row; the last of them puts picks in chunks by expert.
 * batch_up: items of eight gate and the same eight up rows of a chunk. batch_down: items of sixteen rows. They are the sixteen rows
 * of a tensor-core instruction whose columns are the chunk's slots, and a warp has an item from the first weight column to
 * the last. Blocks take equal runs of all items, of which only the device knows how many there are. What remains is
 * cuda_batch_shared_down: it adds up what the picks gave.
 *
 * A chunk's inputs are eight slots. Of up to ROWS_EXACT rows two are a chunk, with the sums of experts.cu to the bit: of row t
 * slots 4 t, 4 t + 1 and 4 t + 2 have the high, middle and low parts. Of more rows, whose inputs are BF16, eight are. */
#include "backend/cuda/prepare.cuh"
#include "backend/cuda/route.cuh"

namespace {

constexpr int ENTRY = CHUNK_ENTRY, CHUNKS_MOST = 32; /* CHUNKS_MOST: of a block */
constexpr int UP_ROWS = 8, DOWN_ROWS = 16, STAGE = 2, STAGE_BYTES = STAGE * 2 * FP4_UNIT_BYTES;

/* Rows of a chunk; of them, those whose sums a lane gets. */
template <bool EXACT> constexpr int CHUNK = EXACT ? CHUNK_EXACT : CHUNK_SLOTS;
template <bool EXACT> constexpr int OWN = EXACT ? 1 : 2;

/* chunks: [0] how many, [1] blocks of batch_route that are done; from ENTRY on, of each: expert, rows, picks */
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
    const int *chunks;
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
    if (threadIdx.x == BLOCK - 1) a.chunks[0] = at + sum;
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
        a.chunks[(1 + first[e] + place / a.chunk) * ENTRY + 2 + place % a.chunk] = i;
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
    prepare_row<PREPARE_SILU>(shared_row, row);
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
constexpr int UP_CREW = 16, DOWN_CREW = 20, UP_BUFFERS = 2, DOWN_BUFFERS = 4, DEPTH = 2;
constexpr int block_of(int crew) { return (crew + 1) * LANES; }

/* Shared memory: buffers of chunks' inputs, rings of weights. */
__host__ __device__ inline size_t up_bytes(int cols)
{
    return (size_t)UP_BUFFERS * (cols / PANEL) * PANEL_BYTES + UP_CREW * DEPTH * STAGE_BYTES;
}

__host__ __device__ inline size_t down_bytes(int cols)
{
    return (size_t)DOWN_BUFFERS * (cols / PANEL) * PANEL_BYTES + DOWN_CREW * DEPTH * STAGE_BYTES;
}

/* Of an item's columns, whose sums are added up: single units, some units each, all together. */
enum shares { UNIT, UNITS, ONE };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* The block's items, [begin, end) of all, `each` a chunk, and the entries of their chunks. */
struct chunk_run {
    int begin, end, first, n; /* first chunk, chunks */
    __device__ __forceinline__ chunk_run(const int *chunks, int each, int (*entries)[ENTRY])
    {
        int64_t items = (int64_t)__ldcg(chunks) * each;
        begin = (int)(items * blockIdx.x / gridDim.x);
        end = (int)(items * (blockIdx.x + 1) / gridDim.x);
        first = begin / each;
        n = end > begin ? (end - 1) / each - first + 1 : 0;
        for (int i = threadIdx.x; i < n * ENTRY; i += (int)blockDim.x) entries[0][i] = __ldcg(chunks + (1 + first) * ENTRY + i);
        __syncthreads();
    }
};

/* A warp's items of the run, of N warps every N-th: chunk of the run, and place among the `each` of a chunk. */
template <int N> struct chunk_item {
    int chunk, at, left; /* left: of the run, from this one on */

    __device__ __forceinline__ chunk_item(const chunk_run &run, int each)
        : chunk(0), at(run.begin - run.first * each), left(run.end - run.begin)
    {
        go(threadIdx.x / LANES, each);
    }
    __device__ __forceinline__ void advance(int each)
    {
        go(N, each);
    }
    __device__ __forceinline__ void go(int by, int each)
    {
        left -= by;
        for (at += by; at >= each; at -= each) chunk++;
    }
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

/* A warp's weights ahead of their use across items: stages of up to STAGE units of an item's two tiles. FIND: where those begin. */
template <int N, class FIND> struct chunk_weights {
    const uint8_t *ring, *tile[2]; /* tile: of the item asked for */
    uint32_t ring_at, come;
    FIND find;
    chunk_item<N> item;
    int each, units, asked, slot, phase; /* asked: units of the item; slot: used next */

    __device__ __forceinline__ chunk_weights(const uint8_t *at, uint64_t *barriers, FIND f, const chunk_item<N> &first, int of_a_chunk,
                                             int of_a_tile)
        : ring(at), ring_at(shared_at(at)), come(shared_at(barriers)), find(f), item(first), each(of_a_chunk), units(of_a_tile),
          asked(0), slot(0), phase(0)
    {
        for (int i = 0; i < DEPTH; i++) ask(i);
    }
    __device__ __forceinline__ void ask(int to)
    {
        int n = units - asked < STAGE ? units - asked : STAGE, bytes = n * FP4_UNIT_BYTES;
        if (asked == 0 && item.left > 0) find(tile, item);
        if (item.left > 0 && elected()) {
            uint32_t at = ring_at + to * STAGE_BYTES, barrier = come + to * 8;
            barrier_expect(barrier, 2 * bytes);
            copy_bulk_once(at, tile[0] + asked * FP4_UNIT_BYTES, bytes, barrier);
            copy_bulk_once(at + STAGE_BYTES / 2, tile[1] + asked * FP4_UNIT_BYTES, bytes, barrier);
        }
        asked += n;
        if (asked < units) return;
        asked = 0;
        item.advance(each);
    }
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

/* Buffers of chunks' inputs: chunk c of the run in buffer c % BUFFERS. Every working warp leaves every chunk once. */
template <int BUFFERS> struct chunk_buffers {
    uint64_t *full, *empty;
    int current; /* chunk of the run a warp is in */

    __device__ __forceinline__ explicit chunk_buffers(uint64_t *barriers)
        : full(barriers), empty(barriers + BUFFERS), current(-1)
    {
    }
    /* A worker: on to chunk c, through each before it, of which it may have no item. A barrier tells a phase from the next only. */
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
    /* The copier: until buffer of chunk c is free. */
    __device__ __forceinline__ void reserve(int c)
    {
        barrier_wait(&empty[c % BUFFERS], c / BUFFERS % 2 ^ 1);
    }
};

template <int BUFFERS, int N>
__device__ __forceinline__ void chunk_barriers(uint64_t *barriers, int copiers, uint64_t (&come)[N][DEPTH])
{
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    if (warp < N && lane < DEPTH) barrier_init(&come[warp][lane], 1);
    if (threadIdx.x < BUFFERS) {
        barrier_init(&barriers[threadIdx.x], copiers);
        barrier_init(&barriers[BUFFERS + threadIdx.x], N);
    }
    barriers_ready();
}

/* Rows of a chunk from the panels of all rows, by a warp; `full` is told when they lie there. */
template <bool EXACT>
__device__ __forceinline__ void gather_rows(uint32_t to, const chunk_args &a, const int *entry, int panels, uint64_t *full)
{
    constexpr int N = EXACT ? PARTS : 1;
    int lane = threadIdx.x % LANES;
    for (int t = 0; t < entry[1]; t++) {
        int row = entry[2 + t] / a.k, r = row % 8;
        const uint8_t *from = a.parts + row / 8 * (N * PANEL_BYTES);
#pragma unroll 4
        for (int i = lane; i < panels * N * 8; i += LANES) {
            int place = i % 8 * 8, part = i / 8 % N, c = i / (8 * N);
            copy_async16(to + c * PANEL_BYTES + chunk_byte<EXACT>(t, part, place),
                         from + ((int64_t)c * a.groups * N + part) * PANEL_BYTES + panel_byte(r, place), true);
        }
    }
    barrier_arrive_copied(full);
}

/* Sums of an item's `units` units. x: where the lane reads its first panel. */
template <bool EXACT, shares SHARES, int N, class FIND>
__device__ __forceinline__ void sum_item(float2 (&total)[OWN<EXACT>], chunk_weights<N, FIND> &weights, uint32_t x, int units)
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

/* Where a lane reads panels as four matrices of eight slots by eight columns, the pairs of an FP4 word. */
__device__ __forceinline__ uint32_t lane_panel(uint32_t panels)
{
    int lane = threadIdx.x % LANES;
    return panels + panel_byte(lane % 8, lane / 8 * 8);
}
#endif

template <bool EXACT, shares SHARES> __global__ void __launch_bounds__(block_of(UP_CREW), 1) batch_up(const __grid_constant__ chunk_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ uint64_t barriers[2 * UP_BUFFERS], come[UP_CREW][DEPTH];
    __shared__ int entries[CHUNKS_MOST][ENTRY];
    const cuda_matrix &gate = a.e.m[GATE];
    unsigned warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    int panels = gate.cols / PANEL, each = gate.rows / UP_ROWS, hidden_panels = gate.rows / PANEL;
    uint32_t buffers = shared_at(shared);
    chunk_barriers<UP_BUFFERS>(barriers, LANES, come);
    wait_for_previous();
    let_next_start(); /* which may count on the chunks */
    chunk_run run(a.chunks, each, entries);
    chunk_buffers<UP_BUFFERS> inputs(barriers);
    if (warp == UP_CREW) {
        for (int c = 0; c < run.n; c++) {
            inputs.reserve(c);
            gather_rows<EXACT>(buffers + c % UP_BUFFERS * panels * PANEL_BYTES, a, entries[c], panels, &barriers[c % UP_BUFFERS]);
        }
        copy_wait<0>();
        return;
    }
    auto find = [&](const uint8_t *(&tile)[2], const chunk_item<UP_CREW> &x) {
        for (int side = 0; side < 2; side++) tile[side] = tile_at(a.e.m[side], entries[x.chunk][0], x.at);
    };
    int units = gate.cols / FP4_UNIT_COLS;
    chunk_item<UP_CREW> item(run, each);
    chunk_weights<UP_CREW, decltype(find)> weights(shared + UP_BUFFERS * panels * PANEL_BYTES + warp * DEPTH * STAGE_BYTES,
                                                    come[warp], find, item, each, units);
    float2 unit = {};
#pragma unroll 1
    for (; item.left > 0; item.advance(each)) {
        int c = item.chunk;
        float2 total[OWN<EXACT>] = {};
        if (inputs.current < c) {
            inputs.enter(c);
            unit = make_float2(FP4_UNIT / a.e.globals[entries[c][0]], FP4_UNIT / a.e.globals[a.e.n + entries[c][0]]);
        }
        sum_item<EXACT, SHARES>(total, weights, lane_panel(buffers + c % UP_BUFFERS * panels * PANEL_BYTES), units);
        unsigned r = item.at * UP_ROWS + lane / 4, place = panel_place(r % PANEL, false);
        uint8_t *to = a.hidden + (int64_t)((run.first + c) * hidden_panels + r / PANEL) * PANEL_BYTES;
#pragma unroll
        for (int i = 0; i < OWN<EXACT>; i++) {
            int t = own_row<EXACT>(i);
            if (t >= entries[c][1]) continue;
            split_pair s(make_float2(silu(total[i].x * unit.x) * (total[i].y * unit.y), 0));
            if (EXACT && lane % 2) {
                *(uint16_t *)(to + chunk_byte<EXACT>(t, 2, place)) = (uint16_t)s.part[2];
            } else {
#pragma unroll
                for (int p = 0; p < (EXACT ? 2 : 1); p++)
                    *(uint16_t *)(to + chunk_byte<EXACT>(t, p, place)) = (uint16_t)s.part[p];
            }
        }
    }
    inputs.enter(run.n - 1);
    inputs.leave();
#endif
}

template <bool EXACT> __global__ void __launch_bounds__(block_of(DOWN_CREW), 1) batch_down(const __grid_constant__ chunk_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ uint64_t barriers[2 * DOWN_BUFFERS], come[DOWN_CREW][DEPTH];
    __shared__ int entries[CHUNKS_MOST][ENTRY];
    const cuda_matrix &m = a.e.m[DOWN];
    unsigned warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    int each = m.rows / DOWN_ROWS, bytes = m.cols / PANEL * PANEL_BYTES;
    uint32_t buffers = shared_at(shared);
    chunk_barriers<DOWN_BUFFERS>(barriers, 1, come);
    let_next_start();
    chunk_run run(a.chunks, each, entries);
    chunk_buffers<DOWN_BUFFERS> inputs(barriers);
    if (warp == DOWN_CREW) {
        wait_for_previous();
        for (int c = 0; lane == 0 && c < run.n; c++) {
            inputs.reserve(c);
            barrier_expect(&barriers[c % DOWN_BUFFERS], bytes);
            copy_bulk(buffers + c % DOWN_BUFFERS * bytes, a.hidden + (int64_t)(run.first + c) * bytes, bytes,
                      &barriers[c % DOWN_BUFFERS]);
        }
        return;
    }
    auto find = [&](const uint8_t *(&tile)[2], const chunk_item<DOWN_CREW> &x) {
        tile[0] = tile_at(m, entries[x.chunk][0], 2 * x.at);
        tile[1] = tile[0] + tile_bytes(m);
    };
    int units = m.cols / FP4_UNIT_COLS;
    chunk_item<DOWN_CREW> item(run, each);
    chunk_weights<DOWN_CREW, decltype(find)> weights(shared + DOWN_BUFFERS * bytes + warp * DEPTH * STAGE_BYTES, come[warp],
                                                      find, item, each, units);
    wait_for_previous();
#pragma unroll 1
    for (; item.left > 0; item.advance(each)) {
        int c = item.chunk;
        float2 total[OWN<EXACT>] = {};
        inputs.enter(c);
        sum_item<EXACT, ONE>(total, weights, lane_panel(buffers + c % DOWN_BUFFERS * bytes), units);
#pragma unroll
        for (int i = 0; i < OWN<EXACT>; i++) {
            int t = own_row<EXACT>(i);
            if (t >= entries[c][1]) continue;
            float *to = a.down + (int64_t)entries[c][2 + t] * m.rows + item.at * DOWN_ROWS + lane / 4;
            if (!EXACT || lane % 2 == 0) to[0] = total[i].x;
            if (!EXACT || lane % 2 == 1) to[8] = total[i].y;
        }
    }
    inputs.enter(run.n - 1);
    inputs.leave();
#endif
}

auto up_kernel(bool exact, int cols)
{
    bool one = share_of(cols / FP4_UNIT_COLS, CREW / 2) == 1;
    return exact ? (one ? batch_up<true, UNIT> : batch_up<true, UNITS>) : (one ? batch_up<false, UNIT> : batch_up<false, UNITS>);
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
    if (down.rows % DOWN_ROWS != 0 || up.rows % UP_ROWS != 0) return false;
    if (up.cols > b.cols || up.rows > b.intermediate || down.rows > b.width) return false;
    if (picked > b.picked || chunks > b.chunks_most || chunks / q->sms + 3 > CHUNKS_MOST) return false;
    size_t most = (size_t)q->shared_max - sizeof(int[CHUNKS_MOST][ENTRY]) - 2048; /* 2048: barriers, alignment */
    if (up_bytes(up.cols) > most || down_bytes(down.cols) > most) return false;
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
    unsigned blocks = (unsigned)q->sms;
    if (b.known != r->h.data) cuda_batch_prepare(q, r->h);
    int chunk = exact ? CHUNK<true> : CHUNK<false>;
    route_args route = { r->logits, *r->picks, e.n, e.globals + DOWN * e.n, b.factor, b.chunks, chunk };
    prepare_args in = {};
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
    size_t up = up_bytes(e.m[GATE].cols), down = down_bytes(e.m[DOWN].cols);
    launch<block_of(UP_CREW)>(q, "experts", true, up_kernel(exact, e.m[GATE].cols), dim3(blocks), up, a);
    launch<block_of(DOWN_CREW)>(q, "experts", true, exact ? batch_down<true> : batch_down<false>, dim3(blocks), down, a);
    return cuda_batch_shared_down(q, r, false);
}
