/* The Linear modules of this family by name: which they are, and the order in which the reference tool walks
 * them. Names are full, without ".weight"; any prefix in front of "layers." or "visual." will do. */
#ifndef QUANTIZE_MODULES_H
#define QUANTIZE_MODULES_H
#include "base/err.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum expert_part { PART_GATE, PART_UP, PART_DOWN, N_PARTS };
extern const char *const expert_part_name[N_PARTS]; /* "gate_proj" ... */

/* Where a module stands in the tree. Compares field by field, in this order. */
struct place {
    enum {
        PLACE_VISION_BLOCK,
        PLACE_VISION_MERGER,
        PLACE_LAYER,
        PLACE_HEAD,
        PLACE_OTHER,
        PLACE_DRAFT
    } section;
    int64_t layer; /* of a layer or vision block; -1 elsewhere */
    int rank;
    int64_t expert; /* -1: not a routed expert */
    enum expert_part part;
};

/* False: not a Linear. is_matrix: its weight has two dimensions, which makes an unknown name a Linear too,
 * unless it is a table of embeddings. PLACE_DRAFT is whatever belongs to the MTP head. */
bool module_place(struct place *out, const char *module, bool is_matrix);

/* What a module of a decoder layer reads; calibration measures each. */
enum module_input {
    INPUT_NONE,      /* nothing that is measured: outside the layers */
    INPUT_MIXER,     /* the normed residual in front of attention or DeltaNet */
    INPUT_MIXER_OUT, /* what o_proj or out_proj reads */
    INPUT_BLOCK,     /* the normed residual in front of the MoE block */
    INPUT_SHARED,    /* SiLU(gate) * up of the shared expert */
    INPUT_EXPERT,    /* the same of a routed one */
};
enum module_input module_input(const struct place *p);

/* mlp.gate and mlp.shared_expert_gate, which readers build unquantized whatever a config says. */
bool module_is_router(const char *module);

/* Modules that readers run as one product (q, k, v; gate and up of the shared expert; qkv and z; b and a):
 * the module's set as endings of names, NULL-terminated, in an order of its own; NULL when it has none.
 * stem_bytes: of the name in front of the ending. */
const char *const *module_fusion(const char *module, size_t *stem_bytes);

/* "stem.experts.gate_up_proj" or "stem.experts.down_proj": what a fused tensor holds. stem_bytes: of
 * "stem.experts". */
bool module_is_fused(const char *tensor, size_t *stem_bytes, bool *is_gate_up);

/* Names to be sorted by place. Zero-initialise. */
struct module_list {
    struct module_entry *items;
    size_t n, capacity;
};
bool module_list_add(struct module_list *l, const char *module, const struct place *place, struct err *e);
/* Appends the names to an array, in the order of places. */
bool module_list_append_to(struct module_list *l, json_t *array, struct err *e);
void module_list_deinit(struct module_list *l);
#endif
