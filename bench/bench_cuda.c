/* Decoding on a GPU at the full size of the 35B-A3B model, the card's mix of formats, random weights.
 * usage: bench_cuda [card|bf16|fast] [LAYERS] [one [bf16|f32|fp8] | batch [ROWS] | verify | prefill [TOKENS]]
 * CSV: what, rows, depth, microseconds (median of 5 runs of 20 steps), lowest, highest, MB that must move,
 * GB/s, share of the read bandwidth measured in this run. "step" is a token without the head; "token" adds
 * "choice", the likeliest token by the head, with the round trip to the host; "sample" is one of the
 * first 20, "head" all logits; the others are all layers' kernels of one kind, one after the other. one: one
 * sequence only, with keys and values in BF16 as elsewhere, or f32, FP8. batch: 8, 32 and 128 only, or ROWS.
 * verify: 1 to 5 rows of one sequence that may be taken back, with a head for each, as a round of speculation
 * checks its drafts. prefill: one sequence's first 512 and 8,192 tokens as one step, 5 runs of 2 steps. */
#include "base/clock.h"
#include "model/step.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    RUNS = 5,
    STEPS = 20,
    ROWS = 128, /* most sequences */
    DRAFTS = 4,
    PROMPT = 8192,
    PROMPT_STEPS = 2,
    CONTEXT = 33024,
    HIDDEN = 2048,
    VOCAB = 248320,
    EXPERTS = 256,
    INNER = 512
};

static struct backend backend;
static struct model model;
static struct step *step;
static struct layer_state *states;
static double bandwidth;
static int kv_bytes;  /* of a number of the cache */
static bool verify;   /* rows are one sequence's, logged, and those of the step before stay */
static uint8_t *pool; /* random bytes that all weights are views of */
static const uint64_t POOL = (uint64_t)VOCAB * HIDDEN * 2;
static float *scales;
static const struct draw greedy[ROWS];
static struct draw sampled[ROWS]; /* as the model's card has it: temperature 1, the first 20, of these 95 % */

static void check(bool ok, const struct err *e)
{
    if (ok) return;
    fprintf(stderr, "bench_cuda: %s\n", e->text);
    exit(1);
}

static uint64_t seed = 1;

static uint64_t next(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return seed >> 16;
}

/* BF16 of magnitude 2^-9 to 2^-5; E4M3 below 2; any FP4 code. One pattern serves all: bit 14 of each pair is
 * 0. */
static void make_pool(void)
{
    pool = malloc(POOL);
    scales = malloc(16384 * sizeof *scales);
    if (!pool || !scales) exit(1);
    uint16_t *p = (uint16_t *)pool;
    uint64_t tile = 1 << 22;
    for (uint64_t i = 0; i < tile; i++) {
        uint64_t r = next();
        p[i] = (uint16_t)((r & 0x80bf) | (118 + (r >> 20 & 3)) << 7);
    }
    for (uint64_t at = tile * 2; at < POOL; at += tile * 2)
        memcpy(pool + at, pool, POOL - at < tile * 2 ? POOL - at : tile * 2);
    for (int i = 0; i < 16384; i++) scales[i] = 0.02f;
}

/* Rows that differ, unlike the pool's: which may be the likeliest depends on how many come close. */
static const void *head_values(void)
{
    uint16_t *values = malloc(POOL);
    uint64_t x = 7;
    if (!values) exit(1);
    for (uint64_t i = 0; i < POOL / 2; i++) {
        if (i % 3 == 0) x = x * 6364136223846793005u + 1442695040888963407u;
        uint64_t r = x >> (16 + i % 3 * 16);
        values[i] = (uint16_t)((r & 0x80bf) | (118 + (r >> 8 & 3)) << 7);
    }
    return values;
}

static double bytes_of(enum weight_format f)
{
    return f == WEIGHT_BF16 ? 2 : f == WEIGHT_FP8 ? 1 : 0.5625;
}

static struct weight *make(enum weight_format f, int64_t rows, int64_t cols, bool table)
{
    struct weight *w;
    struct err e = { 0 };
    static uint8_t *codes, *groups;
    if (!codes) {
        codes = malloc(1 << 26);
        groups = malloc(1 << 20);
        for (int i = 0; i < 1 << 26; i++) codes[i] = (uint8_t)(next() & 0xbf);
        for (int i = 0; i < 1 << 20; i++) groups[i] = (uint8_t)(0x30 + (next() & 15));
    }
    uint64_t offset = (next() % 1024) * 4096;
    bool fp8 = f == WEIGHT_FP8, head = rows == VOCAB && !table;
    struct weight_source src = { .format = f,
                                 .rows = rows,
                                 .cols = cols,
                                 .data = f != WEIGHT_BF16 ? codes + offset
                                         : head           ? head_values()
                                                          : pool + (rows == VOCAB ? 0 : offset),
                                 .scale = fp8 ? (void *)scales : groups,
                                 .global = 200,
                                 .input = fp8 ? INPUT_FP8_ROW : INPUT_AS_IS,
                                 .is_table = table };
    check(backend.ops->weight_create(backend.queue, &w, &src, &e), &e);
    return w;
}

static float *vector(int64_t n, float value)
{
    void *p;
    struct err e = { 0 };
    float *host = malloc((size_t)n * sizeof *host);
    for (int64_t i = 0; i < n; i++) host[i] = value;
    check(backend.ops->memory_create(backend.queue, &p, (uint64_t)n * sizeof *host, &e), &e);
    backend.ops->upload(backend.queue, p, host, (uint64_t)n * sizeof *host);
    free(host);
    return p;
}

static void join(int n, struct weight **list)
{
    backend.ops->weights_join(backend.queue, list, n);
}

static void make_layer(struct layer *l, enum weight_format delta, enum weight_format dense,
                       enum weight_format expert)
{
    struct err e = { 0 };
    l->input_norm = vector(HIDDEN, 1);
    l->post_norm = vector(HIDDEN, 1);
    if (l->kind == LAYER_FULL_ATTENTION)
        l->attention = (struct attention_weights){ make(dense, 8192, HIDDEN, false),
                                                   make(dense, 512, HIDDEN, false),
                                                   make(dense, 512, HIDDEN, false),
                                                   make(dense, HIDDEN, 4096, false),
                                                   vector(256, 1),
                                                   vector(256, 1) };
    else
        l->delta = (struct delta_weights){ make(delta, 8192, HIDDEN, false),
                                           make(delta, 4096, HIDDEN, false),
                                           make(WEIGHT_BF16, 32, HIDDEN, false),
                                           make(WEIGHT_BF16, 32, HIDDEN, false),
                                           make(delta, HIDDEN, 4096, false),
                                           vector(4 * 8192, 0.3f),
                                           vector(32, 0.5f),
                                           vector(32, 0.1f),
                                           vector(128, 1) };
    l->moe = (struct moe_weights){ .router = make(WEIGHT_BF16, EXPERTS, HIDDEN, false),
                                   .shared_gate = make(WEIGHT_BF16, 1, HIDDEN, false),
                                   .gate = make(dense, INNER, HIDDEN, false),
                                   .up = make(dense, INNER, HIDDEN, false),
                                   .down = make(dense, HIDDEN, INNER, false) };
    if (l->kind == LAYER_FULL_ATTENTION)
        join(3, (struct weight *[]){ l->attention.q, l->attention.k, l->attention.v });
    else
        join(4, (struct weight *[]){ l->delta.qkv, l->delta.z, l->delta.a, l->delta.b });
    join(2, (struct weight *[]){ l->moe.gate, l->moe.up });
    struct experts *x = &l->moe.experts;
    x->n_experts = EXPERTS;
    x->gate = calloc(3 * EXPERTS, sizeof *x->gate);
    x->up = x->gate + EXPERTS;
    x->down = x->up + EXPERTS;
    for (int i = 0; i < EXPERTS; i++) {
        x->gate[i] = make(expert, INNER, HIDDEN, false);
        x->up[i] = make(expert, INNER, HIDDEN, false);
        x->down[i] = make(expert, HIDDEN, INNER, false);
    }
    check(backend.ops->experts_bind(backend.queue, x, &e), &e);
}

static struct config config = { .vocab_size = VOCAB,
                                .hidden_size = HIDDEN,
                                .rms_norm_eps = 1e-6,
                                .max_position_embeddings = 262144,
                                .n_heads = 16,
                                .n_kv_heads = 2,
                                .head_dim = 256,
                                .rotary_dim = 64,
                                .linear_key_heads = 16,
                                .linear_value_heads = 32,
                                .linear_key_dim = 128,
                                .linear_value_dim = 128,
                                .conv_kernel = 4,
                                .n_experts = EXPERTS,
                                .experts_per_token = 8,
                                .moe_intermediate = INNER,
                                .shared_intermediate = INNER };
static enum weight_format of_delta, of_dense, of_expert, of_head;

static void make_model(int n_layers)
{
    config.n_layers = n_layers;
    config.layer_kinds = calloc((size_t)n_layers, sizeof *config.layer_kinds);
    model = (struct model){ .config = &config, .backend = &backend };
    model.delta_shape = (struct delta_shape){ 16, 32, 128, 128, 4 };
    model.layers = calloc((size_t)n_layers, sizeof *model.layers);
    void *axis;
    struct err e = { 0 };
    check(backend.ops->memory_create(backend.queue, &axis, 32, &e), &e);
    model.rope = (struct rope){ 32, 1, vector(32, 0.01f), axis };
    for (int i = 0; i < n_layers; i++) {
        config.layer_kinds[i] = model.layers[i].kind =
            i % 4 == 3 ? LAYER_FULL_ATTENTION : LAYER_LINEAR_ATTENTION;
        make_layer(&model.layers[i], of_delta, of_dense, of_expert);
    }
    model.embed = make(WEIGHT_BF16, VOCAB, HIDDEN, true);
    for (int i = 0; i < ROWS; i++)
        sampled[i] =
            (struct draw){ .scale = 1, .reach = DRAW_REACH, .top_k = 20, .top_p = 0.95f, .uniform = 0.5 };
    model.head = make(of_head, VOCAB, HIDDEN, false);
    backend.ops->weight_coarsen(backend.queue, model.head);
    model.final_norm = vector(HIDDEN, 1);
}

/* The first n rows of one sequence. */
static struct step_rows prompt_of(int n)
{
    static struct row rows[PROMPT];
    static struct span span;
    static int32_t pages[PROMPT / KV_PAGE];
    for (int32_t i = 0; i < n; i++)
        rows[i] = (struct row){ .token = (int32_t)(next() % VOCAB), .position = { i, i, i } };
    for (int32_t i = 0; i < PROMPT / KV_PAGE; i++) pages[i] = i;
    span = (struct span){ .n = n, .pages = pages };
    return (struct step_rows){ rows, n, &span, 1, true };
}

/* Rows of sequences that have `depth` tokens. */
static struct step_rows rows_at(int n, int64_t depth)
{
    static struct row rows[ROWS];
    static struct span spans[ROWS];
    static int32_t pages[ROWS][CONTEXT / KV_PAGE + 1];
    if (n > ROWS) return prompt_of(n);
    if (verify) {
        struct step_rows round = prompt_of(n);
        static struct span span;
        span = *round.spans;
        span.past = depth;
        span.logged = true;
        span.kept = n;
        round.spans = &span;
        round.prompts = false;
        return round;
    }
    int64_t each = (depth + 1 + KV_PAGE - 1) / KV_PAGE;
    for (int i = 0; i < n; i++) {
        int32_t p = (int32_t)depth;
        rows[i] = (struct row){ .token = (int32_t)(next() % VOCAB), .position = { p, p, p } };
        for (int64_t k = 0; k < each; k++) pages[i][k] = (int32_t)(i * each + k) % (CONTEXT / KV_PAGE + 1);
        spans[i] = (struct span){ .first = i, .n = 1, .past = depth, .pages = pages[i], .slot = i };
    }
    return (struct step_rows){ rows, n, spans, n, false };
}

static void wait(void)
{
    struct err e = { 0 };
    check(backend.ops->wait(backend.queue, &e), &e);
}

typedef void work(const struct step_rows *rows);

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* recorded: the work is queued as one graph, as a step is. */
static void measure(const char *what, work *w, bool recorded, int n, int64_t depth, double bytes)
{
    double t[RUNS];
    static char keys[128];
    static int key;
    int steps = n > ROWS ? PROMPT_STEPS : STEPS;
    key++;
    for (int run = -1; run < RUNS; run++) {
        double begin = clock_seconds();
        for (int i = 0; i < steps; i++) {
            struct step_rows rows = rows_at(n, depth);
            if (!recorded || !backend.ops->step_begin(backend.queue, &keys[key], &rows)) w(&rows);
            if (recorded) backend.ops->step_end(backend.queue);
        }
        wait();
        if (run >= 0) t[run] = (clock_seconds() - begin) / steps;
    }
    qsort(t, RUNS, sizeof *t, by_value);
    double median = t[RUNS / 2];
    printf("%s,%d,%lld,%.1f,%.1f,%.1f,%.1f,%.0f,%.3f\n", what, n, (long long)depth, median * 1e6, t[0] * 1e6,
           t[RUNS - 1] * 1e6, bytes * 1e-6, bytes / median * 1e-9, bytes / median / bandwidth);
    fflush(stdout);
}

static void whole_step(const struct step_rows *rows)
{
    step_run(step, rows, states);
}

static void token(const struct step_rows *rows)
{
    int64_t index[ROWS];
    int32_t best[ROWS];
    for (int i = 0; i < rows->n; i++) index[i] = i;
    step_draw(step, best, step_run(step, rows, states), index, rows->n, NULL, greedy);
}

static void head(const struct step_rows *rows)
{
    step->op->matmul(step->q, mat_rows(step->logits, rows->n), mat_rows(step->h, rows->n), model.head);
}

static void choice(const struct step_rows *rows)
{
    int32_t best[ROWS];
    step->op->draw_product(step->q, best, mat_rows(step->logits, rows->n), mat_rows(step->h, rows->n),
                           model.head, NULL, greedy);
}

static void sample(const struct step_rows *rows)
{
    int32_t drawn[ROWS];
    step->op->draw_product(step->q, drawn, mat_rows(step->logits, rows->n), mat_rows(step->h, rows->n),
                           model.head, NULL, sampled);
}

/* The kernels of one kind of all layers; state from the layers' own. */

static struct norm_products in_products(const struct layer *l, int64_t n)
{
    if (l->kind == LAYER_FULL_ATTENTION)
        return (struct norm_products){ mat_rows(step->h, n),
                                       mat_rows(step->x, n),
                                       l->input_norm,
                                       1e-6f,
                                       3,
                                       { mat_rows(step->qg, n), mat_rows(step->k, n), mat_rows(step->v, n) },
                                       { l->attention.q, l->attention.k, l->attention.v },
                                       .lean = true };
    return (struct norm_products){ mat_rows(step->h, n),
                                   mat_rows(step->x, n),
                                   l->input_norm,
                                   1e-6f,
                                   4,
                                   { mat_rows(step->u, n), mat_rows(step->z, n), mat_rows(step->a, n),
                                     mat_rows(step->b, n) },
                                   { l->delta.qkv, l->delta.z, l->delta.a, l->delta.b },
                                   .lean = true };
}

static void run_in(enum layer_kind kind, int64_t n)
{
    for (int i = 0; i < config.n_layers; i++) {
        struct norm_products p = in_products(&model.layers[i], n);
        if (model.layers[i].kind == kind) step->op->norm_products(step->q, &p);
    }
}

static void delta_in(const struct step_rows *rows)
{
    run_in(LAYER_LINEAR_ATTENTION, rows->n);
}

static void attention_in(const struct step_rows *rows)
{
    run_in(LAYER_FULL_ATTENTION, rows->n);
}

static void delta_mix(const struct step_rows *rows)
{
    int64_t n = rows->n;
    for (int i = 0; i < config.n_layers; i++) {
        const struct delta_weights *w = &model.layers[i].delta;
        if (model.layers[i].kind == LAYER_FULL_ATTENTION) continue;
        struct delta_run r = { mat_rows(step->x, n),
                               mat_rows(step->y, n),
                               mat_rows(step->u, n),
                               mat_rows(step->conv, n),
                               mat_rows(step->z, n),
                               mat_rows(step->a, n),
                               mat_rows(step->b, n),
                               mat_rows(step->raw, n),
                               mat_rows(step->o, n),
                               w->conv,
                               w->A_log,
                               w->dt_bias,
                               w->norm,
                               1e-6f,
                               w->out,
                               &states[i].delta,
                               &model.delta_shape,
                               .lean = true };
        step->op->delta_run(step->q, &r, rows);
    }
}

static void attention_mix(const struct step_rows *rows)
{
    int64_t n = rows->n;
    for (int i = 0; i < config.n_layers; i++) {
        const struct attention_weights *w = &model.layers[i].attention;
        if (model.layers[i].kind != LAYER_FULL_ATTENTION) continue;
        struct attention_run r = { mat_rows(step->x, n),
                                   mat_rows(step->y, n),
                                   mat_rows(step->qg, n),
                                   mat_rows(step->k, n),
                                   mat_rows(step->v, n),
                                   mat_rows(step->att, n),
                                   16,
                                   w->q_norm,
                                   w->k_norm,
                                   1e-6f,
                                   &model.rope,
                                   &states[i].kv,
                                   w->o,
                                   .lean = true };
        step->op->attention_run(step->q, &r, rows);
    }
}

static struct moe_run experts_run(const struct layer *l, int64_t n)
{
    return (struct moe_run){ mat_rows(step->x, n),
                             mat_rows(step->y, n),
                             mat_rows(step->h, n),
                             mat_rows(step->router, n),
                             mat_rows(step->gate, n),
                             mat_rows(step->up, n),
                             mat_rows(step->hidden, n),
                             mat_rows(step->shared, n),
                             mat_rows(step->shared_gate, n),
                             &step->picks,
                             &l->moe.experts,
                             l->moe.down,
                             .lean = true };
}

static void router(const struct step_rows *rows)
{
    int64_t n = rows->n;
    for (int i = 0; i < config.n_layers; i++) {
        const struct layer *l = &model.layers[i];
        struct moe_run r = experts_run(l, n);
        struct norm_products p = { r.h,
                                   r.x,
                                   l->post_norm,
                                   1e-6f,
                                   4,
                                   { r.logits, r.shared_gate, r.gate, r.up },
                                   { l->moe.router, l->moe.shared_gate, l->moe.gate, l->moe.up },
                                   .reader = &r };
        step->op->norm_products(step->q, &p);
    }
}

static void moe(const struct step_rows *rows)
{
    for (int i = 0; i < config.n_layers; i++) {
        struct moe_run r = experts_run(&model.layers[i], rows->n);
        step->op->moe_run(step->q, &r);
    }
}

static void seen(void *ctx, const char *name, int layer, struct mat x)
{
    (void)ctx, (void)name, (void)layer, (void)x;
}

/* FNV-1a: two builds that print the same number give the same bits. */
static uint64_t digest(const void *data, size_t bytes)
{
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < bytes; i++) h = (h ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    return h;
}

/* A recorded step has the bits of the same operations one by one: the first tokens of a sequence, both ways.
 */
static void check_recorded(void)
{
    enum { TOKENS = 8 };
    static float hidden[2][TOKENS][HIDDEN];
    for (int way = 0; way < 2; way++) {
        for (int i = 0; i < config.n_layers; i++) layer_state_reset(&states[i], &model, i, 0);
        step_set_tap(step, (struct tap){ .call = way == 0 ? seen : NULL });
        seed = 1;
        for (int t = 0; t < TOKENS; t++) {
            struct step_rows rows = rows_at(1, t);
            struct mat h = step_run(step, &rows, states);
            backend.ops->download(backend.queue, hidden[way][t], h.data, sizeof hidden[way][t]);
        }
    }
    wait();
    for (int t = 0; t < TOKENS; t++)
        if (memcmp(hidden[0][t], hidden[1][t], sizeof hidden[0][t]) != 0) {
            fprintf(stderr, "bench_cuda: token %d: a recorded step gives other bits than its operations\n",
                    t);
            exit(1);
        }
    printf("# recorded steps have the bits of their operations: %d tokens, digest %016llx\n", TOKENS,
           (unsigned long long)digest(hidden[1], sizeof hidden[1]));
}

/* Bytes that must move, experts of different rows taken as different ones with even odds. */
struct bytes {
    double delta_in, delta_mix, attention_in, attention_mix, router, moe, head, choice;
};

/* Recurrent states read and written; of logged rows the log instead of what follows each state. */
static double state_bytes(int n)
{
    double state = 2 * 32 * 128 * 128 * 4, row = 6 * 8192 * 4.0;
    if (verify) return state + n * 2.0 * (double)delta_log_floats(&model.delta_shape) * sizeof(float);
    return n * (state + row);
}

static struct bytes bytes_for(int n, int64_t depth)
{
    int full = config.n_layers / 4, linear = config.n_layers - full;
    double miss = 1, d = bytes_of(of_dense);
    for (int i = 0; i < n; i++) miss *= 1 - 8.0 / EXPERTS;
    return (struct bytes){
        .delta_in = linear * (12288.0 * HIDDEN * bytes_of(of_delta) + 64.0 * HIDDEN * 2),
        .delta_mix = linear * (4096.0 * HIDDEN * bytes_of(of_delta) + state_bytes(n)),
        .attention_in = full * 9216.0 * HIDDEN * d,
        .attention_mix = full * (4096.0 * HIDDEN * d + (verify ? 1 : n) * (depth + 1.0) * 1024 * kv_bytes),
        .router = config.n_layers * HIDDEN * (257.0 * 2 + 2 * INNER * d),
        .moe = config.n_layers * INNER * HIDDEN * (d + 3.0 * EXPERTS * (1 - miss) * bytes_of(of_expert)),
        .head = (double)VOCAB * HIDDEN * bytes_of(of_head),
        .choice = draws_coarse(model.head, n, greedy) ? (double)model.head->coarse_bytes
                                                      : (double)VOCAB * HIDDEN * bytes_of(of_head),
    };
}

static void measure_all(int n, int64_t depth, bool parts)
{
    struct bytes b = bytes_for(n, depth);
    double all = b.delta_in + b.delta_mix + b.attention_in + b.attention_mix + b.router + b.moe;
    measure("step", whole_step, false, n, depth, all);
    measure("token", token, false, n, depth, all + b.choice);
    if (!parts) return;
    measure("delta in", delta_in, true, n, depth, b.delta_in);
    measure("delta and out", delta_mix, true, n, depth, b.delta_mix);
    measure("attention in", attention_in, true, n, depth, b.attention_in);
    measure("attention and out", attention_mix, true, n, depth, b.attention_mix);
    measure("router", router, true, n, depth, b.router);
    measure("experts", moe, true, n, depth, b.moe);
    measure("head", head, false, n, depth, b.head);
    measure("choice", choice, false, n, depth, b.choice);
    measure("sample", sample, false, n, depth, b.choice);
}

/* Tokens a second go where the bytes go: what moves is not the bound. */
static void measure_prompt(int n)
{
    static const struct {
        const char *what;
        work *w;
    } parts[] = { { "prompt", whole_step },
                  { "delta in", delta_in },
                  { "delta and out", delta_mix },
                  { "attention in", attention_in },
                  { "attention and out", attention_mix },
                  { "router", router },
                  { "experts", moe } };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        measure(parts[i].what, parts[i].w, false, n, 0, n);
}

int main(int argc, char **argv)
{
    const char *mix = argc > 1 ? argv[1] : "card";
    bool bf16 = strcmp(mix, "bf16") == 0, fast = strcmp(mix, "fast") == 0;
    int n_layers = argc > 2 ? atoi(argv[2]) : 40;
    bool prefill = argc > 3 && strcmp(argv[3], "prefill") == 0, one = argc > 3 && strcmp(argv[3], "one") == 0;
    bool batch = argc > 3 && strcmp(argv[3], "batch") == 0;
    const char *cache = one && argc > 4 ? argv[4] : "bf16";
    enum kv_dtype kv = strcmp(cache, "f32") == 0 ? KV_F32 : strcmp(cache, "fp8") == 0 ? KV_FP8 : KV_BF16;
    kv_bytes = kv == KV_F32 ? 4 : kv == KV_FP8 ? 1 : 2;
    int rows = batch && argc > 4 ? atoi(argv[4]) : 0;
    verify = argc > 3 && strcmp(argv[3], "verify") == 0;
    struct err e = { 0 };
    of_delta = of_head = fast ? WEIGHT_FP8 : WEIGHT_BF16;
    of_dense = bf16 ? WEIGHT_BF16 : WEIGHT_FP8;
    of_expert = bf16 ? WEIGHT_BF16 : WEIGHT_NVFP4;
    check(backend_create(&backend, &(struct backend_options){ .device = DEVICE_CUDA, .rounded = true }, &e),
          &e);
    bandwidth = backend.ops->read_speed(backend.queue);
    double begin = clock_seconds();
    make_pool();
    make_model(n_layers);
    wait();
    states = calloc((size_t)n_layers, sizeof *states);
    for (int i = 0; i < n_layers; i++)
        check(layer_state_create(&states[i], &model, i, kv, CONTEXT / KV_PAGE + 1, ROWS, &e), &e);
    for (int i = 0; verify && i < n_layers; i++)
        check(layer_state_add_log(&states[i], &model, i, ROWS, DRAFTS + 1, &e), &e);
    check(step_create(&step, &model, prefill ? PROMPT : 256, ROWS, CONTEXT, &e), &e);
    printf("# %s; mix %s, %d layers; read bandwidth %.3f TB/s; weights made and loaded in %.1f s\n",
           backend.name, mix, n_layers, bandwidth * 1e-12, clock_seconds() - begin);
    if (!prefill && !verify) check_recorded();
    printf("what,rows,depth,us,us_low,us_high,MB,GB_per_s,share_of_read\n");
    if (prefill) {
        if (argc > 4)
            measure("prompt", whole_step, false, atoi(argv[4]), 0, 0);
        else
            measure_prompt(512), measure_prompt(PROMPT);
        return 0;
    }
    for (int n = 1; verify && n <= DRAFTS + 1; n++) measure_all(n, 0, true);
    if (rows) measure_all(rows, 0, true);
    if (verify || rows) return 0;
    if (!batch) {
        measure_all(1, 0, true);
        measure_all(1, 32768, false);
    }
    if (one) return 0;
    if (!batch) measure_all(4, 0, false);
    measure_all(8, 0, batch);
    measure_all(32, 0, batch);
    measure_all(128, 0, batch);
    return 0;
}
