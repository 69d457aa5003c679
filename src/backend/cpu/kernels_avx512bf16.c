/* The kernels for AVX-512 with VNNI, BF16 and VBMI, as Zen 4 likes them: asking for lines 1 to 4 KiB ahead
 * costs BF16 and FP8 10 to 20 % there. */
enum { BF16_ALONE = 1, BF16_FEW = 4, BF16_AHEAD = 0, FP8_ALONE = 4, FP8_FEW = 4, FP8_AHEAD = 0 };
#include "backend/cpu/kernels_wide.h"

CPU_KERNELS(avx512bf16, "avx512bf16", 16, .spin = spin_packed, .dot_bf16 = dot_bf16, .dot_int8 = dot_int8,
            .wide_bf16 = wide_bf16, .wide_int8 = wide_int8);
