/* cuBLASLt, opened at run time where it is installed, for dense BF16 products of many rows. */
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
/* y = x W, y's rows and x and W beginning at multiples of 16 bytes. x: BF16 [y.rows][cols], W: BF16
 * [y.cols][cols], both in device memory; work: scratch of `bytes`. False: nothing was queued. */
bool blas_product(struct blas *b, cudaStream_t stream, struct mat y, const void *x, const void *w,
                  int64_t cols, void *work, size_t bytes);
#ifdef __cplusplus
}
#endif
#endif
