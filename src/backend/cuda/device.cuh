/* What the kernels share: sums in a fixed order, number formats, products on the tensor cores.
 *
 * Products. A tensor-core instruction multiplies 16 rows of activations with 8 rows of weights, in BF16 with sums in
 * f32. An f32 activation is the exact sum of three BF16 numbers, so a row of activations takes four of the sixteen
 * rows ("slots"): high, middle and low part, and in the fourth the row quantized to FP8 for weights that ask for it.
 * Weights become BF16 exactly: FP8 has 4 significant bits, FP4 times its group's scale 6.
 *
 * FP4 words. Eight codes of a row, columns 0..7, in one 32-bit word; pairs of an even and an odd column come out side by side,
 * in the lower and the upper half, as BF16 numbers of value * 2^-126: sign in bit 15, e1 e0 m in bits 8..6. Pair 0 lies so; pairs
 * 1 and 2 do once the word is turned right by 3 and 6 bits; of pair 3 s e1 e0 m are in bits 1, 0, 4 and 3, from where one
 * multiplication brings them to their places. */
#ifndef BACKEND_CUDA_DEVICE_CUH
#define BACKEND_CUDA_DEVICE_CUH
#include "backend/cuda/parts.h"
#include "backend/cuda/ptx.cuh"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

namespace {

constexpr int LANES = 32, THREADS = 256, WARPS = THREADS / LANES;
constexpr unsigned ALL = 0xffffffffu;

/* ---- launches ---- */

/* What an earlier kernel wrote is read with __ldcg by kernels that overlap it: their first cache may be older.
 * Kernels started with `overlap` call wait_for_previous before they touch anything an earlier kernel writes, and
 * before they write. */
template <int SIZE = THREADS, class... P, class... A>
void launch(struct queue *q, const char *operation, bool overlap, void (*kernel)(P...), dim3 grid, size_t shared,
            A... arguments)
{
    cudaLaunchConfig_t c = {};
    cudaLaunchAttribute attribute[3];
    struct passing once = q->passing;
    unsigned cluster = q->cluster;
    q->passing = {};
    q->cluster = 0;
    if (queue_failed(q) || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    q->side = ALONE;
    c.gridDim = grid;
    c.blockDim = dim3(SIZE);
    c.dynamicSmemBytes = shared;
    c.stream = q->stream;
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    c.attrs = attribute;
    c.numAttrs = overlap && q->has_pdl ? 1 : 0;
    if (cluster) {
        cudaLaunchAttribute &a = attribute[c.numAttrs++];
        a = {};
        a.id = cudaLaunchAttributeClusterDimension;
        a.val.clusterDim.x = cluster;
        a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (once.bytes) {
        cudaLaunchAttribute &a = attribute[c.numAttrs++];
        a = {};
        a.id = cudaLaunchAttributeAccessPolicyWindow;
        a.val.accessPolicyWindow.base_ptr = const_cast<void *>(once.from);
        a.val.accessPolicyWindow.num_bytes = once.bytes;
        a.val.accessPolicyWindow.hitRatio = 1;
        a.val.accessPolicyWindow.hitProp = cudaAccessPropertyStreaming;
        a.val.accessPolicyWindow.missProp = cudaAccessPropertyNormal;
    }
    /* 48 KiB need no leave, with what the kernel has besides: 13 KiB at most where it asks for any */
    if (shared > 32 * 1024 &&
        !queue_check(q, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
                     operation))
        return;
    /* one split of the first cache for all: to change it a multiprocessor has to run empty */
    if (overlap &&
        !queue_check(q, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), operation))
        return;
    queue_check(q, cudaLaunchKernelEx(&c, kernel, static_cast<P>(arguments)...), operation);
}

/* In a step of one row a multiprocessor has room for a block of the kernel that runs and one of the next. Were there room for
 * two of the same, some multiprocessors would get two and others none, and everybody would wait for the former: 8 us a layer,
 * measured. So every other kernel is a LEFT one and asks for more than half of the shared memory; all take more than a quarter
 * of the registers and no more than half. One LEFT and one other fit; two LEFT ones do not, nor two others beside one. */
constexpr size_t LEFT_SHARED = 113 * 1024; /* and what a kernel has besides: two take more than there is */

template <int SIZE, class... P, class... A>
void launch_side(struct queue *q, const char *operation, enum side side, void (*kernel)(P...), dim3 grid, size_t shared,
                 A... arguments)
{
    bool alone = !q->has_pdl || grid.x * grid.y > (unsigned)q->sms || shared > LEFT_SHARED ||
                 (size_t)q->shared_max < 2 * LEFT_SHARED - 2048;
    launch<SIZE>(q, operation, true, kernel, grid, side == LEFT && !alone ? LEFT_SHARED : shared, arguments...);
    q->side = shared > LEFT_SHARED ? LEFT : alone ? ALONE : side; /* a larger one fills the left side too */
}

inline unsigned blocks(int64_t n, int64_t each = THREADS)
{
    return (unsigned)((n + each - 1) / each);
}

/* ---- sums and maxima, always in the same order ---- */

__device__ __forceinline__ float warp_sum(float x)
{
    for (int o = LANES / 2; o > 0; o /= 2) x = __fadd_rn(x, __shfl_xor_sync(ALL, x, o));
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
    for (int o = LANES / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, o));
    return x;
}

/* Over the N warps of the block; `part` holds N floats and is free again after the caller's next __syncthreads. */
template <int N = WARPS> __device__ __forceinline__ float block_sum(float x, float *part)
{
    x = warp_sum(x);
    if (threadIdx.x % LANES == 0) part[threadIdx.x / LANES] = x;
    __syncthreads();
    x = part[0];
    for (int w = 1; w < N; w++) x += part[w];
    return x;
}

template <int N = WARPS> __device__ __forceinline__ float block_max(float x, float *part)
{
    x = warp_max(x);
    if (threadIdx.x % LANES == 0) part[threadIdx.x / LANES] = x;
    __syncthreads();
    x = part[0];
    for (int w = 1; w < N; w++) x = fmaxf(x, part[w]);
    return x;
}

/* 1 / rms of a row, by a whole block. */
__device__ __forceinline__ float block_inverse_rms(const float *x, int n, float eps, float *part)
{
    float sum = 0;
    for (int c = threadIdx.x; c < n; c += THREADS) sum = fmaf(x[c], x[c], sum);
    return 1.0f / sqrtf(block_sum(sum, part) / (float)n + eps);
}

/* 1 / rms of a head, by a warp. */
__device__ __forceinline__ float warp_inverse_rms(const float *x, int n, float eps)
{
    float sum = 0;
    for (int d = threadIdx.x % LANES; d < n; d += LANES) sum = fmaf(__ldcg(x + d), __ldcg(x + d), sum);
    return 1.0f / sqrtf(warp_sum(sum) / (float)n + eps);
}

__device__ __forceinline__ float sigmoid(float x)
{
    return __fdividef(1.0f, 1.0f + expf(-x));
}

__device__ __forceinline__ float silu(float x)
{
    return __fdividef(x, 1.0f + expf(-x));
}

/* Larger floats as larger integers. */
__device__ __forceinline__ uint32_t ordered(float x)
{
    uint32_t u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

__device__ __forceinline__ float unordered(uint32_t u)
{
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

__device__ __forceinline__ bool absent(float x)
{
    return __float_as_uint(x) == ABSENT;
}

/* ---- number formats ---- */

__device__ __forceinline__ float e4m3_value(uint8_t b)
{
    uint32_t rest = b & 0x7f;
    float x = rest >= 8 ? __uint_as_float((rest << 20) + (120u << 23)) : (float)rest * 0x1p-9f;
    if (rest == 0x7f) x = __uint_as_float(0x7fc00000u);
    return b & 0x80 ? -x : x;
}

/* Nearest even, saturating; NaN stays. */
__device__ __forceinline__ uint8_t e4m3_code(float x)
{
    return (uint8_t)__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float fp8_input_scale(float absmax)
{
    return fmaxf(absmax / 448.0f, 1.0f / (448.0f * 512.0f));
}

__device__ __forceinline__ float e2m1_value(uint32_t code)
{
    const float value = code & 4 ? __uint_as_float((127 + (code >> 1 & 3) - 1) << 23 | (code & 1) << 22)
                        : code & 2 ? (code & 1 ? 1.5f : 1.0f)
                                   : (code & 1 ? 0.5f : 0.0f);
    return code & 8 ? -value : value;
}

/* Pair 3 of an FP4 word where the others lie. */
__device__ __forceinline__ uint32_t fp4_last(uint32_t w)
{
    return (w & 0x001b001bu) * (1 << 14 | 1 << 8 | 1 << 3);
}

/* Code `position` (0..7) of an FP4 word. */
__device__ __forceinline__ uint32_t fp4_code(uint32_t word, int position)
{
    uint32_t turned = position < 6 ? __funnelshift_r(word, word, position / 2 * 3) : fp4_last(word);
    uint32_t half = turned >> position % 2 * 16;
    return (half >> 12 & 8) | (half >> 6 & 7);
}

__device__ __forceinline__ uint32_t bf16_pair_product(uint32_t a, __nv_bfloat162 b)
{
    __nv_bfloat162 x = __hmul2(*reinterpret_cast<__nv_bfloat162 *>(&a), b);
    return *reinterpret_cast<uint32_t *>(&x);
}

__device__ __forceinline__ __nv_bfloat162 bf16_pair(float x)
{
    return __float2bfloat162_rn(x);
}

/* Bytes `low` and `low + 1` of a word of E4M3, as BF16. */
__device__ __forceinline__ uint32_t fp8_pair(uint32_t word, int low)
{
    uint32_t t = __byte_perm(word, 0, low == 0 ? 0x1404 : 0x3424);
    return bf16_pair_product((t & 0x80008000u) | (t >> 4 & 0x07f007f0u), bf16_pair(0x1p120f));
}

/* Pair i of an FP4 word times 2^-126. */
template <int I> __device__ __forceinline__ uint32_t fp4_pair(uint32_t w)
{
    return (I == 3 ? fp4_last(w) : I == 0 ? w : __funnelshift_r(w, w, I * 3)) & 0x81c081c0u;
}

/* The four bytes of a word of scales (parts.h) times 2^118: with fp4_pair they give value * scale * 2^-8. */
struct fp4_scales {
    __nv_bfloat162 two[2];

    __device__ __forceinline__ explicit fp4_scales(uint32_t word)
    {
        uint32_t low = __byte_perm(word, 0, 0x4140) * 16 + 0x75807580u, high = __byte_perm(word, 0, 0x4342) * 16 + 0x75807580u;
        two[0] = *reinterpret_cast<__nv_bfloat162 *>(&low);
        two[1] = *reinterpret_cast<__nv_bfloat162 *>(&high);
    }
    /* That of byte i, twice. */
    __device__ __forceinline__ __nv_bfloat162 of(int i) const
    {
        return i % 2 ? __high2bfloat162(two[i / 2]) : __low2bfloat162(two[i / 2]);
    }
};
constexpr float FP4_UNIT = 0x1p8f;

/* The pairs of a word, decoded. */
struct fp4_pairs {
    uint32_t v[4];

    __device__ __forceinline__ fp4_pairs(uint32_t word, __nv_bfloat162 s)
    {
        v[0] = bf16_pair_product(fp4_pair<0>(word), s);
        v[1] = bf16_pair_product(fp4_pair<1>(word), s);
        v[2] = bf16_pair_product(fp4_pair<2>(word), s);
        v[3] = bf16_pair_product(fp4_pair<3>(word), s);
    }
};

} /* namespace */
#endif
