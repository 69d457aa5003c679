/* What the files of the CPU backend's driver share. */
#ifndef BACKEND_CPU_PARTS_H
#define BACKEND_CPU_PARTS_H
#include "backend/cpu/cpu.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/slab.h"
#include "backend/rounding.h"
#include "base/pool.h"
#include <string.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

enum { DECODE_COLUMNS = 256 }; /* of a panel at a time: 16 KiB of f32, half of the first cache */

/* Scratch of one thread. */
struct cpu_thread {
    float *panel;     /* [DECODE_COLUMNS][16] */
    float *sums;      /* [PANELS_MAX][rows][16], twice: gate and up */
    float *scores;    /* [ATTEND_HEADS_MAX][tokens of a part] */
    float *attended;  /* [ATTEND_PARTS_MAX][ATTEND_HEADS_MAX][head_dim + 2] */
    float *work;      /* of delta_chunk */
    float *quantized; /* one row of inputs */
};

struct queue {
    struct pool *pool;
    const struct cpu_kernels *k;
    bool rounded; /* see backend_options */
    struct cpu_slab *slab;
    struct step_limits limits;
    struct cpu_thread *threads;
    float *memory;      /* holds all below and the threads' scratch */
    int64_t words_most; /* of a row of inputs */
    uint32_t
        *rounded_rows; /* inputs of a product as words: words_most for each row, or pick of the experts */
    uint32_t *packed;  /* the same in blocks */
    float *row_scale;  /* of quantized inputs, [rows * picks] */
    float *hidden;     /* [rows * picks][intermediate] */
    float *outputs;    /* [rows * picks][cols] */
    float *attended;   /* [ROWS_EXACT][ATTEND_PARTS_MAX][heads][head_dim + 2] */
    int64_t *order;    /* [rows * picks] pick numbers grouped by expert */
    int64_t *begin;    /* [n_experts + 1] into order */
    int32_t *active;   /* [n_experts] experts with rows */
};

/* Inputs of a product in blocks of rows (cpu_block_rows). Block at row r begins at r * words_each. */
struct packed {
    const uint32_t *words;
    const float *row_scale; /* INPUT_FP8_ROW: per row; else NULL: 1 */
    enum input_form form;
    int64_t rows, words_each;
    bool wide; /* not in blocks: rows one after the other */
};

/* n rows come in runs of at most block_rows, packed by one thread each. Where kernels take any number of rows
 * the runs are as even as can be, and a run is a block; of f32 words only powers of two are. */
static inline int64_t cpu_runs(const struct cpu_kernels *k, int64_t n)
{
    return (n + k->block_rows - 1) / k->block_rows;
}

static inline int64_t cpu_run_begin(const struct cpu_kernels *k, enum input_form form, int64_t n, int64_t run)
{
    int64_t runs = cpu_runs(k, n), longer = n % runs;
    if (form == FORM_F32) return run * k->block_rows < n ? run * k->block_rows : n;
    return run * (n / runs) + (run < longer ? run : longer);
}

/* Rows of the block that begins at row r of n. */
static inline int cpu_block_rows(const struct cpu_kernels *k, enum input_form form, int64_t n, int64_t r)
{
    int64_t runs = cpu_runs(k, n), each = n / runs;
    if (form != FORM_F32) return (int)(each + (r < n % runs * (each + 1)));
    int rows = k->block_rows;
    while (rows > n - r) rows /= 2;
    return rows;
}

/* n of a step's rows meet a weight in words of this form: whether that is a matter for cpu_wide. */
static inline bool cpu_is_wide(const struct cpu_kernels *k, enum input_form form, int64_t step_rows,
                               int64_t n)
{
    if (step_rows <= ROWS_EXACT) return false;
    return form == FORM_INT8 ? k->wide_int8 != NULL : form == FORM_BF16 && k->wide_bf16 && n >= 4;
}

/* Panels of an item: with few rows several are in flight, with many one keeps a core busy. */
static inline int cpu_panels_each(int64_t rows)
{
    return rows < 8 ? PANELS_MAX : 1;
}

/* The form of this weight's inputs with the kernels at hand, the words of a row in it, and a row written in
 * it (out: that many words; scratch: [cols]); returns the row's scale. */
enum input_form cpu_form(const struct queue *q, const struct weight *w);
int64_t cpu_words(enum input_form form, const struct weight *w);
float cpu_write_row(struct queue *q, const struct weight *w, enum input_form form, uint32_t *out,
                    const float *x, float *scratch);
/* Words from one row to the next: rows that a kernel reads side by side are an odd number of cache lines
 * apart and so in all sets of the first cache. */
static inline int64_t cpu_words_apart(int64_t words, bool is_wide)
{
    return is_wide && words >= 64 ? ((words + 15) / 16 | 1) * 16 : words;
}
/* sums[p][i][0..16) = x_i . rows of panel `panel` + p, scaled. */
void cpu_panels_product(struct queue *q, struct cpu_thread *t, float *sums, const struct packed *in,
                        const struct cpu_weight *w, int64_t panel, int panels);
/* The same of wide inputs for panel `panel` of two weights. */
void cpu_pair_product(struct queue *q, float *a_sums, float *b_sums, const struct packed *in,
                      const struct cpu_weight *a, const struct cpu_weight *b, int64_t panel);

/* Tokens of each part of a context that attention works through part by part: whole pages, a function of the
 * context alone, so that a row has the same bits however parts are spread over threads. */
static inline int64_t cpu_attend_part(int64_t context)
{
    const int64_t least = 512, each = (context + ATTEND_PARTS_MAX - 1) / ATTEND_PARTS_MAX;
    return each > least ? (each + KV_PAGE - 1) / KV_PAGE * KV_PAGE : least;
}

/* pool_run of n light items that touch so many floats each: few are cheaper on the calling thread than a
 * wake-up. */
static inline void cpu_run_rows(struct queue *q, int64_t n, int64_t floats_each,
                                void (*body)(void *, int64_t, int), void *ctx)
{
    if (n * floats_each > 16384) {
        pool_run(q->pool, n, body, ctx);
        return;
    }
    for (int64_t i = 0; i < n; i++) body(ctx, i, 0);
}

/* n <= 16 results of a panel; a whole one without a call of memcpy. */
static inline void cpu_keep(float *to, const float *sums, int64_t n)
{
    if (n == PANEL)
        memcpy(to, sums, PANEL * sizeof *to);
    else
        memcpy(to, sums, (size_t)n * sizeof *to);
}

/* The same past the caches, for what is read so late that it would have left them: a line that is written
 * whole need not be read before. Then cpu_kept, before another thread reads. to: 16-byte aligned. */
static inline void cpu_keep_away(float *to, const float *sums)
{
#if defined(__SSE__)
    for (int i = 0; i < PANEL; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(sums + i));
#else
    memcpy(to, sums, PANEL * sizeof *to);
#endif
}

static inline void cpu_kept(void)
{
#if defined(__SSE__)
    _mm_sfence();
#endif
}

bool cpu_weight_create(struct queue *q, struct weight **out, const struct weight_source *src, struct err *e);
void cpu_weight_free(struct queue *q, struct weight *w);

void cpu_embed(struct queue *q, struct mat y, const struct weight *table, const struct step_rows *rows);
double cpu_product_speed(struct queue *q, enum weight_format f);
/* Several matrices times the same rows, which are written once for all that take them alike. */
void cpu_products(struct queue *q, int n, const struct mat *y, struct mat x, const struct weight *const *w);
void cpu_matmul(struct queue *q, struct mat y, struct mat x, const struct weight *w);
void cpu_add(struct queue *q, struct mat y, struct mat x);
void cpu_rmsnorm(struct queue *q, struct mat y, struct mat x, const float *gain, float eps);
void cpu_gather(struct queue *q, struct mat y, struct mat x, const int64_t *index);
void cpu_silu_mul(struct queue *q, struct mat y, struct mat gate, struct mat up);
void cpu_add_gated(struct queue *q, struct mat y, struct mat x, struct mat gate);
void cpu_norm_rope(struct queue *q, struct mat x, int n_heads, int head_stride, int head_dim,
                   const float *gain, float eps, const struct rope *rope, const struct step_rows *rows);
void cpu_kv_append(struct queue *q, const struct kv_cache *kv, struct mat k, struct mat v,
                   const struct step_rows *rows);
void cpu_attention(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                   const struct step_rows *rows);
void cpu_conv(struct queue *q, struct mat y, struct mat u, const float *weight,
              const struct delta_state *state, const struct delta_shape *shape, const struct step_rows *rows);
void cpu_delta(struct queue *q, struct mat o, struct mat qkv, struct mat a, struct mat b, const float *A_log,
               const float *dt_bias, const struct delta_state *state, const struct delta_shape *shape,
               const struct step_rows *rows);
void cpu_gated_norm(struct queue *q, struct mat y, struct mat x, struct mat z, const float *gain, int dim,
                    float eps);
void cpu_layer_norm(struct queue *q, struct mat y, struct mat x, const float *gain, const float *bias,
                    float eps);
void cpu_add_bias(struct queue *q, struct mat y, const float *bias, enum activation f);
void cpu_rotate(struct queue *q, struct mat x, int n_heads, struct mat angle);
void cpu_attention_all(struct queue *q, struct mat y, struct mat qkv, int n_heads);
void cpu_route(struct queue *q, const struct picks *picks, struct mat logits);
void cpu_experts(struct queue *q, struct mat y, struct mat x, const struct picks *picks,
                 const struct experts *experts);
void cpu_moments(struct queue *q, float *h, struct mat x);
void cpu_log_softmax(struct queue *q, struct mat x);
void cpu_divergence(struct queue *q, double *out, struct mat p, struct mat other);
void cpu_draw(struct queue *q, int32_t *out, struct mat x, const uint32_t *allowed, const struct draw *draws);
#endif
