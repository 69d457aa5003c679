/* Parcels in files of a folder, for prompts that come again after a restart or after what was known of them
 * had to go from memory. A thread of its own reads and writes; what is below never waits for a disk. Files
 * are complete or not there, whatever happens to the process; each is checked when it is read, and what is
 * damaged, of another model or another version is never used. One process has the folder at a time. */
#ifndef ENGINE_DISK_CACHE_H
#define ENGINE_DISK_CACHE_H
#include "engine/snapshot.h"

struct disk_cache_options {
    const char *folder;   /* made if it is missing */
    uint64_t bytes;       /* of all files; beyond that those used longest ago go */
    uint8_t identity[32]; /* of all that shapes a parcel's bits besides its key: model, program, options */
    void *ctx;
    void (*warn)(void *ctx, const char *text); /* one line; from any thread; may be NULL */
    void *ring_ctx;
    void (*ring)(void *ctx); /* a fetch has ended, or there is room to put again */
};

struct disk_cache;
/* ERR_IO: the folder cannot be made, read or written. ERR_BUSY: another process has it. */
bool disk_cache_create(struct disk_cache **out, const struct disk_cache_options *o, struct err *e);
void disk_cache_free(struct disk_cache *d); /* when all that was put is written; NULL is fine */

/* Bytes of the parcel of this key, in a file or on the way there; 0: none. */
uint64_t disk_cache_has(struct disk_cache *d, const uint8_t key[32]);
/* What reading so many bytes takes by now. */
double disk_cache_seconds(struct disk_cache *d, uint64_t bytes);
bool disk_cache_has_room(struct disk_cache *d); /* for a parcel to be written */
/* Waits for that. For when nothing else is left to be done. */
void disk_cache_await_room(struct disk_cache *d);
/* To be written. Nothing happens where there is one of this key, or no room. The caller keeps its hold. */
void disk_cache_put(struct disk_cache *d, const uint8_t key[32], struct parcel *p);
/* To be read; disk_cache_fetched tells how it ended. False: there is none, or no memory. */
bool disk_cache_fetch(struct disk_cache *d, const uint8_t key[32]);
/* A fetch that has ended: its key, and the caller's parcel; NULL: there is none that could be used. */
bool disk_cache_fetched(struct disk_cache *d, uint8_t key[32], struct parcel **out);
/* Removes all files; what is on its way to one or from one is of no use any more. */
void disk_cache_clear(struct disk_cache *d);
#endif
