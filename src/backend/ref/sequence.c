/* Reference meaning of the operations that look along a sequence: attention, convolution, the gated delta
 * rule. */
#include "backend/ref/parts.h"
#include "num/e4m3.h"
#include "num/int8.h"
#include <string.h>

/* What a token keeps of one kv head, on one side. */
struct kv_row {
    void *elements;
    float *scale; /* of INT8 */
};

static struct kv_row kv_row(const struct kv_cache *kv, void *side, const struct span *s, int64_t token,
                            int kv_head)
{
    int32_t page = s->pages[token / KV_PAGE];
    int64_t row = token % KV_PAGE * kv->n_kv_heads + kv_head;
    int64_t at = page * kv_page_stride(kv) + row * kv->head_dim;
    return (struct kv_row){ (uint8_t *)side + at * kv_element_bytes(kv->dtype),
                            kv->dtype == KV_INT8 ? kv_scales(kv, side, page) + row : NULL };
}

static void kv_store(struct kv_row to, enum kv_dtype dtype, const float *x, int n)
{
    if (dtype == KV_INT8) *to.scale = int8_quantize_row(to.elements, x, n);
    for (int i = 0; i < n; i++) switch (dtype) {
        case KV_F32: ((float *)to.elements)[i] = x[i]; break;
        case KV_BF16: ((bf16 *)to.elements)[i] = bf16_from_f32(x[i]); break;
        case KV_FP8: ((e4m3 *)to.elements)[i] = e4m3_from_f32(x[i]); break;
        case KV_INT8: break;
        }
}

static double kv_load(struct kv_row from, enum kv_dtype dtype, int i)
{
    switch (dtype) {
    case KV_F32: return (double)((const float *)from.elements)[i];
    case KV_BF16: return (double)bf16_to_f32(((const bf16 *)from.elements)[i]);
    case KV_FP8: return (double)e4m3_to_f32(((const e4m3 *)from.elements)[i]);
    default: return ((const int8_t *)from.elements)[i] * (double)*from.scale;
    }
}

void ref_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                   const struct step_rows *rows)
{
    (void)q;
    for (int64_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        for (int64_t i = 0; i < span->n; i++) {
            int64_t token = span->past + i, row = span->first + i;
            for (int h = 0; h < kv->n_kv_heads; h++) {
                int64_t column = (int64_t)h * kv->head_dim;
                kv_store(kv_row(kv, kv->keys, span, token, h), kv->dtype, k.data + row * k.stride + column,
                         kv->head_dim);
                kv_store(kv_row(kv, kv->values, span, token, h), kv->dtype, v.data + row * v.stride + column,
                         kv->head_dim);
            }
        }
    }
}

static void attend(float *y, const float *qg, int kv_head, const struct kv_cache *kv, const struct span *span,
                   int64_t n_tokens, float *p)
{
    int dim = kv->head_dim;
    double scale = 1 / sqrt((double)dim), top = -INFINITY, sum = 0;
    for (int64_t t = 0; t < n_tokens; t++) {
        struct kv_row key = kv_row(kv, kv->keys, span, t, kv_head);
        double dot = 0;
        for (int d = 0; d < dim; d++) dot += (double)qg[d] * kv_load(key, kv->dtype, d);
        p[t] = (float)(dot * scale);
        top = fmax(top, p[t]);
    }
    for (int64_t t = 0; t < n_tokens; t++) sum += exp(p[t] - top);
    for (int d = 0; d < dim; d++) {
        double o = 0;
        for (int64_t t = 0; t < n_tokens; t++)
            o += exp(p[t] - top) * kv_load(kv_row(kv, kv->values, span, t, kv_head), kv->dtype, d);
        y[d] = (float)(o / sum * ref_sigmoid(qg[dim + d]));
    }
}

void ref_attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                   const struct step_rows *rows)
{
    int dim = kv->head_dim, group = n_heads / kv->n_kv_heads;
    for (int64_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        for (int64_t i = 0; i < span->n; i++)
            for (int h = 0; h < n_heads; h++) {
                int64_t row = span->first + i;
                attend(y.data + row * y.stride + (int64_t)h * dim,
                       qg.data + row * qg.stride + (int64_t)h * 2 * dim, h / group, kv, span,
                       span->past + i + 1, q->scratch);
            }
    }
}

/* A row of raw projections enters the state, the oldest leaves. */
static void conv_advance(float *past, const float *u, int64_t keep, int64_t n)
{
    if (keep == 0) return;
    memmove(past, past + n, (size_t)((keep - 1) * n) * sizeof *past);
    memcpy(past + (keep - 1) * n, u, (size_t)n * sizeof *past);
}

/* Row i of a span, j rows back. */
static const float *conv_tap(const float *past, struct mat u, const struct span *span, int64_t i, int64_t j,
                             int64_t keep)
{
    return i >= j ? u.data + (span->first + i - j) * u.stride : past + (keep + i - j) * u.cols;
}

void ref_conv(struct queue *q, struct mat y, struct mat u, const float *weight,
              const struct delta_state *state, const struct delta_shape *shape, const struct step_rows *rows)
{
    (void)q;
    int64_t keep = shape->kernel - 1, n = u.cols;
    for (int64_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        float *past = state->conv + span->slot * keep * n;
        for (int32_t r = 0; r < span->kept; r++)
            conv_advance(past, delta_log_at(state, shape, span->slot, r).u, keep, n);
        for (int64_t i = 0; i < span->n; i++)
            for (int64_t c = 0; c < n; c++) {
                double sum = (double)weight[keep * n + c] * conv_tap(past, u, span, i, 0, keep)[c];
                for (int64_t j = 0; j < keep; j++)
                    sum += (double)weight[j * n + c] * (double)conv_tap(past, u, span, i, keep - j, keep)[c];
                y.data[(span->first + i) * y.stride + c] = ref_silu((float)sum);
            }
        for (int64_t i = 0; i < span->n; i++) {
            const float *now = u.data + (span->first + i) * u.stride;
            if (span->logged)
                memcpy(delta_log_at(state, shape, span->slot, i).u, now, (size_t)n * sizeof *now);
            else
                conv_advance(past, now, keep, n);
        }
    }
}

/* x / |x| * scale, in place. */
static void normalise(float *x, int n, double scale)
{
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    double r = scale / sqrt(sum + 1e-6);
    for (int i = 0; i < n; i++) x[i] = (float)(x[i] * r);
}

/* q and k of a row become normalised, a the decay, b beta. */
static void delta_prepare(float *qkv, float *a, float *b, const float *A_log, const float *dt_bias,
                          const struct delta_shape *s)
{
    for (int h = 0; h < 2 * s->key_heads; h++)
        normalise(qkv + (int64_t)h * s->key_dim, s->key_dim,
                  h < s->key_heads ? 1 / sqrt((double)s->key_dim) : 1);
    for (int h = 0; h < s->value_heads; h++) {
        float x = a[h] + dt_bias[h], softplus = x > 20 ? x : log1pf(expf(x));
        a[h] = expf(-expf(A_log[h]) * softplus);
        b[h] = ref_sigmoid(b[h]);
    }
}

struct delta_args {
    struct mat o, qkv, a, b;
    const struct delta_state *state;
    const struct delta_shape *shape;
};

/* S <- e^g S + k d^T, of one column. */
static void update_column(float *S, const float *k, float d, float decay, int dk)
{
    for (int r = 0; r < dk; r++) S[r] = decay * S[r] + k[r] * d;
}

/* Column c of value head h of S over a span; S: that column, [dk]. */
static void delta_column(const struct delta_args *p, const struct span *span, int h, int c, float *S)
{
    const struct delta_shape *s = p->shape;
    int dk = s->key_dim, dv = s->value_dim, key = h / (s->value_heads / s->key_heads);
    for (int64_t t = 0; t < span->n; t++) {
        const float *in = p->qkv.data + (span->first + t) * p->qkv.stride;
        const float *q = in + (int64_t)key * dk, *k = q + (int64_t)s->key_heads * dk;
        float v = in[2 * (int64_t)s->key_heads * dk + (int64_t)h * dv + c];
        float decay = p->a.data[(span->first + t) * p->a.stride + h];
        double read = 0, out = 0;
        for (int r = 0; r < dk; r++) read += (double)decay * (double)S[r] * (double)k[r];
        float d = (float)(p->b.data[(span->first + t) * p->b.stride + h] * (v - read));
        update_column(S, k, d, decay, dk);
        for (int r = 0; r < dk; r++) out += (double)S[r] * (double)q[r];
        p->o.data[(span->first + t) * p->o.stride + (int64_t)h * dv + c] = (float)out;
        if (span->logged) delta_log_at(p->state, s, span->slot, t).update[(int64_t)h * dv + c] = d;
    }
}

static void delta_head(const struct delta_args *p, const struct span *span, int h, float *column)
{
    const struct delta_shape *s = p->shape;
    int dk = s->key_dim, dv = s->value_dim, key = h / (s->value_heads / s->key_heads);
    float *S = p->state->matrix + ((int64_t)span->slot * s->value_heads + h) * dk * dv;
    for (int c = 0; c < dv; c++) {
        for (int r = 0; r < dk; r++) column[r] = S[r * dv + c];
        for (int32_t t = 0; t < span->kept; t++) {
            struct delta_log log = delta_log_at(p->state, s, span->slot, t);
            update_column(column, log.key + (int64_t)key * dk, log.update[(int64_t)h * dv + c], log.decay[h],
                          dk);
        }
        for (int r = 0; r < dk; r++) S[r * dv + c] = column[r];
        delta_column(p, span, h, c, column);
        for (int r = 0; r < dk && !span->logged; r++) S[r * dv + c] = column[r];
    }
}

/* What the heads share of a log: written when none reads it any more. */
static void log_keys(const struct delta_args *p, const struct span *span)
{
    const struct delta_shape *s = p->shape;
    int64_t keys = (int64_t)s->key_heads * s->key_dim;
    for (int64_t t = 0; t < span->n; t++) {
        struct delta_log log = delta_log_at(p->state, s, span->slot, t);
        int64_t row = span->first + t;
        memcpy(log.key, p->qkv.data + row * p->qkv.stride + keys, (size_t)keys * sizeof(float));
        memcpy(log.decay, p->a.data + row * p->a.stride, (size_t)s->value_heads * sizeof(float));
    }
}

void ref_delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
               const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
               const struct step_rows *rows)
{
    struct delta_args p = { o, qkv, a, b, state, shape };
    for (int64_t i = 0; i < rows->n; i++)
        delta_prepare(qkv.data + i * qkv.stride, a.data + i * a.stride, b.data + i * b.stride, A_log, dt_bias,
                      shape);
    for (int64_t s = 0; s < rows->n_spans; s++) {
        for (int h = 0; h < shape->value_heads; h++) delta_head(&p, &rows->spans[s], h, q->scratch);
        if (rows->spans[s].logged) log_keys(&p, &rows->spans[s]);
    }
}
