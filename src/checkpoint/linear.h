/* The tensors of one linear module, under the names of whichever tool wrote them, and the format they tell.
 * Sources: compressed-tensors, compressors/; ModelOpt's and DeepSeek-style block FP8 as vLLM's modelopt.py
 * and fp8.py read them (docs/formats.md). */
#ifndef CHECKPOINT_LINEAR_H
#define CHECKPOINT_LINEAR_H
#include "checkpoint/checkpoint.h"

enum storage { STORED_PLAIN, STORED_NVFP4, STORED_FP8, STORED_FP8_BLOCK };

struct linear {
    enum storage storage;
    const struct tensor *codes;  /* .weight_packed, or .weight */
    const struct tensor *scale;  /* .weight_scale, or .weight_scale_inv of block FP8; NULL: none */
    const struct tensor *global; /* .weight_global_scale, or ModelOpt's .weight_scale_2 */
    const struct tensor *input;  /* .input_global_scale beside .weight_packed, else .input_scale */
    bool multiplies;             /* global and an NVFP4 input are ModelOpt's: they multiply */
    bool both;                   /* .weight and .weight_packed are there */
    int64_t rows, cols;          /* of the matrix; 0 when the codes have not two dimensions */
};

/* False: neither .weight nor .weight_packed. Tensors borrow from the checkpoint; sizes are not checked. */
bool linear_find(struct linear *out, const struct checkpoint *c, const char *module);
/* quantization_config's scheme where it fits what is stored, or where it is compressed-tensors' own; else the
 * one that the tensors tell. */
enum scheme linear_scheme(const struct linear *l, const struct checkpoint *c, const char *module);
/* Whether a module stored like this may be of that scheme. */
bool linear_agrees(enum storage s, enum scheme scheme);
/* scale's shape: [rows / 128, cols / 128], rounded up; ModelOpt writes [r, 1, c, 1]. One per row: [rows], or
 * [rows, 1]. One for all: [1] or []. */
bool linear_scale_is_block(const struct linear *l);
bool linear_scale_is_row(const struct linear *l);
bool linear_scale_is_single(const struct linear *l);
#endif
