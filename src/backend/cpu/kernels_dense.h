/* Kernels of one ISA, first part: decoding panels, the product, row-wise operations. Included by kernels_*.c
 * only. */
#ifndef BACKEND_CPU_KERNELS_DENSE_H
#define BACKEND_CPU_KERNELS_DENSE_H
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd.h"
#include "num/e4m3.h"
#include "num/fp8.h"
#include <assert.h>
#include <math.h>

enum { PER_PANEL = PANEL / VL }; /* vectors across a panel */

INLINE vec vload_part(const float *p, int64_t n)
{
    float x[VL] = { 0 };
    memcpy(x, p, (size_t)n * sizeof *x);
    return vload(x);
}

INLINE void vstore_part(float *p, vec v, int64_t n)
{
    float x[VL];
    vstore(x, v);
    memcpy(p, x, (size_t)n * sizeof *x);
}

/* Panels. */

static void decode_bf16(float *out, const uint16_t *in, int64_t n)
{
    for (int64_t i = 0; i < n * PANEL; i += VL) vstore(out + i, vload_bf16(in + i));
}

static void decode_fp8(float *out, const uint8_t *in, int64_t n)
{
    for (int64_t i = 0; i < n * PANEL; i += VL) vstore(out + i, vfrom_e4m3(vload_u8(in + i)));
}

/* A panel lies in one row of blocks. */
static void decode_fp8_block(float *out, const struct cpu_weight *w, int64_t panel, int64_t first, int64_t n)
{
    const uint8_t *in = w->data + (panel * w->head.cols + first) * PANEL;
    const float *scale = w->scale + panel * PANEL / FP8_BLOCK * fp8_blocks(w->head.cols);
    for (int64_t c = first; c < first + n; c++, in += PANEL, out += PANEL)
        for (int v = 0; v < PER_PANEL; v++)
            vstore(out + v * VL, vfrom_e4m3(vload_u8(in + v * VL)) * vset(scale[c / FP8_BLOCK]));
}

/* One group of 16 columns. codes: 8 bytes a column, rows 0..7 in the low nibbles, 8..15 in the high. */
INLINE void decode_group(float *out, const uint8_t *codes, const vec step[PER_PANEL])
{
#pragma GCC unroll 4
    for (int c = 0; c < 16; c++, codes += 8, out += PANEL)
#pragma GCC unroll 4
        for (int v = 0; v < PER_PANEL; v++) vstore(out + v * VL, vfrom_e2m1(vload_e2m1(codes, v)) * step[v]);
}

static void decode_nvfp4(float *out, const uint8_t *codes, const uint8_t *groups, float global, int64_t n)
{
    for (int64_t c = 0; c < n; c += 16, groups += PANEL) {
        vec step[PER_PANEL];
        for (int v = 0; v < PER_PANEL; v++) step[v] = vfrom_e4m3(vload_u8(groups + v * VL)) / global;
        decode_group(out + c * PANEL, codes + c * 8, step);
    }
}

static void decode(float *out, const struct cpu_weight *w, int64_t panel, int64_t first, int64_t n)
{
    int64_t at = panel * w->head.cols + first;
    if (w->head.format == WEIGHT_NVFP4)
        decode_nvfp4(out, w->data + at * 8, w->groups + at, w->global, n);
    else if (w->head.format == WEIGHT_FP8)
        decode_fp8(out, w->data + at * PANEL, n);
    else if (w->head.format == WEIGHT_FP8_BLOCK)
        decode_fp8_block(out, w, panel, first, n);
    else if (w->head.format == WEIGHT_BF16)
        decode_bf16(out, (const uint16_t *)w->data + at * PANEL, n);
    else
        memcpy(out, (const float *)w->data + at * PANEL, (size_t)n * PANEL * sizeof *out);
}

/* The product. */

INLINE void product_rows(float *y, const float *x, const float *w, int64_t cols, const int rows)
{
    vec sum[BLOCK_ROWS_MAX][PER_PANEL];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < PER_PANEL; v++) sum[i][v] = vload(y + i * PANEL + v * VL);
    for (int64_t c = 0; c < cols; c++, x += rows, w += PANEL) {
        vec weight[PER_PANEL];
#pragma GCC unroll 4
        for (int v = 0; v < PER_PANEL; v++) weight[v] = vload(w + v * VL);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int v = 0; v < PER_PANEL; v++) sum[i][v] = x[i] * weight[v] + sum[i][v];
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < PER_PANEL; v++) vstore(y + i * PANEL + v * VL, sum[i][v]);
}

static void product(float *y, const float *x, const float *w, int64_t cols, int rows)
{
    switch (rows) {
    case 1: product_rows(y, x, w, cols, 1); return;
    case 2: product_rows(y, x, w, cols, 2); return;
    case 4: product_rows(y, x, w, cols, 4); return;
#if defined(__AVX512F__)
    case 8: product_rows(y, x, w, cols, 8); return;
    case 16: product_rows(y, x, w, cols, 16); return;
#endif
    default: return;
    }
}

/* Rows. */

static float sum_of_squares(const float *x, int64_t n)
{
    vec sum = { 0 };
    int64_t i = 0;
    for (; i + VL <= n; i += VL) sum = vload(x + i) * vload(x + i) + sum;
    if (i < n) {
        vec v = vload_part(x + i, n - i);
        sum = v * v + sum;
    }
    return vsum(sum);
}

static void rmsnorm(float *y, const float *x, const float *gain, int64_t n, float eps)
{
    float r = 1 / sqrtf(sum_of_squares(x, n) / (float)n + eps);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vstore(y + i, vload(x + i) * r * vload(gain + i));
    for (; i < n; i++) y[i] = x[i] * r * gain[i];
}

static void gated_norm(float *y, const float *x, const float *z, const float *gain, int64_t n, float eps)
{
    float r = 1 / sqrtf(sum_of_squares(x, n) / (float)n + eps);
    int64_t i = 0, k = n % VL;
    for (; i + VL <= n; i += VL) vstore(y + i, vload(x + i) * r * vload(gain + i) * vsilu(vload(z + i)));
    if (k > 0)
        vstore_part(y + i, vload_part(x + i, k) * r * vload_part(gain + i, k) * vsilu(vload_part(z + i, k)),
                    k);
}

static void silu_mul(float *y, const float *gate, const float *up, int64_t n)
{
    int64_t i = 0, k = n % VL;
    for (; i + VL <= n; i += VL) vstore(y + i, vsilu(vload(gate + i)) * vload(up + i));
    if (k > 0) vstore_part(y + i, vsilu(vload_part(gate + i, k)) * vload_part(up + i, k), k);
}

static void scale_add(float *y, const float *x, float scale, int64_t n)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vstore(y + i, vload(x + i) * scale + vload(y + i));
    if (i < n) vstore_part(y + i, vload_part(x + i, n - i) * scale + vload_part(y + i, n - i), n - i);
}

static void l2norm(float *x, int64_t n, float scale)
{
    float r = scale / sqrtf(sum_of_squares(x, n) + 1e-6f);
    for (int64_t i = 0; i < n; i++) x[i] *= r;
}

static void conv_row(float *y, const float *const *rows, const float *w, int kernel, int64_t n)
{
    int64_t i = 0, k = n % VL;
    for (; i + VL <= n; i += VL) {
        vec sum = { 0 };
        for (int j = 0; j < kernel; j++) sum = vload(w + j * n + i) * vload(rows[j] + i) + sum;
        vstore(y + i, vsilu(sum));
    }
    if (k == 0) return;
    vec sum = { 0 };
    for (int j = 0; j < kernel; j++) sum = vload_part(w + j * n + i, k) * vload_part(rows[j] + i, k) + sum;
    vstore_part(y + i, vsilu(sum), k);
}

/* Log-probabilities. */

static void log_softmax(float *x, int64_t n)
{
    float top = x[0];
    vec most = vset(x[0]), sum = { 0 };
    int64_t i = 0;
    for (; i + VL <= n; i += VL) most = vmax(most, vload(x + i));
    top = vmaximum(most);
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    for (i = 0; i + VL <= n; i += VL) sum += vexp(vload(x + i) - top);
    float tail = 0;
    for (; i < n; i++) tail += vexp(vset(x[i] - top))[0];
    float log_sum = logf(vsum(sum) + tail);
    for (i = 0; i < n; i++) x[i] = x[i] - top - log_sum;
}

/* Blocks are summed in f32, their sums in double. */
static double divergence(const float *p, const float *q, int64_t n)
{
    double total = 0;
    for (int64_t i = 0; i < n;) {
        vec sum = { 0 };
        int64_t end = i + 64 * VL < n ? i + 64 * VL : n;
        for (; i + VL <= end; i += VL) sum = vexp(vload(p + i)) * (vload(p + i) - vload(q + i)) + sum;
        total += (double)vsum(sum);
        for (; i < end; i++) total += (double)(vexp(vset(p[i]))[0] * (p[i] - q[i]));
    }
    return total;
}
#endif
