/* Products of more than ROWS_FEW, up to ROWS_BATCH rows with one pass over the weights, for compute
 * capability 9.0a. The functions return false, having done nothing, where shapes or formats are not theirs.
 * Up to ROWS_EXACT rows they give the bits that product.cu and experts.cu do; more take their inputs in BF16,
 * where the queue may round. */
#ifndef BACKEND_CUDA_BATCH_H
#define BACKEND_CUDA_BATCH_H
#ifdef __cplusplus
extern "C" {
#endif
#include "backend/cuda/parts.h"
/* ROWS_FEW: product.cu too reads the weights once for them. Of a chunk of picks of one expert: rows, for up
 * to ROWS_EXACT CHUNK_EXACT, each of several slots; numbers of its entry in the list. */
enum { ROWS_FEW = 4, ROWS_BATCH = 128, CHUNK_SLOTS = 8, CHUNK_EXACT = 2, CHUNK_ENTRY = 2 + CHUNK_SLOTS };
struct arena;
void cuda_batch_layout(struct queue *q, struct arena *a);
/* batch.cu */
bool cuda_batch_product(struct queue *q, struct mat y, struct mat x, const struct cuda_matrix *m);
bool cuda_batch_norm_products(struct queue *q, const struct norm_products *r);
/* What has been done of a DeltaNet layer before its output matrix: not even the convolution's states are
 * moved on; raw is there, and they are; besides, the product's inputs are, in queue.batch.parts, not raw. */
enum delta_done { DELTA_TO_ADVANCE, DELTA_RAW, DELTA_INPUTS };
bool cuda_batch_delta_out(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows,
                          enum delta_done done);
/* Whether it would, with inputs as they are. */
bool cuda_batch_delta_out_takes(struct queue *q, const struct delta_run *r);
bool cuda_batch_attention_out(struct queue *q, const struct attention_run *r);
/* x's rows into queue.batch.parts. */
void cuda_batch_prepare(struct queue *q, struct mat x);
/* The shared expert's second product, and with it the sum of what the picks gave, weighted, and the residual.
 * ask: only say whether it would. */
bool cuda_batch_shared_down(struct queue *q, const struct moe_run *r, bool ask);
/* delta_batch.cu: conv and delta of a step in which every span is a row, on any GPU, and the gated norm where
 * cuda_batch_delta_out takes what it gives; both states are moved on, and what conv gives is normed where it
 * is a query or a key. DELTA_TO_ADVANCE: nothing done. */
enum delta_done cuda_batch_delta(struct queue *q, const struct delta_run *r, const struct cuda_rows *rows);
/* batch_experts.cu */
bool cuda_batch_moe(struct queue *q, const struct moe_run *r);
#ifdef __cplusplus
}
#endif
#endif
