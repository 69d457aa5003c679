#include "backend/rounding.h"
#include "num/fp8.h"
#include "num/int8.h"
#include "num/nvfp4.h"
#include <string.h>

enum rounding rounding_of(const struct weight *w, bool rounded)
{
    if (w->input == INPUT_FP8_ROW) return ROUND_FP8_ROW;
    if (w->input == INPUT_FP8_FIXED) return ROUND_FP8_FIXED;
    if (w->input == INPUT_FP8_GROUPS) return ROUND_FP8_GROUPS;
    if (w->input == INPUT_NVFP4) return ROUND_NVFP4;
    if (rounded && w->format == WEIGHT_NVFP4) return ROUND_INT8;
    return rounded && (w->format == WEIGHT_BF16 || w->format == WEIGHT_FP8) ? ROUND_BF16 : ROUND_NONE;
}

float rounding_apply(float *out, const float *x, int64_t n, enum rounding rounding, const struct weight *w)
{
    switch (rounding) {
    case ROUND_FP8_ROW: return fp8_quantize_activations(out, x, n);
    case ROUND_FP8_FIXED: fp8_round_fixed(out, x, n, w->input_global); return 1;
    case ROUND_FP8_GROUPS: fp8_round_groups(out, x, n); return 1;
    case ROUND_NVFP4: nvfp4_quantize_activations(out, x, w->input_global, n); return 1;
    case ROUND_INT8: int8_round_row(out, x, n); return 1;
    case ROUND_BF16:
        for (int64_t i = 0; i < n; i++) out[i] = bf16_round(x[i]);
        return 1;
    default: memmove(out, x, (size_t)n * sizeof *out); return 1;
    }
}
