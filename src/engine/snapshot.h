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
/* What a parcel is of, as it is written to files. */
struct parcel_place {
    int64_t length, shift, head_length, n_pages;
    int64_t kept; /* rows of the slot's log */
    uint64_t bytes;
};
/* ERR_MEMORY. The sequence stays as it is. The pages must have been kept (engine_keep) or not be tentative.
 */
bool parcel_pack(struct parcel **out, struct engine *g, int handle, struct err *e);
bool parcel_pack_snapshot(struct parcel **out, struct engine *g, int snapshot, struct err *e);
/* One whose data come from elsewhere, to parcel_room. ERR_MEMORY. */
bool parcel_create(struct parcel **out, const struct parcel_place *place, struct err *e);
void *parcel_room(struct parcel *p);
/* One more who has it, and frees it. Parcels do not change: any thread may read and free them. */
struct parcel *parcel_hold(struct parcel *p);
void parcel_free(struct parcel *p); /* NULL is fine */
const struct parcel_place *parcel_place(const struct parcel *p);
const void *parcel_data(const struct parcel *p);
uint64_t parcel_bytes(const struct parcel *p);
int64_t parcel_pages(const struct parcel *p);
/* Whether it has the form of what is known in g after so many rows of a prompt. */
bool parcel_fits(const struct parcel *p, const struct engine *g, int64_t length);
/* handle: an empty sequence. False, and nothing has happened: too few pages are free. */
bool parcel_unpack(const struct parcel *p, struct engine *g, int handle);
#endif
