/* The factor in place of the moments, and rows packed with it. Every sum has one order, whatever the number
 * of threads. */
#include "quantize/gptq.h"
#include "quantize/search.h"
#include <math.h>
#include <string.h>

double gptq_dot(const float *a, const float *b, int64_t n)
{
    enum { DOT_LANES = 8 };
    double sum[DOT_LANES] = { 0 }, total = 0;
    int64_t k = 0;
    for (; k + DOT_LANES <= n; k += DOT_LANES)
        for (int l = 0; l < DOT_LANES; l++) sum[l] += (double)a[k + l] * (double)b[k + l];
    for (; k < n; k++) sum[0] += (double)a[k] * (double)b[k];
    for (int l = 0; l < DOT_LANES; l++) total += sum[l];
    return total;
}

/* Damped, and divided by its mean, which keeps squares of small inputs clear of subnormals. */
static bool condition(float *h, int64_t n)
{
    double mean = 0;
    for (int64_t i = 0; i < n; i++) mean += (double)h[i * n + i] / (double)n;
    if (!(mean > 0 && isfinite(mean))) return false;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = i; j < n; j++) h[i * n + j] = (float)((double)h[i * n + j] / mean);
        h[i * n + i] += GPTQ_DAMPING;
    }
    return true;
}

/* H = R R^T in the upper triangle, from the last column to the first. */
static bool decompose(float *h, int64_t n)
{
    for (int64_t j = n - 1; j >= 0; j--) {
        float *row = h + j * n;
        double pivot = (double)row[j] - gptq_dot(row + j + 1, row + j + 1, n - 1 - j);
        if (!(pivot > 0 && isfinite(pivot))) return false;
        double root = sqrt(pivot);
        row[j] = (float)root;
        for (int64_t i = 0; i < j; i++)
            h[i * n + j] =
                (float)(((double)h[i * n + j] - gptq_dot(h + i * n + j + 1, row + j + 1, n - 1 - j)) / root);
    }
    return true;
}

bool gptq_factor(float *h, int64_t n)
{
    if (!condition(h, n) || !decompose(h, n)) return false;
    for (int64_t i = 0; i < n; i++) {
        float root = h[i * n + i];
        for (int64_t j = 0; j < i; j++) h[i * n + j] = h[j * n + i] / root;
        h[i * n + i] = root * root;
    }
    return true;
}

/* start[r][k] of a group's columns: the weights and what the errors of all earlier columns ask of them. */
static void start_group(float start[GPTQ_ROWS][NVFP4_GROUP], const float *value, const float *error,
                        const float *factor, int64_t first, int64_t n)
{
    for (int64_t k = 0; k < NVFP4_GROUP; k++) {
        const float *f = factor + (first + k) * n;
        float sum[GPTQ_ROWS];
        memcpy(sum, value + (first + k) * GPTQ_ROWS, sizeof sum);
        for (int64_t j = 0; j < first; j++)
            for (int r = 0; r < GPTQ_ROWS; r++) sum[r] += f[j] * error[j * GPTQ_ROWS + r];
        for (int r = 0; r < GPTQ_ROWS; r++) start[r][k] = sum[r];
    }
}

/* One row's group. Leaves its errors behind for the groups to come. */
static e4m3 pack_group(uint8_t *codes, float *error, const float *x, const float *start, const float *factor,
                       float global, int64_t n)
{
    uint8_t code[NVFP4_GROUP];
    float weight[NVFP4_GROUP], back[NVFP4_GROUP];
    for (int k = 0; k < NVFP4_GROUP; k++) weight[k] = factor[k * n + k];
    struct search_group g = { x, start, weight, factor, n };
    e4m3 scale = search_group(code, &g, global);
    for (int k = 0; k < NVFP4_GROUP; k += 2) codes[k / 2] = (uint8_t)(code[k] | code[k + 1] << 4);
    nvfp4_unpack_row(back, codes, &scale, global, NVFP4_GROUP);
    for (int k = 0; k < NVFP4_GROUP; k++) error[k * GPTQ_ROWS] = x[k] - back[k];
    return scale;
}

void gptq_pack_rows(uint8_t *codes, e4m3 *scale, const float *x, int rows, const float *factor, float global,
                    int64_t n, float *scratch)
{
    float *value = scratch, *error = scratch + n * GPTQ_ROWS, start[GPTQ_ROWS][NVFP4_GROUP];
    memset(scratch, 0, (size_t)(2 * n * GPTQ_ROWS) * sizeof *scratch);
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < n; i++) value[i * GPTQ_ROWS + r] = x[r * n + i];
    for (int64_t i = 0; i < n; i += NVFP4_GROUP) {
        start_group(start, value, error, factor, i, n);
        for (int r = 0; r < rows; r++)
            scale[r * (n / NVFP4_GROUP) + i / NVFP4_GROUP] =
                pack_group(codes + r * (n / 2) + i / 2, error + i * GPTQ_ROWS + r, x + r * n + i, start[r],
                           factor + i * n + i, global, n);
    }
}
