/* Where a prompt is cut, by its rows alone: the ends of turns and pictures, and at the latest after so many
 * rows. What comes before a cut is computed in the same pieces whatever comes after it, so a sequence may
 * begin there with what another one knew, and has the bits that it would have had. Cuts are DELTA_CHUNK rows
 * apart at least: a shorter part would take the other form of the delta rule.
 *
 * A cut's key is a SHA-256 over everything that shapes what is known there: the salt, and of each row token,
 * positions and picture (its digest, its size, which row of it), chained from cut to cut. */
#ifndef ENGINE_CUTS_H
#define ENGINE_CUTS_H
#include "engine/picture.h"
#include "engine/prompt.h"

struct cut {
    int64_t at; /* rows before it */
    uint8_t key[32];
};

/* A picture among the rows. */
struct cut_picture {
    int64_t first, height, width;
    uint8_t digest[32];
    bool goes_on; /* with the next pair of a video's frames: no end to cut at */
};

struct cut_rules {
    const int32_t *turn_end; /* the run of tokens after which a turn has ended */
    int n_turn_end;
    int64_t interval; /* rows between cuts at most, a multiple of DELTA_CHUNK */
};

struct cuts {
    struct cut *items;
    int64_t n;
};
/* pictures in the order of their rows. ERR_MEMORY. */
bool cuts_make(struct cuts *out, const struct cut_rules *rules, const struct prompt *prompt,
               const struct cut_picture *pictures, int n_pictures, const uint8_t salt[32], struct err *e);
void cuts_free(struct cuts *c); /* accepts a zeroed one */
/* The first cut after `done` rows, or n. */
int64_t cuts_next(const struct cuts *c, int64_t done, int64_t n);
/* The cut at exactly so many rows, or NULL. */
const struct cut *cuts_at(const struct cuts *c, int64_t rows);

bool cuts_digest(uint8_t out[32], const void *data, uint64_t bytes, struct err *e);
#endif
