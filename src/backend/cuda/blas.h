/* cuBLASLt, opened at run time where it is installed, for dense products of many rows, BF16 and FP8. */
#ifndef BACKEND_CUDA_BLAS_H
#define BACKEND_CUDA_BLAS_H
#ifdef __cplusplus
extern "C" {
#endif
#include "backend/ops.h"
#include <cuda_runtime_api.h>
struct blas;
/* NULL: not installed, or older than version 12. Free with blas_close, which accepts NULL. */
struct blas *blas_open(void);
void blas_close(struct blas *b);
int blas_version(const struct blas *b); /* 130100 */
/* y = x W, or y += x W; y's rows and x and W begin at multiples of 16 bytes. x: [y.rows][cols], W:
 * [y.cols][cols], both BF16, or with scales both E4M3: element (i, r) is then the codes' sum times x_scale[i]
 * w_scale[r]. All in device memory. */
struct blas_product {
    struct mat y;
    const void *x, *w;
    const float *x_scale, *w_scale; /* NULL: BF16 */
    int64_t cols;
    bool add;
};
/* work: scratch of `bytes`. False: nothing was queued. */
bool blas_product(struct blas *b, cudaStream_t stream, const struct blas_product *p, void *work,
                  size_t bytes);
/* Whether blas_product may take FP8: not once it has refused some. */
bool blas_has_fp8(const struct blas *b);
#ifdef __cplusplus
}
#endif
#endif
