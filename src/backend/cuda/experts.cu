/* The mixture of experts for few rows: two kernels, and the router's choice inside the first. Each block does a share of
 * one row's work.
 *
 * stream_up: the shared expert's gate and up rows, whose place is known and which are asked for first; the k best of the
 * router's logits; then pairs of eight gate and eight up rows of the chosen experts, split along columns over the warps.
 * stream_down: eight rows of the output at a time, warp j on the expert of pick j (j + 8, ...) and all of them on a share
 * of the shared expert's; then the sum over picks in order, the shared expert behind its gate, and the residual. */
#include "backend/cuda/device.cuh"

namespace {

struct up_args {
    cuda_experts e;
    mat x;
    picks p;
    mat logits;       /* data NULL: the picks are given */
    cuda_matrix w[2]; /* shared gate and up; rows 0: none */
    mat out[2];
    float *hidden; /* [rows][k][intermediate] */
};

struct down_args {
    cuda_experts e;
    const float *hidden;
    picks p;
    mat y, add;    /* add.data NULL: no residual */
    cuda_matrix w; /* shared down; rows 0: none */
    mat gate, up, made, shared_gate;
};

constexpr int TILES = 16, DOWN_TILES = 2;
constexpr size_t UP_SUMS = (size_t)TILES * WARPS * SLOTS * 8 * 4;

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

/* The k largest of n logits by one warp: EACH of them a lane, n <= 32 * EACH. */
template <int EACH> __device__ void choose(int *expert, float *weight, const float *logits, int n, int k)
{
    int lane = threadIdx.x % LANES;
    uint32_t key[EACH];
    float first = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) key[i] = i * LANES + lane < n ? ordered(logits[i * LANES + lane]) : 0;
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
        at = at < n ? at : n - 1;
        float x = logits[at];
        if (j == 0) first = x;
        x = expf(x - first);
        sum += x;
        if (lane == 0) expert[j] = at, weight[j] = x;
    }
    __syncwarp();
    for (int j = lane; j < k; j += LANES) weight[j] = weight[j] / sum;
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

/* One row into slots by threads tid, tid + count, ...; returns the largest magnitude this thread saw. */
__device__ float place_row(__nv_bfloat16 *slots, int stride, const float *x, int n, int tid, int count)
{
    float top = 0;
    for (int c = tid; c < n; c += count) {
        put_parts(slots, stride, c, x[c]);
        top = fmaxf(top, fabsf(x[c]));
    }
    for (int c = n + tid; c < stride; c += count)
        for (int s = 0; s < SLOTS; s++) slots[s * stride + c] = __float2bfloat16_rn(0);
    return top;
}

__device__ void quantize_row(__nv_bfloat16 *slots, int stride, const float *x, int n, float scale, int tid, int count)
{
    for (int c = tid; c < n; c += count) put_quantized(slots, stride, c, x[c], scale);
}

/* Eight rows of an expert. */
__device__ tile expert_tile(const cuda_matrix &m, int expert, int number)
{
    tile t;
    int64_t row = (int64_t)expert * m.rows + number * 8;
    t.format = m.format;
    t.row_bytes = row_bytes_of(m.format, m.cols);
    t.rows = m.rows - number * 8;
    t.data = (const uint8_t *)m.data + row * t.row_bytes;
    t.groups = m.groups + row * (m.cols / 16);
    return t;
}

__device__ float unit_of(const cuda_experts &e, int which, int expert, int row)
{
    const cuda_matrix &m = e.m[which];
    if (m.format == WEIGHT_FP8) return m.scale[(int64_t)expert * m.rows + row];
    return m.format == WEIGHT_NVFP4 ? FP4_UNIT / e.globals[which * e.n + expert] : 1;
}

/* ---- gate and up ---- */

/* Which of this block's tiles: first the shared expert's, then pairs. */
struct up_tile {
    int shared, pick, number, which; /* shared: 0 or 1, -1 for experts */
    bool valid;

    __device__ static int shared_tiles(const up_args &a) { return 2 * tiles_of(a.w[0].rows); }
    __device__ static int own_shared(const up_args &a)
    {
        int all = shared_tiles(a), b = blockIdx.x;
        return b < all ? (all - 1 - b) / (int)gridDim.x + 1 : 0;
    }

    __device__ up_tile(const up_args &a, int i)
    {
        int own = own_shared(a), each = tiles_of(a.e.m[GATE].rows);
        if (i < own) {
            number = blockIdx.x + i * gridDim.x;
            shared = number / tiles_of(a.w[0].rows);
            number %= tiles_of(a.w[0].rows);
            which = pick = 0;
            valid = true;
            return;
        }
        int pair = blockIdx.x + (i - own) / 2 * gridDim.x;
        shared = -1;
        which = (i - own) % 2;
        pick = pair / each;
        number = pair % each;
        valid = pick < a.p.k;
    }
};

struct up_cursor {
    int i, step, per, pieces;
    bool valid, shared;
    tile t;

    __device__ void load(const up_args &a, const int *expert)
    {
        up_tile u(a, i);
        valid = u.valid;
        shared = u.shared >= 0;
        if (!valid || (!shared && !expert)) return;
        t = shared ? tile_of(a.w[u.shared], u.number) : expert_tile(a.e.m[u.which], expert[u.pick], u.number);
        pieces = (int)((t.row_bytes + PIECE - 1) / PIECE);
        per = (pieces + WARPS - 1) / WARPS;
        per += per & 1;
    }

    __device__ int piece() const { return threadIdx.x / LANES * per + step; }

    __device__ void request(ring &r, const up_args &a, const int *expert)
    {
        if (valid && piece() < pieces)
            r.request(t, piece());
        else
            r.nothing();
        copy_commit();
        if (valid && ++step == per) {
            step = 0;
            i++;
            load(a, expert);
        }
    }
};

__device__ float up_value(const float *sums, int c, int col, int format, int input, float unit, float input_scale)
{
    float s[SLOTS];
    for (int k = 0; k < SLOTS; k++) {
        s[k] = 0;
        for (int warp = 0; warp < WARPS; warp++) s[k] += sums[((c * WARPS + warp) * SLOTS + k) * 8 + col];
    }
    return slots_value(s, format, input, unit, input_scale);
}

__device__ void store_up(const up_args &a, const float *sums, int first, int count, int64_t row, const int *expert,
                         float input_scale)
{
    int rows = a.e.m[GATE].rows;
    for (int o = threadIdx.x; o < count * 8; o += THREADS) {
        up_tile u(a, first + o / 8);
        int col = o % 8, r = u.number * 8 + col, c = o / 8;
        if (u.shared >= 0) {
            const cuda_matrix &w = a.w[u.shared];
            if (r >= w.rows) continue;
            float unit = w.format == WEIGHT_FP8 ? w.scale[r] : FP4_UNIT / w.global;
            a.out[u.shared].data[row * a.out[u.shared].stride + r] =
                up_value(sums, c, col, w.format, w.input, unit, input_scale);
        } else if (u.which == 0 && r < rows) {
            const cuda_matrix &w = a.e.m[GATE];
            int e = expert[u.pick];
            float gate = up_value(sums, c, col, w.format, w.input, unit_of(a.e, GATE, e, r), input_scale);
            float up = up_value(sums, c + 1, col, w.format, w.input, unit_of(a.e, UP, e, r), input_scale);
            a.hidden[(row * a.p.k + u.pick) * rows + r] = silu(gate) * up;
        }
    }
}

/* Grid: multiprocessors, rows. Shared memory: ring, sums [TILES][warp][slot][8], slots. */
__global__ void __launch_bounds__(THREADS, 2) stream_up(const __grid_constant__ up_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int expert[PICKS_MAX];
    __shared__ float weight[PICKS_MAX], part[WARPS];
    float *sums = (float *)(shared + RING_BYTES + RING_SCALES);
    __nv_bfloat16 *slots = (__nv_bfloat16 *)((uint8_t *)sums + UP_SUMS);
    int cols = a.e.m[GATE].cols, stride = slot_stride(cols), lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    int g = lane / 4, t = lane % 4, asked = 0;
    int64_t row = blockIdx.y;
    let_next_start();
    ring r(shared);
    up_cursor ask = {};
    ask.load(a, nullptr);
    for (; asked < RING && ask.valid && ask.shared; asked++) ask.request(r, a, nullptr);
    wait_for_previous();
    bool routes = a.logits.data != nullptr;
    const float *x = a.x.data + row * a.x.stride;
    float top = 0;
    if (routes && warp == 0)
        choose_any(expert, weight, a.logits.data + row * a.logits.stride, a.e.n, a.p.k);
    else if (routes)
        top = place_row(slots, stride, x, cols, threadIdx.x - LANES, THREADS - LANES);
    else
        top = place_row(slots, stride, x, cols, threadIdx.x, THREADS);
    for (int j = threadIdx.x; !routes && j < a.p.k; j += THREADS) expert[j] = a.p.expert[row * a.p.k + j];
    top = block_max(top, part);
    float input_scale = fp8_input_scale(top);
    if (a.e.m[GATE].input == INPUT_FP8_ROW || a.w[0].input == INPUT_FP8_ROW)
        quantize_row(slots, stride, x, cols, input_scale, threadIdx.x, THREADS);
    if (routes && blockIdx.x == 0)
        for (int j = threadIdx.x; j < a.p.k; j += THREADS) {
            a.p.expert[row * a.p.k + j] = expert[j];
            a.p.weight[row * a.p.k + j] = weight[j];
        }
    __syncthreads();
    if (!(ask.valid && ask.shared)) ask.load(a, expert);
    for (; asked < RING; asked++) ask.request(r, a, expert);
    piece_product<1> product = { slots + (g < SLOTS ? g : 0) * stride, 0, g < SLOTS };
    up_cursor have = {};
    have.load(a, expert);
    int first = 0;
    float acc[2][4] = {};
    while (have.valid) {
        uint32_t scale0, scale1;
        copy_wait<RING - 2>();
        __syncwarp();
        uint4 w0 = r.take(&scale0), w1 = r.take(&scale1);
        if (have.piece() < have.pieces) product.run(acc, w0, scale0, have.t.format, have.piece(), t);
        if (have.piece() + 1 < have.pieces) product.run(acc, w1, scale1, have.t.format, have.piece() + 1, t);
        __syncwarp();
        ask.request(r, a, expert);
        ask.request(r, a, expert);
        have.step += 2;
        if (have.step < have.per) continue;
        if (g < SLOTS)
            *(float2 *)(sums + (((have.i - first) * WARPS + warp) * SLOTS + g) * 8 + 2 * t) =
                make_float2(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1]);
        for (int k = 0; k < 4; k++) acc[0][k] = acc[1][k] = 0;
        bool pair_open = !have.shared && (have.i - up_tile::own_shared(a)) % 2 == 0;
        have.step = 0;
        have.i++;
        have.load(a, expert);
        if (have.valid && (pair_open || have.i - first + 1 < TILES)) continue;
        __syncthreads();
        store_up(a, sums, first, have.i - first, row, expert, input_scale);
        __syncthreads();
        first = have.i;
    }
    copy_wait<0>();
}

/* ---- down ---- */

/* A warp's pieces of one group of tiles: the shared expert's of every tile, then each tile's picks. */
struct down_plan {
    int tiles, per, pieces, own, each, each_pieces;

    __device__ down_plan(const down_args &a, int n)
    {
        int warp = threadIdx.x / LANES;
        tiles = n;
        pieces = a.w.rows ? pieces_of(a.w.format, a.w.cols) : 0;
        per = (pieces + WARPS - 1) / WARPS;
        per += per & 1;
        own = a.p.k > warp ? (a.p.k - warp - 1) / WARPS + 1 : 0;
        each_pieces = pieces_of(a.e.m[DOWN].format, a.e.m[DOWN].cols);
        each = each_pieces + (each_pieces & 1);
    }
    __device__ int shared_count() const { return tiles * per; }
    __device__ int count() const { return tiles * (per + own * each); }
};

struct down_piece {
    int tile, piece, pick; /* pick -1: the shared expert's */
    bool valid, last;

    __device__ down_piece(const down_plan &p, int q)
    {
        int warp = threadIdx.x / LANES;
        if (q < p.shared_count()) {
            tile = q / p.per;
            int step = q % p.per;
            piece = warp * p.per + step;
            pick = -1;
            valid = piece < p.pieces;
            last = step == p.per - 1;
        } else {
            q -= p.shared_count();
            tile = q / (p.own * p.each);
            q %= p.own * p.each;
            pick = warp + q / p.each * WARPS;
            piece = q % p.each;
            valid = piece < p.each_pieces;
            last = piece == p.each - 1;
        }
    }
};

__device__ void request_down(ring &r, const down_args &a, const down_plan &plan, int q, int first, const int *expert)
{
    if (q < plan.count()) {
        down_piece d(plan, q);
        int number = blockIdx.x + (first + d.tile) * gridDim.x;
        if (!d.valid)
            r.nothing();
        else if (d.pick < 0)
            r.request(tile_of(a.w, number), d.piece);
        else
            r.request(expert_tile(a.e.m[DOWN], expert[d.pick], number), d.piece);
    } else {
        r.nothing();
    }
    copy_commit();
}

__device__ float sum_slots(const float *sums, int format, int input, float unit, float input_scale, int col)
{
    float s[SLOTS];
    for (int k = 0; k < SLOTS; k++) s[k] = sums[k * 8 + col];
    return slots_value(s, format, input, unit, input_scale);
}

__device__ void store_down(const down_args &a, const float *picked, const float *shared, int first, int tiles,
                           int64_t row, const int *expert, const float *weight, const float *input_scale,
                           float shared_scale)
{
    for (int o = threadIdx.x; o < tiles * 8; o += THREADS) {
        int i = o / 8, col = o % 8, r = (blockIdx.x + (first + i) * gridDim.x) * 8 + col;
        const cuda_matrix &w = a.e.m[DOWN];
        if (r >= w.rows) continue;
        float y = 0;
        for (int j = 0; j < a.p.k; j++)
            y += weight[j] * sum_slots(picked + (i * a.p.k + j) * SLOTS * 8, w.format, w.input,
                                       unit_of(a.e, DOWN, expert[j], r), input_scale[j], col);
        if (a.w.rows) {
            float s[SLOTS] = {};
            for (int k = 0; k < SLOTS; k++)
                for (int warp = 0; warp < WARPS; warp++) s[k] += shared[((i * WARPS + warp) * SLOTS + k) * 8 + col];
            float unit = a.w.format == WEIGHT_FP8 ? a.w.scale[r] : FP4_UNIT / a.w.global;
            y += sigmoid(a.shared_gate.data[row * a.shared_gate.stride]) *
                 slots_value(s, a.w.format, a.w.input, unit, shared_scale);
        }
        a.y.data[row * a.y.stride + r] = y;
        if (a.add.data) a.add.data[row * a.add.stride + r] += y;
    }
}

/* The shared expert's hidden row into slots; block 0 leaves it in `made`. Returns its scale. */
__device__ float place_shared(const down_args &a, __nv_bfloat16 *slots, int stride, int64_t row, float *part)
{
    float top = 0;
    int n = a.w.cols;
    for (int c = threadIdx.x; c < n; c += THREADS) {
        float v = silu(a.gate.data[row * a.gate.stride + c]) * a.up.data[row * a.up.stride + c];
        put_parts(slots, stride, c, v);
        top = fmaxf(top, fabsf(v));
        if (blockIdx.x == 0) a.made.data[row * a.made.stride + c] = v;
    }
    for (int c = n + threadIdx.x; c < stride; c += THREADS)
        for (int s = 0; s < SLOTS; s++) slots[s * stride + c] = __float2bfloat16_rn(0);
    float scale = fp8_input_scale(block_max(top, part));
    for (int c = threadIdx.x; a.w.input == INPUT_FP8_ROW && c < n; c += THREADS) {
        float v = __bfloat162float(slots[c]) + __bfloat162float(slots[stride + c]);
        put_quantized(slots, stride, c, v + __bfloat162float(slots[2 * stride + c]), scale);
    }
    return scale;
}

__host__ __device__ inline size_t down_shared(int k, int cols, int shared_cols)
{
    return RING_BYTES + RING_SCALES + (size_t)DOWN_TILES * (k + WARPS) * SLOTS * 8 * 4 +
           (size_t)SLOTS * 2 * ((size_t)k * slot_stride(cols) + slot_stride(shared_cols));
}

/* Grid: multiprocessors, rows. Shared memory: ring, sums of picks [tile][k][slot][8] and of the shared expert
 * [tile][warp][slot][8], slots of picks [k], slots of the shared expert. */
__global__ void __launch_bounds__(THREADS, 2) stream_down(const __grid_constant__ down_args a)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ int expert[PICKS_MAX];
    __shared__ float weight[PICKS_MAX], input_scale[PICKS_MAX], part[WARPS];
    const cuda_matrix &w = a.e.m[DOWN];
    int k = a.p.k, stride = slot_stride(w.cols), shared_stride = slot_stride(a.w.cols);
    float *picked = (float *)(shared + RING_BYTES + RING_SCALES), *together = picked + DOWN_TILES * k * SLOTS * 8;
    __nv_bfloat16 *slots = (__nv_bfloat16 *)(together + DOWN_TILES * WARPS * SLOTS * 8);
    __nv_bfloat16 *shared_slots = slots + (size_t)k * SLOTS * stride;
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4, all = tiles_of(w.rows);
    int own = (int)blockIdx.x < all ? (all - 1 - blockIdx.x) / gridDim.x + 1 : 0, asked = 0;
    int64_t row = blockIdx.y;
    let_next_start();
    ring r(shared);
    down_plan plan(a, own < DOWN_TILES ? own : DOWN_TILES);
    for (; asked < RING && asked < plan.shared_count(); asked++) request_down(r, a, plan, asked, 0, nullptr);
    wait_for_previous();
    for (int j = threadIdx.x; j < k; j += THREADS) {
        expert[j] = a.p.expert[row * k + j];
        weight[j] = a.p.weight[row * k + j];
    }
    __syncthreads();
    for (; asked < RING; asked++) request_down(r, a, plan, asked, 0, expert);
    for (int j = warp; j < k; j += WARPS) {
        const float *x = a.hidden + (row * k + j) * w.cols;
        __nv_bfloat16 *to = slots + (size_t)j * SLOTS * stride;
        float s = fp8_input_scale(warp_max(place_row(to, stride, x, w.cols, lane, LANES)));
        if (w.input == INPUT_FP8_ROW) quantize_row(to, stride, x, w.cols, s, lane, LANES);
        if (lane == 0) input_scale[j] = s;
    }
    float shared_scale = a.w.rows ? place_shared(a, shared_slots, shared_stride, row, part) : 1;
    __syncthreads();
    int slot = g < SLOTS ? g : 0;
    for (int first = 0; first < own; first += DOWN_TILES) {
        if (first > 0) {
            plan = down_plan(a, own - first < DOWN_TILES ? own - first : DOWN_TILES);
            for (int q = 0; q < RING; q++) request_down(r, a, plan, q, first, expert);
        }
        float acc[2][4] = {};
        for (int q = 0; q < plan.count(); q += 2) {
            uint32_t scale[2];
            copy_wait<RING - 2>();
            __syncwarp();
            uint4 v[2];
            v[0] = r.take(&scale[0]);
            v[1] = r.take(&scale[1]);
            down_piece d(plan, q), end(plan, q + 1);
            bool is_shared = d.pick < 0;
            piece_product<1> product = { is_shared ? shared_slots + slot * shared_stride
                                                   : slots + ((size_t)d.pick * SLOTS + slot) * stride,
                                         0, g < SLOTS };
            int format = is_shared ? a.w.format : w.format;
            if (d.valid) product.run(acc, v[0], scale[0], format, d.piece, t);
            if (end.valid) product.run(acc, v[1], scale[1], format, end.piece, t);
            __syncwarp();
            request_down(r, a, plan, q + RING, first, expert);
            request_down(r, a, plan, q + RING + 1, first, expert);
            if (!end.last) continue;
            float *to = is_shared ? together + (d.tile * WARPS + warp) * SLOTS * 8 : picked + (d.tile * k + d.pick) * SLOTS * 8;
            if (g < SLOTS)
                *(float2 *)(to + g * 8 + 2 * t) = make_float2(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1]);
            for (int i = 0; i < 4; i++) acc[0][i] = acc[1][i] = 0;
        }
        copy_wait<0>();
        r.oldest = r.next;
        __syncthreads();
        store_down(a, picked, together, first, plan.tiles, row, expert, weight, input_scale, shared_scale);
        __syncthreads();
    }
    copy_wait<0>();
}

size_t up_shared(int cols)
{
    return RING_BYTES + RING_SCALES + UP_SUMS + (size_t)SLOTS * slot_stride(cols) * 2;
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
        u.out[0] = d.gate = run->gate;
        u.out[1] = d.up = run->up;
        d.w = w[2];
        d.made = run->hidden;
        d.shared_gate = run->shared_gate;
        d.add = run->x;
    }
    if (p->k > PICKS_MAX || up_shared(x.cols) > (size_t)limit || down_shared(p->k, e->m[DOWN].cols, d.w.cols) > (size_t)limit)
        return false;
    dim3 grid((unsigned)q->sms, (unsigned)x.rows);
    launch(q, "experts", true, stream_up, grid, up_shared((int)x.cols), u);
    launch(q, "experts", true, stream_down, grid, down_shared(p->k, e->m[DOWN].cols, d.w.cols), d);
    return true;
}
