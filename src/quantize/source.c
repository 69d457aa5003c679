#include "quantize/source.h"
#include "quantize/digest.h"
#include "base/pages.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Bytes looked at in the middle of each tensor. */
enum { SAMPLE_BYTES = 256 };

static uint64_t digest_tensor(uint64_t h, const struct tensor *t)
{
    uint64_t n = t->bytes < SAMPLE_BYTES ? t->bytes : SAMPLE_BYTES;
    h = digest(h, t->name, strlen(t->name) + 1);
    h = digest(h, &t->dtype, sizeof t->dtype);
    h = digest(h, t->shape, (size_t)t->n_dims * sizeof *t->shape);
    return n ? digest(h, t->data + (t->bytes - n) / 2, (size_t)n) : h;
}

uint64_t source_digest(const struct checkpoint *c)
{
    uint64_t h = DIGEST_START;
    char *config = json_dumps(c->config_json, JSON_COMPACT | JSON_SORT_KEYS);
    if (config) h = digest(h, config, strlen(config));
    free(config);
    for (size_t i = 0; i < c->n_tensors; i++) h = digest_tensor(h, c->tensors[i]);
    for (int i = 0; i < c->n_shards; i++) pages_release(c->shards[i].map.data, c->shards[i].map.bytes);
    return h;
}

static bool check_shard(const struct checkpoint *c, int i, struct err *e)
{
    struct stat st;
    char *path = file_join(c->path, c->shard_names[i]);
    if (!path) return err_memory(e, "path", strlen(c->path));
    bool ok = stat(path, &st) == 0 || err_errno(e, path);
    if (ok && (uint64_t)st.st_size != c->shards[i].map.bytes)
        ok = err_set(e, ERR_IO, "%s: %lld bytes, it had %" PRIu64 " when this run began; restore it", path,
                     (long long)st.st_size, c->shards[i].map.bytes);
    free(path);
    return ok;
}

bool source_check(const struct checkpoint *c, struct err *e)
{
    for (int i = 0; i < c->n_shards; i++)
        if (!check_shard(c, i, e)) return false;
    return true;
}

bool source_check_at(const struct checkpoint *c, const uint8_t *data, struct err *e)
{
    for (int i = 0; i < c->n_shards; i++) {
        const struct file_map *map = &c->shards[i].map;
        if (data >= map->data && data < map->data + map->bytes) return check_shard(c, i, e);
    }
    return true;
}
