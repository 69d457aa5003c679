/* Output on a thread of its own: bytes pass through a ring of bounded size from those who pack to the shards,
 * so that computing does not wait for the disk until the ring is full. Now and then the thread syncs the
 * shards and puts into the journal how far they are good, with the results of the matrices up to there.
 * All calls but the thread's own come from one thread. A failure shows in the next call. */
#ifndef QUANTIZE_WRITER_H
#define QUANTIZE_WRITER_H
#include "quantize/journal.h"
#include "quantize/results.h"
#include "quantize/shards.h"

struct writer;

/* What a JOURNAL_DATA record holds: this, then n of the other. */
struct writer_record {
    uint64_t offset, n; /* shards_offset; results */
};
struct writer_result {
    uint64_t index; /* matrix of the plan */
    struct matrix_result result;
};

/* shards, journal: borrowed until writer_finish or writer_free. room: bytes of the largest writer_room.
 * sync_bytes: output between two records. */
bool writer_create(struct writer **out, struct shards *shards, struct journal *journal, uint64_t room,
                   uint64_t sync_bytes, struct err *e);
uint64_t writer_memory(uint64_t room); /* bytes that a writer takes */
/* Memory to fill; waits for it. Valid until writer_put. */
void *writer_room(struct writer *w, uint64_t bytes, struct err *e);
/* The first bytes of the last writer_room, of one tensor or several; written in the order of the calls. */
bool writer_put(struct writer *w, uint64_t bytes, struct err *e);
bool writer_put_copy(struct writer *w, const void *data, uint64_t bytes, struct err *e); /* room and put */
/* Bytes of a mapped file, written from there; their pages are then released. */
bool writer_put_mapped(struct writer *w, const uint8_t *data, uint64_t bytes, struct err *e);
/* The result of matrix `index`, whose last bytes were put. */
bool writer_add(struct writer *w, uint64_t index, const struct matrix_result *result, struct err *e);
/* A run may continue here: what was put is whole matrices, and their results were added. */
bool writer_mark(struct writer *w, struct err *e);
/* Waits until all is written, synced and journaled. Call writer_free in any case. */
bool writer_finish(struct writer *w, struct err *e);
void writer_free(struct writer *w); /* drops what is not written yet; NULL is fine */
#endif
