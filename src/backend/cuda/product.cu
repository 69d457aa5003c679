/* Products of up to ROWS_EXACT rows, at the speed of reading the weights. One block a multiprocessor: a tile of eight weight
 * rows is split along its columns over the warps, which stream their parts (stream.cuh) and meet once for several tiles. The
 * inputs are made in the block: taken as they are, normed, or gated and normed; so a norm costs no pass of its own. The
 * first units of weights are asked for before the kernel that makes the input is done.
 * Moves: the weights once for every ROWS rows; everything else is small and in the second cache. */
#include "backend/cuda/stream.cuh"
#include "backend/fused.h"

namespace {

enum input_kind { INPUT_RAW, INPUT_NORMED, INPUT_GATED };

struct product_args {
    cuda_matrix m[NORM_PRODUCTS_MAX];
    mat out[NORM_PRODUCTS_MAX];
    int first[NORM_PRODUCTS_MAX + 1]; /* tile at which a matrix begins */
    int n, cols;
    bool quantize; /* one of them takes quantized inputs */
    input_kind kind;
    mat x, z, made;       /* input, its gate, and where block 0 leaves what the products saw (data NULL: nowhere) */
    const float *gain;
    float eps;
    int dim;
    mat add; /* += what is stored; data NULL: nothing */
    /* convolution state to be moved on by a token; NULL: none */
    float *conv;
    cuda_rows rows;
    mat u;
    int keep;
};

template <int ROWS> constexpr int CHUNK = 16 / ROWS; /* tiles between meetings */
constexpr int HALF = CREW * 16 * 8;                  /* floats of a set of sums */

__host__ __device__ inline size_t product_shared(int rows, int cols)
{
    return RING_BYTES + 2 * HALF * sizeof(float) + (size_t)rows * SLOTS * slot_stride(cols) * 2;
}

/* Where a tile belongs. */
__device__ __forceinline__ int matrix_of(const product_args &p, int number)
{
    int m = 0;
#pragma unroll
    for (int i = 1; i < NORM_PRODUCTS_MAX; i++) m += i < p.n && number >= p.first[i];
    return m;
}

/* Tile i of this block, this warp's part. */
__device__ __forceinline__ part product_part(const product_args &p, int i)
{
    int number = blockIdx.x + i * gridDim.x;
    if (number >= p.first[p.n]) return part{};
    int k = matrix_of(p, number);
    const cuda_matrix &m = p.m[k];
    return part_of(m, tile_at(m, 0, number - p.first[k]), threadIdx.x / LANES, CREW);
}

/* Two input values into their slots; returns the larger magnitude. */
__device__ __forceinline__ float place(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row, int c, float2 v)
{
    if (p.made.data && blockIdx.x == 0) {
        float *made = p.made.data + row * p.made.stride + c;
        made[0] = v.x;
        made[1] = v.y;
    }
    return put_parts(slots, stride, c, v);
}

/* A row as it is, or normed: two pairs of columns of a thread at a time. gain: of the first of them. */
constexpr int EACH = 2;
__device__ __forceinline__ float place_row(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row,
                                           const float2 (&gain)[EACH], float *part)
{
    const float *x = p.x.data + row * p.x.stride;
    float2 v[EACH];
    float scale = 1, top = 0;
    bool normed = p.kind == INPUT_NORMED;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = 2 * (threadIdx.x + i * BLOCK);
        v[i] = c < p.cols ? load_pair(x, c) : float2{};
    }
    if (normed) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) sum = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, sum));
#pragma unroll 1
        for (int c = 2 * (threadIdx.x + EACH * BLOCK); c < p.cols; c += 2 * BLOCK) {
            float2 y = load_pair(x, c);
            sum = fmaf(y.x, y.x, fmaf(y.y, y.y, sum));
        }
        scale = rsqrtf(block_sum<CREW>(sum, part) / (float)p.cols + p.eps);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = 2 * (threadIdx.x + i * BLOCK);
        if (normed) v[i] = make_float2(v[i].x * scale * gain[i].x, v[i].y * scale * gain[i].y);
        if (c < p.cols) top = fmaxf(top, place(p, slots, stride, row, c, v[i]));
    }
#pragma unroll 1
    for (int c = 2 * (threadIdx.x + EACH * BLOCK); c < p.cols; c += 2 * BLOCK) {
        float2 y = load_pair(x, c);
        if (normed) y = make_float2(y.x * scale * p.gain[c], y.y * scale * p.gain[c + 1]);
        top = fmaxf(top, place(p, slots, stride, row, c, y));
    }
    return top;
}

/* Heads, each normed and gated by a warp. */
__device__ __forceinline__ float place_heads(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row)
{
    constexpr int HEADS = 2, PAIRS = 2; /* heads at once, pairs of columns of a head a lane */
    const float *x = p.x.data + row * p.x.stride, *z = p.z.data + row * p.z.stride;
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float top = 0;
#pragma unroll 1
    for (int first = warp; first * p.dim < p.cols; first += HEADS * CREW) {
        float2 v[HEADS][PAIRS], gate[HEADS][PAIRS];
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                int d = 2 * (lane + i * LANES), c = (first + h * CREW) * p.dim + d;
                bool in = c < p.cols && d < p.dim;
                v[h][i] = in ? load_pair(x, c) : float2{};
                gate[h][i] = in ? load_pair(z, c) : float2{};
            }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) sum = fmaf(v[h][i].x, v[h][i].x, fmaf(v[h][i].y, v[h][i].y, sum));
            float scale = rsqrtf(warp_sum(sum) / (float)p.dim + p.eps);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                int d = 2 * (lane + i * LANES), c = (first + h * CREW) * p.dim + d;
                if (c >= p.cols || d >= p.dim) continue;
                float2 y = make_float2(v[h][i].x * scale * p.gain[d] * silu(gate[h][i].x),
                                       v[h][i].y * scale * p.gain[d + 1] * silu(gate[h][i].y));
                top = fmaxf(top, place(p, slots, stride, row, c, y));
            }
        }
    }
    return top;
}

/* Row `row` into four slots; what it is quantized by goes to *input_scale. */
__device__ __forceinline__ void make_input(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row,
                                           const float2 (&gain)[EACH], float *part, float *input_scale)
{
    float top = p.kind == INPUT_GATED ? place_heads(p, slots, stride, row) : place_row(p, slots, stride, row, gain, part);
    put_padding(slots, stride, p.cols, threadIdx.x, BLOCK);
    if (!p.quantize) return;
    float scale = fp8_input_scale(block_max<CREW>(top, part + CREW)), inverse = 1.0f / scale;
#pragma unroll 1
    for (int c = 2 * threadIdx.x; c < p.cols; c += 2 * BLOCK)
        put_quantized(slots, stride, c, parts_sum(slots, stride, c), scale, inverse);
    if (threadIdx.x == 0) *input_scale = scale;
}

__device__ void advance_conv(const product_args &p)
{
    int64_t channels = p.u.cols;
    for (int s = 0; s < p.rows.n_spans; s++) {
        cuda_span span = p.rows.spans[s];
        float *state = p.conv + span.slot * p.keep * channels;
        for (int64_t c = blockIdx.x * BLOCK + threadIdx.x; c < channels; c += (int64_t)gridDim.x * BLOCK) {
            for (int j = 0; j + 1 < p.keep; j++) state[j * channels + c] = state[(j + 1) * channels + c];
            if (p.keep > 0) state[(p.keep - 1) * channels + c] = p.u.data[span.first * p.u.stride + c];
        }
    }
}

/* A thread an output of tiles [first, first + count) of this block; a meeting of the block in between, before which
 * everything but the sums is fetched. sums: [warp][row][tile of the chunk][8] */
template <int ROWS>
__device__ __forceinline__ void store_tiles(const product_args &p, const float *sums, int first, int count, int64_t row0,
                                            int rows, const float *input_scale)
{
    int col = threadIdx.x % 8, c = threadIdx.x / 8 % CHUNK<ROWS>, a = threadIdx.x / 8 / CHUNK<ROWS>;
    int number = blockIdx.x + (first + c) * gridDim.x;
    bool mine = c < count && a < rows;
    int m = mine ? matrix_of(p, number) : 0, r = mine ? (number - p.first[m]) * 8 + col : 0;
    const cuda_matrix &w = p.m[m];
    mine = mine && r < w.rows;
    float unit = 1, old = 0, sum = 0;
    if (mine) unit = unit_of(w, 0, r, w.global);
    if (mine && p.add.data) old = __ldcg(p.add.data + (row0 + a) * p.add.stride + r);
    __syncthreads();
    if (!mine) return;
#pragma unroll 8
    for (int warp = 0; warp < CREW; warp++) sum += sums[warp * 16 * 8 + threadIdx.x];
    if (w.input == INPUT_FP8_ROW) sum *= input_scale[a];
    float y = sum * unit;
    p.out[m].data[(row0 + a) * p.out[m].stride + r] = y;
    if (p.add.data) p.add.data[(row0 + a) * p.add.stride + r] = old + y;
}

/* Scales are needed at the very end: let them be near by then. */
__device__ void prefetch_scales(const product_args &p)
{
    int number = blockIdx.x + threadIdx.x * gridDim.x;
    if (number >= p.first[p.n]) return;
    int m = matrix_of(p, number);
    if (p.m[m].format == WEIGHT_FP8)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.m[m].scale + (number - p.first[m]) * 8));
}

/* Shared memory: ring, two sets of sums, slots [SLOTS * ROWS][stride]. */
template <int ROWS>
__global__ void __launch_bounds__(BLOCK, ROWS == 1 ? 2 : 1) stream_product(const __grid_constant__ product_args p)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float scratch[ROWS][2 * CREW], input_scale[ROWS];
    float *sums = (float *)(shared + RING_BYTES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + 2 * HALF);
    int stride = slot_stride(p.cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int64_t row0 = (int64_t)blockIdx.y * ROWS;
    int rows = p.x.rows - row0 < ROWS ? (int)(p.x.rows - row0) : ROWS;
    int tiles = (p.first[p.n] - 1 - (int)blockIdx.x) / (int)gridDim.x + 1;
    if (!p.conv) let_next_start();
    stream weights(shared);
    part list = product_part(p, lane);
    weights.fill(list, tiles < LANES ? tiles : LANES);
    prefetch_scales(p);
    float2 gain[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = 2 * (threadIdx.x + i * BLOCK);
        gain[i] = p.kind == INPUT_NORMED && c < p.cols ? make_float2(p.gain[c], p.gain[c + 1]) : float2{};
    }
    wait_for_previous();
    if (p.conv) let_next_start(); /* which may count on the kernel that wrote the states */
#pragma unroll 1
    for (int a = 0; a < rows; a++)
        make_input(p, slots + a * SLOTS * stride, stride, row0 + a, gain, scratch[a], &input_scale[a]);
    for (int c = threadIdx.x; c < (ROWS - rows) * SLOTS * stride; c += BLOCK)
        slots[rows * SLOTS * stride + c] = __float2bfloat16_rn(0);
    if (p.conv && blockIdx.y == 0) advance_conv(p);
    __syncthreads();
#pragma unroll 1
    for (int first = 0, half = 0; first < tiles; first += CHUNK<ROWS>, half ^= 1) {
        int left = tiles - first, count = left < CHUNK<ROWS> ? left : CHUNK<ROWS>, known = left < LANES ? left : LANES;
        if (first > 0) {
            list = product_part(p, first + lane);
            weights.next -= CHUNK<ROWS>;
        }
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            float sum[4];
            int number = blockIdx.x + (first + i) * gridDim.x;
            bool quantized = p.m[matrix_of(p, number)].input == INPUT_FP8_ROW;
            weights.work<ROWS>(sum, i, slots, stride, quantized, list, known);
            float *to = sums + half * HALF + warp * 16 * 8 + i * 8 + lane % 4 * 2;
            if (lane % 16 < 4 && (ROWS > 1 || lane < 4)) *(float2 *)(to + lane / 16 * CHUNK<ROWS> * 8) = make_float2(sum[0], sum[1]);
            if (lane % 16 < 4 && ROWS > 1) *(float2 *)(to + (2 + lane / 16) * CHUNK<ROWS> * 8) = make_float2(sum[2], sum[3]);
        }
        store_tiles<ROWS>(p, sums + half * HALF, first, count, row0, rows, input_scale);
    }
    copy_wait<0>();
}

void add_matrix(product_args &a, const cuda_matrix &m, mat out)
{
    a.m[a.n] = m;
    a.out[a.n] = out;
    a.first[a.n + 1] = a.first[a.n] + tiles_of(m.rows);
    a.quantize = a.quantize || m.input == INPUT_FP8_ROW;
    a.cols = m.cols;
    a.n++;
}

void run(struct queue *q, const char *operation, const product_args &a)
{
    unsigned tiles = (unsigned)a.first[a.n], grid = tiles < (unsigned)q->sms ? tiles : (unsigned)q->sms;
    int64_t n = a.x.rows;
    if (n == 0) return;
    if (n > 1 && product_shared(4, a.cols) <= (size_t)q->shared_max)
        launch<BLOCK>(q, operation, true, stream_product<4>, dim3(grid, blocks(n, 4)), product_shared(4, a.cols), a);
    else
        launch<BLOCK>(q, operation, true, stream_product<1>, dim3(grid, (unsigned)n), product_shared(1, a.cols), a);
}

} /* namespace */

bool cuda_streams(const struct queue *q, const struct cuda_matrix *m)
{
    int unit = m->format == WEIGHT_BF16 ? 8 : m->format == WEIGHT_FP8 || m->format == WEIGHT_NVFP4 ? 16 : 0;
    return unit > 0 && m->cols % unit == 0 && m->cols > 0 && m->input != INPUT_NVFP4 &&
           product_shared(1, m->cols) <= (size_t)q->shared_max;
}

void cuda_product(struct queue *q, struct mat y, struct mat x, const struct cuda_matrix *m)
{
    product_args a = {};
    add_matrix(a, *m, y);
    a.x = x;
    run(q, "matmul", a);
}

void cuda_norm_products(struct queue *q, const struct norm_products *r)
{
    product_args a = {};
    for (int i = 0; i < r->n; i++) add_matrix(a, cuda_matrix_of(r->w[i]), r->out[i]);
    a.kind = INPUT_NORMED;
    a.x = r->x;
    a.made = r->h;
    a.gain = r->gain;
    a.eps = r->eps;
    run(q, "norm_products", a);
}

void cuda_delta_out(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows, bool advance)
{
    product_args a = {};
    add_matrix(a, cuda_matrix_of(r->out), r->y);
    a.kind = INPUT_GATED;
    a.x = r->raw;
    a.z = r->z;
    a.made = r->o;
    a.gain = r->gain;
    a.eps = r->eps;
    a.dim = r->shape->value_dim;
    a.add = r->x;
    a.conv = advance ? r->state->conv : nullptr;
    a.rows = *rows;
    a.u = r->u;
    a.keep = r->shape->kernel - 1;
    run(q, "delta_run", a);
}

void cuda_attention_out(struct queue *q, const struct attention_run *r)
{
    product_args a = {};
    add_matrix(a, cuda_matrix_of(r->o), r->y);
    a.x = r->att;
    a.add = r->x;
    run(q, "attention_run", a);
}
