/* Reference meaning of the operations that look along a sequence: attention, convolution, the gated delta
 * rule. */
#include "backend/ref/parts.h"
#include "num/e4m3.h"
#include <string.h>

static int64_t kv_line(const struct kv_cache *kv, const struct span *s, int64_t token)
{
    return ((int64_t)s->pages[token / KV_PAGE] * KV_PAGE + token % KV_PAGE) * kv->n_kv_heads * kv->head_dim;
}

static void kv_store(void *to, enum kv_dtype dtype, int64_t at, float x)
{
    if (dtype == KV_F32)
        ((float *)to)[at] = x;
    else if (dtype == KV_BF16)
        ((bf16 *)to)[at] = bf16_from_f32(x);
    else
        ((e4m3 *)to)[at] = e4m3_from_f32(x);
}

static float kv_load(const void *from, enum kv_dtype dtype, int64_t at)
{
    if (dtype == KV_F32) return ((const float *)from)[at];
    if (dtype == KV_BF16) return bf16_to_f32(((const bf16 *)from)[at]);
    return e4m3_to_f32(((const e4m3 *)from)[at]);
}

void ref_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                   const struct step_rows *rows)
{
    (void)q;
    for (int64_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        for (int64_t i = 0; i < span->n; i++) {
            int64_t line = kv_line(kv, span, span->past + i), row = span->first + i;
            for (int64_t c = 0; c < k.cols; c++) {
                kv_store(kv->keys, kv->dtype, line + c, k.data[row * k.stride + c]);
                kv_store(kv->values, kv->dtype, line + c, v.data[row * v.stride + c]);
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
        int64_t line = kv_line(kv, span, t) + (int64_t)kv_head * dim;
        double dot = 0;
        for (int d = 0; d < dim; d++) dot += (double)qg[d] * (double)kv_load(kv->keys, kv->dtype, line + d);
        p[t] = (float)(dot * scale);
        top = fmax(top, p[t]);
    }
    for (int64_t t = 0; t < n_tokens; t++) sum += exp(p[t] - top);
    for (int d = 0; d < dim; d++) {
        double o = 0;
        for (int64_t t = 0; t < n_tokens; t++) {
            int64_t line = kv_line(kv, span, t) + (int64_t)kv_head * dim;
            o += exp(p[t] - top) * (double)kv_load(kv->values, kv->dtype, line + d);
        }
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

void ref_conv(struct queue *q, struct mat y, struct mat u, const float *weight,
              const struct delta_state *state, const struct delta_shape *shape, const struct step_rows *rows)
{
    (void)q;
    int64_t keep = shape->kernel - 1, n = u.cols;
    for (int64_t s = 0; s < rows->n_spans; s++) {
        const struct span *span = &rows->spans[s];
        float *past = state->conv + span->slot * keep * n;
        for (int64_t i = 0; i < span->n; i++) {
            const float *now = u.data + (span->first + i) * u.stride;
            for (int64_t c = 0; c < n; c++) {
                double sum = (double)weight[keep * n + c] * now[c];
                for (int64_t j = 0; j < keep; j++) sum += (double)weight[j * n + c] * (double)past[j * n + c];
                y.data[(span->first + i) * y.stride + c] = ref_silu((float)sum);
            }
            if (keep == 0) continue;
            memmove(past, past + n, (size_t)((keep - 1) * n) * sizeof *past);
            memcpy(past + (keep - 1) * n, now, (size_t)n * sizeof *past);
        }
    }
}

/* out = in / |in| * scale. */
static void normalise(float *out, const float *in, int n, double scale)
{
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)in[i] * (double)in[i];
    double r = scale / sqrt(sum + 1e-6);
    for (int i = 0; i < n; i++) out[i] = (float)(in[i] * r);
}

static void delta_token(float *o, float *S, const float *k, const float *query, const float *v, int dk,
                        int dv, float decay, float beta)
{
    for (int c = 0; c < dv; c++) {
        double read = 0, out = 0;
        for (int r = 0; r < dk; r++) read += (double)decay * (double)S[r * dv + c] * (double)k[r];
        float d = (float)(beta * (v[c] - read));
        for (int r = 0; r < dk; r++) {
            S[r * dv + c] = decay * S[r * dv + c] + k[r] * d;
            out += (double)S[r * dv + c] * (double)query[r];
        }
        o[c] = (float)out;
    }
}

void ref_delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
               const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
               const struct step_rows *rows)
{
    int dk = shape->key_dim, dv = shape->value_dim, group = shape->value_heads / shape->key_heads;
    float *query = q->scratch, *key = query + dk;
    for (int64_t s = 0; s < rows->n_spans; s++)
        for (int64_t row = rows->spans[s].first; row < rows->spans[s].first + rows->spans[s].n; row++)
            for (int h = 0; h < shape->value_heads; h++) {
                const float *in = qkv.data + row * qkv.stride;
                normalise(query, in + (int64_t)(h / group) * dk, dk, 1 / sqrt((double)dk));
                normalise(key, in + (int64_t)(shape->key_heads + h / group) * dk, dk, 1);
                float ah = a.data[row * a.stride + h] + dt_bias[h];
                float softplus = ah > 20 ? ah : log1pf(expf(ah));
                float *S = state->matrix + ((int64_t)rows->spans[s].slot * shape->value_heads + h) * dk * dv;
                delta_token(o.data + row * o.stride + (int64_t)h * dv, S, key, query,
                            in + 2 * (int64_t)shape->key_heads * dk + (int64_t)h * dv, dk, dv,
                            expf(-expf(A_log[h]) * softplus), ref_sigmoid(b.data[row * b.stride + h]));
            }
}
