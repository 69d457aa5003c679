/* The kernels for AVX-512 with VNNI, BF16 and VBMI (Zen 4, Sapphire Rapids). */
enum { FETCH_AHEAD = 0 }; /* Zen 4: 1 to 4 KiB cost BF16 and FP8 10 to 20 % */
#include "backend/cpu/kernels_packed.h"

CPU_KERNELS(avx512bf16, 16, .dot_bf16 = dot_bf16, .dot_int8 = dot_int8);
