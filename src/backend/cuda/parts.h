/* What the C and the CUDA files of this backend share: the queue, the rows of a step in device memory, and
 * the launchers. A launcher takes the queue, never allocates and never waits. */
#ifndef BACKEND_CUDA_PARTS_H
#define BACKEND_CUDA_PARTS_H
#ifdef __cplusplus
extern "C" {
#endif
#include "backend/cuda/cuda.h"
#include <cuda_runtime_api.h>

enum {
    SPLITS = 66,        /* parts of a sequence that attention of few rows looks at side by side */
    GRAPHS = 8,         /* recorded steps kept */
    PICKS_MAX = 64,     /* experts a token */
    EXPERTS_MAX = 1024, /* of a layer */
    HEAD_MAX = 256,     /* widest attention head, longest DeltaNet key */
    KV_HEADS_MAX = 256,
    FP4_UNIT_COLS = 256,
    FP4_UNIT_BYTES = 1152,
};

/* NVFP4 in device memory: tiles of 8 rows by units of 256 columns, padded with zeros. In a unit, 1024 bytes
 * of FP4 words (device.cuh): for each half of 128 columns 16 bytes a lane, lane 4 g + t has of row g the
 * words of columns 32 i + 8 t + 0..7, i = 0..3 (for INPUT_NVFP4 with the first code in the low bits). Then 8
 * scales for each two lanes, of both halves and every i: those of columns 16 (2 i + t / 2) + 0..15.
 *
 * A scale is (8 + m) 2^(e - 13) as 8 e + m, with e from 1 to 18: E4M3 with its small numbers normalised, so
 * that a shift and an addition make BF16 of it. Its sign is in the codes, which are zeros where it is 0. (For
 * INPUT_NVFP4 it stays E4M3, without sign.) */
#ifdef __CUDACC__
#define BOTH_SIDES __host__ __device__
#else
#define BOTH_SIDES
#endif
BOTH_SIDES static inline int64_t fp4_bytes(int64_t rows, int64_t cols)
{
    return (rows + 7) / 8 * ((cols + FP4_UNIT_COLS - 1) / FP4_UNIT_COLS) * FP4_UNIT_BYTES;
}

struct cuda_weight {
    struct weight head;
    void *data;   /* device: as stored, but for NVFP4: see above */
    float *scale; /* device: FP8 [rows], FP8_BLOCK [rows / 128][cols / 128], rounded up */
    float global; /* NVFP4: divides the scales */
    void *coarse; /* device: coarse.cu; NULL: none */
    bool moved;   /* data and scale belong to the struct cuda_experts it is bound to, or a weight it joins */
};

/* One matrix as kernels take it. */
struct cuda_matrix {
    const void *data;
    const float *scale;
    float global, input_global;
    int rows, cols;
    unsigned char format, input;
};

/* The experts of a layer below one another, so that a kernel finds one by its number: three tall matrices,
 * gate, up, down, of n * rows each. */
enum { GATE, UP, DOWN };
struct cuda_experts {
    int n;
    struct cuda_matrix m[3]; /* data and scale of expert 0; rows and cols of one expert */
    float *globals;          /* device: [3][n], what divides NVFP4 scales */
    float *input_globals;    /* device: [3][n] */
};

/* The rows of a step in device memory. Pointers stay the same from step to step. */
struct cuda_row {
    int token, position[3], span, embedding; /* embedding: index into embeddings, -1: none */
};
struct cuda_span {
    int first, n, past, slot, kept, logged;
};
struct cuda_rows {
    const struct cuda_row *rows;
    const struct cuda_span *spans;
    const int *pages; /* of span s from s * pages_each */
    const float *embeddings;
    int n, n_spans, pages_each;
};

/* Scratch of a step of more than ROWS_EXACT rows, and of fp4.cu, device memory. BF16 inputs of products are
 * in the order of tile.cuh. */
struct cuda_prefill {
    void *inputs;    /* BF16 [rows][parts][cols] */
    void *straight;  /* BF16 [rows][cols], columns in their own order; NULL: the queue may not round */
    void *quantized; /* BF16 [rows][cols], E4M3 values */
    void *codes;     /* E4M3 [rows][cols]; NULL: queue.blas is */
    float *scale;    /* [rows * picks] */
    void *hidden;    /* BF16 [rows * picks][parts][intermediate] */
    float *down;   /* [rows * picks][width]: what each pick's expert gives; BF16 where the queue may round */
    int *slot_row; /* [rows * picks]: row of a slot; slots are picks in the order of their experts */
    int *slot_of;  /* [rows * picks]: slot of a pick */
    int *tiles;    /* [0]: how many; from 4 on: expert, first slot, slots, 0 */
    int *counts;   /* [2 * EXPERTS_MAX]: of the picks that are being sorted */
    const float *known; /* the matrix whose rows lie in inputs, where a norm has left them; or NULL */
    int64_t rows, cols, picked, intermediate, width;
};

/* Scratch of steps of several rows (batch.h), device memory. Panels of inputs: batch.cuh. */
struct cuda_batch {
    void *parts, *quantized;               /* of products */
    void *shared_parts, *shared_quantized; /* of the shared expert's second product */
    float *scale, *shared_scale;           /* [rows]: of quantized ones */
    int *chunks;                           /* picks by expert: batch_experts.cu */
    void *hidden;                          /* panels, a chunk after the other */
    float *down;                           /* [rows * picks][width]: what each pick's expert gives */
    float *factor;                         /* [rows * picks]: weight, and what FP4 sums are multiplied by */
    const float *known;                    /* the matrix whose rows lie in parts, or NULL */
    int64_t rows, cols, picked, chunks_most, intermediate, width;
};

/* Scratch of sampling, device memory (draw.cu). */
struct cuda_draw {
    void *state, *draws, *edits, *mask;
    int *answers; /* host memory that the device writes */
    float *least; /* coarse.cu */
    uint64_t state_bytes, draws_bytes, edits_bytes, mask_bytes, answers_bytes;
    bool is_used; /* state has to be cleared */
};

/* Results of products that DeltaNet's kernel, which runs beside them, reads word by word as they are written
 * (ptx.cuh: ABSENT), so that it need not wait until all are. A step's layers take the halves by turns: a
 * layer's DeltaNet makes those words absent that the next layer's products are told in, which the layer
 * before is done with. So the first layer of a step is told nothing. */
struct cuda_told {
    float *words; /* [2][most] */
    int64_t most;
    float *next; /* the half of which `absent` words are ABSENT once what is queued is done; NULL: none */
    int64_t absent;
    bool used; /* by the norm_products before, for u, z, a and b of the delta_run to come */
    struct mat u, z, a, b;
};

/* A recorded step, of the rows of so many spans; logs: queue_logs. */
struct cuda_graph {
    const void *key;
    int64_t rows, spans;
    bool logs;
    cudaGraphExec_t exec;
};

/* Memory that a kernel reads once and nobody soon again: it leaves the second cache before what others left
 * there. */
struct passing {
    const void *from;
    size_t bytes;
};

/* Of two kernels that overlap: device.cuh. */
enum side { ALONE, LEFT, RIGHT };

struct queue {
    cudaStream_t stream, beside; /* where work is put; see queue_fork */
    cudaEvent_t here;            /* a place in one of them */
    bool forked;
    enum side side;         /* of the kernel that was started last */
    struct passing passing; /* of the kernel that is started next */
    size_t passing_most;    /* bytes; 0: the device knows no such memory */
    unsigned cluster;       /* blocks of a cluster of the kernel that is started next; 0: none */
    int sms, shared_max;    /* multiprocessors; bytes of shared memory a block may have */
    bool has_pdl;           /* programmatic dependent launch: compute capability 9.0 and later */
    void *map_maker;        /* of tensor_map.h; NULL: none */
    bool has_wide;          /* kernels for compute capability 9.0a, with its wide instruction */
    bool shared_memory;
    bool rounded; /* steps of more than ROWS_EXACT rows may round inputs of products to BF16 */
    char name[128];
    const char *failed; /* operation that failed first; NULL: none */
    char failure[200];
    struct step_limits limits;
    /* scratch, device memory */
    void *memory;
    float *quantized;   /* [rows * picks][cols]: inputs of products that quantize them */
    float *input_scale; /* [rows * picks] */
    float *hidden;      /* [rows * picks][intermediate] */
    float *attended;    /* [ROWS_EXACT][heads][SPLITS][head_dim + 2] */
    unsigned *arrived;  /* [ROWS_EXACT][KV_HEADS_MAX]: blocks of attention or logged.cu that are done, 0
                           between kernels */
    struct cuda_prefill prefill;
    struct cuda_batch batch;
    struct cuda_draw draw;
    struct cuda_told told;
    struct loader *loader; /* load.c; NULL until something was loaded */
    struct blas *blas;     /* dense BF16 and FP8 products of many rows, where they may round; NULL: ours */
    size_t quantized_bytes;
    long long *index;                     /* [rows] */
    double *answers;                      /* [rows] */
    long long *host_index;                /* [rows], host memory */
    unsigned char *step;                  /* rows, spans, pages of the current step */
    float *embeddings;                    /* [rows][cols]; NULL until a row brings one */
    unsigned char *host_step, *host_next; /* what lies in step; the next one being put together */
    uint64_t step_bytes;
    struct cuda_rows rows;
    const struct step_rows *current; /* between step_begin and step_end: what rows lie in `step` */
    struct cuda_graph graphs[GRAPHS];
    int next_graph;
    struct cuda_graph last; /* key and rows of the last step that could have been recorded */
    bool recording;
    int64_t room; /* bytes at prefill.down */
};

static inline bool queue_failed(const struct queue *q)
{
    return q->failed != NULL;
}
/* Keeps the first failure. True: none. */
bool queue_check(struct queue *q, cudaError_t status, const char *operation);
void queue_refuse(struct queue *q, const char *operation, const char *why);
/* The step's rows in device memory: uploaded if they differ from what lies there. NULL: failed. */
const struct cuda_rows *queue_rows(struct queue *q, const struct step_rows *rows);
/* Whether rows are computed as those of a prompt, and whether as those of a short step. */
static inline bool queue_prompts(const struct queue *q)
{
    return q->current && q->current->prompts;
}
static inline bool queue_few(const struct queue *q, int64_t rows)
{
    return rows <= ROWS_EXACT && !queue_prompts(q);
}
/* From here on there are two streams, until what is queued then waits for both. In between queue_other
 * changes to the other one and back; what they write must not meet, which scratch does. Not within recorded
 * steps. */
void queue_fork(struct queue *q);
void queue_other(struct queue *q);
void queue_join(struct queue *q);
/* Every span is one row, not of a prompt, and no log is written or read. */
bool queue_decodes(const struct step_rows *rows);
bool queue_logs(const struct step_rows *rows);
bool queue_take(struct queue *q, void **out, uint64_t bytes, const char *what,
                struct err *e); /* device memory */
void queue_give(struct queue *q, void *memory);
bool cuda_step_begin(struct queue *q, const void *key, const struct step_rows *rows);
void cuda_step_end(struct queue *q);
void cuda_forget_steps(struct queue *q); /* what was recorded refers to memory that goes away */
bool cuda_reserve(struct queue *q, const struct step_limits *limits, struct err *e);
uint64_t cuda_reserve_bytes(struct queue *q, const struct step_limits *limits);
/* plain.cu: whether this build has kernels for the device */
bool cuda_has_kernels(int *version);

bool cuda_weights_create(struct queue *q, struct weight **out, const struct weight_source *src, int n,
                         int *failed, struct err *e);
bool cuda_weight_create(struct queue *q, struct weight **out, const struct weight_source *src, struct err *e);
void cuda_weights_join(struct queue *q, struct weight **list, int n);
void cuda_weight_free(struct queue *q, struct weight *w);
bool cuda_experts_bind(struct queue *q, struct experts *x, struct err *e);
void cuda_experts_unbind(struct queue *q, struct experts *x);
struct cuda_matrix cuda_matrix_of(const struct weight *w);
/* Whether the streaming kernels take it: whole 16-byte pieces, and a format they decode. */
bool cuda_streams(const struct queue *q, const struct cuda_matrix *m);

/* product.cu. x: [n][cols] */
void cuda_product(struct queue *q, struct mat y, struct mat x, const struct cuda_matrix *m);
void cuda_norm_products(struct queue *q, const struct norm_products *r);
void cuda_delta_out(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows,
                    bool advance_conv);
void cuda_attention_out(struct queue *q, const struct attention_run *r);
/* plain.cu: any format and shape */
void cuda_product_plain(struct queue *q, struct mat y, struct mat x, const struct cuda_matrix *m);
void cuda_experts_plain(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                        const struct cuda_experts *experts);
/* codes [rows][cols / 2], scales [rows][cols / 16] in device memory. straight: words hold the codes in
 * columns' order, as FP4 tensor cores take them, and scales' signs are in the codes; so for INPUT_NVFP4 */
void cuda_lay_fp4(struct queue *q, void *to, const void *codes, const void *scales, int64_t rows,
                  int64_t cols, bool straight);
/* fp4.cu: weights whose inputs are quantized too (INPUT_NVFP4). False: not for these */
bool cuda_fp4_product(struct queue *q, struct mat y, struct mat x, const struct cuda_matrix *m);
bool cuda_fp4_experts(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                      const struct cuda_experts *e);
/* experts.cu. run: NULL, or the whole block with routing, shared expert and residual. False: not for these
 * shapes */
bool cuda_experts_stream(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                         const struct cuda_experts *experts, const struct moe_run *run);
/* experts_fp4.cu: the same, faster, for NVFP4 experts that fit it */
bool cuda_experts_near(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                       const struct cuda_experts *experts, const struct moe_run *run);
/* experts_rows.cu: the same of 2 to ROWS_TOGETHER rows; together: whether it is for them */
enum { ROWS_TOGETHER = 8 };
bool cuda_experts_together(const struct queue *q, const struct moe_run *r);
bool cuda_experts_rows(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                       const struct cuda_experts *e, const struct moe_run *run);
void cuda_route(struct queue *q, const struct picks *picks, struct mat logits);
/* plain.cu: what a kernel that only reads reaches, of 2 GiB, the median of seven; 0: failed */
double cuda_read_speed(struct queue *q);
/* rows.cu */
void cuda_embed(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *rows);
void cuda_add(struct queue *q, struct mat y, struct mat x);
void cuda_rmsnorm(struct queue *q, struct mat y, struct mat x, const float *gain, float eps);
void cuda_gather(struct queue *q, struct mat y, struct mat x, const int64_t *index);
void cuda_silu_mul(struct queue *q, struct mat y, struct mat gate, struct mat up);
void cuda_add_gated(struct queue *q, struct mat y, struct mat x, struct mat gate);
void cuda_gated_norm(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim,
                     float eps);
void cuda_log_softmax(struct queue *q, struct mat x);
void cuda_divergence(struct queue *q, double *out, struct mat p, struct mat other);
void cuda_pick(struct queue *q, float *out, struct mat x, const int32_t *column);
void cuda_argmax(struct queue *q, int32_t *out, struct mat x);
/* calibrate.cu */
void cuda_absmax(struct queue *q, uint32_t *top, struct mat x);
void cuda_moments(struct queue *q, float *h, struct mat x);
void cuda_observe(struct queue *q, const struct observation *o, struct mat x, const struct experts *experts);
/* packing.cu */
bool cuda_packs(const struct queue *q, int64_t cols);
void cuda_factor(struct queue *q, const struct factoring *f);
void cuda_pack(struct queue *q, const struct packing_run *p);
/* draw.cu */
void cuda_draw_sizes(struct cuda_draw *d);           /* sets the bytes that each pointer needs */
bool cuda_draw_begin(struct queue *q, int64_t rows); /* before kernels that answer for rows; false: failed */
void cuda_draw_end(struct queue *q, int32_t *out, int64_t rows); /* waits for the answers alone */
/* In between; after_coarse: rows that have their answer from coarse.cu keep it. */
void cuda_draw_rows(struct queue *q, struct mat x, const uint32_t *allowed, const struct draw *draws,
                    bool after_coarse);
void cuda_mask(struct queue *q, struct mat x, const uint32_t *allowed);
void cuda_edit(struct queue *q, struct mat x, const struct logit_edit *edits, int64_t n);
void cuda_draw(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed,
               const struct draw *draws);
/* coarse.cu. False: not for these */
uint64_t cuda_coarse_bytes(struct queue *q, enum weight_format format, int64_t rows, int64_t cols);
void cuda_weight_coarsen(struct queue *q, struct weight *w);
size_t cuda_coarse_scratch(const struct queue *q); /* bytes of struct cuda_draw's least */
bool cuda_draw_coarse(struct queue *q, int32_t *out, struct mat y, struct mat x, const struct weight *w,
                      const uint32_t *allowed, const struct draw *draws);
/* vision.cu */
void cuda_layer_norm(struct queue *q, struct mat y, struct mat x, const float *gain, const float *bias,
                     float eps);
void cuda_add_bias(struct queue *q, struct mat y, const float *bias, enum activation f);
void cuda_rotate(struct queue *q, struct mat x, int n_heads, struct mat angle);
void cuda_attention_all(struct queue *q, struct mat y, struct mat qkv, int n_heads);
/* attention.cu */
void cuda_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim,
                    const float *gain, float eps, const struct rope *rope, const struct step_rows *rows);
void cuda_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                    const struct step_rows *rows);
void cuda_attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                    const struct step_rows *rows);
/* rows [first, first + n) of the step */
void cuda_attention_some(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                         const struct cuda_rows *rows, int64_t first, int64_t n);
/* norm_rope, kv_append and attention of a step in which every row is a sequence of its own */
void cuda_attention_decode(struct queue *q, const struct attention_run *r, const struct cuda_rows *rows);
/* norm_rope of r->k, which stays as it is, and kv_append */
void cuda_attention_append(struct queue *q, const struct attention_run *r, const struct cuda_rows *rows);
/* of one of up to ROWS_EXACT rows, several of a sequence; r->k stays as it is */
void cuda_attention_rows(struct queue *q, const struct attention_run *r, const struct cuda_rows *rows);
/* delta.cu */
void cuda_conv(struct queue *q, struct mat y, struct mat u, const float *weight,
               const struct delta_state *state, const struct delta_shape *shape,
               const struct step_rows *rows);
void cuda_delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
                const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
                const struct step_rows *rows);
/* conv and delta of such a step; the conv state is left as it was */
void cuda_delta_decode(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows);
/* logged.cu: conv and delta of steps that queue_logs */
void cuda_conv_logged(struct queue *q, struct mat y, struct mat u, const float *weight,
                      const struct delta_state *state, const struct delta_shape *shape,
                      const struct step_rows *rows);
void cuda_delta_logged(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b,
                       const float *A_log, const float *dt_bias, const struct delta_state *state,
                       const struct delta_shape *shape, const struct step_rows *rows);
/* both at once; false: not for these shapes */
bool cuda_delta_run_logged(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows);
/* prefill.c */
struct arena;
void cuda_prefill_layout(struct queue *q, struct arena *a);
#ifdef __cplusplus
}
#endif
#endif
