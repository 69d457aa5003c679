/* Checkpoints of random values in any shape that a config.json describes: first what they consist of, then,
 * where one is wanted, the folder. */
#ifndef QUANTIZE_SYNTH_H
#define QUANTIZE_SYNTH_H
#include "base/report.h"
#include "quantize/recipe.h"
#include "quantize/synth_shapes.h"

/* A checkpoint that no file holds: open, with tensors sorted by name, whose data are not set. */
struct synth {
    struct checkpoint checkpoint; /* path, config and tensors; closed by synth_deinit */
    struct tensor_list tensors;
    uint64_t bytes; /* of all tensors */
};
/* config: config.json of the shape; a quantization_config in it is replaced. layers: of the language model,
 * the first of its layer_types; 0: all. recipe: tensors and quantization_config are what quantize writes with
 * it; NULL: BF16. name: what messages call the config. */
bool synth_init(struct synth *s, const json_t *config, const char *name, int64_t layers,
                const struct recipe *recipe, struct err *e);
void synth_deinit(struct synth *s); /* accepts a zeroed one */

/* config.json of a known model as text; NULL: none of that name. "35b-a3b": Qwen3.6-35B-A3B. */
const char *synth_known_config(const char *name);

struct synth_options {
    const char *config;      /* a config.json, or a folder that has one, or a known name */
    const char *destination; /* must not exist */
    int64_t layers;
    const struct recipe *recipe;
    uint64_t seed, max_shard_bytes;
    int threads; /* 0: this process's share */
    const struct report *report;
};
struct synth_result {
    int64_t tensors, shards;
    uint64_t bytes;
    double seconds;
    bool has_tokenizer; /* copied from beside config.json */
};
/* Writes config.json, shards with their index, and what lies beside CONFIG of tokenizer.json,
 * tokenizer_config.json, chat_template.jinja, generation_config.json and preprocessor_config.json. The folder
 * appears when it is complete. Holds a few MB. */
bool synth_write(const struct synth_options *o, struct synth_result *r, struct err *e);
/* The config's document by path, folder or known name. *folder: where its neighbours are, malloc'd; NULL for
 * a known one. The caller owns both. */
bool synth_load_config(json_t **out, char **folder, const char *config, struct err *e);
#endif
