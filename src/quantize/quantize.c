/* One run from source to destination. Everything that can be refused is refused before the first byte is
 * written; the calibration comes next, since it is the long part; then tensors stream through in the order of
 * the source's files. */
#include "quantize/quantize.h"
#include "base/clock.h"
#include "base/doc.h"
#include "base/file.h"
#include "base/memory.h"
#include "num/nvfp4.h"
#include "quantize/calibrate.h"
#include "quantize/census.h"
#include "quantize/curvature.h"
#include "quantize/describe.h"
#include "quantize/destination.h"
#include "quantize/pack.h"
#include "quantize/pages.h"
#include "quantize/plan.h"
#include "quantize/results.h"
#include "quantize/shards.h"
#include "quantize/spool.h"
#include <inttypes.h>
#include <math.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SAMPLES = 64, SEQUENCE = 2048, SLICE_BYTES = 64 << 20, FILE_EXTRA_BYTES = 1 << 20 };
static const uint64_t SHARD_BYTES = 5000000000u;

struct run {
    struct quantize_options options; /* defaults filled in */
    struct quantize_result *result;
    struct checkpoint source;
    struct plan plan;
    struct samples samples;
    struct calibration calibration;
    struct destination destination;
    struct packer packer;
    struct curvatures curvatures;
    struct spool spool;
    struct shards *shards;
    struct matrix_result *results; /* [plan.n_matrices] */
    float *absmax;                 /* of NVFP4 matrices, once looked at; negative before */
    uint64_t done;                 /* bytes of source tensors */
};

static bool fill_defaults(struct quantize_options *o, struct err *e)
{
    if (!o->recipe) o->recipe = recipe_card();
    if (!o->num_calibration_samples) o->num_calibration_samples = SAMPLES;
    if (!o->max_seq_length) o->max_seq_length = SEQUENCE;
    if (!o->max_shard_bytes) o->max_shard_bytes = SHARD_BYTES;
    if (!o->threads) o->threads = pool_default_threads();
    if (o->num_calibration_samples < 0 || o->num_calibration_samples > INT32_MAX)
        return err_set(e, ERR_ARGUMENT, "%" PRId64 " calibration samples", o->num_calibration_samples);
    if (o->max_seq_length < 0 || o->max_seq_length > INT32_MAX)
        return err_set(e, ERR_ARGUMENT, "calibration sequences of %" PRId64 " tokens", o->max_seq_length);
    return o->threads > 0 || err_set(e, ERR_ARGUMENT, "%d threads", o->threads);
}

static bool is_nvfp4_expert(const struct matrix *m)
{
    return m->expert >= 0 && scheme_is_nvfp4(m->scheme);
}

/* Whether the method has something to learn from samples. */
static bool method_measures(const struct run *r)
{
    const struct quantize_options *o = &r->options;
    bool any = false;
    for (size_t i = 0; i < r->plan.n_matrices && !any; i++) any = is_nvfp4_expert(&r->plan.matrices[i]);
    return any && (o->method == QUANTIZE_GPTQ || (o->method == QUANTIZE_MSE && o->calibration));
}

static bool load_samples(struct run *r, struct err *e)
{
    const struct quantize_options *o = &r->options;
    if (!r->plan.needs_inputs && !method_measures(r)) return true;
    if (!o->calibration && r->plan.needs_inputs)
        return err_set(e, ERR_ARGUMENT, "recipe '%s' needs calibration samples, none are given",
                       o->recipe->name);
    if (!o->calibration)
        return err_set(e, ERR_ARGUMENT,
                       "method gptq needs calibration samples, none are given; nearest and "
                       "mse do without");
    struct samples_options options = {
        .path = o->calibration,
        .model = r->source.path,
        .n = o->num_calibration_samples,
        .max_tokens = o->max_seq_length,
        .vocab_size = r->source.config.vocab_size,
        .report = o->report,
    };
    return samples_load(&r->samples, &options, e);
}

/* Of files, and of the spool beside them until the end. */
static uint64_t disk_bytes(const struct run *r)
{
    const struct plan *p = &r->plan;
    uint64_t n = FILE_EXTRA_BYTES;
    for (size_t i = 0; i < p->n_outputs; i++) n += p->outputs[i].bytes;
    for (size_t i = 0; i < p->n_matrices && method_measures(r); i++) {
        const struct matrix *m = &p->matrices[i];
        if (is_nvfp4_expert(m))
            n += (uint64_t)m->rows * (uint64_t)m->cols / NVFP4_GROUP * (NVFP4_GROUP / 2 + 1);
    }
    return n;
}

/* Calibration. */

static bool absmax_of(struct run *r, float *out, size_t index, struct err *e)
{
    if (r->absmax[index] < 0 && !packer_absmax(&r->packer, &r->absmax[index], &r->plan.matrices[index], e))
        return false;
    *out = r->absmax[index];
    return true;
}

/* gate and up, or q, k and v, run as one product, so one scale serves them: the largest maximum's. */
static bool joint_absmax(struct run *r, float *out, size_t index, struct err *e)
{
    const struct matrix *all = r->plan.matrices;
    if (!absmax_of(r, out, index, e)) return false;
    for (size_t i = all[index].partner; i != SIZE_MAX && i != index; i = all[i].partner) {
        float other;
        if (!absmax_of(r, &other, i, e)) return false;
        *out = fmaxf(*out, other);
    }
    return true;
}

/* Packs the experts of a layer while its moments are there; their turn in the output comes later. */
static bool take_layer(void *ctx, int layer, struct err *e)
{
    struct run *r = ctx;
    int64_t n = (int64_t)r->source.config.n_experts * N_PARTS;
    curvatures_update(&r->curvatures, r->packer.pool);
    for (int64_t i = layer * n; i < (layer + 1) * n; i++) {
        size_t index = r->plan.experts[i];
        struct packed packed;
        float absmax;
        if (index == SIZE_MAX || !is_nvfp4_expert(&r->plan.matrices[index])) continue;
        const struct matrix *m = &r->plan.matrices[index];
        struct curvature curvature = curvatures_of(&r->curvatures, m);
        if (r->options.method == QUANTIZE_GPTQ && !curvature.factor)
            report_warn(r->options.report,
                        "module '%s': its inputs' moments have no Cholesky factor; packed by mse", m->module);
        if (!joint_absmax(r, &absmax, index, e) ||
            !packer_run(&r->packer, &packed, m, absmax, &curvature, e) ||
            !spool_put(&r->spool, index, &packed, e))
            return false;
        pages_release(m->data, (uint64_t)m->rows * (uint64_t)m->cols * dtype_bytes(m->source->dtype));
    }
    return true;
}

static bool prepare_method(struct run *r, struct err *e)
{
    const struct quantize_options *o = &r->options;
    return curvatures_init(&r->curvatures, &r->source.config, o->method == QUANTIZE_GPTQ, e) &&
           spool_init(&r->spool, r->destination.partial, r->plan.n_matrices, e);
}

static bool run_calibration(struct run *r, struct err *e)
{
    double start = clock_seconds();
    const struct quantize_options *o = &r->options;
    bool measures = method_measures(r);
    if (!r->samples.n) return true;
    struct calibration_sink sink = { r, &r->curvatures.moments, r->packer.pool, take_layer };
    if ((measures && !prepare_method(r, e)) || !calibrate(&r->calibration, &r->source, o->backend,
                                                          &r->samples, measures ? &sink : NULL, o->report, e))
        return false;
    r->result->samples = r->samples.n;
    r->result->tokens = r->calibration.tokens;
    r->result->calibrate_seconds = clock_seconds() - start;
    samples_deinit(&r->samples);
    curvatures_deinit(&r->curvatures);
    return true;
}

/* Tensors. */

static void report_done(struct run *r, uint64_t bytes)
{
    r->done += bytes;
    report_progress(r->options.report, "quantize", r->done, r->result->bytes_in);
}

static bool copy_tensor(struct run *r, const struct tensor *t, struct err *e)
{
    for (uint64_t at = 0; at < t->bytes; at += SLICE_BYTES) {
        uint64_t n = t->bytes - at < SLICE_BYTES ? t->bytes - at : SLICE_BYTES;
        if (!shards_append(r->shards, t->data + at, n, e)) return false;
        pages_release(t->data + at, n);
        report_done(r, n);
    }
    r->result->copied_tensors++;
    return true;
}

/* Largest measured input of a matrix that has one. */
static float largest_input(const struct run *r, const struct matrix *m)
{
    bool measured = r->calibration.tokens > 0 && m->layer >= 0 && m->input != INPUT_NONE;
    return measured ? calibration_input(&r->calibration, m->layer, m->input, m->expert) : 0;
}

/* Packs what the calibration has not packed already. */
static bool pack_matrix(struct run *r, struct packed *out, size_t index, struct err *e)
{
    const struct matrix *m = &r->plan.matrices[index];
    static const struct curvature plain = { 0 };
    const struct curvature *c = r->options.method == QUANTIZE_NEAREST ? NULL : &plain;
    float absmax = 0;
    if (spool_has(&r->spool, index)) return spool_get(&r->spool, out, index, &r->packer, e);
    return (scheme_is_nvfp4(m->scheme) ? joint_absmax(r, &absmax, index, e)
                                       : absmax_of(r, &absmax, index, e)) &&
           packer_run(&r->packer, out, m, absmax, c, e);
}

static bool write_matrix(struct run *r, size_t index, struct err *e)
{
    const struct matrix *m = &r->plan.matrices[index];
    struct packed packed;
    bool nvfp4 = scheme_is_nvfp4(m->scheme);
    if (!pack_matrix(r, &packed, index, e) ||
        !shards_append(r->shards, packed.codes, packed.codes_bytes, e) ||
        !shards_append(r->shards, packed.scales, packed.scales_bytes, e) ||
        (nvfp4 && !shards_append(r->shards, &packed.global, sizeof packed.global, e)))
        return false;
    struct matrix_result result = { packed.difference, packed.total, packed.global, largest_input(r, m),
                                    true };
    if (m->scheme == SCHEME_NVFP4) {
        float scale = nvfp4_global_scale(result.input); /* maps it to 448 * 6; 1 where every input was zero */
        if (result.input == 0)
            report_warn(r->options.report,
                        "module '%s': every calibration input is zero; its input scale is 1", m->module);
        if (!shards_append(r->shards, &scale, sizeof scale, e)) return false;
    }
    r->results[index] = result;
    uint64_t bytes = (uint64_t)m->rows * (uint64_t)m->cols * dtype_bytes(m->source->dtype);
    pages_release(m->data, bytes);
    report_done(r, bytes);
    return true;
}

static bool write_tensors(struct run *r, struct err *e)
{
    const struct plan *p = &r->plan;
    for (size_t i = 0; i < p->n_jobs; i++) {
        const struct job *j = &p->jobs[i];
        if (j->n == 0 && !copy_tensor(r, j->source, e)) return false;
        for (size_t k = j->first; k < j->first + j->n; k++)
            if (!write_matrix(r, k, e)) return false;
    }
    r->result->shards = shards_count(r->shards);
    return shards_finish(r->shards, e);
}

static bool prepare_packing(struct run *r, struct err *e)
{
    const struct plan *p = &r->plan;
    r->absmax = malloc((p->n_matrices + 1) * sizeof *r->absmax);
    r->results = calloc(p->n_matrices + 1, sizeof *r->results);
    if (!r->absmax || !r->results) return err_memory(e, "results", p->n_matrices * sizeof *r->results);
    for (size_t i = 0; i < p->n_matrices; i++) r->absmax[i] = -1;
    return packer_init(&r->packer, p, r->options.threads, e);
}

static bool prepare_writing(struct run *r, struct err *e)
{
    return shards_create(&r->shards, r->destination.partial, r->plan.outputs, r->plan.n_outputs,
                         r->options.max_shard_bytes, e);
}

/* The other files. */

static bool write_file(const struct run *r, const char *name, const char *text, size_t bytes, struct err *e)
{
    char *path = file_join(r->destination.partial, name);
    bool ok = path ? file_write(path, text, bytes, e) : err_memory(e, "path", strlen(name));
    free(path);
    return ok;
}

static bool write_recipe(const struct run *r, struct err *e)
{
    char *text;
    size_t bytes;
    if (!recipe_yaml(&text, &bytes, r->options.recipe, e)) return false;
    bool ok = write_file(r, "recipe.yaml", text, bytes, e);
    free(text);
    return ok;
}

static bool write_config(const struct run *r, struct err *e)
{
    json_t *config = json_copy(r->source.config_json);
    char *text = NULL;
    if (config && json_object_update(config, r->plan.block) == 0) text = doc_dump(config, true);
    bool ok = text ? write_file(r, "config.json", text, strlen(text), e) : err_memory(e, "config.json", 0);
    free(text);
    json_decref(config);
    return ok;
}

/* config.json comes last: without it no reader takes the folder for a checkpoint. */
static bool write_folder(struct run *r, struct err *e)
{
    return prepare_writing(r, e) && write_tensors(r, e) &&
           destination_copy_files(&r->destination, r->source.path, r->options.report, e) &&
           write_recipe(r, e) && write_config(r, e);
}

/* The run. */

static const char *method_name(enum quantize_method m)
{
    return m == QUANTIZE_NEAREST ? "nearest" : m == QUANTIZE_MSE ? "mse" : "gptq";
}

static bool evaluate(struct run *r, struct evaluation *out, struct err *e)
{
    const struct quantize_options *o = &r->options;
    double start = clock_seconds();
    r->result->peak_bytes = memory_peak();
    bool ok = !o->evaluate || o->evaluate(o->evaluate_ctx, out, r->destination.partial, e);
    r->result->evaluate_seconds = clock_seconds() - start;
    return ok;
}

/* Report and card, the last files of the folder. */
static bool describe(struct run *r, struct err *e)
{
    const struct quantize_options *o = &r->options;
    struct summary_run about = { .version = o->version ? o->version : "quench",
                                 .method = method_name(o->method),
                                 .source = o->source,
                                 .calibration_file = o->calibration,
                                 .checkpoint = &r->source,
                                 .plan = &r->plan,
                                 .results = r->results,
                                 .calibration = &r->calibration,
                                 .recipe = o->recipe,
                                 .samples = r->result->samples,
                                 .max_seq_length = o->max_seq_length,
                                 .shards = r->result->shards };
    struct evaluation evaluation = { 0 };
    struct summary s;
    if (!evaluate(r, &evaluation, e) || !summary_create(&s, &about, e)) return false;
    describe_result(r->result, &s);
    bool ok = describe_write(r->destination.partial, &s, o->evaluate ? &evaluation : NULL, o->report, e);
    summary_deinit(&s);
    return ok;
}

static bool prepare(struct run *r, struct err *e)
{
    const struct quantize_options *o = &r->options;
    if (!fill_defaults(&r->options, e) || !checkpoint_open(&r->source, o->source, e) ||
        !destination_init(&r->destination, o->destination, r->source.path, e) ||
        !plan_create(&r->plan, &r->source, o->recipe, e) || !load_samples(r, e))
        return false;
    for (size_t i = 0; i < r->source.n_tensors; i++) r->result->bytes_in += r->source.tensors[i]->bytes;
    for (size_t i = 0; i < r->plan.n_outputs; i++) r->result->bytes_out += r->plan.outputs[i].bytes;
    r->result->ignored_modules = (int64_t)r->plan.n_ignored;
    return true;
}

static void run_deinit(struct run *r)
{
    shards_free(r->shards);
    packer_deinit(&r->packer);
    spool_deinit(&r->spool);
    curvatures_deinit(&r->curvatures);
    free(r->absmax);
    free(r->results);
    destination_deinit(&r->destination, r->options.report);
    calibration_deinit(&r->calibration);
    samples_deinit(&r->samples);
    plan_deinit(&r->plan);
    checkpoint_close(&r->source);
}

bool quantize_run(const struct quantize_options *o, struct quantize_result *result, struct err *e)
{
    double start = clock_seconds();
    *result = (struct quantize_result){ 0 };
    struct run r = { .options = *o, .result = result, .destination = { .lock = -1 }, .spool = { .fd = -1 } };
    bool ok = prepare(&r, e) && destination_create(&r.destination, disk_bytes(&r), o->report, e) &&
              prepare_packing(&r, e) && run_calibration(&r, e) && write_folder(&r, e) &&
              census(&r.plan, &r.source, r.destination.partial, e) && describe(&r, e) &&
              destination_commit(&r.destination, o->report, e);
    run_deinit(&r);
    result->seconds = clock_seconds() - start;
    return ok;
}
