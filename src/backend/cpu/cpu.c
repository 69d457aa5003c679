/* The CPU backend's queue: threads, scratch sized for the largest step, and the table of operations. */
#include "backend/cpu/parts.h"
#include "backend/fused.h"
#include "backend/host.h"
#include "base/arena.h"
#include <stdlib.h>
#include <string.h>

const struct cpu_kernels *cpu_kernels_select(enum cpu_isa isa)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    /* Whatever has AVX2 and FMA has F16C, which clang 14 cannot ask for. */
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                __builtin_cpu_supports("avx512vbmi");
    if (bf16 && (isa == CPU_ISA_BEST || isa >= CPU_ISA_AMX) && cpu_amx_request()) return &cpu_kernels_amx;
    /* of the processors with BF16 products, Zen 5 has this too */
    bool zen5 = bf16 && __builtin_cpu_supports("avx512vp2intersect");
    if (bf16 && (isa == CPU_ISA_BEST || isa >= CPU_ISA_AVX512BF16))
        return zen5 ? &cpu_kernels_zen5 : &cpu_kernels_avx512bf16;
    if (avx512 && (isa == CPU_ISA_BEST || isa >= CPU_ISA_AVX512)) return &cpu_kernels_avx512;
    if (avx2 && (isa == CPU_ISA_BEST || isa >= CPU_ISA_AVX2)) return &cpu_kernels_avx2;
#else
    (void)isa;
#endif
    return &cpu_kernels_generic;
}

bool cpu_queue_create(struct queue **out, const struct backend_options *o, struct err *e)
{
    struct queue *q = calloc(1, sizeof *q);
    *out = q;
    if (!q) return err_memory(e, "CPU backend", sizeof *q);
    q->k = cpu_kernels_select(o->isa);
    q->rounded = o->rounded;
    if (pool_create(&q->pool, o->threads > 0 ? o->threads : pool_default_threads(), e)) return true;
    free(q);
    *out = NULL;
    return false;
}

void cpu_queue_free(struct queue *q)
{
    if (!q) return;
    pool_free(q->pool);
    free(q->memory);
    free(q->threads);
    slab_free_current(&q->slab);
    free(q);
}

int cpu_queue_threads(const struct queue *q)
{
    return pool_threads(q->pool);
}

const char *cpu_queue_isa(const struct queue *q)
{
    return q->k->name;
}

static int64_t largest(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static void layout(struct queue *q, struct arena *a)
{
    const struct step_limits *l = &q->limits;
    int n_threads = pool_threads(q->pool);
    int64_t picked = l->rows * l->picks, wide = largest(l->cols, l->intermediate);
    q->words_most = wide + 4;
    int64_t delta = DELTA_CHUNK * (3 * l->cols + 2 * DELTA_CHUNK); /* a row holds a head's q, k and v */
    for (int t = 0; t < n_threads; t++) {
        struct cpu_thread *s = &q->threads[t];
        s->panel = arena_take(a, (int64_t)DECODE_COLUMNS * PANEL, sizeof(float), 64);
        s->sums = arena_take(a, 2 * PANELS_MAX * l->rows * PANEL, sizeof(float), 64);
        s->scores = arena_take(a, ATTEND_HEADS_MAX * cpu_attend_part(l->context), sizeof(float), 64);
        s->attended = arena_take(a, ATTEND_PARTS_MAX * l->cols, sizeof(float), 64);
        s->work = arena_take(a, delta, sizeof(float), 64);
        s->quantized = arena_take(a, wide, sizeof(float), 64);
    }
    q->rounded_rows = arena_take(a, largest(l->rows, picked) * q->words_most, sizeof *q->rounded_rows, 64);
    q->packed = arena_take(a, largest(l->rows, picked) * q->words_most, sizeof *q->packed, 64);
    q->row_scale = arena_take(a, largest(l->rows, picked), sizeof(float), 64);
    q->hidden = arena_take(a, picked * l->intermediate, sizeof(float), 64);
    q->outputs = arena_take(a, picked * l->cols, sizeof(float), 64);
    /* a row's queries and gates, 2 * heads * head_dim, leave room for head_dim + 2 */
    q->attended = arena_take(a, (int64_t)ROWS_EXACT * ATTEND_PARTS_MAX * l->cols, sizeof(float), 64);
    q->order = arena_take(a, picked, sizeof *q->order, 64);
    q->begin = arena_take(a, l->n_experts + 1, sizeof *q->begin, 64);
    q->active = arena_take(a, l->n_experts, sizeof *q->active, 64);
}

static bool reserve(struct queue *q, const struct step_limits *l, struct err *e)
{
    struct step_limits *have = &q->limits, had = *have;
    have->rows = largest(have->rows, l->rows);
    have->cols = largest(have->cols, l->cols);
    have->context = largest(have->context, l->context);
    have->intermediate = largest(have->intermediate, l->intermediate);
    have->picks = (int)largest(have->picks, l->picks);
    have->n_experts = (int)largest(have->n_experts, l->n_experts);
    if (q->memory && memcmp(&had, have, sizeof had) == 0) return true;
    if (!q->threads) q->threads = calloc((size_t)pool_threads(q->pool), sizeof *q->threads);
    if (!q->threads) return err_memory(e, "CPU backend", 0);
    free(q->memory);
    q->memory = NULL;
    struct arena a = { 0 };
    layout(q, &a);
    if (!arena_back(&a, "scratch of the CPU backend", e)) return false;
    q->memory = (float *)a.memory;
    layout(q, &a);
    return true;
}

static void draw_product(struct queue *q, int32_t *out, struct mat y, struct mat x, const struct weight *w,
                         const uint32_t *allowed, const struct draw *draws)
{
    fused_draw_product(&cpu_ops, q, out, y, x, w, allowed, draws);
}

static void norm_products(struct queue *q, const struct norm_products *r)
{
    cpu_rmsnorm(q, r->h, r->x, r->gain, r->eps);
    cpu_products(q, r->n, r->out, r->h, r->w);
}

static void delta_run(struct queue *q, const struct delta_run *r, const struct step_rows *rows)
{
    fused_delta(&cpu_ops, q, r, rows);
}

static void attention_run(struct queue *q, const struct attention_run *r, const struct step_rows *rows)
{
    fused_attention(&cpu_ops, q, r, rows);
}

static void moe_run(struct queue *q, const struct moe_run *r)
{
    fused_moe(&cpu_ops, q, r);
}

static void observe(struct queue *q, const struct observation *o, struct mat x, const struct experts *experts)
{
    fused_observe(&cpu_ops, q, o, x, experts);
}

static bool weights_create(struct queue *q, struct weight **out, const struct weight_source *src, int n,
                           int *failed, struct err *e)
{
    return fused_weights(&cpu_ops, q, out, src, n, failed, e);
}

const struct ops cpu_ops = {
    .name = "cpu",
    .weight_create = cpu_weight_create,
    .weights_create = weights_create,
    .weights_join = host_weights_join,
    .coarse_bytes = host_coarse_bytes,
    .weight_coarsen = host_weight_coarsen,
    .weight_free = cpu_weight_free,
    .memory_create = host_memory_create,
    .memory_free = host_memory_free,
    .upload = host_copy,
    .copy = host_copy,
    .download = host_copy,
    .zero = host_zero,
    .reserve = reserve,
    .reserve_bytes = host_reserve_bytes,
    .experts_bind = host_experts_bind,
    .experts_unbind = host_experts_unbind,
    .wait = host_wait,
    .read_speed = host_read_speed,
    .product_speed = cpu_product_speed,
    .step_begin = host_step_begin,
    .step_end = host_step_end,
    .embed = cpu_embed,
    .matmul = cpu_matmul,
    .add = cpu_add,
    .rmsnorm = cpu_rmsnorm,
    .gather = cpu_gather,
    .silu_mul = cpu_silu_mul,
    .add_gated = cpu_add_gated,
    .norm_rope = cpu_norm_rope,
    .kv_append = cpu_kv_append,
    .attention = cpu_attention,
    .conv = cpu_conv,
    .delta = cpu_delta,
    .gated_norm = cpu_gated_norm,
    .layer_norm = cpu_layer_norm,
    .add_bias = cpu_add_bias,
    .rotate = cpu_rotate,
    .attention_all = cpu_attention_all,
    .route = cpu_route,
    .experts = cpu_experts,
    .absmax = host_absmax,
    .moments = cpu_moments,
    .log_softmax = cpu_log_softmax,
    .divergence = cpu_divergence,
    .pick = host_pick,
    .argmax = host_argmax,
    .mask = host_mask,
    .edit = host_edit,
    .draw = cpu_draw,
    .draw_product = draw_product,
    .norm_products = norm_products,
    .delta_run = delta_run,
    .attention_run = attention_run,
    .moe_run = moe_run,
    .observe = observe,
};
