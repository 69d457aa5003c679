/* What a user changes of config.json while a checkpoint is opened: vLLM's --hf-overrides, an object that is
 * merged into it field by field, and the short form for YaRN. Only fields that are read and that the weights
 * do not fix may be changed; whatever else is named is an error that names it, so that no override is dropped
 * in silence. One that repeats what config.json says is fine. */
#ifndef CHECKPOINT_OVERRIDES_H
#define CHECKPOINT_OVERRIDES_H
#include "base/doc.h"
#include "base/err.h"

struct overrides {
    const json_t *fields; /* an object; NULL: none */
    double rope_yarn;     /* rope_type "yarn" and this factor, in rope_parameters; 0: none */
};

/* config: config.json, an object, changed in place; after a failure perhaps in part. */
bool overrides_apply(json_t *config, const struct overrides *o, struct err *e);
#endif
