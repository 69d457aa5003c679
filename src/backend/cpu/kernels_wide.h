/* Kernels of one ISA, fourth part: products of the many rows of a prompt, for AVX-512 with VNNI, BF16 and
 * VBMI. Two panels share every word of inputs, which cores read no faster than they multiply. Included by
 * kernels_*.c only. */
#ifndef BACKEND_CPU_KERNELS_WIDE_H
#define BACKEND_CPU_KERNELS_WIDE_H
#include "backend/cpu/kernels_packed.h"
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

/* A word in every lane, in a register: gcc would read it once for each panel. */
INLINE __m512i everywhere(const uint32_t *x)
{
    __m512i v = _mm512_set1_epi32((int)*x);
    __asm__("" : "+v"(v));
    return v;
}

#if !defined(__AMX_BF16__) && !defined(__AMXBF16__) /* gcc's name and older clang's */
/* y += x . lines [first, first + n) of each panel, in pairs of columns. `rows` by two panels are 16 sums. */
INLINE void add_lines_bf16(float *y, int64_t stride, const uint32_t *x, int64_t words,
                           const uint8_t *const *lines, int64_t n, const int panels, const int rows)
{
    __m512 sum[2][8];
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) sum[p][r] = _mm512_loadu_ps(y + p * stride + r * PANEL);
    for (int64_t i = 0; i < n; i++) {
        __m512bh pair[2];
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) pair[p] = (__m512bh)_mm512_loadu_si512(lines[p] + 64 * i);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512bh in = (__m512bh)everywhere(x + r * words + i);
#pragma GCC unroll 2
            for (int p = 0; p < panels; p++) sum[p][r] = _mm512_dpbf16_ps(sum[p][r], pair[p], in);
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) _mm512_storeu_ps(y + p * stride + r * PANEL, sum[p][r]);
}

#define BF16_ROWS(n)                                                                                         \
    case n: add_lines_bf16(y, stride, x, words, lines, n_lines, panels, n); return;
INLINE void add_block_bf16(float *y, int64_t stride, const uint32_t *x, int64_t words,
                           const uint8_t *const *lines, int64_t n_lines, const int panels, int rows)
{
    switch (rows) {
        BF16_ROWS(1)
        BF16_ROWS(2)
        BF16_ROWS(3)
        BF16_ROWS(4)
        BF16_ROWS(5)
        BF16_ROWS(6)
        BF16_ROWS(7)
    default: add_lines_bf16(y, stride, x, words, lines, n_lines, panels, 8); return;
    }
}

static void add_rows_bf16(float *y, int64_t stride, const uint32_t *x, int64_t words,
                          const uint8_t *const *lines, int64_t n_lines, int panels, int64_t rows)
{
    int64_t blocks = (rows + 7) / 8;
    for (int64_t b = 0, r = 0, n; b < blocks; b++, r += n) {
        n = rows / blocks + (b < rows % blocks);
        if (panels == 2)
            add_block_bf16(y + r * PANEL, stride, x + r * words, words, lines, n_lines, 2, (int)n);
        else
            add_block_bf16(y + r * PANEL, stride, x + r * words, words, lines, n_lines, 1, (int)n);
    }
}

/* BF16 lines are used where they are; FP8 becomes BF16 a slice at a time, which stays in the first cache. */
static void wide_bf16(float *y, int64_t stride, const uint32_t *x, int64_t words, const struct panel *panels,
                      const struct panel *next, int n, int64_t rows)
{
    (void)next; /* its streams are long enough for the hardware */
    enum { SLICE = 128 };
    _Alignas(64) uint8_t space[2][64 * SLICE];
    const struct cpu_weight *w = panels[0].w;
    bool is_bf16 = w->head.format == WEIGHT_BF16;
    int64_t n_lines = w->panel_bytes / (is_bf16 ? 64 : 32), slice = is_bf16 ? n_lines : SLICE;
    for (int p = 0; p < n; p++) memset(y + p * stride, 0, (size_t)rows * PANEL * sizeof *y);
    for (int64_t first = 0; first < n_lines; first += slice) {
        int64_t lines_here = n_lines - first < slice ? n_lines - first : slice;
        const uint8_t *lines[2];
        for (int p = 0; p < n; p++) {
            const uint8_t *in = panels[p].w->data + panels[p].at * w->panel_bytes;
            lines[p] = is_bf16 ? in : space[p];
            for (int64_t i = 0; !is_bf16 && i < lines_here; i += 2) {
                struct fp8_pairs pairs = fp8_pairs(in + 32 * (first + i));
                _mm512_store_si512(space[p] + 64 * i, pairs.even);
                _mm512_store_si512(space[p] + 64 * i + 64, pairs.odd);
            }
        }
        add_rows_bf16(y, stride, x + first, words, lines, lines_here, n, rows);
    }
}

#endif

/* One group of 16 columns, or the two that share a scale of the inputs, of each panel against every row. The
 * decoded weights fill most registers, so that sums are read and written: they are in the first cache. */
INLINE void add_groups(float *y, int64_t stride, const uint32_t *x, int64_t words,
                       const struct nvfp4_group (*g)[2], const int panels, const int groups, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++, x += words, y += PANEL) {
        __m512i in[2][4], less[2];
#pragma GCC unroll 2
        for (int k = 0; k < groups; k++) {
            less[k] = everywhere(x + INT8_WORDS * k + 5);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) in[k][i] = everywhere(x + INT8_WORDS * k + i);
        }
        __m512 scale = _mm512_castsi512_ps(everywhere(x + 4));
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
            __m512 part[2];
#pragma GCC unroll 2
            for (int k = 0; k < groups; k++) {
                __m512i dot = less[k];
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) dot = _mm512_dpbusd_epi32(dot, g[p][k].value[i], in[k][i]);
                part[k] = _mm512_cvtepi32_ps(dot);
            }
            __m512 sum = _mm512_mul_ps(part[0], g[p][0].scale);
            if (groups == 2) sum = _mm512_fmadd_ps(part[1], g[p][1].scale, sum);
            float *to = y + p * stride;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(to)));
        }
    }
}

INLINE void find_panel(const uint8_t **codes, const uint8_t **scales, struct panel p)
{
    *codes = p.w->data + p.at * p.w->panel_bytes;
    *scales = p.w->groups + p.at * p.w->head.cols;
}

/* Asks for two groups and their scales. */
INLINE void fetch_groups(const uint8_t *codes, const uint8_t *scales)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm_prefetch((const char *)codes + 64 * i, _MM_HINT_T0);
    _mm_prefetch((const char *)scales, _MM_HINT_T0);
}

INLINE void wide_panels(float *y, int64_t stride, const uint32_t *x, int64_t words,
                        const struct panel *panels, const struct panel *next, const int n, int64_t rows)
{
    enum { AHEAD = 256 }; /* columns */
    const int64_t cols = panels[0].w->head.cols;
    const uint8_t *codes[2], *scales[2], *next_codes[2], *next_scales[2];
    struct nvfp4_group g[2][2];
#pragma GCC unroll 2
    for (int p = 0; p < n; p++) {
        find_panel(&codes[p], &scales[p], panels[p]);
        find_panel(&next_codes[p], &next_scales[p], next[p]);
        memset(y + p * stride, 0, (size_t)rows * PANEL * sizeof *y);
    }
    int64_t c = 0;
    for (; c + 32 <= cols; c += 32, x += 2 * INT8_WORDS) {
        bool here = c + AHEAD < cols;
        int64_t ahead = here ? c + AHEAD : c + AHEAD - cols;
#pragma GCC unroll 2
        for (int p = 0; p < n; p++) {
            fetch_groups((here ? codes : next_codes)[p] + 8 * ahead,
                         (here ? scales : next_scales)[p] + ahead);
            g[p][0] = nvfp4_group(codes[p] + 8 * c, scales[p] + c);
            g[p][1] = nvfp4_group(codes[p] + 8 * c + 128, scales[p] + c + 16);
        }
        add_groups(y, stride, x, words, (const struct nvfp4_group(*)[2])g, n, 2, rows);
    }
    if (c == cols) return;
#pragma GCC unroll 2
    for (int p = 0; p < n; p++) g[p][0] = nvfp4_group(codes[p] + 8 * c, scales[p] + c);
    add_groups(y, stride, x, words, (const struct nvfp4_group(*)[2])g, n, 1, rows);
}

/* Rows whose sums fit the first cache beside what else is there. */
static void wide_int8(float *y, int64_t stride, const uint32_t *x, int64_t words, const struct panel *panels,
                      const struct panel *next, int n, int64_t rows)
{
    enum { ROWS = 64 };
    for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t here = rows - r < ROWS ? rows - r : ROWS;
        if (n == 2)
            wide_panels(y + r * PANEL, stride, x + r * words, words, panels, next, 2, here);
        else
            wide_panels(y + r * PANEL, stride, x + r * words, words, panels, next, 1, here);
    }
}
#endif
#endif
