/* Attention of few rows over BF16 heads of 256 on the tensor cores, for up to eight query heads of a kv head.
 *
 * A warp takes 16 tokens at a time: their keys through its place in shared memory, then their values through the same place.
 * Scores are keys (16 tokens) times queries (eight heads), values are turned (16 columns) times shares (eight
 * heads); queries and shares are exact sums of three BF16 numbers. */
#ifndef BACKEND_CUDA_ATTENTION_TILES_CUH
#define BACKEND_CUDA_ATTENTION_TILES_CUH
#include "backend/cuda/matrices.cuh"
#include "backend/cuda/stream.cuh"

namespace {

constexpr int TILE_HEADS = 8, TILE_TOKENS = 16, TILE_DIM = HEAD_MAX, TILE_ROW = TILE_DIM * 2; /* bytes */
constexpr int TILE_STEPS = TILE_DIM / 16, TILE_PARTS = 3, TILE_PLACE = TILE_TOKENS * TILE_ROW;
constexpr size_t TILES_SHARED = WARPS * TILE_PLACE + TILE_PARTS * TILE_STEPS * LANES * sizeof(uint2);
static_assert(TILES_SHARED >= WARPS * TILE_HEADS * (TILE_DIM + 2) * sizeof(float), "what warps leave fits");

struct kv_tiles {
    const __nv_bfloat16 *keys, *values;
    const int *pages; /* of the sequence */
    int n_kv_heads, kv_head;

    /* Token's line of the kv head; 16 tokens from a multiple of 16 on are in one page. */
    __device__ __forceinline__ int64_t line(int token) const
    {
        return (((int64_t)pages[token / KV_PAGE] * KV_PAGE + token % KV_PAGE) * n_kv_heads + kv_head) * TILE_DIM;
    }
};

/* Lane 4 g + t: of heads 2 t and 2 t + 1, columns 16 m + g and + 8. */
struct tile_running {
    float top[2], sum[2], value[TILE_STEPS][4];

    /* To [warp][head][columns, maximum, sum]. */
    __device__ __forceinline__ void leave(float *meeting) const
    {
        constexpr int SIZE = TILE_DIM + 2;
        int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
        float *to = meeting + (threadIdx.x / LANES * TILE_HEADS + 2 * t) * SIZE;
#pragma unroll
        for (int m = 0; m < TILE_STEPS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) to[i % 2 * SIZE + 16 * m + g + i / 2 * 8] = value[m][i];
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (g == 0) to[h * SIZE + TILE_DIM] = top[h], to[h * SIZE + TILE_DIM + 1] = sum[h];
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

/* The queries [n][TILE_DIM] as operands: [part][step][lane], lane 4 g + t columns 16 step + 2 t, + 1, and + 8,
 * + 9, of head g. */
__device__ __forceinline__ void place_queries(uint2 *operands, const float *queries, int n)
{
    for (int i = threadIdx.x; i < TILE_STEPS * LANES; i += THREADS) {
        int g = i % LANES / 4, c = i / LANES * 16 + i % 4 * 2;
        const float *q = queries + g * TILE_DIM + c;
        uint32_t low[TILE_PARTS] = {}, high[TILE_PARTS] = {};
        if (g < n) {
            three_parts(low, q[0], q[1]);
            three_parts(high, q[8], q[9]);
        }
        for (int p = 0; p < TILE_PARTS; p++) operands[p * TILE_STEPS * LANES + i] = make_uint2(low[p], high[p]);
    }
}

/* Byte of 16 columns of a token in a warp's place. */
__device__ __forceinline__ uint32_t tile_byte(int token, int piece)
{
    return token * TILE_ROW + (piece ^ (token & 7)) * 16;
}

/* n lines, the last of them again in the place of those that are missing. */
__device__ __forceinline__ void copy_lines(uint32_t place, const __nv_bfloat16 *from, int64_t stride, int n)
{
    int lane = threadIdx.x % LANES;
#pragma unroll 8
    for (int r = 0; r < TILE_TOKENS; r++)
        copy_async16(place + tile_byte(r, lane), from + (r < n ? r : n - 1) * stride + lane * 8, true);
    copy_commit();
}

/* 8 x 8 BF16 numbers, turned. */
__device__ __forceinline__ uint32_t turned(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* Scores of 16 tokens: lane 4 g + t tokens g (two) and g + 8 (two) of heads 2 t, 2 t + 1. */
__device__ __forceinline__ void score_tile(float (&score)[4], uint32_t place, const uint2 *operands, int n)
{
    float part[TILE_PARTS][4] = {};
    int lane = threadIdx.x % LANES;
#pragma unroll 4
    for (int i = 0; i < TILE_STEPS; i++) {
        uint32_t k[4];
        matrices(k, place + tile_byte(lane % 16, 2 * i + lane / 16));
#pragma unroll
        for (int p = 0; p < TILE_PARTS; p++) {
            uint2 q = operands[(p * TILE_STEPS + i) * LANES + lane];
            mma(part[p], k[0], k[1], k[2], k[3], q.x, q.y);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        score[i] = lane / 4 + i / 2 * 8 < n ? (part[0][i] + part[1][i] + part[2][i]) * (1.0f / 16) : -INFINITY;
}

/* Adds the shares of 16 tokens, and what values have to be multiplied by goes to keep. */
__device__ __forceinline__ void see_tile(tile_running &r, uint32_t (&share)[TILE_PARTS][2], float (&keep)[2], float (&score)[4])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = fmaxf(score[h], score[2 + h]);
        for (int o = 4; o < LANES; o *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
        top = fmaxf(top, r.top[h]);
        keep[h] = expf(r.top[h] - top);
        r.top[h] = top;
        score[h] = expf(score[h] - top);
        score[2 + h] = expf(score[2 + h] - top);
        r.sum[h] = fmaf(r.sum[h], keep[h], score[h] + score[2 + h]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t part[TILE_PARTS];
        three_parts(part, score[2 * half], score[2 * half + 1]);
#pragma unroll
        for (int p = 0; p < TILE_PARTS; p++) share[p][half] = turned(part[p]);
    }
}

__device__ __forceinline__ void add_values(tile_running &r, uint32_t place, const uint32_t (&share)[TILE_PARTS][2])
{
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int m = 0; m < TILE_STEPS; m++) {
        uint32_t v[4];
        matrices_turned(v, place + tile_byte(lane / 16 * 8 + lane % 8, 2 * m + lane / 8 % 2));
#pragma unroll
        for (int p = 0; p < TILE_PARTS; p++) mma(r.value[m], v[0], v[1], v[2], v[3], share[p][0], share[p][1]);
    }
}

/* Tokens [begin, end), begin a multiple of 16, dealt out to the warps of a block 16 at a time. Shared memory: a place a warp,
 * then operands. */
__device__ __forceinline__ void attend_tiles(tile_running &r, uint8_t *shared, const float *queries, int n, const kv_tiles &from,
                                             int begin, int end)
{
    uint2 *operands = (uint2 *)(shared + WARPS * TILE_PLACE);
    uint32_t place = (uint32_t)__cvta_generic_to_shared(shared) + threadIdx.x / LANES * TILE_PLACE;
    int64_t stride = (int64_t)from.n_kv_heads * TILE_DIM;
    r = tile_running{};
    r.top[0] = r.top[1] = -INFINITY;
    place_queries(operands, queries, n);
    __syncthreads();
#pragma unroll 1
    for (int token = begin + threadIdx.x / LANES * TILE_TOKENS; token < end; token += WARPS * TILE_TOKENS) {
        int tokens = end - token < TILE_TOKENS ? end - token : TILE_TOKENS;
        int64_t line = from.line(token);
        float score[4], keep[2];
        uint32_t share[TILE_PARTS][2];
        copy_lines(place, from.keys + line, stride, tokens);
        copy_wait<0>();
        __syncwarp();
        score_tile(score, place, operands, tokens);
        __syncwarp();
        copy_lines(place, from.values + line, stride, tokens);
        see_tile(r, share, keep, score);
        if (__any_sync(ALL, keep[0] != 1 || keep[1] != 1))
#pragma unroll
            for (int m = 0; m < TILE_STEPS; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) r.value[m][i] *= keep[i % 2];
        copy_wait<0>();
        __syncwarp();
        add_values(r, place, share);
        __syncwarp();
    }
    for (int o = 4; o < LANES; o *= 2)
        for (int h = 0; h < 2; h++) r.sum[h] += __shfl_xor_sync(ALL, r.sum[h], o);
}

} /* namespace */
#endif
