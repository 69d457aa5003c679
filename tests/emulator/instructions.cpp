/* What a warp, or four, do together. */
#include "machine.h"

namespace emulator {

template <class T> static T &of(void **operands, int lane)
{
    return *(T *)operands[lane];
}

void nothing(void **, uint32_t) {}

void shuffle(void **o, uint32_t who)
{
    for (int i = 0; i < 32; i++) {
        if (!(who >> i & 1)) continue;
        shuffle_operands &x = of<shuffle_operands>(o, i);
        if (!(who >> x.from & 1)) fault("lane %d takes from lane %d, which is not there", i, x.from);
        x.result = of<shuffle_operands>(o, x.from).value;
    }
}

template <class F> static void reduce(void **o, uint32_t who, F &&add)
{
    int64_t sum = 0;
    bool any = false;
    for (int i = 0; i < 32; i++)
        if (who >> i & 1) {
            int64_t x = of<reduce_operands>(o, i).value;
            sum = any ? add(sum, x) : x;
            any = true;
        }
    for (int i = 0; i < 32; i++)
        if (who >> i & 1) of<reduce_operands>(o, i).result = (uint32_t)sum;
}

void reduce_max(void **o, uint32_t who)
{
    reduce(o, who, [](int64_t x, int64_t y) { return x > y ? x : y; });
}

void reduce_min(void **o, uint32_t who)
{
    reduce(o, who, [](int64_t x, int64_t y) { return x < y ? x : y; });
}

void reduce_add(void **o, uint32_t who)
{
    reduce(o, who, [](int64_t x, int64_t y) { return x + y; });
}

void vote(void **o, uint32_t who)
{
    uint32_t votes = 0;
    for (int i = 0; i < 32; i++)
        if (who >> i & 1 && of<reduce_operands>(o, i).value) votes |= 1u << i;
    for (int i = 0; i < 32; i++)
        if (who >> i & 1) of<reduce_operands>(o, i).result = votes;
}

static void whole_warp(uint32_t who)
{
    if (who != 0xffffffffu) fault("an instruction of whole warps, and of this one there are lanes 0x%x", who);
}

/* A row r of a matrix of 8 x 8 is the 16 bytes at the address that lane r gives. */
void load_matrices(void **o, uint32_t who)
{
    whole_warp(who);
    int n = of<matrices_operands>(o, 0).n;
    for (int i = 0; i < n; i++) {
        uint16_t x[8][8];
        for (int r = 0; r < 8; r++) memcpy(x[r], shared_bytes(of<matrices_operands>(o, 8 * i + r).at, 16, "ldmatrix"), 16);
        for (int lane = 0; lane < 32; lane++) {
            matrices_operands &to = of<matrices_operands>(o, lane);
            int g = lane / 4, t = lane % 4 * 2;
            to.to[i] = to.turned ? x[t][g] | (uint32_t)x[t + 1][g] << 16 : x[g][t] | (uint32_t)x[g][t + 1] << 16;
        }
    }
}

void turn_matrix(void **o, uint32_t who)
{
    whole_warp(who);
    uint16_t x[8][8];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 2; i++) x[lane / 4][lane % 4 * 2 + i] = (uint16_t)(of<shuffle_operands>(o, lane).value >> 16 * i);
    for (int lane = 0; lane < 32; lane++)
        of<shuffle_operands>(o, lane).result =
            x[lane % 4 * 2][lane / 4] | (uint64_t)x[lane % 4 * 2 + 1][lane / 4] << 16;
}

static float low(uint32_t pair)
{
    return __builtin_bit_cast(float, pair << 16);
}

static float high(uint32_t pair)
{
    return __builtin_bit_cast(float, pair & 0xffff0000u);
}

/* 16 rows of `a` as registers of a warp's lanes have them. */
static void rows_of(float (*to)[16], const uint32_t *a, int lane)
{
    int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
        float *at = &to[g + i % 2 * 8][t + i / 2 * 8];
        at[0] = low(a[i]);
        at[1] = high(a[i]);
    }
}

/* d [8] += a [16] times b [16][8]: products are exact, so are sums of 16 nearly; then one rounding. */
static void multiply(float *d, const float *a, const double (*b)[8])
{
    double sum[8] = {};
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) sum[n] += (double)a[k] * b[k][n];
    for (int n = 0; n < 8; n++) d[n] = (float)((double)d[n] + sum[n]);
}

void mma(void **o, uint32_t who)
{
    whole_warp(who);
    float a[16][16], d[16][8];
    double b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const mma_operands &x = of<mma_operands>(o, lane);
        int g = lane / 4, t = lane % 4 * 2;
        rows_of(a, x.a, lane);
        for (int i = 0; i < 2; i++) {
            b[t + 8 * i][g] = low(x.b[i]);
            b[t + 8 * i + 1][g] = high(x.b[i]);
        }
        for (int i = 0; i < 4; i++) d[g + i / 2 * 8][t + i % 2] = x.d[i];
    }
    for (int r = 0; r < 16; r++) multiply(d[r], a[r], b);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            of<mma_operands>(o, lane).d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void mma_bytes(void **o, uint32_t who)
{
    whole_warp(who);
    int8_t a[16][32], b[8][32];
    for (int lane = 0; lane < 32; lane++) {
        const mma_bytes_operands &x = of<mma_bytes_operands>(o, lane);
        for (int i = 0; i < 4; i++) memcpy(&a[lane / 4 + i % 2 * 8][lane % 4 * 4 + i / 2 * 16], &x.a[i], 4);
        for (int i = 0; i < 2; i++) memcpy(&b[lane / 4][lane % 4 * 4 + i * 16], &x.b[i], 4);
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 32; k++)
                of<mma_bytes_operands>(o, lane).d[i] += a[lane / 4 + i / 2 * 8][k] * b[lane % 4 * 2 + i % 2][k];
}

/* A matrix in shared memory as its descriptor says: 128-byte swizzle. Number (row, k) of rows of 64, of which an instruction
 * takes 16 numbers; turned: k is the row, of panels of 64 columns. */
struct described {
    uint32_t at, leading, stride;

    explicit described(uint64_t x)
        : at((uint32_t)(x & 0x3fff) << 4), leading((uint32_t)(x >> 16 & 0x3fff) << 4), stride((uint32_t)(x >> 32 & 0x3fff) << 4)
    {
        if (x >> 62 != 1) fault("a wide matrix without the 128-byte swizzle");
    }

    float number(int row, int k, bool turned) const
    {
        uint32_t p = turned ? at + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                            : at + row / 8 * stride + row % 8 * 128 + k * 2;
        p ^= (p >> 7 & 7) << 4;
        return low(*(const uint16_t *)shared_bytes(p, 2, "wgmma"));
    }
};

void wide_mma(void **o, uint32_t)
{
    const wide_operands &x = of<wide_operands>(o, 0);
    static float a[64][16], d[64][256];
    static double b[32][16][8];
    int n = x.n;
    described of_b(x.b_matrix);
    for (int r = 0; r < n; r++)
        for (int k = 0; k < 16; k++) b[r / 8][k][r % 8] = of_b.number(r, k, x.b_turned);
    if (!x.a) {
        described of_a(x.a_matrix);
        for (int r = 0; r < 64; r++)
            for (int k = 0; k < 16; k++) a[r][k] = of_a.number(r, k, false);
    }
    for (int t = 0; t < 128; t++) {
        const wide_operands &y = of<wide_operands>(o, t);
        int lane = t % 32, row = t / 32 * 16 + lane / 4;
        if (y.n != n || y.b_matrix != x.b_matrix || y.a_matrix != x.a_matrix) fault("four warps with operands that differ");
        if (x.a) rows_of(a + t / 32 * 16, y.a, lane);
        for (int i = 0; i < n / 2; i++)
            d[row + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = x.add ? y.d[i] : 0;
    }
    for (int r = 0; r < 64; r++)
        for (int c = 0; c < n / 8; c++) multiply(&d[r][c * 8], a[r], b[c]);
    for (int t = 0; t < 128; t++) {
        int lane = t % 32, row = t / 32 * 16 + lane / 4;
        float *to = of<wide_operands>(o, t).d;
        for (int i = 0; i < n / 2; i++) to[i] = d[row + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
    }
}

} /* namespace emulator */
