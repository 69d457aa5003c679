/* Sequences over a model: who has which KV pages and state slot, and steps over rows of several of them.
 * Takes tokens, gives log-probability-ready logits. One thread owns an engine. */
#ifndef ENGINE_ENGINE_H
#define ENGINE_ENGINE_H
#include "model/model.h"

struct engine_options {
    int64_t context;   /* most tokens of one sequence; 0: 4096, or the model's maximum if less */
    int sequences;     /* at a time; 0: 1 */
    int64_t step_rows; /* most rows of a step; 0: as the backend likes */
    enum kv_dtype kv;
    int64_t pages; /* of KV_PAGE tokens each, that sequences share; 0: as many as all of them can fill */
    int snapshots; /* see engine/snapshot.h; 0: none */
    int drafts;    /* most tokens drafted ahead of a sequence, up to DRAFTS_MAX; 0: none. Else the model's MTP
                      head must be bound */
};
enum { DRAFTS_MAX = 8 };

struct engine;
bool engine_create(struct engine **out, struct model *m, const struct engine_options *o, struct err *e);
void engine_free(struct engine *g); /* NULL is fine */
/* What steps of such an engine take of the backend's memory, before anything is bound. */
uint64_t engine_step_bytes(const struct config *c, const struct backend *b, const struct engine_options *o);
int64_t engine_context(const struct engine *g);
int64_t engine_step_rows(const struct engine *g);
int engine_sequences(const struct engine *g);
int engine_snapshots(const struct engine *g);
int64_t engine_pages(const struct engine *g);
int64_t engine_pages_free(const struct engine *g);
int engine_drafts(const struct engine *g);          /* as asked for */
int64_t engine_vocab(const struct engine *g);       /* columns of logits */
int64_t engine_logits_rows(const struct engine *g); /* most rows of one engine_logits */
bool engine_few_differ(const struct engine *g);     /* of the backend */

/* An empty sequence, 0 <= handle < sequences; false with ERR_LIMIT when all are in use. */
bool engine_open(struct engine *g, int *handle, struct err *e);
void engine_close(struct engine *g, int handle);
/* Takes the pages that the sequence's next n rows go to, which else engine_step and engine_draft do; false,
 * and nothing is taken: too few are free. */
bool engine_reserve(struct engine *g, int handle, int64_t n);
int64_t engine_length(const struct engine *g, int handle);
/* Of the next token, if it is text: the length, less what pictures save. */
int64_t engine_position(const struct engine *g, int handle);

/* Rows to append to one sequence. Of tentative ones, at most drafts + 1, engine_keep says how many stay. */
struct engine_run {
    int handle;
    const struct row *rows;
    int64_t n;
    bool tentative;
    bool prompt; /* step_rows.prompts, if so for all runs of the step */
};
/* One step: appends every run's rows (each sequence at most once), at most step_rows in all. *hidden: the
 * normed hidden rows in the order of the runs, in the backend's memory, valid until the next step. ERR_LIMIT
 * past the context, ERR_BUSY without free pages: nothing has happened then. */
bool engine_step(struct engine *g, const struct engine_run *runs, int n_runs, struct mat *hidden,
                 struct err *e);
/* Logits of chosen rows of `hidden`, n <= engine_logits_rows. In the backend's memory, valid until the next
 * call. */
struct mat engine_logits(struct engine *g, struct mat hidden, const int64_t *index, int64_t n);
/* The same as host rows [n][vocab], owned by the engine, valid until the next call. */
const float *engine_logits_host(struct engine *g, struct mat hidden, const int64_t *index, int64_t n);

/* Of what engine_logits returned: host rows [first, first + n), as above; and a token drawn from each row,
 * which costs the host nothing. -1: none may come. */
const float *engine_fetch(struct engine *g, struct mat logits, int64_t first, int64_t n);
void engine_draw(struct engine *g, int32_t *out, struct mat logits, const struct draw *draws);
/* The same from chosen rows of `hidden`, where nobody wants their logits: which may cost less. */
void engine_draw_rows(struct engine *g, int32_t *out, struct mat hidden, const int64_t *index, int64_t n,
                      const struct draw *draws);
/* What draws may give from now on: bits as in num/draw.h, copied; NULL: everything, as at first. */
bool engine_allow(struct engine *g, const uint32_t *allowed, struct err *e);
/* Changes of rows before that, see ops.h: tokens that must not come next in one row; n edits. */
void engine_mask(struct engine *g, struct mat logits, int64_t row, const uint32_t *allowed);
void engine_edit(struct engine *g, struct mat logits, const struct logit_edit *edits, int64_t n);

/* Waits for what was queued; false: it failed. */
bool engine_wait(struct engine *g, struct err *e);

/* Speculation. A round of a sequence: the token sampled last and what engine_draft guesses after it are the
 * rows of a tentative run; from their logits the next tokens are sampled in order for as long as each turns
 * out to be the one guessed; engine_keep forgets the rows after. Rounds of several sequences may share steps.
 * The rows' logits have the bits of a token a step (steps of up to ROWS_EXACT rows), whatever was guessed. */

/* After a step with a tentative run: its first n rows stay, 1 <= n, the others are forgotten. Must come
 * before the sequence's next step. Costs nothing. */
void engine_keep(struct engine *g, int handle, int64_t n);

struct engine_draft {
    int handle;
    int32_t next;               /* the token sampled after the sequence's last row */
    int n;                      /* wanted; what the context and free pages allow is given */
    int32_t tokens[DRAFTS_MAX]; /* guessed to come after `next` */
};
/* Drafts for n sequences that were in the last step, before any other. A sequence that was stepped without
 * drafting goes on with gaps in what its head has seen. */
bool engine_draft(struct engine *g, struct engine_draft *drafts, int n, struct err *e);

/* Makes a sequence n tokens longer without computing them: what it remembers becomes noise. For throughput
 * runs at a depth. ERR_LIMIT past the context. */
bool engine_skip(struct engine *g, int handle, int64_t n, struct err *e);

/* Appends n rows to a sequence in steps of at most step_rows, as a prompt's if they are more than ROWS_EXACT;
 * *last gets the host logits after the last one. progress may be NULL. */
bool engine_prefill_rows(struct engine *g, int handle, const struct row *rows, int64_t n, const float **last,
                         const struct report *progress, struct err *e);
/* Text rows: tokens at consecutive positions from `first`. */
void engine_text_rows(struct row *rows, const int32_t *tokens, int64_t n, int64_t first);
/* The same for text, at the positions that are next. */
bool engine_prefill(struct engine *g, int handle, const int32_t *tokens, int64_t n, const float **last,
                    const struct report *progress, struct err *e);
#endif
