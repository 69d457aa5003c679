/* The calibration within a run: packs the experts of a layer while its moments are there, and makes every
 * layer a point from which a killed run can go on. */
#include "base/pages.h"
#include "quantize/layers.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A JOURNAL_LAYER record: this, inputs[INPUT_EXPERT], down[n_experts], routed[n_experts], spooled[n_spooled].
 */
struct layer_record {
    uint64_t layer, n_spooled;
};

static bool is_nvfp4_expert(const struct matrix *m)
{
    return m->expert >= 0 && scheme_is_nvfp4(m->scheme);
}

bool run_measures(const struct run *r)
{
    const struct quantize_options *o = &r->options;
    bool any = false;
    for (size_t i = 0; i < r->plan.n_matrices && !any; i++) any = is_nvfp4_expert(&r->plan.matrices[i]);
    return any && (o->method == QUANTIZE_GPTQ ||
                   ((o->method == QUANTIZE_MSE || o->method == QUANTIZE_AUTO) && o->calibration));
}

/* Packing into the spool, through one buffer. */

struct spool_outlet {
    struct spool *spool;
    void *buffer;
};

static void *spool_room(void *ctx, uint64_t bytes, struct err *e)
{
    struct spool_outlet *x = ctx;
    (void)bytes, (void)e;
    return x->buffer;
}

static bool spool_put(void *ctx, uint64_t bytes, struct err *e)
{
    struct spool_outlet *x = ctx;
    return spool_append(x->spool, x->buffer, bytes, e);
}

void run_warn_no_factor(const struct run *r, size_t index)
{
    report_warn(r->options.report, "module '%s': its inputs' moments have no Cholesky factor; packed by mse",
                r->plan.matrices[index].module);
}

static bool pack_expert(struct run *r, size_t index, bool passes_on, struct spool_outlet *x, struct err *e)
{
    const struct matrix *m = &r->plan.matrices[index];
    struct curvature curvature = curvatures_of(&r->curvatures, m);
    struct outlet to = { x, spool_room, spool_put };
    struct spooled item = { .index = index, .at = r->spool.end };
    struct packed packed;
    if (!passes_on)
        curvature.factor = NULL;
    else if (!curvature.factor)
        run_warn_no_factor(r, index);
    if (!run_pack(r, &packed, index, &curvature, &to, e) ||
        !spool_append(&r->spool, r->scales, packed.scales_bytes, e))
        return false;
    item.codes_bytes = packed.codes_bytes;
    item.scales_bytes = packed.scales_bytes;
    item.result.difference = packed.difference;
    item.result.total = packed.total;
    item.result.global = packed.global;
    item.result.is_gptq = curvature.factor != NULL;
    spool_add(&r->spool, &item);
    return true;
}

/* Whether a layer's errors are passed on: as the method says, or as the samples held out do. */
static bool choose(struct run *r, struct contest_result *out, int layer, struct err *e)
{
    bool always = r->options.method == QUANTIZE_GPTQ;
    int64_t n = (int64_t)r->source.config.n_experts * N_PARTS, count = 0;
    *out = (struct contest_result){ always, always };
    if (!r->contest.held.block) return true;
    struct contestant *list = malloc((size_t)n * sizeof *list);
    bool ok = list || err_memory(e, "experts of a layer", (uint64_t)n * sizeof *list);
    for (int64_t i = layer * n; ok && i < (layer + 1) * n; i++) {
        size_t index = r->plan.experts[i];
        if (index == SIZE_MAX || !is_nvfp4_expert(&r->plan.matrices[index])) continue;
        list[count].matrix = &r->plan.matrices[index];
        ok = run_absmax(r, &list[count++].absmax, index, e);
    }
    ok = ok && contest_run(out, &r->contest, &r->curvatures.moments, list, count, r->packer.pool, e);
    free(list);
    return ok;
}

static bool pack_layer(struct run *r, int layer, struct err *e)
{
    int64_t n = (int64_t)r->source.config.n_experts * N_PARTS;
    struct spool_outlet x = { &r->spool, malloc(run_piece_bytes(&r->plan) + 1) };
    struct contest_result passes_on;
    bool ok = (x.buffer || err_memory(e, "packing buffer", run_piece_bytes(&r->plan))) &&
              choose(r, &passes_on, layer, e);
    if (ok) curvatures_update(&r->curvatures, r->packer.pool);
    for (int64_t i = layer * n; ok && i < (layer + 1) * n; i++) {
        size_t index = r->plan.experts[i];
        if (index == SIZE_MAX || !is_nvfp4_expert(&r->plan.matrices[index])) continue;
        bool is_down = r->plan.matrices[index].part == PART_DOWN;
        ok = pack_expert(r, index, is_down ? passes_on.down : passes_on.block, &x, e);
    }
    free(x.buffer);
    return ok && spool_sync(&r->spool, e);
}

/* Records. */

static size_t inputs_bytes(void)
{
    return INPUT_EXPERT * sizeof(float);
}

static size_t down_bytes(const struct run *r)
{
    return (size_t)r->calibration.n_experts * sizeof(float);
}

static size_t routed_bytes(const struct run *r)
{
    return (size_t)r->calibration.n_experts * sizeof *r->calibration.routed;
}

static bool journal_layer(struct run *r, int layer, size_t first_item, struct err *e)
{
    struct layer_record head = { (uint64_t)layer, r->spool.n_items - first_item };
    size_t items = head.n_spooled * sizeof *r->spool.items, at = sizeof head;
    size_t bytes = at + inputs_bytes() + down_bytes(r) + routed_bytes(r) + items;
    int64_t first = (int64_t)layer * r->calibration.n_experts;
    char *text = malloc(bytes);
    if (!text) return err_memory(e, "journal record", bytes);
    memcpy(text, &head, sizeof head);
    memcpy(text + at, r->calibration.inputs + layer * INPUT_EXPERT, inputs_bytes());
    at += inputs_bytes();
    memcpy(text + at, r->calibration.down + first, down_bytes(r));
    at += down_bytes(r);
    memcpy(text + at, r->calibration.routed + first, routed_bytes(r));
    at += routed_bytes(r);
    if (items) memcpy(text + at, r->spool.items + first_item, items);
    bool ok = journal_append(&r->journal, JOURNAL_LAYER, text, bytes, true, e);
    free(text);
    return ok;
}

static bool take_layer(void *ctx, int layer, const struct calibrated *at, struct err *e)
{
    struct run *r = ctx;
    size_t first_item = r->spool.n_items;
    bool ok = !run_measures(r) || (at ? layers_device_pack(r, layer, at, e) : pack_layer(r, layer, e));
    return ok && journal_layer(r, layer, first_item, e);
}

static bool read_items(struct run *r, const char *data, size_t n, struct err *e)
{
    struct spooled item;
    for (size_t i = 0; i < n; i++) {
        memcpy(&item, data + i * sizeof item, sizeof item);
        if (item.index >= r->plan.n_matrices || spool_find(&r->spool, item.index))
            return err_set(e, ERR_FORMAT, "matrix %" PRIu64, item.index);
        spool_add(&r->spool, &item);
    }
    return true;
}

bool run_layer_read(struct run *r, const struct journal_record *record, struct err *e)
{
    struct layer_record head;
    const char *data = record->data;
    size_t down = sizeof head + inputs_bytes(), routed = down + down_bytes(r);
    size_t fixed = routed + routed_bytes(r);
    if (record->bytes < fixed) return err_set(e, ERR_FORMAT, "record of %u bytes", record->bytes);
    memcpy(&head, data, sizeof head);
    if (head.layer != (uint64_t)r->layers_done || head.layer >= (uint64_t)r->calibration.n_layers ||
        head.n_spooled > r->plan.n_matrices ||
        record->bytes != fixed + head.n_spooled * sizeof(struct spooled) ||
        (head.n_spooled > 0 && !run_measures(r)))
        return err_set(e, ERR_FORMAT, "layer %" PRIu64 " after %d layers", head.layer, r->layers_done);
    memcpy(r->calibration.inputs + head.layer * INPUT_EXPERT, data + sizeof head, inputs_bytes());
    uint64_t first = head.layer * (uint64_t)r->calibration.n_experts;
    memcpy(r->calibration.down + first, data + down, down_bytes(r));
    memcpy(r->calibration.routed + first, data + routed, routed_bytes(r));
    r->layers_done++;
    return head.n_spooled == 0 || read_items(r, data + fixed, head.n_spooled, e);
}

bool run_is_calibrated(const struct run *r)
{
    return r->samples.n == 0 || r->layers_done == r->calibration.n_layers;
}

/* Room for moments, or, where they stay with the backend, their shape. */
static bool prepare_method(struct run *r, struct err *e)
{
    enum quantize_method method = r->options.method;
    const struct config *c = &r->source.config;
    bool contest = method == QUANTIZE_AUTO && contest_held(r->samples.n) > 0;
    if (layers_device_suits(r)) {
        struct moments shape = { c->n_experts, c->hidden_size, c->moe_intermediate, NULL, NULL };
        r->curvatures.moments = r->contest.held = shape;
        return layers_device_init(&r->there, r->options.backend, c, contest, e);
    }
    return curvatures_init(&r->curvatures, c, method == QUANTIZE_GPTQ || contest, e) &&
           (!contest || contest_init(&r->contest, c, e));
}

bool run_calibration(struct run *r, struct err *e)
{
    const struct quantize_options *o = &r->options;
    bool measures = run_measures(r), contest = o->method == QUANTIZE_AUTO && contest_held(r->samples.n) > 0;
    if (run_is_calibrated(r)) return true;
    if (measures && !prepare_method(r, e)) return false;
    struct calibration_options options = {
        .source = &r->source,
        .backend = o->backend,
        .samples = &r->samples,
        .folder = r->destination.work,
        .first_layer = r->layers_done,
        .sink = { .ctx = r,
                  .moments = measures ? &r->curvatures.moments : NULL,
                  .held = measures && contest ? &r->contest.held : NULL,
                  .held_from = r->samples.n - contest_held(r->samples.n),
                  .stays = r->there.backend != NULL,
                  .take = take_layer },
        .report = o->report,
    };
    if (!calibrate(&r->calibration, &options, e)) return false;
    curvatures_deinit(&r->curvatures);
    contest_deinit(&r->contest);
    layers_device_deinit(&r->there);
    return true;
}
