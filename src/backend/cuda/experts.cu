/* The mixture of experts for few rows: two kernels, the router's choice inside each. A block does a share of one row's
 * work.
 *
 * stream_up: the shared expert's gate and up rows, whose place is known and which are asked for first; the k best of the
 * router's logits; then pairs of eight gate and eight up rows of the chosen experts, split along columns over the warps.
 * stream_down: eight rows of the output at a time, warp j on the expert of pick j (j + 8, ...) and all of them on a share
 * of the shared expert's; then the sum over picks in order, the shared expert behind its gate, and the residual. It
 * starts when the logits are final and chooses for itself, so that its weights come while stream_up still works. */
#include "backend/cuda/device.cuh"

namespace {

struct up_args {
    cuda_experts e;
    mat x;
    picks p;
    mat logits;       /* data NULL: the picks are given */
    cuda_matrix w[2]; /* shared gate and up; rows 0: none */
    mat shared_hidden;
    float *hidden; /* [rows][k][intermediate] */
};

struct down_args {
    cuda_experts e;
    const float *hidden;
    picks p;
    mat y, add;    /* add.data NULL: no residual */
    mat logits;
    cuda_matrix w; /* shared down; rows 0: none */
    mat shared_hidden, shared_gate;
};

constexpr int ITEMS = 8, DOWN_TILES = 2; /* of a block at most */
constexpr size_t UP_SUMS = (size_t)2 * ITEMS * WARPS * SLOTS * 8 * 4;

__host__ __device__ inline int tiles_of(int rows)
{
    return (rows + 7) / 8;
}

/* ---- routing ---- */

/* Larger floats as larger integers. */
__device__ uint32_t ordered(float x)
{
    uint32_t u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

__device__ float unordered(uint32_t u)
{
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

/* The k largest of n logits by one warp: EACH of them a lane, n <= 32 * EACH. */
template <int EACH>
__device__ __forceinline__ void choose(int *expert, float *weight, const float *logits, int n, int k)
{
    int lane = threadIdx.x % LANES;
    uint32_t key[EACH], first = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) key[i] = i * LANES + lane < n ? ordered(__ldcg(logits + i * LANES + lane)) : 0;
    float sum = 0;
    for (int j = 0; j < k; j++) {
        uint32_t best = 0;
        int at = EACH * LANES;
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--)
            if (key[i] >= best) best = key[i], at = i * LANES + lane;
        uint32_t top = __reduce_max_sync(ALL, best);
        at = __reduce_min_sync(ALL, best == top ? at : EACH * LANES);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (i * LANES + lane == at) key[i] = 0;
        if (j == 0) first = top;
        float x = expf(unordered(top) - unordered(first));
        sum += x;
        if (lane == 0) expert[j] = at < n ? at : n - 1, weight[j] = x;
    }
    __syncwarp();
    for (int j = lane; j < k; j += LANES) weight[j] = weight[j] / sum;
    __syncwarp();
}

__device__ void choose_any(int *expert, float *weight, const float *logits, int n, int k)
{
    if (n <= 8 * LANES)
        choose<8>(expert, weight, logits, n, k);
    else
        choose<EXPERTS_MAX / LANES>(expert, weight, logits, n, k);
}

__global__ void route_rows(picks p, mat logits)
{
    int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / LANES;
    if (row >= logits.rows) return;
    choose_any(p.expert + row * p.k, p.weight + row * p.k, logits.data + row * logits.stride, (int)logits.cols, p.k);
}

/* ---- inputs ---- */

/* Columns first, first + step, ... of a row into slots; returns the largest magnitude this thread saw. */
__device__ __forceinline__ float place_row(__nv_bfloat16 *slots, int stride, const float *x, int n, int first, int step)
{
    float top = 0;
    for (int c = first; c < n; c += step) {
        float v = __ldcg(x + c);
        put_parts(slots, stride, c, v);
        top = fmaxf(top, fabsf(v));
    }
    return top;
}

/* The quantized slot of a column whose parts this thread has placed. */
__device__ __forceinline__ void quantize_placed(__nv_bfloat16 *slots, int stride, int c, float scale)
{
    float v = __bfloat162float(slots[c]) + __bfloat162float(slots[stride + c]);
    put_quantized(slots, stride, c, v + __bfloat162float(slots[2 * stride + c]), scale);
}

/* What a product is multiplied by: FP4 one number for an expert, found early; FP8 one a row. */
__device__ __forceinline__ float expert_unit(const cuda_experts &e, int which, int expert)
{
    return e.m[which].format == WEIGHT_NVFP4 ? FP4_UNIT / e.globals[which * e.n + expert] : 1;
}

__device__ __forceinline__ float row_unit(const cuda_matrix &m, int expert, int row, float unit)
{
    return m.format == WEIGHT_FP8 ? m.scale[(int64_t)expert * m.rows + row] : unit;
}

/* ---- gate and up ---- */

/* Items of a row's work: eight gate rows and the same eight up rows, first of the shared expert, then of the picks. Block b
 * has items b, b + gridDim.x, ...; an item is two jobs. */
struct up_item {
    bool any, shared;
    int pick, row;
};

struct up_jobs {
    const up_args &a;
    const int *expert;
    int shared, each, all; /* items of the shared expert, of a pick, in all */

    __device__ up_jobs(const up_args &args, const int *picked) : a(args), expert(picked)
    {
        shared = tiles_of(a.w[0].rows);
        each = tiles_of(a.e.m[GATE].rows);
        all = shared + a.p.k * each;
    }

    __device__ __forceinline__ up_item item(int i) const
    {
        int n = blockIdx.x + i * gridDim.x, own = n - shared, pick = own < 0 ? 0 : own / each;
        return { n < all, own < 0, pick, (own < 0 ? n : own - pick * each) * 8 };
    }

    /* Jobs of this block that are the shared expert's. */
    __device__ int known() const
    {
        int b = blockIdx.x;
        return b < shared ? 2 * ((shared - 1 - b) / (int)gridDim.x + 1) : 0;
    }

    __device__ job operator()(int i) const
    {
        up_item u = item(i / 2);
        if (!u.any) return job{};
        job j = u.shared ? shared_job(a.w[i % 2], 0, u.row) : shared_job(a.e.m[i % 2], expert[u.pick], u.row);
        j.sums = (i * WARPS + threadIdx.x / LANES) * SLOTS * 8;
        return j;
    }
};

/* Four threads an output, a slot each. */
__device__ __forceinline__ void store_up(const up_args &a, const float *sums, const up_jobs &jobs, int64_t row,
                                         const float (*units)[PICKS_MAX], float input_scale)
{
    int k = threadIdx.x % SLOTS, col = threadIdx.x / SLOTS % 8;
    for (int i = threadIdx.x / (SLOTS * 8);; i += WARPS) {
        up_item u = jobs.item(i);
        if (!u.any) return;
        const cuda_matrix *w = u.shared ? a.w : a.e.m;
        int r = u.row + col;
        float s[SLOTS], value[2];
        for (int which = 0; which < 2; which++) {
            float sum = 0, unit = 1;
            for (int warp = 0; warp < WARPS; warp++)
                sum += sums[(((2 * i + which) * WARPS + warp) * SLOTS + k) * 8 + col];
            gather_slots(s, sum);
            if (r < w->rows)
                unit = w[which].format == WEIGHT_FP8
                           ? w[which].scale[(u.shared ? 0 : (int64_t)jobs.expert[u.pick] * w[which].rows) + r]
                       : u.shared ? FP4_UNIT / w[which].global
                                  : units[which][u.pick];
            value[which] = slots_value(s, w[which].format, w[which].input, unit, input_scale);
        }
        if (k != 0 || r >= w->rows) continue;
        float *to = u.shared ? a.shared_hidden.data + row * a.shared_hidden.stride
                             : a.hidden + (row * a.p.k + u.pick) * w->rows;
        to[r] = silu(value[0]) * value[1];
    }
}

/* Grid: blocks, rows. Shared memory: ring, sums [job][warp][slot][8], slots. */
__global__ void __launch_bounds__(THREADS, 2) stream_up(const __grid_constant__ up_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int experts[WARPS][PICKS_MAX];
    __shared__ float weights[WARPS][PICKS_MAX], units[2][PICKS_MAX], part[WARPS];
    float *sums = (float *)(shared + RING_BYTES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)((uint8_t *)sums + UP_SUMS);
    int cols = a.e.m[GATE].cols, stride = slot_stride(cols), warp = threadIdx.x / LANES, asked = 0;
    int *expert = experts[warp]; /* every warp chooses for itself: no meeting before the weights are asked for */
    int64_t row = blockIdx.y;
    up_jobs jobs(a, expert);
    int known = jobs.known();
    stream<up_jobs> weights_of(jobs, shared);
    while (asked < RING && weights_of.request(known)) asked++;
    wait_for_previous();
    let_next_start(); /* which may count on the logits */
    const float *x = a.x.data + row * a.x.stride;
    constexpr int AHEAD = 8;
    float v[AHEAD], top = 0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = threadIdx.x + i * THREADS;
        v[i] = c < cols ? __ldcg(x + c) : 0;
    }
    if (a.logits.data)
        choose_any(expert, weights[warp], a.logits.data + row * a.logits.stride, a.e.n, a.p.k);
    else
        for (int j = threadIdx.x % LANES; j < a.p.k; j += LANES) expert[j] = __ldcg(a.p.expert + row * a.p.k + j);
    __syncwarp();
    for (; asked < RING; asked++) weights_of.request();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int c = threadIdx.x + i * THREADS;
        if (c >= cols) break;
        put_parts(slots, stride, c, v[i]);
        top = fmaxf(top, fabsf(v[i]));
    }
    top = fmaxf(top, place_row(slots, stride, x, cols, threadIdx.x + AHEAD * THREADS, THREADS));
    for (int c = cols + threadIdx.x; c < stride; c += THREADS)
        for (int s = 0; s < SLOTS; s++) slots[s * stride + c] = __float2bfloat16_rn(0);
    float input_scale = 1;
    if (a.e.m[GATE].input == INPUT_FP8_ROW || a.w[0].input == INPUT_FP8_ROW) {
        input_scale = fp8_input_scale(block_max(top, part));
        for (int c = threadIdx.x; c < cols; c += THREADS) quantize_placed(slots, stride, c, input_scale);
    }
    for (int j = threadIdx.x; j < 2 * a.p.k && warp == 0; j += LANES)
        units[j / a.p.k][j % a.p.k] = expert_unit(a.e, j / a.p.k, expert[j % a.p.k]);
    if (a.logits.data && blockIdx.x == 0 && warp == 0)
        for (int j = threadIdx.x; j < a.p.k; j += LANES) {
            a.p.expert[row * a.p.k + j] = expert[j];
            a.p.weight[row * a.p.k + j] = weights[0][j];
        }
    __syncthreads();
    int i = 0;
    for (job j = jobs(0); j.data; j = jobs(++i)) weights_of.work<1>(j, sums, slots, stride);
    copy_wait<0>();
    __syncthreads();
    store_up(a, sums, jobs, row, units, input_scale);
}

/* ---- down ---- */

/* A warp's jobs: its share of the shared expert's part of every tile, then its picks of every tile. */
struct down_jobs {
    const down_args &a;
    const int *expert;
    int tiles, shared, own, stride; /* shared: jobs of the shared expert; own: picks of this warp */
    int together, shared_x;         /* where the shared expert's sums and inputs begin */

    __device__ job operator()(int i) const
    {
        int warp = threadIdx.x / LANES;
        if (i < shared) {
            job j = shared_job(a.w, 0, (blockIdx.x + i * gridDim.x) * 8);
            j.x += shared_x;
            j.sums = together + (i * WARPS + warp) * SLOTS * 8;
            return j;
        }
        i -= shared;
        if (i >= tiles * own) return job{};
        int tile = own == 1 ? i : i / own, pick = warp + (i - tile * own) * WARPS, number = blockIdx.x + tile * gridDim.x;
        const cuda_matrix &m = a.e.m[DOWN];
        job j = job_of(m, expert[pick], number * 8, 0, units_of(m.format, m.cols));
        j.x = pick * SLOTS * stride;
        j.sums = (tile * a.p.k + pick) * SLOTS * 8;
        return j;
    }
};

/* Four threads an output, a slot each. */
__device__ __forceinline__ void store_down(const down_args &a, const float *sums, const down_jobs &jobs, int64_t row,
                                           const float *weight, const float *units, const float *input_scale,
                                           float shared_scale, float old, float gate, float shared_unit)
{
    int k = threadIdx.x % SLOTS, col = threadIdx.x / SLOTS % 8, tile = threadIdx.x / (SLOTS * 8);
    if (tile >= jobs.tiles) return;
    const cuda_matrix &w = a.e.m[DOWN];
    int r = (blockIdx.x + tile * gridDim.x) * 8 + col;
    float y = 0, s[SLOTS], sum = 0;
    for (int j = 0; j < a.p.k; j++) {
        gather_slots(s, sums[((tile * a.p.k + j) * SLOTS + k) * 8 + col]);
        float unit = r < w.rows ? row_unit(w, jobs.expert[j], r, units[j]) : 0;
        y += weight[j] * slots_value(s, w.format, w.input, unit, input_scale[j]);
    }
    if (a.w.rows) {
        for (int warp = 0; warp < WARPS; warp++) sum += sums[jobs.together + ((tile * WARPS + warp) * SLOTS + k) * 8 + col];
        gather_slots(s, sum);
        y += gate * slots_value(s, a.w.format, a.w.input, shared_unit, shared_scale);
    }
    if (k != 0 || r >= w.rows) return;
    a.y.data[row * a.y.stride + r] = y;
    if (a.add.data) a.add.data[row * a.add.stride + r] = old + y;
}

/* The shared expert's hidden row into slots. Returns its scale. */
__device__ __forceinline__ float place_shared(const down_args &a, __nv_bfloat16 *slots, int stride, int64_t row, float *part)
{
    float top = 0;
    int n = a.w.cols;
    for (int c = threadIdx.x; c < n; c += THREADS) {
        float v = __ldcg(a.shared_hidden.data + row * a.shared_hidden.stride + c);
        put_parts(slots, stride, c, v);
        top = fmaxf(top, fabsf(v));
    }
    for (int c = n + threadIdx.x; c < stride; c += THREADS)
        for (int s = 0; s < SLOTS; s++) slots[s * stride + c] = __float2bfloat16_rn(0);
    if (a.w.input != INPUT_FP8_ROW) return 1;
    float scale = fp8_input_scale(block_max(top, part));
    for (int c = threadIdx.x; c < n; c += THREADS) quantize_placed(slots, stride, c, scale);
    return scale;
}

/* A pick's hidden row into slots, by a warp; returns its scale. */
__device__ __forceinline__ float place_pick(const cuda_matrix &w, __nv_bfloat16 *slots, int stride, const float *x)
{
    constexpr int AHEAD = 16;
    int lane = threadIdx.x % LANES;
    float v[AHEAD], top = 0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) v[i] = lane + i * LANES < w.cols ? __ldcg(x + lane + i * LANES) : 0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        if (lane + i * LANES >= w.cols) break;
        put_parts(slots, stride, lane + i * LANES, v[i]);
        top = fmaxf(top, fabsf(v[i]));
    }
    top = fmaxf(top, place_row(slots, stride, x, w.cols, lane + AHEAD * LANES, LANES));
    for (int c = w.cols + lane; c < stride; c += LANES)
        for (int s = 0; s < SLOTS; s++) slots[s * stride + c] = __float2bfloat16_rn(0);
    if (w.input != INPUT_FP8_ROW) return 1;
    float scale = fp8_input_scale(warp_max(top));
    for (int c = lane; c < w.cols; c += LANES) quantize_placed(slots, stride, c, scale);
    return scale;
}

__host__ __device__ inline size_t down_shared(int k, int cols, int shared_cols)
{
    return RING_BYTES + (size_t)DOWN_TILES * (k + WARPS) * SLOTS * 8 * 4 +
           (size_t)SLOTS * 2 * ((size_t)k * slot_stride(cols) + slot_stride(shared_cols));
}

/* Grid: blocks, rows. Shared memory: ring, sums of picks [tile][k][slot][8] and of the shared expert
 * [tile][warp][slot][8], slots of picks [k], slots of the shared expert (its stride is the picks', columns too). */
__global__ void __launch_bounds__(THREADS, 2) stream_down(const __grid_constant__ down_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int expert[PICKS_MAX];
    __shared__ float weight[PICKS_MAX], units[PICKS_MAX], input_scale[PICKS_MAX], part[WARPS];
    const cuda_matrix &w = a.e.m[DOWN];
    int k = a.p.k, stride = slot_stride(w.cols), warp = threadIdx.x / LANES, asked = 0;
    float *sums = (float *)(shared + RING_BYTES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(sums + DOWN_TILES * (k + WARPS) * SLOTS * 8);
    int64_t row = blockIdx.y;
    int all = tiles_of(w.rows), tiles = (int)blockIdx.x < all ? (all - 1 - (int)blockIdx.x) / (int)gridDim.x + 1 : 0;
    let_next_start();
    down_jobs jobs = { a, expert, tiles, a.w.rows ? tiles : 0, k > warp ? (k - warp - 1) / WARPS + 1 : 0, stride,
                       DOWN_TILES * k * SLOTS * 8, k * SLOTS * stride };
    stream<down_jobs> weights(jobs, shared);
    while (asked < RING && weights.request(jobs.shared)) asked++;
    if (a.logits.data && warp == 0)
        choose_any(expert, weight, a.logits.data + row * a.logits.stride, a.e.n, k);
    for (int j = threadIdx.x; !a.logits.data && j < k; j += THREADS) {
        expert[j] = __ldcg(a.p.expert + row * k + j);
        weight[j] = __ldcg(a.p.weight + row * k + j);
    }
    __syncthreads();
    for (; asked < RING; asked++) weights.request();
    for (int j = threadIdx.x; j < k; j += THREADS) units[j] = expert_unit(a.e, DOWN, expert[j]);
    wait_for_previous();
    for (int j = warp; j < k; j += WARPS) {
        float s = place_pick(w, slots + (size_t)j * SLOTS * stride, stride, a.hidden + (row * k + j) * w.cols);
        if (threadIdx.x % LANES == 0) input_scale[j] = s;
    }
    float shared_scale = a.w.rows ? place_shared(a, slots + jobs.shared_x, stride, row, part) : 1;
    int r = (blockIdx.x + threadIdx.x / (SLOTS * 8) * gridDim.x) * 8 + threadIdx.x / SLOTS % 8;
    float old = 0, gate = 0, unit = 1;
    if (threadIdx.x / (SLOTS * 8) < tiles && r < w.rows && a.w.rows) {
        if (a.add.data) old = __ldcg(a.add.data + row * a.add.stride + r);
        gate = sigmoid(__ldcg(a.shared_gate.data + row * a.shared_gate.stride));
        unit = a.w.format == WEIGHT_FP8 ? a.w.scale[r] : FP4_UNIT / a.w.global;
    }
    __syncthreads();
    for (int i = 0; i < jobs.shared + tiles * jobs.own; i++) weights.work<1>(jobs(i), sums, slots, stride);
    copy_wait<0>();
    __syncthreads();
    store_down(a, sums, jobs, row, weight, units, input_scale, shared_scale, old, gate, unit);
}

size_t up_shared(int cols)
{
    return RING_BYTES + UP_SUMS + (size_t)SLOTS * slot_stride(cols) * 2;
}

} /* namespace */

void cuda_route(struct queue *q, const struct picks *picks, struct mat logits)
{
    if (logits.cols > EXPERTS_MAX || picks->k > PICKS_MAX)
        queue_refuse(q, "route", "more than 1024 experts, or 64 of them a token, are not supported on a GPU");
    else
        launch(q, "route", false, route_rows, dim3(blocks(logits.rows, WARPS)), 0, *picks, logits);
}

bool cuda_experts_stream(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                         const struct cuda_experts *e, const struct moe_run *run)
{
    up_args u = {};
    down_args d = {};
    int limit = q->shared_max;
    u.e = d.e = *e;
    u.x = x;
    u.p = d.p = *p;
    d.hidden = u.hidden = q->hidden;
    d.y = y;
    for (int i = 0; i < 3; i++)
        if (!cuda_streams(q, &e->m[i])) return false;
    if (run) {
        cuda_matrix w[3] = { cuda_matrix_of(run->w_gate), cuda_matrix_of(run->w_up), cuda_matrix_of(run->w_down) };
        for (int i = 0; i < 3; i++)
            if (!cuda_streams(q, &w[i])) return false;
        if (e->n > EXPERTS_MAX) return false;
        u.logits = run->logits;
        u.w[0] = w[0];
        u.w[1] = w[1];
        u.shared_hidden = d.shared_hidden = run->hidden;
        d.w = w[2];
        d.logits = run->logits;
        d.shared_gate = run->shared_gate;
        d.add = run->x;
    }
    const cuda_matrix &gate = e->m[GATE], &down = e->m[DOWN];
    if (p->k > PICKS_MAX || up_shared(gate.cols) > (size_t)limit || down_shared(p->k, down.cols, down.cols) > (size_t)limit)
        return false;
    if (run && d.w.cols != down.cols) return false; /* one stride for both */
    if (run && (u.w[0].format != u.w[1].format || u.w[0].input != u.w[1].input)) return false;
    /* no more a block than it has room for */
    int most_up = p->k * tiles_of(gate.rows) + tiles_of(u.w[0].rows), most_down = tiles_of(down.rows);
    unsigned up_blocks = blocks(most_up, ITEMS), down_blocks = blocks(most_down, DOWN_TILES);
    if (up_blocks < (unsigned)q->sms) up_blocks = (unsigned)q->sms;
    if (down_blocks < (unsigned)q->sms) down_blocks = (unsigned)q->sms;
    launch(q, "experts", true, stream_up, dim3(up_blocks, (unsigned)x.rows), up_shared(gate.cols), u);
    launch(q, "experts", true, stream_down, dim3(down_blocks, (unsigned)x.rows), down_shared(p->k, down.cols, down.cols), d);
    return true;
}
