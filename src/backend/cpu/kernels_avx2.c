/* The kernels for AVX2 + FMA. */
#include "backend/cpu/kernels_sequence.h"

CPU_KERNELS(avx2, "avx2", 4, .spin = spin);
