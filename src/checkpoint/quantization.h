/* quantization_config (config.json, top level or inside text_config): which scheme each module has.
 * Source: compressed-tensors quant_config.py, quant_args.py, utils/match.py; for ModelOpt's and for block
 * FP8, vLLM's modelopt.py and fp8.py (docs/formats.md). Errors name what is not supported: another
 * quant_method, a non-empty transform_config or sparsity_config, a scheme that is none of enum scheme. */
#ifndef CHECKPOINT_QUANTIZATION_H
#define CHECKPOINT_QUANTIZATION_H
#include "base/doc.h"
#include "base/err.h"
#include <stddef.h>

enum scheme {
    SCHEME_NONE,     /* ignored, or matched by no target: as stored */
    SCHEME_NVFP4,    /* weights 4-bit float, tensor_group 16; activations likewise, dynamic "local" (W4A4) */
    SCHEME_NVFP4A16, /* the same weights, activations not quantized */
    SCHEME_FP8_DYNAMIC, /* weights e4m3 per channel (or per tensor); activations e4m3 per token, dynamic */
    SCHEME_FP8A16,      /* the same weights, activations not quantized */
    SCHEME_FP8,         /* the same weights; activations e4m3 with one measured scale */
    SCHEME_FP8_BLOCK,   /* weights e4m3 per 128 x 128; activations e4m3 per token and 128 columns, dynamic */
    N_SCHEMES
};
const char *scheme_name(enum scheme s); /* "NVFP4", "FP8_BLOCK", ...; NONE: "-" */

/* Whose words the config is in. What a ModelOpt or block-FP8 list says of a module is a hint only: those
 * lists use wildcards and other names of the same modules, readers differ, and the tensors tell the format.
 */
enum quantization_origin { QUANTIZATION_COMPRESSED_TENSORS, QUANTIZATION_MODELOPT, QUANTIZATION_BLOCK_FP8 };

struct quantization; /* groups with compiled targets, and the ignore list */
/* root = config.json. *out is NULL when there is no quantization_config. hf_quant_config.json of ModelOpt is
 * read as {"quantization_config": its contents}. */
bool quantization_parse(struct quantization **out, const json_t *root, struct err *e);
void quantization_free(struct quantization *q); /* NULL is fine */
enum quantization_origin quantization_origin(const struct quantization *q);
/* Scheme of a module by its name without ".weight"; class_name e.g. "Linear". Ignore wins over targets; among
 * targets exact names come first, then "re:" patterns (Python re.match: anchored at the start only), then
 * class names; sorted order inside a class. q may be NULL (SCHEME_NONE). One thread at a time: matches share
 * q's scratch memory. A pattern that gives up at its step limit counts as not matching. */
enum scheme quantization_scheme(const struct quantization *q, const char *module, const char *class_name);
/* Whether the ignore list has the module, by name, pattern or class. */
bool quantization_ignores(const struct quantization *q, const char *module, const char *class_name);
/* Whether all targets that match by name or pattern are of one scheme. Readers differ in which of several
 * wins: some go by sorted order, some by the file's. */
bool quantization_agrees(const struct quantization *q, const char *module);

/* What the argument objects of one group ("weights", "input_activations", "format") ask for. config: whose
 * "format" counts too, or NULL; path: the group's, for messages. */
bool quantization_group_scheme(enum scheme *out, const json_t *config, const json_t *group, const char *path,
                               struct err *e);
/* A preset's name, in either case. */
bool quantization_preset(enum scheme *out, const char *name, struct err *e);

/* A config of another tool in compressed-tensors' words: {"config_groups": {PRESET: names}, "ignore": names},
 * names bare. *out is NULL when it is compressed-tensors' own; else the caller owns it. */
bool quantization_translate(json_t **out, enum quantization_origin *origin, const json_t *config,
                            struct err *e);
/* Without the leading "model." and "language_model.", in any order. */
const char *quantization_bare_name(const char *module);
#endif
