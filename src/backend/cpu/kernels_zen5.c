/* The kernels of kernels_avx512bf16.c as Zen 5 likes them: its cores read faster than they look ahead. FP8
 * from memory, GB/s of one thread: four panels side by side 31, and asked for 2 KiB ahead 37, two panels 6
 * KiB ahead 40; a plain read 42. */
enum { BF16_ALONE = 1, BF16_FEW = 1, BF16_AHEAD = 4096, FP8_ALONE = 2, FP8_FEW = 2, FP8_AHEAD = 6144 };
#include "backend/cpu/kernels_wide.h"

CPU_KERNELS(zen5, "avx512bf16", 16, .spin = spin_packed, .dot_bf16 = dot_bf16, .dot_int8 = dot_int8,
            .wide_bf16 = wide_bf16, .wide_int8 = wide_int8);
