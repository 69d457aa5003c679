/* Matrices on their way through shared memory to the tensor cores: asynchronous copies in, pieces of 8 x 8 BF16 out. */
#ifndef BACKEND_CUDA_MATRICES_CUH
#define BACKEND_CUDA_MATRICES_CUH
#include "backend/cuda/device.cuh"

namespace {

__device__ __forceinline__ uint32_t pair_of(float a, float b)
{
    __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&x);
}

} /* namespace */
#endif
