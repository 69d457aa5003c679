/* Attention of many rows of a sequence over its tokens, heads of 256. A block takes 128 pairs of a row and a query head of
 * one kv head, row by row, so that its keys and values are read once for all its heads; a warp takes sixteen of the pairs
 * over all tokens, 64 at a time, which are one page of the cache. Queries, keys, values and probabilities are BF16, sums,
 * maxima and the exponential f32. A cache that is not BF16 is copied beforehand.
 *
 * flash: all warps copy pages and multiply. Shared memory: queries, twice keys and values.
 * flash_wide, on compute capability 9.0a: two groups of four warps multiply, one more warp has keys and values copied into a
 * ring of five, in the order K0 K1 V0 K2 V1 ... A group asks for the next page's scores and this page's values at once, and makes
 * probabilities of the scores while the values are added. */
#include "backend/cuda/matrices.cuh"
#include "backend/cuda/prefill.h"
#include "backend/cuda/tensor_map.cuh"
#include "backend/cuda/wide.cuh"

namespace {

constexpr int DIM = 256, PAIRS = 128, TOKENS = KV_PAGE, KV_BYTES = TOKENS * DIM * 2, Q_BYTES = PAIRS * DIM * 2;
constexpr int FLASH_SHARED = Q_BYTES + 4 * KV_BYTES;
constexpr int RING = 5, WIDE_SHARED = Q_BYTES + RING * KV_BYTES, WIDE_BLOCK = THREADS + 128;
constexpr float LOG2E = 1.4426950408889634f;

struct flash_args {
    mat y, qg;
    int n_heads, group;
    kv_cache kv;
    cuda_rows rows;
    const __nv_bfloat16 *keys, *values; /* of all spans' tokens, whole pages; NULL: in the cache */
};

/* Pairs of rows and heads [first, first + PAIRS) of a span. page0: pages of the spans before it. */
struct flash_tile {
    cuda_span span;
    int number, first, page0;
    bool any;
};

__device__ int pages_of(const cuda_span &s)
{
    return (s.past + s.n + KV_PAGE - 1) / KV_PAGE;
}

__device__ flash_tile flash_tile_of(const flash_args &a, int number)
{
    flash_tile t = {};
    for (int s = 0; s < a.rows.n_spans; s++) {
        t.span = a.rows.spans[s];
        t.number = s;
        int tiles = (t.span.n * a.group + PAIRS - 1) / PAIRS;
        if (number < tiles) {
            t.first = number * PAIRS;
            t.any = true;
            return t;
        }
        number -= tiles;
        t.page0 += pages_of(t.span);
    }
    return t;
}

/* Piece of 16 bytes of a row, of a matrix of ROWS rows: panels of 64 columns, in each piece i of row r at i ^ (r % 8). */
template <int ROWS> __device__ __forceinline__ uint32_t place(int row, int piece)
{
    return piece / 8 * (ROWS * 128) + row * 128 + ((piece ^ row) & 7) * 16;
}

/* Page `number` of the tile's span. */
__device__ __forceinline__ void load_page(uint32_t to, const flash_args &a, const flash_tile &tile, int number, int kv_head)
{
    int64_t line = (int64_t)a.kv.n_kv_heads * DIM;
    int page = a.keys ? tile.page0 + number : a.rows.pages[(int64_t)tile.number * a.rows.pages_each + number];
    int64_t at = (int64_t)page * KV_PAGE * line + kv_head * DIM;
    const __nv_bfloat16 *k = (a.keys ? a.keys : (const __nv_bfloat16 *)a.kv.keys) + at;
    const __nv_bfloat16 *v = (a.keys ? a.values : (const __nv_bfloat16 *)a.kv.values) + at;
    int end = tile.span.past + tile.span.n - number * KV_PAGE;
#pragma unroll
    for (int i = 0; i < TOKENS * 32 / THREADS; i++) {
        int row = threadIdx.x / 32 + i * (THREADS / 32), piece = threadIdx.x % 32;
        bool in = row < end; /* what lies past the last token may be anything: zeros keep it out of the sums */
        copy_async16(to + place<TOKENS>(row, piece), in ? k + row * line + piece * 8 : k, in);
        copy_async16(to + KV_BYTES + place<TOKENS>(row, piece), in ? v + row * line + piece * 8 : v, in);
    }
}

/* Queries times 1 / sqrt(DIM), a power of two. */
__device__ __forceinline__ void load_queries(uint8_t *to, const flash_args &a, const flash_tile &tile, int kv_head, int pairs)
{
    for (int i = threadIdx.x; i < PAIRS * DIM / 2; i += THREADS) {
        int pair = i / (DIM / 2), d = i % (DIM / 2) * 2;
        uint32_t v = 0;
        if (pair < pairs) {
            int row = (tile.first + pair) / a.group, head = kv_head * a.group + (tile.first + pair) % a.group;
            const float *q = a.qg.data + (int64_t)(tile.span.first + row) * a.qg.stride + (int64_t)head * 2 * DIM + d;
            v = pair_of(q[0] * 0.0625f, q[1] * 0.0625f);
        }
        *(uint32_t *)(to + place<PAIRS>(pair, d / 8) + d % 8 * 2) = v;
    }
}

__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

/* A warp's sixteen pairs: s += queries by 64 keys; o += probabilities by 64 values. */
__device__ __forceinline__ void scores(float (&s)[8][4], uint32_t queries, uint32_t keys)
{
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, quarter = lane / 8, eighth = lane % 8;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        uint32_t q[4];
        matrices(q, queries + place<PAIRS>(warp * 16 + (quarter & 1) * 8 + eighth, 2 * k + quarter / 2));
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t b[4];
            matrices(b, keys + place<TOKENS>(n * 16 + quarter / 2 * 8 + eighth, 2 * k + (quarter & 1)));
            mma(s[2 * n], q[0], q[1], q[2], q[3], b[0], b[1]);
            mma(s[2 * n + 1], q[0], q[1], q[2], q[3], b[2], b[3]);
        }
    }
}

__device__ __forceinline__ void add_values(float (&o)[32][4], const uint32_t (&p)[8][2], uint32_t values)
{
    int lane = threadIdx.x % LANES, quarter = lane / 8, eighth = lane % 8;
#pragma unroll
    for (int k = 0; k < TOKENS / 16; k++)
#pragma unroll
        for (int n = 0; n < 16; n++) {
            uint32_t b[4];
            matrices_turned(b, values + place<TOKENS>(k * 16 + (quarter & 1) * 8 + eighth, 2 * n + quarter / 2));
            mma(o[2 * n], p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1], b[0], b[1]);
            mma(o[2 * n + 1], p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1], b[2], b[3]);
        }
}

/* Grid: tiles of all spans, the last first; kv heads. */
__global__ void __launch_bounds__(THREADS, 1) flash(const __grid_constant__ flash_args a)
{
    wait_for_previous();
    let_next_start();
    SHARED_MEMORY(uint8_t, shared, 1024);
    flash_tile tile = flash_tile_of(a, gridDim.x - 1 - blockIdx.x);
    if (!tile.any) return;
    int kv_head = blockIdx.y, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int pairs = tile.span.n * a.group - tile.first;
    if (pairs > PAIRS) pairs = PAIRS;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared), cache = base + Q_BYTES;
    int last = tile.span.past + (tile.first + pairs - 1) / a.group; /* token of the last row */
    int pages = last / TOKENS + 1;
    load_page(cache, a, tile, 0, kv_head);
    copy_commit();
    load_queries(shared, a, tile, kv_head, pairs);
    float o[32][4], top[2] = { -INFINITY, -INFINITY }, sum[2] = { 0, 0 };
#pragma unroll
    for (int n = 0; n < 32; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[n][i] = 0;
    int token[2]; /* of rows g and g + 8 of the warp */
    for (int h = 0; h < 2; h++) token[h] = tile.span.past + (tile.first + warp * 16 + g + 8 * h) / a.group;
    int first_token = tile.span.past + (tile.first + warp * 16) / a.group;
    for (int page = 0; page < pages; page++) {
        uint32_t keys = cache + page % 2 * 2 * KV_BYTES, values = keys + KV_BYTES;
        copy_wait<0>();
        __syncthreads();
        if (page + 1 < pages) load_page(cache + (page + 1) % 2 * 2 * KV_BYTES, a, tile, page + 1, kv_head);
        copy_commit();
        float s[8][4];
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] = 0;
        scores(s, base, keys);
        if (page * TOKENS + TOKENS - 1 > first_token) {
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (page * TOKENS + n * 8 + 2 * t + i % 2 > token[i / 2]) s[n][i] = -INFINITY;
        }
        uint32_t p[8][2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = top[h];
#pragma unroll
            for (int n = 0; n < 8; n++) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
            most = quad_max(most); /* finite: a row sees at least the first token */
            float keep = exp2f((top[h] - most) * LOG2E), base_log = most * LOG2E, part = 0;
            top[h] = most;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float x = exp2f(fmaf(s[n][2 * h], LOG2E, -base_log)), y = exp2f(fmaf(s[n][2 * h + 1], LOG2E, -base_log));
                p[n][h] = pair_of(x, y);
                part += x + y;
            }
            sum[h] = fmaf(sum[h], keep, part);
            if (__all_sync(ALL, keep == 1)) continue; /* no row has a new largest */
#pragma unroll
            for (int n = 0; n < 32; n++) {
                o[n][2 * h] *= keep;
                o[n][2 * h + 1] *= keep;
            }
        }
        add_values(o, p, values);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int pair = warp * 16 + g + 8 * h;
        float total = sum[h] + __shfl_xor_sync(ALL, sum[h], 1);
        total += __shfl_xor_sync(ALL, total, 2);
        if (pair >= pairs) continue;
        int64_t row = tile.span.first + (tile.first + pair) / a.group, head = kv_head * a.group + (tile.first + pair) % a.group;
        const float *gate = a.qg.data + row * a.qg.stride + head * 2 * DIM + DIM + 2 * t;
        float *to = a.y.data + row * a.y.stride + head * DIM + 2 * t, inverse = 1.0f / total;
#pragma unroll
        for (int n = 0; n < 32; n++) {
            to[n * 8] = o[n][2 * h] * inverse * sigmoid(gate[n * 8]);
            to[n * 8 + 1] = o[n][2 * h + 1] * inverse * sigmoid(gate[n * 8 + 1]);
        }
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
struct flash_barriers {
    uint64_t full[RING], empty[RING];
};

/* Keys (side 0) or values of page `number` of the tile's span, which its last token does not fill, by a warp. */
__device__ __forceinline__ void copy_last_page(uint32_t to, const flash_args &a, int page, int tokens, int kv_head, int side)
{
    int64_t line = (int64_t)a.kv.n_kv_heads * DIM;
    const __nv_bfloat16 *base = side ? a.keys ? a.values : (const __nv_bfloat16 *)a.kv.values
                                     : a.keys ? a.keys : (const __nv_bfloat16 *)a.kv.keys;
    int piece = threadIdx.x % LANES;
    const __nv_bfloat16 *from = base + (int64_t)page * KV_PAGE * line + kv_head * DIM + piece * 8;
#pragma unroll 4
    for (int row = 0; row < TOKENS; row++, from += line)
        copy_async16(to + place<TOKENS>(row, piece), row < tokens ? from : base, row < tokens);
    copy_commit();
    copy_wait<0>();
    wide_show();
    __syncwarp();
}

/* By a warp: K0 K1 V0 K2 V1 ... */
__device__ __forceinline__ void copy_pages(const flash_args &a, const flash_tile &tile, const CUtensorMap &keys,
                                           const CUtensorMap &values, int kv_head, int pages, uint32_t ring,
                                           flash_barriers &barriers)
{
    ring_place at = { 0, 1 };
    bool first_lane = threadIdx.x % LANES == 0;
#pragma unroll 1
    for (int i = 0; i < 2 * pages; i++) {
        int side = (i > 1 && i % 2 == 0) || i == 2 * pages - 1;
        int number = side ? i == 2 * pages - 1 ? pages - 1 : i / 2 - 1 : (i + 1) / 2;
        int page = a.keys ? tile.page0 + number : a.rows.pages[(int64_t)tile.number * a.rows.pages_each + number];
        int tokens = tile.span.past + tile.span.n - number * KV_PAGE;
        uint32_t to = ring + at.slot * KV_BYTES;
        uint64_t *full = barriers.full + at.slot;
        barrier_wait(barriers.empty + at.slot, at.phase);
        if (tokens < TOKENS) {
            copy_last_page(to, a, page, tokens, kv_head, side);
            if (first_lane) barrier_arrive(full);
        } else if (first_lane) {
            barrier_expect(full, KV_BYTES);
#pragma unroll
            for (int p = 0; p < DIM / 64; p++)
                copy_box(to + p * TOKENS * 128, side ? values : keys, kv_head * DIM + p * 64, page * KV_PAGE, full);
        }
        at.advance(RING);
    }
}

/* Pages as a multiplying warp meets them. */
struct flash_ring {
    uint32_t at;
    flash_barriers &barriers;
    ring_place next;
    int last; /* slot that instructions may still read */

    __device__ __forceinline__ uint32_t await()
    {
        barrier_wait(barriers.full + next.slot, next.phase);
        uint32_t slot = at + next.slot * KV_BYTES;
        next.advance(RING);
        return slot;
    }
    __device__ __forceinline__ void leave()
    {
        if (threadIdx.x % LANES == 0) barrier_arrive(barriers.empty + last);
        last = last + 1 == RING ? 0 : last + 1;
    }
};

/* A group's 64 queries, those of a warp and its sums. */
struct flash_group {
    float s[TOKENS / 8][4], o[DIM / 8][4], top[2], sum[2], keep[2];
    uint32_t p[TOKENS / 16][4], next[TOKENS / 16][4]; /* probabilities of this page, of the next */

    __device__ __forceinline__ void ask_scores(uint32_t queries, uint32_t keys)
    {
        wide_begin();
#pragma unroll
        for (int k = 0; k < DIM / 16; k++)
            wide_mma_shared(s, wide_matrix(queries + k / 4 * (PAIRS * 128)) + k % 4 * WIDE_STEP,
                            wide_matrix(keys + k / 4 * (TOKENS * 128)) + k % 4 * WIDE_STEP, k > 0);
        wide_commit();
    }
    __device__ __forceinline__ void ask_values(uint32_t values)
    {
        wide_hold(o);
        wide_keep(p);
        wide_begin();
#pragma unroll
        for (int k = 0; k < TOKENS / 16; k++) wide_mma_turned(o, p[k], wide_turned(values + k * 2048, TOKENS * 128));
        wide_commit();
    }
    /* token: the last that rows g and g + 8 of the warp see, of those from the page's first on */
    __device__ __forceinline__ void mask(const int (&token)[2])
    {
        int t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (n * 8 + 2 * t + i % 2 > token[i / 2]) s[n][i] = -INFINITY;
    }
    __device__ __forceinline__ void probabilities()
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = top[h];
#pragma unroll
            for (int n = 0; n < TOKENS / 8; n++) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
            most = quad_max(most); /* finite: a row sees at least the first token */
            float base = most * LOG2E, part = 0;
            keep[h] = power_of_two((top[h] - most) * LOG2E);
            top[h] = most;
#pragma unroll
            for (int n = 0; n < TOKENS / 8; n++) {
                float x = power_of_two(fmaf(s[n][2 * h], LOG2E, -base)), y = power_of_two(fmaf(s[n][2 * h + 1], LOG2E, -base));
                next[n / 2][n % 2 * 2 + h] = pair_of(x, y);
                part += x + y;
            }
            sum[h] = fmaf(sum[h], keep[h], part);
        }
    }
    /* After `probabilities`, when the page before has been added. */
    __device__ __forceinline__ void turn_page()
    {
#pragma unroll
        for (int k = 0; k < TOKENS / 16; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) p[k][i] = next[k][i];
        if (__all_sync(ALL, keep[0] == 1 && keep[1] == 1)) return; /* no row has a new largest */
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] *= keep[i / 2];
    }
};

__device__ __forceinline__ void group_meets()
{
    meet_128(1 + (int)threadIdx.x / 128);
}

/* The queries of this thread's group, times 1 / sqrt(DIM), a power of two. */
__device__ __forceinline__ void load_group(uint8_t *to, const flash_args &a, const flash_tile &tile, int kv_head, int pairs)
{
#pragma unroll 16
    for (int i = threadIdx.x % 128; i < 64 * DIM / 4; i += 128) {
        int pair = threadIdx.x / 128 * 64 + i / (DIM / 4), d = i % (DIM / 4) * 4;
        uint2 v = make_uint2(0, 0);
        if (pair < pairs) {
            int row = (tile.first + pair) / a.group, head = kv_head * a.group + (tile.first + pair) % a.group;
            float4 q = *(const float4 *)(a.qg.data + (int64_t)(tile.span.first + row) * a.qg.stride + (int64_t)head * 2 * DIM + d);
            v = make_uint2(pair_of(q.x * 0.0625f, q.y * 0.0625f), pair_of(q.z * 0.0625f, q.w * 0.0625f));
        }
        *(uint2 *)(to + place<PAIRS>(pair, d / 8) + d % 8 * 2) = v;
    }
    wide_show();
    group_meets();
}

__device__ __forceinline__ void attend_group(uint8_t *shared, const flash_args &a, const flash_tile &tile, int kv_head,
                                             int pairs, int pages, flash_barriers &barriers)
{
    int warp = threadIdx.x / LANES, g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
    load_group(shared, a, tile, kv_head, pairs);
    uint32_t queries = shared_at(shared) + threadIdx.x / 128 * 8192;
    flash_ring ring = { shared_at(shared) + Q_BYTES, barriers, { 0, 0 }, 0 };
    flash_group f;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) f.o[n][i] = f.s[n % (TOKENS / 8)][i] = 0;
    f.top[0] = f.top[1] = -INFINITY;
    f.sum[0] = f.sum[1] = 0;
    int token[2], first_token = tile.span.past + (tile.first + warp * 16) / a.group; /* what the next page's rows see */
    for (int h = 0; h < 2; h++) token[h] = tile.span.past + (tile.first + warp * 16 + g + 8 * h) / a.group;
    wide_hold(f.s);
    f.ask_scores(queries, ring.await());
    wide_wait<0>();
    wide_hold(f.s);
    ring.leave();
    if (TOKENS - 1 > first_token) f.mask(token);
    f.probabilities();
    f.turn_page();
#pragma unroll 1
    for (int page = 1; page < pages; page++) {
        wide_hold(f.s);
        f.ask_scores(queries, ring.await());
        f.ask_values(ring.await());
        wide_wait<1>();
        wide_hold(f.s);
        ring.leave();
        first_token -= TOKENS, token[0] -= TOKENS, token[1] -= TOKENS;
        if (TOKENS - 1 > first_token) f.mask(token);
        f.probabilities();
        wide_wait<0>();
        wide_hold(f.o);
        wide_keep(f.p);
        ring.leave();
        f.turn_page();
    }
    f.ask_values(ring.await());
    wide_wait<0>();
    wide_hold(f.o);
    wide_keep(f.p);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int pair = warp * 16 + g + 8 * h;
        float total = f.sum[h] + __shfl_xor_sync(ALL, f.sum[h], 1);
        total += __shfl_xor_sync(ALL, total, 2);
        if (pair >= pairs) continue;
        int64_t row = tile.span.first + (tile.first + pair) / a.group, head = kv_head * a.group + (tile.first + pair) % a.group;
        const float *gate = a.qg.data + row * a.qg.stride + head * 2 * DIM + DIM + 2 * t;
        float *to = a.y.data + row * a.y.stride + head * DIM + 2 * t, inverse = 1.0f / total;
        float2 open[DIM / 8];
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) open[n] = __ldcg((const float2 *)(gate + n * 8));
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
            *(float2 *)(to + n * 8) = make_float2(f.o[n][2 * h] * inverse * sigmoid(open[n].x), f.o[n][2 * h + 1] * inverse * sigmoid(open[n].y));
    }
}
#endif

/* Grid as of flash. Rows of qg begin at multiples of 16 bytes, those of y of 8. */
__global__ void __launch_bounds__(WIDE_BLOCK, 1)
    flash_wide(const __grid_constant__ flash_args a, const __grid_constant__ CUtensorMap keys, const __grid_constant__ CUtensorMap values)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    let_next_start();
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ flash_barriers barriers;
    if (threadIdx.x < RING) {
        barrier_init(barriers.full + threadIdx.x, 1);
        barrier_init(barriers.empty + threadIdx.x, WARPS);
        barriers_ready();
    }
    wait_for_previous();
    flash_tile tile = flash_tile_of(a, gridDim.x - 1 - blockIdx.x);
    if (!tile.any) return;
    int pairs = tile.span.n * a.group - tile.first;
    if (pairs > PAIRS) pairs = PAIRS;
    int pages = (tile.span.past + (tile.first + pairs - 1) / a.group) / TOKENS + 1; /* to the last row's token */
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        fewer_registers<24>();
        if (threadIdx.x < THREADS + LANES)
            copy_pages(a, tile, keys, values, blockIdx.y, pages, shared_at(shared) + Q_BYTES, barriers);
    } else {
        more_registers<240>();
        attend_group(shared, a, tile, blockIdx.y, pairs, pages, barriers);
    }
#endif
}

/* A cache of f32 or E4M3 as BF16, span after span. Grid: columns of a line by pairs, pages of the span, spans. */
__global__ void gather_cache(__nv_bfloat16 *keys, __nv_bfloat16 *values, kv_cache kv, cuda_rows rows)
{
    wait_for_previous();
    let_next_start();
    cuda_span span = rows.spans[blockIdx.z];
    int64_t line = (int64_t)kv.n_kv_heads * kv.head_dim, page0 = 0;
    for (int s = 0; s < (int)blockIdx.z; s++) page0 += pages_of(rows.spans[s]);
    if ((int)blockIdx.y >= pages_of(span)) return;
    int64_t from = (int64_t)rows.pages[(int64_t)blockIdx.z * rows.pages_each + blockIdx.y] * KV_PAGE * line;
    int64_t to = (page0 + blockIdx.y) * KV_PAGE * line;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < KV_PAGE * line; i += (int64_t)gridDim.x * THREADS) {
        float k, v;
        if (kv.dtype == KV_F32) {
            k = ((const float *)kv.keys)[from + i];
            v = ((const float *)kv.values)[from + i];
        } else {
            k = e4m3_value(((const uint8_t *)kv.keys)[from + i]);
            v = e4m3_value(((const uint8_t *)kv.values)[from + i]);
        }
        keys[to + i] = __float2bfloat16_rn(k);
        values[to + i] = __float2bfloat16_rn(v);
    }
}

} /* namespace */

bool cuda_flash(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                const struct step_rows *step)
{
    int group = n_heads / kv->n_kv_heads;
    int64_t line = (int64_t)kv->n_kv_heads * kv->head_dim, page = KV_PAGE * line, room = q->room / (2 * page * 2);
    bool many = step->prompts || (step->n > ROWS_EXACT && step->n >= 8 * step->n_spans), copied = kv->dtype != KV_BF16;
    if (!q->rounded || !many || kv->head_dim != DIM || PAIRS % group || FLASH_SHARED > q->shared_max) return false;
    const struct cuda_rows *rows = queue_rows(q, step);
    if (!rows) return true;
    flash_args a = {};
    a.y = y;
    a.qg = qg;
    a.n_heads = n_heads;
    a.group = group;
    a.kv = *kv;
    bool aligned = qg.stride % 4 == 0 && (uintptr_t)qg.data % 16 == 0 && y.stride % 2 == 0 && (uintptr_t)y.data % 8 == 0;
    constexpr int64_t MANY = (int64_t)1 << 30; /* tokens: more than there are */
    for (int64_t first = 0, n; first < step->n_spans; first += n) {
        int64_t pages = 0, tiles = 0, most = 0;
        for (n = 0; first + n < step->n_spans; n++) {
            const struct span *span = &step->spans[first + n];
            int64_t own = (span->past + span->n + KV_PAGE - 1) / KV_PAGE;
            if (copied && pages + own > room) break;
            pages += own;
            if (own > most) most = own;
            tiles += (span->n * group + PAIRS - 1) / PAIRS;
        }
        if (n == 0) { /* no room for its copy */
            const struct span *span = &step->spans[first];
            cuda_attention_some(q, y, qg, n_heads, kv, rows, span->first, span->n);
            n = 1;
            continue;
        }
        a.rows = *rows;
        a.rows.spans += first;
        a.rows.pages += first * rows->pages_each;
        a.rows.n_spans = (int)n;
        if (copied) {
            __nv_bfloat16 *keys = (__nv_bfloat16 *)q->prefill.down, *values = keys + pages * page;
            launch(q, "attention", true, gather_cache, dim3(4, (unsigned)most, (unsigned)n), 0, keys, values, *kv, a.rows);
            a.keys = keys;
            a.values = values;
        }
        dim3 grid((unsigned)tiles, (unsigned)kv->n_kv_heads);
        CUtensorMap k, v;
        if (q->has_wide && aligned && WIDE_SHARED + 2048 <= q->shared_max &&
            tensor_map(q->map_maker, &k, copied ? (const void *)a.keys : kv->keys, MANY, line, line, TOKENS) &&
            tensor_map(q->map_maker, &v, copied ? (const void *)a.values : kv->values, MANY, line, line, TOKENS))
            launch<WIDE_BLOCK>(q, "attention", true, flash_wide, grid, WIDE_SHARED, a, k, v);
        else
            launch(q, "attention", true, flash, grid, FLASH_SHARED, a);
    }
    return true;
}
