/* The kernels for AVX-512 F, BW, DQ, VL. */
#include "backend/cpu/kernels_sequence.h"

const struct cpu_kernels cpu_kernels_avx512 = {
    .name = "avx512",
    .block_rows = 16,
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
