/* Draws from the product of a few rows with a tall matrix, the head, without reading all of it. The matrix has a coarse copy of
 * half its bytes (int8, a scale a row), and how far the product with that is from the exact one is bounded. So one kernel multiplies
 * with the copy and leaves the most that each output can be; the next computes the few that may be drawn at all as product.cu
 * does, to the bit. The last of its blocks has the likeliest, or a list to draw from; where that is too long all other outputs are taken
 * for -inf and draw.cu draws. The token is that of all logits.
 *
 * The bound. A row is w = s q + d, q its codes: |x w - x s q| <= |x| |d| (Cauchy and Schwarz). x itself is multiplied as two codes, x =
 * t (a + b / 254) + r, |r| <= sqrt(n) t / 508 and t <= |x| / 127, which adds sqrt(n) / 64516 |x| |s q|. Sums in f32 on tensor cores,
 * at most 80 one after the other for COLS_MOST columns, each off by 2^-21 of |x| |w| at most, come within 10^-4 |x| |w|. What
 * multiplies |x| is kept with a row's scale. A row or an input with something that is no finite number has a bound that is none
 * either, so its outputs are computed.
 *
 * Moves: the coarse copy once for up to eight rows; then eight rows of the matrix for each output that may be drawn. */
#include "backend/cuda/barrier.cuh"
#include "backend/cuda/draw.cuh"
#include "backend/cuda/stream.cuh"

namespace {

constexpr int UNIT = 64, UNIT_SIZE = 8 * UNIT; /* columns, bytes: eight rows; a lane's 16 bytes follow the lane's before */
/* A warp's codes come in pieces of so many units, of which so many are under way. */
constexpr int PIECE_UNITS = 4, PIECE_SIZE = PIECE_UNITS * UNIT_SIZE, PIECES = 3;
constexpr int COLS_MOST = 16384;
constexpr int RING = 4;
constexpr float LEAST = 1e-4f, TINY = 1e-37f; /* of what is below numbers of full precision */

/* A row's scale, and its bound for inputs of length 1. */
struct coarse_row {
    float scale, bound;
};

__host__ __device__ inline int coarse_units(int cols)
{
    return (cols + UNIT * PIECE_UNITS - 1) / (UNIT * PIECE_UNITS) * PIECE_UNITS;
}

inline int64_t coarse_codes(int64_t rows, int cols)
{
    return (rows + 7) / 8 * coarse_units(cols) * UNIT_SIZE;
}

__device__ __forceinline__ int code_of(float x)
{
    return __float2int_rn(fminf(fmaxf(x, -127.0f), 127.0f));
}

/* A warp a row. */
__global__ void coarsen_rows(int8_t *codes, coarse_row *about, const __nv_bfloat16 *w, int rows, int cols)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / LANES;
    int lane = threadIdx.x % LANES;
    if (row >= rows) return;
    const __nv_bfloat16 *from = w + row * cols;
    int8_t *to = codes + (row / 8 * coarse_units(cols) * UNIT_SIZE + row % 8 * UNIT);
    float top = 0, length = 0, off = 0; /* both in steps of the codes */
    for (int c = lane; c < cols; c += LANES) top = fmaxf(top, fabsf(__bfloat162float(from[c])));
    top = warp_max(top);
    float scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0;
    for (int c = lane; c < cols; c += LANES) {
        float x = __bfloat162float(from[c]) * inverse, d = x - (float)code_of(x);
        length = fmaf(x, x, length);
        off = fmaf(d, d, off);
        to[c / UNIT * UNIT_SIZE + c % UNIT] = (int8_t)code_of(x);
    }
    length = scale * sqrtf(warp_sum(length));
    off = scale * sqrtf(warp_sum(off));
    if (lane > 0) return;
    float bound = 1.001f * (off + (LEAST + 1.02f * sqrtf((float)cols) / 64516.0f) * length);
    bool finite = bound < INFINITY; /* so is the row then */
    about[row] = { finite ? scale : 0, finite ? bound : INFINITY };
}

struct coarse_args {
    const uint8_t *codes;
    const coarse_row *about;
    const uint32_t *allowed;
    mat x, y;
    float *least; /* [x.rows][warps of the grid]: the largest of what outputs of a warp's tiles are at least */
    int rows, tiles, units;
};

/* Output r of input row a: what it is at most goes to y, what it is at least is returned. sum: of both codes of x. */
__device__ __forceinline__ float settle(const coarse_args &p, int a, int r, uint32_t allowed, float sum, float step, float length,
                                        coarse_row about)
{
    if (r >= p.rows) return -INFINITY;
    float v = step * about.scale * sum, e = fmaf(length, about.bound, TINY);
    p.y.data[a * p.y.stride + r] = v + e;
    return (allowed >> r % 32 & 1) && fabsf(v) < INFINITY ? v - e : -INFINITY;
}

/* f(column, values) for a thread's pairs of columns of a row, of which the first are kept; others are read again. */
constexpr int EACH = 2;
template <class F> __device__ __forceinline__ void each_pair(const float *x, int cols, const float2 (&kept)[EACH], F f)
{
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (2 * ((int)threadIdx.x + i * BLOCK) < cols) f(2 * ((int)threadIdx.x + i * BLOCK), kept[i]);
#pragma unroll 1
    for (int c = 2 * ((int)threadIdx.x + EACH * BLOCK); c < cols; c += 2 * BLOCK) f(c, load_pair(x, c));
}

/* A warp's tiles, piece by piece. Where the device copies by itself they come through a ring of the warp's own; elsewhere they are
 * loaded when they are multiplied. */
struct coarse_stream {
    uint8_t *ring;
    uint64_t *full; /* [PIECES] */
    const uint8_t *codes, *at;
    int tile, step, tiles, left, pieces; /* asked for next; left: pieces of it */
    ring_place next;

    __device__ __forceinline__ coarse_stream(const coarse_args &p, uint8_t *shared, uint64_t (*barriers)[PIECES])
        : ring(shared + threadIdx.x / LANES * PIECES * PIECE_SIZE), full(barriers[threadIdx.x / LANES]), codes(p.codes), at(nullptr),
          tile(blockIdx.x * CREW + threadIdx.x / LANES), step(gridDim.x * CREW), tiles(p.tiles), left(0),
          pieces(p.units / PIECE_UNITS), next{}
    {
    }

    __device__ __forceinline__ void begin()
    {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x % LANES == 0) {
            for (int i = 0; i < PIECES; i++) barrier_init(&full[i], 1);
            barriers_ready();
            for (int i = 0; i < PIECES; i++) ask(i);
        }
        __syncwarp();
#endif
    }

    /* By one lane. */
    __device__ __forceinline__ void ask(int slot)
    {
        if (left == 0) {
            if (tile >= tiles) return;
            at = codes + (int64_t)tile * pieces * PIECE_SIZE;
            tile += step;
            left = pieces;
        }
#if __CUDA_ARCH__ >= 900
        barrier_expect(&full[slot], PIECE_SIZE);
        copy_bulk_once(shared_at(ring + slot * PIECE_SIZE), at, PIECE_SIZE, shared_at(&full[slot]));
#endif
        at += PIECE_SIZE;
        left--;
    }

    /* f(unit of the piece, 16 bytes of this lane's row) for the next one, which then makes room for another. */
    template <class F> __device__ __forceinline__ void piece(F f)
    {
        int lane = threadIdx.x % LANES;
#if __CUDA_ARCH__ >= 900
        barrier_wait(&full[next.slot], next.phase);
        const uint8_t *from = ring + next.slot * PIECE_SIZE;
#else
        ask(0);
        const uint8_t *from = at - PIECE_SIZE;
#endif
#pragma unroll
        for (int i = 0; i < PIECE_UNITS; i++) f(i, *(const uint4 *)(from + i * UNIT_SIZE + lane * 16));
#if __CUDA_ARCH__ >= 900
        __syncwarp();
        if (lane == 0) ask(next.slot);
        next.advance(PIECES);
#endif
    }
};

/* HALVES 1: up to four rows, 2: up to eight. Shared memory: rings; codes of x, [8 * HALVES][columns and 16 bytes]: a row's are slots
 * 2 a and 2 a + 1. */
template <int HALVES> __global__ void __launch_bounds__(BLOCK, 1) coarse_product(const __grid_constant__ coarse_args p)
{
    constexpr int N = 4 * HALVES;
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ float part[2][N][CREW];
    __shared__ uint64_t full[CREW][PIECES];
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
    int stride = p.units * UNIT + 16, n = (int)p.x.rows, cols = (int)p.x.cols;
    uint8_t *slots = shared + CREW * PIECES * PIECE_SIZE;
    coarse_stream codes(p, shared, full);
    codes.begin();
    let_next_start();
    for (int i = threadIdx.x; i < 2 * N * stride / 16; i += BLOCK) ((uint4 *)slots)[i] = uint4{};
    __syncthreads();
    wait_for_previous();
    float2 kept[N][EACH];
#pragma unroll
    for (int a = 0; a < N; a++)
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int c = 2 * (threadIdx.x + i * BLOCK);
            kept[a][i] = a < n && c < cols ? load_pair(p.x.data + a * p.x.stride, c) : float2{};
        }
#pragma unroll
    for (int a = 0; a < N; a++) {
        if (a >= n) continue;
        float top = 0;
        each_pair(p.x.data + a * p.x.stride, cols, kept[a],
                  [&](int, float2 v) { top = fmaxf(top, fmaxf(fabsf(v.x), fabsf(v.y))); });
        top = warp_max(top);
        if (lane == 0) part[0][a][warp] = top;
    }
    __syncthreads();
    float step[HALVES] = {}, length[HALVES] = {}; /* of this lane's rows 4 h + g / 2: what its codes are multiplied by */
#pragma unroll
    for (int a = 0; a < N; a++) {
        if (a >= n) continue;
        float top = warp_max(part[0][a][lane % CREW]), inverse = top > 0 ? 127.0f / top : 0, sum = 0;
        if (a % 4 == g / 2) step[a / 4] = top / 127.0f;
        each_pair(p.x.data + a * p.x.stride, cols, kept[a], [&](int c, float2 v) {
            float2 u = { v.x * inverse, v.y * inverse };
            int first[2] = { code_of(u.x), code_of(u.y) };
            int second[2] = { code_of((u.x - (float)first[0]) * 254.0f), code_of((u.y - (float)first[1]) * 254.0f) };
            sum = fmaf(u.x, u.x, fmaf(u.y, u.y, sum));
            *(uint16_t *)(slots + 2 * a * stride + c) = (uint16_t)((first[0] & 255) | (first[1] & 255) << 8);
            *(uint16_t *)(slots + (2 * a + 1) * stride + c) = (uint16_t)((second[0] & 255) | (second[1] & 255) << 8);
        });
        sum = warp_sum(sum);
        if (lane == 0) part[1][a][warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int a = 0; a < N; a++) {
        if (a >= n) continue;
        float sum = warp_sum(lane < CREW ? part[1][a][lane] : 0);
        if (a % 4 == g / 2) length[a / 4] = 1.001f * step[a / 4] * sqrtf(sum);
    }
    const uint8_t *x0 = slots + g * stride + t * 16, *x1 = x0 + 8 * stride;
    float best[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) best[h] = -INFINITY;
#pragma unroll 1
    for (int tile = blockIdx.x * CREW + warp; tile < p.tiles; tile += gridDim.x * CREW) {
        int sum[4] = {}, r = tile * 8 + 2 * t;
        uint32_t allowed = p.allowed ? p.allowed[r / 32] : ALL;
        float4 about = __ldcs((const float4 *)(p.about + r));
#pragma unroll 1
        for (int u = 0; u < p.units; u += PIECE_UNITS)
            codes.piece([&](int i, uint4 w) {
                uint4 low = *(const uint4 *)(x0 + (u + i) * UNIT), high = {};
                if (HALVES > 1) high = *(const uint4 *)(x1 + (u + i) * UNIT);
                mma_bytes(sum, low.x, high.x, low.y, high.y, w.x, w.y);
                mma_bytes(sum, low.z, high.z, low.w, high.w, w.z, w.w);
            });
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            float own[2] = { (float)sum[2 * h], (float)sum[2 * h + 1] };
            float other[2] = { __shfl_xor_sync(ALL, own[0], 4), __shfl_xor_sync(ALL, own[1], 4) };
            int a = 4 * h + g / 2;
            if (g % 2 || a >= n) continue;
            float one = settle(p, a, r, allowed, own[0] + other[0] / 254.0f, step[h], length[h], { about.x, about.y });
            float two = settle(p, a, r + 1, allowed, own[1] + other[1] / 254.0f, step[h], length[h], { about.z, about.w });
            best[h] = fmaxf(best[h], fmaxf(one, two));
        }
    }
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float most = fmaxf(best[h], __shfl_xor_sync(ALL, best[h], 1));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
        int a = 4 * h + g / 2;
        if (g % 2 == 0 && t == 0 && a < n) p.least[a * gridDim.x * CREW + blockIdx.x * CREW + warp] = most;
    }
}

struct refine_args {
    const uint8_t *data; /* BF16, as stored */
    const uint32_t *allowed;
    mat x, y;
    const float *least;
    int bounds; /* of a row at `least` */
    int rows, tiles, each, units;
    int top[COARSE_ROWS];     /* outputs at least that are to be drawn from */
    float slack[COARSE_ROWS]; /* and those so little below the last of them */
    draw draws[COARSE_ROWS];
    bool greedy; /* the likeliest is wanted of every row: y need not be told */
    coarse_best *best;
    token_place *lists; /* [rows][LIST_MOST] */
    int *out;
};

/* Largest value that `top` threads' x reach, up to the last 12 bits; part: [2][CREW]. */
__device__ __forceinline__ float reached_by(float x, int top, int (*part)[CREW])
{
    uint32_t mine = ordered(x), at = 0;
    int lane = threadIdx.x % LANES;
#pragma unroll 1
    for (int bit = 31, turn = 0; bit >= 12; bit--, turn ^= 1) {
        int n = __popc(__ballot_sync(ALL, mine >= (at | 1u << bit)));
        if (lane == 0) part[turn][threadIdx.x / LANES] = n;
        __syncthreads();
        n = __reduce_add_sync(ALL, lane < CREW ? part[turn][lane] : 0);
        if (n >= top) at |= 1u << bit;
    }
    return at ? unordered(at) : -INFINITY;
}

/* ---- a draw from few tokens ---- */

constexpr int LIST_MOST = BLOCK;

struct few_tokens {
    token_place found[LIST_MOST], sorted[LIST_MOST]; /* places; in their order, then that of the ids */
    unsigned long long weight[LIST_MOST];            /* of the sorted */
    float most[CREW];
    int part[2][CREW], n;
};

/* The first of n tokens with which the weights reach `target`, by a warp; n: they do not. *sum: of the weights up to it, or all. */
__device__ __forceinline__ int walk(const unsigned long long *weight, int n, unsigned long long target, unsigned long long *sum)
{
    int lane = threadIdx.x % LANES;
    unsigned long long before = 0;
#pragma unroll 1
    for (int first = 0; first < n; first += LANES) {
        unsigned long long up = first + lane < n ? weight[first + lane] : 0;
        for (int o = 1; o < LANES; o *= 2) {
            unsigned long long other = __shfl_up_sync(ALL, up, o);
            if (lane >= o) up += other;
        }
        up += before;
        uint32_t reached = __ballot_sync(ALL, first + lane < n && up >= target);
        int at = reached ? __ffs(reached) - 1 : LANES - 1;
        before = __shfl_sync(ALL, up, at);
        *sum = before;
        if (reached) return first + at;
    }
    return n;
}

/* As draw_token of a row whose only logits are the first n threads' x, of tokens `id`. top, slack: as struct refine_args has them.
 * The block's first warp has the answer. */
__device__ int draw_from_few(few_tokens *m, float x, uint32_t id, int n, const draw &d, int top, float slack)
{
    bool mine = (int)threadIdx.x < n;
    float limit = -INFINITY, largest = block_max<CREW>(mine ? x : -INFINITY, m->most);
    if (threadIdx.x == 0) m->n = 0;
    if (n > top) limit = reached_by(mine ? x : -INFINITY, top, m->part) - slack;
    __syncthreads();
    uint32_t place = d.scale > 0 ? draw_place(largest, x, d.scale, d.reach) : draw_place(largest, x, 1, 0);
    mine = mine && x >= limit && place != DRAW_OUT;
    if (mine) m->found[atomicAdd(&m->n, 1)] = { place, id };
    __syncthreads();
    n = m->n;
    if (mine) {
        int rank = 0;
#pragma unroll 4
        for (int k = 0; k < n; k++) {
            token_place other = m->found[k];
            rank += other.place < place || (other.place == place && other.id < id);
        }
        m->sorted[rank] = { place, id };
        m->weight[rank] = draw_weight(place);
    }
    __syncthreads();
    if (threadIdx.x >= LANES) return 0;
    if (n == 0) return -1;
    if (d.scale == 0) return (int)m->sorted[0].id;
    if (d.top_k > 0 && n > d.top_k) {
        uint32_t last = m->sorted[d.top_k - 1].place;
        int end = d.top_k;
        while (end < n && m->sorted[end].place == last) end++;
        n = end;
    }
    unsigned long long sum = 0;
    walk(m->weight, n, UINT64_MAX, &sum);
    if (d.top_p > 0 && d.top_p < 1) walk(m->weight, n, draw_share(d.top_p, sum), &sum);
    return (int)m->sorted[walk(m->weight, n, draw_mark(d.uniform, sum), &sum)].id;
}

/* Outputs of row blockIdx.y, `each` tiles of eight a block. Shared memory: ring, slots [4][stride], two sets of sums [CREW][8], list of
 * tiles [each], which of a tile's outputs may be drawn [each]. */
__global__ void __launch_bounds__(BLOCK, 2) refine(const __grid_constant__ refine_args p)
{
    SHARED_MEMORY(uint8_t, shared, 128);
    __shared__ int part[2][CREW], found;
    __shared__ float most_of[CREW];
    int stride = slot_stride((int)p.x.cols), warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, cols = (int)p.x.cols;
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(shared + ring_bytes(RING, false));
    float *sums = (float *)(slots + SLOTS * stride);
    int *list = (int *)(sums + 2 * CREW * 8), *which = list + p.each;
    int row = blockIdx.y, first = blockIdx.x * p.each, end = min(first + p.each, p.tiles);
    float *y = p.y.data + row * p.y.stride;
    const float *x = p.x.data + row * p.x.stride;
    share s = share_at(p.units, share_of(p.units, CREW), warp);
    int row_bytes = 2 * cols;
    unsigned long long best = 0;
    coarse_best *own = p.best + row;
    token_place *list_of = p.lists + row * LIST_MOST;
    let_next_start();
    put_padding(slots, stride, cols, threadIdx.x, BLOCK);
    /* Once for nothing, with the block's first tile, while the coarse product goes on: then the code is near. */
#pragma unroll 1
    for (int real = 0; real < 2; real++) {
        if (threadIdx.x == 0) found = 0;
        if (real) wait_for_previous();
        float least = -INFINITY;
        for (int i = threadIdx.x; i < p.bounds; i += BLOCK) least = fmaxf(least, __ldcg(p.least + row * p.bounds + i));
        for (int c = 2 * threadIdx.x; c < cols; c += 2 * BLOCK) put_parts(slots, stride, c, load_pair(x, c));
        float limit = p.greedy ? block_max<CREW>(least, most_of) : reached_by(least, p.top[row], part) - p.slack[row];
        for (int tile = first + threadIdx.x; tile < end; tile += BLOCK) {
            uint32_t allowed = p.allowed ? p.allowed[tile / 4] >> tile % 4 * 8 : ALL;
            int mask = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int r = tile * 8 + i;
                float most = r < p.rows ? __ldcg(y + r) : -INFINITY;
                if (r < p.rows && (allowed >> i & 1) && !(most < limit))
                    mask |= 1 << i;
                else if (r < p.rows && real && !p.greedy)
                    y[r] = -INFINITY;
            }
            if (real ? mask == 0 : tile > first) continue;
            int k = atomicAdd(&found, 1);
            list[k] = tile;
            which[k] = real ? mask : 0;
        }
        __syncthreads();
        int n = found, asked = 0;
        stream<WHOLE, RING> weights(shared);
        auto next = [&]() {
            if (asked == n) return false;
            weights.begin(weights.lane_at(p.data + (int64_t)list[asked++] * 8 * row_bytes, row_bytes, s.first), row_bytes, s);
            return true;
        };
#pragma unroll 1
        for (int i = 0; i < RING; i++) weights.ask(next);
#pragma unroll 1
        for (int k = 0; k < n; k++) {
            float sum[4], *set = sums + k % 2 * CREW * 8;
            weights.template work<1>(sum, WEIGHT_BF16, s, slots, stride, SLOTS, false, next);
            if (lane < 4) *(float2 *)(set + warp * 8 + lane * 2) = make_float2(sum[0], sum[1]);
            __syncthreads();
            if (threadIdx.x >= 8 || !(which[k] >> threadIdx.x & 1)) continue;
            float total = 0;
            for (int i = 0; i < CREW; i++) total += set[i * 8 + threadIdx.x];
            int r = list[k] * 8 + threadIdx.x;
            unsigned long long key = key_of(total, r);
            if (key > best) best = key;
            if (p.greedy) continue;
            y[r] = total;
            unsigned at = key ? atomicAdd(&own->found, 1) : LIST_MOST;
            if (at < LIST_MOST) list_of[at] = { __float_as_uint(total), (uint32_t)r };
        }
        copy_wait<0>();
        __syncthreads();
    }
    if (p.greedy && best) atomicMax(&own->key, best);
    if (!is_last(&own->arrived)) return;
    if (p.greedy) {
        if (threadIdx.x == 0) answer(p.out + row, column_of(__ldcg(&own->key)));
        if (threadIdx.x == 0) *own = coarse_best{};
        return;
    }
    int n = (int)__ldcg(&own->found), id = -1;
    __syncthreads(); /* all have it */
    if (n <= LIST_MOST) {
        bool mine = (int)threadIdx.x < n;
        float x = mine ? __uint_as_float(__ldcg(&list_of[threadIdx.x].place)) : 0;
        id = draw_from_few((few_tokens *)shared, x, mine ? __ldcg(&list_of[threadIdx.x].id) : 0, n, p.draws[row], p.top[row],
                           p.slack[row]);
    }
    if (threadIdx.x > 0) return;
    *own = coarse_best{ 0, 0, 0, n <= LIST_MOST };
    if (n <= LIST_MOST) answer(p.out + row, id);
}

size_t coarse_shared(int halves, int cols)
{
    return CREW * PIECES * PIECE_SIZE + (size_t)8 * halves * (coarse_units(cols) * UNIT + 16);
}

size_t refine_shared(int cols, int each)
{
    static_assert(sizeof(few_tokens) <= ring_bytes(RING, false), "they lie where the ring was");
    return ring_bytes(RING, false) + SLOTS * slot_stride(cols) * 2 + 2 * CREW * 8 * sizeof(float) + 2 * each * sizeof(int);
}

/* Largest part of a row's outputs that blocks may be given: what they list has to fit. */
constexpr int EACH_MOST = 4096;

/* Tokens of a place stay together (num/draw.h): of 2^-19 nats, and a distance of up to DRAW_REACH is rounded to a few of these. */
float slack_of(const draw &d)
{
    return d.scale > 0 ? 0x1p-16f / d.scale : 0;
}

} /* namespace */

uint64_t cuda_coarse_bytes(struct queue *q, enum weight_format format, int64_t rows, int64_t cols)
{
    if (format != WEIGHT_BF16 || cols % UNIT != 0 || cols > COLS_MOST || rows < 1024 || rows > INT32_MAX / 8 ||
        coarse_shared(2, (int)cols) > (size_t)q->shared_max || refine_shared((int)cols, EACH_MOST) > (size_t)q->shared_max)
        return 0;
    return (uint64_t)coarse_codes(rows, (int)cols) + ((uint64_t)rows + 8) * sizeof(coarse_row);
}

void cuda_weight_coarsen(struct queue *q, struct weight *weight)
{
    struct cuda_weight *w = (struct cuda_weight *)weight;
    struct err none = {};
    uint64_t bytes = cuda_coarse_bytes(q, weight->format, weight->rows, weight->cols);
    int rows = (int)weight->rows, cols = (int)weight->cols;
    if (bytes == 0 || weight->coarse_bytes > 0 || !queue_take(q, &w->coarse, bytes, "coarse head", &none)) return;
    if (!queue_check(q, cudaMemsetAsync(w->coarse, 0, bytes, q->stream), "weights")) return;
    coarse_row *about = (coarse_row *)((char *)w->coarse + coarse_codes(rows, cols));
    launch(q, "weights", false, coarsen_rows, dim3(blocks(rows, WARPS)), 0, (int8_t *)w->coarse, about,
           (const __nv_bfloat16 *)w->data, rows, cols);
    weight->coarse_bytes = bytes;
}

size_t cuda_coarse_scratch(const struct queue *q)
{
    return (size_t)COARSE_ROWS * (size_t)q->sms * CREW * sizeof(float);
}

bool cuda_draw_coarse(struct queue *q, int32_t *out, struct mat y, struct mat x, const struct weight *w, const uint32_t *allowed,
                      const struct draw *draws)
{
    struct cuda_matrix m = cuda_matrix_of(w);
    if (x.rows == 0 || !draws_coarse(w, x.rows, draws) || queue_prompts(q)) return false;
    if (!cuda_draw_begin(q, x.rows)) return true;
    coarse_args a = {};
    const uint8_t *coarse = (const uint8_t *)((const struct cuda_weight *)w)->coarse;
    a.codes = coarse;
    a.about = (const coarse_row *)(coarse + coarse_codes(m.rows, m.cols));
    a.allowed = allowed;
    a.x = x;
    a.y = y;
    a.least = q->draw.least;
    a.rows = m.rows;
    a.tiles = tiles_of(m.rows);
    a.units = coarse_units(m.cols);
    int grid = q->sms, halves = x.rows > 4 ? 2 : 1;
    launch<BLOCK>(q, "draw_product", true, halves > 1 ? coarse_product<2> : coarse_product<1>, dim3((unsigned)grid),
                  coarse_shared(halves, m.cols), a);
    refine_args r = {};
    r.data = (const uint8_t *)m.data;
    r.allowed = allowed;
    r.x = x;
    r.y = y;
    r.least = a.least;
    r.bounds = grid * CREW;
    r.rows = a.rows;
    r.tiles = a.tiles;
    int blocks_each = 2 * grid / (int)x.rows; /* two fit a multiprocessor */
    if (blocks_each > grid) blocks_each = grid;
    r.each = (a.tiles + blocks_each - 1) / blocks_each;
    if (r.each > EACH_MOST) r.each = EACH_MOST;
    r.units = units_of(WEIGHT_BF16, m.cols);
    bool greedy = true;
    for (int64_t i = 0; i < x.rows; i++) {
        r.top[i] = draws[i].scale > 0 ? draws[i].top_k : 1;
        r.slack[i] = slack_of(draws[i]);
        r.draws[i] = draws[i];
        greedy = greedy && draws[i].scale == 0;
    }
    r.greedy = greedy;
    r.best = coarse_of(&q->draw);
    r.lists = (token_place *)q->draw.draws;
    r.out = q->draw.answers;
    launch<BLOCK>(q, "draw_product", true, refine, dim3(blocks(a.tiles, r.each), (unsigned)x.rows),
                  refine_shared(m.cols, r.each), r);
    if (!greedy) cuda_draw_rows(q, y, allowed, draws, true); /* of rows with too many for the list */
    cuda_draw_end(q, out, x.rows);
    return true;
}
