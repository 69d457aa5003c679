/* Weights streamed through shared memory past activations that lie there, for up to ROWS_EXACT rows.
 *
 * Eight rows of weights are a tile; 128 bytes of codes of each of its rows are a unit: 64 columns of BF16,
 * 128 of FP8, 256 of NVFP4. A warp works through a list of parts of tiles: it copies their units
 * asynchronously into a ring of its own, two copies of 16 bytes a lane, and each lane reads back what it
 * copied itself: no barrier, and as many bytes in flight as the ring holds. Lane 4 g + t has bytes 16 t.. and
 * 64 + 16 t.. of row g; NVFP4 lies in memory as the lanes want it (parts.h).
 *
 * Each input row is four of the sixteen rows of a tensor-core instruction (device.cuh: slots); their sums are
 * put together in the warp. */
#ifndef BACKEND_CUDA_STREAM_CUH
#define BACKEND_CUDA_STREAM_CUH
#include "backend/cuda/device.cuh"
#include "backend/cuda/matrices.cuh"

namespace {

constexpr int BLOCK = 512, CREW = BLOCK / LANES;
constexpr int UNIT_BYTES = 128, PIECE = 64;

/* Of rings of `units` a warp; tiled: of NVFP4 too. */
__host__ __device__ constexpr size_t ring_bytes(int units, bool tiled)
{
    return (size_t)units * CREW * (tiled ? 1024 + 8 * LANES : 1024);
}

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

/* Where columns c and c + 1, c even, lie in a slot. Of eight columns the third and fourth change places with
 * the fifth and sixth: then the four words a lane reads are the operand of two instructions as they are
 * (stream: two). */
__device__ __forceinline__ int slot_place(int c)
{
    return (c & ~6) | (c & 2) << 1 | (c & 4) >> 1;
}

/* Two columns that go to place c; returns the larger magnitude. */
__device__ __forceinline__ float put_parts_at(__nv_bfloat16 *slots, int stride, int c, float2 x)
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

__device__ __forceinline__ float put_parts(__nv_bfloat16 *slots, int stride, int c, float2 x)
{
    return put_parts_at(slots, stride, slot_place(c), x);
}

/* Two columns whose parts have been put at place c. */
__device__ __forceinline__ float2 parts_sum_at(const __nv_bfloat16 *slots, int stride, int c)
{
    float2 h = unpack(*(const uint32_t *)(slots + c)), m = unpack(*(const uint32_t *)(slots + stride + c));
    float2 l = unpack(*(const uint32_t *)(slots + 2 * stride + c));
    return make_float2(h.x + m.x + l.x, h.y + m.y + l.y);
}

__device__ __forceinline__ float2 parts_sum(const __nv_bfloat16 *slots, int stride, int c)
{
    return parts_sum_at(slots, stride, slot_place(c));
}

/* x / scale, its correctly rounded quotient for what a scale of fp8_input_scale leaves. */
__device__ __forceinline__ float divided(float x, float scale, float inverse)
{
    float q = x * inverse;
    return fmaf(fmaf(-q, scale, x), inverse, q);
}

/* Two values as FP8 has them, in BF16. */
__device__ __forceinline__ uint32_t quantized_pair(float2 x, float scale, float inverse)
{
    float2 q = make_float2(divided(x.x, scale, inverse), divided(x.y, scale, inverse));
    __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(__nv_cvt_float2_to_fp8x2(q, __NV_SATFINITE, __NV_E4M3), __NV_E4M3);
    float2 y = __half22float2(*reinterpret_cast<__half2 *>(&h));
    return pack(y.x, y.y);
}

__device__ __forceinline__ void put_quantized_at(__nv_bfloat16 *slots, int stride, int c, float2 x, float scale,
                                                 float inverse)
{
    *(uint32_t *)(slots + 3 * stride + c) = quantized_pair(x, scale, inverse);
}

__device__ __forceinline__ void put_quantized(__nv_bfloat16 *slots, int stride, int c, float2 x, float scale, float inverse)
{
    put_quantized_at(slots, stride, slot_place(c), x, scale, inverse);
}

/* Zeros from column `cols` on, by threads first, first + step, ... */
__device__ __forceinline__ void put_padding(__nv_bfloat16 *slots, int stride, int cols, int first, int step,
                                            int used = SLOTS)
{
#pragma unroll 1
    for (int c = cols + 2 * first; c < stride; c += 2 * step)
        for (int s = 0; s < used; s++) *(uint32_t *)(slots + s * stride + c) = 0;
}

/* Columns c and c + 1 of a row that an earlier kernel wrote. */
__device__ __forceinline__ float2 load_pair(const float *x, int c)
{
    if (((size_t)x & 7) == 0) return __ldcg((const float2 *)(x + c));
    return make_float2(__ldcg(x + c), __ldcg(x + c + 1));
}

/* The same of words that may be told: as they are now. */
__device__ __forceinline__ float2 hear_columns(const float *x, int c)
{
    if (((size_t)x & 7) == 0) return hear_pair(x + c);
    float first = hear(x + c);
    return make_float2(first, hear(x + c + 1));
}

struct eight {
    float4 low, high;
};

/* Eight columns of a row that an earlier kernel wrote; whole: at a multiple of 16 bytes. */
__device__ __forceinline__ eight load_whole(const float *x)
{
    return { __ldcg((const float4 *)x), __ldcg((const float4 *)x + 1) };
}

__device__ __forceinline__ eight load_eight(const float *x)
{
    if (((size_t)x & 15) == 0) return load_whole(x);
    return { make_float4(__ldcg(x), __ldcg(x + 1), __ldcg(x + 2), __ldcg(x + 3)),
             make_float4(__ldcg(x + 4), __ldcg(x + 5), __ldcg(x + 6), __ldcg(x + 7)) };
}

/* To all slots but the last, at an address in shared memory; TURNED: in the order of slot_place, which is that of the other operand. */
template <bool TURNED> __device__ __forceinline__ void place_eight(uint32_t slots, int stride, eight x)
{
    float2 one = { x.low.z, x.low.w }, two = { x.high.x, x.high.y };
    float2 v[4] = { { x.low.x, x.low.y }, TURNED ? two : one, TURNED ? one : two, { x.high.z, x.high.w } };
#pragma unroll
    for (int s = 0; s < SLOTS - 1; s++) {
        uint32_t part[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            part[i] = pack(v[i].x, v[i].y);
            float2 y = unpack(part[i]);
            v[i] = make_float2(v[i].x - y.x, v[i].y - y.y);
        }
        store_shared(slots + s * stride * 2, part);
    }
}

/* A lane's row of slots, of the first two rows where there are more. used: slots of a row, where ROWS are more than two; for
 * one that is not there another is read, whose sums do not count. */
template <int ROWS> __device__ __forceinline__ const __nv_bfloat16 *lane_slot(const __nv_bfloat16 *slots, int stride, int used)
{
    int g = threadIdx.x % LANES / 4;
    return slots + (ROWS > 2 ? g / SLOTS * used + min(g % SLOTS, used - 1) : ROWS > 1 ? g : g % SLOTS) * stride;
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
__host__ __device__ __forceinline__ unsigned tile_bytes(const cuda_matrix &m)
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

/* Units of the warp `member` of `crew` that share a tile: [first, first + n). */
struct share {
    int first, n;
};

__host__ __device__ inline int share_of(int units, int crew)
{
    return (units + crew - 1) / crew;
}

__device__ __forceinline__ share share_at(int units, int each, int member)
{
    int first = member * each, n = units - first;
    return { first, n < 0 ? 0 : n < each ? n : each };
}

/* What a stream can be of: rows of matrices as stored, in whole units; also rows whose last unit is cut
 * short; NVFP4 (parts.h). */
enum { WHOLE = 0, CUT = 1, TILED = 2 };

/* A warp's stream of units, RING of them ahead. */
template <int KINDS, int RING> struct stream {
    static constexpr int SLOT_BYTES = KINDS & TILED ? 1024 + 8 * LANES : 1024;

    uint8_t *ring; /* this lane's place in the warp's ring */
    uint32_t ring_at;
    int slot; /* bytes from the ring's begin: of the unit used next, and asked for next */
    /* asked for next */
    const uint8_t *at;
    int left; /* units of the part */
    int rest; /* KINDS CUT: bytes of the row from here on */
    bool tiled;

    __device__ stream(uint8_t *shared)
    {
        ring = shared + (size_t)(threadIdx.x / LANES) * RING * SLOT_BYTES + threadIdx.x % LANES * 16;
        ring_at = (uint32_t)__cvta_generic_to_shared(ring);
        slot = left = rest = 0;
        at = nullptr;
        tiled = KINDS == TILED;
    }

    /* Where this lane reads unit `first` of a tile. row_bytes 0: NVFP4. */
    static __device__ __forceinline__ const uint8_t *lane_at(const uint8_t *tile, int row_bytes, int first)
    {
        int lane = threadIdx.x % LANES;
        bool fp4 = KINDS == TILED || (KINDS == (CUT | TILED) && row_bytes == 0);
        return tile + (fp4 ? first * FP4_UNIT_BYTES + lane * 16 : lane / 4 * row_bytes + first * UNIT_BYTES + lane % 4 * 16);
    }

    /* Units s of a tile are asked for next; from: lane_at of the first. */
    __device__ __forceinline__ void begin(const uint8_t *from, int row_bytes, share s)
    {
        left = s.n;
        at = from;
        if (KINDS == (CUT | TILED)) tiled = row_bytes == 0;
        if (KINDS & CUT) rest = row_bytes - s.first * UNIT_BYTES - (int)(threadIdx.x % 4) * 16;
    }

    /* Asks for the next unit; next() begins the next part, false: there is none, and what is asked for is
     * nothing. */
    template <class NEXT> __device__ __forceinline__ void ask(NEXT &&next)
    {
#pragma unroll 1
        while (left == 0 && next()) {
        }
        if (left > 0) {
            uint32_t to = ring_at + slot;
            left--;
            if (tiled) {
                int lane = threadIdx.x % LANES;
                copy_async16(to, at, true);
                copy_async16(to + 512, at + 512, true);
                copy_async8(to + 1024 - 8 * lane, at + 1024 - lane * 16 + lane / 2 * 8);
                at += FP4_UNIT_BYTES;
            } else {
                copy_async16(to, at, !(KINDS & CUT) || rest > 0);
                copy_async16(to + 512, at + PIECE, !(KINDS & CUT) || rest > PIECE);
                at += UNIT_BYTES;
                if (KINDS & CUT) rest -= UNIT_BYTES;
            }
        }
        copy_commit();
        slot = slot == (RING - 1) * SLOT_BYTES ? 0 : slot + SLOT_BYTES;
    }

    template <int ROWS>
    static __device__ __forceinline__ void two(float (&a)[4], float (&b)[4], const __nv_bfloat16 *x, int stride8,
                                               uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3)
    {
        uint4 low = *(const uint4 *)x;
        if (ROWS <= 2) { /* rows 8.. of a and 0.. of b come to nothing and are not looked at */
            mma(a, low.x, low.y, low.z, low.w, b0, b1);
            mma(b, low.x, low.y, low.z, low.w, b2, b3);
        } else {
            uint4 high = *(const uint4 *)(x + stride8);
            mma(a, low.x, high.x, low.z, high.z, b0, b1);
            mma(b, low.y, high.y, low.w, high.w, b2, b3);
        }
    }

    template <int ROWS, int FORMAT>
    static __device__ __forceinline__ void piece(float (&a)[4], float (&b)[4], uint4 w, uint32_t scale,
                                                 const __nv_bfloat16 *x, int stride8)
    {
        uint32_t v[4] = { w.x, w.y, w.z, w.w };
        if (FORMAT == WEIGHT_BF16) {
            two<ROWS>(a, b, x, stride8, w.x, w.y, w.z, w.w);
        } else if (FORMAT == WEIGHT_FP8) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                two<ROWS>(a, b, x + i * 8, stride8, fp8_pair(v[2 * i], 0), fp8_pair(v[2 * i], 2), fp8_pair(v[2 * i + 1], 0),
                          fp8_pair(v[2 * i + 1], 2));
        } else {
            fp4_scales scales(scale);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                __nv_bfloat162 s = scales.of(i);
                two<ROWS>(a, b, x + i * 32, stride8, bf16_pair_product(fp4_pair<0>(v[i]), s),
                          bf16_pair_product(fp4_pair<1>(v[i]), s), bf16_pair_product(fp4_pair<2>(v[i]), s),
                          bf16_pair_product(fp4_pair<3>(v[i]), s));
            }
        }
    }

    /* `units` units from unit `first` of a row on against x, this lane's row of slots, asking for another
     * after each. */
    template <int ROWS, int FORMAT, class NEXT>
    __device__ __forceinline__ void run(float (&sum)[4], int first, int units, const __nv_bfloat16 *x, int stride8,
                                        NEXT &&next)
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
            piece<ROWS, FORMAT>(a, b, low, scale.x, x, stride8);
            piece<ROWS, FORMAT>(a, b, high, scale.y, x + COLS / 2, stride8);
            ask(next);
        }
        for (int i = 0; i < 4; i++) sum[i] = a[i] + b[ROWS <= 2 ? i ^ 2 : i];
    }

    /* Units of a matrix of `format` against slots [ROWS][used][stride]. Lanes 0..3 get the sums of columns
     * 2 t and 2 t + 1 of row 0, with ROWS 4 of row 2 too in [2], [3]; lanes 16..19 those of rows 1 and 3 where there are such.
     * quantized: of the fourth slot, else of the others. */
    template <int ROWS, class NEXT>
    __device__ __forceinline__ void work(float (&sum)[4], int format, share s, const __nv_bfloat16 *slots, int stride,
                                         int used, bool quantized, NEXT &&next)
    {
        int g = threadIdx.x % LANES / 4, stride8 = (ROWS > 2 ? 2 * used : 8) * stride;
        bool counts = quantized == (g % SLOTS == SLOTS - 1);
        const __nv_bfloat16 *x = lane_slot<ROWS>(slots, stride, used);
        if (KINDS == TILED || ((KINDS & TILED) && format == WEIGHT_NVFP4))
            run<ROWS, WEIGHT_NVFP4>(sum, s.first, s.n, x, stride8, next);
        else if (format == WEIGHT_BF16)
            run<ROWS, WEIGHT_BF16>(sum, s.first, s.n, x, stride8, next);
        else
            run<ROWS, WEIGHT_FP8>(sum, s.first, s.n, x, stride8, next);
        collect<ROWS>(sum, counts);
    }

    template <int ROWS> static __device__ __forceinline__ void collect(float (&sum)[4], bool counts)
    {
#pragma unroll
        for (int k = 0; k < (ROWS > 2 ? 4 : 2); k++) {
            sum[k] = counts ? sum[k] : 0;
            sum[k] += __shfl_xor_sync(ALL, sum[k], 4);
            sum[k] += __shfl_xor_sync(ALL, sum[k], 8);
        }
    }

    /* work() on a tile of NVFP4 that lies in shared memory as it does in device memory; for one row. */
    static __device__ __forceinline__ void work_tile(float (&sum)[4], const uint8_t *tile, share s, const __nv_bfloat16 *slots,
                                                     int stride, bool quantized)
    {
        int lane = threadIdx.x % LANES, slot = lane / 4 % SLOTS;
        const __nv_bfloat16 *x = slots + slot * stride + s.first * FP4_UNIT_COLS + lane % 4 * 8;
        float a[4] = {}, b[4] = {};
        tile += s.first * FP4_UNIT_BYTES;
#pragma unroll 1
        for (int u = 0; u < s.n; u++, x += FP4_UNIT_COLS, tile += FP4_UNIT_BYTES) {
            uint4 low = *(const uint4 *)(tile + lane * 16), high = *(const uint4 *)(tile + 512 + lane * 16);
            uint2 scale = *(const uint2 *)(tile + 1024 + lane / 2 * 8);
            piece<1, WEIGHT_NVFP4>(a, b, low, scale.x, x, 0);
            piece<1, WEIGHT_NVFP4>(a, b, high, scale.y, x + FP4_UNIT_COLS / 2, 0);
        }
        for (int i = 0; i < 4; i++) sum[i] = a[i] + b[i ^ 2];
        collect<1>(sum, quantized == (slot == SLOTS - 1));
    }
};

/* What a sum is multiplied by. number: of the matrices that follow m. */
__device__ __forceinline__ float unit_of(const cuda_matrix &m, int64_t number, int row, float global)
{
    return m.format == WEIGHT_FP8 ? m.scale[number * m.rows + row] : m.format == WEIGHT_NVFP4 ? FP4_UNIT / global : 1;
}

} /* namespace */
#endif
