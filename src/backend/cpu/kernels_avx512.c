/* The kernels for AVX-512 F, BW, DQ, VL. */
#include "backend/cpu/kernels_sequence.h"

CPU_KERNELS(avx512, "avx512", 16, .spin = spin);
