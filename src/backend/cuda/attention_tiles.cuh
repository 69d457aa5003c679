/* Attention of few rows over heads of 256 on the tensor cores, for up to eight query heads of a kv head.
 *
 * A warp takes 16 tokens at a time, from the last of its block's on. Their keys and values come as pieces of 512 or 256 bytes
 * a token through a ring of its own, by bulk copies that are under way some pieces ahead (before 9.0: by cp.async). Scores
 * are keys (16 tokens) times queries (eight heads), values are turned (16 columns) times shares (eight heads). Queries, shares
 * and f32 keys and values are exact sums of three BF16 numbers; FP8 is BF16 as it is. */
#ifndef BACKEND_CUDA_ATTENTION_TILES_CUH
#define BACKEND_CUDA_ATTENTION_TILES_CUH
#include "backend/cuda/barrier.cuh"
#include "backend/cuda/stream.cuh"

namespace {

constexpr int TILE_HEADS = 8, TILE_TOKENS = 16, TILE_DIM = HEAD_MAX, TILE_STEPS = TILE_DIM / 16, TILE_PARTS = 3;
constexpr int TILE_SIZE = TILE_DIM + 4; /* floats of a head that a warp leaves: columns, maximum, sum */
constexpr size_t OPERANDS_BYTES = TILE_PARTS * TILE_STEPS * LANES * sizeof(uint2);

/* Pieces of 16 tokens by COLS columns, rows 16 bytes apart from where banks would meet. A CREW of the block's warps has a ring
 * of DEPTH pieces each, the last two of a piece less: what multiprocessors of 100 KB hold, and what fits beside a LEFT kernel
 * (device.cuh). */
template <int DTYPE> struct tile_kind {
    static constexpr int BYTES = DTYPE == KV_F32 ? 4 : DTYPE == KV_BF16 ? 2 : 1, COLS = DTYPE == KV_F32 ? 128 : 256;
    static constexpr int PIECES = TILE_DIM / COLS, STEPS = COLS / 16; /* of keys, or values; tensor-core steps of one */
    static constexpr int ROW = COLS * BYTES, PITCH = ROW + 16, PIECE = TILE_TOKENS * PITCH;
    static constexpr int CREW = DTYPE == KV_F32 ? 3 : 4, DEPTH = DTYPE == KV_F32 ? 4 : DTYPE == KV_BF16 ? 3 : 5;
    static constexpr int RINGS = (CREW * DEPTH - 2) * PIECE; /* bytes of all */

    /* Where a warp's ring begins. */
    static __device__ __forceinline__ int begin(int warp)
    {
        return (warp * (DEPTH - 1) + (warp < CREW - 2 ? warp : CREW - 2)) * PIECE;
    }

    static_assert(DEPTH >= 2 * PIECES, "the first tile lies in the ring as a whole");
    static_assert((DEPTH - 1) * PIECE >= TILE_HEADS * TILE_SIZE * (int)sizeof(float), "what a warp leaves fits");
};

/* What a block looks at: tiles [first, last), tokens below end, of which those below copied are in the cache. */
struct kv_tiles {
    const uint8_t *keys, *values; /* of the kv head */
    const int *pages;             /* of the sequence */
    int line;                     /* bytes of a token's heads */
    int first, last, end, copied;
};

/* The ring of a warp of the crew: pieces of its tiles, keys then values. It is filled by the warp FILLERS further on, since
 * asking for a row at a time takes as long as multiplying it; before 9.0 by the warp itself. */
constexpr int FILLERS = WARPS / 2;
template <int DTYPE> struct kv_ring {
    using kind = tile_kind<DTYPE>;

    uint64_t *full, *empty;
    uint32_t begin, phases; /* phases: a bit a slot, of the barrier that this warp waits for */
    int owner, depth, slot, done, ask_slot, asked, pieces;
    bool takes, fills;

    __device__ __forceinline__ kv_ring(uint8_t *rings, uint64_t (*barriers)[kind::CREW * kind::DEPTH])
    {
        int warp = threadIdx.x / LANES;
        owner = warp % FILLERS;
        takes = warp < kind::CREW;
#if __CUDA_ARCH__ >= 900
        fills = warp >= FILLERS && owner < kind::CREW;
#else
        fills = takes;
#endif
        full = barriers[0] + owner * kind::DEPTH;
        empty = barriers[1] + owner * kind::DEPTH;
        begin = shared_at(rings) + kind::begin(owner);
        depth = kind::DEPTH - (owner >= kind::CREW - 2);
        phases = 0;
    }

    /* The block's tiles, from the ring's begin on; all that was asked for has come. Asks for as much as the ring holds. */
    __device__ __forceinline__ void start(const kv_tiles &from)
    {
        int tiles = from.last - from.first - owner;
        pieces = tiles <= 0 ? 0 : (tiles + kind::CREW - 1) / kind::CREW * 2 * kind::PIECES;
        asked = slot = done = ask_slot = 0;
#pragma unroll 1
        for (int i = 0; fills && i < depth; i++) ask(from);
    }

    __device__ __forceinline__ void ask(const kv_tiles &from)
    {
        if (asked < pieces) {
            int lane = threadIdx.x % LANES, number = asked % (2 * kind::PIECES);
            int token = (from.last - 1 - owner - asked / (2 * kind::PIECES) * kind::CREW) * TILE_TOKENS;
            int rows = from.copied - token < TILE_TOKENS ? from.copied - token : TILE_TOKENS;
            const uint8_t *at = (number < kind::PIECES ? from.keys : from.values) + number % kind::PIECES * kind::ROW +
                                ((int64_t)from.pages[token / KV_PAGE] * KV_PAGE + token % KV_PAGE) * from.line;
            uint32_t to = begin + ask_slot * kind::PIECE;
#if __CUDA_ARCH__ >= 900
            if (lane == 0) barrier_expect(full + ask_slot, rows * kind::ROW);
            __syncwarp();
            if (lane < rows) copy_bulk(to + lane * kind::PITCH, at + (int64_t)lane * from.line, kind::ROW, full + ask_slot);
#else
#pragma unroll 1
            for (int r = 0; r < rows; r++)
                if (lane * 16 < kind::ROW) copy_async16(to + r * kind::PITCH + lane * 16, at + (int64_t)r * from.line + lane * 16, true);
#endif
        }
#if __CUDA_ARCH__ < 900
        copy_commit();
#endif
        asked++;
        ask_slot = ask_slot == depth - 1 ? 0 : ask_slot + 1;
    }

    /* The rest, as pieces are given back. */
    __device__ __forceinline__ void fill(const kv_tiles &from)
    {
#if __CUDA_ARCH__ >= 900
#pragma unroll 1
        while (asked < pieces) {
            barrier_wait(empty + ask_slot, phases >> ask_slot & 1);
            phases ^= 1u << ask_slot;
            ask(from);
        }
#endif
    }

    /* Waits for the next piece. */
    __device__ __forceinline__ uint32_t take()
    {
#if __CUDA_ARCH__ >= 900
        barrier_wait(full + slot, phases >> slot & 1);
        phases ^= 1u << slot;
#else
        copy_wait<kind::DEPTH - 2>();
        __syncwarp();
#endif
        return begin + slot * kind::PIECE;
    }

    /* The piece taken is not needed any more. */
    __device__ __forceinline__ void give(const kv_tiles &from)
    {
        __syncwarp();
#if __CUDA_ARCH__ >= 900
        if (done + depth < pieces && threadIdx.x % LANES == 0) barrier_arrive(empty + slot);
#else
        ask(from);
#endif
        done++;
        slot = slot == depth - 1 ? 0 : slot + 1;
    }
};

/* Where column c of the last token in a ring's first pieces lies: its warp's first tile. */
template <int DTYPE> __device__ __forceinline__ int own_byte(int row, int c)
{
    using kind = tile_kind<DTYPE>;
    return c / kind::COLS * kind::PIECE + row * kind::PITCH + c % kind::COLS * kind::BYTES;
}

/* Rows of values that no token has, zeros: of the block that has the last token, by all its threads. */
template <int DTYPE> __device__ __forceinline__ void place_padding(uint8_t *rings, int end)
{
    using kind = tile_kind<DTYPE>;
    constexpr int EACH = kind::ROW / 16;
    int used = (end - 1) % TILE_TOKENS + 1, rows = TILE_TOKENS - used;
#pragma unroll 1
    for (int i = threadIdx.x; i < kind::PIECES * rows * EACH; i += THREADS) {
        int row = i / EACH;
        uint8_t *at = rings + (kind::PIECES + row / rows) * kind::PIECE + (used + row % rows) * kind::PITCH + i % EACH * 16;
        *(uint4 *)at = make_uint4(0, 0, 0, 0);
    }
}

/* Lane 4 g + t: of heads 2 t and 2 t + 1, columns 16 m + g and + 8; of FP8 16 m + 2 g and + 1. */
struct tile_running {
    float top[2], sum[2], value[TILE_STEPS][4];

    /* To [head][columns, maximum, sum]. */
    template <int DTYPE> __device__ __forceinline__ void leave(float *to) const
    {
        int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
        to += 2 * t * TILE_SIZE;
#pragma unroll
        for (int m = 0; m < TILE_STEPS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                to[i % 2 * TILE_SIZE + 16 * m + (DTYPE == KV_FP8 ? 2 * g + i / 2 : g + i / 2 * 8)] = value[m][i];
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (g == 0) to[h * TILE_SIZE + TILE_DIM] = top[h], to[h * TILE_SIZE + TILE_DIM + 1] = sum[h];
    }
};

/* Two numbers as three pairs. */
__device__ __forceinline__ void three_parts(uint32_t (&part)[TILE_PARTS], float x, float y)
{
    part[0] = pack(x, y);
    float2 h = unpack(part[0]), rest = make_float2(x - h.x, y - h.y);
    part[1] = pack(rest.x, rest.y);
    float2 m = unpack(part[1]);
    part[2] = pack(rest.x - m.x, rest.y - m.y);
}

/* A query as operands of head `head`, by a warp whose lane has every 32nd column: [part][step][lane], lane 4 g + t columns
 * 16 step + 2 t, + 1, and + 8, + 9, of head g; of f32 and FP8 4 t, + 1, and + 2, + 3. */
template <int DTYPE> __device__ __forceinline__ void place_query(uint32_t *operands, const float (&v)[TILE_DIM / LANES], int head)
{
    int lane = threadIdx.x % LANES, odd = lane % 2, e = lane % 16;
    int t = DTYPE == KV_BF16 ? e % 8 / 2 : e / 4, half = DTYPE == KV_BF16 ? e / 8 : e % 4 / 2;
    uint32_t *to = operands + ((2 * odd + lane / 16) * LANES + 4 * head + t) * 2 + half;
#pragma unroll
    for (int i = 0; i < TILE_DIM / LANES; i += 2) { /* even lanes make pairs of v[i], odd ones of v[i + 1] */
        float other = __shfl_xor_sync(ALL, odd ? v[i] : v[i + 1], 1);
        uint32_t part[TILE_PARTS];
        three_parts(part, odd ? other : v[i], odd ? v[i + 1] : other);
#pragma unroll
        for (int p = 0; p < TILE_PARTS; p++) to[(p * TILE_STEPS + 2 * i) * LANES * 2] = part[p];
    }
}

/* Two bytes of a word of E4M3, as BF16; take: their places for __byte_perm. */
__device__ __forceinline__ uint32_t fp8_two(uint32_t word, int take)
{
    uint32_t t = __byte_perm(word, 0, take);
    return bf16_pair_product((t & 0x80008000u) | (t >> 4 & 0x07f007f0u), bf16_pair(0x1p120f));
}

/* Products of f32 numbers: those of parts that count. */
__device__ __forceinline__ void mma_parts(float (&high)[4], float (&middle)[4], float (&low)[4],
                                          const uint32_t (&a)[4][TILE_PARTS], const uint32_t (&b)[TILE_PARTS][2])
{
    mma(high, a[0][0], a[1][0], a[2][0], a[3][0], b[0][0], b[0][1]);
    mma(middle, a[0][0], a[1][0], a[2][0], a[3][0], b[1][0], b[1][1]);
    mma(low, a[0][0], a[1][0], a[2][0], a[3][0], b[2][0], b[2][1]);
    mma(middle, a[0][1], a[1][1], a[2][1], a[3][1], b[0][0], b[0][1]);
    mma(low, a[0][1], a[1][1], a[2][1], a[3][1], b[1][0], b[1][1]);
    mma(low, a[0][2], a[1][2], a[2][2], a[3][2], b[0][0], b[0][1]);
}

/* Adds a piece of keys to scores of 16 tokens: lane 4 g + t tokens g (two) and g + 8 (two) of heads 2 t, 2 t + 1. */
template <int DTYPE>
__device__ __forceinline__ void score_piece(float (&part)[TILE_PARTS][4], uint32_t place, const uint8_t *shared,
                                            const uint2 *operands)
{
    using kind = tile_kind<DTYPE>;
    int lane = threadIdx.x % LANES;
#pragma unroll 4
    for (int i = 0; i < kind::STEPS; i++) {
        uint2 q[TILE_PARTS];
#pragma unroll
        for (int p = 0; p < TILE_PARTS; p++) q[p] = operands[(p * TILE_STEPS + i) * LANES + lane];
        if constexpr (DTYPE == KV_F32) {
            const uint8_t *from = shared + lane / 4 * kind::PITCH + (16 * i + lane % 4 * 4) * 4;
            float4 x = *(const float4 *)from, y = *(const float4 *)(from + 8 * kind::PITCH);
            uint32_t k[4][TILE_PARTS], b[TILE_PARTS][2];
            three_parts(k[0], x.x, x.y);
            three_parts(k[1], y.x, y.y);
            three_parts(k[2], x.z, x.w);
            three_parts(k[3], y.z, y.w);
#pragma unroll
            for (int p = 0; p < TILE_PARTS; p++) b[p][0] = q[p].x, b[p][1] = q[p].y;
            mma_parts(part[0], part[1], part[2], k, b);
        } else {
            uint32_t k[4];
            if constexpr (DTYPE == KV_BF16) {
                matrices(k, place + lane % 16 * kind::PITCH + (2 * i + lane / 16) * 16);
            } else {
                uint32_t x, y;
                two_matrices(x, y, place + lane % 16 * kind::PITCH + i * 16);
                k[0] = fp8_two(x, 0x1404), k[1] = fp8_two(y, 0x1404), k[2] = fp8_two(x, 0x3424), k[3] = fp8_two(y, 0x3424);
            }
#pragma unroll
            for (int p = 0; p < TILE_PARTS; p++) mma(part[p], k[0], k[1], k[2], k[3], q[p].x, q[p].y);
        }
    }
}

/* Adds the shares of 16 tokens, of which n are there; values have to be multiplied by keep. */
__device__ __forceinline__ void see_tile(tile_running &r, uint32_t (&share)[TILE_PARTS][2], float (&keep)[2],
                                         const float (&part)[TILE_PARTS][4], int n)
{
    float score[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        score[i] = (int)threadIdx.x % LANES / 4 + i / 2 * 8 < n ? (part[0][i] + part[1][i] + part[2][i]) * (1.0f / 16) : -INFINITY;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = fmaxf(score[h], score[2 + h]);
        for (int o = 4; o < LANES; o *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        top = fmaxf(top, r.top[h]);
        keep[h] = r.top[h] == -INFINITY ? 1 : expf(r.top[h] - top); /* nothing to keep yet */
        r.top[h] = top;
        score[h] = expf(score[h] - top);
        score[2 + h] = expf(score[2 + h] - top);
        r.sum[h] = fmaf(r.sum[h], keep[h], score[h] + score[2 + h]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t three[TILE_PARTS];
        three_parts(three, score[2 * half], score[2 * half + 1]);
#pragma unroll
        for (int p = 0; p < TILE_PARTS; p++) share[p][half] = turned(three[p]);
    }
}

/* Adds a piece of values, of columns from 16 M on. */
template <int DTYPE, int M>
__device__ __forceinline__ void add_values(tile_running &r, uint32_t place, const uint8_t *shared,
                                           const uint32_t (&share)[TILE_PARTS][2])
{
    using kind = tile_kind<DTYPE>;
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int m = 0; m < kind::STEPS; m++) {
        if constexpr (DTYPE == KV_F32) {
            const float *from = (const float *)(shared + lane % 4 * 2 * kind::PITCH) + 16 * m + lane / 4;
            constexpr int TOKEN = kind::PITCH / 4;
            uint32_t v[4][TILE_PARTS];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *x = from + i / 2 * 8 * TOKEN + i % 2 * 8;
                three_parts(v[i], x[0], x[TOKEN]);
            }
            mma_parts(r.value[M + m], r.value[M + m], r.value[M + m], v, share);
        } else if constexpr (DTYPE == KV_BF16) {
            uint32_t v[4];
            matrices_turned(v, place + (lane / 16 * 8 + lane % 8) * kind::PITCH + (2 * m + lane / 8 % 2) * 16);
#pragma unroll
            for (int p = 0; p < TILE_PARTS; p++) mma(r.value[M + m], v[0], v[1], v[2], v[3], share[p][0], share[p][1]);
        } else {
            uint32_t x, y;
            two_matrices_turned(x, y, place + lane % 16 * kind::PITCH + m * 16);
            uint32_t v[4] = { fp8_two(x, 0x2404), fp8_two(x, 0x3414), fp8_two(y, 0x2404), fp8_two(y, 0x3414) };
#pragma unroll
            for (int p = 0; p < TILE_PARTS; p++) mma(r.value[M + m], v[0], v[1], v[2], v[3], share[p][0], share[p][1]);
        }
    }
}

/* A warp's tiles; its ring has been started. */
template <int DTYPE>
__device__ __forceinline__ void attend_tiles(tile_running &r, kv_ring<DTYPE> &ring, const uint2 *operands, const kv_tiles &from)
{
    using kind = tile_kind<DTYPE>;
    r = tile_running{};
    r.top[0] = r.top[1] = -INFINITY;
#pragma unroll 1
    for (int tile = from.last - 1 - (int)threadIdx.x / LANES; tile >= from.first; tile -= kind::CREW) {
        float part[TILE_PARTS][4] = {}, keep[2];
        uint32_t share[TILE_PARTS][2];
#pragma unroll 1
        for (int i = 0; i < kind::PIECES; i++) {
            uint32_t place = ring.take();
            score_piece<DTYPE>(part, place, (const uint8_t *)__cvta_shared_to_generic(place), operands + i * kind::STEPS * LANES);
            ring.give(from);
        }
        see_tile(r, share, keep, part, from.end - tile * TILE_TOKENS);
        if (__any_sync(ALL, keep[0] != 1 || keep[1] != 1))
#pragma unroll
            for (int m = 0; m < TILE_STEPS; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) r.value[m][i] *= keep[i % 2];
        uint32_t place = ring.take();
        add_values<DTYPE, 0>(r, place, (const uint8_t *)__cvta_shared_to_generic(place), share);
        ring.give(from);
        if constexpr (kind::PIECES == 2) {
            place = ring.take();
            add_values<DTYPE, kind::STEPS>(r, place, (const uint8_t *)__cvta_shared_to_generic(place), share);
            ring.give(from);
        }
    }
    for (int o = 4; o < LANES; o *= 2)
        for (int h = 0; h < 2; h++) r.sum[h] += __shfl_xor_sync(ALL, r.sum[h], o);
}

} /* namespace */
#endif
