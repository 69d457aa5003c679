/* Attention and the delta rule over several sequences, and rows that are taken back. */
#ifndef TESTS_KERNELS_SEQUENCES_H
#define TESTS_KERNELS_SEQUENCES_H
#include "backend/kernels_cache.h"

struct plan {
    struct row rows[300];
    struct span spans[3];
    int32_t pages[3][8];
    struct step_rows step;
};

static void make_plan(struct plan *p, const int64_t *n, const int64_t *past)
{
    p->step = (struct step_rows){ p->rows, 0, p->spans, 3, false };
    for (int s = 0; s < 3; s++) {
        for (int i = 0; i < 8; i++) p->pages[s][i] = (2 - s) + 3 * (7 - i); /* scattered over 24 pages */
        p->spans[s] = (struct span){
            .first = p->step.n, .n = n[s], .past = past[s], .pages = p->pages[s], .slot = 2 - s
        };
        for (int64_t i = 0; i < n[s]; i++) {
            int32_t t = (int32_t)(past[s] + i);
            p->rows[p->step.n++] = (struct row){ .position = { t, t / 2 + 1, 3 * t } };
        }
    }
}

static void attention_case(enum kv_dtype dtype, int n_heads, int n_kv, int dim, const int64_t *n,
                           const int64_t *past)
{
    struct plan p;
    make_plan(&p, n, past);
    struct kv_cache kr = take_cache(dtype, n_kv, dim), kc = take_cache(dtype, n_kv, dim);
    fill_caches(&kr, &kc);
    int64_t rows = p.step.n;
    struct guarded q = filled(rows, (int64_t)n_heads * 2 * dim, 3, 2),
                   k = filled(rows, (int64_t)n_kv * dim, 0, 1);
    struct guarded v = filled(rows, (int64_t)n_kv * dim, 0, 600), gain = filled(1, dim, 0, 1),
                   qr = copy_of(&q), want, got;
    float *inverse = take(12);
    uint8_t *axis = take(3);
    memcpy(inverse, (float[]){ 1, 0.3f, 0.01f }, 12);
    memcpy(axis, (uint8_t[]){ 0, 1, 2 }, 3);
    struct rope rope = { dim >= 6 ? 3 : 0, 1.1386294f, inverse, axis };
    ref.ops->norm_rope(ref.queue, qr.m, n_heads, 2 * dim, dim, gain.m.data, 1e-6f, &rope, &p.step);
    cpu.ops->norm_rope(cpu.queue, q.m, n_heads, 2 * dim, dim, gain.m.data, 1e-6f, &rope, &p.step);
    check_close(&q, &qr, 4e-6, 4e-6, "norm_rope");
    ref.ops->kv_append(ref.queue, &kr, k.m, v.m, &p.step);
    cpu.ops->kv_append(cpu.queue, &kc, k.m, v.m, &p.step);
    finish();
    assert_memory_equal(kr.keys, kc.keys, side_bytes(&kr));
    assert_memory_equal(kr.values, kc.values, side_bytes(&kr));
    both(&want, &got, rows, (int64_t)n_heads * dim);
    ref.ops->attention(ref.queue, want.m, qr.m, n_heads, &kr, &p.step);
    cpu.ops->attention(cpu.queue, got.m, qr.m, n_heads, &kc, &p.step);
    check_close(&got, &want, 1e-5, 600 * 2e-5, "attention");
    struct guarded *all[] = { &q, &k, &v, &gain, &qr, &want, &got };
    for (int i = 0; i < 7; i++) drop(all[i]);
    give_cache(&kr), give_cache(&kc);
    give(inverse);
    give(axis);
}

static void delta_case(int key_heads, int group, int dk, int dv, int kernel, const int64_t *n)
{
    struct plan p;
    int64_t none[] = { 0, 0, 0 };
    make_plan(&p, n, none);
    struct delta_shape s = { key_heads, key_heads * group, dk, dv, kernel };
    int64_t channels = 2 * (int64_t)key_heads * dk + (int64_t)s.value_heads * dv, rows = p.step.n;
    struct guarded u = filled(rows, channels, 1, 1), w = filled(kernel, channels, 0, 0.5f), want, got;
    struct guarded cr = filled(3, (kernel - 1) * channels, 0, 1), cc = copy_of(&cr);
    struct guarded mr = filled(3, (int64_t)s.value_heads * dk * dv, 0, 0.3f), mc = copy_of(&mr);
    struct delta_state sr = { .matrix = mr.m.data, .conv = cr.m.data },
                       sc = { .matrix = mc.m.data, .conv = cc.m.data };
    both(&want, &got, rows, channels);
    ref.ops->conv(ref.queue, want.m, u.m, w.m.data, &sr, &s, &p.step);
    cpu.ops->conv(cpu.queue, got.m, u.m, w.m.data, &sc, &s, &p.step);
    check_close(&got, &want, 3e-6, 1e-6, "conv");
    check_close(&cc, &cr, 0, 0, "conv state");
    struct guarded a = filled(rows, s.value_heads, 1, 2), b = filled(rows, s.value_heads, 1, 2),
                   ac = copy_of(&a), bc = copy_of(&b);
    struct guarded A = filled(1, s.value_heads, 0, 1), bias = filled(1, s.value_heads, 0, 1),
                   qkv = copy_of(&want);
    struct guarded o, oc;
    both(&o, &oc, rows, (int64_t)s.value_heads * dv);
    ref.ops->delta(ref.queue, o.m, want.m, a.m, b.m, A.m.data, bias.m.data, &sr, &s, &p.step);
    cpu.ops->delta(cpu.queue, oc.m, qkv.m, ac.m, bc.m, A.m.data, bias.m.data, &sc, &s, &p.step);
    /* large terms of a chunk cancel: an absolute bound, twice what was seen (1.7e-5) */
    check_close(&oc, &o, 2e-5, 3e-5, "delta");
    check_close(&mc, &mr, 2e-5, 3e-5, "delta state");
    struct guarded *all[] = { &u, &w,  &want, &got, &cr,   &cc,  &mr, &mc, &a,
                              &b, &ac, &bc,   &A,   &bias, &qkv, &o,  &oc };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
}

static void sequences(void)
{
    static const int64_t n[][3] = { { 1, 1, 1 },    { 3, 1, 40 },  { 32, 33, 2 },
                                    { 65, 2, 130 }, { 1, 64, 63 }, { 2, 3, 1 } };
    static const int64_t past[][3] = { { 0, 63, 64 },   { 5, 100, 0 },  { 0, 0, 1 },
                                       { 200, 1, 127 }, { 300, 0, 65 }, { 300, 130, 440 } };
    static const int dims[] = { 16, 64, 128, 256, 20, 3 };
    reserve(300, 2048, 64, 2, 4);
    for (int i = 0; i < 6; i++)
        for (int d = 0; d < 6; d++) {
            int n_kv = 1 + (int)random_below(2), group = 1 + (int)random_below(3);
            attention_case((enum kv_dtype)((i + d) % kv_dtypes()), n_kv * group, n_kv, dims[d], n[i],
                           past[i]);
        }
    for (int i = 0; i < 6; i++) {
        delta_case(1, 2, 4, 3, 4, n[i]);
        delta_case(2, 2, 16, 20, 4, n[i]);
        delta_case(2, 1, 128, 128, 4, n[i]);
        delta_case(1, 3, 20, 48, 2, n[i]);
    }
}

/* Logged spans: rows that may be taken back, against the same rows run as ever, with what became of them
 * known. All bits are the same, of outputs and of the state in the end. */
enum { LOG_ROWS = 9, LOG_STEPS = 6 };

struct logging {
    struct delta_shape shape;
    struct guarded taps, A, bias, matrix, conv, log; /* of 3 slots */
    struct guarded plain_matrix, plain_conv;         /* the state of rows run as ever */
    struct guarded run_matrix, run_conv, run_log;    /* of the fused run */
    struct made out;                                 /* what it multiplies the heads with */
};

static struct guarded run_rows(const struct backend *b, const struct logging *l,
                               const struct delta_state *state, const struct guarded in[3],
                               const struct step_rows *step)
{
    const struct delta_shape *s = &l->shape;
    struct guarded u = copy_of(&in[0]), a = copy_of(&in[1]), beta = copy_of(&in[2]);
    struct guarded qkv = guarded(step->n, u.m.cols, 0),
                   o = guarded(step->n, (int64_t)s->value_heads * s->value_dim, 1);
    b->ops->conv(b->queue, qkv.m, u.m, l->taps.m.data, state, s, step);
    b->ops->delta(b->queue, o.m, qkv.m, a.m, beta.m, l->A.m.data, l->bias.m.data, state, s, step);
    finish();
    drop(&u), drop(&a), drop(&beta), drop(&qkv);
    return o;
}

/* The same by the fused run. */
static struct guarded run_fused(const struct backend *b, const struct logging *l, const struct guarded in[3],
                                const struct step_rows *step)
{
    const struct delta_shape *s = &l->shape;
    int64_t n = step->n, values = (int64_t)s->value_heads * s->value_dim, hidden = l->out.ref->rows;
    struct delta_state state = { l->run_matrix.m.data, l->run_conv.m.data, l->run_log.m.data, LOG_ROWS };
    struct guarded u = copy_of(&in[0]), a = copy_of(&in[1]), beta = copy_of(&in[2]),
                   qkv = guarded(n, u.m.cols, 0), z = filled(n, values, 0, 1),
                   gain = filled(1, s->value_dim, 0, 1), x = filled(n, hidden, 0, 1),
                   y = guarded(n, hidden, 0), made = guarded(n, values, 0), o = guarded(n, values, 1);
    struct delta_run r = { x.m,
                           y.m,
                           u.m,
                           qkv.m,
                           z.m,
                           a.m,
                           beta.m,
                           o.m,
                           made.m,
                           l->taps.m.data,
                           l->A.m.data,
                           l->bias.m.data,
                           gain.m.data,
                           1e-6f,
                           b == &ref ? l->out.ref : l->out.cpu,
                           &state,
                           s,
                           false };
    b->ops->delta_run(b->queue, &r, step);
    finish();
    struct guarded *all[] = { &u, &a, &beta, &qkv, &z, &gain, &x, &y, &made };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop(all[i]);
    return o;
}

static void same_bits(const struct guarded *got, const struct guarded *want, const char *backend,
                      const char *what)
{
    for (int64_t r = 0; r < want->m.rows; r++)
        for (int64_t c = 0; c < want->m.cols; c++) {
            const float *g = got->m.data + r * got->m.stride + c, *w = want->m.data + r * want->m.stride + c;
            if (memcmp(g, w, sizeof *g) != 0)
                fail_msg("%s on %s: (%d, %d) of %d columns is %.9g, expected %.9g", what, backend, (int)r,
                         (int)c, (int)want->m.cols, (double)*g, (double)*w);
        }
}

/* Runs the rows of `step` as ever, then only the first kept[s] of each span from where they began. */
static struct guarded run_plain(const struct backend *b, struct logging *l, const struct guarded in[3],
                                const struct step_rows *step, const int64_t *kept)
{
    struct delta_state state = { .matrix = l->plain_matrix.m.data, .conv = l->plain_conv.m.data };
    struct span spans[3];
    struct step_rows plain = { step->rows, step->n, spans, 3, false };
    struct guarded matrix = copy_of(&l->plain_matrix), conv = copy_of(&l->plain_conv);
    for (int s = 0; s < 3; s++) {
        spans[s] = step->spans[s];
        spans[s].logged = false;
        spans[s].kept = 0;
    }
    struct guarded o = run_rows(b, l, &state, in, &plain);
    for (int s = 0; s < 3; s++) {
        if (kept[s] == spans[s].n) continue;
        int slot = spans[s].slot;
        memcpy(l->plain_matrix.m.data + slot * matrix.m.cols, matrix.m.data + slot * matrix.m.cols,
               (size_t)matrix.m.cols * sizeof(float));
        memcpy(l->plain_conv.m.data + slot * conv.m.cols, conv.m.data + slot * conv.m.cols,
               (size_t)conv.m.cols * sizeof(float));
        if (kept[s] == 0) continue;
        struct span first = { .n = kept[s], .pages = spans[s].pages, .slot = slot };
        struct step_rows again = { step->rows, kept[s], &first, 1, false };
        struct guarded rest[3], out;
        for (int i = 0; i < 3; i++) {
            rest[i] = guarded(kept[s], in[i].m.cols, 0);
            for (int64_t r = 0; r < kept[s]; r++)
                memcpy(rest[i].m.data + r * rest[i].m.stride,
                       in[i].m.data + (spans[s].first + r) * in[i].m.stride,
                       (size_t)in[i].m.cols * sizeof(float));
        }
        out = run_rows(b, l, &state, rest, &again);
        drop(&out);
        for (int i = 0; i < 3; i++) drop(&rest[i]);
    }
    drop(&matrix), drop(&conv);
    return o;
}

static void logged_case(int key_heads, int group, int dk, int dv, int kernel)
{
    const struct backend *all[] = { &ref, &cpu };
    struct logging l[2];
    int64_t values = (int64_t)key_heads * group * dv, channels = 2 * (int64_t)key_heads * dk + values;
    for (int b = 0; b < 2; b++) {
        l[b].shape = (struct delta_shape){ key_heads, key_heads * group, dk, dv, kernel };
        l[b].taps = b ? copy_of(&l[0].taps) : filled(kernel, channels, 0, 0.5f);
        l[b].A = b ? copy_of(&l[0].A) : filled(1, key_heads * group, 0, 1);
        l[b].bias = b ? copy_of(&l[0].bias) : filled(1, key_heads * group, 0, 1);
        l[b].matrix = b ? copy_of(&l[0].matrix) : filled(3, values * dk, 0, 0.3f);
        l[b].conv = b ? copy_of(&l[0].conv) : filled(3, (kernel - 1) * channels, 0, 1);
        l[b].log = guarded(3, LOG_ROWS * delta_log_floats(&l[b].shape), 0);
        l[b].plain_matrix = copy_of(&l[b].matrix);
        l[b].plain_conv = copy_of(&l[b].conv);
        l[b].run_matrix = copy_of(&l[b].matrix);
        l[b].run_conv = copy_of(&l[b].conv);
        l[b].run_log = guarded(3, LOG_ROWS * delta_log_floats(&l[b].shape), 0);
        l[b].out = b ? l[0].out : make_weight(WEIGHT_BF16, 24, values, INPUT_AS_IS);
    }
    int32_t kept[3] = { 0 };
    for (int step = 0; step < LOG_STEPS; step++) {
        struct plan p;
        int64_t n[3], none[3] = { 0 }, stay[3];
        for (int s = 0; s < 3; s++) n[s] = 1 + random_below(LOG_ROWS);
        make_plan(&p, n, none);
        for (int s = 0; s < 3; s++) {
            p.spans[s].kept = kept[s];
            p.spans[s].logged = step + 1 < LOG_STEPS && random_below(4) > 0;
            stay[s] = p.spans[s].logged ? 1 + random_below(n[s]) : n[s];
            kept[s] = p.spans[s].logged ? (int32_t)stay[s] : 0;
        }
        struct guarded in[3] = { filled(p.step.n, channels, 1, 1), filled(p.step.n, key_heads * group, 1, 2),
                                 filled(p.step.n, key_heads * group, 1, 2) };
        struct guarded o[2];
        for (int b = 0; b < 2; b++) {
            struct delta_state state = { l[b].matrix.m.data, l[b].conv.m.data, l[b].log.m.data, LOG_ROWS };
            o[b] = run_rows(all[b], &l[b], &state, in, &p.step);
            check_guards(&o[b], "logged rows");
            struct guarded plain = run_plain(all[b], &l[b], in, &p.step, stay);
            same_bits(&o[b], &plain, all[b]->name, "outputs of logged rows");
            drop(&plain);
            struct guarded fused = run_fused(all[b], &l[b], in, &p.step);
            check_guards(&fused, "logged rows of a run");
            same_bits(&fused, &o[b], all[b]->name, "outputs of logged rows of a run");
            drop(&fused);
        }
        check_close(&o[1], &o[0], 2e-5, 1e-5, "logged rows");
        for (int b = 0; b < 2; b++) drop(&o[b]);
        for (int i = 0; i < 3; i++) drop(&in[i]);
    }
    for (int b = 0; b < 2; b++) {
        same_bits(&l[b].matrix, &l[b].plain_matrix, all[b]->name, "state after logged rows");
        same_bits(&l[b].conv, &l[b].plain_conv, all[b]->name, "convolution state after logged rows");
        same_bits(&l[b].run_matrix, &l[b].matrix, all[b]->name, "state after logged rows of a run");
        same_bits(&l[b].run_conv, &l[b].conv, all[b]->name, "convolution state after logged rows of a run");
        check_guards(&l[b].log, "logged rows");
        check_guards(&l[b].run_log, "logged rows of a run");
        struct guarded *made[] = { &l[b].taps,       &l[b].A,          &l[b].bias,    &l[b].matrix,
                                   &l[b].conv,       &l[b].log,        &l[b].run_log, &l[b].plain_matrix,
                                   &l[b].plain_conv, &l[b].run_matrix, &l[b].run_conv };
        for (size_t i = 0; i < sizeof made / sizeof *made; i++) drop(made[i]);
    }
    drop_weight(&l[0].out);
}

static void logged_rows(void)
{
    reserve(300, 2048, 64, 2, 4);
    for (int i = 0; i < 4; i++) {
        logged_case(1, 2, 4, 3, 4);
        logged_case(2, 2, 16, 20, 4);
        logged_case(2, 1, 128, 128, 4);
        logged_case(1, 3, 20, 48, 2);
        logged_case(1, 1, 8, 72, 1);
    }
}

#endif
