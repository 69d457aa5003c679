/* The router's choice of a row, by a warp. */
#ifndef BACKEND_CUDA_ROUTE_CUH
#define BACKEND_CUDA_ROUTE_CUH
#include "backend/cuda/device.cuh"

namespace
{

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

/* As choose(), of no more than FEW * LANES logits and picks than lanes. A lane has FEW that follow one
 * another and sorts them, the largest first, of equal ones the one that stands first; so a round looks at
 * every lane's first, and the first lane that has the best moves up. */
constexpr int FEW = 8;
__device__ __forceinline__ void choose_few(int *expert, float *weight, const float *logits, int n, int k)
{
    int lane = threadIdx.x % LANES, first = lane * FEW, at[FEW];
    uint32_t key[FEW], best = 0, own = 0, before = (1u << lane) - 1;
    float x[FEW] = {};
    if (n % FEW == 0 && ((size_t)logits & 15) == 0) {
        if (first < n) {
            float4 low = __ldcg((const float4 *)(logits + first)),
                   high = __ldcg((const float4 *)(logits + first) + 1);
            x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
            x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < FEW; i++)
            if (first + i < n) x[i] = __ldcg(logits + first + i);
    }
#pragma unroll
    for (int i = 0; i < FEW; i++) {
        at[i] = first + i;
        key[i] = at[i] < n ? ordered(x[i]) : 0;
    }
#pragma unroll
    for (int round = 0; round < FEW; round++)
#pragma unroll
        for (int i = round % 2; i + 1 < FEW; i += 2) {
            bool swap = key[i] < key[i + 1];
            uint32_t larger = max(key[i], key[i + 1]);
            int larger_at = swap ? at[i + 1] : at[i];
            key[i + 1] = min(key[i], key[i + 1]);
            at[i + 1] = swap ? at[i] : at[i + 1];
            key[i] = larger;
            at[i] = larger_at;
        }
#pragma unroll 1
    for (int j = 0; j < k; j++) {
        uint32_t top = __reduce_max_sync(ALL, key[0]), holders = __ballot_sync(ALL, key[0] == top);
        bool mine = key[0] == top && !(holders & before);
        if (j == 0) best = top;
        if (lane == j) own = top;
        if (mine) expert[j] = top ? at[0] : n - 1; /* 0: not one number among what is left */
#pragma unroll
        for (int i = 0; i + 1 < FEW; i++) {
            key[i] = mine ? key[i + 1] : key[i];
            at[i] = mine ? at[i + 1] : at[i];
        }
        if (mine) key[FEW - 1] = 0;
    }
    __syncwarp();
    if (!weight) return;
    float y = expf(unordered(own) - unordered(best)), sum = 0;
#pragma unroll 8
    for (int j = 0; j < k; j++) sum += __shfl_sync(ALL, y, j);
    if (lane < k) weight[lane] = y / sum;
    __syncwarp();
}

/* The k largest of n logits by one warp, of equal ones the first. keys: room for n. weight NULL: not wanted.
 */
__device__ __forceinline__ void choose(int *expert, float *weight, uint32_t *keys, const float *logits, int n,
                                       int k)
{
    constexpr int EACH = 8;
    int lane = threadIdx.x % LANES;
    if (n <= FEW * LANES && k <= LANES) {
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
        if (at % LANES == lane) {
            keys[at] = 0;
            expert[j] = at;
            if (weight) weight[j] = x;
        }
    }
    __syncwarp();
    for (int j = lane; weight && j < k; j += LANES) weight[j] = weight[j] / sum;
    __syncwarp();
}

} /* namespace */
#endif
