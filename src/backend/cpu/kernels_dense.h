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

/* Panels: the units of columns that share a lane. */

INLINE void unit_f32(vec out[1][PER_PANEL], const float *in)
{
#pragma GCC unroll 4
    for (int v = 0; v < PER_PANEL; v++) out[0][v] = vload(in + v * VL);
}

INLINE void unit_bf16(vec out[2][PER_PANEL], const uint8_t *in)
{
#pragma GCC unroll 4
    for (int v = 0; v < PER_PANEL; v++) {
        vecu pair = vload_u32(in + 4 * v * VL);
        out[0][v] = (vec)(pair << 16);
        out[1][v] = (vec)(pair & 0xffff0000u);
    }
}

INLINE void unit_fp8(vec out[4][PER_PANEL], const uint8_t *in)
{
#pragma GCC unroll 4
    for (int v = 0; v < PER_PANEL; v++)
        vload_fp8(&out[0][v], &out[1][v], &out[2][v], &out[3][v], in + 4 * v * VL);
}

/* A group of 16 columns. step: scale / global of each row. */
INLINE void unit_nvfp4(vec out[16][PER_PANEL], const uint8_t *in, const uint8_t *groups, float global)
{
#pragma GCC unroll 4
    for (int v = 0; v < PER_PANEL; v++) {
        vec step = vfrom_e4m3(vload_u8(groups + v * VL)) / global;
        vecu low = vload_u32(in + 4 * v * VL), high = vload_u32(in + 4 * (PANEL + v * VL));
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) {
            out[c][v] = vfrom_e2m1(low >> (4 * c) & 15) * step;
            out[c + 8][v] = vfrom_e2m1(high >> (4 * c) & 15) * step;
        }
    }
}

enum { UNIT_MAX = 16 };

INLINE int unit_columns(const enum weight_format f)
{
    return f == WEIGHT_NVFP4 ? 16 : f == WEIGHT_BF16 ? 2 : f == WEIGHT_FP8 || f == WEIGHT_FP8_BLOCK ? 4 : 1;
}

/* The unit that begins at column c of a panel. */
INLINE void unit(vec out[UNIT_MAX][PER_PANEL], const struct cpu_weight *w, int64_t panel, int64_t c,
                 const enum weight_format f)
{
    const uint8_t *in = w->data + panel * w->panel_bytes;
    if (f == WEIGHT_NVFP4)
        unit_nvfp4(out, in + c * 8, w->groups + panel * w->head.cols + c, w->global);
    else if (f == WEIGHT_BF16)
        unit_bf16(out, in + c * 32);
    else if (f == WEIGHT_FP8 || f == WEIGHT_FP8_BLOCK)
        unit_fp8(out, in + c * 16);
    else
        unit_f32(out, (const float *)in + c * PANEL);
    if (f != WEIGHT_FP8_BLOCK) return;
    /* a panel lies in one row of blocks, a unit in one block */
    vec scale = vset(w->scale[panel * PANEL / FP8_BLOCK * fp8_blocks(w->head.cols) + c / FP8_BLOCK]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
        for (int v = 0; v < PER_PANEL; v++) out[i][v] *= scale;
}

INLINE void decode_format(float *out, const struct cpu_weight *w, int64_t panel, int64_t first, int64_t n,
                          const enum weight_format f)
{
    const int each = unit_columns(f);
    int64_t c = 0;
    vec u[UNIT_MAX][PER_PANEL];
    for (; c + each <= n; c += each) {
        unit(u, w, panel, first + c, f);
#pragma GCC unroll 16
        for (int i = 0; i < each; i++)
#pragma GCC unroll 4
            for (int v = 0; v < PER_PANEL; v++) vstore(out + (c + i) * PANEL + v * VL, u[i][v]);
    }
    if (c == n) return;
    unit(u, w, panel, first + c, f);
    for (int i = 0; i < each && c + i < n; i++)
        for (int v = 0; v < PER_PANEL; v++) vstore(out + (c + i) * PANEL + v * VL, u[i][v]);
}

static void decode(float *out, const struct cpu_weight *w, int64_t panel, int64_t first, int64_t n)
{
    switch (w->head.format) {
    case WEIGHT_NVFP4: decode_format(out, w, panel, first, n, WEIGHT_NVFP4); return;
    case WEIGHT_FP8: decode_format(out, w, panel, first, n, WEIGHT_FP8); return;
    case WEIGHT_FP8_BLOCK: decode_format(out, w, panel, first, n, WEIGHT_FP8_BLOCK); return;
    case WEIGHT_BF16: decode_format(out, w, panel, first, n, WEIGHT_BF16); return;
    default: decode_format(out, w, panel, first, n, WEIGHT_F32); return;
    }
}

/* Few rows: weights go from memory to the product without a stop. Several panels at a time, so that the adds
 * of one wait for nothing but their own. */

INLINE void stream_tile(float *y, int64_t stride, const float *x, const struct cpu_weight *w, int64_t panel,
                        const int panels, const int rows, const enum weight_format f)
{
    const int each = unit_columns(f);
    vec sum[4][4][PER_PANEL], u[UNIT_MAX][PER_PANEL];
    int64_t c = 0, cols = w->head.cols;
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < PER_PANEL; v++) sum[p][r][v] = (vec){ 0 };
    for (; c + each <= cols; c += each)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            unit(u, w, panel + p, c, f);
#pragma GCC unroll 16
            for (int i = 0; i < each; i++)
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < PER_PANEL; v++)
                        sum[p][r][v] = x[(c + i) * rows + r] * u[i][v] + sum[p][r][v];
        }
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) {
        if (c < cols) unit(u, w, panel + p, c, f);
        for (int i = 0; i < each && c + i < cols; i++)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int v = 0; v < PER_PANEL; v++)
                    sum[p][r][v] = x[(c + i) * rows + r] * u[i][v] + sum[p][r][v];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < PER_PANEL; v++) vstore(y + p * stride + r * PANEL + v * VL, sum[p][r][v]);
    }
}

INLINE void stream_format(float *y, int64_t stride, const float *x, const struct cpu_weight *w, int64_t panel,
                          int panels, int rows, const enum weight_format f)
{
    for (int most = 4 / rows, n; panels > 0; panel += n, panels -= n, y += n * stride) {
        n = panels >= most ? most : 1;
        if (rows == 4)
            stream_tile(y, stride, x, w, panel, 1, 4, f);
        else if (rows == 2 && n == 2)
            stream_tile(y, stride, x, w, panel, 2, 2, f);
        else if (rows == 2)
            stream_tile(y, stride, x, w, panel, 1, 2, f);
        else if (n == 4)
            stream_tile(y, stride, x, w, panel, 4, 1, f);
        else
            stream_tile(y, stride, x, w, panel, 1, 1, f);
    }
}

static void stream(float *y, int64_t stride, const uint32_t *words, const struct cpu_weight *w, int64_t panel,
                   int panels, int rows)
{
    const float *x = (const float *)(const void *)words;
    switch (w->head.format) {
    case WEIGHT_NVFP4: stream_format(y, stride, x, w, panel, panels, rows, WEIGHT_NVFP4); return;
    case WEIGHT_FP8: stream_format(y, stride, x, w, panel, panels, rows, WEIGHT_FP8); return;
    case WEIGHT_FP8_BLOCK: stream_format(y, stride, x, w, panel, panels, rows, WEIGHT_FP8_BLOCK); return;
    case WEIGHT_BF16: stream_format(y, stride, x, w, panel, panels, rows, WEIGHT_BF16); return;
    default: stream_format(y, stride, x, w, panel, panels, rows, WEIGHT_F32); return;
    }
}

/* Many rows: a decoded panel meets block after block. */

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

/* The sums are used, so that they are made; 12 hide the instruction's latency. */
static double spin_f32(int64_t n)
{
    vec sum[12], all = { 0 };
    const vec half = vset(0.5f);
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) sum[i] = vset((float)i);
    for (int64_t k = 0; k < n; k++)
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) sum[i] = half * sum[i] + half;
    for (int i = 0; i < 12; i++) all += sum[i];
    return vsum(all) > 0 ? 12.0 * VL * 2 * (double)n : 0;
}

static double spin(enum input_form form, int64_t n)
{
    return form == FORM_F32 ? spin_f32(n) : 0;
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

static void layer_norm(float *y, const float *x, const float *gain, const float *bias, int64_t n, float eps)
{
    vec sum = { 0 }, square = { 0 };
    int64_t i = 0, k = n % VL;
    for (; i + VL <= n; i += VL) sum += vload(x + i);
    if (k > 0) sum += vload_part(x + i, k);
    float mean = vsum(sum) / (float)n;
    for (i = 0; i + VL <= n; i += VL) {
        vec d = vload(x + i) - mean;
        square = d * d + square;
    }
    float rest = 0;
    for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    float r = 1 / sqrtf((vsum(square) + rest) / (float)n + eps);
    for (i = 0; i + VL <= n; i += VL)
        vstore(y + i, (vload(x + i) - mean) * r * vload(gain + i) + vload(bias + i));
    for (; i < n; i++) y[i] = (x[i] - mean) * r * gain[i] + bias[i];
}

/* 1 + tanh(u) = 2 sigmoid(2u) */
INLINE vec vgelu_tanh(vec x)
{
    return x * vsigmoid(0x1.988454p0f * (x + 0.044715f * x * x * x));
}

static void gelu_tanh(float *x, int64_t n)
{
    int64_t i = 0, k = n % VL;
    for (; i + VL <= n; i += VL) vstore(x + i, vgelu_tanh(vload(x + i)));
    if (k > 0) vstore_part(x + i, vgelu_tanh(vload_part(x + i, k)), k);
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
