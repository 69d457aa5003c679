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

static void rows(void)
{
    static const int64_t cols[] = { 1, 3, 4, 15, 16, 17, 64, 100, 129, 1000 };
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) row_case(1 + random_below(40), cols[i]);
    embed_case(WEIGHT_BF16);
    embed_case(WEIGHT_F16);
    embed_case(WEIGHT_F32);
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
