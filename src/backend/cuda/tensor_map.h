/* Matrices as the copy engine of compute capability 9.0 takes them, in boxes: those of BF16 by 64 columns,
 * which it lays into shared memory as wide_matrix (wide.cuh) has them; others as they are. */
#ifndef BACKEND_CUDA_TENSOR_MAP_H
#define BACKEND_CUDA_TENSOR_MAP_H
#ifdef __cplusplus
extern "C" {
#endif
#include <cuda.h>
#include <stdbool.h>
#include <stdint.h>

/* The driver's function that makes such maps; NULL: it has none. */
void *tensor_map_maker(void);
/* data: [rows][pitch] of which cols are the matrix's, beginning at a multiple of 16 bytes; pitch: a multiple
 * of 8. Rows past the last are zeros. False: no maker, or the shape is not for it. */
bool tensor_map(void *maker, CUtensorMap *out, const void *data, int64_t rows, int64_t cols, int64_t pitch,
                int box_rows);
/* data: [rows][cols] words of eight bytes, beginning at a multiple of 16; cols: even; box_rows, box_cols: at
 * most 256. */
bool tensor_map_words(void *maker, CUtensorMap *out, const void *data, int64_t rows, int64_t cols,
                      int box_rows, int box_cols);
#ifdef __cplusplus
}
#endif
#endif
