/* Reference meaning of the mixture of experts: routing and the routed products. */
#include "backend/ref/parts.h"

static bool picked(const int32_t *expert, int n, int32_t e)
{
    for (int j = 0; j < n; j++)
        if (expert[j] == e) return true;
    return false;
}

void ref_route(struct queue *q, const struct picks *picks, struct mat logits)
{
    (void)q;
    for (int64_t i = 0; i < logits.rows; i++) {
        const float *l = logits.data + i * logits.stride;
        int32_t *expert = picks->expert + i * picks->k;
        float *weight = picks->weight + i * picks->k;
        double sum = 0;
        for (int j = 0; j < picks->k; j++) {
            expert[j] = -1;
            for (int32_t e = 0; e < logits.cols; e++)
                if (!picked(expert, j, e) && (expert[j] < 0 || l[e] > l[expert[j]])) expert[j] = e;
            sum += exp((double)l[expert[j]] - (double)l[expert[0]]);
        }
        for (int j = 0; j < picks->k; j++)
            weight[j] = (float)(exp((double)l[expert[j]] - (double)l[expert[0]]) / sum);
    }
}

/* One row through one expert, added to y with this weight. */
static void expert_row(struct queue *q, float *y, struct mat x, float weight, const struct weight *gate,
                       const struct weight *up, const struct weight *down)
{
    struct mat g = mat_of(q->row, 1, gate->rows), u = mat_of(q->row + gate->rows, 1, gate->rows);
    struct mat out = mat_of(q->row + 2 * gate->rows, 1, down->rows);
    ref_matmul(q, g, x, gate);
    ref_matmul(q, u, x, up);
    ref_silu_mul(q, g, g, u);
    ref_matmul(q, out, g, down);
    for (int64_t c = 0; c < out.cols; c++) y[c] += weight * out.data[c];
}

void ref_experts(struct queue *q, struct mat y, struct mat x, const struct picks *picks,
                 const struct experts *experts)
{
    for (int64_t i = 0; i < x.rows; i++) {
        for (int64_t c = 0; c < y.cols; c++) y.data[i * y.stride + c] = 0;
        for (int j = 0; j < picks->k; j++) {
            int32_t e = picks->expert[i * picks->k + j];
            expert_row(q, y.data + i * y.stride, mat_of(x.data + i * x.stride, 1, x.cols),
                       picks->weight[i * picks->k + j], experts->gate[e], experts->up[e], experts->down[e]);
        }
    }
}
