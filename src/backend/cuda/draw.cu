/* Draws of tokens (num/draw.h) and what comes before them. A row is cut into parts, a block each. Passes go down
 * the digits of places: the blocks of a row count tokens or weights by digit, and the last one to finish finds the
 * digit in which the sum is reached. Sums are of integers, so who comes first changes nothing. */
#include "backend/cuda/device.cuh"

namespace {

/* In this order. TOP_K for rows with a top_k, SHARE for those with a top_p; greedy rows are through after LARGEST.
 * Answers go straight into host memory. */
enum pass { LARGEST, TOP_K_0, TOP_K_1, WEIGH, SHARE_1, MARK_1, CHOOSE, PASSES };

constexpr int ROWS = 64;                        /* of one launch */
constexpr int EACH = DRAW_BINS / THREADS;       /* bins a thread looks at */
constexpr int EDITS = 65536, MASK_WORDS = 8192; /* in device memory at a time */

struct row_state {
    unsigned long long best; /* of LARGEST */
    uint32_t limit;          /* places behind it are out */
    uint32_t found;          /* the first digit of the place that is looked for, in the end the place */
    unsigned long long left; /* see draw.c: of the sum that is looked for */
    unsigned long long share;
    unsigned arrived[PASSES];
    int is_cut; /* top_k leaves some out */
};

struct scratch {
    row_state *rows;          /* [ROWS] */
    unsigned long long *bins; /* [ROWS][PASSES][DRAW_BINS] */
};

__device__ constexpr int level_of(pass p)
{
    return p == TOP_K_1 || p == SHARE_1 || p == MARK_1;
}

__device__ __forceinline__ bool allows(const uint32_t *allowed, int64_t c)
{
    return !allowed || (allowed[c / 32] >> c % 32 & 1);
}

/* Orders values, of equals the first column first; 0: not to be drawn. */
__device__ __forceinline__ unsigned long long key_of(float x, int64_t c)
{
    uint32_t u = __float_as_uint(x == 0 ? 0.0f : x);
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return x > -INFINITY ? (unsigned long long)u << 32 | (uint32_t)~c : 0;
}

__device__ __forceinline__ float value_of(unsigned long long key)
{
    uint32_t u = (uint32_t)(key >> 32);
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

/* What an earlier kernel wrote. */
template <class T> __device__ T fresh(const T *from)
{
    static_assert(sizeof(T) % 4 == 0, "whole words");
    union {
        uint32_t words[sizeof(T) / 4];
        T value;
    } u;
    for (size_t i = 0; i < sizeof(T) / 4; i++) u.words[i] = __ldcg(reinterpret_cast<const uint32_t *>(from) + i);
    return u.value;
}

/* Bins of a row, each thread its own, with what comes before them. */
struct sums {
    unsigned long long each[EACH], before, total;
};

__device__ sums scan(const unsigned long long *bins, unsigned long long *part)
{
    sums s;
    unsigned long long own = 0, up;
    for (int i = 0; i < EACH; i++) own += s.each[i] = __ldcg(bins + threadIdx.x * EACH + i);
    up = own;
    for (int o = 1; o < LANES; o *= 2) {
        unsigned long long other = __shfl_up_sync(ALL, up, o);
        if (threadIdx.x % LANES >= o) up += other;
    }
    if (threadIdx.x % LANES == LANES - 1) part[threadIdx.x / LANES] = up;
    __syncthreads();
    s.before = up - own;
    s.total = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < (int)threadIdx.x / LANES) s.before += part[w];
        s.total += part[w];
    }
    __syncthreads();
    return s;
}

struct reached {
    uint32_t digit;
    unsigned long long left;
};

/* For all threads: the bin in which the sum reaches `left`, which is 1 or more and no more than the total. */
__device__ reached find(const sums &s, unsigned long long left, reached *shared)
{
    unsigned long long before = s.before;
    for (int i = 0; i < EACH; i++) {
        if (before < left && left <= before + s.each[i]) *shared = { threadIdx.x * EACH + i, left - before };
        before += s.each[i];
    }
    __syncthreads();
    reached r = *shared;
    __syncthreads();
    return r;
}

/* What a block of a row's last pass has to itself. */
struct room {
    unsigned long long part[WARPS];
    reached found;
};

/* Down to the next digit of the token that is to be drawn, from the bins of WEIGH. */
__device__ void mark(row_state *r, const unsigned long long *weighed, const draw &d, unsigned long long kept, room *m)
{
    reached at = find(scan(weighed, m->part), draw_mark(d.uniform, kept), &m->found);
    if (threadIdx.x == 0) {
        r->found = at.digit;
        r->left = at.left;
    }
}

/* By the last block of a row, when all bins of pass P are full. */
template <pass P>
__device__ void settle(row_state *r, const row_state &was, const unsigned long long *bins, const draw &d, room *m)
{
    const unsigned long long *weighed = bins + WEIGH * DRAW_BINS;
    sums s = scan(bins + P * DRAW_BINS, m->part);
    if (P == TOP_K_0 && s.total <= (unsigned long long)d.top_k) return;
    if (P == WEIGH && !(d.top_p > 0 && d.top_p < 1)) {
        mark(r, weighed, d, s.total, m);
        return;
    }
    unsigned long long share = P == WEIGH ? draw_share(d.top_p, s.total) : was.share;
    unsigned long long left = P == TOP_K_0 ? (unsigned long long)d.top_k : P == WEIGH ? share : was.left;
    reached at = find(s, left, &m->found);
    uint32_t place = level_of(P) ? was.found << DRAW_DIGIT | at.digit : at.digit;
    if (P == SHARE_1) {
        mark(r, weighed, d, draw_kept(share, at.left, place), m);
    } else if (threadIdx.x == 0) {
        r->found = place;
        r->left = at.left;
        r->share = share;
        if (P == TOP_K_0) r->is_cut = 1;
        if (P == TOP_K_1) r->limit = place;
    }
}

__device__ bool takes_part(pass p, const row_state *r, const draw &d)
{
    if (r->best == 0 || d.scale == 0) return false;
    if (p == TOP_K_0) return d.top_k > 0;
    if (p == TOP_K_1) return r->is_cut;
    return p != SHARE_1 || (d.top_p > 0 && d.top_p < 1);
}

/* Whether this block is the last of its row; then what the others wrote can be read past the first cache. */
__device__ bool is_last(unsigned *arrived)
{
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(arrived, 1) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return last;
}

/* Grid: parts of a row, rows. */
__global__ void draw_largest(scratch s, int *out, mat x, const uint32_t *allowed, int64_t each, bool is_all)
{
    wait_for_previous();
    row_state *r = s.rows + blockIdx.y;
    const float *row = x.data + blockIdx.y * x.stride;
    int64_t first = blockIdx.x * each, end = first + each < x.cols ? first + each : x.cols;
    unsigned long long best = 0;
    for (int64_t c = first + threadIdx.x; c < end; c += THREADS) {
        unsigned long long key = key_of(__ldcg(row + c), c);
        if (key > best && allows(allowed, c)) best = key;
    }
    for (int o = LANES / 2; o > 0; o /= 2) {
        unsigned long long other = __shfl_xor_sync(ALL, best, o);
        best = other > best ? other : best;
    }
    if (threadIdx.x % LANES == 0) atomicMax(&r->best, best);
    if (!is_last(&r->arrived[LARGEST]) || threadIdx.x > 0) return;
    best = atomicMax(&r->best, 0ull);
    out[blockIdx.y] = best ? (int)~(uint32_t)best : -1;
    r->limit = DRAW_OUT - 1;
    if (!is_all) return;
    r->best = 0; /* for the next call */
    r->arrived[LARGEST] = 0;
}

__device__ __forceinline__ uint32_t place_of(const float *row, int64_t c, float top, const row_state &r, const draw &d,
                                             const uint32_t *allowed)
{
    uint32_t place = draw_place(top, __ldcg(row + c), d.scale, d.reach);
    return place <= r.limit && allows(allowed, c) ? place : DRAW_OUT;
}

template <pass P>
__global__ void draw_pass(scratch s, mat x, const uint32_t *allowed, const draw *draws, int64_t each)
{
    __shared__ unsigned long long own[DRAW_BINS];
    __shared__ room m;
    wait_for_previous();
    row_state *state = s.rows + blockIdx.y;
    const row_state r = fresh(state);
    const draw d = fresh(draws + blockIdx.y);
    if (!takes_part(P, &r, d)) return;
    const float *row = x.data + blockIdx.y * x.stride;
    unsigned long long *bins = s.bins + (int64_t)blockIdx.y * PASSES * DRAW_BINS;
    int64_t first = blockIdx.x * each, end = first + each < x.cols ? first + each : x.cols;
    float top = value_of(r.best);
    for (int i = threadIdx.x; i < DRAW_BINS; i += THREADS) own[i] = 0;
    __syncthreads();
    for (int64_t c = first + threadIdx.x; c < end; c += THREADS) {
        uint32_t place = place_of(row, c, top, r, d, allowed);
        if (place != DRAW_OUT && draw_begins(place, level_of(P), r.found))
            atomicAdd(own + draw_digit(place, level_of(P)), P <= TOP_K_1 ? 1ull : (unsigned long long)draw_weight(place));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < DRAW_BINS; i += THREADS)
        if (own[i]) atomicAdd(bins + P * DRAW_BINS + i, own[i]);
    if (is_last(&state->arrived[P])) settle<P>(state, r, bins, d, &m);
}

/* Of the tokens at the place that was found, the one that is meant. Bins: how many each part has. */
__global__ void draw_choose(scratch s, int *out, mat x, const uint32_t *allowed, const draw *draws, int64_t each)
{
    __shared__ room m;
    __shared__ int before[WARPS];
    wait_for_previous();
    row_state *state = s.rows + blockIdx.y;
    const row_state r = fresh(state);
    const draw d = fresh(draws + blockIdx.y);
    if (!takes_part(CHOOSE, &r, d)) return;
    const float *row = x.data + blockIdx.y * x.stride;
    unsigned long long *bins = s.bins + ((int64_t)blockIdx.y * PASSES + CHOOSE) * DRAW_BINS;
    int64_t first = blockIdx.x * each, end = first + each < x.cols ? first + each : x.cols;
    float top = value_of(r.best);
    int own = 0;
    for (int64_t from = first; from < end; from += THREADS) {
        int64_t c = from + threadIdx.x;
        own += __syncthreads_count(c < end && place_of(row, c, top, r, d, allowed) == r.found);
    }
    if (threadIdx.x == 0) bins[blockIdx.x] = (unsigned long long)own;
    if (!is_last(&state->arrived[CHOOSE])) return;
    reached at = find(scan(bins, m.part), (r.left - 1) / draw_weight(r.found) + 1, &m.found);
    first = at.digit * each;
    end = first + each < x.cols ? first + each : x.cols;
    for (int64_t from = first, left = (int64_t)at.left; from < end && left > 0; from += THREADS) {
        int64_t c = from + threadIdx.x;
        bool here = c < end && place_of(row, c, top, r, d, allowed) == r.found;
        unsigned lanes = __ballot_sync(ALL, here);
        if (threadIdx.x % LANES == 0) before[threadIdx.x / LANES] = __popc(lanes);
        __syncthreads();
        int rank = __popc(lanes & ((1u << threadIdx.x % LANES) - 1)), all = 0;
        for (int w = 0; w < WARPS; w++) {
            if (w < (int)threadIdx.x / LANES) rank += before[w];
            all += before[w];
        }
        if (here && rank + 1 == left) out[blockIdx.y] = (int)c;
        left -= all;
        __syncthreads();
    }
}

__global__ void mask_rows(mat x, const uint32_t *allowed, int64_t first, int64_t end)
{
    int64_t c = first + (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (c < end && !allows(allowed, c - first)) x.data[blockIdx.y * x.stride + c] = -INFINITY;
}

__global__ void edit_elements(mat x, const logit_edit *edits, int64_t n)
{
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    float *at = x.data + edits[i].row * x.stride + edits[i].column;
    *at = edit_apply(*at, edits + i);
}

template <pass P>
void run(struct queue *q, const scratch &s, mat x, const uint32_t *allowed, dim3 grid, int64_t each, bool wanted)
{
    if (wanted)
        launch(q, "draw", true, draw_pass<P>, grid, 0, s, x, allowed, (const draw *)q->draw.draws, each);
}

} /* namespace */

/* Small arrays from the host: staged by the driver before the call returns. */
static bool upload_to(struct queue *q, void *to, const void *host, size_t bytes, const char *operation)
{
    return !queue_failed(q) &&
           queue_check(q, cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, q->stream), operation);
}

void cuda_draw_sizes(struct cuda_draw *d)
{
    d->state_bytes = ROWS * (sizeof(row_state) + PASSES * DRAW_BINS * sizeof(unsigned long long));
    d->draws_bytes = ROWS * sizeof(draw);
    d->edits_bytes = EDITS * sizeof(logit_edit);
    d->mask_bytes = MASK_WORDS * sizeof(uint32_t);
    d->answers_bytes = ROWS * sizeof(int);
}

static void draw_rows(struct queue *q, int32_t *out, mat x, const uint32_t *allowed, const draw *draws)
{
    scratch s = { (row_state *)q->draw.state, nullptr };
    s.bins = (unsigned long long *)(s.rows + ROWS);
    int64_t each = x.rows < 8 ? 2048 : 8192;
    while (each * DRAW_BINS < x.cols) each *= 2;
    dim3 grid(blocks(x.cols, each), (unsigned)x.rows);
    bool any = false, any_k = false, any_p = false;
    for (int64_t i = 0; i < x.rows; i++) {
        any |= draws[i].scale > 0;
        any_k |= draws[i].scale > 0 && draws[i].top_k > 0;
        any_p |= draws[i].scale > 0 && draws[i].top_p > 0 && draws[i].top_p < 1;
    }
    size_t states = ROWS * sizeof(row_state), rows = (size_t)x.rows * PASSES * DRAW_BINS * sizeof *s.bins;
    int *answers = q->draw.answers;
    bool clears = any || q->draw.is_used;
    q->draw.is_used = any;
    if (clears && !queue_check(q, cudaMemsetAsync(s.rows, 0, any ? states + rows : states, q->stream), "draw")) return;
    if (any && !upload_to(q, q->draw.draws, draws, (size_t)x.rows * sizeof *draws, "draw")) return;
    launch(q, "draw", false, draw_largest, grid, 0, s, answers, x, allowed, each, !any);
    run<TOP_K_0>(q, s, x, allowed, grid, each, any_k);
    run<TOP_K_1>(q, s, x, allowed, grid, each, any_k);
    run<WEIGH>(q, s, x, allowed, grid, each, any);
    run<SHARE_1>(q, s, x, allowed, grid, each, any_p);
    run<MARK_1>(q, s, x, allowed, grid, each, any);
    if (any)
        launch(q, "draw", true, draw_choose, grid, 0, s, answers, x, allowed, (const draw *)q->draw.draws, each);
    if (!queue_failed(q) && queue_check(q, cudaStreamSynchronize(q->stream), "draw"))
        for (int64_t i = 0; i < x.rows; i++) out[i] = answers[i];
}

void cuda_draw(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed, const struct draw *draws)
{
    for (int64_t i = 0; i < x.rows && !queue_failed(q); i += ROWS) {
        mat some = { x.data + i * x.stride, x.rows - i < ROWS ? x.rows - i : ROWS, x.cols, x.stride };
        draw_rows(q, out + i, some, allowed, draws + i);
    }
}

void cuda_mask(struct queue *q, struct mat x, const uint32_t *allowed)
{
    const int64_t most = MASK_WORDS * 32;
    for (int64_t first = 0, end; first < x.cols && x.rows > 0; first = end) {
        end = x.cols - first < most ? x.cols : first + most;
        if (!upload_to(q, q->draw.mask, allowed + first / 32, (size_t)(end - first + 31) / 32 * 4, "mask")) return;
        launch(q, "mask", false, mask_rows, dim3(blocks(end - first), (unsigned)x.rows), 0, x,
               (const uint32_t *)q->draw.mask, first, end);
    }
}

void cuda_edit(struct queue *q, struct mat x, const struct logit_edit *edits, int64_t n)
{
    for (int64_t i = 0, some; i < n; i += some) {
        some = n - i < EDITS ? n - i : EDITS;
        if (!upload_to(q, q->draw.edits, edits + i, (size_t)some * sizeof *edits, "edit")) return;
        launch(q, "edit", false, edit_elements, dim3(blocks(some)), 0, x, (const logit_edit *)q->draw.edits, some);
    }
}
