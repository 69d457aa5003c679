/* The router's choice of a row, by a warp. */
#ifndef BACKEND_CUDA_ROUTE_CUH
#define BACKEND_CUDA_ROUTE_CUH
#include "backend/cuda/device.cuh"

namespace
{

/* As choose(), of no more than FEW * LANES logits and picks than lanes; false: two logits that count are the
 * same number, so that their order is for choose(). A lane has FEW that follow one another and sorts them; a
 * round looks at every lane's largest, and the lane whose it is moves up. */
constexpr int FEW = 8;
__device__ __forceinline__ bool choose_few(int *expert, float *weight, const float *logits, int n, int k)
{
    /* Batcher's network */
    constexpr uint8_t low[] = { 0, 2, 4, 6, 0, 1, 4, 5, 1, 5, 0, 1, 2, 3, 2, 3, 1, 3, 5 },
                      high[] = { 1, 3, 5, 7, 2, 3, 6, 7, 2, 6, 4, 5, 6, 7, 4, 5, 2, 4, 6 };
    int lane = threadIdx.x % LANES, first = lane * FEW, at[FEW], claims = 0;
    uint32_t key[FEW], best = 0, own = 0, to = (uint32_t)__cvta_generic_to_shared(expert);
    float x[FEW] = {};
    now(to); /* once */
    if (n % FEW == 0 && ((size_t)logits & 15) == 0) {
        if (first < n) {
            float4 left = __ldcg((const float4 *)(logits + first)),
                   right = __ldcg((const float4 *)(logits + first) + 1);
            x[0] = left.x, x[1] = left.y, x[2] = left.z, x[3] = left.w;
            x[4] = right.x, x[5] = right.y, x[6] = right.z, x[7] = right.w;
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
    for (int i = 0; i < (int)sizeof low; i++) {
        uint32_t one = key[low[i]], other = key[high[i]];
        int one_at = at[low[i]], other_at = at[high[i]];
        bool swap = one < other;
        key[low[i]] = max(one, other);
        key[high[i]] = min(one, other);
        at[low[i]] = swap ? other_at : one_at;
        at[high[i]] = swap ? one_at : other_at;
    }
#pragma unroll 4
    for (int j = 0; j < k; j++) {
        uint32_t top = __reduce_max_sync(ALL, key[0]);
        bool mine = key[0] == top;
        claims += (mine ? 1 : 0) + (key[1] == top ? LANES * FEW : 0);
        key[0] = mine ? key[1] : key[0];
        if (mine) store_shared(to + 4 * j, at[0]);
        if (j == 0) best = top;
        if (lane == j) own = top;
        at[0] = mine ? at[1] : at[0];
#pragma unroll
        for (int i = 1; i + 1 < FEW; i++) {
            key[i] = mine ? key[i + 1] : key[i];
            at[i] = mine ? at[i + 1] : at[i];
        }
        if (mine) key[FEW - 1] = 0;
    }
    int claimed = __reduce_add_sync(ALL, claims);
    __syncwarp();
    if (claimed != k) return false;
    if (!weight) return true;
    float y = expf(unordered(own) - unordered(best)), sum = 0;
#pragma unroll 8
    for (int j = 0; j < k; j++) sum += __shfl_sync(ALL, y, j);
    if (lane < k) weight[lane] = y / sum;
    __syncwarp();
    return true;
}

/* The k largest of n logits by one warp, of equal ones the first. expert, and keys with room for n: in shared
 * memory. weight NULL: not wanted. */
__device__ __forceinline__ void choose(int *expert, float *weight, uint32_t *keys, const float *logits, int n,
                                       int k)
{
    constexpr int EACH = 8;
    int lane = threadIdx.x % LANES;
    if (n <= FEW * LANES && k <= LANES && choose_few(expert, weight, logits, n, k)) return;
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
