/* The factor of moments, and NVFP4 packing by it: to the bit what quantize/gptq.c and quantize/search.c do, so every sum here
 * has their order, and a product and a sum are two roundings.
 *
 * A group of 16 columns is searched by 16 lanes, a scale each. Passing errors on, a block has some rows of a matrix with all
 * their columns in shared memory: once a group is chosen, its errors are added to what all later columns aim at. */
#include "backend/cuda/device.cuh"

namespace {

constexpr int GROUP = 16, DOT_LANES = 8;
constexpr float DAMPING = 0.01f;

/* ---- factor ---- */

struct factor_args {
    factoring f;
    double *mean; /* [count] */
    float *root;  /* [count][n] */
};

__device__ __forceinline__ bool sound(double x)
{
    return x > 0 && isfinite(x);
}

/* A block a matrix: the diagonal's mean, and how much each column counts. */
__global__ void weigh_columns(const factor_args a)
{
    __shared__ float diagonal[THREADS];
    __shared__ double shared_mean;
    int64_t n = a.f.n;
    const float *h = a.f.h + blockIdx.x * n * n;
    double mean = 0;
    for (int64_t first = 0; first < n; first += THREADS) {
        int64_t k = first + threadIdx.x;
        diagonal[threadIdx.x] = k < n ? h[k * n + k] : 0;
        __syncthreads();
        for (int i = 0; threadIdx.x == 0 && i < THREADS && first + i < n; i++) mean += (double)diagonal[i] / (double)n;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        a.mean[blockIdx.x] = shared_mean = mean;
        if (a.f.factored) a.f.factored[blockIdx.x] = sound(mean);
    }
    __syncthreads();
    mean = shared_mean;
    for (int64_t k = threadIdx.x; k < n; k += THREADS)
        a.f.importance[blockIdx.x * n + k] = mean > 0 ? (float)((double)h[k * n + k] / mean) : 1.0f;
}

/* Grid: rows, matrices. */
__global__ void condition(const factor_args a)
{
    int64_t n = a.f.n, i = blockIdx.x;
    float *row = a.f.h + (blockIdx.y * n + i) * n;
    double mean = a.mean[blockIdx.y];
    if (!sound(mean)) return;
    for (int64_t j = i + threadIdx.x; j < n; j += THREADS) {
        float v = (float)((double)row[j] / mean);
        row[j] = j == i ? v + DAMPING : v;
    }
}

/* gptq_dot of quantize/gptq.c, by its lanes, with the result in each. */
__device__ __forceinline__ double dot(const float *a, const float *b, int n)
{
    int lane = threadIdx.x % DOT_LANES, whole = n / DOT_LANES * DOT_LANES;
    double sum = 0, total = 0;
#pragma unroll 4
    for (int k = lane; k < whole; k += DOT_LANES) sum = sum + (double)a[k] * (double)b[k];
    for (int k = whole; lane == 0 && k < n; k++) sum = sum + (double)a[k] * (double)b[k];
    __syncwarp();
    for (int l = 0; l < DOT_LANES; l++) total = total + __shfl_sync(ALL, sum, l, DOT_LANES);
    return total;
}

/* Column j of R, H = R R^T: eight lanes a row. Grid: rows up to j, matrices. */
__global__ void decompose(const factor_args a, int j)
{
    int64_t n = a.f.n, i = (int64_t)blockIdx.x * (THREADS / DOT_LANES) + threadIdx.x / DOT_LANES;
    float *h = a.f.h + blockIdx.y * n * n;
    if (__any_sync(ALL, !a.f.factored[blockIdx.y])) return; /* another block may say so meanwhile */
    const float *row = h + j * n + j + 1, *other = h + (i < j ? i : j) * n + j + 1;
    int left = (int)n - 1 - j;
    double pivot = (double)h[j * n + j] - dot(row, row, left), sum = dot(other, row, left), root = sqrt(pivot);
    if (threadIdx.x % DOT_LANES != 0 || i > j) return;
    if (i == j) {
        a.root[blockIdx.y * n + j] = (float)root;
        if (!sound(pivot)) a.f.factored[blockIdx.y] = 0;
    } else if (sound(pivot)) {
        h[i * n + j] = (float)(((double)h[i * n + j] - sum) / root);
    }
}

/* R_ji / R_ii at column i of row j, R_ii^2 on the diagonal. Grid: rows, matrices. */
__global__ void finish_factor(const factor_args a)
{
    int64_t n = a.f.n, j = blockIdx.x;
    float *row = a.f.h + (blockIdx.y * n + j) * n;
    const float *root = a.root + blockIdx.y * n;
    if (!a.f.factored[blockIdx.y]) return;
    for (int64_t i = j + threadIdx.x; i < n; i += THREADS) row[i] = i == j ? root[j] * root[j] : row[i] / root[i];
}

/* ---- search ---- */

struct found {
    uint32_t codes[2]; /* of this lane's scale */
    float error[GROUP];
    int best; /* lane */
    uint8_t scale;
};

/* search_group of quantize/search.c, a lane a scale. feedback: [GROUP][GROUP + 1], its diagonal the weights. */
template <bool FEEDS>
__device__ __forceinline__ void search(found &f, const float (&value)[GROUP], const float (&start)[GROUP], const float *weight,
                                       const float *feedback, float global)
{
    int lane = threadIdx.x % GROUP;
    float top = 0, sum = 0;
#pragma unroll
    for (int k = 0; k < GROUP; k++) top = fmaxf(top, fabsf(start[k]));
    uint8_t usual = e4m3_code(global * __bfloat162float(__float2bfloat16_rn(top / 6.0f)));
    if (!usual) usual = 0x20;
    float scale = e4m3_value(usual);
    int low = e4m3_code(0.7f * scale), high = e4m3_code(1.8f * scale), first = low > 0 ? low : 1;
    int n = high - first + 1 < GROUP ? high - first + 1 : GROUP;
    float step = e4m3_value((uint8_t)(first + (lane < n ? lane : 0))) / global;
    f.codes[0] = f.codes[1] = 0;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
        float t = start[k];
        if (FEEDS) {
#pragma unroll
            for (int m = 0; m < k; m++) t += feedback[k * (GROUP + 1) + m] * f.error[m];
        }
        float x = t / step, a = fabsf(x);
        int small = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f), middle = (a > 2.5f) + (a >= 3.5f), large = a > 5.0f;
        float q = copysignf(0.5f * (float)(small + 2 * middle + 4 * large), x) * step, d = t - q;
        f.error[k] = value[k] - q;
        sum += (FEEDS ? feedback[k * (GROUP + 1) + k] : weight[k]) * (d * d);
        f.codes[k / 8] |= (uint32_t)((small + middle + large) | (x < 0 ? 8 : 0)) << 4 * (k % 8);
    }
    float least = lane < n ? sum : INFINITY, own = __shfl_sync(ALL, sum, usual - first, GROUP);
    if (isnan(least)) least = INFINITY;
    float mine = least;
    for (int o = GROUP / 2; o > 0; o /= 2) least = fminf(least, __shfl_xor_sync(ALL, least, o));
    unsigned equal = __ballot_sync(ALL, lane < n && mine == least) >> (threadIdx.x % LANES / GROUP * GROUP) & 0xffffu;
    f.best = isnan(own) || own == least ? usual - first : __ffs(equal) - 1;
    f.scale = (uint8_t)(first + f.best);
}

/* A row that is packed: where it lies, and what goes with its expert. */
struct pack_row {
    const __nv_bfloat16 *w;
    uint8_t *codes, *scales;
    double *sums;
};

__device__ __forceinline__ pack_row row_of(const packing_run &p, const __nv_bfloat16 *w, int expert, int rows_each, int row)
{
    int64_t i = expert * p.rows + row;
    return { w + (expert * (int64_t)rows_each + row * p.step) * p.cols, p.codes + i * (p.cols / 2),
             p.scales + i * (p.cols / GROUP), p.sums + 2 * i };
}

__device__ __forceinline__ void load_group(float (&v)[GROUP], const __nv_bfloat16 *w)
{
    uint4 words[2] = { ((const uint4 *)w)[0], ((const uint4 *)w)[1] };
    const __nv_bfloat16 *x = (const __nv_bfloat16 *)words;
#pragma unroll
    for (int k = 0; k < GROUP; k++) v[k] = __bfloat162float(x[k]);
}

/* The winner's codes and scale, and its squares of errors and weights. */
__device__ __forceinline__ void keep(const found &f, const pack_row &row, int group, const float (&value)[GROUP],
                                     double &difference, double &total)
{
    if ((int)(threadIdx.x % GROUP) != f.best) return;
    *(uint2 *)(row.codes + group * (GROUP / 2)) = make_uint2(f.codes[0], f.codes[1]);
    row.scales[group] = f.scale;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
        difference += (double)f.error[k] * (double)f.error[k];
        total += (double)value[k] * (double)value[k];
    }
}

/* A block a row. Grid: rows of an expert, experts. */
__global__ void __launch_bounds__(THREADS)
    search_rows(const __grid_constant__ packing_run p, const __nv_bfloat16 *w, int rows_each)
{
    __shared__ double part[2][WARPS];
    pack_row row = row_of(p, w, blockIdx.y, rows_each, blockIdx.x);
    const float *importance = p.importance + (p.shared ? 0 : blockIdx.y * p.cols);
    float global = p.global[blockIdx.y];
    int groups = (int)p.cols / GROUP;
    double difference = 0, total = 0;
    for (int first = 0; first < groups; first += THREADS / GROUP) {
        int group = first + threadIdx.x / GROUP;
        bool is_there = group < groups;
        float value[GROUP], weight[GROUP];
        found f;
        load_group(value, row.w + (is_there ? group : 0) * GROUP);
#pragma unroll
        for (int k = 0; k < GROUP; k++) weight[k] = importance[(is_there ? group : 0) * GROUP + k];
        search<false>(f, value, value, weight, nullptr, global);
        if (is_there) keep(f, row, group, value, difference, total);
    }
    for (int o = LANES / 2; o > 0; o /= 2) {
        difference += __shfl_xor_sync(ALL, difference, o);
        total += __shfl_xor_sync(ALL, total, o);
    }
    if (threadIdx.x % LANES == 0) part[0][threadIdx.x / LANES] = difference, part[1][threadIdx.x / LANES] = total;
    __syncthreads();
    if (threadIdx.x > 1) return;
    double sum = 0;
    for (int i = 0; i < WARPS; i++) sum += part[threadIdx.x][i];
    row.sums[threadIdx.x] = sum;
}

constexpr int FEEDBACK = GROUP * (GROUP + 1);

size_t pass_bytes(int rows, int64_t cols)
{
    return ((size_t)rows * (size_t)(cols + 4) + FEEDBACK + (size_t)rows * GROUP) * sizeof(float);
}

/* Shared memory: what the columns of R rows aim at, the group's part of the factor, its errors. Grid: rows by R of an expert,
 * experts. */
template <int R>
__global__ void __launch_bounds__(THREADS) pass_rows(const __grid_constant__ packing_run p, const __nv_bfloat16 *w, int rows_each)
{
    SHARED_MEMORY(float, aim, 16);
    int n = (int)p.cols, pitch = n + 4, row0 = blockIdx.x * R, r = threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
    float *errors = aim + R * pitch, *feedback = errors + R * GROUP;
    const float *factor = p.factor + (p.shared ? 0 : (int64_t)blockIdx.y * n * n);
    const float *importance = p.importance + (p.shared ? 0 : blockIdx.y * n);
    bool passes = p.factored[p.shared ? 0 : blockIdx.y];
    float global = p.global[blockIdx.y];
    double difference = 0, total = 0;
    for (int i = threadIdx.x; i < R * n; i += THREADS) {
        int k = row0 + i / n;
        float x = k < p.rows ? __bfloat162float(row_of(p, w, blockIdx.y, rows_each, k).w[i % n]) : 0;
        aim[i / n * pitch + i % n] = x;
    }
    bool is_there = r < R && row0 + r < p.rows;
    pack_row row = row_of(p, w, blockIdx.y, rows_each, is_there ? row0 + r : 0);
    for (int first = 0; first < n; first += GROUP) {
        if (threadIdx.x < GROUP * GROUP) {
            int m = threadIdx.x / GROUP, k = threadIdx.x % GROUP;
            float x = passes ? factor[(int64_t)(first + m) * n + first + k] : m == k ? importance[first + k] : 0.0f;
            feedback[k * (GROUP + 1) + m] = x;
        }
        __syncthreads();
        if (r < R) {
            float value[GROUP], start[GROUP];
            found f;
            load_group(value, row.w + first);
#pragma unroll
            for (int k = 0; k < GROUP; k++) start[k] = aim[r * pitch + first + k];
            search<true>(f, value, start, nullptr, feedback, global);
            if (lane == f.best) {
#pragma unroll
                for (int k = 0; k < GROUP; k++) errors[r * GROUP + k] = f.error[k];
            }
            if (is_there) keep(f, row, first / GROUP, value, difference, total);
        }
        __syncthreads();
        for (int c = first + GROUP + threadIdx.x; passes && c < n; c += THREADS) {
            float f[GROUP];
#pragma unroll
            for (int j = 0; j < GROUP; j++) f[j] = factor[(int64_t)(first + j) * n + c];
#pragma unroll 4
            for (int i = 0; i < R; i++) {
                float sum = aim[i * pitch + c];
#pragma unroll
                for (int j = 0; j < GROUP; j++) sum += f[j] * errors[i * GROUP + j];
                aim[i * pitch + c] = sum;
            }
        }
    }
    for (int o = GROUP / 2; o > 0; o /= 2) {
        difference += __shfl_xor_sync(ALL, difference, o);
        total += __shfl_xor_sync(ALL, total, o);
    }
    if (is_there && lane == 0) row.sums[0] = difference, row.sums[1] = total;
}

size_t judge_bytes(int64_t cols)
{
    return (size_t)cols * (sizeof(double) + sizeof(float));
}

/* sums[0] = e H e^T of a row's errors e, as quantize/contest.c adds it up. Grid: rows of an expert, experts. */
__global__ void judge_rows(const __grid_constant__ packing_run p, const __nv_bfloat16 *w, int rows_each)
{
    SHARED_MEMORY(double, lost, 16);
    int n = (int)p.cols;
    float *error = (float *)(lost + n);
    pack_row row = row_of(p, w, blockIdx.y, rows_each, blockIdx.x);
    const float *h = p.held + (p.shared ? 0 : (int64_t)blockIdx.y * n * n);
    float global = p.global[blockIdx.y];
    for (int c = threadIdx.x; c < n; c += THREADS) {
        float step = e4m3_value(row.scales[c / GROUP]) / global;
        error[c] = __bfloat162float(row.w[c]) - e2m1_value(row.codes[c / 2] >> c % 2 * 4 & 15) * step;
    }
    __syncthreads();
    for (int first = 0; first < n; first += THREADS / DOT_LANES) {
        int i = first + threadIdx.x / DOT_LANES, at = i < n ? i : n - 1;
        const float *line = h + (int64_t)at * n + at;
        double sum = dot(error + at, line, n - at);
        if (i < n && threadIdx.x % DOT_LANES == 0) lost[i] = (double)error[i] * (2 * sum - (double)(error[i] * line[0]));
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    double total = 0;
    for (int i = 0; i < n; i++) total += lost[i];
    row.sums[0] = total;
}

template <int R> bool passes_with(struct queue *q, const packing_run &p, const __nv_bfloat16 *w, int rows_each)
{
    size_t bytes = pass_bytes(R, p.cols);
    if (bytes > (size_t)q->shared_max) return false;
    launch(q, "pack", false, pass_rows<R>, dim3(blocks(p.rows, R), p.experts->n_experts), bytes, p, w, rows_each);
    return true;
}

} /* namespace */

void cuda_factor(struct queue *q, const struct factoring *f)
{
    constexpr int ROWS = THREADS / DOT_LANES;
    factor_args a = { *f, (double *)f->scratch, (float *)((double *)f->scratch + f->count) };
    launch(q, "factor", false, weigh_columns, dim3((unsigned)f->count), 0, a);
    if (!f->factored) return;
    dim3 all((unsigned)f->n, (unsigned)f->count);
    launch(q, "factor", false, condition, all, 0, a);
    for (int64_t j = f->n - 1; j >= 0; j--)
        launch(q, "factor", false, decompose, dim3(blocks(j + 1, ROWS), (unsigned)f->count), 0, a, (int)j);
    launch(q, "factor", false, finish_factor, all, 0, a);
}

void cuda_pack(struct queue *q, const struct packing_run *p)
{
    const struct cuda_experts *e = (const struct cuda_experts *)p->experts->bound;
    const struct cuda_matrix &m = e->m[p->part];
    const __nv_bfloat16 *w = (const __nv_bfloat16 *)m.data;
    bool passes = p->factor && (passes_with<16>(q, *p, w, m.rows) || passes_with<8>(q, *p, w, m.rows) ||
                                passes_with<4>(q, *p, w, m.rows) || passes_with<2>(q, *p, w, m.rows));
    dim3 each((unsigned)p->rows, (unsigned)p->experts->n_experts);
    if (p->factor && !passes) queue_refuse(q, "pack", "rows too long for shared memory");
    if (!p->factor) launch(q, "pack", false, search_rows, each, 0, *p, w, m.rows);
    if (p->held) launch(q, "pack", false, judge_rows, each, judge_bytes(p->cols), *p, w, m.rows);
}

bool cuda_packs(const struct queue *q, int64_t cols)
{
    return cols % GROUP == 0 && pass_bytes(2, cols) <= (size_t)q->shared_max && judge_bytes(cols) <= (size_t)q->shared_max;
}
