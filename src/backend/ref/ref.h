/* The reference backend: every operation as its definition says, one thread, sums in double. The others are
 * tested against it (tests/backend/test_kernels.c); it also runs whole models, slowly. */
#ifndef BACKEND_REF_H
#define BACKEND_REF_H
#include "backend/ops.h"
extern const struct ops ref_ops;
bool ref_queue_create(struct queue **out, bool rounded, struct err *e);
void ref_queue_free(struct queue *q);
#endif
