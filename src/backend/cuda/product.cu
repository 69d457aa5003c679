/* Products of up to ROWS_EXACT rows, at the speed of reading the weights. One block a multiprocessor, eight warps: a
 * tile of eight weight rows is split along its columns over the warps, which stream their parts (device.cuh) and meet
 * once for several tiles. The inputs are made in the block: taken as they are, normed, or gated and normed; so a norm
 * costs no pass of its own. The first pieces of weights are asked for before the kernel that makes the input is done.
 * Moves: the weights once for every ROWS rows; everything else is small and in the second cache. */
#include "backend/cuda/device.cuh"
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
    mat x, z, made; /* input, its gate, and where block 0 leaves what the products saw (data NULL: nowhere) */
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

constexpr int CHUNK_BYTES = 16384; /* two sets of sums */
template <int ROWS> constexpr int CHUNK = CHUNK_BYTES / 2 / (WARPS * SLOTS * ROWS * 8 * 4); /* tiles between meetings */

__host__ __device__ inline size_t product_shared(int rows, int cols)
{
    return RING_BYTES + CHUNK_BYTES + (size_t)rows * SLOTS * slot_stride(cols) * 2;
}

/* Tile i of this block, this warp's share. */
struct product_jobs {
    const product_args &p;

    __device__ int matrix_of(int number) const
    {
        int m = 0;
        while (number >= p.first[m + 1]) m++;
        return m;
    }

    __device__ job operator()(int i) const
    {
        int number = blockIdx.x + i * gridDim.x;
        if (number >= p.first[p.n]) return job{};
        int k = matrix_of(number);
        return shared_job(p.m[k], 0, (number - p.first[k]) * 8);
    }
};

/* Columns a thread reads at once, so that it waits for memory once. */
constexpr int AHEAD = 8;

/* One input value into its slots; returns its magnitude. */
__device__ __forceinline__ float place(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row, int c, float v)
{
    put_parts(slots, stride, c, v);
    if (p.made.data && blockIdx.x == 0) p.made.data[row * p.made.stride + c] = v;
    return fabsf(v);
}

/* A row as it is, or normed. gain: read ahead for the first AHEAD * THREADS columns. */
__device__ __forceinline__ float place_row(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row,
                                           const float (&gain)[AHEAD], float *part)
{
    const float *x = p.x.data + row * p.x.stride;
    float v[AHEAD], scale = 1, top = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = threadIdx.x + i * THREADS;
        v[i] = c < p.cols ? __ldcg(x + c) : 0;
    }
    if (p.kind == INPUT_NORMED) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) sum = fmaf(v[i], v[i], sum);
        for (int c = threadIdx.x + AHEAD * THREADS; c < p.cols; c += THREADS) sum = fmaf(__ldcg(x + c), __ldcg(x + c), sum);
        scale = 1.0f / sqrtf(block_sum(sum, part) / (float)p.cols + p.eps);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = threadIdx.x + i * THREADS;
        if (p.kind == INPUT_NORMED) v[i] = v[i] * scale * gain[i];
        if (c < p.cols) top = fmaxf(top, place(p, slots, stride, row, c, v[i]));
    }
    for (int first = threadIdx.x + AHEAD * THREADS; first < p.cols; first += AHEAD * THREADS) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) v[i] = first + i * THREADS < p.cols ? __ldcg(x + first + i * THREADS) : 0;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int c = first + i * THREADS;
            if (c >= p.cols) break;
            top = fmaxf(top, place(p, slots, stride, row, c, p.kind == INPUT_NORMED ? v[i] * scale * p.gain[c] : v[i]));
        }
    }
    return top;
}

/* Heads, each normed and gated by a warp. */
__device__ __forceinline__ float place_heads(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row)
{
    constexpr int HEADS = 4, EACH = 4; /* heads at once, columns of a head a lane */
    const float *x = p.x.data + row * p.x.stride, *z = p.z.data + row * p.z.stride;
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float top = 0;
    for (int first = 0; first < p.cols / p.dim; first += HEADS * WARPS) {
        float v[HEADS][EACH], gate[HEADS][EACH];
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int c = (first + h * WARPS + warp) * p.dim + lane + i * LANES;
                bool in = c < p.cols && lane + i * LANES < p.dim;
                v[h][i] = in ? __ldcg(x + c) : 0;
                gate[h][i] = in ? __ldcg(z + c) : 0;
            }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            int at = (first + h * WARPS + warp) * p.dim;
            float sum = 0;
            if (at >= p.cols) break;
#pragma unroll
            for (int i = 0; i < EACH; i++) sum = fmaf(v[h][i], v[h][i], sum);
            float scale = 1.0f / sqrtf(warp_sum(sum) / (float)p.dim + p.eps);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int d = lane + i * LANES;
                if (d < p.dim)
                    top = fmaxf(top, place(p, slots, stride, row, at + d, v[h][i] * scale * p.gain[d] * silu(gate[h][i])));
            }
        }
    }
    return top;
}

/* Row `row` into four slots; what it is quantized by goes to *input_scale. */
__device__ __forceinline__ void make_input(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row,
                                           const float (&gain)[AHEAD], float *part, float *input_scale)
{
    float top = p.kind == INPUT_GATED ? place_heads(p, slots, stride, row) : place_row(p, slots, stride, row, gain, part);
    for (int c = p.cols + threadIdx.x; c < stride; c += THREADS)
        for (int s = 0; s < SLOTS; s++) slots[s * stride + c] = __float2bfloat16_rn(0);
    if (!p.quantize) return;
    float s = fp8_input_scale(block_max(top, part + WARPS));
    for (int c = threadIdx.x; c < p.cols; c += THREADS) {
        float v = __bfloat162float(slots[c]) + __bfloat162float(slots[stride + c]);
        put_quantized(slots, stride, c, v + __bfloat162float(slots[2 * stride + c]), s);
    }
    if (threadIdx.x == 0) *input_scale = s;
}

__device__ void advance_conv(const product_args &p)
{
    int64_t channels = p.u.cols;
    for (int s = 0; s < p.rows.n_spans; s++) {
        cuda_span span = p.rows.spans[s];
        float *state = p.conv + span.slot * p.keep * channels;
        for (int64_t c = blockIdx.x * THREADS + threadIdx.x; c < channels; c += (int64_t)gridDim.x * THREADS) {
            for (int j = 0; j + 1 < p.keep; j++) state[j * channels + c] = state[(j + 1) * channels + c];
            if (p.keep > 0) state[(p.keep - 1) * channels + c] = p.u.data[span.first * p.u.stride + c];
        }
    }
}

/* Four threads an output, a slot each. Tiles [first, first + count) of this block; a meeting of the block in between,
 * before which everything but the sums is fetched. */
template <int ROWS>
__device__ __forceinline__ void store_tiles(const product_args &p, const float *sums, int first, int count, int64_t row0,
                                            int rows, const float *input_scale)
{
    static_assert(CHUNK<ROWS> * 8 * SLOTS * ROWS == THREADS, "a thread a slot");
    int o = threadIdx.x, k = o % SLOTS, col = o / SLOTS % 8, c = o / (SLOTS * 8) % CHUNK<ROWS>;
    int a = o / (SLOTS * 8) / CHUNK<ROWS>, number = blockIdx.x + (first + c) * gridDim.x;
    bool mine = c < count && a < rows;
    int m = mine ? product_jobs{ p }.matrix_of(number) : 0, r = mine ? (number - p.first[m]) * 8 + col : 0;
    const cuda_matrix &w = p.m[m];
    mine = mine && k == 0 && r < w.rows;
    float unit = 1, old = 0, s[SLOTS], sum = 0;
    if (mine) unit = w.format == WEIGHT_FP8 ? w.scale[r] : FP4_UNIT / w.global;
    if (mine && p.add.data) old = __ldcg(p.add.data + (row0 + a) * p.add.stride + r);
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) sum += sums[((c * WARPS + warp) * SLOTS * ROWS + a * SLOTS + k) * 8 + col];
    gather_slots(s, sum);
    if (!mine) return;
    float y = slots_value(s, w.format, w.input, unit, input_scale[a]);
    p.out[m].data[(row0 + a) * p.out[m].stride + r] = y;
    if (p.add.data) p.add.data[(row0 + a) * p.add.stride + r] = old + y;
}

/* Scales are needed at the very end: let them be near by then. */
__device__ void prefetch_scales(const product_args &p)
{
    for (int i = threadIdx.x;; i += THREADS) {
        int number = blockIdx.x + i * gridDim.x, m = 0;
        if (number >= p.first[p.n]) return;
        while (number >= p.first[m + 1]) m++;
        if (p.m[m].format == WEIGHT_FP8)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(p.m[m].scale + (number - p.first[m]) * 8));
    }
}

/* Shared memory: ring, two sets of sums [CHUNK][warp][slot][8], slots [SLOTS * ROWS][stride]. */
template <int ROWS>
__global__ void __launch_bounds__(THREADS, ROWS == 1 ? 2 : 1) stream_product(const __grid_constant__ product_args p)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float part[ROWS][2 * WARPS], input_scale[ROWS];
    float *sums = (float *)(shared + RING_BYTES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)((uint8_t *)sums + CHUNK_BYTES);
    constexpr int HALF = CHUNK_BYTES / 2 / 4;
    int stride = slot_stride(p.cols), warp = threadIdx.x / LANES;
    int64_t row0 = (int64_t)blockIdx.y * ROWS;
    int rows = p.x.rows - row0 < ROWS ? (int)(p.x.rows - row0) : ROWS;
    let_next_start();
    product_jobs jobs = { p };
    stream<product_jobs> weights(jobs, shared);
    for (int i = 0; i < RING; i++) weights.request();
    prefetch_scales(p);
    float gain[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = threadIdx.x + i * THREADS;
        gain[i] = p.kind == INPUT_NORMED && c < p.cols ? p.gain[c] : 0;
    }
    wait_for_previous();
    for (int a = 0; a < rows; a++)
        make_input(p, slots + a * SLOTS * stride, stride, row0 + a, gain, part[a], &input_scale[a]);
    for (int c = threadIdx.x; c < (ROWS - rows) * SLOTS * stride; c += THREADS)
        slots[rows * SLOTS * stride + c] = __float2bfloat16_rn(0);
    if (p.conv && blockIdx.y == 0) advance_conv(p);
    __syncthreads();
    int i = 0, first = 0, half = 0;
    for (job j = jobs(0); j.data; half ^= 1) {
        for (; j.data && i - first < CHUNK<ROWS>; j = jobs(++i)) {
            j.sums = ((i - first) * WARPS + warp) * SLOTS * ROWS * 8;
            weights.work<ROWS>(j, sums + half * HALF, slots, stride);
        }
        store_tiles<ROWS>(p, sums + half * HALF, first, i - first, row0, rows, input_scale);
        first = i;
    }
    copy_wait<0>();
}

void add_matrix(product_args &a, const cuda_matrix &m, mat out)
{
    a.m[a.n] = m;
    a.out[a.n] = out;
    a.first[a.n + 1] = a.first[a.n] + (m.rows + 7) / 8;
    a.quantize = a.quantize || m.input == INPUT_FP8_ROW;
    a.cols = m.cols;
    a.n++;
}

void run(struct queue *q, const char *operation, product_args a, bool overlap)
{
    unsigned tiles = (unsigned)a.first[a.n], grid = tiles < (unsigned)q->sms ? tiles : (unsigned)q->sms;
    int64_t n = a.x.rows;
    if (n == 0) return;
    if (n > 1 && product_shared(4, a.cols) <= (size_t)q->shared_max)
        launch(q, operation, overlap, stream_product<4>, dim3(grid, blocks(n, 4)), product_shared(4, a.cols), a);
    else
        launch(q, operation, overlap, stream_product<1>, dim3(grid, (unsigned)n), product_shared(1, a.cols), a);
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
    a.kind = INPUT_RAW;
    a.x = x;
    run(q, "matmul", a, true);
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
    run(q, "norm_products", a, true);
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
    run(q, "delta_run", a, true);
}

void cuda_attention_out(struct queue *q, const struct attention_run *r)
{
    product_args a = {};
    add_matrix(a, cuda_matrix_of(r->o), r->y);
    a.kind = INPUT_RAW;
    a.x = r->att;
    a.add = r->x;
    run(q, "attention_run", a, true);
}
