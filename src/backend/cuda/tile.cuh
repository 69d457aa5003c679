/* Products of many rows: tiles of 128 weight rows by up to 128 rows of activations, on the tensor cores. Weights are the
 * instruction's sixteen rows, decoded in registers from what lies in the checkpoint, activations its eight columns, in
 * BF16 in shared memory; both arrive through a ring of asynchronous copies. Sums are f32 and meet in shared memory, from
 * where they are scaled and stored row by row.
 *
 * Inputs. An f32 activation is rounded to BF16, or, where the backend must not round, is the sum of three BF16 numbers
 * that are multiplied one after the other (parts). E4M3 inputs are BF16 numbers as they are.
 *
 * Order of columns. Within 64 columns lane t of four takes weight columns 16 t to 16 t + 15, so that it reads its weights
 * in one piece, and one FP4 group is its own. Activations are stored in the order in which the instruction meets them:
 * column 16 t + 4 s + 2 h + j at place 16 s + 8 h + 2 t + j. */
#ifndef BACKEND_CUDA_TILE_CUH
#define BACKEND_CUDA_TILE_CUH
#include "backend/cuda/device.cuh"
#include "backend/cuda/prefill.h"

namespace {

constexpr int TILE_ROWS = 128, TILE_K = 64, OUT_STRIDE = TILE_ROWS + 4, UP_ROWS = TILE_ROWS / 2;

__host__ __device__ constexpr int tile_place(int column)
{
    return (column & ~63) | (column % 16 / 4 * 16 + column % 4 / 2 * 8 + column % 64 / 16 * 2 + column % 2);
}

/* TOKENS: rows of activations of a tile. Shared memory: stages of [activations][weights][group scales]; in the end
 * f32 [TOKENS][OUT_STRIDE]. */
template <int FORMAT, int TOKENS> struct tile {
    static constexpr int ROW = FORMAT == WEIGHT_BF16 ? 128 : FORMAT == WEIGHT_FP8 ? 64 : 32; /* bytes of 64 columns */
    static constexpr int X = TOKENS * TILE_K * 2, W = TILE_ROWS * ROW, S = FORMAT == WEIGHT_NVFP4 ? TILE_ROWS * 4 : 0;
    static constexpr int STAGE = X + W + S;
    static constexpr int STAGES = TOKENS > 32 ? (FORMAT == WEIGHT_BF16 ? 3 : 4)
                                : FORMAT == WEIGHT_BF16 ? 4 : FORMAT == WEIGHT_FP8 ? 6 : 8;
    static constexpr int SIDES = TOKENS > 32 ? 2 : 1; /* warps side by side along the activations */
    static constexpr int MT = SIDES, NT = TOKENS / 8 / SIDES;
    static constexpr int OUT = TOKENS * OUT_STRIDE * 4;
    static constexpr int SHARED = STAGE * STAGES > OUT ? STAGE * STAGES : OUT;
    static constexpr int WN = W / 16 / THREADS, XN = X / 16 / THREADS;
};

__device__ __forceinline__ void load_matrices(uint32_t (&b)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(at)
                 : "memory");
}

/* A lane's 16 columns of weight rows g and g + 8 of sixteen. */
template <int FORMAT> struct weight_rows {
    uint4 w[2][FORMAT == WEIGHT_BF16 ? 2 : 1];
    __nv_bfloat162 scale[2];

    __device__ __forceinline__ void load(const uint8_t *rows, const uint8_t *scales, int row, int t)
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int r = row + 8 * h;
            if constexpr (FORMAT == WEIGHT_BF16) {
                for (int i = 0; i < 2; i++) w[h][i] = *(const uint4 *)(rows + r * 128 + ((2 * t + i) ^ (r & 7)) * 16);
            } else if constexpr (FORMAT == WEIGHT_FP8) {
                w[h][0] = *(const uint4 *)(rows + r * 64 + t * 16);
            } else {
                uint2 v = *(const uint2 *)(rows + r * 32 + t * 8);
                w[h][0] = make_uint4(v.x, v.y, 0, 0);
                uint32_t code = scales[r * 4 + t];
                __nv_bfloat162 s = fp4_scale(code & 0x7f);
                scale[h] = code & 0x80 ? __hneg2(s) : s;
            }
        }
    }

    /* Columns of step s of four: a[h] and a[2 + h] of row g + 8 h. */
    template <int S> __device__ __forceinline__ void decode(uint32_t (&a)[4]) const
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if constexpr (FORMAT == WEIGHT_BF16) {
                const uint4 &v = w[h][S / 2];
                a[h] = S % 2 ? v.z : v.x;
                a[2 + h] = S % 2 ? v.w : v.y;
            } else if constexpr (FORMAT == WEIGHT_FP8) {
                const uint4 &v = w[h][0];
                uint32_t word = S == 0 ? v.x : S == 1 ? v.y : S == 2 ? v.z : v.w;
                a[h] = fp8_pair(word, 0);
                a[2 + h] = fp8_pair(word, 2);
            } else {
                uint32_t word = S / 2 ? w[h][0].y : w[h][0].x;
                a[h] = bf16_pair_product(fp4_pair<S % 2 * 2>(word), scale[h]);
                a[2 + h] = bf16_pair_product(fp4_pair<S % 2 * 2 + 1>(word), scale[h]);
            }
        }
    }
};

/* What a thread copies of every 64 columns: 16-byte pieces of weight rows and of activations. */
template <class T> struct tile_loader {
    const uint8_t *w[T::WN], *x[T::XN], *groups;
    unsigned w_valid, x_valid;
    bool group_valid;
    uint32_t w_to, x_to, groups_to;
};

/* Sums of one tile into f32 [tokens][OUT_STRIDE] in shared memory. Source: weights of local row r by
 * const uint8_t *row(r) and groups(r), NULL past the last; activations of local token i by x(i), NULL past the last.
 * steps: 64 columns each, `parts` times over the weights. All threads; ends with a meeting. */
template <int FORMAT, int TOKENS, class Source>
__device__ __forceinline__ void tile_sums(uint8_t *shared, const Source &source, int steps, int parts, int tokens)
{
    using T = tile<FORMAT, TOKENS>;
    int tid = threadIdx.x, warp = tid / LANES, lane = tid % LANES, g = lane / 4, t = lane % 4;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    tile_loader<T> l;
    constexpr int PIECES = T::ROW / 16;
    l.w_valid = l.x_valid = 0;
#pragma unroll
    for (int i = 0; i < T::WN; i++) {
        int row = (tid + i * THREADS) / PIECES, piece = (tid + i * THREADS) % PIECES;
        const uint8_t *from = source.row(row);
        l.w_valid |= (from ? 1u : 0u) << i;
        l.w[i] = from ? from + piece * 16 : source.any();
        if (i == 0) l.w_to = T::X + row * T::ROW + (FORMAT == WEIGHT_BF16 ? piece ^ (row & 7) : piece) * 16;
    }
    int x_row = tid / 8, x_piece = tid % 8;
    l.x_to = x_row * 128 + (x_piece ^ (x_row & 7)) * 16;
#pragma unroll
    for (int i = 0; i < T::XN; i++) {
        const __nv_bfloat16 *from = x_row + 32 * i < tokens ? source.x(x_row + 32 * i) : nullptr;
        l.x_valid |= (from ? 1u : 0u) << i;
        l.x[i] = from ? (const uint8_t *)(from + x_piece * 8) : source.any();
    }
    l.group_valid = false;
    l.groups = source.any();
    l.groups_to = T::X + T::W + tid * 4;
    if (FORMAT == WEIGHT_NVFP4 && tid < TILE_ROWS && source.row(tid)) {
        l.groups = source.groups(tid);
        l.group_valid = true;
    }
    int asked = 0, k = 0, total = steps * parts;
    auto request = [&](int slot) {
        uint32_t at = base + slot * T::STAGE;
        if (asked < total) {
#pragma unroll
            for (int i = 0; i < T::XN; i++) {
                copy_async16(at + l.x_to + i * 4096, l.x[i], l.x_valid >> i & 1);
                if (l.x_valid >> i & 1) l.x[i] += 128;
            }
#pragma unroll
            for (int i = 0; i < T::WN; i++) {
                copy_async16(at + l.w_to + i * 4096, l.w[i], l.w_valid >> i & 1);
                if (l.w_valid >> i & 1) l.w[i] += T::ROW;
            }
            if (FORMAT == WEIGHT_NVFP4 && tid < TILE_ROWS) {
                copy_async4(at + l.groups_to, l.groups, l.group_valid);
                if (l.group_valid) l.groups += 4;
            }
            if (++k == steps) {
                k = 0;
#pragma unroll
                for (int i = 0; i < T::WN; i++)
                    if (l.w_valid >> i & 1) l.w[i] -= steps * T::ROW;
                if (l.group_valid) l.groups -= steps * 4;
            }
            asked++;
        }
        copy_commit();
    };
    float acc[T::MT][T::NT][4];
#pragma unroll
    for (int m = 0; m < T::MT; m++)
#pragma unroll
        for (int n = 0; n < T::NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
    int side = warp % T::SIDES, row0 = warp / T::SIDES * 16 * T::MT;
    /* an eighth of the tile's activations belongs to this warp if it is one of the tile's at all */
    int mine = ((tokens + 7) / 8 - side + T::SIDES - 1) / T::SIDES;
    for (int s = 0; s < T::STAGES - 1; s++) request(s);
    int slot = 0, next = T::STAGES - 1;
    for (int step = 0; step < total; step++) {
        copy_wait<T::STAGES - 2>();
        __syncthreads();
        request(next);
        next = next + 1 == T::STAGES ? 0 : next + 1;
        const uint8_t *stage = shared + slot * T::STAGE;
        uint32_t x_at = base + slot * T::STAGE + side * 1024 + (lane & 7) * 128;
        weight_rows<FORMAT> w[T::MT];
#pragma unroll
        for (int m = 0; m < T::MT; m++) w[m].load(stage + T::X, stage + T::X + T::W, row0 + m * 16 + g, t);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t a[T::MT][2][4];
#pragma unroll
            for (int m = 0; m < T::MT; m++) {
                if (half == 0) {
                    w[m].template decode<0>(a[m][0]);
                    w[m].template decode<1>(a[m][1]);
                } else {
                    w[m].template decode<2>(a[m][0]);
                    w[m].template decode<3>(a[m][1]);
                }
            }
            uint32_t piece = (((uint32_t)half * 4 + lane / 8) ^ (lane & 7)) * 16;
#pragma unroll
            for (int n = 0; n < T::NT; n++) {
                if (n >= mine) break;
                uint32_t b[4];
                load_matrices(b, x_at + n * T::SIDES * 1024 + piece);
#pragma unroll
                for (int m = 0; m < T::MT; m++) {
                    mma(acc[m][n], a[m][0][0], a[m][0][1], a[m][0][2], a[m][0][3], b[0], b[1]);
                    mma(acc[m][n], a[m][1][0], a[m][1][1], a[m][1][2], a[m][1][3], b[2], b[3]);
                }
            }
        }
        slot = slot + 1 == T::STAGES ? 0 : slot + 1;
    }
    copy_wait<0>();
    __syncthreads();
    float *out = (float *)shared;
#pragma unroll
    for (int n = 0; n < T::NT; n++) {
        if (n >= mine) break;
        int token = (n * T::SIDES + side) * 8 + 2 * t;
#pragma unroll
        for (int m = 0; m < T::MT; m++) {
            float *to = out + token * OUT_STRIDE + row0 + m * 16 + g;
            to[0] = acc[m][n][0];
            to[OUT_STRIDE] = acc[m][n][1];
            to[8] = acc[m][n][2];
            to[OUT_STRIDE + 8] = acc[m][n][3];
        }
    }
    __syncthreads();
}

/* Of a weight, what all its sums are multiplied by; FP8 weights have one a row besides. */
__device__ __forceinline__ float matrix_unit(int format, float global)
{
    return format == WEIGHT_NVFP4 ? FP4_UNIT / global : 1;
}

} /* namespace */
#endif
