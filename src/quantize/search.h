/* The scale of a group by trying them: every E4M3 code from 0.7 to 1.8 times the nearest method's, the
 * group's codes rounded under each, the one with the least weighted square error kept. A wider step clips
 * less often and a narrower one rounds finer; which pays is different from group to group. Source:
 * ScaleSweep, arXiv 2606.07618; docs/quality.md has what it gains. */
#ifndef QUANTIZE_SEARCH_H
#define QUANTIZE_SEARCH_H
#include "num/e4m3.h"
#include "num/nvfp4.h"

/* One group of 16 columns. Its errors count weight[k] * (target of k - what k became)^2. Without feedback the
 * target of k is start[k]; with it, start[k] + sum over m < k of feedback[k * stride + m] * (value[m] - what
 * m became): columns make up for the ones before them (gptq.h). */
struct search_group {
    const float *value; /* [16] the weights */
    const float *start; /* [16] the weights, and what earlier groups' errors ask of them */
    const float *weight;
    const float *feedback; /* NULL: none */
    int64_t stride;
};

/* codes: one a byte. Of equal errors the nearest method's scale wins, then the smaller one. */
e4m3 search_group(uint8_t codes[NVFP4_GROUP], const struct search_group *g, float global);

/* Like nvfp4_pack_row, each group's absmax at 6 as there or at 4, where code values are closer, whichever
 * loses less by plain squares; 6 when equal. Source: Four Over Six, arXiv 2512.02010. */
void four_over_six_row(uint8_t *codes, e4m3 *scale, const float *x, float global, int64_t n);

/* Like nvfp4_pack_row. importance: [n], how much the square error of each column counts; NULL: 1. */
void search_row(uint8_t *codes, e4m3 *scale, const float *x, const float *importance, float global,
                int64_t n);
#endif
