/* One run from source to destination. Everything that can be refused is refused before the first byte is
 * written; the calibration comes next, since it is the long part; then tensors stream through in the order of
 * the source's files. */
#include "base/clock.h"
#include "base/doc.h"
#include "base/file.h"
#include "base/memory.h"
#include "num/nvfp4.h"
#include "quantize/census.h"
#include "quantize/describe.h"
#include "quantize/estimate.h"
#include "quantize/layers.h"
#include "quantize/source.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SAMPLES = 64,
    SEQUENCE = 2048,
    FILE_EXTRA_BYTES = 1 << 20,
    SYNC_BYTES = 128 << 20,
    REPORT_BYTES = 400
};
static const uint64_t SHARD_BYTES = 5000000000u, MEMORY_BYTES = 8000000000u;

const char *quantize_method_name(enum quantize_method m)
{
    switch (m) {
    case QUANTIZE_AUTO: return "auto";
    case QUANTIZE_NEAREST: return "nearest";
    case QUANTIZE_FOUR_OVER_SIX: return "four-over-six";
    case QUANTIZE_MSE: return "mse";
    case QUANTIZE_GPTQ: return "gptq";
    }
    return "?";
}

static bool fill_defaults(struct quantize_options *o, struct err *e)
{
    if (!o->recipe) o->recipe = recipe_card();
    if (!o->num_calibration_samples) o->num_calibration_samples = SAMPLES;
    if (!o->max_seq_length) o->max_seq_length = SEQUENCE;
    if (!o->max_shard_bytes) o->max_shard_bytes = SHARD_BYTES;
    if (!o->max_memory) o->max_memory = MEMORY_BYTES;
    if (!o->sync_bytes) o->sync_bytes = SYNC_BYTES;
    if (!o->threads) o->threads = pool_default_threads();
    if (o->num_calibration_samples < 0 || o->num_calibration_samples > INT32_MAX)
        return err_set(e, ERR_ARGUMENT, "%" PRId64 " calibration samples", o->num_calibration_samples);
    if (o->max_seq_length < 0 || o->max_seq_length > INT32_MAX)
        return err_set(e, ERR_ARGUMENT, "calibration sequences of %" PRId64 " tokens", o->max_seq_length);
    return o->threads > 0 || err_set(e, ERR_ARGUMENT, "%d threads", o->threads);
}

static bool load_samples(struct run *r, struct err *e)
{
    const struct quantize_options *o = &r->options;
    if (!r->plan.needs_inputs && !run_measures(r)) return true;
    if (!o->calibration && r->plan.needs_inputs)
        return err_set(e, ERR_ARGUMENT, "recipe '%s' needs calibration samples, none are given",
                       o->recipe->name);
    if (!o->calibration)
        return err_set(e, ERR_ARGUMENT,
                       "method gptq needs calibration samples, none are given; the other methods "
                       "do without");
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

/* Of files, the spool and the hidden states. */
static uint64_t disk_bytes(const struct run *r)
{
    const struct plan *p = &r->plan;
    uint64_t n = FILE_EXTRA_BYTES + p->n_matrices * REPORT_BYTES;
    n += 2 * (uint64_t)r->samples.n_tokens * (uint64_t)r->source.config.hidden_size * sizeof(float);
    for (size_t i = 0; i < p->n_outputs; i++) n += p->outputs[i].bytes;
    for (size_t i = 0; i < p->n_matrices && run_measures(r); i++) {
        const struct matrix *m = &p->matrices[i];
        if (m->expert >= 0 && scheme_is_nvfp4(m->scheme))
            n += (uint64_t)m->rows * (uint64_t)m->cols / NVFP4_GROUP * (NVFP4_GROUP / 2 + 1);
    }
    return n;
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
    return writer_create(&r->writer, r->shards, &r->journal, run_piece_bytes(&r->plan), r->options.sync_bytes,
                         e) &&
           run_write_tensors(r, e) &&
           destination_copy_files(&r->destination, r->source.path, r->options.report, e) &&
           write_recipe(r, e) && write_config(r, e);
}

/* The run. */

static bool evaluate(struct run *r, struct evaluation *out, struct err *e)
{
    const struct quantize_options *o = &r->options;
    double start = clock_seconds();
    r->result->peak_bytes = memory_peak();
    bool ok = !o->evaluate || o->evaluate(o->evaluate_ctx, out, r->destination.partial, e);
    r->result->evaluate_seconds = clock_seconds() - start;
    return ok;
}

static bool summarize(struct run *r, struct summary *s, struct err *e)
{
    const struct quantize_options *o = &r->options;
    struct summary_run about = { .version = o->version ? o->version : "quench",
                                 .method = quantize_method_name(o->method),
                                 .source = o->source,
                                 .calibration_file = o->calibration,
                                 .checkpoint = &r->source,
                                 .plan = &r->plan,
                                 .results = r->results,
                                 .calibration = &r->calibration,
                                 .recipe = o->recipe,
                                 .samples = r->result->samples,
                                 .max_seq_length = o->max_seq_length,
                                 .shards = shards_count(r->shards),
                                 .identity = r->identity };
    r->result->shards = about.shards;
    if (!summary_create(s, &about, e)) return false;
    describe_result(r->result, s);
    if (s->n_far)
        report_warn(
            o->report,
            "%lld matrices have a signal-to-noise ratio below %g dB, more than rounding explains; the "
            "worst is module '%s'",
            (long long)s->n_far, SUMMARY_SNR_LOW, r->plan.matrices[s->worst[0]].module);
    return true;
}

/* Report and card, the last files of the folder. */
static bool describe(struct run *r, struct err *e)
{
    const struct quantize_options *o = &r->options;
    struct evaluation evaluation = { 0 };
    struct summary s = { 0 };
    bool ok = evaluate(r, &evaluation, e) && summarize(r, &s, e) &&
              describe_write(r->destination.partial, &s, o->evaluate ? &evaluation : NULL, o->report, e);
    summary_deinit(&s);
    return ok;
}

/* An earlier run did all, but for removing its work folder. */
static bool tidy(struct run *r, struct err *e)
{
    struct summary s = { 0 };
    bool ok = summarize(r, &s, e);
    summary_deinit(&s);
    destination_remove(&r->destination, r->options.report);
    return ok;
}

static bool prepare(struct run *r, struct err *e)
{
    const struct quantize_options *o = &r->options;
    if (!fill_defaults(&r->options, e) || !checkpoint_open(&r->source, o->source, e) ||
        !destination_init(&r->destination, o->destination, r->source.path, e) ||
        !plan_create(&r->plan, &r->source, o->recipe, e) || !load_samples(r, e))
        return false;
    struct quantize_result *result = r->result;
    for (size_t i = 0; i < r->source.n_tensors; i++) result->bytes_in += r->source.tensors[i]->bytes;
    for (size_t i = 0; i < r->plan.n_outputs; i++) result->bytes_out += r->plan.outputs[i].bytes;
    for (size_t i = 0; i < r->plan.n_jobs; i++) result->copied_tensors += r->plan.jobs[i].n == 0;
    result->ignored_modules = (int64_t)r->plan.n_ignored;
    r->disk_bytes = disk_bytes(r);
    r->results = calloc(r->plan.n_matrices + 1, sizeof *r->results);
    if (!r->results) return err_memory(e, "results", r->plan.n_matrices * sizeof *r->results);
    if (!calibration_init(&r->calibration, &r->source.config, e)) return false;
    result->samples = r->samples.n;
    result->tokens = r->calibration.tokens = r->samples.n_tokens;
    return true;
}

static bool check_memory(const struct run *r, struct err *e)
{
    struct run alone = *r;
    alone.options.evaluate = NULL;
    uint64_t need = estimate_memory(r), most = r->options.max_memory;
    const char *advice = estimate_memory(&alone) <= most
                             ? "do without --evaluate, which holds source and result in memory"
                             : "take fewer and shorter calibration samples";
    return need <= most || err_set(e, ERR_LIMIT,
                                   "up to %.1f GB of memory may be needed, the limit is %.1f GB; raise the "
                                   "limit (--max-memory), or %s",
                                   (double)need / 1e9, (double)most / 1e9, advice);
}

static bool check_device_memory(const struct run *r, struct err *e)
{
    uint64_t need = estimate_device_memory(r), available = r->options.backend->memory_free;
    if (need > available)
        return err_set(
            e, ERR_LIMIT,
            "up to %.1f GB of GPU memory may be needed, %.1f GB are free; take shorter calibration "
            "samples, or --device cpu",
            (double)need / 1e9, (double)available / 1e9);
    r->result->device_bytes = need;
    if (need)
        report_warn(r->options.report, "up to %.1f GB of GPU memory will be used, %.1f GB are free",
                    (double)need / 1e9, (double)available / 1e9);
    return true;
}

static bool work(struct run *r, struct err *e)
{
    double start = clock_seconds();
    bool ok = run_prepare_packing(r, e) && run_calibration(r, e);
    r->result->calibrate_seconds = clock_seconds() - start;
    ok = ok && write_folder(r, e) && census(&r->plan, &r->source, r->destination.partial, e);
    r->is_proved = ok;
    return ok && describe(r, e) && destination_commit(&r->destination, r->options.report, e);
}

/* A source that was cut short fails in many ways, and that is the one to tell. A failure of the world may be
 * gone when the command is repeated; any other would come again. A checkpoint that is proved is kept
 * whatever becomes of its evaluation. */
static void after_failure(struct run *r, struct err *e)
{
    const struct report *report = r->options.report;
    struct err cause = { 0 };
    if (r->is_started && !source_check(&r->source, &cause)) *e = cause;
    if (!r->is_ours || r->destination.lock < 0) return;
    if (r->is_started && (e->code == ERR_IO || e->code == ERR_MEMORY || r->is_proved))
        report_warn(report, "%s is kept: the same command continues, removing the folder discards the work",
                    r->destination.work);
    else
        destination_remove(&r->destination, report);
}

static void run_deinit(struct run *r)
{
    writer_free(r->writer);
    shards_free(r->shards);
    packer_deinit(&r->packer);
    spool_deinit(&r->spool);
    curvatures_deinit(&r->curvatures);
    contest_deinit(&r->contest);
    layers_device_deinit(&r->there);
    free(r->absmax);
    free(r->scales);
    free(r->results);
    json_decref(r->identity);
    journal_close(&r->journal);
    destination_deinit(&r->destination);
    calibration_deinit(&r->calibration);
    samples_deinit(&r->samples);
    plan_deinit(&r->plan);
    checkpoint_close(&r->source);
}

static struct run run_of(const struct quantize_options *o, struct quantize_result *result)
{
    return (struct run){ .options = *o,
                         .result = result,
                         .destination = { .lock = -1 },
                         .journal = { .fd = -1 },
                         .spool = { .fd = -1 } };
}

bool quantize_dry_run(const struct quantize_options *o, struct quantize_forecast *f, struct err *e)
{
    struct quantize_result result = { 0 };
    struct run r = run_of(o, &result);
    *f = (struct quantize_forecast){ 0 };
    bool ok = prepare(&r, e) && (!r.destination.has_report || destination_exists(&r.destination, e)) &&
              shards_create(&r.shards, r.destination.partial, r.plan.outputs, r.plan.n_outputs,
                            r.options.max_shard_bytes, e);
    if (ok) {
        for (size_t i = 0; i < r.plan.n_matrices; i++) f->matrices[r.plan.matrices[i].scheme]++;
        f->copied_tensors = result.copied_tensors;
        f->samples = r.samples.n;
        f->tokens = r.samples.n_tokens;
        f->shards = shards_count(r.shards);
        f->bytes_in = result.bytes_in;
        f->bytes_out = result.bytes_out;
        f->disk_bytes = r.disk_bytes;
        f->memory_bytes = estimate_memory(&r);
        f->device_bytes = estimate_device_memory(&r);
        ok = run_prepare_packing(&r, e) && estimate_seconds(f, &r, e);
    }
    run_deinit(&r);
    return ok;
}

bool quantize_run(const struct quantize_options *o, struct quantize_result *result, struct err *e)
{
    double start = clock_seconds();
    struct err own = { 0 };
    if (!e) e = &own;
    *result = (struct quantize_result){ 0 };
    struct run r = run_of(o, result);
    bool ok = prepare(&r, e);
    result->was_finished = ok && r.destination.has_report;
    if (result->was_finished)
        ok = run_is_finished(&r, e);
    else
        ok = ok && check_memory(&r, e) && destination_lock(&r.destination, e) && run_resume(&r, e) &&
             (r.destination.is_renamed ? tidy(&r, e) : check_device_memory(&r, e) && work(&r, e));
    writer_free(r.writer); /* its thread is done with files before they are judged */
    r.writer = NULL;
    if (!ok) after_failure(&r, e);
    run_deinit(&r);
    result->seconds = clock_seconds() - start;
    return ok;
}
