/* What happens to a product's inputs before they meet the weights: by what the weights ask for (ops.h) and by
 * whether the backend may round (backend_options.rounded). The meaning of every backend's products. */
#ifndef BACKEND_ROUNDING_H
#define BACKEND_ROUNDING_H
#include "backend/ops.h"

enum rounding {
    ROUND_NONE,
    ROUND_BF16,       /* to BF16 */
    ROUND_INT8,       /* int8 in groups of 16, num/int8.h */
    ROUND_FP8_ROW,    /* INPUT_FP8_ROW */
    ROUND_FP8_FIXED,  /* INPUT_FP8_FIXED */
    ROUND_FP8_GROUPS, /* INPUT_FP8_GROUPS */
    ROUND_NVFP4       /* INPUT_NVFP4 */
};

/* rounded: BF16 weights, and FP8 ones that leave inputs as they are, take them in BF16, NVFP4 ones in int8.
 */
enum rounding rounding_of(const struct weight *w, bool rounded);
/* out = the row as the product reads it; out may be x. Returns what the product is to be multiplied by: the
 * row's scale for ROUND_FP8_ROW, else 1. */
float rounding_apply(float *out, const float *x, int64_t n, enum rounding rounding, const struct weight *w);
#endif
