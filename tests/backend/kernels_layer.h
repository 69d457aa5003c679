/* A layer of every kind: several sequences in a step against each alone. */
#ifndef TESTS_KERNELS_LAYER_H
#define TESTS_KERNELS_LAYER_H
#include "backend/kernels_runs.h"

/* A step of sequences of one row each gives every row what it gets alone, to the bit for up to ROWS_EXACT: a
 * layer of every kind, its weights in the mixes that have kernels for several rows. */
enum {
    SEQUENCES = 128,
    LAYER_HIDDEN = 256,
    LAYER_INNER = 256,
    LAYER_EXPERTS = 8,
    PAGES_EACH = 4, /* one that anybody reads, and those that are written */
    PAST_PAGES = 12
};

struct layer_case {
    bool lean;   /* heads of DeltaNet are not wanted */
    bool joined; /* what has the same inputs: weights below one another, results side by side */
    struct made qkv, z, a, b, out, q, k, v, o, router, shared_gate, gate, up, down, expert[3][LAYER_EXPERTS];
    struct experts experts;
    struct weight *lists[3][LAYER_EXPERTS];
    struct guarded taps, A, bias, gain; /* gain: for norms of any width */
    struct rope rope;
};

static struct made made_of(enum weight_format f, int64_t rows, int64_t cols)
{
    return make_weight(f, rows, cols, f == WEIGHT_FP8 ? INPUT_FP8_ROW : INPUT_AS_IS);
}

static void make_layer_case(struct layer_case *l, enum weight_format delta, enum weight_format dense,
                            enum weight_format expert)
{
    enum { H = LAYER_HIDDEN };
    l->qkv = made_of(delta, 512, H), l->z = made_of(delta, 256, H), l->out = made_of(delta, H, 256);
    l->a = made_of(WEIGHT_BF16, 2, H), l->b = made_of(WEIGHT_BF16, 2, H);
    l->q = made_of(dense, 1024, H), l->k = made_of(dense, 256, H), l->v = made_of(dense, 256, H);
    l->o = made_of(dense, H, 512);
    l->router = made_of(WEIGHT_BF16, LAYER_EXPERTS, H), l->shared_gate = made_of(WEIGHT_BF16, 1, H);
    l->gate = made_of(dense, LAYER_INNER, H), l->up = made_of(dense, LAYER_INNER, H);
    l->down = made_of(dense, H, LAYER_INNER);
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < LAYER_EXPERTS; e++) {
            l->expert[m][e] = m < 2 ? made_of(expert, LAYER_INNER, H) : made_of(expert, H, LAYER_INNER);
            l->lists[m][e] = l->expert[m][e].cpu;
        }
    l->experts = (struct experts){ LAYER_EXPERTS, l->lists[0], l->lists[1], l->lists[2], NULL };
    bind(&l->experts);
    l->taps = filled(4, 512, 0, 0.5f), l->A = filled(1, 2, 0, 1), l->bias = filled(1, 2, 0, 1);
    l->gain = filled(1, 1024, 0, 1);
    float *inverse = take(12);
    uint8_t *axis = take(3);
    memcpy(inverse, (float[]){ 1, 0.3f, 0.01f }, 12);
    memcpy(axis, (uint8_t[]){ 0, 1, 2 }, 3);
    l->rope = (struct rope){ 3, 1.1386294f, inverse, axis };
}

static void drop_layer_case(struct layer_case *l)
{
    struct made *all[] = { &l->qkv, &l->z, &l->a,      &l->b,           &l->out,  &l->q,  &l->k,
                           &l->v,   &l->o, &l->router, &l->shared_gate, &l->gate, &l->up, &l->down };
    cpu.ops->experts_unbind(cpu.queue, &l->experts);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) drop_weight(all[i]);
    for (int m = 0; m < 3; m++)
        for (int e = 0; e < LAYER_EXPERTS; e++) drop_weight(&l->expert[m][e]);
    drop(&l->taps), drop(&l->A), drop(&l->bias), drop(&l->gain);
    give((void *)l->rope.inverse);
    give((void *)l->rope.axis);
}

/* What sequences leave: rows after each of three mixers, states. */
struct layer_trace {
    struct guarded x[3], h, heads, conv, matrix, keys, values; /* heads: of DeltaNet, gated */
};

static struct layer_trace make_trace(uint64_t seed, int64_t rows)
{
    uint64_t before = state_of_random;
    state_of_random = seed;
    struct layer_trace t = { .x = { filled(rows, LAYER_HIDDEN, 3, 0.5f), guarded(rows, LAYER_HIDDEN, 3),
                                    guarded(rows, LAYER_HIDDEN, 3) },
                             .h = guarded(rows, LAYER_HIDDEN, 1),
                             .heads = guarded(rows, 256, 1),
                             .conv = filled(SEQUENCES, 3 * 512, 0, 1),
                             .matrix = filled(SEQUENCES, 2 * 128 * 128, 0, 0.3f),
                             .keys = filled(SEQUENCES, PAGES_EACH * KV_PAGE * 256, 0, 1),
                             .values = filled(SEQUENCES, PAGES_EACH * KV_PAGE * 256, 0, 1) };
    state_of_random = before;
    return t;
}

static void join_layer(struct layer_case *l)
{
    l->joined = true;
    join(4, (struct weight *[]){ l->qkv.cpu, l->z.cpu, l->a.cpu, l->b.cpu });
    join(3, (struct weight *[]){ l->q.cpu, l->k.cpu, l->v.cpu });
    join(2, (struct weight *[]){ l->gate.cpu, l->up.cpu });
}

static void layer_mixers(struct layer_case *l, struct layer_trace *t, struct mat *x, struct mat heads,
                         const struct step_rows *rows)
{
    int64_t n = rows->n;
    struct guarded y = guarded(n, LAYER_HIDDEN, 0), conv = guarded(n, 512, 0), raw = guarded(n, 256, 0),
                   att = guarded(n, 512, 0), u, z, a, b, qg, k, v;
    guarded_beside(l->joined, n, 4, (struct guarded *[]){ &u, &z, &a, &b }, (int64_t[]){ 512, 256, 2, 2 });
    guarded_beside(l->joined, n, 3, (struct guarded *[]){ &qg, &k, &v }, (int64_t[]){ 1024, 256, 256 });
    struct delta_shape shape = { 1, 2, 128, 128, 4 };
    struct delta_state state = { .matrix = t->matrix.m.data, .conv = t->conv.m.data };
    struct kv_cache kv = { t->keys.m.data, t->values.m.data, KV_F32, 1, 256 };
    const float *gain = l->gain.m.data;
    cpu.ops->norm_products(cpu.queue, &(struct norm_products){ y.m,
                                                               x[0],
                                                               gain,
                                                               1e-6f,
                                                               4,
                                                               { u.m, z.m, a.m, b.m },
                                                               { l->qkv.cpu, l->z.cpu, l->a.cpu, l->b.cpu },
                                                               .lean = true });
    cpu.ops->delta_run(cpu.queue,
                       &(struct delta_run){ x[0], y.m, u.m, conv.m, z.m, a.m, b.m, raw.m, heads,
                                            l->taps.m.data, l->A.m.data, l->bias.m.data, gain, 1e-6f,
                                            l->out.cpu, &state, &shape, .lean = l->lean },
                       rows);
    finish();
    for (int64_t r = 0; r < n; r++)
        memcpy(x[1].data + r * x[1].stride, x[0].data + r * x[0].stride, LAYER_HIDDEN * 4);
    cpu.ops->norm_products(
        cpu.queue,
        &(struct norm_products){
            y.m, x[1], gain, 1e-6f, 3, { qg.m, k.m, v.m }, { l->q.cpu, l->k.cpu, l->v.cpu }, .lean = true });
    cpu.ops->attention_run(cpu.queue,
                           &(struct attention_run){ x[1], y.m, qg.m, k.m, v.m, att.m, 2, gain, gain + 256,
                                                    1e-6f, &l->rope, &kv, l->o.cpu, .lean = true },
                           rows);
    finish();
    struct guarded *all[] = { &u, &z, &a, &b, &y, &conv, &raw, &qg, &k, &v, &att };
    for (int i = 0; i < 11; i++) check_guards(all[i], "mixers of a layer"), drop(all[i]);
}

static void layer_experts(struct layer_case *l, struct mat h, struct mat *x)
{
    int64_t n = h.rows;
    struct guarded router = guarded(n, LAYER_EXPERTS, 0), one = guarded(n, 1, 0),
                   hidden = guarded(n, LAYER_INNER, 0), y = guarded(n, LAYER_HIDDEN, 0),
                   shared = guarded(n, LAYER_HIDDEN, 0), gate, up;
    guarded_beside(l->joined, n, 2, (struct guarded *[]){ &gate, &up },
                   (int64_t[]){ LAYER_INNER, LAYER_INNER });
    int32_t *id = take((size_t)n * 3 * 4);
    float *weight = take((size_t)n * 3 * 4);
    struct picks picks = { id, weight, 3 };
    for (int64_t r = 0; r < n; r++)
        memcpy(x[2].data + r * x[2].stride, x[1].data + r * x[1].stride, LAYER_HIDDEN * 4);
    struct moe_run run = { x[2],     y.m,   h,      router.m,    gate.m,      up.m,        hidden.m,
                           shared.m, one.m, &picks, &l->experts, l->down.cpu, .lean = true };
    cpu.ops->norm_products(
        cpu.queue, &(struct norm_products){ h,
                                            x[2],
                                            l->gain.m.data,
                                            1e-6f,
                                            4,
                                            { router.m, one.m, gate.m, up.m },
                                            { l->router.cpu, l->shared_gate.cpu, l->gate.cpu, l->up.cpu },
                                            .reader = &run });
    cpu.ops->moe_run(cpu.queue, &run);
    finish();
    struct guarded *all[] = { &router, &one, &gate, &up, &hidden, &y, &shared };
    for (int i = 0; i < 7; i++) check_guards(all[i], "experts of a layer"), drop(all[i]);
    give(id);
    give(weight);
}

/* Sequences [first, first + n) as a step, each of one row, or pieces of prompts of `lengths` rows. */
static void layer_step(struct layer_case *l, struct layer_trace *t, int first, int n, const int *lengths)
{
    struct span spans[SEQUENCES];
    int32_t pages[SEQUENCES][PAST_PAGES];
    struct mat x[3], h = t->h.m, heads = t->heads.m;
    int64_t row0 = 0, n_rows = 0;
    for (int i = 0; i < first; i++) row0 += lengths ? lengths[i] : 1;
    for (int i = 0; i < n; i++) n_rows += lengths ? lengths[first + i] : 1;
    struct row *rows = calloc((size_t)n_rows, sizeof *rows);
    n_rows = 0;
    for (int i = 0; i < n; i++) {
        int32_t past = (first + i) * (first + i) * 7 % ((PAST_PAGES - 3) * KV_PAGE);
        int32_t count = lengths ? lengths[first + i] : 1;
        /* all but the pages that are written are anybody's */
        for (int32_t p = 0; p < PAST_PAGES; p++) pages[i][p] = (first + i + p) % SEQUENCES * PAGES_EACH;
        for (int32_t p = past / KV_PAGE, k = 1; p <= (past + count - 1) / KV_PAGE; p++)
            pages[i][p] = (first + i) * PAGES_EACH + k++;
        spans[i] =
            (struct span){ .first = n_rows, .n = count, .past = past, .pages = pages[i], .slot = first + i };
        for (int32_t k = past; k < past + count; k++)
            rows[n_rows++] = (struct row){ .position = { k, k, k } };
    }
    for (int i = 0; i < 3; i++) {
        x[i] = t->x[i].m;
        x[i].data += row0 * x[i].stride;
        x[i].rows = n_rows;
    }
    h.data += row0 * h.stride;
    h.rows = n_rows;
    heads.data += row0 * heads.stride;
    heads.rows = n_rows;
    struct step_rows step = { rows, n_rows, spans, n, lengths != NULL };
    if (lengths) assert_false(cpu.ops->step_begin(cpu.queue, l, &step));
    layer_mixers(l, t, x, heads, &step);
    layer_experts(l, h, x);
    if (lengths) cpu.ops->step_end(cpu.queue);
    free(rows);
}

static struct guarded first_rows(const struct guarded *g, int n)
{
    struct guarded first = guarded(n, g->m.cols, 0);
    check_guards(g, "a layer");
    for (int64_t r = 0; r < n; r++)
        memcpy(first.m.data + r * first.m.stride, g->m.data + r * g->m.stride, (size_t)g->m.cols * 4);
    return first;
}

/* lengths: pieces of prompts, which are alike to the bit however many they are. */
static void layer_alone_case(enum weight_format delta, enum weight_format dense, enum weight_format expert,
                             int n, const int *lengths)
{
    int n_rows = lengths ? 0 : n;
    for (int i = 0; lengths && i < n; i++) n_rows += lengths[i];
    struct layer_case l = { 0 };
    make_layer_case(&l, delta, dense, expert);
    l.lean = lengths || n % 4 == 0;
    if (random_below(2)) join_layer(&l);
    uint64_t seed = state_of_random;
    struct layer_trace together = make_trace(seed, lengths ? n_rows : SEQUENCES),
                       alone = make_trace(seed, lengths ? n_rows : SEQUENCES);
    layer_step(&l, &together, 0, n, lengths);
    for (int i = 0; i < n; i++) layer_step(&l, &alone, i, 1, lengths);
    struct guarded *a[] = { &together.conv, &together.matrix, &together.x[0],
                            &together.keys, &together.values, &together.x[1],
                            &together.h,    &together.x[2],   &together.heads };
    struct guarded *b[] = { &alone.conv, &alone.matrix, &alone.x[0], &alone.keys, &alone.values,
                            &alone.x[1], &alone.h,      &alone.x[2], &alone.heads };
    static const char *const names[] = { "conv state", "delta state",     "x after delta_run",
                                         "keys",       "values",          "x after attention_run",
                                         "normed x",   "x after moe_run", "heads of delta_run" };
    for (int i = 0; i < (l.lean ? 8 : 9); i++) {
        bool of_rows = i == 2 || i > 4;
        struct guarded have = first_rows(a[i], of_rows ? n_rows : n),
                       want = first_rows(b[i], of_rows ? n_rows : n);
        if (lengths || n <= ROWS_EXACT)
            same_bits(&have, &want, cpu.name, names[i]);
        else if (i < 6 || i == 8) /* a router's choice may turn on a rounding, and a softmax does on many */
            check_shares(&have, &want, 0.1, 0.3, names[i]);
        drop(&have), drop(&want);
    }
    for (int i = 0; i < 9; i++) drop(a[i]), drop(b[i]);
    drop_layer_case(&l);
}

static void several_rows(void)
{
    static const enum weight_format formats[] = { WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4 };
    static const int ns[] = { 2, 5, 8, 9, 16, 17, 31, 32 };
    if (!on_device()) return;
    reserve(SEQUENCES, 2048, 256, 3, 8);
    for (int i = 0; i < 8; i++)
        for (int f = 0; f < 3; f++)
            product_case(formats[f], ns[i], 1 + random_below(300), 256 * (1 + random_below(2)),
                         f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
    for (int f = 0; f < 3; f++) /* shares of several units */
        product_case(formats[f], ns[random_below(8)], 1 + random_below(20), 256 * (3 + random_below(6)),
                     f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
    for (int f = 0; f < 3; f++) /* more tiles than there are multiprocessors */
        product_case(formats[f], ns[random_below(8)], 6400 + random_below(200), 256,
                     f == 1 ? INPUT_FP8_ROW : INPUT_AS_IS);
    moe_run_case(WEIGHT_NVFP4, 2 + random_below(31), 256, 256, 3, false);
    moe_run_case(WEIGHT_NVFP4, 9 + random_below(8), 512 + 256 * random_below(4), 256, 3,
                 false); /* items of several stages */
    for (int i = 0; i < 8; i++) layer_alone_case(WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4, ns[i], NULL);
    moe_run_case(WEIGHT_NVFP4, 33 + random_below(32), 256, 256, 3, false);
    moe_run_case(WEIGHT_NVFP4, 65 + random_below(64), 256, 256, 3, true);
    layer_alone_case(WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4, 33 + (int)random_below(32), NULL);
    layer_alone_case(WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4, 65 + (int)random_below(64), NULL);
    layer_alone_case(WEIGHT_FP8, WEIGHT_FP8, WEIGHT_NVFP4, 2 + (int)random_below(31), NULL);
    layer_alone_case(WEIGHT_BF16, WEIGHT_BF16, WEIGHT_BF16, 2 + (int)random_below(31), NULL);
    layer_alone_case(WEIGHT_NVFP4, WEIGHT_NVFP4, WEIGHT_NVFP4, 2 + (int)random_below(31), NULL);
    layer_alone_case(WEIGHT_BF16, WEIGHT_BF16, WEIGHT_NVFP4, 2 + (int)random_below(7), NULL);
    layer_alone_case(WEIGHT_BF16, WEIGHT_NVFP4, WEIGHT_NVFP4, 2 + (int)random_below(7), NULL);
}

/* Pieces of prompts together and each alone, from a few rows to many. */
static void prompt_rows(void)
{
    static const enum weight_format mixes[][3] = { { WEIGHT_BF16, WEIGHT_FP8, WEIGHT_NVFP4 },
                                                   { WEIGHT_FP8, WEIGHT_FP8, WEIGHT_NVFP4 },
                                                   { WEIGHT_BF16, WEIGHT_BF16, WEIGHT_BF16 },
                                                   { WEIGHT_F16, WEIGHT_F16, WEIGHT_NVFP4 } };
    static const int lengths[][7] = { { 1, 5, 17, 3 },
                                      { 90, 1, 33, 64, 65, 8, 20 },
                                      { 2, 90, 90, 90, 90, 90, 90 } };
    if (!on_device()) return;
    reserve(2 * SEQUENCES * 3, 2048, 256, 3, 8);
    for (int m = 0; m < 4; m++)
        for (int i = 0; i < 3; i++)
            layer_alone_case(mixes[m][0], mixes[m][1], mixes[m][2], i == 0 ? 4 : 7, lengths[i]);
}

#endif
