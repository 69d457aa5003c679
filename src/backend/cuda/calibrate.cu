/* What calibration learns: largest magnitudes, and sums of products of columns. The experts' products are those of any
 * prefill, of as many experts at a time as the scratch has columns for.
 *
 * Moments are f32 products and sums on the plain cores: 128 x 128 outputs a block, 8 x 8 a thread, the rows passing by 16 at
 * a time through two buffers. Blocks below the diagonal are not computed. */
#include "backend/cuda/device.cuh"
#include "backend/cuda/prefill.h"
extern "C" {
#include "backend/fused.h"
}

namespace {

constexpr int TILE = 128, DEPTH = 16, EACH = 8; /* outputs of a side, rows at a time, outputs of a thread's side */

__device__ __forceinline__ void note_largest(uint32_t *top, uint32_t most)
{
    most = __reduce_max_sync(ALL, most);
    if (threadIdx.x % LANES == 0 && most) atomicMax(top, most);
}

__device__ __forceinline__ uint32_t magnitude(float x)
{
    return __float_as_uint(x) & 0x7fffffffu;
}

/* Grid: columns, rows by the height of the grid. */
__global__ void largest(uint32_t *top, mat x)
{
    int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    uint32_t most = 0;
    for (int64_t r = blockIdx.y; r < x.rows && c < x.cols; r += gridDim.y) most = max(most, magnitude(x.data[r * x.stride + c]));
    note_largest(top, most);
}

/* gate = SiLU(gate) up, and the largest of every expert. Grid: parts of an expert's columns, rows, experts. */
__global__ void gated_largest(uint32_t *top, mat gate, mat up, int inner)
{
    int c = blockIdx.x * THREADS + threadIdx.x, at = blockIdx.z * inner + c;
    uint32_t most = 0;
    for (int64_t r = blockIdx.y; r < gate.rows && c < inner; r += gridDim.y) {
        float h = silu(gate.data[r * gate.stride + at]) * up.data[r * up.stride + at];
        gate.data[r * gate.stride + at] = h;
        most = max(most, magnitude(h));
    }
    note_largest(top + blockIdx.z, most);
}

struct moments_args {
    float *h;   /* [sets][n][n] */
    mat x;      /* set s reads columns from s * n */
    int n, tiles; /* of a side */
};

/* Four columns of a row; zeros beyond the matrix. */
__device__ __forceinline__ float4 load_columns(const moments_args &a, const float *x, int64_t row, int c)
{
    float v[4] = {};
    const float *from = x + row * a.x.stride + c;
    if (row >= a.x.rows) return make_float4(0, 0, 0, 0);
    if (c + 3 < a.n && (uintptr_t)from % 16 == 0) return *(const float4 *)from;
    for (int i = 0; i < 4; i++)
        if (c + i < a.n) v[i] = from[i];
    return make_float4(v[0], v[1], v[2], v[3]);
}

/* Grid: tiles on and above the diagonal, sets. A thread has rows and columns 4 t to 4 t + 3 and 64 beyond. */
__global__ void __launch_bounds__(THREADS, 2) add_moments(const __grid_constant__ moments_args a)
{
    __shared__ float4 left[2][DEPTH][TILE / 4], right[2][DEPTH][TILE / 4];
    int i0 = 0, left_over = blockIdx.x;
    while (left_over >= a.tiles - i0) left_over -= a.tiles - i0++;
    int j0 = (i0 + left_over) * TILE;
    i0 *= TILE;
    const float *x = a.x.data + (int64_t)blockIdx.y * a.n;
    int lane = threadIdx.x % (TILE / 4), depth = threadIdx.x / (TILE / 4), ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    constexpr int STEP = THREADS / (TILE / 4), LOADS = DEPTH / STEP;
    float sum[EACH][EACH] = {};
    float4 l[LOADS], r[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        left[0][depth + k * STEP][lane] = load_columns(a, x, depth + k * STEP, i0 + 4 * lane);
        right[0][depth + k * STEP][lane] = load_columns(a, x, depth + k * STEP, j0 + 4 * lane);
    }
    __syncthreads();
    for (int64_t at = 0, turn = 0; at < a.x.rows; at += DEPTH, turn ^= 1) {
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            l[k] = load_columns(a, x, at + DEPTH + depth + k * STEP, i0 + 4 * lane);
            r[k] = load_columns(a, x, at + DEPTH + depth + k * STEP, j0 + 4 * lane);
        }
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            float4 u[2] = { left[turn][k][ty], left[turn][k][ty + 16] }, v[2] = { right[turn][k][tx], right[turn][k][tx + 16] };
            const float *p = (const float *)u, *q = (const float *)v;
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[i][j] = fmaf(p[i], q[j], sum[i][j]);
        }
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            left[turn ^ 1][depth + k * STEP][lane] = l[k];
            right[turn ^ 1][depth + k * STEP][lane] = r[k];
        }
        __syncthreads();
    }
    float *h = a.h + (int64_t)blockIdx.y * a.n * a.n;
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            int row = i0 + i / 4 * 64 + 4 * ty + i % 4, column = j0 + j / 4 * 64 + 4 * tx + j % 4;
            if (row < a.n && column < a.n) h[(int64_t)row * a.n + column] += sum[i][j];
        }
}

/* x's columns are those of `sets` matrices of n side by side. */
void moments(struct queue *q, float *h, struct mat x, int n, int sets)
{
    int tiles = (int)blocks(n, TILE);
    moments_args a = { h, x, n, tiles };
    if (x.rows > 0) launch(q, "moments", false, add_moments, dim3(tiles * (tiles + 1) / 2, sets), 0, a);
}

unsigned height(int64_t rows)
{
    return (unsigned)(rows < 64 ? rows : 64);
}

/* The matrices of k experts from `first` on as one. */
cuda_matrix tall(const cuda_experts *e, int part, int first, int k)
{
    cuda_matrix m = e->m[part];
    m.data = (const char *)m.data + (int64_t)first * m.rows * m.cols * 2;
    m.rows *= k;
    return m;
}

} /* namespace */

void cuda_absmax(struct queue *q, uint32_t *top, struct mat x)
{
    launch(q, "absmax", false, largest, dim3(blocks(x.cols), height(x.rows)), 0, top, x);
}

void cuda_moments(struct queue *q, float *h, struct mat x)
{
    moments(q, h, x, (int)x.cols, 1);
}

void cuda_observe(struct queue *q, const struct observation *o, struct mat x, const struct experts *list)
{
    const cuda_experts *e = (const cuda_experts *)list->bound;
    int inner = e->m[GATE].rows, most = (int)(o->gate.cols / inner);
    bool is_plain = e->m[GATE].format == WEIGHT_BF16 && e->m[UP].format == WEIGHT_BF16;
    for (int first = 0, k; first < e->n; first += k) {
        k = e->n - first < most ? e->n - first : most;
        struct mat gate = o->gate, up = o->up;
        gate.rows = up.rows = x.rows;
        gate.cols = up.cols = (int64_t)k * inner;
        cuda_products p = {};
        p.x = x;
        p.n = 2;
        p.out[0] = gate;
        p.out[1] = up;
        p.m[0] = tall(e, GATE, first, k);
        p.m[1] = tall(e, UP, first, k);
        if (!is_plain || !cuda_dense(q, &p)) {
            fused_observe(&cuda_ops, q, o, x, list);
            return;
        }
        launch(q, "observe", false, gated_largest, dim3(blocks(inner), height(x.rows), k), 0, o->top + first, gate, up, inner);
        if (o->down) moments(q, o->down + (int64_t)first * inner * inner, gate, inner, k);
    }
    if (o->block) cuda_moments(q, o->block, x);
}
