/* Operations on rows: norms, embedding, logits; and what a vision tower needs. */
#ifndef TESTS_KERNELS_ROWS_H
#define TESTS_KERNELS_ROWS_H
#include "backend/kernels_fixture.h"

static void row_case(int64_t n, int64_t cols)
{
    struct guarded x = filled(n, cols, 2, 3), z = filled(n, cols, 1, 8), gain = filled(1, cols, 0, 1),
                   gate = filled(n, 1, 2, 4);
    struct guarded want, got;
    both(&want, &got, n, cols);
    ref.ops->rmsnorm(ref.queue, want.m, x.m, gain.m.data, 1e-6f);
    cpu.ops->rmsnorm(cpu.queue, got.m, x.m, gain.m.data, 1e-6f);
    check_close(&got, &want, 2e-6, 1e-30, "rmsnorm");
    ref.ops->silu_mul(ref.queue, want.m, z.m, x.m);
    cpu.ops->silu_mul(cpu.queue, got.m, z.m, x.m);
    check_close(&got, &want, 1e-6, 1e-30, "silu_mul");
    finish();
    fill(want.m, 1);
    for (int64_t r = 0; r < n; r++)
        memcpy(got.m.data + r * got.m.stride, want.m.data + r * want.m.stride, (size_t)cols * 4);
    ref.ops->add(ref.queue, want.m, x.m);
    cpu.ops->add(cpu.queue, got.m, x.m);
    check_close(&got, &want, 0, 0, "add");
    ref.ops->add_gated(ref.queue, want.m, x.m, gate.m);
    cpu.ops->add_gated(cpu.queue, got.m, x.m, gate.m);
    check_close(&got, &want, 1e-6, 1e-5, "add_gated");
    ref.ops->gated_norm(ref.queue, want.m, x.m, z.m, gain.m.data, (int)cols, 1e-6f);
    cpu.ops->gated_norm(cpu.queue, got.m, x.m, z.m, gain.m.data, (int)cols, 1e-6f);
    check_close(&got, &want, 3e-6, 1e-30, "gated_norm");
    struct guarded lw = copy_of(&z), lg = copy_of(&z), other = filled(n, cols, 1, 8);
    ref.ops->log_softmax(ref.queue, lw.m);
    cpu.ops->log_softmax(cpu.queue, lg.m);
    check_close(&lg, &lw, 1e-6, 4e-6, "log_softmax");
    ref.ops->log_softmax(ref.queue, other.m);
    double kr[64], kc[64];
    ref.ops->divergence(ref.queue, kr, lw.m, other.m);
    cpu.ops->divergence(cpu.queue, kc, lw.m, other.m);
    float pr[64], pc[64];
    int32_t column[64], best[2][64];
    for (int64_t i = 0; i < n; i++) column[i] = (int32_t)random_below(cols);
    ref.ops->pick(ref.queue, pr, x.m, column);
    cpu.ops->pick(cpu.queue, pc, x.m, column);
    ref.ops->argmax(ref.queue, best[0], x.m);
    cpu.ops->argmax(cpu.queue, best[1], x.m);
    finish();
    assert_memory_equal(pr, pc, (size_t)n * 4);
    assert_memory_equal(best[0], best[1], (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) assert_true(fabs(kr[i] - kc[i]) <= 1e-5 * fabs(kr[i]) + 1e-5);
    int64_t index[] = { n - 1, 0, n / 2 };
    struct guarded picked = guarded(3, cols, 1), picked_ref = guarded(3, cols, 1);
    ref.ops->gather(ref.queue, picked_ref.m, x.m, index);
    cpu.ops->gather(cpu.queue, picked.m, x.m, index);
    check_close(&picked, &picked_ref, 0, 0, "gather");
    struct guarded *all[] = { &x, &z, &gain, &gate, &want, &got, &lw, &lg, &other, &picked, &picked_ref };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

static void embed_case(enum weight_format f)
{
    struct made w = make_weight(f, 50, 37, INPUT_AS_IS);
    struct weight_source table = w.src;
    table.is_table = true;
    struct weight *tr, *tc;
    struct err e = { 0 };
    must(ref.ops->weight_create(ref.queue, &tr, &table, &e), &e);
    must(cpu.ops->weight_create(cpu.queue, &tc, &table, &e), &e);
    float own[37];
    for (int i = 0; i < 37; i++) own[i] = (float)i;
    struct row rows[] = { { .token = 49 }, { .token = 0 }, { .embedding = own }, { .token = 7 } };
    struct step_rows s = { .rows = rows, .n = 4 };
    struct guarded want, got;
    both(&want, &got, 4, 37);
    ref.ops->embed(ref.queue, want.m, tr, &s);
    cpu.ops->embed(cpu.queue, got.m, tc, &s);
    check_close(&got, &want, 0, 0, "embed");
    assert_true(got.m.data[2 * got.m.stride + 5] == 5.0f);
    ref.ops->weight_free(ref.queue, tr);
    cpu.ops->weight_free(cpu.queue, tc);
    drop(&want);
    drop(&got);
    drop_weight(&w);
}

/* Draws: the same token, whatever the row is like. */

/* Close together or far apart, many equal or none, a few that are not numbers, all the same, none at all. */
static void fill_logits(float *x, int64_t n)
{
    static const float odd[] = { NAN, INFINITY, -INFINITY, -0.0f, 0.0f, -NAN };
    float scale = powf(10, (float)random_below(4) - 1), step = random_below(2) ? 0 : scale / 8;
    int64_t kind = random_below(8);
    for (int64_t i = 0; i < n; i++) {
        x[i] = random_normal() * scale;
        if (step > 0) x[i] = roundf(x[i] / step) * step;
        if (kind == 0 && random_below(20) == 0) x[i] = odd[random_below(6)];
        if (kind == 1) x[i] = 3;
        if (kind == 2) x[i] = random_below(2) ? NAN : -INFINITY;
        if (kind == 3 && random_below(3)) x[i] = -INFINITY;
    }
}

static struct draw random_draw(void)
{
    static const float scales[] = { 0, 1, 1.4f, 0.01f, 20, 1e5f };
    static const double uniforms[] = { 0, 0x1.fffffffffffffp-1 };
    struct draw d = { .scale = scales[random_below(6)], .reach = DRAW_REACH };
    if (random_below(3) == 0) d.reach = (float)random_below(4) / 2;
    if (random_below(2)) d.top_k = 1 + (int32_t)random_below(random_below(2) ? 5 : 3000);
    if (random_below(2)) d.top_p = (float)(1 + random_below(1000)) / 1000;
    d.uniform = random_below(5) ? (double)random_u32() * 0x1p-32 : uniforms[random_below(2)];
    return d;
}

static void draw_case(int64_t n, int64_t cols)
{
    struct guarded x = guarded(n, cols, 3);
    struct draw *draws = malloc((size_t)n * sizeof *draws);
    int64_t words = (cols + 31) / 32, n_edits = 0;
    int32_t *want = malloc((size_t)n * sizeof *want), *got = malloc((size_t)n * sizeof *got);
    uint32_t *allowed = take((size_t)words * sizeof *allowed), *mask = malloc((size_t)words * sizeof *mask);
    struct logit_edit *edits = malloc((size_t)(n * cols) * sizeof *edits);
    for (int64_t i = 0; i < words; i++) allowed[i] = random_u32() | random_u32() | random_u32();
    for (int64_t i = 0; i < words; i++) mask[i] = random_u32() | random_u32();
    for (int64_t r = 0; r < n; r++) {
        fill_logits(x.m.data + r * x.m.stride, cols);
        draws[r] = random_draw();
        for (int64_t c = random_below(4); c < cols; c += 1 + random_below(40))
            edits[n_edits++] =
                (struct logit_edit){ (int32_t)r, (int32_t)c, random_below(9) ? random_normal() : -INFINITY,
                                     random_below(2) ? 1 : 1.3f, random_below(2) ? 0 : 0.7f };
    }
    for (int edited = 0; edited < 2; edited++) {
        struct guarded changed = copy_of(&x);
        for (int i = 0; edited && i < 2; i++) {
            struct backend *b = i ? &cpu : &ref;
            struct mat m = i ? changed.m : x.m, first = m;
            first.rows = 1;
            b->ops->mask(b->queue, first, mask);
            b->ops->edit(b->queue, m, edits, n_edits);
        }
        check_guards(&changed, "edit");
        for (int64_t r = 0; r < n; r++)
            for (int64_t c = 0; c < cols; c++) {
                float a = x.m.data[r * x.m.stride + c], b = changed.m.data[r * x.m.stride + c];
                if (memcmp(&a, &b, sizeof a) != 0 && !(isnan(a) && isnan(b)))
                    fail_msg("edit on %s: (%d, %d) is %.9g, ref %.9g", cpu.name, (int)r, (int)c, (double)b,
                             (double)a);
            }
        for (int bans = 0; bans < 2; bans++) {
            ref.ops->draw(ref.queue, want, x.m, bans ? allowed : NULL, draws);
            cpu.ops->draw(cpu.queue, got, x.m, bans ? allowed : NULL, draws);
            finish();
            for (int64_t r = 0; r < n; r++)
                if (got[r] != want[r])
                    fail_msg(
                        "draw on %s, row %d of %d x %d: %d, ref %d; scale %g, reach %g, top_k %d, top_p %g, "
                        "uniform %g",
                        cpu.name, (int)r, (int)n, (int)cols, got[r], want[r], (double)draws[r].scale,
                        (double)draws[r].reach, draws[r].top_k, (double)draws[r].top_p, draws[r].uniform);
        }
        drop(&changed);
    }
    drop(&x);
    give(allowed);
    free(mask);
    free(edits);
    free(draws);
    free(want);
    free(got);
}

static void draws(void)
{
    static const int64_t cols[] = { 1, 2, 31, 33, 257, 2048, 2049, 20000 };
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) {
        draw_case(1 + random_below(7), cols[i]);
        draw_case(8 + random_below(120), cols[i] < 3000 ? cols[i] : 700);
    }
    draw_case(3, 248320);
}

static void rows(void)
{
    static const int64_t cols[] = { 1, 3, 4, 15, 16, 17, 64, 100, 129, 1000 };
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) row_case(1 + random_below(40), cols[i]);
    embed_case(WEIGHT_BF16);
    embed_case(WEIGHT_F16);
    embed_case(WEIGHT_F32);
    draws();
}

/* What a vision tower needs. */

static void vision_rows_case(int64_t n, int64_t cols)
{
    struct guarded x = filled(n, cols, 2, 3), gain = filled(1, cols, 0, 1), bias = filled(1, cols, 0, 1),
                   want, got;
    both(&want, &got, n, cols);
    for (int64_t r = 0; r < n; r++) /* a mean far from zero, as towers have it */
        for (int64_t c = 0; c < cols; c++) x.m.data[r * x.m.stride + c] += 20;
    ref.ops->layer_norm(ref.queue, want.m, x.m, gain.m.data, bias.m.data, 1e-6f);
    cpu.ops->layer_norm(cpu.queue, got.m, x.m, gain.m.data, bias.m.data, 1e-6f);
    /* the mean's rounding, set against the deviation: what a row of one or two columns may have little of */
    check_close(&got, &want, 1e-5, cols < 3 ? 1e-1 : 2e-5, "layer_norm");
    for (int f = ACTIVATION_NONE; f <= ACTIVATION_GELU_TANH; f++) {
        struct guarded a = filled(n, cols, 1, 3), b = copy_of(&a);
        ref.ops->add_bias(ref.queue, a.m, bias.m.data, (enum activation)f);
        cpu.ops->add_bias(cpu.queue, b.m, bias.m.data, (enum activation)f);
        check_close(&b, &a, 2e-6, 2e-6, "add_bias");
        drop(&a);
        drop(&b);
    }
    struct guarded *all[] = { &x, &gain, &bias, &want, &got };
    for (int i = 0; i < 5; i++) drop(all[i]);
}

static void attention_all_case(int64_t n, int heads, int64_t dim)
{
    struct guarded qkv = filled(n, 3 * heads * dim, 5, 1), angle = filled(n, dim / 2, 3, 200),
                   turned = copy_of(&qkv), want, got;
    struct mat qk = { qkv.m.data, n, 2 * heads * dim, qkv.m.stride };
    ref.ops->rotate(ref.queue, qk, 2 * heads, angle.m);
    qk.data = turned.m.data;
    cpu.ops->rotate(cpu.queue, qk, 2 * heads, angle.m);
    check_close(&turned, &qkv, 1e-6, 2e-6, "rotate");
    both(&want, &got, n, heads * dim);
    ref.ops->attention_all(ref.queue, want.m, qkv.m, heads);
    cpu.ops->attention_all(cpu.queue, got.m, qkv.m, heads);
    check_close(&got, &want, 1e-5, 1e-5, "attention_all");
    struct guarded *all[] = { &qkv, &angle, &turned, &want, &got };
    for (int i = 0; i < 5; i++) drop(all[i]);
}

static void vision(void)
{
    static const int64_t cols[] = { 1, 2, 15, 16, 17, 64, 100, 1152 }, ns[] = { 1, 15, 64, 65, 130, 200 };
    static const int64_t dims[] = { 4, 16, 32, 72, 20, 128 };
    uint64_t kept =
        state_of_random; /* the other families' cases stay those that they have without this one */
    reserve(64, 3 * 3 * 128, 64, 2, 4);
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) vision_rows_case(1 + random_below(40), cols[i]);
    for (int i = 0; i < 6; i++)
        for (int d = 0; d < 6; d += 1 + i % 2) attention_all_case(ns[i], 1 + (int)random_below(3), dims[d]);
    state_of_random = kept;
}

#endif
