/* What a layer remembers of sequences: KV pages, or recurrent and convolution state. */
#include "base/checked.h"
#include "model/step.h"
#include "num/e4m3.h"
#include "num/int8.h"
#include <stdlib.h>
#include <string.h>

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
    const struct config *c = m->config;
    return KV_PAGE * (uint64_t)kv_line_bytes(dtype, c->n_kv_heads, c->head_dim);
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
    if (dtype == KV_INT8 && !m->backend->kv_int8)
        return err_set(e, ERR_UNSUPPORTED, "%s keeps no keys and values in INT8", m->backend->name);
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

/* Uniform in -1 .. 1. */
static void noise(float *out, uint64_t n, uint32_t *seed)
{
    for (uint64_t i = 0; i < n; i++) {
        *seed = *seed * 1664525 + 1013904223;
        out[i] = (float)(*seed >> 8) * 0x1p-23f - 1;
    }
}

/* row: scratch, [head_dim]. */
static void noise_page(void *page, const struct kv_cache *kv, float *row)
{
    int64_t dim = kv->head_dim;
    uint32_t seed = 1;
    for (int64_t r = 0; r < (int64_t)KV_PAGE * kv->n_kv_heads; r++) {
        noise(row, (uint64_t)dim, &seed);
        if (kv->dtype == KV_F32) memcpy((float *)page + r * dim, row, (size_t)dim * sizeof *row);
        if (kv->dtype == KV_INT8)
            kv_scales(kv, page, 0)[r] = int8_quantize_row((int8_t *)page + r * dim, row, dim);
        for (int64_t i = 0; i < dim && kv->dtype == KV_BF16; i++)
            ((bf16 *)page)[r * dim + i] = bf16_from_f32(row[i]);
        for (int64_t i = 0; i < dim && kv->dtype == KV_FP8; i++)
            ((e4m3 *)page)[r * dim + i] = e4m3_from_f32(row[i]);
    }
}

bool layer_state_noise(struct layer_state *state, const struct model *m, int layer, const int32_t *pages,
                       int64_t n_pages, int32_t slot, struct err *e)
{
    const struct ops *op = m->backend->ops;
    struct queue *q = m->backend->queue;
    struct state_piece p[STATE_PIECES];
    bool full = layer_kind_of(m, layer) == LAYER_FULL_ATTENTION;
    uint64_t matrix = matrix_elements(&m->delta_shape), conv = conv_elements(&m->delta_shape);
    uint64_t row = full ? (uint64_t)m->config->head_dim : matrix > conv ? matrix : conv;
    uint64_t page = full ? page_bytes(m, state->kv.dtype) : 0;
    uint32_t seed = 1;
    uint8_t *values = malloc(page + row * sizeof(float)); /* a page, a multiple of 64 bytes, and a row */
    float *numbers = (float *)(void *)(values + page);
    if (!values) return err_memory(e, "noise", page + row * sizeof(float));
    if (full)
        noise_page(values, &state->kv, numbers);
    else
        noise(numbers, row, &seed);
    for (int64_t k = 0; k < (full ? n_pages : 1); k++) {
        if (full)
            layer_state_page(p, state, m, layer, pages[k]);
        else
            layer_state_slot(p, state, m, layer, slot);
        for (int i = 0; i < STATE_PIECES; i++) op->upload(q, p[i].data, values, p[i].bytes);
    }
    free(values);
    return true;
}
