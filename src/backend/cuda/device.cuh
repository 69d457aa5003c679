/* What the kernels share: sums in a fixed order, number formats, products on the tensor cores, weights streamed
 * through shared memory.
 *
 * Products. A tensor-core instruction multiplies 16 rows of activations with 8 rows of weights, in BF16 with sums in
 * f32. An f32 activation is the exact sum of three BF16 numbers, so a row of activations takes four of the sixteen
 * rows ("slots"): high, middle and low part, and in the fourth the row quantized to FP8 for weights that ask for it.
 * Weights become BF16 exactly: FP8 has 4 significant bits, FP4 times its group's scale 6.
 *
 * FP4 words. Eight codes of a row, columns 0..7, in one 32-bit word; halves hold even and odd columns, so that pairs
 * come out side by side. In each half, with code = s e1 e0 m and i the pair: pair 0: s in bit 15, e1 e0 m in 8..6;
 * pair 1: 12, 5..3; pair 2: 9, 2..0; pair 3: s in 10, e1 e0 in 14..13, m in 11. A shift and a mask make a pair of BF16
 * numbers of value * 2^-126. */
#ifndef BACKEND_CUDA_DEVICE_CUH
#define BACKEND_CUDA_DEVICE_CUH
#include "backend/cuda/parts.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

namespace {

constexpr int LANES = 32, THREADS = 256, WARPS = THREADS / LANES;
constexpr unsigned ALL = 0xffffffffu;

/* ---- launches ---- */

/* Lets the next kernel of the stream start its prologue, and waits for what earlier kernels wrote. */
__device__ __forceinline__ void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* What an earlier kernel wrote is read with __ldcg by kernels that overlap it: their first cache may be older.
 * Kernels started with `overlap` call wait_for_previous before they touch anything an earlier kernel writes, and
 * before they write. */
template <class... P, class... A>
void launch(struct queue *q, const char *operation, bool overlap, void (*kernel)(P...), dim3 grid, size_t shared,
            A... arguments)
{
    cudaLaunchConfig_t c = {};
    cudaLaunchAttribute attribute[1];
    if (queue_failed(q) || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    c.gridDim = grid;
    c.blockDim = dim3(THREADS);
    c.dynamicSmemBytes = shared;
    c.stream = q->stream;
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    c.attrs = attribute;
    c.numAttrs = overlap && q->has_pdl ? 1 : 0;
    if (shared > 48 * 1024 &&
        !queue_check(q, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
                     operation))
        return;
    /* one split of the first cache for all: to change it a multiprocessor has to run empty */
    if (overlap &&
        !queue_check(q, cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), operation))
        return;
    queue_check(q, cudaLaunchKernelEx(&c, kernel, static_cast<P>(arguments)...), operation);
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

/* Over the block; `part` holds WARPS floats and is free again after the caller's next __syncthreads. */
__device__ __forceinline__ float block_sum(float x, float *part)
{
    x = warp_sum(x);
    if (threadIdx.x % LANES == 0) part[threadIdx.x / LANES] = x;
    __syncthreads();
    x = part[0];
    for (int w = 1; w < WARPS; w++) x += part[w];
    return x;
}

__device__ __forceinline__ float block_max(float x, float *part)
{
    x = warp_max(x);
    if (threadIdx.x % LANES == 0) part[threadIdx.x / LANES] = x;
    __syncthreads();
    x = part[0];
    for (int w = 1; w < WARPS; w++) x = fmaxf(x, part[w]);
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
    return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float silu(float x)
{
    return x / (1.0f + expf(-x));
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

/* Where code `position` (0..7) of an FP4 word lies, as a value. */
__device__ __forceinline__ float fp4_value(uint32_t word, int position)
{
    uint32_t half = position & 1 ? word >> 16 : word & 0xffff, code;
    switch (position / 2) {
    case 0: code = (half >> 12 & 8) | (half >> 6 & 7); break;
    case 1: code = (half >> 9 & 8) | (half >> 3 & 7); break;
    case 2: code = (half >> 6 & 8) | (half & 7); break;
    default: code = (half >> 7 & 8) | (half >> 12 & 6) | (half >> 11 & 1); break;
    }
    const float value = code & 4 ? __uint_as_float((127 + (code >> 1 & 3) - 1) << 23 | (code & 1) << 22)
                        : code & 2 ? (code & 1 ? 1.5f : 1.0f)
                                   : (code & 1 ? 0.5f : 0.0f);
    return code & 8 ? -value : value;
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
    if (I == 0) return w & 0x81c081c0u;
    if (I == 1) return w << 3 & 0x81c081c0u;
    if (I == 2) return w << 6 & 0x81c081c0u;
    return (w >> 6 & 0x01800180u) | (w >> 5 & 0x00400040u) | (w << 5 & 0x80008000u);
}

/* Byte i of a word of E4M3 scales times 2^118, twice: with fp4_pair it gives value * scale * 2^-8. */
__device__ __forceinline__ __nv_bfloat162 fp4_scale(uint32_t word, int i)
{
    uint32_t t = __byte_perm(word, 0, 0x0404 | i << 4 | i << 12);
    t = (t & 0x80008000u) | (t >> 4 & 0x07f007f0u); /* scale * 2^-120 */
    t = bf16_pair_product(t, bf16_pair(0x1p119f));
    t = bf16_pair_product(t, bf16_pair(0x1p119f));
    return *reinterpret_cast<__nv_bfloat162 *>(&t);
}
constexpr float FP4_UNIT = 0x1p8f;

/* ---- tensor cores ---- */

/* d += a b. a: 16 rows x 16, b: 16 x 8. Lane 4 g + t: a0 (row g, columns 2t, 2t+1), a1 (row g + 8), a2 and a3 (columns
 * + 8); b0 (rows 2t, 2t+1 of column g), b1 (+ 8); d0, d1 (row g, columns 2t, 2t+1), d2, d3 (row g + 8). */
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* ---- slots: activations in shared memory ---- */

constexpr int SLOTS = 4, SLOT_PAD = 32, SLOT_UNIT = 256; /* BF16 numbers */

__host__ __device__ inline int slot_stride(int cols)
{
    return (cols + SLOT_UNIT - 1) / SLOT_UNIT * SLOT_UNIT + SLOT_PAD;
}

__device__ __forceinline__ void put_parts(__nv_bfloat16 *slots, int stride, int c, float x)
{
    __nv_bfloat16 high = __float2bfloat16_rn(x);
    float rest = x - __bfloat162float(high);
    __nv_bfloat16 middle = __float2bfloat16_rn(rest);
    slots[c] = high;
    slots[stride + c] = middle;
    slots[2 * stride + c] = __float2bfloat16_rn(rest - __bfloat162float(middle));
}

__device__ __forceinline__ void put_quantized(__nv_bfloat16 *slots, int stride, int c, float x, float scale)
{
    slots[3 * stride + c] = __float2bfloat16_rn(e4m3_value(e4m3_code(x / scale)));
}

/* ---- weights streamed through shared memory ----
 * Eight rows are a tile; 128 bytes of codes of each of its rows are a unit: 64 columns of BF16, 128 of FP8, 256 of NVFP4. A
 * warp copies units asynchronously into a ring of its own, two copies of 16 bytes a lane, and each lane reads back what
 * it copied itself: no barrier, and as many bytes in flight as the ring holds. Lane 4 g + t has bytes 16 t.. and
 * 64 + 16 t.. of row g. NVFP4 lies in memory as the lanes want it (fp4_place). */

constexpr int RING = 6, UNIT_BYTES = 128, PIECE = 64, SLOT_BYTES = 1024 + 8 * LANES;
constexpr size_t RING_BYTES = (size_t)RING * WARPS * SLOT_BYTES;

__device__ __forceinline__ void copy_async16(uint32_t to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_async8(uint32_t to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__host__ __device__ constexpr int unit_cols(int format)
{
    return format == WEIGHT_BF16 ? 64 : format == WEIGHT_FP8 ? 128 : FP4_UNIT_COLS;
}

__host__ __device__ inline int units_of(int format, int cols)
{
    return (cols + unit_cols(format) - 1) / unit_cols(format);
}

/* Bytes of a matrix of a format that streams. */
__host__ __device__ inline int64_t matrix_bytes(const cuda_matrix &m)
{
    if (m.format == WEIGHT_NVFP4) return fp4_bytes(m.rows, m.cols);
    return (int64_t)m.rows * m.cols * (m.format == WEIGHT_BF16 ? 2 : 1);
}

/* A warp's share of a tile. */
struct job {
    const uint8_t *data; /* from the share's first unit on; NULL: no more jobs */
    int row_bytes;       /* 0: NVFP4 */
    int left;            /* bytes of a row from there to its end */
    int rows;            /* valid ones */
    int units;
    int format;
    int x;    /* where its inputs begin, in BF16 numbers from the slots' begin */
    int sums; /* where its result goes, in floats */
};

/* Units [first, first + n) of the tile that begins at `row` of m, or of the matrix `number` of those that follow m. */
__device__ __forceinline__ job job_of(const cuda_matrix &m, int64_t number, int row, int first, int n)
{
    job j;
    const uint8_t *data = (const uint8_t *)m.data + (number ? number * matrix_bytes(m) : 0);
    bool fp4 = m.format == WEIGHT_NVFP4;
    j.format = m.format;
    j.row_bytes = fp4 ? 0 : m.format == WEIGHT_BF16 ? 2 * m.cols : m.cols;
    j.data = fp4 ? data + ((int64_t)(row / 8) * units_of(WEIGHT_NVFP4, m.cols) + first) * FP4_UNIT_BYTES
                 : data + (int64_t)row * j.row_bytes + first * UNIT_BYTES;
    j.left = fp4 ? INT32_MAX : j.row_bytes - first * UNIT_BYTES;
    j.rows = m.rows - row;
    j.units = n;
    j.x = first * unit_cols(m.format);
    j.sums = 0;
    return j;
}

/* The same, split over the warps of the block. */
__device__ __forceinline__ job shared_job(const cuda_matrix &m, int64_t number, int row)
{
    int units = units_of(m.format, m.cols), share = (units + WARPS - 1) / WARPS, first = threadIdx.x / LANES * share;
    int n = units - first;
    return job_of(m, number, row, first, n < 0 ? 0 : n < share ? n : share);
}

/* Jobs: job operator()(int i), the warp's i-th. */
template <class Jobs> struct stream {
    const Jobs &jobs;
    uint8_t *ring; /* this warp's, this lane's place */
    uint32_t ring_at;
    int scales; /* from there to the lane's scales in a slot */
    /* asked for next */
    const uint8_t *at;
    int left, units, number, slot, second, from_scales, step;
    bool ended;
    /* worked on next */
    int oldest;

    __device__ stream(const Jobs &all, uint8_t *shared) : jobs(all)
    {
        int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        ring = shared + (size_t)warp * RING * SLOT_BYTES + lane * 16;
        ring_at = (uint32_t)__cvta_generic_to_shared(ring);
        scales = 1024 - 8 * lane;
        number = slot = oldest = units = 0;
        ended = false;
    }

    __device__ __forceinline__ void begin()
    {
        job j = jobs(number++);
        int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
        bool fp4 = j.row_bytes == 0;
        ended = j.data == nullptr;
        units = ended ? 0 : j.units;
        at = fp4 ? j.data + lane * 16 : j.data + (int64_t)g * j.row_bytes + t * 16;
        left = fp4 ? INT32_MAX : g < j.rows ? j.left - t * 16 : 0;
        second = fp4 ? 512 : PIECE;
        from_scales = fp4 ? 1024 - lane * 16 + lane / 2 * 8 : 0;
        step = fp4 ? FP4_UNIT_BYTES : UNIT_BYTES;
    }

    /* The next unit, of one of the first `known` jobs. False: there is none among them, but may be later. */
    __device__ __forceinline__ bool request(int known = INT32_MAX)
    {
        while (units == 0 && !ended && number < known) begin();
        if (units == 0 && !ended) return false;
        if (units > 0) {
            uint32_t to = ring_at + slot * SLOT_BYTES;
            copy_async16(to, at, left > 0);
            copy_async16(to + 512, at + second, left > PIECE);
            if (from_scales != 0) copy_async8(to + scales, at + from_scales);
            at += step;
            left -= UNIT_BYTES;
            units--;
        }
        copy_commit();
        slot = slot + 1 == RING ? 0 : slot + 1;
        return true;
    }

    /* Sums of one job, columns by slots as mma() leaves them. x: the slots, this lane's. */
    template <int ROWS, int FORMAT>
    __device__ __forceinline__ void run(float (&sum)[4], const job &j, const __nv_bfloat16 *x, int stride8, bool used)
    {
        constexpr int COLS = unit_cols(FORMAT), LANE_COLS = FORMAT == WEIGHT_FP8 ? 16 : 8;
        float acc[4][4] = {};
        x += j.x + threadIdx.x % 4 * LANE_COLS;
        for (int u = 0; u < j.units; u++, x += COLS) {
            copy_wait<RING - 1>();
            const uint8_t *from = ring + oldest * SLOT_BYTES;
            uint4 low = *(const uint4 *)from, high = *(const uint4 *)(from + 512);
            uint2 scale = FORMAT == WEIGHT_NVFP4 ? *(const uint2 *)(from + scales) : uint2{};
            oldest = oldest + 1 == RING ? 0 : oldest + 1;
            piece<ROWS, FORMAT>(acc, 0, low, scale.x, x, stride8, used);
            piece<ROWS, FORMAT>(acc, 1, high, scale.y, x + COLS / 2, stride8, used);
            request();
        }
        for (int i = 0; i < 4; i++) sum[i] = (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]);
    }

    template <int ROWS>
    static __device__ __forceinline__ void two(float (&a)[4], float (&b)[4], const __nv_bfloat16 *x, int stride8,
                                               bool used, uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3)
    {
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (ROWS > 1 || used) low = *(const uint4 *)x;
        if (ROWS > 1) high = *(const uint4 *)(x + stride8);
        mma(a, low.x, high.x, low.y, high.y, b0, b1);
        mma(b, low.z, high.z, low.w, high.w, b2, b3);
    }

    template <int ROWS, int FORMAT>
    static __device__ __forceinline__ void piece(float (&acc)[4][4], int k, uint4 w, uint32_t scale,
                                                 const __nv_bfloat16 *x, int stride8, bool used)
    {
        uint32_t v[4] = { w.x, w.y, w.z, w.w };
        if (FORMAT == WEIGHT_BF16) {
            two<ROWS>(acc[k * 2], acc[k * 2 + 1], x, stride8, used, w.x, w.y, w.z, w.w);
        } else if (FORMAT == WEIGHT_FP8) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                two<ROWS>(acc[i * 2], acc[i * 2 + 1], x + i * 8, stride8, used, fp8_pair(v[2 * i], 0),
                          fp8_pair(v[2 * i], 2), fp8_pair(v[2 * i + 1], 0), fp8_pair(v[2 * i + 1], 2));
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                __nv_bfloat162 s = fp4_scale(scale, i);
                two<ROWS>(acc[i % 2 * 2], acc[i % 2 * 2 + 1], x + i * 32, stride8, used,
                          bf16_pair_product(fp4_pair<0>(v[i]), s), bf16_pair_product(fp4_pair<1>(v[i]), s),
                          bf16_pair_product(fp4_pair<2>(v[i]), s), bf16_pair_product(fp4_pair<3>(v[i]), s));
            }
        }
    }

    /* One job into sums [SLOTS * ROWS][8]. slots: [SLOTS * ROWS][stride]. */
    template <int ROWS> __device__ __forceinline__ void work(const job &j, float *sums, const __nv_bfloat16 *slots, int stride)
    {
        int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
        bool used = g < SLOTS;
        float sum[4];
        const __nv_bfloat16 *x = slots + (ROWS > 1 || used ? g : 0) * stride;
        if (j.format == WEIGHT_BF16)
            run<ROWS, WEIGHT_BF16>(sum, j, x, 8 * stride, used);
        else if (j.format == WEIGHT_FP8)
            run<ROWS, WEIGHT_FP8>(sum, j, x, 8 * stride, used);
        else
            run<ROWS, WEIGHT_NVFP4>(sum, j, x, 8 * stride, used);
        float *to = sums + j.sums + g * 8 + 2 * t;
        if (ROWS > 1 || used) *(float2 *)to = make_float2(sum[0], sum[1]);
        if (ROWS > 1) *(float2 *)(to + 64) = make_float2(sum[2], sum[3]);
    }
};

/* The four slots' sums of a product lie in four neighbouring lanes; all get them in s. */
__device__ __forceinline__ void gather_slots(float (&s)[SLOTS], float mine)
{
    int first = threadIdx.x % LANES & ~(SLOTS - 1);
    for (int k = 0; k < SLOTS; k++) s[k] = __shfl_sync(ALL, mine, first + k);
}

/* What one slot quadruple of sums means: the product of one row of activations with one of weights. */
__device__ __forceinline__ float slots_value(const float s[SLOTS], int format, int input, float weight_scale,
                                             float input_scale)
{
    float parts = s[0] + (s[1] + s[2]);
    if (format == WEIGHT_FP8) return (input == INPUT_FP8_ROW ? s[3] * input_scale : parts) * weight_scale;
    return format == WEIGHT_NVFP4 ? parts * weight_scale : parts;
}

} /* namespace */
#endif
