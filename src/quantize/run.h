/* The state of one run, shared by the files that carry it out: quantize.c (the order of things), resume.c
 * (what the journal says), layers.c (calibration), tensors.c (packing and writing). */
#ifndef QUANTIZE_RUN_H
#define QUANTIZE_RUN_H
#include "quantize/calibrate.h"
#include "quantize/contest.h"
#include "quantize/curvature.h"
#include "quantize/destination.h"
#include "quantize/journal.h"
#include "quantize/pack.h"
#include "quantize/plan.h"
#include "quantize/quantize.h"
#include "quantize/shards.h"
#include "quantize/spool.h"
#include "quantize/writer.h"

/* What packing a layer on the backend takes: its memory, and below it the host's. */
struct layers_device {
    struct backend *backend; /* NULL: the host packs */
    const struct config *config;
    float *global;           /* [n_experts] of the matrices that are packed */
    float *importance;       /* [hidden] of the block, then [n_experts][inner] of down_proj */
    int32_t *factored;       /* [1 + n_experts] in the same order */
    void *scratch;           /* of factors */
    struct moments trial;    /* of samples not held out */
    uint8_t *codes, *scales; /* of one matrix of every expert */
    double *sums;

    uint8_t *host;      /* sums, codes, scales */
    float *host_global; /* [N_PARTS][n_experts] */
    double *losses;     /* [N_PARTS][2][n_experts] of rows tried: alone, passed on */
    int32_t *host_factored;
};

struct run {
    struct quantize_options options; /* defaults filled in */
    struct quantize_result *result;
    struct checkpoint source;
    struct plan plan;
    struct samples samples;
    struct calibration calibration;
    uint64_t disk_bytes; /* of all files, work files too, at most */
    struct destination destination;
    struct journal journal;
    json_t *identity;
    bool is_ours;    /* the work folder: this run's to continue, or to remove */
    bool is_started; /* the journal has this run's identity */
    bool is_proved;  /* the checkpoint is written and its census taken */
    int layers_done; /* of the calibration */
    struct packer packer;
    struct curvatures curvatures;
    struct contest contest; /* of method auto */
    struct layers_device there;
    struct spool spool;
    struct shards *shards;
    struct writer *writer;
    struct matrix_result *results; /* [plan.n_matrices] */
    float *absmax;                 /* of NVFP4 matrices, once looked at; negative before */
    uint8_t *scales;               /* of the matrix being packed */
    uint64_t done;                 /* bytes of source tensors */
    const uint8_t *ahead;          /* the source was asked to be read up to here */
};

/* Where the codes of a matrix go, piece by piece: room for at most so many bytes, then how many they were. */
struct outlet {
    void *ctx;
    void *(*room)(void *ctx, uint64_t bytes, struct err *e);
    bool (*put)(void *ctx, uint64_t bytes, struct err *e);
};

/* resume.c: opens the journal; takes up what an earlier run of the same identity left, or starts anew. */
bool run_resume(struct run *r, struct err *e);
/* The destination is there: whether its report names this very run and its census holds; else it is refused.
 */
bool run_is_finished(struct run *r, struct err *e);

/* layers.c */
bool run_measures(const struct run *r);      /* whether the method has something to learn from samples */
bool run_is_calibrated(const struct run *r); /* by an earlier run, or nothing is to be measured */
bool run_calibration(struct run *r, struct err *e);
/* The journal's word on one layer; run_layer_read is its inverse. */
bool run_layer_read(struct run *r, const struct journal_record *record, struct err *e);

/* tensors.c */
/* What packing takes that learnt nothing from samples; NULL: the nearest values. */
const struct curvature *run_plain(const struct run *r);
/* max |w| of the matrices that share one scale with this one. */
bool run_absmax(struct run *r, float *out, size_t index, struct err *e);
bool run_prepare_packing(struct run *r, struct err *e);
uint64_t run_piece_bytes(const struct plan *p); /* of the largest piece's codes, at most */
/* Packs a matrix of the plan; its scales are r->scales until the next. */
bool run_pack(struct run *r, struct packed *out, size_t index, const struct curvature *c,
              const struct outlet *to, struct err *e);
/* All tensors behind what shards_offset says is there. */
bool run_write_tensors(struct run *r, struct err *e);
uint64_t run_matrix_bytes(const struct matrix *m); /* of the source */
#endif
