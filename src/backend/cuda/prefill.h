/* Operations on more than ROWS_EXACT rows, or on those of prompts (step_rows). Inputs of products are rounded
 * to BF16 where the queue may round (backend_options.rounded), else they are f32; inputs that weights want in
 * E4M3 are that. Launchers that return bool have done nothing where they return false: the shapes are not
 * theirs. */
#ifndef BACKEND_CUDA_PREFILL_H
#define BACKEND_CUDA_PREFILL_H
#ifdef __cplusplus
extern "C" {
#endif
#include "backend/cuda/parts.h"

enum { EXACT_PARTS = 3 }; /* BF16 numbers that an f32 one is the sum of */

/* dense.cu: y = x W for each of n weights. x as it is; or SiLU(x) up (up.data NULL: no); or normed (gain
 * NULL: no), as a whole, or by heads of `head` columns times SiLU(up). What the products read is left in h
 * (data NULL: nowhere). add: += the first result (data NULL: nothing); lean: which need not be in out. */
struct cuda_products {
    struct mat x, up, h, add;
    const float *gain;
    float eps;
    int head;          /* 0: none */
    bool lean, narrow; /* narrow: x holds BF16, in the first half of each row's bytes */
    bool unread;       /* h is but a name for what lies in prefill.inputs */
    bool choice;       /* the first product, and what goes by it, may come beside the others: queue_fork */
    int n;
    struct mat out[NORM_PRODUCTS_MAX];
    struct cuda_matrix m[NORM_PRODUCTS_MAX];
};
bool cuda_dense(struct queue *q, const struct cuda_products *p);
/* Whether it will. */
bool cuda_dense_takes(const struct queue *q, const struct cuda_products *p);
/* x's rows (or, with up, SiLU(x) up) as BF16, in order of tile.cuh; E4M3 with one scale a row if quantized.
 */
void cuda_dense_inputs(struct queue *q, void *to, float *scale, struct mat x, struct mat up, bool quantized,
                       int parts);
/* grouped.cu. run: NULL, or the whole block. */
bool cuda_grouped(struct queue *q, struct mat y, struct mat x, const struct picks *p,
                  const struct cuda_experts *e, const struct moe_run *run);
/* Whether it takes the block and reads what a norm has left in prefill.inputs. */
bool cuda_grouped_knows(const struct queue *q, const struct moe_run *run);
/* grouped_wide.cu: the experts' products, from prefill.inputs to prefill.down in BF16, where shapes and
 * formats are its own. */
bool cuda_grouped_wide(struct queue *q, const struct cuda_experts *e, const struct picks *p, int64_t rows);
/* Where the choice was made: puts the picks of `rows` rows in the order of their experts: slot_row, slot_of,
 * and tiles of at most `most`. */
void cuda_sort_picks(struct queue *q, const struct picks *p, int64_t rows, int most);
/* y = what the picks gave (f32 in prefill.down, by slot), weighted, in their order. */
void cuda_sum_picks(struct queue *q, struct mat y, const struct picks *p);
/* scan.cu: conv and delta of the run. narrow: raw becomes BF16, in the first half of each row's bytes.
 * Rounds, like cuda_flash: not for a queue that must not. */
bool cuda_scan(struct queue *q, const struct delta_run *r, const struct step_rows *rows, bool narrow);
/* flash.cu */
bool cuda_flash(struct queue *q, struct mat y, struct mat qg, int n_heads, const struct kv_cache *kv,
                const struct step_rows *rows);
/* prefill.c: the fused runs of ops.h for any number of rows, or, returning bool, for many. */
bool cuda_norm_products_many(struct queue *q, const struct norm_products *r);
void cuda_delta_many(struct queue *q, const struct delta_run *r, const struct step_rows *rows);
void cuda_attention_many(struct queue *q, const struct attention_run *r, const struct step_rows *rows);
bool cuda_moe_many(struct queue *q, const struct moe_run *r);
#ifdef __cplusplus
}
#endif
#endif
