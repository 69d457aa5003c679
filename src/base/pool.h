/* A fixed set of threads that run one loop at a time. The caller takes part; workers sleep between loops. */
#ifndef BASE_POOL_H
#define BASE_POOL_H
#include "base/err.h"
#include <stdint.h>

struct pool;
bool pool_create(struct pool **out, int n_threads, struct err *e); /* n_threads >= 1, the caller included */
void pool_free(struct pool *p);
int pool_threads(const struct pool *p);
/* The machine's share of this process: affinity and the container's CPU quota, at least 1. */
int pool_default_threads(void);
/* Processors that a container's control group leaves its threads, rounded up; 0: no limit. cgroups: where the
 * groups are mounted; version 2 (cpu.max), else 1 (cpu/cpu.cfs_quota_us). */
int pool_quota(const char *cgroups);

/* Runs body(ctx, item, thread) for every item in [0, n_items), each once, in any order, thread in [0,
 * n_threads); returns when all are done. Not to be called from a body. */
void pool_run(struct pool *p, int64_t n_items, void (*body)(void *ctx, int64_t item, int thread), void *ctx);
#endif
