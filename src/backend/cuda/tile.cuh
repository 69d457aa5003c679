/* Products of many rows: tiles of 128 weight rows by 32, 64 or 128 rows of activations, on the tensor cores. Weights are the
 * instruction's sixteen rows, decoded in registers from what lies in device memory, activations its eight columns, in
 * BF16 in shared memory; both arrive through a ring of asynchronous copies. Sums are f32 and meet in shared memory, from
 * where they are scaled and stored row by row.
 *
 * Inputs. An f32 activation is rounded to BF16, or, where the backend must not round, is the sum of three BF16 numbers
 * that are multiplied one after the other (parts). E4M3 inputs are BF16 numbers as they are.
 *
 * Order of columns. Of 32 columns lane t of four takes weight columns 8 t to 8 t + 7, as NVFP4 lies in memory (parts.h).
 * Activations are stored in the order in which the instruction meets them: tile_place. */
#ifndef BACKEND_CUDA_TILE_CUH
#define BACKEND_CUDA_TILE_CUH
#include "backend/cuda/matrices.cuh"
#include "backend/cuda/prefill.h"
#include "backend/cuda/wide.cuh"

namespace {

constexpr int TILE_ROWS = 128, TILE_K = 64, OUT_STRIDE = TILE_ROWS + 4, UP_ROWS = TILE_ROWS / 2;

/* Column 8 t + 4 s + 2 h + j of 32 lies at 16 s + 8 h + 2 t + j; and back. */
__host__ __device__ constexpr int tile_place(int column)
{
    return (column & ~31) | (column % 8 / 4 * 16 + column % 4 / 2 * 8 + column % 32 / 8 * 2 + column % 2);
}

__host__ __device__ constexpr int tile_column(int place)
{
    return (place & ~31) | (place % 8 / 2 * 8 + place % 32 / 16 * 4 + place % 16 / 8 * 2 + place % 2);
}

/* Bytes of 8 rows of NVFP4, of a row of the others, of a whole matrix. */
__host__ __device__ inline int tile_pitch(int format, int cols)
{
    if (format == WEIGHT_NVFP4) return (cols + 255) / 256 * 1152;
    return format == WEIGHT_BF16 ? 2 * cols : cols;
}

__host__ __device__ inline int64_t tile_matrix_bytes(int format, int rows, int cols)
{
    return (int64_t)(format == WEIGHT_NVFP4 ? (rows + 7) / 8 : rows) * tile_pitch(format, cols);
}

/* TOKENS: rows of activations of a tile. Shared memory: stages of activations, then of weights, which for NVFP4 hold 128
 * columns and serve two of the former, then of group scales; in the end f32 [TOKENS][OUT_STRIDE]. */
template <int FORMAT, int TOKENS> struct tile {
    static constexpr bool FP4 = FORMAT == WEIGHT_NVFP4;
    static constexpr int ROW = FORMAT == WEIGHT_BF16 ? 128 : 64; /* bytes of 64 columns, of NVFP4 of 128 */
    static constexpr int PACE = FP4 && TOKENS == 32 ? 2 : 1; /* steps of 64 columns from meeting to meeting */
    static constexpr int EVERY = FP4 ? 2 / PACE : 1;          /* stages of activations to one of weights */
    static constexpr int X1 = TOKENS * TILE_K * 2, X = X1 * PACE, W = TILE_ROWS * ROW, S = FP4 ? TILE_ROWS * 8 : 0;
    static constexpr int STAGES = TOKENS == 64 ? 8
                                : TOKENS > 32  ? (FORMAT == WEIGHT_BF16 ? 3 : 4)
                                               : (FORMAT == WEIGHT_FP8 ? 6 : 4);
    static constexpr int WSTAGES = (STAGES - 1 + EVERY - 1) / EVERY + 1;
    static constexpr int W_AT = X * STAGES, S_AT = W_AT + W * WSTAGES;
    static constexpr int SIDES = TOKENS > 32 ? 2 : 1; /* warps side by side along the activations */
    static constexpr int MT = SIDES, NT = TOKENS / 8 / SIDES;
    static constexpr int OUT = TOKENS * OUT_STRIDE * 4, RINGS = S_AT + S * WSTAGES;
    static constexpr int SHARED = RINGS > OUT ? RINGS : OUT;
    static constexpr int WN = W / 16 / THREADS, XN = X1 / 16 / THREADS;
};

/* What a tile is of. Local row r: row r % split of data[r / split], which has `rows` of them. Local token i: x's row
 * index[i], or i. */
struct tile_source {
    const uint8_t *data[2];
    int rows, split, pitch;
    const __nv_bfloat16 *x;
    int64_t x_stride;
    const int *index;
};

/* A lane's columns of weight rows g and g + 8 of sixteen: 16 of 64. */
template <int FORMAT> struct weight_rows {
    uint4 w[2][FORMAT == WEIGHT_BF16 ? 2 : 1];
    uint32_t scale[2];

    /* rows: the stage's; odd: of NVFP4 the second half of the stage */
    __device__ __forceinline__ void load(const uint8_t *rows, const uint8_t *scales, int row, int lane, int odd)
    {
        int t = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int r = row + lane / 4 + 8 * h;
            if constexpr (FORMAT == WEIGHT_BF16) {
                for (int i = 0; i < 2; i++)
                    w[h][i] = *(const uint4 *)(rows + r * 128 + ((t + 4 * i) ^ (r & 1) * 4) * 16);
            } else if constexpr (FORMAT == WEIGHT_FP8) {
                int flip = (r >> 1 & 1) * 32;
                uint2 a = *(const uint2 *)(rows + r * 64 + (t * 8 ^ flip)), b = *(const uint2 *)(rows + r * 64 + ((32 + t * 8) ^ flip));
                w[h][0] = make_uint4(a.x, a.y, b.x, b.y);
            } else {
                int unit = row / 8 + h;
                uint2 a = *(const uint2 *)(rows + unit * 512 + lane * 16 + odd * 8);
                w[h][0] = make_uint4(a.x, a.y, 0, 0);
                scale[h] = *(const uint16_t *)(scales + unit * 64 + lane / 2 * 4 + odd * 2);
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
                __nv_bfloat162 s = fp4_scales(scale[h]).of(S / 2);
                a[h] = bf16_pair_product(fp4_pair<S % 2 * 2>(word), s);
                a[2 + h] = bf16_pair_product(fp4_pair<S % 2 * 2 + 1>(word), s);
            }
        }
    }
};

/* What a thread copies: 16-byte pieces of activations and of weights, and four scales. */
template <int FORMAT, int TOKENS> struct tile_loader {
    using T = tile<FORMAT, TOKENS>;
    const uint8_t *w[T::WN], *x[T::XN], *groups;
    unsigned w_valid, x_valid;
    bool group_valid;
    uint32_t base, w_to, x_to, groups_to;
    int steps, k, part, x_slot, w_slot, left; /* k: step of 64 columns of the part asked for next */

    __device__ __forceinline__ tile_loader(uint32_t shared, const tile_source &s, int steps_of_a_part, int parts, int tokens)
    {
        int tid = threadIdx.x, piece = tid % 8, row = tid / 8;
        base = shared;
        steps = steps_of_a_part;
        left = steps * parts;
        k = x_slot = w_slot = 0;
        w_valid = x_valid = 0;
        x_to = row * 128 + (piece ^ (row & 7)) * 16;
#pragma unroll
        for (int i = 0; i < T::XN; i++) {
            int token = row + 32 * i;
            bool in = token < tokens;
            x_valid |= (unsigned)in << i;
            x[i] = in ? (const uint8_t *)(s.x + (s.index ? s.index[token] : token) * s.x_stride + piece * 8) : s.data[0];
        }
#pragma unroll
        for (int i = 0; i < T::WN; i++) w[i] = weight(s, tid + i * THREADS, i);
        int r = tid / 16 * 8;
        group_valid = T::FP4 && r % s.split < s.rows;
        groups = s.data[0];
        if (group_valid)
            groups = (r < s.split ? s.data[0] : s.data[1]) + (int64_t)(r % s.split / 8) * s.pitch + 1024 + tid % 16 * 8;
        groups_to = tid * 4;
    }

    /* Piece number `at` of the stage: where it comes from. */
    __device__ __forceinline__ const uint8_t *weight(const tile_source &s, int at, int i)
    {
        int r, piece;
        if (T::FP4) {
            r = at / 32 * 8;
            piece = at % 32;
            if (i == 0) w_to = at * 16;
        } else {
            r = at / (T::ROW / 16);
            piece = at % (T::ROW / 16);
            if (i == 0) w_to = r * T::ROW + (FORMAT == WEIGHT_BF16 ? piece ^ (r & 1) * 4 : piece ^ (r >> 1 & 1) * 2) * 16;
        }
        bool in = r % s.split < s.rows;
        w_valid |= (unsigned)in << i;
        int line = T::FP4 ? r % s.split / 8 : r % s.split;
        return in ? (r < s.split ? s.data[0] : s.data[1]) + (int64_t)line * s.pitch + piece * 16 : s.data[0];
    }

    __device__ __forceinline__ void request()
    {
        if (left > 0) {
            uint32_t at = base + x_slot * T::X + x_to;
#pragma unroll
            for (int i = 0; i < T::XN; i++)
#pragma unroll
                for (int half = 0; half < T::PACE; half++) {
                    copy_async16(at + half * T::X1 + i * 4096, x[i], x_valid >> i & 1);
                    if (x_valid >> i & 1) x[i] += 2 * TILE_K;
                }
            if (T::EVERY == 1 || k % 2 == 0) {
                int from = T::FP4 ? k / 4 * 1152 + k / 2 % 2 * 512 : k * T::ROW;
                at = base + T::W_AT + w_slot * T::W + w_to;
#pragma unroll
                for (int i = 0; i < T::WN; i++)
                    copy_async16(at + i * 4096, w[i] + (w_valid >> i & 1 ? from : 0), w_valid >> i & 1);
                if (T::FP4)
                    copy_async4(base + T::S_AT + w_slot * T::S + groups_to,
                                groups + (group_valid ? k / 4 * 1152 + k / 2 % 2 * 4 : 0), group_valid);
                w_slot = w_slot + 1 == T::WSTAGES ? 0 : w_slot + 1;
            }
            k += T::PACE;
            if (k == steps) k = 0;
            x_slot = x_slot + 1 == T::STAGES ? 0 : x_slot + 1;
            left -= T::PACE;
        }
        copy_commit();
    }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* tile_sums with the wide instruction: a warp's sixteen weight rows, N rows of activations. */
template <int FORMAT, int TOKENS, int N>
__device__ __forceinline__ void wide_sums(uint8_t *shared, const tile_source &source, int steps, int parts, int tokens)
{
    using T = tile<FORMAT, TOKENS>;
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    tile_loader<FORMAT, TOKENS> load(base, source, steps, parts, tokens);
    float acc[N / 8][4];
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[n][i] = 0;
    for (int s = 0; s < T::STAGES - 1; s++) load.request();
    int x_slot = 0, w_slot = 0, total = steps * parts;
    /* the weights of step s, once all have arrived */
    auto decode = [&](uint32_t (&a)[4][4], int s) {
        weight_rows<FORMAT> w;
        w.load(shared + T::W_AT + w_slot * T::W, shared + T::S_AT + w_slot * T::S, warp * 16, lane, s % 2);
        w.template decode<0>(a[0]);
        w.template decode<1>(a[1]);
        w.template decode<2>(a[2]);
        w.template decode<3>(a[3]);
        if (T::EVERY == 1 || s % 2) w_slot = w_slot + 1 == T::WSTAGES ? 0 : w_slot + 1;
    };
    /* the products of step s, and meanwhile the weights of the next */
    auto multiply = [&](const uint32_t (&a)[4][4], uint32_t (&next)[4][4], int s) {
        uint64_t x = wide_matrix(base + x_slot * T::X);
        wide_hold(acc);
        wide_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) wide_mma<N>(acc, a[k], x + k * WIDE_STEP);
        wide_commit();
        x_slot = x_slot + 1 == T::STAGES ? 0 : x_slot + 1;
        if (s + 1 < total) {
            copy_wait<T::STAGES - 3>();
            wide_show();
            __syncthreads();
            load.request();
            decode(next, s + 1);
        }
        wide_wait();
        wide_hold(acc);
    };
    uint32_t even[4][4], odd[4][4];
    copy_wait<T::STAGES - 2>();
    wide_show();
    __syncthreads();
    decode(even, 0);
#pragma unroll 1
    for (int s = 0; s < total; s += 2) {
        multiply(even, odd, s);
        if (s + 1 < total) multiply(odd, even, s + 1);
    }
    copy_wait<0>();
    __syncthreads();
    float *out = (float *)shared;
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        float *to = out + (n * 8 + 2 * t) * OUT_STRIDE + warp * 16 + g;
        to[0] = acc[n][0];
        to[OUT_STRIDE] = acc[n][1];
        to[8] = acc[n][2];
        to[OUT_STRIDE + 8] = acc[n][3];
    }
    __syncthreads();
}
#endif

/* Sums of one tile into f32 [tokens][OUT_STRIDE] at the begin of shared memory. steps: 64 columns each (of NVFP4 an even
 * number), `parts` times over the weights. All threads; ends with a meeting. */
template <int FORMAT, int TOKENS>
__device__ __forceinline__ void tile_sums(uint8_t *shared, const tile_source &source, int steps, int parts, int tokens)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (TOKENS == 128) {
        if (tokens > 96)
            wide_sums<FORMAT, TOKENS, 128>(shared, source, steps, parts, tokens);
        else if (tokens > 64)
            wide_sums<FORMAT, TOKENS, 96>(shared, source, steps, parts, tokens);
        else if (tokens > 32)
            wide_sums<FORMAT, TOKENS, 64>(shared, source, steps, parts, tokens);
        else
            wide_sums<FORMAT, TOKENS, 32>(shared, source, steps, parts, tokens);
        return;
    }
    if constexpr (TOKENS == 64) {
        if (tokens > 32)
            wide_sums<FORMAT, TOKENS, 64>(shared, source, steps, parts, tokens);
        else
            wide_sums<FORMAT, TOKENS, 32>(shared, source, steps, parts, tokens);
        return;
    }
#endif
    using T = tile<FORMAT, TOKENS>;
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    tile_loader<FORMAT, TOKENS> load(base, source, steps, parts, tokens);
    float acc[T::MT][T::NT][4];
#pragma unroll
    for (int m = 0; m < T::MT; m++)
#pragma unroll
        for (int n = 0; n < T::NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
    int side = warp % T::SIDES, row0 = warp / T::SIDES * 16 * T::MT;
    int mine = ((tokens + 7) / 8 - side + T::SIDES - 1) / T::SIDES; /* eights of tokens that are this warp's */
    for (int s = 0; s < T::STAGES - 1; s++) load.request();
    int x_slot = 0, w_slot = 0, total = steps * parts;
    weight_rows<FORMAT> w[T::MT];
    for (int step = 0; step < total; step += T::PACE) {
        copy_wait<T::STAGES - 2>();
        __syncthreads();
        load.request();
        const uint8_t *stage = shared + T::W_AT + w_slot * T::W, *scales = shared + T::S_AT + w_slot * T::S;
#pragma unroll
        for (int part = 0; part < 2 * T::PACE; part++) { /* 32 columns */
            int half = part % 2;
            uint32_t x_at = base + x_slot * T::X + part / 2 * T::X1 + side * 1024 + (lane & 7) * 128;
            if (half == 0)
#pragma unroll
                for (int m = 0; m < T::MT; m++)
                    w[m].load(stage, scales, row0 + m * 16, lane, T::PACE == 2 ? part / 2 : step % 2);
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
                matrices(b, x_at + n * T::SIDES * 1024 + piece);
#pragma unroll
                for (int m = 0; m < T::MT; m++) {
                    mma(acc[m][n], a[m][0][0], a[m][0][1], a[m][0][2], a[m][0][3], b[0], b[1]);
                    mma(acc[m][n], a[m][1][0], a[m][1][1], a[m][1][2], a[m][1][3], b[2], b[3]);
                }
            }
        }
        x_slot = x_slot + 1 == T::STAGES ? 0 : x_slot + 1;
        if (T::EVERY == 1 || step % 2) w_slot = w_slot + 1 == T::WSTAGES ? 0 : w_slot + 1;
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

/* Whether a matrix, read with these inputs, is one for tiles. */
inline bool tile_takes(const cuda_matrix &m, int64_t cols_most)
{
    int unit = m.format == WEIGHT_NVFP4 ? 2 * TILE_K : TILE_K;
    return (m.format == WEIGHT_BF16 || m.format == WEIGHT_FP8 || m.format == WEIGHT_NVFP4) && m.cols > 0 &&
           m.cols % unit == 0 && m.cols <= cols_most && (m.input == INPUT_AS_IS || m.input == INPUT_FP8_ROW);
}

} /* namespace */
#endif
