/* Maps of matrices, made by the driver, whose function is found by name. */
#include "backend/cuda/tensor_map.h"
#include <cuda_runtime_api.h>

typedef CUresult encode(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                        const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                        CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

void *tensor_map_maker(void)
{
    enum { VERSION = 12000 };
    void *maker = NULL;
    enum cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &maker, VERSION, cudaEnableDefault,
                                         &found) == cudaSuccess &&
        found == cudaDriverEntryPointSuccess)
        return maker;
    cudaGetLastError();
    return NULL;
}

static bool map(void *maker, CUtensorMap *out, CUtensorMapDataType type, const void *data,
                const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                CUtensorMapSwizzle swizzle)
{
    cuuint32_t step[2] = { 1, 1 };
    return maker &&
           (*(encode **)&maker)(out, type, 2, (void *)(uintptr_t)data, size, stride, box, step,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool tensor_map(void *maker, CUtensorMap *out, const void *data, int64_t rows, int64_t cols, int64_t pitch,
                int box_rows)
{
    enum { BOX_COLS = 64, BYTES = 2 };
    cuuint64_t size[2] = { (cuuint64_t)cols, (cuuint64_t)rows }, stride[1] = { (cuuint64_t)(pitch * BYTES) };
    cuuint32_t box[2] = { BOX_COLS, (cuuint32_t)box_rows };
    return map(maker, out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, size, stride, box,
               CU_TENSOR_MAP_SWIZZLE_128B);
}

bool tensor_map_words(void *maker, CUtensorMap *out, const void *data, int64_t rows, int64_t cols,
                      int box_rows, int box_cols)
{
    enum { BYTES = 8 };
    cuuint64_t size[2] = { (cuuint64_t)cols, (cuuint64_t)rows }, stride[1] = { (cuuint64_t)(cols * BYTES) };
    cuuint32_t box[2] = { (cuuint32_t)box_cols, (cuuint32_t)box_rows };
    return map(maker, out, CU_TENSOR_MAP_DATA_TYPE_INT64, data, size, stride, box,
               CU_TENSOR_MAP_SWIZZLE_NONE);
}
