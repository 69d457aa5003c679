/* The Linear modules of a checkpoint as they lie on disk, whichever tool wrote it: plain, NVFP4 or FP8, with
 * the tensors that belong to each. Here a module whose parts do not fit together is listed all the same and
 * marked, since a check has to name it; model/bind.h, which serves running, refuses it. */
#ifndef QUANTIZE_STORED_H
#define QUANTIZE_STORED_H
#include "checkpoint/linear.h"
#include "quantize/modules.h"

struct stored {
    char *name; /* without ".weight" */
    struct place place;
    struct linear part;
    enum scheme scheme;  /* linear_scheme */
    const char *unsound; /* why rows cannot be decoded; NULL: they can */
};

struct stored_list {
    struct stored *items; /* sorted by the names of their codes */
    size_t n, capacity;
};

/* Every module with a matrix of its own; experts that share a fused tensor are not among them. */
bool stored_find(struct stored_list *l, const struct checkpoint *c, struct err *e);
void stored_deinit(struct stored_list *l); /* accepts a zeroed one */
/* False when absent. out's name is borrowed from `module`. */
bool stored_get(struct stored *out, const struct checkpoint *c, const char *module);

/* Row r as f32 [cols]. The module is not unsound. */
void stored_row(float *out, const struct stored *s, int64_t r);
/* n elements of a BF16, F16 or F32 tensor from `first` on. */
void stored_widen(float *out, const struct tensor *t, int64_t first, int64_t n);
bool stored_is_plain(const struct tensor *t); /* BF16, F16 or F32 */
float stored_one(const struct tensor *t);     /* the one element of such a tensor */
float stored_global(const struct stored *s);  /* NVFP4: what divides the scales */
#endif
