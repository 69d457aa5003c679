/* Copies of a mapped matrix's boxes that arrive at a barrier (compute capability 9.0). */
#ifndef BACKEND_CUDA_TENSOR_MAP_CUH
#define BACKEND_CUDA_TENSOR_MAP_CUH
#include "backend/cuda/barrier.cuh"
#include "backend/cuda/tensor_map.h"

#if __CUDA_ARCH__ >= 900
namespace {

/* The box of 64 columns from `column` on whose first row is `row`. Piece i of shared memory's line of 128 bytes l is that of
 * place i ^ l % 8, wherever `to` lies, a multiple of 128. */
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap &map, int column, int row, uint64_t *b)
{
    copy_tensor(to, &map, column, row, b);
}

} /* namespace */
#endif
#endif
