/* What will happen to every tensor of a checkpoint, decided before anything is written: split and packed as
 * NVFP4, packed as FP8, or copied. The recipe is turned into a quantization_config first and modules are
 * decided by it, with the matcher that readers use; so what is written about a module is what was done to it.
 */
#ifndef QUANTIZE_PLAN_H
#define QUANTIZE_PLAN_H
#include "checkpoint/checkpoint.h"
#include "quantize/modules.h"
#include "quantize/recipe.h"

/* One Linear to be packed: a slice of a source tensor. */
struct matrix {
    char *module;
    const struct tensor *source; /* borrow; BF16 */
    const uint8_t *data;         /* its first row, in the source's map; may be unaligned */
    int64_t rows, cols;
    enum scheme scheme;
    int layer, expert; /* -1: not a routed expert */
    enum expert_part part;
    enum module_input input;
    size_t partner; /* NVFP4: the next of those that share one weight scale (gate, up; q, k, v; ...), in a
                       ring; SIZE_MAX: none */
};

/* One source tensor. */
struct job {
    const struct tensor *source;
    size_t first, n; /* matrices; n = 0: copied byte for byte */
};

struct plan {
    const struct config *config; /* borrow */
    struct job *jobs;            /* in the order of the files and of the bytes in them */
    size_t n_jobs;
    struct matrix *matrices;
    size_t n_matrices, matrices_capacity;
    struct tensor *outputs; /* in the order in which they are written; names owned, no data */
    size_t n_outputs;
    size_t *experts;   /* [layer][expert][part] index into matrices; SIZE_MAX: not packed */
    json_t *block;     /* {"quantization_config": ...} as it will be written */
    size_t n_ignored;  /* modules named in its ignore list */
    bool needs_inputs; /* some scheme wants measured input scales */
};

bool plan_create(struct plan *p, const struct checkpoint *c, const struct recipe *r, struct err *e);
void plan_deinit(struct plan *p); /* accepts a zeroed one */

/* Tensors a packed matrix becomes: 4 for NVFP4, 3 without an input scale; 2 for FP8, 3 with one. */
int plan_outputs_of(enum scheme scheme);
static inline bool scheme_is_nvfp4(enum scheme s)
{
    return s == SCHEME_NVFP4 || s == SCHEME_NVFP4A16;
}

/* The block for a list of names alone: what goes into config.json of a checkpoint with these tensors. names:
 * tensor names; n_dims: how many dimensions each has. n_experts: matrices in a fused expert tensor. */
struct plan_names {
    const char *const *names;
    const int *n_dims;
    size_t n;
    int n_experts;
};
bool plan_block(json_t **out, size_t *n_ignored, const struct plan_names *names, const struct recipe *r,
                struct err *e);
#endif
