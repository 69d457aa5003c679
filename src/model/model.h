/* The network: bound weights and the forward pass. Takes an open checkpoint and a backend; knows tensor names
 * and the order of operations, but neither files nor threads. Weights are bound once, dtype and shape
 * checked, no strings after. */
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H
#include "backend/ops.h"
#include "base/report.h"
#include "checkpoint/checkpoint.h"

struct attention_weights {
    struct weight *q, *k, *v, *o;
    float *q_norm, *k_norm; /* gains, 1 + w */
};

struct delta_weights {
    struct weight *qkv, *z, *a, *b, *out;
    float *conv; /* [kernel][channels] */
    float *A_log, *dt_bias, *norm;
};

struct moe_weights {
    struct weight *router, *shared_gate; /* shared_gate: one logit */
    struct weight *gate, *up, *down;     /* shared expert */
    struct experts experts;
};

struct layer {
    enum layer_kind kind;
    float *input_norm, *post_norm; /* gains, 1 + w */
    struct attention_weights attention;
    struct delta_weights delta;
    struct moe_weights moe;
};

/* What a layer's forward needs besides weights: one of the two is set, by kind. */
struct layer_state {
    struct kv_cache kv;
    struct delta_state delta;
};

/* The multi-token prediction head, besides its layer. */
struct mtp {
    struct weight *fc;                          /* [hidden x 2 hidden]: the embedding's half first */
    float *embedding_norm, *hidden_norm, *norm; /* gains, 1 + w */
    struct weight *head;                        /* rows of lm_head, quantized; NULL: lm_head itself */
    int32_t *ids;                               /* [n_ids] which token each row of head stands for */
    int64_t n_ids;
};

struct model {
    const struct checkpoint *checkpoint; /* borrow: the embedding table stays mapped */
    const struct config *config;         /* borrow from checkpoint */
    struct backend *backend;             /* borrow */
    const struct report *report;         /* borrow, may be NULL: warnings about odd scales go here */
    struct delta_shape delta_shape;
    struct rope rope;
    float *rope_inverse;
    uint8_t *rope_axis;
    const char *prefix; /* "model.language_model." or "model." */
    struct weight *embed, *head;
    float *final_norm;
    struct layer *layers; /* [n_layers + 1]; zeroed until bound. The last is the MTP head's */
    struct mtp mtp;       /* zeroed until bound */
    struct later *later;  /* bind.h: matrices to be made together, or NULL */
    bool packs;           /* what is bound now is for drafts: matrices of numbers become NVFP4 */
};

/* Everything but the layers and the head: the embedding stays mapped, so this takes little memory. report may
 * be NULL. */
bool model_init(struct model *m, const struct checkpoint *c, struct backend *b, const struct report *report,
                struct err *e);
/* All layers and the head, with progress. */
bool model_bind_all(struct model *m, struct err *e);
/* The MTP head, after model_bind_all; ERR_UNSUPPORTED: the checkpoint has none. packed: what the checkpoint
 * stores as numbers becomes NVFP4, but for the router. Drafts come from the part of lm_head that most text
 * needs, in four bits: of large vocabularies the tokens merged first and those added last. */
bool model_bind_mtp(struct model *m, bool packed, struct err *e);
/* One layer, for work that holds a single layer at a time. */
bool model_bind_layer(struct model *m, int layer, struct err *e);
void model_free_layer(struct model *m, int layer);
void model_deinit(struct model *m); /* accepts a zeroed one */

/* Buffers of one step, in the backend's memory. */
struct step;
/* rows_max rows a step, logits_max rows of logits at a time (0: none). context: tokens of the longest
 * sequence. */
bool step_create(struct step **out, struct model *m, int64_t rows_max, int64_t logits_max, int64_t context,
                 struct err *e);
void step_free(struct step *s);
/* What it takes of the backend's memory, before anything is bound. drafts: with the MTP head. */
uint64_t step_bytes(const struct config *c, const struct backend *b, bool drafts, int64_t rows_max,
                    int64_t logits_max, int64_t context);
int64_t step_rows_max(const struct step *s);

/* Called with intermediate results, in the backend's memory: "embed"; per layer "mixer.in", "mixer.out",
 * "moe.in", "moe.out", "layer"; "final"; and what the last product of a part reads: "attention.out" (o_proj),
 * "delta.out" (out_proj), "shared.hidden" (the shared expert's down_proj). One hook serves calibration,
 * golden tests and debugging. */
struct tap {
    void *ctx;
    void (*call)(void *ctx, const char *name, int layer, struct mat x); /* layer -1: outside the layers */
};
void step_set_tap(struct step *s, struct tap tap);

/* x[n, hidden] = embeddings of the rows. The result is the step's own matrix, valid until the next call. */
struct mat step_embed(struct step *s, const struct step_rows *rows);
/* One layer, x in place. */
void step_layer(struct step *s, int layer, struct mat x, const struct step_rows *rows,
                const struct layer_state *state);
/* The experts that the last layer picked for its rows, in the backend's memory; valid until the next call. */
const struct picks *step_picks(const struct step *s);
/* Embedding, all layers and the final norm; states: [n_layers]. Returns the normed hidden rows, valid until
 * the next step_run. */
struct mat step_run(struct step *s, const struct step_rows *rows, const struct layer_state *states);
/* Logits [n, vocab] of chosen rows of what step_run returned; n <= logits_max. index in host memory. */
struct mat step_logits(struct step *s, struct mat hidden, const int64_t *index, int64_t n);

/* The MTP head: row i holds the token (or embedding) that follows the one hidden row index[i] stands for, at
 * the latter's position; spans count the rows of the head's own sequences, state is that of layer n_layers.
 * hidden: what step_run returned, or step_mtp for rows that guess on. step_mtp returns a normed row for each
 * span, from which the token after its last is guessed, valid until the next step_mtp; step_mtp_see only
 * remembers the rows. */
struct mat step_mtp(struct step *s, const struct step_rows *rows, struct mat hidden, const int64_t *index,
                    const struct layer_state *state);
void step_mtp_see(struct step *s, const struct step_rows *rows, struct mat hidden, const int64_t *index,
                  const struct layer_state *state);
/* Tokens drawn from these logits, where they themselves are not wanted; allowed: in the backend's memory or
 * NULL, draws and out in host memory. */
void step_draw(struct step *s, int32_t *out, struct mat hidden, const int64_t *index, int64_t n,
               const uint32_t *allowed, const struct draw *draws);
/* The likeliest token by each of chosen rows of what step_mtp returned; n <= logits_max. index and tokens in
 * host memory. */
void step_draft(struct step *s, int32_t *tokens, struct mat hidden, const int64_t *index, int64_t n);

/* State of sequences. bytes of one layer's state for `slots` sequences and `pages` KV pages. */
bool layer_state_create(struct layer_state *state, const struct model *m, int layer, enum kv_dtype dtype,
                        int64_t pages, int64_t slots, struct err *e);
/* Room for logged spans of up to `rows` rows in a DeltaNet layer's state; nothing in the others. */
bool layer_state_add_log(struct layer_state *state, const struct model *m, int layer, int64_t slots, int rows,
                         struct err *e);
void layer_state_free(struct layer_state *state, const struct model *m);
/* The state of a sequence that has seen nothing. */
void layer_state_reset(struct layer_state *state, const struct model *m, int layer, int32_t slot);
/* Where a layer keeps what belongs to a slot, or to a KV page: memory of the backend. bytes 0: it has none.
 */
struct state_piece {
    void *data;
    uint64_t bytes;
};
enum { STATE_PIECES = 2 };
void layer_state_slot(struct state_piece out[STATE_PIECES], const struct layer_state *state,
                      const struct model *m, int layer, int32_t slot);
void layer_state_page(struct state_piece out[STATE_PIECES], const struct layer_state *state,
                      const struct model *m, int layer, int32_t page);
/* Noise in place of what a sequence with these pages and this slot would remember: for throughput runs. */
bool layer_state_noise(struct layer_state *state, const struct model *m, int layer, const int32_t *pages,
                       int64_t n_pages, int32_t slot, struct err *e);
#endif
