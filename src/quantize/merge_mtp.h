/* Brings back the MTP head of a checkpoint that lost it on its way through another tool: takes all mtp
 * tensors of the source byte for byte.
 *
 * In place, and at every moment either the old checkpoint or the new one: new files are written under names
 * no reader looks at (*.quench-partial), synced and read back, then renamed in this order:
 *   1. model_mtp.safetensors   not yet in the index: no reader opens it
 *   2. config.json             when it changes: the ignore list covers tensors that are not there yet
 *   3. the index               which adds the new names
 * A checkpoint of a single model.safetensors has no index. With one beside it some readers would still take
 * the single file alone and miss the head, and no rename both takes that name away and makes the index
 * appear; so the file is written again with the head inside and renamed after config.json. This needs room
 * for a second copy while it runs. */
#ifndef QUANTIZE_MERGE_MTP_H
#define QUANTIZE_MERGE_MTP_H
#include "base/err.h"
#include "base/report.h"
#include <stdint.h>

struct merge_mtp_options {
    const char *model, *source;  /* folders */
    const struct report *report; /* progress "merge-mtp" in bytes */
};

struct merge_mtp_result {
    int64_t tensors;
    uint64_t bytes;    /* of those tensors */
    const char *file;  /* static: where they are now */
    bool ignore_added; /* "re:.*mtp.*" was put on the ignore list */
    bool layers_added; /* config.json had no mtp_num_hidden_layers */
};

/* Refuses a model that has mtp tensors, a source that lacks some or holds them quantized, and two whose
 * config.json differ in a size. On failure the model is as it was. */
bool merge_mtp(const struct merge_mtp_options *o, struct merge_mtp_result *r, struct err *e);
#endif
