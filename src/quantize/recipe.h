/* Which modules get which scheme, as a table: a built-in recipe is one, a recipe file fills one. From it come
 * quantization_config of config.json and recipe.yaml. Source: compressed-tensors quant_config.py,
 * quant_scheme.py (presets); llm-compressor recipe syntax (docs/formats.md). */
#ifndef QUANTIZE_RECIPE_H
#define QUANTIZE_RECIPE_H
#include "base/err.h"
#include "checkpoint/quantization.h"
#include <jansson.h>
#include <stddef.h>

/* Texts are module names, or Python patterns behind "re:" (re.match: anchored at the start only). */
struct recipe_group {
    const char *name;   /* "group_0" */
    enum scheme scheme; /* any but SCHEME_NONE */
    const char *const *targets;
    size_t n_targets;
};

struct recipe {
    const char *name;
    const struct recipe_group *groups;
    size_t n_groups;
    const char *const *ignore;
    size_t n_ignore;
};

/* The model card's: routed experts NVFP4, attention projections and shared expert FP8, the rest as it is. */
const struct recipe *recipe_card(void);

/* {"quantization_config": {...}} with every key compressed-tensors writes. ignore: an array of strings,
 * borrowed. The caller owns *out. */
bool recipe_config(json_t **out, const struct recipe *r, json_t *ignore, struct err *e);
/* recipe.yaml in llm-compressor's syntax; *text is malloc'd and the caller's. */
bool recipe_yaml(char **text, size_t *bytes, const struct recipe *r, struct err *e);
#endif
