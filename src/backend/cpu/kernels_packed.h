/* Kernels of one ISA, third part: products of codes with inputs rounded to BF16 or int8, for AVX-512 with
 * VNNI, BF16 and VBMI. Included by kernels_*.c only, which say before how weights are read when rows are few:
 * {BF16,FP8}_ALONE panels side by side for one row, _FEW for 2 to 4, and _AHEAD bytes asked for in advance.
 */
#ifndef BACKEND_CPU_KERNELS_PACKED_H
#define BACKEND_CPU_KERNELS_PACKED_H
#include "backend/cpu/kernels_sequence.h"
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

/* Accumulators of `rows` rows by `panels` panels: at most 16 of the 32 registers. */

INLINE void keep_sums(float *y, int64_t stride, __m512 sum[4][16], const int panels, const int rows)
{
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) _mm512_storeu_ps(y + p * stride + r * PANEL, sum[p][r]);
}

INLINE void no_sums(__m512 sum[4][16], const int panels, const int rows)
{
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++)
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) sum[p][r] = _mm512_setzero_ps();
}

/* One word of inputs a row, two columns, against the pairs of each panel. */
INLINE void add_pair(__m512 sum[4][16], const __m512i pair[4], const uint32_t *x, const int panels,
                     const int rows)
{
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        __m512bh in = (__m512bh)_mm512_set1_epi32((int)x[r]);
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) sum[p][r] = _mm512_dpbf16_ps(sum[p][r], (__m512bh)pair[p], in);
    }
}

/* Asks for lines of weights before the hardware does: `ahead` bytes on, 0 for cores that lose by it. Past the
 * end of its panel a stream goes on in the next panel that it will read. */
INLINE void fetch_ahead(const uint8_t *in, int64_t at, const int ahead, const int panels, int64_t panel_bytes)
{
    int64_t skip = at + ahead < panel_bytes ? 0 : (panels - 1) * panel_bytes;
#pragma GCC unroll 4
    for (int p = 0; ahead > 0 && p < panels; p++)
        _mm_prefetch((const char *)in + p * panel_bytes + at + ahead + skip, _MM_HINT_T0);
}

INLINE void tile_bf16(float *y, int64_t stride, const uint32_t *x, const struct cpu_weight *w, int64_t panel,
                      const int panels, const int rows)
{
    const uint8_t *in = w->data + panel * w->panel_bytes;
    __m512 sum[4][16];
    __m512i pair[4];
    no_sums(sum, panels, rows);
    for (int64_t at = 0; at < w->panel_bytes; at += 64, x += rows) {
        fetch_ahead(in, at, BF16_AHEAD, panels, w->panel_bytes);
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) pair[p] = _mm512_loadu_si512(in + p * w->panel_bytes + at);
        add_pair(sum, pair, x, panels, rows);
    }
    keep_sums(y, stride, sum, panels, rows);
}

/* The two bytes of the BF16 that each magnitude is. */
struct e4m3_bytes {
    uint8_t low[128], high[128];
};
#define NORMAL(i) (0x3c00 + ((i) << 4))
#define LOW8(i)                                                                                              \
    NORMAL(i) & 0xff, NORMAL(i + 1) & 0xff, NORMAL(i + 2) & 0xff, NORMAL(i + 3) & 0xff,                      \
        NORMAL(i + 4) & 0xff, NORMAL(i + 5) & 0xff, NORMAL(i + 6) & 0xff, NORMAL(i + 7) & 0xff
#define HIGH8(i)                                                                                             \
    NORMAL(i) >> 8, NORMAL(i + 1) >> 8, NORMAL(i + 2) >> 8, NORMAL(i + 3) >> 8, NORMAL(i + 4) >> 8,          \
        NORMAL(i + 5) >> 8, NORMAL(i + 6) >> 8, NORMAL(i + 7) >> 8
/* The first eight are multiples of 2^-9: 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60. */
static const struct e4m3_bytes E4M3_BYTES = {
    { 0x00,     0x00,     0x80,     0xc0,     0x00,      0x20,      0x40,     0x60,
      LOW8(8),  LOW8(16), LOW8(24), LOW8(32), LOW8(40),  LOW8(48),  LOW8(56), LOW8(64),
      LOW8(72), LOW8(80), LOW8(88), LOW8(96), LOW8(104), LOW8(112), LOW8(120) },
    { 0x00,      0x3b,      0x3b,      0x3b,      0x3c,       0x3c,       0x3c,      0x3c,
      HIGH8(8),  HIGH8(16), HIGH8(24), HIGH8(32), HIGH8(40),  HIGH8(48),  HIGH8(56), HIGH8(64),
      HIGH8(72), HIGH8(80), HIGH8(88), HIGH8(96), HIGH8(104), HIGH8(112), HIGH8(120) },
};

struct fp8_pairs {
    __m512i even, odd; /* columns 0 and 1, 2 and 3 of the 16 rows */
};

INLINE struct fp8_pairs fp8_pairs(const uint8_t *in)
{
    const __m512i low0 = _mm512_loadu_si512(E4M3_BYTES.low), low1 = _mm512_loadu_si512(E4M3_BYTES.low + 64);
    const __m512i high0 = _mm512_loadu_si512(E4M3_BYTES.high),
                  high1 = _mm512_loadu_si512(E4M3_BYTES.high + 64);
    __m512i code = _mm512_loadu_si512(in);
    __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, code, high1);
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8((char)0x80), 0xf8); /* | the code's sign */
    return (struct fp8_pairs){ _mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high) };
}

INLINE void tile_fp8(float *y, int64_t stride, const uint32_t *x, const struct cpu_weight *w, int64_t panel,
                     const int panels, const int rows)
{
    const uint8_t *in = w->data + panel * w->panel_bytes;
    __m512 sum[4][16];
    __m512i even[4], odd[4];
    no_sums(sum, panels, rows);
    for (int64_t at = 0; at < w->panel_bytes; at += 64, x += 2 * rows) {
        fetch_ahead(in, at, FP8_AHEAD, panels, w->panel_bytes);
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            struct fp8_pairs pairs = fp8_pairs(in + p * w->panel_bytes + at);
            even[p] = pairs.even;
            odd[p] = pairs.odd;
        }
        add_pair(sum, even, x, panels, rows);
        add_pair(sum, odd, x + rows, panels, rows);
    }
    keep_sums(y, stride, sum, panels, rows);
}

/* 16 columns of a panel: E2M1 codes become 2 * value + 12, unsigned, in the inputs' order of columns. Their
 * E4M3 scales, moved into the fields of f16, are the value / 2^8. */
struct nvfp4_group {
    __m512i value[4];
    __m512 scale;
};

INLINE struct nvfp4_group nvfp4_group(const uint8_t *codes, const uint8_t *scales)
{
    const __m512i low4 = _mm512_set1_epi8(15);
    const __m512i value =
        _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    __m512i a = _mm512_loadu_si512(codes), b = _mm512_loadu_si512(codes + 64);
    __m256i half = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)scales));
    return (
        struct nvfp4_group){ { _mm512_shuffle_epi8(value, _mm512_and_si512(a, low4)),
                               _mm512_shuffle_epi8(value, _mm512_and_si512(_mm512_srli_epi16(a, 4), low4)),
                               _mm512_shuffle_epi8(value, _mm512_and_si512(b, low4)),
                               _mm512_shuffle_epi8(value, _mm512_and_si512(_mm512_srli_epi16(b, 4), low4)) },
                             _mm512_cvtph_ps(_mm256_slli_epi16(half, 7)) };
}

/* The group, one of a record's two, times row r of a block; a word of the record takes the twelves back.
 * Exact. */
INLINE __m512 group_sum(const struct nvfp4_group *g, const uint32_t *x, const int half, const int r,
                        const int rows)
{
    __m512i dot = _mm512_set1_epi32((int)x[(INT8_LESS + half) * rows + r]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        dot = _mm512_dpbusd_epi32(dot, g->value[i], _mm512_set1_epi32((int)x[(2 * i + half) * rows + r]));
    return _mm512_cvtepi32_ps(dot);
}

/* Two groups share the inputs' scale. The first one's sum times its E4M3 scale is exact; the two
 * multiply-adds round. */
INLINE void tile_int8(float *y, int64_t stride, const uint32_t *x, const struct cpu_weight *w, int64_t panel,
                      const int rows)
{
    const uint8_t *in = w->data + panel * w->panel_bytes, *end = in + w->panel_bytes;
    const uint8_t *scales = w->groups + panel * w->head.cols;
    __m512 sum[4][16];
    no_sums(sum, 1, rows);
    for (; end - in >= 256; in += 256, scales += 2 * PANEL, x += INT8_WORDS * rows) {
        /* past the page: the hardware's prefetch stops there, and a panel's codes are two streams */
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) _mm_prefetch((const char *)in + 4096 + 64 * i, _MM_HINT_T0);
        _mm_prefetch((const char *)scales + 512, _MM_HINT_T0);
        struct nvfp4_group a = nvfp4_group(in, scales), b = nvfp4_group(in + 128, scales + PANEL);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            __m512 both = _mm512_mul_ps(group_sum(&a, x, 0, r, rows), a.scale);
            both = _mm512_fmadd_ps(group_sum(&b, x, 1, r, rows), b.scale, both);
            __m512 input = _mm512_castsi512_ps(_mm512_set1_epi32((int)x[INT8_SCALE * rows + r]));
            sum[0][r] = _mm512_fmadd_ps(both, input, sum[0][r]);
        }
    }
    if (in < end) {
        struct nvfp4_group a = nvfp4_group(in, scales);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            __m512 input = _mm512_castsi512_ps(_mm512_set1_epi32((int)x[INT8_SCALE * rows + r]));
            sum[0][r] =
                _mm512_fmadd_ps(_mm512_mul_ps(group_sum(&a, x, 0, r, rows), a.scale), input, sum[0][r]);
        }
    }
    keep_sums(y, stride, sum, 1, rows);
}

static double spin_packed(enum input_form form, int64_t n)
{
    enum { SUMS = 16 };
    const __m512i ones = _mm512_set1_epi16(form == FORM_BF16 ? 0x3f80 : 0x0101); /* 1.0 or bytes of 1 */
    __m512i sum[SUMS], all = _mm512_setzero_si512();
    if (form == FORM_F32) return spin(form, n);
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_epi32(i);
    for (int64_t k = 0; k < n && form == FORM_INT8; k++)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], ones, ones);
    for (int64_t k = 0; k < n && form == FORM_BF16; k++)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++)
            sum[i] = (__m512i)_mm512_dpbf16_ps((__m512)sum[i], (__m512bh)ones, (__m512bh)ones);
    for (int i = 0; i < SUMS; i++) all = _mm512_or_si512(all, sum[i]);
    return _mm512_test_epi32_mask(all, all) ? SUMS * 16.0 * (form == FORM_INT8 ? 8 : 4) * (double)n : 0;
}

typedef void tile_function(float *, int64_t, const uint32_t *, const struct cpu_weight *, int64_t);
#define TILE(kind, panels, rows)                                                                             \
    static void kind##_##panels##_##rows(float *y, int64_t stride, const uint32_t *x,                        \
                                         const struct cpu_weight *w, int64_t panel)                          \
    {                                                                                                        \
        tile_##kind(y, stride, x, w, panel, panels, rows);                                                   \
    }
#define FEW_TILE(kind, streams, rows)                                                                        \
    static void kind##_few_##rows(float *y, int64_t stride, const uint32_t *x, const struct cpu_weight *w,   \
                                  int64_t panel)                                                             \
    {                                                                                                        \
        tile_##kind(y, stride, x, w, panel, streams, rows);                                                  \
    }
#define EVERY_TILE(kind, alone, few)                                                                         \
    FEW_TILE(kind, alone, 1)                                                                                 \
    FEW_TILE(kind, few, 2)                                                                                   \
    FEW_TILE(kind, few, 3)                                                                                   \
    FEW_TILE(kind, few, 4)                                                                                   \
    TILE(kind, 2, 5)                                                                                         \
    TILE(kind, 2, 6)                                                                                         \
    TILE(kind, 2, 7)                                                                                         \
    TILE(kind, 1, 1)                                                                                         \
    TILE(kind, 1, 2)                                                                                         \
    TILE(kind, 1, 3)                                                                                         \
    TILE(kind, 1, 4)                                                                                         \
    TILE(kind, 1, 5)                                                                                         \
    TILE(kind, 1, 6)                                                                                         \
    TILE(kind, 1, 7)                                                                                         \
    TILE(kind, 1, 8)                                                                                         \
    TILE(kind, 1, 9)                                                                                         \
    TILE(kind, 1, 10)                                                                                        \
    TILE(kind, 1, 11)                                                                                        \
    TILE(kind, 1, 12)                                                                                        \
    TILE(kind, 1, 13)                                                                                        \
    TILE(kind, 1, 14)                                                                                        \
    TILE(kind, 1, 15)                                                                                        \
    TILE(kind, 1, 16)
EVERY_TILE(bf16, BF16_ALONE, BF16_FEW)
EVERY_TILE(fp8, FP8_ALONE, FP8_FEW)

/* [rows - 1]: several panels at once, where more than one is asked for, and one. */
struct tiles {
    int panels;
    tile_function *wide, *single;
};
#define EVERY_ROWS(kind, alone, few)                                                                         \
    {                                                                                                        \
        { alone, kind##_few_1, kind##_1_1 }, { few, kind##_few_2, kind##_1_2 },                              \
            { few, kind##_few_3, kind##_1_3 }, { few, kind##_few_4, kind##_1_4 },                            \
            { 2, kind##_2_5, kind##_1_5 }, { 2, kind##_2_6, kind##_1_6 }, { 2, kind##_2_7, kind##_1_7 },     \
            { 1, kind##_1_8, kind##_1_8 }, { 1, kind##_1_9, kind##_1_9 }, { 1, kind##_1_10, kind##_1_10 },   \
            { 1, kind##_1_11, kind##_1_11 }, { 1, kind##_1_12, kind##_1_12 },                                \
            { 1, kind##_1_13, kind##_1_13 }, { 1, kind##_1_14, kind##_1_14 },                                \
            { 1, kind##_1_15, kind##_1_15 },                                                                 \
        {                                                                                                    \
            1, kind##_1_16, kind##_1_16                                                                      \
        }                                                                                                    \
    }
static const struct tiles BF16_TILES[] = EVERY_ROWS(bf16, BF16_ALONE, BF16_FEW),
                          FP8_TILES[] = EVERY_ROWS(fp8, FP8_ALONE, FP8_FEW);

static void dot_bf16(float *y, int64_t stride, const uint32_t *x, const struct cpu_weight *w, int64_t panel,
                     int panels, int rows)
{
    const struct tiles *t = (w->head.format == WEIGHT_BF16 ? BF16_TILES : FP8_TILES) + rows - 1;
    for (int n; panels > 0; panels -= n, panel += n, y += n * stride) {
        n = panels >= t->panels ? t->panels : 1;
        (n > 1 ? t->wide : t->single)(y, stride, x, w, panel);
    }
}

#define INT8_ROWS(n)                                                                                         \
    case n: tile_int8(y, stride, x, w, panel, n); break;
static void dot_int8(float *y, int64_t stride, const uint32_t *x, const struct cpu_weight *w, int64_t panel,
                     int panels, int rows)
{
    for (; panels > 0; panels--, panel++, y += stride) switch (rows) {
            INT8_ROWS(1)
            INT8_ROWS(2)
            INT8_ROWS(3)
            INT8_ROWS(4)
            INT8_ROWS(5)
            INT8_ROWS(6)
            INT8_ROWS(7)
            INT8_ROWS(8)
            INT8_ROWS(9)
            INT8_ROWS(10)
            INT8_ROWS(11)
            INT8_ROWS(12)
            INT8_ROWS(13)
            INT8_ROWS(14)
            INT8_ROWS(15)
            INT8_ROWS(16)
        }
}
#endif
#endif
