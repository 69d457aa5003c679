/* Reference meaning of what a vision tower needs besides products: layer norm, biases with an activation,
 * rotation by given angles, attention of all rows to all. */
#include "backend/ref/parts.h"

void ref_layer_norm(struct queue *q, struct mat y, struct mat x, const float *gain, const float *bias,
                    float eps)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++) {
        const float *in = x.data + i * x.stride;
        double mean = 0, variance = 0;
        for (int64_t c = 0; c < x.cols; c++) mean += in[c];
        mean /= (double)x.cols;
        for (int64_t c = 0; c < x.cols; c++) variance += (in[c] - mean) * (in[c] - mean);
        double r = 1 / sqrt(variance / (double)x.cols + (double)eps);
        for (int64_t c = 0; c < x.cols; c++)
            y.data[i * y.stride + c] = (float)((in[c] - mean) * r * gain[c] + bias[c]);
    }
}

static double activate(double x, enum activation f)
{
    const double root = 0.79788456080286535588; /* sqrt(2 / pi) */
    switch (f) {
    case ACTIVATION_GELU: return x / 2 * (1 + erf(x / sqrt(2)));
    case ACTIVATION_GELU_TANH: return x / 2 * (1 + tanh(root * (x + 0.044715 * x * x * x)));
    default: return x;
    }
}

void ref_add_bias(struct queue *q, struct mat y, const float *bias, enum activation f)
{
    (void)q;
    for (int64_t i = 0; i < y.rows; i++)
        for (int64_t c = 0; c < y.cols; c++) {
            float *at = &y.data[i * y.stride + c];
            *at = (float)activate((double)(*at + bias[c]), f);
        }
}

void ref_rotate(struct queue *q, struct mat x, int n_heads, struct mat angle)
{
    (void)q;
    for (int64_t i = 0; i < x.rows; i++)
        for (int h = 0; h < n_heads; h++)
            for (int64_t j = 0; j < angle.cols; j++) {
                float *pair = x.data + i * x.stride + 2 * h * angle.cols + j;
                float c = cosf(angle.data[i * angle.stride + j]), s = sinf(angle.data[i * angle.stride + j]);
                float a = pair[0], b = pair[angle.cols];
                pair[0] = a * c - b * s;
                pair[angle.cols] = b * c + a * s;
            }
}

/* One query head; key and value: those of row 0. p: scratch, [rows]. */
static void attend_all(float *y, const float *query, const float *key, const float *value, struct mat qkv,
                       int64_t dim, float *p)
{
    double scale = 1 / sqrt((double)dim), top = -INFINITY, sum = 0;
    for (int64_t t = 0; t < qkv.rows; t++) {
        double dot = 0;
        for (int64_t d = 0; d < dim; d++) dot += (double)query[d] * (double)key[t * qkv.stride + d];
        p[t] = (float)(dot * scale);
        top = fmax(top, p[t]);
    }
    for (int64_t t = 0; t < qkv.rows; t++) sum += exp(p[t] - top);
    for (int64_t d = 0; d < dim; d++) {
        double o = 0;
        for (int64_t t = 0; t < qkv.rows; t++) o += exp(p[t] - top) * (double)value[t * qkv.stride + d];
        y[d] = (float)(o / sum);
    }
}

void ref_attention_all(struct queue *q, struct mat y, struct mat qkv, int n_heads)
{
    int64_t dim = y.cols / n_heads;
    for (int64_t i = 0; i < y.rows; i++)
        for (int64_t at = 0; at < y.cols; at += dim)
            attend_all(y.data + i * y.stride + at, qkv.data + i * qkv.stride + at, qkv.data + y.cols + at,
                       qkv.data + 2 * y.cols + at, qkv, dim, q->scratch);
}
