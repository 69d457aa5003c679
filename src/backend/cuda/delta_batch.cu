/* A token of many sequences of Gated DeltaNet, with the sums of delta_step (delta.cu) to the bit, for heads of 128.
 * delta_tokens makes q, k and v of every head; in delta_sequences a block holds a value head's state in registers, two blocks a
 * multiprocessor, so that one's loads cover another's sums, and norms and gates what the head gives, where the output matrix takes
 * it as it is: its panels need no kernel of their own. Moves: every state once in, once out. */
#include "backend/cuda/batch.h"
#include "backend/cuda/prepare.cuh"

namespace {

constexpr int HEAD = 128, COLUMNS = 2 * LANES, HALVES = HEAD / COLUMNS, EACH = HEAD / WARPS, TAPS = 3;
static_assert(HALVES == HEAD_PAIRS && HALVES * THREADS == BLOCK);

struct delta_batch_args {
    mat o, u, tokens, a, b;
    const float *A_log, *dt_bias, *weight; /* weight: [TAPS + 1][channels] */
    float *matrix, *conv;
    int key_heads, value_heads;
    cuda_rows rows;
};

/* Convolution and SiLU, of q and k the norm; the convolution's state is moved on. A warp a head. Grid: heads, spans. */
__global__ void __launch_bounds__(THREADS) delta_tokens(const __grid_constant__ delta_batch_args p)
{
    constexpr int NUMBERS = HEAD / LANES;
    int head = blockIdx.x * WARPS + threadIdx.x / LANES, channels = (int)p.u.cols, first = head * HEAD + threadIdx.x % LANES;
    if (head >= 2 * p.key_heads + p.value_heads) return;
    float w[TAPS + 1][NUMBERS], old[TAPS][NUMBERS], x[NUMBERS], y[NUMBERS], sum = 0;
#pragma unroll
    for (int j = 0; j <= TAPS; j++)
#pragma unroll
        for (int n = 0; n < NUMBERS; n++) w[j][n] = p.weight[j * channels + first + n * LANES];
    cuda_span span = p.rows.spans[blockIdx.y];
    float *state = p.conv + (int64_t)span.slot * TAPS * channels + first;
    const float *u = p.u.data + span.first * p.u.stride + first;
    wait_for_previous();
    let_next_start(); /* which may count on the kernel that wrote the states */
#pragma unroll
    for (int n = 0; n < NUMBERS; n++) {
        x[n] = __ldcg(u + n * LANES);
#pragma unroll
        for (int j = 0; j < TAPS; j++) old[j][n] = __ldcg(state + j * channels + n * LANES);
    }
#pragma unroll
    for (int n = 0; n < NUMBERS; n++) {
        y[n] = x[n] * w[TAPS][n];
#pragma unroll
        for (int j = 0; j < TAPS; j++) y[n] = fmaf(w[j][n], old[j][n], y[n]);
        y[n] = silu(y[n]);
        sum = fmaf(y[n], y[n], sum);
    }
    float scale = head < p.key_heads ? 1.0f / sqrtf((float)HEAD) : 1, r = scale / sqrtf(warp_sum(sum) + 1e-6f);
    float *to = p.tokens.data + span.first * p.tokens.stride + first;
#pragma unroll
    for (int n = 0; n < NUMBERS; n++) {
        to[n * LANES] = head < 2 * p.key_heads ? y[n] * r : y[n];
#pragma unroll
        for (int j = 0; j < TAPS; j++) state[j * channels + n * LANES] = j + 1 < TAPS ? old[j + 1][n] : x[n];
    }
}

/* A thread: rows warp + 8 i, columns 2 lane, 2 lane + 1 of a half of the head. to: panels of the heads, normed and gated; without
 * parts the heads go to p.o as they are. Grid: heads, spans. */
__global__ void __launch_bounds__(BLOCK, 2)
    delta_sequences(const __grid_constant__ delta_batch_args p, const __grid_constant__ prepare_args to)
{
    __shared__ __align__(16) float tq[HEAD], tk[HEAD], tv[HEAD], gate[HEAD], gain[HEAD];
    __shared__ float2 sums[2][HALVES][WARPS][LANES];
    int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES % WARPS, half = threadIdx.x / THREADS, head = blockIdx.x;
    int first = half * COLUMNS;
    let_next_start();
    cuda_span span = p.rows.spans[blockIdx.y];
    float *S = p.matrix + (((int64_t)span.slot * p.value_heads + head) * HEAD + warp) * HEAD + first + 2 * lane;
    float2 s[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) s[i] = __ldcs((const float2 *)(S + i * WARPS * HEAD));
    wait_for_previous();
    float a = __ldcg(p.a.data + span.first * p.a.stride + head) + p.dt_bias[head];
    float beta = sigmoid(__ldcg(p.b.data + span.first * p.b.stride + head)), rate = -expf(p.A_log[head]);
    if (half == 0 && warp < 3) { /* four numbers a lane */
        int key = head / (p.value_heads / p.key_heads), at = warp == 0 ? key : warp == 1 ? p.key_heads + key : 2 * p.key_heads + head;
        const float *from = p.tokens.data + span.first * p.tokens.stride + at * HEAD + 4 * lane;
        *(float4 *)((warp == 0 ? tq : warp == 1 ? tk : tv) + 4 * lane) = __ldcg((const float4 *)from);
    } else if (half == 1 && warp < HEAD / LANES && to.parts) {
        int c = warp * LANES + lane;
        gate[c] = silu(__ldcg(to.z.data + span.first * to.z.stride + head * HEAD + c));
        gain[c] = to.gain[c];
    }
    float decay = expf(rate * (a > 20 ? a : log1pf(expf(a))));
    __syncthreads();
    float2 read = make_float2(0, 0), out = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float k = tk[warp + WARPS * i];
        s[i].x *= decay;
        s[i].y *= decay;
        read.x = fmaf(s[i].x, k, read.x);
        read.y = fmaf(s[i].y, k, read.y);
    }
    sums[0][half][warp][lane] = read;
    meet_256(1 + half);
    read = make_float2(0, 0);
#pragma unroll
    for (int n = 0; n < WARPS; n++) read.x += sums[0][half][n][lane].x, read.y += sums[0][half][n][lane].y;
    float dx = beta * (tv[first + 2 * lane] - read.x), dy = beta * (tv[first + 2 * lane + 1] - read.y);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float k = tk[warp + WARPS * i], q = tq[warp + WARPS * i];
        s[i].x = fmaf(k, dx, s[i].x);
        s[i].y = fmaf(k, dy, s[i].y);
        out.x = fmaf(s[i].x, q, out.x);
        out.y = fmaf(s[i].y, q, out.y);
        __stcs((float2 *)(S + i * WARPS * HEAD), s[i]);
    }
    sums[1][half][warp][lane] = out;
    __syncthreads();
    if (threadIdx.x >= LANES) return;
    float2 made[HALVES] = {};
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
        for (int n = 0; n < WARPS; n++) made[h].x += sums[1][h][n][lane].x, made[h].y += sums[1][h][n][lane].y;
    if (to.parts) {
        float2 silu_z[HALVES];
#pragma unroll
        for (int h = 0; h < HALVES; h++) silu_z[h] = *(const float2 *)(gate + h * COLUMNS + 2 * lane);
        prepare_head(to, nullptr, (int)span.first, head, HEAD, made, silu_z, gain);
    } else {
        float *o = p.o.data + span.first * p.o.stride + head * HEAD + 2 * lane;
#pragma unroll
        for (int h = 0; h < HALVES; h++) o[h * COLUMNS] = made[h].x, o[h * COLUMNS + 1] = made[h].y;
    }
}

} /* namespace */

enum delta_done cuda_batch_delta(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows)
{
    const struct delta_shape *s = r->shape;
    if (rows->n_spans <= ROWS_FEW || s->key_dim != HEAD || s->value_dim != HEAD || s->kernel != TAPS + 1) return DELTA_TO_ADVANCE;
    if (r->conv.stride % 4 || (uintptr_t)r->conv.data % 16) return DELTA_TO_ADVANCE;
    delta_batch_args a = { r->raw, r->u, r->conv, r->a, r->b, r->A_log, r->dt_bias, r->conv_weight, r->state->matrix,
                           r->state->conv, s->key_heads, s->value_heads, *rows };
    launch(q, "delta", true, delta_tokens, dim3(blocks(2 * s->key_heads + s->value_heads, WARPS), (unsigned)rows->n_spans), 0, a);
    prepare_args to = prepare_gated(r);
    if (cuda_batch_delta_out_takes(q, r)) {
        prepare_for(to, r->raw.rows);
        to.parts = (uint8_t *)q->batch.parts;
        q->batch.known = nullptr;
    }
    launch<BLOCK>(q, "delta", true, delta_sequences, dim3((unsigned)s->value_heads, (unsigned)rows->n_spans), 0, a, to);
    return to.parts ? DELTA_INPUTS : DELTA_RAW;
}
