/* The folder a run writes. Beside DST lies DST.quench-partial, the run's own: its journal, its work files
 * and, in a folder named checkpoint, what takes the name DST in the last step. Whatever happens before, DST
 * does not exist. */
#ifndef QUANTIZE_DESTINATION_H
#define QUANTIZE_DESTINATION_H
#include "base/err.h"
#include "base/report.h"
#include <stdint.h>

struct destination {
    char *path, *parent;
    char *work, *partial; /* DST.quench-partial; the checkpoint in it */
    int lock;             /* work, held with flock: one run at a time. -1: not held */
    bool is_renamed;      /* DST has its name; only the work folder is still to be removed */
    bool has_report;      /* there is a DST, with a report to say of which run */
};

/* Checks the names: DST must not exist (but is_renamed and has_report), nor lie inside the source, and its
 * parent must be a folder. Changes nothing, but an empty work folder beside a DST goes: its run was killed
 * between its last two steps. */
bool destination_init(struct destination *d, const char *path, const char *source, struct err *e);
/* Makes the work folder if there is none, and locks it. */
bool destination_lock(struct destination *d, struct err *e);
/* Empties the work folder of what no run can continue, with a warning. The lock stays. */
bool destination_clear(struct destination *d, const struct report *report, struct err *e);
/* Makes the checkpoint's folder if there is none. bytes: what will be in the work folder at most, checked
 * against what is there and what the file system has free. */
bool destination_prepare(struct destination *d, uint64_t bytes, struct err *e);
/* All three, for a run that is never continued. */
bool destination_create(struct destination *d, uint64_t bytes, const struct report *report, struct err *e);
/* Copies every regular file of the source that a run does not write itself; its README.md becomes
 * README.source.md. */
bool destination_copy_files(const struct destination *d, const char *source, const struct report *report,
                            struct err *e);
/* Gives the checkpoint its final name, removes the work folder. Only warns when the
 * name may not survive a power cut: the data do. */
bool destination_commit(struct destination *d, const struct report *report, struct err *e);
/* Removes the work folder, warns where it cannot: after a failure that repeating the command would meet
 * again, or where is_renamed. */
void destination_remove(struct destination *d, const struct report *report);
bool destination_exists(const struct destination *d, struct err *e); /* the error of a DST that is there */
/* Unlocks; leaves files as they are. */
void destination_deinit(struct destination *d);
#endif
