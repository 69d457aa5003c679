/* NVFP4 weights that meet NVFP4 inputs (W4A4), on FP4 tensor cores (fp4_mma.cuh), for any number of rows: dense products,
 * and experts with the picks in the order of their experts (grouped.cu).
 *
 * A row of inputs is quantized once, into records of 256 columns: 128 bytes of codes, then 16 of scales, padded with zeros.
 * A warp has eight rows of weights and up to 64 rows of inputs; a unit of weights (parts.h) is four instructions for each 16
 * of these. Weights are read once for 64 rows, inputs by every warp, from the caches.
 * Such weights keep their codes in columns' order, and a scale's sign is in its codes (plain.cu). */
#include "backend/cuda/fp4_mma.cuh"
#include "backend/cuda/prefill.h"

namespace {

constexpr int RECORD = 144, RECORD_SCALES = 128, TOKENS = 64, ENTRY = 4;

__host__ __device__ inline int records_of(int64_t cols)
{
    return (int)((cols + FP4_UNIT_COLS - 1) / FP4_UNIT_COLS);
}

__device__ __forceinline__ uint32_t e2m1_code(float x)
{
    float a = fabsf(x);
    uint32_t size = a <= 0.25f ? 0 : a < 0.75f ? 1 : a <= 1.25f ? 2 : a < 1.75f ? 3 : a <= 2.5f ? 4 : a < 3.5f ? 5 : a <= 5 ? 6 : 7;
    return x < 0 ? size | 8 : size;
}

/* As nvfp4_quantize_activations (num/nvfp4.h): a thread a group of 16, padding too. */
__global__ void quantize(uint8_t *out, mat x, float global, int records)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    int groups = records * 16, group = (int)(i % groups);
    int64_t row = i / groups;
    if (row >= x.rows) return;
    uint8_t *record = out + (row * records + group / 16) * RECORD;
    const float *in = x.data + row * x.stride + group * 16;
    float v[16], top = 0;
    bool real = group * 16 < x.cols;
    for (int k = 0; k < 16; k++) {
        v[k] = real ? __bfloat162float(__float2bfloat16_rn(in[k])) : 0;
        top = fmaxf(top, fabsf(v[k]));
    }
    uint8_t code = e4m3_code(global * (top * (1.0f / 6.0f)));
    float scale = e4m3_value(code), up = scale > 0 ? 1.0f / (scale * (1.0f / global)) : 0;
    uint2 codes = {};
    for (int k = 0; k < 8; k++) {
        codes.x |= e2m1_code(v[k] * up) << 4 * k;
        codes.y |= e2m1_code(v[k + 8] * up) << 4 * k;
    }
    *(uint2 *)(record + group % 16 * 8) = codes;
    record[RECORD_SCALES + group % 16] = code;
}

/* Rows of inputs, 16 a tile: lane 4 g + t reads rows g and g + 8 of each. */
template <int TILES> struct inputs {
    const uint8_t *row[TILES][2];
    int t;

    /* rows from `first` on, `count` of them, those behind the last like the last; index: where a row's input is, or NULL */
    __device__ inputs(const uint8_t *records, int64_t bytes, const int *index, int first, int count)
    {
        t = threadIdx.x % 4;
        for (int i = 0; i < 2 * TILES; i++) {
            int r = first + min(i / 2 * 16 + i % 2 * 8 + (int)threadIdx.x % LANES / 4, count - 1);
            row[i / 2][i % 2] = records + (index ? index[r] : r) * bytes;
        }
    }

    /* step: of 64 columns, of the record that begins at byte `at` */
    __device__ __forceinline__ void load(uint32_t (&a)[4], uint32_t &scale, int tile, int64_t at, int step) const
    {
        for (int k = 0; k < 4; k++) a[k] = *(const uint32_t *)(row[tile][k % 2] + at + step * 32 + k / 2 * 16 + t * 4);
        scale = *(const uint32_t *)(row[tile][t % 2] + at + RECORD_SCALES + step * 4);
    }
};

/* sum[tile]: inputs times eight rows of weights, whose first unit is at `unit`. */
template <int TILES>
__device__ __forceinline__ void products(float (&sum)[TILES][4], const inputs<TILES> &x, const uint8_t *unit, int records)
{
    int lane = threadIdx.x % LANES;
    for (int i = 0; i < TILES * 4; i++) sum[i / 4][i % 4] = 0;
    for (int u = 0; u < records; u++, unit += FP4_UNIT_BYTES) {
        uint4 codes[2] = { __ldg((const uint4 *)unit + lane), __ldg((const uint4 *)unit + LANES + lane) };
        uint4 scales = __ldg((const uint4 *)(unit + 1024) + lane / 4); /* even groups of both halves, then odd ones */
#pragma unroll
        for (int step = 0; step < 4; step++) {
            uint4 w = codes[step / 2];
            uint32_t b[2] = { step % 2 ? w.z : w.x, step % 2 ? w.w : w.y };
            uint32_t even = step / 2 ? scales.y : scales.x, odd = step / 2 ? scales.w : scales.z;
            uint32_t scale = __byte_perm(even, odd, step % 2 ? 0x7362 : 0x5140);
            for (int i = 0; i < TILES; i++) {
                uint32_t a[4], scale_x;
                x.load(a, scale_x, i, (int64_t)u * RECORD, step);
                mma_fp4(sum[i], a, b, scale_x, scale);
            }
        }
    }
}

struct fp4_args {
    cuda_matrix m[2];     /* gate and up, or one */
    const float *globals; /* by expert, of m[0] and m[1]; NULL: theirs */
    int n_experts;
    const uint8_t *records;
    const int *index; /* of a row of `records`, by slot; NULL: itself */
    const int *tiles; /* of slots (parts.h); NULL: one expert, slots [0, y.rows) by 64 */
    mat y;            /* by slot */
};

template <int TILES, bool GATED>
__device__ __forceinline__ void tile(const fp4_args &p, int expert, int first, int count)
{
    int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int strip = blockIdx.x * WARPS + threadIdx.x / LANES, records = records_of(p.m[0].cols);
    if (strip * 8 >= p.m[0].rows) return;
    inputs<TILES> x(p.records, (int64_t)records * RECORD, p.index, first, count);
    float sum[GATED ? 2 : 1][TILES][4];
    for (int i = 0; i < (GATED ? 2 : 1); i++) {
        const cuda_matrix &m = p.m[i];
        const uint8_t *unit = (const uint8_t *)m.data + expert * fp4_bytes(m.rows, m.cols) + (int64_t)strip * records * FP4_UNIT_BYTES;
        products<TILES>(sum[i], x, unit, records);
        float global = p.globals ? p.globals[i * p.n_experts + expert] : m.global;
        for (int k = 0; k < TILES * 4; k++) sum[i][k / 4][k % 4] = sum[i][k / 4][k % 4] / global / m.input_global;
    }
    for (int i = 0; i < TILES; i++)
        for (int k = 0; k < 4; k++) {
            int row = i * 16 + k / 2 * 8 + g, column = strip * 8 + 2 * t + k % 2;
            float y = sum[0][i][k];
            if constexpr (GATED) y = silu(y) * sum[1][i][k];
            if (row < count && column < p.m[0].rows) p.y.data[(first + row) * p.y.stride + column] = y;
        }
}

/* Grid: weight rows by 64, tiles of slots. y = x W, or SiLU(gate x) * up x. */
template <bool GATED> __global__ void __launch_bounds__(THREADS) tiles(const __grid_constant__ fp4_args p)
{
    int expert = 0, first = blockIdx.y * TOKENS, count = min((int)p.y.rows - first, TOKENS);
    if (p.tiles) {
        if ((int)blockIdx.y >= p.tiles[0]) return;
        const int *entry = p.tiles + ENTRY * (1 + blockIdx.y);
        expert = entry[0], first = entry[1], count = entry[2];
    }
    if (count > 32)
        tile<4, GATED>(p, expert, first, count);
    else if (count > 16)
        tile<2, GATED>(p, expert, first, count);
    else
        tile<1, GATED>(p, expert, first, count);
}

bool takes(const cuda_matrix &m)
{
    return m.format == WEIGHT_NVFP4 && m.input == INPUT_NVFP4 && m.cols % 16 == 0;
}

uint8_t *quantized(struct queue *q, struct mat x, const cuda_matrix &m)
{
    int records = records_of(m.cols);
    launch(q, "matmul", false, quantize, dim3(blocks(x.rows * records * 16)), 0, (uint8_t *)q->quantized, x, m.input_global, records);
    return (uint8_t *)q->quantized;
}

} /* namespace */

bool cuda_fp4_product(struct queue *q, struct mat y, struct mat x, const struct cuda_matrix *m)
{
    if (!takes(*m)) return false;
    if (x.rows == 0) return true;
    fp4_args p = { { *m, *m }, nullptr, 1, quantized(q, x, *m), nullptr, nullptr, y };
    launch(q, "matmul", false, tiles<false>, dim3(blocks(m->rows, WARPS * 8), blocks(x.rows, TOKENS)), 0, p);
    return true;
}

bool cuda_fp4_experts(struct queue *q, struct mat y, struct mat x, const struct picks *picks, const struct cuda_experts *e)
{
    const cuda_prefill &s = q->prefill;
    const cuda_matrix &up = e->m[UP], &down = e->m[DOWN];
    int64_t picked = x.rows * picks->k;
    if (!takes(e->m[GATE]) || !takes(up) || !takes(down)) return false;
    if (x.rows > s.rows || picked > s.picked || e->n > EXPERTS_MAX || down.rows > s.width || down.rows % 8 != 0) return false;
    if (x.rows == 0) return true;
    unsigned most = (unsigned)(picked / TOKENS + (e->n < picked ? e->n : picked));
    mat hidden = { q->hidden, picked, up.rows, up.rows }, given = { s.down, picked, down.rows, down.rows };
    cuda_sort_picks(q, picks, x.rows, TOKENS);
    fp4_args p = { { e->m[GATE], up }, e->globals, e->n, quantized(q, x, up), s.slot_row, s.tiles, hidden };
    launch(q, "experts", false, tiles<true>, dim3(blocks(up.rows, WARPS * 8), most), 0, p);
    p = { { down, down }, e->globals + DOWN * e->n, e->n, quantized(q, hidden, down), nullptr, s.tiles, given };
    launch(q, "experts", false, tiles<false>, dim3(blocks(down.rows, WARPS * 8), most), 0, p);
    cuda_sum_picks(q, y, picks);
    return true;
}
