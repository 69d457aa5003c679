/* Draws of tokens (num/draw.h) and what comes before them. A row is cut into parts, a block each; what concerns a row as a
 * whole is done by the last of its blocks to finish. Three kernels: the largest logit, which is all that a greedy row needs;
 * a count of the tokens, or of their weights, by the first digit of their places, which tells the few digits that all the
 * rest is about; a list of the tokens that have them, from which the last block draws. Sums are of integers, so who comes
 * first changes nothing. A draw leaves its counters at zero. */
#include "backend/cuda/draw.cuh"

namespace {

constexpr int ROWS = 64, LIST = 8192;           /* rows of a launch; tokens listed of a row */
constexpr int EACH = DRAW_BINS / THREADS;       /* bins a thread looks at */
constexpr int EDITS = 65536, MASK_WORDS = 8192; /* in device memory at a time */

struct row_state {
    unsigned long long best;              /* 0: no token */
    unsigned long long share, share_left; /* of top_p: the sum of weights, what is left of it in bin share_digit */
    unsigned long long cut_left;          /* of top_k, in bin `last` */
    uint32_t first, last, share_digit;    /* digits of the tokens that are listed: first .. last and share_digit */
    unsigned is_cut;                      /* top_k leaves some out */
    unsigned arrived[3], listed;
};

struct scratch {
    row_state *rows;          /* [ROWS] */
    unsigned long long *bins; /* [ROWS][DRAW_BINS] */
    token_place *lists;       /* [ROWS][LIST] */
};

struct draw_list {
    draw d[ROWS];
};

__device__ __forceinline__ float value_of(unsigned long long key)
{
    return unordered((uint32_t)(key >> 32));
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

/* A row as its blocks see it. */
struct part {
    const float *x;
    const uint32_t *allowed;
    int64_t first, end, cols; /* the block's columns, all */

    /* f(column, logit) for columns [from, to), several asked for at a time. */
    template <class F> __device__ __forceinline__ void each(int64_t from, int64_t to, F f) const
    {
        constexpr int AHEAD = 8;
        for (int64_t c = from + threadIdx.x; c < to; c += AHEAD * THREADS) {
            float v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) v[i] = c + i * THREADS < to ? __ldcg(x + c + i * THREADS) : 0;
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (c + i * THREADS < to) f(c + i * THREADS, v[i]);
        }
    }
    __device__ __forceinline__ uint32_t place(int64_t c, float v, float top, const draw &d) const
    {
        uint32_t p = draw_place(top, v, d.scale, d.reach);
        return p != DRAW_OUT && allows(allowed, c) ? p : DRAW_OUT;
    }
};

__device__ part part_of(const mat &x, const uint32_t *allowed, int64_t each)
{
    int64_t first = blockIdx.x * each, end = first + each < x.cols ? first + each : x.cols;
    return { x.data + blockIdx.y * x.stride, allowed, first, end, x.cols };
}

/* ---- sums over bins, by a block ---- */

struct reached {
    uint32_t digit;
    unsigned long long left, inside; /* see draw.c: of the sum that is looked for; the bin's own */
};

struct room {
    unsigned long long part[WARPS];
    reached found;
};

/* Bins of a row, each thread its own, with what comes before them. */
struct sums {
    unsigned long long each[EACH], before, total;
};

__device__ sums scan(const unsigned long long *bins, room *m)
{
    sums s;
    unsigned long long own = 0, up;
    for (int i = 0; i < EACH; i++) own += s.each[i] = bins[threadIdx.x * EACH + i];
    up = own;
    for (int o = 1; o < LANES; o *= 2) {
        unsigned long long other = __shfl_up_sync(ALL, up, o);
        if (threadIdx.x % LANES >= o) up += other;
    }
    if (threadIdx.x % LANES == LANES - 1) m->part[threadIdx.x / LANES] = up;
    __syncthreads();
    s.before = up - own;
    s.total = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < (int)threadIdx.x / LANES) s.before += m->part[w];
        s.total += m->part[w];
    }
    __syncthreads();
    return s;
}

/* For all threads: the bin in which the sum reaches `left`, which is 1 or more and no more than the total. */
__device__ reached find(const sums &s, unsigned long long left, room *m)
{
    unsigned long long before = s.before;
    for (int i = 0; i < EACH; i++) {
        if (before < left && left <= before + s.each[i]) m->found = { threadIdx.x * EACH + i, left - before, s.each[i] };
        before += s.each[i];
    }
    __syncthreads();
    reached r = m->found;
    __syncthreads();
    return r;
}

__device__ void clear(unsigned long long *bins)
{
    for (int i = threadIdx.x; i < DRAW_BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
}

/* ---- the largest ---- */

/* Grid of this and the others: parts of a row, rows. done: of rows that may have their token already, or NULL; without a largest logit the
 * others do nothing. */
__global__ void draw_largest(scratch s, int *out, mat x, const uint32_t *allowed, const __grid_constant__ draw_list draws, int64_t each,
                             const coarse_best *done)
{
    wait_for_previous();
    let_next_start();
    if (done && __ldcg(&done[blockIdx.y].done)) return;
    row_state *r = s.rows + blockIdx.y;
    part p = part_of(x, allowed, each);
    unsigned long long best = 0;
    p.each(p.first, p.end, [&](int64_t c, float v) {
        unsigned long long key = key_of(v, c);
        if (key > best && allows(allowed, c)) best = key;
    });
    best = warp_largest(best);
    if (threadIdx.x % LANES == 0) atomicMax(&r->best, best);
    if (!is_last(&r->arrived[0]) || threadIdx.x > 0) return;
    best = atomicMax(&r->best, 0ull);
    r->arrived[0] = 0;
    if (draws.d[blockIdx.y].scale > 0 && best) return; /* another kernel's answer */
    r->best = 0;
    answer(out + blockIdx.y, column_of(best));
}

/* ---- what the rest is about ---- */

/* Of counts by first digits: those up to the one in which the k-th token is. */
__device__ void choose_cut(row_state *r, const sums &s, const draw &d, room *m)
{
    bool is_cut = s.total > (unsigned long long)d.top_k;
    reached at = { DRAW_BINS - 1, 0, 0 };
    if (is_cut) at = find(s, (unsigned long long)d.top_k, m);
    if (threadIdx.x > 0) return;
    r->is_cut = is_cut;
    r->cut_left = at.left;
    r->first = 0;
    r->last = r->share_digit = at.digit;
}

/* Of weights by first digits: the one in which top_p ends, and those that the token may have that is drawn. Where top_p ends
 * within its digit is not known yet, so the draw's mark lies between two. */
__device__ void choose_mark(row_state *r, const sums &s, const draw &d, room *m)
{
    unsigned long long share = s.total, least = s.total, most = s.total;
    reached at = {};
    bool has_share = d.top_p > 0 && d.top_p < 1;
    if (has_share) {
        share = draw_share(d.top_p, s.total);
        at = find(s, share, m);
        least = share - at.left + 1;
        most = share - at.left + at.inside;
    }
    reached low = find(s, draw_mark(d.uniform, least), m), high = find(s, draw_mark(d.uniform, most), m);
    if (threadIdx.x > 0) return;
    r->share = share;
    r->share_left = at.left;
    r->first = low.digit;
    r->last = high.digit;
    r->share_digit = has_share ? at.digit : low.digit;
}

__global__ void draw_count(scratch s, mat x, const uint32_t *allowed, const __grid_constant__ draw_list draws, int64_t each)
{
    __shared__ unsigned long long own[DRAW_BINS];
    __shared__ room m;
    clear(own);
    wait_for_previous();
    let_next_start();
    row_state *state = s.rows + blockIdx.y;
    const draw &d = draws.d[blockIdx.y];
    unsigned long long best = __ldcg(&state->best), *bins = s.bins + (int64_t)blockIdx.y * DRAW_BINS;
    if (d.scale == 0 || best == 0) return;
    part p = part_of(x, allowed, each);
    float top = value_of(best);
    bool counts = d.top_k > 0;
    p.each(p.first, p.end, [&](int64_t c, float v) {
        uint32_t place = p.place(c, v, top, d);
        if (place != DRAW_OUT)
            atomicAdd(own + draw_digit(place, 0), counts ? 1ull : (unsigned long long)draw_weight(place));
    });
    __syncthreads();
    for (int i = threadIdx.x; i < DRAW_BINS; i += THREADS)
        if (own[i]) atomicAdd(bins + i, own[i]);
    if (!is_last(&state->arrived[1])) return;
    for (int i = threadIdx.x; i < DRAW_BINS; i += THREADS) own[i] = __ldcg(bins + i);
    __syncthreads();
    if (counts)
        choose_cut(state, scan(own, &m), d, &m);
    else
        choose_mark(state, scan(own, &m), d, &m);
}

/* ---- the draw ---- */

__device__ __forceinline__ bool is_listed(const row_state &r, uint32_t place)
{
    uint32_t digit = draw_digit(place, 0);
    return place != DRAW_OUT && ((r.first <= digit && digit <= r.last) || digit == r.share_digit);
}

/* The tokens that are listed, to a row's last block: where they are too many for the list, the row is gone through anew. */
struct tokens {
    const part &p;
    const token_place *list;
    const row_state &r;
    const draw &d;
    unsigned n;
    float top;

    template <class F> __device__ __forceinline__ void each(F f) const
    {
        if (n <= LIST) {
            for (unsigned i = threadIdx.x; i < n; i += THREADS) f(__ldcg(&list[i].place), __ldcg(&list[i].id));
            return;
        }
        p.each(0, p.cols, [&](int64_t c, float v) {
            uint32_t place = p.place(c, v, top, d);
            if (is_listed(r, place)) f(place, (uint32_t)c);
        });
    }
    /* Weights (or 1) by the second digit of the places that begin with `digit`, and where they reach `left`. */
    template <bool WEIGHTS> __device__ reached find_second(uint32_t digit, unsigned long long left, unsigned long long *own, room *m) const
    {
        clear(own);
        each([&](uint32_t place, uint32_t) {
            if (draw_digit(place, 0) == digit)
                atomicAdd(own + draw_digit(place, 1), WEIGHTS ? (unsigned long long)draw_weight(place) : 1ull);
        });
        __syncthreads();
        return find(scan(own, m), left, m);
    }
    /* The id number k, from 1, of the tokens at a place. */
    __device__ uint32_t find_id(uint32_t place, unsigned long long k, unsigned long long *own, room *m) const
    {
        uint32_t high = 0;
        for (int level = 0; level < 2; level++) {
            clear(own);
            each([&](uint32_t other, uint32_t id) {
                if (other == place && (level == 0 || id >> DRAW_DIGIT == high))
                    atomicAdd(own + (level ? id & (DRAW_BINS - 1u) : id >> DRAW_DIGIT), 1ull);
            });
            __syncthreads();
            reached at = find(scan(own, m), k, m);
            if (level) return high << DRAW_DIGIT | at.digit;
            high = at.digit;
            k = at.left;
        }
        return 0;
    }
};

/* The weights by first digits, into own: of all tokens as they were counted, or of those that top_k leaves. */
__device__ sums weigh(const tokens &t, const unsigned long long *bins, uint32_t limit, unsigned long long *own, room *m)
{
    clear(own);
    if (t.d.top_k > 0)
        t.each([&](uint32_t place, uint32_t) {
            if (place <= limit) atomicAdd(own + draw_digit(place, 0), (unsigned long long)draw_weight(place));
        });
    else
        for (int i = threadIdx.x; i < DRAW_BINS; i += THREADS) own[i] = __ldcg(bins + i);
    __syncthreads();
    return scan(own, m);
}

/* Tokens behind `limit` are listed only where top_k cuts within a digit; their weights come after all others' there. */
__device__ uint32_t draw_from(const tokens &t, const unsigned long long *bins, unsigned long long *own, room *m)
{
    const row_state &r = t.r;
    uint32_t limit = DRAW_OUT - 1;
    if (t.d.top_k > 0 && r.is_cut)
        limit = r.last << DRAW_DIGIT | t.find_second<false>(r.last, r.cut_left, own, m).digit;
    sums weighed = weigh(t, bins, limit, own, m);
    unsigned long long kept = weighed.total;
    if (t.d.top_p > 0 && t.d.top_p < 1) {
        unsigned long long share = draw_share(t.d.top_p, kept);
        reached at = find(weighed, share, m), then = t.find_second<true>(at.digit, at.left, own, m);
        kept = draw_kept(share, then.left, at.digit << DRAW_DIGIT | then.digit);
    }
    reached at = find(weighed, draw_mark(t.d.uniform, kept), m), then = t.find_second<true>(at.digit, at.left, own, m);
    uint32_t place = at.digit << DRAW_DIGIT | then.digit;
    return t.find_id(place, (then.left - 1) / draw_weight(place) + 1, own, m);
}

__global__ void draw_token_of(scratch s, int *out, mat x, const uint32_t *allowed, const __grid_constant__ draw_list draws, int64_t each)
{
    __shared__ unsigned long long own[DRAW_BINS];
    __shared__ room m;
    wait_for_previous();
    row_state *state = s.rows + blockIdx.y;
    const draw &d = draws.d[blockIdx.y];
    if (d.scale == 0) return;
    const row_state r = fresh(state);
    if (r.best == 0) return;
    part p = part_of(x, allowed, each);
    float top = value_of(r.best);
    unsigned long long *bins = s.bins + (int64_t)blockIdx.y * DRAW_BINS;
    token_place *list = s.lists + (int64_t)blockIdx.y * LIST;
    p.each(p.first, p.end, [&](int64_t c, float v) {
        uint32_t place = p.place(c, v, top, d);
        if (!is_listed(r, place)) return;
        unsigned at = atomicAdd(&state->listed, 1);
        if (at < LIST) list[at] = { place, (uint32_t)c };
    });
    if (!is_last(&state->arrived[2])) return;
    tokens t = { p, list, r, d, __ldcg(&state->listed), top };
    uint32_t id = draw_from(t, bins, own, &m);
    for (int i = threadIdx.x; i < DRAW_BINS; i += THREADS) bins[i] = 0;
    if (threadIdx.x > 0) return;
    *state = row_state{};
    answer(out + blockIdx.y, (int)id);
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

} /* namespace */

/* Small arrays from the host: staged by the driver before the call returns. */
static bool upload_to(struct queue *q, void *to, const void *host, size_t bytes, const char *operation)
{
    return !queue_failed(q) &&
           queue_check(q, cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, q->stream), operation);
}

void cuda_draw_sizes(struct cuda_draw *d)
{
    d->state_bytes = ROWS * (sizeof(row_state) + DRAW_BINS * sizeof(unsigned long long)) + COARSE_ROWS * sizeof(coarse_best);
    d->draws_bytes = ROWS * LIST * sizeof(token_place);
    d->edits_bytes = EDITS * sizeof(logit_edit);
    d->mask_bytes = MASK_WORDS * sizeof(uint32_t);
    d->answers_bytes = ROWS * sizeof(int);
}

bool cuda_draw_begin(struct queue *q, int64_t rows)
{
    for (int64_t i = 0; i < rows; i++) q->draw.answers[i] = NO_ANSWER;
    if (!q->draw.is_used) return !queue_failed(q);
    q->draw.is_used = false;
    return queue_check(q, cudaMemsetAsync(q->draw.state, 0, q->draw.state_bytes, q->stream), "draw");
}

static bool is_answered(const volatile int *answers, int64_t rows)
{
    for (int64_t i = 0; i < rows; i++)
        if (answers[i] == NO_ANSWER) return false;
    return true;
}

void cuda_draw_end(struct queue *q, int32_t *out, int64_t rows)
{
    constexpr int LOOKS = 10000; /* before the stream is asked whether it still works at all */
    cudaError_t status = cudaErrorNotReady;
    for (int n = 0; !queue_failed(q) && !is_answered(q->draw.answers, rows); n++) {
        if (n % LOOKS < LOOKS - 1) continue;
        if (status != cudaErrorNotReady) queue_refuse(q, "draw", "no answer"); /* it had been done before this look */
        status = cudaStreamQuery(q->stream);
        if (status != cudaErrorNotReady) queue_check(q, status, "draw");
    }
    for (int64_t i = 0; i < rows; i++) out[i] = queue_failed(q) ? -1 : q->draw.answers[i];
}

void cuda_draw_rows(struct queue *q, mat x, const uint32_t *allowed, const draw *draws, bool after_coarse)
{
    scratch s = { (row_state *)q->draw.state, nullptr, (token_place *)q->draw.draws };
    s.bins = (unsigned long long *)(s.rows + ROWS);
    int64_t each = x.rows < 8 ? 2048 : 8192;
    dim3 grid(blocks(x.cols, each), (unsigned)x.rows);
    draw_list list = {};
    bool any = false;
    for (int64_t i = 0; i < x.rows; i++) {
        list.d[i] = draws[i];
        any |= draws[i].scale > 0;
    }
    launch(q, "draw", true, draw_largest, grid, 0, s, q->draw.answers, x, allowed, list, each,
           after_coarse ? coarse_of(&q->draw) : (const coarse_best *)nullptr);
    if (!any) return;
    launch(q, "draw", true, draw_count, grid, 0, s, x, allowed, list, each);
    launch(q, "draw", true, draw_token_of, grid, 0, s, q->draw.answers, x, allowed, list, each);
}

void cuda_draw(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed, const struct draw *draws)
{
    for (int64_t i = 0; i < x.rows && !queue_failed(q); i += ROWS) {
        mat some = { x.data + i * x.stride, x.rows - i < ROWS ? x.rows - i : ROWS, x.cols, x.stride };
        if (!cuda_draw_begin(q, some.rows)) return;
        cuda_draw_rows(q, some, allowed, draws + i, false);
        cuda_draw_end(q, out + i, some.rows);
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
