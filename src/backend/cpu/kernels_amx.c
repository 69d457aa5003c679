/* The kernels for AVX-512 as in kernels_avx512bf16.c, with products of many rows by AMX tiles of 16 x 64
 * bytes: of inputs 16 rows, of weights the lines of a panel, which have the order that the instructions want.
 */
enum { BF16_ALONE = 1, BF16_FEW = 4, BF16_AHEAD = 2048, FP8_ALONE = 4, FP8_FEW = 4, FP8_AHEAD = 2048 };
#include "backend/cpu/kernels_wide.h"
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LINES = 16, SLICE_LINES = 256 }; /* of a tile; decoded at a time: 16 KiB */

/* gcc's tile loads do not say that they read memory. */
#define MEMORY_IS_WRITTEN() __asm__ volatile("" ::: "memory")

bool cpu_amx_request(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    const unsigned all = 1u << 22 | 1u << 24; /* BF16, tiles */
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Tiles 0 to 3: sums of `rows` rows. 4: their inputs. 5: weights. 6, 7: the same of the last `tail` lines; 0:
 * there are none. */
static void configure(int rows, int tail)
{
    struct tile_config c = { .palette = 1 };
    for (int i = 0; i < 4; i++) c.rows[i] = (uint8_t)rows, c.row_bytes[i] = 64;
    c.rows[4] = (uint8_t)rows;
    c.row_bytes[4] = 64;
    c.rows[5] = LINES;
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

static void tiles_of_panel(float *y, const uint32_t *x, int64_t words, const struct cpu_weight *w,
                           int64_t panel, int64_t rows)
{
    _Alignas(64) uint8_t space[64 * SLICE_LINES];
    int64_t n_lines = w->panel_bytes / (w->head.format == WEIGHT_BF16 ? 64 : 32), whole = rows / 16 * 16;
    memset(y, 0, (size_t)rows * PANEL * sizeof *y);
    for (int64_t begin = 0, end; begin < rows; begin = end) {
        end = begin < whole ? whole : rows;
        configure(begin < whole ? 16 : (int)(rows - whole), (int)(n_lines % LINES));
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

static void wide_tiles(float *y, int64_t stride, const uint32_t *x, int64_t words, const struct panel *panels,
                       const struct ahead *next, int n, int64_t rows)
{
    (void)next;
    for (int p = 0; p < n; p++) tiles_of_panel(y + p * stride, x, words, panels[p].w, panels[p].at, rows);
}

static double spin_amx(enum input_form form, int64_t n)
{
    enum { SUMS = 6 };
    _Alignas(64) float line[256] = { 0 };
    if (form != FORM_BF16) return spin_packed(form, n);
    struct tile_config c = { .palette = 1 };
    for (int i = 0; i < 8; i++) c.rows[i] = LINES, c.row_bytes[i] = 64;
    MEMORY_IS_WRITTEN();
    _tile_loadconfig(&c);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_loadd(6, line, 64);
    _tile_loadd(7, line, 64);
    for (int64_t k = 0; k < n; k++) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
    }
    _tile_release();
    return SUMS * 2.0 * LINES * LINES * 32 * (double)n;
}

CPU_KERNELS(amx, "amx", 16, .spin = spin_amx, .dot_bf16 = dot_bf16, .dot_int8 = dot_int8,
            .wide_bf16 = wide_tiles, .wide_int8 = wide_int8);
