/* A row of inputs as panels (batch.cuh), by a block, with the sums of product.cu and experts.cu to the bit. */
#ifndef BACKEND_CUDA_PREPARE_CUH
#define BACKEND_CUDA_PREPARE_CUH
#include "backend/cuda/batch.cuh"

namespace {

/* PREPARE_SILU: SiLU(x) z */
enum prepare_kind { PREPARE_RAW, PREPARE_NORMED, PREPARE_GATED, PREPARE_SILU };

struct prepare_args {
    mat x, z, made; /* made: f32, what the products see; data NULL: nowhere */
    const float *gain;
    float eps;
    int dim, cols;              /* of a gated head; of a row */
    int groups, n_parts;        /* of eight rows; of a number */
    uint8_t *parts, *quantized; /* NULL: not wanted */
    float *scale;
    /* convolution states to be moved on by a token; NULL: none */
    float *conv;
    cuda_rows rows;
    mat u;
    int keep;
};

/* What depends on the number of rows. */
inline void prepare_for(prepare_args &p, int64_t rows)
{
    p.groups = groups_of(rows);
    p.n_parts = rows > ROWS_EXACT ? 1 : PARTS;
}

/* Of DeltaNet's output matrix. */
inline prepare_args prepare_gated(const delta_run *r)
{
    prepare_args p = {};
    p.x = r->raw;
    p.z = r->z;
    if (!r->lean) p.made = r->o;
    p.gain = r->gain;
    p.eps = r->eps;
    p.dim = r->shape->value_dim;
    return p;
}

constexpr int HEAD_PAIRS = 2; /* of a gated head a lane's, 2 LANES columns apart */
constexpr int ADVANCERS = 4;  /* blocks that move a row's states on */

__host__ __device__ inline size_t prepare_shared(int cols)
{
    return (size_t)cols * sizeof(float);
}

/* Columns c and c + 1, c even: to the panels of parts; for quantization kept. Returns the larger magnitude. */
__device__ __forceinline__ float prepare_pair(const prepare_args &p, float2 *kept, int row, int c, float2 v)
{
    if (p.made.data) {
        float *made = p.made.data + (int64_t)row * p.made.stride + c;
        made[0] = v.x;
        made[1] = v.y;
    }
    split_pair s(v);
    if (p.parts) {
        uint8_t *to = p.parts + ((int64_t)(c / PANEL) * p.groups + row / 8) * (p.n_parts * PANEL_BYTES) +
                      panel_byte(row % 8, panel_place(c % PANEL, false));
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (i < p.n_parts) *(uint32_t *)(to + i * PANEL_BYTES) = s.part[i];
    }
    if (p.quantized) kept[c / 2] = s.sum();
    return fmaxf(fabsf(v.x), fabsf(v.y));
}

/* What does not come from the kernel before is asked for before it is done. */
template <prepare_kind KIND>
__device__ __forceinline__ float prepare_plain(const prepare_args &p, float2 *kept, int row, float *part)
{
    /* pairs a thread keeps; of wider rows the others are read later, or twice. No more than it takes: code that was not run for a
     * while has to come from far */
    constexpr int AHEAD = KIND == PREPARE_RAW ? 4 : KIND == PREPARE_NORMED ? 2 : 1;
    constexpr bool NORMED = KIND == PREPARE_NORMED;
    const float *x = p.x.data + (int64_t)row * p.x.stride, *z = p.z.data + (int64_t)row * p.z.stride;
    float2 v[AHEAD], gain[AHEAD];
    float scale = 1, top = 0, sum = 0;
    auto made = [&](int c, float2 y, float2 g) {
        if (NORMED) y = make_float2(y.x * scale * g.x, y.y * scale * g.y);
        if (KIND == PREPARE_SILU) {
            float2 up = load_pair(z, c);
            y = make_float2(silu(y.x) * up.x, silu(y.y) * up.y);
        }
        top = fmaxf(top, prepare_pair(p, kept, row, c, y));
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = 2 * (threadIdx.x + i * BLOCK);
        gain[i] = NORMED && c < p.cols ? make_float2(p.gain[c], p.gain[c + 1]) : float2{};
    }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = 2 * (threadIdx.x + i * BLOCK);
        v[i] = c < p.cols ? load_pair(x, c) : float2{};
    }
    if (NORMED) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) sum = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, sum));
#pragma unroll 1
        for (int c = 2 * (threadIdx.x + AHEAD * BLOCK); c < p.cols; c += 2 * BLOCK) {
            float2 y = load_pair(x, c);
            sum = fmaf(y.x, y.x, fmaf(y.y, y.y, sum));
        }
        scale = rsqrtf(block_sum<CREW>(sum, part) / (float)p.cols + p.eps);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = 2 * (threadIdx.x + i * BLOCK);
        if (c < p.cols) made(c, v[i], gain[i]);
    }
#pragma unroll 1
    for (int c = 2 * (threadIdx.x + AHEAD * BLOCK); c < p.cols; c += 2 * BLOCK)
        made(c, load_pair(x, c), NORMED ? make_float2(p.gain[c], p.gain[c + 1]) : float2{});
    return top;
}

/* A head of a row, dim == p.dim, normed and gated by a warp; gate: SiLU(z); gain: of a head's columns. */
__device__ __forceinline__ float prepare_head(const prepare_args &p, float2 *kept, int row, int head, int dim,
                                              const float2 (&x)[HEAD_PAIRS], const float2 (&gate)[HEAD_PAIRS], const float *gain)
{
    int lane = threadIdx.x % LANES;
    float sum = 0, top = 0;
#pragma unroll
    for (int i = 0; i < HEAD_PAIRS; i++) sum = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, sum));
    float scale = rsqrtf(warp_sum(sum) / (float)dim + p.eps);
#pragma unroll
    for (int i = 0; i < HEAD_PAIRS; i++) {
        int d = 2 * (lane + i * LANES);
        if (d >= dim) continue;
        float2 y = make_float2(x[i].x * scale * gain[d] * gate[i].x, x[i].y * scale * gain[d + 1] * gate[i].y);
        top = fmaxf(top, prepare_pair(p, kept, row, head * dim + d, y));
    }
    return top;
}

/* Heads of a row, each by a warp. */
__device__ __forceinline__ float prepare_heads(const prepare_args &p, float2 *kept, int row)
{
    const float *x = p.x.data + (int64_t)row * p.x.stride, *z = p.z.data + (int64_t)row * p.z.stride;
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float top = 0;
    wait_for_previous();
#pragma unroll 2
    for (int head = warp; head * p.dim < p.cols; head += CREW) {
        float2 v[HEAD_PAIRS], gate[HEAD_PAIRS];
#pragma unroll
        for (int i = 0; i < HEAD_PAIRS; i++) {
            int d = 2 * (lane + i * LANES), c = head * p.dim + d;
            v[i] = d < p.dim ? load_pair(x, c) : float2{};
            gate[i] = d < p.dim ? load_pair(z, c) : float2{};
            gate[i] = make_float2(silu(gate[i].x), silu(gate[i].y));
        }
        top = fmaxf(top, prepare_head(p, kept, row, head, p.dim, v, gate, p.gain));
    }
    return top;
}

/* BLOCK threads; shared memory: prepare_shared(cols). */
template <prepare_kind KIND> __device__ __forceinline__ void prepare_row(const prepare_args &p, int row)
{
    SHARED_MEMORY(uint8_t, shared, 1024);
    __shared__ float part[2 * CREW];
    float2 *kept = (float2 *)shared;
    float top;
    if constexpr (KIND == PREPARE_GATED)
        top = prepare_heads(p, kept, row);
    else
        top = prepare_plain<KIND>(p, kept, row, part);
    if (!p.quantized) return;
    float scale = fp8_input_scale(block_max<CREW>(top, part + CREW)), inverse = 1.0f / scale;
#pragma unroll 4
    for (int c = 2 * threadIdx.x; c < p.cols; c += 2 * BLOCK) {
        float2 x = kept[c / 2], q = make_float2(divided(x.x, scale, inverse), divided(x.y, scale, inverse));
        __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(__nv_cvt_float2_to_fp8x2(q, __NV_SATFINITE, __NV_E4M3), __NV_E4M3);
        float2 y = __half22float2(*reinterpret_cast<__half2 *>(&h));
        uint8_t *to = p.quantized + ((int64_t)(c / PANEL) * p.groups + row / 8) * PANEL_BYTES +
                      panel_byte(row % 8, panel_place(c % PANEL, true));
        *(uint32_t *)to = pack(y.x, y.y);
    }
    if (threadIdx.x == 0) p.scale[row] = scale;
}

/* Of row blockIdx.x, a sequence of its own. */
__device__ __forceinline__ void advance_states(const prepare_args &p)
{
    int64_t channels = p.u.cols;
    cuda_span span = p.rows.spans[blockIdx.x];
    float *state = p.conv + (int64_t)span.slot * p.keep * channels;
    for (int64_t c = (blockIdx.y - 1) * BLOCK + threadIdx.x; c < channels; c += ADVANCERS * BLOCK) {
        for (int j = 0; j + 1 < p.keep; j++) state[j * channels + c] = state[(j + 1) * channels + c];
        if (p.keep > 0) state[(p.keep - 1) * channels + c] = p.u.data[span.first * p.u.stride + c];
    }
}

} /* namespace */
#endif
