/* The mixture of experts for several rows, each expert's weights read once for a chunk of the rows that picked it. NVFP4 experts
 * whose inputs are taken as they are.
 *
 * batch_route: a block a row chooses, and makes the shared expert's hidden row; the last of them puts picks in chunks by expert.
 * batch_up: units of 32 gate and the same 32 up rows of a chunk, a group of four warps each. batch_down: units of 64 rows.
 * Blocks take equal runs of all units, of which only the device knows how many there are. What remains is
 * cuda_batch_shared_down: it adds up what the picks gave.
 *
 * A chunk's inputs are sixteen slots. Of up to ROWS_EXACT rows four are a chunk, with the sums of experts.cu to the bit: of row t
 * slots 2 t and 2 t + 1 have the high and middle parts, 8 + 2 t the low ones, so that the lane that gets a row's sums gets all
 * three. Of more rows, whose inputs are BF16, sixteen are. */
#include "backend/cuda/prepare.cuh"
#include "backend/cuda/route.cuh"

namespace {

/* A unit of sixteen rows in a warp's ring: two tiles' words and their scales, for every lane. */
constexpr int UNIT16 = 2 * 1024 + 2 * 8 * LANES;
constexpr int ENTRY = 20, CHUNK_PANEL = 2 * PANEL_BYTES, TEAMS = 4;
constexpr int CHUNK_WORKERS = TEAMS * TEAM_WARPS, CHUNK_BLOCK = (CHUNK_WORKERS + 1) * LANES;
[[maybe_unused]] constexpr int UP_ROWS = 32;
constexpr int DOWN_ROWS = 64, CHUNKS_MOST = 32; /* CHUNKS_MOST: of a block */

/* Rows of a chunk; of them, those whose sums a lane gets. */
template <bool EXACT> constexpr int CHUNK = EXACT ? 4 : 16;
template <bool EXACT> constexpr int OWN = EXACT ? 1 : 4;

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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Sixteen weight rows of an expert, two tiles, as a lane copies and reads them. */
struct tile16 {
    const uint8_t *at; /* this lane's, of the unit asked for next */
    unsigned half;     /* bytes to the second tile */

    __device__ __forceinline__ tile16(const cuda_matrix &m, int expert, int tile)
        : at(tile_at(m, expert, tile) + threadIdx.x % LANES * 16), half(tile_bytes(m))
    {
    }
    __device__ __forceinline__ tile16() : at(nullptr), half(0) {}
};

/* Asks for a unit; a group of copies, of nothing if none. */
__device__ __forceinline__ void ask16(uint32_t to, tile16 &w, bool any)
{
    int lane = threadIdx.x % LANES;
    if (any) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint8_t *from = w.at + h * w.half;
            copy_async16(to + h * 1024 + lane * 16, from, true);
            copy_async16(to + h * 1024 + 512 + lane * 16, from + 512, true);
            copy_async8(to + 2048 + h * 8 * LANES + 8 * lane, from + 1024 - lane * 16 + lane / 2 * 8);
        }
        w.at += FP4_UNIT_BYTES;
    }
    copy_commit();
}

__device__ __forceinline__ void load16(words16<WEIGHT_NVFP4> &w, const uint8_t *unit)
{
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        w.w[h][0] = *(const uint4 *)(unit + h * 1024 + lane * 16);
        w.w[h][1] = *(const uint4 *)(unit + h * 1024 + 512 + lane * 16);
        w.scale[h] = *(const uint2 *)(unit + 2048 + h * 8 * LANES + lane * 8);
    }
}

/* The block's units, [begin, end) of all, `each` a chunk, and the entries of their chunks. */
struct chunk_run {
    int begin, end, first, n; /* first chunk, chunks */
    __device__ __forceinline__ chunk_run(const int *chunks, int each, int (*entries)[ENTRY])
    {
        int64_t units = (int64_t)__ldcg(chunks) * each;
        begin = (int)(units * blockIdx.x / gridDim.x);
        end = (int)(units * (blockIdx.x + 1) / gridDim.x);
        first = begin / each;
        n = end > begin ? (end - 1) / each - first + 1 : 0;
        for (int i = threadIdx.x; i < n * ENTRY; i += CHUNK_BLOCK) entries[0][i] = __ldcg(chunks + (1 + first) * ENTRY + i);
        __syncthreads();
    }
};

/* A team's units of the run, every TEAMS-th: chunk of the run, and place among the `each` of a chunk. */
struct chunk_unit {
    int chunk, at, each, left; /* left: of the run, from this one on */

    __device__ __forceinline__ chunk_unit(const chunk_run &run, int each_, int team)
        : chunk(0), at(run.begin - run.first * each_), each(each_), left(run.end - run.begin)
    {
        advance(team);
    }
    __device__ __forceinline__ void advance(int n)
    {
        left -= n;
        for (at += n; at >= each; at -= each) chunk++;
    }
};

/* A warp's weights ahead of their use. */
template <int DEPTH, class FIND> struct chunk_weights {
    uint8_t *ring;
    FIND find; /* tile16(unit) */
    tile16 tile;
    chunk_unit unit;
    int left, units, slot;

    __device__ __forceinline__ chunk_weights(uint8_t *at, FIND f, const chunk_unit &first, int of_a_tile)
        : ring(at), find(f), unit(first), left(0), units(of_a_tile), slot(0)
    {
        for (int i = 0; i < DEPTH; i++) ask(i);
    }
    __device__ __forceinline__ void ask(int to)
    {
        if (left == 0 && unit.left > 0) {
            tile = find(unit);
            left = units;
            unit.advance(TEAMS);
        }
        ask16(shared_at(ring) + to * UNIT16, tile, left > 0);
        if (left > 0) left--;
    }
    __device__ __forceinline__ void take(words16<WEIGHT_NVFP4> &w)
    {
        copy_wait<DEPTH - 1>();
        load16(w, ring + slot * UNIT16);
        __syncwarp();
        ask(slot);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
};

/* Panels 0..3 of a unit, given as wide_matrix; not `add`: sums begin with them. */
template <int Q>
__device__ __forceinline__ void chunk_panels(accumulators<16, true> &acc, uint32_t (&f)[4][4], const words16<WEIGHT_NVFP4> &w,
                                             uint64_t panels, bool add)
{
    w.template decode<Q>(f);
    acc.begin(f, panels + Q * CHUNK_PANEL / 16, Q > 0 || add);
    acc.end(f);
    if constexpr (Q < 3) chunk_panels<Q + 1>(acc, f, w, panels, add);
}

/* The lane's own rows of a chunk: which, and of each the sums of weight rows g and g + 8. */
template <bool EXACT> __device__ __forceinline__ int own_row(int i)
{
    int t = threadIdx.x % LANES % 4;
    return EXACT ? t : i / 2 * 8 + 2 * t + i % 2;
}

template <bool EXACT> __device__ __forceinline__ void add_own(float2 (&total)[OWN<EXACT>], const accumulators<16, true> &acc)
{
    if constexpr (EXACT) {
        total[0].x += acc.sum(0, 0) + acc.sum(0, 1) + acc.sum(1, 0);
        total[0].y += acc.sum(0, 2) + acc.sum(0, 3) + acc.sum(1, 2);
    } else {
#pragma unroll
        for (int i = 0; i < OWN<EXACT>; i++) {
            total[i].x += acc.sum(i / 2, i % 2);
            total[i].y += acc.sum(i / 2, 2 + i % 2);
        }
    }
}

/* Byte of part p of row t at a place of a chunk's panel. */
template <bool EXACT> __device__ __forceinline__ int chunk_byte(int t, int p, int place)
{
    return EXACT ? p / 2 * PANEL_BYTES + panel_byte(2 * t + p % 2, place) : t / 8 * PANEL_BYTES + panel_byte(t % 8, place);
}

/* Buffers of chunks' inputs: chunk c of the run in buffer c % BUFFERS. Every worker warp leaves every chunk once. */
template <int BUFFERS> struct chunk_buffers {
    uint64_t *full, *empty;
    int current; /* chunk of the run a warp is in */

    __device__ __forceinline__ explicit chunk_buffers(uint64_t *barriers)
        : full(barriers), empty(barriers + BUFFERS), current(-1)
    {
    }
    /* A worker: on to chunk c, through each before it, of which it may have no unit. A barrier tells a phase from the next only. */
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
        if (current >= 0 && threadIdx.x % LANES == 0) barrier_arrive(&empty[current % BUFFERS]);
    }
    /* The copier: until buffer of chunk c is free. */
    __device__ __forceinline__ void reserve(int c)
    {
        barrier_wait(&empty[c % BUFFERS], c / BUFFERS % 2 ^ 1);
    }
};

template <int BUFFERS> __device__ __forceinline__ void chunk_barriers(uint64_t *barriers, int copiers)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < BUFFERS; i++) {
            barrier_init(&barriers[i], copiers);
            barrier_init(&barriers[BUFFERS + i], CHUNK_WORKERS);
        }
        barriers_ready();
    }
}

/* Rows of a chunk from the panels of all rows, by a warp. */
template <bool EXACT>
__device__ __forceinline__ void gather_rows(uint32_t to, const chunk_args &a, const int *entry, int panels)
{
    constexpr int N = EXACT ? PARTS : 1;
    int lane = threadIdx.x % LANES;
    for (int t = 0; t < entry[1]; t++) {
        int row = entry[2 + t] / a.k, r = row % 8;
        const uint8_t *from = a.parts + row / 8 * (N * PANEL_BYTES);
#pragma unroll 4
        for (int i = lane; i < panels * N * 8; i += LANES) {
            int place = i % 8 * 8, part = i / 8 % N, c = i / (8 * N);
            copy_async16(to + c * CHUNK_PANEL + chunk_byte<EXACT>(t, part, place),
                         from + ((int64_t)c * a.groups * N + part) * PANEL_BYTES + panel_byte(r, place), true);
        }
    }
    copy_commit();
    copy_wait<0>();
    wide_show();
}
#endif

constexpr int UP_BUFFERS = 2, UP_DEPTH = 2, DOWN_BUFFERS = 4, DOWN_DEPTH = 3;

__host__ __device__ inline size_t up_bytes(int cols)
{
    return (size_t)UP_BUFFERS * (cols / PANEL) * CHUNK_PANEL + CHUNK_WORKERS * UP_DEPTH * UNIT16;
}

__host__ __device__ inline size_t down_bytes(int cols)
{
    return (size_t)DOWN_BUFFERS * (cols / PANEL) * CHUNK_PANEL + CHUNK_WORKERS * DOWN_DEPTH * UNIT16;
}

/* Of a team's four warps two have gate rows, two up rows. Shared memory: buffers, rings. */
template <bool EXACT> __global__ void __launch_bounds__(CHUNK_BLOCK, 1) batch_up(const __grid_constant__ chunk_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ uint64_t barriers[2 * UP_BUFFERS];
    __shared__ int entries[CHUNKS_MOST][ENTRY];
    __shared__ float2 meeting[TEAMS][OWN<EXACT>][2][LANES];
    const cuda_matrix &gate = a.e.m[GATE];
    int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    int panels = gate.cols / PANEL, each = gate.rows / UP_ROWS;
    int team = warp / TEAM_WARPS, member = warp % TEAM_WARPS, side = member / 2;
    uint32_t buffers = shared_at(shared);
    chunk_barriers<UP_BUFFERS>(barriers, LANES);
    wait_for_previous();
    let_next_start(); /* which may count on the chunks */
    chunk_run run(a.chunks, each, entries);
    chunk_buffers<UP_BUFFERS> inputs(barriers);
    if (warp == CHUNK_WORKERS) {
        for (int c = 0; c < run.n; c++) {
            inputs.reserve(c);
            gather_rows<EXACT>(buffers + c % UP_BUFFERS * panels * CHUNK_PANEL, a, entries[c], panels);
            barrier_arrive(&barriers[c % UP_BUFFERS]);
        }
        return;
    }
    int units = gate.cols / FP4_UNIT_COLS, share = (units + CREW / 2 - 1) / (CREW / 2);
    auto find = [&](const chunk_unit &x) {
        return tile16(a.e.m[side], entries[x.chunk][0], x.at * (UP_ROWS / 8) + member % 2 * 2);
    };
    chunk_unit unit(run, each, team);
    chunk_weights<UP_DEPTH, decltype(find)> weights(shared + UP_BUFFERS * panels * CHUNK_PANEL + warp * UP_DEPTH * UNIT16, find,
                                                    unit, units);
#pragma unroll 1
    for (; unit.left > 0; unit.advance(TEAMS)) {
        int c = unit.chunk, expert = entries[c][0];
        uint32_t panel = buffers + c % UP_BUFFERS * panels * CHUNK_PANEL, f[4][4];
        accumulators<16, true> acc;
        float2 total[OWN<EXACT>] = {};
        inputs.enter(c);
#pragma unroll 1
        for (int u = 0, left = share; u < units; u++, panel += 4 * CHUNK_PANEL) {
            words16<WEIGHT_NVFP4> w;
            weights.take(w);
            chunk_panels<0>(acc, f, w, wide_matrix(panel), left < share);
            if (--left > 0 && u + 1 < units) continue;
            left = share;
            add_own<EXACT>(total, acc);
        }
        if (side)
#pragma unroll
            for (int i = 0; i < OWN<EXACT>; i++) meeting[team][i][member - 2][lane] = total[i];
        meet_128(1 + team);
        float unit_gate = FP4_UNIT / a.e.globals[expert], unit_up = FP4_UNIT / a.e.globals[a.e.n + expert];
#pragma unroll
        for (int i = 0; i < OWN<EXACT>; i++) {
            int t = own_row<EXACT>(i);
            if (side || t >= entries[c][1]) continue;
            float2 up = meeting[team][i][member][lane];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int r = unit.at * UP_ROWS + member * 16 + lane / 4 + h * 8;
                int place = panel_place(r % PANEL, false);
                float x = silu((h ? total[i].y : total[i].x) * unit_gate) * ((h ? up.y : up.x) * unit_up);
                uint8_t *to = a.hidden + ((int64_t)(run.first + c) * (gate.rows / PANEL) + r / PANEL) * CHUNK_PANEL;
                split_pair s(make_float2(x, 0));
#pragma unroll
                for (int p = 0; p < (EXACT ? PARTS : 1); p++)
                    *(uint16_t *)(to + chunk_byte<EXACT>(t, p, place)) = (uint16_t)s.part[p];
            }
        }
        meet_128(1 + team);
    }
    inputs.enter(run.n - 1);
    inputs.leave();
    copy_wait<0>();
#endif
}

template <bool EXACT> __global__ void __launch_bounds__(CHUNK_BLOCK, 1) batch_down(const __grid_constant__ chunk_args a)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ uint64_t barriers[2 * DOWN_BUFFERS];
    __shared__ int entries[CHUNKS_MOST][ENTRY];
    const cuda_matrix &m = a.e.m[DOWN];
    int warp = __shfl_sync(ALL, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    int each = m.rows / DOWN_ROWS, bytes = m.cols / PANEL * CHUNK_PANEL;
    int team = warp / TEAM_WARPS, member = warp % TEAM_WARPS, units = m.cols / FP4_UNIT_COLS;
    uint32_t buffers = shared_at(shared);
    chunk_barriers<DOWN_BUFFERS>(barriers, 1);
    let_next_start();
    chunk_run run(a.chunks, each, entries);
    chunk_buffers<DOWN_BUFFERS> inputs(barriers);
    if (warp == CHUNK_WORKERS) {
        wait_for_previous();
        for (int c = 0; lane == 0 && c < run.n; c++) {
            inputs.reserve(c);
            barrier_expect(&barriers[c % DOWN_BUFFERS], bytes);
            copy_bulk(buffers + c % DOWN_BUFFERS * bytes, a.hidden + (int64_t)(run.first + c) * bytes, bytes,
                      &barriers[c % DOWN_BUFFERS]);
        }
        return;
    }
    auto find = [&](const chunk_unit &x) { return tile16(m, entries[x.chunk][0], x.at * (DOWN_ROWS / 8) + member * 2); };
    chunk_unit unit(run, each, team);
    chunk_weights<DOWN_DEPTH, decltype(find)> weights(shared + DOWN_BUFFERS * bytes + warp * DOWN_DEPTH * UNIT16, find, unit,
                                                      units);
    wait_for_previous();
#pragma unroll 1
    for (; unit.left > 0; unit.advance(TEAMS)) {
        int c = unit.chunk;
        uint32_t panel = buffers + c % DOWN_BUFFERS * bytes, f[4][4];
        accumulators<16, true> acc;
        float2 total[OWN<EXACT>] = {};
        inputs.enter(c);
#pragma unroll 1
        for (int u = 0; u < units; u++, panel += 4 * CHUNK_PANEL) {
            words16<WEIGHT_NVFP4> w;
            weights.take(w);
            chunk_panels<0>(acc, f, w, wide_matrix(panel), u > 0);
        }
        add_own<EXACT>(total, acc);
#pragma unroll
        for (int i = 0; i < OWN<EXACT>; i++) {
            int t = own_row<EXACT>(i);
            if (t >= entries[c][1]) continue;
            int r = unit.at * DOWN_ROWS + member * 16 + lane / 4;
            float *to = a.down + (int64_t)entries[c][2 + t] * m.rows + r;
            to[0] = total[i].x;
            to[8] = total[i].y;
        }
    }
    inputs.enter(run.n - 1);
    inputs.leave();
    copy_wait<0>();
#endif
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
    if (down.rows % DOWN_ROWS != 0 || up.cols > b.cols || up.rows > b.intermediate || down.rows > b.width) return false;
    if (picked > b.picked || chunks > b.chunks_most || chunks / q->sms + 3 > CHUNKS_MOST) return false;
    size_t most = (size_t)q->shared_max - sizeof(int[CHUNKS_MOST][ENTRY]) - sizeof(float2[TEAMS][OWN<false>][2][LANES]) - 1024;
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
    size_t up = up_bytes(e.m[GATE].cols), down = down_bytes(e.m[DOWN].cols);
    launch<CHUNK_BLOCK>(q, "experts", true, exact ? batch_up<true> : batch_up<false>, dim3(blocks), up, a);
    launch<CHUNK_BLOCK>(q, "experts", true, exact ? batch_down<true> : batch_down<false>, dim3(blocks), down, a);
    return cuda_batch_shared_down(q, r, false);
}
