/* Packed matrices between the layer that made them and their turn in the output: a file in the work folder.
 */
#ifndef QUANTIZE_SPOOL_H
#define QUANTIZE_SPOOL_H
#include "base/err.h"
#include "quantize/results.h"
#include <stddef.h>
#include <stdint.h>

/* One matrix: its codes, then its scales. Journaled as it is. */
struct spooled {
    uint64_t index; /* matrix of the plan */
    uint64_t at, codes_bytes, scales_bytes;
    struct matrix_result result;
};

struct spool {
    int fd; /* -1: none */
    char *path;
    uint64_t end;          /* bytes written */
    struct spooled *items; /* in the order in which they were put */
    size_t n_items;
    size_t *of; /* [n] by matrix of the plan: 1 + its item, 0: none */
};

/* n: matrices of the plan. Keeps what the file has. */
bool spool_init(struct spool *s, const char *folder, size_t n, struct err *e);
void spool_deinit(struct spool *s); /* accepts one of fd -1; the file stays */

bool spool_append(struct spool *s, const void *data, uint64_t bytes, struct err *e);
/* A matrix whose bytes are there: appended last, or by an earlier run. */
void spool_add(struct spool *s, const struct spooled *item);
bool spool_sync(struct spool *s, struct err *e);
/* After the items of an earlier run, which had synced them, were added: cuts off what follows them. */
bool spool_resume(struct spool *s, struct err *e);

const struct spooled *spool_find(const struct spool *s, size_t index); /* NULL: not there */
bool spool_read(const struct spool *s, void *to, uint64_t bytes, uint64_t at, struct err *e);
#endif
