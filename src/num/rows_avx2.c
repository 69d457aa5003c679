/* The row kernels for AVX2. */
#include "num/rows_kernels.h"

ROW_KERNELS(avx2);
