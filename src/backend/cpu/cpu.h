/* The CPU backend: kernels for the ISA at hand (kernels.h), driven over a thread pool. */
#ifndef BACKEND_CPU_H
#define BACKEND_CPU_H
#include "backend/ops.h"
extern const struct ops cpu_ops;
bool cpu_queue_create(struct queue **out, const struct backend_options *o, struct err *e);
void cpu_queue_free(struct queue *q);
int cpu_queue_threads(const struct queue *q);
const char *cpu_queue_isa(const struct queue *q);
#endif
