/* Rings in shared memory behind barriers, which are in ptx.cuh with the copies that arrive at them (compute capability 9.0). */
#ifndef BACKEND_CUDA_BARRIER_CUH
#define BACKEND_CUDA_BARRIER_CUH
#include "backend/cuda/ptx.cuh"

namespace {

/* A place in a ring, and how often it has come round. */
struct ring_place {
    int slot, phase;
    __device__ __forceinline__ void advance(int slots)
    {
        if (++slot == slots) slot = 0, phase ^= 1;
    }
};

} /* namespace */
#endif
