/* What backends share whose memory is the host's and whose operations are done when they return. */
#ifndef BACKEND_HOST_H
#define BACKEND_HOST_H
#include "backend/ops.h"
bool host_memory_create(struct queue *q, void **out, uint64_t bytes, struct err *e);
void host_memory_free(struct queue *q, void *memory);
void host_copy(struct queue *q, void *to, const void *from, uint64_t bytes);
bool host_experts_bind(struct queue *q, struct experts *x, struct err *e);
void host_experts_unbind(struct queue *q, struct experts *x);
void host_weights_join(struct queue *q, struct weight **list, int n);
uint64_t host_coarse_bytes(struct queue *q, enum weight_format format, int64_t rows, int64_t cols);
void host_weight_coarsen(struct queue *q, struct weight *w);
bool host_wait(struct queue *q, struct err *e);
uint64_t host_reserve_bytes(struct queue *q, const struct step_limits *limits);
double host_read_speed(struct queue *q);
bool host_step_begin(struct queue *q, const void *key, const struct step_rows *rows);
void host_step_end(struct queue *q);
void host_pick(struct queue *q, float *out, struct mat x, const int32_t *column);
void host_argmax(struct queue *q, int32_t *out, struct mat x);
void host_mask(struct queue *q, struct mat x, const uint32_t *allowed);
void host_edit(struct queue *q, struct mat x, const struct logit_edit *edits, int64_t n);
void host_absmax(struct queue *q, uint32_t *top, struct mat x);
void host_zero(struct queue *q, void *memory, uint64_t bytes);
#endif
