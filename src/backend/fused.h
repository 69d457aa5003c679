/* The fused runs of ops.h as the operations they stand for, one after the other. */
#ifndef BACKEND_FUSED_H
#define BACKEND_FUSED_H
#include "backend/ops.h"
/* weights_create by weight_create. */
bool fused_weights(const struct ops *op, struct queue *q, struct weight **out,
                   const struct weight_source *src, int n, int *failed, struct err *e);
void fused_draw_product(const struct ops *op, struct queue *q, int32_t *out, struct mat y, struct mat x,
                        const struct weight *w, const uint32_t *allowed, const struct draw *draws);
void fused_norm_products(const struct ops *op, struct queue *q, const struct norm_products *r);
void fused_delta(const struct ops *op, struct queue *q, const struct delta_run *r,
                 const struct step_rows *rows);
void fused_attention(const struct ops *op, struct queue *q, const struct attention_run *r,
                     const struct step_rows *rows);
void fused_moe(const struct ops *op, struct queue *q, const struct moe_run *r);
void fused_observe(const struct ops *op, struct queue *q, const struct observation *o, struct mat x,
                   const struct experts *experts);
#endif
