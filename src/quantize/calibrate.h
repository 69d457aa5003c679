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

/* A layer, in the backend's memory. */
struct calibrated {
    const struct experts *experts;
    const struct moments *moments, *held; /* NULL: not wanted */
};

/* Takes each layer in turn. */
struct calibration_sink {
    void *ctx;
    struct moments *moments; /* second moments are summed here, over all tokens, each layer's own; take may
                                use them up. NULL: none wanted */
    struct moments *held;    /* NULL, or: those of the samples from held_from on are summed here instead */
    int64_t held_from;
    bool stays; /* moments and held have no memory and give only their shape: take wants the layer as it is */
    /* layer_at is NULL unless it stays. The layer's maxima are in the result and the hidden states behind it
     * are durable: a later run may go on with the next one. */
    bool (*take)(void *ctx, int layer, const struct calibrated *layer_at, struct err *e);
};

struct calibration_options {
    const struct checkpoint *source;
    struct backend *backend;
    const struct samples *samples;
    const char *folder; /* for two work files, states-0 and states-1: [tokens][hidden] f32 in front of the
                           layers of even and odd number */
    int first_layer;    /* those before it are done, by an earlier run with the same folder */
    struct calibration_sink sink;
    const struct report *report;
};

/* Room for the result, all zeros. */
bool calibration_init(struct calibration *c, const struct config *config, struct err *e);
/* Fills an initialized result from first_layer on. Holds one decoder layer at a time; the hidden states of
 * all samples pass through files by one step's rows, which the system's page cache holds as far as memory
 * allows. A NaN or an infinity is an error that names layer and expert. */
bool calibrate(struct calibration *c, const struct calibration_options *o, struct err *e);
/* Of one step; and how many experts' inputs are looked at together, from scratch of two f32 a row and column.
 */
int64_t calibration_rows(const struct backend *b, const struct samples *s);
int calibration_together(const struct backend *b, const struct config *c);
/* Of a module of `layer` that reads `input`; expert: for INPUT_EXPERT. */
float calibration_input(const struct calibration *c, int layer, enum module_input input, int expert);
void calibration_deinit(struct calibration *c); /* accepts a zeroed one */
#endif
