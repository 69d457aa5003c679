/* Writes a random checkpoint: a buffer is filled by all threads, then appended to the shard at hand. */
#include "base/clock.h"
#include "base/file.h"
#include "base/pool.h"
#include "quantize/destination.h"
#include "quantize/shards.h"
#include "quantize/synth.h"
#include "quantize/synth_values.h"
#include <stdlib.h>
#include <string.h>

enum { BUFFER_BYTES = 16 << 20 };

static const char *const neighbours[] = { "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                                          "generation_config.json", "preprocessor_config.json" };

struct run {
    const struct synth_options *o;
    struct synth_result *r;
    struct synth synth;
    json_t *config;
    char *folder; /* CONFIG's; NULL: a known name */
    struct destination destination;
    struct synth_values *values;
    struct pool *pool;
    struct shards *shards;
    uint8_t *buffer;
};

static bool prepare(struct run *r, struct err *e)
{
    const struct synth_options *o = r->o;
    int threads = o->threads > 0 ? o->threads : pool_default_threads();
    r->buffer = malloc(BUFFER_BYTES);
    return (r->buffer || err_memory(e, "buffer", BUFFER_BYTES)) &&
           synth_load_config(&r->config, &r->folder, o->config, e) &&
           synth_init(&r->synth, r->config, o->config, o->layers, o->recipe, e) &&
           destination_init(&r->destination, o->destination, o->config, e) &&
           synth_values_create(&r->values, o->seed, e) && pool_create(&r->pool, threads, e);
}

static bool write_tensor(struct run *r, const struct tensor *t, struct err *e)
{
    for (uint64_t at = 0; at < t->bytes; at += BUFFER_BYTES) {
        uint64_t n = t->bytes - at < BUFFER_BYTES ? t->bytes - at : BUFFER_BYTES;
        synth_values_fill(r->values, r->buffer, t, at, n, r->pool);
        if (!shards_append(r->shards, r->buffer, n, e)) return false;
        r->r->bytes += n;
        report_progress(r->o->report, "synth", r->r->bytes, r->synth.bytes);
    }
    return true;
}

static bool write_tensors(struct run *r, struct err *e)
{
    const struct tensor_list *l = &r->synth.tensors;
    if (!shards_create(&r->shards, r->destination.partial, l->items, l->n, r->o->max_shard_bytes, e))
        return false;
    for (size_t i = 0; i < l->n; i++)
        if (!write_tensor(r, &l->items[i], e)) return false;
    r->r->tensors = (int64_t)l->n;
    r->r->shards = shards_count(r->shards);
    return shards_finish(r->shards, e);
}

static bool copy_neighbours(struct run *r, struct err *e)
{
    for (size_t i = 0; r->folder && i < sizeof neighbours / sizeof *neighbours; i++) {
        char *from = file_join(r->folder, neighbours[i]);
        char *to = file_join(r->destination.partial, neighbours[i]);
        bool ok = (from && to) || err_memory(e, "path", 0);
        bool there = ok && file_exists(from);
        ok = ok && (!there || file_copy(from, to, e));
        r->r->has_tokenizer = r->r->has_tokenizer || (i == 0 && there);
        free(from);
        free(to);
        if (!ok) return false;
    }
    return true;
}

/* Last: without it no reader takes the folder for a checkpoint. */
static bool write_config(struct run *r, struct err *e)
{
    char *text = doc_dump(r->synth.checkpoint.config_json, true);
    char *path = file_join(r->destination.partial, "config.json");
    bool ok = text && path ? file_write(path, text, strlen(text), e) : err_memory(e, "config.json", 0);
    free(text);
    free(path);
    return ok;
}

static void run_deinit(struct run *r)
{
    shards_free(r->shards);
    pool_free(r->pool);
    synth_values_free(r->values);
    destination_deinit(&r->destination);
    synth_deinit(&r->synth);
    json_decref(r->config);
    free(r->folder);
    free(r->buffer);
}

bool synth_write(const struct synth_options *o, struct synth_result *result, struct err *e)
{
    double start = clock_seconds();
    *result = (struct synth_result){ 0 };
    struct run r = { .o = o, .r = result, .destination = { .lock = -1 } };
    bool ok = prepare(&r, e) && destination_create(&r.destination, r.synth.bytes, o->report, e) &&
              write_tensors(&r, e) && copy_neighbours(&r, e) && write_config(&r, e) &&
              destination_commit(&r.destination, o->report, e);
    if (!ok && r.destination.lock >= 0) destination_remove(&r.destination, o->report);
    run_deinit(&r);
    result->seconds = clock_seconds() - start;
    return ok;
}
