/* Packs a matrix, a piece of some rows, or a few small matrices at a time on a pool of threads, measures what
 * it cost, and refuses what no reader should see: weights that are not finite, a scale byte outside
 * 0x01..0x7e, an FP8 NaN. */
#ifndef QUANTIZE_PACK_H
#define QUANTIZE_PACK_H
#include "base/pool.h"
#include "num/bf16.h"
#include "num/e4m3.h"
#include "num/rows.h"
#include "quantize/plan.h"

struct packing {
    const struct matrix *matrix;
    float absmax;            /* NVFP4's, joint with the partner's; SCHEME_FP8's own; else unused */
    uint8_t *codes, *scales; /* where they go; at most a byte a weight. FP8's scales are aligned to 2 bytes */
};

struct packed {
    uint64_t codes_bytes, scales_bytes;
    float global;             /* NVFP4: divides the scales */
    double difference, total; /* sums of squares of W - packed W and of W */
};

/* How the scales of a matrix are searched, and what is known about its inputs; for NVFP4 only. */
struct curvature {
    bool four_over_six;      /* of two scales, by plain squares; the inputs do not matter then */
    const float *importance; /* [cols] mean squares of the inputs, any factor; NULL: all 1 */
    const float *factor;     /* gptq_factor's; NULL: errors are not passed on */
};

struct packer {
    struct pool *pool;
    const struct row_kernels *kernels;
    uint8_t *scales; /* room for those of the largest piece */
    float *rows;     /* [threads][2][cols_max] a row and what it became */
    double *sums;    /* [rows_max or PACKER_ROWS][2] squares of the difference and of the weights */
    float *blocks;   /* [threads][3][cols_max][GPTQ_ROWS] */
    int64_t rows_max, cols_max;
};

/* Rows of a piece of this matrix: all of them, or a multiple of 128 that bounds the memory. */
int64_t packer_piece_rows(const struct matrix *m);
/* Room for the largest piece of the plan. */
bool packer_init(struct packer *p, const struct plan *plan, int threads, struct err *e);
void packer_deinit(struct packer *p); /* accepts a zeroed one */

/* Of several matrices at once: how many, and their rows together. */
enum { PACKER_MATRICES = 16, PACKER_ROWS = 1 << 14 };

/* Matrices whose maxima are wanted next. */
struct packer_look {
    const struct matrix *matrices[PACKER_MATRICES];
    float absmax[PACKER_MATRICES];
    size_t n;
};

/* A matrix in what follows has at most packer_piece_rows rows, or there are several within the limits. max
 * |w|; a weight that is not finite is an error. */
bool packer_absmax(struct packer *p, float *out, const struct matrix *m, struct err *e);
/* What is refused after packing, by whatever did it. scales: of an NVFP4 matrix, NULL for others. */
bool packed_check(const struct packed *p, const struct matrix *m, const e4m3 *scales, struct err *e);
/* out: [n]. curvature: NULL for the nearest values. ahead: looked at by threads that find nothing more to
 * pack, NULL for none. */
bool packer_run(struct packer *p, struct packed *out, const struct packing *in, size_t n,
                const struct curvature *curvature, struct packer_look *ahead, struct err *e);
#endif
