/* Which tensors the released checkpoints have, as names and shapes, for any config.json: the language model,
 * lm_head unless it is tied, the MTP head and the vision tower where the config has them. All are BF16.
 * Source: the released checkpoint (docs/formats.md). */
#ifndef QUANTIZE_SYNTH_SHAPES_H
#define QUANTIZE_SYNTH_SHAPES_H
#include "checkpoint/checkpoint.h"

/* Tensors without data. Names are owned. Zero-initialise. */
struct tensor_list {
    struct tensor *items;
    size_t n, capacity;
};
/* has_text_config: names begin with "model.language_model.", else with "model." as in text-only exports. */
bool synth_shapes(struct tensor_list *l, const struct config *c, bool has_text_config, struct err *e);
void tensor_list_deinit(struct tensor_list *l);
#endif
