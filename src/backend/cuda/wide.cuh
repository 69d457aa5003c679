/* How the wide tensor-core instruction of compute capability 9.0a (ptx.cuh) finds its matrices in shared memory: a group of four
 * warps multiplies 64 weight rows, in registers as mma() takes them, with N rows of activations there. */
#ifndef BACKEND_CUDA_WIDE_CUH
#define BACKEND_CUDA_WIDE_CUH
#include "backend/cuda/ptx.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace {

/* Of activations [N][64] BF16 at `at`, a multiple of 1024, in the 128-byte swizzle: piece i of row r at i ^ (r % 8). */
__device__ __forceinline__ uint64_t wide_matrix(uint32_t at)
{
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 16 | (at & 0x3ffff) >> 4;
}
constexpr int WIDE_STEP = 2; /* from a matrix to its next 16 columns */

/* Panels of 64 columns, each [rows][64] as wide_matrix has it, `panel` bytes apart; the product sums over rows. */
__device__ __forceinline__ uint64_t wide_turned(uint32_t at, int panel)
{
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)(panel >> 4) << 16 | (at & 0x3ffff) >> 4;
}

} /* namespace */
#endif
#endif
