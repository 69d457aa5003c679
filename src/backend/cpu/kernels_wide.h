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
                      const struct ahead *next, int n, int64_t rows)
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

/* 32 columns of a panel of a `narrow` weight: a lane holds four codes, made 2 * value + 12 as nvfp4_group
 * does, the first group's and the second's of a row side by side, rows 0 1 4 5 8 9 12 13 in one vector and
 * the others in the next. So the sums of both groups, 16 bits each once packed, meet their scales in one
 * instruction. */
struct nvfp4_pair {
    __m512i value[4][2];
    __m512i scale; /* 64 times the two groups', 16 bits each, lane = row */
};

INLINE struct nvfp4_pair nvfp4_pair(const uint8_t *codes, const uint8_t *scales, const int groups)
{
    const __m512i value = /* by six bits, of which two are the neighbour's */
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    struct nvfp4_pair pair;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        __m512i a = _mm512_loadu_si512(codes + 64 * i);
        __m512i b = groups == 2 ? _mm512_loadu_si512(codes + 128 + 64 * i) : _mm512_setzero_si512();
        __m512i rows[2] = { _mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b) };
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            pair.value[2 * i][k] = _mm512_permutexvar_epi8(rows[k], value);
            pair.value[2 * i + 1][k] = _mm512_permutexvar_epi8(_mm512_srli_epi16(rows[k], 4), value);
        }
    }
    __m256i both = groups == 2
                       ? _mm256_loadu_si256((const __m256i *)(const void *)scales)
                       : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)scales));
    const __m512i order =
        _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                         0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    __m512i code = _mm512_maskz_permutexvar_epi8(0x5555555555555555, order, _mm512_castsi256_si512(both));
    /* (8 + low three bits) << (exponent - 4); a code of 0 is shifted out */
    __m512i by = _mm512_sub_epi16(_mm512_srli_epi16(code, 3), _mm512_set1_epi16(4));
    pair.scale = _mm512_sllv_epi16(
        _mm512_ternarylogic_epi32(code, _mm512_set1_epi16(7), _mm512_set1_epi16(8), 0xea), by);
    return pair;
}

/* Two neighbouring words in every pair of lanes. */
INLINE __m512i everywhere2(const uint32_t *x)
{
    long long words;
    memcpy(&words, x, sizeof words);
    __m512i v = _mm512_set1_epi64(words);
    __asm__("" : "+v"(v));
    return v;
}

/* 32 columns of each panel against every row. The decoded weights fill half of the registers, so that sums
 * are read and written: they are in the first cache. What is added to a sum is exact up to its rounding to
 * f32, as the multiply-adds of tile_int8 have it, 2^14 times as large. */
INLINE void add_pairs(float *y, int64_t stride, const uint32_t *x, int64_t words, const struct nvfp4_pair *g,
                      const int panels, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++, x += words, y += PANEL) {
        __m512i in[4], less = everywhere2(x + INT8_LESS);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) in[i] = everywhere2(x + 2 * i);
        __m512 scale = _mm512_castsi512_ps(everywhere(x + INT8_SCALE));
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
            __m512i dot[2] = { less, less };
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                dot[0] = _mm512_dpbusd_epi32(dot[0], g[p].value[i][0], in[i]);
                dot[1] = _mm512_dpbusd_epi32(dot[1], g[p].value[i][1], in[i]);
            }
            __m512i both = _mm512_madd_epi16(_mm512_packs_epi32(dot[0], dot[1]), g[p].scale);
            float *to = y + p * stride;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), scale, _mm512_loadu_ps(to)));
        }
    }
}

/* The same for any weight, as tile_int8 does it. */
INLINE void add_groups(float *y, int64_t stride, const uint32_t *x, int64_t words,
                       const struct nvfp4_group (*g)[2], const int panels, const int groups, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++, x += words, y += PANEL) {
        __m512 scale = _mm512_set1_ps(*(const float *)(const void *)(x + INT8_SCALE));
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
            __m512 sum = _mm512_mul_ps(group_sum(&g[p][0], x, 0, 0, 1), g[p][0].scale);
            if (groups == 2) sum = _mm512_fmadd_ps(group_sum(&g[p][1], x, 1, 0, 1), g[p][1].scale, sum);
            float *to = y + p * stride;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(to)));
        }
    }
}

/* Asks for the 32 columns at c and their scales. */
#define FETCH(from, c, cache)                                                                                \
    do {                                                                                                     \
        for (int line_ = 0; line_ < 4; line_++)                                                              \
            _mm_prefetch((const char *)(from).codes + 8 * (c) + 64 * line_, cache);                          \
        _mm_prefetch((const char *)(from).scales + (c), cache);                                              \
    } while (0)

/* Weights come from memory while those before them are worked on: a panel ahead into the second cache, some
 * columns ahead from there into the first. Asking memory for the first cache stops at the number of its
 * misses.
 */
INLINE void wide_panels(float *y, int64_t stride, const uint32_t *x, int64_t words,
                        const struct panel *panels, const struct ahead *next, const int n, const bool narrow,
                        int64_t rows)
{
    enum { NEAR = 128 }; /* columns */
    const int64_t cols = panels[0].w->head.cols;
    struct ahead at[2];
#pragma GCC unroll 2
    for (int p = 0; p < n; p++) {
        at[p] = panel_ahead(panels[p].w, panels[p].at, 0);
        __m512 zero = _mm512_setzero_ps();
        __asm__("" : "+v"(zero)); /* else gcc makes it a rep stos, which begins slowly */
        for (int64_t r = 0; r < rows; r++) _mm512_storeu_ps(y + p * stride + r * PANEL, zero);
    }
    for (int64_t c = 0; c < cols; c += 32, x += INT8_WORDS) {
        const bool whole = c + 32 <= cols;
        struct nvfp4_group g[2][2];
        struct nvfp4_pair pair[2];
#pragma GCC unroll 2
        for (int p = 0; p < n && whole; p++) {
            FETCH(next[p], c, _MM_HINT_T1);
            if (c + NEAR < cols) FETCH(at[p], c + NEAR, _MM_HINT_T0);
        }
#pragma GCC unroll 2
        for (int p = 0; p < n; p++) {
            const uint8_t *codes = at[p].codes + 8 * c, *scales = at[p].scales + c;
            if (narrow) {
                pair[p] = whole ? nvfp4_pair(codes, scales, 2) : nvfp4_pair(codes, scales, 1);
            } else {
                g[p][0] = nvfp4_group(codes, scales);
                if (whole) g[p][1] = nvfp4_group(codes + 128, scales + 16);
            }
        }
        if (narrow)
            add_pairs(y, stride, x, words, pair, n, rows);
        else if (whole)
            add_groups(y, stride, x, words, (const struct nvfp4_group(*)[2])g, n, 2, rows);
        else
            add_groups(y, stride, x, words, (const struct nvfp4_group(*)[2])g, n, 1, rows);
    }
#pragma GCC unroll 2
    for (int p = 0; p < n; p++) {
        const __m512 by = _mm512_set1_ps(128 / panels[p].w->global * (narrow ? 0x1p-14f : 1));
        for (float *to = y + p * stride, *end = to + rows * PANEL; to < end; to += PANEL)
            _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), by));
    }
}

/* Rows whose sums fit the first cache beside what else is there. */
static void wide_int8(float *y, int64_t stride, const uint32_t *x, int64_t words, const struct panel *panels,
                      const struct ahead *next, int n, int64_t rows)
{
    enum { ROWS = 64 };
    bool narrow = panels[0].w->narrow && (n == 1 || panels[1].w->narrow);
    for (int64_t r = 0; r < rows; r += ROWS, y += ROWS * PANEL, x += ROWS * words) {
        int64_t here = rows - r < ROWS ? rows - r : ROWS;
        if (narrow && n == 2)
            wide_panels(y, stride, x, words, panels, next, 2, true, here);
        else if (narrow)
            wide_panels(y, stride, x, words, panels, next, 1, true, here);
        else if (n == 2)
            wide_panels(y, stride, x, words, panels, next, 2, false, here);
        else
            wide_panels(y, stride, x, words, panels, next, 1, false, here);
    }
}
#endif
#endif
