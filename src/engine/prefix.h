/* What is known at cuts of prompts (cuts.h), kept for prompts that begin alike: snapshots, the least recently
 * used given up first, into host memory where there is room for it. What is new goes to files too where there
 * is a folder for them, when the scheduler has time or must give it up. Of the scheduler's thread. */
#ifndef ENGINE_PREFIX_H
#define ENGINE_PREFIX_H
#include "engine/cuts.h"
#include "engine/disk_cache.h"
#include "engine/snapshot.h"

struct prefix_cache;
/* host_bytes: of parcels kept in host memory besides. disk: NULL, or a borrow. */
bool prefix_create(struct prefix_cache **out, struct engine *g, uint64_t host_bytes, struct disk_cache *disk,
                   struct err *e);
void prefix_free(struct prefix_cache *p);  /* NULL is fine */
void prefix_clear(struct prefix_cache *p); /* all is forgotten, on the disk too */

/* Begins an empty sequence at the last of the cuts before row `end` that is known and for which there are
 * pages. Returns its rows; 0: none, the sequence is empty. */
int64_t prefix_begin(struct prefix_cache *p, int handle, const struct cuts *cuts, int64_t end);
/* Rows of the last of the cuts before row `end` that is known; 0: none. */
int64_t prefix_depth(const struct prefix_cache *p, const struct cuts *cuts, int64_t end);
/* Whether a sequence can begin at this cut for the price of a copy. */
bool prefix_knows(const struct prefix_cache *p, const struct cut *cut);
/* Remembers what the sequence knows, which has come to this cut. */
void prefix_add(struct prefix_cache *p, int handle, const struct cut *cut);
/* Gives up the snapshot used longest ago, so that its pages may become free. False: there is none. */
bool prefix_give_up(struct prefix_cache *p);
/* Hands the snapshot used last that has no file yet to those who write. False: there is none, or no room. */
bool prefix_store(struct prefix_cache *p);
#endif
