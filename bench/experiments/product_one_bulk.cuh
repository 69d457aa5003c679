/* Products of one row (compute capability 9.0). Memory gives its all to long pieces only: what 512 threads copy 16 bytes at a
 * time, 128 bytes of a row, comes at four fifths of the speed of bulk copies (docs/performance.md). So a block has a ring of
 * stages: of the eight rows of a tile 2 KB each, asked for by a thread of eight warps, read by all. Warp w multiplies share w of a tile's
 * columns, as in stream.cuh and with its sums to the bit.
 *
 * Rows lie STAGE_ROW bytes apart, so that the lanes that read at once, 64 bytes of two rows, find them in different banks. */
#ifndef BACKEND_CUDA_PRODUCT_ONE_CUH
#define BACKEND_CUDA_PRODUCT_ONE_CUH
#include "backend/cuda/barrier.cuh"
#include "backend/cuda/product.cuh"

namespace {

constexpr int PIECE_BYTES = 2048, STAGE_ROW = PIECE_BYTES + 64, STAGE = 8 * STAGE_ROW;
constexpr int STAGES_MOST = 5, ONE_CHUNK = 16;  /* tiles between meetings */
constexpr int ONE_SUMS = CREW * ONE_CHUNK * 8; /* floats */

__host__ __device__ inline size_t one_shared(int stages, int cols)
{
    return (size_t)stages * STAGE + ONE_SUMS * sizeof(float) + (size_t)SLOTS * slot_stride(cols) * 2;
}

#if __CUDA_ARCH__ >= 900
/* What one thread asks for: a row of every stage, tile after tile. */
struct row_ahead {
    const product_args &p;
    const uint8_t *at;
    int left, number; /* bytes of the row; of the tile asked for next */

    __device__ __forceinline__ explicit row_ahead(const product_args &args) : p(args), at(nullptr), left(0), number(blockIdx.x)
    {
    }

    __device__ __forceinline__ void ask(int row, uint8_t *stage, uint64_t *come)
    {
        if (left == 0) {
            if (number >= p.tiles) return;
            int k = matrix_of(p, number);
            const product_matrix &m = p.m[k];
            left = m.row_bytes;
            at = m.data + (uint64_t)tile_within(p, k, number) * m.tile + row * left;
            number += gridDim.x;
        }
        barrier_expect(come, PIECE_BYTES);
        copy_bulk(shared_at(stage + row * STAGE_ROW), at, PIECE_BYTES, come);
        at += PIECE_BYTES;
        left -= PIECE_BYTES;
    }
};

/* mma() of numbers in F16. */
__device__ __forceinline__ void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Bytes `low` and `low + 1` of a word of E4M3, as F16. */
__device__ __forceinline__ uint32_t fp8_half_pair(uint32_t word, int low)
{
    __half2_raw h = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)(word >> 8 * low), __NV_E4M3);
    return *reinterpret_cast<uint32_t *>(&h);
}

/* 16 columns of FP8 against a quantized input, both of which are F16 numbers: one instruction makes two of them. */
__device__ __forceinline__ void piece_half(float (&a)[4], float (&b)[4], uint4 w, const __nv_bfloat16 *x)
{
    uint32_t v[4] = { w.x, w.y, w.z, w.w };
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 low = *(const uint4 *)(x + i * 8);
        mma_half(a, low.x, low.y, low.z, low.w, fp8_half_pair(v[2 * i], 0), fp8_half_pair(v[2 * i], 2));
        mma_half(b, low.x, low.y, low.z, low.w, fp8_half_pair(v[2 * i + 1], 0), fp8_half_pair(v[2 * i + 1], 2));
    }
}

/* A lane's part of `units` units, `from` on, against x. */
template <int FORMAT>
__device__ __forceinline__ void share_of_stage(float (&a)[4], float (&b)[4], const uint8_t *from, int units,
                                               const __nv_bfloat16 *x)
{
    constexpr int COLS = unit_cols(FORMAT);
#pragma unroll 2
    for (int u = 0; u < units; u++, from += UNIT_BYTES, x += COLS) {
        uint4 low = *(const uint4 *)from, high = *(const uint4 *)(from + PIECE);
        if (FORMAT == WEIGHT_FP8) {
            piece_half(a, b, low, x);
            piece_half(a, b, high, x + COLS / 2);
        } else {
            stream<WHOLE, 1>::piece<1, FORMAT>(a, b, low, 0, x, 0);
            stream<WHOLE, 1>::piece<1, FORMAT>(a, b, high, 0, x + COLS / 2, 0);
        }
    }
}

/* A thread an output of tiles [first, first + count) of this block; a meeting of the block in between, before which
 * everything but the sums is fetched. sums: [share][tile of the chunk][8] */
__device__ __forceinline__ void store_one(const product_args &p, const float *sums, int first, int count, float input_scale)
{
    int col = threadIdx.x % 8, c = threadIdx.x / 8, number = blockIdx.x + (first + c) * gridDim.x;
    bool mine = c < count;
    int k = mine ? matrix_of(p, number) : 0, r = mine ? tile_within(p, k, number) * 8 + col : 0;
    const product_matrix &m = p.m[k];
    mine = mine && r < m.rows;
    float unit = m.unit, old = 0, sum = 0;
    if (mine && m.scale) unit = m.scale[r];
    if (mine && p.add.data) old = __ldcg(p.add.data + r);
    __syncthreads();
    if (!mine) return;
#pragma unroll
    for (int share = 0; share < CREW; share++) sum += sums[share * ONE_CHUNK * 8 + threadIdx.x];
    if (m.quantized) sum *= input_scale;
    float y = sum * unit;
    m.out[r] = y;
    if (p.add.data) p.add.data[r] = old + y;
}
#endif

/* Shared memory: stages, sums, slots [SLOTS][stride]. */
__global__ void __launch_bounds__(BLOCK, 2) one_product(const __grid_constant__ product_args p, int stages)
{
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float scratch[2 * CREW], input_scale;
    __shared__ uint64_t come[STAGES_MOST], gone[STAGES_MOST];
    float *sums = (float *)(shared + stages * STAGE);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + ONE_SUMS);
    int stride = slot_stride(p.cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4 % SLOTS;
    int tiles = p.each + ((int)blockIdx.x < p.extra);
    if (!p.conv) let_next_start();
    bool asks = threadIdx.x < 8 * LANES && lane == 0; /* for row `warp` of every stage */
    row_ahead ahead(p);
    if ((int)threadIdx.x < stages) {
        barrier_init(&come[threadIdx.x], 8);
        barrier_init(&gone[threadIdx.x], CREW);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
#pragma unroll 1
    for (int i = 0; asks && i < stages; i++) ahead.ask(warp, shared + i * STAGE, &come[i]);
    float2 gain[GAINS];
    load_gains(p, gain);
    put_padding(slots, stride, p.cols, threadIdx.x, BLOCK);
    wait_for_previous();
    if (p.conv) let_next_start(); /* which may count on the kernel that wrote the states */
    make_input<true>(p, slots, stride, 0, gain, scratch, &input_scale);
    __syncthreads();
    const __nv_bfloat16 *x = slots + g * stride + warp * (p.cols / CREW);
    int number = blockIdx.x, end = 0, units = 0, mine = 0, pieces = 0, offset = 0, slot = 0, phase = 0;
    bool fp8 = false, counts = false;
#pragma unroll 1
    for (int first = 0; first < tiles; first += ONE_CHUNK) {
        int left = tiles - first, count = left < ONE_CHUNK ? left : ONE_CHUNK;
#pragma unroll 1
        for (int i = 0; i < count; i++, number += gridDim.x) {
            float a[4] = {}, b[4] = {};
            if (number >= end) {
                const product_matrix &m = p.m[matrix_of(p, number)];
                int begin = warp * m.each * UNIT_BYTES;
                units = m.each;
                pieces = m.row_bytes / PIECE_BYTES;
                mine = begin / PIECE_BYTES;
                offset = lane / 4 * STAGE_ROW + begin % PIECE_BYTES + lane % 4 * 16;
                fp8 = m.format == WEIGHT_FP8;
                counts = m.quantized == (g == SLOTS - 1);
                end = m.end;
            }
#pragma unroll 1
            for (int piece = 0; piece < pieces; piece++) {
                uint8_t *stage = shared + slot * STAGE;
                barrier_wait(&come[slot], phase);
                if (piece == mine) {
                    if (fp8)
                        share_of_stage<WEIGHT_FP8>(a, b, stage + offset, units, x + lane % 4 * 16);
                    else
                        share_of_stage<WEIGHT_BF16>(a, b, stage + offset, units, x + lane % 4 * 8);
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(&gone[slot]);
                if (asks) {
                    barrier_wait(&gone[slot], phase);
                    ahead.ask(warp, stage, &come[slot]);
                }
                if (++slot == stages) slot = 0, phase ^= 1;
            }
            float sum[4] = { a[0] + b[2], a[1] + b[3] };
            stream<WHOLE, 1>::collect<1>(sum, counts);
            if (lane < 4) *(float2 *)(sums + (warp * ONE_CHUNK + i) * 8 + lane * 2) = make_float2(sum[0], sum[1]);
        }
        store_one(p, sums, first, count, input_scale);
        if (first + ONE_CHUNK < tiles) __syncthreads();
    }
    if (p.conv) advance_conv(p);
#endif
}

/* How many stages a block has; 0: these are not products for this kernel. Whole shares of whole units, each within a stage; FP8
 * only against quantized inputs. */
inline int one_stages(const struct queue *q, const product_args &a)
{
    int stages = STAGES_MOST;
    if (!q->has_pdl || a.kinds != WHOLE) return 0;
    for (int i = 0; i < a.n; i++) {
        const product_matrix &m = a.m[i];
        int share = m.each * UNIT_BYTES;
        if (m.units % CREW != 0 || a.cols % unit_cols(m.format) != 0 || PIECE_BYTES % share != 0 ||
            m.quantized != (m.format == WEIGHT_FP8))
            return 0;
    }
    size_t room = (size_t)q->shared_max < LEFT_SHARED ? (size_t)q->shared_max : LEFT_SHARED;
    while (stages > 0 && one_shared(stages, a.cols) > room) stages--;
    return stages;
}

inline void start_one(struct queue *q, const char *operation, unsigned grid, const product_args &a)
{
    int stages = one_stages(q, a);
    launch_side<BLOCK>(q, operation, q->side == LEFT ? RIGHT : LEFT, one_product, dim3(grid), one_shared(stages, a.cols), a,
                       stages);
}

} /* namespace */
#endif
