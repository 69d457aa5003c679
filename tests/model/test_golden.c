/* The forward pass against Hugging Face transformers in float32 (tests/golden/README.md): hidden states after
 * every layer, logits, per-token losses, a greedy continuation; and the property that any split of a prompt
 * into steps gives the same argmax at every position. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "support/models.h"
#include "support/sanitized.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct golden {
    struct safetensors file;
    const int32_t *ids, *argmax, *logits_at, *greedy_prompt, *greedy;
    const float *hidden, *logits, *nll;
    int64_t n_ids, n_hidden, n_logits, n_prompt, n_greedy;
};

static const void *values(const struct golden *g, const char *name, int64_t *n)
{
    const struct tensor *t = safetensors_find(&g->file, name);
    assert_non_null(t);
    assert_int_equal((uintptr_t)t->data % 4, 0);
    if (n) *n = t->shape[t->n_dims > 2 ? 1 : 0];
    return t->data;
}

static void golden_open(struct golden *g, const char *path)
{
    struct err e = { 0 };
    must(safetensors_open(&g->file, path, &e), &e);
    g->ids = values(g, "ids", &g->n_ids);
    g->argmax = values(g, "argmax", NULL);
    g->logits_at = values(g, "logits_at", &g->n_logits);
    g->logits = values(g, "logits", NULL);
    g->hidden = values(g, "hidden_80", &g->n_hidden);
    g->nll = values(g, "nll", NULL);
    g->greedy_prompt = values(g, "greedy_prompt", &g->n_prompt);
    g->greedy = values(g, "greedy", &g->n_greedy);
}

struct hidden_check {
    const struct golden *g;
    const struct backend *backend;
    int n_layers, seen;
    int64_t first; /* tokens before this step */
    double worst;
};

static void check_hidden(void *ctx, const char *name, int layer, struct mat x)
{
    struct hidden_check *h = ctx;
    int at; /* hidden_80[0] is the embedding, [i] the output of layer i - 1, the last one after the final norm
             */
    if (strcmp(name, "embed") == 0)
        at = 0;
    else if (strcmp(name, "layer") == 0 && layer + 1 < h->n_layers)
        at = layer + 1;
    else if (strcmp(name, "final") == 0)
        at = h->n_layers;
    else
        return;
    struct err e = { 0 };
    must(h->backend->ops->wait(h->backend->queue, &e), &e);
    for (int64_t i = 0; i < x.rows && h->first + i < h->g->n_hidden; i++) {
        double error = row_error(x.data + i * x.stride,
                                 h->g->hidden + (at * h->g->n_hidden + h->first + i) * x.cols, x.cols);
        if (!(error <= 1e-3))
            fail_msg("hidden state %d of token %d: relative error %g", at, (int)(h->first + i), error);
        h->worst = fmax(h->worst, error);
        h->seen++;
    }
}

static int64_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

static double loss(const float *logits, int64_t n, int32_t target)
{
    double top = logits[argmax(logits, n)], sum = 0;
    for (int64_t i = 0; i < n; i++) sum += exp(logits[i] - top);
    return top + log(sum) - logits[target];
}

/* Feeds ids in steps of the given sizes (cycled) and calls each with every position's logits. */
static void run_split(struct engine *g, const int32_t *ids, int64_t n, const int *sizes, int n_sizes,
                      void (*each)(void *ctx, int64_t position, const float *logits), void *ctx)
{
    struct err e = { 0 };
    int handle;
    must(engine_open(g, &handle, &e), &e);
    struct row *rows = calloc((size_t)n, sizeof *rows);
    for (int64_t done = 0, k = 0; done < n; k++) {
        int64_t count = sizes[k % n_sizes] < n - done ? sizes[k % n_sizes] : n - done;
        struct mat hidden;
        engine_text_rows(rows, ids + done, count, done);
        must(engine_step(g, &(struct engine_run){ .handle = handle, .rows = rows, .n = count }, 1, &hidden,
                         &e),
             &e);
        for (int64_t i = 0; i < count; i++) each(ctx, done + i, engine_logits_host(g, hidden, &i, 1));
        done += count;
    }
    free(rows);
    engine_close(g, handle);
}

struct logits_check {
    const struct golden *g;
    int64_t vocab;
    bool no_losses;
    double worst_logits, worst_loss;
    int64_t argmax_differs;
};

static void check_logits(void *ctx, int64_t position, const float *logits)
{
    struct logits_check *c = ctx;
    for (int64_t i = 0; i < c->g->n_logits; i++)
        if (c->g->logits_at[i] == position)
            c->worst_logits = fmax(c->worst_logits, row_error(logits, c->g->logits + i * c->vocab, c->vocab));
    if (!c->no_losses && position + 1 < c->g->n_ids)
        c->worst_loss =
            fmax(c->worst_loss, fabs(loss(logits, c->vocab, c->g->ids[position + 1]) - c->g->nll[position]));
    if (argmax(logits, c->vocab) != c->g->argmax[position]) c->argmax_differs++;
}

static void check_model(const char *model, const char *golden, const struct backend_options *o)
{
    struct loaded l;
    struct golden g = { 0 };
    struct err e = { 0 };
    struct engine *engine;
    golden_open(&g, golden);
    load_model(&l, model, o);
    struct engine_options options = { .context = 1024, .kv = KV_F32 };
    must(engine_create(&engine, &l.model, &options, &e), &e);

    /* hidden states, through the step itself */
    struct step *step;
    int n_layers = l.model.config->n_layers;
    struct layer_state *states = calloc((size_t)n_layers, sizeof *states);
    struct row rows[80];
    int32_t pages[] = { 1, 0 };
    for (int i = 0; i < n_layers; i++)
        must(layer_state_create(&states[i], &l.model, i, KV_F32, 2, 1, &e), &e);
    must(step_create(&step, &l.model, 80, 0, 128, &e), &e);
    struct hidden_check h = { .g = &g, .backend = &l.backend, .n_layers = n_layers };
    step_set_tap(step, (struct tap){ &h, check_hidden });
    engine_text_rows(rows, g.ids, 80, 0);
    struct span span = { .n = 80, .pages = pages };
    step_run(step, &(struct step_rows){ rows, 80, &span, 1, false }, states);
    assert_int_equal(h.seen, 80 * (n_layers + 1));
    step_free(step);
    for (int i = 0; i < n_layers; i++) layer_state_free(&states[i], &l.model);
    free(states);

    struct logits_check c = { .g = &g, .vocab = l.model.config->vocab_size };
    run_split(engine, g.ids, g.n_ids, (int[]){ 512 }, 1, check_logits, &c);
    printf("note: %s on %s: worst relative error hidden %.1e, logits %.1e; worst loss error %.1e; %d argmax "
           "differ\n",
           model, l.backend.name, h.worst, c.worst_logits, c.worst_loss, (int)c.argmax_differs);
    assert_true(c.worst_logits <= 1e-3);
    assert_true(c.worst_loss <= 1e-3);
    assert_int_equal(c.argmax_differs, 0);

    /* greedy continuation, a token a step */
    int handle;
    const float *logits;
    must(engine_open(engine, &handle, &e), &e);
    must(engine_prefill(engine, handle, g.greedy_prompt, g.n_prompt, &logits, NULL, &e), &e);
    for (int64_t i = 0; i < g.n_greedy; i++) {
        int32_t token = (int32_t)argmax(logits, c.vocab);
        assert_int_equal(token, g.greedy[i]);
        must(engine_prefill(engine, handle, &token, 1, &logits, NULL, &e), &e);
    }
    engine_free(engine);
    unload_model(&l);
    safetensors_close(&g.file);
}

/* What the tests below run on: QUENCH_DEVICE=cuda, a CPU otherwise. */
static struct backend_options tested = { .device = DEVICE_CPU };

static void demo_on_device(void **state)
{
    (void)state;
    check_model("models/demo", "tests/golden/demo/golden_text.safetensors", &tested);
}

static void demo_on_cpu(void **state)
{
    (void)state;
    enum cpu_isa masks[] = { CPU_ISA_GENERIC, CPU_ISA_AVX2, CPU_ISA_AVX512 };
    for (int i = 0; i < 3; i++)
        check_model("models/demo", "tests/golden/demo/golden_text.safetensors",
                    &(struct backend_options){ .device = DEVICE_CPU, .isa = masks[i] });
}

static void demo_on_ref(void **state)
{
    (void)state;
    check_model("models/demo", "tests/golden/demo/golden_text.safetensors",
                &(struct backend_options){ .device = DEVICE_REF });
}

static void study_on_device(void **state)
{
    (void)state;
    const char *shared = shared_folder("study model against its golden");
    if (!shared) skip();
    char model[512], golden[512];
    snprintf(model, sizeof model, "%s/models/study", shared);
    snprintf(golden, sizeof golden, "%s/models/study-golden/golden_text.safetensors", shared);
    check_model(model, golden, &tested);
}

struct argmax_list {
    int64_t vocab;
    int32_t *best;
    float *margin; /* of the best over the second */
};

static void keep_argmax(void *ctx, int64_t position, const float *logits)
{
    struct argmax_list *l = ctx;
    int64_t best = argmax(logits, l->vocab);
    float second = -INFINITY;
    for (int64_t i = 0; i < l->vocab; i++)
        if (i != best && logits[i] > second) second = logits[i];
    l->best[position] = (int32_t)best;
    l->margin[position] = logits[best] - second;
}

static void any_split_gives_the_same_argmax(void **state)
{
    (void)state;
    static const int splits[][4] = {
        { 1, 1, 1, 1 }, { 7, 1, 33, 2 }, { 64, 63, 65, 1 }, { 32, 31, 3, 129 }, { 300, 5, 200, 64 }
    };
    struct loaded l;
    struct golden g = { 0 };
    struct err e = { 0 };
    struct engine *engine;
    golden_open(&g, "tests/golden/demo/golden_text.safetensors");
    load_model(&l, "models/demo", &tested);
    must(engine_create(&engine, &l.model, &(struct engine_options){ .context = 1024, .kv = KV_F32 }, &e), &e);
    int32_t best[700];
    float margin[700], least = INFINITY;
    assert_int_equal(g.n_ids, 700);
    for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) {
        struct argmax_list list = { l.model.config->vocab_size, best, margin };
        run_split(engine, g.ids, g.n_ids, splits[i], 4, keep_argmax, &list);
        assert_memory_equal(best, g.argmax, sizeof best);
        for (int k = 0; k < 700; k++) least = fminf(least, margin[k]);
    }
    printf("note: smallest margin between the top two logits: %g\n", (double)least);
    engine_free(engine);
    unload_model(&l);
    safetensors_close(&g.file);
}

/* Rows of several sequences in one step, against each sequence alone: the same bits. */
static void check_batched_rows(bool rounded, enum kv_dtype kv)
{
    enum { N = 4, STEPS = 6 };
    struct loaded l;
    struct golden g = { 0 };
    struct err e = { 0 };
    struct engine *engine;
    golden_open(&g, "tests/golden/demo/golden_text.safetensors");
    struct backend_options on = tested;
    on.rounded = rounded;
    load_model(&l, "models/demo", &on);
    struct engine_options o = { .context = 256, .sequences = N, .kv = kv };
    must(engine_create(&engine, &l.model, &o, &e), &e);
    int64_t hidden_size = l.model.config->hidden_size;
    float *alone = malloc(sizeof(float) * (size_t)(N * STEPS * 5 * hidden_size));
    for (int together = 0; together < 2; together++) {
        int handles[N];
        for (int s = 0; s < N; s++) must(engine_open(engine, &handles[s], &e), &e);
        for (int t = 0; t < STEPS; t++) {
            struct row rows[N][5];
            struct engine_run runs[N];
            struct mat hidden;
            int64_t row = 0;
            for (int s = 0; s < N; s++) {
                int64_t n = 1 + (s + t) % 5, past = engine_length(engine, handles[s]);
                engine_text_rows(rows[s], g.ids + 100 * s + past, n, past);
                runs[s] = (struct engine_run){ .handle = handles[s], .rows = rows[s], .n = n };
                if (together) continue;
                must(engine_step(engine, &runs[s], 1, &hidden, &e), &e);
                must(l.backend.ops->wait(l.backend.queue, &e), &e);
                memcpy(alone + ((s * STEPS + t) * 5) * hidden_size, hidden.data,
                       sizeof(float) * (size_t)(n * hidden_size));
            }
            if (!together) continue;
            must(engine_step(engine, runs, N, &hidden, &e), &e);
            must(l.backend.ops->wait(l.backend.queue, &e), &e);
            for (int s = 0; s < N; s++, row += runs[s - 1].n)
                assert_memory_equal(hidden.data + row * hidden_size,
                                    alone + ((s * STEPS + t) * 5) * hidden_size,
                                    sizeof(float) * (size_t)(runs[s].n * hidden_size));
        }
        for (int s = 0; s < N; s++) engine_close(engine, handles[s]);
    }
    free(alone);
    engine_free(engine);
    unload_model(&l);
    safetensors_close(&g.file);
}

static void batched_rows_have_the_bits_of_lone_ones(void **state)
{
    (void)state;
    for (int rounded = 0; rounded < 2; rounded++) {
        check_batched_rows(rounded, KV_BF16);
        if (tested.device != DEVICE_CUDA) check_batched_rows(rounded, KV_INT8);
    }
}

/* Random models of other shapes (tools/make_shape_goldens.py), whole and a few tokens a step. */
static void check_shape(const char *name, const struct backend_options *o)
{
    char path[256];
    struct loaded l;
    struct err e = { 0 };
    struct engine *engine;
    struct golden g = { 0 };
    snprintf(path, sizeof path, "tests/golden/shapes/%s", name);
    load_model(&l, path, o);
    snprintf(path, sizeof path, "tests/golden/shapes/%s/golden.safetensors", name);
    must(safetensors_open(&g.file, path, &e), &e);
    g.ids = values(&g, "ids", &g.n_ids);
    g.logits_at = values(&g, "at", &g.n_logits);
    g.logits = values(&g, "logits", NULL);
    g.argmax = values(&g, "argmax", NULL);
    must(engine_create(&engine, &l.model, &(struct engine_options){ .context = 160, .kv = KV_F32 }, &e), &e);
    static const int splits[][2] = { { 150, 150 }, { 1, 1 }, { 40, 3 } };
    for (int i = 0; i < 3; i++) {
        struct logits_check c = { .g = &g, .vocab = l.model.config->vocab_size, .no_losses = true };
        run_split(engine, g.ids, g.n_ids, splits[i], 2, check_logits, &c);
        if (i == 0) printf("note: %s on %s: logits %.1e\n", name, l.backend.name, c.worst_logits);
        assert_true(c.worst_logits <= 1e-3);
        assert_int_equal(c.argmax_differs, 0);
    }
    engine_free(engine);
    unload_model(&l);
    safetensors_close(&g.file);
}

static void other_shapes(void **state)
{
    static const char *const names[] = { "tied", "all_linear", "all_full", "wide_group" };
    (void)state;
    for (int i = 0; i < 4; i++) {
        check_shape(names[i], &tested);
        if (tested.device == DEVICE_CUDA) continue;
        check_shape(names[i], &(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_GENERIC });
        check_shape(names[i], &(struct backend_options){ .device = DEVICE_REF });
    }
}

int main(void)
{
    const char *device = getenv("QUENCH_DEVICE");
    const struct CMUnitTest on_device[] = {
        cmocka_unit_test(demo_on_device),
        cmocka_unit_test(study_on_device),
        cmocka_unit_test(other_shapes),
        cmocka_unit_test(any_split_gives_the_same_argmax),
        cmocka_unit_test(batched_rows_have_the_bits_of_lone_ones),
    };
    if (device && strcmp(device, "cuda") == 0) {
        tested = (struct backend_options){ .device = DEVICE_CUDA, .shared_memory = true };
        return cmocka_run_group_tests(on_device, NULL, NULL);
    }
    const struct CMUnitTest of_threads[] = {
        cmocka_unit_test(demo_on_device),
        cmocka_unit_test(any_split_gives_the_same_argmax),
        cmocka_unit_test(batched_rows_have_the_bits_of_lone_ones),
    };
    if (RACES) return cmocka_run_group_tests(of_threads, NULL, NULL);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(demo_on_cpu),
        cmocka_unit_test(demo_on_ref),
        cmocka_unit_test(study_on_device),
        cmocka_unit_test(other_shapes),
        cmocka_unit_test(any_split_gives_the_same_argmax),
        cmocka_unit_test(batched_rows_have_the_bits_of_lone_ones),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
