/* What a sequence remembers, set aside: as a snapshot in the backend's memory, from which other sequences
 * begin, or as a parcel in host memory, from which it goes on itself. Either way it goes on with the same
 * bits. Of a snapshot the KV pages are shared; what is not full yet is copied when a sequence begins there.
 */
#ifndef ENGINE_SNAPSHOT_H
#define ENGINE_SNAPSHOT_H
#include "engine/engine.h"

/* Of a sequence whose rows are all there to stay; false: all snapshots are in use. */
bool snapshot_take(struct engine *g, int handle, int *snapshot);
void snapshot_drop(struct engine *g, int snapshot);
int64_t snapshot_length(const struct engine *g, int snapshot);
/* Pages that a sequence takes to begin there. */
int64_t snapshot_pages(const struct engine *g, int snapshot);
/* handle: an empty sequence, which has to have drafts ahead of it only after its next step. False, and
 * nothing has happened: too few pages are free. */
bool snapshot_begin(struct engine *g, int handle, int snapshot);

struct parcel;
/* ERR_MEMORY. The sequence stays as it is. The pages must have been kept (engine_keep) or not be tentative.
 */
bool parcel_pack(struct parcel **out, struct engine *g, int handle, struct err *e);
bool parcel_pack_snapshot(struct parcel **out, struct engine *g, int snapshot, struct err *e);
void parcel_free(struct parcel *p); /* NULL is fine */
uint64_t parcel_bytes(const struct parcel *p);
int64_t parcel_pages(const struct parcel *p);
/* handle: an empty sequence. False, and nothing has happened: too few pages are free. */
bool parcel_unpack(const struct parcel *p, struct engine *g, int handle);
#endif
