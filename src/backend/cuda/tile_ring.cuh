/* Tiles of weights in a ring that the warps of a block share (compute capability 9.0): a tile's eight rows
 * follow one another in memory and come as one bulk copy. A warp multiplies its share of the columns, with
 * the sums of stream.cuh to the bit. Of 1 GB this reads 4.4 TB/s where copies of 16 bytes a lane read 3.5;
 * where a kernel has only a few tiles, what is asked for all at once holds up the loads that make its input.
 */
#ifndef BACKEND_CUDA_TILE_RING_CUH
#define BACKEND_CUDA_TILE_RING_CUH
#include "backend/cuda/barrier.cuh"
#include "backend/cuda/stream.cuh"

namespace {

/* Tiles of a ring, and bytes that they are to have where they are so small. */
constexpr int STAGES = 3, STAGES_MOST = 6, STAGES_BYTES = 96 * 1024;

__host__ __device__ inline int stages_of(int stage)
{
    int n = STAGES_BYTES / stage;
    return n < STAGES ? STAGES : n < STAGES_MOST ? n : STAGES_MOST;
}

#if __CUDA_ARCH__ >= 900

struct tile_ring {
    uint8_t *ring;
    uint64_t *full, *empty; /* [STAGES_MOST] */
    int stage, stages;      /* bytes of one, how many */
    ring_place next;        /* to be read */

    /* By one thread, before all else; others use it once they have met that one. */
    __device__ __forceinline__ void make() const
    {
        for (int i = 0; i < stages; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], CREW);
        }
        barriers_ready();
    }

    /* By one thread: a tile to a place that nobody reads. */
    __device__ __forceinline__ void ask(int slot, const uint8_t *tile, int bytes) const
    {
        barrier_expect(&full[slot], bytes);
        copy_bulk(shared_at(ring) + slot * stage, tile, bytes, &full[slot]);
    }

    __device__ __forceinline__ const uint8_t *wait() const
    {
        barrier_wait(&full[next.slot], next.phase);
        return ring + next.slot * stage;
    }

    /* This warp has read it. */
    __device__ __forceinline__ void leave() const
    {
        __syncwarp();
        if (threadIdx.x % LANES == 0) barrier_arrive(&empty[next.slot]);
    }

    /* All warps have. */
    __device__ __forceinline__ void wait_for_all() const
    {
        barrier_wait(&empty[next.slot], next.phase);
    }
};

/* Units s of a tile of rows as stored. Lanes of odd rows read the halves of a unit in the other order: rows
 * begin in the same bank. */
template <int ROWS, int FORMAT>
__device__ __forceinline__ void work_units(float (&sum)[4], const uint8_t *tile, int row_bytes, share s,
                                           const __nv_bfloat16 *x, int stride8)
{
    constexpr int COLS = unit_cols(FORMAT), LANE_COLS = FORMAT == WEIGHT_FP8 ? 16 : 8;
    using words = stream<WHOLE, 1>;
    int lane = threadIdx.x % LANES, place = lane % 4 * 16 + lane / 4 % 2 * PIECE;
    bool odd = lane & 4;
    float a[4] = {}, b[4] = {};
    x += s.first * COLS + lane % 4 * LANE_COLS;
    tile += lane / 4 * row_bytes + s.first * UNIT_BYTES;
#pragma unroll(FORMAT == WEIGHT_BF16 && ROWS <= 2 ? 2 : 1)
    for (int u = 0; u < s.n; u++, x += COLS, tile += UNIT_BYTES) {
        uint4 one = *(const uint4 *)(tile + place), other = *(const uint4 *)(tile + (place ^ PIECE));
        words::template piece<ROWS, FORMAT>(a, b, odd ? other : one, 0, x, stride8);
        words::template piece<ROWS, FORMAT>(a, b, odd ? one : other, 0, x + COLS / 2, stride8);
    }
    for (int i = 0; i < 4; i++) sum[i] = a[i] + b[ROWS <= 2 ? i ^ 2 : i];
}

/* As stream::work. */
template <int ROWS>
__device__ __forceinline__ void work_whole_tile(float (&sum)[4], int format, const uint8_t *tile,
                                                int row_bytes, share s, const __nv_bfloat16 *slots,
                                                int stride, int used, bool quantized)
{
    int g = threadIdx.x % LANES / 4, stride8 = (ROWS > 2 ? 2 * used : 8) * stride;
    const __nv_bfloat16 *x = lane_slot<ROWS>(slots, stride, used);
    if (format == WEIGHT_BF16)
        work_units<ROWS, WEIGHT_BF16>(sum, tile, row_bytes, s, x, stride8);
    else
        work_units<ROWS, WEIGHT_FP8>(sum, tile, row_bytes, s, x, stride8);
    stream<WHOLE, 1>::template collect<ROWS>(sum, quantized == (g % SLOTS == SLOTS - 1));
}

#endif

} /* namespace */
#endif
