/* The buffers of one step, shared by the files of the forward pass. Each matrix has rows_max rows; a step
 * uses the first n of them. */
#ifndef MODEL_STEP_H
#define MODEL_STEP_H
#include "base/arena.h"
#include "model/model.h"

struct step {
    struct model *model;
    const struct ops *op;
    struct queue *q;
    void *memory; /* the backend's, holds every matrix below */
    int64_t rows_max, logits_max;
    bool guesses; /* there is an MTP head */
    struct tap tap;
    struct mat x, h, y;          /* [hidden]: residual, its norm, a mixer's or the experts' result */
    struct mat qg, k, v, att;    /* attention: queries with gates, keys, values, attended values */
    struct mat u, conv, z, a, b; /* DeltaNet: raw and convolved q k v, gate, decay, beta */
    struct mat raw, o;           /* and what it reads from its state, before and after norm and gate */
    struct mat router, gate, up, hidden, shared, shared_gate;
    struct picks picks;
    struct mat final;       /* normed hidden rows */
    struct mat pair, guess; /* MTP: an embedding and a hidden row side by side, and what comes of them */
    struct row *last_rows;  /* [rows_max] host memory, of MTP steps: the last rows of spans */
    struct span *last_spans;
    int64_t *last_at;
    struct mat chosen, logits; /* [logits_max] */
};

/* The MTP head's layer, numbered after the others, is full attention. */
static inline enum layer_kind layer_kind_of(const struct model *m, int layer)
{
    return layer < m->config->n_layers ? m->config->layer_kinds[layer] : LAYER_FULL_ATTENTION;
}

static inline struct mat mat_rows(struct mat m, int64_t n)
{
    m.rows = n;
    return m;
}

static inline void step_tap(struct step *s, const char *name, int layer, struct mat x)
{
    if (s->tap.call) s->tap.call(s->tap.ctx, name, layer, x);
}

/* x += y, y = mixer(norm(x)). */
void step_attention(struct step *s, int layer, struct mat x, const struct step_rows *rows,
                    const struct kv_cache *kv);
void step_delta(struct step *s, int layer, struct mat x, const struct step_rows *rows,
                const struct delta_state *state);
/* x += y, y = routed experts(norm(x)) + shared expert(norm(x)). */
void step_moe(struct step *s, int layer, struct mat x);
#endif
