/* Packed matrices between the layer that made them and their turn in the output: a file without a name in the
 * folder being written, gone when it is closed. */
#ifndef QUANTIZE_SPOOL_H
#define QUANTIZE_SPOOL_H
#include "quantize/pack.h"

struct spool {
    int fd;                /* -1: none */
    char *path;            /* it had, for messages */
    uint64_t end;          /* bytes written */
    struct spooled *items; /* [n] by matrix of the plan */
};

/* n: matrices of the plan. */
bool spool_init(struct spool *s, const char *folder, size_t n, struct err *e);
void spool_deinit(struct spool *s); /* accepts one of fd -1 */

bool spool_put(struct spool *s, size_t index, const struct packed *packed, struct err *e);
bool spool_has(const struct spool *s, size_t index);
/* Into the packer's buffers, from which `out` borrows. */
bool spool_get(const struct spool *s, struct packed *out, size_t index, struct packer *into, struct err *e);
#endif
