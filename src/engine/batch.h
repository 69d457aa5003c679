/* One step of the engine over several requests: the rows of each, then tokens from the logits, posted to
 * them. What goes in is the scheduler's choice; what comes out for a request does not depend on it. */
#ifndef ENGINE_BATCH_H
#define ENGINE_BATCH_H
#include "engine/encoder_cache.h"
#include "engine/request.h"

struct batch;
/* Borrows all. reader: NULL where pictures are refused. seen: what it made of pictures. known: as in
 * scheduler_options. */
bool batch_create(struct batch **out, struct engine *g, struct picture_reader *reader,
                  struct encoder_cache *seen, const uint32_t *known, struct err *e);
void batch_free(struct batch *b); /* NULL is fine */

void batch_clear(struct batch *b);
int64_t batch_rows(const struct batch *b);
/* Drafts, up to `most` of each, ahead of n requests that generate, where their heads are ready for it. */
bool batch_draft(struct batch *b, struct request *const *r, int n, int most, struct err *e);
void batch_add_round(struct batch *b, struct request *r); /* the token sampled last, and its drafts */
/* Rows [done, done + n) of the prompt. False: its pictures could not be read, r has nothing in the step. */
bool batch_add_prompt(struct batch *b, struct request *r, int64_t n, struct err *e);
/* Runs the step and posts what comes of it; requests that are through have is_over then. False: the backend
 * has failed. */
bool batch_run(struct batch *b, struct scheduler_stats *stats, struct err *e);
#endif
