/* Opens a checkpoint folder: config.json, the index, every shard. Takes a path, gives all tensors sorted by
 * name with proof that index and shards agree. Messages name the folder or the file inside it first. */
#include "checkpoint/checkpoint.h"
#include "base/file.h"
#include "base/pool.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char INDEX_NAME[] = "model.safetensors.index.json", MODELOPT_NAME[] = "hf_quant_config.json";
static const char SINGLE_NAME[] = "model.safetensors";
enum { CONFIG_BYTES_MAX = 16 << 20, INDEX_BYTES_MAX = 256 << 20 };

/* A tensor and the shard that holds it, while the list of all is sorted. */
struct placed {
    const struct tensor *tensor;
    int shard;
};

/* An entry of the index. */
struct entry {
    const char *file, *tensor;
};

static bool is_there(const struct checkpoint *c, const char *name)
{
    char *path = file_join(c->path, name);
    bool there = path && file_exists(path);
    free(path);
    return there;
}

static bool load_json(json_t **out, const struct checkpoint *c, const char *name, size_t max, struct err *e)
{
    char *path = file_join(c->path, name);
    if (!path) return err_memory(e, "path", strlen(c->path) + strlen(name));
    bool ok = doc_load(out, path, max, e);
    free(path);
    return ok;
}

static bool set_path(struct checkpoint *c, const char *path, struct err *e)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    c->path = strndup(path, n);
    if (!c->path) return err_memory(e, "path", n);
    if (file_is_folder(c->path)) return true;
    return err_set(e, ERR_IO, "%s: %s", path, file_exists(c->path) ? "not a folder" : "no such folder");
}

/* ModelOpt's older exports say it in a file of their own. */
static bool load_modelopt(struct checkpoint *c, struct err *e)
{
    json_t *config, *root;
    if (!is_there(c, MODELOPT_NAME)) return true;
    if (!load_json(&config, c, MODELOPT_NAME, CONFIG_BYTES_MAX, e)) return false;
    root = json_pack("{s:o}", "quantization_config", config);
    bool ok = root ? quantization_parse(&c->quantization, root, e) : err_memory(e, MODELOPT_NAME, 0);
    json_decref(root);
    return ok || err_note(e, "%s/%s", c->path, MODELOPT_NAME);
}

static bool load_config(struct checkpoint *c, const struct overrides *o, struct err *e)
{
    if (!is_there(c, "config.json"))
        return err_set(e, ERR_IO, "%s: no config.json: not a checkpoint folder", c->path);
    if (!load_json(&c->config_json, c, "config.json", CONFIG_BYTES_MAX, e) ||
        !overrides_apply(c->config_json, o, e))
        return false;
    if (!config_parse(&c->config, c->config_json, e) ||
        !quantization_parse(&c->quantization, c->config_json, e))
        return err_note(e, "%s/config.json%s", c->path, o ? " with what is overridden" : "");
    return c->quantization || load_modelopt(c, e);
}

static bool check_shard_name(const json_t *v, struct err *e)
{
    const char *name = json_string_value(v);
    if (!name || strlen(name) != json_string_length(v)) return err_set(e, ERR_FORMAT, "expected a file name");
    if (*name && !strchr(name, '/') && strcmp(name, ".") != 0 && strcmp(name, "..") != 0) return true;
    return err_set(e, ERR_FORMAT, "'%.200s' is not the name of a file in this folder", name);
}

static int by_file(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->file, ((const struct entry *)b)->file);
}

/* The entries of the index sorted by file; *n_files counts the different ones. */
static bool list_entries(struct entry **out, size_t *n, size_t *n_files, json_t *map, struct err *e)
{
    *n = *n_files = 0;
    *out = calloc(json_object_size(map) + 1, sizeof **out);
    if (!*out) return err_memory(e, "index", json_object_size(map) * sizeof **out);
    const char *key;
    const json_t *value;
    json_object_foreach(map, key, value)
    {
        if (!check_shard_name(value, e)) return err_note(e, "weight_map: tensor '%s'", key);
        (*out)[(*n)++] = (struct entry){ json_string_value(value), key };
    }
    qsort(*out, *n, sizeof **out, by_file);
    for (size_t i = 0; i < *n; i++) *n_files += i == 0 || by_file(&(*out)[i - 1], &(*out)[i]) != 0;
    return true;
}

static bool reserve_shards(struct checkpoint *c, size_t n, struct err *e)
{
    if (n > INT32_MAX) return err_set(e, ERR_LIMIT, "%zu shards", n);
    c->shards = calloc(n + 1, sizeof *c->shards);
    c->shard_names = calloc(n + 1, sizeof *c->shard_names);
    return (c->shards && c->shard_names) || err_memory(e, "shard list", n * sizeof *c->shards);
}

static bool add_shard(struct checkpoint *c, const char *name, struct err *e)
{
    c->shard_names[c->n_shards] = strdup(name);
    return c->shard_names[c->n_shards++] || err_memory(e, "shard name", strlen(name) + 1);
}

/* What happens to each of the shards while all are opened. */
struct opening {
    struct checkpoint *c;
    struct err *errors; /* [n_shards], of those that failed */
    bool *opened;       /* [n_shards] */
};

static void open_shard(void *ctx, int64_t i, int thread)
{
    struct opening *o = ctx;
    char *path = file_join(o->c->path, o->c->shard_names[i]);
    (void)thread;
    o->opened[i] = path ? safetensors_open(&o->c->shards[i], path, &o->errors[i])
                        : err_memory(&o->errors[i], "path", strlen(o->c->path));
    free(path);
}

/* Headers name every tensor, 125,000 of the released model's: each is read by a thread. The first shard that
 * cannot be opened is the error. */
static bool open_shards(struct checkpoint *c, struct err *e)
{
    if (c->n_shards == 0) return true;
    int threads = pool_default_threads() < c->n_shards ? pool_default_threads() : c->n_shards;
    size_t n = (size_t)c->n_shards;
    struct opening o = { c, calloc(n, sizeof *o.errors), calloc(n, sizeof *o.opened) };
    struct pool *pool = NULL;
    bool ok = ((o.errors && o.opened) || err_memory(e, "shard list", n * sizeof *o.errors)) &&
              pool_create(&pool, threads, e);
    if (ok) pool_run(pool, c->n_shards, open_shard, &o);
    for (size_t i = 0; ok && i < n; i++) {
        ok = o.opened[i];
        if (!ok && e) *e = o.errors[i];
    }
    pool_free(pool);
    free(o.errors);
    free(o.opened);
    return ok;
}

/* Each file of the sorted entries once. */
static bool open_entries(struct checkpoint *c, const struct entry *entries, size_t n, struct err *e)
{
    bool single_used = false;
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && by_file(&entries[i - 1], &entries[i]) == 0) continue;
        if (!is_there(c, entries[i].file))
            return err_set(e, ERR_IO, "%s: shard %s is missing; %s places tensor '%s' in it", c->path,
                           entries[i].file, INDEX_NAME, entries[i].tensor);
        if (!add_shard(c, entries[i].file, e)) return false;
        single_used = single_used || strcmp(entries[i].file, SINGLE_NAME) == 0;
    }
    if (single_used || !is_there(c, SINGLE_NAME)) return open_shards(c, e);
    return err_set(
        e, ERR_FORMAT,
        "%s: %s lies beside %s, which does not name it: remove it or the index: other tools would load it "
        "instead of the shards",
        c->path, SINGLE_NAME, INDEX_NAME);
}

static bool open_indexed(struct checkpoint *c, json_t *map, struct err *e)
{
    struct entry *entries;
    size_t n, n_files;
    bool ok = list_entries(&entries, &n, &n_files, map, e) || err_note(e, "%s/%s", c->path, INDEX_NAME);
    ok = ok && reserve_shards(c, n_files, e) && open_entries(c, entries, n, e);
    free(entries);
    return ok;
}

static int by_tensor(const void *a, const void *b)
{
    return strcmp(((const struct placed *)a)->tensor->name, ((const struct placed *)b)->tensor->name);
}

static bool store_sorted(struct checkpoint *c, const struct placed *all, size_t n, struct err *e)
{
    for (size_t i = 1; i < n; i++)
        if (by_tensor(&all[i - 1], &all[i]) == 0)
            return err_set(e, ERR_FORMAT, "%s: tensor '%s' is both in %s and in %s", c->path,
                           all[i].tensor->name, c->shard_names[all[i - 1].shard],
                           c->shard_names[all[i].shard]);
    c->tensors = malloc((n + 1) * sizeof *c->tensors);
    c->tensor_shard = malloc((n + 1) * sizeof *c->tensor_shard);
    if (!c->tensors || !c->tensor_shard) return err_memory(e, "tensor list", n * sizeof *c->tensors);
    for (size_t i = 0; i < n; i++) {
        c->tensors[i] = all[i].tensor;
        c->tensor_shard[i] = all[i].shard;
    }
    c->n_tensors = n;
    return true;
}

static bool list_tensors(struct checkpoint *c, struct err *e)
{
    size_t n = 0, k = 0;
    for (int s = 0; s < c->n_shards; s++) n += c->shards[s].n_tensors;
    struct placed *all = malloc((n + 1) * sizeof *all);
    if (!all) return err_memory(e, "tensor list", n * sizeof *all);
    for (int s = 0; s < c->n_shards; s++)
        for (size_t i = 0; i < c->shards[s].n_tensors; i++)
            all[k++] = (struct placed){ &c->shards[s].tensors[i], s };
    qsort(all, n, sizeof *all, by_tensor);
    bool ok = store_sorted(c, all, n, e);
    free(all);
    return ok;
}

static size_t find(const struct checkpoint *c, const char *name)
{
    size_t low = 0, high = c->n_tensors;
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        int order = strcmp(name, c->tensors[mid]->name);
        if (order == 0) return mid;
        if (order < 0)
            high = mid;
        else
            low = mid + 1;
    }
    return SIZE_MAX;
}

/* Both directions: what the index says is so, and the shards hold nothing else. */
static bool check_index(const struct checkpoint *c, json_t *map, struct err *e)
{
    const char *name;
    const json_t *file;
    json_object_foreach(map, name, file)
    {
        size_t i = find(c, name);
        if (i == SIZE_MAX)
            return err_set(e, ERR_FORMAT, "%s: tensor '%s' is in no shard; %s places it in %s", c->path, name,
                           INDEX_NAME, json_string_value(file));
        const char *holder = c->shard_names[c->tensor_shard[i]];
        if (strcmp(holder, json_string_value(file)) != 0)
            return err_set(e, ERR_FORMAT, "%s: tensor '%s' is in %s; %s places it in %s", c->path, name,
                           holder, INDEX_NAME, json_string_value(file));
    }
    if (json_object_size(map) == c->n_tensors) return true; /* as many names, all of them found */
    for (size_t i = 0; i < c->n_tensors; i++)
        if (!json_object_get(map, c->tensors[i]->name))
            return err_set(e, ERR_FORMAT, "%s: tensor '%s' of %s is not in %s", c->path, c->tensors[i]->name,
                           c->shard_names[c->tensor_shard[i]], INDEX_NAME);
    return true;
}

static bool open_sharded(struct checkpoint *c, struct err *e)
{
    json_t *index;
    if (!load_json(&index, c, INDEX_NAME, INDEX_BYTES_MAX, e)) return false;
    json_t *map = json_object_get(index, "weight_map");
    bool ok = json_is_object(map) ||
              err_set(e, ERR_FORMAT, "%s/%s: weight_map: expected an object", c->path, INDEX_NAME);
    ok = ok && open_indexed(c, map, e) && list_tensors(c, e) && check_index(c, map, e);
    json_decref(index);
    return ok;
}

static bool open_tensors(struct checkpoint *c, struct err *e)
{
    if (is_there(c, INDEX_NAME)) return open_sharded(c, e);
    if (is_there(c, SINGLE_NAME))
        return reserve_shards(c, 1, e) && add_shard(c, SINGLE_NAME, e) && open_shards(c, e) &&
               list_tensors(c, e);
    return err_set(e, ERR_IO, "%s: neither %s nor %s", c->path, INDEX_NAME, SINGLE_NAME);
}

bool checkpoint_open_overridden(struct checkpoint *c, const char *path, const struct overrides *o,
                                struct err *e)
{
    *c = (struct checkpoint){ 0 };
    if (set_path(c, path, e) && load_config(c, o, e) && open_tensors(c, e)) return true;
    checkpoint_close(c);
    return false;
}

bool checkpoint_open(struct checkpoint *c, const char *path, struct err *e)
{
    return checkpoint_open_overridden(c, path, NULL, e);
}

void checkpoint_close(struct checkpoint *c)
{
    for (int i = 0; i < c->n_shards; i++) {
        safetensors_close(&c->shards[i]);
        free(c->shard_names[i]);
    }
    free(c->shards);
    free(c->shard_names);
    free(c->tensors);
    free(c->tensor_shard);
    quantization_free(c->quantization);
    config_deinit(&c->config);
    json_decref(c->config_json);
    free(c->path);
    *c = (struct checkpoint){ 0 };
}

const struct tensor *checkpoint_find(const struct checkpoint *c, const char *name)
{
    size_t i = find(c, name);
    return i == SIZE_MAX ? NULL : c->tensors[i];
}

struct ids {
    int32_t *items;
    int max, n;
};

static bool add_id(struct ids *ids, const struct checkpoint *c, const json_t *v, struct err *e)
{
    if (!json_is_integer(v))
        return err_set(e, ERR_FORMAT, "eos_token_id: expected an integer or a list of them");
    json_int_t id = json_integer_value(v);
    if (id < 0 || id >= c->config.vocab_size)
        return err_set(e, ERR_FORMAT, "eos_token_id: %" JSON_INTEGER_FORMAT " is not from 0 to %" PRId64, id,
                       c->config.vocab_size - 1);
    for (int i = 0; i < ids->n; i++)
        if (ids->items[i] == id) return true;
    if (ids->n < ids->max) ids->items[ids->n++] = (int32_t)id;
    return true;
}

static bool add_ids(struct ids *ids, const struct checkpoint *c, const json_t *object, struct err *e)
{
    const json_t *v = json_object_get(object, "eos_token_id");
    if (!v || json_is_null(v)) return true;
    if (!json_is_array(v)) return add_id(ids, c, v, e);
    for (size_t i = 0; i < json_array_size(v); i++)
        if (!add_id(ids, c, json_array_get(v, i), e)) return false;
    return true;
}

static bool add_generation_ids(struct ids *ids, const struct checkpoint *c, struct err *e)
{
    json_t *generation;
    if (!is_there(c, "generation_config.json")) return true;
    if (!load_json(&generation, c, "generation_config.json", CONFIG_BYTES_MAX, e)) return false;
    bool ok = json_is_object(generation) ? add_ids(ids, c, generation, e)
                                         : err_set(e, ERR_FORMAT, "expected an object");
    json_decref(generation);
    return ok || err_note(e, "%s/generation_config.json", c->path);
}

bool checkpoint_eos_tokens(const struct checkpoint *c, int32_t *ids, int max, int *n, struct err *e)
{
    struct ids list = { ids, max, 0 };
    const json_t *text = json_object_get(c->config_json, "text_config");
    *n = 0;
    if (!add_generation_ids(&list, c, e)) return false;
    if (!add_ids(&list, c, text, e) || !add_ids(&list, c, c->config_json, e))
        return err_note(e, "%s/config.json", c->path);
    *n = list.n;
    return true;
}
