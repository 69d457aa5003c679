/* One instruction of FP4 tensor cores, or on devices without them the same numbers from the same fragments.
 *
 * d += (a sa) (b sb). a: 16 rows of activations x 64 columns, b: 64 x 8 rows of weights, both E2M1; sa and sb: an unsigned
 * E4M3 scale for each 16 columns of a row. Lane 4 g + t holds, eight codes a word, the first in the low four bits:
 *   a[0]: row g, columns 8 t + 0..7;  a[1]: row g + 8;  a[2], a[3]: the same rows, columns 32 + 8 t + 0..7
 *   b[0]: row g of the weights, columns 8 t + 0..7;  b[1]: columns 32 + 8 t + 0..7
 *   sa: four scales of row g where t is even, of row g + 8 where it is odd;  sb: four of the weights' row g
 *   d: as of mma (device.cuh): d[0], d[1] row g, weights' rows 2 t and 2 t + 1; d[2], d[3] row g + 8
 * Source: PTX ISA, mma with block scaling, .kind::mxf4nvf4 .scale_vec::4X, m16n8k64. Both id pairs are 0: the scales come
 * from lanes t = 0 and 1 of a, t = 0 of b.
 *
 * Without the instruction a group of 16 products is summed exactly, as an integer, and the four groups are added in f32 in
 * order; what the hardware keeps between groups is not documented, so the two may differ in the last bits. */
#ifndef BACKEND_CUDA_FP4_MMA_CUH
#define BACKEND_CUDA_FP4_MMA_CUH
#include "backend/cuda/device.cuh"

namespace {

#ifdef __CUDA_ARCH_FEAT_SM120_ALL

__device__ __forceinline__ void mma_fp4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t sa, uint32_t sb)
{
    asm("mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {%12, %12}, {%11}, {%12, %12};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(sa), "r"(sb), "h"((uint16_t)0));
}

#else

/* Twice the values of four codes, in bytes: those of the low or the high half of a word of eight. */
__device__ __forceinline__ uint32_t fp4_bytes_of(uint32_t codes)
{
    uint32_t size = __byte_perm(0x03020100, 0x0c080604, codes & 0x7777);
    uint32_t spread = __byte_perm(codes, 0, 0x1100), minus = (spread & 0x00080008u) << 4 | (spread & 0x80008000u);
    minus = (minus >> 7 & 0x1010101u) * 255u;
    return __vsub4(size ^ minus, minus);
}

/* The sum of eight products, times four. */
__device__ __forceinline__ int fp4_dot(uint32_t x, uint32_t y, int sum)
{
    sum = __dp4a((int)fp4_bytes_of(x), (int)fp4_bytes_of(y), sum);
    return __dp4a((int)fp4_bytes_of(x >> 16), (int)fp4_bytes_of(y >> 16), sum);
}

__device__ __forceinline__ void mma_fp4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t sa, uint32_t sb)
{
    int lane = threadIdx.x % LANES, quad = lane & ~3, column = lane % 4 * 8;
    uint32_t scale_x[2], scale_y[2];
    for (int i = 0; i < 2; i++) {
        scale_x[i] = __shfl_sync(ALL, sa, quad + i);
        scale_y[i] = __shfl_sync(ALL, sb, column + 4 * i);
    }
#pragma unroll
    for (int group = 0; group < 4; group++) {
        int half = group / 2, dot[4] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int from = group % 2 * 2 + i;
            uint32_t x[2], y[2];
            for (int k = 0; k < 2; k++) {
                x[k] = __shfl_sync(ALL, a[2 * half + k], quad + from);
                y[k] = __shfl_sync(ALL, b[half], column + 4 * k + from);
            }
            for (int k = 0; k < 4; k++) dot[k] = fp4_dot(x[k / 2], y[k % 2], dot[k]);
        }
        for (int k = 0; k < 4; k++) {
            float scale = e4m3_value((uint8_t)(scale_x[k / 2] >> 8 * group)) * e4m3_value((uint8_t)(scale_y[k % 2] >> 8 * group));
            d[k] = fmaf(0.25f * (float)dot[k], scale, d[k]);
        }
    }
}

#endif

} /* namespace */
#endif
