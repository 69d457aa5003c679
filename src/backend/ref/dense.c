/* Reference meaning of the row-wise operations: embedding, product, norms, gates. */
#include "backend/ref/parts.h"
#include "backend/rounding.h"
#include <string.h>

void ref_embed(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *rows)
{
    (void)q;
    for (int64_t i = 0; i < rows->n; i++) {
        const struct row *row = &rows->rows[i];
        float *out = y.data + i * y.stride;
        if (row->embedding)
            memcpy(out, row->embedding, (size_t)y.cols * sizeof *out);
        else
            ref_row(out, (const struct ref_weight *)table, row->token);
    }
}

void ref_matmul(struct queue *q, struct mat y, struct mat x, const struct weight *weight)
{
    const struct ref_weight *w = (const struct ref_weight *)weight;
    enum rounding rounding = rounding_of(weight, q->rounded);
    for (int64_t i = 0; i < x.rows; i++) {
        const float *in = x.data + i * x.stride;
        float input_scale = 1;
        if (rounding != ROUND_NONE) {
            input_scale = rounding_apply(q->scratch, in, x.cols, rounding, weight);
            in = q->scratch;
        }
        for (int64_t r = 0; r < weight->rows; r++) {
            double sum = 0;
            for (int64_t c = 0; c < x.cols; c++) sum += (double)in[c] * (double)w->dense[r * x.cols + c];
            if (weight->format == WEIGHT_FP8) sum *= (double)input_scale * (double)w->scale[r];
            y.data[i * y.stride + r] = (float)sum;
        }
    }
}

void ref_add(struct queue *q, struct mat y, struct mat x)
{
    (void)q;
    for (int64_t i = 0; i < y.rows; i++)
        for (int64_t c = 0; c < y.cols; c++) y.data[i * y.stride + c] += x.data[i * x.stride + c];
}

static double inverse_rms(const float *x, int64_t n, float eps)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return 1 / sqrt(sum / (double)n + (double)eps);
}

void ref_rmsnorm(struct queue *q, struct mat y, struct mat x, const float *gain, float eps)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++) {
        const float *in = x.data + i * x.stride;
        double r = inverse_rms(in, x.cols, eps);
        for (int64_t c = 0; c < x.cols; c++) y.data[i * y.stride + c] = (float)(in[c] * r * gain[c]);
    }
}

void ref_gather(struct queue *q, struct mat y, struct mat x, const int64_t *index)
{
    (void)q;
    for (int64_t i = 0; i < y.rows; i++)
        memcpy(y.data + i * y.stride, x.data + index[i] * x.stride, (size_t)y.cols * sizeof *y.data);
}

void ref_silu_mul(struct queue *q, struct mat y, struct mat gate, struct mat up)
{
    (void)q;
    for (int64_t i = 0; i < y.rows; i++)
        for (int64_t c = 0; c < y.cols; c++)
            y.data[i * y.stride + c] = ref_silu(gate.data[i * gate.stride + c]) * up.data[i * up.stride + c];
}

void ref_add_gated(struct queue *q, struct mat y, struct mat x, struct mat gate)
{
    (void)q;
    for (int64_t i = 0; i < y.rows; i++) {
        float g = ref_sigmoid(gate.data[i * gate.stride]);
        for (int64_t c = 0; c < y.cols; c++) y.data[i * y.stride + c] += g * x.data[i * x.stride + c];
    }
}

void ref_gated_norm(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim,
                    float eps)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++)
        for (int64_t head = 0; head < x.cols; head += dim) {
            const float *in = x.data + i * x.stride + head, *zi = z.data + i * z.stride + head;
            double r = inverse_rms(in, dim, eps);
            for (int d = 0; d < dim; d++)
                y.data[i * y.stride + head + d] = (float)(in[d] * r * gain[d] * ref_silu(zi[d]));
        }
}

static void rotate(float *x, const struct rope *rope, const int32_t position[3])
{
    for (int j = 0; j < rope->n; j++) {
        float angle = (float)position[rope->axis[j]] * rope->inverse[j];
        float c = cosf(angle) * rope->scale, s = sinf(angle) * rope->scale, a = x[j], b = x[j + rope->n];
        x[j] = a * c - b * s;
        x[j + rope->n] = b * c + a * s;
    }
}

void ref_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim,
                   const float *gain, float eps, const struct rope *rope, const struct step_rows *rows)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++)
        for (int h = 0; h < n_heads; h++) {
            float *head = x.data + i * x.stride + (int64_t)h * head_stride;
            double r = inverse_rms(head, head_dim, eps);
            for (int d = 0; d < head_dim; d++) head[d] = (float)(head[d] * r * gain[d]);
            rotate(head, rope, rows->rows[i].position);
        }
}

void ref_log_softmax(struct queue *q, struct mat x)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++) {
        float *row = x.data + i * x.stride;
        double top = -INFINITY, sum = 0;
        for (int64_t c = 0; c < x.cols; c++) top = fmax(top, row[c]);
        for (int64_t c = 0; c < x.cols; c++) sum += exp(row[c] - top);
        for (int64_t c = 0; c < x.cols; c++) row[c] = (float)(row[c] - top - log(sum));
    }
}

void ref_divergence(struct queue *q, double *out, struct mat p, struct mat other)
{
    (void)q;
    for (int64_t i = 0; i < p.rows; i++) {
        out[i] = 0;
        for (int64_t c = 0; c < p.cols; c++) {
            double a = p.data[i * p.stride + c], b = other.data[i * other.stride + c];
            out[i] += exp(a) * (a - b);
        }
    }
}

void ref_moments(struct queue *q, float *h, struct mat x)
{
    (void)q;
    for (int64_t i = 0; i < x.cols; i++)
        for (int64_t j = i; j < x.cols; j++) {
            double sum = 0;
            for (int64_t r = 0; r < x.rows; r++)
                sum += (double)x.data[r * x.stride + i] * (double)x.data[r * x.stride + j];
            h[i * x.cols + j] += (float)sum;
        }
}
