/* Largest inputs of a layer's modules, over all tokens of all samples, with activations in full precision
 * (the tool since 0.11 does the same). Each sample is a sequence of its own from position 0. Every expert
 * sees every token, routed to it or not: gate_proj and up_proj of a layer share one input; down_proj's
 * differs by expert. */
#ifndef QUANTIZE_CALIBRATE_H
#define QUANTIZE_CALIBRATE_H
#include "backend/ops.h"
#include "base/report.h"
#include "checkpoint/checkpoint.h"
#include "quantize/modules.h"
#include "quantize/moments.h"
#include "quantize/samples.h"

struct calibration {
    int n_layers, n_experts;
    float *inputs;   /* [n_layers][INPUT_EXPERT] max |x| by enum module_input, rounded to BF16; INPUT_NONE's
                        is 0 */
    float *down;     /* [n_layers][n_experts] max |bf16(SiLU(gate x) * up x)| of routed experts */
    int64_t *routed; /* [n_layers][n_experts] tokens that the router sent to each expert */
    int64_t tokens;  /* that every expert saw */
};

/* Takes the second moments of each layer in turn, the layer's own and nothing of the others'; may use them
 * up. */
struct calibration_sink {
    void *ctx;
    struct moments *moments; /* summed here, over all tokens */
    struct pool *pool;       /* borrow; sums them */
    bool (*take)(void *ctx, int layer, struct err *e);
};

/* Holds one decoder layer and the hidden states of all samples (f32, host memory) at a time. A NaN or an
 * infinity is an error that names layer and expert. sink: NULL for maxima alone. */
bool calibrate(struct calibration *c, const struct checkpoint *source, struct backend *backend,
               const struct samples *samples, const struct calibration_sink *sink,
               const struct report *report, struct err *e);
/* Of a module of `layer` that reads `input`; expert: for INPUT_EXPERT. */
float calibration_input(const struct calibration *c, int layer, enum module_input input, int expert);
void calibration_deinit(struct calibration *c); /* accepts a zeroed one */
#endif
