/* The folder a run writes: everything goes to DST.quench-partial beside it, which takes the name DST in the
 * last step. Whatever happens before, DST does not exist. */
#ifndef QUANTIZE_DESTINATION_H
#define QUANTIZE_DESTINATION_H
#include "base/err.h"
#include "base/report.h"
#include <stdint.h>

struct destination {
    char *path, *partial, *parent;
    int lock; /* the partial folder, held with flock: a second run must not take it for a leftover. -1: none
               */
};

/* Checks the names: DST must not exist, nor lie inside the source, and its parent must be a folder. Touches
 * nothing. */
bool destination_init(struct destination *d, const char *path, const char *source, struct err *e);
/* Makes the partial folder; an interrupted run's is removed first, with a warning. bytes: what will be
 * written, checked against what the file system has free. */
bool destination_create(struct destination *d, uint64_t bytes, const struct report *report, struct err *e);
/* Copies every regular file of the source that a run does not write itself; its README.md becomes
 * README.source.md. */
bool destination_copy_files(const struct destination *d, const char *source, const struct report *report,
                            struct err *e);
/* Gives the partial folder its final name. Only warns when the name may not survive a power cut: the data do.
 */
bool destination_commit(struct destination *d, const struct report *report, struct err *e);
/* Removes the partial folder if there is one; warns where it cannot. */
void destination_deinit(struct destination *d, const struct report *report);
#endif
