/* Which modules get which scheme, as a table: a built-in recipe is one, a recipe file fills one. From it come
 * quantization_config of config.json and recipe.yaml. Source: compressed-tensors quant_config.py,
 * quant_scheme.py (presets); llm-compressor recipe syntax (docs/formats.md). */
#ifndef QUANTIZE_RECIPE_H
#define QUANTIZE_RECIPE_H
#include "base/err.h"
#include "checkpoint/quantization.h"
#include <jansson.h>
#include <stdbool.h>
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
/* "card"; "nvfp4": routed experts, shared expert and attention NVFP4; "fast": the card's with FP8 for the
 * DeltaNet projections (but in_proj_a and in_proj_b, one row a head) and for lm_head; "nvfp4a16": routed
 * experts NVFP4 with activations as they are. NULL: no such name. */
const struct recipe *recipe_builtin(const char *name);

/* A recipe file. Stages, modifiers and a QuantizationModifier with config_groups, or with scheme and targets;
 * what it asks for and is not done here is an error with its line, so is any key that is not known. */
struct recipe_file {
    struct recipe recipe; /* borrows from the rest */
    struct recipe_group *groups;
    char (*names)[16]; /* of groups that have none in the file */
    const char **texts;
    size_t n_texts;
    char *name;
    struct yaml_tree *root;
};
/* name: what the recipe is called in messages; its file's path. */
bool recipe_parse(struct recipe_file *out, const char *name, const char *text, size_t bytes, struct err *e);
bool recipe_load(struct recipe_file *out, const char *path, struct err *e);
void recipe_file_deinit(struct recipe_file *f); /* accepts a zeroed one */

bool scheme_measures(enum scheme s); /* its activations have measured scales */
/* Whether some group's have. */
bool recipe_measures(const struct recipe *r);

/* {"quantization_config": {...}} with every key compressed-tensors writes. ignore: an array of strings,
 * borrowed. The caller owns *out. */
bool recipe_config(json_t **out, const struct recipe *r, json_t *ignore, struct err *e);
/* recipe.yaml in llm-compressor's syntax; *text is malloc'd and the caller's. */
bool recipe_yaml(char **text, size_t *bytes, const struct recipe *r, struct err *e);
#endif
