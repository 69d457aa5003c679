/* The row kernels for any machine: the compiler's baseline vectors. */
#include "num/rows_kernels.h"

ROW_KERNELS(generic);
