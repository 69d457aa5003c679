/* What a layer remembers of sequences: KV pages, or recurrent and convolution state. */
#include "base/checked.h"
#include "model/model.h"

static uint64_t kv_bytes(enum kv_dtype dtype)
{
    return dtype == KV_F32 ? 4 : dtype == KV_BF16 ? 2 : 1;
}

/* Elements of one sequence's state of each kind. */
static uint64_t matrix_elements(const struct delta_shape *s)
{
    return (uint64_t)s->value_heads * (uint64_t)s->key_dim * (uint64_t)s->value_dim;
}

static uint64_t conv_elements(const struct delta_shape *s)
{
    uint64_t channels =
        2 * (uint64_t)s->key_heads * (uint64_t)s->key_dim + (uint64_t)s->value_heads * (uint64_t)s->value_dim;
    return (uint64_t)(s->kernel - 1) * channels;
}

static bool create(void **out, const struct model *m, uint64_t each, int64_t count, struct err *e)
{
    uint64_t bytes;
    if (!fits_mul(each, (uint64_t)count, &bytes))
        return err_set(e, ERR_LIMIT, "state of sequences is too large");
    return m->backend->ops->memory_create(m->backend->queue, out, bytes, e);
}

bool layer_state_create(struct layer_state *state, const struct model *m, int layer, enum kv_dtype dtype,
                        int64_t pages, int64_t slots, struct err *e)
{
    const struct config *c = m->config;
    void *a = NULL, *b = NULL;
    *state = (struct layer_state){ 0 };
    bool ok;
    if (c->layer_kinds[layer] == LAYER_FULL_ATTENTION) {
        uint64_t page = (uint64_t)KV_PAGE * (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim * kv_bytes(dtype);
        ok = create(&a, m, page, pages, e) && create(&b, m, page, pages, e);
        state->kv = (struct kv_cache){ a, b, dtype, c->n_kv_heads, c->head_dim };
    } else {
        ok = create(&a, m, matrix_elements(&m->delta_shape) * sizeof(float), slots, e) &&
             create(&b, m, conv_elements(&m->delta_shape) * sizeof(float), slots, e);
        state->delta = (struct delta_state){ a, b };
    }
    if (!ok) layer_state_free(state, m);
    return ok;
}

void layer_state_free(struct layer_state *state, const struct model *m)
{
    void *all[] = { state->kv.keys, state->kv.values, state->delta.matrix, state->delta.conv };
    for (int i = 0; i < 4; i++) m->backend->ops->memory_free(m->backend->queue, all[i]);
    *state = (struct layer_state){ 0 };
}

void layer_state_reset(struct layer_state *state, const struct model *m, int layer, int32_t slot)
{
    if (m->config->layer_kinds[layer] == LAYER_FULL_ATTENTION)
        return; /* lines are written before they are read */
    uint64_t matrix = matrix_elements(&m->delta_shape), conv = conv_elements(&m->delta_shape);
    const struct ops *op = m->backend->ops;
    op->zero(m->backend->queue, state->delta.matrix + (uint64_t)slot * matrix, matrix * sizeof(float));
    op->zero(m->backend->queue, state->delta.conv + (uint64_t)slot * conv, conv * sizeof(float));
}
