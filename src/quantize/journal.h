/* What a run has made durable, so that the same command can continue it. A file of records
 * {u32 kind, u32 bytes, payload, u64 digest of the three}, native byte order, appended after the data that
 * they vouch for were synced. A tail that is cut short or damaged anywhere is ignored and cut off. */
#ifndef QUANTIZE_JOURNAL_H
#define QUANTIZE_JOURNAL_H
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

enum journal_kind {
    JOURNAL_HEAD = 1, /* the run's identity (identity.h); always the first record */
    JOURNAL_LAYER,    /* one layer of the calibration (layers.c) */
    JOURNAL_DATA,     /* output up to an offset, and results of the matrices in it (writer.h) */
};

struct journal {
    int fd; /* -1: not open */
    char *path, *text;
    size_t bytes; /* of text that hold whole records, as found when opened */
    uint64_t end; /* of the file */
};

struct journal_record {
    uint32_t kind, bytes;
    const void *data; /* borrow from the journal; unaligned */
};

/* Creates the file or reads what is there. */
bool journal_open(struct journal *j, const char *folder, struct err *e);
void journal_close(struct journal *j); /* accepts one of fd -1 */
/* The record at *at, which moves on to the next; false: no more. Only of those found when opened. */
bool journal_next(const struct journal *j, size_t *at, struct journal_record *record);
/* is_synced: returns only when the record is durable. */
bool journal_append(struct journal *j, uint32_t kind, const void *data, size_t bytes, bool is_synced,
                    struct err *e);
#endif
