#include "num/rows.h"

const struct row_kernels *rows_select(enum rows_isa isa)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa != ROWS_GENERIC && __builtin_cpu_supports("avx2")) return &row_kernels_avx2;
#else
    (void)isa;
#endif
    return &row_kernels_generic;
}
