/* What packing one matrix of the plan came to. An array with one entry per matrix is filled in whatever order
 * they are packed; totals are derived from it in plan order, so that they do not depend on that order. */
#ifndef QUANTIZE_RESULTS_H
#define QUANTIZE_RESULTS_H
#include <stdbool.h>

struct matrix_result {
    double difference, total; /* sums of squares of W - packed W and of W */
    float global;             /* NVFP4: the weights' scale, which divides; else 0 */
    float input;              /* largest calibration input |x|; 0: not measured, or every one was zero */
    bool is_gptq;             /* errors were passed on to later columns */
    bool is_done;
};
#endif
