/* The kernels for AVX-512 as in kernels_avx512bf16.c, with products of many rows by AMX tiles of 16 x 64
 * bytes: of inputs 16 rows, of weights the lines of a panel, which have the order that the instructions want.
 */
#include "backend/cpu/kernels_packed.h"
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LINES = 16, SLICE_LINES = 256, SLICE_GROUPS = 32 }; /* of a tile; decoded at a time: 16 and 10 KiB */

/* gcc's tile loads do not say that they read memory. */
#define MEMORY_IS_WRITTEN() __asm__ volatile("" ::: "memory")

bool cpu_amx_request(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    const unsigned all = 1u << 22 | 1u << 24 | 1u << 25; /* BF16, tiles, int8 */
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* Tiles 0 to 3: sums of `rows` rows. 4: inputs, `bytes` of each row. 5: weights. 6, 7: the same of the last
 * `tail` lines; 0: there are none. */
static void configure(int rows, int bytes, int tail)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } c = { .palette = 1 };
    for (int i = 0; i < 4; i++) c.rows[i] = (uint8_t)rows, c.row_bytes[i] = 64;
    c.rows[4] = (uint8_t)rows;
    c.row_bytes[4] = (uint16_t)bytes;
    c.rows[5] = (uint8_t)(bytes / 4);
    c.row_bytes[5] = 64;
    if (tail > 0) {
        c.rows[6] = (uint8_t)rows;
        c.row_bytes[6] = (uint16_t)(4 * tail);
        c.rows[7] = (uint8_t)tail;
        c.row_bytes[7] = 64;
    }
    MEMORY_IS_WRITTEN();
    _tile_loadconfig(&c);
}

/* y += x . `n` lines of weights, for `blocks` <= 4 blocks of 16 rows, or one of fewer. */
static void add_lines(float *y, const uint32_t *x, int64_t words, const uint8_t *lines, int64_t n, int blocks)
{
    const int64_t stride = 4 * words, block = 16 * words;
    MEMORY_IS_WRITTEN();
#define EACH_BLOCK(DO)                                                                                       \
    DO(0) if (blocks > 1)                                                                                    \
    {                                                                                                        \
        DO(1)                                                                                                \
    }                                                                                                        \
    if (blocks > 2) {                                                                                        \
        DO(2)                                                                                                \
    }                                                                                                        \
    if (blocks > 3) {                                                                                        \
        DO(3)                                                                                                \
    }
#define LOAD_SUMS(i)  _tile_loadd(i, y + (i)*256, 64);
#define STORE_SUMS(i) _tile_stored(i, y + (i)*256, 64);
#define MULTIPLY(i)                                                                                          \
    _tile_loadd(4, x + (i)*block, stride);                                                                   \
    _tile_dpbf16ps(i, 4, 5);
#define MULTIPLY_TAIL(i)                                                                                     \
    _tile_loadd(6, x + (i)*block, stride);                                                                   \
    _tile_dpbf16ps(i, 6, 7);
    EACH_BLOCK(LOAD_SUMS)
    for (; n >= LINES; n -= LINES, lines += 64 * LINES, x += LINES) {
        _tile_loadd(5, lines, 64);
        EACH_BLOCK(MULTIPLY)
    }
    if (n > 0) {
        _tile_loadd(7, lines, 64);
        EACH_BLOCK(MULTIPLY_TAIL)
    }
    EACH_BLOCK(STORE_SUMS)
    MEMORY_IS_WRITTEN();
}

/* Lines [first, first + n) of a panel as BF16 pairs: as they are stored, or made of FP8 in `space`. */
static const uint8_t *bf16_lines(uint8_t *space, const struct cpu_weight *w, int64_t panel, int64_t first,
                                 int64_t n)
{
    const uint8_t *in = w->data + panel * w->panel_bytes;
    if (w->head.format == WEIGHT_BF16) return in + 64 * first;
    for (int64_t i = 0; i < n; i += 2) {
        struct fp8_pairs pairs = fp8_pairs(in + 32 * (first + i));
        _mm512_store_si512(space + 64 * i, pairs.even);
        _mm512_store_si512(space + 64 * i + 64, pairs.odd);
    }
    return space;
}

static void wide_bf16(float *y, const uint32_t *x, int64_t words, const struct cpu_weight *w, int64_t panel,
                      int64_t rows)
{
    _Alignas(64) uint8_t space[64 * SLICE_LINES];
    int64_t n_lines = w->panel_bytes / (w->head.format == WEIGHT_BF16 ? 64 : 32), whole = rows / 16 * 16;
    memset(y, 0, (size_t)rows * PANEL * sizeof *y);
    for (int64_t begin = 0, end; begin < rows; begin = end) {
        end = begin < whole ? whole : rows;
        configure(begin < whole ? 16 : (int)(rows - whole), 64, (int)(n_lines % LINES));
        for (int64_t first = 0; first < n_lines; first += SLICE_LINES) {
            int64_t n = n_lines - first < SLICE_LINES ? n_lines - first : SLICE_LINES;
            const uint8_t *lines = bf16_lines(space, w, panel, first, n);
            for (int64_t r = begin; r < end; r += 64)
                add_lines(y + r * PANEL, x + r * words + first, words, lines, n,
                          end - r >= 64 ? 4 : (int)((end - r + 15) / 16));
        }
    }
    _tile_release();
}

/* NVFP4 times int8. */

struct int8_slice {
    _Alignas(64) int8_t value[SLICE_GROUPS][256]; /* twice the E2M1 values, four lines a group */
    _Alignas(64) float scale[SLICE_GROUPS][PANEL];
};

static void decode_slice(struct int8_slice *s, const struct cpu_weight *w, int64_t panel, int64_t first,
                         int64_t n)
{
    const __m512i twelve = _mm512_set1_epi8(12);
    const uint8_t *in = w->data + panel * w->panel_bytes + first * 128;
    const uint8_t *scales = w->groups + panel * w->head.cols + first * PANEL;
    for (int64_t g = 0; g < n; g++) {
        struct nvfp4_group group = nvfp4_group(in + g * 128, scales + g * PANEL);
        for (int i = 0; i < 4; i++)
            _mm512_store_si512(s->value[g] + 64 * i, _mm512_sub_epi8(group.value[i], twelve));
        _mm512_store_ps(s->scale[g], group.scale);
    }
}

/* Sums of two groups times their scales and the inputs', with the roundings of tile_int8; second is NULL for
 * a lone group. */
INLINE void add_groups(float *y, const uint32_t *x, int64_t words, const int32_t *first,
                       const int32_t *second, const float *scale, int64_t rows)
{
    for (int64_t r = 0; r < rows; r++) {
        __m512 sum =
            _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(first + 16 * r)), _mm512_load_ps(scale));
        if (second)
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(second + 16 * r)),
                                  _mm512_load_ps(scale + PANEL), sum);
        __m512 input = _mm512_castsi512_ps(_mm512_set1_epi32((int)x[r * words + 4]));
        _mm512_storeu_ps(y + r * PANEL, _mm512_fmadd_ps(sum, input, _mm512_loadu_ps(y + r * PANEL)));
    }
}

/* y += x . a slice of n groups, for at most 16 rows. Two pairs of groups are on their way at a time. */
static void add_slice(float *y, const uint32_t *x, int64_t words, const struct int8_slice *s, int64_t n,
                      int64_t rows)
{
    _Alignas(64) int32_t sums[4][256];
    const int64_t stride = 4 * words;
#define GROUP(i)                                                                                             \
    if (g + (i) < n) {                                                                                       \
        _tile_zero(i);                                                                                       \
        _tile_loadd(4, x + (g + (i)) * INT8_WORDS, stride);                                                  \
        _tile_loadd(5, s->value[g + (i)], 64);                                                               \
        _tile_dpbssd(i, 4, 5);                                                                               \
        _tile_stored(i, sums[i], 64);                                                                        \
    }
    for (int64_t g = 0; g < n; g += 4) {
        MEMORY_IS_WRITTEN();
        GROUP(0)
        GROUP(1)
        GROUP(2)
        GROUP(3)
        MEMORY_IS_WRITTEN();
        for (int64_t i = g; i < n && i < g + 4; i += 2)
            add_groups(y, x + i * INT8_WORDS, words, sums[i - g], i + 1 < n ? sums[i - g + 1] : NULL,
                       s->scale[i], rows);
    }
}

static void wide_int8(float *y, const uint32_t *x, int64_t words, const struct cpu_weight *w, int64_t panel,
                      int64_t rows)
{
    struct int8_slice s;
    int64_t groups = w->head.cols / 16, whole = rows / 16 * 16;
    memset(y, 0, (size_t)rows * PANEL * sizeof *y);
    for (int64_t begin = 0, end; begin < rows; begin = end) {
        end = begin < whole ? whole : rows;
        configure(begin < whole ? 16 : (int)(rows - whole), 16, 0);
        for (int64_t first = 0; first < groups; first += SLICE_GROUPS) {
            int64_t n = groups - first < SLICE_GROUPS ? groups - first : SLICE_GROUPS;
            decode_slice(&s, w, panel, first, n);
            for (int64_t r = begin; r < end; r += 16)
                add_slice(y + r * PANEL, x + r * words + first * INT8_WORDS, words, &s, n,
                          end - r < 16 ? end - r : 16);
        }
    }
    _tile_release();
}

CPU_KERNELS(amx, 16, .dot_bf16 = dot_bf16, .dot_int8 = dot_int8, .wide_bf16 = wide_bf16,
            .wide_int8 = wide_int8);
