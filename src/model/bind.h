/* From tensor names to weights: every tensor is looked up once, its dtype and shape checked, then laid out
 * for the backend. Error texts name the tensor, what was expected and what was found. */
#ifndef MODEL_BIND_H
#define MODEL_BIND_H
#include "model/model.h"

/* The linear module `name` ([rows x cols]), in whichever format the checkpoint has it: name.weight (BF16,
 * F16, F32, or F8_E4M3 with name.weight_scale), or name.weight_packed with its scales. Must agree with
 * quantization_config. */
bool bind_linear(struct model *m, struct weight **out, const char *name, int64_t rows, int64_t cols,
                 struct err *e);
/* The same for a module whose inputs, where NVFP4 inputs are asked for, are scaled by `input_global` and not
 * by what its own file entry says: the experts of a layer share one (bind_input_global). */
bool bind_expert(struct model *m, struct weight **out, const char *name, float input_global, int64_t rows,
                 int64_t cols, struct err *e);
/* Lowers *least to name.input_global_scale, above 0 and finite: the least divisor has the widest range. Only
 * where the backend quantizes activations and the module is stored as NVFP4; else does nothing. */
bool bind_input_global(const struct model *m, float *least, const char *name, struct err *e);
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
/* conv1d.weight [channels, 1, kernel] as [kernel][channels]. */
bool bind_conv(struct model *m, float **out, const char *name, int64_t channels, int kernel, struct err *e);
#endif
