/* The multi-token-prediction head as tensors: which there must be, in which shapes, for a given config.json.
 * Tools that load a checkpoint through transformers lose them without a word. */
#ifndef QUANTIZE_MTP_H
#define QUANTIZE_MTP_H
#include "checkpoint/checkpoint.h"

/* One module's weight or one vector. is_fused: may instead be split into matrices of experts. */
struct mtp_tensor {
    char name[128]; /* with ".weight" where it has one */
    int n_dims;
    int64_t shape[3];
    bool is_fused;
};

bool mtp_is_name(const char *tensor); /* begins with "mtp." */
size_t mtp_count(const struct checkpoint *c);
/* Calls visit for every tensor that config.json asks for; false: visit returned false. */
bool mtp_visit(const struct config *c, bool (*visit)(void *ctx, const struct mtp_tensor *t), void *ctx);
/* True when the checkpoint has the tensor, plain, packed or split into experts. */
bool mtp_has(const struct checkpoint *c, const struct mtp_tensor *t);
/* What a reader makes of the head's modules: the first that quantization_config would have quantized although
 * its tensor is not; false: none. Expert names are tried too, since readers build them one by one. */
bool mtp_uncovered(char out[128], const struct checkpoint *c);
#endif
