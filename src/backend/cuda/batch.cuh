/* Several rows at once past weights that are read once, with the sums of stream.cuh to the bit, for up to ROWS_EXACT rows on
 * compute capability 9.0a.
 *
 * A group of four warps multiplies 64 weight rows, sixteen a warp, decoded in registers, with all rows' inputs in shared
 * memory (wide.cuh). An output of that instruction is the same function of its weight row and its input as that of mma();
 * two accumulators take the columns that stream.cuh gives to each of its two, over the same share of the columns.
 *
 * Inputs. A panel is 64 columns of eight input rows, 1024 bytes, swizzled as wide_matrix says. An f32 row is in three panels,
 * as the three BF16 numbers it is the sum of; one rounded to E4M3 is in one. Columns lie in the order in which weights of a
 * format meet them: panel_place. */
#ifndef BACKEND_CUDA_BATCH_CUH
#define BACKEND_CUDA_BATCH_CUH
#include "backend/cuda/barrier.cuh"
#include "backend/cuda/batch.h"
#include "backend/cuda/stream.cuh"
#include "backend/cuda/wide.cuh"

namespace {

/* Blocks in clusters, `grid` of them in all. */
struct cluster_launch {
    cudaLaunchConfig_t c = {};
    cudaLaunchAttribute attributes[2] = {};

    cluster_launch(const struct queue *q, int size, unsigned grid, unsigned cluster, size_t shared)
    {
        c.gridDim = dim3(grid);
        c.blockDim = dim3((unsigned)size);
        c.dynamicSmemBytes = shared;
        c.stream = q->stream;
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim.x = cluster;
        attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
        c.attrs = attributes;
        c.numAttrs = cluster > 1 ? 2 : 1;
    }
    template <class... P> bool allow(struct queue *q, const char *operation, void (*kernel)(P...)) const
    {
        int shared = (int)c.dynamicSmemBytes;
        return queue_check(q, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), operation) &&
               queue_check(q, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), operation);
    }
    /* How many clusters the device runs at once: a cluster's multiprocessors are of one group, whose sizes differ. */
    template <class... P> int at_once(struct queue *q, const char *operation, void (*kernel)(P...))
    {
        int n = 0;
        return allow(q, operation, kernel) &&
                       queue_check(q, cudaOccupancyMaxActiveClusters(&n, (const void *)kernel, &c), operation)
                   ? n
                   : 0;
    }
    template <class... P, class... A> void start(struct queue *q, const char *operation, void (*kernel)(P...), A... arguments)
    {
        if (!queue_failed(q) && c.gridDim.x > 0 && allow(q, operation, kernel))
            queue_check(q, cudaLaunchKernelEx(&c, kernel, static_cast<P>(arguments)...), operation);
    }
};

inline int groups_of(int64_t rows)
{
    int groups = 1;
    while (8 * groups < rows) groups *= 2;
    return groups;
}

constexpr int PANEL = 64, PANEL_BYTES = 1024, PARTS = 3, TEAM_WARPS = 4;

/* by16: as FP8 lies, 16 columns of 64 a lane; else 8 of 32. */
template <class INT> __device__ __forceinline__ INT panel_place(INT c, bool by16)
{
    INT inner = c % 8 / 4 * 16 + c % 4 / 2 * 8 + c % 2;
    return by16 ? inner + c % 16 / 8 * 32 + c / 16 * 2 : inner + c / 32 * 32 + c % 32 / 8 * 2;
}

/* Byte of row r of a panel's eight, at a place. */
template <class INT> __device__ __forceinline__ INT panel_byte(INT r, INT place)
{
    return r * 128 + (place / 8 ^ r) * 16 + place % 8 * 2;
}

/* Two neighbouring numbers as three pairs whose sum they are. */
struct split_pair {
    uint32_t part[PARTS];
    __device__ __forceinline__ explicit split_pair(float2 x)
    {
        part[0] = pack(x.x, x.y);
        float2 h = unpack(part[0]), rest = make_float2(x.x - h.x, x.y - h.y);
        part[1] = pack(rest.x, rest.y);
        float2 m = unpack(part[1]);
        part[2] = pack(rest.x - m.x, rest.y - m.y);
    }
    __device__ __forceinline__ float2 sum() const
    {
        float2 h = unpack(part[0]), m = unpack(part[1]), l = unpack(part[2]);
        return make_float2(h.x + m.x + l.x, h.y + m.y + l.y);
    }
};

/* ---- weights ---- */

/* A lane's words of a unit of sixteen rows: of rows g and g + 8 two of 16 bytes each, of NVFP4 and their scales. */
template <int FORMAT> struct words16 {
    uint4 w[2][2];
    uint2 scale[2];

    /* Panel Q of the unit: f[2 i], f[2 i + 1] for the first and the second accumulator. */
    template <int Q> __device__ __forceinline__ void decode(uint32_t (&f)[4][4]) const
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if constexpr (FORMAT == WEIGHT_BF16) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    f[2 * i][h] = w[h][i].x;
                    f[2 * i][2 + h] = w[h][i].y;
                    f[2 * i + 1][h] = w[h][i].z;
                    f[2 * i + 1][2 + h] = w[h][i].w;
                }
            } else if constexpr (FORMAT == WEIGHT_FP8) {
                uint32_t v[4] = { w[h][Q].x, w[h][Q].y, w[h][Q].z, w[h][Q].w };
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    f[i][h] = fp8_pair(v[i], 0);
                    f[i][2 + h] = fp8_pair(v[i], 2);
                }
            } else {
                const uint4 &u = w[h][Q / 2];
                fp4_scales scales(Q / 2 ? scale[h].y : scale[h].x);
                uint32_t v[2] = { Q % 2 ? u.z : u.x, Q % 2 ? u.w : u.y };
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    __nv_bfloat162 s = scales.of(Q % 2 * 2 + i);
                    f[2 * i][h] = bf16_pair_product(fp4_pair<0>(v[i]), s);
                    f[2 * i][2 + h] = bf16_pair_product(fp4_pair<1>(v[i]), s);
                    f[2 * i + 1][h] = bf16_pair_product(fp4_pair<2>(v[i]), s);
                    f[2 * i + 1][2 + h] = bf16_pair_product(fp4_pair<3>(v[i]), s);
                }
            }
        }
    }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* The two accumulators of 64 weight rows against N input rows and parts; not TWO: the first takes all. */
template <int N, bool TWO> struct accumulators {
    float a[N / 8][4], b[TWO ? N / 8 : 1][4];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[n][i] = 0;
                if constexpr (TWO) b[n][i] = 0;
            }
    }
    /* Adds a panel, given as wide_matrix, or where not `add` begins with it; done, and f free again, once `end` returns. */
    __device__ __forceinline__ void begin(const uint32_t (&f)[4][4], uint64_t x, bool add = true)
    {
        wide_hold(a);
        if constexpr (TWO) wide_hold(b);
        wide_begin();
#pragma unroll
        for (int k = 0; k < 4; k++)
            if constexpr (TWO)
                wide_mma<N>(k % 2 ? b : a, f[k], x + k * WIDE_STEP, k > 1 || add);
            else
                wide_mma<N>(a, f[k], x + k * WIDE_STEP, k > 0 || add);
        wide_commit();
    }
    __device__ __forceinline__ void end(uint32_t (&f)[4][4])
    {
        wide_wait<0>();
        wide_keep(f);
        wide_hold(a);
        if constexpr (TWO) wide_hold(b);
    }
    __device__ __forceinline__ float sum(int n, int i) const
    {
        if constexpr (TWO) return a[n][i] + b[n][i];
        return a[n][i];
    }
};
#endif

} /* namespace */
#endif
