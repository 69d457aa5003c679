/* Dense products of many rows: inputs prepared in one pass, normed on the way where asked for, then one launch for all
 * matrices that read them. Moves: the weights once for every 128 rows from the second cache, the activations once for
 * every 128 weight rows. */
#include "backend/cuda/blas.h"
#include "backend/cuda/tile.cuh"

namespace {

constexpr int ROW_MOST = 12 * 1024, HEAD = 128, LINE = 32; /* columns of a row, of a head, of a line of the second cache */

struct input_args {
    mat x, up, h; /* as in cuda_products */
    const float *gain;
    float eps;
    int head;
    __nv_bfloat16 *plain, *straight, *quantized; /* NULL: not wanted; straight: columns in their own order */
    uint8_t *codes;                              /* E4M3, likewise */
    float *scale;
    int parts;
    bool narrow;               /* as in cuda_products */
    const __nv_bfloat16 *one;  /* a matrix of one row, whose product with the inputs goes to one_out; NULL: none */
    mat one_out;
};

__device__ __forceinline__ void load4(float (&v)[4], const float *from)
{
    if ((uintptr_t)from % 16 == 0) {
        float4 x = *(const float4 *)from;
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    } else {
        for (int i = 0; i < 4; i++) v[i] = from[i];
    }
}

/* Four BF16 numbers. */
__device__ __forceinline__ void widen(float (&v)[4], uint2 w)
{
    v[0] = __uint_as_float(w.x << 16), v[1] = __uint_as_float(w.x & 0xffff0000u);
    v[2] = __uint_as_float(w.y << 16), v[3] = __uint_as_float(w.y & 0xffff0000u);
}

/* Four columns from c on, a multiple of 4, in the order of tiles. */
__device__ __forceinline__ void store4(__nv_bfloat16 *row, int c, const float (&v)[4])
{
    *(uint32_t *)(row + tile_place(c)) = pair_of(v[0], v[1]);
    *(uint32_t *)(row + tile_place(c + 2)) = pair_of(v[2], v[3]);
}

/* A block a row; a thread EACH times four neighbouring columns, a warp 128 of them: a head. */
template <int EACH> __global__ void prepare_rows(const __grid_constant__ input_args a)
{
    __shared__ float part[3 * WARPS];
    int64_t r = blockIdx.x;
    int n = (int)a.x.cols;
    for (int c = LINE * threadIdx.x; c < n; c += LINE * THREADS) { /* no kernel writes these */
        if (a.gain && !a.head) prefetch(a.gain + c);
        if (a.one) prefetch(a.one + c);
    }
    wait_for_previous();
    let_next_start();
    const float *x = a.x.data + r * a.x.stride, *up = a.up.data + r * a.up.stride;
    float v[EACH][4] = {}, z[EACH][4] = {}, top = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) { /* all at once */
        int c = 4 * (threadIdx.x + i * THREADS);
        if (c >= n) break;
        if (a.narrow)
            widen(v[i], *(const uint2 *)((const __nv_bfloat16 *)x + c));
        else
            load4(v[i], x + c);
        if (a.up.data) load4(z[i], up + c);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = 4 * (threadIdx.x + i * THREADS);
        float own = 0;
        for (int k = 0; k < 4; k++) own = fmaf(v[i][k], v[i][k], own);
        if (a.head) {
            float scale = 1.0f / sqrtf(warp_sum(own) / (float)HEAD + a.eps);
            for (int k = 0; k < 4; k++) v[i][k] = v[i][k] * scale * a.gain[c % HEAD + k] * silu(z[i][k]);
        } else if (a.up.data) {
            for (int k = 0; k < 4; k++) v[i][k] = silu(v[i][k]) * z[i][k];
        }
        sum += own;
    }
    if (a.gain && !a.head) {
        float scale = 1.0f / sqrtf(block_sum(sum, part) / (float)n + a.eps);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int c = 4 * (threadIdx.x + i * THREADS);
            for (int k = 0; k < 4 && c < n; k++) v[i][k] = v[i][k] * scale * a.gain[c + k];
        }
    }
    if (a.one) {
        float dot = 0, w[4];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int c = 4 * (threadIdx.x + i * THREADS);
            if (c >= n) break;
            widen(w, *(const uint2 *)(a.one + c));
            for (int k = 0; k < 4; k++) dot = fmaf(v[i][k], w[k], dot);
        }
        dot = block_sum(dot, part + 2 * WARPS);
        if (threadIdx.x == 0) a.one_out.data[r * a.one_out.stride] = dot;
    }
    float unit = 1;
    if (a.quantized || a.codes) {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            for (int k = 0; k < 4; k++) top = fmaxf(top, fabsf(v[i][k]));
        unit = fp8_input_scale(block_max(top, part + WARPS));
        if (threadIdx.x == 0) a.scale[r] = unit;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int c = 4 * (threadIdx.x + i * THREADS);
        if (c >= n) break;
        if (a.h.data) {
            float *to = a.h.data + r * a.h.stride + c;
            if ((uintptr_t)to % 16 == 0)
                *(float4 *)to = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
            else
                for (int k = 0; k < 4; k++) to[k] = v[i][k];
        }
        if (a.straight)
            *(uint2 *)(a.straight + r * n + c) = make_uint2(pair_of(v[i][0], v[i][1]), pair_of(v[i][2], v[i][3]));
        if (a.quantized || a.codes) {
            uint8_t code[4];
            float value[4];
            for (int k = 0; k < 4; k++) code[k] = e4m3_code(v[i][k] / unit);
            for (int k = 0; k < 4; k++) value[k] = e4m3_value(code[k]);
            if (a.codes) *(uint32_t *)(a.codes + r * n + c) = code[0] | code[1] << 8 | code[2] << 16 | (uint32_t)code[3] << 24;
            if (a.quantized) store4(a.quantized + r * n, c, value);
        }
        for (int p = 0; a.plain && p < a.parts; p++) {
            store4(a.plain + (r * a.parts + p) * n, c, v[i]);
            for (int k = 0; k < 4; k++) v[i][k] -= __bfloat162float(__float2bfloat16_rn(v[i][k]));
        }
    }
}

void prepare(struct queue *q, const input_args &a)
{
    dim3 grid((unsigned)a.x.rows);
    if (a.x.cols <= 4 * THREADS)
        launch(q, "matmul", true, prepare_rows<1>, grid, 0, a);
    else if (a.x.cols <= 8 * THREADS)
        launch(q, "matmul", true, prepare_rows<2>, grid, 0, a);
    else if (a.x.cols <= 16 * THREADS)
        launch(q, "matmul", true, prepare_rows<4>, grid, 0, a);
    else
        launch(q, "matmul", true, prepare_rows<ROW_MOST / THREADS / 4>, grid, 0, a);
}

struct dense_args {
    cuda_matrix m[NORM_PRODUCTS_MAX];
    mat out[NORM_PRODUCTS_MAX], add;
    int first[NORM_PRODUCTS_MAX + 1]; /* tile of weight rows at which a matrix begins */
    int n, cols, parts, tokens;
    bool lean; /* as in cuda_products */
    const __nv_bfloat16 *plain, *quantized;
    const float *scale;
};

/* Tile number `tile` of rows of matrix k. */
template <int FORMAT, int TOKENS> __device__ __forceinline__ void dense_tile(const dense_args &a, uint8_t *shared, int k, int tile_row)
{
    const cuda_matrix &m = a.m[k];
    int row0 = tile_row * TILE_ROWS, token0 = blockIdx.y * TOKENS, lane = threadIdx.x % LANES;
    int tokens = a.tokens - token0 < TOKENS ? a.tokens - token0 : TOKENS;
    bool quantized = m.input == INPUT_FP8_ROW;
    int parts = quantized ? 1 : a.parts, stride = parts * a.cols;
    tile_source s = {};
    s.pitch = tile_pitch(FORMAT, m.cols);
    s.data[0] = (const uint8_t *)m.data + (int64_t)(FORMAT == WEIGHT_NVFP4 ? row0 / 8 : row0) * s.pitch;
    s.rows = m.rows - row0;
    s.split = TILE_ROWS;
    s.x_stride = stride;
    s.x = (quantized ? a.quantized : a.plain) + (int64_t)token0 * stride;
    tile_sums<FORMAT, TOKENS>(shared, s, a.cols / TILE_K, parts, tokens);
    const float *sums = (const float *)shared;
    float unit[4];
    for (int i = 0; i < 4; i++) {
        int r = row0 + 4 * lane + i;
        unit[i] = FORMAT != WEIGHT_FP8 ? matrix_unit(FORMAT, m.global) : r < m.rows ? m.scale[r] : 0;
    }
    const mat &y = a.out[k];
    bool adds = a.add.data && k == 0;
    for (int i = threadIdx.x / LANES; i < tokens; i += WARPS) {
        float4 v = *(const float4 *)(sums + i * OUT_STRIDE + 4 * lane);
        float in = quantized ? a.scale[token0 + i] : 1, f[4] = { v.x, v.y, v.z, v.w };
        float *to = y.data + (int64_t)(token0 + i) * y.stride + row0 + 4 * lane;
        float *sum = adds ? a.add.data + (int64_t)(token0 + i) * a.add.stride + row0 + 4 * lane : nullptr;
        for (int j = 0; j < 4; j++) f[j] = f[j] * in * unit[j];
        bool whole = row0 + 4 * lane + 3 < m.rows;
        if (adds && a.lean)
            ;
        else if (whole && (uintptr_t)to % 16 == 0)
            *(float4 *)to = make_float4(f[0], f[1], f[2], f[3]);
        else
            for (int j = 0; j < 4 && row0 + 4 * lane + j < m.rows; j++) to[j] = f[j];
        if (!adds) continue;
        for (int j = 0; j < 4 && row0 + 4 * lane + j < m.rows; j++) sum[j] += f[j];
    }
}

/* Grid: tiles of weight rows of all matrices, tiles of rows. */
template <int TOKENS> __global__ void __launch_bounds__(THREADS, 2) dense_tiles(const __grid_constant__ dense_args a)
{
    SHARED_MEMORY(uint8_t, shared, 1024);
    int k = 0;
    wait_for_previous();
    let_next_start();
    while ((int)blockIdx.x >= a.first[k + 1]) k++;
    int tile_row = (int)blockIdx.x - a.first[k];
    if (a.m[k].format == WEIGHT_BF16)
        dense_tile<WEIGHT_BF16, TOKENS>(a, shared, k, tile_row);
    else if (a.m[k].format == WEIGHT_FP8)
        dense_tile<WEIGHT_FP8, TOKENS>(a, shared, k, tile_row);
    else
        dense_tile<WEIGHT_NVFP4, TOKENS>(a, shared, k, tile_row);
}

template <int FORMAT, int TOKENS> void have_room(const dense_args &a, size_t &bytes)
{
    for (int i = 0; i < a.n; i++)
        if (a.m[i].format == FORMAT && bytes < tile<FORMAT, TOKENS>::SHARED) bytes = tile<FORMAT, TOKENS>::SHARED;
}

template <int TOKENS> void start(struct queue *q, const dense_args &a, int64_t n)
{
    size_t bytes = 0;
    have_room<WEIGHT_BF16, TOKENS>(a, bytes);
    have_room<WEIGHT_FP8, TOKENS>(a, bytes);
    have_room<WEIGHT_NVFP4, TOKENS>(a, bytes);
    launch(q, "matmul", true, dense_tiles<TOKENS>, dim3(a.first[a.n], blocks(n, TOKENS)), bytes, a);
}

bool takes(const struct queue *q, const cuda_matrix &m)
{
    return tile_takes(m, q->prefill.cols < ROW_MOST ? q->prefill.cols : ROW_MOST);
}

/* FP8 only where it is worth it; for prompts as if they had 512 rows, see is_library. */
bool library_takes(const struct queue *q, const cuda_matrix &m, const mat &y)
{
    constexpr int64_t WORTH = (int64_t)1 << 29; /* products of two numbers */
    if (!q->blas || y.stride % 4 != 0 || (uintptr_t)y.data % 16 != 0) return false;
    if (m.format == WEIGHT_FP8)
        return m.input == INPUT_FP8_ROW && blas_has_fp8(q->blas) && m.rows % 16 == 0 && m.cols % 16 == 0 && m.rows * (queue_prompts(q) ? 512 : y.rows) * m.cols >= WORTH &&
               (uintptr_t)m.scale % 16 == 0;
    return m.format == WEIGHT_BF16;
}

/* A row of BF16 weights is multiplied where the inputs are made. */
bool is_one(const struct cuda_products *p, int i)
{
    const cuda_matrix &m = p->m[i];
    return m.rows == 1 && m.format == WEIGHT_BF16 && m.cols % 4 == 0 && (uintptr_t)m.data % 8 == 0 && !(i == 0 && p->add.data);
}

/* Whether b lies below a, and its results beside those of a. */
bool follows(const cuda_matrix &a, const mat &y, const cuda_matrix &b, const mat &z)
{
    if (b.format != WEIGHT_BF16 && b.format != WEIGHT_FP8) return false;
    int64_t bytes = (int64_t)a.rows * a.cols * (b.format == WEIGHT_BF16 ? 2 : 1);
    return a.format == b.format && a.input == b.input && a.cols == b.cols && b.data == (const uint8_t *)a.data + bytes &&
           (b.format == WEIGHT_BF16 || b.scale == a.scale + a.rows) && z.data == y.data + y.cols && z.stride == y.stride;
}

/* Matrices that follow one another as one. */
struct cuda_products joined(const struct cuda_products *p)
{
    struct cuda_products all = *p;
    all.n = 1;
    for (int i = 1; i < p->n; i++) {
        int last = all.n - 1;
        if (follows(all.m[last], all.out[last], p->m[i], p->out[i])) {
            all.m[last].rows += p->m[i].rows;
            all.out[last].cols += p->out[i].cols;
        } else {
            all.m[all.n] = p->m[i];
            all.out[all.n++] = p->out[i];
        }
    }
    return all;
}

/* Few weight rows cost less as tiles beside others than as a call of the library. Who computes a product must not depend on
 * how many rows there are: tiles and the library add up in other orders, and a row has the same bits in all steps. */
bool is_library(const struct queue *q, const struct cuda_products *p, int i)
{
    constexpr int FEW_ROWS = 256;
    bool tiles = false;
    for (int k = 0; k < p->n; k++) tiles = tiles || !(library_takes(q, p->m[k], p->out[k]) || is_one(p, k));
    if (is_one(p, i)) return false;
    bool few = tiles && p->m[i].rows <= FEW_ROWS;
    return !few && library_takes(q, p->m[i], p->out[i]);
}

/* Matrix i. beside: in the other stream, where there is no scratch. False: the library refused. */
bool by_library(struct queue *q, const struct cuda_products *p, int i, bool beside)
{
    size_t most = (size_t)32 << 20, bytes = beside ? 0 : q->quantized_bytes < most ? q->quantized_bytes : most;
    const cuda_matrix &m = p->m[i];
    bool fp8 = m.format == WEIGHT_FP8, adds = i == 0 && p->add.data, at_once = adds && p->lean && library_takes(q, m, p->add);
    struct blas_product r = {};
    r.y = at_once ? p->add : p->out[i];
    r.add = at_once;
    r.x = fp8 ? q->prefill.codes : q->prefill.straight;
    r.x_scale = fp8 ? q->prefill.scale : nullptr;
    r.w = m.data;
    r.w_scale = fp8 ? m.scale : nullptr;
    r.cols = m.cols;
    if (!queue_failed(q) && !blas_product(q->blas, beside ? q->beside : q->stream, &r, q->quantized, bytes)) return false;
    if (adds && !at_once) cuda_add(q, p->add, p->out[0]);
    return true;
}

/* The matrices that are not the library's, by kernel, and what form of inputs all of them read. */
void divide(struct queue *q, const struct cuda_products *p, dense_args &a, input_args &in)
{
    for (int i = 0; i < p->n; i++) {
        const cuda_matrix &m = p->m[i];
        if (is_library(q, p, i)) {
            if (m.format == WEIGHT_FP8)
                in.codes = (uint8_t *)q->prefill.codes;
            else
                in.straight = (__nv_bfloat16 *)q->prefill.straight;
            continue;
        }
        if (is_one(p, i) && !in.one) {
            in.one = (const __nv_bfloat16 *)m.data;
            in.one_out = p->out[i];
            continue;
        }
        if (i == 0) a.add = p->add;
        a.m[a.n] = m;
        a.out[a.n] = p->out[i];
        a.first[a.n + 1] = a.first[a.n] + (m.rows + TILE_ROWS - 1) / TILE_ROWS;
        a.n++;
        if (m.input == INPUT_FP8_ROW)
            in.quantized = (__nv_bfloat16 *)q->prefill.quantized;
        else
            in.plain = (__nv_bfloat16 *)q->prefill.inputs;
    }
}

} /* namespace */

void cuda_dense_inputs(struct queue *q, void *to, float *scale, struct mat x, struct mat up, bool quantized, int parts)
{
    input_args a = {};
    a.x = x;
    a.up = up;
    a.scale = scale;
    a.parts = parts;
    *(quantized ? &a.quantized : &a.plain) = (__nv_bfloat16 *)to;
    prepare(q, a);
}

bool cuda_dense_takes(const struct queue *q, const struct cuda_products *p)
{
    if (queue_few(q, p->x.rows) || p->x.rows > q->prefill.rows || p->n == 0 || (p->head && p->head != HEAD)) return false;
    for (int i = 0; i < p->n; i++)
        if (!takes(q, p->m[i])) return false;
    return true;
}

bool cuda_dense(struct queue *q, const struct cuda_products *each)
{
    dense_args a = {};
    input_args in = {};
    if (!cuda_dense_takes(q, each)) return false;
    struct cuda_products whole = joined(each), *p = &whole;
    a.cols = (int)p->x.cols;
    a.tokens = (int)p->x.rows;
    a.parts = in.parts = q->rounded ? 1 : EXACT_PARTS;
    a.lean = p->lean;
    divide(q, p, a, in);
    in.x = p->x;
    in.up = p->up;
    if (!p->unread) in.h = p->h;
    in.gain = p->gain;
    in.eps = p->eps;
    in.head = p->head;
    in.scale = q->prefill.scale;
    in.narrow = p->narrow;
    bool normed = p->gain && !p->head && p->h.data; /* experts may read it next */
    if (normed) in.plain = (__nv_bfloat16 *)q->prefill.inputs;
    if (in.plain) q->prefill.known = normed ? p->h.data : nullptr;
    prepare(q, in);
    bool fork = p->choice && is_library(q, p, 0);
    if (fork) queue_fork(q);
    for (int i = 0; i < p->n; i++) {
        if (!is_library(q, p, i) || by_library(q, p, i, fork && i == 0)) continue;
        queue_join(q);
        struct blas *library = q->blas;
        if (p->m[i].format != WEIGHT_FP8) q->blas = nullptr; /* FP8 has been given up for good */
        bool done = cuda_dense(q, p);
        q->blas = library;
        return done;
    }
    a.plain = (const __nv_bfloat16 *)q->prefill.inputs;
    a.quantized = (const __nv_bfloat16 *)q->prefill.quantized;
    a.scale = q->prefill.scale;
    if (a.tokens > 64 && a.first[a.n] * blocks(a.tokens, 128) >= (unsigned)q->sms)
        start<128>(q, a, a.tokens);
    else if (q->has_wide)
        start<64>(q, a, a.tokens);
    else
        start<32>(q, a, a.tokens);
    return true;
}
