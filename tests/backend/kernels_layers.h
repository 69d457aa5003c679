/* Layers of DeltaNet one after the other, whose kernels may run beside one another. */
#ifndef TESTS_KERNELS_LAYERS_H
#define TESTS_KERNELS_LAYERS_H
#include "backend/kernels_layer.h"

/* Where each run of operations says who alone reads its results (`mixer`), they have the bits that they have
 * where nobody knows: rows, states, several steps of which the later ones are recorded. The last step's rows
 * are NaN: whoever waits for a result has to take that for one. */
enum { STACK_HIDDEN = 256, STACK_LAYERS = 3, STACK_STEPS = 5 };

struct stack {
    struct made qkv, z, a, b, out;
    struct weight *table;
    struct guarded taps, A, bias, gain;
    struct delta_shape shape;
    int64_t channels, values;
    struct guarded x, y, u, z_row, a_row, b_row, conv_row, raw, o; /* of a step */
};

static void stack_step(struct stack *s, struct delta_state *states, int n_layers,
                       const struct step_rows *rows, bool known)
{
    cpu.ops->embed(cpu.queue, s->x.m, s->table, rows);
    for (int i = 0; i < n_layers; i++) {
        struct delta_run r = { s->x.m,      s->y.m,         s->u.m,         s->conv_row.m, s->z_row.m,
                               s->a_row.m,  s->b_row.m,     s->raw.m,       s->o.m,        s->taps.m.data,
                               s->A.m.data, s->bias.m.data, s->gain.m.data, 1e-6f,         s->out.cpu,
                               &states[i],  &s->shape,      .lean = true };
        struct norm_products in = { s->y.m,
                                    s->x.m,
                                    s->gain.m.data,
                                    1e-6f,
                                    4,
                                    { r.u, r.z, r.a, r.b },
                                    { s->qkv.cpu, s->z.cpu, s->a.cpu, s->b.cpu },
                                    .lean = true,
                                    .mixer = known ? &r : NULL };
        cpu.ops->norm_products(cpu.queue, &in);
        cpu.ops->delta_run(cpu.queue, &r, rows);
    }
}

static struct weight *stack_table(int64_t tokens)
{
    static uint16_t values[8 * STACK_HIDDEN];
    for (int64_t i = 0; i < tokens * STACK_HIDDEN; i++)
        values[i] = i < (tokens - 1) * STACK_HIDDEN ? bf16_from_f32(random_normal()).bits : 0xffff;
    struct weight_source src = {
        .format = WEIGHT_BF16, .rows = tokens, .cols = STACK_HIDDEN, .data = values, .is_table = true
    };
    struct weight *w;
    struct err e = { 0 };
    must(cpu.ops->weight_create(cpu.queue, &w, &src, &e), &e);
    return w;
}

static void layers_case(enum weight_format f, int key_heads, int group, int n_layers)
{
    enum { TOKENS = 8 };
    struct stack s = { .shape = { key_heads, key_heads * group, 128, 128, 4 } };
    int heads = s.shape.value_heads;
    s.values = heads * 128, s.channels = 2 * key_heads * 128 + s.values;
    s.qkv = made_of(f, s.channels, STACK_HIDDEN), s.z = made_of(f, s.values, STACK_HIDDEN);
    s.a = made_of(WEIGHT_BF16, heads, STACK_HIDDEN), s.b = made_of(WEIGHT_BF16, heads, STACK_HIDDEN);
    s.out = made_of(f, STACK_HIDDEN, s.values);
    s.table = stack_table(TOKENS);
    s.taps = filled(4, s.channels, 0, 0.5f), s.A = filled(1, heads, 0, 1), s.bias = filled(1, heads, 0, 1);
    s.gain = filled(1, STACK_HIDDEN, 0, 1);
    s.x = guarded(1, STACK_HIDDEN, 0), s.y = guarded(1, STACK_HIDDEN, 0), s.u = guarded(1, s.channels, 0);
    s.z_row = guarded(1, s.values, 0), s.a_row = guarded(1, heads, 0), s.b_row = guarded(1, heads, 0);
    s.conv_row = guarded(1, s.channels, 0), s.raw = guarded(1, s.values, 0), s.o = guarded(1, s.values, 0);
    struct guarded matrix[2][STACK_LAYERS], conv[2][STACK_LAYERS], x = guarded(1, STACK_HIDDEN, 0);
    struct delta_state states[2][STACK_LAYERS];
    for (int i = 0; i < n_layers; i++) {
        matrix[0][i] = filled(1, s.values * 128, 0, 0.3f), conv[0][i] = filled(1, 3 * s.channels, 0, 1);
        matrix[1][i] = copy_of(&matrix[0][i]), conv[1][i] = copy_of(&conv[0][i]);
        for (int k = 0; k < 2; k++)
            states[k][i] = (struct delta_state){ .matrix = matrix[k][i].m.data, .conv = conv[k][i].m.data };
    }
    for (int t = 0; t < STACK_STEPS; t++) {
        struct row row = { .token = t + 1 < STACK_STEPS ? t : TOKENS - 1, .position = { t, t, t } };
        struct span span = { .n = 1, .past = t };
        struct step_rows rows = { &row, 1, &span, 1, false };
        for (int k = 0; k < 2; k++) {
            if (!cpu.ops->step_begin(cpu.queue, &states[k], &rows))
                stack_step(&s, states[k], n_layers, &rows, k == 1);
            cpu.ops->step_end(cpu.queue);
            finish();
            if (k == 0) memcpy(x.m.data, s.x.m.data, STACK_HIDDEN * sizeof(float));
        }
        same_bits(&s.x, &x, cpu.name, "rows after layers that know their readers");
    }
    for (int i = 0; i < n_layers; i++)
        for (int k = 1; k >= 0; k--) {
            if (k == 1) same_bits(&conv[1][i], &conv[0][i], cpu.name, "conv state");
            if (k == 1) same_bits(&matrix[1][i], &matrix[0][i], cpu.name, "delta state");
            drop(&conv[k][i]), drop(&matrix[k][i]);
        }
    struct guarded *all[] = { &s.taps,  &s.A,     &s.bias,  &s.gain,     &s.x,   &s.y, &s.u,
                              &s.z_row, &s.a_row, &s.b_row, &s.conv_row, &s.raw, &s.o, &x };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) check_guards(all[i], "layers"), drop(all[i]);
    struct made *w[] = { &s.qkv, &s.z, &s.a, &s.b, &s.out };
    for (int i = 0; i < 5; i++) drop_weight(w[i]);
    cpu.ops->weight_free(cpu.queue, s.table);
}

static void layers(void)
{
    reserve(8, 8192, 64, 2, 4);
    layers_case(WEIGHT_BF16, 16, 2, 3); /* as released: heads that fill every warp */
    layers_case(WEIGHT_FP8, 1, 2, 2);
    layers_case(WEIGHT_NVFP4, 2, 1, 3);
    layers_case(WEIGHT_BF16, 3, 1, 1);
}

#endif
