/* Weights streamed through shared memory past activations that lie there, for up to ROWS_EXACT rows.
 *
 * Eight rows of weights are a tile; 128 bytes of codes of each of its rows are a unit: 64 columns of BF16, 128 of FP8, 256 of
 * NVFP4. A warp works through a list of parts of tiles: it copies their units asynchronously into a ring of its own, two
 * copies of 16 bytes a lane, and each lane reads back what it copied itself: no barrier, and as many bytes in flight as
 * the ring holds. Lane 4 g + t has bytes 16 t.. and 64 + 16 t.. of row g; NVFP4 lies in memory as the lanes want it (parts.h).
 *
 * Each input row is four of the sixteen rows of a tensor-core instruction (device.cuh: slots); their sums are put together in
 * the warp. */
#ifndef BACKEND_CUDA_STREAM_CUH
#define BACKEND_CUDA_STREAM_CUH
#include "backend/cuda/device.cuh"

namespace {

constexpr int BLOCK = 512, CREW = BLOCK / LANES;
constexpr int RING = 3, UNIT_BYTES = 128, PIECE = 64, SLOT_BYTES = 1024 + 8 * LANES;
constexpr size_t RING_BYTES = (size_t)RING * CREW * SLOT_BYTES;

/* ---- slots: activations in shared memory ---- */

constexpr int SLOTS = 4, SLOT_PAD = 32, SLOT_UNIT = 256; /* BF16 numbers */

__host__ __device__ inline int slot_stride(int cols)
{
    return (cols + SLOT_UNIT - 1) / SLOT_UNIT * SLOT_UNIT + SLOT_PAD;
}

__device__ __forceinline__ float2 unpack(uint32_t pair)
{
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ __forceinline__ uint32_t pack(float x, float y)
{
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* Two columns, the first of them even; returns the larger magnitude. */
__device__ __forceinline__ float put_parts(__nv_bfloat16 *slots, int stride, int c, float2 x)
{
    uint32_t high = pack(x.x, x.y);
    float2 h = unpack(high), rest = make_float2(x.x - h.x, x.y - h.y);
    uint32_t middle = pack(rest.x, rest.y);
    float2 m = unpack(middle);
    *(uint32_t *)(slots + c) = high;
    *(uint32_t *)(slots + stride + c) = middle;
    *(uint32_t *)(slots + 2 * stride + c) = pack(rest.x - m.x, rest.y - m.y);
    return fmaxf(fabsf(x.x), fabsf(x.y));
}

/* Two columns whose parts have been put. */
__device__ __forceinline__ float2 parts_sum(const __nv_bfloat16 *slots, int stride, int c)
{
    float2 h = unpack(*(const uint32_t *)(slots + c)), m = unpack(*(const uint32_t *)(slots + stride + c));
    float2 l = unpack(*(const uint32_t *)(slots + 2 * stride + c));
    return make_float2(h.x + m.x + l.x, h.y + m.y + l.y);
}

/* x / scale, its correctly rounded quotient for what a scale of fp8_input_scale leaves. */
__device__ __forceinline__ float divided(float x, float scale, float inverse)
{
    float q = x * inverse;
    return fmaf(fmaf(-q, scale, x), inverse, q);
}

__device__ __forceinline__ void put_quantized(__nv_bfloat16 *slots, int stride, int c, float2 x, float scale, float inverse)
{
    float2 q = make_float2(divided(x.x, scale, inverse), divided(x.y, scale, inverse));
    __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(__nv_cvt_float2_to_fp8x2(q, __NV_SATFINITE, __NV_E4M3), __NV_E4M3);
    float2 y = __half22float2(*reinterpret_cast<__half2 *>(&h));
    *(uint32_t *)(slots + 3 * stride + c) = pack(y.x, y.y);
}

/* Zeros from column `cols` on, by threads first, first + step, ... */
__device__ __forceinline__ void put_padding(__nv_bfloat16 *slots, int stride, int cols, int first, int step)
{
#pragma unroll 1
    for (int c = cols + 2 * first; c < stride; c += 2 * step)
        for (int s = 0; s < SLOTS; s++) *(uint32_t *)(slots + s * stride + c) = 0;
}

/* Columns c and c + 1 of a row that an earlier kernel wrote. */
__device__ __forceinline__ float2 load_pair(const float *x, int c)
{
    if (((size_t)x & 7) == 0) return __ldcg((const float2 *)(x + c));
    return make_float2(__ldcg(x + c), __ldcg(x + c + 1));
}

/* ---- weights ---- */

__host__ __device__ constexpr int unit_cols(int format)
{
    return format == WEIGHT_BF16 ? 64 : format == WEIGHT_FP8 ? 128 : FP4_UNIT_COLS;
}

__host__ __device__ inline int units_of(int format, int cols)
{
    return (cols + unit_cols(format) - 1) / unit_cols(format);
}

__host__ __device__ inline int tiles_of(int rows)
{
    return (rows + 7) / 8;
}

__host__ __device__ inline int row_bytes_of(const cuda_matrix &m)
{
    return m.format == WEIGHT_BF16 ? 2 * m.cols : m.cols;
}

/* Bytes of a tile, and of a matrix of those that lie below one another. */
__device__ __forceinline__ unsigned tile_bytes(const cuda_matrix &m)
{
    return m.format == WEIGHT_NVFP4 ? (unsigned)(units_of(m.format, m.cols) * FP4_UNIT_BYTES) : 8u * row_bytes_of(m);
}

__device__ __forceinline__ unsigned matrix_bytes(const cuda_matrix &m)
{
    return m.format == WEIGHT_NVFP4 ? tiles_of(m.rows) * tile_bytes(m) : (unsigned)m.rows * row_bytes_of(m);
}

/* Where a tile begins, of the matrix `number` of those that follow m. */
__device__ __forceinline__ const uint8_t *tile_at(const cuda_matrix &m, unsigned number, unsigned tile)
{
    return (const uint8_t *)m.data + (uint64_t)number * matrix_bytes(m) + (uint64_t)tile * tile_bytes(m);
}

/* Part of a tile: units [first, first + n). n 0: none. */
struct part {
    const uint8_t *data; /* of the tile's first unit */
    int format, first, n, row_bytes;
};

/* A tile's share of warp w of `crew`. */
__device__ __forceinline__ part part_of(const cuda_matrix &m, const uint8_t *tile, int w, int crew)
{
    int units = units_of(m.format, m.cols), share = (units + crew - 1) / crew, first = w * share, n = units - first;
    return { tile, m.format, first, n < 0 ? 0 : n < share ? n : share, m.format == WEIGHT_NVFP4 ? 0 : row_bytes_of(m) };
}

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

/* A warp's stream. Its list: lane i holds part i. */
struct stream {
    uint8_t *ring; /* this lane's place in the warp's ring */
    uint32_t ring_at;
    /* asked for next */
    const uint8_t *at;
    int from, row_bytes; /* byte of the row; of NVFP4 0 and 0 */
    int left, next, slot; /* units of the part, part, bytes from the ring's begin */

    __device__ stream(uint8_t *shared)
    {
        ring = shared + (size_t)(threadIdx.x / LANES) * RING * SLOT_BYTES + threadIdx.x % LANES * 16;
        ring_at = (uint32_t)__cvta_generic_to_shared(ring);
        left = next = slot = from = row_bytes = 0;
        at = nullptr;
    }

    __device__ __forceinline__ void begin(const part &mine, int n)
    {
        int lane = threadIdx.x % LANES, first;
        do {
            left = __shfl_sync(ALL, mine.n, next++);
        } while (left == 0 && next < n);
        unsigned long long p = __shfl_sync(ALL, (unsigned long long)mine.data, next - 1);
        first = __shfl_sync(ALL, mine.first, next - 1);
        row_bytes = __shfl_sync(ALL, mine.row_bytes, next - 1);
        from = first * UNIT_BYTES + lane % 4 * 16;
        at = (const uint8_t *)p + (row_bytes ? lane / 4 * row_bytes + from : first * FP4_UNIT_BYTES + lane * 16);
    }

    /* The next unit of parts [next, n), nothing where there is none. */
    __device__ __forceinline__ void ask(const part &mine, int n)
    {
        if (left == 0 && next < n) begin(mine, n);
        if (left > 0) {
            uint32_t to = ring_at + slot;
            left--;
            if (row_bytes) {
                copy_async16(to, at, from < row_bytes);
                copy_async16(to + 512, at + PIECE, from + PIECE < row_bytes);
                at += UNIT_BYTES;
                from += UNIT_BYTES;
            } else {
                int lane = threadIdx.x % LANES;
                copy_async16(to, at, true);
                copy_async16(to + 512, at + 512, true);
                copy_async8(to + 1024 - 8 * lane, at + 1024 - lane * 16 + lane / 2 * 8);
                at += FP4_UNIT_BYTES;
            }
        }
        copy_commit();
        slot = slot == (RING - 1) * SLOT_BYTES ? 0 : slot + SLOT_BYTES;
    }

    __device__ __forceinline__ void fill(const part &mine, int n)
    {
#pragma unroll 1
        for (int i = 0; i < RING; i++) ask(mine, n);
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
    static __device__ __forceinline__ void piece(float (&a)[4], float (&b)[4], uint4 w, uint32_t scale,
                                                 const __nv_bfloat16 *x, int stride8, bool used)
    {
        uint32_t v[4] = { w.x, w.y, w.z, w.w };
        if (FORMAT == WEIGHT_BF16) {
            two<ROWS>(a, b, x, stride8, used, w.x, w.y, w.z, w.w);
        } else if (FORMAT == WEIGHT_FP8) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                two<ROWS>(a, b, x + i * 8, stride8, used, fp8_pair(v[2 * i], 0), fp8_pair(v[2 * i], 2),
                          fp8_pair(v[2 * i + 1], 0), fp8_pair(v[2 * i + 1], 2));
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                __nv_bfloat162 s = fp4_scale(scale, i);
                two<ROWS>(a, b, x + i * 32, stride8, used, bf16_pair_product(fp4_pair<0>(v[i]), s),
                          bf16_pair_product(fp4_pair<1>(v[i]), s), bf16_pair_product(fp4_pair<2>(v[i]), s),
                          bf16_pair_product(fp4_pair<3>(v[i]), s));
            }
        }
    }

    template <int ROWS, int FORMAT>
    __device__ __forceinline__ void run(float (&sum)[4], int first, int units, const __nv_bfloat16 *x, int stride, bool used,
                                        const part &mine, int n)
    {
        constexpr int COLS = unit_cols(FORMAT), LANE_COLS = FORMAT == WEIGHT_FP8 ? 16 : 8;
        float a[4] = {}, b[4] = {};
        x += first * COLS + threadIdx.x % 4 * LANE_COLS;
#pragma unroll 1
        for (int u = 0; u < units; u++, x += COLS) {
            copy_wait<RING - 1>();
            const uint8_t *from_ring = ring + slot;
            uint4 low = *(const uint4 *)from_ring, high = *(const uint4 *)(from_ring + 512);
            uint2 scale = uint2{};
            if (FORMAT == WEIGHT_NVFP4) scale = *(const uint2 *)(from_ring + 1024 - 8 * (threadIdx.x % LANES));
            piece<ROWS, FORMAT>(a, b, low, scale.x, x, 8 * stride, used);
            piece<ROWS, FORMAT>(a, b, high, scale.y, x + COLS / 2, 8 * stride, used);
            ask(mine, n);
        }
        for (int i = 0; i < 4; i++) sum[i] = a[i] + b[i];
    }

    /* Part i against slots [SLOTS * ROWS][stride]. Lanes 0..3 get the sums of columns 2 t and 2 t + 1 of row 0, with ROWS 4
     * of row 2 too in [2], [3]; lanes 16..19 those of rows 1 and 3. quantized: of the fourth slot, else of the others. */
    template <int ROWS>
    __device__ __forceinline__ void work(float (&sum)[4], int i, const __nv_bfloat16 *slots, int stride, bool quantized,
                                         const part &mine, int n)
    {
        int g = threadIdx.x % LANES / 4, format = __shfl_sync(ALL, mine.format, i);
        int first = __shfl_sync(ALL, mine.first, i), units = __shfl_sync(ALL, mine.n, i);
        bool used = g < SLOTS, counts = quantized == (g % SLOTS == SLOTS - 1);
        const __nv_bfloat16 *x = slots + (ROWS > 1 || used ? g : 0) * stride;
        if (format == WEIGHT_BF16)
            run<ROWS, WEIGHT_BF16>(sum, first, units, x, stride, used, mine, n);
        else if (format == WEIGHT_FP8)
            run<ROWS, WEIGHT_FP8>(sum, first, units, x, stride, used, mine, n);
        else
            run<ROWS, WEIGHT_NVFP4>(sum, first, units, x, stride, used, mine, n);
#pragma unroll
        for (int k = 0; k < (ROWS > 1 ? 4 : 2); k++) {
            sum[k] = counts ? sum[k] : 0;
            sum[k] += __shfl_xor_sync(ALL, sum[k], 4);
            sum[k] += __shfl_xor_sync(ALL, sum[k], 8);
        }
    }
};

/* What a sum is multiplied by. number: of the matrices that follow m. */
__device__ __forceinline__ float unit_of(const cuda_matrix &m, int64_t number, int row, float global)
{
    return m.format == WEIGHT_FP8 ? m.scale[number * m.rows + row] : m.format == WEIGHT_NVFP4 ? FP4_UNIT / global : 1;
}

} /* namespace */
#endif
