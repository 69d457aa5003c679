/* Checks first, then writes, then renames. */
#include "quantize/merge_mtp.h"
#include "base/doc.h"
#include "base/file.h"
#include "quantize/mtp.h"
#include "base/pages.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <unistd.h>

static const char CONFIG_NAME[] = "config.json", INDEX_NAME[] = "model.safetensors.index.json",
                  SINGLE_NAME[] = "model.safetensors", MTP_NAME[] = "model_mtp.safetensors",
                  PATTERN[] = "re:.*mtp.*", LAYERS_KEY[] = "mtp_num_hidden_layers";
enum { INDEX_BYTES_MAX = 256 << 20, SLICE_BYTES = 64 << 20, EXTRA_BYTES = 1 << 20 };

/* A file that is to replace another, or to appear. */
struct change {
    char *partial, *path; /* NULL: no such change */
};

struct merge {
    const struct merge_mtp_options *options;
    struct merge_mtp_result *result;
    struct checkpoint model, source;
    bool single;
    int lock;
    struct tensor *tensors; /* of the file to be written */
    size_t n_tensors;
    json_t *config;                            /* config.json as it will be */
    struct change shard, config_change, index; /* renamed in this order */
    uint64_t done, total;
};

/* Checks. */

static bool check_size(const char *what, int64_t model, int64_t source, struct err *e)
{
    return model == source ||
           err_set(e, ERR_ARGUMENT,
                   "%s is %" PRId64 " in the model, %" PRId64 " in the source: not the same network", what,
                   model, source);
}

static bool check_configs(const struct config *a, const struct config *b, struct err *e)
{
    return check_size("hidden_size", a->hidden_size, b->hidden_size, e) &&
           check_size("vocab_size", a->vocab_size, b->vocab_size, e) &&
           check_size("num_hidden_layers", a->n_layers, b->n_layers, e) &&
           check_size("num_attention_heads", a->n_heads, b->n_heads, e) &&
           check_size("num_key_value_heads", a->n_kv_heads, b->n_kv_heads, e) &&
           check_size("head_dim", a->head_dim, b->head_dim, e) &&
           check_size("num_experts", a->n_experts, b->n_experts, e) &&
           check_size("num_experts_per_tok", a->experts_per_token, b->experts_per_token, e) &&
           check_size("moe_intermediate_size", a->moe_intermediate, b->moe_intermediate, e) &&
           check_size("shared_expert_intermediate_size", a->shared_intermediate, b->shared_intermediate, e);
}

/* The object with the text model's fields. */
static json_t *text_of(json_t *config)
{
    json_t *text = json_object_get(config, "text_config");
    return json_is_object(text) ? text : config;
}

/* A tool that lost the tensors may have lost the field as well; one that says otherwise meant it. */
static bool check_layers(const struct merge *m, struct err *e)
{
    const json_t *given = json_object_get(text_of(m->model.config_json), LAYERS_KEY);
    if (m->source.config.mtp_layers == 0)
        return err_set(e, ERR_ARGUMENT, "%s: config.json has no %s: there is no head to take", m->source.path,
                       LAYERS_KEY);
    return !given || json_is_null(given) ||
           check_size(LAYERS_KEY, m->model.config.mtp_layers, m->source.config.mtp_layers, e);
}

struct search {
    const struct checkpoint *c;
    struct err *e;
};

static bool find_wanted(void *ctx, const struct mtp_tensor *want)
{
    struct search *s = ctx;
    const struct tensor *t = checkpoint_find(s->c, want->name);
    char found[128];
    if (!mtp_has(s->c, want))
        return err_set(s->e, ERR_FORMAT, "%s: tensor '%s' is missing", s->c->path, want->name);
    if (!t || (t->n_dims == want->n_dims &&
               memcmp(t->shape, want->shape, (size_t)t->n_dims * sizeof *t->shape) == 0))
        return true;
    return err_set(s->e, ERR_FORMAT, "%s: tensor '%s': shape %s is not what config.json asks for", s->c->path,
                   want->name, tensor_shape_text(t, found, sizeof found));
}

static bool check_source(const struct merge *m, struct err *e)
{
    struct search s = { &m->source, e };
    if (mtp_count(&m->source) == 0)
        return err_set(e, ERR_ARGUMENT, "%s: it has no mtp tensors either", m->source.path);
    for (size_t i = 0; i < m->source.n_tensors; i++) {
        const struct tensor *t = m->source.tensors[i];
        if (mtp_is_name(t->name) && t->dtype != DTYPE_BF16 && t->dtype != DTYPE_F16 && t->dtype != DTYPE_F32)
            return err_set(e, ERR_UNSUPPORTED, "%s: tensor '%s' is %s; only unquantized heads are taken over",
                           m->source.path, t->name, dtype_name(t->dtype));
    }
    return mtp_visit(&m->source.config, find_wanted, &s);
}

/* What another run left, or a file of somebody else's: the index does not name it. */
static bool check_shard_name(const struct merge *m, struct err *e)
{
    struct safetensors s;
    struct err ignored = { 0 };
    if (m->single || !file_exists(m->shard.path)) return true;
    bool ours = safetensors_open(&s, m->shard.path, &ignored);
    for (int i = 0; i < m->model.n_shards; i++) ours = ours && strcmp(m->model.shard_names[i], MTP_NAME) != 0;
    for (size_t i = 0; ours && i < s.n_tensors; i++) ours = mtp_is_name(s.tensors[i].name);
    safetensors_close(&s);
    return ours || err_set(e, ERR_ARGUMENT, "%s: already exists and holds something else; move it away",
                           m->shard.path);
}

static bool lock_folder(struct merge *m, struct err *e)
{
    m->lock = open(m->model.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (m->lock < 0) return err_errno(e, m->model.path);
    if (flock(m->lock, LOCK_EX | LOCK_NB) == 0) return true;
    return errno == EWOULDBLOCK ? err_set(e, ERR_ARGUMENT, "%s: another run is writing it", m->model.path)
                                : err_errno(e, m->model.path);
}

static bool check_model(struct merge *m, struct err *e)
{
    size_t n = mtp_count(&m->model);
    if (n > 0) return err_set(e, ERR_ARGUMENT, "%s: already has %zu mtp tensors", m->model.path, n);
    return check_configs(&m->model.config, &m->source.config, e) && check_layers(m, e) && check_source(m, e);
}

static bool check_room(const struct merge *m, struct err *e)
{
    struct statvfs fs;
    if (statvfs(m->model.path, &fs) != 0) return err_errno(e, m->model.path);
    uint64_t block = fs.f_frsize ? fs.f_frsize : 1, need = m->total + EXTRA_BYTES;
    if (fs.f_bavail >= need / block) return true;
    return err_set(e, ERR_IO, "%s: %.1f GB are needed, %.1f GB are free", m->model.path, (double)need / 1e9,
                   (double)fs.f_bavail * (double)block / 1e9);
}

/* The new shard. */

static bool name_change(struct change *c, const char *folder, const char *name, struct err *e)
{
    c->path = file_join(folder, name);
    if (c->path && asprintf(&c->partial, "%s.quench-partial", c->path) >= 0) return true;
    c->partial = NULL;
    return err_memory(e, "path", strlen(folder));
}

/* All mtp tensors, and for a single file everything else as well. */
static bool list_tensors(struct merge *m, struct err *e)
{
    size_t n = m->source.n_tensors + m->model.n_tensors;
    m->tensors = calloc(n + 1, sizeof *m->tensors);
    if (!m->tensors) return err_memory(e, "tensor list", n * sizeof *m->tensors);
    for (size_t i = 0; m->single && i < m->model.n_tensors; i++)
        m->tensors[m->n_tensors++] = *m->model.tensors[i];
    for (size_t i = 0; i < m->source.n_tensors; i++) {
        const struct tensor *t = m->source.tensors[i];
        if (!mtp_is_name(t->name)) continue;
        m->tensors[m->n_tensors++] = *t;
        m->result->tensors++;
        m->result->bytes += t->bytes;
    }
    for (size_t i = 0; i < m->n_tensors; i++) m->total += m->tensors[i].bytes;
    return true;
}

static bool append(struct merge *m, struct safetensors_writer *w, const struct tensor *t, struct err *e)
{
    for (uint64_t at = 0; at < t->bytes; at += SLICE_BYTES) {
        uint64_t n = t->bytes - at < SLICE_BYTES ? t->bytes - at : SLICE_BYTES;
        if (!safetensors_writer_append(w, t->data + at, (size_t)n, e)) return false;
        pages_release(t->data + at, n);
        m->done += n;
        report_progress(m->options->report, "merge-mtp", m->done, m->total);
    }
    return true;
}

/* The file that was written has these tensors with these bytes. */
static bool read_back(const struct merge *m, struct err *e)
{
    struct safetensors s;
    if (!safetensors_open(&s, m->shard.partial, e)) return false;
    bool ok = s.n_tensors == m->n_tensors;
    for (size_t i = 0; ok && i < m->n_tensors; i++) {
        const struct tensor *want = &m->tensors[i], *have = safetensors_find(&s, want->name);
        ok = have && have->dtype == want->dtype && have->n_dims == want->n_dims &&
             memcmp(have->shape, want->shape, (size_t)want->n_dims * sizeof *want->shape) == 0 &&
             have->bytes == want->bytes && memcmp(have->data, want->data, (size_t)want->bytes) == 0;
        if (ok) pages_release(want->data, want->bytes);
    }
    safetensors_close(&s);
    return ok || err_set(e, ERR_IO, "%s: does not read back as it was written", m->shard.partial);
}

static bool write_shard(struct merge *m, struct err *e)
{
    struct safetensors_writer *w;
    remove(m->shard.partial); /* an interrupted run's: the lock says nobody is at it */
    if (!safetensors_writer_create(&w, m->shard.partial, m->tensors, m->n_tensors, e)) return false;
    for (size_t i = 0; i < m->n_tensors; i++)
        if (!append(m, w, &m->tensors[i], e)) {
            safetensors_writer_abandon(w);
            return false;
        }
    return safetensors_writer_finish(w, e) && read_back(m, e);
}

/* config.json and the index. */

static bool add_pattern(struct merge *m, json_t *block, struct err *e)
{
    json_t *list = json_object_get(block, "ignore");
    if (!json_is_object(block)) return true;
    for (size_t i = 0; i < json_array_size(list); i++)
        if (strcmp(json_string_value(json_array_get(list, i)), PATTERN) == 0) return true;
    if (!json_is_array(list)) {
        list = json_array();
        if (json_object_set_new(block, "ignore", list) != 0) return err_memory(e, CONFIG_NAME, 0);
    }
    if (json_array_append_new(list, json_string(PATTERN)) != 0) return err_memory(e, CONFIG_NAME, 0);
    m->result->ignore_added = true;
    return true;
}

static bool change_config(struct merge *m, struct err *e)
{
    m->config = json_deep_copy(m->model.config_json);
    if (!m->config) return err_memory(e, CONFIG_NAME, 0);
    json_t *text = text_of(m->config);
    if (m->model.config.mtp_layers == 0) {
        if (json_object_set_new(text, LAYERS_KEY, json_integer(m->source.config.mtp_layers)) != 0)
            return err_memory(e, CONFIG_NAME, 0);
        m->result->layers_added = true;
    }
    return add_pattern(m, json_object_get(m->config, "quantization_config"), e) &&
           (text == m->config || add_pattern(m, json_object_get(text, "quantization_config"), e));
}

static bool write_text(const struct change *c, char *text, struct err *e)
{
    bool ok = text ? file_write(c->partial, text, strlen(text), e) : err_memory(e, c->path, 0);
    free(text);
    return ok;
}

static bool write_config(struct merge *m, struct err *e)
{
    if (!change_config(m, e)) return false;
    if (!m->result->ignore_added && !m->result->layers_added) return true;
    return name_change(&m->config_change, m->model.path, CONFIG_NAME, e) &&
           write_text(&m->config_change, doc_dump(m->config, false), e);
}

/* total_size is what loaders ignore and people read. */
static bool extend_index(const struct merge *m, json_t *index)
{
    json_t *map = json_object_get(index, "weight_map"), *metadata = json_object_get(index, "metadata");
    const json_t *size = json_object_get(metadata, "total_size");
    for (size_t i = 0; i < m->n_tensors; i++)
        if (json_object_set_new(map, m->tensors[i].name, json_string(MTP_NAME)) != 0) return false;
    if (!json_is_number(size)) return true;
    json_int_t total = (json_int_t)json_number_value(size) + (json_int_t)m->result->bytes;
    return json_object_set_new(metadata, "total_size", json_integer(total)) == 0;
}

static bool write_index(struct merge *m, struct err *e)
{
    json_t *index;
    if (m->single) return true;
    if (!name_change(&m->index, m->model.path, INDEX_NAME, e) ||
        !doc_load(&index, m->index.path, INDEX_BYTES_MAX, e))
        return false;
    char *text = extend_index(m, index) ? json_dumps(index, JSON_INDENT(2) | JSON_SORT_KEYS) : NULL;
    json_decref(index);
    return write_text(&m->index, text, e);
}

/* The renames. */

static bool rename_one(struct change *c, const char *folder, struct err *e)
{
    if (!c->partial) return true;
    if (rename(c->partial, c->path) != 0) return err_errno(e, c->path);
    free(c->partial);
    c->partial = NULL;
    return file_sync_folder(folder, e); /* each name is on disk before the next */
}

/* For a single file config.json goes first too: the ignore list may cover what is not there, while a head
 * that is there and not covered would be taken for quantized. */
static bool commit(struct merge *m, struct err *e)
{
    const char *folder = m->model.path;
    if (m->single) return rename_one(&m->config_change, folder, e) && rename_one(&m->shard, folder, e);
    if (rename_one(&m->shard, folder, e) && rename_one(&m->config_change, folder, e) &&
        rename_one(&m->index, folder, e))
        return true;
    if (m->index.partial && !m->shard.partial) remove(m->shard.path); /* renamed, and nothing names it */
    return false;
}

/* Lists of other tools have no pattern that all their readers honour. */
static bool check_words(const struct merge *m, struct err *e)
{
    return quantization_origin(m->model.quantization) == QUANTIZATION_COMPRESSED_TENSORS ||
           err_set(e, ERR_UNSUPPORTED,
                   "%s: quantization_config is not compressed-tensors': merge-mtp cannot mark the head as "
                   "unquantized there",
                   m->model.path);
}

static bool prepare(struct merge *m, struct err *e)
{
    if (!checkpoint_open(&m->model, m->options->model, e) ||
        !checkpoint_open(&m->source, m->options->source, e))
        return false;
    char *index = file_join(m->model.path, INDEX_NAME);
    if (!index) return err_memory(e, "path", strlen(m->model.path));
    m->single = !file_exists(index);
    free(index);
    m->result->file = m->single ? SINGLE_NAME : MTP_NAME;
    return check_words(m, e) && check_model(m, e) && lock_folder(m, e) &&
           name_change(&m->shard, m->model.path, m->result->file, e) && check_shard_name(m, e) &&
           list_tensors(m, e) && check_room(m, e);
}

static void change_deinit(struct change *c)
{
    if (c->partial) remove(c->partial);
    free(c->partial);
    free(c->path);
}

bool merge_mtp(const struct merge_mtp_options *o, struct merge_mtp_result *r, struct err *e)
{
    *r = (struct merge_mtp_result){ 0 };
    struct merge m = { .options = o, .result = r, .lock = -1 };
    bool ok =
        prepare(&m, e) && write_shard(&m, e) && write_config(&m, e) && write_index(&m, e) && commit(&m, e);
    change_deinit(&m.shard);
    change_deinit(&m.config_change);
    change_deinit(&m.index);
    if (m.lock >= 0) close(m.lock);
    json_decref(m.config);
    free(m.tensors);
    checkpoint_close(&m.source);
    checkpoint_close(&m.model);
    return ok;
}
