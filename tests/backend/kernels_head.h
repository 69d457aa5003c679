/* draw_product: the tokens of matmul and draw, from logits that have their bits or are ruled out. */
#ifndef TESTS_KERNELS_HEAD_H
#define TESTS_KERNELS_HEAD_H
#include "backend/kernels_fixture.h"

enum head_kind { HEAD_NORMAL, HEAD_ALIKE, HEAD_ODD, HEAD_WORST, HEAD_KINDS };

/* ALIKE: most rows differ from a few by less than a coarse copy can tell, some by nothing. ODD: magnitudes of
 * many kinds, rows of zeros, numbers that are not finite. */
static void fill_head(uint16_t *w, int64_t rows, int64_t cols, enum head_kind kind)
{
    for (int64_t r = 0; r < rows; r++) {
        int64_t like = kind == HEAD_ALIKE && r > 0 && random_below(8) ? random_below(r < 5 ? r : 5) : -1;
        float scale = kind == HEAD_ODD     ? powf(10, (float)random_below(7) - 5)
                      : kind == HEAD_WORST ? 1e-6f
                                           : 0.1f;
        float noise = random_below(3) ? 0x1p-9f : 0;
        if (kind == HEAD_ODD && random_below(5) == 0) scale = 0;
        for (int64_t c = 0; c < cols; c++) {
            float x = random_normal() * scale;
            if (like >= 0) x = bf16_to_f32((bf16){ w[like * cols + c] }) * (1 + random_normal() * noise);
            if (kind == HEAD_ODD && random_below(500 * cols) == 0) x = random_below(2) ? NAN : -INFINITY;
            w[r * cols + c] = bf16_from_f32(x).bits;
        }
    }
}

/* As far off as a copy in int8 can be, both ways: the input is what rounding leaves of row `best`, which is
 * all that this row is above another whose codes give nearly twice as much more, and which rounding makes as
 * much larger. A step of the codes is 2^-10. */
static void fill_worst(float *x, uint16_t *w, int64_t cols, int64_t best, int64_t other)
{
    float left = 0;
    for (int64_t c = 0; c < cols; c++) {
        float side = random_below(2) ? 1 : -1, code = (float)(1 + random_below(15)),
              off = (float)random_below(4) / 8;
        if (c == 0) side = 1, code = 127, off = 0;
        x[c] = side * off;
        w[best * cols + c] = bf16_from_f32(side * (code + off) * 0x1p-10f).bits;
        w[other * cols + c] = bf16_from_f32(side * (code - off) * 0x1p-10f).bits;
        left += 1.9f * off * off;
    }
    for (int64_t c = 1; c < cols && left > 0; c++) {
        uint16_t *o = &w[other * cols + c];
        left -= fabsf(x[c]);
        if (x[c] != 0 && left > 0)
            *o = bf16_from_f32(bf16_to_f32((bf16){ *o }) + (x[c] > 0 ? 0x1p-10f : -0x1p-10f)).bits;
    }
}

static void fill_hidden(struct mat x, const uint16_t *w, int64_t rows)
{
    for (int64_t i = 0; i < x.rows; i++) {
        float *row = x.data + i * x.stride;
        int64_t like = random_below(rows), kind = random_below(7);
        float scale = powf(10, (float)random_below(5) - 2);
        for (int64_t c = 0; c < x.cols; c++) {
            row[c] = random_normal() * scale;
            if (kind == 1) row[c] += bf16_to_f32((bf16){ w[like * x.cols + c] }) * 30;
            if (kind == 2) row[c] = c == like % x.cols ? 1 : 0;
            if (kind == 3) row[c] = 0;
            if (kind == 4 && c == like % x.cols) row[c] = random_below(2) ? NAN : INFINITY;
            if (kind == 5) row[c] *= c == like % x.cols ? 1e4f : 1;
        }
        for (int64_t c = 0; bf16_inputs && c < x.cols; c++) row[c] = bf16_round(row[c]);
    }
}

/* A draw from all logits needs the first `top_k` of them and what equals the last of these. */
static bool is_needed(const float *logits, int64_t n, int64_t i, const struct draw *d,
                      const uint32_t *allowed)
{
    int64_t above = 0;
    if (!draw_allows(allowed, i) || !(logits[i] > -INFINITY)) return false;
    for (int64_t k = 0; k < n; k++) above += draw_allows(allowed, k) && logits[k] > logits[i];
    return above < (d->scale == 0 ? 1 : d->top_k);
}

static void head_case(int64_t n, int64_t rows, int64_t cols, enum head_kind kind)
{
    struct guarded x = guarded(n, cols, 2), logits = guarded(n, rows, 1), y = guarded(n, rows, 3);
    uint16_t *data = malloc((size_t)(rows * cols) * sizeof *data);
    uint32_t *allowed = take((size_t)((rows + 31) / 32) * sizeof *allowed);
    int32_t want[16], got[16];
    struct draw draws[16];
    struct weight *w;
    struct err e = { 0 };
    bool bans = random_below(2), greedy = true, all_greedy = random_below(3) == 0;
    for (int64_t i = 0; i < (rows + 31) / 32; i++) allowed[i] = random_u32() | random_u32();
    fill_head(data, rows, cols, kind);
    fill_hidden(x.m, data, rows);
    for (int64_t i = 0; kind == HEAD_WORST && i < n; i++)
        fill_worst(x.m.data + i * x.m.stride, data, cols, 2 * i + 1, 100 + 13 * i);
    for (int64_t i = 0; i < n; i++) {
        draws[i] = all_greedy || random_below(2) ? (struct draw){ 0 }
                                                 : (struct draw){ .scale = 1.3f, .reach = DRAW_REACH };
        draws[i].top_k = draws[i].scale > 0 ? 1 + (int32_t)random_below(COARSE_TOP_K) : 0;
        greedy = greedy && draws[i].scale == 0;
        draws[i].top_p = random_below(2) ? 0.9f : 0;
        draws[i].uniform = (double)random_u32() * 0x1p-32;
    }
    must(cpu.ops->weight_create(
             cpu.queue, &w,
             &(struct weight_source){ .format = WEIGHT_BF16, .rows = rows, .cols = cols, .data = data }, &e),
         &e);
    cpu.ops->weight_coarsen(cpu.queue, w);
    if (on_device()) assert_true(draws_coarse(w, n, draws) == (cols % 64 == 0 && n <= COARSE_ROWS));
    cpu.ops->matmul(cpu.queue, logits.m, x.m, w);
    cpu.ops->draw(cpu.queue, want, logits.m, bans ? allowed : NULL, draws);
    cpu.ops->draw_product(cpu.queue, got, y.m, x.m, w, bans ? allowed : NULL, draws);
    check_guards(&y, "draw_product");
    int64_t out = 0; /* where all are greedy, y need not be told */
    for (int64_t i = 0; i < n; i++) {
        const float *all = logits.m.data + i * logits.m.stride, *some = y.m.data + i * y.m.stride;
        if (got[i] != want[i])
            fail_msg("draw_product on %s, row %d of %d x %d: %d, of all logits %d", cpu.name, (int)i,
                     (int)rows, (int)cols, got[i], want[i]);
        for (int64_t r = 0; !greedy && r < rows; r++) {
            bool same = memcmp(&all[r], &some[r], sizeof *all) == 0 || (isnan(all[r]) && isnan(some[r]));
            bool ruled_out = some[r] == -INFINITY;
            out += !same;
            if (!same && (!ruled_out || is_needed(all, rows, r, &draws[i], bans ? allowed : NULL)))
                fail_msg("draw_product on %s, row %d of %d x %d: logit %d is %g, of all %g", cpu.name, (int)i,
                         (int)rows, (int)cols, (int)r, (double)some[r], (double)all[r]);
        }
    }
    if (on_device() && kind == HEAD_NORMAL && cols >= 512 && cols % 64 == 0 && n == COARSE_ROWS && !greedy)
        assert_true(out > n * rows / 8); /* else it is of no use */
    cpu.ops->weight_free(cpu.queue, w);
    drop(&x);
    drop(&logits);
    drop(&y);
    give(allowed);
    free(data);
}

static void heads(void)
{
    static const int64_t shapes[][2] = {
        { 1024, 64 }, { 1031, 192 }, { 1048, 512 }, { 1025, 1088 }, { 1024, 100 }
    };
    for (int i = 0; i < 5; i++)
        for (int kind = 0; kind < HEAD_KINDS; kind++) {
            int64_t few = 1 + random_below(4), more = 5 + random_below(4);
            head_case(few, shapes[i][0], shapes[i][1], (enum head_kind)kind);
            if (kind == HEAD_NORMAL)
                head_case(i == 2 ? COARSE_ROWS : more, shapes[i][0], shapes[i][1], HEAD_NORMAL);
        }
    head_case(9, 1024, 64, HEAD_NORMAL);
}

#endif
