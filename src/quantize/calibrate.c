/* Runs the samples through the network a layer at a time and keeps maxima. Takes the source checkpoint and
 * token lists, gives a few thousand numbers, and to a sink each layer's second moments. */
#include "quantize/calibrate.h"
#include "base/checked.h"
#include "base/file.h"
#include "base/pages.h"
#include "model/model.h"
#include "num/bf16.h"
#include "quantize/source.h"
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct calibrator {
    struct calibration *result;
    const struct calibration_options *options;
    const struct samples *samples;
    const struct calibration_sink *sink;
    const struct report *report;
    struct backend *backend;
    struct model model;
    struct step *step;
    int64_t rows_max, hidden, inner;
    int64_t sample; /* that runs */
    int files[2];   /* residual stream of every token in front of even and of odd layers; -1: not open */
    char *paths[2];
    float *states;    /* host: that of one step */
    struct row *rows; /* of one step */
    int32_t *picked;  /* host: the experts of one step's rows */
    int32_t *pages;   /* of the one sequence that runs: page i is page i */
    uint32_t *top;    /* host: what largest holds */
    int64_t n_top;
    /* the backend's memory */
    void *x, *block; /* [rows_max][hidden]: the residual stream, the MoE block's input */
    void *gate, *up; /* [rows_max][together * inner] */
    void *largest;   /* [INPUT_EXPERT + n_experts], of the current layer, by module_input and by expert */
    struct moments sums[2]; /* what is summed: the sink's moments and held, or, where the backend has memory
                               of its own, theirs in it */
    int64_t together;       /* experts observed side by side */
};

/* A GPU has work for all its processors with so many. */
enum { TOGETHER = 64 };

static bool alloc_host(void **out, int64_t rows, int64_t cols, size_t each, const char *what, struct err *e)
{
    uint64_t n, bytes;
    if (!fits_mul((uint64_t)rows, (uint64_t)cols, &n) || !fits_mul(n, each, &bytes) || bytes > INT64_MAX)
        return err_set(e, ERR_LIMIT, "%s: size does not fit 63 bits", what);
    *out = malloc(bytes + 1);
    return *out || err_memory(e, what, bytes);
}

/* Room for sums of what the sink wants. */
static bool create_sums(struct calibrator *k, const struct moments *wanted, struct moments *sums,
                        struct err *e)
{
    const struct ops *op = k->backend->ops;
    void *block = NULL, *down = NULL;
    if (!wanted) return true;
    *sums = *wanted;
    if (!k->backend->memory) return true;
    bool ok = op->memory_create(k->backend->queue, &block, moments_block_bytes(wanted), e) &&
              op->memory_create(k->backend->queue, &down, moments_down_bytes(wanted), e);
    sums->block = block;
    sums->down = down;
    return ok;
}

static bool create_buffers(struct calibrator *k, struct err *e)
{
    const struct config *c = k->model.config;
    const struct ops *op = k->backend->ops;
    struct queue *q = k->backend->queue;
    int64_t n_pages = (k->samples->longest + KV_PAGE - 1) / KV_PAGE;
    void *states = NULL, *rows = NULL, *pages = NULL, *top = NULL, *picked = NULL;
    uint64_t column = (uint64_t)k->rows_max * sizeof(float);
    uint64_t wide = column * (uint64_t)(k->together * k->inner);
    k->n_top = INPUT_EXPERT + c->n_experts;
    bool ok =
        alloc_host(&states, k->rows_max, k->hidden, sizeof(float), "calibration rows", e) &&
        alloc_host(&rows, k->rows_max, 1, sizeof(struct row), "calibration rows", e) &&
        alloc_host(&pages, n_pages, 1, sizeof(int32_t), "page list", e) &&
        alloc_host(&picked, k->rows_max, c->experts_per_token, sizeof(int32_t), "calibration rows", e) &&
        alloc_host(&top, k->n_top, 1, sizeof *k->top, "largest inputs", e) &&
        op->memory_create(q, &k->x, column * (uint64_t)k->hidden, e) &&
        op->memory_create(q, &k->block, column * (uint64_t)k->hidden, e) &&
        op->memory_create(q, &k->gate, wide, e) && op->memory_create(q, &k->up, wide, e) &&
        op->memory_create(q, &k->largest, (uint64_t)k->n_top * sizeof *k->top, e) &&
        create_sums(k, k->sink->moments, &k->sums[0], e) && create_sums(k, k->sink->held, &k->sums[1], e);
    k->states = states;
    k->rows = rows;
    k->pages = pages;
    k->picked = picked;
    k->top = top;
    for (int64_t i = 0; ok && i < n_pages; i++) k->pages[i] = (int32_t)i;
    if (ok) memset(picked, 0, (size_t)k->rows_max * (size_t)c->experts_per_token * sizeof *k->picked);
    return ok;
}

static void keep_input(void *ctx, const char *name, int layer, struct mat x)
{
    static const struct {
        const char *name;
        enum module_input input;
    } taps[] = {
        { "mixer.in", INPUT_MIXER },      { "attention.out", INPUT_MIXER_OUT },
        { "delta.out", INPUT_MIXER_OUT }, { "shared.hidden", INPUT_SHARED },
        { "moe.in", INPUT_BLOCK },
    };
    struct calibrator *k = ctx;
    const struct ops *op = k->backend->ops;
    (void)layer;
    for (size_t i = 0; i < sizeof taps / sizeof *taps; i++) {
        if (strcmp(name, taps[i].name) != 0) continue;
        op->absmax(k->backend->queue, (uint32_t *)k->largest + taps[i].input, x);
        if (taps[i].input == INPUT_BLOCK) /* for the experts */
            op->copy(k->backend->queue, k->block, x.data, (uint64_t)(x.rows * x.cols) * sizeof(float));
    }
}

/* Rows [past, past + n) of a sample, as one span. */
static struct step_rows step_rows_of(struct calibrator *k, struct span *span, int64_t sample, int64_t past,
                                     int64_t n)
{
    const int32_t *tokens = k->samples->tokens + k->samples->begin[sample] + past;
    for (int64_t i = 0; i < n; i++) {
        int32_t at = (int32_t)(past + i);
        k->rows[i] = (struct row){ .token = tokens[i], .position = { at, at, at } };
    }
    *span = (struct span){ .n = n, .past = past, .pages = k->pages };
    return (struct step_rows){ k->rows, n, span, 1, false };
}

/* All experts on all rows of the step whose MoE input was kept. */
static void observe(struct calibrator *k, int layer, int64_t n)
{
    const struct moments *m = &k->sums[k->sink->held && k->sample >= k->sink->held_from];
    int64_t wide = k->together * k->inner;
    struct observation o = { .top = (uint32_t *)k->largest + INPUT_EXPERT,
                             .block = m->block,
                             .down = m->down,
                             .gate = mat_of(k->gate, n, wide),
                             .up = mat_of(k->up, n, wide) };
    k->backend->ops->observe(k->backend->queue, &o, mat_of(k->block, n, k->hidden),
                             &k->model.layers[layer].moe.experts);
}

static void count_picks(struct calibrator *k, int layer, int64_t rows)
{
    const struct picks *p = step_picks(k->step);
    int64_t n = rows * p->k, *routed = k->result->routed + (int64_t)layer * k->result->n_experts;
    k->backend->ops->download(k->backend->queue, k->picked, p->expert, (uint64_t)n * sizeof *k->picked);
    for (int64_t i = 0; i < n; i++) routed[k->picked[i]]++;
}

static bool open_states(struct calibrator *k, struct err *e)
{
    static const char *const names[2] = { "states-0", "states-1" };
    for (int i = 0; i < 2; i++) {
        k->paths[i] = file_join(k->options->folder, names[i]);
        if (!k->paths[i]) return err_memory(e, "path", strlen(k->options->folder));
        k->files[i] = open(k->paths[i], O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (k->files[i] < 0) return err_errno(e, k->paths[i]);
    }
    return true;
}

/* Of the step's rows, in front of `layer`. */
static bool read_states(struct calibrator *k, int layer, uint64_t at, uint64_t bytes, struct err *e)
{
    return file_read_at(k->files[layer & 1], k->states, bytes, at, e) ||
           err_note(e, "%s", k->paths[layer & 1]);
}

static bool write_states(struct calibrator *k, int layer, uint64_t at, uint64_t bytes, struct err *e)
{
    return file_write_at(k->files[layer & 1], k->states, bytes, at, e) ||
           err_note(e, "%s", k->paths[layer & 1]);
}

static bool sync_states(struct calibrator *k, int layer, struct err *e)
{
    return fdatasync(k->files[layer & 1]) == 0 || err_errno(e, k->paths[layer & 1]);
}

/* Nobody reads the states behind the last layer. */
static bool has_next(const struct calibrator *k, int layer)
{
    return layer + 1 < k->result->n_layers;
}

static void embed_rows(struct calibrator *k, const struct step_rows *rows)
{
    struct mat x = step_embed(k->step, rows);
    k->backend->ops->download(k->backend->queue, k->states, x.data,
                              (uint64_t)(x.rows * x.cols) * sizeof(float));
}

static void layer_rows(struct calibrator *k, int layer, const struct layer_state *state,
                       const struct step_rows *rows)
{
    const struct ops *op = k->backend->ops;
    struct queue *q = k->backend->queue;
    uint64_t bytes = (uint64_t)(rows->n * k->hidden) * sizeof(float);
    op->upload(q, k->x, k->states, bytes);
    step_layer(k->step, layer, mat_of(k->x, rows->n, k->hidden), rows, state);
    op->download(q, k->states, k->x, bytes);
    count_picks(k, layer, rows->n);
    observe(k, layer, rows->n);
}

/* One step of a sample; layer -1: the embedding. */
static bool run_step(struct calibrator *k, int layer, const struct layer_state *state, int64_t sample,
                     int64_t past, int64_t n, struct err *e)
{
    struct span span;
    struct step_rows rows = step_rows_of(k, &span, sample, past, n);
    uint64_t row = (uint64_t)k->hidden * sizeof(float), bytes = (uint64_t)n * row;
    uint64_t at = (uint64_t)(k->samples->begin[sample] + past) * row;
    if (layer < 0) {
        embed_rows(k, &rows);
        return write_states(k, 0, at, bytes, e);
    }
    if (!read_states(k, layer, at, bytes, e)) return false;
    layer_rows(k, layer, state, &rows);
    k->result->tokens += n;
    report_progress(k->report, "calibrate", (uint64_t)k->result->tokens,
                    (uint64_t)k->samples->n_tokens * (uint64_t)k->result->n_layers);
    return !has_next(k, layer) || write_states(k, layer + 1, at, bytes, e);
}

static bool run_steps(struct calibrator *k, int layer, struct layer_state *state, struct err *e)
{
    for (int64_t s = 0; s < k->samples->n; s++) {
        k->sample = s;
        int64_t length = k->samples->begin[s + 1] - k->samples->begin[s];
        if (state) layer_state_reset(state, &k->model, layer, 0);
        for (int64_t past = 0; past < length; past += k->rows_max) {
            int64_t n = length - past < k->rows_max ? length - past : k->rows_max;
            if (!run_step(k, layer, state, s, past, n, e)) return false;
        }
    }
    return true;
}

static bool take_maximum(float *out, uint32_t bits, const char *what, int layer, int expert, struct err *e)
{
    *out = bf16_round(f32_from_bits(bits));
    if (f32_bits(*out) < 0x7f800000u) return true;
    char whose[40] = "";
    if (expert >= 0) snprintf(whose, sizeof whose, ", expert %d", expert);
    return err_set(e, ERR_FORMAT,
                   "calibration: layer %d%s: the input of %s has %s: are the source's weights intact?", layer,
                   whose, what, bits > 0x7f800000u ? "NaN values" : "values beyond BF16");
}

static void clear_sums(struct calibrator *k, struct moments *sums)
{
    const struct ops *op = k->backend->ops;
    if (!sums->block) return;
    op->zero(k->backend->queue, sums->block, moments_block_bytes(sums));
    op->zero(k->backend->queue, sums->down, moments_down_bytes(sums));
}

static void fetch_sums(struct calibrator *k, struct moments *to, const struct moments *sums)
{
    const struct ops *op = k->backend->ops;
    if (!to || !to->block || to->block == sums->block) return;
    op->download(k->backend->queue, to->block, sums->block, moments_block_bytes(sums));
    op->download(k->backend->queue, to->down, sums->down, moments_down_bytes(sums));
}

static bool finish_layer(struct calibrator *k, int layer, struct err *e)
{
    static const char *const readers[] = {
        [INPUT_MIXER] = "the attention or DeltaNet projections",
        [INPUT_MIXER_OUT] = "o_proj or out_proj",
        [INPUT_BLOCK] = "gate_proj and up_proj",
        [INPUT_SHARED] = "the shared expert's down_proj",
    };
    struct calibration *c = k->result;
    const struct ops *op = k->backend->ops;
    op->download(k->backend->queue, k->top, k->largest, (uint64_t)k->n_top * sizeof *k->top);
    fetch_sums(k, k->sink->moments, &k->sums[0]);
    fetch_sums(k, k->sink->held, &k->sums[1]);
    bool ok = op->wait(k->backend->queue, e);
    for (int i = INPUT_MIXER; ok && i < INPUT_EXPERT; i++)
        ok = take_maximum(&c->inputs[layer * INPUT_EXPERT + i], k->top[i], readers[i], layer, -1, e);
    for (int i = 0; ok && i < c->n_experts; i++)
        ok = take_maximum(&c->down[(int64_t)layer * c->n_experts + i], k->top[INPUT_EXPERT + i], "down_proj",
                          layer, i, e);
    return ok;
}

static bool run_layer(struct calibrator *k, int layer, struct err *e)
{
    struct layer_state state = { 0 };
    int64_t pages = (k->samples->longest + KV_PAGE - 1) / KV_PAGE;
    k->backend->ops->zero(k->backend->queue, k->largest, (uint64_t)k->n_top * sizeof *k->top);
    for (int i = 0; i < 2; i++) clear_sums(k, &k->sums[i]);
    bool ok = source_check(k->options->source, e) &&
              (model_bind_layer(&k->model, layer, e) || err_note(e, "%s", k->model.checkpoint->path)) &&
              layer_state_create(&state, &k->model, layer, KV_F32, pages, 1, e);
    const struct checkpoint *source = k->model.checkpoint;
    for (int i = 0; i < source->n_shards; i++)
        pages_release(source->shards[i].map.data, source->shards[i].map.bytes);
    ok = ok && run_steps(k, layer, &state, e);
    layer_state_free(&state, &k->model);
    struct calibrated at = { &k->model.layers[layer].moe.experts, k->sink->moments ? &k->sums[0] : NULL,
                             k->sink->held ? &k->sums[1] : NULL };
    if (!k->sink->stays) model_free_layer(&k->model, layer);
    ok = ok && finish_layer(k, layer, e) && (!has_next(k, layer) || sync_states(k, layer + 1, e)) &&
         k->sink->take(k->sink->ctx, layer, k->sink->stays ? &at : NULL, e);
    model_free_layer(&k->model, layer);
    return ok;
}

static void calibrator_deinit(struct calibrator *k)
{
    void *device[] = { k->x, k->block, k->gate, k->up, k->largest };
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        k->backend->ops->memory_free(k->backend->queue, device[i]);
    for (int i = 0; i < 2 && k->backend->memory; i++) {
        k->backend->ops->memory_free(k->backend->queue, k->sums[i].block);
        k->backend->ops->memory_free(k->backend->queue, k->sums[i].down);
    }
    step_free(k->step);
    model_deinit(&k->model);
    for (int i = 0; i < 2; i++) {
        if (k->files[i] >= 0) close(k->files[i]);
        free(k->paths[i]);
    }
    free(k->states);
    free(k->rows);
    free(k->pages);
    free(k->picked);
    free(k->top);
}

bool calibration_init(struct calibration *c, const struct config *config, struct err *e)
{
    size_t layers = (size_t)config->n_layers, experts = (size_t)config->n_experts;
    *c = (struct calibration){ .n_layers = config->n_layers, .n_experts = config->n_experts };
    c->inputs = calloc(layers * INPUT_EXPERT, sizeof *c->inputs);
    c->down = calloc(layers * experts, sizeof *c->down);
    c->routed = calloc(layers * experts, sizeof *c->routed);
    return (c->inputs && c->down && c->routed) ||
           err_memory(e, "calibration", layers * experts * sizeof *c->down);
}

/* Steps keep the backend busy; buffers are small on the host. */
int64_t calibration_rows(const struct backend *b, const struct samples *s)
{
    return s->longest < b->step_rows ? s->longest : b->step_rows;
}

int calibration_together(const struct backend *b, const struct config *c)
{
    return b->memory && c->n_experts >= TOGETHER ? TOGETHER : b->memory ? c->n_experts : 1;
}

bool calibrate(struct calibration *c, const struct calibration_options *o, struct err *e)
{
    const struct checkpoint *source = o->source;
    struct calibrator k = { .result = c,
                            .options = o,
                            .samples = o->samples,
                            .sink = &o->sink,
                            .report = o->report,
                            .backend = o->backend,
                            .files = { -1, -1 } };
    k.hidden = source->config.hidden_size;
    k.inner = source->config.moe_intermediate;
    k.together = calibration_together(o->backend, &source->config);
    k.rows_max = calibration_rows(o->backend, o->samples);
    c->tokens = o->first_layer * o->samples->n_tokens;
    bool ok = model_init(&k.model, source, o->backend, NULL, e) &&
              step_create(&k.step, &k.model, k.rows_max, 0, o->samples->longest, e) &&
              create_buffers(&k, e) && open_states(&k, e);
    if (ok) step_set_tap(k.step, (struct tap){ &k, keep_input });
    if (ok && o->first_layer == 0) ok = run_steps(&k, -1, NULL, e);
    for (int i = o->first_layer; ok && i < c->n_layers; i++) ok = run_layer(&k, i, e);
    calibrator_deinit(&k);
    c->tokens = o->samples->n_tokens;
    return ok;
}

float calibration_input(const struct calibration *c, int layer, enum module_input input, int expert)
{
    return input == INPUT_EXPERT ? c->down[(int64_t)layer * c->n_experts + expert]
                                 : c->inputs[layer * INPUT_EXPERT + (int)input];
}

void calibration_deinit(struct calibration *c)
{
    free(c->inputs);
    free(c->down);
    free(c->routed);
    *c = (struct calibration){ 0 };
}
