/* From tensor names to weights: every tensor is looked up once, its dtype and shape checked, then laid out
 * for the backend. Error texts name the tensor, what was expected and what was found. */
#ifndef MODEL_BIND_H
#define MODEL_BIND_H
#include "model/model.h"

/* Between the two, matrices are made several at a time, which a GPU does faster: bind_* below only say that
 * they are wanted, and errors may come late. bind_now returns `ok`, false: what is left is not made. */
bool bind_later(struct model *m, struct err *e);
bool bind_now(struct model *m, bool ok, struct err *e);

/* The linear module `name` ([rows x cols]), in whichever format the checkpoint has it: name.weight (BF16,
 * F16, F32) or what checkpoint/linear.h knows. Must agree with a quantization_config in compressed-tensors'
 * words. */
bool bind_linear(struct model *m, struct weight **out, const char *name, int64_t rows, int64_t cols,
                 struct err *e);
/* The same for a module whose inputs, where they have a measured scale, are scaled by `input_global` and not
 * by what its own file entry says: the experts of a layer share one (bind_input_global). */
bool bind_expert(struct model *m, struct weight **out, const char *name, float input_global, int64_t rows,
                 int64_t cols, struct err *e);
/* Takes in the input scale of a module; *widest, INFINITY before the first, becomes the one with the widest
 * range: the least divisor for NVFP4 (only where the backend quantizes activations), the largest scale for
 * FP8. Does nothing for other modules, nor for FP8 without one. */
bool bind_input_global(const struct model *m, float *widest, const char *name, struct err *e);
/* The tensor `name` ([rows x cols]), never quantized: an embedding that serves as head. */
bool bind_plain(struct model *m, struct weight **out, const char *name, int64_t rows, int64_t cols,
                struct err *e);
/* Expert matrix number `expert` of a fused tensor [n_experts, all_rows, cols]: its rows [first, first +
 * rows). */
bool bind_fused(struct model *m, struct weight **out, const char *name, int n_experts, int expert,
                int64_t all_rows, int64_t first, int64_t rows, int64_t cols, struct err *e);
/* The table `name` ([rows x cols]), only read by row. */
bool bind_table(struct model *m, struct weight **out, const char *name, int64_t rows, int64_t cols,
                struct err *e);
/* A small tensor of exactly n elements, widened to f32, in the backend's memory; `plus` is added to each
 * element. */
bool bind_vector(struct model *m, float **out, const char *name, int64_t n, float plus, struct err *e);
/* patch_embed.proj.weight [rows, channels, frames, side, side], each patch a row of inputs; never quantized.
 */
bool bind_patches(struct model *m, struct weight **out, const char *name, int64_t rows, int channels,
                  int frames, int side, struct err *e);
/* The table `name` ([rows x cols]) widened to f32, in the host's memory: malloc'd. */
bool bind_host_table(const struct model *m, float **out, const char *name, int64_t rows, int64_t cols,
                     struct err *e);
/* conv1d.weight [channels, 1, kernel] as [kernel][channels]. */
bool bind_conv(struct model *m, float **out, const char *name, int64_t channels, int kernel, struct err *e);
/* Some rows of the tensor `name` ([rows x cols], BF16, F16 or F32), in the nearest NVFP4 codes; cols a
 * multiple of 16. */
bool bind_rows_nvfp4(struct model *m, struct weight **out, const char *name, const int32_t *ids, int64_t n,
                     int64_t rows, int64_t cols, struct err *e);
/* The same of a matrix at hand. ids NULL: its first n rows. */
bool bind_packed(struct model *m, struct weight **out, const struct weight_source *src, const int32_t *ids,
                 int64_t n, struct err *e);
#endif
