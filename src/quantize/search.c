/* All candidates of a group side by side: lane l tries the l-th code, so that every loop over lanes becomes
 * vector instructions. Sums run over the columns in order and no product is fused: the same bytes everywhere.
 */
#include "quantize/search.h"
#include "num/e2m1.h"
#include <math.h>
#include <stdbool.h>

enum { LANES = 16 }; /* 0.7 to 1.8 is 1.4 octaves of 8 codes; among subnormals codes are further apart */

struct lanes {
    float step[LANES], target[NVFP4_GROUP][LANES], error[NVFP4_GROUP][LANES], sum[LANES];
};

static void fill_steps(struct lanes *s, int first, int n, float global)
{
    for (int l = 0; l < LANES; l++)
        s->step[l] = e4m3_to_f32((e4m3){ (uint8_t)(first + (l < n ? l : 0)) }) / global;
}

static void take_feedback(struct lanes *s, const struct search_group *g, int k)
{
    for (int m = 0; m < k; m++) {
        float f = g->feedback[k * g->stride + m];
        for (int l = 0; l < LANES; l++) s->target[k][l] += f * s->error[m][l];
    }
}

/* Rounds one column as e2m1_from_f32 does, without branches. */
static void round_column(struct lanes *s, const struct search_group *g, int k)
{
    const float *t = s->target[k];
    for (int l = 0; l < LANES; l++) {
        float x = t[l] / s->step[l], a = fabsf(x);
        int halves = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) +
                     2 * ((a > 2.5f) + (a >= 3.5f)) + 4 * (a > 5.0f);
        float q = copysignf(0.5f * (float)halves, x) * s->step[l], d = t[l] - q;
        s->error[k][l] = g->value[k] - q;
        s->sum[l] += g->weight[k] * (d * d);
    }
}

/* The lane of the least sum; `usual` unless another is strictly better. A NaN never is. */
static int best_lane(const float *sum, int n, int usual)
{
    int best = usual;
    for (int l = 0; l < n; l++)
        if (sum[l] < sum[best]) best = l;
    return best;
}

e4m3 search_group(uint8_t codes[NVFP4_GROUP], const struct search_group *g, float global)
{
    struct lanes s;
    e4m3 usual = nvfp4_group_scale(g->start, global);
    float scale = e4m3_to_f32(usual);
    int low = e4m3_from_f32(0.7f * scale).bits, high = e4m3_from_f32(1.8f * scale).bits;
    int first = low > 0 ? low : 1, n = high - first + 1 < LANES ? high - first + 1 : LANES;
    fill_steps(&s, first, n, global);
    for (int l = 0; l < LANES; l++) s.sum[l] = 0;
    for (int k = 0; k < NVFP4_GROUP; k++) {
        for (int l = 0; l < LANES; l++) s.target[k][l] = g->start[k];
        if (g->feedback) take_feedback(&s, g, k);
        round_column(&s, g, k);
    }
    int best = best_lane(s.sum, n, usual.bits - first);
    for (int k = 0; k < NVFP4_GROUP; k++) codes[k] = e2m1_from_f32(s.target[k][best] / s.step[best]);
    return (e4m3){ (uint8_t)(first + best) };
}

/* The sum of squares that a group of 16 loses under a step. */
static float group_loss(const float *x, float step)
{
    float loss[4] = { 0 };
    for (int k = 0; k < NVFP4_GROUP; k += 4)
        for (int l = 0; l < 4; l++) {
            float d = x[k + l] - e2m1_round(x[k + l] / step) * step;
            loss[l] += d * d;
        }
    return (loss[0] + loss[1]) + (loss[2] + loss[3]);
}

void four_over_six_row(uint8_t *codes, e4m3 *scale, const float *x, float global, int64_t n)
{
    for (int64_t i = 0; i < n; i += NVFP4_GROUP, x += NVFP4_GROUP) {
        e4m3 six = nvfp4_group_scale(x, global), four = e4m3_from_f32(1.5f * e4m3_to_f32(six));
        bool wider = group_loss(x, e4m3_to_f32(four) / global) < group_loss(x, e4m3_to_f32(six) / global);
        *scale = wider ? four : six;
        float step = e4m3_to_f32(*scale++) / global;
        for (int k = 0; k < NVFP4_GROUP; k += 2)
            *codes++ = (uint8_t)(e2m1_from_f32(x[k] / step) | e2m1_from_f32(x[k + 1] / step) << 4);
    }
}

void search_row(uint8_t *codes, e4m3 *scale, const float *x, const float *importance, float global, int64_t n)
{
    static const float ones[NVFP4_GROUP] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    for (int64_t i = 0; i < n; i += NVFP4_GROUP, x += NVFP4_GROUP) {
        uint8_t code[NVFP4_GROUP];
        struct search_group g = { .value = x, .start = x, .weight = importance ? importance + i : ones };
        *scale++ = search_group(code, &g, global);
        for (int k = 0; k < NVFP4_GROUP; k += 2) *codes++ = (uint8_t)(code[k] | code[k + 1] << 4);
    }
}
