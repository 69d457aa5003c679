/* The kernels for AVX2 + FMA. */
#include "backend/cpu/kernels_sequence.h"

const struct cpu_kernels cpu_kernels_avx2 = {
    .name = "avx2",
    .block_rows = 4,
    .decode = decode,
    .product = product,
    .rmsnorm = rmsnorm,
    .gated_norm = gated_norm,
    .silu_mul = silu_mul,
    .scale_add = scale_add,
    .log_softmax = log_softmax,
    .divergence = divergence,
    .attend = attend,
    .conv_row = conv_row,
    .l2norm = l2norm,
    .delta = delta,
    .delta_chunk = delta_chunk,
};
