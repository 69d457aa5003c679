/* What the vision tower made of pictures, kept for when they come again: at another place, in another
 * conversation, where the prefix cache knows nothing. The tower sees one picture at a time and nothing of the
 * step around it, so the rows kept have the bits that it would make again. The least recently used are given
 * up first. Of the scheduler's thread, but for encoder_key. */
#ifndef ENGINE_ENCODER_CACHE_H
#define ENGINE_ENCODER_CACHE_H
#include "engine/cuts.h"
#include "engine/picture.h"

struct encoder_cache;
/* bytes: of the rows kept; 0: none are. */
bool encoder_cache_create(struct encoder_cache **out, uint64_t bytes, struct err *e);
void encoder_cache_free(struct encoder_cache *c); /* NULL is fine */
void encoder_cache_clear(struct encoder_cache *c);

/* SHA-256 over all that goes into the tower, the digest of the patches and their grid, and the salt: nobody
 * learns from the time of an answer what pictures others show. Any thread. ERR_MEMORY. */
bool encoder_key(uint8_t out[32], const uint8_t salt[32], const struct cut_picture *p, struct err *e);

/* Gives p, whose rows are NULL, those kept. False: there are none. */
bool encoder_cache_find(struct encoder_cache *c, const uint8_t key[32], struct picture *p);
/* Keeps p's rows, which stay p's too, unless all the room there is is too little for them. */
void encoder_cache_add(struct encoder_cache *c, const uint8_t key[32], const struct picture *p);

struct encoder_stats {
    int64_t queries, hits; /* pictures looked for, found */
    uint64_t bytes;        /* kept now */
};
struct encoder_stats encoder_cache_stats(const struct encoder_cache *c);
#endif
