/* What a layer remembers of sequences: KV pages, or recurrent and convolution state. */
#include "base/checked.h"
#include "model/step.h"
#include "num/e4m3.h"
#include <stdlib.h>
#include <string.h>

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

/* Of keys or values of one layer. */
static uint64_t page_bytes(const struct model *m, enum kv_dtype dtype)
{
    return (uint64_t)KV_PAGE * (uint64_t)m->config->n_kv_heads * (uint64_t)m->config->head_dim *
           kv_bytes(dtype);
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
    if (layer_kind_of(m, layer) == LAYER_FULL_ATTENTION) {
        uint64_t page = page_bytes(m, dtype);
        ok = create(&a, m, page, pages, e) && create(&b, m, page, pages, e);
        state->kv = (struct kv_cache){ a, b, dtype, c->n_kv_heads, c->head_dim };
    } else {
        ok = create(&a, m, matrix_elements(&m->delta_shape) * sizeof(float), slots, e) &&
             create(&b, m, conv_elements(&m->delta_shape) * sizeof(float), slots, e);
        state->delta = (struct delta_state){ .matrix = a, .conv = b };
    }
    if (!ok) layer_state_free(state, m);
    return ok;
}

bool layer_state_add_log(struct layer_state *state, const struct model *m, int layer, int64_t slots, int rows,
                         struct err *e)
{
    void *log = NULL;
    if (layer_kind_of(m, layer) == LAYER_FULL_ATTENTION) return true;
    uint64_t row = (uint64_t)delta_log_floats(&m->delta_shape) * sizeof(float);
    if (!create(&log, m, row, slots * rows, e)) return false;
    state->delta.log = log;
    state->delta.log_rows = rows;
    return true;
}

void layer_state_free(struct layer_state *state, const struct model *m)
{
    void *all[] = { state->kv.keys, state->kv.values, state->delta.matrix, state->delta.conv,
                    state->delta.log };
    for (int i = 0; i < 5; i++) m->backend->ops->memory_free(m->backend->queue, all[i]);
    *state = (struct layer_state){ 0 };
}

void layer_state_slot(struct state_piece out[STATE_PIECES], const struct layer_state *state,
                      const struct model *m, int layer, int32_t slot)
{
    uint64_t matrix = matrix_elements(&m->delta_shape), conv = conv_elements(&m->delta_shape);
    memset(out, 0, STATE_PIECES * sizeof *out);
    if (layer_kind_of(m, layer) == LAYER_FULL_ATTENTION) return;
    out[0] = (struct state_piece){ state->delta.matrix + (uint64_t)slot * matrix, matrix * sizeof(float) };
    out[1] = (struct state_piece){ state->delta.conv + (uint64_t)slot * conv, conv * sizeof(float) };
}

void layer_state_page(struct state_piece out[STATE_PIECES], const struct layer_state *state,
                      const struct model *m, int layer, int32_t page)
{
    const struct kv_cache *kv = &state->kv;
    uint64_t bytes = page_bytes(m, kv->dtype);
    memset(out, 0, STATE_PIECES * sizeof *out);
    if (layer_kind_of(m, layer) != LAYER_FULL_ATTENTION) return;
    out[0] = (struct state_piece){ (uint8_t *)kv->keys + (uint64_t)page * bytes, bytes };
    out[1] = (struct state_piece){ (uint8_t *)kv->values + (uint64_t)page * bytes, bytes };
}

void layer_state_reset(struct layer_state *state, const struct model *m, int layer, int32_t slot)
{
    struct state_piece p[STATE_PIECES]; /* of KV nothing: lines are written before they are read */
    layer_state_slot(p, state, m, layer, slot);
    for (int i = 0; i < STATE_PIECES; i++)
        if (p[i].bytes) m->backend->ops->zero(m->backend->queue, p[i].data, p[i].bytes);
}

/* Uniform in -1 .. 1, the same each time. malloc'd. */
static void *noise(uint64_t n, enum kv_dtype dtype)
{
    uint8_t *out = malloc(n * kv_bytes(dtype) + 1);
    uint32_t seed = 1;
    for (uint64_t i = 0; out && i < n; i++) {
        seed = seed * 1664525 + 1013904223;
        float x = (float)(seed >> 8) * 0x1p-23f - 1;
        bf16 half = bf16_from_f32(x);
        e4m3 byte = e4m3_from_f32(x);
        const void *from = dtype == KV_F32    ? (const void *)&x
                           : dtype == KV_BF16 ? (const void *)&half
                                              : &byte;
        memcpy(out + i * kv_bytes(dtype), from, kv_bytes(dtype));
    }
    return out;
}

bool layer_state_noise(struct layer_state *state, const struct model *m, int layer, const int32_t *pages,
                       int64_t n_pages, int32_t slot, struct err *e)
{
    const struct config *c = m->config;
    const struct ops *op = m->backend->ops;
    struct queue *q = m->backend->queue;
    bool full = layer_kind_of(m, layer) == LAYER_FULL_ATTENTION;
    uint64_t line = (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim;
    uint64_t matrix = matrix_elements(&m->delta_shape), conv = conv_elements(&m->delta_shape);
    uint64_t n = full ? KV_PAGE * line : matrix > conv ? matrix : conv;
    uint64_t page = n * kv_bytes(state->kv.dtype);
    void *values = noise(n, full ? state->kv.dtype : KV_F32);
    if (!values) return err_memory(e, "noise", n * sizeof(float));
    for (int64_t i = 0; full && i < n_pages; i++) {
        op->upload(q, (uint8_t *)state->kv.keys + (uint64_t)pages[i] * page, values, page);
        op->upload(q, (uint8_t *)state->kv.values + (uint64_t)pages[i] * page, values, page);
    }
    if (!full) {
        op->upload(q, state->delta.matrix + (uint64_t)slot * matrix, values, matrix * sizeof(float));
        op->upload(q, state->delta.conv + (uint64_t)slot * conv, values, conv * sizeof(float));
    }
    free(values);
    return true;
}
