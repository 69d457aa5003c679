/* The kernels for AVX-512 with VNNI, BF16 and VBMI (Zen 4, Sapphire Rapids). */
#include "backend/cpu/kernels_packed.h"

CPU_KERNELS(avx512bf16, 16, .dot_bf16 = dot_bf16, .dot_int8 = dot_int8);
