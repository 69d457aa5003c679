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

constexpr int CHUNK_BYTES = 16384;
template <int ROWS> constexpr int CHUNK = CHUNK_BYTES / 2 / (WARPS * SLOTS * ROWS * 8 * 4); /* tiles between meetings */

__host__ __device__ inline size_t product_shared(int rows, int cols)
{
    return RING_BYTES + RING_SCALES + CHUNK_BYTES + (size_t)rows * SLOTS * slot_stride(cols) * 2;
}

/* Which piece of which tile comes next for this warp. */
struct cursor {
    int i, step, per, pieces, m;
    tile t;
    bool valid;

    __device__ cursor(const product_args &p)
    {
        i = step = m = 0;
        load(p);
    }

    __device__ void load(const product_args &p)
    {
        int number = blockIdx.x + i * gridDim.x;
        valid = number < p.first[p.n];
        if (!valid) return;
        while (number >= p.first[m + 1]) m++;
        t = tile_of(p.m[m], number - p.first[m]);
        pieces = pieces_of(t.format, p.cols);
        per = (pieces + WARPS - 1) / WARPS;
        per += per & 1;
    }

    __device__ int piece() const { return threadIdx.x / LANES * per + step; }

    __device__ void request(ring &r, const product_args &p)
    {
        if (valid && piece() < pieces)
            r.request(t, piece());
        else
            r.nothing();
        copy_commit();
        if (valid && ++step == per) {
            step = 0;
            i++;
            load(p);
        }
    }
};

__device__ float input_value(const product_args &p, int64_t row, int c, float scale)
{
    float x = p.x.data[row * p.x.stride + c];
    if (p.kind == INPUT_NORMED) return x * scale * p.gain[c];
    if (p.kind == INPUT_GATED) return x * scale * p.gain[c % p.dim] * silu(p.z.data[row * p.z.stride + c]);
    return x;
}

/* One input value into its slots; returns its magnitude. */
__device__ float place(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row, int c, float scale)
{
    float v = input_value(p, row, c, scale);
    put_parts(slots, stride, c, v);
    if (p.made.data && blockIdx.x == 0) p.made.data[row * p.made.stride + c] = v;
    return fabsf(v);
}

/* Row `row` into four slots; what it is quantized by goes to *input_scale. */
__device__ void make_input(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row, float *part,
                           float *input_scale)
{
    float top = 0;
    if (p.kind == INPUT_GATED) {
        for (int head = threadIdx.x / LANES * p.dim; head < p.cols; head += WARPS * p.dim) {
            float scale = warp_inverse_rms(p.x.data + row * p.x.stride + head, p.dim, p.eps);
            for (int d = threadIdx.x % LANES; d < p.dim; d += LANES)
                top = fmaxf(top, place(p, slots, stride, row, head + d, scale));
        }
    } else {
        float scale = 0;
        if (p.kind == INPUT_NORMED) scale = block_inverse_rms(p.x.data + row * p.x.stride, p.cols, p.eps, part);
        for (int c = threadIdx.x; c < p.cols; c += THREADS) top = fmaxf(top, place(p, slots, stride, row, c, scale));
    }
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

template <int ROWS>
__device__ void store_tiles(const product_args &p, const float *sums, int first, int count, int64_t row0, int rows,
                            const float *input_scale)
{
    for (int o = threadIdx.x; o < count * 8 * rows; o += THREADS) {
        int col = o % 8, c = o / 8 % count, a = o / 8 / count, number = blockIdx.x + (first + c) * gridDim.x, m = 0;
        while (number >= p.first[m + 1]) m++;
        const cuda_matrix &w = p.m[m];
        int r = (number - p.first[m]) * 8 + col;
        if (r >= w.rows) continue;
        float s[SLOTS];
        for (int k = 0; k < SLOTS; k++) {
            s[k] = 0;
            for (int warp = 0; warp < WARPS; warp++)
                s[k] += sums[((c * WARPS + warp) * SLOTS * ROWS + a * SLOTS + k) * 8 + col];
        }
        float unit = w.format == WEIGHT_FP8 ? w.scale[r] : FP4_UNIT / w.global;
        float y = slots_value(s, w.format, w.input, unit, input_scale[a]);
        p.out[m].data[(row0 + a) * p.out[m].stride + r] = y;
        if (p.add.data) p.add.data[(row0 + a) * p.add.stride + r] += y;
    }
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
    float *sums = (float *)(shared + RING_BYTES + RING_SCALES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)((uint8_t *)sums + CHUNK_BYTES);
    constexpr int HALF = CHUNK_BYTES / 2 / 4;
    int stride = slot_stride(p.cols), lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4, warp = threadIdx.x / LANES;
    int64_t row0 = (int64_t)blockIdx.y * ROWS;
    int rows = p.x.rows - row0 < ROWS ? (int)(p.x.rows - row0) : ROWS;
    let_next_start();
    ring r(shared);
    cursor ask(p);
    for (int i = 0; i < RING; i++) ask.request(r, p);
    prefetch_scales(p);
    wait_for_previous();
    for (int a = 0; a < rows; a++)
        make_input(p, slots + a * SLOTS * stride, stride, row0 + a, part[a], &input_scale[a]);
    for (int c = threadIdx.x; c < (ROWS - rows) * SLOTS * stride; c += THREADS)
        slots[rows * SLOTS * stride + c] = __float2bfloat16_rn(0);
    if (p.conv && blockIdx.y == 0) advance_conv(p);
    __syncthreads();
    piece_product<ROWS> product = { slots + (ROWS > 1 || g < SLOTS ? g : 0) * stride, 8 * stride, g < SLOTS };
    cursor have(p);
    int chunk = 0;
    float acc[2][4] = {};
    while (have.valid) {
        uint32_t scale0, scale1;
        copy_wait<RING - 2>();
        __syncwarp();
        uint4 w0 = r.take(&scale0), w1 = r.take(&scale1);
        if (have.piece() < have.pieces) product.run(acc, w0, scale0, have.t.format, have.piece(), t);
        if (have.piece() + 1 < have.pieces) product.run(acc, w1, scale1, have.t.format, have.piece() + 1, t);
        __syncwarp();
        ask.request(r, p);
        ask.request(r, p);
        have.step += 2;
        if (have.step < have.per) continue;
        float *to = sums + chunk % 2 * HALF + ((have.i % CHUNK<ROWS>)*WARPS + warp) * SLOTS * ROWS * 8 + 2 * t;
        if (ROWS > 1 || g < SLOTS) *(float2 *)(to + g * 8) = make_float2(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1]);
        if (ROWS > 1)
            *(float2 *)(to + (g + 8) * 8) = make_float2(acc[0][2] + acc[1][2], acc[0][3] + acc[1][3]);
        for (int k = 0; k < 4; k++) acc[0][k] = acc[1][k] = 0;
        have.step = 0;
        have.i++;
        have.load(p);
        if (have.i % CHUNK<ROWS> != 0 && have.valid) continue;
        __syncthreads();
        int first = chunk * CHUNK<ROWS>;
        store_tiles<ROWS>(p, sums + chunk % 2 * HALF, first, have.i - first, row0, rows, input_scale);
        chunk++;
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
    int unit = m->format == WEIGHT_BF16 ? 8 : m->format == WEIGHT_FP8 ? 16 : m->format == WEIGHT_NVFP4 ? 64 : 0;
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
