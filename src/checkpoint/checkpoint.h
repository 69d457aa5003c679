/* A checkpoint folder as it is on disk: config.json, the shards named by model.safetensors.index.json (or one
 * model.safetensors), every tensor by name. Opening proves: each shard of the index exists, each name of the
 * index is in the shard it names, no shard holds a tensor the index does not place there, and no
 * model.safetensors lies unused beside an index. The message says what to do. */
#ifndef CHECKPOINT_CHECKPOINT_H
#define CHECKPOINT_CHECKPOINT_H
#include "base/doc.h"
#include "base/err.h"
#include "checkpoint/config.h"
#include "checkpoint/overrides.h"
#include "checkpoint/quantization.h"
#include "checkpoint/safetensors.h"
#include <stddef.h>
#include <stdint.h>

struct checkpoint {
    char *path;
    json_t *config_json; /* config.json as read, with what was overridden */
    struct config config;
    struct quantization *quantization; /* NULL: not quantized */
    struct safetensors *shards;
    char **shard_names; /* file names, in order */
    int n_shards;
    const struct tensor **tensors; /* all, sorted by name; borrow from the shards */
    int *tensor_shard;             /* [n_tensors] index into shards, parallel to tensors */
    size_t n_tensors;
};

bool checkpoint_open(struct checkpoint *c, const char *path, struct err *e);
/* The same with another config.json than the file says; o: NULL, none. */
bool checkpoint_open_overridden(struct checkpoint *c, const char *path, const struct overrides *o,
                                struct err *e);
void checkpoint_close(struct checkpoint *c); /* accepts a zeroed one */

const struct tensor *checkpoint_find(const struct checkpoint *c, const char *name); /* NULL: absent */
/* Every eos id of generation_config.json (an integer or a list), then those of config.json, each once; ids[]
 * gets at most `max` of them, *n says how many. A missing generation_config.json is fine, a broken one is an
 * error. */
bool checkpoint_eos_tokens(const struct checkpoint *c, int32_t *ids, int max, int *n, struct err *e);
#endif
