/* What draws from rows of logits and from coarse products share. */
#ifndef BACKEND_CUDA_DRAW_CUH
#define BACKEND_CUDA_DRAW_CUH
#include "backend/cuda/device.cuh"
#include "num/draw.h"

namespace {

__device__ __forceinline__ bool allows(const uint32_t *allowed, int64_t c)
{
    return !allowed || (allowed[c / 32] >> c % 32 & 1);
}

/* Orders values, of equals the first column first; 0: not to be drawn. */
__device__ __forceinline__ unsigned long long key_of(float x, int64_t c)
{
    return x > -INFINITY ? (unsigned long long)ordered(x == 0 ? 0.0f : x) << 32 | (uint32_t)~c : 0;
}

__device__ __forceinline__ int column_of(unsigned long long key)
{
    return key ? (int)~(uint32_t)key : -1;
}

__device__ __forceinline__ unsigned long long warp_largest(unsigned long long key)
{
    for (int o = LANES / 2; o > 0; o /= 2) {
        unsigned long long other = __shfl_xor_sync(ALL, key, o);
        key = other > key ? other : key;
    }
    return key;
}

/* Whether this block is the last of its row; then what the others wrote can be read past the first cache. */
__device__ __forceinline__ bool is_last(unsigned *arrived)
{
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return last;
}

/* Of a row of a coarse product; zeros between draws, but for `done`. They lie behind all else that draws keep. */
struct coarse_best {
    unsigned long long key;
    unsigned arrived, found;
    unsigned done; /* the last draw had its token from what was found */
};

/* A token that may be drawn: its logit's bits or its place, and its number. */
struct token_place {
    uint32_t place, id;
};

inline coarse_best *coarse_of(const struct cuda_draw *d)
{
    return (coarse_best *)((char *)d->state + d->state_bytes) - COARSE_ROWS;
}

constexpr int NO_ANSWER = INT32_MIN;

/* Tells the host, which waits for it. */
__device__ __forceinline__ void answer(int *out, int id)
{
    *(volatile int *)out = id;
    __threadfence_system();
}

} /* namespace */
#endif
