/* The router's choice of a row, by a warp. */
#ifndef BACKEND_CUDA_ROUTE_CUH
#define BACKEND_CUDA_ROUTE_CUH
#include "backend/cuda/device.cuh"

namespace {

/* Larger floats as larger integers. */
__device__ uint32_t ordered(float x)
{
    uint32_t u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

__device__ float unordered(uint32_t u)
{
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

/* As choose(), of no more than FEW * LANES logits: they stay in registers. */
constexpr int FEW = 8;
__device__ __forceinline__ void choose_few(int *expert, float *weight, const float *logits, int n, int k)
{
    int lane = threadIdx.x % LANES;
    uint32_t key[FEW];
    float sum = 0, first = 0;
#pragma unroll
    for (int i = 0; i < FEW; i++) key[i] = lane + i * LANES < n ? ordered(__ldcg(logits + lane + i * LANES)) : 0;
#pragma unroll 1
    for (int j = 0; j < k; j++) {
        uint32_t best = max(max(max(key[0], key[1]), max(key[2], key[3])), max(max(key[4], key[5]), max(key[6], key[7])));
        uint32_t top = __reduce_max_sync(ALL, best), holders = __ballot_sync(ALL, best == top), mine = 0;
#pragma unroll
        for (int i = 0; i < FEW; i++) mine |= (uint32_t)(key[i] == top) << i;
        int at = lane + (__ffs(mine) - 1) * LANES;
        if (holders & (holders - 1))
            at = __reduce_min_sync(ALL, mine ? at : n);
        else
            at = __shfl_sync(ALL, at, __ffs(holders) - 1);
        if (top == 0) at = n - 1; /* not one number among what is left */
        float x = unordered(top);
        if (j == 0) first = x;
        x = expf(x - first);
        sum += x;
#pragma unroll
        for (int i = 0; i < FEW; i++) key[i] = at == lane + i * LANES ? 0 : key[i];
        if (lane == 0) expert[j] = at, weight[j] = x;
    }
    __syncwarp();
    for (int j = lane; j < k; j += LANES) weight[j] = weight[j] / sum;
    __syncwarp();
}

/* The k largest of n logits by one warp, of equal ones the first. keys: room for n. */
__device__ __forceinline__ void choose(int *expert, float *weight, uint32_t *keys, const float *logits, int n, int k)
{
    constexpr int EACH = 8;
    int lane = threadIdx.x % LANES;
    if (n <= FEW * LANES) {
        choose_few(expert, weight, logits, n, k);
        return;
    }
#pragma unroll 1
    for (int first = lane; first < n; first += EACH * LANES) {
        float x[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = first + i * LANES < n ? __ldcg(logits + first + i * LANES) : 0;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (first + i * LANES < n) keys[first + i * LANES] = ordered(x[i]);
    }
    float sum = 0, first = 0;
#pragma unroll 1
    for (int j = 0; j < k; j++) {
        uint32_t best = 0;
        int at = n;
#pragma unroll 4
        for (int c = lane; c < n; c += LANES) {
            uint32_t key = keys[c];
            if (key > best) best = key, at = c;
        }
        uint32_t top = __reduce_max_sync(ALL, best);
        at = __reduce_min_sync(ALL, best == top ? at : n);
        if (at >= n) at = n - 1; /* not one number among what is left */
        float x = unordered(top);
        if (j == 0) first = x;
        x = expf(x - first);
        sum += x;
        if (at % LANES == lane) keys[at] = 0, expert[j] = at, weight[j] = x;
    }
    __syncwarp();
    for (int j = lane; j < k; j += LANES) weight[j] = weight[j] / sum;
    __syncwarp();
}

} /* namespace */
#endif
