/* The operations a forward pass is made of. One table per backend; `ref` (backend/ref) is the meaning of
 * every entry and what the others are tested against. Activations are f32 matrices in the backend's memory,
 * row per token.
 *
 * Operations return nothing and allocate nothing: weights, memory and room for a step's size were taken
 * before the first one. A queue runs them in order. What a device refuses is kept by the queue, which skips
 * what follows and hands its first failure to wait(). So the forward pass reads plainly.
 *
 * Every operation computes a row from that row and its own sequence only, in an order of additions that does
 * not depend on the other rows of the step: the same row has the same bits alone and in a batch, in steps of
 * up to ROWS_EXACT rows and in those of prompts (step_rows). A prompt's spans are to begin at multiples of
 * DELTA_CHUNK rows from where its last one of another length ended: the DeltaNet scan may go by chunks. */
#ifndef BACKEND_OPS_H
#define BACKEND_OPS_H
#include "base/err.h"
#include "num/draw.h"
#include "num/dtype.h"
#include <stdbool.h>
#include <stdint.h>

enum { ROWS_EXACT = 32, DELTA_CHUNK = 64, KV_PAGE = 64, CONV_KERNEL_MAX = 64, NORM_PRODUCTS_MAX = 4 };

struct queue; /* a backend's order of work */

struct mat {
    float *data; /* element (r, c) at data[r * stride + c] */
    int64_t rows, cols, stride;
};
static inline struct mat mat_of(float *data, int64_t rows, int64_t cols)
{
    return (struct mat){ data, rows, cols, cols };
}

/* Weights. */

enum weight_format { WEIGHT_BF16, WEIGHT_F16, WEIGHT_F32, WEIGHT_FP8, WEIGHT_NVFP4, WEIGHT_FP8_BLOCK };
enum { WEIGHT_FORMATS = WEIGHT_FP8_BLOCK + 1 };

/* What becomes of a product's inputs before they meet the weights. */
enum weight_input {
    INPUT_AS_IS,
    INPUT_FP8_ROW,    /* of FP8 weights: e4m3 with one scale a row, fp8_quantize_activations (W8A8) */
    INPUT_FP8_FIXED,  /* ... with one scale for all, fp8_round_fixed */
    INPUT_FP8_GROUPS, /* of FP8_BLOCK weights: e4m3 with one scale per row and 128 columns, fp8_round_groups
                       */
    INPUT_NVFP4,      /* of NVFP4 weights: e2m1 in groups of 16, nvfp4_quantize_activations (W4A4) */
};

/* A matrix as a checkpoint stores it, in host memory. The backend copies or lays it out anew, but for a
 * table. */
struct weight_source {
    enum weight_format format;
    int64_t rows, cols; /* rows = outputs, cols = inputs */
    const void *data;   /* row-major: elements, or E2M1 codes two a byte (num/nvfp4.h); may be unaligned */
    const void *scale;  /* FP8: f32 [rows]. FP8_BLOCK: f32 [rows / 128][cols / 128], rounded up. NVFP4: e4m3
                           [rows][cols / 16]. Else NULL */
    float global;       /* NVFP4: divides the scales; else unused */
    enum weight_input input;
    float input_global; /* INPUT_NVFP4: the inputs' global scale, > 0; INPUT_FP8_FIXED: their scale; else
                           unused */
    bool is_table;      /* only read row by row (embeddings): `data` stays borrowed where it is */
};

/* What every backend's weight begins with. */
struct weight {
    enum weight_format format;
    int64_t rows, cols;
    enum weight_input input;
    float input_global;
    bool is_table;
    uint64_t coarse_bytes; /* of its coarse copy; 0: none */
};

/* Whether draw_product of such rows takes w's coarse copy. */
enum { COARSE_ROWS = 8, COARSE_TOP_K = 64 };
static inline bool draws_coarse(const struct weight *w, int64_t rows, const struct draw *draws)
{
    bool all = w->coarse_bytes > 0 && rows <= COARSE_ROWS;
    for (int64_t i = 0; all && i < rows; i++)
        all = draws[i].scale == 0 || (draws[i].top_k > 0 && draws[i].top_k <= COARSE_TOP_K);
    return all;
}

/* The routed experts of one layer. gate, up: [intermediate x hidden]; down: [hidden x intermediate]. */
struct experts {
    int n_experts;
    struct weight **gate, **up, **down; /* [n_experts] each */
    void *bound;                        /* the backend's, see experts_bind */
};

/* The rows of a step. */

struct row {
    int32_t token;          /* index into the embedding table; unused when embedding is set */
    int32_t position[3];    /* time, height, width; equal for text */
    const float *embedding; /* host, [hidden]; NULL: look the token up */
};

/* Consecutive rows of one sequence, in order. Row i of the span is the sequence's token number past + i.
 *
 * Rows that may have to be taken back are logged, after one that is certain to stay: they see each other as
 * ever, and what the sequence has kept of them becomes known with the slot's next span, which says how many
 * of the logged rows stay, from the first and at least that one. The recurrent and convolution state then is,
 * operation for operation, as if just these had never been logged: same bits. In between the state is the
 * backend's, in part in the slot's log. KV is taken back by `past` alone. */
struct span {
    int64_t first, n; /* rows [first, first + n) of the step */
    int64_t past;     /* tokens of the sequence before this step */
    const int32_t
        *pages;   /* KV pages of the sequence: token t lives in pages[t / KV_PAGE], line t % KV_PAGE */
    int32_t slot; /* its recurrent and convolution state */
    int32_t kept; /* rows of the slot's last span that stay, where it was logged; else 0 */
    bool logged;  /* n is at most the state's log_rows */
};

struct step_rows {
    const struct row *rows;
    int64_t n;
    const struct span *spans; /* cover the rows, in order */
    int64_t n_spans;
    bool prompts; /* all are pieces of prompts, to be computed as rows of a long step however few they are:
                     where these are computed otherwise than those of short ones, a row's bits then depend on
                     its own sequence only */
};

/* State of sequences. */

/* FP8: e4m3, scale 1, saturating. INT8: codes that a scale multiplies, one for each token, kv head and side
 * (int8_quantize_row). */
enum kv_dtype { KV_F32, KV_BF16, KV_FP8, KV_INT8 };
enum { KV_DTYPES = KV_INT8 + 1 };

/* Keys (normalised, rotated) and values of one attention layer: [page][line][kv head][head_dim]. Each page of
 * INT8 ends with its scales, f32 [line][kv head]. */
struct kv_cache {
    void *keys, *values;
    enum kv_dtype dtype;
    int n_kv_heads, head_dim;
};

static inline int64_t kv_element_bytes(enum kv_dtype d)
{
    return d == KV_F32 ? 4 : d == KV_BF16 ? 2 : 1;
}
static inline int64_t kv_scale_bytes(enum kv_dtype d)
{
    return d == KV_INT8 ? 4 : 0;
}
/* What one token takes of the keys of a layer, or of its values. */
static inline int64_t kv_line_bytes(enum kv_dtype d, int n_kv_heads, int head_dim)
{
    return n_kv_heads * (head_dim * kv_element_bytes(d) + kv_scale_bytes(d));
}
/* From one page to the next, in elements. */
static inline int64_t kv_page_stride(const struct kv_cache *kv)
{
    return (int64_t)KV_PAGE * kv->n_kv_heads * (kv->head_dim + kv_scale_bytes(kv->dtype));
}
/* side: kv->keys or kv->values, of INT8. */
static inline float *kv_scales(const struct kv_cache *kv, void *side, int32_t page)
{
    int64_t end = (page + (int64_t)1) * kv_page_stride(kv);
    return (float *)(void *)((uint8_t *)side + end) - (int64_t)KV_PAGE * kv->n_kv_heads;
}

/* Of one DeltaNet layer. matrix: [slot][value head][key dim][value dim]. conv: [slot][kernel - 1][channels],
 * the raw projections of the last tokens, oldest first. Zero at the start of a sequence. log:
 * [slot][log_rows][delta_log_floats], see delta_log_at; NULL and 0 where no span is logged. */
struct delta_state {
    float *matrix, *conv, *log;
    int log_rows;
};

struct delta_shape {
    int key_heads, value_heads, key_dim, value_dim,
        kernel; /* value head j reads key head j / (value / key heads) */
};

/* A row of a log: what `conv` and `delta` need to apply it later. */
struct delta_log {
    float *u;      /* raw projections: [2 * key_heads * key_dim + value_heads * value_dim] */
    float *key;    /* normalised: [key_heads][key_dim] */
    float *update; /* the vectors d: [value_heads][value_dim] */
    float *decay;  /* e^g: [value_heads] */
};
static inline int64_t delta_log_floats(const struct delta_shape *s)
{
    return 3 * (int64_t)s->key_heads * s->key_dim + 2 * (int64_t)s->value_heads * s->value_dim +
           s->value_heads;
}
static inline struct delta_log delta_log_at(const struct delta_state *state, const struct delta_shape *s,
                                            int32_t slot, int64_t row)
{
    int64_t keys = (int64_t)s->key_heads * s->key_dim, values = (int64_t)s->value_heads * s->value_dim;
    float *u = state->log + ((int64_t)slot * state->log_rows + row) * delta_log_floats(s);
    return (struct delta_log){ u, u + 2 * keys + values, u + 3 * keys + values, u + 3 * keys + 2 * values };
}

struct rope {
    int n;                /* frequencies: half the rotated dimensions */
    float scale;          /* of cosine and sine: 1 unless positions are stretched */
    const float *inverse; /* [n] inverse frequency, f32 */
    const uint8_t *axis;  /* [n] which of the three positions */
};

struct picks {
    int32_t *expert; /* [rows][k] */
    float *weight;   /* [rows][k], sums to 1 */
    int k;
};

/* What follows a product with a bias. GELU: x times the normal distribution's integral up to x. GELU_TANH:
 * its usual approximation, x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))). */
enum activation { ACTIVATION_NONE, ACTIVATION_GELU, ACTIVATION_GELU_TANH };

struct step_limits {
    int64_t rows;         /* of a step */
    int64_t cols;         /* widest activation, the vocabulary's logits aside */
    int64_t context;      /* tokens of a sequence */
    int64_t intermediate; /* of a routed expert */
    int picks;            /* experts a token */
    int n_experts;
    int64_t hidden;   /* width of what experts read and give; 0: cols */
    int64_t together; /* rows of attention_all */
};

/* Runs of operations that a backend may do in fewer passes. Each leaves in y, x and the matrices named as
 * results what the plain operations leave that its comment lists, in that order; other matrices it may use
 * up. lean: y, h of a norm and the results but picks are not wanted and may be used up too. fused.h does them
 * one by one. */

struct moe_run;
struct delta_run;

/* rmsnorm(h, x); matmul(out[i], h, w[i]) for each i. reader: the run that comes next, who alone reads h;
 * mixer: the one that alone reads the results (u, z, a, b), which need not be there otherwise. NULL: anybody
 * may. */
struct norm_products {
    struct mat h, x;
    const float *gain;
    float eps;
    int n; /* at most NORM_PRODUCTS_MAX */
    struct mat out[NORM_PRODUCTS_MAX];
    const struct weight *w[NORM_PRODUCTS_MAX];
    bool lean;
    const struct moe_run *reader;
    const struct delta_run *mixer;
};

/* conv(conv, u); delta(raw, conv, a, b); gated_norm(o, raw, z); matmul(y, o, out); add(x, y). Results: o. */
struct delta_run {
    struct mat x, y, u, conv, z, a, b, raw, o;
    const float *conv_weight, *A_log, *dt_bias, *gain;
    float eps;
    const struct weight *out;
    const struct delta_state *state;
    const struct delta_shape *shape;
    bool lean;
};

/* norm_rope(qg); norm_rope(k); kv_append(k, v); attention(att, qg); matmul(y, att, o); add(x, y). Results:
 * att. */
struct attention_run {
    struct mat x, y, qg, k, v, att;
    int n_heads;
    const float *q_gain, *k_gain;
    float eps;
    const struct rope *rope;
    const struct kv_cache *kv;
    const struct weight *o;
    bool lean;
};

/* route(picks, logits); experts(y, h); silu_mul(hidden, gate, up); matmul(shared, hidden);
 * add_gated(y, shared, shared_gate); add(x, y). Results: picks, hidden. */
struct moe_run {
    struct mat x, y, h, logits, gate, up, hidden, shared, shared_gate;
    const struct picks *picks;
    const struct experts *experts;
    const struct weight *w_down;
    bool lean;
};

/* What calibration learns of a layer's experts from a step's rows, all of them from all rows, whoever the
 * router picks. Of every expert e: h = SiLU(gate_e x) * up_e x; absmax(top + e, h); moments(down + e *
 * intermediate^2, h). And moments(block, x). Everything is the backend's memory. */
struct observation {
    uint32_t *top;       /* [n_experts] */
    float *block, *down; /* [hidden][hidden], [n_experts][intermediate][intermediate]; NULL: not wanted */
    struct mat gate, up; /* scratch: columns of as many experts as may be done together, at least one */
};

/* Moments of `count` matrices below one another, as quantize/curvature.h and quantize/gptq.h have them, to
 * the bit, but that the factor lies transposed: R_ji / R_ii at column i > j of row j. Below the diagonal
 * nothing is specified. */
struct factoring {
    float *h; /* [count][n][n]; in place */
    int64_t n, count;
    float *importance; /* [count][n] */
    int32_t *factored; /* [count]; NULL: h stays, importance alone is wanted */
    void *scratch;     /* 8 + 4 n bytes of each matrix, 8-byte aligned */
};

enum expert_matrix { EXPERT_GATE, EXPERT_UP, EXPERT_DOWN };

/* NVFP4 of rows 0, step, 2 step, ... of one matrix of every expert, BF16 as bound: the bytes of
 * quantize/search.h or, where there is a factor, quantize/gptq.h. Everything is the backend's memory. */
struct packing_run {
    const struct experts *experts;
    enum expert_matrix part;
    int64_t rows, step, cols;
    const float *global;     /* [n_experts]: divides the scales */
    bool shared;             /* what follows is one for all experts, else each has its own */
    const float *importance; /* [cols] */
    const float *factor;     /* [cols][cols], struct factoring's; NULL: errors are not passed on */
    const int32_t *factored; /* whether there is a factor */
    const float *held;       /* [cols][cols] moments to judge by, or NULL */
    uint8_t *codes, *scales; /* [n_experts][rows][cols / 2], [n_experts][rows][cols / 16] */
    double *sums;            /* [n_experts][rows][2] squares of W - packed W and of W; judged, the first is
                                the error's square at the output instead: error held error^T */
};

struct ops {
    const char *name;

    /* memory and weights; these may fail and are never called inside a step */
    bool (*weight_create)(struct queue *q, struct weight **out, const struct weight_source *src,
                          struct err *e);
    /* Several at once, which is faster on a GPU where matrices are small. On failure none is made, *failed
     * says whose the error is. */
    bool (*weights_create)(struct queue *q, struct weight **out, const struct weight_source *src, int n,
                           int *failed, struct err *e);
    /* Puts matrices that are read with the same inputs below one another, so that a product of many rows with
     * all of them is one: neighbours of the list whose formats and shapes allow it, where there is room. The
     * first of such has the memory of all, and none is used once it is freed. Changes nothing on a CPU. */
    void (*weights_join)(struct queue *q, struct weight **list, int n);
    /* A copy in fewer bits, by which draw_product tells which rows need not be read: made where there is
     * room, freed with w. Bytes of one; 0: none for such a matrix, and none on a CPU. */
    uint64_t (*coarse_bytes)(struct queue *q, enum weight_format format, int64_t rows, int64_t cols);
    void (*weight_coarsen)(struct queue *q, struct weight *w);
    void (*weight_free)(struct queue *q, struct weight *w); /* NULL is fine */
    bool (*memory_create)(struct queue *q, void **out, uint64_t bytes,
                          struct err *e); /* zeroed, 64-byte aligned */
    void (*memory_free)(struct queue *q, void *memory);
    void (*upload)(struct queue *q, void *to, const void *host, uint64_t bytes);
    void (*download)(struct queue *q, void *host, const void *from,
                     uint64_t bytes); /* done when it returns */
    void (*zero)(struct queue *q, void *memory, uint64_t bytes);
    void (*copy)(struct queue *q, void *to, const void *from, uint64_t bytes); /* within it; no overlap */
    /* Room for what operations need inside. To be called before the first step and whenever a limit grows. */
    bool (*reserve)(struct queue *q, const struct step_limits *limits, struct err *e);
    /* Bytes of the device's memory that this takes for these limits alone; 0: it is the host's. */
    uint64_t (*reserve_bytes)(struct queue *q, const struct step_limits *limits);
    /* To be called once the lists are complete, before the first use; x->bound is the backend's until
     * experts_unbind, which accepts a zeroed one. */
    bool (*experts_bind)(struct queue *q, struct experts *x, struct err *e);
    void (*experts_unbind)(struct queue *q, struct experts *x);
    /* Waits until all that was queued is done. False: an operation failed, which is named; the queue stays
     * failed. download, and operations that write to host memory, wait too. */
    bool (*wait)(struct queue *q, struct err *e);
    /* Bytes a second at which the device reads memory of its own, measured now; 0: it works in the host's. */
    double (*read_speed)(struct queue *q);
    /* Flops a second, two for a weight and row, at which the instruction of products with this format works
     * on registers alone, all threads together, measured now. NULL: not known. */
    double (*product_speed)(struct queue *q, enum weight_format f);

    /* Around the operations of one step that depends on nothing but `rows`, memory, and what `key` stands
     * for: the same key means the same operations on the same memory. True: the backend kept them from an
     * earlier step and has queued them; then nothing is to be called before step_end. */
    bool (*step_begin)(struct queue *q, const void *key, const struct step_rows *rows);
    void (*step_end)(struct queue *q);

    /* y[i] = row's embedding, or row `token` of the table. y: [n, table->cols]. */
    void (*embed)(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *rows);
    /* y[i][r] = sum_c x[i][c] * W[r][c]. x: [n, w->cols]; y: [n, w->rows]; any n >= 0. With
     * INPUT_FP8_ROW: y = s_i * scale_r * sum_c e4m3(x[i][c] / s_i) * W[r][c], s_i as
     * fp8_quantize_activations. With INPUT_FP8_FIXED, INPUT_FP8_GROUPS and INPUT_NVFP4: x is what the
     * function named there makes of it. */
    void (*matmul)(struct queue *q, struct mat y, struct mat x, const struct weight *w);
    void (*add)(struct queue *q, struct mat y, struct mat x); /* y += x */
    /* y = x / sqrt(mean(x^2) + eps) * gain, per row. gain: [cols], already 1 + w where the model says so. */
    void (*rmsnorm)(struct queue *q, struct mat y, struct mat x, const float *gain, float eps);
    /* y[i] = x[index[i]]. index in host memory. */
    void (*gather)(struct queue *q, struct mat y, struct mat x, const int64_t *index);
    /* y = SiLU(gate) * up. y may be gate. */
    void (*silu_mul)(struct queue *q, struct mat y, struct mat gate, struct mat up);
    /* y[i] += sigmoid(gate[i][0]) * x[i]. gate: [n, 1]. */
    void (*add_gated)(struct queue *q, struct mat y, struct mat x, struct mat gate);

    /* In place, for each of n_heads heads at x[i][h * head_stride .. + head_dim): RMS norm with gain
     * [head_dim], then rotation of the pairs (j, j + rope->n) by position[axis[j]] * inverse[j], angle, cos
     * and sin in f32, the latter two times rope->scale. */
    void (*norm_rope)(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim,
                      const float *gain, float eps, const struct rope *rope, const struct step_rows *rows);
    /* Writes the rows' keys and values, [n, kv heads * head_dim], into the cache, rounded to its dtype; not
     * finite ones make the head's row NaN where it is INT8. */
    void (*kv_append)(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                      const struct step_rows *rows);
    /* Causal attention of each row over its sequence, the row included, then the output gate. qg: per head h
     * the query at [h * 2 * head_dim], the gate after it. y[i][h * head_dim + d] = softmax(q.k /
     * sqrt(head_dim)) v * sigmoid(gate). Query head h reads kv head h / (n_heads / n_kv_heads). */
    void (*attention)(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                      const struct step_rows *rows);

    /* Causal depthwise convolution over time, then SiLU: y_t = SiLU(sum_j w[j][c] * u_{t - kernel + 1 +
     * j}[c]). weight: [kernel][channels]. Reads and advances the conv state, or logs (struct span). y is not
     * u. */
    void (*conv)(struct queue *q, struct mat y, struct mat u, const float *weight,
                 const struct delta_state *state, const struct delta_shape *shape,
                 const struct step_rows *rows);
    /* The gated delta rule. qkv: [n, 2 * key_heads * key_dim + value_heads * value_dim] after conv. a, b: [n,
     * value heads]. All three are used up: their contents afterwards are unspecified. log decay g =
     * -exp(A_log) * softplus(a + dt_bias), beta = sigmoid(b); q, k L2-normalised over key_dim, q scaled by
     * key_dim^-1/2. Per value head: S <- e^g S; d = beta (v - S^T k); S <- S + k d^T; o = S^T q. Advances S,
     * or logs (struct span). */
    void (*delta)(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b,
                  const float *A_log, const float *dt_bias, const struct delta_state *state,
                  const struct delta_shape *shape, const struct step_rows *rows);
    /* Per head of `dim` columns: y = x / sqrt(mean(x^2) + eps) * gain * SiLU(z). gain: [dim]. y may be x. */
    void (*gated_norm)(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim,
                       float eps);

    /* What a vision tower needs besides products. Their rows are not bound to a step's limit. */

    /* y = (x - mean) / sqrt(variance + eps) * gain + bias, mean and variance of the row. y may be x. */
    void (*layer_norm)(struct queue *q, struct mat y, struct mat x, const float *gain, const float *bias,
                       float eps);
    /* y[i] = f(y[i] + bias). bias: [cols]. */
    void (*add_bias)(struct queue *q, struct mat y, const float *bias, enum activation f);
    /* In place, for each of n_heads heads at x[i][h * 2 * angle.cols ..]: rotation of the pairs (j, j +
     * angle.cols) by angle[i][j], cos and sin in f32. */
    void (*rotate)(struct queue *q, struct mat x, int n_heads, struct mat angle);
    /* Attention of every row to every row, at most limits.together; qkv.cols <= limits.cols. qkv: [n, 3 *
     * n_heads * dim], queries, keys, values, each head after head. y[i][h * dim + d] = softmax(q.k /
     * sqrt(dim)) v. */
    void (*attention_all)(struct queue *q, struct mat y, struct mat qkv, int n_heads);

    /* Softmax over the logits' columns, the k largest (ties: lower index first), renormalised to sum 1. */
    void (*route)(struct queue *q, const struct picks *picks, struct mat logits);
    /* y[i] = sum_j weight[i][j] * down_e(SiLU(gate_e x[i]) * up_e x[i]), e = expert[i][j], j ascending. */
    void (*experts)(struct queue *q, struct mat y, struct mat x, const struct picks *picks,
                    const struct experts *experts);

    /* *top = the largest of it and |x|, as bits of an f32 without its sign: a NaN is above infinity, so none
     * gets lost. */
    void (*absmax)(struct queue *q, uint32_t *top, struct mat x);
    /* h[i][j] += sum over rows r of x[r][i] * x[r][j], for j >= i at least; what is below is unspecified. h:
     * [x.cols][x.cols]. */
    void (*moments)(struct queue *q, float *h, struct mat x);

    /* In place, per row: x - log(sum e^x), the log-probabilities. */
    void (*log_softmax)(struct queue *q, struct mat x);
    /* out[i] = sum_c e^p[i][c] * (p[i][c] - other[i][c]), both log-probabilities: KL divergence in nats. out:
     * host. */
    void (*divergence)(struct queue *q, double *out, struct mat p, struct mat other);
    /* out[i] = x[i][column[i]]; out[i] = the column of row i's largest, the first of equals. Host memory. */
    void (*pick)(struct queue *q, float *out, struct mat x, const int32_t *column);
    void (*argmax)(struct queue *q, int32_t *out, struct mat x);

    /* Sampling. In place: -inf where bit c % 32 of allowed[c / 32] is clear, in all rows. allowed: host. */
    void (*mask)(struct queue *q, struct mat x, const uint32_t *allowed);
    /* In place, n times edit_apply; no element twice, but where bias is -inf. edits: host memory. */
    void (*edit)(struct queue *q, struct mat x, const struct logit_edit *edits, int64_t n);
    /* out[i] = draw_token(draws[i], row i, allowed). allowed: the backend's memory, or NULL; out and draws:
     * host. */
    void (*draw)(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed,
                 const struct draw *draws);
    /* matmul(y, x, w); draw(out, y, allowed, draws). y may be used up. */
    void (*draw_product)(struct queue *q, int32_t *out, struct mat y, struct mat x, const struct weight *w,
                         const uint32_t *allowed, const struct draw *draws);

    void (*norm_products)(struct queue *q, const struct norm_products *r);
    void (*delta_run)(struct queue *q, const struct delta_run *r, const struct step_rows *rows);
    void (*attention_run)(struct queue *q, const struct attention_run *r, const struct step_rows *rows);
    void (*moe_run)(struct queue *q, const struct moe_run *r);
    void (*observe)(struct queue *q, const struct observation *o, struct mat x,
                    const struct experts *experts);

    /* Quantizing. All three are NULL where the host does it. */
    bool (*packs)(const struct queue *q, int64_t cols); /* whether rows of such matrices fit */
    void (*factor)(struct queue *q, const struct factoring *f);
    void (*pack)(struct queue *q, const struct packing_run *p);
};

/* A backend and its one queue. */
struct backend {
    const struct ops *ops;
    struct queue *queue;
    char name[128];       /* "cpu avx512, 2 threads" */
    bool fp4_activations; /* see backend_options; for who binds weights */
    int64_t step_rows;    /* of a prompt at once, enough to keep it busy */
    bool kv_int8;         /* KV_INT8 is known */
    bool few_differ; /* rows of steps of up to ROWS_EXACT rows are computed otherwise than those of longer
                        ones: step_rows.prompts matters */
    uint64_t memory,
        memory_free; /* bytes of the device's own, in all and when it was opened; 0: the host's */
    /* What ends `queue`, whatever table of operations is used with it meanwhile; NULL: it is another's. */
    void (*queue_free)(struct queue *q);
};

enum device { DEVICE_AUTO, DEVICE_REF, DEVICE_CPU, DEVICE_CUDA }; /* AUTO: a GPU where there is one */
enum cpu_isa {
    CPU_ISA_BEST,
    CPU_ISA_GENERIC,
    CPU_ISA_AVX2,
    CPU_ISA_AVX512,
    CPU_ISA_AVX512BF16, /* with VNNI, BF16 and VBMI */
    CPU_ISA_AMX         /* and tiles of int8 and BF16 */
};                      /* --cpu-mask: at most this one */
struct backend_options {
    enum device device;
    int threads; /* 0: this process's share of the machine */
    enum cpu_isa isa;
    bool rounded; /* inputs of products may be rounded as rounding.h says, on a GPU to BF16 in steps of
                     more than ROWS_EXACT rows; else f32 */
    bool fp4_activations; /* inputs of NVFP4 weights are quantized too (INPUT_NVFP4) */
    bool shared_memory;   /* memory_create's memory is the host's too, after wait(): slow, for tests */
};
bool backend_create(struct backend *b, const struct backend_options *options, struct err *e);
void backend_destroy(struct backend *b); /* accepts a zeroed one */
#endif
