/* Products of up to ROWS_EXACT rows, at the speed of reading the weights. One block a multiprocessor: a tile of eight weight
 * rows is split along its columns over the warps, which stream their parts (stream.cuh) and meet once for several tiles. The
 * inputs are made in the block, of several rows by two blocks for one another: taken as they are, normed, or gated and normed;
 * so a norm costs no pass of its own. The first units of weights are asked for before the kernel that makes the input is done.
 * Moves: the weights once for every ROWS rows; everything else is small and in the second cache. */
#include "backend/cuda/tile_ring.cuh"
#include "backend/fused.h"

namespace {

/* INPUT_ANY: a kernel that makes each of them. */
enum input_kind { INPUT_RAW, INPUT_NORMED, INPUT_GATED, INPUT_ANY };

/* One of the matrices, as a block works through their tiles. */
struct product_matrix {
    const uint8_t *data;
    const float *scale; /* FP8 */
    float *out;
    int64_t out_stride;
    float unit;          /* what sums of NVFP4 are multiplied by, else 1 */
    int end;             /* number of the tile that begins the next one */
    int rows, row_bytes; /* row_bytes 0: NVFP4 */
    unsigned tile;       /* bytes of one */
    int units, each;     /* of a tile, of a warp's share of it */
    int format;
    bool quantized;
};

struct product_args {
    product_matrix m[NORM_PRODUCTS_MAX];
    int n, cols, tiles;
    int each, extra; /* tiles of a block; blocks that have one more */
    int kinds;       /* of stream.cuh */
    int stage;       /* of a ring of tiles: bytes */
    bool quantize;   /* one of them takes quantized inputs */
    input_kind kind;
    bool hears;           /* z is told (parts.h) */
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

/* Units a warp has under way. From LONG_TILES tiles a block on, tiles come through one ring for all warps (tile_ring.cuh). */
constexpr int RING = 4, LONG_TILES = 64;
constexpr size_t OWN_SHARED = 2 * 1024;              /* besides what a launch asks for */
template <int ROWS> constexpr int CHUNK = ROWS == 1 ? 8 : 16 / ROWS; /* tiles between meetings, which tell what has been done */
/* Blocks that make inputs for one another, a share of the rows each: a cluster. Of rows wider than a thread keeps (EACH), but for
 * gated ones, every block makes all, one by one: of two rows, attention's of 4,096 columns. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int ROWS> constexpr int PARTNERS = 1;
#else
template <int ROWS> constexpr int PARTNERS = ROWS > 1 ? 2 : 1;
#endif
constexpr int HALF = CREW * 16 * 8;                  /* floats of a set of sums */

/* quantize: some products take quantized inputs. Only then rows have all SLOTS, of steps of more than two. */
inline size_t shared_with_ring(size_t ring, int rows, int cols, bool quantize)
{
    int used = rows > 2 && !quantize ? SLOTS - 1 : SLOTS;
    return ring + 2 * HALF * sizeof(float) + (size_t)rows * used * slot_stride(cols) * 2;
}

inline size_t product_shared(int rows, int cols, bool tiled, bool quantize = true)
{
    return shared_with_ring(ring_bytes(RING, tiled), rows, cols, quantize);
}

/* Where a tile belongs. */
__device__ __forceinline__ int matrix_of(const product_args &p, int number)
{
    int m = 0;
#pragma unroll
    for (int i = 0; i + 1 < NORM_PRODUCTS_MAX; i++) m += number >= p.m[i].end;
    return m;
}

/* Its number within its matrix m. */
__device__ __forceinline__ int tile_within(const product_args &p, int m, int number)
{
    return m ? number - p.m[m - 1].end : number;
}

__device__ __forceinline__ share share_within(const product_matrix &m)
{
    return share_at(m.units, m.each, threadIdx.x / LANES);
}

/* The tiles a block asks for, one after the other. */
template <int KINDS> struct tiles_ahead {
    const product_args &p;
    stream<KINDS, RING> &weights;
    const uint8_t *at;
    int number, end; /* end: of the tiles that lie as far from one another as the last two */
    int step, k;
    share s;

    __device__ tiles_ahead(const product_args &args, stream<KINDS, RING> &w)
        : p(args), weights(w), at(nullptr), number(blockIdx.x), end(0), step(0), k(0), s{}
    {
    }

    __device__ __forceinline__ bool operator()()
    {
        if (number >= p.tiles) return false;
        if (number >= end) {
            k = matrix_of(p, number);
            const product_matrix &m = p.m[k];
            s = share_within(m);
            at = weights.lane_at(m.data + (uint64_t)tile_within(p, k, number) * m.tile, m.row_bytes, s.first);
            end = m.end;
            step = gridDim.x * m.tile;
        }
        weights.begin(at, p.m[k].row_bytes, s);
        at += step;
        number += gridDim.x;
        return true;
    }
};

/* Of what the warps left, in their order. */
__device__ __forceinline__ float crew_total(const float *part)
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CREW / 4; i++) {
        float4 four = ((const float4 *)part)[i];
        sum = (((sum + four.x) + four.y) + four.z) + four.w;
    }
    return sum;
}

/* block_sum<CREW> to the bit, and block_max<CREW> of what is not negative, waited for less; part: CREW floats at a multiple of 16 bytes, free again after the
 * caller's next __syncthreads. */
__device__ __forceinline__ float crew_sum(float x, float *part)
{
    x = warp_sum(x);
    if (threadIdx.x % LANES == 0) part[threadIdx.x / LANES] = x;
    __syncthreads();
    return crew_total(part);
}

__device__ __forceinline__ float crew_max(float x, float *part)
{
    x = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(x)));
    if (threadIdx.x % LANES == 0) part[threadIdx.x / LANES] = x;
    __syncthreads();
    return __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(part[threadIdx.x % CREW])));
}

/* Two input values that go to `at` of their slots (slot_place of column c); returns the larger magnitude. */
__device__ __forceinline__ float place(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row, int c, int at,
                                       float2 v)
{
    if (p.made.data && blockIdx.x == 0) {
        float *made = p.made.data + row * p.made.stride + c;
        made[0] = v.x;
        made[1] = v.y;
    }
    return put_parts_at(slots, stride, at, v);
}

template <input_kind KIND> __device__ __forceinline__ bool is(const product_args &p, input_kind kind)
{
    return (KIND == INPUT_ANY ? p.kind : KIND) == kind;
}

/* Pairs of columns of a row that a thread keeps; wider rows are made one by one. No more than it takes: code that was not run for a while
 * has to come from far. */
template <input_kind KIND> constexpr int EACH = KIND == INPUT_RAW || KIND == INPUT_GATED ? 4 : 2;

/* The gains of the first pairs of columns a thread takes, which are asked for early: of a row or of a head. */
constexpr int GAINS = 2;
template <input_kind KIND> __device__ __forceinline__ void load_gains(const product_args &p, float2 (&gain)[GAINS])
{
    int n = is<KIND>(p, INPUT_NORMED) ? p.cols : is<KIND>(p, INPUT_GATED) ? p.dim : 0;
#pragma unroll
    for (int i = 0; i < GAINS; i++) {
        int c = is<KIND>(p, INPUT_GATED) ? 2 * (threadIdx.x % LANES + i * LANES) : 2 * (threadIdx.x + i * BLOCK);
        gain[i] = c < n ? make_float2(p.gain[c], p.gain[c + 1]) : float2{};
    }
}

/* A row as it is, or normed: EACH pairs of columns of a thread are kept, of wider rows the others are read
 * again. What they are quantized by goes to *input_scale. */
template <input_kind KIND>
__device__ __forceinline__ void place_row(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row,
                                          const float2 (&gain)[GAINS], float *part, float *input_scale)
{
    constexpr int STEP = 2 * BLOCK, N = EACH<KIND>;
    const float *x = p.x.data + row * p.x.stride;
    float2 v[N];
    float scale = 1, top = 0;
    int c0 = 2 * threadIdx.x, at0 = slot_place(c0);
    bool normed = is<KIND>(p, INPUT_NORMED), aligned = ((size_t)x & 7) == 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = float2{};
        if (i * STEP >= p.cols) continue;
        const float *from = x + c0 + i * STEP;
        if (c0 + i * STEP < p.cols)
            v[i] = aligned ? __ldcg((const float2 *)from) : make_float2(__ldcg(from), __ldcg(from + 1));
    }
    if (normed) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i * STEP < p.cols) sum = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, sum));
#pragma unroll 1
        for (int c = c0 + N * STEP; c < p.cols; c += STEP) {
            float2 y = load_pair(x, c);
            sum = fmaf(y.x, y.x, fmaf(y.y, y.y, sum));
        }
        scale = rsqrtf(crew_sum(sum, part) / (float)p.cols + p.eps);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        int c = c0 + i * STEP;
        if (i * STEP >= p.cols || c >= p.cols) continue;
        if (normed) {
            float2 g = i < GAINS ? gain[i] : make_float2(p.gain[c], p.gain[c + 1]);
            v[i] = make_float2(v[i].x * scale * g.x, v[i].y * scale * g.y);
        }
        top = fmaxf(top, place(p, slots, stride, row, c, at0 + i * STEP, v[i]));
    }
#pragma unroll 1
    for (int c = c0 + N * STEP; c < p.cols; c += STEP) {
        float2 y = load_pair(x, c);
        if (normed) y = make_float2(y.x * scale * p.gain[c], y.y * scale * p.gain[c + 1]);
        top = fmaxf(top, place(p, slots, stride, row, c, slot_place(c), y));
    }
    if (!p.quantize) return;
    float by = fp8_input_scale(crew_max(top, part + CREW)), inverse = 1.0f / by;
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i * STEP < p.cols && c0 + i * STEP < p.cols) put_quantized_at(slots, stride, at0 + i * STEP, v[i], by, inverse);
#pragma unroll 1
    for (int c = c0 + N * STEP; c < p.cols; c += STEP)
        put_quantized(slots, stride, c, parts_sum(slots, stride, c), by, inverse);
    if (threadIdx.x == 0) *input_scale = by;
}

/* Pairs of columns of a head that this lane has, gated and normed by `scale`; the first is column c of the row and goes to `at`. n: columns
 * of the head from there on. Returns the largest magnitude. */
__device__ __forceinline__ float place_gated(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row, int c, int at, int n,
                                             float scale, const float2 (&v)[GAINS], const float2 (&gate)[GAINS],
                                             const float2 (&gain)[GAINS])
{
    float top = 0;
#pragma unroll
    for (int i = 0; i < GAINS; i++) {
        if (2 * i * LANES >= n) continue;
        float2 y = make_float2(v[i].x * scale * gain[i].x * silu(gate[i].x), v[i].y * scale * gain[i].y * silu(gate[i].y));
        top = fmaxf(top, place(p, slots, stride, row, c + 2 * i * LANES, at + 2 * i * LANES, y));
    }
    return top;
}

/* Heads, each normed and gated by a warp; two of 128 columns a warp take fewer instructions, which every block issues before it can
 * multiply. */
__device__ __forceinline__ void place_heads(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row,
                                            const float2 (&gain)[GAINS], float *part, float *input_scale)
{
    constexpr int HEADS = 2, WIDE = GAINS * 2 * LANES;
    const float *x = p.x.data + row * p.x.stride, *z = p.z.data + row * p.z.stride;
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float top = 0;
    if (p.dim == WIDE && p.cols == HEADS * CREW * WIDE && (((size_t)x | (size_t)z) & 7) == 0) {
        float2 v[HEADS][GAINS], gate[HEADS][GAINS];
        float sum[HEADS] = {};
        int c = warp * WIDE + 2 * lane, at = slot_place(c);
        bool again;
        do {
            again = false;
#pragma unroll
            for (int i = 0; i < HEADS * GAINS; i++) {
                int k = i / GAINS * CREW * WIDE + i % GAINS * 2 * LANES;
                v[i / GAINS][i % GAINS] = __ldcg((const float2 *)(x + c + k));
                gate[i / GAINS][i % GAINS] = hear_pair(z + c + k);
            }
#pragma unroll
            for (int i = 0; i < HEADS * GAINS; i++)
                again = again || absent(gate[i / GAINS][i % GAINS].x) || absent(gate[i / GAINS][i % GAINS].y);
        } while (p.hears && again);
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int i = 0; i < GAINS; i++) sum[h] = fmaf(v[h][i].x, v[h][i].x, fmaf(v[h][i].y, v[h][i].y, sum[h]));
#pragma unroll
        for (int o = LANES / 2; o > 0; o /= 2) /* both heads' warp_sum, side by side */
#pragma unroll
            for (int h = 0; h < HEADS; h++) sum[h] = __fadd_rn(sum[h], __shfl_xor_sync(ALL, sum[h], o));
#pragma unroll
        for (int h = 0; h < HEADS; h++) sum[h] = rsqrtf(sum[h] / (float)WIDE + p.eps);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            int k = h * CREW * WIDE;
            top = fmaxf(top, place_gated(p, slots, stride, row, c + k, at + k, WIDE, sum[h], v[h], gate[h], gain));
        }
    } else
#pragma unroll 1
        for (int first = warp; first * p.dim < p.cols; first += CREW) {
            float2 v[GAINS], gate[GAINS];
            int c = first * p.dim + 2 * lane, n = p.dim - 2 * lane;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < GAINS; i++) {
                v[i] = gate[i] = float2{};
                if (2 * i * LANES >= n) continue;
                v[i] = load_pair(x, c + 2 * i * LANES);
                do {
                    gate[i] = hear_columns(z, c + 2 * i * LANES);
                } while (p.hears && (absent(gate[i].x) || absent(gate[i].y)));
            }
#pragma unroll
            for (int i = 0; i < GAINS; i++) sum = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, sum));
            float scale = rsqrtf(warp_sum(sum) / (float)p.dim + p.eps);
            top = fmaxf(top, place_gated(p, slots, stride, row, c, slot_place(c), n, scale, v, gate, gain));
        }
    if (!p.quantize) return;
    float by = fp8_input_scale(crew_max(top, part + CREW)), inverse = 1.0f / by;
#pragma unroll 1
    for (int c = 2 * threadIdx.x; c < p.cols; c += 2 * BLOCK)
        put_quantized(slots, stride, c, parts_sum(slots, stride, c), by, inverse);
    if (threadIdx.x == 0) *input_scale = by;
}

/* Row `row` into four slots. */
template <input_kind KIND>
__device__ __forceinline__ void make_input(const product_args &p, __nv_bfloat16 *slots, int stride, int64_t row,
                                           const float2 (&gain)[GAINS], float *part, float *input_scale)
{
    if (is<KIND>(p, INPUT_GATED))
        place_heads(p, slots, stride, row, gain, part, input_scale);
    else
        place_row<KIND>(p, slots, stride, row, gain, part, input_scale);
}

/* Partners, or the block. */
template <int ROWS> __device__ __forceinline__ void meet()
{
#if __CUDA_ARCH__ >= 900
    if (PARTNERS<ROWS> > 1) {
        cluster_meet();
        return;
    }
#endif
    __syncthreads();
}

/* Where a block puts what it makes: its own slots, and its partner's. */
template <int ROWS> struct both_slots {
    __nv_bfloat16 *own;
    int stride, used;
    uint32_t there;

    __device__ __forceinline__ both_slots(__nv_bfloat16 *slots, int stride_, int used_)
        : own(slots), stride(stride_), used(used_), there(0)
    {
#if __CUDA_ARCH__ >= 900
        if (PARTNERS<ROWS> > 1) there = address_in(shared_at(slots), (blockIdx.x & 1) ^ 1);
#endif
    }
    /* Two values of a slot of row a, at slot_place of the first. */
    __device__ __forceinline__ void put(int a, int slot, int at, uint32_t x) const
    {
        at += (a * used + slot) * stride;
        *(uint32_t *)(own + at) = x;
#if __CUDA_ARCH__ >= 900
        if (PARTNERS<ROWS> > 1) store_there(there + at * 2, x);
#endif
    }
    /* Parts of two values of row a; returns the larger magnitude. */
    __device__ __forceinline__ float put_parts(int a, int at, float2 x) const
    {
        uint32_t high = pack(x.x, x.y);
        float2 h = unpack(high), rest = make_float2(x.x - h.x, x.y - h.y);
        uint32_t middle = pack(rest.x, rest.y);
        float2 m = unpack(middle);
        put(a, 0, at, high);
        put(a, 1, at, middle);
        put(a, 2, at, pack(rest.x - m.x, rest.y - m.y));
        return fmaxf(fabsf(x.x), fabsf(x.y));
    }
};

/* What rows are quantized by, from the largest magnitudes that the warps found; lane i % N works on row i. part: of a row its CREW
 * maxima. Put where rows `first` on have theirs, here and there. */
template <int N, int ROWS>
__device__ __forceinline__ void input_scales(float (*part)[2 * CREW], float *input_scale, int first, float (&by)[N],
                                             float (&inverse)[N])
{
    int lane = threadIdx.x % LANES;
    float top = 0;
#pragma unroll
    for (int a = 0; a < N; a++) {
        float most = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(part[a][CREW + lane % CREW])));
        top = lane % N == a ? most : top;
    }
    float scale = fp8_input_scale(top), over = 1.0f / scale;
#pragma unroll
    for (int a = 0; a < N; a++) {
        by[a] = __shfl_sync(ALL, scale, a);
        inverse[a] = __shfl_sync(ALL, over, a);
    }
    if (threadIdx.x >= N) return;
    input_scale[first + threadIdx.x] = scale;
#if __CUDA_ARCH__ >= 900
    if (PARTNERS<ROWS> > 1)
        store_there(address_in(shared_at(&input_scale[first + threadIdx.x]), (blockIdx.x & 1) ^ 1), __float_as_uint(scale));
#endif
}

/* Rows `first` on, with the sums and maxima of place_row: what a row waits for, it waits for with the others. Rows from `rows`
 * on are zeros. part: of each row, [2][CREW]. */
template <int N, int ROWS, input_kind KIND>
__device__ __forceinline__ void place_rows(const product_args &p, const both_slots<ROWS> &to, int64_t row0, int first, int rows,
                                           const float2 (&gain)[GAINS], float (*part)[2 * CREW], float *input_scale)
{
    constexpr int STEP = 2 * BLOCK, PAIRS = EACH<KIND>;
    float2 v[N][PAIRS];
    int c0 = 2 * threadIdx.x, at0 = slot_place(c0), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const float *x = p.x.data + (row0 + first) * p.x.stride + c0;
    bool aligned = ((size_t)x & 7) == 0 && p.x.stride % 2 == 0;
#pragma unroll
    for (int a = 0; a < N; a++)
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const float *from = x + a * p.x.stride + i * STEP;
            v[a][i] = float2{};
            if (first + a < rows && c0 + i * STEP < p.cols)
                v[a][i] = aligned ? __ldcg((const float2 *)from) : make_float2(__ldcg(from), __ldcg(from + 1));
        }
    if (is<KIND>(p, INPUT_NORMED)) {
#pragma unroll
        for (int a = 0; a < N; a++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) sum = fmaf(v[a][i].x, v[a][i].x, fmaf(v[a][i].y, v[a][i].y, sum));
            sum = warp_sum(sum);
            if (lane == 0) part[a][warp] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int a = 0; a < N; a++) {
            float scale = rsqrtf(crew_total(part[a]) / (float)p.cols + p.eps);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                int c = c0 + i * STEP;
                float2 g = i < GAINS ? gain[i] : c < p.cols ? make_float2(p.gain[c], p.gain[c + 1]) : float2{};
                v[a][i] = make_float2(v[a][i].x * scale * g.x, v[a][i].y * scale * g.y);
            }
        }
    }
    if (p.made.data && blockIdx.x < PARTNERS<ROWS>)
#pragma unroll
        for (int a = 0; a < N; a++)
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                float *made = p.made.data + (row0 + first + a) * p.made.stride + c0 + i * STEP;
                if (first + a < rows && c0 + i * STEP < p.cols) made[0] = v[a][i].x, made[1] = v[a][i].y;
            }
    float top[N] = {};
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (c0 + i * STEP >= p.cols) continue;
#pragma unroll
        for (int a = 0; a < N; a++) top[a] = fmaxf(top[a], to.put_parts(first + a, at0 + i * STEP, v[a][i]));
    }
    if (!p.quantize) return;
#pragma unroll
    for (int a = 0; a < N; a++) {
        float most = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(top[a])));
        if (lane == 0) part[a][CREW + warp] = most;
    }
    __syncthreads();
    float by[N], inverse[N];
    input_scales<N, ROWS>(part, input_scale, first, by, inverse);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (c0 + i * STEP >= p.cols) continue;
#pragma unroll
        for (int a = 0; a < N; a++)
            to.put(first + a, 3, at0 + i * STEP, quantized_pair(v[a][i], by[a], inverse[a]));
    }
}

/* Heads of rows `first` on, as place_rows. */
template <int N, int ROWS>
__device__ __forceinline__ void place_heads(const product_args &p, const both_slots<ROWS> &to, int64_t row0, int first, int rows,
                                            const float2 (&gain)[GAINS], float (*part)[2 * CREW], float *input_scale)
{
    constexpr int HEADS = 2; /* at once */
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float top[N] = {};
#pragma unroll 1
    for (int head = warp; head * p.dim < p.cols; head += HEADS * CREW) {
        float2 v[N][HEADS][GAINS], gate[N][HEADS][GAINS];
#pragma unroll
        for (int b = 0; b < N; b++)
#pragma unroll
            for (int h = 0; h < HEADS; h++)
#pragma unroll
                for (int i = 0; i < GAINS; i++) {
                    int d = 2 * (lane + i * LANES), c = (head + h * CREW) * p.dim + d;
                    bool in = first + b < rows && c < p.cols && d < p.dim;
                    v[b][h][i] = in ? load_pair(p.x.data + (row0 + first + b) * p.x.stride, c) : float2{};
                    gate[b][h][i] = in ? load_pair(p.z.data + (row0 + first + b) * p.z.stride, c) : float2{};
                }
#pragma unroll
        for (int b = 0; b < N; b++)
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float sum = 0;
                if (first + b >= rows) continue;
#pragma unroll
                for (int i = 0; i < GAINS; i++)
                    sum = fmaf(v[b][h][i].x, v[b][h][i].x, fmaf(v[b][h][i].y, v[b][h][i].y, sum));
                float scale = rsqrtf(warp_sum(sum) / (float)p.dim + p.eps);
#pragma unroll
                for (int i = 0; i < GAINS; i++) {
                    int d = 2 * (lane + i * LANES), c = (head + h * CREW) * p.dim + d;
                    if (c >= p.cols || d >= p.dim) continue;
                    float2 y = make_float2(v[b][h][i].x * scale * gain[i].x * silu(gate[b][h][i].x),
                                           v[b][h][i].y * scale * gain[i].y * silu(gate[b][h][i].y));
                    top[b] = fmaxf(top[b], to.put_parts(first + b, slot_place(c), y));
                    if (p.made.data && blockIdx.x < PARTNERS<ROWS>) {
                        float *made = p.made.data + (row0 + first + b) * p.made.stride + c;
                        made[0] = y.x;
                        made[1] = y.y;
                    }
                }
            }
    }
    if (!p.quantize) return;
#pragma unroll
    for (int a = 0; a < N; a++) {
        float most = warp_max(top[a]);
        if (lane == 0) part[a][CREW + warp] = most;
    }
    __syncthreads();
    float by[N], inverse[N];
    input_scales<N, ROWS>(part, input_scale, first, by, inverse);
#pragma unroll
    for (int a = 0; a < N; a++)
#pragma unroll 1
        for (int c = 2 * threadIdx.x; first + a < rows && c < p.cols; c += 2 * BLOCK) {
            float2 x = parts_sum(to.own + (first + a) * to.used * to.stride, to.stride, c);
            to.put(first + a, 3, slot_place(c), quantized_pair(x, by[a], inverse[a]));
        }
}

/* Rows row0 .. row0 + rows - 1, each into four slots; partners meet. */
template <int ROWS, input_kind KIND>
__device__ __forceinline__ void make_inputs(const product_args &p, __nv_bfloat16 *slots, int stride, int used, int64_t row0,
                                            int rows, const float2 (&gain)[GAINS], float (*part)[2 * CREW], float *input_scale)
{
    constexpr int N = ROWS / PARTNERS<ROWS>;
    int first = PARTNERS<ROWS> > 1 ? N * (blockIdx.x & 1) : 0;
    both_slots<ROWS> to(slots, stride, used);
    if (ROWS == 1)
        make_input<KIND>(p, slots, stride, row0, gain, part[0], input_scale);
    else if (is<KIND>(p, INPUT_GATED))
        place_heads<N, ROWS>(p, to, row0, first, rows, gain, part, input_scale);
    else if (p.cols <= EACH<KIND> * 2 * BLOCK)
        place_rows<N, ROWS, KIND>(p, to, row0, first, rows, gain, part, input_scale);
    else
#pragma unroll 1
        for (int a = 0; a < rows; a++)
            place_row<KIND>(p, slots + a * used * stride, stride, row0 + a, gain, part[a], &input_scale[a]);
    meet<ROWS>();
}

/* By the last blocks first: they have the fewest tiles. */
__device__ void advance_conv(const product_args &p)
{
    int64_t channels = p.u.cols;
    for (int s = 0; s < p.rows.n_spans; s++) {
        cuda_span span = p.rows.spans[s];
        float *state = p.conv + span.slot * p.keep * channels;
        for (int64_t c = (gridDim.x - 1 - blockIdx.x) * BLOCK + threadIdx.x; c < channels; c += (int64_t)gridDim.x * BLOCK) {
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
    int k = mine ? matrix_of(p, number) : 0, r = mine ? tile_within(p, k, number) * 8 + col : 0;
    const product_matrix &m = p.m[k];
    mine = mine && r < m.rows;
    float unit = m.unit, old = 0, sum = 0;
    if (mine && m.scale) unit = m.scale[r];
    if (mine && p.add.data) old = __ldcg(p.add.data + (row0 + a) * p.add.stride + r);
    __syncthreads();
    if (!mine) return;
#pragma unroll 8
    for (int warp = 0; warp < CREW; warp++) sum += sums[warp * 16 * 8 + threadIdx.x];
    if (m.quantized) sum *= input_scale[a];
    float y = sum * unit;
    m.out[(row0 + a) * m.out_stride + r] = y;
    if (p.add.data) p.add.data[(row0 + a) * p.add.stride + r] = old + y;
}

/* Scales are needed at the very end: let them be near by then. */
__device__ __forceinline__ void prefetch_scales(const product_args &p)
{
    int number = blockIdx.x + threadIdx.x * gridDim.x;
    if (number >= p.tiles) return;
    int k = matrix_of(p, number);
    if (p.m[k].scale) prefetch(p.m[k].scale + tile_within(p, k, number) * 8);
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void ask_for(const product_args &p, const tile_ring &ring, int slot, int number)
{
    int k = matrix_of(p, number);
    ring.ask(slot, p.m[k].data + (uint64_t)tile_within(p, k, number) * p.m[k].tile, p.m[k].tile);
}
#endif

/* 88 registers a thread, as if blocks were that large: DeltaNet's kernel of logged rows, of 80, has room beside it. */
constexpr int BESIDE = 736;

/* Shared memory: ring, two sets of sums, slots [ROWS][used][stride]. LONG: a ring of tiles. */
template <int ROWS, int KINDS, bool LONG, input_kind KIND>
__global__ void __launch_bounds__(ROWS > 2 && KIND == INPUT_GATED ? BESIDE : BLOCK, ROWS <= 2 && !LONG ? 2 : 1)
    stream_product(const __grid_constant__ product_args p)
{
#if __CUDA_ARCH__ < 900
    constexpr bool RINGED = false;
#else
    constexpr bool RINGED = LONG;
    __shared__ uint64_t full[STAGES_MOST], empty[STAGES_MOST];
#endif
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ __align__(16) float scratch[ROWS][2 * CREW], input_scale[ROWS];
    float *sums = (float *)(shared + (LONG ? stages_of(p.stage) * p.stage : ring_bytes(RING, KINDS & TILED)));
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + 2 * HALF);
    int stride = slot_stride(p.cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int used = ROWS > 2 && !p.quantize ? SLOTS - 1 : SLOTS; /* slots of a row */
    int64_t row0 = (int64_t)blockIdx.y * ROWS;
    int rows = ROWS == 1 || p.x.rows - row0 >= ROWS ? ROWS : (int)(p.x.rows - row0);
    int tiles = p.each + ((int)blockIdx.x < p.extra);
    if (!p.conv) let_next_start();
#if __CUDA_ARCH__ >= 900
    tile_ring ring{ shared, full, empty, p.stage, stages_of(p.stage), {} };
    int turn = warp; /* tiles until it is this warp's to ask for one */
    if (RINGED && threadIdx.x == 0) {
        ring.make();
        for (int i = 0; i < ring.stages && i < tiles; i++) ask_for(p, ring, i, blockIdx.x + i * gridDim.x);
    }
#endif
    stream<KINDS, RING> weights(shared);
    tiles_ahead<KINDS> next(p, weights);
    if (!RINGED)
#pragma unroll 1
        for (int i = 0; i < RING; i++) weights.ask(next);
    prefetch_scales(p);
    float2 gain[GAINS];
    load_gains<KIND>(p, gain);
#pragma unroll 1
    for (int a = 0; a < rows; a++) put_padding(slots + a * used * stride, stride, p.cols, threadIdx.x, BLOCK, used);
    for (int c = threadIdx.x; c < (ROWS - rows) * used * stride; c += BLOCK)
        slots[rows * used * stride + c] = __float2bfloat16_rn(0);
    if (PARTNERS<ROWS> > 1) meet<ROWS>(); /* each is there when the other writes to it */
    wait_for_previous();
    if (p.conv) let_next_start(); /* which may count on the kernel that wrote the states */
    make_inputs<ROWS, KIND>(p, slots, stride, used, row0, rows, gain, scratch, input_scale);
    int number = blockIdx.x, end = 0, format = 0, row_bytes = 0;
    bool quantized = false;
    share s = {};
#pragma unroll 1
    for (int first = 0, half = 0; first < tiles; first += CHUNK<ROWS>, half ^= 1) {
        int left = tiles - first, count = left < CHUNK<ROWS> ? left : CHUNK<ROWS>;
#pragma unroll 1
        for (int i = 0; i < count; i++, number += gridDim.x) {
            float sum[4];
            if (number >= end) {
                const product_matrix &m = p.m[matrix_of(p, number)];
                s = share_within(m);
                format = m.format;
                row_bytes = m.row_bytes;
                quantized = m.quantized;
                end = m.end;
            }
#if __CUDA_ARCH__ >= 900
            if (RINGED) {
                work_whole_tile<ROWS>(sum, format, ring.wait(), row_bytes, s, slots, stride, used, quantized);
                ring.leave();
                int coming = number + ring.stages * gridDim.x;
                if (turn == 0 && coming < p.tiles) {
                    ring.wait_for_all();
                    if (lane == 0) ask_for(p, ring, ring.next.slot, coming);
                }
                turn = turn ? turn - 1 : CREW - 1;
                ring.next.advance(ring.stages);
            }
#endif
            if (!RINGED) weights.template work<ROWS>(sum, format, s, slots, stride, used, quantized, next);
            float *to = sums + half * HALF + warp * 16 * 8 + i * 8 + lane % 4 * 2;
            if (lane % 16 < 4 && (ROWS > 1 || lane < 4)) *(float2 *)(to + lane / 16 * CHUNK<ROWS> * 8) = make_float2(sum[0], sum[1]);
            if (lane % 16 < 4 && ROWS > 2) *(float2 *)(to + (2 + lane / 16) * CHUNK<ROWS> * 8) = make_float2(sum[2], sum[3]);
        }
        store_tiles<ROWS>(p, sums + half * HALF, first, count, row0, rows, input_scale);
    }
    if (p.conv && blockIdx.y == 0) advance_conv(p);
    if (!RINGED) copy_wait<0>();
}

void add_matrix(product_args &a, const cuda_matrix &m, mat out)
{
    product_matrix &to = a.m[a.n++];
    bool tiled = m.format == WEIGHT_NVFP4;
    int units = units_of(m.format, m.cols);
    a.tiles += tiles_of(m.rows);
    if (tiled) a.kinds |= CUT | TILED;
    if (!tiled && row_bytes_of(m) % UNIT_BYTES) a.kinds |= CUT | TILED;
    a.quantize = a.quantize || m.input == INPUT_FP8_ROW;
    a.cols = m.cols;
    to.data = (const uint8_t *)m.data;
    to.scale = m.format == WEIGHT_FP8 ? m.scale : nullptr;
    to.out = out.data;
    to.out_stride = out.stride;
    to.unit = tiled ? FP4_UNIT / m.global : 1;
    to.rows = m.rows;
    to.row_bytes = tiled ? 0 : row_bytes_of(m);
    to.tile = tile_bytes(m);
    to.units = units;
    to.each = share_of(units, CREW);
    to.format = m.format;
    to.quantized = m.input == INPUT_FP8_ROW;
    for (int i = a.n - 1; i < NORM_PRODUCTS_MAX; i++) a.m[i].end = a.tiles;
}

/* A step of one or two rows runs the same code three times a layer, which stays near: with three kernels it took 90 and 270 us more.
 * Of more rows what each kind takes is so much that it does not: there a kernel has what it takes. */
template <int ROWS, int KINDS> auto kernel_of(input_kind kind)
{
    if constexpr (ROWS <= 2)
        return stream_product<ROWS, KINDS, false, INPUT_ANY>;
    else
        return kind == INPUT_RAW    ? stream_product<ROWS, KINDS, false, INPUT_RAW>
             : kind == INPUT_NORMED ? stream_product<ROWS, KINDS, false, INPUT_NORMED>
                                    : stream_product<ROWS, KINDS, false, INPUT_GATED>;
}

/* The longest run of matrices that follow one another in memory. */
struct passing weights_of(const struct queue *q, const product_args &a)
{
    struct passing longest = {};
    const uint8_t *from = nullptr, *to = nullptr;
    for (int i = 0; i < a.n; i++) {
        const product_matrix &m = a.m[i];
        if (m.data != to) from = m.data;
        to = m.data + (m.row_bytes ? (size_t)m.rows * m.row_bytes : (size_t)tiles_of(m.rows) * m.tile);
        if ((size_t)(to - from) > longest.bytes) longest = { from, (size_t)(to - from) };
    }
    if (longest.bytes > q->passing_most) longest.bytes = q->passing_most;
    return longest;
}

template <int ROWS> void start(struct queue *q, const char *operation, dim3 grid, product_args a)
{
    if (PARTNERS<ROWS> > 1 && q->has_pdl) { /* whole pairs, of which some may have nothing to do */
        grid.x = (grid.x + 1) & ~1u;
        if (grid.x > (unsigned)q->sms) grid.x -= 2;
        q->cluster = PARTNERS<ROWS>;
    }
    a.each = a.tiles / (int)grid.x;
    a.extra = a.tiles % (int)grid.x;
    q->passing = weights_of(q, a);
    for (int i = 0; i < a.n; i++) a.stage = (int)a.m[i].tile > a.stage ? (int)a.m[i].tile : a.stage;
    a.stage = (a.stage + 127) / 128 * 128;
    size_t shared = shared_with_ring((size_t)stages_of(a.stage) * a.stage, ROWS, a.cols, a.quantize);
    bool is_long = a.kinds == WHOLE && a.kind == INPUT_RAW && a.each >= LONG_TILES;
    if (q->has_pdl && is_long && shared + OWN_SHARED <= (size_t)q->shared_max) {
        launch<BLOCK>(q, operation, true, stream_product<ROWS, WHOLE, true, INPUT_RAW>, grid, shared, a);
        return;
    }
    enum side side = ROWS > 2 ? ALONE : q->side == LEFT ? RIGHT : LEFT;
    launch_side<BLOCK>(q, operation, side,
                       a.kinds == WHOLE ? kernel_of<ROWS, WHOLE>(a.kind) : kernel_of<ROWS, CUT | TILED>(a.kind), grid,
                       product_shared(ROWS, a.cols, a.kinds & TILED, a.quantize), a);
}

void run(struct queue *q, const char *operation, product_args a)
{
    int grid = a.tiles < q->sms ? a.tiles : q->sms;
    int64_t n = a.x.rows;
    if (n == 0) return;
    if (n == 2 && product_shared(2, a.cols, a.kinds & TILED) <= (size_t)q->shared_max)
        start<2>(q, operation, dim3((unsigned)grid), a);
    else if (n > 1 && product_shared(4, a.cols, a.kinds & TILED) <= (size_t)q->shared_max)
        start<4>(q, operation, dim3((unsigned)grid, blocks(n, 4)), a);
    else
        start<1>(q, operation, dim3((unsigned)grid, (unsigned)n), a);
}

} /* namespace */

bool cuda_streams(const struct queue *q, const struct cuda_matrix *m)
{
    int unit = m->format == WEIGHT_BF16 ? 8 : m->format == WEIGHT_FP8 || m->format == WEIGHT_NVFP4 ? 16 : 0;
    return unit > 0 && m->cols % unit == 0 && m->cols > 0 && m->input != INPUT_NVFP4 &&
           product_shared(1, m->cols, true) <= (size_t)q->shared_max;
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
    /* a router's tiles take longest, and where there are more tiles than blocks some get another, of the last matrix: of the four
     * (router, shared expert's gate for all, gate, up) the router's come second, so that nobody has one of them and another */
    static const int router_second[] = { 2, 0, 1, 3 };
    for (int i = 0; i < r->n; i++) {
        int k = r->reader && r->n == 4 ? router_second[i] : i;
        add_matrix(a, cuda_matrix_of(r->w[k]), r->out[k]);
    }
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
    a.hears = q->told.used;
    a.made = r->lean ? mat{} : r->o;
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
