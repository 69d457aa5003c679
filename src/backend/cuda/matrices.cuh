/* What is laid into shared memory for the tensor cores; copies in and pieces of 8 x 8 BF16 out are in ptx.cuh. */
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
